"""evaluate.py: what it prints, films, saves and exports of a run, and what it refuses."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import envs
import envs.demonstrations
import evaluate
import flow_sac
import s2pg_ppo
import s2pg_sac

CUE = dict(env_id="CueRecall-v0", env_kwargs=dict(horizon=5))
PENDULUM = dict(env_id="InvertedPendulum-v4", hide="velocities")  # its actions lie in [-3, 3]
ROBOT = dict(env_id="my_robot:MyRobot-v0")  # its bounds are not symmetric
WITHOUT_US = """
import json, sys
sys.modules["gymnasium"] = None  # importing it fails
import numpy, torch
actions = []
for run in sys.argv[1:]:
    files = {"policy.json": ""}
    policy = torch.export.load(f"{run}/policy.pt2", extra_files=files).module()
    about, demo = json.loads(files["policy.json"]), numpy.load(f"{run}/demo.npz")
    rows, first = iter(torch.tensor(demo["observations"])), True
    actions.append([])
    for end in demo["terminations"] | demo["truncations"]:
        if first:
            z, action = torch.zeros(about["z_size"]), torch.zeros(about["action_size"])
        action, z = policy(next(rows).float(), z, action)
        actions[-1].append(action.tolist())
        first = end
        if end:
            next(rows)
print(json.dumps(actions))
"""


def make_run(folder, script=s2pg_sac, **options):
    """The folder of a run that has learnt nothing."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    args = script.Args(**options)
    agent = script.Agent(args, script.make_env(args, 1), torch.device("cpu"))
    for name, statistic in agent.named_buffers():
        if "normalizer" in name:
            statistic.copy_(torch.rand_like(statistic) + 0.5)
    saved = vars(args) | dict(script=f"{script.__name__}.py")
    (folder / "args.json").write_text(json.dumps(saved))
    torch.save(dict(agent=agent.state_dict()), folder / "checkpoint.pt")
    return folder


def test_an_exported_policy_acts_as_in_the_evaluation(tmp_path):
    """Of each kind, in a process without Gymnasium; the demonstrations are in the same units."""
    demonstrations, runs = [], []
    for name, options in [
        ("s2pg_sac", {}), ("s2pg_sac", dict(rnn="lstm")), ("s2pg_sac", dict(memoryless=True)),
        ("bptt_sac", dict(rnn="lstm")), ("s2pg_td3", {}), ("s2pg_ppo", {}), ("bptt_ppo", {}),
    ]:  # fmt: skip
        script = importlib.import_module(name)
        run = make_run(tmp_path / str(len(runs)), script, **ROBOT, **options)
        evaluate.main(evaluate.Options(run, episodes=2, save_demonstrations=run / "demo.npz"))
        evaluate.main(evaluate.Options(run, export=run / "policy.pt2"))
        with np.load(run / "demo.npz") as file:
            runs, demonstrations = [*runs, run], [*demonstrations, file["actions"]]
            np.testing.assert_allclose(file["actions"][:, 0], file["rewards"], rtol=1e-5)
            assert (abs(file["actions"][:, 1] - 2.25) <= 0.25).all()
    words = [sys.executable, "-c", WITHOUT_US, *runs]
    result = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and not result.stderr, result.stderr
    for actions, demo in zip(json.loads(result.stdout), demonstrations, strict=True):
        assert demo.std(0).min() > 1e-3
        np.testing.assert_allclose(actions, demo, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options, expected",
    [
        (PENDULUM, dict(obs_size=2, obs_index=[0, 1], action_low=[-3], seconds_per_step=0.04)),
        (CUE, dict(obs_size=2, obs_index=None, action_low=[-1], seconds_per_step=None)),
        (ROBOT, dict(obs_size=3, obs_index=[0, 1, 2], action_low=[-1, 2], seconds_per_step=0.05)),
    ],
)
def test_an_exported_policy_says_what_it_sees_and_does(options, expected, tmp_path, capsys):
    run = make_run(tmp_path, **options)
    evaluate.main(evaluate.Options(run, export=tmp_path / "policy.pt2"))
    assert not capsys.readouterr().out  # nothing is played
    files = {"policy.json": ""}
    torch.export.load(tmp_path / "policy.pt2", extra_files=files)
    about = json.loads(files["policy.json"])
    assert about["run"]["script"] == "s2pg_sac.py" and about["z_size"] == 33
    seconds = expected.pop("seconds_per_step")
    assert about["seconds_per_step"] == (seconds and pytest.approx(seconds))
    expected |= dict(env_id=options["env_id"].split(":")[-1])
    about["env_id"] = about["env_id"].split(":")[-1]
    assert {name: about[name] for name in expected} == expected


def test_what_an_exported_policy_says_is_json_without_python_s_infinity(tmp_path):
    run = make_run(tmp_path, s2pg_ppo, **CUE)
    evaluate.main(evaluate.Options(run, export=tmp_path / "policy.pt2"))
    files = {"policy.json": ""}
    torch.export.load(tmp_path / "policy.pt2", extra_files=files)
    about = json.loads(files["policy.json"], parse_constant=pytest.fail)
    assert about["run"]["target_kl"] == "Infinity"


@pytest.mark.parametrize("stochastic", [False, True])
def test_it_prints_films_and_saves_the_same_episodes(stochastic, tmp_path, capsys):
    run = make_run(tmp_path, **CUE, compile=True, cudagraphs=True)  # as on a card
    path = tmp_path / "demo.npz"
    options = dict(stochastic=stochastic, capture_video=True, save_demonstrations=path)
    evaluate.main(evaluate.Options(run, episodes=9, **options))
    lines = capsys.readouterr().out.splitlines()
    videos = sorted(map(str, run.glob("videos/*/*.mp4")))
    assert lines[2:] == videos and len(videos) == 2  # of 9 episodes in 8 environments

    env = envs.make_vec("CueRecall-v0", horizon=5)
    episodes = envs.demonstrations.load(str(path), env)
    with np.load(path) as file:
        made_by, returns = json.loads(str(file["made_by"])), file["rewards"].reshape(9, 5).sum(1)
    assert made_by["script"] == "s2pg_sac.py" and made_by["env_kwargs"] == [["horizon", 5]]
    np.testing.assert_allclose(made_by["returns"], returns)
    modes = ["noise-free", "stochastic"]
    assert [line.split(":")[0] for line in lines[:2]] == modes
    assert lines[stochastic] == (
        f"{modes[stochastic]}: return {returns.mean():.2f} +- {returns.std():.2f}, "
        "length 5, 9 episodes"
    )
    different = {tuple(episode["actions"][:, 0]) for episode in episodes}
    assert len(different) == (9 if stochastic else 2)  # two cues


def test_an_episode_that_ends_after_the_last_that_counts_is_not_shown(tmp_path, capsys):
    """Other environments are still in theirs, and the first one has begun another."""
    run = make_run(tmp_path, env_id="PointMassMemory-v0")
    evaluate.main(evaluate.Options(run, episodes=6, capture_video=True))
    (video,) = run.glob("videos/*/*.mp4")
    assert capsys.readouterr().out.splitlines()[2:] == [str(video)]


def test_the_seed_decides_the_episodes(tmp_path, capsys):
    """Environment i has the seed of the first + i, so seeds are hashed."""
    run, said = make_run(tmp_path, **PENDULUM), []
    for number, seed in enumerate((1, 1, 2)):
        path = tmp_path / f"{number}.npz"
        evaluate.main(evaluate.Options(run, episodes=4, seed=seed, save_demonstrations=path))
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    first, other = (np.load(tmp_path / f"{number}.npz")["observations"] for number in (1, 2))
    assert not set(first[:, 0]) & set(other[:, 0])


def test_it_tells_the_rate_of_success(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path, env_id="PointMassMemory-v0")
    episodes = [
        dict(rewards=np.ones(3), successes=np.array(success, dtype=bool))
        for success in ([0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0])
    ]
    monkeypatch.setattr(envs, "evaluate", lambda *args: episodes)
    evaluate.main(evaluate.Options(run))
    line = "return 3.00 +- 0.00, length 3, success 40%, 5 episodes"
    assert capsys.readouterr().out == f"noise-free: {line}\nstochastic: {line}\n"


@pytest.mark.parametrize(
    "file, text, says",
    [
        ("args.json", "{", "is no run"),
        ("args.json", "[]", "is no run"),
        ("args.json", "{}", "script"),
        ("checkpoint.pt", "torn", "no checkpoint.pt that fits"),
        (None, dict(script="theirs.py"), "theirs.py, which does not lie beside evaluate.py"),
        (None, dict(utd=1), "utd"),
        (None, dict(gamma=2), "--gamma must be in"),
        (None, dict(state_dim=7), "no checkpoint.pt that fits"),
        (None, dict(env_kwargs=dict(horizn=5)), "horizn"),
    ],
)
def test_a_run_that_cannot_be_played_is_answered_in_a_sentence(file, text, says, tmp_path):
    run = make_run(tmp_path, **CUE)
    if file is None:
        args = json.loads((run / "args.json").read_text()) | text
        file, text = "args.json", json.dumps(args)
    (run / file).write_text(text)
    with pytest.raises(SystemExit) as exit_info:
        evaluate.main(evaluate.Options(run, episodes=1))
    assert says in str(exit_info.value) and exit_info.value.code != 0


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(export=Path("policy.onnx")), "FILE.pt2"),
        (dict(export=Path("policy.pt2"), capture_video=True), "plays nothing"),
        (dict(export=Path("policy.pt2"), stochastic=True), "plays nothing"),
        (dict(export=Path("policy.pt2"), save_demonstrations=Path("a.npz")), "plays nothing"),
        (dict(save_demonstrations=Path("no/demo.npz")), "in a folder that there is"),
        (dict(episodes=0), "--episodes"),
    ],
)
def test_bad_options_are_answered_in_a_sentence(options, says):
    with pytest.raises(SystemExit, match=says):
        evaluate.Options(Path("runs/RUN"), **options)


def test_an_action_that_is_held_cannot_be_exported(tmp_path):
    """The environment does not tell what the policy did there, and a_prev needs it."""
    run = make_run(tmp_path, **ROBOT, env_kwargs=dict(low=2.5))
    with pytest.raises(SystemExit, match="bounds are equal"):
        evaluate.main(evaluate.Options(run, export=tmp_path / "policy.pt2"))
    assert not list(tmp_path.glob("policy.*"))


def test_what_cannot_be_written_is_told_in_a_sentence(tmp_path, monkeypatch):
    run, path = make_run(tmp_path, **CUE), tmp_path / "policy.pt2"
    path.mkdir()
    with pytest.raises(SystemExit, match=r"policy\.pt2 cannot be written: Is a directory"):
        evaluate.main(evaluate.Options(run, export=path))
    assert not list(tmp_path.glob("*.tmp"))


def test_a_flow_that_draws_its_first_noise_cannot_be_exported(tmp_path):
    run = make_run(tmp_path, flow_sac, **CUE, draw_x0=True)
    with pytest.raises(SystemExit, match="--draw-x0 cannot be exported"):
        evaluate.main(evaluate.Options(run, export=tmp_path / "policy.pt2"))
