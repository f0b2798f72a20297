"""Distractions by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torchrl.envs import Transform

from envs.choices import check_choice
from envs.transforms.color_grid import ColorGrid
from envs.transforms.denoised_mdp import CameraJitter, NoisySensor
from envs.transforms.distracting_cs import DistractingCS
from envs.transforms.natural_video import NaturalVideo

DISTRACTIONS = {
    "color_grid": ColorGrid,
    "natural_video": NaturalVideo,
    "distracting_cs": DistractingCS,
    "noisy_sensor": NoisySensor,
    "camera_jitter": CameraJitter,
}


def make_distraction(options: Mapping[str, Any] | None) -> Transform | None:
    """Makes the distraction of an environment.

    A distraction is a transform with these attributes, which may be left out: `render_options`, options of
    `envs.Render` that it needs (such as `{"mask": True}`); `before_render`, True for one that changes the scene and
    comes before the image is drawn; `emit_mask`, True for one after which the mask stays in the observation.

    Args:
        options: `name` of the distraction and its keyword arguments; None or the name "none" for no distraction.

    Raises:
        ValueError: the name or an option does not exist; the message lists those that do.
    """
    options = dict(options or {"name": "none"})
    name = options.pop("name", None)
    check_choice("distraction", str(name), ["none", *DISTRACTIONS])
    if name == "none":
        for option in options:
            raise ValueError(f"distraction option {option}={options[option]!r}: distraction='none' has no options")
        return None
    distraction = DISTRACTIONS[str(name)]
    for option in options:
        check_choice(f"option of distraction={name!r}", option, set(inspect.signature(distraction).parameters))
    return distraction(**options)
