"""Speed of all methods on a task with hidden velocities: one table for each algorithm.

    python benchmark/update_time.py --env-id Hopper-v4
    python benchmark/update_time.py --env-id Humanoid-v4 --device cuda --cudagraphs --compile
    python benchmark/update_time.py --algorithms sac --methods S2PG --baseline FOLDER

SAC and TD3: milliseconds per gradient step of everything (sampling, critic, actor, temperatures,
targets, refresh), for S2PG, the same without an internal state, and BPTT, all with the same number
of transitions in a batch; and of the matrix products of an S2PG step alone, forward and backward,
replayed on the same operands. SAC Flow: the same for its velocities. PPO: milliseconds per epoch
over a rollout, a tenth of ten epochs. Runs of SAC and PPO: milliseconds of an environment
step of a whole run, the simulator included, and of one without updates, for 1, 4 and 16
environments.

What is timed is what `train` of a script does: the update is caught in a run, with its arguments,
and repeated. The methods take turns, round after round, so that a busy machine slows all of them
alike; a table gives medians over the rounds, and ratios taken within a round. `--baseline` is a
checkout of another commit, whose methods take turns with these.
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import itertools
import os
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark.sweep import check_names, cpu_name

METHODS = {  # {algorithm: {method: options, and the script}}
    "sac": {
        "memoryless": dict(name="s2pg_sac", memoryless=True),
        "S2PG, Sobolev": dict(name="s2pg_sac", sobolev=1.0),
        "S2PG": dict(name="s2pg_sac"),
    }
    | {
        f"BPTT, L = {n}, {rows}": dict(name="bptt_sac", sequence_length=n, loss_on=rows)
        for rows, n in (("last", 5), ("last", 32), ("last", 64), ("all", 32), ("all", 64))
    },
    "td3": {
        "memoryless": dict(name="s2pg_td3", memoryless=True),
        "S2PG": dict(name="s2pg_td3"),
    },
    "ppo": {
        "memoryless": dict(name="s2pg_ppo", memoryless=True),
        "S2PG": dict(name="s2pg_ppo"),
    }
    | {f"BPTT, L = {n}": dict(name="bptt_ppo", sequence_length=n) for n in (16, 32, 64, 256)},
    "flow": {"Gaussian": dict(name="flow_sac", velocity="none")}
    | {
        f"{label}, K = {n}": dict(
            name="flow_sac", velocity=velocity, flow_width=width, flow_steps=n
        )
        for label, velocity, width in (
            ("naive", "mlp", 256),
            ("Flow-G", "flow_g", 256),
            ("Flow-T", "flow_t", 96),
        )
        for n in (4, 10)
    },
}
IN_RUNS = "memoryless", "S2PG", "BPTT, L = 32", "BPTT, L = 32, all"  # methods of whole runs
SCRIPTS = "s2pg_sac", "bptt_sac", "s2pg_td3", "s2pg_ppo", "bptt_ppo", "flow_sac"


@dataclasses.dataclass
class Args:
    env_id: str = "Hopper-v4"  # a MuJoCo task
    device: Literal["cpu", "cuda"] = "cpu"  # where the networks are
    batch_size: int = 256  # transitions in an update of SAC and TD3
    algorithms: tuple[Literal["sac", "td3", "ppo", "flow", "runs"], ...] = (
        "sac", "td3", "ppo", "flow", "runs",
    )  # fmt: skip
    methods: tuple[str, ...] = ()  # names as in the tables; by default all
    baseline: Path | None = None  # checkout of another commit, to be measured beside this one
    compile: bool = False  # as in the scripts, on CUDA
    cudagraphs: bool = False  # as in the scripts, on CUDA
    rounds: int = 15  # turns of each method; a third of it for PPO and runs, whose turns are longer
    updates: int = 10  # updates in a turn of SAC, TD3 and flows; one for PPO
    num_threads: int = 1  # CPU threads of torch
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # of float32 products

    def __post_init__(self):
        if self.device == "cpu" and (self.compile or self.cudagraphs):
            sys.exit("--compile and --cudagraphs are for --device cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            sys.exit("there is no CUDA card")
        check_names("method", self.methods, set().union(*METHODS.values()))
        if self.baseline and not Path(self.baseline, "s2pg_sac.py").exists():
            sys.exit(f"{self.baseline} is no checkout: it holds no s2pg_sac.py")
        if min(self.rounds, self.updates, self.batch_size) < 1:
            sys.exit("--rounds, --updates and --batch-size must be at least 1")


class Caught(Exception):
    """Ends a run at its first update: the agent, its update, and the arguments of that."""


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


def scripts_of(folder):
    """{name: module} of the scripts of a checkout, and of the `envs` that go with them."""

    def ours():
        return {k: v for k, v in sys.modules.items() if k.split(".")[0] in ("envs", *SCRIPTS)}

    for name in ours():
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tasks of `envs` are registered again
        for name in ("envs", *SCRIPTS):
            if name == "envs" or Path(folder, f"{name}.py").exists():
                importlib.import_module(name)
    sys.path.pop(0)
    return ours()


def run(modules, name, update, **options):
    """A run of a script in which `update(agent, own_update, *args)` stands for its update.

    Returns the steps at which the run logged its speed, and the times in seconds.
    """
    sys.modules.update(modules)  # a script imports `envs` when it needs it
    script, log = modules[name], []

    class Agent(script.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            self.update = functools.partial(update, self, self.update)

    class Writer(script.SummaryWriter):
        def add_scalar(self, tag, value, step):
            super().add_scalar(tag, value, step)
            if tag == "charts/SPS":
                log.append((step, time.perf_counter()))

    own = {part: getattr(script, part) for part in ("Agent", "SummaryWriter", "tqdm")}
    script.Agent, script.SummaryWriter = Agent, Writer
    script.tqdm = functools.partial(script.tqdm, disable=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            script.train(script.Args(eval_frequency=0, **options))
    finally:
        vars(script).update(own)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # `train` has its own
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return log


def catch(modules, name, **options):
    """The agent and the first update of a run, to be repeated."""

    def stop(agent, own_update, *args):
        raise Caught(agent, own_update, *args)

    try:
        run(modules, name, stop, **options)
    except Caught as caught:
        agent, own_update, *args = caught.args
    kept = dict(vars(args[0]))

    def step():
        vars(args[0]).update(kept)  # an update of PPO takes the rows for used
        own_update(*args)

    return agent, step


def run_time(modules, name, first, steps, updates=True, **options):
    """Milliseconds of an environment step, from the first log after step `first` to the last."""

    def update(agent, own_update, *args):
        return own_update(*args) if updates else {}

    log = run(modules, name, update, total_timesteps=first + steps, **options)
    (begin_step, begin), *_, (end_step, end) = [point for point in log if point[0] >= first]
    return 1e3 * (end - begin) / (end_step - begin_step)


def matrix_products(step):
    """A function that replays the matrix products of two updates in turn."""
    # TD3's updates differ: each second one moves the actor, too
    recorded = [RecordMatmuls(), RecordMatmuls()]
    for record in recorded:
        with record:
            step()
    turns = itertools.cycle(recorded)

    def replay():
        for function, operands in next(turns).calls:
            function(*operands)

    return replay


def timed(step, repeats, device):
    """A function that returns milliseconds of one step."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def measure():
        synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        synchronize()
        return 1e3 * (time.perf_counter() - begin) / repeats

    return measure


def take_turns(measures, rounds):
    """{method: milliseconds [rounds]}; a first round warms up."""
    rows = [[measure() for measure in measures.values()] for _ in range(rounds + 1)]
    return dict(zip(measures, np.array(rows[1:]).T))


def print_table(title, times):
    """Medians; ratios to memoryless, S2PG or Gaussian; those to the baseline with quartiles."""
    bases = [base for base in ("memoryless", "S2PG", "Gaussian") if base in times]
    print(f"\n{title:38s} {'median':>7s}", *(f"{f'x {base}':>13s}" for base in bases))
    for name, own in times.items():
        ratios = [np.median(own / times[base]) for base in bases]
        print(f"{name:38s} {np.median(own):7.2f}", *(f"{ratio:13.2f}" for ratio in ratios))
    print()  # what follows is no part of the table
    for name in times:
        if f"{name} before" in times:
            low, middle, high = np.percentile(times[name] / times[f"{name} before"], (25, 50, 75))
            print(f"{name}: {middle:.3f} x before (quartiles {low:.3f} and {high:.3f})")


def update_table(algorithm, methods, options, args):
    rounds, repeats, epochs = args.rounds, args.updates, 1
    title = f"{algorithm.upper()}, ms per gradient step of {args.batch_size}"
    sizes = dict(num_envs=16, learning_starts=5_000, buffer_size=20_000, batch_size=args.batch_size)
    if algorithm == "ppo":
        rounds, repeats, epochs = max(1, rounds // 3), 1, 10
        title = "PPO, ms per epoch over 2048 rows"
        sizes = dict(num_envs=1, num_steps=2048, update_epochs=epochs)
    options = options | sizes
    steps = {name: catch(**method, **options)[1] for name, method in methods.items()}
    if algorithm != "ppo" and "S2PG" in methods and not args.cudagraphs:
        # of what is compiled the products cannot be seen
        _, step = catch(**methods["S2PG"], **options | dict(compile=False))
        steps["S2PG, matrix products alone"] = matrix_products(step)
    measures = {name: timed(step, repeats, args.device) for name, step in steps.items()}
    times = {name: own / epochs for name, own in take_turns(measures, rounds).items()}
    print_table(title, times)


def runs_table(algorithm, methods, num_envs, options, args):
    sizes = dict(first=600, steps=300, learning_starts=500, batch_size=args.batch_size)
    if algorithm == "ppo":
        sizes = dict(first=1, steps=4096, num_steps=2048 // num_envs)  # the first rollout warms up
    measures, idle = {}, ", no updates"
    for name, method in methods.items():
        if name.removesuffix(" before") in IN_RUNS:
            measures[name] = functools.partial(
                run_time, **method, **options, **sizes, num_envs=num_envs
            )
            measures[name + idle] = functools.partial(measures[name], updates=False)
    times = take_turns(measures, max(1, args.rounds // 3))
    print_table(f"{algorithm.upper()}, ms of a step of a run, {num_envs} envs", times)
    speeds = {name: f"{1e3 / np.median(own):.0f}" for name, own in times.items()}
    whole = [f"{name} {speed}" for name, speed in speeds.items() if not name.endswith(idle)]
    print("environment steps per second:", ", ".join(whole))
    alone = [f"{n.removesuffix(idle)} {speed}" for n, speed in speeds.items() if n.endswith(idle)]
    alone = ", ".join(alone).replace(", L = 32", "").replace(", all", "")
    print("environment steps per second without updates:", alone)


def main(args: Args):
    torch.set_num_threads(args.num_threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    options = dict(
        env_id=args.env_id, hide="velocities", privileged_critic=True, cuda=args.device == "cuda",
        compile=args.compile, cudagraphs=args.cudagraphs, num_threads=args.num_threads,
        matmul_precision=args.matmul_precision,
    )  # fmt: skip
    commits = {"": scripts_of(ROOT)}
    if args.baseline:
        commits[" before"] = scripts_of(args.baseline.resolve())
    chosen = {
        algorithm: {
            name + suffix: method | dict(modules=modules)
            for name, method in methods.items()
            for suffix, modules in commits.items()
            if (not args.methods or name in args.methods) and method["name"] in modules
        }
        for algorithm, methods in METHODS.items()
    }

    sys.modules.update(commits[""])
    sac = commits[""]["s2pg_sac"]
    env = sac.make_env(sac.Args(env_id=args.env_id, hide="velocities"), 1)
    o, s = (view.shape[0] for view in sac.views(env.single_observation_space.spaces))
    hardware = f"{cpu_name()}, {args.num_threads} thread(s)"
    if args.device == "cuda":
        hardware = torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, matmul precision {args.matmul_precision}"
    versions += ", compiled" * args.compile + ", CUDA graphs" * args.cudagraphs
    (a,) = env.single_action_space.shape
    print(f"{args.env_id} (o {o}, s {s}, a {a}) on {hardware}; {versions}")

    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # for what the runs write
        for algorithm in ("sac", "td3", "ppo", "flow"):
            if algorithm in args.algorithms and chosen[algorithm]:
                update_table(algorithm, chosen[algorithm], options, args)
        for algorithm, num_envs in itertools.product(("sac", "ppo"), (1, 4, 16)):
            if "runs" in args.algorithms and chosen[algorithm]:
                runs_table(algorithm, chosen[algorithm], num_envs, options, args)
        os.chdir(here)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
