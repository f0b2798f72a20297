"""Images of the environment, drawn once per agent step."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import Bounded, Composite
from torchrl.envs import Transform

from envs.choices import check_positive


class Render(Transform):
    """Draws the state that a step or a reset leads to.

    The base environment draws through its method `render(height, width, camera, fast) -> uint8 [height, width, 3]`.
    It skips frames itself, so nothing is drawn in between.

    Args:
        image_size: height and width in pixels, or one number for both.
        camera: index or name of the camera, None for the environment's own.
        fast: draw a cheaper image, see `envs.backends.dmc.DMCEnv.render`.

    Writes:
        `pixels` uint8 `[h, w, 3]`.

    Raises:
        ValueError: `image_size` is below 1.
        TypeError: the base environment has no `render`.
    """

    def __init__(self, image_size: int | tuple[int, int] = 64, *, camera: int | str | None = None, fast: bool = False):
        super().__init__(out_keys=["pixels"])
        self.height, self.width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
        check_positive("image_size", self.height)
        check_positive("image_size", self.width)
        self.camera, self.fast = camera, fast

    def _base_env(self) -> Any:
        env: Any = self.container
        kind = type(env.base_env)
        if not callable(getattr(kind, "render", None)):
            raise TypeError(
                f"{kind.__name__} has no render(height, width, camera, fast): put Render on an environment of "
                "envs.backends, inside the function that each worker of a batched environment calls"
            )
        return env.base_env

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        pixels = self._base_env().render(self.height, self.width, self.camera, self.fast)  # [h, w, 3]
        next_tensordict.set("pixels", pixels.to(next_tensordict.device))
        return next_tensordict

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        self._base_env()
        shape = torch.Size((*observation_spec.shape, self.height, self.width, 3))
        observation_spec["pixels"] = Bounded(0, 255, shape=shape, dtype=torch.uint8, device=observation_spec.device)
        return observation_spec
