"""Does it learn? Balancing a pole whose velocities are hidden takes a memory.

InvertedPendulum gives 1 for each step of at most 1000. What the policy sees is where the cart and
the pole are, not how they move.
"""

import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
SAC = "s2pg_sac.py", "--total-timesteps", "15000", "--eval-frequency", "2500"
PPO = "s2pg_ppo.py", "--total-timesteps", "50000", "--eval-frequency", "10000"
LSIQ = (
    "s2pg_lsiq.py", "--total-timesteps", "7500", "--eval-frequency", "2500", "--batch-size", "128"
)  # fmt: skip
GAIL = "s2pg_gail.py", "--total-timesteps", "100000", "--eval-frequency", "20000"


def best_stochastic_return(cwd, script, *options):
    """The best mean return of 10 episodes among the evaluations of a run."""
    command = [sys.executable, ROOT / script, "--env-id", "InvertedPendulum-v4", *options]
    command += ["--eval-episodes", "10"]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (run_dir,) = (cwd / "runs").iterdir()
    events = EventAccumulator(str(run_dir))
    events.Reload()
    return max(event.value for event in events.Scalars("eval/return_stochastic"))


def test_s2pg_sac_balances_a_pole_whose_velocity_it_cannot_see(tmp_path):
    assert best_stochastic_return(tmp_path, *SAC) > 150


def test_without_a_memory_sac_cannot(tmp_path):
    assert best_stochastic_return(tmp_path, *SAC, "--memoryless") < 150


def test_s2pg_ppo_balances_a_pole_whose_velocity_it_cannot_see(tmp_path):
    assert best_stochastic_return(tmp_path, *PPO) > 200


def test_without_a_memory_ppo_cannot(tmp_path):
    assert best_stochastic_return(tmp_path, *PPO, "--memoryless") < 100


def test_s2pg_lsiq_imitates_an_expert_that_saw_more(tmp_path):
    assert best_stochastic_return(tmp_path, *LSIQ) > 150


def test_s2pg_gail_imitates_an_expert_that_saw_more(tmp_path):
    assert best_stochastic_return(tmp_path, *GAIL) > 150
