"""Does it learn? Balancing a pole whose velocities are hidden takes a memory.

InvertedPendulum gives 1 for each step of at most 1000. What the policy sees is where the cart and
the pole are, not how they move.
"""

import importlib

import pytest

import envs

SAC = "s2pg_sac", "--eval-frequency", "2500", "--total-timesteps"
PPO = "s2pg_ppo", "--total-timesteps", "50000", "--eval-frequency", "10000"
LSIQ = "s2pg_lsiq", "--total-timesteps", "20000", "--eval-frequency", "2500", "--batch-size", "128"
GAIL = "s2pg_gail", "--total-timesteps", "100000", "--eval-frequency", "10000"


class Learned(Exception):
    """There is no need to go on."""


@pytest.fixture
def learns(tmp_path, monkeypatch):
    """learns(threshold, script, *options): does an evaluation of a run exceed the threshold?

    A return is the mean of 10 episodes of the stochastic policy. The run ends with the first.
    """
    monkeypatch.chdir(tmp_path)

    def run(threshold, name, *options):
        script, evaluate, returns = importlib.import_module(name), envs.returns, []

        def evaluate_and_judge(*args):
            returns.append(evaluate(*args)["return_stochastic"])
            if returns[-1] > threshold:
                raise Learned
            return {}

        command = [f"{name}.py", "--env-id", "InvertedPendulum-v4", "--eval-episodes", "10"]
        monkeypatch.setattr("sys.argv", [*command, *options])
        monkeypatch.setattr(envs, "returns", evaluate_and_judge)
        try:
            script.train(script.parse_args())
        except Learned:
            return True
        assert len(returns) > 1, "there was nothing to judge it by"
        return False

    return run


def test_s2pg_sac_balances_a_pole_whose_velocity_it_cannot_see(learns):
    assert learns(250, *SAC, "20000")


def test_without_a_memory_sac_cannot(learns):
    assert not learns(150, *SAC, "15000", "--memoryless")


def test_s2pg_ppo_balances_a_pole_whose_velocity_it_cannot_see(learns):
    assert learns(200, *PPO)


def test_without_a_memory_ppo_cannot(learns):
    assert not learns(100, *PPO, "--memoryless")


def test_s2pg_lsiq_imitates_an_expert_that_saw_more(learns):
    assert learns(150, *LSIQ)


def test_s2pg_gail_imitates_an_expert_that_saw_more(learns):
    assert learns(150, *GAIL)
