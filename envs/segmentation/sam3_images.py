"""What goes into SAM 3 and what comes out of it, in plain torch: neither torchvision nor Pillow is needed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from envs.choices import check_choice

MODES = ("instance", "semantic")


def compute_pixel_values(frames: Tensor, size: int) -> Tensor:
    """Frames as the model wants them: stretched to a square, each channel in [-1, 1].

    Args:
        frames: uint8 `[N, h, w, 3]`.
        size: height and width in pixels.

    Returns:
        float32 `[N, 3, size, size]`.

    Source: the settings of the image processor that comes with the checkpoint `facebook/sam3`.
    """
    images = frames.permute(0, 3, 1, 2)
    if not images.is_cuda:  # the model was trained on whole grey levels, which this kernel returns
        resized = F.interpolate(images, (size, size), mode="bilinear", antialias=True).float()
    else:  # it has no uint8 version on a GPU
        resized = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True).round()
    return resized / 127.5 - 1


def compute_presence(output: Any) -> Tensor:
    """How sure the model is that the concept is in the image at all, float32 `[N]` in [0, 1]."""
    return output.presence_logits.float().sigmoid()[:, 0]


def compute_mask(output: Any, mode: str, threshold: float) -> Tensor:
    """One soft mask of a concept.

        instance:  sigmoid(max over queries q with sigmoid(logit_q) * presence > threshold of mask_logits_q)
        semantic:  sigmoid(semantic logits) where presence > threshold

    Both are empty where the concept is not in the image.

    Args:
        output: of `Sam3Model` for one concept and N images, Q queries each.
        mode: "instance" for the union of the objects that were found, "semantic" for the dense head.
        threshold: least score, in [0, 1).

    Returns:
        float32 `[N, h, w]` in [0, 1], at the resolution of the model's masks.
    """
    check_choice("mode", mode, MODES)
    presence = output.presence_logits.float().sigmoid()  # [N, 1]
    if mode == "semantic":
        return output.semantic_seg[:, 0].float().sigmoid() * (presence > threshold)[..., None]
    kept = output.pred_logits.float().sigmoid() * presence > threshold  # [N, Q]
    logits = output.pred_masks.masked_fill(~kept[..., None, None], -torch.inf).amax(1)  # before the sigmoid: one map
    return logits.float().sigmoid()


def resize_masks(masks: Tensor, height: int, width: int) -> Tensor:
    """Masks at the size of the frames, uint8 `[N, height, width, P]` of float `[N, P, h, w]` in [0, 1]."""
    resized = F.interpolate(masks, (height, width), mode="bilinear", antialias=True)
    return (resized * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
