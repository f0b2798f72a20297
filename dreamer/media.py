"""The hook that shows what an agent sees, reconstructs and imagines."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tensordict import TensorDictBase
from torch import Tensor

from dreamer.agents import Media
from dreamer.evaluation import preserve_rng
from dreamer.hooks import Every

if TYPE_CHECKING:
    from dreamer.trainer import Trainer


class LogMedia:
    """Show what the model sees and imagines. Pictures, videos and histograms of the last update's batch.

    Nothing is drawn from the replay for it, and the random numbers of training stay as they were.

    Args:
        trainer: Gives the frames and takes the results.
        make_media: A replay sample -> :class:`Media`, on any device.
        interval: Frames between two; 0 for never. The first is made after the first update.
        histograms, images, videos: What to write.
    """

    def __init__(
        self,
        trainer: "Trainer",
        make_media: Callable[[TensorDictBase], Media],
        interval: int,
        histograms: bool = False,
        images: bool = True,
        videos: bool = True,
    ):
        self.trainer, self.make_media = trainer, make_media
        self.histograms, self.images, self.videos = histograms, images, videos
        self.due = Every(interval if histograms or images or videos else 0, first=0)

    def __call__(self, batch: TensorDictBase) -> dict[str, Tensor] | None:
        frames, logger = self.trainer.collected_frames, self.trainer.logger
        if not self.due(frames):
            return None
        with preserve_rng(0):
            media = self.make_media(batch)
        for wanted, kind, log in (
            (self.images, media.images, logger.log_image),
            (self.videos, media.videos, logger.log_video),
            (self.histograms, media.histograms, logger.log_histogram),
        ):
            for name, content in kind.items() if wanted else ():
                log(name, content.cpu(), frames)
        return media.scalars

    def state_dict(self) -> dict[str, Any]:
        return {"due": self.due.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.due.load_state_dict(state_dict["due"])
