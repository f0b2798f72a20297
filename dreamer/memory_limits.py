"""What a container leaves to this process: memory and processor time, which the machine's own figures overstate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, or of the tightest container limit around it."""
    return min([psutil.virtual_memory().available, *_left_in_containers()])


def available_cores() -> float:
    """Processor cores that this process may use: its affinity, or the tightest quota of a container around it."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores: list[float] = [len(affinity(0)) if affinity else os.cpu_count() or 1]
    for folder in _groups("cpu"):
        quota, period = (
            _words(folder / "cpu.max")
            or (
                *_words(folder / "cpu.cfs_quota_us"),
                *_words(folder / "cpu.cfs_period_us"),
            )
            or ("max", "0")
        )
        if quota.isdigit() and int(period):  # version 1 writes -1 for no limit, version 2 writes max
            cores.append(int(quota) / int(period))
    return min(cores)


def _left_in_containers() -> Iterator[int]:
    """Limit less use of every control group around this process that has a limit; files that can go count as free."""
    for folder in _groups("memory"):
        for limit, usage, cache in (
            ("memory.max", "memory.current", "inactive_file"),  # version 2
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
        ):
            (most,) = _words(folder / limit) or ("max",)
            (used,) = _words(folder / usage) or ("0",)
            if most.isdigit():
                yield max(int(most) - int(used) + _stat(folder / "memory.stat", cache), 0)


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process is in, from its own to the outermost, versions 1 and 2."""
    for line in _lines(MEMBERSHIP):
        _, names, path = line.split(":", 2)
        if not names or controller in names.split(","):
            root = CGROUPS / controller if names else CGROUPS
            # Inside a container the path may be the one outside of it: then only the root is there.
            own = root / path.lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder == root or root in folder.parents)


def _stat(file: Path, key: str) -> int:
    return next((int(line.split()[1]) for line in _lines(file) if line.split()[:1] == [key]), 0)


def _words(file: Path) -> tuple[str, ...]:
    return tuple(word for line in _lines(file) for word in line.split())


def _lines(file: Path) -> list[str]:
    """Lines of a small system file; none if it cannot be read."""
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
