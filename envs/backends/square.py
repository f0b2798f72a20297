"""A tiny environment with images and a foreground mask, for tests and examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Bounded

from envs.backends.base import BackendEnv
from envs.choices import check_positive


class SquareEnv(BackendEnv):
    """A bright square, the foreground, which the action moves over a dim background.

    Episodes of different seeds have different lengths, some end as `terminated`, some as `truncated`.

    Args:
        size: height and width of the image in pixels, at least 4.
        seed: seed of the places and lengths.
        device: where the tensors go.

    Reads:
        `action` float32 `[2]` in [-1, 1]: how far the square moves, in quarters of the image.

    Writes:
        `pixels` uint8 `[size, size, 3]`; `mask` bool `[size, size, 1]`, True on the square; `observation` float32
        `[2]`, the centre in [-1, 1]; `reward` float32 `[1]`, 1 minus the distance to the middle.
    """

    def __init__(self, size: int = 16, *, seed: int | None = 0, device: torch.device | str = "cpu"):
        super().__init__(frame_skip=1, device=device)
        check_positive("size", size)
        self.size = size
        self._declare(Bounded(-1.0, 1.0, torch.Size((2,)), dtype=torch.float32), width=2)
        self.observation_spec["pixels"] = Bounded(0, 255, torch.Size((size, size, 3)), dtype=torch.uint8)
        self.observation_spec["mask"] = Binary(n=1, shape=torch.Size((size, size, 1)), dtype=torch.bool)
        self._set_seed(seed)

    def _set_seed(self, seed: int | None) -> None:
        self._random = np.random.default_rng(seed)

    def foreground_mask(
        self, height: int, width: int, camera: int | str | None = None, replace_floor: bool = True
    ) -> torch.Tensor:
        """Where the square is: bool `[height, width]`; it has no camera and no floor."""
        x, y = self._place
        rows, columns = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None]
        return torch.from_numpy((abs(rows - y) < 0.4) & (abs(columns - x) < 0.4))  # [h, w]

    def render(
        self, height: int, width: int, camera: int | str | None = None, fast: bool = False, **options: Any
    ) -> torch.Tensor:
        """Draws the square before a blue slope: uint8 `[height, width, 3]`, the same with all options."""
        image = torch.zeros(height, width, 3, dtype=torch.uint8)
        image[..., 2] = torch.linspace(60, 120, width).to(torch.uint8)
        image[self.foreground_mask(height, width)] = torch.tensor([220, 160, 40], dtype=torch.uint8)
        return image

    def _with_image(self, tensordict: TensorDict) -> TensorDict:
        tensordict["pixels"] = self.render(self.size, self.size).to(self.device)
        tensordict["mask"] = self.foreground_mask(self.size, self.size)[..., None].to(self.device)
        return tensordict

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        self._place = self._random.uniform(-1, 1, 2).astype(np.float32)
        self._left, self._terminates = int(self._random.integers(3, 7)), bool(self._random.random() < 0.5)
        return self._with_image(self._first(torch.from_numpy(self._place.copy())))

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        move = tensordict.get("action").detach().cpu().numpy() / 2
        self._place = np.clip(self._place + move, -1, 1, dtype=np.float32)
        self._left -= 1
        end = {"terminated": not self._left and self._terminates, "truncated": not self._left and not self._terminates}
        reward = 1.0 - float(np.linalg.norm(self._place))
        return self._with_image(self._arrival(torch.from_numpy(self._place.copy()), reward, **end))
