"""DistractingCS: the numbers of its presets, walks that stay in their box, and a task that does not notice."""

import math
import pickle
import random
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torchrl.envs import Compose, ParallelEnv, SerialEnv, TransformedEnv, check_env_specs

from envs import Render, make_env
from envs.backends.dmc import DMCEnv
from envs.backends.mock import MockEnv
from envs.transforms.distracting_camera import (
    CameraWalk,
    camera_ranges,
    look_along,
    nearest_sphere,
    to_point,
    to_sphere,
)
from envs.transforms.distracting_cs import DOMAINS, FLOOR_ALPHAS, DistractingCS
from envs.transforms.distracting_scene import SkyVideo, ping_pong
from envs.transforms.video_sources import Video

TASKS = {
    "ball_in_cup": "catch",
    "cartpole": "swingup",
    "cheetah": "run",
    "finger": "spin",
    "reacher": "easy",
    "walker": "walk",
}
CLIPS = np.array([[i * 7, 7] for i in range(10)])


@pytest.fixture(autouse=True)
def small_video(monkeypatch):
    """Ten clips of seven frames each, in place of the procedural ones."""
    frames = np.random.default_rng(0).integers(0, 256, (70, 16, 16, 3), dtype=np.uint8)

    def open_small(*, num_frames=None, **_):
        count = 10 if num_frames is None else num_frames // 100
        return Video(frames, CLIPS[:count], {"source": "small"})

    monkeypatch.setattr("envs.transforms.distracting_cs.open_procedural", open_small)


def distracted(name="walker", *, transform=None, size=None, **options):
    """An environment with the transform, and with images if they have a size."""
    base = DMCEnv(name=name, task=TASKS[name], frame_skip=2, seed=0)
    transform = transform or DistractingCS(**options)
    draw = [Render(size, fast=True)] if size else []
    return TransformedEnv(base, Compose(transform, *draw)), transform


def actions(env, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *env.action_spec.shape, generator=generator) * 2 - 1


def play(env, moves):
    """Steps through the moves; the observations and rewards on the way, the first observation included."""
    data = env.reset()
    seen = [data]
    for move in moves:
        seen.append(env.step(data.set("action", move))["next"].clone())
        data = env.step_mdp(data)
    return seen


@pytest.mark.parametrize(("difficulty", "scale", "videos"), [("easy", 0.1, 4), ("medium", 0.2, 8), ("hard", 0.3, 10)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_numbers_of_the_presets(difficulty, scale, videos, dynamic):
    transform = DistractingCS(difficulty, dynamic=dynamic)
    ranges = transform.camera.ranges
    for delta in (ranges.vertical_delta, ranges.horizontal_delta, ranges.roll_delta):
        assert delta == pytest.approx(math.pi / 2 * scale)
    assert (ranges.zoom_in, ranges.zoom_out) == pytest.approx((0.5 * scale, 1.5 * scale))
    moving = [0.1 * scale, 0.4 * scale, math.pi / 300 * scale, math.pi / 50 * scale, 0.03 * scale]
    speeds = (ranges.vel_std, ranges.max_vel, ranges.roll_vel_std, ranges.max_roll_vel, transform.color.step_std)
    assert speeds == pytest.approx(moving if dynamic else [0.0] * 5)
    assert transform.color.max_delta == scale
    assert len(transform._video.clips) == videos
    assert {name: FLOOR_ALPHAS.get(name, 0.3) for name in DOMAINS} == {
        "ball_in_cup": 0.3,
        "cartpole": 0.3,
        "cheetah": 1.0,
        "finger": 0.3,
        "reacher": 0.0,
        "walker": 1.0,
    }


@pytest.mark.parametrize(
    "name", [name if name in ("cheetah", "reacher") else pytest.param(name, marks=pytest.mark.slow) for name in DOMAINS]
)
def test_every_walk_stays_in_its_box(name):
    env = DMCEnv(name=name, task=TASKS[name], seed=0)
    env.reset()
    usual, pose = to_sphere_of(env), env.physics.data.cam_xpos[0].copy()
    walk, generator = CameraWalk(camera_ranges(0.3, True)), np.random.default_rng(0)
    walk.start(env.physics, 0, generator)
    assert walk.overhead == (name == "reacher")
    walk.low, walk.high = np.array(walk.low), np.array(walk.high)
    assert (walk.low <= np.array(usual) + 1e-12).all() and (np.array(usual) <= walk.high + 1e-12).all()
    np.testing.assert_allclose(walk.high[0] / usual[0], 1.45)
    np.testing.assert_allclose(walk.low[0] / usual[0], 0.85)
    assert (walk.high - walk.low)[1:].max() <= 0.6 * math.pi / 2 + 1e-12
    if name != "reacher":
        assert walk.high[2] <= math.pi / 2 and walk.low[2] >= 0
    spheres, rolls = np.empty((10_000, 3)), np.empty(10_000)
    for i in range(len(spheres)):
        walk.advance(generator)
        spheres[i], rolls[i] = walk.sphere, walk.roll
    assert (spheres >= walk.low).all() and (spheres <= walk.high).all()
    assert (np.abs(rolls) <= 0.3 * math.pi / 2).all()
    moves = np.diff([to_point(sphere) for sphere in spheres], axis=0)
    assert np.linalg.norm(moves, axis=1).max() <= 0.4 * 0.3 * usual[0] / 4 * 1.5  # no jump; clipping may slide along
    assert (spheres.max(0) - spheres.min(0) > 0.8 * (walk.high - walk.low)).all()  # and it goes everywhere
    walk.apply(env.physics)
    axes = env.physics.data.cam_xmat[0].reshape(3, 3)
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-9)
    assert np.linalg.det(axes) == pytest.approx(1)
    assert not np.allclose(pose, env.physics.data.cam_xpos[0])
    env.close()


def to_sphere_of(env):
    """Where the usual camera is, seen from what it moves around."""
    follows = env.physics.model.cam_mode[0] != 0
    return to_sphere(env.physics.data.cam_xpos[0] - follows * env.physics.data.subtree_com[1])


def test_the_usual_pose_gives_the_usual_camera():
    for name in ("cheetah", "reacher", "cartpole"):
        env = DMCEnv(name=name, task=TASKS[name], seed=0)
        env.reset()
        place, axes = env.physics.data.cam_xpos[0].copy(), env.physics.data.cam_xmat[0].copy()
        walk = CameraWalk(camera_ranges(0.1, False))
        walk.start(env.physics, 0, np.random.default_rng(0))
        walk.sphere, walk.roll = to_sphere_of(env), 0.0
        walk.apply(env.physics)
        np.testing.assert_allclose(env.physics.data.cam_xpos[0], place, atol=1e-9)
        np.testing.assert_allclose(env.physics.data.cam_xmat[0], axes, atol=1e-4)  # the model's numbers have few digits
        env.close()


def test_geometry_by_hand():
    np.testing.assert_allclose(to_sphere(np.array([0.0, -2.0, 0.0])), [2, -math.pi / 2, math.pi / 2])
    np.testing.assert_allclose(to_point(np.array([2.0, -math.pi / 2, math.pi / 2])), [0, -2, 0], atol=1e-15)
    north = look_along(np.array([0.0, 1.0, 0.0]), overhead=False)
    np.testing.assert_allclose(north, [[1, 0, 0], [0, 0, -1], [0, 1, 0]], atol=1e-15)  # right x, up z, backwards -y
    np.testing.assert_allclose(look_along(np.array([0.0, 0.0, -1.0]), overhead=True), np.eye(3))
    np.testing.assert_allclose(look_along(np.array([0.0, 0.0, -1.0]), overhead=False), np.eye(3))
    # Just beyond the vertical: the same angle and a negative one, not half a turn.
    np.testing.assert_allclose(
        nearest_sphere(to_sphere(np.array([-0.1, 0.0, 1.0])), np.array([1.0, 0.0, 0.01]))[1:], [0, -math.atan(0.1)]
    )


@pytest.mark.parametrize("name", ["cheetah", "reacher", pytest.param("finger", marks=pytest.mark.slow)])
def test_the_task_does_not_notice(name):
    env, _ = distracted(name, difficulty="hard", dynamic=True, size=16)
    bare = DMCEnv(name=name, task=TASKS[name], frame_skip=2, seed=0)
    for episode in range(2):
        moves = actions(bare, 4, episode)
        with_it, without = play(env, moves), play(bare, moves)
        for a, b in zip(with_it, without, strict=True):
            for key in ("observation", "reward", "terminated", "truncated", "done"):
                assert (a.get(key, None) is None) == (b.get(key, None) is None)
                assert a.get(key, None) is None or torch.equal(a[key], b[key])
        state = env.base_env.physics.get_state()
        assert state.tobytes() == bare.physics.get_state().tobytes()
        assert env.base_env.physics.data.sensordata.tobytes() == bare.physics.data.sensordata.tobytes()
    env.close(), bare.close()


def test_global_random_numbers_are_left_alone():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    env, _ = distracted("walker", dynamic=True, size=16)
    play(env, actions(env, 2))
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])
    env.close()


def test_a_seed_decides_the_images():
    def images(seed):
        env = make_env(
            name="cheetah",
            task="run",
            image_size=16,
            render={"fast": True},
            seed=seed,
            distraction={"name": "distracting_cs", "difficulty": "hard", "dynamic": True},
        )
        moves = actions(env, 3)
        pixels = [torch.stack([seen["pixels"] for seen in play(env, moves)]) for _ in range(2)]
        env.set_seed(seed)
        again = torch.stack([seen["pixels"] for seen in play(env, moves)])
        env.close()
        return *pixels, again

    first, second, again = images(0)
    same = images(0)
    assert torch.equal(first, same[0]) and torch.equal(second, same[1])
    assert torch.equal(first, again)
    assert not torch.equal(first, second) and not torch.equal(first, images(1)[0])


@pytest.mark.slow
def test_processes_draw_the_same_images(monkeypatch, tmp_path):
    monkeypatch.undo()  # a process of its own has the procedural source
    monkeypatch.setenv("LUCID_CACHE", str(tmp_path))
    options = {"name": "distracting_cs", "dynamic": True}
    make = partial(make_env, name="walker", task="walk", image_size=16, render={"fast": True}, distraction=options)
    seen = []
    for env in (
        SerialEnv(2, [partial(make, seed=seed) for seed in (0, 1)]),
        ParallelEnv(1, [partial(make, seed=1)], mp_start_method="spawn"),
    ):
        data = env.reset()
        pixels = [data["pixels"].clone()]
        for _ in range(3):
            data = env.step_mdp(env.step(data.set("action", torch.zeros(*env.batch_size, 6))))
            pixels.append(data["pixels"].clone())
        seen.append(torch.stack(pixels))  # [4, n, h, w, 3]
        env.close()
    here, elsewhere = seen
    assert torch.equal(here[:, 1:], elsewhere)
    assert not torch.equal(here[:, 0], here[:, 1])


def test_each_part_has_random_numbers_of_its_own():
    poses, colors, frames = [], [], []
    for parts in ({}, {"color": False}, {"camera": False}, {"background": False}):
        env, transform = distracted("walker", dynamic=True, **parts)
        play(env, actions(env, 2))
        poses += [transform.camera.sphere] if transform.camera else []
        colors += [transform.color.colors.tolist()] if transform.color else []
        frames += [transform.background.index] if transform.background else []
        env.close()
    for values in (poses, colors, frames):
        assert len(values) == 3 and values[0] == values[1] == values[2]


def scene(env):
    model, data = env.base_env.physics.model, env.base_env.physics.data
    return [data.cam_xpos[0].copy(), data.cam_xmat[0].copy(), model.mat_rgba.copy(), model.tex_data[:768].copy()]


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_lasts_an_episode(dynamic):
    env, _ = distracted("cartpole", dynamic=dynamic)  # its camera does not follow
    scenes = []
    for _ in range(2):
        data = env.reset()
        scenes.append(scene(env))
        data = env.step(data.set("action", torch.zeros(1)))
        scenes.append(scene(env))
    for part in range(4):
        assert (scenes[0][part] == scenes[1][part]).all() == (not dynamic)
        assert not (scenes[0][part] == scenes[2][part]).all()
    env.close()


def test_colors_stay_in_their_box_over_episodes():
    env, transform = distracted("reacher", difficulty="medium", dynamic=True, camera=False, background=False)
    usual = env.base_env.physics.model.mat_rgba.copy()
    largest = 0.0
    for _ in range(4):
        env.reset()
        for _ in range(300):
            transform.color.advance(transform._color_random)
            assert (np.abs(transform.color.colors - usual[:, :3]) <= 0.2 + 1e-6).all()
            assert (transform.color.colors >= 0).all() and (transform.color.colors <= 1).all()
        largest = max(largest, np.abs(transform.color.colors - usual[:, :3]).max())
        transform.color.apply(env.base_env.physics)
    assert largest > 0.18
    assert (env.base_env.physics.model.mat_rgba[:, 3] == usual[:, 3]).all()  # alphas belong to the background
    env.close()


@pytest.mark.parametrize(("name", "alpha"), [("reacher", 0.0), ("walker", 1.0), ("cartpole", 0.3)])
def test_the_sky_shows_the_video(name, alpha):
    env, transform = distracted(name, camera=False, color=False, size=32)
    assert env.base_env.physics.model.mat_rgba[0, 3] == 1
    env.reset()  # before there is a context
    for _ in range(2):
        model = env.base_env.physics.model
        assert model.id2name(0, "material") == "grid" and model.mat_rgba[0, 3] == pytest.approx(alpha)
        assert (model.tex_width[0], model.tex_height[0]) == (16, 16)
        assert (
            model.tex_data[:768].reshape(16, 16, 3) == transform.background.frames[transform.background.index]
        ).all()
        env.reset()  # with a context
    seen = []
    for value in (20, 200):
        transform.background.frames = np.full((70, 16, 16, 1), value, dtype=np.uint8)  # grey
        pixels = env.reset()["pixels"]
        mask = env.base_env.foreground_mask(32, 32, None, alpha != 1.0)
        seen.append(pixels[~mask].float().mean().item())
    assert seen[1] - seen[0] > (120 if alpha == 0 else 40)
    env.close()


def test_video_goes_there_and_back():
    assert [ping_pong(position, 4) for position in range(-3, 8)] == [3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1]
    assert [ping_pong(position, 1) for position in (-1, 0, 5)] == [0, 0, 0]
    assert [ping_pong(position, 2) for position in range(4)] == [0, 1, 0, 1]
    env, transform = distracted("walker", dynamic=True, camera=False, color=False)
    starts = set()
    env.reset()
    for _ in range(30):
        transform.background.start(env.base_env.physics, transform._video_random)
        starts.add((transform.background.clip[0], transform.background.position, transform.background.direction))
        assert transform.background.clip[0] in (0, 7, 14, 21)  # the first four of "easy"
    assert len({start[0] for start in starts}) == 4 and {start[2] for start in starts} == {-1, 1}
    data, shown = env.reset(), []
    for _ in range(8):
        shown.append(transform.background.index - transform.background.clip[0])
        data = env.step_mdp(env.step(data.set("action", torch.zeros(6))))
    assert {abs(b - a) for a, b in pairwise(shown)} <= {0, 2}  # two frames per step
    assert set(shown) <= set(range(7))
    env.close()


def test_moves_the_camera_that_draws():
    base = DMCEnv(name="walker", task="walk", seed=0)
    env = TransformedEnv(base, Compose(DistractingCS(background=False), Render(16, camera="back", fast=True)))
    env.reset()
    moved = base.physics.data.cam_xpos.copy()
    base.physics.forward()
    assert (base.physics.data.cam_xpos[0] == moved[0]).all() and not np.allclose(
        base.physics.data.cam_xpos[1], moved[1]
    )
    env.close()


def test_specs_pickle_clone_and_state():
    env, transform = distracted("walker", dynamic=True, size=16)
    check_env_specs(env)
    moves = actions(env, 2)
    state, clone = transform.state_dict(), transform.clone()
    loaded = pickle.loads(pickle.dumps(transform))
    env.base_env.set_seed(0)
    wanted = [seen["pixels"] for seen in play(env, moves)]
    env.close()
    for other in (clone, loaded):
        env, _ = distracted("walker", transform=other, size=16)
        env.base_env.set_seed(0)
        assert all(torch.equal(seen["pixels"], want) for seen, want in zip(play(env, moves), wanted, strict=True))
        env.close()
    fresh = DistractingCS(dynamic=True, seed=5)
    fresh.load_state_dict(state)
    assert [random.bit_generator.state for random in fresh._randoms()] == json_states(state)
    assert len(pickle.dumps(transform)) < 20_000
    assert transform.describe() == {"source": "small"} and DistractingCS(background=False).describe() == {}


def json_states(state):
    probe = DistractingCS(background=False)
    probe.set_extra_state(state["_extra_state"])
    return [random.bit_generator.state for random in probe._randoms()]


def test_other_domains_work_with_a_warning():
    base = DMCEnv(name="hopper", task="stand", frame_skip=2, seed=0)
    env = TransformedEnv(base, Compose(DistractingCS("hard", dynamic=True), Render(16, fast=True)))
    with pytest.warns(UserWarning, match=r"name='hopper'.*ball_in_cup, cartpole"):
        env.reset()
    env.rollout(2)
    env.close()


def test_errors_name_the_value_and_the_fix(tmp_path):
    with pytest.raises(ValueError, match="difficulty='extreme': choose one of easy, hard, medium"):
        DistractingCS("extreme")
    with pytest.raises(ValueError, match=r"no manifest.json there; make one with scripts/prepare_video.py"):
        DistractingCS(source=str(tmp_path))
    with pytest.raises(TypeError, match=r"MockEnv has no dm_control physics"):
        TransformedEnv(MockEnv(), DistractingCS()).reset()
    with pytest.raises(TypeError, match=r"SerialEnv has no dm_control physics.*each worker"):
        TransformedEnv(SerialEnv(2, MockEnv), DistractingCS()).reset()
    for camera in (-1, "front", 7):
        env = TransformedEnv(DMCEnv(name="walker", task="walk"), Compose(DistractingCS(), Render(8, camera=camera)))
        with pytest.raises(ValueError, match=r"camera=.*choose one of \['side', 'back'\]"):
            env.reset()
        env.close()
    env = TransformedEnv(DMCEnv(name="walker", task="walk"), Compose(DistractingCS(), Render(8, backend="mjwarp")))
    with pytest.raises(ValueError, match=r"render backend 'mjwarp'.*set background=False"):
        env.reset()
    env.close()
    with pytest.raises(ValueError, match="16x20 pixels: the sky needs square ones"):
        SkyVideo(np.zeros((3, 16, 20, 3), np.uint8), CLIPS, 1.0, False)
    env, transform = distracted(camera=False, color=False)
    env.reset()
    transform.background.frames = np.zeros((70, 3000, 3000, 1), np.uint8)
    with pytest.raises(ValueError, match="3000x3000 pixels: too large for the sky"):
        env.reset()
    env.close()
