"""S2PG-LSIQ: least-squares inverse Q-learning with a stochastic stateful policy.

Al-Hafez, Tateo, Arenz, Zhao, Peters, "LS-IQ: Implicit Reward Regularization for Inverse
Reinforcement Learning", ICLR 2023, with the policy of S2PG-SAC. Q(s, a, z') implies a reward Q - y,
driven to r_max = 1/c on the expert's rows and to r_min = -1/c on the policy's; c is --regularizer.
The internal state of the expert's rows is the policy's, refreshed like that of the replay buffer.

    bootstrap  y = gamma (1 - d) clip(V', Q_min, Q_max), with Q_max = 1/(c (1 - gamma)) = -Q_min
               V' = min_i Q'_i(s', a'', z'') - alpha log pi_a(a'' | o', z', a)
    sqil_like  L(Q) = E_expert[(Q - Q_max)^2] + E_policy[(Q - (r_min + y))^2]
    iq_like    L(Q) = E_policy[Q - y] - E_expert[Q - y] + c E[(Q - y)^2], the last over both halves
    actor      as in s2pg_sac.py, on states of the policy and of the expert

A terminated episode stays in an absorbing state for ever: there sqil_like has r_min / (1 - gamma),
and iq_like (1 - gamma) (Q - y)^2. The task's reward is logged, and never learned from.

    python s2pg_lsiq.py --env-id InvertedPendulum-v4 --total-timesteps 20000
    python s2pg_lsiq.py --env-id Hopper-v4 --demonstrations expert.npz --loss iq_like
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

    demonstrations: str | None = None  # [algorithm] FILE.npz, minari:NAME, or shipped:stochastic
    demonstration_episodes: int | None = None  # how many to imitate, from the first; None: all
    loss: Literal["sqil_like", "iq_like"] = "sqil_like"  # of the critic, see above
    expert_target: Literal["fix", "bootstrap"] = "fix"  # of sqil_like: Q_max, or r_max + y
    regularizer: float = 0.5  # c; rewards tend to +-1/c, targets are in +-1/(c (1 - gamma))
    absorbing: bool = True  # a terminated episode goes on in an absorbing state

    buffer_size: int = 1_000_000  # rows of the replay buffer, over all environments
    learning_starts: int = 5_000  # random steps, before the first update
    batch_size: int = 256  # rows of the policy in an update, and as many of the expert
    gamma: float = 0.99  # discount, in [0, 1)
    tau: float = 0.005  # share of the critic that goes into its target, in (0, 1]
    actor_lr: float = 1e-4  # learning rate of the actor
    critic_lr: float = 1e-3  # learning rate of the critic
    alpha: float = 1.0  # initial temperature of the action
    alpha_lr: float = 3e-4  # learning rate of log alpha; the target entropy is -A
    alpha_z: float = 0.01  # initial temperature of the internal state
    alpha_z_lr: float = 3e-4  # learning rate of log alpha_z
    target_entropy_z: float = -1.0  # nats per component of z, log std + 1.4: -1 is a std of .09

    rnn: Literal["gru", "lstm", "rnn"] = "gru"  # [networks] recurrent cell
    state_dim: int = 32  # size of the cell; an LSTM's z = (h, c) is twice as large
    chrono: int = 0  # longest initial time scale of the gates, in steps; 0: none
    log_std_z_max: float = 2.0  # largest log std of z before its tanh, >= target_entropy_z - 1.4
    memoryless: bool = False  # no internal state: plain LSIQ

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
            regularizer=(1e-9, inf), batch_size=(1, inf), gamma=(0, 1 - 1e-9), tau=(1e-9, 1),
            actor_lr=(0, inf), critic_lr=(0, inf), alpha=(1e-9, inf), alpha_lr=(0, inf),
            alpha_z=(1e-9, inf), alpha_z_lr=(0, inf), log_std_z_max=(-4.8, 2), num_threads=(1, inf),
            target_entropy_z=(-3.5, min(0.5, self.log_std_z_max + 1.4)), state_dim=(1, inf),
            checkpoint_frequency=(1, inf), eval_frequency=(0, inf), eval_episodes=(0, inf),
        ).items():  # fmt: skip
            if not low <= getattr(self, name) <= high:
                sys.exit(f"--{name.replace('_', '-')} must be in [{low}, {high}]")


TUNED = {  # defaults that differ by task; options on the command line override these
    "Ant": dict(hide="velocities"),
    "CueRecall": dict(learning_starts=1_000),
    "HalfCheetah": dict(hide="velocities", demonstrations="shipped:stochastic"),
    "Hopper": dict(hide="velocities", demonstrations="shipped:stochastic"),
    "Humanoid": dict(hide="velocities"),
    "HumanoidStandup": dict(hide="velocities"),
    "InvertedDoublePendulum": dict(hide="velocities", learning_starts=1_000),
    "InvertedPendulum": dict(
        hide="velocities", learning_starts=1_000, demonstrations="shipped:stochastic"
    ),
    "Swimmer": dict(hide="velocities"),
    "Walker2d": dict(hide="velocities"),
}
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0


class StochasticStatefulActor(nn.Module):
    """The joint policy pi(a, z' | o, z, a_prev), a squashed diagonal Gaussian.

    A recurrent cell gives g, the next internal state without noise. The kernel spreads z' around g.
    The stateless policy reads (o, g), of an LSTM's g only h; its head also gives the std of z'.
    Given (o, z, a_prev), a and z' are independent, so a stored a still fits a refreshed z'.

    o [B, O]; z, z', g [B, Z] and a, a_prev [B, A] in (-1, 1); for an LSTM z = (h, tanh c).
    """

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.rnn, self.action_dim = args.rnn, action_dim
        self.state_dim = 0 if args.memoryless else args.state_dim
        self.z_dim = 2 * self.state_dim if args.rnn == "lstm" else self.state_dim
        self.policy_obs = nn.Linear(obs_dim, 256)
        if self.state_dim > 0:
            self.kernel_obs = nn.Linear(obs_dim, 128)
            self.kernel_action = nn.Linear(action_dim, 128)
            self.cell = getattr(nn, f"{args.rnn.upper()}Cell")(256, self.state_dim)
            if args.chrono:
                chrono_init(self.cell, args.chrono)
        self.policy_hidden = nn.Linear(256 + self.state_dim, 256)
        self.policy_head = nn.Linear(256, 2 * action_dim + self.z_dim)
        largest = [LOG_STD_MAX] * action_dim + [args.log_std_z_max] * self.z_dim
        self.register_buffer("log_std_max", torch.tensor(largest), persistent=False)

    def noise_free_z(self, obs, z, a_prev):
        """g [B, Z]: the internal state after `obs`, without noise."""
        if self.state_dim == 0:
            return z
        e = torch.relu_(torch.cat([self.kernel_obs(obs), self.kernel_action(a_prev)], -1))
        if self.rnn == "lstm":
            h, tanh_c = z.chunk(2, -1)
            h, c = self.cell(e, (h, atanh(tanh_c)))
            return torch.cat([h, torch.tanh(c)], -1)
        return self.cell(e, z)

    def forward(self, obs, z, a_prev):
        """Mean and log std of (a, z') before the tanh, both [B, A + Z]."""
        g = self.noise_free_z(obs, z, a_prev)
        features = torch.cat([torch.relu_(self.policy_obs(obs)), g[..., : self.state_dim]], -1)
        head = self.policy_head(torch.relu_(self.policy_hidden(features)))
        mean_a, log_std = head.split([self.action_dim, self.action_dim + self.z_dim], -1)
        mean = torch.cat([mean_a, atanh(g)], -1)  # tanh(mean) is the noise-free a, and g
        return mean, LOG_STD_MIN + 0.5 * (self.log_std_max - LOG_STD_MIN) * (log_std.tanh() + 1)

    def sample(self, obs, z, a_prev):
        """Reparameterised a [B, A] and z' [B, Z], with log pi_a [B] and log pi_z [B]."""
        sizes = [self.action_dim, self.z_dim]
        sample, log_prob = squashed_gaussian(*self(obs, z, a_prev))
        log_pi_a, log_pi_z = (part.sum(-1) for part in log_prob.split(sizes, -1))
        return *sample.split(sizes, -1), log_pi_a, log_pi_z

    @torch.no_grad()
    def act(self, obs, z, a_prev, deterministic=False):
        """a [B, A] and z' [B, Z], both sampled or both noise-free."""
        mean, log_std = self(obs, z, a_prev)
        sample = torch.tanh(mean) if deterministic else squashed_gaussian(mean, log_std)[0]
        return sample.split([self.action_dim, self.z_dim], -1)


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


def atanh(x):
    """Inverse of tanh, finite where float32 has rounded a tanh to -1 or 1."""
    return torch.atanh((1 - 1e-6) * x)


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


class ImitationCritic(TwinCritic):
    """Q_1 and Q_2 [2, B] of (s, a, z'), without a_prev.

    Given s and a, what comes after does not depend on a_prev. As an input it would only help to
    tell the expert's rows from the policy's.
    """

    def forward(self, state, action, z, a_prev):
        return super().forward(state, action, z)


class Transitions(NamedTuple):
    """B rows and their successors; `state` is what the critic sees, s or (o, z)."""

    obs: torch.Tensor  # [B, O]
    state: torch.Tensor  # [B, S]
    z: torch.Tensor  # [B, Z]
    a_prev: torch.Tensor  # [B, A]
    action: torch.Tensor  # [B, A]
    reward: torch.Tensor  # [B]
    terminated: torch.Tensor  # [B], 0 or 1
    next_obs: torch.Tensor  # [B, O]
    next_state: torch.Tensor  # [B, S]
    next_z: torch.Tensor  # [B, Z]; a loss may differentiate with respect to it
    after: torch.Tensor  # [B], where the successors lie
    weight: torch.Tensor  # [B], sums to 1; 0 for a row that is no transition


class TransitionBuffer:
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
        state = state if self.widths[1] > 0 else torch.cat([obs, z], -1)  # s, or (o, z)
        return obs, state, z, action, *(number.squeeze(-1) for number in numbers)

    def add(self, obs, critic_obs, z, action, reward, terminated, first):
        """Write a row per environment: tensors [num_envs, .] on the device, arrays [num_envs]."""
        numbers = to_device(np.stack([reward, terminated, first], -1), self.device)
        row = torch.cat([obs, critic_obs[:, : self.widths[1]], z, action, numbers], -1)
        ring = self.rows.view(self.slots, self.num_envs, -1)
        ring.index_copy_(0, self.steps % self.slots, row.unsqueeze(0))
        self.steps += 1

    def sample(self, batch_size):
        """Transitions [batch_size], drawn uniformly with replacement."""
        # a step with a predecessor and a successor; its fraction picks the environment
        stored = self.steps.clamp(max=self.slots)
        offset = torch.rand(batch_size, dtype=torch.float64, device=self.device) * (stored - 2)
        row = ((self.steps - stored + 1 + offset) * self.num_envs).long()
        before, row, after = ((row + k * self.num_envs) % len(self.rows) for k in (-1, 0, 1))
        obs, state, z, action, reward, terminated, first = self.columns(self.rows[row])
        next_obs, next_state, next_z, *_, final = self.columns(self.rows[after].requires_grad_())
        a_prev = self.action[before] * (1 - first).unsqueeze(-1)
        weight = (1 - final) / (1 - final).sum().clamp(min=1)
        return Transitions(
            obs, state, z, a_prev, action, reward, terminated,
            next_obs, next_state, next_z, after, weight,
        )  # fmt: skip

    def refresh(self, batch, z):
        """Write `z` [B, Z] as the next internal states of the batch, never across an episode."""
        same_episode = (batch.weight > 0).unsqueeze(-1)
        self.z[batch.after] = torch.where(same_episode, z, batch.next_z.detach())


def lsiq_critic_loss(actor, critic, target_critic, batch, alpha, args):
    """The loss of both Q on a batch [2B], whose first half is the policy's and second the expert's.

    Also Q_1, Q_2 [2, 2B]. It bootstraps through time limits, as d is `terminated`.
    """
    r_max, ended = 1 / args.regularizer, batch.terminated * args.absorbing
    q_max = r_max / (1 - args.gamma)
    with torch.no_grad():
        a, z, log_pi_a, _ = actor.sample(batch.next_obs, batch.next_z, batch.action)
        next_q = target_critic(batch.next_state, a, z, batch.action).amin(0)
        next_v = (next_q - alpha * log_pi_a).clamp(-q_max, q_max)
        y = args.gamma * (1 - batch.terminated) * next_v
    q = critic(batch.state, batch.action, batch.next_z, batch.a_prev)
    expert = torch.arange(len(y), device=y.device) >= len(y) // 2
    sign = 2.0 * expert - 1
    if args.loss == "sqil_like":
        reward = r_max + (q_max - r_max) * ended  # of this step, and of all behind it
        target = sign * reward + y
        if args.expert_target == "fix":
            target = target.masked_fill(expert, q_max)
        loss = 2 * (q - target).square()  # twice the mean of both halves is the sum of their means
    else:
        reward, weight = q - y, 1 - args.gamma * ended
        loss = -2 * sign * reward + args.regularizer * weight * reward.square()
    return (batch.weight * loss).sum(), q.detach()


def soft_actor_loss(actor, critic, batch, alpha, alpha_z):
    """E[alpha log pi_a(a~) + alpha_z log pi_z(z~') - min_i Q_i(s, a~, z~', a_prev)].

    Also the sample z~' [B, Z] and the entropies of pi_a and pi_z, detached.
    """
    a, z_new, log_pi_a, log_pi_z = actor.sample(batch.obs, batch.z, batch.a_prev)
    q = critic(batch.state, a, z_new, batch.a_prev).amin(0)
    loss = (batch.weight * (alpha * log_pi_a + alpha_z * log_pi_z - q)).sum()
    entropy, entropy_z = -(batch.weight * log_pi_a).sum(), -(batch.weight * log_pi_z).sum()
    return loss, z_new.detach(), entropy.detach(), entropy_z.detach()


class S2PGLSIQ(nn.Module):
    """Networks, temperatures and optimisers, and the update that trains them."""

    def __init__(self, args, env, device):
        super().__init__()
        self.args, self.device = args, device
        space = env.single_observation_space
        obs_dim, critic_dim = (view.shape[0] for view in views(getattr(space, "spaces", space)))
        self.action_dim = action_dim = env.single_action_space.shape[0]
        privileged = getattr(env, "critic_sees_more", obs_dim != critic_dim)
        self.actor = StochasticStatefulActor(obs_dim, action_dim, args)
        self.z_dim = self.actor.z_dim
        critic_state = critic_dim if privileged else obs_dim + self.z_dim  # s, or (o, z)
        inputs = critic_state + action_dim + self.z_dim  # s, a, z'
        self.critic, self.target_critic = ImitationCritic(inputs), ImitationCritic(inputs)
        self.target_critic.requires_grad_(False).load_state_dict(self.critic.state_dict())
        self.log_alpha = nn.Parameter(torch.tensor(args.alpha).log())
        self.log_alpha_z = nn.Parameter(torch.tensor(args.alpha_z).log())
        self.to(device)

        adam = dict(fused=True, capturable=args.cudagraphs)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), args.critic_lr, **adam)
        parts = [
            dict(params=list(self.actor.parameters()), lr=args.actor_lr),
            dict(params=[self.log_alpha], lr=args.alpha_lr),
            dict(params=[self.log_alpha_z], lr=args.alpha_z_lr),
        ]
        self.actor_optimizer = torch.optim.Adam(parts, **adam)
        self.optimizers = [self.critic_optimizer, self.actor_optimizer]
        compiled = torch.compile if args.compile else lambda function: function
        self.critic_loss, self.actor_loss = compiled(lsiq_critic_loss), compiled(soft_actor_loss)
        self.act = self.actor.act
        if args.cudagraphs:
            self.act, self.update = Graphed(self.act), Graphed(self.update)
        self.row_sizes = obs_dim, critic_dim if privileged else 0, self.z_dim, action_dim

    def make_expert_buffer(self, rows):
        """`rows` of envs.demonstrations, with the internal states of the policy along them."""
        buffer = TransitionBuffer(len(rows) + 1, 1, *self.row_sizes, self.device)
        buffer.steps += 1  # of the oldest row, which is never drawn
        for *given, reward, terminated, first in rows:
            obs, state, action = (to_device(column, self.device) for column in given)
            if first:
                z, a_prev = obs.new_zeros(1, self.z_dim), torch.zeros_like(action)
            buffer.add(obs, state, z, action, 0 * reward, terminated, first)
            _, z = self.actor.act(obs, z, a_prev)
            a_prev = action
        return buffer

    def update(self, buffer, expert):
        """One gradient step of everything; returns what to log, as tensors on the device."""
        actor, critic, args = self.actor, self.critic, self.args
        batches = buffer.sample(args.batch_size), expert.sample(args.batch_size)
        batch = Transitions(*(torch.cat(columns) for columns in zip(*batches)))
        batch = batch._replace(weight=batch.weight / 2)
        alpha, alpha_z = self.log_alpha.detach().exp(), self.log_alpha_z.detach().exp()

        qf_loss, q = self.critic_loss(actor, critic, self.target_critic, batch, alpha, args)
        descend(self.critic_optimizer, qf_loss)

        pi_loss, z_new, entropy, entropy_z = self.actor_loss(actor, critic, batch, alpha, alpha_z)
        # a temperature falls while its entropy is above the target
        alpha_loss = self.log_alpha.exp() * (entropy + self.action_dim)
        alpha_z_loss = self.log_alpha_z.exp() * (entropy_z - args.target_entropy_z * self.z_dim)
        descend(self.actor_optimizer, pi_loss + alpha_loss + alpha_z_loss)

        with torch.no_grad():  # theta' <- theta' + tau (theta - theta')
            targets, online = list(self.target_critic.parameters()), list(critic.parameters())
            torch._foreach_lerp_(targets, online, args.tau)
        for part, own, z in zip((buffer, expert), batches, z_new.chunk(2)):
            part.refresh(own, z)  # drawn for the actor loss, just before the actor's step

        q_policy, q_expert = (batch.weight * q).sum(0).chunk(2)
        losses = dict(
            q_policy=q_policy.sum(), q_expert=q_expert.sum(), qf_loss=qf_loss, actor_loss=pi_loss,
            alpha=alpha, alpha_z=alpha_z, entropy=entropy, entropy_z=entropy_z,
        )  # fmt: skip
        return {f"losses/{name}": value.detach() for name, value in losses.items()}


Agent = S2PGLSIQ  # what `train` works with


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
    import envs.demonstrations

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
    buffer = TransitionBuffer(args.buffer_size, args.num_envs, *agent.row_sizes, device)
    global_step, seconds = load_checkpoint(run_dir, agent, buffer) if args.resume else (0, 0.0)
    episodes = envs.demonstrations.load(args.demonstrations, env, args.demonstration_episodes)
    expert = agent.make_expert_buffer(list(envs.demonstrations.rows(episodes)))
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
    expert_return = np.mean([episode["rewards"].sum() for episode in episodes])
    writer.add_scalar("charts/expert_return", expert_return, global_step)
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
            metrics = agent.update(buffer, expert)
        try:
            obs, _, terminated, truncated, info = env.step(a)
        except Exception:  # of the environment: what is learned outlives it
            save_checkpoint(run_dir, agent, buffer, global_step=global_step, seconds=seconds)
            raise
        buffer.add(policy_obs, critic_obs, z, action, np.zeros(args.num_envs), terminated, first)

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
