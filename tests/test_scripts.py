"""The scripts as their users run them: from the command line, and through `train(args)`."""

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._pytree import tree_leaves

import bptt_ppo
import bptt_sac
import envs
import s2pg_gail
import s2pg_lsiq
import s2pg_ppo
import s2pg_sac
import s2pg_td3

ROOT = Path(__file__).resolve().parent.parent
IMITATION = (s2pg_gail, s2pg_lsiq)
OFF_POLICY, ON_POLICY = (s2pg_sac, bptt_sac, s2pg_td3, s2pg_lsiq), (s2pg_ppo, bptt_ppo, s2pg_gail)


def each(*scripts):
    return pytest.mark.parametrize("script", scripts, ids=lambda script: script.__name__)


# five steps an episode, a few updates, one evaluation
TASK = dict(env_id="CueRecall-v0", env_kwargs=dict(horizon=5), eval_episodes=2)
QUICK = {
    script: TASK | dict(learning_starts=20, batch_size=16, buffer_size=1000)
    for script in OFF_POLICY
} | {script: TASK | dict(num_steps=18, num_minibatches=3, update_epochs=2) for script in ON_POLICY}


@pytest.fixture(scope="session", autouse=True)
def demonstrations(tmp_path_factory):
    """A file of demonstrations for each task of these tests, in which the expert acts by chance."""
    global DEMONSTRATIONS
    DEMONSTRATIONS = tmp_path_factory.mktemp("demonstrations")
    record("CueRecall-v0", horizon=5)
    record("PointMassDoor-v0")
    record("Hopper-v5", random_bodies=True, wind=True)


def record(env_id, episodes=2, **options):
    env = envs.make(env_id, **options)
    env.action_space.seed(0)
    columns = {name: [] for name in ("observations", "critic_observations", *STEP_COLUMNS)}
    for seed in range(episodes):
        obs, _ = env.reset(seed=seed)
        over = False
        while not over:
            action = env.action_space.sample()
            seen, step = (obs["policy"], obs["critic"]), env.step(action)
            obs, *outcome, _ = step
            over = outcome[1] or outcome[2]
            for column, value in zip(columns.values(), (*seen, action, *outcome)):
                column.append(value)
        columns["observations"].append(obs["policy"])
        columns["critic_observations"].append(obs["critic"])
    arrays = {name: np.array(column) for name, column in columns.items()}
    np.savez(DEMONSTRATIONS / f"{env_id}.npz", **arrays, env_id=env_id)


STEP_COLUMNS = "actions", "rewards", "terminations", "truncations"


def start(script, *options, cwd, on_card=False):
    emulation = [str(ROOT / "tests" / "emulated_card.py")] if on_card else []
    path = str(ROOT / f"{script.__name__}.py")
    command = [sys.executable, *emulation, path, *map(str, options)]
    return subprocess.Popen(
        command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(script, *options, cwd, on_card=False):
    """Run a script to its end; returns exit status, standard output, standard error."""
    process = start(script, *options, cwd=cwd, on_card=on_card)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def quick_args(script, **options):
    options = QUICK[script] | dict(total_timesteps=60) | options
    if script in IMITATION:
        options["demonstrations"] = str(DEMONSTRATIONS / f"{options['env_id']}.npz")
    return script.Args(**options)


def quick_options(script):
    """The same for the command line."""
    options = []
    for name, value in QUICK[script].items():
        values = [x for item in value.items() for x in item] if name == "env_kwargs" else [value]
        options += ["--" + name.replace("_", "-"), *map(str, values)]
    if script in IMITATION:
        options += ["--demonstrations", str(DEMONSTRATIONS / f"{TASK['env_id']}.npz")]
    return options


def only_run(path):
    (run_dir,) = (Path(path) / "runs").iterdir()
    return run_dir


def scalars(run_dir, tag):
    """Steps and values that were logged under a tag."""
    events = EventAccumulator(str(run_dir))
    events.Reload()
    logged = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
    return [event.step for event in logged], [event.value for event in logged]


def load(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def flat(state):
    """All tensors of a nested state, by path."""
    if torch.is_tensor(state):
        return {"": state}
    items = state.items() if isinstance(state, dict) else enumerate(state)
    nested = {k: v for k, v in items if isinstance(v, dict | list | tuple) or torch.is_tensor(v)}
    return {f"{k}/{path}": t for k, v in nested.items() for path, t in flat(v).items()}


PAGES = {
    s2pg_sac: ["sac"], bptt_sac: ["sac"], s2pg_td3: ["td3"], s2pg_ppo: ["ppo"], bptt_ppo: ["ppo"],
    s2pg_gail: ["ppo", "gail"], s2pg_lsiq: ["lsiq"],
}  # fmt: skip


def documented(script):
    """The tags of which the pages of `docs` say what they mean."""
    pages = [(ROOT / f"docs/{page}.md").read_text() for page in ["README", *PAGES[script]]]
    rows = [line for page in pages for line in page.splitlines() if line.startswith("| `")]
    tags = {tag for row in rows for tag in re.findall(r"`(\w+/\w+)`", row.split("|")[1])}
    tags -= {"eval/success_deterministic", "eval/success_stochastic"}  # not of every task
    if script is bptt_sac:  # as its page says, it has none of these
        tags -= {"losses/alpha_z", "losses/alpha_z_loss", "losses/entropy_z"}
    return tags


@each(*OFF_POLICY, *ON_POLICY)
def test_train_resume_evaluate_record_from_the_command_line(script, tmp_path):
    save_buffer = ["--save-buffer"] if script in OFF_POLICY else []
    status, out, err = run(
        script, *quick_options(script), "--total-timesteps", 60, "--capture-video", *save_buffer,
        cwd=tmp_path,
    )  # fmt: skip
    assert status == 0, err
    run_dir = only_run(tmp_path)
    assert len(out.splitlines()) == 1 and run_dir.name in out
    assert "Warning" not in err and "60/60" in err
    assert json.loads((run_dir / "args.json").read_text())["env_kwargs"] == {"horizon": 5}
    assert list((run_dir / "videos").rglob("*.mp4"))
    assert scalars(run_dir, "eval/return_deterministic")[0] == [60]
    assert scalars(run_dir, "eval/return_stochastic")[0] == [60]
    steps, returns = scalars(run_dir, "charts/episodic_return")
    assert steps == list(range(5, 61, 5)) and all(-5 < value <= 5 for value in returns)

    status, out, err = run(
        script, "--resume", run_dir, "--total-timesteps", 120, "--checkpoint-frequency", 30,
        cwd=tmp_path,
    )  # fmt: skip
    assert status == 0, err
    assert only_run(tmp_path) == run_dir and load(run_dir)["global_step"] == 120
    steps, _ = scalars(run_dir, "charts/episodic_return")
    assert steps == list(range(5, 121, 5))
    steps, seconds = scalars(run_dir, "charts/seconds")
    assert steps == [60, 120] and 0 < seconds[0] < seconds[1]
    assert load(run_dir)["seconds"] == pytest.approx(seconds[1], abs=1)
    events = EventAccumulator(str(run_dir))
    events.Reload()
    logged = set(events.Tags()["scalars"])
    assert logged == documented(script) - {"losses/bc_loss"}  # nothing was cloned
    for name in logged & {"charts/SPS", "charts/learning_rate"} | {
        name for name in logged if name.startswith("losses")
    }:
        steps, _ = scalars(run_dir, name)
        # off-policy scripts log each 100 steps; three rollouts of 18 rows hold 15 steps each
        assert steps == ([100] if script in OFF_POLICY else [15, 30, 45, 60, 75, 90, 105, 120])

    status, out, err = run(
        script, "--evaluate", run_dir, "--eval-episodes", 3, "--save-demonstrations", "demo.npz",
        cwd=tmp_path,
    )  # fmt: skip
    assert status == 0, err
    assert [line.split(":")[0] for line in out.splitlines()] == ["deterministic", "stochastic"]
    with np.load(tmp_path / "demo.npz", allow_pickle=False) as demo:
        assert demo["observations"].shape == (18, 2)  # 3 episodes of 5 steps have 6 rows each
        assert demo["critic_observations"].shape == (18, 2)
        assert demo["actions"].shape == (15, 1)
        assert demo["terminations"].nonzero()[0].tolist() == [4, 9, 14]
        assert not demo["truncations"].any()
        cue = np.repeat(demo["critic_observations"][::6, 0], 5)
        demo_actions = demo["actions"][:, 0]
        np.testing.assert_allclose(demo["rewards"], 1 - abs(demo["actions"][:, 0] - cue), atol=1e-6)
        assert str(demo["env_id"]) == "CueRecall-v0"
        made_by = json.loads(str(demo["made_by"]))
        np.testing.assert_allclose(made_by["returns"], demo["rewards"].reshape(3, 5).sum(1))
        assert made_by["seed"] == 1 and made_by["exp_name"] == script.__name__

    status, out, err = run(
        script, "--evaluate", run_dir, "--eval-episodes", 3, "--save-demonstrations", "noisy.npz",
        "--stochastic-demonstrations", cwd=tmp_path,
    )  # fmt: skip
    assert status == 0, err
    with np.load(tmp_path / "noisy.npz", allow_pickle=False) as noisy:
        actions, cue = noisy["actions"][:, 0], np.repeat(noisy["critic_observations"][::6, 0], 5)
        np.testing.assert_allclose(noisy["rewards"], 1 - abs(actions - cue), atol=1e-6)
        assert abs(actions).max() <= 1 and abs(actions - demo_actions).min() > 0
        returns = json.loads(str(noisy["made_by"]))["returns"]
    assert f"stochastic: return {np.mean(returns):.1f} " in out


@each(*OFF_POLICY, *ON_POLICY)
def test_seconds_are_those_of_training_alone_and_go_on_in_a_resumed_run(
    script, tmp_path, monkeypatch
):
    evaluations = []

    def evaluate_for_a_week(*args):
        evaluations.append(args)
        return dict(deterministic=0.0)

    def clock():
        return time.time() + 604_800 * len(evaluations)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "log_returns", evaluate_for_a_week)
    monkeypatch.setattr(script, "time", types.SimpleNamespace(time=clock))
    args = quick_args(script, total_timesteps=40, eval_frequency=20)
    script.train(args)
    run_dir = only_run(tmp_path)
    assert len(evaluations) == 2 and 0 < load(run_dir)["seconds"] < 600

    state = load(run_dir) | dict(seconds=7200.0)
    torch.save(state, run_dir / "checkpoint.pt")
    args.resume, args.total_timesteps = str(run_dir), 60
    script.train(args)
    assert len(evaluations) == 3 and 7200 < load(run_dir)["seconds"] < 7800
    steps, speeds = scalars(run_dir, "charts/SPS")
    assert all(step / 7800 < sps < step / 7200 for step, sps in zip(steps, speeds) if step > 40)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA card")
@each(*OFF_POLICY, *ON_POLICY)
def test_what_only_a_card_can_do_is_off_here_and_stays_an_option_of_the_run(script, tmp_path):
    options = *quick_options(script), "--compile", "--cudagraphs", "--total-timesteps", 40
    status, out, err = run(script, *options, cwd=tmp_path)
    assert status == 0, err
    said, _ = out.splitlines()
    assert said == "--compile and --cudagraphs are off, as no CUDA card is used"
    args = json.loads((only_run(tmp_path) / "args.json").read_text())
    assert args["compile"] and args["cudagraphs"] and args["resume"] is None


def kill(script, signum, cwd):
    """Kill a run after its first checkpoint; returns its folder and the step it has saved."""
    options = "--total-timesteps", 10**6, "--checkpoint-frequency", 50
    process = start(script, *quick_options(script), *options, cwd=cwd)
    deadline = time.monotonic() + 120
    while not list(cwd.glob("runs/*/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signum)
    out, _ = process.communicate(timeout=60)
    run_dir = only_run(cwd)
    step = load(run_dir)["global_step"]
    assert step >= 45  # on-policy scripts save what they have learnt from, rollouts of 15 steps
    if signum == signal.SIGKILL:
        assert process.returncode == -signum
    else:
        assert process.returncode == 128 + signum
        assert f"stopped at step {step}" in out and run_dir.name in out
    return run_dir, step


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_resumes(signum, tmp_path):
    run_dir, step = kill(s2pg_sac, signum, tmp_path)
    # without a saved buffer, `learning_starts` transitions come before the next update
    before = flat(load(run_dir)["parts"]["critic"])
    args = ["--resume", run_dir, "--eval-episodes", 1]
    status, _, err = run(s2pg_sac, *args, "--total-timesteps", step + 15, cwd=tmp_path)
    assert status == 0, err
    after = flat(load(run_dir)["parts"]["critic"])
    assert all(torch.equal(before[k], after[k]) for k in before)
    status, _, err = run(s2pg_sac, *args, "--total-timesteps", step + 60, cwd=tmp_path)
    assert status == 0, err
    after = flat(load(run_dir)["parts"]["critic"])
    assert any(not torch.equal(before[k], after[k]) for k in before)
    assert load(run_dir)["global_step"] == step + 60


@each(s2pg_td3, s2pg_lsiq, *ON_POLICY)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_killed_runs_of_other_scripts_resume(script, signum, tmp_path):
    run_dir, step = kill(script, signum, tmp_path)
    before = flat(load(run_dir)["parts"]["actor"])
    status, _, err = run(
        script, "--resume", run_dir, "--eval-episodes", 1, "--total-timesteps", step + 60,
        cwd=tmp_path,
    )  # fmt: skip
    assert status == 0, err
    assert load(run_dir)["global_step"] == step + 60
    after = flat(load(run_dir)["parts"]["actor"])
    assert any(not torch.equal(before[k], after[k]) for k in before)


@each(*OFF_POLICY, *ON_POLICY)
def test_losses_that_blow_up_stop_the_run_and_spare_the_checkpoint(script, tmp_path):
    status, _, err = run(script, *quick_options(script), "--total-timesteps", 100, cwd=tmp_path)
    assert status == 0, err
    run_dir = only_run(tmp_path)
    good = (run_dir / "checkpoint.pt").read_bytes()
    lr = ["--critic-lr", 1e38, "--actor-lr", 1e38]
    if script in ON_POLICY:
        lr = ["--learning-rate", 1e38]
    status, _, err = run(
        script, "--resume", run_dir, "--total-timesteps", 10_000, *lr, cwd=tmp_path
    )
    assert status == 1
    message = err.splitlines()[-1]
    assert message.startswith(script.__name__) and "is not finite" in message
    assert "Traceback" not in err
    assert (run_dir / "checkpoint.pt").read_bytes() == good


BAD_OPTIONS = [
    (bptt_sac, "--chrono 2", "--chrono takes 3 steps or more"),
    (s2pg_sac, "--chrono 20 --rnn rnn", "--rnn gru or lstm"),
    (s2pg_lsiq, "--log-std-z-max 3", "--log-std-z-max is 3"),
    (
        s2pg_sac,
        "--log-std-z-max -3 --target-entropy-z -1",
        "in [-3.5, -1.6] with --log-std-z-max -3.0",
    ),
    (s2pg_td3, "--policy-frequency 0", "--policy-frequency is 0"),
    (s2pg_td3, "--noise-clip -1", "--noise-clip is -1"),
    (s2pg_td3, "--buffer-size 1500", "--learning-starts"),
    (s2pg_ppo, "--num-steps 1", "--num-steps is 1"),
    (s2pg_ppo, "--gae-lambda 1.5", "--gae-lambda is 1.5"),
    (s2pg_ppo, "--target-kl nan", "--target-kl is nan"),
    (s2pg_ppo, "--std-z 0", "--std-z is 0"),
    (bptt_ppo, "--sequence-length 0", "--sequence-length is 0"),
    (bptt_ppo, "--resume nothing", "args.json"),
    (bptt_ppo, "--memoryless", "memoryless"),
    (s2pg_gail, "--demonstrations nothing.npz", "no demonstrations at nothing.npz"),
    (s2pg_gail, "--env-id CueRecall-20-v0", "no demonstrations for CueRecall-20-v0"),
    (s2pg_lsiq, "--env-id InvertedPendulum-v5", "InvertedPendulum-v5-stochastic are shipped"),
    (s2pg_gail, "--env-id Walker2d-v4 --demonstrations shipped:stochastic", "Walker2d-v4-stoch"),
    (s2pg_gail, "--env-id Hopper-v4 --demonstrations shipped:noisy", "at shipped:noisy"),
    (s2pg_gail, "--discriminator-frequency 0", "--discriminator-frequency is 0"),
    (s2pg_gail, "--reward task", "task"),
    (s2pg_lsiq, "--demonstration-episodes 99", "holds 5 episodes, and 99 are asked for"),
    (s2pg_lsiq, "--demonstrations minari:no/such/data-v0", "Minari cannot load"),
    (s2pg_lsiq, "--regularizer 0", "--regularizer is 0"),
    (s2pg_lsiq, "--bc-steps -1", "--bc-steps is -1"),
]
BAD_INPUT = {
    "--env-id Hoper-v4": "Hoper",
    "--env-id CartPole-v1": "Box",
    "--env-id nowhere:Robot-v0": "nowhere",
    "--env-id CueRecall-v0 --hide velocities": "CueRecall-v0",
    "--env-id CueRecall-v0 --env-kwargs horizn 3": "horizn",
    "--hide velocity": "velocity",
    "--num-envs 0": "--num-envs is 0",
    "--gamma 1.5": "--gamma is 1.5",
    "--buffer-size 1500": "it must be in [1, 748] with --buffer-size 1500",
    "--buffer-size 5": "--buffer-size is 5",
    "--env-kwargs hide velocities": "not for hide",
    "--evaluate a --save-demonstrations nowhere/demo.npz": "no such folder",
    "--utd nan": "--utd is nan",
    "--save-demonstrations demo.npz": "--evaluate",
    "--evaluate a --stochastic-demonstrations": "--save-demonstrations FILE.npz",
    "--evaluate nothing": "args.json",
    "--resume nothing": "args.json",
    "--resume a --evaluate b": "exclude",
    "--no-such-option": "no-such-option",
}


@pytest.mark.parametrize(
    "script, options, says", [(s2pg_sac, *item) for item in BAD_INPUT.items()] + BAD_OPTIONS
)
def test_bad_input_is_answered_in_a_sentence(script, options, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "args.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", [script.__name__, *options.split()])
    with pytest.raises(SystemExit) as exit_info:
        script.main()
    code = exit_info.value.code
    message = code if isinstance(code, str) else capsys.readouterr().err
    assert code not in (None, 0) and says in message
    assert not (tmp_path / "runs").exists()


@each(*OFF_POLICY, *ON_POLICY)
def test_every_number_has_limits_and_the_same_in_each_script(script):
    kinds = int, float, int | None, float | None
    numbers = {field.name for field in dataclasses.fields(script.Args) if field.type in kinds}
    limits = script.Args().limits()
    assert limits.keys() == numbers
    for other in (*OFF_POLICY, *ON_POLICY):
        others = other.Args().limits()
        assert all(others.get(name, limits[name]) == limits[name] for name in limits)


def test_tracking_without_wandb_is_answered_in_a_sentence(monkeypatch):
    monkeypatch.setattr(s2pg_sac.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        s2pg_sac.check_args(s2pg_sac.Args(track=True))
    s2pg_sac.check_args(s2pg_sac.Args(track=True, evaluate="runs/RUN"))  # nothing is tracked there


DAMAGE = [
    "cut", "foreign", "text", "torn", "missing", "shapes", "args", "seed", "num_envs", "buffer"
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_unusable_run_is_a_clear_error(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    s2pg_sac.train(quick_args(s2pg_sac, save_buffer=True))
    run_dir = only_run(tmp_path)
    checkpoint = run_dir / "checkpoint.pt"
    options = ["--resume", str(run_dir), "--total-timesteps", "100"]
    if damage == "cut":
        checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    elif damage == "foreign":
        torch.save({"model": torch.zeros(3)}, checkpoint)
    elif damage == "text":
        checkpoint.write_text("not a checkpoint")
    elif damage == "torn":
        checkpoint.write_text("torn")  # pickle pops from an empty list
    elif damage == "missing":
        checkpoint.unlink()
    elif damage == "shapes":
        options += ["--state-dim", "7"]
    elif damage == "args":
        (run_dir / "args.json").write_text('{"sequence_length": 3}')
    elif damage == "seed":
        (run_dir / "args.json").write_text('{"seed": "one"}')
    elif damage == "num_envs":
        (run_dir / "args.json").write_text('{"num_envs": "two"}')
    elif damage == "buffer":
        options += ["--buffer-size", "500"]
    before = {path: path.read_bytes() for path in run_dir.iterdir()}
    monkeypatch.setattr(sys, "argv", ["s2pg_sac.py", *options])
    with pytest.raises(SystemExit) as exit_info:
        s2pg_sac.main()
    assert isinstance(exit_info.value.code, str) and "\n" not in exit_info.value.code.strip()
    assert {path: path.read_bytes() for path in run_dir.iterdir()} == before


MEMORY = [dict(rnn="lstm"), dict(rnn="rnn"), dict(memoryless=True), dict(privileged_critic=False)]
OPTIONS = {
    s2pg_sac: MEMORY + [
        dict(kernel="official"), dict(critic_sees_z=True), dict(refresh=False),
        dict(alpha_lr=0.0), dict(alpha_z_lr=0.0),
    ],
    bptt_sac: [
        dict(loss_on="last", sequence_length=3), dict(sequence_length=1),
        dict(loss_on="all-uniform", burn_in=2),
        dict(burn_in=2, rnn="lstm", initial_state="zero"), dict(rnn="rnn", loss_on="last"),
        dict(privileged_critic=False), dict(critic_sees_h=True), dict(alpha_lr=0.0),
    ],
    s2pg_td3: MEMORY + [
        dict(critic_sees_z=True), dict(refresh=False), dict(policy_frequency=1),
        dict(exploration_noise=0.0, exploration_noise_z=0.0, policy_noise=0.0, noise_clip=0.0),
    ],
    s2pg_ppo: MEMORY + [
        dict(privileged_critic=True), dict(anneal_lr=False), dict(norm_adv=False),
        dict(clip_vloss=True, ent_coef=0.1), dict(target_kl=0.0), dict(num_steps=2),
        dict(num_minibatches=100), dict(num_steps=1000),
    ],
    bptt_ppo: [
        dict(rnn="lstm", sequence_length=3), dict(rnn="rnn", sequence_length=1),
        dict(privileged_critic=True, sequence_length=4, num_minibatches=100), dict(num_steps=2),
    ],
    s2pg_gail: MEMORY + [
        dict(bc_steps=3, bc_sequence_length=3, bc_batch_size=2, bc_lr=1e-2),
        dict(discriminator_sees="policy", reward="airl"), dict(absorbing=False),
        dict(discriminator_frequency=2, discriminator_steps=2, discriminator_entropy=0.0),
        dict(demonstration_episodes=1, discriminator_lr=1e-2), dict(num_steps=2),
    ],
    s2pg_lsiq: MEMORY + [
        dict(bc_steps=3), dict(bc_steps=3, rnn="lstm"), dict(loss="iq_like"),
        dict(expert_target="bootstrap", regularizer=0.1), dict(absorbing=False),
        dict(clip_target=False), dict(critic_sees_z=True), dict(refresh=False),
        dict(demonstration_episodes=1), dict(kernel="official"),
        dict(alpha=0.001, alpha_lr=0.0, alpha_z=0.001, alpha_z_lr=0.0),
    ],
}  # fmt: skip
COMMON = [
    dict(num_envs=3), dict(eval_frequency=25),
    dict(env_id="Hopper-v5", env_kwargs={}, hide="positions", random_bodies=True, wind=True),
    dict(env_id="PointMassDoor-v0", env_kwargs={}, eval_episodes=1),
]  # fmt: skip
REPLAY = {script: [dict(utd=0.5), dict(utd=2.0)] for script in OFF_POLICY}
CASES = [(s, o) for s in OPTIONS for o in COMMON + REPLAY.get(s, []) + OPTIONS[s]]


@pytest.mark.parametrize("script, options", CASES, ids=lambda x: str(getattr(x, "__name__", x)))
def test_every_option_trains_saves_and_loads(script, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = quick_args(script, **options)
    script.train(args)
    run_dir = only_run(tmp_path)
    assert load(run_dir)["global_step"] >= 60
    args.evaluate, args.eval_episodes = str(run_dir), 1
    script.replay(args)


@each(*OFF_POLICY, *ON_POLICY)
@pytest.mark.parametrize("num_envs", [1, 2, 3])
def test_every_episode_is_logged_at_its_own_step(script, num_envs, tmp_path, monkeypatch):
    """Environments that finish together do not overwrite one another; autoreset is no step."""
    monkeypatch.chdir(tmp_path)
    script.train(quick_args(script, num_envs=num_envs, total_timesteps=60))
    steps, lengths = scalars(only_run(tmp_path), "charts/episodic_length")
    assert len(steps) == len(set(steps)) == 60 // 5
    assert set(lengths) == {5} and max(steps) == 60


@each(*OFF_POLICY)
def test_updates_are_counted_per_environment_step(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    updates = []
    agent = script.Agent
    update = agent.update
    monkeypatch.setattr(agent, "update", lambda *a: updates.append(1) or update(*a))
    script.train(quick_args(script, num_envs=3, utd=0.5, learning_starts=1, total_timesteps=60))
    # the first transition is known after the second step of the three environments, and the
    # updates of a step are done in the next one, of which there is none after the last
    assert len(updates) == (60 - 3 - 3) * 0.5 // 1


@each(*OFF_POLICY)
def test_updates_begin_before_the_environment_steps_and_after_the_action_is_known(
    script, tmp_path, monkeypatch
):
    """A card works on them while the environment steps, and the action does not wait for them."""
    monkeypatch.chdir(tmp_path)
    events, update, make_env = [], script.Agent.update, script.make_env

    def watched_env(*args):
        env = make_env(*args)
        step = env.step
        monkeypatch.setattr(env, "step", lambda a: events.append("step") or step(a))
        return env

    def watched_update(*args):
        events.append("update")
        return update(*args)

    monkeypatch.setattr(script, "make_env", watched_env)
    monkeypatch.setattr(script.Agent, "update", watched_update)
    spy_on_acting(script, monkeypatch, lambda *_: events.append("act"))
    script.train(quick_args(script, learning_starts=5, total_timesteps=30, eval_frequency=0))
    begin, end = events.index("update"), len(events) - 1 - events[::-1].index("update")
    assert events.count("update") > 15
    assert set(zip(events[begin - 1 : end], events[begin : end + 1])) == {
        ("act", "update"), ("update", "step"), ("step", "act"), ("act", "step")
    }  # fmt: skip
    assert events[begin - 1 : begin + 4] == ["act", "update", "step", "act", "update"]


@each(*IMITATION)
def test_a_resumed_run_does_not_clone_again(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script.train(quick_args(script, bc_steps=2))
    run_dir = only_run(tmp_path)
    assert scalars(run_dir, "losses/bc_loss")[0] == [0]
    assert scalars(run_dir, "eval/return_stochastic")[0] == [0, 60]
    monkeypatch.delattr(script.Agent, "clone")
    script.train(quick_args(script, bc_steps=2, resume=str(run_dir), total_timesteps=65))
    assert load(run_dir)["global_step"] == 65


@each(*IMITATION)
def test_a_signal_ends_the_cloning(script, tmp_path):
    options = *quick_options(script), "--bc-steps", 10**6, "--total-timesteps", 10**6
    process = start(script, *options, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/events*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert out.endswith("stopped while cloning, of which nothing is saved\n")
    run_dir = only_run(tmp_path)  # no half a clone that is taken for a whole one
    assert not (run_dir / "checkpoint.pt").exists()
    assert scalars(run_dir, "eval/return_stochastic") == ([], [])


@each(*OFF_POLICY, *ON_POLICY)
def test_a_seed_decides_the_run_and_evaluation_does_not_disturb_it(script, tmp_path, monkeypatch):
    weights = []
    for name, options in dict(
        first=dict(seed=3), again=dict(seed=3, eval_frequency=20), other=dict(seed=4)
    ).items():
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        script.train(quick_args(script, **options))
        weights.append(flat(load(only_run(tmp_path / name))["parts"]["actor"]))
    first, again, other = weights
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


NORMALIZERS = [
    "parts/actor/normalizer.mean", "parts/critic/normalizer.var", "parts/critic/returns.count"
]  # fmt: skip
SAVED = {
    s2pg_sac: ["parts/target_critic", "tensors/log_alpha", "tensors/log_alpha_z"],
    bptt_sac: ["parts/target_critic", "tensors/log_alpha"],
    s2pg_td3: ["parts/target_critic", "parts/target_actor", "tensors/updates"],
    s2pg_ppo: NORMALIZERS,
    bptt_ppo: NORMALIZERS,
    s2pg_gail: [
        *NORMALIZERS, "parts/discriminator/net", "parts/discriminator/normalizer.mean",
        "parts/discriminator_optimizer", "tensors/rollouts",
    ],
    s2pg_lsiq: ["parts/target_critic", "tensors/log_alpha", "tensors/log_alpha_z"],
}  # fmt: skip


@each(*OFF_POLICY, *ON_POLICY)
def test_a_checkpoint_restores_everything(script, tmp_path, monkeypatch):
    """Networks, targets, optimisers, temperatures, normalisers, step, random state and buffer."""
    monkeypatch.chdir(tmp_path)
    saves_buffer = dict(save_buffer=True) if script in OFF_POLICY else {}
    args = quick_args(script, **saves_buffer)
    script.train(args)
    saved = load(only_run(tmp_path))
    torch.manual_seed(99)
    env = script.make_env(args, 1)
    agent = script.Agent(args, *script.dimensions(env), torch.device("cpu"))
    state = script.load_checkpoint(str(only_run(tmp_path)), agent)
    rest = dict(global_step=state["global_step"], rng=state["rng"])
    if saves_buffer:
        buffer = agent.make_buffer()
        buffer.load_state_dict(dict(state["buffer"]))
        rest["buffer"] = buffer.state_dict()
    script.save_checkpoint(str(tmp_path), agent, rest)
    again = flat(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert again.keys() == flat(saved).keys()
    names = " ".join(again)
    parts = ["parts/actor", "parts/critic", "exp_avg_sq", "rng", *SAVED[script]]
    for part in parts + ["buffer/rows", "buffer/transitions"] * bool(saves_buffer):
        assert part in names, part
    assert all(torch.equal(again[k], flat(saved)[k]) for k in again)


@each(*OFF_POLICY, *ON_POLICY)
def test_tuned_options_come_between_the_defaults_and_the_command_line(script, monkeypatch):
    def parse(*options):
        monkeypatch.setattr(sys, "argv", [script.__name__, *options])
        return script.parse_args()

    assert parse().hide == "velocities"  # the default task is a hidden-velocity one
    args = parse("--env-id", "Humanoid-v4")
    assert {k: getattr(args, k) for k in script.TUNED["Humanoid"]} == script.TUNED["Humanoid"]
    for name in script.TUNED["Humanoid"].keys() - {"hide"}:
        args = parse("--env-id", "Humanoid-v4", "--" + name.replace("_", "-"), "0.5")
        assert getattr(args, name) == 0.5
    assert parse("--env-id", "Humanoid-v4", "--hide", "positions").hide == "positions"
    assert parse("--env-id", "CueRecall-100-v0").hide == "none"
    args = parse("--env-kwargs", "horizon", "7", "sparse", "True", "scale", "0.5")
    assert args.env_kwargs == dict(horizon=7, sparse=True, scale=0.5)


@each(*OFF_POLICY, *ON_POLICY)
def test_options_beside_a_run_replace_its_own(script, tmp_path, monkeypatch, capsys):
    def parse(*options):
        monkeypatch.setattr(sys, "argv", [script.__name__, *options])
        return script.parse_args()

    own = dict(env_id="CueRecall-v0", env_kwargs=dict(horizon=5), gamma=0.9, hide="none")
    (tmp_path / "args.json").write_text(json.dumps(own))
    for option in ("--resume", "--evaluate"):
        args = parse(option, str(tmp_path))
        assert {k: getattr(args, k) for k in own} == own
        args = parse(option, str(tmp_path), "--gamma", "0.8", "--env-kwargs", "horizon", "7")
        assert {k: getattr(args, k) for k in own} == own | dict(
            gamma=0.8, env_kwargs={"horizon": 7}
        )

    for options, default in [
        (["--env-id", "InvertedPendulum-v4"], "hide velocities"),
        (["--env-id", "CueRecall-v0"], "hide none"),
        (["--resume", str(tmp_path)], "gamma 0.9"),
    ]:  # --help has the defaults of the task, or of the run
        with pytest.raises(SystemExit) as exit_info:
            parse(*options, "--help")
        words = capsys.readouterr().out.replace("\u2502", " ").split()
        name, value = default.split()
        after = words.index(f"--{name}")
        assert exit_info.value.code == 0
        assert f"(default: {value})" in " ".join(words[after : after + 60])


class Recorder(torch.nn.Module):
    """An actor that adds one to its internal state each step and keeps what it is given."""

    z_dim, action_dim = 1, 1

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.z, self.a_prev, self.modes = [], [], set()

    def act(self, obs, z, a_prev, deterministic=False):
        self.z.append(z[0].item())
        self.a_prev.append(a_prev[0].item())
        self.modes.add(deterministic)
        return torch.full_like(z, 0.25), z + 1


@pytest.mark.parametrize("deterministic", [True, False])
def test_evaluation_carries_the_memory_and_resets_it_with_the_episode(deterministic):
    args = quick_args(s2pg_sac)
    actor = Recorder()
    episodes = s2pg_sac.evaluate(actor, s2pg_sac.make_env(args, 1), 2, deterministic, seed=0)
    assert actor.z == [0, 1, 2, 3, 4, 5] * 2
    assert actor.a_prev == [0, 0.25, 0.25, 0.25, 0.25, 0.25] * 2
    assert actor.modes == {deterministic}
    assert [len(episode["rewards"]) for episode in episodes] == [5, 5]


class Steersman(Recorder):
    """Remembers the goal of PointMassMemory, which it sees near the start, and goes there."""

    def act(self, obs, z, a_prev, deterministic=False):
        x, y, cue = obs.T
        z = torch.where((z == 0) & (cue[:, None] != 0), cue[:, None], z)
        heading = torch.atan2(130 / 75 - 1 - y, z[:, 0] - x)
        return (heading / torch.pi)[:, None] % 2 - 1, z


@pytest.mark.parametrize("actor, successful", [(Steersman(), True), (Recorder(), False)])
def test_evaluation_knows_the_successes_of_tasks_that_have_them(actor, successful):
    args = quick_args(s2pg_sac, env_id="PointMassMemory-v0", env_kwargs={})
    played = s2pg_sac.evaluate(actor, s2pg_sac.make_env(args, 2), 5, True, seed=0)
    for episode in played:
        success = episode["successes"]
        assert success.shape == episode["rewards"].shape and success.dtype == bool
        assert success[-1] == successful and not success[0]
        assert (np.diff(success.astype(int)) >= 0).all()
    args = quick_args(s2pg_sac)
    (episode,) = s2pg_sac.evaluate(Recorder(), s2pg_sac.make_env(args, 1), 1, True, seed=0)
    assert "successes" not in episode


def test_the_rate_of_success_is_logged_and_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = quick_args(s2pg_sac, env_id="PointMassMemory-v0", env_kwargs={}, total_timesteps=30)
    episodes = [
        dict(rewards=np.ones(3), successes=np.array(success, dtype=bool))
        for success in ([0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0])
    ]
    monkeypatch.setattr(s2pg_sac, "evaluate", lambda *args: episodes)
    s2pg_sac.train(args)
    run_dir = only_run(tmp_path)
    for mode in ("deterministic", "stochastic"):
        (step,), (rate,) = scalars(run_dir, f"eval/success_{mode}")
        assert step == 30 and rate == pytest.approx(0.4)
    capsys.readouterr()
    s2pg_sac.replay(dataclasses.replace(args, evaluate=str(run_dir)))
    line = "return 3.0 +- 0.0, length 3, 5 episodes, success 40%"
    assert capsys.readouterr().out == f"deterministic: {line}\nstochastic: {line}\n"


@pytest.mark.parametrize("episodes", [1, 2, 5])
def test_evaluation_shares_the_episodes_among_the_environments(episodes):
    args = quick_args(s2pg_sac, env_id="Hopper-v4", env_kwargs={}, hide="velocities")
    actor, env = Recorder(), s2pg_sac.make_env(args, 2)
    played = s2pg_sac.evaluate(actor, env, episodes, True, seed=0)
    assert len(played) == episodes
    for episode in played:
        steps = len(episode["rewards"])
        assert episode["observations"].shape == (steps + 1, 5)
        assert episode["critic_observations"].shape == (steps + 1, 11)
        assert episode["actions"].shape == (steps, 3)
        ends = episode["terminations"] | episode["truncations"]
        assert ends.nonzero()[0].tolist() == [steps - 1]


def test_actions_are_recorded_in_the_units_of_the_environment():
    args = quick_args(s2pg_sac, env_id="InvertedPendulum-v4", env_kwargs={}, hide="velocities")
    (episode,) = s2pg_sac.evaluate(Recorder(), s2pg_sac.make_env(args, 1), 1, True, seed=0)
    np.testing.assert_allclose(episode["actions"], 0.25 * 3.0)  # its actions reach from -3 to 3


@each(*OFF_POLICY)
def test_the_buffer_holds_what_the_environments_showed(script, tmp_path, monkeypatch):
    """To the policy and to the critic, across episodes; and what it gave for the actions there."""
    monkeypatch.chdir(tmp_path)
    buffers, rows, given = [], [], []
    make_buffer, make_env = script.Agent.make_buffer, script.make_env

    def watched_env(*args):
        env = make_env(*args)
        reset, step = env.reset, env.step
        if not rows:  # the second one is for the evaluation
            rows.append(None)

            def watched_reset(**options):
                rows[0], info = reset(**options)
                return rows[0], info

            def watched_step(action):
                result = step(action)
                rows.append(result[0])
                given.append(result[1:3])
                return result

            monkeypatch.setattr(env, "reset", watched_reset)
            monkeypatch.setattr(env, "step", watched_step)
        return env

    monkeypatch.setattr(
        script.Agent, "make_buffer", lambda self: buffers.append(make_buffer(self)) or buffers[0]
    )
    monkeypatch.setattr(script, "make_env", watched_env)
    options = dict(
        env_id="InvertedPendulum-v4", env_kwargs={}, hide="velocities", num_envs=2,
        learning_starts=100, total_timesteps=80,
    )  # fmt: skip
    if script is s2pg_lsiq:
        options["demonstrations"] = None  # those of envs/demonstrations
    script.train(dataclasses.replace(quick_args(script), **options))
    (buffer,) = buffers
    n, rows = 2 * len(given), rows[: len(given)]
    assert buffer.written == len(given) >= 40 and 4 < buffer.first[:n].sum() < 40
    for name, column in (("policy", buffer.obs), ("critic", buffer.critic_obs)):
        assert np.array_equal(np.concatenate([row[name] for row in rows]), column[:n])
    reward, terminated = (np.concatenate(x) for x in zip(*given))
    if script is not s2pg_lsiq:  # which is not told
        assert np.array_equal(reward.astype(np.float32), buffer.reward[:n])
    assert np.array_equal(terminated, buffer.terminated[:n]) and terminated.any()


def test_training_resets_memory_and_previous_action_with_the_episode(tmp_path, monkeypatch):
    """An episode of T steps fills T + 1 rows; the next begins with zeros."""
    monkeypatch.chdir(tmp_path)
    buffers, make = [], s2pg_sac.Agent.make_buffer
    monkeypatch.setattr(
        s2pg_sac.Agent, "make_buffer", lambda self: buffers.append(make(self)) or buffers[0]
    )
    s2pg_sac.train(quick_args(s2pg_sac, learning_starts=1000 - 3, total_timesteps=50))
    (buffer,) = buffers
    n = buffer.written
    first = buffer.first[:n].nonzero().flatten()
    assert first.tolist() == list(range(0, n, 6))
    assert not buffer.z[first].any() and not buffer.a_prev(first).any()
    others = torch.tensor(sorted(set(range(n)) - set(first.tolist())))
    assert (buffer.z[others].abs().sum(1) > 0).all()
    assert torch.equal(buffer.a_prev(others), buffer.action[others - 1])
    # the last transition of each episode is terminal, its successor is the final observation
    assert buffer.terminated[:n].nonzero().flatten().tolist() == list(range(4, n, 6))


def spy_on_acting(script, monkeypatch, record):
    """Calls `record(z, a_prev)` before each action of the training loop."""
    cls = script.Agent
    if script in OFF_POLICY:
        cls = type(script.Agent(script.Args(), 2, 2, 1, False, torch.device("cpu")).actor)
    act = cls.act

    def spy(self, *given):
        record(*[x for x in given if torch.is_tensor(x)][-2:])
        return act(self, *given)

    monkeypatch.setattr(cls, "act", spy)


@each(*OFF_POLICY, *ON_POLICY)
def test_the_acting_policy_starts_each_episode_with_zeros(script, tmp_path, monkeypatch):
    """The buffer masks a_prev by itself, so what the policy is given has to be looked at, too."""
    monkeypatch.chdir(tmp_path)
    given = []
    spy_on_acting(script, monkeypatch, lambda z, a: given.append((z.clone(), a.clone())))
    rollout = dict(num_steps=1000) if script in ON_POLICY else {}  # the value of a last row: no act
    script.train(quick_args(script, eval_episodes=1, **rollout))
    for step, (z, a_prev) in enumerate(given[:71]):  # 60 steps and 11 final rows, then evaluation
        fresh = step % 6 == 0
        assert bool(z.any()) != fresh and bool(a_prev.any()) != fresh


@each(*OFF_POLICY, *ON_POLICY)
def test_a_resumed_run_goes_on_with_the_saved_random_state(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script.train(quick_args(script))
    run_dir = only_run(tmp_path)
    saved, states = load(run_dir)["rng"], []
    spy_on_acting(script, monkeypatch, lambda *_: states.append(torch.get_rng_state()))
    script.train(quick_args(script, resume=str(run_dir), total_timesteps=65))
    assert torch.equal(states[0], saved)


@each(*OFF_POLICY, *ON_POLICY)
def test_weights_that_are_not_finite_are_not_saved(script, tmp_path):
    agent = script.Agent(quick_args(script), 2, 2, 1, True, torch.device("cpu"))
    script.save_checkpoint(str(tmp_path), agent, {})
    good = (tmp_path / "checkpoint.pt").read_bytes()
    name, weight = list(agent.actor.named_parameters())[-1]
    weight.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match=f"{name} is not finite"):
        script.save_checkpoint(str(tmp_path), agent, {})
    assert (tmp_path / "checkpoint.pt").read_bytes() == good


@each(*ON_POLICY)
def test_a_checkpoint_within_a_rollout_is_that_of_the_last_update(script, tmp_path, monkeypatch):
    """What was played since then taught nothing, so it is played again."""
    monkeypatch.chdir(tmp_path)
    saved, seen = [], []

    def save_checkpoint(run_dir, agent, state):
        saved.append(state["global_step"])
        seen.append([parameter.detach().clone() for parameter in agent.actor.parameters()])

    monkeypatch.setattr(script, "save_checkpoint", save_checkpoint)
    script.train(quick_args(script, total_timesteps=50, checkpoint_frequency=10))
    assert saved == [0, 15, 15, 30, 50]  # rollouts of 18 rows hold 15 steps
    same = [all(map(torch.equal, a, b)) for a, b in itertools.pairwise(seen)]
    assert same == [False, True, False, False]


def test_the_time_of_cloning_counts_in_a_run_that_is_stopped_before_its_first_update(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    saved = []
    monkeypatch.setattr(s2pg_gail, "save_checkpoint", lambda _, agent, state: saved.append(state))
    options = dict(bc_steps=20, total_timesteps=20, checkpoint_frequency=5, num_steps=60)
    s2pg_gail.train(quick_args(s2pg_gail, **options))
    assert saved[0]["global_step"] == 0 and saved[0]["seconds"] > 0.01


def test_seeds_have_no_environments_in_common():
    """Neither in training nor in evaluation, though environment i has the seed of the first + i."""
    firsts = [
        s2pg_sac.env_seed(s2pg_sac.Args(seed=seed), step, evaluation)
        for seed in range(20)
        for step in range(0, 100_000, 10_000)
        for evaluation in (False, True)
    ]
    assert np.diff(np.sort(firsts)).min() > 16
    assert min(firsts) >= 0 and max(firsts) < 2**31
    again = s2pg_sac.env_seed(s2pg_sac.Args(seed=0), 0)
    assert again == firsts[0]


def test_a_script_alone_trains_with_an_environment_in_the_place_of_ours(tmp_path):
    """As the docstring of `make_env` says: without the folder `envs`."""
    text = (ROOT / "s2pg_sac.py").read_text()
    begin, end = text.index("        env = envs.make("), text.index("        if film:")
    text = text[:begin] + "        env = Robot()\n" + text[end:]
    assert text.count("import envs\n") == 1
    text = text.replace("import envs\n", "from my_robot import Robot\n")
    (tmp_path / "my_sac.py").write_text(text)
    (tmp_path / "my_robot.py").write_text(
        "import gymnasium as gym\n"
        "import numpy as np\n"
        "class Robot(gym.Env):\n"
        "    critic_sees_more = True\n"
        "    observation_space = gym.spaces.Dict(\n"
        "        policy=gym.spaces.Box(-1, 1, (2,)), critic=gym.spaces.Box(-1, 1, (3,))\n"
        "    )\n"
        "    action_space = gym.spaces.Box(-2, 2, (2,))\n"
        "    def reset(self, seed=None, options=None):\n"
        "        super().reset(seed=seed)\n"
        "        self.t = 0\n"
        "        return self.observation_space.sample(), {}\n"
        "    def step(self, action):\n"
        "        self.t += 1\n"
        "        return self.observation_space.sample(), 1.0, False, self.t == 7, {}\n"
    )
    command = [sys.executable, "my_sac.py", "--env-id", "mine", "--total-timesteps", "60"]
    command += ["--learning-starts", "20", "--eval-episodes", "2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert set(scalars(only_run(tmp_path), "charts/episodic_return")[1]) == {7.0}


def test_an_episode_that_never_ends_is_answered_in_a_sentence():
    class Endless:
        num_envs = 1

        def reset(self, seed):
            return dict(policy=zeros, critic=zeros), {}

        def step(self, action):
            return dict(policy=zeros, critic=zeros), [0.0], over, over, {}

        def get_attr(self, name):
            space = types.SimpleNamespace(low=-1.0, high=1.0)
            return [types.SimpleNamespace(action_space=space)]

    zeros, over = np.zeros((1, 1), np.float32), np.zeros(1, dtype=bool)
    actor = Recorder()
    actor.act = lambda obs, z, a_prev, deterministic: (a_prev, z)
    with pytest.raises(ValueError, match="in 100 000 steps; set max_episode_steps"):
        s2pg_sac.evaluate(actor, Endless(), 1, True, 0)


def test_your_own_environment_trains(tmp_path):
    """`module:Id-v0`, a plain Box observation: the critic sees the same, and z."""
    (tmp_path / "my_robot.py").write_text(
        "import gymnasium as gym\n"
        "import numpy as np\n"
        "class Robot(gym.Env):\n"
        "    observation_space = gym.spaces.Box(-1, 1, (3,))\n"
        "    action_space = gym.spaces.Box(-2, 2, (2,))\n"
        "    def reset(self, seed=None, options=None):\n"
        "        super().reset(seed=seed)\n"
        "        self.t = 0\n"
        "        return self.observation_space.sample() * 0, {}\n"
        "    def step(self, action):\n"
        "        assert self.action_space.contains(action)\n"
        "        self.t += 1\n"
        "        return np.zeros(3, np.float32), 1.0, False, self.t == 7, {}\n"
        "class Faulty(Robot):\n"
        "    def step(self, action):\n"
        "        return np.zeros(3) + np.zeros(2), 1.0, False, False, {}\n"
        "gym.register('Robot-v0', entry_point=Robot)\n"
        "gym.register('Faulty-v0', entry_point=Faulty, disable_env_checker=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "s2pg_sac.py"), "--env-id", "my_robot:Robot-v0"]
    command += ["--total-timesteps", "60", "--learning-starts", "20", "--eval-episodes", "2"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert set(scalars(only_run(tmp_path), "charts/episodic_return")[1]) == {7.0}

    command[3] = "my_robot:Faulty-v0"
    for dev_mode in (False, True):
        options = ["-X", "dev", "-W", "ignore"] if dev_mode else []
        result = subprocess.run(
            [command[0], *options, *command[1:]], cwd=tmp_path, env=environment,
            capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 1
        assert "could not be broadcast" in result.stderr.splitlines()[-1]
        assert ("my_robot.py" in result.stderr) == dev_mode


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card")
@pytest.mark.parametrize("mode", ["--no-cudagraphs", "--cudagraphs"])
@each(*OFF_POLICY, *ON_POLICY)
def test_a_run_on_a_card(script, mode, tmp_path):
    """Begun, evaluated, stopped and resumed."""
    status, out, err = run(
        script, *quick_options(script), mode, "--total-timesteps", 40, cwd=tmp_path
    )
    assert status == 0 and "return at step 40" in out, err
    more = ["--resume", only_run(tmp_path), "--total-timesteps", 60]
    status, out, err = run(script, *more, cwd=tmp_path)
    assert status == 0 and "return at step 60" in out, err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card, and none to emulate")
@each(*OFF_POLICY, *ON_POLICY)
def test_a_run_on_a_card_is_the_run_on_the_cpu(script, tmp_path, monkeypatch):
    """Begun, stopped and resumed, with graphs; and the host does little for a row."""
    monkeypatch.setenv("COUNTS", "counts.json")
    off_policy = script in OFF_POLICY
    options = [*quick_options(script), "--total-timesteps", 40]
    options += ["--save-buffer"] if off_policy else []
    states = {}
    for place in ("cpu", "card"):
        cwd, on_card = tmp_path / place, place == "card"
        cwd.mkdir()
        more = ["--cudagraphs"] if on_card else []
        status, _, err = run(script, *options, *more, cwd=cwd, on_card=on_card)
        assert status == 0, err
        (path,) = cwd.glob("runs/*")
        states[place] = [torch.load(path / "checkpoint.pt", weights_only=True)]
        if on_card:
            counts = json.loads((cwd / "counts.json").read_text())
            waits, copies, launches = (counts[k] for k in ("waits", "copies", "launches"))
        more = ["--resume", path, "--total-timesteps", 60]
        status, _, err = run(script, *more, cwd=cwd, on_card=on_card)
        assert status == 0, err
        states[place].append(torch.load(path / "checkpoint.pt", weights_only=True))
    for cpu, card in zip(*states.values()):
        compared = 0
        for name in cpu.keys() - {"seconds"}:
            for one, other in zip(tree_leaves(cpu[name]), tree_leaves(card[name])):
                if torch.is_tensor(one):
                    assert torch.equal(one, other), name
                    compared += 1
        assert compared > 30
    rows = copies["train"]  # one copy for each tells where the memory begins anew
    assert copies["see"] == launches["see"] == rows + 1
    if off_policy:  # to learn what to do, once a row; there is nothing to log in so few steps
        assert rows == int(states["cpu"][0]["buffer"]["counters"][3]) == waits.pop("train")
        assert not waits.keys() - {"make_expert_buffer", "evaluate", "check_finite"}
        expert = launches["add"] - 3 * rows  # rows of LSIQ's expert
        assert copies["add"] == 2 * launches["add"] / 3 and (expert > 0) == (script is s2pg_lsiq)
        assert launches["replay of act"] == rows - 3
        # and three for an action at random, in the 24 rows of the first 20 steps
        assert launches["train"] == 2 * rows + 3 * 24
    else:
        assert "add" not in copies and launches["add"] < 8 * rows
        assert launches["replay of act"] > rows - 3 and launches["train"] < 4 * rows
        assert not waits.keys() & {"learn", "act", "add"}
