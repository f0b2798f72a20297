"""Facts about the dm_control tasks that the library does not tell."""

from __future__ import annotations

# The camera that pixel benchmarks use, where it is not camera 0.
CAMERAS = {
    "fish": 3,  # fixed, from above: the whole tank with the target
    "quadruped": 2,  # follows the body without turning with it
}


def default_camera(domain: str) -> int:
    """The index of the camera that shows a dm_control domain in pixel benchmarks."""
    return CAMERAS.get(domain, 0)
