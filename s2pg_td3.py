"""S2PG-TD3: Twin Delayed DDPG with a stateful policy.

Al-Hafez, Zhao, Peters, Tateo, "Time-Efficient Reinforcement Learning with Stochastic Stateful
Policies", ICLR 2024, arXiv 2311.04082. The policy sees o, the critic the state s. The internal
state z is treated like an action: (a, z') = mu(o, z, a_prev) plus exploration noise is stored in
the replay buffer and judged by the critic. Nothing is differentiated through time:

    behaviour  (a, z') = clip(mu(o, z, a_prev) + (std_a, std_z) eps)
    target     y = r + gamma (1 - d) min_i Q'_i(s', a'', z'', a)
    critic     L(Q)  = sum_i E[(Q_i(s, a, z', a_prev) - y)^2]
    actor      L(mu) = -E[Q_1(s, mu_a, mu_z, a_prev)], whose negative gradient is the deterministic
               policy gradient E[grad mu_a grad_a Q_1 + grad mu_z grad_z' Q_1]
    refresh    z_{t+1} <- clip(mu_z + std_z eps) for the sampled rows, as the behaviour would now

Actor, target networks and refresh take their turn in every `policy_frequency`-th update, and
(a'', z'') = clip(mu'(o', z', a) + clipped noise) smooths the target over both. Where s is Markov, Q
does not depend on z; without a privileged critic, z is one more input of Q.

    python s2pg_td3.py --env-id InvertedPendulum-v4 --total-timesteps 20000
    python s2pg_td3.py --env-id Humanoid-v4 --seed 1
    python evaluate.py runs/RUN --episodes 20 --capture-video
"""

import functools
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
    privileged_critic: bool = True  # the critic sees the whole state, or no more than the policy
    num_envs: int = 1  # environments stepped together
    total_timesteps: int = 1_000_000  # environment steps, over all environments

    buffer_size: int = 1_000_000  # [algorithm] rows of the replay buffer, over all environments
    learning_starts: int = 5_000  # random steps, before the first update
    batch_size: int = 256  # rows in an update
    gamma: float = 0.99  # discount, in [0, 1)
    tau: float = 0.005  # share of a network that goes into its target, in (0, 1]
    actor_lr: float = 3e-4  # learning rate of the actor
    critic_lr: float = 1e-3  # learning rate of the critic
    exploration_noise: float = 0.1  # std of the noise on the action, which is in [-1, 1]
    exploration_noise_z: float = 0.1  # that of the internal state, which is in [-1, 1], too
    policy_noise: float = 0.2  # std of the noise on the actions of the target
    noise_clip: float = 0.5  # largest noise on the actions of the target
    policy_frequency: int = 2  # actor, targets and stored z wait for so many updates of the critic

    rnn: Literal["gru", "lstm", "rnn"] = "gru"  # [networks] recurrent cell
    state_dim: int = 32  # size of the cell; an LSTM's z = (h, c) is twice as large
    memoryless: bool = False  # no internal state: plain TD3, where Q still gets a_prev

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
            actor_lr=(0, inf), critic_lr=(0, inf), exploration_noise=(0, inf),
            exploration_noise_z=(0, inf), policy_noise=(0, inf), noise_clip=(0, inf),
            policy_frequency=(1, inf), state_dim=(1, inf),
            checkpoint_frequency=(1, inf), eval_frequency=(0, inf), eval_episodes=(0, inf),
        ).items():  # fmt: skip
            if not low <= getattr(self, name) <= high:
                sys.exit(f"--{name.replace('_', '-')} must be in [{low}, {high}]")


TUNED = {  # defaults that differ by task; options on the command line override these
    "Ant": dict(hide="velocities"),
    "CueRecall": dict(learning_starts=1_000),
    "HalfCheetah": dict(hide="velocities", exploration_noise=0.4, exploration_noise_z=0.01),
    "Hopper": dict(hide="velocities", exploration_noise_z=0.01),
    "Humanoid": dict(hide="velocities", exploration_noise_z=0.01, actor_lr=1e-4),
    "HumanoidStandup": dict(hide="velocities", exploration_noise_z=0.01, actor_lr=1e-4),
    "InvertedDoublePendulum": dict(hide="velocities", learning_starts=1_000, policy_frequency=1),
    "InvertedPendulum": dict(hide="velocities", learning_starts=1_000, policy_frequency=1),
    "Swimmer": dict(hide="velocities"),
    "Walker2d": dict(hide="velocities"),
}


class DeterministicStatefulActor(nn.Module):
    """The deterministic policy and internal-state kernel (a, z') = mu(o, z, a_prev).

    A recurrent cell gives z', from which the policy reads the action. In training noise is added to
    both, to z' after the policy has read it.

    Shapes: o [B, O]; z, z' [B, Z] in [-1, 1]; a, a_prev [B, A] in [-1, 1]. For an LSTM
    z = (h, tanh c), which carries the cell state in the same interval and so clips it at +-7.25.
    """

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.rnn, self.action_dim = args.rnn, action_dim
        self.noise_a, self.noise_z = args.exploration_noise, args.exploration_noise_z
        self.state_dim = 0 if args.memoryless else args.state_dim
        self.z_dim = 2 * self.state_dim if args.rnn == "lstm" else self.state_dim
        self.policy_obs = nn.Linear(obs_dim, 256)
        if self.state_dim > 0:
            self.kernel_obs = nn.Linear(obs_dim, 128)
            self.kernel_action = nn.Linear(action_dim, 128)
            self.cell = getattr(nn, f"{args.rnn.upper()}Cell")(256, self.state_dim)
        self.policy_hidden = nn.Linear(256 + self.state_dim, 256)
        self.policy_head = nn.Linear(256, action_dim)

    def noise_free_z(self, obs, z, a_prev):
        """mu_z [B, Z]: the internal state after `obs`, without noise."""
        if self.state_dim == 0:
            return z
        e = torch.relu_(torch.cat([self.kernel_obs(obs), self.kernel_action(a_prev)], -1))
        if self.rnn == "lstm":
            h, tanh_c = z.chunk(2, -1)
            h, c = self.cell(e, (h, atanh(tanh_c)))
            return torch.cat([h, torch.tanh(c)], -1)
        return self.cell(e, z)

    def forward(self, obs, z, a_prev):
        """a [B, A] and z' [B, Z] without noise."""
        z_next = self.noise_free_z(obs, z, a_prev)
        features = torch.cat([torch.relu_(self.policy_obs(obs)), z_next[..., : self.state_dim]], -1)
        a = torch.tanh(self.policy_head(torch.relu_(self.policy_hidden(features))))
        return a, z_next

    @torch.no_grad()
    def act(self, obs, z, a_prev, deterministic=False):
        """a [B, A] and z' [B, Z], both with the behaviour's noise or both without."""
        a, z_next = self(obs, z, a_prev)
        if deterministic:
            return a, z_next
        return perturbed(a, self.noise_a), perturbed(z_next, self.noise_z)


def perturbed(x, std, noise_clip=math.inf):
    """x + noise in [-1, 1], where the noise is normal with `std` and clipped at `noise_clip`."""
    noise = (std * torch.randn_like(x)).clamp(-noise_clip, noise_clip)
    return (x + noise).clamp(-1, 1)


def atanh(x):
    """Inverse of tanh, finite where float32 has rounded a tanh to -1 or 1."""
    return torch.atanh((1 - 1e-6) * x)


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


def td3_critic_loss(target_actor, critic, target_critic, batch, policy_noise, noise_clip, gamma):
    """sum_i E[(Q_i(s, a, z', a_prev) - y)^2]; also Q_1, Q_2 [2, B].

    y = r + gamma (1 - d) min_i Q'_i(s', a'', z'', a) with clipped noise on a'' and z'', where
    the action just taken is the next a_prev. It bootstraps through time limits: d is `terminated`.
    """
    with torch.no_grad():
        a, z = target_actor(batch.next_obs, batch.next_z, batch.action)
        a = perturbed(a, policy_noise, noise_clip)
        z = perturbed(z, 0.5 * target_actor.noise_z, 1.25 * target_actor.noise_z)
        next_q = target_critic(batch.next_state, a, z, batch.action).amin(0)
        target = batch.reward + gamma * (1 - batch.terminated) * next_q
    q = critic(batch.state, batch.action, batch.next_z, batch.a_prev)
    return (batch.weight * (q - target).square()).sum(), q.detach()


def td3_actor_loss(actor, critic, batch):
    """-E[Q_1(s, mu_a, mu_z, a_prev)]; also mu_z [B, Z], detached."""
    a, z = actor(batch.obs, batch.z, batch.a_prev)
    q = critic(batch.state, a, z, batch.a_prev)[0]
    return -(batch.weight * q).sum(), z.detach()


class S2PGTD3(nn.Module):
    """Networks and optimisers, and the update that trains them."""

    def __init__(self, args, env, device):
        super().__init__()
        self.args, self.device = args, device
        space = env.single_observation_space
        obs_dim, critic_dim = (view.shape[0] for view in views(getattr(space, "spaces", space)))
        self.action_dim = action_dim = env.single_action_space.shape[0]
        privileged = getattr(env, "critic_sees_more", obs_dim != critic_dim)
        self.actor = DeterministicStatefulActor(obs_dim, action_dim, args)
        self.target_actor = DeterministicStatefulActor(obs_dim, action_dim, args)
        self.z_dim = self.actor.z_dim
        critic_state = critic_dim if privileged else obs_dim + self.z_dim  # s, or (o, z)
        inputs = critic_state + action_dim + self.z_dim + action_dim  # s, a, z', a_prev
        self.critic, self.target_critic = TwinCritic(inputs), TwinCritic(inputs)
        self.target_actor.requires_grad_(False).load_state_dict(self.actor.state_dict())
        self.target_critic.requires_grad_(False).load_state_dict(self.critic.state_dict())
        self.to(device)
        self.register_buffer("updates", torch.tensor(0))  # on the CPU, so that no one waits for it

        adam = dict(fused=True, capturable=args.cudagraphs)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), args.critic_lr, **adam)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), args.actor_lr, **adam)
        self.optimizers = [self.critic_optimizer, self.actor_optimizer]
        compiled = torch.compile if args.compile else lambda function: function
        self.critic_loss, self.actor_loss = compiled(td3_critic_loss), compiled(td3_actor_loss)
        self.act = self.actor.act
        self.learn_critic = functools.partial(self.learn, everything=False)
        self.learn_all = functools.partial(self.learn, everything=True)
        if args.cudagraphs:
            self.act = Graphed(self.act)
            self.learn_critic, self.learn_all = Graphed(self.learn_critic), Graphed(self.learn_all)
        self.losses = {}
        self.row_sizes = obs_dim, critic_dim if privileged else 0, self.z_dim, action_dim

    def update(self, buffer):
        """One gradient step of the critic, of everything in every `policy_frequency`-th call.

        Returns what to log, as tensors on the device; the actor's loss is that of its last step.
        """
        self.updates += 1
        everything = int(self.updates) % self.args.policy_frequency == 0
        self.losses |= (self.learn_all if everything else self.learn_critic)(buffer)
        return dict(self.losses)

    def learn(self, buffer, everything):
        """One gradient step of the critic, or of everything; returns what to log of it."""
        args = self.args
        batch = buffer.sample(args.batch_size)
        qf_loss, q = self.critic_loss(
            self.target_actor, self.critic, self.target_critic, batch,
            args.policy_noise, args.noise_clip, args.gamma,
        )  # fmt: skip
        descend(self.critic_optimizer, qf_loss)
        losses = dict(qf_values=(batch.weight * q).sum() / 2, qf_loss=qf_loss)

        if everything:
            actor_loss, z_next = self.actor_loss(self.actor, self.critic, batch)
            descend(self.actor_optimizer, actor_loss)
            losses["actor_loss"] = actor_loss
            with torch.no_grad():  # theta' <- theta' + tau (theta - theta')
                targets = [*self.target_actor.parameters(), *self.target_critic.parameters()]
                online = [*self.actor.parameters(), *self.critic.parameters()]
                torch._foreach_lerp_(targets, online, args.tau)
            # from the means of the actor loss, one gradient step old and free
            buffer.refresh(batch, perturbed(z_next, args.exploration_noise_z))
        return {f"losses/{name}": value.detach() for name, value in losses.items()}


Agent = S2PGTD3  # what `train` works with


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
