"""The contract of an agent: what `dreamer.train` needs to know, and how to find one by name.

An agent is a module of this package with a function ``build(*, env_spec, device, optimization, ...) -> Agent``. It is
keyword-only and takes exactly the keys of its ``configs/agent/<name>.yaml``, so that a stale key fails by name.
"""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import Composite, TensorSpec
from torchrl.envs import EnvBase, TensorDictPrimer
from torchrl.objectives import LossModule
from torchrl.trainers.trainers import OptimizationStepper, TrainerHookBase

SHARED = {"assembly", "masking", "parts", "pictures"}  # modules that are no agents


class EnvSpec(NamedTuple):
    """What an agent may know of its environment.

    Args:
        observation: Spec of what it sees.
        action: Spec of what it does.
        prompt: What belongs to the foreground, in words, " . " between concepts; empty if unknown.
    """

    observation: Composite
    action: TensorSpec
    prompt: str = ""

    @classmethod
    def of(cls, env: EnvBase) -> "EnvSpec":
        return cls(env.observation_spec, env.action_spec, getattr(env, "prompt", ""))


class Media(NamedTuple):
    """What an agent shows of a replay sample, by the names under which it is logged."""

    images: dict[str, Tensor]  # uint8 [h, w, 3]
    videos: dict[str, Tensor]  # uint8 [T, h, w, 3]
    histograms: dict[str, Tensor]  # float [N]: values to count
    scalars: dict[str, Tensor]  # [] each


@dataclass(frozen=True)
class Agent:
    """The parts of an agent.

    Args:
        policy: What acts: reads observations and recurrent state, writes ``action`` and the next recurrent state.
        primers: The recurrent state that environments must carry, or None.
        loss: What is minimised; the sum of its ``loss_*`` entries.
        stepper: How: autocast, backward, optimiser, target networks.
        to_records: Collected transitions [..., t] -> what is stored, flat [R].
        record: One stored record, zeros: the layout of the replay.
        make_hooks: Makes further hooks, each with TorchRL's ``register(trainer)``, or None. Called once per training,
            before anything is written; not where the agent only acts.
        make_media: A replay sample -> pictures, videos and histograms of it, or None.
    """

    policy: TensorDictModuleBase
    primers: TensorDictPrimer | None
    loss: LossModule
    stepper: OptimizationStepper
    to_records: Callable[[TensorDictBase], TensorDictBase]
    record: TensorDictBase
    make_hooks: Callable[[], Sequence[TrainerHookBase]] | None = None
    make_media: Callable[[TensorDictBase], Media] | None = None


def load(name: str) -> ModuleType:
    """Import the agent module ``name``.

    Raises:
        ValueError: if there is none; the message lists the agents.
    """
    choices = sorted({module.name for module in pkgutil.iter_modules(__path__)} - SHARED)
    if name not in choices:
        raise ValueError(f"agent.name={name!r}: choose one of {choices}")
    return importlib.import_module(f"dreamer.agents.{name}")
