"""Masks by SAM 3: the things that a prompt names."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from envs.choices import check_choice, check_positive
from envs.segmentation.protocol import check_frames, fingerprint
from envs.segmentation.sam3_images import MODES, compute_mask, compute_pixel_values, compute_presence, resize_masks
from envs.segmentation.sam3_weights import digest_model, encode_prompts, find_model, load_model, read_config

LARGE = 100_000_000  # parameters; more than this is no model for a CPU
DTYPES = ("bfloat16", "float16", "float32")


class _Loaded(NamedTuple):
    """The model without its text encoder, and what that made of the concepts."""

    model: Any
    features: Tensor  # [P, L, D]
    attended: Tensor  # [P, L]


class Sam3:
    """Marks what short noun phrases name, with SAM 3 or SAM3-LiteText by way of transformers.

    The model is found (and downloaded if need be) when the segmenter is made, and loaded at the first call. A pickle
    holds the settings, not the weights. `dtype`, `device` and `max_batch` are not part of `version`: they change masks
    by rounding only.

    Args:
        concepts: one phrase or several, each of at most 32 tokens ("robot arm").
        model: id on the Hugging Face hub, or folder of a checkpoint.
        image_size: height and width in pixels to which frames are scaled, a multiple of the model's patch, 14; None for
            the checkpoint's own size, but at most 672: the full model's own, 1008, is slower. Its attention works in
            windows of 24 patches, so that 336, 672 and 1008 waste nothing. Smaller is faster, and less exact.
        mode: "instance" for the union of the objects found, "semantic" for the dense head.
        threshold: least score of an object, or for "semantic" of the presence of the concept, in [0, 1).
        dtype: of the weights: "bfloat16", "float16" or "float32"; None for bfloat16 on a GPU and float32 on a CPU.
        device: where the model runs; None for a GPU if there is one.
        max_batch: frames per pass of the model, at least 1.

    Raises:
        ValueError: an argument is out of its range, the model is of another kind, or a file of it is damaged.
        OSError: the model cannot be found or may not be downloaded; the message says how to get it, and what to use
            instead.
        ImportError: transformers is missing or too old, or torchvision is broken.

    Source: Carion et al. 2025, SAM 3: Segment Anything with Concepts.
    """

    def __init__(
        self,
        concepts: str | Sequence[str],
        model: str = "facebook/sam3",
        *,
        image_size: int | None = None,
        mode: str = "instance",
        threshold: float = 0.5,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        max_batch: int = 16,
    ):
        self.concepts = (concepts,) if isinstance(concepts, str) else tuple(concepts)
        if not self.concepts or not all(concept.strip() for concept in self.concepts):
            raise ValueError(f"concepts={concepts!r}: give at least one phrase, none of them empty")
        check_choice("mode", mode, MODES)
        check_positive("max_batch", max_batch)
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold={threshold}: give a score in [0, 1)")
        self.model, self.mode, self.threshold, self.max_batch = model, mode, float(threshold), max_batch
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        name = str(dtype or ("bfloat16" if self.device.type == "cuda" else "float32")).removeprefix("torch.")
        check_choice("dtype", name, DTYPES)
        self.dtype: torch.dtype = getattr(torch, name)
        self.folder = find_model(model)
        self.image_size: int = read_config(self.folder, image_size).image_size
        facts = (self.concepts, self.image_size, mode, self.threshold)
        self._version = fingerprint("sam3", digest_model(self.folder), *facts)
        self._loaded: _Loaded | None = None

    @property
    def version(self) -> int:
        """Changes with the content of the checkpoint, the concepts, the size, the mode and the threshold."""
        return self._version

    def load(self) -> None:
        """Loads the weights and encodes the concepts, if this has not been done.

        Raises:
            RuntimeError: weights are missing.
            ValueError: a concept is too long.
        """
        if self._loaded is not None:
            return
        model = load_model(self.folder, read_config(self.folder, self.image_size), self.dtype)
        features, attended = encode_prompts(model, self.folder, self.concepts)
        del model.text_encoder  # 42 % of the full model; the concepts never change
        size = sum(parameter.numel() for parameter in model.parameters())
        if self.device.type == "cpu" and size > LARGE:
            warnings.warn(
                f"Sam3 with {size / 1e6:.0f}M parameters on a CPU: a frame takes a minute or so of CPU time even at "
                "image_size=336; use a GPU or another mask_source",
                stacklevel=2,
            )
        self._loaded = _Loaded(model.to(self.device), features.to(self.device), attended.to(self.device))

    def __call__(self, frames: Tensor) -> Tensor:
        """Marks the concepts; see `Segmenter`."""
        return self.masks_and_presence(frames)[0]

    def masks_and_presence(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Marks the concepts and says how sure it is that they are in the frames at all, in one pass.

        Args:
            frames: uint8 `[N, h, w, 3]`; N may be 0.

        Returns:
            Masks, uint8 `[N, h, w, P]`, and presence, float32 `[N, P]` in [0, 1], on the device of the frames.

        Raises:
            ValueError: frames of another type or shape.
            RuntimeError: weights are missing.
        """
        check_frames(frames)
        if not len(frames):
            masks = frames[..., :1].expand(*frames.shape[:3], len(self.concepts))
            return masks, masks[:, 0, 0].float()
        self.load()
        parts = [self._segment(chunk.to(self.device)) for chunk in frames.split(self.max_batch)]
        masks, presence = (torch.cat(part).to(frames.device) for part in zip(*parts, strict=True))
        return masks, presence

    @torch.no_grad()  # no inference mode: its tensors cannot be changed in place later
    def _segment(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """One pass over the images, then the heads once per concept."""
        assert self._loaded is not None
        model, features, attended = self._loaded
        vision = model.get_vision_features(compute_pixel_values(frames, self.image_size).to(self.dtype))
        masks, presence = [], []
        for feature, mask in zip(features, attended, strict=True):
            text = feature.expand(len(frames), -1, -1)  # [N, L, D], one prompt does not broadcast
            # What the model takes has been a tensor in some versions and an object with this attribute in others.
            text.pooler_output = text.view_as(text)  # pyright: ignore[reportAttributeAccessIssue]
            output = model(vision_embeds=vision, text_embeds=text, attention_mask=mask.expand(len(frames), -1))
            masks.append(compute_mask(output, self.mode, self.threshold))
            presence.append(compute_presence(output))
        height, width = frames.shape[1:3]
        return resize_masks(torch.stack(masks, 1), height, width), torch.stack(presence, 1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}
