"""The training loop: TorchRL's ``Trainer`` and its stages, paced by a train ratio, and the one table of hooks."""

import inspect
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torchrl.trainers
from tensordict import TensorDictBase
from torchrl.collectors import BaseCollector, MultiAsyncCollector
from torchrl.envs import EnvBase

from dreamer.agents import Agent
from dreamer.checkpoints import SaveCheckpoint
from dreamer.collection import Watchdog, to_steps
from dreamer.hooks import (
    EpisodeStats,
    Evaluate,
    ExtendReplay,
    OpenLoopVideo,
    SampleReplay,
    SyncPolicy,
    UpdateRatio,
    WriteBackContext,
)
from dreamer.loggers import Meter, RunLogger, console_line
from dreamer.replay import SequenceReplay


def make_trainer(
    *,
    agent: Agent,
    collector: BaseCollector,
    replay: SequenceReplay,
    logger: RunLogger,
    run_dir: Path,
    make_eval_env: Callable[[], EnvBase],
    total_frames: int,
    frame_skip: int,
    init_random_frames: int,
    train_ratio: float,
    sync_interval: int,
    video_interval: int,
    evaluation: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    seed: int,
    **loop: Any,
) -> "Trainer":
    """Build the trainer and register its hooks.

    Args:
        agent, collector, replay, logger: The parts.
        run_dir: Run folder.
        make_eval_env: Makes the evaluation environments.
        total_frames, frame_skip, init_random_frames: Budget, frames per step, frames with random actions.
        train_ratio: Replayed steps per collected step.
        sync_interval: Updates between two hand-overs of weights to the workers.
        video_interval: Frames between two videos; 0 for none.
        evaluation, checkpoint: Settings of :class:`Evaluate` and :class:`SaveCheckpoint`.
        seed: Seed of the evaluation.
        loop: Further settings of :class:`Trainer`.
    """
    trainer = Trainer(
        collector=collector,
        replay_buffer=replay,
        agent=agent,
        logger=logger,
        total_frames=total_frames,
        frame_skip=frame_skip,
        train_ratio=train_ratio,
        **loop,
    )
    start = max(to_steps(init_random_frames, frame_skip), replay.batch_size * replay.sequence_length)
    evaluate = Evaluate(trainer, make_eval_env, agent.policy, seed=seed, **evaluation)
    save = SaveCheckpoint(trainer, run_dir / "checkpoint", **checkpoint)
    hooks = [
        ("batch_process", None if trainer.free_running else agent.to_records),
        ("batch_process", None if trainer.free_running else ExtendReplay(replay)),
        ("pre_steps_log", EpisodeStats(replay, frame_skip)),
        ("pre_optim_steps", UpdateRatio(trainer, train_ratio=train_ratio, start_steps=start)),
        ("process_optim_batch", SampleReplay(replay)),
        ("post_optim_log", WriteBackContext(replay)),
        ("post_optim_log", agent.open_loop_video and OpenLoopVideo(trainer, agent.open_loop_video, video_interval)),
        ("post_steps", SyncPolicy(trainer, agent.policy, sync_interval)),
        ("post_steps_log", evaluate),
        ("post_steps_log", save),
        *agent.hooks,
        ("shutdown", evaluate.finish),
        ("shutdown", save.save),
    ]
    for stage, hook in hooks:
        if hook is not None:
            trainer.register_op(stage, hook)
            if hasattr(hook, "state_dict"):
                trainer.register_module(type(hook).__name__, hook)
    return trainer


class Trainer(torchrl.trainers.Trainer):
    """Alternate collection and learning until ``total_frames`` frames were collected.

    Stock TorchRL hooks plug in at the same stages. What differs: the number of updates per batch is decided by a
    hook, free-running workers cannot outrun the learner, and metrics stay on their device and are averaged until
    they are logged, without a history in memory.

    Args:
        collector: Where data come from. A ``MultiAsyncCollector`` runs freely and writes into the replay itself.
        replay_buffer: The replay.
        agent: Its ``loss`` and ``stepper`` are used here.
        logger: Where metrics go.
        total_frames: Budget, in frames.
        frame_skip: Frames per agent step.
        train_ratio: Replayed steps per collected step, to tell how long the run will take.
        log_interval, log_seconds: Frames and seconds between two lines of metrics, whichever comes first.
        worker_timeout: Seconds after which a silent worker ends the run.
    """

    def __init__(
        self,
        *,
        collector: BaseCollector,
        replay_buffer: SequenceReplay,
        agent: Agent,
        logger: RunLogger,
        total_frames: int,
        frame_skip: int,
        train_ratio: float,
        log_interval: int,
        log_seconds: float,
        worker_timeout: float,
    ):
        self.free_running = isinstance(collector, MultiAsyncCollector)
        super().__init__(
            collector=collector,
            total_frames=total_frames,
            frame_skip=frame_skip,
            optim_steps_per_batch=0,
            loss_module=agent.loss,
            optimization_stepper=agent.stepper,
            replay_buffer=replay_buffer,
            logger=logger,
            progress_bar=False,
            log_interval=log_interval,
            async_collection=self.free_running,
            auto_log_optim_steps=False,
        )
        self.collected_frames = self._optim_count = 0  # the base keeps them on the class, for all its instances
        self.watchdog = Watchdog(collector, replay_buffer, worker_timeout)
        self.meter = Meter(
            log_interval,
            log_seconds,
            total_frames=total_frames,
            train_ratio=train_ratio,
            frames_per_update=replay_buffer.batch_size * replay_buffer.sequence_length * frame_skip,
        )

    @property
    def update_count(self) -> int:
        """Updates made so far."""
        return self._optim_count

    def train(self) -> None:
        """Run until the budget is used or :meth:`request_stop` is called; workers are ended in any case."""
        self._setup_hook()
        try:
            for batch in self._free_running_batches() if self.free_running else self._batches():
                self._pre_steps_log_hook(batch)
                self.optim_steps(batch)
                self._post_steps_hook()
                self._post_steps_log_hook(batch)
                finished = self._stop_training or self.collected_frames >= self.total_frames
                self._write_log(force=finished)
                if finished:
                    break
            self._shutdown_hook()
        finally:
            self.replay_buffer.release()
            self.collector.shutdown()
            self.replay_buffer.close()

    def optim_steps(self, batch: TensorDictBase | None) -> None:
        """Make the updates that are owed. As the base does, but every update is logged, not only their mean."""
        self._pre_optim_hook()
        losses = None
        for _ in range(self.num_epochs):
            self._pre_epoch_log_hook(batch)
            processed = self._pre_epoch_hook(batch)
            for _ in range(self.optim_steps_per_batch):
                self._optim_count += 1
                sub_batch = self._process_optim_batch_hook(processed)
                losses = self.optimization_stepper.step(self, sub_batch)
                self._post_optim_hook()
                self._log(**losses)
                self._post_optim_log(sub_batch)
                self._write_log()
            self._post_epoch_log_hook(batch)
            self._post_epoch_hook()
        if losses is not None:
            self._post_optim_complete_log_hook(self._optim_count, losses)

    def _batches(self) -> Iterator[TensorDictBase]:
        """Batches of a collector that waits for the learner, processed; frames are counted on what is stored."""
        batches = iter(self.collector)
        while True:
            with self.watchdog.waiting():
                batch = next(batches)
            batch = self._process_batch_hook(batch)
            self.collected_frames += batch.numel() * self.frame_skip
            yield batch

    def _free_running_batches(self) -> Iterator[None]:
        """Give the learner a turn whenever workers have written; let each be two writes ahead at most."""
        replay, streams = self.replay_buffer, self.replay_buffer.num_streams
        budget = math.ceil(self.total_frames / (self.frame_skip * streams))  # records per stream
        lag = 2 * math.ceil(self.collector.requested_frames_per_batch * self.collector.num_workers / streams)
        seen = 0
        replay.write_limit = lag
        self.collector.start()
        while True:
            self.watchdog.check()
            count = replay.write_count
            replay.write_limit = min(count // streams + lag, budget)
            if count == seen:
                time.sleep(1e-3)
                continue
            seen, self.collected_frames = count, count * self.frame_skip
            yield None

    def log_now(self, metrics: Mapping[str, float]) -> None:
        """Write ``metrics`` as a line of their own."""
        self.logger.log(metrics, self.collected_frames)

    def _log(self, log_pbar: bool = False, **metrics: Any) -> None:
        self.meter.add(metrics)

    def _write_log(self, force: bool = False) -> None:
        if force or self.meter.due(self.collected_frames):
            metrics = self.meter.read(frames=self.collected_frames, updates=self.update_count)
            metrics["collector/workers_alive"] = float(sum(process.is_alive() for process in self.watchdog.workers))
            metrics["trainer/memory_gb"] = psutil.Process().memory_info().rss / 1e9
            self.logger.log(metrics, self.collected_frames)
            print(console_line(metrics, self.collected_frames, self.total_frames), flush=True)  # noqa: T201


STAGES = (
    ("batch_process", "per batch", "_batch_process_ops"),
    ("pre_steps_log", "per batch", "_pre_steps_log_ops"),
    ("pre_optim_steps", "per batch", "_pre_optim_ops"),
    ("process_optim_batch", "  per update", "_process_optim_batch_ops"),
    ("stepper", "  per update", None),
    ("post_optim_log", "  per update", "_post_optim_log_ops"),
    ("post_steps", "per batch", "_post_steps_ops"),
    ("post_steps_log", "per batch", "_post_steps_log_ops"),
    ("shutdown", "at the end", "_shutdown_ops"),
)


def hook_graph(trainer: Trainer) -> str:
    """Describe what runs when, read back from what is registered with ``trainer``."""
    rows = []
    if trainer.free_running:
        rows += [("in the workers", "postproc", trainer.collector.postproc)]
        rows += [("in the workers", "replay_buffer", trainer.replay_buffer.extend)]
    for stage, when, registered in STAGES:
        hooks = [trainer.optimization_stepper] if registered is None else [op for op, _ in getattr(trainer, registered)]
        rows += [(when, stage, getattr(hook, "__wrapped__", hook)) for hook in hooks]
    return "\n".join(f"{when:<15}{stage:<24}{describe(hook)}".rstrip() for when, stage, hook in rows)


def describe(hook: Callable[..., Any]) -> str:
    """Name of a hook and the first sentence of its documentation."""
    owner = getattr(hook, "__self__", None)
    if inspect.isfunction(hook):
        name = hook.__name__
    elif owner is not None:
        name = f"{type(owner).__name__}.{hook.__name__}"
    else:
        name = type(hook).__name__
    return f"{name:<24}{re.split(r'[.,;:]', inspect.getdoc(hook) or '')[0]}"
