"""From event files to one tidy CSV for each claim.

    python benchmark/collect.py cue_recall                  # what sweep.py ran of it
    python benchmark/collect.py cue_recall --no-add         # without what the CSV has of other runs
    python benchmark/collect.py --runs runs/* --csv my.csv  # any runs; labels are their --exp-name

A row is one evaluation: environment, label, script, options that were not at their defaults, seed,
step, seconds of training until then (evaluations do not count), mean return of the deterministic
and of the stochastic policy; of runs by sweep.py versions, commit and hardware; of tasks that tell
of success the share of episodes with it. What is evaluated at step 0 alone is a level to compare
with: the demonstrations of imitation runs (label "expert"), and cloning. Runs of a claim that are
not finished are named, and left out without --unfinished. A run that was killed in its last
evaluation is named, too: sweep.py takes it for done.
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


@dataclasses.dataclass
class Args:
    claims: tyro.conf.Positional[tuple[str, ...]] = ()  # names of claims.py
    seeds: tuple[int, ...] = ()  # by default those of the claim
    out: str = "runs/sweep"  # the folder that sweep.py ran them in
    cuda: bool = False  # those that it ran with --cuda
    unfinished: bool = False  # with what unfinished runs have so far
    add: bool = True  # keep the rows of the CSV whose runs are not here: other seeds
    results: str = "benchmark/results"  # folder of the CSVs
    runs: tuple[str, ...] = ()  # folders of runs that are not of a claim
    csv: str = "runs.csv"  # file for those

    def __post_init__(self):
        sweep.check_names("claim", self.claims, CLAIMS)
        if not self.claims and not self.runs:
            sys.exit("name claims, or --runs and their --csv")


def evaluations(folder, run=None, machine=None, only_step_0=False):
    """Rows of one run, a `run` of sweep.py or any: its evaluations, and the level of its expert.

    ValueError where the folder is no run of a script here, or has no evaluation yet.
    """
    try:
        args = json.loads((folder / "args.json").read_text())
        script = args.pop("script") if run is None else run.script
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} is no run: {error!r}") from None
    defaults, own = vars(sweep.script_of(script).Args()), folder / "offline.json"
    args |= json.loads(own.read_text()) if own.exists() else {}  # of flow_offline.py
    apart = {*COLUMNS, "exp_name", "save_buffer"}
    options = {k: v for k, v in args.items() if k not in apart and v != defaults.get(k)}
    origin = ["", "", ""]  # not known for runs outside sweep.py
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
    for step in sorted(returns[0].keys() & returns[1].keys()):  # an evaluation under way has one
        if only_step_0 and step > 0:
            break
        rows.append([
            args["env_id"], run.label if run else args["exp_name"], Path(script).stem,
            json.dumps(options),
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
    """The rows that the CSV at `path` has of other runs than those of `rows`."""
    here = {(row[0], row[1], row[4]) for row in rows}
    with open(path, newline="") as file:
        header, *found = list(csv.reader(file)) or [[]]
    if not header or header != COLUMNS[: len(header)]:  # older ones have fewer columns
        sys.exit(f"{path} is no CSV of collect.py")
    fill = [""] * (len(COLUMNS) - len(header))
    found = [[*row[:4], int(row[4]), int(row[5]), *row[6:], *fill] for row in found]
    return [row for row in found if (row[0], row[1], row[4]) not in here]


def write(rows, path, add=False):
    """The CSV, sorted. Two runs of one label and seed are an error."""
    unique = {}
    for row in rows + (others(rows, path) if add and path.exists() else []):
        key = row[0], row[1], row[4], row[5]
        other = unique.setdefault(key, row)
        if row[1] != "expert" and other is not row:
            sys.exit(f"two runs of {row[0]} are {row[1]}, seed {row[4]}")
        if float(other[8]) != float(row[8]):  # it is one for all seeds
            levels = f"{other[8]} and {row[8]}"
            sys.exit(f"two experts of {row[0]}, with returns {levels}: collect them apart")
    write_csv(path, COLUMNS, [unique[key] for key in sorted(unique)])


def write_csv(path, header, rows):
    """A CSV, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    temporary.replace(path)
    print(f"{path}: {len(rows)} rows")


def collect_claim(name, args):
    """The CSV of what is finished of a claim."""
    rows, claim = [], CLAIMS[name]
    for run in sweep.runs_of(claim, args.out, args.seeds, cuda=args.cuda):
        done, folder, clones = sweep.is_done(run), sweep.run_dir(run), run.label in claim.cloning
        if not done:
            print(f"not finished: {run.label}, {run.folder.name}")
            if not args.unfinished or folder is None:
                continue
        sweep.check_unchanged(run)
        machine = json.loads((run.folder / "machine.json").read_text())
        try:
            own = evaluations(folder, run, machine, clones)
        except ValueError as error:
            print(error)  # it has not been evaluated yet
            continue
        last = json.loads((folder / "args.json").read_text())["total_timesteps"]
        if done and not clones and max(row[5] for row in own) < last:
            print(f"killed in its last evaluation: {run.label}, {run.folder.name}; move it away")
        rows += own
    if not rows:
        sys.exit(f"no run of {name} is finished in {args.out}")
    write(rows, Path(args.results, f"{name}{'_cuda' * args.cuda}.csv"), args.add)


def main(args: Args):
    for name in args.claims:
        collect_claim(name, args)
    rows = []
    for run in args.runs:
        try:
            rows += evaluations(Path(run))
        except ValueError as error:
            print(f"left out: {error}")
    if rows:
        write(rows, Path(args.csv), args.add)
    elif args.runs:
        sys.exit("none of these is a run with an evaluation")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
