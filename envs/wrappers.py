"""What stands between an environment and a learner: checks, the two views, the unit of actions."""

import contextlib

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from envs.errors import UsageError

SUCCESS = ("success", "is_success")  # what environments call it in `info`
LARGEST = np.finfo(np.float32).max


class Checked(gym.Wrapper, RecordConstructorArgs):
    """Stop at observations and rewards of another shape, and at those that float32 cannot hold.

    An exception from within is given a note with the environment and the step. `Checked.longest`
    is the number of steps of the longest episode that this process has played to its end.

    Raises:
        UsageError: The space of an observation is not a 1-D Box with at least one value, or a
            `Dict` of such at "policy" and "critic"; or a step is not as its space says.
    """

    longest = 0

    def __init__(self, env: gym.Env):
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self.time, self.is_dict = 0, isinstance(env.observation_space, spaces.Dict)
        self.boxes = {"observation": env.observation_space}
        if self.is_dict:
            entries = env.observation_space.spaces
            if not {"policy", "critic"} <= entries.keys():
                raise UsageError(
                    'A Dict observation needs the entries "policy" and "critic", '
                    f"this one has {sorted(entries)}."
                )
            self.boxes = {name: entries[name] for name in ("policy", "critic")}
        for name, box in self.boxes.items():
            check_vector(box, f"What the {name} sees" if self.is_dict else "The observation")
        self.observation_space = spaces.Dict(self.boxes) if self.is_dict else box

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self.time = 0
        with self.named():
            observation, info = self.env.reset(seed=seed, options=options)
        return self.checked(observation), info

    def step(self, action):
        self.time += 1
        with self.named():
            observation, reward, terminated, truncated, info = self.env.step(action)
        self.check("reward", reward, ())
        if terminated or truncated:
            Checked.longest = max(Checked.longest, self.time)
        return self.checked(observation), reward, terminated, truncated, info

    @contextlib.contextmanager
    def named(self):
        try:
            yield
        except Exception as error:
            error.add_note(f"in {self.env.spec.id!r}, at step {self.time} of an episode")
            raise

    def checked(self, observation):
        if not self.is_dict:
            return self.check("observation", observation, self.boxes["observation"].shape)
        return {k: self.check(k, observation[k], box.shape) for k, box in self.boxes.items()}

    def check(self, name: str, value, shape: tuple) -> np.ndarray:
        value = np.asarray(value)
        if value.dtype.kind not in "biuf":
            self.refuse(name, f"is of type {value.dtype}, and no number")
        if value.shape != shape:
            self.refuse(name, f"has the shape {value.shape}, and not {shape}")
        if not np.abs(value).max() <= LARGEST:  # nor if there is a NaN
            wrong = value[~(np.abs(value) <= LARGEST)].flat[0]
            self.refuse(name, f"holds {wrong}, which is no finite float32 number")
        return value

    def refuse(self, name: str, fault: str):
        raise UsageError(f"{self.env.spec.id!r}: {name} {fault}, at step {self.time} of an episode")


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
    """Cast the entries "policy" and "critic" of an observation to float32.

    Attributes:
        critic_sees_more: False where both entries are the same vector, so that a replay buffer
            need store only one.
    """

    def __init__(self, env: gym.Env, critic_sees_more: bool):
        """`critic_sees_more=False` hands the policy's entry to the critic too.

        Raises:
            UsageError: The policy sees nothing.
        """
        RecordConstructorArgs.__init__(self, critic_sees_more=critic_sees_more)
        super().__init__(env)
        self.critic_sees_more = bool(critic_sees_more)
        boxes = {}
        for name in ("policy", "critic"):
            box = env.observation_space[name if critic_sees_more else "policy"]
            check_vector(box, f"What the {name} sees")
            with np.errstate(over="ignore"):  # a bound beyond float32 is none
                low, high = box.low.astype(np.float32), box.high.astype(np.float32)
            boxes[name] = spaces.Box(low, high, dtype=np.float32)
        self.observation_space = spaces.Dict(boxes)

    def observation(self, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        policy = observation["policy"].astype(np.float32)
        critic = observation["critic"].astype(np.float32) if self.critic_sees_more else policy
        return {"policy": policy, "critic": critic}


class Quiet(gym.Wrapper, RecordConstructorArgs):
    """Keeps only success in `info`, as a vector environment copies all of it."""

    def __init__(self, env: gym.Env):
        RecordConstructorArgs.__init__(self)
        super().__init__(env)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, self.quiet(info)

    def step(self, action):
        *result, info = self.env.step(action)
        return *result, self.quiet(info)

    def quiet(self, info: dict) -> dict:
        return {name: bool(np.any(info[name])) for name in SUCCESS if name in info}


class UnitActions(gym.ActionWrapper, RecordConstructorArgs):
    """Actions in [-1, 1], float32; scaled in float64 and clipped, so none is out of bounds.

    A component whose bounds are equal is held at its value.
    """

    def __init__(self, env: gym.Env):
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self.box = env.action_space
        self.low, self.high = self.box.low.astype(np.float64), self.box.high.astype(np.float64)
        self.action_space = spaces.Box(-1, 1, self.box.shape, np.float32)

    def action(self, action: np.ndarray) -> np.ndarray:
        """From [-1, 1] to the units of the environment, [..., A].

        Raises:
            UsageError: The action is not finite.
        """
        if not np.isfinite(action).all():
            raise UsageError("the action is not finite: training has diverged")
        share = 0.5 * (np.asarray(action, np.float64) + 1)
        scaled = self.low + share * (self.high - self.low)
        return scaled.clip(self.low, self.high).astype(self.box.dtype)

    def reverse(self, action: np.ndarray) -> np.ndarray:
        """From the units of the environment, clipped to its bounds, to [-1, 1], [..., A]."""
        held = self.low == self.high
        share = (np.asarray(action, np.float64) - self.low) / (self.high - self.low + held)
        return np.where(held, 0, 2 * share - 1).clip(-1, 1).astype(np.float32)


def find_wrapper(env, kind):
    """The outermost wrapper of this kind, `env` itself included; None where there is none."""
    while isinstance(env, gym.Wrapper) and not isinstance(env, kind):
        env = env.env
    return env if isinstance(env, kind) else None


def check_vector(space: spaces.Space, what: str):
    if not isinstance(space, spaces.Box) or len(space.shape) != 1 or space.shape[0] == 0:
        raise UsageError(f"{what} is a 1-D Box with at least one value, not {space}.")


def check_actions(space: spaces.Space):
    with np.errstate(over="ignore", invalid="ignore"):
        if not (
            isinstance(space, spaces.Box)
            and np.issubdtype(space.dtype, np.floating)
            and len(space.shape) == 1
            and space.shape[0] > 0
            and np.isfinite(space.high.astype(np.float32) - space.low.astype(np.float32)).all()
        ):
            raise UsageError(
                "Actions are a 1-D Box of floats, at least one, with finite bounds of a finite "
                f"span in float32, not {space}."
            )
