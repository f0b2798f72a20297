"""What the networks of Dreamer V1 share: the initial weights of their linear and convolutional layers."""

from typing import TypeVar

from torch import nn

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def glorot(layer: Layer) -> Layer:
    """Fill ``layer`` with weights uniform in +-sqrt(6 / (fan_in + fan_out)) and zero bias; return it.

    Source: danijar/dreamer@56d4d44 models.py, which leaves its layers as Keras makes them.
    Differs: nothing.
    """
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
