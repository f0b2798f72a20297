"""One function that makes any of our environments from plain keyword arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torchrl.envs import CatFrames, Compose, EnvBase, ExcludeTransform, InitTracker, Transform

from envs.backends.dmc import DMCEnv
from envs.backends.gym import GymnasiumEnv
from envs.backends.mock import MockEnv
from envs.choices import check_choice, check_positive
from envs.seeded import SeededTransformedEnv
from envs.transforms.distraction import make_distraction
from envs.transforms.grey import Grey
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
    emit_mask: bool = False,
    grey: bool = False,
    frame_stack: int = 1,
    options: Mapping[str, Any] | None = None,
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
        emit_mask: write the simulator's mask of the foreground in the image as shown, whatever distracts. Images stay
            the same. The floor is background, but for a distraction with `replace_floor=False`.
        grey: images in shades of grey.
        frame_stack: images of the last so many steps, the newest in the last channels; at a reset, the first one so
            many times.
        options: further arguments of the backend's class, and for `gymnasium.make` with backend "gym".
        seed: of the environment and its transforms, in [0, 2**32); every episode derives its own.
        stream: number that marks the observations of this environment, None for no mark.
        device: where the tensors go.
        transforms: more transforms, or functions that make them, to apply after the images are drawn.

    Writes:
        `pixels` uint8 `[h, w, C]`, where C is 3 (1 if grey) times `frame_stack`, and/or `observation` float32 `[O]`;
        `mask` bool `[h, w, 1]` if asked for; `reward` float32 `[1]`; `is_init`, `terminated`, `truncated`, `done` bool
        `[1]`; `previous_action` `[A]`, `previous_reward` `[1]`; `stream` int64 `[1]` if asked for; what the distraction
        writes.

    Raises:
        ValueError: a name, task, count or option that does not exist; the message lists those that do. Or a
            distraction or a mask without images.
        TypeError: the backend has no mask where one is needed, or cannot draw in the way that is asked for.
        ImportError: the simulator of the backend is not installed.
    """
    check_choice("backend", backend, BACKENDS)
    for option in render or {}:
        check_choice("render option", option, RENDER_OPTIONS)
    distractor = make_distraction(distraction)
    if distractor is not None and not from_pixels:
        raise ValueError(f"distraction={dict(distraction or {})}: needs images, from_pixels=True")
    if emit_mask and not from_pixels:
        raise ValueError("emit_mask=True: needs images, from_pixels=True")
    check_positive("frame_stack", frame_stack)
    if not from_pixels and (grey or frame_stack > 1):
        raise ValueError(f"grey={grey}, frame_stack={frame_stack}: needs images, from_pixels=True")
    base = make_backend(backend, options or {}, name=name, task=task, frame_skip=frame_skip, seed=seed, device=device)
    if getattr(base, "observes_images", False) and not from_pixels:
        raise ValueError(f"from_pixels=False: {name} shows images only, give from_pixels=True")
    chain = draw(image_size, render or {}, distractor, emit_mask) if from_pixels else []
    chain += [Grey()] if grey else []
    chain += [CatFrames(frame_stack, dim=-1, in_keys=["pixels"])] if frame_stack > 1 else []
    if from_pixels and pixels_only and "observation" in base.observation_spec:
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


def make_backend(backend: str, options: Mapping[str, Any], **arguments: Any) -> EnvBase:
    """An environment of a backend, with `options` beside the arguments that all backends take.

    Raises:
        ValueError: the backend has no such option, or it is one of the arguments.
    """
    kind = BACKENDS[backend]
    for option in arguments.keys() & options.keys():
        raise ValueError(f"options={dict(options)}: give {option} beside the options, not among them")
    taken = inspect.signature(kind.__init__).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        for option in options:
            check_choice("option", option, taken.keys() - {"self", *arguments})
    return kind(**arguments, **options)


def draw(
    image_size: int, render: Mapping[str, Any], distraction: Transform | None, emit_mask: bool = False
) -> list[Transform]:
    """The transforms that draw an image with its distraction.

    Args:
        image_size: height and width in pixels.
        render: options of `envs.Render`.
        distraction: see `envs.transforms.distraction`; None for none.
        emit_mask: leave the simulator's mask in the observations.

    Raises:
        ValueError: `emit_mask`, and the distraction emits a mask of its own.
    """
    needs = dict(getattr(distraction, "render_options", {}))
    keeps_mask = getattr(distraction, "emit_mask", False)
    if emit_mask and keeps_mask and not needs.get("mask"):
        raise ValueError(
            "emit_mask=True and distraction.emit_mask=True: two masks, the simulator's and that of the colours "
            "(mask='chroma'); choose one of them"
        )
    drawn = {"mask": True, "reflections": True, **needs} if emit_mask and not needs.get("mask") else needs
    chain: list[Transform] = [Render(image_size, **{**render, **drawn})]
    if distraction is not None:
        chain.insert(0 if getattr(distraction, "before_render", False) else 1, distraction)
    if drawn.get("mask") and not (emit_mask or keeps_mask):
        chain.append(ExcludeTransform("mask"))
    return chain
