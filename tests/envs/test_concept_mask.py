"""ConceptMask and MaskObservation: conformance, calls of the model, hand-computed images, errors."""

import pickle
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import Compose, ParallelEnv, SerialEnv, ToTensorImage, TransformedEnv, check_env_specs

from envs import ConceptMask, MaskObservation
from envs.backends.square import SquareEnv
from envs.checks import MAX_PICKLE, check_transform
from envs.segmentation.colour import ColourModel
from envs.segmentation.ground_truth import GroundTruth
from envs.segmentation.protocol import check_frames, fingerprint
from envs.segmentation.sam3 import Sam3
from envs.segmentation.student import Student
from envs.transforms import Sam3Mask
from scripts.make_tiny_sam3 import make_config, make_model, save_model


class Bright:
    """Marks red and blue; counts its calls."""

    concepts = ("red", "blue")
    version = fingerprint("bright")

    def __init__(self):
        self.calls = []

    def __call__(self, frames):
        check_frames(frames)
        self.calls.append(len(frames))
        return torch.where(frames[..., [0, 2]] > 130, 255, 0).to(torch.uint8)


class Steady(SquareEnv):
    """A square whose episodes have a given length."""

    def __init__(self, length: int):
        super().__init__(8)
        self.length = length

    def _reset(self, tensordict=None, **kwargs):
        first = super()._reset(tensordict, **kwargs)
        self._left, self._terminates = self.length, False
        return first


def truth(data):
    return data["mask"].bool() == (data["pixels"][..., :1] > 130)


def test_conformance():
    assert check_transform(lambda: Compose(ConceptMask(Bright()), MaskObservation(dilate=2)))


@pytest.mark.slow
def test_conformance_of_options():
    assert check_transform(lambda: ConceptMask(Bright(), out_key="concepts", union=False))
    assert check_transform(lambda: MaskObservation(fill="mean"), keeps_foreground=True)


@pytest.mark.slow
def test_conformance_of_random_colours():
    options = {"stochastic": True, "shared_noise": True, "keeps_foreground": True}
    assert check_transform(lambda: MaskObservation(fill="random"), **options)


@pytest.mark.parametrize("union", [True, False])
def test_specs_and_values(union):
    env = TransformedEnv(SquareEnv(8), ConceptMask(Bright(), union=union))
    check_env_specs(env, break_when_any_done="both")
    data = env.rollout(4)
    assert data["mask"].dtype == torch.uint8 and data["mask"].shape == (4, 8, 8, 1 if union else 2)
    assert truth(data)[..., :1].all() and set(data["mask"].unique().tolist()) == {0, 255}


def test_the_mask_of_the_simulator_takes_the_same_road():
    env = TransformedEnv(SquareEnv(8), ConceptMask(GroundTruth(), "mask", "soft"))
    check_env_specs(env)
    data = env.rollout(3)
    assert torch.equal(data["soft"], data["mask"].to(torch.uint8) * 255)


def check_calls(make_env, lengths, calls):
    """Episodes of some lengths side by side: one call per step, and one for the rows that reset after it."""
    segmenter = Bright()
    envs = [partial(Steady, length) for length in lengths]
    env = TransformedEnv(make_env(len(envs), envs), ConceptMask(segmenter))
    try:
        data = env.rollout(6, break_when_any_done=False)
    finally:
        env.close()
    assert segmenter.calls == calls
    assert truth(data).all() and truth(data["next"]).all(), "the rows that go on keep their masks"


def test_one_call_per_step_and_only_rows_that_reset():
    check_calls(SerialEnv, (2, 3, 4), [3, 3, *(3, 1), *(3, 1), *(3, 2), 3, 3])


@pytest.mark.slow
def test_one_call_per_step_of_processes():
    check_calls(partial(ParallelEnv, mp_start_method="spawn"), (2, 3), [2, 2, *(2, 1), *(2, 1), *(2, 1), 2, 2])


def test_at_most_max_batch_images_in_a_call():
    segmenter = Bright()
    pixels = torch.zeros(5, 2, 4, 4, 3, dtype=torch.uint8)
    data = ConceptMask(segmenter, max_batch=4)(TensorDict({"pixels": pixels}, [5, 2]))
    assert segmenter.calls == [4, 4, 2] and data["mask"].shape == (5, 2, 4, 4, 1)


def test_in_a_replay_buffer():
    buffer = ReplayBuffer(storage=LazyTensorStorage(20), batch_size=6)
    buffer.extend(SquareEnv(8).rollout(20, break_when_any_done=False).exclude("mask"))
    buffer.append_transform(ConceptMask(Bright()))
    buffer.append_transform(MaskObservation(dilate=0, out_key="shown"))
    sample = buffer.sample()
    assert sample["mask"].shape == (6, 8, 8, 1) and truth(sample).all()
    assert torch.equal(sample["shown"], sample["pixels"] * (sample["mask"] > 0))


class Network(nn.Module):
    """A segmenter that is a module, though it should not."""

    concepts, version = ("all",), 1

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, frames):
        return self.layer(frames.float()).sigmoid().mul(255).to(torch.uint8)


def test_no_weights_in_the_state():
    transform = ConceptMask(Network())
    assert not list(transform.parameters()) and not transform.state_dict()
    copy = pickle.loads(pickle.dumps(transform))
    data = TensorDict({"pixels": torch.full((2, 4, 4, 3), 9, dtype=torch.uint8)}, [2])
    assert torch.equal(copy(data.clone())["mask"], transform(data)["mask"]) and not data["mask"].requires_grad


@pytest.mark.parametrize(
    "chain", [Compose(ToTensorImage(), ConceptMask(Bright())), ConceptMask(Bright(), "observation")]
)
def test_floats_and_channels_first_are_refused(chain):
    with pytest.raises(ValueError, match=r"ConceptMask reads uint8 \[h, w, 3\]; put it before .* ToTensorImage"):
        _ = TransformedEnv(SquareEnv(8), chain).observation_spec


def test_missing_images():
    with pytest.raises(KeyError, match=r"no 'rgb' among .*'pixels'"):
        _ = TransformedEnv(SquareEnv(8), ConceptMask(Bright(), "rgb")).observation_spec
    with pytest.raises(ValueError, match="max_batch=0"):
        ConceptMask(Bright(), max_batch=0)


def hide(pixels, mask, **options):
    return MaskObservation(**options)(TensorDict({"pixels": pixels, "mask": mask}))["pixels"]


def test_fills_by_hand():
    pixels = torch.tensor([[[10, 20, 30], [40, 60, 80], [0, 0, 0], [200, 100, 50]]], dtype=torch.uint8)  # [1, 4, 3]
    mask = torch.tensor([False, False, False, True])[None, :, None]
    zeros = [[0, 0, 0]] * 3
    assert hide(pixels, mask, dilate=0)[0].tolist() == [*zeros, [200, 100, 50]]
    assert hide(pixels, mask, dilate=1)[0].tolist() == [*zeros[1:], [0, 0, 0], [200, 100, 50]]
    assert hide(pixels, mask, dilate=2)[0].tolist() == [[0, 0, 0], *pixels[0, 1:].tolist()]
    mean = [17, 27, 37]  # of the three hidden pixels: 50 / 3, 80 / 3, 110 / 3
    assert hide(pixels, mask, fill="mean", dilate=0)[0].tolist() == [mean] * 3 + [[200, 100, 50]]
    soft = torch.tensor([0, 51, 255, 255], dtype=torch.uint8)[None, :, None]  # 51 / 255 = 0.2
    assert hide(pixels, soft, dilate=0)[0].tolist() == [[0, 0, 0], [8, 12, 16], [0, 0, 0], [200, 100, 50]]
    # Hidden are 1 and 0.8 of the first two pixels: their mean red is (10 + 0.8 * 40) / 1.8 = 23.3.
    assert hide(pixels, soft, fill="mean", dilate=0)[0, :, 0].tolist() == [23, 27, 0, 200]
    everything = torch.ones(1, 4, 1, dtype=torch.bool)
    assert torch.equal(hide(pixels, everything, fill="mean"), pixels)


def test_random_colours_are_its_own():
    pixels, mask = torch.zeros(3, 8, 8, 3, dtype=torch.uint8), torch.zeros(3, 8, 8, 1, dtype=torch.bool)
    data = TensorDict({"pixels": pixels, "mask": mask}, [3])
    transform = MaskObservation(fill="random", out_key="shown", seed=4)
    state = transform.state_dict()
    first, second = transform(data.clone())["shown"], transform(data.clone())["shown"]
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1]) and first.unique().numel() > 100
    transform.load_state_dict(state)
    assert torch.equal(transform(data.clone())["shown"], first)
    assert torch.equal(transform.clone()(data.clone())["shown"], second)
    assert torch.equal(transform(data.clone())["shown"], second), "a clone has random numbers of its own"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fill": "grey"}, r"fill='grey': choose one of mean, random, zero"),
        ({"dilate": -1}, r"dilate=-1: .*at least 0"),
        ({"dilate": 0.5}, r"dilate=0\.5"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MaskObservation(**options)


def test_what_cannot_be_masked():
    image, mask = torch.zeros(4, 4, 3, dtype=torch.uint8), torch.zeros(4, 4, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"put it before ToTensorImage, and join concepts"):
        hide(image, mask.expand(4, 4, 2))
    with pytest.raises(ValueError, match=r"ToTensorImage"):
        hide(image.float(), mask)
    with pytest.raises(ValueError, match=r"mask of torch\.float32"):
        hide(image, mask.float())
    with pytest.raises(KeyError, match="no 'concepts'"):
        _ = TransformedEnv(SquareEnv(8), MaskObservation(("pixels", "concepts"))).observation_spec


def test_sam3_in_one_line(monkeypatch):
    """What is handed on; the model itself has tests of its own."""
    from envs.segmentation import sam3

    class Recorded(Bright):
        def __init__(self, *arguments, **options):
            super().__init__()
            self.given = arguments, options

    monkeypatch.setattr(sam3, "Sam3", Recorded)
    transform = Sam3Mask("robot arm . ball", "some/folder", union=False, image_size=336, max_batch=4)
    options = {"image_size": 336, "max_batch": 4}
    assert transform.segmenter.given == ((("robot arm", "ball"), "some/folder"), options)
    assert not transform.union and transform.max_batch == 4
    assert Sam3Mask("robot").segmenter.given == ((("robot",), "facebook/sam3"), {"max_batch": 16})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small checkpoint of SAM 3 with random weights."""
    return str(save_model(make_model(make_config(28)), tmp_path_factory.mktemp("sam3")))


def make_segmenter(name: str, tiny: str):
    """The colour model is fitted to the square, the others know nothing."""
    if name == "sam3":
        return Sam3("square", tiny, threshold=0.0, device="cpu")
    if name == "student":
        return Student()
    data = SquareEnv(16).rollout(5, break_when_any_done=False)
    return ColourModel().fit(data["pixels"], data["mask"])


@pytest.mark.parametrize("name", ["colour", "student", "sam3"])
def test_real_segmenters(name, tiny):
    """They write masks, travel in a pickle of less than a megabyte and then write the same."""
    transform = ConceptMask(make_segmenter(name, tiny))
    data = TransformedEnv(SquareEnv(16), transform).rollout(3)
    pickled = pickle.dumps(transform)
    again = pickle.loads(pickled)(data.select("pixels"))
    assert data["mask"].shape == (3, 16, 16, 1) and data["mask"].any() and len(pickled) < MAX_PICKLE
    assert (again["mask"].int() - data["mask"].int()).abs().max() <= 1  # a batch of another size


@pytest.mark.slow
@pytest.mark.parametrize("name", ["colour", "student", "sam3"])
def test_conformance_of_real_segmenters(name, tiny):
    segmenter = make_segmenter(name, tiny)
    assert check_transform(lambda: ConceptMask(segmenter))
