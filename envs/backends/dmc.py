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
from envs.tasks import default_camera, reward_range, task_prompt

FAST_FLAGS = {"shadow": False, "reflection": False}
GEOM = 5  # mujoco.mjtObj.mjOBJ_GEOM
HEIGHT_FIELD = 1  # mujoco.mjtGeom.mjGEOM_HFIELD, the terrain of quadruped escape
FLOOR_MATERIAL = "grid"  # of the checkered ground in every domain of the suite, and of nothing else
SCENERY_MATERIAL = "background"  # of the plane behind the arm of manipulator and stacker, and of nothing else


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

    clips_action = True

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
        self._background: dict[bool, np.ndarray] = {}
        self._ray_caster: Any = None
        self._fast: bool | None = None
        self.is_closed = False

    @property
    def physics(self) -> Any:
        """The `dm_control.mujoco.Physics` of the current task."""
        return self._env.physics

    @property
    def frame_rewards(self) -> tuple[float | tuple[float, float], ...] | None:
        """The rewards that a simulator frame may give, as points and (low, high) intervals; None if unknown."""
        return reward_range(self.name, self.task)

    @property
    def prompt(self) -> str:
        """What belongs to the foreground, in words, " . " between concepts; empty if unknown."""
        return task_prompt(self.name)

    @property
    def action_bounds(self) -> tuple[list[float], list[float]]:
        """The lowest and the highest action of the simulator itself, which -1 and 1 stand for."""
        return self._scale.bounds

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

    def render(
        self,
        height: int,
        width: int,
        camera: int | str | None = None,
        fast: bool = False,
        *,
        reflections: bool = True,
    ) -> torch.Tensor:
        """Draws the current state.

        Args:
            height: pixels, at most what the model's framebuffer holds (480 in the suite).
            width: pixels, at most what the model's framebuffer holds (640 in the suite).
            camera: index or name, -1 for the free camera, None for the one that benchmarks use.
            fast: leave out shadows, reflections and multisampling. Several times faster without a graphics card,
                but another image. The first call decides for the lifetime of the environment.
            reflections: draw what the floor mirrors; False where the floor is replaced anyway.

        Returns:
            uint8 image, `[height, width, 3]`.

        Raises:
            ValueError: there is no such camera, or `fast` differs from the first call.
            RuntimeError: no OpenGL backend works here.
        """
        flags = FAST_FLAGS if fast else None if reflections else {"reflection": False}
        image = self._camera(height, width, camera, fast).render(render_flag_overrides=flags)
        return torch.from_numpy(image.copy())  # [h, w, 3]

    def foreground_mask(
        self, height: int, width: int, camera: int | str | None = None, replace_floor: bool = True
    ) -> torch.Tensor:
        """Marks the pixels of everything but the sky and the floor, from the simulator's segmentation.

        Goals, sites, walls and rails are foreground; the plane behind the arm of manipulator and stacker is not. The
        edges are hard, those of the image from `render` are smoothed: a rim of one pixel has a trace of both sides.

        Args:
            height: pixels, as in `render`.
            width: pixels, as in `render`.
            camera: index or name, as in `render`.
            replace_floor: whether the floor counts as background: what has the material "grid", and terrain.

        Returns:
            bool mask, `[height, width]`, True on the foreground.

        Raises:
            ValueError: there is no such camera.
            RuntimeError: no OpenGL backend works here.
        """
        objects = self._camera(height, width, camera, bool(self._fast)).render(segmentation=True)  # [h, w, 2]
        return self._foreground(objects, replace_floor)

    def ray_cast(
        self,
        height: int,
        width: int,
        camera: int | str | None = None,
        fast: bool = False,
        *,
        replace_floor: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws the current state and marks its foreground without OpenGL, see `envs.backends.warp_renderer`.

        Args:
            height: pixels, at least 1.
            width: pixels, at least 1.
            camera: index or name, as in `render`.
            fast: leave out shadows.
            replace_floor: whether the floor counts as background in the mask.

        Returns:
            uint8 image, `[height, width, 3]`, without reflections and with hard edges, and bool mask,
            `[height, width]`, True on the foreground.

        Raises:
            ImportError: `mujoco_warp` is not installed.
            ValueError: there is no such camera.
        """
        if self._ray_caster is None:
            from envs.backends.warp_renderer import WarpRenderer

            self._ray_caster = WarpRenderer(self.physics)
        camera = default_camera(self.name) if camera is None else camera
        image, objects = self._ray_caster.render(height, width, camera, shadows=not fast)
        return torch.from_numpy(image), self._foreground(objects, replace_floor)

    def _foreground(self, objects: np.ndarray, replace_floor: bool) -> torch.Tensor:
        ids, kinds = np.moveaxis(objects, -1, 0)  # [h, w]
        background = self._background_geoms(replace_floor).take(ids, mode="clip") & (kinds == GEOM)
        return torch.from_numpy((ids >= 0) & ~background)

    def _background_geoms(self, replace_floor: bool) -> np.ndarray:
        """Which geoms are background: bool `[ngeom]`. Their materials never change."""
        if replace_floor not in self._background:
            model, names = self.physics.model, {SCENERY_MATERIAL, *([FLOOR_MATERIAL] if replace_floor else [])}
            numbers = [index for index in range(model.nmat) if model.id2name(index, "material") in names]
            terrain = (model.geom_type == HEIGHT_FIELD) & replace_floor
            self._background[replace_floor] = np.isin(model.geom_matid, numbers) | terrain
        return self._background[replace_floor]

    def _camera(self, height: int, width: int, camera: int | str | None, fast: bool) -> Any:
        key = (height, width, camera, fast)
        if key not in self._cameras:
            self._cameras[key] = self._make_camera(*key)
        return self._cameras[key]

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
        return {**self.__dict__, "_cameras": {}, "_ray_caster": None}  # an OpenGL context stays in its process

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Frees the simulator and its OpenGL context."""
        if not self.is_closed:
            self._cameras.clear()
            self._ray_caster = None
            self.physics.free()
        super().close(raise_if_closed=raise_if_closed)
