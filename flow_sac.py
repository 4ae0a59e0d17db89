r"""SAC Flow: Soft Actor-Critic whose policy is a flow, with or without an internal state.

Zhang et al., "SAC Flow: Sample-Efficient Reinforcement Learning of Flow-Based Policies via
Velocity-Reparameterized Sequential Modeling", ICLR 2026, arXiv 2509.25756. K steps of a velocity v
turn noise into an action, and the actor's loss is differentiated through all of them:

    x_0 ~ N(0, I),   x_{k+1} = x_k + v(x_k, k/K, o) / K + std(o) eps_k,   a = tanh(x_K)
    log pi = log N(x_0; 0, I) + sum_k log N(x_{k+1}; x_k + v / K, std^2) - sum log(1 - a^2)

As in an RNN, dQ/dx_0 is dQ/dx_K times K Jacobians. flow_g and flow_t are meant to keep it bounded:

    flow_g   v = G (C - x), with a gate G and a candidate C, as in a gated recurrent cell
    flow_t   v is a transformer decoder of two layers, whose memory is the observation
    mlp      v is a plain MLP, the naive flow
    none     one Gaussian step from 0: SAC, whose Q gets a_prev, too

--critic crossq is the published critic. --state-dim gives the policy s2pg_sac.py's internal state.

    python flow_sac.py --env-id HalfCheetah-v4
    python flow_sac.py --env-id Hopper-v4 --state-dim 32 --hide velocities
    python flow_sac.py --env-id Ant-v4 --critic crossq --policy-frequency 3 --flow-width 512 \
        --batch-size 512 --learning-starts 50000 --adam-beta1 0.5
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
    batch_size: int = 256  # rows in an update
    gamma: float = 0.99  # discount, in [0, 1)
    tau: float = 0.005  # share of the critic that goes into its target, in (0, 1]
    policy_frequency: int = 1  # updates of the critic for each of the actor
    actor_lr: float = 3e-4  # learning rate of the actor
    critic_lr: float = 1e-3  # learning rate of the critic
    adam_beta1: float = 0.9  # momentum of Adam, in [0, 1)
    alpha: float = 0.2  # initial temperature of the action
    alpha_lr: float = 1e-3  # learning rate of log alpha; the target entropy is 0, -A for a Gaussian
    alpha_z: float = 0.01  # initial temperature of the internal state
    alpha_z_lr: float = 3e-4  # learning rate of log alpha_z
    target_entropy_z: float = -1.0  # nats per component of z, log std + 1.4: -1 is a std of .09

    velocity: Literal["mlp", "flow_g", "flow_t", "none"] = "flow_g"  # [networks] "none": a Gaussian
    flow_steps: int = 4  # K, steps from noise to an action; a Gaussian has one
    flow_width: int = 256  # width of the hidden layers of v, for flow_t of its token
    draw_x0: bool = False  # draw x_0 in a noise-free evaluation, too; otherwise it is 0
    state_dim: int = 0  # size of the internal state, that of a GRU; 0 for none
    critic: Literal["target", "crossq"] = "target"  # crossq: batch renorm, no target, no tau

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
            batch_size=(1, inf), gamma=(0, 1 - 1e-9), tau=(1e-9, 1), policy_frequency=(1, inf),
            actor_lr=(0, inf), critic_lr=(0, inf), adam_beta1=(0, 1 - 1e-9), alpha=(1e-9, inf),
            alpha_lr=(0, inf), alpha_z=(1e-9, inf), alpha_z_lr=(0, inf), state_dim=(0, inf),
            target_entropy_z=(-3.5, 0.5), flow_steps=(1, inf), flow_width=(1, inf),
            num_threads=(1, inf),
            checkpoint_frequency=(1, inf), eval_frequency=(0, inf), eval_episodes=(0, inf),
        ).items():  # fmt: skip
            if not low <= getattr(self, name) <= high:
                sys.exit(f"--{name.replace('_', '-')} must be in [{low}, {high}]")


TUNED = {"InvertedPendulum": dict(learning_starts=1_000)}  # defaults that differ by task
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0


class VelocityMLP(nn.Module):
    """v(x, t, o) of two hidden layers. `context`, what the first does with o, serves all K steps.

    Shapes, here and below: x, v [B, A]; t [B, 1] in [0, 1); with an internal state o is (o, g).
    """

    def __init__(self, inputs, dim, width):
        super().__init__()
        self.context, self.step = nn.Linear(inputs, width), nn.Linear(dim + 1, width, bias=False)
        self.hidden, self.out = nn.Linear(width, width), nn.Linear(width, dim)

    def forward(self, context, x, t):
        h = torch.relu_(context + self.step(torch.cat([x, t], -1)))
        return self.out(torch.relu_(self.hidden(h)))


class VelocityG(nn.Module):
    """v = G (C - x), so that x_{k+1} = (1 - G / K) x_k + (G / K) C: a gated recurrent cell."""

    def __init__(self, inputs, dim, width):
        super().__init__()
        self.context = nn.Linear(inputs, 2 * width)
        self.step = nn.Linear(dim + 1, 2 * width, bias=False)
        self.gate, self.candidate = nn.Linear(width, dim), nn.Linear(width, dim)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, 5.0)  # an open gate: G = .993

    def forward(self, context, x, t):
        h_gate, h_candidate = F.silu(context + self.step(torch.cat([x, t], -1))).chunk(2, -1)
        return torch.sigmoid(self.gate(h_gate)) * (self.candidate(h_candidate) - x)


class VelocityT(nn.Module):
    """v of a pre-norm transformer decoder, whose one token is (x, t) and whose memory is o.

    The softmax over a single token is 1, so that attention to it is a linear map, without queries
    and keys; what is read from the memory is the same in each step.
    """

    def __init__(self, inputs, dim, width):
        super().__init__()
        cross_attention = nn.Linear(width, 2 * width)
        self.context = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), cross_attention)
        self.token, self.layers = nn.Linear(dim + 1, width), nn.ModuleList()
        for _ in range(2):
            attention = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
            wide, narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            feed_forward = nn.Sequential(nn.LayerNorm(width), wide, nn.GELU(), narrow)
            self.layers.append(nn.ModuleList([attention, feed_forward]))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))

    def forward(self, context, x, t):
        h = self.token(torch.cat([x, t], -1))
        memories = context.chunk(len(self.layers), -1)
        for memory, (attention, feed_forward) in zip(memories, self.layers):
            h = h + attention(h) + memory
            h = h + feed_forward(h)
        return self.out(h)


class FlowActor(nn.Module):
    """The joint policy pi(a, z' | o, z, a_prev): a flow for a, a squashed Gaussian for z'.

    A recurrent cell gives g, the next internal state without noise. The internal-state kernel
    spreads z' around g, the flow is conditioned on (o, g). With `state_dim` 0 there is no z. A
    Gaussian policy is a flow of one step from x_0 = 0.

    Shapes: o [B, O]; z, z', g [B, Z] in (-1, 1); a, a_prev [B, A] in (-1, 1).
    """

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.action_dim, self.z_dim, self.draw_x0 = action_dim, args.state_dim, args.draw_x0
        self.from_noise = args.velocity != "none"
        self.steps = args.flow_steps if self.from_noise else 1
        self.policy_obs = nn.Linear(obs_dim, 256)
        if self.z_dim > 0:
            self.kernel_obs = nn.Linear(obs_dim, 128)
            self.kernel_action = nn.Linear(action_dim, 128)
            self.cell = nn.GRUCell(256, self.z_dim)
        self.policy_hidden = nn.Linear(256 + self.z_dim, 256)
        self.policy_head = nn.Linear(256, action_dim + self.z_dim)
        velocity = dict(flow_g=VelocityG, flow_t=VelocityT).get(args.velocity, VelocityMLP)
        self.velocity = velocity(obs_dim + self.z_dim, action_dim, args.flow_width)

    def forward(self, obs, z, a_prev):
        """g [B, Z], and log std of a step of the flow [B, A] and of z' [B, Z]."""
        g = z
        if self.z_dim > 0:
            e = torch.relu_(torch.cat([self.kernel_obs(obs), self.kernel_action(a_prev)], -1))
            g = self.cell(e, z)
        features = torch.cat([torch.relu_(self.policy_obs(obs)), g], -1)
        log_std = torch.tanh(self.policy_head(torch.relu_(self.policy_hidden(features))))
        log_std = LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (log_std + 1)
        return g, *log_std.split([self.action_dim, self.z_dim], -1)

    def path(self, obs, g, log_std, noise):
        """[x_0, ..., x_K], each [B, A], and log pi of path and tanh x_K, per component [B, A].

        `noise` [K + 1, B, A] is x_0 and eps_0 to eps_{K-1}.
        """
        context = self.velocity.context(torch.cat([obs, g], -1))
        path = [noise[0] * self.from_noise]
        for k, eps in enumerate(noise[1:]):
            x, t = path[-1], k / self.steps
            v = self.velocity(context, x, torch.full_like(x[:, :1], t))
            path.append(x + v / self.steps + log_std.exp() * eps)
        x, gaussians = path[-1], self.steps + self.from_noise
        squares = path[0].square() + noise[1:].square().sum(0)
        log_prob = -0.5 * (squares + gaussians * math.log(2 * math.pi)) - self.steps * log_std
        return path, log_prob - 2 * (math.log(2) - x - F.softplus(-2 * x))

    def sample(self, obs, z, a_prev):
        """Reparameterised a [B, A] and z' [B, Z], with log pi_a [B] and log pi_z [B]."""
        g, log_std, log_std_z = self(obs, z, a_prev)
        noise = torch.randn(self.steps + 1, *log_std.shape, device=obs.device)
        path, log_pi_a = self.path(obs, g, log_std, noise)
        z, log_pi_z = squashed_gaussian(torch.atanh((1 - 1e-6) * g), log_std_z)  # finite at 1
        return torch.tanh(path[-1]), z, log_pi_a.sum(-1), log_pi_z.sum(-1)

    @torch.no_grad()
    def act(self, obs, z, a_prev, deterministic=False):
        """a [B, A] and z' [B, Z], both sampled or both noise-free."""
        if not deterministic:
            return self.sample(obs, z, a_prev)[:2]
        g, log_std, _ = self(obs, z, a_prev)
        x_0 = torch.randn_like(log_std) if self.draw_x0 else torch.zeros_like(log_std)
        noise = torch.stack([x_0] + self.steps * [torch.zeros_like(log_std)])
        return torch.tanh(self.path(obs, g, log_std, noise)[0][-1]), g


def squashed_gaussian(mean, log_std):
    """x = tanh(u), u ~ N(mean, std^2), and log p(x) of each dimension; both shaped like `mean`."""
    noise = torch.randn_like(mean)
    u = mean + noise * log_std.exp()
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    # log(1 - tanh(u)^2), in the form that does not underflow for large |u|
    return torch.tanh(u), log_prob - 2 * (math.log(2) - u - F.softplus(-2 * u))


class BatchRenorm(nn.Module):
    """Normalises x [2, B, F] over B in training, otherwise by running statistics.

    Ioffe, NeurIPS 2017, arXiv 1702.03275: after 100 000 calls r and d, without gradient, make it
    normalise as running statistics would, within bounds. Scale and shift are the next layer's.
    """

    def __init__(self, features):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2, 1, features))
        self.register_buffer("var", torch.ones(2, 1, features))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        running_std = (self.var + 1e-3).sqrt()
        if not self.training:
            return (x - self.mean) / running_std
        var, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
        std = (var + 1e-3).sqrt()
        with torch.no_grad():
            late = self.calls >= 100_000
            r = torch.where(late, (std / running_std).clamp(1 / 3, 3), 1)
            d = torch.where(late, ((mean - self.mean) / running_std).clamp(-5, 5), 0)
            torch._foreach_lerp_([self.mean, self.var], [mean, var], 0.01)
            self.calls += 1
        return (x - mean) / std * r + d


class SoftCritic(nn.Module):
    """Q_1 and Q_2 [2, B] of the concatenated inputs [B, .], as one batch of matrix products."""

    def __init__(self, inputs, width, norm):
        super().__init__()
        self.norms, self.layers = nn.ModuleList(), nn.ParameterList()
        for fan_in, fan_out in [(inputs, width), (width, width), (width, 1)]:
            self.norms.append(norm(fan_in))
            for shape in [(2, fan_in, fan_out), (2, 1, fan_out)]:  # weight and bias
                self.layers.append(torch.empty(shape).uniform_(-1, 1) / math.sqrt(fan_in))

    def forward(self, *inputs):
        x = torch.cat([x.expand(2, -1, -1) for x in inputs], -1)
        norm_1, norm_2, norm_3 = self.norms
        weight_1, bias_1, weight_2, bias_2, weight_3, bias_3 = self.layers
        x = torch.relu_(torch.baddbmm(bias_1, norm_1(x), weight_1))
        x = torch.relu_(torch.baddbmm(bias_2, norm_2(x), weight_2))
        return torch.baddbmm(bias_3, norm_3(x), weight_3).squeeze(-1)


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


def flow_critic_loss(actor, critic, target_critic, batch, alpha, gamma):
    """sum_i E[(Q_i(s, a, z', a_prev) - y)^2]; also Q_1, Q_2 [2, B].

    y = r + gamma (1 - d) [min_i Q'_i(s', a'', z'', a) - alpha log pi_a(a'' | o', z', a)], d is
    `terminated`. CrossQ, arXiv 1902.05605, has no Q': it is Q, and both sides are one batch.
    """
    with torch.no_grad():
        a, z, log_pi_a, _ = actor.sample(batch.next_obs, batch.next_z, batch.action)
    now = batch.state, batch.action, batch.next_z, batch.a_prev
    later = batch.next_state.detach(), a, z, batch.action
    if target_critic is None:
        q, next_q = critic(*map(torch.cat, zip(now, later))).chunk(2, -1)
    else:
        q, next_q = critic(*now), target_critic(*later)
    next_v = next_q.detach().amin(0) - alpha * log_pi_a
    target = batch.reward + gamma * (1 - batch.terminated) * next_v
    return (batch.weight * (q - target).square()).sum(), q.detach()


def soft_actor_loss(actor, critic, batch, alpha, alpha_z):
    """E[alpha log pi_a(a~) + alpha_z log pi_z(z~') - min_i Q_i(s, a~, z~', a_prev)].

    Also the sample z~' [B, Z] and the entropies of pi_a and pi_z, detached.
    """
    a, z_new, log_pi_a, log_pi_z = actor.sample(batch.obs, batch.z, batch.a_prev)
    q = critic(batch.state, a, z_new, batch.a_prev).amin(0)
    loss = (batch.weight * (alpha * log_pi_a + alpha_z * log_pi_z - q)).sum()
    entropy, entropy_z = -(batch.weight * log_pi_a).sum(), -(batch.weight * log_pi_z).sum()
    return loss, z_new.detach(), entropy.detach(), entropy_z.detach()


def path_gradients(actor, critic, batch):
    """Mean norms of dQ/dx_k for each k; the first over the last; mean std; mean gate, 0 if none."""
    gates, gate = [], getattr(actor.velocity, "gate", nn.Identity())
    hook = gate.register_forward_hook(lambda *call: gates.append(call[-1].sigmoid().mean()))
    g, log_std, _ = actor(batch.obs, batch.z, batch.a_prev)
    noise = torch.randn(actor.steps + 1, *log_std.shape, device=g.device, requires_grad=True)
    path, _ = actor.path(batch.obs, g, log_std, noise)
    hook.remove()
    q = critic(batch.state, torch.tanh(path[-1]), batch.next_z, batch.a_prev).amin(0)
    norms = [(batch.weight * d.norm(dim=-1)).sum() for d in torch.autograd.grad(q.sum(), path)]
    result = {f"flow/gradient_{k}": norm for k, norm in enumerate(norms)}
    result |= {"flow/gain": norms[0] / norms[-1], "flow/std": log_std.detach().exp().mean()}
    return result | {"flow/gate": sum(gates) / actor.steps}


class FlowSAC(nn.Module):
    """Networks, temperatures and optimisers, and the update that trains them."""

    def __init__(self, args, env, device):
        super().__init__()
        self.args, self.device = args, device
        space = env.single_observation_space
        obs_dim, critic_dim = (view.shape[0] for view in views(getattr(space, "spaces", space)))
        self.action_dim = action_dim = env.single_action_space.shape[0]
        privileged = getattr(env, "critic_sees_more", obs_dim != critic_dim)
        self.actor = FlowActor(obs_dim, action_dim, args)
        self.z_dim = self.actor.z_dim
        critic_state = critic_dim if privileged else obs_dim + self.z_dim  # s, or (o, z)
        inputs = critic_state + action_dim + self.z_dim + action_dim  # s, a, z', a_prev
        width, norm = (256, nn.Identity) if args.critic == "target" else (1024, BatchRenorm)
        self.critic, self.target_critic = SoftCritic(inputs, width, norm).eval(), None
        if args.critic == "target":
            self.target_critic = SoftCritic(inputs, width, norm).requires_grad_(False)
            self.target_critic.load_state_dict(self.critic.state_dict())
        self.target_entropy = 0 if self.actor.from_noise else -action_dim
        self.log_alpha = nn.Parameter(torch.tensor(args.alpha).log())
        self.log_alpha_z = nn.Parameter(torch.tensor(args.alpha_z).log())
        self.to(device)

        adam = dict(betas=(args.adam_beta1, 0.999), fused=True, capturable=args.cudagraphs)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), args.critic_lr, **adam)
        parts = [
            dict(params=list(self.actor.parameters()), lr=args.actor_lr),
            dict(params=[self.log_alpha], lr=args.alpha_lr),
            dict(params=[self.log_alpha_z], lr=args.alpha_z_lr),
        ]
        self.actor_optimizer = torch.optim.Adam(parts, **adam)
        self.optimizers = [self.critic_optimizer, self.actor_optimizer]
        compiled = torch.compile if args.compile else lambda function: function
        self.critic_loss, self.actor_loss = compiled(flow_critic_loss), compiled(soft_actor_loss)
        self.act = self.actor.act
        if args.cudagraphs:
            self.act, self.update = Graphed(self.act), Graphed(self.update)
        self.row_sizes = obs_dim, critic_dim if privileged else 0, self.z_dim, action_dim

    def update(self, buffer):
        """`policy_frequency` steps of the critic, one of the rest; tensors to log."""
        actor, critic, target, args = self.actor, self.critic, self.target_critic, self.args
        alpha, alpha_z = self.log_alpha.detach().exp(), self.log_alpha_z.detach().exp()

        for _ in range(args.policy_frequency):
            batch = buffer.sample(args.batch_size)
            critic.train()
            qf_loss, q = self.critic_loss(actor, critic, target, batch, alpha, args.gamma)
            critic.eval()
            descend(self.critic_optimizer, qf_loss)
            if target is not None:
                with torch.no_grad():  # theta' <- theta' + tau (theta - theta')
                    targets, online = list(target.parameters()), list(critic.parameters())
                    torch._foreach_lerp_(targets, online, args.tau)

        pi_loss, z_new, entropy, entropy_z = self.actor_loss(actor, critic, batch, alpha, alpha_z)
        # a temperature falls while its entropy is above the target
        alpha_loss = self.log_alpha.exp() * (entropy - self.target_entropy)
        alpha_z_loss = self.log_alpha_z.exp() * (entropy_z - args.target_entropy_z * self.z_dim)
        descend(self.actor_optimizer, pi_loss + alpha_loss + alpha_z_loss)
        buffer.refresh(batch, z_new)  # drawn for the actor loss, just before the actor's step

        losses = dict(
            qf_values=(batch.weight * q.mean(0)).sum(), qf_loss=qf_loss, actor_loss=pi_loss,
            alpha=alpha, alpha_z=alpha_z, entropy=entropy, entropy_z=entropy_z,
        )  # fmt: skip
        return {f"losses/{name}": value.detach() for name, value in losses.items()}


Agent = FlowSAC  # what `train` works with


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
    buffer = TransitionBuffer(args.buffer_size, args.num_envs, *agent.row_sizes, device)
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
        for _ in range(updates_due // args.policy_frequency):  # on CUDA they run while `env` steps
            metrics = agent.update(buffer)
        updates_due %= args.policy_frequency
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
        updates_due += global_step - last_step if global_step >= first_update else 0

        finished = global_step >= args.total_timesteps
        leaving = finished or bool(stopped_by)
        seconds = time.time() - start_time  # of training, without evaluations
        if global_step // 100 > last_step // 100:
            if metrics:
                batch = buffer.sample(args.batch_size)
                metrics = metrics | path_gradients(agent.actor, agent.critic, batch)
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
