"""S2PG-GAIL: its discriminator, the rewards it gives, and behaviour cloning."""

import ast
import inspect
import math
import textwrap
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Bernoulli

import envs
import envs.demonstrations
import s2pg_gail
import s2pg_lsiq
import s2pg_ppo

OBS, STATE, ACTION = 2, 3, 1
CPU = torch.device("cpu")


def episode(steps, terminated=True, seed=0, sizes=(OBS, STATE, ACTION)):
    """As `envs.demonstrations.load` gives it, of random numbers."""
    rng, ends = np.random.default_rng(seed), np.arange(steps) == steps - 1
    o, s, a = sizes
    return dict(
        observations=rng.normal(size=(steps + 1, o)).astype(np.float32),
        critic_observations=rng.normal(size=(steps + 1, s)).astype(np.float32),
        actions=rng.uniform(-1, 1, size=(steps, a)).astype(np.float32),
        rewards=np.ones(steps, np.float32),
        terminations=ends & terminated,
        truncations=ends & (not terminated),
    )


EPISODES = [episode(10, seed=1), episode(7, seed=2, terminated=False)]


def make_agent(sizes=(OBS, STATE, ACTION), episodes=EPISODES, **options):
    """An agent, its expert, and a full rollout of 5-step episodes in two environments."""
    options = dict(num_steps=40, num_envs=2, num_minibatches=2, update_epochs=1) | options
    args = s2pg_gail.Args(**dict(state_dim=4) | options)
    o, s, a = (gym.spaces.Box(-9, 9, (n,)) for n in sizes)
    env = SimpleNamespace(single_observation_space=dict(policy=o, critic=s), single_action_space=a)
    agent = s2pg_gail.Agent(args, env, CPU)
    rollout = s2pg_gail.Rollout(40, 2, agent.row_sizes, CPU)
    rollout.rows.copy_(torch.randn_like(rollout.rows))
    seen = (x.flatten(0, 1) for x in (rollout.obs, rollout.state, rollout.z, rollout.a_prev))
    sample, _, log_prob, _ = agent.act(*seen)
    rollout.sample.copy_(sample.view(41, 2, -1)), rollout.log_prob.copy_(log_prob.view(41, 2, 1))
    row = (torch.arange(41) % 6).unsqueeze(-1)
    rollout.first.copy_(row == 0), rollout.terminated.copy_(row == 4)
    return agent, s2pg_gail.demonstrated(episodes, agent.row_sizes, CPU), rollout


def test_demonstrations_lie_side_by_side_as_the_rows_of_a_rollout():
    _, expert, _ = make_agent()
    for n, one in enumerate(EPISODES):
        steps = len(one["actions"])
        np.testing.assert_array_equal(expert.obs[: steps + 1, n], one["observations"])
        np.testing.assert_array_equal(expert.state[: steps + 1, n], one["critic_observations"])
        np.testing.assert_array_equal(expert.sample[:steps, n, :ACTION], one["actions"])
        np.testing.assert_array_equal(expert.a_prev[1 : steps + 1, n], one["actions"])
        np.testing.assert_array_equal(expert.terminated[:steps, n], one["terminations"])
        assert ((expert.first[1:, n] == 0).nonzero().flatten() == torch.arange(steps)).all()
    assert not expert.a_prev[0].any() and not expert.z.any()


# The discriminator --------------------------------------------------------------------------------


def test_rows_of_the_discriminator():
    """Every transition, and what stands for the steps in the absorbing state, once."""
    agent, expert, _ = make_agent(gamma=0.9)
    agent.normalizer.update(5 + torch.randn(100, STATE), torch.ones(100))
    rows, weight = agent.judged_rows(expert)
    expected = []
    for one in EPISODES:
        state = agent.normalizer(torch.tensor(one["critic_observations"][:-1]))
        expected += torch.nn.functional.pad(
            torch.cat([state, torch.tensor(one["actions"])], -1), (0, 1)
        ).tolist()
    assert sorted(rows[weight > 0].tolist()) == sorted([*expected, [0.0, 0, 0, 0, 1]])
    assert (weight[:-1] <= 1).all() and weight[-1].item() == pytest.approx(10)  # one terminated
    assert rows[-1].tolist() == [0, 0, 0, 0, 1]
    assert (agent.normalizer(torch.full((STATE,), 1e9)) == 10).all()  # as what V sees
    agent, expert, _ = make_agent(absorbing=False)
    rows, weight = agent.judged_rows(expert)
    assert weight[-1] == 0 and weight.sum() == 17


def test_the_loss_of_the_discriminator():
    """Rows count as their weight says; the expert's were drawn, and count alike."""
    network, args = make_agent()[0].discriminator, SimpleNamespace(discriminator_entropy=0.3)
    (rows, expert_rows), weight = torch.randn(2, 6, 5), torch.tensor([1, 0, 2, 1, 1, 3])
    loss, entropy = s2pg_gail.discriminator_loss(network, rows, weight.float(), expert_rows, args)
    policy, expert = network(rows.repeat_interleave(weight, 0)), network(expert_rows)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    expected = bce(policy, torch.zeros(8, 1)) + bce(expert, torch.ones(6, 1))
    exact = sum(Bernoulli(logits=logit).entropy().mean() for logit in (policy, expert)) / 2
    torch.testing.assert_close(entropy, exact.detach())
    torch.testing.assert_close(loss, expected - 0.3 * exact)
    ours, theirs = (
        torch.autograd.grad(x, list(network.parameters())) for x in (loss, expected - 0.3 * exact)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reward", ["gail", "airl"])
@pytest.mark.parametrize("absorbing", [True, False])
def test_rewards_are_those_of_the_discriminator(reward, absorbing):
    """Also where D is sure of the expert: there that of GAIL has a bound."""
    agent, expert, rollout = make_agent(reward=reward, absorbing=absorbing)
    with torch.no_grad():
        agent.discriminator[-1].weight *= 300
    metrics = agent.judge(rollout, expert)
    with torch.no_grad():
        action = rollout.sample[:-1, :, :1].clamp(-1, 1)
        state = agent.normalizer(rollout.state[:-1])
        rows = torch.cat([state, action, torch.zeros(40, 2, 1)], -1)
        absorbed = torch.tensor([0.0, 0, 0, 0, 1])
        logits = agent.discriminator(rows).squeeze(-1), agent.discriminator(absorbed)
    expected, forever = (
        -(1 - torch.sigmoid(x.double()) + 1e-8).log() if reward == "gail" else x.double()
        for x in logits
    )
    assert logits[0].max() > 25 and logits[0].min() < 0
    transition = rollout.first[1:] == 0
    mean = expected[transition].mean().float()
    torch.testing.assert_close(metrics["imitation_reward"], mean, rtol=1e-4, atol=1e-5)
    accuracy = (logits[0][transition] < 0).float().mean()
    torch.testing.assert_close(metrics["accuracy_policy"], accuracy)
    assert ("absorbing_reward" in metrics) == absorbing  # untrained, it would mean nothing
    if absorbing:
        torch.testing.assert_close(metrics["absorbing_reward"], forever[0].float())
        # sum of gamma^k r_abs from the next step on
        expected += rollout.terminated[:-1] * sum(0.99**k for k in range(1, 5000)) * forever
    given = rollout.reward[:-1][transition].double()
    torch.testing.assert_close(given, expected[transition], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["z", "a_prev", "obs", "state"])
def test_the_discriminator_sees_the_state_and_never_the_internal_state(change):
    results = []
    for shift in (0.0, 1.0):
        torch.manual_seed(3)
        agent, expert, rollout = make_agent()
        getattr(rollout, change).add_(shift)
        agent.judge(rollout, expert)
        results.append((rollout.reward[:-1], *agent.discriminator.parameters()))
    same = [torch.equal(a, b) for a, b in zip(*results)]
    assert not any(same[:2]) if change == "state" else all(same)


def test_the_discriminator_learns_to_tell_expert_from_policy():
    agent, expert, rollout = make_agent(discriminator_steps=50, discriminator_lr=1e-3)
    expert.state += 3
    metrics = agent.update(rollout, expert)
    assert metrics["losses/accuracy_policy"] > 0.9 and metrics["losses/accuracy_expert"] > 0.9
    assert metrics["losses/imitation_reward"] < 0.2  # the policy is found out
    # only the policy ends its episodes in an absorbing state oftener than the expert
    assert metrics["losses/absorbing_reward"] < math.log(2)


def test_an_update_learns_from_the_new_rewards_and_clips_the_gradient_of_ppo_alone():
    """The discriminator's states are normalised by expert and policy alike."""
    agent, expert, rollout = make_agent(discriminator_lr=0.002)
    assert agent.d_optimizer.param_groups[0]["lr"] == 0.002
    expert.state += 8
    before = {name: p.detach().clone() for name, p in agent.named_parameters()}
    parameters = agent.optimizer.param_groups[0]["params"]
    assert len(parameters) + len(list(agent.discriminator.parameters())) == len(before)
    agent.update(rollout, expert)
    assert [name for name, p in agent.named_parameters() if torch.equal(p, before[name])] == []
    means = [x.state[:-1][x.first[1:] == 0].mean(0) for x in (rollout, expert)]
    torch.testing.assert_close(agent.normalizer.mean, sum(means) / 2)
    transition = rollout.first[1:] == 0
    expected = s2pg_gail.gae(rollout, transition.float(), 0.99, 0.95) + rollout.value[:-1]
    torch.testing.assert_close(agent.critic.returns.mean, expected[transition].mean())


def statements(function):
    """Without comments and docstring."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    return [
        ast.unparse(statement) for statement in node.body[ast.get_docstring(node) is not None :]
    ]


def test_its_ppo_is_that_of_s2pg_ppo():
    """So that tests/test_ppo.py tells what is normalised and clipped, and which epoch is last."""
    ours, theirs = s2pg_gail.Agent, s2pg_ppo.Agent
    for name in "act", "learn":
        assert statements(getattr(ours, name)) == statements(getattr(theirs, name))
    judged, *rest = statements(ours.update)
    assert judged == "judged = self.judge(rollout, expert)"
    assert [x.replace("(judged | losses)", "losses") for x in rest] == statements(theirs.update)


def test_the_rows_of_the_expert_are_drawn_as_their_weights_say(monkeypatch):
    """No final row of an episode; and the absorbing state as often as it counts."""
    agent, expert, rollout = make_agent(gamma=0.9, discriminator_steps=20)
    drawn, loss = [], s2pg_gail.discriminator_loss
    monkeypatch.setattr(s2pg_gail, "discriminator_loss", lambda *x: drawn.append(x[3]) or loss(*x))
    agent.judge(rollout, expert)
    rows, (states, weight) = torch.cat(drawn), agent.judged_rows(expert)
    final = states[:-1][weight[:-1] == 0]
    assert len(final) > 0 and not (rows.unsqueeze(1) == final).all(-1).any()
    assert abs(rows[:, -1].mean() - 10 / 27) < 0.06  # 17 transitions, and 10 steps in it


# Behaviour cloning --------------------------------------------------------------------------------


@pytest.mark.parametrize("steps, rows", [(1, range(32)), (2, range(32, 40)), (3, range(40, 72))])
def test_the_loss_of_cloning_is_that_of_the_next_rows_of_all_episodes(steps, rows, monkeypatch):
    """Along which the internal state is that of the policy, with its noise, from 0 on.

    The gradient goes back to the first of these rows. The policy begins with the statistics of what
    the expert saw.
    """
    episodes = [episode(40, seed=1), episode(35, seed=2)]
    agent, expert, _ = make_agent(episodes=episodes, bc_steps=steps, std_z=0.2)
    losses = []
    monkeypatch.setattr(s2pg_gail, "descend", lambda optimizer, loss: losses.append(loss))
    torch.manual_seed(1)
    actual = agent.clone_behaviour(expert)
    shown = np.concatenate([one["observations"][:-1] for one in episodes])
    np.testing.assert_allclose(agent.actor.normalizer.mean, shown.mean(0), rtol=1e-4)
    np.testing.assert_allclose(agent.actor.normalizer.var, shown.var(0), rtol=1e-4)
    torch.manual_seed(1)
    z, errors = torch.zeros(2, 4), []
    for k in range(rows.stop):
        t = k % 40  # it begins anew with the episodes
        z = (z.detach() if k == rows.start else z) * (t > 0)
        obs = agent.actor.normalizer(expert.obs[t])
        a, z = agent.actor(obs, z, expert.a_prev[t]).split([1, 4], -1)
        z = z + 0.2 * torch.randn(2, 4)
        for n, one in enumerate(episodes):
            if k in rows and t < len(one["actions"]):
                errors.append((a[n] - torch.tensor(one["actions"][t])).square().sum())
    expected, cell = torch.stack(errors).mean(), list(agent.actor.cell.parameters())
    torch.testing.assert_close(actual, expected.detach())
    ours, theirs = (torch.autograd.grad(loss, cell) for loss in (losses[-1], expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("memoryless", [False, True])
def test_cloning_needs_an_internal_state_where_the_expert_had_one(memoryless):
    """A cue is seen once; what the expert does later depends on it."""
    rng, episodes = np.random.default_rng(0), []
    for i in range(16):
        cue, one = rng.choice([-0.8, 0.8]), episode(6, seed=i, sizes=(1, 1, 1))
        one["observations"][:], one["actions"][:] = 0, cue
        one["observations"][0] = cue
        one["actions"][2::2] = 0  # seeing what it did just before, it could do without
        episodes.append(one)
    options = dict(memoryless=memoryless, bc_steps=200, state_dim=32)
    agent, expert, _ = make_agent((1, 1, 1), episodes, **options)
    loss = agent.clone_behaviour(expert).item()
    # without: 0 is the best guess for the two of six actions that neither o nor a_prev give away
    assert loss > 0.15 if memoryless else loss < 0.08


# What the task pays -------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [s2pg_gail, s2pg_lsiq], ids=lambda s: s.__name__)
def test_the_reward_of_the_task_never_reaches_the_learner(script, tmp_path, monkeypatch):
    """Another reward, and nothing but what is logged of it is another. Nor do more episodes of the
    expert reach it than are asked for."""
    make, states, returns, sizes = envs.make, [], [], (2, 2, 1)  # of CueRecall
    env = envs.make_vec("CueRecall-5-v0")
    played = [episode(5, seed=seed, sizes=sizes) for seed in (1, 2)]
    played[1]["rewards"] *= 3
    envs.demonstrations.save(tmp_path / "expert.npz", played, env, {})
    options = dict(env_id="CueRecall-5-v0", demonstrations=str(tmp_path / "expert.npz"))
    options |= dict(total_timesteps=60, eval_episodes=1, demonstration_episodes=1)
    if script is s2pg_gail:
        options |= dict(num_steps=18, num_minibatches=3, bc_steps=2)
    else:
        options |= dict(learning_starts=20, batch_size=16)
    for scale in (1.0, -50.0):

        def other(*args, scale=scale, **kwargs):
            return gym.wrappers.TransformReward(make(*args, **kwargs), lambda r: scale * r)

        monkeypatch.setattr(envs, "make", other)
        folder = tmp_path / str(scale)
        folder.mkdir()
        monkeypatch.chdir(folder)
        script.train(script.Args(**options))
        (run_dir,) = folder.glob("runs/*")
        states.append(torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"])
        events = EventAccumulator(str(run_dir)).Reload()
        returns.append(events.Scalars("charts/episodic_return")[0].value)
        evaluated = [event.step for event in events.Scalars("eval/return_stochastic")]
        assert evaluated == ([0, 60] if script is s2pg_gail else [60])
        assert events.Scalars("charts/expert_return")[0].value == 5
    assert returns[1] == pytest.approx(-50 * returns[0]) and len(states[0]) > 20
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
