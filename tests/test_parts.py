"""The parts of both scripts: densities, memory, critics, losses, and what one update does."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import bptt_sac
import s2pg_lsiq
import s2pg_sac

OBS, CRITIC, ACTION, STATE = 5, 7, 3, 8
CPU = torch.device("cpu")
SCRIPTS = [s2pg_sac, bptt_sac]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_actor(rnn="gru", kernel="atanh", state_dim=STATE):
    return s2pg_sac.StochasticStatefulActor(OBS, ACTION, state_dim, rnn, kernel)


def make_recurrent_actor(rnn="gru"):
    return bptt_sac.RecurrentActor(OBS, ACTION, STATE, rnn)


def inputs(actor, n):
    """Some obs, z and a_prev, [n, .]."""
    z = 1.8 * torch.rand(n, actor.z_dim) - 0.9
    return torch.randn(n, OBS), z, 2 * torch.rand(n, ACTION) - 1


# --- the squashed Gaussian ------------------------------------------------------------------------


def reference(mean, log_std):
    normal = Normal(mean, log_std.exp())
    return normal, TransformedDistribution(normal, [TanhTransform(cache_size=1)])


def drawn_again(mean, log_std, seed):
    """What `squashed_gaussian` draws after `seed`: its sample, log p, and u before the tanh."""
    torch.manual_seed(seed)
    sample, log_prob = s2pg_sac.squashed_gaussian(mean, log_std)
    torch.manual_seed(seed)
    return sample, log_prob, mean + torch.randn_like(mean) * log_std.exp()


def test_the_log_density_is_that_of_torch_distributions():
    mean = 3 * torch.randn(500, 4, dtype=torch.float64)
    log_std = torch.empty_like(mean).uniform_(-5, 1)
    sample, log_prob, u = drawn_again(mean, log_std, seed=1)
    normal, squashed = reference(mean, log_std)
    torch.testing.assert_close(sample, u.tanh())
    inner = u.abs() < 5  # beyond, the reference has to invert a saturated tanh
    assert inner.float().mean() > 0.8
    torch.testing.assert_close(
        log_prob[inner], squashed.log_prob(sample)[inner], rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        log_prob, normal.log_prob(u) - TanhTransform().log_abs_det_jacobian(u, sample)
    )


@pytest.mark.parametrize("center", [-15.0, -9.0, 9.0, 15.0])
def test_the_log_density_is_finite_and_right_far_from_zero(center):
    """Where float32 has rounded tanh(u) to +-1: log(1 - tanh(u)^2) = 2 log 2 - 2 |u|."""
    mean = torch.full((200,), center, requires_grad=True)
    log_std = torch.full((200,), -3.0, requires_grad=True)
    sample, log_prob, u = drawn_again(mean, log_std, seed=2)
    expected = Normal(mean, log_std.exp()).log_prob(u) - (2 * math.log(2) - 2 * u.abs())
    torch.testing.assert_close(log_prob, expected, rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad((log_prob + sample).sum(), [mean, log_std])
    assert all(torch.isfinite(g).all() for g in gradients)
    assert torch.isfinite(log_prob).all() and sample.abs().max() <= 1


def test_gradients_of_the_log_density_are_those_of_torch_distributions():
    """With respect to the mean and the log std, by way of the sample and directly."""
    mean = torch.randn(200, 3, dtype=torch.float64).requires_grad_()
    log_std = torch.empty_like(mean).uniform_(-3, 0.5).requires_grad_()
    _, log_prob, _ = drawn_again(mean, log_std, seed=3)
    actual = torch.autograd.grad(log_prob.sum(), [mean, log_std])
    torch.manual_seed(3)
    _, squashed = reference(mean, log_std)
    u = mean + torch.randn_like(mean) * log_std.exp()
    expected = torch.autograd.grad(squashed.log_prob(u.tanh()).sum(), [mean, log_std])
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_density_integrates_to_one_and_its_negative_log_to_the_entropy():
    """Quadrature over u against the mean of many samples of the script."""
    mean, log_std = torch.tensor(0.4, dtype=torch.float64), torch.tensor(-0.5, dtype=torch.float64)
    u = torch.linspace(-8, 9, 20_001, dtype=torch.float64)
    x = u.tanh()
    normal = Normal(mean, log_std.exp())
    density = normal.log_prob(u).exp() / (1 - x**2)
    inner = density > 0
    entropy = torch.trapezoid(-(density * density.log())[inner], x[inner])
    assert math.isclose(torch.trapezoid(density, x).item(), 1, rel_tol=1e-4)

    n = 400_000
    _, log_prob = s2pg_sac.squashed_gaussian(mean.expand(n), log_std.expand(n))
    error = log_prob.std() / math.sqrt(n)
    assert (-log_prob.mean() - entropy).abs() < 5 * error and error < 0.003


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_log_std_stays_within_its_bounds(script):
    x = torch.tensor([-100.0, -1.0, 0.0, 1.0, 100.0])
    log_std = script.bounded_log_std(x)
    assert log_std[0] == -5 and log_std[-1] == 2 and math.isclose(log_std[2], -1.5)
    assert (log_std.diff() > 0).all()


@pytest.mark.parametrize("script", [s2pg_sac, s2pg_lsiq])
def test_the_log_std_of_the_memory_has_a_bound_of_its_own(script):
    args = script.Args(log_std_z_max=-3.0, state_dim=STATE)
    actor = script.Agent(args, OBS, CRITIC, ACTION, True, CPU).actor
    for bias, a, z in ((-1e4, -5, -5), (0, -1.5, -4), (1e4, 2, -3)):
        with torch.no_grad():
            actor.policy_head.weight.zero_()
            actor.policy_head.bias.fill_(bias)
        _, log_std = actor(*inputs(actor, 3))
        torch.testing.assert_close(log_std[:, :ACTION], torch.full((3, ACTION), float(a)))
        torch.testing.assert_close(log_std[:, ACTION:], torch.full((3, STATE), float(z)))


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rnn", ["gru", "lstm"])
def test_with_chrono_the_gates_keep_for_up_to_so_many_steps(rnn):
    """Without input a GRU's unit goes h -> u h, an LSTM's c -> f c + (1 - f) g."""
    steps, n = 20, 1000
    layer, cell = {"gru": (nn.GRU, nn.GRUCell), "lstm": (nn.LSTM, nn.LSTMCell)}[rnn]
    for script, module in ((s2pg_sac, cell), (bptt_sac, layer)):
        own = module(4, n)
        before = {k: v.clone() for k, v in own.state_dict().items()}
        script.chrono_init(own, steps)
        bias = sum(v for k, v in own.state_dict().items() if k.startswith("bias"))
        gates = torch.sigmoid(bias).view(-1, n)
        scale = 1 / (1 - gates[1])  # in which a share of 1/e is left, about
        assert 2 <= scale.min() < 2.2 and 19 < scale.max() <= 20
        assert abs(scale.mean() - (2 + 20) / 2) < 1
        if rnn == "lstm":
            torch.testing.assert_close(gates[0], 1 - gates[1])
        changed = {"gru": slice(n, 2 * n), "lstm": slice(0, 2 * n)}[rnn]
        for name, value in own.state_dict().items():
            same = torch.ones(len(value), dtype=torch.bool)
            same[changed] = not name.startswith("bias")
            assert torch.equal(value[same], before[name][same])


@pytest.mark.parametrize("script", [s2pg_sac, s2pg_lsiq, bptt_sac])
def test_the_gates_of_an_agent_forget_unless_chrono_is_given(script):
    for chrono, slowest in ((0, (1.5, 2.5)), (50, (45, 50))):
        actor = script.Agent(script.Args(chrono=chrono), OBS, CRITIC, ACTION, True, CPU).actor
        cell = actor.layer if script is bptt_sac else actor.cell
        bias = sum(p for p in cell.parameters() if p.dim() == 1).view(3, -1)[1]
        low, high = slowest
        assert low < (1 / (1 - torch.sigmoid(bias))).max() < high


def keep_everything(cell, suffix=""):
    """Open the gate of a GRU or LSTM that keeps the memory, and shut the one that writes it."""
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.zero_()
        bias = getattr(cell, "bias_ih" + suffix)
        if isinstance(cell, (nn.GRUCell, nn.GRU)):  # gates: reset, update (1 keeps), new
            bias.view(3, -1)[1] = 40
        else:  # gates: input, forget (1 keeps), cell, output
            bias.view(4, -1)[0], bias.view(4, -1)[1] = -40, 40


def run(actor, z, steps=100):
    with torch.no_grad():
        for _ in range(steps):
            obs, _, a_prev = inputs(actor, len(z))
            _, z = actor.act(obs, z, a_prev, deterministic=True)
    return z


def some_memory(n=1000):
    z = 1.9 * torch.rand(n // STATE, STATE) - 0.95
    z[0], z[1] = 0.76, -0.76
    return z


def test_the_atanh_kernel_keeps_what_the_gate_keeps():
    actor, z = make_actor(), some_memory()
    keep_everything(actor.cell)
    assert (run(actor, z) - z).abs().max() < 1e-3


def test_the_official_kernel_leaks():
    """The published fault: g, in (-1, 1) already, is squashed once more at every step."""
    actor, z = make_actor(kernel="official"), some_memory()
    keep_everything(actor.cell)
    assert run(actor, z)[0].max() < 0.2
    assert 0.40 < run(actor, z, steps=5)[0].max() < 0.50


@pytest.mark.parametrize("make", [lambda: make_actor("lstm"), lambda: make_recurrent_actor("lstm")])
def test_an_lstm_with_an_open_forget_gate_keeps_its_cell_state(make):
    actor = make()
    if hasattr(actor, "cell"):
        keep_everything(actor.cell)
    else:
        keep_everything(actor.layer, "_l0")
    z = torch.cat([torch.zeros(125, STATE), some_memory()], -1)
    assert (run(actor, z)[:, STATE:] - z[:, STATE:]).abs().max() < 1e-3


def test_a_recurrent_actor_with_an_open_gate_keeps_its_memory():
    actor, z = make_recurrent_actor(), some_memory()
    keep_everything(actor.layer, "_l0")
    assert (run(actor, z) - z).abs().max() < 1e-5


@pytest.mark.parametrize(("rnn", "factor"), [("gru", 1), ("rnn", 1), ("lstm", 2)])
def test_the_internal_state_stays_in_its_interval(rnn, factor):
    """Also for the cell state of an LSTM, which is unbounded, and for large inputs."""
    actor = make_actor(rnn)
    assert actor.z_dim == factor * STATE
    z = torch.zeros(64, actor.z_dim)
    with torch.no_grad():
        for _ in range(50):
            obs, _, a_prev = inputs(actor, 64)
            _, z = actor.act(100 * obs, z, a_prev)
            assert z.shape == (64, factor * STATE)
            assert torch.isfinite(z).all() and z.abs().max() <= 1
    assert z.abs().max() > 0.1


@pytest.mark.parametrize("rnn", ["gru", "lstm", "rnn"])
def test_a_recurrent_actor_remembers_step_by_step_what_it_remembers_of_a_sequence(rnn):
    """Also an LSTM with a large cell state: the policy that acts is the one that learns."""
    actor = make_recurrent_actor(rnn)
    obs, z, a_prev = inputs(actor, 40)
    z = z[:1] * 0
    if rnn == "lstm":
        z[:, STATE:] = 15 * some_memory()[:1]
        keep_everything(actor.layer, "_l0")
    with torch.no_grad():
        h, last = actor.remember(obs.unsqueeze(1), z, a_prev.unsqueeze(1))
        for k in range(len(obs)):
            one, z = actor.remember(obs[k].view(1, 1, -1), z, a_prev[k].view(1, 1, -1))
            torch.testing.assert_close(one[0], h[k])
    torch.testing.assert_close(z, last)
    assert rnn != "lstm" or z[:, STATE:].abs().max() > 8


@pytest.mark.parametrize("make", [make_actor, make_recurrent_actor])
@pytest.mark.parametrize("rnn", ["gru", "lstm", "rnn"])
def test_the_memory_depends_on_the_observation_the_memory_and_the_previous_action(make, rnn):
    actor = make(rnn)
    obs, z, a_prev = inputs(actor, 4)
    for k in range(3):
        changed = [x.clone() for x in (obs, z, a_prev)]
        changed[k] = -changed[k]
        before, after = (actor.act(*x, deterministic=True) for x in ([obs, z, a_prev], changed))
        assert (before[0] != after[0]).all() and (before[1] != after[1]).any(-1).all()


# --- acting ---------------------------------------------------------------------------------------


def roll_out(actor, steps, deterministic):
    """Actions and internal states over several steps; the observations are always the same."""
    observations = torch.sin(torch.arange(steps * 2 * OBS)).view(steps, 2, OBS)
    z, a, out = torch.zeros(2, actor.z_dim), torch.zeros(2, ACTION), []
    with torch.no_grad():
        for obs in observations:
            a, z = actor.act(obs, z, a, deterministic)
            out.append(torch.cat([a, z], -1))
    return torch.stack(out)


@pytest.mark.parametrize("make", [make_actor, make_recurrent_actor])
@pytest.mark.parametrize("rnn", ["gru", "lstm", "rnn"])
def test_deterministic_acting_uses_no_random_numbers(make, rnn):
    actor = make(rnn)
    before = torch.get_rng_state()
    first = roll_out(actor, 6, deterministic=True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(roll_out(actor, 6, deterministic=True), first)


@pytest.mark.parametrize("make", [make_actor, make_recurrent_actor])
def test_stochastic_acting_differs_from_call_to_call(make):
    actor = make()
    one, two = (roll_out(actor, 3, deterministic=False) for _ in range(2))
    assert (one[..., :ACTION] != two[..., :ACTION]).all()


@pytest.mark.parametrize("kernel", ["atanh", "official"])
def test_deterministic_acting_is_at_the_means_of_both_kernels(kernel):
    actor = make_actor(kernel=kernel)
    x = inputs(actor, 6)
    a, z = actor.act(*x, deterministic=True)
    mean, _ = actor(*x)
    assert torch.equal(torch.cat([a, z], -1), mean.tanh())
    g = actor.next_state(*x)
    torch.testing.assert_close(z, g if kernel == "atanh" else g.tanh(), atol=1e-5, rtol=0)


def test_action_and_next_internal_state_are_independent_given_the_inputs():
    """So a stored action stays a sample of the policy when the stored z' is refreshed."""
    actor, n = make_actor(), 40_000
    x = [v.expand(n, -1) for v in inputs(actor, 1)]
    with torch.no_grad():
        a, z, *_ = actor.sample(*x)
        mean, log_std = actor(*x)
    noise = (torch.atanh(torch.cat([a, z], -1).double()) - mean) / log_std.exp()
    correlation = torch.corrcoef(noise[torch.isfinite(noise).all(-1)].T)
    off_diagonal = correlation - torch.eye(ACTION + STATE)
    assert off_diagonal.abs().max() < 5 / math.sqrt(n)
    # the mean of the action is the same whatever z' was drawn
    assert (mean == mean[0]).all() and z.std(0).min() > 0.01


@pytest.mark.parametrize("rnn", ["gru", "lstm", "rnn"])
def test_samples_have_the_log_densities_of_both_kernels(rnn):
    """Each summed over its own dimensions, [B]."""
    actor, n = make_actor(rnn).double(), 30
    x = [v.double() for v in inputs(actor, n)]
    a, z, log_pi_a, log_pi_z = actor.sample(*x)
    mean, log_std = actor(*x)
    _, squashed = reference(mean, log_std)
    log_prob = squashed.log_prob(torch.cat([a, z], -1))
    assert a.shape == (n, ACTION) and z.shape == (n, actor.z_dim)
    assert log_pi_a.shape == log_pi_z.shape == (n,)
    torch.testing.assert_close(log_pi_a, log_prob[:, :ACTION].sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_pi_z, log_prob[:, ACTION:].sum(-1), rtol=1e-4, atol=1e-4)


# --- critics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_twin_critic_is_two_independent_networks(script):
    critic = script.TwinCritic(6)
    x = torch.randn(40, 4), torch.randn(40, 2)
    q = critic(*x)
    assert q.shape == (2, 40)
    for i in range(2):
        layers = []
        for layer in (m for m in critic.net if hasattr(m, "weight")):
            linear = nn.Linear(*layer.weight.shape[1:])
            linear.weight.data, linear.bias.data = layer.weight[i].T.data, layer.bias[i, 0].data
            layers += [linear, nn.ReLU()]
        mlp = nn.Sequential(*layers[:-1])
        assert [m.in_features for m in mlp[::2]] == [6, 256, 256]
        torch.testing.assert_close(mlp(torch.cat(x, -1)).squeeze(-1), q[i], rtol=1e-4, atol=1e-6)
    assert (q[0] != q[1]).all()

    # a loss on one leaves the other alone
    grads = torch.autograd.grad(q[0].sum(), list(critic.parameters()))
    assert all(g[0].any() and not g[1].any() for g in grads)


def test_batched_layers_start_like_linear_ones():
    layer, linear = s2pg_sac.BatchedLinear(2, 64, 5000), nn.Linear(64, 5000)
    for name in ("weight", "bias"):
        batched, single = getattr(layer, name).detach(), getattr(linear, name).detach()
        assert math.isclose(batched.std(), single.std(), rel_tol=0.05)
        assert math.isclose(batched.abs().max(), 1 / 8, rel_tol=0.01)
        assert math.isclose(single.abs().max(), 1 / 8, rel_tol=0.01)
    assert not torch.equal(layer.weight[0], layer.weight[1])


# --- losses ---------------------------------------------------------------------------------------


class StubActor:
    """Notes its inputs; actions of .1, z' of .2, log densities k - 3 and k - 53 of row k."""

    def __init__(self):
        self.calls = []
        self.theta = torch.tensor(0.0, requires_grad=True)

    def sample(self, *inputs):
        self.calls.append(inputs)
        n = len(inputs[0])
        a, z = torch.full((n, ACTION), 0.1), torch.full((n, STATE), 0.2)
        log_pi_a = torch.arange(n) - 3.0
        a, z, log_pi_a, log_pi_z = (x + self.theta for x in (a, z, log_pi_a, log_pi_a - 50))
        return (a, z, log_pi_a, log_pi_z) if len(inputs) == 3 else (a, log_pi_a)


class StubCritic:
    """Notes its inputs, returns the values it was given [2, B]."""

    def __init__(self, values):
        self.calls, self.values = [], torch.tensor(values, requires_grad=True)

    def __call__(self, *inputs):
        self.calls.append(inputs)
        return self.values + 0 * sum(x.sum() for x in inputs)


def make_batch(n=4, z_dim=STATE):
    return s2pg_sac.Transitions(
        obs=torch.randn(n, OBS), state=torch.randn(n, CRITIC), z=torch.rand(n, z_dim),
        a_prev=torch.rand(n, ACTION), action=torch.rand(n, ACTION), reward=torch.randn(n),
        terminated=torch.arange(n) % 4 == 1, next_obs=torch.randn(n, OBS),
        next_state=torch.randn(n, CRITIC), next_z=torch.rand(n, z_dim),
        next_index=torch.arange(n),
    )  # fmt: skip


def make_sequences(batch, weight):
    n = len(weight)
    return bptt_sac.Sequences(
        all_obs=None, all_a_prev=None, z=None, burn_in=None, row=torch.zeros(n, dtype=torch.int64),
        column=torch.arange(n), weight=weight,
        **{k: v for k, v in batch._asdict().items() if k in bptt_sac.Sequences._fields and k != "z"}
    )  # fmt: skip


Q = [[1.0, 20.0, 3.0, 40.0], [10.0, 2.0, 30.0, 4.0]]
Q_NEXT = [[5.0, 60.0, 7.0, 80.0], [50.0, 6.0, 70.0, 8.0]]


def expected_critic_loss(batch, weight, alpha=0.5, gamma=0.9):
    """By hand: the smaller Q', the entropy of a alone, nothing after a termination."""
    total = 0.0
    for k in range(4):
        v = min(Q_NEXT[0][k], Q_NEXT[1][k]) - alpha * (k - 3.0)
        y = batch.reward[k].item() + (0 if k == 1 else gamma * v)
        total += weight[k] * ((Q[0][k] - y) ** 2 + (Q[1][k] - y) ** 2)
    return total


def same(calls, *expected):
    """One call, with these very inputs."""
    (inputs,) = calls
    return len(inputs) == len(expected) and all(map(torch.equal, inputs, expected))


def test_the_target_of_s2pg_is_the_soft_value_of_the_next_state():
    """The action just taken is the a_prev of V(s'), for the actor and the critic alike."""
    batch, actor, critic, target = make_batch(), StubActor(), StubCritic(Q), StubCritic(Q_NEXT)
    loss, q = s2pg_sac.soft_critic_loss(actor, critic, target, batch, alpha=0.5, gamma=0.9)
    assert math.isclose(loss.item(), expected_critic_loss(batch, [0.25] * 4), rel_tol=1e-5)
    assert same(actor.calls, batch.next_obs, batch.next_z, batch.action)
    a, z = torch.full((4, ACTION), 0.1), torch.full((4, STATE), 0.2)
    assert same(target.calls, batch.next_state, a, z, batch.action)
    assert same(critic.calls, batch.state, batch.action, batch.next_z, batch.a_prev)
    assert torch.equal(q, torch.tensor(Q)) and not q.requires_grad
    grads = torch.autograd.grad(
        loss, [critic.values, target.values, actor.theta], allow_unused=True
    )
    assert grads[0].all() and grads[1] is None and grads[2] is None


def test_the_target_of_bptt_is_the_soft_value_of_the_next_state():
    batch, weight = make_batch(), torch.tensor([0.1, 0.2, 0.3, 0.4])
    actor, critic, target = StubActor(), StubCritic(Q), StubCritic(Q_NEXT)
    next_h = torch.rand(4, STATE)
    loss, q = bptt_sac.bptt_critic_loss(
        actor, critic, target, make_sequences(batch, weight), next_h, alpha=0.5, gamma=0.9
    )
    assert math.isclose(loss.item(), expected_critic_loss(batch, weight.tolist()), rel_tol=1e-5)
    assert same(actor.calls, batch.next_obs, next_h)
    assert same(target.calls, batch.next_state, torch.full((4, ACTION), 0.1), batch.action)
    assert same(critic.calls, batch.state, batch.action, batch.a_prev)
    assert torch.equal(q, torch.tensor(Q)) and not q.requires_grad
    grads = torch.autograd.grad(
        loss, [critic.values, target.values, actor.theta], allow_unused=True
    )
    assert grads[0].all() and grads[1] is None and grads[2] is None


def test_the_actor_of_s2pg_weighs_both_entropies_against_the_smaller_q():
    batch, actor, critic = make_batch(), StubActor(), StubCritic(Q)
    loss, z, entropy, entropy_z = s2pg_sac.soft_actor_loss(actor, critic, batch, 0.5, 0.25)
    log_pi = -1.5  # the mean of -3, -2, -1, 0
    expected = 0.5 * log_pi + 0.25 * (log_pi - 50) - (1 + 2 + 3 + 4) / 4
    assert math.isclose(loss.item(), expected, rel_tol=1e-5)
    assert same(actor.calls, batch.obs, batch.z, batch.a_prev)
    a, z_expected = torch.full((4, ACTION), 0.1), torch.full((4, STATE), 0.2)
    assert same(critic.calls, batch.state, a, z_expected, batch.a_prev)
    assert torch.equal(z, z_expected)
    assert math.isclose(entropy, -log_pi) and math.isclose(entropy_z, 50 - log_pi)
    assert not (z.requires_grad or entropy.requires_grad or entropy_z.requires_grad)


def test_the_actor_of_bptt_weighs_its_entropy_against_the_smaller_q():
    batch, weight = make_batch(), torch.tensor([0.1, 0.2, 0.3, 0.4])
    actor, critic, h = StubActor(), StubCritic(Q), torch.rand(4, STATE)
    loss, entropy = bptt_sac.bptt_actor_loss(actor, critic, make_sequences(batch, weight), h, 0.5)
    log_pi = 0.1 * -3 + 0.2 * -2 + 0.3 * -1
    assert math.isclose(loss.item(), 0.5 * log_pi - (0.1 + 0.4 + 0.9 + 1.6), rel_tol=1e-5)
    assert math.isclose(entropy, -log_pi, rel_tol=1e-5) and not entropy.requires_grad
    assert same(actor.calls, batch.obs, h)
    assert same(critic.calls, batch.state, torch.full((4, ACTION), 0.1), batch.a_prev)


class Repeatable:
    """An actor whose noise is that of the mean: the same for a batch and for its rows."""

    def __init__(self, actor):
        self.actor = actor

    def sample(self, *inputs):
        mean, log_std = self.actor(*inputs)
        u, normal = mean + 0.3 * log_std.exp(), Normal(mean, log_std.exp())
        log_prob = normal.log_prob(u) - TanhTransform().log_abs_det_jacobian(u, u.tanh())
        sizes = [ACTION, mean.shape[-1] - ACTION]
        a, z = u.tanh().split(sizes, -1)
        log_pi_a, log_pi_z = (x.sum(-1) for x in log_prob.split(sizes, -1))
        return (a, z, log_pi_a, log_pi_z) if sizes[1] else (a, log_pi_a)


def test_the_losses_of_a_batch_are_the_mean_of_the_losses_of_its_rows():
    """A [B] beside a [B, 1] would broadcast to B x B, and the gradient all but vanish."""
    actor, batch = Repeatable(make_actor()), make_batch(8)
    critic, target = (s2pg_sac.TwinCritic(CRITIC + ACTION + STATE + ACTION) for _ in range(2))
    rows = [type(batch)(*(x[k : k + 1] for x in batch)) for k in range(8)]
    together, one_by_one = (
        [
            s2pg_sac.soft_critic_loss(actor, critic, target, b, alpha=0.5, gamma=0.9)[0]
            + 10 * s2pg_sac.soft_actor_loss(actor, critic, b, 0.5, 0.25)[0]
            for b in batches
        ]
        for batches in ([batch], rows)
    )
    torch.testing.assert_close(together[0], torch.stack(one_by_one).mean())

    actor, h = Repeatable(make_recurrent_actor()), torch.rand(8, STATE)
    critic, target = (bptt_sac.TwinCritic(CRITIC + 2 * ACTION) for _ in range(2))

    def losses(batch, h):
        sequences = make_sequences(batch, torch.full((len(h),), 1 / len(h)))
        q_loss, _ = bptt_sac.bptt_critic_loss(actor, critic, target, sequences, h, 0.5, 0.9)
        return q_loss + 10 * bptt_sac.bptt_actor_loss(actor, critic, sequences, h, 0.5)[0]

    one_by_one = torch.stack([losses(rows[k], h[k : k + 1]) for k in range(8)])
    torch.testing.assert_close(losses(batch, h), one_by_one.mean())


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_temperature_rises_while_the_entropy_is_too_small_and_falls_above(script):
    for entropy, rises in [(-5.0, True), (-1.0, False)]:
        log_alpha = torch.tensor(-1.0, requires_grad=True)
        script.temperature_loss(log_alpha, torch.tensor(entropy), -3).backward()
        assert (-log_alpha.grad > 0) == rises  # a step goes against the gradient
        assert math.isclose(log_alpha.grad, math.exp(-1) * (entropy + 3), rel_tol=1e-5)


# --- agents ---------------------------------------------------------------------------------------


def make_agent(script=s2pg_sac, privileged=True, steps=60, **options):
    """An agent, and its buffer with episodes of 9 transitions of 2 environments."""
    options = dict(state_dim=STATE, num_envs=2, buffer_size=400, batch_size=16) | options
    if script is bptt_sac:
        options = dict(sequence_length=4) | options
    args = script.Args(**options)
    critic_dim = CRITIC if privileged else OBS
    agent_class = script.S2PGSAC if script is s2pg_sac else script.BPTTSAC
    agent = agent_class(args, OBS, critic_dim, ACTION, privileged, CPU)
    buffer = agent.make_buffer()
    for t in range(steps):
        flags = (torch.full((2,), t % 10 == k).numpy() for k in (8, 0))
        buffer.add(
            torch.randn(2, OBS), torch.randn(2, critic_dim), torch.rand(2, agent.z_dim),
            2 * torch.rand(2, ACTION) - 1, torch.randn(2), *flags,
        )  # fmt: skip
    return agent, buffer


def snapshot(module):
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_update_moves_every_part_of_the_agent(script):
    agent, buffer = make_agent(script, tau=0.1)
    parts = agent.actor, agent.critic, agent.target_critic
    before = [snapshot(part) for part in parts]
    log_alphas = [t.item() for k, t in vars(agent).items() if k.startswith("log_alpha")]
    assert len(log_alphas) == (2 if script is s2pg_sac else 1)
    metrics = agent.update(buffer)
    actor, critic, target = [snapshot(part) for part in parts]
    for old, new in zip(before[0] + before[1], actor + critic):
        assert (old != new).any()
    # theta' <- theta' + tau (theta - theta'), with the new theta
    for old, new, theta in zip(before[2], target, critic):
        torch.testing.assert_close(new, old + 0.1 * (theta - old), rtol=1e-5, atol=1e-8)
        assert not torch.equal(new, old)
    after = [t.item() for k, t in vars(agent).items() if k.startswith("log_alpha")]
    assert all(a != b for a, b in zip(log_alphas, after))
    assert all(torch.isfinite(v) and not v.requires_grad for v in metrics.values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_target_critic_starts_as_the_critic_and_is_never_trained(script):
    agent, _ = make_agent(script)
    for a, b in zip(agent.critic.parameters(), agent.target_critic.parameters()):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
        assert a.requires_grad and not b.requires_grad


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_step_computes_gradients_for_its_own_parameters_only(script, monkeypatch):
    """The critic is a constant in the actor's step, and the actor in the critic's."""
    agent, buffer = make_agent(script)
    seen = []

    def watched(optimizer, loss):
        others = [agent.actor, agent.critic]
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        before = [
            (p, None if p.grad is None else p.grad.clone(), p.detach().clone())
            for part in others for p in part.parameters() if id(p) not in own
        ]  # fmt: skip
        descend(optimizer, loss)
        for p, grad, value in before:
            assert torch.equal(p, value)
            assert p.grad is None if grad is None else torch.equal(p.grad, grad)
        seen.append(len(before))

    descend = script.descend
    monkeypatch.setattr(script, "descend", watched)
    agent.update(buffer)
    agent.update(buffer)
    sizes = [len(list(part.parameters())) for part in (agent.actor, agent.critic)]
    assert seen == 2 * sizes


def test_the_temperatures_follow_the_entropies_of_the_samples():
    """Targets -|A| and -Z: rising from far below, falling from far above."""
    # before the tanh, stds of about e^-5 are far less than the targets ask for, e^-.6 far more
    for bias, rises in [(-4.0, True), (0.25, False)]:
        agent, buffer = make_agent()
        with torch.no_grad():
            agent.actor.policy_head.weight.zero_()
            agent.actor.policy_head.bias[ACTION:] = bias
        before = agent.log_alpha.item(), agent.log_alpha_z.item()
        metrics = agent.update(buffer)
        if rises:
            assert metrics["losses/entropy"] < -ACTION and metrics["losses/entropy_z"] < -STATE
        else:
            assert metrics["losses/entropy"] > -ACTION and metrics["losses/entropy_z"] > -STATE
        assert (agent.log_alpha > before[0]) == (agent.log_alpha_z > before[1]) == rises


@pytest.mark.parametrize("target", [-3.0, -0.5, 0.5])
def test_the_target_entropy_of_the_internal_state_is_per_component(target):
    agent, buffer = make_agent(target_entropy_z=target)
    metrics = agent.update(buffer)
    excess = metrics["losses/entropy_z"] - target * STATE
    expected = metrics["losses/alpha_z"] * excess
    torch.testing.assert_close(metrics["losses/alpha_z_loss"], expected, rtol=1e-4, atol=1e-6)
    assert (agent.log_alpha_z < math.log(agent.args.alpha_z)) == (excess > 0)


@pytest.mark.parametrize("name", ["alpha", "alpha_z"])
def test_a_learning_rate_of_zero_keeps_a_temperature(name):
    agent, buffer = make_agent(**{f"{name}_lr": 0.0, name: 0.2})
    for _ in range(3):
        metrics = agent.update(buffer)
    assert math.isclose(metrics[f"losses/{name}"], 0.2, rel_tol=1e-6)
    other = {"alpha": "alpha_z", "alpha_z": "alpha"}[name]
    assert metrics[f"losses/{other}"] != getattr(agent.args, other)


def test_an_update_refreshes_the_next_internal_states_of_its_batch_and_nothing_else(monkeypatch):
    agent, buffer = make_agent()
    batches = []
    draw = buffer.sample
    monkeypatch.setattr(buffer, "sample", lambda *a: batches.append(draw(*a)) or batches[-1])
    before = {k: v.clone() for k, v in vars(buffer).items() if torch.is_tensor(v)}
    agent.update(buffer)
    after = {k: v for k, v in vars(buffer).items() if torch.is_tensor(v)}
    assert all(torch.equal(before[k], after[k]) for k in before if k not in ("z", "rows"))
    changed = (before["z"] != after["z"]).any(-1).nonzero().flatten().tolist()
    (batch,) = batches
    assert set(changed) == set(batch.next_index.tolist())
    assert not buffer.first[changed].any() and after["z"].abs().max() <= 1


def test_the_refreshed_states_are_the_sample_of_the_actor_loss(monkeypatch):
    agent, buffer = make_agent(batch_size=1)
    samples, sample = [], agent.actor.sample
    monkeypatch.setattr(agent.actor, "sample", lambda *a: samples.append(sample(*a)) or samples[-1])
    before = buffer.z.clone()
    agent.update(buffer)
    (row,) = (buffer.z != before).any(-1).nonzero().flatten()
    of_the_target, of_the_actor_loss = samples
    assert torch.equal(buffer.z[row], of_the_actor_loss[1][0])
    assert not torch.equal(buffer.z[row], of_the_target[1][0])


@pytest.mark.parametrize("options", [dict(refresh=False), dict(memoryless=True)])
def test_without_a_refresh_or_a_memory_the_buffer_stays_as_it_is(options):
    agent, buffer = make_agent(**options)
    before = {k: v.clone() for k, v in vars(buffer).items() if torch.is_tensor(v)}
    agent.update(buffer)
    assert all(torch.equal(before[k], getattr(buffer, k)) for k in before)


def test_bptt_leaves_its_buffer_as_it_is():
    agent, buffer = make_agent(bptt_sac, burn_in=2)
    before = {k: v.clone() for k, v in vars(buffer).items() if torch.is_tensor(v)}
    agent.update(buffer)
    assert all(torch.equal(before[k], getattr(buffer, k)) for k in before)


def test_a_memoryless_agent_has_no_recurrent_parameters_and_updates():
    agent, buffer = make_agent(memoryless=True)
    names = [name for name, _ in agent.actor.named_parameters()]
    assert names and not any("cell" in name or "kernel" in name for name in names)
    assert agent.z_dim == agent.actor.z_dim == 0 and buffer.z.shape == (400, 0)
    assert agent.critic.net[0].weight.shape[1] == CRITIC + 2 * ACTION
    before = snapshot(agent.actor)
    metrics = agent.update(buffer)
    assert all((a != b).any() for a, b in zip(before, snapshot(agent.actor)))
    assert all(torch.isfinite(v) for v in metrics.values())
    # nothing but the observation counts
    obs, _, a_prev = inputs(agent.actor, 5)
    z = torch.zeros(5, 0)
    a, b = (agent.actor.act(obs, z, x, deterministic=True)[0] for x in (a_prev, -a_prev))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("privileged", "critic_sees_z", "width"),
    [(True, False, CRITIC), (True, True, CRITIC + STATE), (False, False, OBS + STATE)],
)
def test_the_critic_of_s2pg_sees_z_where_it_is_told_or_lacks_the_state(
    privileged, critic_sees_z, width
):
    agent, buffer = make_agent(privileged=privileged, critic_sees_z=critic_sees_z)
    # z', which the critic judges, is among its inputs in any case
    assert agent.critic.net[0].weight.shape[1] == width + ACTION + STATE + ACTION
    assert (buffer.critic_obs is buffer.obs) == (not privileged)
    batch = buffer.sample(10, agent.critic_sees_z)
    assert batch.state.shape == batch.next_state.shape == (10, width)
    if agent.critic_sees_z:
        assert torch.equal(batch.state[:, -STATE:], batch.z)
        assert torch.equal(batch.next_state[:, -STATE:], batch.next_z)
    agent.update(buffer)

    def q():
        batch = buffer.sample(10, agent.critic_sees_z)
        return agent.critic(batch.state, batch.action, 0 * batch.next_z, batch.a_prev)

    values = []
    for sign in (1, -1):
        buffer.z.copy_(sign * buffer.z)
        torch.manual_seed(0)
        values.append(q())
    assert (values[0] == values[1]).all() == (not agent.critic_sees_z)


@pytest.mark.parametrize(
    ("privileged", "critic_sees_h", "width"),
    [(True, False, CRITIC), (True, True, CRITIC + STATE), (False, False, OBS + STATE)],
)
@pytest.mark.parametrize("rnn", ["gru", "lstm"])
def test_the_critic_of_bptt_sees_h_where_it_is_told_or_lacks_the_state(
    privileged, critic_sees_h, width, rnn, monkeypatch
):
    agent, buffer = make_agent(
        bptt_sac, privileged=privileged, critic_sees_h=critic_sees_h, rnn=rnn
    )
    assert agent.critic.net[0].weight.shape[1] == width + 2 * ACTION
    # the h of the transition in the state, the h' of its successor in the next
    seen, remembered = {}, []
    remember, loss = agent.remember, agent.critic_loss

    def watched_remember(batch):
        remembered.append(remember(batch))
        return remembered[-1]

    def watched_loss(actor, critic, target_critic, batch, *rest):
        seen.update(batch._asdict())
        return loss(actor, critic, target_critic, batch, *rest)

    monkeypatch.setattr(agent, "remember", watched_remember)
    monkeypatch.setattr(agent, "critic_loss", watched_loss)
    agent.update(buffer)
    assert seen["state"].shape[1] == seen["next_state"].shape[1] == width
    if agent.critic_sees_h:
        h, next_h = remembered[0]
        assert torch.equal(seen["state"][:, -STATE:], h)
        assert torch.equal(seen["next_state"][:, -STATE:], next_h)
        assert not seen["state"].requires_grad


# --- a fair comparison ----------------------------------------------------------------------------


def defaults(script):
    return {
        f.name: f.default if f.default is not dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(script.Args)
    }


def test_both_scripts_have_the_same_defaults_for_what_they_share():
    ours, theirs = defaults(s2pg_sac), defaults(bptt_sac)
    shared = ours.keys() & theirs.keys() - {"exp_name"}
    assert {"actor_lr", "critic_lr", "tau", "gamma", "batch_size", "utd", "alpha_lr"} <= shared
    assert {k: ours[k] for k in shared} == {k: theirs[k] for k in shared}
    assert ours.keys() - theirs.keys() == {
        "kernel", "memoryless", "critic_sees_z", "refresh", "alpha_z", "alpha_z_lr",
        "target_entropy_z", "log_std_z_max",
    }  # fmt: skip
    assert theirs.keys() - ours.keys() == {
        "critic_sees_h", "sequence_length", "loss_on", "burn_in", "initial_state"
    }  # fmt: skip


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


def test_both_agents_have_critics_and_optimizers_of_the_same_kind():
    """z' is the one input of Q more that S2PG needs."""
    ours, theirs = make_agent(s2pg_sac)[0], make_agent(bptt_sac)[0]
    shapes = [[tuple(p.shape) for p in agent.critic.parameters()] for agent in (ours, theirs)]
    assert shapes[0][1:] == shapes[1][1:]
    inputs = shapes[0][0][1], shapes[1][0][1]
    assert inputs == (CRITIC + 2 * ACTION + STATE, CRITIC + 2 * ACTION)
    for name in ("actor_optimizer", "critic_optimizer"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert type(a) is type(b)
        for group_a, group_b in zip(a.param_groups, b.param_groups):
            settings = [{k: v for k, v in g.items() if k != "params"} for g in (group_a, group_b)]
            assert settings[0] == settings[1]
        # those of the actor and of alpha; alpha_z has a third
        extra = len(a.param_groups) - len(b.param_groups)
        assert extra == (1 if name == "actor_optimizer" else 0)


def test_both_actors_have_memories_and_policies_of_the_same_size():
    ours, theirs = make_actor(), make_recurrent_actor()
    count = [
        sorted(p.numel() for n, p in actor.named_parameters() if not n.startswith("policy_head"))
        for actor in (ours, theirs)
    ]
    assert count[0] == count[1]
    # the spread of z' is what S2PG's head has more
    assert ours.policy_head.out_features == theirs.policy_head.out_features + STATE


def test_both_losses_agree_where_the_algorithms_coincide():
    """Without a memory to judge or to reward, both are SAC: the same losses of the same samples."""
    batch, alpha, gamma = make_batch(z_dim=0), 0.3, 0.9
    h = torch.rand(4, STATE)
    actor = make_recurrent_actor()

    def sample(obs, z, a_prev):
        a, log_pi = actor.sample(obs, h)
        return a, torch.zeros(len(obs), 0), log_pi, torch.zeros(len(obs))

    critic, target = (s2pg_sac.TwinCritic(CRITIC + 2 * ACTION) for _ in range(2))
    stateless = SimpleNamespace(sample=sample)
    sequences = make_sequences(batch, torch.full((4,), 0.25))
    torch.manual_seed(1)
    ours = (
        s2pg_sac.soft_critic_loss(stateless, critic, target, batch, alpha, gamma)[0],
        s2pg_sac.soft_actor_loss(stateless, critic, batch, alpha, 0.7)[0],
    )
    torch.manual_seed(1)
    theirs = (
        bptt_sac.bptt_critic_loss(actor, critic, target, sequences, h, alpha, gamma)[0],
        bptt_sac.bptt_actor_loss(actor, critic, sequences, h, alpha)[0],
    )
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)
