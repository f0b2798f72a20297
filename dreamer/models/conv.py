"""Image encoder and decoder of DreamerV3, channels-last throughout.

``downsample="pool"`` is the reference: stride-1 convolutions with 2x2 max-pooling, and nearest-neighbour upsampling
in the decoder. ``"strided"`` is the reference's faster option: stride-2 and fractionally strided convolutions. Both
have the same parameters.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamer.models.layers import BlockLinear, Linear, NormAct, init_truncated_normal_

DOWNSAMPLE = ("pool", "strided")
KERNEL = 5
MULTIPLIERS = (2, 3, 4, 4)  # channels of each stage, in units of `depth`

# Upsampling by two and then convolving with five taps touches three input pixels per axis, so it is one 3x3
# convolution at the low resolution for each of the four output phases: 36 multiplications where 100 are written.
# TAPS[downsample][phase][offset] lists the taps that fall on the input pixel at `offset` - 1.
TAPS = {
    "pool": (((0, 1), (2, 3), (4,)), ((0,), (1, 2), (3, 4))),
    "strided": (((1,), (3,), ()), ((0,), (2,), (4,))),
}


def innermost(image_shape: tuple[int, int, int], stages: int, downsample: str) -> tuple[int, int]:
    """Height and width of the smallest feature map; raise ``ValueError`` if the image cannot be halved to it."""
    if downsample not in DOWNSAMPLE:
        raise ValueError(f"downsample={downsample!r}: choose one of {DOWNSAMPLE}")
    height, width, _ = image_shape
    step = 2**stages
    if height % step or width % step:
        raise ValueError(f"image_shape={tuple(image_shape)}: height and width must be multiples of {step}")
    return height // step, width // step


class Conv2d(nn.Module):
    """A 5x5 convolution on ``[N, h, w, C]`` tensors with zero "same" padding."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        weight = torch.empty(out_channels, in_channels, KERNEL, KERNEL)
        init_truncated_normal_(weight, in_channels * KERNEL**2)
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.zeros(out_channels))


class DownConv2d(Conv2d):
    """Convolve and halve height and width, by max-pooling or by a stride of two."""

    def __init__(self, in_channels: int, out_channels: int, downsample: str):
        super().__init__(in_channels, out_channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)  # [N, C, h, w] in channels-last memory
        if self.downsample == "pool":
            x = F.max_pool2d(F.conv2d(x, self.weight, self.bias, padding=KERNEL // 2), 2)
        else:  # "same" padding at stride two is one pixel before and two after
            x = F.conv2d(F.pad(x, (1, 2, 1, 2)), self.weight, self.bias, stride=2)
        return x.permute(0, 2, 3, 1)  # [N, h/2, w/2, C']


class UpConv2d(Conv2d):
    """Double height and width, then convolve, as one 3x3 convolution and a rearrangement of its channels."""

    def __init__(self, in_channels: int, out_channels: int, downsample: str):
        super().__init__(in_channels, out_channels)
        taps = torch.zeros(2, 3, KERNEL)
        for phase, offsets in enumerate(TAPS[downsample]):
            for offset, indices in enumerate(offsets):
                taps[phase, offset, list(indices)] = 1.0
        self.register_buffer("taps", taps, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, _ = x.shape
        weight = torch.einsum("aku,blv,oiuv->aboikl", self.taps, self.taps, self.weight)  # [2, 2, C', C, 3, 3]
        weight = weight.flatten(0, 2).contiguous(memory_format=torch.channels_last)
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, self.bias.repeat(4), padding=1)  # [N, 4C', h, w]
        y = y.permute(0, 2, 3, 1).unflatten(-1, (2, 2, -1))  # [N, h, w, 2, 2, C']
        return y.transpose(2, 3).reshape(n, 2 * h, 2 * w, -1)  # [N, 2h, 2w, C']


class ImageEncoder(nn.Module):
    """Encode uint8 images ``[..., h, w, C]`` as vectors ``[..., E]``; at 64x64, E = 4 * 4 * 4 * depth.

    Each stage is convolution -> pooling -> RMSNorm -> SiLU; the result is flattened in h, w, C order.

    Args:
        image_shape: (height, width, channels); height and width are multiples of 16.
        depth: Channel unit of the stages.
        multipliers: Channels of each stage in units of ``depth``.
        downsample: "pool" or "strided".

    Raises:
        ValueError: for an image that cannot be halved four times or an unknown ``downsample``.
    Source: danijar/dreamerv3@e3f0224 dreamerv3/rssm.py, ``Encoder``.
    Differs: nothing.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        depth: int,
        multipliers: tuple[int, ...] = MULTIPLIERS,
        downsample: str = "pool",
    ):
        super().__init__()
        height, width = innermost(image_shape, len(multipliers), downsample)
        channels = [image_shape[-1]] + [depth * m for m in multipliers]
        self.stages = nn.Sequential(
            *(nn.Sequential(DownConv2d(a, b, downsample), NormAct(b)) for a, b in pairwise(channels))
        )
        self.out_features = height * width * channels[-1]

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stages(pixels.flatten(0, -4).float() / 255 - 0.5)  # [N, 4, 4, C]
        return x.flatten(1).unflatten(0, pixels.shape[:-3])  # [..., E]


class ImageDecoder(nn.Module):
    """Decode (belief, state) to the mean of an image, ``[..., h, w, C]`` float32 in [0, 1].

    belief goes through a block-diagonal linear map, state through a small MLP; their sum is the small map that
    upsampling -> convolution (-> RMSNorm -> SiLU) turns into an image.

    Args:
        belief_size, state_size: Widths D and Z of the two inputs.
        image_shape: (height, width, channels); height and width are multiples of 16.
        depth, multipliers: Channels of each stage, innermost last.
        units: Half the width of the state branch.
        blocks: Blocks of the belief branch.
        downsample: "pool" or "strided".

    Raises:
        ValueError: as :class:`ImageEncoder`.
    Source: danijar/dreamerv3@e3f0224 dreamerv3/rssm.py, ``Decoder`` with bspace = 8.
    Differs: the sigmoid is computed in float32 under autocast; the reference uses bfloat16.
    """

    def __init__(
        self,
        *,
        belief_size: int,
        state_size: int,
        image_shape: tuple[int, int, int],
        depth: int,
        units: int,
        multipliers: tuple[int, ...] = MULTIPLIERS,
        blocks: int = 8,
        downsample: str = "pool",
    ):
        super().__init__()
        self.size = innermost(image_shape, len(multipliers), downsample)
        self.blocks = blocks
        channels = [depth * m for m in reversed(multipliers)]
        innermost_features = self.size[0] * self.size[1] * channels[0]
        self.from_belief = BlockLinear(belief_size, innermost_features, blocks)
        self.from_state = nn.Sequential(
            Linear(state_size, 2 * units), NormAct(2 * units), Linear(2 * units, innermost_features)
        )
        self.norm = NormAct(channels[0])
        self.stages = nn.Sequential(
            *(nn.Sequential(UpConv2d(a, b, downsample), NormAct(b)) for a, b in pairwise(channels))
        )
        self.out = UpConv2d(channels[-1], image_shape[-1], downsample)

    def forward(self, belief: Tensor, state: Tensor) -> Tensor:
        lead = belief.shape[:-1]
        belief, state = belief.flatten(0, -2), state.flatten(0, -2)  # [N, D], [N, Z]
        x0 = self.from_belief(belief).unflatten(-1, (self.blocks, *self.size, -1))  # [N, g, 4, 4, C/g]
        x0 = x0.permute(0, 2, 3, 1, 4).flatten(3)  # [N, 4, 4, C], channels block by block
        x1 = self.from_state(state).unflatten(-1, (*self.size, -1))  # [N, 4, 4, C]
        x = self.stages(self.norm(x0 + x1))  # [N, 32, 32, C]
        return torch.sigmoid(self.out(x).float()).unflatten(0, lead)  # [..., 64, 64, 3]
