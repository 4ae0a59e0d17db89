"""Speed of all methods, on random data of a task's sizes: one table for each algorithm.

    python benchmark/update_time.py --env-id Hopper-v4
    python benchmark/update_time.py --env-id Humanoid-v4 --device cuda --cudagraphs --compile

SAC and TD3: milliseconds per gradient step of everything (sampling, critic, actor, temperatures,
targets, refresh), for S2PG, the same without a memory, and BPTT, all with the same number of
transitions in a batch. The floor is the time of the matrix products of one S2PG step alone,
forward and backward, replayed on the same operands. PPO: milliseconds per epoch over a rollout, a
tenth of an update of ten; and environment steps per second while collecting one, the simulator
included. Runs: milliseconds of each part of a training step of S2PG-SAC, and of the whole, with one
update per environment step, for 1 and for 16 environments.

The methods take turns, round after round, so that a busy machine slows all of them alike; a table
gives medians over the rounds, and ratios taken within a round.
"""

import dataclasses
import functools
import itertools
import platform
import sys
import time
import types
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bptt_ppo
import bptt_sac
import s2pg_ppo
import s2pg_sac
import s2pg_td3


@dataclasses.dataclass
class Args:
    env_id: str = "Hopper-v4"
    """environment that gives the sizes, with hidden velocities"""
    device: str = "cpu"
    """torch device"""
    batch_size: int = 256
    """transitions in an update"""
    algorithms: tuple[Literal["sac", "td3", "ppo", "runs"], ...] = ("sac", "td3", "ppo", "runs")
    """tables to print"""
    compile: bool = False
    """as in the scripts, for CUDA"""
    cudagraphs: bool = False
    """as in the scripts, for CUDA"""
    rounds: int = 15
    """times that each method takes its turn; a third of it for PPO, whose turns are longer"""
    updates: int = 10
    """updates in a turn of SAC and TD3"""
    num_threads: int = 1
    """CPU threads of torch"""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """of float32 matrix products"""


class RecordMatmuls(TorchDispatchMode):
    """Collects the matrix products that run under it, as (function, operands)."""

    names = ("mm", "addmm", "bmm", "baddbmm")

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in self.names:
            self.calls.append((function, [a.clone() if torch.is_tensor(a) else a for a in args]))
        return function(*args, **(kwargs or {}))


def gigaflops(calls):
    """Multiplications and additions of the recorded products, in 1e9."""
    total = 0
    for _, args in calls:
        left, right = [a for a in args if torch.is_tensor(a)][-2:]
        total += 2 * left.numel() * right.shape[-1]
    return total / 1e9


def fill(buffer, rows, action_dim, episode_length=200):
    """Random rows, with episodes of 200 steps."""
    n = buffer.num_envs
    dims = buffer.obs.shape[1], buffer.critic_obs.shape[1]
    for step in range(rows):
        buffer.add(
            *(torch.randn(n, dim, device=buffer.device) for dim in dims),
            torch.tanh(torch.randn(n, buffer.z.shape[1], device=buffer.device)),
            torch.tanh(torch.randn(n, action_dim, device=buffer.device)),
            np.random.default_rng(step).normal(size=n),
            np.zeros(n, dtype=bool),
            np.full(n, step % (episode_length + 1) == 0),
        )
    return buffer


def buffer_bytes(agent, size):
    """Bytes of the tensors of a replay buffer, each storage once."""
    agent.args.buffer_size, before = size, agent.args.buffer_size
    tensors = [v for v in vars(agent.make_buffer()).values() if torch.is_tensor(v)]
    agent.args.buffer_size = before
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def pieces(agent, buffer):
    """The parts of one S2PG-SAC update, each to be timed on its own."""
    alpha, alpha_z = agent.log_alpha.detach().exp(), agent.log_alpha_z.detach().exp()
    batch = buffer.sample(agent.args.batch_size, agent.critic_sees_z)

    def critic():
        loss, _ = agent.critic_loss(
            agent.actor, agent.critic, agent.target_critic, batch, alpha, agent.args.gamma
        )
        s2pg_sac.descend(agent.critic_optimizer, loss)

    def actor_and_temperatures():
        loss, _, entropy, entropy_z = agent.actor_loss(
            agent.actor, agent.critic, batch, alpha, alpha_z
        )
        loss = loss + s2pg_sac.temperature_loss(agent.log_alpha, entropy, -agent.action_dim)
        loss = loss + s2pg_sac.temperature_loss(agent.log_alpha_z, entropy_z, -agent.z_dim)
        s2pg_sac.descend(agent.actor_optimizer, loss)

    @torch.no_grad()
    def targets():
        torch._foreach_lerp_(
            list(agent.target_critic.parameters()), list(agent.critic.parameters()), 0.005
        )

    return {
        "sampling": lambda: buffer.sample(agent.args.batch_size, agent.critic_sees_z),
        "critic": critic,
        "actor and temperatures": actor_and_temperatures,
        "targets": targets,
        "refresh": lambda: buffer.refresh(batch, batch.next_z),
    }


def fill_rollout(agent, rollout, sizes, episode_length=1000):
    """Rows of random observations, with what the agent does there and episodes of 1000 steps."""
    n, (obs_dim, critic_dim, action_dim) = rollout.first.shape[1], sizes
    inputs = obs_dim, critic_dim, agent.z_dim, action_dim
    obs, critic_obs, z, a_prev = (torch.zeros(n, dim, device=agent.device) for dim in inputs)
    for step in range(len(rollout.first)):
        obs.normal_()
        critic_obs.normal_()
        action, z_next, log_prob, value = agent.act(obs, critic_obs, z, a_prev)
        rollout.add(
            obs=obs, critic_obs=critic_obs, z=z, a_prev=a_prev, action=action, log_prob=log_prob,
            value=value, reward=torch.randn(n), terminated=torch.zeros(n, dtype=torch.bool),
            first=torch.full((n,), step % (episode_length + 1) == 0),
        )  # fmt: skip
        z.copy_(z_next)
        torch.clamp(action, -1, 1, out=a_prev)


def off_policy(script, bptt, sizes, args):
    """{method: a gradient step} of S2PG, memoryless and BPTT; the agent and buffer of S2PG."""
    variants = {"memoryless": (script, dict(memoryless=True)), "S2PG": (script, {})}
    if bptt is not None:
        for length, loss_on in [(5, "last"), (32, "last"), (64, "last"), (32, "all"), (64, "all")]:
            variant = dict(sequence_length=length, loss_on=loss_on)
            variants[f"BPTT, L = {length}, {loss_on}"] = bptt, variant
    steps = {}
    for name, (module, variant) in variants.items():
        variant |= dict(compile=args.compile, cudagraphs=args.cudagraphs)
        options = module.Args(batch_size=args.batch_size, buffer_size=20_000, **variant)
        agent = module.Agent(options, *sizes, True, torch.device(args.device))
        buffer = fill(agent.make_buffer(), 10_000, sizes[-1])
        steps[name] = functools.partial(agent.update, buffer)
        if name == "S2PG":
            s2pg = agent, buffer
    return steps, *s2pg


def matrix_products(agent, buffer, updates=2):
    """The matrix products of as many updates, each to be replayed in turn, and their GFLOP."""
    calls = []
    for _ in range(updates):  # TD3's updates differ: each second one moves the actor, too
        with RecordMatmuls() as record:
            agent.update(buffer)
        calls.append(record.calls)
    turns = itertools.cycle(calls)

    def replay():
        for function, operands in next(turns):
            function(*operands)

    return replay, sum(map(gigaflops, calls)) / updates


def on_policy(sizes, args):
    """{method: ten epochs over a rollout} of S2PG, memoryless and BPTT."""
    variants = {"memoryless": (s2pg_ppo, dict(memoryless=True)), "S2PG": (s2pg_ppo, {})}
    for length in (16, 32, 64, 256):
        variants[f"BPTT, L = {length}"] = bptt_ppo, dict(sequence_length=length)
    steps = {}
    for name, (module, variant) in variants.items():
        options = module.Args(compile=args.compile, cudagraphs=args.cudagraphs, **variant)
        agent = module.Agent(options, *sizes, True, torch.device(args.device))
        rollout = agent.make_rollout()
        fill_rollout(agent, rollout, sizes)

        def step(agent=agent, rollout=rollout):
            rollout.length = len(rollout.first)  # an update takes the rows for used
            agent.update(rollout)

        steps[name] = step
    return steps


def rollouts(args, num_envs, rows=512):
    """{method: collect 512 rows} in `num_envs` environments."""
    variants = {"memoryless": (s2pg_ppo, dict(memoryless=True)), "S2PG": (s2pg_ppo, {})}
    variants["BPTT"] = bptt_ppo, {}
    steps = {}
    for name, (module, variant) in variants.items():
        options = module.Args(
            env_id=args.env_id, hide="velocities", privileged_critic=True, num_envs=num_envs,
            num_steps=rows // num_envs, cudagraphs=args.cudagraphs, **variant,
        )  # fmt: skip
        env = module.make_env(options, num_envs)
        agent = module.Agent(options, *module.dimensions(env), torch.device(args.device))
        inputs = Inputs(env, agent)
        steps[name] = functools.partial(collect, agent, env, agent.make_rollout(), inputs)
    return steps


class Inputs:
    """What an agent acts on, written in place as `train` does."""

    def __init__(self, env, agent):
        self.device, sizes = agent.device, list(s2pg_sac.dimensions(env)[:2])

        def zeros(dim):
            return torch.zeros(env.num_envs, dim, device=agent.device)

        self.both_obs = zeros(sum(sizes))
        self.policy_obs, self.critic_obs = self.both_obs.split(sizes, -1)
        self.z, self.a_prev = zeros(agent.z_dim), zeros(agent.action_dim)

    def see(self, obs):
        both = np.concatenate([obs["policy"], obs["critic"]], -1)
        self.both_obs.copy_(s2pg_sac.to_device(both, self.device))

    def remember(self, z, action, final):
        """Nothing, where the row was a `final` one."""
        keep = s2pg_sac.to_device(~final, self.device).unsqueeze(-1)
        torch.mul(z, keep, out=self.z)
        torch.mul(action, keep, out=self.a_prev)


def collect(agent, env, rollout, inputs):
    """Fill a rollout, as `train` does."""
    n = env.num_envs
    inputs.see(env.reset()[0])
    inputs.remember(inputs.z, inputs.a_prev, np.ones(n, dtype=bool))
    first, final = np.ones(n, dtype=bool), np.zeros(n, dtype=bool)
    for _ in range(len(rollout.first) - 1):
        seen = inputs.policy_obs, inputs.critic_obs, inputs.z, inputs.a_prev
        action, z_next, log_prob, value = agent.act(*seen)
        clipped = action.clamp(-1, 1)
        next_obs, reward, terminated, truncated, _ = env.step(clipped.cpu().numpy())
        rollout.add(
            **dict(zip(("obs", "critic_obs", "z", "a_prev"), seen)), action=action,
            log_prob=log_prob, value=value, reward=reward, terminated=terminated, first=first,
        )  # fmt: skip
        inputs.remember(z_next, clipped, final)
        inputs.see(next_obs)
        first, final = final, terminated | truncated
    rollout.clear()


def training_steps(args, num_envs):
    """{part: do it once} of S2PG-SAC's training with `num_envs` environments, and of the whole.

    To store a row is to show the agent the next observation and memory as well.
    """
    options = s2pg_sac.Args(
        env_id=args.env_id, hide="velocities", num_envs=num_envs, batch_size=args.batch_size,
        buffer_size=20_000, compile=args.compile, cudagraphs=args.cudagraphs,
    )  # fmt: skip
    env, device = s2pg_sac.make_env(options, num_envs), torch.device(args.device)
    agent = s2pg_sac.Agent(options, *s2pg_sac.dimensions(env), device)
    buffer = fill(agent.make_buffer(), 10_000 // num_envs, agent.action_dim)
    inputs, now = Inputs(env, agent), types.SimpleNamespace()
    inputs.see(env.reset()[0])

    def act():
        now.action, now.z = agent.act(inputs.policy_obs, inputs.z, inputs.a_prev)
        now.a = now.action.cpu().numpy()

    def update():
        for _ in range(num_envs):
            agent.update(buffer)

    def step():
        now.obs, now.reward, now.terminated, truncated, _ = env.step(now.a)
        now.over = now.terminated | truncated

    def store():
        row = inputs.policy_obs, inputs.critic_obs, inputs.z, now.action, now.reward
        buffer.add(*row, now.terminated, now.over)
        inputs.remember(now.z, now.action, now.over)
        inputs.see(now.obs)

    def whole():
        act()
        update()
        step()
        store()

    act()
    parts = {"environment": step, "acting": act, "storing": store, "updates": update}
    return parts | {"whole step": whole}


def take_turns(steps, rounds, repeats, synchronize):
    """{method: milliseconds of one step [rounds]}."""
    milliseconds = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            synchronize()
            begin = time.perf_counter()
            for _ in range(repeats):
                step()
            synchronize()
            if turn > 0:  # the first warms up
                milliseconds[name].append(1e3 * (time.perf_counter() - begin) / repeats)
    return {name: np.array(times) for name, times in milliseconds.items()}


def print_table(title, milliseconds, bases=("memoryless", "S2PG")):
    """Medians, and the ratios to some of the methods."""
    print(f"\n{title:38s} {'median':>7s}", *(f"{f'x {base}':>13s}" for base in bases))
    for name, times in milliseconds.items():
        ratios = [np.median(times / milliseconds[base]) for base in bases]
        print(f"{name:38s} {np.median(times):7.2f}", *(f"{ratio:13.2f}" for ratio in ratios))


def main(args: Args):
    if "cuda" not in args.device and (args.compile or args.cudagraphs):
        sys.exit("update_time.py: --compile and --cudagraphs are for --device cuda")
    torch.set_num_threads(args.num_threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    synchronize = torch.cuda.synchronize if "cuda" in args.device else lambda: None
    env = s2pg_sac.make_env(s2pg_sac.Args(env_id=args.env_id, hide="velocities"), 1)
    *sizes, _ = s2pg_sac.dimensions(env)
    if "cuda" in args.device:
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"{cpu_name()}, {args.num_threads} thread(s)"
    versions = f"torch {torch.__version__}, matmul precision {args.matmul_precision}"
    versions += ", compiled" * args.compile + ", CUDA graphs" * args.cudagraphs
    print("{} (o {}, s {}, a {})".format(args.env_id, *sizes), f"on {hardware}; {versions}")

    for algorithm, script, bptt in [("sac", s2pg_sac, bptt_sac), ("td3", s2pg_td3, None)]:
        if algorithm not in args.algorithms:
            continue
        steps, agent, buffer = off_policy(script, bptt, sizes, args)
        eager = dataclasses.replace(args, compile=False, cudagraphs=False)  # compiled it hides them
        _, *recorded = off_policy(script, None, sizes, eager)
        replay, work = matrix_products(*recorded)
        if not args.cudagraphs:  # of a graph there are no parts
            steps["S2PG, matrix products alone"] = replay
        if algorithm == "sac" and not args.cudagraphs:
            steps |= {f"S2PG, {name}": step for name, step in pieces(agent, buffer).items()}
        times = take_turns(steps, args.rounds, args.updates, synchronize)
        title = f"{algorithm.upper()}, ms per gradient step of {args.batch_size}"
        print_table(title, times)
        print(f"an update of S2PG has {work:.2f} GFLOP of matrix products")
        if not args.cudagraphs:
            ratio = np.median(times["S2PG"] / times["S2PG, matrix products alone"])
            print(f"S2PG takes {ratio:.2f} x its floor")
        print(f"replay buffer of 1e6 rows: {buffer_bytes(agent, 1_000_000) / 1e9:.2f} GB")

    if "ppo" in args.algorithms:
        times = take_turns(on_policy(sizes, args), max(1, args.rounds // 3), 1, synchronize)
        epochs = s2pg_ppo.Args.update_epochs
        print_table("PPO, ms per epoch over 2048 rows", {k: v / epochs for k, v in times.items()})
        for num_envs in (1, 4, 16):
            times = take_turns(rollouts(args, num_envs), args.rounds, 1, synchronize)
            print_table(f"PPO, ms to collect 512 rows, {num_envs} envs", times)
            speeds = [f"{k} {512e3 / np.median(v):.0f}" for k, v in times.items()]
            print(f"rows per second: {', '.join(speeds)}")

    if "runs" in args.algorithms:
        for num_envs in (1, 16):
            times = take_turns(training_steps(args, num_envs), args.rounds, 10, synchronize)
            title = f"S2PG-SAC, ms of a step, {num_envs} envs"
            print_table(title, times, bases=["whole step"])
            speed = 1e3 * num_envs / np.median(times["whole step"])
            print(f"{speed:.0f} environment steps and updates per second")


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
