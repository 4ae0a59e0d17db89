# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.11", "gymnasium[mujoco]>=1.2", "mujoco>=3.3.5", "tyro", "tensorboard", "numpy", "tqdm"
# ]
# ///
"""BPTT-PPO: Proximal Policy Optimisation with a recurrent policy, by backpropagation through time.

The baseline of Al-Hafez, Zhao, Peters, Tateo, "Time-Efficient Reinforcement Learning with
Stochastic Stateful Policies", ICLR 2024, https://arxiv.org/abs/2311.04082. Policy and value have
deterministic memories, h_k = GRU(o_k, a_{k-1}, h_{k-1}), and are computed along sequences of at
most L rows of the rollout, each from the internal state z that was stored while acting:

    delta_t = r_t + gamma (1 - d_t) V(o_{t+1}, h_{t+1}) - V(o_t, h_t)
    A_t     = delta_t + gamma lambda A_{t+1}, up to the end of the episode or of the rollout
    rho     = pi(a | o, h) / pi_old(a | o, h)
    policy  L(pi) = -E[min(rho A, clip(rho, 1 - eps, 1 + eps) A)]
    value   L(V)  = E[(V(o, h) - (A + V_old))^2] / 2; --clip-vloss clips it, too

Sequences begin where the rollout or an episode does, and after every L rows; the gradient goes back
through the h of all their rows before. With --privileged-critic V and its memory see the state s in
place of o. Its counterpart s2pg_ppo.py needs no gradient through time: compare the two with diff.

Unlike CleanRL's PPO: ReLU and PyTorch's initialisation, advantages normalised over the rollout,
Pop-Art in place of normalised rewards, values not clipped by default, --target-kl over an epoch.

    python bptt_ppo.py --env-id InvertedPendulum-v4 --total-timesteps 200000
    python bptt_ppo.py --env-id Humanoid-v4 --sequence-length 16 --num-envs 8 --seed 1
    python bptt_ppo.py --evaluate runs/RUN --eval-episodes 20 --capture-video
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
    privileged_critic: bool = False
    """let the critic see the whole state instead of what the policy sees"""

    rnn: Literal["gru", "lstm", "rnn"] = "gru"
    """recurrent layer that gives the memory h"""
    state_dim: int = 32
    """size of the recurrent layer (the internal state of an LSTM, h and c, is twice as large)"""
    sequence_length: int = 32
    """rows L that gradients flow through at most"""
    std: float = 0.5
    """standard deviation of the action at the start, where its range is [-1, 1]"""

    learning_rate: float = 3e-4
    """learning rate of actor and critic"""
    anneal_lr: bool = True
    """let the learning rate fall to zero, linearly over the run"""
    num_steps: int = 2048
    """rows of a rollout in each environment"""
    num_minibatches: int = 32
    """minibatches of an epoch, or as many as there are sequences"""
    update_epochs: int = 10
    """epochs over a rollout"""
    gamma: float = 0.99
    """discount factor, in [0, 1)"""
    gae_lambda: float = 0.95
    """lambda of the generalised advantage estimates, in [0, 1]"""
    norm_adv: bool = True
    """normalise the advantages of a rollout"""
    clip_coef: float = 0.2
    """how far rho may leave 1; with --clip-vloss also V its old value"""
    clip_vloss: bool = False
    """clip the loss of the values, too, which lets V move by clip_coef standard deviations of the
    returns in a rollout"""
    ent_coef: float = 0.0
    """weight of the entropy of the action"""
    vf_coef: float = 0.5
    """weight of the loss of the values"""
    max_grad_norm: float = 0.5
    """norm at which the gradient is clipped"""
    target_kl: float | None = None
    """no further epoch on a rollout once the divergence from the old policy, over an epoch, is
    larger"""

    resume: str | None = None
    """folder of a run to continue, from its last update on; options given beside it replace the
    run's own, but the random state comes from the checkpoint"""
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
    """on CUDA: capture acting and the step of a minibatch as graphs, and replay each with one
    launch"""

    def limits(self):
        """The least and the largest value of each number, and what else they depend on."""
        inf = math.inf
        return dict(
            seed=(0, 2**31), total_timesteps=(1, inf), num_envs=(1, inf),
            state_dim=(1, inf),
            sequence_length=(1, inf),
            std=(1e-9, inf),
            learning_rate=(0, inf), num_steps=(2, inf), num_minibatches=(1, inf),
            update_epochs=(1, inf), gamma=(0, 1 - 1e-9), gae_lambda=(0, 1), clip_coef=(1e-9, inf),
            ent_coef=(0, inf), vf_coef=(0, inf), max_grad_norm=(1e-9, inf), target_kl=(0, inf),
            checkpoint_frequency=(1, inf), eval_frequency=(0, inf), eval_episodes=(1, inf),
            num_threads=(1, inf),
        )  # fmt: skip


# Defaults that differ by task; options on the command line come before these.
TUNED = {
    "Ant": dict(hide="velocities"),
    "HalfCheetah": dict(hide="velocities"),
    "Hopper": dict(hide="velocities", clip_coef=0.05),
    "Humanoid": dict(hide="velocities", clip_coef=0.1),
    "HumanoidStandup": dict(hide="velocities", clip_coef=0.1),
    "InvertedDoublePendulum": dict(hide="velocities"),
    "InvertedPendulum": dict(hide="velocities"),
    "Swimmer": dict(hide="velocities"),
    "Walker2d": dict(hide="velocities", clip_coef=0.05),
}


class RecurrentNetwork(nn.Module):
    """Outputs of o_k (or s_k) and of the memory h_k of a recurrent layer, which sees a_{k-1}, too.

    Shapes: o [B, O], normalised; a_prev [B, A]; h [B, H]; z, z' [B, Z]. The internal state z is h
    one step before, and (h, c) for an LSTM.
    """

    def __init__(self, obs_dim, action_dim, state_dim, rnn, outputs):
        super().__init__()
        self.rnn, self.z_dim = rnn, 2 * state_dim if rnn == "lstm" else state_dim
        self.normalizer = RunningNormalizer(obs_dim, clip=10.0)
        self.hidden_obs = nn.Linear(obs_dim, 128)
        self.memory_obs = nn.Linear(obs_dim, 128)
        self.memory_action = nn.Linear(action_dim, 128)
        layers = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}
        self.layer = layers[rnn](256, state_dim)
        self.hidden = nn.Linear(128 + state_dim, 128)
        self.head = nn.Linear(128, outputs)

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
        """[B, outputs] of single rows and their memories."""
        features = torch.cat([torch.relu_(self.hidden_obs(obs)), h], -1)
        return self.head(torch.relu_(self.hidden(features)))

    def step(self, obs, z, a_prev):
        """[B, outputs] and z' [B, Z] after one raw observation."""
        obs = self.normalizer(obs)
        h, z_next = self.remember(obs.unsqueeze(0), z, a_prev.unsqueeze(0))
        return self(obs, h.squeeze(0)), z_next


class RecurrentGaussianActor(RecurrentNetwork):
    """The policy pi(a | o, h), a diagonal Gaussian with a state-free std.

    The environment and a_prev get a clipped to [-1, 1].
    """

    def __init__(self, obs_dim, action_dim, state_dim, rnn, std):
        super().__init__(obs_dim, action_dim, state_dim, rnn, outputs=action_dim)
        self.action_dim = action_dim
        self.log_std = nn.Parameter(torch.full((action_dim,), std).log())

    def act(self, obs, z, a_prev, deterministic=False):
        """a [B, A], clipped, sampled or noise-free, and z' [B, Z], after raw `obs`."""
        a, z_next = self.step(obs, z, a_prev)
        if not deterministic:
            a = a + self.log_std.exp() * torch.randn_like(a)
        return a.clamp(-1, 1), z_next


class RecurrentCritic(RecurrentNetwork):
    """V [B, 1] of o and h, or of the state s and its own h, in units of `returns`."""

    def __init__(self, critic_dim, action_dim, state_dim, rnn):
        super().__init__(critic_dim, action_dim, state_dim, rnn, outputs=1)
        self.returns = RunningNormalizer(min_std=1e-2)


class RunningNormalizer(nn.Module):
    """(x - mean) / std of all x it was shown, in [-clip, clip]; part of every checkpoint."""

    def __init__(self, *shape, clip=math.inf, min_std=1e-4):
        super().__init__()
        self.clip, self.min_std = clip, min_std
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.tensor(0.0))

    @property
    def std(self):
        return (self.var + 1e-8).sqrt().clamp(min=self.min_std)

    def forward(self, x):
        return ((x - self.mean) / self.std).clamp(-self.clip, self.clip)

    def inverse(self, x):
        return x * self.std + self.mean

    def update(self, x):
        """Take in rows x [B, .] (Chan et al. 1979, parallel variance)."""
        n = self.count + len(x)
        delta = x.mean(0) - self.mean
        squares = self.var * self.count + x.var(0, correction=0) * len(x)
        self.var.copy_((squares + delta.square() * self.count * len(x) / n) / n)
        self.mean += delta * len(x) / n
        self.count.copy_(n)


@torch.no_grad()
def update_returns(normalizer, head, returns):
    """Take in `returns` [B], and rescale the layer that predicts them so that no V changes.

    Pop-Art: van Hasselt et al., "Learning values across many orders of magnitude", 2016, eq. 4.
    """
    mean, std = normalizer.mean.clone(), normalizer.std
    normalizer.update(returns)
    head.weight *= std / normalizer.std
    head.bias.copy_((std * head.bias + mean - normalizer.mean) / normalizer.std)


class Rollout:
    """Up to num_steps rows [time, env] of a vector environment (autoreset next step), and one more.

    An episode of T transitions fills T + 1 rows; the last holds the final observation, and its
    action is ignored. Row t + 1 completes row t: it holds the next observation and internal state.
    So a row is a transition unless its successor is the `first` of an episode. The row after the
    last has no action yet; it is the first of the next rollout as well.
    """

    def __init__(self, num_steps, num_envs, obs_dim, critic_dim, z_dim, action_dim, device):
        def rows(*shape, dtype=torch.float32, device=device):
            return torch.zeros(num_steps + 1, num_envs, *shape, dtype=dtype, device=device)

        self.obs, self.critic_obs = rows(obs_dim), rows(critic_dim)
        self.z, self.a_prev = rows(z_dim), rows(action_dim)
        self.action = rows(action_dim)  # the sample, before it is clipped
        self.log_prob, self.value = rows(), rows()
        # rewards and ends of episodes go to the device once a rollout, and not row by row
        self.reward = rows(device="cpu")
        self.terminated, self.first = (rows(dtype=torch.bool, device="cpu") for _ in range(2))
        self.length, self.device = 0, device

    def add(self, **row):
        """Write the next row, or a part of it: arrays or tensors [num_envs, ...] by their names."""
        for name, value in row.items():
            getattr(self, name)[self.length] = torch.as_tensor(value)
        self.length += 1

    def clear(self):
        """Begin a new rollout; returns the finished one as a dict of tensors [T + 1, N, ...]."""
        length, self.length = self.length, 0
        rows = {k: v[:length] for k, v in vars(self).items() if torch.is_tensor(v)}
        return {name: to_device(value, self.device) for name, value in rows.items()}


def gaussian_log_prob(x, mean, log_std):
    """log N(x; mean, diag(std^2)) [B], for x [B, D]."""
    standardized = (x - mean) * (-log_std).exp()
    return -0.5 * standardized.square().sum(-1) - (log_std + 0.5 * math.log(2 * math.pi)).sum()


def gaussian_entropy(log_std):
    """Entropy of a diagonal Gaussian, in nats."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()


def gae(reward, value, terminated, valid, gamma, gae_lambda):
    """Generalised advantage estimates [T, N] (Schulman et al. 2016, eq. 16); 0 where not `valid`.

    `value` has one row more, [T + 1, N]. Time limits are bootstrapped through, as only `terminated`
    cuts delta. The sum ends with the episode, as its final row is not a `valid` transition.
    """
    delta = valid * (reward + gamma * ~terminated * value[1:] - value[:-1])
    decay = gamma * gae_lambda * valid
    advantage = torch.zeros_like(value)
    for t in reversed(range(len(delta))):
        torch.addcmul(delta[t], decay[t], advantage[t + 1], out=advantage[t])
    return advantage[:-1]


def clipped_policy_loss(log_prob, old_log_prob, advantage, clip_coef):
    """-min(rho A, clip(rho, 1 - eps, 1 + eps) A) [B] (Schulman et al. 2017, eq. 7); log rho [B].

    ValueError unless all three are [B]: [B, 1] and [B] would be multiplied to [B, B], without a
    word.
    """
    if log_prob.ndim != 1 or not log_prob.shape == old_log_prob.shape == advantage.shape:
        shapes = [tuple(x.shape) for x in (log_prob, old_log_prob, advantage)]
        raise ValueError(f"log_prob, old_log_prob and advantage must be [B], and are {shapes}")
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.min(ratio * advantage, clipped * advantage), log_ratio.detach()


def value_loss(value, old_value, returns, clip_coef):
    """(V - R)^2 / 2 [B]; with a `clip_coef`, of V or V clipped near its old value, the worse."""
    error = (value - returns).square()
    if clip_coef is not None:
        clipped = old_value + (value - old_value).clamp(-clip_coef, clip_coef)
        error = torch.max(error, (clipped - returns).square())
    return 0.5 * error


class RolloutSequences(NamedTuple):
    """B sequences of L rows of a rollout; where they end sooner, the rest is not `inside`."""

    obs: torch.Tensor  # [L, B, O], normalised
    state: torch.Tensor  # [L, B, S], what the critic sees, normalised
    z: torch.Tensor  # [L, B, Z actor + Z critic], of which the first row is used
    a_prev: torch.Tensor  # [L, B, A]
    action: torch.Tensor  # [L, B, A]
    old_log_prob: torch.Tensor  # [L, B]
    old_value: torch.Tensor  # [L, B], normalised like the returns
    advantage: torch.Tensor  # [L, B]
    returns: torch.Tensor  # [L, B], normalised
    inside: torch.Tensor  # [L, B]: is it a transition of its sequence?


def cut(first, length):
    """Cut the rows `first` [T + 1, N] of a rollout into sequences of at most `length` transitions.

    They begin where the rollout or an episode does, and after every `length` rows. Returns the
    times [L, B] and environments [B] of their rows, and a mask [L, B] of those that belong to them.
    """
    valid, time = ~first[1:], torch.arange(len(first) - 1, device=first.device).unsqueeze(-1)
    begin = (time * first[:-1]).cummax(0).values  # the row where the episode, or the rollout, began
    age = time - begin
    start, env = ((age % length == 0) & valid).nonzero().unbind(-1)
    length = min(length, int(age.max()) + 1)
    t = start + torch.arange(length, device=first.device).unsqueeze(-1)
    inside, t = t < len(valid), t.clamp(max=len(valid) - 1)
    return t, env, inside & valid[t, env] & (begin[t, env] == begin[start, env])


def ppo_loss(log_prob, value, entropy, batch, args, mean=torch.mean):
    """L(pi) + vf_coef L(V) - ent_coef entropy; its parts, for the log; and log rho [B].

    `mean` is that of a loss [B] over the transitions.
    """
    pg_loss, log_ratio = clipped_policy_loss(
        log_prob, batch.old_log_prob, batch.advantage, args.clip_coef
    )
    clip_value = args.clip_coef if args.clip_vloss else None
    v_loss = value_loss(value, batch.old_value, batch.returns, clip_value)
    pg_loss, v_loss = mean(pg_loss), mean(v_loss)
    loss = pg_loss + args.vf_coef * v_loss - args.ent_coef * entropy
    return loss, dict(policy_loss=pg_loss, value_loss=v_loss, entropy=entropy), log_ratio


def bptt_ppo_loss(actor, critic, batch, args):
    """The loss of the transitions of sequences, whose memories are computed from their first z."""
    z_actor, z_critic = batch.z[0].split([actor.z_dim, critic.z_dim], -1)
    h, _ = actor.remember(batch.obs, z_actor, batch.a_prev)
    log_prob = gaussian_log_prob(batch.action, actor(batch.obs, h), actor.log_std)
    # rho = 1 outside: it could be infinite there, and infinity times a weight of 0 is NaN
    log_prob = torch.where(batch.inside, log_prob, batch.old_log_prob).flatten()
    h, _ = critic.remember(batch.state, z_critic, batch.a_prev)
    value = critic(batch.state, h).flatten()
    entropy = gaussian_entropy(actor.log_std)
    batch = RolloutSequences(*(x.flatten(0, 1) for x in batch))
    weight = batch.inside.to(value.dtype) / batch.inside.sum()
    return ppo_loss(log_prob, value, entropy, batch, args, mean=weight.dot)


class BPTTPPO:
    """Networks and optimiser, and the update that trains them.

    `privileged` makes no difference: a rollout is short enough to hold what both see twice.
    """

    def __init__(self, args, obs_dim, critic_dim, action_dim, privileged, device):
        self.args, self.device, self.action_dim = args, device, action_dim
        self.actor = RecurrentGaussianActor(
            obs_dim, action_dim, args.state_dim, args.rnn, args.std
        ).to(device)
        self.critic = RecurrentCritic(critic_dim, action_dim, args.state_dim, args.rnn).to(device)
        self.z_dim = self.actor.z_dim + self.critic.z_dim  # both have a memory
        self.parameters = [*self.actor.parameters(), *self.critic.parameters()]
        self.lr = torch.tensor(args.learning_rate, device=device)  # for a graph to read
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=self.lr, eps=1e-5, fused=True, capturable=args.cudagraphs
        )
        self.loss = torch.compile(bptt_ppo_loss) if args.compile else bptt_ppo_loss
        if args.cudagraphs:
            self.act, self.learn = Graphed(self.act), Graphed(self.learn)
        self.static = None  # rows and sequences, in memory that a graph can read again and again
        self.row_sizes = obs_dim, critic_dim, self.z_dim, action_dim

    def make_rollout(self):
        args = self.args
        return Rollout(args.num_steps, args.num_envs, *self.row_sizes, self.device)

    @torch.no_grad()
    def act(self, obs, critic_obs, z, a_prev):
        """A sample a [N, A] with its log-density [N], z' [N, Z], and the value [N]."""
        z_actor, z_critic = z.split([self.actor.z_dim, self.critic.z_dim], -1)
        mean, z_actor = self.actor.step(obs, z_actor, a_prev)
        a = mean + self.actor.log_std.exp() * torch.randn_like(mean)
        log_prob = gaussian_log_prob(a, mean, self.actor.log_std)
        value, z_critic = self.critic.step(critic_obs, z_critic, a_prev)
        z_next = torch.cat([z_actor, z_critic], -1)
        return a, z_next, log_prob, self.critic.returns.inverse(value.squeeze(-1))

    def update(self, rollout):
        """Epochs over a rollout; returns what to log, as tensors on the device."""
        args, rows = self.args, rollout.clear()
        valid, value = ~rows["first"][1:], rows["value"][:-1]
        advantage = gae(
            rows["reward"][:-1], rows["value"], rows["terminated"][:-1], valid,
            args.gamma, args.gae_lambda,
        )  # fmt: skip
        returns = advantage + value
        update_returns(self.critic.returns, self.critic.head, returns[valid])
        if args.norm_adv:
            std, mean = torch.std_mean(advantage[valid], correction=0)
            advantage = (advantage - mean) / (std + 1e-8)
        obs = self.actor.normalizer(rows["obs"][:-1])
        state = self.critic.normalizer(rows["critic_obs"][:-1])
        columns = (
            obs, state, rows["z"][:-1], rows["a_prev"][:-1], rows["action"][:-1],
            rows["log_prob"][:-1], self.critic.returns(value), advantage,
            self.critic.returns(returns),
        )  # fmt: skip
        t, env, inside = cut(rows["first"], args.sequence_length)
        place = t * args.num_envs + env  # in the columns, time by time

        n, most = value.numel(), args.num_steps * args.num_envs
        if self.static is None:
            static = [column.new_zeros(most, *column.shape[2:]) for column in columns]
            longest = min(args.sequence_length, args.num_steps)
            shape = longest, math.ceil(most / args.num_minibatches)
            self.static = place.new_zeros(shape), inside.new_zeros(shape), static
        for static, column in zip(self.static[2], columns):
            static[:n] = column.flatten(0, 1)

        length, sequences = place.shape
        for _ in range(args.update_epochs):
            order, log_ratios = torch.randperm(sequences, device=self.device), []
            for index in order.tensor_split(min(args.num_minibatches, sequences)):
                size = len(index)
                self.static[0][:length, :size] = place[:, index]
                self.static[1][:length, :size] = inside[:, index]
                losses, log_ratio = self.learn(length, size)
                log_ratios.append(log_ratio.view(length, size).clone())
            log_ratio = torch.cat(log_ratios, 1)[inside[:, order]]
            ratio = log_ratio.exp()
            approx_kl = (ratio - 1 - log_ratio).mean()
            if args.target_kl is not None and approx_kl > args.target_kl:
                break

        # the next rollout acts with new statistics, so that within one the policy is one policy
        self.actor.normalizer.update(rows["obs"][:-1].flatten(0, 1))
        self.critic.normalizer.update(rows["critic_obs"][:-1].flatten(0, 1))
        unexplained = (returns - value)[valid].var(correction=0)
        losses = losses | dict(
            old_approx_kl=-log_ratio.mean(), approx_kl=approx_kl,
            clipfrac=((ratio - 1).abs() > args.clip_coef).float().mean(),
            explained_variance=1 - unexplained / (returns[valid].var(correction=0) + 1e-8),
        )  # fmt: skip
        return {f"losses/{name}": value.detach() for name, value in losses.items()}

    def learn(self, length, size):
        """A gradient step on `size` sequences; returns losses and log rho [length * size]."""
        place, inside, columns = self.static
        place, inside = place[:length, :size], inside[:length, :size]
        minibatch = RolloutSequences(*(column[place] for column in columns), inside)
        loss, losses, log_ratio = self.loss(self.actor, self.critic, minibatch, self.args)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.args.max_grad_norm)
        self.optimizer.step()
        return {name: value.detach() for name, value in losses.items()}, log_ratio


Agent = BPTTPPO  # what `train` and `replay` work with


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
    rollout = agent.make_rollout()
    global_step, seconds = 0, 0.0
    if args.resume:
        state = load_checkpoint(run_dir, agent)
        global_step, seconds = state["global_step"], state["seconds"]
        if global_step >= args.total_timesteps:
            raise ValueError(f"{run_dir} has done {global_step} steps; raise --total-timesteps")
        torch.set_rng_state(state["rng"])
        if device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], device)
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
    start_time = time.time() - seconds
    rollout_step, rollout_seconds = global_step, seconds  # of the last update
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
            action, z_next, log_prob, value = agent.act(policy_obs, critic_obs, z, a_prev)
            clipped = action.clamp(-1, 1)
            a = clipped.cpu().numpy()
            if not np.isfinite(a).all():
                check_finite(metrics | {"the action": action})  # raises; losses may be the cause
            next_obs, reward, terminated, truncated, info = env.step(a)
            rollout.add(
                obs=policy_obs, critic_obs=critic_obs, z=z, a_prev=a_prev, action=action,
                log_prob=log_prob, value=value, reward=reward, terminated=terminated, first=first,
            )  # fmt: skip

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
            torch.mul(clipped, keep, out=a_prev)
            see(next_obs)
            first, final = final, terminated | truncated

            finished, stopped = global_step >= args.total_timesteps, bool(stop_signals)
            if rollout.length == args.num_steps or finished:
                *_, value = agent.act(policy_obs, critic_obs, z, a_prev)
                rollout.add(z=z, value=value, first=first)
                lr = args.learning_rate
                if args.anneal_lr:
                    lr *= 1 - rollout_step / args.total_timesteps
                agent.lr.fill_(lr)
                metrics, rollout_step = agent.update(rollout), global_step
                rollout_seconds = time.time() - start_time
                check_finite(metrics)
                for name, value in metrics.items():
                    writer.add_scalar(name, value, global_step)
                writer.add_scalar("charts/learning_rate", lr, global_step)
                sps = global_step / (time.time() - start_time)
                writer.add_scalar("charts/SPS", sps, global_step)
            if finished or passed(args.eval_frequency, last_step, global_step):
                seconds = time.time() - start_time
                writer.add_scalar("charts/seconds", seconds, global_step)
                result = log_returns(writer, agent.actor, eval_env, args, global_step)
                start_time = time.time() - seconds
            save = finished or passed(args.checkpoint_frequency, last_step, global_step)
            if save or stopped:
                # what came after the last update is lost, and is to be played again
                state = dict(
                    global_step=rollout_step, seconds=rollout_seconds, rng=torch.get_rng_state()
                )
                if device.type == "cuda":
                    state["cuda_rng"] = torch.cuda.get_rng_state(device)
                check_finite(metrics)
                save_checkpoint(run_dir, agent, state)
            if finished or stopped:
                break
    env.close()
    eval_env.close()
    if not finished:
        print(f"stopped at step {rollout_step}; go on with --resume {run_dir}")
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
