"""Signals that end a run: finish the update, save, exit with a code of its own."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torchrl.trainers import Trainer

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: everything is saved, the same command with resume=auto goes on
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@contextmanager
def stop_on_signals(trainer: Trainer) -> Iterator[None]:
    """Let a signal stop the trainer at the next update; a second Ctrl-C ends it at once, without saving.

    Handlers are set even where the parent shell ignores a signal (background jobs ignore SIGINT), but for SIGHUP, which
    ``nohup`` ignores on purpose.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if trainer.should_stop() and number == signal.SIGINT:
            raise KeyboardInterrupt
        trainer.request_stop(signal.Signals(number).name)  # no more: a handler must not write to files

    numbers = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
