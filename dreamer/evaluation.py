"""Whole episodes of a policy in environments of their own, for the training program and for `dreamer.eval`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

EVALUATION = 1 << 30  # tag in derived seeds, beyond all numbers of streams: no episode of a training is one of these
EXPLORATION = {False: ExplorationType.RANDOM, True: ExplorationType.DETERMINISTIC}


class Interrupted(Exception):  # noqa: N818, it is no error
    """An evaluation was given up because the program was asked to stop."""


class Episodes(NamedTuple):
    """What :func:`run_episodes` gives, one entry per episode.

    Args:
        returns: Sums of rewards.
        lengths: Steps.
        seeds: (seed, number) of each episode, by which `SeededTransformedEnv.set_seed` plays it again; None where the
            environment has none.
        frames: uint8 [T, h, w, 3], the images of the first episode from reset to end; None if none were asked for.
    """

    returns: list[float]
    lengths: list[int]
    seeds: list[tuple[int, int] | None]
    frames: Tensor | None = None


@torch.no_grad()
def run_episodes(
    env: EnvBase,
    policy: Callable[[TensorDictBase], TensorDictBase],
    episodes: int,
    device: torch.device,
    *,
    stop: Callable[[], bool] | None = None,
    record: str | None = None,
) -> Episodes:
    """Run whole episodes.

    Rows of a batched environment start together and wait for each other, so that short episodes are not preferred.

    Args:
        env: Batch size [] or [n]; n episodes run side by side.
        policy: Reads and writes TensorDicts on ``device``.
        episodes: Number of episodes.
        device: Of the policy; the environment stays where it is.
        stop: Asked before every step.
        record: Key of the images to keep, uint8 [h, w, C].

    Raises:
        Interrupted: as soon as ``stop()`` is true.
    """
    rows = env.batch_size.numel()
    result, frames = Episodes([], [], []), []
    while len(result.returns) < episodes:
        current = env.reset()
        result.seeds.extend(episode_seeds(env, rows))
        alive = torch.ones(*env.batch_size, 1, dtype=torch.bool)
        total, steps = torch.zeros(alive.shape), torch.zeros(alive.shape, dtype=torch.int64)
        filming = record is not None and not result.returns
        if filming:
            frames.append(first_row(env, current[record]))
        while alive.any():
            if stop is not None and stop():
                raise Interrupted
            current.update(policy(current.to(device)).to(current.device))
            arrived, current = env.step_and_maybe_reset(current)
            if filming and alive.flatten()[0]:
                frames.append(first_row(env, arrived["next", record]))
            total += arrived["next", "reward"] * alive
            steps += alive
            alive &= ~arrived["next", "done"]
        result.returns.extend(total.flatten().tolist())
        result.lengths.extend(steps.flatten().tolist())
    film = to_rgb(torch.stack(frames)) if frames else None  # [T, h, w, 3]
    return Episodes(result.returns[:episodes], result.lengths[:episodes], result.seeds[:episodes], film)


def run_seeded_episodes(
    env: EnvBase,
    policy: Callable[[TensorDictBase], TensorDictBase],
    episodes: int,
    device: torch.device,
    *,
    seed: int,
    deterministic: bool,
    **options: Any,
) -> Episodes:
    """Run the episodes that belong to ``seed``, whatever was played before; random numbers outside stay as they are.

    Args:
        env, policy, episodes, device: See :func:`run_episodes`.
        seed: Of the environment and of the policy's samples.
        deterministic: Take the mode of the actor instead of a sample. Latents are sampled in any case.
        options: Further arguments of :func:`run_episodes`.
    """
    with preserve_rng(seed), set_exploration_type(EXPLORATION[deterministic]):
        env.set_seed(seed)
        return run_episodes(env, policy, episodes, device, **options)


def first_row(env: EnvBase, images: Tensor) -> Tensor:
    """A copy of the image [h, w, C] of the first environment."""
    return images.flatten(0, env.batch_dims - 1)[0].clone() if env.batch_dims else images.clone()


def to_rgb(images: Tensor) -> Tensor:
    """What a person sees of images [..., h, w, C]: the newest one of a stack, [..., h, w, 3].

    Stacks whose C is a multiple of 3 are taken for colours.
    """
    channels = images.shape[-1]
    newest = images[..., -3:] if channels % 3 == 0 else images[..., -1:]
    return newest.expand(*images.shape[:-1], 3)


def episode_seeds(env: EnvBase, rows: int) -> list[tuple[int, int] | None]:
    """What identifies the current episode of each of the ``rows`` environments."""
    seeds = getattr(env, "episode_seed", None)  # a batched environment gives a list
    return list(seeds) if isinstance(seeds, list) else [seeds] * rows


@contextmanager
def preserve_rng(seed: int) -> Iterator[None]:
    """Seed torch inside, and leave its generators outside as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
