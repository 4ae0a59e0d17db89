"""A mass on a line, to be held at 0: the policy sees where it is, the critic how it moves as well.

Pushing against the velocity, too, gives 38 of 40. Without a memory the best is a spring, which
never stops to swing: 25.
"""

import gymnasium as gym
import numpy as np


class Integrator(gym.Env):
    observation_space = gym.spaces.Dict(
        policy=gym.spaces.Box(-9, 9, (1,)), critic=gym.spaces.Box(-9, 9, (2,))
    )
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.state = 0, self.np_random.uniform([-1, -2], [1, 2]).astype(np.float32)
        return self.seen(), {}

    def step(self, action):
        x, v = self.state
        v += 0.4 * action[0]
        self.state = np.array([x + 0.2 * v, v], np.float32).clip(-9, 9)
        self.time += 1
        return self.seen(), float(1 - min(x**2, 1)), False, self.time == 40, {}

    def seen(self):
        return dict(policy=self.state[:1], critic=self.state)


gym.register("Integrator-v0", Integrator, disable_env_checker=True)
