"""TorchRL transforms: images, distractions, masks, what led to an observation, its stream, a guard against NaN."""

from envs.transforms.color_grid import ColorGrid
from envs.transforms.concept_mask import ConceptMask, Sam3Mask
from envs.transforms.denoised_mdp import CameraJitter, NoisySensor
from envs.transforms.distracting_cs import DistractingCS
from envs.transforms.finite_guard import FiniteGuard
from envs.transforms.grey import Grey
from envs.transforms.mask_observation import MaskObservation
from envs.transforms.natural_video import NaturalVideo
from envs.transforms.previous_step import PreviousStep
from envs.transforms.render import Render
from envs.transforms.stream_index import StreamIndex

__all__ = [
    "CameraJitter",
    "ColorGrid",
    "ConceptMask",
    "DistractingCS",
    "FiniteGuard",
    "Grey",
    "MaskObservation",
    "NaturalVideo",
    "NoisySensor",
    "PreviousStep",
    "Render",
    "Sam3Mask",
    "StreamIndex",
]
