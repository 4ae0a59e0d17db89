"""Environments stepped together, actions and checks at their border, and episodes played there."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

import envs
import envs.vector
from envs.wrappers import UnitActions

each = pytest.mark.parametrize


class Scripted(gym.Env):
    """Counts its steps in both halves of the observation, and ends after `steps` of them."""

    def __init__(self, box=spaces.Box(-1, 1, (2,)), steps=3, info=None, at=1, **changed):  # noqa: B008
        self.action_space, self.steps, self.info = box, steps, info or {}
        self.at, self.changed, self.actions = at, changed, []
        self.observation_space = spaces.Box(-1e9, 1e9, (2,), np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        self.draw = self.np_random.random()
        return np.array([0.0, self.draw]), dict(self.info)

    def step(self, action):
        self.actions.append(action)
        self.time += 1
        changed = self.changed if self.time == self.at else {}
        result = dict(observation=np.array([self.time, self.draw]), reward=1.0) | changed
        return *result.values(), self.time == self.steps, False, dict(self.info)


gym.register("Scripted-v0", Scripted, disable_env_checker=True)


class Counter(torch.nn.Module):
    """An actor that adds one to its internal state each step and keeps what it is given."""

    z_dim = 1

    def __init__(self, action_dim=1, value=0.25):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.action_dim, self.value, self.given = action_dim, value, []

    def act(self, obs, z, a_prev, deterministic):
        self.given.append((z[:, 0].tolist(), a_prev[:, 0].tolist(), deterministic))
        noise = 0 if deterministic else torch.rand_like(a_prev)
        return torch.full_like(a_prev, self.value) + noise, z + 1


# --- environments stepped together ----------------------------------------------------------------


def test_an_episode_of_t_steps_fills_t_plus_1_rows():
    env = envs.make_vec("Scripted-v0", 2, steps=2)
    obs, _ = env.reset(seed=3)
    draws, zeros = [obs["policy"][:, 1].tolist()], np.zeros((2, 2), np.float32)
    times, ends, told = [obs["policy"][0, 0]], [], []
    for _ in range(6):
        obs, reward, terminated, truncated, info = env.step(zeros)
        times.append(obs["policy"][0, 0])
        ends.append(bool(terminated[0]))
        told.append(info["episode"]["r"].tolist() if "episode" in info else None)
        assert reward.tolist() == [1.0 if times[-1] else 0.0] * 2 and not truncated.any()
        draws.append(obs["policy"][:, 1].tolist())
    assert times == [0, 1, 2, 0, 1, 2, 0]
    assert ends == [False, True, False] * 2 and told == [None, [2.0, 2.0], None] * 2
    assert draws[0] == draws[2] != draws[3] and draws[0][0] != draws[0][1]
    again, _ = env.reset(seed=3)
    assert again["policy"][:, 1].tolist() == draws[0]
    one, _ = envs.make_vec("Scripted-v0").reset(seed=4)  # the seed of the second is one more
    assert one["policy"][0, 1] == draws[0][1]


def test_options_reach_every_environment():
    env = envs.make_vec("Hopper-v4", 2, hide="velocities", wind=True)
    observations, action = env.single_observation_space, env.single_action_space
    assert observations["policy"].shape == (5,) and observations["critic"].shape == (12,)
    assert env.critic_sees_more and action == spaces.Box(-1, 1, (3,), np.float32)
    obs, _ = env.reset(seed=0)
    for view in obs.values():
        assert view.dtype == np.float32 and len(view) == 2 and (view[0] != view[1]).any()
    assert not envs.make_vec("CueRecall-v0", privileged_critic=False).critic_sees_more


@each("number", [0, 1.5])
def test_a_number_of_environments_is_a_whole_one(number):
    with pytest.raises(SystemExit) as refusal:  # ends a program with that sentence and status 1
        envs.make_vec("CueRecall-v0", number)
    assert refusal.value.code == f"num_envs is a whole number of at least 1, not {number!r}."
    assert isinstance(refusal.value, ValueError)


def test_of_info_there_is_what_tells_success_and_the_statistics():
    """Gymnasium copies all of it into arrays, where it can; "episode" is where statistics go."""
    ragged = [[1.0], [1.0, 2.0]]
    info = dict(episode=ragged, shape=np.zeros(2), thing=None, nested={"a": 1}, is_success=1)
    env = envs.make_vec("Scripted-v0", 2, steps=1, info=info)
    assert env.reset(seed=0)[1].keys() == {"is_success", "_is_success"}
    *_, info = env.step(np.zeros((2, 2), np.float32))
    assert info["episode"]["l"].tolist() == [1, 1] and info["is_success"].tolist() == [True, True]
    assert {key.strip("_") for key in info} == {"episode", "is_success"}


def test_video_is_recorded_of_the_first_environment(tmp_path):
    env = envs.make_vec("CueRecall-5-v0", 2, video_folder=str(tmp_path / "videos"))
    envs.evaluate(Counter(), env, 6, True, 0)
    env.close()
    names = sorted(path.name for path in (tmp_path / "videos").glob("*.mp4"))
    assert names[:3] == [f"rl-video-episode-{i}.mp4" for i in range(3)]
    assert env.envs[1].render_mode is None


def test_what_cannot_be_recorded_is_told_in_a_sentence(tmp_path, monkeypatch):
    def render(self):
        raise OSError("no screen")

    with pytest.raises(envs.UsageError, match="'Scripted-v0' cannot be rendered as 'rgb_array'"):
        envs.make_vec("Scripted-v0", video_folder=str(tmp_path))
    gym.register("Bare-v0", lambda: Scripted())  # without an argument render_mode
    with pytest.raises(envs.UsageError, match=r"'Bare-v0' cannot be made with {'render_mode'"):
        envs.make_vec("Bare-v0", video_folder=str(tmp_path))
    monkeypatch.setattr("envs.memory.CueRecall.render", render)
    message = r"^cannot record video: OSError\('no screen'\) .*MUJOCO_GL=egl may help\)$"
    with pytest.raises(envs.UsageError, match=message):
        envs.make_vec("CueRecall-v0", video_folder=str(tmp_path))


def test_an_environment_may_use_one_array_for_all_its_observations():
    maker = lambda: gym.wrappers.RescaleAction(Scripted(), -1, 1)  # noqa: E731
    mode = gym.vector.AutoresetMode.NEXT_STEP
    env = gym.vector.SyncVectorEnv([maker], copy=False, autoreset_mode=mode)
    (episode,) = envs.evaluate(Counter(2), env, 1, True, 0)
    assert episode["observations"][:, 0].tolist() == [0, 1, 2, 3]


# --- their border ---------------------------------------------------------------------------------

BOXES = {
    "single": spaces.Box(np.float32([-0.1, 0.3]), np.float32([0.7, 0.3])),
    "double": spaces.Box(np.array([-0.1, 0.3]), np.array([1e12 + 0.7, 0.3]), dtype=np.float64),
    "vast": spaces.Box(np.float32([-1.5e38, 1]), np.float32([1.5e38, 2])),
    "half": spaces.Box(np.float16([-0.1, 0.3]), np.float16([0.7, 0.3]), dtype=np.float16),
}


@each("name", BOXES)
def test_actions_cross_in_the_units_of_the_environment(name):
    """Those of the space, to its very ends, whatever rounding does, and as `gym.make` gives it."""
    box = BOXES[name]
    env = envs.make_vec("Scripted-v0", box=box, steps=10**6)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (50, 2)).astype(np.float32)
    actions[:4] = [[-1, -1], [1, 1], [5, -5], [np.nextafter(np.float32(1), 0), 0]]
    for action in actions:
        env.step(action[None])
    given, unit = env.envs[0].unwrapped.actions, env.envs[0]
    assert all(action in box and action.dtype == box.dtype for action in given)
    assert np.array_equal(given[0], box.low) and np.array_equal(given[1], box.high)
    low, high = box.low.astype(np.longdouble), box.high.astype(np.longdouble)
    actions = actions.clip(-1, 1)
    exact = low + (actions.astype(np.longdouble) + 1) / 2 * (high - low)
    close = 4 * np.finfo(box.dtype).eps
    np.testing.assert_allclose(given, exact, rtol=close, atol=min(1, box.high[0]) * close)
    back, held = unit.reverse(np.array(given)), box.low == box.high
    assert back.dtype == np.float32 and not back[:, held].any()
    np.testing.assert_allclose(back[:, ~held], actions[:, ~held], atol=max(4 * close, 1e-6))
    assert np.abs(unit.reverse(np.array([box.low - 1, box.high + 1]))).max() <= 1


@each("value", [np.nan, np.inf])
def test_an_action_that_is_not_finite_is_refused(value):
    env = envs.make_vec("Scripted-v0")
    env.reset(seed=0)
    with pytest.raises(envs.UsageError, match="the action is not finite: training has diverged"):
        env.step(np.array([[0, value]], np.float32))
    assert not env.envs[0].unwrapped.actions


def test_the_space_of_actions_is_the_one_that_wrappers_left():
    class Narrow(gym.ActionWrapper):
        action_space = spaces.Box(0, 1, (2,))

        def action(self, action):
            return action - 7

    gym.register("Narrow-v0", lambda **kwargs: Narrow(Scripted(**kwargs)))
    env = envs.make_vec("Narrow-v0")
    env.reset(seed=0)
    env.step(np.float32([[1, -1]]))
    assert env.envs[0].unwrapped.actions[0].tolist() == [-6, -7]


@each(
    ("changed", "says"),
    [
        (dict(observation=[np.nan, 0.0]), "observation holds nan"),
        (dict(observation=[0.0, -np.inf]), "observation holds -inf"),
        (dict(observation=[1e39, 0.0]), r"observation holds 1e\+39"),
        (dict(observation=[0.0]), r"observation has the shape \(1,\), and not \(2,\)"),
        (dict(observation=None), "observation is of type object, and no number"),
        (dict(reward=np.nan), "reward holds nan"),
        (dict(reward=None), "reward is of type object, and no number"),
        (dict(reward=np.zeros(1)), r"reward has the shape \(1,\), and not \(\)"),
    ],
)
def test_an_environment_that_breaks_its_word_is_named(changed, says):
    env = envs.make_vec("Scripted-v0", steps=9, at=4, **changed)
    says = f"^'Scripted-v0': {says}.*, at step 4 of an episode$"
    for _ in range(2):
        env.reset(seed=0)
        for _ in range(3):
            env.step(np.zeros((1, 2), np.float32))
        with pytest.raises(envs.UsageError, match=says):
            env.step(np.zeros((1, 2), np.float32))


@pytest.mark.filterwarnings("ignore:.*The obs returned by")
@each("name", ["policy", "critic"])
def test_both_views_are_checked_at_reset_too(name, monkeypatch):
    def observation(policy, critic):
        return dict(policy=np.zeros(2), critic=np.zeros(2)) | {name: np.array([0, np.nan])}

    monkeypatch.setattr("envs.memory.observation", observation)
    with pytest.raises(envs.UsageError, match=f"'CueRecall-v0': {name} holds nan.* at step 0 "):
        envs.make("CueRecall-v0").reset(seed=0)


# --- evaluation -----------------------------------------------------------------------------------


@each("deterministic", [True, False])
def test_evaluation_carries_the_memory_and_resets_it_with_the_episode(deterministic):
    actor = Counter()
    played = envs.evaluate(actor, envs.make_vec("CueRecall-5-v0"), 2, deterministic, 0)
    z, a_prev, modes = zip(*actor.given)
    assert z == tuple([float(t)] for t in range(6)) * 2 and set(modes) == {deterministic}
    for episode, rows in zip(played, (a_prev[:6], a_prev[6:])):  # the sixth is its last observation
        assert rows[0] == [0.0]
        np.testing.assert_array_equal(np.ravel(rows[1:]), episode["actions"].ravel())
        assert len(episode["rewards"]) == 5
        time = np.float32([0, 0.2, 0.4, 0.6, 0.8, 1])
        np.testing.assert_array_equal(episode["observations"][:, 1], time)
        right = 1 - abs(episode["actions"][:, 0].clip(-1, 1) - episode["critic_observations"][0, 0])
        np.testing.assert_allclose(episode["rewards"], right, rtol=1e-6)


@each("episodes", [1, 5])
def test_evaluation_shares_the_episodes_among_the_environments(episodes):
    env = envs.make_vec("Hopper-v4", 2, hide="velocities")
    played = envs.evaluate(Counter(action_dim=3), env, episodes, True, 0)
    assert len(played) == episodes
    for episode in played:
        steps = len(episode["rewards"])
        shapes = {name: column.shape for name, column in episode.items()}
        assert shapes == dict(
            observations=(steps + 1, 5), critic_observations=(steps + 1, 11), actions=(steps, 3),
            rewards=(steps,), terminations=(steps,), truncations=(steps,),
        )  # fmt: skip
        ends = episode["terminations"] | episode["truncations"]
        assert ends.nonzero()[0].tolist() == [steps - 1]
        assert abs(episode["actions"] - 0.25).max() == 0
    firsts = {tuple(episode["observations"][0]) for episode in played}
    assert len(firsts) == episodes  # each of another environment, or later


def test_a_seed_decides_the_episodes_and_torch_goes_on_as_if_nothing_had_been():
    env = envs.make_vec("CueRecall-5-v0", 2)

    def play(seed, deterministic=False):
        played = envs.evaluate(Counter(), env, 8, deterministic, seed)
        names = "actions", "critic_observations"
        return [np.concatenate([episode[name] for episode in played]) for name in names]

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = play(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    for one, again, other in zip(first, play(1), play(2)):
        assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert (play(1, deterministic=True)[0] == 0.25).all()


class Steersman(Counter):
    """Remembers the goal of PointMassMemory, which it sees near the start, and goes there."""

    def act(self, obs, z, a_prev, deterministic):
        x, y, cue = obs.T
        z = torch.where((z == 0) & (cue[:, None] != 0), cue[:, None], z)
        heading = torch.atan2(130 / 75 - 1 - y, z[:, 0] - x)
        return (heading / torch.pi)[:, None] % 2 - 1, z


@each(("actor", "successful"), [(Steersman(), True), (Counter(), False)])
def test_evaluation_knows_the_successes_of_tasks_that_have_them(actor, successful):
    env = envs.make_vec("PointMassMemory-v0", 2, max_episode_steps=100)
    for episode in envs.evaluate(actor, env, 3, True, 0):
        success = episode["successes"]
        assert success.shape == episode["rewards"].shape and success.dtype == bool
        assert success[-1] == successful and not success[0]
        assert (success[:-1] <= success[1:]).all()


@each("name", ["success", "is_success"])
def test_a_success_has_two_names_and_may_be_told_at_the_end_alone(name, monkeypatch):
    step = Scripted.step

    def at_the_end(self, action):
        *result, info = step(self, action)
        late = result[2] and self.np_random.random() < 0.5
        return *result, {name: np.bool_(True)} if late else info

    monkeypatch.setattr(Scripted, "step", at_the_end)
    env = envs.make_vec("Scripted-v0", 2)
    played = envs.evaluate(Counter(action_dim=2), env, 20, True, 0)
    successes = np.array([episode["successes"] for episode in played])
    assert not successes[:, :2].any() and 3 < successes[:, 2].sum() < 17
    result = envs.returns(Counter(action_dim=2), env, 20, 0)
    assert 0.1 < result["success_deterministic"] < 0.9


def test_returns_are_means_of_both_modes_and_each_seed_has_its_own_episodes(monkeypatch):
    seeds = []

    def evaluate(actor, env, episodes, deterministic, seed):
        seeds.append(seed)
        found = [dict(rewards=np.full(2, float(deterministic + i))) for i in range(episodes)]
        return [e | dict(successes=np.arange(2) > i) for i, e in enumerate(found)] if env else found

    monkeypatch.setattr(envs.vector, "evaluate", evaluate)
    assert envs.returns(None, False, 2, 1, 0) == dict(return_deterministic=3, return_stochastic=1)
    assert envs.returns(None, True, 2, 1, 0)["success_stochastic"] == 0.5
    seeds.clear()
    for seed in range(20):
        for step in range(0, 100_000, 10_000):
            envs.returns(None, False, 1, seed, step)
    assert seeds[::2] == seeds[1::2] and np.diff(np.sort(seeds[::2])).min() > 16
    assert min(seeds) >= 0 and max(seeds) < 2**31  # as some environments want it


def test_an_episode_that_never_ends_is_answered_in_a_sentence(monkeypatch):
    monkeypatch.setattr(envs.vector, "LONGEST_EPISODE", 50)
    monkeypatch.setattr(envs.wrappers.Checked, "longest", 3)
    with pytest.raises(envs.EndlessEpisode, match="in 50 steps: set max_episode_steps"):
        envs.evaluate(Counter(action_dim=2), envs.make_vec("Scripted-v0", steps=51), 1, True, 0)
    limited = envs.make_vec("Scripted-v0", steps=99, max_episode_steps=50)
    (episode,) = envs.evaluate(Counter(action_dim=2), limited, 1, True, 0)
    assert episode["truncations"].sum() == 1 and not episode["terminations"].any()
    (episode,) = envs.evaluate(
        Counter(action_dim=2), envs.make_vec("Scripted-v0", steps=99), 1, True, 0
    )
    assert len(episode["rewards"]) == 99  # less than ten times the 50 of before


def test_a_vector_environment_of_your_own_with_a_plain_observation_is_played():
    env = gym.vector.SyncVectorEnv([lambda: UnitActions(Scripted(info={"success": False}))] * 2)
    for episode in envs.evaluate(Counter(action_dim=2), env, 3, True, 0):
        assert episode["observations"][:, 0].tolist() == [0, 1, 2, 3]
        np.testing.assert_array_equal(episode["observations"], episode["critic_observations"])
        assert not episode["successes"].any()
