"""The contract of an agent: what `dreamer.train` needs to know, and how to find one by name.

An agent is a module of this package with a function ``build(*, env_spec, device, optimization, ...) -> Agent``. It is
keyword-only and takes exactly the keys of its ``configs/agent/<name>.yaml``, so that a stale key fails by name.
"""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple, Protocol

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import Composite, TensorSpec
from torchrl.envs import EnvBase, TensorDictPrimer
from torchrl.objectives import LossModule
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import OptimizationStepper, TrainerHookBase

SHARED = {"assembly", "masking", "parts", "pictures", "world_model_pictures"}  # modules that are no agents


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


class Schedule(Protocol):
    """When an agent learns and from what, in place of replayed windows at the train ratio."""

    def register(self, trainer: Trainer) -> None:
        """Register hooks: at ``pre_optim_steps`` one that sets ``trainer.optim_steps_per_batch``, the updates of this
        turn, and at ``process_optim_batch`` one that gives the data of an update. New records pass at
        ``batch_process`` (not with ``multi_async``). And register the state under a name, for the checkpoints.

        The trainer offers what learning may need beside its data: ``make_envs(rows, seed)``, environments like those of
        the run; ``further_frames``, to add what is simulated there; ``evaluate()``, ``save_checkpoint()`` and
        ``log_media(media)``, to be done now. An update that takes long raises ``Interrupted`` when ``should_stop()``:
        it is made again after a resume."""

    def busy(self) -> bool:
        """Whether the next turn comes without new steps, and even if the budget of frames is used."""


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
        make_schedule: Makes what decides when and from what to learn, or None: from replayed windows, at the train
            ratio. Called once per training.
        explore: What acts in place of uniformly random actions during ``collector.init_random_frames``, or None. The
            policy is called first, so that what it carries is recorded; then this one overwrites ``action``.
        context_keys: The latents among the entries of a record, from which a window starts.
        make_media: A replay sample -> pictures, videos and histograms of it, or None.
    """

    policy: TensorDictModuleBase
    primers: TensorDictPrimer | None
    loss: LossModule
    stepper: OptimizationStepper
    to_records: Callable[[TensorDictBase], TensorDictBase]
    record: TensorDictBase
    make_hooks: Callable[[], Sequence[TrainerHookBase]] | None = None
    make_schedule: Callable[[], Schedule] | None = None
    explore: TensorDictModuleBase | None = None
    context_keys: Sequence[str] = ("belief", "state")
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
