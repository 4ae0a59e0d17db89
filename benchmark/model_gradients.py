"""How noisy and how wrong the gradients of RP-PGM are, over the horizon of its unroll.

    python benchmark/model_gradients.py     # trains and measures what is missing; an hour
    python benchmark/gradient_plots.py      # the pictures, from the CSVs

Agents learn two tasks with and without spectral normalisation, and one of them with several c.
Then, from states of their buffers, with networks held fixed and the noise of the policy:

    variance       total variance of dJ_h / dtheta of single samples, theta the policy's parameters
    relative       that over the squared length of the mean gradient, of --means samples and less
                   what noise adds to it; infinite where nothing is left
    cosine         of the mean gradient with that of the true J_h, the simulator in place of the
                   model: same critic, states and noise, so only the model is to blame; old
                   actions bias `dr`, so its cosine is below 1 even with a true model
    error          length of their difference over the length of the true one
    cosine_return  with the gradient of the true J_32, so that the critic is to blame, too

The simulator has no derivatives. It is a function (x, a) -> (x', r), whose Jacobians are central
differences; the chain rule does the rest. `check` compares that with central differences of the
true J_h itself, under the same noise, in 20 directions of theta: the cosine of the two.

Tasks are Pendulum-v1, and those of MuJoCo that never terminate and whose observation is (places,
velocities). What the CSV already has is not measured again, whatever the options are.

Estimators are `dp` and `dr` of rp_pgm.py. `model_error` is E|f(x, a) - x'|^2 / O in normalised
units, for actions of the policy; `norm_model` and `norm_real` are mean spectral norms of dx'/dx,
and `jacobian_error` is the mean of |df/dx - dx'/dx| / |dx'/dx|, Frobenius norms.

Speed: CPU milliseconds of the actor's step (unroll, backward pass, Adam, power iteration) with
width 256 and batch 256; the cases take turns. "uncached" normalises a weight in each use.
"""

import contextlib
import csv
import dataclasses
import functools
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch.nn.utils import parametrize

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate
import rp_pgm
from benchmark import sweep
from benchmark.collect import write_csv

CPU, HORIZONS = torch.device("cpu"), (1, 2, 4, 8, 16)
TRAINING = dict(
    learning_starts=1000, warmup_steps=0, batch_size=128, gamma=0.99, tau=0.005, actor_lr=3e-4,
    critic_lr=1e-3, alpha=0.1, alpha_lr=1e-3, entropy_start=-0.333, entropy_end=-0.5,
    estimator="dp", horizon=3, sn_layers="reference", model_lr=1e-3, model_updates=1,
    model_length=3, width=128, depth=3, grad_var_every=0, lipschitz_every=0, eval_frequency=0,
)  # fmt: skip


@dataclasses.dataclass
class Args:
    env_ids: tuple[str, ...] = ("HalfCheetah-v4", "Pendulum-v1")  # with contacts, and smooth
    total_timesteps: int = 3500  # of training, the first 1000 random
    seeds: tuple[int, ...] = (1, 2, 3)
    coefs: tuple[float, ...] = (1.5, 2.0, 3.0)  # c of more runs of the first task, at h = 8
    runs: str = "runs/model_gradients"  # folder of the runs; those that are finished stay
    samples: int = 128  # single gradients, for a variance
    means: int = 1024  # samples, for a relative variance
    starts: int = 128  # unrolls in the simulator, for a bias
    rounds: int = 9  # of the timing
    out: str = "benchmark/results"  # folder of the CSVs

    def __post_init__(self):
        if not (self.env_ids and self.seeds) or min(self.means, self.starts, self.rounds) < 1:
            sys.exit("--env-ids and --seeds must be some, --means, --starts, --rounds at least 1")
        if self.samples < 16 or self.samples % 16:
            sys.exit("--samples must be a multiple of 16")


# --- the simulator in place of a model ------------------------------------------------------------


class CentralDifferences(torch.autograd.Function):
    """function(inputs [B, N]) [B, M] of numpy rows [N], with a Jacobian of central differences."""

    @staticmethod
    def forward(ctx, inputs, function, size=1e-5):
        rows = inputs.detach().double().numpy()
        if ctx.needs_input_grad[0]:
            steps = size * np.eye(rows.shape[1])
            sides = [[[function(row + s * d) for d in steps] for row in rows] for s in (1, -1)]
            ctx.jacobian = torch.tensor(np.subtract(*sides) / (2 * size))  # [B, N, M]
        return torch.tensor(np.array([function(row) for row in rows])).to(inputs)

    @staticmethod
    def backward(ctx, gradient):
        return torch.einsum("bnm,bm->bn", ctx.jacobian.to(gradient), gradient), None, None


class Real:
    """Has the methods of rp_pgm.Model, for a function from a row (x, a) to a row (x', r)."""

    def __init__(self, transition):
        known = functools.cache(lambda row: transition(np.frombuffer(row)))  # as horizons overlap
        self.transition = lambda row: known(row.tobytes())

    def step(self, x, a):
        result = CentralDifferences.apply(torch.cat([x, a], -1), self.transition)
        self.reward = result[:, -1]
        return result[:, :-1]

    def outcome(self, x, a):
        """Of the step before. Nothing terminates."""
        return self.reward, torch.tensor(-torch.inf)


def simulator(env_id, norm):
    """The transition of a task, between normalised observations."""
    env = gym.make(env_id).unwrapped
    mean, std = norm.mean.numpy(), norm.var.sqrt().clamp(0.1, 10).numpy()
    middle, half = ((env.action_space.high + s * env.action_space.low) / 2 for s in (1, -1))
    env.reset()

    def pendulum(obs, action):
        env.state = np.array([np.arctan2(obs[1], obs[0]), obs[2]])
        reward, (angle, velocity) = env.step(action)[1], env.state
        return [np.cos(angle), np.sin(angle), velocity], reward  # env.step rounds to float32

    def mujoco(obs, action):
        env.data.qacc_warmstart[:] = 0  # so that the same row has the same successor
        hidden = np.zeros(env.model.nq + env.model.nv - len(obs))  # places, of no effect
        env.set_state(*np.split(np.concatenate([hidden, obs]), [env.model.nq]))
        return env.step(action)[:2]

    def transition(row):
        x, a = np.split(row, [len(mean)])
        step = pendulum if env_id == "Pendulum-v1" else mujoco
        obs, reward = step(x * std + mean, middle + half * a)
        return np.append((obs - mean) / std, reward)

    return transition


# --- gradients ------------------------------------------------------------------------------------


def load(folder):
    """The agent of a run, and its replay buffer."""
    _, env, agent = evaluate.load(folder, 1)
    env.close()
    state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    buffer = rp_pgm.SegmentBuffer(len(state["rows"]), 1, *agent.row_sizes, CPU)
    buffer.rows, buffer.steps = state["rows"], state["steps"]
    return agent, buffer


def select(batch, index):
    return rp_pgm.Segments(*(column[:, index] for column in batch[:-1]), batch.weight[index])


def segments(agent, buffer, number, length):
    """So many segments that lie within an episode, the same for dp and dr."""
    batch = buffer.sample(2 * number, length, agent.actor.norm)
    found = batch.real.all(0).nonzero().squeeze(-1)[:number]
    if len(found) < number:
        sys.exit(f"{agent.args.env_id} has too few segments of {length} steps in an episode")
    return select(batch, found)


def objective(agent, model, batch, horizon, estimator="dp"):
    args = dataclasses.replace(agent.args, estimator=estimator)
    alpha = agent.log_alpha.detach().exp()
    return rp_pgm.unrolled_return(agent.actor, agent.critic, model, batch, alpha, args, horizon)


def mean_gradient(agent, model, batch, horizon, estimator="dp"):
    """With the same noise in each call."""
    torch.manual_seed(0)
    value = objective(agent, model, batch, horizon, estimator).mean()
    parts = torch.autograd.grad(value, list(agent.actor.parameters()))
    return torch.cat([part.flatten() for part in parts])


def variances(agent, buffer, horizon, estimator, args):
    """Total variance of a single sample, and that over |mean|^2."""
    found, parameters = [], list(agent.actor.parameters())
    for _ in range(args.samples // 16):  # a backward pass goes through all samples of an unroll
        batch = segments(agent, buffer, 16, horizon + 1)
        values = objective(agent, agent.model, batch, horizon, estimator)
        found.append(rp_pgm.gradient_variance(values, parameters)[0])
    batch = segments(agent, buffer, args.means, horizon + 1)
    square = mean_gradient(agent, agent.model, batch, horizon, estimator).square().sum()
    variance = torch.stack(found).mean()
    square = (square - variance / args.means).clamp(min=0)  # E|mean|^2 has that much noise
    return dict(variance=variance.item(), relative=(variance / square).item())


def cosine(a, b):
    return torch.cosine_similarity(a, b, 0).item()


def check(agent, real, batch, horizon, directions=20, size=1e-5):
    """The cosine of slopes of the true J_h along random directions, and of its gradient there."""
    parameters, slopes = list(agent.actor.parameters()), []
    theta = torch.nn.utils.parameters_to_vector(parameters).detach()
    ways = torch.nn.functional.normalize(torch.randn(directions, len(theta)).to(theta))
    gradient = mean_gradient(agent, real, batch, horizon)
    for way in ways:
        values = []
        for sign in (1, -1):
            torch.nn.utils.vector_to_parameters(theta + sign * size * way, parameters)
            torch.manual_seed(0)
            with torch.no_grad():
                values.append(objective(agent, real, batch, horizon).mean())
        slopes.append((values[0] - values[1]) / (2 * size))
    torch.nn.utils.vector_to_parameters(theta, parameters)
    return cosine(torch.stack(slopes), ways @ gradient)


def jacobians(step, x, a):
    """dx'/dx [B, O, O]: rows do not see one another."""
    x = x.clone().requires_grad_()
    rows = [torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in step(x, a).T]
    return torch.stack(rows, 1)


def model_errors(agent, real, batch):
    with torch.no_grad():
        x, a = batch.x[0], agent.actor.sample(batch.x[0])[0]
        error = (agent.model.step(x, a) - real.step(x, a)).square().mean()
    model, true = (jacobians(step, x, a) for step in (agent.model.step, real.step))
    off = ((model - true).norm(dim=(1, 2)) / true.norm(dim=(1, 2))).mean()
    norms = [torch.linalg.matrix_norm(jacobian, 2).mean() for jacobian in (model, true)]
    names = "model_error", "norm_model", "norm_real", "jacobian_error"
    return dict(zip(names, [value.item() for value in (error, *norms, off)]))


def measure(folder, args, horizons, estimators):
    """Rows of the CSV of one run."""
    torch.manual_seed(0)
    agent, buffer = load(folder)
    cases = {(e, h): variances(agent, buffer, h, e, args) for e in estimators for h in horizons}
    agent.double()
    buffer.rows = buffer.rows.double()
    real = Real(simulator(agent.args.env_id, agent.actor.norm))
    batch = segments(agent, buffer, args.starts, 33)
    errors = model_errors(agent, real, batch)
    errors["check"] = check(agent, real, select(batch, slice(32)), 8)
    true = {h: mean_gradient(agent, real, batch, h) for h in {*horizons, 32}}
    run = {k: getattr(agent.args, k) for k in ("env_id", "spectral_norm", "sn_coef", "seed")}
    rows = []
    for (estimator, h), row in cases.items():
        gradient = mean_gradient(agent, agent.model, batch, h, estimator)
        error = ((gradient - true[h]).norm() / true[h].norm()).item()
        bias = dict(cosine=cosine(gradient, true[h]), error=error)
        bias["cosine_return"] = cosine(gradient, true[32])
        rows.append(run | dict(estimator=estimator, h=h) | row | bias | errors)
    return rows


def speed(args):
    """Rows of the CSV of speed: medians over rounds, and of their ratios within a round."""
    boxes = [gym.spaces.Box(-1, 1, (size,)) for size in (17, 6)]  # those of HalfCheetah
    env = SimpleNamespace(single_observation_space=boxes[0], single_action_space=boxes[1])
    buffer = rp_pgm.SegmentBuffer(1000, 1, 17, 6, CPU)
    buffer.rows[:, :-2].uniform_(-0.9, 0.9)  # one episode, which goes on
    buffer.steps += 1000
    agents, norms = {}, dict(none="none", both="both", uncached="both")
    for name, norm in norms.items():
        options = rp_pgm.Args(**TRAINING | dict(spectral_norm=norm, width=256))
        agents[name] = rp_pgm.Agent(options, env, CPU)
    rows, took = [], {(name, h): [] for h in HORIZONS for name in agents}
    for _ in range(args.rounds + 1):
        for (name, h), times in took.items():
            agent = agents[name]
            batch, start = segments(agent, buffer, 256, h + 1), time.process_time()
            use = contextlib.nullcontext if name == "uncached" else parametrize.cached
            with mock.patch.object(parametrize, "cached", use):
                loss = -objective(agent, agent.model, batch, h).mean()
            rp_pgm.descend(agent.actor_optimizer, loss)
            rp_pgm.power_iteration(agent.actor)
            times.append(1000 * (time.process_time() - start))
    for (name, h), times in took.items():  # but for the first round
        ratio = np.median(np.divide(times, took["none", h])[1:])
        row = dict(case=name, h=h, rounds=args.rounds, cpu_ms=np.median(times[1:]), over_none=ratio)
        rows.append(row)
    return rows


# --- the program ----------------------------------------------------------------------------------


def trained(runs, script, options):
    """The folder of a finished run with these options, which is trained here if there is none."""
    name = "runs/{env_id}__{exp_name}__{seed}__*/checkpoint.pt".format(**options)

    def finished():
        for path in Path(runs).glob(name):
            state = torch.load(path, map_location="meta", weights_only=True)
            args = json.loads((path.parent / "args.json").read_text())
            done = state["global_step"] == options["total_timesteps"]
            if done and args.items() >= options.items():
                return path.parent

    if finished() is None:
        Path(runs).mkdir(parents=True, exist_ok=True)
        words = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
        command = [sys.executable, ROOT / f"{script}.py", *words, "--save-buffer", "--no-cuda"]
        if subprocess.run(command, cwd=runs).returncode:
            sys.exit(f"{script}.py did not finish; it says above why")
    return finished()


def trained_model(runs, env_id, norm, coef, seed, total_timesteps=3500):
    options = dict(env_id=env_id, spectral_norm=norm, sn_coef=coef, seed=seed)
    options |= dict(total_timesteps=total_timesteps, exp_name=f"{norm}-{coef:g}")
    return trained(runs, "rp_pgm", TRAINING | options)


def with_origin(rows):
    """Rows with what they were measured with, and floats of five digits."""
    machine = sweep.machine(cuda=False)
    machine["versions"] = " ".join(f"{k}={v}" for k, v in machine["versions"].items())
    rows = [row | machine for row in rows]
    return [{k: f"{v:.5g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows]


def write(path, rows):
    write_csv(path, list(rows[0]), [list(row.values()) for row in rows])


def main(args: Args):
    torch.set_num_threads(1)
    table, rows = Path(args.out, "model_gradients.csv"), []
    if table.exists():
        rows = list(csv.DictReader(table.read_text().splitlines()))
    names = "env_id", "spectral_norm", "sn_coef", "seed"
    done = {tuple(row[name] for name in names) for row in rows}
    cases = [(env_id, norm, 1.0) for env_id in args.env_ids for norm in ("none", "both")]
    cases += [(args.env_ids[0], "both", coef) for coef in args.coefs]
    for seed, (*case, coef) in itertools.product(args.seeds, cases):
        if (*case, f"{coef:g}", str(seed)) not in done:
            folder = trained_model(args.runs, *case, coef, seed, args.total_timesteps)
            what = (HORIZONS, ("dp", "dr")) if coef == 1 else ((8,), ("dp",))
            rows += with_origin(measure(folder, args, *what))
            write(table, rows)
    write(Path(args.out, "model_gradients_speed.csv"), with_origin(speed(args)))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
