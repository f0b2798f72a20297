"""The simulator's own mask as a segmenter."""

from __future__ import annotations

import torch
from torch import Tensor

from envs.segmentation.protocol import fingerprint


class GroundTruth:
    """Passes the simulator's mask on, so that what works with a segmenter works with the truth.

    It sees nothing in images: its frames are the masks themselves, such as the key `mask` of `envs.make_env`.
    """

    concepts = ("foreground",)
    version = fingerprint("ground_truth")

    def __call__(self, frames: Tensor) -> Tensor:
        """Marks the foreground.

        Args:
            frames: masks, bool or uint8 in 0..255, `[N, h, w, 1]`.

        Returns:
            uint8 `[N, h, w, 1]`, 0 or 255 where the mask is bool, as it is where it is uint8.

        Raises:
            ValueError: frames of another type or shape, such as images.
        """
        if frames.dtype not in (torch.bool, torch.uint8) or frames.ndim != 4 or frames.shape[-1] != 1:
            raise ValueError(
                f"frames are {frames.dtype} {list(frames.shape)}: GroundTruth takes the simulator's masks, bool or "
                "uint8 [N, h, w, 1]; to find the foreground in images use another segmenter"
            )
        return frames.to(torch.uint8) * 255 if frames.dtype == torch.bool else frames
