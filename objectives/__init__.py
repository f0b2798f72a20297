"""Losses of world-model agents as TorchRL ``LossModule``s, and the pure functions that they are made of."""

from objectives.actor_critic import ImaginedActorCriticLoss, ReplayCriticLoss
from objectives.dreamer_v3 import DreamerV3Loss
from objectives.segmentation_dreamer import SegmentationDreamerModelLoss
from objectives.world2filter import World2FilterModelLoss
from objectives.world_model import WorldModelLoss

__all__ = [
    "DreamerV3Loss",
    "ImaginedActorCriticLoss",
    "ReplayCriticLoss",
    "SegmentationDreamerModelLoss",
    "World2FilterModelLoss",
    "WorldModelLoss",
]
