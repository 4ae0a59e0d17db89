"""What `envs.make` promises: sizes, what stays hidden, physics, seeds, memory tasks, errors."""

import random
import re
import warnings

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import example, given
from hypothesis import strategies as st

import envs
from envs.memory import hits_wall
from envs.mujoco import WIND_FORCE

pytestmark = [
    # What Gymnasium's checker says of every wrapped environment and of every MuJoCo environment.
    pytest.mark.filterwarnings("ignore:.*is different from the unwrapped version"),
    pytest.mark.filterwarnings("ignore:.*A Box observation space m..imum value is"),
    pytest.mark.filterwarnings("ignore:.*Ant-v3 is out of date"),
    pytest.mark.filterwarnings("ignore:.*we recommend using a symmetric and normalized space"),
]

ROBOTS = [
    "Ant",
    "HalfCheetah",
    "Hopper",
    "Humanoid",
    "HumanoidStandup",
    "InvertedPendulum",
    "InvertedDoublePendulum",
    "Swimmer",
    "Walker2d",
]
MUJOCO_IDS = [f"{robot}-v{version}" for robot in ROBOTS for version in (4, 5)]
WIND_IDS = [f"{robot}-v{version}" for robot in WIND_FORCE for version in (4, 5)]
MEMORY_IDS = [
    "PointMassMemory-v0",
    "PointMassDoor-v0",
    "CueRecall-v0",
    *(f"CueRecall-{horizon}-v0" for horizon in (5, 10, 20, 100, 300, 1000)),
    "CueRecall-delayed-v0",
    *(f"CueRecall-delayed-{horizon}-v0" for horizon in (5, 10, 20, 100, 300, 1000)),
]
HIDDEN = ("velocities", "positions")


def sizes(env):
    space = env.observation_space
    return space["policy"].shape[0], space["critic"].shape[0]


def unwrap(env, wrapper):
    """The wrapper of this name inside `env`."""
    while type(env).__name__ != wrapper:
        env = env.env
    return env


def episode(env, seed, steps=20):
    """Every observation and reward of `steps` steps with actions that depend on `seed` alone."""
    actions = np.random.default_rng(0).uniform(-0.4, 0.4, (steps, *env.action_space.shape))
    observation, _ = env.reset(seed=seed)
    rows = [*observation.values()]
    for action in actions.astype(np.float32):
        observation, reward, terminated, truncated, _ = env.step(action)
        rows += [*observation.values(), [reward]]
        if terminated or truncated:
            observation, _ = env.reset()
            rows += [*observation.values()]
    return np.concatenate(rows)


# --- the interface --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env_id", "full", "velocities"),
    [
        ("HalfCheetah-v4", 17, 8),
        ("HalfCheetah-v5", 17, 8),
        ("Hopper-v4", 11, 5),
        ("Hopper-v5", 11, 5),
        ("Walker2d-v4", 17, 8),
        ("Walker2d-v5", 17, 8),
        ("Ant-v4", 27, 13),
        ("Ant-v5", 105, 13),
        ("Humanoid-v4", 376, 22),
        ("Humanoid-v5", 348, 22),
        ("HumanoidStandup-v4", 376, 22),
        ("Swimmer-v4", 8, 3),
        ("InvertedPendulum-v4", 4, 2),
        ("InvertedDoublePendulum-v4", 11, 5),
        ("InvertedDoublePendulum-v5", 9, 5),
    ],
)
def test_sizes(env_id, full, velocities):
    assert sizes(envs.make(env_id)) == (full, full)
    env = envs.make(env_id, hide="velocities")
    assert sizes(env) == (velocities, full)
    nv = env.unwrapped.model.nv
    assert sizes(envs.make(env_id, hide="positions")) == (nv, full)
    assert sizes(envs.make(env_id, hide="positions", privileged_critic=False)) == (nv, nv)
    bodies = env.unwrapped.model.nbody - 1
    assert sizes(envs.make(env_id, hide="velocities", random_bodies=True)) == (
        velocities,
        full + bodies,
    )


@pytest.mark.parametrize(
    ("env_id", "kwargs", "velocities", "critic"),
    [
        ("Hopper-v4", {"exclude_current_positions_from_observation": False}, 6, 12),
        ("Hopper-v5", {"exclude_current_positions_from_observation": False}, 6, 12),
        ("Swimmer-v4", {"exclude_current_positions_from_observation": False}, 5, 10),
        ("Humanoid-v4", {"exclude_current_positions_from_observation": False}, 24, 378),
        ("Ant-v4", {"use_contact_forces": True}, 13, 111),
        ("Ant-v5", {"include_cfrc_ext_in_observation": False}, 13, 27),
        ("Humanoid-v5", {"include_cinert_in_observation": False}, 22, 218),
        ("Humanoid-v5", {"include_qfrc_actuator_in_observation": False}, 22, 331),
    ],
)
def test_sizes_follow_the_constructor(env_id, kwargs, velocities, critic):
    assert sizes(envs.make(env_id, hide="velocities", **kwargs)) == (velocities, critic)


@pytest.mark.parametrize("env_id", MUJOCO_IDS)
@pytest.mark.parametrize("hide", ["none", *HIDDEN])
def test_gymnasium_accepts_mujoco(env_id, hide):
    check_env(envs.make(env_id, hide=hide), skip_render_check=True)


@pytest.mark.parametrize("env_id", WIND_IDS)
def test_gymnasium_accepts_the_wrappers(env_id):
    check_env(envs.make(env_id, random_bodies=True, wind=True), skip_render_check=True)


@pytest.mark.parametrize("env_id", MEMORY_IDS)
def test_gymnasium_accepts_memory_tasks(env_id):
    check_env(envs.make(env_id), skip_render_check=True)
    check_env(gym.make(env_id).unwrapped, skip_render_check=True)


@pytest.mark.parametrize("env_id", ["Ant-v5", "PointMassDoor-v0"])
def test_without_privilege_the_critic_sees_what_the_policy_sees(env_id):
    options = {"hide": "velocities", "random_bodies": True, "wind": True} if "Ant" in env_id else {}
    env = envs.make(env_id, privileged_critic=False, **options)
    observation, _ = env.reset(seed=0)
    assert env.observation_space["critic"] == env.observation_space["policy"]
    np.testing.assert_array_equal(observation["critic"], observation["policy"])
    observation, *_ = env.step(env.action_space.sample())
    np.testing.assert_array_equal(observation["critic"], observation["policy"])


@pytest.mark.parametrize(
    ("env_id", "options", "expected"),
    [
        ("Hopper-v4", {}, False),
        ("Hopper-v4", {"hide": "velocities"}, True),
        ("Hopper-v4", {"random_bodies": True}, True),
        ("Hopper-v4", {"wind": True}, True),
        ("Hopper-v4", {"hide": "positions", "wind": True, "privileged_critic": False}, False),
        ("CueRecall-v0", {}, True),
        ("CueRecall-v0", {"privileged_critic": False}, False),
        ("Pendulum-v1", {}, False),
    ],
)
def test_critic_sees_more(env_id, options, expected):
    env = gym.wrappers.RecordEpisodeStatistics(envs.make(env_id, **options))
    assert env.get_wrapper_attr("critic_sees_more") is expected
    env.reset(seed=0)
    observation, *_ = env.step(env.action_space.sample())
    assert np.array_equal(observation["policy"], observation["critic"]) is not expected


def test_time_limit_stays():
    env = envs.make("HalfCheetah-v4", max_episode_steps=3)
    env.reset(seed=0)
    assert [env.step(env.action_space.sample())[3] for _ in range(3)] == [False, False, True]
    assert envs.make("HalfCheetah-v4").spec.max_episode_steps == 1000


def test_only_the_warning_about_v4_is_silenced():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs.make("Ant-v4")
        envs.make("HalfCheetah-v4", random_bodies=True)
        with pytest.raises(ValueError, match="cannot be rendered"):
            envs.make("Ant-v4", render_mode="oil")
    with pytest.warns(UserWarning, match="Using the latest versioned environment"):
        envs.make("Ant")
    with pytest.warns(DeprecationWarning, match="Ant-v4 is out of date"):
        gym.make("Ant-v4")


def test_vector_environments():
    batch = gym.vector.SyncVectorEnv([lambda: envs.make("Hopper-v4", random_bodies=True)] * 2)
    observation, _ = batch.reset(seed=0)
    assert observation["policy"].shape == (2, 11)
    assert observation["critic"].shape == (2, 15)
    assert not np.array_equal(observation["critic"][0, 11:], observation["critic"][1, 11:])


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


@pytest.mark.parametrize("env_id", MUJOCO_IDS)
@pytest.mark.parametrize("hide", HIDDEN)
def test_hidden_values_do_not_reach_the_policy(env_id, hide):
    kwargs = {"use_contact_forces": True} if env_id == "Ant-v4" else {}
    env = envs.make(env_id, hide=hide, **kwargs)
    rng = np.random.default_rng(0)
    model = env.unwrapped.model
    qpos, other_qpos = rng.uniform(-1, 1, (2, model.nq))
    qvel, other_qvel = rng.uniform(-1, 1, (2, model.nv))
    before = observe_state(env, qpos, qvel, rng)
    if hide == "velocities":
        hidden_changed = observe_state(env, qpos, other_qvel, rng)
        seen_changed = observe_state(env, other_qpos, qvel, rng)
    else:
        hidden_changed = observe_state(env, other_qpos, qvel, rng)
        seen_changed = observe_state(env, qpos, other_qvel, rng)
        np.testing.assert_array_equal(before["policy"], qvel.astype(np.float32))
    np.testing.assert_array_equal(hidden_changed["policy"], before["policy"])
    changed = hidden_changed["critic"] != before["critic"]
    # The world's own rows and free joints aside, all that the policy does not see has changed.
    assert changed.sum() >= len(changed) - len(before["policy"])
    assert np.all(seen_changed["policy"] != before["policy"])


@pytest.mark.parametrize(("env_id", "skipped"), [("Walker2d-v4", 1), ("Humanoid-v5", 2)])
def test_policy_without_velocities_sees_joint_positions(env_id, skipped):
    env = envs.make(env_id, hide="velocities")
    observation, _ = env.reset(seed=0)
    qpos = env.unwrapped.data.qpos[skipped:].astype(np.float32)
    np.testing.assert_array_equal(observation["policy"], qpos)


# --- random bodies --------------------------------------------------------------------------------

BODIES_IDS = [f"{robot}-v5" for robot in ROBOTS] + ["HalfCheetah-v4", "Pusher-v5"]


def arrays(model):
    """Every array of a MuJoCo model, by name."""
    names = (name for name in dir(model) if isinstance(getattr(model, name), np.ndarray))
    return {name: np.array(getattr(model, name)) for name in names}


def inertia_tensors(model):
    """Inertia of each body in its own frame: (bodies, 3, 3)."""
    frames = np.zeros((model.nbody, 9))
    for frame, quaternion in zip(frames, model.body_iquat, strict=True):
        mujoco.mju_quat2Mat(frame, quaternion)
    frames = frames.reshape(-1, 3, 3)
    return np.einsum("bij,bj,bkj->bik", frames, model.body_inertia, frames)


def reset_with(env, deltas, seed=None):
    """Reset such that each body draws the given delta, () or (bodies,)."""
    bodies = unwrap(env, "RandomBodies")

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
    return spec.compile()


@pytest.mark.parametrize("env_id", BODIES_IDS)
def test_bodies_are_what_the_compiler_makes_of_them(env_id):
    env = envs.make(env_id, random_bodies=True)
    for seed in range(2):
        observation, _ = env.reset(seed=seed)
        model = env.unwrapped.model
        deltas = observation["critic"][1 - model.nbody :].astype(float).round(1)
        expected = compiled_by_hand(env, deltas)
        for name, values in (arrays(expected) | {"inertia": inertia_tensors(expected)}).items():
            # Some arms have two equal moments of inertia, so their frame is one of many.
            if name not in {"body_iquat", "bvh_aabb", "bvh_nodeid"} or "Humanoid" not in env_id:
                actual = inertia_tensors(model) if name == "inertia" else getattr(model, name)
                np.testing.assert_allclose(actual, values, rtol=1e-9, atol=1e-12, err_msg=name)
        assert model.stat.meaninertia == pytest.approx(expected.stat.meaninertia)


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


@pytest.mark.parametrize(
    "deltas", [(0.3, 0.3, 0.0), (0.0, 0.0, -0.3), (-0.3, 0.0, 0.3), (0.3, -0.3, 0.3)]
)
def test_bodies_whose_frames_and_bounding_trees_change(deltas, tmp_path):
    path = tmp_path / "robot.xml"
    path.write_text(AWKWARD_ROBOT)
    env = envs.make("Ant-v5", xml_file=str(path), random_bodies=True)
    pristine = arrays(env.unwrapped.model)
    reset_with(env, deltas)
    actual, expected = arrays(env.unwrapped.model), arrays(compiled_by_hand(env, deltas))
    for name, values in expected.items():
        np.testing.assert_allclose(actual[name], values, rtol=1e-9, atol=1e-12, err_msg=name)
    if deltas == (0.3, 0.3, 0.0):  # grown, the boxes have another shortest side
        assert actual["body_sameframe"][1] != pristine["body_sameframe"][1]
        assert actual["geom_sameframe"][3] != pristine["geom_sameframe"][3]
    reset_with(env, 0.0)
    for name, values in arrays(env.unwrapped.model).items():
        np.testing.assert_array_equal(values, pristine[name], err_msg=name)


@pytest.mark.parametrize("env_id", BODIES_IDS)
def test_every_field_is_restored(env_id):
    env = envs.make(env_id, random_bodies=True)
    fresh = mujoco.MjModel.from_xml_path(env.unwrapped.fullpath)
    for deltas in (0.0, 0.3, -0.3, 0.0):
        reset_with(env, deltas)
        changed = {
            name
            for name, values in arrays(fresh).items()
            if not np.array_equal(getattr(env.unwrapped.model, name), values)
        }
        if deltas == 0:
            assert not changed
            assert env.unwrapped.model.stat.meaninertia == pytest.approx(fresh.stat.meaninertia)
        else:
            assert {"body_mass", "body_inertia", "geom_size", "geom_rbound"} <= changed


@pytest.mark.parametrize("env_id", ["Ant-v4", "HalfCheetah-v4"])
def test_scaling_by_nothing_reproduces_the_model(env_id):
    env = envs.make(env_id, random_bodies=True)
    expected = arrays(env.unwrapped.model)
    actual = arrays(unwrap(env, "RandomBodies").scaled_model(0.0))
    for name in unwrap(env, "RandomBodies").FIELDS:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("delta", [-0.3, 0.3])
def test_bounding_trees_are_those_of_the_scaled_robot(delta):
    env = envs.make("Humanoid-v5", random_bodies=True)
    reset_with(env, delta)
    expected = unwrap(env, "RandomBodies").scaled_model(delta)
    for name in ("bvh_aabb", "bvh_child", "bvh_nodeid"):
        np.testing.assert_array_equal(getattr(env.unwrapped.model, name), getattr(expected, name))


@pytest.mark.parametrize("delta", [-0.3, 0.3])
def test_masses(delta):
    env = envs.make("Humanoid-v4", random_bodies=True)
    nominal = env.unwrapped.model.body_mass.copy()
    reset_with(env, delta)
    model = env.unwrapped.model
    np.testing.assert_allclose(model.body_mass, nominal * (1 + delta))
    np.testing.assert_allclose(model.body_subtreemass[1], nominal[1:].sum() * (1 + delta))
    np.testing.assert_allclose(mujoco.mj_getTotalmass(model), nominal.sum() * (1 + delta))


def test_inertia_of_a_sphere_and_of_a_capsule():
    env = envs.make("Ant-v4", random_bodies=True)
    reset_with(env, 0.3)
    torso = env.unwrapped.model.body("torso")
    assert env.unwrapped.model.geom("torso_geom").size[0] == pytest.approx(0.25 * 1.3)
    np.testing.assert_allclose(torso.inertia, 2 / 5 * torso.mass[0] * (0.25 * 1.3) ** 2)

    env = envs.make("Hopper-v4", random_bodies=True)
    reset_with(env, 0.3)
    thigh, (radius, half_length, _) = (
        env.unwrapped.model.body("thigh"),
        env.unwrapped.model.geom("thigh_geom").size,
    )
    length = 2 * half_length
    assert (radius, length) == pytest.approx((0.05 * 1.3, 0.45))
    cylinder, sphere = radius**2 * length, 4 / 3 * radius**3
    cylinder, sphere = thigh.mass[0] * np.array([cylinder, sphere]) / (cylinder + sphere)
    along = cylinder * radius**2 / 2 + sphere * 2 / 5 * radius**2
    across = cylinder * (radius**2 / 4 + length**2 / 12)
    across += sphere * (2 / 5 * radius**2 + length**2 / 4 + 3 / 8 * length * radius)
    np.testing.assert_allclose(sorted(thigh.inertia), [along, across, across])


@pytest.mark.parametrize(("delta", "touches"), [(-0.3, False), (0.0, False), (0.3, True)])
def test_a_grown_body_touches_earlier(delta, touches):
    env = envs.make("Ant-v4", random_bodies=True)
    reset_with(env, delta)
    robot = env.unwrapped
    qpos = robot.init_qpos.copy()
    qpos[2] = 0.25 * 1.2  # the torso is a sphere with a radius of 0.25
    robot.set_state(qpos, np.zeros(robot.model.nv))
    floor, torso = robot.model.geom("floor").id, robot.model.geom("torso_geom").id
    pairs = {frozenset(pair) for pair in robot.data.contact.geom.tolist()}
    assert (frozenset((floor, torso)) in pairs) is touches


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
    assert sizes(env) == (376 - 140 - 84, 376 + 13)  # without cinert and cvel
    plain = envs.make("Hopper-v4").reset(seed=3)[0]["policy"]
    env = envs.make("Hopper-v4", random_bodies=True)
    for deltas in ([0.3, 0.0, -0.3, 0.3], [-0.3, -0.3, 0.0, 0.0]):
        observation = reset_with(env, deltas)
        np.testing.assert_array_equal(observation["critic"][11:], np.float32(deltas))
        observation, *_ = env.step(env.action_space.sample())
        np.testing.assert_array_equal(observation["critic"][11:], np.float32(deltas))
        np.testing.assert_array_equal(observation["critic"][:11], observation["policy"])
        bodies = unwrap(env, "RandomBodies")
        bodies.rng = np.random.default_rng(0)
    np.testing.assert_array_equal(env.reset(seed=3)[0]["policy"], plain)


@pytest.mark.parametrize("env_id", MUJOCO_IDS)
def test_bodies_that_move_alike_and_touch_nothing_look_alike_to_the_policy(env_id):
    env = envs.make(env_id, random_bodies=True)
    robot, visible, seen = env.unwrapped, unwrap(env, "Split").visible, []
    robot.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_CONTACT
    velocity = np.random.default_rng(0).standard_normal(robot.model.nv)
    for delta in (0.3, 0.0, -0.3):
        reset_with(env, delta)
        robot.set_state(robot.init_qpos, velocity)
        observation = robot._get_obs()
        seen.append(observation[visible[: observation.size]])
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[2], seen[1])


def test_deltas_are_drawn_evenly_and_for_each_body():
    env = envs.make("Hopper-v4", random_bodies=True)
    env.reset(seed=0)
    deltas = np.array([env.reset()[0]["critic"][11:] for _ in range(300)]).round(1)
    for delta in np.float32([-0.3, 0, 0.3]):
        share = (deltas == delta).mean(0)
        assert np.all((share > 0.2) & (share < 0.46))
    assert np.abs(np.corrcoef(deltas.T) - np.eye(4)).max() < 0.25


# --- wind -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", WIND_IDS)
def test_wind(env_id):
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


def test_forward_reward_with_the_wind():
    env = envs.make("HalfCheetah-v4", wind=True)
    for seed in range(4):
        sign = env.reset(seed=seed)[0]["critic"][-1]
        _, reward, _, _, info = env.step(env.action_space.sample())
        assert reward == pytest.approx(sign * info["x_velocity"] + info["reward_ctrl"])


def test_wind_pushes():
    speeds = {}
    env = envs.make("Hopper-v5", wind=True, terminate_when_unhealthy=False)
    for seed in range(6):
        sign = env.reset(seed=seed)[0]["critic"][-1]
        for _ in range(20):
            *_, info = env.step(np.zeros(3, np.float32))
        speeds.setdefault(sign, []).append(info["x_position"])
    assert min(speeds[1]) > max(speeds[-1])


@pytest.mark.parametrize("env_id", WIND_IDS)
def test_wind_does_not_reach_the_policy(env_id):
    kwargs = {"use_contact_forces": True} if env_id == "Ant-v4" else {}
    env, calm = envs.make(env_id, wind=True, **kwargs), envs.make(env_id, **kwargs)
    forces = {"Ant-v4": 84, "Ant-v5": 78, "Humanoid-v4": 84, "Humanoid-v5": 78}.get(env_id, 0)
    policy, critic = sizes(env)
    assert policy == critic - 1 - forces
    for seed in range(4):
        # Whatever the direction, the policy's first observation is that of a calm day.
        observation, expected = env.reset(seed=seed)[0], calm.reset(seed=seed)[0]["policy"]
        np.testing.assert_array_equal(observation["policy"], expected[:policy])
        observation, *_ = env.step(np.zeros(env.action_space.shape, np.float32))
        force = unwrap(env, "Wind").sign * WIND_FORCE[env_id[:-3]]
        assert force in observation["critic"] or not forces or env_id == "Humanoid-v5"
        assert force not in observation["policy"]


def test_directions_are_drawn_evenly():
    env = envs.make("HalfCheetah-v5", wind=True)
    env.reset(seed=0)
    assert abs(sum(env.reset()[0]["critic"][-1] for _ in range(400))) < 80


# --- seeds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
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
    env = envs.make("Hopper-v4", random_bodies=True, wind=True)
    draws = []
    for _ in range(2):
        env.reset(seed=1)
        draws.append([tuple(env.reset()[0]["critic"][11:]) for _ in range(10)])
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 5
    # The bodies do not repeat the numbers that place the robot.
    for seed in range(3):
        deltas = env.reset(seed=seed)[0]["critic"][11:15]
        same = np.random.default_rng(seed).integers(3, size=5)[1:]
        assert not np.array_equal(deltas, np.float32(np.take([0.0, -0.3, 0.3], same)))
    unseeded = [
        [tuple(env.reset()[0]["critic"][11:]) for _ in range(5)]
        for env in (envs.make("Hopper-v4", random_bodies=True) for _ in range(2))
    ]
    assert unseeded[0] != unseeded[1]


# --- memory tasks ---------------------------------------------------------------------------------


def cue_return(env, policy):
    observation, _ = env.reset()
    total, terminated, steps = 0.0, False, 0
    while not terminated:
        action = np.float32([policy(observation)])
        observation, reward, terminated, truncated, _ = env.step(action)
        assert not truncated
        total += reward
        steps += 1
    return total, steps


@pytest.mark.parametrize("horizon", [1, 20, 100])
def test_cue_recall_returns(horizon):
    env = envs.make("CueRecall-v0", horizon=horizon)
    env.reset(seed=0)
    with_memory = [cue_return(env, lambda o: o["critic"][0]) for _ in range(20)]
    assert with_memory == [(pytest.approx(horizon), horizon)] * 20
    # Without memory the best guess after the first step is anything between the cues.
    without = [cue_return(env, lambda o: o["policy"][0])[0] for _ in range(20)]
    assert without == [pytest.approx(1 + 0.2 * (horizon - 1))] * 20
    guesses = [cue_return(env, lambda o: o["policy"][0] or 0.5)[0] for _ in range(400)]
    assert np.mean(guesses) == pytest.approx(1 + 0.2 * (horizon - 1), abs=0.1 * horizon)


@pytest.mark.parametrize("horizon", [2, 20])
def test_delayed_cue_recall_asks_for_the_cue_at_the_end(horizon):
    env = envs.make("CueRecall-delayed-v0", horizon=horizon)
    cue = env.reset(seed=0)[0]["critic"][0]
    rewards = [env.step(np.float32([0.1]))[1] for _ in range(horizon - 1)]
    rewards += [env.step(np.float32([cue]))[1]]
    assert rewards == [pytest.approx(0.9)] * (horizon - 1) + [pytest.approx(horizon)]

    def still_until_the_end(answer):
        return lambda o: answer(o) if o["policy"][1] > 1 - 1.5 / horizon else 0

    best = cue_return(env, still_until_the_end(lambda o: o["critic"][0]))[0]
    assert best == pytest.approx(2 * horizon - 1)
    guesses = [cue_return(env, still_until_the_end(lambda o: 0.5))[0] for _ in range(400)]
    assert np.mean(guesses) == pytest.approx(1.2 * horizon - 1, abs=0.1 * horizon)


@pytest.mark.parametrize("env_id", ["CueRecall-20-v0", "CueRecall-delayed-20-v0"])
def test_cue_is_visible_once(env_id):
    env = envs.make(env_id)
    cues = set()
    for seed in range(10):
        observation, _ = env.reset(seed=seed)
        cue = observation["critic"][0]
        cues.add(round(float(cue), 6))
        np.testing.assert_array_equal(observation["policy"], [cue, 0])
        for step in range(1, 21):
            observation, *_ = env.step(np.float32([0]))
            np.testing.assert_array_equal(observation["policy"], np.float32([0, step / 20]))
            np.testing.assert_array_equal(observation["critic"], np.float32([cue, step / 20]))
    assert cues == {-0.8, 0.8}


@pytest.mark.parametrize("horizon", [5, 10, 20, 100, 300, 1000])
def test_cue_recall_horizons(horizon):
    for name in ("CueRecall", "CueRecall-delayed"):
        env = envs.make(f"{name}-{horizon}-v0")
        env.reset(seed=0)
        assert cue_return(env, lambda o: o["critic"][0])[1] == horizon
        assert env.unwrapped.delayed == envs.make(f"{name}-v0").unwrapped.delayed
        assert env.unwrapped.delayed == (name == "CueRecall-delayed")
        assert envs.make(f"{name}-v0").unwrapped.horizon == 20


def heading(start, goal):
    """The action that points from `start` to `goal`, both (2,)."""
    dx, dy = np.subtract(goal, start)
    return np.float32([np.arctan2(dy, dx) % (2 * np.pi) / np.pi - 1])


def unscale(values):
    return (np.asarray(values, float) + 1) * 75


def test_point_mass_oracle():
    env = envs.make("PointMassMemory-v0")
    seen_starts, seen_goals = set(), set()
    for seed in range(30):
        observation, _ = env.reset(seed=seed)
        start = unscale(observation["policy"][:2])
        goal = np.array([unscale(observation["policy"][2]), 130])
        seen_starts.add(round(start[0]))
        seen_goals.add(round(goal[0]))
        np.testing.assert_allclose(start[1], 15, atol=1e-4)
        np.testing.assert_array_equal(observation["policy"], observation["critic"])
        blind = 0
        for _ in range(int(np.linalg.norm(goal - start) / 1.8)):
            before = unscale(observation["critic"][:2])
            observation, reward, terminated, truncated, info = env.step(heading(before, goal))
            position = unscale(observation["critic"][:2])
            np.testing.assert_allclose(np.linalg.norm(position - before), 1.8, atol=1e-4)
            distance = np.linalg.norm(goal - position)
            assert reward == pytest.approx(np.exp(-0.1 * distance), rel=1e-3)
            assert not terminated and not truncated
            visible = np.linalg.norm(position - start) <= 30
            assert observation["policy"][2] == (observation["critic"][2] if visible else 0)
            np.testing.assert_array_equal(observation["policy"][:2], observation["critic"][:2])
            np.testing.assert_allclose(unscale(observation["critic"][2]), goal[0], atol=1e-4)
            blind += not visible
            assert info["success"] is bool(distance <= 5)
        assert info["success"]
        assert blind >= 47
        # Success is about having been there.
        for _ in range(5):
            *_, info = env.step(np.float32([0.5]))
        assert np.linalg.norm(goal - unscale(env.unwrapped.observe()["critic"][:2])) > 5
        assert info["success"]
    assert seen_starts == seen_goals == {25, 57, 88, 120}


def test_point_mass_sees_the_cue_again_when_it_returns():
    env = envs.make("PointMassMemory-v0")
    env.reset(seed=0)
    visible = [bool(env.step(np.float32([-0.5]))[0]["policy"][2]) for _ in range(30)]
    visible += [bool(env.step(np.float32([0.5]))[0]["policy"][2]) for _ in range(29)]
    assert visible == [True] * 16 + [False] * 27 + [True] * 16


@pytest.mark.parametrize("env_id", ["PointMassMemory-v0", "PointMassDoor-v0"])
@pytest.mark.parametrize(("action", "axis"), [(-1, 0), (0, 0), (0.5, 1)])
def test_leaving_the_field(env_id, action, axis):
    env = envs.make(env_id)
    env.reset(seed=0)
    position = env.unwrapped.start.copy()
    step = 1.8 * np.array([np.cos(np.pi * (action + 1)), np.sin(np.pi * (action + 1))])
    for _ in range(1000):
        observation, reward, terminated, *_ = env.step(np.float32([action]))
        position += step
        inside = 0 <= position[axis] <= 150
        assert terminated == (not inside)
        assert (reward == -2) == (not inside)
        assert observation in env.observation_space
        if terminated:
            break
    assert terminated


def test_field_is_no_longer_than_the_time_limit():
    for env_id in ("PointMassMemory-v0", "PointMassDoor-v0"):
        env = envs.make(env_id)
        env.reset(seed=0)
        for step in range(1, 1001):
            *_, terminated, truncated, _ = env.step(np.float32([step % 2 - 1]))
            assert not terminated
            assert truncated is (step == 1000)


def test_door_oracle():
    env = envs.make("PointMassDoor-v0")
    lefts = []
    for seed in range(40):
        observation, _ = env.reset(seed=seed)
        np.testing.assert_allclose(unscale(observation["policy"][:2]), [75, 10], atol=1e-4)
        edges = unscale(observation["policy"][2:])
        lefts += [*edges]
        way = [(edges[0] + 20, 58), (edges[0] + 20, 62), (edges[1] + 20, 88), (edges[1] + 20, 92)]
        for target in [*way, (75, 140)]:
            while np.linalg.norm(unscale(observation["critic"][:2]) - target) > 1.8:
                position = unscale(observation["critic"][:2])
                observation, reward, terminated, _, info = env.step(heading(position, target))
                position = unscale(observation["critic"][:2])
                visible = np.linalg.norm(position - [75, 10]) <= 20
                cue = observation["critic"][2:] if visible else [0, 0]
                np.testing.assert_array_equal(observation["policy"][2:], cue)
                np.testing.assert_allclose(unscale(observation["critic"][2:]), edges, atol=1e-4)
                distance = np.linalg.norm(position - [75, 140])
                assert reward == pytest.approx(10 * np.exp(-0.03 * distance), rel=1e-3)
                assert not terminated
        assert info["success"]
    assert min(lefts) >= 10 and max(lefts) <= 100
    assert min(lefts) < 20 and max(lefts) > 90


@pytest.mark.parametrize("wall", [0, 1])
def test_walls_end_the_episode(wall):
    env = envs.make("PointMassDoor-v0")
    for seed in range(10):
        env.reset(seed=seed)
        task = env.unwrapped
        y, left, right = task.doors[wall]
        assert (y, right - left) == pytest.approx(((60, 90)[wall], 40))
        for x, hit in [(left - 1, True), (left + 1, False), (right - 1, False), (right + 1, True)]:
            env.reset(seed=seed)
            task.trail = [np.array([x, y - 0.5])]
            observation, reward, terminated, _, info = env.step(np.float32([-0.5]))
            assert terminated is hit
            assert (reward == -2) is hit
            assert observation in env.observation_space
            assert not info["success"]


@pytest.mark.parametrize(
    ("before", "after", "hit"),
    [
        ((5, 50), (5, 59.9), False),  # stops short of the wall
        ((5, 50), (5, 60), True),  # stops at the wall
        ((25, 50), (25, 60), False),  # stops in the door
        ((25, 60), (25, 62), False),  # goes on from there
        ((25, 60), (5, 60), True),  # walks along the wall into the post
        ((25, 60), (35, 60), False),  # walks along the wall inside the door
        ((9, 59), (11, 61), False),  # meets the wall exactly at the edge of the door
        ((8.9, 59), (10.9, 61), True),  # ends in front of the door but crosses beside it
        ((51, 61), (49.1, 59), True),  # crosses downwards, beside the door
        ((49, 61), (51, 59), False),
        ((5, 61), (5, 70), False),
    ],
)
def test_hits_wall(before, after, hit):
    assert hits_wall(np.array(before), np.array(after), 60.0, 10.0, 50.0) is hit


NEARBY = -1e-9, 0, 1e-9


@given(*[st.floats(0, 150)] * 4, st.floats(10, 100))
@example(10.0, 60.0, 78.87690827376503, 0.0, 10.0)  # begins at the edge of the door
def test_hits_wall_agrees_with_a_dense_walk(x0, y0, x1, y1, left):
    before, after = np.array([x0, y0]), np.array([x1, y1])
    hit = hits_wall(before, after, 60.0, left, left + 40)
    back = [hits_wall(after, before, 60.0, left + shift, left + 40 + shift) for shift in NEARBY]
    assert hit in back or y0 == y1  # but for rounding
    if (y0 - 60) * (y1 - 60) < -1e-3:
        way = before + np.linspace(0, 1, 20001)[:, None] * (after - before)
        x = way[np.abs(way[:, 1] - 60).argmin(), 0]
        if min(abs(x - left), abs(x - left - 40)) > 0.1:
            assert hit == (not left <= x <= left + 40)
    elif (y0 - 60) * (y1 - 60) > 0:
        assert not hit


@pytest.mark.parametrize("env_id", ["PointMassMemory-v0", "PointMassDoor-v0"])
def test_rendering(env_id):
    env = envs.make(env_id, render_mode="rgb_array")
    env.reset(seed=0)
    first = env.render()
    assert first.shape == (300, 300, 3)
    assert first.dtype == np.uint8
    for _ in range(10):
        env.step(np.float32([-0.5]))
    # The point, red, has gone up by 18 units, 36 pixels.
    rows = [
        np.argwhere((image == (210, 60, 40)).all(-1)).mean(0) for image in (first, env.render())
    ]
    np.testing.assert_allclose(rows[0] - rows[1], [36, 0], atol=1)
    trail = np.argwhere((env.render() == (240, 170, 120)).all(-1))[:, 0]
    assert len(trail) > 5
    assert rows[1][0] <= trail.min() <= trail.max() <= rows[0][0] + 1
    walls = (first == 0).all(-1).any(1).sum()
    assert walls == (8 if env_id == "PointMassDoor-v0" else 0)


def test_rendering_into_a_list():
    env = envs.make("CueRecall-v0", render_mode="rgb_array_list")
    env.reset(seed=0)
    env.step(np.float32([0]))
    assert len(env.render()) == 2


def test_rendering_the_cue():
    env = envs.make("CueRecall-v0", render_mode="rgb_array")
    cue = env.reset(seed=0)[0]["critic"][0]
    env.step(np.float32([-0.5]))
    image = env.render()
    assert (image.shape, image.dtype) == ((300, 300, 3), np.uint8)
    for half, colour, value in [
        (image[:150], (60, 170, 90), cue),
        (image[150:], (210, 60, 40), -0.5),
    ]:
        column = np.argwhere((half == colour).all(-1))[:, 1].mean()
        assert column == pytest.approx(150 * (value + 1), abs=1)


# --- environments of one's own and errors ---------------------------------------------------------

MODULE = """
import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.mujoco.hopper_v4 import HopperEnv


class Own(gym.Env):
    def __init__(self, observation, action=spaces.Box(-1, 1, (1,))):
        self.observation_space, self.action_space = observation, action

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


class Robot(HopperEnv):
    pass


class Structured(HopperEnv):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.observation_structure = {"skipped_qpos": 1, "qpos": 5, "qvel": 6}


class Wrong(HopperEnv):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.observation_structure = {"qpos": 5, "qvel": 5}


class OnlyPositions(HopperEnv):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.observation_structure = {"qpos": 11}


box = spaces.Box(-1, 1, (3,), np.float64)
pair = spaces.Dict(policy=spaces.Box(-2, 2, (2,)), critic=box, extra=box)
for name, observation in {
    "Vector": box,
    "Pair": pair,
    "NoCritic": spaces.Dict(policy=box),
    "ImageCritic": spaces.Dict(policy=box, critic=spaces.Box(0, 1, (2, 2))),
    "Image": spaces.Box(0, 255, (8, 8, 3), np.uint8),
    "Discrete": spaces.Discrete(3),
    "Empty": spaces.Box(-1, 1, (0,)),
}.items():
    gym.register(f"{name}-v0", Own, kwargs={"observation": observation})
for name, action in {
    "DiscreteAction": spaces.Discrete(3),
    "UnboundedAction": spaces.Box(-np.inf, np.inf, (2,)),
    "MatrixAction": spaces.Box(-1, 1, (2, 2)),
}.items():
    gym.register(f"{name}-v0", Own, kwargs={"observation": box, "action": action})
class Longer(HopperEnv):  # than Gymnasium's
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.observation_structure = {"qpos": 5, "qvel": 6}
        self.observation_space = spaces.Box(-np.inf, np.inf, (12,), np.float64)

    def _get_obs(self):
        return np.append(super()._get_obs(), self.data.time)


for robot in (Robot, Structured, Wrong, OnlyPositions, Longer):
    gym.register(f"{robot.__name__}-v0", robot, max_episode_steps=5)
"""


@pytest.fixture(autouse=True, scope="module")
def own_module(tmp_path_factory):
    """Make `own_tasks:Id-v0` available."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_tasks.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


def test_own_vector_is_taken_as_both():
    env = envs.make("own_tasks:Vector-v0")
    check_env(env, skip_render_check=True)
    assert sizes(env) == (3, 3)
    assert env.get_wrapper_attr("critic_sees_more") is False


def test_own_pair_is_taken_as_it_is():
    env = envs.make("own_tasks:Pair-v0")
    check_env(env, skip_render_check=True)
    assert sizes(env) == (2, 3)
    assert set(env.observation_space) == set(env.reset()[0]) == {"policy", "critic"}
    assert env.get_wrapper_attr("critic_sees_more") is True
    blind = envs.make("own_tasks:Pair-v0", privileged_critic=False)
    check_env(blind, skip_render_check=True)
    assert sizes(blind) == (2, 2)
    assert blind.get_wrapper_attr("critic_sees_more") is False


def test_own_robot():
    env = envs.make("own_tasks:Structured-v0", hide="velocities", random_bodies=True)
    check_env(env, skip_render_check=True)
    assert sizes(env) == (5, 15)
    assert sizes(envs.make("own_tasks:Robot-v0", random_bodies=True)) == (11, 15)
    assert sizes(envs.make("own_tasks:Longer-v0")) == (12, 12)


@pytest.mark.parametrize(
    ("env_id", "options", "message"),
    [
        ("Foo-v0", {}, "'Foo-v0' cannot be made: Environment `Foo` doesn't exist"),
        ("Ant-v17", {}, "version `v17` for environment `Ant` doesn't exist.*`v4`, `v5`"),
        ("Ant-v3", {}, "v3 based environments have been moved"),
        ("nowhere/Ant-v4", {}, "Namespace nowhere not found"),
        ("nowhere:Ant-v4", {}, "No module named 'nowhere'"),
        ("an ant", {}, "Malformed environment ID: an ant"),
        ("Ant-v4", {"hide": "velocity"}, "'none', 'velocities', 'positions', not 'velocity'"),
        ("Ant-v4", {"colour": 1}, "unexpected keyword argument 'colour'"),
        ("CueRecall-v0", {"length": 3}, "unexpected keyword argument 'length'"),
        ("Ant-v4", {"render_mode": "oil"}, "cannot be rendered as 'oil', but as .*rgb_array"),
        ("CueRecall-v0", {"horizon": 0}, "whole number of at least 1, not 0"),
        ("CueRecall-v0", {"horizon": 2.5}, "whole number of at least 1, not 2.5"),
        ("CueRecall-v0", {"delayed": "yes"}, "delayed is True or False, not 'yes'"),
        ("Reacher-v5", {"hide": "velocities"}, "'Reacher-v5' is not.*Ant.*Walker2d.*structure"),
        ("Pendulum-v1", {"hide": "positions"}, "hide='positions' needs.*Ant, HalfCheetah"),
        ("own_tasks:Robot-v0", {"hide": "velocities"}, "'Robot-v0' is not.*observation_structure"),
        ("own_tasks:Wrong-v0", {"hide": "velocities"}, "has 11 values, not those of"),
        ("own_tasks:Longer-v0", {"wind": True}, "has 12 values, not those of"),
        ("Hopper-v5", {"frame_skip": 0}, "'Hopper-v5' cannot be made"),
        ("Hopper-v5", {"reset_noise_scale": "abc"}, "'Hopper-v5' cannot be made"),
        ("Hopper-v4", {"healthy_z_range": 3}, "'Hopper-v4' cannot be made"),
        ("own_tasks:OnlyPositions-v0", {"hide": "positions"}, "What the policy sees is a 1-D Box"),
        ("Swimmer-v4", {"wind": True}, "wind is for Ant, .*Walker2d, and not for 'Swimmer-v4'"),
        ("Pendulum-v1", {"wind": True}, "wind is for Ant"),
        ("Pendulum-v1", {"random_bodies": True}, "random_bodies needs the XML file"),
        ("CueRecall-v0", {"hide": "velocities"}, "decides itself what its policy sees"),
        ("own_tasks:Pair-v0", {"random_bodies": True}, "decides itself what its policy sees"),
        ("own_tasks:Pair-v0", {"wind": True}, "decides itself what its policy sees"),
        ("own_tasks:NoCritic-v0", {}, 'needs the entries "policy" and "critic".*policy'),
        ("own_tasks:ImageCritic-v0", {}, "What the critic sees is a 1-D Box"),
        ("own_tasks:Image-v0", {}, "The observation is a 1-D Box"),
        ("own_tasks:Discrete-v0", {}, "The observation is a 1-D Box.*Discrete"),
        ("own_tasks:Empty-v0", {}, "The observation is a 1-D Box with at least one value"),
        ("own_tasks:DiscreteAction-v0", {}, "Actions are a 1-D Box with finite bounds"),
        ("own_tasks:UnboundedAction-v0", {}, "Actions are a 1-D Box with finite bounds"),
        ("own_tasks:MatrixAction-v0", {}, "Actions are a 1-D Box with finite bounds"),
    ],
)
def test_bad_input_is_a_clear_error(env_id, options, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        envs.make(env_id, **options)
