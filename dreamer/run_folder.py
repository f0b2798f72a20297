"""The folder of a run: its name, and whose it is."""

import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

RUNS = Path("runs")


def name_run(config: Mapping[str, Any]) -> str:
    """``<agent>_<env>_<task>_<seed>``, what is left of it if there is no task."""
    env = config["env"]
    parts = (config["agent"]["name"], env["name"], env["task"], config["seed"])
    return "_".join(re.sub(r"[^\w.-]", "-", str(part)) for part in parts if part is not None)


def new_run_dir(config: Mapping[str, Any]) -> Path:
    """The folder of a new run; it is not made yet.

    Raises:
        FileExistsError: if the folder that the user names holds a run already.
    """
    name = f"{name_run(config)}_{datetime.now().strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(config["run_dir"] or RUNS / name)
    if holds_run(run_dir):
        raise FileExistsError(f"run_dir={run_dir}: holds a run already; name another folder, or go on with resume=auto")
    return run_dir


def latest_run_dir(config: Mapping[str, Any]) -> Path | None:
    """The newest run of the same agent, environment, task and seed below ``runs``."""
    name = name_run(config)
    found = [path for path in RUNS.glob(f"{name}_*") if holds_run(path) and is_time(path.name[len(name) + 1 :])]
    return max(found, key=lambda path: path.name, default=None)


def is_time(text: str) -> bool:
    """Whether ``text`` is what :func:`new_run_dir` puts behind a name."""
    try:
        return bool(datetime.strptime(text, "%Y%m%d-%H%M%S"))
    except ValueError:
        return False


def holds_run(path: Path) -> bool:
    """Whether a run was started in this folder."""
    return (path / "config.yaml").exists()


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the folder for one process. It is made, and removed again if nothing is written into it.

    Raises:
        BlockingIOError: if another process trains in it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    handle = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"run_dir={run_dir}: another process trains in this folder") from error
        yield
    finally:
        os.close(handle)
        if not any(run_dir.iterdir()):
            run_dir.rmdir()
