"""Learning curves: from the event files of runs to one tidy CSV, and from there to a picture.

    python benchmark/curves.py collect runs/* --out benchmark/results/NAME.csv
    python benchmark/curves.py plot benchmark/results/NAME.csv

A row of the CSV is one evaluation: environment, label (--exp-name of the run), script, options
that were not at their defaults, seed, step, wall seconds since the first entry, mean return of the
deterministic and of the stochastic policy, versions. What is evaluated at step 0 alone is a level
to compare with: the demonstrations of imitation runs (label "expert") and, with --step-0 LABEL,
what cloning is worth. The picture has a panel for each environment: the mean over seeds as a line,
all seeds as a band. Collect where the runs were made: the versions
are those of the machine that collects.
"""

import argparse
import csv
import importlib.metadata
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bptt_ppo
import bptt_sac
import s2pg_gail
import s2pg_lsiq
import s2pg_ppo
import s2pg_sac
import s2pg_td3

COLUMNS = [
    "env_id", "label", "script", "options", "seed", "step", "wall_seconds",
    "return_deterministic", "return_stochastic", "versions",
]  # fmt: skip
SCRIPTS = [s2pg_sac, s2pg_td3, s2pg_ppo, bptt_sac, bptt_ppo, s2pg_gail, s2pg_lsiq]


def collect(runs, out, only_step_0):
    """Write one CSV of all evaluations of `runs`, of some labels those at step 0 only."""
    versions = " ".join(
        f"{name}={importlib.metadata.version(name)}" for name in ("torch", "gymnasium", "mujoco")
    )
    rows, experts = [], {}
    for run in map(Path, runs):
        args = json.loads((run / "args.json").read_text())
        events = EventAccumulator(str(run))
        events.Reload()
        start = min(events.Scalars(tag)[0].wall_time for tag in events.Tags()["scalars"])
        (script,) = (s for s in SCRIPTS if args.keys() == vars(s.Args()).keys())
        defaults = vars(script.Args())
        options = {k: v for k, v in args.items() if v != defaults[k] and k not in COLUMNS}
        evaluations = zip(
            events.Scalars("eval/return_deterministic"), events.Scalars("eval/return_stochastic")
        )
        if "charts/expert_return" in events.Tags()["scalars"]:
            value = round(events.Scalars("charts/expert_return")[0].value, 3)
            row = [args["env_id"], "expert", "demonstrations", "{}", 0, 0, 0, value, value]
            experts[args["env_id"]] = [*row, versions]
        for deterministic, stochastic in evaluations:
            if args["exp_name"] in only_step_0 and deterministic.step > 0:
                continue
            rows.append([
                args["env_id"], args["exp_name"], script.__name__, json.dumps(options),
                args["seed"], deterministic.step, round(deterministic.wall_time - start, 1),
                round(deterministic.value, 3), round(stochastic.value, 3), versions,
            ])  # fmt: skip
    rows += experts.values()
    with open(out, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(sorted(rows, key=lambda row: (row[0], row[1], row[4], row[5])))
    print(f"{out}: {len(rows)} evaluations of {len(runs)} runs")


def curves(path, column):
    """{env_id: {label: (steps [T], returns [seeds, T])}} of a CSV."""
    points = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            seeds = points.setdefault(row["env_id"], {}).setdefault(row["label"], {})
            seed = seeds.setdefault(row["seed"], {})
            step = round(int(row["step"]), -2)  # several environments pass a multiple a bit late
            if step in seed:
                raise SystemExit(f"{path}: two runs are {row['label']}, seed {row['seed']}")
            seed[step] = float(row[column])
    result = {}
    for env_id, labels in points.items():
        for label, seeds in labels.items():
            steps = sorted(set.intersection(*(set(seed) for seed in seeds.values())))
            returns = np.array([[seed[step] for step in steps] for seed in seeds.values()])
            result.setdefault(env_id, {})[label] = np.array(steps), returns
    return result


def plot(path, column):
    """Write the picture beside the CSV, and print the table of final and best returns."""
    data = curves(path, column)
    figure, panels = plt.subplots(
        1, len(data), figsize=(5.2 * len(data), 3.6), squeeze=False, layout="constrained"
    )
    labels = sorted({label for env in data.values() for label in env})
    colors = {label: f"C{i}" for i, label in enumerate(labels)}
    for panel, (env_id, methods) in zip(panels[0], data.items()):
        for label, (steps, returns) in methods.items():
            mean, color = returns.mean(0), colors[label]
            panel.fill_between(steps, returns.min(0), returns.max(0), color=color, alpha=0.15, lw=0)
            seeds = "1 seed" if len(returns) == 1 else f"{len(returns)} seeds"
            if steps[-1] == 0:
                panel.axhline(mean[0], color=color, lw=1.5, ls="--", label=label)
            else:
                panel.plot(steps, mean, color=color, lw=2, label=f"{label} ({seeds})")
            print(
                f"{env_id:24s} {label:24s} at {steps[-1]}: "
                f"{', '.join(f'{value:.1f}' for value in returns[:, -1])}; "
                f"best mean over seeds {mean.max():.1f} at {steps[mean.argmax()]}"
            )
        panel.set_title(env_id)
        panel.set_xlabel("environment steps")
        panel.set_ylabel(column.replace("_", ", "))
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        panel.legend(frameon=False, fontsize=8)
    picture = Path(path).with_suffix(".png")
    figure.savefig(picture, dpi=150)
    print(picture)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="event files to a CSV")
    collecting.add_argument("runs", nargs="+")
    collecting.add_argument("--out", required=True)
    collecting.add_argument("--step-0", nargs="*", default=[], help="labels, of step 0 only")
    plotting = commands.add_parser("plot", help="a CSV to a picture and a table")
    plotting.add_argument("csv")
    columns = ["return_stochastic", "return_deterministic"]
    plotting.add_argument("--column", default=columns[0], choices=columns)
    args = parser.parse_args()
    if args.command == "collect":
        collect(args.runs, args.out, args.step_0)
    else:
        plot(args.csv, args.column)


if __name__ == "__main__":
    main()
