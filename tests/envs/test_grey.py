"""Grey and stacked images, as `make_env` puts them in front of an environment."""

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import SerialEnv, check_env_specs

from envs import Grey, make_env
from envs.transforms.video_sources import to_grey

COUNTER = {"backend": "mock", "name": "counter", "task": "continuous", "frame_skip": 1, "image_size": 4}


def show(pixels):
    """The value of each channel of uniform images [..., h, w, C]."""
    assert (pixels == pixels[..., :1, :1, :]).all()
    return pixels[..., 0, 0, :].tolist()


def test_grey_by_hand_and_as_backgrounds_are_grey():
    colours = torch.tensor([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [10, 20, 30]]], dtype=torch.uint8)
    grey = Grey()._call(TensorDict({"pixels": colours}))["pixels"]
    assert grey.flatten().tolist() == [76, 149, 28, 255, 18]  # (770 + 3000 + 870) / 256 = 18.1
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    assert np.array_equal(Grey()._call(TensorDict({"pixels": torch.from_numpy(image)}))["pixels"], to_grey(image))


@pytest.mark.parametrize(("options", "channels"), [({"grey": True}, 1), ({"frame_stack": 2}, 6)])
def test_specs(options, channels):
    env = make_env(**COUNTER, **options)
    check_env_specs(env)
    assert env.observation_spec["pixels"].shape == (4, 4, channels)
    assert env.observation_spec["pixels"].dtype == torch.uint8


def test_a_stack_begins_anew_with_each_episode():
    env = make_env(**COUNTER, grey=True, frame_stack=3, options={"episode_length": 4})
    data = env.rollout(6, break_when_any_done=False)
    assert show(data["pixels"]) == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3], [0, 0, 0], [0, 0, 1]]
    assert show(data["next", "pixels"]) == [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [0, 0, 1], [0, 1, 2]]


def test_rows_of_a_batch_have_stacks_of_their_own():
    lengths = (2, 3)
    makers = [lambda n=n: make_env(**COUNTER, frame_stack=2, options={"episode_length": n}) for n in lengths]
    pixels = SerialEnv(2, makers).rollout(4, break_when_any_done=False)["pixels"][..., [0, 3]]  # one of each image
    assert show(pixels) == [[[0, 0], [0, 1], [0, 0], [0, 1]], [[0, 0], [0, 1], [1, 2], [0, 0]]]


def test_a_restored_episode_has_its_stack():
    env, other = (make_env(**COUNTER, frame_stack=2) for _ in range(2))
    env.rollout(3)
    current = other.restore_episode(env.episode_state())
    assert show(current["pixels"]) == [2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("options", [{"grey": True}, {"frame_stack": 2}])
def test_images_are_needed(options):
    with pytest.raises(ValueError, match="from_pixels=True"):
        make_env(**COUNTER, from_pixels=False, **options)


def test_bad_stack():
    with pytest.raises(ValueError, match="frame_stack=0"):
        make_env(**COUNTER, frame_stack=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"length": 3}, "option='length'.*episode_length"), ({"seed": 3}, "give seed beside the options")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_env(**COUNTER, options=options)
