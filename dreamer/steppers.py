"""Optimisation steppers: how one update is made. All gradient logic of the project is in this file."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import CudaGraphModule
from torch import nn
from torchrl.objectives import LossModule
from torchrl.trainers import Trainer
from torchrl.trainers.algorithms import DreamerV3Optimizer
from torchrl.trainers.trainers import OptimizationStepper

from dreamer.models.conv import ImageDecoder, ImageEncoder
from dreamer.models.heads import ContinuousActor, DiscreteActor, Head
from dreamer.models.world_model import VectorDecoder, VectorEncoder
from dreamer.nonfinite import NonFiniteError, all_finite, find_nonfinite

AUTOCAST = ("auto", "bfloat16", False)
COMPILED = (ImageEncoder, ImageDecoder, VectorEncoder, VectorDecoder, Head, ContinuousActor, DiscreteActor)
CAPTURE_AFTER = 5  # eager updates before the one that is captured


class JointStepper(OptimizationStepper):
    """One backward and one optimiser step for the whole loss, then the targets.

    Args:
        loss: Its ``loss_*`` entries are summed; its parameters that require gradients are trained.
        update_targets: Called after each optimiser step.
        norms: Modules whose joint gradient norm is reported, by the names it is reported under.
        lr, agc, beta1, beta2, eps, warmup_steps: See :class:`torchrl.trainers.algorithms.DreamerV3Optimizer`.
        autocast: "bfloat16", False, or "auto": bfloat16 on a GPU and float32 on a CPU.
        compile: ``{"enabled": bool}``: compile the networks that are called once per update. The time loops stay as
            they are; a CUDA graph serves them better.
        cudagraph: Capture forward and backward in a CUDA graph. The optimiser and the targets run outside.

    Raises:
        ValueError: for an unknown ``autocast``, or ``cudagraph`` without a GPU.
    """

    def __init__(
        self,
        loss: LossModule,
        update_targets: Callable[[], None],
        norms: Mapping[tuple[str, ...], nn.Module],
        *,
        lr: float,
        agc: float,
        beta1: float,
        beta2: float,
        eps: float,
        warmup_steps: int,
        autocast: str | bool,
        compile: Mapping[str, Any],
        cudagraph: bool,
    ):
        parameters = [p for p in loss.parameters() if p.requires_grad]
        self.device = parameters[0].device
        if autocast not in AUTOCAST:
            raise ValueError(f"optimization.autocast={autocast!r}: choose one of {AUTOCAST}")
        if cudagraph and self.device.type != "cuda":
            raise ValueError(f"optimization.cudagraph=true needs a GPU, but the device is {self.device}")
        self.loss, self.update_targets = loss, update_targets
        self.norms = {names: list(module.parameters()) for names, module in norms.items()}
        self.buffers = list(loss.buffers())  # statistics that the loss itself moves
        self.autocast = autocast == "bfloat16" or (autocast == "auto" and self.device.type == "cuda")
        self.optimizer = DreamerV3Optimizer(
            parameters, lr=lr, agc=agc, beta1=beta1, beta2=beta2, eps=eps, warmup_steps=warmup_steps
        )
        self.settings = ("lr", "agc", "beta1", "beta2", "eps", "warmup_steps")
        if compile["enabled"]:
            for module in loss.modules():
                if isinstance(module, COMPILED):
                    module.compile()
        # The first calls are ordinary updates, also the one during which the graph is recorded.
        self.compute_gradients = (
            CudaGraphModule(self._compute_gradients, warmup=CAPTURE_AFTER, device=self.device)
            if cudagraph
            else self._compute_gradients
        )

    def step(self, trainer: Trainer | None, sub_batch: TensorDictBase) -> TensorDictBase:
        """Make one update from ``sub_batch`` and return its detached scalars, flat by name.

        Latents for the replay, if the loss gives any, are put into ``sub_batch`` as ``replay_context``.

        Raises:
            NonFiniteError: if a loss or a gradient is not finite. Parameters, optimiser and the statistics of the loss
                are then as they were before the call.
        """
        before = [buffer.clone() for buffer in self.buffers]
        losses = self.compute_gradients(sub_batch.select(*self.loss.in_keys))
        norms = {
            name: norm
            for names, parameters in self.norms.items()
            for norm in [gradient_norm(parameters)]
            for name in names
        }
        if not all_finite({name: value for name, value in losses.items() if is_loss(name)} | norms):
            for buffer, value in zip(self.buffers, before, strict=True):
                buffer.copy_(value)
            raise NonFiniteError(
                f"an update is not finite: {find_nonfinite(losses) + [n for n in norms if not norms[n].isfinite()]}; "
                f"in its batch: {find_nonfinite(sub_batch) or 'nothing'}"
            )
        self.optimizer.step()
        self.update_targets()
        context = losses.pop("replay_context", None)
        if context is not None:
            sub_batch["replay_context"] = context
        return losses.flatten_keys("/").update(norms)

    def _compute_gradients(self, batch: TensorDictBase) -> TensorDict:
        self.optimizer.zero_grad(set_to_none=False)  # a captured graph adds to the same tensors every time
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            losses = self.loss(batch)
        sum(value for key, value in losses.items() if is_loss(key)).backward()
        return losses.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over averages and counters; learning rate and the other settings stay those of this stepper."""
        settings = [{key: group[key] for key in self.settings} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state_dict["optimizer"])
        for group, values in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(values)


def is_loss(key: str) -> bool:
    """Whether an entry of a loss module's output is minimised."""
    return isinstance(key, str) and key.startswith("loss_")


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Joint L2 norm of the gradients of ``parameters``. Shape []."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
