"""The replay buffers against a plain list of rows: nothing that is drawn crosses an episode.

A random stream of episodes is written into the buffer under test and, in parallel, into a Python
list. Every row carries numbers that say which row it is, so whatever comes out can be traced back.
"""

import dataclasses
import io
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bptt_sac import SequenceBuffer
from s2pg_sac import TransitionBuffer

OBS, CRITIC, Z, ACTION = 2, 3, 2, 2
WARMUP_ROUNDS = 40  # draws per drawable row; one stays undrawn with probability e^-40
random_tests = settings(max_examples=50, deadline=None)


class Row(NamedTuple):
    env: int
    episode: int
    step: int
    first: bool
    terminated: bool

    @property
    def uid(self):
        """A whole number below 2^20, so that float32 holds it, plus quarters, exactly."""
        return self.env * 2**16 + self.episode * 2**4 + self.step

    def obs(self):
        return [self.uid, -self.uid]

    def critic_obs(self):
        return [self.uid + 0.25, self.step, 7]

    def z(self):
        return [self.uid + 0.5, -self.uid]

    def action(self):
        return [self.uid + 0.75, self.uid]

    def reward(self):
        return self.uid + 0.125


@dataclasses.dataclass
class Stream:
    """Rows by time and environment, and how large the ring is that holds the newest of them."""

    num_envs: int
    slots: int
    spare: int  # rows of the buffer beyond whole slots
    rows: list  # [time][env]

    @property
    def size(self):
        return self.slots * self.num_envs + self.spare

    def oldest(self, written):
        """Oldest time whose previous action is sure to be in the ring, or is no row at all."""
        return max(0, written - (self.slots - 1))

    def drawable(self, written):
        """(time, env) of all transitions, once `written` slots were written."""
        return [
            (t, e)
            for t in range(self.oldest(written), written - 1)
            for e in range(self.num_envs)
            if not self.rows[t + 1][e].first
        ]

    def index(self, t, e):
        return t % self.slots * self.num_envs + e


@st.composite
def streams(draw, min_slots=4, max_slots=14):
    """Episodes of 1 to 12 transitions that terminate, are truncated or are interrupted."""
    num_envs, slots = draw(st.integers(1, 4)), draw(st.integers(min_slots, max_slots))
    spare = draw(st.integers(0, num_envs - 1))
    times = draw(st.integers(2, 4 * slots) | st.integers(3 * slots, 5 * slots))
    lanes = []
    for env in range(num_envs):
        ends = st.sampled_from(["terminated", "truncated", "interrupted"])
        plan = draw(st.lists(st.tuples(st.integers(1, 12), ends), min_size=1, max_size=8))
        lane, episode = [], 0
        while len(lane) < times:
            length, end = plan[episode % len(plan)]
            # T transitions fill T + 1 rows; what a resumed run left behind has no final row
            for step in range(length + (end != "interrupted")):
                terminated = end == "terminated" and step == length - 1
                lane.append(Row(env, episode, step, step == 0, terminated))
            episode += 1
        lanes.append(lane[:times])
    return Stream(num_envs, slots, spare, list(zip(*lanes)))


def make_buffer(kind, stream, shared=False):
    critic_dim = None if shared else CRITIC
    return kind(stream.size, stream.num_envs, OBS, critic_dim, Z, ACTION, torch.device("cpu"))


def write(buffer, rows):
    buffer.add(
        torch.tensor([row.obs() for row in rows], dtype=torch.float32),
        torch.tensor([row.critic_obs() for row in rows], dtype=torch.float32),
        torch.tensor([row.z() for row in rows], dtype=torch.float32),
        torch.tensor([row.action() for row in rows], dtype=torch.float32),
        np.array([row.reward() for row in rows]),
        np.array([row.terminated for row in rows]),
        np.array([row.first for row in rows]),
    )


def play(buffer, stream, times=None):
    """Write the stream, or `times` of it; yields (slots written, what can be drawn)."""
    for t, rows in enumerate(stream.rows[:times]):
        write(buffer, rows)
        drawable = stream.drawable(t + 1)
        if drawable:
            yield t + 1, drawable


def some_times(stream, data):
    """Times of a stream to look at closely: the last, and some before."""
    times = st.sets(st.integers(1, len(stream.rows)), max_size=4)
    return data.draw(times, label="times") | {len(stream.rows)}


def rows_at(stream, places):
    return [stream.rows[t][e] for t, e in places]


def expect(actual, rows, what):
    """`actual` [B, .] is what `rows` carry under the name `what`."""
    expected = torch.tensor([getattr(row, what)() for row in rows], dtype=torch.float32)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def previous_actions(stream, places):
    """What a_prev must be: the action of the same episode one step before, or zeros."""
    return torch.tensor(
        [
            [0.0] * ACTION if stream.rows[t][e].first else stream.rows[t - 1][e].action()
            for t, e in places
        ]
    )


def draw_with(seed, buffer, *sample_args):
    """A batch, and the indices that were drawn for it."""
    torch.manual_seed(seed)
    batch = buffer.sample(*sample_args)
    torch.manual_seed(seed)
    return batch, lambda n: buffer.draw(n)


def by_index(stream, written, places):
    assert all(stream.oldest(written) <= t < written for t, _ in places)
    return {stream.index(t, e): (t, e) for t, e in places}


# --- transitions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TransitionBuffer, SequenceBuffer])
@random_tests
@given(stream=streams())
def test_the_queue_holds_exactly_the_transitions_of_the_ring_in_order_of_time(kind, stream):
    buffer = make_buffer(kind, stream)
    for t, rows in enumerate(stream.rows):
        write(buffer, rows)
        places = (buffer.head + torch.arange(buffer.size)) % len(buffer.transitions)
        queue = buffer.transitions[places].tolist()
        assert queue == [stream.index(*place) for place in stream.drawable(t + 1)]
        written = min(t + 1, stream.slots)
        assert buffer.counters.tolist() == [
            buffer.head, buffer.size, (t + 1) % stream.slots, written
        ]  # fmt: skip


@random_tests
@given(stream=streams(), data=st.data())
def test_every_transition_is_drawn_and_belongs_to_one_episode(stream, data):
    """No final row, no row without successor, nothing across the seam of the ring."""
    buffer, looked_at = make_buffer(TransitionBuffer, stream), some_times(stream, data)
    for written, drawable in play(buffer, stream):
        if written not in looked_at:
            continue
        index = {stream.rows[t][e].uid: (t, e) for t, e in drawable}
        batch = buffer.sample(WARMUP_ROUNDS * len(drawable), critic_sees_z=False)
        drawn = [int(uid) for uid in batch.obs[:, 0]]
        assert set(drawn) == set(index)

        places = [index[uid] for uid in drawn]
        rows, after = rows_at(stream, places), rows_at(stream, [(t + 1, e) for t, e in places])
        for row, successor in zip(rows, after):
            assert successor[:3] == (row.env, row.episode, row.step + 1)
        expect(batch.obs, rows, "obs")
        expect(batch.state, rows, "critic_obs")
        expect(batch.z, rows, "z")
        expect(batch.action, rows, "action")
        expect(batch.reward, rows, "reward")
        expect(batch.next_obs, after, "obs")
        expect(batch.next_state, after, "critic_obs")
        expect(batch.next_z, after, "z")
        assert torch.equal(batch.a_prev, previous_actions(stream, places))
        assert batch.terminated.tolist() == [row.terminated for row in rows]
        assert batch.next_index.tolist() == [stream.index(t + 1, e) for t, e in places]


@random_tests
@given(stream=streams())
def test_a_critic_that_sees_z_gets_that_of_the_same_row(stream):
    buffer = make_buffer(TransitionBuffer, stream)
    if not list(play(buffer, stream)) or buffer.size == 0:
        return
    batch = buffer.sample(50, critic_sees_z=True)
    assert batch.state.shape == (50, CRITIC + Z)
    # critic_obs and z carry the same number, a quarter apart
    for state, obs in ((batch.state, batch.obs), (batch.next_state, batch.next_obs)):
        assert torch.equal(state[:, 0] - 0.25, obs[:, 0])
        assert torch.equal(state[:, CRITIC] - 0.5, obs[:, 0])


def long_stream(num_envs=2, slots=25, times=60):
    """A fixed stream that fills the ring more than twice."""
    lengths, lanes = [5, 1, 8, 3, 12], []
    for env in range(num_envs):
        lane, episode = [], 0
        while len(lane) < times:
            length = lengths[(episode + env) % len(lengths)]
            lane += [Row(env, episode, s, s == 0, s == length - 1) for s in range(length + 1)]
            episode += 1
        lanes.append(lane[:times])
    return Stream(num_envs, slots, 0, list(zip(*lanes)))


def test_transitions_are_drawn_uniformly():
    """Pearson's chi-square over all of them: mean k, variance 2 k."""
    stream = long_stream()
    buffer = make_buffer(TransitionBuffer, stream)
    *_, (_, drawable) = play(buffer, stream)
    torch.manual_seed(0)
    n = 400 * len(drawable)
    counts = torch.bincount(buffer.draw(n), minlength=stream.slots * stream.num_envs)
    counts = counts[[stream.index(t, e) for t, e in drawable]].double()
    assert counts.sum() == n
    k = len(drawable) - 1
    assert (counts - 400).square().sum() / 400 < k + 5 * (2 * k) ** 0.5


def test_a_loss_on_all_rows_does_not_neglect_the_ends_of_episodes():
    """The last transition of an episode, the only one that terminates, counts half of the average
    or more; were each drawn transition the last of its sequence, it would count 1 / 16."""
    steps, length = 60, 16
    buffer = SequenceBuffer(200, 1, 1, None, 1, 1, torch.device("cpu"))
    for t in range(3 * (steps + 1)):
        step = t % (steps + 1)
        row = torch.full((1, 1), float(step))
        ends = np.array([step == steps - 1])
        buffer.add(row, row, row, row, np.zeros(1), ends, np.array([step == 0]))
    torch.manual_seed(0)
    batch = buffer.sample(length * 20_000, length, "all", 0, "stored")
    step = batch.obs[:, 0].long().clamp(max=steps - 1)
    weight = steps * torch.zeros(steps).index_add(0, step, batch.weight)
    assert weight[-1] > 0.5 and weight.min() > 0.4 and weight.max() < 2
    assert 0.9 < weight[length:-length].mean() < 1.2


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("length", [1, 5, 16])
def test_a_uniform_loss_on_all_rows_weighs_all_transitions_alike(length, num_envs):
    """Those of short episodes and of long ones, at the start, in the middle and at the end, in a
    ring that is full or not."""
    lanes = [[], [], []]
    for env, lane in enumerate(lanes):
        for episode, steps in enumerate([3, 40, 1, 8, 60, 2, 30, 5 + env, 11]):
            # 4 apart, so that their numbers leave room for 64 steps
            lane += [Row(env, 4 * episode, s, s == 0, s == steps - 1) for s in range(steps + 1)]
    times, size = 140, 20_000
    stream = Stream(num_envs, 90, 0, list(zip(*(lane[:times] for lane in lanes[:num_envs]))))
    buffer = make_buffer(SequenceBuffer, stream)
    torch.manual_seed(0)
    for written, drawable in play(buffer, stream):
        if written not in (60, times):
            continue
        uids = torch.tensor([stream.rows[t][e].uid for t, e in drawable])
        order = uids.argsort()
        weights = []
        for _ in range(20):
            batch = buffer.sample(length * size, length, "all-uniform", 0, "stored")
            torch.testing.assert_close(batch.weight.sum(), torch.tensor(1.0))
            seen = batch.weight > 0
            place = order[torch.searchsorted(uids[order], batch.obs[seen, 0].long())]
            assert torch.equal(uids[place], batch.obs[seen, 0].long())
            weights.append(torch.zeros(len(uids)).index_add(0, place, batch.weight[seen]))
        weights = torch.stack(weights) * len(uids)
        error = weights.std(0) / len(weights) ** 0.5
        assert error.max() < 0.04 and (weights.mean(0) - 1).abs().max() < 5 * error.max()


# --- the refresh of the internal state ------------------------------------------------------------


@random_tests
@given(stream=streams(), data=st.data(), batch_size=st.integers(1, 60))
def test_a_refresh_writes_the_next_z_of_the_batch_and_nothing_else(stream, data, batch_size):
    """Duplicates in the batch (there are more draws than rows) keep one of their samples."""
    buffer, looked_at = make_buffer(TransitionBuffer, stream), some_times(stream, data)
    for written, _ in play(buffer, stream):
        if written not in looked_at:
            continue
        batch = buffer.sample(batch_size, critic_sees_z=False)
        before = {k: v.clone() for k, v in vars(buffer).items() if torch.is_tensor(v)}
        fresh = -(torch.arange(batch_size * Z).view(batch_size, Z) + 1e6)
        buffer.refresh(batch, fresh)
        for name, value in before.items():
            if name not in ("z", "rows"):
                assert torch.equal(getattr(buffer, name), value), name
        changed = (buffer.z != before["z"]).any(-1).nonzero().flatten().tolist()
        assert set(changed) == set(batch.next_index.tolist())
        at = by_index(stream, written, [(t, e) for t in range(stream.oldest(written), written)
                                        for e in range(stream.num_envs)])  # fmt: skip
        for uid, place in zip(batch.obs[:, 0].tolist(), batch.next_index.tolist()):
            t, e = at[place]
            row = stream.rows[t][e]
            assert not row.first and row.uid == uid + 1  # the same episode, one step on
            samples = fresh[batch.next_index == place]
            assert (buffer.z[place] == samples).all(-1).any()
        # put back what was there, or the next look would find the fresh values
        buffer.z.copy_(before["z"])


def test_the_next_sample_sees_refreshed_states():
    """As z of the successor and as z' of the row itself."""
    stream = long_stream()
    buffer = make_buffer(TransitionBuffer, stream)
    *_, (_, drawable) = play(buffer, stream)
    batch = buffer.sample(4000, critic_sees_z=False)
    assert len(set(batch.next_index.tolist())) == len(drawable)
    buffer.refresh(batch, batch.next_z + 1000)
    again = buffer.sample(4000, critic_sees_z=False)
    expected = again.next_obs[:, 0] + 0.5 + 1000
    assert torch.equal(again.next_z[:, 0], expected)
    refreshed = again.z[:, 0] != again.obs[:, 0] + 0.5
    assert refreshed.any()
    assert torch.equal(again.z[refreshed, 0], again.obs[refreshed, 0] + 0.5 + 1000)
    # what is no transition's successor keeps its z: the start of an episode, and the oldest
    # transition of each environment
    kept = again.obs[~refreshed, 0].unique().tolist()
    oldest = stream.oldest(len(stream.rows))
    allowed = {stream.rows[t][e].uid for t, e in drawable if stream.rows[t][e].first or t == oldest}
    assert set(kept) == allowed


# --- sequences ------------------------------------------------------------------------------------

sequence_options = dict(
    stream=streams(min_slots=4, max_slots=20),
    length=st.integers(1, 16),
    loss_on=st.sampled_from(["last", "all", "all-uniform"]),
    burn_in=st.sampled_from([0, 1, 2, 5]),
    initial_state=st.sampled_from(["stored", "zero"]),
    seed=st.integers(0, 1000),
)


def count_rows_before(stream, written, t, e):
    """Rows of the same episode before row t that are in the ring, with their own a_prev."""
    count = 0
    while not stream.rows[t - count][e].first and t - count - 1 >= stream.oldest(written):
        count += 1
    return count


@settings(max_examples=120, deadline=None)
@given(data=st.data(), **sequence_options)
def test_sequences_are_consecutive_rows_of_one_episode(
    data, stream, length, loss_on, burn_in, initial_state, seed
):
    """Rows, depth, weights, a_prev, initial states and burn-in of everything that can be drawn."""
    buffer, looked_at = make_buffer(SequenceBuffer, stream), some_times(stream, data)
    for written, drawable in play(buffer, stream):
        if written not in looked_at:
            continue
        batch_size = 40 if loss_on == "last" else 40 * length
        batch, draw = draw_with(seed, buffer, batch_size, length, loss_on, burn_in, initial_state)
        place = by_index(stream, written, drawable)
        index = draw(40)
        drawn = [place[i] for i in index.tolist()]
        # where the drawn transition is to stand in its sequence
        limits = [length - 1] * 40
        if loss_on != "last":
            limits = torch.randint_like(index, length).tolist()
        stored = initial_state == "stored"
        check_sequences(batch, stream, written, drawn, limits, length, loss_on, burn_in, stored)


def check_sequences(batch, stream, written, drawn, limits, length, loss_on, burn_in, stored):
    assert batch.all_obs.shape == (length + 1, len(drawn), OBS)
    assert batch.all_a_prev.shape == (length + 1, len(drawn), ACTION)
    assert torch.isclose(batch.weight.sum(), torch.tensor(1.0), atol=1e-5)
    assert (batch.burn_in is None) == (burn_in == 0)

    # by hand: where each sequence starts, and which transitions of it count
    starts, counted, shares, warm = [], [], [], []
    for column, (t, e) in enumerate(drawn):
        before = count_rows_before(stream, written, t, e)
        depth = min(limits[column], before)
        starts.append((t - depth, e))
        warm.append(burn_in > 0 and before - depth >= burn_in)
        last = depth
        if loss_on != "last":
            last = max(
                k for k in range(length)
                if t - depth + k + 1 < written
                and not any(stream.rows[t - depth + j + 1][e].first for j in range(k + 1))
            )  # fmt: skip
            if loss_on == "all-uniform":
                # where it would end, had the episode as many rows before as it wants
                last = min(last, length - 1 - (limits[column] - depth))
            assert last >= depth  # the drawn transition is among them
        first = depth if loss_on == "last" else 0
        counted += [(row, column) for row in range(first, last + 1)]
        shares += [1 / len(drawn) / (last + 1 - first)] * (last + 1 - first)

        run = [(t - depth + k, e) for k in range(last + 2)]
        rows = rows_at(stream, run)
        assert [row.step for row in rows] == list(range(rows[0].step, rows[0].step + len(rows)))
        assert len({(row.env, row.episode) for row in rows}) == 1
        expect(batch.all_obs[: len(run), column], rows, "obs")
        actual = batch.all_a_prev[: len(run), column]
        assert torch.equal(actual, previous_actions(stream, run))

    weighted = batch.weight.nonzero().flatten()
    pairs = list(zip(batch.row[weighted].tolist(), batch.column[weighted].tolist()))
    if loss_on == "all":
        shares = [1 / len(counted)] * len(counted)
    share = dict(zip(counted, shares))
    assert sorted(pairs) == sorted(counted)
    expected = torch.tensor([share[pair] for pair in pairs])
    torch.testing.assert_close(batch.weight[weighted], expected)
    if loss_on == "last":
        assert len(batch.weight) == len(drawn)

    places = [(starts[column][0] + row, starts[column][1]) for row, column in pairs]
    rows, after = rows_at(stream, places), rows_at(stream, [(t + 1, e) for t, e in places])
    expect(batch.obs[weighted], rows, "obs")
    expect(batch.state[weighted], rows, "critic_obs")
    expect(batch.action[weighted], rows, "action")
    expect(batch.reward[weighted], rows, "reward")
    expect(batch.next_obs[weighted], after, "obs")
    expect(batch.next_state[weighted], after, "critic_obs")
    assert torch.equal(batch.a_prev[weighted], previous_actions(stream, places))
    assert batch.terminated[weighted].tolist() == [row.terminated for row in rows]

    if stored:
        expect(batch.z, rows_at(stream, starts), "z")
    else:
        assert not batch.z.any()
    if burn_in == 0:
        return
    obs, z, a_prev, has_them = batch.burn_in
    assert obs.shape == (burn_in, len(drawn), OBS)
    assert has_them.squeeze(-1).tolist() == warm
    for column, (start, e) in enumerate(starts):
        if warm[column]:
            run = [(start - burn_in + k, e) for k in range(burn_in)]
            expect(obs[:, column], rows_at(stream, run), "obs")
            assert torch.equal(a_prev[:, column], previous_actions(stream, run))
            if stored:
                expect(z[column : column + 1], rows_at(stream, run[:1]), "z")
    if not stored:
        assert not z.any()


@pytest.mark.parametrize(("batch_size", "length", "sequences"), [(32, 8, 4), (32, 5, 6), (3, 8, 1)])
def test_both_kinds_of_sequences_see_about_batch_size_transitions(batch_size, length, sequences):
    stream = long_stream()
    buffer = make_buffer(SequenceBuffer, stream)
    list(play(buffer, stream))
    last = buffer.sample(batch_size, length, "last", 0, "stored")
    every = buffer.sample(batch_size, length, "all", 0, "stored")
    assert last.all_obs.shape[1] == len(last.weight) == batch_size
    assert every.all_obs.shape[1] == sequences and len(every.weight) == sequences * length


# --- storage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TransitionBuffer, SequenceBuffer])
@random_tests
@given(stream=streams(), data=st.data(), shared=st.booleans())
def test_a_buffer_that_was_saved_and_loaded_goes_on_as_if_nothing_had_happened(
    kind, stream, data, shared
):
    """Through the file format of a checkpoint, before and after the ring has wrapped."""
    saved_at = data.draw(st.integers(1, len(stream.rows)), label="saved at")
    original, file = make_buffer(kind, stream, shared), io.BytesIO()
    for rows in stream.rows[:saved_at]:
        write(original, rows)
    torch.save(original.state_dict(), file)
    file.seek(0)
    copy = make_buffer(kind, stream, shared)
    copy.load_state_dict(torch.load(file, weights_only=True))
    assert (copy.critic_obs is copy.obs) == shared

    arguments = (9, False) if kind is TransitionBuffer else (9, 3, "all", 2, "stored")
    for t in range(saved_at, len(stream.rows) + 1):
        assert (original.head, original.size) == (copy.head, copy.size)
        if original.size > 0:
            batch, _ = draw_with(t, original, *arguments)
            same, _ = draw_with(t, copy, *arguments)
            for a, b in zip(tensors_of(batch), tensors_of(same)):
                assert torch.equal(a, b)
        if t < len(stream.rows):
            write(original, stream.rows[t])
            write(copy, stream.rows[t])


def tensors_of(batch):
    """The tensors of a named tuple, those of the burn-in among them."""
    for value in batch:
        if isinstance(value, tuple):
            yield from tensors_of(value)
        elif value is not None:
            yield value


@pytest.mark.parametrize("shared", [False, True])
def test_a_buffer_that_was_saved_in_columns_is_loaded(shared):
    """As earlier versions did."""
    stream = long_stream()
    buffer, other = (make_buffer(TransitionBuffer, stream, shared) for _ in range(2))
    list(play(buffer, stream, times=20))
    state = buffer.state_dict()
    names = "obs", "critic_obs", "z", "action", "reward", "terminated", "first"
    state |= dict(zip(names, buffer.columns(state.pop("rows"))))
    state |= dict(terminated=state["terminated"].bool(), first=state["first"].bool())
    if shared:
        del state["critic_obs"]
    other.load_state_dict(state)
    for name, value in buffer.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_buffer_of_another_size_is_not_loaded():
    stream = long_stream()
    buffer = make_buffer(TransitionBuffer, stream)
    list(play(buffer, stream))
    other = make_buffer(TransitionBuffer, dataclasses.replace(stream, slots=stream.slots + 1))
    with pytest.raises(ValueError, match="--buffer-size"):
        other.load_state_dict(buffer.state_dict())


@pytest.mark.parametrize("num_envs", [1, 4])
def test_a_buffer_of_another_number_of_environments_is_not_loaded(num_envs):
    """Its slots may be as many, yet every row would mean another environment and time."""
    stream = long_stream(num_envs=2)
    buffer = make_buffer(TransitionBuffer, stream)
    list(play(buffer, stream))
    other = make_buffer(TransitionBuffer, dataclasses.replace(stream, num_envs=num_envs))
    assert other.slots == buffer.slots
    with pytest.raises(ValueError, match="--num-envs"):
        other.load_state_dict(buffer.state_dict())


@random_tests
@given(stream=streams())
def test_where_the_critic_sees_no_more_than_the_policy_their_rows_are_stored_once(stream):
    buffer = make_buffer(TransitionBuffer, stream, shared=True)
    assert buffer.critic_obs is buffer.obs
    if not list(play(buffer, stream)) or buffer.size == 0:
        return
    batch = buffer.sample(30, critic_sees_z=False)
    assert torch.equal(batch.state, batch.obs)
    assert torch.equal(batch.next_state, batch.next_obs)
