"""Masks from a segmenter, as part of the observation."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Composite
from torchrl.envs import Transform

from envs.choices import check_positive
from envs.segmentation.protocol import Segmenter, join_concepts, split_prompt


class ConceptMask(Transform):
    """Marks the foreground of images with a segmenter.

    Put it around a batched environment, not inside of its workers: then one process holds the model, and a step is one
    call for all rows. A reset of some rows segments those only. In a replay buffer it marks what is sampled. The
    segmenter is neither a parameter nor part of the state dict.

    Args:
        segmenter: see `envs.segmentation.Segmenter`.
        in_key: the images.
        out_key: where the masks go.
        union: one mask of all concepts together; otherwise one per concept.
        max_batch: images per call, at least 1.

    Reads:
        `pixels` uint8 `[h, w, 3]`, or what else the segmenter takes.

    Writes:
        `mask` uint8 `[h, w, 1]`, 0 where the background is and 255 where the foreground surely is; `[h, w, P]` without
        `union`, where P is the number of concepts.

    Raises:
        ValueError: the images are of another type or shape.
        KeyError: there are none.
    """

    segmenter: Segmenter

    def __init__(
        self,
        segmenter: Segmenter,
        in_key: NestedKey = "pixels",
        out_key: NestedKey = "mask",
        *,
        union: bool = True,
        max_batch: int = 64,
    ):
        super().__init__(in_keys=[in_key], out_keys=[out_key])
        check_positive("max_batch", max_batch)
        self.__dict__["segmenter"] = segmenter  # even a module stays out of parameters and state dicts
        self.union, self.max_batch = union, max_batch

    @torch.no_grad()
    def _apply_transform(self, obs: Tensor) -> Tensor:
        """Masks `[..., h, w, C]` of images `[..., h, w, 3]`."""
        self._check(obs.dtype, obs.shape)
        frames = obs.reshape(-1, *obs.shape[-3:])  # [N, h, w, 3]
        masks = torch.cat([self._segment(chunk) for chunk in frames.split(self.max_batch)])  # [N, h, w, C]
        return masks.reshape(*obs.shape[:-1], masks.shape[-1])

    def _segment(self, frames: Tensor) -> Tensor:
        masks = self.segmenter(frames)
        return join_concepts(masks) if self.union else masks

    def _check(self, dtype: torch.dtype, shape: torch.Size) -> None:
        if dtype not in (torch.uint8, torch.bool) or len(shape) < 3 or shape[-1] not in (1, 3):
            raise ValueError(
                f"{self.in_keys[0]!r} of {dtype} {list(shape)}: ConceptMask reads uint8 [h, w, 3]; put it before what "
                "makes floats or channels first, such as ToTensorImage, or let that write another key"
            )

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        reset, batch = tensordict.get("_reset", None), tensordict_reset.batch_size
        if reset is None or not batch:
            return self._call(tensordict_reset)
        rows = reset.reshape(*batch, -1).any(-1)  # [*batch]
        frames = tensordict_reset.get(self.in_keys[0])
        masks = self._apply_transform(frames[rows])
        whole = masks.new_zeros(*frames.shape[:-1], masks.shape[-1])  # TorchRL keeps the masks of the rows that go on
        whole[rows] = masks
        return tensordict_reset.set(self.out_keys[0], whole)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        (key,), keys = self.in_keys, observation_spec.keys(True, True)
        if key not in keys:
            raise KeyError(f"no {key!r} among {sorted(map(str, keys))}: put ConceptMask behind what makes it")
        spec = observation_spec[key]
        self._check(spec.dtype, spec.shape)
        shape = torch.Size((*spec.shape[:-1], 1 if self.union else len(self.segmenter.concepts)))
        observation_spec[self.out_keys[0]] = Bounded(0, 255, shape=shape, dtype=torch.uint8, device=spec.device)
        return observation_spec


class Sam3Mask(ConceptMask):
    """Marks what a phrase names with SAM 3: `ConceptMask(Sam3(...))` in one line.

    Args:
        prompt: one concept, or several with " . " between them: "robot arm . ball".
        model: id on the Hugging Face hub, or local folder.
        in_key: see `ConceptMask`.
        out_key: see `ConceptMask`.
        union: see `ConceptMask`.
        max_batch: images per call, and per pass of the model, at least 1.
        options: of `envs.segmentation.sam3.Sam3`, such as `image_size` or `device`.

    Raises:
        ValueError: as `ConceptMask` and `Sam3`.
        OSError: the model cannot be found or may not be downloaded.
        ImportError: transformers is not installed.
    """

    def __init__(
        self,
        prompt: str,
        model: str = "facebook/sam3",
        *,
        in_key: NestedKey = "pixels",
        out_key: NestedKey = "mask",
        union: bool = True,
        max_batch: int = 16,
        **options: Any,
    ):
        from envs.segmentation.sam3 import Sam3

        segmenter = Sam3(split_prompt(prompt), model, max_batch=max_batch, **options)
        super().__init__(segmenter, in_key, out_key, union=union, max_batch=max_batch)
