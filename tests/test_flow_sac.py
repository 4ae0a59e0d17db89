"""flow_sac.py: density and gradient of a path, the three velocities, CrossQ, offline to online."""

import math
import os
import signal
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal

import envs.demonstrations
import flow_sac

OBS, ACTION, STATE, BATCH = 3, 2, 4, 5
CPU = torch.device("cpu")
VELOCITIES = ["mlp", "flow_g", "flow_t", "none"]


@pytest.fixture(autouse=True)
def double_precision():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_actor(velocity="flow_g", **options):
    options = dict(state_dim=STATE, flow_width=16) | options
    args = flow_sac.Args(velocity=velocity, **options)
    return flow_sac.FlowActor(OBS, ACTION, args)


def make_agent(**options):
    env = SimpleNamespace(
        single_observation_space=gym.spaces.Box(-9, 9, (OBS,)),
        single_action_space=gym.spaces.Box(-1, 1, (ACTION,)),
    )
    return flow_sac.Agent(flow_sac.Args(**dict(batch_size=64) | options), env, CPU)


def seen(batch=BATCH, state=STATE):
    return torch.randn(batch, OBS), torch.rand(batch, state), torch.rand(batch, ACTION)


def filled(agent, rows=200):
    """A buffer of random rows: episodes of 19 steps, and some that terminate."""
    buffer = flow_sac.TransitionBuffer(1000, 1, *agent.row_sizes, CPU)
    t = torch.arange(rows).unsqueeze(-1)
    numbers = [torch.randn(rows, 1), (t % 100 == 58).double(), (t % 20 == 0).double()]
    action = 1.8 * torch.rand(rows, ACTION) - 0.9
    columns = [torch.randn(rows, OBS), torch.rand(rows, agent.z_dim), action, *numbers]
    buffer.rows[:rows] = torch.cat(columns, -1)
    buffer.steps += rows
    return buffer


# --- the path -------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["learned", "fixed"])
@pytest.mark.parametrize("velocity", VELOCITIES)
def test_the_density_is_that_of_every_gaussian_on_the_path(velocity, noise):
    """Step by step, with the drift of the paper for a fixed noise: its equations, other code."""
    actor = make_actor(velocity, noise=noise, sigma=0.3)
    obs, z, a_prev = seen()
    g, log_std, _ = actor(obs, z, a_prev)
    K = actor.steps
    noise_used = torch.randn(K + 1, BATCH, ACTION)
    path, log_prob = actor.path(obs, g, log_std, noise_used, actor.sigma)
    std = torch.full_like(log_std, 0.3 / K**0.5) if noise == "fixed" else log_std.exp()
    x, expected = path[0], torch.zeros(BATCH, ACTION)
    if velocity == "none":
        assert (x == 0).all() and K == 1
    else:
        expected = Normal(0.0, 1.0).log_prob(x)
    context = actor.velocity.context(torch.cat([obs, g], -1))
    for k, after in enumerate(path[1:]):
        t = k / K
        v = actor.velocity(context, x, torch.full((BATCH, 1), t))
        if noise == "fixed":
            v = (1 - t + t * 0.3**2 / 2) / (1 - t) * v - 0.3**2 / (2 * (1 - t)) * x
        torch.testing.assert_close(after, x + v / K + std * noise_used[k + 1])
        expected, x = expected + Normal(x + v / K, std).log_prob(after), after
    torch.testing.assert_close(log_prob, expected - torch.log(1 - torch.tanh(x).square()))


@pytest.mark.parametrize("velocity", VELOCITIES)
def test_the_density_falls_with_the_log_std_of_each_step(velocity):
    """The published Flow-T lacks the term -log std: no temperature can act on its std."""
    actor = make_actor(velocity)
    obs, z, a_prev = seen()
    g, log_std, _ = actor(obs, z, a_prev)
    log_std = log_std.detach().requires_grad_()
    _, log_prob = actor.path(obs, g, log_std, torch.zeros(actor.steps + 1, BATCH, ACTION))
    (gradient,) = torch.autograd.grad(log_prob.sum(), log_std)  # x_K does not move: no noise
    torch.testing.assert_close(gradient, torch.full_like(gradient, -actor.steps))


class Known(nn.Module):
    """A velocity v(x, t) in closed form."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity = velocity

    def context(self, obs):
        return None

    def forward(self, context, x, t):
        return self.velocity(x, t)


@pytest.mark.parametrize("K", [1, 4, 100])
@pytest.mark.parametrize("gate", [0, 0.1, 1, None])
def test_the_gradient_through_a_path_is_the_product_of_its_steps(gate, K):
    """v = c x gives (1 + c / K)^K, and a gate z gives (1 + z (c - 1) / K)^K, both below e^c."""
    actor = make_actor(flow_steps=K)
    actor.velocity = Known(lambda x, t: 4 * x if gate is None else gate * (4 * x - x))
    noise = torch.randn(K + 1, BATCH, ACTION).requires_grad_()
    path, _ = actor.path(*seen()[:2], torch.zeros(BATCH, ACTION), noise)
    (gradient,) = torch.autograd.grad(path[-1].sum(), noise)
    gain = (1 + (4 if gate is None else gate * 3) / K) ** K
    torch.testing.assert_close(gradient[0], torch.full_like(gradient[0], gain))


def test_a_new_gate_is_open_and_leaks():
    """Without a candidate, x_K = (1 - sigmoid(5) / K)^K x_0."""
    actor = make_actor("flow_g")
    nn.init.zeros_(actor.velocity.candidate.weight)
    nn.init.zeros_(actor.velocity.candidate.bias)
    noise = torch.zeros(actor.steps + 1, BATCH, ACTION)
    noise[0] = 1
    path, _ = actor.path(*seen()[:2], torch.zeros(BATCH, ACTION), noise)
    torch.testing.assert_close(path[-1], torch.full_like(path[-1], 0.3194), rtol=1e-3, atol=0)


@pytest.mark.parametrize("noise, low, high", [("fixed", 0.39, 0.41), ("learned", 0.52, 9)])
def test_the_corrected_drift_keeps_the_distribution_of_the_action(noise, low, high):
    """A flow from N(0, 1) to N(1.5, .4^2), with noise of .5: uncorrected, x_K spreads to .55."""
    K, mean, std = 64, 1.5, 0.4

    def velocity(x, t):
        slope = (t * std**2 - (1 - t)) / ((1 - t).square() + (t * std).square())
        return mean + slope * (x - t * mean)

    actor = make_actor(flow_steps=K, noise=noise, sigma=0.5)
    actor.velocity = Known(velocity)
    log_std = torch.full((20_000, ACTION), math.log(0.5 / K**0.5))
    eps = torch.randn(K + 1, 20_000, ACTION)
    path, _ = actor.path(*seen(20_000)[:2], log_std, eps, actor.sigma)
    assert low < path[-1].std() < high
    assert abs(path[-1].mean() - mean) < 0.03


@pytest.mark.parametrize("noise", ["learned", "fixed"])
@pytest.mark.parametrize("velocity", VELOCITIES)
def test_what_is_sampled_played_and_noise_free(velocity, noise):
    actor = make_actor(velocity, noise=noise)
    obs, z, a_prev = seen()
    torch.manual_seed(1)
    sample = actor.sample(obs, z, a_prev)
    torch.manual_seed(1)
    played = actor.act(obs, z, a_prev)
    assert all(torch.equal(one, other) for one, other in zip(played, sample))
    assert played[0].abs().max() < 1 and played[1].abs().max() < 1
    free, g = actor.act(obs, z, a_prev, deterministic=True)
    path, _ = actor.path(
        obs, g, torch.zeros(BATCH, ACTION), torch.zeros(9, BATCH, ACTION)[: actor.steps + 1]
    )
    torch.testing.assert_close(free, torch.tanh(path[-1]))
    torch.testing.assert_close(
        g,
        actor.cell(  # the kernel's mean, which sees z and a_prev
            torch.relu(torch.cat([actor.kernel_obs(obs), actor.kernel_action(a_prev)], -1)), z
        ),
    )
    actor.draw_x0 = True
    drawn, other = (actor.act(obs, z, a_prev, deterministic=True)[0] for _ in range(2))
    assert torch.equal(drawn, other) == (velocity == "none")


# --- the velocities -------------------------------------------------------------------------------


@pytest.mark.parametrize("velocity", ["mlp", "flow_g", "flow_t"])
def test_no_parameter_is_dead(velocity):
    """A single key makes queries and keys of attention idle: 24 % of the published Flow-T."""
    actor = make_actor(velocity)
    a, _, log_pi_a, log_pi_z = actor.sample(*seen(64))
    gradients = torch.autograd.grad((a.sum(-1) + log_pi_a + log_pi_z).sum(), actor.parameters())
    assert min(gradient.abs().max() for gradient in gradients) > 1e-6


@pytest.mark.parametrize("velocity", VELOCITIES)
def test_the_observation_is_read_once_and_by_each_row_alone(velocity):
    """Every row of a batch is its own path: no step sees another row, or another observation."""
    actor = make_actor(velocity)
    obs, z, a_prev = seen()
    calls = []
    actor.velocity.context.register_forward_hook(lambda *call: calls.append(1))
    torch.manual_seed(2)
    noise = torch.randn(actor.steps + 1, BATCH, ACTION)
    g, log_std, _ = actor(obs, z, a_prev)
    path, _ = actor.path(obs, g, log_std, noise)
    assert len(calls) == 1
    for i in range(BATCH):
        alone, _ = actor.path(obs[i : i + 1], g[i : i + 1], log_std[i : i + 1], noise[:, i : i + 1])
        torch.testing.assert_close(alone[-1], path[-1][i : i + 1])


# --- critics --------------------------------------------------------------------------------------


def test_batch_renorm_is_the_same_in_training_and_afterwards():
    norm = flow_sac.BatchRenorm(6)
    for _ in range(600):
        x = 3 + 2 * torch.randn(2, 1024, 6)
        trained = norm(x)
    torch.testing.assert_close(trained.mean(1), torch.zeros(2, 6), atol=1e-9, rtol=0)
    assert (norm.eval()(x) - trained).abs().mean() < 0.05 * trained.abs().mean()
    # late, a batch lies where the running statistics have it
    norm.train().calls.fill_(100_000)
    other = 3.5 + 2 * torch.randn(2, 1024, 6)
    expected = norm.eval()(other)
    torch.testing.assert_close(norm.train()(other), expected)
    far = norm(100 + 20 * torch.randn(2, 1024, 6))
    assert abs(far.mean() - 5) < 0.1 and far.std() < 3.1  # no further than d = 5, r = 3


def test_crossq_bootstraps_from_the_joint_batch_without_a_gradient():
    agent = make_agent(critic="crossq")
    batch = filled(agent).sample(32)
    critic = agent.critic.train()
    torch.manual_seed(3)
    loss, q = flow_sac.flow_critic_loss(agent.actor, critic, None, batch, 0.3, 0.9)
    torch.manual_seed(3)
    a, z, log_pi, _ = agent.actor.sample(batch.next_obs, batch.next_z, batch.action)
    now = [batch.state, batch.action, batch.next_z, batch.a_prev]
    later = [batch.next_state, a, z, batch.action]
    joint = critic(*(torch.cat(pair) for pair in zip(now, later)))
    y = batch.reward + 0.9 * (1 - batch.terminated) * (joint[:, 32:].amin(0) - 0.3 * log_pi)
    expected = (batch.weight * (joint[:, :32] - y.detach()).square()).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(q, joint[:, :32].detach())
    parameters = list(critic.parameters())
    for mine, theirs in zip(*(torch.autograd.grad(x, parameters) for x in (loss, expected))):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("critic", ["target", "crossq"])
def test_the_actor_is_updated_after_so_many_of_the_critic(critic, monkeypatch):
    agent = make_agent(critic=critic, policy_frequency=3, state_dim=STATE)
    buffer, calls = filled(agent), []

    def watched(optimizer, loss):
        before = {k: v.clone() for k, v in agent.state_dict().items()}
        descend(optimizer, loss)
        changed = {k.split(".")[0] for k, v in agent.state_dict().items() if (v != before[k]).any()}
        calls.append(changed)
        assert all(p.grad is None for p in agent.actor.parameters()) or len(calls) > 3

    descend = flow_sac.descend
    monkeypatch.setattr(flow_sac, "descend", watched)
    before = buffer.z.clone()
    target = [p.clone() for p in (agent.target_critic or agent.critic).parameters()]
    losses = agent.update(buffer)
    assert calls == 3 * [{"critic"}] + [{"actor", "log_alpha", "log_alpha_z"}]
    assert not agent.critic.training and (buffer.z != before).any()
    if critic == "target":
        moved = zip(agent.target_critic.parameters(), target)
        assert all(0 < (new - old).abs().max() < 0.01 for new, old in moved)
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize("velocity, target", [("flow_t", 0), ("none", -ACTION)])
def test_a_temperature_rises_where_entropy_is_missing(velocity, target):
    """Through the update that trains; a published variant has the sign the other way round."""
    for std, rises in (0.01, True), (2.0, False):
        agent = make_agent(velocity=velocity)
        nn.init.zeros_(agent.actor.policy_head.weight)
        share = (math.log(std) + 5) / 3.5 - 1  # of the range of log std
        nn.init.constant_(agent.actor.policy_head.bias, math.atanh(share))
        before = agent.log_alpha.item()
        entropy = agent.update(filled(agent))["losses/entropy"]
        assert (entropy < target) == rises
        assert (agent.log_alpha.item() > before) == rises


def test_the_temperature_of_a_fixed_noise_stays():
    agent = make_agent(noise="fixed")
    before = agent.log_alpha.item()
    agent.update(filled(agent))
    assert agent.log_alpha.item() == before


# --- offline to online ----------------------------------------------------------------------------


def test_flow_matching_learns_both_modes_of_the_data():
    """Actions of +-.9, which is what comes out after the tanh: the flow is matched before it."""
    torch.set_default_dtype(torch.float32)
    actor = make_actor("mlp", state_dim=0, flow_steps=8, flow_width=64)
    optimizer = torch.optim.Adam(actor.parameters(), 3e-3)
    for _ in range(600):
        side = torch.randint(0, 2, (256, 1)) * 1.8 - 0.9
        batch = SimpleNamespace(
            obs=torch.zeros(256, OBS), z=torch.zeros(256, 0), a_prev=torch.zeros(256, ACTION),
            action=side.expand(-1, ACTION), weight=torch.full((256,), 1 / 256),
        )  # fmt: skip
        flow_sac.descend(optimizer, flow_sac.flow_matching_loss(actor, batch))
    actor.draw_x0 = True
    with torch.no_grad():
        a, _ = actor.act(batch.obs, batch.z, batch.a_prev, deterministic=True)
    assert 0.85 < a.abs().mean() < 0.95
    assert 0.3 < (a[:, 0] > 0).float().mean() < 0.7


def test_the_pull_is_towards_the_stored_actions():
    agent = make_agent()
    batch = filled(agent).sample(32)
    losses = []
    for beta in 0.0, 2.0:
        torch.manual_seed(4)
        loss, *_ = flow_sac.flow_actor_loss(agent.actor, agent.critic, batch, 0.1, 0.1, beta)
        losses.append(loss)
    torch.manual_seed(4)
    a, *_ = agent.actor.sample(batch.obs, batch.z, batch.a_prev)
    pull = (batch.weight * (a - batch.action).square().sum(-1)).sum()
    torch.testing.assert_close(losses[1] - losses[0], 2 * pull)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_demonstrations_are_rows_as_environments_hand_them_out(num_envs):
    random, lengths, episodes = np.random.default_rng(0), [4, 1, 6], []
    for length in lengths:
        episode = {
            k: random.random((length + 1, 2)) for k in ("observations", "critic_observations")
        }
        episode |= dict(actions=random.random((length, 1)), rewards=random.random(length))
        episodes.append(episode | dict(terminations=np.arange(length) == length - 1))
    rows = list(envs.demonstrations.rows(episodes, num_envs))
    steps = sum(length + 1 for length in lengths) // num_envs
    obs, _, actions, rewards, terminated, first = (np.stack(c).swapaxes(0, 1) for c in zip(*rows))
    assert obs.shape == (num_envs, steps, 2)
    together = np.concatenate([episode["observations"] for episode in episodes])
    np.testing.assert_array_equal(obs.reshape(-1, 2), together[: num_envs * steps])
    starts = np.cumsum([0, 5, 2])
    assert np.flatnonzero(first.reshape(-1)).tolist() == starts.tolist()
    finals = [start - 1 for start in [*starts[1:], 14] if start - 1 < num_envs * steps]
    assert not actions.reshape(-1)[finals].any() and not rewards.reshape(-1)[finals].any()
    assert np.flatnonzero(terminated.reshape(-1)).tolist() == [
        f - 1 for f in [4, 6, 13] if f <= num_envs * steps
    ]


def test_a_run_stopped_offline_goes_on_offline(tmp_path, monkeypatch):
    """It is evaluated when the updates on the demonstrations are done, and not before."""
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    log, update, returns = [], flow_sac.FlowSAC.update, envs.returns

    def watched_update(agent, buffer, offline=False):
        log.append("offline" if offline else "online")
        if len(log) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        losses = update(agent, buffer, offline=offline)
        assert ("losses/flow_matching_loss" in losses) == offline
        return losses

    def watched_returns(*args):
        log.append("evaluation")
        return returns(*args)

    monkeypatch.setattr(flow_sac.FlowSAC, "update", watched_update)
    monkeypatch.setattr(envs, "returns", watched_returns)
    command = "flow_sac.py --demonstrations shipped:stochastic --offline-steps 7 --batch-size 8"
    command += " --total-timesteps 6 --eval-episodes 1 --flow-width 8 --eval-frequency 1000"
    monkeypatch.setattr("sys.argv", command.split())
    with pytest.raises(SystemExit) as stop:
        flow_sac.train(flow_sac.parse_args())
    assert stop.value.code == 128 + signal.SIGTERM
    (run,) = (tmp_path / "runs").iterdir()
    monkeypatch.setattr("sys.argv", ["flow_sac.py", "--resume", str(run)])
    flow_sac.train(flow_sac.parse_args())
    assert log == 7 * ["offline"] + ["evaluation"] + 4 * ["online"] + ["evaluation"]
