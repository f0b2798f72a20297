"""Two disturbances that come with a video behind the agent: in the sensor of the reward, or of the camera's aim."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from torchrl.envs import Compose, Transform

from envs.choices import check_positive
from envs.transforms.natural_video import NaturalVideo

# The walk of the camera's aim, in units of which `mult` pixels make one; per frame of the simulator.
PULL = 0.1  # acceleration towards the middle per distance, where it is not near
PULL_RADIUS = 0.075  # how far from the middle it begins
NOISE_STD = 0.005  # of the acceleration near the middle, and of the first velocity
VELOCITY_DECAY = 0.9
SPEED_FACTOR = 0.5  # time that a frame counts for


def reacher_radius(physics: Any) -> float:
    """How near the finger has to be to the target: the sum of their radii, in metres."""
    return float(physics.named.model.geom_size[["target", "finger"], 0].sum())


# Domain: the reading of the simulator that pays, and how much noise of size 1 adds to it.
SENSORS: dict[str, tuple[str, Callable[[Any], float]]] = {
    "cheetah": ("speed", lambda physics: 10.0),  # metres per second
    "walker": ("torso_height", lambda physics: 1.2),  # metres
    "reacher": ("finger_to_target_dist", reacher_radius),
}


class NoisyPhysics:
    """A simulator of which one reading is off by a constant."""

    def __init__(self, physics: Any, sensor: str, offset: float):
        self._physics, self._sensor, self._offset = physics, sensor, offset

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._physics, name)
        return (lambda: value() + self._offset) if name == self._sensor else value


class NoisyReward:
    """Stands in for a task's `get_reward`: the task's own function, read through a disturbed sensor."""

    def __init__(self, get_reward: Callable[[Any], float], domain: str):
        self.get_reward, self.domain, self.noise = get_reward, domain, 0.0

    def __call__(self, physics: Any) -> float:
        sensor, scale = SENSORS[self.domain]
        return self.get_reward(NoisyPhysics(physics, sensor, self.noise * scale(physics)))


class NoisySensor(NaturalVideo):
    """A video behind the agent whose brightness disturbs the sensor that the reward is computed from.

    With n = (mean brightness of a patch of the video - 0.5) * mult, the speed of cheetah counts as 10 n faster, the
    torso of walker as 1.2 n higher, the finger of reacher as n times the radius of success farther from the target.
    The patch is a quarter of the image high and wide, an eighth from its upper left corner. A step is disturbed by the
    frame that the agent saw when it acted. Only rewards change, not the motion or the vector of observations.

    Args:
        source: folder made by `scripts/prepare_video.py`, None for moving noise and shapes that are made here.
        split: "train" or "test".
        grayscale: show colour frames in grey.
        loop: "all" or "clip", see `NaturalVideo`.
        num_frames: video frames to use, None for all.
        source_seed: of the frames that are made here.
        replace_floor: whether the floor is background too.
        emit_index: write `distractor_index`.
        emit_mask: leave `mask` in the observations of `envs.make_env`.
        seed: of the random starts.
        mult: strength of the disturbance; 0 for none.

    Reads:
        `pixels` uint8 `[h, w, 3]`; `mask` bool `[h, w, 1]`.

    Writes:
        `pixels`; the base environment pays the disturbed `reward`; `distractor_index` if asked for.

    Raises:
        ValueError: the domain is not cheetah, walker or reacher; as `NaturalVideo`.
        TypeError: the base environment is not one of dm_control's.

    Source: Wang et al. 2022, "Denoised MDPs", appendix B; facebookresearch/denoised_mdp at 1f3b4b3.

    Differs: the video moves on once per agent step, so that the noise is the same for the frames of a step. The vector
        of observations is left undisturbed.
    """

    def __init__(
        self,
        *,
        source: str | None = None,
        split: str = "train",
        grayscale: bool = True,
        loop: str = "all",
        num_frames: int | None = 1000,
        source_seed: int = 0,
        replace_floor: bool = True,
        emit_index: bool = False,
        emit_mask: bool = False,
        seed: int = 0,
        mult: float = 1.0,
    ):
        super().__init__(
            source=source,
            split=split,
            grayscale=grayscale,
            loop=loop,
            num_frames=num_frames,
            source_seed=source_seed,
            replace_floor=replace_floor,
            emit_index=emit_index,
            emit_mask=emit_mask,
            seed=seed,
        )
        self.mult = mult

    @property
    def noise(self) -> float:
        """What the next step is disturbed by, in [-mult / 2, mult / 2]."""
        if self._video is None or self._position is None:
            return 0.0
        frame = self._coloured(self._video.frames[int(self._position)])  # [h, w, C]
        high, wide = frame.shape[0] // 4, frame.shape[1] // 4
        patch = frame[high // 2 : high // 2 + high, wide // 2 : wide // 2 + wide]
        return (float(patch.mean()) / 255 - 0.5) * self.mult

    def _disturb(self) -> None:
        env: Any = self.container
        base, kind = env.base_env, type(env.base_env)
        if not hasattr(kind, "physics"):
            raise TypeError(
                f"{kind.__name__} has no dm_control physics: put NoisySensor on a DMCEnv, inside the function that "
                "each worker of a batched environment calls"
            )
        if base.name not in SENSORS:
            raise ValueError(f"name={base.name!r}: NoisySensor knows the sensors of {', '.join(SENSORS)}")
        task = base._env.task
        if not isinstance(task.get_reward, NoisyReward):
            task.get_reward = NoisyReward(task.get_reward, base.name)
        task.get_reward.noise = self.noise

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        arrived = super()._step(tensordict, next_tensordict)
        self._disturb()
        return arrived

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        arrived = super()._reset(tensordict, tensordict_reset)
        self._disturb()
        return arrived


def translate(images: torch.Tensor, shift: torch.Tensor, mode: str = "bilinear") -> torch.Tensor:
    """Moves images; what comes in from outside is 0.

    Args:
        images: uint8 or bool `[*batch, h, w, C]`.
        shift: pixels to the right and down, `[*batch, 2]`.
        mode: "bilinear" or "nearest".

    Returns:
        as `images`.
    """
    height, width, channels = images.shape[-3:]
    flat = images.reshape(-1, height, width, channels).permute(0, 3, 1, 2).float()  # [N, C, h, w]
    offset = shift.reshape(-1, 2).to(flat)
    rows = torch.arange(height, device=flat.device) - offset[:, 1:]  # [N, h], where each row comes from
    columns = torch.arange(width, device=flat.device) - offset[:, :1]  # [N, w]
    y, x = (2 * rows + 1) / height - 1, (2 * columns + 1) / width - 1
    grid = torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1)
    moved = F.grid_sample(flat, grid, mode=mode, padding_mode="zeros", align_corners=False)
    return moved.permute(0, 2, 3, 1).round().to(images.dtype).reshape(images.shape)


class ImageJitter(Transform):
    """Shifts images by a smooth random walk in the plane, as if the camera's aim trembled.

    With position p, velocity v and time factor s = 0.5, per frame: a = -0.1 p where |p| >= 0.075, otherwise
    0.005 * gaussian; v <- (v + s a) * 0.9**s; p <- p + s v. An episode starts at 0.075 / sqrt(2) * gaussian with a
    velocity of 0.005 * gaussian. The image moves by `mult * p` pixels, with black coming in. It works in each worker
    or on a batched environment outside, whose rows have walks of their own.

    Args:
        mult: pixels per unit; 120 for images of 64 pixels.
        frames_per_step: frames of the walk per agent step, at least 1.
        seed: of the walks.

    Reads:
        `pixels` uint8 `[h, w, 3]`; `mask` bool `[h, w, 1]` if there is one.

    Writes:
        `pixels`, and `mask` if there is one.

    Raises:
        ValueError: `frames_per_step` is below 1.
        KeyError: the environment has no `pixels`.

    Source: Wang et al. 2022, "Denoised MDPs", appendix B; facebookresearch/denoised_mdp at 1f3b4b3.

    Differs: seeded throughout.
    """

    def __init__(self, *, mult: float = 120.0, frames_per_step: int = 2, seed: int = 0):
        super().__init__(in_keys=["pixels"], out_keys=["pixels"])
        check_positive("frames_per_step", frames_per_step)
        self.mult, self.frames_per_step = mult, frames_per_step
        self._place: np.ndarray | None = None  # [*batch, 2]
        self._velocity = np.zeros(2)
        self.set_seed(seed)

    def set_seed(self, seed: int) -> None:
        """Seeds the walks to come."""
        self._random = np.random.default_rng(seed)

    def _advance(self, place: np.ndarray, velocity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One frame of the walks `[*batch, 2]`."""
        noise = self._random.standard_normal(place.shape) * NOISE_STD
        far = np.linalg.norm(place, axis=-1, keepdims=True) >= PULL_RADIUS
        acceleration = np.where(far, -PULL * place, noise)
        velocity = (velocity + acceleration * SPEED_FACTOR) * VELOCITY_DECAY**SPEED_FACTOR
        return place + velocity * SPEED_FACTOR, velocity

    def _shift(self, tensordict: TensorDictBase) -> TensorDictBase:
        pixels = tensordict.get("pixels", None)
        if pixels is None:
            raise KeyError("ImageJitter reads 'pixels', which is missing: put Render() or the like before it")
        shift = torch.from_numpy(np.asarray(self._place) * self.mult)  # [*batch, 2], right and down
        tensordict.set("pixels", translate(pixels, shift))
        mask = tensordict.get("mask", None)
        if mask is not None:
            tensordict.set("mask", translate(mask, shift, "nearest"))
        return tensordict

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        if self._place is None or self._place.shape[:-1] != next_tensordict.batch_size:
            raise RuntimeError(f"ImageJitter: reset the {list(next_tensordict.batch_size)} environments before a step")
        place, velocity = self._place, self._velocity
        for _ in range(self.frames_per_step):
            place, velocity = self._advance(place, velocity)
        moves = tensordict.get("_step", None)  # rows of a batched environment that take this step
        if moves is not None:
            rows = moves.reshape(*place.shape[:-1], 1).numpy(force=True)
            place, velocity = np.where(rows, place, self._place), np.where(rows, velocity, self._velocity)
        self._place, self._velocity = place, velocity
        return self._shift(next_tensordict)

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        shape = (*tensordict_reset.batch_size, 2)
        place = self._random.standard_normal(shape) * PULL_RADIUS / math.sqrt(2)
        velocity = self._random.standard_normal(shape) * NOISE_STD
        reset = tensordict.get("_reset", None)
        if reset is not None and self._place is not None and self._place.shape == shape:
            rows = reset.reshape(*shape[:-1], -1).any(-1, keepdim=True).numpy(force=True)
            place, velocity = np.where(rows, place, self._place), np.where(rows, velocity, self._velocity)
        self._place, self._velocity = place, velocity
        return self._shift(tensordict_reset)

    def clone(self) -> ImageJitter:
        other = super().clone()
        other._random = copy.deepcopy(self._random)
        return other

    def get_extra_state(self) -> torch.Tensor:
        """Walks and generator as the bytes of a JSON text: a loaded environment goes on with the next frame."""
        place = None if self._place is None else self._place.tolist()
        state = {"place": place, "velocity": self._velocity.tolist(), "random": self._random.bit_generator.state}
        return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        values = json.loads(bytes(state.tolist()))
        self._place = None if values["place"] is None else np.array(values["place"])
        self._velocity = np.array(values["velocity"])
        self._random.bit_generator.state = values["random"]


class CameraJitter(Compose):
    """A video behind the agent, and a camera whose aim trembles: `NaturalVideo`, then `ImageJitter`.

    Args:
        source: folder made by `scripts/prepare_video.py`, None for moving noise and shapes that are made here.
        split: "train" or "test".
        grayscale: show colour frames in grey.
        loop: "all" or "clip", see `NaturalVideo`.
        num_frames: video frames to use, None for all.
        source_seed: of the frames that are made here.
        replace_floor: whether the floor is background too.
        emit_index: write `distractor_index`.
        emit_mask: leave `mask` in the observations of `envs.make_env`.
        seed: of the random starts and of the walk.
        mult: see `ImageJitter`.
        frames_per_step: see `ImageJitter`.

    Reads:
        `pixels` uint8 `[h, w, 3]`; `mask` bool `[h, w, 1]`.

    Writes:
        `pixels`, `mask`; `distractor_index` if asked for.

    Raises:
        ValueError: as `NaturalVideo` and `ImageJitter`.

    Source: Wang et al. 2022, "Denoised MDPs", appendix B.
    """

    before_render = False

    def __init__(
        self,
        *,
        source: str | None = None,
        split: str = "train",
        grayscale: bool = True,
        loop: str = "all",
        num_frames: int | None = 1000,
        source_seed: int = 0,
        replace_floor: bool = True,
        emit_index: bool = False,
        emit_mask: bool = False,
        seed: int = 0,
        mult: float = 120.0,
        frames_per_step: int = 2,
    ):
        video = NaturalVideo(
            source=source,
            split=split,
            grayscale=grayscale,
            loop=loop,
            num_frames=num_frames,
            source_seed=source_seed,
            replace_floor=replace_floor,
            emit_index=emit_index,
            emit_mask=emit_mask,
        )
        super().__init__([video, ImageJitter(mult=mult, frames_per_step=frames_per_step)])
        self.set_seed(seed)
        self.render_options, self.emit_mask = video.render_options, emit_mask

    def set_seed(self, seed: int) -> None:
        """Seeds the random starts and the walk."""
        parts: list[Any] = list(self)
        for part, child in zip(parts, np.random.SeedSequence(seed).generate_state(2), strict=True):
            part.set_seed(int(child))

    def describe(self) -> dict[str, Any]:
        """What is played, for the record of a run, see `NaturalVideo.describe`."""
        video: Any = self[0]
        return video.describe()
