"""Optimisation steppers: one update of a whole loss, or nothing at all where a number is not finite."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import CudaGraphModule
from torch import nn
from torch.optim import Optimizer
from torchrl.objectives import LossModule
from torchrl.trainers import Trainer
from torchrl.trainers.algorithms import DreamerV3Optimizer
from torchrl.trainers.trainers import OptimizationStepper

from dreamer.models import heads_v1
from dreamer.models.conv import ImageDecoder, ImageEncoder
from dreamer.models.conv_v1 import ConvEncoder, DeconvDecoder
from dreamer.models.heads import ContinuousActor, DiscreteActor, Head
from dreamer.models.world_model import VectorDecoder, VectorEncoder
from dreamer.nonfinite import all_finite, describe_update
from dreamer.optimizers import TensorFlowAdam

AUTOCAST = ("auto", "bfloat16", False)
COMPILED = (
    ImageEncoder,
    ImageDecoder,
    VectorEncoder,
    VectorDecoder,
    Head,
    ContinuousActor,
    DiscreteActor,
    ConvEncoder,
    DeconvDecoder,
    heads_v1.Head,
)
CAPTURE_AFTER = 5  # eager updates before the one that is captured


class LossStepper(OptimizationStepper):
    """One backward for the whole loss and one step of its optimiser, unless a number is not finite.

    Args:
        loss: Its ``loss_*`` entries are summed.
        optimizer: Of its parameters. What it was made with, its settings, outlives a resume.
        norms: Modules whose joint gradient norm is reported, by the names it is reported under.
        autocast: One of :attr:`PRECISIONS`; "auto" is bfloat16 on a GPU and float32 on a CPU. With "float16" the loss
            is scaled up, so that small gradients do not vanish; where that is too much, the update is made again.
        compile: ``{"enabled": bool}``: compile the networks. The time loops stay as they are; a CUDA graph serves them
            better.
        cudagraph: Capture forward and backward in a CUDA graph. The optimiser and the targets run outside.

    Raises:
        ValueError: for an unknown ``autocast``, or ``cudagraph`` without a GPU.
    """

    PRECISIONS: tuple[str | bool, ...] = AUTOCAST

    def __init__(
        self,
        loss: LossModule,
        optimizer: Optimizer,
        norms: Mapping[tuple[str, ...], nn.Module],
        *,
        autocast: str | bool,
        compile: Mapping[str, Any],
        cudagraph: bool,
    ):
        self.device = next(loss.parameters()).device
        if autocast not in self.PRECISIONS:
            raise ValueError(f"optimization.autocast={autocast!r}: choose one of {self.PRECISIONS}")
        if cudagraph and self.device.type != "cuda":
            raise ValueError(f"optimization.cudagraph=true needs a GPU, but the device is {self.device}")
        self.loss, self.optimizer = loss, optimizer
        self.settings = {key for group in optimizer.param_groups for key in group} - {"params", "step"}
        self.norms = {names: list(module.parameters()) for names, module in norms.items()}
        self.buffers = list(loss.buffers())  # statistics that the loss itself moves
        self.dtype = torch.float16 if autocast == "float16" else torch.bfloat16
        self.autocast = autocast in ("bfloat16", "float16") or (autocast == "auto" and self.device.type == "cuda")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=autocast == "float16")
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
        losses, norms = self._backward(sub_batch)
        while not all_finite(minimised(losses) | norms):
            for buffer, value in zip(self.buffers, before, strict=True):
                buffer.copy_(value)
            scale = self.scaler.get_scale()
            self.scaler.update()  # a smaller one, if there is any
            if scale <= 1 or not all_finite(minimised(losses)):
                raise describe_update("an update", losses, norms, sub_batch)
            losses, norms = self._backward(sub_batch)
        self.limit_gradients(norms)
        self.optimizer.step()
        self.scaler.update()
        self.update_targets()
        context = losses.pop("replay_context", None)
        if context is not None:
            sub_batch["replay_context"] = context
        return losses.flatten_keys("/").update(norms)

    def limit_gradients(self, norms: Mapping[str, torch.Tensor]) -> None:
        """Called before each step of the optimiser. Nothing here."""

    def update_targets(self) -> None:
        """Called after each step of the optimiser. Nothing here."""

    def _backward(self, batch: TensorDictBase) -> tuple[TensorDict, dict[str, torch.Tensor]]:
        """Detached losses and norms of the gradients."""
        losses = self.compute_gradients(batch.select(*self.loss.in_keys))
        self.scaler.unscale_(self.optimizer)
        pairs = [(names, gradient_norm(parameters)) for names, parameters in self.norms.items()]
        return losses, {name: norm for names, norm in pairs for name in names}

    def _compute_gradients(self, batch: TensorDictBase) -> TensorDict:
        self.optimizer.zero_grad(set_to_none=False)  # a captured graph adds to the same tensors every time
        with torch.autocast(self.device.type, self.dtype, enabled=self.autocast):
            losses = self.loss(batch)
        self.scaler.scale(sum(minimised(losses).values())).backward()
        return losses.detach()

    def state_dict(self) -> dict[str, Any]:
        scaler = {"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}
        return {"optimizer": self.optimizer.state_dict()} | scaler

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over averages and counters; learning rate and the other settings stay those of this stepper."""
        settings = [{key: group[key] for key in self.settings} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state_dict["optimizer"])
        for group, values in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(values)
        if self.scaler.is_enabled() and "scaler" in state_dict:
            self.scaler.load_state_dict(state_dict["scaler"])


class JointStepper(LossStepper):
    """One backward and one optimiser step for the whole loss, then the targets.

    Args:
        loss: Its ``loss_*`` entries are summed; its parameters that require gradients are trained.
        update_targets: Called after each optimiser step.
        norms: See :class:`LossStepper`.
        lr, agc, beta1, beta2, eps, warmup_steps: See :class:`torchrl.trainers.algorithms.DreamerV3Optimizer`.
        precision: ``autocast``, ``compile`` and ``cudagraph`` of :class:`LossStepper`.
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
        **precision: Any,
    ):
        parameters = [p for p in loss.parameters() if p.requires_grad]
        optimizer = DreamerV3Optimizer(
            parameters, lr=lr, agc=agc, beta1=beta1, beta2=beta2, eps=eps, warmup_steps=warmup_steps
        )
        super().__init__(loss, optimizer, norms, **precision)
        self._update_targets = update_targets

    def update_targets(self) -> None:
        self._update_targets()


class GroupedStepper(LossStepper):
    """One backward for the whole loss and one step of Adam for each of its parts, with a bounded gradient norm.

    Args:
        loss: Its ``loss_*`` entries are summed; no gradient of one part may reach another.
        groups: Each part, with its learning rate, by the names under which its gradient norm is reported.
        grad_clip: Largest L2 norm of the gradient of each part.
        beta1, beta2, eps: See :class:`dreamer.optimizers.TensorFlowAdam`.
        precision: ``autocast``, ``compile`` and ``cudagraph`` of :class:`LossStepper`.
    """

    PRECISIONS = (*AUTOCAST, "float16")

    def __init__(
        self,
        loss: LossModule,
        groups: Mapping[tuple[str, ...], tuple[nn.Module, float]],
        *,
        grad_clip: float,
        beta1: float,
        beta2: float,
        eps: float,
        **precision: Any,
    ):
        self.grad_clip = grad_clip
        parameters = [{"params": list(module.parameters()), "lr": lr} for module, lr in groups.values()]
        optimizer = TensorFlowAdam(parameters, beta1=beta1, beta2=beta2, eps=eps)
        super().__init__(loss, optimizer, {names: module for names, (module, _) in groups.items()}, **precision)

    def limit_gradients(self, norms: Mapping[str, torch.Tensor]) -> None:
        """Scale the gradient of each part down to the largest norm."""
        for names, parameters in self.norms.items():
            nn.utils.clip_grads_with_norm_(parameters, self.grad_clip, norms[names[0]])


def is_loss(key: str) -> bool:
    """Whether an entry of a loss module's output is minimised."""
    return isinstance(key, str) and key.startswith("loss_")


def minimised(losses: TensorDictBase) -> dict[str, torch.Tensor]:
    """The entries of a loss module's output that are minimised."""
    return {key: value for key, value in losses.items() if is_loss(key)}


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Joint L2 norm of the gradients of ``parameters``. Shape []."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
