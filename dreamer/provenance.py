"""What a run was started with: the command, the source, the versions and the machine, in `run.json`.

Neither environment variables nor the names of host and user are recorded, and the home folder is written as `~`.
"""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from dreamer.files import write_whole
from dreamer.redaction import redact

FILE = "run.json"
PACKAGES = ("torch", "torchrl", "tensordict", "numpy", "mujoco", "dm_control", "lucid-rl")
SOURCE = Path(__file__).resolve().parents[1]


def record_start(
    run_dir: Path, *, command: Sequence[str], frames: int, resumed_from: str | None, overrides: Sequence[str]
) -> None:
    """Append one start to `run.json`, which is replaced as a whole.

    Args:
        run_dir: Run folder.
        command: Arguments of the program; secrets are redacted by the caller.
        frames: Frames collected before this start.
        resumed_from: Checkpoint that the run goes on from.
        overrides: Of the configuration, redacted as well.

    Raises:
        OSError: if the folder cannot be written.
    """
    import torch  # here, because a report has no need of it

    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "git": describe_source(SOURCE),
        "versions": describe_versions(),
        "hardware": describe_hardware(),
        "process": {"pid": os.getpid(), "threads": torch.get_num_threads()},
        "frames": frames,
        "resumed_from": resumed_from,
        "overrides": list(overrides),
    }
    path = Path(run_dir) / FILE
    write_whole(path, json.dumps({"starts": [*read_starts(path), redact(start)]}, indent=2).encode())


def read_starts(path: Path) -> list[dict[str, Any]]:
    """The starts in a `run.json`; a damaged file is moved to `run.json.damaged` and counts as none."""
    if not path.exists():
        return []
    with suppress(ValueError, TypeError, KeyError):
        starts = json.loads(path.read_text())["starts"]
        if isinstance(starts, list):
            return starts
    path.replace(path.with_name(f"{path.name}.damaged"))
    return []


def describe_source(root: Path) -> dict[str, Any] | None:
    """Commit of a source tree and whether files differ from it; None if it is no git checkout of its own."""
    try:
        top, commit = _git(root, "rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() != root.resolve():  # installed below somebody else's checkout
            return None
        return {"commit": commit, "dirty": bool(_git(root, "status", "--porcelain").strip())}
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=2, check=True).stdout


def describe_versions() -> dict[str, str | None]:
    """Versions of Python and the packages that decide about results; None for one that is absent."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        versions[name] = None
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def describe_hardware() -> dict[str, Any]:
    """Processor, usable cores, memory (GB), names of GPUs, platform."""
    import torch

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in gpus],
        "platform": platform.platform(),
    }


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
