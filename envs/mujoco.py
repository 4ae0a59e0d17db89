"""MuJoCo tasks made partially observable: hidden parts, random bodies, wind.

Source: Al-Hafez, Zhao, Peters, Tateo, "Time-Efficient Reinforcement Learning with Stochastic
Stateful Policies", ICLR 2024, arXiv 2311.04082.
"""

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium import spaces
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.utils import RecordConstructorArgs

from envs.errors import UsageError

# The parts of an observation that the policy keeps. All others are hidden too, since what is to be
# hidden goes into them.
KEPT = {"velocities": {"qpos", "sin", "cos"}, "positions": {"qvel"}}
HIDE = ("none", *KEPT)

# Environments without an `observation_structure` (v4): how many leading qpos the observation skips
# unless it is told not to, and its parts in order.
STATE = ("qpos", "qvel")
STATE_AND_FORCES = (*STATE, "cinert", "cvel", "qfrc_actuator", "cfrc_ext")
V4_LAYOUTS = {
    "Ant": (2, (*STATE, "cfrc_ext")),
    "HalfCheetah": (1, STATE),
    "Hopper": (1, STATE),
    "Humanoid": (2, STATE_AND_FORCES),
    "HumanoidStandup": (2, STATE_AND_FORCES),
    "InvertedPendulum": (0, STATE),
    "Swimmer": (2, STATE),
    "Walker2d": (1, STATE),
}

WIND_FORCE = {"Ant": 0.5, "HalfCheetah": 5.0, "Hopper": 5.0, "Humanoid": 10.0, "Walker2d": 5.0}  # N


def observation_parts(env: gym.Env) -> dict[str, int]:
    """Name and size of each part of the observation, in order; {"unknown": n} if not known.

    Raises:
        UsageError: The sizes do not add up to the observation.
    """
    size = env.observation_space.shape[0]
    robot = env.unwrapped
    name = env.spec.name if isinstance(robot, MujocoEnv) else None
    if hasattr(robot, "observation_structure"):
        parts = {
            part: count
            for part, count in robot.observation_structure.items()
            if not part.startswith("skipped")
        }
    elif name == "InvertedDoublePendulum":
        # v4 shows the constraint force of every joint, v5 the cart's alone.
        cart, poles, nv = 1, robot.model.nq - 1, robot.model.nv
        parts = {"qpos": cart, "sin": poles, "cos": poles, "qvel": nv}
        parts["qfrc_constraint"] = nv if env.spec.version == 4 else 1
    elif name in V4_LAYOUTS:
        skipped, names = V4_LAYOUTS[name]
        parts = {part: getattr(robot.data, part).size for part in names}
        if env.spec.kwargs.get("exclude_current_positions_from_observation", True):
            parts["qpos"] -= skipped
        if name == "Ant" and not env.spec.kwargs.get("use_contact_forces", False):
            del parts["cfrc_ext"]
    else:
        parts = {"unknown": size}
    if sum(parts.values()) != size:
        raise UsageError(
            f"The observation of {env.spec.id!r} has {size} values, not those of {parts}."
        )
    return parts


def policy_mask(env: gym.Env, hide: str, random_bodies: bool, wind: bool) -> np.ndarray:
    """Which values of the observation the policy may see: a boolean mask with its shape, (n,).

    Raises:
        UsageError: Something is to be hidden, and the layout of the observation is unknown.
    """
    if hide == "none" and not (random_bodies or wind):
        return np.ones(env.observation_space.shape, dtype=bool)
    parts = observation_parts(env)
    if hide != "none" and "unknown" in parts:
        raise UsageError(
            f"hide={hide!r} needs an observation whose layout is known, and that of "
            f"{env.spec.id!r} is not: it is for v4 and v5 of {', '.join(V4_LAYOUTS)}, "
            "InvertedDoublePendulum and MuJoCo environments with an `observation_structure`."
        )
    kept = set(KEPT.get(hide, parts))
    if random_bodies:
        kept -= {"cinert", "cvel", "cfrc_ext"}  # the masses; about their common centre; weight
    if wind:
        kept.discard("cfrc_ext")  # holds the applied force of the wind
    return np.repeat([part in kept for part in parts], list(parts.values()))


class RandomBodies(gym.Wrapper, RecordConstructorArgs):
    """Draw, at each reset, a size and a mass for every body of the robot.

    Every body but the world draws a delta of -0.3, 0 or +0.3. Its mass and the first size of each
    of its geoms (the radius of spheres and capsules) are scaled by 1 + delta. Inertias, collision
    bounds and the constants MuJoCo derives from them follow. Meshes keep their size.

    The deltas are appended to the observation, a 1-D Box: (n,) becomes (n + bodies,).

    The wrapper draws from a random stream of its own, seeded by `reset(seed=...)`: bodies change
    before the environment seeds its generator, resets and makes the first observation.

    Raises:
        UsageError: The environment is not a `MujocoEnv` of Gymnasium, which knows its XML file.
    """

    DELTAS = (0.0, -0.3, 0.3)

    # All that the compiler derives from the size of a geom and from the mass of a body, except for
    # what mj_setConst computes (MuJoCo 4 computes the bounds there as well, MuJoCo 3 does not). The
    # prefix says by what the rows are counted.
    FIELDS = (
        "body_mass",
        "body_inertia",
        "body_ipos",
        "body_iquat",
        "body_sameframe",
        "geom_size",
        "geom_rbound",
        "geom_aabb",
        "geom_sameframe",
        "geom_fluid",
        "bvh_aabb",
        "bvh_nodeid",
    )

    def __init__(self, env: gym.Env):
        robot = env.unwrapped
        if not hasattr(robot, "fullpath"):
            raise UsageError(
                f"random_bodies needs the XML file of a MuJoCo robot, {robot} has none."
            )
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        model = robot.model
        self.rng = np.random.default_rng()
        # A body's rows depend on its own delta alone, so one compiled model for each delta holds
        # the rows of every combination, and a reset need not compile anything.
        models = [model, *(self.scaled_model(delta) for delta in self.DELTAS[1:])]
        self.rows = {
            field: np.stack([getattr(scaled, field) for scaled in models]) for field in self.FIELDS
        }
        # Bounding volumes are stored body after body, then come those of meshes, which stay.
        bvh_body = np.repeat(np.arange(model.nbody), model.body_bvhnum)
        bvh_body = np.pad(bvh_body, (0, model.nbvh - bvh_body.size))
        self.body_of = {"body": np.arange(model.nbody), "geom": model.geom_bodyid, "bvh": bvh_body}

        box = env.observation_space
        bound = np.full(model.nbody - 1, max(self.DELTAS), box.dtype)
        low, high = np.append(box.low, -bound), np.append(box.high, bound)
        self.observation_space = spaces.Box(low, high, dtype=box.dtype)

    def scaled_model(self, delta: float) -> mujoco.MjModel:
        """Compile the model with every body but the world scaled by 1 + `delta`."""
        spec = mujoco.MjSpec.from_file(self.unwrapped.fullpath)
        spec.compiler.settotalmass = -1  # off, and quiet: the masses are set below
        for body in spec.bodies[1:]:
            for geom in body.geoms:
                geom.size[0] *= 1 + delta
        scaled = spec.compile()
        # The compiler makes the mass from the volume: give back the mass, keep the shape.
        mass = (1 + delta) * self.unwrapped.model.body_mass[1:]
        volume_mass = np.maximum(scaled.body_mass[1:], mujoco.mjMINVAL)
        scaled.body_inertia[1:] *= (mass / volume_mass)[:, None]
        scaled.body_mass[1:] = mass
        return scaled

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        if seed is not None:
            self.rng = np.random.default_rng(np.random.SeedSequence(seed).spawn(1)[0])
        model = self.unwrapped.model
        choice = self.rng.integers(len(self.DELTAS), size=model.nbody)
        # The first one is void: the world is the same in all models.
        self.deltas = np.take(self.DELTAS, choice[1:])
        for field, rows in self.rows.items():
            of_row = choice[self.body_of[field.split("_")[0]]]
            getattr(model, field)[:] = rows[of_row, np.arange(of_row.size)]
        mujoco.mj_setConst(model, mujoco.MjData(model))
        model.stat.meaninertia = model.dof_M0.mean()  # the scale of the solver's tolerance
        observation, info = self.env.reset(seed=seed, options=options)
        return np.append(observation, self.deltas), info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        return np.append(observation, self.deltas), reward, terminated, truncated, info


class Wind(gym.Wrapper, RecordConstructorArgs):
    """Blow, through each episode, along +x or -x, and reward running with the wind.

    The direction is drawn at reset. The force (`WIND_FORCE`, in N) acts on the torso, and the
    forward reward is that of running in the direction of the wind; `info` stays the simulator's.
    The sign of the direction is appended to the observation, a 1-D Box: (n,) becomes (n + 1,).

    Raises:
        UsageError: The environment is none of those in `WIND_FORCE`.
    """

    TORSO = 1  # the first body after the world, whatever its name in an XML file of your own

    def __init__(self, env: gym.Env):
        robot = env.unwrapped
        if env.spec.name not in WIND_FORCE or not isinstance(robot, MujocoEnv):
            raise UsageError(f"wind is for {', '.join(WIND_FORCE)}, and not for {env.spec.id!r}.")
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self.force = WIND_FORCE[env.spec.name]
        # Ant-v4 has no such weight: it is one.
        self.forward_reward_weight = getattr(robot, "_forward_reward_weight", 1.0)
        box = env.observation_space
        low, high = np.append(box.low, -1.0), np.append(box.high, 1.0)
        self.observation_space = spaces.Box(low, high, dtype=box.dtype)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        observation, info = self.env.reset(seed=seed, options=options)
        self.sign = self.np_random.choice([-1.0, 1.0])
        # Resetting the simulation has cleared the force; nothing else does, so it lasts.
        self.unwrapped.data.xfrc_applied[self.TORSO, 0] = self.sign * self.force
        return np.append(observation, self.sign), info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        reward += (self.sign - 1) * self.forward_reward_weight * info["x_velocity"]
        return np.append(observation, self.sign), reward, terminated, truncated, info
