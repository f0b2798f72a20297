"""Masks: which pixels are foreground, and that nothing else of the image changes."""

import numpy as np
import pytest
import torch
from dm_control import suite
from torchrl.envs import Compose, ExcludeTransform, SerialEnv, TransformedEnv, check_env_specs

from envs import Render, make_env
from envs.backends.dmc import DMCEnv
from envs.backends.gym import GymnasiumEnv
from envs.backends.mock import MockEnv
from envs.tasks import reward_range
from envs.transforms.masks import chroma_mask, paste_foreground_

GEOM, SITE = 5, 6


def test_chroma_is_strict():
    colors = {(10, 20, 21): False, (10, 21, 21): True, (21, 10, 21): True, (0, 0, 1): False, (0, 0, 0): True}
    colors |= {(255, 0, 255): True, (254, 254, 255): False, (255, 0, 0): True}
    pixels = torch.tensor(list(colors), dtype=torch.uint8)[:, None]  # [h, 1, 3]
    assert chroma_mask(pixels)[:, 0, 0].tolist() == list(colors.values())
    assert chroma_mask(pixels.expand(4, 2, -1, -1, -1)).shape == (4, 2, 8, 1, 1)


@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7), (2, 3, 4, 4)])
def test_paste_foreground(shape):
    generator = torch.Generator().manual_seed(0)
    background, pixels = torch.randint(256, (2, *shape, 3), generator=generator).to(torch.uint8)
    mask = torch.rand(*shape, 1, generator=generator) < 0.5
    expected = torch.where(mask, pixels, background)
    flipped = pixels.flip(-2).flip(-2).transpose(-2, -3).contiguous().transpose(-2, -3)  # not contiguous
    assert torch.equal(paste_foreground_(background.clone(), flipped, mask), expected)
    assert paste_foreground_(background, pixels, mask) is background


@pytest.mark.parametrize("replace_floor", [True, False])
def test_render_writes_the_mask(replace_floor):
    env = TransformedEnv(MockEnv(), Render(8, mask=True, replace_floor=replace_floor))
    check_env_specs(env)
    mask = env.rollout(2)["next", "mask"]
    assert (mask.shape, mask.dtype) == ((2, 8, 8, 1), torch.bool)
    assert mask[0].sum() == (16 if replace_floor else 32)
    assert mask[0, 2:6, 2:6].all()
    assert mask[0, 6:].all() == (not replace_floor)


def test_render_says_who_has_no_mask():
    with pytest.raises(TypeError, match=r"GymnasiumEnv has no foreground_mask.*mask='chroma'"):
        TransformedEnv(GymnasiumEnv(name="Pendulum-v1"), Render(8, mask=True)).reset()


def test_mask_is_left_out_unless_asked_for():
    for emit_mask in (False, True):
        distraction = {"name": "color_grid", "level": "action", "emit_mask": emit_mask}
        env = make_env(backend="mock", name="counter", task="continuous", image_size=16, distraction=distraction)
        check_env_specs(env)
        assert ("mask" in set(env.reset().keys())) == ("mask" in set(env.observation_spec.keys())) == emit_mask


def segmentation(env: DMCEnv, size: int) -> tuple[np.ndarray, np.ndarray]:
    ids, kinds = np.moveaxis(env.physics.render(size, size, camera_id=0, segmentation=True), -1, 0)
    return ids, kinds


@pytest.mark.parametrize(("name", "task"), [("cheetah", "run"), ("reacher", "easy"), ("ball_in_cup", "catch")])
def test_foreground_is_the_agent_and_its_goal(name, task):
    env = DMCEnv(name=name, task=task, seed=0)
    env.rollout(3)
    env.render(64, 64, fast=True)
    mask, without_floor = (env.foreground_mask(64, 64, None, floor).numpy() for floor in (False, True))
    ids, kinds = segmentation(env, 64)
    model = env.physics.model
    floor = (kinds == GEOM) & (ids == model.name2id("ground", "geom"))
    np.testing.assert_array_equal(mask, ids >= 0)
    np.testing.assert_array_equal(without_floor, (ids >= 0) & ~floor)
    assert floor.sum() > 100 and 0 < without_floor.mean() < 0.3
    if name == "reacher":
        target = (kinds == GEOM) & (ids == model.name2id("target", "geom"))
        assert target.any() and without_floor[target].all()
    env.close()


def test_sites_are_foreground():
    env = DMCEnv(name="finger", task="turn_easy", seed=0)
    env.reset()
    env.render(64, 64, fast=True)
    _, kinds = segmentation(env, 64)
    assert (kinds == SITE).sum() > 5
    assert env.foreground_mask(64, 64).numpy()[kinds == SITE].all()
    env.close()


@pytest.mark.parametrize(("name", "task"), [("manipulator", "bring_ball"), ("quadruped", "escape")])
def test_scenery_and_terrain_are_background(name, task):
    env = DMCEnv(name=name, task=task, seed=0)
    env.reset()
    env.render(64, 64, fast=True)
    assert 0 < env.foreground_mask(64, 64).float().mean() < 0.3
    env.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({name for name, _ in suite.ALL_TASKS}))
def test_every_domain_has_some_foreground_and_much_background(name):
    env = DMCEnv(name=name, task=next(task for domain, task in suite.ALL_TASKS if domain == name), seed=0)
    env.reset()
    env.render(64, 64, fast=True)
    mask = env.foreground_mask(64, 64)
    assert 0.002 < mask.float().mean() < 0.2
    assert (mask <= env.foreground_mask(64, 64, None, False)).all()
    env.close()


def interior(mask: torch.Tensor) -> torch.Tensor:
    """Foreground whose eight neighbours are foreground too."""
    outside = torch.nn.functional.pad((~mask).float()[None, None], (1, 1, 1, 1), value=1.0)
    return torch.nn.functional.max_pool2d(outside, 3, 1)[0, 0] == 0


def test_exact_image_differs_from_the_plain_one_on_the_rim_only():
    make = {"name": "walker", "task": "walk", "seed": 0}
    plain = TransformedEnv(DMCEnv(**make), Render(64))
    exact = TransformedEnv(DMCEnv(**make), Render(64, mask=True))
    a, b = plain.reset(), exact.reset()
    mask = b["mask"][..., 0]
    difference = (a["pixels"].int() - b["pixels"].int()).abs().amax(-1)
    assert difference.max() > 4, "the floor has no reflections"
    assert interior(mask).sum() > 20
    assert difference[interior(mask)].max() == 0
    assert difference[mask].max() <= 8
    kept = TransformedEnv(DMCEnv(**make), Render(64, mask=True, replace_floor=False))
    assert torch.equal(kept.reset()["pixels"], a["pixels"])
    for env in (plain, exact, kept):
        env.close()


def test_outside_the_mask_is_the_render():
    options = {"name": "color_grid", "level": "sequence", "emit_mask": True}
    env = make_env(name="cheetah", image_size=32, distraction=options, render={"fast": True}, seed=4)
    bare = make_env(name="cheetah", image_size=32, render={"fast": True}, seed=4)
    a, b = env.reset(), bare.reset()
    mask = a["mask"].expand(-1, -1, 3)
    assert torch.equal(a["pixels"][mask], b["pixels"][mask])
    assert (a["pixels"][~mask] != b["pixels"][~mask]).float().mean() > 0.9
    env.close()
    bare.close()


def test_masks_in_batches():
    def make():
        return TransformedEnv(MockEnv(), Compose(Render(8, mask=True), ExcludeTransform("observation")))

    assert SerialEnv(2, [make, make]).rollout(3)["mask"].shape == (2, 3, 8, 8, 1)


def test_reward_ranges():
    assert reward_range("cheetah", "run") == ((0, 10),)
    assert reward_range("hopper", "stand") == (0, (0.8, 1))
    assert reward_range("walker", "walk") == ((0, 1),)
    assert reward_range("lqr", "lqr_2_1") is None
    assert DMCEnv(name="hopper", task="stand").frame_rewards == (0, (0.8, 1))
