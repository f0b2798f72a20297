"""Which pixels a distraction may replace, and how they are replaced."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PIXEL = np.dtype("V3")  # the three bytes of a pixel as one item: several times faster to copy than three items


def chroma_mask(pixels: Tensor) -> Tensor:
    """Takes every pixel that is bluer than it is red or green for background.

    Equation: background = B > G and B > R. Blue parts of the agent are lost and grey parts of the background stay:
    `docs/masks.md` says how many.

    Args:
        pixels: uint8 `[..., h, w, 3]`.

    Returns:
        bool `[..., h, w, 1]`, True on the foreground.

    Source: psp-neurips-2024/psp_camera_ready at 3ba6f32, after facebookresearch/deep_bisim4control.
    """
    red, green, blue = pixels.unbind(-1)
    return ((blue <= green) | (blue <= red)).unsqueeze(-1)


def paste_foreground_(background: Tensor, pixels: Tensor, mask: Tensor) -> Tensor:
    """Writes the foreground of an image over a background, in place.

    Args:
        background: uint8 `[..., h, w, 3]`, contiguous, changed and returned.
        pixels: uint8 `[..., h, w, 3]`.
        mask: bool `[..., h, w, 1]`, True on the foreground.
    """
    if background.device.type != "cpu":
        return torch.where(mask, pixels, background, out=background)
    source = pixels.contiguous().numpy().view(PIXEL)  # [..., h, w, 1]
    np.copyto(background.numpy().view(PIXEL), source, where=mask.numpy())
    return background
