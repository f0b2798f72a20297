"""Checkpoints of a run: all that has state, as raw tensors and JSON. On disk: :mod:`dreamer.checkpoint_files`.

A checkpoint takes about three times the bytes of the weights (weights and two averages of the optimiser), and with the
replay `len(replay) * replay.record_bytes` more, which is by far the largest part. `checkpoint.keep` of them stay, one
more is there while a new one is written, and `best` is one without the replay.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.checkpoint import Checkpoint, CheckpointAdapter, GlobalRNGState

from dreamer.checkpoint_files import publish, rotate, verify
from dreamer.hooks import Every

if TYPE_CHECKING:
    from dreamer.trainer import Trainer

PLAIN = (bool, int, float, str)
WRAPPED = {"dict": dict, "ordered": OrderedDict, "list": list, "tuple": tuple, "size": torch.Size}


class TensorsAndJSON(CheckpointAdapter):
    """A state dict as one file of raw tensors and one of JSON.

    Nothing that could run code is read, whatever the files say. TorchRL's own adapter unpickles what a metadata file
    in a checkpoint names; it also writes through memory maps, where a full disk ends the process with a bus error.

    Tensors are loaded to the CPU; `load_state_dict` puts them where they belong.
    """

    adapter_id = "lucid.tensors_and_json"
    tensors, structure = "tensors.bin", "state.json"

    def save(self, component: Any, path: Path, *, args: tuple, kwargs: Mapping[str, Any]) -> None:
        path.mkdir(parents=True, exist_ok=True)
        with open(path / self.tensors, "wb") as file:
            structure = _encode(component.state_dict(*args, **kwargs), file, type(component).__name__)
        (path / self.structure).write_text(json.dumps(structure))

    def load(
        self,
        component: Any,
        path: Path,
        *,
        map_location: Any,
        tensor_load_kwargs: Mapping[str, Any],
        args: tuple,
        kwargs: Mapping[str, Any],
    ) -> None:
        with open(path / self.tensors, "rb") as file:
            state = _decode(json.loads((path / self.structure).read_bytes()), file)
        component.load_state_dict(state, *args, **kwargs)


class TrainerProgress:
    """Counters of the trainer as checkpoint state."""

    def __init__(self, trainer: "Trainer"):
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "frames": trainer.collected_frames,
            "updates": trainer.update_count,
            "pending_updates": trainer.pending_updates,
            "further_frames": trainer.further_frames,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.trainer.collected_frames, self.trainer._optim_count = state_dict["frames"], state_dict["updates"]
        self.trainer.pending_updates = state_dict["pending_updates"]
        self.trainer.further_frames = state_dict["further_frames"]


def make_checkpoint(trainer: "Trainer", *, replay: bool) -> Checkpoint:
    """Bind everything that has state: networks and targets, optimiser, return statistics, hooks, counters, random
    numbers and, if ``replay``, the records."""
    checkpoint = Checkpoint(replay=trainer.replay_buffer) if replay else Checkpoint()
    stateful = {name: module for name, module in trainer._modules.items() if hasattr(module, "state_dict")}
    stateful |= {"loss": trainer.loss_module, "progress": TrainerProgress(trainer), "rng": GlobalRNGState()}
    for name, part in stateful.items():
        checkpoint.register(name, part, adapter=TensorsAndJSON())
    return checkpoint


class SaveCheckpoint:
    """Save all state, and the best state so far.

    Saving changes nothing of the training, random numbers included. A periodic save that fails is an incident, and is
    tried again when the next one is due.

    Args:
        trainer: What to save.
        folder: Where the checkpoints go, `frames_<N>` and `best`.
        interval: Frames between two; 0 for only the last one.
        replay: Save the records as well.
        keep: How many `frames_<N>` stay.
        best: Gives frames and return of the best evaluation so far. Whenever they change, the state is saved as
            `best`, without the records and with both among its facts.
        files: Text files to put into every checkpoint, content by name.
    """

    def __init__(
        self,
        trainer: "Trainer",
        folder: Path,
        *,
        interval: int,
        replay: bool,
        keep: int,
        best: Callable[[], tuple[int, float] | None] = lambda: None,
        files: Mapping[str, str] | None = None,
    ):
        self.trainer, self.folder, self.replay, self.keep = trainer, folder, replay, keep
        self.best, self.files = best, dict(files or {})
        self.due = Every(interval)
        self.saved_best: tuple[int, float] | None = None
        self.tried_best: tuple[int, float] | None = None

    def __call__(self, batch: TensorDictBase | None = None) -> None:
        due, better = self.due(self.trainer.collected_frames), self.best() != self.tried_best
        try:
            if due:
                self.save()
            elif better:
                self.save_best()
        except OSError as error:
            self.trainer.incident("checkpoint_failed", str(error))

    def save(self) -> Path:
        """Save all state now.

        Returns:
            The folder of the checkpoint.

        Raises:
            OSError: The disk is full, or something else failed; the previous checkpoints are untouched.
        """
        self.save_best()
        path = self._publish(f"frames_{self.trainer.collected_frames}", replay=self.replay)
        rotate(self.folder, self.keep, whole=path)
        return path

    def save_best(self) -> None:
        """Save the state as the best one, if an evaluation found one since the last time."""
        self.tried_best = best = self.best()
        if best is not None and best != self.saved_best:
            self.saved_best, previous = best, self.saved_best
            try:
                self._publish("best", replay=False, evaluated_frames=best[0], evaluated_return=best[1])
            except OSError:
                self.saved_best = previous
                raise

    def state_dict(self) -> dict[str, Any]:
        return {"due": self.due.state_dict(), "best": self.saved_best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.due.load_state_dict(state_dict["due"])
        self.saved_best = self.tried_best = state_dict["best"] and tuple(state_dict["best"])

    def _publish(self, name: str, *, replay: bool, **facts: Any) -> Path:
        trainer = self.trainer
        checkpoint = make_checkpoint(trainer, replay=replay)
        needed = len(trainer.replay_buffer) * trainer.replay_buffer.record_bytes if replay else 0

        def write(stage: Path) -> None:
            checkpoint.save(stage)
            for file, content in self.files.items():
                (stage / file).write_text(content)

        counts = {"frames": trainer.collected_frames, "updates": trainer.update_count}
        facts = {**counts, "busy": trainer.busy(), "replay": replay, **facts}
        return publish(self.folder, name, write, facts, needed=needed)


def load_checkpoint(trainer: "Trainer", path: Path, *, replay: bool = True) -> dict[str, Any]:
    """Restore what :class:`SaveCheckpoint` wrote into a trainer that was built with the same settings.

    Args:
        trainer: Its state is replaced.
        path: Folder of the checkpoint.
        replay: Restore the records if they were saved; otherwise the replay stays as it is.

    Returns:
        The manifest; ``frames``, ``updates``, and under ``replay`` whether the checkpoint has the records.

    Raises:
        Damaged: The checkpoint is not what was saved; nothing was restored.
        RuntimeError: It is of another model, or of another replay.
    """
    manifest = verify(path)
    make_checkpoint(trainer, replay=replay and manifest["replay"]).load(path)
    return manifest


def load_weights(loss: nn.Module, path: Path) -> dict[str, Any]:
    """Restore networks alone, those of the loss module, from a checkpoint.

    Args:
        loss: Gets the weights in place.
        path: Folder of the checkpoint.

    Returns:
        The manifest.

    Raises:
        Damaged: The checkpoint is not what was saved; nothing was restored.
        RuntimeError: It is of another model.
    """
    manifest = verify(path)
    Checkpoint().register("loss", loss, adapter=TensorsAndJSON()).load(path)
    return manifest


def _encode(value: Any, file: BinaryIO, name: str) -> Any:
    """Describe a value in JSON; its tensors go into the file."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        entry = {"tensor": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "at": file.tell()}
        file.write(raw.numpy())
        return entry
    if value is None or isinstance(value, PLAIN):
        return value
    if isinstance(value, dict):
        kind = "ordered" if isinstance(value, OrderedDict) else "dict"
        entry = {kind: [[key, _encode(item, file, f"{name}.{key}")] for key, item in value.items()]}
        if wrong := [key for key in value if not isinstance(key, PLAIN)]:
            raise TypeError(f"{name} has the key {wrong[0]!r}: use strings and numbers as keys of a state dict")
        if (metadata := getattr(value, "_metadata", None)) is not None:  # versions of the modules, for their loading
            entry["metadata"] = _encode(metadata, file, name)
        return entry
    for kind in ("size", "tuple", "list"):  # torch.Size is a tuple
        if isinstance(value, WRAPPED[kind]):
            return {kind: [_encode(item, file, f"{name}.{i}") for i, item in enumerate(value)]}
    raise TypeError(
        f"{name} is a {type(value).__name__}: use tensors, numbers, strings, lists and dicts in a state dict"
    )


def _decode(entry: Any, file: BinaryIO) -> Any:
    """The value that `_encode` described."""
    if not isinstance(entry, dict):
        return entry
    if "tensor" in entry:
        return _read_tensor(entry["tensor"], entry["shape"], entry["at"], file)
    kind = next(iter(entry))
    items = entry[kind]
    if kind not in ("dict", "ordered"):
        return WRAPPED[kind](_decode(item, file) for item in items)
    mapping = WRAPPED[kind]((key, _decode(item, file)) for key, item in items)
    if "metadata" in entry:
        mapping._metadata = _decode(entry["metadata"], file)
    return mapping


def _read_tensor(name: str, shape: list[int], start: int, file: BinaryIO) -> Tensor:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r} is no dtype of torch")
    tensor = torch.empty(shape, dtype=dtype)
    file.seek(start)
    if file.readinto(tensor.flatten().view(torch.uint8).numpy()) != tensor.nbytes:
        raise ValueError(f"{file.name} ends in the middle of a tensor of shape {shape}")
    return tensor
