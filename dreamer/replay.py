"""Replay of contiguous windows, one ring per environment stream. The layout of data over time is defined here.

A record is what there is at one observation. An episode of N steps makes N + 1 of them: `env.step(a1)` leads from
o1 to o2 and makes the record (o2, a1, r2, ...). One stream, the last steps of an episode and the start of the next:

    position        40     41     42     43  |  44     45     46
    observation     o0     o1     o2     o3  |  o0'    o1'    o2'     pixels, observation: seen here
    action           0     a0     a1     a2  |   0     a0'    a1'     the action that LED HERE, zero at a start
    reward           0     r1     r2     r3  |   0     r1'    r2'     received on arriving here
    is_init          1      0      0      0  |   1      0      0
    done             0      0      0      1  |   0      0      0      `terminated` likewise
    belief, state   z0     z1     z2      0  |  z0'    z1'    z2'     posterior after seeing this observation; zero
                                                                      at an end, where nothing starts from it

A window is T + 1 records in a row and may cross episodes; here T = 4, from position 41:

    context                z1                                         the model starts from it
    training steps                o2     o3  |  o0'    o1'            z1, a1, o2 give the posterior of 42, and so on;
                                  a1     a2  |   0     a0'            where is_init is set, the model forgets its
                                  r2     r3  |   0     r1'            latent and the action is zero

    sample() -> [B]    pixels [B, T, h, w, 3], action [B, T, A], reward [B, T, 1], is_init [B, T, 1], ...
                       ("context", "belief") [B, D] and ("context", "state") [B, S]: z1
                       ("context", "stream") [B] and ("context", "position") [B]: the stream, and 42
    write_context(stream, position, new posteriors [B, T]) puts them into records 42, 43, 44, 45
"""

import json
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key

from dreamer.replay_storage import RecordRings, bring_to_disk, enumerate_runs

STATE_FILE = "replay.json"
SEARCH_SPAN = 1024  # records of each stream that `newest` looks at first


class SequenceReplay(RecordRings):
    """Draws windows of T + 1 consecutive records of one stream, uniformly over all that are held.

    Batches are fresh tensors that belong to the caller. With `prefetch=0` everything is a function of the seed
    and the calls made. With `prefetch=n` a thread prepares n batches ahead, which are older by as much: a write
    back may reach a record after its old latent was drawn. The reader is one process; after `share()`, the
    copies of this object in other processes can only write (`RecordRings`).

    Args:
        record: example of one record, batch size []; gives keys, shapes and dtypes.
        capacity: records over all streams; rounded down to a multiple of `num_streams`.
        num_streams: number of environments, each the only writer of its ring.
        batch_size: windows per batch, B.
        sequence_length: training steps per window, T.
        context_keys: latents in the record, handed out for the context record only.
        online: hand out each new, non-overlapping window of a stream once before drawing uniformly.
        device: where batches are delivered; CPU records go to a CUDA device through pinned memory.
        storage_device: where the records live, "cpu" or "cuda" (writers then share the process).
        memmap_dir: folder for memory-mapped files; None keeps the records in memory.
        prefetch: batches prepared ahead by a thread; 0 prepares them in `sample`.
        seed: of the private generator that draws the windows.

    Raises:
        ValueError: settings that contradict each other, or rings shorter than two windows.
        MemoryError: the records do not fit; raised before anything is allocated.
    """

    def __init__(
        self,
        record: TensorDictBase,
        *,
        capacity: int,
        num_streams: int,
        batch_size: int,
        sequence_length: int,
        context_keys: Sequence[NestedKey] = ("belief", "state"),
        online: bool = True,
        device: torch.device | str = "cpu",
        storage_device: torch.device | str = "cpu",
        memmap_dir: str | Path | None = None,
        prefetch: int = 0,
        seed: int = 0,
    ) -> None:
        if batch_size < 1 or sequence_length < 1:
            raise ValueError(f"batch_size={batch_size}, sequence_length={sequence_length}: both must be positive")
        needed = 2 * (sequence_length + 1) * num_streams
        if capacity < needed:
            raise ValueError(
                f"capacity={capacity}: {num_streams} streams of two windows of {sequence_length + 1} records "
                f"need {needed}; raise capacity"
            )
        self.context_keys = [unravel_key(key) for key in context_keys]
        if missing := [key for key in self.context_keys if key not in record.keys(True, True)]:
            raise ValueError(f"context_keys {missing} are not in the record: add them, or pass context_keys=()")
        storage_device, self.device = torch.device(storage_device), torch.device(device)
        if storage_device.type == "cuda" and prefetch:
            raise ValueError(f"prefetch={prefetch}: records on a CUDA device are gathered there; use prefetch=0")
        rings = {"capacity": capacity, "num_streams": num_streams, "memmap_dir": memmap_dir}
        super().__init__(record, device=storage_device, **rings)
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self._sequence_keys = [key for key in self._layout if key not in self.context_keys]
        self._pin = self.device.type == "cuda" and storage_device.type == "cpu"
        self._online = online
        self._next_online = np.zeros(num_streams, dtype=np.int64)  # [S] first position not handed out online
        self._next_new = np.zeros(num_streams, dtype=np.int64)  # [S] first position not returned by read_new
        self._settled: dict[NestedKey, np.ndarray] = {}  # flag -> [S] positions below which `newest` need not look
        self._rng = np.random.default_rng(seed)
        self._prefetch = prefetch
        self._executor = ThreadPoolExecutor(1, "replay-prefetch") if prefetch else None
        self._ahead: deque[Future] = deque()

    def can_sample(self) -> bool:
        """Whether some stream holds a whole window; once true it stays true."""
        oldest, written = self._readable()
        return bool((written - oldest > self.sequence_length).any())

    def sample(self) -> TensorDict:
        """Draw a batch of windows.

        Returns:
            [B] with the sequence keys [B, T, ...] as stored, and `context`: the context keys [B, ...] of the
            record before the first training step, `stream` [B] int64 and `position` [B] int64 of that step.

        Raises:
            RuntimeError: no stream holds a whole window yet, or the replay was closed.
        """
        if not self.can_sample():
            raise RuntimeError(
                f"{len(self)} records in {self.num_streams} streams hold no window of "
                f"{self.sequence_length + 1}: collect more, and ask can_sample() first"
            )
        if self._executor is None:
            batch = self._make_batch()
        else:
            while len(self._ahead) <= self._prefetch:
                self._ahead.append(self._executor.submit(self._make_batch))
            batch = self._ahead.popleft().result()
        return batch.to(self.device, non_blocking=True)

    def write_context(self, stream: torch.Tensor, position: torch.Tensor, context: TensorDictBase) -> None:
        """Replace the latents of the training steps of sampled windows, like `write`.

        Args:
            stream, position: [B] as in the sampled `context`.
            context: [B, T] the context keys, in shape and dtype of the record.

        Raises:
            ValueError: missing or unknown keys, a wrong shape or dtype.
        """
        expected = [len(stream), self.sequence_length]
        if list(context.batch_size) != expected:
            raise ValueError(f"context has batch size {list(context.batch_size)} instead of {expected}")
        self._check(context, self.context_keys)
        position = position.cpu()[:, None] + torch.arange(self.sequence_length)  # [B, T]
        self.write(stream.repeat_interleave(self.sequence_length), position.flatten(), context.flatten(0, 1))

    def write(self, stream: torch.Tensor, position: torch.Tensor, values: TensorDictBase) -> int:
        """Replace some entries of records that are held.

        Records that were overwritten meanwhile are left alone; so are, beside writers in other processes, the T oldest
        ones of a full ring, which may be overwritten during this call. Where that happens to another all the same,
        the new record may get values of the old one, but a flag (bool) there ends as false.

        Args:
            stream, position: [R] as `newest` gives them; of a record that is named twice, one value stays.
            values: [R] some keys of the record, in its shape and dtype; a flag that vouches for others comes last.

        Returns:
            How many records were written.

        Raises:
            ValueError: unknown keys, a wrong shape or dtype.
        """
        keys = list(values.keys(True, True))
        self._check(values, [key for key in keys if key in self._layout])
        stream, position, (oldest, written) = stream.cpu().numpy(), position.cpu().numpy(), self._writable()
        held = np.flatnonzero((position >= oldest[stream]) & (position < written[stream]))
        for key in keys:
            self._put(key, self._rows(stream[held], position[held]), values.get(key), held)
            late = held[position[held] < self._oldest()[stream[held]]]
            if len(late) and (flag := values.get(key)).dtype == torch.bool:
                self._put(key, self._rows(stream[late], position[late]), torch.zeros_like(flag), late)
            held = np.setdiff1d(held, late)
        return len(held)

    def newest(self, limit: int, keys: Sequence[NestedKey], *, unset: NestedKey) -> TensorDict:
        """Copy the newest records whose flag is not set, among those that `write` can reach.

        The search goes back as far as it must, and never again to where all flags were set: they must stay so.

        Args:
            limit: how many at most.
            keys: the keys wanted.
            unset: the flag, a key of bool [1].

        Returns:
            [R] with those keys, `stream` [R] and `position` [R] int64, by age in records of the own stream.
        """
        oldest, written = self._writable()
        settled = self._settled.setdefault(unset, np.zeros_like(written))  # [S] below it all flags are set
        np.maximum(settled, oldest, out=settled)
        stream, position = self._find_unset(unset, limit, settled, written)
        if len(position) < limit:
            settled[:] = written
            np.minimum.at(settled, stream, position)
        records = TensorDict({key: self._get(key, self._rows(stream, position)) for key in keys}, [len(stream)])
        records["stream"], records["position"] = torch.from_numpy(stream), torch.from_numpy(position)
        return records[torch.from_numpy(position >= self._oldest()[stream])]

    def read_new(self, keys: Sequence[NestedKey]) -> TensorDict:
        """Copy what was written since the previous call, or is left of it.

        Args:
            keys: the keys wanted.

        Returns:
            [R] with those keys and `stream` [R] int64, in time order within each stream, stream by stream.
        """
        oldest, written = self._readable()
        first = np.maximum(self._next_new, oldest)  # [S]
        stream, nth = enumerate_runs(written - first)  # [R], [R]
        position = first[stream] + nth  # [R]
        rows = self._rows(stream, position)
        records = TensorDict({key: self._get(key, rows) for key in keys}, batch_size=[len(stream)])
        records["stream"] = torch.from_numpy(stream)
        self._next_new = written
        return records[torch.from_numpy(position >= self._oldest()[stream])]

    def truncate(self, streams: Sequence[int] | None = None) -> list[int]:
        """Mark the newest record of streams as the end of its episode, because a restart cut it there.

        The next record of such a stream starts an episode. Without the mark the return of the cut one would run on
        into that. With `done`, and without `terminated`, the critic's target for the record before bootstraps from the
        imagined return of this record, which has no target of its own; the continue head learns that the task goes on.
        The record keeps its latents, the true posterior: an imagination may start there, and as context they only
        reach a record with `is_init`, where the model forgets them.

        Args:
            streams: which; None for all. Nobody may be writing them.

        Returns:
            Those that were marked: not empty and not at an end anyway.
        """
        written = self._written.numpy()
        chosen = np.arange(self.num_streams) if streams is None else np.array(streams, dtype=np.int64)
        chosen = chosen[written[chosen] > 0]
        rows = self._rows(chosen, written[chosen] - 1)
        done = self._get("done", rows)  # [s, 1]
        self._put("done", rows, torch.ones_like(done), np.arange(len(done)))
        return chosen[~done.flatten().cpu().numpy()].tolist()

    def dump(self, path: str | Path) -> None:
        """Write the records held and the reader's state into a folder: raw bytes and JSON.

        That takes `len(self) * self.record_bytes` bytes and a few hundred more. Memory-mapped files of a `memmap_dir`
        stay where they are and are copied like any other records. Everything is on the disk at return.

        Called `dump` so that `torchrl.checkpoint.Checkpoint` takes this object as it is. Others may go on writing.
        Batches prepared ahead are not kept.

        Raises:
            OSError: the disk is full, or something else failed; an incomplete folder is left.
        """
        wait(self._ahead)
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        written = self._written.numpy().copy()
        self._write_files(folder, np.minimum(written, self.ring_length))
        state = {
            "layout": self._describe_layout(),
            "written": written.tolist(),
            "announced": self._announced.tolist(),  # after the copy: what was overwritten meanwhile stays out
            "next_online": self._next_online.tolist(),
            "next_new": self._next_new.tolist(),
            "generator": self._rng.bit_generator.state,
        }
        with open(folder / STATE_FILE, "w") as file:
            file.write(json.dumps(state))
            bring_to_disk(file)

    def load(self, path: str | Path) -> None:
        """Go on from a dump, while nobody writes; with `prefetch=0` the same batches follow as after `dump`.

        The rings may have another length, as in a run that is made longer, as long as no record was overwritten there
        and all fit here.

        Args:
            path: folder that `dump` wrote.

        Raises:
            ValueError: other records, streams or capacity than here, or a file of the wrong size.
        """
        folder = Path(path)
        state = json.loads((folder / STATE_FILE).read_text())
        there, here = state["layout"], self._describe_layout()
        if max(state["written"]) <= min(there["ring_length"], self.ring_length):
            there["ring_length"] = self.ring_length
        if differ := [key for key in there | here if there.get(key) != here.get(key)]:
            differences = ", ".join(f"{key}: {there.get(key)} there, {here.get(key)} here" for key in differ)
            raise ValueError(f"{folder} is of another replay ({differences}): build this one with its settings")
        wait(self._ahead)
        self._ahead.clear()
        written = np.array(state["written"], dtype=np.int64)
        self._read_files(folder, np.minimum(written, self.ring_length))
        self._announced.numpy()[:] = state["announced"]
        self._written.numpy()[:] = written
        self._next_online[:] = state["next_online"]
        self._next_new[:] = state["next_new"]
        self._settled.clear()
        self._rng.bit_generator.state = state["generator"]

    def close(self) -> None:
        """Stop the prefetch thread; `sample` with `prefetch` then raises."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._ahead.clear()

    def __enter__(self) -> "SequenceReplay":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _make_batch(self) -> TensorDict:
        """Draw windows, copy them, and redraw those that a writer reached during the copy."""
        stream, start = self._draw()  # [B], [B]
        batch = self._read_windows(stream, start)
        torn = start < self._oldest()[stream]  # [B]
        while torn.any():
            stream[torn], start[torn] = self._draw_uniform(torn.sum())
            batch[torch.from_numpy(torn)] = self._read_windows(stream[torn], start[torn])
            torn &= start < self._oldest()[stream]
        return batch

    def _writable(self) -> tuple[np.ndarray, np.ndarray]:
        """Like `_readable`, less the T records that other processes may overwrite during a write."""
        written = self._written.numpy().copy()
        ahead = self.sequence_length if self.shared else 0
        return np.clip(self._announced.numpy() + ahead - self.ring_length, 0, written), written

    def _find_unset(self, flag: NestedKey, limit: int, first: np.ndarray, end: np.ndarray):
        """Stream [R] and position [R] of the newest records, first [S] <= position < end [S], whose flag is not set."""
        flags = self._by_stream(self._storage.get(flag))[..., 0]  # [S, L] bytes
        found, age, span = [np.empty(0, np.int64)], 0, SEARCH_SPAN
        while sum(map(len, found)) < limit and (age < end - first).any():
            for stream in np.flatnonzero(age < end - first):
                stop = end[stream] - age
                count = min(span, stop - first[stream])
                slot = (stop - count) % self.ring_length
                parts = flags[stream, slot : slot + count], flags[stream, : max(slot + count - self.ring_length, 0)]
                ages = age + np.flatnonzero(torch.cat(parts).cpu().numpy()[::-1] == 0)[:limit]
                found.append(ages * self.num_streams + stream)
            age, span = age + span, span * 8
        ages, stream = np.divmod(np.sort(np.concatenate(found))[:limit], self.num_streams)
        return stream, end[stream] - 1 - ages

    def _read_windows(self, stream: np.ndarray, start: np.ndarray) -> TensorDict:
        """Copy the windows that begin with the context records `start` [B] of the streams [B]."""
        rows = self._rows(stream[:, None], start[:, None] + np.arange(self.sequence_length + 1))  # [B, T + 1]
        context = {key: self._get(key, rows[:, 0], pin=self._pin) for key in self.context_keys}
        steps = {key: self._get(key, rows[:, 1:], pin=self._pin) for key in self._sequence_keys}
        origin = {"stream": torch.from_numpy(stream), "position": torch.from_numpy(start + 1)}
        batch = TensorDict(steps, batch_size=[len(stream)], device=rows.device)
        batch["context"] = TensorDict(context | origin, batch_size=[len(stream)], device=rows.device)
        return batch

    def _draw(self) -> tuple[np.ndarray, np.ndarray]:
        """Streams and starts of a batch: what is new first, then uniform."""
        stream, start = self._draw_online(self.batch_size if self._online else 0)
        rest = self._draw_uniform(self.batch_size - len(stream))
        return np.concatenate([stream, rest[0]]), np.concatenate([start, rest[1]])

    def _draw_uniform(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Streams and starts of `count` windows, every readable window with the same probability."""
        oldest, written = self._readable()
        windows = np.maximum(written - oldest - self.sequence_length, 0)  # [S]
        ends = windows.cumsum()  # [S]
        nth = self._rng.integers(ends[-1], size=count)
        stream = np.searchsorted(ends, nth, side="right")
        return stream, oldest[stream] + nth - (ends - windows)[stream]

    def _draw_online(self, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """Streams and starts of at most `limit` windows that were never handed out, lowest positions first.

        They lie at the multiples of T + 1, so that the next one of a stream says which were handed out.
        """
        length = self.sequence_length + 1
        oldest, written = self._readable()
        lost = np.maximum(oldest - self._next_online, 0)  # [S] records
        self._next_online += -(-lost // length) * length
        ready = np.clip((written - self._next_online) // length, 0, limit)  # [S] windows
        stream, nth = enumerate_runs(ready)
        start = self._next_online[stream] + nth * length
        first = np.argsort(start, kind="stable")[:limit]
        self._next_online += np.bincount(stream[first], minlength=self.num_streams) * length
        return stream[first], start[first]
