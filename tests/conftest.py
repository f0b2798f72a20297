"""Shared by all tests."""

import signal

import envs  # noqa: F401, first: it chooses MUJOCO_GL before anything imports mujoco

# The programs under test inherit this. A shell starts background jobs with Ctrl-C ignored, and so would they.
signal.signal(signal.SIGINT, signal.default_int_handler)
