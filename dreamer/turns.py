"""The learner's turns: what a collector gives to the training loop, also when its workers fail."""

import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tensordict import TensorDictBase
from torchrl.collectors import BaseCollector

from dreamer.watchdog import Watchdog, WorkerFailure

if TYPE_CHECKING:
    from dreamer.trainer import Trainer


class Turns:
    """Batches of a collector that waits for the learner, or looks at what free-running workers have written.

    A dead or stuck worker ends the run, or has all workers replaced as often as that is allowed.

    Args:
        trainer: Its collector and replay are used; frames are counted here.
        make_collector: Frames so far -> another collector, in place of one whose workers failed.
        timeout: Seconds after which a silent worker counts as stuck.
        restarts: How many times workers are replaced.
    """

    def __init__(
        self, trainer: "Trainer", make_collector: Callable[[int], BaseCollector], *, timeout: float, restarts: int
    ):
        self.trainer, self.make_collector = trainer, make_collector
        self.timeout, self.restarts_left = timeout, restarts
        self.watchdog = Watchdog(trainer.collector, trainer.replay_buffer, timeout)
        self.collecting = False  # in the middle of a batch, whose steps are not stored yet

    def __iter__(self) -> Iterator[TensorDictBase | None]:
        return self._looks() if self.trainer.free_running else self._batches()

    def _batches(self) -> Iterator[TensorDictBase]:
        """Batches, processed; frames are counted on what is stored."""
        trainer = self.trainer
        batches = iter(trainer.collector)
        while True:
            policy_seconds = float(trainer.collector.policy.clock[0])
            self.collecting = True
            try:
                with trainer.meter.time("env"), self.watchdog.waiting():
                    batch = next(batches)
            except WorkerFailure as failure:
                if trainer.should_stop():  # the same signal may have ended them
                    return
                self._replace_workers(failure)
                batches = iter(trainer.collector)
                continue
            self.collecting = False
            if not self.watchdog.workers:  # the policy ran in this process, inside the collector
                policy_seconds = float(trainer.collector.policy.clock[0]) - policy_seconds
                trainer.meter.move("env", "policy", policy_seconds)
            batch = trainer._process_batch_hook(batch)
            trainer.collected_frames += batch.numel() * trainer.frame_skip
            yield batch

    def _looks(self) -> Iterator[None]:
        """Give the learner a turn whenever workers have written; let each be two writes ahead at most."""
        trainer, replay, before = self.trainer, self.trainer.replay_buffer, self.trainer.frames_before_replay
        streams = replay.num_streams
        budget = math.ceil((trainer.total_frames - before) / (trainer.frame_skip * streams))  # records per stream
        lag = 2 * math.ceil(trainer.collector.requested_frames_per_batch * trainer.collector.num_workers / streams)
        seen = 0
        trainer.collector.start()
        while not trainer.should_stop():
            self.check_workers()
            count = replay.write_count
            replay.write_limit = min(count // streams + lag, budget)
            if count == seen:
                with trainer.meter.time("env"):
                    time.sleep(1e-3)
                continue
            seen, trainer.collected_frames = count, before + count * trainer.frame_skip
            yield None

    def check_workers(self) -> None:
        """Look whether free-running workers get on, often. Others are watched while they are waited for."""
        if not self.trainer.free_running:
            return
        try:
            self.watchdog.check()
        except WorkerFailure as failure:
            if not self.trainer.should_stop():
                self._replace_workers(failure)

    def facts(self) -> dict[str, float]:
        """Workers alive, and milliseconds per step of the acting policy, over all workers since they were started."""
        seconds, steps = self.trainer.collector.policy.clock.tolist()
        alive = float(self.watchdog.count_alive())
        return {"collector/workers_alive": alive, "collector/policy_ms": 1e3 * seconds / max(steps, 1)}

    def _replace_workers(self, failure: WorkerFailure) -> None:
        """Start all workers anew; the records stay, episodes under way are cut."""
        if not self.restarts_left:
            raise failure
        self.restarts_left -= 1
        trainer, start = self.trainer, time.monotonic()
        self.watchdog.kill()
        trainer.collector.shutdown(raise_on_error=False)
        trainer.cut_episodes()
        trainer.collector = self.make_collector(trainer.collected_frames)
        self.watchdog = Watchdog(trainer.collector, trainer.replay_buffer, self.timeout)
        if trainer.free_running:
            trainer.collector.start()
        batches = trainer.collector.num_workers if trainer.free_running else 1
        unstored = trainer.collector.requested_frames_per_batch * batches * trainer.frame_skip
        trainer.incident(
            "worker_restart",
            f"{failure}. All workers were replaced; lost: episodes under way in {trainer.replay_buffer.num_streams} "
            f"environments, and at most {unstored} frames that were not stored yet",
            seconds=round(time.monotonic() - start, 1),
            restarts_left=self.restarts_left,
        )
