"""Demonstrations: written and read, of others' variants, damaged, shipped, and those of Minari."""

import importlib.util
import json
import types

import gymnasium as gym
import numpy as np
import pytest
import torch

import envs
import envs.demonstrations
from envs.demonstrations import FOLDER, load, save

each = pytest.mark.parametrize
SHIPPED = {  # the least return of an episode
    "InvertedPendulum-v4": 999, "InvertedPendulum-v4-stochastic": 999, "Hopper-v4": 3000,
    "Hopper-v4-stochastic": 3000, "HalfCheetah-v4": 5500, "HalfCheetah-v4-stochastic": 5400,
}  # fmt: skip


def hopper_file(path, lengths=(3, 2), **changes):
    """A file of random demonstrations; `changes` replace or (None) remove its arrays."""
    steps, rng = sum(lengths), np.random.default_rng(0)
    states = rng.normal(size=(steps + len(lengths), 11))
    ends = np.zeros(steps, bool)
    ends[np.cumsum(lengths) - 1] = True
    arrays = dict(
        observations=states, critic_observations=states,
        actions=rng.uniform(-1, 1, size=(steps, 3)), rewards=np.arange(steps),
        terminations=ends, truncations=np.zeros(steps, bool), env_id="Hopper-v4",
    ) | changes  # fmt: skip
    np.savez_compressed(path, **{k: v for k, v in arrays.items() if v is not None})
    return arrays


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "expert.npz")


# What is seen, and the actions --------------------------------------------------------------------


def test_a_policy_without_velocities_imitates_an_expert_that_saw_them(path):
    states = hopper_file(path)["observations"]
    first, second = load(path, envs.make("Hopper-v4", hide="velocities"))
    np.testing.assert_allclose(first["critic_observations"], states[:4], rtol=1e-6)
    np.testing.assert_allclose(second["critic_observations"], states[4:], rtol=1e-6)
    for found in (first, second):  # five positions, six velocities
        assert np.array_equal(found["observations"], found["critic_observations"][:, :5])
    assert first["rewards"].tolist() == [0, 1, 2] and second["rewards"].tolist() == [3, 4]
    assert first["terminations"].tolist() == [False, False, True]
    assert first["observations"].dtype == first["actions"].dtype == np.float32

    blind = load(path, envs.make("Hopper-v4", hide="velocities", privileged_critic=False))[0]
    assert blind["critic_observations"].shape == blind["observations"].shape == (4, 5)
    found = load(path, envs.make("Hopper-v4", hide="positions"))[0]
    assert np.array_equal(found["observations"], found["critic_observations"][:, 5:])
    assert load(path, envs.make("Hopper-v4"))[0]["observations"].shape == (4, 11)


def test_an_expert_that_saw_no_more_can_be_imitated_without_a_privileged_critic(path):
    hopper_file(path, observations=np.zeros((7, 5)), critic_observations=np.zeros((7, 5)))
    env = envs.make("Hopper-v4", hide="velocities", privileged_critic=False)
    assert load(path, env)[0]["critic_observations"].shape == (4, 5)
    with pytest.raises(envs.UsageError, match=r"states of 5 values, from which .* critic sees, 11"):
        load(path, envs.make("Hopper-v4", hide="velocities"))


def test_actions_come_into_the_unit_whatever_wraps_the_environment():
    with np.load(FOLDER / "InvertedPendulum-v4.npz") as file:
        expected = file["actions"][:1000] / 3  # they reach from -3 to 3
    many = envs.make_vec("InvertedPendulum-v4", 2, hide="velocities")
    one = envs.make("InvertedPendulum-v4", hide="velocities")
    rescaled = gym.wrappers.RescaleAction(one, np.float32(-1), np.float32(1))
    for env in (one, rescaled, many, many.envs[0]):
        found = load(None, env, 1)[0]["actions"]
        np.testing.assert_allclose(found, expected.clip(-1, 1), rtol=1e-5)


def test_actions_beyond_their_bounds_are_clipped_and_flags_may_be_numbers(path):
    flags = np.array([0.0, 0, 1, 0, 1])
    hopper_file(path, actions=np.full((5, 3), [5.0, -5.0, 0.5]), terminations=flags)
    found = load(path, envs.make("Hopper-v4"))
    assert found[0]["actions"].tolist() == [[1.0, -1.0, 0.5]] * 3
    assert [len(one["actions"]) for one in found] == [3, 2]


# Written ------------------------------------------------------------------------------------------


class Noise(torch.nn.Linear):
    z_dim, action_dim = 1, 1

    def act(self, obs, z, a_prev, deterministic):
        return 2 * torch.rand_like(a_prev) - 1, z


def test_what_is_written_is_read_again(path):
    env = envs.make_vec("InvertedPendulum-v4", 2, hide="velocities")
    played = envs.evaluate(Noise(1, 1), env, 3, False, 0)
    save(path, played, env, dict(seed=5, env_kwargs={}, hide="velocities"))
    found = load(path, env)
    assert len(found) == 3
    for one, other in zip(played, found):
        assert one.keys() == other.keys()
        for name, column in one.items():
            np.testing.assert_allclose(column, other[name], atol=1e-6, err_msg=name)
    with np.load(path) as file:
        made_by, actions = json.loads(str(file["made_by"])), file["actions"]
        assert file["env_id"] == "InvertedPendulum-v4"
    returns = [float(episode["rewards"].sum()) for episode in played]
    assert made_by == dict(seed=5, env_kwargs={}, hide="velocities", returns=returns)
    expected = 3 * np.concatenate([episode["actions"] for episode in played])
    np.testing.assert_allclose(actions, expected, rtol=1e-6)


def test_successes_are_written_too(path):
    env = envs.make_vec("PointMassMemory-v0", max_episode_steps=100)
    played = envs.evaluate(Noise(1, 1), env, 1, False, 0)
    save(path, played, env, dict(env_kwargs={}))
    with np.load(path) as file:
        assert np.array_equal(file["successes"], played[0]["successes"])
    assert len(load(path, env)) == 1


def test_a_file_is_written_whole_or_not_at_all(path, tmp_path, monkeypatch):
    env = envs.make_vec("CueRecall-5-v0")
    played = envs.evaluate(Noise(1, 1), env, 1, False, 0)
    save(path, played, env, {})
    before = (tmp_path / "expert.npz").read_bytes()

    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(envs.UsageError, match="cannot be written: No space left on device"):
        save(path, played, env, {})
    assert (tmp_path / "expert.npz").read_bytes() == before
    monkeypatch.undo()
    with pytest.raises(envs.UsageError, match=r"no/expert\.npz cannot be written: No such file"):
        save(tmp_path / "no" / "expert.npz", played, env, {})
    with pytest.raises(envs.UsageError, match=r"written to a FILE\.npz, not to expert"):
        save("expert", played, env, {})


# Refused ------------------------------------------------------------------------------------------

OLD = dict(env_kwargs={}, wind=False, random_bodies=False, hide="none")  # before they were kwargs
NEW = dict(env_kwargs={}, hide="velocities")
HEAVY = dict(healthy_reward=0.5)
SLOW = dict(max_episode_steps=9)


@each(
    ("made_by", "here", "says"),
    [
        (OLD, {}, None),
        (NEW, {"hide": "velocities"}, None),
        (dict(), {}, None),
        (dict(), {"wind": True}, None),  # of what it says nothing
        (OLD | dict(env_kwargs=HEAVY), HEAVY | {"render_mode": "rgb_array"}, None),
        (OLD | dict(wind=True), {"wind": True}, None),
        (dict(env_kwargs={"wind": True, "random_bodies": False}), {"wind": True}, None),
        (dict(env_kwargs={"random_bodies": True}), {"random_bodies": True}, None),
        (dict(env_kwargs=SLOW), {}, None),
        (NEW, SLOW, None),
        (OLD | dict(env_kwargs=HEAVY), {}, r"\{'healthy_reward': 0.5\}, and here they are \{\}"),
        (NEW, HEAVY, r"env_kwargs \{\}, and here they are \{'healthy_reward': 0.5\}"),
        (OLD | dict(wind=True), {}, r"env_kwargs \{'wind': True\}, and here they are \{\}"),
        (dict(env_kwargs={"wind": True}), {}, r"env_kwargs \{'wind': True\}, and here"),
        (OLD, {"random_bodies": True}, r"env_kwargs \{\}, and here they are \{'random_bodies'"),
        ("{", {}, "made_by is no JSON object"),
        ([1], {}, "made_by is no JSON object"),
        (3, {}, "made_by is no JSON object"),
    ],
)
def test_demonstrations_of_another_variant_of_the_task_are_refused(made_by, here, says, path):
    hopper_file(path, made_by=made_by if isinstance(made_by, str) else json.dumps(made_by))
    env = envs.make("Hopper-v4", **here)
    if says is not None:
        with pytest.raises(envs.UsageError, match=says):
            load(path, env)
    elif here.keys() & {"wind", "random_bodies"}:  # whose draws the states of this file lack
        with pytest.raises(envs.UsageError, match=r"what the critic sees, 1[25] values"):
            load(path, env)
    else:
        assert len(load(path, env)) == 2


NAN = np.where(np.arange(15).reshape(5, 3) == 7, np.nan, 0)
NONE = {"observations": np.zeros((0, 11)), "critic_observations": np.zeros((0, 11))}
NONE |= {"actions": np.zeros((0, 3)), "rewards": [], "terminations": [], "truncations": []}
ROWS = dict.fromkeys(("observations", "critic_observations"), np.zeros((6, 11)))
DAMAGE = [
    (dict(actions=None), "lacks .*actions"),
    (dict(env_id="Walker2d-v4"), "of Walker2d-v4, not of Hopper-v4"),
    (dict(critic_observations=np.zeros((7, 12))), "observations of 11 and states of 12 values"),
    (dict(actions=np.zeros((5, 2))), "actions of 2 values, and the environment's have 3"),
    (dict(actions=NAN), "actions holds values that are not finite"),
    (dict(rewards=np.full(5, 1e39)), "rewards holds values that are not finite"),
    (dict(actions=np.full((5, 3), "a")), "is no array of numbers"),
    (dict(rewards=np.zeros(4)), "not of one length"),
    (dict(terminations=np.zeros(5, bool)), "last episode does not end"),
    (NONE, "last episode does not end"),
    (ROWS, "T \\+ 1 observations"),
    (dict(rewards=np.array([None] * 5, dtype=object)), "is damaged"),  # pickled
    (dict(rewards=np.array(1.0)), "rewards is no array of numbers of its shape"),
    (dict(terminations=np.ones((5, 1), bool)), "terminations is no array of numbers of its shape"),
    ("too few", "holds 2 episodes, and 3 are asked for"),
    ("cut off", "is damaged"),
    ("overwritten", "is damaged"),
    ("text", "is damaged"),
    ("a folder", "is damaged"),
    ("missing", "there are no demonstrations at"),
]


@each(("damage", "says"), DAMAGE)
def test_unusable_demonstrations_are_answered_in_a_sentence(damage, says, tmp_path):
    path = tmp_path / "expert.npz"
    hopper_file(path, **(damage if isinstance(damage, dict) else {}))
    data = path.read_bytes()
    if damage in ("missing", "a folder"):
        path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage == "cut off":
        path.write_bytes(data[:1000])
    elif damage == "overwritten":
        path.write_bytes(data[:100] + bytes(100) + data[200:])
    elif damage == "text":
        path.write_text("not a file of demonstrations")
    env = envs.make("Hopper-v4", hide="velocities")
    with pytest.raises(envs.UsageError, match=says) as error:
        load(str(path), env, 3 if damage == "too few" else None)
    assert "\n" not in str(error.value)


# Shipped ------------------------------------------------------------------------------------------


@each("name", SHIPPED)
def test_shipped_demonstrations(name):
    path = FOLDER / f"{name}.npz"
    assert path.stat().st_size < 2e6
    env_id = name.removesuffix("-stochastic")
    source = "shipped:stochastic" if name != env_id else None
    env = envs.make(env_id, hide="velocities")
    episodes = load(source, env)
    with np.load(path) as file:
        made_by, actions = json.loads(str(file["made_by"])), file["actions"]
    found = np.concatenate([episode["actions"] for episode in episodes])
    np.testing.assert_allclose(found, (actions / env.action_space.high).clip(-1, 1), atol=1e-6)
    assert len(episodes) == 5 and made_by["hide"] == "none" and made_by["env_id"] == env_id
    returns = [found["rewards"].sum() for found in episodes]
    np.testing.assert_allclose(returns, made_by["returns"], rtol=1e-5)
    assert min(returns) > SHIPPED[name]
    assert made_by.get("stochastic_demonstrations", False) == (source is not None)
    table = (FOLDER / "README.md").read_text().splitlines()
    (row,) = [line for line in table if line.startswith(f"| {name} |")]
    assert f"| {', '.join(f'{value:.0f}' for value in returns)} |" in row
    assert f"seed {made_by['seed']}`" in row and f"{made_by['total_timesteps']:,} steps" in row


@pytest.mark.filterwarnings("ignore:.*Hopper-v4 is out of date")
def test_shipped_demonstrations_replay_in_the_simulator():
    """What they say of states, actions and rewards is what the environment does."""
    env = gym.make("Hopper-v4").unwrapped
    found = load(None, envs.make("Hopper-v4"), 1)[0]
    states = found["critic_observations"].astype(np.float64)
    # qvel is clipped to 10 in the observation, so take a step where it was not
    t = next(t for t in range(50, 1000) if abs(states[t, 5:]).max() < 9)
    env.reset(seed=0)
    env.set_state(np.concatenate([[0.0], states[t, :5]]), states[t, 5:])
    obs, reward, *_ = env.step(found["actions"][t])
    np.testing.assert_allclose(obs, states[t + 1], atol=2e-2)
    assert reward == pytest.approx(found["rewards"][t], abs=2e-2)


def test_no_demonstrations_of_a_task_name_those_there_are():
    with pytest.raises(envs.UsageError, match=r"no demonstrations for Ant-v4 .*Hopper-v4.*: name"):
        load(None, envs.make("Ant-v4", hide="velocities"))


# Minari -------------------------------------------------------------------------------------------


def test_minari_is_optional(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(envs.UsageError, match=r'pip install "minari\[hdf5\]"'):
        load("minari:a/b-v0", envs.make("Hopper-v4"))


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
def test_demonstrations_of_minari(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer

    rng = np.random.default_rng(0)
    states = [rng.normal(size=(n + 1, 4)) for n in (3, 2)]
    actions = [rng.uniform(-3, 3, size=(n, 1)).astype(np.float32) for n in (3, 2)]
    buffers = [
        EpisodeBuffer(
            observations=s, actions=a, rewards=np.ones(len(a)),
            # the first one terminates, the second is cut off where the recording stopped
            terminations=(np.arange(len(a)) == 2), truncations=np.zeros(len(a), bool), infos={},
        )
        for s, a in zip(states, actions)
    ]  # fmt: skip
    recorded_in, source = gym.make("InvertedPendulum-v5"), "minari:pendulum/test-v0"
    minari.create_dataset_from_buffers("pendulum/test-v0", buffers, env=recorded_in)
    env = envs.make("InvertedPendulum-v5", hide="velocities")
    found = load(source, env)
    for one, s, a in zip(found, states, actions):
        np.testing.assert_allclose(one["critic_observations"], s, rtol=1e-6)
        np.testing.assert_allclose(one["observations"], s[:, :2], rtol=1e-6)
        np.testing.assert_allclose(one["actions"], a / 3, rtol=1e-6)
    assert found[0]["terminations"].tolist() == [False, False, True]
    assert not found[0]["truncations"].any() and not found[1]["terminations"].any()
    assert found[1]["truncations"].tolist() == [False, True]
    assert len(load(source, env, 1)) == 1
    for name, other, episodes, says in [
        (source, envs.make("Hopper-v4"), None, "of InvertedPendulum-v5, not of Hopper-v4"),
        ("minari:pendulum/nothing-v0", env, None, "minari download"),
        (source, env, 3, "holds 2 episodes, and 3 are asked for"),
    ]:
        with pytest.raises(envs.UsageError, match=says):
            load(name, other, episodes)


@each("damage", ["short", "empty", "none", "other keys"])
def test_odd_data_sets_of_minari(damage, monkeypatch):
    minari = pytest.importorskip("minari")
    steps = 0 if damage == "empty" else 3
    states, flags = np.zeros((steps + (damage != "short"), 4)), np.zeros(steps, bool)
    found = types.SimpleNamespace(
        observations={"image": states} if damage == "other keys" else states,
        actions=np.zeros((steps, 1)), rewards=np.zeros(steps), terminations=flags,
        truncations=flags,
    )  # fmt: skip
    episodes = [] if damage == "none" else [found]
    data = types.SimpleNamespace(env_spec=None, iterate_episodes=lambda: iter(episodes))
    monkeypatch.setattr(minari, "load_dataset", lambda name: data)
    says = {"none": "holds no episodes", "other keys": r"are \['image'\]"}
    with pytest.raises(envs.UsageError, match=says.get(damage, r"T \+ 1 observations")):
        load("minari:a/b-v0", envs.make("InvertedPendulum-v5", hide="velocities"))
