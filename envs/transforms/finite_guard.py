"""A guard against environments that break: rewards and observations that are not finite."""

from __future__ import annotations

import math
import pickle
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.envs import TensorDictPrimer, Transform

from envs.choices import check_choice

POLICIES = ("stop", "skip")


def carried_keys(transform: Transform) -> set[Any]:
    """The entries that primers among the parts of `transform` add: state of a policy, not of the environment."""
    primers: list[Any] = [module for module in transform.modules() if isinstance(module, TensorDictPrimer)]
    return {key for primer in primers for key in primer.primers.keys(True, True)}


class FiniteGuard(Transform):
    """Looks for NaN and infinity in the reward and the float observations of every reset and step.

    Put it last. What primers add is left alone: that belongs to the policy.

    Args:
        policy: "stop" raises an error; "skip" replaces the values by 0 and ends the episode as truncated: at once after
            a step, with its first step after a reset.
        counter: int64 `[1]`, to which "skip" adds 1 for every step or reset with such a value; clones, and copies in
            processes that are started with it, count together. None for a new one.

    Attributes:
        counter: see above.

    Reads:
        `reward`, and every entry of floats that the transforms before it leave.

    Writes:
        the same; `truncated` and `done` where "skip" ends an episode.

    Raises:
        ValueError: the policy does not exist.
        FloatingPointError: with "stop"; names the key, the value, the step and the episode.
    """

    def __init__(self, policy: str = "stop", counter: torch.Tensor | None = None):
        super().__init__()
        check_choice("policy", policy, POLICIES)
        self.policy = policy
        self.counter = torch.zeros(1, dtype=torch.int64) if counter is None else counter
        self._keys: dict[bool, list[Any]] = {}  # after resets and after steps
        self._steps = 0  # since the last reset
        self._spoilt: torch.Tensor | None = None  # [*batch, 1], episodes to end with their first step

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        self._steps += 1
        bad = self._mend(next_tensordict, False)
        if self._spoilt is not None:
            bad, self._spoilt = self._spoilt if bad is None else bad | self._spoilt, None
        if bad is not None:
            for key in ("truncated", "done"):
                next_tensordict.set(key, next_tensordict.get(key, torch.zeros_like(bad)) | bad)
        return next_tensordict

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        self._steps = 0
        self._spoilt = self._mend(tensordict_reset, True)
        return tensordict_reset

    def _mend(self, tensordict: TensorDictBase, first: bool) -> torch.Tensor | None:
        """Deals with values that are not finite; returns the rows that had some, `[*batch, 1]`, None for no row."""
        keys = self._keys.get(first)
        if keys is None:
            env: Any = self.container
            carried = carried_keys(env.transform)
            floats = [key for key, value in tensordict.items(True, True) if value.is_floating_point()]
            keys = self._keys[first] = [key for key in floats if key not in carried]
        bad = None
        for key in keys:
            value = tensordict.get(key, None)  # None: added by others, and not there when an episode is played again
            if value is None or math.isfinite(value.sum()):  # as all parts then are: cheaper than asking each
                continue
            finite = value.isfinite()
            if finite.all():  # their sum is too large
                continue
            if self.policy == "stop":
                raise FloatingPointError(self._describe(key, value[~finite][0].item()))
            tensordict.set(key, torch.where(finite, value, 0.0))
            rows = ~finite.reshape(*tensordict.batch_size, -1).all(-1, keepdim=True)  # [*batch, 1]
            bad = rows if bad is None else bad | rows
        if bad is not None:
            self.counter += bad.sum().to(self.counter.device)
        return bad

    def _describe(self, key: Any, value: float) -> str:
        env: Any = self.container
        seed = getattr(env, "episode_seed", None)
        episode = "" if seed is None else f" of episode {seed[1]} (seed {seed[0]})"
        return (
            f"{key!r} is {value} at step {self._steps}{episode}: mend the environment, or leave such episodes out with "
            "policy='skip' (nan_policy=skip in a training)"
        )

    def clone(self) -> FiniteGuard:
        other = super().clone()
        other._keys, other._spoilt = {}, None
        return other

    def __getstate__(self) -> dict[str, Any]:
        state = {**super().__getstate__(), "_keys": {}, "_spoilt": None}
        if get_spawning_popen() is not None:  # keep sharing the memory, of which cloudpickle would make a copy
            state["counter"] = bytes(ForkingPickler.dumps(self.counter))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        counter = state["counter"]
        super().__setstate__({**state, "counter": pickle.loads(counter) if isinstance(counter, bytes) else counter})
