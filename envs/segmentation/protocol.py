"""What a segmenter is: frames in, one soft mask per concept out."""

from __future__ import annotations

import hashlib
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

SEPARATOR = " . "
HALF = 128  # least value of a soft mask that counts as foreground


@runtime_checkable
class Segmenter(Protocol):
    """Marks what is wanted in images.

    A segmenter is a callable, not a module: what holds one keeps its weights out of state dicts and checkpoints.

    Attributes:
        concepts: the P things that it marks, one name each.
        version: 63-bit number that differs between segmenters that may mark the same frame differently; never 0.
    """

    concepts: tuple[str, ...]

    @property
    def version(self) -> int: ...

    def __call__(self, frames: Tensor) -> Tensor:
        """Marks the concepts in a batch of frames; each frame on its own.

        Args:
            frames: uint8 `[N, h, w, 3]`, on any device; N may be 0.

        Returns:
            uint8 `[N, h, w, P]`, 0 where a concept is not, 255 where it surely is, on the device of the frames.

        Raises:
            ValueError: frames of another type or shape.
        """
        ...


def split_prompt(prompt: str) -> tuple[str, ...]:
    """The concepts of a prompt, which has " . " between them: "cart . pole" -> ("cart", "pole").

    Raises:
        ValueError: a concept is empty.
    """
    concepts = tuple(concept.strip() for concept in prompt.split(SEPARATOR.strip()))
    if not all(concepts):
        raise ValueError(f"prompt={prompt!r}: give one concept, or several with {SEPARATOR!r} between them")
    return concepts


def join_concepts(masks: Tensor) -> Tensor:
    """The foreground: what belongs to any concept.

    Args:
        masks: `[..., h, w, P]`.

    Returns:
        `[..., h, w, 1]`.
    """
    return masks.amax(-1, keepdim=True)


def fingerprint(*facts: object) -> int:
    """A number in [1, 2**63) that depends on the text of every fact, the same in every process."""
    digest = hashlib.sha256("\n".join(map(str, facts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % (2**63 - 1) + 1


def check_frames(frames: Tensor) -> None:
    """Checks that frames are what a segmenter takes.

    Raises:
        ValueError: they are not uint8 `[N, h, w, 3]`.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {frames.dtype} {list(frames.shape)}: give uint8 [N, h, w, 3]")
