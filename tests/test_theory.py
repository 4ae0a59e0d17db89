"""Policy gradients against exact ones: S2PG, its variance, and backpropagation through time.

Everything is in float64 with fixed seeds. A Monte-Carlo estimate is compared with the exact value
in units of its own standard error, and every comparison is sharp enough to reject an estimator
that lacks a term: the tests show that, too.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bptt_sac
import s2pg_sac

torch_cpu = torch.device("cpu")


@pytest.fixture(autouse=True)
def float64_and_seed():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def standard_errors(estimates, exact):
    """How far the mean of `estimates` [batches, P] is from `exact` [P], in standard errors."""
    error = estimates.std(0) / math.sqrt(len(estimates))
    return (estimates.mean(0) - exact) / error, error


# --- a linear-Gaussian problem whose gradient is known --------------------------------------------


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)  # also before the fixture


class LinearGaussian:
    """s' = A s + B a + w, o = C s, r = -(s' Q s + a' R a), T steps: position seen, velocity not.

    The policy a ~ N(K x, S), z' ~ N(W x, U) is linear in x = (o, z, a_prev), with diagonal S and U.
    So the augmented state (s, z, a_prev) is Gaussian at all times, and its moments give J exactly.
    """

    A, B, C = tensor([1.0, 0.4], [-0.3, 0.9]), tensor([0.1], [0.5]), tensor([1.0, 0.0])
    Q, R = tensor([1.0, 0.1], [0.1, 0.5]), tensor([0.3])
    noise = tensor([0.02, 0.0], [0.0, 0.05])
    start_mean, start_cov = tensor(1.0, -0.5), tensor([0.3, 0.1], [0.1, 0.2])
    T, gamma = 6, 0.9
    s, o, z, a = 2, 1, 2, 1  # sizes

    def __init__(self):
        # neither zero nor symmetric, so that no term of the gradient vanishes
        self.K = tensor([-0.6, 0.5, -0.4, 0.2]).requires_grad_()
        self.W = tensor([0.5, 0.6, -0.3, 0.4], [-0.4, 0.2, 0.5, -0.3]).requires_grad_()
        self.log_std_a = tensor(-0.7).requires_grad_()
        self.log_std_z = tensor(-1.0, -0.8).requires_grad_()
        self.parameters = [self.K, self.W, self.log_std_a, self.log_std_z]

    def closed_loop(self):
        """F and G of x' = F x + N(0, G), x = (s, z, a_prev)."""
        observe = torch.block_diag(self.C, torch.eye(self.z + self.a))
        action, memory = self.K @ observe, self.W @ observe
        dynamics = torch.cat([self.A, torch.zeros(self.s, self.z + self.a)], 1)
        F = torch.cat([dynamics + self.B @ action, memory, action])
        # the noise of the action enters the state and the next a_prev alike
        from_a = torch.cat([self.B, torch.zeros(self.z, self.a), torch.eye(self.a)])
        G = from_a @ torch.diag((2 * self.log_std_a).exp()) @ from_a.T
        G = G + torch.block_diag(
            self.noise, torch.diag((2 * self.log_std_z).exp()), torch.zeros(self.a, self.a)
        )
        return F, G

    def start(self):
        mean = torch.cat([self.start_mean, torch.zeros(self.z + self.a)])
        return mean, torch.block_diag(self.start_cov, torch.zeros(3, 3))

    def exact_return(self):
        """J by the mean and the covariance of the augmented state."""
        (mean, cov), (F, G), J = self.start(), self.closed_loop(), 0.0
        state, action = slice(0, self.s), slice(self.s + self.z, None)
        for t in range(self.T):
            J = J - self.gamma**t * second_moment(self.Q, mean, cov, state)
            mean, cov = F @ mean, F @ cov @ F.T + G
            J = J - self.gamma**t * second_moment(self.R, mean, cov, action)
        return J

    def exact_gradient(self):
        return flat(torch.autograd.grad(self.exact_return(), self.parameters))

    @torch.no_grad()
    def values(self):
        """M_t and c_t of V_t(x) = -(x' M_t x + c_t), backwards from V_T = 0."""
        F, G = self.closed_loop()
        cost = torch.block_diag(self.Q, torch.zeros(3, 3))
        action = F[self.s + self.z :]
        M, c = torch.zeros(5, 5), torch.tensor(0.0)
        values = [(M, c)]
        for _ in range(self.T):
            c = (self.R @ torch.diag((2 * self.log_std_a).exp())).trace() + self.gamma * (
                (M @ G).trace() + c
            )
            M = cost + action.T @ self.R @ action + self.gamma * F.T @ M @ F
            values.insert(0, (M, c))
        return values

    def v(self, t, s, z, a_prev):
        M, c = self.values()[t]
        return -(quadratic(M, torch.cat([s, z, a_prev], -1)) + c)

    def q(self, t, s, a, z_next):
        """Q_t(s, a, z') = r + gamma E V_{t+1}(s', z', a), in closed form over s'."""
        M, c = self.values()[t + 1]
        after = torch.cat([s @ self.A.T + a @ self.B.T, z_next, a], -1)
        spread = (M[: self.s, : self.s] @ self.noise).trace()
        reward = -quadratic(self.Q, s) - quadratic(self.R, a)
        return reward - self.gamma * (quadratic(M, after) + spread + c)

    def sample(self, obs, z, a_prev):
        """The interface of an actor: a, z', log pi_a and log pi_z, reparameterised."""
        x = torch.cat([obs, z, a_prev], -1)
        pi_a = torch.distributions.Normal(x @ self.K.T, self.log_std_a.exp())
        pi_z = torch.distributions.Normal(x @ self.W.T, self.log_std_z.exp())
        a, z = pi_a.rsample(), pi_z.rsample()
        return a, z, pi_a.log_prob(a).sum(-1), pi_z.log_prob(z).sum(-1)

    def log_prob(self, obs, z, a_prev, a, z_next):
        x = torch.cat([obs, z, a_prev], -1)
        log_pi_a = torch.distributions.Normal(x @ self.K.T, self.log_std_a.exp()).log_prob(a)
        log_pi_z = torch.distributions.Normal(x @ self.W.T, self.log_std_z.exp()).log_prob(z_next)
        return log_pi_a.sum(-1), log_pi_z.sum(-1)

    @torch.no_grad()
    def trajectories(self, n):
        """A list of T steps (s, o, z, a_prev, a, z', r), each [n, .], as a buffer holds them."""
        noise = torch.linalg.cholesky(self.noise)
        start_noise = torch.linalg.cholesky(self.start_cov)
        s = self.start_mean + torch.randn(n, self.s) @ start_noise.T
        z, a_prev, steps = torch.zeros(n, self.z), torch.zeros(n, self.a), []
        for _ in range(self.T):
            obs = s @ self.C.T
            a, z_next, *_ = self.sample(obs, z, a_prev)
            reward = -quadratic(self.Q, s) - quadratic(self.R, a)
            steps.append((s, obs, z, a_prev, a, z_next, reward))
            s = s @ self.A.T + a @ self.B.T + torch.randn(n, self.s) @ noise.T
            z, a_prev = z_next, a
        return steps


def quadratic(M, x):
    return torch.einsum("...i,ij,...j->...", x, M, x)


def second_moment(M, mean, cov, part):
    """E x' M x over one part of a Gaussian vector."""
    return (M @ (cov[part, part] + torch.outer(mean[part], mean[part]))).trace()


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def estimate_gradient(problem, objective, batches=40, n=4000):
    """Gradients [batches, P] of `objective(problem, trajectories)`, whose mean estimates J's."""
    return torch.stack([
        flat(torch.autograd.grad(objective(problem, problem.trajectories(n)), problem.parameters))
        for _ in range(batches)
    ])  # fmt: skip


def score_with_exact_q(problem, steps, memory_score=True):
    """E sum_t gamma^t log pi(a, z') (Q_t - V_t), to be differentiated."""
    total = 0.0
    for t, (s, obs, z, a_prev, a, z_next, _) in enumerate(steps):
        log_pi_a, log_pi_z = problem.log_prob(obs, z, a_prev, a, z_next)
        advantage = problem.q(t, s, a, z_next) - problem.v(t, s, z, a_prev)
        total = total + problem.gamma**t * ((log_pi_a + memory_score * log_pi_z) * advantage).mean()
    return total


def score_with_return_to_go(problem, steps):
    """The same with sampled returns in place of Q_t: nothing of the model is known."""
    total, to_go = 0.0, 0.0
    for t, (s, obs, z, a_prev, a, z_next, reward) in reversed(list(enumerate(steps))):
        to_go = reward + problem.gamma * to_go
        log_pi = sum(problem.log_prob(obs, z, a_prev, a, z_next))
        advantage = to_go - problem.v(t, s, z, a_prev)
        total = total + problem.gamma**t * (log_pi * advantage).mean()
    return total


def soft_actor_objective(
    problem, steps, actor=None, forget_a_prev=False, discount=LinearGaussian.gamma
):
    """-sum_t gamma^t of the project's actor loss without entropies, with the exact critic Q_t."""
    total = 0.0
    for t, (s, obs, z, a_prev, *_) in enumerate(steps):

        def critic(state, a, z_next, a_prev, t=t):
            q = problem.q(t, state, a, z_next)
            return torch.stack([q + 1, q])  # the first never is the minimum

        batch = SimpleNamespace(
            obs=obs, state=s, z=z, a_prev=torch.zeros_like(a_prev) if forget_a_prev else a_prev
        )
        loss, *_ = s2pg_sac.soft_actor_loss(actor or problem, critic, batch, alpha=0, alpha_z=0)
        total = total - discount**t * loss
    return total


def test_the_closed_forms_of_the_linear_gaussian_problem_agree():
    """Moments forwards and values backwards give one J, which sampling and differences confirm."""
    problem = LinearGaussian()
    J = problem.exact_return().item()
    M, c = problem.values()[0]
    mean, cov = problem.start()
    assert math.isclose(J, -(second_moment(M, mean, cov, slice(None)) + c).item(), rel_tol=1e-12)

    steps = problem.trajectories(100_000)
    returns = sum(problem.gamma**t * step[-1] for t, step in enumerate(steps))
    z, error = standard_errors(returns, J)
    assert abs(z) < 4.5 and error < 0.01 * abs(J)

    gradient, parameter, h = problem.exact_gradient(), problem.K.data, 1e-6
    parameter[0, 1] += h
    above = problem.exact_return().item()
    parameter[0, 1] -= 2 * h
    below = problem.exact_return().item()
    assert math.isclose(gradient[1].item(), (above - below) / (2 * h), rel_tol=1e-6)


def test_q_is_the_expected_return_after_an_action_and_a_next_internal_state():
    """Q_t of the recursion against simulation from one (s, a, z') at t = 2."""
    problem, n, t = LinearGaussian(), 100_000, 2
    s, a, z = torch.tensor([0.7, -0.4]), torch.tensor([0.3]), torch.tensor([0.5, -0.6])
    s, a, z = (x.expand(n, -1) for x in (s, a, z))
    exact = problem.q(t, s[:1], a[:1], z[:1]).item()
    returns = -quadratic(problem.Q, s) - quadratic(problem.R, a)
    noise, discount = torch.linalg.cholesky(problem.noise), 1.0
    with torch.no_grad():
        for _ in range(t + 1, problem.T):
            s = s @ problem.A.T + a @ problem.B.T + torch.randn_like(s) @ noise.T
            discount *= problem.gamma
            a, z, *_ = problem.sample(s @ problem.C.T, z, a)
            returns = returns - discount * (quadratic(problem.Q, s) + quadratic(problem.R, a))
    z_score, error = standard_errors(returns, exact)
    assert abs(z_score) < 4.5 and error < 0.01 * abs(exact)


@pytest.mark.parametrize(
    "objective", [score_with_exact_q, score_with_return_to_go, soft_actor_objective]
)
def test_the_s2pg_gradient_is_the_exact_gradient(objective):
    """Of the means of both kernels and of their spreads, without any gradient through time."""
    problem = LinearGaussian()
    exact = problem.exact_gradient()
    z, error = standard_errors(estimate_gradient(problem, objective), exact)
    assert z.abs().max() < 4.5
    # sharp: a factor of 1.1 or a sign would be seen
    assert error.norm() < 0.02 * exact.norm()


def test_a_gradient_that_takes_the_next_internal_state_as_a_constant_is_rejected():
    """Then nothing tells the kernel of z' what to remember."""
    problem = LinearGaussian()

    class Detached:
        def sample(self, obs, z, a_prev):
            a, z, log_pi_a, log_pi_z = problem.sample(obs, z, a_prev)
            # times zero: autograd asks for a path to every parameter
            z = z.detach() + 0 * problem.W.sum() + 0 * problem.log_std_z.sum()
            return a, z, log_pi_a, log_pi_z

    exact = problem.exact_gradient()
    reparameterised = estimate_gradient(
        problem, lambda p, steps: soft_actor_objective(p, steps, Detached())
    )
    K, W = slice(0, 4), slice(4, 12)
    # the action's half of the gradient does not need the other
    assert standard_errors(reparameterised, exact)[0][K].abs().max() < 4.5
    assert not reparameterised[:, W].any() and exact[W].norm() > 0.1 * exact.norm()

    def score_of_the_action(problem, steps):
        no_path = 0 * problem.W.sum() + 0 * problem.log_std_z.sum()
        return no_path + score_with_exact_q(problem, steps, memory_score=False)

    score = estimate_gradient(problem, score_of_the_action)
    assert standard_errors(score, exact)[0][K].abs().max() < 4.5
    assert not score[:, W].any()


def test_gradients_with_a_wrong_previous_action_or_discount_are_rejected():
    problem = LinearGaussian()
    exact = problem.exact_gradient()

    def without_a_prev(problem, steps):
        return soft_actor_objective(problem, steps, forget_a_prev=True)

    def undiscounted(problem, steps):
        return soft_actor_objective(problem, steps, discount=1.0)

    for objective in (without_a_prev, undiscounted):
        z, _ = standard_errors(estimate_gradient(problem, objective), exact)
        assert z.abs().max() > 10


# --- backpropagation through time -----------------------------------------------------------------

OBS, CRITIC, ACTION, HIDDEN = 3, 4, 2, 5


def make_agent(rnn="gru", **options):
    """A BPTT-SAC agent in float64 with 12 steps an episode in its buffer, but see `lengths`."""
    lengths, num_envs = options.pop("lengths", [12] * 8), options.pop("num_envs", 2)
    args = bptt_sac.Args(
        rnn=rnn, state_dim=HIDDEN, num_envs=num_envs, buffer_size=200 * num_envs, **options
    )
    agent = bptt_sac.BPTTSAC(args, OBS, CRITIC, ACTION, True, torch_cpu)
    # a strong recurrence that is not saturated: no gradient through it is too small to be seen
    with torch.no_grad():
        agent.actor.layer.weight_ih_l0 *= 0.2
        agent.actor.layer.weight_hh_l0 *= 2
    buffer = agent.make_buffer()
    step = np.concatenate([np.arange(length + 1) for length in lengths])
    length = np.concatenate([np.full(length + 1, length) for length in lengths])
    for k in range(len(step)):
        terminated = np.full(num_envs, step[k] == length[k] - 1)
        first = np.full(num_envs, step[k] == 0)
        z = 1.8 * torch.rand(num_envs, agent.z_dim) - 0.9
        action = 1.8 * torch.rand(num_envs, ACTION) - 0.9
        # an episode begins with an empty memory
        buffer.add(
            torch.randn(num_envs, OBS), torch.randn(num_envs, CRITIC),
            z * (step[k] > 0), action, torch.randn(num_envs), terminated, first,
        )  # fmt: skip
    for name, value in vars(buffer).items():
        if torch.is_tensor(value) and value.dtype == torch.float32:
            setattr(buffer, name, value.double())
    return agent, buffer


def sample(agent, buffer):
    args = agent.args
    return buffer.sample(
        args.batch_size, args.sequence_length, args.loss_on, args.burn_in, args.initial_state
    )


def single_step(actor, obs, z, a_prev):
    """One step of the recurrent layer, written out: (h, z')."""
    W_i, W_h = actor.layer.weight_ih_l0, actor.layer.weight_hh_l0
    b_i, b_h = actor.layer.bias_ih_l0, actor.layer.bias_hh_l0
    e = torch.cat([actor.memory_obs(obs).relu(), actor.memory_action(a_prev).relu()], -1)
    if actor.rnn == "rnn":
        h = torch.tanh(W_i @ e + b_i + W_h @ z + b_h)
        return h, h
    if actor.rnn == "gru":
        (r_i, u_i, n_i), (r_h, u_h, n_h) = (W_i @ e + b_i).chunk(3), (W_h @ z + b_h).chunk(3)
        r, u = torch.sigmoid(r_i + r_h), torch.sigmoid(u_i + u_h)
        h = (1 - u) * torch.tanh(n_i + r * n_h) + u * z
        return h, h
    h, c = z.chunk(2)
    i, f, g, o = (W_i @ e + b_i + W_h @ h + b_h).chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return h, torch.cat([h, c])


def losses_of_single_steps(agent, batch, alpha, noise, warm_up_without_grad=True):
    """Both losses by a loop over sequences and rows; `noise` are the draws of the two samples."""
    actor, gamma = agent.actor, agent.args.gamma
    h = {}
    for column in range(batch.z.shape[0]):
        z = batch.z[column]
        if batch.burn_in is not None:
            obs, z_before, a_prev, has_them = batch.burn_in
            if has_them[column]:
                z = z_before[column]
                with torch.set_grad_enabled(not warm_up_without_grad):
                    for k in range(len(obs)):
                        _, z = single_step(actor, obs[k, column], z, a_prev[k, column])
        for row in range(len(batch.all_obs)):
            h[row, column], z = single_step(
                actor, batch.all_obs[row, column], z, batch.all_a_prev[row, column]
            )

    def policy(obs, h, noise):
        mean, log_std = actor(obs, h)
        u = mean + log_std.exp() * noise
        density = torch.distributions.Normal(mean, log_std.exp()).log_prob(u)
        return torch.tanh(u), (density - torch.log(1 - torch.tanh(u) ** 2)).sum()

    actor_loss = critic_loss = 0.0
    for k in range(len(batch.weight)):
        place, state, action = (batch.row[k].item(), batch.column[k].item()), 0, 0
        state, action, a_prev = batch.state[k : k + 1], batch.action[k : k + 1], batch.a_prev[k]
        with torch.no_grad():
            next_place = place[0] + 1, place[1]
            a, log_pi = policy(batch.next_obs[k], h[next_place], noise[0][k])
            q = agent.target_critic(batch.next_state[k : k + 1], a.unsqueeze(0), action).min()
            v = q - alpha * log_pi
            target = batch.reward[k] + (0 if batch.terminated[k] else gamma * v)
        q = agent.critic(state, action, a_prev.unsqueeze(0))
        critic_loss = critic_loss + batch.weight[k] * (q - target).square().sum()
        a, log_pi = policy(batch.obs[k], h[place], noise[1][k])
        q = agent.critic(state, a.unsqueeze(0), a_prev.unsqueeze(0)).min()
        actor_loss = actor_loss + batch.weight[k] * (alpha * log_pi - q)
    return critic_loss, actor_loss


def losses_of_the_script(agent, batch, alpha, seed=5):
    """The same as `BPTTSAC.update` computes them; also the noise they drew."""
    torch.manual_seed(seed)
    h, next_h = agent.remember(batch)
    critic_loss, _ = bptt_sac.bptt_critic_loss(
        agent.actor, agent.critic, agent.target_critic, batch, next_h, alpha, agent.args.gamma
    )
    actor_loss, _ = bptt_sac.bptt_actor_loss(agent.actor, agent.critic, batch, h, alpha)
    torch.manual_seed(seed)
    noise = [torch.randn(len(batch.weight), ACTION) for _ in range(2)]
    return critic_loss, actor_loss, noise


def gradient(loss, module):
    return flat(torch.autograd.grad(loss, list(module.parameters()), retain_graph=True))


@pytest.mark.parametrize("burn_in", [0, 3])
@pytest.mark.parametrize("loss_on", ["last", "all"])
@pytest.mark.parametrize("rnn", ["gru", "lstm", "rnn"])
def test_gradients_through_time_equal_those_of_a_loop_of_single_steps(rnn, loss_on, burn_in):
    agent, buffer = make_agent(
        rnn, loss_on=loss_on, burn_in=burn_in, sequence_length=4, lengths=[12, 2, 7, 1, 12],
        batch_size=12 if loss_on == "last" else 40,
    )  # fmt: skip
    batch = sample(agent, buffer)
    critic_loss, actor_loss, noise = losses_of_the_script(agent, batch, alpha=0.3)
    by_hand = losses_of_single_steps(agent, batch, 0.3, noise)
    close = dict(rtol=1e-9, atol=1e-12)
    for actual, expected, part in [
        (critic_loss, by_hand[0], agent.critic),
        (actor_loss, by_hand[1], agent.actor),
    ]:
        torch.testing.assert_close(actual, expected, **close)
        torch.testing.assert_close(gradient(actual, part), gradient(expected, part), **close)
    if burn_in:
        # had the burn-in been differentiated, the loop would give something else
        assert batch.burn_in[-1].any()
        _, through = losses_of_single_steps(agent, batch, 0.3, noise, warm_up_without_grad=False)
        used = gradient(actor_loss, agent.actor.layer)
        assert (gradient(through, agent.actor.layer) - used).norm() > 1e-3 * used.norm()


@pytest.mark.parametrize("rnn", ["gru", "lstm", "rnn"])
@pytest.mark.parametrize("loss_on", ["last", "all"])
def test_rows_past_the_end_of_an_episode_have_no_influence(loss_on, rnn):
    """Change them, and losses and gradients stay the same to the last bit."""
    agent, buffer = make_agent(
        rnn, loss_on=loss_on, sequence_length=6, lengths=[4, 2, 7, 1, 3], batch_size=60
    )
    batch = sample(agent, buffer)
    # the last row with a weight, and its successor, whose h is part of the target
    end = torch.zeros(batch.z.shape[0], dtype=torch.int64)
    weighted = batch.weight > 0
    end.scatter_reduce_(0, batch.column[weighted], batch.row[weighted] + 1, "amax")
    past = torch.arange(len(batch.all_obs)).unsqueeze(-1) > end
    assert past.any()
    changed = batch._replace(
        all_obs=torch.where(past.unsqueeze(-1), torch.randn_like(batch.all_obs), batch.all_obs),
        all_a_prev=torch.where(
            past.unsqueeze(-1), torch.rand_like(batch.all_a_prev), batch.all_a_prev
        ),
    )
    if loss_on == "all":
        assert not weighted.all()
        for name in ("obs", "state", "a_prev", "action", "reward", "next_obs", "next_state"):
            value = getattr(batch, name).clone()
            value[~weighted] = torch.randn_like(value[~weighted])
            changed = changed._replace(**{name: value})

    (critic_loss, actor_loss, _), (critic_loss_2, actor_loss_2, _) = (
        losses_of_the_script(agent, b, alpha=0.3) for b in (batch, changed)
    )
    assert torch.equal(critic_loss, critic_loss_2) and torch.equal(actor_loss, actor_loss_2)
    for a, b, part in [
        (critic_loss, critic_loss_2, agent.critic),
        (actor_loss, actor_loss_2, agent.actor),
    ]:
        assert torch.equal(gradient(a, part), gradient(b, part))

    # the rows before have: the same change there is seen
    other = batch._replace(all_obs=torch.where(past.unsqueeze(-1), batch.all_obs, 0.0))
    assert losses_of_the_script(agent, other, alpha=0.3)[1] != actor_loss


@pytest.mark.parametrize("rnn", ["gru", "lstm", "rnn"])
def test_burn_in_rows_change_the_state_and_pass_no_gradient(rnn):
    agent, buffer = make_agent(
        rnn, burn_in=3, sequence_length=4, loss_on="last", batch_size=40, lengths=[12] * 4
    )
    batch = sample(agent, buffer)
    obs, z, a_prev, has_them = batch.burn_in
    has_them = has_them.squeeze(-1)
    assert has_them.any() and not has_them.all()
    leaves = [leaf.requires_grad_() for leaf in (obs, z, a_prev, batch.all_obs)]
    h, _ = agent.remember(batch)
    *grads, grad_obs = torch.autograd.grad(h.square().sum(), leaves, allow_unused=True)
    assert all(grad is None or not grad.any() for grad in grads) and grad_obs.any()

    # the stored state counts where there is no burn-in, and nowhere else
    with torch.no_grad():
        other, _ = agent.remember(batch._replace(burn_in=(obs + 1, z, a_prev, has_them[:, None])))
        other_z, _ = agent.remember(batch._replace(z=batch.z + 0.05))
    moved, moved_z = (other - h).abs().amax(-1) > 0, (other_z - h).abs().amax(-1) > 0
    assert torch.equal(moved, has_them) and torch.equal(moved_z, ~has_them)


@pytest.mark.parametrize("length", [1, 3, 8, 12])
def test_the_gradient_goes_back_length_rows_and_no_further(length):
    """Which rows of the buffer the h of the drawn transition depends on, by autograd."""
    agent, buffer = make_agent(
        burn_in=2, sequence_length=length, loss_on="last", batch_size=30, num_envs=1, lengths=[12]
    )
    buffer.obs = buffer.obs.requires_grad_()
    batch = sample(agent, buffer)
    h, _ = agent.remember(batch)
    for k in range(30):
        (grad,) = torch.autograd.grad(h[k].square().sum(), buffer.obs, retain_graph=True)
        t = (buffer.obs == batch.obs[k]).all(-1).nonzero().item()
        rows = grad.any(-1).nonzero().flatten().tolist()
        assert rows == list(range(max(0, t - length + 1), t + 1))


def test_a_sequence_as_long_as_the_episode_gives_the_full_gradient():
    """That of a loop from an empty memory on; a shorter sequence gives another one."""
    full, short = [], []
    for sequence_length, gradients in [(12, full), (3, short)]:
        torch.manual_seed(1)
        agent, buffer = make_agent(
            sequence_length=sequence_length, loss_on="last", batch_size=20, num_envs=1,
            lengths=[12], initial_state="zero",
        )  # fmt: skip
        torch.manual_seed(2)
        batch = sample(agent, buffer)
        h, _ = agent.remember(batch)
        weights = torch.randn(HIDDEN)
        layer = agent.actor.layer
        gradients.append(gradient((h @ weights).sum(), layer))

        loss = 0.0
        for k in range(20):
            t, z = (buffer.obs == batch.obs[k]).all(-1).nonzero().item(), torch.zeros(HIDDEN)
            for i in range(t + 1):
                a_prev = buffer.action[i - 1] * (i > 0)
                h_i, z = single_step(agent.actor, buffer.obs[i], z, a_prev)
            loss = loss + h_i @ weights
        gradients.append(gradient(loss, layer))
    torch.testing.assert_close(full[0], full[1], rtol=1e-9, atol=1e-12)
    assert torch.equal(full[1], short[1])  # the two saw the same networks and transitions
    assert (short[0] - full[1]).norm() > 0.05 * full[1].norm()


def test_a_critic_that_sees_h_gets_it_without_a_gradient():
    """So the critic's loss trains no memory, and the next memory is data, as the target is."""
    agent, buffer = make_agent(critic_sees_h=True, sequence_length=5, batch_size=20)
    assert agent.critic.net[0].weight.shape[1] == CRITIC + HIDDEN + 2 * ACTION
    h, next_h = agent.remember(sample(agent, buffer))
    assert h.requires_grad and not next_h.requires_grad
