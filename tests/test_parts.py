"""The parts of the SAC pair: densities, actors, critics, losses, and what one update does.

Whatever is one text in both scripts is tested on s2pg_sac.py. Some tests are of the actors of PPO
and TD3, too.
"""

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from gymnasium.spaces import Box, Dict
from torch import nn
from torch.distributions import Normal

import bptt_ppo
import bptt_sac
import s2pg_lsiq
import s2pg_ppo
import s2pg_sac
import s2pg_td3

OBS, CRITIC, ACTION, STATE = 5, 7, 3, 8
CPU = torch.device("cpu")
ACTORS = {
    s2pg_sac: "StochasticStatefulActor", bptt_sac: "RecurrentActor",
    s2pg_ppo: "GaussianStatefulActor", bptt_ppo: "RecurrentGaussianActor",
    s2pg_td3: "DeterministicStatefulActor",
}  # fmt: skip
both_scripts = pytest.mark.parametrize("script", [s2pg_sac, bptt_sac], ids=lambda s: s.__name__)
five_scripts = pytest.mark.parametrize("script", ACTORS, ids=lambda s: s.__name__)
every_cell = pytest.mark.parametrize("rnn", ["gru", "lstm", "rnn"])


def make_actor(script=s2pg_sac, **options):
    args = script.Args(**dict(state_dim=STATE) | options)
    return getattr(script, ACTORS[script])(OBS, ACTION, args)


def inputs(actor, n):
    """Some o, z and a_prev, [n, .]."""
    z = 1.8 * torch.rand(n, actor.z_dim) - 0.9
    return torch.randn(n, OBS), z, 2 * torch.rand(n, ACTION) - 1


def memory_of(actor):
    return actor.cell if hasattr(actor, "cell") else actor.layer


# --- the squashed Gaussian ------------------------------------------------------------------------


def test_sample_and_log_density_and_their_gradients_are_those_of_torch_distributions():
    """Also where tanh(u) is rounded to +-1: log(1 - tanh(u)^2) = -2 log cosh u."""
    mean = torch.empty(500, 4, dtype=torch.float64).uniform_(-30, 30).requires_grad_()
    log_std = torch.empty_like(mean).uniform_(-5, 1).requires_grad_()
    state = torch.get_rng_state()
    sample, log_prob = s2pg_sac.squashed_gaussian(mean, log_std)
    torch.set_rng_state(state)
    u = mean + torch.randn_like(mean) * log_std.exp()
    log_cosh = u.abs() + torch.log1p(torch.exp(-2 * u.abs())) - math.log(2)
    expected = Normal(mean, log_std.exp()).log_prob(u) + 2 * log_cosh
    torch.testing.assert_close((sample, log_prob), (u.tanh(), expected))
    ours, theirs = (
        torch.autograd.grad((x + y).sum(), [mean, log_std])
        for x, y in ((sample, log_prob), (u.tanh(), expected))
    )
    torch.testing.assert_close(ours, theirs)


def test_atanh_inverts_tanh_and_is_finite_at_its_ends():
    u = torch.linspace(-3, 3, 50)
    torch.testing.assert_close(s2pg_sac.atanh(u.tanh()), u, rtol=0, atol=2e-4)
    ends = torch.tensor([-1.0, 1.0], requires_grad=True)
    values = s2pg_sac.atanh(ends)
    torch.testing.assert_close(values, torch.tensor([-7.25, 7.25]), rtol=0, atol=0.05)
    assert torch.autograd.grad(values.sum(), ends)[0].isfinite().all()


@pytest.mark.parametrize("bias, of_a, of_z", [(-99, -5, -5), (0, -1.5, -3), (99, 2, -1)])
def test_log_stds_stay_within_their_bounds(bias, of_a, of_z):
    actors = make_actor(log_std_z_max=-1.0), make_actor(bptt_sac)
    for actor, expected in zip(actors, ([of_a] * ACTION + [of_z] * STATE, [of_a] * ACTION)):
        with torch.no_grad():
            actor.policy_head.weight.zero_()
            actor.policy_head.bias.fill_(bias)
        x = inputs(actor, 1)
        _, log_std = actor(*x) if actor is actors[0] else actor(*x[:2])
        torch.testing.assert_close(log_std, torch.tensor([expected], dtype=torch.float32))


# --- the internal state ---------------------------------------------------------------------------


@both_scripts
@pytest.mark.parametrize("rnn", ["gru", "lstm"])
def test_with_chrono_the_gates_keep_for_up_to_so_many_steps(script, rnn):
    """Without input a GRU's unit goes h -> u h, an LSTM's c -> f c + (1 - f) g."""
    n, memories = 1000, []
    for chrono in (0, 20):
        torch.manual_seed(0)
        memories.append(memory_of(make_actor(script, rnn=rnn, state_dim=n, chrono=chrono)))
    plain, chrono = (dict(memory.named_parameters()) for memory in memories)
    ih, hh = (value for name, value in chrono.items() if "bias" in name)
    gates = torch.sigmoid(ih + hh).view(-1, n)
    scale = 1 / (1 - gates[1])  # in which a share of 1/e is left, about
    assert 2 <= scale.min() < 2.2 and 19 < scale.max() <= 20
    assert abs(scale.mean() - (2 + 20) / 2) < 1
    if rnn == "lstm":
        torch.testing.assert_close(gates[0], 1 - gates[1])
    # nothing else differs from what PyTorch does, whose units forget within steps
    changed = {"gru": slice(n, 2 * n), "lstm": slice(0, 2 * n)}[rnn]
    for name, value in chrono.items():
        same = torch.ones(len(value), dtype=torch.bool)
        same[changed] = "bias" not in name
        assert torch.equal(value[same], plain[name][same])
        assert "weight" in name or value[changed].ne(plain[name][changed]).all()


def keep_everything(cell):
    """Open the gate of a GRU or an LSTM that keeps its state, and shut the one that writes it."""
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.zero_()
        bias = next(p for p in cell.parameters() if p.dim() == 1)
        if len(bias) == 3 * STATE:  # gates: reset, update (1 keeps), new
            bias.view(3, -1)[1] = 40
        else:  # gates: input, forget (1 keeps), cell, output
            bias.view(4, -1)[0], bias.view(4, -1)[1] = -40, 40


def kept(actor, z, steps):
    for _ in range(steps):
        obs, _, a_prev = inputs(actor, len(z))
        _, z = actor.act(obs, z, a_prev, deterministic=True)
    return z


@five_scripts
@pytest.mark.parametrize("rnn", ["gru", "lstm"])
def test_a_kernel_keeps_what_its_gate_keeps(script, rnn):
    """h of a GRU, c of an LSTM. S2PG-SAC and S2PG-TD3 confine them to (-1, 1)."""
    actor = make_actor(script, rnn=rnn)
    keep_everything(memory_of(actor))
    z = (0.95 if script in (s2pg_sac, s2pg_td3) else 3) * (2 * torch.rand(100, actor.z_dim) - 1)
    assert (kept(actor, z, 100) - z)[:, -STATE:].abs().max() < 1e-3


@five_scripts
@every_cell
def test_action_and_internal_state_depend_on_all_that_the_policy_is_told(script, rnn):
    """o, z and a_prev; for an LSTM each half of z. But of its z' the policy reads h alone."""
    actor, read = make_actor(script, rnn=rnn), []
    for part in actor.children():
        part.register_forward_pre_hook(lambda _, x: read.append(x[0]))
    obs, z, a_prev = inputs(actor, 4)
    before = actor.act(obs, z, a_prev, deterministic=True)
    e, features, hidden = (x for x in read if x.shape[-1] > OBS)
    assert e.min() == features[..., :-STATE].min() == hidden.min() == 0  # of rectified layers
    torch.testing.assert_close(features[..., -STATE:].view(4, -1), before[1][:, :STATE])
    h, c = z.chunk(2, -1)
    for changed in (
        (-obs, z, a_prev), (obs, torch.cat([-h, c], -1), a_prev),
        (obs, torch.cat([h, -c], -1), a_prev), (obs, z, -a_prev),
    ):  # fmt: skip
        for x, y in zip(before, actor.act(*changed, deterministic=True)):
            assert (x != y).any(-1).all()


# --- acting ---------------------------------------------------------------------------------------


@both_scripts
@every_cell
def test_acting_is_sampling_and_noise_free_acting_uses_no_random_numbers(script, rnn):
    """And samples have the log densities of both kernels, each summed over its dimensions, [B]."""
    actor = make_actor(script, rnn=rnn)
    x, state = inputs(actor, 6), torch.get_rng_state()
    a, z = actor.act(*x, deterministic=True)
    assert torch.equal(torch.get_rng_state(), state)
    noisy_a, noisy_z = actor.act(*x)
    if script is s2pg_sac:
        torch.testing.assert_close(z, actor.noise_free_z(*x), atol=1e-5, rtol=0)
        noise_free, noisy, sizes = [a, z], [noisy_a, noisy_z], [ACTION, actor.z_dim]
    else:
        assert torch.equal(z, noisy_z)
        noise_free, noisy, sizes, x = [a], [noisy_a], [ACTION], (x[0], z[:, :STATE])
    mean, log_std = actor(*x)
    torch.set_rng_state(state)
    values, log_prob = s2pg_sac.squashed_gaussian(mean, log_std)
    torch.set_rng_state(state)
    sample = actor.sample(*x)
    assert torch.equal(torch.cat(noise_free, -1), mean.tanh()) and (values != mean.tanh()).all()
    assert torch.equal(torch.cat(noisy, -1), values) and not noisy_a.requires_grad
    assert torch.equal(torch.cat(sample[: len(sizes)], -1), values)
    expected = [part.sum(-1) for part in log_prob.split(sizes, -1)]
    torch.testing.assert_close(list(sample[len(sizes) :]), expected)


# --- critic ---------------------------------------------------------------------------------------


def test_the_twin_critic_is_two_independent_networks_that_start_like_linear_layers():
    critic = s2pg_sac.TwinCritic(6)
    x = torch.randn(40, 4), torch.randn(40, 2)
    q = critic(*x)
    assert q.shape == (2, 40) and (q[0] != q[1]).all()
    for i in range(2):
        mlp = nn.Sequential(nn.Linear(6, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        mlp.append(nn.Linear(256, 1))
        for ours, theirs in zip(critic.layers, mlp.parameters()):
            value = ours[i].T.reshape(theirs.shape).detach()
            if value.numel() > 1:  # U(-1, 1) / sqrt(fan_in)
                bound = value.abs().max().item()
                assert math.isclose(bound, theirs.abs().max().item(), rel_tol=0.05)
                assert math.isclose(value.std() * math.sqrt(3), bound, rel_tol=0.15)
            theirs.data = value
        torch.testing.assert_close(mlp(torch.cat(x, -1)).squeeze(-1), q[i], rtol=1e-4, atol=1e-6)
    # a loss on one leaves the other alone
    grads = torch.autograd.grad(q[0].sum(), list(critic.parameters()))
    assert all(g[0].any() and not g[1].any() for g in grads)


# --- losses ---------------------------------------------------------------------------------------


def make_batch(z_dim=STATE, weight=(1, 1, 1, 0, 1, 0, 1, 1)):
    n, weight = len(weight), torch.tensor(weight)
    return s2pg_sac.Transitions(
        obs=torch.randn(n, OBS), state=torch.randn(n, CRITIC), z=torch.rand(n, z_dim),
        a_prev=torch.rand(n, ACTION), action=torch.rand(n, ACTION), reward=torch.randn(n),
        terminated=(torch.arange(n) % 4 == 1).float(), next_obs=torch.randn(n, OBS),
        next_state=torch.randn(n, CRITIC), next_z=torch.rand(n, z_dim), after=torch.arange(n),
        weight=weight / weight.sum(),
    )  # fmt: skip


class Repeatable(s2pg_sac.StochasticStatefulActor):
    """An actor whose noise is .3 everywhere: the same for a batch and for its rows."""

    def sample(self, obs, z, a_prev):
        mean, log_std = self(obs, z, a_prev)
        u = mean + 0.3 * log_std.exp()
        log_prob = Normal(mean, log_std.exp()).log_prob(u) - torch.log(1 - u.tanh() ** 2)
        (a, z), logs = (x.split([ACTION, STATE], -1) for x in (u.tanh(), log_prob))
        return a, z, logs[0].sum(-1), logs[1].sum(-1)


def test_losses_entropies_and_gradients_of_s2pg_are_those_of_its_rows_with_weight():
    """Row by row: nothing is broadcast to B x B, what has no weight does not count.

    The smaller Q in both losses, of pi'(a, z') the entropy of a alone, nothing after a termination;
    and the action just taken is the a_prev of V(s'). Those of BPTT: tests/test_theory.py.
    """
    actor, batch = Repeatable(OBS, ACTION, s2pg_sac.Args(state_dim=STATE)), make_batch()
    critic, target = (s2pg_sac.TwinCritic(CRITIC + 2 * ACTION + STATE) for _ in range(2))
    args = SimpleNamespace(gamma=0.9, sobolev=0.0)
    q_loss, q = s2pg_sac.soft_critic_loss(actor, critic, target, batch, 0.5, args)
    pi_loss, z, entropy, entropy_z = s2pg_sac.soft_actor_loss(actor, critic, batch, 0.5, 0.25)
    assert not any(x.requires_grad for x in (q, z, entropy, entropy_z))
    assert torch.equal(q, critic(batch.state, batch.action, batch.next_z, batch.a_prev))
    assert torch.equal(z, actor.sample(batch.obs, batch.z, batch.a_prev)[1])

    expected, smaller = torch.zeros(4), set()
    for k in batch.weight.nonzero():
        row = type(batch)(*(column[k] for column in batch))
        with torch.no_grad():
            a, z, log_pi_a, _ = actor.sample(row.next_obs, row.next_z, row.action)
            v = target(row.next_state, a, z, row.action).min() - 0.5 * log_pi_a
            y = row.reward if row.terminated else row.reward + 0.9 * v
        td_error = critic(row.state, row.action, row.next_z, row.a_prev) - y
        a, z, log_pi_a, log_pi_z = actor.sample(row.obs, row.z, row.a_prev)
        q = critic(row.state, a, z, row.a_prev)
        smaller.add(q.argmin().item())
        pi = 0.5 * log_pi_a + 0.25 * log_pi_z - q.min()
        row_losses = (td_error**2).sum(), pi.sum(), -log_pi_a.sum(), -log_pi_z.sum()
        expected = expected + torch.stack(row_losses) / 6
    actual = torch.stack([q_loss, pi_loss, entropy, entropy_z])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert smaller == {0, 1}
    parts = [*actor.parameters(), *critic.parameters(), *target.parameters()]
    for k in range(2):
        ours, theirs = (
            torch.autograd.grad(x[k], parts, allow_unused=True, retain_graph=True)
            for x in (actual, expected)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# --- agents ---------------------------------------------------------------------------------------


BOX, LARGER = Box(-1, 1, (OBS,)), Box(-1, 1, (CRITIC,))
BOTH, EQUAL = Dict(policy=BOX, critic=LARGER), Dict(policy=BOX, critic=BOX)


def make_agent(script=s2pg_sac, space=BOTH, says={}, **options):  # noqa: B006
    """An agent, and its buffer with episodes of 9 transitions of 2 environments."""
    env = SimpleNamespace(
        single_observation_space=space, single_action_space=Box(-1, 1, (ACTION,)), **says
    )
    options = dict(state_dim=STATE, num_envs=2, buffer_size=400, batch_size=16) | options
    agent = script.Agent(script.Args(**options), env, CPU)
    kind = bptt_sac.SequenceBuffer if script is bptt_sac else s2pg_sac.TransitionBuffer
    buffer = kind(400, 2, *agent.row_sizes, CPU)
    for t in range(60):
        terminated, first = ([t % 10 == k] * 2 for k in (8, 0))
        obs, z, a = inputs(agent.actor, 2)
        buffer.add(obs, torch.randn(2, CRITIC), z, a, torch.randn(2), terminated, first)
    return agent, buffer


@pytest.mark.parametrize(
    "script", [s2pg_sac, bptt_sac, s2pg_td3, s2pg_lsiq], ids=lambda s: s.__name__
)
def test_every_parameter_has_its_learning_rate(script):
    """Of an Adam that is the usual one otherwise."""
    rates = dict(actor_lr=0.1, critic_lr=0.2, alpha_lr=0.3, alpha_z_lr=0.4)
    rates = {name: rate for name, rate in rates.items() if hasattr(script.Args, name)}
    agent, _ = make_agent(script, **rates)
    groups = [group for optimizer in agent.optimizers for group in optimizer.param_groups]
    own, usual = dict(lr=0, params=0), torch.optim.Adam([torch.zeros(1)], fused=True)
    assert all(group | own == usual.param_groups[0] | own for group in groups)
    actual = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, p in agent.named_parameters():
        if p.requires_grad:
            assert actual.pop(id(p)) == rates[name.split(".")[0].removeprefix("log_") + "_lr"]
    assert not actual and agent.critic_loss.__module__ == script.__name__  # nor is it compiled


def both_losses(script, actor, critic, target, batch):
    """(critic loss, Q) and (actor loss, ..., entropies) of a script."""
    args = SimpleNamespace(gamma=0.9, sobolev=0.0)
    if script is s2pg_sac:
        q_loss = script.soft_critic_loss(actor, critic, target, batch, 0.3, args)
        return q_loss, script.soft_actor_loss(actor, critic, batch, 0.3, 0.01)
    all_h, _ = actor.unroll(batch.all_obs, batch.first_z, batch.all_a_prev)
    h, next_h = all_h[batch.index], all_h[1:][batch.index]
    q_loss = script.bptt_critic_loss(actor, critic, target, batch, next_h, 0.3, args)
    return q_loss, script.bptt_actor_loss(actor, critic, batch, h, 0.3)


@both_scripts
def test_an_update_is_the_step_of_the_critic_and_then_of_the_actor_against_the_new_one(script):
    """And reports what it found, as numbers without a gradient, of the rows with weight."""
    options, targets = dict(sequence_length=4), dict(alpha=-ACTION)
    if script is s2pg_sac:  # the target of z is so much for each of its components
        options, targets = dict(target_entropy_z=-3.0), targets | dict(alpha_z=-3.0 * 2 * STATE)
    agent, buffer = make_agent(script, gamma=0.9, alpha=0.3, tau=0.1, rnn="lstm", **options)
    networks = agent.target_critic.parameters(), agent.critic.parameters()
    assert all(torch.equal(*pair) and pair[0] is not pair[1] for pair in zip(*networks))
    with torch.no_grad():
        agent.target_critic.layers[-1].add_(1)
    old, rows = copy.deepcopy((agent, buffer))
    torch.manual_seed(1)
    batch = buffer.sample(16) if script is s2pg_sac else buffer.sample(16, 4, False)
    before_the_losses = torch.get_rng_state()
    torch.manual_seed(1)
    metrics = agent.update(buffer)
    torch.set_rng_state(before_the_losses)

    critics = iter([old.critic, agent.critic])  # what the first loss sees, and the second
    (qf_loss, q), (actor_loss, *rest) = both_losses(
        script, old.actor, lambda *x: next(critics)(*x), old.target_critic, batch
    )
    expected = dict(qf_loss=qf_loss, actor_loss=actor_loss, qf_values=q[:, batch.weight > 0].mean())
    expected |= dict(alpha=torch.tensor(0.3), entropy=rest[script is s2pg_sac])
    expected |= dict(alpha_z=torch.tensor(0.01), entropy_z=rest[-1]) if script is s2pg_sac else {}
    expected = {f"losses/{name}": value.detach() for name, value in expected.items()}
    torch.testing.assert_close(metrics, expected)
    assert not any(value.requires_grad for value in metrics.values())
    if script is s2pg_sac:  # the sample of the actor loss becomes the next internal state
        rows.refresh(batch, rest[0])
    torch.testing.assert_close(buffer.rows, rows.rows)

    # every part moves; of the targets theta' <- theta' + tau (theta - theta'), with the new theta
    for (name, new), before in zip(agent.named_parameters(), old.parameters()):
        assert (new != before).any(), name
    parts = (x.parameters() for x in (old.target_critic, agent.target_critic, agent.critic))
    for before, new, theta in zip(*parts):
        assert not new.requires_grad
        torch.testing.assert_close(new, before + 0.1 * (theta - before), rtol=1e-5, atol=1e-8)
    # a temperature falls while its entropy is above the target
    for name, target in targets.items():
        alpha, log_alpha = metrics[f"losses/{name}"], getattr(agent, f"log_{name}")
        excess = metrics[f"losses/{name.replace('alpha', 'entropy')}"] - target
        torch.testing.assert_close(log_alpha.grad, alpha * excess)
        assert (log_alpha.exp() < alpha) == (excess > 0)


def test_each_step_computes_gradients_for_its_own_parameters_and_anew():
    """The critic is a constant in the actor's step."""
    x, y = (nn.Parameter(torch.tensor(1.0)) for _ in range(2))
    optimizer = torch.optim.SGD([x], lr=0.1)
    for _ in range(3):
        s2pg_sac.descend(optimizer, 2 * x * y)
    assert math.isclose(x.item(), 1 - 3 * 0.2, rel_tol=1e-5) and y == 1 and y.grad is None


def test_a_memoryless_agent_has_no_recurrent_parameters_and_updates():
    agent, buffer = make_agent(memoryless=True, rnn="lstm")
    names = [name for name, _ in agent.actor.named_parameters()]
    assert names and all(name.startswith("policy_") for name in names)
    assert agent.z_dim == agent.actor.z_dim == 0 and buffer.z.shape == (400, 0)
    assert agent.critic.layers[0].shape[1] == CRITIC + 2 * ACTION
    before, rows = [p.detach().clone() for p in agent.actor.parameters()], buffer.rows.clone()
    assert all(value.isfinite() for value in agent.update(buffer).values())
    assert all((a != b).any() for a, b in zip(before, agent.actor.parameters()))
    assert torch.equal(buffer.rows, rows)
    # nothing but the observation counts
    obs, z, a_prev = inputs(agent.actor, 5)
    a, b = (agent.actor.act(obs, z, x, deterministic=True)[0] for x in (a_prev, -a_prev))
    assert torch.equal(a, b)


@both_scripts
@pytest.mark.parametrize(
    "space, says, sees_more",
    [
        (BOTH, {}, True), (BOTH, dict(critic_sees_more=False), False),
        (EQUAL, {}, False), (EQUAL, dict(critic_sees_more=True), True), (BOX, {}, False),
    ],
)  # fmt: skip
def test_a_critic_that_sees_no_more_than_the_policy_gets_the_internal_state(
    script, space, says, sees_more
):
    """z, or h for BPTT. Where the environment does not say what the critic sees, sizes do."""
    agent, buffer = make_agent(script, space, says, rnn="lstm")
    critic_dim = (space["critic"] if isinstance(space, Dict) else space).shape[0]
    z_dim, z_next = (agent.z_dim, agent.z_dim) if script is s2pg_sac else (STATE, 0)
    width = critic_dim if sees_more else OBS + z_dim
    assert agent.row_sizes == (OBS, critic_dim if sees_more else 0, agent.z_dim, ACTION)
    assert agent.critic.layers[0].shape[1] == width + ACTION + z_next + ACTION
    assert all(value.isfinite() for value in agent.update(buffer).values())


@pytest.mark.parametrize("privileged", [True, False])
def test_sobolev_adds_the_squared_error_of_each_critics_slope_in_z(privileged):
    """As by central differences, of a'', z'' and, without a privileged critic, of s' = (o', z')."""
    actor = Repeatable(OBS, ACTION, s2pg_sac.Args(state_dim=STATE)).double()
    _, buffer = make_agent(space=BOTH if privileged else BOTH["policy"])
    buffer.rows, buffer.action = buffer.rows.double(), buffer.action.double()
    batch = buffer.sample(16)
    inputs = batch.state.shape[1] + 2 * ACTION + STATE
    critic, target = (s2pg_sac.TwinCritic(inputs).double() for _ in range(2))

    def errors(z):
        """Q_i - y [2, B]."""
        state = batch.next_state if privileged else torch.cat([batch.next_obs, z], -1)
        a, next_z, log_pi_a, _ = actor.sample(batch.next_obs, z, batch.action)
        v = target(state, a, next_z, batch.action).amin(0) - 0.5 * log_pi_a
        y = batch.reward + 0.9 * (1 - batch.terminated) * v
        return critic(batch.state, batch.action, z.expand(2, -1, -1), batch.a_prev) - y

    z, steps = batch.next_z.detach(), 1e-6 * torch.eye(STATE, dtype=torch.float64)
    slopes = torch.stack([(errors(z + h) - errors(z - h)) / 2e-6 for h in steps], -1)
    args = [SimpleNamespace(gamma=0.9, sobolev=weight) for weight in (0.0, 2.0)]
    losses = [s2pg_sac.soft_critic_loss(actor, critic, target, batch, 0.5, a)[0] for a in args]
    expected = 2 * (batch.weight * slopes.square().sum(-1)).sum()
    torch.testing.assert_close(losses[1] - losses[0], expected, rtol=1e-5, atol=1e-8)
    weights = critic.layers[0], critic.layers[2]  # the slopes do not depend on the biases
    ours, theirs = (torch.autograd.grad(x, weights) for x in (losses[1] - losses[0], expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert (slopes.abs().amax((0, 1)) > 1e-3).all()


def test_a_loss_with_sobolev_is_not_compiled():
    """torch.compile has no second derivatives; without it both are."""
    for sobolev in 0.0, 0.1:
        agent, _ = make_agent(compile=True, sobolev=sobolev)
        assert (agent.critic_loss is s2pg_sac.soft_critic_loss) == (sobolev > 0)


# --- a fair comparison ----------------------------------------------------------------------------


def test_both_scripts_have_the_same_options_but_for_the_algorithm():
    ours, theirs = ({f.name for f in dataclasses.fields(s.Args)} for s in (s2pg_sac, bptt_sac))
    assert ours - theirs == {
        "memoryless", "sobolev", "alpha_z", "alpha_z_lr", "target_entropy_z", "log_std_z_max",
    }  # fmt: skip
    assert theirs - ours == {"sequence_length", "loss_on", "initial_state"}


def test_both_scripts_are_tuned_alike_for_each_task():
    """But for the entropy of the internal state, which BPTT does not have.

    And for the critic of InvertedPendulum: each has the learning rate that was better for it.
    """
    ours = {
        task: {k: v for k, v in tuned.items() if not k.startswith(("alpha_z", "target_entropy_z"))}
        for task, tuned in s2pg_sac.TUNED.items()
    }
    assert ours["InvertedPendulum"].pop("critic_lr") == 3e-4
    assert ours == bptt_sac.TUNED


@every_cell
def test_both_agents_have_networks_and_optimisers_of_the_same_kind(rnn):
    """S2PG has z' as one input of Q more, and the spread of z' in the head of its actor."""
    ours, theirs = make_agent(rnn=rnn)[0], make_agent(bptt_sac, rnn=rnn)[0]
    one, other = (
        {name.replace("layer", "cell").replace("_l0", ""): p.numel() for name, p in parameters}
        for parameters in (ours.named_parameters(), theirs.named_parameters())
    )
    assert one.keys() - other.keys() == {"log_alpha_z"} and other.keys() < one.keys()
    z_dim = STATE * (1 + (rnn == "lstm"))
    assert {name: one[name] - size for name, size in other.items() if one[name] != size} == {
        "critic.cells.0": 2 * 256 * z_dim, "target_critic.cells.0": 2 * 256 * z_dim,
        "actor.policy_head.weight": 256 * z_dim, "actor.policy_head.bias": z_dim,
    }  # fmt: skip
    for a, b in zip(ours.optimizers, theirs.optimizers):
        assert type(a) is type(b)
        for group_a, group_b in zip(a.param_groups, b.param_groups):
            assert group_a | dict(params=0) == group_b | dict(params=0)
