"""Where does a policy keep what it remembers: in its memory z, or in its own last action?

    python benchmark/ablate.py cue_recall                   # what sweep.py ran of it
    python benchmark/ablate.py --runs runs/* --csv my.csv   # any runs of S2PG or BPTT

A policy with a memory also reads its last action, and the action may hold what it saw: a note to
itself. So a trained policy is played without noise, as it is and with a part of its input replaced
in every step: a_prev by zeros, a_prev by -a_prev, z by zeros. Where the return stays, it does not
need that part; where it falls although z is untouched, the memory was in the action. Each line
that this prints, and each row of the CSV, is the mean return of one run.
"""

import csv
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import collect, sweep
from benchmark.claims import CLAIMS

CHANGES = {
    "as it is": lambda z, a_prev: (z, a_prev),
    "a_prev = 0": lambda z, a_prev: (z, 0 * a_prev),
    "-a_prev": lambda z, a_prev: (z, -a_prev),
    "z = 0": lambda z, a_prev: (0 * z, a_prev),
}


@dataclasses.dataclass
class Args:
    claims: tyro.conf.Positional[tuple[str, ...]] = ()
    """names of claims.py"""
    out: str = "runs/sweep"
    """the folder that sweep.py ran them in"""
    episodes: int = 40
    """to play of each run and change, the same for all"""
    results: str = "benchmark/results"
    """folder of the CSVs"""
    runs: tuple[str, ...] = ()
    """folders of runs that are not of a claim"""
    csv: str = "ablation.csv"
    """file for those"""


def ablate(folder, episodes):
    """The options of a run, and {change: mean noise-free return}; None if it has no memory.

    ValueError where the folder is no run of these scripts, or an imitation's.
    """
    path = Path(folder, "args.json")
    if not path.exists():
        raise ValueError(f"{folder} is no run: it holds no args.json")
    options = json.loads(path.read_text())
    script = sweep.script_of(collect.script_of(options, folder))
    if hasattr(script.Args, "demonstrations"):
        raise ValueError(f"{folder} is a run of imitation")
    args = script.Args(**options)
    env = script.make_env(args, min(episodes, 8))
    agent = script.Agent(args, *script.dimensions(env), torch.device("cpu"))
    script.load_checkpoint(folder, agent)
    act, returns = agent.actor.act, {}
    for name, change in CHANGES.items() if agent.actor.z_dim > 0 else ():
        agent.actor.act = lambda obs, z, a_prev, deterministic, change=change: act(
            obs, *change(z, a_prev), deterministic
        )
        seed = script.env_seed(args, 0, evaluation=True)
        played = script.evaluate(agent.actor, env, episodes, True, seed)
        returns[name] = np.mean([episode["rewards"].sum() for episode in played])
    env.close()
    return options, returns


def write(runs, path, episodes):
    """The CSV of (label, folder) pairs, as it is printed; policies without memory are left out."""
    rows = []
    print("seed", *(f"{name:>10}" for name in CHANGES))
    for label, folder in runs:
        options, returns = ablate(folder, episodes)
        if returns:
            label = label or options["exp_name"]
            rows.append([options["env_id"], label, options["seed"], episodes])
            rows[-1] += [f"{value:.2f}" for value in returns.values()]
            print(f"{options['seed']:4}", *(f"{value:10.2f}" for value in returns.values()), end="")
            print(f"   {options['env_id']}, {label}", flush=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["env_id", "label", "seed", "episodes", *CHANGES])
        writer.writerows(sorted(rows))
    temporary.replace(path)


def main(args: Args):
    unknown = set(args.claims) - set(CLAIMS)
    if unknown:
        sys.exit(f"ablate.py: no claim {', '.join(unknown)}; there are {', '.join(CLAIMS)}")
    if not args.claims and not args.runs:
        sys.exit("ablate.py: name claims, or --runs and their --csv")
    if args.episodes < 1:
        sys.exit(f"ablate.py: --episodes is {args.episodes}; it must be at least 1")
    torch.set_num_threads(1)
    try:
        for name in args.claims:
            done = [run for run in sweep.runs_of(CLAIMS[name], args.out) if sweep.is_done(run)]
            if not done:
                raise ValueError(f"no run of {name} is finished in {args.out}")
            runs = [(run.label, sweep.run_dir(run)) for run in done]
            write(runs, Path(args.results, f"{name}_ablated.csv"), args.episodes)
        if args.runs:
            write([("", folder) for folder in args.runs], Path(args.csv), args.episodes)
    except (ValueError, OSError) as error:
        sys.exit(f"ablate.py: {error}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
