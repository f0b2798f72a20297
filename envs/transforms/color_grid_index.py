"""Which of its colours a ColorGrid shows: the index as a function of action, reward and time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

LEVELS = ("max", "reward", "action", "sequence", "action_cross_sequence", "minimum", "random", "none")
USES_ACTION = ("max", "action", "action_cross_sequence")
USES_REWARD = ("max", "reward")
USES_SPLITS = ("action", "action_cross_sequence")
USES_CHANCE = ("minimum", "random")
MOST_COLORS = 11_664  # of the published `max` level: six dimensions in three bins times 16 reward bins
MOST_DIMENSIONS = 6
REWARD_BINS = 16
TOLERANCE = 1e-6  # rounding of a float32 that is no excess

RewardRange = Sequence[float | Sequence[float]]


def action_index(action: np.ndarray, dims: Sequence[int], splits: Sequence[int]) -> np.ndarray:
    """Numbers the box of an action grid that an action lies in.

    Equation: b_d = trunc((a_d + 1 - 1e-6) n_d / 2), i = sum_d b_d prod_{e > d} n_e. Bins are equally wide and closed on
    the right; the first dimension counts most.

    Args:
        action: `[..., A]` in [-1, 1].
        dims: `[D]` dimensions that count.
        splits: `[D]` bins of each.

    Returns:
        int64 `[...]` in [0, prod(splits)).
    """
    picked, counts, weights = _radix(tuple(dims), tuple(splits))
    bins = ((action[..., picked].astype(np.float64) + 1 - 1e-6) * counts / 2).astype(np.int64)  # [..., D]
    return bins @ weights


@lru_cache
def _radix(dims: tuple[int, ...], splits: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Dimensions, bins and place values as arrays, made once: three times `[D]`."""
    places = [math.prod(splits[place + 1 :]) for place in range(len(splits))]
    return np.array(dims), np.array(splits), np.array(places)


def divide_colors(entries: int, points: int, colors: int) -> list[int]:
    """Divides colours among intervals: `colors // entries - points` for each, what is left one by one from the first.

    Args:
        entries: number of intervals, at least 1.
        points: number of single rewards, which have a colour each.
        colors: colours to divide, those of the points included.
    """
    each = colors // entries - points
    rest = colors - points - each * entries
    return [each + rest // entries + (index < rest % entries) for index in range(entries)]


@dataclass(frozen=True)
class RewardBins:
    """Numbers the bin of a reward.

    The entries of a range are points and intervals in order. Each point has one bin, the intervals share the others.
    Equation in an interval: i = start + min(trunc((r - lo) n / (hi - lo)), n - 1). A reward outside of all entries
    counts as the nearest one that is inside.

    Args:
        lows: `[E]` lower ends.
        highs: `[E]` upper ends, those of points equal to the lower ones.
        counts: `[E]` bins of each entry.

    Differs: the published code has no clamp, so that a reward at the top has an index that does not exist.
    """

    lows: tuple[float, ...]
    highs: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def divide(cls, reward_range: RewardRange, colors: int, scale: float = 1.0) -> RewardBins:
        """Gives every entry of a range its bins.

        Args:
            reward_range: points and (low, high) intervals.
            colors: bins in all, at least as many as entries.
            scale: factor of all ends.
        """
        ends = [entry if isinstance(entry, Sequence) else (entry, entry) for entry in reward_range]
        for end in ends:
            if len(end) != 2 or not all(math.isfinite(value) for value in end) or end[0] > end[1]:
                raise ValueError(f"reward_range={reward_range}: give numbers and pairs (low, high), not {end}")
        inner = [low < high for low, high in ends]
        shares = iter(divide_colors(sum(inner), len(ends) - sum(inner), colors) if any(inner) else ())
        counts = tuple(next(shares) if interval else 1 for interval in inner)
        lows, highs = zip(*ends, strict=True) if ends else ((), ())
        return cls(tuple(low * scale for low in lows), tuple(high * scale for high in highs), counts)

    def __call__(self, reward: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The bin of each reward and whether it is outside of all entries: int64 `[...]`, bool `[...]`."""
        reward = np.asarray(reward, dtype=np.float64)
        index = np.zeros(reward.shape, dtype=np.int64)
        nearest = np.full(reward.shape, np.inf)
        start = 0
        for low, high, count in zip(self.lows, self.highs, self.counts, strict=True):
            inside = reward.clip(low, high)
            distance = np.abs(reward - inside)
            bins = ((inside - low) * count / (high - low)).astype(np.int64) if high > low else 0
            index = np.where(distance < nearest, start + np.minimum(bins, count - 1), index)
            nearest = np.minimum(distance, nearest)
            start += count
        return index, nearest > TOLERANCE * max(1.0, *map(abs, self.lows + self.highs))


@dataclass(frozen=True)
class GridIndex:
    """The index of a level, where action, reward and time determine it.

    Equations, with i_a and P from `action_index`, i_r from `RewardBins`, K colours and S = K / P:
    max i_r P + i_a; reward i_r; action i_a; sequence t mod K; action_cross_sequence S i_a + t mod S.

    Args:
        level: one of `LEVELS`.
        num_colors: K.
        dims: `[D]` action dimensions that count, ascending.
        splits: `[D]` bins of each.
        reward_bins: of the levels that use the reward.
    """

    level: str
    num_colors: int
    dims: tuple[int, ...] = ()
    splits: tuple[int, ...] = ()
    reward_bins: RewardBins | None = None

    def __call__(
        self, action: np.ndarray | None, reward: np.ndarray | None, t: np.ndarray | int
    ) -> tuple[np.ndarray, np.ndarray | bool]:
        """The index of a frame.

        Args:
            action: `[..., A]` in [-1, 1], the one that led to the frame.
            reward: `[...]` of the same transition, summed over its simulator frames.
            t: `[...]` frames of the episode before this one, 0 at a reset.

        Returns:
            The index, int64 `[...]` in [0, K), and whether the reward was out of range, bool `[...]`.
        """
        outside: np.ndarray | bool = False
        index = np.asarray(t % self.num_colors)
        if self.level in USES_ACTION and action is not None:
            index = action_index(action, self.dims, self.splits)
        if self.level == "action_cross_sequence":
            period = self.num_colors // math.prod(self.splits)
            index = period * index + t % period
        if self.reward_bins is not None and reward is not None:
            reward_index, outside = self.reward_bins(reward)
            index = reward_index * math.prod(self.splits) + index if self.level == "max" else reward_index
        return index, outside


def choose_dims(
    dims: Sequence[int] | None, power: int | None, splits: Sequence[int] | None, action_size: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The action dimensions that count, ascending, and the bins of each.

    Args:
        dims: None for the first ones: as many as there are splits, else six at most.
        power: bins of every dimension; None for 3 where there are no splits.
        splits: bins of each dimension.
        action_size: dimensions of the action.
    """
    if power is not None and splits is not None:
        raise ValueError(f"action_power={power}, action_splits={list(splits)}: give one of them")
    if dims is None:
        dims = range(len(splits) if splits is not None else min(action_size, MOST_DIMENSIONS))
    dims = list(dims)
    if not dims or len(set(dims)) != len(dims) or not all(0 <= dim < action_size for dim in dims):
        raise ValueError(f"action_dims_to_split={dims}: give different dimensions from 0 to {action_size - 1}")
    if splits is None:
        splits = [3 if power is None else power] * len(dims)
    elif dims != sorted(dims):
        raise ValueError(f"action_dims_to_split={dims}: give dimensions in ascending order beside action_splits")
    if len(splits) != len(dims):
        raise ValueError(f"action_splits={list(splits)}: give {len(dims)}, one for each of dimensions {dims}")
    if not all(isinstance(count, int) and count >= 1 for count in splits):
        raise ValueError(f"action_splits={list(splits)}: give whole numbers of at least 1")
    return tuple(sorted(dims)), tuple(splits)


def choose_num_colors(level: str, num_colors: int | None, boxes: int) -> int:
    """The number of colours of a level; None for one that fits.

    Args:
        level: one of `LEVELS`.
        num_colors: the number that was asked for.
        boxes: P, the number of boxes of the action grid, 1 where the action does not count.
    """
    if num_colors is None:
        fitting = {"max": REWARD_BINS, "action": 1, "action_cross_sequence": max(2, MOST_COLORS // boxes)}
        return fitting[level] * boxes if level in fitting else MOST_COLORS
    if level == "action":
        fits, rule = num_colors == boxes, f"exactly {boxes}"
    elif level == "max":
        fits, rule = num_colors >= boxes and num_colors % boxes == 0, f"a multiple of {boxes}"
    elif level == "action_cross_sequence":
        fits, rule = num_colors >= 2 * boxes and num_colors % boxes == 0, f"a multiple of {boxes}, at least {2 * boxes}"
    else:
        least = 1 if level in ("reward", "none") else 2
        fits, rule = num_colors >= least, f"at least {least}"
    if not fits:
        reason = f", because the action grid has {boxes} boxes" if level in USES_ACTION else ""
        raise ValueError(f"num_colors_per_cell={num_colors}: level={level!r} needs {rule}{reason}")
    return num_colors


def choose_reward_bins(level: str, reward_range: RewardRange, colors: int, scale: float) -> RewardBins:
    """The bins of the reward.

    Args:
        level: "max" or "reward".
        reward_range: points and (low, high) intervals, per simulator frame.
        colors: bins in all.
        scale: factor of the range.
    """
    intervals = sum(isinstance(entry, Sequence) and entry[0] != entry[-1] for entry in reward_range)
    points = len(reward_range) - intervals
    least = points + intervals if level == "max" else 2 * intervals + points
    what = f"reward_range={list(reward_range)}: {points} points and {intervals} intervals"
    if not reward_range or (level == "reward" and not intervals and points < 2):
        raise ValueError(f"{what}, level={level!r} needs an interval or two points")
    if colors < least or (not intervals and colors != points):
        needed = f"exactly {points}" if not intervals else f"at least {least}"
        raise ValueError(f"{what} need {needed} reward bins, there are {colors}: change num_colors_per_cell")
    return RewardBins.divide(reward_range, colors, scale)
