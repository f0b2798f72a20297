"""Images without colour."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Composite
from torchrl.envs import ObservationTransform


class Grey(ObservationTransform):
    """Turns images into their brightness by ITU-R BT.601, y = (77 r + 150 g + 29 b) / 256, rounded down.

    Reads:
        `pixels` uint8 `[h, w, 3]`.

    Writes:
        `pixels` uint8 `[h, w, 1]`.

    Differs: `torchrl.envs.GrayScale` takes images with the channels first and needs torchvision.
    """

    def __init__(self) -> None:
        super().__init__(in_keys=["pixels"], out_keys=["pixels"])

    def _apply_transform(self, obs: Tensor) -> Tensor:
        red, green, blue = obs.to(torch.int32).unbind(-1)  # [h, w] each
        return ((77 * red + 150 * green + 29 * blue) // 256).to(torch.uint8)[..., None]  # [h, w, 1]

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        shape = torch.Size((*observation_spec["pixels"].shape[:-1], 1))
        observation_spec["pixels"] = Bounded(0, 255, shape=shape, dtype=torch.uint8, device=observation_spec.device)
        return observation_spec
