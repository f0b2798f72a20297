"""Building blocks shared by every network: linear -> RMSNorm -> SiLU, block-diagonal linear, initialisation."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-4


def init_truncated_normal_(weight: Tensor, fan_in: int, outscale: float = 1.0) -> Tensor:
    """Fill ``weight`` with outscale * N(0, 1/fan_in) truncated at two standard deviations.

    The factor 1.1368 restores the standard deviation that the truncation takes away.

    Args:
        weight: Any shape, changed in place.
        fan_in: Number of inputs that are summed. For a block-diagonal layer this is the full input width.
        outscale: Factor on the result; 0 gives zeros.

    Source: danijar/dreamerv3@e3f0224 embodied/jax/nets.py, ``trunc_normal_in``.
    Differs: nothing.
    """
    std = 1.1368 * outscale / math.sqrt(fan_in)
    with torch.no_grad():
        return nn.init.trunc_normal_(weight).mul_(std)


class Linear(nn.Linear):
    """``nn.Linear`` with the reference initialisation: truncated normal weight, zero bias."""

    def __init__(self, in_features: int, out_features: int, outscale: float = 1.0):
        self.outscale = outscale
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        init_truncated_normal_(self.weight, self.in_features, self.outscale)
        nn.init.zeros_(self.bias)

    def in_loop(self, steps: int, rows: int) -> "LoopLinear":
        """This layer for a loop of ``steps`` over inputs ``[rows, in]``."""
        return LoopLinear(self.weight.T, self.bias.expand(steps, rows, -1))


class BlockLinear(nn.Module):
    """Linear layer with a block-diagonal weight: block g of the output sees block g of the input only.

    The weight is kept as ``[blocks, in/blocks, out/blocks]``, so that one ``baddbmm`` does all blocks without
    copying a transposed weight.
    """

    def __init__(self, in_features: int, out_features: int, blocks: int):
        super().__init__()
        if in_features % blocks or out_features % blocks:
            raise ValueError(f"blocks={blocks} must divide in_features={in_features} and out_features={out_features}")
        self.blocks = blocks
        self.weight = nn.Parameter(torch.empty(blocks, in_features // blocks, out_features // blocks))
        self.bias = nn.Parameter(torch.zeros(out_features))
        init_truncated_normal_(self.weight, in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, in]`` to ``[N, out]``; both are cut into contiguous blocks."""
        return from_blocks(torch.baddbmm(self.block_bias, to_blocks(x, self.blocks), self.weight))

    def in_loop(self, steps: int, rows: int) -> "LoopLinear":
        """This layer for a loop of ``steps`` over inputs ``[blocks, rows, in/blocks]``."""
        return LoopLinear(self.weight, self.block_bias.expand(steps, -1, rows, -1))

    @property
    def block_bias(self) -> Tensor:
        """The bias as ``[blocks, 1, out/blocks]``."""
        return self.bias.unflatten(0, (self.blocks, 1, -1))


def to_blocks(x: Tensor, blocks: int) -> Tensor:
    """Cut ``[N, features]`` into ``[blocks, N, features/blocks]``."""
    return x.unflatten(-1, (blocks, -1)).transpose(0, 1)


def from_blocks(x: Tensor) -> Tensor:
    """Invert :func:`to_blocks`."""
    return x.transpose(0, 1).flatten(1)


class RMSNorm(nn.Module):
    """y = scale * x / sqrt(mean(x^2) + 1e-4) over the last axis, in float32 whatever the input."""

    def __init__(self, features: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.scale, NORM_EPS).to(x.dtype)


class NormAct(nn.Module):
    """SiLU(RMSNorm(x)), what follows almost every linear map."""

    def __init__(self, features: int):
        super().__init__()
        self.norm = RMSNorm(features)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(x))


class MLP(nn.Sequential):
    """``layers`` times linear -> RMSNorm -> SiLU, ``units`` wide."""

    def __init__(self, in_features: int, units: int, layers: int):
        widths = [in_features] + [units] * layers
        super().__init__(*(nn.Sequential(Linear(a, b), NormAct(b)) for a, b in pairwise(widths)))


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype of matrix products on ``device``: autocast's where it is on, else float32."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


class LoopLinear:
    """A linear map in a loop over time, ``y_t = offset_t + x_t @ weight``, with one weight gradient after the loop.

    Autograd by itself would form a full-size weight gradient at every step and add them up. Here the weight is a
    constant to the products in the loop; its gradient, the sum of x_t^T dy_t, is formed once, when the gradients of
    all offsets have arrived. Without gradients this is the plain product with a weight cast once.

    Args:
        weight: [in, out], or [blocks, in, out] for x_t [blocks, N, in].
        offset: One offset for each step, [T, ..., N, out]; an expanded bias will do.
    """

    def __init__(self, weight: Tensor, offset: Tensor):
        self.weight = weight.detach().to(compute_dtype(weight.device))
        self.inputs: list[Tensor] | None = [] if torch.is_grad_enabled() else None
        if self.inputs is not None:
            offset = _DeferredWeightGradient.apply(offset, weight, self.inputs)
        self.offsets = iter(offset.to(self.weight.dtype).unbind(0))
        self.product = torch.addmm if weight.ndim == 2 else torch.baddbmm

    def __call__(self, x: Tensor) -> Tensor:
        if self.inputs is not None:
            self.inputs.append(x.detach())
        return self.product(next(self.offsets), x, self.weight)


class _DeferredWeightGradient(torch.autograd.Function):
    """Identity on the offsets of :class:`LoopLinear`; its backward also gives the gradient of the weight."""

    @staticmethod
    def forward(ctx, offset: Tensor, weight: Tensor, inputs: list[Tensor]) -> Tensor:
        ctx.inputs = inputs
        return offset.view_as(offset)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x = torch.cat(ctx.inputs, -2)  # [(blocks,) T * N, in]
        dy = grad.flatten(0, 1) if grad.ndim == 3 else grad.transpose(0, 1).flatten(1, 2)  # [(blocks,) T * N, out]
        return grad, x.mT @ dy.to(x.dtype), None
