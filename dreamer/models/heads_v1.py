"""Heads of Dreamer V1: plain ELU networks, and the two kinds of actor, whose samples are differentiable."""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.modules.functional import symlog

from dreamer.models.heads import OneHotCategorical
from dreamer.models.layers_v1 import glorot
from dreamer.models.rssm import draw_noise, sample_onehot

ALMOST_ONE = 1 - 2**-24  # the largest float32 below 1
SAMPLES = 100  # that estimate mode and entropy


class Head(nn.Sequential):
    """``layers`` times linear -> ELU, and a linear output in float32.

    Args:
        in_features: Width F of the feature.
        out_features: Width of the output.
        units, layers: Width and number of hidden layers.

    Source: danijar/dreamer@56d4d44 models.py, ``DenseDecoder``.
    Differs: nothing.
    """

    def __init__(self, in_features: int, out_features: int, *, units: int, layers: int):
        widths = [in_features] + [units] * layers
        hidden = [part for a, b in pairwise(widths) for part in (glorot(nn.Linear(a, b)), nn.ELU())]
        super().__init__(*hidden, glorot(nn.Linear(widths[-1], out_features)))

    def forward(self, feature: Tensor) -> Tensor:
        return super().forward(feature).float()


class VectorEncoder(nn.Module):
    """Encode observations ``[..., O]`` of any scale as ``[..., units]``: symlog, then a :class:`Head`."""

    def __init__(self, in_features: int, *, units: int, layers: int = 2):
        super().__init__()
        self.head = Head(in_features, units, units=units, layers=layers)
        self.out_features = units

    def forward(self, observation: Tensor) -> Tensor:
        return self.head(symlog(observation))


class VectorDecoder(nn.Module):
    """Decode (belief, state) to the symlog of an observation, ``[..., O]`` float32."""

    def __init__(self, belief_size: int, state_size: int, out_features: int, *, units: int, layers: int = 2):
        super().__init__()
        self.head = Head(belief_size + state_size, out_features, units=units, layers=layers)

    def forward(self, belief: Tensor, state: Tensor) -> Tensor:
        return self.head(torch.cat([belief, state], -1))


class TanhNormal(NamedTuple):
    """Independent normals squashed into (-1, 1): a = tanh(mean + std * noise)."""

    mean: Tensor  # [..., A], before tanh
    std: Tensor  # [..., A]

    def rsample(self, noise: Tensor | None = None) -> Tensor:
        """Draw actions [..., A] that carry gradients to mean and std; standard normal ``noise`` [..., A] fixes them."""
        noise = torch.randn_like(self.mean) if noise is None else noise
        return torch.tanh(self.mean + self.std * noise)

    @torch.no_grad()
    def sample(self) -> Tensor:
        """Draw actions [..., A] from the global generator."""
        return self.rsample()

    @property
    def mode(self) -> Tensor:
        """The most likely of a hundred samples, each row for itself. Not deterministic. Shape [..., A]."""
        return self.most_likely(torch.tanh(self.drawn(None)))

    @torch.no_grad()
    def most_likely(self, actions: Tensor) -> Tensor:
        """The most likely of ``actions`` [M, ..., A] for each row. Shape [..., A]."""
        best = self.log_prob(actions).argmax(0)  # [...]
        return actions.gather(0, best[None, ..., None].expand_as(actions[:1])).squeeze(0)

    def drawn(self, noise: Tensor | None) -> Tensor:
        """Samples before tanh, from ``noise`` [M, ..., A] or a hundred draws."""
        if noise is None:
            noise = torch.randn(SAMPLES, *self.mean.shape, device=self.mean.device)
        return self.mean + self.std * noise

    def log_prob(self, action: Tensor) -> Tensor:
        """Log density of ``action`` [..., A], summed over its dimensions. Shape [...].

        At -1 and 1 it is that of the closest float32 inside, 8.66 standard units from 0 before tanh.
        """
        x = torch.atanh(action.clamp(-ALMOST_ONE, ALMOST_ONE))
        z = (x - self.mean) / self.std
        normal = -0.5 * (z * z + math.log(2 * math.pi)) - self.std.log()
        return (normal - log_slope(x)).sum(-1)

    def entropy(self, noise: Tensor | None = None) -> Tensor:
        """Entropy in nats, estimated from ``noise`` [M, ..., A] or a hundred draws. Shape [...].

        That of the normals in closed form and the mean of log(1 - a^2), which rounding cannot spoil at the ends.
        """
        normal = self.std.log() + 0.5 * (1 + math.log(2 * math.pi))
        return (normal + log_slope(self.drawn(noise)).mean(0)).sum(-1)


def log_slope(x: Tensor) -> Tensor:
    """log(1 - tanh(x)^2), the logarithm of the derivative of tanh, exact however large x is."""
    return 2 * (math.log(2) - x - F.softplus(-2 * x))


class StraightThroughOneHot(OneHotCategorical):
    """A categorical distribution over one-hot vectors whose samples have the gradient of the probabilities."""

    def rsample(self, noise: Tensor | None = None) -> Tensor:
        """Draw one-hot actions [..., A]; ``noise`` [..., A] is that of :func:`dreamer.models.rssm.sample_onehot`."""
        noise = draw_noise(*self.logits.shape, device=self.logits.device) if noise is None else noise
        return sample_onehot(self.logits.exp().unsqueeze(-2), noise.unsqueeze(-2))


class TanhNormalActor(nn.Module):
    """Map features to a :class:`TanhNormal` over actions.

        mean = scale * tanh(m / scale)        std = softplus(s + log(exp(init_std) - 1)) + min_std

    Args:
        in_features: Width F of the feature.
        action_size: Number A of action dimensions.
        units, layers: Width and number of hidden layers.
        mean_scale: Bound of the mean before tanh.
        init_std: Standard deviation at s = 0, without ``min_std``.
        min_std: What is added to it.

    Source: danijar/dreamer@56d4d44 models.py, ``ActionDecoder``, ``tanh_normal``.
    Differs: the mode is chosen for each row, where the reference takes the choice of row 0 for all; the entropy is
        estimated before tanh, where the reference inverts rounded actions. Only logs and evaluation read them.
    """

    def __init__(
        self,
        in_features: int,
        action_size: int,
        *,
        units: int,
        layers: int = 4,
        mean_scale: float = 5.0,
        init_std: float = 5.0,
        min_std: float = 1e-4,
    ):
        super().__init__()
        self.head = Head(in_features, 2 * action_size, units=units, layers=layers)
        self.mean_scale, self.min_std = mean_scale, min_std
        self.raw_init_std = math.log(math.expm1(init_std))

    def forward(self, feature: Tensor) -> TanhNormal:
        return self.distribution(self.head(feature))

    def distribution(self, raw: Tensor) -> TanhNormal:
        """The distribution that raw outputs [..., 2A] stand for, means first."""
        mean, std = raw.chunk(2, -1)
        mean = self.mean_scale * torch.tanh(mean / self.mean_scale)
        return TanhNormal(mean, F.softplus(std + self.raw_init_std) + self.min_std)


class OneHotActor(nn.Module):
    """Map features to a :class:`StraightThroughOneHot` over A actions.

    Args:
        in_features: Width F of the feature.
        action_size: Number A of actions.
        units, layers: Width and number of hidden layers.

    Source: danijar/dreamer@56d4d44 models.py, ``ActionDecoder``, ``onehot``.
    Differs: nothing.
    """

    def __init__(self, in_features: int, action_size: int, *, units: int, layers: int = 4):
        super().__init__()
        self.head = Head(in_features, action_size, units=units, layers=layers)

    def forward(self, feature: Tensor) -> StraightThroughOneHot:
        return StraightThroughOneHot(torch.log_softmax(self.head(feature), -1))


def add_noise(action: Tensor, amount: float, noise: Tensor | None = None) -> Tensor:
    """a' = clip(a + amount * noise, -1, 1): what is executed and stored while data are collected.

    Args:
        action: [..., A] in [-1, 1].
        amount: Standard deviation of the noise.
        noise: Standard normal [..., A]; drawn here by default.

    Source: danijar/dreamer@56d4d44 dreamer.py, ``exploration``.
    Differs: nothing.
    """
    noise = torch.randn_like(action) if noise is None else noise
    return (action + amount * noise).clamp(-1, 1)


def replace_some(action: Tensor, share: float) -> Tensor:
    """Put a uniformly random choice in place of a ``share`` of the one-hot actions [..., A].

    Source: danijar/dreamer@56d4d44 dreamer.py, ``exploration``, "epsilon_greedy".
    Differs: nothing.
    """
    chosen = torch.randint(action.shape[-1], action.shape[:-1], device=action.device)
    replaced = torch.rand(action.shape[:-1], device=action.device) < share
    return torch.where(replaced[..., None], F.one_hot(chosen, action.shape[-1]).to(action.dtype), action)
