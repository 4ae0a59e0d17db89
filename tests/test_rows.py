"""The replay buffers against a plain list of rows: nothing that is drawn crosses an episode.

A random stream of episodes is written into the buffer under test and, in parallel, into a Python
list. Every row carries numbers that say which row it is, so whatever comes out can be traced back.
"""

import dataclasses
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
        """Oldest time that is drawn: its previous action is sure to be in the ring."""
        return max(0, written - self.slots) + 1

    def drawable(self, written):
        """(time, env) of all rows that can be drawn, once `written` slots were written."""
        times = range(self.oldest(written), written - 1)
        return [(t, e) for t in times for e in range(self.num_envs)]

    def is_transition(self, t, e):
        return not self.rows[t + 1][e].first

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
    critic_dim = 0 if shared else CRITIC
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


def by_uid(stream, written):
    return {stream.rows[t][e].uid: (t, e) for t, e in stream.drawable(written)}


# --- transitions ----------------------------------------------------------------------------------


@random_tests
@given(stream=streams(), data=st.data())
def test_every_row_is_drawn_and_has_weight_if_it_is_a_transition(stream, data):
    """No row without successor, nothing across the seam of the ring, no weight across episodes."""
    buffer, looked_at = make_buffer(TransitionBuffer, stream), some_times(stream, data)
    for written, drawable in play(buffer, stream):
        if written not in looked_at:
            continue
        batch, index = buffer.sample(WARMUP_ROUNDS * len(drawable)), by_uid(stream, written)
        drawn = batch.obs[:, 0].long().tolist()
        assert set(drawn) == set(index)
        places = [index[uid] for uid in drawn]
        rows, after = rows_at(stream, places), rows_at(stream, [(t + 1, e) for t, e in places])
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
        assert batch.after.tolist() == [stream.index(t + 1, e) for t, e in places]

        counted = [(row.env, row.episode) == (s.env, s.episode) for row, s in zip(rows, after)]
        assert all(s.step == row.step + 1 for row, s, c in zip(rows, after, counted) if c)
        expected = torch.tensor(counted).float() / max(sum(counted), 1)
        torch.testing.assert_close(batch.weight, expected)


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


def test_rows_are_drawn_uniformly():
    """Pearson's chi-square over all of them: mean k, variance 2 k."""
    stream = long_stream()
    buffer = make_buffer(TransitionBuffer, stream)
    *_, (_, drawable) = play(buffer, stream)
    torch.manual_seed(0)
    after = buffer.sample(400 * len(drawable)).after
    counts = torch.bincount(after, minlength=len(buffer.rows)).double()
    counts = counts[[stream.index(t + 1, e) for t, e in drawable]]
    assert counts.sum() == len(after)
    k = len(drawable) - 1
    assert (counts - 400).square().sum() / 400 < k + 5 * (2 * k) ** 0.5


@random_tests
@given(stream=streams())
def test_a_critic_that_sees_no_more_than_the_policy_gets_z_and_its_rows_are_stored_once(stream):
    buffer = make_buffer(TransitionBuffer, stream, shared=True)
    assert buffer.rows.shape[1] == OBS + Z + ACTION + 3
    for _ in play(buffer, stream):
        batch = buffer.sample(30)
        assert torch.equal(batch.state, torch.cat([batch.obs, batch.z], -1))
        assert torch.equal(batch.next_state, torch.cat([batch.next_obs, batch.next_z], -1))


def test_a_loss_on_all_rows_does_not_neglect_the_ends_of_episodes():
    """The last transition of an episode, the only one that terminates, counts half of the average
    or more; were each drawn transition the last of its sequence, it would count 1 / 16."""
    steps, length = 60, 16
    buffer = SequenceBuffer(400, 1, 1, 0, 1, 1, torch.device("cpu"))
    for t in range(6 * (steps + 1)):
        step = t % (steps + 1)
        row = torch.full((1, 1), float(step))
        ends = np.array([step == steps - 1])
        buffer.add(row, row, row, row, np.zeros(1), ends, np.array([step == 0]))
    torch.manual_seed(0)
    batch = buffer.sample(length * 20_000, length, last=False)
    step = batch.obs[:, 0].long().clamp(max=steps - 1)
    weight = steps * torch.zeros(steps).index_add(0, step, batch.weight)
    assert weight[-1] > 0.5 and weight.min() > 0.4 and weight.max() < 2
    assert 0.9 < weight[length:-length].mean() < 1.2


# --- the refresh of the internal state ------------------------------------------------------------


@random_tests
@given(stream=streams(), data=st.data(), batch_size=st.integers(1, 60))
def test_a_refresh_writes_the_next_z_of_the_transitions_and_nothing_else(stream, data, batch_size):
    """Duplicates in the batch (there are more draws than rows) keep one of their samples."""
    buffer, looked_at = make_buffer(TransitionBuffer, stream), some_times(stream, data)
    for written, _ in play(buffer, stream):
        if written not in looked_at:
            continue
        batch, before = buffer.sample(batch_size), buffer.rows.clone()
        fresh = -(torch.arange(batch_size * Z).view(batch_size, Z) + 1e6)
        buffer.refresh(batch, fresh)
        same = torch.ones(before.shape[1], dtype=torch.bool)
        same[OBS + CRITIC : OBS + CRITIC + Z] = False
        assert torch.equal(buffer.rows[:, same], before[:, same])
        changed = (buffer.rows != before).any(-1).nonzero().flatten().tolist()
        transitions = batch.after[batch.weight > 0].tolist()
        assert set(changed) == set(transitions)
        for place in transitions:
            samples = fresh[batch.after == place]
            assert (buffer.z[place] == samples).all(-1).any()
        buffer.rows.copy_(before)  # or the next look would find the fresh values


def test_the_next_sample_sees_refreshed_states():
    """As z of the successor and as z' of the row itself."""
    stream = long_stream()
    buffer = make_buffer(TransitionBuffer, stream)
    list(play(buffer, stream))
    batch = buffer.sample(4000)
    buffer.refresh(batch, batch.next_z + 1000)
    again = buffer.sample(4000)
    shift = again.next_z[:, 0] - again.next_obs[:, 0] - 0.5
    assert torch.equal(shift, 1000 * (again.weight > 0).float())
    refreshed = again.z[:, 0] - again.obs[:, 0] - 0.5 == 1000
    index = by_uid(stream, len(stream.rows))
    places = [index[uid] for uid in again.obs[:, 0].long().tolist()]
    oldest = stream.oldest(len(stream.rows))
    # the first row of an episode is no successor, and that of the oldest row is not drawn
    assert refreshed.tolist() == [not stream.rows[t][e].first and t > oldest for t, e in places]


# --- sequences ------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    stream=streams(min_slots=4, max_slots=20),
    length=st.integers(1, 16),
    last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_sequences_are_consecutive_rows_of_one_episode(data, stream, length, last, seed):
    """Where they begin and end, what has weight, a_prev and initial states, all by hand."""
    buffer, looked_at = make_buffer(SequenceBuffer, stream), some_times(stream, data)
    for written, _ in play(buffer, stream):
        if written not in looked_at:
            continue
        torch.manual_seed(seed)
        batch = buffer.sample(12 if last else 12 * length, length, last)
        assert batch.all_obs.shape == (length + 1, 12, OBS)
        assert batch.all_a_prev.shape == (length + 1, 12, ACTION)
        oldest, index = stream.oldest(written), by_uid(stream, written)
        counted = set()  # (place, sequence) of rows with weight
        for m in range(12):
            t, e = index[int(batch.all_obs[0, m, 0])]  # it begins with a row that can be drawn
            assert t >= oldest
            run = [(t, e)]
            while (
                len(run) <= length and run[-1][0] + 1 < written and stream.is_transition(*run[-1])
            ):
                run.append((run[-1][0] + 1, e))
            expect(batch.all_obs[: len(run), m], rows_at(stream, run), "obs")
            actual = batch.all_a_prev[: len(run), m]
            assert torch.equal(actual, previous_actions(stream, run))
            counted |= {(place, m) for place in range(len(run) - 1)}
            if last:  # shorter only where the episode, or the ring, begins
                place = int(batch.index[0][m])
                assert place == length - 1 or stream.rows[t][e].first or t == oldest
        expect(batch.first_z, rows_at(stream, [index[int(o)] for o in batch.all_obs[0, :, 0]]), "z")

        pairs = list(zip(*(part.tolist() for part in batch.index)))
        assert len(pairs) == (12 if last else 12 * length) and len(set(pairs)) == len(pairs)
        weights = torch.tensor([float(pair in counted) for pair in pairs])
        torch.testing.assert_close(batch.weight, weights / weights.sum().clamp(min=1))
        kept = [(k, m) for k, m in pairs if (k, m) in counted]
        begins = [index[int(batch.all_obs[0, m, 0])] for _, m in kept]
        places = [(t + k, e) for (t, e), (k, _) in zip(begins, kept)]
        rows, after = rows_at(stream, places), rows_at(stream, [(t + 1, e) for t, e in places])
        has_weight = batch.weight > 0
        if not kept:
            continue
        expect(batch.obs[has_weight], rows, "obs")
        expect(batch.state[has_weight], rows, "critic_obs")
        expect(batch.action[has_weight], rows, "action")
        expect(batch.reward[has_weight], rows, "reward")
        expect(batch.next_obs[has_weight], after, "obs")
        expect(batch.next_state[has_weight], after, "critic_obs")
        assert torch.equal(batch.a_prev[has_weight], previous_actions(stream, places))
        assert batch.terminated[has_weight].tolist() == [row.terminated for row in rows]


@pytest.mark.parametrize(("batch_size", "length", "sequences"), [(32, 8, 4), (32, 5, 6), (3, 8, 1)])
def test_both_kinds_of_sequences_see_about_batch_size_transitions(batch_size, length, sequences):
    stream = long_stream()
    buffer = make_buffer(SequenceBuffer, stream)
    list(play(buffer, stream))
    last = buffer.sample(batch_size, length, last=True)
    every = buffer.sample(batch_size, length, last=False)
    assert last.all_obs.shape[1] == len(last.weight) == batch_size
    assert every.all_obs.shape[1] == sequences and len(every.weight) == sequences * length
    assert last.first_z.shape == (batch_size, Z)


@pytest.mark.parametrize("kind", [TransitionBuffer, SequenceBuffer])
@random_tests
@given(stream=streams(), data=st.data())
def test_a_buffer_goes_on_from_its_rows_and_their_number(kind, stream, data):
    """As a checkpoint keeps them, before and after the ring has wrapped."""
    saved_at = data.draw(st.integers(1, len(stream.rows)), label="saved at")
    original, copy = make_buffer(kind, stream), make_buffer(kind, stream)
    for rows in stream.rows[:saved_at]:
        write(original, rows)
    written = original.rows[: int(original.steps) * original.num_envs]
    copy.rows[: len(written)] = written
    copy.steps.copy_(original.steps)
    for rows in stream.rows[saved_at:]:
        write(original, rows)
        write(copy, rows)
    assert torch.equal(original.rows, copy.rows) and torch.equal(original.steps, copy.steps)
