"""A colour model of the foreground from a few labelled frames: no network, no weights to download."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from envs.segmentation.metrics import jaccard
from envs.segmentation.protocol import HALF, check_frames, fingerprint

BINS = 64  # per channel
WIDTHS = (6.0, 4.0, 3.0, 2.0)  # of 256 levels: smoothing to choose from, the widest that is as good as any
UNKNOWN = 0.1  # share of the labelled pixels that stand for backgrounds of any colour, never seen
LARGEST = 5.0  # log odds: no pixel is so sure that its neighbours count for nothing
FOLDS = 5  # at most, to choose the smoothing


class ColourModel:
    """Marks the pixels whose colours are those of the foreground in a few labelled frames.

    A pixel's log odds of being foreground are looked up by its colour, in histograms of both kinds of labelled pixels,
    smoothed by a Gaussian. How much is found out from the labels: each frame is marked by a model of the others. Half
    of a pixel's mask comes from its own colour, half from the 3x3 pixels around it.

    Equation: log p(c, foreground) - log(p(c, background) + UNKNOWN / BINS^3), p the smoothed shares of the pixels.

    It holds for the looks that it was fitted to: fit it anew for another task or another distraction.
    """

    concepts = ("foreground",)

    def __init__(self) -> None:
        self._log_odds: Tensor | None = None  # float16 [BINS^3], half a megabyte: it travels with pickles
        self._version = fingerprint("colour")

    @property
    def fitted(self) -> bool:
        return self._log_odds is not None

    @property
    def version(self) -> int:
        return self._version

    def fit(self, frames: Tensor, masks: Tensor) -> ColourModel:
        """Learns the colours of labelled frames and forgets what it had learned; the same labels give the same model.

        Args:
            frames: uint8 `[N, h, w, 3]`; five, spread over what there is to see, are enough.
            masks: bool, or uint8 in 0..255, `[N, h, w, 1]`.

        Returns:
            The model itself.

        Raises:
            ValueError: frames or masks of another type or shape, or no pixel of the foreground or of the background.
        """
        check_frames(frames)
        if masks.dtype not in (torch.bool, torch.uint8) or masks.shape != (*frames.shape[:3], 1):
            raise ValueError(
                f"masks are {masks.dtype} {list(masks.shape)} for frames {list(frames.shape)}: give bool or uint8 "
                f"{[*frames.shape[:3], 1]}"
            )
        truth = masks[..., 0] if masks.dtype == torch.bool else masks[..., 0] >= HALF  # [N, h, w]
        if not truth.any() or truth.all():
            kind = "background" if truth.any() else "foreground"
            raise ValueError(f"no {kind} in the masks of {len(frames)} frames: label frames that show it")
        folds = min(len(frames), FOLDS)
        counts = torch.stack([_count_colours(frames[k::folds], truth[k::folds]) for k in range(folds)])

        def score(width: float) -> float:
            smooth = _smooth(counts, width)  # [K, 2, BINS, BINS, BINS]
            others = smooth.sum(0) - smooth
            marks = [_mark(_compare(others[k]), frames[k::folds]) >= 0 for k in range(folds)]
            return float(torch.cat([jaccard(m, truth[k::folds]) for k, m in enumerate(marks)]).mean())

        width = max(WIDTHS, key=score)  # with a single frame there are no others, and the widest is taken
        self._set(_compare(_smooth(counts.sum(0), width)))
        return self

    def __call__(self, frames: Tensor) -> Tensor:
        """Marks the foreground.

        Args:
            frames: uint8 `[N, h, w, 3]`, on any device.

        Returns:
            uint8 `[N, h, w, 1]`, on the device of the frames.

        Raises:
            RuntimeError: it is not fitted.
            ValueError: frames of another type or shape.
        """
        check_frames(frames)
        if self._log_odds is None:
            raise RuntimeError("the colour model has no colours: fit(frames, masks) it to about five labelled frames")
        if self._log_odds.device != frames.device:
            self._log_odds = self._log_odds.to(frames.device)
        return (_mark(self._log_odds, frames).sigmoid()[..., None] * 255).round().to(torch.uint8)

    def state_dict(self) -> dict[str, Tensor]:
        """The colours as one tensor; empty before `fit`."""
        return {} if self._log_odds is None else {"log_odds": self._log_odds.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over the colours of another model."""
        if state:
            self._set(state["log_odds"].clone())
        else:
            self._log_odds, self._version = None, fingerprint("colour")

    def _set(self, log_odds: Tensor) -> None:
        self._log_odds = log_odds.half()
        self._version = fingerprint("colour", hashlib.sha256(self._log_odds.cpu().numpy().tobytes()).hexdigest())


def _bins(frames: Tensor) -> Tensor:
    """The bin of each pixel's colour, int32 `[N, h, w]`."""
    red, green, blue = (frames // (256 // BINS)).int().unbind(-1)
    return (red * BINS + green) * BINS + blue


def _count_colours(frames: Tensor, truth: Tensor) -> Tensor:
    """Pixels per colour, background and foreground, float `[2, BINS, BINS, BINS]`."""
    kinds = _bins(frames) + BINS**3 * truth  # [N, h, w]
    return torch.bincount(kinds.flatten(), minlength=2 * BINS**3).float().view(2, BINS, BINS, BINS)


def _smooth(counts: Tensor, width: float) -> Tensor:
    """Counts `[..., BINS, BINS, BINS]`, each spread over the colours nearby; their sum stays the same."""
    levels = torch.arange(BINS, device=counts.device) * (256 / BINS)
    kernel = torch.exp(-0.5 * ((levels[:, None] - levels) / width) ** 2)
    kernel /= kernel.sum(1, keepdim=True)  # [from, to]
    for _ in range(3):  # the last axis goes to the front of the three
        counts = (counts @ kernel).movedim(-1, -3)
    return counts


def _compare(counts: Tensor) -> Tensor:
    """Log odds of the foreground by colour `[BINS^3]`, from smoothed counts `[2, BINS, BINS, BINS]`."""
    background, foreground = counts.flatten(1)
    ratio = foreground / (background + UNKNOWN * counts.sum() / BINS**3)
    return ratio.clamp(min=0).log().clamp(-LARGEST, LARGEST).nan_to_num(nan=0.0)  # 0 / 0: nothing is known


def _mark(log_odds: Tensor, frames: Tensor) -> Tensor:
    """Log odds of the foreground by pixel, `[N, h, w]`."""
    own = log_odds[_bins(frames)].float()  # [N, h, w]
    around = avg_pool2d(own[:, None], 3, stride=1, padding=1, count_include_pad=False)[:, 0]
    return (own + around) / 2
