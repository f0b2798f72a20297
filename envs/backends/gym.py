"""Gymnasium environments, wrapped by TorchRL and brought to the habits of the other backends."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
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
        ValueError: the id is not registered or its module not found, `task` is given, `frame_skip` is below 1; or an
            observation has not the size that its space says.
    """

    clips_action = True
    prompt = ""  # what belongs to the foreground is not known
    _reset_seed: int | None = None  # of the next reset

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
        except ModuleNotFoundError as error:
            missing = getattr(error.__cause__, "name", None) or error.name or name.partition(":")[0]
            raise ValueError(f"name={name!r}: no module {missing!r}, put its folder on PYTHONPATH") from error
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

    def _set_seed(self, seed: int | None) -> None:
        """Leaves the seed to the next reset, the only place where Gymnasium takes one."""
        self._reset_seed = seed

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        seed, self._reset_seed = self._reset_seed, None
        return super()._reset(tensordict, **(kwargs if seed is None else {"seed": seed, **kwargs}))

    @property
    def action_bounds(self) -> tuple[list[float], list[float]] | None:
        """The lowest and the highest action of the environment itself, which -1 and 1 stand for; None if discrete."""
        return None if self._scale is None else self._scale.bounds

    def read_obs(self, observations: Any) -> dict[str, torch.Tensor]:
        from gymnasium import spaces

        space = self._env.observation_space
        flat = np.asarray(spaces.flatten(space, observations), dtype=np.float32)  # [O]
        expected = tuple(self.observation_spec["observation"].shape)
        if flat.shape != expected:
            raise ValueError(
                f"an observation of {flat.size} numbers, but {space} has {expected[0]}: let reset() and step() return "
                "what observation_space says"
            )
        return {"observation": torch.from_numpy(flat.copy())}

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
            TypeError: what it draws is not a uint8 image.
        """
        if camera is not None:
            raise ValueError(f"camera={camera!r}: a Gymnasium environment has one camera only, leave it out")
        require_gl_backend()
        frame = self._env.render()
        if not isinstance(frame, np.ndarray):
            raise RuntimeError(f"{self._env} gives no RGB image: use from_pixels=False")
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
            raise TypeError(f"render() gives {frame.dtype} {list(frame.shape)}: return uint8 [h, w, 3] from 0 to 255")
        image = torch.from_numpy(frame.copy())  # [h', w', 3]
        if image.shape[:2] == (height, width):
            return image
        planes = image.permute(2, 0, 1)[None].float()  # [1, 3, h', w']
        planes = F.interpolate(planes, size=(height, width), mode="area").round()
        return planes[0].permute(1, 2, 0).to(torch.uint8).contiguous()  # [h, w, 3]
