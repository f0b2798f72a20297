"""The colours of a ColorGrid, in a file that all environments of a machine share."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from envs.cache import cache_folder
from envs.choices import check_positive

COLORS = 255  # values 0 to 254: the published table has no 255
LARGEST = 256 * 2**20  # bytes


def make_table(seed: int, num_cells: int, num_colors: int) -> np.ndarray:
    """Draws the colours of all cells with the legacy generator of NumPy, independently and uniformly from 0 to 254.

    Args:
        seed: of the generator, in [0, 2**32).
        num_cells: N, cells per side.
        num_colors: K, colours per cell.

    Returns:
        uint8 `[K, N, N, 3]`: one contiguous tile per index.

    Source: psp-neurips-2024/psp_camera_ready at 3ba6f32, which draws `[N, N, K, 3]` from the global generator.
    """
    generator = np.random.RandomState(seed)
    table = np.empty((num_colors, num_cells, num_cells, 3), dtype=np.uint8)
    for row in range(num_cells):  # by rows: the generator gives eight bytes per value
        drawn = generator.randint(COLORS, size=(num_cells, num_colors, 3))
        table[:, row] = drawn.astype(np.uint8).swapaxes(0, 1)
    return table


def load_table(seed: int, num_cells: int, num_colors: int) -> np.ndarray:
    """The table of `make_table`, read-only and mapped from the cache folder, which every process of a machine shares.

    The file is written by the first who needs it. Where nothing can be written the table lies in the memory of the
    process.
    """
    check_positive("num_cells_per_dim", num_cells)
    size = num_colors * num_cells**2 * 3
    if size > LARGEST:
        raise ValueError(
            f"num_colors_per_cell={num_colors}: the table of colours would take {size / 2**20:,.0f} MiB, the limit is "
            f"{LARGEST >> 20} MiB; split fewer action dimensions or give fewer colours"
        )
    path = cache_folder() / "color_grid" / f"{seed}_{num_cells}_{num_colors}.npy"
    with suppress(OSError, ValueError, EOFError):
        return _open(path, seed, num_cells, num_colors)
    table = make_table(seed, num_cells, num_colors)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, table)
        return _open(path, seed, num_cells, num_colors)
    return table


def _open(path: Path, seed: int, num_cells: int, num_colors: int) -> np.ndarray:
    table = np.load(path, mmap_mode="r")
    same = table.shape == (num_colors, num_cells, num_cells, 3) and table.dtype == np.uint8
    if not same or (table[:, 0, 0] != np.random.RandomState(seed).randint(COLORS, size=(num_colors, 3))).any():
        raise ValueError(f"{path} holds another table")
    return np.asarray(table)  # indexing a plain array is faster


def _write(path: Path, table: np.ndarray) -> None:
    """Another process sees the whole file or none."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.save(file, table)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
