"""Masks of the foreground: from the simulator, from colours, from SAM 3, and from a small network that learns them."""

from envs.segmentation.colour import ColourModel
from envs.segmentation.ground_truth import GroundTruth
from envs.segmentation.labels import load_labels
from envs.segmentation.protocol import Segmenter, check_frames, fingerprint, join_concepts, split_prompt
from envs.segmentation.sam3 import Sam3
from envs.segmentation.student import Distillation, Student

__all__ = [
    "ColourModel",
    "Distillation",
    "GroundTruth",
    "Sam3",
    "Segmenter",
    "Student",
    "check_frames",
    "fingerprint",
    "join_concepts",
    "load_labels",
    "split_prompt",
]
