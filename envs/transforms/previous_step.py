"""The action and the reward that led to an observation, as part of the observation."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase
from torchrl.data import Composite, Unbounded
from torchrl.envs import Transform


class PreviousStep(Transform):
    """Writes beside each observation the action that led to it and the reward on arriving; zeros after a reset.

    The action is the one that reaches the base environment: an inverse transform of actions has been applied to it,
    the environment's own clipping has not. The zero action of a one-hot environment is the zero vector, no choice.

    Reads:
        `action` `[A]` of the step, `reward` `[1]` as the transforms before this one leave it.

    Writes:
        `previous_action` and `previous_reward`, in the same shapes and types.
    """

    def __init__(self) -> None:
        super().__init__(out_keys=["previous_action", "previous_reward"])

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        # Copies: batched environments reuse the memory of actions and rewards for the next step.
        next_tensordict.set("previous_action", tensordict.get("action").clone())  # [A]
        next_tensordict.set("previous_reward", next_tensordict.get("reward").clone())  # [1]
        return next_tensordict

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        env: Any = self.container
        for key in self.out_keys:  # in every row: TorchRL keeps the old values of the rows that go on
            tensordict_reset.set(key, env.observation_spec[key].zero())
        return tensordict_reset

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        env: Any = self.container
        base = env.base_env
        for key, spec in (("previous_action", base.action_spec), ("previous_reward", base.reward_spec)):
            observation_spec[key] = Unbounded(spec.shape, dtype=spec.dtype, device=spec.device)
        return observation_spec
