"""Whole episodes, played in several environments that are stepped together."""

import gymnasium as gym
import numpy as np
import torch

from envs.errors import UsageError
from envs.wrappers import SUCCESS

LONGEST_EPISODE = 100_000  # steps of an evaluation


def evaluate(actor, env: gym.vector.VectorEnv, episodes: int, deterministic: bool, seed: int):
    """Play whole episodes by a policy with an internal state, an equal share in each environment.

    The random numbers of training go on as if never used.

    Args:
        actor: A module with `act(obs [N, O], z [N, Z], a_prev [N, A], deterministic)`, which
            returns the actions [N, A] in [-1, 1] and the next internal states [N, Z]; and with the
            sizes `z_dim` and `action_dim`. z and a_prev are zeros at the start of an episode.
        env: What `make_vec` returns, or a vector environment of your own that resets in the next
            step and whose observation is an array or a dict with "policy" (and "critic").
        episodes: How many.
        deterministic: Whether action and internal state are without noise.
        seed: Of the environments and of the noise.

    Returns:
        A list of the episodes, each a dict of arrays: `observations` (the policy's) and
        `critic_observations` [T + 1, .], `actions` [T, A] in [-1, 1], `rewards`, `terminations` and
        `truncations` [T], and `successes` [T] where the environment tells them, as
        `info["success"]` or `info["is_success"]`.

    Raises:
        UsageError: An episode does not end within `LONGEST_EPISODE` steps.
    """
    device, n = next(actor.parameters()).device, env.num_envs
    shares = [len(range(i, episodes, n)) for i in range(n)]
    rows, played = [[] for _ in range(n)], [[] for _ in range(n)]
    tells_success = False
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        obs, _ = env.reset(seed=seed)
        z = torch.zeros(n, actor.z_dim, device=device)
        a_prev = torch.zeros(n, actor.action_dim, device=device)
        final = np.zeros(n, dtype=bool)  # rows that hold the last observation of an episode
        while any(len(p) < share for p, share in zip(played, shares)):
            policy_obs, critic_obs = views(obs)
            policy_input = torch.as_tensor(policy_obs, dtype=torch.float32, device=device)
            action, z = actor.act(policy_input, z, a_prev, deterministic)
            a = action.cpu().numpy()
            next_obs, reward, terminated, truncated, info = env.step(a)
            row = dict(
                observations=policy_obs, critic_observations=critic_obs, actions=a,
                rewards=reward, terminations=terminated, truncations=truncated,
                successes=np.zeros(n, dtype=bool),
            )  # fmt: skip
            for name in SUCCESS:
                if name in info:
                    tells_success = True
                    row["successes"] |= np.asarray(info[name], dtype=bool)
            for i in range(n):
                rows[i].append({name: column[i] for name, column in row.items()})
                if final[i]:
                    played[i].append(_episode(rows[i]))
                    rows[i] = []
                elif len(rows[i]) > LONGEST_EPISODE:
                    raise UsageError(
                        f"no end of an episode in {LONGEST_EPISODE} steps: set max_episode_steps"
                    )
            keep = torch.as_tensor(~final, device=device).unsqueeze(-1)
            z, a_prev = z * keep, action * keep
            obs, final = next_obs, terminated | truncated
    chosen = [episode for p, share in zip(played, shares) for episode in p[:share]]
    if not tells_success:
        for episode in chosen:
            del episode["successes"]
    return chosen


def _episode(rows: list[dict]) -> dict[str, np.ndarray]:
    """Its columns; the last row is an observation alone, since its action was ignored."""
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return {k: v if k.endswith("observations") else v[:-1] for k, v in columns.items()}


def views(obs):
    """What the policy sees of an observation, and what the critic; of a plain array, both all."""
    return (obs["policy"], obs["critic"]) if isinstance(obs, dict) else (obs, obs)


def returns(actor, env: gym.vector.VectorEnv, episodes: int, *seed: int) -> dict[str, float]:
    """Mean returns of `evaluate`: `return_deterministic` and `return_stochastic`; and, where the
    environment tells them, the rates of `success_...`. Seeds are hashed: others, other episodes.
    """
    result, seed = {}, int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1)
    for mode in ("deterministic", "stochastic"):
        played = evaluate(actor, env, episodes, mode == "deterministic", seed)
        result[f"return_{mode}"] = float(np.mean([e["rewards"].sum() for e in played]))
        if "successes" in played[0]:
            result[f"success_{mode}"] = float(np.mean([e["successes"].any() for e in played]))
    return result
