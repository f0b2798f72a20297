"""NoisySensor and CameraJitter: rewards and shifts by hand, walks of the published constants, nothing else touched."""

import math
import pickle
import random

import numpy as np
import pytest
import torch
from dm_control.utils import rewards
from torchrl.envs import Compose, SerialEnv, TransformedEnv, check_env_specs

from envs import Render, make_env
from envs.backends.dmc import DMCEnv
from envs.backends.mock import MockEnv
from envs.transforms.denoised_mdp import CameraJitter, ImageJitter, NoisySensor, translate

SIZE = 16
SMALL = {"num_frames": 20, "grayscale": False}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("LUCID_CACHE", str(tmp_path_factory.getbasetemp() / "lucid"))


class Foreground(Render):
    """Uniform images with a mask that keeps the left half; what the simulator draws does not matter here."""

    def __init__(self):
        super().__init__(SIZE, mask=True)

    def _call(self, next_tensordict):
        next_tensordict.set("pixels", torch.full((SIZE, SIZE, 3), 7, dtype=torch.uint8))
        next_tensordict.set("mask", torch.arange(SIZE).expand(SIZE, SIZE)[..., None] < SIZE // 2)
        return next_tensordict


def noisy(name, task, frame_skip=1, **options):
    base = DMCEnv(name=name, task=task, frame_skip=frame_skip, seed=0)
    transform = NoisySensor(**SMALL, **options)
    return TransformedEnv(base, Compose(Foreground(), transform)), transform


def test_shift_by_hand():
    image = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 4, 1)
    moved = translate(image, torch.tensor([[1.0, 0.0]]))
    assert moved[0, ..., 0].tolist() == [[0, 0, 1, 2], [0, 4, 5, 6], [0, 8, 9, 10]]  # to the right
    moved = translate(image[0], torch.tensor([0.0, -1.0]))
    assert moved[..., 0].tolist() == [[4, 5, 6, 7], [8, 9, 10, 11], [0, 0, 0, 0]]  # up
    moved = translate(image * 10, torch.tensor([[0.5, 0.0]]))
    assert moved[0, 0, :, 0].tolist() == [0, 5, 15, 25]
    assert torch.equal(translate(image, torch.zeros(1, 2)), image)
    mask = image > 4
    assert translate(mask, torch.tensor([[0.3, 1.0]]), "nearest")[0, ..., 0].int().tolist() == [
        [0] * 4,
        [0] * 4,
        [0, 1, 1, 1],
    ]


def test_the_walk_follows_its_equations():
    env = TransformedEnv(MockEnv(), Compose(Render(SIZE), ImageJitter(mult=1.0, frames_per_step=1, seed=3)))
    env.reset()
    jitter = env.transform[1]
    drawn = np.random.default_rng(3)
    place, velocity = drawn.standard_normal(2) * 0.075 / math.sqrt(2), drawn.standard_normal(2) * 0.005
    for _ in range(50):
        np.testing.assert_allclose(jitter._place, place)
        push = drawn.standard_normal(2) * 0.005
        if np.hypot(*place) >= 0.075:
            push = -0.1 * place
        velocity = (velocity + 0.5 * push) * 0.9**0.5
        place = place + 0.5 * velocity
        jitter._place, jitter._velocity = jitter._advance(jitter._place, jitter._velocity)


def test_the_walk_stays_near_the_middle_and_is_smooth():
    jitter = ImageJitter()
    place = velocity = np.zeros((100, 2))
    places = []
    for _ in range(1000):
        place, velocity = jitter._advance(place, velocity)
        places.append(place)
    pixels = np.stack(places) * jitter.mult  # [1000, 100, 2]
    assert 2 < np.linalg.norm(pixels, axis=-1).mean() < 12  # around 9 pixels of 64
    assert np.linalg.norm(np.diff(pixels, axis=0), axis=-1).max() < 5
    assert np.linalg.norm(pixels, axis=-1).max() < 40


def test_jitter_moves_the_whole_image_and_the_mask():
    base = MockEnv(episode_length=20)
    env = TransformedEnv(base, Compose(Foreground(), ImageJitter(mult=40.0)))
    check_env_specs(env)
    data = env.rollout(10)
    shift = env.transform[1]._place * 40.0
    last = data["next"][-1]
    whole = torch.full((SIZE, SIZE, 3), 7, dtype=torch.uint8)
    assert torch.equal(last["pixels"], translate(whole, torch.from_numpy(shift)))
    left = torch.arange(SIZE).expand(SIZE, SIZE)[..., None] < SIZE // 2
    assert torch.equal(last["mask"], translate(left, torch.from_numpy(shift), "nearest"))
    assert len({tuple(frame.flatten().tolist()) for frame in data["pixels"]}) == 10


def test_rows_of_a_batch_restart_on_their_own():
    parts = [lambda n=n: TransformedEnv(MockEnv(episode_length=n), Render(SIZE)) for n in (3, 5)]
    env = TransformedEnv(SerialEnv(2, parts), ImageJitter(seed=0))
    check_env_specs(env)
    jitter = env.transform
    data = env.step(env.reset().set("action", torch.zeros(2, 2)))
    before = jitter._place.copy()
    rest = env.reset(env.step_mdp(data).set("_reset", torch.tensor([[True], [False]])))
    assert (jitter._place[1] == before[1]).all() and (jitter._place[0] != before[0]).all()
    assert rest["pixels"].shape == (2, SIZE, SIZE, 3)
    env.rollout(8, break_when_any_done=False)


@pytest.mark.parametrize(
    ("name", "task", "scale"), [("cheetah", "run", 10.0), ("walker", "walk", 1.2), ("reacher", "easy", 0.06)]
)
def test_reward_through_a_disturbed_sensor(name, task, scale):
    env, transform = noisy(name, task, mult=0.5, seed=1)
    physics, rng, seen = env.base_env.physics, np.random.default_rng(0), []
    data = env.reset()
    for _ in range(8):
        frame = transform._video.frames[int(transform._position)]
        noise = (frame[2:6, 2:6].mean() / 255 - 0.5) * 0.5
        action = torch.from_numpy(rng.uniform(-1, 1, env.action_spec.shape).astype(np.float32))
        data = env.step(data.set("action", action))
        offset = noise * scale
        if name == "cheetah":
            bounds, kind = (10, math.inf), {"margin": 10, "value_at_margin": 0, "sigmoid": "linear"}
            expected = rewards.tolerance(physics.speed() + offset, bounds, **kind)
        elif name == "reacher":
            expected = rewards.tolerance(physics.finger_to_target_dist() + offset, (0, 0.06))
        else:
            standing = rewards.tolerance(physics.torso_height() + offset, (1.2, math.inf), margin=0.6)
            moving = {"margin": 0.5, "value_at_margin": 0.5, "sigmoid": "linear"}
            fast = rewards.tolerance(physics.horizontal_velocity(), (1, math.inf), **moving)
            expected = (3 * standing + (1 + physics.torso_upright()) / 2) / 4 * (5 * fast + 1) / 6
        assert data["next", "reward"].item() == pytest.approx(expected, rel=1e-6)
        seen.append(noise)
        data = env.step_mdp(data)
    assert len(set(seen)) > 4 and max(map(abs, seen)) <= 0.25
    env.close()


def test_only_the_reward_changes():
    env, _ = noisy("walker", "walk", frame_skip=2)
    quiet, _ = noisy("walker", "walk", frame_skip=2, mult=0.0)
    bare = DMCEnv(name="walker", task="walk", frame_skip=2, seed=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        rows = [env.reset(), quiet.reset(), bare.reset()]
        rewarded = []
        for _ in range(5):
            action = torch.rand(6, generator=generator) * 2 - 1
            stepped = [e.step(row.set("action", action)) for e, row in zip((env, quiet, bare), rows, strict=True)]
            rows = [e.step_mdp(row) for e, row in zip((env, quiet, bare), stepped, strict=True)]
            for key in ("observation", "terminated", "truncated", "done"):
                assert torch.equal(rows[0][key], rows[2][key]) and torch.equal(rows[1][key], rows[2][key])
            assert torch.equal(stepped[1]["next", "reward"], stepped[2]["next", "reward"])
            rewarded.append(stepped[0]["next", "reward"].item() - stepped[2]["next", "reward"].item())
        assert any(rewarded)
        assert env.base_env.physics.get_state().tobytes() == bare.physics.get_state().tobytes()
    for environment in (env, quiet, bare):
        environment.close()


@pytest.mark.parametrize("name", ["noisy_sensor", "camera_jitter"])
def test_make_env_and_seeds(name):
    def record(seed):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
        env = make_env(
            name="walker",
            task="walk",
            image_size=SIZE,
            render={"fast": True},
            seed=seed,
            distraction={"name": name, "num_frames": 20},
        )
        data, seen = env.reset(), []
        for _ in range(4):
            data = env.step(data.set("action", torch.zeros(6)))
            seen.append((data["next", "pixels"].clone(), data["next", "reward"].item()))
            data = env.step_mdp(data)
        assert set(env.observation_spec.keys()) == {"pixels", "previous_action", "previous_reward", "is_init"}
        assert random.getstate() == before[0] and (np.random.get_state()[1] == before[1]).all()
        assert torch.equal(torch.get_rng_state(), before[2])
        description = env.transform[1].describe()
        env.close()
        return seen, description

    (first, description), (again, _), (other, _) = record(0), record(0), record(1)
    assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    assert description["frames"] == 20


def test_pickle_clone_and_state():
    jitter = ImageJitter(seed=4)
    env = TransformedEnv(MockEnv(), Compose(Render(SIZE), jitter))
    env.rollout(3)
    state, clone, loaded = jitter.state_dict(), jitter.clone(), pickle.loads(pickle.dumps(jitter))
    jitter._random.standard_normal(7)
    fresh = ImageJitter()
    fresh.load_state_dict(state)
    values = [other._advance(other._place, other._velocity)[0] for other in (clone, loaded, fresh)]
    assert (values[0] == values[1]).all() and (values[0] == values[2]).all()


def test_errors_name_the_value_and_the_fix():
    env, _ = noisy("cartpole", "swingup")
    with pytest.raises(ValueError, match=r"name='cartpole': NoisySensor knows the sensors of cheetah, walker, reacher"):
        env.reset()
    env.close()
    with pytest.raises(TypeError, match="MockEnv has no dm_control physics: put NoisySensor on a DMCEnv"):
        TransformedEnv(MockEnv(), Compose(Foreground(), NoisySensor(**SMALL))).reset()
    with pytest.raises(KeyError, match="ImageJitter reads 'pixels', which is missing"):
        TransformedEnv(MockEnv(), ImageJitter()).reset()
    with pytest.raises(ValueError, match="frames_per_step=0: give a whole number of at least 1"):
        ImageJitter(frames_per_step=0)
    with pytest.raises(ValueError, match="split='both': choose one of test, train"):
        CameraJitter(split="both")


def test_a_disturbed_environment_can_be_pickled():
    env, _ = noisy("walker", "walk", mult=0.5)
    env.reset()
    base = pickle.loads(pickle.dumps(env.base_env))
    physics, disturbed = base.physics, base._env.task.get_reward
    assert disturbed.noise == env.base_env._env.task.get_reward.noise != 0
    assert disturbed(physics) == env.base_env._env.task.get_reward(env.base_env.physics)
    disturbed.noise = -1.0  # far below the height that pays most
    assert disturbed(physics) < disturbed.get_reward(physics)
    assert not isinstance(disturbed.get_reward, type(disturbed))
    env.close()
