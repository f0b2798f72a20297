"""Episodes with a seed of their own, and environments that are put back where they were."""

from collections.abc import Callable
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torchrl.data import Unbounded
from torchrl.envs import Compose, SerialEnv, StepCounter, TensorDictPrimer

from envs import ColorGrid, NaturalVideo, SeededTransformedEnv, make_env
from envs.backends.square import SquareEnv
from envs.transforms.denoised_mdp import ImageJitter

mock = partial(make_env, backend="mock", task="continuous", image_size=16, frame_skip=3, pixels_only=False)
cheetah = partial(make_env, name="cheetah", image_size=16, frame_skip=50, render={"fast": True}, pixels_only=False)


def square(*transforms: Callable) -> SeededTransformedEnv:
    env = SeededTransformedEnv(SquareEnv(), Compose(*[make() for make in transforms], StepCounter()))
    env.set_seed(3)
    return env


MAKERS = {
    "counter": partial(mock, name="counter", task="terminating"),
    "reach discrete": partial(mock, name="reach", task="discrete"),
    "color grid": partial(mock, name="reach", distraction={"name": "color_grid", "level": "random"}),
    "video": partial(square, partial(NaturalVideo, num_frames=50)),
    "jitter": partial(square, partial(NaturalVideo, num_frames=50), ImageJitter, partial(ColorGrid, "minimum")),
    "CartPole": partial(make_env, backend="gym", name="CartPole-v1", from_pixels=False, frame_skip=2),
    "Pendulum": partial(make_env, backend="gym", name="Pendulum-v1", from_pixels=False, frame_skip=20),
}
DMC = {
    "state": partial(make_env, name="reacher", task="hard", from_pixels=False, frame_skip=100),
    "noisy sensor": partial(cheetah, distraction={"name": "noisy_sensor", "num_frames": 50}),
    "camera jitter": partial(cheetah, distraction={"name": "camera_jitter", "num_frames": 50}),
    "distracting": partial(cheetah, distraction={"name": "distracting_cs", "difficulty": "easy", "dynamic": True}),
}
PRIMER = partial(TensorDictPrimer, belief=Unbounded(2), expand_specs=True)


def draw_actions(env, count: int, seed: int = 0) -> list[torch.Tensor]:
    generator, spec = torch.Generator().manual_seed(seed), env.action_spec
    if spec.dtype.is_floating_point:
        return list(torch.rand(count, *spec.shape, generator=generator) * 2 - 1)
    return list(
        torch.eye(spec.shape[-1], dtype=spec.dtype)[torch.randint(spec.shape[-1], (count,), generator=generator)]
    )


def play(env, current, actions) -> tuple[list, object]:
    """All that the environment gives, and where it ends; episodes follow each other."""
    seen = []
    for action in actions:
        memory = action.clone()
        arrived, current = env.step_and_maybe_reset(current.set("action", memory))
        seen.append((arrived["next"].exclude("belief").clone(), current.exclude("belief", "next").clone()))
        memory.zero_()  # as batched environments do, which use it for the next action
    return seen, current


def assert_same(left: list, right: list) -> None:
    assert len(left) == len(right)
    for step, (pair, other) in enumerate(zip(left, right, strict=True)):
        for one, two in zip(pair, other, strict=True):
            assert set(one.keys(True, True)) == set(two.keys(True, True))
            for key, value in one.items(True, True):
                assert torch.equal(value, two[key]), (step, key)


def check_restore(make: Callable, before: int, after: int) -> None:
    """Plays on in one environment and in a new one that was put where the first was."""
    first, second = make(), make()
    second.append_transform(PRIMER())
    actions = draw_actions(first, before + after)
    _, current = play(first, first.reset(), actions[:before])
    state, shown = first.episode_state(), current.exclude("action", "next").clone()
    expected, _ = play(first, current, actions[before:])
    assert any(pair[0]["done"].item() for pair in expected), "no border of an episode was crossed"
    restored = second.restore_episode(state)
    assert not restored["belief"].any()
    assert_same([(shown,)], [(restored.exclude("action", "belief"),)])
    seen, _ = play(second, restored, actions[before:])
    assert_same(expected, seen)
    assert {key: value.tolist() for key, value in second.episode_state().items()} == {
        key: value.tolist() for key, value in first.episode_state().items()
    }
    first.close()
    second.close()


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("before", [0, 7])
def test_restored_environments_go_on_alike(name, before):
    check_restore(MAKERS[name], before, 30)


@pytest.mark.parametrize(
    "name", [name if name == "state" else pytest.param(name, marks=pytest.mark.slow) for name in DMC]
)
def test_restored_simulators_go_on_alike(name):
    check_restore(DMC[name], 5, 20)


@pytest.mark.parametrize("name", [*MAKERS, "state"])
def test_an_episode_can_be_played_alone(name):
    make = (MAKERS | DMC)[name]
    env, alone = make(), make()
    seed = env.episode_seed[0]
    seen = []
    for _ in range(3):
        current = env.reset()
        seen.append([(current.clone(),), *play(env, current, draw_actions(env, 2))[0]])
    assert env.episode_seed == (seed, 2)
    alone.set_seed(seed, episode=1)
    assert alone.episode_seed == (seed, 1)
    current = alone.reset()
    assert_same(seen[1], [(current.clone(),), *play(alone, current, draw_actions(alone, 2))[0]])
    first, second = (episode[0][0] for episode in seen[:2])
    assert name == "reach discrete" or any(not torch.equal(first[key], second[key]) for key in first.keys(True, True))


def test_seeds_start_at_episode_zero():
    env = mock(name="reach", seed=5)
    starts = [env.reset()["observation"].item() for _ in range(3)]
    assert len(set(starts)) == 3
    env.set_seed(5)
    assert env.episode == 0
    assert [env.reset()["observation"].item() for _ in range(3)] == starts
    with pytest.raises(ValueError, match="episode=-1"):
        env.set_seed(5, episode=-1)


def test_without_a_seed():
    env = SeededTransformedEnv(SquareEnv())
    env.reset()
    assert env.episode_seed is None
    with pytest.raises(RuntimeError, match=r"call set_seed\(seed\)"):
        env.episode_state()


def test_an_episode_that_has_not_begun_and_one_that_is_over():
    env, other = mock(name="reach", seed=1), mock(name="reach")
    assert other.restore_episode(env.episode_state()) is None
    assert torch.equal(other.reset()["observation"], env.reset()["observation"])
    last = env.rollout(99, auto_reset=False, tensordict=env.reset())[-1]["next"]
    assert last["done"].item() and env.episode == 1
    restored = other.restore_episode(env.episode_state())
    assert restored["done"].item() and torch.equal(restored["observation"], last["observation"])
    assert torch.equal(other.reset()["observation"], env.reset()["observation"])


def test_rows_of_a_batch():
    """Each row is put back by itself; the batch goes on from what they give."""
    make = partial(SerialEnv, 2, [partial(mock, name="reach", seed=seed) for seed in (0, 1)])
    env, other = make(), make()
    actions = [action.expand(2, 1) for action in draw_actions(mock(name="reach"), 12)]
    _, current = play(env, env.reset(), actions[:6])
    other.reset()
    rows = [new.restore_episode(old.episode_state()) for old, new in zip(env._envs, other._envs, strict=True)]
    assert_same(play(env, current, actions[6:])[0], play(other, torch.stack(rows), actions[6:])[0])
    batched = SeededTransformedEnv(make())
    batched.set_seed(0)
    with pytest.raises(RuntimeError, match=r"batch size \[2\]: ask each single environment"):
        batched.episode_state()


class Careless(gymnasium.Env):
    """Starts at a random place; draws with numbers that no seed reaches."""

    observation_space, action_space = spaces.Box(-9, 9, (1,)), spaces.Discrete(2)
    resets: list = []  # noqa: RUF012
    numbers = np.random.default_rng(0)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.resets.append(seed)
        return self.np_random.uniform(size=1).astype(np.float32), {}

    def step(self, action):
        return self.numbers.uniform(size=1).astype(np.float32), 0.0, False, False, {}


@pytest.fixture
def careless(monkeypatch):
    monkeypatch.setattr(Careless, "resets", [])
    gymnasium.register("Careless-v0", entry_point=Careless, max_episode_steps=3)
    yield partial(make_env, backend="gym", name="Careless-v0", from_pixels=False, frame_skip=1)
    del gymnasium.registry["Careless-v0"]


def test_environments_that_are_not_deterministic_are_refused(careless):
    env, other = careless(), careless()
    play(env, env.reset(), draw_actions(env, 2))
    with pytest.raises(RuntimeError, match=r"episode 0 of seed 0 .* after 2 steps: this environment is not determin"):
        other.restore_episode(env.episode_state())


def test_gymnasium_is_reset_once_per_episode_with_its_seed(careless):
    env = careless()
    play(env, env.reset(), draw_actions(env, 7))
    assert len(Careless.resets) == 3 == len(set(Careless.resets))
    assert None not in Careless.resets


def test_no_global_random_numbers_move():
    env = MAKERS["jitter"]()
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    play(env, env.reset(), draw_actions(env, 9))
    env.restore_episode(env.episode_state())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
