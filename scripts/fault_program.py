"""A small training run as a program of its own, to be watched and tormented from outside."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

from dreamer.checkpoint_files import list_checkpoints, read_manifest

sys.path.append(str(Path(__file__).parents[1]))  # the tests are no installed package

from tests.helpers import SMALL_RUN

ROOT = Path(__file__).parents[1]
PROGRAM = ("threads=1", "logger.interval=32", "replay_buffer.size=64")  # small, so that the rings are full soon
ENDLESS = "collector.total_frames=1_000_000_000"
IGNORING_SIGINT = ("sh", "-c", "trap '' INT; exec \"$@\"", "sh")  # as a shell starts its background jobs
COMPARED = r"-(loss|optimization_stepper|replay)/\w+\.bin$"  # not what has times in it


class Program:
    """``python dreamer/train.py`` with the settings of a small run, in a process group of its own.

    Output goes to a file beside the run folder. Leaving the ``with`` block kills whatever is left of the program.

    Args:
        run_dir: Run folder.
        overrides: Take the place of those of the small run.
        ignore_sigint: Start it as a shell starts background jobs.
        environment: Variables to add.
    """

    def __init__(
        self, run_dir: Path, *overrides: str, ignore_sigint: bool = False, environment: Mapping[str, str] | None = None
    ):
        self.run_dir, self.log = run_dir, run_dir.with_suffix(".log")
        settings = merge_overrides(SMALL_RUN, (*PROGRAM, f"run_dir={run_dir}", *overrides))
        command = [*IGNORING_SIGINT] if ignore_sigint else []
        command += [sys.executable, "dreamer/train.py", *settings]
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {}),
            )
        self.start = time.monotonic()
        self.seen: dict[int, psutil.Process] = {}  # every process that ever belonged to it

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        self.family()
        for process in [*self.seen.values(), self.process]:
            if process.is_running() if isinstance(process, psutil.Process) else process.poll() is None:
                process.kill()
        self.process.wait()

    def family(self) -> list[psutil.Process]:
        """The program and all its descendants that are alive."""
        try:
            program = psutil.Process(self.process.pid)
            found = [program, *program.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        self.seen |= {process.pid: process for process in found}
        return found

    def workers(self) -> list[psutil.Process]:
        """The processes that collect, in order."""
        return [process for process in self.family()[1:] if "spawn_main" in " ".join(process.cmdline())]

    def signal(self, number: int, *, group: bool = False) -> float:
        """Send a signal to the program, or to its whole group as a terminal does; return the time."""
        self.family()
        now = time.monotonic()
        if group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        return now

    def wait_until(self, what: str, condition: Callable[[], Any], seconds: float = 60) -> Any:
        """Wait until the condition is true and return what it gave.

        Raises:
            TimeoutError: with the end of the program's output.
        """
        end = time.monotonic() + seconds
        while True:
            running = self.process.poll() is None
            if result := condition():
                return result
            if not running or time.monotonic() > end:
                state = f"still runs after {seconds:g} s" if running else f"ended with {self.process.returncode}"
                raise TimeoutError(f"no {what}: the program {state}; it said:\n{self.output()[-3000:]}")
            time.sleep(0.02)

    def wait_for_updates(self, more_than: float = 0) -> dict[str, Any]:
        """Wait for a line of metrics with more than so many updates."""

        def find() -> dict[str, Any] | None:
            lines = self.metrics()
            return lines[-1] if lines and lines[-1].get("trainer/updates", 0) > more_than else None

        return self.wait_until(f"more than {more_than:g} updates", find)

    def wait_for_incident(self, kind: str, number: int = 1, seconds: float = 60) -> dict[str, Any]:
        """Wait for the first or a later incident of a kind."""
        found = self.wait_until(
            f"incident {kind} number {number}",
            lambda: (found := self.incidents(kind)) and len(found) >= number and found,
            seconds,
        )
        return found[number - 1]

    def end(self, seconds: float = 60) -> int:
        """Wait for the end of the program and return its exit code, negative for a signal."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"the program still runs after {seconds:g} s:\n{self.output()[-3000:]}") from error

    def orphans(self, seconds: float = 10) -> int:
        """Processes of the program that are left when it was given some time after its end."""
        _, alive = psutil.wait_procs(self.seen.values(), timeout=seconds)
        return len([process for process in alive if process.status() != psutil.STATUS_ZOMBIE])

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.run_dir / "metrics.jsonl")

    def incidents(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in read_lines(self.run_dir / "incidents.jsonl") if line["kind"] == kind]


def merge_overrides(base: Iterable[str], overrides: Iterable[str]) -> list[str]:
    """Overrides in which later ones replace earlier ones of the same key."""
    return list({text.partition("=")[0]: text for text in (*base, *overrides)}.values())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects."""
    content = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]


def saved_frames(run_dir: Path) -> int | None:
    """Frames of the newest checkpoint of a run."""
    found = list_checkpoints(run_dir / "checkpoints")
    return read_manifest(found[-1])["frames"] if found else None


def fingerprint(run_dir: Path) -> dict[str, str]:
    """sha256 of every file of tensors of the networks, the optimiser and the records in the newest checkpoint."""
    files = read_manifest(list_checkpoints(run_dir / "checkpoints")[-1])["files"]
    return {name: file["sha256"] for name, file in files.items() if re.search(COMPARED, name)}


def compare(left: Path, right: Path) -> dict[str, Any]:
    """How many files of tensors two runs have in common."""
    first, second = fingerprint(left), fingerprint(right)
    same = sum(first.get(name) == digest for name, digest in second.items())
    return {"files": len(first.keys() | second.keys()), "files that differ": len(first.keys() | second.keys()) - same}


def run(run_dir: Path, *overrides: str, seconds: float = 300) -> None:
    """Run the program to its end.

    Raises:
        RuntimeError: if it fails, with the end of its output.
    """
    with Program(run_dir, *overrides) as program:
        if code := program.end(seconds):
            raise RuntimeError(f"the program ended with {code}:\n{program.output()[-3000:]}")
