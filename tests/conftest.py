"""Shared by all tests."""

import runpy
import signal
from pathlib import Path

# Before anything imports mujoco. Not by importing envs: xdist's first process, which runs no tests, needs none of it.
runpy.run_path(str(Path(__file__).parents[1] / "envs/gl.py"))["choose_gl_backend"]()

# The programs under test inherit this. A shell starts background jobs with Ctrl-C ignored, and so would they.
signal.signal(signal.SIGINT, signal.default_int_handler)
