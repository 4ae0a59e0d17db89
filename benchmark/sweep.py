"""Run the claims of claims.py: every method on every task with every seed, unless it is done.

    python benchmark/sweep.py                                   # what there is, and what is done
    python benchmark/sweep.py cue_recall --seeds 1 2 3          # here, a run on each core
    python benchmark/sweep.py cue_recall --cluster slurm --slurm slurm_partition cpu timeout_min 600

A run is a process of one thread in a folder of its own, OUT/TASK__SCRIPT__HASH__SEED, where HASH is
that of its command, so claims share the runs whose commands are the same. Whatever is killed, the
runs or the sweep, the same command begun again finishes what is left: a run goes on from its last
checkpoint, which has the replay buffer as well. With `--cluster slurm` the runs go out as an array
job through submitit, which sends a run that meets its time limit to the queue again; `--cluster
local` takes the same way on this machine.
"""

import concurrent.futures
import dataclasses
import fcntl
import hashlib
import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple
from unittest import mock

import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark.claims import CLAIMS, HORIZONS

CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


@dataclasses.dataclass
class Args:
    claims: tyro.conf.Positional[tuple[str, ...]] = ()  # names of claims.py
    seeds: tuple[int, ...] = ()  # by default those of the claim
    tasks: tuple[str, ...] = ()  # ids of the environments, by default all of the claim
    methods: tuple[str, ...] = ()  # labels of the methods, by default all of the claim
    out: str = "runs/sweep"  # the folder of all runs
    cuda: bool = False  # use a CUDA card where there is one; these are runs of their own
    processes: int = CPUS  # runs at a time, here or of the array job
    cluster: Literal["none", "local", "slurm"] = "none"  # submit through submitit
    # parameters of submitit: `slurm_partition cpu timeout_min 600 mem_gb 4`; by default a day
    slurm: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_names("claim", self.claims, CLAIMS)
        if self.processes < 1:
            sys.exit("--processes must be at least 1")
        if self.cluster == "slurm" and shutil.which("srun") is None:
            sys.exit("--cluster slurm needs SLURM, and there is no srun here")


class Run(NamedTuple):
    label: str  # of the claim
    script: str
    options: tuple[str, ...]
    folder: Path


def check_names(kind, names, known):
    for name in set(names) - set(known):
        sys.exit(f"no {kind} {name!r}; there are {', '.join(map(repr, known))}")


def script_of(name):
    """The module of a script, of its path in the repository."""
    return importlib.import_module(name.removesuffix(".py").replace("/", "."))


def runs_of(claim, out, seeds=(), tasks=(), methods=(), cuda=False):
    """The runs of a claim."""
    task_ids = {task: task.split("--env-id ")[1].split()[0] for task in claim.tasks}
    check_names("task", tasks, task_ids.values())
    check_names("method", methods, claim.methods)
    runs = []
    for label, (task, env_id) in itertools.product(methods or claim.methods, task_ids.items()):
        if tasks and env_id not in tasks:
            continue
        command = claim.methods[label].replace("HORIZON", str(HORIZONS.get(env_id)))
        script, *own_options = command.split()
        options = [*task.split(), *own_options, *([] if cuda else ["--no-cuda"])]
        key = hashlib.sha1(" ".join([script, *options]).encode()).hexdigest()[:8]
        if hasattr(script_of(script).Args, "save_buffer"):
            options.append("--save-buffer")
        for seed in seeds or range(1, claim.seeds + 1):
            name = f"{env_id.replace(':', '_')}__{Path(script).stem}__{key}__{seed}"
            folder = Path(out, name).absolute()
            runs.append(Run(label, script, (*options, "--seed", str(seed)), folder))
    return runs


def final_args(run):
    """The options of a run as its script understands them, which exits if it does not."""
    with mock.patch.object(sys, "argv", [run.script, *run.options]):
        return script_of(run.script).parse_args()


def check_unchanged(run):
    """Exit if a default or `TUNED` has changed since: the command would start another run now."""
    now, path = json.loads(json.dumps(vars(final_args(run)))), run_dir(run)
    before = {}
    for file in path.glob("*.json") if path else ():  # flow_offline.py has a second one
        before |= json.loads(file.read_text())
    for name in sorted((before.keys() & now.keys()) - {"resume"}):
        if before[name] != now[name]:
            sys.exit(
                f"{run.folder} was run with {name} {before[name]}, which is {now[name]} now; "
                "move that folder away"
            )


def run_dir(run):
    """Where the script keeps its run, the one with a checkpoint; None before the first."""
    checkpoints = list(run.folder.glob("runs/*/checkpoint.pt"))
    return max(checkpoints, key=os.path.getmtime).parent if checkpoints else None


def is_done(run):
    path = run_dir(run)
    if path is None:
        return False
    # without its tensors, which may be of a card that this machine lacks
    state = torch.load(path / "checkpoint.pt", map_location="meta", mmap=True, weights_only=True)
    return state["global_step"] >= json.loads((path / "args.json").read_text())["total_timesteps"]


CHILDREN, STOPPED = set(), []  # processes under way; not empty once they are to end


def execute(run):
    """Bring a run to its end; returns what became of it, in a few words."""
    run.folder.mkdir(parents=True, exist_ok=True)
    # the script inherits the lock, and holds it even if this process is killed
    with open(run.folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "is running already"
        if is_done(run):
            return "was done"
        begun = run_dir(run)
        if begun is None:
            shutil.rmtree(run.folder / "runs", ignore_errors=True)
        origin = machine(cuda="--no-cuda" not in run.options)
        if begun:
            origin = merged(json.loads((run.folder / "machine.json").read_text()), origin)
        (run.folder / "machine.json").write_text(json.dumps(origin, indent=2))
        options = ["--resume", str(begun)] if begun else list(run.options)
        with open(run.folder / "log.txt", "a") as log:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / run.script), *options],
                cwd=run.folder, stdout=log, stderr=log, pass_fds=[lock.fileno()],
                env=os.environ | dict(OMP_NUM_THREADS="1"),
            )  # fmt: skip
            CHILDREN.add(process)
            if STOPPED:
                process.terminate()
            while process.poll() is None:  # wait() would hold a lock that `checkpoint` needs
                time.sleep(0.2)
            status = process.returncode
            CHILDREN.discard(process)
    return "done" if status == 0 else f"ended with status {status}, see {run.folder}/log.txt"


def merged(before, now):
    """What two parts of a run were made with: "A + B" where it was not the same."""
    if isinstance(now, dict):
        return {name: merged(before[name], now[name]) for name in now}
    return " + ".join(dict.fromkeys([*before.split(" + "), now]))


def machine(cuda):
    """Versions, commit and hardware, for the CSV."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "gymnasium", "mujoco")}
    commit = ""
    if shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    on_card = cuda and torch.cuda.is_available()
    hardware = torch.cuda.get_device_name() if on_card else cpu_name()
    return dict(versions=versions, commit=commit, hardware=hardware)


def cpu_name():
    """The processor, and whether it has AMX, which many of one name lack."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        lines = [line for line in text.splitlines() if line.startswith("model name")]
        return next(iter(lines)).split(":")[1].strip() + " with AMX" * ("amx_bf16" in text)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def stop_children():
    """Let the processes under way, and those about to begin, save and end."""
    STOPPED.append(True)
    for process in list(CHILDREN):
        process.terminate()


def execute_here(runs, processes):
    """So many runs at a time; at Ctrl-C or SIGTERM those under way save and end."""

    def stop(signum, frame):
        sys.exit(128 + signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        try:
            futures = {pool.submit(execute, run): run for run in runs}
            bar = tqdm(concurrent.futures.as_completed(futures), total=len(runs), unit="run")
            for future in bar:
                outcome = future.exception() or future.result()  # one that failed stops no other
                failed += outcome not in ("done", "was done")
                bar.write(f"{futures[future].folder.name} {outcome}")
        except SystemExit:
            pool.shutdown(wait=False, cancel_futures=True)
            stop_children()
            raise
    return failed


class Submitted:
    """What submitit calls, and sends to the queue again after a time limit or a preemption."""

    patience = 60  # seconds that a run has to save; SLURM kills 90 s after submitit's signal

    def __call__(self, run):
        outcome = execute(run)
        if outcome not in ("done", "was done"):
            raise RuntimeError(outcome)
        return outcome

    def checkpoint(self, run):
        import submitit

        stop_children()
        for process in list(CHILDREN):
            try:
                process.wait(self.patience)
            except subprocess.TimeoutExpired:
                process.kill()  # what it has saved before is enough to go on from
        # this module goes with what is sent to the queue, where nothing runs or is to end
        CHILDREN.clear()
        STOPPED.clear()
        return submitit.helpers.DelayedSubmission(self, run)


def submit(runs, args):
    """Hand the runs to submitit; returns how many failed, which for SLURM is not waited for."""
    import submitit

    executor = submitit.AutoExecutor(folder=Path(args.out, "submitit"), cluster=args.cluster)
    executor.update_parameters(
        name="sweep", cpus_per_task=1, gpus_per_node=int(args.cuda), timeout_min=24 * 60
    )
    numbers = {k: int(v) if v.isdecimal() else v for k, v in args.slurm.items()}
    if args.cluster == "slurm":
        executor.update_parameters(slurm_array_parallelism=args.processes, **numbers)
        jobs = executor.map_array(Submitted(), runs)
        print(f"{len(jobs)} runs submitted, as {jobs[0].job_id} and so on")
        return 0
    executor.update_parameters(**numbers)
    jobs, failed = [], 0
    for run in runs:
        while sum(not job.done() for job in jobs) >= args.processes:
            time.sleep(0.2)
        jobs.append(executor.submit(Submitted(), run))
    for job, run in zip(jobs, runs):
        error = job.exception()
        failed += error is not None
        print(f"{run.folder.name} {'done' if error is None else error}")
    return failed


def main(args: Args):
    if not args.claims:
        for name, claim in CLAIMS.items():
            runs = runs_of(claim, args.out, cuda=args.cuda)
            done = sum(map(is_done, runs))
            print(f"{name:20s} {done:3d} of {len(runs):3d} runs done   {claim.question}")
        return
    selection = args.seeds, args.tasks, args.methods, args.cuda
    chosen = [run for name in args.claims for run in runs_of(CLAIMS[name], args.out, *selection)]
    runs = {run.folder: run for run in chosen}.values()  # claims share some
    for run in runs:
        check_unchanged(run)  # a misspelt option is an error now, not in the night
    runs = [run for run in runs if not is_done(run)]
    print(f"{len(chosen)} runs asked for, {len(runs)} to be done")
    if runs:
        here = args.cluster == "none"
        failed = execute_here(runs, args.processes) if here else submit(runs, args)
        if failed:
            sys.exit(f"{failed} of {len(runs)} runs did not finish")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
