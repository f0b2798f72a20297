"""Shared by all tests."""

import envs  # noqa: F401, first: it chooses MUJOCO_GL before anything imports mujoco
