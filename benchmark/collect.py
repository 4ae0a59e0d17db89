"""From event files to one tidy CSV for each claim.

    python benchmark/collect.py cue_recall                  # what sweep.py ran of it
    python benchmark/collect.py cue_recall --add            # beside what the CSV has of other runs
    python benchmark/collect.py --runs runs/* --csv my.csv  # any runs; labels are their --exp-name

A row is one evaluation: environment, label, script, options that were not at their defaults, seed,
step, seconds of training until then (evaluations do not count), mean return of the deterministic
and of the stochastic policy; of runs by sweep.py versions, commit and hardware; of tasks that tell
of success the share of episodes with it. What is evaluated at step 0 alone is a level to compare
with: the demonstrations of imitation runs (label "expert"), and cloning. Runs of a claim that are
not finished are left out and named.
"""

import csv
import dataclasses
import json
import sys
from pathlib import Path

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import sweep
from benchmark.claims import CLAIMS

COLUMNS = [
    "env_id", "label", "script", "options", "seed", "step", "wall_seconds",
    "return_deterministic", "return_stochastic", "versions", "commit", "hardware",
    "success_deterministic", "success_stochastic",
]  # fmt: skip
MODES = "deterministic", "stochastic"
SCRIPTS = [path.stem for path in sweep.ROOT.glob("*.py") if path.stem.startswith(("s2pg", "bptt"))]


@dataclasses.dataclass
class Args:
    claims: tyro.conf.Positional[tuple[str, ...]] = ()
    """names of claims.py"""
    seeds: tuple[int, ...] = ()
    """by default those of the claim"""
    out: str = "runs/sweep"
    """the folder that sweep.py ran them in"""
    cuda: bool = False
    """those that it ran with --cuda"""
    add: bool = False
    """keep the rows of the CSV whose runs are not here, as those of other seeds or machines"""
    results: str = "benchmark/results"
    """folder of the CSVs"""
    runs: tuple[str, ...] = ()
    """folders of runs that are not of a claim"""
    csv: str = "runs.csv"
    """file for those"""


def script_of(args, folder):
    """The name of the script that has these options, and the fewest others, of the run in `folder`.

    An earlier version of it may have had fewer.
    """
    options = {name: vars(sweep.script_of(name).Args()).keys() for name in SCRIPTS}
    fitting = [name for name in SCRIPTS if args.keys() <= options[name]]
    if not fitting:
        raise ValueError(f"no script has the options of {folder}; was it another version?")
    return min(fitting, key=lambda name: len(options[name]))


def evaluations(folder, run=None, machine=None, only_step_0=False):
    """Rows of one run, a `run` of sweep.py or any: its evaluations, and the level of its expert.

    ValueError where the folder is no run of these scripts, or has no evaluation yet.
    """
    path = folder / "args.json"
    if not path.exists():
        raise ValueError(f"{folder} is no run: it holds no args.json")
    args = json.loads(path.read_text())
    script = script_of(args, folder) if run is None else Path(run.script).stem
    defaults = vars(sweep.script_of(script).Args())
    options = {k: v for k, v in args.items() if k not in COLUMNS and v != defaults.get(k)}
    for name in ("exp_name", "save_buffer"):
        options.pop(name, None)
    origin = ["", "", ""]  # of a run that sweep.py did not make nobody knows
    if machine is not None:
        versions = " ".join(f"{name}={value}" for name, value in machine["versions"].items())
        origin = [versions, machine["commit"], machine["hardware"]]
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    if "eval/return_stochastic" not in tags:
        raise ValueError(f"{folder} has no evaluation yet")

    def values(tag):
        logged = events.Scalars(tag) if tag in tags else []
        return {event.step: round(event.value, 3) for event in logged}

    rows, seconds = [], values("charts/seconds")
    returns = [values(f"eval/return_{mode}") for mode in MODES]
    successes = [values(f"eval/success_{mode}") for mode in MODES]
    for step in sorted(returns[0].keys() & returns[1].keys()):  # the run may be at its second
        if only_step_0 and step > 0:
            break
        rows.append([
            args["env_id"], run.label if run else args["exp_name"], script, json.dumps(options),
            args["seed"], step, round(seconds.get(step, 0.0), 1),
            *(value[step] for value in returns), *origin,
            *(value.get(step, "") for value in successes),
        ])  # fmt: skip
    if "charts/expert_return" in tags:
        value = round(events.Scalars("charts/expert_return")[0].value, 3)
        level = [args["env_id"], "expert", "demonstrations", "{}", 0, 0, 0.0, value, value]
        rows.append([*level, *origin, "", ""])
    return rows


def others(rows, path):
    """The rows that the CSV at `path` has of other runs than those of `rows`. ValueError if it is
    no CSV of this script."""
    here = {(row[0], row[1], row[4]) for row in rows}
    with open(path, newline="") as file:
        header, *found = list(csv.reader(file)) or [[]]
    if not header or header != COLUMNS[: len(header)]:  # older ones have fewer columns
        raise ValueError(f"{path} is no CSV of collect.py")
    fill = [""] * (len(COLUMNS) - len(header))
    found = [[*row[:4], int(row[4]), int(row[5]), *row[6:], *fill] for row in found]
    return [row for row in found if (row[0], row[1], row[4]) not in here]


def write(rows, path, add=False):
    """The CSV, sorted; whole or not at all. ValueError if two runs have one label and seed."""
    if add and path.exists():
        rows = rows + others(rows, path)
    unique = {}
    for row in rows:
        key = tuple(row[i] for i in (0, 1, 4, 5))
        if key in unique:
            levels = {float(unique[key][8]), float(row[8])}
            if row[1] != "expert":
                raise ValueError(f"two runs of {row[0]} are {row[1]}, seed {row[4]}")
            if len(levels) > 1:  # it is one for all seeds
                raise ValueError(
                    f"two experts of {row[0]}, with returns {levels}: collect them apart"
                )
        unique[key] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(unique[key] for key in sorted(unique))
    temporary.replace(path)
    print(f"{path}: {len(unique)} evaluations")


def collect_claim(name, args):
    """The CSV of what is finished of a claim. ValueError if nothing is."""
    rows, claim = [], CLAIMS[name]
    for run in sweep.runs_of(claim, args.out, args.seeds, cuda=args.cuda):
        if not sweep.is_done(run):
            print(f"not finished: {run.label}, {run.folder.name}")
            continue
        sweep.check_unchanged(run)
        machine = json.loads((run.folder / "machine.json").read_text())
        rows += evaluations(sweep.run_dir(run), run, machine, run.label in claim.cloning)
    if not rows:
        raise ValueError(f"no run of {name} is finished in {args.out}")
    write(rows, Path(args.results, f"{name}.csv"), args.add)


def main(args: Args):
    unknown = set(args.claims) - set(CLAIMS)
    if unknown:
        sys.exit(f"collect.py: no claim {', '.join(unknown)}; there are {', '.join(CLAIMS)}")
    if not args.claims and not args.runs:
        sys.exit("collect.py: name claims, or --runs and their --csv")
    try:
        for name in args.claims:
            collect_claim(name, args)
        if args.runs:
            rows = []
            for run in args.runs:
                try:
                    rows += evaluations(Path(run))
                except ValueError as error:
                    print(f"left out: {error}")
            if not rows:
                raise ValueError("none of these is a run with an evaluation")
            write(rows, Path(args.csv), args.add)
    except (ValueError, OSError) as error:
        sys.exit(f"collect.py: {error}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
