"""The ray caster against MuJoCo's own segmentation and image."""

import pickle
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchrl.envs import check_env_specs

from envs import make_env
from envs.backends.dmc import DMCEnv
from envs.backends.warp_renderer import TENDON, WarpRenderer, _make_rays, _resolve_colours
from envs.transforms.render import Render

SIZE = (64, 64)


def start(name: str, task: str) -> DMCEnv:
    pytest.importorskip("mujoco_warp")
    env = DMCEnv(name=name, task=task, frame_skip=2, seed=0)
    env.reset()
    return env


@pytest.fixture(scope="module")
def cheetah():
    """One environment for all tests that leave its model as it is: compiling takes seconds."""
    env = start("cheetah", "run")
    yield env
    env.close()


def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a & b).sum() / (a | b).sum()).item()


def check_foreground(env: DMCEnv, states: int) -> None:
    """The mask and the image are those of MuJoCo, up to a few pixels."""
    overlaps, differences = [], []
    for _ in range(states):
        env.rollout(3)
        image, mask = env.ray_cast(*SIZE)
        overlaps.append(overlap(mask, env.foreground_mask(*SIZE)))
        differences.append((image.float() - env.render(*SIZE).float()).abs().mean().item())
    assert np.mean(overlaps) > 0.97
    assert np.mean(differences) < 16


def test_foreground(cheetah):
    check_foreground(cheetah, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("reacher", "easy"),  # goal, walls
        ("finger", "turn_easy"),  # goals that are sites
        ("ball_in_cup", "catch"),  # string
        ("fish", "swim"),  # thin fins, camera far away
    ],
)
def test_foreground_of_other_tasks(name, task):
    env = start(name, task)
    check_foreground(env, 3)
    env.close()


@pytest.mark.slow
def test_string_is_a_tendon():
    env = start("ball_in_cup", "catch")
    objects = WarpRenderer(env.physics).render(96, 96)[1]
    expected = env.physics.render(96, 96, camera_id=0, segmentation=True)
    ours, theirs = ((ids[..., 1] == TENDON).sum() for ids in (objects, expected))
    assert theirs > 10
    assert abs(int(ours) - int(theirs)) <= 2
    env.close()


@pytest.mark.slow
def test_follows_the_goal_of_each_episode():
    env = start("reacher", "hard")
    goal = env.physics.model.name2id("target", "geom")
    caster, places = WarpRenderer(env.physics), []
    for _ in range(3):
        env.reset()
        objects = caster.render(*SIZE)[1]
        expected = env.physics.render(*SIZE, camera_id=0, segmentation=True)
        seen, wanted = ((ids == (goal, 5)).all(-1) for ids in (objects, expected))
        assert (seen ^ wanted).sum() <= 2 and wanted.any()
        places.append(np.argwhere(seen).mean(0))
    assert len(np.unique(np.round(places, 1), axis=0)) == 3
    env.close()


def test_sky_and_shapes(cheetah):
    image, objects = WarpRenderer(cheetah.physics).render(24, 40, "side")
    assert (image.shape, image.dtype, objects.shape, objects.dtype) == ((24, 40, 3), np.uint8, (24, 40, 2), np.int32)
    assert (objects[0] == -1).all()
    assert set(np.unique(objects[..., 1])) == {-1, 5}
    assert objects[..., 0].max() < cheetah.physics.model.ngeom


def test_images_are_the_callers(cheetah):
    first, objects = WarpRenderer(cheetah.physics).render(*SIZE)
    copy, same = first.copy(), objects.copy()
    cheetah.rollout(4)
    after, _ = cheetah.ray_cast(*SIZE)
    np.testing.assert_array_equal(first, copy)
    np.testing.assert_array_equal(objects, same)
    assert (after.numpy() != copy).any()


def test_same_state_same_image(cheetah):
    a, b = WarpRenderer(cheetah.physics), WarpRenderer(cheetah.physics)
    a.render(*SIZE, 1)
    for x, y in zip(a.render(*SIZE), b.render(*SIZE), strict=True):
        np.testing.assert_array_equal(x, y)


def test_shadows_change_the_image_alone(cheetah):
    caster = WarpRenderer(cheetah.physics)
    (plain, objects), (dark, same) = caster.render(*SIZE), caster.render(*SIZE, shadows=True)
    np.testing.assert_array_equal(objects, same)
    changed = (plain != dark).any(-1)
    assert 0 < changed.sum() < 400
    assert (dark[changed].astype(int) <= plain[changed]).all()


def test_leaves_physics_and_random_numbers_alone(cheetah):
    state, time = cheetah.physics.get_state().copy(), cheetah.physics.time()
    numbers = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    WarpRenderer(cheetah.physics).render(*SIZE)
    np.testing.assert_array_equal(cheetah.physics.get_state(), state)
    assert cheetah.physics.time() == time
    assert random.getstate() == numbers[0]
    np.testing.assert_array_equal(np.random.get_state()[1], numbers[1])
    assert torch.equal(torch.get_rng_state(), numbers[2])


def test_follows_edits_of_the_model():
    env = start("cheetah", "run")
    model, data = env.physics.model, env.physics.data
    torso = model.name2id("torso", "geom")
    caster = WarpRenderer(env.physics)

    def see():
        image, objects = caster.render(*SIZE)
        return image, (objects == (torso, 5)).all(-1)

    image, seen = see()
    model.geom_rgba[torso] = (0, 1, 0, 1)
    green, still = see()
    np.testing.assert_array_equal(seen, still)
    assert (green[seen].argmax(-1) == 1).mean() > 0.9 > (image[seen].argmax(-1) == 1).mean()
    model.geom_size[torso, 0] *= 2
    assert see()[1].sum() > 1.5 * seen.sum()
    model.geom_rgba[torso, 3] = 0
    assert not see()[1].any()
    model.geom_rgba[torso] = (0, 1, 0, 1)
    model.cam_fovy[0] /= 2
    assert see()[1].sum() > 5 * seen.sum()
    model.cam_fovy[0] *= 2
    data.cam_xpos[0, 0] += 1
    assert np.argwhere(see()[1])[:, 1].mean() < np.argwhere(seen)[:, 1].mean() - 5
    env.close()


def test_cameras(cheetah):
    caster = WarpRenderer(cheetah.physics)
    np.testing.assert_array_equal(caster.render(*SIZE, "back")[1], caster.render(*SIZE, 1)[1])
    free = caster.render(*SIZE, -1)[1]
    expected = cheetah.physics.render(*SIZE, camera_id=-1, segmentation=True)
    assert (free == expected).all(-1).mean() > 0.99
    for camera in (2, -2, "front"):
        with pytest.raises(ValueError, match=f"camera={camera!r}: .* from -1 to 1"):
            caster.render(*SIZE, camera)
    with pytest.raises(ValueError, match="width=0"):
        caster.render(8, 0)


def test_environment(cheetah):
    pytest.importorskip("mujoco_warp")
    env = make_env(name="cheetah", render={"backend": "mjwarp"}, image_size=16)
    check_env_specs(env)
    rollout = env.rollout(3)
    assert rollout["next", "pixels"].shape == (3, 16, 16, 3)
    env.close()


def test_mask_comes_with_the_image(cheetah):
    pytest.importorskip("mujoco_warp")
    grid = {"name": "color_grid", "level": "sequence", "num_colors_per_cell": 4, "emit_mask": True}
    plain, mixed = (
        make_env(name="cheetah", render={"backend": "mjwarp"}, image_size=32, distraction=distraction)
        for distraction in (None, grid)
    )
    a, b = plain.reset(), mixed.reset()
    keep = b["mask"].expand(-1, -1, 3)
    assert 0 < keep.float().mean() < 0.2
    assert torch.equal(a["pixels"][keep], b["pixels"][keep])
    assert (a["pixels"] != b["pixels"])[~keep].float().mean() > 0.9
    plain.close()
    mixed.close()


def test_pickles_after_drawing():
    env = start("cheetah", "run")
    image, _ = env.ray_cast(*SIZE)
    copy = pickle.loads(pickle.dumps(env))
    copy.reset()
    assert copy.ray_cast(*SIZE)[0].shape == image.shape


def test_rays():
    rays = _make_rays(1.0, 1.0, -1.0, 2, 4)  # 90 degrees high, twice as wide
    expected = np.array([[-1.5, 0.5, -1], [-0.5, 0.5, -1], [0.5, 0.5, -1], [1.5, 0.5, -1]])
    np.testing.assert_allclose(rays[:4], expected / np.linalg.norm(expected, axis=1, keepdims=True))
    np.testing.assert_allclose(rays[4:], rays[:4] * (1, -1, 1))


def test_colours():
    grey, red, blue = (0.5, 0.5, 0.5, 1.0), (1.0, 0.0, 0.0, 1.0), (0.0, 0.0, 1.0, 1.0)
    colours = _resolve_colours(np.array([grey, red, grey]), np.array([0, 0, -1]), np.array([blue]))
    np.testing.assert_array_equal(colours, [blue, red, grey])


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco_warp", None)
    env = DMCEnv(name="cheetah", task="run")
    env.reset()
    with pytest.raises(ImportError, match=r"mjwarp.*pip install -e '\.\[warp\]'"):
        env.ray_cast(*SIZE)


@pytest.mark.parametrize(
    ("model", "message"), [({"nskin": 1, "ncam": 1}, "nskin=1"), ({"nskin": 0, "ncam": 0}, "ncam")]
)
def test_models_that_it_cannot_draw(model, message):
    pytest.importorskip("mujoco_warp")
    with pytest.raises(ValueError, match=message):
        WarpRenderer(SimpleNamespace(model=SimpleNamespace(**model)))


def test_only_for_dm_control():
    with pytest.raises(ValueError, match=r"render backend='warp': choose one of mjwarp, mujoco"):
        Render(backend="warp")
    with pytest.raises(TypeError, match="MockEnv has no ray_cast"):
        make_env(backend="mock", name="reach", task="continuous", render={"backend": "mjwarp"})
