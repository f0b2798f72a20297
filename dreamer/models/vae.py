"""The convolutional variational autoencoder of World Models: 64x64 images to a Gaussian over a small latent."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

IMAGE_SHAPE = (64, 64, 3)
ENCODER_KERNELS = (4, 4, 4, 4)  # 64 -> 31 -> 14 -> 6 -> 2 pixels per side
DECODER_KERNELS = (5, 5, 6, 6)  # 1 -> 5 -> 13 -> 30 -> 64
LOGVAR_LIMIT = 10.0


class Posterior(NamedTuple):
    """Independent normals over the latent, given by mean and log variance."""

    mean: Tensor  # [..., Z]
    logvar: Tensor  # [..., Z]

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """Return mean + exp(logvar / 2) * noise, [..., Z]; standard normal ``noise`` is drawn if it is not given."""
        noise = torch.randn_like(self.mean) if noise is None else noise
        return self.mean + torch.exp(0.5 * self.logvar) * noise


class VAE(nn.Module):
    """Encode images as a Gaussian over Z latents, and decode latents to images.

        encode: conv k4 s2 (32, 64, 128, 256), ReLU -> 2 x 2 x 256 -> linear mean, logvar
        decode: linear 1024 -> transposed conv k5, 5, 6, 6 s2 (128, 64, 32, 3), ReLU, sigmoid at the end

    With ``batch_norm`` a latent depends on the other images of its batch unless the module is in evaluation mode.

    Args:
        latent_size: Number Z of latents.
        channels: Of the four convolutions; the decoder has the same in reverse.
        batch_norm: Normalise before each ReLU. The paper does not.

    Source: hardmaru/WorldModelsExperiments@fd982b9 carracing/vae/vae.py, ``ConvVAE``.
    Differs: logvar is limited to [-10, 10]; ``batch_norm`` is added.
    """

    def __init__(
        self, *, latent_size: int = 32, channels: Sequence[int] = (32, 64, 128, 256), batch_norm: bool = False
    ):
        super().__init__()
        self.latent_size = latent_size
        inner = 4 * channels[-1]  # 2 x 2 pixels
        self.encoder = _stages(nn.Conv2d, (IMAGE_SHAPE[-1], *channels), ENCODER_KERNELS, batch_norm)
        self.encoder.append(_activation(channels[-1], batch_norm))
        self.mean = nn.Linear(inner, latent_size)
        self.logvar = nn.Linear(inner, latent_size)
        self.from_latent = nn.Linear(latent_size, inner)
        widths = (inner, *reversed(channels[:-1]), IMAGE_SHAPE[-1])
        self.decoder = _stages(nn.ConvTranspose2d, widths, DECODER_KERNELS, batch_norm)
        self.apply(_init_glorot_)

    def encode(self, pixels: Tensor) -> Posterior:
        """Return the posterior of images.

        Args:
            pixels: uint8 [..., 64, 64, 3], 0 to 255.

        Raises:
            ValueError: for another dtype or shape.
        """
        if pixels.dtype != torch.uint8:
            raise ValueError(f"pixels.dtype={pixels.dtype}: pass uint8 0..255, encode divides by 255 itself")
        if pixels.shape[-3:] != IMAGE_SHAPE:
            raise ValueError(f"pixels.shape={tuple(pixels.shape)}: resize to [..., {', '.join(map(str, IMAGE_SHAPE))}]")
        lead = pixels.shape[:-3]
        x = self.encoder(pixels.reshape(-1, *IMAGE_SHAPE).permute(0, 3, 1, 2).float() / 255)  # [N, C, 2, 2]
        x = x.permute(0, 2, 3, 1).flatten(1)  # [N, 4 * C] in h, w, C order
        mean, logvar = self.mean(x).float(), self.logvar(x).float().clamp(-LOGVAR_LIMIT, LOGVAR_LIMIT)
        return Posterior(mean.unflatten(0, lead), logvar.unflatten(0, lead))

    def decode(self, latent: Tensor) -> Tensor:
        """Images [..., 64, 64, 3] float32 in [0, 1] of latents [..., Z]."""
        x = self.from_latent(latent.reshape(-1, self.latent_size))[..., None, None]  # [N, 4 * C, 1, 1]
        x = torch.sigmoid(self.decoder(x).float()).permute(0, 2, 3, 1)  # [N, 64, 64, 3]
        return x.unflatten(0, latent.shape[:-1])


def _activation(channels: int, batch_norm: bool) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU()) if batch_norm else nn.ReLU()


def _stages(layer: type[nn.Module], widths: Sequence[int], kernels: Sequence[int], batch_norm: bool) -> nn.Sequential:
    """Convolutions of stride two with an activation between them."""
    stages = nn.Sequential()
    for (a, b), kernel in zip(pairwise(widths), kernels, strict=True):
        if stages:
            stages.append(_activation(a, batch_norm))
        stages.append(layer(a, b, kernel, 2))
    return stages


def _init_glorot_(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
