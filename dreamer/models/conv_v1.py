"""Image encoder and decoder of Dreamer V1 (and of World Models): strided convolutions without padding, 64x64 only."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamer.models.layers_v1 import glorot

SIZE = 64
MULTIPLIERS = (1, 2, 4, 8)  # channels of the encoder's stages, in units of `depth`
KERNEL = 4
DECODER_KERNELS = (5, 5, 6, 6)  # 1 -> 5 -> 13 -> 30 -> 64


def check_image(image_shape: tuple[int, int, int]) -> None:
    """Raise ``ValueError`` for images that are not 64x64."""
    if tuple(image_shape[:2]) != (SIZE, SIZE):
        raise ValueError(f"image_shape={tuple(image_shape)}: these networks take {SIZE}x{SIZE}; set env.image_size=64")


class ConvEncoder(nn.Module):
    """Encode uint8 images ``[..., 64, 64, C]`` as vectors ``[..., E]``, E = 32 * depth.

    Four 4x4 convolutions of stride two with ReLU on pixels / 255 - 0.5; the result is flattened in h, w, C order.

    Args:
        image_shape: (height, width, channels).
        depth: Channels of the first stage.

    Raises:
        ValueError: for an image that is not 64x64.
    Source: danijar/dreamer@56d4d44 models.py, ``ConvEncoder``.
    Differs: nothing.
    """

    def __init__(self, *, image_shape: tuple[int, int, int], depth: int = 32):
        super().__init__()
        check_image(image_shape)
        channels = [image_shape[-1]] + [depth * m for m in MULTIPLIERS]
        self.stages = nn.ModuleList(glorot(nn.Conv2d(a, b, KERNEL, stride=2)) for a, b in pairwise(channels))
        self.out_features = 4 * channels[-1]

    def forward(self, pixels: Tensor) -> Tensor:
        x = (pixels.flatten(0, -4).float() / 255 - 0.5).permute(0, 3, 1, 2)  # [N, C, 64, 64]
        for stage in self.stages:
            x = F.relu(stage(x))
        return x.permute(0, 2, 3, 1).flatten(1).unflatten(0, pixels.shape[:-3])  # [N, 2, 2, C'] -> [..., E]


class DeconvDecoder(nn.Module):
    """Decode (belief, state) to the mean of an image, ``[..., 64, 64, C]`` float32, of which black is 0 and white 1.

    A linear layer without activation, then four transposed convolutions of stride two, ReLU between them. Nothing
    bounds the result.

    Args:
        belief_size, state_size: Widths D and Z of the two inputs.
        image_shape: (height, width, channels).
        depth: Channel unit: the stages have 4, 2 and 1 of it.

    Raises:
        ValueError: for an image that is not 64x64.
    Source: danijar/dreamer@56d4d44 models.py, ``ConvDecoder``.
    Differs: 0.5 is added, as the reference compares with pixels / 255 - 0.5; belief comes before state.
    """

    def __init__(self, *, belief_size: int, state_size: int, image_shape: tuple[int, int, int], depth: int = 32):
        super().__init__()
        check_image(image_shape)
        channels = [32 * depth, 4 * depth, 2 * depth, depth, image_shape[-1]]
        self.inner = glorot(nn.Linear(belief_size + state_size, channels[0]))
        self.stages = nn.ModuleList(
            glorot(nn.ConvTranspose2d(a, b, kernel, stride=2))
            for (a, b), kernel in zip(pairwise(channels), DECODER_KERNELS, strict=True)
        )

    def forward(self, belief: Tensor, state: Tensor) -> Tensor:
        lead = belief.shape[:-1]
        x = self.inner(torch.cat([belief, state], -1).flatten(0, -2))[..., None, None]  # [N, C, 1, 1]
        for stage in self.stages[:-1]:
            x = F.relu(stage(x))
        return (self.stages[-1](x).float() + 0.5).permute(0, 2, 3, 1).unflatten(0, lead)  # [..., 64, 64, C]
