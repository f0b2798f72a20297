"""Rings of records: one per environment stream, one writer each, no locks.

A ring keeps the last `ring_length` records of its stream. The record that a stream wrote as its p-th (p = 0, 1,
...) has *position* p; it lies in slot `p % ring_length` until position `p + ring_length` overwrites it. Two
counters per stream make reading safe beside a running writer:

    announced   positions below it are written or being written    (raised before the copy)
    written     positions below it can be read                     (raised after the copy)

so a record can be read while `announced - ring_length <= position < written`. A reader copies first and looks at
`announced` again afterwards: what still satisfies the left side was not touched meanwhile. Nobody waits for a
lock, so a worker that is killed cannot hold one. The order of the stores is that of x86, where other processes
see them as they were made.
"""

import multiprocessing
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import IO

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase

from dreamer.memory_limits import available_memory

UNLIMITED = torch.iinfo(torch.int64).max
WAIT_SECONDS = 1e-3
RESERVED_KEYS = {"stream", "context"}
WRITER_FIELDS = (
    "num_streams",
    "ring_length",
    "_layout",
    "_place",
    "_storage",
    "_announced",
    "_written",
    "_write_limit",
)


class RecordRings:
    """Storage, counters and the writer's side of a replay; all that a worker process needs of it.

    Args:
        record: example of one record, batch size []; gives keys, shapes and dtypes.
        capacity: records over all streams; rounded down to a multiple of `num_streams`.
        num_streams: number of rings.
        device: where the records live, "cpu" or a CUDA device.
        memmap_dir: folder for memory-mapped files; None keeps the records in memory.

    Raises:
        ValueError: a batch of records, a reserved key, no streams, less than two records per stream, or files
            for a CUDA device.
        MemoryError: the records do not fit; raised before anything is allocated.
    """

    def __init__(
        self,
        record: TensorDictBase,
        *,
        capacity: int,
        num_streams: int,
        device: torch.device | str = "cpu",
        memmap_dir: str | Path | None = None,
    ) -> None:
        if record.batch_dims:
            raise ValueError(f"record has batch size {list(record.batch_size)}: give one record, of batch size []")
        if reserved := RESERVED_KEYS.intersection(record.keys()):
            raise ValueError(f"record has the reserved keys {sorted(reserved)}: rename them")
        if num_streams < 1 or capacity < 2 * num_streams:
            raise ValueError(f"capacity={capacity}, num_streams={num_streams}: give every stream two records")
        device = torch.device(device)
        if memmap_dir is not None and device.type != "cpu":
            raise ValueError(f"memmap_dir={str(memmap_dir)!r} with records on {device}: leave one of them out")
        self.num_streams = num_streams
        self.ring_length = capacity // num_streams
        self._layout = {key: (leaf.shape, leaf.dtype) for key, leaf in record.items(True, True)}
        if memmap_dir is not None:
            Path(memmap_dir).mkdir(parents=True, exist_ok=True)
            self._claim(f"files in {memmap_dir}", shutil.disk_usage(memmap_dir).free)
        elif device.type == "cuda":
            self._claim(f"memory of {device}", torch.cuda.mem_get_info(device)[0])
        else:
            self._claim("memory", available_memory())
        # torch.empty leaves its pages untouched: memory is taken as the records arrive.
        records = record.to("cpu").expand(self.capacity)
        self._storage = (
            records.memmap_like(prefix=memmap_dir)
            if memmap_dir is not None
            else records.apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device=device), device=device)
        )
        self._announced = torch.zeros(num_streams, dtype=torch.int64)  # [S]
        self._written = torch.zeros(num_streams, dtype=torch.int64)  # [S]
        self._write_limit = torch.tensor(UNLIMITED)

    @property
    def capacity(self) -> int:
        """Records that the rings hold together."""
        return self.num_streams * self.ring_length

    @property
    def record_bytes(self) -> int:
        """Bytes of one record."""
        return sum(shape.numel() * dtype.itemsize for shape, dtype in self._layout.values())

    @property
    def planned_bytes(self) -> int:
        """Bytes of all records once the rings are full."""
        return self.capacity * self.record_bytes

    @property
    def write_count(self) -> int:
        """Records written since the start, over all streams."""
        return int(self._written.sum())

    @property
    def stream_counts(self) -> np.ndarray:
        """Records written since the start, per stream [S]."""
        return self._written.numpy().copy()

    def __len__(self) -> int:
        """Records held now."""
        return int(self._written.clamp(max=self.ring_length).sum())

    def describe(self) -> str:
        """Size of the replay in one line."""
        return (
            f"replay: {self.capacity:,} records in {self.num_streams} rings of {self.ring_length:,}, "
            f"{self.record_bytes:,} bytes each, up to {self.planned_bytes / 1e9:.2f} GB of {self._place}"
        )

    def extend(self, records: TensorDictBase) -> None:
        """Append records to the rings of their streams; a stream may have only one writer.

        Waits while one of these streams has reached `write_limit`.

        Args:
            records: [R] the keys of the example record, and `stream` [R] or [R, 1] integer in
                0..num_streams-1. The records of one stream are in time order; streams may alternate.

        Raises:
            ValueError: missing or unknown keys, a wrong shape, dtype or stream, or more records for one
                stream than half its ring (the other half must stay readable during the copy).
        """
        if records.batch_dims != 1:
            raise ValueError(f"records have batch size {list(records.batch_size)}: flatten them to one axis")
        stream = self._read_streams(records)  # [R]
        records = records.exclude("stream")
        self._check(records, self._layout)
        counts = np.bincount(stream, minlength=self.num_streams)  # [S]
        if counts.max() > self.ring_length // 2:
            raise ValueError(
                f"{counts.max()} records at once for stream {counts.argmax()}, whose ring of {self.ring_length} "
                "takes at most half its length: raise capacity or write fewer records at a time"
            )
        written, announced = self._written.numpy(), self._announced.numpy()
        self._await_write_limit(np.flatnonzero(counts))
        order = np.argsort(stream, kind="stable")  # [R] stream by stream, each in time order
        stream, nth = enumerate_runs(counts)  # [R], [R]
        rows = self._rows(stream, written[stream] + nth)  # [R]
        # Other processes write the counters of the other streams: touch none of those.
        mine = np.flatnonzero(counts)
        end = written[mine] + counts[mine]
        announced[mine] = np.maximum(announced[mine], end)
        for key in self._layout:
            self._put(key, rows, records.get(key), order)
        written[mine] = end

    @property
    def write_limit(self) -> int:
        """Records of one stream at which its writer begins to wait; overshot by at most one call of `extend`."""
        return int(self._write_limit)

    @write_limit.setter
    def write_limit(self, limit: int) -> None:
        self._write_limit.fill_(limit)

    def release(self) -> None:
        """Lift the write limit, so that every waiting writer goes on at once."""
        self.write_limit = UNLIMITED

    @property
    def shared(self) -> bool:
        """Whether copies of this object in other processes write into the same memory."""
        return self._written.is_shared()

    def share(self) -> None:
        """Move records and counters into shared memory; a second call does nothing.

        Raises:
            RuntimeError: the records live on a CUDA device.
            MemoryError: the shared memory file system has too little room.
        """
        if self.shared:
            return
        if self._storage.device.type != "cpu":
            raise RuntimeError(f"records on {self._storage.device} cannot be shared: use storage_device='cpu'")
        if not self._storage.is_memmap():
            folder = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
            self._claim(f"shared memory ({folder})", shutil.disk_usage(folder).free)
            private, self._storage = self._storage, self._storage.memmap_like()
            held = int(self._written.clamp(max=self.ring_length).max())
            for key in self._layout:
                source, target = (self._by_stream(leaf)[:, :held] for leaf in (private[key], self._storage[key]))
                target.copy_(source)
        for counter in (self._announced, self._written, self._write_limit):
            counter.share_memory_()

    def __reduce__(self):
        """A copy in another process is a plain `RecordRings`: it writes, and knows nothing of a reader."""
        if not self.shared:
            raise RuntimeError("a copy of an unshared replay would write into memory of its own: call share()")
        return _attach, ({name: vars(self)[name] for name in WRITER_FIELDS},)

    def _oldest(self) -> np.ndarray:
        """Position of the oldest record that nobody is overwriting, per stream [S]."""
        return np.maximum(self._announced.numpy() - self.ring_length, 0)

    def _readable(self) -> tuple[np.ndarray, np.ndarray]:
        """Oldest readable position and first unwritten one, per stream [S], [S], both of one moment."""
        while True:
            written = self._written.numpy().copy()
            oldest = np.minimum(self._oldest(), written)
            if np.array_equal(written, self._written.numpy()):
                return oldest, written

    def _rows(self, stream: np.ndarray, position: np.ndarray) -> torch.Tensor:
        """Storage rows of records given by stream and position."""
        rows = torch.from_numpy(stream * self.ring_length + position % self.ring_length)
        return rows.to(self._storage.device)

    def _put(self, key: NestedKey, rows: torch.Tensor, value: torch.Tensor, picked: np.ndarray) -> None:
        """Write the entries `picked` [R] of a leaf [*, *shape] into storage rows [R]."""
        leaf = self._storage.get(key)
        value = value.index_select(0, torch.from_numpy(picked).to(value.device)).to(leaf.device)
        if leaf[0].nbytes % 8 == 0:
            # index_copy_ moves single elements: eight bytes at a time instead of one for uint8.
            width = leaf[0].numel()
            leaf, value = (x.reshape(len(x), width).view(torch.int64) for x in (leaf, value))
        leaf.index_copy_(0, rows, value)

    def _get(self, key: NestedKey, rows: torch.Tensor, *, pin: bool = False) -> torch.Tensor:
        """Copy one leaf of storage rows [...] into a fresh tensor [..., *shape].

        `index_select` moves whole rows and so runs as fast as memcpy, wrapped windows or not; indexing with
        brackets moves single elements and takes many times longer on uint8.
        """
        leaf = self._storage.get(key)
        shape = (rows.numel(), *leaf.shape[1:])
        out = torch.empty(shape, dtype=leaf.dtype, device=leaf.device, pin_memory=pin)
        return torch.index_select(leaf, 0, rows.flatten(), out=out).unflatten(0, rows.shape)

    def _by_stream(self, leaf: torch.Tensor) -> torch.Tensor:
        """View a leaf of the storage [S * L, *shape] as bytes [S, L, record bytes]."""
        return leaf.flatten().view(torch.uint8).view(self.num_streams, self.ring_length, -1)

    def _describe_layout(self) -> dict[str, object]:
        records = {str(key): f"{list(shape)} {dtype}" for key, (shape, dtype) in self._layout.items()}
        return {"num_streams": self.num_streams, "ring_length": self.ring_length} | records

    def _write_files(self, folder: Path, held: np.ndarray) -> None:
        """Write the first `held` [S] slots of every ring, one file of raw bytes per key."""
        for key in self._layout:
            with open(folder / _file_name(key), "wb") as file:
                for rows, count in zip(self._by_stream(self._storage.get(key)), held, strict=True):
                    file.write(rows[:count].cpu().numpy())
                bring_to_disk(file)

    def _read_files(self, folder: Path, held: np.ndarray) -> None:
        """Read back what `_write_files` wrote."""
        for key in self._layout:
            path = folder / _file_name(key)
            expected = int(held.sum()) * self._storage.get(key)[0].nbytes
            if path.stat().st_size != expected:
                raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {expected}: it is damaged")
            with open(path, "rb") as file:
                for rows, count in zip(self._by_stream(self._storage.get(key)), held, strict=True):
                    stored = np.fromfile(file, np.uint8, rows[:count].numel())
                    rows[:count] = torch.from_numpy(stored).view(rows[:count].shape)

    def _read_streams(self, records: TensorDictBase) -> np.ndarray:
        """Stream numbers [R], checked."""
        stream = records.get("stream", None)
        if stream is None:
            raise ValueError(f"records have no 'stream' key, only {sorted(map(str, records.keys()))}")
        stream = stream.reshape(-1).cpu().numpy()  # [R]
        if stream.shape != tuple(records.batch_size) or stream.dtype.kind not in "iu":
            raise ValueError(f"stream has shape {stream.shape}, {stream.dtype}: give one integer per record")
        if ((stream < 0) | (stream >= self.num_streams)).any():
            wrong = sorted(set(stream.tolist()) - set(range(self.num_streams)))
            raise ValueError(f"streams {wrong} are not in 0..{self.num_streams - 1}")
        return stream.astype(np.int64)

    def _check(self, data: TensorDictBase, keys) -> None:
        """Refuse data whose keys, shapes behind the batch axes or dtypes are not those of the records."""
        given = {key: (x.shape[data.batch_dims :], x.dtype) for key, x in data.items(True, True)}
        expected = {key: self._layout[key] for key in keys}
        if given != expected:
            wrong = [key for key in given.keys() | expected.keys() if given.get(key) != expected.get(key)]
            raise ValueError(
                "; ".join(
                    f"{key!r}: expected {_spell(expected.get(key))}, got {_spell(given.get(key))}"
                    for key in sorted(wrong, key=str)
                )
            )

    def _claim(self, place: str, free: int) -> None:
        """Note where the records will live, and refuse if they do not fit there."""
        self._place = place
        if self.planned_bytes > free:
            raise MemoryError(
                f"{self.describe()}: needs {self.planned_bytes:,} bytes, {free:,} are free. Lower capacity to "
                f"{free // self.record_bytes:,}, or keep the records on a larger disk with memmap_dir"
            )

    def _await_write_limit(self, streams: np.ndarray) -> None:
        parent = multiprocessing.parent_process()
        written = self._written.numpy()
        while (written[streams] >= self.write_limit).any() and (parent is None or parent.is_alive()):
            time.sleep(WAIT_SECONDS)


def enumerate_runs(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number `counts[e]` items of each e: counts [2, 0, 1] give e = [0, 0, 2] and items [0, 1, 0]."""
    first = np.repeat(counts.cumsum() - counts, counts)
    return np.repeat(np.arange(len(counts)), counts), np.arange(counts.sum()) - first


def bring_to_disk(file: IO) -> None:
    """Wait until what was written to an open file is on the disk, where a power cut cannot reach it."""
    file.flush()
    os.fsync(file.fileno())


def _attach(fields: dict) -> RecordRings:
    rings = RecordRings.__new__(RecordRings)
    vars(rings).update(fields)
    return rings


def _file_name(key: NestedKey) -> str:
    return f"{key if isinstance(key, str) else '.'.join(key)}.bin"


def _spell(leaf: tuple[torch.Size, torch.dtype] | None) -> str:
    return "nothing" if leaf is None else f"{list(leaf[0])} {leaf[1]}"
