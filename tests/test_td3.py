"""S2PG-TD3: its target, its deterministic gradient, what is delayed, and which noise goes where."""

import inspect
import math
from types import SimpleNamespace

import gymnasium as gym
import pytest
import torch
from torch import nn

import s2pg_sac
import s2pg_td3

OBS, CRITIC, ACTION, STATE = 5, 7, 3, 8
CPU = torch.device("cpu")
RNN = pytest.mark.parametrize("rnn", ["gru", "lstm", "rnn"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_actor(rnn="gru", noise_a=0.1, noise_z=0.1):
    noise = dict(exploration_noise=noise_a, exploration_noise_z=noise_z)
    args = s2pg_td3.Args(rnn=rnn, state_dim=STATE, **noise)
    return s2pg_td3.DeterministicStatefulActor(OBS, ACTION, args)


def inputs(actor, n):
    """Some obs, z and a_prev, [n, .]."""
    z = 1.8 * torch.rand(n, actor.z_dim) - 0.9
    return torch.randn(n, OBS), z, 2 * torch.rand(n, ACTION) - 1


def make_batch(n=4):
    """The second row terminates, the last is no transition."""
    weight = torch.rand(n)
    weight[-1] = 0
    return s2pg_td3.Transitions(
        obs=torch.randn(n, OBS), state=torch.randn(n, CRITIC), z=torch.rand(n, STATE),
        a_prev=torch.rand(n, ACTION), action=torch.rand(n, ACTION), reward=torch.randn(n),
        terminated=(torch.arange(n) == 1).float(), next_obs=torch.randn(n, OBS),
        next_state=torch.randn(n, CRITIC), next_z=torch.rand(n, STATE),
        after=torch.arange(n), weight=weight / weight.sum(),
    )  # fmt: skip


def make_agent(privileged=True, **options):
    """An agent, and its buffer with episodes of 9 transitions of 2 environments."""
    options = dict(state_dim=STATE, num_envs=2, buffer_size=400, batch_size=16) | options
    sizes = dict(policy=OBS, critic=CRITIC if privileged else OBS)
    env = SimpleNamespace(
        single_observation_space={k: gym.spaces.Box(-9, 9, (n,)) for k, n in sizes.items()},
        single_action_space=gym.spaces.Box(-1, 1, (ACTION,)),
    )
    agent = s2pg_td3.Agent(s2pg_td3.Args(**options), env, CPU)
    buffer = s2pg_td3.TransitionBuffer(options["buffer_size"], 2, *agent.row_sizes, CPU)
    for t in range(60):
        seen = (torch.randn(2, n) for n in sizes.values())
        z, a = torch.rand(2, agent.z_dim), 2 * torch.rand(2, ACTION) - 1
        buffer.add(*seen, z, a, torch.randn(2), [t % 10 == 8] * 2, [t % 10 == 0] * 2)
    return agent, buffer


def snapshot(module):
    return [p.detach().clone() for p in module.parameters()]


def moved(before, module):
    """Whether every parameter has changed; they change all together or not at all."""
    changes = [(a != b).any().item() for a, b in zip(before, module.parameters())]
    assert all(changes) or not any(changes)
    return all(changes)


Q = [[1.0, 20.0, 3.0, 40.0], [10.0, 2.0, 30.0, 4.0]]
Q_NEXT = [[5.0, 60.0, 7.0, 80.0], [50.0, 6.0, 70.0, 8.0]]


class StubActor:
    """Notes its inputs; the same a and z' for all rows."""

    def __init__(self, a=0.1, z=0.2, noise_z=0.0):
        self.a, self.z, self.noise_z, self.calls = a, z, noise_z, []
        self.theta = torch.tensor(0.0, requires_grad=True)

    def __call__(self, *inputs):
        self.calls.append(inputs)
        n = len(inputs[0])
        return torch.full((n, ACTION), self.a) + self.theta, torch.full((n, STATE), self.z)


class StubCritic:
    """Notes its inputs, returns the values it was given [2, B]."""

    def __init__(self, values):
        self.calls, self.values = [], torch.tensor(values, requires_grad=True)

    def __call__(self, *inputs):
        self.calls.append(inputs)
        return self.values + 0 * sum(x.sum() for x in inputs)


def same(calls, *expected):
    """One call, with these very inputs."""
    (inputs,) = calls
    return len(inputs) == len(expected) and all(map(torch.equal, inputs, expected))


def test_the_target_is_the_smaller_value_of_what_the_target_policy_does_next():
    """The action just taken is the a_prev of the next step, for actor and critic alike."""
    batch, actor, critic, target = make_batch(), StubActor(), StubCritic(Q), StubCritic(Q_NEXT)
    loss, q = s2pg_td3.td3_critic_loss(actor, critic, target, batch, 0.0, 0.5, gamma=0.9)
    expected = 0.0
    for k in range(4):
        bootstrap = 0 if k == 1 else 0.9 * min(Q_NEXT[0][k], Q_NEXT[1][k])  # row 1 terminates
        y = batch.reward[k] + bootstrap
        expected += batch.weight[k] * ((Q[0][k] - y) ** 2 + (Q[1][k] - y) ** 2)
    torch.testing.assert_close(loss, expected)
    assert same(actor.calls, batch.next_obs, batch.next_z, batch.action)
    a, z = torch.full((4, ACTION), 0.1), torch.full((4, STATE), 0.2)
    assert same(target.calls, batch.next_state, a, z, batch.action)
    assert same(critic.calls, batch.state, batch.action, batch.next_z, batch.a_prev)
    assert torch.equal(q, torch.tensor(Q)) and not q.requires_grad
    given = [critic.values, target.values, actor.theta]
    grads = torch.autograd.grad(loss, given, allow_unused=True)
    assert grads[0][:, :3].all() and grads[1] is None and grads[2] is None


def smoothed(n=20_000, **stub):
    """What the target critic is given as a'' and z'', with the options' default noise on a."""
    actor, (critic, target) = StubActor(**stub), (StubCritic([[0.0] * n] * 2) for _ in range(2))
    s2pg_td3.td3_critic_loss(actor, critic, target, make_batch(n), 0.2, 0.5, gamma=0.9)
    _, a, z, _ = target.calls[0]
    return a, z


def test_the_target_is_smoothed_by_clipped_noise_on_action_and_internal_state():
    """Both noises are cut at 2.5 of their standard deviations, where .0124 of a normal lies.

    Within +-2.5, a standard normal that is clipped there has standard deviation .9871.
    """
    a, z = smoothed(noise_z=0.3)
    for x, mean, std in [(a, 0.1, 0.2), (z, 0.2, 0.15)]:
        noise = (x - mean) / std
        assert math.isclose(noise.abs().max(), 2.5, rel_tol=1e-5)
        at_the_limit = (noise.abs() > 2.4999).float().mean()
        # 60 000 draws or more: errors of .0005, .003 and .004
        assert abs(at_the_limit - 0.0124) < 0.0025
        assert abs(noise.std() - 0.9871) < 0.015 and abs(noise.mean()) < 0.02
    correlation = torch.corrcoef(torch.cat([a, z], -1).T) - torch.eye(ACTION + STATE)
    assert correlation.abs().max() < 5 / math.sqrt(len(a))


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_smoothed_action_and_internal_state_stay_in_their_intervals(sign):
    for x in smoothed(n=500, a=0.95 * sign, z=0.95 * sign, noise_z=0.3):
        # the noise reaches beyond the limit for more than a third of the draws, each cut to it
        assert (sign * x).max() == 1 and ((sign * x) == 1).float().mean() > 0.3
        assert (sign * x).min() < 0.6


def test_an_update_takes_the_target_from_the_target_networks(monkeypatch):
    agent, buffer = make_agent(policy_noise=0.3, noise_clip=0.4, gamma=0.8)
    given, loss = [], agent.critic_loss
    monkeypatch.setattr(agent, "critic_loss", lambda *args: given.extend(args) or loss(*args))
    agent.update(buffer)
    expected = agent.target_actor, agent.critic, agent.target_critic
    assert all(one is other for one, other in zip(given, expected))
    assert given[4:] == [0.3, 0.4, 0.8]
    assert agent.target_actor.noise_z == agent.args.exploration_noise_z


@RNN
def test_the_gradient_of_the_actor_is_that_of_q_along_action_and_internal_state(rnn):
    """E[grad mu_a grad_a Q_1 + grad mu_z grad_z' Q_1], from its pieces; and nothing of Q_2."""
    actor = make_actor(rnn).double()
    critic = s2pg_td3.TwinCritic(CRITIC + 2 * ACTION + actor.z_dim).double()
    obs, z, a_prev = (x.double() for x in inputs(actor, 6))
    batch = s2pg_td3.Transitions(*(x.double() for x in make_batch(6)))
    batch = batch._replace(obs=obs, z=z, a_prev=a_prev)
    loss, mean_z = s2pg_td3.td3_actor_loss(actor, critic, batch)
    actual = torch.autograd.grad(loss, list(actor.parameters()), retain_graph=True)

    a, z_next = actor(obs, z, a_prev)
    a_given, z_given = (x.detach().requires_grad_() for x in (a, z_next))
    q = critic(batch.state, a_given, z_given, a_prev)[0]
    grads = torch.autograd.grad(-(batch.weight * q).sum(), [a_given, z_given])
    assert all(grad[:-1].any() for grad in grads)
    expected = torch.autograd.grad([a, z_next], list(actor.parameters()), grads)
    for x, y in zip(actual, expected):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
        assert x.any()
    torch.testing.assert_close(loss, -(batch.weight * q).sum())
    assert torch.equal(mean_z, z_next) and not mean_z.requires_grad
    for grad in torch.autograd.grad(loss, list(critic.parameters())):
        assert not grad[1].any()


def test_each_step_is_one_of_its_own_parameters():
    agent, _ = make_agent(actor_lr=0.1, critic_lr=0.2)
    for part, rate, optimizer in zip((agent.critic, agent.actor), (0.2, 0.1), agent.optimizers):
        (group,) = optimizer.param_groups
        assert [*map(id, group["params"])] == [*map(id, part.parameters())] and group["lr"] == rate


def what_moves(agent, buffer, updates):
    """For each update: whether the critic, the actor, both targets and the stored z change."""
    moves = []
    for _ in range(updates):
        parts = agent.critic, agent.actor, agent.target_critic, agent.target_actor
        before, z = [snapshot(part) for part in parts], buffer.z.clone()
        agent.update(buffer)
        moves.append([*map(moved, before, parts), not torch.equal(buffer.z, z)])
    return moves


@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_actor_targets_and_stored_states_change_in_every_nth_update_only(frequency):
    agent, buffer = make_agent(policy_frequency=frequency)
    for k, moves in enumerate(what_moves(agent, buffer, 7), start=1):
        assert moves == [True] + 4 * [k % frequency == 0]


def test_the_count_of_updates_survives_a_checkpoint(tmp_path):
    agent, buffer = make_agent(policy_frequency=3)
    what_moves(agent, buffer, 4)
    s2pg_td3.save_checkpoint(tmp_path, agent, buffer, global_step=4, seconds=0.0)
    other, buffer = make_agent(policy_frequency=3)
    s2pg_td3.load_checkpoint(tmp_path, other, buffer)
    assert [moves[1] for moves in what_moves(other, buffer, 5)] == [False, True, False, False, True]


def test_targets_start_as_their_networks_and_follow_them():
    """theta' <- theta' + tau (theta - theta'), with the new theta, of actor and critic alike."""
    agent, buffer = make_agent(policy_frequency=1, tau=0.1)
    pairs = [(agent.actor, agent.target_actor), (agent.critic, agent.target_critic)]
    for online, target in pairs:
        for a, b in zip(online.parameters(), target.parameters()):
            assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    agent.update(buffer)
    before = [snapshot(target) for _, target in pairs]
    metrics = agent.update(buffer)
    for old_parameters, (online, target) in zip(before, pairs):
        for old, new, theta in zip(old_parameters, target.parameters(), online.parameters()):
            torch.testing.assert_close(new, old + 0.1 * (theta - old), rtol=1e-5, atol=1e-8)
            # under autograd, all updates of the run would hang together in memory
            assert new.is_leaf and new.grad is None and not new.requires_grad
    assert not any(value.requires_grad for value in metrics.values())
    assert not buffer.rows.requires_grad


def test_the_log_shows_finite_losses_and_the_last_one_of_the_actor():
    agent, buffer = make_agent(policy_frequency=2)
    assert agent.update(buffer).keys() == {"losses/qf_values", "losses/qf_loss"}
    second, third = agent.update(buffer), agent.update(buffer)
    assert all(torch.isfinite(value) for value in third.values())
    assert third["losses/actor_loss"] == second["losses/actor_loss"]
    assert third["losses/qf_loss"] != second["losses/qf_loss"]


def refreshed(monkeypatch, **options):
    """Buffer before and after an update, rows that were to change, and mu_z of each of them."""
    agent, buffer = make_agent(policy_frequency=1, **options)
    batches, draw = [], buffer.sample
    monkeypatch.setattr(buffer, "sample", lambda *a: batches.append(draw(*a)) or batches[-1])
    before, actor = buffer.rows.clone(), make_actor()
    actor.load_state_dict(agent.actor.state_dict())
    agent.update(buffer)
    (batch,) = batches
    with torch.no_grad():
        _, mean = actor(batch.obs, batch.z, batch.a_prev)
    transition = batch.weight > 0
    means = dict(zip(batch.after[transition].tolist(), mean[transition]))  # one for duplicates
    return before, buffer, list(means), torch.stack(list(means.values()))


def test_an_update_refreshes_the_next_internal_states_of_its_batch_and_nothing_else(monkeypatch):
    before, buffer, rows, mean = refreshed(monkeypatch, exploration_noise_z=0.0)
    torch.testing.assert_close(buffer.z[rows], mean)
    *_, first = buffer.columns(before[rows])
    assert len(rows) > 8 and not first.any()
    buffer.z[rows] = before.split(buffer.widths, -1)[2][rows]
    assert torch.equal(buffer.rows, before)


@pytest.mark.parametrize("std", [0.001, 2.0])
def test_refreshed_states_have_the_noise_of_the_behaviour(std, monkeypatch):
    """About 80 rows of 8 numbers: an error of 3 %. Small noise is nowhere clipped, other is."""
    _, buffer, rows, mean = refreshed(monkeypatch, exploration_noise_z=std, batch_size=300)
    z = buffer.z[rows]
    assert len(rows) > 70 and mean.abs().max() < 0.995 and z.abs().max() <= 1
    if std == 2:
        assert 0.3 < (z.abs() == 1).float().mean() < 0.9
    else:
        assert abs((z - mean).std() - std) < 0.12 * std and abs((z - mean).mean()) < 0.2 * std


@pytest.mark.parametrize("options", [dict(refresh=False), dict(memoryless=True)])
def test_without_a_refresh_or_a_memory_the_buffer_stays_as_it_is(options):
    agent, buffer = make_agent(policy_frequency=1, **options)
    before = buffer.rows.clone()
    agent.update(buffer)
    assert torch.equal(buffer.rows, before)


@RNN
def test_deterministic_acting_is_the_policy_and_uses_no_random_numbers(rnn):
    """Whose action is squashed by a tanh."""
    actor, bias = make_actor(rnn), torch.tensor([-3.0, 0.5, 20.0])
    x, before = inputs(actor, 6), torch.get_rng_state()
    for acted, mean in zip(actor.act(*x, deterministic=True), actor(*x)):
        assert torch.equal(acted, mean)
    assert torch.equal(torch.get_rng_state(), before)
    nn.init.zeros_(actor.policy_head.weight)
    actor.policy_head.bias.data.copy_(bias)
    torch.testing.assert_close(actor(*x)[0], bias.tanh().expand(6, -1))


@RNN
def test_the_behaviour_has_the_noise_that_was_asked_for_on_each(rnn):
    """Independent for every number; 20 000 draws, so that a standard deviation is within 2.5 %."""
    actor, n = make_actor(rnn, noise_a=0.01, noise_z=0.001), 20_000
    x = [v.expand(n, -1) for v in inputs(actor, 1)]
    with torch.no_grad():
        acted, means = torch.cat(actor.act(*x), -1), torch.cat(actor(*x), -1)
    assert means.abs().max() < 0.99  # so that nothing is clipped
    noise = acted - means
    std = torch.tensor([0.01] * ACTION + [0.001] * actor.z_dim)
    assert ((noise.std(0) / std - 1).abs() < 0.025).all()
    assert (noise.mean(0).abs() < 5 * std / math.sqrt(n)).all()
    assert (torch.corrcoef(noise.T) - torch.eye(len(std))).abs().max() < 5 / math.sqrt(n)


@RNN
def test_acting_stays_in_the_intervals_and_gradients_at_their_ends_are_finite(rnn):
    """Also over time, for large inputs, and for the cell state of an LSTM, which is unbounded.

    Clipped noise leaves z at exactly 1 or -1, where an LSTM has to invert the tanh of c.
    """
    actor = make_actor(rnn, noise_a=0.5, noise_z=0.5)
    z, a = torch.zeros(64, actor.z_dim), torch.zeros(64, ACTION)
    for _ in range(50):
        a, z = actor.act(100 * torch.randn(64, OBS), z, a)
        for x in (a, z):
            assert torch.isfinite(x).all() and x.abs().max() == 1
    a, z_next = actor(torch.randn(64, OBS), z.requires_grad_(), a)
    grads = torch.autograd.grad((a.sum() + z_next.sum()), [z, *actor.parameters()])
    assert all(torch.isfinite(g).all() for g in grads)


@RNN
def test_the_memory_depends_on_the_observation_the_memory_and_the_previous_action(rnn):
    actor = make_actor(rnn)
    given = inputs(actor, 4)
    for k in range(3):
        changed = [-x if i == k else x for i, x in enumerate(given)]
        for before, after in zip(actor(*given), actor(*changed)):
            assert (before != after).any(-1).all()


@pytest.mark.parametrize("rnn, gates", [("gru", [0, 40, 0]), ("lstm", [-40, 40, 0, 0])])
def test_a_gate_that_keeps_everything_keeps_the_memory(rnn, gates):
    """Of a GRU z' = g and g = z for an open update gate; of an LSTM, the cell state."""
    actor = make_actor(rnn)
    with torch.no_grad():
        for parameter in actor.cell.parameters():
            parameter.zero_()
        actor.cell.bias_ih.copy_(torch.tensor(gates).repeat_interleave(STATE))
    z = start = 1.9 * torch.rand(20, actor.z_dim) - 0.95
    for _ in range(100):
        obs, _, a_prev = inputs(actor, 20)
        _, z = actor.act(obs, z, a_prev, deterministic=True)
    torch.testing.assert_close(z[:, -STATE:], start[:, -STATE:], rtol=0, atol=1e-3)


@RNN
@pytest.mark.parametrize("privileged", [True, False])
@pytest.mark.parametrize("memoryless", [True, False])
def test_every_kind_of_memory_updates(rnn, privileged, memoryless):
    """The critic sees z, too, where it is told no more than the policy."""
    options = dict(rnn=rnn, privileged=privileged, memoryless=memoryless)
    agent, buffer = make_agent(policy_frequency=1, **options)
    z_dim = 0 if memoryless else 2 * STATE if rnn == "lstm" else STATE
    state = CRITIC if privileged else OBS + z_dim
    assert agent.z_dim == agent.actor.z_dim == z_dim == buffer.z.shape[1]
    assert agent.critic.layers[0].shape[1] == state + 2 * ACTION + z_dim
    names = [name for name, _ in agent.actor.named_parameters()]
    assert memoryless != any("cell" in name or "kernel" in name for name in names)
    before = snapshot(agent.actor)
    metrics = agent.update(buffer)
    assert moved(before, agent.actor)
    assert all(torch.isfinite(value) for value in metrics.values())


def test_it_trains_as_s2pg_sac_does():
    """So that tests/test_scripts.py tells what is acted, stored, logged and saved, and when."""
    assert inspect.getsource(s2pg_td3.train) == inspect.getsource(s2pg_sac.train)
