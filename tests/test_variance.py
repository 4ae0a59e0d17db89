"""The variance study: its estimators, its bounds and its closed forms on small cases.

Everything is in float64 with fixed seeds. A mean is compared with its exact value in units of its
own standard error, and is shown to be sharp enough to reject the value of the other estimator.
"""

import csv
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark import variance

ESTIMATORS = ["S2PG", "BPTT"]
PRECISION = variance.ACTION_STD**-2


def bound(estimator, T, z_n, memory_std):
    if estimator == "S2PG":
        return variance.s2pg_bound(T, PRECISION, memory_std**-2)
    return variance.bptt_bound(T, z_n, PRECISION)


def trace_variance(estimator, T, z_n, memory_std, n=2000):
    rng = np.random.default_rng(0)
    estimates = variance.gradients(estimator, n, T, z_n, memory_std, rng)[-1]
    return estimates.var(0).sum()


def standard_errors(samples, exact):
    """How far the mean of `samples` [n, ...] is from `exact` [...], in standard errors."""
    error = samples.std(0) / math.sqrt(len(samples))
    return (samples.mean(0) - exact) / error, error


@pytest.mark.parametrize(("estimator", "memory_std", "other"), [("S2PG", 0.5, 0), ("BPTT", 0, 0.5)])
def test_an_estimator_is_unbiased_for_its_own_objective_alone(estimator, memory_std, other):
    z_n, T, n = 1.2, 5, 200_000
    case = estimator, n, T, z_n, memory_std
    returns, scores = variance.returns_and_scores(*case, np.random.default_rng(0))
    estimates = variance.gradients(*case, np.random.default_rng(0))
    # the score has mean zero, so a constant times it takes noise away and leaves no bias
    J = variance.exact_return(*torch.from_numpy(variance.THETA), z_n, memory_std, T).item()
    assert abs(standard_errors(returns[-1], J)[0]) < 4.5
    estimates = estimates[-1] - J * scores[-1]

    exact = variance.exact_gradient(z_n, memory_std, T)
    z, error = standard_errors(estimates, exact)
    assert abs(z).max() < 4.5
    assert error.max() < 0.01 * np.linalg.norm(exact)
    of_the_other = variance.exact_gradient(z_n, other, T)
    assert abs(standard_errors(estimates, of_the_other)[0]).max() > 10


def log_normal(x, mean, std):
    return torch.distributions.Normal(mean, std).log_prob(x)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_scores_are_gradients_of_log_densities(estimator):
    """Of (a_t, z_{t+1}) given what was before, z as data; of a_t given s_0..s_t, through time."""
    n, T, z_n, memory_std = 20, 6, 1.1, 0.3 if estimator == "S2PG" else 0.0
    s, z, a = variance.simulate(n, T, z_n, memory_std, np.random.default_rng(0))
    if estimator == "S2PG":
        scores = variance.s2pg_scores(s, z, a, z_n, memory_std)
    else:
        scores = variance.bptt_scores(s, z, a, z_n)

    s, z, a = (torch.from_numpy(x) for x in (s, z, a))
    for k, t in itertools.product(range(n), range(T)):
        k_s, u = theta = torch.from_numpy(variance.THETA).requires_grad_()
        memory = z[t, k]
        if estimator == "BPTT":
            memory = torch.zeros((), dtype=torch.float64)
            for i in range(t):
                memory = z_n * memory + u * s[i, k]
            assert torch.isclose(memory, z[t, k])
        log_pi = log_normal(a[t, k], k_s * s[t, k] + 0.5 * memory, 0.5)
        if estimator == "S2PG":
            log_pi = log_pi + log_normal(z[t + 1, k], z_n * z[t, k] + u * s[t, k], memory_std)
        (gradient,) = torch.autograd.grad(log_pi, theta)
        assert np.allclose(scores[t, k], gradient, rtol=1e-9, atol=1e-12)


def test_an_estimate_is_the_whole_return_times_the_whole_score():
    """For each horizon that of the trajectory which ends there."""
    case = 30, 4, 0.9, 0.5
    estimates = variance.gradients("S2PG", *case, np.random.default_rng(3))
    s, z, a = variance.simulate(*case, np.random.default_rng(3))
    for T in range(1, 5):
        returns = sum(0.99**t * np.cos(a[t]) for t in range(T))
        scores = variance.s2pg_scores(s[:T], z[: T + 1], a[:T], 0.9, 0.5)
        assert np.allclose(estimates[T - 1], returns[:, None] * scores.sum(0))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    z_n=st.floats(0, 1.5), T=st.integers(1, 40), memory_std=st.floats(0.02, 2),
    estimator=st.sampled_from(ESTIMATORS),
)  # fmt: skip
def test_no_bound_is_violated(z_n, T, memory_std, estimator):
    noise = memory_std if estimator == "S2PG" else 0
    assert trace_variance(estimator, T, z_n, noise) < bound(estimator, T, z_n, memory_std)


def test_the_bounds_are_sums_over_time_of_squared_jacobians():
    """BPTT at step t: |d mu / d theta| <= F + K H (1 + Zn + .. + Zn^(t-1)); with K = 0 no more."""
    F, H, K, T, R, N = 2.0, 3.0, 0.7, 9, 3, 2
    c, sizes = (R * sum(0.99**t for t in range(T))) ** 2 / N, dict(F=F, H=H, R=R, N=N)
    assert math.isclose(variance.s2pg_bound(T, 4, 9, **sizes), c * T * (F**2 * 4 + H**2 * 9))
    for z_n in (0.9, 1, 1.2):
        jacobian, squares = 0.0, 0.0  # |Psi_0| = 0, |Psi_{t+1}| <= H + Zn |Psi_t|
        for _ in range(T):
            squares += (F + K * jacobian) ** 2
            jacobian = H + z_n * jacobian
        assert math.isclose(variance.bptt_bound(T, z_n, 4, K=K, **sizes), c * 4 * squares)
        assert math.isclose(variance.bptt_bound(T, z_n, 4, K=0, **sizes), c * 4 * T * F**2)


def test_the_script_writes_a_row_for_each_case_and_a_picture(tmp_path, capsys):
    out = tmp_path / "new" / "v1.0"
    variance.main(variance.Args(
        trajectories=300, horizons=(2, 5), z_ns=(0.5, 1.2), memory_stds=(0.1, 0.5),
        memory_std=0.3, out=str(out),
    ))  # fmt: skip
    assert Path(f"{out}.png").read_bytes().startswith(b"\x89PNG")
    with open(f"{out}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    cases = [(r["estimator"], float(r["z_n"]), float(r["memory_std"]), int(r["T"])) for r in rows]
    varied = [("BPTT", 0.5, 0.0), ("BPTT", 1.2, 0.0), ("S2PG", 1.2, 0.3)]
    varied += [("S2PG", 0.5, std) for std in (0.1, 0.3, 0.5)]
    assert sorted(cases) == sorted((*case, T) for case in varied for T in (2, 5))
    for row, (estimator, z_n, memory_std, T) in zip(rows, cases):
        rng = np.random.default_rng(0)
        # the longest horizon's random numbers serve the others
        estimates = variance.gradients(estimator, 300, 5, z_n, memory_std, rng)[T - 1]
        total = estimates.var(0, ddof=1).sum()
        exact = variance.exact_gradient(z_n, memory_std, T)
        expected = dict(
            variance=total, bound=bound(estimator, T, z_n, memory_std or 1),
            variance_over_gradient=total / (exact @ exact),
            mean_k_s=estimates[:, 0].mean(), mean_u=estimates[:, 1].mean(),
            exact_k_s=exact[0], exact_u=exact[1],
        )  # fmt: skip
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-9)
    # a line for each Zn and T, and for each Zn < 1 and std
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("  0.5 ") for line in lines) == 2 + 3
    assert sum(line.startswith("  1.2 ") for line in lines) == 2


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_seed_decides_the_numbers(estimator):
    args = [variance.Args(trajectories=50, horizons=(1, 5), seed=seed) for seed in (1, 1, 2)]
    first, again, other = (variance.measure(estimator, 0.9, 0.5, own) for own in args)
    assert first == again and all(a["variance"] != b["variance"] for a, b in zip(first, other))


def test_the_error_of_a_variance_is_its_spread_over_seeds():
    args = [variance.Args(trajectories=200, horizons=(4,), seed=seed) for seed in range(100)]
    rows = [variance.measure("S2PG", 0.9, 0.5, seed_args)[0] for seed_args in args]
    variances, errors = ([row[name] for row in rows] for name in ("variance", "variance_error"))
    assert math.isclose(np.std(variances), np.mean(errors), rel_tol=0.3)
