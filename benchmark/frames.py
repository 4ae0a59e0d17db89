"""A strip of frames of each run: python benchmark/frames.py RUN RUN --out docs/pendulum.png

A row is one noise-free episode of a MuJoCo task; all begin alike. After the end of an episode the
simulation goes on, so that one can see the fall. Without a screen this needs MUJOCO_GL=egl.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs
import evaluate
from envs.wrappers import UnitActions

STEPS = 0, 20, 40, 55, 65, 75  # when a frame is taken


def play(run):
    """The frames of a run, whether it has a memory, and the last step of its episode, or None."""
    saved, _, agent = evaluate.load(run, 1)
    options = dict(hide=saved["hide"], render_mode="rgb_array", width=480, height=300)
    env = UnitActions(envs.make(saved["env_id"], **options | envs.literals(saved["env_kwargs"])))
    obs, _ = env.reset(seed=1)
    z, action = torch.zeros(1, agent.z_dim), torch.zeros(1, agent.action_dim)
    frames, end = [env.render()], None
    for step in range(1, STEPS[-1] + 1):
        action, z = agent.actor.act(torch.tensor(obs["policy"][None]), z, action, True)
        obs, _, terminated, truncated, _ = env.step(action[0].numpy())
        end = step if end is None and (terminated or truncated) else end
        frames.append(env.render())
    return np.stack([frames[step] for step in STEPS]), agent.z_dim > 0, end


def main(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path):
    shape = len(runs), len(STEPS)
    figure, panels = plt.subplots(*shape, figsize=(13, 1.2 * shape[0]), layout="constrained")
    for row, run in zip(np.atleast_2d(panels), runs):
        frames, memory, end = play(run)
        used = np.flatnonzero((frames > 16).any((0, 2, 3)))  # the sky of the simulator is black
        frames = frames[:, max(used[0] - 15, 0) : used[-1] + 15]
        frames = np.where(frames.max(-1, keepdims=True) > 16, 255 * (frames / 255) ** 0.6, 255)
        for panel, frame, step in zip(row, frames.astype(np.uint8), STEPS):
            panel.imshow(frame)
            ended = end is not None and step >= end
            panel.set_title(f"step {step}{', ended' * ended}", color="#c1272d" if ended else "k")
            panel.set(xticks=[], yticks=[])
        name = "with a\nmemory" if memory else "without\nmemory"
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", size=13, weight="bold")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
