"""What containers leave, from made-up control groups."""

import os
from types import SimpleNamespace

import pytest

from dreamer import memory_limits
from dreamer.memory_limits import available_cores, available_memory

GB = 10**9


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with 64 GB free and 8 cores; returns a function that writes its control groups."""
    monkeypatch.setattr(memory_limits.psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GB))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(memory_limits, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory_limits, "MEMBERSHIP", tmp_path / "membership")

    def write(membership: str, **files: str) -> None:
        (tmp_path / "membership").write_text(membership)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


def test_a_machine_without_limits(machine):
    assert (available_memory(), available_cores()) == (64 * GB, 8)
    machine("0::/user\n", **{"user/memory.max": "max\n", "user/memory.current": "7\n", "user/cpu.max": "max 100000\n"})
    assert (available_memory(), available_cores()) == (64 * GB, 8)


def test_version_2(machine):
    """Files that the kernel may drop do not count as used; the tightest group decides."""
    machine(
        "0::/pod/box\n",
        **{
            "pod/box/memory.max": f"{16 * GB}\n",
            "pod/box/memory.current": f"{6 * GB}\n",
            "pod/box/memory.stat": f"anon 1\ninactive_file {2 * GB}\n",
            "pod/memory.max": f"{13 * GB}\n",
            "pod/memory.current": f"{6 * GB}\n",
            "pod/cpu.max": "250000 100000\n",
        },
    )
    assert (available_memory(), available_cores()) == (7 * GB, 2.5)


def test_version_1(machine):
    """The path is the one outside of the container: only the root is there."""
    machine(
        "4:memory:/docker/box\n3:cpu,cpuacct:/docker/box\n0::/\n",
        **{
            "memory/memory.limit_in_bytes": f"{8 * GB}\n",
            "memory/memory.usage_in_bytes": f"{3 * GB}\n",
            "memory/memory.stat": f"inactive_file 5\ntotal_inactive_file {GB}\n",
            "cpu/cpu.cfs_quota_us": "150000\n",
            "cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert (available_memory(), available_cores()) == (6 * GB, 1.5)


def test_version_1_without_limits(machine):
    machine(
        "4:memory:/\n1:cpu:/\n",
        **{
            "memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
            "memory/memory.usage_in_bytes": "0\n",
            "cpu/cpu.cfs_quota_us": "-1\n",
            "cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert (available_memory(), available_cores()) == (64 * GB, 8)


def test_a_full_container_leaves_nothing(machine):
    machine("0::/\n", **{"memory.max": "100\n", "memory.current": "130\n"})
    assert available_memory() == 0


def test_affinity(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert available_cores() == 1
