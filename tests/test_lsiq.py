"""S2PG-LSIQ: its critic against the paper's formulas, and the buffer of the expert."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import envs
import s2pg_lsiq

CPU = torch.device("cpu")
ENV = SimpleNamespace(
    single_observation_space=Dict(policy=Box(-1, 1, (2,)), critic=Box(-1, 1, (3,))),
    single_action_space=Box(-1, 1, (1,)),
    critic_sees_more=True,
)


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


def lsiq_batch(n=6, obs_dim=2, critic_dim=3, z_dim=4, seed=0):
    """n transitions of the policy, then n of the expert; one of each is terminated."""
    torch.manual_seed(seed)
    terminated = torch.zeros(2 * n)
    terminated[[0, n]] = 1
    rows = [torch.randn(2 * n, d) for d in (obs_dim, critic_dim, z_dim, 1, 1)]
    return s2pg_lsiq.Transitions(
        *rows[:2], torch.tanh(rows[2]), *map(torch.tanh, rows[3:]), torch.full((2 * n,), torch.nan),
        terminated, torch.randn(2 * n, obs_dim), torch.randn(2 * n, critic_dim),
        torch.tanh(torch.randn(2 * n, z_dim)), torch.arange(2 * n), torch.full((2 * n,), 0.5 / n),
    )  # fmt: skip


def lsiq(**options):
    return s2pg_lsiq.Agent(s2pg_lsiq.Args(state_dim=4, **options), ENV, CPU)


@pytest.mark.parametrize("loss", ["sqil_like", "iq_like"])
@pytest.mark.parametrize("expert_target", ["fix", "bootstrap"])
@pytest.mark.parametrize("absorbing", [True, False])
@pytest.mark.parametrize("clip_target", [True, False])
@pytest.mark.parametrize("scale", [1.0, 500.0])
def test_the_loss_of_the_critic(loss, expert_target, absorbing, clip_target, scale):
    """Against the paper's formulas, a transition at a time."""
    agent = lsiq(
        loss=loss, expert_target=expert_target, absorbing=absorbing, clip_target=clip_target,
        regularizer=0.25, gamma=0.9,
    )  # fmt: skip
    with torch.no_grad():  # values within their bounds of 4 / (1 - .9) = 40, and beyond
        agent.target_critic.layers[-1].copy_(scale * torch.randn(2, 1, 1).abs())
    batch, alpha = lsiq_batch(), torch.tensor(0.3)
    torch.manual_seed(5)
    value, q = s2pg_lsiq.lsiq_critic_loss(
        agent.actor, agent.critic, agent.target_critic, batch, alpha, agent.args
    )
    torch.manual_seed(5)
    with torch.no_grad():
        a, z, log_pi, _ = agent.actor.sample(batch.next_obs, batch.next_z, batch.action)
        next_q = agent.target_critic(batch.next_state, a, z, batch.action).min(0).values
    total = 0.0
    for own in q:
        parts = dict(policy=[], expert=[], squares=[])
        for i in range(12):
            who, d = ("policy", "expert")[i >= 6], batch.terminated[i].item()
            v = (next_q[i] - 0.3 * log_pi[i]).item()
            if clip_target:
                v = min(max(v, -40.0), 40.0)
            y = 0.0 if d else 0.9 * v
            r = -4.0 if who == "policy" else 4.0
            if d and absorbing:
                r = r / (1 - 0.9)
            value_i = own[i].item()
            if loss == "iq_like":
                parts[who].append(value_i - y)
                weight = 1 - 0.9 if d and absorbing else 1.0
                parts["squares"].append(weight * (value_i - y) ** 2)
            elif who == "expert" and expert_target == "fix":
                parts[who].append((value_i - 40.0) ** 2)
            else:
                parts[who].append((value_i - (r + y)) ** 2)
        mean = {k: np.mean(v) if v else 0.0 for k, v in parts.items()}
        if loss == "iq_like":
            total += mean["policy"] - mean["expert"] + 0.25 * mean["squares"]
        else:
            total += mean["policy"] + mean["expert"]
    assert value.item() == pytest.approx(total, rel=1e-4)


def fixed_point(loss, expert_target, steps=500):
    """Q of two states: the expert's, in which it stays; and the policy's, in which it ends."""
    agent = lsiq(loss=loss, expert_target=expert_target, gamma=0.5, alpha=1e-9)
    batch = lsiq_batch(n=8)
    n = 8
    expert = torch.arange(2 * n) >= n
    state = torch.where(expert[:, None], 1.0, -1.0).expand(-1, 3)
    zeros = {k: torch.zeros_like(getattr(batch, k)) for k in ("obs", "z", "a_prev", "next_obs")}
    batch = batch._replace(
        state=state, next_state=state, terminated=1 - expert.float(), **zeros,
        next_z=torch.zeros_like(batch.next_z), action=torch.zeros_like(batch.action),
    )  # fmt: skip
    optimizer = torch.optim.Adam(agent.critic.parameters(), lr=3e-3)
    for _ in range(steps):
        value, q = s2pg_lsiq.lsiq_critic_loss(
            agent.actor, agent.critic, agent.target_critic, batch, torch.tensor(0.0), agent.args
        )
        s2pg_lsiq.descend(optimizer, value)
        with torch.no_grad():
            torch._foreach_lerp_(
                list(agent.target_critic.parameters()), list(agent.critic.parameters()), 0.05
            )
    q_policy, q_expert = q.chunk(2, -1)
    return q_policy.mean().item(), q_expert.mean().item()


@pytest.mark.parametrize(
    "loss, expert_target", [("sqil_like", "fix"), ("sqil_like", "bootstrap"), ("iq_like", "fix")]
)
def test_fixed_points(loss, expert_target):
    """+-1/(c (1 - gamma)): +-200 with gamma = .99, here +-4 with .5."""
    q_policy, q_expert = fixed_point(loss, expert_target)
    assert q_policy == pytest.approx(-4, rel=0.03)
    # the critic knows the actions of the expert only, and the actor takes others in its states
    assert q_expert == pytest.approx(4, rel=0.1)


def test_rows_without_weight_do_not_count():
    agent, batch = lsiq(), lsiq_batch()
    weight = torch.tensor([0.0, 0.25, 0.25, 0, 0, 0] * 2)
    value = []
    for changed in (batch, batch._replace(state=batch.state * (weight > 0).unsqueeze(-1))):
        torch.manual_seed(5)
        loss, _ = s2pg_lsiq.lsiq_critic_loss(
            agent.actor, agent.critic, agent.target_critic, changed._replace(weight=weight),
            torch.tensor(0.3), agent.args,
        )  # fmt: skip
        value.append(loss)
    assert torch.equal(*value)


def test_the_expert_buffer_holds_the_demonstrations_with_the_internal_states_of_the_policy():
    agent = lsiq()
    episodes = [episode(4, seed=1), episode(2, seed=2, terminated=False)]
    torch.manual_seed(7)
    expert = agent.make_expert_buffer(episodes)
    batch = expert.sample(4000)
    counted = batch.weight > 0
    places = []
    for one in episodes:
        for t in range(len(one["actions"])):
            same = torch.isclose(batch.obs, torch.tensor(one["observations"][t])).all(1)
            index = (same & counted).nonzero().flatten()
            assert len(index) > 300  # of 4000 rows, among them one that is final, a seventh each
            i = index[0]
            places.append(batch.next_z[i])
            np.testing.assert_allclose(batch.state[i], one["critic_observations"][t])
            np.testing.assert_allclose(batch.next_obs[i], one["observations"][t + 1])
            np.testing.assert_allclose(batch.action[i], one["actions"][t])
            np.testing.assert_allclose(batch.a_prev[i], one["actions"][t - 1] if t else [0.0])
            assert batch.terminated[i] == one["terminations"][t]
    assert not batch.reward.any() and 0.8 < counted.float().mean() < 0.9  # 6 of 7

    # z along the demonstrations is a sample of the policy's kernel, from zeros on
    torch.manual_seed(7)
    for one in episodes:
        z = torch.zeros(1, 4)
        for t in range(len(one["actions"])):
            obs, a_prev = one["observations"][t], one["actions"][t - 1] if t else np.zeros(1)
            inputs = torch.tensor(obs)[None], z, torch.tensor(a_prev, dtype=torch.float32)[None]
            _, z = agent.actor.act(*inputs)
            assert torch.equal(places.pop(0), z[0])
        agent.actor.act(torch.tensor(one["observations"][-1])[None], z, torch.zeros(1, 1))


def two_worlds(**options):
    """An agent, a buffer whose states are all -1 and demonstrations in which they are all 1."""
    torch.manual_seed(0)
    agent = lsiq(batch_size=64, **options)
    one = episode(30, seed=1, terminated=False)
    one["critic_observations"][:], one["observations"][:] = 1, 1
    expert = agent.make_expert_buffer([one])
    buffer = s2pg_lsiq.TransitionBuffer(100, 1, *agent.row_sizes, CPU)
    for t in range(30):
        row = [-torch.ones(1, 2), -torch.ones(1, 3), torch.tanh(torch.randn(1, agent.z_dim))]
        buffer.add(*row, torch.zeros(1, 1), np.zeros(1), np.zeros(1), np.array([t == 0]))
    return agent, buffer, expert


@pytest.mark.parametrize("loss", ["sqil_like", "iq_like"])
def test_the_critic_prefers_the_world_of_the_expert(loss):
    agent, buffer, expert = two_worlds(loss=loss, critic_lr=3e-3)
    for _ in range(100):
        metrics = agent.update(buffer, expert)
    assert metrics["losses/q_expert"] > metrics["losses/q_policy"] + 3
    with torch.no_grad():
        worlds = torch.tensor([[1.0], [-1.0]]).expand(-1, 3)
        zeros = [torch.zeros(2, d) for d in (1, 4, 1)]
        q = agent.critic(worlds, *zeros).mean(0)
    assert q[0] > q[1] + 3


def test_the_internal_states_of_both_are_refreshed_with_the_sample_of_the_actor_loss(monkeypatch):
    agent, buffer, expert = two_worlds()
    samples, loss = [], agent.actor_loss

    def spy(actor, critic, batch, *rest):
        result = loss(actor, critic, batch, *rest)
        samples.append((batch, result[1]))
        return result

    monkeypatch.setattr(agent, "actor_loss", spy)
    before = [part.z.clone() for part in (buffer, expert)]
    agent.update(buffer, expert)
    ((batch, z),) = samples
    assert (batch.state[:64] == -1).all() and (batch.state[64:] == 1).all()
    torch.testing.assert_close(batch.weight.sum(), torch.tensor(1.0))
    for part, old, half in zip((buffer, expert), before, (slice(0, 64), slice(64, 128))):
        rows = batch.after[half][batch.weight[half] > 0]
        for row in rows.tolist():
            drawn = z[half][batch.after[half] == row]  # of several samples, one
            assert (part.z[row] == drawn).all(1).any()
        untouched = sorted(set(range(len(old))) - set(rows.tolist()))
        assert torch.equal(part.z[untouched], old[untouched])


def test_the_critic_judges_state_action_and_next_internal_state_and_sees_no_a_prev():
    batch = lsiq_batch()
    given = batch.state, batch.action, batch.next_z, batch.a_prev
    critic = lsiq().critic
    q = critic(*given)
    for i in range(4):
        changed = [-x if k == i else x for k, x in enumerate(given)]
        other = critic(*changed)
        assert torch.equal(q, other) if i == 3 else (q != other).all()


@pytest.mark.parametrize("options", [dict(refresh=False), dict(memoryless=True)])
def test_without_a_refresh_or_a_memory_both_buffers_stay_as_they_are(options):
    agent, buffer, expert = two_worlds(**options)
    before = [part.rows.clone() for part in (buffer, expert)]
    agent.update(buffer, expert)
    assert all(torch.equal(part.rows, old) for part, old in zip((buffer, expert), before))


@pytest.mark.parametrize("target", [-3.0, 0.5])
def test_temperatures_follow_the_entropies_of_action_and_internal_state(target):
    """On rows of both; the target is -1 for the one action, `target` for each component of z."""
    agent, buffer, expert = two_worlds(target_entropy_z=target, alpha_lr=0.1, alpha_z_lr=0.2)
    metrics = agent.update(buffer, expert)
    alpha, alpha_z, entropy, entropy_z = (
        metrics[f"losses/{name}"] for name in ("alpha", "alpha_z", "entropy", "entropy_z")
    )
    torch.testing.assert_close(agent.log_alpha.grad, alpha * (entropy + 1))
    torch.testing.assert_close(agent.log_alpha_z.grad, alpha_z * (entropy_z - 4 * target))
    # the first step of Adam is as long as its learning rate
    for new, old, rate in ((agent.log_alpha, alpha, 0.1), (agent.log_alpha_z, alpha_z, 0.2)):
        torch.testing.assert_close(new - old.log(), -rate * new.grad.sign(), rtol=1e-3, atol=0)


def test_the_target_follows_the_critic_and_is_what_it_bootstraps_from(monkeypatch):
    agent, buffer, expert = two_worlds(tau=0.1, critic_lr=0.01)
    before, given = [p.clone() for p in agent.target_critic.parameters()], []
    loss = agent.critic_loss
    monkeypatch.setattr(agent, "critic_loss", lambda *args: given.extend(args) or loss(*args))
    agent.update(buffer, expert)
    expected = agent.actor, agent.critic, agent.target_critic
    assert all(one is other for one, other in zip(given, expected))
    online = agent.critic.parameters()
    for old, new, theta in zip(before, agent.target_critic.parameters(), online):
        assert not torch.equal(old, theta) and new.is_leaf and not new.requires_grad
        torch.testing.assert_close(new, old + 0.1 * (theta - old))


def test_the_reward_of_the_task_never_reaches_the_learner(tmp_path, monkeypatch):
    """Another reward, and nothing but what is logged of it is another."""
    make, states, returns = envs.make, [], []
    for name, scale in (("as it is", 1.0), ("another", -50.0)):

        def other(*args, scale=scale, **kwargs):
            return gym.wrappers.TransformReward(make(*args, **kwargs), lambda r: scale * r)

        monkeypatch.setattr(envs, "make", other)
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        options = dict(learning_starts=50, eval_episodes=1, hide="velocities", batch_size=16)
        options |= dict(demonstration_episodes=1, total_timesteps=100)
        s2pg_lsiq.train(s2pg_lsiq.Args(**options))
        (run_dir,) = (tmp_path / name / "runs").iterdir()
        states.append(torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"])
        events = EventAccumulator(str(run_dir)).Reload()
        returns.append(events.Scalars("charts/episodic_return")[0].value)
        assert "eval/return_stochastic" in events.Tags()["scalars"]
    assert returns[1] == -50 * returns[0]
    assert len(states[0]) > 20
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
