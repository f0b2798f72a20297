"""What a line of the log is made of: means of metrics, rates of what is counted, and where the time goes."""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Progress(NamedTuple):
    """Counts since the start of the run, and when they were taken."""

    frames: int
    updates: int
    time: float


class Meter:
    """Averages of metrics between two lines of the log, the rates of what is counted, and shares of the time.

    Values on a device are added up there and read in one transfer.

    Args:
        interval: Frames between two lines.
        seconds: Seconds between two lines; whichever comes first.
        total_frames: Budget of the run, for the time left.
        train_ratio: Intended train ratio, for the time left; None if the agent itself decides how much it learns.
        frames_per_update: Replayed frames of one update.
    """

    def __init__(
        self, interval: int, seconds: float, *, total_frames: int, train_ratio: float | None, frames_per_update: int
    ):
        self.interval, self.seconds, self.frames_per_update = interval, seconds, frames_per_update
        self.total_frames, self.train_ratio = total_frames, train_ratio
        self.sums: dict[str, list] = {}  # name -> [sum, count]
        self.timers: dict[str, Timer] = {}
        self.running: list[list] = []  # [timer, since when, seconds that belong to timers inside], outermost first
        self.last = Progress(0, 0, time.monotonic())
        self.learning_since: Progress | None = None

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Add one observation of each metric. A whole number counts something: of those the last one stands."""
        for name, value in metrics.items():
            whole = not value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, int)
            entry = self.sums[name] = [0.0, 0] if whole else self.sums.get(name, [0.0, 0])
            entry[0] = entry[0] + (value.detach() if isinstance(value, Tensor) else value)
            entry[1] += 1

    def time(self, name: str) -> "Timer":
        """Count the wall time inside ``with meter.time(name):``; a timer inside takes its time from the one around."""
        timer = self.timers.get(name)
        if timer is None:
            timer = self.timers[name] = Timer(self.running)
        return timer

    def move(self, source: str, target: str, seconds: float) -> None:
        """Count ``seconds``, which were measured inside ``source`` by other means, for ``target`` instead."""
        self.time(source).seconds -= seconds
        self.time(target).seconds += seconds

    def due(self, frames: int) -> bool:
        """Whether it is time for a line."""
        return frames - self.last.frames >= self.interval or time.monotonic() - self.last.time >= self.seconds

    def read(self, *, frames: int, updates: int) -> dict[str, float]:
        """Return means, rates and shares of the time since the previous line and the time left, and start again.

        Args:
            frames, updates: Counts since the start of the run.
        """
        now, last = Progress(frames, updates, time.monotonic()), self.last
        if self.learning_since is None and updates:
            self.learning_since = last
        elapsed = max(now.time - last.time, 1e-9)
        metrics = {
            "trainer/updates": float(updates),
            "trainer/updates_per_second": (updates - last.updates) / elapsed,
        }
        if frames > last.frames:  # else the collector waits for the learner, and the last figure holds
            metrics["collector/fps"] = (frames - last.frames) / elapsed
        metrics |= self._pace(now) | self._shares(now.time, elapsed)
        metrics |= {name: total / count for name, (total, count) in self._read_sums().items()}
        self.sums, self.last = {}, now
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """What a line still lacks, and how long ago its parts began."""
        now = time.monotonic()
        self._settle(now)
        return {
            "last": _to_age(self.last, now),
            "learning_since": [] if self.learning_since is None else _to_age(self.learning_since, now),
            "timers": [[name, timer.seconds] for name, timer in self.timers.items()],
            "sums": [[name, total, count] for name, (total, count) in self._read_sums().items()],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on as if no time had passed since :meth:`state_dict`."""
        now = time.monotonic()
        self.last = _from_age(state_dict["last"], now)
        self.learning_since = _from_age(state_dict["learning_since"], now) if state_dict["learning_since"] else None
        for name, seconds in state_dict["timers"]:
            self.time(name).seconds = seconds
        self.sums = {name: [total, count] for name, total, count in state_dict["sums"]}

    def _read_sums(self) -> dict[str, tuple[float, int]]:
        values = [torch.as_tensor(total, dtype=torch.float32) for total, _ in self.sums.values()]
        if not values:
            return {}
        device = max((value.device for value in values), key=lambda device: device.type != "cpu")
        totals = torch.stack([value.to(device) for value in values]).tolist()
        return {name: (total, self.sums[name][1]) for name, total in zip(self.sums, totals, strict=True)}

    def _shares(self, now: float, elapsed: float) -> dict[str, float]:
        """Share of each timer, and of what none of them saw."""
        self._settle(now)
        shares = {f"time/{name}": timer.seconds / elapsed for name, timer in self.timers.items()}
        for timer in self.timers.values():
            timer.seconds = 0.0
        return shares | {"time/other": max(1 - sum(shares.values()), 0.0)} if shares else {}

    def _settle(self, now: float) -> None:
        """Count what running timers have measured so far, so that it falls into this line."""
        inside = 0.0
        for entry in reversed(self.running):
            timer, start, within = entry
            timer.seconds += now - start - within - inside
            inside, entry[1], entry[2] = now - start, now, 0.0

    def _pace(self, now: Progress) -> dict[str, float]:
        """Train ratio and seconds left, from the pace since learning began; the slower of frames and updates counts.

        An agent that decides itself how much it learns has no train ratio, and its time left is that of the frames;
        what it does when all frames were collected takes a time that nobody knows.
        """
        since, paced = self.learning_since, self.train_ratio is not None
        if since is None:
            return {"trainer/train_ratio": 0.0} if paced else {}
        paces, metrics = [(self.total_frames, now.frames, since.frames)], {}
        if paced:
            updates_per_frame = self.train_ratio / self.frames_per_update
            due = since.updates + (self.total_frames - since.frames) * updates_per_frame
            paces.append((due, now.updates, since.updates))
            replayed = (now.updates - since.updates) * self.frames_per_update
            metrics["trainer/train_ratio"] = replayed / max(now.frames - since.frames, 1)
        if paced or now.frames < self.total_frames:
            remaining = [(total - count) / (count - start) for total, count, start in paces if count > start]
            metrics["trainer/eta_seconds"] = (now.time - since.time) * max([0.0, *remaining])
        return metrics


class Timer:
    """Add up wall seconds in ``with``; made by :meth:`Meter.time`."""

    __slots__ = ("running", "seconds")

    def __init__(self, running: list[list]):
        self.running, self.seconds = running, 0.0

    def __enter__(self) -> None:
        self.running.append([self, time.monotonic(), 0.0])

    def __exit__(self, *_: object) -> None:
        _, start, inside = self.running.pop()
        elapsed = time.monotonic() - start
        self.seconds += elapsed - inside
        if self.running:
            self.running[-1][2] += elapsed


def _to_age(progress: Progress, now: float) -> list[float]:
    return [progress.frames, progress.updates, now - progress.time]


def _from_age(entry: list[float], now: float) -> Progress:
    frames, updates, age = entry
    return Progress(int(frames), int(updates), now - age)
