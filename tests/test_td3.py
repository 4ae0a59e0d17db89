"""S2PG-TD3: its losses, what one update does, what is delayed, and which noise goes where.

Whatever is one text with s2pg_sac.py is tested there; what its actor depends on and what it keeps,
in tests/test_parts.py.
"""

import copy
import functools
import inspect
import math

import pytest
import test_parts
import torch
from test_parts import ACTION, BOTH, BOX, CRITIC, EQUAL, OBS, STATE, every_cell, inputs

import s2pg_sac
import s2pg_td3

make_actor = functools.partial(test_parts.make_actor, s2pg_td3)
make_agent = functools.partial(test_parts.make_agent, s2pg_td3, batch_size=40)


def test_the_critic_loss_and_its_gradient_are_those_of_the_rows_with_weight():
    """Row by row: nothing is broadcast to B x B, what has no weight does not count.

    The target is the smaller of two values of what the target actor does next, where the action
    just taken is the a_prev, for actor and critic alike; nothing follows a termination.
    """
    agent, buffer = make_agent()
    other, _ = make_agent(exploration_noise_z=0)
    actor, critic, target, batch = other.actor, agent.critic, other.critic, buffer.sample(40)
    loss, q = s2pg_td3.td3_critic_loss(actor, critic, target, batch, 0, 0.5, 0.9)
    assert not q.requires_grad
    assert torch.equal(q, critic(batch.state, batch.action, batch.next_z, batch.a_prev))

    td_errors, cases = [], set()
    for k in batch.weight.nonzero():
        row = type(batch)(*(column[k] for column in batch))
        with torch.no_grad():
            a, z = actor(row.next_obs, row.next_z, row.action)
            next_q = target(row.next_state, a, z, row.action)
            y = row.reward if row.terminated else row.reward + 0.9 * next_q.min()
        cases.add("end" if row.terminated else next_q.argmin().item())
        td_errors.append(critic(row.state, row.action, row.next_z, row.a_prev) - y)
    assert cases == {0, 1, "end"} and len(td_errors) < 40
    expected = sum(td_error.square().sum() for td_error in td_errors) / len(td_errors)
    torch.testing.assert_close(loss, expected)
    parts = [*critic.parameters(), *target.parameters(), *actor.parameters()]
    ours, theirs = (torch.autograd.grad(x, parts, allow_unused=True) for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def smoothed(policy_noise, noise_clip, noise_z, n=20_000):
    """Action and internal state of the target [n, .], each without and with its noise."""
    agent, buffer = make_agent(exploration_noise_z=noise_z)
    batch, given = buffer.sample(1), []
    batch = type(batch)(*(column.expand(n, *column.shape[1:]) for column in batch))
    target = lambda *x: given.extend(x[1:3]) or agent.critic(*x)  # noqa: E731
    networks = agent.actor, agent.critic, target
    s2pg_td3.td3_critic_loss(*networks, batch, policy_noise, noise_clip, 0.9)
    with torch.no_grad():
        return zip(agent.actor(batch.next_obs, batch.next_z, batch.action), given)


def test_the_target_is_smoothed_by_clipped_noise_on_action_and_internal_state():
    """Independent for every number, and of the internal state half as much as the behaviour's.

    Both are cut at 2.5 of their standard deviations, where .0124 of a normal lies. Within +-2.5, a
    standard normal that is clipped there has standard deviation .9871.
    """
    noises = []
    for (mean, x), std in zip(smoothed(0.2, 0.5, noise_z=0.1), (0.2, 0.05)):
        assert mean.abs().max() + 2.5 * std < 1  # so that the interval cuts nothing
        noise = (x - mean) / std
        assert math.isclose(noise.abs().max(), 2.5, rel_tol=1e-4)
        # 60 000 draws or more: errors of .0005, .003 and .004
        assert abs((noise.abs() > 2.499).float().mean() - 0.0124) < 0.0025
        assert abs(noise.std() - 0.9871) < 0.015 and abs(noise.mean()) < 0.02
        noises.append(noise)
    correlation = torch.corrcoef(torch.cat(noises, -1).T) - torch.eye(ACTION + STATE)
    assert correlation.abs().max() < 5 / math.sqrt(20_000)
    # and action and internal state stay in their intervals
    for mean, x in smoothed(2.0, 4.0, noise_z=4):
        assert mean.abs().max() < 1 and x.min() == -1 and x.max() == 1
        assert all(0.15 < (x == end).float().mean() < 0.6 for end in (-1, 1))


@every_cell
def test_the_gradient_of_the_actor_is_that_of_q_along_action_and_internal_state(rnn):
    """E[grad mu_a grad_a Q_1 + grad mu_z grad_z' Q_1], from its pieces; and nothing of Q_2."""
    agent, buffer = make_agent(rnn=rnn)
    batch, parameters = buffer.sample(40), list(agent.actor.parameters())
    loss, mean_z = s2pg_td3.td3_actor_loss(agent.actor, agent.critic, batch)
    mu = agent.actor(batch.obs, batch.z, batch.a_prev)
    given = [x.detach().requires_grad_() for x in mu]
    expected = -agent.critic(batch.state, *given, batch.a_prev)[0, batch.weight > 0].mean()
    torch.testing.assert_close(loss, expected)
    assert torch.equal(mean_z, mu[1]) and not mean_z.requires_grad

    along = torch.autograd.grad(expected, given)
    ours = torch.autograd.grad(loss, parameters)
    theirs = torch.autograd.grad(mu, parameters, along)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    assert all(x.any() for x in (*along, *ours))


def snapshot(module):
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("noise_z", [0.01, 0.8])
def test_an_update_is_the_step_of_the_critic_and_then_of_the_actor_against_the_new_one(noise_z):
    """Then targets follow, and the batch's z are rewritten with the noise of the behaviour."""
    options = dict(policy_frequency=1, tau=0.1, actor_lr=0.01, critic_lr=0.02)
    options |= dict(policy_noise=0.3, noise_clip=0.4, gamma=0.8, exploration_noise_z=noise_z)
    agent, buffer = make_agent(**options)
    online = [*agent.actor.parameters(), *agent.critic.parameters()]
    targets = [*agent.target_actor.parameters(), *agent.target_critic.parameters()]
    assert all(map(torch.equal, online, targets))
    agent.update(buffer)

    old, refreshed, old_targets = copy.deepcopy((agent, buffer, targets))
    torch.manual_seed(1)
    batch = refreshed.sample(40)
    networks = old.target_actor, old.critic, old.target_critic
    qf_loss, q = s2pg_td3.td3_critic_loss(*networks, batch, 0.3, 0.4, 0.8)
    after_the_losses = torch.get_rng_state()
    torch.manual_seed(1)
    metrics = agent.update(buffer)
    actor_loss, mean_z = s2pg_td3.td3_actor_loss(old.actor, agent.critic, batch)
    expected = dict(qf_values=q[:, batch.weight > 0].mean(), qf_loss=qf_loss, actor_loss=actor_loss)
    expected = {f"losses/{name}": value.detach() for name, value in expected.items()}
    torch.testing.assert_close(metrics, expected)

    torch.set_rng_state(after_the_losses)
    z = mean_z + noise_z * torch.randn_like(mean_z)
    assert (z.abs() > 1).any() == (noise_z == 0.8)
    refreshed.refresh(batch, z.clamp(-1, 1))
    torch.testing.assert_close(buffer.rows, refreshed.rows)
    # theta' <- theta' + tau (theta - theta'), with the new theta, of actor and critic alike
    for theta, before, after in zip(online, old_targets, targets):
        expected = before + 0.1 * (theta.detach() - before)
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-8)
    # under autograd, all updates of the run would hang together in memory
    assert not any(x.requires_grad for x in (*targets, buffer.rows, *metrics.values()))


@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_all_but_the_critic_change_in_every_nth_update_only(frequency, tmp_path):
    """Whose count goes on after a checkpoint; the log shows the last loss of the actor."""
    agent, buffer = make_agent(policy_frequency=frequency)
    loss = None
    for k in range(1, 9):
        if k == 5:
            s2pg_td3.save_checkpoint(tmp_path, agent, buffer, global_step=4, seconds=0.0)
            agent, _ = make_agent(policy_frequency=frequency)
            s2pg_td3.load_checkpoint(tmp_path, agent, buffer)
            loss = None
        before, rows = snapshot(agent), buffer.rows.clone()
        last_loss, loss = loss, agent.update(buffer).get("losses/actor_loss")
        for (name, new), old in zip(agent.named_parameters(), before):
            assert (old != new).any() == (name.startswith("critic.") or k % frequency == 0)
        assert torch.equal(rows, buffer.rows) == (k % frequency > 0)
        assert (loss == last_loss) == (k % frequency > 0)


@pytest.mark.parametrize("options", [dict(rnn="gru"), dict(rnn="lstm"), dict(memoryless=True)])
@pytest.mark.parametrize(
    "space, says, width",
    [
        (EQUAL, dict(critic_sees_more=True), OBS), (BOTH, dict(critic_sees_more=False), 0),
        (BOTH, {}, CRITIC), (EQUAL, {}, 0), (BOX, {}, 0),
    ],
)  # fmt: skip
def test_every_kind_of_memory_updates(options, space, says, width):
    """The critic sees z, too, where it is told no more than the policy."""
    agent, buffer = make_agent(space=space, says=says, policy_frequency=1, **options)
    z_dim = 0 if "memoryless" in options else 2 * STATE if options["rnn"] == "lstm" else STATE
    assert agent.z_dim == agent.actor.z_dim == z_dim
    assert agent.row_sizes == (OBS, width, z_dim, ACTION)
    assert agent.critic.layers[0].shape[1] == (width or OBS + z_dim) + ACTION + z_dim + ACTION
    names = [name for name, _ in agent.actor.named_parameters()]
    assert (z_dim == 0) == all(name.startswith("policy_") for name in names)
    before = snapshot(agent)
    assert all(value.isfinite() for value in agent.update(buffer).values())
    assert all((a != b).any() for a, b in zip(before, snapshot(agent)))


@every_cell
def test_acting_is_the_policy_and_in_training_the_noise_that_was_asked_for_on_each(rnn):
    """Independent for every number; the policy reads z' before its noise, and ends with a tanh.

    Of 20 000 draws, so that a standard deviation is within 2.5 %.
    """
    actor, n = make_actor(rnn=rnn, exploration_noise=0.001, exploration_noise_z=0.02), 20_000
    x, before = [(v / 4).expand(n, -1) for v in inputs(actor, 1)], torch.get_rng_state()
    noise_free = actor.act(*x, deterministic=True)
    assert all(map(torch.equal, noise_free, actor(*x))) and not noise_free[0].requires_grad
    assert torch.equal(torch.get_rng_state(), before)
    acted, means = (torch.cat(y, -1) for y in (actor.act(*x), noise_free))
    assert means.abs().max() < 0.9  # so that nothing is clipped
    noise = acted - means
    std = torch.tensor([0.001] * ACTION + [0.02] * actor.z_dim)
    assert ((noise.std(0) / std - 1).abs() < 0.025).all()
    assert (noise.mean(0).abs() < 5 * std / math.sqrt(n)).all()
    assert (torch.corrcoef(noise.T) - torch.eye(len(std))).abs().max() < 5 / math.sqrt(n)
    with torch.no_grad():
        actor.policy_head.weight.zero_()
        actor.policy_head.bias.fill_(0.5)
    torch.testing.assert_close(actor(*x)[0], torch.full((n, ACTION), math.tanh(0.5)))


@every_cell
def test_acting_stays_in_the_intervals_and_gradients_at_their_ends_are_finite(rnn):
    """Clipped noise leaves z at exactly 1 or -1, where an LSTM has to invert the tanh of c."""
    actor = make_actor(rnn=rnn, exploration_noise=0.5, exploration_noise_z=0.5)
    z, a = torch.zeros(64, actor.z_dim), torch.zeros(64, ACTION)
    for _ in range(20):
        a, z = actor.act(100 * torch.randn(64, OBS), z, a)
        assert all(x.isfinite().all() and x.max() == 1 and x.min() == -1 for x in (a, z))
    a, z_next = actor(torch.randn(64, OBS), z.requires_grad_(), a)
    grads = torch.autograd.grad(a.sum() + z_next.sum(), [z, *actor.parameters()])
    assert all(g.isfinite().all() for g in grads)


def test_it_trains_as_s2pg_sac_does():
    """So that tests/test_scripts.py tells what is acted, stored, logged and saved, and when."""
    assert inspect.getsource(s2pg_td3.train) == inspect.getsource(s2pg_sac.train)
