"""What is for CUDA: graphs, compiled losses, copies to the device.

Graphs are emulated on the CPU (recording.py), and whole runs on a card that is none
(emulated_card.py). So these tests see what a card would refuse and what a graph would get wrong: an
operand on the host, a branch on it, a number read from the device, a tensor that is not the same
one in each call. Those at the end need a card, and show that it does the same.
"""

import functools
import types
from unittest import mock

import numpy as np
import pytest
import torch
from gymnasium import spaces
from recording import Recording, emulated_cuda

import bptt_ppo
import bptt_sac
import s2pg_ppo
import s2pg_sac
import s2pg_td3

CPU, CARD = torch.device("cpu"), torch.device("cuda")
OFF_POLICY, ON_POLICY = (s2pg_sac, bptt_sac, s2pg_td3), (s2pg_ppo, bptt_ppo)
SIZES = 3, 5, 2  # of o, s and a
SEEN, STATE, ACTION = (spaces.Box(-1, 1, (size,)) for size in SIZES)
ENV = types.SimpleNamespace(
    single_observation_space=spaces.Dict(policy=SEEN, critic=STATE), single_action_space=ACTION
)
VARIANTS = [
    (s2pg_sac, {}), (s2pg_sac, dict(memoryless=True)), (s2pg_sac, dict(rnn="lstm")),
    (s2pg_td3, dict(policy_frequency=2)), (s2pg_td3, dict(policy_frequency=1)),
    (bptt_sac, dict(sequence_length=4)), (bptt_sac, dict(sequence_length=4, loss_on="last")),
    (s2pg_ppo, {}), (bptt_ppo, dict(sequence_length=4)),
]  # fmt: skip
each = pytest.mark.parametrize("script", OFF_POLICY + ON_POLICY, ids=lambda s: s.__name__)
variants = pytest.mark.parametrize("script, options", VARIANTS)


@pytest.fixture
def graphs():
    """All graphs captured so far, by an emulated CUDA."""
    made = []
    with mock.patch.multiple(
        torch.cuda, **emulated_cuda(lambda: made.append(Recording()) or made[-1])
    ):
        yield made


def row(step, device):
    """o, s and a of a row, and its reward, `terminated` and `first`; an episode has 7 rows."""
    generator = torch.Generator().manual_seed(step)
    seen = (torch.randn(1, size, generator=generator).tanh().to(device) for size in SIZES)
    terminated = np.array([step % 7 == 5 and step % 2 == 0])
    return *seen, np.array([float(step % 3)]), terminated, np.array([step % 7 == 0])


def trained(script, rounds, device=CPU, **options):
    """An agent after so many updates on new rows, what it logged, and what it trained on."""
    torch.manual_seed(1)
    if script in ON_POLICY:
        options = dict(num_steps=24, num_minibatches=5, update_epochs=3) | options
        agent = script.Agent(script.Args(state_dim=4, **options), ENV, device)
        rollout = script.Rollout(24, 1, agent.row_sizes, device)
        for number in range(rounds):
            agent.optimizer.param_groups[0]["lr"].fill_(1e-3 / (number + 1))
            z, a_prev = (torch.zeros(1, n, device=device) for n in (agent.z_dim, SIZES[2]))
            for step in range(24):
                obs, state, _, *numbers = row(step + 101 * number, device)
                sample, z_next, log_prob, value = agent.act(obs, state, z, a_prev)
                rollout.add(obs, state, z, a_prev, sample, log_prob, value, *numbers)
                z, a_prev = z_next.clone(), sample[:, : SIZES[2]].clamp(-1, 1)
            rollout.finish(value, numbers[-1])
            losses = agent.update(rollout)
        return agent, losses, rollout.rows

    options = dict(batch_size=8, buffer_size=40, learning_starts=5) | options
    agent = script.Agent(script.Args(state_dim=4, **options), ENV, device)
    kind = script.SequenceBuffer if script is bptt_sac else script.TransitionBuffer
    buffer = kind(40, 1, *agent.row_sizes, device)
    z = torch.zeros(1, agent.z_dim, device=device)
    for step in range(30 + rounds):  # past the end of the ring
        obs, state, action, *numbers = row(step, device)
        if step < 30:
            action, z = (x.clone() for x in agent.act(obs, z, action))
        else:
            losses = agent.update(buffer)
        buffer.add(obs, state, z, action, *numbers)
    return agent, losses, buffer


def numbers(agent, losses, data):
    """Every number that an update changes or returns."""
    state = agent.state_dict() | losses
    for i, optimizer in enumerate(agent.optimizers):
        for j, slots in optimizer.state_dict()["state"].items():
            state |= {f"{i}.{j}.{name}": value for name, value in slots.items()}
    state["rows"] = getattr(data, "rows", data)
    return {name: torch.as_tensor(value).detach().cpu() for name, value in state.items()}


def assert_same(one, other, **tolerance):
    one, other = numbers(*one), numbers(*other)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=name, **tolerance)


@variants
@torch.backends.mkldnn.flags(enabled=False)  # its LSTM keeps what a replay cannot write to
def test_replayed_actions_and_updates_are_the_actions_and_updates(script, options, graphs):
    rounds = 4 if script in ON_POLICY else 15
    eager = trained(script, rounds, **options)
    assert not graphs
    captured = trained(script, rounds, cudagraphs=True, **options)
    assert graphs and all(graph.replays >= 4 for graph in graphs)
    if script in OFF_POLICY:
        act, *updates = graphs
        assert act.replays == 30 - 3 and len(updates) == options.get("policy_frequency", 1)
        assert sum(graph.replays for graph in updates) == 15 - 3 * len(updates)
    assert_same(eager, captured, rtol=0, atol=0)


def test_the_arguments_of_a_graph_are_copied_to_where_it_reads_them(graphs):
    graphed = s2pg_sac.Graphed(lambda x, factor, y: factor * x + y)
    inputs = [torch.full((2,), float(step)) for step in range(8)]
    for step, x in enumerate(inputs):
        y = torch.tensor([1.0, 2.0])
        assert graphed(x, 3, y).tolist() == [3 * step + 1, 3 * step + 2]
    assert [x[0].item() for x in inputs] == list(range(8))  # the caller's own stay as they are
    assert len(graphs) == 1 and graphs[0].replays == 5


def test_the_first_calls_wait_for_what_was_done_on_the_usual_stream(graphs, monkeypatch):
    """They run on another stream, which does not wait by itself for the arguments to be copied."""
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    s2pg_sac.Graphed(lambda: events.append("call"))()
    assert events == ["wait", "call", "wait"]


def test_what_waits_for_the_device_cannot_be_captured(graphs):
    for function in (
        lambda x: x.mul_(2 if x.sum().item() > 0 else 3),
        lambda x: x[x > 0].sum(),
        lambda x: x.index_put_((x > 0,), torch.zeros(())),
        lambda x: (x > 0).nonzero(),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    ):
        graphed = s2pg_sac.Graphed(function)
        for _ in range(3):
            graphed(torch.ones(3))
        with pytest.raises(RuntimeError, match="waits for the device"):
            graphed(torch.ones(3))


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


@each
def test_compiled_losses_are_the_losses(script, monkeypatch):
    """Without the minutes of a C++ compiler. A recurrent layer breaks the graph of BPTT-PPO."""
    backend = dict(backend="aot_eager", fullgraph=script is not bptt_ppo)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, **backend))
    options = dict(num_minibatches=1) if script in ON_POLICY else {}  # each shape is compiled
    plain, compiled = (trained(script, 2, compile=x, **options) for x in (False, True))
    assert_same(plain, compiled, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("script", [s2pg_sac, s2pg_ppo], ids=lambda s: s.__name__)
def test_a_checkpoint_of_a_card_leaves_the_optimizer_its_own_device_and_rate(script, tmp_path):
    agent, _, buffer = trained(script, 2)
    for group in agent.optimizers[0].param_groups:
        group["capturable"] = True
    if script is s2pg_sac:
        script.save_checkpoint(tmp_path, agent, buffer, global_step=1, seconds=1.0)
        agent = script.Agent(script.Args(state_dim=4, critic_lr=7e-4), ENV, CPU)
        script.load_checkpoint(tmp_path, agent, buffer)
    else:
        script.save_run(tmp_path, agent, global_step=1, seconds=1.0)
        agent = script.Agent(script.Args(state_dim=4, learning_rate=7e-4), ENV, CPU)
        assert torch.is_tensor(agent.optimizer.param_groups[0]["lr"])
        script.load_run(tmp_path, agent)
        assert torch.is_tensor(agent.optimizer.param_groups[0]["lr"])
    (group,) = agent.optimizers[0].param_groups
    assert group["capturable"] is False and agent.optimizers[0].state_dict()["state"]
    assert float(group["lr"]) == pytest.approx(7e-4)


def test_arrays_go_to_the_device_as_copies_of_32_bits():
    array = np.arange(6.0).reshape(2, 3)
    tensor = s2pg_sac.to_device(array, CPU)
    array += 1
    assert tensor.dtype == torch.float32 and tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert s2pg_sac.to_device([True, False], CPU).tolist() == [1, 0]


needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card")
# monkeypatch would take the option away afterwards, as it is not in the __dict__ of its module
same_random_numbers = torch._inductor.config.patch(fallback_random=True)


@needs_card
@variants
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@same_random_numbers
def test_on_a_card_replayed_actions_and_updates_are_the_actions_and_updates(
    script, options, compiled
):
    rounds = 3 if script in ON_POLICY else 8
    eager = trained(script, rounds, CARD, **options)
    other = trained(script, rounds, CARD, cudagraphs=True, compile=compiled, **options)
    # Adam makes a step of a gradient's rounding error, too: of 3e-4, in each of eight updates
    assert_same(eager, other, rtol=1e-3, atol=1e-3)


@needs_card
@pytest.mark.parametrize("script", OFF_POLICY, ids=lambda s: s.__name__)
def test_on_a_card_neither_an_update_nor_acting_waits_for_it(script):
    agent, _, buffer = trained(script, 2, CARD)
    obs, _, action, *_ = row(32, CARD)
    z = torch.zeros(1, agent.z_dim, device=CARD)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):  # the second one of TD3 moves everything
            agent.update(buffer)
            agent.act(obs, z, action)
    finally:
        torch.cuda.set_sync_debug_mode("default")
