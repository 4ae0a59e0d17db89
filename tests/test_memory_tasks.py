"""The memory tasks: what they show, pay, end and draw, and what the best policies earn."""

import re

import numpy as np
import pytest

import envs
from envs.memory import GREEN, RED, hits_wall

each = pytest.mark.parametrize

CUES = [
    f"{name}{horizon}-v0"
    for name in ("CueRecall", "CueRecall-delayed")
    for horizon in ("", "-5", "-10", "-20", "-100", "-300", "-1000")
]
POINTS = ["PointMassMemory-v0", "PointMassDoor-v0"]


def cue_return(env, policy):
    observation, _ = env.reset()
    total, terminated, steps = 0.0, False, 0
    while not terminated:
        action = np.float32([policy(observation)])
        observation, reward, terminated, truncated, _ = env.step(action)
        assert not truncated
        total += reward
        steps += 1
    return total, steps


@each("horizon", [1, 20])
def test_cue_recall_returns(horizon):
    env = envs.make("CueRecall-v0", horizon=horizon)
    env.reset(seed=0)
    assert cue_return(env, lambda o: o["critic"][0]) == (pytest.approx(horizon), horizon)
    # Without memory the best guess after the first step is anything between the cues.
    best = pytest.approx(1 + 0.2 * (horizon - 1), abs=0.1 * horizon)
    for guess in (lambda o: o["policy"][0], lambda o: o["policy"][0] or 0.5):
        assert np.mean([cue_return(env, guess)[0] for _ in range(200)]) == best


@each("horizon", [2, 20])
def test_delayed_cue_recall_asks_for_the_cue_at_the_end(horizon):
    env = envs.make("CueRecall-delayed-v0", horizon=horizon)
    cue = env.reset(seed=0)[0]["critic"][0]
    rewards = [env.step(np.float32([0.1]))[1] for _ in range(horizon - 1)]
    rewards += [env.step(np.float32([cue]))[1]]
    assert rewards == [pytest.approx(0.9)] * (horizon - 1) + [pytest.approx(horizon)]


@each("env_id", CUES)
def test_cue_is_visible_once_and_asked_for_to_the_horizon(env_id):
    env = envs.make(env_id)
    horizon = int(re.sub(r"\D", "", env_id[:-3]) or 20)
    assert env.unwrapped.delayed == ("delayed" in env_id)
    cues = {round(float(env.reset(seed=seed)[0]["critic"][0]), 6) for seed in range(10)}
    assert cues == {-0.8, 0.8}
    observation, _ = env.reset(seed=0)
    cue = observation["critic"][0]
    assert observation["policy"].tolist() == [cue, 0]
    for step in range(1, horizon + 1):
        observation, _, terminated, *_ = env.step(np.float32([0]))
        time = np.float32(step / horizon)
        assert observation["policy"].tolist() == [0, time] and terminated == (step == horizon)
        assert observation["critic"].tolist() == [cue, time]


def heading(start, goal):
    """The action that points from `start` to `goal`, both (2,)."""
    dx, dy = np.subtract(goal, start)
    return np.float32([np.arctan2(dy, dx) % (2 * np.pi) / np.pi - 1])


def unscale(values):
    return (np.asarray(values, float) + 1) * 75


@each("env_id", POINTS)
def test_point_mass_oracle(env_id):
    """One who knows the cue is there in a straight line, or in one through both doors."""
    env, doors = envs.make(env_id), "Door" in env_id
    sight, scale, decay = (20, 10, 0.03) if doors else (30, 1, 0.1)
    for seed in range(6):
        observation, _ = env.reset(seed=seed)
        np.testing.assert_array_equal(observation["policy"], observation["critic"])
        start, cue = np.split(unscale(observation["policy"]), [2])
        goal = (75, 140) if doors else (cue[0], 130)
        way = [(left + 20, y) for left, wall in zip(cue, (60, 90)) for y in (wall - 2, wall + 2)]
        blind, position = 0, start
        for target in [*(way if doors else []), goal]:
            while np.linalg.norm(position - target) > 1.8:
                before = position
                observation, reward, terminated, truncated, info = env.step(heading(before, target))
                position = unscale(observation["critic"][:2])
                np.testing.assert_allclose(np.linalg.norm(position - before), 1.8, atol=1e-4)
                distance = np.linalg.norm(position - goal)
                assert reward == pytest.approx(scale * np.exp(-decay * distance), rel=1e-3)
                assert not terminated and not truncated
                assert info["success"] is bool(distance <= 5)
                np.testing.assert_array_equal(observation["policy"][:2], observation["critic"][:2])
                np.testing.assert_allclose(unscale(observation["critic"][2:]), cue, atol=1e-4)
                visible = np.linalg.norm(position - start) <= sight
                seen = observation["critic"][2:] if visible else 0 * cue
                np.testing.assert_array_equal(observation["policy"][2:], seen)
                blind += not visible
        assert info["success"] and blind >= 47
        for _ in range(5):  # success is about having been there
            observation, *_, info = env.step(np.float32([0.5]))
        assert np.linalg.norm(goal - unscale(observation["critic"][:2])) > 5 and info["success"]
    drawn = [unscale(env.reset()[0]["critic"]).round(3) for _ in range(60)]
    starts, cues = {(x, y) for x, y, *_ in drawn}, {x for _, _, *cue in drawn for x in cue}
    if doors:
        assert starts == {(75, 10)} and 10 <= min(cues) < 20 and 90 < max(cues) <= 100
        assert all(left != other for _, _, left, other in drawn)
    else:
        assert cues == {25, 57, 88, 120} and starts == {(x, 15) for x in cues}
        assert len({(x, cue) for x, _, cue in drawn}) > 10  # of 16: where it starts tells nothing


def test_point_mass_sees_the_cue_again_when_it_returns():
    env = envs.make("PointMassMemory-v0")
    env.reset(seed=0)
    visible = [bool(env.step(np.float32([-0.5]))[0]["policy"][2]) for _ in range(30)]
    visible += [bool(env.step(np.float32([0.5]))[0]["policy"][2]) for _ in range(29)]
    assert visible == [True] * 16 + [False] * 27 + [True] * 16


@each("env_id", POINTS)
@each(("action", "axis"), [(-1, 0), (0, 0), (0.5, 1)])
def test_leaving_the_field(env_id, action, axis):
    env = envs.make(env_id)
    env.reset(seed=0)
    position, terminated = env.unwrapped.start.copy(), False
    while not terminated:
        observation, reward, terminated, *_ = env.step(np.float32([action]))
        position += 1.8 * np.array([np.cos(np.pi * (action + 1)), np.sin(np.pi * (action + 1))])
        inside = 0 <= position[axis] <= 150
        assert terminated == (reward == -2) == (not inside)
        assert observation in env.observation_space


@each("env_id", POINTS)
def test_field_is_no_longer_than_the_time_limit(env_id):
    env = envs.make(env_id)
    env.reset(seed=0)
    for step in range(1, 1001):
        *_, terminated, truncated, _ = env.step(np.float32([step % 2 - 1]))
        assert not terminated and truncated is (step == 1000)


@each("wall", [0, 1])
def test_walls_end_the_episode(wall):
    env = envs.make("PointMassDoor-v0")
    for seed in range(10):
        env.reset(seed=seed)
        task = env.unwrapped
        y, left, right = task.doors[wall]
        assert (y, right - left) == pytest.approx(((60, 90)[wall], 40))
        for x, hit in [(left - 1, True), (left + 1, False), (right - 1, False), (right + 1, True)]:
            env.reset(seed=seed)
            task.trail = [np.array([x, y - 0.5])]
            observation, reward, terminated, _, info = env.step(np.float32([-0.5]))
            assert terminated is (reward == -2) is hit
            assert observation in env.observation_space
            assert not info["success"]


@each(
    ("before", "after", "hit"),
    [
        ((5, 50), (5, 59.9), False),  # stops short of the wall
        ((5, 50), (5, 60), True),  # stops at the wall
        ((25, 50), (25, 60), False),  # stops in the door
        ((25, 60), (5, 60), True),  # walks along the wall into the post
        ((25, 60), (35, 60), False),  # walks along the wall inside the door
        ((9, 59), (11, 61), False),  # meets the wall exactly at the edge of the door
        ((8.9, 59), (10.9, 61), True),  # ends in front of the door but crosses beside it
        ((10.9, 61), (8.9, 59), True),  # and downwards
        ((49, 61), (51, 59), False),
        ((60, 50), (41, 90), True),  # crosses at 55.25, and at 49.5
        ((54, 50), (36, 90), False),
        ((5, 61), (5, 70), False),  # begins and ends behind the wall
        ((10, 60), (78.87690827376503, 0), False),  # begins exactly at the edge of the door
    ],
)
def test_hits_wall(before, after, hit):
    assert hits_wall(np.array(before), np.array(after), 60.0, 10.0, 50.0) is hit


def pixels(image, colour):
    """Row and column of those of a colour, (n, 2)."""
    return np.argwhere((image == colour).all(-1))


@each("env_id", POINTS)
def test_rendering(env_id):
    env = envs.make(env_id, render_mode="rgb_array")
    env.reset(seed=0)
    first = env.render()
    assert first.shape == (300, 300, 3) and first.dtype == np.uint8
    for _ in range(10):
        env.step(np.float32([-0.5]))
    # The point has gone up by 18 units, 36 pixels.
    before, after = (pixels(image, RED).mean(0) for image in (first, env.render()))
    np.testing.assert_allclose(before - after, [36, 0], atol=1)
    trail = pixels(env.render(), (240, 170, 120))[:, 0]
    assert len(trail) > 5 and after[0] <= trail.min() <= trail.max() <= before[0] + 1
    walls = (first == 0).all(-1).any(1).sum()
    assert walls == (8 if env_id == "PointMassDoor-v0" else 0)


def test_rendering_the_cue_and_into_a_list():
    env = envs.make("CueRecall-v0", render_mode="rgb_array_list")
    cue = env.reset(seed=0)[0]["critic"][0]
    env.step(np.float32([-0.5]))
    _, image = env.render()
    assert (image.shape, image.dtype) == ((300, 300, 3), np.uint8)
    for half, colour, value in [(image[:150], GREEN, cue), (image[150:], RED, -0.5)]:
        assert pixels(half, colour)[:, 1].mean() == pytest.approx(150 * (value + 1), abs=1)
