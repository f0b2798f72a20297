"""Video frames behind the agent."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.data import Binary, Bounded, Composite
from torchrl.envs import Transform

from envs.choices import check_choice
from envs.transforms.masks import chroma_mask, paste_foreground_
from envs.transforms.video_sources import SPLITS, Video, open_folder, open_procedural, to_grey

LOOPS = ("all", "clip")
MASKS = ("segmentation", "chroma")


class NaturalVideo(Transform):
    """Replaces the background by the frames of a video: one per agent step, from a new random start in each episode.

    A frame after step t is followed by the next one after step t + 1. The frames are mapped from a file, so that the
    workers of a machine share them; on a GPU the transform copies the whole array there. It works in each worker or on
    a batched environment outside, whose rows have positions of their own.

    Args:
        source: folder made by `scripts/prepare_video.py`, None for moving noise and shapes that are made here.
        split: "train" or "test"; the two never share a clip.
        grayscale: show colour frames in grey.
        loop: "all" to go on to the next clip and start again after the last one, "clip" to stay in the clip of the
            random start; then every clip is as likely as the others, whatever its length.
        num_frames: video frames to use, the first ones of the split; None for all, or for 1000 made here.
        source_seed: of the frames that are made here, at least 0.
        mask: "segmentation" for the mask that the environment draws, "chroma" for the published rule of colours, see
            `envs.transforms.masks.chroma_mask`.
        replace_floor: whether the floor is background in the mask that the environment draws.
        emit_index: write `distractor_index`.
        emit_mask: `mask` is in the observations of `envs.make_env`.
        seed: of the random starts.

    Reads:
        `pixels` uint8 `[h, w, 3]`; `mask` bool `[h, w, 1]`, True on the pixels to keep, unless `mask="chroma"`.

    Writes:
        `pixels`; if asked for `distractor_index` int64 `[1]`, the position of the frame in the array of the source, and
        `mask` where it comes from the colours.

    Raises:
        ValueError: an option does not exist; the folder is damaged, or its frames are not of the size of `pixels` or
            are grey where colour is asked for; `pixels` or `mask` are of another type.
        KeyError: the environment has no `pixels` or no `mask`.
        RuntimeError: a step before the first reset.

    Source: the background videos of Zhang et al. 2021 (DBC), Fu et al. 2021 (TIA); `loop="clip"` as in Deng et al. 2022
        (DreamerPro).

    Differs: the mask comes from the simulator by default; starts are drawn by a generator of its own.
    """

    before_render = False

    def __init__(
        self,
        *,
        source: str | None = None,
        split: str = "train",
        grayscale: bool = False,
        loop: str = "all",
        num_frames: int | None = None,
        source_seed: int = 0,
        mask: str = "segmentation",
        replace_floor: bool = True,
        emit_index: bool = False,
        emit_mask: bool = False,
        seed: int = 0,
    ):
        chroma = mask == "chroma"
        in_keys, out_keys = ["pixels"] if chroma else ["pixels", "mask"], ["pixels"]
        out_keys += (["distractor_index"] if emit_index else []) + (["mask"] if chroma and emit_mask else [])
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        check_choice("mask", mask, MASKS)
        check_choice("split", split, SPLITS)
        check_choice("loop", loop, LOOPS)
        self.source, self.split, self.grayscale, self.loop = source, split, grayscale, loop
        self.num_frames, self.source_seed = num_frames, source_seed
        self.emit_mask = emit_mask
        self.render_options = {} if chroma else {"mask": True, "replace_floor": replace_floor}
        self._video: Video | None = None
        self._on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._position: torch.Tensor | None = None  # int64 [*batch], of the frame on show
        self.set_seed(seed)
        if source is not None:
            self._open(None)

    def set_seed(self, seed: int) -> None:
        """Seeds the random starts of the episodes to come; the frames stay the same."""
        self._random = np.random.default_rng(seed)

    def describe(self) -> dict[str, Any]:
        """What is played, for the record of a run: source, split, number of clips and frames, sha256 of a folder.

        Raises:
            ValueError: the size of frames that are made here is unknown before the environment has drawn an image.
        """
        if self._video is None:
            raise ValueError("source=None: made when the first image is drawn, reset the environment before describe()")
        return dict(self._video.description)

    def _open(self, size: tuple[int, int] | None) -> Video:
        if self._video is None:
            if self.source is not None:
                self._video = open_folder(self.source, split=self.split, num_frames=self.num_frames)
            else:
                assert size is not None
                options = {"seed": self.source_seed, "split": self.split, "num_frames": self.num_frames}
                self._video = open_procedural(size=size, **options)
        height, width, channels = self._video.frames.shape[1:]
        if channels == 1 and not self.grayscale:
            raise ValueError(f"grayscale=False: {self.source} holds grey frames, set grayscale=True or prepare it anew")
        if size is not None and (height, width) != size:
            asked = f"image_size {size[0]}x{size[1]}"
            if self.source is None:
                raise ValueError(f"{asked}: one NaturalVideo serves one size, this one {height}x{width}; make another")
            raise ValueError(
                f"source={self.source!r}: frames of {height}x{width} pixels for {asked}; prepare the clips with "
                f"scripts/prepare_video.py --size {size[0]} {size[1]} or change image_size"
            )
        return self._video

    def _tables(self, video: Video, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What follows each frame, int64 `[F]`, and on a GPU the frames themselves."""
        if device not in self._on_device:
            following = np.arange(1, len(video.frames) + 1)
            if self.loop == "clip":
                following[video.clips.sum(1) - 1] = video.clips[:, 0]
            else:
                following[video.clips.sum(1) - 1] = np.roll(video.clips[:, 0], -1)
            frames = None
            if device.type != "cpu":
                frames = torch.empty((*video.frames.shape[:3], 3), dtype=torch.uint8)
                for frame, target in zip(video.frames, frames.numpy(), strict=True):
                    target[:] = self._coloured(frame)
                frames = frames.to(device)  # [F, h, w, 3]
            self._on_device[device] = torch.from_numpy(following).to(device), frames
        return self._on_device[device]

    def _draw_starts(self, video: Video, shape: torch.Size) -> torch.Tensor:
        """Random positions, int64 `[*batch]`."""
        first, counts = video.clips.T
        if self.loop == "clip":
            clip = self._random.integers(len(counts), size=shape)
            start = first[clip] + self._random.integers(counts[clip])
        else:
            ends = counts.cumsum()
            start = self._random.integers(ends[-1], size=shape)
            clip = np.searchsorted(ends, start, side="right")
            start = first[clip] + start - (ends - counts)[clip]
        return torch.as_tensor(start, dtype=torch.int64)

    def _coloured(self, frames: np.ndarray) -> np.ndarray:
        """uint8 `[..., h, w, 3]` in the colours to show."""
        if not self.grayscale:
            return frames
        grey = frames if frames.shape[-1] == 1 else to_grey(frames)
        shown = np.empty((*grey.shape[:-1], 3), dtype=np.uint8)
        for channel in range(3):  # twice as fast as a broadcast
            shown[..., channel] = grey[..., 0]
        return shown

    def _show(self, video: Video, tensordict: TensorDictBase, pixels: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Puts the frames of the current positions behind the agent."""
        position = self._position
        assert position is not None
        if mask is None:
            mask = chroma_mask(pixels)
        frames = self._tables(video, position.device)[1]
        if frames is None:  # copies, which the next step does not change
            shown = torch.from_numpy(self._coloured(video.frames.take(position.numpy(), axis=0)))
        else:
            shown = frames[position]
        tensordict.set("pixels", paste_foreground_(shown, pixels, mask))  # [*batch, h, w, 3]
        if "distractor_index" in self.out_keys:
            tensordict.set("distractor_index", position[..., None].clone())  # [*batch, 1]
        if "mask" in self.out_keys:
            tensordict.set("mask", mask)  # [*batch, h, w, 1]

    def _read(self, tensordict: TensorDictBase | Composite) -> tuple[Any, Any]:
        """The images and the mask, or their specs; no mask where it comes from the colours."""
        found: list[Any] = [tensordict.get(key, None) for key in self.in_keys]
        for key, value in zip(self.in_keys, found, strict=True):
            if value is None:
                fix = "Render()" if key == "pixels" else "Render(mask=True)"
                raise KeyError(f"NaturalVideo reads {key!r}, which is missing: put {fix} or the like before it")
        if found[0].dtype != torch.uint8 or found[0].shape[-1] != 3:
            shape = list(found[0].shape)
            raise ValueError(f"pixels of {found[0].dtype} {shape}: NaturalVideo reads uint8 [h, w, 3], put it earlier")
        if len(found) == 1:
            return found[0], None
        if found[1].dtype != torch.bool:
            raise ValueError(f"mask of {found[1].dtype}: NaturalVideo reads a bool mask, True on the pixels to keep")
        return found[0], found[1]

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        pixels, mask = self._read(next_tensordict)
        video, position = self._open((pixels.shape[-3], pixels.shape[-2])), self._position
        if position is None or position.shape != next_tensordict.batch_size:
            raise RuntimeError(f"NaturalVideo: reset the {list(next_tensordict.batch_size)} environments before a step")
        position = position.to(pixels.device)
        following = self._tables(video, position.device)[0][position]
        moves = tensordict.get("_step", None)  # rows of a batched environment that take this step
        if moves is not None:
            following = torch.where(moves.view(following.shape).to(position.device), following, position)
        self._position = following
        self._show(video, next_tensordict, pixels, mask)
        return next_tensordict

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        pixels, mask = self._read(tensordict_reset)
        video, position = self._open((pixels.shape[-3], pixels.shape[-2])), self._position
        starts = self._draw_starts(video, tensordict_reset.batch_size).to(pixels.device)
        reset = tensordict.get("_reset", None)
        if reset is not None and position is not None and position.shape == starts.shape:
            goes_on = ~reset.to(starts.device).view(*starts.shape, -1).any(-1)
            starts = torch.where(goes_on, position.to(starts.device), starts)
        self._position = starts
        self._show(video, tensordict_reset, pixels, mask)
        return tensordict_reset

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        (pixels, _), batch, device = self._read(observation_spec), observation_spec.shape, observation_spec.device
        last = len(self._open((pixels.shape[-3], pixels.shape[-2])).frames) - 1
        if "distractor_index" in self.out_keys:
            shape = torch.Size((*batch, 1))
            observation_spec["distractor_index"] = Bounded(0, last, shape=shape, dtype=torch.int64, device=device)
        if "mask" in self.out_keys:
            shape = torch.Size((*pixels.shape[:-1], 1))
            observation_spec["mask"] = Binary(shape=shape, dtype=torch.bool, device=device)
        return observation_spec

    def get_extra_state(self) -> torch.Tensor:
        """Position and generator as the bytes of a JSON text: a loaded environment goes on with the next frame."""
        position = None if self._position is None else self._position.tolist()
        state = {"position": position, "random": self._random.bit_generator.state}
        return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        values = json.loads(bytes(state.tolist()))
        position = values["position"]
        self._position = None if position is None else torch.tensor(position, dtype=torch.int64)
        self._random.bit_generator.state = values["random"]

    def clone(self) -> NaturalVideo:
        other = super().clone()
        other._random, other._on_device = copy.deepcopy(self._random), {}
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_video": None, "_on_device": {}}  # mapped again where it arrives
