"""Gymnasium environments, wrapped by TorchRL and brought to the habits of the other backends."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import GymEnv

from envs.backends.actions import ActionScale
from envs.backends.car_racing import CarRacingView
from envs.choices import check_positive, nearest
from envs.gl import require_gl_backend

OLD_GAME = re.compile(r"(?:ALE/)?(\w+?)(?:-ram)?(?:NoFrameskip|Deterministic)?-v[0-4]")
CAR_RACING = "gymnasium.envs.box2d.car_racing"
BRAKE = 2  # component of CarRacing's continuous action


class GymnasiumEnv(GymEnv):
    """One environment of the Gymnasium registry.

    `observation` is the flattened observation (a discrete one becomes one-hot). Where the observation is an image there
    is none: `render` gives that image, of Atari games ("ALE/Pong-v5") and CarRacing for instance. Continuous actions
    lie in [-1, 1]; discrete ones are one-hot.

    A frame is one of the simulator, for Atari games too: `frame_skip` takes the place of the four frames of a step
    that their ids bring along. CarRacing draws but the last frame of a step, and its brake is off for actions from -1
    to 0.

    Args:
        name: id, e.g. "Pendulum-v1"; "module:id" first imports the module that registers it.
        task: must be None, because an id says it all.
        frame_skip: frames per agent step, at least 1.
        seed: seed of the environment.
        device: where the tensors go; the environment runs on the CPU.
        crop_rows: first row of the environment's own image that `render` shows, and the one after the last; None for
            all of them.
        options: for `gymnasium.make`, such as `continuous=False` for CarRacing, or `max_episode_steps`.

    Writes:
        `observation` float32 `[O]` unless it is an image, `reward` float32 `[1]` (sum over the frames), `terminated`,
        `truncated`, `done`.

    Raises:
        ImportError: gymnasium is not installed, or what the environment needs.
        ValueError: the id is not registered or its module not found, `task` is given, `frame_skip` is below 1, there
            is no such option; or an observation has not the size that its space says.
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
        crop_rows: Sequence[int] | None = None,
        **options: Any,
    ):
        try:
            import gymnasium
        except ImportError as error:
            raise ImportError("backend='gym' needs gymnasium: pip install lucid-rl[gym]") from error
        check_positive("frame_skip", frame_skip)
        if task is not None:
            raise ValueError(f"task={task!r}: a Gymnasium id has no tasks, leave it out")
        self.crop_rows = None if crop_rows is None else tuple(crop_rows)
        if self.crop_rows and not (len(self.crop_rows) == 2 and 0 <= self.crop_rows[0] < self.crop_rows[1]):
            raise ValueError(f"crop_rows={list(self.crop_rows)}: give the first row and the one after the last")
        check_game(name, gymnasium)
        try:
            super().__init__(name, frame_skip=frame_skip, render_mode="rgb_array", device=device, **options)
        except ModuleNotFoundError as error:
            missing = getattr(error.__cause__, "name", None) or error.name or name.partition(":")[0]
            raise ValueError(f"name={name!r}: no module {missing!r}, put its folder on PYTHONPATH") from error
        except (gymnasium.error.UnregisteredEnv, gymnasium.error.DeprecatedEnv) as error:
            raise ValueError(f"name={name!r}: {error}{nearest(name, gymnasium.registry)}") from error
        except gymnasium.error.DependencyNotInstalled as error:
            raise ImportError(f"name={name!r} needs more packages: pip install lucid-rl[gym] ({error})") from error
        except TypeError as error:
            given = {name: value for name, value in options.items() if not name.startswith("_")}  # by TorchRL
            if not given:
                raise
            raise ValueError(f"options={given}: {error}") from error
        if seed is not None:
            self.set_seed(seed)

    def _make_specs(self, env: Any, batch_size: Any = None) -> None:
        from gymnasium import spaces

        super()._make_specs(env, batch_size)
        seen, done = env.observation_space, env.action_space
        self._scale, self._image = None, None
        self.observes_images = isinstance(seen, spaces.Box) and seen.dtype == np.uint8 and seen.shape[2:] == (3,)
        self._view = CarRacingView(env.unwrapped) if type(env.unwrapped).__module__ == CAR_RACING else None
        self.observation_spec = Composite()
        if not self.observes_images:
            shape = torch.Size(spaces.flatten_space(seen).shape or ())
            self.observation_spec = Composite(observation=Unbounded(shape, dtype=torch.float32))
        if isinstance(done, spaces.Box):
            low = done.low.astype(np.float64)
            if self._view is not None:
                low[BRAKE] = -1.0
            self._scale = ActionScale(low, done.high.astype(np.float64))
            self.action_spec = Bounded(-1.0, 1.0, torch.Size(done.shape), dtype=torch.float32)

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

        if self.observes_images:
            self._image = observations  # [h', w', 3]
            return {}
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
        frame = self._draw()  # [h', w', 3]
        if not isinstance(frame, np.ndarray):
            raise RuntimeError(f"{self._env} gives no RGB image: use from_pixels=False")
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
            raise TypeError(f"render() gives {frame.dtype} {list(frame.shape)}: return uint8 [h, w, 3] from 0 to 255")
        if self.crop_rows is not None:
            if self.crop_rows[1] > len(frame):
                raise ValueError(f"crop_rows={list(self.crop_rows)}: the image has {len(frame)} rows only")
            frame = frame[slice(*self.crop_rows)]
        image = torch.from_numpy(frame.copy())  # [h', w', 3]
        if image.shape[:2] == (height, width):
            return image
        planes = image.permute(2, 0, 1)[None].float()  # [1, 3, h', w']
        planes = F.interpolate(planes, size=(height, width), mode="area").round()
        return planes[0].permute(1, 2, 0).to(torch.uint8).contiguous()  # [h, w, 3]

    def _draw(self) -> Any:
        """The image that the environment observes or, where it observes none, draws of itself."""
        if self._view is not None:
            return self._view.draw()
        if self.observes_images:
            return self._image
        require_gl_backend()
        return self._env.render()


def check_game(name: str, gymnasium: Any) -> None:
    """Registers the Atari games if this is one, and refuses the ids of old versions.

    Raises:
        ImportError: the games are not installed.
        ValueError: there is a newer id.
    """
    known = gymnasium.registry.get(name)
    if known is not None and "ale_py" not in str(known.entry_point):
        return
    try:
        import ale_py
    except ImportError as error:
        if name.startswith("ALE/"):
            raise ImportError(f"name={name!r} needs ale-py: pip install lucid-rl[atari]") from error
        return
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
    gymnasium.register_envs(ale_py)
    old = OLD_GAME.fullmatch(name)
    if old and f"ALE/{old[1]}-v5" in gymnasium.registry:
        raise ValueError(
            f"name={name!r}: the id of this game is ALE/{old[1]}-v5; with options={{'repeat_action_probability': 0.0}} "
            "its actions are not sticky, as in the old versions"
        )
