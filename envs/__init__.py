"""Partially observable control tasks, and playing them.

`make` makes a task, `make_vec` several copies of it, and `evaluate` plays them.
The observation of each environment is a `Dict` of two float32 vectors: "policy", what the policy
may see, and "critic", the privileged state which a critic may use during training. The tasks are
those of Al-Hafez, Zhao, Peters, Tateo, "Time-Efficient Reinforcement Learning with Stochastic
Stateful Policies", ICLR 2024, arXiv 2311.04082.

Importing this package registers the memory tasks of `envs.memory` with Gymnasium.
"""

import functools
import warnings
from numbers import Integral

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.mujoco import MujocoEnv

from envs.errors import UsageError
from envs.mujoco import HIDE, RandomBodies, Wind, policy_mask
from envs.vector import EndlessEpisode, Together, evaluate, literals, returns, views
from envs.wrappers import Checked, PolicyAndCritic, Quiet, Split, UnitActions, check_actions

__all__ = [
    "EndlessEpisode", "Together", "UsageError", "evaluate", "literals", "make", "make_vec",
    "returns", "views",
]  # fmt: skip

for task in ("PointMassMemory", "PointMassDoor"):
    gym.register(f"{task}-v0", f"envs.memory:{task}", max_episode_steps=1000)
for name, delayed in (("CueRecall", False), ("CueRecall-delayed", True)):
    gym.register(f"{name}-v0", "envs.memory:CueRecall", kwargs={"delayed": delayed})
    for horizon in (5, 10, 20, 100, 300, 1000):
        kwargs = {"horizon": horizon, "delayed": delayed}
        gym.register(f"{name}-{horizon}-v0", "envs.memory:CueRecall", kwargs=kwargs)


def make(
    env_id: str,
    *,
    hide: str = "none",
    random_bodies: bool = False,
    wind: bool = False,
    privileged_critic: bool = True,
    render_mode: str | None = None,
    **env_kwargs,
) -> gym.Env:
    """Make an environment whose observation is `Dict(policy=Box(n,), critic=Box(m,))`, float32.

    `env_id` is the id of
    - a MuJoCo environment of Gymnasium, v4 or v5: the critic sees the whole observation;
    - a memory task of this package: CueRecall-v0, CueRecall-delayed-100-v0, PointMassDoor-v0, ...;
    - an environment of your own, as `module:Id-v0`, whose observation is a 1-D `Box` (which is
      taken as both entries) or a `Dict` with "policy" and "critic" (which are taken as they are).

    Args:
        hide: What the policy does not see of a MuJoCo observation. "velocities" leaves it the joint
            positions alone, "positions" the joint velocities alone, "none" everything.
        random_bodies: Each episode draws a size and a mass for every body, see `RandomBodies`. The
            critic sees the draw. Composite inertias (`cinert`), velocities about the centre of
            mass (`cvel`) and contact forces (`cfrc_ext`), which add up to the weight, would give
            the masses away, so the policy does not see them.
        wind: Each episode draws the direction of a constant wind, see `Wind`. The critic sees the
            direction. External forces (`cfrc_ext`) contain the wind itself, so the policy does not
            see them.
        privileged_critic: False hands the policy's entry to the critic too.
        render_mode: As in `gymnasium.make`.
        env_kwargs: Go to the constructor of the environment, as in `gymnasium.make`.

    Returns:
        The environment, with the time limit `gymnasium.make` gives it. Its attribute
        `critic_sees_more` (`env.get_wrapper_attr("critic_sees_more")`) is False where both entries
        are the same vector.

    Raises:
        UsageError: The id, an option or the environment's spaces are not among those above; or
            later, an observation or a reward is not finite, or has another shape
            than its space.
    """
    if hide not in HIDE:
        raise UsageError(f"hide is one of {', '.join(map(repr, HIDE))}, not {hide!r}.")
    options = dict(random_bodies=random_bodies, wind=wind, privileged_critic=privileged_critic)
    for name, value in options.items():
        if not isinstance(value, bool):
            raise UsageError(f"{name} is True or False, not {value!r}.")
    module, colon, _ = env_id.rpartition(":")
    if colon and not all(part.isidentifier() for part in module.split(".")):
        raise UsageError(f"{env_id!r} cannot be made: {module!r} is no name of a module.")
    if render_mode is not None:  # an environment that cannot render need not take the argument
        env_kwargs["render_mode"] = render_mode
    try:
        with warnings.catch_warnings():
            # v4 is what the literature reports, so it is chosen knowingly.
            warnings.filterwarnings("ignore", r".*environment \S+-v4 is out of date")
            # This is an error here, see below.
            warnings.filterwarnings("ignore", ".*not in the possible render_modes")
            env = gym.make(env_id, **env_kwargs)
            if env_kwargs.keys() - {"render_mode"} and isinstance(env.unwrapped, MujocoEnv):
                env.reset()  # some values are not looked at before
                env.step(np.zeros(env.action_space.shape))
    except (gym.error.Error, ImportError) as error:
        hint = "" if ":" in env_id else " One of your own module is module:Id-v0."
        raise UsageError(f"{env_id!r} cannot be made: {error}{hint}") from error
    except (TypeError, ValueError, LookupError, AssertionError, ArithmeticError, OSError) as error:
        if not env_kwargs:
            raise  # no argument of the user's is to blame, so it is a bug with a traceback
        raise UsageError(f"{env_id!r} cannot be made with {env_kwargs}: {error}") from error

    modes = env.metadata.get("render_modes", [])
    if render_mode not in {None, *modes, *(f"{mode}_list" for mode in modes)}:
        raise UsageError(f"{env_id!r} cannot be rendered as {render_mode!r}, but as {modes}.")

    check_actions(env.action_space)
    env = Checked(env)
    if isinstance(env.observation_space, spaces.Dict):
        if hide != "none" or random_bodies or wind:
            raise UsageError(
                f"{env_id!r} decides itself what its policy sees: hide, random_bodies and wind are "
                "for MuJoCo environments whose observation is a Box."
            )
        return PolicyAndCritic(env, privileged_critic)

    visible = policy_mask(env, hide, random_bodies, wind)
    if random_bodies:
        env = RandomBodies(env)
    if wind:
        env = Wind(env)
    # What the two wrappers append is for the critic alone.
    visible = np.pad(visible, (0, env.observation_space.shape[0] - visible.size))
    env = Split(env, visible)
    return PolicyAndCritic(env, privileged_critic and not visible.all())


def make_vec(
    env_id: str, num_envs: int = 1, *, video_folder: str | None = None, **options
) -> Together:
    """`num_envs` environments of `make(env_id, **options)`, stepped together, one row a step.

    Actions lie in [-1, 1]. An episode of T steps fills T + 1 rows: the step after its last one
    ignores its action, resets, and returns the first observation of the next (autoreset "next
    step"). `info["episode"]` has return "r" and length "l" where `info["_episode"]` is true; of
    the environment's own `info` there is only what tells success. With a `video_folder` the first
    environment is filmed. `critic_sees_more` is that of `make`.

    Raises:
        UsageError: As `make`, and if the environment cannot be filmed here.
    """
    if not isinstance(num_envs, Integral) or num_envs < 1:
        raise UsageError(f"num_envs is a whole number of at least 1, not {num_envs!r}.")
    folders = [video_folder] + [None] * (num_envs - 1)
    makers = [functools.partial(_make_one, env_id, folder, options) for folder in folders]
    env = Together(makers, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP)
    env.critic_sees_more = env.get_attr("critic_sees_more")[0]
    return env


def _make_one(env_id: str, video_folder: str | None, options: dict) -> gym.Env:
    if video_folder is not None:
        options = options | dict(render_mode="rgb_array")
    env = Quiet(make(env_id, **options))
    if video_folder is not None:
        try:
            env.reset(seed=0)
            env.render()
            env = gym.wrappers.RecordVideo(env, video_folder, episode_trigger=lambda episode: True)
        except Exception as error:  # graphics drivers raise what they like
            raise UsageError(
                f"cannot record video: {error!r} (without a screen, MUJOCO_GL=egl may help)"
            ) from error
    return UnitActions(gym.wrappers.RecordEpisodeStatistics(env))
