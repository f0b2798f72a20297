"""Learning in stages: one part after the other, each from what the stages before it made."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import OptimizationStepper

from dreamer.agents import Media
from dreamer.evaluation import preserve_rng

COLLECT = "collect"


class Stage(Protocol):
    """What is done for a while, update by update, before something else is.

    Subclasses inherit what does nothing: :meth:`begin`, :meth:`follow`, :meth:`end` and :meth:`media`.
    """

    name: str
    one_line_each = False  # whether each update gets a line of metrics; else their means do, now and then

    def begin(self) -> None:
        """Start counting anew; called once in every round, before anything else."""

    def done(self) -> bool:
        """Whether the next stage follows. True right after :meth:`begin` leaves this one out."""
        ...

    def draw(self) -> TensorDictBase:
        """The data of the next update, on the device; empty if it needs none."""
        ...

    def step(self, batch: TensorDictBase) -> Mapping[str, Tensor | float]:
        """Make one update and return scalars, by the names under which they are logged.

        Raises:
            NonFiniteError: if something is not finite; nothing has changed then.
            Interrupted: if the run is to stop and the update would take long; nothing has changed then.
        """
        ...

    def follow(self) -> None:
        """Do what belongs behind an update, when it was counted and logged."""

    def end(self) -> None:
        """Finish; called once in every round, when the stage is done."""

    def media(self) -> Media | None:
        """Pictures of what was learned so far."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the networks of the agent's loss."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        ...


class StageSchedule:
    """Go through stages in order, once in every round, one update per turn.

        round 1: collect, a, b, c        round 2: collect, a, b, c        ...

    A stage that is called "collect" and is the first one ends when frames were collected; without it the run collects
    none. While later stages are at work the count of frames stands still, so checkpoints are made here.

    Args:
        make_stages: Makes them, once the trainer is there.
        rounds: How often to go through them.
        save_seconds: Seconds between two checkpoints, with pictures, while frames stand still; 0 for every update.

    Raises:
        ValueError: for no round.
    """

    def __init__(self, make_stages: Callable[[Trainer], Sequence[Stage]], *, rounds: int, save_seconds: float):
        if rounds < 1:
            raise ValueError(f"agent.rounds={rounds}: give at least 1")
        self.make_stages, self.rounds, self.save_seconds = make_stages, rounds, save_seconds
        self.stages: list[Stage] = []
        self.round = self.index = 0
        self.begun = False
        self.saved_at = time.monotonic()
        self.metrics: dict[str, Tensor | float] = {}
        self.frames_stand_still = True  # while a stage learns

    @property
    def stage(self) -> Stage:
        """The present one."""
        return self.stages[self.index]

    def register(self, trainer: Trainer) -> None:
        """Make the stages, and register the hooks of this schedule and its state."""
        self.trainer, self.stages = trainer, list(self.make_stages(trainer))
        if self.stages[0].name == COLLECT:
            trainer.register_op("batch_process", self.stages[0].receive)
        else:
            trainer.total_frames = trainer.console.total_frames = trainer.meter.total_frames = 0
        trainer.register_op("pre_optim_steps", self.plan)
        trainer.register_op("process_optim_batch", self.draw)
        trainer.register_op("post_optim_log", self.follow)
        trainer.register_op("post_steps_log", self.save)
        trainer.register_module(type(self).__name__, self)

    def busy(self) -> bool:
        """Whether a stage is at work that needs no new steps."""
        return self.round < self.rounds and (self.stage.name != COLLECT or (self.begun and self.stage.done()))

    def plan(self) -> None:
        """Go on to the stage whose turn it is; then one update, or none while it collects."""
        while self.round < self.rounds:
            if not self.begun:
                self._begin()
            if not self.stage.done():
                break
            self._end()
        self.trainer.optim_steps_per_batch = int(self.busy())

    def draw(self, batch: TensorDictBase | None) -> TensorDictBase:
        """The data of the next update."""
        return self.stage.draw()

    def step(self, batch: TensorDictBase) -> TensorDict:
        """Make an update of the present stage."""
        self.metrics = dict(self.stage.step(batch))
        return TensorDict({name: torch.as_tensor(value).detach() for name, value in self.metrics.items()})

    def follow(self, batch: TensorDictBase) -> None:
        """Let the stage go on behind its update. Where updates are few and long, each has a line of its own."""
        if self.stage.one_line_each:
            self.trainer.flush_log()
        self.stage.follow()

    def save(self, batch: TensorDictBase | None = None) -> None:
        """Save all state and show pictures, if it is time to; between frames the trainer does that."""
        if not self.busy() or time.monotonic() - self.saved_at < self.save_seconds:
            return
        self._show()
        try:
            self.trainer.save_checkpoint()
        except OSError as error:
            self.trainer.incident("checkpoint_failed", str(error))
        self.saved_at = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Where in which round, what the last update gave, and the state of every stage."""
        stages = {stage.name: stage.state_dict() for stage in self.stages}
        place = {"round": self.round, "index": self.index, "begun": self.begun, "metrics": self._read_metrics()}
        return place | {"total_frames": self.trainer.total_frames, "stages": stages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        A finished run goes on where its last stage has become longer.

        Raises:
            ValueError: for the state of other stages, or more frames than it was to collect when it ended to do so.
        """
        names = [stage.name for stage in self.stages]
        if list(state["stages"]) != names:
            raise ValueError(f"agent.stages={names}: the run was begun with {list(state['stages'])}")
        self.round, self.index, self.begun = state["round"], state["index"], state["begun"]
        self.metrics = dict(state["metrics"])
        for stage in self.stages:
            stage.load_state_dict(state["stages"][stage.name])
        over = self.round >= self.rounds or (self.round + 1 == self.rounds and self.index > 0)
        frames, collected = self.trainer.total_frames, state["total_frames"]
        if over and frames > collected:
            raise ValueError(
                f"collector.total_frames={frames}: the {collected} frames of this run are collected, and it "
                "learns from no others; begin another run, or give a larger agent.rounds as well"
            )
        if self.round >= self.rounds and not self.stages[-1].done():
            self.round, self.index, self.begun = self.rounds - 1, len(self.stages) - 1, True

    def _begin(self) -> None:
        self.stage.begin()
        self.begun, self.metrics, self.saved_at = True, {}, time.monotonic()
        if not self.stage.done():
            turn = f"round {self.round + 1} of {self.rounds}, " if self.rounds > 1 else ""
            self.trainer.console.print(f"{turn}stage {self.index + 1} of {len(self.stages)}: {self.stage.name}")

    def _end(self) -> None:
        """Show what the stage has come to, and make the next one the present one."""
        self.stage.end()
        if self.metrics:
            if not self.stage.one_line_each:
                self.trainer.flush_log()  # means since the last line; then what the stage has come to
                self.trainer.log_now(self._read_metrics())
            self._show()
        self.begun, self.metrics, self.index = False, {}, self.index + 1
        if self.index == len(self.stages):
            self.round, self.index = self.round + 1, 0
            if self.round < self.rounds:
                self.trainer.evaluate()

    def _read_metrics(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.metrics.items()}

    def _show(self) -> None:
        with preserve_rng(0):
            media = self.stage.media()
        if media is not None:
            self.trainer.log_media(media)


class StagedStepper(OptimizationStepper):
    """Let the present stage make the update. Each stage has an optimiser of its own."""

    def step(self, trainer: Trainer, sub_batch: TensorDictBase) -> TensorDict:
        """Make one update; see :meth:`Stage.step`."""
        return trainer.schedule.step(sub_batch)
