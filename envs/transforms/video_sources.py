"""Frames to play behind the agent: a prepared folder, or moving noise and shapes that are made here.

A prepared folder holds `frames.npy`, uint8 `[F, h, w, 3]` or `[F, h, w, 1]`, and `manifest.json`, which says which
clips the frames come from. Arrays are mapped, not read: the processes of a machine share one copy of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from envs.cache import cache_folder
from envs.choices import check_choice, check_positive

SPLITS = ("train", "test")
FRAMES_FILE, MANIFEST_FILE = "frames.npy", "manifest.json"
MANIFEST_FORMAT = 1
CLIP_KEYS = {"name", "sha256", "frames", "offset", "split"}
PROCEDURAL_FRAMES = 1000  # of each split, if not said otherwise
PROCEDURAL_VERSION = 1  # part of the name of a cached file: count up when the pictures change
CLIP_FRAMES = 100  # length of a procedural clip
SHAPES = 6  # of a procedural clip
LUMA = np.array([[77], [150], [29]], dtype=np.float32) / 256  # ITU-R BT.601 weights of red, green and blue


@dataclass(frozen=True, eq=False)
class Video:
    """Clips of one split.

    Args:
        frames: uint8 `[F, h, w, 3]` or `[F, h, w, 1]`; may hold frames of the other split too.
        clips: int64 `[n, 2]`, first frame and number of frames of each clip.
        description: what the frames are, for the record of a run; JSON types only.
    """

    frames: np.ndarray
    clips: np.ndarray
    description: dict[str, Any]


def to_grey(frames: np.ndarray) -> np.ndarray:
    """The brightness of colour images: uint8 `[..., 3]` to uint8 `[..., 1]`, by ITU-R BT.601."""
    return (frames.astype(np.float32) @ LUMA).astype(np.uint8)  # exact: sums of integers, divided by 256


def first_frames(clips: np.ndarray, count: int | None) -> np.ndarray:
    """The clips that hold the first so many frames; the last one is cut.

    Args:
        clips: int64 `[n, 2]`, first frame and number of frames.
        count: frames to keep, None for all.

    Raises:
        ValueError: there are not so many.
    """
    if count is None:
        return clips
    check_positive("num_frames", count)
    total = int(clips[:, 1].sum())
    if total < count:
        raise ValueError(f"num_frames={count}: the split has {total}, give at most that or null for all of them")
    before = np.cumsum(clips[:, 1]) - clips[:, 1]
    kept = clips[before < count].copy()
    kept[-1, 1] = count - before[before < count][-1]
    return kept


def manifest_digest(manifest: dict[str, Any]) -> str:
    """The sha256 of everything in a manifest but its own entry `digest`."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def open_folder(folder: str | Path, *, split: str = "train", num_frames: int | None = None) -> Video:
    """Opens the clips of one split of a prepared folder.

    Args:
        folder: made by `scripts/prepare_video.py`.
        split: "train" or "test".
        num_frames: use the first so many frames of the split, None for all.

    Raises:
        ValueError: there is no such folder, it is damaged or was changed, or the split has no clips.
    """
    check_choice("split", split, SPLITS)
    folder = Path(folder)
    manifest = _read_manifest(folder)
    shape = (manifest["frames"], manifest["height"], manifest["width"], manifest["channels"])
    frames = _open_array(folder / FRAMES_FILE, shape)
    clips = [(clip["offset"], clip["frames"]) for clip in manifest["clips"] if clip["split"] == split]
    if not clips:
        raise ValueError(
            f"split={split!r}: {folder} has no clips in it; prepare two or more clips, with 0 < --test-share < 1"
        )
    kept = first_frames(np.array(clips, dtype=np.int64), num_frames)  # [n, 2]
    description = {
        "source": str(folder),
        "split": split,
        "clips": len(kept),
        "frames": int(kept[:, 1].sum()),
        "sha256": manifest["array_sha256"],
    }
    return Video(frames, kept, description)


def check_folder(folder: str | Path) -> None:
    """Checks that every byte of a prepared folder is as it was written.

    Raises:
        ValueError: it is not, or there is no such folder.
    """
    manifest = _read_manifest(Path(folder))
    frames = Path(folder) / FRAMES_FILE
    if not frames.is_file() or file_sha256(frames) != manifest["array_sha256"]:
        raise ValueError(f"{frames}: not the frames that the manifest describes; prepare the folder again")


def file_sha256(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_FILE
    again = "prepare the folder again with scripts/prepare_video.py"
    if not path.is_file():
        raise ValueError(f"source={str(folder)!r}: no {MANIFEST_FILE} there; make one with scripts/prepare_video.py")
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] != MANIFEST_FORMAT:
            raise ValueError(f"{path}: format {manifest['format']!r} instead of {MANIFEST_FORMAT}; {again}")
        if manifest["digest"] != manifest_digest(manifest):
            raise ValueError(f"{path}: was changed after it was written; {again}")
        _check_clips(manifest)
    except (KeyError, TypeError, AssertionError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not a manifest of prepared clips ({error!r:.100}); {again}") from error
    return manifest


def _check_clips(manifest: dict[str, Any]) -> None:
    counts = [manifest[key] for key in ("height", "width", "frames")]
    counts += [clip["frames"] for clip in manifest["clips"]]
    assert all(type(count) is int and count > 0 for count in counts), "a size or count below 1"
    assert manifest["channels"] in (1, 3), "channels"
    assert type(manifest["array_sha256"]) is str, "array_sha256"
    offset = 0
    for clip in manifest["clips"]:
        assert set(clip) == CLIP_KEYS and clip["split"] in SPLITS, "entries of a clip"
        assert clip["offset"] == offset, "clips do not follow each other"
        offset += clip["frames"]
    assert offset == manifest["frames"], "frames of the clips and of the whole differ"


def _open_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        frames = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise ValueError(f"{path}: not a whole array of frames ({error!s:.100}); make it again") from error
    if frames.dtype != np.uint8 or frames.shape != shape:
        found = f"{frames.dtype} {list(frames.shape)}"
        raise ValueError(f"{path}: {found} instead of uint8 {list(shape)}; make it again")
    if not frames.flags.c_contiguous:
        raise ValueError(f"{path}: stored in Fortran order instead of C order; make it again")
    return np.asarray(frames)  # a view of the mapped file


def open_procedural(
    *, seed: int = 0, split: str = "train", size: tuple[int, int], num_frames: int | None = None
) -> Video:
    """Moving coloured noise with drifting shapes, made once per machine and kept in a file.

    The file is in `$LUCID_CACHE`, or else in `lucid/` of the user's cache folder. Where it cannot be written, each
    process keeps a copy of its own.

    Args:
        seed: of the pictures, at least 0. The splits never share a clip.
        split: "train" or "test".
        size: height and width in pixels.
        num_frames: frames, at least 1; None for 1000.

    Raises:
        ValueError: the split does not exist, or a size or count is below 1.
    """
    check_choice("split", split, SPLITS)
    count = PROCEDURAL_FRAMES if num_frames is None else num_frames
    for label, value in (("image_size", size[0]), ("image_size", size[1]), ("num_frames", count)):
        check_positive(label, value)
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"source_seed={seed!r}: give a whole number of at least 0")
    frames = _cached_procedural(seed, split, size, count)
    starts = np.arange(0, count, CLIP_FRAMES)
    clips = np.stack([starts, np.minimum(CLIP_FRAMES, count - starts)], axis=1)  # [n, 2]
    name = f"procedural {PROCEDURAL_VERSION}, seed {seed}"
    return Video(frames, clips, {"source": name, "split": split, "clips": len(clips), "frames": count, "sha256": None})


def _cached_procedural(seed: int, split: str, size: tuple[int, int], count: int) -> np.ndarray:
    shape = (count, *size, 3)
    name = f"procedural-{PROCEDURAL_VERSION}-{seed}-{split}-{size[0]}x{size[1]}-{count}.npy"
    try:
        path = cache_folder() / "video" / name
        with contextlib.suppress(ValueError):
            return _open_array(path, shape)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):  # one of the workers that start together makes it
            with contextlib.suppress(ValueError):
                return _open_array(path, shape)
            frames = make_procedural(seed=seed, split=split, size=size, num_frames=count)
            _write_array(path, frames)
        return _open_array(path, shape)
    except (OSError, RuntimeError, ValueError) as error:
        warnings.warn(
            f"{error}: each process keeps {np.prod(shape) / 1e6:.0f} MB of background frames; "
            "set LUCID_CACHE to a folder that can be written",
            stacklevel=2,
        )
        return make_procedural(seed=seed, split=split, size=size, num_frames=count)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for other processes, where the file system has locks; the file is written atomically anyhow."""
    import fcntl

    with path.open("a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_array(path: Path, frames: np.ndarray) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.save(file, frames)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def make_procedural(*, seed: int, split: str, size: tuple[int, int], num_frames: int) -> np.ndarray:
    """Makes the frames of the procedural source; integer arithmetic, so that they are the same on every machine.

    Each clip of 100 frames shows two layers of smooth colour noise that slide in directions of their own, and six
    discs and boxes that drift over them.

    Args:
        seed: of the pictures.
        split: "train" or "test".
        size: height and width in pixels.
        num_frames: frames; a longer source begins with the frames of a shorter one.

    Returns:
        uint8 `[num_frames, h, w, 3]`.
    """
    frames = np.empty((num_frames, *size, 3), dtype=np.uint8)
    for clip, start in enumerate(range(0, num_frames, CLIP_FRAMES)):
        random = np.random.default_rng(np.random.SeedSequence((seed, SPLITS.index(split), clip)))
        part = frames[start : start + CLIP_FRAMES]
        part[:] = _noise(random, len(part), size)
        for _ in range(SHAPES):
            _draw_shape(random, part)
    return frames


def _noise(random: np.random.Generator, count: int, size: tuple[int, int]) -> np.ndarray:
    """Two sliding layers on a torus of twice the image, `[count, h, w, 3]`."""
    layers = []
    for cells in (6, 14):
        texture = _texture(random, (2 * size[0], 2 * size[1]), cells)  # [2h, 2w, 3]
        rows, columns = (_path(random, count, length) for length in size)  # [count], pixels
        y = (rows[:, None] + np.arange(size[0])) % (2 * size[0])  # [count, h]
        x = (columns[:, None] + np.arange(size[1])) % (2 * size[1])  # [count, w]
        layers.append(texture[y[:, :, None], x[:, None, :]])  # [count, h, w, 3]
    mixed = (5 * layers[0].astype(np.int16) + 3 * layers[1].astype(np.int16)) // 4 - 128  # twice the contrast of a mean
    return np.clip(mixed, 0, 255).astype(np.uint8)


def _texture(random: np.random.Generator, size: tuple[int, int], cells: int) -> np.ndarray:
    """Random colours, interpolated bilinearly with wrapped edges, uint8 `[h, w, 3]`."""
    grid = random.integers(0, 256, (cells, cells, 3)).astype(np.int32)
    for axis, length in enumerate(size):
        at = np.arange(length) * cells * 256 // length  # position in the grid, in 1/256 of a cell
        share = (at % 256).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        lower, upper = grid.take(at // 256, axis), grid.take((at // 256 + 1) % cells, axis)
        grid = (lower * (256 - share) + upper * share) >> 8
    return grid.astype(np.uint8)


def _path(random: np.random.Generator, count: int, length: int) -> np.ndarray:
    """Positions of something that moves at a constant speed of up to 1/32 of the image per frame, int64 `[count]`."""
    start, speed = random.integers(0, 4 * length), random.integers(-8, 9)
    return start + (speed * np.arange(count) * length) // 256


def _draw_shape(random: np.random.Generator, frames: np.ndarray) -> None:
    """Paints a disc or a box that leaves at one side and comes back at the other; `frames` `[count, h, w, 3]`."""
    distances, halves = [], []
    for length in frames.shape[1:3]:
        half = int(random.integers(max(1, length // 16), length // 6 + 2))
        torus = length + 2 * half  # it is out of the picture when it wraps
        centre = _path(random, len(frames), length)[:, None]
        distances.append(np.abs((np.arange(length) + half - centre) % torus - torus // 2))  # [count, length]
        halves.append(half)
    y, x = distances[0][:, :, None], distances[1][:, None, :]
    if random.integers(2):
        inside = (y * halves[1]) ** 2 + (x * halves[0]) ** 2 <= (halves[0] * halves[1]) ** 2  # an ellipse
    else:
        inside = (y <= halves[0]) & (x <= halves[1])
    frames[inside] = random.integers(0, 256, 3)
