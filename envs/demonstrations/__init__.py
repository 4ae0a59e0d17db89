"""Demonstrations of an expert: from a file, from Minari, or from those that lie beside this module.

A file is what `save` writes: an .npz with Minari's names. For episodes of T steps, one after
another, `observations` and `critic_observations` have T + 1 rows each, `actions` (in the
environment's units), `rewards`, `terminations` and `truncations` T rows; `env_id` names the
environment, and `made_by` (JSON) holds the options of the script, and the returns.
"""

import importlib.util
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np

from envs.errors import UsageError
from envs.mujoco import RandomBodies, Wind
from envs.vector import literals
from envs.wrappers import PolicyAndCritic, Split, UnitActions, find_wrapper

__all__ = ["load", "rows", "save"]

FOLDER = Path(__file__).parent
SHIPPED = {None: "{}.npz", "shipped:stochastic": "{}-stochastic.npz"}
DIMENSIONS = dict(
    observations=2, critic_observations=2, actions=2, rewards=1, terminations=1, truncations=1
)
FLAGS = ("terminations", "truncations")
SAME_TASK = ("render_mode", "max_episode_steps", "disable_env_checker")  # with these or others


def load(source: str | None, env: gym.Env, episodes: int | None = None) -> list[dict]:
    """Episodes of an expert, as the policy and the critic of `env` would have seen them.

    What the policy sees is taken from the expert's state wherever `env` hides a part of it. So an
    expert that saw velocities can be imitated by a policy that does not. A file without the whole
    state is taken as it is: that it hides what `env` hides is for you to know.

    Args:
        source: An .npz file; `minari:NAME` for a data set that Minari has on this machine; None for
            the file of this environment in this folder, `shipped:stochastic` for that of an
            expert with noise.
        env: An environment made by `envs.make`, wrapped further or not, or by `envs.make_vec`.
        episodes: How many to take, from the first; None for all.

    Returns:
        A dict of float32 arrays for each episode of T steps: `observations` [T + 1, O],
        `critic_observations` [T + 1, S], `actions` [T, A] in [-1, 1], and `rewards` [T]; bool
        arrays `terminations` and `truncations` [T].

    Raises:
        UsageError: The demonstrations cannot be read, are damaged, were made in another
            environment or a variant of it (`env_kwargs`), do not fit what `env` shows, or are fewer
            than `episodes`.
    """
    env = _one(env)
    env_id, options = env.unwrapped.spec.id, None
    if source is not None and source.startswith("minari:"):
        made_in, found = _from_minari(source.removeprefix("minari:"), episodes)
    else:
        shipped = SHIPPED.get(source)
        path = Path(source) if shipped is None else FOLDER / shipped.format(env_id)
        if shipped is not None and not path.exists():
            names = ", ".join(sorted(file.stem for file in FOLDER.glob("*.npz")))
            raise UsageError(
                f"no demonstrations for {path.stem} are shipped (there are some for {names}): name "
                "an .npz file or a Minari data set"
            )
        source = str(path)
        made_in, options, found = _from_file(path)
    if made_in is not None and made_in.split(":")[-1] != env_id:
        raise UsageError(f"{source} holds demonstrations of {made_in}, not of {env_id}")
    here = there = _variant(env)
    if options is not None and "env_kwargs" in options:
        there = _variant_of(options, env_id)
    if here != there:
        raise UsageError(f"{source} was made with env_kwargs {there}, and here they are {here}")
    if not found:
        raise UsageError(f"{source} holds no episodes")
    if episodes is not None and not 1 <= episodes <= len(found):
        raise UsageError(f"{source} holds {len(found)} episodes, and {episodes} are asked for")
    return [_fit(episode, env, source) for episode in found[:episodes]]


def rows(episodes: list[dict], num_envs: int = 1) -> Iterator[list[np.ndarray]]:
    """The episodes of `load`, as `num_envs` environments stepped together would hand them out.

    An episode of T steps is T + 1 rows; the last holds the final observation, and its action and
    reward are zeros. All rows in sequence are cut into `num_envs` pieces of equal length.

    Yields:
        observations [N, O], critic_observations [N, S], actions [N, A], rewards, terminations and
        `first`, whether the row begins an episode, [N].
    """
    names, parts = ("observations", "critic_observations", "actions", "rewards", "terminations"), []
    for episode in episodes:
        length = len(episode["observations"])
        columns = [episode[name] for name in names]
        columns = [np.concatenate([x, np.zeros_like(x[: length - len(x)])]) for x in columns]
        parts.append([*columns, np.arange(length) == 0])
    columns = [np.concatenate(column) for column in zip(*parts)]
    steps = len(columns[0]) // num_envs
    for t in range(steps):
        yield [column[t : steps * num_envs : steps] for column in columns]


def save(path: str, episodes: list[dict], env: gym.Env, made_by: dict):
    """Write episodes of `envs.evaluate` in `env` to an .npz file, whole or not at all.

    Args:
        path: FILE.npz, in a folder that there is.
        episodes: Their actions lie in [-1, 1].
        env: As in `load`.
        made_by: The options of the script and of the run, as JSON takes them; the `env_kwargs`
            among them are those of `env`.

    Raises:
        UsageError: The file cannot be written.
    """
    env = _one(env)
    arrays = {k: np.concatenate([episode[k] for episode in episodes]) for k in episodes[0]}
    arrays["actions"] = _actions(env).action(arrays["actions"])
    made_by = made_by | dict(returns=[float(episode["rewards"].sum()) for episode in episodes])
    names = dict(env_id=env.unwrapped.spec.id, made_by=json.dumps(made_by))
    if Path(path).suffix != ".npz":
        raise UsageError(f"demonstrations are written to a FILE.npz, not to {path}")
    try:
        with open(f"{path}.tmp", "wb") as file:
            np.savez_compressed(file, **arrays, **names)
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        Path(f"{path}.tmp").unlink(missing_ok=True)


def _from_file(path):
    """The `env_id`, the options of the script that made it, or None, and the episodes of a file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except FileNotFoundError:
        raise UsageError(f"there are no demonstrations at {path}") from None
    except Exception as error:  # numpy, zipfile and zlib raise what they like
        raise UsageError(f"{path} is damaged, or no .npz file") from error
    missing = {"env_id", *DIMENSIONS} - arrays.keys()
    if missing:
        raise UsageError(f"{path} is no file of demonstrations: it lacks {sorted(missing)}")
    columns = _columns(arrays, path)
    ends = np.flatnonzero(columns["terminations"] | columns["truncations"]) + 1
    steps = len(columns["actions"])
    if steps == 0 or ends.size == 0 or ends[-1] != steps:
        raise UsageError(f"{path} is damaged: its last episode does not end")
    if len(columns["observations"]) != steps + len(ends):
        raise UsageError(f"{path} is damaged: an episode of T steps has T + 1 observations")
    starts = dict.fromkeys(DIMENSIONS, ends[:-1])
    starts |= dict.fromkeys(
        ("observations", "critic_observations"), ends[:-1] + np.arange(1, len(ends))
    )
    parts = [np.split(column, starts[name]) for name, column in columns.items()]
    try:
        options = dict(json.loads(str(arrays["made_by"]))) if "made_by" in arrays else None
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path} is damaged: made_by is no JSON object") from error
    episodes = [dict(zip(columns, episode)) for episode in zip(*parts)]
    return str(arrays["env_id"]), options, episodes


def _from_minari(name, episodes):
    """The id of the environment, where it is known, and the first `episodes` of a data set."""
    if importlib.util.find_spec("minari") is None:
        raise UsageError('demonstrations of Minari need it: pip install "minari[hdf5]"')
    import minari

    try:
        data = minari.load_dataset(name)
        made_in = data.env_spec.id if data.env_spec is not None else None
        found = list(itertools.islice(data.iterate_episodes(), episodes))
    except Exception as error:  # Minari and its storage raise what they like
        raise UsageError(
            f"Minari cannot load {name!r} ({error}): minari list local shows what is here, "
            "minari download NAME gets more"
        ) from error
    return made_in, [_minari_columns(episode, name) for episode in found]


def _minari_columns(episode, source):
    """The columns of an episode of Minari; one that was cut off counts as out of time."""
    both = episode.observations
    if not isinstance(both, dict):
        both = {"policy": both, "critic": both}
    if not {"policy", "critic"} <= both.keys():
        raise UsageError(
            f"the observations of {source} are {sorted(both)}: they must be an array, or have "
            '"policy" and "critic"'
        )
    columns = dict(observations=both["policy"], critic_observations=both["critic"])
    columns |= {name: getattr(episode, name) for name in DIMENSIONS.keys() - columns.keys()}
    columns = _columns(columns, source)
    columns["truncations"][-1:] |= ~columns["terminations"][-1:]
    return columns


def _columns(arrays, source):
    """The arrays in `DIMENSIONS`, float32 and bool, finite, and as long as they should be."""
    columns = {}
    for name, dimensions in DIMENSIONS.items():
        array = np.array(arrays[name]) if np.shape(arrays[name]) else np.zeros(())
        if array.ndim != dimensions or array.dtype.kind not in "biuf":
            raise UsageError(f"{source} is damaged: {name} is no array of numbers of its shape")
        with np.errstate(over="ignore"):
            columns[name] = array.astype(bool if name in FLAGS else np.float32)
        if not np.isfinite(columns[name]).all():
            raise UsageError(f"{source} is damaged: {name} holds values that are not finite")
    of_steps = {len(columns[name]) for name in ("actions", "rewards", *FLAGS)}
    of_rows = {len(columns[name]) for name in ("observations", "critic_observations")}
    if len(of_steps) > 1 or len(of_rows) > 1:
        raise UsageError(f"{source} is damaged: its arrays are not of one length")
    return columns


def _fit(episode, env, source):
    """The episode as the policy and the critic of `env` would have seen it."""
    policy, critic = episode["observations"], episode["critic_observations"]
    unit, actions = _actions(env), episode["actions"]
    if find_wrapper(env, PolicyAndCritic) is None:
        raise UsageError("demonstrations need an environment of envs.make or envs.make_vec")
    if len(actions) == 0 or len(policy) != len(actions) + 1:
        raise UsageError(f"{source} is damaged: an episode of T steps has T + 1 observations")
    if actions.shape[1:] != unit.action_space.shape:
        raise UsageError(
            f"{source} has actions of {actions.shape[1]} values, and the environment's have "
            f"{unit.action_space.shape[0]}"
        )
    visible = _visible(env)
    seen = dict(policy=policy, critic=critic)
    if visible is not None and critic.shape[1] == visible.size:
        seen["policy"] = critic[:, visible]
    if not env.get_wrapper_attr("critic_sees_more"):
        seen["critic"] = seen["policy"]
    for name, values in seen.items():
        size = env.observation_space[name].shape[0]
        if values.shape[1] != size:
            raise UsageError(
                f"{source} has observations of {policy.shape[1]} and states of {critic.shape[1]} "
                f"values, from which what the {name} sees, {size} values, cannot be had"
            )
    return episode | dict(
        observations=seen["policy"], critic_observations=seen["critic"],
        actions=unit.reverse(actions),
    )  # fmt: skip


def _one(env):
    """The environment itself, or the first of a vector environment."""
    return env.envs[0] if isinstance(env, gym.vector.VectorEnv) else env


def _actions(env):
    """The unit of the actions of `env` as `gymnasium.make` returned it, whatever wraps it now."""
    return UnitActions(find_wrapper(env, PolicyAndCritic) or env.unwrapped)


def _variant(env):
    """What makes `env` another task than its id says: arguments of `envs.make`."""
    wrappers, spec = dict(wind=Wind, random_bodies=RandomBodies), env.unwrapped.spec
    options = {name: find_wrapper(env, kind) is not None for name, kind in wrappers.items()}
    return _variant_of(options | dict(env_kwargs=spec.kwargs), spec.id)


def _variant_of(options, env_id):
    """The same of the options of a script; those of older files name wind and bodies themselves.

    As JSON has it, where a tuple is a list.
    """
    older = {name: options[name] for name in ("wind", "random_bodies") if name in options}
    usual = gym.spec(env_id).kwargs | dict(wind=False, random_bodies=False)
    chosen = {
        name: value
        for name, value in (older | literals(options["env_kwargs"])).items()
        if name not in SAME_TASK and (name, value) not in usual.items()
    }
    return json.loads(json.dumps(chosen, default=str))


def _visible(env):
    """What the policy sees of the whole state, a bool mask; None where that is not known."""
    split = find_wrapper(env, Split)
    return None if split is None else split.visible
