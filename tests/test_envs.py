"""What `envs.make` promises: sizes, what stays hidden, physics, seeds, errors."""

import random
import re
import warnings

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.mujoco.hopper_v4 import HopperEnv
from gymnasium.utils.env_checker import check_env

import envs
from envs.mujoco import WIND_FORCE, RandomBodies, Wind
from envs.wrappers import Split, find_wrapper

pytestmark = [
    # What Gymnasium's checker says of every wrapped environment and of every MuJoCo environment.
    pytest.mark.filterwarnings("ignore:.*is different from the unwrapped version"),
    pytest.mark.filterwarnings("ignore:.*A Box observation space m..imum value is"),
    pytest.mark.filterwarnings("ignore:.*Ant-v3 is out of date"),
    pytest.mark.filterwarnings("ignore:.*we recommend using a symmetric and normalized space"),
]
each = pytest.mark.parametrize

ROBOTS = [
    "Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "InvertedPendulum",
    "InvertedDoublePendulum", "Swimmer", "Walker2d",
]  # fmt: skip
MUJOCO_IDS = [f"{robot}-v{version}" for robot in ROBOTS for version in (4, 5)]
WIND_IDS = [f"{robot}-v{version}" for robot in WIND_FORCE for version in (4, 5)]
BODIES_IDS = [f"{robot}-v5" for robot in ROBOTS] + ["HalfCheetah-v4", "Pusher-v5"]
MEMORY_IDS = [id for id in gym.registry if id.startswith(("CueRecall", "PointMass"))]
HIDDEN = ("velocities", "positions")
FORCES = {"use_contact_forces": True}  # of Ant-v4, which shows none unless told to


def sizes(env):
    space = env.observation_space
    return space["policy"].shape[0], space["critic"].shape[0]


# --- the interface --------------------------------------------------------------------------------

WITH_X = {"exclude_current_positions_from_observation": False}


@each(
    ("env_id", "kwargs", "velocities", "full"),
    [
        ("Hopper-v5", {}, 5, 11), ("Ant-v4", {}, 13, 27), ("Humanoid-v4", {}, 22, 376),
        ("InvertedDoublePendulum-v4", {}, 5, 11), ("InvertedDoublePendulum-v5", {}, 5, 9),
        ("Hopper-v4", WITH_X, 6, 12), ("Hopper-v5", WITH_X, 6, 12),
        ("Swimmer-v4", WITH_X, 5, 10), ("Humanoid-v4", WITH_X, 24, 378),
        ("Ant-v4", FORCES, 13, 111), ("Ant-v5", {"include_cfrc_ext_in_observation": False}, 13, 27),
        ("Humanoid-v5", {"include_cinert_in_observation": False}, 22, 218),
        ("Humanoid-v5", {"include_qfrc_actuator_in_observation": False}, 22, 331),
    ],
)  # fmt: skip
def test_sizes(env_id, kwargs, velocities, full):
    def size(**options):
        return sizes(envs.make(env_id, **options, **kwargs))

    model = envs.make(env_id, **kwargs).unwrapped.model
    assert size() == (full, full)
    assert size(hide="velocities") == (velocities, full)
    assert size(hide="positions") == (model.nv, full)
    assert size(hide="positions", privileged_critic=False) == (model.nv, model.nv)
    assert size(hide="velocities", random_bodies=True) == (velocities, full + model.nbody - 1)


CHECKED = [(env_id, {"hide": hide}) for env_id in MUJOCO_IDS for hide in ("none", *HIDDEN)]
CHECKED += [(env_id, {"random_bodies": True, "wind": True}) for env_id in WIND_IDS]
CHECKED += [(env_id, {}) for env_id in MEMORY_IDS]


@each(("env_id", "options"), CHECKED)
def test_gymnasium_accepts(env_id, options):
    check_env(envs.make(env_id, **options), skip_render_check=True)
    if not options:  # a memory task
        check_env(gym.make(env_id).unwrapped, skip_render_check=True)


def test_only_the_warning_about_v4_is_silenced():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs.make("Ant-v4")
        envs.make("HalfCheetah-v4", random_bodies=True)
        envs.make("Own-v0", **UNBOUNDED)  # by float32
        with pytest.raises(ValueError, match="cannot be rendered"):
            envs.make("Ant-v4", render_mode="oil")
    with pytest.warns(UserWarning, match="Using the latest versioned environment"):
        envs.make("Ant")
    with pytest.warns(DeprecationWarning, match="Ant-v4 is out of date"):
        gym.make("Ant-v4")


# --- what is hidden -------------------------------------------------------------------------------


def observe_state(env, qpos, qvel, rng):
    """The observation of a reset to this state with all that is neither of the two drawn anew."""
    robot = env.unwrapped

    def reset_model():
        robot.set_state(qpos, qvel)
        for name in ("cinert", "cvel", "qfrc_actuator", "cfrc_ext", "qfrc_constraint"):
            values = getattr(robot.data, name)
            values[:] = rng.uniform(-1, 1, values.shape)
        return robot._get_obs()

    robot.reset_model = reset_model
    return env.reset()[0]


@each("env_id", MUJOCO_IDS)
@each("hide", HIDDEN)
def test_hidden_values_do_not_reach_the_policy(env_id, hide):
    env = envs.make(env_id, hide=hide, **(FORCES if env_id == "Ant-v4" else {}))
    rng = np.random.default_rng(0)
    qpos, other_qpos = rng.uniform(-1, 1, (2, env.unwrapped.model.nq))
    qvel, other_qvel = rng.uniform(-1, 1, (2, env.unwrapped.model.nv))
    before = observe_state(env, qpos, qvel, rng)
    other_positions = observe_state(env, other_qpos, qvel, rng)
    other_velocities = observe_state(env, qpos, other_qvel, rng)
    hidden, seen = other_velocities, other_positions
    if hide == "positions":
        hidden, seen = seen, hidden
        np.testing.assert_array_equal(before["policy"], qvel.astype(np.float32))
    elif "Double" not in env_id:  # whose angles are seen by their sines and cosines
        skipped = len(qpos) - len(before["policy"])
        np.testing.assert_array_equal(before["policy"], qpos[skipped:].astype(np.float32))
    np.testing.assert_array_equal(hidden["policy"], before["policy"])
    # The world's own rows and free joints aside, all that the policy does not see has changed.
    changed = hidden["critic"] != before["critic"]
    assert changed.sum() >= len(changed) - len(before["policy"])
    assert np.all(seen["policy"] != before["policy"])


# --- random bodies --------------------------------------------------------------------------------


def arrays(model):
    """Every array of a MuJoCo model, by name, and the inertia of each body in its own frame."""
    names = (name for name in dir(model) if isinstance(getattr(model, name), np.ndarray))
    frames = np.zeros((model.nbody, 9))
    for frame, quaternion in zip(frames, model.body_iquat, strict=True):
        mujoco.mju_quat2Mat(frame, quaternion)
    frames = frames.reshape(-1, 3, 3)
    inertia = np.einsum("bij,bj,bkj->bik", frames, model.body_inertia, frames)
    found = {name: np.array(getattr(model, name)) for name in names}
    return found | dict(inertia=inertia, meaninertia=np.array(model.stat.meaninertia))


def reset_with(env, deltas, seed=None):
    """Reset such that each body draws the given delta, () or (bodies,)."""
    bodies = find_wrapper(env, RandomBodies)

    class Draw:
        def integers(self, high, size):
            assert (high, size) == (3, bodies.unwrapped.model.nbody)
            table = {0.0: 0, -0.3: 1, 0.3: 2}
            return np.array([1] + [table[d] for d in np.broadcast_to(deltas, size - 1)])

    bodies.rng = Draw()
    return env.reset(seed=seed)[0]


def compiled_by_hand(env, deltas):
    """The model MuJoCo compiles from geoms of these sizes, with densities that give the masses."""
    nominal = mujoco.MjModel.from_xml_path(env.unwrapped.fullpath).body_mass
    spec = mujoco.MjSpec.from_file(env.unwrapped.fullpath)
    spec.compiler.settotalmass = -1
    for body, delta in zip(spec.bodies[1:], deltas, strict=True):
        for geom in body.geoms:
            geom.size[0] *= 1 + delta
    masses = spec.compile().body_mass
    for index, (body, delta) in enumerate(zip(spec.bodies[1:], deltas, strict=True), 1):
        for geom in body.geoms:
            geom.density *= nominal[index] * (1 + delta) / masses[index]
    return arrays(spec.compile())


CLOSE = dict(rtol=1e-9, atol=1e-12)


def assert_same(model, expected, but=(), **tolerances):
    actual = arrays(model)
    for name in expected.keys() - set(but):
        np.testing.assert_allclose(actual[name], expected[name], err_msg=name, **tolerances)


def assert_restored(env, pristine):
    reset_with(env, 0.0)
    assert_same(env.unwrapped.model, pristine, but=["meaninertia"], rtol=0)
    assert env.unwrapped.model.stat.meaninertia == pytest.approx(pristine["meaninertia"])


@each("env_id", BODIES_IDS)
def test_bodies_are_what_the_compiler_makes_of_them(env_id):
    env = envs.make(env_id, random_bodies=True)
    fresh = arrays(mujoco.MjModel.from_xml_path(env.unwrapped.fullpath))
    # Some arms have two equal moments of inertia, so their frame is one of many.
    but = ("body_iquat", "bvh_aabb", "bvh_nodeid") if "Humanoid" in env_id else ()
    for seed in range(2):
        observation, _ = env.reset(seed=seed)
        deltas = observation["critic"][1 - env.unwrapped.model.nbody :].astype(float).round(1)
        assert_same(env.unwrapped.model, compiled_by_hand(env, deltas), but, **CLOSE)
        assert not np.array_equal(env.unwrapped.model.body_mass, fresh["body_mass"])
    for delta in (0.3, -0.3):
        reset_with(env, delta)
        scaled = arrays(find_wrapper(env, RandomBodies).scaled_model(delta))
        bounds = {name: scaled[name] for name in ("bvh_aabb", "bvh_child", "bvh_nodeid")}
        assert_same(env.unwrapped.model, bounds, rtol=0)
    assert_restored(env, fresh)


AWKWARD_ROBOT = """
<mujoco>
  <option density="1.2"/>
  <worldbody>
    <geom type="plane" size="5 5 1"/>
    <body pos="0 0 1">
      <freejoint/>
      <geom type="box" size=".10 .12 .14" fluidshape="ellipsoid"/>
      <geom type="box" size=".05 .06 .07"/>
      <body pos="0 .3 0">
        <joint axis="1 0 0"/>
        <geom type="box" euler="0 0 30" size=".10 .12 .14"/>
        <geom type="box" euler="0 0 30" size=".05 .06 .07"/>
      </body>
      <body pos=".3 0 0">
        <joint name="arm" axis="0 1 0"/>
        <geom type="sphere" size=".05"/>
        <geom type="capsule" size=".02" fromto=".1 0 0 .2 0 .1"/>
        <geom type="cylinder" size=".06 .08" pos=".3 .1 0"/>
        <geom type="sphere" size=".11" pos=".1 .3 .1"/>
        <geom type="ellipsoid" size=".03 .04 .05" pos=".2 0 .3"/>
      </body>
    </body>
  </worldbody>
  <actuator><motor joint="arm" ctrlrange="-1 1"/></actuator>
</mujoco>
"""


@each("deltas", [(0.3, 0.3, 0.0), (0.0, 0.0, -0.3), (-0.3, 0.0, 0.3), (0.3, -0.3, 0.3)])
def test_bodies_whose_frames_and_bounding_trees_change(deltas, tmp_path):
    path = tmp_path / "robot.xml"
    path.write_text(AWKWARD_ROBOT)
    env = envs.make("Ant-v5", xml_file=str(path), random_bodies=True)
    pristine = arrays(env.unwrapped.model)
    reset_with(env, deltas)
    assert_same(env.unwrapped.model, compiled_by_hand(env, deltas), **CLOSE)
    if deltas == (0.3, 0.3, 0.0):  # grown, the boxes have another shortest side
        model = env.unwrapped.model
        assert model.body_sameframe[1] != pristine["body_sameframe"][1]
        assert model.geom_sameframe[3] != pristine["geom_sameframe"][3]
    assert_restored(env, pristine)


def test_first_observation_comes_after_the_change():
    env = envs.make("Humanoid-v4", random_bodies=True)
    for delta in (0.3, -0.3):
        observation = reset_with(env, delta, seed=0)
        # The tenth value of a body's composite inertia is its mass; the observation has them after
        # 22 positions and 23 velocities, and the world's first.
        cinert = observation["critic"][45:].astype(float)[:140].reshape(14, 10)
        np.testing.assert_allclose(cinert[1:, 9], env.unwrapped.model.body_mass[1:], rtol=1e-6)


def test_deltas_reach_the_critic_and_not_the_policy():
    env = envs.make("Humanoid-v4", random_bodies=True)
    assert sizes(env) == (376 - 140 - 84 - 84, 376 + 13)  # without cinert, cvel, cfrc_ext
    env = envs.make("Hopper-v4", random_bodies=True)
    for deltas in ([0.3, 0.0, -0.3, 0.3], [-0.3, -0.3, 0.0, 0.0]):
        for observation in (reset_with(env, deltas), env.step(env.action_space.sample())[0]):
            np.testing.assert_array_equal(observation["critic"][11:], np.float32(deltas))
            np.testing.assert_array_equal(observation["critic"][:11], observation["policy"])
    plain = envs.make("Hopper-v4").reset(seed=3)[0]["policy"]
    np.testing.assert_array_equal(env.reset(seed=3)[0]["policy"], plain)


@each("env_id", MUJOCO_IDS)
def test_bodies_that_move_alike_and_touch_nothing_look_alike_to_the_policy(env_id):
    env = envs.make(env_id, random_bodies=True)
    robot, visible, seen = env.unwrapped, find_wrapper(env, Split).visible, []
    robot.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_CONTACT
    velocity = np.random.default_rng(0).standard_normal(robot.model.nv)
    for delta in (0.3, 0.0, -0.3):
        reset_with(env, delta)
        robot.set_state(robot.init_qpos, velocity)
        observation = robot._get_obs()
        seen.append(observation[visible[: observation.size]])
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[2], seen[1])


def test_deltas_and_directions_are_drawn_evenly_and_for_each_body():
    env = envs.make("Hopper-v4", random_bodies=True, wind=True)
    env.reset(seed=0)
    draws = np.array([env.reset()[0]["critic"][11:] for _ in range(300)]).round(1)
    for delta in np.float32([-0.3, 0, 0.3]):
        share = (draws[:, :4] == delta).mean(0)
        assert np.all((share > 0.2) & (share < 0.46))
    assert abs(draws[:, 4].sum()) < 70
    assert np.abs(np.corrcoef(draws.T) - np.eye(5)).max() < 0.25


# --- wind -----------------------------------------------------------------------------------------


@each("env_id", WIND_IDS)
def test_wind(env_id):
    """Its force lasts, its direction stays, and the reward is for running that way."""
    force = {"Ant": 0.5, "Humanoid": 10.0}.get(env_id[:-3], 5.0)
    kwargs = {} if env_id == "Ant-v4" else {"forward_reward_weight": 2.0}
    weight = kwargs.get("forward_reward_weight", 1.0)
    env = envs.make(env_id, wind=True, **kwargs)
    robot = env.unwrapped
    simulate, rewards = robot.step, []

    def step(action):
        result = simulate(action)
        rewards.append(result[1])
        return result

    robot.step = step
    signs = set()
    for seed in range(8):
        observation, _ = env.reset(seed=seed)
        sign = observation["critic"][-1]
        signs.add(sign)
        for _ in range(5):
            expected = np.zeros_like(robot.data.xfrc_applied)
            expected[robot.model.body("torso").id, 0] = sign * force
            np.testing.assert_array_equal(robot.data.xfrc_applied, expected)
            observation, reward, terminated, _, info = env.step(0.1 * env.action_space.sample())
            assert observation["critic"][-1] == sign
            against = 2 * weight * info["x_velocity"] if sign < 0 else 0
            assert reward == pytest.approx(rewards[-1] - against)
            if terminated:
                break
    assert signs == {-1, 1}


@each("env_id", WIND_IDS)
def test_wind_does_not_reach_the_policy(env_id):
    kwargs = FORCES if env_id == "Ant-v4" else {}
    env, calm = envs.make(env_id, wind=True, **kwargs), envs.make(env_id, **kwargs)
    forces = {"Ant-v4": 84, "Ant-v5": 78, "Humanoid-v4": 84, "Humanoid-v5": 78}.get(env_id, 0)
    policy, critic = sizes(env)
    assert policy == critic - 1 - forces
    for seed in range(4):
        # Whatever the direction, the policy's first observation is that of a calm day.
        observation, expected = env.reset(seed=seed)[0], calm.reset(seed=seed)[0]["policy"]
        np.testing.assert_array_equal(observation["policy"], expected[:policy])
        observation, *_ = env.step(np.zeros(env.action_space.shape, np.float32))
        force = find_wrapper(env, Wind).sign * WIND_FORCE[env_id[:-3]]
        assert force in observation["critic"] or not forces or env_id == "Humanoid-v5"
        assert force not in observation["policy"]


# --- seeds ----------------------------------------------------------------------------------------


def episode(env, seed, steps=20):
    """Every observation and reward of `steps` steps with actions that do not depend on `seed`."""
    actions = np.random.default_rng(0).uniform(-0.4, 0.4, (steps, *env.action_space.shape))
    observation, _ = env.reset(seed=seed)
    rows = [*observation.values()]
    for action in actions.astype(np.float32):
        observation, reward, terminated, truncated, _ = env.step(action)
        rows += [*observation.values(), [reward]]
        if terminated or truncated:
            rows += [*env.reset()[0].values()]
    return np.concatenate(rows)


@each(
    ("env_id", "options"),
    [
        ("Hopper-v4", {"hide": "velocities", "random_bodies": True, "wind": True}),
        ("InvertedPendulum-v5", {"random_bodies": True}),
        ("PointMassMemory-v0", {}),
        ("PointMassDoor-v0", {}),
        ("CueRecall-v0", {"horizon": 4}),
    ],
)
def test_the_seed_decides_everything(env_id, options):
    env, twin = envs.make(env_id, **options), envs.make(env_id, **options)
    global_states = str(np.random.get_state()), random.getstate()  # noqa: NPY002
    first = episode(env, seed=7)
    np.testing.assert_array_equal(first, episode(env, seed=7))
    np.testing.assert_array_equal(first, episode(twin, seed=7))
    others = [episode(env, seed=seed) for seed in range(5)]
    assert any(not np.array_equal(first, other) for other in others)
    assert (str(np.random.get_state()), random.getstate()) == global_states  # noqa: NPY002


def test_unseeded_resets_continue():
    def draws(env, count, **options):
        env.reset(**options)
        return [tuple(env.reset()[0]["critic"][11:]) for _ in range(count)]

    env = envs.make("Hopper-v4", random_bodies=True, wind=True)
    first = draws(env, 10, seed=1)
    assert first == draws(env, 10, seed=1) and len(set(first)) > 5
    # The bodies do not repeat the numbers that place the robot.
    for seed in range(3):
        deltas = env.reset(seed=seed)[0]["critic"][11:15]
        same = np.random.default_rng(seed).integers(3, size=5)[1:]
        assert not np.array_equal(deltas, np.float32(np.take([0.0, -0.3, 0.3], same)))
    one, other = (draws(envs.make("Hopper-v4", random_bodies=True), 5) for _ in range(2))
    assert one != other


# --- environments of one's own and errors ---------------------------------------------------------

VECTOR = spaces.Box(-1, 1, (3,), np.float64)
PAIR = {"observation": spaces.Dict(policy=spaces.Box(-2, 2, (2,)), critic=VECTOR, extra=VECTOR)}
INTEGERS = {"observation": spaces.Box(0, 255, (3,), np.uint8)}
UNBOUNDED = {"observation": spaces.Box(-1e300, 1e300, (3,), np.float64)}


class Own(gym.Env):
    def __init__(self, observation=VECTOR, action=spaces.Box(-1, 1, (1,))):  # noqa: B008
        self.observation_space, self.action_space = observation, action

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


class Robot(HopperEnv):
    def __init__(self, structure=None, **kwargs):
        super().__init__(**kwargs)
        if structure is not None:
            self.observation_structure = structure


class Longer(Robot):  # than Gymnasium's
    def __init__(self, **kwargs):
        super().__init__(structure={"qpos": 5, "qvel": 6}, **kwargs)
        self.observation_space = spaces.Box(-np.inf, np.inf, (12,), np.float64)

    def _get_obs(self):
        return np.append(super()._get_obs(), self.data.time)


gym.register("Own-v0", Own)
for name, structure in {
    "Robot": None,
    "Structured": {"skipped_qpos": 1, "qpos": 5, "qvel": 6},
    "Wrong": {"qpos": 5, "qvel": 5},
    "OnlyPositions": {"qpos": 11},
}.items():
    gym.register(f"{name}-v0", Robot, max_episode_steps=5, kwargs={"structure": structure})
gym.register("Longer-v0", Longer, max_episode_steps=5)


@each(
    ("env_id", "options", "expected", "more"),
    [
        ("Hopper-v4", {}, (11, 11), False),
        ("Hopper-v4", {"hide": "velocities"}, (5, 11), True),
        ("Hopper-v4", {"random_bodies": True}, (11, 15), True),
        ("Hopper-v4", {"wind": True}, (11, 12), True),
        ("Hopper-v4", {"wind": True, "privileged_critic": False}, (11, 11), False),
        ("CueRecall-v0", {}, (2, 2), True),
        ("CueRecall-v0", {"privileged_critic": False}, (2, 2), False),
        ("Pendulum-v1", {}, (3, 3), False),
        ("test_envs:Own-v0", {}, (3, 3), False),  # taken as both
        ("Own-v0", INTEGERS, (3, 3), False),
        ("Own-v0", PAIR, (2, 3), True),  # taken as it is
        ("Own-v0", PAIR | {"privileged_critic": False}, (2, 2), False),
        ("Structured-v0", {"hide": "velocities", "random_bodies": True}, (5, 15), True),
        ("Robot-v0", {"random_bodies": True}, (11, 15), True),
        ("Longer-v0", {}, (12, 12), False),
    ],
)  # fmt: skip
def test_what_policy_and_critic_see(env_id, options, expected, more):
    env = envs.make(env_id, **options)
    check_env(env, skip_render_check=True)
    assert sizes(env) == expected and env.get_wrapper_attr("critic_sees_more") is more
    space, (first, _) = env.observation_space, env.reset(seed=0)
    seen = env.step(env.action_space.sample())[0]
    assert set(space) == set(first) == set(seen) == {"policy", "critic"}
    if more:
        assert not np.array_equal(seen["policy"], seen["critic"])
    else:
        assert space["critic"] == space["policy"]
        assert all(np.array_equal(x["policy"], x["critic"]) for x in (first, seen))


IMAGE = spaces.Box(0, 1, (2, 2))


@each(
    ("env_id", "options", "message"),
    [
        ("Foo-v0", {}, "'Foo-v0' cannot be made: Environment `Foo` doesn't exist.*module:Id-v0"),
        ("nowhere:Ant-v4", {}, "No module named 'nowhere'"),
        ("./robot:Robot-v0", {}, "'./robot:Robot-v0' cannot be made: './robot' is no name of a"),
        (":Robot-v0", {}, "'' is no name of a module"),
        ("Ant-v4", {"hide": "velocity"}, "'none', 'velocities', 'positions', not 'velocity'"),
        ("Ant-v4", {"wind": "no"}, "wind is True or False, not 'no'"),
        ("Ant-v4", {"random_bodies": 1}, "random_bodies is True or False, not 1"),
        ("Ant-v4", {"privileged_critic": None}, "privileged_critic is True or False, not None"),
        ("Ant-v4", {"colour": 1}, "unexpected keyword argument 'colour'"),
        ("Ant-v5", {"xml_file": "/no/ant.xml"}, "'Ant-v5' cannot be made.*/no/ant.xml"),
        ("Ant-v5", {"main_body": "nobody"}, "'Ant-v5' cannot be made.*nobody"),
        ("CueRecall-v0", {"horizon": 0}, "cannot be made with .*whole number of at least 1, not 0"),
        ("CueRecall-v0", {"horizon": 2.5}, "whole number of at least 1, not 2.5"),
        ("CueRecall-v0", {"delayed": "yes"}, "delayed is True or False, not 'yes'"),
        ("Reacher-v5", {"hide": "velocities"}, "'Reacher-v5' is not.*Ant.*Walker2d.*structure"),
        ("Pendulum-v1", {"hide": "positions"}, "hide='positions' needs.*Ant, HalfCheetah"),
        ("Wrong-v0", {"hide": "velocities"}, "has 11 values, not those of"),
        ("Hopper-v5", {"frame_skip": 0}, "'Hopper-v5' cannot be made"),
        ("Hopper-v5", {"reset_noise_scale": "abc"}, "'Hopper-v5' cannot be made"),
        ("Hopper-v4", {"healthy_z_range": 3}, "'Hopper-v4' cannot be made"),
        ("OnlyPositions-v0", {"hide": "positions"}, "What the policy sees is a 1-D Box"),
        ("Swimmer-v4", {"wind": True}, "wind is for Ant, .*Walker2d, and not for 'Swimmer-v4'"),
        ("Pendulum-v1", {"random_bodies": True}, "random_bodies needs the XML file"),
        ("CueRecall-v0", {"hide": "velocities"}, "decides itself what its policy sees"),
        ("Own-v0", PAIR | {"random_bodies": True}, "decides itself what its policy sees"),
        ("Own-v0", PAIR | {"wind": True}, "decides itself what its policy sees"),
        *(
            ("Own-v0", {"observation": space}, message)
            for space, message in [
                (spaces.Dict(policy=VECTOR), 'needs the entries "policy" and "critic".*policy'),
                (spaces.Dict(policy=VECTOR, critic=IMAGE), "What the critic sees is a 1-D Box"),
                (IMAGE, "The observation is a 1-D Box"),
                (spaces.Discrete(3), "The observation is a 1-D Box.*Discrete"),
                (spaces.Box(-1, 1, (0,)), "The observation is a 1-D Box with at least one value"),
            ]
        ),
        *(
            ("Own-v0", {"action": space}, "Actions are a 1-D Box of floats")
            for space in [
                spaces.Discrete(3), spaces.Box(-np.inf, np.inf, (2,)), spaces.Box(-1, 1, (2, 2)),
                spaces.Box(-1, 1, (2,), int), spaces.Box(-1, 1, (0,)),
                spaces.Box(-3e38, 3e38, (1,)), spaces.Box(-1e300, 1e300, (1,), np.float64),
            ]
        ),
    ],
)  # fmt: skip
def test_bad_input_is_a_clear_error(env_id, options, message):
    for make in (envs.make, envs.make_vec):
        with pytest.raises(envs.UsageError, match=re.compile(message, re.DOTALL)):
            make(env_id, **options)
