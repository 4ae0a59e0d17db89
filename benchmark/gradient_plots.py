"""The pictures of model_gradients.py and through_time.py, from their CSVs.

    python benchmark/gradient_plots.py

Lines are means over seeds, geometric where the axis is logarithmic, and bands are the ranges.
"""

import contextlib
import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

HORIZONS, ROWS = (1, 2, 4, 8, 16), 32
STYLES = {  # (spectral norm, estimator): name, colour, line
    ("none", "dp"): ("no SN", "#b5322a", "-"), ("both", "dp"): ("SN", "#20639b", "-"),
    ("none", "dr"): ("no SN, DR", "#e08a7d", "--"), ("both", "dr"): ("SN, DR", "#7fb0d8", "--"),
}  # fmt: skip
PANELS = dict(
    variance="total variance of a gradient", relative="variance / |mean gradient|²",
    cosine="cosine with the true gradient", cosine_return="cosine with that of the true $J_{32}$",
)  # fmt: skip


def axes(panel, title, xlabel, ylabel):
    panel.set_title(title, loc="left", fontsize=10)
    panel.set(xlabel=xlabel, ylabel=ylabel)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)


def horizon_axis(panel, horizons=HORIZONS):
    panel.set_xscale("log", base=2)
    panel.set_xticks(horizons, [f"{h}" for h in horizons])
    panel.set_xlim(horizons[0] / 1.1, 2.7 * horizons[-1])  # place for the labels of lines


def plain_numbers(axis):
    """1, 2, 5, 10, ... on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def label_ends(panel, ends):
    """Names at the right ends of lines, [(x, y, name, colour)], moved apart."""
    panel.figure.canvas.draw()
    to_pixels, last = panel.transData.transform, -np.inf
    for x, y, name, color in sorted(ends, key=lambda end: end[1]):
        place = max(to_pixels((x, y))[1], last + 0.115 * panel.figure.dpi)
        offset, last = (place - to_pixels((x, y))[1]) * 72 / panel.figure.dpi, place
        panel.annotate(name, (x, y), (5, offset), textcoords="offset points", color=color,
                       va="center", fontsize=8.5, bbox=dict(fc="white", lw=0, alpha=0.7, pad=0.5),
                       zorder=5)  # fmt: skip


def per_seed(rows, column, **values):
    """[seeds, horizons] of a column, with the horizons."""
    rows = [row for row in rows if values.items() <= row.items()]
    seeds, horizons = (sorted({row[name] for row in rows}) for name in ("seed", "h"))
    cells = {(row["seed"], row["h"]): row[column] for row in rows}
    return horizons, np.array([[cells[seed, h] for h in horizons] for seed in seeds])


def draw_horizons(rows, path):
    tasks = list(dict.fromkeys(row["env_id"] for row in rows))
    figure, panels = plt.subplots(
        len(tasks), 4, figsize=(16, 3.9 * len(tasks)), layout="constrained", squeeze=False
    )
    for env_id, line in zip(tasks, panels):
        for panel, (column, title) in zip(line, PANELS.items()):
            ends, cos = [], column.startswith("cosine")
            for (norm, estimator), (name, color, dash) in STYLES.items():
                case = dict(env_id=env_id, spectral_norm=norm, estimator=estimator, sn_coef=1)
                h, values = per_seed(rows, column, **case)
                mean = values.mean(0) if cos else np.exp(np.log(values).mean(0))
                panel.plot(h, mean, dash, marker="o", ms=4, color=color)
                panel.fill_between(h, values.min(0), values.max(0), color=color, alpha=0.13, lw=0)
                last = np.flatnonzero(np.isfinite(mean))[-1]
                ends.append((h[last], mean[last], name, color))
            axes(panel, f"{env_id}: {title}", "horizon h", "")
            horizon_axis(panel)
            panel.set_yscale("linear" if cos else "log")
            if cos:
                panel.axhline(0, color="grey", lw=0.8)
            label_ends(panel, ends)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_price(rows, times, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    env_id = rows[0]["env_id"]
    rows = [r for r in rows if (r["env_id"], r["h"], r["estimator"]) == (env_id, 8, "dp")]
    for norm, c in sorted({(row["spectral_norm"], row["sn_coef"]) for row in rows}):
        case = [row for row in rows if (row["spectral_norm"], row["sn_coef"]) == (norm, c)]
        x, y = (np.array([row[name] for row in case]) for name in ("model_error", "variance"))
        color, name = STYLES[norm, "dp"][1], f"c = {c:g}" if norm == "both" else "no SN"
        left.scatter(x, y, s=14, color=color, alpha=0.4, lw=0)
        x, y = (np.exp(np.log(values).mean()) for values in (x, y))
        left.scatter(x, y, s=55, color=color)
        left.annotate(name, (x, y), (7, 5), textcoords="offset points", color=color, fontsize=9)
    left.set(xscale="log", yscale="log", xlim=(0.05, 0.8))
    axes(left, f"{env_id}, h = 8: variance and the model's error", "one-step error of the model",
         PANELS["variance"])  # fmt: skip
    ends = []
    uncached = "SN, not cached", STYLES["both", "dp"][1], ":"
    for case in ("none", "both", "uncached"):
        name, color, dash = STYLES.get((case, "dp"), uncached)
        line = [row for row in times if row["case"] == case]
        x, y = ([row[name] for row in line] for name in ("h", "cpu_ms"))
        right.plot(x, y, dash, marker="o", ms=4, color=color)
        ends.append((x[-1], y[-1], name, color))
    right.set_yscale("log")
    for axis in (left.xaxis, left.yaxis, right.yaxis):
        plain_numbers(axis)
    axes(right, "an actor's step", "horizon h", "CPU milliseconds")
    horizon_axis(right)
    label_ends(right, ends)
    figure.savefig(path, dpi=130)
    plt.close(figure)


LINES = {  # what is drawn: name, colour, line
    "bptt_sac, at first": ("BPTT, at init", "#8e6bbf", ":"),
    "bptt_sac": ("BPTT", "#6a3d9a", "-"),
    "flow mlp": ("flow, naive", "#d98c21", "-"),
    "flow flow_g": ("Flow-G", "#8a6d1a", "-"),
    "flow flow_t": ("Flow-T", "#c9b458", "-"),
    "model none": ("model, no SN", "#b5322a", "-"),
    "model both": ("model, SN", "#20639b", "-"),
}


def draw_through_time(rows, path):
    """Norms and variances over those at k = 0: means over seeds, and the range."""
    figure, panels = plt.subplots(1, 3, figsize=(16, 4.8), layout="constrained")
    titles = dict(norm="norm of the gradient", variance="its variance over samples")
    for panel, (column, title) in zip(panels, titles.items()):
        ends = []
        for method, (name, color, dash) in LINES.items():
            found = [row for row in rows if row["method"] == method]
            seeds = sorted({row["seed"] for row in found})
            values = np.array([[r[column] for r in found if r["seed"] == seed] for seed in seeds])
            values = np.log(values / values[:, :1])
            k, mean = range(values.shape[1]), np.exp(values.mean(0))
            panel.plot(k, mean, dash, color=color)
            low, high = np.exp(values.min(0)), np.exp(values.max(0))
            panel.fill_between(k, low, high, color=color, alpha=0.12, lw=0)
            ends.append((k[-1], mean[-1], name, color))
        panel.plot([0, ROWS - 1], [1, 1], color="black", lw=1)
        ends.append((ROWS - 1, 1, "S2PG: one step", "black"))
        axes(panel, f"{title}, over that at k = 0", "steps k that it passes through", "")
        panel.set(yscale="log", xlim=(0, 1.3 * ROWS))
        label_ends(panel, ends)
    draw_known([row for row in rows if row["exact"] != ""], panels[2])
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_known(rows, panel):
    ends, names = [], list(dict.fromkeys(row["method"] for row in rows))
    for i, name in enumerate(names):
        k, exact, norm = zip(
            *((r["k"], r["exact"], r["norm"]) for r in rows if r["method"] == name)
        )
        panel.plot(k, exact, color=f"C{i}", lw=1)
        panel.plot(k[::2], norm[::2], "o", ms=3.5, color=f"C{i}")
        ends.append((k[-1], exact[-1], name, f"C{i}"))
    axes(panel, "known slopes: lines exact, dots measured", "steps k that it passes through", "")
    panel.set(yscale="log", xlim=(0, 1.4 * ROWS), ylim=(1e-5, 1e2))
    label_ends(panel, [end for end in ends if end[1] > 1e-5])


def read(path):
    """Rows, with numbers where cells are numbers."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name, cell in row.items():
            with contextlib.suppress(ValueError):
                row[name] = float(cell)
    return rows


def main(results: Path = Path("benchmark/results"), docs: Path = Path("docs")):
    names = "model_gradients", "model_gradients_speed", "through_time"
    paths = [results / f"{name}.csv" for name in names]
    for path in (*paths, docs):
        if not path.exists():
            sys.exit(f"{path} is missing; model_gradients.py and through_time.py write the CSVs")
    gradients, speed, through_time = (read(path) for path in paths)
    try:
        draw_horizons(gradients, results / "model_gradients.png")
        draw_price(gradients, speed, results / "model_gradients_price.png")
        draw_through_time(through_time, docs / "gradients_through_time.png")
    except (KeyError, IndexError, ValueError) as error:
        sys.exit(f"the CSVs in {results} are not complete: {error!r}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
