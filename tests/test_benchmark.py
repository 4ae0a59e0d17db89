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

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from rliable import metrics
from torch.utils.tensorboard import SummaryWriter

import bptt_ppo
import bptt_sac
import s2pg_gail
import s2pg_ppo
import s2pg_sac
import s2pg_td3
from benchmark import collect, memory, plot, sweep
from benchmark.claims import CLAIMS, Claim, Line

ROOT = Path(__file__).resolve().parent.parent


def start(name, *options, cwd):
    command = [sys.executable, str(ROOT / "benchmark" / f"{name}.py"), *map(str, options)]
    return subprocess.Popen(
        command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def run(name, *options, cwd):
    process = start(name, *options, cwd=cwd)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def smoke(cwd, **selection):
    return sweep.runs_of(CLAIMS["smoke"], cwd / "runs/sweep", **selection)


def wait_for(condition, what):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.parametrize("name", CLAIMS)
def test_the_options_of_every_claim_are_understood(name):
    for run in sweep.runs_of(CLAIMS[name], "out", seeds=(1,)):
        args = sweep.final_args(run)
        sweep.script_of(run.script).check_args(args)
        assert args.seed == 1 and args.eval_frequency > 0 and vars(args).get("save_buffer", True)
        assert set(CLAIMS[name].threshold) <= {r.folder.name.split("__")[0] for r in
                                               sweep.runs_of(CLAIMS[name], "out")}  # fmt: skip
    assert set(CLAIMS[name].cloning) <= set(CLAIMS[name].methods)


def test_a_method_overrides_its_task_and_claims_share_runs():
    claim = CLAIMS["sac_and_bptt"]
    runs = sweep.runs_of(claim, "out", methods=["SAC that sees everything"], seeds=(3,))
    assert [sweep.final_args(run).hide for run in runs] == ["none"] * 3
    assert [sweep.final_args(run).seed for run in runs] == [3] * 3
    folders = {name: {run.folder for run in sweep.runs_of(CLAIMS[name], "out")} for name in CLAIMS}
    assert len(folders["state_size"] & folders["cells"]) == 3  # 32 units of a GRU, three seeds
    assert len(folders["sac_and_bptt"]) == 6 * 3 * 5
    whole = sweep.runs_of(CLAIMS["cue_recall"], "out", methods=["BPTT-SAC, L = the horizon"])
    lengths = [sweep.final_args(run).sequence_length for run in whole[::3]]
    assert lengths == [20, 100, 300, 1000]
    on_a_card = sweep.runs_of(claim, "out", cuda=True)
    assert not {run.folder for run in on_a_card} & folders["sac_and_bptt"]
    assert all(sweep.final_args(run).cuda for run in on_a_card)
    assert not any(sweep.final_args(run).cuda for run in runs)


def test_a_sweep_killed_at_any_time_finishes_what_is_left(tmp_path):
    options = "smoke", "--processes", 2
    first = start("sweep", *options, cwd=tmp_path)
    wait_for(lambda: any(map(sweep.run_dir, smoke(tmp_path))), "a checkpoint")
    os.killpg(first.pid, signal.SIGKILL)  # the machine goes down, and the runs with it
    first.communicate()
    begun = {run.folder: sweep.run_dir(run) for run in smoke(tmp_path) if sweep.run_dir(run)}
    assert begun and not all(map(sweep.is_done, smoke(tmp_path)))
    for folder in begun:  # as if the code had changed since
        origin = json.loads((folder / "machine.json").read_text())
        older = dict(commit="older", hardware="Another CPU 2")
        (folder / "machine.json").write_text(json.dumps(origin | older))

    second = start("sweep", *options, cwd=tmp_path)
    wait_for(lambda: any(map(sweep.is_done, smoke(tmp_path))), "a finished run")
    second.terminate()
    out, err = second.communicate(timeout=60)
    assert second.returncode == 128 + signal.SIGTERM
    finished = sum(map(sweep.is_done, smoke(tmp_path)))
    assert 1 <= finished < 4, out + err

    status, out, err = run("sweep", *options, cwd=tmp_path)
    assert status == 0, err
    assert f"4 runs asked for, {4 - finished} to be done" in out
    assert all(map(sweep.is_done, smoke(tmp_path)))
    assert all(sweep.run_dir(run) == begun[run.folder] for run in smoke(tmp_path)
               if run.folder in begun)  # fmt: skip
    assert all(len(list(run.folder.glob("runs/*"))) == 1 for run in smoke(tmp_path))

    status, out, _ = run("sweep", *options, cwd=tmp_path)
    assert status == 0 and "0 to be done" in out
    status, out, _ = run("sweep", cwd=tmp_path)
    assert status == 0 and "4 of   4 runs done" in out

    (tmp_path / "results").mkdir()
    status, out, err = run("collect", "smoke", "--results", "results", cwd=tmp_path)
    assert status == 0, err
    with open(tmp_path / "results/smoke.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == collect.COLUMNS and len(rows) == 4 * 4
    for label in CLAIMS["smoke"].methods:
        for seed in "12":
            own = [row for row in rows if row["label"] == label and row["seed"] == seed]
            assert [row["step"] for row in own] == ["200", "400", "600", "800"]
            seconds = [float(row["wall_seconds"]) for row in own]
            assert seconds[0] > 0 and seconds == sorted(seconds) and seconds[-1] < 100
            assert all(('"memoryless": true' in row["options"]) == ("less" in label) for row in own)
            assert all("torch=" in row["versions"] and row["hardware"] for row in own)
    here = sweep.machine(cuda=False)
    both = f"older + {here['commit']}", f"Another CPU 2 + {here['hardware']}"
    assert both in {(row["commit"], row["hardware"]) for row in rows}
    assert all(row["versions"].count("=") == 3 and "+ " not in row["versions"] for row in rows)
    status, out, err = run("plot", "--csv", "results/smoke.csv", cwd=tmp_path)
    assert status == 0, err
    assert out.count("\n| ") == 5 - 1 and "| S2PG-SAC |" in out
    assert (tmp_path / "results/smoke.png").stat().st_size > 10_000

    own = [sweep.run_dir(run) for run in smoke(tmp_path, seeds=(1,))]  # with and without a memory
    options = "--csv", "own.csv", "--runs", tmp_path / "results"
    status, _, err = run("collect", *options, *own, cwd=tmp_path)
    assert status == 1 and "two runs of CueRecall-v0 are s2pg_sac, seed 1" in err
    assert not (tmp_path / "own.csv").exists()
    status, out, _ = run("collect", *options, own[0], cwd=tmp_path)
    assert status == 0 and "left out" in out and "own.csv: 4 evaluations" in out


def tiny_run(script, horizon, path, monkeypatch, **options):
    """Options and folder of a run of a few steps, whose policy has learned next to nothing."""
    path.mkdir(exist_ok=True)
    monkeypatch.chdir(path)
    options |= dict(num_steps=20) if "ppo" in script.__name__ else dict(learning_starts=20)
    args = script.Args(
        env_id="CueRecall-v0", env_kwargs=dict(horizon=horizon), total_timesteps=40,
        eval_episodes=2, **options,
    )  # fmt: skip
    script.train(args)
    (folder,) = (path / "runs").iterdir()
    return args, folder


@pytest.mark.parametrize("place", ["z", "a_prev", "nowhere"])
@pytest.mark.parametrize("script", [s2pg_sac, bptt_sac, s2pg_td3, s2pg_ppo, bptt_ppo])
def test_ablation_finds_where_a_policy_keeps_the_cue(script, place, tmp_path, monkeypatch):
    """With policies written by hand, which note the cue in one place and read it from there."""
    horizon = 10
    args, folder = tiny_run(script, horizon, tmp_path, monkeypatch)

    def act(self, obs, z, a_prev, deterministic=False):
        kept = {"z": z[:, :1], "a_prev": a_prev, "nowhere": 0 * a_prev}[place]
        cue = torch.where(obs[:, 1:] == 0, obs[:, :1], kept)
        return cue, cue.expand_as(z)

    agent = script.Agent(args, 2, 2, 1, False, torch.device("cpu"))
    monkeypatch.setattr(type(agent.actor), "act", act)
    *run, fresh = memory.load(folder)
    returns = memory.ablate(*run, 20)
    forgets = 1 + 0.2 * (horizon - 1)
    expected = dict.fromkeys(memory.CHANGES, horizon)
    if place == "z":
        expected["z = 0"] = forgets
    if place == "a_prev":
        # reads the contrary of its last action, so that every second one is right
        expected |= {"a_prev = 0": forgets, "-a_prev": horizon / 2 * (1 - 0.6)}
    if place == "nowhere":
        expected = dict.fromkeys(memory.CHANGES, forgets)
    assert returns == pytest.approx(expected, abs=1e-5)
    shares = memory.probe(*run, 400)
    # what is written in z is the cue, or without it a_prev, whose place the probe does not change
    assert shares == [1] * horizon if place != "nowhere" else shares[0] == 1
    if place == "nowhere":
        assert shares[1:] == pytest.approx([0.5] * (horizon - 1), abs=0.1)
    # o is the cue in one step of ten, the memory what was read or done last
    known = memory.readout(*run, fresh, 40)
    seen, remembered = {"z": (100, 100), "a_prev": (100, 100), "nowhere": (10, 10)}[place]
    assert known["o and a_prev"] == pytest.approx(seen, abs=5)
    assert known["and the memory"] == pytest.approx(remembered, abs=5)


def test_the_readout_tells_what_noise_hides_from_what_was_never_learned(tmp_path, monkeypatch):
    """Memories written by hand: of the trained policy the sum of all cues seen, noise on it."""
    _, folder = tiny_run(s2pg_sac, 10, tmp_path, monkeypatch)
    script, args, trained, fresh = memory.load(folder)

    def act(obs, z, a_prev, deterministic=False):
        z = z + obs[:, :1] + (0 if deterministic else torch.randn_like(z[:, :1]))
        return 0 * a_prev, z

    monkeypatch.setattr(trained, "act", act)
    monkeypatch.setattr(fresh, "act", lambda obs, z, a_prev, deterministic: (a_prev, 0 * z))
    known = memory.readout(script, args, trained, fresh, 400)
    # variances: of the cue .64, of the noise at step t that of t samples
    assert list(known) == list(memory.READ)
    assert known["the same, no noise"] == pytest.approx(100, abs=1e-6)
    assert known["the same, untrained"] == pytest.approx(known["o and a_prev"], abs=1)
    assert known["o and a_prev"] + 5 < known["and the memory"] < 60
    args.env_id, args.env_kwargs = "InvertedPendulum-v4", {}
    assert memory.readout(script, args, trained, fresh, 4) == {}  # where nothing is hidden


@pytest.mark.parametrize("script", [s2pg_sac, bptt_sac, s2pg_td3, s2pg_ppo, bptt_ppo])
def test_the_untrained_policy_is_the_one_that_the_run_began_with(script, tmp_path, monkeypatch):
    begun = []

    def keep(self, *args, **kwargs):
        init(self, *args, **kwargs)
        begun.append({k: v.clone() for k, v in self.actor.state_dict().items()})

    init = script.Agent.__init__
    with monkeypatch.context() as patch:
        patch.setattr(script.Agent, "__init__", keep)
        _, folder = tiny_run(script, 5, tmp_path, monkeypatch, seed=3)
    _, _, trained, fresh = memory.load(folder)
    (first,) = begun
    assert all(torch.equal(value, first[k]) for k, value in fresh.state_dict().items())
    assert not all(torch.equal(value, first[k]) for k, value in trained.state_dict().items())


def test_runs_from_before_a_change_of_the_defaults_are_not_taken_for_done(tmp_path, monkeypatch):
    own, _ = smoke(tmp_path, seeds=(1,))
    sweep.check_unchanged(own)  # nothing was run yet
    run_dir = own.folder / "runs" / "a"
    run_dir.mkdir(parents=True)
    args = vars(sweep.final_args(own))
    assert args["learning_starts"] == 20  # of the claim, and not of `TUNED`
    (run_dir / "checkpoint.pt").touch()
    (run_dir / "args.json").write_text(json.dumps(args | dict(an_option_of_old=1)))
    sweep.check_unchanged(own)
    monkeypatch.setitem(s2pg_sac.TUNED, "CueRecall", dict(learning_starts=1_000, critic_lr=0.5))
    with pytest.raises(ValueError, match=r"was run with critic_lr 0.001, which is 0.5 now"):
        sweep.check_unchanged(own)
    monkeypatch.setattr(sweep, "is_done", lambda run: True)
    with pytest.raises(ValueError, match="move that folder away"):
        collect.collect_claim("smoke", collect.Args(out=str(tmp_path / "runs/sweep")))
    with pytest.raises(SystemExit, match="move that folder away"):
        sweep.main(sweep.Args(claims=("smoke",), out=str(tmp_path / "runs/sweep")))


def test_policies_without_memory_and_other_folders_are_left_out(tmp_path, monkeypatch, capsys):
    _, folder = tiny_run(s2pg_sac, 5, tmp_path, monkeypatch)
    _, other = tiny_run(s2pg_sac, 5, tmp_path / "other", monkeypatch, memoryless=True)
    (tmp_path / "args.json").write_text(json.dumps(vars(s2pg_gail.Args())))
    runs = [("kept", folder), ("none", other), ("", folder), ("", tmp_path), ("", "here")]
    memory.study(runs, tmp_path / "my.csv", memory.Args(episodes=3, probe_episodes=200))
    out = capsys.readouterr().out
    assert f"{tmp_path} is a run of imitation" in out and "here is no run" in out
    with open(tmp_path / "my_ablated.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["kept", "s2pg_sac"]
    assert list(rows[0]) == ["env_id", "label", "seed", "episodes", *memory.CHANGES]
    with open(tmp_path / "my_probe.csv", newline="") as file:
        probed = list(csv.DictReader(file))
    assert [row["trained"] + row["step"] for row in probed] == [
        trained + step for _ in range(2) for trained in "01" for step in "01234"
    ]
    # as it is, a policy gets what its own script says of it
    args = s2pg_sac.Args(**json.loads((folder / "args.json").read_text()))
    args.evaluate, args.eval_episodes = str(folder), 3
    s2pg_sac.replay(args)
    mean = float(re.search("deterministic: return (.*?) ", capsys.readouterr().out)[1])
    assert float(rows[0]["as it is"]) == pytest.approx(mean, abs=0.06)


def at(link):
    """Where a link of /proc points to, or nowhere if its process has gone."""
    try:
        return link.resolve()
    except OSError:
        return None


def test_runs_that_a_killed_sweep_left_behind_are_not_begun_twice(tmp_path):
    options = "smoke", "--seeds", 1, "--methods", "S2PG-SAC"
    (own,) = smoke(tmp_path, seeds=(1,), methods=("S2PG-SAC",))
    first = start("sweep", *options, cwd=tmp_path)
    wait_for(lambda: sweep.run_dir(own), "a checkpoint")
    first.kill()  # and nothing else: the run goes on, slowly
    (pid,) = [int(p.parent.name) for p in Path("/proc").glob("[0-9]*/cwd") if at(p) == own.folder]
    os.kill(pid, signal.SIGSTOP)
    assert not sweep.is_done(own)
    status, out, err = run("sweep", *options, cwd=tmp_path)
    os.kill(pid, signal.SIGCONT)
    assert status == 1 and "is running already" in out + err
    wait_for(lambda: sweep.is_done(own), "the end of the run")
    assert len(list(own.folder.glob("runs/*"))) == 1


def test_submitit_takes_the_same_way(tmp_path):
    options = "smoke", "--seeds", 2, "--cluster", "local", "--processes", 1
    status, out, err = run("sweep", *options, cwd=tmp_path)
    assert status == 0, out + err
    assert all(map(sweep.is_done, smoke(tmp_path, seeds=(2,)))) and out.count("__2 done\n") == 2
    assert not any(map(sweep.is_done, smoke(tmp_path, seeds=(1,))))
    status, out, err = run("collect", "smoke", "--results", ".", cwd=tmp_path)
    assert status == 0 and out.count("not finished") == 2
    status, out, err = run("collect", "smoke", "--results", ".", "--seeds", 2, cwd=tmp_path)
    assert status == 0 and "not finished" not in out
    with open(tmp_path / "smoke.csv", newline="") as file:
        assert {row["seed"] for row in csv.DictReader(file)} == {"2"}


def test_a_run_that_has_to_leave_its_node_goes_to_the_queue_again(tmp_path):
    """submitit says so by a signal; its local controller starts again what asks for it."""
    options = "smoke", "--seeds", 1, "--methods", "S2PG-SAC", "--cluster", "local"
    (own,) = smoke(tmp_path, seeds=(1,), methods=("S2PG-SAC",))
    process = start("sweep", *options, cwd=tmp_path)
    wait_for(lambda: sweep.run_dir(own), "a checkpoint")
    begun = sweep.run_dir(own)
    (pid,) = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cwd")
        if at(path) == tmp_path
        and b"submitit.core._submit" in (path.parent / "cmdline").read_bytes()
    ]
    os.kill(pid, signal.SIGUSR2)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "__1 done" in out, out + err
    assert sweep.is_done(own) and sweep.run_dir(own) == begun
    log = (own.folder / "log.txt").read_text()
    assert "go on with --resume" in log and log.count("return at step 800") == 1


def test_a_run_that_is_slow_to_leave_goes_to_the_queue_all_the_same(tmp_path):
    (own,) = smoke(tmp_path, seeds=(1,), methods=("S2PG-SAC",))
    submitted, process = sweep.Submitted(), subprocess.Popen(["sleep", "300"])
    os.kill(process.pid, signal.SIGSTOP)  # so that it does not heed SIGTERM
    submitted.patience = 0.1
    sweep.CHILDREN.add(process)
    delayed = submitted.checkpoint(own)
    assert process.wait(timeout=10) == -signal.SIGKILL
    assert delayed.function is submitted and delayed.args == (own,)
    assert not sweep.CHILDREN and not sweep.STOPPED


def test_a_run_that_fails_fails_the_sweep(tmp_path):
    (own,) = smoke(tmp_path, seeds=(1,), methods=("S2PG-SAC",))
    own.folder.mkdir(parents=True)
    (own.folder / "runs").write_text("a file where the script wants a folder")
    status, out, err = run("sweep", "smoke", "--seeds", 1, cwd=tmp_path)
    assert status == 1 and "1 of 2 runs did not finish" in err
    assert "log.txt" in out + err and (own.folder / "log.txt").read_text()


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("sweep", ["smok"], "no claim smok; there are smoke"),
        ("sweep", ["smoke", "--methods", "SAC"], "no method 'SAC'; there are 'S2PG-SAC'"),
        ("sweep", ["smoke", "--tasks", "Ant-v4"], "no task 'Ant-v4'; there are 'CueRecall-v0'"),
        ("collect", ["smok"], "no claim smok"),
        ("collect", [], "name claims"),
        ("collect", ["smoke"], "no run of smoke is finished"),
        ("collect", ["--runs", "here"], "none of these is a run"),
        ("memory", ["smok"], "no claim smok"),
        ("memory", [], "name claims"),
        ("memory", ["smoke"], "no run of smoke is finished"),
        ("memory", ["smoke", "--tasks", "Ant-v4"], "no task 'Ant-v4'"),
        ("memory", ["--runs", "here"], "none of these is a run of a policy with a memory"),
        ("memory", ["smoke", "--episodes", "0"], "--episodes is 0; it must be at least 1"),
        ("memory", ["smoke", "--probe-episodes", "9"], "it must be at least 200"),
        ("sweep", ["smoke", "--processes", "0"], "it must be at least 1"),
        ("update_time", ["--cudagraphs"], "are for --device cuda"),
        ("sweep", ["smoke", "--seeds", "-1"], "--seed is -1; it must be in"),
        ("plot", ["--csv", "nothing.csv"], "nothing.csv"),
        ("plot", ["--csv", str(ROOT / "requirements.txt")], "is no CSV of collect.py"),
        ("plot", ["smok"], "no claim smok"),
        ("plot", ["td3", "--pages", "nowhere.md"], "no page nowhere.md"),
    ],
)
def test_bad_input_is_one_sentence(name, options, message, tmp_path):
    status, _, err = run(name, *options, cwd=tmp_path)
    assert status == 1 and err.startswith(f"{name}.py: ") and message in err
    assert len(err.splitlines()) == 1


def test_without_slurm_nothing_is_submitted_to_it(monkeypatch):
    monkeypatch.setattr(sweep.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="there is no srun here"):
        sweep.main(sweep.Args(claims=("smoke",), cluster="slurm"))


def test_one_csv_has_one_expert(tmp_path):
    def level(value):
        return ["E-v0", "expert", "demonstrations", "{}", 0, 0, 0.0, value, value, *[""] * 5]

    collect.write([level(5.0), level(5.0)], tmp_path / "new/a.csv")
    collect.write([level(5.0)], tmp_path / "new/a.csv", add=True)
    assert len((tmp_path / "new/a.csv").read_text().splitlines()) == 2
    with pytest.raises(ValueError, match=r"two experts of E-v0, with returns .*: collect them"):
        collect.write([level(5.0), level(6.0)], tmp_path / "new/a.csv")


def test_the_first_table_has_means_and_what_is_best_with_each_seed_in_bold(tmp_path, monkeypatch):
    claim = Claim("", dict.fromkeys(("a", "b", "c"), ""), ["--env-id Here-v0"])
    monkeypatch.setattr(plot, "CLAIMS", {"one": claim, "later": claim})
    lines = [
        Line("all three", "one", "Here-v0", "a", "b", "c"),
        Line("two of them", "one", "Here-v0", "a", None, "c"),
        Line("no run yet", "later", "Here-v0", "a", "b", "c"),
        Line("not of this task", "one", "There-v0", "a", "b", "c"),
        Line("one is shorter", "one", "Here-v0", "d", "b", "c"),
        Line("one alone", "one", "Here-v0", "e", "f", "c2"),
    ]
    monkeypatch.setattr(plot, "OVERVIEW", lines)
    ends = dict(a=(20, 31), b=(10, 21), c=(5, 15), d=(90, 92), e=(7, 9))
    header = ["env_id", "label", "seed", "step", "options", "wall_seconds"]
    header += [f"return_{mode}" for mode in plot.MODES]
    with open(tmp_path / "one.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for label, returns in ends.items():
            for seed, end in enumerate(returns):
                for step, value in ((10_000, 100), (20_000, end))[: 1 if label == "d" else 2]:
                    writer.writerow(["Here-v0", label, seed, step, "{}", step, value, 0])
    assert plot.overview(tmp_path).splitlines()[2:] == [
        "| all three | 20,000 | 25.5 | 15.5 | 10.0 | `one` |",  # 20 is not above 21
        "| two of them | 20,000 | **25.5** |  | 10.0 | `one` |",
        "| no run yet |  |  |  |  | `later` |",
        "| not of this task |  |  |  |  | `one` |",
        "| one is shorter | 20,000 | **100** after 10,000 | 15.5 | 10.0 | `one` |",
        "| one alone | 20,000 | 8.0 |  |  | `one` |",
    ]


def test_the_tables_of_the_pages_are_those_of_the_csvs():
    status, _, err = run("plot", "--check", cwd=ROOT)
    assert status == 0, err


def test_what_memory_py_writes_becomes_a_table_and_a_picture(tmp_path):
    claim = CLAIMS["delayed_response"]
    labels = "BPTT-SAC, L = the horizon", "S2PG-SAC"
    env_ids = "CueRecall-delayed-v0", "CueRecall-delayed-5-v0"
    runs = [[env_id, label, seed] for env_id in env_ids for label in labels for seed in (1, 2, 10)]
    returns = [[*run, 40, 10.04, 200.6, -1, run[2]] for run in runs]
    header = ["env_id", "label", "seed"]
    header_a = [*header, "episodes", *memory.CHANGES]
    memory.write(tmp_path / "a.csv", header_a, [[*run, 40, 0, 0, 0, 0] for run in runs[:7]])
    memory.write(tmp_path / "a.csv", header_a, returns[4:], add=True)
    memory.write(tmp_path / "a.csv", header_a, returns[:4], add=True)
    with pytest.raises(ValueError, match=r"a\.csv has other columns than env_id"):
        memory.write(tmp_path / "a.csv", header, [], add=True)
    assert plot.memory_table(plot.rows_of(tmp_path / "a.csv", claim)).splitlines() == [
        "|  | as it is | a_prev = 0 | -a_prev | z = 0 |", "| --- | --- | --- | --- | --- |",
        *(
            line
            for env_id in env_ids[::-1]  # as in the claim
            for line in (
                f"| **{env_id}** |  |  |  |  |",
                *(
                    f"| {label} | 10.0, 10.0, 10.0 | 201, 201, 201 | -1.0, -1.0, -1.0 "
                    "| 1.0, 2.0, 10.0 |"
                    for label in labels[::-1]
                ),
            )
        ),
    ]  # fmt: skip
    shares = [
        [*run, trained, step, 1 / (1 + step * run[2]) if trained else 0.5]
        for run in runs
        for trained in (0, 1)
        for step in range(3)
    ]
    memory.write(tmp_path / "p.csv", [*header, "trained", "step", "correct"], shares)
    data = plot.rows_of(tmp_path / "p.csv", claim)
    assert list(data) == list(env_ids[::-1]) and list(data[env_ids[0]]) == list(labels[::-1])

    drawn = {}

    def keep(figure, path, **_):
        for panel in figure.axes:
            drawn[panel.get_title()] = [line.get_ydata() for line in panel.get_lines()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plt.Figure, "savefig", keep)
        plot.draw_probe(data, claim, tmp_path / "p.png")
    assert list(drawn) == list(data)
    for lines in drawn.values():
        mean = [100, 100 * (1 / 2 + 1 / 3 + 1 / 11) / 3, 100 * (1 / 3 + 1 / 5 + 1 / 21) / 3]
        np.testing.assert_allclose(lines[:4], [[50] * 3, mean] * 2)


def test_tables_go_between_their_marks_and_nowhere_else(tmp_path):
    mark = "<!-- a: plot.py writes this table -->"
    text = f"before\n{mark}\nold\n<!-- end -->\nafter <!-- end -->\n"
    new = plot.insert(text, {"a": "| 1 |", "b": "| 2 |"})
    assert new == f"before\n{mark}\n\n| 1 |\n\n<!-- end -->\nafter <!-- end -->\n"
    assert plot.insert(new, {"a": "| 1 |"}) == new
    assert plot.insert(new, {"a": r"| \1 |"}) == new.replace("| 1 |", r"| \1 |")


@pytest.mark.parametrize("seeds", [1, 2, 3, 4, 5, 9])
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


def test_the_time_to_a_threshold_is_the_median_of_its_first_crossing():
    steps = np.broadcast_to([100, 200, 300], (3, 3))
    returns = np.array([[0, 5, 0], [5, 0, 0], [0, 0, 5]])
    assert plot.to_threshold(steps, returns, 5) == "200"
    assert plot.to_threshold(steps / 100, returns, 5) == "2"
    assert plot.to_threshold(steps, returns * [[1], [1], [0]], 5) == "200 (2 of 3)"
    assert plot.to_threshold(steps, returns, 6) == "never (0 of 3)"


def test_a_table_has_each_seed_and_levels_without_a_curve():
    claim = Claim("", {"b": "", "a": ""}, ["--env-id E-v0"], threshold={"E-v0": 5})
    level = curve([[0]], [[7]], steps=[0])
    data = {"E-v0": {"a": curve([[1, 2, 3]] * 2, [[0, 4, 5], [1, 2, 3]]), "expert": level,
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
    mixed = "mean or, from four seeds on, IQM"
    assert f"| {mixed} [range or 95 %] | best {mixed} |" in plot.table(data, claim)
    del data["E-v0"]["b"]
    assert "| IQM [95 %] | best IQM |" in plot.table(data, claim)
    assert len({line.count("|") for line in lines}) == 1


def test_shares_of_success_are_collected_and_shown_in_percent(tmp_path):
    run, rates = tmp_path / "run", {"deterministic": 0.5, "stochastic": 0.25}
    run.mkdir()
    options = dict(env_id="PointMassMemory-v0", exp_name="a", eval_frequency=100)
    (run / "args.json").write_text(json.dumps(vars(s2pg_ppo.Args(**options))))
    with SummaryWriter(run) as writer:
        for step in (100, 200):
            for mode, rate in rates.items():
                writer.add_scalar(f"eval/return_{mode}", 7.0, step)
                writer.add_scalar(f"eval/success_{mode}", rate * step / 200, step)
            writer.add_scalar("charts/seconds", step, step)
    collect.write(collect.evaluations(run), tmp_path / "a.csv")
    claim = Claim("", {"a": ""}, [], column="success_stochastic", clock=False)
    data = plot.read(tmp_path / "a.csv", claim)
    found = data["PointMassMemory-v0"]["a"]
    np.testing.assert_allclose(found.stochastic, [[12.5, 25]])
    np.testing.assert_allclose(found.deterministic, [[25, 50]])
    lines = plot.table(data, claim).splitlines()
    assert lines[0].startswith("|  | success in % at the end, each seed | noise-free |")
    assert lines[3] == "| a | 25.0 | 50.0 | 25.0 | 25.0 at 200 |"
    returns = plot.read(tmp_path / "a.csv", claim._replace(column="return_stochastic"))
    assert (returns["PointMassMemory-v0"]["a"].stochastic == 7).all()


def evaluated(path, steps, seed=1, finished=True, **options):
    """A run in folder `path`, evaluated at `steps`; the last time noise-free only if unfinished."""
    path.mkdir()
    options = dict(env_id="Hopper-v4", exp_name="a", seed=seed) | options
    (path / "args.json").write_text(json.dumps(vars(s2pg_ppo.Args(**options))))
    with SummaryWriter(path) as writer:
        for step in steps:
            writer.add_scalar("eval/return_deterministic", step, step)
            if finished or step < steps[-1]:
                writer.add_scalar("eval/return_stochastic", step, step)
    return collect.evaluations(path)


@pytest.mark.parametrize(
    "frequency, num_envs, seen, drawn",
    [
        (100, 1, [100, 200], [100, 200]),
        (100, 4, [102, 201, 203], [100, 200, 203]),  # passed together; the end is no multiple
        (0, 1, [250], [250]),  # evaluated at the end alone
    ],
)
def test_steps_of_evaluations(frequency, num_envs, seen, drawn, tmp_path):
    options = dict(eval_frequency=frequency, num_envs=num_envs)
    collect.write(evaluated(tmp_path / "run", seen, **options), tmp_path / "a.csv")
    found = plot.read(tmp_path / "a.csv", Claim("", {}, []))["Hopper-v4"]["a"]
    assert found.steps.tolist() == drawn and found.stochastic.tolist() == [seen]


def test_a_run_may_be_collected_while_it_is_evaluated(tmp_path):
    rows = evaluated(tmp_path / "run", [100, 200], finished=False)
    assert [row[collect.COLUMNS.index("step")] for row in rows] == [100]


@pytest.mark.parametrize("columns", [10, 14])  # the first versions had fewer
def test_rows_of_runs_that_are_elsewhere_are_kept_if_asked_for(columns, tmp_path):
    path = tmp_path / "a.csv"
    one, two = (evaluated(tmp_path / str(seed), [50, 100], seed=seed) for seed in (1, 2))
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(row[:columns] for row in [collect.COLUMNS, *one, *two])
    two, three = (evaluated(tmp_path / f"new {seed}", [100], seed=seed) for seed in (2, 3))
    collect.write(two + three, path, add=True)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == collect.COLUMNS
    expected = [("1", "50"), ("2", "100"), ("3", "100"), ("1", "100")]
    assert sorted((row["seed"], row["step"]) for row in rows) == sorted(expected)
    before = path.read_bytes()
    collect.write([], path, add=True)
    assert path.read_bytes() == before
    collect.write(one, path)
    with open(path, newline="") as file:
        assert {row["seed"] for row in csv.DictReader(file)} == {"1"}


@pytest.mark.parametrize("text", ["", "seed,step\n1,2\n"])
def test_nothing_is_added_to_a_foreign_file(text, tmp_path):
    run_dir, path = tmp_path / "run", tmp_path / "a.csv"
    evaluated(run_dir, [100])
    path.write_text(text)
    options = "--runs", run_dir, "--csv", path
    status, _, err = run("collect", *options, "--add", cwd=tmp_path)
    assert status == 1 and err == f"collect.py: {path} is no CSV of collect.py\n"
    assert path.read_text() == text


@pytest.mark.parametrize("script", [s2pg_sac, s2pg_ppo, bptt_sac])
def test_runs_of_an_earlier_version_are_collected(script, tmp_path):
    """One that lacked an option, and had one that is no more."""
    evaluated(tmp_path / "run", [100])
    args = vars(script.Args(env_id="Hopper-v4", exp_name="a", gamma=0.9))
    del args["checkpoint_frequency"]
    (tmp_path / "run/args.json").write_text(json.dumps(args))
    (row,) = (dict(zip(collect.COLUMNS, row)) for row in collect.evaluations(tmp_path / "run"))
    assert row["script"] == script.__name__ and json.loads(row["options"]) == {"gamma": 0.9}

    own = sweep.Run("b", f"{script.__name__}.py", (), tmp_path)
    (tmp_path / "run/args.json").write_text(json.dumps(args | dict(gone=1)))
    machine = dict(versions={}, commit="", hardware="")
    (row,) = collect.evaluations(tmp_path / "run", own, machine)
    assert row[1:3] == ["b", script.__name__] and json.loads(row[3]) == {"gamma": 0.9, "gone": 1}
    with pytest.raises(ValueError, match="no script has the options"):
        collect.evaluations(tmp_path / "run")


@pytest.mark.parametrize(
    "labels", [[*claim.methods, "expert"] for claim in CLAIMS.values()] + [["S2PG 1", "S2PG 2"]]
)
def test_no_two_curves_have_one_color(labels, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plt, "close", lambda figure: drawn.extend(figure.axes[0].lines))
    curves = {label: curve([[1, 2, 3]], [[1, 2, 3]]) for label in labels}
    plot.draw({"A-v0": curves}, Claim("", {}, []), tmp_path / "a.png")
    colors = {to_hex(line.get_color()) for line in drawn}
    assert len(drawn) == len(colors) == len(labels)


def test_seeds_without_a_common_step_are_answered_in_a_sentence(tmp_path):
    rows = evaluated(tmp_path / "1", [100, 200])
    rows += evaluated(tmp_path / "2", [150], seed=2, eval_frequency=50)
    collect.write(rows, tmp_path / "a.csv")
    with pytest.raises(SystemExit, match="the seeds of a were evaluated at no common step"):
        plot.read(tmp_path / "a.csv", Claim("", {}, []))


def test_a_picture_has_a_curve_for_each_method_and_clock(tmp_path, monkeypatch):
    axes = []
    monkeypatch.setattr(plt, "close", lambda figure: axes.extend(figure.axes))
    level = curve([[0]], [[7]], steps=[0])
    minutes = [[1, 2, 3], [2, 3, 4], [4, 8, 9]]
    both = {"S2PG-SAC": curve(minutes, np.eye(3)), "expert": level}
    claim = Claim("", {"S2PG-SAC": ""}, [], threshold={"B-v0": 1})
    plot.draw({"A-v0": both, "B-v0": both}, claim, tmp_path / "a.png")
    assert [len(panel.lines) for panel in axes] == [2, 3, 2, 3]  # A, B by steps; A, B by minutes
    assert axes[2].get_xlabel() == "minutes of training on one core"
    assert axes[2].lines[0].get_xdata().tolist() == [2, 3, 4]  # the median of the seeds
    assert axes[0].get_position().y0 > axes[2].get_position().y1  # above each other
    axes.clear()
    plot.draw({"A-v0": both}, claim, tmp_path / "one.png")
    assert axes[0].get_position().x1 < axes[1].get_position().x0  # one task's, beside each other
    axes.clear()
    plot.draw({"A-v0": both}, claim._replace(clock=False), tmp_path / "b.png")
    assert [len(panel.lines) for panel in axes] == [2]
    axes.clear()
    five = {f"{name}-v0": both for name in "ABCDE"}
    plot.draw(five, claim._replace(clock=False), tmp_path / "c.png")
    assert [panel.get_title() for panel in axes if panel.get_visible()] == list(five)
    assert axes[0].get_position().y0 > axes[3].get_position().y1  # three in a row
