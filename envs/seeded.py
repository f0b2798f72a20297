"""Environments whose episodes can be played again: each has a seed of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase, TransformedEnv

from envs.transforms.finite_guard import carried_keys

DIGEST_BYTES = 16


class SeededTransformedEnv(TransformedEnv):
    """A `TransformedEnv` that seeds its base environment and its stochastic transforms anew for every episode.

    Episode e of an environment with seed s gives a seed to the base environment and one to every transform that has a
    method `set_seed(seed)`, in order: the numbers of `SeedSequence((s, e))`. What an episode shows depends on s, e
    and the actions alone, whatever was played before. A base environment that shows the number of the episode has a
    method `set_episode(number)`.

    Add transforms with `append_transform`: wrapping this environment in another `TransformedEnv` unwraps it. An
    environment that was never seeded runs on over its episodes, and a batched one is seeded by `set_seed` only, because
    the episodes of its rows start at different times: seed the environments inside.

    Differs: `TransformedEnv.set_seed` seeds the base environment only, and once.

    Attributes:
        episode: number of the current episode; before the first reset, of the episode that it starts.
    """

    episode = 0
    _seed: int | None = None
    _started = False
    _actions: list[Tensor] | None = None  # since the reset; None where nothing is recorded
    _last: TensorDictBase | None = None  # what the last reset or step gave

    @property
    def episode_seed(self) -> tuple[int, int] | None:
        """What identifies the current episode: seed and number; None if there is no seed."""
        return None if self._seed is None else (self._seed, self.episode)

    def set_seed(self, seed: int | None = None, static_seed: bool = False, *, episode: int = 0) -> int | None:
        """Seeds the environment; the next reset starts the given episode.

        Args:
            seed: at least 0; None for episodes that run on unseeded.
            static_seed: return `seed` itself.
            episode: number of the next episode, at least 0.

        Returns:
            a seed for another environment.
        """
        if episode < 0:
            raise ValueError(f"episode={episode}: give a number from 0")
        self._seed, self.episode, self._started, self._actions, self._last = seed, episode, False, None, None
        self._seed_episode()
        return EnvBase.set_seed(self, seed, static_seed=static_seed)

    def _seed_episode(self) -> None:
        base: Any = self.base_env
        if self._seed is None:
            return
        modules: list[Any] = list(self.transform.modules())
        parts = [module for module in modules if callable(getattr(module, "set_seed", None))]
        children = np.random.SeedSequence((self._seed, self.episode)).generate_state(1 + len(parts)).tolist()
        for part, child in zip([base, *parts], children, strict=True):
            part.set_seed(child)
        if callable(getattr(type(base), "set_episode", None)):
            base.set_episode(self.episode)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        single = not self.batch_size
        if single:
            self.episode += self._started
            self._seed_episode()
        first = super()._reset(tensordict, **kwargs)
        self._started = True
        if single:
            self._actions, self._last = [], first
        return first

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        if self._actions is None:
            return super()._step(tensordict)
        self._actions.append(tensordict.get(self.action_key).clone())  # others may reuse the memory
        self._last = arrived = super()._step(tensordict)
        return arrived

    def episode_state(self) -> dict[str, Tensor]:
        """Where the environment is: what `restore_episode` needs to put another one there.

        Returns:
            `seed` and `episode` int64 `[]`, `started` bool `[]`, `actions` since the reset `[t, *A]`, `digest` uint8
            `[16]` of the last observation and reward.

        Raises:
            RuntimeError: the environment is batched, or was never seeded.
        """
        self._check_restorable()
        action_spec = self.full_action_spec[self.action_key]
        actions = torch.stack(self._actions) if self._actions else action_spec.zero(torch.Size((0,)))
        return {
            "seed": torch.tensor(self._seed),
            "episode": torch.tensor(self.episode),
            "started": torch.tensor(self._started),
            "actions": actions.cpu(),
            "digest": self._digest(),
        }

    def restore_episode(self, state: Mapping[str, Tensor]) -> TensorDictBase | None:
        """Puts the environment where another one was, by playing its episode again: what follows is equal to the bit.

        Args:
            state: from `episode_state` of an environment that was made in the same way.

        Returns:
            the last observation, as `reset` or `step_mdp` gave it; entries that primers add have their first value.
            None if the episode had not begun.

        Raises:
            RuntimeError: the episode comes out differently, or the environment is batched.
        """
        seed, episode = int(state["seed"]), int(state["episode"])
        self.set_seed(seed, episode=episode)
        self._check_restorable()
        if not state["started"]:
            return None
        current = self.reset()
        for action in state["actions"]:
            current = self.step_mdp(self.step(current.set(self.action_key, action.to(current.device))))
        if not torch.equal(self._digest(), state["digest"].cpu()):
            raise RuntimeError(
                f"episode {episode} of seed {seed} comes out differently after {len(state['actions'])} steps: this "
                "environment is not deterministic, or made with other options or by another renderer than the one "
                "whose state this is. Let all its random numbers come from the seed of its reset."
            )
        return current

    def _check_restorable(self) -> None:
        if self.batch_size:
            raise RuntimeError(f"batch size {list(self.batch_size)}: ask each single environment for its episode")
        if self._seed is None:
            raise RuntimeError("this environment has no seed: call set_seed(seed) first")

    def _digest(self) -> Tensor:
        """Of what the last reset or step gave, except what primers carry and what others have added since."""
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        if self._last is not None:
            carried = carried_keys(self.transform)
            specs = self.full_observation_spec, self.full_reward_spec, self.full_done_spec
            for key in [key for spec in specs for key in spec.keys(True, True) if key not in carried]:
                value = self._last.get(key, None)
                if value is not None:  # a reset gives no reward
                    digest.update(str(key).encode() + value.numpy(force=True).tobytes())
        return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)

    def describe(self) -> dict[str, Any]:
        """What its transforms say of themselves, by class, for the record of a run: which video is played, its hash."""
        described: dict[str, Any] = {type(module).__name__: module for module in self.transform.modules()}
        facts = {name: module.describe() for name, module in described.items() if hasattr(module, "describe")}
        return {name: fact for name, fact in facts.items() if fact}
