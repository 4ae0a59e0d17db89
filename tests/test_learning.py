"""Does it learn? Stopping a mass whose velocity is hidden takes a memory (integrator.py).

So does balancing a pole, for those that imitate.
"""

import importlib

import numpy as np
import pytest
from integrator import Integrator

import envs

TASK = "--env-id integrator:Integrator-v0"
SAC = f"{TASK} --learning-starts 400 --batch-size 64 --eval-frequency 500 --total-timesteps"
PPO = f"{TASK} --num-steps 512 --num-minibatches 16 --gamma 0.95 --learning-rate 1e-3"
PPO += " --eval-frequency 2000 --total-timesteps"
POLE = "--env-id InvertedPendulum-v4"
WITHOUT, ENOUGH = 29, 32  # the most without a memory, and what a memory must reach; an expert: 38


class Learned(Exception):
    """There is no need to go on."""


@pytest.fixture
def best_return(tmp_path, monkeypatch):
    """best_return(script, options): the best evaluation of a run, which ends with one of `enough`.

    Each is the mean return of 16 episodes of the stochastic policy.
    """
    monkeypatch.chdir(tmp_path)

    def run(name, options, enough=ENOUGH):
        script, evaluate, returns = importlib.import_module(name), envs.vector.returns, []

        def evaluate_and_judge(*args):
            result = evaluate(*args)
            returns.append(result["return_stochastic"])
            if returns[-1] >= enough:
                raise Learned
            return result

        command = f"{name}.py --eval-episodes 16 {options}"
        monkeypatch.setattr("sys.argv", command.split())
        monkeypatch.setattr(envs.vector, "returns", evaluate_and_judge)
        try:
            script.train(script.parse_args())
        except Learned:
            return returns[-1]
        assert len(returns) > 1, "there was nothing to judge it by"
        return max(returns)

    return run


@pytest.mark.parametrize(
    "script, options",
    [
        ("s2pg_sac", f"{SAC} 6000"),
        ("s2pg_td3", f"{SAC} 6000"),
        ("s2pg_ppo", f"{PPO} 40000"),
    ],
)
def test_a_memory_stops_what_it_cannot_see_move(best_return, script, options):
    assert best_return(script, options) >= ENOUGH


def test_without_a_memory_it_goes_on_swinging():
    """Without a memory a policy is a function of x: at best a spring, of whatever stiffness.

    So no run has to show it. A policy that sees the velocity, too, gets the return of an expert.
    """

    def mean_return(policy):
        env, total = Integrator(), 0.0
        for seed in range(100):
            obs, ended = env.reset(seed=seed)[0], False
            while not ended:
                push = min(max(policy(*obs["critic"]), -1), 1)
                obs, reward, _, ended, _ = env.step([push])
                total += reward
        return total / 100

    springs = [mean_return(lambda x, v, k=k: -k * x) for k in np.geomspace(0.1, 30, 12)]
    assert max(springs) < WITHOUT
    assert mean_return(lambda x, v: -2 * x - 2 * v) >= 37


@pytest.mark.parametrize(
    "script, options",
    [
        ("s2pg_lsiq", f"{POLE} --batch-size 32 --eval-frequency 1000 --total-timesteps 20000"),
        ("s2pg_gail", f"{POLE} --eval-frequency 5000 --total-timesteps 100000"),
    ],
)
def test_an_expert_that_saw_more_is_imitated(best_return, script, options):
    """1 for each of 1000 steps in which the pole is up; without a memory it falls before 60."""
    assert best_return(script, options, enough=120) >= 120
