"""Every picture, and the tables of README and docs/, from the CSVs of benchmark/results/.

    python benchmark/plot.py                       # all
    python benchmark/plot.py cue_recall td3        # some claims
    python benchmark/plot.py --check               # are the tables as the CSVs say?
    python benchmark/plot.py --csv my.csv          # a file of collect.py --runs

Curves are interquartile means over seeds with 95 % bands of a stratified bootstrap, as in Agarwal
et al., "Deep reinforcement learning at the edge of the statistical precipice", 2021 (rliable).
Of fewer than four seeds these are the mean and the range. A table has the returns of each seed at
the end, as no statistic of three seeds says more than the three.
"""

import csv
import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.colors import to_hex
from matplotlib.ticker import EngFormatter
from rliable import library as rly

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark import variance
from benchmark.claims import CLAIMS, OVERVIEW, Claim
from benchmark.sweep import check_names

PAGES = "README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))


@dataclasses.dataclass
class Args:
    claims: tyro.conf.Positional[tuple[str, ...]] = ()  # names of claims.py; by default everything
    results: str = "benchmark/results"  # folder of the CSVs and the pictures
    pages: tuple[str, ...] = PAGES  # files with the tables, each between a pair of marks
    check: bool = False  # write nothing, and fail if the tables there are others
    csv: str | None = None  # instead of a claim: draw this file, and print its table


MODES = "stochastic", "deterministic"
UNITS = {"return": "return", "success": "success in %"}


class Curve(NamedTuple):
    """The evaluations of S seeds at T steps."""

    steps: np.ndarray  # [T]
    minutes: np.ndarray  # [S, T], of training
    stochastic: np.ndarray  # [S, T], mean returns, or shares of success in %
    deterministic: np.ndarray  # [S, T]


def read(path, claim):
    """{env_id: {label: Curve}} of a CSV of collect.py, in the order of the claim."""
    points, (measure, _) = {}, claim.column.split("_")
    unit = 100 if measure == "success" else 1
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            seeds = points.setdefault(row["env_id"], {}).setdefault(row["label"], {})
            seed = seeds.setdefault(int(row["seed"]), {})
            options, step = json.loads(row["options"]), int(row["step"])
            frequency = options.get("eval_frequency", 10_000)
            late = step % frequency if frequency > 0 else 0
            if late < options.get("num_envs", 1) and step - late not in seed:
                step -= late  # environments pass a multiple together
            if step in seed:
                run = f"{row['label']}, seed {row['seed']}"
                raise SystemExit(f"plot.py: {path}: two rows are step {step} of {run}")
            values = [unit * float(row[f"{measure}_{mode}"]) for mode in MODES]
            seed[step] = [float(row["wall_seconds"]), *values]
    result = {}
    for env_id, labels in points.items():
        for label, seeds in labels.items():
            steps = sorted(set.intersection(*(set(seed) for seed in seeds.values())))
            if not steps:
                raise SystemExit(
                    f"plot.py: {path}: the seeds of {label} were evaluated at no common step"
                )
            last = max(map(max, seeds.values()))
            if steps[-1] < last:
                message = f"not all seeds of {label} were evaluated at step {last}"
                print(f"plot.py: {path}: {message}", file=sys.stderr)
            values = [[seeds[number][step] for step in steps] for number in sorted(seeds)]
            seconds, stochastic, deterministic = np.moveaxis(np.array(values), -1, 0)
            curve = Curve(np.array(steps), seconds / 60, stochastic, deterministic)
            result.setdefault(env_id, {})[label] = curve
    tasks = " ".join(claim.tasks) + " "
    place = {env_id: tasks.find(f"--env-id {env_id} ") for env_id in result}
    return {env_id: result[env_id] for env_id in sorted(result, key=place.get)}


def interquartile_mean(returns, repetitions=2000):
    """Of returns [S, T]: the mean [T], and the 95 % band [2, T]."""
    if len(returns) < 4:  # of these the bootstrap's band is the range
        return returns.mean(0), np.stack([returns.min(0), returns.max(0)])
    quarter = len(returns) // 4

    def iqm(scores):  # [S, 1 task, T]
        return np.sort(scores[:, 0], 0)[quarter : len(scores) - quarter].mean(0)

    # rliable draws from numpy's own generator, whatever it is given
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    means, bands = rly.get_interval_estimates({"": returns[:, None]}, iqm, reps=repetitions)
    np.random.set_state(state)  # noqa: NPY002
    return means[""], bands[""]


def ordered(labels, claim):
    """In the order of the claim; what it does not know, such as the expert, comes last."""
    known = [label for label in claim.methods if label in labels]
    return known + [label for label in labels if label not in known]


def color_of(label):
    """Blue is S2PG, red and orange BPTT, grey what has no memory, black what is no competitor."""
    own = {
        "S2PG-SAC, no privileged critic": "#17becf", "S2PG-SAC, chrono, less noise": "#17becf",
        "BPTT-SAC, L = 1": "#ff7f0e", "BPTT-SAC, L = 1, chrono": "#8c564b",
        "BPTT-PPO, L = 1": "#ff7f0e", "S2PG-PPO, separate ratios": "#17becf",
        "S2PG-PPO, memory std .2": "#17becf", "S2PG-PPO, memory std .5": "#6a3d9a",
        "BPTT-SAC, L = 5, last row": "#ff7f0e", "BPTT-SAC, L = 5, all rows": "#ff7f0e",
        "BPTT-SAC, L = 32, last row": "#8c564b", "BPTT-SAC, L = the horizon": "#8c564b",
        "BPTT-SAC, L = 32, from zeros": "#e377c2",
    }  # fmt: skip
    families = {
        "S2PG": "C0", "BPTT": "#d62728", "memoryless": "#7f7f7f", "SAC that sees": "black",
        "expert": "black", "cloning": "#bcbd22",
    }  # fmt: skip
    family = next((color for name, color in families.items() if label.startswith(name)), None)
    return own.get(label, family)


def colors_of(labels):
    """{label: color}, no two alike."""
    colors, free = {}, [f"C{i}" for i in range(10)] + [to_hex(c) for c in plt.cm.tab20b.colors]
    for label in labels:
        taken = {to_hex(color) for color in colors.values()}
        mine = [color_of(label) or free[0], *free]
        colors[label] = next((c for c in mine if to_hex(c) not in taken), "black")
    return colors


def title_of(env_id, claim):
    """The environment, and what the claim asks of it."""
    (task,) = [task for task in claim.tasks if f"--env-id {env_id} " in f"{task} "] or [""]
    title = env_id
    for option, words in (("wind True", "wind"), ("random_bodies True", "random bodies")):
        title += f", {words}" * (option in task)
    return title


def draw(data, claim, path):
    """Panels for each environment: the return against steps, and against minutes (medians).

    They stand below each other, and next to each other where there is one environment alone. Of
    more than four environments without a clock three stand in a row.
    """
    rows, columns = (2 if claim.clock else 1), len(data)
    if columns == 1:
        rows, columns = columns, rows
    elif rows == 1 and columns > 4:
        rows, columns = math.ceil(columns / 3), 3
    figure, panels = plt.subplots(
        rows, columns, figsize=(5.2 * columns, 3.4 * rows), squeeze=False, layout="constrained"
    )
    labels = ordered({label: None for env in data.values() for label in env}, claim)
    colors = colors_of(labels)
    handles, (measure, mode) = {}, claim.column.split("_")
    # the panels of each environment
    groups = panels if len(data) == 1 else panels.T if claim.clock else panels.reshape(-1, 1)
    for unused in groups[len(data) :]:
        unused[0].set_visible(False)
    for column, (env_id, curves) in zip(groups, data.items()):
        for panel in column:
            panel.set_title(title_of(env_id, claim))
        for label in ordered(curves, claim):
            curve, style = curves[label], dict(color=colors[label], label=label)
            returns = getattr(curve, mode)
            if curve.steps[-1] == 0:
                for panel in column:
                    panel.axhline(returns.mean(), lw=1.5, ls="--", **style)
                continue
            mean, (low, high) = interquartile_mean(returns)
            if len(returns) == 1:
                style |= dict(ls=(0, (4, 1)))  # it is no mean
            for panel, x in zip(column, (curve.steps, np.median(curve.minutes, 0))):
                panel.plot(x, mean, lw=2, **style)
                panel.fill_between(x, low, high, color=colors[label], alpha=0.15, lw=0)
        for panel, unit in zip(column, ("environment steps", "minutes of training")):
            panel.set(xlabel=unit, xlim=(0, None), ylabel=f"{UNITS[measure]}, {mode}")
            if env_id in claim.threshold:
                panel.axhline(claim.threshold[env_id], color="black", lw=0.8, ls=":")
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(alpha=0.25)
        column[0].xaxis.set_major_formatter(EngFormatter(sep=""))
        handles = dict(zip(*column[0].get_legend_handles_labels()[::-1])) | handles
    lines = math.ceil(len(labels) / (1 + columns))
    figure.legend(
        [handles[label] for label in labels], labels, loc="outside lower center", frameon=False,
        ncols=math.ceil(len(labels) / lines),
    )  # fmt: skip
    figure.savefig(path, dpi=150)
    plt.close(figure)


FIRST_CURVES = {  # of the README's picture: name and color
    "memoryless SAC": ("no memory", "#8c8c8c"),
    "BPTT-SAC, L = 32, last row": ("BPTT as published:\nloss on the last\nof 32 rows", "#e07b00"),
    "BPTT-SAC, L = 32, all rows": ("BPTT, loss on all 32 rows", "#c1272d"),
    "S2PG-SAC": ("S2PG", "#0057b8"),
}
FIRST_PANELS = {  # env_id: title, largest minutes and return, where the names of curves stand
    "InvertedDoublePendulum-v4": (
        "Double pendulum", (31, 10_300),
        {
            "S2PG-SAC": (4.1, 3100), "BPTT-SAC, L = 32, all rows": (6, 9800),
            "BPTT-SAC, L = 32, last row": (13.2, 5600), "memoryless SAC": (6.8, 120),
        },
    ),
    "HalfCheetah-v4": ("HalfCheetah", (33, 5800), {"S2PG-SAC": (1.2, 4300)}),
    "Hopper-v4": ("Hopper", (38, 2900), {"S2PG-SAC": (25, 480)}),
}  # fmt: skip


def draw_first(data, path):
    """The README's picture: the return against minutes (medians), mean and range of the seeds."""
    style = {"font.size": 14, "axes.titlesize": 17, "axes.titleweight": "bold"}
    with plt.rc_context(style):
        figure, panels = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained")
        for panel, (env_id, (title, largest, places)) in zip(panels, FIRST_PANELS.items()):
            for label in [label for label in FIRST_CURVES if label in data.get(env_id, {})]:
                curve, (name, color) = data[env_id][label], FIRST_CURVES[label]
                x, y = np.median(curve.minutes, 0), curve.stochastic
                panel.plot(x, y.mean(0), color=color, lw=3, marker="o", markevery=[-1], ms=8)
                panel.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.13, lw=0)
                if label in places:
                    panel.text(*places[label], name, color=color, weight="bold")
            panel.set_title(title, pad=14)
            panel.set(xlim=(0, largest[0]), ylim=(0, largest[1]), xlabel="minutes of training")
            panel.spines[["top", "right"]].set_visible(False)
            panel.locator_params(nbins=5)
        panels[0].set_ylabel("return")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def rows_of(path, claim):
    """{env_id: {label: {seed: rows}}} of a CSV of memory.py, in the order of the claim."""
    result = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            seeds = result.setdefault(row["env_id"], {}).setdefault(row["label"], {})
            seeds.setdefault(int(row["seed"]), []).append(row)
    tasks = " ".join(claim.tasks) + " "
    return {
        env_id: {label: result[env_id][label] for label in ordered(result[env_id], claim)}
        for env_id in sorted(result, key=lambda env_id: tasks.find(f"--env-id {env_id} "))
    }


def draw_probe(data, claim, path):
    """A panel for each environment: in how many episodes the cue can be read from the memory.

    Dashed: before training. Methods that begin with the same networks share the line.
    """
    figure, panels = plt.subplots(
        1, len(data), figsize=(1 + 3.2 * len(data), 3.4), squeeze=False, layout="constrained",
        sharey=True,
    )  # fmt: skip
    labels = ordered({label: None for env in data.values() for label in env}, claim)
    colors, handles = colors_of(labels), {}
    for panel, (env_id, runs) in zip(panels[0], data.items()):
        for label, seeds in runs.items():
            before, after = (
                100 * np.array([
                    [float(row["correct"]) for row in rows if row["trained"] == trained]
                    for rows in seeds.values()
                ])
                for trained in "01"
            )  # fmt: skip
            x, style = np.arange(after.shape[1]), dict(color=colors[label])
            panel.plot(x, before.mean(0), lw=1.2, ls="--", **style)
            (handles[label],) = panel.plot(x, after.mean(0), lw=2, **style)
            panel.fill_between(x, after.min(0), after.max(0), alpha=0.15, lw=0, **style)
        panel.axhline(50, color="black", lw=0.8, ls=":")
        panel.set(xlabel="steps since the cue", xlim=(0, None), title=env_id)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    panels[0, 0].set_ylabel("cues read from the memory, %")
    figure.legend(
        [handles[label] for label in labels], labels, loc="outside lower center", frameon=False,
        ncols=math.ceil(len(labels) / math.ceil(len(labels) / (1 + len(data)))),
    )  # fmt: skip
    figure.savefig(path, dpi=150)
    plt.close(figure)


def markdown(header, lines):
    """A table of lists of cells."""
    lines = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def memory_table(data):
    """A row for each environment and method, what memory.py found with each seed."""
    runs = next(iter(data.values()))
    ((row, *_), *_) = next(iter(runs.values())).values()
    changes = [name for name in row if name not in ("env_id", "label", "seed", "episodes")]
    lines = []
    for env_id, runs in data.items():
        lines.append([f"**{env_id}**"] + [""] * len(changes))
        for label, seeds in runs.items():
            cells = [[rounded(float(rows[0][name])) for rows in seeds.values()] for name in changes]
            lines.append([label, *(", ".join(cell) for cell in cells)])
    return markdown(["", *changes], lines)


def rounded(value):
    return f"{value:.1f}" if abs(value) < 99.95 else f"{value:.0f}"


def to_threshold(x, returns, threshold):
    """Where each seed first reaches the threshold, as their median; and how many do."""
    reached = returns >= threshold
    first = np.take_along_axis(x, reached.argmax(1)[:, None], 1)[:, 0]
    where = np.where(reached.any(1), first, np.inf)
    median = np.median(where)
    number = f"{median:.3g}" if median < 100 else f"{median:,.0f}"
    share = "" if reached.any(1).all() else f" ({reached.any(1).sum()} of {len(returns)})"
    return ("never" if np.isinf(median) else number) + share


def table(data, claim):
    """A row for each environment and method."""
    measure, mode = claim.column.split("_")
    curves = [curve for curves in data.values() for curve in curves.values()]
    many = {len(curve.stochastic) > 3 for curve in curves if curve.steps[-1] > 0}
    center, spread = ("IQM", "95 %") if many == {True} else ("mean", "range")
    if len(many) == 2:
        center, spread = "mean (4 seeds or more: IQM)", "range or 95 %"
    header = ["", f"{UNITS[measure]} at the end, each seed", "noise-free"]
    header += [f"{center} [{spread}]", f"best {center}"]
    if claim.threshold:
        header += ["steps to threshold"] + ["minutes"] * claim.clock
    lines = []
    for env_id, curves in data.items():
        goal = claim.threshold.get(env_id)
        threshold = f", threshold {goal:,g}" if goal else ""
        last = max(curve.steps[-1] for curve in curves.values())
        lines.append([f"**{env_id}**, {last:,} steps{threshold}"] + [""] * (len(header) - 1))
        for label in ordered(curves, claim):
            curve = curves[label]
            both = [
                ", ".join(rounded(value) for value in returns[:, -1])
                for returns in (curve.stochastic, curve.deterministic)
            ]
            if curve.steps[-1] == 0:
                lines.append([label, *both] + [""] * (len(header) - 3))
                continue
            returns = getattr(curve, mode)
            mean, (low, high) = interquartile_mean(returns)
            best = mean.argmax()
            band = f" [{rounded(low[-1])}, {rounded(high[-1])}]" if len(returns) > 1 else ""
            sooner = f" after {curve.steps[-1]:,}" if curve.steps[-1] < last else ""
            line = [
                label + sooner, *both, rounded(mean[-1]) + band,
                f"{rounded(mean[best])} at {curve.steps[best]:,}",
            ]  # fmt: skip
            if claim.threshold and goal is None:
                line += [""] * (len(header) - len(line))
            elif goal is not None:
                steps = np.broadcast_to(curve.steps, returns.shape)
                line.append(to_threshold(steps, returns, goal))
                line += [to_threshold(curve.minutes, returns, goal)] * claim.clock
            lines.append(line)
    return markdown(header, lines)


def overview(data, short=False):
    """The lines of OVERVIEW, or those for the README, means over seeds at the end.

    Bold is a method of which each seed ends above each seed of the others.
    """
    lines = []
    for line in [line for line in OVERVIEW if line.readme or not short]:
        labels = line.s2pg, line.bptt, line.memoryless
        found = data.get(line.claim, {}).get(line.env_id, {})
        curves = {label: found.get(label) for label in labels}
        last = max((curve.steps[-1] for curve in curves.values() if curve), default=0)
        ends = {k: curve.stochastic[:, -1] for k, curve in curves.items() if curve}
        cells = dict.fromkeys(labels, "")
        for label, returns in ends.items():
            cells[label] = rounded(returns.mean())
            others = ends.keys() - {label}
            if others and all(returns.min() > ends[other].max() for other in others):
                cells[label] = f"**{cells[label]}**"
            if curves[label].steps[-1] < last:
                cells[label] += f" after {curves[label].steps[-1]:,}"
        lines.append([line.task, f"{last:,}" if last else "", *cells.values(), f"`{line.claim}`"])
    return markdown(["task", "steps", "S2PG", "BPTT", "no memory", "experiment"], lines)


def speed_table(paths):
    """The tables of update_time.py in these files, those of two tasks side by side."""
    names, methods = [path.read_text().split()[0] for path in paths], {}
    piece = re.compile("S2PG, (sampling|critic|actor|targets|refresh)")  # in older files
    for name, path in zip(names, paths):
        for block in path.read_text().split("\n\n"):
            title, *lines = block.splitlines()
            if " ms per " not in title:
                continue
            algorithm = title.split(",")[0]
            for line in lines:
                method, cells = line[:38].strip(), line[38:].split()
                if len(cells) == 3 and not piece.match(method):
                    method = re.sub("^(S2PG|BPTT)", rf"\1-{algorithm}", method)
                    method = method.replace("memoryless", f"memoryless {algorithm}")
                    methods.setdefault(method, {})[name] = cells
    header, lines = [""], [[method] for method in methods]
    for name in names:
        header += [f"{name}: ms", "x memoryless", "x S2PG"]
        for line, tasks in zip(lines, methods.values()):
            line += tasks.get(name, [""] * 3)
    return markdown(header, lines)


def rollout_table(paths):
    """Steps per second of PPO without updates by update_time.py; rows per second in older files."""
    lines, header = [], [""]
    for path in paths:
        block = r"PPO[^\n]* (\d+) envs .*?(?:rows per second|without updates): (.*?)$"
        blocks = re.findall(block, path.read_text(), re.S | re.M)
        header = [""] + [f"{n} environment{'s' * (n != '1')}" for n, _ in blocks]
        methods = {}
        for _, speeds in blocks:
            for method, speed in (item.rsplit(" ", 1) for item in speeds.split(", ")):
                methods.setdefault(method, []).append(speed)
        name = path.read_text().split()[0]
        lines += [[f"{name}, {method}", *speeds] for method, speeds in methods.items()]
    return markdown(header, lines)


def insert(text, tables):
    """`text` with each table between its marks; a table without marks is left out."""
    for name, new in tables.items():
        begin, end = f"<!-- {name}: plot.py writes this table -->", "<!-- end -->"
        pattern = re.compile(f"({re.escape(begin)}\n).*?({re.escape(end)})", re.DOTALL)
        text = pattern.sub(lambda match, new=new: f"{match[1]}\n{new}\n\n{match[2]}", text)
    return text


def main(args: Args):
    results = ROOT / args.results
    if args.csv:
        claim, path = Claim("", {}, []), Path(args.csv)
        if not path.exists():
            sys.exit(f"plot.py: there is no file {path}")
        try:
            data = read(path, claim)
        except (KeyError, ValueError):
            data = {}
        if not data:
            sys.exit(f"plot.py: {path} is no CSV of collect.py")
        draw(data, claim, path.with_suffix(".png"))
        print(table(data, claim))
        return
    check_names("claim", args.claims, CLAIMS)
    for name in args.pages:
        if not (ROOT / name).exists():
            sys.exit(f"plot.py: there is no page {name}")
    data, tables = {}, {}
    for name in args.claims or CLAIMS:
        path = results / f"{name}.csv"
        if not path.exists():
            print(f"not measured yet: {name}")
            continue
        claim = CLAIMS[name]
        data[name] = read(path, claim)
        tables[name] = table(data[name], claim)
        if not args.check:
            draw(data[name], claim, path.with_suffix(".png"))
            print(path.with_suffix(".png"))
        for kind in ("ablated", "readout"):
            studied = path.with_stem(f"{name}_{kind}")
            if studied.exists():
                tables[studied.stem] = memory_table(rows_of(studied, claim))
        probed = path.with_stem(f"{name}_probe")
        if probed.exists() and not args.check:
            draw_probe(rows_of(probed, claim), claim, probed.with_suffix(".png"))
            print(probed.with_suffix(".png"))
    if not args.claims:
        sac, ppo = (
            [results / f"update_time{algorithm}_{task}.txt" for task in ("hopper", "humanoid")]
            for algorithm in ("", "_ppo")
        )
        tables["overview"] = overview(data)
        tables["short overview"] = overview(data, short=True)
        if "sac_and_bptt" in data and not args.check:
            draw_first(data["sac_and_bptt"], results / "overview.png")
            print(results / "overview.png")
        if all(path.exists() for path in (*sac, *ppo)):
            tables |= {"speed": speed_table(sac), "speed of PPO": speed_table(ppo)}
            tables["rows per second"] = rollout_table(ppo)
        if not args.check and (results / "variance.csv").exists():
            variance.redraw(results / "variance")
            print(results / "variance.png")
    for name in args.pages:
        page = ROOT / name
        before = page.read_text()
        unknown = set(re.findall("<!-- (.*): plot.py writes this table -->", before)) - set(tables)
        if unknown and not args.claims:
            sys.exit(f"plot.py: {name} has places for tables that there are not: {unknown}")
        after = insert(before, tables)
        if args.check and after != before:
            sys.exit(f"plot.py: the tables of {name} are not those of the CSVs; run plot.py")
        if not args.check:
            page.write_text(after)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
