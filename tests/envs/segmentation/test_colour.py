"""A colour model of a disc in front of backgrounds."""

import pickle

import pytest
import torch

from envs.segmentation.colour import ColourModel
from envs.segmentation.metrics import jaccard
from envs.segmentation.protocol import HALF, Segmenter

SIZE = 24


def make_scene(count: int, seed: int, clutter: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames with a noisy orange disc at random places, and their masks; behind it other colours, orange ones too."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.arange(SIZE)
    centre = torch.randint(6, SIZE - 6, (2, count, 1, 1), generator=generator)
    masks = (axis[:, None] - centre[0]) ** 2 + (axis - centre[1]) ** 2 < 25  # [N, h, w]
    disc = torch.tensor([220.0, 140, 60]) + 12 * torch.randn(count, SIZE, SIZE, 3, generator=generator)
    if clutter:
        cells = torch.randint(256, (count, SIZE // 2, SIZE // 2, 3), generator=generator)
        behind = cells.repeat_interleave(2, 1).repeat_interleave(2, 2).float()
    else:
        behind = torch.tensor([40.0, 60, 120]) + 12 * torch.randn(count, SIZE, SIZE, 3, generator=generator)
    frames = torch.where(masks[..., None], disc, behind).clamp(0, 255).to(torch.uint8)
    return frames, masks[..., None]


@pytest.fixture(scope="module")
def model() -> ColourModel:
    return ColourModel().fit(*make_scene(5, seed=0))


@pytest.fixture(scope="module")
def plain() -> ColourModel:
    """Fitted without clutter."""
    return ColourModel().fit(*make_scene(5, seed=0, clutter=False))


@pytest.mark.parametrize(("name", "clutter", "least"), [("plain", False, 0.98), ("model", True, 0.85)])
def test_five_labels_are_enough(request, name, clutter, least):
    frames, truth = make_scene(20, seed=1, clutter=clutter)
    masks = request.getfixturevalue(name)(frames)
    assert masks.dtype == torch.uint8 and masks.shape == truth.shape
    assert jaccard(masks >= HALF, truth).mean() > least


def test_neighbours_have_a_say(plain):
    """The same colour is surer amid its like than alone."""
    frames, truth = make_scene(1, seed=2, clutter=False)
    row, column = (int(x) for x in truth[0, ..., 0].nonzero().float().mean(0).round())
    frames[0, 2, 2] = frames[0, row, column]
    masks = plain(frames)
    assert masks[0, row, column].item() > 250 > masks[0, 2, 2].item() > 5 > masks[0, 2, 4].item()


def test_soft_labels_count_from_one_half():
    frames, masks = make_scene(5, seed=0)
    soft = torch.where(masks, 130, 120).to(torch.uint8)
    assert ColourModel().fit(frames, soft).version == ColourModel().fit(frames, masks).version


def test_a_fit_is_deterministic_and_forgets(model):
    frames, masks = make_scene(5, seed=0)
    state = torch.get_rng_state()
    again = ColourModel().fit(*make_scene(5, seed=3)).fit(frames, masks)
    assert torch.equal(again.state_dict()["log_odds"], model.state_dict()["log_odds"])
    assert again.version == model.version
    assert torch.equal(torch.get_rng_state(), state)


def test_one_label():
    """There is nothing to choose the smoothing with, but it works."""
    masks = ColourModel().fit(*make_scene(1, seed=0, clutter=False))(make_scene(4, seed=1, clutter=False)[0])
    assert jaccard(masks >= HALF, make_scene(4, seed=1, clutter=False)[1]).mean() > 0.9


def test_smoothing_depends_on_the_labels(model, plain):
    """Wide where colours are few and alone, narrow where the background has the same ones nearby."""

    wide, narrow = ((colours.state_dict()["log_odds"] > 0).sum() for colours in (plain, model))
    assert wide > 1.5 * narrow


def test_is_a_segmenter(model):
    frames = make_scene(3, seed=1)[0]
    assert isinstance(model, Segmenter) and model.concepts == ("foreground",)
    assert model(frames[:0]).shape == (0, SIZE, SIZE, 1)
    assert torch.equal(model(frames)[1:2], model(frames[1:2]))  # each frame on its own
    assert not torch.equal(model(frames), model(frames.flip(-1)))


def test_state(model):
    frames, other = make_scene(3, seed=1)[0], ColourModel()
    assert not other.fitted and other.state_dict() == {} and other.version > 0
    other.load_state_dict(model.state_dict())
    assert other.fitted and other.version == model.version != ColourModel().version
    assert torch.equal(other(frames), model(frames))
    copy = pickle.loads(pickle.dumps(model))
    assert copy.version == model.version and torch.equal(copy(frames), model(frames))
    other.load_state_dict({})
    assert not other.fitted and other.version == ColourModel().version


def test_the_state_is_a_copy(model):
    other = ColourModel()
    other.load_state_dict(model.state_dict())
    other.state_dict()["log_odds"].zero_()
    assert torch.equal(other.state_dict()["log_odds"], model.state_dict()["log_odds"])


def test_versions_differ_by_labels(model):
    assert ColourModel().fit(*make_scene(5, seed=3)).version != model.version


def test_it_must_be_fitted():
    with pytest.raises(RuntimeError, match=r"fit\(frames, masks\)"):
        ColourModel()(make_scene(1, seed=0)[0])


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.zeros(2, SIZE, SIZE, 1, dtype=torch.bool), "no foreground in the masks of 2 frames"),
        (torch.ones(2, SIZE, SIZE, 1, dtype=torch.bool), "no background"),
        (torch.ones(2, SIZE, SIZE, 1), "masks are torch.float32"),
        (torch.ones(3, SIZE, SIZE, 1, dtype=torch.bool), r"give bool or uint8 \[2, 24, 24, 1\]"),
        (torch.ones(2, SIZE, SIZE, dtype=torch.bool), r"give bool or uint8 \[2, 24, 24, 1\]"),
    ],
)
def test_wrong_labels(masks, message):
    with pytest.raises(ValueError, match=message):
        ColourModel().fit(make_scene(2, seed=0)[0], masks)


def test_wrong_frames(model):
    with pytest.raises(ValueError, match="uint8"):
        model(torch.zeros(1, SIZE, SIZE, 3))
