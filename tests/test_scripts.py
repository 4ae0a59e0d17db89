"""The scripts as their users run them. What is one text in all of them is tested on s2pg_sac."""

import dataclasses
import importlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from contextlib import nullcontext as nothing
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._pytree import tree_leaves

import envs
import envs.demonstrations
import evaluate
import s2pg_sac

ROOT = Path(__file__).resolve().parent.parent
OFF_POLICY = ["s2pg_sac", "bptt_sac", "s2pg_td3", "s2pg_lsiq"]
ON_POLICY = ["s2pg_ppo", "bptt_ppo", "s2pg_gail"]
IMITATION = ["s2pg_gail", "s2pg_lsiq"]
EACH = pytest.mark.parametrize("script", OFF_POLICY + ON_POLICY)
BOTH = pytest.mark.parametrize("script", ["s2pg_sac", "s2pg_ppo"])  # two texts of `train`

# five steps an episode, a few updates, one evaluation
TASK = dict(env_id="CueRecall-v0", env_kwargs=dict(horizon=5), eval_episodes=2, total_timesteps=60)
QUICK = {name: dict(learning_starts=20, batch_size=16, buffer_size=1000) for name in OFF_POLICY}
QUICK |= {name: dict(num_steps=18, num_minibatches=3, update_epochs=2) for name in ON_POLICY}


class Chance(torch.nn.Linear):
    """An expert that acts by chance."""

    z_dim, action_dim = 0, 1

    def act(self, obs, z, a_prev, deterministic):
        return 2 * torch.rand_like(a_prev) - 1, z


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
    for name in IMITATION:
        monkeypatch.setitem(QUICK[name], "demonstrations", demonstrations)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def module(script):
    return importlib.import_module(script)


def train(script="s2pg_sac", **options):
    """Train in this process; returns the folder of the run."""
    script = module(script)
    before = set(Path("runs").glob("*"))
    script.train(script.Args(**TASK | QUICK[script.__name__] | options))
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


def scalars(run, tag):
    """Steps and values that were logged under a tag."""
    events = EventAccumulator(str(run))
    events.Reload()
    logged = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
    return [event.step for event in logged], [event.value for event in logged]


def load(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def watch(monkeypatch, script, **spies):
    """Call `spies[name]` before each call of that method of the agents that `train` makes."""
    make = module(script).Agent

    def watched(*args):
        agent = make(*args)
        for name, spy in spies.items():
            method = getattr(agent, name)
            setattr(agent, name, lambda *a, f=method, spy=spy: [spy(*a), f(*a)][1])
        return agent

    monkeypatch.setattr(module(script), "Agent", watched)


class Watched(gym.vector.VectorWrapper):
    """Keeps what the environments were told and what they showed."""

    def __init__(self, env, events):
        super().__init__(env)
        self.events = events

    def reset(self, **options):
        result = self.env.reset(**options)
        self.events.append(("reset", options["seed"], *result))
        return result

    def step(self, action):
        result = self.env.step(action)
        self.events.append(("step", action, *result))
        return result


@pytest.fixture
def events(monkeypatch):
    """Those of the environments that s2pg_sac makes, in order."""
    kept, make_env = [], s2pg_sac.make_env
    monkeypatch.setattr(s2pg_sac, "make_env", lambda *args: Watched(make_env(*args), kept))
    return kept


@EACH
def test_train_resume_evaluate(script, monkeypatch, capsys):
    result = subprocess.run(command(script), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (run,) = Path("runs").iterdir()
    assert result.stdout.splitlines()[-1] == f"python evaluate.py {run}"
    assert "step 60: return_deterministic" in result.stdout
    assert "Warning" not in result.stderr and "60/60" in result.stderr
    args = json.loads((run / "args.json").read_text())
    assert args["env_kwargs"] == {"horizon": 5} and args["script"] == f"{script}.py"

    options = "--resume", run, "--total-timesteps", 120, "--checkpoint-frequency", 30
    module(script).train(parse(monkeypatch, *options, script=script))
    assert list(Path("runs").iterdir()) == [run] and load(run)["global_step"] == 120
    for tag in "return_deterministic", "return_stochastic":
        assert scalars(run, f"eval/{tag}")[0] == [60, 120]
    steps, returns = scalars(run, "charts/episodic_return")
    assert steps == list(range(5, 121, 5)) and all(-5 < value <= 5 for value in returns)
    # each 100 steps; three rollouts of 18 rows hold 15 steps each
    every = [100] if script in OFF_POLICY else list(range(15, 121, 15))
    documented = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    logged = EventAccumulator(str(run)).Reload().Tags()["scalars"]
    losses = [tag for tag in logged if tag.startswith("losses/")]
    assert len(losses) >= 3
    for tag in losses:
        assert scalars(run, tag)[0] == every
    assert {tag for tag in logged if f"`{tag}`" not in documented} == set()

    capsys.readouterr()
    evaluate.main(evaluate.Options(run, episodes=3))
    noise_free, stochastic = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"noise-free: return \S+ \+- \S+, length 5, 3 episodes", noise_free)
    assert stochastic.startswith("stochastic: return ")


def test_what_the_docs_say_is_logged_is_logged():
    scripts = "".join((ROOT / f"{name}.py").read_text() for name in OFF_POLICY + ON_POLICY)
    for page in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"`losses/(\w+)`", page.read_text()):
            assert re.search(rf"\b{name}\b", scripts), f"{page.name}: {name}"


# every option with a value that is not the usual one; together where they have naught in common
OPTIONS = dict(
    s2pg_sac=[
        dict(rnn="lstm", kernel="official", num_envs=3, save_buffer=True, eval_frequency=25),
        dict(rnn="rnn", refresh=False, privileged_critic=False, alpha_lr=0, alpha_z_lr=0),
        dict(memoryless=True, env_id="PointMassDoor-v0", env_kwargs={}, eval_episodes=1),
        dict(
            chrono=20, env_id="Hopper-v5", hide="positions",
            env_kwargs=dict(random_bodies=True, wind=True),
        ),
    ],
    bptt_sac=[
        dict(loss_on="last", sequence_length=3, rnn="rnn", num_envs=3, save_buffer=True),
        dict(sequence_length=1, privileged_critic=False, alpha_lr=0),
        dict(initial_state="zero", rnn="lstm", chrono=20),
    ],
    s2pg_td3=[
        dict(rnn="lstm", refresh=False, policy_frequency=1, num_envs=3),
        dict(rnn="rnn", privileged_critic=False, policy_frequency=3, save_buffer=True),
        dict(
            memoryless=True, exploration_noise=0, exploration_noise_z=0, policy_noise=0,
            noise_clip=0,
        ),
    ],
    bptt_ppo=[
        dict(rnn="lstm", sequence_length=3, privileged_critic=True, num_envs=3),
        dict(rnn="rnn", sequence_length=1, num_minibatches=100, num_steps=100),
        dict(num_steps=2, num_minibatches=1),
    ],
    s2pg_lsiq=[
        dict(rnn="lstm", loss="iq_like", num_envs=3, demonstration_episodes=1, save_buffer=True),
        dict(expert_target="bootstrap", regularizer=0.1, absorbing=False, privileged_critic=False),
        dict(memoryless=True, clip_target=False, refresh=False),
    ],
    s2pg_gail=[
        dict(rnn="lstm", reward="airl", absorbing=False, num_envs=3, demonstration_episodes=1),
        dict(privileged_critic=False, discriminator_steps=2, discriminator_entropy=0, num_steps=60),
        dict(memoryless=True),
    ],
    s2pg_ppo=[
        dict(rnn="lstm", privileged_critic=True, anneal_lr=False, norm_adv=False, num_envs=3),
        dict(rnn="rnn", clip_vloss=True, ent_coef=0.1, num_steps=2, num_minibatches=1),
        dict(target_kl=0.0),
        dict(memoryless=True, num_steps=1000, update_epochs=1),
    ],
)  # fmt: skip


@pytest.mark.parametrize("script, options", [(s, o) for s in OPTIONS for o in OPTIONS[s]])
def test_every_option_trains_saves_and_loads(script, options):
    run = train(script, **options)
    train(script, **options, resume=str(run), total_timesteps=90)
    assert load(run)["global_step"] >= 90
    evaluate.main(evaluate.Options(run, episodes=1))


def kill(script, signum, **options):
    """Kill a run after its first checkpoint; returns its folder, the last one and its output."""
    options = dict(total_timesteps=10**6, checkpoint_frequency=50) | options
    process = subprocess.Popen(
        command(script, **options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not list(Path().glob("runs/*/checkpoint.pt")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signum)
    out, _ = process.communicate(timeout=60)
    (run,) = Path("runs").iterdir()
    return run, load(run), process.returncode, out


@pytest.mark.parametrize(
    "signum, save_buffer",
    [("SIGINT", False), ("SIGTERM", True), ("SIGKILL", False), ("SIGKILL", True)],
)
def test_a_killed_run_resumes(signum, save_buffer):
    kept = dict(save_buffer=True) if save_buffer else {}
    signum = getattr(signal, signum)
    run, before, status, out = kill("s2pg_sac", signum, **kept)
    step = before["global_step"]
    assert step >= 50
    if signum == signal.SIGKILL:
        assert status == -signum
    else:
        assert status == 128 + signum
        assert out.splitlines()[-1] == f"stopped at step {step}; go on with --resume {run}"
    options = dict(resume=str(run), eval_frequency=0, **kept)
    # without its buffer, `learning_starts` steps come before the next update
    for steps in (15, 15 + 60):
        with pytest.raises(SystemExit) if steps == 15 and not kept else nothing():
            train(**options, total_timesteps=step + steps)
    after = load(run)
    assert after["global_step"] == step + 75
    assert not same(before["agent"], after["agent"])
    assert after["optimizers"][0]["state"][0]["step"] > before["optimizers"][0]["state"][0]["step"]


@pytest.mark.parametrize("script", ["s2pg_ppo", "s2pg_gail"])
def test_a_killed_run_of_rollouts_resumes(script):
    run, before, status, out = kill(script, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM and f"--resume {run}" in out
    train(script, resume=str(run), eval_frequency=0, total_timesteps=before["global_step"] + 60)
    assert load(run)["global_step"] == before["global_step"] + 60
    assert not same(before["agent"], load(run)["agent"])


@pytest.mark.parametrize("save_buffer", [False, True])
def test_a_resumed_run_learns_when_its_buffer_is_filled(save_buffer, monkeypatch):
    """At once if it was saved; else after `learning_starts` steps of the policy."""
    run, rows = train(save_buffer=save_buffer), []
    watch(monkeypatch, "s2pg_sac", update=lambda buffer: rows.append(int(buffer.steps)))
    monkeypatch.setattr(torch, "rand_like", lambda x: 1 / 0)  # random actions
    train(save_buffer=save_buffer, resume=str(run), total_timesteps=100, eval_frequency=0)
    # rows, with those that end an episode; the first update comes a row later
    assert rows[0] == (60 + 11 + 1 if save_buffer else 20 + 3)


@BOTH
def test_losses_that_blow_up_stop_the_run_and_spare_the_checkpoint(script):
    rates = ["actor_lr", "critic_lr"] if script == "s2pg_sac" else ["learning_rate"]
    options = dict.fromkeys(rates, 1e38) | dict(checkpoint_frequency=15, total_timesteps=1000)
    with pytest.raises(SystemExit, match="not finite") as exit_info:
        train(script, **options)
    (run,) = Path("runs").iterdir()
    assert str(run) in exit_info.value.code
    assert all(value.isfinite().all() for value in load(run)["agent"].values())


def agent_of(script="s2pg_sac", **options):
    script = module(script)
    args = script.Args(**TASK | QUICK[script.__name__] | options)
    return script.Agent(args, script.make_env(args, 1), torch.device("cpu"))


@pytest.mark.parametrize(
    "script, name, more", [("s2pg_sac", "save_checkpoint", [None]), ("s2pg_ppo", "save_run", [])]
)
def test_what_cannot_be_saved_whole_leaves_the_last_checkpoint(
    script, name, more, tmp_path, monkeypatch
):
    agent, save = agent_of(script), getattr(module(script), name)
    save(tmp_path, agent, *more, global_step=1)
    good = (tmp_path / "checkpoint.pt").read_bytes()
    list(agent.actor.parameters())[-1].data[0] = torch.nan
    with pytest.raises(SystemExit, match="not finite"):
        save(tmp_path, agent, *more, global_step=2)
    list(agent.actor.parameters())[-1].data[0] = 0

    def torn(state, path):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, agent, *more, global_step=2)
    assert (tmp_path / "checkpoint.pt").read_bytes() == good


def test_a_checkpoint_within_a_rollout_is_that_of_the_last_update(monkeypatch):
    """What was played since then taught nothing, so it is played again."""
    saved, weights, ppo = [], [], module("s2pg_ppo")

    def save_run(run_dir, agent, global_step, seconds):
        saved.append(global_step)
        weights.append({name: value.clone() for name, value in agent.state_dict().items()})

    monkeypatch.setattr(ppo, "save_run", save_run)
    train("s2pg_ppo", total_timesteps=50, checkpoint_frequency=10, eval_frequency=0)
    assert saved == [0, 15, 15, 30, 50]  # rollouts of 18 rows hold 15 steps
    assert [same(*pair) for pair in itertools.pairwise(weights)] == [False, True, False, False]


def state_of(agent):
    """All numbers that an agent holds, registered or not, by where they lie."""
    state = {k: v for k, v in vars(agent).items() if torch.is_tensor(v) or isinstance(v, int)}
    state |= agent.state_dict()
    for i, optimizer in enumerate(agent.optimizers):
        for j, slots in optimizer.state_dict()["state"].items():
            state |= {f"{i}.{j}.{name}": value for name, value in slots.items()}
    return {name: torch.as_tensor(value) for name, value in state.items()}


@EACH
def test_a_checkpoint_restores_everything(script, monkeypatch):
    """Networks, targets, optimisers, temperatures, normalisers, counters."""
    agents = []
    make = module(script).Agent
    monkeypatch.setattr(module(script), "Agent", lambda *a: agents.append(make(*a)) or agents[-1])
    run = train(script, eval_frequency=0)
    monkeypatch.setattr(module(script), "SummaryWriter", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # just before it would go on
        train(script, resume=str(run), total_timesteps=1000, eval_frequency=0)
    trained, loaded = map(state_of, agents)
    assert trained.keys() == loaded.keys() and any("exp_avg_sq" in name for name in trained)
    assert same(trained, loaded)


DAMAGE = dict(
    cut=None, foreign=dict(model=torch.zeros(3)), text=b"not a checkpoint", torn=b"torn", gone=None,
    other_script=dict(sequence_length=3), no_script={}, seed=dict(seed="one"),
    num_envs=dict(num_envs="two"), shapes=["--state-dim", "7"], buffer=["--buffer-size", "500"],
)  # fmt: skip


@pytest.mark.parametrize(
    "script, name",
    [("s2pg_sac", name) for name in DAMAGE] + [("s2pg_ppo", "torn"), ("s2pg_ppo", "shapes")],
)
def test_an_unusable_run_is_answered_in_a_sentence_and_left_as_it_is(script, name, monkeypatch):
    kept = dict(save_buffer=True) if script == "s2pg_sac" else {}
    run, damage, options = train(script, eval_frequency=0, **kept), DAMAGE[name], []
    file = run / "checkpoint.pt"
    if name == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    elif name == "foreign":
        torch.save(damage, file)
    elif name == "gone":
        file.unlink()
    elif isinstance(damage, bytes):
        file.write_bytes(damage)
    elif isinstance(damage, list):
        options = damage
    else:
        known = {} if name == "no_script" else dict(script="s2pg_sac.py")
        (run / "args.json").write_text(json.dumps(damage | known))
    before = {path: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(SystemExit) as exit_info:
        options = "--resume", run, "--total-timesteps", 100, *options
        module(script).train(parse(monkeypatch, *options, script=script))
    assert isinstance(exit_info.value.code, str) and str(run) in exit_info.value.code
    assert {path: path.read_bytes() for path in run.iterdir()} == before


BAD = [
    ("s2pg_sac", "--env-id Hoper-v4", "Hoper"),
    ("s2pg_sac", "--env-id CartPole-v1", "Box"),
    ("s2pg_sac", "--env-id nowhere:Robot-v0", "nowhere"),
    ("s2pg_sac", "--env-id CueRecall-v0 --hide velocities", "CueRecall-v0"),
    ("s2pg_sac", "--env-id CueRecall-v0 --env-kwargs horizn 3", "horizn"),
    ("s2pg_sac", "--hide velocity", "velocity"),
    ("s2pg_sac", "--num-envs 0", "--num-envs must be in [1, inf]"),
    ("s2pg_sac", "--gamma 1.5", "--gamma must be in"),
    ("s2pg_sac", "--gamma nan", "--gamma must be in"),
    ("s2pg_sac", "--buffer-size 5 --num-envs 2", "--buffer-size must be in [8, inf]"),
    ("s2pg_sac", "--learning-starts 1", "--learning-starts must be in [4, inf]"),
    ("s2pg_sac", "--log-std-z-max -3", "--target-entropy-z must be in [-3.5, -1.6]"),
    ("s2pg_sac", "--chrono 20 --rnn rnn", "--rnn gru or lstm"),
    ("s2pg_sac", "--resume nothing", "nothing is no run of this script"),
    ("s2pg_sac", "--no-such-option", "no-such-option"),
    ("s2pg_sac", "--total-timesteps 5000 --learning-starts 5000", "no update before step 5000"),
    ("s2pg_ppo", "--num-steps 1", "--num-steps must be in"),
    ("s2pg_ppo", "--gae-lambda 1.5", "--gae-lambda must be in [0, 1]"),
    ("s2pg_ppo", "--num-minibatches 50 --num-steps 20 --num-envs 2", "must be in [1, 40]"),
    ("s2pg_ppo", "--total-timesteps 0", "raise --total-timesteps"),
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
]
if not torch.cuda.is_available():
    BAD += [("s2pg_sac", f"--{option}", "need a CUDA card") for option in ("compile", "cudagraphs")]


@pytest.mark.parametrize("script, options, says", BAD)
def test_bad_input_is_answered_in_a_sentence(script, options, says, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_info:
        module(script).train(parse(monkeypatch, *options.split(), script=script))
    code = exit_info.value.code
    assert code not in (None, 0) and says in (str(code) + capsys.readouterr().err)
    assert not Path("runs").exists()


@pytest.mark.parametrize("options", [dict(env_id="Hoper-v4"), dict(gamma=2), dict(resume="no")])
def test_a_refusal_ends_the_program_with_one_line_and_status_1(options):
    result = subprocess.run(command("s2pg_sac", **options), capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1


@EACH
def test_every_number_has_a_range_in_which_its_default_lies(script):
    """Or is one of these, which do no harm."""
    free = {"total_timesteps", "chrono", "num_threads", "demonstration_episodes"}
    for option in dataclasses.fields(module(script).Args):
        if option.type in (int, float, int | None, float | None) and option.name not in free:
            with pytest.raises(SystemExit, match=option.name.replace("_", "-")):
                module(script).Args(**{option.name: float("nan")})


def test_a_resumed_run_that_would_end_before_its_first_update_says_so():
    run = train(eval_frequency=0)
    for steps in (60, 80):
        with pytest.raises(SystemExit, match="no update before step 80: raise --total-timesteps"):
            train(resume=str(run), total_timesteps=steps)
    assert load(run)["global_step"] == 60
    train(resume=str(run), total_timesteps=81)


@EACH
def test_tuned_options_come_between_the_defaults_and_the_command_line(script, monkeypatch):
    tuned = module(script).TUNED
    for name, options in tuned.items():
        args = parse(monkeypatch, "--env-id", f"{name}-v4", script=script)
        assert {k: getattr(args, k) for k in options} == options
    assert parse(monkeypatch, script=script).hide == "velocities"
    options = "--env-id", "Humanoid-v4", "--hide", "positions"
    assert parse(monkeypatch, *options, script=script).hide == "positions"


def test_options_for_the_environment_have_their_types(monkeypatch):
    options = ["--env-kwargs", "horizon", "7", "wind", "True", "scale", "0.5", "name", "two"]
    args = parse(monkeypatch, *options)
    assert args.env_kwargs == dict(horizon=7, wind=True, scale=0.5, name="two")
    assert type(args.env_kwargs["wind"]) is bool and type(args.env_kwargs["horizon"]) is int


def test_options_beside_a_run_replace_its_own(tmp_path, monkeypatch, capsys):
    own = dict(env_id="CueRecall-v0", env_kwargs=dict(horizon=5), gamma=0.9, hide="none")
    (tmp_path / "args.json").write_text(json.dumps(own | dict(script="s2pg_sac.py")))
    args = parse(monkeypatch, "--resume", tmp_path)
    assert {k: getattr(args, k) for k in own} == own and args.resume == str(tmp_path)
    args = parse(monkeypatch, "--gamma", 0.8, "--resume", tmp_path, "--env-kwargs", "horizon", 7)
    changed = own | dict(gamma=0.8, env_kwargs={"horizon": 7})
    assert {k: getattr(args, k) for k in own} == changed

    for options, default in [
        (["--env-id", "InvertedPendulum-v4"], "hide velocities"),
        (["--env-id", "CueRecall-v0"], "hide none"),
        (["--resume", tmp_path], "gamma 0.9"),
    ]:  # --help has the defaults of the task, or of the run
        with pytest.raises(SystemExit) as exit_info:
            parse(monkeypatch, *options, "--help")
        words = capsys.readouterr().out.replace("\u2502", " ").split()
        name, value = default.split()
        after = words.index(f"--{name}")
        assert exit_info.value.code == 0
        assert f"(default: {value})" in " ".join(words[after : after + 60])


def test_tracking_names_the_run_and_without_wandb_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises((ModuleNotFoundError, SystemExit), match="wandb"):
        train(track=True)
    told = []
    wandb = types.SimpleNamespace(init=lambda **options: told.append(options))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = train(track=True, eval_frequency=0)
    train(track=True, eval_frequency=0, resume=str(run), total_timesteps=90)
    for options in told:  # a resumed run goes on under its own name
        assert options["id"] == run.name[-64:] and options["resume"] == "allow"
        assert options["sync_tensorboard"] and options["config"]["env_kwargs"] == dict(horizon=5)


@pytest.mark.parametrize("num_envs", [1, 2, 3])
@BOTH
def test_each_episode_is_logged_at_its_own_step(script, num_envs):
    """Environments that finish together do not overwrite one another; autoreset is no step."""
    run = train(script, num_envs=num_envs, eval_frequency=0)
    steps, lengths = scalars(run, "charts/episodic_length")
    assert len(steps) == len(set(steps)) == 60 // 5
    assert set(lengths) == {5} and max(steps) == 60


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
    seeds = [event[1] for event in events if event[0] == "reset"]
    seeds = sorted(set(seeds))  # an evaluation plays the same episodes twice
    assert len(seeds) == 2 * (2 + 3) and np.diff(seeds).min() > 8


def test_seconds_are_those_of_training_alone_and_go_on_in_a_resumed_run(monkeypatch):
    evaluations = []

    def evaluate_for_a_week(*args):
        assert list(Path().glob("runs/*/checkpoint.pt"))  # in case that it fails
        evaluations.append(args)
        return dict(return_deterministic=0.0)

    def clock():
        return time.time() + 604_800 * len(evaluations)

    monkeypatch.setattr(envs, "returns", evaluate_for_a_week)
    monkeypatch.setattr(s2pg_sac, "time", types.SimpleNamespace(time=clock))
    options = dict(checkpoint_frequency=20, eval_frequency=20)
    run = train(total_timesteps=40, **options)
    assert len(evaluations) == 2 and 0 < load(run)["seconds"] < 600
    torch.save(load(run) | dict(seconds=7200.0), run / "checkpoint.pt")
    train(total_timesteps=120, **options, resume=str(run))
    assert len(evaluations) == 6 and 7200 < load(run)["seconds"] < 7800
    (step,), (speed,) = scalars(run, "charts/SPS")
    assert step == 100 and 100 / 7800 < speed < 100 / 7200
    steps, seconds = scalars(run, "charts/seconds")
    assert steps == [20, 40, 60, 80, 100, 120] and seconds == sorted(seconds)


def test_the_buffer_holds_what_the_environments_showed(events, monkeypatch):
    """To the policy and to the critic, across episodes; and what it gave for the actions there."""
    buffers, make = [], s2pg_sac.TransitionBuffer
    monkeypatch.setattr(
        s2pg_sac, "TransitionBuffer", lambda *args: buffers.append(make(*args)) or buffers[0]
    )
    task = dict(env_id="InvertedPendulum-v4", env_kwargs={}, hide="velocities")
    train(**task, num_envs=2, learning_starts=70, total_timesteps=80, eval_frequency=0)
    (_, _, obs, _), *steps = events
    assert buffers[0].steps == len(steps) >= 40
    first, final = np.ones(2), np.zeros(2)
    for row, (_, action, next_obs, reward, terminated, truncated, _) in enumerate(steps):
        columns = buffers[0].columns(buffers[0].rows[2 * row : 2 * row + 2])
        shown = obs["policy"], obs["critic"], action, reward, terminated, first
        for value, column in zip(shown, columns[:2] + columns[3:]):
            assert np.array_equal(np.asarray(value, np.float32), column)
        first, final, obs = final, terminated | truncated, next_obs
    assert len(buffers) == 1 and 4 < buffers[0].rows[:, -1].sum() < 40


@BOTH
def test_internal_state_and_previous_action_begin_anew_with_the_episode(script, monkeypatch):
    """An episode of T steps fills T + 1 rows; the next begins with zeros."""
    given = []
    watch(monkeypatch, script, act=lambda *args: given.append([x.clone() for x in args[-2:]]))
    rollout = dict(num_steps=1000) if script == "s2pg_ppo" else {}  # no row without an action
    train(script, eval_frequency=0, **rollout)
    for row, (z, a_prev) in enumerate(given[:71]):  # 60 steps and 11 final rows
        fresh = row % 6 == 0
        assert bool(z.any()) != fresh and bool(a_prev.any()) != fresh


def test_the_policy_is_told_its_last_action_and_its_last_internal_state(events, monkeypatch):
    """Also in the rows before learning starts, whose actions are random."""
    given, make = [], s2pg_sac.StochasticStatefulActor.act

    def act(self, obs, z, a_prev, deterministic=False):
        action, z_next = make(self, obs, z, a_prev, deterministic)
        given.append((z, a_prev, z_next))
        return action, z_next

    monkeypatch.setattr(s2pg_sac.StochasticStatefulActor, "act", act)
    train(eval_frequency=0)
    steps = [event for event in events if event[0] == "step"]
    for row, (_, action, *_) in enumerate(steps[:-1]):
        z, a_prev, _ = given[row + 1]
        if (row + 1) % 6:
            assert np.array_equal(a_prev, action) and torch.equal(z, given[row][2])
    random = np.array([step[1] for step in steps[:24]])
    assert abs(random).max() <= 1 and random.min() < -0.5 and random.max() > 0.5


def test_updates_come_between_the_action_and_the_step_and_are_counted_by_steps(events, monkeypatch):
    """A card works on them while the environment steps, and the action does not wait for them."""
    spies = {name: lambda *args, name=name: events.append((name,)) for name in ("act", "update")}
    watch(monkeypatch, "s2pg_sac", **spies)
    train(num_envs=3, learning_starts=12, total_timesteps=60, eval_frequency=0)
    names = [event[0] for event in events]
    # three for each step of three environments, none in the row that ends three episodes
    rows = " ".join(names).replace("update update update", "learn").split(" act ")
    assert rows[0] == "reset" and set(rows[1:]) == {"step", "learn step"}
    learning = [row == "learn step" for row in rows[1:]]
    assert learning == [row >= 4 and row % 6 != 0 for row in range(len(learning))]


def test_a_script_alone_trains_with_an_environment_in_the_place_of_ours():
    """Without the folder `envs`, any vector environment; a plain Box is seen by both."""
    text = (ROOT / "s2pg_sac.py").read_text()
    begin, end = text.index("    import envs\n\n    options = dict(hide"), text.index("def views(")
    mine = "    from my_robot import make\n\n    return make(num_envs)\n\n\n"
    Path("my_sac.py").write_text(text[:begin] + mine + text[end:])
    Path("my_robot.py").write_text(ROBOT)
    options = command("s2pg_sac", env_id="mine", env_kwargs={}, num_envs=2, eval_frequency=0)
    options[1] = "my_sac.py"
    result = subprocess.run(options, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (run,) = Path("runs").iterdir()
    assert set(scalars(run, "charts/episodic_return")[1]) == {7.0}
    assert load(run)["global_step"] == 60
    assert json.loads((run / "args.json").read_text())["script"] == "my_sac.py"


ROBOT = """
import gymnasium as gym
import numpy as np
class Robot(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (3,), dtype=np.float64)
    action_space = gym.spaces.Box(-1, 1, (2,))
    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.random(3), {}
    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        return self.np_random.random(3), 1.0, False, self.t == 7, {}
class Faulty(Robot):
    def step(self, action):
        return np.zeros(3) + np.zeros(2), 1.0, False, False, {}
def make(num_envs):
    mode = gym.vector.AutoresetMode.NEXT_STEP
    one = lambda: gym.wrappers.RecordEpisodeStatistics(Robot())
    return gym.vector.SyncVectorEnv([one] * num_envs, autoreset_mode=mode)
gym.register("Robot-v0", Robot)
gym.register("Faulty-v0", Faulty, disable_env_checker=True)
"""


@pytest.mark.parametrize("name", ["Robot", "Faulty"])
def test_your_own_environment_trains_and_its_bugs_keep_their_traceback(name):
    Path("my_robot.py").write_text(ROBOT)
    result = subprocess.run(
        command("s2pg_sac", env_id=f"my_robot:{name}-v0", env_kwargs={}),
        env=os.environ | dict(PYTHONPATH="."), capture_output=True, text=True,
    )  # fmt: skip
    if name == "Robot":
        assert result.returncode == 0, result.stderr
        (run,) = Path("runs").iterdir()  # its episodes are truncated, and that is no step either
        assert scalars(run, "charts/episodic_return") == (list(range(7, 61, 7)), [7.0] * 8)
    else:
        assert result.returncode == 1 and "Traceback" in result.stderr
        assert "my_robot.py" in result.stderr and "could not be broadcast" in result.stderr


def test_a_resumed_run_does_not_clone_again(monkeypatch):
    run = train("s2pg_gail", bc_steps=2)
    assert scalars(run, "losses/bc_loss")[0] == [0]
    assert scalars(run, "eval/return_stochastic")[0] == [0, 60]
    monkeypatch.delattr(module("s2pg_gail").Agent, "clone")
    train("s2pg_gail", bc_steps=2, resume=str(run), total_timesteps=90)
    assert load(run)["global_step"] == 90


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card, and none to emulate")
@EACH
def test_a_run_on_a_card_is_the_run_on_the_cpu(script):
    """With graphs; and the host waits for the card once a row, to learn what to do."""
    kept = dict(save_buffer=True) if script in OFF_POLICY else {}
    options = dict(total_timesteps=40, eval_frequency=0) | kept
    words = command(script, cudagraphs=True, **options)
    words.insert(1, str(ROOT / "tests" / "emulated_card.py"))
    result = subprocess.run(
        words, env=os.environ | dict(COUNTS="counts.json"), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (card,) = map(load, Path("runs").iterdir())
    cpu = load(train(script, **options))
    assert card.keys() == cpu.keys()
    pairs = list(zip(tree_leaves(card), tree_leaves(cpu), strict=True))
    tensors = [pair for pair in pairs if torch.is_tensor(pair[0])]
    assert len(tensors) > 30 and all(torch.equal(*pair) for pair in tensors)

    counts = json.loads(Path("counts.json").read_text())
    if script in OFF_POLICY:
        rows = 40 + 7  # seven episodes have ended and begun anew
        assert counts["waits"]["train"] == 1 + rows  # once before the first, for the buffer's size
        assert counts["launches"]["replay of act"] == rows - 3 + 3 * rows  # of arguments
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
