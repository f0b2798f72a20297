"""Masks of the foreground: from the simulator, from colours, from SAM 3, and from a small network that learns from them."""

from envs.segmentation.protocol import Segmenter, check_frames, fingerprint, join_concepts, split_prompt

__all__ = ["Segmenter", "check_frames", "fingerprint", "join_concepts", "split_prompt"]
