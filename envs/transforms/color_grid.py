"""A grid of coloured cells behind the agent, which depends on its action, its reward and the time."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Composite
from torchrl.envs import Transform
from torchrl.envs.batched_envs import BatchedEnvBase

from envs.choices import check_choice, check_positive
from envs.transforms.color_grid_index import (
    LEVELS,
    TOLERANCE,
    USES_ACTION,
    USES_CHANCE,
    USES_REWARD,
    USES_SPLITS,
    GridIndex,
    RewardRange,
    choose_dims,
    choose_num_colors,
    choose_reward_bins,
)
from envs.transforms.color_grid_table import load_table
from envs.transforms.masks import chroma_mask, paste_foreground_

MASKS = ("segmentation", "chroma")
RESET_MODES = ("zero", "random")


class ColorGrid(Transform):
    """Replaces the background by a grid of colours.

    Every cell of the grid has K colours, drawn once. Which of them the cells show in a frame is an index in [0, K):
    `max` depends on the last action and reward, `reward`, `action` and `sequence` (the time) on one thing,
    `action_cross_sequence` on action and time; `minimum` draws the index at random, `random` draws one for each cell,
    `none` leaves the image as it is. Equations: `GridIndex`. The pixel in row y is in row min(y // (h // N), N - 1) of
    the grid, columns likewise.

    It works on one environment and on a batched one, inside and outside of its workers, and needs no other part of
    this package. Its random numbers are its own: `set_seed` starts them anew.

    Args:
        level: "max", "reward", "action", "sequence", "action_cross_sequence", "minimum", "random" or "none".
        num_cells_per_dim: N, cells per side, at most the height and the width in pixels.
        num_colors_per_cell: K; None for one that fits the level and makes a table of at most 9 MB, where possible.
        action_dims_to_split: dimensions of the action that count; None for the first six at most.
        action_power: bins per dimension; None for 3, unless `action_splits` are given.
        action_splits: bins of each dimension, in ascending order of dimensions; for the levels "action" and
            "action_cross_sequence".
        reward_range: rewards of one simulator frame, a list of numbers and of pairs (low, high). None for what the
            environment says in `frame_rewards`.
        reward_scale: what to multiply `reward_range` by; None for the `frame_skip` of the environment.
        reset_mode: the first frame of an episode: "zero" as after action 0 and reward 0, "random" with a colour of its
            own for each cell.
        mask: what is background: "segmentation" where the key `mask` is False, "chroma" what is bluer than red or
            green.
        replace_floor: whether the floor is background, where `envs.make_env` has the mask made.
        emit_index: write `distractor_index`.
        emit_mask: leave `mask` in the observation, where `envs.make_env` has it made, or write that of "chroma".
        clip_action: take what lies outside [-1, 1] for the bound, instead of refusing it. None for what the environment
            does with it, if it says so in `clips_action`.
        table_seed: seed of the colours, in [0, 2**32), the same for training and evaluation.
        seed: of the levels "minimum" and "random" and the reset mode "random".

    Attributes:
        rewards_out_of_range: number of frames whose reward was outside of the range and counted as the nearest.

    Reads:
        `pixels` uint8 `[h, w, 3]`, `mask` bool `[h, w, 1]` (True on the foreground), `action` `[A]` in [-1, 1] and
        `reward` `[1]` of the step that led to the image.

    Writes:
        `pixels`. On request `distractor_index` int64 `[1]`, -1 for frames with an index for each cell; `mask`.

    Raises:
        ValueError: an option that does not exist or does not fit the others, the environment or the image; an action
            outside [-1, 1].
        KeyError: there is no `pixels` or no `mask`.

    Source: psp-neurips-2024/psp_camera_ready at 3ba6f32, `wrappers/color_grid_utils.py`.

    Differs: random numbers of its own, one table per machine, rewards at the top and out of range have a bin.
    """

    before_render = False

    def __init__(
        self,
        level: str = "max",
        *,
        num_cells_per_dim: int = 16,
        num_colors_per_cell: int | None = None,
        action_dims_to_split: Sequence[int] | None = None,
        action_power: int | None = None,
        action_splits: Sequence[int] | None = None,
        reward_range: RewardRange | None = None,
        reward_scale: float | None = None,
        reset_mode: str = "zero",
        mask: str = "segmentation",
        replace_floor: bool = True,
        emit_index: bool = False,
        emit_mask: bool = False,
        clip_action: bool | None = None,
        table_seed: int = 1,
        seed: int = 0,
    ):
        check_choice("level", level, LEVELS)
        check_choice("reset_mode", reset_mode, RESET_MODES)
        check_choice("mask", mask, MASKS)
        check_positive("num_cells_per_dim", num_cells_per_dim)
        if num_colors_per_cell is not None:
            check_positive("num_colors_per_cell", num_colors_per_cell)
        if action_splits is not None and level not in USES_SPLITS:
            raise ValueError(f"action_splits={list(action_splits)}: level={level!r} takes action_power only")
        super().__init__(in_keys=["pixels"], out_keys=["pixels"])
        self.level, self.reset_mode, self.mask = level, reset_mode, mask
        self.emit_index, self.emit_mask = emit_index, emit_mask
        self.render_options: dict[str, Any] = {}
        if mask == "segmentation" and (level != "none" or emit_mask):
            self.render_options = {"mask": True, "replace_floor": replace_floor}
        self._cells, self._num_colors, self._table_seed = num_cells_per_dim, num_colors_per_cell, table_seed
        self._choose_dims = partial(choose_dims, action_dims_to_split, action_power, action_splits)
        self._reward_range, self._reward_scale = reward_range, reward_scale
        self._clip_action = self._clips = clip_action
        self.rewards_out_of_range = 0
        self._index: GridIndex | None = None
        self._zero_action = np.zeros(0)
        self._t: np.ndarray | int = 0
        self._lookups: dict[Any, Any] = {}
        self.set_seed(seed)

    def set_seed(self, seed: int) -> None:
        """Seeds what is random: not the colours, but which of them are shown."""
        self._generator = np.random.default_rng(seed)

    # What the environment decides: the actions that there are and the rewards.

    def _attach(self) -> GridIndex:
        """Fits the index to the environment, when it is first needed."""
        if self._index is None:
            env: Any = self.container
            base, dims, splits, bins = env.base_env, (), (), None
            alone = not isinstance(base, BatchedEnvBase)  # else attributes are those of the workers
            self._clips = self._clip_action
            if self._clips is None:
                self._clips = bool(alone and getattr(base, "clips_action", False))
            if self.level in USES_ACTION:
                spec = base.action_spec
                if not spec.dtype.is_floating_point or spec.ndim == base.ndim:
                    raise ValueError(f"level={self.level!r}: needs actions in [-1, 1], the environment has {spec}")
                dims, splits = self._choose_dims(spec.shape[-1])
                self._zero_action = np.zeros(spec.shape)
            boxes = math.prod(splits)
            colors = choose_num_colors(self.level, self._num_colors, boxes)
            if self.level in USES_REWARD:
                entries = self._reward_range
                if entries is None and alone:
                    entries = getattr(base, "frame_rewards", None)
                if entries is None:
                    raise ValueError(
                        f"level={self.level!r}: nothing is known of the rewards of this {type(base).__name__}, give "
                        "reward_range, for example [[0, 1]]"
                    )
                scale = self._reward_scale
                if scale is None:
                    scale = float(getattr(base, "frame_skip", None) or 1) if alone else 1.0
                bins = choose_reward_bins(self.level, entries, colors // boxes, scale)
            self._index = GridIndex(self.level, colors, dims, splits, bins)
        return self._index

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        wanted, keys = (
            ["pixels"] + ["mask"] * (self.mask == "segmentation" and self.level != "none"),
            set(observation_spec.keys()),
        )
        for key in wanted:
            if key not in keys:
                raise KeyError(
                    f"no {key!r} among {sorted(keys)}: put ColorGrid behind what makes it"
                    + (", for example envs.Render(mask=True), or use mask='chroma'" if key == "mask" else "")
                )
        spec = observation_spec["pixels"]
        self._check_image(spec.dtype, spec.shape)
        index, shape, device = self._attach(), observation_spec.shape, observation_spec.device
        if self.emit_index:
            observation_spec["distractor_index"] = Bounded(
                -1, index.num_colors - 1, torch.Size((*shape, 1)), dtype=torch.int64, device=device
            )
        if self.emit_mask and self.mask == "chroma":
            mask_shape = torch.Size((*spec.shape[:-1], 1))
            observation_spec["mask"] = Binary(shape=mask_shape, dtype=torch.bool, device=device)
        return observation_spec

    def _check_image(self, dtype: torch.dtype, shape: torch.Size) -> None:
        if dtype != torch.uint8 or shape[-1] != 3 or min(shape[-3:-1]) < self._cells:
            raise ValueError(
                f"pixels {dtype} {list(shape)}: give uint8 [h, w, 3] with at least "
                f"num_cells_per_dim={self._cells} rows and columns"
            )

    # What happens in a step.

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        index, moves = self._attach(), tensordict.get("_step", None)  # [...], rows of a batch that take this step
        self._t = self._t + (1 if moves is None else moves.view(next_tensordict.batch_size).numpy(force=True))
        action = reward = None
        if self.level in USES_ACTION:
            action = self._checked(tensordict.get("action").numpy(force=True))  # [..., A]
        if self.level in USES_REWARD:
            reward = next_tensordict.get("reward").squeeze(-1).numpy(force=True)  # [...]
        return self._draw(next_tensordict, index, action, reward)

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        index, rows = self._attach(), tensordict_reset.batch_size
        reset = None if tensordict is None else tensordict.get("_reset", None)
        if reset is None or not rows:
            self._t = np.zeros(rows, dtype=np.int64) if rows else 0
        else:
            self._t = np.where(reset.view(rows).numpy(force=True), 0, self._t)
        # Every row is drawn as a first frame: TorchRL keeps the old images of the rows that go on.
        if self.reset_mode == "random" and self.level != "none":
            return self._draw(tensordict_reset, index, cells=True)
        return self._draw(tensordict_reset, index, self._zero_action, np.zeros(rows), first=True)

    def _checked(self, action: np.ndarray) -> np.ndarray:
        largest = float(np.abs(action).max())
        if not largest <= 1:
            if math.isnan(largest) or (largest > 1 + TOLERANCE and not self._clips):
                raise ValueError(
                    f"action={action.tolist()}: outside [-1, 1]; scale the actions of the environment to it, or use "
                    "clip_action=True where the environment clips them"
                )
            action = action.clip(-1, 1)
        return action

    def _draw(
        self,
        tensordict: TensorDictBase,
        index: GridIndex,
        action: np.ndarray | None = None,
        reward: np.ndarray | None = None,
        *,
        first: bool = False,
        cells: bool = False,
    ) -> TensorDictBase:
        """Draws the grid behind the agent: one index per row, or one per cell."""
        rows, cells = tensordict.batch_size, cells or self.level == "random"
        pixels = tensordict.get("pixels")
        if self.level == "none":
            chosen = np.full(rows, -1)
        elif cells:
            chosen = self._generator.integers(index.num_colors, size=(*rows, self._cells, self._cells))
        elif self.level in USES_CHANCE:
            chosen = self._generator.integers(index.num_colors, size=rows)
        else:
            t = np.zeros(rows, dtype=np.int64) if first else self._t
            chosen, outside = index(action, reward, t)
            self.rewards_out_of_range += 0 if first else int(np.sum(outside))
        mask = tensordict.get("mask") if self.mask == "segmentation" and self.level != "none" else None
        if mask is None and (self.level != "none" or (self.emit_mask and self.mask == "chroma")):
            mask = chroma_mask(pixels)  # [..., h, w, 1]
        if self.level != "none" and mask is not None:
            background = self._background(index, chosen, cells, pixels)  # [..., h, w, 3]
            tensordict.set("pixels", paste_foreground_(background, pixels, mask))
        if self.emit_mask and self.mask == "chroma":
            tensordict.set("mask", mask)
        if self.emit_index:
            shown = np.full(rows, -1) if cells else np.broadcast_to(chosen, tuple(rows))
            shown = torch.tensor(shown, dtype=torch.int64, device=pixels.device)
            tensordict.set("distractor_index", shown.unsqueeze(-1))  # [..., 1]
        return tensordict

    def _background(self, index: GridIndex, chosen: np.ndarray, cells: bool, pixels: Tensor) -> Tensor:
        """The grid as an image, in memory of its own: uint8 `[..., h, w, 3]`."""
        table, down, across, scratch = self._lookup(index, pixels)
        if pixels.device.type == "cpu":
            tiles = table[(chosen, *_grid(self._cells))] if cells else table[chosen]  # [..., N, N, 3]
            if pixels.ndim > 3:
                return torch.from_numpy(tiles.take(across, -2).take(down, -3))
            tiles.take(across, 1, out=scratch, mode="clip")  # [N, w, 3]
            image = np.empty(pixels.shape, dtype=np.uint8)
            return torch.from_numpy(scratch.take(down, 0, out=image, mode="clip"))
        where = torch.as_tensor(chosen, device=pixels.device)
        if cells:
            rows, columns = (torch.as_tensor(axis, device=pixels.device) for axis in _grid(self._cells))
            tiles = table[where, rows, columns]
        else:
            tiles = table[where]
        return tiles.index_select(-2, across).index_select(-3, down)

    def _lookup(self, index: GridIndex, pixels: Tensor) -> tuple:
        """The table, the cells of the rows and columns of pixels and memory for a stretched tile, made once."""
        key = (pixels.shape[-3], pixels.shape[-2], pixels.device)
        if key not in self._lookups:
            self._check_image(pixels.dtype, pixels.shape)
            height, width, device = key
            table = load_table(self._table_seed, self._cells, index.num_colors)
            down, across = (np.minimum(np.arange(n) // (n // self._cells), self._cells - 1) for n in (height, width))
            scratch = np.empty((self._cells, width, 3), dtype=np.uint8)
            if device.type != "cpu":
                table, down, across = (torch.as_tensor(x.copy(), device=device) for x in (table, down, across))
            self._lookups[key] = (table, down, across, scratch)
        return self._lookups[key]

    # What is kept between processes and runs.

    def clone(self) -> ColorGrid:
        """A copy for another environment, with random numbers of its own that go on from the same state."""
        copy: Any = super().clone()
        copy._generator, copy._lookups, copy._index = deepcopy(self._generator), {}, None
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_lookups": {}}  # the table is mapped again from its file

    def get_extra_state(self) -> Tensor:
        """Time and random numbers, so that the next frame is the same after loading: uint8 `[n]`, JSON."""
        state = {"t": np.asarray(self._t).tolist(), "generator": self._generator.bit_generator.state}
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes over the state of `get_extra_state`."""
        content = json.loads(bytes(state.tolist()))
        self._t = content["t"] if isinstance(content["t"], int) else np.asarray(content["t"])
        self._generator.bit_generator.state = content["generator"]


def _grid(cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each cell: `[N, 1]`, `[1, N]`."""
    return np.arange(cells)[:, None], np.arange(cells)[None, :]
