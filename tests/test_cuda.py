"""What is for CUDA: graphs, compiled losses, copies to the device.

Graphs are emulated on the CPU (recording.py), and whole runs on a card that is none
(emulated_card.py). So these tests see what a card would refuse and what a graph would get wrong: an
operand on the host, a branch on it, a number read from the device, a tensor that is not the same
one in each call. Those at the end need a card, and show that it does the same.
"""

import contextlib
import copy
import functools

import numpy as np
import pytest
import torch
from recording import NoStream, Recording

import bptt_ppo
import bptt_sac
import s2pg_gail
import s2pg_lsiq
import s2pg_ppo
import s2pg_sac
import s2pg_td3

CPU = torch.device("cpu")
OFF_POLICY, ON_POLICY = (s2pg_sac, bptt_sac, s2pg_td3, s2pg_lsiq), (s2pg_ppo, s2pg_gail)
SIZES = 3, 5, 2  # of o, s and a


def each(*scripts):
    return pytest.mark.parametrize("script", scripts, ids=lambda script: script.__name__)


@pytest.fixture
def graphs(monkeypatch):
    """All graphs captured so far, by an emulated CUDA."""
    made = []

    def graph():
        made.append(Recording())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda recording: recording)
    monkeypatch.setattr(torch.cuda, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "current_stream", NoStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return made


def row(step, device):
    """Row `step` of a buffer, with episodes of 7 rows, the last of some a termination."""
    generator = torch.Generator().manual_seed(step)
    o, s, a = SIZES
    obs, critic_obs, action = (torch.randn(1, d, generator=generator) for d in (o, s, a))
    terminated = np.array([step % 7 == 5 and step % 2 == 0])
    first, reward = np.array([step % 7 == 0]), np.array([float(step % 3)])
    seen = obs.to(device), critic_obs.to(device)
    return *seen, torch.tanh(action).to(device), reward, terminated, first


def add(buffer, step):
    obs, critic_obs, action, reward, terminated, first = row(step, buffer.device)
    z = torch.full((1, buffer.z.shape[1]), 0.1 * (step % 5), device=buffer.device)
    buffer.add(obs, critic_obs, z, action, reward, terminated, first)


def demonstrations(script, device):
    generator = np.random.default_rng(0)
    o, s, a = SIZES
    episodes = [
        dict(
            observations=generator.normal(size=(n + 1, o)).astype(np.float32),
            critic_observations=generator.normal(size=(n + 1, s)).astype(np.float32),
            actions=generator.uniform(-1, 1, size=(n, a)).astype(np.float32),
            rewards=np.ones(n), terminations=np.arange(n) == n - 1, truncations=np.zeros(n, bool),
        )
        for n in (9, 12)
    ]  # fmt: skip
    return script.Demonstrations(episodes, device)


def off_policy(script, updates, device=CPU, **options):
    """An agent and its buffer after `updates`, with new rows in between; and the last metrics."""
    torch.manual_seed(1)
    args = script.Args(batch_size=8, buffer_size=40, learning_starts=5, state_dim=4, **options)
    agent = script.Agent(args, *SIZES, True, device)
    buffer = agent.make_buffer()
    more = ()
    if script is s2pg_lsiq:
        more = (agent.make_expert_buffer(demonstrations(script, device)),)
    for step in range(30):
        add(buffer, step)
    for step in range(30, 30 + updates):  # past the end of the ring
        metrics = agent.update(buffer, *more)
        add(buffer, step)
    metrics = {name: value.clone() for name, value in metrics.items()}
    return agent, [buffer, *more], metrics


def on_policy(script, rollouts, device=CPU, **options):
    """The same after `rollouts`, which have episodes of other lengths, and other learning rates."""
    torch.manual_seed(1)
    args = script.Args(num_steps=24, num_minibatches=5, update_epochs=3, state_dim=4, **options)
    agent = script.Agent(args, *SIZES, True, device)
    rollout = agent.make_rollout()
    more = (demonstrations(script, device),) if script is s2pg_gail else ()
    for number in range(rollouts):
        z = torch.zeros(1, agent.z_dim, device=device)
        a_prev = torch.zeros(1, SIZES[2], device=device)
        for step in range(25):
            obs, critic_obs, _, reward, terminated, _ = row(step + 100 * number, device)
            first = np.array([step % (20 - 7 * (number % 2)) == 0])
            action, z_next, log_prob, value = agent.act(obs, critic_obs, z, a_prev)
            parts = dict(z=z, value=value, first=first)
            if step < 24:
                parts |= dict(
                    obs=obs, critic_obs=critic_obs, a_prev=a_prev, action=action,
                    log_prob=log_prob, reward=reward, terminated=terminated,
                )  # fmt: skip
            rollout.add(**parts)
            z, a_prev = z_next, action.clamp(-1, 1)
        agent.lr.fill_(1e-3 / (number + 1))
        metrics = agent.update(rollout, *more)
    return agent, [], metrics


def final_state(agent, buffers):
    """Every number that an update changes."""
    state = {}
    for name, part in vars(agent).items():
        if isinstance(part, torch.nn.Module):
            state |= {f"{name}.{k}": v for k, v in part.state_dict().items()}
        elif isinstance(part, torch.optim.Optimizer):
            for i, slot in part.state_dict()["state"].items():
                state |= {f"{name}.{i}.{k}": v for k, v in slot.items()}
        elif torch.is_tensor(part):
            state[name] = part
    for i, buffer in enumerate(buffers):
        state[f"buffer {i}"] = buffer.z
    return {name: value.detach().cpu() for name, value in state.items()}


def assert_same(one, other, **tolerance):
    *one, metrics = one
    *other, other_metrics = other
    a, b = final_state(*one), final_state(*other)
    assert a.keys() == b.keys() and metrics.keys() == other_metrics.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=name, **tolerance)
    for name, value in metrics.items():
        torch.testing.assert_close(value, other_metrics[name], msg=name, **tolerance)


def acting(script, device=CPU, **options):
    """What an agent does in twelve steps: its inputs are written in place, as in `train`."""
    torch.manual_seed(1)
    agent = script.Agent(script.Args(state_dim=4, **options), *SIZES, True, device)
    seen = [torch.zeros(1, size, device=device) for size in SIZES[: 1 + (script not in OFF_POLICY)]]
    z, a_prev = (torch.zeros(1, size, device=device) for size in (agent.z_dim, SIZES[2]))
    done = []
    for step in range(12):
        for obs, new in zip(seen, row(step, device)):
            obs.copy_(new)
        if step == 8:  # as an update would
            with torch.no_grad():
                for p in agent.actor.parameters():
                    p.mul_(1.5)
        action, z_next, *rest = agent.act(*seen, z, a_prev)
        done.append([x.clone() for x in (action, z_next, *rest)])
        z.copy_(z_next)
        a_prev.copy_(action.clamp(-1, 1))
    return done


VARIANTS = [
    (s2pg_sac, {}), (s2pg_sac, dict(memoryless=True)), (s2pg_sac, dict(rnn="lstm")),
    (s2pg_td3, dict(policy_frequency=2)), (s2pg_td3, dict(policy_frequency=1)),
    (bptt_sac, dict(sequence_length=4, loss_on="last")),
    (bptt_sac, dict(sequence_length=4, loss_on="all", burn_in=2)),
    (bptt_sac, dict(sequence_length=4, loss_on="all-uniform")),
    (s2pg_lsiq, {}), (s2pg_lsiq, dict(loss="iq_like")),
    (s2pg_lsiq, dict(expert_target="bootstrap", absorbing=False)),
]  # fmt: skip


@pytest.mark.parametrize("script, options", VARIANTS)
def test_a_replayed_update_is_the_update(script, options, graphs):
    eager = off_policy(script, 15, **options)
    assert not graphs
    captured = off_policy(script, 15, cudagraphs=True, **options)
    assert len(graphs) == options.get("policy_frequency", 1)
    assert sum(graph.replays for graph in graphs) == 15 - 3 * len(graphs)
    assert_same(eager, captured, rtol=0, atol=0)


@each(*ON_POLICY)
def test_a_replayed_minibatch_is_the_minibatch(script, graphs):
    eager = on_policy(script, 4)
    captured = on_policy(script, 4, cudagraphs=True)
    assert len(graphs) == 1  # 22 transitions of 24 rows, five minibatches of 5
    assert graphs[0].replays == 4 * 3 * 5 - 3
    assert_same(eager, captured, rtol=0, atol=0)


@pytest.mark.parametrize("rnn", ["gru", "lstm"])
@torch.backends.mkldnn.flags(enabled=False)  # its LSTM keeps what a replay cannot write to
def test_a_replayed_minibatch_of_sequences_is_the_minibatch(rnn, graphs):
    options = dict(sequence_length=4, rnn=rnn)
    eager = on_policy(bptt_ppo, 4, **options)
    captured = on_policy(bptt_ppo, 4, cudagraphs=True, **options)
    # six sequences of at most 4 rows in five minibatches: four of one, and one of two
    assert [graph.replays for graph in graphs] == [4 * 3 * 4 - 3, 4 * 3 - 3]
    assert_same(eager, captured, rtol=0, atol=0)


def test_a_graph_for_each_size_of_the_minibatches(graphs):
    agent, *_ = on_policy(s2pg_ppo, 1, cudagraphs=True)
    before = copy.deepcopy(agent.actor.state_dict())
    for size in (3, 3, 3, 3, 7, 7, 7, 7, 3):
        _, log_ratio = agent.learn(size)
        assert log_ratio.shape == (size,)
    assert len(agent.learn.graphs) == 3 and len(graphs) == 3
    assert any(not torch.equal(v, before[k]) for k, v in agent.actor.state_dict().items())


@each(*OFF_POLICY, *ON_POLICY, bptt_ppo)
def test_a_replayed_action_is_the_action(script, graphs):
    eager, replayed = acting(script), acting(script, cudagraphs=True)
    (graph,) = graphs
    assert graph.replays == 12 - 3
    for one, other in zip(eager, replayed):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.mul_(2 if x.sum().item() > 0 else 3),
        lambda x: x[x > 0].sum(),
        lambda x: x.index_put_((x > 0,), torch.zeros(())),
        lambda x: (x > 0).nonzero(),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    ],
)
def test_what_waits_for_the_device_cannot_be_captured(function, graphs):
    x = torch.ones(3)
    graphed = s2pg_sac.Graphed(lambda: function(x))
    for _ in range(3):
        graphed()
    with pytest.raises(RuntimeError, match="waits for the device"):
        graphed()


def test_the_emulation_repeats_what_was_captured_and_not_what_python_would_do(graphs):
    x, calls = torch.ones(3), []

    def function():
        calls.append(None)
        return x.mul_(len(calls)) + torch.rand(())

    graphed = s2pg_sac.Graphed(function)
    results = [graphed().clone() for _ in range(6)]
    assert len(calls) == 4  # the fourth call was captured with its 4, and repeated
    assert x.tolist() == [1 * 2 * 3 * 4 * 4 * 4] * 3
    assert results[4][0] - results[4].floor()[0] != results[5][0] - results[5].floor()[0]


@each(*OFF_POLICY, *ON_POLICY, bptt_ppo)
def test_on_a_cpu_both_modes_are_off_and_say_so(script, capsys):
    args = script.Args(compile=True, cudagraphs=True, cuda=False)
    assert script.choose_device(args) == CPU
    assert not args.compile and not args.cudagraphs
    said = "--compile and --cudagraphs are off, as no CUDA card is used\n"
    assert capsys.readouterr().out == said
    script.choose_device(args)
    assert capsys.readouterr().out == ""


@pytest.fixture
def one_graph(monkeypatch):
    """torch.compile of a whole function or an error, without the minutes of a C++ compiler."""
    options = dict(backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, **options))
    yield
    torch._dynamo.reset()


@each(*OFF_POLICY)
def test_compiled_losses_are_the_losses(script, one_graph):
    assert_same(off_policy(script, 4), off_policy(script, 4, compile=True), rtol=1e-4, atol=1e-5)


@each(*ON_POLICY)
def test_compiled_losses_of_rollouts_are_the_losses(script, one_graph):
    assert_same(on_policy(script, 2), on_policy(script, 2, compile=True), rtol=1e-4, atol=1e-5)


def test_compiled_losses_of_sequences_are_the_losses(monkeypatch):
    """Here the recurrent layer breaks the graph, and shapes vary."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    one, other = on_policy(bptt_ppo, 2), on_policy(bptt_ppo, 2, compile=True)
    assert_same(one, other, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


# monkeypatch would take the option away afterwards, as it is not in the __dict__ of its module
same_random_numbers = torch._inductor.config.patch(fallback_random=True)


@same_random_numbers
def test_kernels_of_the_compiler_compute_the_losses():
    torch._dynamo.reset()
    one, other = off_policy(s2pg_sac, 3), off_policy(s2pg_sac, 3, compile=True)
    assert_same(one, other, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


@each(s2pg_sac, s2pg_ppo)
def test_an_optimizer_keeps_its_own_learning_rate_and_device(script, tmp_path):
    make = off_policy if script is s2pg_sac else on_policy
    agent, *_ = make(script, 2)
    script.save_checkpoint(tmp_path, agent, dict(global_step=1))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for name, part in state["parts"].items():
        for group in part.get("param_groups", []):
            group |= dict(capturable=True)  # as if it had come from a CUDA card
            assert "optimizer" in name
    torch.save(state, tmp_path / "checkpoint.pt")
    rates = dict(critic_lr=7e-4) if script is s2pg_sac else dict(learning_rate=7e-4)
    other, *_ = make(script, 1, **rates)
    script.load_checkpoint(tmp_path, other)
    optimizer = getattr(other, "critic_optimizer", None) or other.optimizer
    (group,) = optimizer.param_groups
    assert group["capturable"] is False
    if script is s2pg_ppo:
        assert group["lr"] is other.lr
        other.lr.fill_(0)
        before = copy.deepcopy(other.actor.state_dict())
        other.learn(3)
        assert all(torch.equal(v, before[k]) for k, v in other.actor.state_dict().items())
    else:
        assert group["lr"] == 7e-4


def test_arrays_go_to_the_device_as_they_are():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = s2pg_sac.to_device(array, CPU)
    assert tensor.dtype == torch.float32 and tensor.tolist() == array.tolist()
    assert s2pg_sac.to_device(tensor, CPU) is tensor
    assert s2pg_sac.to_device([True, False], CPU).dtype == torch.bool


needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card")


@needs_card
@pytest.mark.parametrize("script, options", VARIANTS)
@pytest.mark.parametrize(
    "mode",
    [dict(cudagraphs=True), dict(compile=True, cudagraphs=True)],
    ids=["captured", "compiled"],
)
@same_random_numbers
def test_on_a_card_a_replayed_update_is_the_update(script, options, mode):
    eager = off_policy(script, 8, torch.device("cuda"), **options)
    other = off_policy(script, 8, torch.device("cuda"), **mode, **options)
    assert_same(eager, other, rtol=1e-3, atol=1e-4)


@needs_card
@each(*ON_POLICY, bptt_ppo)
def test_on_a_card_a_replayed_minibatch_is_the_minibatch(script):
    eager = on_policy(script, 3, torch.device("cuda"))
    other = on_policy(script, 3, torch.device("cuda"), cudagraphs=True)
    assert_same(eager, other, rtol=1e-3, atol=1e-4)


@needs_card
@each(*OFF_POLICY, *ON_POLICY, bptt_ppo)
def test_on_a_card_a_replayed_action_is_the_action(script):
    card = torch.device("cuda")
    for one, other in zip(acting(script, card), acting(script, card, cudagraphs=True)):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@needs_card
@each(*OFF_POLICY)
def test_on_a_card_neither_an_update_nor_storing_a_row_waits_for_it(script):
    agent, buffers, _ = off_policy(script, 2, torch.device("cuda"))
    rows = [row(step, torch.device("cuda")) for step in range(32, 34)]
    z = torch.zeros(1, agent.z_dim, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for obs, critic_obs, action, *numbers in rows:  # the second one of TD3 moves everything
            agent.update(*buffers)
            buffers[0].add(obs, critic_obs, z, action, *numbers)
            agent.act(obs, z, action)
    finally:
        torch.cuda.set_sync_debug_mode("default")
