"""Gymnasium environments, wrapped by TorchRL and brought to the habits of the other backends."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import GymEnv

from envs.backends.actions import ActionScale
from envs.choices import check_positive, nearest
from envs.gl import require_gl_backend


class GymnasiumEnv(GymEnv):
    """One environment of the Gymnasium registry.

    `observation` is the flattened observation (a discrete one becomes one-hot). Continuous actions lie in [-1, 1];
    discrete ones are one-hot.

    Args:
        name: id, e.g. "Pendulum-v1"; "module:id" first imports the module that registers it.
        task: must be None, because an id says it all.
        frame_skip: steps of the environment per agent step, at least 1.
        seed: seed of the environment.
        device: where the tensors go; the environment runs on the CPU.
        kwargs: options of `torchrl.envs.GymEnv`, which passes those that it does not know to `gymnasium.make`.

    Writes:
        `observation` float32 `[O]`, `reward` float32 `[1]` (sum over the frames), `terminated`, `truncated`, `done`.

    Raises:
        ImportError: gymnasium is not installed.
        ValueError: the id is not registered, `task` is given, or `frame_skip` is below 1.
    """

    clips_action = True

    def __init__(
        self,
        *,
        name: str,
        task: str | None = None,
        frame_skip: int = 1,
        seed: int | None = None,
        device: torch.device | str = "cpu",
        **kwargs: Any,
    ):
        try:
            import gymnasium
        except ImportError as error:
            raise ImportError("backend='gym' needs gymnasium: pip install lucid-rl[gym]") from error
        check_positive("frame_skip", frame_skip)
        if task is not None:
            raise ValueError(f"task={task!r}: a Gymnasium id has no tasks, leave it out")
        try:
            super().__init__(name, frame_skip=frame_skip, render_mode="rgb_array", device=device, **kwargs)
        except (gymnasium.error.UnregisteredEnv, gymnasium.error.DeprecatedEnv) as error:
            raise ValueError(f"name={name!r}: {error}{nearest(name, gymnasium.registry)}") from error
        if seed is not None:
            self.set_seed(seed)

    def _make_specs(self, env: Any, batch_size: Any = None) -> None:
        from gymnasium import spaces

        super()._make_specs(env, batch_size)
        self._scale = None
        shape = torch.Size(spaces.flatten_space(env.observation_space).shape or ())
        self.observation_spec = Composite(observation=Unbounded(shape, dtype=torch.float32))
        if isinstance(env.action_space, spaces.Box):
            bounds = env.action_space
            self._scale = ActionScale(bounds.low.astype(np.float64), bounds.high.astype(np.float64))
            self.action_spec = Bounded(-1.0, 1.0, torch.Size(bounds.shape), dtype=torch.float32)

    def read_obs(self, observations: Any) -> dict[str, torch.Tensor]:
        from gymnasium import spaces

        flat = spaces.flatten(self._env.observation_space, observations)
        return {"observation": torch.from_numpy(np.asarray(flat, dtype=np.float32).copy())}  # [O]

    def read_action(self, action: torch.Tensor) -> Any:
        if self._scale is None:
            return super().read_action(action)
        return self._scale(action.numpy(force=True)).astype(self._env.action_space.dtype)  # [A]

    def render(self, height: int, width: int, camera: int | str | None = None, fast: bool = False) -> torch.Tensor:
        """Draws the current state as the environment draws itself, then resizes by averaging areas.

        Args:
            height: pixels.
            width: pixels.
            camera: must be None: Gymnasium fixes the camera when an environment is made.
            fast: ignored: there is one way to draw.

        Returns:
            uint8 image, `[height, width, 3]`.

        Raises:
            ValueError: a camera was asked for.
            RuntimeError: the environment cannot draw itself, or MuJoCo has no OpenGL backend.
        """
        if camera is not None:
            raise ValueError(f"camera={camera!r}: a Gymnasium environment has one camera only, leave it out")
        require_gl_backend()
        frame = self._env.render()
        if not isinstance(frame, np.ndarray):
            raise RuntimeError(f"{self._env} gives no RGB image: use from_pixels=False")
        image = torch.from_numpy(frame.copy())  # [h', w', 3]
        if image.shape[:2] == (height, width):
            return image
        planes = image.permute(2, 0, 1)[None].float()  # [1, 3, h', w']
        planes = F.interpolate(planes, size=(height, width), mode="area").round()
        return planes[0].permute(1, 2, 0).to(torch.uint8).contiguous()  # [h, w, 3]
