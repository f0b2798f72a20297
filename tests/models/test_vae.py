import pytest
import torch
from torch.distributions import Normal, kl_divergence

from dreamer.models.vae import VAE, Posterior

SMALL = {"latent_size": 3, "channels": (2, 3, 4, 5)}


def make_pixels(*lead: int) -> torch.Tensor:
    return torch.randint(0, 256, (*lead, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_shapes():
    vae, pixels = VAE(**SMALL), make_pixels(2, 3)
    posterior = vae.encode(pixels)
    assert posterior.mean.shape == posterior.logvar.shape == (2, 3, 3)
    reco = vae.decode(posterior.sample())
    assert reco.shape == pixels.shape and reco.dtype == torch.float32
    assert reco.min() >= 0 and reco.max() <= 1


def test_feature_maps_shrink_as_in_the_paper():
    sizes, x = [], torch.zeros(1, 3, 64, 64)
    for layer in VAE(**SMALL).encoder:
        x = layer(x)
        sizes.append(x.shape[-1])
    assert sizes[::2] == [31, 14, 6, 2]


def test_pixels_are_divided_by_255_once():
    vae = VAE(**SMALL)
    seen = []
    vae.encoder[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    vae.encode(torch.full((1, 64, 64, 3), 255, dtype=torch.uint8))
    assert torch.equal(seen[0], torch.ones(1, 3, 64, 64))
    with pytest.raises(ValueError, match="uint8"):
        vae.encode(torch.ones(1, 64, 64, 3))


def test_channels_are_told_from_height():
    with pytest.raises(ValueError, match=r"\(1, 3, 64, 64\)"):
        VAE(**SMALL).encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_logvar_is_a_log_variance():
    noise = torch.tensor([1.0, -1.0])
    sample = Posterior(torch.tensor([1.0, 1.0]), torch.tensor([4.0, 4.0]).log()).sample(noise)
    torch.testing.assert_close(sample, torch.tensor([3.0, -1.0]))  # std 2, not 4
    posterior = VAE(**SMALL).encode(make_pixels(4))
    std = (0.5 * posterior.logvar).exp()
    kl = kl_divergence(Normal(posterior.mean, std), Normal(0.0, 1.0)).sum(-1)
    ours = -0.5 * (1 + posterior.logvar - posterior.mean**2 - posterior.logvar.exp()).sum(-1)
    torch.testing.assert_close(ours, kl)


def test_logvar_is_limited():
    vae = VAE(**SMALL)
    torch.nn.init.constant_(vae.logvar.bias, 1e4)
    assert vae.encode(make_pixels(1)).sample().isfinite().all()


@pytest.mark.parametrize("batch_norm", [False, True])
def test_an_encoding_does_not_depend_on_the_batch(batch_norm):
    vae, pixels = VAE(**SMALL, batch_norm=batch_norm), make_pixels(4)
    vae.encode(pixels)  # moves the running statistics
    vae.eval()
    together = vae.encode(pixels).mean
    alone = torch.cat([vae.encode(pixels[i : i + 1]).mean for i in range(4)])
    torch.testing.assert_close(together, alone)
    if batch_norm:
        vae.train()
        assert (vae.encode(pixels).mean - vae.encode(pixels[:2].repeat(2, 1, 1, 1)).mean)[:2].abs().max() > 1e-4


def test_batch_norm_keeps_the_last_layer_free():
    plain, normed = VAE(**SMALL), VAE(**SMALL, batch_norm=True)
    added = sum(p.numel() for p in normed.parameters()) - sum(p.numel() for p in plain.parameters())
    assert added == 2 * (2 + 3 + 4 + 5) + 2 * (4 + 3 + 2)
    assert normed.decode(torch.zeros(2, 3)).shape == (2, 64, 64, 3)
