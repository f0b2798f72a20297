"""Notice workers that died or hang, because nobody else would."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

import numpy as np
import psutil
from torchrl.collectors import BaseCollector

from dreamer.replay import SequenceReplay


class WorkerFailure(RuntimeError):  # noqa: N818  "except WorkerFailure" says it
    """A worker process of the collector is dead or stuck."""


class Watchdog:
    """Notices collector workers that died or stopped, so that a run ends with an error instead of hanging.

    Args:
        collector: Its workers are watched, if it has any.
        replay: Where they write, to see whether they get on.
        timeout: Seconds without progress after which a worker counts as stuck.
    """

    def __init__(self, collector: BaseCollector, replay: SequenceReplay, timeout: float):
        self.workers = list(getattr(collector, "procs", ()))
        self.replay, self.timeout = replay, timeout
        self.counts = replay.stream_counts
        self.last_progress = np.full(len(self.counts), time.monotonic())

    def check(self) -> None:
        """Look at free-running workers; to be called often.

        Raises:
            WorkerFailure: if a worker is dead, or has written nothing for ``timeout`` seconds although it may.
        """
        self._raise_if_dead()
        now, counts = time.monotonic(), self.replay.stream_counts
        waiting = counts >= self.replay.write_limit  # for the learner
        self.last_progress[(counts != self.counts) | waiting] = now
        self.counts = counts
        stuck = np.flatnonzero(now - self.last_progress > self.timeout)
        if len(stuck):
            worker = int(stuck[0]) * len(self.workers) // len(counts)
            description = self._describe(worker)
            self.kill()
            raise WorkerFailure(f"collector {description} wrote nothing for {self.timeout:g} s: {self._advice()}")

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Guard a call that waits for the workers: after ``timeout`` seconds they are killed and the call ends.

        Raises:
            WorkerFailure: if that was necessary, or a worker is dead.
        """
        expired: list[str] = []

        def expire() -> None:
            expired.extend(self._describe(i) for i in range(len(self.workers)))
            self.kill()

        timer = threading.Timer(self.timeout, expire) if self.workers else None
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            yield
        except (RuntimeError, ValueError) as error:  # ValueError: TorchRL closes processes before they have ended
            if expired:
                states = ", ".join(expired)
                raise WorkerFailure(
                    f"no batch for {self.timeout:g} s from collector {states}: {self._advice()}"
                ) from error
            self._raise_if_dead()
            if self.workers:
                raise WorkerFailure(str(error)) from error
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def kill(self) -> None:
        """End every worker at once, also one that is stopped and would not answer a request."""
        for process in self.workers:
            if is_alive(process):
                process.kill()

    def _raise_if_dead(self) -> None:
        """Name the first worker that ended by itself; those that TorchRL ended, because of it, are closed."""
        for index, process in enumerate(self.workers):
            exitcode = exit_code(process)
            if exitcode is not None:
                raise WorkerFailure(
                    f"collector worker {index} (pid {process.pid}) died with exit code {exitcode}"
                    f"{signal_name(exitcode)}; its own output says why"
                )

    def _describe(self, index: int) -> str:
        process = self.workers[index]
        try:
            state = psutil.Process(process.pid).status()
        except psutil.Error:
            state = "gone"
        return f"worker {index} (pid {process.pid}, {state})"

    def count_alive(self) -> int:
        """Workers that run."""
        return sum(is_alive(process) for process in self.workers)

    @staticmethod
    def _advice() -> str:
        return "if the environment is just slow, raise collector.timeout"


def is_alive(process: BaseProcess) -> bool:
    """Whether a process runs; TorchRL closes the objects of those that it has ended."""
    try:
        return process.is_alive()
    except ValueError:
        return False


def exit_code(process: BaseProcess) -> int | None:
    """Exit code of a process that ended and was not closed."""
    try:
        return process.exitcode
    except ValueError:
        return None


def signal_name(exitcode: int | None) -> str:
    """ " (SIGKILL)" for an exit code of -9, empty for an ordinary one."""
    return f" ({signal.Signals(-exitcode).name})" if exitcode is not None and exitcode < 0 else ""
