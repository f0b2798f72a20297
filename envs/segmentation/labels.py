"""Frames and their masks from files: what a colour model is fitted on and a student learns from."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from envs.choices import check_positive

FRAME_KEYS = ("pixels", "image", "observation")
VIDEO_SUFFIXES = (".avi", ".mkv", ".mov", ".mp4", ".webm")
# What numpy raises for damaged files; RuntimeError for encrypted ones and ways of packing that Python does not know.
READ_ERRORS = (OSError, ValueError, EOFError, AttributeError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error)


def read_arrays(path: Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Those arrays of a .npz file that are there; nothing is unpickled.

    Raises:
        ValueError: the file is missing or damaged, or an array holds Python objects.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in keys if key in archive}
    except READ_ERRORS as error:
        raise ValueError(f"{path}: not a .npz file of plain arrays that can be read ({error!s:.100})") from error


def read_frames(path: Path) -> Tensor:
    """The frames of an episode.

    Args:
        path: a video, or a .npz file with `pixels`, `image` or `observation`, uint8 `[T, h, w, 3]`.

    Returns:
        uint8 `[T, h, w, 3]`, T at least 1.

    Raises:
        ValueError: the file is missing or damaged, or has no such frames.
        ImportError: a video, and PyAV is not installed.
    """
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return _read_video(path)
    found = read_arrays(path, FRAME_KEYS)
    for frames in found.values():
        if frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[-1] == 3 and len(frames):
            return torch.from_numpy(frames)
    listing = ", ".join(f"{key} {frames.dtype} {list(frames.shape)}" for key, frames in found.items()) or "none of them"
    raise ValueError(f"{path}: give {' or '.join(FRAME_KEYS)}, uint8 [T, h, w, 3]; found {listing}")


def _read_video(path: Path) -> Tensor:
    try:
        import av
        from av.error import FFmpegError
    except ImportError as error:
        raise ImportError(f"{path}: a video needs PyAV: pip install av") from error
    try:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (FFmpegError, IndexError) as error:
        raise ValueError(f"{path}: not a video that can be decoded ({error!s:.100})") from error
    if not frames:
        raise ValueError(f"{path}: a video without frames")
    return torch.from_numpy(np.stack(frames))  # [T, h, w, 3]


def load_labels(path: str | Path, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Labelled frames, spread evenly over all that there are.

    A file with labels is a .npz file with `mask`, bool or uint8 0..255, `[T, h, w]` or `[T, h, w, 1]`, and its frames:
    as in `read_frames`, or by their path relative to the file, `episode`, which is how `scripts/preprocess_masks.py`
    writes them. With `mask_valid`, bool `[T, 1]`, only frames where it is True count.

    Args:
        path: such a file, or a folder of them; other files in it are left out.
        limit: frames to load, at least 1; None for all.

    Returns:
        frames uint8 `[N, h, w, 3]` and masks uint8 `[N, h, w, 1]`, in the order of the names of the files.

    Raises:
        ValueError: there are no labels, a file is damaged, frames and masks do not fit, or sizes differ.
    """
    path = Path(path)
    if limit is not None:
        check_positive("limit", limit)
    files = sorted(path.rglob("*.npz")) if path.is_dir() else [path]
    labelled = {file: _labelled(file) for file in files}
    total = sum(map(len, labelled.values()))
    if not total:
        raise ValueError(f"{path}: no labelled frames; give a .npz file with pixels and mask, or a folder of them")
    count = total if limit is None else min(limit, total)
    chosen = (2 * np.arange(count) + 1) * total // (2 * count)  # the middles of as many equal parts
    parts, start = [], 0
    for file, indices in labelled.items():
        here = indices[chosen[(chosen >= start) & (chosen < start + len(indices))] - start]
        start += len(indices)
        if len(here):
            parts.append((file, *_load_pairs(file, here)))
    for file, frames, _ in parts:
        if frames.shape[1:] != parts[0][1].shape[1:]:
            sizes = [f"{name} {list(some.shape[1:3])}" for name, some, _ in (parts[0], (file, frames, None))]
            raise ValueError(f"frames of different sizes: {' and '.join(sizes)}; label them separately")
    return torch.cat([frames for _, frames, _ in parts]), torch.cat([masks for _, _, masks in parts])


def _labelled(file: Path) -> np.ndarray:
    """Numbers of the frames of a file that have a mask."""
    found = read_arrays(file, ("mask", "mask_valid"))
    if "mask" not in found:
        return np.arange(0)
    count = len(found["mask"])
    valid = found.get("mask_valid", np.ones(count, dtype=bool))
    if valid.dtype != bool or valid.size != count:
        raise ValueError(f"{file}: mask_valid {valid.dtype} {list(valid.shape)}: give bool [{count}, 1]")
    return valid.reshape(-1).nonzero()[0]


def _load_pairs(file: Path, indices: np.ndarray) -> tuple[Tensor, Tensor]:
    """Frames and masks of some frames of a file."""
    found = read_arrays(file, ("mask", "mask_version", "episode"))
    mask = found["mask"] if found["mask"].ndim == 4 else found["mask"][..., None]  # [T, h, w, 1]
    frames = read_frames(file.parent / str(found["episode"]) if "episode" in found else file)
    if mask.dtype not in (np.uint8, np.bool_) or mask.shape != (*frames.shape[:3], 1):
        wanted = [*frames.shape[:3], 1]
        raise ValueError(f"{file}: mask {mask.dtype} {list(mask.shape)}: its frames need bool or uint8 {wanted}")
    if mask.dtype == np.uint8 and mask.max() == 1 and "mask_version" not in found:  # a segmenter may be that unsure
        raise ValueError(f"{file}: mask is 1 at most: give bool, or uint8 from 0 to 255")
    mask = mask[indices] * np.uint8(255 if mask.dtype == np.bool_ else 1)
    return frames[torch.from_numpy(indices)], torch.from_numpy(mask)
