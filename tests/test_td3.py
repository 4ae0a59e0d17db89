"""S2PG-TD3: its target, its deterministic gradient, what is delayed, and which noise goes where."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import bptt_sac
import s2pg_sac
import s2pg_td3

OBS, CRITIC, ACTION, STATE = 5, 7, 3, 8
CPU = torch.device("cpu")
RNN = pytest.mark.parametrize("rnn", ["gru", "lstm", "rnn"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_actor(rnn="gru", noise_a=0.1, noise_z=0.1, state_dim=STATE):
    return s2pg_td3.DeterministicStatefulActor(OBS, ACTION, state_dim, rnn, noise_a, noise_z)


def inputs(actor, n):
    """Some obs, z and a_prev, [n, .]."""
    z = 1.8 * torch.rand(n, actor.z_dim) - 0.9
    return torch.randn(n, OBS), z, 2 * torch.rand(n, ACTION) - 1


def make_batch(n=4):
    return s2pg_td3.Transitions(
        obs=torch.randn(n, OBS), state=torch.randn(n, CRITIC), z=torch.rand(n, STATE),
        a_prev=torch.rand(n, ACTION), action=torch.rand(n, ACTION), reward=torch.randn(n),
        terminated=torch.arange(n) % 4 == 1, next_obs=torch.randn(n, OBS),
        next_state=torch.randn(n, CRITIC), next_z=torch.rand(n, STATE),
        next_index=torch.arange(n),
    )  # fmt: skip


def make_agent(script=s2pg_td3, privileged=True, steps=60, **options):
    """An agent, and its buffer with episodes of 9 transitions of 2 environments."""
    options = dict(state_dim=STATE, num_envs=2, buffer_size=400, batch_size=16) | options
    critic_dim = CRITIC if privileged else OBS
    agent = script.Agent(script.Args(**options), OBS, critic_dim, ACTION, privileged, CPU)
    buffer = agent.make_buffer()
    for t in range(steps):
        flags = (torch.full((2,), t % 10 == k).numpy() for k in (8, 0))
        buffer.add(
            torch.randn(2, OBS), torch.randn(2, critic_dim), torch.rand(2, agent.z_dim),
            2 * torch.rand(2, ACTION) - 1, torch.randn(2), *flags,
        )  # fmt: skip
    return agent, buffer


def tensors_of(buffer):
    return {k: v.clone() for k, v in vars(buffer).items() if torch.is_tensor(v)}


def snapshot(module):
    return [p.detach().clone() for p in module.parameters()]


def moved(before, module):
    """Whether every parameter has changed; they change all together or not at all."""
    changes = [(a != b).any().item() for a, b in zip(before, module.parameters())]
    assert all(changes) or not any(changes)
    return all(changes)


# --- the target -----------------------------------------------------------------------------------

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
        y = batch.reward[k].item() + bootstrap
        expected += ((Q[0][k] - y) ** 2 + (Q[1][k] - y) ** 2) / 4
    assert math.isclose(loss.item(), expected, rel_tol=1e-5)
    assert same(actor.calls, batch.next_obs, batch.next_z, batch.action)
    a, z = torch.full((4, ACTION), 0.1), torch.full((4, STATE), 0.2)
    assert same(target.calls, batch.next_state, a, z, batch.action)
    assert same(critic.calls, batch.state, batch.action, batch.next_z, batch.a_prev)
    assert torch.equal(q, torch.tensor(Q)) and not q.requires_grad
    grads = torch.autograd.grad(
        loss, [critic.values, target.values, actor.theta], allow_unused=True
    )
    assert grads[0].all() and grads[1] is None and grads[2] is None


def smoothed(n=20_000, **stub):
    """What the target critic is given as a'' and z'', with the options' default noise on a."""
    target = StubCritic(torch.zeros(2, n).tolist())
    s2pg_td3.td3_critic_loss(
        StubActor(**stub), StubCritic(torch.zeros(2, n).tolist()), target, make_batch(n),
        policy_noise=0.2, noise_clip=0.5, gamma=0.9,
    )  # fmt: skip
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
    monkeypatch.setattr(agent, "critic_loss", lambda *args: given.append(args) or loss(*args))
    agent.update(buffer)
    ((actor, critic, target_critic, _, *numbers),) = given
    assert actor is agent.target_actor and actor is not agent.actor
    assert critic is agent.critic and target_critic is agent.target_critic
    assert numbers == [0.3, 0.4, 0.8]
    assert actor.noise_z == agent.args.exploration_noise_z


# --- the deterministic gradient -------------------------------------------------------------------


@RNN
def test_the_gradient_of_the_actor_is_that_of_q_along_action_and_internal_state(rnn):
    """E[grad mu_a grad_a Q_1 + grad mu_z grad_z' Q_1], from its pieces; and nothing of Q_2."""
    actor = make_actor(rnn).double()
    critic = s2pg_td3.TwinCritic(CRITIC + 2 * ACTION + actor.z_dim).double()
    obs, z, a_prev = (x.double() for x in inputs(actor, 6))
    batch = make_batch(6)._replace(
        obs=obs, z=z, a_prev=a_prev, state=torch.randn(6, CRITIC, dtype=torch.float64)
    )
    loss, mean_z = s2pg_td3.td3_actor_loss(actor, critic, batch)
    actual = torch.autograd.grad(loss, list(actor.parameters()), retain_graph=True)

    a, z_next = actor(obs, z, a_prev)
    a_given, z_given = (x.detach().requires_grad_() for x in (a, z_next))
    q = critic(batch.state, a_given, z_given, a_prev)[0]
    grad_a, grad_z = torch.autograd.grad(q.sum(), [a_given, z_given])
    assert grad_a.any() and grad_z.any()
    expected = torch.autograd.grad(
        -(a * grad_a).sum() / 6 - (z_next * grad_z).sum() / 6, list(actor.parameters())
    )
    for x, y in zip(actual, expected):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
        assert x.any()
    torch.testing.assert_close(loss, -q.mean())
    assert torch.equal(mean_z, z_next) and not mean_z.requires_grad
    for grad in torch.autograd.grad(loss, list(critic.parameters())):
        assert not grad[1].any()


def test_each_step_computes_gradients_for_its_own_parameters_only(monkeypatch):
    """The critic is a constant in the actor's step, the actor and the targets in the critic's."""
    agent, buffer = make_agent(policy_frequency=1)
    parts = agent.actor, agent.critic, agent.target_actor, agent.target_critic
    seen, descend = [], s2pg_td3.descend

    def watched(optimizer, loss):
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        (mine,) = [part for part in parts if {id(p) for p in part.parameters()} == own]
        others = [p for part in parts if part is not mine for p in part.parameters()]
        before = [(p.clone(), None if p.grad is None else p.grad.clone()) for p in others]
        descend(optimizer, loss)
        for p, (value, grad) in zip(others, before):
            assert torch.equal(p, value)
            assert p.grad is None if grad is None else torch.equal(p.grad, grad)
        seen.append(mine)

    monkeypatch.setattr(s2pg_td3, "descend", watched)
    agent.update(buffer)
    agent.update(buffer)
    assert seen == [agent.critic, agent.actor] * 2


# --- delayed updates ------------------------------------------------------------------------------


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
    s2pg_td3.save_checkpoint(str(tmp_path), agent, {})
    other, buffer = make_agent(policy_frequency=3)
    s2pg_td3.load_checkpoint(str(tmp_path), other)
    for part in ("actor", "critic", "target_actor", "target_critic"):
        for a, b in zip(getattr(agent, part).parameters(), getattr(other, part).parameters()):
            assert torch.equal(a, b)
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
    agent.update(buffer)
    for old_parameters, (online, target) in zip(before, pairs):
        for old, new, theta in zip(old_parameters, target.parameters(), online.parameters()):
            torch.testing.assert_close(new, old + 0.1 * (theta - old), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("script", [s2pg_td3, s2pg_sac, bptt_sac], ids=lambda s: s.__name__)
def test_target_networks_record_no_autograd_graph(script):
    """An update of theirs under autograd would chain all updates of the run in memory."""
    options = dict(policy_frequency=1) if script is s2pg_td3 else {}
    agent, buffer = make_agent(script, **options)
    targets = [part for name, part in vars(agent).items() if name.startswith("target_")]
    targets = [part for part in targets if isinstance(part, nn.Module)]
    assert len(targets) == (2 if script is s2pg_td3 else 1)
    for _ in range(3):
        metrics = agent.update(buffer)
    for parameter in (p for part in targets for p in part.parameters()):
        assert parameter.is_leaf and parameter.grad_fn is None and parameter.grad is None
    assert not any(value.requires_grad for value in metrics.values())
    assert not buffer.z.requires_grad


def test_the_log_shows_finite_losses_and_the_last_one_of_the_actor():
    agent, buffer = make_agent(policy_frequency=2)
    assert agent.update(buffer).keys() == {
        "losses/qf1_values", "losses/qf2_values", "losses/qf_loss"
    }  # fmt: skip
    second, third = agent.update(buffer), agent.update(buffer)
    assert all(torch.isfinite(value) for value in third.values())
    assert third["losses/actor_loss"] == second["losses/actor_loss"]
    assert third["losses/qf_loss"] != second["losses/qf_loss"]


# --- the refresh of the internal state ------------------------------------------------------------


def refreshed(monkeypatch, **options):
    """Buffer before and after an update, rows that were to change, and mu_z of each of them."""
    agent, buffer = make_agent(policy_frequency=1, **options)
    batches, draw = [], buffer.sample
    monkeypatch.setattr(buffer, "sample", lambda *a: batches.append(draw(*a)) or batches[-1])
    before, actor = tensors_of(buffer), make_actor()
    actor.load_state_dict(agent.actor.state_dict())
    agent.update(buffer)
    (batch,) = batches
    with torch.no_grad():
        _, mean = actor(batch.obs, batch.z, batch.a_prev)
    # duplicates have the same mean
    means = dict(zip(batch.next_index.tolist(), mean))
    rows = torch.tensor(sorted(means))
    return before, tensors_of(buffer), rows, torch.stack([means[k] for k in sorted(means)])


def test_an_update_refreshes_the_next_internal_states_of_its_batch_and_nothing_else(monkeypatch):
    before, after, rows, mean = refreshed(monkeypatch, exploration_noise_z=0.0)
    assert all(torch.equal(before[k], after[k]) for k in before if k not in ("z", "rows"))
    changed = (before["z"] != after["z"]).any(-1).nonzero().flatten()
    assert torch.equal(changed, rows) and not before["first"][rows].any()
    torch.testing.assert_close(after["z"][rows], mean)


def test_refreshed_states_have_the_noise_of_the_behaviour(monkeypatch):
    """About 90 rows of 8 numbers: an error of 3 %, and no mean near enough to 1 to be clipped."""
    _, after, rows, mean = refreshed(monkeypatch, exploration_noise_z=0.001, batch_size=300)
    assert len(rows) > 80 and mean.abs().max() < 0.99
    noise = after["z"][rows] - mean
    assert abs(noise.std() - 0.001) < 0.00012 and abs(noise.mean()) < 0.0002


def test_refreshed_states_stay_in_their_interval(monkeypatch):
    _, after, rows, _ = refreshed(monkeypatch, exploration_noise_z=2.0)
    z = after["z"][rows]
    assert z.abs().max() == 1 and (z.abs() == 1).float().mean() > 0.3


@pytest.mark.parametrize("options", [dict(refresh=False), dict(memoryless=True)])
def test_without_a_refresh_or_a_memory_the_buffer_stays_as_it_is(options):
    agent, buffer = make_agent(policy_frequency=1, **options)
    before = tensors_of(buffer)
    agent.update(buffer)
    assert all(torch.equal(before[k], getattr(buffer, k)) for k in before)


# --- acting ---------------------------------------------------------------------------------------


@RNN
def test_deterministic_acting_is_the_policy_and_uses_no_random_numbers(rnn):
    actor = make_actor(rnn)
    x, before = inputs(actor, 6), torch.get_rng_state()
    for acted, mean in zip(actor.act(*x, deterministic=True), actor(*x)):
        assert torch.equal(acted, mean)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_action_is_squashed_by_a_tanh():
    actor, bias = make_actor(), torch.tensor([-3.0, 0.5, 20.0])
    nn.init.zeros_(actor.policy_head.weight)
    actor.policy_head.bias.data.copy_(bias)
    a, _ = actor(*inputs(actor, 4))
    torch.testing.assert_close(a, bias.tanh().expand(4, -1))


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
def test_acting_stays_in_the_intervals(rnn):
    """Also over time, for large inputs, and for the cell state of an LSTM, which is unbounded."""
    actor = make_actor(rnn, noise_a=0.5, noise_z=0.5)
    assert actor.z_dim == (2 if rnn == "lstm" else 1) * STATE
    z, a = torch.zeros(64, actor.z_dim), torch.zeros(64, ACTION)
    with torch.no_grad():
        for _ in range(50):
            a, z = actor.act(100 * torch.randn(64, OBS), z, a)
            for x in (a, z):
                assert torch.isfinite(x).all() and x.abs().max() == 1


@RNN
def test_an_internal_state_at_the_end_of_its_interval_gives_finite_gradients(rnn):
    """Clipped noise leaves z at exactly 1 or -1, where an LSTM has to invert the tanh of c."""
    actor = make_actor(rnn)
    z = torch.ones(4, actor.z_dim)
    z[2:] = -1
    a, z_next = actor(torch.randn(4, OBS), z.requires_grad_(), torch.randn(4, ACTION))
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


def test_a_gate_that_keeps_everything_keeps_the_memory():
    """The action and its noise have no part in it: z' = g, and g = z for an open update gate."""
    actor = make_actor()
    with torch.no_grad():
        for parameter in actor.cell.parameters():
            parameter.zero_()
        actor.cell.bias_ih.view(3, -1)[1] = 40
    z = start = 2 * torch.rand(20, STATE) - 1
    with torch.no_grad():
        for _ in range(100):
            obs, _, a_prev = inputs(actor, 20)
            _, z = actor.act(obs, z, a_prev, deterministic=True)
    torch.testing.assert_close(z, start, rtol=0, atol=1e-5)


def test_a_lasting_cell_state_survives_the_interval_of_its_tanh():
    actor = make_actor("lstm")
    with torch.no_grad():
        for parameter in actor.cell.parameters():
            parameter.zero_()
        gates = actor.cell.bias_ih.view(4, -1)  # input, forget (1 keeps), cell, output
        gates[0], gates[1] = -40, 40
    start = 1.9 * torch.rand(20, 2 * STATE) - 0.95
    z = start
    with torch.no_grad():
        for _ in range(100):
            obs, _, a_prev = inputs(actor, 20)
            _, z = actor.act(obs, z, a_prev, deterministic=True)
    torch.testing.assert_close(z[:, STATE:], start[:, STATE:], rtol=0, atol=1e-3)


@RNN
@pytest.mark.parametrize("privileged", [True, False])
def test_every_kind_of_memory_updates(rnn, privileged):
    """The critic sees z, too, where it is told no more than the policy."""
    agent, buffer = make_agent(rnn=rnn, privileged=privileged, policy_frequency=1)
    z_dim = (2 if rnn == "lstm" else 1) * STATE
    state = CRITIC if privileged else OBS + z_dim
    assert agent.z_dim == agent.actor.z_dim == z_dim == buffer.z.shape[1]
    assert agent.critic.net[0].weight.shape[1] == state + 2 * ACTION + z_dim
    before = snapshot(agent.actor)
    metrics = agent.update(buffer)
    assert moved(before, agent.actor)
    assert all(torch.isfinite(value) for value in metrics.values())


def test_a_memoryless_agent_has_no_recurrent_parameters_and_updates():
    agent, buffer = make_agent(memoryless=True, policy_frequency=1)
    names = [name for name, _ in agent.actor.named_parameters()]
    assert names and not any("cell" in name or "kernel" in name for name in names)
    assert agent.z_dim == agent.actor.z_dim == 0 and buffer.z.shape == (400, 0)
    assert agent.critic.net[0].weight.shape[1] == CRITIC + 2 * ACTION
    before = snapshot(agent.actor)
    metrics = agent.update(buffer)
    assert moved(before, agent.actor)
    assert all(torch.isfinite(value) for value in metrics.values())


def test_the_buffer_holds_the_clipped_actions_and_states_of_the_behaviour(tmp_path, monkeypatch):
    """What the environment got, what the policy is told next, and nothing beyond [-1, 1]."""
    monkeypatch.chdir(tmp_path)
    buffers, given, made = [], [], []
    make_buffer, make_env = s2pg_td3.Agent.make_buffer, s2pg_td3.make_env
    actor_class = s2pg_td3.DeterministicStatefulActor
    act = actor_class.act

    def watched_env(*args):
        env = make_env(*args)
        if not made:  # the second one is for the evaluation
            step = env.step
            monkeypatch.setattr(env, "step", lambda a: given.append(a.copy()) or step(a))
        made.append(env)
        return env

    previous = []

    def watched_act(self, obs, z, a_prev, deterministic=False):
        previous.append((z.clone(), a_prev.clone()))
        return act(self, obs, z, a_prev, deterministic)

    monkeypatch.setattr(
        s2pg_td3.Agent, "make_buffer", lambda self: buffers.append(make_buffer(self)) or buffers[0]
    )
    monkeypatch.setattr(s2pg_td3, "make_env", watched_env)
    monkeypatch.setattr(actor_class, "act", watched_act)
    s2pg_td3.train(
        s2pg_td3.Args(
            env_id="CueRecall-v0", env_kwargs=dict(horizon=5), total_timesteps=50, buffer_size=200,
            learning_starts=10, utd=0, exploration_noise=1.5, exploration_noise_z=0.8,
            eval_frequency=0, eval_episodes=1, state_dim=STATE,
        )
    )  # fmt: skip
    (buffer,) = buffers
    n = buffer.written
    assert torch.equal(buffer.action[:n], torch.tensor(np.concatenate(given)))
    z, a_prev = (torch.cat(x)[:n] for x in zip(*previous))
    assert torch.equal(buffer.z[:n], z)
    assert torch.equal(buffer.a_prev(torch.arange(n)), a_prev)
    for x in (buffer.action[12:n], buffer.z[:n]):
        assert x.abs().max() == 1 and (x.abs() == 1).float().mean() > 0.1
    first = buffer.first[:n].bool()
    assert first.nonzero().flatten().tolist() == list(range(0, n, 6))
    assert not z[first].any() and not a_prev[first].any() and a_prev[~first].all()
