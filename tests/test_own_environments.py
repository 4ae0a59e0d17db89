"""Environments of a user's own: what they do wrong is told, and what was learned before is kept."""

import importlib
import random
import signal
import subprocess
import time
import traceback
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from filelock import FileLock
from test_scripts import BOTH, EACH, command, demonstrations, folder, load, logged, same, train

import envs
import evaluate
from envs.wrappers import UnitActions

FIXTURES = demonstrations, folder


class Env(gym.Env):
    """Episodes of `length` steps, whose reward is `reward(time)`; it draws from np.random."""

    action_space, made = gym.spaces.Box(-1, 1, (1,)), 0

    def __init__(self, size=3, length=5, reward=lambda time: 0.0, returns=5):
        self.observation_space = gym.spaces.Box(-9, 9, (size,))
        self.length, self.reward, self.returns = length, reward, returns
        Env.made, self.steps = Env.made + 1, 0

    def see(self):
        drawn = np.random.rand(*self.observation_space.shape) + random.random()  # noqa: NPY002
        return drawn.astype(np.float32)

    def reset(self, seed=None, options=None):
        self.time = 0
        return self.see(), {}

    def step(self, action):
        self.time, self.steps = self.time + 1, self.steps + 1
        ended = self.time == self.length
        return (self.see(), self.reward(self.steps), False, ended, {})[: self.returns]


def register(monkeypatch, **kwargs):
    """The options of a run on an `Env` with these arguments."""
    monkeypatch.setattr(Env, "made", 0)
    spec = gym.envs.registration.EnvSpec("Own-v0", Env, kwargs=kwargs, disable_env_checker=True)
    monkeypatch.setitem(gym.registry, "Own-v0", spec)
    return dict(env_id="Own-v0", env_kwargs={}, eval_frequency=0)


@BOTH
@pytest.mark.parametrize("error, says", [(ValueError, "a bug"), (envs.UsageError, "no finite")])
def test_an_exception_of_an_environment_comes_after_the_checkpoint(
    script, error, says, monkeypatch
):
    """A bug has its traceback, what is refused here a sentence; `RUN` goes on in both cases."""

    def fails_late(time):
        if time == 50:
            if error is ValueError:
                raise ValueError("a bug")
            return np.nan
        return 0.0

    task = register(monkeypatch, reward=fails_late)
    with pytest.raises(error, match=says) as caught:
        train(script, **task)
    assert isinstance(caught.value, SystemExit) == (error is envs.UsageError)
    if error is ValueError:
        assert (
            "in 'Own-v0', at step 5 of an episode" in traceback.format_exception(caught.value)[-1]
        )
    (run,) = Path("runs").iterdir()
    assert not list(run.glob("*.tmp"))
    before = load(run)
    assert 36 <= before["global_step"] <= 50
    del caught
    train(script, **register(monkeypatch), resume=str(run), total_timesteps=110)
    assert load(run)["global_step"] == 110 and not same(before["agent"], load(run)["agent"])


@EACH
def test_an_environment_that_resets_in_the_same_step_is_refused(script, monkeypatch):
    """Its first observation of an episode would take the place of the last one."""
    mode = gym.vector.AutoresetMode.SAME_STEP
    makers = [lambda: UnitActions(Env())]
    monkeypatch.setattr(
        importlib.import_module(script), "make_env",
        lambda args, num_envs: gym.vector.SyncVectorEnv(makers, autoreset_mode=mode),
    )  # fmt: skip
    with pytest.raises(AssertionError, match="see make_env"):
        train(script, **register(monkeypatch))


def test_an_environment_may_write_to_its_action(monkeypatch):
    """Nines, and neither the replay buffer nor an episode has any."""

    class Writing(Env):
        def step(self, action):
            action[:] = 9
            return super().step(action)

    mode = gym.vector.AutoresetMode.NEXT_STEP
    env = gym.vector.SyncVectorEnv([Writing], autoreset_mode=mode)
    task = register(monkeypatch) | dict(save_buffer=True)
    monkeypatch.setattr(importlib.import_module("s2pg_sac"), "make_env", lambda *args: env)
    run = train(**task)
    assert not (load(run)["rows"] == 9).any()
    (episode,) = envs.evaluate(evaluate.load(run, 1)[2].actor, env, 1, False, 0)
    assert (abs(episode["actions"]) < 1).all()


def test_a_step_that_returns_four_values_names_the_environment(monkeypatch):
    with pytest.raises(ValueError) as caught:
        train(**register(monkeypatch, returns=4))
    assert "in 'Own-v0', at step 1 of an episode" in traceback.format_exception(caught.value)[-1]


def test_a_bug_in_a_constructor_has_a_traceback_and_a_bad_argument_a_sentence(monkeypatch):
    task = register(monkeypatch, size=-1)
    with pytest.raises(ValueError) as caught:
        train(**task)
    assert not isinstance(caught.value, SystemExit)
    for options in [("size", "-1")], [("colour", "red")]:
        with pytest.raises(envs.UsageError, match=r"made with {'(size|colour)'"):
            train(**register(monkeypatch) | dict(env_kwargs=options))


def test_an_evaluation_without_an_end_is_told_and_training_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(envs.vector, "LONGEST_EPISODE", 30)
    monkeypatch.setattr(envs.wrappers.Checked, "longest", 0)
    task = register(monkeypatch, length=1000) | dict(eval_frequency=20)
    run = train(**task)
    told = [line for line in capsys.readouterr().out.splitlines() if "not evaluated" in line]
    assert len(told) == 3 and "no end of an episode in 30 steps" in told[0]
    assert load(run)["global_step"] == 60 and not (run / "best.pt").exists()
    assert not any(tag.startswith("eval/") for tag in logged(run))


@BOTH
def test_a_run_belongs_to_one_process(script, monkeypatch):
    task = register(monkeypatch)
    run = train(script, **task)
    before = (run / "checkpoint.pt").read_bytes()
    with FileLock(run / "lock"), pytest.raises(SystemExit, match="another process trains"):
        train(script, **task, resume=str(run), total_timesteps=120)
    assert (run / "checkpoint.pt").read_bytes() == before
    train(script, **task, resume=str(run), total_timesteps=120)


def test_a_run_under_nohup_outlives_its_terminal():
    """SIGHUP, which saves and stops as SIGTERM does, stays ignored where it is."""
    words = command("s2pg_sac", eval_frequency=0, total_timesteps=10**6, checkpoint_frequency=40)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(["nohup", *words], **pipes)
    assert b"random actions until" in next(process.stdout)
    while not list(Path("runs").glob("*/checkpoint.pt")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    process.communicate()


def test_a_seed_decides_what_np_random_draws(monkeypatch):
    """Evaluated or not, and resumed twice from the same checkpoint."""
    task = register(monkeypatch) | dict(save_buffer=True)
    one = train(**task)
    np.random.rand(7), random.random()  # noqa: NPY002
    other = train(**task | dict(eval_frequency=20))
    assert same(load(one)["agent"], load(other)["agent"])
    assert torch.equal(load(one)["rows"], load(other)["rows"])
    for run in one, other:
        train(**task, resume=str(run), total_timesteps=90)
    assert torch.equal(load(one)["rows"], load(other)["rows"])


@pytest.mark.parametrize("script", ["s2pg_sac", "bptt_sac"])
def test_a_buffer_that_does_not_fit_says_how_large_it_is(script, monkeypatch):
    """Of 27 648 observations, 10^12 rows, more than any address space holds."""
    task = register(monkeypatch, size=27_648)
    with pytest.raises(SystemExit, match=r"the buffer needs 110\d{6}\.\d GB: lower --buffer-size"):
        train(script, **task, buffer_size=10**12)
    assert not Path("runs").exists()


@pytest.mark.parametrize(("script", "save"), [("s2pg_sac", "checkpoint"), ("s2pg_ppo", "run")])
def test_there_may_be_one_environment_only(script, save, monkeypatch):
    """Without episodes to evaluate there is no evaluation, nor a checkpoint before it."""
    module, saved = importlib.import_module(script), []
    save_state = getattr(module, f"save_{save}")
    monkeypatch.setattr(
        module, f"save_{save}", lambda *parts, **state: saved.append(save_state(*parts, **state))
    )
    run = train(script, **register(monkeypatch) | dict(eval_frequency=20), eval_episodes=0)
    assert Env.made == 1 and not any(tag.startswith("eval/") for tag in logged(run))
    assert len(saved) == 1


def test_a_buffer_that_was_saved_need_not_be_read(monkeypatch):
    task = register(monkeypatch)
    run = train(**task, save_buffer=True)
    with pytest.raises(SystemExit, match="no update before step 80"):
        train(**task, resume=str(run), save_buffer=False, total_timesteps=80)
    train(**task, resume=str(run), save_buffer=False, total_timesteps=90)
    assert "rows" not in load(run)


def test_the_best_policy_is_kept_and_played(monkeypatch, capsys):
    returns = iter([2.0, 5.0, 3.0, 4.0, 1.0])
    agents = []

    def play(actor, *args):
        agents.append({name: value.clone() for name, value in actor.state_dict().items()})
        return dict(return_deterministic=0.0, return_stochastic=next(returns))

    monkeypatch.setattr(envs.vector, "returns", play)
    task = register(monkeypatch) | dict(eval_frequency=20)
    run = train(**task)
    train(**task, resume=str(run), total_timesteps=85)  # which does not forget the 5
    best = torch.load(run / "best.pt", weights_only=True)
    assert best["step"] == 40 and best["score"] == 5
    for is_best, weights in (True, agents[1]), (False, agents[4]):
        actor = evaluate.load(run, 1, best=is_best)[2].actor
        assert same(actor.state_dict(), weights)
    evaluate.main(evaluate.Options(run, episodes=1, best=True))
    assert capsys.readouterr().out.count("episodes") == 2
    for best in True, False:
        evaluate.main(evaluate.Options(run, best=best, export=Path("policy.pt2")))
        exported, weights = torch.export.load("policy.pt2").state_dict, agents[1 if best else 4]
        cell = [name for name in weights if name.startswith("cell.")]
        assert cell and all(torch.equal(exported[f"actor.{k}"], weights[k]) for k in cell)


def test_an_evaluation_that_fails_comes_after_a_checkpoint(monkeypatch):
    """Also where evaluations are more frequent than checkpoints."""

    def fail(*args):
        raise RuntimeError("of the environment")

    monkeypatch.setattr(envs.Together, "score", fail)
    with pytest.raises(RuntimeError):
        train(**register(monkeypatch) | dict(eval_frequency=40))
    (run,) = Path("runs").iterdir()
    assert load(run)["global_step"] == 40
