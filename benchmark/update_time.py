"""Milliseconds per gradient step: S2PG-SAC, memoryless SAC, BPTT-SAC, and S2PG's floor.

    python benchmark/update_time.py --env-id Hopper-v4
    python benchmark/update_time.py --env-id Humanoid-v4 --device cuda

Every method has the sizes of the environment, the same number of transitions in a batch and a full
step: sampling, critic, actor, temperatures, targets, refresh. The methods take turns, round after
round, so that a busy machine slows all of them alike; the table gives medians over the rounds, and
ratios taken within a round. The floor is the time of the matrix products of one S2PG-SAC step
alone, forward and backward, replayed on the same operands.
"""

import dataclasses
import os
import platform
import sys
import time
from pathlib import Path
from typing import Literal

if __name__ == "__main__" and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.tcache_count=0"  # as the scripts do, and say why
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

import numpy as np
import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bptt_sac
import envs
import s2pg_sac


@dataclasses.dataclass
class Args:
    env_id: str = "Hopper-v4"
    """environment that gives the sizes, with hidden velocities"""
    device: str = "cpu"
    """torch device"""
    batch_size: int = 256
    """transitions in an update"""
    rounds: int = 15
    """times that each method takes its turn"""
    updates: int = 10
    """updates in a turn"""
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
        loss, _ = s2pg_sac.soft_critic_loss(
            agent.actor, agent.critic, agent.target_critic, batch, alpha, agent.args.gamma
        )
        s2pg_sac.descend(agent.critic_optimizer, loss)

    def actor_and_temperatures():
        loss, _, entropy, entropy_z = s2pg_sac.soft_actor_loss(
            agent.actor, agent.critic, batch, alpha, alpha_z
        )
        loss = loss + s2pg_sac.temperature_loss(agent.log_alpha, entropy, -agent.action_dim)
        loss = loss + s2pg_sac.temperature_loss(agent.log_alpha_z, entropy_z, -agent.z_dim)
        s2pg_sac.descend(agent.actor_optimizer, loss)

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


def main(args: Args):
    torch.set_num_threads(args.num_threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    device = torch.device(args.device)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    env = envs.make(args.env_id, hide="velocities")
    obs_dim, critic_dim = (env.observation_space[key].shape[0] for key in ("policy", "critic"))
    action_dim = env.action_space.shape[0]

    options = dict(batch_size=args.batch_size, buffer_size=20_000)
    bptt = {
        f"BPTT-SAC, L = {length:2d}, {loss_on}": dict(sequence_length=length, loss_on=loss_on)
        for length, loss_on in [(5, "last"), (32, "last"), (64, "last"), (32, "all"), (64, "all")]
    }
    s2pg = {"memoryless SAC": dict(memoryless=True), "S2PG-SAC": {}}
    steps, agents = {}, {}
    for script, agent_class, variants in [
        (s2pg_sac, s2pg_sac.S2PGSAC, s2pg),
        (bptt_sac, bptt_sac.BPTTSAC, bptt),
    ]:
        for name, variant in variants.items():
            variant_args = script.Args(**options, **variant)
            agent = agent_class(variant_args, obs_dim, critic_dim, action_dim, True, device)
            buffer = fill(agent.make_buffer(), 10_000, action_dim)
            steps[name] = lambda agent=agent, buffer=buffer: agent.update(buffer)
            agents[name] = agent, buffer

    agent, buffer = agents["S2PG-SAC"]
    with RecordMatmuls() as record:
        agent.update(buffer)

    def floor():
        for function, operands in record.calls:
            function(*operands)

    steps["S2PG-SAC, matrix products alone"] = floor
    for name, step in pieces(agent, buffer).items():
        steps[f"S2PG-SAC, {name}"] = step

    milliseconds = {name: [] for name in steps}
    for turn in range(args.rounds + 1):
        for name, step in steps.items():
            synchronize()
            begin = time.perf_counter()
            for _ in range(args.updates):
                step()
            synchronize()
            if turn > 0:  # the first warms up
                milliseconds[name].append(1e3 * (time.perf_counter() - begin) / args.updates)

    if device.type == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"{cpu_name()}, {args.num_threads} thread(s)"
    versions = f"torch {torch.__version__}, matmul precision {args.matmul_precision}"
    sizes = f"o {obs_dim}, s {critic_dim}, a {action_dim}, batch {args.batch_size}"
    print(f"{args.env_id} ({sizes}) on {hardware}; {versions}\n")
    print(f"{'ms per gradient step':34s} {'median':>7s} {'x memoryless':>13s} {'x S2PG':>7s}")
    milliseconds = {name: np.array(times) for name, times in milliseconds.items()}
    for name, times in milliseconds.items():
        ratios = [np.median(times / milliseconds[base]) for base in s2pg]
        print(f"{name:34s} {np.median(times):7.2f} {ratios[0]:13.2f} {ratios[1]:7.2f}")
    ratio = np.median(milliseconds["S2PG-SAC"] / milliseconds["S2PG-SAC, matrix products alone"])
    work = f"{len(record.calls)} products, {gigaflops(record.calls):.2f} GFLOP"
    print(f"\nS2PG-SAC takes {ratio:.2f} x its floor ({work})")
    print(f"replay buffer of 1e6 rows: {buffer_bytes(agent, 1_000_000) / 1e9:.2f} GB")


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
