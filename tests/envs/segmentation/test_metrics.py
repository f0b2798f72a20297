"""Every measure, by hand, on small masks."""

import math

import pytest
import torch

from envs.segmentation.metrics import (
    boundary_f,
    empty_rate,
    false_positive_rate,
    flicker,
    jaccard,
    measure,
    recall,
)

SIZE = 12


def box(top: int, bottom: int, left: int, right: int) -> torch.Tensor:
    """One mask with a filled box, bool [1, 12, 12]; rows top..bottom-1, columns left..right-1."""
    mask = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    mask[:, top:bottom, left:right] = True
    return mask


TRUTH, EMPTY, FULL = box(4, 8, 4, 8), box(0, 0, 0, 0), box(0, SIZE, 0, SIZE)
FAT = box(3, 9, 3, 9)


def test_a_perfect_mask():
    assert measure(TRUTH, TRUTH)[:3] == (1, 1, 1)


def test_a_mask_one_pixel_too_fat():
    assert jaccard(FAT, TRUTH).item() == pytest.approx(16 / 36)
    assert boundary_f(FAT, TRUTH).item() == 1
    assert recall(FAT, TRUTH).item() == 1
    assert boundary_f(FAT, TRUTH, tolerance=0).item() == 0


def test_half_of_the_object():
    half = box(4, 8, 4, 6)
    assert jaccard(half, TRUTH).item() == pytest.approx(8 / 16)
    assert recall(half, TRUTH).item() == pytest.approx(8 / 16)
    # All 8 pixels of its outline lie beside that of the truth; of the 12 there, the 4 on the right are not found.
    assert boundary_f(half, TRUTH).item() == pytest.approx(2 * (8 / 12) / (1 + 8 / 12))


@pytest.mark.parametrize("score", [jaccard, boundary_f])
@pytest.mark.parametrize(("mask", "truth", "value"), [(EMPTY, EMPTY, 1), (EMPTY, TRUTH, 0), (TRUTH, EMPTY, 0)])
def test_empty_masks(score, mask, truth, value):
    assert score(mask, truth).item() == value


def test_a_full_mask_has_an_outline():
    assert boundary_f(FULL, FULL).item() == 1
    assert boundary_f(FULL, EMPTY).item() == 0


def test_recall_of_nothing():
    assert recall(EMPTY, EMPTY).item() == recall(TRUTH, EMPTY).item() == 1
    assert recall(EMPTY, TRUTH).item() == 0


def test_frames_are_judged_one_by_one():
    scores = jaccard(torch.cat([TRUTH, FAT, EMPTY]), TRUTH.expand(3, -1, -1))
    torch.testing.assert_close(scores, torch.tensor([1, 16 / 36, 0]))


def test_absent_and_present_objects():
    masks, truth = torch.cat([FAT, EMPTY, EMPTY, FAT, FAT]), torch.cat([EMPTY, EMPTY, TRUTH, TRUTH, TRUTH])
    assert false_positive_rate(masks, truth).item() == 1 / 2
    assert empty_rate(masks, truth).item() == pytest.approx(1 / 3)
    assert math.isnan(false_positive_rate(masks[2:], truth[2:]).item())
    assert math.isnan(empty_rate(masks[:2], truth[:2]).item())


def test_flicker():
    truth, moved = TRUTH.expand(3, -1, -1), torch.cat([TRUTH, box(4, 8, 5, 9)])
    blinking = torch.cat([TRUTH, EMPTY, TRUTH])
    assert flicker(blinking, truth).item() == pytest.approx(16 / SIZE**2)
    assert flicker(moved, moved).item() == 0  # it changes as much as truth does
    assert flicker(TRUTH.expand(2, -1, -1), moved).item() == 0
    assert math.isnan(flicker(TRUTH, TRUTH).item())


def test_a_last_axis_of_one():
    assert jaccard(FAT[..., None], TRUTH).item() == jaccard(FAT, TRUTH).item()
    assert measure(FAT[..., None], TRUTH[..., None])[:3] == measure(FAT, TRUTH)[:3]


def test_measure_names_what_it_measures():
    masks, truth = torch.cat([FAT, EMPTY, FAT]), torch.cat([TRUTH, TRUTH, EMPTY])
    quality = measure(masks, truth)
    assert quality.jaccard == pytest.approx(16 / 36 / 3)
    assert quality.boundary_f == pytest.approx(1 / 3)
    assert quality.recall == pytest.approx(2 / 3)
    assert quality.false_positive_rate == 1
    assert quality.empty_rate == 1 / 2
    assert quality.flicker == pytest.approx((36 + 20) / (2 * SIZE**2))


@pytest.mark.parametrize(
    ("masks", "truth", "message"),
    [
        (TRUTH.to(torch.uint8), TRUTH, "masks are torch.uint8: give bool, such as masks >= 128"),
        (TRUTH, TRUTH.float(), "truth are torch.float32"),
        (TRUTH[0], TRUTH[0], r"\[N, h, w\]"),
        (TRUTH, TRUTH[:, 1:], r"masks \[1, 12, 12\], truth \[1, 11, 12\]"),
        (TRUTH[..., None].expand(-1, -1, -1, 2), TRUTH, r"\[N, h, w, 1\]"),
    ],
)
def test_wrong_masks(masks, truth, message):
    with pytest.raises(ValueError, match=message):
        jaccard(masks, truth)


def test_wrong_tolerance():
    with pytest.raises(ValueError, match="tolerance=-1"):
        boundary_f(TRUTH, TRUTH, tolerance=-1)


def test_no_frames():
    assert jaccard(TRUTH[:0], TRUTH[:0]).shape == boundary_f(TRUTH[:0], TRUTH[:0]).shape == (0,)
