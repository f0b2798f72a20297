"""Pictures of a report: SVG that takes its colours from the page, small, without ids and without names in it.

Names of metrics and runs are written by the page around a picture, which can escape and wrap them.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dreamer.report_data import Curve, Histogram

POINTS = 200  # of a curve
BINS, COLUMNS = 32, 60  # of a heat map
HEAT = (0.27, 0.53, 0.75)  # its colour, on light and on dark
WIDE, SMALL = (760, 270), (300, 130)  # width and height in pixels
SERIES = 6  # colours of curves that the page has
# Colours that stand for those of the page, which differ between light and dark.
INK, MUTED, GRID = "#000001", "#000002", "#000003"
COLOURS = tuple(f"#00010{index}" for index in range(SERIES))
NAMES = {INK: "ink", MUTED: "muted", GRID: "line"} | {colour: f"c{index}" for index, colour in enumerate(COLOURS)}
STYLE = {
    "svg.fonttype": "none",
    "path.simplify": False,
    "text.parse_math": False,
    "font.size": 8.0,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.2,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}


TEXT = re.compile(r'style="font-size: [^;"]*;[^"]*text-anchor: (\w+)[^"]*fill: (#\w+)[^"]*"')


class Band(NamedTuple):
    """A line with an interval around it; NaN bounds are left out."""

    frames: Sequence[float]
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    colour: str


def thin(curve: Curve, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """`x` and values of a curve, ascending; of more than `points` the means in as many equal intervals."""
    x, values = curve.x, curve.values
    if len(x) <= points:
        order = np.argsort(x, kind="stable")
        return x[order], values[order]
    span = max(x.max() - x.min(), 1)
    index = ((x - x.min()) / span * (points - 1e-9)).astype(int)
    counts = np.bincount(index)
    used = counts > 0
    return (np.bincount(index, x)[used] / counts[used], np.bincount(index, values)[used] / counts[used])


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Means of the last `window` values; of fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def robust_limits(values: np.ndarray) -> tuple[float, float]:
    """Limits of an axis that shows all values, or all but the outermost if these would flatten the rest."""
    low, high = float(values.min()), float(values.max())
    inner_low, inner_high = (float(bound) for bound in np.quantile(values, [0.02, 0.98]))
    if len(values) > 20 and high - low > 4 * (inner_high - inner_low) > 0:
        low, high = max(low, 2 * inner_low - inner_high), min(high, 2 * inner_high - inner_low)
    margin = 0.06 * (high - low) or max(abs(high), 1.0) * 0.1
    return low - margin, high + margin


def draw_metric(curve: Curve, colour: str = COLOURS[0]) -> str:
    """A small picture of one metric; values beyond the axis are drawn at its edge.

    It begins at nought, but where it begins itself if frames stood still: a stage may be a small part of the run.
    """

    def draw(axis: Axes) -> None:
        frames, values = thin(curve)
        low, high = robust_limits(values)
        if frames[0] == frames[-1]:
            _dots(axis, frames, np.clip(values, low, high), colour)
        else:
            axis.plot(frames, np.clip(values, low, high), color=colour)
        axis.set_ylim(low, high)

    return _svg(draw, SMALL, _span(curve))


def draw_returns(episodes: Curve, mean: Curve, deviation: Curve, random: float | None, total_frames: int) -> str:
    """Returns: of episodes, their running mean, evaluations with their deviation, random actions."""

    def draw(axis: Axes) -> None:
        if len(episodes.frames):
            frames, values = thin(episodes)
            axis.plot(frames, values, color=COLOURS[0], alpha=0.35, lw=0.8)
            axis.plot(frames, running_mean(values, max(len(values) // 12, 2)), color=COLOURS[0], lw=1.8)
        if len(mean.frames):
            frames, values = thin(mean, 60)
            spread = np.interp(frames, *thin(deviation, 60)) if len(deviation.frames) else np.zeros(len(frames))
            gap = np.full(len(frames), math.nan)
            bars = np.stack([values - spread, values + spread, gap], axis=1)
            axis.plot(np.repeat(frames, 3), bars.ravel(), color=COLOURS[1], lw=1.2, alpha=0.6)
            axis.plot(frames, values, color=COLOURS[1], lw=1.2)
            _dots(axis, frames, values, COLOURS[1])
        if random is not None:
            axis.axhline(random, color=MUTED, lw=1, ls=(0, (4, 3)))
        _set_return_limits(axis)

    first, last = zip(*(_span(curve) for curve in (episodes, mean) if len(curve.x)), strict=True)
    return _svg(draw, WIDE, (min(first), max([total_frames, *last])))


def draw_bands(bands: Sequence[Band], size: tuple[int, int] = SMALL) -> str:
    """Lines with intervals over frames."""

    def draw(axis: Axes) -> None:
        for band in bands:
            frames, low, high = (np.asarray(part, dtype=float) for part in (band.frames, band.low, band.high))
            known = np.isfinite(low) & np.isfinite(high)
            if known.sum() > 1:
                outline = np.concatenate([low[known], high[known][::-1]])
                axis.fill(
                    np.concatenate([frames[known], frames[known][::-1]]), outline, color=band.colour, alpha=0.18, lw=0
                )
            axis.plot(frames, band.values, color=band.colour, lw=1.6)
            if len(frames) == 1:
                _dots(axis, frames, np.asarray(band.values), band.colour)
        _set_return_limits(axis)

    return _svg(draw, size, (0, max(1, *(max(band.frames) for band in bands))))


def draw_histograms(histograms: Sequence[Histogram]) -> str:
    """Shares over `x` and values: the stronger the colour, the more."""
    low, high = min(item.edges[0] for item in histograms), max(item.edges[-1] for item in histograms)
    edges = np.linspace(low, high, BINS + 1)
    frames = np.array([item.x for item in histograms], dtype=float)
    first, last = frames.min(), max(frames.max(), frames.min() + 1)
    at = np.linspace(first, last, COLUMNS)
    nearest = np.abs(frames[None] - at[:, None]).argmin(1)
    shares = np.stack([_rebin(histograms[index], edges) for index in nearest], axis=1)  # [BINS, COLUMNS]
    image = np.empty((*shares.shape, 4))
    image[..., :3] = HEAT
    image[..., 3] = (shares / max(shares.max(), 1e-12)) ** 0.6

    def draw(axis: Axes) -> None:
        box = (first, last, low, high)
        axis.imshow(image, aspect="auto", origin="lower", interpolation="none", extent=box).set_clip_on(False)
        axis.grid(False)

    return _svg(draw, SMALL, None)


def _rebin(histogram: Histogram, edges: np.ndarray) -> np.ndarray:
    """Shares between other edges, as if counts were spread evenly over their own interval."""
    total = max(histogram.counts.sum(), 1e-12)
    return np.diff(np.interp(edges, histogram.edges, np.concatenate([[0], np.cumsum(histogram.counts)]) / total))


def _dots(axis: Axes, frames: np.ndarray, values: np.ndarray, colour: str) -> None:
    """Dots as strokes of no length; markers of matplotlib would need ids."""
    lines = np.repeat(frames, 3), np.stack([values, values, np.full(len(values), math.nan)], axis=1).ravel()
    axis.plot(*lines, color=colour, lw=5)


def _set_return_limits(axis: Axes) -> None:
    """Nought belongs to the axis of returns."""
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, 0), max(high, 0))


def short_number(value: float, digits: int = 3) -> str:
    """ "250k", "1.5M", "0.02", "1e-05"."""
    if not math.isfinite(value):
        return "?"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1e12:
            return f"{value / size:.{max(digits, 4)}g}{unit}"
    return f"{value:.{digits}g}" if abs(value) >= 1e-12 else "0"


def _span(curve: Curve) -> tuple[float, float]:
    """From where to where a curve is drawn."""
    first = 0.0 if curve.steps is None else float(curve.x.min())
    return first, max(float(curve.x.max()), first + 1)


def _svg(draw: Callable[[Axes], None], size: tuple[int, int], span: tuple[float, float] | None) -> str:
    """Let `draw` fill the axes of a new figure, with `span` as its first and last `x`, and return the SVG element."""
    width, height = size
    with rc_context(STYLE):
        figure = Figure(figsize=(width / 72, height / 72))
        left, bottom = 46 / width, 20 / height
        axis = figure.add_axes((left, bottom, 1 - left - 10 / width, 1 - bottom - 8 / height))
        draw(axis)
        if span is not None:
            axis.set_xlim(*span)
        for side, count in ((axis.xaxis, width // 95), (axis.yaxis, height // 40)):
            side.set_major_locator(MaxNLocator(max(count, 2)))
            side.set_major_formatter(FuncFormatter(lambda value, _: short_number(value, 6)))
        for artist in (*axis.lines, *axis.patches):
            artist.set_clip_on(False)
        figure.patch.set_visible(False)
        axis.patch.set_visible(False)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return _clean(buffer.getvalue(), width, height)


def _clean(svg: str, width: int, height: int) -> str:
    """The drawing alone: no ids, comments, styles for the whole page, needless digits; colours of the page."""
    body = svg[svg.index('<g id="figure_1">') : svg.rindex("</svg>")]
    body = re.sub(r"<!--.*?-->|<defs>.*?</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r' (id|clip-path)="[^"]*"', "", body)
    body = re.sub(r' transform="rotate\(-0[^"]*\)"', "", body)
    body = TEXT.sub(r'text-anchor="\1" style="fill:\2"', body)
    body = re.sub(r"#00[01]\w{3}", lambda match: f"var(--{NAMES.get(match[0], 'ink')})", body)
    body = re.sub(r"base64,[^\"]*", lambda match: re.sub(r"\s", "", match[0]), body)
    body = re.sub(r"\s*\n\s*", " ", body)
    return f'<svg viewBox="0 0 {width} {height}" role="img">{body}</svg>'
