"""The studies of gradients: slopes that are known, and the gradient through the simulator."""

import json
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

import rp_pgm
from benchmark import model_gradients, through_time

A = np.array([[0.9, 0.3, 0.0], [0.0, 0.8, -0.2], [0.1, 0.0, 1.1]])
B = np.array([[0.0, 0.5], [0.4, 0.0], [0.2, -0.3]])


def linear(row):
    """x' = A x + B a and r = -|x|^2 - |a|^2 / 10, of a row (x, a)."""
    x, a = row[:3], row[3:]
    return np.append(A @ x + B @ a, -x @ x - 0.1 * a @ a)


class Exact:
    """The same as a model, which torch differentiates."""

    def step(self, x, a):
        return x @ torch.tensor(A).T + a @ torch.tensor(B).T

    def outcome(self, x, a):
        reward = -x.square().sum(-1) - 0.1 * a.square().sum(-1)
        return reward, torch.tensor(-torch.inf)


@pytest.fixture
def agent():
    env = SimpleNamespace(
        single_observation_space=gym.spaces.Box(-9, 9, (3,)),
        single_action_space=gym.spaces.Box(-1, 1, (2,)),
    )
    args = rp_pgm.Args(width=16, depth=2, alpha=0.1, estimator="dp", spectral_norm="both")
    return rp_pgm.Agent(args, env, torch.device("cpu")).double()


@pytest.fixture
def batch():
    x, action = torch.randn(9, 20, 3).double(), torch.rand(8, 20, 2).double() - 0.5
    ones = torch.ones(8, 20).double()
    return rp_pgm.Segments(x, action, -ones, 0 * ones, ones, ones[0] / 20)


@pytest.mark.parametrize("case", sorted({name for name, *_ in through_time.known()}))
def test_a_known_slope_is_measured(case):
    rows = [row for row in through_time.known() if row[0] == case]
    _, steps, measured, exact = zip(*rows)
    assert list(steps) == list(range(len(rows)))
    assert len(rows) > 8
    np.testing.assert_allclose(measured, exact, rtol=1e-5)


@pytest.mark.parametrize("horizon", [1, 4, 8])
def test_the_exact_model_of_a_linear_system_has_no_bias(agent, batch, horizon):
    real = model_gradients.Real(linear)
    true = model_gradients.mean_gradient(agent, real, batch, horizon)
    exact = model_gradients.mean_gradient(agent, Exact(), batch, horizon)
    assert model_gradients.cosine(true, exact) > 1 - 1e-9
    torch.testing.assert_close(true, exact, rtol=1e-5, atol=1e-6)
    torch.manual_seed(1)
    other = rp_pgm.Model(3, 2, agent.args).double()
    learned = model_gradients.mean_gradient(agent, other, batch, horizon)
    assert model_gradients.cosine(true, learned) < 0.99


def test_a_relative_variance_is_free_of_the_noise_of_the_mean(agent, monkeypatch):
    """Of gradients .3 + N(0, 1) in each parameter; left in, the noise of 20 would make it 7."""
    theta = torch.nn.utils.parameters_to_vector(agent.actor.parameters())
    monkeypatch.setattr(model_gradients, "segments", lambda agent, buffer, number, length: number)
    monkeypatch.setattr(
        model_gradients, "objective",
        lambda agent, model, number, *_: (0.3 + torch.randn(number, len(theta)).to(theta)) @ theta,
    )  # fmt: skip
    args = SimpleNamespace(samples=128, means=20)
    found = model_gradients.variances(agent, None, 8, "dp", args)
    assert found["variance"] == pytest.approx(len(theta), rel=0.05)
    assert found["relative"] == pytest.approx(1 / 0.3**2, rel=0.2)


def test_slopes_of_the_return_in_random_directions_agree(agent, batch):
    before = [p.clone() for p in agent.actor.parameters()]
    real = model_gradients.Real(linear)
    assert model_gradients.check(agent, real, batch, 4, directions=10) > 1 - 1e-6
    for old, new in zip(before, agent.actor.parameters()):
        torch.testing.assert_close(old, new, rtol=0, atol=0)


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "HalfCheetah-v4"])
def test_the_simulator_repeats_what_the_environment_did(env_id):
    env = gym.make(env_id)
    obs, _ = env.reset(seed=0)
    norm = rp_pgm.RunningNorm(len(obs)).double()
    norm.add(torch.tensor(obs).double() + 2 * torch.randn(50, len(obs)).double())
    transition = model_gradients.simulator(env_id, norm)
    env.action_space.seed(0)
    for _ in range(5):
        action = env.action_space.sample()
        row = np.concatenate([norm(torch.tensor(obs).double()), action / env.action_space.high])
        obs, reward, *_ = env.step(action)
        expected = np.append(norm(torch.tensor(obs).double()), reward)
        np.testing.assert_allclose(transition(row), expected, atol=1e-5)


def test_jacobians_of_model_and_truth(agent, batch):
    x, a = batch.x[0], batch.action[0]
    jacobian = model_gradients.jacobians(model_gradients.Real(linear).step, x, a)
    np.testing.assert_allclose(jacobian, np.broadcast_to(A, jacobian.shape), atol=1e-6)


def test_a_run_with_other_options_is_not_taken_for_the_one_asked_for(tmp_path, monkeypatch):
    options = dict(env_id="Pendulum-v1", exp_name="none-1", seed=1, total_timesteps=5, width=7)
    run = tmp_path / "runs" / "Pendulum-v1__none-1__1__0"
    run.mkdir(parents=True)
    torch.save(dict(global_step=5), run / "checkpoint.pt")
    (run / "args.json").write_text(json.dumps(options | dict(gamma=0.99)))
    assert model_gradients.trained(tmp_path, "rp_pgm", options) == run
    failed = SimpleNamespace(returncode=1)
    monkeypatch.setattr(model_gradients.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match="did not finish"):
        model_gradients.trained(tmp_path, "rp_pgm", options | dict(width=8))
