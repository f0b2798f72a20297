"""Actor and critic of model-free agents: small networks with orthogonal weights, and a convolutional one for images."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

CHANNELS, KERNELS, STRIDES, IMAGE_FEATURES = (32, 64, 64), (8, 4, 3), (4, 2, 1), 512
LIMIT = 10.0  # deviations


def orthogonal(layer: nn.Linear | nn.Conv2d, gain: float = math.sqrt(2)) -> nn.Module:
    """Give a layer orthogonal weights times ``gain`` and biases of zero."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class ConvFeatures(nn.Sequential):
    """Features of an image, by three convolutions and one linear layer with ReLU (Mnih et al. 2015).

    Args:
        image_shape: (h, w, C), at least 36 pixels high and wide.

    Raises:
        ValueError: for smaller images.

    Differs: pixels are divided by 255 here, and lie with the channels last.
    """

    out_features = IMAGE_FEATURES

    def __init__(self, image_shape: tuple[int, ...]):
        height, width, channels = image_shape
        if min(height, width) < 36:
            raise ValueError(f"images of {height} x {width} pixels: give env.image_size=36 or more to this network")
        layers: list[nn.Module] = []
        for out, kernel, stride in zip(CHANNELS, KERNELS, STRIDES, strict=True):
            layers += [orthogonal(nn.Conv2d(channels, out, kernel, stride)), nn.ReLU()]
            height, width, channels = (height - kernel) // stride + 1, (width - kernel) // stride + 1, out
        flat = height * width * channels
        super().__init__(*layers, nn.Flatten(), orthogonal(nn.Linear(flat, IMAGE_FEATURES)), nn.ReLU())

    def forward(self, image: Tensor) -> Tensor:
        """Image uint8 [..., h, w, C] to features [..., 512]."""
        planes = image.reshape(-1, *image.shape[-3:]).movedim(-1, 1).float() / 255  # [N, C, h, w]
        return super().forward(planes).reshape(*image.shape[:-3], IMAGE_FEATURES)


class Moments(nn.Module):
    """Mean and variance of all rows that were ever seen; 0 and 1 before the first.

    Args:
        size: Width n of a row.

    Source: Chan et al. 1979, the pairwise update.
    """

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("variance", torch.ones(size))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update_(self, rows: Tensor) -> None:
        """Take ``rows`` [N, n] into account."""
        count = self.count + len(rows)
        share, delta = len(rows) / count, rows.mean(0) - self.mean
        within = (1 - share) * self.variance + share * rows.var(0, correction=0)
        self.variance.copy_(within + share * (1 - share) * delta.square())
        self.mean.add_(share * delta)
        self.count.copy_(count)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows [..., n] in deviations from the mean, within 10."""
        return ((rows - self.mean) / (self.variance + 1e-8).sqrt()).clamp(-LIMIT, LIMIT)


class Observer(nn.Module):
    """All observations as one vector: vectors as they are or in deviations, images through :class:`ConvFeatures`.

    Args:
        observations: Shape of each observation by key: images are (h, w, C), vectors (O,).
        normalize: Give vectors in deviations from their mean, by what :meth:`update_moments_` was told.
    """

    def __init__(self, observations: Mapping[str, tuple[int, ...]], *, normalize: bool):
        super().__init__()
        self.keys = sorted(observations)
        images = {key: shape for key, shape in sorted(observations.items()) if len(shape) == 3}
        vectors = {key: shape[0] for key, shape in sorted(observations.items()) if len(shape) == 1}
        self.networks = nn.ModuleDict({key: ConvFeatures(shape) for key, shape in images.items()})
        self.moments = nn.ModuleDict({key: Moments(size) for key, size in vectors.items()} if normalize else {})
        self.out_features = IMAGE_FEATURES * len(images) + sum(vectors.values())

    def update_moments_(self, observations: Mapping[str, Tensor]) -> None:
        """Take observations [N, ...] by key into account in the mean and the deviation of vectors."""
        for key, moments in self.moments.items():
            moments.update_(observations[key].float())

    def forward(self, *observations: Tensor) -> Tensor:
        """Observations in the order of ``keys`` to a vector [..., F]."""
        parts = []
        for key, value in zip(self.keys, observations, strict=True):
            if key in self.networks:
                parts.append(self.networks[key](value))
            else:
                parts.append(self.moments[key](value.float()) if key in self.moments else value.float())
        return torch.cat(parts, -1)


def make_mlp(in_features: int, out_features: int, *, units: int, layers: int, gain: float) -> nn.Sequential:
    """Build ``layers`` hidden layers of width ``units`` with tanh, and a linear one whose weights have ``gain``."""
    hidden: list[nn.Module] = []
    for _ in range(layers):
        hidden += [orthogonal(nn.Linear(in_features, units)), nn.Tanh()]
        in_features = units
    return nn.Sequential(*hidden, orthogonal(nn.Linear(in_features, out_features), gain))


class CategoricalActor(nn.Module):
    """Observations to the logits of a choice; nearly uniform at the start.

    Args:
        observer: What reads the observations.
        action_size: Choices A.
        units, layers: See :func:`make_mlp`.
    """

    def __init__(self, observer: Observer, action_size: int, *, units: int, layers: int):
        super().__init__()
        self.observer = observer
        self.head = make_mlp(observer.out_features, action_size, units=units, layers=layers, gain=0.01)

    def forward(self, *observations: Tensor) -> Tensor:
        """Observations to logits [..., A]."""
        return self.head(self.observer(*observations))


class GaussianActor(nn.Module):
    """Observations to the mean of a Gaussian, whose deviation is the same for all observations and 1 at the start.

    Args:
        observer: What reads the observations.
        action_size: Width A of the action.
        units, layers: See :func:`make_mlp`.
    """

    def __init__(self, observer: Observer, action_size: int, *, units: int, layers: int):
        super().__init__()
        self.observer = observer
        self.head = make_mlp(observer.out_features, action_size, units=units, layers=layers, gain=0.01)
        self.log_scale = nn.Parameter(torch.zeros(action_size))

    def forward(self, *observations: Tensor) -> tuple[Tensor, Tensor]:
        """Observations to mean [..., A] and standard deviation [..., A]."""
        loc = self.head(self.observer(*observations))
        return loc, self.log_scale.exp().expand_as(loc)


class Value(nn.Module):
    """Observations to the value of the state.

    Args:
        observer: What reads the observations; may be shared with an actor.
        units, layers: See :func:`make_mlp`.
    """

    def __init__(self, observer: Observer, *, units: int, layers: int):
        super().__init__()
        self.observer = observer
        self.head = make_mlp(observer.out_features, 1, units=units, layers=layers, gain=1.0)

    def forward(self, *observations: Tensor) -> Tensor:
        """Observations to value [..., 1]."""
        return self.head(self.observer(*observations))
