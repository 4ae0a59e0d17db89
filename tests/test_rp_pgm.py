"""rp_pgm.py: its gradients, spectral normalisation, the model, the rows of a segment, a run."""

import copy
import math
import os
import signal
from types import SimpleNamespace
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recording import Recording, emulated_cuda
from test_rows import streams
from torch.nn.utils import parametrize

import evaluate
import rp_pgm

OBS, ACTION, BATCH = 3, 2, 5
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("double_precision")


def make_agent(**options):
    env = SimpleNamespace(
        single_observation_space=gym.spaces.Box(-9, 9, (OBS,)),
        single_action_space=gym.spaces.Box(-1, 1, (ACTION,)),
    )
    options = dict(batch_size=16, width=16, depth=2, total_timesteps=100) | options
    return rp_pgm.Agent(rp_pgm.Args(**options), env, CPU)


def filled(agent, rows=200):
    """A buffer of random rows: episodes of 19 steps, and some that terminate."""
    buffer = rp_pgm.SegmentBuffer(1000, 1, *agent.row_sizes, CPU)
    for t in range(rows):
        action = 1.8 * torch.rand(1, ACTION) - 0.9
        numbers = np.array([[math.sin(t)], [t % 100 == 58], [t % 20 == 0]])
        buffer.add(torch.randn(1, OBS), action, *numbers)
    return buffer


def segments(length, real=None):
    """Segments of random rows, which are real as long as `real` [BATCH] says; else all of them."""
    step = torch.arange(length).unsqueeze(-1)
    real = (step < torch.tensor(real or BATCH * [length])).double()
    return rp_pgm.Segments(
        torch.randn(length + 1, BATCH, OBS), 1.8 * torch.rand(length, BATCH, ACTION) - 0.9,
        torch.randn(length, BATCH), torch.zeros(length, BATCH), real, real[0] / real[0].sum(),
    )  # fmt: skip


def objective(agent, batch, horizon, alpha=0.3, **options):
    args = SimpleNamespace(**vars(agent.args) | options)
    networks = agent.actor, agent.critic, agent.model
    return rp_pgm.unrolled_return(*networks, batch, alpha, args, horizon)


def gradients(value, parameters):
    found = torch.autograd.grad(value, list(parameters), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in found])


# --- the gradient of the unroll -------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["dp", "dr", "model-free"])
def test_without_model_steps_it_is_the_actor_step_of_sac(estimator):
    agent, batch = make_agent(), segments(1)
    torch.manual_seed(3)
    ours = objective(agent, batch, 0, estimator=estimator)
    torch.manual_seed(3)
    a, log_pi = agent.actor.sample(batch.x[0])
    sac = agent.critic(batch.x[0], a).min(0).values - 0.3 * log_pi
    torch.testing.assert_close(ours, sac)
    mine, theirs = (gradients(j.mean(), agent.actor.parameters()) for j in (ours, sac))
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_the_density_of_an_action_is_that_of_a_squashed_gaussian():
    mean, log_std, zeta = torch.randn(3, BATCH, ACTION)
    a, log_pi = rp_pgm.squash(mean, log_std, zeta)
    u = torch.distributions.Normal(mean, log_std.exp())
    tanh = torch.distributions.TanhTransform()
    expected = torch.distributions.TransformedDistribution(u, tanh).log_prob(a)
    torch.testing.assert_close(log_pi, expected.sum(-1))


@pytest.mark.parametrize("horizon", [1, 5, 20])
@pytest.mark.parametrize("estimator", ["dp", "dr"])
def test_the_gradient_of_a_linear_quadratic_problem(estimator, horizon, monkeypatch):
    """s' = .9 s + .5 u + xi, u = K s + zeta, r = -s^2 - .1 u^2, Q = -2 s^2, against a recursion.

    With dr the states are those of a segment, with whatever noise, and so is u.
    """
    A, B, K, gamma = 0.9, 0.5, torch.tensor(-0.3, requires_grad=True), 0.97
    # log pi is left out, and the tanh; what is stored is tanh u, so that its atanh is u
    monkeypatch.setattr(rp_pgm, "squash", lambda mean, log_std, zeta: (mean + zeta, 0.0))
    monkeypatch.setattr(rp_pgm, "NOISE_MAX", math.inf)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)

    def outcome(x, u):
        return (-x.square() - 0.1 * u.square()).squeeze(-1), torch.tensor(-torch.inf)

    model = SimpleNamespace(step=lambda x, u: A * x + B * u, outcome=outcome)
    s, u = [torch.randn(BATCH, 1)], []
    for _ in range(horizon + 1):
        u.append((K * s[-1]).detach() if estimator == "dp" else torch.rand_like(s[0]) - 0.5)
        noise = 0 if estimator == "dp" else torch.randn(BATCH, 1)
        s.append(A * s[-1] + B * u[-1] + noise)
    ones = torch.ones(horizon + 1, BATCH)
    action = torch.stack(u).tanh() / (1 - 1e-6)
    batch = rp_pgm.Segments(torch.stack(s), action, ones, 0 * ones, ones, ones[0] / BATCH)
    ours = rp_pgm.unrolled_return(
        lambda x: (K * x, torch.zeros_like(x)), lambda s, a: -2 * s.T.square(), model, batch, 0.7,
        SimpleNamespace(estimator=estimator, gamma=gamma), horizon,
    )  # fmt: skip
    (found,) = torch.autograd.grad(ours.sum(), K)

    ds, expected = torch.zeros(BATCH, 1), 0.0  # ds/dK, along the states
    for t in range(horizon):
        du = s[t] + K.item() * ds
        expected += gamma**t * (-2 * s[t] * ds - 0.2 * u[t] * du)
        ds = A * ds + B * du
    expected += gamma**horizon * (-4 * s[horizon] * ds)
    torch.testing.assert_close(found, expected.sum(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("horizon", [1, 5])
def test_an_unroll_along_a_segment_repeats_it(horizon, monkeypatch):
    """Whatever the policy is: states and actions are those stored, so J has their values."""
    monkeypatch.setattr(rp_pgm, "NOISE_MAX", math.inf)
    agent, batch = make_agent(estimator="dr", gamma=0.9), segments(horizon + 1)
    seen, step = [], agent.model.step
    agent.model.step = lambda *inputs: seen.append(inputs) or step(*inputs)
    j = objective(agent, batch, horizon, alpha=0.0)
    for inputs, stored in zip(seen, zip(batch.x, batch.action)):
        torch.testing.assert_close(inputs, stored, rtol=0, atol=1e-5)
    q = agent.critic(batch.x[horizon], batch.action[horizon]).amin(0)
    expected = sum(0.9**t * batch.reward[t] for t in range(horizon)) + 0.9**horizon * q
    torch.testing.assert_close(j, expected, rtol=0, atol=1e-4)


def test_both_estimators_agree_on_what_the_model_has_generated(monkeypatch):
    """With the same noise; only the first of these states is drawn, and there is no xi."""
    monkeypatch.setattr(rp_pgm, "NOISE_MAX", math.inf)
    agent, horizon = make_agent(), 4
    start = segments(horizon + 1)
    torch.manual_seed(7)
    predicted = objective(agent, start, horizon)
    torch.manual_seed(7)
    x, columns = start.x[0], []
    with torch.no_grad():
        for _ in range(horizon + 1):
            a, _ = agent.actor.sample(x)
            reward, log_odds = agent.model.outcome(x, a)
            columns.append((x, a / (1 - 1e-6), reward, torch.sigmoid(log_odds)))
            x = agent.model.step(x, a)
    states, action, reward, terminated = (torch.stack(column) for column in zip(*columns))
    states = torch.cat([states, x.unsqueeze(0)])
    batch = rp_pgm.Segments(states, action, reward, terminated, start.real, start.weight)
    torch.manual_seed(7)
    replayed = objective(agent, batch, horizon, estimator="dr")
    torch.testing.assert_close(replayed, predicted)
    mine, theirs = (gradients(j.sum(), agent.actor.parameters()) for j in (replayed, predicted))
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


def test_behind_the_end_of_a_segment_the_noise_is_drawn(monkeypatch):
    """And nothing of what lies there, which belongs to another episode, is read."""
    monkeypatch.setattr(rp_pgm, "NOISE_MAX", math.inf)
    agent, batch, results = make_agent(estimator="dr"), segments(4, real=[4, 3, 2, 1, 0]), []
    for seed in 5, 5, 6:
        torch.manual_seed(seed)
        results.append(objective(agent, batch, 3, alpha=0.0))
        for column in batch.x[1:], batch.action, batch.reward, batch.terminated:
            column[batch.real == 0] = 0.9
    assert torch.equal(results[0], results[1])
    assert (results[1] != results[2]).tolist() == [False, True, True, True, True]


def test_an_action_that_the_policy_would_hardly_take_ends_the_segment():
    """From there on it is as if the episode had ended: noise drawn, states predicted."""
    agent, batch, results = make_agent(estimator="dr"), segments(4), []
    zeta = torch.ones(4, BATCH, ACTION)
    zeta[1, :2, -1] = torch.tensor([4.1, -4.1])
    zeta[1, 2, -1] = 3.9
    with torch.no_grad():
        mean, log_std = agent.actor(batch.x[:4])
        batch.action[:] = torch.tanh(mean + log_std.exp() * zeta)
    cut = torch.ones(4, BATCH)
    cut[1:, :2] = 0
    for seed, real in (1, batch.real), (1, cut), (2, batch.real):
        torch.manual_seed(seed)
        results.append(objective(agent, batch._replace(real=real), 3, alpha=0.0))
    assert torch.equal(results[0], results[1])
    assert (results[0] != results[2]).tolist() == [True, True, False, False, False]


def test_the_entropy_along_a_segment_is_that_of_the_policy(monkeypatch):
    """Of actions that it draws in the states of the segment, and not of those that are stored."""
    monkeypatch.setattr(rp_pgm, "NOISE_MAX", math.inf)
    agent, batch, values = make_agent(estimator="dr", gamma=0.9), segments(3), []
    for alpha in 0.0, 0.3:
        torch.manual_seed(1)
        values.append(objective(agent, batch, 2, alpha=alpha))
    torch.manual_seed(1)
    expected = sum(-0.3 * 0.9**t * agent.actor.sample(batch.x[t])[1] for t in range(3))
    torch.testing.assert_close(values[1] - values[0], expected)


# --- ends of episodes -----------------------------------------------------------------------------


def test_the_reward_of_the_terminating_step_counts_and_nothing_after_it():
    """Against a loop: n_0 = 1, and n falls by 1 - d behind each reward."""
    agent, batch, gamma, alpha = make_agent(), segments(5), 0.9, 0.3
    torch.manual_seed(1)
    ours = objective(agent, batch, 4, alpha, gamma=gamma)
    torch.manual_seed(1)
    x, n, expected = batch.x[0], np.ones(BATCH), np.zeros(BATCH)
    for t in range(5):
        a, log_pi = agent.actor.sample(x)
        reward, log_odds = agent.model.outcome(x, a)
        value = agent.critic(x, a).amin(0) if t == 4 else reward
        expected += gamma**t * n * (value - alpha * log_pi).detach().numpy()
        n *= 1 / (1 + np.exp(log_odds.detach().numpy()))
        x = agent.model.step(x, a)
    np.testing.assert_allclose(ours.detach(), expected, rtol=1e-9)

    calls = iter([(1.0, -torch.inf), (2.0, torch.inf), (1e6, -torch.inf), (1e6, -torch.inf)])
    agent.model.outcome = lambda x, a: (torch.full((BATCH,), number) for number in next(calls))
    j = objective(agent, batch, 4, alpha=0.0, gamma=gamma)
    torch.testing.assert_close(j, torch.full((BATCH,), 1 + 2 * gamma))


def test_a_real_termination_cuts_what_follows(monkeypatch):
    monkeypatch.setattr(rp_pgm, "NOISE_MAX", math.inf)
    agent, batch = make_agent(estimator="dr"), segments(4, real=[2] * BATCH)
    batch.terminated[1] = 1
    j = objective(agent, batch, 3, alpha=0.0, gamma=0.9)
    torch.testing.assert_close(j, batch.reward[0] + 0.9 * batch.reward[1])


def test_the_critic_loss_is_that_of_the_transitions_row_by_row():
    agent, batch = make_agent(), segments(2, real=[2, 1, 0, 2, 1])
    batch.terminated[0, 1] = 1
    torch.manual_seed(1)
    networks = agent.actor, agent.critic, make_agent().critic
    torch.manual_seed(1)
    loss, q = rp_pgm.segment_critic_loss(*networks, batch, 0.3, 0.9)
    torch.manual_seed(1)
    a, log_pi = agent.actor.sample(batch.x[1])
    expected = 0.0
    for i in 0, 1, 3, 4:
        y = batch.reward[0, i]
        if i != 1:
            y = y + 0.9 * (networks[2](batch.x[1, i : i + 1], a[i : i + 1]).min() - 0.3 * log_pi[i])
        expected += (
            agent.critic(batch.x[0], batch.action[0])[:, i] - y.detach()
        ).square().sum() / 4
    torch.testing.assert_close(loss, expected)
    mine, theirs = (gradients(value, agent.critic.parameters()) for value in (loss, expected))
    torch.testing.assert_close(mine, theirs)
    assert not q.requires_grad and q.shape == (2, BATCH)


@settings(max_examples=30, deadline=None)
@given(stream=streams(), length=st.integers(1, 6))
def test_a_segment_never_leaves_its_episode_or_what_is_stored(stream, length):
    """Nor goes across the place to write; and every transition that is stored is drawn."""
    size = stream.slots * stream.num_envs + stream.spare
    buffer = rp_pgm.SegmentBuffer(size, stream.num_envs, 2, 2, CPU)
    for rows in stream.rows:
        obs, _, _, a, reward = (np.array(c) for c in zip(*[row.columns for row in rows]))
        flags = np.array([row.terminated for row in rows]), np.array([row.first for row in rows])
        buffer.add(torch.tensor(obs), torch.tensor(a), reward, *flags)
    written = len(stream.rows)
    times = range(max(0, written - stream.slots), written - 1)
    drawable = {stream.rows[t][e].uid: (t, e) for t in times for e in range(stream.num_envs)}
    batch = buffer.sample(40 * len(drawable), length, lambda obs: -obs)
    starts = [drawable[int(-uid)] for uid in batch.x[0, :, 0]]
    assert len(set(starts)) == len(drawable)
    for i, (t, e) in enumerate(starts):
        rows = [stream.rows[k][e] for k in range(t, min(t + length + 1, written))]
        together = [row for row in rows if row.episode == rows[0].episode]
        assert batch.real[:, i].sum() == len(together) - 1
        for k, row in enumerate(together):
            assert (-batch.x[k, i]).tolist() == row.columns[0]
            if k < len(together) - 1:  # a row that terminates is one, and has its successor
                assert batch.action[k, i].tolist() == row.columns[3]
                assert batch.reward[k, i] == row.columns[4]
                assert batch.terminated[k, i] == row.terminated
    expected = batch.real[0] / batch.real[0].sum().clamp(min=1)
    torch.testing.assert_close(batch.weight, expected)


# --- the model ------------------------------------------------------------------------------------


def test_the_model_is_trained_on_all_real_rows_and_on_no_others():
    """Row by row, open loop; the step into a terminal state is one of them."""
    model, batch = make_agent().model, segments(3, real=[3, 2, 1, 0, 3])
    batch.terminated[1, 1] = 1
    errors, rewards, nlls, count = 0.0, 0.0, 0.0, batch.real.sum()
    for i in range(BATCH):
        x = batch.x[0, i : i + 1]
        for t in range(int(batch.real[:, i].sum())):
            a, now = batch.action[t, i : i + 1], batch.x[t, i : i + 1]
            x = model.step(x, a)
            errors += (x - batch.x[t + 1, i]).square().mean() / count
            reward, log_odds = model.outcome(now, a)
            rewards += (reward - batch.reward[t, i]).square().sum() / count
            p = torch.sigmoid(log_odds)
            nlls -= torch.log(p if batch.terminated[t, i] else 1 - p).sum() / count
    found = rp_pgm.model_losses(model, batch)
    expected = dict(model_error=errors, reward_error=rewards, termination_loss=nlls)
    torch.testing.assert_close(found, expected)
    networks = model.dynamics, model.outcomes, model.outcomes
    for net, name in zip(networks, expected):
        mine, theirs = (gradients(loss[name], net.parameters()) for loss in (found, expected))
        torch.testing.assert_close(mine, theirs)


def test_a_probability_of_termination_is_a_frequency():
    """One in ten; a loss that weighs the classes alike would say one half."""
    model, batch = make_agent(width=8).model, segments(4)
    batch = batch._replace(x=0 * batch.x, action=0 * batch.action)
    batch.terminated[0, :2] = 1
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(300):
        rp_pgm.descend(optimizer, sum(rp_pgm.model_losses(model, batch).values()))
    p = torch.sigmoid(model.outcome(batch.x[0], batch.action[0])[1])
    torch.testing.assert_close(p, torch.full_like(p, 0.1), rtol=0.02, atol=0)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_the_normaliser_has_the_mean_and_the_std_of_all_it_was_shown(num_envs):
    norm, seen = rp_pgm.RunningNorm(OBS), 50 + 3 * torch.randn(60, OBS)
    seen[:, 2] *= 1e-6  # hardly moves: its std is held at .1
    for obs in seen.split(num_envs):
        norm.add(obs)
    std = seen.std(0, correction=0).clamp(min=0.1)
    torch.testing.assert_close(norm(seen), (seen - seen.mean(0)) / std)


def test_the_policy_acts_on_normalised_observations():
    actor = make_agent().actor
    actor.norm.add(5 + 3 * torch.randn(60, OBS))
    obs = 5 + 3 * torch.randn(BATCH, OBS)
    action, _ = actor.act(obs, deterministic=True)
    torch.testing.assert_close(action, torch.tanh(actor(actor.norm(obs))[0]))
    torch.manual_seed(1)
    action, _ = actor.act(obs)
    torch.manual_seed(1)
    torch.testing.assert_close(action, actor.sample(actor.norm(obs))[0])


def test_a_late_observation_still_moves_the_mean():
    torch.set_default_dtype(torch.float32)  # as in a run, where it would round the step off
    norm = rp_pgm.RunningNorm(1)
    norm.count.fill_(1_000_000_000 - 1)
    norm.mean.fill_(5.0)
    norm.add(torch.tensor([[6.0]]))
    assert norm.mean.item() == pytest.approx(5 + 1e-9, abs=1e-12)


# --- spectral normalisation -----------------------------------------------------------------------


def sigmas(net):
    return [torch.linalg.matrix_norm(layer.weight.detach(), 2).item() for layer in net[::2]]


@pytest.mark.parametrize("coef", [1.0, 1.5])
def test_normalised_layers_keep_their_norm_while_they_learn(coef):
    agent = make_agent(width=64, depth=3, sn_coef=coef)
    dynamics, optimizer = agent.model.dynamics, torch.optim.Adam(agent.model.parameters(), 1e-3)
    inputs, target = torch.randn(128, OBS + ACTION), 30 * torch.randn(128, OBS)
    largest = 0.0
    for _ in range(300):
        rp_pgm.descend(optimizer, (dynamics(inputs) - target).square().mean())
        rp_pgm.power_iteration(dynamics)
        largest = max(largest, *sigmas(dynamics)[:-1])
    *normalised, output = sigmas(dynamics)
    assert min(normalised) > coef - 1e-9
    assert largest < 1.2 * coef  # W moves: sigma lags behind, by up to 1.29 with one iteration
    for _ in range(30):
        rp_pgm.power_iteration(dynamics)
    assert sigmas(dynamics)[:-1] == pytest.approx(3 * [coef], rel=2e-3)
    assert output > 1.2
    assert min(sigmas(agent.model.outcomes)) == pytest.approx(1)  # not trained here


@pytest.mark.parametrize("layers, of_policy, of_model", [
    ("reference", [0, 1, 1, 0], [1, 1, 1, 0]), ("all", [1, 1, 1, 1], [1, 1, 1, 1])
])  # fmt: skip
@pytest.mark.parametrize("chosen", ["model", "policy", "both", "none"])
def test_which_layers_are_normalised(chosen, layers, of_policy, of_model):
    agent = make_agent(spectral_norm=chosen, sn_layers=layers, depth=3)
    for name, net, expected in (
        ("policy", agent.actor.net, of_policy), ("model", agent.model.dynamics, of_model)
    ):  # fmt: skip
        found = [parametrize.is_parametrized(layer) for layer in net[::2]]
        assert found == [bool(one and chosen in (name, "both")) for one in expected]
    others = [agent.critic, agent.model.outcomes]
    assert not any(parametrize.is_parametrized(m) for net in others for m in net.modules())


def test_all_variants_begin_as_the_same_function():
    x, outputs = torch.randn(BATCH, OBS), []
    for options in dict(), dict(sn_layers="all"), dict(spectral_norm="none"):
        torch.manual_seed(4)
        agent = make_agent(**options)
        mean, log_std = agent.actor(x)
        outputs.append([mean, log_std, agent.model.step(x, mean), agent.critic(x, mean)])
        assert sigmas(agent.actor.net) + sigmas(agent.model.dynamics) == pytest.approx(6 * [1])
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(outputs[2], outputs[0])


def test_weights_are_normalised_once_in_an_unroll_and_not_changed_by_it():
    agent, calls = make_agent(), []
    norms = [m for m in agent.modules() if isinstance(m, rp_pgm.SpectralNorm)]
    for norm in norms:
        norm.register_forward_hook(lambda *call: calls.append(call[0]))
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    calls.clear()
    objective(agent, segments(7), 6)
    assert len(calls) == len(norms) == 3
    agent.actor.act(torch.randn(BATCH, OBS))
    assert all(torch.equal(value, before[name]) for name, value in agent.state_dict().items())


def test_lipschitz_constants_are_those_of_a_linear_problem():
    agent = make_agent(depth=0, spectral_norm="none")
    agent.actor.net[-1].weight.data *= 1e-6  # so that a is tanh .5
    agent.actor.net[-1].bias.data[:] = 0.5
    weight = agent.model.dynamics[0].weight
    result = agent.lipschitz(filled(agent))
    expected = torch.linalg.matrix_norm(torch.eye(OBS) + weight[:, :OBS], 2)
    torch.testing.assert_close(result["lipschitz/model"], expected)
    torch.testing.assert_close(result["lipschitz/model_0"], torch.linalg.matrix_norm(weight, 2))
    policy = torch.linalg.matrix_norm(agent.actor.net[0].weight[:ACTION], 2)
    torch.testing.assert_close(result["lipschitz/policy"], policy / math.cosh(0.5) ** 2)


# --- the variance of the gradient -----------------------------------------------------------------


def test_the_variance_is_that_of_independent_gaussian_gradients():
    theta, other = torch.zeros(4, requires_grad=True), torch.zeros(2, requires_grad=True)
    std, mean = torch.tensor([1.0, 2.0, 3.0, 0.5]), torch.tensor([2.0, 0.0, 1.0, 0.0])
    drawn = mean + std * torch.randn(600, 4)
    total, relative = rp_pgm.gradient_variance(drawn @ theta + other.sum(), [theta, other])
    assert total == pytest.approx(std.square().sum().item(), rel=0.1)
    assert relative == pytest.approx((std.square().sum() / (mean.square().sum() + 2)).item(), 0.1)
    assert theta.grad is None


def test_measuring_changes_nothing_and_leaves_ends_of_episodes_out(monkeypatch):
    samples, variance = [], rp_pgm.gradient_variance
    monkeypatch.setattr(
        rp_pgm, "gradient_variance", lambda j, p: samples.append(len(j)) or variance(j, p)
    )
    asked, unroll = [], rp_pgm.unrolled_return
    monkeypatch.setattr(
        rp_pgm, "unrolled_return",
        lambda *x: asked.append((x[-2].estimator, x[-1])) or unroll(*x),
    )  # fmt: skip
    agent = make_agent(estimator="dr")
    buffer = filled(agent)
    agent.update(buffer)
    held = {name: value.clone() for name, value in agent.state_dict().items()}
    grads = [p.grad.clone() for p in agent.parameters() if p.grad is not None]
    asked.clear()
    measured = agent.variances(buffer) | agent.lipschitz(buffer)
    assert asked == [("dr", h) for h in (1, 2, 4, 8, 16)]
    assert 5 * 32 - 20 < sum(samples) < 5 * 32  # one row in twenty is no transition
    assert {f"gradient/{k}_{h}" for k in ("variance", "relative") for h in (1, 16)} < set(measured)
    assert all(value.isfinite() and value > 0 for value in measured.values())
    assert all(torch.equal(value, held[name]) for name, value in agent.state_dict().items())
    now = [p.grad for p in agent.parameters() if p.grad is not None]
    assert all(map(torch.equal, grads, now)) and len(grads) == len(now)


# --- updates and runs -----------------------------------------------------------------------------


def test_each_step_moves_its_own_parameters_and_touches_no_other(monkeypatch):
    agent, moved, descend = make_agent(model_updates=2), [], rp_pgm.descend
    named = dict(agent.named_parameters())

    def watched(optimizer, loss):
        held = {name: p.detach().clone() for name, p in named.items()}
        grads = {name: p.grad if p.grad is None else p.grad.clone() for name, p in named.items()}
        descend(optimizer, loss)
        changed = {name.split(".")[0] for name, p in named.items() if (p != held[name]).any()}
        for name, p in named.items():
            if name.split(".")[0] not in changed:
                assert p.grad is grads[name] or torch.equal(p.grad, grads[name])
        moved.append(changed)

    monkeypatch.setattr(rp_pgm, "descend", watched)
    old = copy.deepcopy(agent)
    losses = agent.update(filled(agent))
    assert moved == [{"model"}, {"model"}, {"critic"}, {"actor", "log_alpha"}]
    parts = (x.parameters() for x in (old.target_critic, agent.target_critic, agent.critic))
    for before, new, theta in zip(*parts):  # the target follows the new critic
        torch.testing.assert_close(new, before + 0.005 * (theta - before))
    pairs = zip(agent.modules(), old.modules())
    norms = [pair for pair in pairs if isinstance(pair[0], rp_pgm.SpectralNorm)]
    assert len(norms) == 3 and all((new.v != old.v).any() for new, old in norms)
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_an_update_descends_these_losses(monkeypatch):
    """Those of the functions above, over the rows that are transitions; parameters stay here."""
    losses, lengths, alpha = [], [], 0.1
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    monkeypatch.setattr(rp_pgm, "descend", lambda optimizer, loss: losses.append(loss.item()))
    agent = make_agent(spectral_norm="none", model_length=2, entropy_start=0.5, entropy_end=0.5)
    for theta in agent.target_critic.parameters():
        theta.mul_(1.1)
    target, batch = copy.deepcopy(agent.target_critic), segments(4, real=[4, 3, 0, 1, 0])

    def sample(size, length, norm):
        lengths.append((length, norm))
        return batch

    logged = agent.update(SimpleNamespace(sample=sample))
    assert lengths == [(2, agent.actor.norm), (4, agent.actor.norm)]
    q_loss, _ = rp_pgm.segment_critic_loss(agent.actor, agent.critic, target, batch, alpha, 0.99)
    entropy = -(batch.weight * agent.actor.sample(batch.x[0])[1]).sum()
    j = (batch.weight * objective(agent, batch, 3, alpha)).sum()
    expected = [sum(rp_pgm.model_losses(agent.model, batch).values()), q_loss]
    expected += [-j + alpha * (entropy - ACTION * 0.5)]
    assert losses == pytest.approx([value.item() for value in expected])
    assert logged["losses/actor_loss"] == pytest.approx(-j.item())
    assert logged["losses/entropy"] == pytest.approx(entropy.item())


@pytest.mark.parametrize("options, warm_up, update", [
    (dict(), 0, 3), (dict(estimator="dr", horizon=5), 0, 5), (dict(estimator="model-free"), 0, 0)
])  # fmt: skip
def test_how_far_the_actor_looks(options, warm_up, update, monkeypatch):
    horizons, unroll = [], rp_pgm.unrolled_return
    monkeypatch.setattr(
        rp_pgm, "unrolled_return", lambda *args: horizons.append(args[-1]) or unroll(*args)
    )
    agent = make_agent(**options)
    buffer = filled(agent)
    agent.warm_up(buffer), agent.update(buffer)
    assert horizons == [warm_up, update]


def test_the_temperature_follows_the_schedule_of_its_target():
    """.1 + .5 (1 - t / T)^2 nats for each component; behind T, .1."""
    for count, target in (0, 0.6), (50, 0.225), (100, 0.1), (150, 0.1):
        for shift in -0.02, 0.02:
            agent = make_agent(entropy_start=0.6, entropy_end=0.1, entropy_power=2.0)
            agent.actor.norm.count.fill_(count)
            log_pi = torch.full((16,), -ACTION * (target + shift))
            agent.actor.sample = lambda x, log_pi=log_pi: (torch.zeros(16, ACTION), log_pi)
            before = agent.log_alpha.item()
            agent.update(filled(agent))
            assert (agent.log_alpha.item() < before) == (shift > 0)


@pytest.mark.parametrize("estimator", ["dp", "dr"])
def test_replayed_graphs_are_the_updates(estimator):
    torch.set_default_dtype(torch.float32)
    states, graphs = [], []
    for cudagraphs in False, True:
        made = mock.Mock(side_effect=lambda: graphs.append(Recording()) or graphs[-1])
        with mock.patch.multiple(torch.cuda, **emulated_cuda(made)):
            torch.manual_seed(2)
            agent = make_agent(estimator=estimator, cudagraphs=cudagraphs, batch_size=8)
            buffer = filled(agent, 60)
            for step in range(16):
                obs = torch.randn(1, OBS)
                action, _ = agent.act(obs)
                (agent.warm_up if step < 7 else agent.update)(buffer)
                buffer.add(obs, action, *np.array([[0.5], [step % 8 == 7], [step % 9 == 0]]))
                agent.observe(obs)
            states.append({name: value.clone() for name, value in agent.state_dict().items()})
    assert len(graphs) == 4 and all(graph.replays >= 4 for graph in graphs)
    torch.testing.assert_close(*states)


def test_a_run_is_the_same_whether_it_measures_or_not(tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    command = "rp_pgm.py --env-id CueRecall-v0 --total-timesteps 40 --learning-starts 20 --width 8"
    command += " --warmup-steps 0 --batch-size 8 --eval-frequency 0"
    agents, calls = [], []
    for name in "variances", "lipschitz":
        measure = getattr(rp_pgm.RPPGM, name)
        counted = lambda *x, measure=measure: calls.append(measure) or measure(*x)  # noqa: E731
        monkeypatch.setattr(rp_pgm.RPPGM, name, counted)
    for every in "0", "10":
        options = ["--grad-var-every", every, "--lipschitz-every", every, "--exp-name", every]
        monkeypatch.setattr("sys.argv", command.split() + options)
        rp_pgm.train(rp_pgm.parse_args())
        (checkpoint,) = tmp_path.glob(f"runs/*__{every}__1__*/checkpoint.pt")
        agents.append(torch.load(checkpoint)["agent"])
    assert all(torch.equal(value, agents[1][name]) for name, value in agents[0].items())
    assert len(calls) == 4  # both, at steps 30 and 40 of the second run


def test_a_run_is_stopped_goes_on_and_its_policy_is_exported(tmp_path, monkeypatch, capsys):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    counts, update = [], rp_pgm.RPPGM.learn

    def watched(agent, buffer, horizon):
        counts.append(horizon)
        if len(counts) == 15:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(agent, buffer, horizon)

    monkeypatch.setattr(rp_pgm.RPPGM, "learn", watched)
    command = "rp_pgm.py --env-id CueRecall-v0 --total-timesteps 60 --learning-starts 20 --width 8"
    command += " --warmup-steps 30 --batch-size 8 --eval-episodes 2 --num-envs 2 --save-buffer"
    command += " --grad-var-every 25 --lipschitz-every 25 --horizon 2"
    monkeypatch.setattr("sys.argv", command.split())
    with pytest.raises(SystemExit) as stop:
        rp_pgm.train(rp_pgm.parse_args())
    assert stop.value.code == 128 + signal.SIGTERM
    (run,) = (tmp_path / "runs").iterdir()
    monkeypatch.setattr("sys.argv", ["rp_pgm.py", "--resume", str(run)])
    rp_pgm.train(rp_pgm.parse_args())
    assert counts == 10 * [0] + (len(counts) - 10) * [2] and len(counts) > 35
    evaluate.main(evaluate.Options(run, episodes=2))
    assert "2 episodes" in capsys.readouterr().out
    evaluate.main(evaluate.Options(run, export=tmp_path / "policy.pt2"))
    program = torch.export.load(tmp_path / "policy.pt2").module()
    obs = torch.full((2,), 0.3)
    action, z = program(obs, torch.zeros(1), torch.zeros(1))
    agent = evaluate.load(run, 1)[2]
    expected, _ = agent.actor.act(obs.unsqueeze(0), torch.zeros(1, 0), deterministic=True)
    torch.testing.assert_close(action, expected.squeeze(0))
    assert agent.actor.norm.count >= 60 and z.tolist() == [1]
    for number, handler in handlers.items():
        signal.signal(number, handler)
