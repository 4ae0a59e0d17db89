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
import functools
import sys
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs
import evaluate
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
    claims: tyro.conf.Positional[tuple[str, ...]] = ()  # names of claims.py
    tasks: tuple[str, ...] = ()  # ids of the environments, by default all of the claim
    out: str = "runs/sweep"  # the folder that sweep.py ran them in
    episodes: int = 40  # for each change of the ablation, the same for all, and for the readout
    probe_episodes: int = 2000  # for the probe, half of them to fit it
    results: str = "benchmark/results"  # folder of the CSVs
    runs: tuple[str, ...] = ()  # folders of runs that are not of a claim
    csv: str = "my.csv"  # for those; "_ablated", "_probe" and "_readout" are added to the name
    add: bool = True  # keep the rows of other runs that the CSVs have

    def __post_init__(self):
        sweep.check_names("claim", self.claims, CLAIMS)
        if not self.claims and not self.runs:
            sys.exit("name claims, or --runs and their --csv")
        if self.episodes < 1 or self.probe_episodes < 200:
            sys.exit("--episodes must be at least 1, and --probe-episodes at least 200")


def load(folder):
    """The agent of a run, and the actor that it began with."""
    _, env, agent = evaluate.load(Path(folder), 1)
    torch.manual_seed(agent.args.seed)  # as at the start of the run
    return agent, type(agent)(agent.args, env, agent.device).actor


def play(agent, actor, act, episodes, num_envs, deterministic=False):
    """Episodes in which `act(own_act, obs, z, a_prev, deterministic)` acts for an actor."""
    args = dataclasses.replace(agent.args, privileged_critic=True)
    env = sys.modules[type(agent).__module__].make_env(args, num_envs)
    own_act, seed = actor.act, int(np.random.SeedSequence(args.seed).generate_state(1)[0] >> 1)
    actor.act = functools.partial(act, own_act)
    played = envs.evaluate(actor, env, episodes, deterministic, seed)
    actor.act = own_act
    env.close()
    return played


def ablate(agent, episodes):
    """{change: mean noise-free return}."""
    returns = {}
    for name, change in CHANGES.items():

        def act(own_act, obs, z, a_prev, deterministic, change=change):
            return own_act(obs, *change(z, a_prev), deterministic)

        played = play(agent, agent.actor, act, episodes, min(episodes, 8), deterministic=True)
        returns[name] = np.mean([episode["rewards"].sum() for episode in played])
    return returns


def probe(agent, actor, episodes):
    """Shares [T] of episodes of CueRecall whose cue can be read from z' after t = 0, 1, ... ."""
    memories, shares = [], []

    def act(own_act, *inputs):
        action, z = own_act(*inputs)
        memories.append(z.double())
        return action, z

    played = play(agent, actor, act, episodes, episodes)
    positive = torch.tensor([episode["observations"][0, 0] > 0 for episode in played])
    fit = torch.arange(episodes) % 2 == 0
    for z in memories[:-1]:  # but for the row that ends the episodes
        high, low = z[fit & positive], z[fit & ~positive]
        spread = (torch.cov(high.T) + torch.cov(low.T)).view(z.shape[1], -1) / 2
        ridge = 1e-6 * torch.eye(z.shape[1])
        direction = torch.linalg.solve(spread + ridge, high.mean(0) - low.mean(0))
        read = (z[~fit] - (high.mean(0) + low.mean(0)) / 2) @ direction > 0
        shares.append((read == positive[~fit]).double().mean().item())
    return shares


def readout(agent, fresh, episodes):
    """{what is read: R^2 in percent} of what is hidden; empty if nothing is."""
    steps, calm, untrained = [], None, None

    def act(own_act, obs, z, a_prev, deterministic):
        nonlocal calm, untrained
        if not steps:
            calm = untrained = z
        # the policy reads the memory before the noise of the step is added
        read, calm, untrained = (
            network(obs, memory, a_prev, deterministic=True)[1]
            for network, memory in ((own_act, z), (own_act, calm), (fresh.act, untrained))
        )
        steps.append([torch.cat([obs, a_prev], -1), read, calm, untrained])
        return own_act(obs, z, a_prev, deterministic)

    played = play(agent, agent.actor, act, episodes, episodes)
    # each episode is the first of its environment
    lengths = [len(episode["rewards"]) for episode in played]
    seen, *memories = (
        torch.cat([torch.stack(column)[:n, i].double() for i, n in enumerate(lengths)])
        for column in zip(*steps)
    )
    state = torch.cat([torch.tensor(e["critic_observations"][:-1]).double() for e in played])
    fit = torch.arange(episodes).repeat_interleave(torch.tensor(lengths)) % 2 == 0
    hidden = [s for s in state.T if s[~fit].std() > 0 and not any(s.equal(o) for o in seen.T)]
    if not hidden:
        return {}
    hidden, shares = torch.stack(hidden, -1), {}
    for name, columns in zip(READ, [[seen], *([seen, memory] for memory in memories)]):
        x = torch.cat([*columns, torch.ones(len(seen), 1)], -1)
        ridge = 1e-9 * fit.sum() * torch.eye(x.shape[1])
        weight = torch.linalg.solve(x[fit].T @ x[fit] + ridge, x[fit].T @ hidden[fit])
        error = hidden[~fit] - x[~fit] @ weight
        share = 1 - error.square().mean(0) / hidden[~fit].var(0, correction=0)
        shares[name] = 100 * share.mean().item()
    return shares


def write(path, header, rows, add=False):
    """A CSV of rows that begin with environment, label and seed."""
    if add and path.exists():
        here = {tuple(row[:3]) for row in rows}
        with open(path, newline="") as file:
            before, *found = list(csv.reader(file)) or [[]]
        if before != header:
            sys.exit(f"{path} has other columns than {', '.join(header)}")
        found = [[int(cell) if cell.isdigit() else cell for cell in row] for row in found]
        rows = rows + [row for row in found if tuple(row[:3]) not in here]
    collect.write_csv(path, header, sorted(rows))


def study(runs, path, args):
    """Write the CSVs of (label, folder) pairs; policies without a memory are left out."""
    ablated, probed, read = [], [], []
    for label, folder in runs:
        try:
            agent, fresh = load(folder)
        except SystemExit as error:
            print(f"left out: {error}")
            continue
        if agent.z_dim == 0:
            continue
        options = agent.args
        run = [options.env_id, label or options.exp_name, options.seed]
        returns = ablate(agent, args.episodes)
        ablated.append([*run, args.episodes, *(f"{value:.2f}" for value in returns.values())])
        print(*run, *(f"{name}: {value:.2f}" for name, value in returns.items()), sep=", ")
        shares = readout(agent, fresh, args.episodes)
        if shares:
            read.append([*run, args.episodes, *(f"{share:.1f}" for share in shares.values())])
            print(*run, *(f"{name}: {share:.1f} %" for name, share in shares.items()), sep=", ")
        if options.env_id.startswith("CueRecall"):
            for trained, actor in enumerate((fresh, agent.actor)):
                shares = probe(agent, actor, args.probe_episodes)
                probed += [[*run, trained, t, f"{share:.3f}"] for t, share in enumerate(shares)]
    if not ablated:
        sys.exit("none of these is a run of a policy with a memory")
    run = ["env_id", "label", "seed"]
    for name, header, rows in (
        ("ablated", [*run, "episodes", *CHANGES], ablated),
        ("readout", [*run, "episodes", *READ], read),
        ("probe", [*run, "trained", "step", "correct"], probed),
    ):
        if rows:
            write(path.with_stem(f"{path.stem}_{name}"), header, rows, args.add)


def main(args: Args):
    torch.set_num_threads(1)
    for name in args.claims:
        runs = sweep.runs_of(CLAIMS[name], args.out, tasks=args.tasks)
        done = [run for run in runs if sweep.is_done(run)]
        if not done:
            sys.exit(f"no run of {name} is finished in {args.out}")
        for run in done:
            sweep.check_unchanged(run)
        folders = [(run.label, sweep.run_dir(run)) for run in done]
        study(folders, Path(args.results, f"{name}.csv"), args)
    if args.runs:
        study([("", folder) for folder in args.runs], Path(args.csv), args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
