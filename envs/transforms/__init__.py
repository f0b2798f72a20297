"""TorchRL transforms: images, what led to an observation, which stream it belongs to."""

from envs.transforms.previous_step import PreviousStep
from envs.transforms.render import Render
from envs.transforms.stream_index import StreamIndex

__all__ = ["PreviousStep", "Render", "StreamIndex"]
