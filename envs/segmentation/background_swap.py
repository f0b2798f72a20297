"""Labelled frames on other backgrounds: what teaches a network to look at the foreground.

A network that saw the foreground on few backgrounds finds it by what is around it, and loses it in front of any other.
All random numbers come from the generator that is given, which lives on the CPU.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate, max_pool2d

LARGEST_SHIFT = 1 / 10  # of the image
LARGEST_NOISE = 0.1


def augment(frames: Tensor, masks: Tensor, donors: Tensor, donor_masks: Tensor, generator: Generator) -> list[Tensor]:
    """Frames as they might have been: most on another background, all shifted and in other light.

    Args:
        frames: `[N, 3, h, w]` in [0, 1].
        masks: `[N, 1, h, w]` in [0, 1].
        donors: frames that lend their backgrounds, as `frames`.
        donor_masks: what to leave out of them, as `masks`.
        generator: of the random numbers.

    Returns:
        The frames and their masks.
    """
    swapped = swap_backgrounds(frames, masks, donors, donor_masks, generator)
    kept = _uniform(frames, 1, generator) < 0.25
    frames, masks = _shift(torch.where(kept, frames, swapped), masks, generator)
    contrast, light = 0.8 + 0.4 * _uniform(frames, 1, generator), 0.2 * _uniform(frames, 1, generator) - 0.1
    return [((frames - 0.5) * contrast + 0.5 + light).clamp(0, 1), masks]


def swap_backgrounds(
    frames: Tensor, masks: Tensor, donors: Tensor, donor_masks: Tensor, generator: Generator
) -> Tensor:
    """Pastes the foreground of each frame onto a mirrored donor without its foreground, or onto random colours.

    Args:
        frames: `[N, 3, h, w]` in [0, 1].
        masks: `[N, 1, h, w]` in [0, 1], also between them: the weight of the frame.
        donors: frames that lend their backgrounds, as `frames`.
        donor_masks: what random colours take the place of in the donors, with one pixel around it; as `masks`.
        generator: of the random numbers.
    """
    background = make_backgrounds(frames, generator)
    mirrored, hole = donors.flip(-1), max_pool2d(donor_masks.flip(-1), 3, stride=1, padding=1)
    from_donor = _uniform(frames, 1, generator) < 0.3
    background = torch.where(from_donor, torch.lerp(mirrored, background, hole), background)
    return torch.lerp(background, frames, masks)


def make_backgrounds(like: Tensor, generator: Generator) -> Tensor:
    """Random colours, each picture either in blocks or smooth, with noise of random strength.

    Args:
        like: `[N, 3, h, w]`, of the pictures to make.
        generator: of the random numbers.
    """
    number, _, height, width = like.shape
    pictures = []
    for mode in ("nearest", "bicubic"):
        cells = int(torch.randint(2, max(3, height // 3), (), generator=generator))
        colours = torch.rand(number, 3, cells, cells, generator=generator).to(like.device)
        pictures.append(interpolate(colours, (height, width), mode=mode))  # [N, 3, h, w]
    background = torch.where(_uniform(like, 1, generator) < 0.5, *pictures)
    noise = torch.randn(like.shape, generator=generator).to(like.device)
    return (background + LARGEST_NOISE * _uniform(like, 1, generator) * noise).clamp(0, 1)


def _uniform(like: Tensor, channels: int, generator: Generator) -> Tensor:
    """Numbers in [0, 1), one for each channel of each picture."""
    return torch.rand(len(like), channels, 1, 1, generator=generator).to(like.device)


def _shift(frames: Tensor, masks: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Every picture with its mask by a random number of pixels; what leaves on one side enters on the other."""
    number, _, height, width = frames.shape
    indices = []
    for size in (height, width):
        largest = round(LARGEST_SHIFT * size)
        shift = torch.randint(-largest, largest + 1, (number, 1), generator=generator)
        indices.append(((torch.arange(size) + shift) % size).to(frames.device))  # [N, size]
    picture = torch.arange(number, device=frames.device)[:, None, None]
    rows, columns = indices[0][:, :, None], indices[1][:, None]
    shifted = torch.cat([frames, masks], 1).permute(0, 2, 3, 1)[picture, rows, columns].permute(0, 3, 1, 2)
    return shifted[:, :-1], shifted[:, -1:]
