"""Play a run of any script here: its returns, videos, demonstrations, and the policy for a robot.

    python evaluate.py runs/RUN
    python evaluate.py runs/RUN --episodes 5 --capture-video
    python evaluate.py runs/RUN --best
    python evaluate.py runs/RUN --stochastic --save-demonstrations expert.npz
    python evaluate.py runs/RUN --export policy.pt2

An exported policy needs torch and nothing of ours. It is without noise:

    program = torch.export.load("policy.pt2", extra_files=(files := {"policy.json": ""}))
    about, policy = json.loads(files["policy.json"]), program.module()
    z, action = torch.zeros(about["z_size"]), torch.zeros(about["action_size"])  # an episode begins
    while True:  # every about["seconds_per_step"]
        action, z = policy(obs, z, action)

`obs` [obs_size], what the policy sees, and `action` [action_size] are in the units of the
environment; all are float32. See `Policy` for z, and `describe` for what policy.json holds.
"""

import dataclasses
import importlib
import io
import json
import os
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import nn

import envs
import envs.demonstrations
from envs.wrappers import Split, UnitActions, find_wrapper


@dataclass
class Options:
    run: tyro.conf.Positional[Path]  # folder of a run
    episodes: int = 20  # noise-free, and as many stochastic; printed: mean +- standard deviation
    seed: int = 1  # of the environments and of the noise
    best: bool = False  # the weights with the highest stochastic return so far, not the last ones
    stochastic: bool = False  # film and save the stochastic episodes, not the noise-free ones
    capture_video: bool = False  # film the first environment, into RUN/videos
    save_demonstrations: Path | None = None  # write the episodes to this .npz file
    export: Path | None = None  # write the policy, noise-free, to this .pt2 file, and play nothing

    def __post_init__(self):
        if self.episodes < 1 or self.seed < 0:
            sys.exit("--episodes must be at least 1, and --seed at least 0")
        if self.export and (self.save_demonstrations or self.capture_video or self.stochastic):
            sys.exit("--export plays nothing and writes no noise: only --best goes with it")
        for path, suffix in (self.save_demonstrations, ".npz"), (self.export, ".pt2"):
            if path and not (path.suffix == suffix and path.parent.is_dir()):
                sys.exit(f"{path} must be a FILE{suffix}, in a folder that there is")


class Policy(nn.Module):
    """action, z = policy(obs, z, a_prev): without noise, in the units of the environment.

    z and a_prev, the last action, are zeros when an episode begins. For the network "no action yet"
    is the middle of the bounds, which need not be 0 in the units of the environment. So z has one
    value more, the last: while it is 0, a_prev is ignored.
    """

    def __init__(self, actor, box):
        super().__init__()
        self.actor = actor.requires_grad_(False)
        self.register_buffer("low", torch.tensor(box.low, dtype=torch.float64))
        self.register_buffer("high", torch.tensor(box.high, dtype=torch.float64))

    def forward(self, obs, z, a_prev):
        half = (self.high - self.low) / 2
        a_prev = ((a_prev - self.low) / half - 1).clamp(-1, 1) * z[-1]
        obs, z, a_prev = obs.unsqueeze(0), z[:-1].unsqueeze(0), a_prev.unsqueeze(0).float()
        action, z = self.actor.act(obs, z, a_prev, deterministic=True)
        action = torch.clamp(self.low + half * (action.squeeze(0) + 1), self.low, self.high)
        return action.float(), torch.cat([z.squeeze(0), torch.ones(1)])


def load(run, num_envs, video_folder=None, best=False):
    """What args.json holds, the environments and the agent of a run."""
    try:
        saved = json.loads((run / "args.json").read_text())
        options, name = dict(saved), Path(saved["script"])
        del options["script"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{run} is no run of a script here: {error!r}")
    if not (Path(__file__).parent / name.name).is_file():
        sys.exit(f"{run} is a run of {name}, which does not lie beside evaluate.py")
    script = importlib.import_module(name.stem)
    try:
        args = script.Args(**options)
    except TypeError as error:
        sys.exit(f"{run} has other options than {name}: {error}")
    args = dataclasses.replace(args, compile=False, cudagraphs=False)
    # make_env hands env_kwargs on to envs.make_vec, which can film
    film = {} if video_folder is None else dict(video_folder=str(video_folder))
    env_kwargs = dict(args.env_kwargs) | film
    env = script.make_env(dataclasses.replace(args, env_kwargs=env_kwargs), num_envs)
    agent = script.Agent(args, env, torch.device("cpu"))
    file = "best.pt" if best else "checkpoint.pt"
    try:
        state = torch.load(run / file, map_location="cpu", weights_only=True)
        agent.load_state_dict(state["agent"])
    except Exception as error:  # torch raises what it likes
        sys.exit(f"{run} has no {file} that fits its options: {error!r}")
    torch.set_num_threads(args.num_threads)
    return saved, env, agent


def describe(saved, env, actor, box):
    """What policy.json holds: sizes, bounds of the action, options of the run.

    `obs_index` has the places of obs in the environment's own observation, null if unknown;
    `seconds_per_step` is the `dt` of the environment, null where there is none.
    """
    space, first = env.single_observation_space, getattr(env, "envs", [env])[0]
    split, dt = find_wrapper(first, Split), getattr(first.unwrapped, "dt", None)
    return dict(
        env_id=saved["env_id"],
        obs_size=envs.views(getattr(space, "spaces", space))[0].shape[0],
        obs_index=None if split is None else np.flatnonzero(split.visible).tolist(),
        z_size=actor.z_dim + 1,
        action_size=actor.action_dim,
        action_low=box.low.tolist(),
        action_high=box.high.tolist(),
        seconds_per_step=None if dt is None else float(dt),
        run=saved,
    )


def export(path, saved, env, actor):
    """Write the policy as a program of torch.export, whole or not at all."""
    unit = find_wrapper(getattr(env, "envs", [env])[0], UnitActions)
    box = env.single_action_space if unit is None else unit.box
    if (box.low == box.high).any():  # from what the environment does one cannot tell a_prev
        sys.exit("a policy with an action whose bounds are equal cannot be exported")
    if getattr(actor, "draw_x0", False):
        sys.exit("a policy with --draw-x0 cannot be exported, as its actions are drawn")
    about = describe(saved, env, actor, box)
    about = json.loads(json.dumps(about), parse_constant=str)  # JSON itself has no infinity
    zeros = tuple(torch.zeros(about[f"{name}_size"]) for name in ("obs", "z", "action"))
    with warnings.catch_warnings():  # what nn.GRU does to its weights when it is traced
        warnings.filterwarnings("ignore", r".*_flat_weights\[")
        program = torch.export.export(Policy(actor, box), zeros)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"policy.json": json.dumps(about, indent=2)})
    try:
        Path(f"{path}.tmp").write_bytes(file.getvalue())
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        sys.exit(f"{path} cannot be written: {error.strerror}")
    finally:
        Path(f"{path}.tmp").unlink(missing_ok=True)


def main(options):
    if options.export:  # where the environment is a robot, it does not move
        saved, env, agent = load(options.run, 1, best=options.best)
        export(options.export, saved, env, agent.actor)
        return env.close()
    num_envs = min(options.episodes, 8)
    seed = int(np.random.SeedSequence(options.seed).generate_state(1)[0] >> 1)
    chosen = "stochastic" if options.stochastic else "noise-free"
    videos = options.run / "videos" / f"{chosen}-{time.time():.0f}"
    for mode in ("noise-free", "stochastic"):
        film = videos if options.capture_video and mode == chosen else None
        saved, env, agent = load(options.run, num_envs, film, options.best)
        played = envs.evaluate(agent.actor, env, options.episodes, mode == "noise-free", seed)
        env.close()
        returns = [episode["rewards"].sum() for episode in played]
        length = np.mean([len(episode["rewards"]) for episode in played])
        success = ""
        if "successes" in played[0]:
            success = f", success {np.mean([e['successes'].any() for e in played]):.0%}"
        print(
            f"{mode}: return {np.mean(returns):.2f} +- {np.std(returns):.2f}, "
            f"length {length:.0f}{success}, {len(played)} episodes"
        )
        if options.save_demonstrations and mode == chosen:
            envs.demonstrations.save(options.save_demonstrations, played, env, saved)
    for video in sorted(videos.glob("*.mp4")):
        if int(video.stem.split("-")[-1]) < len(range(0, options.episodes, num_envs)):
            print(video)
        else:  # cut short, when the other environments had played their share
            video.unlink()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
