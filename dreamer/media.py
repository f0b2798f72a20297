"""The hook that shows what an agent sees, reconstructs and imagines."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tensordict import TensorDictBase
from torch import Tensor

from dreamer.agents import Media
from dreamer.evaluation import preserve_rng, to_rgb
from dreamer.hooks import Every

if TYPE_CHECKING:
    from dreamer.trainer import Trainer


class LogMedia:
    """Show what the model sees and imagines. Pictures, videos and histograms of the last update's batch.

    Nothing is drawn from the replay for it, and the random numbers of training stay as they were.

    Args:
        trainer: Gives the frames and takes the results.
        make_media: A replay sample -> :class:`Media`, on any device; None where the agent calls :meth:`show` itself.
        interval: Frames between two; 0 for never. The first is made after the first update.
        histograms, images, videos: What to write.
    """

    def __init__(
        self,
        trainer: "Trainer",
        make_media: Callable[[TensorDictBase], Media] | None,
        interval: int,
        histograms: bool = False,
        images: bool = True,
        videos: bool = True,
    ):
        self.trainer, self.make_media = trainer, make_media
        self.histograms, self.images, self.videos = histograms, images, videos
        self.due = Every(interval if histograms or images or videos else 0, first=0)

    def __call__(self, batch: TensorDictBase) -> dict[str, Tensor] | None:
        if not self.due(self.trainer.collected_frames):
            return None
        with preserve_rng(0):
            media = self.make_media(batch)
        self.show(media)
        return media.scalars

    def show(self, media: Media) -> None:
        """Log what is wanted of ``media`` now."""
        logger, place = self.trainer.logger, (self.trainer.collected_frames, self.trainer.log_step)
        for wanted, kind, log in (
            (self.images, media.images, logger.log_image),
            (self.videos, media.videos, logger.log_video),
            (self.histograms, media.histograms, logger.log_histogram),
        ):
            for name, content in kind.items() if wanted else ():
                log(name, (content if kind is media.histograms else to_rgb(content)).cpu(), *place)

    def state_dict(self) -> dict[str, Any]:
        return {"due": self.due.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.due.load_state_dict(state_dict["due"])
