"""Statistics of scores: a run's score at a number of frames, interquartile means, bootstrap intervals.

Source: Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice": the interquartile
    mean over tasks and seeds, and the stratified bootstrap.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import trim_mean

Scores = Mapping[str, Sequence[float]]  # task -> one score per seed


class Run(NamedTuple):
    """One learning curve.

    Args:
        task: Name with its benchmark in front.
        method: Agent, with `@` and a distraction if there was one.
        seed: Of the run.
        xs: Frames, ascending.
        ys: Returns, one for each of `xs`.
    """

    task: str
    method: str
    seed: int
    xs: list[int]
    ys: list[float]


class Estimate(NamedTuple):
    """A statistic and its interval; the bounds are NaN where one seed per task leaves nothing to resample."""

    value: float
    low: float
    high: float


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean over the last axis: a quarter of the values, rounded down, is cut off at either end.

    Args:
        scores: [..., N].

    Returns:
        [...]; of fewer than four values it is the mean.
    """
    return trim_mean(scores, 0.25, axis=-1)


def resample(strata: Sequence[Sequence[float]], resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Draw with replacement within every stratum, as many as it has.

    Returns:
        [resamples, N], N values of all strata side by side.
    """
    draws = []
    for stratum in strata:
        values = np.asarray(stratum, dtype=float)
        draws.append(values[generator.integers(len(values), size=(resamples, len(values)))])
    return np.concatenate(draws, axis=1)


def estimate_iqm(scores: Scores, *, resamples: int = 2000, level: float = 0.95, seed: int = 0) -> Estimate:
    """Interquartile mean over all tasks and seeds, with a stratified bootstrap interval: seeds within their task.

    Args:
        scores: Scores of the seeds of each task, at least one task.
        resamples: Number of bootstrap samples.
        level: Of the percentile interval.
        seed: Of the generator.
    """
    strata = list(scores.values())
    value = float(iqm(np.concatenate([np.asarray(stratum, dtype=float) for stratum in strata])))
    if max(map(len, strata)) < 2:
        return Estimate(value, math.nan, math.nan)
    samples = iqm(resample(strata, resamples, np.random.default_rng(seed)))
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))


def score_at(run: Run, frames: int, window: float) -> float | None:
    """The score of a run: its mean return in the last part of `frames`.

    Args:
        run: The curve.
        frames: Where it is read.
        window: Share of `frames` before that point that is averaged over.

    Returns:
        The mean in ((1 - window) * frames, frames], an interpolation if there is no point in it, None if the run
        ends before it or begins after it.
    """
    if not run.xs or run.xs[-1] <= (1 - window) * frames or run.xs[0] > frames:
        return None
    inside = [y for x, y in zip(run.xs, run.ys, strict=True) if (1 - window) * frames < x <= frames]
    return float(np.mean(inside)) if inside else float(np.interp(frames, run.xs, run.ys))


def average_bins(run: Run, width: int) -> Run:
    """Average the points in every interval (k * width, (k + 1) * width]; x = 0 has an interval of its own.

    The average is dated at the end of its interval, so that it holds nothing that came later.
    """
    bins: dict[int, list[float]] = {}
    for x, y in zip(run.xs, run.ys, strict=True):
        bins.setdefault(math.ceil(x / width), []).append(y)
    xs = [index * width for index in sorted(bins)]
    return run._replace(xs=xs, ys=[sum(bins[x // width]) / len(bins[x // width]) for x in xs])


def estimate_curve(runs: Sequence[Run], width: int, **options) -> tuple[list[int], list[Estimate]]:
    """Interquartile mean of runs of one task over frames.

    Args:
        runs: At least one.
        width: Frames that are averaged into one point; `average_bins` says how.
        options: For `estimate_iqm`.

    Returns:
        Frames and estimates. A run counts only where it has points.
    """
    points: dict[int, list[float]] = {}
    for run in runs:
        binned = average_bins(run, width)
        for x, y in zip(binned.xs, binned.ys, strict=True):
            points.setdefault(x, []).append(y)
    frames = sorted(points)
    return frames, [estimate_iqm({"": points[x]}, **options) for x in frames]
