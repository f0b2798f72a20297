"""How good masks are: pure functions of bool masks and the true ones, `[N, h, w]` or `[N, h, w, 1]`.

The share of right pixels is not among them: an agent covers a few percent of the image, so an empty mask would score
above 0.9. A mask that is one pixel too fat scores a low `jaccard`, a high `boundary_f` and full `recall`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, pad


class Quality(NamedTuple):
    """The mean of every measure; NaN where no frame decides it."""

    jaccard: float
    boundary_f: float
    recall: float
    false_positive_rate: float
    empty_rate: float
    flicker: float


def measure(masks: Tensor, truth: Tensor) -> Quality:
    """All measures at once.

    Args:
        masks: bool `[N, h, w]`, successive frames of one film (`flicker` depends on the order).
        truth: bool `[N, h, w]`.

    Raises:
        ValueError: as every function here, where masks are not bool or differ in shape.
    """
    frames = (jaccard(masks, truth), boundary_f(masks, truth), recall(masks, truth))
    films = (false_positive_rate(masks, truth), empty_rate(masks, truth), flicker(masks, truth))
    return Quality(*(float(score.mean()) for score in (*frames, *films)))


def jaccard(masks: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of each frame, float `[N]`; 1 where both are empty."""
    masks, truth = _check(masks, truth)
    return _ratio((masks & truth).sum((1, 2)), (masks | truth).sum((1, 2)))


def boundary_f(masks: Tensor, truth: Tensor, tolerance: int = 1) -> Tensor:
    """F score of the outlines of each frame, float `[N]`; 1 where both are empty.

    The outline are the pixels of a mask beside pixels that do not belong to it, diagonals and the edge of the image
    included. A pixel of one outline is found if the other one passes within `tolerance`.

    Equation: F = 2 P R / (P + R), P the found share of the outline of the mask, R that of the truth.

    Args:
        masks: bool `[N, h, w]`.
        truth: bool `[N, h, w]`.
        tolerance: pixels, along each axis, at least 0.

    Source: Perazzi et al. 2016, A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation.
    Differs: the tolerance is a number of pixels, not a share of the diagonal; a square, not a disc.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance={tolerance}: give 0 or more pixels")
    outline, true_outline = (_outline(mask) for mask in _check(masks, truth))
    precision = _ratio((outline & _dilate(true_outline, tolerance)).sum((1, 2)), outline.sum((1, 2)))
    found = _ratio((true_outline & _dilate(outline, tolerance)).sum((1, 2)), true_outline.sum((1, 2)))
    return 2 * precision * found / (precision + found).clamp(min=torch.finfo(precision.dtype).tiny)


def recall(masks: Tensor, truth: Tensor) -> Tensor:
    """Share of the true foreground that each mask holds, float `[N]`; 1 where there is none."""
    masks, truth = _check(masks, truth)
    return _ratio((masks & truth).sum((1, 2)), truth.sum((1, 2)))


def false_positive_rate(masks: Tensor, truth: Tensor) -> Tensor:
    """Share of the frames without the object in which a mask finds one all the same, float `[]`; NaN without any."""
    masks, truth = _check(masks, truth)
    return masks.any((1, 2))[~truth.any((1, 2))].float().mean()


def empty_rate(masks: Tensor, truth: Tensor) -> Tensor:
    """Share of the frames with the object in which the mask is empty, float `[]`; NaN without any."""
    masks, truth = _check(masks, truth)
    return (~masks.any((1, 2)))[truth.any((1, 2))].float().mean()


def flicker(masks: Tensor, truth: Tensor) -> Tensor:
    """Share of the pixels that change from one frame to the next in the masks but not in truth, float `[]`.

    Args:
        masks: bool `[N, h, w]`, successive frames of one film; NaN for fewer than two.
        truth: bool `[N, h, w]`.
    """
    masks, truth = _check(masks, truth)
    return ((masks[1:] ^ masks[:-1]) & ~(truth[1:] ^ truth[:-1])).float().mean()


def _check(masks: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Both as bool `[N, h, w]`."""
    pair = []
    for name, mask in (("masks", masks), ("truth", truth)):
        if mask.dtype != torch.bool:
            raise ValueError(f"{name} are {mask.dtype}: give bool, such as {name} >= 128 for uint8")
        pair.append(mask.squeeze(-1) if mask.ndim == 4 else mask)
    if pair[0].ndim != 3 or pair[0].shape != pair[1].shape:
        shapes = f"masks {list(masks.shape)}, truth {list(truth.shape)}"
        raise ValueError(f"{shapes}: give both as [N, h, w] or [N, h, w, 1]")
    return pair[0], pair[1]


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 1 where both are 0."""
    return torch.where(whole > 0, part / whole.clamp(min=1), 1.0)


def _outline(mask: Tensor) -> Tensor:
    """The pixels of a mask that touch what is outside."""
    return mask & _dilate(pad(~mask, (1, 1, 1, 1), value=True), 1)[:, 1:-1, 1:-1]


def _dilate(mask: Tensor, pixels: int) -> Tensor:
    grown = max_pool2d(mask[:, None].float(), 2 * pixels + 1, stride=1, padding=pixels)  # [N, 1, h, w]
    return grown[:, 0] > 0
