"""The sweep, what is collected from it, and the pictures and tables that come of that."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import tyro
from matplotlib.colors import to_hex
from rliable import metrics
from torch.utils.tensorboard import SummaryWriter

import bptt_ppo
import bptt_sac
import evaluate
import s2pg_ppo
import s2pg_sac
import s2pg_td3
from benchmark import (
    bandit,
    collect,
    flow_profile,
    gradient_plots,
    latency,
    memory,
    model_gradients,
    plot,
    sweep,
    through_time,
    update_time,
)
from benchmark.claims import CLAIMS, Claim, Line

ROOT = Path(__file__).resolve().parent.parent
ONE = "smoke", "--seeds", "1", "--methods", "S2PG-SAC"  # the shortest sweep: one run


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)  # sweeps and runs have their own
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def call(module, *options):
    return module.main(tyro.cli(module.Args, args=[str(option) for option in options]))


def start_sweep(*options):
    command = [sys.executable, str(ROOT / "benchmark/sweep.py"), *options]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, text=True, start_new_session=True, **pipes)


def smoke(**selection):
    return sweep.runs_of(CLAIMS["smoke"], "runs/sweep", **selection)


def processes_in(folder):
    links = Path("/proc").glob("[0-9]*/cwd")
    return [int(link.parent.name) for link in links if os.path.realpath(link) == str(folder)]


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --- sweep.py and collect.py ----------------------------------------------------------------------


@pytest.mark.parametrize("name", CLAIMS)
def test_the_options_of_every_claim_are_understood(name):
    claim, runs = CLAIMS[name], sweep.runs_of(CLAIMS[name], "out", seeds=(1,))
    for run in runs:
        args = sweep.final_args(run)
        assert args.seed == 1 and args.eval_frequency > 0 and vars(args).get("save_buffer", True)
        if hasattr(args, "num_steps"):  # without a full rollout a run is refused
            assert args.num_steps * args.num_envs <= args.total_timesteps
    assert set(claim.threshold) <= {run.folder.name.split("__")[0] for run in runs}
    assert set(claim.cloning) <= set(claim.methods)


def test_a_method_overrides_its_task_and_claims_share_runs():
    def args_of(name, **selection):
        return list(map(sweep.final_args, sweep.runs_of(CLAIMS[name], "out", **selection)))

    everything = args_of("sac_and_bptt", methods=["SAC that sees everything"], seeds=(3,))
    assert [(args.hide, args.seed, args.cuda) for args in everything] == [("none", 3, False)] * 3
    whole = args_of("cue_recall", methods=["BPTT-SAC, L = the horizon"], seeds=(1,))
    assert [args.sequence_length for args in whole] == [20, 100, 300, 1000]
    assert all(args.env_kwargs == [("wind", "True")] for args in args_of("ppo_in_wind", seeds=(1,)))
    assert args_of("td3", cuda=True)[0].cuda
    folders = {name: {run.folder for run in sweep.runs_of(CLAIMS[name], "out")} for name in CLAIMS}
    assert len(folders["state_size"] & folders["cells"]) == 3  # 32 units of a GRU, three seeds
    assert len(folders["sac_and_bptt"]) == 6 * 3 * 5
    on_a_card = sweep.runs_of(CLAIMS["sac_and_bptt"], "out", cuda=True)
    assert not {run.folder for run in on_a_card} & folders["sac_and_bptt"]
    assert len(args_of("sac_and_bptt", tasks=["Hopper-v4"], seeds=(1, 2))) == 2 * 6


def test_a_sweep_killed_at_any_time_finishes_what_is_left(capsys):
    options = "smoke", "--seeds", "1", "--processes", "1"
    one, two = runs = smoke(seeds=(1,))  # with and without a memory
    first = start_sweep(*options)
    wait_for(lambda: sweep.run_dir(one))
    begun = sweep.run_dir(one)
    first.kill()  # and nothing else: the run goes on, slowly
    (pid,) = processes_in(one.folder)
    os.kill(pid, signal.SIGSTOP)
    assert not sweep.is_done(one) and sweep.execute(one) == "is running already"
    os.killpg(first.pid, signal.SIGKILL)  # the machine goes down, and the run with it
    first.communicate()
    assert not sweep.is_done(one) and not two.folder.exists()
    origin = json.loads((one.folder / "machine.json").read_text())  # as if the code had changed
    older = dict(commit="older", hardware="Another CPU 2")
    (one.folder / "machine.json").write_text(json.dumps(origin | older))

    second = start_sweep(*options)
    wait_for(lambda: sweep.is_done(one))
    second.terminate()
    said = second.communicate(timeout=300)
    assert second.returncode == 128 + signal.SIGTERM and not sweep.is_done(two), said
    call(sweep, *options)
    assert all(map(sweep.is_done, runs)) and sweep.run_dir(one) == begun
    assert all(len(list(run.folder.glob("runs/*"))) == 1 for run in runs)
    call(sweep, *options)
    call(sweep)
    said = capsys.readouterr().out
    assert "2 runs asked for, 1 to be done" in said and "2 runs asked for, 0 to be done" in said
    assert "2 of   4 runs done" in said

    call(collect, "smoke", "--results", "results")
    assert capsys.readouterr().out.count("not finished") == 2
    call(collect, "smoke", "--results", "results", "--seeds", 1)
    assert "not finished" not in capsys.readouterr().out
    rows = rows_of("results/smoke.csv")
    assert list(rows[0]) == collect.COLUMNS and len(rows) == 2 * 4
    with mock.patch.object(sweep, "is_done", lambda run: False):  # seeds 2 are not begun
        call(collect, "smoke", "--results", "so_far", "--unfinished")
    assert capsys.readouterr().out.count("not finished") == 4
    assert rows_of("so_far/smoke.csv") == rows
    for label in CLAIMS["smoke"].methods:
        own = [row for row in rows if row["label"] == label]
        assert [row["step"] for row in own] == ["200", "400", "600", "800"]
        seconds = [float(row["wall_seconds"]) for row in own]
        assert seconds[0] > 0 and seconds == sorted(seconds) and seconds[-1] < 100
        assert all(('"memoryless": true' in row["options"]) == ("less" in label) for row in own)
        assert all(row["versions"].count("=") == 3 and "+ " not in row["versions"] for row in own)
        resumed = label == "S2PG-SAC"
        assert all(row["commit"].startswith("older + ") == resumed for row in own)
        hardware = "Another CPU 2 + " * resumed + sweep.cpu_name()
        assert {row["hardware"] for row in own} == {hardware}
    call(plot, "--csv", "results/smoke.csv")
    said = capsys.readouterr().out
    assert said.count("\n| ") == 4 and "| S2PG-SAC |" in said
    assert Path("results/smoke.png").stat().st_size > 10_000

    own = [sweep.run_dir(run) for run in runs]
    with pytest.raises(SystemExit, match="two runs of CueRecall-v0 are s2pg_sac, seed 1"):
        call(collect, "--csv", "own.csv", "--runs", *own)
    assert not Path("own.csv").exists()
    call(collect, "--csv", "own.csv", "--runs", "results", own[0])
    said = capsys.readouterr().out
    assert "left out: results is no run" in said and "own.csv: 4 rows" in said


def test_a_run_that_has_to_leave_its_node_goes_to_the_queue_again(tmp_path):
    """submitit says so by a signal; its local controller starts again what asks for it."""
    (own,) = smoke(seeds=(1,), methods=("S2PG-SAC",))
    process = start_sweep(*ONE, "--cluster", "local")
    wait_for(lambda: sweep.run_dir(own))
    begun = sweep.run_dir(own)
    (pid,) = (
        pid
        for pid in processes_in(tmp_path)
        if b"submitit.core._submit" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(pid, signal.SIGUSR2)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "__1 done" in out, out + err
    assert sweep.is_done(own) and sweep.run_dir(own) == begun
    log = (own.folder / "log.txt").read_text()
    assert "go on with --resume" in log and log.count("step 800: return") == 1


def test_a_run_that_is_slow_to_leave_goes_to_the_queue_all_the_same():
    (own,) = smoke(seeds=(1,), methods=("S2PG-SAC",))
    submitted, process = sweep.Submitted(), subprocess.Popen(["sleep", "300"])
    os.kill(process.pid, signal.SIGSTOP)  # so that it does not heed SIGTERM
    submitted.patience = 0.1
    sweep.CHILDREN.add(process)
    delayed = submitted.checkpoint(own)
    assert process.wait(timeout=10) == -signal.SIGKILL
    assert delayed.function is submitted and delayed.args == (own,)
    assert not sweep.CHILDREN and not sweep.STOPPED


def test_a_run_that_fails_fails_the_sweep(capsys):
    (own,) = smoke(seeds=(1,), methods=("S2PG-SAC",))
    own.folder.mkdir(parents=True)
    (own.folder / "runs").write_text("a file where the script wants a folder")
    with pytest.raises(SystemExit, match="1 of 1 runs did not finish"):
        call(sweep, *ONE)
    said = "".join(capsys.readouterr())
    assert "ended with status 1, see" in said and (own.folder / "log.txt").read_text()


def test_runs_from_before_a_change_of_the_defaults_are_not_taken_for_done(monkeypatch):
    own, _ = smoke(seeds=(1,))
    sweep.check_unchanged(own)  # nothing was run yet
    run_dir = own.folder / "runs" / "a"
    run_dir.mkdir(parents=True)
    args = vars(sweep.final_args(own))
    assert args["learning_starts"] == 20  # of the claim, and not of `TUNED`
    (run_dir / "checkpoint.pt").touch()
    (run_dir / "args.json").write_text(json.dumps(args | dict(an_option_of_old=1)))
    sweep.check_unchanged(own)
    monkeypatch.setitem(s2pg_sac.TUNED, "CueRecall", dict(learning_starts=1_000, critic_lr=0.5))
    with pytest.raises(SystemExit, match=r"was run with critic_lr 0.001, which is 0.5 now"):
        sweep.check_unchanged(own)
    monkeypatch.setattr(sweep, "is_done", lambda run: True)
    for module in (sweep, collect, memory):
        with pytest.raises(SystemExit, match="move that folder away"):
            call(module, "smoke")


@pytest.mark.parametrize(
    "module, options, message",
    [
        (sweep, ["smok"], "no claim 'smok'; there are 'smoke'"),
        (sweep, ["smoke", "--methods", "SAC"], "no method 'SAC'; there are 'S2PG-SAC'"),
        (sweep, ["smoke", "--tasks", "Ant-v4"], "no task 'Ant-v4'; there are 'CueRecall-v0'"),
        (sweep, ["smoke", "--processes", "0"], "must be at least 1"),
        (sweep, ["smoke", "--seeds", "-1"], "--seed must be in"),
        (sweep, ["smoke", "--cluster", "slurm"], "there is no srun here"),
        (collect, [], "name claims"),
        (collect, ["smoke"], "no run of smoke is finished"),
        (collect, ["--runs", "here"], "none of these is a run"),
        (memory, [], "name claims"),
        (memory, ["smoke"], "no run of smoke is finished"),
        (memory, ["smoke", "--tasks", "Ant-v4"], "no task 'Ant-v4'"),
        (memory, ["--runs", "here"], "none of these is a run of a policy with a memory"),
        (memory, ["smoke", "--episodes", "0"], "--episodes must be at least 1"),
        (memory, ["smoke", "--probe-episodes", "9"], "at least 200"),
        (update_time, ["--cudagraphs"], "are for --device cuda"),
        (update_time, ["--device", "cuda"], "there is no CUDA card"),
        (update_time, ["--methods", "PPO"], "no method 'PPO'; there are"),
        (update_time, ["--baseline", "."], "is no checkout"),
        (update_time, ["--rounds", "0"], "must be at least 1"),
        (flow_profile, ["--interval", 0], "--interval must be at least 1"),
        (flow_profile, [], "no run of the claim `flow` has begun in runs/sweep"),
        (model_gradients, ["--samples", 24], "--samples must be a multiple of 16"),
        (model_gradients, ["--means", 0], "--means, --starts, --rounds at least 1"),
        (through_time, ["--samples", 1], "--samples at least 2"),
        (plot, ["--csv", "nothing.csv"], "nothing.csv"),
        (plot, ["--csv", str(ROOT / "requirements.txt")], "is no CSV of collect.py"),
        (plot, ["smok"], "no claim 'smok'; there are 'smoke'"),
        (plot, ["td3", "--pages", "nowhere.md"], "no page nowhere.md"),
    ],
)
def test_bad_input_is_one_sentence(module, options, message, monkeypatch):
    monkeypatch.setattr(sweep.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        call(module, *options)
    assert message in error.value.code and len(error.value.code.splitlines()) == 1


def test_pictures_of_gradients_need_their_csvs():
    with pytest.raises(SystemExit, match=r"model_gradients\.csv is missing"):
        gradient_plots.main(Path(), Path())
    for name in "model_gradients", "model_gradients_speed", "through_time":
        Path(f"{name}.csv").write_text("env_id\nHalfCheetah-v4\n")
    with pytest.raises(SystemExit, match=r"the CSVs in \. are not complete"):
        gradient_plots.main(Path(), Path())


# --- memory.py ------------------------------------------------------------------------------------


def tiny_run(script, horizon=5, **options):
    """The folder of a run of a few steps, whose policy has learned next to nothing."""
    options |= dict(env_id="CueRecall-v0", env_kwargs=dict(horizon=horizon), total_timesteps=40)
    ppo = "ppo" in script.__name__
    options |= dict(num_steps=20, num_minibatches=2) if ppo else dict(learning_starts=20)
    before = set(Path("runs").glob("*"))
    script.train(script.Args(**options, eval_episodes=2))
    (folder,) = set(Path("runs").glob("*")) - before
    return folder


@pytest.mark.parametrize("place", ["z", "a_prev", "nowhere"])
def test_ablation_finds_where_a_policy_keeps_the_cue(place, monkeypatch):
    """With policies written by hand, which note the cue in one place and read it from there."""
    agent, fresh = memory.load(tiny_run(s2pg_sac, 10))

    def act(self, obs, z, a_prev, deterministic=False):
        kept = {"z": z[:, :1], "a_prev": a_prev, "nowhere": 0 * a_prev}[place]
        cue = torch.where(obs[:, 1:] == 0, obs[:, :1], kept)
        return cue, cue.expand_as(z)

    monkeypatch.setattr(type(fresh), "act", act)
    forgets = 1 + 0.2 * 9
    expected = dict.fromkeys(memory.CHANGES, forgets if place == "nowhere" else 10)
    if place == "z":
        expected["z = 0"] = forgets
    if place == "a_prev":
        # reads the contrary of its last action, so that every second one is right
        expected |= {"a_prev = 0": forgets, "-a_prev": 10 / 2 * (1 - 0.6)}
    assert memory.ablate(agent, 20) == pytest.approx(expected, abs=1e-5)
    # what is written in z is the cue, or without it a_prev, whose place the probe does not change
    reads, accuracy = (0.5, 0.1) if place == "nowhere" else (1, 0)
    shares = memory.probe(agent, agent.actor, 200)
    assert shares == pytest.approx([1, *[reads] * 9], abs=accuracy)
    # o is the cue in one step of ten, the memory what was read or done last
    known = memory.readout(agent, fresh, 40)
    seen = 10 if place == "nowhere" else 100
    assert known["o and a_prev"] == pytest.approx(seen, abs=5)
    assert known["and the memory"] == pytest.approx(seen, abs=5)


def test_the_readout_tells_what_noise_hides_from_what_was_never_learned(monkeypatch):
    """Memories written by hand: of the trained policy the sum of all cues seen, noise on it."""
    agent, fresh = memory.load(tiny_run(s2pg_sac, 10))

    def act(obs, z, a_prev, deterministic=False):
        z = z + obs[:, :1] + (0 if deterministic else torch.randn_like(z[:, :1]))
        return 0 * a_prev, z

    monkeypatch.setattr(agent.actor, "act", act)
    monkeypatch.setattr(fresh, "act", lambda obs, z, a_prev, deterministic: (a_prev, 0 * z))
    known = memory.readout(agent, fresh, 400)
    # variances: of the cue .64, of the noise at step t that of t samples
    assert list(known) == list(memory.READ)
    assert known["the same, no noise"] == pytest.approx(100, abs=1e-6)
    assert known["the same, untrained"] == pytest.approx(known["o and a_prev"], abs=1)
    assert known["o and a_prev"] + 5 < known["and the memory"] < 60
    agent.args.env_id, agent.args.env_kwargs = "InvertedPendulum-v4", {}
    assert memory.readout(agent, fresh, 4) == {}  # where nothing is hidden


@pytest.mark.parametrize("script", [s2pg_sac, bptt_sac, s2pg_td3, s2pg_ppo, bptt_ppo])
def test_the_untrained_policy_is_the_one_that_the_run_began_with(script):
    still = {name: 0.0 for name in ("actor_lr", "learning_rate") if hasattr(script.Args, name)}
    agent, fresh = memory.load(tiny_run(script, seed=3, **still))
    for one, other in zip(agent.actor.parameters(), fresh.parameters(), strict=True):
        assert one is not other and one.equal(other)


def test_policies_without_memory_and_other_folders_are_left_out(capsys):
    folder, other = tiny_run(s2pg_sac), tiny_run(s2pg_sac, memoryless=True)
    runs = [("kept", folder), ("none", other), ("", folder), ("", "here")]
    memory.study(runs, Path("my.csv"), memory.Args(runs=("",), episodes=3, probe_episodes=200))
    assert "left out: here is no run" in capsys.readouterr().out
    rows = rows_of("my_ablated.csv")
    assert [row["label"] for row in rows] == ["kept", "s2pg_sac"]
    assert list(rows[0]) == ["env_id", "label", "seed", "episodes", *memory.CHANGES]
    assert [row["trained"] + row["step"] for row in rows_of("my_probe.csv")] == [
        trained + step for _ in range(2) for trained in "01" for step in "01234"
    ]
    # as it is, a policy gets what evaluate.py says of it
    evaluate.main(evaluate.Options(folder, episodes=3))
    mean = float(re.search("noise-free: return (.*?) ", capsys.readouterr().out)[1])
    assert float(rows[0]["as it is"]) == pytest.approx(mean, rel=1e-3, abs=0.006)


# --- update_time.py -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", update_time.SCRIPTS)
def test_what_is_timed_is_the_update_of_a_run(name, monkeypatch):
    options = dict(env_id="InvertedPendulum-v4", cuda=False, state_dim=4, num_envs=2)
    if "ppo" in name:
        options |= dict(num_steps=32, update_epochs=1)
    else:
        options |= dict(learning_starts=40, batch_size=8)
    modules = {name: sys.modules[name]}
    train, kept = modules[name].train, dict(vars(modules[name]))
    agent, step = update_time.catch(modules, name, **options)
    for _ in range(2):  # again
        before = [p.clone() for p in agent.critic.parameters()]
        step()
        assert any(not p.equal(q) for p, q in zip(agent.critic.parameters(), before))
    assert update_time.run_time(modules, name, 100, 100, **options) > 0
    assert vars(modules[name]) == kept and modules[name].train is train
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr(modules[name].Agent, "update", None)
    assert update_time.run_time(modules, name, 100, 100, updates=False, **options) > 0


def test_a_run_of_ppo_is_long_enough_to_be_timed(monkeypatch, capsys):
    """Its rollouts have fewer steps than rows, as episodes end."""

    def once(measures, rounds):
        return {name: measure(updates=False) for name, measure in measures.items()}

    monkeypatch.setattr(update_time, "take_turns", once)
    methods = {"S2PG": dict(name="s2pg_ppo", modules={"s2pg_ppo": s2pg_ppo})}
    options = dict(env_id="InvertedPendulum-v4", cuda=False)
    update_time.runs_table("ppo", methods, 16, options, update_time.Args())
    assert "environment steps per second without updates: S2PG " in capsys.readouterr().out


def test_what_update_time_prints_becomes_the_tables_of_speed(monkeypatch, capsys):
    checkouts = []

    def catch(modules, **options):
        checkouts.append(modules)
        return None, lambda: None

    monkeypatch.setattr(update_time, "catch", catch)
    monkeypatch.setattr(update_time, "run_time", lambda updates=True, **options: 1 + updates)
    methods = "memoryless", "S2PG", "BPTT, L = 32"
    with mock.patch.dict(sys.modules):
        call(update_time, "--algorithms", "ppo", "runs", "--baseline", ROOT, "--methods", *methods)
    one, other = checkouts[:2]
    assert one.keys() == other.keys() >= {"envs", "envs.vector", *update_time.SCRIPTS}
    assert all(one[name] is not other[name] for name in one)
    Path("a.txt").write_text(said := capsys.readouterr().out)
    assert said.startswith("Hopper-v4 (o 5, s 11, a 3) on ")
    assert len(re.findall(r"BPTT, L = 32: .* x before \(quartiles .* and .*\)", said)) == 1 + 3
    _, _, *lines = plot.speed_table([Path("a.txt")]).splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        f"| {method}{when}"
        for method in ("memoryless PPO", "S2PG-PPO", "BPTT-PPO, L = 32")
        for when in ("", " before")
    ]
    header, _, *lines = plot.rollout_table([Path("a.txt")]).splitlines()
    assert header == "|  | 1 environment | 4 environments | 16 environments |"
    assert lines[0] == "| Hopper-v4, memoryless | 1000 | 1000 | 1000 |" and len(lines) == 6


def test_in_the_table_of_speed_each_number_is_below_its_task():
    files = {"Hopper-v4": ("memoryless", "S2PG, critic"), "Ant-v4": ("S2PG, Sobolev", "memoryless")}
    for name, methods in files.items():
        lines = [f"{method:38s} {name[0]} 1 2" for method in methods]
        Path(name).write_text("\n".join([f"{name} on a CPU\n", "SAC, ms per step", *lines]))
    assert plot.speed_table([Path(name) for name in files]).splitlines()[2:] == [
        "| memoryless SAC | H | 1 | 2 | A | 1 | 2 |",
        "| S2PG-SAC, Sobolev |  |  |  | A | 1 | 2 |",  # what older files had of parts is left out
    ]


def evaluated(path, steps, seed=1, finished=True, **options):
    """A run in folder `path`, evaluated at `steps`; the last time noise-free only if unfinished."""
    Path(path).mkdir()
    args = vars(s2pg_ppo.Args(**dict(env_id="Hopper-v4", exp_name="a", seed=seed) | options))
    Path(path, "args.json").write_text(json.dumps(args | dict(script="s2pg_ppo.py")))
    with SummaryWriter(path) as writer:
        for step in steps:
            for mode, scale in (("deterministic", 1), ("stochastic", 0.5)):
                if finished or step < steps[-1] or mode == "deterministic":
                    writer.add_scalar(f"eval/return_{mode}", step, step)
                    writer.add_scalar(f"eval/success_{mode}", scale * step / 1000, step)
            writer.add_scalar("charts/seconds", step, step)
    return collect.evaluations(Path(path))


@pytest.mark.parametrize("columns", [10, 12, 14])  # the first versions had fewer
def test_rows_of_runs_that_are_elsewhere_are_kept_if_asked_for(columns):
    path = Path("a.csv")
    one, two = (evaluated(str(seed), [50, 100], seed=seed) for seed in (1, 2))
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(row[:columns] for row in [collect.COLUMNS, *one, *two])
    two, three = (evaluated(f"new {seed}", [100], seed=seed) for seed in (2, 3))
    collect.write(two + three, path, add=True)
    rows = rows_of(path)
    assert list(rows[0]) == collect.COLUMNS and all(None not in row.values() for row in rows)
    expected = [("1", "50"), ("1", "100"), ("2", "100"), ("3", "100")]
    assert [(row["seed"], row["step"]) for row in rows] == expected
    before = path.read_bytes()
    collect.write([], path, add=True)
    assert path.read_bytes() == before
    collect.write(one, path)
    assert {row["seed"] for row in rows_of(path)} == {"1"}
    for text in ("", "seed,step\n1,2\n"):
        path.write_text(text)
        with pytest.raises(SystemExit, match=r"a\.csv is no CSV of collect.py"):
            call(collect, "--runs", "new 2", "--csv", "a.csv")
        assert path.read_text() == text


def test_options_are_those_that_are_not_at_their_defaults():
    """Of a run of sweep.py as well, and of a version that lacked an option or had one more."""
    evaluated("run", [100])
    args = vars(bptt_sac.Args(env_id="Hopper-v4", exp_name="a", gamma=0.9)) | dict(gone=1)
    del args["checkpoint_frequency"]
    Path("run/args.json").write_text(json.dumps(args | dict(script="bptt_sac.py")))
    (row,) = collect.evaluations(Path("run"))
    assert row[1:3] == ["a", "bptt_sac"] and json.loads(row[3]) == {"gamma": 0.9, "gone": 1}
    Path("run/args.json").write_text(json.dumps(args))
    with pytest.raises(ValueError, match=r"run is no run: KeyError\('script'\)"):
        collect.evaluations(Path("run"))
    own = sweep.Run("b", "bptt_sac.py", (), Path("run"))
    (row,) = collect.evaluations(Path("run"), own, dict(versions={}, commit="", hardware=""))
    assert row[1:3] == ["b", "bptt_sac"] and json.loads(row[3]) == {"gamma": 0.9, "gone": 1}


def test_one_csv_has_one_expert():
    def level(value):
        return ["E-v0", "expert", "demonstrations", "{}", 0, 0, 0.0, value, value, *[""] * 5]

    path = Path("new/a.csv")
    collect.write([level(5.0), level(5.0)], path)
    collect.write([level(5.0)], path, add=True)
    assert len(rows_of(path)) == 1
    with pytest.raises(SystemExit, match=r"two experts of E-v0, with returns .*: collect them"):
        collect.write([level(5.0), level(6.0)], path)


@pytest.mark.parametrize(
    "frequency, num_envs, seen, drawn",
    [
        (100, 1, [100, 200], [100, 200]),
        (100, 4, [102, 201, 203], [100, 200, 203]),  # passed together; the end is no multiple
        (0, 1, [250], [250]),  # as older runs, which were evaluated at the end alone
    ],
)
def test_steps_of_evaluations(frequency, num_envs, seen, drawn):
    rows = evaluated("run", seen, eval_frequency=frequency, num_envs=num_envs)
    collect.write(rows, Path("a.csv"))
    found = plot.read("a.csv", Claim("", {}, []))["Hopper-v4"]["a"]
    assert found.steps.tolist() == drawn and found.stochastic.tolist() == [seen]


def test_shares_of_success_are_collected_and_shown_in_percent():
    # the last evaluation is under way
    collect.write(
        evaluated("run", [100, 200, 300], finished=False, eval_frequency=100), Path("a.csv")
    )
    claim = Claim("", {"a": ""}, [], column="success_stochastic", clock=False)
    data = plot.read("a.csv", claim)
    found = data["Hopper-v4"]["a"]
    np.testing.assert_allclose(found.stochastic, [[5, 10]])
    np.testing.assert_allclose(found.deterministic, [[10, 20]])
    lines = plot.table(data, claim).splitlines()
    assert lines[0].startswith("|  | success in % at the end, each seed | noise-free |")
    assert lines[3] == "| a | 10.0 | 20.0 | 10.0 | 10.0 at 200 |"
    returns = plot.read("a.csv", claim._replace(column="return_stochastic"))
    assert returns["Hopper-v4"]["a"].stochastic.tolist() == [[100, 200]]


def test_seeds_without_a_common_step_are_answered_in_a_sentence():
    rows = evaluated("1", [100, 200])
    rows += evaluated("2", [150], seed=2, eval_frequency=50)
    collect.write(rows, Path("a.csv"))
    with pytest.raises(SystemExit, match="the seeds of a were evaluated at no common step"):
        plot.read("a.csv", Claim("", {}, []))


def test_a_run_killed_in_its_last_evaluation_is_named(monkeypatch, capsys):
    """Its checkpoint says that it is done, and it shortens the table of all seeds."""
    _, killed = runs = smoke(methods=("S2PG-SAC",))
    monkeypatch.setattr(sweep, "is_done", lambda run: run in runs)
    monkeypatch.setattr(sweep, "check_unchanged", lambda run: None)
    for seed, run in enumerate(runs, 1):
        folder = run.folder / "runs" / "a"
        folder.parent.mkdir(parents=True)
        evaluated(folder, [100, 200], seed, finished=run != killed, total_timesteps=200)
        (folder / "checkpoint.pt").touch()
        (run.folder / "machine.json").write_text('{"versions": {}, "commit": "", "hardware": ""}')
    call(collect, "smoke", "--results", ".")
    said = re.findall("killed in its last evaluation: (.*); move it away", capsys.readouterr().out)
    assert said == [f"S2PG-SAC, {killed.folder.name}"]
    call(plot, "--csv", "smoke.csv")
    said = capsys.readouterr().err
    assert said == "plot.py: smoke.csv: not all seeds of S2PG-SAC were evaluated at step 200\n"


# --- plot.py --------------------------------------------------------------------------------------


def test_the_tables_of_the_pages_are_those_of_the_csvs(capsys):
    call(plot, "--check")
    assert not capsys.readouterr().err  # no table is cut short


def test_tables_go_between_their_marks_and_nowhere_else():
    mark = "<!-- a: plot.py writes this table -->"
    text = f"before\n{mark}\nold\n<!-- end -->\nafter <!-- end -->\n"
    new = plot.insert(text, {"a": "| 1 |", "b": "| 2 |"})
    assert new == f"before\n{mark}\n\n| 1 |\n\n<!-- end -->\nafter <!-- end -->\n"
    assert plot.insert(new, {"a": "| 1 |"}) == new
    assert plot.insert(new, {"a": r"| \1 |"}) == new.replace("| 1 |", r"| \1 |")


@pytest.mark.parametrize("seeds", [1, 3, 4, 9])
def test_the_interquartile_mean_is_that_of_rliable(seeds):
    returns = np.random.default_rng(seeds).normal(size=(seeds, 6))
    mean, (low, high) = plot.interquartile_mean(returns, repetitions=200)
    expected = [metrics.aggregate_iqm(returns[:, t, None]) for t in range(6)]
    np.testing.assert_allclose(mean, expected)
    assert (low <= mean + 1e-9).all() and (mean <= high + 1e-9).all()
    assert (low >= returns.min(0) - 1e-9).all() and (high <= returns.max(0) + 1e-9).all()
    assert (low < high - 1e-9).all() == (seeds > 1)
    np.random.seed(seeds)  # noqa: NPY002
    _, again = plot.interquartile_mean(returns, repetitions=200)
    np.testing.assert_array_equal(again, [low, high])


def curve(minutes, returns, steps=(100, 200, 300)):
    returns = np.array(returns, dtype=float)
    return plot.Curve(np.array(steps), np.array(minutes, dtype=float), returns, returns)


LEVEL = curve([[0]], [[7]], steps=[0])


def test_the_time_to_a_threshold_is_the_median_of_its_first_crossing():
    steps = np.broadcast_to([100, 200, 300], (3, 3))
    returns = np.array([[0, 5, 0], [5, 0, 0], [0, 0, 5]])
    assert plot.to_threshold(steps, returns, 5) == "200"
    assert plot.to_threshold(steps / 100, returns, 5) == "2"
    assert plot.to_threshold(steps, returns * [[1], [1], [0]], 5) == "200 (2 of 3)"
    assert plot.to_threshold(steps, returns, 6) == "never (0 of 3)"


def test_a_table_has_each_seed_and_levels_without_a_curve():
    claim = Claim("", {"b": "", "a": ""}, ["--env-id E-v0"], threshold={"E-v0": 5})
    data = {"E-v0": {"a": curve([[1, 2, 3]] * 2, [[0, 4, 5], [1, 2, 3]]), "expert": LEVEL,
                     "b": curve([[1, 2]], [[9, 8]], steps=(100, 200))}}  # fmt: skip
    lines = plot.table(data, claim).splitlines()
    assert lines[2].startswith("| **E-v0**, 300 steps, threshold 5 |")
    assert lines[3] == "| b after 200 | 8.0 | 8.0 | 8.0 | 9.0 at 100 | 100 | 1 |"
    never = "never (1 of 2)"
    assert lines[4] == (
        f"| a | 5.0, 3.0 | 5.0, 3.0 | 4.0 [3.0, 5.0] | 4.0 at 300 | {never} | {never} |"
    )
    assert lines[5] == "| expert | 7.0 | 7.0 |  |  |  |  |"
    assert "| mean [range] | best mean |" in lines[0]
    data["E-v0"]["a"] = curve([[1, 2, 3]] * 4, np.ones((4, 3)))
    mixed = "mean (4 seeds or more: IQM)"
    assert f"| {mixed} [range or 95 %] | best {mixed} |" in plot.table(data, claim)
    del data["E-v0"]["b"]
    assert "| IQM [95 %] | best IQM |" in plot.table(data, claim)
    assert len({line.count("|") for line in lines}) == 1


def test_the_first_table_has_means_and_what_is_best_with_each_seed_in_bold(monkeypatch):
    curves = {
        label: curve([[1, 2]] * 2, [[100, end] for end in ends], steps=(10_000, 20_000))
        for label, ends in dict(a=(20, 31), b=(10, 21), c=(5, 15), e=(7, 9)).items()
    }
    curves["d"] = curve([[1]] * 2, [[100], [100]], steps=[10_000])
    data = {"one": {"Here-v0": curves}}
    monkeypatch.setattr(plot, "OVERVIEW", [
        Line("all three", "one", "Here-v0", "a", "b", "c"),
        Line("two of them", "one", "Here-v0", "a", None, "c", True),
        Line("no run yet", "later", "Here-v0", "a", "b", "c"),
        Line("not of this task", "one", "There-v0", "a", "b", "c"),
        Line("one is shorter", "one", "Here-v0", "d", "b", "c"),
        Line("one alone", "one", "Here-v0", "e", "f", "c2"),
    ])  # fmt: skip
    assert plot.overview(data).splitlines()[2:] == [
        "| all three | 20,000 | 25.5 | 15.5 | 10.0 | `one` |",  # 20 is not above 21
        "| two of them | 20,000 | **25.5** |  | 10.0 | `one` |",
        "| no run yet |  |  |  |  | `later` |",
        "| not of this task |  |  |  |  | `one` |",
        "| one is shorter | 20,000 | **100** after 10,000 | 15.5 | 10.0 | `one` |",
        "| one alone | 20,000 | 8.0 |  |  | `one` |",
    ]
    (line,) = plot.overview(data, short=True).splitlines()[2:]
    assert line == "| two of them | 20,000 | **25.5** |  | 10.0 | `one` |"


def test_the_first_picture_is_the_mean_against_minutes_and_names_each_curve_once(monkeypatch):
    axes = []
    monkeypatch.setattr(plt, "close", lambda figure: axes.extend(figure.axes))
    curves = dict.fromkeys(plot.FIRST_CURVES, curve([[1, 2, 3], [3, 4, 9]], [[1, 2, 3], [3, 4, 9]]))
    plot.draw_first(dict.fromkeys(plot.FIRST_PANELS, curves), "first.png")
    for panel in axes:
        assert len(panel.lines) == len(curves)
        np.testing.assert_allclose(panel.lines[0].get_xydata(), [[2, 2], [3, 3], [6, 6]])
    names = [text.get_text() for text in axes[0].texts]
    assert sorted(names) == sorted(name for name, _ in plot.FIRST_CURVES.values())


def test_what_memory_py_writes_becomes_a_table_and_a_picture(monkeypatch):
    claim, path = CLAIMS["delayed_response"], Path("a.csv")
    labels = "S2PG-SAC", "BPTT-SAC, L = the horizon"  # as in the claim, and the tasks, too
    env_ids = "CueRecall-delayed-5-v0", "CueRecall-delayed-v0"
    runs = [[e, label, s] for e in env_ids[::-1] for label in labels[::-1] for s in (1, 2, 10)]
    header = ["env_id", "label", "seed"]
    header_a = [*header, "episodes", *memory.CHANGES]
    returns = [[*run, 40, 10.04, 200.6, -1, run[2]] for run in runs]
    memory.write(path, header_a, [[*run, 40, 0, 0, 0, 0] for run in runs[:7]])
    memory.write(path, header_a, returns[4:], add=True)
    memory.write(path, header_a, returns[:4], add=True)
    with pytest.raises(SystemExit, match=r"a\.csv has other columns than env_id"):
        memory.write(path, header, [], add=True)
    cells = "10.0, 10.0, 10.0 | 201, 201, 201 | -1.0, -1.0, -1.0 | 1.0, 2.0, 10.0"
    expected = ["|  | as it is | a_prev = 0 | -a_prev | z = 0 |", "| --- | --- | --- | --- | --- |"]
    for env_id in env_ids:
        expected += [f"| **{env_id}** |  |  |  |  |"]
        expected += [f"| {label} | {cells} |" for label in labels]
    assert plot.memory_table(plot.rows_of(path, claim)).splitlines() == expected

    shares = [
        [*run, trained, step, 1 / (1 + step * run[2]) if trained else 0.5]
        for run in runs for trained in (0, 1) for step in range(3)
    ]  # fmt: skip
    memory.write(path, [*header, "trained", "step", "correct"], shares)
    drawn = {}
    monkeypatch.setattr(plt, "close", lambda figure: drawn.update(
        {panel.get_title(): [line.get_ydata() for line in panel.get_lines()]
         for panel in figure.axes}
    ))  # fmt: skip
    plot.draw_probe(plot.rows_of(path, claim), claim, "p.png")
    assert list(drawn) == list(env_ids)
    for lines in drawn.values():
        mean = [100, 100 * (1 / 2 + 1 / 3 + 1 / 11) / 3, 100 * (1 / 3 + 1 / 5 + 1 / 21) / 3]
        np.testing.assert_allclose(lines[:4], [[50] * 3, mean] * 2)


@pytest.mark.parametrize(
    "labels", [[*claim.methods, "expert"] for claim in CLAIMS.values()] + [["S2PG 1", "S2PG 2"]]
)
def test_no_two_curves_have_one_color(labels):
    assert len({to_hex(color) for color in plot.colors_of(labels).values()}) == len(labels)


def test_a_picture_has_a_curve_for_each_method_and_clock(monkeypatch):
    axes = []
    monkeypatch.setattr(plt, "close", lambda figure: axes.extend(figure.axes))
    minutes = [[1, 2, 3], [2, 3, 4], [4, 8, 9]]
    both = {"S2PG-SAC": curve(minutes, np.eye(3)), "expert": LEVEL}
    tasks = ["--env-id A-v0 --env-kwargs wind True"]
    claim = Claim("", {"S2PG-SAC": ""}, tasks, threshold={"B-v0": 1})
    plot.draw({"A-v0": both, "B-v0": both}, claim, "a.png")
    titles = [panel.get_title() for panel in axes]
    assert titles == ["A-v0, wind", "B-v0"] * 2
    assert [len(panel.lines) for panel in axes] == [2, 3, 2, 3]  # A, B by steps; A, B by minutes
    assert axes[2].get_xlabel() == "minutes of training"
    assert axes[2].lines[0].get_xdata().tolist() == [2, 3, 4]  # the median of the seeds
    colors = plot.colors_of(both)
    assert {line.get_label(): line.get_color() for line in axes[0].lines} == colors
    axes.clear()
    five = {f"{name}-v0": both for name in "BCDEF"}
    plot.draw(five, claim._replace(clock=False), "c.png")
    assert [len(panel.lines) for panel in axes if panel.get_visible()] == [3, 2, 2, 2, 2]
    assert [panel.get_title() for panel in axes if panel.get_visible()] == list(five)
    assert axes[0].get_position().y0 > axes[3].get_position().y1  # three in a row


class EveryMode(torch.nn.Module):
    """Acts at the centres of the bandit's modes in turn; with a step that changes nothing."""

    steps, velocity = 1, torch.nn.Identity()

    def __init__(self, modes):
        super().__init__()
        self.modes = modes

    def act(self, obs, z, a_prev):
        mode = torch.arange(len(obs)) % self.modes
        return bandit.centres(obs)[mode, torch.arange(len(obs))], z

    def forward(self, obs, z, a_prev):
        return z, torch.zeros(len(obs), bandit.ACTION), z

    def path(self, obs, g, log_std, noise):
        x_0 = noise[0]
        return [x_0, 0.5 * x_0], None


@pytest.mark.parametrize("modes", [1, 3])
def test_the_bandit_counts_modes_and_measures_gradients(modes):
    found = bandit.measure(EveryMode(modes))
    assert found["reward"] == pytest.approx(10) and modes <= found["modes"] < modes + 0.5
    assert found["gain"] == pytest.approx(0.5) and found["std"] == 1


def test_the_bandit_is_learned():
    *_, row = bandit.run("Gaussian", 1, bandit.Args(updates=200, out="bandit"))
    assert row["reward"] > 5 and 1 <= row["modes"] < 2 and row["update"] == 200


def test_the_latency_of_an_exported_policy(monkeypatch):
    args = s2pg_sac.Args(env_id="InvertedPendulum-v4", hide="velocities")
    env = s2pg_sac.make_env(args, 1)
    actor = s2pg_sac.Agent(args, env, torch.device("cpu")).actor
    evaluate.export(Path("policy.pt2"), vars(args), env, actor)
    latency.main(Path("policy.pt2"), seconds=1, csv_file=Path("latency.csv"))
    with open("latency.csv") as file:
        (row,) = csv.DictReader(file)
    assert row["env_id"] == "InvertedPendulum-v4" and row["calls"] == "100"
    assert float(row["cpu_ms"]) > 0 and 0 <= float(row["late_percent"]) <= 100


@pytest.mark.parametrize(
    "wrong",
    [dict(updates=150), dict(seeds=()), dict(out="nowhere/b"), dict(alpha=-1), dict(updates=100)],
)
def test_a_bandit_that_cannot_be_run_is_answered_in_a_sentence(wrong):
    """With the last one the CSV that is there has other options."""
    Path("bandit.csv").write_text("learning_rate,alpha,update\n0.001,0.001,600\n")
    with pytest.raises(SystemExit, match=r"must|of other options"):
        bandit.main(bandit.Args(**dict(out="bandit") | wrong))
