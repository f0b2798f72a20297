"""Where the masks of replayed frames come from: one segmenter, few labelled frames, or a teacher and its student."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from envs.segmentation.colour import ColourModel
from envs.segmentation.ground_truth import GroundTruth
from envs.segmentation.labels import load_labels
from envs.segmentation.protocol import Segmenter, join_concepts, split_prompt

EXAMINE_EVERY = 20  # calls between two examinations of a student


class Labels(NamedTuple):
    """What a labeller gives for N frames, on any device."""

    mask: Tensor  # uint8 [N, h, w, 1], 0..255
    done: Tensor  # bool [N], False for frames that it leaves unlabelled for now
    version: Tensor  # int64 [N], what made each mask


class Labeller:
    """What labels frames. It draws no global random numbers, and may run in a thread of its own.

    Args:
        name: What it is, for messages.
    """

    def __init__(self, name: str):
        self.name = name

    @property
    def examples(self) -> int:
        """How many frames it wants to see, in :meth:`prepare`, before it can label."""
        return 0

    def prepare(self, frames: TensorDictBase) -> None:
        """See ``examples`` frames, as different as there are."""

    def label(self, frames: TensorDictBase) -> Labels:
        """Label frames.

        Args:
            frames: [N] ``pixels`` uint8 [N, h, w, 3] and, where the simulator gives it, ``true_mask`` bool
                [N, h, w, 1], newest first; N is at least 1.
        """
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        """What it knows of itself after the last call."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What it learned."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what another one learned."""

    def export(self, folder: Path) -> None:
        """Write what it learned into files that serve elsewhere."""


class Direct(Labeller):
    """A segmenter that marks every frame.

    Args:
        name: See :class:`Labeller`.
        segmenter: Of one or several concepts; their union is the mask.
        key: What it looks at.
    """

    def __init__(self, name: str, segmenter: Segmenter, key: str = "pixels"):
        super().__init__(name)
        self.segmenter, self.key = segmenter, key

    def label(self, frames: TensorDictBase) -> Labels:
        """Label all frames; see :class:`Labeller`.

        Raises:
            ValueError: The simulator's masks are wanted and there are none.
        """
        if self.key not in frames:
            raise ValueError(
                f"{self.name}: the records have no {self.key!r}; give env.emit_mask=true, or another source of masks"
            )
        mask = join_concepts(self.segmenter(frames[self.key]))
        version = torch.full(mask.shape[:1], self.segmenter.version, dtype=torch.int64, device=mask.device)
        return Labels(mask, torch.ones_like(version, dtype=torch.bool), version)


class FewShot(Direct):
    """A colour model that is fitted once.

    Args:
        labels: File or folder of labelled frames to fit it on; None for frames with the simulator's mask.
        labelled_frames: How many.
    """

    def __init__(self, labels: str | None, labelled_frames: int):
        if labelled_frames < 1:
            raise ValueError(f"agent.segmentation.labelled_frames={labelled_frames}: give at least 1")
        super().__init__("colour", ColourModel())
        self.labelled_frames = labelled_frames
        if labels is not None:
            self.segmenter.fit(*load_labels(labels, labelled_frames))

    @property
    def examples(self) -> int:
        """See :class:`Labeller`."""
        return 0 if self.segmenter.fitted else self.labelled_frames

    def prepare(self, frames: TensorDictBase) -> None:
        """Fit the colours of frames with the simulator's mask.

        Raises:
            ValueError: They have none.
        """
        if "true_mask" not in frames:
            raise ValueError(
                "colour: nothing to learn the colours from; give agent.segmentation.labels=<file or folder of labelled "
                "frames>, or env.emit_mask=true where the simulator knows the mask"
            )
        self.segmenter.fit(frames["pixels"], GroundTruth()(frames["true_mask"]))

    def state_dict(self) -> dict[str, Any]:
        """The colours."""
        return self.segmenter.state_dict() if self.segmenter.fitted else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the colours of another one."""
        if state_dict:
            self.segmenter.load_state_dict(state_dict)


class Distilled(Labeller):
    """A student that learns from a teacher, and labels once it passed its examination.

    The teacher labels some frames of every call, also later, so that the student is examined on what there is now. The
    others stay unlabelled until it is promoted.

    Args:
        teacher: Labels what the student learns from.
        distillation: Holds the student, and teaches and examines it.
        teacher_frames: Frames of a call that the teacher labels.
        student_steps: Steps that the student learns in each call.
    """

    def __init__(self, teacher: Labeller, distillation: Any, *, teacher_frames: int, student_steps: int):
        if teacher_frames < 1:
            raise ValueError(f"agent.segmentation.teacher_frames={teacher_frames}: give at least 1")
        super().__init__(f"student of {teacher.name}")
        self.teacher, self.distillation = teacher, distillation
        self.teacher_frames, self.student_steps = teacher_frames, student_steps
        self.calls = 0
        self.facts: dict[str, float] = {}

    @property
    def examples(self) -> int:
        """Those of the teacher."""
        return self.teacher.examples

    def prepare(self, frames: TensorDictBase) -> None:
        """Prepare the teacher."""
        self.teacher.prepare(frames)

    def label(self, frames: TensorDictBase) -> Labels:
        """Label some frames by the teacher and, if the student is good enough, the others by it."""
        asked = torch.linspace(0, len(frames) - 1, min(self.teacher_frames, len(frames))).round().long()
        taught = self.teacher.label(frames[asked])
        self._teach(frames["pixels"][asked], taught.mask)
        student, pixels = self.distillation.student, frames["pixels"]
        if self.distillation.promoted:
            mask, version = student(pixels), student.version
        else:
            mask, version = torch.zeros_like(pixels[..., :1]), 0
        promoted = torch.full((len(frames),), self.distillation.promoted, device=mask.device)
        labels = Labels(mask, promoted, torch.full_like(promoted, version, dtype=torch.int64))
        for all_of_them, of_teacher in zip(labels, taught, strict=True):
            all_of_them[asked] = of_teacher.to(all_of_them.device)
        return labels

    def metrics(self) -> dict[str, float]:
        """How far the student is."""
        return {f"student_{name}": value for name, value in self.facts.items()}

    def state_dict(self) -> dict[str, Any]:
        """The student, what it learns from, and the teacher's state."""
        return {
            "teacher": self.teacher.state_dict(),
            "distillation": self.distillation.state_dict(),
            "calls": self.calls,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the student of another one."""
        self.teacher.load_state_dict(state_dict["teacher"])
        self.distillation.load_state_dict(state_dict["distillation"])
        self.calls = state_dict["calls"]

    def export(self, folder: Path) -> None:
        """Write the student, if it is good enough, as ``student.safetensors``."""
        if self.distillation.promoted:
            self.distillation.student.save(folder / "student.safetensors")

    def _teach(self, pixels: Tensor, masks: Tensor) -> None:
        self.distillation.add(pixels, masks)
        self.facts |= self.distillation.learn(self.student_steps)
        self.calls += 1
        if self.calls % EXAMINE_EVERY == 0:
            self.facts |= self.distillation.examine()
        self.facts["promoted"] = float(self.distillation.promoted)


def make_labeller(
    source: str,
    *,
    prompt: str,
    model: str,
    image_size: int | None,
    threshold: float,
    mode: str,
    dtype: str | None,
    device: torch.device | str,
    labels: str | None,
    labelled_frames: int,
    teacher: str,
    teacher_frames: int,
    student_steps: int,
    bar: float,
    seed: int = 0,
) -> Labeller:
    """Make what labels the replay.

    Args:
        source: "sam3", "colour" or "student".
        prompt, model, image_size, threshold, mode, dtype: Of SAM 3; ``prompt`` has " . " between its concepts.
        device: Where SAM 3 and the student run.
        labels: File or folder of labelled frames, for the colour model and the student; None for frames with the
            simulator's mask.
        labelled_frames: How many of them the colour model is fitted on.
        teacher: Of the student: "sam3", "colour" or "ground_truth".
        teacher_frames, student_steps, bar: Frames per call that the teacher labels, learning steps per call, and the
            held-out Jaccard index in [0, 1] at which the student is promoted.
        seed: Of the student.

    Raises:
        ValueError: An unknown source or teacher, or SAM 3 without a prompt.
        OSError, ImportError: SAM 3 is not there; the message says how to get it.
    """

    def sam3() -> Labeller:
        if not prompt.strip():
            raise ValueError("sam3: say what to look for, for example agent.segmentation.prompt='cheetah robot'")
        from envs.segmentation.sam3 import Sam3

        options = {"image_size": image_size, "threshold": threshold, "mode": mode, "dtype": dtype, "device": device}
        segmenter = Sam3(split_prompt(prompt), model, **options)
        segmenter.load()  # what is wrong with the weights is told now, not in the middle of a run
        return Direct(f"sam3, prompt {prompt!r}", segmenter)

    def student() -> Labeller:
        from envs.segmentation.student import Distillation, Student, StudentNet

        distillation = Distillation(Student(StudentNet(seed).to(device)), bar=bar, seed=seed)
        if labels is not None:
            distillation.add(*load_labels(labels, distillation.capacity))
        chosen = look_up("agent.segmentation.teacher", teacher, teachers)()
        return Distilled(chosen, distillation, teacher_frames=teacher_frames, student_steps=student_steps)

    colour = partial(FewShot, labels, labelled_frames)
    ground_truth = partial(Direct, "ground_truth", GroundTruth(), "true_mask")
    teachers = {"sam3": sam3, "colour": colour, "ground_truth": ground_truth}
    return look_up("agent.mask_source", source, {"sam3": sam3, "colour": colour, "student": student})()


def look_up(setting: str, name: str, table: Mapping[str, Any]) -> Any:
    """The entry ``name``.

    Raises:
        ValueError: There is none; the message lists the choices.
    """
    if name not in table:
        raise ValueError(f"{setting}={name!r}: choose one of {sorted(table)}")
    return table[name]
