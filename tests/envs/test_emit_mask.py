"""`make_env(emit_mask=True)`: the simulator's mask of the image as shown, whatever distracts, and the same image."""

from functools import partial

import pytest
import torch
from dm_control import suite
from torchrl.envs import SerialEnv, check_env_specs

from dreamer.agents import EnvSpec
from envs import make_env
from envs.backends.square import SquareEnv
from envs.tasks import PROMPTS, task_prompt
from envs.transforms.distraction import DISTRACTIONS

SIZE = 16
mock = partial(make_env, backend="mock", name="counter", task="continuous", frame_skip=1, image_size=SIZE, seed=3)
cheetah = partial(make_env, name="cheetah", image_size=24, render={"fast": True}, seed=3)
PASTED = [
    {"name": "color_grid", "level": "action"},
    {"name": "color_grid", "level": "random", "reset_mode": "random"},
    {"name": "color_grid", "level": "sequence", "emit_mask": True},
    {"name": "color_grid", "level": "sequence", "replace_floor": False},
    {"name": "natural_video"},
    {"name": "natural_video", "grayscale": True, "loop": "clip"},
]


def play(env, steps: int = 4):
    actions = env.action_spec.zero().expand(steps, *env.action_spec.shape)
    data, seen = env.reset(), []
    for action in actions:
        data = env.step_mdp(env.step(data.set("action", action)))
        seen.append(data.select("pixels", "mask", strict=False).clone())
    env.close()
    return torch.stack(seen)


def changed(one, other) -> torch.Tensor:
    return (one["pixels"] != other["pixels"]).any(-1, keepdim=True)  # [T, h, w, 1]


def grown(mask: torch.Tensor, by: int = 1) -> torch.Tensor:
    """Of masks [T, h, w, 1]; a negative number shrinks them."""
    planes = mask.float().permute(0, 3, 1, 2) * (1 if by > 0 else -1)
    return torch.nn.functional.max_pool2d(planes, 2 * abs(by) + 1, 1, abs(by)).abs().permute(0, 2, 3, 1) > 0


@pytest.mark.parametrize("options", PASTED, ids=str)
def test_pasted_backgrounds_are_where_the_mask_says(options):
    make = partial(mock, distraction=options, emit_mask=True)
    check_env_specs(make())
    shown, plain = play(make()), play(mock())
    moved = changed(shown, plain)
    assert not (moved & shown["mask"]).any()
    assert moved[~shown["mask"]].float().mean() > 0.9
    assert torch.equal(shown["pixels"], play(mock(distraction=options))["pixels"]), "the mask changes no image"


def test_without_a_distraction():
    shown = play(mock(emit_mask=True))
    assert (shown["mask"].dtype, shown["mask"].shape) == (torch.bool, (4, SIZE, SIZE, 1))
    assert shown["mask"][:, 4:12, 4:12].all() and shown["mask"].sum() == 4 * 64
    assert torch.equal(shown["pixels"], play(mock())["pixels"])
    assert "mask" not in play(mock()) and "mask" not in play(mock(distraction=PASTED[0]))


def test_the_mask_moves_with_a_trembling_image():
    options = {"name": "camera_jitter", "mult": 40.0, "frames_per_step": 4}
    shown = play(mock(distraction=options, emit_mask=True), 8)
    inside, outside = grown(shown["mask"], -1), ~grown(shown["mask"])
    time = torch.arange(1, 9, dtype=torch.uint8)[:, None, None, None].expand_as(shown["mask"])
    same = (shown["pixels"] == time[..., :1]).all(-1, keepdim=True)
    still = play(mock(emit_mask=True), 8)["mask"]
    assert (shown["mask"] != still).flatten(1).any(1).sum() > 4, "the walk moves it"
    assert inside.flatten(1).sum(1).min() > 4 and same[inside].all()
    assert same[outside].float().mean() < 0.1
    assert torch.equal(shown["pixels"], play(mock(distraction=options), 8)["pixels"])


@pytest.mark.parametrize("options", [{"name": "color_grid", "level": "sequence"}, {"name": "natural_video"}], ids=str)
def test_masks_from_colours_leave_that_of_the_simulator(options):
    options = {**options, "mask": "chroma"}  # which takes all of a grey image for foreground
    shown, plain = play(mock(distraction=options, emit_mask=True)), play(mock(emit_mask=True))
    assert torch.equal(shown["mask"], plain["mask"])
    assert torch.equal(shown["pixels"], play(mock(distraction=options))["pixels"])
    with pytest.raises(ValueError, match=r"distraction\.emit_mask=True: two masks.*choose one"):
        mock(distraction={**options, "emit_mask": True}, emit_mask=True)


@pytest.fixture(scope="module")
def plain():
    return play(cheetah(emit_mask=True), 2)


def test_the_mask_follows_a_camera_that_moves(plain):
    moving = {"name": "distracting_cs", "difficulty": "hard", "dynamic": True, "color": False}
    shown, skyless = (play(cheetah(distraction={**moving, "background": b}, emit_mask=True), 2) for b in (True, False))
    moved = changed(shown, skyless)  # the walks of camera and video have random numbers of their own
    assert torch.equal(shown["mask"], skyless["mask"])
    assert (moved & ~shown["mask"]).flatten(1).sum(1).min() > 50 and not (moved & shown["mask"]).any()
    assert (shown["mask"] != plain["mask"]).flatten(1).any(1).all()


@pytest.mark.slow
def test_behind_a_noisy_sensor(plain):
    shown = play(cheetah(distraction={"name": "noisy_sensor"}, emit_mask=True), 2)
    moved = changed(shown, plain)
    assert not (moved & shown["mask"]).any() and moved[~shown["mask"]].float().mean() > 0.9


@pytest.mark.slow
def test_reflections_stay_in_the_picture():
    make = partial(make_env, name="walker", task="walk", image_size=32, seed=0)
    shown, plain = make(emit_mask=True), make()
    assert torch.equal(shown.reset()["pixels"], plain.reset()["pixels"])
    shown.close()
    plain.close()


def test_every_distraction_is_tried_here():
    tried = {options["name"] for options in PASTED} | {"camera_jitter", "distracting_cs", "noisy_sensor"}
    assert tried == set(DISTRACTIONS)


def test_grid_that_shows_nothing():
    shown = play(mock(distraction={"name": "color_grid", "level": "none"}, emit_mask=True))
    assert shown["mask"].sum() == 4 * 64 and torch.equal(shown["pixels"], play(mock())["pixels"])


def test_in_batches():
    env = SerialEnv(2, [partial(mock, seed=seed, emit_mask=True, distraction=PASTED[0]) for seed in (0, 1)])
    assert env.rollout(3)["mask"].shape == (2, 3, SIZE, SIZE, 1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"from_pixels": False}, ValueError, r"emit_mask=True: needs images, from_pixels=True"),
        (
            {"backend": "gym", "name": "Pendulum-v1", "task": None},
            TypeError,
            r"GymnasiumEnv has no foreground_mask.*leave emit_mask=False.*ConceptMask",
        ),
    ],
)
def test_where_there_is_no_mask(options, error, message):
    with pytest.raises(error, match=message):
        mock(**{"emit_mask": True, **options})


def test_environments_know_their_prompt():
    env = make_env(name="cartpole", task="swingup", from_pixels=False)
    assert env.prompt == EnvSpec.of(env).prompt == "cart . pole"
    others = [EnvSpec(env.observation_spec, env.action_spec), EnvSpec.of(mock()), EnvSpec.of(SquareEnv())]
    others.append(EnvSpec.of(make_env(backend="gym", name="Pendulum-v1", from_pixels=False)))
    assert [spec.prompt for spec in others] == [""] * 4
    assert task_prompt("fish") == "" and set(PROMPTS) <= set(suite.TASKS_BY_DOMAIN)
