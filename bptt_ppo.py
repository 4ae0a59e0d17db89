"""BPTT-PPO: Proximal Policy Optimisation with a recurrent policy, by backpropagation through time.

Al-Hafez, Zhao, Peters, Tateo, "Time-Efficient Reinforcement Learning with Stochastic Stateful
Policies", ICLR 2024, arXiv 2311.04082. The policy sees o. Its internal state is deterministic,
h_t = GRU(o_t, a_{t-1}, h_{t-1}), and V has one of its own. Both are computed along sequences of at
most L rows of the rollout, from the h stored while acting. It is the baseline of that paper:

    delta_t = r_t + gamma (1 - d_t) V(o_{t+1}, h_{t+1}) - V(o_t, h_t)
    A_t     = delta_t + gamma lambda A_{t+1}, up to the end of the episode or of the rollout
    rho     = pi(a | o, h) / pi_old(a | o, h)
    policy  L(pi) = -E[min(rho A, clip(rho, 1 - eps, 1 + eps) A)]
    value   L(V)  = E[(V(o, h) - (A + V_old))^2] / 2

Sequences begin where the rollout or an episode does, and after every L rows. Gradients go back to
their first row and no further. With --privileged-critic V and its internal state see the state s in
place of o. Compare s2pg_ppo.py by diff.

    python bptt_ppo.py --env-id InvertedPendulum-v4 --total-timesteps 100000
    python bptt_ppo.py --env-id Humanoid-v4 --sequence-length 16 --num-envs 8 --seed 1
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
    privileged_critic: bool = False  # the critic sees the whole state in place of o
    num_envs: int = 1  # environments stepped together
    total_timesteps: int = 1_000_000  # environment steps, over all environments

    num_steps: int = 2048  # [algorithm] rows of a rollout in each environment
    sequence_length: int = 32  # rows L that gradients flow through; 1: none through time
    num_minibatches: int = 32  # gradient steps in an epoch, at most one per sequence
    update_epochs: int = 10  # epochs over a rollout
    learning_rate: float = 3e-4  # of actor and critic
    anneal_lr: bool = True  # the learning rate falls to zero, linearly over the run
    gamma: float = 0.99  # discount, in [0, 1)
    gae_lambda: float = 0.95  # lambda of the generalised advantage estimates, in [0, 1]
    norm_adv: bool = True  # normalise the advantages of a rollout
    clip_coef: float = 0.2  # eps: rho is clipped to 1 - eps and 1 + eps
    ent_coef: float = 0.0  # weight of the entropy of a
    vf_coef: float = 0.5  # weight of the loss of V
    max_grad_norm: float = 0.5  # norm at which the gradient is clipped
    target_kl: float = math.inf  # no further epoch after one with a larger approx_kl

    rnn: Literal["gru", "lstm", "rnn"] = "gru"  # [networks] recurrent layer
    state_dim: int = 32  # size of the layer; an LSTM's z = (h, c) is twice as large
    std: float = 0.5  # initial std of a, before a is clipped to [-1, 1]

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
            target_kl=(0, inf), state_dim=(1, inf), std=(1e-9, 99), sequence_length=(1, inf),
            num_threads=(1, inf),
            checkpoint_frequency=(1, inf), eval_frequency=(0, inf), eval_episodes=(0, inf),
        ).items():  # fmt: skip
            if not low <= getattr(self, name) <= high:
                sys.exit(f"--{name.replace('_', '-')} must be in [{low}, {high}]")


TUNED = {  # defaults that differ by task; options on the command line override these
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
    """A network of o_k (or s_k) and of the hidden state h_k, which depends on a_{k-1}, too.

    Shapes: o [T, B, O], normalised; a_prev [T, B, A]; h [T, B, H]; z, z' [B, Z]. z is the h before
    the first of T rows, z' that of the last; for an LSTM they are (h, c).
    """

    def __init__(self, obs_dim, action_dim, outputs, args):
        super().__init__()
        self.rnn, self.action_dim, self.state_dim = args.rnn, action_dim, args.state_dim
        self.z_dim = 2 * self.state_dim if args.rnn == "lstm" else self.state_dim
        self.normalizer = RunningNormalizer(obs_dim, clip=10.0)
        self.hidden_obs = nn.Linear(obs_dim, 128)
        self.kernel_obs = nn.Linear(obs_dim, 128)
        self.kernel_action = nn.Linear(action_dim, 128)
        self.layer = getattr(nn, args.rnn.upper())(256, self.state_dim)
        self.hidden = nn.Linear(128 + self.state_dim, 128)
        self.head = nn.Linear(128, outputs)

    def forward(self, obs, z, a_prev):
        """Outputs [T, B, .] and the last z' [B, Z] of rows `obs`, `a_prev` [T, B, .] after z."""
        e = torch.relu_(torch.cat([self.kernel_obs(obs), self.kernel_action(a_prev)], -1))
        z = [part.unsqueeze(0).contiguous() for part in z.split(self.state_dim, -1)]
        h, z = self.layer(e, tuple(z) if self.rnn == "lstm" else z[0])
        features = torch.cat([torch.relu_(self.hidden_obs(obs)), h], -1)
        z = torch.cat(z, -1).squeeze(0) if self.rnn == "lstm" else z.squeeze(0)
        return self.head(torch.relu_(self.hidden(features))), z

    def step(self, obs, z, a_prev):
        """Outputs [B, .] and z' [B, Z] after one raw observation."""
        outputs, z = self(self.normalizer(obs).unsqueeze(0), z, a_prev.unsqueeze(0))
        return outputs.squeeze(0), z


class RecurrentGaussianActor(RecurrentNetwork):
    """The policy pi(a | o, h), a diagonal Gaussian; the environment gets a clipped to [-1, 1]."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__(obs_dim, action_dim, action_dim, args)
        self.log_std = nn.Parameter(torch.tensor([args.std] * action_dim).log())
        self.parts = [action_dim]  # the ratio is that of a

    @torch.no_grad()
    def act(self, obs, z, a_prev, deterministic=False):
        """a [B, A], clipped, sampled or noise-free, and z' [B, Z], after raw `obs`."""
        a, z = self.step(obs, z, a_prev)
        if not deterministic:
            a = a + self.log_std.exp() * torch.randn_like(a)
        return a.clamp(-1, 1), z


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


def cut(first, length):
    """Cut a rollout with `first` [T + 1, N] into sequences of at most `length` transitions.

    They begin where the rollout or an episode does, and after every `length` rows. Returns times
    [L, B] and environments [B] of their rows, and a mask [L, B] of those that belong to them.
    """
    transition, row = ~first[1:], torch.arange(len(first) - 1, device=first.device).unsqueeze(-1)
    age = row - (row * first[:-1]).cummax(0).values  # rows since the episode or the rollout began
    start, env = ((age % length == 0) & transition).nonzero().unbind(-1)
    offset = row[: min(length, int(age[transition].max()) + 1)]
    t = (start + offset).clamp(max=len(row) - 1)
    return t, env, transition[t, env] & (age[t, env] - age[start, env] == offset)


def bptt_ppo_loss(actor, critic, batch, args):
    """The loss of sequences, [L, B, .], along which h is computed from the z of their first row."""
    z_actor, z_critic = batch.z[0].split([actor.z_dim, critic.z_dim], -1)
    mean, _ = actor(batch.obs, z_actor, batch.a_prev)
    log_prob = gaussian_log_prob(batch.sample, mean, actor.log_std, actor.parts)
    value, _ = critic(batch.state, z_critic, batch.a_prev)
    return ppo_loss(log_prob, value.squeeze(-1), actor.log_std, batch, args)


class BPTTPPO(nn.Module):
    """Networks and optimiser, and the update that trains them."""

    def __init__(self, args, env, device):
        super().__init__()
        self.args, self.device = args, device
        space = env.single_observation_space
        obs_dim, critic_dim = (view.shape[0] for view in views(getattr(space, "spaces", space)))
        self.action_dim = action_dim = env.single_action_space.shape[0]
        self.actor = RecurrentGaussianActor(obs_dim, action_dim, args)
        self.critic = RecurrentNetwork(critic_dim, action_dim, 1, args)  # normalised V
        self.critic.returns = RunningNormalizer(min_std=1e-2)
        self.z_dim = self.actor.z_dim + self.critic.z_dim  # each has an internal state
        self.row_sizes = [obs_dim, critic_dim, self.z_dim, action_dim, action_dim, 1]
        self.to(device)
        self.optimizer = torch.optim.Adam(
            self.parameters(), torch.tensor(args.learning_rate, device=device), eps=1e-5,
            fused=True, capturable=args.cudagraphs,
        )  # fmt: skip
        self.optimizers = [self.optimizer]
        self.loss = torch.compile(bptt_ppo_loss) if args.compile else bptt_ppo_loss
        if args.cudagraphs:
            self.act, self.graphs = Graphed(self.act), {}

    @torch.no_grad()
    def act(self, obs, critic_obs, z, a_prev):
        """A sample of a [N, A], z' [N, Z], the log-density of the sample [N, 1], V [N]."""
        z_actor, z_critic = z.split([self.actor.z_dim, self.critic.z_dim], -1)
        mean, z_actor = self.actor.step(obs, z_actor, a_prev)
        sample = mean + self.actor.log_std.exp() * torch.randn_like(mean)
        log_prob = gaussian_log_prob(sample, mean, self.actor.log_std, self.actor.parts)
        value, z_critic = self.critic.step(critic_obs, z_critic, a_prev)
        value = self.critic.returns.mean + self.critic.returns.std * value.squeeze(-1)
        return sample, torch.cat([z_actor, z_critic], -1), log_prob, value

    def update(self, rollout):
        """Epochs over a rollout; returns what to log, as tensors on the device."""
        args = self.args
        rows = make_batch(rollout, self.actor, self.critic, args)
        t, env_index, inside = cut(rollout.first > 0, args.sequence_length)
        batch = Batch(*(column[t, env_index] for column in rows))
        batch = batch._replace(z=batch.z[:1], weight=batch.weight * inside)
        minibatches = min(args.num_minibatches, t.shape[1])
        for _ in range(args.update_epochs):
            order, total = torch.randperm(t.shape[1], device=self.device), 0
            for index in order.tensor_split(minibatches):
                # each shape needs a graph of its own, which holds memory of the card
                shape, learn = (len(t), len(index)), self.learn
                if args.cudagraphs and (shape in self.graphs or len(self.graphs) < 16):
                    learn = self.graphs.setdefault(shape, Graphed(self.learn))
                total = total + learn(*(column[:, index] for column in batch))
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
        return {f"losses/{name}": value for name, value in losses.items()}

    def learn(self, *columns):
        """A gradient step on a minibatch; returns its `LOSSES`."""
        loss, losses = self.loss(self.actor, self.critic, Batch(*columns), self.args)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], self.args.max_grad_norm)
        self.optimizer.step()
        return losses


Agent = BPTTPPO  # what `train` works with


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
    stopped_by = []  # signals that asked to stop; nohup ignores SIGHUP, Windows has none
    for signum in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signum == signal.SIGINT or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, lambda signum, frame: stopped_by.append(signum))

    # an unfinished run goes on from its last update: the rows after that are played anew
    update_step, start_time, leaving = global_step, time.time() - seconds, False
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
            metrics = agent.update(rollout) | {"charts/learning_rate": lr}
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
