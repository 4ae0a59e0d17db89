"""What is left of a gradient on its way through a flow, over the training of the claim `flow`.

    python benchmark/sweep.py flow
    python benchmark/flow_profile.py

flow_sac.py logs the mean norm of dQ/dx_k for each step k of its policy. Written to --results, with
unfinished runs as far as they are: flow_gradients.csv, a row for each run, interval of training and
k, with the norm and its ratio to that at x_K; and a picture of the ratios.
"""

import dataclasses
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import collect, sweep
from benchmark.claims import CLAIMS

COLUMNS = ["env_id", "label", "seed", "step", "k", "norm", "ratio", "std", "gate"]


@dataclasses.dataclass
class Args:
    out: str = "runs/sweep"  # the folder that sweep.py ran the claim in
    results: str = "benchmark/results"  # folder of the CSV and of the picture
    interval: int = 5_000  # steps over which a row takes the mean

    def __post_init__(self):
        if self.interval < 1:
            sys.exit("--interval must be at least 1")


def profile(folder, env_id, label, seed, interval):
    """The rows of one run."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    sums = defaultdict(lambda: defaultdict(list))  # {step: {tag: values}}
    for tag in events.Tags()["scalars"]:
        if tag.startswith("flow/"):
            for event in events.Scalars(tag):
                sums[-(-event.step // interval) * interval][tag[5:]].append(event.value)
    for step, values in sorted(sums.items()):
        means = {tag: float(np.mean(v)) for tag, v in values.items()}
        norms = [means[f"gradient_{k}"] for k in range(sum("gradient_" in tag for tag in means))]
        for k, norm in enumerate(norms):
            numbers = norm, norm / norms[-1], means["std"], means["gate"]
            yield [env_id, label, seed, step, k, *(f"{number:.4g}" for number in numbers)]


def draw(rows, path):
    """Ratio of the norm at x_k to that at x_K against steps: a panel for each task and policy."""
    policies = sorted({(row[0], row[1]) for row in rows})
    figure, panels = plt.subplots(
        1, len(policies), figsize=(3.4 * len(policies), 3.2), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for panel, (env_id, label) in zip(panels[0], policies):
        mine = [row for row in rows if (row[0], row[1]) == (env_id, label)]
        last = max(int(row[4]) for row in mine)
        for k in range(last):
            curves = defaultdict(list)
            for row in mine:
                if int(row[4]) == k:
                    curves[int(row[3])].append(float(row[6]))
            steps = sorted(curves)
            means = [np.exp(np.mean(np.log(np.maximum(curves[step], 1e-12)))) for step in steps]
            panel.plot(steps, means, color=plt.cm.viridis(k / last))
            panel.text(steps[-1], means[-1], f" k = {k}", va="center", size=8)
        panel.axhline(1, color="k", lw=0.8)
        panel.set(yscale="log", title=f"{label}\n{env_id}", xlabel="environment steps")
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.12)
        panel.locator_params(axis="x", nbins=3)
    panels[0][0].set_ylabel("|dQ/dx_k| over |dQ/dx_K|")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args):
    rows = []
    for run in sweep.runs_of(CLAIMS["flow"], args.out):
        folder = sweep.run_dir(run)
        if folder is not None and run.label != "Gaussian":
            env_id, _, _, seed = run.folder.name.split("__")
            rows += profile(folder, env_id, run.label, int(seed), args.interval)
    if not rows:
        sys.exit(f"no run of the claim `flow` has begun in {args.out}")
    collect.write_csv(Path(args.results, "flow_gradients.csv"), COLUMNS, rows)
    draw(rows, Path(args.results, "flow_gradients.png"))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
