"""Camera, colours and background that change while the task stays the same: the Distracting Control Suite."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.envs import Transform

from envs.choices import check_choice
from envs.tasks import default_camera
from envs.transforms.distracting_camera import CameraWalk, camera_ranges
from envs.transforms.distracting_scene import ColorWalk, SkyVideo
from envs.transforms.render import Render
from envs.transforms.video_sources import CLIP_FRAMES, Video, open_folder, open_procedural

SCALES = {"easy": 0.1, "medium": 0.2, "hard": 0.3}
NUM_VIDEOS = {"easy": 4, "medium": 8, "hard": None}  # None: all of the split
COLOR_STEP = 0.03  # standard deviation of a step of the colours, as a part of the scale
DOMAINS = ("ball_in_cup", "cartpole", "cheetah", "finger", "reacher", "walker")
FLOOR_ALPHAS = {"reacher": 0.0, "walker": 1.0, "cheetah": 1.0}
FLOOR_ALPHA = 0.3  # of the other domains
PROCEDURAL_SIZE = 128  # pixels; the camera sees about two fifths of a frame in each direction


class DistractingCS(Transform):
    """Changes the camera, the colours and the background of a dm_control scene before it is drawn.

    Every episode draws a camera pose around the usual one, colours around the usual ones, and a video for the sky,
    which shines through the floor of some domains. With `dynamic` the three move on with every frame of the simulator,
    otherwise they last the episode. Poses and colours are those of the image alone: physics, rewards, ends and vector
    observations stay the same to the bit. Put it before `Render`, whose camera it moves.

    Args:
        difficulty: "easy", "medium" or "hard": scale 0.1, 0.2 or 0.3; the first 4, the first 8 or all videos.
        dynamic: move within an episode.
        camera: move the camera.
        color: change the colours of the materials.
        background: show videos on the sky.
        source: folder made by `scripts/prepare_video.py`, with square frames; best of 128 pixels or more, as the sky
            shows about two fifths of a frame in each direction. None for moving noise and shapes made here.
        split: "train" or "test": which videos of the source.
        seed: of the three walks, each of which has a generator of its own.

    Raises:
        ValueError: an option does not exist, the source is damaged, the split has too few videos for the difficulty,
            the image is drawn by the free camera, or a video is to be drawn by another backend than "mujoco".
        TypeError: the base environment is not one of dm_control's.

    Source: Stone et al. 2021, "The Distracting Control Suite"; google-research/distracting_control at 0c1bbe5.

    Differs: all walks are seeded. The mode of the camera is that of the one in use. A camera that looks straight down
    does not jump when it passes the vertical. The video turns at its ends without showing them twice, and its frames
    keep their size. Domains other than the six of the suite work, with a warning.
    """

    before_render = True
    render_options: dict[str, Any] = {}  # noqa: RUF012  # what `make_env` tells Render to do for this distraction

    def __init__(
        self,
        difficulty: str = "easy",
        *,
        dynamic: bool = False,
        camera: bool = True,
        color: bool = True,
        background: bool = True,
        source: str | None = None,
        split: str = "train",
        seed: int = 0,
    ):
        super().__init__()
        check_choice("difficulty", difficulty, SCALES)
        self.difficulty, self.dynamic, self.source, self.split = difficulty, dynamic, source, split
        scale = SCALES[difficulty]
        self.camera = CameraWalk(camera_ranges(scale, dynamic)) if camera else None
        self.color = ColorWalk(scale, COLOR_STEP * scale if dynamic else 0.0) if color else None
        self.background: SkyVideo | None = None
        self._video = self._open_video() if background else None
        self.has_background = background
        self._started = False
        self.set_seed(seed)

    def set_seed(self, seed: int) -> None:
        """Starts the random numbers anew."""
        generators = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3)]
        self._camera_random, self._color_random, self._video_random = generators

    def _open_video(self) -> Video:
        count = NUM_VIDEOS[self.difficulty]
        if self.source is None:
            frames = None if count is None else count * CLIP_FRAMES
            return open_procedural(split=self.split, size=(PROCEDURAL_SIZE, PROCEDURAL_SIZE), num_frames=frames)
        video = open_folder(self.source, split=self.split)
        if count is not None and len(video.clips) < count:
            raise ValueError(
                f"source={self.source!r}: difficulty={self.difficulty!r} needs {count} videos, the split "
                f"{self.split!r} has {len(video.clips)}; prepare more of them or choose another difficulty"
            )
        return Video(video.frames, video.clips[:count], video.description)

    def describe(self) -> dict[str, Any]:
        """What is shown on the sky, for the record of a run; empty without a background."""
        if not self.has_background:
            return {}
        self._video = self._video or self._open_video()
        return dict(self._video.description)

    def __getstate__(self) -> dict[str, Any]:  # the frames are opened again where it arrives
        return {**super().__getstate__(), "_video": None, "background": None, "_started": False}

    def clone(self) -> DistractingCS:
        other = super().clone()
        for name in ("camera", "color", "_camera_random", "_color_random", "_video_random"):
            setattr(other, name, copy.deepcopy(getattr(self, name)))
        other.background, other._started = None, False
        return other

    def get_extra_state(self) -> torch.Tensor:
        """The generators as the bytes of a JSON text: a loaded environment goes on with the next episode."""
        states = [random.bit_generator.state for random in self._randoms()]
        return torch.frombuffer(bytearray(json.dumps(states).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        for random, values in zip(self._randoms(), json.loads(bytes(state.tolist())), strict=True):
            random.bit_generator.state = values

    def _randoms(self) -> list[np.random.Generator]:
        return [self._camera_random, self._color_random, self._video_random]

    def _base_env(self) -> Any:
        env: Any = self.container
        kind = type(env.base_env)
        if not hasattr(kind, "physics"):
            raise TypeError(
                f"{kind.__name__} has no dm_control physics: put DistractingCS before Render on a DMCEnv, inside the "
                "function that each worker of a batched environment calls"
            )
        return env.base_env

    def _render(self) -> Render | None:
        """What draws the images."""
        whole: Any = self.container
        return next((module for module in whole.transform.modules() if isinstance(module, Render)), None)

    def _view(self, env: Any) -> int:
        """The camera that the images are drawn with."""
        render = self._render()
        view = render.camera if render else None
        if view is None:
            return default_camera(env.name)
        model = env.physics.model
        names = [model.id2name(index, "camera") for index in range(model.ncam)]
        if view not in names and view not in range(model.ncam):
            raise ValueError(
                f"camera={view!r}: DistractingCS moves cameras of the model, choose one of {names} or an index from 0 "
                f"to {model.ncam - 1}, or leave the camera in its place with camera=False"
            )
        return names.index(view) if isinstance(view, str) else view

    def _begin(self, env: Any) -> None:
        """What depends on the environment, once."""
        if env.name not in DOMAINS:
            warnings.warn(
                f"DistractingCS on name={env.name!r}: the published suite has {', '.join(DOMAINS)} only", stacklevel=2
            )
        if self.has_background:
            render = self._render()
            if render is not None and render.backend != "mujoco":
                raise ValueError(
                    f"render backend {render.backend!r}: keeps one sky; draw with 'mujoco' or set background=False"
                )
            video = self._video = self._video or self._open_video()
            alpha = FLOOR_ALPHAS.get(env.name, FLOOR_ALPHA)
            self.background = SkyVideo(video.frames, video.clips, alpha, self.dynamic)
        self._started = True

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        env = self._base_env()
        if not self._started:
            self._begin(env)
        if self.camera is not None:
            self.camera.start(env.physics, self._view(env), self._camera_random)
            self.camera.apply(env.physics)
        if self.color is not None:
            self.color.start(env.physics, self._color_random)
            self.color.apply(env.physics)
        if self.background is not None:
            self.background.start(env.physics, self._video_random)
            self.background.apply(env.physics)
        return tensordict_reset

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        env = self._base_env()
        if self.camera is not None:  # always: the simulator puts it back in its usual place
            for _ in range(env.frame_skip):
                self.camera.advance(self._camera_random)
            self.camera.apply(env.physics)
        if not self.dynamic:
            return next_tensordict
        if self.color is not None:
            for _ in range(env.frame_skip):
                self.color.advance(self._color_random)
            self.color.apply(env.physics)
        if self.background is not None:
            for _ in range(env.frame_skip):
                self.background.advance()
            self.background.apply(env.physics)
        return next_tensordict
