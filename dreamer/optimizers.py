"""Optimisers that PyTorch and TorchRL lack."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn


class TensorFlowAdam(torch.optim.Adam):
    """Adam whose ``eps`` is added to the root of the uncorrected second moment, as TensorFlow does it.

        p <- p - lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)

    This is PyTorch's Adam with eps / sqrt(1 - beta2^t): 32 times larger at the first step, equal after some thousand.
    It matters to gradients that are not far above eps, which those of an actor are.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate of groups that have none of their own.
        beta1, beta2: Rates of the two averages.
        eps: Added to the root of the second moment.

    Source: danijar/dreamer@56d4d44 tools.py, ``Adam``, which is that of TensorFlow 2.
    Differs: no loss scaling and no weight decay, which has no effect there; an update that is skipped because of
        gradients that are not finite is not counted.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-7,
    ):
        super().__init__(params, lr=lr, betas=(beta1, beta2), eps=eps)
        self.eps = eps

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one update; the settings of each group are PyTorch's."""
        for group in self.param_groups:
            done = next((self.state[p]["step"] for p in group["params"] if p in self.state), 0)
            group["eps"] = self.eps / math.sqrt(1 - group["betas"][1] ** (int(done) + 1))
        return super().step(closure)
