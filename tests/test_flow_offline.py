"""benchmark/flow_offline.py: a fixed noise with its drift, flow matching, both phases of a run."""

import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_flow_sac
import torch
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_flow_sac import ACTION, BATCH, CPU, ENV, OBS, VELOCITIES, filled
from torch import nn
from torch.distributions import Normal

import envs.demonstrations
import flow_sac
from benchmark import collect, flow_offline

ROOT = Path(__file__).resolve().parent.parent
seen = functools.partial(test_flow_sac.seen, state=0)
pytestmark = pytest.mark.usefixtures("double_precision")


def make_actor(kind=flow_offline.FixedNoiseActor, **options):
    return kind(OBS, ACTION, flow_offline.Args(**dict(flow_width=16) | options))


def make_agent(monkeypatch, **options):
    """With a buffer of random rows."""
    if options.get("noise") == "fixed":
        monkeypatch.setattr(flow_sac, "FlowActor", flow_offline.FixedNoiseActor)
    agent = flow_offline.DataAgent(flow_offline.Args(batch_size=64, **options), ENV, CPU)
    buffer = filled(agent)
    buffer.rows_of_data = 100
    return agent, buffer


# --- the fixed noise ------------------------------------------------------------------------------


@pytest.mark.parametrize("velocity", VELOCITIES)
def test_the_density_is_that_of_every_gaussian_on_the_path(velocity):
    """Step by step, with the drift as the paper writes it: its equations, other code."""
    actor = make_actor(velocity=velocity, sigma=0.3)
    obs, z, a_prev = seen()
    g, log_std, _ = actor(obs, z, a_prev)
    K, std = actor.steps, torch.full((BATCH, ACTION), 0.3 / actor.steps**0.5)
    noise = torch.randn(K + 1, BATCH, ACTION)
    path, log_prob = actor.path(obs, g, log_std, noise)
    x = path[0]
    expected = torch.zeros_like(x) if velocity == "none" else Normal(0.0, 1.0).log_prob(x)
    context = actor.velocity.context(torch.cat([obs, g], -1))
    for k, after in enumerate(path[1:]):
        t = k / K
        v = actor.velocity.forward(context, x, torch.full((BATCH, 1), t))
        v = (1 - t + t * 0.3**2 / 2) / (1 - t) * v - 0.3**2 / (2 * (1 - t)) * x
        torch.testing.assert_close(after, x + v / K + std * noise[k + 1])
        expected, x = expected + Normal(x + v / K, std).log_prob(after), after
    torch.testing.assert_close(log_prob, expected - torch.log(1 - torch.tanh(x).square()))


class Known(nn.Module):
    """The velocity of the flow from N(0, 1) to N(mean, std^2)."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std

    def context(self, obs):
        return None

    def forward(self, context, x, t):
        variance = (1 - t).square() + (t * self.std).square()
        return self.mean + (t * self.std**2 - (1 - t)) / variance * (x - t * self.mean)


@pytest.mark.parametrize("corrected, low, high", [(True, 0.39, 0.41), (False, 0.52, 9)])
def test_the_drift_keeps_the_distribution_of_the_action(corrected, low, high):
    """A flow to N(1.5, .4^2), with noise of .5: uncorrected, x_K spreads to .55."""
    actor = make_actor(flow_steps=64, sigma=0.5)
    actor.velocity = Known(1.5, 0.4)
    if corrected:
        actor.velocity.register_forward_hook(actor.drift)
    obs, z, a_prev = seen(20_000)
    g, log_std, _ = actor(obs, z, a_prev)
    path, _ = actor.path(obs, g, log_std, torch.randn(65, 20_000, ACTION))
    assert low < path[-1].std() < high
    assert abs(path[-1].mean() - 1.5) < 0.03


@pytest.mark.parametrize("velocity", VELOCITIES)
def test_what_is_played_without_noise_has_no_drift(velocity):
    actor = make_actor(velocity=velocity, sigma=0.5)
    other = make_actor(flow_sac.FlowActor, velocity=velocity)
    with pytest.raises(RuntimeError, match="fixed_noise"):  # by which evaluate.py refuses it
        other.load_state_dict(actor.state_dict())
    other.load_state_dict(actor.state_dict(), strict=False)
    inputs, losses = seen(), []
    names = dict(zip(("obs", "z", "a_prev"), inputs))
    batch = SimpleNamespace(**names, action=0.9 * inputs[2], weight=torch.ones(BATCH) / BATCH)
    for which in actor, other:
        torch.manual_seed(2)
        losses.append(flow_offline.flow_matching_loss(which, batch))
    assert torch.equal(*losses)  # so what is matched has none, either
    free, learned = (which.act(*inputs, deterministic=True)[0] for which in (actor, other))
    assert torch.equal(free, learned)
    torch.manual_seed(1)
    played, _ = actor.act(*inputs)
    torch.manual_seed(1)
    assert torch.equal(played, actor.sample(*inputs)[0])  # with the drift again


# --- losses ---------------------------------------------------------------------------------------


def test_flow_matching_learns_both_modes_of_the_data():
    """Actions of +-.9, after the tanh: the flow is matched before it, and without the drift."""
    torch.set_default_dtype(torch.float32)
    actor = make_actor(velocity="mlp", flow_steps=8, flow_width=64, sigma=1.0)
    optimizer = torch.optim.Adam(actor.parameters(), 3e-3)
    for _ in range(600):
        side = torch.randint(0, 2, (256, 1)) * 1.8 - 0.9
        batch = SimpleNamespace(
            obs=torch.zeros(256, OBS), z=torch.zeros(256, 0), a_prev=torch.zeros(256, ACTION),
            action=side.expand(-1, ACTION), weight=torch.full((256,), 1 / 256),
        )  # fmt: skip
        flow_sac.descend(optimizer, flow_offline.flow_matching_loss(actor, batch))
    actor.draw_x0 = True
    a, _ = actor.act(batch.obs, batch.z, batch.a_prev, deterministic=True)
    assert 0.85 < a.abs().mean() < 0.95
    assert 0.3 < (a[:, 0] > 0).float().mean() < 0.7


@pytest.mark.parametrize("overwritten", [0, 40])
def test_the_pull_is_towards_the_actions_of_the_data(monkeypatch, overwritten):
    """Of its first 100 rows, but for those whose place in the ring has a newer one."""
    agent, buffer = make_agent(monkeypatch, beta=2.0)
    agent.buffer, losses = buffer, []
    buffer.steps += buffer.slots - buffer.steps + overwritten
    batch = buffer.sample(200)
    for loss in flow_sac.soft_actor_loss, agent.pulled_loss:
        torch.manual_seed(4)
        losses.append(loss(agent.actor, agent.critic, batch, 0.1, 0.1)[0])
    torch.manual_seed(4)
    a, *_ = agent.actor.sample(batch.obs, batch.z, batch.a_prev)
    row = (batch.after - 1) % buffer.slots
    of_data = (row >= overwritten) & (row < 100)
    assert 0 < of_data.sum() < 200
    pull = (batch.weight * of_data * (a - batch.action).square().sum(-1)).sum()
    torch.testing.assert_close(losses[1] - losses[0], 2 * pull)


@pytest.mark.parametrize("noise", ["learned", "fixed"])
def test_an_update_matches_the_flow_offline_alone(monkeypatch, noise):
    agent, buffer = make_agent(monkeypatch, noise=noise, beta=0.5)
    before, logs, steps, descend = agent.log_alpha.item(), [], [], flow_sac.descend
    matching = flow_offline.flow_matching_loss
    monkeypatch.setattr(flow_offline, "flow_matching_loss", lambda *x: 1e6 + matching(*x))
    monkeypatch.setattr(flow_sac, "descend", lambda *x: steps.append(x[1].item()) or descend(*x))
    for update, matches in (agent.offline_update, True), (agent.update, False):
        start = {k: v.clone() for k, v in agent.state_dict().items()}
        logs.append(update(buffer))
        moved = {k.split(".")[0] for k, v in agent.state_dict().items() if (v != start[k]).any()}
        assert moved >= {"actor", "critic", "target_critic"}
        assert (steps[-1] > 1e5) == matches and logs[-1]["losses/actor_loss"] < 1e5
    assert logs[0].keys() - logs[1].keys() == {"losses/flow_matching_loss"}
    # the entropy of a fixed noise cannot follow a temperature
    assert (agent.log_alpha.item() == before) == (noise == "fixed")


# --- data and runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_envs", [1, 3])
def test_no_transition_of_the_data_crosses_an_episode(num_envs):
    torch.set_default_dtype(torch.float32)
    args = flow_offline.Args(demonstrations="shipped:stochastic", num_envs=num_envs)
    env = flow_sac.make_env(args, 1)
    buffer = flow_sac.TransitionBuffer(6000, num_envs, 4, 0, 0, 1, CPU)
    flow_offline.fill(buffer, args, env)
    episodes = envs.demonstrations.load(args.demonstrations, env)
    steps = {}
    for e in episodes:
        successors, columns = e["observations"][1:], (e["actions"], e["rewards"], e["terminations"])
        for obs, *step in zip(e["observations"], successors, *columns):
            steps[obs.tobytes()] = step
    batch = buffer.sample(2000)
    for i in batch.weight.nonzero().flatten():
        found = batch.next_obs[i], batch.action[i], batch.reward[i], batch.terminated[i]
        expected = steps[batch.obs[i].numpy().tobytes()]
        assert all((one.detach().numpy() == other).all() for one, other in zip(found, expected))
    assert (batch.weight > 0).float().mean() > 0.99
    last = int(buffer.rows.any(-1).nonzero().max())  # row with data
    assert buffer.rows_of_data == (last // num_envs + 1) * num_envs


SMALL = "--demonstrations shipped:stochastic --offline-steps 400 --batch-size 16 --eval-episodes 1"
SMALL = f"{SMALL} --total-timesteps 120 --flow-width 8 --eval-frequency 1000".split()


def test_a_run_stopped_offline_goes_on_offline_and_then_online(tmp_path):
    """It is evaluated when the updates on the demonstrations are done, and not before."""
    command = [sys.executable, str(ROOT / "benchmark/flow_offline.py")]
    options = dict(cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process = subprocess.Popen([*command, *SMALL], **options)
    while not list(tmp_path.glob("runs/*/events*")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGHUP, output
    (run,) = tmp_path.glob("runs/*")
    assert f"go on with flow_offline.py --resume {run.relative_to(tmp_path)}" in output
    stopped = torch.load(run / "checkpoint.pt", weights_only=True)["global_step"]
    assert -400 <= stopped < 0
    with FileLock(run / "lock"):
        done = subprocess.run([*command, "--resume", str(run)], **options)
        assert done.returncode == 1 and "another process trains" in done.stdout, done.stdout
    done = subprocess.run([*command, "--resume", str(run), "--beta", "0.1"], **options)
    assert done.returncode == 0 and "random actions until step 0," in done.stdout, done.stdout
    assert torch.load(run / "checkpoint.pt", weights_only=True)["global_step"] == 120
    events = EventAccumulator(str(run)).Reload()
    steps = {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert steps["offline_losses/flow_matching_loss"][-1] == 0 and steps["losses/qf_loss"] == [100]
    assert steps["eval/return_stochastic"] == [0, 120]
    assert json.loads((run / "offline.json").read_text())["beta"] == 0.1
    assert json.loads((run / "args.json").read_text())["learning_starts"] > 0  # as was asked for
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", run, "--episodes", "1"], **options)
    assert done.returncode == 0 and "stochastic: return" in done.stdout, done.stdout
    rows = collect.evaluations(run)
    options = [json.loads(row[collect.COLUMNS.index("options")]) for row in rows]
    assert [option["offline_steps"] for option in options] == [400, 400]


def test_a_run_killed_in_its_evaluation_at_step_0_repeats_it(tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    for name in "Agent", "load_checkpoint":  # which a run replaces
        monkeypatch.setattr(flow_sac, name, getattr(flow_sac, name))
    load_checkpoint, scored = flow_sac.load_checkpoint, []

    def score(env, agent, episodes, seed, writer, step):
        scored.append(step)
        assert len(scored) > 1, "killed"

    monkeypatch.setattr(envs.Together, "score", score)
    options = "--offline-steps", "3", "--save-buffer"
    monkeypatch.setattr(sys, "argv", ["flow_offline.py", *SMALL, *options])
    with pytest.raises(AssertionError, match="killed"):
        flow_offline.train(flow_offline.parse_args())
    (run,) = tmp_path.glob("runs/*")
    rows = []
    for last in "120", "130":  # the second goes on online, with the buffer as it was
        monkeypatch.setattr(flow_sac, "load_checkpoint", load_checkpoint)
        argv = ["flow_offline.py", "--resume", str(run), "--total-timesteps", last]
        monkeypatch.setattr(sys, "argv", argv)
        flow_offline.train(flow_offline.parse_args())
        rows.append(int(torch.load(run / "checkpoint.pt", weights_only=True)["steps"]))
    assert scored == [0, 0, 120, 130] and 10 <= rows[1] - rows[0] < 20
    monkeypatch.setattr(sys, "argv", ["flow_offline.py", "--resume", str(run), *options[:1], "4"])
    with pytest.raises(SystemExit, match="--offline-steps of a run cannot be changed"):
        flow_offline.parse_args()


@pytest.mark.parametrize(
    "options, message",
    [
        ("", "--demonstrations FILE.npz or minari:NAME is needed"),
        ("--demonstrations nowhere.npz", "there are no demonstrations at nowhere.npz"),
        (
            "--demonstrations shipped:stochastic --buffer-size 100 --learning-starts 50",
            "too short for --num-envs, or long for --buffer-size",
        ),
        ("--demonstrations a.npz --beta -1", "--beta must be at least 0"),
        ("--demonstrations a.npz --noise fixed --sigma 0", r"--sigma must be in \[0.001, 1\]"),
        ("--resume nowhere", "nowhere is no run of this script"),
    ],
)
def test_bad_input_is_told_in_a_sentence(options, message, tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    for name in "Agent", "FlowActor", "load_checkpoint":  # which a run replaces
        monkeypatch.setattr(flow_sac, name, getattr(flow_sac, name))
    monkeypatch.setattr("sys.argv", ["flow_offline.py", *options.split()])
    with pytest.raises(SystemExit, match=message):
        flow_offline.train(flow_offline.parse_args())
    assert not list(tmp_path.iterdir())
