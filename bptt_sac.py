# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.11", "gymnasium[mujoco]>=1.2", "mujoco>=3.3.5", "tyro", "tensorboard", "numpy", "tqdm"
# ]
# ///
"""BPTT-SAC: Soft Actor-Critic with a recurrent policy, trained by backpropagation through time.

The baseline of Al-Hafez, Zhao, Peters, Tateo, "Time-Efficient Reinforcement Learning with
Stochastic Stateful Policies", ICLR 2024, https://arxiv.org/abs/2311.04082. The policy sees o, the
critic the state s. The policy's memory is deterministic, h_k = GRU(o_k, a_{k-1}, h_{k-1}), and is
computed along sequences of L rows of the replay buffer, from a stored internal state z:

    target   y = r + gamma (1 - d) [min_i Q'_i(s', a'', a) - alpha log pi(a'' | o', h')]
    critic   L(Q)  = sum_i E[(Q_i(s, a, a_prev) - y)^2]
    actor    L(pi) = E[alpha log pi(a~ | o, h) - min_i Q_i(s, a~, a_prev)]

where a'' and a~ are fresh, reparameterised samples of the policy. The expectations are over the
last row of each sequence, as published, or over all of them; the gradient of the actor's loss goes
back through the h of all rows before. Without a privileged critic, h is one more input of Q. Its
counterpart s2pg_sac.py needs no gradient through time: compare the two with diff.

    python bptt_sac.py --env-id InvertedPendulum-v4 --total-timesteps 20000
    python bptt_sac.py --env-id Humanoid-v4 --sequence-length 64 --burn-in 16 --seed 1
    python bptt_sac.py --evaluate runs/RUN --eval-episodes 20 --capture-video
"""

import collections
import dataclasses
import functools
import importlib.util
import json
import math
import os
import pickle
import re
import signal
import sys
import time
import warnings
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs


@dataclasses.dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """name of this experiment"""
    seed: int = 1
    """seed of the networks, the noise and the environments, >= 0"""
    torch_deterministic: bool = True
    """sets `torch.backends.cudnn.deterministic`"""
    cuda: bool = True
    """use a CUDA card where there is one"""
    track: bool = False
    """log to Weights and Biases as well"""
    wandb_project_name: str = "s2pg"
    """project of Weights and Biases"""
    wandb_entity: str | None = None
    """entity (team) of Weights and Biases"""
    capture_video: bool = False
    """record videos of the first environment into the run's `videos` folder"""

    env_id: str = "InvertedPendulum-v4"
    """a Gymnasium MuJoCo id, a memory task of `envs`, or your own as `module:Id-v0`"""
    env_kwargs: dict[str, int | float | bool | str] = dataclasses.field(default_factory=dict)
    """arguments of the environment, as `--env-kwargs name value name value`"""
    total_timesteps: int = 1_000_000
    """environment steps of the whole run, counted over all environments"""
    num_envs: int = 1
    """environments stepped together, >= 1"""
    hide: Literal["none", "velocities", "positions"] = "none"
    """what a MuJoCo observation hides from the policy; `TUNED` in this file has velocities"""
    random_bodies: bool = False
    """draw masses and geom sizes anew each episode; only a privileged critic is told"""
    wind: bool = False
    """push the torso with a constant force of random sign, and reward running that way; only a
    privileged critic is told"""
    privileged_critic: bool = True
    """let the critic see the whole state; otherwise, or if the environment has no more to show, it
    sees what the policy sees, and h"""

    rnn: Literal["gru", "lstm", "rnn"] = "gru"
    """recurrent layer that gives the memory h"""
    state_dim: int = 32
    """size of the recurrent layer (the internal state of an LSTM, h and c, is twice as large)"""
    chrono: int = 0
    """longest time scale, in steps, that the gates of the recurrent layer begin with (chrono
    initialisation); 0 for PyTorch's initialisation, which forgets within a few"""
    critic_sees_h: bool = False
    """give h to a privileged critic too"""
    sequence_length: int = 32
    """rows L that gradients flow through; with 1 there is none through time"""
    loss_on: Literal["last", "all", "all-uniform"] = "all"
    """rows of a sequence with a loss: "last" takes batch_size sequences (as published), "all" takes
    batch_size / sequence_length, so that neither sees more than batch_size transitions (unless a
    single sequence has more); "all" counts the rows of a batch alike, and so transitions of short
    episodes less, "all-uniform" counts every transition the same, as "last" and S2PG do"""
    burn_in: int = 0
    """rows before the sequence that only warm up its initial state; where the episode has fewer,
    the sequence begins with the initial state as it is"""
    initial_state: Literal["stored", "zero"] = "stored"
    """internal state before the first row, or before the burn-in: that of acting, or zeros"""

    buffer_size: int = 1_000_000
    """rows of the replay buffer, over all environments"""
    gamma: float = 0.99
    """discount factor, in [0, 1)"""
    tau: float = 0.005
    """share of the critic that flows into its target each update, in (0, 1]"""
    batch_size: int = 256
    """transitions in an update"""
    learning_starts: int = 5_000
    """transitions collected, by uniformly random actions, before the first update"""
    utd: float = 1.0
    """updates per environment step"""
    actor_lr: float = 3e-4
    """learning rate of the actor"""
    critic_lr: float = 1e-3
    """learning rate of the critic"""
    alpha: float = 1.0
    """temperature of the action at the start"""
    alpha_lr: float = 1e-3
    """learning rate of log alpha (its target entropy is -|A|); 0 keeps alpha as it is"""

    resume: str | None = None
    """folder of a run to continue; options given beside it replace the run's own, but temperatures
    and random states come from the checkpoint"""
    save_buffer: bool = False
    """keep the replay buffer in the checkpoint; otherwise a resumed run fills a new one first"""
    checkpoint_frequency: int = 10_000
    """environment steps between two checkpoints"""
    eval_frequency: int = 10_000
    """environment steps between two evaluations; 0 for none but the last"""
    eval_episodes: int = 5
    """episodes of an evaluation, deterministic and stochastic each"""
    evaluate: str | None = None
    """folder of a run to replay instead of training"""
    save_demonstrations: str | None = None
    """with --evaluate: write the deterministic episodes to this .npz file"""
    stochastic_demonstrations: bool = False
    """write the stochastic episodes instead: an expert with the noise that it was trained with"""
    num_threads: int = 1
    """CPU threads of torch; more than one rarely pays for networks of this size"""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """precision of float32 matrix products: "medium" allows bfloat16 and, on a CPU, other kernels,
    which may be faster (SAC) or slower (PPO)"""
    compile: bool = False
    """on CUDA: torch.compile the losses"""
    cudagraphs: bool = False
    """on CUDA: capture acting and an update as graphs, and replay each with one launch"""

    def limits(self):
        """The least and the largest value of each number, and what else they depend on."""
        inf = math.inf
        return dict(
            seed=(0, 2**31), total_timesteps=(1, inf), num_envs=(1, inf),
            state_dim=(1, inf), chrono=(0, inf),
            sequence_length=(1, inf), burn_in=(0, inf),
            buffer_size=(6 * self.num_envs, inf), gamma=(0, 1 - 1e-9), tau=(1e-9, 1),
            batch_size=(1, inf),
            # episodes of a single step fill two rows, one of them a transition
            learning_starts=(1, self.buffer_size // 2 - 2 * self.num_envs, "buffer_size"),
            utd=(0, 1e6), actor_lr=(0, inf), critic_lr=(0, inf),
            alpha=(1e-9, inf), alpha_lr=(0, inf),
            checkpoint_frequency=(1, inf), eval_frequency=(0, inf), eval_episodes=(1, inf),
            num_threads=(1, inf),
        )  # fmt: skip


# Defaults that differ by task; options on the command line come before these.
TUNED = {
    "Ant": dict(hide="velocities", critic_lr=1e-4),
    "CueRecall": dict(learning_starts=1_000),
    "HalfCheetah": dict(hide="velocities"),
    "Hopper": dict(hide="velocities"),
    "Humanoid": dict(hide="velocities", critic_lr=1e-4),
    "HumanoidStandup": dict(hide="velocities", critic_lr=1e-4),
    "InvertedDoublePendulum": dict(hide="velocities", learning_starts=1_000),
    "InvertedPendulum": dict(hide="velocities", learning_starts=1_000),
    "Swimmer": dict(hide="velocities"),
    "Walker2d": dict(hide="velocities", critic_lr=3e-4),
}
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0


class RecurrentActor(nn.Module):
    """The policy pi(a | o, h), a squashed diagonal Gaussian, with a deterministic memory h.

    Shapes: o [B, O]; z, z' [B, Z]; h [B, H] in (-1, 1); a, a_prev [B, A] in (-1, 1). The internal
    state z is h one step before, and (h, c) for an LSTM.
    """

    def __init__(self, obs_dim, action_dim, state_dim, rnn, chrono=0):
        super().__init__()
        self.action_dim, self.rnn = action_dim, rnn
        self.z_dim = 2 * state_dim if rnn == "lstm" else state_dim
        self.policy_obs = nn.Linear(obs_dim, 256)
        self.memory_obs = nn.Linear(obs_dim, 128)
        self.memory_action = nn.Linear(action_dim, 128)
        layers = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}
        self.layer = layers[rnn](256, state_dim)
        if chrono:
            chrono_init(self.layer, chrono)
        self.policy_hidden = nn.Linear(256 + state_dim, 256)
        self.policy_head = nn.Linear(256, 2 * action_dim)

    def remember(self, obs, z, a_prev):
        """h [T, B, H] and the last z' [B, Z] of rows `obs`, `a_prev` [T, B, .] that follow z."""
        e = torch.relu_(torch.cat([self.memory_obs(obs), self.memory_action(a_prev)], -1))
        if self.rnn == "lstm":
            h, c = z.unsqueeze(0).chunk(2, -1)
            outputs, state = self.layer(e, (h.contiguous(), c.contiguous()))
            return outputs, torch.cat(state, -1).squeeze(0)
        outputs, h = self.layer(e, z.unsqueeze(0).contiguous())  # as cuDNN asks for
        return outputs, h.squeeze(0)

    def forward(self, obs, h):
        """Mean and log std of a before the tanh, both [B, A]."""
        h = torch.cat([torch.relu_(self.policy_obs(obs)), h], -1)
        mean, log_std = self.policy_head(torch.relu_(self.policy_hidden(h))).chunk(2, -1)
        return mean, bounded_log_std(log_std)

    def sample(self, obs, h):
        """Reparameterised a [B, A], with log pi [B]."""
        action, log_prob = squashed_gaussian(*self(obs, h))
        return action, log_prob.sum(-1)

    def act(self, obs, z, a_prev, deterministic=False):
        """a [B, A], sampled or noise-free, and z' [B, Z]."""
        h, z_next = self.remember(obs.unsqueeze(0), z, a_prev.unsqueeze(0))
        mean, log_std = self(obs, h.squeeze(0))
        action = torch.tanh(mean) if deterministic else squashed_gaussian(mean, log_std)[0]
        return action, z_next


def chrono_init(cell, steps):
    """Let the gates of a GRU or an LSTM, a cell or a layer, begin with time scales up to `steps`.

    Tallec and Ollivier, "Can recurrent neural networks warp time?", ICLR 2018: the gate that keeps
    has the bias log U(1, steps - 1), and the one that writes, if it is another, minus that.
    ValueError for less than 3 steps, and for a cell without gates.
    """
    n, (bias_ih, bias_hh) = cell.hidden_size, [p for p in cell.parameters() if p.dim() == 1]
    if steps < 3 or len(bias_ih) == n:
        raise ValueError("--chrono takes 3 steps or more, and --rnn gru or lstm, which have gates")
    keep = torch.empty(n).uniform_(1, steps - 1).log()
    with torch.no_grad():
        bias_ih[n : 2 * n], bias_hh[n : 2 * n] = keep, 0  # z of a GRU, f of an LSTM
        if len(bias_ih) == 4 * n:
            bias_ih[:n], bias_hh[:n] = -keep, 0


def bounded_log_std(x, largest=LOG_STD_MAX):
    """Map the reals into (LOG_STD_MIN, largest), and 0 to the middle."""
    return LOG_STD_MIN + 0.5 * (largest - LOG_STD_MIN) * (torch.tanh(x) + 1)


def squashed_gaussian(mean, log_std):
    """x = tanh(u), u ~ N(mean, std^2), and log p(x) of each dimension; both shaped like `mean`."""
    noise = torch.randn_like(mean)
    u = mean + noise * log_std.exp()
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    # log(1 - tanh(u)^2), in the form that does not underflow for large |u|
    return torch.tanh(u), log_prob - 2 * (math.log(2) - u - F.softplus(-2 * u))


class BatchedLinear(nn.Module):
    """`n` linear layers at once, [n, B, inputs] -> [n, B, outputs], initialised like nn.Linear."""

    def __init__(self, n, inputs, outputs):
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(n, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n, 1, outputs).uniform_(-bound, bound))

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)


class TwinCritic(nn.Module):
    """Q_1 and Q_2 [2, B] of the concatenated inputs [B, .], two networks in one batched module."""

    def __init__(self, inputs):
        super().__init__()
        layers = BatchedLinear(2, inputs, 256), BatchedLinear(2, 256, 256), BatchedLinear(2, 256, 1)
        relu = nn.ReLU(inplace=True)
        self.net = nn.Sequential(layers[0], relu, layers[1], relu, layers[2])

    def forward(self, *inputs):
        return self.net(torch.cat(inputs, -1).expand(2, -1, -1)).squeeze(-1)


class RowBuffer:
    """A ring of rows [time, env], one for each step of a vector environment (autoreset next step).

    An episode of T transitions fills T + 1 rows; the last holds the final observation, and its
    action is ignored. Row t + 1 completes row t: it holds the next observation and internal
    state, row t - 1 the previous action. So nothing is stored twice. A row is a transition, and
    can be sampled, once its successor is written, unless the successor is the `first` of an
    episode: such a row is a final one, or the last before a run was interrupted.

    Row t of environment n lies at index t * num_envs + n of `rows`, in one piece, of which obs, z
    and so on are columns. `transitions` is a queue of the indices that can be sampled, in order of
    time. The four counters are kept on the device too, so that sampling never waits for the host.
    """

    def __init__(self, size, num_envs, obs_dim, critic_dim, z_dim, action_dim, device):
        self.num_envs, self.slots, self.device = num_envs, size // num_envs, device
        self.head = self.size = 0  # where the queue begins, how many it holds
        self.cursor = self.written = 0  # the slot [num_envs rows] to write next, slots written
        self.links = np.zeros(self.slots, dtype=np.int64)  # transitions in each slot
        self.critic_sees_more = critic_dim is not None
        self.widths = [obs_dim, critic_dim or 0, z_dim, action_dim, 1, 1, 1]
        self.rows = torch.zeros(self.slots * num_envs, sum(self.widths), device=device)
        self.obs, self.critic_obs, self.z, self.action, *numbers = self.columns(self.rows)
        self.reward, self.terminated, self.first = numbers  # the last two are 0 or 1
        self.transitions = torch.zeros(len(self.rows), dtype=torch.int64, device=device)
        self.counters = torch.zeros(4, dtype=torch.int64, device=device)

    def columns(self, rows):
        """Views of whole rows [B, .]: o, s, z, a [B, .], r, terminated and first [B]."""
        obs, critic_obs, z, action, *numbers = rows.split(self.widths, -1)
        critic_obs = critic_obs if self.critic_sees_more else obs
        return obs, critic_obs, z, action, *(number.squeeze(-1) for number in numbers)

    def add(self, obs, critic_obs, z, action, reward, terminated, first):
        """Write a row per environment: tensors [num_envs, .] on the device, arrays [num_envs]."""
        n = self.num_envs
        numbers = np.stack([reward, terminated, first], -1).astype(np.float32)
        parts = [obs, critic_obs, z, action, to_device(numbers, self.device)]
        if not self.critic_sees_more:
            del parts[1]
        torch.cat(parts, -1, out=self.rows[self.cursor * n : (self.cursor + 1) * n])

        # the rows before these have become transitions wherever the episode goes on
        previous, continued = (self.cursor - 1) % self.slots, np.flatnonzero(~first)
        tail = (self.head + self.size + np.arange(len(continued))) % len(self.transitions)
        self.links[previous] = len(continued)
        self.size += len(continued)

        # the oldest slot leaves one step before it is overwritten: its a_prev is gone already
        self.cursor = (self.cursor + 1) % self.slots
        self.written = min(self.written + 1, self.slots)
        leaving, self.links[self.cursor] = int(self.links[self.cursor]), 0
        self.head = (self.head + leaving) % len(self.transitions)
        self.size -= leaving
        counters = [self.head, self.size, self.cursor, self.written]
        queue = np.concatenate([tail, previous * n + continued, counters])
        tail, index, counters = to_device(queue, self.device).split([len(tail), len(tail), 4])
        self.transitions[tail] = index
        self.counters.copy_(counters)

    def draw(self, batch_size):
        """Indices [batch_size] of transitions, uniformly with replacement."""
        head, size = self.counters[0], self.counters[1]
        offset = torch.rand(batch_size, dtype=torch.float64, device=self.device) * size
        return self.transitions[(head + offset.long()) % len(self.transitions)]

    def next(self, index):
        """Indices of the rows one step later in the same environments."""
        return (index + self.num_envs) % len(self.transitions)

    def a_prev(self, index):
        """Actions one step before the rows `index`; zeros at the start of an episode."""
        before = index - self.num_envs  # a negative index counts from the end of the ring
        return self.action[before] * (1 - self.first[index].unsqueeze(-1))

    def state_dict(self):
        """Copies of the rows written so far, the counters and the links."""
        n = self.written * self.num_envs
        return dict(
            rows=self.rows[:n].clone(), transitions=self.transitions[:n].clone(),
            counters=self.counters.clone(), links=torch.tensor(self.links),
        )  # fmt: skip

    def load_state_dict(self, state):
        """Take over a saved buffer, or its columns, as earlier versions saved them.

        ValueError if it has other slots or environments.
        """
        head, size, cursor, written = state["counters"].tolist()
        slots, rows = len(state["links"]), len(state["transitions"])
        if slots != self.slots or rows != written * self.num_envs:
            raise ValueError("the saved buffer has another --buffer-size or --num-envs")
        self.head, self.size, self.cursor, self.written = head, size, cursor, written
        for name, value in state.items():
            if name == "links":
                self.links[:] = value.numpy()
            else:
                getattr(self, name)[: len(value)] = value


class Sequences(NamedTuple):
    """B sequences of L + 1 rows, and the N transitions among them that have a loss."""

    all_obs: torch.Tensor  # [L + 1, B, O]
    all_a_prev: torch.Tensor  # [L + 1, B, A]
    z: torch.Tensor  # [B, Z], before the first row
    burn_in: tuple | None  # obs, z and a_prev of the rows before, and which sequences have them
    row: torch.Tensor  # [N], place of the transitions in their sequences
    column: torch.Tensor  # [N], their sequences
    weight: torch.Tensor  # [N], sums to 1; 0 where a sequence outlasts its episode
    obs: torch.Tensor  # [N, O]
    state: torch.Tensor  # [N, S] or [N, S + H], what the critic sees
    a_prev: torch.Tensor  # [N, A]
    action: torch.Tensor  # [N, A]
    reward: torch.Tensor  # [N]
    terminated: torch.Tensor  # [N], bool
    next_obs: torch.Tensor  # [N, O]
    next_state: torch.Tensor  # [N, S] or [N, S + H]


class SequenceBuffer(RowBuffer):
    def sample(self, batch_size, length, loss_on, burn_in, initial_state):
        """Sequences around transitions that are drawn uniformly.

        Such a transition comes last where only the last has a loss, and anywhere otherwise: always
        last, it would leave the ends of episodes to very few sequences. With "all" the rows of a
        batch weigh the same; transitions of short episodes, of which fewer sequences are drawn,
        count less. With "all-uniform" the sequences weigh the same, whatever the episode leaves of
        them, and every transition counts the same.
        """
        n, cursor, written = self.num_envs, self.counters[2], self.counters[3]
        t = self.draw(batch_size if loss_on == "last" else max(1, batch_size // length))
        steps = torch.arange(length + burn_in + 1, device=self.device).unsqueeze(-1)

        # how many rows the episode has before t, of those asked for and still in the ring
        age = (cursor - 1 - t // n) % self.slots
        first = self.first[(t - steps[:-2] * n) % len(self.first)]
        same = (first.cumsum(0) == 0) & (steps[1:-1] < written.clamp(max=self.slots - 1) - age)
        available = same.sum(0)
        limit = length - 1 if loss_on == "last" else torch.randint_like(t, length)
        depth = available.clamp(max=limit)
        start = (t - depth * n) % len(self.first)
        rows = (start + steps[: length + 1] * n) % len(self.first)

        column = torch.arange(len(t), device=self.device)
        if loss_on == "last":
            row, weight = depth, torch.full_like(depth, 1 / len(t), dtype=torch.float32)
        else:
            # up to the end of the episode, or to the newest row
            valid = (self.first[rows[1:]].cumsum(0) == 0) & (steps[:length] - depth < age)
            if loss_on == "all-uniform":  # a start that the episode lacks shortens it, too
                valid &= steps[:length] < length - (limit - depth)
            row = steps[:length].expand_as(valid).flatten()
            column = column.expand_as(valid).flatten()
            weight = valid / (valid.sum(0) * len(t) if loss_on == "all-uniform" else valid.sum())
            weight = weight.flatten()
        at, after = rows[row, column], rows[row + 1, column]
        obs, state, _, action, reward, terminated, _ = self.columns(self.rows.index_select(0, at))
        next_obs, next_state, *_ = self.columns(self.rows.index_select(0, after))

        z_scale, warm = float(initial_state == "stored"), None
        if burn_in > 0:
            before = (start + (steps[:burn_in] - burn_in) * n) % len(self.first)
            has_them = (available - depth >= burn_in).unsqueeze(-1)
            warm = self.obs[before], z_scale * self.z[before[0]], self.a_prev(before), has_them
        return Sequences(
            self.obs[rows], self.a_prev(rows), z_scale * self.z[start], warm, row, column, weight,
            obs, state, self.a_prev(at), action, reward, terminated.bool(), next_obs, next_state,
        )  # fmt: skip


def bptt_critic_loss(actor, critic, target_critic, batch, next_h, alpha, gamma):
    """sum_i E[(Q_i(s, a, a_prev) - y)^2]; also Q_1, Q_2 [2, N].

    y = r + gamma (1 - d) [min_i Q'_i(s', a'', a) - alpha log pi(a'' | o', h')]. It bootstraps
    through time limits, as d is `terminated`; the action just taken is the next a_prev.
    """
    with torch.no_grad():
        a, log_pi = actor.sample(batch.next_obs, next_h)
        next_q = target_critic(batch.next_state, a, batch.action).amin(0)
        next_v = next_q - alpha * log_pi
        target = batch.reward + gamma * ~batch.terminated * next_v
    q = critic(batch.state, batch.action, batch.a_prev)
    return (batch.weight * (q - target).square()).sum(), q.detach()


def bptt_actor_loss(actor, critic, batch, h, alpha):
    """E[alpha log pi(a~ | o, h) - min_i Q_i(s, a~, a_prev)]; also the entropy of pi, detached."""
    a, log_pi = actor.sample(batch.obs, h)
    q = critic(batch.state, a, batch.a_prev).amin(0)
    loss = (batch.weight * (alpha * log_pi - q)).sum()
    return loss, -(batch.weight * log_pi).sum().detach()


def temperature_loss(log_alpha, entropy, target_entropy):
    """alpha (entropy - target_entropy): alpha falls while the entropy is above its target."""
    return log_alpha.exp() * (entropy - target_entropy)


class BPTTSAC:
    """Networks, temperature and optimisers, and the update that trains them."""

    def __init__(self, args, obs_dim, critic_dim, action_dim, privileged, device):
        self.args, self.device, self.action_dim = args, device, action_dim
        # a critic that is told no more than the policy gets h, in case that o is not Markov
        self.critic_sees_h = args.critic_sees_h or not privileged
        actor = RecurrentActor(obs_dim, action_dim, args.state_dim, args.rnn, args.chrono)
        self.actor, self.z_dim = actor.to(device), actor.z_dim
        inputs = critic_dim + args.state_dim * self.critic_sees_h + action_dim + action_dim
        self.critic = TwinCritic(inputs).to(device)
        self.target_critic = TwinCritic(inputs).to(device).requires_grad_(False)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.log_alpha = torch.tensor(math.log(args.alpha), device=device, requires_grad=True)

        adam = functools.partial(torch.optim.Adam, fused=True, capturable=args.cudagraphs)
        self.critic_optimizer = adam(self.critic.parameters(), lr=args.critic_lr)
        parts = [
            dict(params=list(self.actor.parameters()), lr=args.actor_lr),
            dict(params=[self.log_alpha], lr=args.alpha_lr),
        ]
        self.actor_optimizer = adam(parts)
        compiled = torch.compile if args.compile else lambda function: function
        self.critic_loss, self.actor_loss = compiled(bptt_critic_loss), compiled(bptt_actor_loss)
        if args.cudagraphs:
            self.act, self.update = Graphed(self.act), Graphed(self.update)
        # where the critic sees what the policy sees, one copy of it will do
        self.row_sizes = obs_dim, critic_dim if privileged else None, self.z_dim, action_dim

    def make_buffer(self):
        args = self.args
        return SequenceBuffer(args.buffer_size, args.num_envs, *self.row_sizes, self.device)

    def remember(self, batch):
        """h and h' [N, H] at the transitions of the batch and one row later."""
        z = batch.z
        if batch.burn_in is not None:
            *rows, has_them = batch.burn_in
            with torch.no_grad():
                z = torch.where(has_them, self.actor.remember(*rows)[1], z)
        h, _ = self.actor.remember(batch.all_obs, z, batch.all_a_prev)
        return h[batch.row, batch.column], h[batch.row + 1, batch.column].detach()

    @torch.no_grad()
    def act(self, obs, z, a_prev):
        """a [N, A] and z' [N, Z], with the noise of training."""
        return self.actor.act(obs, z, a_prev)

    def update(self, buffer):
        """One gradient step of everything; returns what to log, as tensors on the device."""
        args = self.args
        alpha = self.log_alpha.detach().exp()
        batch = buffer.sample(
            args.batch_size, args.sequence_length, args.loss_on, args.burn_in, args.initial_state
        )
        # the critic's step leaves the actor as it is, so both losses share one pass through time
        h, next_h = self.remember(batch)
        if self.critic_sees_h:
            batch = batch._replace(
                state=torch.cat([batch.state, h.detach()], -1),
                next_state=torch.cat([batch.next_state, next_h], -1),
            )

        qf_loss, q = self.critic_loss(
            self.actor, self.critic, self.target_critic, batch, next_h, alpha, args.gamma
        )
        descend(self.critic_optimizer, qf_loss)

        pi_loss, entropy = self.actor_loss(self.actor, self.critic, batch, h, alpha)
        alpha_loss = temperature_loss(self.log_alpha, entropy, -self.action_dim)
        # the two share no parameter, so one step is a step of each
        descend(self.actor_optimizer, pi_loss + alpha_loss)

        with torch.no_grad():  # theta' <- theta' + tau (theta - theta')
            torch._foreach_lerp_(
                list(self.target_critic.parameters()), list(self.critic.parameters()), args.tau
            )

        losses = dict(
            qf1_values=(batch.weight * q[0]).sum(), qf2_values=(batch.weight * q[1]).sum(),
            qf_loss=qf_loss, actor_loss=pi_loss, alpha=alpha, alpha_loss=alpha_loss,
            entropy=entropy,
        )  # fmt: skip
        return {f"losses/{name}": value.detach() for name, value in losses.items()}


Agent = BPTTSAC  # what `train` and `replay` work with


class Graphed:
    """`function`, captured as a CUDA graph in its fourth call and replayed from then on.

    All its kernels then take one launch. A replay repeats the kernels and not the Python, so what
    changes between two calls must lie in tensors that are written in place; and it overwrites
    what the call before returned. There is one graph for each combination of arguments, of which
    tensors have to be the same objects.
    """

    def __init__(self, function):
        self.function, self.calls, self.graphs = function, collections.Counter(), {}

    def __call__(self, *args):
        self.calls[args] += 1
        if self.calls[args] <= 3:  # on a side stream, as the capture: they create what it reuses
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), warnings.catch_warnings():
                # of an optimiser that is made for a graph and not in one yet
                warnings.filterwarnings("ignore", message=".*capturable=True")
                result = self.function(*args)
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if args not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = self.function(*args)
            self.graphs[args] = graph, result
        graph, result = self.graphs[args]
        graph.replay()
        return result


def to_device(array, device):
    """A host array as a tensor; to a CUDA card through page-locked memory, without waiting."""
    tensor = torch.as_tensor(array)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def descend(optimizer, loss):
    """One step of `optimizer`; gradients are computed for its own parameters only."""
    optimizer.zero_grad()
    loss.backward(inputs=[p for group in optimizer.param_groups for p in group["params"]])
    optimizer.step()


def make_env(args, num_envs, video_folder=None):
    """A vector environment: observations `Dict(policy, critic)`, actions in [-1, 1].

    Register an environment of your own and name it in --env-id, or put it in the place of
    `envs.make`: it then has that Dict itself, and an attribute `critic_sees_more`.
    """

    def make_one(index):
        film = video_folder is not None and index == 0
        env = envs.make(
            args.env_id, hide=args.hide, random_bodies=args.random_bodies, wind=args.wind,
            privileged_critic=args.privileged_critic, render_mode="rgb_array" if film else None,
            **args.env_kwargs,
        )  # fmt: skip
        if film:
            try:
                env.reset(seed=args.seed)
                env.render()
                env = gym.wrappers.RecordVideo(env, video_folder, disable_logger=True)
            except Exception as error:  # graphics drivers raise what they like
                raise ValueError(
                    f"cannot record video: {error!r} (without a screen, MUJOCO_GL=egl may help)"
                ) from error
        env = gym.wrappers.RecordEpisodeStatistics(env)
        return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))

    makers = [functools.partial(make_one, index) for index in range(num_envs)]
    return gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP)


def dimensions(env):
    """Sizes of the policy's observation, the critic's and the action; does the critic see more?"""
    space = env.single_observation_space
    sizes = space["policy"].shape[0], space["critic"].shape[0], env.single_action_space.shape[0]
    return *sizes, env.get_attr("critic_sees_more")[0]


def env_seed(args, step, evaluation=False):
    """The seed of the first environment from `step` on; the others have the next ones.

    Runs of other seeds, and evaluation, are given other episodes.
    """
    sequence = np.random.SeedSequence([args.seed, evaluation, step])
    return int(sequence.generate_state(1)[0] >> 1)  # an int32, as some environments want it


def evaluate(actor, env, episodes, deterministic, seed):
    """Play `episodes` episodes, an equal share in each environment; returns a list of them.

    An episode of T steps is a dict of arrays: `observations` (the policy's) and
    `critic_observations` [T + 1, .], `actions` [T, A] in the environment's own units, `rewards`,
    `terminations` and `truncations` [T], and `successes` [T] where the environment reports an
    `info["success"]`. The random numbers of training go on as if never used.
    """
    device, n = next(actor.parameters()).device, env.num_envs
    space = env.get_attr("unwrapped")[0].action_space
    shares = [len(range(i, episodes, n)) for i in range(n)]
    rows, played = [[] for _ in range(n)], [[] for _ in range(n)]
    names = ["actions", "rewards", "terminations", "truncations"]
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        obs, _ = env.reset(seed=seed)
        z = torch.zeros(n, actor.z_dim, device=device)
        a_prev = torch.zeros(n, actor.action_dim, device=device)
        final = np.zeros(n, dtype=bool)  # rows that hold the last observation of an episode
        while any(len(p) < share for p, share in zip(played, shares)):
            policy_obs = to_device(obs["policy"], device)
            action, z = actor.act(policy_obs, z, a_prev, deterministic)
            a = action.cpu().numpy()
            next_obs, reward, terminated, truncated, info = env.step(a)
            a = space.low + 0.5 * (a + 1) * (space.high - space.low)
            success = info.get("success", np.zeros(n, dtype=bool))
            columns = obs["policy"], obs["critic"], a, reward, terminated, truncated, success
            if "success" in info and "successes" not in names:
                names.append("successes")
            for i, row in enumerate(zip(*columns)):
                rows[i].append(row)
                if len(rows[i]) > 100_000:
                    raise ValueError("no end of an episode in 100 000 steps; set max_episode_steps")
                if final[i]:
                    played[i].append([np.array(column) for column in zip(*rows[i])])
                    rows[i] = []
            keep = to_device(~final, device).unsqueeze(-1)
            z, a_prev = z * keep, action * keep
            obs, final = next_obs, terminated | truncated
    return [
        dict(observations=o, critic_observations=s) | {k: v[:-1] for k, v in zip(names, rest)}
        for p, share in zip(played, shares)
        for o, s, *rest in p[:share]
    ]


def log_returns(writer, actor, env, args, step):
    """Evaluate the actor, log its mean returns, and return them by mode."""
    result = {}
    for mode in ("deterministic", "stochastic"):
        deterministic, seed = mode == "deterministic", env_seed(args, step, evaluation=True)
        episodes = evaluate(actor, env, args.eval_episodes, deterministic, seed)
        result[mode] = np.mean([episode["rewards"].sum() for episode in episodes])
        writer.add_scalar(f"eval/return_{mode}", result[mode], step)
        if "successes" in episodes[0]:
            successes = [episode["successes"].any() for episode in episodes]
            writer.add_scalar(f"eval/success_{mode}", np.mean(successes), step)
    return result


def check_finite(tensors):
    """FloatingPointError that names the first of `tensors` (a dict) with a NaN or an infinity."""
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise FloatingPointError(f"{name} is not finite")


def save_checkpoint(run_dir, agent, state):
    """Write RUN/checkpoint.pt whole or not at all, so that a kill leaves the last good one."""
    for network in (agent.actor, agent.critic):
        check_finite(network.state_dict())
    path = os.path.join(run_dir, "checkpoint.pt")
    parts = {k: v.state_dict() for k, v in vars(agent).items() if hasattr(v, "state_dict")}
    tensors = {k: v.detach() for k, v in vars(agent).items() if torch.is_tensor(v)}
    agent_state = dict(algorithm=type(agent).__name__, parts=parts, tensors=tensors)
    torch.save(agent_state | state, path + ".tmp")
    os.replace(path + ".tmp", path)


def load_checkpoint(run_dir, agent):
    """Load RUN/checkpoint.pt into `agent`; returns all of it. ValueError where it does not fit."""
    path = os.path.join(run_dir, "checkpoint.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{run_dir} holds no checkpoint.pt") from None
    except (RuntimeError, EOFError, LookupError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged, or no checkpoint") from error
    if not isinstance(state, dict) or state.get("algorithm") != type(agent).__name__:
        raise ValueError(f"{path} is no checkpoint of {type(agent).__name__}")
    try:
        for name, saved in state["parts"].items():
            part = getattr(agent, name)
            before = getattr(part, "param_groups", [])
            part.load_state_dict(saved)
            for group, own in zip(getattr(part, "param_groups", []), before):
                # the options, or the device, may want another
                group |= dict(lr=own["lr"], capturable=own["capturable"])
        for name, tensor in state["tensors"].items():
            getattr(agent, name).data.copy_(tensor)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} holds networks of other sizes than these options") from error
    return state


def passed(every, last_step, step):
    """Whether a multiple of `every` lies in (last_step, step]; never if `every` is 0."""
    return every > 0 and step // every > last_step // every


def choose_device(args):
    """CUDA if there is a card and `args` allow it; without one, what is for CUDA alone is off."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and (args.compile or args.cudagraphs):
        args.compile = args.cudagraphs = False
        print("--compile and --cudagraphs are off, as no CUDA card is used")
    return device


def train(args):
    asked_for = vars(args) | dict(resume=None)
    device = choose_device(args)
    torch.manual_seed(args.seed)
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time():.3f}"
    run_dir = os.path.normpath(args.resume or "runs/" + re.sub(r"[^\w.-]", "_", name))

    videos = f"{run_dir}/videos/training-{time.time():.0f}" if args.capture_video else None
    env = make_env(args, args.num_envs, videos)
    eval_env = make_env(args, min(args.eval_episodes, 8))
    sizes = dimensions(env)
    agent = Agent(args, *sizes, device)
    buffer = agent.make_buffer()
    global_step, seconds = 0, 0.0
    if args.resume:
        state = load_checkpoint(run_dir, agent)
        global_step, seconds = state["global_step"], state["seconds"]
        if global_step >= args.total_timesteps:
            raise ValueError(f"{run_dir} has done {global_step} steps; raise --total-timesteps")
        torch.set_rng_state(state["rng"])
        if device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], device)
        if "buffer" in state:
            buffer.load_state_dict(state["buffer"])
    os.makedirs(run_dir, exist_ok=True)
    args_path = os.path.join(run_dir, "args.json")
    with open(args_path + ".tmp", "w") as file:
        json.dump(asked_for, file, indent=2)
    os.replace(args_path + ".tmp", args_path)
    if args.track:
        import wandb

        wandb.init(
            project=args.wandb_project_name, entity=args.wandb_entity, config=vars(args),
            name=os.path.basename(run_dir), id=os.path.basename(run_dir)[-64:], resume="allow",
            sync_tensorboard=True, save_code=True,
        )  # fmt: skip

    def stop(signum, frame):
        stop_signals.append(signum)
        signal.signal(signum, signal.SIG_DFL)  # the second one does not wait

    stop_signals = []
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    # as if the run had never stopped: `seconds` are those of training, without evaluations
    start_time, updates_due = time.time() - seconds, 0.0
    returns, metrics, result = collections.deque(maxlen=10), {}, {}
    # what the agent acts on is written in place, where a graph reads it
    both_obs = torch.zeros(args.num_envs, sum(sizes[:2]), device=device)
    policy_obs, critic_obs = both_obs.split(sizes[:2], -1)

    def see(obs):
        both_obs.copy_(to_device(np.concatenate([obs["policy"], obs["critic"]], -1), device))

    see(env.reset(seed=env_seed(args, global_step))[0])  # a resumed run: new episodes
    z = torch.zeros(args.num_envs, agent.z_dim, device=device)
    a_prev = torch.zeros(args.num_envs, agent.action_dim, device=device)
    first = np.ones(args.num_envs, dtype=bool)  # rows that begin an episode
    final = np.zeros(args.num_envs, dtype=bool)  # rows that hold its last observation
    writer = SummaryWriter(run_dir, purge_step=global_step + 1 if args.resume else None)
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", dynamic_ncols=True)
    with writer, bar:
        writer.add_text("hyperparameters", f"```\n{json.dumps(vars(args), indent=2)}\n```")
        while True:
            action, z_next = agent.act(policy_obs, z, a_prev)
            if global_step < args.learning_starts:
                action = 2 * torch.rand_like(action) - 1
            a = action.cpu().numpy()
            if not np.isfinite(a).all():
                check_finite(metrics | {"the action": action})  # raises; losses may be the cause
            while updates_due >= 1:  # a CUDA card works on them while the environment steps
                metrics = agent.update(buffer)
                updates_due -= 1
            next_obs, reward, terminated, truncated, info = env.step(a)
            buffer.add(policy_obs, critic_obs, z, action, reward, terminated, first)

            # a final row is no step: the environment ignores its action and begins anew ...
            last_step, env_step = global_step, global_step + np.cumsum(~final)
            global_step = int(env_step[-1])
            bar.update(global_step - last_step)
            for i in np.flatnonzero(info.get("_episode", [])):
                returns.append(info["episode"]["r"][i])
                writer.add_scalar("charts/episodic_return", info["episode"]["r"][i], env_step[i])
                writer.add_scalar("charts/episodic_length", info["episode"]["l"][i], env_step[i])
                bar.set_postfix_str(f"return {np.mean(returns):.1f}", refresh=False)
            # ... and so does the memory
            keep = to_device(~final, device).unsqueeze(-1)
            torch.mul(z_next, keep, out=z)
            torch.mul(action, keep, out=a_prev)
            see(next_obs)
            first, final = final, terminated | truncated

            if buffer.size >= args.learning_starts:
                updates_due += args.utd * (global_step - last_step)

            finished, stopped = global_step >= args.total_timesteps, bool(stop_signals)
            if passed(100, last_step, global_step):
                check_finite(metrics)
                for name, value in metrics.items():
                    writer.add_scalar(name, value, global_step)
                sps = global_step / (time.time() - start_time)
                writer.add_scalar("charts/SPS", sps, global_step)
            if finished or passed(args.eval_frequency, last_step, global_step):
                seconds = time.time() - start_time
                writer.add_scalar("charts/seconds", seconds, global_step)
                result = log_returns(writer, agent.actor, eval_env, args, global_step)
                start_time = time.time() - seconds
            save = finished or passed(args.checkpoint_frequency, last_step, global_step)
            if save or stopped:
                seconds = time.time() - start_time
                state = dict(global_step=global_step, seconds=seconds, rng=torch.get_rng_state())
                if device.type == "cuda":
                    state["cuda_rng"] = torch.cuda.get_rng_state(device)
                if args.save_buffer:
                    state["buffer"] = buffer.state_dict()
                check_finite(metrics)
                save_checkpoint(run_dir, agent, state)
            if finished or stopped:
                break
    env.close()
    eval_env.close()
    if not finished:
        print(f"stopped at step {global_step}; go on with --resume {run_dir}")
        sys.exit(128 + stop_signals[0])
    result = ", ".join(f"{mode} {mean:.1f}" for mode, mean in result.items())
    print(f"{run_dir}: return at step {global_step}: {result}")


def replay(args):
    """Evaluate a trained policy: print its returns, record videos and demonstrations."""
    device = choose_device(args)
    for mode in ("deterministic", "stochastic"):
        deterministic = mode == "deterministic"
        videos = f"{args.evaluate}/videos/evaluation-{time.time():.0f}"
        film = args.capture_video and deterministic
        env = make_env(args, min(args.eval_episodes, 8), videos if film else None)
        agent = Agent(args, *dimensions(env), device)
        load_checkpoint(args.evaluate, agent)
        seed = env_seed(args, 0, evaluation=True)
        episodes = evaluate(agent.actor, env, args.eval_episodes, deterministic, seed)
        env.close()
        returns = [episode["rewards"].sum() for episode in episodes]
        length = np.mean([len(episode["rewards"]) for episode in episodes])
        success = ""
        if "successes" in episodes[0]:
            rate = np.mean([episode["successes"].any() for episode in episodes])
            success = f", success {rate:.0%}"
        print(
            f"{mode}: return {np.mean(returns):.1f} +- {np.std(returns):.1f}, length {length:.0f}, "
            f"{len(episodes)} episodes{success}"
        )
        if args.save_demonstrations and deterministic != args.stochastic_demonstrations:
            arrays = {k: np.concatenate([episode[k] for episode in episodes]) for k in episodes[0]}
            made_by = json.dumps(vars(args) | dict(returns=returns))
            with open(args.save_demonstrations + ".tmp", "wb") as file:
                np.savez_compressed(file, **arrays, env_id=args.env_id, made_by=made_by)
            os.replace(args.save_demonstrations + ".tmp", args.save_demonstrations)


def parse_args():
    """The command line, over the options of the run or what the task wants, over the defaults."""
    asked = [option for option in sys.argv[1:] if option not in ("-h", "--help")]
    args = tyro.cli(Args, args=asked, description=__doc__)
    run_dir = args.resume or args.evaluate
    defaults = Args(**TUNED.get(args.env_id.split("-")[0], {}))
    if run_dir is not None:
        path = os.path.join(run_dir, "args.json")
        try:
            with open(path) as file:
                defaults = Args(**json.load(file))
                defaults.limits()  # TypeError for what is no number
                defaults.capture_video &= args.evaluate is None
        except FileNotFoundError:
            raise ValueError(f"{run_dir} is no run: it holds no args.json") from None
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path} is damaged, or another script's ({error})") from None
    # of a dict that is not empty tyro makes options of their own, one for each key
    env_kwargs, defaults.env_kwargs = defaults.env_kwargs, {}
    args = tyro.cli(Args, description=__doc__, default=defaults)
    args.env_kwargs = args.env_kwargs or env_kwargs
    return args


def check_args(args):
    """ValueError for an option that is out of range, or makes no sense beside another."""
    for name, (low, high, *others) in args.limits().items():
        value = getattr(args, name)
        if value is not None and not (isinstance(value, int | float) and low <= value <= high):
            option = "--" + name.replace("_", "-")
            given = "".join(f" with --{n.replace('_', '-')} {getattr(args, n)}" for n in others)
            raise ValueError(f"{option} is {value}; it must be in [{low}, {high}]{given}")
    if args.resume and args.evaluate:
        raise ValueError("--resume and --evaluate exclude each other")
    if args.track and not args.evaluate and importlib.util.find_spec("wandb") is None:
        raise ValueError("--track needs Weights and Biases: pip install wandb")
    own = {"env_id", "hide", "random_bodies", "wind", "privileged_critic", "render_mode"}
    for name in sorted(own & args.env_kwargs.keys()):
        raise ValueError(f"--env-kwargs is for what the environment takes, and not for {name}")
    path = args.save_demonstrations
    if path and not (args.evaluate and path.endswith(".npz")):
        raise ValueError("--save-demonstrations takes a FILE.npz, and --evaluate RUN beside it")
    if path and not os.path.isdir(os.path.dirname(path) or "."):
        raise ValueError(f"--save-demonstrations {path}: there is no such folder")
    if args.stochastic_demonstrations and not path:
        raise ValueError("--stochastic-demonstrations needs --save-demonstrations FILE.npz")


def main():
    """Bad input, unusable files and losses that blow up end in one sentence and exit status 1.

    With `python -X dev` they end in a traceback.
    """
    try:
        args = parse_args()
        check_args(args)
        torch.set_num_threads(args.num_threads)
        torch.set_float32_matmul_precision(args.matmul_precision)
        torch.backends.cudnn.allow_tf32 = args.matmul_precision != "highest"
        torch.backends.cudnn.deterministic = args.torch_deterministic
        replay(args) if args.evaluate else train(args)
    except (ValueError, FloatingPointError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        sys.exit(f"{os.path.basename(__file__)}: {error}")


if __name__ == "__main__":
    main()
