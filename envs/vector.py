"""Whole episodes, played in several environments that are stepped together."""

import ast
import contextlib
import json
import os
import random
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from tqdm import tqdm

from envs.errors import UsageError
from envs.wrappers import SUCCESS, Checked

LONGEST_EPISODE = 100_000  # steps, at least, that an evaluation waits for the end of an episode


class EndlessEpisode(UsageError):
    """An evaluation has waited for the end of an episode for too long."""


class Together(gym.vector.SyncVectorEnv):
    """Environments that are stepped one after the other, and that can score an agent."""

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """As Gymnasium's; it seeds `random` and `np.random`, too, which some tasks draw from."""
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
        return super().reset(seed=seed, options=options)

    def score(self, agent, episodes: int, seed: int, writer, step: int):
        """Evaluate an agent in the midst of its training: `returns` of its `actor`.

        They are printed, and go to the TensorBoard `writer` as `eval/...`. `best.pt` in its folder
        has the weights whose stochastic return is the highest so far. If an episode does not
        end, it prints so and logs nothing.
        """
        try:
            result = returns(agent.actor, self, episodes, seed, step)
        except EndlessEpisode as error:
            return tqdm.write(f"step {step}: not evaluated, {error}")
        for name, value in result.items():
            writer.add_scalar(f"eval/{name}", value, step)
        means = ", ".join(f"{name} {round(value, 2)}" for name, value in result.items())
        tqdm.write(f"step {step}: {means}")

        best, score, highest = Path(writer.log_dir, "best.pt"), result["return_stochastic"], -np.inf
        if best.is_file():
            highest = torch.load(best, map_location="cpu", weights_only=True)["score"]
        if score > highest:
            torch.save(dict(agent=agent.state_dict(), step=step, score=score), f"{best}.tmp")
            os.replace(f"{best}.tmp", best)


def evaluate(actor, env: gym.vector.VectorEnv, episodes: int, deterministic: bool, seed: int):
    """Play whole episodes by a policy with an internal state, an equal share in each environment.

    It leaves the random numbers of training as they were: those of torch, `random` and `np.random`.

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
        EndlessEpisode: An episode does not end within `LONGEST_EPISODE` steps, nor within ten times
            the longest that was played before.
    """
    device, n = next(actor.parameters()).device, env.num_envs
    shares = [len(range(i, episodes, n)) for i in range(n)]
    rows, played = [[] for _ in range(n)], [[] for _ in range(n)]
    tells_success, limit = False, max(LONGEST_EPISODE, 10 * Checked.longest)
    with torch.no_grad(), own_random_numbers(device):
        torch.manual_seed(seed)
        obs, _ = env.reset(seed=seed)
        z = torch.zeros(n, actor.z_dim, device=device)
        a_prev = torch.zeros(n, actor.action_dim, device=device)
        final = np.zeros(n, dtype=bool)  # rows that hold the last observation of an episode
        while any(len(p) < share for p, share in zip(played, shares)):
            policy_obs, critic_obs = (np.array(view) for view in views(obs))  # obs may be reused
            policy_input = torch.as_tensor(policy_obs, dtype=torch.float32, device=device)
            action, z = actor.act(policy_input, z, a_prev, deterministic)
            a = action.cpu().numpy()
            next_obs, reward, terminated, truncated, info = env.step(a.copy())  # it may write
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
                elif len(rows[i]) > limit:
                    raise EndlessEpisode(
                        f"no end of an episode in {limit} steps: set max_episode_steps"
                    )
            keep = torch.as_tensor(~final, device=device).unsqueeze(-1)
            z, a_prev = z * keep, action * keep
            obs, final = next_obs, terminated | truncated
    chosen = [episode for p, share in zip(played, shares) for episode in p[:share]]
    if not tells_success:
        for episode in chosen:
            del episode["successes"]
    return chosen


@contextlib.contextmanager
def own_random_numbers(device: torch.device):
    """Restore the random states of torch, `random` and `np.random` at the end."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


def _episode(rows: list[dict]) -> dict[str, np.ndarray]:
    """Its columns; the last row is an observation alone, since its action was ignored."""
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return {k: v if k.endswith("observations") else v[:-1] for k, v in columns.items()}


def views(obs):
    """What the policy sees of an observation, and what the critic; of a plain array, both all."""
    return (obs["policy"], obs["critic"]) if isinstance(obs, dict) else (obs, obs)


def returns(actor, env: gym.vector.VectorEnv, episodes: int, *seed: int) -> dict[str, float]:
    """Mean returns of `evaluate`: `return_deterministic` and `return_stochastic`. Also the rates of
    success, `success_...`, if the environment tells them. Other seeds give other episodes.
    """
    result, seed = {}, int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1)
    for mode in ("deterministic", "stochastic"):
        played = evaluate(actor, env, episodes, mode == "deterministic", seed)
        result[f"return_{mode}"] = float(np.mean([e["rewards"].sum() for e in played]))
        if "successes" in played[0]:
            result[f"success_{mode}"] = float(np.mean([e["successes"].any() for e in played]))
    return result


def literals(options) -> dict:
    """{name: value} of --env-kwargs, a dict or pairs. Python and JSON literals are read:

    "True", "null", "0.5", "(0.2, 1.0)" and '{"a": [1]}'. Other text stays.

    Raises:
        UsageError: `env_id`, `num_envs`, `hide` or `privileged_critic` is among them, which are
            options of their own.
    """
    for name in ("env_id", "num_envs", "hide", "privileged_critic"):
        if name in dict(options):
            raise UsageError(f"{name} is an option of its own: --{name.replace('_', '-')}.")
    return {name: literal(value) for name, value in dict(options).items()}


def literal(text):
    for parse in ast.literal_eval, json.loads:
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return parse(text)
    return text
