"""The hook that gives replayed frames their masks, a few per update, newest first."""

import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.trainers import TrainerHookBase

from dreamer.agents.pictures import overlay_mask, to_bytes
from dreamer.evaluation import preserve_rng
from dreamer.labellers import Labeller, Labels
from envs.segmentation.metrics import jaccard, recall
from envs.segmentation.protocol import HALF

if TYPE_CHECKING:
    from dreamer.trainer import Trainer

FRAMES = ("pixels", "true_mask")  # what labellers see of a record
EXAMPLES_FROM = 1024  # newest records among which the examples of a labeller are spread
CONTACT_FRAMES = 16  # labelled frames on the contact sheet
CONTACT_COLUMNS = 4
PRESENCE_FRAMES = 100  # labelled frames after which too many empty masks are told
SMALLEST_SHARE = 1e-3  # a mask that covers less of the image is as good as empty


class Annotated(NamedTuple):
    """Frames [N] with their labels, all on the CPU, and the seconds that it took."""

    frames: TensorDictBase
    labels: Labels
    seconds: float


class AnnotateReplay(TrainerHookBase):
    """Label the newest records that have no mask yet.

    Every frame is labelled at most once, also the last one of an episode: ``mask``, ``mask_valid`` and ``mask_version``
    are written into its record unless that was overwritten meanwhile. The random numbers of training stay as they
    were.

    Args:
        labeller: What makes the masks.
        frames_per_update: Frames that it gets per update at most.
        asynchronous: Label in a thread, one batch at a time; an update never waits for it. For a labeller on a second
            device or on cores that are free. Otherwise all is a function of the seed.
        device: Where the labeller gets its frames.
    """

    def __init__(
        self,
        labeller: Labeller,
        *,
        frames_per_update: int,
        asynchronous: bool = False,
        device: torch.device | str = "cpu",
    ):
        if frames_per_update < 1:
            raise ValueError(f"agent.segmentation.frames_per_update={frames_per_update}: give at least 1")
        self.labeller, self.frames_per_update, self.device = labeller, frames_per_update, torch.device(device)
        self.executor = ThreadPoolExecutor(1, "annotation") if asynchronous else None
        self.job: Future[Annotated] | None = None
        self.first_look = FirstLook(labeller.name)

    def register(self, trainer: "Trainer", name: str = "annotate_replay") -> None:
        """Plug into a trainer, behind the hooks that it has."""
        self.trainer, self.replay = trainer, trainer.replay_buffer
        trainer.register_op("post_optim_log", self)
        trainer.register_module(name, self)
        trainer.register_op("shutdown", self.finish)

    def __call__(self, batch: TensorDictBase) -> dict[str, Tensor | float]:
        """Label what is due.

        Args:
            batch: The replay sample of the update. Its share of labelled records is logged, because that is what the
                model learns from.
        """
        metrics = {"labelled": batch["mask_valid"].float().mean()}
        if self.executor is None:
            if (frames := self._take(batch)) is not None:
                with preserve_rng(0):
                    annotated = self._label(*frames)
                metrics |= self._put(annotated)
        elif self.job is None or self.job.done():
            metrics |= self._collect()
            if (frames := self._take(batch)) is not None:
                self.job = self.executor.submit(self._label, *frames)
        return {f"segmentation/{key}": value for key, value in metrics.items()}

    def finish(self) -> None:
        """End the thread with the batch under way, and keep what the labeller learned in the run folder."""
        if self.executor is not None:
            self.executor.shutdown()
            self._collect()
        self.labeller.export(self.trainer.run_dir)

    def state_dict(self) -> dict[str, Any]:
        """What the labeller learned, and the first look; the batch under way is labelled again after a resume."""
        wait([self.job] if self.job else [])  # it may change the labeller
        return {"labeller": self.labeller.state_dict(), "first_look": self.first_look.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.labeller.load_state_dict(state_dict["labeller"])
        self.first_look.load_state_dict(state_dict["first_look"])

    def _take(self, batch: TensorDictBase) -> tuple[TensorDict, TensorDict | None] | None:
        """Copy the frames to label next and the examples that the labeller wants; None if nothing is to be done."""
        keys = [key for key in FRAMES if key in batch]
        frames = self.replay.newest(self.frames_per_update, keys, unset="mask_valid")
        if not len(frames):
            return None
        examples = None
        if self.labeller.examples:
            examples = self.replay.newest(EXAMPLES_FROM, keys, unset="mask_valid")
            spread = torch.linspace(0, len(examples) - 1, min(self.labeller.examples, len(examples)))
            examples = examples[spread.round().long()].to(self.device)
        return frames, examples

    def _label(self, frames: TensorDict, examples: TensorDict | None) -> Annotated:
        """Label frames; all that may run in the thread."""
        start = time.perf_counter()
        if examples is not None:
            self.labeller.prepare(examples)
        labels = Labels(*(entry.cpu() for entry in self.labeller.label(frames.to(self.device))))
        return Annotated(frames.cpu(), labels, time.perf_counter() - start)

    def _collect(self) -> dict[str, Tensor | float]:
        """Put the finished batch, if there is one, into the replay. Raises what was raised in the thread."""
        job, self.job = self.job, None
        return {} if job is None else self._put(job.result())

    def _put(self, annotated: Annotated) -> dict[str, Tensor | float]:
        """Write labels into their records, and measure them."""
        frames, labels = annotated.frames[annotated.labels.done], annotated.labels
        mask, version = labels.mask[labels.done], labels.version[labels.done]  # [n, h, w, 1], [n]
        metrics = {"frames_per_second": len(labels.done) / annotated.seconds, **self.labeller.metrics()}
        if not len(mask):
            return metrics
        valid = torch.ones(len(mask), 1, dtype=torch.bool)
        # The flag comes last: whoever samples meanwhile never sees it without the mask.
        values = TensorDict({"mask": mask, "mask_version": version[:, None], "mask_valid": valid}, [len(mask)])
        metrics["late"] = float(len(mask) - self.replay.write(frames["stream"], frames["position"], values))
        shown = mask >= HALF
        present = shown.float().mean((1, 2, 3)) >= SMALLEST_SHARE  # [n]
        metrics["presence"] = present.float().mean()
        if "true_mask" in frames:
            metrics["iou"] = jaccard(shown, frames["true_mask"]).mean()
            metrics["recall"] = recall(shown, frames["true_mask"]).mean()
        self.first_look(self.trainer, frames["pixels"], mask, present)
        return metrics


class FirstLook:
    """Show the first labelled frames to a person, and tell when most of the first ones are empty.

    Args:
        name: Of the labeller.
    """

    def __init__(self, name: str):
        self.name = name
        self.labelled = self.present = 0
        self.tiles: list[Tensor] = []  # uint8 [h, 2w, 3]: frame | overlay

    def __call__(self, trainer: "Trainer", pixels: Tensor, mask: Tensor, present: Tensor) -> None:
        """Look at labelled frames, until there were enough.

        Args:
            trainer: Takes the picture and the incident.
            pixels, mask: uint8 [n, h, w, 3] and [n, h, w, 1].
            present: bool [n], whether the mask is more than empty.
        """
        before, self.labelled = self.labelled, self.labelled + len(mask)
        if before < CONTACT_FRAMES:
            images, masks = (x[: CONTACT_FRAMES - before].float() / 255 for x in (pixels, mask))
            self.tiles += to_bytes(torch.cat([images, overlay_mask(images, masks)], 2)).unbind()
            if self.labelled >= CONTACT_FRAMES:
                sheet = torch.stack(self.tiles).unflatten(0, (-1, CONTACT_COLUMNS))  # [rows, columns, h, 2w, 3]
                sheet = sheet.transpose(1, 2).flatten(2, 3).flatten(0, 1)
                trainer.logger.log_image("segmentation/contact_sheet", sheet, trainer.collected_frames)
                self.tiles.clear()
        if before < PRESENCE_FRAMES:
            self.present += int(present.sum())
            if self.labelled >= PRESENCE_FRAMES and 2 * self.present < self.labelled:
                trainer.incident(
                    "low_presence",
                    f"{self.name}: something was found in only {self.present} of {self.labelled} frames: look at "
                    "images/segmentation_contact_sheet_*.png; try other words in agent.segmentation.prompt, or another "
                    "agent.mask_source",
                )

    def state_dict(self) -> dict[str, Any]:
        return {"labelled": self.labelled, "present": self.present, "tiles": list(self.tiles)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.labelled, self.present = state_dict["labelled"], state_dict["present"]
        self.tiles = list(state_dict["tiles"])
