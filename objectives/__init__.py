"""Losses of world-model agents as TorchRL ``LossModule``s, and the pure functions that they are made of."""

from objectives.actor_critic import ImaginedActorCriticLoss, ReplayCriticLoss
from objectives.dreamer_v1 import DreamerV1Loss, DreamerV1ModelLoss, DynamicsActorValueLoss
from objectives.dreamer_v3 import DreamerV3Loss
from objectives.segmentation_dreamer import SegmentationDreamerModelLoss
from objectives.world2filter import World2FilterModelLoss
from objectives.world_model import WorldModelLoss
from objectives.world_models import MDNRNNLoss, VAELoss

__all__ = [
    "DreamerV1Loss",
    "DreamerV1ModelLoss",
    "DreamerV3Loss",
    "DynamicsActorValueLoss",
    "ImaginedActorCriticLoss",
    "MDNRNNLoss",
    "ReplayCriticLoss",
    "SegmentationDreamerModelLoss",
    "VAELoss",
    "World2FilterModelLoss",
    "WorldModelLoss",
]
