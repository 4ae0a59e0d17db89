"""RP-PGM: policy gradients through an unrolled, learned model, smooth by spectral normalisation.

Zhang, Liu, Wang, Zhao, "Model-Based Reparameterization Policy Gradient Methods: Theory and
Practical Algorithms", NeurIPS 2023, arXiv 2310.19927. The actor maximises the return of h steps of
a learned model and of the critic after them, differentiated through model and policy alike:

    a_t = pi(s_t, zeta_t),  s_{t+1} = f(s_t, a_t) + xi_t,  n_0 = 1,  n_{t+1} = n_t (1 - d(s_t, a_t))
    J_h = sum_{t<h} gamma^t n_t (r_t - alpha log pi_t) + gamma^h n_h (min_i Q_i - alpha log pi)_h
    dp          zeta is drawn and xi = 0: derivatives on predictions
    dr          zeta and xi repeat a segment of the replay buffer: derivatives on real samples
    model-free  h = 0: the actor's step of SAC

The gradient's variance may grow as the 4h-th powers of the Lipschitz constants of f and pi.
Spectral normalisation of hidden layers, W <- c W / sigma(W), lowers them. The rest is plain SAC.

    python rp_pgm.py --env-id InvertedDoublePendulum-v4
    python rp_pgm.py --env-id HalfCheetah-v4 --estimator dr --horizon 8 --spectral-norm none
"""

import json
import math
import signal
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "InvertedPendulum-v4"  # [task] id or module:Id-v0; sets defaults
    env_kwargs: list[tuple[str, str]] = field(default_factory=list)  # of the environment: wind True
    hide: Literal["none", "velocities", "positions"] = "none"  # hidden from the policy, in MuJoCo
    num_envs: int = 1  # environments stepped together
    total_timesteps: int = 1_000_000  # environment steps, over all environments

    buffer_size: int = 1_000_000  # [algorithm] rows of the replay buffer, over all environments
    learning_starts: int = 5_000  # random steps, before the first update
    warmup_steps: int = 10_000  # steps in which the actor learns as in SAC: h is 0
    batch_size: int = 256  # segments in a batch; the critic uses their first rows
    gamma: float = 0.99  # discount, in [0, 1)
    tau: float = 0.005  # share of the critic that goes into its target, in (0, 1]
    actor_lr: float = 3e-4  # learning rate of the actor
    critic_lr: float = 1e-3  # learning rate of the critic
    alpha: float = 0.1  # initial temperature of the action
    alpha_lr: float = 1e-3  # learning rate of log alpha
    entropy_start: float = -1.0  # target entropy at first, in nats for each component of the action
    entropy_end: float = -1.0  # and after the last step
    entropy_power: float = 1.0  # p of H_end + (H_start - H_end) (1 - t / T)^p, in between

    estimator: Literal["dp", "dr", "model-free"] = "dp"  # predictions, real segments, h = 0
    horizon: int = 3  # model steps h that the actor's gradient flows through
    model_lr: float = 1e-3  # learning rate of the model
    model_updates: int = 1  # updates of the model for each of actor and critic
    model_length: int = 3  # steps that the model is trained to predict, whatever the horizon

    spectral_norm: Literal["model", "policy", "both", "none"] = "both"  # [networks] normalised
    sn_layers: Literal["reference", "all"] = "reference"  # all: and outputs, policy's first
    sn_coef: float = 1.0  # c, the spectral norm of a normalised layer
    width: int = 256  # of the hidden layers of policy and model
    depth: int = 3  # hidden layers of policy and dynamics

    seed: int = 1  # [run] of the networks, the noise and the environments
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    resume: str | None = None  # folder of a run to go on with, and with its options
    save_buffer: bool = False  # save the buffer, too; a resumed run refills it otherwise
    checkpoint_frequency: int = 10_000  # steps between checkpoints; an evaluation writes one, too
    eval_frequency: int = 10_000  # steps between evaluations; 0 for none
    eval_episodes: int = 5  # stochastic ones, and as many noise-free; 0 for none
    grad_var_every: int = 10_000  # steps between measurements of the gradient's variance; 0: none
    lipschitz_every: int = 10_000  # steps between measurements of Lipschitz constants; 0: none
    track: bool = False  # log to Weights and Biases, too: $WANDB_PROJECT
    cuda: bool = True  # [hardware] use a CUDA card where there is one
    num_threads: int = 1  # CPU threads of torch; for small networks one is enough
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # of float32 products
    compile: bool = False  # on CUDA: torch.compile the losses
    cudagraphs: bool = False  # on CUDA: replay acting and updates as graphs
    privileged_critic = False  # no option: Q judges predictions of what the policy sees

    def __post_init__(self):
        self.env_kwargs = list(dict(self.env_kwargs).items())  # pairs, also after JSON
        rows, inf = 4 * self.num_envs, math.inf
        for name, (low, high) in dict(
            seed=(0, 1e18), num_envs=(1, inf), buffer_size=(rows, inf), learning_starts=(rows, inf),
            batch_size=(1, inf), gamma=(0, 1 - 1e-9), tau=(1e-9, 1), warmup_steps=(0, inf),
            actor_lr=(0, inf), critic_lr=(0, inf), alpha=(1e-9, inf), alpha_lr=(0, inf),
            entropy_power=(1e-3, inf), horizon=(0, inf), sn_coef=(1e-9, inf), model_lr=(0, inf),
            model_updates=(0, inf), model_length=(1, inf), depth=(0, inf), width=(1, inf),
            entropy_start=(-3.5, 0.6), entropy_end=(-3.5, 0.6), num_threads=(1, inf),
            grad_var_every=(0, inf), lipschitz_every=(0, inf),
            checkpoint_frequency=(1, inf), eval_frequency=(0, inf), eval_episodes=(0, inf),
        ).items():  # fmt: skip
            if not low <= getattr(self, name) <= high:
                sys.exit(f"--{name.replace('_', '-')} must be in [{low}, {high}]")
        if self.model_updates == 0 and self.estimator != "model-free":
            sys.exit("--model-updates 0 is for --estimator model-free")


QUICK = dict(learning_starts=1_000, warmup_steps=0)
SMALL = dict(width=128, horizon=2, model_length=2)  # half an update's time
TUNED = {  # defaults that differ by task: the target entropies as published
    "Ant": dict(entropy_start=0.0, entropy_end=-2 / 8, entropy_power=4.0),
    "HalfCheetah": dict(entropy_start=-2 / 6, entropy_end=-3 / 6),
    "Hopper": dict(entropy_start=0.0, entropy_end=-2 / 3, entropy_power=1 / 32),
    "InvertedDoublePendulum": QUICK | SMALL | dict(tau=0.01, entropy_start=-2.0, entropy_end=-2.0),
    "InvertedPendulum": QUICK,
    "Walker2d": dict(entropy_start=-2 / 6, entropy_end=-8 / 6, entropy_power=1 / 16),
}
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
NOISE_MAX = 4.0  # largest |zeta| in a repeated action


class RunningNorm(nn.Module):
    """x = (o - mean) / std, of all observations that were added; std is kept in [.1, 10]."""

    def __init__(self, obs_dim):
        super().__init__()
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(obs_dim, dtype=torch.float64))
        self.register_buffer("var", torch.ones(obs_dim, dtype=torch.float64))

    def forward(self, obs):
        return ((obs - self.mean) / self.var.sqrt().clamp(0.1, 10)).to(obs.dtype)

    def add(self, obs):
        """Let observations [N, O] count, by Chan's rule for mean and variance of two samples."""
        self.count += len(obs)
        share, delta = len(obs) / self.count, obs.mean(0) - self.mean
        self.mean += share * delta
        spread = obs.var(0, correction=0) + (1 - share) * delta.square()
        self.var += share * (spread - self.var)


class SpectralNorm(nn.Module):
    """A weight W [out, in] as c W / |Wv|, where |Wv| is nearly its spectral norm sigma.

    Miyato et al., ICLR 2018, arXiv 1802.05957. v follows W after each step of the optimiser, not
    in each use, so that all uses in an unroll are equal.
    """

    def __init__(self, weight, coef):
        super().__init__()
        self.coef = coef
        # W is orthogonal at first, so that |Wv| = |v| for every v in its row space
        self.register_buffer("v", F.normalize(weight.detach().sum(0), dim=0))

    def forward(self, weight):
        return self.coef * weight / (weight @ self.v).norm()


@torch.no_grad()
def power_iteration(net):
    """v <- W'Wv / |W'Wv| for every normalised layer of `net`."""
    for layer in net.modules():
        if parametrize.is_parametrized(layer):
            norm, weight = layer.parametrizations.weight[0], layer.parametrizations.weight.original
            for _ in range(5):  # one alone leaves sigma behind by up to a third while W moves fast
                norm.v.copy_(F.normalize(weight.T @ (weight @ norm.v), dim=0))


def mlp(sizes, normalised=(), coef=1.0):
    """Linear layers with ReLUs between; SpectralNorm for those whose index is in `normalised`.

    Weights are orthogonal, so that all layers begin with sigma = 1, normalised (c = 1) or not.
    """
    layers = []
    for k in range(len(sizes) - 1):
        layer = nn.Linear(sizes[k], sizes[k + 1])
        nn.init.orthogonal_(layer.weight)
        nn.init.zeros_(layer.bias)
        if k in normalised:
            parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight, coef))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class GaussianActor(nn.Module):
    """The policy pi(a | x), a squashed diagonal Gaussian; x [B, O] is the normalised o [B, O]."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.action_dim, self.z_dim = action_dim, 0
        layers = range(1, args.depth) if args.sn_layers == "reference" else range(args.depth + 1)
        layers = layers if args.spectral_norm in ("policy", "both") else ()
        sizes = [obs_dim] + args.depth * [args.width] + [2 * action_dim]
        self.norm, self.net = RunningNorm(obs_dim), mlp(sizes, layers, args.sn_coef)

    def forward(self, x):
        """Mean and log std of a before the tanh, both [B, A]."""
        mean, log_std = self.net(x).chunk(2, -1)
        return mean, LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (log_std.tanh() + 1)

    def sample(self, x):
        """Reparameterised a [B, A], with log pi [B]."""
        mean, log_std = self(x)
        return squash(mean, log_std, torch.randn_like(mean))

    @torch.no_grad()
    def act(self, obs, z=None, a_prev=None, deterministic=False):
        """a [B, A], sampled or noise-free. z and a_prev are for policies with an internal state."""
        x = self.norm(obs)
        return torch.tanh(self(x)[0]) if deterministic else self.sample(x)[0], z


def squash(mean, log_std, zeta):
    """a = tanh(u) [B, A], where u = mean + std zeta, and log pi(a) [B]."""
    u = mean + zeta * log_std.exp()
    log_prob = -0.5 * zeta.square() - log_std - 0.5 * math.log(2 * math.pi)
    # log(1 - tanh(u)^2), in the form that does not underflow for large |u|
    return torch.tanh(u), (log_prob - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


class Model(nn.Module):
    """What follows (x, a): the next x, the reward, and the log-odds of a termination."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        layers = range(args.depth + (args.sn_layers == "all"))  # the last is the output
        layers = layers if args.spectral_norm in ("model", "both") else ()
        inputs, width = obs_dim + action_dim, args.width
        self.dynamics = mlp([inputs] + args.depth * [width] + [obs_dim], layers, args.sn_coef)
        self.outcomes = mlp([inputs, width, width, 2])

    def step(self, x, a):
        """f(x, a) = x + g(x, a) [B, O], without noise."""
        return x + self.dynamics(torch.cat([x, a], -1))

    def outcome(self, x, a):
        """Reward [B], and log-odds of a termination [B]."""
        return self.outcomes(torch.cat([x, a], -1)).unbind(-1)


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


class Segments(NamedTuple):
    """B segments of L rows that follow one another, each with the row after its last."""

    x: torch.Tensor  # [L + 1, B, O], normalised observations
    action: torch.Tensor  # [L, B, A]
    reward: torch.Tensor  # [L, B]
    terminated: torch.Tensor  # [L, B], 0 or 1
    real: torch.Tensor  # [L, B], 1 while a row and its successor are a transition, then 0
    weight: torch.Tensor  # [B], sums to 1; 0 where the first row is no transition


class SegmentBuffer:
    """A ring of rows, one for each step of each environment (autoreset next step).

    An episode of T transitions fills T + 1 rows; the last holds the final observation, its action
    is ignored. A row whose successor is the `first` of an episode is no transition.

    Row t of environment n lies at t * num_envs + n, modulo the length of the ring. `steps`, the
    rows written for each environment, lies on the device, so that a graph can replay `sample`.
    """

    def __init__(self, size, num_envs, obs_dim, action_dim, device):
        self.num_envs, self.slots, self.device = num_envs, size // num_envs, device
        self.widths = [obs_dim, action_dim, 1, 1, 1]
        shape = self.slots * num_envs, sum(self.widths)
        try:
            self.rows = torch.zeros(shape, device=device)
        except RuntimeError:  # out of memory
            sys.exit(f"the buffer needs {4e-9 * math.prod(shape):.1f} GB: lower --buffer-size")
        self.steps = torch.zeros(1, dtype=torch.int64, device=device)

    def add(self, obs, action, reward, terminated, first):
        """Write a row per environment: tensors [num_envs, .] on the device, arrays [num_envs]."""
        numbers = to_device(np.stack([reward, terminated, first], -1), self.device)
        row = torch.cat([obs, action, numbers], -1)
        ring = self.rows.view(self.slots, self.num_envs, -1)
        ring.index_copy_(0, self.steps % self.slots, row.unsqueeze(0))
        self.steps += 1

    def sample(self, batch_size, length, norm):
        """Segments [batch_size] that begin at rows drawn uniformly with replacement."""
        stored = self.steps.clamp(max=self.slots)
        offset = torch.rand(batch_size, dtype=torch.float64, device=self.device) * (stored - 1)
        row = ((self.steps - stored + offset) * self.num_envs).long()
        step = torch.arange(length + 1, device=self.device).unsqueeze(-1) * self.num_envs
        number = row + step  # [L + 1, B]
        obs, action, *numbers = self.rows[number % len(self.rows)].split(self.widths, -1)
        reward, terminated, first = (column.squeeze(-1) for column in numbers)
        # a segment goes on to the end of its episode, or to the newest row
        real = (first[1:].cumsum(0) == 0) & (number[1:] < self.steps * self.num_envs)
        weight = real[0] / real[0].sum().clamp(min=1)
        return Segments(norm(obs), action[:-1], reward[:-1], terminated[:-1], real * 1.0, weight)


def model_losses(model, batch):
    """Mean square errors of x, per component, and of r; -E log p(d), neither class weighted.

    The dynamics predict all L steps from the first x, with the gradient through all of them.
    """
    weight, x, error = batch.real / batch.real.sum().clamp(min=1), batch.x[0], 0.0
    with parametrize.cached():
        for action, weight_t, next_x in zip(batch.action, weight, batch.x[1:]):
            x = model.step(x, action)
            error = error + (weight_t * (x - next_x).square().mean(-1)).sum()
    reward, log_odds = model.outcome(batch.x[:-1], batch.action)
    reward_error = (weight * (reward - batch.reward).square()).sum()
    nll = F.binary_cross_entropy_with_logits(log_odds, batch.terminated, weight, reduction="sum")
    return dict(model_error=error, reward_error=reward_error, termination_loss=nll)


def segment_critic_loss(actor, critic, target_critic, batch, alpha, gamma):
    """sum_i E[(Q_i(s, a) - y)^2] over the first rows of segments; also Q_1, Q_2 [2, B].

    y = r + gamma (1 - d) [min_i Q'_i(s', a'') - alpha log pi(a'' | s')], where d is `terminated`.
    """
    with torch.no_grad():
        a, log_pi = actor.sample(batch.x[1])
        next_v = target_critic(batch.x[1], a).amin(0) - alpha * log_pi
        target = batch.reward[0] + gamma * (1 - batch.terminated[0]) * next_v
    q = critic(batch.x[0], batch.action[0])
    return (batch.weight * (q - target).square()).sum(), q.detach()


def observed(predicted, seen, real):
    """The value that was seen with the derivative of the predicted one, where a row is real."""
    return torch.where(real, predicted + (seen - predicted).detach(), predicted)


def unrolled_return(actor, critic, model, batch, alpha, args, horizon):
    """J_h [B] of the docstring at the top, from the first states of a batch of segments.

    With dr, zeta and xi make a_t and s_{t+1} those of the segment; r and d get its values. From its
    end, or from the first |zeta| above NOISE_MAX on, the unroll goes on as dp. log pi is always of
    a drawn action: with the entropy of old ones the policy saturates.
    """
    replays, real = args.estimator == "dr" and horizon > 0, batch.weight > 0
    x, discount, objective = batch.x[0], 1.0, 0.0
    with parametrize.cached():  # the normalised weights, once for all steps
        for t in range(horizon + 1):
            mean, log_std = actor(x)
            a, log_pi = squash(mean, log_std, torch.randn_like(mean))
            if replays:
                u = torch.atanh((1 - 1e-6) * batch.action[t])
                zeta = ((u - mean) / log_std.exp()).detach()
                real = (batch.real[t] > 0) & (zeta.abs() <= NOISE_MAX).all(-1) & real
                a = torch.where(real.unsqueeze(-1), squash(mean, log_std, zeta)[0], a)
            if t == horizon:
                return objective + discount * (critic(x, a).amin(0) - alpha * log_pi)

            next_x, (reward, log_odds) = model.step(x, a), model.outcome(x, a)
            terminates = torch.sigmoid(log_odds)
            if replays:
                next_x = observed(next_x, batch.x[t + 1], real.unsqueeze(-1))
                reward = observed(reward, batch.reward[t], real)
                terminates = observed(terminates, batch.terminated[t], real)
            objective = objective + discount * (reward - alpha * log_pi)
            x, discount = next_x, args.gamma * discount * (1 - terminates)


def gradient_variance(objective, parameters):
    """Total variance of the gradients of `objective` [N]; then over |mean|^2, about N at most."""
    parameters, gradients = list(parameters), []
    for value in objective:
        gradient = torch.autograd.grad(value, parameters, retain_graph=True)
        gradients.append(torch.cat([part.flatten() for part in gradient]))
    variance, mean = torch.var_mean(torch.stack(gradients), 0)
    return variance.sum(), variance.sum() / mean.square().sum()


class RPPGM(nn.Module):
    """Networks, temperature and optimisers, and the update that trains them."""

    def __init__(self, args, env, device):
        super().__init__()
        self.args, self.device = args, device
        space = env.single_observation_space
        obs_dim = views(getattr(space, "spaces", space))[0].shape[0]
        self.action_dim = action_dim = env.single_action_space.shape[0]
        self.actor = GaussianActor(obs_dim, action_dim, args)
        self.model = Model(obs_dim, action_dim, args)
        self.critic, self.target_critic = (TwinCritic(obs_dim + action_dim) for _ in range(2))
        self.target_critic.requires_grad_(False).load_state_dict(self.critic.state_dict())
        self.log_alpha = nn.Parameter(torch.tensor(args.alpha).log())
        self.to(device)

        adam = dict(fused=True, capturable=args.cudagraphs)
        self.model_optimizer = torch.optim.Adam(self.model.parameters(), args.model_lr, **adam)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), args.critic_lr, **adam)
        parts = [
            dict(params=list(self.actor.parameters()), lr=args.actor_lr),
            dict(params=[self.log_alpha], lr=args.alpha_lr),
        ]
        self.actor_optimizer = torch.optim.Adam(parts, **adam)
        self.optimizers = [self.model_optimizer, self.critic_optimizer, self.actor_optimizer]
        compiled = torch.compile if args.compile else lambda function: function
        self.model_losses, self.critic_loss = compiled(model_losses), compiled(segment_critic_loss)
        self.unrolled_return = compiled(unrolled_return)
        self.act, self.observe = self.actor.act, self.actor.norm.add
        horizon = 0 if args.estimator == "model-free" else args.horizon
        self.warm_up, self.update = (partial(self.learn, horizon=h) for h in (0, horizon))
        if args.cudagraphs:
            self.act, self.observe = Graphed(self.act), Graphed(self.observe)
            self.warm_up, self.update = Graphed(self.warm_up), Graphed(self.update)
        self.row_sizes = obs_dim, action_dim

    def learn(self, buffer, horizon):
        """`model_updates` steps of the model, one of the rest; returns what to log, as tensors."""
        actor, critic, model, args = self.actor, self.critic, self.model, self.args
        alpha, losses = self.log_alpha.detach().exp(), {}

        for _ in range(args.model_updates):
            batch = buffer.sample(args.batch_size, args.model_length, actor.norm)
            losses = self.model_losses(model, batch)
            descend(self.model_optimizer, sum(losses.values()))
            power_iteration(model)

        batch = buffer.sample(args.batch_size, horizon + 1, actor.norm)
        qf_loss, q = self.critic_loss(actor, critic, self.target_critic, batch, alpha, args.gamma)
        descend(self.critic_optimizer, qf_loss)

        objective = self.unrolled_return(actor, critic, model, batch, alpha, args, horizon)
        pi_loss = -(batch.weight * objective).sum()
        with torch.no_grad():  # of the first states alone, with new noise
            entropy = -(batch.weight * actor.sample(batch.x[0])[1]).sum()
        # a temperature falls while its entropy is above the target; t is the number of rows seen
        start, end = args.entropy_start, args.entropy_end
        left = (1 - actor.norm.count / args.total_timesteps).clamp(min=0)
        target_entropy = self.action_dim * (end + (start - end) * left**args.entropy_power)
        alpha_loss = self.log_alpha.exp() * (entropy - target_entropy)
        descend(self.actor_optimizer, pi_loss + alpha_loss)
        power_iteration(actor)

        with torch.no_grad():  # theta' <- theta' + tau (theta - theta')
            targets, online = list(self.target_critic.parameters()), list(critic.parameters())
            torch._foreach_lerp_(targets, online, args.tau)

        losses |= dict(
            qf_values=(batch.weight * q.mean(0)).sum(), qf_loss=qf_loss, actor_loss=pi_loss,
            alpha=alpha, entropy=entropy,
        )  # fmt: skip
        return {f"losses/{name}": value.detach() for name, value in losses.items()}

    def variances(self, buffer):
        """`gradient_variance` of J_h for several h, over the states and the noise of training."""
        networks, alpha, result = (self.actor, self.critic, self.model), self.log_alpha.exp(), {}
        for h in (1, 2, 4, 8, 16):
            batch = buffer.sample(32, h + 1, self.actor.norm)
            objective = unrolled_return(*networks, batch, alpha, self.args, h)[batch.weight > 0]
            variances = gradient_variance(objective, self.actor.parameters())
            result |= dict(zip([f"gradient/variance_{h}", f"gradient/relative_{h}"], variances))
        return result

    def lipschitz(self, buffer):
        """Spectral norms of all layers of policy and dynamics; means of |dpi/dx| and |df/dx|."""
        batch, sigma = buffer.sample(256, 1, self.actor.norm), torch.linalg.matrix_norm
        # rows do not see one another: the Jacobian of their sum, [., B, O], has that of each
        policy = torch.func.jacrev(lambda x: torch.tanh(self.actor(x)[0]).sum(0))(batch.x[0])
        model = torch.func.jacrev(lambda x: self.model.step(x, batch.action[0]).sum(0))(batch.x[0])
        result = {"lipschitz/policy": sigma(policy, 2, dim=(0, 2)).mean()}
        result["lipschitz/model"] = sigma(model, 2, dim=(0, 2)).mean()
        for name, net in ("policy", self.actor.net), ("model", self.model.dynamics):
            for k, layer in enumerate(net[::2]):
                result[f"lipschitz/{name}_{k}"] = sigma(layer.weight, 2)
        return result


Agent = RPPGM  # what `train` works with


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
    buffer = SegmentBuffer(args.buffer_size, args.num_envs, *agent.row_sizes, device)
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
    measures = {agent.variances: args.grad_var_every, agent.lipschitz: args.lipschitz_every}
    stopped_by = []  # signals that asked to stop; nohup ignores SIGHUP, Windows has none
    for signum in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signum == signal.SIGINT or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, lambda signum, frame: stopped_by.append(signum))

    start_time, updates_due, metrics, leaving = time.time() - seconds, 0, {}, False
    obs, _ = env.reset(seed=1000 * args.seed + global_step)  # a resumed run: new episodes
    first = np.ones(args.num_envs, dtype=bool)  # rows that begin an episode
    final = np.zeros(args.num_envs, dtype=bool)  # rows that hold its last observation
    while not leaving:
        policy_obs = to_device(views(obs)[0], device)
        action, _ = agent.act(policy_obs)
        if global_step < args.learning_starts:
            action = 2 * torch.rand_like(action) - 1
        a = action.cpu().numpy().copy()  # an environment may write to it
        for _ in range(updates_due):  # a CUDA card works on them during env.step, as `a` is here
            warm_up = global_step < args.warmup_steps
            metrics = agent.warm_up(buffer) if warm_up else agent.update(buffer)
        try:
            obs, reward, terminated, truncated, info = env.step(a)
        except Exception:  # of the environment: what is learned outlives it
            save_checkpoint(run_dir, agent, buffer, global_step=global_step, seconds=seconds)
            raise
        buffer.add(policy_obs, action, reward, terminated, first)
        agent.observe(policy_obs)

        # a final row is no step: the environment ignores its action and begins anew
        last_step, env_step = global_step, global_step + np.cumsum(~final)
        global_step = int(env_step[-1])
        bar.update(global_step - last_step)
        for i in np.flatnonzero(info.get("_episode", [])):
            for name, key in ("return", "r"), ("length", "l"):
                writer.add_scalar(f"charts/episodic_{name}", info["episode"][key][i], env_step[i])
            bar.set_postfix_str(f"return {info['episode']['r'][i]:.1f}", refresh=False)
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
        for measure, every in measures.items():
            if metrics and every and global_step // every > last_step // every:
                with torch.random.fork_rng([device] if device.type == "cuda" else []):
                    for name, value in measure(buffer).items():  # training's draws stay as they are
                        writer.add_scalar(name, value, global_step)
                start_time = time.time() - seconds
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
