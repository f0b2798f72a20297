"""Images of the environment, drawn once per agent step."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import Binary, Bounded, Composite
from torchrl.envs import Transform

from envs.choices import check_choice, check_positive

BACKENDS = ("mujoco", "mjwarp")


class Render(Transform):
    """Draws the state that a step or a reset leads to, and marks the foreground.

    The base environment draws through its method `render(height, width, camera, fast) -> uint8 [height, width, 3]`.
    It skips frames itself, so nothing is drawn in between. For a mask it has a method
    `foreground_mask(height, width, camera, replace_floor) -> bool [height, width]` besides, and `render` takes
    `reflections=False`. With `backend="mjwarp"` it
    draws both in one pass through `ray_cast(height, width, camera, fast, replace_floor=) -> (image, mask)`.

    Args:
        image_size: height and width in pixels, or one number for both.
        camera: index or name of the camera, None for the environment's own.
        fast: draw a cheaper image, see `envs.backends.dmc.DMCEnv.render`.
        mask: write the mask of the foreground as well.
        replace_floor: whether the floor counts as background in the mask.
        reflections: draw what the floor mirrors; None for where there is no mask by which the floor is replaced.
        backend: "mujoco", or "mjwarp" for ray casting, several times faster on a CPU and another image, see
            `envs.backends.warp_renderer`.

    Writes:
        `pixels` uint8 `[h, w, 3]`; `mask` bool `[h, w, 1]` if asked for, True on the pixels of the agent and of all
        else that matters for the task, False on those that a distraction may replace.

    Raises:
        ValueError: `image_size` is below 1, or there is no such backend.
        TypeError: the base environment has no `render`, no `foreground_mask` where a mask is asked for, or no
            `ray_cast` where the backend needs it.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 64,
        *,
        camera: int | str | None = None,
        fast: bool = False,
        mask: bool = False,
        replace_floor: bool = True,
        reflections: bool | None = None,
        backend: str = "mujoco",
    ):
        super().__init__(out_keys=["pixels", "mask"] if mask else ["pixels"])
        self.height, self.width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
        check_positive("image_size", self.height)
        check_positive("image_size", self.width)
        self.camera, self.fast = camera, fast
        self.mask, self.replace_floor = mask, replace_floor
        check_choice("render backend", backend, BACKENDS)
        self.backend = backend
        reflections = not (mask and replace_floor) if reflections is None else reflections
        self._options = {} if reflections else {"reflections": False}

    def _base_env(self) -> Any:
        env: Any = self.container
        kind = type(env.base_env)
        if not callable(getattr(kind, "render", None)):
            raise TypeError(
                f"{kind.__name__} has no render(height, width, camera, fast): put Render on an environment of "
                "envs.backends, inside the function that each worker of a batched environment calls"
            )
        if self.mask and not callable(getattr(kind, "foreground_mask", None)):
            raise TypeError(
                f"{kind.__name__} has no foreground_mask(height, width, camera, replace_floor): a mask from the "
                "simulator needs one of the backends dmc and mock, elsewhere leave emit_mask=False; a distraction can "
                "derive its own from the colours (mask='chroma'), and envs.ConceptMask from a segmenter"
            )
        if self.backend == "mjwarp" and not callable(getattr(kind, "ray_cast", None)):
            raise TypeError(f"{kind.__name__} has no ray_cast: render.backend='mjwarp' draws only dm_control (env=dmc)")
        return env.base_env

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        env, size, mask = self._base_env(), (self.height, self.width), None
        if self.backend == "mjwarp":
            pixels, mask = env.ray_cast(*size, self.camera, self.fast, replace_floor=self.replace_floor)
        else:
            pixels = env.render(*size, self.camera, self.fast, **self._options)  # [h, w, 3]
            if self.mask:
                mask = env.foreground_mask(*size, self.camera, self.replace_floor)  # [h, w]
        next_tensordict.set("pixels", pixels.to(next_tensordict.device))
        if self.mask and mask is not None:
            next_tensordict.set("mask", mask[..., None].to(next_tensordict.device))  # [h, w, 1]
        return next_tensordict

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        self._base_env()
        shape = torch.Size((*observation_spec.shape, self.height, self.width, 3))
        observation_spec["pixels"] = Bounded(0, 255, shape=shape, dtype=torch.uint8, device=observation_spec.device)
        if self.mask:
            shape = torch.Size((*observation_spec.shape, self.height, self.width, 1))
            observation_spec["mask"] = Binary(shape=shape, dtype=torch.bool, device=observation_spec.device)
        return observation_spec
