"""One function that makes any of our environments from plain keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torchrl.envs import Compose, ExcludeTransform, InitTracker, Transform

from envs.backends.dmc import DMCEnv
from envs.backends.gym import GymnasiumEnv
from envs.backends.mock import MockEnv
from envs.choices import check_choice
from envs.seeded import SeededTransformedEnv
from envs.transforms.distraction import make_distraction
from envs.transforms.previous_step import PreviousStep
from envs.transforms.render import Render
from envs.transforms.stream_index import StreamIndex

BACKENDS = {"dmc": DMCEnv, "gym": GymnasiumEnv, "mock": MockEnv}
RENDER_OPTIONS = ("backend", "camera", "fast")


def make_env(
    *,
    backend: str = "dmc",
    name: str,
    task: str | None = None,
    frame_skip: int = 2,
    image_size: int = 64,
    from_pixels: bool = True,
    pixels_only: bool = True,
    render: Mapping[str, Any] | None = None,
    distraction: Mapping[str, Any] | None = None,
    seed: int = 0,
    stream: int | None = None,
    device: torch.device | str = "cpu",
    transforms: Sequence[Transform | Callable[[], Transform]] = (),
) -> SeededTransformedEnv:
    """Makes a seeded environment.

    Args:
        backend: "dmc", "gym" or "mock".
        name: domain of dm_control ("cheetah"), id of Gymnasium ("Pendulum-v1") or name in `envs.backends.mock`.
        task: task of the domain ("run"); None if there is only one.
        frame_skip: frames per agent step, at least 1; rewards are summed.
        image_size: height and width of the images in pixels, at least 1.
        from_pixels: draw images.
        pixels_only: leave `observation` out where there are images.
        render: `camera` (index or name, None for the usual one), `fast` (a cheaper image, not the one that
            benchmarks use) and `backend` ("mujoco", or "mjwarp": ray casting, another image, fast without a GPU).
        distraction: `name` of a distraction in `envs.transforms.distraction` and its options, such as
            `{"name": "color_grid", "level": "action"}`; None or the name "none" for none.
        seed: of the environment and its transforms, in [0, 2**32); every episode derives its own.
        stream: number that marks the observations of this environment, None for no mark.
        device: where the tensors go.
        transforms: more transforms, or functions that make them, to apply after the images are drawn.

    Writes:
        `pixels` uint8 `[h, w, 3]` and/or `observation` float32 `[O]`; `reward` float32 `[1]`; `is_init`,
        `terminated`, `truncated`, `done` bool `[1]`; `previous_action` `[A]`, `previous_reward` `[1]`;
        `stream` int64 `[1]` if asked for; what the distraction writes.

    Raises:
        ValueError: a name, task, count or option that does not exist; the message lists those that do. Or a
            distraction without images.
        ImportError: the simulator of the backend is not installed.
    """
    check_choice("backend", backend, BACKENDS)
    for option in render or {}:
        check_choice("render option", option, RENDER_OPTIONS)
    distractor = make_distraction(distraction)
    if distractor is not None and not from_pixels:
        raise ValueError(f"distraction={dict(distraction or {})}: needs images, from_pixels=True")
    base = BACKENDS[backend](name=name, task=task, frame_skip=frame_skip, seed=seed, device=device)
    chain = draw(image_size, render or {}, distractor) if from_pixels else []
    if from_pixels and pixels_only:
        chain.append(ExcludeTransform("observation"))
    chain += [item if isinstance(item, Transform) else item() for item in transforms]
    chain.append(PreviousStep())  # after the others, which may change the reward
    if stream is not None:
        chain.append(StreamIndex(stream))
    chain.append(InitTracker())
    env = SeededTransformedEnv(base, Compose(chain))
    env.set_seed(seed)
    _ = env.observation_spec  # transforms that do not fit the environment complain here, not at the first reset
    return env


def draw(image_size: int, render: Mapping[str, Any], distraction: Transform | None) -> list[Transform]:
    """The transforms that draw an image with its distraction.

    Args:
        image_size: height and width in pixels.
        render: options of `envs.Render`.
        distraction: see `envs.transforms.distraction`; None for none.
    """
    needs = getattr(distraction, "render_options", {})
    chain: list[Transform] = [Render(image_size, **{**render, **needs})]
    if distraction is not None:
        chain.insert(0 if getattr(distraction, "before_render", False) else 1, distraction)
    if needs.get("mask") and not getattr(distraction, "emit_mask", False):
        chain.append(ExcludeTransform("mask"))
    return chain
