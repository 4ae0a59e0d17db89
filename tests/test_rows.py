"""The replay buffers against a plain list of rows: nothing that is drawn crosses an episode.

A random stream of episodes is written into the buffer under test and, in parallel, into a Python
list. Every row carries numbers that say which row it is, so whatever comes out can be traced back.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bptt_sac import SequenceBuffer
from s2pg_sac import TransitionBuffer

OBS, CRITIC, Z, ACTION = 2, 3, 2, 2
CPU = torch.device("cpu")
WARMUP_ROUNDS = 40  # draws per drawable row; one stays undrawn with probability e^-40


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

    @property
    def columns(self):
        """o, s, z, a and r."""
        u = self.uid
        return [u, -u], [u + 0.25, self.step, 7], [u + 0.5, -u], [u + 0.75, u], u + 0.125


class Stream(NamedTuple):
    """Rows by time and environment, and how large the ring is that holds the newest of them."""

    num_envs: int
    slots: int
    spare: int  # rows of the buffer beyond whole slots
    rows: list  # [time][env]

    def oldest(self, written):
        """Oldest time that is drawn: its previous action is sure to be in the ring."""
        return max(0, written - self.slots) + 1

    def drawable(self, written):
        """(time, env) of all rows that can be drawn, by uid, once `written` slots were written."""
        times = range(self.oldest(written), written - 1)
        places = [(t, e) for t in times for e in range(self.num_envs)]
        return {self.rows[t][e].uid: (t, e) for t, e in places}

    def at(self, places, later=0):
        return [self.rows[t + later][e] for t, e in places]

    def a_prev(self, places):
        """The action of the same episode one step before, or zeros."""
        return torch.tensor(
            [
                [0.0] * ACTION if self.rows[t][e].first else self.rows[t - 1][e].columns[3]
                for t, e in places
            ]
        )


@st.composite
def streams(draw, max_slots=14):
    """Episodes of 1 to 12 transitions that terminate, are truncated or are interrupted."""
    num_envs, slots = draw(st.integers(1, 4)), draw(st.integers(4, max_slots))
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


def played(kind, stream, data, shared=False):
    """A buffer and how many slots were written: after the last of a stream, and some before."""
    size = stream.slots * stream.num_envs + stream.spare
    buffer = kind(size, stream.num_envs, OBS, 0 if shared else CRITIC, Z, ACTION, CPU)
    times = data.draw(st.sets(st.integers(1, len(stream.rows)), max_size=4), label="times")
    for t, rows in enumerate(stream.rows):
        *tensors, reward = (
            np.array(column, np.float32) for column in zip(*[r.columns for r in rows])
        )
        flags = np.array([row.terminated for row in rows]), np.array([row.first for row in rows])
        buffer.add(*map(torch.tensor, tensors), reward, *flags)
        if t + 1 in times | {len(stream.rows)} and stream.drawable(t + 1):
            yield buffer, t + 1


def expect(actual, rows):
    """`actual`, some of o, s, z, a, r by number, are what `rows` carry."""
    for k, column in actual.items():
        expected = torch.tensor([row.columns[k] for row in rows], dtype=torch.float32)
        assert torch.equal(column, expected)


# --- transitions ----------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(stream=streams(), data=st.data(), shared=st.booleans())
def test_every_row_is_drawn_and_has_weight_if_it_is_a_transition(stream, data, shared):
    """No row without successor, nothing across the seam of the ring, no weight across episodes.

    A critic that sees no more than the policy gets z, and its rows are stored once.
    """
    for buffer, written in played(TransitionBuffer, stream, data, shared):
        index = stream.drawable(written)
        batch = buffer.sample(WARMUP_ROUNDS * len(index))
        drawn = batch.obs[:, 0].long().tolist()
        assert set(drawn) == set(index)
        places = [index[uid] for uid in drawn]
        rows, after = stream.at(places), stream.at(places, 1)
        expect({0: batch.obs, 2: batch.z, 3: batch.action, 4: batch.reward}, rows)
        expect({0: batch.next_obs, 2: batch.next_z}, after)
        if shared:
            assert buffer.rows.shape[1] == OBS + Z + ACTION + 3
            assert torch.equal(batch.state, torch.cat([batch.obs, batch.z], -1))
            assert torch.equal(batch.next_state, torch.cat([batch.next_obs, batch.next_z], -1))
        else:
            expect({1: batch.state}, rows)
            expect({1: batch.next_state}, after)
        assert torch.equal(batch.a_prev, stream.a_prev(places))
        assert batch.terminated.tolist() == [row.terminated for row in rows]
        slots = [(t + 1) % stream.slots * stream.num_envs + e for t, e in places]
        assert batch.after.tolist() == slots

        counted = [(row.env, row.episode) == (s.env, s.episode) for row, s in zip(rows, after)]
        assert all(s.step == row.step + 1 for row, s, c in zip(rows, after, counted) if c)
        expected = torch.tensor(counted).float() / max(sum(counted), 1)
        torch.testing.assert_close(batch.weight, expected)


@pytest.mark.parametrize("kind, more", [(TransitionBuffer, ()), (SequenceBuffer, (1, True))])
def test_rows_are_drawn_uniformly(kind, more):
    """Pearson's chi-square over all of them: mean k, variance 2 k."""
    buffer = kind(50, 2, 1, 0, 1, 1, CPU)
    for t in range(60):
        row = torch.tensor([[2.0 * t], [2.0 * t + 1]])
        buffer.add(row, row, row, row, np.zeros(2), np.zeros(2), np.full(2, t % 7 == 0))
    buffer.steps += 25 * 2**20  # of a long run, whose rows float32 could not count
    k = 2 * (25 - 2)  # neither the oldest of a ring nor the newest
    counts = torch.bincount(buffer.sample(400 * k, *more).obs[:, 0].long())
    counts = counts[counts > 0].double()
    assert len(counts) == k
    assert (counts - 400).square().sum() / 400 < k - 1 + 5 * (2 * (k - 1)) ** 0.5


@settings(max_examples=30, deadline=None)
@given(stream=streams(), data=st.data(), batch_size=st.integers(1, 60))
def test_a_refresh_writes_the_next_z_of_the_transitions_and_nothing_else(stream, data, batch_size):
    """Duplicates in the batch (there are more draws than rows) keep one of their samples."""
    for buffer, _ in played(TransitionBuffer, stream, data):
        batch, before = buffer.sample(batch_size), buffer.rows.clone()
        fresh = -(torch.arange(batch_size * Z).view(batch_size, Z) + 1e6)
        buffer.refresh(batch, fresh)
        changed = buffer.rows != before
        transitions = batch.after[batch.weight > 0].tolist()
        assert set(changed.any(-1).nonzero().flatten().tolist()) == set(transitions)
        changed[:, OBS + CRITIC : OBS + CRITIC + Z] = False
        assert not changed.any()
        for place in transitions:
            assert (buffer.z[place] == fresh[batch.after == place]).all(-1).any()
        buffer.rows.copy_(before)  # or the next look would find the fresh values


# --- sequences ------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(), stream=streams(max_slots=20), length=st.integers(1, 16), last=st.booleans(),
    batch_size=st.integers(1, 100), seed=st.integers(0, 1000),
)  # fmt: skip
def test_sequences_are_consecutive_rows_of_one_episode(
    data, stream, length, last, batch_size, seed
):
    """Where they begin and end, what has weight, a_prev and initial states, all by hand."""
    for buffer, written in played(SequenceBuffer, stream, data):
        torch.manual_seed(seed)
        batch = buffer.sample(batch_size, length, last)
        count = batch_size if last else max(1, batch_size // length)
        assert batch.all_obs.shape == (length + 1, count, OBS)
        assert batch.all_a_prev.shape == (length + 1, count, ACTION)
        oldest, index = stream.oldest(written), stream.drawable(written)
        begins = [index[uid] for uid in batch.all_obs[0, :, 0].long().tolist()]
        expect({2: batch.first_z}, stream.at(begins))
        counted = set()  # (place, sequence) of rows with weight
        for m, (t, e) in enumerate(begins):
            run = [(t, e)]
            while len(run) <= length and t + len(run) < written:
                if stream.rows[t + len(run)][e].first:
                    break
                run.append((t + len(run), e))
            expect({0: batch.all_obs[: len(run), m]}, stream.at(run))
            assert torch.equal(batch.all_a_prev[: len(run), m], stream.a_prev(run))
            counted |= {(place, m) for place in range(len(run) - 1)}
            if last:  # shorter only where the episode, or the ring, begins
                place = int(batch.index[0][m])
                assert place == length - 1 or stream.rows[t][e].first or t == oldest

        pairs = list(zip(*(part.tolist() for part in batch.index)))
        assert len(pairs) == count * (1 if last else length) and len(set(pairs)) == len(pairs)
        weights = torch.tensor([float(pair in counted) for pair in pairs])
        torch.testing.assert_close(batch.weight, weights / weights.sum().clamp(min=1))
        places = [(begins[m][0] + k, begins[m][1]) for k, m in pairs if (k, m) in counted]
        if not places:
            continue
        kept, rows = batch.weight > 0, stream.at(places)
        actual = batch.obs, batch.state, None, batch.action, batch.reward
        expect({k: actual[k][kept] for k in (0, 1, 3, 4)}, rows)
        after = stream.at(places, 1)
        expect({0: batch.next_obs[kept], 1: batch.next_state[kept]}, after)
        assert torch.equal(batch.a_prev[kept], stream.a_prev(places))
        assert batch.terminated[kept].tolist() == [row.terminated for row in rows]


def test_a_loss_on_all_rows_does_not_neglect_the_ends_of_episodes():
    """The last transition of an episode, the only one that terminates, counts half of the average
    or more; were each drawn transition the last of its sequence, it would count 1 / 16."""
    steps, length = 60, 16
    buffer = SequenceBuffer(400, 1, 1, 0, 1, 1, CPU)
    for t in range(6 * (steps + 1)):
        step = t % (steps + 1)
        row, first, last = torch.full((1, 1), float(step)), step == 0, step == steps - 1
        buffer.add(row, row, row, row, np.zeros(1), np.array([last]), np.array([first]))
    batch = buffer.sample(length * 20_000, length, last=False)
    step = batch.obs[:, 0].long().clamp(max=steps - 1)
    weight = steps * torch.zeros(steps).index_add(0, step, batch.weight)
    assert weight[-1] > 0.5 and weight.min() > 0.4 and weight.max() < 2
    assert 0.9 < weight[length:-length].mean() < 1.2
