"""A small network that learns to mark the foreground from another segmenter, and then marks it much faster."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate, max_pool2d

from envs.choices import check_positive
from envs.segmentation.background_swap import augment, swap_backgrounds
from envs.segmentation.metrics import empty_rate, jaccard
from envs.segmentation.protocol import HALF, check_frames, fingerprint

WIDTH = 8  # channels at full resolution
CHUNK = 16  # frames per pass: more do not fit the caches of a CPU
LARGEST_EMPTY_SHARE = 1 / 8  # of what is learned from: a teacher that misses the object does not teach to miss it
FEWEST_EXAMINED = 4  # held-out labels without which nobody is promoted
WARM_UP = 20  # steps until the learning rate is reached
DECAY = 0.98  # of the running mean of the weights


class StudentNet(nn.Module):
    """A U-Net of three resolutions with 28 thousand parameters.

    Args:
        seed: of the weights; global random numbers stay as they are.
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        c = WIDTH
        self.fine = nn.Sequential(*_layer(3, c), *_layer(c, c))
        self.middle = nn.Sequential(*_layer(c, 2 * c), *_layer(2 * c, 2 * c))
        self.coarse = nn.Sequential(*_layer(2 * c, 4 * c), *_layer(4 * c, 4 * c), _conv(4 * c, 2 * c, 1))
        self.from_coarse = nn.Sequential(*_layer(4 * c, 2 * c), *_layer(2 * c, 2 * c), _conv(2 * c, c, 1))
        self.from_middle = nn.Sequential(*_layer(2 * c, c), *_layer(c, c), _conv(c, 1, 1))
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
                nn.init.zeros_(module.bias)

    def forward(self, frames: Tensor) -> Tensor:
        """Logits of the foreground.

        Args:
            frames: `[N, 3, h, w]` in [0, 1], height and width divisible by 4.

        Returns:
            `[N, 1, h, w]`.

        Raises:
            ValueError: frames of another size.
        """
        if frames.shape[-2] % 4 or frames.shape[-1] % 4:
            raise ValueError(f"images are {list(frames.shape[-2:])}: give height and width divisible by 4")
        fine = self.fine(frames.contiguous(memory_format=torch.channels_last))  # [N, c, h, w]
        middle = self.middle(max_pool2d(fine, 2))  # [N, 2c, h/2, w/2]
        below = self.coarse(max_pool2d(middle, 2))  # [N, 2c, h/4, w/4]
        below = self.from_coarse(torch.cat([middle, interpolate(below, scale_factor=2)], 1))  # [N, c, h/2, w/2]
        return self.from_middle(torch.cat([fine, interpolate(below, scale_factor=2)], 1))


class Student:
    """Marks the foreground with a `StudentNet`, on the device of the network.

    Args:
        net: the network; None for a new one, which knows nothing.
        seed: of the weights of a new network.
    """

    concepts = ("foreground",)

    def __init__(self, net: StudentNet | None = None, *, seed: int = 0):
        self.net = (net or StudentNet(seed)).eval()

    @property
    def version(self) -> int:
        """Changes with the weights."""
        digest = hashlib.sha256()
        for tensor in self.net.state_dict().values():
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return fingerprint("student", digest.hexdigest())

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.net.parameters()).device

    @torch.no_grad()  # no inference mode: its tensors cannot be changed in place later
    def __call__(self, frames: Tensor) -> Tensor:
        """Marks the foreground; see `Segmenter`.

        Args:
            frames: uint8 `[N, h, w, 3]`, height and width divisible by 4.

        Returns:
            uint8 `[N, h, w, 1]`, 255 times the probability of the foreground.

        Raises:
            ValueError: frames of another type or shape.
        """
        check_frames(frames)
        masks = [frames.new_empty(0, *frames.shape[1:3], 1)]
        for chunk in frames.split(CHUNK):
            probability = self.net(_to_images(chunk.to(self.device))).sigmoid()  # [n, 1, h, w]
            masks.append((255 * probability).round().byte().permute(0, 2, 3, 1).to(frames.device))
        return torch.cat(masks)

    def save(self, path: str | Path) -> None:
        """Writes the weights into a file of the format safetensors."""
        from safetensors.torch import save

        weights = {name: value.contiguous() for name, value in self.net.state_dict().items()}
        Path(path).write_bytes(save(weights))

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Student:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        net = StudentNet()
        try:
            net.load_state_dict(load(Path(path).read_bytes()))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{path} holds no weights of a student: give what `Student.save` wrote") from error
        return cls(net.to(device))


class Distillation:
    """Teaches a student online, from the labels of a teacher.

    The newest labels are kept, and a fixed share of them is held out: the student never learns from these, it is
    examined on them. It learns from labelled frames whose background is swapped (`background_swap.augment`), and marks
    with the running mean of the weights that learn. Random numbers are its own.

    Equation: L = BCE(p, m) + 1 - (2 sum p m + 1) / (sum p^2 + sum m^2 + 1), least at p = m also for soft labels m.

    A label is empty where no pixel of it is above half. Such labels are at most an eighth of what is learned from, as
    far as there are others, and no examination asks for them: a teacher who misses the object is no measure.

    Args:
        student: what learns, changed in place.
        capacity: labelled frames to keep; at least four of them must be held out.
        held_out: share of them that is held out, in (0, 1).
        batch_size: labelled frames per step.
        lr: learning rate.
        bar: held-out Jaccard index in [0, 1] from which on the student is promoted.
        largest_empty_rate: share of the held-out frames in which a promoted student may find nothing, in [0, 1].
        seed: of what is drawn.

    Attributes:
        promoted: whether the student passed the last examination.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        student: Student,
        *,
        capacity: int = 1024,
        held_out: float = 0.1,
        batch_size: int = 16,
        lr: float = 1e-2,
        bar: float = 0.9,
        largest_empty_rate: float = 0.01,
        seed: int = 0,
    ):
        check_positive("batch_size", batch_size)
        for name, share in (("held_out", held_out), ("bar", bar), ("largest_empty_rate", largest_empty_rate)):
            if not 0 <= share <= 1 or (name == "held_out" and share in (0, 1)):
                raise ValueError(f"{name}={share}: give a share between 0 and 1")
        self.student, self.promoted = student, False
        self.held_out, self.batch_size, self.lr = held_out, batch_size, lr
        self.bar, self.largest_empty_rate, self.seed = bar, largest_empty_rate, seed
        self.capacity, self.largest_exam = capacity, round(capacity * held_out)
        self.largest_lesson = capacity - self.largest_exam
        if self.largest_exam < FEWEST_EXAMINED or self.largest_lesson < 1:
            raise ValueError(
                f"capacity={capacity} with held_out={held_out} keeps {self.largest_lesson} labels to learn from and "
                f"{self.largest_exam} for the examination: give 1 and {FEWEST_EXAMINED} at least, or nobody is promoted"
            )
        self.lesson = self.exam = torch.empty(0, 0, 0, 4, dtype=torch.uint8)  # [M, h, w, 3 + 1], frames and masks
        self.added = self.steps = 0
        self.net = deepcopy(student.net)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr)
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, frames: Tensor, masks: Tensor) -> None:
        """Keeps labelled frames; the oldest make room for them.

        Args:
            frames: uint8 `[N, h, w, 3]`, N may be 0.
            masks: uint8 `[N, h, w, 1]`, 0..255, the labels.

        Raises:
            ValueError: they have another type or shape, or another size than those before.
        """
        check_frames(frames)
        if masks.dtype != torch.uint8 or masks.shape != (*frames.shape[:3], 1):
            shape = [*frames.shape[:3], 1]
            raise ValueError(f"masks are {masks.dtype} {list(masks.shape)}: give uint8 {shape} for these frames")
        if self.added and frames.shape[1:3] != self.lesson.shape[1:3]:
            sizes = f"{list(frames.shape[1:3])}, those before {list(self.lesson.shape[1:3])}"
            raise ValueError(f"frames are {sizes}: give one distillation frames of one size")
        device = self.student.device
        labels = torch.cat([frames.to(device), masks.to(device)], -1)  # [N, h, w, 4]
        if not self.added:
            self.lesson = self.exam = labels[:0]
        first, share = self.added, self.held_out
        held = [math.floor((i + 1) * share) > math.floor(i * share) for i in range(first, first + len(labels))]
        held = torch.tensor(held, dtype=torch.bool, device=device)
        self.exam = torch.cat([self.exam, labels[held]])[-self.largest_exam :]
        self.lesson = torch.cat([self.lesson, labels[~held]])[-self.largest_lesson :]
        self.added += len(labels)

    @torch.enable_grad()
    def learn(self, steps: int) -> dict[str, float]:
        """Takes training steps, none as long as there are no labels.

        Returns:
            The mean `loss` of these steps; nothing if there were none.
        """
        if not len(self.lesson) or steps < 1:
            return {}
        self.net.train()
        chances, total = self._chances(), torch.zeros((), device=self.student.device)
        for _ in range(steps):
            self.steps += 1
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * min(1.0, self.steps / WARM_UP)
            drawn = torch.multinomial(chances, self.batch_size, replacement=True, generator=self.generator)
            frames, masks = _split(self.lesson[drawn.to(self.lesson.device)])
            donors, donor_masks = frames.roll(1, 0), masks.roll(1, 0)
            frames, masks = augment(frames, masks, donors, donor_masks, self.generator)
            loss = compute_loss(self.net(frames), masks)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self._average()
            total += loss.detach()
        return {"loss": float(total) / steps}

    @torch.no_grad()
    def examine(self) -> dict[str, float]:
        """Compares the student with the held-out labels, and promotes or demotes it.

        Returns:
            `examined`, the number of labels that count, and if there are any: `jaccard` and `empty_rate`, and
            `swapped_jaccard`, in front of backgrounds that the student never saw.
        """
        exam = self.exam[_has_object(self.exam)]
        facts = {"examined": float(len(exam))}
        if len(exam):
            truth, marked = exam[..., 3] >= HALF, self.student(exam[..., :3]) >= HALF
            frames, masks = _split(exam)
            generator = torch.Generator().manual_seed(self.seed)  # the same exam every time
            swapped = swap_backgrounds(frames, masks, frames.roll(1, 0), masks.roll(1, 0), generator)
            marked_swapped = self.student((255 * swapped).round().byte().permute(0, 2, 3, 1)) >= HALF
            facts["jaccard"] = float(jaccard(marked, truth).mean())
            facts["swapped_jaccard"] = float(jaccard(marked_swapped, truth).mean())
            facts["empty_rate"] = float(empty_rate(marked, truth))
        passed = len(exam) >= FEWEST_EXAMINED and facts["jaccard"] >= self.bar
        self.promoted = passed and facts["empty_rate"] <= self.largest_empty_rate
        return facts

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, the labels too."""
        return {
            "student": self.student.net.state_dict(),
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "lesson": self.lesson,
            "exam": self.exam,
            "added": self.added,
            "steps": self.steps,
            "promoted": self.promoted,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where another one was."""
        self.student.net.load_state_dict(state_dict["student"])
        self.net.load_state_dict(state_dict["net"])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.generator.set_state(state_dict["generator"].cpu())
        self.lesson, self.exam = (state_dict[name].to(self.student.device) for name in ("lesson", "exam"))
        self.added, self.steps, self.promoted = (state_dict[name] for name in ("added", "steps", "promoted"))

    def _chances(self) -> Tensor:
        """How often each label is drawn, relative to the others."""
        full = _has_object(self.lesson).cpu()
        number, empty = int(full.sum()), int((~full).sum())
        most = LARGEST_EMPTY_SHARE / (1 - LARGEST_EMPTY_SHARE) * number / max(empty, 1)
        return torch.where(full, 1.0, min(1.0, most) if number else 1.0)

    @torch.no_grad()
    def _average(self) -> None:
        """Moves the weights that mark towards those that learn, quickly at first."""
        decay = min(DECAY, self.steps / (self.steps + 10))
        learned = self.net.state_dict()
        for name, value in self.student.net.state_dict().items():
            if value.is_floating_point():
                value.lerp_(learned[name], 1 - decay)


def compute_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy plus a Dice term over the whole batch, `[]`; see `Distillation`.

    Args:
        logits: `[N, 1, h, w]`.
        masks: `[N, 1, h, w]` in [0, 1].
    """
    probability = logits.sigmoid()
    overlap, size = (probability * masks).sum(), probability.square().sum() + masks.square().sum()
    return binary_cross_entropy_with_logits(logits, masks) + 1 - (2 * overlap + 1) / (size + 1)


def _conv(channels: int, out: int, size: int) -> nn.Module:
    """A convolution without weights yet, so that making it draws no global random numbers."""
    return nn.utils.skip_init(nn.Conv2d, channels, out, size, padding=size // 2)


def _layer(channels: int, out: int) -> list[nn.Module]:
    return [_conv(channels, out, 3), nn.BatchNorm2d(out), nn.ReLU()]


def _to_images(frames: Tensor) -> Tensor:
    """uint8 `[N, h, w, C]` as `[N, C, h, w]` in [0, 1]."""
    return frames.permute(0, 3, 1, 2).float() / 255


def _split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Images `[N, 3, h, w]` and masks `[N, 1, h, w]` of labels, both in [0, 1]."""
    images = _to_images(labels)
    return images[:, :3], images[:, 3:]


def _has_object(labels: Tensor) -> Tensor:
    """Which labels are not empty, bool `[N]`."""
    return (labels[..., 3] >= HALF).flatten(1).any(1)
