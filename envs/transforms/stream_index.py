"""The number of the stream that an observation belongs to."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torchrl.data import Composite, Unbounded
from torchrl.envs import Transform


class StreamIndex(Transform):
    """Marks each observation with a constant, so that replay can tell the environments of a collector apart.

    Args:
        index: number of the environment, from 0.

    Writes:
        `stream` int64 `[1]`.
    """

    def __init__(self, index: int):
        super().__init__(out_keys=["stream"])
        self.index = index

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        shape = (*next_tensordict.batch_size, 1)
        stream = torch.full(shape, self.index, dtype=torch.int64, device=next_tensordict.device)
        next_tensordict.set("stream", stream)  # [1]
        return next_tensordict

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        shape = torch.Size((*observation_spec.shape, 1))
        observation_spec["stream"] = Unbounded(shape, dtype=torch.int64, device=observation_spec.device)
        return observation_spec
