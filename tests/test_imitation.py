"""Demonstrations, the discriminator and its rewards, behaviour cloning."""

import importlib.util
import json
import math
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli

import envs
import envs.demonstrations
import s2pg_gail
from s2pg_gail import (
    Demonstrations,
    Discriminator,
    discriminator_loss,
    discriminator_rows,
    imitation_reward,
)

CPU = torch.device("cpu")
SHIPPED = {  # the least return of an episode
    "InvertedPendulum-v4": 999, "InvertedPendulum-v4-stochastic": 999, "Hopper-v4": 3000,
    "Hopper-v4-stochastic": 3000, "HalfCheetah-v4": 5500,
    "HalfCheetah-v4-stochastic": 5400,
}  # fmt: skip
SHARED = pytest.mark.parametrize("script", [s2pg_gail], ids=["gail"])


def episode(steps, obs_dim=2, critic_dim=3, action_dim=1, terminated=True, seed=0):
    """As `envs.demonstrations.load` gives it, of random numbers."""
    rng = np.random.default_rng(seed)
    ends = np.arange(steps) == steps - 1
    return dict(
        observations=rng.normal(size=(steps + 1, obs_dim)).astype(np.float32),
        critic_observations=rng.normal(size=(steps + 1, critic_dim)).astype(np.float32),
        actions=rng.uniform(-1, 1, size=(steps, action_dim)).astype(np.float32),
        rewards=np.ones(steps, np.float32),
        terminations=ends & terminated,
        truncations=ends & (not terminated),
    )


# Demonstrations ---------------------------------------------------------------------------------


def hopper_file(path, lengths=(3, 2), env_id="Hopper-v4", **changes):
    """A file of random demonstrations; `changes` replace or (None) remove its arrays."""
    steps = sum(lengths)
    rng = np.random.default_rng(0)
    states = rng.normal(size=(steps + len(lengths), 11))
    ends = np.zeros(steps, bool)
    ends[np.cumsum(lengths) - 1] = True
    arrays = (
        dict(
            observations=states,
            critic_observations=states,
            actions=rng.uniform(-1, 1, size=(steps, 3)),
            rewards=np.arange(steps),
            terminations=ends,
            truncations=np.zeros(steps, bool),
            env_id=env_id,
        )
        | changes
    )
    np.savez_compressed(path, **{k: v for k, v in arrays.items() if v is not None})
    return arrays


def test_a_policy_without_velocities_imitates_an_expert_that_saw_them(tmp_path):
    path = tmp_path / "expert.npz"
    file = hopper_file(path)
    env = envs.make("Hopper-v4", hide="velocities")
    first, second = envs.demonstrations.load(str(path), env)
    np.testing.assert_allclose(first["critic_observations"], file["observations"][:4], rtol=1e-6)
    np.testing.assert_allclose(second["critic_observations"], file["observations"][4:], rtol=1e-6)
    for found in (first, second):  # five positions, six velocities
        assert np.array_equal(found["observations"], found["critic_observations"][:, :5])
    assert first["rewards"].tolist() == [0, 1, 2] and second["rewards"].tolist() == [3, 4]
    assert first["terminations"].tolist() == [False, False, True]
    assert first["observations"].dtype == first["actions"].dtype == np.float32

    env = envs.make("Hopper-v4", hide="velocities", privileged_critic=False)
    (first, _) = envs.demonstrations.load(str(path), env)
    assert first["critic_observations"].shape == first["observations"].shape == (4, 5)
    (first, _) = envs.demonstrations.load(str(path), envs.make("Hopper-v4", hide="positions"))
    assert np.array_equal(first["observations"], first["critic_observations"][:, 5:])
    (first, _) = envs.demonstrations.load(str(path), envs.make("Hopper-v4"))
    assert first["observations"].shape == (4, 11)


def test_an_expert_that_saw_no_more_can_be_imitated_without_a_privileged_critic(tmp_path):
    path = tmp_path / "expert.npz"
    both = np.zeros((7, 5))
    hopper_file(path, observations=both, critic_observations=both)
    env = envs.make("Hopper-v4", hide="velocities", privileged_critic=False)
    assert envs.demonstrations.load(str(path), env)[0]["critic_observations"].shape == (4, 5)
    with pytest.raises(ValueError, match=r"states of 5 values, from which .* critic sees, 11"):
        envs.demonstrations.load(str(path), envs.make("Hopper-v4", hide="velocities"))


def test_demonstrations_of_another_variant_of_the_task_are_refused(tmp_path):
    path = str(tmp_path / "expert.npz")

    def load(made_by, **options):
        hopper_file(path, made_by=json.dumps(made_by))
        return envs.demonstrations.load(path, envs.make("Hopper-v4", **options))

    usual = dict(env_kwargs={}, wind=False, random_bodies=False, hide="none")
    heavy = usual | dict(env_kwargs=dict(healthy_reward=0.5))
    assert len(load(usual, hide="velocities")) == len(load(dict())) == 2
    assert len(load(heavy, healthy_reward=0.5, render_mode="rgb_array")) == 2
    with pytest.raises(ValueError, match=r"made with env_kwargs = \{'healthy_reward': 0.5\}"):
        load(heavy)
    with pytest.raises(ValueError, match=r"env_kwargs = \{\}, and here it is \{'healthy_reward'"):
        load(usual, healthy_reward=0.5)
    with pytest.raises(ValueError, match="wind = True, and here it is False"):
        load(usual | dict(wind=True))
    with pytest.raises(ValueError, match="random_bodies = False, and here it is True"):
        load(usual, random_bodies=True)
    for made_by in ("{", "[1]", "3"):
        hopper_file(path, made_by=made_by)
        with pytest.raises(ValueError, match="made_by is no JSON object"):
            envs.demonstrations.load(path, envs.make("Hopper-v4"))


def test_actions_are_scaled_from_the_units_of_the_environment():
    env = envs.make("InvertedPendulum-v4", hide="velocities")  # actions from -3 to 3
    found = envs.demonstrations.load(None, env, 1)[0]["actions"]
    with np.load(envs.demonstrations.FOLDER / "InvertedPendulum-v4.npz") as file:
        np.testing.assert_allclose(found, file["actions"][:1000] / 3, rtol=1e-5)


def test_actions_beyond_their_bounds_are_clipped_as_the_environment_does(tmp_path):
    hopper_file(tmp_path / "expert.npz", actions=np.full((5, 3), [5.0, -5.0, 0.5]))
    (found, _) = envs.demonstrations.load(str(tmp_path / "expert.npz"), envs.make("Hopper-v4"))
    assert found["actions"].tolist() == [[1.0, -1.0, 0.5]] * 3


def test_flags_may_be_numbers(tmp_path):
    hopper_file(tmp_path / "expert.npz", terminations=np.array([0.0, 0, 1, 0, 1]))
    found = envs.demonstrations.load(str(tmp_path / "expert.npz"), envs.make("Hopper-v4"))
    assert [len(one["actions"]) for one in found] == [3, 2]


DAMAGE = {
    "cut off": "is damaged",
    "text": "is damaged",
    "missing": "there are no demonstrations at",
    "other keys": "lacks .*actions",
    "another task": "of Walker2d-v4, not of Hopper-v4",
    "other states": "observations of 11 and states of 12 values",
    "other actions": "actions of 2 values, and the environment's have 3",
    "not finite": "actions holds values that are not finite",
    "text in it": "is no array of numbers",
    "one too few": "not of one length",
    "no end": "last episode does not end",
    "observations": "T \\+ 1 observations",
    "too few": "holds 2 episodes, and 3 are asked for",
    "pickled": "is damaged",
    "a folder": "is damaged",
    "overwritten": "is damaged",
    "a number": "rewards is no array of numbers of its shape",
    "flags of two dimensions": "terminations is no array of numbers of its shape",
    "too large": "rewards holds values that are not finite",
    "empty": "last episode does not end",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_unusable_demonstrations_are_answered_in_a_sentence(damage, tmp_path):
    path, episodes = tmp_path / "expert.npz", None
    file = hopper_file(path)
    nan = file["actions"].copy()
    nan[2, 1] = np.nan
    changes = {
        "other keys": dict(actions=None),
        "another task": dict(env_id="Walker2d-v4"),
        "other states": dict(critic_observations=np.zeros((7, 12))),
        "other actions": dict(actions=np.zeros((5, 2))),
        "not finite": dict(actions=nan),
        "text in it": dict(actions=np.full((5, 3), "a")),
        "one too few": dict(rewards=np.zeros(4)),
        "no end": dict(terminations=np.zeros(5, bool)),
        "observations": dict.fromkeys(("observations", "critic_observations"), np.zeros((6, 11))),
        "pickled": dict(rewards=np.array([None] * 5, dtype=object)),
        "a number": dict(rewards=np.array(1.0)),
        "flags of two dimensions": dict(terminations=np.ones((5, 1), bool)),
        "too large": dict(rewards=np.full(5, 1e39)),
        "empty": {k: v[:0] for k, v in file.items() if k != "env_id"},
    }
    if damage in changes:
        hopper_file(path, **changes[damage])
    elif damage == "cut off":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "overwritten":
        data = bytearray(path.read_bytes())
        data[100:200] = bytes(100)
        path.write_bytes(data)
    elif damage == "a folder":
        path.unlink()
        path.mkdir()
    elif damage == "text":
        path.write_text("not a file of demonstrations")
    elif damage == "missing":
        path.unlink()
    elif damage == "too few":
        episodes = 3
    with pytest.raises(ValueError, match=DAMAGE[damage]) as error:
        envs.demonstrations.load(str(path), envs.make("Hopper-v4", hide="velocities"), episodes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_demonstrations(name):
    path = envs.demonstrations.FOLDER / f"{name}.npz"
    assert path.stat().st_size < 2e6
    env_id = name.removesuffix("-stochastic")
    source = "shipped:stochastic" if name != env_id else None
    env = envs.make(env_id, hide="velocities")
    episodes = envs.demonstrations.load(source, env)
    with np.load(path) as file:
        made_by, actions = json.loads(str(file["made_by"])), file["actions"]
    found = np.concatenate([episode["actions"] for episode in episodes])
    scale = env.unwrapped.action_space.high
    np.testing.assert_allclose(found, (actions / scale).clip(-1, 1), atol=1e-6)
    assert len(episodes) == 5 and made_by["hide"] == "none" and made_by["env_id"] == env_id
    returns = [found["rewards"].sum() for found in episodes]
    np.testing.assert_allclose(returns, made_by["returns"], rtol=1e-5)
    assert min(returns) > SHIPPED[name]
    assert made_by.get("stochastic_demonstrations", False) == (source is not None)
    table = (envs.demonstrations.FOLDER / "README.md").read_text().splitlines()
    (row,) = [line for line in table if line.startswith(f"| {name} |")]
    assert f"| {', '.join(f'{value:.0f}' for value in returns)} |" in row
    assert f"seed {made_by['seed']}`" in row and f"{made_by['total_timesteps']:,} steps" in row


def test_shipped_demonstrations_replay_in_the_simulator():
    """What they say of states, actions and rewards is what the environment does."""
    env = gym.make("Hopper-v4").unwrapped
    found = envs.demonstrations.load(None, envs.make("Hopper-v4"), 1)[0]
    states = found["critic_observations"].astype(np.float64)
    # qvel is clipped to 10 in the observation, so take a step where it was not
    t = next(t for t in range(50, 1000) if abs(states[t, 5:]).max() < 9)
    env.reset(seed=0)
    env.set_state(np.concatenate([[0.0], states[t, :5]]), states[t, 5:])
    obs, reward, *_ = env.step(found["actions"][t])
    np.testing.assert_allclose(obs, states[t + 1], atol=2e-2)
    assert reward == pytest.approx(found["rewards"][t], abs=2e-2)


def test_no_demonstrations_of_a_task_name_those_there_are():
    with pytest.raises(ValueError, match=r"no demonstrations for Ant-v4 .*Hopper-v4.*: name"):
        envs.demonstrations.load(None, envs.make("Ant-v4", hide="velocities"))


def test_minari_is_optional(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "minari\[hdf5\]"'):
        envs.demonstrations.load("minari:a/b-v0", envs.make("Hopper-v4"))


def test_demonstrations_of_minari(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer

    rng = np.random.default_rng(0)
    states = [rng.normal(size=(n + 1, 4)) for n in (3, 2)]
    actions = [rng.uniform(-3, 3, size=(n, 1)).astype(np.float32) for n in (3, 2)]
    buffers = [
        EpisodeBuffer(
            observations=s,
            actions=a,
            rewards=np.ones(len(a)),
            # the first one terminates, the second is cut off where the recording stopped
            terminations=(np.arange(len(a)) == 2),
            truncations=np.zeros(len(a), bool),
            infos={},
        )
        for s, a in zip(states, actions)
    ]
    minari.create_dataset_from_buffers(
        "pendulum/test-v0", buffers, env=gym.make("InvertedPendulum-v5")
    )
    env = envs.make("InvertedPendulum-v5", hide="velocities")
    found = envs.demonstrations.load("minari:pendulum/test-v0", env)
    for one, s, a in zip(found, states, actions):
        np.testing.assert_allclose(one["critic_observations"], s, rtol=1e-6)
        np.testing.assert_allclose(one["observations"], s[:, :2], rtol=1e-6)
        np.testing.assert_allclose(one["actions"], a / 3, rtol=1e-6)
    assert found[0]["terminations"].tolist() == [False, False, True]
    assert not found[0]["truncations"].any() and not found[1]["terminations"].any()
    assert found[1]["truncations"].tolist() == [False, True]
    with pytest.raises(ValueError, match="of InvertedPendulum-v5, not of Hopper-v4"):
        envs.demonstrations.load("minari:pendulum/test-v0", envs.make("Hopper-v4"))
    with pytest.raises(ValueError, match="minari download"):
        envs.demonstrations.load("minari:pendulum/nothing-v0", env)
    assert len(envs.demonstrations.load("minari:pendulum/test-v0", env, 1)) == 1
    with pytest.raises(ValueError, match="holds 2 episodes, and 3 are asked for"):
        envs.demonstrations.load("minari:pendulum/test-v0", env, 3)


@pytest.mark.parametrize("damage", ["short", "empty", "none", "other keys"])
def test_odd_data_sets_of_minari(damage, monkeypatch):
    minari = pytest.importorskip("minari")
    steps = 0 if damage == "empty" else 3
    states = np.zeros((steps + (damage != "short"), 4))
    observations = {"image": states} if damage == "other keys" else states
    flags = np.zeros(steps, bool)
    found = types.SimpleNamespace(
        observations=observations, actions=np.zeros((steps, 1)), rewards=np.zeros(steps),
        terminations=flags, truncations=flags,
    )  # fmt: skip
    episodes = [] if damage == "none" else [found]
    data = types.SimpleNamespace(env_spec=None, iterate_episodes=lambda: iter(episodes))
    monkeypatch.setattr(minari, "load_dataset", lambda name: data)
    env = envs.make("InvertedPendulum-v5", hide="velocities")
    says = {"none": "holds no episodes", "other keys": r"are \['image'\]"}
    with pytest.raises(ValueError, match=says.get(damage, r"T \+ 1 observations")):
        envs.demonstrations.load("minari:a/b-v0", env)


# Demonstrations side by side ---------------------------------------------------------------------


@SHARED
def test_episodes_lie_side_by_side(script):
    episodes = [episode(4, seed=1), episode(2, seed=2, terminated=False)]
    data = script.Demonstrations(episodes, CPU)
    assert data.obs.shape == (5, 2, 2) and data.critic_obs.shape == (5, 2, 3)
    assert data.valid.T.tolist() == [[True] * 4 + [False], [True] * 2 + [False] * 3]
    for e, one in enumerate(episodes):
        n = len(one["actions"])
        np.testing.assert_array_equal(data.obs[: n + 1, e], one["observations"])
        np.testing.assert_array_equal(data.action[:n, e], one["actions"])
        assert not data.action[n:, e].any() and not data.a_prev[0, e].any()
        np.testing.assert_array_equal(data.a_prev[1 : n + 1, e], one["actions"])
    assert data.terminated.nonzero().tolist() == [[3, 0]]
    assert data.returns == [4, 2]


@SHARED
def test_the_memory_is_rolled_along_what_the_expert_saw_and_did(script):
    episodes = [episode(4, seed=1), episode(2, seed=2)]
    data = script.Demonstrations(episodes, CPU)
    data.roll(lambda o, z, a_prev: (None, 2 * z + o[:, :1] + 10 * a_prev), z_dim=1)
    for e, one in enumerate(episodes):
        z = 0.0
        for t in range(len(one["observations"])):
            assert data.z[t, e].item() == pytest.approx(z, rel=1e-5)
            a_prev = one["actions"][t - 1, 0] if t > 0 else 0.0
            z = 2 * z + one["observations"][t, 0] + 10 * a_prev


@SHARED
def test_all_rows_of_all_episodes_count_alike_in_the_cloning_loss(script):
    """With mu = z and z' = z + o; sequences of up to 3 rows, padding does not count."""
    data = script.Demonstrations(
        [episode(5, obs_dim=1, seed=1), episode(3, obs_dim=1, seed=2)], CPU
    )

    def step(o, z, a_prev):
        return z, z + o

    data.roll(step, z_dim=1)
    data.action[4, 0] = data.action[0, 1] = 10  # the last row of one, the first of the other
    torch.manual_seed(0)
    loss = script.cloning_loss(step, data, 20_000, 3)
    errors = [
        (data.z[t, e] - data.action[t, e]).square().item()
        for e, steps in enumerate([5, 3])
        for t in range(steps)
    ]
    assert loss.item() == pytest.approx(np.mean(errors), rel=0.03)


@SHARED
@pytest.mark.parametrize("memoryless", [False, True])
def test_cloning_needs_a_memory_where_the_expert_had_one(script, memoryless):
    """The expert repeats a cue that is visible in the first step only."""
    rng = np.random.default_rng(0)
    episodes = []
    for i in range(16):
        cue, one = rng.choice([-0.8, 0.8]), episode(6, obs_dim=1, critic_dim=1, seed=i)
        one["observations"][:] = 0
        one["observations"][0] = cue
        one["actions"][:] = cue
        episodes.append(one)
    for one in episodes:  # seeing what it did just before, it could do without
        one["actions"][2::2] = 0
    torch.manual_seed(0)
    args = script.Args(memoryless=memoryless, bc_steps=400, bc_lr=3e-3, bc_sequence_length=6)
    agent = script.Agent(args, 1, 1, 1, True, CPU)
    data = script.Demonstrations(episodes, CPU)
    loss = agent.clone(data, []).item()
    # without: 0 is the best guess for the two of six actions that neither o nor a_prev give away
    assert loss > 0.15 if memoryless else loss < 0.08


# GAIL ---------------------------------------------------------------------------------------------


def test_the_loss_of_the_discriminator():
    """Rows of the absorbing state count as the 1 / (1 - gamma) steps for which it stands."""
    torch.manual_seed(0)
    discriminator = Discriminator(2, 1)
    no, state, action = torch.zeros(3, dtype=torch.bool), torch.randn(3, 2), torch.randn(3, 1)
    expert = discriminator_rows(state, action, no)
    policy = discriminator_rows(-state, action, torch.tensor([False, True, True]))
    loss, entropy = discriminator_loss(discriminator, policy, expert, 0.3, gamma=0.9)

    repeated = torch.cat([policy[:3], *([policy[3:]] * 10)])  # 1 / (1 - 0.9)
    logits = discriminator(repeated), discriminator(expert)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    expected = bce(logits[0], torch.zeros(23)) + bce(logits[1], torch.ones(3))
    exact = sum(Bernoulli(logits=logit).entropy().mean() for logit in logits) / 2
    torch.testing.assert_close(entropy, exact.detach())
    torch.testing.assert_close(loss, expected - 0.3 * exact)


def test_the_entropy_of_the_discriminator_pulls_it_towards_doubt():
    torch.manual_seed(0)
    discriminator, rows = Discriminator(2, 1), torch.randn(5, 4) * torch.tensor([1.0, 1, 1, 0])
    discriminator.net[-1].bias.data.fill_(3.0)  # D is sure that this is the expert
    with_entropy, _ = discriminator_loss(discriminator, rows, rows, 10.0, 0.99)
    without, _ = discriminator_loss(discriminator, rows, rows, 0.0, 0.99)
    (gradient,) = torch.autograd.grad(with_entropy - without, discriminator.net[-1].bias)
    assert gradient > 0  # descent lowers the logit, towards D = 1/2


def test_imitation_rewards():
    logit = torch.tensor([-30.0, -2.0, 0.0, 2.0, 30.0])
    d = torch.sigmoid(logit.double())
    gail = -(1 - d + 1e-8).log()
    torch.testing.assert_close(imitation_reward(logit, "gail").double(), gail, rtol=1e-4, atol=1e-6)
    assert imitation_reward(torch.tensor(100.0), "gail").item() == pytest.approx(-math.log(1e-8))
    torch.testing.assert_close(imitation_reward(logit, "airl"), logit)


def test_rows_of_the_discriminator():
    state, action = torch.randn(3, 2), torch.randn(3, 1)
    rows = discriminator_rows(state, action, torch.tensor([False, True, False]))
    assert torch.equal(rows[:3], torch.cat([state, action, torch.zeros(3, 1)], -1))
    assert rows[3:].tolist() == [[0, 0, 0, 1]]


def test_the_absorbing_state_is_one_state():
    """Whatever the statistics of the states are."""
    discriminator = Discriminator(2, 1)
    row = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    before = discriminator(row)
    discriminator.normalizer.update(5 + torch.randn(100, 2))
    torch.testing.assert_close(discriminator(row), before)
    other = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    assert discriminator(other).item() != before.item()


def gail(privileged=True, **options):
    """An agent, its expert, and a full rollout of 5-step episodes in two environments."""
    args = s2pg_gail.Args(
        num_steps=40, num_envs=2, num_minibatches=2, update_epochs=1, state_dim=4, **options
    )
    torch.manual_seed(0)
    agent = s2pg_gail.Agent(args, 2, 3, 1, privileged, CPU)
    data = Demonstrations([episode(10, seed=1), episode(7, seed=2, terminated=False)], CPU)
    rollout = agent.make_rollout()
    fill(rollout)
    return agent, data, rollout


def fill(rollout):
    """Rows of random numbers; each sixth is the final row of a terminated episode."""
    generator = torch.Generator().manual_seed(1)
    rollout.length = len(rollout.first)
    for name in ("obs", "critic_obs", "z", "a_prev", "action", "log_prob", "value"):
        tensor = getattr(rollout, name)
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    row = torch.arange(rollout.length) % 6
    rollout.first[:] = (row == 0)[:, None]
    rollout.terminated[:] = (row == 4)[:, None]


def rewards_of(agent, data, rollout, monkeypatch):
    """What GAIL's update hands to PPO's."""
    seen = {}
    monkeypatch.setattr(
        s2pg_gail.S2PGPPO, "update", lambda self, r: seen.update(reward=r.reward.clone()) or {}
    )
    metrics = agent.update(rollout, data)
    return seen["reward"][: rollout.length - 1], metrics


@pytest.mark.parametrize("reward", ["gail", "airl"])
@pytest.mark.parametrize("absorbing", [True, False])
def test_rewards_are_those_of_the_discriminator(reward, absorbing, monkeypatch):
    agent, data, rollout = gail(reward=reward, absorbing=absorbing)
    given, metrics = rewards_of(agent, data, rollout, monkeypatch)
    valid = ~rollout.first[1:]
    with torch.no_grad():
        state, action = rollout.critic_obs[:-1], rollout.action[:-1].clamp(-1, 1)
        rows = torch.cat([state, action, torch.zeros(*action.shape[:2], 1)], -1)
        expected = imitation_reward(agent.discriminator(rows), reward)
        in_absorbing = torch.tensor([0.0, 0, 0, 0, 1])
        forever = imitation_reward(agent.discriminator(in_absorbing), reward)
    assert ("losses/absorbing_reward" in metrics) == absorbing  # untrained, it would mean nothing
    if absorbing:
        torch.testing.assert_close(metrics["losses/absorbing_reward"], forever)
        # sum of gamma^k r_abs from the next step on
        discounted = sum(0.99**k for k in range(1, 5000)) * forever
        expected = expected + rollout.terminated[:-1] * discounted
    torch.testing.assert_close(given[valid], expected[valid], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sees", ["critic", "policy"])
def test_the_discriminator_sees_what_it_should_and_never_the_memory(sees, monkeypatch):
    hidden = dict(critic="obs", policy="critic_obs")[sees]
    results = []
    for change in (None, "z", "a_prev", hidden):
        agent, data, rollout = gail(discriminator_sees=sees)
        if change is not None:
            getattr(rollout, change).add_(1.0)
        if change == hidden:
            getattr(data, change).add_(1.0)
        given, _ = rewards_of(agent, data, rollout, monkeypatch)
        results.append((given, agent.discriminator.state_dict()))
    first, *others = results
    for given, state in others:
        assert torch.equal(given, first[0])
        assert all(torch.equal(state[k], first[1][k]) for k in state)
    agent, data, rollout = gail(discriminator_sees=sees)
    getattr(rollout, dict(critic="critic_obs", policy="obs")[sees]).add_(1.0)
    assert not torch.equal(rewards_of(agent, data, rollout, monkeypatch)[0], first[0])


def test_the_discriminator_learns_to_tell_expert_from_policy():
    agent, data, rollout = gail(
        discriminator_frequency=1, discriminator_steps=50, discriminator_lr=1e-3
    )
    data.critic_obs += 3
    metrics = agent.update(rollout, data)
    assert metrics["losses/accuracy_policy"] > 0.9 and metrics["losses/accuracy_expert"] > 0.9
    assert metrics["losses/imitation_reward"] < 0.2  # the policy is found out
    # only the policy ends its episodes in an absorbing state oftener than the expert
    assert metrics["losses/absorbing_reward"] < math.log(2)


def test_cloning_begins_with_the_statistics_of_what_the_expert_saw():
    agent, data, _ = gail(bc_steps=1)
    agent.clone(data, [])
    seen = np.concatenate(
        [one["observations"][:-1] for one in (episode(10, seed=1), episode(7, seed=2))]
    )
    np.testing.assert_allclose(agent.actor.normalizer.mean, seen.mean(0), rtol=1e-4)
    np.testing.assert_allclose(agent.actor.normalizer.var, seen.var(0), rtol=1e-4)


def test_the_discriminator_is_shown_the_rows_of_the_expert():
    agent, data, _ = gail()
    rows = agent.expert_rows(data)
    expected = [[], []]
    for e, one in enumerate((episode(10, seed=1), episode(7, seed=2))):
        for s, a in zip(one["critic_observations"], one["actions"]):
            expected[e].append([*s, *a, 0])
    torch.testing.assert_close(  # time by time, and the one that terminated at the end
        rows.sort(0).values,
        torch.tensor([*expected[0], *expected[1], [0, 0, 0, 0, 1]]).sort(0).values,
    )
    agent, data, _ = gail(absorbing=False)
    assert len(agent.expert_rows(data)) == 17


def test_states_are_normalised_by_expert_and_policy_alike():
    agent, data, rollout = gail(discriminator_steps=2)
    data.critic_obs += 8
    agent.update(rollout, data)
    normalizer = agent.discriminator.normalizer
    transitions = (~rollout.first[1:]).sum()
    assert normalizer.count == 2 * transitions
    assert (normalizer.mean - 4).abs().max() < 1.5


def test_what_is_unrolled_are_the_actions_of_the_noise_free_policy():
    o, z, a_prev = torch.randn(5, 2), torch.zeros(5, 4), torch.zeros(5, 1)
    agent, *_ = gail()
    a, _ = agent.unroll(o, z, a_prev)
    torch.testing.assert_close(a.clamp(-1, 1), agent.actor.act(o, z, a_prev, True)[0])


def test_the_memory_that_is_unrolled_has_the_noise_of_the_policy():
    torch.manual_seed(0)
    agent = s2pg_gail.Agent(s2pg_gail.Args(std=0.7, std_z=0.2), 2, 3, 1, True, CPU)
    o, z, a_prev = (torch.randn(1, d).expand(5000, -1) for d in (2, 32, 1))
    a, z_next = agent.unroll(o, z, a_prev)
    assert a.std(0).max() < 1e-6
    torch.testing.assert_close(z_next.std(0), torch.full((32,), 0.2), rtol=0.1, atol=0.0)


def test_the_discriminator_learns_every_so_many_rollouts():
    agent, data, rollout = gail(discriminator_frequency=3)
    changed = []
    for _ in range(7):
        before = [p.clone() for p in agent.discriminator.parameters()]
        fill(rollout)
        agent.update(rollout, data)
        after = agent.discriminator.parameters()
        changed.append(any(not torch.equal(a, b) for a, b in zip(before, after)))
    assert changed == [True, False, False, True, False, False, True]


# What the task pays ------------------------------------------------------------------------------


@SHARED
def test_the_reward_of_the_task_never_reaches_the_learner(script, tmp_path, monkeypatch):
    """Another reward, and nothing but what is logged of it is another."""
    make, states, returns = envs.make, [], []
    for name, scale in (("as it is", 1.0), ("another", -50.0)):

        def other(*args, scale=scale, **kwargs):
            return gym.wrappers.TransformReward(make(*args, **kwargs), lambda r: scale * r)

        monkeypatch.setattr(envs, "make", other)
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        options = dict(num_steps=100)
        script.train(
            script.Args(
                total_timesteps=250, eval_episodes=1, hide="velocities", bc_steps=2, **options
            )
        )
        (run_dir,) = (tmp_path / name / "runs").iterdir()
        state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
        states.append(state)
        events = s2pg_events(run_dir)
        returns.append(events.Scalars("charts/episodic_return")[0].value)
        assert "eval/return_stochastic" in events.Tags()["scalars"]
    assert returns[1] == -50 * returns[0]
    assert flat(states[0]).keys() == flat(states[1]).keys() and len(flat(states[0])) > 30
    for key, value in flat(states[0]).items():
        assert torch.equal(value, flat(states[1])[key]), key


def s2pg_events(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir))
    events.Reload()
    return events


def flat(state):
    if torch.is_tensor(state):
        return {"": state}
    items = state.items() if isinstance(state, dict) else enumerate(state)
    nested = {k: v for k, v in items if isinstance(v, dict | list | tuple) or torch.is_tensor(v)}
    return {f"{k}/{path}": t for k, v in nested.items() for path, t in flat(v).items()}
