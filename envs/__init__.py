"""Environments for world models: dm_control, Gymnasium and known-answer mocks, with images and their transforms."""

from envs.gl import choose_gl_backend

choose_gl_backend()  # before the imports below, because they import MuJoCo, which reads the choice only then

from envs.make import make_env  # noqa: E402
from envs.seeded import SeededTransformedEnv  # noqa: E402
from envs.transforms import (  # noqa: E402
    CameraJitter,
    ColorGrid,
    ConceptMask,
    DistractingCS,
    FiniteGuard,
    Grey,
    MaskObservation,
    NaturalVideo,
    NoisySensor,
    PreviousStep,
    Render,
    Sam3Mask,
    StreamIndex,
)

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
    "SeededTransformedEnv",
    "StreamIndex",
    "make_env",
]
