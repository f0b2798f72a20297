"""The stand-in for an autoencoder where observations are vectors."""

import pytest
import torch

from dreamer.models.standardizer import StandardizedVAE, Standardizer
from dreamer.models.vae import VAE


def test_by_hand():
    standardizer = Standardizer(2)
    observations = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    assert torch.equal(standardizer.encode(observations).mean, observations), "nothing before it was fitted"
    standardizer.fit(observations)
    mean, logvar = standardizer.encode(torch.tensor([[4.0, 5.0], [2.0, 5.001]]))
    torch.testing.assert_close(mean, torch.tensor([[2.0, 0.0], [0.0, 1.0]]), atol=2e-4, rtol=0)
    assert logvar.tolist() == [[-10, -10], [-10, -10]]


def test_a_sample_is_close_to_the_observation():
    sample = Standardizer(3).encode(torch.zeros(2000, 3)).sample()
    assert sample.std().item() == pytest.approx(0.0067, rel=0.05)


def test_an_untrained_vae_tells_images_apart():
    """What differs between images is larger than the noise, as it is not in the VAE itself."""
    torch.manual_seed(0)
    pixels = torch.randint(200, (64, 64, 3)) + torch.randint(10, (64, 64, 64, 3))
    pixels = pixels.to(torch.uint8)
    vae = VAE(latent_size=3, channels=[4, 4, 4, 4]).eval()
    vision = StandardizedVAE(vae)
    with torch.no_grad():
        vision.fit(pixels)
        posterior, blind = vision.encode(pixels), vae.encode(pixels)
    torch.testing.assert_close(posterior.mean.std(0, correction=0), torch.ones(3), atol=0.01, rtol=0)
    assert (posterior.logvar == -10).all()
    assert blind.mean.std(0).mean() < 0.1 * torch.exp(0.5 * blind.logvar).mean()
