"""What a report says of a run, read from its folder.

The files may be damaged, half written or made by somebody else: what cannot be read is left out, nothing is raised,
and no link is followed out of the folder.
"""

import json
import math
import os
import re
import time
from array import array
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from dreamer.redaction import redact_text

LIMIT = 1 << 20  # bytes of a line and of config.yaml
HUGE = 1e100  # a value beyond it counts as not finite: no axis could show it
ENTRIES = 100_000  # lines read of anything but metrics
ALIVE = 15 * 60  # seconds since the last line of metrics in which a run counts as running
ENDS = {"signal": "interrupted", "exception": "failed"}  # kind of incident -> status


class Curve(NamedTuple):
    """Finite values of a metric.

    Args:
        frames: [N].
        values: [N].
        lost: Number of values that were not finite.
        steps: [N], frames plus updates, where learning went on while the frames stood still.
    """

    frames: np.ndarray
    values: np.ndarray
    lost: int = 0
    steps: np.ndarray | None = None

    @property
    def x(self) -> np.ndarray:
        """Where to draw the values, [N]."""
        return self.frames if self.steps is None else self.steps

    @property
    def unit(self) -> str:
        """Of `x`."""
        return "frames" if self.steps is None else "frames + updates"

    def last(self) -> float | None:
        """The newest value, None if there is none."""
        return float(self.values[-1]) if len(self.values) else None

    def best(self) -> float | None:
        """The highest value, None if there is none."""
        return float(self.values.max()) if len(self.values) else None


class Histogram(NamedTuple):
    """Counts [n] between edges [n + 1]."""

    x: int
    edges: np.ndarray
    counts: np.ndarray


class Media(NamedTuple):
    """One video or image."""

    name: str
    x: int
    path: Path


class Checkpoint(NamedTuple):
    """A folder with a checkpoint; it is whole if its manifest, which is written last, is there."""

    name: str
    size: int
    whole: bool


EMPTY = Curve(np.zeros(0), np.zeros(0))


@dataclass(frozen=True)
class RunData:
    """Everything that is known of a run.

    Args:
        folder: Run folder.
        config: Dotted key -> value as text.
        starts: Of `run.json`.
        metrics: Name -> curve; "seconds" is one of them.
        incidents: In the order of time.
        histograms, videos, images: Name -> what there is, oldest first.
        checkpoints: Oldest first.
        evaluation: What `dreamer/eval.py` wrote last, empty if it was never run.
        modified: When the metrics were last written, in seconds since 1970.
    """

    folder: Path
    config: dict[str, str]
    starts: list[dict[str, Any]]
    metrics: dict[str, Curve]
    incidents: list[dict[str, Any]]
    histograms: dict[str, list[Histogram]]
    videos: dict[str, list[Media]]
    images: dict[str, list[Media]]
    checkpoints: list[Checkpoint]
    evaluation: dict[str, Any]
    modified: float

    def curve(self, name: str) -> Curve:
        """A metric; an empty curve if there is none of that name."""
        return self.metrics.get(name, EMPTY)

    @property
    def frames(self) -> int:
        """Frames collected so far."""
        curve = self.curve("seconds")
        return int(curve.frames.max()) if len(curve.frames) else 0

    @property
    def source(self) -> str:
        """The run whose frames this one learns from, which collects none; empty for any other."""
        text = self.config.get("agent.source", "null")
        return "" if text == "null" or self.frames else text

    @property
    def stands_still(self) -> bool:
        """Whether learning went on while the frames stood still."""
        return self.curve("seconds").steps is not None

    @property
    def unit(self) -> str:
        """What pictures are drawn over."""
        return self.curve("seconds").unit

    @property
    def total_frames(self) -> int:
        """Frames that the run was meant for, 0 if unknown or none."""
        text = "0" if self.source else self.config.get("collector.total_frames", "")
        return int(text) if re.fullmatch(r"\d{1,15}", text) else 0

    @property
    def seconds(self) -> float:
        """Time spent; a clock that starts again with a resumed run adds to it."""
        values = self.curve("seconds").values
        if not len(values):
            return 0.0
        return float(values[-1] + values[:-1][np.diff(values) < 0].sum())

    @property
    def status(self) -> str:
        """ "finished", "interrupted", "failed", "running" or "unfinished"."""
        ends = [entry["kind"] for entry in self.incidents if entry.get("kind") in (*ENDS, "resume")]
        full = self.frames >= self.total_frames if self.total_frames else bool(self.source)
        if full and not (self.stands_still and ends and ends[-1] in ENDS):
            return "finished"
        if ends and ends[-1] in ENDS:
            return ENDS[ends[-1]]
        return "running" if time.time() - self.modified < ALIVE else "unfinished"

    @property
    def distraction(self) -> str:
        """Name of the distraction, "none" without one."""
        return self.config.get("env.distraction.name", "none")

    @property
    def task(self) -> str:
        """ "cartpole_swingup"."""
        return "_".join(name for name in map(self.config.get, ("env.name", "env.task")) if name and name != "null")


def read_run(folder: Path) -> RunData:
    """Read a run folder; it may be empty, but it must exist.

    Raises:
        NotADirectoryError: if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: no such folder, give a run folder")
    metrics = folder / "metrics.jsonl"
    inside = is_inside(folder, metrics)
    starts = _read_json(folder / "run.json", folder)
    starts = starts.get("starts") if isinstance(starts, dict) else None
    evaluation = _read_json(folder / "eval.json", folder)
    return RunData(
        folder,
        _read_config(folder / "config.yaml", folder),
        [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else [],
        _read_metrics(metrics) if inside else {},
        list(_read_entries(folder / "incidents.jsonl", folder)),
        _read_histograms(folder / "histograms.jsonl", folder),
        _list_media(folder, "videos", "mp4"),
        _list_media(folder, "images", "png"),
        _list_checkpoints(folder),
        evaluation if isinstance(evaluation, dict) else {},
        metrics.stat().st_mtime if inside else 0.0,
    )


def is_inside(folder: Path, path: Path) -> bool:
    """Whether this is a plain file that lies in the folder, links resolved."""
    with suppress(OSError):
        return path.is_file() and path.resolve().is_relative_to(folder.resolve())
    return False


def flatten(config: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted key -> value as text, with `~` for the home folder."""
    if isinstance(config, Mapping) and (config or not prefix):
        leaves: dict[str, str] = {}
        for key, value in config.items():
            leaves |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
        return leaves
    text = config if isinstance(config, str) else json.dumps(config, default=str)
    return {prefix: redact_text(text)}


class _Loader(yaml.SafeLoader):
    """Plain values only: a few aliases could stand for gigabytes."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def _read_config(path: Path, folder: Path) -> dict[str, str]:
    with suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
        if is_inside(folder, path) and path.stat().st_size <= LIMIT:
            config = yaml.load(path.read_text(), _Loader)
            return flatten(config) if isinstance(config, dict) else {}
    return {}


def _read_json(path: Path, folder: Path) -> Any:
    with suppress(OSError, ValueError, RecursionError):
        if is_inside(folder, path) and path.stat().st_size <= 16 * LIMIT:
            return json.loads(path.read_text())
    return None


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file with one per line; lines that are cut, too long or something else are left out."""
    with suppress(OSError), path.open("rb") as file:
        while line := file.readline(LIMIT):
            with suppress(ValueError, RecursionError):
                entry = json.loads(line)
                if isinstance(entry, dict):
                    yield entry


def _read_entries(path: Path, folder: Path) -> Iterator[dict[str, Any]]:
    if is_inside(folder, path):
        for _, entry in zip(range(ENTRIES), _read_lines(path), strict=False):
            yield entry


def _is_frames(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _read_metrics(path: Path) -> dict[str, Curve]:
    columns: dict[str, tuple[array, array, array]] = {}
    lost: dict[str, int] = {}
    for entry in _read_lines(path):
        frames = entry.pop("frames", None)
        step = entry.pop("step", frames)
        if not _is_frames(frames) or not _is_frames(step):
            continue
        for name, value in entry.items():
            kind = type(value)
            if (kind is float or kind is int) and abs(value) < HUGE:
                if (column := columns.get(name)) is None:
                    column = columns[name] = (array("d"), array("d"), array("d"))
                for part, number in zip(column, (frames, value, step), strict=True):
                    part.append(number)
            elif value is None or kind is float or kind is int:
                lost[name] = lost.get(name, 0) + 1
    names = [*columns, *(name for name in lost if name not in columns)]
    curves = {}
    for name in names:
        frames, values, steps = map(np.array, columns.get(name, ((), (), ())))
        curves[name] = Curve(frames, values, lost.get(name, 0), None if np.array_equal(steps, frames) else steps)
    return curves


def _read_histograms(path: Path, folder: Path) -> dict[str, list[Histogram]]:
    found: dict[str, list[Histogram]] = {}
    for entry in _read_entries(path, folder):
        with suppress(KeyError, TypeError, ValueError, OverflowError):
            edges, counts = np.array(entry["edges"], dtype=float), np.array(entry["counts"], dtype=float)
            ascend = edges.ndim == 1 and (np.abs(edges) < HUGE).all() and (np.diff(edges) > 0).all()
            fit = counts.shape == (len(edges) - 1,) and len(counts) and (np.abs(counts) < HUGE).all()
            x = entry.get("step", entry["frames"])
            if ascend and fit and _is_frames(x):
                found.setdefault(str(entry["name"]), []).append(Histogram(x, edges, counts))
    return found


def _list_media(folder: Path, kind: str, suffix: str) -> dict[str, list[Media]]:
    found: dict[str, list[Media]] = {}
    for path in (folder / kind).glob(f"*.{suffix}"):
        match = re.fullmatch(r"(.+)_(\d{9,15})", path.stem, re.DOTALL)
        if match and is_inside(folder, path):
            found.setdefault(match[1], []).append(Media(match[1], int(match[2]), path))
    return {name: sorted(found[name], key=lambda media: media.x) for name in sorted(found)}


def _list_checkpoints(folder: Path) -> list[Checkpoint]:
    found = []
    parent = folder / "checkpoints"
    if parent.is_symlink() or not parent.is_dir():
        return []
    for path in parent.iterdir():
        if path.is_dir() and not path.is_symlink() and re.fullmatch(r"frames_\d+|best", path.name):
            sizes = [_size(Path(root) / name) for root, _, names in os.walk(path) for name in names]
            found.append(Checkpoint(path.name, sum(sizes), is_inside(folder, path / "manifest.json")))
    return sorted(found, key=lambda item: int(item.name.removeprefix("frames_")) if item.name != "best" else math.inf)


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.lstat().st_size
    return 0
