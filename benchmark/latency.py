"""How long an exported policy takes for an action, called at a fixed rate on one thread.

python evaluate.py runs/RUN --export policy.pt2
python benchmark/latency.py policy.pt2 --csv-file benchmark/results/latency.csv
"""

import csv
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.sweep import cpu_name


def main(
    policy: tyro.conf.Positional[Path],
    hertz: int = 100,
    seconds: int = 20,
    csv_file: Path | None = None,
):
    """Call it for so many seconds. `cpu_ms` is its computing time, without waiting for a core."""
    torch.set_num_threads(1)
    program = torch.export.load(policy, extra_files=(files := {"policy.json": ""}))
    about, act = json.loads(files["policy.json"]), program.module()
    z, action = torch.zeros(about["z_size"]), torch.zeros(about["action_size"])
    took, start = [], time.perf_counter()
    for step in range(seconds * hertz):
        time.sleep(max(0, start + step / hertz - time.perf_counter()))
        obs = torch.randn(about["obs_size"])
        before = np.array([time.perf_counter(), time.thread_time()])
        with torch.no_grad():
            action, z = act(obs, z, action)
        took.append([time.perf_counter(), time.thread_time()] - before)
    wall, cpu = 1000 * np.array(took).T
    row = dict(
        env_id=about["env_id"], hertz=hertz, calls=len(wall), median_ms=np.median(wall),
        percentile_99_ms=np.percentile(wall, 99), largest_ms=wall.max(), cpu_ms=np.median(cpu),
        late_percent=100 * (wall > 1000 / hertz).mean(), load=os.getloadavg()[0],
        cores=os.cpu_count(), hardware=cpu_name(), torch=torch.__version__,
    )  # fmt: skip
    row = {
        name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()
    }
    print(*(f"{name} {value}" for name, value in row.items()), sep="\n")
    if csv_file is not None:
        with open(csv_file, "w", newline="") as file:
            writer = csv.DictWriter(file, row, lineterminator="\n")
            writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
