"""What is in a policy's memory, and does it need it? Of runs that are trained.

    python benchmark/memory.py cue_recall --tasks CueRecall-100-v0    # what sweep.py ran of it
    python benchmark/memory.py --runs runs/* --csv my.csv             # any runs of S2PG or BPTT

Ablation (CLAIM_ablated.csv). A policy with a memory also reads its last action, and the action may
hold what it saw: a note to itself. So it is played without noise, as it is and with a part of its
input replaced in every step: a_prev by zeros, a_prev by -a_prev, z by zeros. Where the mean return
stays, it does not need that part; where it stays without z, the memory is in the action.

Probe (CLAIM_probe.csv), where the task is CueRecall. How long does the memory tell the two cues
apart? The policy is played with its noise, and a linear classifier (Fisher's discriminant), fitted
to half of the episodes, reads the cue from z after each step of the other half: the share that it
reads correctly, .5 if there is nothing to be read. The same of the policy before its training.

Readout (CLAIM_readout.csv), where the state is more than what the policy sees. How well does the
memory know what is hidden? In episodes played with the noise, linear regressions, fitted to half of
them, predict it from o and a_prev, and from the memory beside them: as the policy read it, a copy
of it without noise, and one of the policy before its training, both along the same observations and
actions. R^2 in the other half, in percent, its mean over all that is hidden.
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
READ = "o and a_prev", "and the memory", "the same, no noise", "the same, untrained"


@dataclasses.dataclass
class Args:
    claims: tyro.conf.Positional[tuple[str, ...]] = ()
    """names of claims.py"""
    tasks: tuple[str, ...] = ()
    """ids of the environments, by default all of the claim"""
    out: str = "runs/sweep"
    """the folder that sweep.py ran them in"""
    episodes: int = 40
    """for each change of the ablation, the same for all, and for the readout"""
    probe_episodes: int = 2000
    """for the probe, half of them to fit it"""
    results: str = "benchmark/results"
    """folder of the CSVs"""
    runs: tuple[str, ...] = ()
    """folders of runs that are not of a claim"""
    csv: str = "my.csv"
    """for those; "_ablated", "_probe" and "_readout" are added to the name"""
    add: bool = False
    """keep the rows of other runs that the CSVs have"""


def load(folder):
    """Script, options, actor of a run, and the actor that it began with.

    ValueError where it is no run of these scripts, or one of imitation.
    """
    path = Path(folder, "args.json")
    if not path.exists():
        raise ValueError(f"{folder} is no run: it holds no args.json")
    options = json.loads(path.read_text())
    script = sweep.script_of(collect.script_of(options, folder))
    if hasattr(script.Args, "demonstrations"):
        raise ValueError(f"{folder} is a run of imitation")
    args, agents = script.Args(**options), []
    env = script.make_env(args, 1)
    for _ in range(2):
        torch.manual_seed(args.seed)  # as at the start of the run
        agents.append(script.Agent(args, *script.dimensions(env), torch.device("cpu")))
    env.close()
    script.load_checkpoint(folder, agents[0])
    return script, args, agents[0].actor, agents[1].actor


def ablate(script, args, actor, episodes):
    """{change: mean noise-free return}."""
    env, act, returns = script.make_env(args, min(episodes, 8)), actor.act, {}
    for name, change in CHANGES.items():
        actor.act = lambda obs, z, a_prev, deterministic, change=change: act(
            obs, *change(z, a_prev), deterministic
        )
        seed = script.env_seed(args, 0, evaluation=True)
        played = script.evaluate(actor, env, episodes, True, seed)
        returns[name] = np.mean([episode["rewards"].sum() for episode in played])
    actor.act = act
    env.close()
    return returns


@torch.no_grad()
def probe(script, args, actor, episodes):
    """Shares [T] of episodes of CueRecall whose cue can be read from z' after t = 0, 1, ... ."""
    env = script.make_env(args, episodes)
    seed = script.env_seed(args, 0, evaluation=True)
    torch.manual_seed(seed)
    obs, _ = env.reset(seed=seed)
    positive = torch.as_tensor(obs["policy"][:, 0] > 0)
    fit = torch.arange(episodes) % 2 == 0
    z = torch.zeros(episodes, actor.z_dim)
    a_prev = torch.zeros(episodes, actor.action_dim)
    shares = []
    for _ in range(env.get_attr("unwrapped")[0].horizon):
        a_prev, z = actor.act(torch.as_tensor(obs["policy"]), z, a_prev)
        obs, *_ = env.step(a_prev.numpy())
        high, low = z[fit & positive].double(), z[fit & ~positive].double()
        spread = (torch.cov(high.T) + torch.cov(low.T)).view(actor.z_dim, -1) / 2
        direction = torch.linalg.solve(
            spread + 1e-6 * torch.eye(actor.z_dim), high.mean(0) - low.mean(0)
        )
        middle = (high.mean(0) + low.mean(0)) / 2
        read = (z[~fit].double() - middle) @ direction > 0
        shares.append((read == positive[~fit]).double().mean().item())
    env.close()
    return shares


@torch.no_grad()
def readout(script, args, actor, fresh, episodes):
    """{what is read: R^2 in percent} of what is hidden; empty if nothing is. 1000 steps at most."""
    env = script.make_env(dataclasses.replace(args, privileged_critic=True), episodes)
    seed = script.env_seed(args, 0, evaluation=True)
    torch.manual_seed(seed)
    obs, _ = env.reset(seed=seed)
    z = calm = untrained = torch.zeros(episodes, actor.z_dim)
    a_prev = torch.zeros(episodes, actor.action_dim)
    playing, rows = torch.ones(episodes, dtype=torch.bool), []
    for _ in range(1000):
        o, state = (torch.as_tensor(obs[key]) for key in ("policy", "critic"))
        # the policy reads the memory before the noise of the step is added
        read, calm, untrained = (
            network.act(o, memory, a_prev, deterministic=True)[1]
            for network, memory in ((actor, z), (actor, calm), (fresh, untrained))
        )
        columns = torch.arange(episodes), state, torch.cat([o, a_prev], -1), read, calm, untrained
        rows.append([column[playing].double() for column in columns])
        a_prev, z = actor.act(o, z, a_prev)
        obs, _, terminated, truncated, _ = env.step(a_prev.numpy())
        playing &= ~torch.as_tensor(terminated | truncated)
        if not playing.any():
            break
    env.close()
    episode, state, seen, *memories = map(torch.cat, zip(*rows))
    fit = episode % 2 == 0
    hidden = [s for s in state.T if s[~fit].std() > 0 and not any(s.equal(o) for o in seen.T)]
    if not hidden:
        return {}
    hidden, shares = torch.stack(hidden, -1), {}
    for name, columns in zip(READ, [[seen], *([seen, memory] for memory in memories)]):
        x = torch.cat([*columns, torch.ones(len(seen), 1)], -1)
        ridge = 1e-9 * fit.sum() * torch.eye(x.shape[1])
        weight = torch.linalg.solve(x[fit].T @ x[fit] + ridge, x[fit].T @ hidden[fit])
        error = hidden[~fit] - x[~fit] @ weight
        shares[name] = 100 * (1 - error.square().mean(0) / hidden[~fit].var(0, correction=0))
    return {name: share.mean().item() for name, share in shares.items()}


def write(path, header, rows, add=False):
    """A CSV of rows that begin with environment, label and seed; whole or not at all."""
    if add and path.exists():
        here = {tuple(row[:3]) for row in rows}
        with open(path, newline="") as file:
            before, *found = list(csv.reader(file)) or [[]]
        if before != header:
            raise ValueError(f"{path} has other columns than {', '.join(header)}")
        found = [[int(cell) if cell.isdigit() else cell for cell in row] for row in found]
        rows = rows + [row for row in found if tuple(row[:3]) not in here]
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(sorted(rows))
    temporary.replace(path)
    print(f"{path}: {len(rows)} rows")


def study(runs, path, args):
    """Write the CSVs of (label, folder) pairs; policies without a memory are left out.

    ValueError if there is no other.
    """
    ablated, probed, read = [], [], []
    for label, folder in runs:
        try:
            script, options, actor, fresh = load(folder)
        except ValueError as error:
            print(f"left out: {error}")
            continue
        if actor.z_dim == 0:
            continue
        run = [options.env_id, label or options.exp_name, options.seed]
        returns = ablate(script, options, actor, args.episodes)
        ablated.append([*run, args.episodes, *(f"{value:.2f}" for value in returns.values())])
        print(*run, *(f"{name}: {value:.2f}" for name, value in returns.items()), sep=", ")
        if options.env_id.startswith("CueRecall"):
            for trained, own in enumerate((fresh, actor)):
                shares = probe(script, options, own, args.probe_episodes)
                probed += [[*run, trained, t, f"{share:.3f}"] for t, share in enumerate(shares)]
        shares = readout(script, options, actor, fresh, args.episodes)
        if shares:
            read.append([*run, args.episodes, *(f"{share:.1f}" for share in shares.values())])
            print(*run, *(f"{name}: {share:.1f} %" for name, share in shares.items()), sep=", ")
    if not ablated:
        raise ValueError("none of these is a run of a policy with a memory")
    run = ["env_id", "label", "seed"]
    for name, header, rows in (
        ("ablated", [*run, "episodes", *CHANGES], ablated),
        ("readout", [*run, "episodes", *READ], read),
        ("probe", [*run, "trained", "step", "correct"], probed),
    ):
        if rows:
            write(path.with_stem(f"{path.stem}_{name}"), header, rows, args.add)


def main(args: Args):
    unknown = set(args.claims) - set(CLAIMS)
    if unknown:
        sys.exit(f"memory.py: no claim {', '.join(unknown)}; there are {', '.join(CLAIMS)}")
    if not args.claims and not args.runs:
        sys.exit("memory.py: name claims, or --runs and their --csv")
    for name, low in (("episodes", 1), ("probe_episodes", 200)):
        if vars(args)[name] < low:
            option = name.replace("_", "-")
            sys.exit(f"memory.py: --{option} is {vars(args)[name]}; it must be at least {low}")
    torch.set_num_threads(1)
    try:
        for name in args.claims:
            runs = sweep.runs_of(CLAIMS[name], args.out, tasks=args.tasks)
            done = [(run.label, sweep.run_dir(run)) for run in runs if sweep.is_done(run)]
            if not done:
                raise ValueError(f"no run of {name} is finished in {args.out}")
            study(done, Path(args.results, f"{name}.csv"), args)
        if args.runs:
            study([("", folder) for folder in args.runs], Path(args.csv), args)
    except (ValueError, OSError) as error:
        sys.exit(f"memory.py: {error}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
