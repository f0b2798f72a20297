"""What our own environments have in common: their specs and the record of a step."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from envs.choices import check_positive


class BackendEnv(EnvBase):
    """A single environment with one observation vector, which skips frames itself."""

    _has_frame_skip = True  # else TorchRL adds a skip of its own, which runs past the end of an episode

    def __init__(self, *, frame_skip: int, device: torch.device | str):
        check_positive("frame_skip", frame_skip)
        super().__init__(device=device, batch_size=())
        self.frame_skip = frame_skip

    def _declare(self, action_spec: TensorSpec, width: int) -> None:
        one = torch.Size((1,))
        ends = {key: Bounded(0, 1, one, dtype=torch.bool) for key in ("done", "terminated", "truncated")}
        self.action_spec = action_spec
        self.observation_spec = Composite(observation=Unbounded(torch.Size((width,)), dtype=torch.float32))
        self.reward_spec = Unbounded(one, dtype=torch.float32)
        self.done_spec = Composite(ends)

    def _first(self, observation: torch.Tensor) -> TensorDict:
        return TensorDict({"observation": observation}, batch_size=(), device=self.device)

    def _arrival(self, observation: torch.Tensor, reward: float, *, terminated: bool, truncated: bool) -> TensorDict:
        return TensorDict(
            {
                "observation": observation,  # [O]
                "reward": torch.full((1,), reward, dtype=torch.float32),
                "done": torch.full((1,), terminated or truncated, dtype=torch.bool),
                "terminated": torch.full((1,), terminated, dtype=torch.bool),
                "truncated": torch.full((1,), truncated, dtype=torch.bool),
            },
            batch_size=(),
            device=self.device,
        )
