"""BPTT-SAC: Soft Actor-Critic with a recurrent policy, trained by backpropagation through time.

Al-Hafez, Zhao, Peters, Tateo, "Time-Efficient Reinforcement Learning with Stochastic Stateful
Policies", ICLR 2024, arXiv 2311.04082. The policy sees o, the critic the state s. The internal
state is deterministic, h_k = GRU(o_k, a_{k-1}, h_{k-1}), and is computed along sequences of L rows
of the replay buffer from a stored z, the h before them. It is the baseline of that paper:

    target   y = r + gamma (1 - d) [min_i Q'_i(s', a'', a) - alpha log pi(a'' | o', h')]
    critic   L(Q)  = sum_i E[(Q_i(s, a, a_prev) - y)^2]
    actor    L(pi) = E[alpha log pi(a~ | o, h) - min_i Q_i(s, a~, a_prev)]

where a'' and a~ are fresh, reparameterised samples and the expectations are over all rows of each
sequence, or over the last. The actor's gradient goes back through the h of all rows before.

    python bptt_sac.py --env-id InvertedPendulum-v4 --total-timesteps 20000
    python bptt_sac.py --env-id Humanoid-v4 --sequence-length 64 --seed 1
    python evaluate.py runs/RUN --episodes 20 --capture-video
"""

import json
import math
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "InvertedPendulum-v4"  # [task] id or module:Id-v0; sets defaults
    env_kwargs: list[tuple[str, str]] = field(default_factory=list)  # of the environment: wind True
    hide: Literal["none", "velocities", "positions"] = "none"  # hidden from the policy, in MuJoCo
    privileged_critic: bool = True  # the critic sees the whole state, or no more than the policy
    num_envs: int = 1  # environments stepped together
    total_timesteps: int = 1_000_000  # environment steps, over all environments

    buffer_size: int = 1_000_000  # [algorithm] rows of the replay buffer, over all environments
    learning_starts: int = 5_000  # random steps, before the first update
    batch_size: int = 256  # rows with a loss in an update
    gamma: float = 0.99  # discount, in [0, 1)
    tau: float = 0.005  # share of the critic that goes into its target, in (0, 1]
    actor_lr: float = 3e-4  # learning rate of the actor
    critic_lr: float = 1e-3  # learning rate of the critic
    alpha: float = 1.0  # initial temperature of the action
    alpha_lr: float = 1e-3  # learning rate of log alpha; the target entropy is -A
    sequence_length: int = 32  # rows L that gradients flow through; 1: none through time
    loss_on: Literal["last", "all"] = "all"  # rows of a sequence with a loss; "last" as published
    initial_state: Literal["stored", "zero"] = "stored"  # internal state before the first row

    rnn: Literal["gru", "lstm", "rnn"] = "gru"  # [networks] recurrent cell
    state_dim: int = 32  # size of the cell; an LSTM's z = (h, c) is twice as large
    chrono: int = 0  # longest initial time scale of the gates, in steps; 0: none

    seed: int = 1  # [run] of the networks, the noise and the environments
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    resume: str | None = None  # folder of a run to go on with, and with its options
    save_buffer: bool = False  # save the buffer, too; a resumed run refills it otherwise
    checkpoint_frequency: int = 10_000  # steps between checkpoints; an evaluation writes one, too
    eval_frequency: int = 10_000  # steps between evaluations; 0 for none
    eval_episodes: int = 5  # stochastic ones, and as many noise-free; 0 for none
    track: bool = False  # log to Weights and Biases, too: $WANDB_PROJECT
    cuda: bool = True  # [hardware] use a CUDA card where there is one
    num_threads: int = 1  # CPU threads of torch; for small networks one is enough
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # of float32 products
    compile: bool = False  # on CUDA: torch.compile the losses
    cudagraphs: bool = False  # on CUDA: replay acting and updates as graphs

    def __post_init__(self):
        self.env_kwargs = list(dict(self.env_kwargs).items())  # pairs, also after JSON
        rows, inf = 4 * self.num_envs, math.inf
        for name, (low, high) in dict(
            seed=(0, 1e18), num_envs=(1, inf), buffer_size=(rows, inf), learning_starts=(rows, inf),
            batch_size=(1, inf), gamma=(0, 1 - 1e-9), tau=(1e-9, 1), num_threads=(1, inf),
            actor_lr=(0, inf), critic_lr=(0, inf), alpha=(1e-9, inf), alpha_lr=(0, inf),
            sequence_length=(1, inf), state_dim=(1, inf),
            checkpoint_frequency=(1, inf), eval_frequency=(0, inf), eval_episodes=(0, inf),
        ).items():  # fmt: skip
            if not low <= getattr(self, name) <= high:
                sys.exit(f"--{name.replace('_', '-')} must be in [{low}, {high}]")


BRIEF = dict(hide="velocities", learning_starts=1_000)  # for tasks that are learned early
TUNED = {  # defaults that differ by task; options on the command line override these
    "Ant": dict(hide="velocities", critic_lr=1e-4),
    "CueRecall": dict(learning_starts=1_000),
    **{name: dict(hide="velocities") for name in ("HalfCheetah", "Hopper", "Swimmer")},
    **{name: dict(hide="velocities", critic_lr=1e-4) for name in ("Humanoid", "HumanoidStandup")},
    "InvertedDoublePendulum": BRIEF,
    "InvertedPendulum": BRIEF,
    "Walker2d": dict(hide="velocities", critic_lr=3e-4),
}
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0


class RecurrentActor(nn.Module):
    """The policy pi(a | o, h), a squashed diagonal Gaussian, with a deterministic internal state h.

    Shapes: o [B, O]; z, z' [B, Z]; h [B, H] in (-1, 1); a, a_prev [B, A] in (-1, 1). The z of a
    step is the h before it, and (h, c) for an LSTM.
    """

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.rnn, self.action_dim = args.rnn, action_dim
        self.state_dim = args.state_dim
        self.z_dim = 2 * self.state_dim if args.rnn == "lstm" else self.state_dim
        self.policy_obs = nn.Linear(obs_dim, 256)
        self.kernel_obs = nn.Linear(obs_dim, 128)
        self.kernel_action = nn.Linear(action_dim, 128)
        self.layer = getattr(nn, args.rnn.upper())(256, self.state_dim)
        if args.chrono:
            chrono_init(self.layer, args.chrono)
        self.policy_hidden = nn.Linear(256 + self.state_dim, 256)
        self.policy_head = nn.Linear(256, 2 * action_dim)

    def unroll(self, obs, z, a_prev):
        """h [T, B, H] and the last z' [B, Z] of rows `obs`, `a_prev` [T, B, .] that follow z."""
        e = torch.relu_(torch.cat([self.kernel_obs(obs), self.kernel_action(a_prev)], -1))
        if self.rnn == "lstm":
            h, c = z.unsqueeze(0).chunk(2, -1)
            outputs, state = self.layer(e, (h.contiguous(), c.contiguous()))
            return outputs, torch.cat(state, -1).squeeze(0)
        outputs, h = self.layer(e, z.unsqueeze(0).contiguous())  # as cuDNN asks for
        return outputs, h.squeeze(0)

    def forward(self, obs, h):
        """Mean and log std of a before the tanh, both [B, A]."""
        features = torch.cat([torch.relu_(self.policy_obs(obs)), h], -1)
        head = self.policy_head(torch.relu_(self.policy_hidden(features)))
        mean, log_std = head.chunk(2, -1)
        return mean, LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (log_std.tanh() + 1)

    def sample(self, obs, h):
        """Reparameterised a [B, A], with log pi [B]."""
        action, log_prob = squashed_gaussian(*self(obs, h))
        return action, log_prob.sum(-1)

    @torch.no_grad()
    def act(self, obs, z, a_prev, deterministic=False):
        """a [B, A], sampled or noise-free, and z' [B, Z]."""
        h, z_next = self.unroll(obs.unsqueeze(0), z, a_prev.unsqueeze(0))
        mean, log_std = self(obs, h.squeeze(0))
        sample = torch.tanh(mean) if deterministic else squashed_gaussian(mean, log_std)[0]
        return sample, z_next


def chrono_init(cell, steps):
    """Let the gates of a GRU or an LSTM, a cell or a layer, begin with time scales up to `steps`.

    Tallec and Ollivier, ICLR 2018, arXiv 1804.11188: the bias of the gate that keeps is
    log U(1, steps - 1), and minus that where another gate writes.
    """
    n, (bias_ih, bias_hh) = cell.hidden_size, [p for p in cell.parameters() if p.dim() == 1]
    if steps < 3 or len(bias_ih) == n:
        sys.exit("--chrono takes 3 steps or more, and gates: --rnn gru or lstm")
    keep = torch.empty(n).uniform_(1, steps - 1).log()
    with torch.no_grad():
        bias_ih[n : 2 * n], bias_hh[n : 2 * n] = keep, 0  # z of a GRU, f of an LSTM
        if len(bias_ih) == 4 * n:
            bias_ih[:n], bias_hh[:n] = -keep, 0


def squashed_gaussian(mean, log_std):
    """x = tanh(u), u ~ N(mean, std^2), and log p(x) of each dimension; both shaped like `mean`."""
    noise = torch.randn_like(mean)
    u = mean + noise * log_std.exp()
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    # log(1 - tanh(u)^2), in the form that does not underflow for large |u|
    return torch.tanh(u), log_prob - 2 * (math.log(2) - u - F.softplus(-2 * u))


class TwinCritic(nn.Module):
    """Q_1 and Q_2 [2, B] of the concatenated inputs [B, .], as one batch of matrix products."""

    def __init__(self, inputs):
        super().__init__()
        self.layers = nn.ParameterList()
        for fan_in, fan_out in [(inputs, 256), (256, 256), (256, 1)]:
            for shape in [(2, fan_in, fan_out), (2, 1, fan_out)]:  # weight and bias
                self.layers.append(torch.empty(shape).uniform_(-1, 1) / math.sqrt(fan_in))

    def forward(self, *inputs):
        x = torch.cat([x.expand(2, -1, -1) for x in inputs], -1)
        weight_1, bias_1, weight_2, bias_2, weight_3, bias_3 = self.layers
        x = torch.relu_(torch.baddbmm(bias_1, x, weight_1))
        x = torch.relu_(torch.baddbmm(bias_2, x, weight_2))
        return torch.baddbmm(bias_3, x, weight_3).squeeze(-1)


class Sequences(NamedTuple):
    """B rows of M sequences, and their successors; `state` is s, or o, to which `update` adds h."""

    all_obs: torch.Tensor  # [L + 1, M, O]
    all_a_prev: torch.Tensor  # [L + 1, M, A]
    first_z: torch.Tensor  # [M, Z], before the first row
    index: tuple[torch.Tensor, torch.Tensor]  # [B], places in sequences, and which sequences
    obs: torch.Tensor  # [B, O]
    state: torch.Tensor  # [B, S]
    a_prev: torch.Tensor  # [B, A]
    action: torch.Tensor  # [B, A]
    reward: torch.Tensor  # [B]
    terminated: torch.Tensor  # [B], 0 or 1
    next_obs: torch.Tensor  # [B, O]
    next_state: torch.Tensor  # [B, S]
    weight: torch.Tensor  # [B], sums to 1; 0 for a row that is no transition


class SequenceBuffer:
    """A ring of rows, one for each step of each environment (autoreset next step).

    An episode of T transitions fills T + 1 rows; the last holds the final observation, its action
    is ignored. The next observation and internal state of a row are its successor's, a_prev is its
    predecessor's action: nothing is stored twice. A row whose successor is the `first` of an
    episode is no transition, and has weight 0.

    Row t of environment n lies at t * num_envs + n, modulo the length of the ring. `steps`, the
    rows written for each environment, lies on the device, so that a graph can replay `sample`.
    """

    def __init__(self, size, num_envs, obs_dim, critic_dim, z_dim, action_dim, device):
        self.num_envs, self.slots, self.device = num_envs, size // num_envs, device
        self.widths = [obs_dim, critic_dim, z_dim, action_dim, 1, 1, 1]  # critic_dim 0: not stored
        shape = self.slots * num_envs, sum(self.widths)
        try:
            self.rows = torch.zeros(shape, device=device)
        except RuntimeError:  # out of memory
            sys.exit(f"the buffer needs {4e-9 * math.prod(shape):.1f} GB: lower --buffer-size")
        _, _, self.z, self.action, *_ = self.rows.split(self.widths, -1)
        self.steps = torch.zeros(1, dtype=torch.int64, device=device)

    def columns(self, rows):
        """Columns of rows: o, what the critic sees, z, a [B, .], r, terminated, first [B]."""
        obs, state, z, action, *numbers = rows.split(self.widths, -1)
        state = state if self.widths[1] > 0 else obs
        return obs, state, z, action, *(number.squeeze(-1) for number in numbers)

    def add(self, obs, critic_obs, z, action, reward, terminated, first):
        """Write a row per environment: tensors [num_envs, .] on the device, arrays [num_envs]."""
        numbers = to_device(np.stack([reward, terminated, first], -1), self.device)
        row = torch.cat([obs, critic_obs[:, : self.widths[1]], z, action, numbers], -1)
        ring = self.rows.view(self.slots, self.num_envs, -1)
        ring.index_copy_(0, self.steps % self.slots, row.unsqueeze(0))
        self.steps += 1

    def sample(self, batch_size, length, last):
        """Sequences around uniformly drawn rows; about `batch_size` of their rows have a loss."""
        batch_size = batch_size if last else max(1, batch_size // length)
        # a step with a predecessor and a successor; its fraction picks the environment
        stored = self.steps.clamp(max=self.slots)
        offset = torch.rand(batch_size, dtype=torch.float64, device=self.device) * (stored - 2)
        row = ((self.steps - stored + 1 + offset) * self.num_envs).long()
        # so many rows before it belong to the same episode, and are still there
        step = torch.arange(length + 1, device=self.device).unsqueeze(-1) * self.num_envs
        before = row - step[:-1]
        first = self.rows[before % len(self.rows), -1]
        there = before >= (self.steps - stored + 1) * self.num_envs
        available = ((first.cumsum(0) - first == 0) & there).sum(0) - 1
        # a row comes last if only the last has a loss, and anywhere if all have
        limit = torch.full_like(row, length - 1) if last else torch.randint_like(row, length)
        depth = torch.minimum(available, limit)
        number = row + step - depth * self.num_envs  # [L + 1, M]
        rows = self.rows[number % len(self.rows)]
        all_obs, _, z, *_, first = self.columns(rows)
        a_prev = self.action[(number - self.num_envs) % len(self.rows)] * (1 - first).unsqueeze(-1)
        # a sequence goes on to the end of its episode, or to the newest row
        valid = (first[1:].cumsum(0) == 0) & (number[1:] < self.steps * self.num_envs)
        places = depth.unsqueeze(0) if last else step[:-1].expand_as(valid) // self.num_envs
        sequences = torch.arange(batch_size, device=self.device).expand_as(places)
        index = places.flatten(), sequences.flatten()
        obs, state, _, action, reward, terminated, _ = self.columns(rows[index])
        next_obs, next_state, *_ = self.columns(rows[1:][index])
        weight = valid[index] / valid[index].sum().clamp(min=1)
        return Sequences(
            all_obs, a_prev, z[0], index, obs, state, a_prev[index], action, reward, terminated,
            next_obs, next_state, weight,
        )  # fmt: skip


def bptt_critic_loss(actor, critic, target_critic, batch, next_h, alpha, args):
    """sum_i E[(Q_i(s, a, a_prev) - y)^2]; also Q_1, Q_2 [2, B].

    y = r + gamma (1 - d) [min_i Q'_i(s', a'', a) - alpha log pi(a'' | o', h')], where
    the action just taken is the next a_prev. It bootstraps through time limits: d is `terminated`.
    """
    with torch.no_grad():
        a, log_pi_a = actor.sample(batch.next_obs, next_h)
        next_q = target_critic(batch.next_state, a, batch.action).amin(0)
        target = batch.reward + args.gamma * (1 - batch.terminated) * (next_q - alpha * log_pi_a)
    q = critic(batch.state, batch.action, batch.a_prev)
    return (batch.weight * (q - target).square()).sum(), q.detach()


def bptt_actor_loss(actor, critic, batch, h, alpha):
    """E[alpha log pi(a~ | o, h) - min_i Q_i(s, a~, a_prev)]; also the entropy of pi, detached."""
    a, log_pi = actor.sample(batch.obs, h)
    q = critic(batch.state, a, batch.a_prev).amin(0)
    loss = (batch.weight * (alpha * log_pi - q)).sum()
    return loss, -(batch.weight * log_pi).sum().detach()


class BPTTSAC(nn.Module):
    """Networks, temperatures and optimisers, and the update that trains them."""

    def __init__(self, args, env, device):
        super().__init__()
        self.args, self.device = args, device
        space = env.single_observation_space
        obs_dim, critic_dim = (view.shape[0] for view in views(getattr(space, "spaces", space)))
        self.action_dim = action_dim = env.single_action_space.shape[0]
        privileged = getattr(env, "critic_sees_more", obs_dim != critic_dim)
        self.actor = RecurrentActor(obs_dim, action_dim, args)
        self.z_dim = self.actor.z_dim
        self.critic_sees_h = not privileged
        critic_state = critic_dim if privileged else obs_dim + args.state_dim  # s, or (o, h)
        inputs = critic_state + action_dim + action_dim  # s, a, a_prev
        self.critic, self.target_critic = TwinCritic(inputs), TwinCritic(inputs)
        self.target_critic.requires_grad_(False).load_state_dict(self.critic.state_dict())
        self.log_alpha = nn.Parameter(torch.tensor(args.alpha).log())
        self.to(device)

        adam = dict(fused=True, capturable=args.cudagraphs)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), args.critic_lr, **adam)
        parts = [
            dict(params=list(self.actor.parameters()), lr=args.actor_lr),
            dict(params=[self.log_alpha], lr=args.alpha_lr),
        ]
        self.actor_optimizer = torch.optim.Adam(parts, **adam)
        self.optimizers = [self.critic_optimizer, self.actor_optimizer]
        compiled = torch.compile if args.compile else lambda function: function
        self.critic_loss, self.actor_loss = compiled(bptt_critic_loss), compiled(bptt_actor_loss)
        self.act = self.actor.act
        if args.cudagraphs:
            self.act, self.update = Graphed(self.act), Graphed(self.update)
        self.row_sizes = obs_dim, critic_dim if privileged else 0, self.z_dim, action_dim

    def update(self, buffer):
        """One gradient step of everything; returns what to log, as tensors on the device."""
        actor, critic, args = self.actor, self.critic, self.args
        batch = buffer.sample(args.batch_size, args.sequence_length, args.loss_on == "last")
        alpha = self.log_alpha.detach().exp()

        # the critic's step leaves the actor as it is, so both losses share one pass through time
        z = batch.first_z if args.initial_state == "stored" else torch.zeros_like(batch.first_z)
        all_h, _ = actor.unroll(batch.all_obs, z, batch.all_a_prev)
        h, next_h = all_h[batch.index], all_h[1:][batch.index].detach()
        if self.critic_sees_h:
            state = torch.cat([batch.state, h.detach()], -1)
            next_state = torch.cat([batch.next_state, next_h], -1)
            batch = batch._replace(state=state, next_state=next_state)
        qf_loss, q = self.critic_loss(actor, critic, self.target_critic, batch, next_h, alpha, args)
        descend(self.critic_optimizer, qf_loss)

        pi_loss, entropy = self.actor_loss(actor, critic, batch, h, alpha)
        # a temperature falls while its entropy is above the target
        alpha_loss = self.log_alpha.exp() * (entropy + self.action_dim)
        descend(self.actor_optimizer, pi_loss + alpha_loss)

        with torch.no_grad():  # theta' <- theta' + tau (theta - theta')
            targets, online = list(self.target_critic.parameters()), list(critic.parameters())
            torch._foreach_lerp_(targets, online, args.tau)

        losses = dict(
            qf_values=(batch.weight * q.mean(0)).sum(), qf_loss=qf_loss, actor_loss=pi_loss,
            alpha=alpha, entropy=entropy,
        )  # fmt: skip
        return {f"losses/{name}": value.detach() for name, value in losses.items()}


Agent = BPTTSAC  # what `train` works with


def descend(optimizer, loss):
    """One step of `optimizer`; gradients are computed for its own parameters only."""
    optimizer.zero_grad()
    loss.backward(inputs=[p for group in optimizer.param_groups for p in group["params"]])
    optimizer.step()


class Graphed:
    """`function` as a CUDA graph from its fourth call on: all its kernels take one launch.

    Tensor arguments are copied to where it reads them. The next call overwrites the result.
    """

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args):
        if self.calls == 0:
            self.args = [arg.clone() if torch.is_tensor(arg) else arg for arg in args]
        for static, arg in zip(self.args, args):
            if torch.is_tensor(arg):
                static.copy_(arg)
        self.calls += 1
        if self.calls < 4:  # warm-up on a side stream, as torch.cuda.graph asks for
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                result = self.function(*self.args)
            torch.cuda.synchronize()
            return result
        if self.calls == 4:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.function(*self.args)
        self.graph.replay()
        return self.result


def to_device(array, device):
    """A float32 copy of a host array, sent without waiting for what the device is doing."""
    return torch.tensor(array, dtype=torch.float32).to(device, non_blocking=True)


def make_env(args, num_envs):
    """Replace it by yours: any vector environment, actions in [-1, 1], autoreset next step."""
    import envs

    options = dict(hide=args.hide, privileged_critic=args.privileged_critic)
    return envs.make_vec(args.env_id, num_envs, **options | envs.literals(args.env_kwargs))


def views(obs):
    """What the policy sees and what the critic sees: both all of `obs`, unless it is a dict."""
    return (obs["policy"], obs["critic"]) if isinstance(obs, dict) else (obs, obs)


def save_checkpoint(run_dir, agent, buffer, **state):
    """Write RUN/checkpoint.pt whole or not at all, so that a kill leaves the last good one."""
    if not all(x.isfinite().all() for x in [*agent.parameters(), *buffer.rows.aminmax()]):
        sys.exit(f"weights or data are not finite any more; {run_dir} keeps its last checkpoint")
    state |= dict(agent=agent.state_dict(), optimizers=[o.state_dict() for o in agent.optimizers])
    if agent.args.save_buffer:
        written = buffer.rows[: int(buffer.steps) * buffer.num_envs].clone()
        state |= dict(rows=written, steps=buffer.steps, ring=(buffer.slots, buffer.num_envs))
    try:
        torch.save(state, run_dir / "checkpoint.pt.tmp")
        (run_dir / "checkpoint.pt.tmp").replace(run_dir / "checkpoint.pt")
    finally:  # e.g. the disk is full
        (run_dir / "checkpoint.pt.tmp").unlink(missing_ok=True)


def load_checkpoint(run_dir, agent, buffer):
    """Go on from RUN/checkpoint.pt; returns its global step and seconds of training."""
    try:
        state = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
        agent.load_state_dict(state["agent"])
    except Exception as error:  # torch raises what it likes
        sys.exit(f"{run_dir} has no checkpoint that fits these options: {error!r}")
    for optimizer, saved in zip(agent.optimizers, state["optimizers"]):
        groups = optimizer.state_dict()["param_groups"]  # learning rates are those of the options
        optimizer.load_state_dict(dict(state=saved["state"], param_groups=groups))
    if "rows" in state and agent.args.save_buffer:
        if state["ring"] != (buffer.slots, buffer.num_envs):
            sys.exit(f"the buffer of {run_dir} has another --buffer-size or --num-envs")
        buffer.rows[: len(state["rows"])] = state["rows"]
        buffer.steps.copy_(state["steps"])
    return state["global_step"], state["seconds"]


def train(args):
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and (args.compile or args.cudagraphs):
        sys.exit("--compile and --cudagraphs need a CUDA card")
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)
    torch.set_flush_denormal(True)  # Adam's moments of dead units become denormal, which is slow
    torch.set_float32_matmul_precision(args.matmul_precision)
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time():.3f}"
    run_dir = Path(args.resume or "runs/" + name.replace("/", "_").replace(":", "_"))

    env = make_env(args, args.num_envs)
    assert "NEXT_STEP" in str(env.metadata.get("autoreset_mode", "NEXT_STEP")), "see make_env"
    evaluates = args.eval_frequency and args.eval_episodes
    eval_env = make_env(args, min(args.eval_episodes, 8)) if evaluates else None
    agent = Agent(args, env, device)
    buffer = SequenceBuffer(args.buffer_size, args.num_envs, *agent.row_sizes, device)
    global_step, seconds = load_checkpoint(run_dir, agent, buffer) if args.resume else (0, 0.0)
    # a resumed run whose buffer was not saved fills a new one
    first_update = global_step + max(0, args.learning_starts - int(buffer.steps) * args.num_envs)
    if args.total_timesteps <= first_update:
        sys.exit(f"no update before step {first_update}: raise --total-timesteps")
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(run_dir / "lock", is_singleton=True).acquire(timeout=0)  # noqa: F841
    except Timeout:
        sys.exit(f"another process trains {run_dir}")
    if args.track:
        import wandb

        wandb.init(config=vars(args), id=run_dir.name[-64:], resume="allow", sync_tensorboard=True)
    saved_args = vars(args) | dict(resume=None, script=Path(__file__).name)
    (run_dir / "args.json").write_text(json.dumps(saved_args, indent=2))
    writer = SummaryWriter(run_dir, purge_step=global_step + 1 if args.resume else None)
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", dynamic_ncols=True)
    bar.write(f"random actions until step {args.learning_starts}, updates from {first_update} on")
    stopped_by = []  # signals that asked to stop; nohup ignores SIGHUP, Windows has none
    for signum in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signum == signal.SIGINT or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, lambda signum, frame: stopped_by.append(signum))

    start_time, updates_due, metrics, leaving = time.time() - seconds, 0, {}, False
    obs, _ = env.reset(seed=1000 * args.seed + global_step)  # a resumed run: new episodes
    z = torch.zeros(args.num_envs, agent.z_dim, device=device)
    a_prev = torch.zeros(args.num_envs, agent.action_dim, device=device)
    first = np.ones(args.num_envs, dtype=bool)  # rows that begin an episode
    final = np.zeros(args.num_envs, dtype=bool)  # rows that hold its last observation
    while not leaving:
        policy_obs, critic_obs = (to_device(view, device) for view in views(obs))
        action, z_next = agent.act(policy_obs, z, a_prev)
        if global_step < args.learning_starts:
            action = 2 * torch.rand_like(action) - 1
        a = action.cpu().numpy().copy()  # an environment may write to it
        for _ in range(updates_due):  # a CUDA card works on them during env.step, as `a` is here
            metrics = agent.update(buffer)
        try:
            obs, reward, terminated, truncated, info = env.step(a)
        except Exception:  # of the environment: what is learned outlives it
            save_checkpoint(run_dir, agent, buffer, global_step=global_step, seconds=seconds)
            raise
        buffer.add(policy_obs, critic_obs, z, action, reward, terminated, first)

        # a final row is no step: the environment ignores its action and begins anew
        last_step, env_step = global_step, global_step + np.cumsum(~final)
        global_step = int(env_step[-1])
        bar.update(global_step - last_step)
        for i in np.flatnonzero(info.get("_episode", [])):
            for name, key in ("return", "r"), ("length", "l"):
                writer.add_scalar(f"charts/episodic_{name}", info["episode"][key][i], env_step[i])
            bar.set_postfix_str(f"return {info['episode']['r'][i]:.1f}", refresh=False)
        keep = to_device(~final, device).unsqueeze(-1)  # z and a_prev begin anew, too
        z, a_prev = z_next * keep, action * keep
        first = final
        final = terminated | truncated
        updates_due = global_step - last_step if global_step >= first_update else 0

        finished = global_step >= args.total_timesteps
        leaving = finished or bool(stopped_by)
        seconds = time.time() - start_time  # of training, without evaluations
        if global_step // 100 > last_step // 100:
            for name, value in metrics.items():
                writer.add_scalar(name, value, global_step)
            writer.add_scalar("charts/SPS", global_step / seconds, global_step)
        frequencies = args.checkpoint_frequency, evaluates and args.eval_frequency
        save, score = (n and (finished or global_step // n > last_step // n) for n in frequencies)
        if save or score or leaving:
            save_checkpoint(run_dir, agent, buffer, global_step=global_step, seconds=seconds)
        if score and hasattr(eval_env, "score"):
            eval_env.score(agent, args.eval_episodes, args.seed, writer, global_step)
            writer.add_scalar("charts/seconds", seconds, global_step)
            start_time = time.time() - seconds
    for part in bar, writer, env:
        part.close()
    if not finished:
        print(f"stopped at step {global_step}; go on with --resume {run_dir}")
        sys.exit(128 + stopped_by[0])
    print(f"python evaluate.py {run_dir}")


def parse_args():
    """The options. --env-id and --resume are read first: they give the defaults of the others."""
    unchecked = type("Args", (Args,), dict(__post_init__=lambda self: None))
    asked = tyro.cli(unchecked, args=[o for o in sys.argv[1:] if o not in ("-h", "--help")])
    options = TUNED.get(asked.env_id.split("-")[0], {})
    if asked.resume is not None:
        try:
            options = json.loads(Path(asked.resume, "args.json").read_text())
            del options["script"]
            Args(**options)
        except (OSError, ValueError, TypeError, KeyError) as error:
            sys.exit(f"{asked.resume} is no run of this script: {error!r}")
    return tyro.cli(Args, default=Args(**options), description=__doc__)


if __name__ == "__main__":
    train(parse_args())
