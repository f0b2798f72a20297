import math
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from dreamer.models.mdn_rnn import MDNRNN, Mixture
from dreamer.models.vae import VAE
from objectives.world_models import (
    MDNRNNLoss,
    VAELoss,
    calibrated_nll,
    mixture_log_prob,
    normal_log_prob,
    terminated_bce,
    unit_gaussian_kl,
)


def make_pixels(rows: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (rows, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class OffsetVAE(torch.nn.Module):
    """Decodes gray 100 / 255 plus an offset; its posteriors have the given KL by their mean alone."""

    def __init__(self, offset: float = 0.0, kl: tuple[float, ...] = (0.0,)):
        super().__init__()
        self.offset = offset
        self.mean = torch.nn.Parameter(torch.tensor([[math.sqrt(2 * nats)] for nats in kl]))

    def encode(self, pixels):
        posterior = SimpleNamespace(mean=self.mean.expand(len(pixels), -1), logvar=torch.zeros(len(pixels), 1))
        posterior.sample = lambda noise: posterior.mean
        return posterior

    def decode(self, latent):
        return torch.full((len(latent), 64, 64, 3), 100 / 255) + self.offset


def gray(rows: int) -> torch.Tensor:
    return torch.full((rows, 64, 64, 3), 100, dtype=torch.uint8)


@pytest.mark.parametrize("rows", [1, 3])
def test_reconstruction_is_a_sum_over_the_image_and_a_mean_over_the_batch(rows):
    losses = VAELoss(OffsetVAE(offset=0.1))(TensorDict({"pixels": gray(rows)}))
    assert losses["loss_vae_reco"].item() == pytest.approx(12_288 * 0.01, rel=1e-4)


def test_free_nats_are_for_each_image():
    vae = OffsetVAE(kl=(2.0, 40.0))
    loss = VAELoss(vae, free_nats=16.0)(TensorDict({"pixels": gray(2)}))["loss_vae_kl"]
    assert loss.item() == pytest.approx(28.0)  # a floor on the mean would give 21
    loss.backward()
    assert vae.mean.grad[0] == 0 and vae.mean.grad[1] != 0


def test_kl_is_that_of_torch():
    mean, logvar = torch.randn(2, 5, 3).unbind()
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(unit_gaussian_kl(mean, logvar), expected)


def test_calibrated_nll_is_that_of_the_best_variance():
    squared_error = torch.tensor([3.0, 5.0], requires_grad=True)
    nll = calibrated_nll(squared_error, 100)
    std = math.sqrt(8 / 200)
    expected = -Normal(0.0, std).log_prob(torch.tensor([0.03, 0.05]).sqrt()) * 100
    torch.testing.assert_close(nll, expected)
    assert all(
        -Normal(0.0, other).log_prob(torch.tensor([0.03, 0.05]).sqrt()).sum() * 100 > nll.sum()
        for other in (0.9 * std, 1.1 * std)
    )
    nll.sum().backward()
    torch.testing.assert_close(squared_error.grad, torch.full((2,), 1 / (2 * std**2)))


def test_calibrated_nll_of_a_perfect_image_is_finite():
    squared_error = torch.zeros(2, requires_grad=True)
    calibrated_nll(squared_error, 100).sum().backward()
    assert squared_error.grad.isfinite().all()


def test_calibrated_images_weigh_more_when_they_are_nearly_right():
    loss = VAELoss(OffsetVAE(offset=0.1), calibrated=True)(TensorDict({"pixels": gray(2)}))["loss_vae_reco"]
    assert loss.item() == pytest.approx(12_288 * (0.5 + math.log(0.1) + 0.5 * math.log(2 * math.pi)), rel=1e-4)


def test_beta_rises_with_updates_and_comes_back():
    def make():
        return VAELoss(OffsetVAE(kl=(20.0,)), beta=4.0, anneal_updates=4)

    batch, loss = TensorDict({"pixels": gray(1)}), make()
    seen = []
    for _ in range(6):
        seen.append(loss(batch)["loss_vae_kl"].item() / 20)
        loss.update_targets()
    assert seen == pytest.approx([0, 1, 2, 3, 4, 4])
    resumed = make()
    loss.updates.fill_(3)
    resumed.load_state_dict(loss.state_dict())
    assert resumed(batch)["loss_vae_kl"].item() == pytest.approx(60)


def test_a_vae_learns():
    torch.manual_seed(0)
    loss = VAELoss(VAE(latent_size=4, channels=(4, 8, 8, 8)), free_nats=2.0)
    batch = TensorDict({"pixels": make_pixels(8) // 8})
    optimiser = torch.optim.Adam(loss.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        out = loss(batch)
        total = out["loss_vae_reco"] + out["loss_vae_kl"]
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        losses.append(total.item())
    assert losses[-1] < 0.7 * losses[0]
    assert set(out.keys()) == set(loss.out_keys)


def make_mixture(*lead: int) -> tuple[Mixture, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return Mixture(*torch.randn(3, *lead, 4, generator=generator)), torch.randn(*lead, generator=generator)


def per_latent(mixture: Mixture, target: torch.Tensor) -> torch.Tensor:
    return mixture_log_prob(mixture.logits, normal_log_prob(target.unsqueeze(-1), mixture.mean, mixture.log_std))


def test_a_mixture_for_each_latent():
    mixture, target = make_mixture(2, 3, 5)
    expected = MixtureSameFamily(Categorical(logits=mixture.logits), Normal(mixture.mean, mixture.log_std.exp()))
    torch.testing.assert_close(per_latent(mixture, target), expected.log_prob(target), rtol=1e-5, atol=1e-5)


def test_one_mixture_over_all_latents_is_another_model():
    mixture, target = make_mixture(2, 3, 5)
    logits = mixture.logits[..., 0, :]
    components = Independent(Normal(mixture.mean.transpose(-1, -2), mixture.log_std.exp().transpose(-1, -2)), 1)
    expected = MixtureSameFamily(Categorical(logits=logits), components).log_prob(target)  # [2, 3]
    log_prob = normal_log_prob(target.unsqueeze(-1), mixture.mean, mixture.log_std).sum(-2)
    joint = mixture_log_prob(logits, log_prob)
    torch.testing.assert_close(joint, expected, rtol=1e-5, atol=1e-5)
    shared = mixture._replace(logits=logits.unsqueeze(-2).expand_as(mixture.logits))
    assert (per_latent(shared, target).sum(-1) - joint).abs().min() > 0.01


def test_a_target_far_away_has_a_finite_likelihood():
    mixture, _ = make_mixture(1)
    mixture = Mixture(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2))
    expected = -0.5 * 39**2 - 0.5 * math.log(2 * math.pi) + math.log(0.5)
    assert per_latent(mixture, torch.tensor([40.0])).item() == pytest.approx(expected)


def test_ends_weigh_more():
    bce = terminated_bce(torch.zeros(2), torch.tensor([0.0, 1.0]), 10.0)
    assert bce.tolist() == pytest.approx([math.log(2), 10 * math.log(2)])


def make_batch(rows: int = 2, steps: int = 6) -> TensorDict:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(rows, steps, *shape, generator=generator)

    batch = {"posterior_mean": draw(3), "posterior_logvar": draw(3), "action": draw(2), "reward": draw(1)}
    ends = {name: torch.zeros(rows, steps, 1, dtype=torch.bool) for name in ("is_init", "terminated")}
    return TensorDict(batch | ends, (rows, steps))


def make_loss(**arguments) -> MDNRNNLoss:
    torch.manual_seed(0)
    return MDNRNNLoss(MDNRNN(latent_size=3, action_size=2, hidden_size=8), **arguments)


def test_mdn_rnn_loss():
    loss, batch = make_loss(), make_batch()
    out = loss(batch)
    assert set(out.keys()) == set(loss.out_keys)
    terms, _ = loss.terms(batch)
    assert all(term.shape == (2, 5) for term in terms.values())
    sum(out[key] for key in out.keys() if key.startswith("loss_")).backward()  # noqa: SIM118
    assert all(p.grad.isfinite().all() for p in loss.parameters() if p.requires_grad)


def test_latents_are_drawn_anew_each_time():
    loss, batch = make_loss(), make_batch()
    assert loss(batch)["loss_mdn_latent"] != loss(batch)["loss_mdn_latent"]
    noise = torch.randn(2, 6, 3)
    fixed = [loss.terms(batch, noise)[0]["mdn_latent"] for _ in range(2)]
    assert torch.equal(*fixed)
    half = batch.clone().update({"posterior_mean": batch["posterior_mean"].half()})
    torch.testing.assert_close(loss.terms(half, noise)[0]["mdn_latent"], fixed[0], atol=1e-2, rtol=1e-2)


def test_the_step_into_another_episode_does_not_count():
    loss, batch, noise = make_loss(), make_batch(rows=1), torch.randn(1, 6, 3)
    batch["is_init"][:, 3] = True
    whole, logs = loss.terms(batch, noise)
    assert (whole["mdn_latent"] == 0).tolist() == [[False, False, True, False, False]]
    assert logs["mdn_counting_share"] == pytest.approx(0.8)
    parts = [loss.terms(batch[:, s], noise[:, s])[0] for s in (slice(0, 3), slice(3, 6))]
    for name, term in whole.items():
        expected = torch.cat([part[name] for part in parts], 1).mean()
        torch.testing.assert_close(term.mean(), expected)


def test_padding_does_not_count():
    loss, batch, noise = make_loss(), make_batch(), torch.randn(2, 6, 3)
    batch["valid"] = torch.ones(2, 6, 1, dtype=torch.bool)
    batch["valid"][:, 4:] = False
    padded = {name: term.mean() for name, term in loss.terms(batch, noise)[0].items()}
    batch["posterior_mean"][:, 4:] = 1e3
    batch["reward"][:, 4:] = 1e3
    batch["terminated"][:, 4:] = True
    changed = {name: term.mean() for name, term in loss.terms(batch, noise)[0].items()}
    short = {name: term.mean() for name, term in loss.terms(batch[:, :4], noise[:, :4])[0].items()}
    for name, value in padded.items():
        torch.testing.assert_close(changed[name], value)
        torch.testing.assert_close(short[name], value)


def test_a_batch_without_any_pair_is_finite():
    batch = make_batch()
    batch["is_init"][:] = True
    assert make_loss()(batch)["loss_mdn_latent"] == 0


@pytest.mark.parametrize(("name", "shift", "learns"), [("as recorded", 0, True), ("one late", 1, False)])
def test_the_action_of_a_record_led_to_it(name, shift, learns):
    """In an environment whose latent becomes the action, only the right alignment is learnt.

    The floor of the deviation allows -2.08 nats; who knows no more than that it is one of two loses log 2 of that.
    """
    torch.manual_seed(0)
    action = torch.randint(0, 2, (32, 12, 1)).float() * 2 - 1
    zeros = torch.zeros(32, 12, 1)
    ends = {key: zeros.bool() for key in ("is_init", "terminated")}
    batch = TensorDict(
        {
            "posterior_mean": action,
            "posterior_logvar": zeros - 10,
            "action": action.roll(shift, 1),
            "reward": action,
        }
        | ends,
        (32, 12),
    )
    loss = MDNRNNLoss(MDNRNN(latent_size=1, action_size=1, hidden_size=16, components=2, min_log_std=-3.0))
    optimiser = torch.optim.Adam([p for p in loss.parameters() if p.requires_grad], lr=0.02)
    for _ in range(80):
        out = loss(batch)
        optimiser.zero_grad()
        (out["loss_mdn_latent"] + out["loss_mdn_reward"] + out["loss_mdn_terminated"]).backward()
        optimiser.step()
    assert (out["loss_mdn_latent"].item() < -1.7) == learns, name
    assert (out["loss_mdn_reward"].item() < 0.1) == learns, name


def test_weights_must_name_the_terms():
    with pytest.raises(ValueError, match="mdn_reward"):
        make_loss(weights={"mdn_latent": 1.0})(make_batch())
