"""The DeepMind Control Suite as a TorchRL environment, with little between the agent and the simulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded

from envs.backends.actions import ActionScale
from envs.backends.base import BackendEnv
from envs.choices import choose_task
from envs.gl import require_gl_backend
from envs.tasks import default_camera

FAST_FLAGS = {"shadow": False, "reflection": False}


class DMCEnv(BackendEnv):
    """One task of `dm_control.suite`.

    `observation` joins the task's observations in the order of their names. The end of an episode counts as
    `terminated` only if the task says that nothing follows (discount 0), otherwise as `truncated`.

    Args:
        name: domain, e.g. "cheetah".
        task: task, e.g. "run"; may be None for a domain that has only one.
        frame_skip: simulator steps per agent step, at least 1.
        seed: seed of the task's random numbers, in [0, 2**32).
        device: where the tensors go; the simulator runs on the CPU.

    Writes:
        `observation` float32 `[O]`, `reward` float32 `[1]` (sum over the frames), `terminated`, `truncated`, `done`.

    Raises:
        ValueError: the domain or the task does not exist, or `frame_skip` is below 1.
    """

    def __init__(
        self,
        *,
        name: str,
        task: str | None = None,
        frame_skip: int = 1,
        seed: int | None = None,
        device: torch.device | str = "cpu",
    ):
        from dm_control import suite

        super().__init__(frame_skip=frame_skip, device=device)
        self.name, self.task = name, choose_task(name, task, suite.TASKS_BY_DOMAIN)
        self._env: Any = suite.load(name, self.task, task_kwargs={"random": seed})
        bounds, shapes = self._env.action_spec(), self._env.observation_spec()
        self._scale = ActionScale(bounds.minimum, bounds.maximum)
        self._observation_names = sorted(shapes)
        self._declare(
            Bounded(-1.0, 1.0, torch.Size(bounds.shape), dtype=torch.float32),
            width=sum(int(np.prod(spec.shape)) for spec in shapes.values()),
        )
        self._cameras: dict[tuple, Any] = {}
        self._fast: bool | None = None
        self.is_closed = False

    @property
    def physics(self) -> Any:
        """The `dm_control.mujoco.Physics` of the current task."""
        return self._env.physics

    def _observe(self, observation: dict[str, np.ndarray]) -> torch.Tensor:
        parts = [observation[name] for name in self._observation_names]
        return torch.from_numpy(np.concatenate(parts, axis=None, dtype=np.float32))  # [O]

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        return self._first(self._observe(self._env.reset().observation))

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        action = self._scale(tensordict.get("action").numpy(force=True))
        reward = 0.0
        for _ in range(self.frame_skip):
            timestep = self._env.step(action)
            reward += timestep.reward
            if timestep.last():
                break
        terminated = timestep.last() and timestep.discount == 0.0
        truncated = timestep.last() and not terminated
        return self._arrival(self._observe(timestep.observation), reward, terminated=terminated, truncated=truncated)

    def _set_seed(self, seed: int | None) -> None:
        self._env.task.random.seed(seed)

    def render(self, height: int, width: int, camera: int | str | None = None, fast: bool = False) -> torch.Tensor:
        """Draws the current state.

        Args:
            height: pixels, at most what the model's framebuffer holds (480 in the suite).
            width: pixels, at most what the model's framebuffer holds (640 in the suite).
            camera: index or name, -1 for the free camera, None for the one that benchmarks use.
            fast: leave out shadows, reflections and multisampling. Several times faster without a graphics card,
                but another image. The first call decides for the lifetime of the environment.

        Returns:
            uint8 image, `[height, width, 3]`.

        Raises:
            ValueError: there is no such camera, or `fast` differs from the first call.
            RuntimeError: no OpenGL backend works here.
        """
        key = (height, width, camera, fast)
        if key not in self._cameras:
            self._cameras[key] = self._make_camera(*key)
        image = self._cameras[key].render(render_flag_overrides=FAST_FLAGS if fast else None)
        return torch.from_numpy(image.copy())  # [h, w, 3]

    def _make_camera(self, height: int, width: int, camera: int | str | None, fast: bool) -> Any:
        """A camera is kept, because making one costs more than drawing a fast image."""
        from dm_control.mujoco import Camera

        require_gl_backend()
        if self._fast is not None and fast != self._fast:
            raise ValueError(f"fast={fast}: this environment draws with fast={self._fast}, make another one")
        model = self.physics.model
        if fast and self._fast is None:  # read only once, when the first camera makes the OpenGL context
            model.vis.quality.offsamples = 0
            model.vis.quality.shadowsize = 0
        self._fast = fast
        if camera is None:
            camera = default_camera(self.name)
        names = [model.id2name(index, "camera") for index in range(model.ncam)]
        if camera not in names and camera not in range(-1, model.ncam):
            raise ValueError(f"camera={camera!r}: choose one of {names} or an index from -1 to {model.ncam - 1}")
        return Camera(self.physics, height, width, camera)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cameras": {}}  # an OpenGL context stays in its process

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Frees the simulator and its OpenGL context."""
        if not self.is_closed:
            self._cameras.clear()
            self.physics.free()
        super().close(raise_if_closed=raise_if_closed)
