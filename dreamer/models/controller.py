"""Controllers of World Models: policies small enough to be evolved as one flat vector of parameters."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


class Controller:
    """Map features to actions with the parameters of many candidates at once; it holds no parameters itself.

        linear: output = W feature + b        with hidden_size: output = W2 tanh(W1 feature + b1) + b2
        continuous: action = tanh(output)     discrete: action = onehot(argmax(output))

    A flat vector is, layer by layer, the bias [out] and then the weight [in, out] in row-major order.

    Args:
        in_features: Width F of the feature; in World Models z and then h, or z alone.
        action_size: Number A of action dimensions.
        discrete: One-hot actions instead of actions in (-1, 1).
        hidden_size: Width of a hidden layer; 0 is a linear controller.
        bias: Whether layers have biases.

    Source: hardmaru/WorldModelsExperiments@fd982b9 carracing/model.py and doomrnn/model.py, ``set_model_params``.
    Differs: discrete actions are added.
    """

    def __init__(
        self, *, in_features: int, action_size: int, discrete: bool = False, hidden_size: int = 0, bias: bool = True
    ):
        self.in_features, self.action_size, self.discrete, self.bias = in_features, action_size, discrete, bias
        widths = (in_features, hidden_size, action_size) if hidden_size else (in_features, action_size)
        self.shapes = tuple(pairwise(widths))
        self.num_parameters = sum(a * b + bias * b for a, b in self.shapes)

    def unflatten(self, parameters: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Split flat vectors [P, n] into the (bias [P, 1, out], weight [P, in, out]) of each layer.

        Raises:
            ValueError: for vectors of another length.
        """
        if parameters.ndim != 2 or parameters.shape[1] != self.num_parameters:
            raise ValueError(f"parameters.shape={tuple(parameters.shape)}: pass [candidates, {self.num_parameters}]")
        layers, start = [], 0
        for a, b in self.shapes:
            if self.bias:
                bias = parameters[:, start : start + b].unsqueeze(1)
            else:
                bias = parameters.new_zeros(len(parameters), 1, b)
            start += b * self.bias
            layers.append((bias, parameters[:, start : start + a * b].unflatten(1, (a, b))))
            start += a * b
        return layers

    def flatten(self, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The inverse of :meth:`unflatten`: flat vectors [P, n]."""
        parts = [part.flatten(1) for bias, weight in layers for part in ((bias, weight) if self.bias else (weight,))]
        return torch.cat(parts, 1)

    def observe(self, latent: Tensor, hidden: Tensor) -> Tensor:
        """The feature [..., F] of z [..., Z] and h [..., D]: z alone if F is Z, else [z, h]."""
        return latent if self.in_features == latent.shape[-1] else torch.cat([latent, hidden], -1)

    def outputs(self, layers: list[tuple[Tensor, Tensor]], feature: Tensor) -> Tensor:
        """Outputs [P, R, A] before tanh or argmax, of R features [P, R, F] for each of P candidates."""
        for index, (bias, weight) in enumerate(layers):
            feature = torch.baddbmm(bias, torch.tanh(feature) if index else feature, weight)
        return feature

    def act(self, layers: list[tuple[Tensor, Tensor]], feature: Tensor) -> Tensor:
        """Actions [P, R, A] of R features [P, R, F] for each of P candidates."""
        outputs = self.outputs(layers, feature)
        if self.discrete:
            return F.one_hot(outputs.argmax(-1), self.action_size).to(outputs.dtype)
        return torch.tanh(outputs)
