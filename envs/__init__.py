"""Environments for world models: dm_control, Gymnasium and known-answer mocks, with images and their transforms."""

from envs.gl import choose_gl_backend

choose_gl_backend()  # before the imports below, because they import MuJoCo, which reads the choice only then

from envs.make import SeededTransformedEnv, make_env  # noqa: E402
from envs.transforms import PreviousStep, Render, StreamIndex  # noqa: E402

__all__ = ["PreviousStep", "Render", "SeededTransformedEnv", "StreamIndex", "make_env"]
