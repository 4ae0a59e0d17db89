"""The variance of S2PG's and of BPTT's policy gradient on a toy problem, with their bounds.

    python benchmark/variance.py

The problem, for t < T, with parameters theta = (k_s, u) and z_0 = 0:

    s_t ~ U[-1, 1]    a_t ~ N(k_s s_t + k_z z_t, .5^2)    z_{t+1} = Zn z_t + u s_t + std e_t
    r_t = cos a_t     J = E sum_t gamma^t r_t

Both estimators are REINFORCE with one trajectory, its whole return times its whole score, without a
baseline. BPTT has a noise-free memory (std = 0) and differentiates through it. S2PG samples z_{t+1}
as it samples a_t, and differentiates nothing through time. So each follows the gradient of another
J, the one that its policy has; besides the variances the table has their ratios to the squared
length of the exact gradient, which is the number of trajectories that make the error of a mean
gradient as long as the gradient itself.

Written to --out: a CSV with a row for each estimator, Zn, std and T, and a picture.
"""

import csv
import dataclasses
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

K_S, U = THETA = np.array([0.5, 0.3])
K_Z, ACTION_STD, GAMMA = 0.5, 0.5, 0.99


@dataclasses.dataclass
class Args:
    trajectories: int = 20_000  # that a variance is measured with
    horizons: tuple[int, ...] = (1, 3, 10, 30, 100)  # values of T
    z_ns: tuple[float, ...] = (0.5, 0.9, 1.0, 1.05, 1.2)  # values of Zn, the memory's recurrence
    memory_std: float = 0.5  # of the memory of S2PG
    memory_stds: tuple[float, ...] = (0.05, 0.1, 0.15, 0.3, 1.0)  # more of them, where Zn < 1
    seed: int = 0  # of all random numbers
    out: str = "benchmark/results/variance"  # path of the CSV and the picture, without suffix


# --- estimators -----------------------------------------------------------------------------------


def simulate(n, T, z_n, memory_std, rng):
    """n trajectories: s, a [T, n] and z [T + 1, n]."""
    s = rng.uniform(-1, 1, (T, n))
    action_noise, memory_noise = rng.standard_normal((2, T, n))
    z = np.zeros((T + 1, n))
    for t in range(T):
        z[t + 1] = z_n * z[t] + U * s[t] + memory_std * memory_noise[t]
    return s, z, K_S * s + K_Z * z[:-1] + ACTION_STD * action_noise


def discounted_returns(a):
    """[T, n], the returns of the first 1, 2, .. T steps."""
    return (GAMMA ** np.arange(len(a))[:, None] * np.cos(a)).cumsum(0)


def s2pg_scores(s, z, a, z_n, memory_std):
    """[T, n, 2], grad log pi(a_t, z_{t+1} | s_t, z_t): z_t is data."""
    action_noise, memory_noise = a - K_S * s - K_Z * z[:-1], z[1:] - z_n * z[:-1] - U * s
    return np.stack([s * action_noise / ACTION_STD**2, s * memory_noise / memory_std**2], -1)


def bptt_scores(s, z, a, z_n):
    """[T, n, 2], (d mu + d_z mu Psi_t)' Sigma^-1 (a_t - mu_t), Psi_{t+1} = d eta + d_z eta Psi_t.

    Psi_t = d z_t / d theta has one component, d z_t / d u.
    """
    psi = np.zeros_like(z)
    for t in range(len(s)):
        psi[t + 1] = s[t] + z_n * psi[t]
    action_noise = a - K_S * s - K_Z * z[:-1]
    return np.stack([s, K_Z * psi[:-1]], -1) * action_noise[..., None] / ACTION_STD**2


def returns_and_scores(estimator, n, T, z_n, memory_std, rng):
    """[T, n] and [T, n, 2], each summed over the first 1, 2, .. T steps."""
    s, z, a = simulate(n, T, z_n, memory_std, rng)
    if estimator == "S2PG":
        scores = s2pg_scores(s, z, a, z_n, memory_std)
    else:
        scores = bptt_scores(s, z, a, z_n)
    return discounted_returns(a), scores.cumsum(0)


def gradients(estimator, n, T, z_n, memory_std, rng):
    """[T, n, 2], the one-trajectory estimates for the horizons 1, 2, .. T."""
    returns, scores = returns_and_scores(estimator, n, T, z_n, memory_std, rng)
    return returns[..., None] * scores


# --- theory ---------------------------------------------------------------------------------------


def squared_return_bound(T, R, N):
    """c = R^2 (1 - gamma^T)^2 / (N (1 - gamma)^2): the squared return, over N trajectories.

    The trace of the variance of return x score is at most E |return x score|^2 <= c E |score|^2,
    and the score is a sum of T uncorrelated ones (each has mean zero given what was before).
    """
    return R**2 * (1 - GAMMA**T) ** 2 / (N * (1 - GAMMA) ** 2)


def s2pg_bound(T, action_precision, memory_precision, F=1.0, H=1.0, R=1.0, N=1):
    """c T (F^2 |Sigma^-1| + H^2 |Ups^-1|), with Frobenius norms, |d_theta mu|<=F, |d_theta eta|<=H.

    E |grad log N(a; mu, Sigma)|^2 = tr(d mu' Sigma^-1 d mu) <= F^2 |Sigma^-1|, for z' alike. Apart
    from c linear in T; neither d_z mu nor d_z eta enters.
    """
    score = T * (F**2 * action_precision + H**2 * memory_precision)
    return squared_return_bound(T, R, N) * score


def bptt_bound(T, z_n, action_precision, F=1.0, H=1.0, K=K_Z, R=1.0, N=1):
    """c |Sigma^-1| (T F^2 + 2 F H K Zt + H^2 K^2 Zb), also with |d_z mu| <= K, |d_z eta| <= Zn.

    Zt = sum_t S_t and Zb = sum_t S_t^2 of S_t = sum_{i<t} Zn^(t-1-i), because |Psi_t| <= H S_t and
    so E |score_t|^2 <= |Sigma^-1| (F + K H S_t)^2. Apart from c: O(T) for Zn < 1, O(T^3) for
    Zn = 1, Zn^(2 T) for Zn > 1.
    """
    S = np.array([np.sum(float(z_n) ** np.arange(t)) for t in range(T)])
    score = action_precision * (T * F**2 + 2 * F * H * K * S.sum() + H**2 * K**2 * (S**2).sum())
    return squared_return_bound(T, R, N) * score


def exact_return(k_s, u, z_n, memory_std, T):
    """J in closed form: a_t is a sum of independent symmetric parts, E cos of which is a product.

    E cos(x s) = sin(x) / x for s ~ U[-1, 1], and E cos(x e) = exp(-x^2 / 2) for e ~ N(0, 1).
    """
    J = 0.0
    for t in range(T):
        memory = K_Z * float(z_n) ** torch.arange(t, dtype=torch.float64)  # d a_t / d eta_i, i < t
        variance = ACTION_STD**2 + memory_std**2 * (memory**2).sum()
        uniform = torch.sinc(k_s / math.pi) * torch.sinc(memory * u / math.pi).prod()
        J = J + GAMMA**t * uniform * torch.exp(-variance / 2)
    return J


def exact_gradient(z_n, memory_std, T):
    """[2]"""
    theta = torch.from_numpy(THETA).requires_grad_()
    return torch.autograd.grad(exact_return(*theta, z_n, memory_std, T), theta)[0].numpy()


# --- measurements ---------------------------------------------------------------------------------


def measure(estimator, z_n, memory_std, args):
    """Rows of the CSV, one for each horizon, all from the same trajectories."""
    n, precision, rows = args.trajectories, ACTION_STD**-2, []
    # the same random numbers for all cases
    rng = np.random.default_rng(args.seed)
    estimates = gradients(estimator, n, max(args.horizons), z_n, memory_std, rng)
    for T in args.horizons:
        mean, exact = estimates[T - 1].mean(0), exact_gradient(z_n, memory_std, T)
        squares = ((estimates[T - 1] - mean) ** 2).sum(-1)
        variance = squares.sum() / (n - 1)
        if estimator == "S2PG":
            bound = s2pg_bound(T, precision, memory_std**-2)
        else:
            bound = bptt_bound(T, z_n, precision)
        rows.append(dict(
            estimator=estimator, z_n=z_n, memory_std=memory_std, T=T, trajectories=n,
            seed=args.seed, variance=variance, variance_error=squares.std() / math.sqrt(n),
            bound=bound, mean_k_s=mean[0], mean_u=mean[1], exact_k_s=exact[0], exact_u=exact[1],
            variance_over_gradient=variance / (exact**2).sum(),
        ))  # fmt: skip
    return rows


def find(rows, **values):
    """The rows with these values, in the order of the CSV."""
    return [row for row in rows if values.items() <= row.items()]


def print_horizons(rows, args):
    print(f"\nTrace variance of a gradient and its bound, memory std of S2PG {args.memory_std:g}")
    print("V / g^2: the variance over the squared length of the exact gradient")
    columns = [f"{x:>9s}" for x in ["BPTT", "bound", "V / g^2", "S2PG", "bound", "V / g^2"]]
    print(f"{'Zn':>5s} {'T':>4s}", *columns, f"{'BPTT / S2PG':>12s}")
    for z_n in args.z_ns:
        for T in args.horizons:
            (bptt,) = find(rows, estimator="BPTT", z_n=z_n, T=T)
            (s2pg,) = find(rows, estimator="S2PG", z_n=z_n, T=T, memory_std=args.memory_std)
            names = "variance", "bound", "variance_over_gradient"
            cells = [f"{row[name]:9.2e}" for row in (bptt, s2pg) for name in names]
            print(f"{z_n:5g} {T:4d}", *cells, f"{bptt['variance'] / s2pg['variance']:12.3g}")


def print_memory_noise(rows, args):
    T = max(args.horizons)
    print(f"\nS2PG's bad case: little memory noise, a contracting recurrence (T = {T})")
    print(f"{'Zn':>5s} {'std':>5s} {'S2PG':>9s} {'bound':>9s} {'BPTT':>9s} {'S2PG / BPTT':>12s}")
    for s2pg in find(rows, estimator="S2PG", T=T):
        if s2pg["z_n"] < 1:
            (bptt,) = find(rows, estimator="BPTT", z_n=s2pg["z_n"], T=T)
            variance, ratio = bptt["variance"], s2pg["variance"] / bptt["variance"]
            print(f"{s2pg['z_n']:5g} {s2pg['memory_std']:5g} {s2pg['variance']:9.2e}", end="")
            print(f" {s2pg['bound']:9.2e} {variance:9.2e} {ratio:12.3g}")


# --- picture --------------------------------------------------------------------------------------


def column(rows, name):
    return [row[name] for row in rows]


def draw(rows, args, path):
    figure, panels = plt.subplots(2, 2, figsize=(10, 8), layout="constrained")
    colors = dict(zip(args.z_ns, plt.cm.plasma(np.linspace(0, 0.85, len(args.z_ns)))))
    for panel, estimator in zip(panels[0], ("S2PG", "BPTT")):
        draw_horizons(panel, find(rows, estimator=estimator), estimator, args, colors)
    panels[0, 0].sharey(panels[0, 1])
    draw_memory_noise(panels[1, 0], rows, args, colors)
    draw_noise_to_signal(panels[1, 1], find(rows, T=max(args.horizons)), args)
    for panel in panels.flat:
        panel.set_yscale("log")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_horizons(panel, rows, estimator, args, colors):
    for z_n, color in colors.items():
        curve = find(rows, z_n=z_n, memory_std=args.memory_std if estimator == "S2PG" else 0)
        T = column(curve, "T")
        panel.plot(T, column(curve, "variance"), "o-", ms=4, color=color, label=f"Zn = {z_n:g}")
        if estimator == "BPTT":
            panel.plot(T, column(curve, "bound"), "--", color=color, lw=1)
    if estimator == "S2PG":
        panel.plot(T, column(curve, "bound"), "--", color="black", lw=1, label="bound, any Zn")
    else:
        panel.plot([], [], "--", color="black", lw=1, label="bounds")
    panel.set(xscale="log", xlabel="horizon T", ylabel="trace variance of a gradient")
    panel.set_xticks(T, [f"{x}" for x in T], minor=False)
    panel.minorticks_off()
    panel.set_title(f"{estimator}, memory std {curve[0]['memory_std']:g}")
    panel.legend(frameon=False, fontsize=8)


def draw_memory_noise(panel, rows, args, colors):
    T, stds = max(args.horizons), sorted({args.memory_std, *args.memory_stds})
    for z_n in [z_n for z_n in args.z_ns if z_n < 1]:
        s2pg = find(rows, estimator="S2PG", z_n=z_n, T=T)
        (bptt,) = find(rows, estimator="BPTT", z_n=z_n, T=T)
        style = dict(color=colors[z_n])
        panel.plot(stds, column(s2pg, "variance"), "o-", ms=4, **style, label=f"S2PG, Zn = {z_n:g}")
        panel.axhline(bptt["variance"], ls=":", **style, label=f"BPTT, Zn = {z_n:g}, no noise")
    bounds = [s2pg_bound(T, ACTION_STD**-2, std**-2) for std in stds]
    panel.plot(stds, bounds, "--", color="black", lw=1, label="bound of S2PG")
    panel.set(xscale="log", xlabel="memory std of S2PG", ylabel="trace variance of a gradient")
    panel.set_xticks(stds, [f"{std:g}" for std in stds])
    panel.minorticks_off()
    panel.set_title(f"S2PG's bad case: little memory noise (T = {T})")
    panel.legend(frameon=False, fontsize=8)


def draw_noise_to_signal(panel, rows, args):
    for estimator, memory_std, color in [("S2PG", args.memory_std, "C0"), ("BPTT", 0.0, "C3")]:
        curve = find(rows, estimator=estimator, memory_std=memory_std)
        values = column(curve, "variance_over_gradient")
        label = f"{estimator}, memory std {memory_std:g}"
        panel.plot(range(len(values)), values, "o-", ms=4, color=color, label=label)
    panel.set_xticks(range(len(args.z_ns)), [f"{z_n:g}" for z_n in args.z_ns])
    panel.set(xlabel="Zn", ylabel="trace variance / |exact gradient|²")
    panel.set_title(f"Noise to signal, each for its own objective (T = {max(args.horizons)})")
    panel.legend(frameon=False, fontsize=8)


def redraw(out):
    """The picture of an earlier run with the default options, from its CSV."""
    with open(f"{out}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {k: float(v) for k, v in row.items() if k != "estimator"} | dict(T=int(row["T"]))
    draw(rows, Args(), f"{out}.png")


def main(args: Args):
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for z_n in args.z_ns:
        rows += measure("BPTT", z_n, 0.0, args)
        varied = args.memory_stds if z_n < 1 else ()
        for memory_std in sorted({args.memory_std, *varied}):
            rows += measure("S2PG", z_n, memory_std, args)
    with open(f"{args.out}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, args, f"{args.out}.png")
    print_horizons(rows, args)
    print_memory_noise(rows, args)
    print(f"\n{args.out}.csv\n{args.out}.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
