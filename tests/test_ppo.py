"""S2PG-PPO and BPTT-PPO: advantages, rollouts, sequences, losses, and what one update does."""

import copy
import itertools
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal

import bptt_ppo
import s2pg_ppo

OBS, CRITIC, ACTION, STATE = 3, 4, 2, 6
CPU = torch.device("cpu")
SCRIPTS = pytest.mark.parametrize("script", [s2pg_ppo, bptt_ppo], ids=lambda s: s.__name__)
RNN = pytest.mark.parametrize("rnn", ["gru", "lstm", "rnn"])
random_tests = settings(max_examples=30, deadline=None)
pytestmark = pytest.mark.usefixtures("double_precision")


def make_agent(script, **options):
    options = dict(
        state_dim=STATE, num_envs=3, num_steps=40, num_minibatches=4, update_epochs=1
    ) | options  # fmt: skip
    sizes = dict(policy=OBS, critic=CRITIC)
    env = SimpleNamespace(
        single_observation_space={k: gym.spaces.Box(-9, 9, (n,)) for k, n in sizes.items()},
        single_action_space=gym.spaces.Box(-1, 1, (ACTION,)),
    )
    return script.Agent(script.Args(**options), env, CPU)


# --- rollouts made by hand ------------------------------------------------------------------------


def lanes(plans, steps, offsets):
    """`first` and `final` [steps + 1, N] and `terminated` [steps, N] of a rollout.

    Each environment plays its plan, pairs of a length and whether the episode terminates, over and
    over; the rollout begins `offsets` rows later. T transitions fill T + 1 rows.
    """
    columns = []
    for plan, offset in zip(plans, offsets):
        rows = []
        while len(rows) < offset + steps + 1:
            for length, terminates in plan:
                for k in range(length + 1):
                    rows.append((k == 0, k == length, terminates and k == length - 1))
        columns.append(rows[offset : offset + steps + 1])
    first, final, terminated = torch.tensor(columns).permute(2, 1, 0)
    return first, final, terminated[:-1]


@st.composite
def random_lanes(draw):
    num_envs, steps = draw(st.integers(1, 3)), draw(st.integers(2, 20))  # as Args allows
    plan = st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=5)
    plans, offsets = ([draw(x) for _ in range(num_envs)] for x in (plan, st.integers(0, 15)))
    return lanes(plans, steps, offsets)


SOME_LANES = lanes(  # terminated and truncated, cut at both ends, a final row first and one last
    [[(7, True), (3, False), (1, True)], [(4, False), (9, True)], [(5, True)]], 40, [0, 4, 0]
)
WHOLE_EPISODES = lanes([[(8, True), (6, True), (2, False)]] * 3, 19, [0, 0, 0])


def fill(agent, first, final, terminated):
    """A rollout as `train` collects it, of random observations and rewards."""
    rollout = s2pg_ppo.Rollout(agent.args.num_steps, 3, agent.row_sizes, CPU)
    z = torch.rand(3, agent.z_dim) * ~first[0].unsqueeze(-1)
    a_prev = torch.rand(3, ACTION) * ~first[0].unsqueeze(-1)
    for t in range(len(first)):
        seen = torch.randn(3, OBS), torch.randn(3, CRITIC)
        sample, z_next, log_prob, value = agent.act(*seen, z, a_prev)
        if t == len(first) - 1:
            rollout.finish(value, first[t].numpy())
            break
        reward, ends, begins = torch.randn(3).numpy(), terminated[t].numpy(), first[t].numpy()
        rollout.add(*seen, z, a_prev, sample, log_prob, value, reward, ends, begins)
        keep = ~final[t].unsqueeze(-1)
        z, a_prev = z_next * keep, sample[:, :ACTION].clamp(-1, 1) * keep
    return rollout


def valid(rollout):
    return rollout.first[1:] == 0


def watch(agent, monkeypatch):
    """Notes the minibatch and the gradients of actor and critic of every later loss."""
    seen, loss_function = [], agent.loss

    def watched(actor, critic, batch, args):
        loss, losses = loss_function(actor, critic, batch, args)
        gradients = [
            torch.autograd.grad(loss, list(m.parameters()), retain_graph=True, allow_unused=True)
            for m in (actor, critic)
        ]
        seen.append(SimpleNamespace(batch=batch, gradients=gradients, losses=losses))
        return loss, losses

    monkeypatch.setattr(agent, "loss", watched)
    return seen


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors if t is not None])


# --- advantages -----------------------------------------------------------------------------------


def advantages_by_hand(rollout, gamma=0.99, gae_lambda=0.95):
    """sum_k (gamma lambda)^k delta_{t+k}, over the transitions of the episode from row t on."""
    value = rollout.value
    advantage = torch.zeros_like(value[:-1])
    for t, n in np.ndindex(*advantage.shape):
        for k in range(t, len(advantage)):
            if rollout.first[k + 1, n]:
                break  # row k is the final row of the episode
            next_value = 0.0 if rollout.terminated[k, n] else value[k + 1, n]
            delta = rollout.reward[k, n] + gamma * next_value - value[k, n]
            advantage[t, n] += (gamma * gae_lambda) ** (k - t) * delta
    return advantage


@random_tests
@given(lanes=random_lanes(), gamma=st.floats(0, 0.999), gae_lambda=st.floats(0, 1))
def test_advantages_are_those_of_a_loop_over_each_episode(lanes, gamma, gae_lambda):
    first, _, terminated = lanes
    terminated = nn.functional.pad(terminated.double(), (0, 0, 0, 1))
    reward, value = torch.randn(first.shape), 10 * torch.randn(first.shape)
    rollout = SimpleNamespace(
        reward=reward, value=value, terminated=terminated, first=first.double()
    )
    expected = advantages_by_hand(rollout, gamma, gae_lambda)
    actual = s2pg_ppo.gae(rollout, 1 - rollout.first[1:], gamma, gae_lambda)
    torch.testing.assert_close(actual, expected)
    assert not actual[first[1:]].any()


# --- sequences ------------------------------------------------------------------------------------


@random_tests
@given(lanes=random_lanes(), length=st.integers(1, 16) | st.just(10**9))
def test_sequences_partition_the_transitions_and_cross_no_episode(lanes, length):
    first, final, _ = lanes
    times, envs, mask = bptt_ppo.cut(first, length)
    assert times.shape == mask.shape and times.shape[1] == len(envs) and mask[0].all()
    assert len(times) <= length and mask.any(1).all()  # no longer than the longest
    seen = []
    for column, env in enumerate(envs.tolist()):
        count = int(mask[:, column].sum())
        assert not mask[count:, column].any()  # no holes
        run = times[:count, column].tolist()
        assert run == list(range(run[0], run[0] + count))
        assert not first[run[1:], env].any() and not final[run, env].any()
        seen += [(t, env) for t in run]

        # it begins with the rollout, with an episode, or `length` rows after another ...
        begin = max([t for t in range(run[0] + 1) if first[t, env]], default=0)
        assert (run[0] - begin) % length == 0
        # ... and ends with the rollout, with an episode, or after `length` rows
        end = run[-1] + 1
        assert count == length or end == len(first) - 1 or final[end, env]
    transitions = [(t, n) for t, n in np.ndindex(*first[1:].shape) if not first[t + 1, n]]
    assert sorted(seen) == transitions
    # rows outside of the mask are looked up, too
    assert ((times >= 0) & (times < len(first) - 1)).all()


def test_the_recurrent_layer_is_given_contiguous_states():
    """cuDNN takes no others: "rnn: hx is not contiguous"."""
    agent, given = make_agent(bptt_ppo, rnn="lstm"), []
    for network in (agent.actor, agent.critic):
        network.layer.register_forward_pre_hook(lambda layer, inputs: given.extend(inputs[1]))
    agent.update(fill(agent, *SOME_LANES))
    assert len(given) > 40 and all(state.is_contiguous() for state in given)


# --- rollouts made by `train` ---------------------------------------------------------------------

PENDULUM = dict(env_id="InvertedPendulum-v4", env_kwargs=dict(max_episode_steps=6))
CUE = dict(env_id="CueRecall-v0", env_kwargs=dict(horizon=5))


@SCRIPTS
@pytest.mark.parametrize(("task", "anneal"), [(PENDULUM, True), (CUE, False)])
def test_a_rollout_holds_what_was_seen_and_done(script, task, anneal, tmp_path, monkeypatch):
    """Of the internal state tests/test_scripts.py knows.

    The learning rate falls linearly from the full one, by the steps done before each rollout. A
    rollout that the run does not complete is not learned from.
    """
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    rollouts, acts, steps, make_env = [], [], [], script.make_env

    class Watched(script.Agent):
        def act(self, *inputs):
            acts.append((inputs, super().act(*inputs)))
            return acts[-1][1]

        def update(self, rollout):
            rollouts.append(copy.deepcopy(rollout))
            rollouts[-1].lr = self.optimizer.param_groups[0]["lr"].item()
            return super().update(rollout)

    def watched_env(*args):
        env = make_env(*args)
        step = env.step
        monkeypatch.setattr(env, "step", lambda a: steps.append((a, step(a))) or steps[-1][1])
        return env

    monkeypatch.setattr(script, "Agent", Watched)
    monkeypatch.setattr(script, "make_env", watched_env)
    script.train(script.Args(
        **task, num_envs=3, num_steps=20, total_timesteps=160, num_minibatches=1, update_epochs=1,
        learning_rate=0.01, state_dim=STATE, eval_frequency=0, std=0.8, anneal_lr=anneal,
    ))  # fmt: skip

    for last, following in zip(acts[20::21], acts[21::21]):  # V of the row after the rollout
        assert all(map(torch.equal, last[0], following[0]))
    first, final, acts, steps = np.ones(3, bool), np.zeros(3, bool), iter(acts), iter(steps)
    left, clipped = 160, 0
    for rollout in rollouts:
        assert math.isclose(rollout.lr, 0.01 * left / 160 if anneal else 0.01, rel_tol=1e-6)
        for t in range(21):
            (obs, state, z, a_prev), (sample, _, log_prob, value) = next(acts)
            if t == 20:  # the next rollout begins with this row
                assert torch.equal(rollout.value[t], value)
                assert rollout.first[t].tolist() == first.tolist()
                break
            played, (_, reward, terminated, truncated, _) = next(steps)
            numbers = (torch.as_tensor(x).float() for x in (reward, terminated, first))
            numbers = torch.cat([log_prob, torch.stack([value, *numbers], -1)], -1)
            row = torch.cat([obs, state, z, a_prev, sample, numbers], -1)
            assert torch.equal(rollout.rows[t], row)
            action = sample[:, : a_prev.shape[1]]
            assert torch.equal(torch.tensor(played), action.clamp(-1, 1))
            clipped += int((action.abs() > 1).sum())
            left -= int((~final).sum())
            first, final = final, terminated | truncated
    assert clipped > 0 and len(rollouts) >= 2 and 0 < left < 60


@pytest.mark.parametrize(
    "script, options",
    [
        (s2pg_ppo, dict(rnn="gru")), (s2pg_ppo, dict(rnn="lstm")), (s2pg_ppo, dict(rnn="rnn")),
        (s2pg_ppo, dict(memoryless=True)), (bptt_ppo, dict(rnn="gru", sequence_length=1)),
        (bptt_ppo, dict(rnn="lstm", sequence_length=3)), (bptt_ppo, dict(rnn="rnn")),
    ],
)  # fmt: skip
def test_the_ratio_is_one_before_the_first_step(script, options, monkeypatch):
    """And values are those of acting, although the normalisers have new statistics.

    In sequences, from the internal states at their beginning.
    """
    agent = make_agent(script, num_minibatches=1, learning_rate=0.01, **options)
    seen = watch(agent, monkeypatch)
    for k in range(3):
        rollout = fill(agent, *SOME_LANES)
        agent.update(rollout)
        losses = dict(zip(script.LOSSES, seen[k].losses))
        assert losses["approx_kl"] < 1e-12
        args = agent.args
        advantage = advantages_by_hand(rollout, args.gamma, args.gae_lambda)[valid(rollout)]
        error = advantage / agent.critic.returns.std  # of V: the returns are advantage + V
        torch.testing.assert_close(losses["value_loss"], error.square().mean() / 2)


# --- policy gradients -----------------------------------------------------------------------------


def outputs_through_time(network, rollout, obs, z, length):
    """Outputs [T, N, .] by single steps, whose gradient goes back to every `length`-th row."""
    outputs = []
    for n in range(3):
        age = 0
        for t in range(len(obs)):
            age = 0 if rollout.first[t, n] else age
            if age % length == 0:
                memory = z[t, n : n + 1]
            a_prev = rollout.a_prev[t, n : n + 1]
            output, memory = network.step(obs[t, n : n + 1], memory, a_prev)
            outputs.append(output)
            age += 1
    return torch.cat(outputs).view(3, len(obs), -1).transpose(0, 1)


@RNN
@pytest.mark.parametrize("separate", [False, True])
def test_the_first_gradient_of_s2pg_is_that_of_reinforce(separate, rnn, monkeypatch):
    """-E[grad log pi(a_t, z_{t+1} | o_t, z_t, a_{t-1}) G_t], rows alone: lambda = 1 and V = 0."""
    agent = make_agent(
        s2pg_ppo, rnn=rnn, num_steps=19, gamma=0.9, gae_lambda=1.0, norm_adv=False, vf_coef=0.0,
        num_minibatches=1, separate_ratios=separate,
    )  # fmt: skip
    nn.init.zeros_(agent.critic.head.weight), nn.init.zeros_(agent.critic.head.bias)
    rollout, seen = fill(agent, *WHOLE_EPISODES), watch(agent, monkeypatch)
    to_go, actor, objective = advantages_by_hand(rollout, 0.9, 1.0), agent.actor, 0  # as V is 0
    for t, n in valid(rollout)[:-1].nonzero():
        row = actor.normalizer(rollout.obs[t, n]), rollout.z[t, n], rollout.a_prev[t, n]
        density = Normal(actor(*(x.unsqueeze(0) for x in row)).squeeze(0), actor.log_std.exp())
        sample = torch.cat([rollout.sample[t, n, :ACTION], rollout.z[t + 1, n]])
        log_prob = density.log_prob(sample)
        parts = log_prob.split([ACTION, agent.z_dim] if separate else [ACTION + agent.z_dim])
        stored = torch.stack([part.sum() for part in parts]).detach()
        torch.testing.assert_close(rollout.log_prob[t, n], stored)
        objective = objective + to_go[t, n] * log_prob.sum()
    expected = torch.autograd.grad(-objective / valid(rollout).sum(), list(actor.parameters()))
    assert all(grad.any() for grad in expected)
    agent.update(rollout)
    torch.testing.assert_close(flat(seen[0].gradients[0]), flat(expected))
    assert not flat(seen[0].gradients[1]).any()


def test_without_a_memory_there_is_one_ratio():
    agent = make_agent(s2pg_ppo, memoryless=True, separate_ratios=True)
    assert agent.actor.parts == [ACTION]


@pytest.mark.parametrize("rnn, length", [("gru", 1), ("lstm", 3), ("gru", 64)])
def test_gradients_through_time_equal_those_of_a_loop_of_single_steps(rnn, length, monkeypatch):
    """Of policy and value, over episodes that the rollout cuts; back to a sequence's first row."""
    agent = make_agent(bptt_ppo, rnn=rnn, sequence_length=length, num_minibatches=1, vf_coef=0.7)
    with torch.no_grad():  # a strong recurrence, so that no gradient through it goes unseen
        for network in (agent.actor, agent.critic):
            network.layer.weight_hh_l0 *= 2
    rollout, seen = fill(agent, *SOME_LANES), watch(agent, monkeypatch)
    is_valid, actor, critic = valid(rollout), agent.actor, copy.deepcopy(agent.critic)
    advantage = advantages_by_hand(rollout)[is_valid]
    returns = advantage + rollout.value[:-1][is_valid]
    with torch.no_grad():
        bptt_ppo.update_returns(critic.returns, critic.head, returns, torch.ones(len(returns)))

    def gradient(length):
        z_actor, z_critic = rollout.z[:-1].split([actor.z_dim, critic.z_dim], -1)
        mean = outputs_through_time(actor, rollout, rollout.obs[:-1], z_actor, length)
        density = Normal(mean, actor.log_std.exp()).log_prob(rollout.sample[:-1])
        log_prob = density.sum(-1)[is_valid]
        value = outputs_through_time(critic, rollout, rollout.state[:-1], z_critic, length)
        value = value.squeeze(-1)[is_valid]
        a = (advantage - advantage.mean()) / advantage.std(correction=0)
        error = value - critic.returns(returns)
        loss = -(log_prob * a).mean() + 0.7 * error.square().mean() / 2
        return flat(torch.autograd.grad(loss, [*actor.parameters(), *critic.parameters()]))

    expected = gradient(length)
    other = gradient({1: 3, 3: 64, 64: 3}[length])
    agent.update(rollout)
    actual = torch.cat([flat(gradients) for gradients in seen[0].gradients])
    torch.testing.assert_close(actual, expected)
    # sharp: longer or shorter sequences have another gradient
    assert (other - expected).norm() > 0.002 * expected.norm()


# --- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2])
def test_the_loss_is_that_of_its_rows_with_weight(parts):
    """Row by row, with its gradient. Of rows without, rho may be infinite: times 0 it is NaN.

    It is flat where rho has gone far enough: above 1.2 if A > 0, below .8 otherwise. Of several
    parts each has a rho, and the loss of the policy is their sum.
    """
    value, advantage, returns = 0.4 * torch.randn(3, 90)
    log_prob, old_log_prob = 0.4 * torch.randn(2, 90, parts)
    log_std, weight = torch.tensor([0.3, -1.0]), (torch.arange(90) % 3 > 0).double()
    old_log_prob[weight == 0] = -1e9
    given = [x.requires_grad_() for x in (log_prob, value, log_std)]
    args = s2pg_ppo.Args(clip_coef=0.2, vf_coef=0.3, ent_coef=0.01)
    batch = SimpleNamespace(
        old_log_prob=old_log_prob, advantage=advantage, returns=returns, weight=weight
    )
    loss, losses = s2pg_ppo.ppo_loss(*given, batch, args)

    rows = []
    for k in weight.nonzero().flatten():
        log_ratio, A, error = log_prob[k] - old_log_prob[k], advantage[k], value[k] - returns[k]
        ratio = log_ratio.exp()
        policy_loss = -A * (ratio.clamp(max=1.2) if A > 0 else ratio.clamp(min=0.8)).sum()
        kl, far = (ratio - 1 - log_ratio).sum(), (abs(ratio - 1) > 0.2).double().mean()
        rows.append(torch.stack([policy_loss, error**2 / 2, -log_ratio.sum(), kl, far]))
    means, entropy = torch.stack(rows).mean(0), Normal(0, log_std.exp()).entropy().sum()
    expected = means[0] + 0.3 * means[1] - 0.01 * entropy
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(losses, torch.stack([*means, entropy]).detach())
    assert 0.1 < losses[4] < 0.9 and s2pg_ppo.LOSSES[4] == "clipfrac"
    ours, theirs = (torch.autograd.grad(x, given) for x in (loss, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("column", [0, 1])
def test_shapes_that_would_broadcast_are_refused(column):
    """[B, 1] beside [B] gives B x B products, and a gradient that all but vanishes."""
    x = [torch.randn(5, 1), torch.randn(5)]
    x[column] = x[column].unsqueeze(-1)
    with pytest.raises(AssertionError, match=r"\[B, 1\]"):
        s2pg_ppo.ppo_loss(*x, torch.ones(2), SimpleNamespace(weight=torch.ones(5)), None)


# --- normalisers ----------------------------------------------------------------------------------


@random_tests
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    shape=st.sampled_from([(), (3,)]),
    seed=st.integers(0, 1000),
)
def test_a_normaliser_has_the_mean_and_variance_of_all_it_was_shown(sizes, shape, seed):
    """Of rows with weight, that is, in a batch of one dimension or of two."""
    generator = torch.Generator().manual_seed(seed)
    normalizer, shown = s2pg_ppo.RunningNormalizer(*shape), []
    for k, n in enumerate(sizes):
        x = 3 + k + (1 + k) * torch.randn(n, 2, *shape, generator=generator)
        weight = (torch.rand(n, 2, generator=generator) < 0.7).double()
        weight[0, 0] = 1
        shown.append(x[weight > 0])
        flat = (x.flatten(0, 1), weight.flatten()) if k % 2 else (x, weight)
        normalizer.update(*flat)
    x = torch.cat(shown)
    assert normalizer.mean.shape == normalizer.var.shape == shape and normalizer.count == len(x)
    torch.testing.assert_close(normalizer.mean, x.mean(0))
    torch.testing.assert_close(normalizer.var, x.var(0, correction=0))
    if len(x) > 1:
        torch.testing.assert_close(normalizer(x) * normalizer.std + normalizer.mean, x)


@SCRIPTS
def test_what_is_seen_is_clipped_at_ten_standard_deviations_and_returns_are_not(script):
    agent = make_agent(script)
    for normalizer in agent.actor.normalizer, agent.critic.normalizer:
        one = torch.ones_like(normalizer.mean)
        normalizer.update(torch.stack([one, 5 * one]), torch.ones(2))  # mean 3, std 2
        x = torch.stack([7 * one, -100 * one, 100 * one])
        expected = torch.stack([2 * one, -10 * one, 10 * one])
        torch.testing.assert_close(normalizer(x), expected)
    returns = agent.critic.returns
    returns.update(torch.full((9,), 3.0), torch.ones(9))  # the least std of returns is .01
    torch.testing.assert_close(returns(torch.tensor([4.0])), torch.tensor([100.0]))
    fresh = s2pg_ppo.RunningNormalizer(1)(torch.tensor([0.5]))  # it has seen nothing yet
    torch.testing.assert_close(fresh, torch.tensor([0.5]))


def test_new_statistics_of_the_returns_leave_every_value_as_it_is():
    critic = make_agent(s2pg_ppo).critic
    returns, head = critic.returns, critic.head
    features = torch.randn(20, head.in_features)
    for data in (torch.tensor([3.0, 50.0, 10.0]), torch.tensor([-1e3]), 1e4 * torch.rand(9)):
        before, old = returns.mean + returns.std * head(features), returns.mean.item()
        with torch.no_grad():
            s2pg_ppo.update_returns(returns, head, data, torch.ones(len(data)))
        torch.testing.assert_close(returns.mean + returns.std * head(features), before)
        assert returns.mean.item() != old
    assert head.weight.requires_grad and head.weight.is_leaf


# --- updates --------------------------------------------------------------------------------------


@SCRIPTS
@pytest.mark.parametrize(("minibatches", "norm_adv"), [(1, True), (7, False), (40, True)])
def test_every_epoch_has_each_transition_once_and_in_another_order(
    script, minibatches, norm_adv, monkeypatch
):
    """In minibatches of one size, or of sequences, one more or less. A rest of rows may be left.

    With its own columns. Advantages are normalised over the rollout: one sequence has no other to
    compare with.
    """
    options = dict(num_minibatches=minibatches, update_epochs=2, norm_adv=norm_adv)
    options |= dict(sequence_length=5) if script is bptt_ppo else {}
    agent = make_agent(script, gamma=0.9, gae_lambda=0.8, **options)
    agent.critic.returns.update(torch.tensor([-1.0, 5.0]), torch.ones(2))
    agent.actor.normalizer.update(torch.randn(9, OBS), torch.ones(9))
    agent.critic.normalizer.update(torch.randn(9, CRITIC), torch.ones(9))
    rollout, seen = fill(agent, *SOME_LANES), watch(agent, monkeypatch)
    obs, state = agent.actor.normalizer(rollout.obs), agent.critic.normalizer(rollout.state)
    advantage, value = advantages_by_hand(rollout, 0.9, 0.8), rollout.value[:-1]
    returns, is_valid = advantage + value, valid(rollout)
    if norm_adv:
        chosen = advantage[is_valid]
        advantage = (advantage - chosen.mean()) / chosen.std(correction=0)
    normalizer = copy.deepcopy(agent.critic.returns)
    normalizer.update(returns, is_valid.double())  # before the epochs, not after them
    expected = dict(
        obs=obs, state=state, a_prev=rollout.a_prev, sample=rollout.sample, advantage=advantage,
        returns=normalizer(returns), z=rollout.z.clone(),
    )  # fmt: skip
    # by their densities, of which no two are equal
    places = {rollout.log_prob[t, n].item(): (t, n) for t, n in is_valid.nonzero().tolist()}
    agent.update(rollout)

    orders = []
    for batch in (x.batch for x in seen):
        inside = batch.weight > 0
        orders.append([places[k] for k in batch.old_log_prob[inside].flatten().tolist()])
        at = tuple(torch.tensor(orders[-1]).T)
        for name, column in expected.items():
            actual = getattr(batch, name)
            if actual.shape[: inside.dim()] == inside.shape:  # all, but z of sequences
                torch.testing.assert_close(actual[inside], column[at], msg=name)
        if script is bptt_ppo:  # the z of their first rows
            densities = batch.old_log_prob[0].flatten().tolist()
            at = tuple(torch.tensor([places[k] for k in densities]).T)
            assert torch.equal(batch.z[0], expected["z"][at])
    per_epoch, sizes = len(seen) // 2, {x.batch.weight.shape[-1] for x in seen}
    epochs = [list(itertools.chain(*part)) for part in (orders[:per_epoch], orders[per_epoch:])]
    assert epochs[0] != epochs[1] and all(len(epoch) == len(set(epoch)) for epoch in epochs)
    if script is bptt_ppo:
        sequences = len(bptt_ppo.cut(rollout.first > 0, 5)[1])
        assert per_epoch == min(minibatches, sequences) and len(epochs[0]) == len(places)
        assert sizes <= {sequences // per_epoch, sequences // per_epoch + 1}
    else:
        assert per_epoch == minibatches and sizes == {120 // minibatches}
        assert len(places) - 120 % minibatches <= len(epochs[0])


@SCRIPTS
@pytest.mark.parametrize(("share", "epochs"), [(1.001, 2), (0.999, 1)])
def test_an_update(script, share, epochs, monkeypatch):
    """Of which no epoch follows one whose mean approx_kl is above the target."""
    agent = make_agent(script, update_epochs=2, learning_rate=0.003, max_grad_norm=0.1)
    rollout, twin, state = fill(agent, *SOME_LANES), copy.deepcopy(agent), torch.get_rng_state()
    twin.args.update_epochs = 1
    agent.args.target_kl = share * twin.update(rollout)["losses/approx_kl"].item()
    torch.set_rng_state(state)
    seen = watch(agent, monkeypatch)
    before, is_valid = [p.detach().clone() for p in agent.parameters()], valid(rollout)
    advantage = advantages_by_hand(rollout)[is_valid]
    returns = advantage + rollout.value[:-1][is_valid]
    metrics = agent.update(rollout)
    assert len(seen) == 4 * epochs
    assert all((a != b).any() for a, b in zip(before, agent.parameters()))

    # each step takes its own gradient, clipped over actor and critic together
    clipped = flat([p.grad for m in (agent.actor, agent.critic) for p in m.parameters()])
    actual = torch.cat([flat(gradients) for gradients in seen[-1].gradients])
    assert actual.norm() > 0.1
    torch.testing.assert_close(clipped, 0.1 * actual / (actual.norm() + 1e-6))

    # normalisers are shown every transition once, but not the row that the next rollout begins with
    for normalizer, x in [
        (agent.actor.normalizer, rollout.obs[:-1][is_valid]),
        (agent.critic.normalizer, rollout.state[:-1][is_valid]),
        (agent.critic.returns, returns),
    ]:
        assert normalizer.count == len(x)
        torch.testing.assert_close(normalizer.mean, x.mean(0))
        torch.testing.assert_close(normalizer.var, x.var(0, correction=0))

    # and the log has the means of the last epoch
    assert all(torch.isfinite(v) and not v.requires_grad for v in metrics.values())
    means = torch.stack([x.losses for x in seen[-4:]]).mean(0)
    expected = {f"losses/{name}": mean for name, mean in zip(script.LOSSES, means)}
    expected["losses/explained_variance"] = 1 - advantage.var() / returns.var()
    assert expected["losses/approx_kl"] > 1e-4
    torch.testing.assert_close(metrics, expected, rtol=1e-5, atol=1e-6)


# --- acting ---------------------------------------------------------------------------------------


@SCRIPTS
def test_training_acts_as_evaluation_does_and_has_a_value_of_all_that_the_critic_is_told(script):
    """s, z and a_prev, and no o beside s; V is not linear in them."""
    agent = make_agent(script)
    actor, z, a_prev = agent.actor, torch.randn(3, agent.z_dim), torch.rand(3, ACTION)
    x = torch.randn(3, OBS), torch.randn(3, CRITIC), z, a_prev
    torch.manual_seed(1)
    sample, next_z, _, value = agent.act(*x)
    torch.manual_seed(1)
    own = actor.act(x[0], z[:, : actor.z_dim], a_prev)
    assert torch.equal(sample[:, :ACTION].clamp(-1, 1), own[0])
    assert torch.equal(next_z[:, : actor.z_dim], own[1])
    for i in range(4):
        *_, other = agent.act(*(-y if k == i else y for k, y in enumerate(x)))
        assert (other != value).all() if i else torch.equal(other, value)
    minus, zero = (agent.act(*(k * y for y in x))[3] for k in (-1, 0))
    assert ((value + minus - 2 * zero).abs() > 1e-4).all()


@SCRIPTS
@RNN
def test_acting_is_at_the_means_or_with_the_learned_spread_and_clipped(script, rnn):
    """The internal state of S2PG has one, too, and is not clipped; that of BPTT has none."""
    n = 20_000
    actor = make_agent(script, rnn=rnn).actor
    actor.normalizer.update(5 + 3 * torch.randn(100, OBS), torch.ones(100))
    with torch.no_grad():
        actor.log_std.copy_(torch.linspace(-3, -1, len(actor.log_std)))
        actor.log_std[1] = actor.log_std[-1] = 0.5
        std = actor.log_std.exp()
    x = torch.randn(1, OBS), torch.randn(1, actor.z_dim), 2 * torch.rand(1, ACTION) - 1
    obs, z, a_prev = x = [v.expand(n, -1) for v in x]
    before = torch.get_rng_state()
    mean_a, mean_z = actor.act(*x, deterministic=True)
    assert torch.equal(torch.get_rng_state(), before)
    if script is s2pg_ppo:
        forward = actor(actor.normalizer(obs), z, a_prev).split([ACTION, actor.z_dim], -1)
    else:
        forward = actor.step(obs, z, a_prev)
    assert torch.equal(mean_a, forward[0].clamp(-1, 1)) and torch.equal(mean_z, forward[1])
    a, z = actor.act(*x)
    assert a.abs().max() == 1 and (a[:, 1].abs() == 1).double().mean() > 0.3
    assert abs((a - mean_a)[:, 0].std() / std[0] - 1) < 0.025  # 5 standard errors; none is clipped
    if script is bptt_ppo:
        assert torch.equal(z, mean_z) and len(std) == ACTION
    else:
        assert (((z - mean_z).std(0) / std[ACTION:] - 1).abs() < 0.025).all() and z.abs().max() > 2
        both = torch.cat([a, z], -1)
        assert (torch.corrcoef(both.T) - torch.eye(len(std))).abs().max() < 5 / math.sqrt(n)


def test_a_memoryless_agent_has_no_recurrent_parameters():
    agent = make_agent(s2pg_ppo, memoryless=True)
    names = [name for name, _ in agent.actor.named_parameters()]
    assert names and not any("cell" in name or "kernel" in name for name in names)
    assert agent.z_dim == 0 and agent.actor.log_std.shape == (ACTION,)
    assert agent.critic.hidden[0].in_features == CRITIC + ACTION


# --- a fair comparison ----------------------------------------------------------------------------


@RNN
def test_the_baseline_has_networks_of_the_same_size_and_the_same_optimizer(rnn):
    """And the same noise but for that of the internal state; and is tuned alike for each task."""
    assert s2pg_ppo.TUNED == bptt_ppo.TUNED
    one = make_agent(s2pg_ppo, rnn=rnn, std=0.3, std_z=0.15)
    other = make_agent(bptt_ppo, rnn=rnn, std=0.3)
    sizes, options, std = zip(*(
        (
            sorted(p.shape for name, p in agent.actor.named_parameters() if name != "log_std"),
            agent.optimizer.param_groups[0] | dict(params=0),
            agent.actor.log_std.exp(),
        )
        for agent in (one, other)
    ))  # fmt: skip
    assert sizes[0] == sizes[1] and options[0] == options[1] and options[0]["eps"] == 1e-5
    torch.testing.assert_close(std[1], torch.tensor([0.3] * ACTION))
    torch.testing.assert_close(std[0], torch.tensor([0.3] * ACTION + [0.15] * one.z_dim))
    # with the same weights, which come after log_std, they are the same functions
    for p, q in list(zip(one.actor.parameters(), other.actor.parameters()))[1:]:
        p.data.copy_(q)
    x = torch.randn(9, OBS), torch.randn(9, one.z_dim), torch.rand(9, ACTION)
    ours, theirs = (agent.actor.act(*x, deterministic=True) for agent in (one, other))
    torch.testing.assert_close(ours, theirs)


def test_no_more_than_16_shapes_of_sequences_have_a_graph(monkeypatch):
    """Each shape of a minibatch needs one, and holds memory of the card."""
    monkeypatch.setattr(bptt_ppo, "Graphed", lambda function: function)
    agent = make_agent(bptt_ppo)
    agent.args.cudagraphs, agent.graphs = True, {}
    monkeypatch.setattr(agent, "learn", lambda *columns: torch.zeros(len(bptt_ppo.LOSSES)))
    for length in range(1, 39):
        agent.update(fill(agent, *lanes([[(length, True)]] * 3, 40, [0, 0, 0])))
        assert len(agent.graphs) <= 16
    assert len(agent.graphs) == 16
