"""What changes around the agent: the colours of the materials and a video on the sky of the simulator."""

from __future__ import annotations

from typing import Any

import numpy as np

SKYBOX = 2  # MuJoCo's mjTEXTURE_SKYBOX
FLOOR_MATERIAL = "grid"


class ColorWalk:
    """The colours of all materials on a random walk in a box around the usual ones.

    Args:
        max_delta: half the width of the box, in [0, 1] like colours.
        step_std: standard deviation of a step of the walk, per frame; 0 for colours that last an episode.
    """

    def __init__(self, max_delta: float, step_std: float):
        self.max_delta, self.step_std = max_delta, step_std
        self.low = self.high = self.colors = np.zeros((0, 3))

    def start(self, physics: Any, generator: np.random.Generator) -> None:
        """Draws the colours with which an episode starts."""
        if len(self.low) != physics.model.nmat:  # only once: our own edits outlive an episode
            usual = physics.model.mat_rgba[:, :3].copy()  # [materials, 3]
            self.low, self.high = np.clip(usual - self.max_delta, 0, 1), np.clip(usual + self.max_delta, 0, 1)
        self.colors = generator.uniform(self.low, self.high)

    def advance(self, generator: np.random.Generator) -> None:
        """Moves on by one frame; draws nothing where nothing moves."""
        if self.step_std > 0:
            step = generator.normal(0.0, self.step_std, self.colors.shape)
            self.colors = np.clip(self.colors + step, self.low, self.high)

    def apply(self, physics: Any) -> None:
        """Paints the materials of a simulator."""
        physics.model.mat_rgba[:, :3] = self.colors


def ping_pong(position: int, length: int) -> int:
    """The frame that is shown after `position` steps there and back over `length` frames, the ends shown once."""
    if length == 1:
        return 0
    there = position % (2 * length - 2)
    return min(there, 2 * length - 2 - there)


class SkyVideo:
    """A video on the sky of a simulator, played there and back; the floor may let it through.

    The sky is a cube around the scene with the video on every side, so that it moves with the view of the camera. A
    camera that sees 45 degrees sees about two fifths of a frame in each direction.

    Args:
        frames: uint8 `[F, s, s, 3 or 1]`.
        clips: first frame and number of frames of each video, `[n, 2]`.
        floor_alpha: opacity of the floor in [0, 1].
        dynamic: play the video, rather than show one frame of it for the whole episode.

    Raises:
        ValueError: the frames are not square.
    """

    def __init__(self, frames: np.ndarray, clips: np.ndarray, floor_alpha: float, dynamic: bool):
        height, width = frames.shape[1:3]
        if height != width:
            raise ValueError(f"video frames of {height}x{width} pixels: the sky needs square ones, prepare them so")
        self.frames, self.clips, self.floor_alpha, self.dynamic = frames, clips, floor_alpha, dynamic
        self.position, self.direction = 0, 1
        self.clip = (0, 1)  # first frame, number of frames

    @property
    def index(self) -> int:
        """The frame on show, as an index into `frames`."""
        first, count = self.clip
        return first + ping_pong(self.position, count)

    def start(self, physics: Any, generator: np.random.Generator) -> None:
        """Draws the video of an episode, the frame that it starts from and its direction."""
        first, count = self.clips[generator.integers(len(self.clips))]
        self.clip = (int(first), int(count))
        self.position = int(generator.integers(count))
        self.direction = int(generator.choice([-1, 1]))
        materials = [physics.model.id2name(index, "material") for index in range(physics.model.nmat)]
        if FLOOR_MATERIAL in materials:
            physics.model.mat_rgba[materials.index(FLOOR_MATERIAL), 3] = self.floor_alpha

    def advance(self) -> None:
        """Moves on by one frame."""
        if self.dynamic:
            self.position += self.direction

    def apply(self, physics: Any) -> None:
        """Puts the frame on show on the sky.

        Raises:
            ValueError: the scene has no sky, or its texture is smaller than the frame.
        """
        model, frame = physics.model, self.frames[self.index]  # [s, s, C]
        skies = np.flatnonzero(model.tex_type == SKYBOX)
        if not len(skies):
            raise ValueError("the scene has no sky to show a video on: set background=False")
        sky, size = int(skies[0]), frame.shape[0]
        start = int(model.tex_adr[sky])
        ends = [int(end) for end in (*model.tex_adr, model.tex_data.size) if end > start]
        if size * size * 3 > min(ends) - start:
            raise ValueError(f"video frames of {size}x{size} pixels: too large for the sky, prepare smaller ones")
        model.tex_width[sky] = model.tex_height[sky] = size  # one square image for all sides of the cube
        texture = model.tex_data[start : start + size * size * 3].reshape(size, size, 3)
        np.copyto(texture, frame)  # a grey frame spreads over the three colours
        if physics._contexts is not None:  # else the first image makes the context, which reads the model
            self._upload(physics, sky)

    @staticmethod
    def _upload(physics: Any, texture: int) -> None:
        from dm_control.mujoco.wrapper import mjbindings

        mujoco: Any = mjbindings.mjlib
        with physics.contexts.gl.make_current() as context:
            context.call(mujoco.mjr_uploadTexture, physics.model.ptr, physics.contexts.mujoco.ptr, texture)
