"""Several environments stepped together, and whole episodes played in them."""

import gymnasium as gym
import numpy as np
import torch

from envs.errors import UsageError

LONGEST_EPISODE = 100_000  # steps of an evaluation


class UnitActions(gym.ActionWrapper, gym.utils.RecordConstructorArgs):
    """Actions in [-1, 1], float32; scaled in float64 and clipped, so none leaves the space inside.

    `env.action_space`, of the environment as `gymnasium.make` returns it, is a `Box(A,)` with
    finite bounds. A component whose bounds are equal is held at its value.
    """

    def __init__(self, env: gym.Env):
        gym.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self.low, self.high = (
            bound.astype(np.float64) for bound in (env.action_space.low, env.action_space.high)
        )
        self.action_space = gym.spaces.Box(-1, 1, env.action_space.shape, np.float32)

    def action(self, action: np.ndarray) -> np.ndarray:
        """From [-1, 1] to the units of the environment, [..., A]."""
        scaled = self.low + 0.5 * (np.asarray(action, np.float64) + 1) * (self.high - self.low)
        box = self.env.action_space
        return scaled.astype(box.dtype).clip(box.low, box.high)

    def reverse(self, action: np.ndarray) -> np.ndarray:
        """From the units of the environment, which clips what lies outside, to [-1, 1], [..., A]."""
        span = np.where(self.high > self.low, self.high - self.low, 1)
        scaled = 2 * (np.asarray(action, np.float64) - self.low) / span - 1
        return np.where(self.high > self.low, scaled, 0).clip(-1, 1).astype(np.float32)


def make_vec(
    env_id: str, num_envs: int = 1, *, video_folder: str | None = None, **options
) -> gym.vector.VectorEnv:
    """`num_envs` environments of `envs.make(env_id, **options)`, stepped together, one row a step.

    Actions lie in [-1, 1]. An episode of T steps fills T + 1 rows: the step after its last one
    ignores its action, resets, and returns the first observation of the next (autoreset "next
    step"). `info["episode"]` has return "r" and length "l" where `info["_episode"]` is true. With
    a `video_folder` the first environment is filmed. `critic_sees_more` is that of `envs.make`.

    Raises:
        UsageError: As `envs.make`, and if the environment cannot be filmed here.
    """
    from envs import make

    def make_one(film: bool) -> gym.Env:
        env = make(env_id, render_mode="rgb_array" if film else None, **options)
        if film:
            try:
                env.reset(seed=0)
                env.render()
                env = gym.wrappers.RecordVideo(env, video_folder, disable_logger=True)
            except Exception as error:  # graphics drivers raise what they like
                raise UsageError(
                    f"cannot record video: {error!r} (without a screen, MUJOCO_GL=egl may help)"
                ) from error
        return UnitActions(gym.wrappers.RecordEpisodeStatistics(env))

    makers = [lambda film=video_folder is not None and i == 0: make_one(film) for i in range(num_envs)]
    env = gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP)
    env.critic_sees_more = env.get_attr("critic_sees_more")[0]
    return env


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
        `truncations` [T], and `successes` [T] where the environment reports `info["success"]`.

    Raises:
        UsageError: An episode does not end within 100 000 steps.
    """
    device, n = next(actor.parameters()).device, env.num_envs
    shares = [len(range(i, episodes, n)) for i in range(n)]
    rows, played = [[] for _ in range(n)], [[] for _ in range(n)]
    names = ["observations", "critic_observations", "actions", "rewards"]
    names += ["terminations", "truncations"]
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
            success = info.get("success", np.zeros(n, dtype=bool))
            if "success" in info and "successes" not in names:
                names.append("successes")
            columns = policy_obs, critic_obs, a, reward, terminated, truncated, success
            for i, row in enumerate(zip(*columns)):
                rows[i].append(row)
                if len(rows[i]) > LONGEST_EPISODE:
                    raise UsageError(
                        "no end of an episode in 100 000 steps; set max_episode_steps"
                    )
                if final[i]:
                    episode = dict(zip(names, (np.array(column) for column in zip(*rows[i]))))
                    # the action of the final row was ignored
                    played[i].append(
                        {k: v if "observations" in k else v[:-1] for k, v in episode.items()}
                    )
                    rows[i] = []
            keep = torch.as_tensor(~final, device=device).unsqueeze(-1)
            z, a_prev = z * keep, action * keep
            obs, final = next_obs, terminated | truncated
    return [episode for p, share in zip(played, shares) for episode in p[:share]]


def views(obs):
    """What the policy sees and what the critic sees of an observation: of a plain array, both all."""
    return (obs["policy"], obs["critic"]) if isinstance(obs, dict) else (obs, obs)


def returns(actor, env: gym.vector.VectorEnv, episodes: int, *seed: int) -> dict[str, float]:
    """Mean returns of `evaluate`, `return_deterministic` and `return_stochastic`, with `success_`
    of both where the environment reports it. `seed` is hashed: others have other episodes."""
    result, seed = {}, int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1)
    for mode in ("deterministic", "stochastic"):
        played = evaluate(actor, env, episodes, mode == "deterministic", seed)
        result[f"return_{mode}"] = float(np.mean([e["rewards"].sum() for e in played]))
        if "successes" in played[0]:
            result[f"success_{mode}"] = float(np.mean([e["successes"].any() for e in played]))
    return result
