"""How well do the velocities of flow_sac.py, and a Gaussian, learn four modes at once?

    python benchmark/bandit.py

A bandit whose reward is known, so that nothing but the policy is learned, by the actor's loss of
flow_sac.py with a small, fixed temperature. With o ~ N(0, I) in 8 dimensions and a in [-1, 1]^4:

    r(o, a) = 10 max_j exp(-|a - m_j(o)|^2 / (2 .3^2)),   m_j(o) = .8 tanh(W_j o), j = 1 .. 4

Written to --out, and continued if it is there: a CSV with a row for each policy, K, seed and every
100th update. It has the mean reward; the mean number of modes at which one of 64 actions for the
same o has a reward above 5; and the mean norms of dr/dx_k along the path, relative to the last.
"""

import csv
import dataclasses
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import flow_sac
from benchmark.collect import write_csv

OBS, ACTION, MODES, STD = 8, 4, 4, 0.3
ENDS = "reward", "modes", "gain"  # what is printed of the last update
POLICIES = {  # label: velocity, width, and K
    "Gaussian": ("none", 256, 1),
    **{f"naive flow, K = {k}": ("mlp", 256, k) for k in (4, 16)},
    **{f"Flow-G, K = {k}": ("flow_g", 256, k) for k in (4, 16)},
    **{f"Flow-T, K = {k}": ("flow_t", 96, k) for k in (4, 16)},
}


@dataclasses.dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # of the networks and the noise
    updates: int = 600  # gradient steps of a run
    learning_rate: float = 1e-3  # of Adam
    alpha: float = 1e-3  # temperature; with more, the entropy of 16 steps outweighs the reward
    out: str = "benchmark/results/bandit"  # path of the CSV, without its suffix

    def __post_init__(self):
        if self.updates < 100 or self.updates % 100 or not self.seeds:
            sys.exit("--updates must be a multiple of 100, and --seeds some")
        if not (0 < self.learning_rate < 1 and 0 <= self.alpha < 1):
            sys.exit("--learning-rate must be in (0, 1), and --alpha in [0, 1)")
        if not Path(self.out).parent.is_dir():
            sys.exit(f"--out must lie in a folder there is, and {Path(self.out).parent} is none")


def centres(obs):
    """m_j(o) [4, B, 4], the same in all runs."""
    w = torch.randn(MODES, OBS, ACTION, generator=torch.Generator().manual_seed(0))
    return 0.8 * torch.tanh(obs @ w / math.sqrt(OBS))


def closeness(obs, action):
    """Rewards [4, B] of each mode alone."""
    return 10 * torch.exp(-(action - centres(obs)).square().sum(-1) / (2 * STD**2))


def critic(obs, action, *_):
    """The reward as both of two critics [2, B]."""
    return closeness(obs, action).amax(0).expand(2, -1)


def batch(size):
    obs = torch.randn(size, OBS)
    nothing, weight = torch.zeros(size, 0), torch.full((size,), 1 / size)
    return SimpleNamespace(
        obs=obs, state=obs, z=nothing, next_z=nothing, a_prev=torch.zeros(size, ACTION),
        weight=weight,
    )  # fmt: skip


def measure(actor):
    """Reward and number of modes of the policy, and the profile of the gradients along its path."""
    test = batch(256)
    with torch.no_grad():
        obs, z, a_prev = (x.repeat_interleave(64, 0) for x in (test.obs, test.z, test.a_prev))
        near = closeness(obs, actor.act(obs, z, a_prev)[0])
    reached = (near > 5).view(MODES, len(test.obs), 64).any(-1).sum(0)
    gradients = flow_sac.path_gradients(actor, critic, test)
    last = gradients[f"flow/gradient_{actor.steps}"]
    profile = [float(gradients[f"flow/gradient_{k}"] / last) for k in range(actor.steps)]
    return dict(
        reward=float(near.amax(0).mean()), modes=float(reached.float().mean()),
        std=float(gradients["flow/std"]), gain=profile[0],
        profile=" ".join(f"{share:.3g}" for share in profile),
    )  # fmt: skip


def run(label, seed, args):
    """The rows of one run."""
    velocity, width, steps = POLICIES[label]
    torch.manual_seed(seed)
    options = flow_sac.Args(velocity=velocity, flow_width=width, flow_steps=steps)
    actor = flow_sac.FlowActor(OBS, ACTION, options)
    optimizer = torch.optim.Adam(actor.parameters(), args.learning_rate)
    alpha, seconds = torch.tensor(args.alpha), 0.0
    for update in range(1, args.updates + 1):
        start = time.time()
        loss, *_ = flow_sac.soft_actor_loss(actor, critic, batch(256), alpha, alpha)
        flow_sac.descend(optimizer, loss)
        seconds += time.time() - start
        if update % 100 == 0:
            row = dict(policy=label, seed=seed, update=update, seconds=round(seconds, 2))
            yield row | measure(actor)


def main(args):
    torch.set_num_threads(1)
    path, rows = Path(f"{args.out}.csv"), []
    if path.exists():
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    asked = [str(option) for option in (args.learning_rate, args.alpha, args.updates)]
    if rows and [rows[-1].get(name) for name in ("learning_rate", "alpha", "update")] != asked:
        sys.exit(f"{path} is of other options: choose another --out")
    done = {(row["policy"], int(row["seed"])) for row in rows}
    runs = [(label, seed) for seed in args.seeds for label in POLICIES]
    own = dict(learning_rate=args.learning_rate, alpha=args.alpha, torch=torch.__version__)
    for label, seed in [run for run in runs if run not in done]:
        rows += [row | own for row in run(label, seed, args)]
        write_csv(path, list(rows[0]), [list(row.values()) for row in rows])
    for label in POLICIES:
        ends = [r for r in rows if r["policy"] == label and int(r["update"]) == args.updates]
        for name in ENDS:
            values = [float(row[name]) for row in ends]
            print(f"{label:20} {name:8}", " ".join(f"{value:.3g}" for value in values))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
