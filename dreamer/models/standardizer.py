"""What stands in for a trained autoencoder: small vectors, or random features of images, each on a scale of its own."""

import torch
from torch import Tensor, nn

from dreamer.models.vae import LOGVAR_LIMIT, VAE, Posterior


class Standardizer(nn.Module):
    """Encode vectors as themselves: less their mean, in standard deviations, with next to no noise.

        mean = (o - shift) / scale        logvar = -10

    The noise keeps the likelihood of a model of the encodings finite, as that of an autoencoder does.

    Args:
        size: Numbers O of an observation, and latents.
    """

    def __init__(self, size: int):
        super().__init__()
        self.latent_size = size
        self.register_buffer("shift", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def fit(self, observations: Tensor, min_scale: float = 1e-3) -> None:
        """Take shift and scale from observations [N, O]; a number that never changes keeps a scale of ``min_scale``."""
        observations = observations.to(self.shift)
        self.shift.copy_(observations.mean(0))
        self.scale.copy_(observations.std(0, correction=0).clamp(min=min_scale))

    def encode(self, observation: Tensor) -> Posterior:
        """The posterior of observations [..., O]."""
        mean = (observation - self.shift) / self.scale
        return Posterior(mean, torch.full_like(mean, -LOGVAR_LIMIT))


class StandardizedVAE(nn.Module):
    """Encode images as random features: the means of a VAE that is not trained, with next to no noise.

    As it begins, its means differ by a hundredth of its noise from image to image, so that samples say nothing.

    Args:
        vae: Stays as it is.
    """

    def __init__(self, vae: VAE):
        super().__init__()
        self.vae, self.standardizer, self.latent_size = vae, Standardizer(vae.latent_size), vae.latent_size

    def fit(self, pixels: Tensor) -> None:
        """Take shift and scale of the means from images uint8 [N, 64, 64, 3]."""
        self.standardizer.fit(self.vae.encode(pixels).mean, min_scale=1e-6)

    def encode(self, pixels: Tensor) -> Posterior:
        """The posterior of images [..., 64, 64, 3]."""
        return self.standardizer.encode(self.vae.encode(pixels).mean)
