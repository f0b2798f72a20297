"""What the pictures of World Models show, and where."""

import pytest
import torch
from tensordict import TensorDict

from dreamer.agents.world_model_pictures import dream_media, mdn_rnn_media, vae_media
from dreamer.models.controller import Controller
from dreamer.models.mdn_rnn import MDNRNN
from dreamer.models.vae import VAE

Z, A, H, SIDE = 3, 2, 4, 64


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return VAE(latent_size=Z, channels=(2, 2, 2, 2)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = MDNRNN(latent_size=Z, action_size=A, hidden_size=H, components=2)
    torch.nn.init.constant_(model.head.bias[-1:], -100.0)  # no dream ends
    return model


def make_pixels(count: int) -> torch.Tensor:
    return torch.randint(256, (count, SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def tile(picture: torch.Tensor, row: int, column: int) -> torch.Tensor:
    return picture[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]


def assert_shows(picture: torch.Tensor, image: torch.Tensor) -> None:
    """That a picture is the image in [0, 1], but for rounding."""
    assert (picture - image * 255).abs().max() < 0.51


def test_reconstructions_and_traversals(vae):
    pixels = make_pixels(10)
    images = vae_media(vae, pixels).images
    mean = vae.encode(pixels).mean
    shown = images["vae/reconstructions"]
    assert shown.shape == (2 * SIDE, 8 * SIDE, 3)
    assert torch.equal(tile(shown, 0, 5), pixels[5])
    assert_shows(tile(shown, 1, 5), vae.decode(mean[5:6])[0])
    traversals = images["vae/traversals"]
    assert traversals.shape == (Z * SIDE, 7 * SIDE, 3)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, torch.exp(0.5 * vae.encode(pixels).logvar)),
        torch.distributions.Normal(torch.zeros(Z), torch.ones(Z)),
    )
    latent = mean[:1].clone()
    latent[0, kl.mean(0).argmax()] = -3
    assert_shows(tile(traversals, 0, 0), vae.decode(latent)[0])


def make_batch(valid: list[int], resets: list[int]) -> TensorDict:
    """Two encoded sequences of 16 records, with so many valid ones and so many records before the second episode."""
    step = torch.arange(16)
    return TensorDict(
        {
            "posterior_mean": torch.randn(2, 16, Z),
            "action": torch.rand(2, 16, A),
            "is_init": torch.stack([(step == 0) | (step == reset) for reset in resets])[..., None],
            "valid": torch.stack([step < count for count in valid])[..., None],
        },
        (2, 16),
    )


def test_rollouts_of_recorded_actions(vae, model):
    batch = make_batch(valid=[9, 16], resets=[99, 12])
    before = torch.get_rng_state()
    media = mdn_rnn_media(vae, model, batch)
    assert torch.equal(torch.get_rng_state(), before)
    picture, video = media.images["mdn_rnn/rollouts"], media.videos["mdn_rnn/rollout_video"]
    assert picture.shape == (4 * SIDE, 8 * SIDE, 3)
    assert video.shape == (11, SIDE, 4 * SIDE, 3), "the twelve records before the second episode of the second sequence"
    seen = vae.decode(batch["posterior_mean"][1])
    assert_shows(tile(picture, 0, 7), seen[10])
    assert_shows(video[3, :, :SIDE], seen[3])
    for row in (1, 2, 3):
        assert_shows(tile(picture, row, 0), seen[0])
    assert not torch.equal(tile(picture, 1, 7), tile(picture, 3, 7)), "temperatures differ"
    others = batch.clone()
    others["action"][1, 1:] *= -1
    assert not torch.equal(mdn_rnn_media(vae, model, others).images["mdn_rnn/rollouts"], picture)
    others = batch.clone()
    others["action"][:, 0] *= -1
    others["action"][:, 12:] *= -1
    assert torch.equal(mdn_rnn_media(vae, model, others).images["mdn_rnn/rollouts"], picture)


def test_nothing_to_roll_out(vae, model):
    assert mdn_rnn_media(vae, model, make_batch(valid=[1, 1], resets=[99, 99])).images == {}


def test_a_dream_is_black_after_its_end(vae, model):
    class Short(MDNRNN):
        """Ends with the third step."""

        def predict(self, hidden):
            self.steps = getattr(self, "steps", 0) + 1
            prediction = super().predict(hidden)
            return prediction._replace(terminated_logits=torch.full_like(prediction.reward, float(self.steps - 2.5)))

    controller = Controller(in_features=Z + H, action_size=A)
    parameters, start = torch.randn(controller.num_parameters), torch.randn(Z)
    whole = dream_media(vae, model, controller, parameters, start, 8).images["controller/dreams"]
    assert whole.shape == (3 * SIDE, 8 * SIDE, 3)
    short = Short(latent_size=Z, action_size=A, hidden_size=H, components=2)
    short.load_state_dict(model.state_dict())
    cut = dream_media(vae, short, controller, parameters, start, 8).images["controller/dreams"]
    assert torch.equal(cut[:, : 3 * SIDE], whole[:, : 3 * SIDE]) and not cut[:, 3 * SIDE :].any()
