"""The scripts as their users run them. What is one text in all of them is tested on s2pg_sac."""

import dataclasses
import functools
import importlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_demonstrations import Chance
from torch.utils._pytree import tree_leaves

import envs
import envs.demonstrations
import evaluate
import s2pg_sac

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
OFF_POLICY = ["s2pg_sac", "bptt_sac", "s2pg_td3", "s2pg_lsiq", "flow_sac", "rp_pgm"]
ON_POLICY = ["s2pg_ppo", "bptt_ppo", "s2pg_gail"]
EACH = pytest.mark.parametrize("script", OFF_POLICY + ON_POLICY)
BOTH = pytest.mark.parametrize("script", ["s2pg_sac", "s2pg_ppo"])  # two texts of `train`

# five steps an episode, a few updates, one evaluation
TASK = dict(env_id="CueRecall-v0", env_kwargs=dict(horizon=5), eval_episodes=2, total_timesteps=60)
QUICK = {name: dict(learning_starts=20, batch_size=16, buffer_size=1000) for name in OFF_POLICY}
QUICK |= {name: dict(num_steps=18, num_minibatches=3, update_epochs=2) for name in ON_POLICY}


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("demonstrations") / "chance.npz")
    env = envs.make_vec("CueRecall-v0", horizon=5)
    made_by = dict(env_kwargs=dict(horizon=5))
    envs.demonstrations.save(path, envs.evaluate(Chance(1, 1), env, 2, False, 0), env, made_by)
    return path


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, demonstrations):
    """Each test in a folder of its own, and with the signals as they were."""
    monkeypatch.chdir(tmp_path)
    for name in "s2pg_gail", "s2pg_lsiq":
        monkeypatch.setitem(QUICK[name], "demonstrations", demonstrations)
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def module(script):
    return importlib.import_module(script)


def arguments(script, **options):
    return module(script).Args(**TASK | QUICK[script] | options)


def train(script="s2pg_sac", **options):
    """Train in this process; returns the folder of the run."""
    before = set(Path("runs").glob("*"))
    module(script).train(arguments(script, **options))
    (run,) = set(Path("runs").glob("*")) - before or [Path(options["resume"])]
    return run


def command(script, **options):
    """The command line of a script on small settings."""
    words = [sys.executable, str(ROOT / f"{script}.py")]
    for name, value in (TASK | QUICK[script] | options).items():
        values = [x for item in value.items() for x in item] if isinstance(value, dict) else [value]
        words += ["--" + name.replace("_", "-"), *(str(x) for x in values if x is not True)]
    return words


def parse(monkeypatch, *options, script="s2pg_sac"):
    monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
    return module(script).parse_args()


def logged(run):
    """Steps and values under each tag."""
    events = EventAccumulator(str(run)).Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    return {tag: ([e.step for e in s], [e.value for e in s]) for tag, s in scalars.items()}


def load(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def watch(monkeypatch, script, name, see):
    """Call `see(args, result)` after each call of that method of the agents that `train` makes."""
    make = module(script).Agent

    def watched(*args):
        agent = make(*args)
        method = getattr(agent, name)

        def call(*args):
            result = method(*args)
            see(args, result)
            return result

        setattr(agent, name, call)
        return agent

    monkeypatch.setattr(module(script), "Agent", watched)


@pytest.fixture
def events(monkeypatch):
    """What the environments of s2pg_sac and s2pg_ppo were told and what they showed, in order."""
    kept = []

    def watched(make, *args):
        env = make(*args)
        reset, step = env.reset, env.step
        env.reset = lambda seed: kept.append(("reset", seed, *reset(seed=seed))) or kept[-1][2:]
        env.step = lambda action: kept.append(("step", action, *step(action))) or kept[-1][2:]
        return env

    for script in map(module, OFF_POLICY + ON_POLICY):
        make_env = functools.partial(watched, script.make_env)
        monkeypatch.setattr(script, "make_env", make_env)
    return kept


# A run from its beginning to its end --------------------------------------------------------------


@EACH
def test_what_a_run_shows_saves_and_logs_also_when_it_is_resumed(script, monkeypatch, capsys):
    run = train(script)
    assert torch.tensor([1e-38]) / 1000 == 0  # Adam's moments decay to such numbers
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == f"python evaluate.py {run}"
    assert "step 60: return_deterministic" in out and "60/60" in err
    args = json.loads((run / "args.json").read_text())
    assert args["env_kwargs"] == [["horizon", 5]] and args["script"] == f"{script}.py"

    options = "--resume", run, "--total-timesteps", 120, "--checkpoint-frequency", 30
    module(script).train(parse(monkeypatch, *options, script=script))
    assert list(Path("runs").iterdir()) == [run] and load(run)["global_step"] == 120
    tags = logged(run)
    for name in "return_deterministic", "return_stochastic":
        assert tags[f"eval/{name}"][0] == [60, 120]
    steps, returns = tags["charts/episodic_return"]
    assert steps == list(range(5, 121, 5)) and all(-5 < value <= 5 for value in returns)
    # each 100 steps; three rollouts of 18 rows hold 15 steps each, and a fourth is not full
    every = [100] if script in OFF_POLICY else [15, 30, 45, 75, 90, 105]
    losses = [steps for tag, (steps, _) in tags.items() if tag.startswith("losses/")]
    assert losses == [every] * len(losses) and len(losses) >= 3
    documented = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    named = {re.sub(r"gradient_\d+", "gradient_k", tag) for tag in tags}
    assert {tag for tag in named if f"`{tag}`" not in documented} == set()


def test_what_the_docs_say_is_logged_is_logged():
    scripts = "".join(script.read_text() for script in ROOT.glob("*.py"))
    for page in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"`losses/(\w+)`", page.read_text()):
            assert re.search(rf'["/]{name}"|\b{name}=', scripts), f"{page.name}: {name}"


# every option with a value that is not the usual one; together where they have naught in common
HOPPER = dict(env_id="Hopper-v5", env_kwargs=dict(random_bodies=True, wind=True))
OPTIONS = dict(
    s2pg_sac=[
        dict(rnn="lstm", sobolev=1, num_envs=3, save_buffer=True, eval_frequency=25),
        dict(rnn="rnn", sobolev=0.1, privileged_critic=False, alpha_lr=0, alpha_z_lr=0),
        dict(memoryless=True, env_id="PointMassDoor-v0", env_kwargs={}, eval_episodes=1),
        dict(chrono=20, hide="positions", **HOPPER),
    ],
    bptt_sac=[
        dict(loss_on="last", sequence_length=3, rnn="rnn", num_envs=3, save_buffer=True),
        dict(sequence_length=1, privileged_critic=False, alpha_lr=0),
        dict(initial_state="zero", rnn="lstm", chrono=20),
    ],
    s2pg_td3=[
        dict(rnn="lstm", policy_frequency=1, num_envs=3),
        dict(rnn="rnn", privileged_critic=False, policy_frequency=3, save_buffer=True),
        dict(memoryless=True) | dict.fromkeys(
            ("exploration_noise", "exploration_noise_z", "policy_noise", "noise_clip"), 0
        ),
    ],
    bptt_ppo=[
        dict(rnn="lstm", sequence_length=3, privileged_critic=True, num_envs=3),
        dict(rnn="rnn", sequence_length=1, num_minibatches=50, num_steps=50),
        dict(num_steps=2, num_minibatches=1),
    ],
    s2pg_lsiq=[
        dict(rnn="lstm", loss="iq_like", num_envs=3, demonstration_episodes=1, save_buffer=True),
        dict(expert_target="bootstrap", regularizer=0.1, absorbing=False, privileged_critic=False),
        dict(memoryless=True),
    ],
    s2pg_gail=[
        dict(rnn="lstm", reward="airl", absorbing=False, num_envs=3, demonstration_episodes=1),
        dict(privileged_critic=False, discriminator_steps=2, discriminator_entropy=0, num_steps=60),
        dict(memoryless=True),
        dict(separate_ratios=True),
    ],
    flow_sac=[
        dict(velocity="flow_t", critic="crossq", policy_frequency=3, num_envs=3, adam_beta1=0.5),
        dict(velocity="mlp", state_dim=4, privileged_critic=False, save_buffer=True),
        dict(velocity="none", alpha_lr=0, flow_steps=1),
    ],
    rp_pgm=[
        dict(estimator="dr", horizon=5, model_updates=2, spectral_norm="none", num_envs=3),
        dict(estimator="model-free", model_updates=0, warmup_steps=0, save_buffer=True),
        dict(sn_layers="all", sn_coef=0.5, depth=0, warmup_steps=0, entropy_end=-2),
    ],
    s2pg_ppo=[
        dict(rnn="lstm", privileged_critic=True, anneal_lr=False, norm_adv=False, num_envs=3),
        dict(rnn="rnn", ent_coef=0.1, num_steps=2, num_minibatches=1),
        dict(target_kl=0.0, separate_ratios=True),
        dict(memoryless=True, num_steps=60, update_epochs=1),
    ],
)  # fmt: skip


@pytest.mark.parametrize("script, options", [(s, o) for s in OPTIONS for o in OPTIONS[s]])
def test_every_option_trains_saves_and_loads(script, options):
    run = train(script, **options)
    train(script, **options, resume=str(run), total_timesteps=120)
    assert load(run)["global_step"] >= 120
    evaluate.main(evaluate.Options(run, episodes=1))


@BOTH
def test_a_seed_decides_the_run_and_evaluation_does_not_disturb_it(script):
    weights = [
        load(train(script, **options))["agent"]
        for options in (dict(seed=3, eval_frequency=0), dict(seed=3, eval_frequency=20), dict())
    ]
    assert same(weights[0], weights[1]) and not same(weights[0], weights[2])


def test_runs_and_evaluations_have_environments_of_their_own(events):
    """Environment i has the seed of the first + i."""
    for seed in (1, 2):
        run = train(seed=seed, num_envs=2, eval_frequency=20)
        train(seed=seed, num_envs=2, resume=str(run), total_timesteps=90, eval_frequency=0)
    # an evaluation plays the same episodes twice
    seeds = sorted({event[1] for event in events if event[0] == "reset"})
    assert len(seeds) == 2 * (2 + 3) and np.diff(seeds).min() > 8


def test_tracking_names_the_run_and_without_wandb_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises((ModuleNotFoundError, SystemExit), match="wandb"):
        train(track=True)
    told = []
    wandb = types.SimpleNamespace(init=lambda **options: told.append(options))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = train(track=True, eval_frequency=0)
    train(track=True, eval_frequency=0, resume=str(run), total_timesteps=90)
    with FileLock(run / "lock"), pytest.raises(SystemExit, match="another process trains"):
        train(track=True, eval_frequency=0, resume=str(run), total_timesteps=120)
    assert len(told) == 2  # a process that is refused tells it nothing
    for options in told:  # a resumed run goes on under its own name
        assert options["id"] == run.name[-64:] and options["resume"] == "allow"
        assert options["sync_tensorboard"] and options["config"]["env_kwargs"] == [("horizon", 5)]


@pytest.mark.parametrize("num_envs", [1, 3])
@BOTH
def test_each_episode_is_logged_at_its_own_step(script, num_envs):
    """Environments that finish together do not overwrite one another; autoreset is no step."""
    run = train(script, num_envs=num_envs, eval_frequency=0)
    steps, lengths = logged(run)["charts/episodic_length"]
    assert len(steps) == len(set(steps)) == 60 // 5
    assert set(lengths) == {5} and max(steps) == 60


def test_seconds_are_those_of_training_alone_and_go_on_in_a_resumed_run(monkeypatch):
    evaluations = []

    def evaluate_for_a_week(*args):
        assert list(Path().glob("runs/*/checkpoint.pt"))  # in case that it fails
        evaluations.append(args)

    def clock():
        return time.time() + 604_800 * len(evaluations)

    monkeypatch.setattr(envs.Together, "score", evaluate_for_a_week)
    monkeypatch.setattr(s2pg_sac, "time", types.SimpleNamespace(time=clock))
    options = dict(checkpoint_frequency=20, eval_frequency=20)
    run = train(total_timesteps=40, **options)
    assert len(evaluations) == 2 and 0 < load(run)["seconds"] < 600
    torch.save(load(run) | dict(seconds=7200.0), run / "checkpoint.pt")
    train(total_timesteps=120, **options, resume=str(run))
    assert len(evaluations) == 6 and 7200 < load(run)["seconds"] < 7800
    (step,), (speed,) = logged(run)["charts/SPS"]
    assert step == 100 and 100 / 7800 < speed < 100 / 7200
    steps, seconds = logged(run)["charts/seconds"]
    assert steps == [20, 40, 60, 80, 100, 120] and seconds == sorted(seconds)


# What happens in a row ----------------------------------------------------------------------------


@pytest.mark.parametrize("script", OFF_POLICY)
def test_the_buffer_holds_what_the_environments_showed(script, events, monkeypatch):
    """To the policy and to the critic, across episodes; and what it gave for the actions there,
    and the internal state before them. An episode that is out of time has not terminated. LSIQ
    stores no reward, RP-PGM one view."""
    kind = dict(bptt_sac="SequenceBuffer", rp_pgm="SegmentBuffer").get(script, "TransitionBuffer")
    buffers, acted, make = [], [], getattr(module(script), kind)
    monkeypatch.setattr(make, "refresh", lambda *_: None, raising=False)
    watch(monkeypatch, script, "act", lambda args, _: acted.append(args[1:3]))
    monkeypatch.setattr(
        module(script), kind, lambda *args: buffers.append(make(*args)) or buffers[-1]
    )
    task = dict(env_id="InvertedPendulum-v4", env_kwargs=dict(max_episode_steps=6))
    task |= dict(hide="velocities", num_envs=2, learning_starts=70, total_timesteps=80)
    task |= dict(demonstrations=None) if script == "s2pg_lsiq" else {}
    train(script, **task, eval_frequency=0)
    buffer, ends = buffers[0], []
    (_, _, obs, _), *steps = events
    assert buffer.steps == len(steps) >= 40
    first, final = np.ones(2), np.zeros(2)
    for row, (_, action, next_obs, reward, terminated, truncated, _) in enumerate(steps):
        columns = list(buffer.rows[2 * row : 2 * row + 2].split(buffer.widths, -1))
        shown = [obs["policy"], obs["critic"], action, reward, terminated, first]
        if script == "rp_pgm":
            del shown[1]
        else:  # what the policy was told; of each environment as its own episode begins, zeros
            z, a_prev = acted[row]
            shown.insert(2, z)
            assert np.array_equal(a_prev.any(-1), 1 - first)
        if script == "s2pg_lsiq":
            shown[4] = 0 * reward
        for value, column in zip(shown, columns, strict=True):
            assert np.array_equal(np.asarray(value, np.float32).reshape(column.shape), column)
        assert action[0] != action[1]  # also where it is random
        ends += [*terminated, *(2 * (truncated & ~terminated))]
        first, final, obs = final, terminated | truncated, next_obs
    assert {1, 2} <= set(map(int, ends)) and 4 < buffer.rows[:, -1].sum() < 40


@pytest.mark.parametrize("script", [s for s in OFF_POLICY + ON_POLICY if s != "rp_pgm"])
def test_the_policy_is_told_its_last_action_and_internal_state(script, events, monkeypatch):
    """And zeros as an episode begins: one of T steps fills T + 1 rows. All but the first actions
    of off-policy scripts are those of the policy."""
    acted = []
    watch(monkeypatch, script, "act", lambda args, result: acted.append((*args[-2:], *result)))
    options = dict(num_steps=60) if script in ON_POLICY else {}
    options |= dict(state_dim=4) if script == "flow_sac" else {}
    train(script, eval_frequency=0, **options)
    if script in ON_POLICY:
        del acted[60]  # for the value of the row after it
    played = [torch.tensor(event[1]) for event in events if event[0] == "step"]
    assert len(played) == 71  # 60 steps and 11 final rows
    for row, (z, a_prev, action, *_) in enumerate(acted[:71]):
        fresh = row % 6 == 0
        # z' comes after the action; on-policy scripts give density and value, too
        last_z, last_action = acted[row - 1][3], played[row - 1]
        assert torch.equal(z, 0 * z if fresh else last_z) and (fresh or z.any())
        assert torch.equal(a_prev, 0 * a_prev if fresh else last_action) and (fresh or a_prev.any())
        same_action = torch.equal(played[row], action[:, :1].clamp(-1, 1))
        assert same_action == (script in ON_POLICY or row >= 20 + 3)
    random = torch.cat(played[:23])
    assert random.abs().max() <= 1 and random.min() < -0.5 and random.max() > 0.5


def test_updates_come_between_the_action_and_the_step_and_are_counted_by_steps(events, monkeypatch):
    """A card works on them while the environment steps, and the action does not wait for them."""
    for name in "act", "update":
        watch(monkeypatch, "s2pg_sac", name, lambda *args, name=name: events.append((name,)))
    train(num_envs=3, learning_starts=12, total_timesteps=60, eval_frequency=0)
    names = [event[0] for event in events]
    # three for each step of three environments, none in the row that ends three episodes
    rows = " ".join(names).replace("update update update", "learn").split(" act ")
    assert rows[0] == "reset" and set(rows[1:]) == {"step", "learn step"}
    learning = [row == "learn step" for row in rows[1:]]
    assert learning == [row >= 4 and row % 6 != 0 for row in range(len(learning))]


def test_a_flow_has_one_update_of_its_critic_for_each_step(monkeypatch):
    updates = []
    watch(monkeypatch, "flow_sac", "update", lambda *args: updates.append(1))
    train("flow_sac", policy_frequency=3, eval_frequency=0)
    assert len(updates) == (60 - 20) // 3


# Stopped, saved and resumed -----------------------------------------------------------------------


def test_a_killed_run_resumes():
    options = dict(total_timesteps=10**6, checkpoint_frequency=50, save_buffer=True)
    process = subprocess.Popen(command("s2pg_sac", **options), stderr=subprocess.PIPE, text=True)
    while not list(Path().glob("runs/*/checkpoint.pt")) and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    _, err = process.communicate(timeout=60)
    (run,) = Path("runs").iterdir()
    step = load(run)["global_step"]
    assert process.returncode == -signal.SIGKILL and "Warning" not in err and step >= 50
    train(resume=str(run), save_buffer=True, eval_frequency=0, total_timesteps=step + 15)
    assert load(run)["global_step"] == step + 15


@pytest.mark.parametrize(
    "script, signum",
    [("s2pg_sac", "SIGINT"), ("s2pg_sac", "SIGTERM"), ("s2pg_sac", "SIGHUP"),
     ("s2pg_ppo", "SIGTERM"), ("s2pg_ppo", "SIGINT"), ("s2pg_gail", "SIGTERM")],
)  # fmt: skip
def test_a_stopped_run_saves_says_how_to_go_on_and_goes_on(script, signum, monkeypatch, capsys):
    signum = getattr(signal, signum)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        watch(patch, script, "update", lambda *args: signal.raise_signal(signum))
        train(script, total_timesteps=10**6, eval_frequency=0)
    (run,) = Path("runs").iterdir()
    before = load(run)
    step = before["global_step"]
    assert stopped.value.code == 128 + signum
    last_line = capsys.readouterr().out.splitlines()[-1]
    shown = step if script == "s2pg_sac" else step + 1  # a row after the update that is saved
    assert last_line == f"stopped at step {shown}; go on with --resume {run}"
    train(script, resume=str(run), eval_frequency=0, total_timesteps=step + 60)
    after = load(run)
    assert after["global_step"] == step + 60 and not same(before["agent"], after["agent"])
    updates = [state["optimizers"][0]["state"][0]["step"] for state in (before, after)]
    assert 0 < updates[0] < updates[1]


def test_a_run_stopped_in_its_last_rollout_which_is_not_full_goes_on_to_its_end(monkeypatch):
    """Though no update is left to be done."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        watch(patch, "s2pg_ppo", "update", lambda *args: signal.raise_signal(signal.SIGTERM))
        train("s2pg_ppo", total_timesteps=25)
    (run,) = Path("runs").iterdir()
    assert 25 - QUICK["s2pg_ppo"]["num_steps"] < load(run)["global_step"] < 25
    train("s2pg_ppo", resume=str(run), total_timesteps=25)
    assert load(run)["global_step"] == 25 and logged(run)["eval/return_stochastic"][0][-1] == 25


@pytest.mark.parametrize("save_buffer", [False, True])
def test_a_resumed_run_learns_when_its_buffer_is_filled(save_buffer, monkeypatch):
    """At once if it was saved; else after `learning_starts` steps of the policy."""
    run, rows, first = train(save_buffer=save_buffer), [], 60 if save_buffer else 80
    options = dict(save_buffer=save_buffer, resume=str(run), eval_frequency=0)
    begun = 60 + 11 if save_buffer else 0  # the row in which the resumed run begins an episode

    def see(args, _):
        rows.append(int(args[0].steps))
        assert args[0].rows[begun, -1] == 1

    watch(monkeypatch, "s2pg_sac", "update", see)
    monkeypatch.setattr(torch, "rand_like", lambda x: 1 / 0)  # random actions
    says = "" if save_buffer else "no update before step 80: "
    for steps in (60, first):
        with pytest.raises(SystemExit, match=says + "raise --total-timesteps"):
            train(**options, total_timesteps=steps)
    train(**options, total_timesteps=first + 2)
    # rows, with those that end an episode; the first update comes a row later
    assert rows[0] == (60 + 11 + 1 if save_buffer else 20 + 3) and load(run)["global_step"] > first


def test_a_saved_buffer_counts_the_rows_of_every_environment(monkeypatch):
    """23 rows of three environments are 69, more than the 40 of `learning_starts`."""
    options = dict(num_envs=3, learning_starts=40, save_buffer=True, eval_frequency=0)
    run, rows = train(**options), []
    watch(monkeypatch, "s2pg_sac", "update", lambda args, _: rows.append(int(args[0].steps)))
    train(**options, resume=str(run), total_timesteps=90)
    assert rows[0] == 23 + 1


@BOTH
def test_what_was_logged_after_the_checkpoint_is_not_shown_twice(script):
    """A killed run has logged more than it has saved. At the step that it saved nothing is lost."""
    run = train(script)
    torch.save(load(run) | dict(global_step=40), run / "checkpoint.pt")
    train(script, resume=str(run), total_timesteps=80)
    tags = logged(run)
    assert tags["charts/episodic_return"][0] == list(range(5, 81, 5))
    assert tags["eval/return_stochastic"][0] == [80]


def test_a_resumed_run_stopped_before_its_first_update_keeps_its_step(monkeypatch):
    run = train("s2pg_ppo", eval_frequency=0)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        watch(patch, "s2pg_ppo", "act", lambda *args: signal.raise_signal(signal.SIGTERM))
        train("s2pg_ppo", resume=str(run), total_timesteps=120)
    assert load(run)["global_step"] == 60


def test_threads_and_precision_are_as_asked_for(monkeypatch):
    set_to = {}
    for name in "set_num_threads", "set_float32_matmul_precision":
        monkeypatch.setattr(torch, name, lambda value, name=name: set_to.update({name: value}))
    train(num_threads=3, matmul_precision="high", eval_frequency=0)
    assert set_to == dict(set_num_threads=3, set_float32_matmul_precision="high")


def test_a_resumed_run_does_not_clone_again(monkeypatch):
    run = train("s2pg_gail", bc_steps=2)
    assert logged(run)["losses/bc_loss"][0] == [0]
    assert logged(run)["eval/return_stochastic"][0] == [0, 60]
    monkeypatch.delattr(module("s2pg_gail").Agent, "clone_behaviour")
    train("s2pg_gail", bc_steps=2, resume=str(run), total_timesteps=90)
    assert load(run)["global_step"] == 90


@BOTH
def test_losses_that_blow_up_stop_the_run_and_spare_the_checkpoint(script):
    rates = ["actor_lr", "critic_lr"] if script == "s2pg_sac" else ["learning_rate"]
    options = dict.fromkeys(rates, 1e38) | dict(checkpoint_frequency=15, total_timesteps=1000)
    with pytest.raises(SystemExit, match="not finite") as exit_info:
        train(script, **options)
    (run,) = Path("runs").iterdir()
    assert str(run) in exit_info.value.code
    assert all(value.isfinite().all() for value in load(run)["agent"].values())


@pytest.mark.parametrize(
    "script, name, buffer", [("s2pg_sac", "save_checkpoint", True), ("s2pg_ppo", "save_run", False)]
)
def test_what_cannot_be_saved_whole_leaves_the_last_checkpoint(
    script, name, buffer, tmp_path, monkeypatch
):
    args, save = arguments(script), getattr(module(script), name)
    agent = module(script).Agent(args, module(script).make_env(args, 1), torch.device("cpu"))
    more = [module(script).TransitionBuffer(99, 1, *agent.row_sizes, "cpu")] if buffer else []
    save(tmp_path, agent, *more, global_step=1)
    good = (tmp_path / "checkpoint.pt").read_bytes()
    list(agent.actor.parameters())[-1].data[0] = torch.nan
    with pytest.raises(SystemExit, match="not finite"):
        save(tmp_path, agent, *more, global_step=2)
    list(agent.actor.parameters())[-1].data[0] = 0
    for data in more:
        data.rows[5, 0] = torch.nan
        with pytest.raises(SystemExit, match="not finite"):
            save(tmp_path, agent, data, global_step=2)
        data.rows.zero_()

    def torn(state, path):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, agent, *more, global_step=2)
    assert (tmp_path / "checkpoint.pt").read_bytes() == good and len(list(tmp_path.iterdir())) == 1


def test_a_checkpoint_within_a_rollout_is_that_of_the_last_update(monkeypatch):
    """What was played since then taught nothing, so it is played again."""
    saved, weights = [], []

    def save_run(run_dir, agent, global_step, seconds):
        saved.append(global_step)
        weights.append({name: value.clone() for name, value in agent.state_dict().items()})

    monkeypatch.setattr(module("s2pg_ppo"), "save_run", save_run)
    train("s2pg_ppo", total_timesteps=50, checkpoint_frequency=10, eval_frequency=0)
    assert saved == [0, 15, 15, 30, 50]  # rollouts of 18 rows hold 15 steps
    assert [same(*pair) for pair in itertools.pairwise(weights)] == [False, True, False, False]


def state_of(agent, *buffer):
    """All numbers that an agent and its buffer hold, registered or not, by where they lie."""
    state = {}
    for part in agent, *buffer:
        state |= {k: v for k, v in vars(part).items() if torch.is_tensor(v) or isinstance(v, int)}
    state |= agent.state_dict()
    for i, optimizer in enumerate(agent.optimizers):
        for j, slots in optimizer.state_dict()["state"].items():
            state |= {f"{i}.{j}.{name}": value for name, value in slots.items()}
    return {name: torch.as_tensor(value).clone() for name, value in state.items()}


SAVED = [(script, {}) for script in ON_POLICY]  # a ring that is full, and one that is not
SAVED += [
    (s, dict(num_envs=2, save_buffer=True, buffer_size=n))
    for s, n in zip(OFF_POLICY, [40, 50, 90, 90, 90, 90])
]


@pytest.mark.parametrize("script, options", SAVED)
def test_a_checkpoint_restores_everything(script, options, monkeypatch):
    """Networks, targets, optimisers, temperatures, normalisers, counters, rows."""
    states, kind = [], "checkpoint" if script in OFF_POLICY else "run"

    def watched(function):
        def call(run_dir, *parts, **state):
            result = function(run_dir, *parts, **state)
            states.append(state_of(*parts))
            return result

        return call

    for name in f"save_{kind}", f"load_{kind}":
        monkeypatch.setattr(module(script), name, watched(getattr(module(script), name)))
    run = train(script, eval_frequency=0, **options)
    train(script, resume=str(run), total_timesteps=120, eval_frequency=0, **options)
    saved, loaded, _ = states
    assert saved.keys() == loaded.keys() and any("exp_avg_sq" in name for name in saved)
    assert same(saved, loaded)


DAMAGE = dict(
    cut=lambda file: file.write_bytes(file.read_bytes()[:5000]),
    foreign=lambda file: torch.save(dict(model=torch.zeros(3)), file),
    text=lambda file: file.write_bytes(b"not a checkpoint"),
    gone=lambda file: file.unlink(),
    other_script=dict(script="s2pg_sac.py", sequence_length=3), no_script={},
    seed=dict(script="s2pg_sac.py", seed="one"), num_envs=dict(script="s2pg_sac.py", num_envs="2"),
    shapes=["--state-dim", "7"], buffer=["--buffer-size", "500"],
)  # fmt: skip


@pytest.mark.parametrize(
    "script, name",
    [("s2pg_sac", name) for name in DAMAGE] + [("s2pg_ppo", "text"), ("s2pg_ppo", "shapes")],
)
def test_an_unusable_run_is_answered_in_a_sentence_and_left_as_it_is(script, name, monkeypatch):
    kept = dict(save_buffer=True) if script == "s2pg_sac" else {}
    run, damage, options = train(script, eval_frequency=0, **kept), DAMAGE[name], []
    if isinstance(damage, list):
        options = damage
    elif isinstance(damage, dict):
        (run / "args.json").write_text(json.dumps(damage))
    else:
        damage(run / "checkpoint.pt")
    before = {path: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(SystemExit) as exit_info:
        options = "--resume", run, "--total-timesteps", 100, *options
        module(script).train(parse(monkeypatch, *options, script=script))
    assert isinstance(exit_info.value.code, str) and str(run) in exit_info.value.code
    assert {path: path.read_bytes() for path in run.iterdir()} == before


# The command line ---------------------------------------------------------------------------------

BAD = [
    ("s2pg_sac", "--env-id Hoper-v4", "Hoper"),
    ("s2pg_sac", "--env-id CartPole-v1", "Box"),
    ("s2pg_sac", "--env-id nowhere:Robot-v0", "nowhere"),
    ("s2pg_sac", "--env-id CueRecall-v0 --hide velocities", "CueRecall-v0"),
    ("s2pg_sac", "--env-id CueRecall-v0 --env-kwargs horizn 3", "horizn"),
    ("s2pg_sac", "--env-kwargs hide none", "hide is an option of its own: --hide"),
    ("s2pg_sac", "--env-kwargs num_envs 3", "num_envs is an option of its own: --num-envs"),
    ("s2pg_sac", "--seed 99999999999999999999", "--seed must be in"),
    ("s2pg_sac", "--hide velocity", "velocity"),
    ("s2pg_sac", "--num-envs 0", "--num-envs must be in [1, inf]"),
    ("s2pg_sac", "--gamma 1.5", "--gamma must be in"),
    ("s2pg_sac", "--buffer-size 5 --num-envs 2", "--buffer-size must be in [8, inf]"),
    ("s2pg_sac", "--learning-starts 1", "--learning-starts must be in [4, inf]"),
    (
        "s2pg_sac",
        "--env-id CueRecall-v0 --log-std-z-max -3",
        "--target-entropy-z must be in [-3.5, -1.6]",
    ),
    ("s2pg_sac", "--chrono 20 --rnn rnn", "--rnn gru or lstm"),
    ("s2pg_sac", "--resume nothing", "nothing is no run of this script"),
    ("s2pg_sac", "--no-such-option", "no-such-option"),
    ("s2pg_sac", "--total-timesteps 5000 --learning-starts 5000", "no update before step 5000"),
    ("s2pg_ppo", "--num-steps 1", "--num-steps must be in"),
    ("s2pg_ppo", "--num-steps 1000000000000", "no update before step 1000000000000"),
    ("s2pg_ppo", "--gae-lambda 1.5", "--gae-lambda must be in [0, 1]"),
    ("s2pg_ppo", "--num-minibatches 50 --num-steps 20 --num-envs 2", "must be in [1, 40]"),
    ("s2pg_ppo", "--total-timesteps 2047", "no update before step 2048: raise"),
    ("bptt_ppo", "--sequence-length 0", "--sequence-length must be in"),
    ("s2pg_td3", "--policy-frequency 0", "--policy-frequency must be in"),
    ("s2pg_lsiq", "--demonstrations nothing.npz", "no demonstrations at nothing.npz"),
    ("s2pg_lsiq", "--demonstration-episodes 99", "holds 5 episodes, and 99 are asked for"),
    ("s2pg_lsiq", "--demonstration-episodes 0", "holds 5 episodes, and 0 are asked for"),
    ("s2pg_lsiq", "--regularizer 0", "--regularizer must be in"),
    ("s2pg_gail", "--env-id CueRecall-20-v0", "no demonstrations for CueRecall-20-v0"),
    ("s2pg_gail", "--reward task", "task"),
    ("bptt_sac", "--sequence-length 0", "--sequence-length must be in"),
    ("bptt_sac", "--memoryless", "memoryless"),
    ("bptt_sac", "--chrono 2", "--chrono takes 3 steps or more"),
    ("rp_pgm", "--model-updates 0", "--model-updates 0 is for --estimator model-free"),
]
if not torch.cuda.is_available():
    BAD += [("s2pg_sac", f"--{option}", "need a CUDA card") for option in ("compile", "cudagraphs")]


@pytest.mark.parametrize("script, options, says", BAD)
def test_bad_input_is_answered_in_a_sentence(script, options, says, monkeypatch, capsys):
    monkeypatch.setattr(module(script), "SummaryWriter", lambda *_, **__: pytest.fail("it trains"))
    with pytest.raises(SystemExit) as exit_info:
        module(script).train(parse(monkeypatch, *options.split(), script=script))
    code, (out, err) = exit_info.value.code, capsys.readouterr()
    assert code not in (None, 0) and says in str(code) + err and not out
    if isinstance(code, str):  # which Python prints, with status 1
        assert "\n" not in code and not err
    assert not Path("runs").exists()


@EACH
def test_every_number_has_a_range_in_which_its_default_lies(script):
    """Or is one of these, which do no harm."""
    free = {"total_timesteps", "chrono", "demonstration_episodes"}
    for option in dataclasses.fields(module(script).Args):
        if option.type in (int, float, int | None, float | None) and option.name not in free:
            with pytest.raises(SystemExit, match=option.name.replace("_", "-")):
                module(script).Args(**{option.name: float("nan")})


@EACH
def test_tuned_options_come_between_the_defaults_and_the_command_line(script, monkeypatch):
    hidden = "none" if script in ("flow_sac", "rp_pgm") else "velocities"
    for name, options in module(script).TUNED.items():
        args = parse(monkeypatch, "--env-id", f"{name}-v4", script=script)
        assert {k: getattr(args, k) for k in options} == options
        assert args.hide == ("none" if name == "CueRecall" else hidden)
    assert parse(monkeypatch, script=script).hide == hidden
    options = "--env-id", "Humanoid-v4", "--hide", "positions"
    assert parse(monkeypatch, *options, script=script).hide == "positions"


def test_an_option_is_judged_beside_those_of_the_task_or_of_the_resumed_run(monkeypatch):
    """And not beside the defaults, with which these would be refused."""
    assert parse(monkeypatch, "--log-std-z-max", -3).target_entropy_z == -3
    options = arguments("s2pg_ppo", num_steps=3000)
    Path("args.json").write_text(json.dumps(vars(options) | dict(script="s2pg_ppo.py")))
    options = "--resume", ".", "--num-minibatches", 2500
    assert parse(monkeypatch, *options, script="s2pg_ppo").num_minibatches == 2500


def test_policy_and_critic_see_what_the_options_say():
    options = dict(env_id="Hopper-v4", env_kwargs={}, hide="positions")
    for privileged, sizes in (True, (6, 11)), (False, (6, 6)):
        args = arguments("s2pg_sac", privileged_critic=privileged, **options)
        seen = s2pg_sac.make_env(args, 1).single_observation_space
        assert (seen["policy"].shape + seen["critic"].shape) == sizes


@EACH
def test_help_is_short_and_in_groups(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--help", script=script)
    text = capsys.readouterr().out
    assert sum(max(1, math.ceil(len(line.rstrip()) / 100)) for line in text.splitlines()) <= 90
    groups = ["task", "algorithm", "networks", "run", "hardware"]  # named by their first option
    assert re.findall(rf"\[({'|'.join(groups)})\]", text) == groups


def test_options_for_the_environment_are_python_or_json_literals(monkeypatch):
    values = dict(horizon=7, wind=True, scale=0.5, name="two", healthy_z_range=(0.2, 1.0))
    values |= dict(camera_id=None, goals=[1, 2], sizes={"a": 1}, older="1.2.3", path="a/b(")
    words = [str(word) for option in values.items() for word in option]
    words += ["free", "true", "nothing", "null", "empty", ""]
    read = envs.literals(parse(monkeypatch, "--env-kwargs", *words).env_kwargs)
    assert read == values | dict(free=True, nothing=None, empty="")
    assert type(read["wind"]) is bool and type(read["horizon"]) is int


def test_options_beside_a_run_replace_its_own(tmp_path, monkeypatch, capsys):
    own = dict(env_id="CueRecall-v0", env_kwargs=[("horizon", "5")], gamma=0.9, hide="none")
    (tmp_path / "args.json").write_text(json.dumps(own | dict(script="s2pg_sac.py")))
    args = parse(monkeypatch, "--resume", tmp_path)
    assert {k: getattr(args, k) for k in own} == own and args.resume == str(tmp_path)
    args = parse(monkeypatch, "--gamma", 0.8, "--resume", tmp_path, "--env-kwargs", "horizon", 7)
    changed = own | dict(gamma=0.8, env_kwargs=[("horizon", "7")])
    assert {k: getattr(args, k) for k in own} == changed

    for options, name, value in [
        (["--env-id", "InvertedPendulum-v4"], "hide", "velocities"),
        (["--env-id", "CueRecall-v0"], "hide", "none"),
        (["--resume", tmp_path], "gamma", "0.9"),
    ]:  # --help has the defaults of the task, or of the run
        with pytest.raises(SystemExit) as exit_info:
            parse(monkeypatch, *options, "--help")
        words = capsys.readouterr().out.replace("\u2502", " ").split()
        after = words.index(f"--{name}")
        assert exit_info.value.code == 0
        assert f"(default: {value})" in " ".join(words[after : after + 60])


# Environments of a user's own ---------------------------------------------------------------------


def test_a_script_alone_trains_with_an_environment_in_the_place_of_ours():
    """Without the folder `envs`, any vector environment; a plain Box is seen by both."""
    text = (ROOT / "s2pg_sac.py").read_text()
    begin, end = text.index("    import envs\n\n    options = dict(hide"), text.index("def views(")
    mine = "    from my_robot import make\n\n    return make(num_envs)\n\n\n"
    Path("my_sac.py").write_text(text[:begin] + mine + text[end:])
    shutil.copy(TESTS / "my_robot.py", ".")
    words = command("s2pg_sac", env_id="mine", env_kwargs={}, num_envs=2)
    words[1] = "my_sac.py"
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (run,) = Path("runs").iterdir()
    assert set(logged(run)["charts/episodic_length"][1]) == {7}
    assert load(run)["global_step"] == 60
    assert json.loads((run / "args.json").read_text())["script"] == "my_sac.py"


# On a card ----------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card, and none to emulate")
@EACH
def test_a_run_on_a_card_is_the_run_on_the_cpu(script):
    """With graphs; and the host waits for the card once a row, to learn what to do."""
    off_policy = script in OFF_POLICY
    options = dict(total_timesteps=20, eval_frequency=0)
    options |= dict(save_buffer=True, learning_starts=10) if off_policy else {}
    options |= dict(sequence_length=4) if "bptt" in script else {}
    words = command(script, cudagraphs=True, **options)
    words.insert(1, str(TESTS / "emulated_card.py"))
    counting = os.environ | dict(COUNTS="counts.json")
    result = subprocess.run(words, env=counting, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "Warning" not in result.stderr, result.stderr
    (card,) = map(load, Path("runs").iterdir())
    cpu = load(train(script, **options))
    assert card.keys() == cpu.keys()
    pairs = list(zip(tree_leaves(card), tree_leaves(cpu), strict=True))
    tensors = [pair for pair in pairs if torch.is_tensor(pair[0])]
    # a sum of gradients over the steps of a flow or a model may be taken in another order
    atol = 1e-4 if script in ("flow_sac", "rp_pgm") else 0
    assert len(tensors) > 30
    assert all(torch.allclose(*pair, rtol=0, atol=atol) for pair in tensors)

    counts = json.loads(Path("counts.json").read_text())
    if off_policy:
        rows = 20 + 3  # three episodes have ended and begun anew
        assert counts["waits"]["train"] == 1 + rows  # once before the first, for the buffer's size
        arguments = 1 if script == "rp_pgm" else 3  # which are copied to where the graph reads them
        assert counts["launches"]["replay of act"] == rows - 3 + arguments * rows
        assert counts["waits"].keys() <= {"train", "save_checkpoint", "make_expert_buffer"}
    assert not counts["waits"].keys() & {"act", "add", "learn", "sample", "refresh"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card")
@pytest.mark.parametrize("cudagraphs", [False, True])
@EACH
def test_a_run_on_a_card(script, cudagraphs):
    """Begun, evaluated, stopped and resumed."""
    run = train(script, cudagraphs=cudagraphs)
    train(script, cudagraphs=cudagraphs, resume=str(run), total_timesteps=120)
    assert load(run)["global_step"] == 120
    evaluate.main(evaluate.Options(run, episodes=1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["weights", "rows"])
def test_what_is_not_finite_leaves_the_last_good_checkpoint(place, value):
    args = arguments("s2pg_sac")
    env = s2pg_sac.make_env(args, 1)
    agent = s2pg_sac.Agent(args, env, torch.device("cpu"))
    buffer = s2pg_sac.TransitionBuffer(100, 1, *agent.row_sizes, "cpu")
    s2pg_sac.save_checkpoint(Path(), agent, buffer, global_step=1, seconds=0.0)
    spoilt = buffer.rows if place == "rows" else agent.actor.policy_obs.weight
    with torch.no_grad():
        spoilt[3, 1] = value
    with pytest.raises(SystemExit, match="not finite any more"):
        s2pg_sac.save_checkpoint(Path(), agent, buffer, global_step=2, seconds=0.0)
    assert load(Path())["global_step"] == 1
