"""S2PG-LSIQ: its critic against the paper's formulas, and the buffer of the expert."""

import functools
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import test_gail
import torch
from gymnasium.spaces import Box, Dict

import s2pg_lsiq
from envs import demonstrations

CPU = torch.device("cpu")
episode = functools.partial(test_gail.episode, sizes=(2, 3, 2))
ENV = SimpleNamespace(
    single_observation_space=Dict(policy=Box(-1, 1, (2,)), critic=Box(-1, 1, (3,))),
    single_action_space=Box(-1, 1, (2,)),
    critic_sees_more=True,
)


def lsiq_batch(n=6):
    """n transitions of the policy, then n of the expert; one of each is terminated, one no step."""
    torch.manual_seed(0)
    obs, next_obs, state, next_state = (torch.randn(2 * n, size) for size in (2, 2, 3, 3))
    z, next_z, a_prev, action = (torch.randn(2 * n, size).tanh() for size in (4, 4, 2, 2))
    place, unknown = torch.arange(n).repeat(2), torch.full((2 * n,), torch.nan)
    weight = 0.5 * (place != 1) / (n - 1)
    return s2pg_lsiq.Transitions(
        obs, state, z, a_prev, action, unknown, (place == 0).float(), next_obs, next_state, next_z,
        torch.arange(2 * n), weight,
    )  # fmt: skip


def lsiq(**options):
    return s2pg_lsiq.Agent(s2pg_lsiq.Args(state_dim=4, **options), ENV, CPU)


@pytest.mark.parametrize("loss", ["sqil_like", "iq_like"])
@pytest.mark.parametrize("expert_target", ["fix", "bootstrap"])
@pytest.mark.parametrize("absorbing", [True, False])
@pytest.mark.parametrize("scale", [1.0, 500.0, -500.0])
def test_the_loss_of_the_critic(loss, expert_target, absorbing, scale):
    """Against the paper's formulas, a transition at a time."""
    options = dict(loss=loss, expert_target=expert_target, absorbing=absorbing)
    agent = lsiq(**options, regularizer=0.25, gamma=0.9)
    with torch.no_grad():  # values within their bounds of 4 / (1 - .9) = 40, and beyond
        agent.target_critic.layers[-1].copy_(scale * (1 + torch.rand(2, 1, 1)))
    batch, alpha = lsiq_batch(), torch.tensor(0.3)
    torch.manual_seed(5)
    value, q = s2pg_lsiq.lsiq_critic_loss(
        agent.actor, agent.critic, agent.target_critic, batch, alpha, agent.args
    )
    torch.manual_seed(5)
    with torch.no_grad():
        a, z, log_pi, _ = agent.actor.sample(batch.next_obs, batch.next_z, batch.action)
        next_q = agent.target_critic(batch.next_state, a, z, batch.action).min(0).values
    assert not q.requires_grad
    total, r_max, ended = 0.0, 4.0, (1 - 0.9 if absorbing else 1.0)
    for own, i in itertools.product(q, batch.weight.nonzero().flatten().tolist()):
        who, d = (-1, 1)[i >= 6], batch.terminated[i].item()  # policy or expert
        v = min(max((next_q[i] - 0.3 * log_pi[i]).item(), -40.0), 40.0)
        y = 0.0 if d else 0.9 * v
        r, error = own[i].item() - y, 0.0
        if loss == "iq_like":
            error = -who * r + 0.25 * (ended if d else 1) * r**2 / 2
        elif who == 1 and expert_target == "fix":
            error = (own[i].item() - 40.0) ** 2
        else:
            error = (r - who * r_max / (ended if d else 1)) ** 2
        total += error / 5
    assert value.item() == pytest.approx(total, rel=1e-4)


def test_the_expert_buffer_holds_the_demonstrations_with_the_internal_states_of_the_policy():
    agent = lsiq()
    episodes = [episode(4, seed=1), episode(2, seed=2, terminated=False)]
    torch.manual_seed(7)
    expert = agent.make_expert_buffer(list(demonstrations.rows(episodes)))
    batch = expert.sample(4000)
    counted = batch.weight > 0
    places = []
    for one in episodes:
        for t in range(len(one["actions"])):
            same = torch.isclose(batch.obs, torch.tensor(one["observations"][t])).all(1)
            index = (same & counted).nonzero().flatten()
            assert len(index) > 300  # of 4000 rows, among them one that is final, a seventh each
            i = index[0]
            places.append(batch.next_z[i].detach())
            np.testing.assert_allclose(batch.state[i], one["critic_observations"][t])
            np.testing.assert_allclose(batch.next_obs[i].detach(), one["observations"][t + 1])
            np.testing.assert_allclose(batch.action[i], one["actions"][t])
            np.testing.assert_allclose(batch.a_prev[i], one["actions"][t - 1] if t else [0.0, 0.0])
            assert batch.terminated[i] == one["terminations"][t]
    assert not batch.reward.any() and 0.8 < counted.float().mean() < 0.9  # 6 of 7

    # z along the demonstrations is a sample of the policy's kernel, from zeros on
    torch.manual_seed(7)
    for one in episodes:
        z = torch.zeros(1, 4)
        for t in range(len(one["actions"])):
            obs, a_prev = one["observations"][t], one["actions"][t - 1] if t else np.zeros(2)
            inputs = torch.tensor(obs)[None], z, torch.tensor(a_prev, dtype=torch.float32)[None]
            _, z = agent.actor.act(*inputs)
            assert torch.equal(places.pop(0), z[0])
        agent.actor.act(torch.tensor(one["observations"][-1])[None], z, torch.zeros(1, 2))


def two_worlds(**options):
    """An agent, a buffer whose states are all -1 and demonstrations in which they are all 1."""
    agent = lsiq(batch_size=64, **options)
    one = episode(30, seed=1, terminated=False)
    one["critic_observations"][:], one["observations"][:] = 1, 1
    expert = agent.make_expert_buffer(list(demonstrations.rows([one])))
    buffer = s2pg_lsiq.TransitionBuffer(100, 1, *agent.row_sizes, CPU)
    for t in range(30):
        row = [-torch.ones(1, 2), -torch.ones(1, 3), torch.tanh(torch.randn(1, agent.z_dim))]
        buffer.add(*row, torch.zeros(1, 2), np.zeros(1), np.zeros(1), np.array([t == 0]))
    return agent, buffer, expert


@pytest.mark.parametrize(
    "loss, target", [("sqil_like", "fix"), ("sqil_like", "bootstrap"), ("iq_like", "fix")]
)
def test_each_world_has_its_fixed_point(loss, target):
    """Who stays in one of them for ever has Q = +-1/(c (1 - gamma)), here +-4."""
    options = dict(loss=loss, expert_target=target, gamma=0.5, tau=0.05, critic_lr=3e-3)
    agent, buffer, expert = two_worlds(**options, alpha=1e-9, alpha_lr=0, actor_lr=0)
    for _ in range(120):
        metrics = agent.update(buffer, expert)
    assert metrics["losses/q_policy"].item() == pytest.approx(-4, rel=0.1)
    assert metrics["losses/q_expert"].item() == pytest.approx(4, rel=0.1)


def test_an_update_of_critic_and_actor_on_rows_of_both(monkeypatch):
    options = dict(target_entropy_z=-3.0, alpha_lr=0.1, alpha_z_lr=0.2, tau=0.1, critic_lr=0.01)
    agent, buffer, expert = two_worlds(**options, alpha_z=0.25)
    assert all(map(torch.equal, agent.critic.parameters(), agent.target_critic.parameters()))
    seen, parts = {}, (buffer, expert)
    for name, loss in (("critic_loss", agent.critic_loss), ("actor_loss", agent.actor_loss)):

        def spy(*args, name=name, loss=loss):
            seen[name] = args, loss(*args)
            return seen[name][1]

        monkeypatch.setattr(agent, name, spy)
    z_before = [part.z.clone() for part in parts]
    targets = [p.clone() for p in agent.target_critic.parameters()]
    metrics = agent.update(buffer, expert)
    (*own, batch, alpha, alpha_z), (_, z, *_) = seen["actor_loss"]
    assert own[0] is agent.actor and own[1] is agent.critic
    assert (alpha, alpha_z) == (1.0, 0.25) and seen["critic_loss"][0][4] == 1.0
    assert (batch.state[:64] == -1).all() and (batch.state[64:] == 1).all()
    torch.testing.assert_close(batch.weight.sum(), torch.tensor(1.0))

    # the internal states of both are refreshed with the sample of the actor loss
    for part, old, half in zip(parts, z_before, (slice(0, 64), slice(64, 128))):
        rows = batch.after[half][batch.weight[half] > 0]
        for row in rows.tolist():
            drawn = z[half][batch.after[half] == row]  # of several samples, one
            assert (part.z[row] == drawn).all(1).any()
        untouched = sorted(set(range(len(old))) - set(rows.tolist()))
        assert torch.equal(part.z[untouched], old[untouched])

    # the target follows the critic, and is what that bootstraps from
    given, expected = seen["critic_loss"][0], (agent.actor, agent.critic, agent.target_critic)
    assert all(one is other for one, other in zip(given, expected))
    for old, new, theta in zip(targets, given[2].parameters(), given[1].parameters()):
        assert not torch.equal(old, theta) and new.is_leaf and not new.requires_grad
        torch.testing.assert_close(new, old + 0.1 * (theta - old))

    # temperatures follow the entropies; the first step of Adam is as long as its learning rate
    for name, target, rate in (("alpha", -2, 0.1), ("alpha_z", -3.0 * 4, 0.2)):
        alpha, log_alpha = metrics[f"losses/{name}"], getattr(agent, f"log_{name}")
        excess = metrics[f"losses/{name.replace('alpha', 'entropy')}"] - target
        torch.testing.assert_close(log_alpha.grad, alpha * excess)
        step = -rate * excess.sign()
        torch.testing.assert_close(log_alpha - alpha.log(), step, rtol=1e-3, atol=0)


def test_the_critic_judges_state_action_and_next_internal_state_and_sees_no_a_prev():
    batch = lsiq_batch()
    given = batch.state, batch.action, batch.next_z, batch.a_prev
    critic = lsiq().critic
    q = critic(*given)
    for i in range(4):
        changed = [-x if k == i else x for k, x in enumerate(given)]
        other = critic(*changed)
        assert torch.equal(q, other) if i == 3 else (q != other).all()


def test_without_a_memory_both_buffers_stay_as_they_are():
    agent, buffer, expert = two_worlds(memoryless=True)
    before = [part.rows.clone() for part in (buffer, expert)]
    agent.update(buffer, expert)
    assert all(torch.equal(part.rows, old) for part, old in zip((buffer, expert), before))
