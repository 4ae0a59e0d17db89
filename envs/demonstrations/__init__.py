"""Demonstrations of an expert: from a file, from Minari, or from those that lie beside this module.

A file is what `--save-demonstrations` of the scripts writes: an .npz with Minari's names. For
episodes of T steps, one after another, `observations` and `critic_observations` have T + 1 rows
each, `actions` (in the environment's units), `rewards`, `terminations` and `truncations` T rows;
`env_id` names the environment.
"""

import importlib.util
import zipfile
from pathlib import Path

import gymnasium as gym
import numpy as np

__all__ = ["load"]

FOLDER = Path(__file__).parent
STEPS = ("actions", "rewards", "terminations", "truncations")


def load(source: str | None, env: gym.Env, episodes: int | None = None) -> list[dict]:
    """Episodes of an expert, as the policy and the critic of `env` would have seen them.

    What the policy sees is taken from the expert's state wherever `env` hides a part of it. So an
    expert that saw velocities can be imitated by a policy that does not.

    Args:
        source: An .npz file; `minari:NAME` for a data set that Minari has on this machine; None for
            the file of this environment in this folder.
        env: An environment made by `envs.make`, wrapped further or not.
        episodes: How many to take, from the first; None for all.

    Returns:
        A dict of float32 arrays for each episode of T steps: `observations` [T + 1, O],
        `critic_observations` [T + 1, S], `actions` [T, A] in [-1, 1], and `rewards` [T]; bool
        arrays `terminations` and `truncations` [T].

    Raises:
        ValueError: The demonstrations cannot be read, are damaged, were made in another
            environment, do not fit what `env` shows, or are fewer than `episodes`.
    """
    env_id = env.unwrapped.spec.id
    if source is not None and source.startswith("minari:"):
        made_in, found = _from_minari(source.removeprefix("minari:"))
    else:
        path = FOLDER / f"{env_id}.npz" if source is None else Path(source)
        if source is None and not path.exists():
            shipped = ", ".join(sorted(file.stem for file in FOLDER.glob("*.npz")))
            raise ValueError(
                f"no demonstrations for {env_id} are shipped (there are some for {shipped}): name "
                "an .npz file or a Minari data set"
            )
        source = str(path)
        made_in, found = _from_file(path)
    if made_in is not None and made_in.split(":")[-1] != env_id:
        raise ValueError(f"{source} holds demonstrations of {made_in}, not of {env_id}")
    if episodes is not None and len(found) < episodes:
        raise ValueError(f"{source} holds {len(found)} episodes, and {episodes} are asked for")
    return [_fit(episode, env, source) for episode in found[:episodes]]


def _from_file(path):
    """The `env_id` and the episodes of an .npz file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except FileNotFoundError:
        raise ValueError(f"there are no demonstrations at {path}") from None
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged, or no .npz file") from error
    missing = {"observations", "critic_observations", "env_id", *STEPS} - arrays.keys()
    if missing:
        raise ValueError(f"{path} is no file of demonstrations: it lacks {sorted(missing)}")
    made_in = str(arrays["env_id"])
    steps = {name: arrays[name] for name in STEPS}
    both = {name: arrays[name] for name in ("observations", "critic_observations")}
    rows = len(steps["rewards"])
    if any(len(array) != rows for array in steps.values()):
        raise ValueError(f"{path} is damaged: its arrays are not of one length")
    ends = np.flatnonzero(steps["terminations"] | steps["truncations"]) + 1
    if not rows or ends.size == 0 or ends[-1] != rows:
        raise ValueError(f"{path} is damaged: its last episode does not end")
    if any(len(array) != rows + len(ends) for array in both.values()):
        raise ValueError(f"{path} is damaged: an episode of T steps has T + 1 observations")
    steps = {name: np.split(array, ends[:-1]) for name, array in steps.items()}
    starts = ends[:-1] + np.arange(1, len(ends))
    both = {name: np.split(array, starts) for name, array in both.items()}
    columns = steps | both
    return made_in, [dict(zip(columns, parts)) for parts in zip(*columns.values())]


def _from_minari(name):
    """The id of the environment, where it is known, and the episodes of a Minari data set."""
    if importlib.util.find_spec("minari") is None:
        raise ValueError('demonstrations of Minari need it: pip install "minari[hdf5]"')
    import minari

    try:
        data = minari.load_dataset(name)
        made_in = data.env_spec.id if data.env_spec is not None else None
        episodes = list(data.iterate_episodes())
    except Exception as error:  # Minari and its storage raise what they like
        raise ValueError(
            f"Minari cannot load {name!r} ({error}): minari list local shows what is here, "
            "minari download NAME gets more"
        ) from error
    found = []
    for episode in episodes:
        both = episode.observations
        if not isinstance(both, dict):
            both = {"policy": both, "critic": both}
        if not {"policy", "critic"} <= both.keys():
            raise ValueError(
                f"the observations of {name} are {sorted(both)}: they must be an array, or have "
                '"policy" and "critic"'
            )
        columns = {name: np.asarray(getattr(episode, name)) for name in STEPS}
        # an episode that was cut off is one that ran out of time
        columns["truncations"] = columns["truncations"].copy()
        columns["truncations"][-1] |= not columns["terminations"][-1]
        columns["observations"] = np.asarray(both["policy"])
        columns["critic_observations"] = np.asarray(both["critic"])
        found.append(columns)
    return made_in, found


def _fit(episode, env, source):
    """The episode as the policy and the critic of `env` would have seen it."""
    sizes = {name: env.observation_space[name].shape[0] for name in ("policy", "critic")}
    space, actions = env.unwrapped.action_space, episode["actions"]
    for name in ("observations", "critic_observations", "actions", "rewards"):
        array = episode[name]
        if array.ndim != 1 + (name != "rewards") or array.dtype.kind not in "fiu":
            raise ValueError(f"{source} is damaged: {name} is no array of numbers of its shape")
        if not np.isfinite(array).all():
            raise ValueError(f"{source} is damaged: {name} holds values that are not finite")
    if actions.shape[1:] != space.shape:
        raise ValueError(
            f"{source} has actions of {actions.shape[1]} values, and the environment's have "
            f"{space.shape[0]}"
        )

    policy, critic = episode["observations"], episode["critic_observations"]
    visible = _visible(env)
    if visible is not None and critic.shape[1] == visible.size:
        policy = critic[:, visible]
    if not env.get_wrapper_attr("critic_sees_more"):
        critic = policy
    for name, seen in (("policy", policy), ("critic", critic)):
        if seen.shape[1] != sizes[name]:
            raise ValueError(
                f"{source} has observations of {episode['observations'].shape[1]} and states of "
                f"{episode['critic_observations'].shape[1]} values, from which what the {name} "
                f"sees, {sizes[name]} values, cannot be had"
            )
    return dict(
        observations=policy.astype(np.float32),
        critic_observations=critic.astype(np.float32),
        actions=(2 * (actions - space.low) / (space.high - space.low) - 1).astype(np.float32),
        rewards=episode["rewards"].astype(np.float32),
        terminations=episode["terminations"].astype(bool),
        truncations=episode["truncations"].astype(bool),
    )


def _visible(env):
    """What the policy sees of the whole state, a bool mask; None where that is not known."""
    try:
        return env.get_wrapper_attr("visible")
    except AttributeError:
        return None
