"""Heads on the feature (belief and state joined): plain MLP heads and the two kinds of actor."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dreamer.models.layers import MLP, Linear
from dreamer.models.rssm import mix_uniform


class Head(nn.Sequential):
    """An MLP with a linear output in float32: reward, continue and value heads.

    Args:
        in_features: Width F of the feature.
        out_features: Width of the output.
        units, layers: Width and number of hidden layers.
        outscale: Factor on the initial output weight. 0 starts the output at exactly 0.
    """

    def __init__(self, in_features: int, out_features: int, *, units: int, layers: int, outscale: float = 1.0):
        super().__init__(MLP(in_features, units, layers), Linear(units, out_features, outscale))

    def forward(self, feature: Tensor) -> Tensor:
        return super().forward(feature).float()


class BoundedNormal(NamedTuple):
    """Independent normals with mean in (-1, 1) and bounded spread. Samples are neither squashed nor clipped."""

    mean: Tensor  # [..., A]
    std: Tensor  # [..., A]

    @property
    def mode(self) -> Tensor:
        return self.mean

    def sample(self) -> Tensor:
        """Draw actions [..., A] from the global generator."""
        return self.mean + self.std * torch.randn_like(self.mean)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log density of ``action`` [..., A], summed over its dimensions. Shape [...]."""
        z = (action - self.mean) / self.std
        return (-0.5 * (z * z + math.log(2 * math.pi)) - self.std.log()).sum(-1)

    def entropy(self) -> Tensor:
        """Closed-form entropy in nats. Shape [...]."""
        return (self.std.log() + 0.5 * (1 + math.log(2 * math.pi))).sum(-1)


class OneHotCategorical(NamedTuple):
    """A categorical distribution over one-hot vectors, given by its log probabilities."""

    logits: Tensor  # [..., A], normalised

    @property
    def mode(self) -> Tensor:
        return torch.nn.functional.one_hot(self.logits.argmax(-1), self.logits.shape[-1]).float()

    def sample(self) -> Tensor:
        """Draw one-hot actions [..., A] from the global generator."""
        race = self.logits.exp() / torch.empty_like(self.logits).exponential_().clamp_(min=1e-30)
        return torch.nn.functional.one_hot(race.argmax(-1), self.logits.shape[-1]).float()

    def log_prob(self, action: Tensor) -> Tensor:
        """Log probability of the one-hot ``action`` [..., A]. Shape [...]."""
        return (self.logits * action).sum(-1)

    def entropy(self) -> Tensor:
        """Closed-form entropy in nats. Shape [...]."""
        return -(self.logits.exp() * self.logits).sum(-1)


class ContinuousActor(nn.Module):
    """Map features to a :class:`BoundedNormal` over actions.

        mean = tanh(m)        std = min_std + (max_std - min_std) * sigmoid(s + 2)

    Args:
        in_features: Width F of the feature.
        action_size: Number A of action dimensions.
        units, layers: Width and number of hidden layers.
        min_std, max_std: Bounds of the standard deviation.

    Source: danijar/dreamerv3@e3f0224 embodied/jax/heads.py, ``bounded_normal``.
    Differs: nothing.
    """

    def __init__(
        self,
        in_features: int,
        action_size: int,
        *,
        units: int,
        layers: int = 3,
        min_std: float = 0.1,
        max_std: float = 1.0,
    ):
        super().__init__()
        self.mlp = MLP(in_features, units, layers)
        self.mean = Linear(units, action_size, outscale=0.01)
        self.std = Linear(units, action_size, outscale=0.01)
        self.min_std, self.max_std = min_std, max_std

    def forward(self, feature: Tensor) -> BoundedNormal:
        x = self.mlp(feature)
        std = self.min_std + (self.max_std - self.min_std) * torch.sigmoid(self.std(x).float() + 2)
        return BoundedNormal(torch.tanh(self.mean(x).float()), std)


class DiscreteActor(nn.Module):
    """Map features to a :class:`OneHotCategorical` over A actions.

    Args:
        in_features: Width F of the feature.
        action_size: Number A of actions.
        units, layers: Width and number of hidden layers.
        unimix: Share of the uniform distribution. The reference's "onehot" actor uses 0.01, its default
            "categorical" actor none (its setting of 0.01 has no effect there).

    Source: danijar/dreamerv3@e3f0224 embodied/jax/heads.py, ``categorical`` and ``onehot``.
    Differs: actions are one-hot vectors in both.
    """

    def __init__(self, in_features: int, action_size: int, *, units: int, layers: int = 3, unimix: float = 0.0):
        super().__init__()
        self.mlp = MLP(in_features, units, layers)
        self.logits = Linear(units, action_size, outscale=0.01)
        self.unimix = unimix

    def forward(self, feature: Tensor) -> OneHotCategorical:
        logits = self.logits(self.mlp(feature)).float()
        if self.unimix:
            return OneHotCategorical(mix_uniform(logits, self.unimix).log())
        return OneHotCategorical(torch.log_softmax(logits, -1))
