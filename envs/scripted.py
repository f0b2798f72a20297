"""Rollouts with given actions and resets, to compare environments bit by bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase

Trajectory = dict[str, torch.Tensor]


@contextmanager
def global_rng(seed: int) -> Iterator[None]:
    """Other global random numbers inside of the block, the old ones behind it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def make_actions(make_env: Callable[[], EnvBase], steps: int, seed: int) -> list[TensorDictBase]:
    """Random actions of an environment, always the same ones for a seed; one TensorDict per step."""
    env: Any = make_env()
    with global_rng(seed):
        actions = [env.full_action_spec.rand() for _ in range(steps)]
    env.close(raise_if_closed=False)
    return actions


def make_resets(steps: int, row: int = 0) -> list[bool]:
    """After which steps an episode is cut short, if it does not end by itself: others in each row."""
    return [step % 7 == 2 + 2 * row for step in range(steps)]


def scripted_rollout(env: EnvBase, actions: Sequence[Any], resets: Sequence[Any]) -> Trajectory:
    """Plays actions and resets; closes the environment.

    Args:
        env: single or batched.
        actions: one TensorDict per step.
        resets: for each step, which rows to reset after it besides those that are done: bool, `[*batch]`.

    Returns:
        Each entry of `EnvBase.rollout` on the CPU, `[T, *batch, ...]`, without the action; "next pixels" is what a
        step led to and "pixels" what it started from.
    """
    environment: Any = env
    try:
        data, seen = environment.reset(), []
        for action, reset in zip(actions, resets, strict=True):
            data = environment.step(data.update(action if env.device is None else action.to(env.device)))
            seen.append(data.exclude(*environment.action_keys).to("cpu").clone())
            done = data["next", "done"]
            again = done | torch.as_tensor(reset, device=done.device).reshape(done.shape)
            data = environment.step_mdp(data)
            if again.any():
                data = environment.reset(data.set("_reset", again))
    finally:
        environment.close(raise_if_closed=False)
    names = {key: " ".join(key) if isinstance(key, tuple) else key for key in seen[0].keys(True, True)}
    return {name: torch.stack([record.get(key) for record in seen]) for key, name in names.items()}


def difference(expected: Trajectory, got: Trajectory, skip: Collection[str] = ()) -> str:
    """Which entry of a trajectory differs first and where, or nothing.

    Args:
        expected: what should be there; only its entries are compared.
        got: what is there.
        skip: names of entries that may differ, without "next".
    """
    found = []
    for name, left in expected.items():
        if name.removeprefix("next ") in skip:
            continue
        if name not in got:
            return f"{name!r} is missing"
        right = got[name]
        if left.shape != right.shape or left.dtype != right.dtype:
            return f"{name!r} is {right.dtype} {list(right.shape)}, not {left.dtype} {list(left.shape)}"
        unequal = (left != right) & ~((left != left) & (right != right))  # two NaN are equal
        if unequal.any():
            step = int(unequal.reshape(len(left), -1).any(1).nonzero()[0])
            found.append((step, name.startswith("next "), name))
    return "" if not found else f"{min(found)[2]!r} differs, first at step {min(found)[0]}"
