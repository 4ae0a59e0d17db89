"""How a gradient grows with the steps that it passes through: BPTT, flows, models, and S2PG.

    python benchmark/through_time.py            # trains what is missing in --runs; half an hour
    python benchmark/gradient_plots.py          # the picture, from the CSV

Of trained networks, with critics, states and noise as in their training, the gradient of Q with
respect to what the network had computed k steps before, g_k [B, .]:

    bptt_sac   the internal state of a GRU, k rows before the action
    flow_sac   x_{K-k}, k steps of the flow before the action tanh x_K, of three velocities
    rp_pgm     x_{h-k}, k steps of policy and model before the state that Q judges
    s2pg       differentiates one step, whatever the length: its gradient is g_0

The CSV has the mean norm of g_k and its total variance over samples. Before these are cases whose
slope is known, through the code of the scripts: a linear flow, a linear model and a GRU that only
forgets.
"""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import tyro
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bptt_sac
import evaluate
import flow_sac
import rp_pgm
from benchmark import model_gradients
from benchmark.model_gradients import trained, with_origin, write

ROWS, STEPS, UNROLL = 32, 8, 16  # of BPTT, of the flow, of the model
COMMON = dict(
    env_id="HalfCheetah-v4", learning_starts=1000, gamma=0.99, tau=0.005, actor_lr=3e-4,
    critic_lr=1e-3, alpha=1.0, alpha_lr=1e-3, eval_frequency=0,
)  # fmt: skip
BPTT = COMMON | dict(hide="velocities", sequence_length=ROWS, loss_on="all", batch_size=256)
FLOW = COMMON | dict(alpha=0.2, state_dim=0, flow_steps=STEPS, flow_width=64, batch_size=64)


@dataclasses.dataclass
class Args:
    total_timesteps: int = 2000  # of training, the first 1000 random
    seeds: tuple[int, ...] = (1, 2, 3)
    runs: str = "runs/through_time"  # folder of the runs; those that are finished stay
    models: str = "runs/model_gradients"  # those of model_gradients.py
    samples: int = 256  # of a gradient
    csv: str = "benchmark/results/through_time.csv"

    def __post_init__(self):
        if not self.seeds or self.samples < 2:
            sys.exit("--seeds must be some, and --samples at least 2")


def passed(value, states):
    """[(mean norm, total variance)] of g_k for k = 0, 1, ..., of `states` [B, .], first to last."""
    gradients = torch.autograd.grad(value.sum(), states)[::-1]
    return [(g.norm(dim=-1).mean().item(), g.var(0).sum().item()) for g in gradients]


# --- the chains -----------------------------------------------------------------------------------


def through_rows(actor, obs, z, a_prev):
    """The internal states of a recurrent actor after each of the rows [T, B, .]."""
    states = [z]
    for row in zip(obs.split(1), a_prev.split(1)):
        states.append(actor.unroll(row[0], states[-1], row[1])[1])
    return states[1:]


def through_model(actor, model, x, horizon):
    """[x_0, ..., x_h] of policy and model."""
    states = [x]
    for _ in range(horizon):
        states.append(model.step(states[-1], actor.sample(states[-1])[0]))
    return states


def of_bptt(agent, batch):
    whole = batch.index[0] == ROWS - 1  # rows that so many come before
    obs, a_prev = (column[:ROWS, whole] for column in (batch.all_obs, batch.all_a_prev))
    states = through_rows(agent.actor, obs, batch.first_z[whole].requires_grad_(), a_prev)
    action, _ = agent.actor.sample(obs[-1], states[-1])
    return passed(agent.critic(batch.state[whole], action, a_prev[-1]).amin(0), states)


def of_flow(agent, batch):
    g, log_std, _ = agent.actor(batch.obs, batch.z, batch.a_prev)
    noise = torch.randn(agent.actor.steps + 1, *log_std.shape, requires_grad=True)
    path, _ = agent.actor.path(batch.obs, g, log_std, noise)
    q = agent.critic(batch.state, torch.tanh(path[-1]), batch.next_z, batch.a_prev).amin(0)
    return passed(q, path)


def of_model(agent, batch):
    x = batch.x[0].requires_grad_()
    states = through_model(agent.actor, agent.model, x, UNROLL)
    action, _ = agent.actor.sample(states[-1])
    return passed(agent.critic(states[-1], action).amin(0), states)


def known():
    """[(name, k, measured slope, exact slope)] of chains whose slope is known."""
    sizes = SimpleNamespace(state_dim=0, draw_x0=False, velocity="mlp", flow_steps=STEPS)
    rows, obs = [], torch.zeros(2, 3)
    for c in (-2.0, 0.5, 2.0):
        actor = flow_sac.FlowActor(3, 1, SimpleNamespace(**vars(sizes), flow_width=4))
        actor.velocity.forward = lambda context, x, t, c=c: c * x
        x_0 = torch.ones(STEPS + 1, 2, 1, requires_grad=True)
        path, _ = actor.path(obs, obs[:, :0], torch.zeros(2, 1), x_0)
        slopes = [norm for norm, _ in passed(path[-1].squeeze(-1), path)]
        rows += [
            (f"flow, v = {c:g} x", k, s, abs(1 + c / STEPS) ** k) for k, s in enumerate(slopes)
        ]
    for a in (0.8, 1.0, 1.2):
        policy = SimpleNamespace(sample=lambda x: (x, 0))
        model = SimpleNamespace(step=lambda x, u, a=a: (a + 0.3) * x - 0.3 * u)
        states = through_model(policy, model, torch.ones(2, 1, requires_grad=True), UNROLL)
        slopes = [norm for norm, _ in passed(states[-1].squeeze(-1), states)]
        rows += [(f"model, s' = {a:g} s", k, s, a**k) for k, s in enumerate(slopes)]
    for bias in (1.0, 4.0):  # without weights a GRU is z' = sigmoid(bias) z
        actor = bptt_sac.RecurrentActor(3, 1, SimpleNamespace(rnn="gru", state_dim=1, chrono=0))
        for p in actor.layer.parameters():
            nn.init.zeros_(p)
        nn.init.constant_(actor.layer.bias_hh_l0[1:2], bias)
        z = torch.ones(2, 1, requires_grad=True)
        states = through_rows(actor, torch.zeros(ROWS, 2, 3), z, torch.zeros(ROWS, 2, 1))
        slopes = [norm for norm, _ in passed(states[-1].squeeze(-1), states)]
        keep = 1 / (1 + np.exp(-bias))
        rows += [(f"GRU, bias {bias:g}", k, s, keep**k) for k, s in enumerate(slopes)]
    return rows


# --- the program ----------------------------------------------------------------------------------


def load(folder, script, buffer_class):
    """The agent of a run, the one that it began with, and its replay buffer."""
    _, env, agent = evaluate.load(folder, 1)
    torch.manual_seed(agent.args.seed)
    fresh = script.Agent(agent.args, env, agent.device)
    env.close()
    state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    buffer = buffer_class(len(state["rows"]), 1, *agent.row_sizes, agent.device)
    buffer.rows.copy_(state["rows"])
    buffer.steps.copy_(state["steps"])
    return agent, fresh, buffer


def measure(args, seed):
    """Rows of the CSV of trained networks, and of those that they began with."""
    cases = []  # (method, agents after and before, of_..., a batch)
    for norm in ("none", "both"):
        folder = model_gradients.trained_model(args.models, "HalfCheetah-v4", norm, 1.0, seed)
        *agents, buffer = load(folder, rp_pgm, rp_pgm.SegmentBuffer)
        agents[1].actor.norm.load_state_dict(agents[0].actor.norm.state_dict())
        batch = buffer.sample(args.samples, 1, agents[0].actor.norm)
        cases.append((f"model {norm}", agents, of_model, batch))
    run = dict(seed=seed, total_timesteps=args.total_timesteps)
    folder = trained(args.runs, "bptt_sac", BPTT | run | dict(exp_name="bptt"))
    *agents, buffer = load(folder, bptt_sac, bptt_sac.SequenceBuffer)
    cases.append(("bptt_sac", agents, of_bptt, buffer.sample(args.samples, ROWS, True)))
    for velocity in ("mlp", "flow_g", "flow_t"):
        options = FLOW | run | dict(velocity=velocity, exp_name=velocity)
        folder = trained(args.runs, "flow_sac", options)
        *agents, buffer = load(folder, flow_sac, flow_sac.TransitionBuffer)
        cases.append((f"flow {velocity}", agents, of_flow, buffer.sample(args.samples)))
    rows = []
    for method, agents, gradients, batch in cases:
        for name, agent in zip((method, f"{method}, at first"), agents):
            torch.manual_seed(0)
            for k, (norm, variance) in enumerate(gradients(agent, batch)):
                rows.append(
                    dict(method=name, seed=seed, k=k, norm=norm, variance=variance, exact="")
                )
    return rows


def main(args: Args):
    torch.set_num_threads(1)
    rows = []
    for name, k, measured, exact in known():
        rows.append(dict(method=name, seed=0, k=k, norm=measured, variance=0.0, exact=exact))
    for seed in args.seeds:
        rows += measure(args, seed)
    write(Path(args.csv), with_origin(rows))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
