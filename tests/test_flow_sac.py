"""flow_sac.py: density of a path, the three velocities, CrossQ.

The gradient through a path: tests/test_through_time.py.
"""

import math
from types import SimpleNamespace

import gymnasium as gym
import pytest
import torch
from torch import nn
from torch.distributions import Normal

import flow_sac

OBS, ACTION, STATE, BATCH = 3, 2, 4, 5
CPU = torch.device("cpu")
VELOCITIES = ["mlp", "flow_g", "flow_t", "none"]
ENV = SimpleNamespace(
    single_observation_space=gym.spaces.Box(-9, 9, (OBS,)),
    single_action_space=gym.spaces.Box(-1, 1, (ACTION,)),
)
pytestmark = pytest.mark.usefixtures("double_precision")


def make_actor(velocity="flow_g", **options):
    options = dict(state_dim=STATE, flow_width=16) | options
    args = flow_sac.Args(velocity=velocity, **options)
    return flow_sac.FlowActor(OBS, ACTION, args)


def make_agent(**options):
    return flow_sac.Agent(flow_sac.Args(**dict(batch_size=64) | options), ENV, CPU)


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


@pytest.mark.parametrize("velocity", VELOCITIES)
def test_the_density_is_that_of_every_gaussian_on_the_path(velocity):
    """Step by step, by the densities of torch.distributions."""
    actor = make_actor(velocity)
    obs, z, a_prev = seen()
    g, log_std, _ = actor(obs, z, a_prev)
    K = actor.steps
    noise_used = torch.randn(K + 1, BATCH, ACTION)
    path, log_prob = actor.path(obs, g, log_std, noise_used)
    std = log_std.exp()
    x, expected = path[0], torch.zeros(BATCH, ACTION)
    if velocity == "none":
        assert (x == 0).all() and K == 1
    else:
        expected = Normal(0.0, 1.0).log_prob(x)
    context = actor.velocity.context(torch.cat([obs, g], -1))
    for k, after in enumerate(path[1:]):
        t = k / K
        v = actor.velocity(context, x, torch.full((BATCH, 1), t))
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


def test_a_new_gate_is_open_and_leaks():
    """Without a candidate, x_K = (1 - sigmoid(5) / K)^K x_0."""
    actor = make_actor("flow_g")
    nn.init.zeros_(actor.velocity.candidate.weight)
    nn.init.zeros_(actor.velocity.candidate.bias)
    noise = torch.zeros(actor.steps + 1, BATCH, ACTION)
    noise[0] = 1
    path, _ = actor.path(*seen()[:2], torch.zeros(BATCH, ACTION), noise)
    torch.testing.assert_close(path[-1], torch.full_like(path[-1], 0.3194), rtol=1e-3, atol=0)


@pytest.mark.parametrize("velocity", VELOCITIES)
def test_what_is_sampled_played_and_noise_free(velocity):
    actor = make_actor(velocity)
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
    u, log_std_z = torch.atanh(sample[1]), actor(obs, z, a_prev)[2]  # z' is spread around g
    expected = Normal(torch.atanh(g), log_std_z.exp()).log_prob(u) - torch.log(1 - sample[1] ** 2)
    torch.testing.assert_close(sample[3], expected.sum(-1), rtol=1e-3, atol=1e-3)
    # the flow's std sees a_prev, by way of g
    assert not torch.equal(actor(obs, z, a_prev)[1], actor(obs, z, -a_prev)[1])
    actor.draw_x0 = True
    drawn, other = (actor.act(obs, z, a_prev, deterministic=True)[0] for _ in range(2))
    assert torch.equal(drawn, other) == (velocity == "none")


def test_what_is_logged_of_a_path_is_its_gain_its_gate_and_its_std():
    """Without a candidate dx_K/dx_0 = (1 - sigmoid(5) / K)^K, in every direction."""
    agent = make_agent(velocity="flow_g")
    nn.init.zeros_(agent.actor.velocity.candidate.weight)
    batch = filled(agent).sample(32)
    found = flow_sac.path_gradients(agent.actor, agent.critic, batch)
    assert found["flow/gain"].item() == pytest.approx(0.3194, rel=1e-3)
    ratio = found["flow/gradient_0"] / found["flow/gradient_4"]
    assert ratio.item() == pytest.approx(found["flow/gain"].item())
    assert found["flow/gate"].item() == pytest.approx(1 / (1 + math.exp(-5)))
    _, log_std, _ = agent.actor(batch.obs, batch.z, batch.a_prev)
    assert found["flow/std"].item() == pytest.approx(log_std.exp().mean().item())


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


@pytest.mark.parametrize("kind", ["target", "crossq"])
def test_the_critic_bootstraps_from_its_target_or_the_joint_batch_without_a_gradient(kind):
    agent = make_agent(critic=kind, state_dim=STATE)
    batch, target = filled(agent).sample(512), agent.target_critic
    assert batch.terminated.any()
    critic = agent.critic.train()
    if kind == "target":
        for p in target.parameters():  # to tell it from the critic
            p += 0.1 * torch.randn_like(p)
    torch.manual_seed(3)
    loss, q = flow_sac.flow_critic_loss(agent.actor, critic, target, batch, 0.3, 0.9)
    torch.manual_seed(3)
    a, z, log_pi, _ = agent.actor.sample(batch.next_obs, batch.next_z, batch.action)
    now = [batch.state, batch.action, batch.next_z, batch.a_prev]
    later = [batch.next_state, a, z, batch.action]
    if kind == "target":
        own, next_q = critic(*now), target(*later)
    else:
        own, next_q = critic(*(torch.cat(pair) for pair in zip(now, later))).chunk(2, -1)
    y = batch.reward + 0.9 * (1 - batch.terminated) * (next_q.amin(0) - 0.3 * log_pi)
    expected = (batch.weight * (own - y.detach()).square()).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(q, own.detach())
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
        online.append([p.clone() for p in agent.critic.parameters()])
        assert all(p.grad is None for p in agent.actor.parameters()) or len(calls) > 3

    descend, loss, drawn, online = flow_sac.descend, agent.actor_loss, [], []
    monkeypatch.setattr(flow_sac, "descend", watched)
    monkeypatch.setattr(
        agent, "actor_loss", lambda *x: drawn.append((x[1].training, x[2], loss(*x))) or drawn[0][2]
    )
    target = [p.clone() for p in (agent.target_critic or agent.critic).parameters()]
    losses = agent.update(buffer)
    assert calls == 3 * [{"critic"}] + [{"actor", "log_alpha", "log_alpha_z"}]
    ((training, batch, (_, z, *_)),) = drawn
    assert not training  # the actor's loss takes running statistics, and does not move them
    # the sample of the actor loss becomes the next internal state
    for row in batch.after[batch.weight > 0].tolist():
        assert (buffer.z[row] == z[batch.after == row]).all(1).any()
    if critic == "target":
        for critic_now in online[:3]:
            target = [old.lerp(new, agent.args.tau) for old, new in zip(target, critic_now)]
        torch.testing.assert_close(list(agent.target_critic.parameters()), target)
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


def test_temperatures_take_the_gradient_of_their_excess_and_each_part_its_own_rate():
    rates = dict(actor_lr=0.1, critic_lr=0.2, alpha_lr=0.3, alpha_z_lr=0.4)
    agent = make_agent(state_dim=STATE, target_entropy_z=-3.0, adam_beta1=0.5, **rates)
    for optimizer in agent.optimizers:
        for group in optimizer.param_groups:
            assert group["betas"] == (0.5, 0.999)
            inside = set(map(id, group["params"]))
            names = {k.split(".")[0] for k, p in agent.named_parameters() if id(p) in inside}
            assert {rates[name.removeprefix("log_") + "_lr"] for name in names} == {group["lr"]}
    losses = agent.update(filled(agent))
    for name, target in ("alpha", 0), ("alpha_z", -3.0 * STATE):
        excess = losses[f"losses/{name.replace('alpha', 'entropy')}"] - target
        grad = getattr(agent, f"log_{name}").grad
        torch.testing.assert_close(grad, losses[f"losses/{name}"] * excess)
