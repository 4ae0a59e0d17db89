"""Memory tasks: something is shown at the start and needed until the end.

`PointMassMemory` and `PointMassDoor` are those of Al-Hafez, Zhao, Peters, Tateo, "Time-Efficient
Reinforcement Learning with Stochastic Stateful Policies", ICLR 2024, arXiv 2311.04082. `CueRecall`
is the smallest task of the kind: it takes minutes to learn, and its optimum is known.

Every observation is a `Dict` of "policy" and "critic", two float32 vectors; the critic's holds the
cue at all times.
"""

from numbers import Integral
from typing import ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from envs.errors import UsageError

GREEN, RED = (60, 170, 90), (210, 60, 40)


def observation(policy: list[float], critic: list[float]) -> dict[str, np.ndarray]:
    return {"policy": np.array(policy, np.float32), "critic": np.array(critic, np.float32)}


class CueRecall(gym.Env):
    """Repeat, for `horizon` steps, a cue that is shown before the first of them.

    - The cue is -0.8 or 0.8, drawn at reset.
    - Action, in [-1, 1]: the guess. Reward: 1 - |action - cue|; if `delayed`, `horizon` times that
      for the last action, and 1 - |action| for those before it.
    - Policy: (cue at step 0 and 0 after it, time / horizon). Critic: (cue, time / horizon).

    The optimal return is `horizon`. Without memory it is 1 + 0.2 (horizon - 1): any guess in
    [-0.8, 0.8] earns 0.2 on average over the two cues. If `delayed`, the optimal return is
    2 horizon - 1, and 1.2 horizon - 1 without memory.

    A policy that sees its last action can repeat it, and needs no other memory. If `delayed`, as in
    the delayed-response task of experiments with animals, all actions but the last should be 0, so
    to store the cue in them costs reward.

    Raises:
        UsageError: `horizon` is not a whole number of at least 1, or `delayed` not a bool.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, horizon: int = 20, delayed: bool = False, render_mode: str | None = None):
        if not isinstance(horizon, Integral) or horizon < 1:
            raise UsageError(f"horizon is a whole number of at least 1, not {horizon!r}.")
        if not isinstance(delayed, bool):
            raise UsageError(f"delayed is True or False, not {delayed!r}.")
        self.horizon, self.delayed = horizon, delayed
        self.render_mode = render_mode
        self.action_space = spaces.Box(-1, 1, (1,))
        box = spaces.Box(np.float32([-0.8, 0]), np.float32([0.8, 1]))
        self.observation_space = spaces.Dict(policy=box, critic=box)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.cue = self.np_random.choice([-0.8, 0.8])
        self.time, self.guess = 0, 0.0
        return observation([self.cue, 0], [self.cue, 0]), {}

    def step(self, action):
        self.time += 1
        time = self.time / self.horizon
        self.guess = float(action[0])
        reward = 1 - abs(self.guess - self.cue)
        # The end is a termination: the policy sees the time, so it is a state of a task with a
        # finite horizon, whose value after the last step is zero, and not a cut in a longer one.
        terminated = self.time == self.horizon
        if self.delayed:
            reward = self.horizon * reward if terminated else 1 - abs(self.guess)
        return observation([0, time], [self.cue, time]), reward, terminated, False, {}

    def render(self) -> np.ndarray:
        """Draw cue (green, above) and last guess (red) from -1 to 1: (300, 300, 3) uint8."""
        value = np.linspace(-1, 1, 300)
        image = np.full((300, 300, 3), 255, np.uint8)
        image[:150, np.abs(value - self.cue) < 0.05] = GREEN
        image[150:, np.abs(value - self.guess) < 0.05] = RED
        return image


class PointMassMemory(gym.Env):
    """Steer a point of constant speed to a goal that is shown near the start only.

    - Field: 150 x 150 units. Start at y = 15, goal at y = 130, the x of each drawn from
      {25, 57, 88, 120}. The cue is the goal's x, visible within 30 units of the start: a straight
      way to the goal takes at least 47 steps of pure memory.
    - Action, (1,) in [-1, 1]: the heading, pi (action + 1) rad from +x towards +y. A step is 1.8
      units long.
    - Reward: exp(-0.1 distance to the goal). Leaving the field earns -2 and terminates.
    - Policy: (x, y, cue), where the cue is 0 while it is not visible. Critic: (x, y, cue) always.
      Positions and cues are scaled from [0, 150] to [-1, 1].
    - `info["success"]`: whether the point has been within 5 units of the goal in this episode.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 30}

    size = 150.0
    speed = 1.8
    sight = 30.0
    reward_scale, reward_decay = 1.0, 0.1
    cues = 1

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode
        self.action_space = spaces.Box(-1, 1, (1,))
        box = spaces.Box(-1, 1, (2 + self.cues,))
        self.observation_space = spaces.Dict(policy=box, critic=box)

    def draw_episode(self):
        """Set `start` and `goal`, (2,), `cue`, (cues,), and `doors`, (y, left, right) each."""
        start_x, goal_x = self.np_random.choice([25.0, 57.0, 88.0, 120.0], size=2)
        self.start, self.goal = np.array([start_x, 15.0]), np.array([goal_x, 130.0])
        self.cue = np.array([goal_x])
        self.doors = []

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.draw_episode()
        self.trail = [self.start]
        self.success = False
        return self.observe(), {"success": False}

    def observe(self) -> dict[str, np.ndarray]:
        # The point may have left the field, by a step: its observation stays in the space.
        position = np.clip(self.trail[-1], 0, self.size)
        critic = np.append(position, self.cue) / (self.size / 2) - 1
        policy = critic.copy()
        if np.linalg.norm(self.trail[-1] - self.start) > self.sight:
            policy[2:] = 0
        return observation(policy, critic)

    def step(self, action):
        heading = np.pi * (float(action[0]) + 1)
        before = self.trail[-1]
        position = before + self.speed * np.array([np.cos(heading), np.sin(heading)])
        self.trail.append(position)

        distance = np.linalg.norm(position - self.goal)
        self.success |= bool(distance <= 5)
        lost = bool(np.any((position < 0) | (position > self.size))) or any(
            hits_wall(before, position, *door) for door in self.doors
        )
        reward = -2.0 if lost else self.reward_scale * np.exp(-self.reward_decay * distance)
        return self.observe(), float(reward), lost, False, {"success": self.success}

    def render(self) -> np.ndarray:
        """Draw the field, y upwards: (300, 300, 3) uint8."""
        pixels = (np.arange(300) + 0.5) * self.size / 300
        x, y = pixels, pixels[::-1, None]
        image = np.full((300, 300, 3), 255, np.uint8)

        def disc(centre, radius, colour):
            image[np.hypot(x - centre[0], y - centre[1]) <= radius] = colour

        disc(self.start, self.sight, (230, 240, 255))
        disc(self.goal, 5, GREEN)
        disc(self.start, 2, (150, 150, 150))
        for wall, left, right in self.doors:
            image[(np.abs(y - wall) <= 1) & ((x < left) | (x > right))] = 0
        column, row = np.clip(np.array(self.trail).T * 300 / self.size, 0, 299).astype(int)
        image[299 - row, column] = (240, 170, 120)
        disc(self.trail[-1], 2, RED)
        return image


class PointMassDoor(PointMassMemory):
    """Steer a point of constant speed through two doors that are shown near the start only.

    As `PointMassMemory`, but for:
    - Start (75, 10), goal (75, 140), walls at y = 60 and y = 90, each with a door 40 units wide
      whose left edge is drawn uniformly from 10 to 100. The cues are the two left edges, visible
      within 20 units of the start.
    - Reward: 10 exp(-0.03 distance to the goal). Touching a wall, too, earns -2 and terminates.
    """

    sight = 20.0
    reward_scale, reward_decay = 10.0, 0.03
    cues = 2

    def draw_episode(self):
        self.start, self.goal = np.array([75.0, 10.0]), np.array([75.0, 140.0])
        self.cue = self.np_random.uniform(10, 100, size=2)
        self.doors = [(y, left, left + 40) for y, left in zip((60.0, 90.0), self.cue, strict=True)]


def hits_wall(
    before: np.ndarray, after: np.ndarray, wall: float, left: float, right: float
) -> bool:
    """Whether the way from `before` to `after`, (2,), meets the wall at y = `wall` beside its door.

    The door is open from x = `left` to x = `right`, both included.
    """
    (x0, y0), (x1, y1) = before, after
    if not min(y0, y1) <= wall <= max(y0, y1):
        return False
    share = 1 if y0 == y1 else (wall - y0) / (y1 - y0)
    return not left <= (1 - share) * x0 + share * x1 <= right  # exact at both ends
