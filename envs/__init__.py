"""Partially observable control tasks, and playing them.

`make` hands out every task behind one interface, `make_vec` several at once; `evaluate` plays them.
The observation of each environment is a `Dict` of two float32 vectors: "policy", what the policy
may see, and "critic", the privileged state which a critic may use during training. The tasks are
those of Al-Hafez, Zhao, Peters, Tateo, "Time-Efficient Reinforcement Learning with Stochastic
Stateful Policies", ICLR 2024, arXiv 2311.04082.

Importing this package registers the memory tasks of `envs.memory` with Gymnasium.
"""

import warnings

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.utils import RecordConstructorArgs

from envs.errors import UsageError
from envs.mujoco import HIDE, RandomBodies, Wind, policy_mask
from envs.vector import evaluate, make_vec, returns, views

__all__ = ["UsageError", "evaluate", "make", "make_vec", "returns", "views"]

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
    - a memory task of this package: CueRecall-v0, PointMassMemory-v0, PointMassDoor-v0;
    - an environment of your own, as `module:Id-v0`, whose observation is a 1-D `Box` (which is
      taken as both entries) or a `Dict` with "policy" and "critic" (which are taken as they are).

    Args:
        hide: What the policy does not see of a MuJoCo observation. "velocities" leaves it the joint
            positions alone, "positions" the joint velocities alone, "none" everything.
        random_bodies: Each episode draws a size and a mass for every body, see `RandomBodies`. The
            critic sees the draw. Composite inertias (`cinert`) and velocities about the centre of
            mass (`cvel`) would give the masses away, so the policy does not see them.
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
        UsageError: The id, an option or the environment's spaces are not among those above.
    """
    if hide not in HIDE:
        raise UsageError(f"hide is one of {', '.join(map(repr, HIDE))}, not {hide!r}.")
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
    except (gym.error.Error, ImportError, TypeError, ArithmeticError) as error:
        raise UsageError(f"{env_id!r} cannot be made: {error}") from error

    modes = env.metadata.get("render_modes", [])
    if render_mode not in {None, *modes, *(f"{mode}_list" for mode in modes)}:
        raise UsageError(f"{env_id!r} cannot be rendered as {render_mode!r}, but as {modes}.")

    action_space = env.action_space
    if not (
        isinstance(action_space, spaces.Box)
        and len(action_space.shape) == 1
        and action_space.is_bounded()
    ):
        raise UsageError(f"Actions are a 1-D Box with finite bounds, not {action_space}.")

    if isinstance(env.observation_space, spaces.Dict):
        if hide != "none" or random_bodies or wind:
            raise UsageError(
                f"{env_id!r} decides itself what its policy sees: hide, random_bodies and wind are "
                "for MuJoCo environments whose observation is a Box."
            )
        return PolicyAndCritic(env, privileged_critic)

    _check_vector(env.observation_space, "The observation")
    visible = policy_mask(env, hide, random_bodies, wind)
    if random_bodies:
        env = RandomBodies(env)
    if wind:
        env = Wind(env)
    # What the two wrappers append is for the critic alone.
    visible = np.pad(visible, (0, env.observation_space.shape[0] - visible.size))
    env = Split(env, visible)
    return PolicyAndCritic(env, privileged_critic and not visible.all())


class Split(gym.ObservationWrapper, RecordConstructorArgs):
    """Turn a vector into `Dict(policy=its visible values, critic=all its values)`."""

    def __init__(self, env: gym.Env, visible: np.ndarray):
        """`visible` is a boolean mask with the shape of the observation."""
        RecordConstructorArgs.__init__(self, visible=visible)
        super().__init__(env)
        self.visible = visible
        box = env.observation_space
        policy_box = spaces.Box(box.low[visible], box.high[visible], dtype=box.dtype)
        self.observation_space = spaces.Dict(policy=policy_box, critic=box)

    def observation(self, observation: np.ndarray) -> dict[str, np.ndarray]:
        return {"policy": observation[self.visible], "critic": observation}


class PolicyAndCritic(gym.ObservationWrapper, RecordConstructorArgs):
    """Check and cast the entries "policy" and "critic" of an observation, and drop all others.

    Attributes:
        critic_sees_more: False where both entries are the same vector, so that a replay buffer
            need store only one.
    """

    def __init__(self, env: gym.Env, critic_sees_more: bool):
        """`critic_sees_more=False` hands the policy's entry to the critic too.

        Raises:
            UsageError: An entry is missing, is not a 1-D Box or is empty.
        """
        RecordConstructorArgs.__init__(self, critic_sees_more=critic_sees_more)
        super().__init__(env)
        self.critic_sees_more = bool(critic_sees_more)
        entries = env.observation_space.spaces
        if not {"policy", "critic"} <= entries.keys():
            raise UsageError(
                'A Dict observation needs the entries "policy" and "critic", '
                f"this one has {sorted(entries)}."
            )
        boxes = {}
        for name in ("policy", "critic"):
            box = entries[name if critic_sees_more else "policy"]
            _check_vector(box, f"What the {name} sees")
            low, high = box.low.astype(np.float32), box.high.astype(np.float32)
            boxes[name] = spaces.Box(low, high, dtype=np.float32)
        self.observation_space = spaces.Dict(boxes)

    def observation(self, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        policy = observation["policy"].astype(np.float32)
        critic = observation["critic"].astype(np.float32) if self.critic_sees_more else policy
        return {"policy": policy, "critic": critic}


def _check_vector(space: spaces.Space, what: str):
    if not isinstance(space, spaces.Box) or len(space.shape) != 1 or space.shape[0] == 0:
        raise UsageError(f"{what} is a 1-D Box with at least one value, not {space}.")
