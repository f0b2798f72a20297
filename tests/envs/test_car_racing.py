"""CarRacing with its own view: the same pixels, drawn when they are asked for."""

import gymnasium
import numpy as np
import pytest
import torch

from envs import make_env
from envs.backends.car_racing import CarRacingView


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (24, {}),  # while the view zooms in, at the start
        pytest.param(140, {"domain_randomize": True, "continuous": False}, marks=pytest.mark.slow),
    ],
)
def test_every_pixel_is_that_of_the_environment(steps, options):
    stock, own = (gymnasium.make("CarRacing-v3", **options) for _ in range(2))
    view, random = CarRacingView(own.unwrapped), np.random.default_rng(0)
    for seed in (3, 4):
        first, _ = stock.reset(seed=seed)
        own.reset(seed=seed)
        assert np.array_equal(view.draw(), first)
        for step in range(steps // 2):
            if stock.unwrapped.continuous:
                action = np.array([np.sin(step / 8), 0.6, 0.0], np.float32)
            else:
                action = random.choice([3, 3, 3, 2, 1, 4])
            image, reward, *_ = stock.step(action)
            blank, same_reward, *_ = own.step(action)
            assert np.array_equal(view.draw(), image), f"step {step}"
            assert reward == same_reward and not blank.any()


def test_what_is_not_in_sight_is_not_drawn(monkeypatch):
    env = gymnasium.make("CarRacing-v3").unwrapped
    view, drawn = CarRacingView(env), []
    env.reset(seed=0)
    for _ in range(60):  # until the view has zoomed in
        env.step(np.zeros(3, np.float32))
    draw = env._draw_colored_polygon
    monkeypatch.setattr(env, "_draw_colored_polygon", lambda *args, **options: drawn.append(draw(*args, **options)))
    view.draw()
    assert 10 < len(drawn) < 80 and len(env.road_poly) + 401 > 600


def make(**options):
    return make_env(backend="gym", name="CarRacing-v3", **options)


def test_a_step_is_drawn_once(monkeypatch):
    env, calls = make(frame_skip=3), []
    draw = CarRacingView.draw
    monkeypatch.setattr(CarRacingView, "draw", lambda view: (calls.append(1), draw(view))[1])
    data = env.rollout(4)
    assert len(calls) == 5 and (data["pixels"][1:] != data["pixels"][:-1]).flatten(1).any(1).all()


@pytest.mark.parametrize(("action", "received"), [(0, [0, 0.5, 0]), (-1, [-1, 0, -1]), (1, [1, 1, 1])])
def test_the_environment_takes_steering_gas_and_brake_from_minus_one_to_one(action, received):
    assert make(frame_skip=1).base_env.read_action(torch.full((3,), float(action))).tolist() == received


def test_the_brake_is_off_below_zero():
    speeds = []
    for brake in (0.0, -1.0, 0.5):
        env = gymnasium.make("CarRacing-v3").unwrapped
        CarRacingView(env)
        env.reset(seed=0)
        for _ in range(10):
            env.step(np.array([0, 1, brake], np.float32))
        speeds.append(env.car.hull.linearVelocity.length)
    assert speeds[0] == speeds[1] > speeds[2]


def test_discrete_actions():
    assert make(frame_skip=1, options={"continuous": False}).action_spec.shape == (5,)
