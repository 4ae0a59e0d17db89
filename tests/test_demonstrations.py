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


def test_a_policy_sees_of_the_expert_what_its_environment_does_not_hide(path):
    states = hopper_file(path)["observations"].astype(np.float32)  # five positions, six velocities
    for options, policy, critic in [
        ({}, slice(11), slice(11)),
        (dict(hide="velocities"), slice(5), slice(11)),
        (dict(hide="positions"), slice(5, 11), slice(11)),
        (dict(hide="velocities", privileged_critic=False), slice(5), slice(5)),
    ]:
        found = load(path, envs.make("Hopper-v4", **options))
        for episode, rows in zip(found, (states[:4], states[4:]), strict=True):
            assert np.array_equal(episode["observations"], rows[:, policy])
            assert np.array_equal(episode["critic_observations"], rows[:, critic])
            assert episode["observations"].dtype == episode["actions"].dtype == np.float32
        assert [episode["rewards"].tolist() for episode in found] == [[0, 1, 2], [3, 4]]
        assert found[0]["terminations"].tolist() == [False, False, True]


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


@each("num_envs", [1, 3])
def test_demonstrations_are_rows_as_environments_hand_them_out(num_envs):
    random, lengths, episodes = np.random.default_rng(0), [4, 1, 6], []
    for length in lengths:
        names = "observations", "critic_observations"
        episode = {name: random.random((length + 1, 2)) for name in names}
        episode |= dict(actions=random.random((length, 1)), rewards=random.random(length))
        episodes.append(episode | dict(terminations=np.arange(length) == length - 1))
    rows = list(envs.demonstrations.rows(episodes, num_envs))
    steps = sum(length + 1 for length in lengths) // num_envs
    obs, _, actions, rewards, terminated, first = (np.stack(c).swapaxes(0, 1) for c in zip(*rows))
    assert obs.shape == (num_envs, steps, 2)
    together = np.concatenate([episode["observations"] for episode in episodes])
    np.testing.assert_array_equal(obs.reshape(-1, 2), together[: num_envs * steps])
    starts = np.cumsum([0, 5, 2])
    assert np.flatnonzero(first.reshape(-1)).tolist() == starts.tolist()
    finals = [start - 1 for start in [*starts[1:], 14] if start - 1 < num_envs * steps]
    assert not actions.reshape(-1)[finals].any() and not rewards.reshape(-1)[finals].any()
    ends = [f - 1 for f in [4, 6, 13] if f <= num_envs * steps]
    assert np.flatnonzero(terminated.reshape(-1)).tolist() == ends


# Written ------------------------------------------------------------------------------------------


class Chance(torch.nn.Linear):
    """An expert that acts by chance."""

    z_dim, action_dim = 1, 1

    def act(self, obs, z, a_prev, deterministic):
        return 2 * torch.rand_like(a_prev) - 1, z


@each(
    ("env_id", "options", "largest"),
    [
        ("InvertedPendulum-v4", dict(hide="velocities"), 3),
        ("PointMassMemory-v0", dict(max_episode_steps=100), 1),  # which tells successes
    ],
)
def test_what_is_written_is_read_again(env_id, options, largest, path):
    env = envs.make_vec(env_id, 2, **options)
    played = envs.evaluate(Chance(1, 1), env, 3, False, 0)
    options = dict(seed=5, env_kwargs={}) | options
    save(path, played, env, options)
    found = load(path, env)
    with np.load(path) as file:
        written = dict(file)
    successes = written.pop("successes", None)
    for one, other in zip(played, found, strict=True):
        assert one.keys() - {"successes"} == other.keys()
        for name, column in other.items():
            np.testing.assert_allclose(one[name], column, atol=1e-6, err_msg=name)
    if "successes" in played[0]:
        assert np.array_equal(successes, np.concatenate([one["successes"] for one in played]))
    returns = [float(episode["rewards"].sum()) for episode in played]
    assert written["env_id"] == env_id
    assert json.loads(str(written["made_by"])) == options | dict(returns=returns)
    expected = largest * np.concatenate([episode["actions"] for episode in played])
    np.testing.assert_allclose(written["actions"], expected, rtol=1e-6)


def test_an_environment_may_have_an_attribute_visible(path, monkeypatch):
    monkeypatch.setattr("envs.memory.CueRecall.visible", True, raising=False)
    env = envs.make_vec("CueRecall-5-v0")
    save(path, envs.evaluate(Chance(1, 1), env, 1, False, 0), env, {})
    assert len(load(path, env)) == 1


def test_a_file_is_written_whole_or_not_at_all(path, tmp_path, monkeypatch):
    env = envs.make_vec("CueRecall-5-v0")
    played = envs.evaluate(Chance(1, 1), env, 1, False, 0)
    save(path, played, env, {})
    before = (tmp_path / "expert.npz").read_bytes()

    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(envs.UsageError, match="cannot be written: No space left on device"):
        save(path, played, env, {})
    assert (tmp_path / "expert.npz").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))
    monkeypatch.undo()
    with pytest.raises(envs.UsageError, match=r"no/expert\.npz cannot be written: No such file"):
        save(tmp_path / "no" / "expert.npz", played, env, {})
    with pytest.raises(envs.UsageError, match=r"written to a FILE\.npz, not to expert"):
        save("expert", played, env, {})


# Refused ------------------------------------------------------------------------------------------

OLD = dict(env_kwargs={}, wind=False, random_bodies=False, hide="none")  # before they were kwargs
NEW = dict(env_kwargs={}, hide="velocities")
HEAVY, SLOW, WIND = dict(healthy_reward=0.5), dict(max_episode_steps=9), dict(wind=True)
TALL = dict(healthy_z_range=(0.6, 9.0))  # a list in JSON


@each(
    ("made_by", "here", "says"),
    [
        (OLD, {}, None),
        (NEW, dict(hide="velocities"), None),
        (dict(), WIND, None),  # of what it says nothing
        (OLD | dict(env_kwargs=HEAVY), HEAVY | dict(render_mode="rgb_array"), None),
        (OLD | WIND, WIND, None),
        (dict(env_kwargs=WIND | dict(random_bodies=False)), WIND, None),
        (dict(env_kwargs=dict(random_bodies=True)), dict(random_bodies=True), None),
        (dict(env_kwargs=SLOW), {}, None),
        (dict(env_kwargs=TALL), TALL, None),
        (NEW, SLOW, None),
        (OLD | dict(env_kwargs=HEAVY), {}, r"\{'healthy_reward': 0.5\}, and here they are \{\}"),
        (NEW, HEAVY, r"env_kwargs \{\}, and here they are \{'healthy_reward': 0.5\}"),
        (OLD | WIND, {}, r"env_kwargs \{'wind': True\}, and here they are \{\}"),
        (dict(env_kwargs=WIND), {}, r"env_kwargs \{'wind': True\}, and here"),
        (OLD, dict(random_bodies=True), r"env_kwargs \{\}, and here they are \{'random_bodies'"),
        ("text", {}, "made_by is no JSON object"),
        ([1], {}, "made_by is no JSON object"),
    ],
)
def test_demonstrations_of_another_variant_of_the_task_are_refused(made_by, here, says, path):
    env = envs.make("Hopper-v4", **here)
    states = np.zeros((7, env.observation_space["critic"].shape[0]))
    hopper_file(path, made_by=json.dumps(made_by), observations=states, critic_observations=states)
    if says is None:
        assert len(load(path, env)) == 2
    else:
        with pytest.raises(envs.UsageError, match=says):
            load(path, env)


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
    (lambda path: path.write_bytes(path.read_bytes()[:1000]), "is damaged"),
    (lambda path: path.write_text("not a file of demonstrations"), "is damaged"),
    (lambda path: path.unlink() or path.mkdir(), "is damaged"),
    (lambda path: path.unlink(), "there are no demonstrations at"),
]


@each(("damage", "says"), DAMAGE)
def test_unusable_demonstrations_are_answered_in_a_sentence(damage, says, tmp_path):
    path, env = tmp_path / "expert.npz", envs.make("Hopper-v4", hide="velocities")
    hopper_file(path, **(damage if isinstance(damage, dict) else {}))
    if callable(damage):
        damage(path)
    with pytest.raises(envs.UsageError, match=says) as error:
        load(str(path), env)
    assert "\n" not in str(error.value)


@each("episodes", [0, 3])
def test_so_many_episodes_as_are_asked_for_have_to_be_there(episodes, path):
    hopper_file(path)
    env = envs.make("Hopper-v4")
    assert len(load(path, env, 1)) == 1
    with pytest.raises(envs.UsageError, match=f"holds 2 episodes, and {episodes} are asked for"):
        load(path, env, episodes)


# Shipped ------------------------------------------------------------------------------------------


@each("name", SHIPPED)
def test_shipped_demonstrations(name):
    """Are what the table beside them says."""
    path, env_id = FOLDER / f"{name}.npz", name.removesuffix("-stochastic")
    assert path.stat().st_size < 2e6
    env = envs.make(env_id, hide="velocities")
    episodes = load(None if name == env_id else "shipped:stochastic", env)
    with np.load(path) as file:
        made_by, actions = json.loads(str(file["made_by"])), file["actions"]
    found = np.concatenate([episode["actions"] for episode in episodes])
    np.testing.assert_allclose(found, (actions / env.action_space.high).clip(-1, 1), atol=1e-6)
    assert len(episodes) == 5 and made_by["hide"] == "none" and made_by["env_id"] == env_id
    assert made_by.get("stochastic_demonstrations", False) == (name != env_id)
    returns = [found["rewards"].sum() for found in episodes]
    np.testing.assert_allclose(returns, made_by["returns"], rtol=1e-5)
    assert min(returns) > SHIPPED[name]
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
    """The first episode terminates, the second is cut off where the recording stopped."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer

    rng = np.random.default_rng(0)
    states = [rng.normal(size=(n + 1, 4)).astype(np.float32) for n in (3, 2)]
    actions = [rng.uniform(-3, 3, size=(n, 1)).astype(np.float32) for n in (3, 2)]
    buffers = [
        EpisodeBuffer(
            observations=s, actions=a, rewards=np.ones(len(a)), infos={},
            terminations=(np.arange(len(a)) == 2), truncations=np.zeros(len(a), bool),
        )
        for s, a in zip(states, actions)
    ]  # fmt: skip
    recorded_in, source = gym.make("InvertedPendulum-v5"), "minari:pendulum/test-v0"
    minari.create_dataset_from_buffers("pendulum/test-v0", buffers, env=recorded_in)
    env = envs.make("InvertedPendulum-v5", hide="velocities")
    found = load(source, env)
    for one, s, a in zip(found, states, actions, strict=True):
        assert np.array_equal(one["critic_observations"], s)
        assert np.array_equal(one["observations"], s[:, :2])
        np.testing.assert_allclose(one["actions"], a / 3, rtol=1e-6)
    terminations, truncations = (
        [one[name].tolist() for one in found] for name in ("terminations", "truncations")
    )
    assert terminations == [[False, False, True], [False, False]]
    assert truncations == [[False, False, False], [False, True]]
    assert len(load(source, env, 1)) == 1
    with pytest.raises(envs.UsageError, match=r"need an environment of envs\.make"):
        load(source, recorded_in)
    with pytest.raises(envs.UsageError, match="of InvertedPendulum-v5, not of Hopper-v4"):
        load(source, envs.make("Hopper-v4"))
    with pytest.raises(envs.UsageError, match="minari download"):
        load("minari:pendulum/nothing-v0", env)
    with pytest.raises(envs.UsageError, match="holds 2 episodes, and 3 are asked for"):
        load(source, env, 3)


@each("damage", ["short", "empty", "none", "other keys"])
def test_odd_data_sets_of_minari(damage, monkeypatch):
    minari = pytest.importorskip("minari")
    steps = 0 if damage == "empty" else 3
    states = np.zeros((steps + (damage != "short"), 4))
    columns = dict.fromkeys(("rewards", "terminations", "truncations"), np.zeros(steps, bool))
    found = types.SimpleNamespace(
        observations={"image": states} if damage == "other keys" else states,
        actions=np.zeros((steps, 1)), **columns,
    )  # fmt: skip
    episodes = [] if damage == "none" else [found]
    data = types.SimpleNamespace(env_spec=None, iterate_episodes=lambda: iter(episodes))
    monkeypatch.setattr(minari, "load_dataset", lambda name: data)
    says = {"none": "holds no episodes", "other keys": r"are \['image'\]"}
    with pytest.raises(envs.UsageError, match=says.get(damage, r"T \+ 1 observations")):
        load("minari:a/b-v0", envs.make("InvertedPendulum-v5", hide="velocities"))
