"""S2PG-GAIL: generative adversarial imitation with a stochastic stateful policy.

Ho, Ermon, "Generative Adversarial Imitation Learning", 2016, with the policy of S2PG-PPO. A
discriminator D learns to tell the expert's (s, a) from the policy's, and the policy learns from its
reward. The policy sees o and has an internal state z, which D never sees:

    discriminator  L(D) = E_expert[-log D] + E_policy[-log(1 - D)] - c H(D), over (s, a)
    reward         r    = -log(1 - D + 1e-8), or with --reward airl log D - log(1 - D)
    termination    r   += gamma r_abs / (1 - gamma), r_abs the reward in the absorbing state
    policy, value  as in s2pg_ppo.py

-log(1 - D) is never negative, so a policy would avoid termination. A terminated episode therefore
stays in an absorbing state for ever, judged with the weight of 1 / (1 - gamma) steps (Kostrikov et
al., ICLR 2019, arXiv 1809.02925). c is --discriminator-entropy. The task's reward is only logged.

    python s2pg_gail.py --env-id InvertedPendulum-v4 --total-timesteps 100000
    python s2pg_gail.py --env-id Hopper-v4 --demonstrations expert.npz --bc-steps 2000
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
    privileged_critic: bool = True  # critic and discriminator see the whole state
    num_envs: int = 1  # environments stepped together
    total_timesteps: int = 1_000_000  # environment steps, over all environments

    demonstrations: str | None = None  # [algorithm] FILE.npz, minari:NAME, or shipped:stochastic
    demonstration_episodes: int | None = None  # how many to imitate, from the first; None: all
    bc_steps: int = 0  # gradient steps of behaviour cloning, before everything else
    reward: Literal["gail", "airl"] = "gail"  # -log(1 - D + 1e-8), or log D - log(1 - D)
    absorbing: bool = True  # a terminated episode goes on in an absorbing state
    discriminator_lr: float = 3e-4  # learning rate of the discriminator, constant
    discriminator_steps: int = 3  # its gradient steps a rollout (published: 1 every 3rd rollout)
    discriminator_entropy: float = 1e-3  # weight c of its entropy

    num_steps: int = 2048  # rows of a rollout in each environment
    num_minibatches: int = 32  # gradient steps in an epoch
    update_epochs: int = 10  # epochs over a rollout
    learning_rate: float = 3e-4  # of actor and critic
    anneal_lr: bool = True  # the learning rate falls to zero, linearly over the run
    gamma: float = 0.99  # discount, in [0, 1)
    gae_lambda: float = 0.95  # lambda of the generalised advantage estimates, in [0, 1]
    norm_adv: bool = True  # normalise the advantages of a rollout
    clip_coef: float = 0.2  # eps: rho is clipped to 1 - eps and 1 + eps
    separate_ratios: bool = False  # clip the ratios of a and of z', not that of both
    ent_coef: float = 0.0  # weight of the entropy of (a, z')
    vf_coef: float = 0.5  # weight of the loss of V
    max_grad_norm: float = 0.5  # norm at which the gradient is clipped
    target_kl: float = math.inf  # no further epoch after one with a larger approx_kl

    rnn: Literal["gru", "lstm", "rnn"] = "gru"  # [networks] recurrent cell
    state_dim: int = 32  # size of the cell; an LSTM's z = (h, c) is twice as large
    std: float = 0.5  # initial std of a, before a is clipped to [-1, 1]
    std_z: float = 0.1  # that of z'; with less noise rho leaves 1 sooner
    memoryless: bool = False  # no internal state: plain GAIL, where V still gets a_prev

    seed: int = 1  # [run] of the networks, the noise and the environments
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    resume: str | None = None  # folder of a run to go on with, and with its options
    checkpoint_frequency: int = 10_000  # steps between checkpoints; an evaluation writes one, too
    eval_frequency: int = 10_000  # steps between evaluations; 0 for none
    eval_episodes: int = 5  # stochastic ones, and as many noise-free; 0 for none
    track: bool = False  # log to Weights and Biases, too: $WANDB_PROJECT
    cuda: bool = True  # [hardware] use a CUDA card where there is one
    num_threads: int = 1  # CPU threads of torch; for small networks one is enough
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # of float32 products
    compile: bool = False  # on CUDA: torch.compile the loss
    cudagraphs: bool = False  # on CUDA: replay acting and gradient steps as graphs

    def __post_init__(self):
        self.env_kwargs = list(dict(self.env_kwargs).items())  # pairs, also after JSON
        rows, inf = self.num_steps * self.num_envs, math.inf
        for name, (low, high) in dict(
            seed=(0, 1e18), num_envs=(1, inf), num_steps=(2, inf), num_minibatches=(1, rows),
            update_epochs=(1, inf), learning_rate=(0, inf), gamma=(0, 1 - 1e-9), gae_lambda=(0, 1),
            clip_coef=(1e-9, inf), ent_coef=(0, inf), vf_coef=(0, inf), max_grad_norm=(1e-9, inf),
            target_kl=(0, inf), state_dim=(1, inf), std=(1e-9, 99), std_z=(1e-9, 99),
            bc_steps=(0, inf), discriminator_lr=(0, inf), discriminator_steps=(1, inf),
            discriminator_entropy=(0, inf), num_threads=(1, inf),
            checkpoint_frequency=(1, inf), eval_frequency=(0, inf), eval_episodes=(0, inf),
        ).items():  # fmt: skip
            if not low <= getattr(self, name) <= high:
                sys.exit(f"--{name.replace('_', '-')} must be in [{low}, {high}]")


TUNED = {  # defaults that differ by task; options on the command line override these
    name: dict(hide="velocities", learning_rate=3e-4 if "Pendulum" in name else 1e-4)
    for name in (
        "Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "InvertedDoublePendulum",
        "InvertedPendulum", "Swimmer", "Walker2d",
    )
}  # fmt: skip


class GaussianStatefulActor(nn.Module):
    """The joint policy pi(a, z' | o, z, a_prev), a diagonal Gaussian whose std is a parameter.

    A recurrent cell gives the mean of z', from which the policy reads the mean of a. It reads the
    mean and not the sample z', so a and z' are conditionally independent.

    Shapes: o [B, O], normalised; z, z' [B, Z]; a, a_prev [B, A], where the environment and a_prev
    get a clipped to [-1, 1]. For an LSTM z = (h, c).
    """

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.rnn, self.action_dim = args.rnn, action_dim
        self.state_dim = 0 if args.memoryless else args.state_dim
        self.z_dim = 2 * self.state_dim if args.rnn == "lstm" else self.state_dim
        sizes = [action_dim, self.z_dim]
        self.parts = sizes if args.separate_ratios and self.z_dim > 0 else [sum(sizes)]
        self.normalizer = RunningNormalizer(obs_dim, clip=10.0)
        self.policy_obs = nn.Linear(obs_dim, 128)
        if self.state_dim > 0:
            self.kernel_obs = nn.Linear(obs_dim, 128)
            self.kernel_action = nn.Linear(action_dim, 128)
            self.cell = getattr(nn, f"{args.rnn.upper()}Cell")(256, self.state_dim)
        self.policy_hidden = nn.Linear(128 + self.state_dim, 128)
        self.policy_head = nn.Linear(128, action_dim)
        std = torch.tensor([args.std] * action_dim + [args.std_z] * self.z_dim)
        self.log_std = nn.Parameter(std.log())

    def forward(self, obs, z, a_prev):
        """Mean of (a, z') [B, A + Z]; that of z' is the internal state after `obs`, noise-free."""
        if self.state_dim > 0:
            e = torch.relu_(torch.cat([self.kernel_obs(obs), self.kernel_action(a_prev)], -1))
            z = self.cell(e, z.chunk(2, -1) if self.rnn == "lstm" else z)
            z = torch.cat(z, -1) if self.rnn == "lstm" else z
        features = torch.cat([torch.relu_(self.policy_obs(obs)), z[..., : self.state_dim]], -1)
        return torch.cat([self.policy_head(torch.relu_(self.policy_hidden(features))), z], -1)

    @torch.no_grad()
    def act(self, obs, z, a_prev, deterministic=False):
        """a [B, A], clipped, and z' [B, Z] after raw `obs`, both sampled or both noise-free."""
        sample = self(self.normalizer(obs), z, a_prev)
        if not deterministic:
            sample = sample + self.log_std.exp() * torch.randn_like(sample)
        a, z = sample.split([self.action_dim, self.z_dim], -1)
        return a.clamp(-1, 1), z


class Critic(nn.Module):
    """V [B], normalised by `returns`, of o or s, normalised, of z and of a_prev."""

    def __init__(self, critic_dim, z_dim, action_dim):
        super().__init__()
        self.normalizer = RunningNormalizer(critic_dim, clip=10.0)
        self.returns = RunningNormalizer(min_std=1e-2)
        inputs, relu = critic_dim + z_dim + action_dim, nn.ReLU(inplace=True)
        self.hidden = nn.Sequential(nn.Linear(inputs, 128), relu, nn.Linear(128, 128), relu)
        self.head = nn.Linear(128, 1)

    def forward(self, state, z, a_prev):
        return self.head(self.hidden(torch.cat([state, z, a_prev], -1))).squeeze(-1)


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

    def update(self, x, weight):
        """Take in rows x [..., .], which count as `weight` [...] says (Chan et al. 1979)."""
        mean, var = moments(x, weight)
        delta, share = mean - self.mean, weight.sum() / (self.count + weight.sum())
        self.mean += share * delta
        self.var.lerp_(var, share).add_(share * (1 - share) * delta.square())
        self.count += weight.sum()


def moments(x, weight):
    """Mean and variance of rows x [..., .], which count as `weight` [...] says."""
    x, weight = x.flatten(0, weight.dim() - 1), weight.flatten() / weight.sum()
    mean = weight @ x
    return mean, weight @ (x - mean).square()


def update_returns(normalizer, head, returns, weight):
    """Take in `returns`, and rescale the layer that predicts them so that no V changes.

    Pop-Art: van Hasselt et al., "Learning values across many orders of magnitude", 2016, eq. 4.
    """
    mean, std = normalizer.mean.clone(), normalizer.std
    normalizer.update(returns, weight)
    head.weight *= std / normalizer.std
    head.bias.copy_((std * head.bias + mean - normalizer.mean) / normalizer.std)


class Rollout:
    """num_steps rows of each environment (autoreset next step), and one more that completes them.

    An episode of T transitions fills T + 1 rows; the last holds the final observation, its action
    is ignored. A row before the `first` of an episode has weight 0. In `sample` a is not clipped.
    """

    def __init__(self, num_steps, num_envs, widths, device):
        self.device, self.length = device, 0
        self.rows = torch.zeros(num_steps + 1, num_envs, sum(widths) + 4, device=device)
        columns = self.rows.split([*widths, 4], -1)  # views [T + 1, N, .]
        self.obs, self.state, self.z, self.a_prev, self.sample, self.log_prob, numbers = columns
        self.value, self.reward, self.terminated, self.first = numbers.unbind(-1)

    def add(self, obs, state, z, a_prev, sample, log_prob, value, reward, terminated, first):
        """Write a row per environment: tensors [N, .], `value` [N], and three arrays [N]."""
        given = to_device(np.stack([reward, terminated, first], -1), self.device)
        numbers = torch.cat([log_prob, value.unsqueeze(-1), given], -1)
        self.rows[self.length] = torch.cat([obs, state, z, a_prev, sample, numbers], -1)
        self.length += 1

    def finish(self, value, first):
        """V and `first` of the row after the last, with which the next rollout begins."""
        self.value[-1], self.first[-1] = value, to_device(first, self.device)
        self.length = 0


def demonstrated(episodes, widths, device):
    """Episodes of an expert, side by side, as a rollout; rows beyond their ends are `first`."""
    longest = max(len(episode["actions"]) for episode in episodes)
    rollout = Rollout(longest, len(episodes), widths, device)
    for i, episode in enumerate(episodes):
        column = {name: torch.tensor(array) for name, array in episode.items()}
        n, action = len(column["actions"]), column["actions"]
        rollout.obs[: n + 1, i] = column["observations"]
        rollout.state[: n + 1, i] = column["critic_observations"]
        rollout.a_prev[1 : n + 1, i], rollout.sample[:n, i, : action.shape[1]] = action, action
        rollout.terminated[:n, i], rollout.first[n + 1 :, i] = column["terminations"], 1
    return rollout


class Batch(NamedTuple):
    """Rows of a rollout; `state` is what the critic sees."""

    obs: torch.Tensor  # [..., O], normalised
    state: torch.Tensor  # [..., S], normalised
    z: torch.Tensor  # [..., Z]
    a_prev: torch.Tensor  # [..., A]
    sample: torch.Tensor  # [..., .], what the policy drew
    old_log_prob: torch.Tensor  # [..., P], of P parts with a ratio each
    advantage: torch.Tensor  # [...]
    returns: torch.Tensor  # [...], normalised
    weight: torch.Tensor  # [...], 1, or 0 for a row that is no transition


@torch.no_grad()
def make_batch(rollout, actor, critic, args):
    """The rows [T, N] of a rollout. Its returns change V's last layer (Pop-Art)."""
    weight, value = 1 - rollout.first[1:], rollout.value[:-1]
    advantage = gae(rollout, weight, args.gamma, args.gae_lambda)
    returns = advantage + value
    update_returns(critic.returns, critic.head, returns, weight)
    if args.norm_adv:
        mean, var = moments(advantage, weight)
        advantage = (advantage - mean) / (var.sqrt() + 1e-8)
    obs, state = actor.normalizer(rollout.obs[:-1]), critic.normalizer(rollout.state[:-1])
    return Batch(
        obs, state, rollout.z[:-1], rollout.a_prev[:-1], rollout.sample[:-1], rollout.log_prob[:-1],
        advantage, critic.returns(returns), weight,
    )  # fmt: skip


def gae(rollout, transition, gamma, gae_lambda):
    """Generalised advantage estimates [T, N] (Schulman et al. 2016, eq. 16).

    Time limits are bootstrapped through, as only `terminated` cuts delta. The final row of an
    episode is no `transition` [T, N]: its advantage is 0, which ends the sum.
    """
    next_value = (1 - rollout.terminated[:-1]) * rollout.value[1:]
    delta = transition * (rollout.reward[:-1] + gamma * next_value - rollout.value[:-1])
    decay = gamma * gae_lambda * transition
    advantage = torch.zeros_like(rollout.value)
    for t in reversed(range(len(delta))):
        torch.addcmul(delta[t], decay[t], advantage[t + 1], out=advantage[t])
    return advantage[:-1]


def gaussian_log_prob(x, mean, log_std, parts):
    """log N(x; mean, diag(std^2)) of x [..., D], summed within parts of these sizes: [..., P]."""
    standardized = (x - mean) * (-log_std).exp()
    log_prob = -0.5 * standardized.square() - log_std - 0.5 * math.log(2 * math.pi)
    return torch.stack([part.sum(-1) for part in log_prob.split(parts, -1)], -1)


LOSSES = "policy_loss", "value_loss", "old_approx_kl", "approx_kl", "clipfrac", "entropy"


def ppo_loss(log_prob, value, log_std, batch, args):
    """L(pi) + vf_coef L(V) - ent_coef entropy of a minibatch; and its `LOSSES` [6], detached."""
    assert log_prob.shape[:-1] == value.shape == batch.weight.shape, "[B, 1] * [B] is [B, B]"
    weight = (batch.weight / batch.weight.sum().clamp(min=1)).unsqueeze(-1)  # beside [B, P]
    # rho = 1 where there is no weight: it could be infinite, and infinity times 0 is NaN
    log_ratio = torch.where(weight > 0, log_prob - batch.old_log_prob, 0)
    ratio, advantage, eps = log_ratio.exp(), batch.advantage.unsqueeze(-1), args.clip_coef

    # -min(rho A, clip(rho, 1 - eps, 1 + eps) A), Schulman et al. 2017, eq. 7
    policy_loss = -torch.min(ratio * advantage, ratio.clamp(1 - eps, 1 + eps) * advantage)
    value_loss = 0.5 * (value - batch.returns).square().unsqueeze(-1)
    kl, clipped = ratio - 1 - log_ratio, ((ratio - 1).abs() > eps) / ratio.shape[-1]
    losses = [(weight * x).sum() for x in (policy_loss, value_loss, -log_ratio, kl, clipped)]
    entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
    loss = losses[0] + args.vf_coef * losses[1] - args.ent_coef * entropy
    return loss, torch.stack([*losses, entropy]).detach()


def s2pg_ppo_loss(actor, critic, batch, args):
    """The loss of single transitions, where rho is that of (a, z') jointly, or of each."""
    mean = actor(batch.obs, batch.z, batch.a_prev)
    log_prob = gaussian_log_prob(batch.sample, mean, actor.log_std, actor.parts)
    value = critic(batch.state, batch.z, batch.a_prev)
    return ppo_loss(log_prob, value, actor.log_std, batch, args)


def discriminator_loss(discriminator, rows, weight, expert_rows, args):
    """E_expert[-log D] + E_policy[-log(1 - D)] - c H(D), H over both; also H, detached."""
    weight = torch.cat([weight / weight.sum(), torch.full_like(weight, 1 / len(weight))])
    logit = discriminator(torch.cat([rows, expert_rows])).squeeze(-1)
    is_expert = torch.cat([torch.zeros_like(rows[:, 0]), torch.ones_like(rows[:, 0])])
    bce, entropy = (
        F.binary_cross_entropy_with_logits(logit, target, weight, reduction="sum")
        for target in (is_expert, logit.sigmoid())  # D with itself: its entropy
    )
    return bce - args.discriminator_entropy * entropy / 2, entropy.detach() / 2


class S2PGGAIL(nn.Module):
    """Networks and optimisers, and the update that trains them."""

    def __init__(self, args, env, device):
        super().__init__()
        self.args, self.device = args, device
        space = env.single_observation_space
        obs_dim, critic_dim = (view.shape[0] for view in views(getattr(space, "spaces", space)))
        self.action_dim = action_dim = env.single_action_space.shape[0]
        self.actor = GaussianStatefulActor(obs_dim, action_dim, args)
        self.z_dim = self.actor.z_dim
        self.critic = Critic(critic_dim, self.z_dim, action_dim)
        self.row_sizes = [obs_dim, critic_dim, self.z_dim, action_dim, action_dim + self.z_dim]
        self.row_sizes += [len(self.actor.parts)]
        self.to(device)
        self.optimizer = torch.optim.Adam(  # of actor and critic: D does not exist yet
            self.parameters(), torch.tensor(args.learning_rate, device=device), eps=1e-5,
            fused=True, capturable=args.cudagraphs,
        )  # fmt: skip
        self.normalizer = RunningNormalizer(critic_dim, clip=10.0).to(device)  # of what D sees
        self.discriminator = nn.Sequential(
            nn.Linear(critic_dim + action_dim + 1, 512), nn.Tanh(),
            nn.Linear(512, 256), nn.Tanh(), nn.Linear(256, 1),
        ).to(device)  # fmt: skip
        self.d_optimizer = torch.optim.Adam(self.discriminator.parameters(), args.discriminator_lr)
        self.optimizers = [self.optimizer, self.d_optimizer]
        self.loss = torch.compile(s2pg_ppo_loss) if args.compile else s2pg_ppo_loss
        if args.cudagraphs:
            self.act, self.learn = Graphed(self.act), Graphed(self.learn)

    @torch.no_grad()
    def act(self, obs, critic_obs, z, a_prev):
        """A sample of (a, z') [N, A + Z], z' [N, Z], log-densities of the sample [N, P], V [N]."""
        mean = self.actor(self.actor.normalizer(obs), z, a_prev)
        sample = mean + self.actor.log_std.exp() * torch.randn_like(mean)
        log_prob = gaussian_log_prob(sample, mean, self.actor.log_std, self.actor.parts)
        returns = self.critic.returns
        value = self.critic(self.critic.normalizer(critic_obs), z, a_prev)
        return sample, sample[:, self.action_dim :], log_prob, returns.mean + returns.std * value

    def clone_behaviour(self, expert):
        """Behaviour cloning, E[|a - mu_a|^2], through time along 32 rows of all episodes."""
        actor, weight = self.actor, 1 - expert.first[1:]
        actor.normalizer.update(expert.obs[:-1], weight)
        obs, std_z = actor.normalizer(expert.obs), actor.log_std[self.action_dim :].detach().exp()
        optimizer = torch.optim.Adam(actor.parameters(), 1e-3)
        chunks, z = torch.arange(len(weight)).split(32), expert.z[0]
        for i in tqdm(range(self.args.bc_steps), "cloning", dynamic_ncols=True, leave=False):
            rows, loss = chunks[i % len(chunks)], 0
            z = z.detach() * int(rows[0] > 0)  # zeros when the episodes begin
            for t in rows:
                a, z = actor(obs[t], z, expert.a_prev[t]).tensor_split([self.action_dim], -1)
                z = z + std_z * torch.randn_like(z)
                error = (a - expert.sample[t, :, : self.action_dim]).square().sum(-1)
                loss = loss + (weight[t] * error).sum() / weight[rows].sum()
            descend(optimizer, loss)
        return loss.detach()

    def judged_rows(self, rollout):
        """Rows D sees, [s, a, 0], last the absorbing state [0, 0, 1]; and how often each counts."""
        action = rollout.sample[..., : self.action_dim].clamp(-1, 1)
        rows = torch.cat([self.normalizer(rollout.state), action], -1)[:-1]
        rows = F.pad(rows.flatten(0, 1), (0, 1, 0, 1))
        rows[-1, -1] = 1
        weight = 1 - rollout.first[1:]
        ended = self.args.absorbing * (weight * rollout.terminated[:-1]).sum()
        return rows, torch.cat([weight.flatten(), ended.view(1) / (1 - self.args.gamma)])

    def judge(self, rollout, expert):
        """Train D, and put its rewards in place of those of the rollout; returns what to log."""
        args = self.args
        for seen in (rollout, expert):  # both count alike
            weight = 1 - seen.first[1:]
            self.normalizer.update(seen.state[:-1], weight / weight.sum())
        (rows, weight), (expert_rows, expert_weight) = map(self.judged_rows, (rollout, expert))
        for _ in range(args.discriminator_steps):
            drawn = expert_rows[expert_weight.multinomial(len(rows), replacement=True)]
            loss, entropy = discriminator_loss(self.discriminator, rows, weight, drawn, args)
            descend(self.d_optimizer, loss)
        with torch.no_grad():
            logit, expert_logit = (self.discriminator(x).squeeze(-1) for x in (rows, drawn))
            reward = -(torch.sigmoid(-logit) + 1e-8).log() if args.reward == "gail" else logit
            # sum over k >= 1 of gamma^k r, r the reward of a step in the absorbing state
            forever = args.absorbing * reward[-1] * args.gamma / (1 - args.gamma)
            rollout.reward[:-1] = reward[:-1].view_as(rollout.reward[:-1])
            rollout.reward[:-1] += rollout.terminated[:-1] * forever
        losses = dict(discriminator_loss=loss.detach(), discriminator_entropy=entropy)
        losses["accuracy_policy"], _ = moments((logit < 0).float()[:-1], weight[:-1])
        losses["accuracy_expert"], _ = moments((expert_logit > 0).float(), 1 - drawn[:, -1])
        losses["imitation_reward"], _ = moments(reward[:-1], weight[:-1])
        if args.absorbing:
            losses["absorbing_reward"] = reward[-1]
        return losses

    def update(self, rollout, expert):
        """The discriminator, its rewards, and PPO with them; returns what to log, as tensors."""
        judged = self.judge(rollout, expert)
        args, minibatches = self.args, self.args.num_minibatches
        rows = make_batch(rollout, self.actor, self.critic, args)
        batch = Batch(*(column.flatten(0, 1) for column in rows))
        size = len(batch.weight) // minibatches
        for _ in range(args.update_epochs):
            order, total = torch.randperm(len(batch.weight), device=self.device), 0
            for index in order[: minibatches * size].view(minibatches, size):
                total = total + self.learn(*(column[index] for column in batch))
            losses = dict(zip(LOSSES, total / minibatches))
            if losses["approx_kl"] > args.target_kl:
                break
        # the next rollout acts with new statistics, so that within one the policy is one policy
        self.actor.normalizer.update(rollout.obs[:-1], rows.weight)
        self.critic.normalizer.update(rollout.state[:-1], rows.weight)
        value = self.critic.returns(rollout.value[:-1])
        _, unexplained = moments(rows.returns - value, rows.weight)
        _, variance = moments(rows.returns, rows.weight)
        losses["explained_variance"] = 1 - unexplained / (variance + 1e-8)
        return {f"losses/{name}": value for name, value in (judged | losses).items()}

    def learn(self, *columns):
        """A gradient step on a minibatch; returns its `LOSSES`."""
        loss, losses = self.loss(self.actor, self.critic, Batch(*columns), self.args)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], self.args.max_grad_norm)
        self.optimizer.step()
        return losses


Agent = S2PGGAIL  # what `train` works with


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


def save_run(run_dir, agent, **state):
    """Write RUN/checkpoint.pt whole or not at all, so that a kill leaves the last good one."""
    if not all(p.isfinite().all() for p in agent.parameters()):
        sys.exit(f"the weights are not finite any more; {run_dir} keeps its last checkpoint")
    state |= dict(agent=agent.state_dict(), optimizers=[o.state_dict() for o in agent.optimizers])
    try:
        torch.save(state, run_dir / "checkpoint.pt.tmp")
        (run_dir / "checkpoint.pt.tmp").replace(run_dir / "checkpoint.pt")
    finally:  # e.g. the disk is full
        (run_dir / "checkpoint.pt.tmp").unlink(missing_ok=True)


def load_run(run_dir, agent):
    """Go on from RUN/checkpoint.pt; returns its global step and seconds of training."""
    try:
        state = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
        agent.load_state_dict(state["agent"])
    except Exception as error:  # torch raises what it likes
        sys.exit(f"{run_dir} has no checkpoint that fits these options: {error!r}")
    for optimizer, saved in zip(agent.optimizers, state["optimizers"]):
        groups = optimizer.state_dict()["param_groups"]  # learning rates are those of the options
        optimizer.load_state_dict(dict(state=saved["state"], param_groups=groups))
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
    episodes = envs.demonstrations.load(args.demonstrations, env, args.demonstration_episodes)
    expert = demonstrated(episodes, agent.row_sizes, device)
    global_step, seconds = load_run(run_dir, agent) if args.resume else (0, 0.0)
    first_update = global_step + 1 if args.resume else args.num_steps * args.num_envs
    if args.total_timesteps < first_update:
        sys.exit(f"no update before step {first_update}: raise --total-timesteps")
    rollout = Rollout(args.num_steps, args.num_envs, agent.row_sizes, device)
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

    update_step, start_time, leaving = global_step, time.time() - seconds, False
    expert_return = np.mean([episode["rewards"].sum() for episode in episodes])
    writer.add_scalar("charts/expert_return", expert_return, global_step)
    if args.bc_steps and not args.resume:
        writer.add_scalar("losses/bc_loss", agent.clone_behaviour(expert), 0)
        seconds = time.time() - start_time
        save_run(run_dir, agent, global_step=0, seconds=seconds)
        if hasattr(eval_env, "score"):
            eval_env.score(agent, args.eval_episodes, args.seed, writer, 0)
            writer.add_scalar("charts/seconds", seconds, 0)
        start_time = time.time() - seconds
    stopped_by = []  # signals that asked to stop; nohup ignores SIGHUP, Windows has none
    for signum in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signum == signal.SIGINT or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, lambda signum, frame: stopped_by.append(signum))

    obs, _ = env.reset(seed=1000 * args.seed + global_step)  # a resumed run: new episodes
    z = torch.zeros(args.num_envs, agent.z_dim, device=device)
    a_prev = torch.zeros(args.num_envs, agent.action_dim, device=device)
    first = np.ones(args.num_envs, dtype=bool)  # rows that begin an episode
    final = np.zeros(args.num_envs, dtype=bool)  # rows that hold its last observation
    while not leaving:
        policy_obs, critic_obs = (to_device(view, device) for view in views(obs))
        sample, z_next, log_prob, value = agent.act(policy_obs, critic_obs, z, a_prev)
        action = sample[:, : agent.action_dim].clamp(-1, 1)
        a = action.cpu().numpy().copy()  # an environment may write to it
        try:
            obs, reward, terminated, truncated, info = env.step(a)
        except Exception:  # of the environment: what is learned outlives it
            save_run(run_dir, agent, global_step=update_step, seconds=seconds)
            raise
        rollout.add(
            policy_obs, critic_obs, z, a_prev, sample, log_prob, value, reward, terminated, first
        )

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

        finished = global_step >= args.total_timesteps
        leaving = finished or bool(stopped_by)
        if rollout.length == args.num_steps:
            *_, value = agent.act(*(to_device(view, device) for view in views(obs)), z, a_prev)
            rollout.finish(value, first)
            lr = args.learning_rate * (1 - args.anneal_lr * update_step / args.total_timesteps)
            agent.optimizer.param_groups[0]["lr"].fill_(lr)
            metrics = agent.update(rollout, expert) | {"charts/learning_rate": lr}
            update_step = global_step
            for name, value in metrics.items():
                writer.add_scalar(name, value, global_step)
            writer.add_scalar("charts/SPS", global_step / (time.time() - start_time), global_step)
        seconds = time.time() - start_time  # of training, without evaluations
        frequencies = args.checkpoint_frequency, evaluates and args.eval_frequency
        save, score = (n and (finished or global_step // n > last_step // n) for n in frequencies)
        if save or score or leaving:
            done = global_step if finished else update_step
            save_run(run_dir, agent, global_step=done, seconds=seconds)
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
