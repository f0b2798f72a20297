"""Chooses the OpenGL backend before a test module imports dm_control."""

import envs  # noqa: F401
