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
from gymnasium.spaces import Box, Dict

import bptt_sac
import s2pg_sac

pytestmark = pytest.mark.usefixtures("double_precision")


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

    def exact_return(self):
        """J = E V_0(s, 0, 0)."""
        M, c = self.values()[0]
        second_moment = self.start_cov + torch.outer(self.start_mean, self.start_mean)
        return -((M[: self.s, : self.s] @ second_moment).trace() + c)

    def v(self, t, s, z, a_prev):
        M, c = (x.detach() for x in self.values()[t])
        return -(quadratic(M, torch.cat([s, z, a_prev], -1)) + c)

    def q(self, t, s, a, z_next):
        """Q_t(s, a, z') = r + gamma E V_{t+1}(s', z', a), in closed form over s'."""
        M, c = (x.detach() for x in self.values()[t + 1])
        after = torch.cat([s @ self.A.T + a @ self.B.T, z_next, a], -1)
        spread = (M[: self.s, : self.s] @ self.noise).trace()
        reward = -quadratic(self.Q, s) - quadratic(self.R, a)
        return reward - self.gamma * (quadratic(M, after) + spread + c)

    def kernels(self, obs, z, a_prev):
        """pi_a and pi_z."""
        x = torch.cat([obs, z, a_prev], -1)
        pi_a = torch.distributions.Normal(x @ self.K.T, self.log_std_a.exp())
        return pi_a, torch.distributions.Normal(x @ self.W.T, self.log_std_z.exp())

    def sample(self, obs, z, a_prev):
        """The interface of an actor: a, z', log pi_a and log pi_z, reparameterised."""
        kernels = self.kernels(obs, z, a_prev)
        samples = [pi.rsample() for pi in kernels]
        return *samples, *(pi.log_prob(x).sum(-1) for pi, x in zip(kernels, samples))

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


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def score_objective(problem, steps):
    """E sum_t gamma^t log pi(a, z') (G_t - V_t), to be differentiated: G_t is sampled."""
    total, to_go = 0.0, 0.0
    for t, (s, obs, z, a_prev, a, z_next, reward) in reversed(list(enumerate(steps))):
        to_go = reward + problem.gamma * to_go
        pi_a, pi_z = problem.kernels(obs, z, a_prev)
        log_pi = pi_a.log_prob(a).sum(-1) + pi_z.log_prob(z_next).sum(-1)
        total = total + problem.gamma**t * (log_pi * (to_go - problem.v(t, s, z, a_prev))).mean()
    return total


def actor_objective(problem, steps, actor=None, sees_a_prev=1, gamma=LinearGaussian.gamma):
    """-sum_t gamma^t of the project's actor loss without entropies, with the exact critic Q_t."""
    total = 0.0
    for t, (s, obs, z, a_prev, *_) in enumerate(steps):

        def critic(state, a, z_next, a_prev, t=t):
            q = problem.q(t, state, a, z_next)
            return torch.stack([2 * q.detach() + 1 - q, q])  # the first never is the minimum

        weight = torch.full((len(s),), 1 / len(s))
        batch = SimpleNamespace(obs=obs, state=s, z=z, a_prev=sees_a_prev * a_prev, weight=weight)
        loss, *_ = s2pg_sac.soft_actor_loss(actor or problem, critic, batch, alpha=0, alpha_z=0)
        total = total - gamma**t * loss
    return total


def compare(objective, batches=20, n=2000, **options):
    """Gradients [batches, P] of an objective; how far their mean is from that of J, in standard
    errors; and these errors, relative to the gradient of J."""
    problem, gradients = LinearGaussian(), []
    for _ in range(batches):
        loss = objective(problem, problem.trajectories(n), **options)
        gradient = torch.autograd.grad(loss, problem.parameters, materialize_grads=True)
        gradients.append(flat(gradient))
    exact = flat(torch.autograd.grad(problem.exact_return(), problem.parameters))
    gradients = torch.stack(gradients)
    error = gradients.std(0) / math.sqrt(batches)
    return gradients, (gradients.mean(0) - exact) / error, error.norm() / exact.norm()


@pytest.mark.parametrize("objective", [score_objective, actor_objective])
def test_the_s2pg_gradient_is_the_exact_gradient(objective):
    """Of the means of both kernels and of their spreads, without any gradient through time."""
    _, z, error = compare(objective)
    # sharp: a factor of 1.1 or a sign would be seen
    assert z.abs().max() < 4.5 and error < 0.03


@pytest.mark.parametrize("fault", [dict(sees_a_prev=0), dict(gamma=1.0)])
def test_gradients_with_a_wrong_previous_action_or_discount_are_rejected(fault):
    assert compare(actor_objective, n=1000, **fault)[1].abs().max() > 10


def test_a_gradient_that_takes_the_next_internal_state_as_a_constant_is_rejected():
    """Then nothing tells the kernel of z' what to remember. What the action gets stays right."""

    def objective(problem, steps):
        def sample(*inputs):
            a, z, *log_pi = problem.sample(*inputs)
            return a, z.detach(), *log_pi

        return actor_objective(problem, steps, SimpleNamespace(sample=sample))

    gradients, z, _ = compare(objective, n=1000)
    of_the_action, of_the_memory = slice(0, 4), slice(4, 12)
    assert z[of_the_action].abs().max() < 4.5 and not gradients[:, of_the_memory].any()


# --- backpropagation through time -----------------------------------------------------------------

OBS, CRITIC, ACTION, HIDDEN, ALPHA = 3, 4, 2, 5, 0.3
close = dict(rtol=1e-9, atol=1e-12)


def make_agent(rnn="gru", privileged=True, lengths=(12, 12, 12), num_envs=2, **options):
    """A BPTT-SAC agent in float64 that computes gradients and learns nothing; and its buffer."""
    env = SimpleNamespace(
        single_observation_space=Dict(policy=Box(-1, 1, (OBS,)), critic=Box(-1, 1, (CRITIC,))),
        single_action_space=Box(-1, 1, (ACTION,)),
        critic_sees_more=privileged,
    )
    options |= dict(actor_lr=0, critic_lr=0, alpha_lr=0, alpha=ALPHA, num_envs=num_envs)
    device = torch.device("cpu")
    agent = bptt_sac.Agent(bptt_sac.Args(rnn=rnn, state_dim=HIDDEN, **options), env, device)
    agent.args.tau = 0.0
    with torch.no_grad():
        # a strong recurrence that is not saturated: no gradient through it is too small to be seen
        agent.actor.layer.weight_ih_l0 *= 0.2
        agent.actor.layer.weight_hh_l0 *= 2
        for p in agent.target_critic.parameters():
            p += 0.1 * torch.randn_like(p)  # to tell it from the critic
    buffer = bptt_sac.SequenceBuffer(200 * num_envs, num_envs, *agent.row_sizes, device)
    for length in lengths:
        for step in range(length + 1):
            z = 1.8 * torch.rand(num_envs, agent.z_dim) - 0.9
            action = 1.8 * torch.rand(num_envs, ACTION) - 0.9
            flags = (np.full(num_envs, step == k) for k in (length - 1, 0))
            buffer.add(
                torch.randn(num_envs, OBS), torch.randn(num_envs, CRITIC), z * (step > 0), action,
                np.random.default_rng(step).normal(size=num_envs), *flags,
            )  # fmt: skip
    return agent, buffer


def sample(agent, buffer):
    args = agent.args
    return buffer.sample(args.batch_size, args.sequence_length, args.loss_on == "last")


def single_step(actor, obs, z, a_prev):
    """(h, z') [1, .] after one row."""
    e = torch.cat([actor.kernel_obs(obs).relu(), actor.kernel_action(a_prev).relu()], -1)
    z = z.split(HIDDEN, -1)
    h, z = actor.layer(e, z if actor.rnn == "lstm" else z[0])
    return h, torch.cat(z, -1) if actor.rnn == "lstm" else z


def losses_of_single_steps(agent, batch, noise):
    """Both losses, and the entropy, by a loop over sequences and rows; `noise` has the draws."""
    actor, h = agent.actor, {}
    for m in range(len(batch.first_z)):
        z = batch.first_z[[m]] * (agent.args.initial_state == "stored")
        for k in range(len(batch.all_obs)):
            out, z = single_step(actor, batch.all_obs[k, [m]], z, batch.all_a_prev[k, [m]])
            h[k, m] = out[0]

    def policy(obs, h, noise):
        mean, log_std = actor(obs, h)
        u = mean + log_std.exp() * noise
        density = torch.distributions.Normal(mean, log_std.exp()).log_prob(u)
        return torch.tanh(u), (density - torch.log(1 - torch.tanh(u) ** 2)).sum()

    def values(critic, state, h, *actions):
        """Q_1 and Q_2; h is data for a critic that sees it."""
        h = h.detach()[: HIDDEN * (len(state) == OBS)]
        return critic(torch.cat([state, h, *actions]).unsqueeze(0))

    actor_loss = critic_loss = entropy = 0.0
    for b, (k, m) in enumerate(zip(*(part.tolist() for part in batch.index))):
        state, action, a_prev = batch.state[b], batch.action[b], batch.a_prev[b]
        with torch.no_grad():
            a, log_pi = policy(batch.next_obs[b], h[k + 1, m], noise[0][b])
            q = values(agent.target_critic, batch.next_state[b], h[k + 1, m], a, action).min()
            v = 0 if batch.terminated[b] else q - ALPHA * log_pi
            target = batch.reward[b] + agent.args.gamma * v
        td_error = values(agent.critic, state, h[k, m], action, a_prev) - target
        critic_loss = critic_loss + batch.weight[b] * td_error.square().sum()
        a, log_pi = policy(batch.obs[b], h[k, m], noise[1][b])
        q = values(agent.critic, state, h[k, m], a, a_prev).min()
        actor_loss = actor_loss + batch.weight[b] * (ALPHA * log_pi - q)
        entropy = entropy - batch.weight[b] * log_pi
    return critic_loss, actor_loss, entropy


@pytest.mark.parametrize(
    "rnn, loss_on, initial_state, privileged",
    [
        ("gru", "last", "stored", True), ("lstm", "all", "stored", False),
        ("lstm", "last", "zero", True), ("rnn", "all", "zero", True),
        ("rnn", "last", "stored", False),
    ],
)  # fmt: skip
def test_an_update_has_the_losses_and_gradients_of_a_loop_of_single_steps(
    rnn, loss_on, initial_state, privileged
):
    """Rows past the end of an episode have no weight, and no influence."""
    agent, buffer = make_agent(
        rnn, privileged, lengths=[12, 2, 7, 1, 12], loss_on=loss_on, initial_state=initial_state,
        sequence_length=4, batch_size=32,
    )  # fmt: skip
    batch = sample(agent, buffer)
    assert batch.terminated.any() and (batch.weight == 0).any() and batch.first_z.any()
    torch.manual_seed(5)
    drawn = {(32, 4, loss_on == "last"): batch}
    metrics = agent.update(SimpleNamespace(sample=lambda *asked: drawn[asked]))
    torch.manual_seed(5)
    noise = [torch.randn(len(batch.weight), ACTION) for _ in range(2)]
    q_loss, pi_loss, entropy = losses_of_single_steps(agent, batch, noise)
    torch.testing.assert_close(metrics["losses/entropy"], entropy, **close)
    for name, loss, module in (
        ("qf_loss", q_loss, agent.critic), ("actor_loss", pi_loss, agent.actor)
    ):  # fmt: skip
        torch.testing.assert_close(metrics[f"losses/{name}"], loss, **close)
        ours, parameters = flat(p.grad for p in module.parameters()), list(module.parameters())
        theirs = flat(torch.autograd.grad(loss, parameters, retain_graph=True))
        torch.testing.assert_close(ours, theirs, **close)


@pytest.mark.parametrize("length", [1, 3, 8, 12])
def test_the_gradient_goes_back_length_rows_and_no_further(length):
    """Which rows of the buffer the h of the drawn transition depends on, by autograd."""
    agent, buffer = make_agent(
        sequence_length=length, loss_on="last", batch_size=30, num_envs=1, lengths=[12]
    )
    buffer.rows = buffer.rows.clone().requires_grad_()
    batch = sample(agent, buffer)
    h = agent.actor.unroll(batch.all_obs, batch.first_z, batch.all_a_prev)[0][batch.index]
    for k in range(30):
        (grad,) = torch.autograd.grad(h[k].square().sum(), buffer.rows, retain_graph=True)
        t = (buffer.rows[:, :OBS] == batch.obs[k]).all(-1).nonzero().item()
        rows = grad[:, :OBS].any(-1).nonzero().flatten().tolist()
        # neither the first row of the ring, which has no predecessor, nor rows before the sequence
        assert rows == list(range(max(1, t - length + 1), t + 1))
