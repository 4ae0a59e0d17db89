"""S2PG-PPO and BPTT-PPO: advantages, rollouts, sequences, losses, and what one update does."""

import copy
import math
from types import SimpleNamespace

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
LOSS = {s2pg_ppo: "s2pg_ppo_loss", bptt_ppo: "bptt_ppo_loss"}
random_tests = settings(max_examples=50, deadline=None)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_agent(script, **options):
    options = dict(
        state_dim=STATE, num_envs=3, num_steps=40, num_minibatches=4, update_epochs=1
    ) | options  # fmt: skip
    return script.Agent(script.Args(**options), OBS, CRITIC, ACTION, True, CPU)


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
    num_envs, steps = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    episode = st.tuples(st.integers(1, 12), st.booleans())
    plans = draw(
        st.lists(st.lists(episode, min_size=1, max_size=5), min_size=num_envs, max_size=num_envs)
    )
    offsets = draw(st.lists(st.integers(0, 15), min_size=num_envs, max_size=num_envs))
    return lanes(plans, steps, offsets)


SOME_LANES = lanes(  # terminated and truncated, cut at both ends, a final row first and one last
    [[(7, True), (3, False), (1, True)], [(4, False), (9, True)], [(5, True)]], 40, [0, 4, 0]
)
WHOLE_EPISODES = lanes([[(8, True), (6, True), (2, False)]] * 3, 19, [0, 0, 0])


def fill(agent, first, final, terminated):
    """A rollout as `train` collects it, of random observations and rewards; in float64."""
    agent.actor.double(), agent.critic.double()
    rollout = agent.make_rollout()
    for name, rows in vars(rollout).items():
        if torch.is_tensor(rows) and rows.dtype == torch.float32:
            setattr(rollout, name, rows.double())
    n = agent.args.num_envs
    z = torch.rand(n, agent.z_dim, dtype=torch.float64) * ~first[0].unsqueeze(-1)
    a_prev = torch.rand(n, ACTION, dtype=torch.float64) * ~first[0].unsqueeze(-1)
    for t in range(len(first)):
        obs, critic_obs = (torch.randn(n, k, dtype=torch.float64) for k in (OBS, CRITIC))
        action, z_next, log_prob, value = agent.act(obs, critic_obs, z, a_prev)
        if t == len(first) - 1:
            rollout.add(z=z, value=value, first=first[t])
        else:
            rollout.add(
                obs=obs, critic_obs=critic_obs, z=z, a_prev=a_prev, action=action, value=value,
                log_prob=log_prob, reward=torch.randn(n), terminated=terminated[t], first=first[t],
            )  # fmt: skip
        keep = ~final[t].unsqueeze(-1)
        z, a_prev = z_next * keep, action.clamp(-1, 1) * keep
    return rollout


def copy_of(rollout):
    """The rows of a rollout by name, and which of them are transitions."""
    rows = {k: v[: rollout.length].clone() for k, v in vars(rollout).items() if torch.is_tensor(v)}
    return rows | dict(valid=~rows["first"][1:])


def where_transitions_are(batch):
    """In the columns of a minibatch."""
    return getattr(batch, "inside", slice(None))


def watch(agent, monkeypatch):
    """Notes minibatch, columns of its transitions, gradient [P] and log rho of every later loss."""
    seen, loss_function = [], agent.loss

    def watched(actor, critic, batch, args):
        loss, losses, log_ratio = loss_function(actor, critic, batch, args)
        batch = type(batch)(*(column.clone() for column in batch))  # some are used again
        at = where_transitions_are(batch)
        columns = SimpleNamespace(**{k: v[at] for k, v in batch._asdict().items()})
        gradients = [
            torch.autograd.grad(loss, list(m.parameters()), retain_graph=True, allow_unused=True)
            for m in (actor, critic)
        ]
        seen.append(
            SimpleNamespace(
                batch=batch, columns=columns, actor_gradient=gradients[0],
                critic_gradient=gradients[1],
                log_ratio=log_ratio.view(batch.old_log_prob.shape)[at],
            )
        )  # fmt: skip
        return loss, losses, log_ratio

    monkeypatch.setattr(agent, "loss", watched)
    return seen


# --- advantages -----------------------------------------------------------------------------------


def advantages_by_hand(reward, value, terminated, first, gamma, gae_lambda):
    """sum_k (gamma lambda)^k delta_{t+k}, over the transitions of the episode from row t on."""
    advantage = torch.zeros_like(reward)
    for t, n in np.ndindex(*reward.shape):
        for k in range(t, len(reward)):
            if first[k + 1, n]:
                break  # row k is the final row of the episode
            next_value = 0.0 if terminated[k, n] else value[k + 1, n]
            delta = reward[k, n] + gamma * next_value - value[k, n]
            advantage[t, n] += (gamma * gae_lambda) ** (k - t) * delta
    return advantage


@random_tests
@given(lanes=random_lanes(), gamma=st.floats(0, 0.999), gae_lambda=st.floats(0, 1))
def test_advantages_are_those_of_a_loop_over_each_episode(lanes, gamma, gae_lambda):
    first, _, terminated = lanes
    reward, value = torch.randn(terminated.shape), 10 * torch.randn(first.shape)
    expected = advantages_by_hand(reward, value, terminated, first, gamma, gae_lambda)
    actual = s2pg_ppo.gae(reward, value, terminated, ~first[1:], gamma, gae_lambda)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert not actual[first[1:]].any()


def test_advantages_bootstrap_through_truncations_and_at_the_end_but_not_through_terminations():
    """Two episodes of two transitions, then the first row of a third; all rewards are 1."""
    first = torch.tensor([[True, False, False, True, False, False, True, False]]).T
    terminated = torch.tensor([[False, True, False, False, False, False, False]]).T
    reward = torch.ones(7, 1)
    reward[[2, 5]] = 99.0  # of the final rows, as of no step
    value = torch.tensor([[0.0, 0.0, 1000.0, 0.0, 0.0, 20.0, 0.0, 40.0]]).T
    actual = s2pg_ppo.gae(reward, value, terminated, ~first[1:], 0.5, 1.0)
    # after the termination comes nothing, after the truncation 20, after the last row 40
    assert actual.flatten().tolist() == [1.5, 1.0, 0.0, 1.5 + 5.0, 1.0 + 10.0, 0.0, 1.0 + 20.0]


# --- sequences ------------------------------------------------------------------------------------


@random_tests
@given(lanes=random_lanes(), length=st.integers(1, 16))
def test_sequences_partition_the_transitions_and_cross_no_episode(lanes, length):
    first, final, _ = lanes
    times, envs, mask = bptt_ppo.cut(first, length)
    assert times.shape == mask.shape and times.shape[1] == len(envs) and len(times) <= length
    assert mask[0].all()
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


def test_sequences_are_as_long_as_they_may_be():
    first, _, _ = lanes([[(7, True)]], 16, [0])
    times, _, mask = bptt_ppo.cut(first, 3)
    runs = [times[mask[:, k], k].tolist() for k in range(times.shape[1])]
    assert runs == [[0, 1, 2], [3, 4, 5], [6], [8, 9, 10], [11, 12, 13], [14]]


def test_memory_for_sequences_ends_with_the_rollout():
    """However long they may be: many write a large number for "the whole episode"."""
    agent = make_agent(bptt_ppo, sequence_length=10**9)
    agent.update(fill(agent, *SOME_LANES))
    place, inside, _ = agent.static
    assert place.shape == inside.shape and len(place) == agent.args.num_steps


@RNN
def test_the_recurrent_layer_is_given_contiguous_states(rnn):
    """cuDNN takes no others: "rnn: hx is not contiguous"."""
    agent = make_agent(bptt_ppo, rnn=rnn)
    given = []
    for network in (agent.actor, agent.critic):
        network.layer.register_forward_pre_hook(lambda layer, inputs: given.append(inputs[1]))
    agent.update(fill(agent, *SOME_LANES))
    states = [state for x in given for state in (x if isinstance(x, tuple) else (x,))]
    assert len(states) > 40 and all(state.is_contiguous() for state in states)


# --- rollouts made by `train` ---------------------------------------------------------------------

PENDULUM = dict(env_id="InvertedPendulum-v4", env_kwargs=dict(max_episode_steps=6))
CUE = dict(env_id="CueRecall-v0", env_kwargs=dict(horizon=5))


def train(script, tmp_path, monkeypatch, **options):
    """Train; returns the rows of all rollouts, what `act` was given and gave, and what was played.

    The learning rate is high and there is one minibatch in an epoch, but see `options`.
    """
    monkeypatch.chdir(tmp_path)
    rollouts, acts, steps, made = [], [], [], []

    class Watched(script.Agent):
        def act(self, *inputs):
            # `train` writes the next ones into the same memory
            acts.append(([x.clone() for x in inputs], super().act(*inputs)))
            return acts[-1][1]

        def update(self, rollout):
            rollouts.append(copy_of(rollout) | dict(lr=self.lr.item()))
            return super().update(rollout)

    make_env = script.make_env

    def watched_env(*args):
        env = make_env(*args)
        if not made:  # the second one is for the evaluation
            step = env.step
            monkeypatch.setattr(env, "step", lambda a: steps.append((a, step(a))) or steps[-1][1])
        made.append(env)
        return env

    monkeypatch.setattr(script, "Agent", Watched)
    monkeypatch.setattr(script, "make_env", watched_env)
    options = dict(
        num_envs=3, num_steps=20, total_timesteps=150, num_minibatches=1, update_epochs=1,
        learning_rate=0.01, state_dim=STATE, eval_frequency=0, eval_episodes=1,
    ) | options  # fmt: skip
    script.train(script.Args(**options))
    return rollouts, acts, steps


@SCRIPTS
@pytest.mark.parametrize("task", [PENDULUM, CUE], ids=lambda task: task["env_id"])
def test_a_rollout_holds_what_was_seen_remembered_and_done(script, task, tmp_path, monkeypatch):
    """Across episodes and across rollouts, the last of which is a short one."""
    rollouts, acts, steps = train(script, tmp_path, monkeypatch, **task, std=0.8)
    assert [len(rows["first"]) for rows in rollouts[:2]] == [21, 21] and len(rollouts) >= 3
    first, final, z, a_prev = np.ones(3, bool), np.zeros(3, bool), 0.0, 0.0
    acts, steps, ends, seen = iter(acts), iter(steps), [], None
    for rows in rollouts:
        for t in range(len(rows["first"])):
            (obs, critic_obs, *memory), (action, z_next, log_prob, value) = next(acts)
            expected = dict(z=memory[0], value=value, first=torch.tensor(first))
            assert (memory[0] == z).all() and (memory[1] == a_prev).all()
            if seen is not None:
                assert (obs.numpy() == seen["policy"]).all()
                assert (critic_obs.numpy() == seen["critic"]).all()
            if t == len(rows["first"]) - 1:
                assert all(torch.equal(rows[k][t], v) for k, v in expected.items())
                break  # the next rollout begins with this row
            played, (seen, reward, terminated, truncated, _) = next(steps)
            expected |= dict(
                obs=obs, critic_obs=critic_obs, a_prev=memory[1], action=action, log_prob=log_prob,
                reward=torch.tensor(reward).float(), terminated=torch.tensor(terminated),
            )  # fmt: skip
            for name, value in expected.items():
                assert torch.equal(rows[name][t], value), name
            assert torch.equal(torch.tensor(played), action.clamp(-1, 1))
            keep = torch.tensor(~final).unsqueeze(-1)
            z, a_prev = torch.where(keep, z_next, 0.0), torch.where(keep, action.clamp(-1, 1), 0.0)
            first, final = final, terminated | truncated
            ends.append((terminated, truncated & ~terminated))
    terminations, truncations = (np.concatenate(x).sum() for x in zip(*ends))
    assert terminations > 0 and (truncations > 0) == (task is PENDULUM)
    assert any((rows["action"].abs() > 1).any() for rows in rollouts)  # some have to be clipped


def check_first_losses(script, tmp_path, monkeypatch, **options):
    """Before the first step on a rollout, the loss finds the densities and values of acting."""
    seen, ppo_loss = [], script.ppo_loss

    def watched(log_prob, value, entropy, batch, args, **mean):
        at = where_transitions_are(batch)
        found = log_prob.detach(), value.detach(), batch.old_log_prob, batch.old_value
        seen.append([column[at] for column in found])
        return ppo_loss(log_prob, value, entropy, batch, args, **mean)

    monkeypatch.setattr(script, "ppo_loss", watched)
    train(script, tmp_path, monkeypatch, **PENDULUM, **options)
    assert len(seen) >= 3
    for log_prob, value, old_log_prob, old_value in seen:
        # sums over some float32 terms of size 10, computed in other orders
        torch.testing.assert_close(log_prob, old_log_prob, rtol=0, atol=3e-5)
        torch.testing.assert_close(value, old_value, rtol=0, atol=3e-5)
        assert log_prob.std() > 0.01 and value.std() > 1e-3
    # and it is not the same policy every time
    assert abs(seen[0][0].mean() - seen[-1][0].mean()) > 1e-3


@pytest.mark.parametrize("options", [{}, dict(memoryless=True), dict(privileged_critic=True)])
@RNN
def test_the_ratio_is_one_before_the_first_step(rnn, options, tmp_path, monkeypatch):
    """Also after the statistics of the normalisers have changed."""
    options = dict(hide="velocities", rnn=rnn) | options
    check_first_losses(s2pg_ppo, tmp_path, monkeypatch, **options)


@pytest.mark.parametrize("length", [1, 3, 64])
@RNN
def test_memories_along_sequences_are_those_of_acting(rnn, length, tmp_path, monkeypatch):
    """Recomputed from the internal states stored at their beginning, in policy and value."""
    options = dict(rnn=rnn, sequence_length=length, hide="velocities", privileged_critic=True)
    check_first_losses(bptt_ppo, tmp_path, monkeypatch, **options)


@SCRIPTS
@pytest.mark.parametrize("privileged", [True, False])
def test_the_critic_sees_the_state_if_asked_for_and_the_policy_never(
    script, privileged, tmp_path, monkeypatch
):
    rollouts, *_ = train(script, tmp_path, monkeypatch, **CUE, privileged_critic=privileged)
    for rows in rollouts:
        later, first = ~rows["first"][:-1], rows["first"][:-1]
        obs, critic_obs = rows["obs"][:-1, :, 0], rows["critic_obs"][:-1, :, 0]  # the cue
        assert not obs[later].any() and obs[first].all()
        assert critic_obs[later].all() if privileged else torch.equal(obs, critic_obs)


@SCRIPTS
def test_policy_and_value_share_no_input_but_the_memory_and_the_action(script, monkeypatch):
    agent = make_agent(script, num_minibatches=1)
    seen = watch(agent, monkeypatch)
    agent.update(fill(agent, *SOME_LANES))
    batch = seen[0].batch
    batch = batch._replace(obs=batch.obs.requires_grad_(), state=batch.state.requires_grad_())
    _, losses, _ = getattr(script, LOSS[script])(agent.actor, agent.critic, batch, agent.args)
    for name, sees in [("policy_loss", [True, False]), ("value_loss", [False, True])]:
        grads = torch.autograd.grad(losses[name], [batch.obs, batch.state], allow_unused=True)
        assert [grad is not None and bool(grad.any()) for grad in grads] == sees


# --- policy gradients -----------------------------------------------------------------------------


def returns_to_go(rows, gamma):
    """Sampled returns [T, N] up to the end of the episode or of the rollout."""
    returns, to_go = torch.zeros_like(rows["reward"][:-1]), 0.0
    for t in reversed(range(len(returns))):
        to_go = rows["valid"][t] * (rows["reward"][t] + gamma * to_go)
        returns[t] = to_go
    return returns


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors if t is not None])


def log_density_of_action_and_internal_state(actor, rows):
    """log pi(a_t, z_{t+1} | o_t, z_t, a_{t-1}) [T, N], of each row by itself."""
    total = torch.zeros_like(rows["reward"][:-1])
    for t in range(len(total)):
        mean = actor(actor.normalizer(rows["obs"][t]), rows["z"][t], rows["a_prev"][t])
        sample = torch.cat([rows["action"][t], rows["z"][t + 1]], -1)
        total[t] = Normal(mean, actor.log_std.exp()).log_prob(sample).sum(-1)
    return total


def outputs_through_time(network, rows, obs, z, length):
    """Outputs [T, N, .] by single steps, whose gradient goes back to every `length`-th row."""
    outputs = []
    for n in range(obs.shape[1]):
        age = 0
        for t in range(len(obs)):
            age = 0 if rows["first"][t, n] else age
            if age % length == 0:
                memory = z[t, n : n + 1]
            output, memory = network.step(obs[t, n : n + 1], memory, rows["a_prev"][t, n : n + 1])
            outputs.append(output)
            age += 1
    return torch.cat(outputs).view(obs.shape[1], len(obs), -1).transpose(0, 1)


def log_density_through_time(actor, rows, length=64):
    obs, z = rows["obs"][:-1], rows["z"][:-1, :, : actor.z_dim]
    mean = outputs_through_time(actor, rows, obs, z, length)
    return Normal(mean, actor.log_std.exp()).log_prob(rows["action"][:-1]).sum(-1)


@pytest.mark.parametrize(
    ("script", "log_density"),
    [(s2pg_ppo, log_density_of_action_and_internal_state), (bptt_ppo, log_density_through_time)],
)
@RNN
def test_the_first_gradient_is_that_of_reinforce(script, log_density, rnn, monkeypatch):
    """-E[grad log pi G] with returns to go: rho = 1, lambda = 1, V = 0, whole episodes."""
    agent = make_agent(
        script, rnn=rnn, num_steps=19, gamma=0.9, gae_lambda=1.0, norm_adv=False, vf_coef=0.0,
        num_minibatches=1,
    )  # fmt: skip
    nn.init.zeros_(agent.critic.head.weight), nn.init.zeros_(agent.critic.head.bias)
    rollout, seen = fill(agent, *WHOLE_EPISODES), watch(agent, monkeypatch)
    rows, actor = copy_of(rollout), agent.actor
    objective = (log_density(actor, rows) * returns_to_go(rows, 0.9))[rows["valid"]].mean()
    expected = torch.autograd.grad(-objective, list(actor.parameters()))
    assert all(grad.any() for grad in expected)
    agent.update(rollout)
    # gamma is a float32 beside the flags of the rows
    torch.testing.assert_close(flat(seen[0].actor_gradient), flat(expected), rtol=1e-5, atol=1e-7)
    assert not flat(seen[0].critic_gradient).any()


@pytest.mark.parametrize("length", [1, 3, 64])
@pytest.mark.parametrize("rnn", ["gru", "lstm"])
def test_gradients_through_time_equal_those_of_a_loop_of_single_steps(rnn, length, monkeypatch):
    """Of policy and value, over episodes that the rollout cuts; back to a sequence's first row."""
    agent = make_agent(
        bptt_ppo, rnn=rnn, sequence_length=length, num_minibatches=1, clip_vloss=False,
        vf_coef=0.7,
    )  # fmt: skip
    with torch.no_grad():  # a strong recurrence, so that no gradient through it goes unseen
        for network in (agent.actor, agent.critic):
            network.layer.weight_hh_l0 *= 2
    rollout, seen = fill(agent, *SOME_LANES), watch(agent, monkeypatch)
    rows, actor, critic = copy_of(rollout), agent.actor, agent.critic
    valid, args = rows["valid"], agent.args
    advantage = advantages_by_hand(
        rows["reward"][:-1], rows["value"], rows["terminated"][:-1], rows["first"],
        args.gamma, args.gae_lambda,
    )  # fmt: skip

    critic = copy.deepcopy(critic)
    returns = (advantage + rows["value"][:-1])[valid]
    bptt_ppo.update_returns(critic.returns, critic.head, returns)

    def gradient(length):
        log_prob = log_density_through_time(actor, rows, length)[valid]
        obs, z = rows["critic_obs"][:-1], rows["z"][:-1, :, actor.z_dim :]
        value = outputs_through_time(critic, rows, obs, z, length).squeeze(-1)[valid]
        a = advantage[valid]
        a = (a - a.mean()) / a.std(correction=0)
        error = value - critic.returns(returns)
        loss = -(log_prob * a).mean() + 0.7 * error.square().mean() / 2
        return flat(torch.autograd.grad(loss, [*actor.parameters(), *critic.parameters()]))

    expected = gradient(length)
    agent.update(rollout)
    actual = torch.cat([flat(seen[0].actor_gradient), flat(seen[0].critic_gradient)])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    # sharp: longer or shorter sequences have another gradient
    other = gradient({1: 3, 3: 64, 64: 3}[length])
    assert (other - expected).norm() > 0.01 * expected.norm()


@RNN
def test_rows_outside_of_the_sequences_have_no_influence(rnn, monkeypatch):
    agent = make_agent(bptt_ppo, rnn=rnn, num_minibatches=1)
    seen = watch(agent, monkeypatch)
    agent.update(fill(agent, *SOME_LANES))
    batch = seen[0].batch
    outside = ~batch.inside
    assert outside.float().mean() > 0.2 and batch.inside[0].all()
    columns = [column.clone() for column in batch]
    for column in columns[:-1]:
        column[outside] = 1e3 * torch.randn_like(column[outside])
    other = type(batch)(*columns)
    other.old_log_prob[outside] = -1e9  # rho would be infinite
    for b in (batch, other):
        agent.loss(agent.actor, agent.critic, b, agent.args)
    one, two = seen[-2:]
    assert torch.isfinite(flat(two.actor_gradient)).all()
    torch.testing.assert_close(flat(two.actor_gradient), flat(one.actor_gradient))
    torch.testing.assert_close(flat(two.critic_gradient), flat(one.critic_gradient))
    assert flat(one.actor_gradient).any() and torch.equal(one.log_ratio, two.log_ratio)


# --- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "clipped"),
    [
        (1.0, 2.0, -2.0, False), (1.0, -2.0, 2.0, False),
        (1.1, 2.0, -2.2, False), (1.1, -2.0, 2.2, False),
        (1.5, 2.0, -2.4, True), (1.5, -2.0, 3.0, False),
        (0.5, 2.0, -1.0, False), (0.5, -2.0, 1.6, True),
    ],
)  # fmt: skip
def test_the_policy_loss_ends_where_the_ratio_has_gone_far_enough(
    ratio, advantage, expected, clipped
):
    old = torch.tensor([-1.3])
    log_prob = (old + math.log(ratio)).requires_grad_()
    loss, log_ratio = s2pg_ppo.clipped_policy_loss(log_prob, old, torch.tensor([advantage]), 0.2)
    assert math.isclose(loss.item(), expected, rel_tol=1e-5)
    assert math.isclose(log_ratio.item(), math.log(ratio), abs_tol=1e-6)
    assert not log_ratio.requires_grad
    (grad,) = torch.autograd.grad(loss, log_prob)
    assert math.isclose(grad.item(), 0 if clipped else -ratio * advantage, rel_tol=1e-5)


def test_losses_of_a_batch_are_those_of_its_transitions():
    x = torch.randn(3, 50)
    single = [s2pg_ppo.clipped_policy_loss(*x[:, k : k + 1], 0.1)[0] for k in range(50)]
    torch.testing.assert_close(s2pg_ppo.clipped_policy_loss(*x, 0.1)[0], torch.cat(single))
    for clip_coef in (None, 0.2):
        single = [s2pg_ppo.value_loss(*x[:, k : k + 1], clip_coef) for k in range(50)]
        torch.testing.assert_close(s2pg_ppo.value_loss(*x, clip_coef), torch.cat(single))


@pytest.mark.parametrize("columns", [[0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]])
def test_the_policy_loss_refuses_shapes_that_would_broadcast(columns):
    """[B, 1] beside [B] gives B x B products, and a gradient that all but vanishes."""
    x = [torch.randn(5) for _ in range(3)]
    s2pg_ppo.clipped_policy_loss(*x, 0.2)
    for k in columns:
        x[k] = x[k].unsqueeze(-1)
    with pytest.raises(ValueError, match=r"must be \[B\], and are .*\(5, 1\)"):
        s2pg_ppo.clipped_policy_loss(*x, 0.2)


def test_the_policy_loss_refuses_batches_of_different_sizes():
    for sizes in [(5, 1, 5), (5, 5, 1), (1, 5, 5)]:
        with pytest.raises(ValueError, match=r"must be \[B\]"):
            s2pg_ppo.clipped_policy_loss(*map(torch.randn, sizes), 0.2)


@pytest.mark.parametrize(
    ("value", "old_value", "returns", "plain", "clipped", "moves"),
    [
        (1.1, 1.0, 3.0, 1.9**2, 1.9**2, True),  # near its old value
        (1.5, 1.0, 3.0, 1.5**2, 1.8**2, False),  # has come far enough: as if still at 1.2
        (0.5, 1.0, 3.0, 2.5**2, 2.5**2, True),  # has gone the wrong way
        (3.0, 1.0, 3.0, 0.0, 1.8**2, False),
    ],
)
def test_the_value_loss_is_the_larger_of_two_squared_errors(
    value, old_value, returns, plain, clipped, moves
):
    value, old_value, returns = (torch.tensor([x]) for x in (value, old_value, returns))
    value.requires_grad_()
    loss = s2pg_ppo.value_loss(value, old_value, returns, None)
    assert math.isclose(loss.item(), plain / 2, rel_tol=1e-5)
    loss = s2pg_ppo.value_loss(value, old_value, returns, 0.2)
    assert math.isclose(loss.item(), clipped / 2, rel_tol=1e-5)
    (grad,) = torch.autograd.grad(loss, value)
    assert math.isclose(grad, (value - returns).item() if moves else 0, rel_tol=1e-5)


def test_density_and_entropy_are_those_of_torch_distributions():
    """With their gradients with respect to x, mean and log std."""
    x, mean = torch.randn(2, 40, 5, dtype=torch.float64).unbind()
    log_std = torch.randn(5, dtype=torch.float64)
    given = [t.requires_grad_() for t in (x, mean, log_std)]
    normal = Normal(mean, log_std.exp())
    log_prob = s2pg_ppo.gaussian_log_prob(x, mean, log_std)
    assert log_prob.shape == (40,)
    weight = torch.randn(40, dtype=torch.float64)
    for actual, expected in [
        (log_prob @ weight, normal.log_prob(x).sum(-1) @ weight),
        (s2pg_ppo.gaussian_entropy(log_std), Normal(0.0, log_std.exp()).entropy().sum()),
    ]:
        torch.testing.assert_close(actual, expected)
        for a, b in zip(*(torch.autograd.grad(y, given, allow_unused=True, retain_graph=True)
                          for y in (actual, expected))):  # fmt: skip
            torch.testing.assert_close(a, b)


def some_losses(scale=1.0, shift=0.0, take=slice(None), mean=torch.mean, **options):
    """`ppo_loss` of a random batch, or of a part of it, whose advantages are scaled and shifted."""
    generator = torch.Generator().manual_seed(3)
    log_prob, old_log_prob, value, old_value, advantage, returns = torch.randn(
        6, 30, generator=generator
    )[:, take]
    batch = SimpleNamespace(
        old_log_prob=log_prob + 0.3 * old_log_prob, old_value=old_value, returns=returns,
        advantage=scale * advantage + shift,
    )  # fmt: skip
    args = s2pg_ppo.Args(**options)
    return s2pg_ppo.ppo_loss(log_prob, value, torch.tensor(7.0), batch, args, mean)


def test_the_loss_is_the_weighted_sum_of_its_parts():
    loss, losses, _ = some_losses(vf_coef=0.3, ent_coef=0.01)
    expected = losses["policy_loss"] + 0.3 * losses["value_loss"] - 0.01 * 7.0
    torch.testing.assert_close(loss, expected)
    assert losses.keys() == {"policy_loss", "value_loss", "entropy"} and losses["entropy"] == 7


def test_the_loss_is_a_mean_over_the_transitions_that_count():
    """With a mean that gives some of them no weight it is the loss of the others."""
    weight = (torch.arange(30) % 3 > 0) / 20
    expected, parts, _ = some_losses(take=weight > 0)
    loss, same_parts, _ = some_losses(mean=weight.dot)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(same_parts, parts)
    assert abs(loss - some_losses()[0]) > 0.01


@SCRIPTS
@pytest.mark.parametrize("norm_adv", [True, False])
def test_advantages_are_normalised_over_the_rollout(script, norm_adv, monkeypatch):
    """Over all of it: a minibatch of one BPTT sequence has no other to be compared with."""
    agent = make_agent(script, norm_adv=norm_adv)
    rollout, seen = fill(agent, *SOME_LANES), watch(agent, monkeypatch)
    transitions = int(copy_of(rollout)["valid"].sum())
    agent.update(rollout)
    assert len(seen) > 1
    advantage = torch.cat([x.columns.advantage for x in seen])[:transitions]
    standardised = abs(advantage.mean()) < 1e-6 and abs(advantage.std(correction=0) - 1) < 1e-6
    assert standardised == norm_adv
    assert all(abs(x.columns.advantage.mean()) > 1e-3 for x in seen)


def test_values_are_clipped_if_asked_for():
    clipped, plain = (some_losses(clip_vloss=x)[1]["value_loss"] for x in (True, False))
    assert clipped > 1.05 * plain
    far = some_losses(clip_vloss=True, clip_coef=100.0)[1]["value_loss"]
    torch.testing.assert_close(far, plain)


# --- normalisers ----------------------------------------------------------------------------------


@random_tests
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    shape=st.sampled_from([(), (3,)]),
    seed=st.integers(0, 1000),
)
def test_a_normaliser_has_the_mean_and_variance_of_all_it_was_shown(sizes, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    pieces = [3 + k + (1 + k) * torch.randn(n, *shape, generator=generator)
              for k, n in enumerate(sizes)]  # fmt: skip
    normalizer, x = s2pg_ppo.RunningNormalizer(*shape), torch.cat(pieces)
    for piece in pieces:
        normalizer.update(piece)
    assert normalizer.mean.shape == normalizer.var.shape == shape and normalizer.count == len(x)
    torch.testing.assert_close(normalizer.mean, x.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normalizer.var, x.var(0, correction=0), rtol=1e-3, atol=1e-4)
    standardised = normalizer(x)
    assert standardised.abs().max() <= 10
    if len(x) > 1:
        torch.testing.assert_close(normalizer.inverse(standardised), x, rtol=1e-4, atol=1e-4)


@SCRIPTS
def test_new_statistics_of_the_returns_leave_every_value_as_it_is(script):
    agent = make_agent(script)
    fill(agent, *SOME_LANES)  # in float64
    returns, head = agent.critic.returns, agent.critic.head
    features = torch.randn(20, head.in_features, dtype=torch.float64)
    for data in (torch.tensor([3.0, 50.0, 10.0]), torch.tensor([-1e3]), 1e4 * torch.rand(9)):
        before, old = returns.inverse(head(features)), returns.mean.item()
        script.update_returns(returns, head, data.double())
        torch.testing.assert_close(returns.inverse(head(features)), before)
        assert returns.mean.item() != old
    assert head.weight.requires_grad and head.weight.is_leaf


def test_a_normaliser_clips_at_ten_standard_deviations():
    normalizer = s2pg_ppo.RunningNormalizer(1, clip=10.0)
    normalizer.update(torch.tensor([[1.0], [5.0]]))  # mean 3, std 2
    assert normalizer(torch.tensor([[7.0], [-100.0], [100.0]])).flatten().tolist() == [2, -10, 10]
    assert s2pg_ppo.RunningNormalizer(1)(torch.tensor([0.5])) == 0.5  # it has seen nothing yet


def statistics(agent):
    normalizers = agent.actor.normalizer, agent.critic.normalizer, agent.critic.returns
    return [x.clone() for n in normalizers for x in (n.mean, n.var, n.count)]


@SCRIPTS
def test_normalisers_are_shown_every_row_and_return_of_a_rollout_once(script):
    """Final observations, too; the row after the last belongs to the next rollout."""
    agent = make_agent(script)
    rollout = fill(agent, *SOME_LANES)
    rows = copy_of(rollout)
    agent.update(rollout)
    args = agent.args
    returns = rows["value"][:-1] + advantages_by_hand(
        rows["reward"][:-1], rows["value"], rows["terminated"][:-1], rows["first"],
        args.gamma, args.gae_lambda,
    )  # fmt: skip
    shown = [
        (agent.actor.normalizer, rows["obs"][:-1].flatten(0, 1)),
        (agent.critic.normalizer, rows["critic_obs"][:-1].flatten(0, 1)),
        (agent.critic.returns, returns[rows["valid"]]),
    ]
    for normalizer, x in shown:
        assert normalizer.count == len(x)
        torch.testing.assert_close(normalizer.mean, x.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(normalizer.var, x.var(0, correction=0), rtol=1e-5, atol=1e-6)


@SCRIPTS
def test_a_checkpoint_holds_the_statistics(script, tmp_path):
    agent, other = make_agent(script), make_agent(script)
    agent.update(fill(agent, *SOME_LANES))
    script.save_checkpoint(str(tmp_path), agent, {})
    script.load_checkpoint(str(tmp_path), other)
    for saved, loaded, fresh in zip(*map(statistics, (agent, other, make_agent(script)))):
        torch.testing.assert_close(saved.float(), loaded, rtol=0, atol=0)
        assert (loaded != fresh).any()


@SCRIPTS
def test_evaluation_leaves_the_statistics_alone(script):
    args = script.Args(**CUE, state_dim=STATE)
    env = script.make_env(args, 2)
    agent = script.Agent(args, *script.dimensions(env), CPU)
    before = statistics(agent)
    script.evaluate(agent.actor, env, 4, deterministic=False, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(agent)))


# --- updates --------------------------------------------------------------------------------------


def transitions_of(minibatches):
    """Their log-densities while acting, which no two have in common."""
    return torch.cat([x.columns.old_log_prob for x in minibatches])


@SCRIPTS
@pytest.mark.parametrize("minibatches", [1, 4, 1000])
def test_every_epoch_uses_each_transition_once_and_in_another_order(
    script, minibatches, monkeypatch
):
    """And so no final row; as many minibatches as asked for, or as there is something to share.

    Those of S2PG are of one size, whatever the episodes were, and so there may be fewer of them:
    the last is filled up with transitions of the first.
    """
    options = dict(sequence_length=5) if script is bptt_ppo else {}
    agent = make_agent(script, num_minibatches=minibatches, update_epochs=2, **options)
    rollout, seen = fill(agent, *SOME_LANES), watch(agent, monkeypatch)
    rows = copy_of(rollout)
    agent.update(rollout)
    expected = rows["log_prob"][:-1][rows["valid"]]
    assert len(expected) < rows["valid"].numel() and len(expected.unique()) == len(expected)
    shares = len(expected)
    if script is bptt_ppo:
        shares = bptt_ppo.cut(rows["first"], 5)[1].numel()
    per_epoch = min(minibatches, shares)
    if script is s2pg_ppo:  # of the size that a full rollout would have
        size = min(shares, math.ceil(rows["valid"].numel() / minibatches))
        per_epoch = math.ceil(shares / size)
    assert len(seen) == 2 * per_epoch
    epochs = [transitions_of(part) for part in (seen[:per_epoch], seen[per_epoch:])]
    for epoch in epochs:
        assert torch.equal(epoch[: len(expected)].sort().values, expected.sort().values)
        assert torch.equal(epoch[len(expected) :], epoch[: len(epoch) - len(expected)])
    assert not torch.equal(*epochs)
    if script is s2pg_ppo:
        assert {len(x.batch.obs) for x in seen} == {size}
        assert 0 <= size * per_epoch - len(expected) < size
    else:
        assert len(epochs[0]) == len(expected)


@SCRIPTS
def test_minibatches_hold_the_rows_advantages_and_returns_of_their_transitions(script, monkeypatch):
    agent = make_agent(script, gamma=0.9, gae_lambda=0.8, norm_adv=False)
    agent.critic.returns.update(torch.tensor([-1.0, 5.0]))
    agent.actor.normalizer.update(torch.randn(9, OBS))
    agent.critic.normalizer.update(torch.randn(9, CRITIC))
    rollout, seen = fill(agent, *SOME_LANES), watch(agent, monkeypatch)
    rows = copy_of(rollout)
    obs = agent.actor.normalizer(rows["obs"])
    state = agent.critic.normalizer(rows["critic_obs"])
    advantage = advantages_by_hand(
        rows["reward"][:-1], rows["value"], rows["terminated"][:-1], rows["first"], 0.9, 0.8
    )
    value, returns = rows["value"][:-1], advantage + rows["value"][:-1]
    normalizer = copy.deepcopy(agent.critic.returns)
    normalizer.update(returns[rows["valid"]])  # before the epochs, not after them
    value, returns = normalizer(value), normalizer(returns)
    agent.update(rollout)
    places = {rows["log_prob"][t, n].item(): (t, n) for t, n in rows["valid"].nonzero().tolist()}
    for batch in (x.columns for x in seen):
        at = tuple(torch.tensor([places[k] for k in batch.old_log_prob.tolist()]).T)
        expected = dict(old_value=value, advantage=advantage, returns=returns)
        for name, column in expected.items():
            torch.testing.assert_close(getattr(batch, name), column[at], rtol=1e-6, atol=1e-6)
        for name, column in dict(obs=obs, state=state, a_prev=rows["a_prev"], z=rows["z"]).items():
            assert torch.equal(getattr(batch, name), column[at]), name
        if script is s2pg_ppo:
            sample = torch.cat([rows["action"][at], rows["z"][at[0] + 1, at[1]]], -1)
            assert torch.equal(batch.sample, sample)
        else:
            assert torch.equal(batch.action, rows["action"][at])


@SCRIPTS
def test_an_update_moves_every_parameter_and_logs_its_last_epoch(script, monkeypatch):
    agent = make_agent(script, update_epochs=3, learning_rate=0.003)
    rollout, seen = fill(agent, *SOME_LANES), watch(agent, monkeypatch)
    before = [p.detach().clone() for p in agent.parameters]
    metrics = agent.update(rollout)
    assert all((a != b).any() for a, b in zip(before, agent.parameters))
    assert all(torch.isfinite(v) and not v.requires_grad for v in metrics.values())
    log_ratio = torch.cat([x.log_ratio for x in seen[-4:]])
    ratio = log_ratio.exp()
    expected = dict(
        old_approx_kl=-log_ratio.mean(), approx_kl=(ratio - 1 - log_ratio).mean(),
        clipfrac=((ratio < 0.8) | (ratio > 1.2)).double().mean(),
    )  # fmt: skip
    assert expected["approx_kl"] > 1e-4
    for name, value in expected.items():
        torch.testing.assert_close(metrics[f"losses/{name}"].double(), value)
    names = {"policy_loss", "value_loss", "entropy", "explained_variance"} | expected.keys()
    assert metrics.keys() == {f"losses/{name}" for name in names}


@SCRIPTS
def test_the_explained_variance_is_that_of_the_returns_by_the_values(script):
    agent = make_agent(script)
    rollout = fill(agent, *SOME_LANES)
    rows = copy_of(rollout)
    valid, args = rows["valid"], agent.args
    advantage = advantages_by_hand(
        rows["reward"][:-1], rows["value"], rows["terminated"][:-1], rows["first"],
        args.gamma, args.gae_lambda,
    )[valid]  # fmt: skip
    returns = advantage + rows["value"][:-1][valid]
    expected = 1 - advantage.var(correction=0) / returns.var(correction=0)
    actual = agent.update(rollout)["losses/explained_variance"]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@SCRIPTS
@pytest.mark.parametrize(("target_kl", "epochs"), [(None, 5), (1e9, 5), (0.0, 1)])
def test_no_epoch_follows_once_the_policy_has_gone_too_far(script, target_kl, epochs, monkeypatch):
    agent = make_agent(script, target_kl=target_kl, update_epochs=5)
    rollout, seen = fill(agent, *SOME_LANES), watch(agent, monkeypatch)
    agent.update(rollout)
    assert len(seen) == 4 * epochs


@SCRIPTS
def test_each_step_takes_its_own_gradient_clipped_over_actor_and_critic_together(
    script, monkeypatch
):
    """What the last of several minibatches leaves behind holds nothing of those before."""
    agent = make_agent(script, max_grad_norm=0.1)
    rollout, seen = fill(agent, *SOME_LANES), watch(agent, monkeypatch)
    agent.update(rollout)
    clipped = flat([p.grad for p in agent.parameters])
    actual = torch.cat([flat(seen[-1].actor_gradient), flat(seen[-1].critic_gradient)])
    assert len(seen) == 4 and actual.norm() > 0.1
    torch.testing.assert_close(clipped, 0.1 * actual / (actual.norm() + 1e-6))


@SCRIPTS
@pytest.mark.parametrize("anneal", [True, False])
def test_the_learning_rate_falls_linearly_if_asked_for(script, anneal, tmp_path, monkeypatch):
    """From the full one in the first update, by the steps done before each rollout."""
    rollouts, *_ = train(script, tmp_path, monkeypatch, **CUE, anneal_lr=anneal)
    step, expected = 0, []
    for rows in rollouts:
        expected.append(0.01 * (1 - anneal * step / 150))
        step += int(rows["valid"].sum())
    np.testing.assert_allclose([rows["lr"] for rows in rollouts], expected, rtol=1e-6)
    assert len(expected) == 3 and step >= 150


# --- memory and acting ----------------------------------------------------------------------------


def make_actor(script, rnn="gru"):
    return make_agent(script, rnn=rnn, std=0.7).actor


def acting(actor, n=6):
    """Some obs, z and a_prev, [n, .]."""
    return torch.randn(n, OBS), torch.randn(n, actor.z_dim), 2 * torch.rand(n, ACTION) - 1


@SCRIPTS
@pytest.mark.parametrize("rnn", ["gru", "lstm"])
def test_a_gate_that_keeps_everything_keeps_the_memory(script, rnn):
    """Also beyond [-1, 1], where the noise of z' may carry it: nothing squashes it."""
    actor = make_actor(script, rnn)
    cell = actor.cell if script is s2pg_ppo else actor.layer
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.zero_()
        bias = cell.bias_ih if script is s2pg_ppo else cell.bias_ih_l0
        if rnn == "gru":  # gates: reset, update (1 keeps), new
            bias.view(3, -1)[1] = 40
        else:  # gates: input, forget (1 keeps), cell, output
            bias.view(4, -1)[0], bias.view(4, -1)[1] = -40, 40
        z = start = 3 * torch.randn(50, actor.z_dim)
        for _ in range(100):
            obs, _, a_prev = acting(actor, 50)
            _, z = actor.act(obs, z, a_prev, deterministic=True)
    kept = slice(STATE, None) if rnn == "lstm" else slice(None)  # the cell state, or all
    torch.testing.assert_close(z[:, kept], start[:, kept], rtol=1e-5, atol=1e-5)


@SCRIPTS
@RNN
def test_deterministic_acting_is_at_the_means_and_uses_no_random_numbers(script, rnn):
    actor = make_actor(script, rnn)
    actor.normalizer.update(5 + 3 * torch.randn(100, OBS))
    obs, z, a_prev = acting(actor)
    before = torch.get_rng_state()
    a, z_next = actor.act(obs, z, a_prev, deterministic=True)
    assert torch.equal(torch.get_rng_state(), before)
    if script is s2pg_ppo:
        mean_a, mean_z = actor(actor.normalizer(obs), z, a_prev).split([ACTION, actor.z_dim], -1)
    else:
        mean_a, mean_z = actor.step(obs, z, a_prev)
    assert torch.equal(a, mean_a.clamp(-1, 1)) and torch.equal(z_next, mean_z)


@SCRIPTS
@RNN
def test_sampled_actions_have_the_learned_spread_and_are_clipped(script, rnn):
    """The internal state of S2PG has one, too, and is not clipped; that of BPTT has none."""
    n = 20_000
    actor = make_agent(script, rnn=rnn).actor
    with torch.no_grad():
        actor.log_std.copy_(torch.linspace(-3, -1, len(actor.log_std)))
        actor.log_std[1] = actor.log_std[-1] = 0.5
        x = [v.expand(n, -1) for v in acting(actor, 1)]
        a, z = actor.act(*x)
        mean_a, mean_z = actor.act(*x, deterministic=True)
    std = actor.log_std.exp()
    assert a.abs().max() == 1 and (a[:, 1].abs() == 1).float().mean() > 0.3
    assert abs((a - mean_a)[:, 0].std() / std[0] - 1) < 0.025  # 5 standard errors; none is clipped
    if script is bptt_ppo:
        assert torch.equal(z, mean_z) and len(std) == ACTION
    else:
        assert (((z - mean_z).std(0) / std[ACTION:] - 1).abs() < 0.025).all()
        assert z.abs().max() > 2
        both = torch.cat([a, z], -1)
        assert (torch.corrcoef(both.T) - torch.eye(len(std))).abs().max() < 5 / math.sqrt(n)


@SCRIPTS
def test_stds_start_as_asked_for(script):
    options = dict(std=0.3, std_z=0.15) if script is s2pg_ppo else dict(std=0.3)
    actor = make_agent(script, **options).actor
    torch.testing.assert_close(actor.log_std.exp()[:ACTION], torch.full((ACTION,), 0.3))
    if script is s2pg_ppo:
        torch.testing.assert_close(actor.log_std.exp()[ACTION:], torch.full((STATE,), 0.15))


@SCRIPTS
@RNN
def test_the_memory_depends_on_the_observation_the_memory_and_the_previous_action(script, rnn):
    actor = make_actor(script, rnn)
    given = acting(actor, 4)
    for k in range(3):
        changed = [-x if i == k else x for i, x in enumerate(given)]
        for before, after in zip(*(actor.act(*x, deterministic=True) for x in (given, changed))):
            assert (before != after).any(-1).all()


def test_a_memoryless_agent_has_no_recurrent_parameters_and_updates():
    agent = make_agent(s2pg_ppo, memoryless=True)
    names = [name for name, _ in agent.actor.named_parameters()]
    assert names and not any("cell" in name or "kernel" in name for name in names)
    assert agent.z_dim == agent.actor.z_dim == 0 and agent.actor.log_std.shape == (ACTION,)
    assert agent.critic.hidden[0].in_features == CRITIC + ACTION
    before = [p.detach().clone().double() for p in agent.parameters]
    metrics = agent.update(fill(agent, *SOME_LANES))
    assert all((a != b).any() for a, b in zip(before, agent.parameters))
    assert all(torch.isfinite(v) for v in metrics.values())


# --- a fair comparison ----------------------------------------------------------------------------


def test_both_scripts_have_the_same_defaults_and_are_tuned_alike():
    ours, theirs = (vars(script.Args()) for script in (s2pg_ppo, bptt_ppo))
    shared = ours.keys() & theirs.keys() - {"exp_name"}
    assert {k: ours[k] for k in shared} == {k: theirs[k] for k in shared}
    assert ours.keys() - theirs.keys() == {"memoryless", "std_z"}
    assert theirs.keys() - ours.keys() == {"sequence_length"}
    assert s2pg_ppo.TUNED == bptt_ppo.TUNED


@RNN
def test_both_actors_have_memories_and_policies_of_the_same_size(rnn):
    shapes = [
        sorted(tuple(p.shape) for name, p in actor.named_parameters() if name != "log_std")
        for actor in (make_actor(s2pg_ppo, rnn), make_actor(bptt_ppo, rnn))
    ]
    assert shapes[0] == shapes[1]


def test_both_agents_have_optimizers_of_the_same_kind():
    settings = [
        {k: v for k, v in make_agent(script).optimizer.param_groups[0].items() if k != "params"}
        for script in (s2pg_ppo, bptt_ppo)
    ]
    assert settings[0] == settings[1]
