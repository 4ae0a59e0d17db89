"""An environment of a user's own: float64, bounds that are not symmetric, episodes of 7 steps."""

import gymnasium as gym
import numpy as np


class Robot(gym.Env):
    observation_space = gym.spaces.Box(-9, 9, (3,), np.float64)
    dt = np.float32(0.05)

    def __init__(self, low=2.0, faulty=False):
        self.action_space = gym.spaces.Box(np.float32([-1, low]), np.float32([3, 2.5]))
        self.shape = 2 if faulty else 3

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.np_random.normal(size=3), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.time += 1
        observation = np.zeros(self.shape) + self.np_random.normal(size=3)
        return observation, float(action[0]), False, self.time == 7, {}


def make(num_envs):
    """Several with actions in [-1, 1], for a script that lies alone."""

    def one():
        env = gym.wrappers.RescaleAction(Robot(), np.float32(-1), np.float32(1))
        return gym.wrappers.RecordEpisodeStatistics(env)

    mode = gym.vector.AutoresetMode.NEXT_STEP
    return gym.vector.SyncVectorEnv([one] * num_envs, autoreset_mode=mode)


gym.register("MyRobot-v0", Robot, disable_env_checker=True)
