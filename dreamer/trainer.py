"""The training loop: TorchRL's ``Trainer`` and its stages, paced by a train ratio, and the one table of hooks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import torchrl.trainers
from tensordict import TensorDictBase
from torchrl.collectors import BaseCollector, MultiAsyncCollector
from torchrl.envs import EnvBase
from torchrl.trainers.trainers import TrainerHookBase

from dreamer.agents import Agent
from dreamer.checkpoints import SaveCheckpoint, load_checkpoint
from dreamer.collection import CollectorState, EnvFactory, to_steps
from dreamer.console import Console
from dreamer.evaluation import Interrupted
from dreamer.hooks import (
    EpisodeStats,
    Evaluate,
    ExtendReplay,
    SampleReplay,
    SyncPolicy,
    UpdateRatio,
    WriteBackContext,
)
from dreamer.loggers import RunLogger
from dreamer.media import LogMedia
from dreamer.meter import Meter
from dreamer.nonfinite import MOST_IN_A_ROW, NonFiniteError, dump_batch
from dreamer.replay import SequenceReplay
from dreamer.turns import Turns
from envs.transforms import FiniteGuard


def make_trainer(
    *,
    agent: Agent,
    further_hooks: Sequence[TrainerHookBase],
    collector: BaseCollector,
    make_collector: Callable[[int], BaseCollector],
    env: Mapping[str, Any],
    replay: SequenceReplay,
    logger: RunLogger,
    run_dir: Path,
    make_eval_env: Callable[[], EnvBase],
    total_frames: int,
    frame_skip: int,
    init_random_frames: int,
    train_ratio: float,
    sync_interval: int,
    media: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    seed: int,
    **loop: Any,
) -> "Trainer":
    """Build the trainer and register its hooks.

    Args:
        agent, further_hooks, collector, make_collector, replay, logger: The parts.
        env: What the environments are made from, to tell whether a saved one can go on.
        run_dir: Run folder.
        make_eval_env: Makes the evaluation environments.
        total_frames, frame_skip, init_random_frames: Budget, frames per step, frames with random actions.
        train_ratio: Replayed steps per collected step.
        sync_interval: Updates between two hand-overs of weights to the workers.
        media, evaluation, checkpoint: Settings of :class:`LogMedia`, :class:`Evaluate` and :class:`SaveCheckpoint`.
        seed: Seed of the evaluation.
        loop: Further settings of :class:`Trainer`.
    """
    trainer = Trainer(
        collector=collector,
        make_collector=make_collector,
        replay_buffer=replay,
        agent=agent,
        logger=logger,
        run_dir=run_dir,
        total_frames=total_frames,
        frame_skip=frame_skip,
        train_ratio=train_ratio,
        **loop,
    )
    start = max(to_steps(init_random_frames, frame_skip), replay.batch_size * replay.sequence_length)
    replayed = agent.make_schedule is None
    evaluate = Evaluate(trainer, make_eval_env, agent.policy, seed=seed, **evaluation)
    save = SaveCheckpoint(trainer, run_dir / "checkpoints", best=lambda: evaluate.best, **checkpoint)
    show = LogMedia(trainer, agent.make_media, **media)
    guard = FiniteGuard(loop["nan_policy"])
    trainer.make_envs = lambda rows, seed: EnvFactory(env, range(rows), seed, agent.primers, guard=guard)()
    trainer.save_checkpoint, trainer.evaluate, trainer.log_media = save.save, evaluate.now, show.show
    hooks = [
        ("batch_process", None if trainer.free_running else agent.to_records),
        ("batch_process", None if trainer.free_running else ExtendReplay(replay)),
        ("pre_steps_log", EpisodeStats(replay, frame_skip)),
        ("pre_optim_steps", UpdateRatio(trainer, train_ratio=train_ratio, start_steps=start) if replayed else None),
        ("process_optim_batch", SampleReplay(replay) if replayed else None),
        ("post_optim_log", WriteBackContext(replay) if replayed and agent.context_keys else None),
        ("post_optim_log", show if agent.make_media else None),
        ("post_steps", SyncPolicy(trainer, agent.policy, sync_interval)),
        ("post_steps_log", evaluate),
        ("post_steps_log", save),
        ("shutdown", evaluate.finish),
        ("shutdown", save.save),
    ]
    plug_in(trainer, hooks, stateful=[logger, trainer.meter, CollectorState(trainer, env)])
    for hook in (*further_hooks, *([] if trainer.schedule is None else [trainer.schedule])):
        hook.register(trainer)
    return trainer


def plug_in(trainer: "Trainer", hooks: Sequence[tuple[str, Callable | None]], stateful: Sequence[Any]) -> None:
    """Register hooks at their stages, and the state of all that have some."""
    hooks = [(stage, hook) for stage, hook in hooks if hook is not None]
    for stage, hook in hooks:
        trainer.register_op(stage, hook)
    for part in (*stateful, *(hook for _, hook in hooks)):
        if hasattr(part, "state_dict"):
            trainer.register_module(type(part).__name__, part)


class Trainer(torchrl.trainers.Trainer):
    """Alternate collection and learning until ``total_frames`` frames were collected.

    Stock TorchRL hooks plug in at the same stages. What differs: the number of updates per batch is decided by a
    hook, free-running workers cannot outrun the learner, workers that fail are replaced, an update that is not finite
    changes nothing, and metrics stay on their device and are averaged until they are logged, without a history.

    Args:
        collector: Where data come from. A ``MultiAsyncCollector`` runs freely and writes into the replay itself.
        make_collector: Frames so far -> another such collector, in place of one whose workers failed.
        replay_buffer: The replay.
        agent: Its ``loss``, ``stepper`` and schedule are used here.
        logger: Where metrics go.
        run_dir: Run folder, for the batches of bad updates.
        total_frames: Budget, in frames.
        frame_skip: Frames per agent step.
        train_ratio: Replayed steps per collected step, to tell how long the run will take.
        log_interval, log_seconds: Frames and seconds between two lines of metrics, whichever comes first.
        worker_timeout: Seconds after which a silent worker counts as stuck.
        worker_restarts: How many times failed workers are replaced before a failure ends the run.
        nan_policy: "stop" ends the run at an update that is not finite, "skip" leaves it out.
        nonfinite_steps: Counter of the guards of the environments, int64 [1].
    """

    def __init__(
        self,
        *,
        collector: BaseCollector,
        make_collector: Callable[[int], BaseCollector],
        replay_buffer: SequenceReplay,
        agent: Agent,
        logger: RunLogger,
        run_dir: Path,
        total_frames: int,
        frame_skip: int,
        train_ratio: float,
        log_interval: int,
        log_seconds: float,
        worker_timeout: float,
        worker_restarts: int,
        nan_policy: str,
        nonfinite_steps: torch.Tensor,
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
        self.policy, self.run_dir, self.nan_policy = agent.policy, run_dir, nan_policy
        self.schedule = agent.make_schedule() if agent.make_schedule else None
        self.turns = Turns(self, make_collector, timeout=worker_timeout, restarts=worker_restarts)
        self.frames_before_replay = 0  # collected before the records that the replay holds
        self.further_frames = 0  # simulated outside the collector for learning, as for the fitness of a population
        self.pending_updates = 0  # owed for the present batch
        self.skipped_updates = self.skipped_in_a_row = 0
        self.told_nonfinite_steps = 0
        self.nonfinite_steps = nonfinite_steps
        self.console = Console(total_frames)
        logger.say = self.console.print
        self.meter = Meter(
            log_interval,
            log_seconds,
            total_frames=total_frames,
            train_ratio=train_ratio if self.schedule is None else None,
            frames_per_update=replay_buffer.batch_size * replay_buffer.sequence_length * frame_skip,
        )

    @property
    def update_count(self) -> int:
        """Updates made so far."""
        return self._optim_count

    def should_stop(self) -> bool:
        """Whether :meth:`request_stop` was called; what takes long asks now and then."""
        return self._stop_training

    def train(self) -> None:
        """Run until the budget is used or :meth:`request_stop` is called; workers are ended in any case.

        All state is saved at the end, also when an error ends the run.
        """
        self._setup_hook()
        try:
            self._run()
        except Exception as error:
            self._save_in_need(error)
            raise
        finally:
            self.replay_buffer.release()
            self.collector.shutdown()
            self.replay_buffer.close()
            self.console.close()

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint; to be called before :meth:`train`."""
        manifest = load_checkpoint(self, checkpoint)
        if not manifest["replay"]:
            self.frames_before_replay = self.collected_frames
            if self.schedule is None:
                self._modules["UpdateRatio"].restart()
        if not self._modules["CollectorState"].restored:
            self.cut_episodes()
        self.collector.policy.update(self.policy)
        self.logger.rewind()

    def busy(self) -> bool:
        """Whether there is something to learn without new steps."""
        return self.pending_updates > 0 or (self.schedule is not None and self.schedule.busy())

    @property
    def log_step(self) -> int:
        """Where a line or a picture belongs: at its frame; an agent that learns while frames stand still counts on."""
        standing = getattr(self.schedule, "frames_stand_still", False)
        return self.collected_frames + (self.update_count if standing else 0)

    def cut_episodes(self) -> None:
        """Let the records say that the episodes under way end here, because new ones begin."""
        self._log(**self._modules["EpisodeStats"]() or {})  # first, or the cut ones would count as whole
        self.replay_buffer.truncate()

    def optim_steps(self, batch: TensorDictBase | None) -> None:
        """Make the updates that are owed, unless the run is to stop. Every update is logged, not only their mean."""
        if not self.pending_updates:
            self._pre_optim_hook()
            self.pending_updates = self.optim_steps_per_batch
        losses = None
        self._pre_epoch_log_hook(batch)
        processed = self._pre_epoch_hook(batch)
        while self.pending_updates and not self.should_stop():
            try:
                losses = self._update(processed)
            except Interrupted:  # it is made again later
                break
            self.pending_updates -= 1
            self.turns.check_workers()
            self._write_log()
        self._post_epoch_log_hook(batch)
        self._post_epoch_hook()
        if losses is not None:
            self._post_optim_complete_log_hook(self._optim_count, losses)

    def _run(self) -> None:
        """Learn from batch after batch; then finish, or save if the run is to go on later."""
        if self.pending_updates:  # interrupted between the updates of a batch
            self._learn(None)
        if not self._ended():
            for batch in self._batches():
                self._pre_steps_log_hook(batch)
                self._learn(batch)
                if self._ended():
                    break
        try:
            if not self.should_stop():
                self._shutdown_hook()
                return
        except Interrupted:
            pass
        path = self.save_checkpoint()
        self.incident("signal", f"{self._stop_reason}: saved {path.name}, resume=auto goes on from there")

    def _batches(self) -> Iterator[TensorDictBase | None]:
        """What each turn brings; nothing new while the agent is busy with what there is."""
        while self.busy():
            yield None
        for batch in self.turns:
            yield batch
            while self.busy():
                yield None

    def _ended(self) -> bool:
        return self.should_stop() or (self.collected_frames >= self.total_frames and not self.busy())

    def _learn(self, batch: TensorDictBase | None) -> None:
        self.optim_steps(batch)
        if not self.pending_updates:
            self._post_steps_hook()
            with self.meter.time("log"):
                self._post_steps_log_hook(batch)
        self._write_log(force=self._ended())

    def _update(self, processed: TensorDictBase | None) -> TensorDictBase | None:
        """Make one update; None if it was not finite and therefore left out."""
        with self.meter.time("sample"):
            sub_batch = self._process_optim_batch_hook(processed)
        try:
            with self.meter.time("update"):
                losses = self.optimization_stepper.step(self, sub_batch)
        except NonFiniteError as error:
            self._leave_out(error, sub_batch)
            return None
        self._optim_count += 1
        self.skipped_in_a_row = 0
        self._post_optim_hook()
        self._log(**losses)
        with self.meter.time("log"):
            self._post_optim_log(sub_batch)
        return losses

    def _leave_out(self, error: NonFiniteError, batch: TensorDictBase) -> None:
        """Count and keep a bad update; end the run if that is wished, or if there is no end of them."""
        self.skipped_updates += 1
        self.skipped_in_a_row += 1
        path = dump_batch(batch, self.run_dir / "nonfinite", self._optim_count)
        message = f"{error}; batch kept in {path}" if path else str(error)
        self.incident("nonfinite_update", message, policy=self.nan_policy, update=self._optim_count)
        if self.nan_policy == "stop" or self.skipped_in_a_row >= MOST_IN_A_ROW:
            raise error

    def _tell_nonfinite_steps(self) -> None:
        """Note it once when the guards of the environments have replaced numbers since the last time."""
        count = int(self.nonfinite_steps)
        if count > self.told_nonfinite_steps:
            new, self.told_nonfinite_steps = count - self.told_nonfinite_steps, count
            self.incident("nonfinite_step", f"{new} steps of environments were not finite; their episodes were cut")

    def _save_in_need(self, error: Exception) -> None:
        """Save what there is before an error ends the run; a failure to do so must not hide the error."""
        self.incident("exception", f"{type(error).__name__}: {error}")
        try:
            if all(parameter.isfinite().all() for parameter in self.loss_module.parameters()):
                self.console.print(f"saved {self.save_checkpoint()} before the run ends with an error")
        except Exception as failure:  # noqa: BLE001, the first error is the one to report
            self.incident("checkpoint_failed", f"{type(failure).__name__}: {failure}")

    def incident(self, kind: str, message: str, **facts: Any) -> None:
        """Note something that a person should know of."""
        self.logger.incident(kind, message, frames=self.collected_frames, **facts)

    def log_now(self, metrics: Mapping[str, float]) -> None:
        """Write ``metrics`` as a line of their own."""
        self.logger.log(metrics, self.collected_frames, self.log_step)

    def flush_log(self) -> None:
        """Write a line now, if anything was measured since the last one."""
        self._write_log(force=True)

    def _log(self, log_pbar: bool = False, **metrics: Any) -> None:
        self.meter.add(metrics)

    def _write_log(self, force: bool = False) -> None:
        told = not self.meter.sums and self.meter.last.frames == self.collected_frames
        if (force and not told) or self.meter.due(self.collected_frames):
            metrics = self.meter.read(frames=self.collected_frames, updates=self.update_count)
            metrics |= self.turns.facts()
            metrics["trainer/memory_gb"] = psutil.Process().memory_info().rss / 1e9
            metrics["trainer/env_frames"] = float(self.collected_frames + self.further_frames)
            metrics["trainer/skipped_updates"] = float(self.skipped_updates)
            metrics["collector/nonfinite_steps"] = float(self.nonfinite_steps)
            self._tell_nonfinite_steps()
            self.logger.log(metrics, self.collected_frames, self.log_step)
            self.console.show(metrics, self.collected_frames)
