"""Checkpoints: all state of a run as tensors and JSON, replaced as a whole."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensordict import TensorDictBase
from torchrl.checkpoint import Checkpoint, GlobalRNGState

from dreamer.hooks import Every

if TYPE_CHECKING:
    from dreamer.trainer import Trainer


class TrainerProgress:
    """Counters of the trainer as checkpoint state."""

    def __init__(self, trainer: "Trainer"):
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        return {"frames": self.trainer.collected_frames, "updates": self.trainer.update_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.trainer.collected_frames, self.trainer._optim_count = state_dict["frames"], state_dict["updates"]


def make_checkpoint(trainer: "Trainer", *, replay: bool) -> Checkpoint:
    """Bind everything that has state: networks and targets, optimiser, return statistics, hooks, counters, random
    numbers and, if ``replay``, the records."""
    components = {name: module for name, module in trainer._modules.items() if hasattr(module, "state_dict")}
    if replay:
        components["replay"] = trainer.replay_buffer
    return Checkpoint(loss=trainer.loss_module, progress=TrainerProgress(trainer), rng=GlobalRNGState(), **components)


class SaveCheckpoint:
    """Save all state, replacing the previous checkpoint.

    Args:
        trainer: What to save.
        path: Folder of the checkpoint; always whole, the new one takes its place by renaming.
        interval: Frames between two; 0 for only the last one.
        replay: Save the records as well. They are by far the largest part.
    """

    def __init__(self, trainer: "Trainer", path: Path, *, interval: int, replay: bool):
        self.trainer, self.path, self.replay = trainer, path, replay
        self.due = Every(interval)

    def __call__(self, batch: TensorDictBase | None = None) -> None:
        if self.due(self.trainer.collected_frames):
            self.save()

    def save(self) -> None:
        """Save a last time."""
        make_checkpoint(self.trainer, replay=self.replay).save(self.path)


def load_checkpoint(trainer: "Trainer", path: Path, *, replay: bool = True) -> None:
    """Restore what :class:`SaveCheckpoint` wrote into a trainer that was built with the same settings."""
    make_checkpoint(trainer, replay=replay).load(path)
