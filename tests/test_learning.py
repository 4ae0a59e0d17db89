"""Does it learn? Balancing a pole whose velocities are hidden takes a memory.

InvertedPendulum gives 1 for each step of at most 1000. What the policy sees is where the cart and
the pole are, not how they move.
"""

import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPT = Path(__file__).resolve().parent.parent / "s2pg_sac.py"


def best_stochastic_return(tmp_path, *options):
    """The best mean return of 10 episodes, evaluated every 2500 of 15 000 steps."""
    command = [sys.executable, SCRIPT, "--env-id", "InvertedPendulum-v4", "--eval-episodes", "10"]
    command += ["--total-timesteps", "15000", "--eval-frequency", "2500", *options]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(run_dir))
    events.Reload()
    return max(event.value for event in events.Scalars("eval/return_stochastic"))


def test_s2pg_balances_a_pole_whose_velocity_it_cannot_see(tmp_path):
    assert best_stochastic_return(tmp_path) > 150


def test_without_a_memory_the_same_program_cannot(tmp_path):
    assert best_stochastic_return(tmp_path, "--memoryless") < 150
