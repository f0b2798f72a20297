"""Images without their background."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Composite
from torchrl.envs import Transform

from envs.choices import check_choice

FILLS = ("zero", "mean", "random")


class MaskObservation(Transform):
    """Hides the background of images behind a mask.

    Equation: out = w * pixels + (1 - w) * fill, rounded, where w in [0, 1] is the greatest value of the mask within
    `dilate` pixels. It works on one environment and on batches, and in a replay buffer.

    Args:
        in_keys: the images and the mask.
        fill: what is shown instead: "zero" (black), "mean" (the mean colour of what is hidden in that image) or
            "random" (a random colour for each pixel).
        dilate: pixels by which the mask grows to all sides, at least 0: a limb that is missing hurts more than a rim of
            background.
        out_key: where the images go.
        seed: of the random colours.

    Reads:
        `pixels` uint8 `[h, w, 3]`; `mask` `[h, w, 1]`, bool or uint8 from 0 to 255.

    Writes:
        `pixels`, of the same type and shape.

    Raises:
        ValueError: there is no such fill, `dilate` is negative, or images or mask are of another type or shape.
        KeyError: there are no images or no masks.
    """

    def __init__(
        self,
        in_keys: tuple[NestedKey, NestedKey] = ("pixels", "mask"),
        *,
        fill: str = "zero",
        dilate: int = 1,
        out_key: NestedKey = "pixels",
        seed: int = 0,
    ):
        super().__init__(in_keys=list(in_keys), out_keys=[out_key])
        check_choice("fill", fill, FILLS)
        if not isinstance(dilate, int) or dilate < 0:
            raise ValueError(f"dilate={dilate!r}: give a whole number of at least 0")
        self.fill, self.dilate = fill, dilate
        self.set_seed(seed)

    def set_seed(self, seed: int) -> None:
        """Seeds the random colours to come."""
        self._random = np.random.default_rng(seed)

    def _check(self, pixels: Any, mask: Any) -> None:
        """Of tensors or specs."""
        for key, value in zip(self.in_keys, (pixels, mask), strict=True):
            if value is None:
                raise KeyError(f"no {key!r}: put MaskObservation behind what makes it, such as ConceptMask")
        wanted = (*pixels.shape[:-1], 1)
        if pixels.dtype != torch.uint8 or pixels.shape[-1] != 3 or tuple(mask.shape) != wanted:
            raise ValueError(
                f"pixels {pixels.dtype} {list(pixels.shape)}, mask {list(mask.shape)}: MaskObservation reads uint8 "
                "[h, w, 3] and [h, w, 1]; put it before ToTensorImage, and join concepts with ConceptMask(union=True)"
            )
        if mask.dtype not in (torch.bool, torch.uint8):
            raise ValueError(f"mask of {mask.dtype}: MaskObservation reads bool, or uint8 from 0 to 255")

    def _weights(self, mask: Tensor) -> Tensor:
        """How much of each pixel is kept, after dilation: float `[..., h, w, 1]` in [0, 1]."""
        weights = mask.float() if mask.dtype == torch.bool else mask / 255
        if not self.dilate:
            return weights
        planes = weights.reshape(-1, 1, *mask.shape[-3:-1])  # [N, 1, h, w]
        grown = F.max_pool2d(planes, 2 * self.dilate + 1, stride=1, padding=self.dilate)
        return grown.reshape(weights.shape)

    def _filling(self, pixels: Tensor, weights: Tensor) -> Tensor:
        """What is shown instead, float, broadcasts to `[..., h, w, 3]`."""
        if self.fill == "random":
            noise = self._random.integers(256, size=tuple(pixels.shape), dtype=np.uint8)
            return torch.from_numpy(noise).to(pixels.device).float()
        if self.fill == "zero":
            return torch.zeros(3, device=pixels.device)
        hidden = 1 - weights
        share = hidden.sum((-3, -2), keepdim=True).clamp(min=1e-6)  # nothing hidden: nothing to show
        return (hidden * pixels).sum((-3, -2), keepdim=True) / share  # [..., 1, 1, 3]

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        pixels, mask = (next_tensordict.get(key, None) for key in self.in_keys)
        self._check(pixels, mask)
        weights = self._weights(mask)
        shown = weights * pixels + (1 - weights) * self._filling(pixels, weights)
        return next_tensordict.set(self.out_keys[0], shown.round().to(torch.uint8))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Hides the background of stored images, `[*batch, h, w, 3]`."""
        return self._call(tensordict)

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        keys = observation_spec.keys(True, True)
        specs = [observation_spec[key] if key in keys else None for key in self.in_keys]
        self._check(*specs)
        images: Any = specs[0]
        observation_spec[self.out_keys[0]] = Bounded(
            0, 255, shape=images.shape, dtype=torch.uint8, device=images.device
        )
        return observation_spec

    def clone(self) -> MaskObservation:
        other = super().clone()
        other._random = copy.deepcopy(self._random)
        return other

    def get_extra_state(self) -> Tensor:
        """The generator as the bytes of a JSON text: a loaded transform goes on with the next colours."""
        return torch.frombuffer(bytearray(json.dumps(self._random.bit_generator.state).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes over the state of `get_extra_state`."""
        self._random.bit_generator.state = json.loads(bytes(state.tolist()))
