"""Autoencoder and controllers of World Models against the references.

They are hardmaru/WorldModelsExperiments@fd982b9 and ctallec/world-models@d6abd9c. The second is met by rearranging its
parameters: its log sigma is half of our log variance, it flattens images channels first, its decoder has one more ReLU,
and its controller has the weight before the bias and no tanh.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from dreamer.models.controller import Controller
from dreamer.models.vae import VAE, Posterior
from objectives.world_models import VAELoss, unit_gaussian_kl
from tests.golden.reference import Golden, assert_gradients, assert_near, linear, load

LAYERS = {"mean": "enc_fc_mu", "logvar": "enc_fc_log_var", "from_latent": "dec_fc"}
STAGES = {
    f"{ours}.{2 * i}": f"{theirs}{i + 1}"
    for ours, theirs in (("encoder", "enc_conv"), ("decoder", "dec_deconv"))
    for i in range(4)
}
VAE_NAMES = {k: v for ours, theirs in (LAYERS | STAGES).items() for k, v in linear(ours, theirs).items()}


def to_car_racing(action: torch.Tensor) -> torch.Tensor:
    """What the environment makes of actions in (-1, 1): steering, gas and brake."""
    steering, gas, brake = action.unbind(-1)
    return torch.stack([steering, (gas + 1) / 2, brake.clamp(min=0)], -1)


class FixedVAE(torch.nn.Module):
    """Answers with given tensors, to test the loss alone."""

    def __init__(self, posterior: Posterior, reco: torch.Tensor):
        super().__init__()
        self.posterior, self.reco = posterior, reco

    def encode(self, pixels):
        return self.posterior

    def decode(self, latent):
        return self.reco


def fixed_loss(golden: Golden, posterior: Posterior, free_nats: float):
    reco = ((golden["recon_u8"].float() + 0.5) / 256).requires_grad_()
    return VAELoss(FixedVAE(posterior, reco), free_nats=free_nats), reco


def test_vae_loss():
    golden = Golden("wm_vae")
    mean, logvar = golden["hm/mu"].requires_grad_(), golden["hm/logvar"].requires_grad_()
    posterior = Posterior(mean, logvar)
    assert_near(posterior.sample(golden["hm/eps"]), golden["hm/z"], 5e-6)
    assert_near(unit_gaussian_kl(mean, logvar), golden["hm/kl_per_sample"], 5e-6)
    floor = golden.config["kl_tolerance"] * golden.config["z_size"]
    loss, reco = fixed_loss(golden, posterior, floor)
    terms, _ = loss.terms(golden["image"], golden["hm/eps"])
    assert_near(terms["vae_reco"], golden["hm/sse_per_sample"], 5e-6)
    assert_near(terms["vae_kl"], golden["hm/kl_per_sample_clamped"], 5e-6)
    reco_loss, kl_loss = terms["vae_reco"].mean(), terms["vae_kl"].mean()
    assert_near(reco_loss, golden["hm/r_loss"], 5e-6)
    assert_near(kl_loss, golden["hm/kl_loss"], 5e-6)
    assert_near(reco_loss + kl_loss, golden["hm/loss"], 5e-6)
    (reco_loss + kl_loss).backward()
    assert_near(reco.grad[:, ::8, ::8], golden["hm/grad_recon_stride8"], 5e-6)
    clamped = golden["hm/kl_per_sample"] < floor
    assert clamped.any() and not clamped.all()
    for grad, name in ((mean.grad, "hm/grad_mu"), (logvar.grad, "hm/grad_logvar")):
        assert_near(grad, golden[name], 5e-6, name)
        assert not grad[clamped].any()


def test_vae_loss_of_the_second_reference():
    golden = Golden("wm_vae")
    mean, log_std = golden["ct/mu"].requires_grad_(), golden["ct/logsigma"].requires_grad_()
    loss, reco = fixed_loss(golden, Posterior(mean, 2 * log_std), free_nats=0.0)
    terms, _ = loss.terms(golden["image"])
    assert_near(terms["vae_reco"].sum(), golden["ct/sse"], 5e-6)
    assert_near(terms["vae_kl"].sum(), golden["ct/kld"], 5e-6)
    total = terms["vae_reco"].sum() + terms["vae_kl"].sum()
    assert_near(total, golden["ct/loss"], 5e-6)
    total.backward()
    assert_near(reco.grad[:, ::8, ::8], golden["ct/grad_recon_stride8"], 5e-6)
    assert_near(mean.grad, golden["ct/grad_mu"], 5e-6)
    assert_near(log_std.grad, golden["ct/grad_logsigma"], 5e-6)


def test_vae_network():
    golden = Golden("wm_vae_net")
    c = golden.config["small"]
    vae = VAE(latent_size=c["z_size"], channels=golden.config["widths"])
    load(vae, golden.parameters("small/param"), VAE_NAMES)
    assert sum(p.numel() for p in vae.parameters()) == c["count"]
    posterior = vae.encode(golden["small/image"])
    for ours, name in zip((*posterior, posterior.sample(golden["small/eps"])), ("mu", "logvar", "z"), strict=True):
        assert_near(ours, golden[f"small/{name}"], 1e-5, name)
    reco = vae.decode(golden["small/z"])
    assert_near(reco, golden["small/recon"], 1e-5)
    assert_near(reco.mean((1, 2)), golden["small/recon_mean"], 1e-5)
    assert_near(vae.decode(golden["small/z_in"][:1]), golden["small/decoded"], 1e-5)
    loss = VAELoss(vae, free_nats=0.5 * c["z_size"])
    terms, _ = loss.terms(golden["small/image"], golden["small/eps"])
    assert_near(terms["vae_reco"].mean(), golden["small/r_loss"], 1e-5)
    assert_near(terms["vae_kl"].mean(), golden["small/kl_loss"], 1e-5)
    total = terms["vae_reco"].mean() + terms["vae_kl"].mean()
    assert_near(total, golden["small/loss"], 1e-5)
    total.backward()
    assert_gradients(vae, golden, "small/grad", VAE_NAMES, 3e-5)


def test_vae_network_in_full():
    golden = Golden("wm_vae_net")
    full, arrays = golden.config["full"], {}
    for k, (name, shape, bound) in enumerate(
        zip(full["param_names"], full["param_shapes"], full["bounds"], strict=True)
    ):
        i = torch.arange(math.prod(shape))
        value = (i * i * 7919 + i * 104729 + k * 15485863) % 1000003
        arrays[name] = ((value.double() / 1000003 - 0.5) * 2 * bound).float().view(shape)
    vae = VAE()
    load(vae, arrays, VAE_NAMES)
    assert sum(p.numel() for p in vae.parameters()) == full["count"] == 4_348_547
    with torch.no_grad():
        posterior = vae.encode(golden["full/image"])
        latent = posterior.sample(golden["full/eps"])
        for ours, name in zip((*posterior, latent), ("mu", "logvar", "z"), strict=True):
            assert_near(ours, golden[f"full/{name}"], 1e-5, name)
        reco = vae.decode(latent)
        assert_near(reco[:, ::2, ::2], golden["full/recon_stride2"], 1e-5)
        assert_near(reco.mean((1, 2)), golden["full/recon_mean"], 1e-5)
        assert_near(vae.decode(golden["full/z_in"])[:, ::2, ::2], golden["full/decoded_stride2"], 1e-5)
        terms, _ = VAELoss(vae).terms(golden["full/image"], golden["full/eps"])
    assert_near(terms["vae_reco"].mean(), golden["full/r_loss"], 1e-5)
    assert_near(terms["vae_kl"].mean(), golden["full/kl_loss"], 1e-5)


def test_vae_network_of_the_second_reference():
    golden = Golden("wm_vae_net")
    arrays, channels = golden.parameters("ct/param"), golden.config["widths"]
    vae = VAE(latent_size=golden["ct/mu"].shape[1], channels=channels)
    names = {"mean": "encoder.fc_mu", "logvar": "encoder.fc_logsigma", "from_latent": "decoder.fc1"}
    names |= {f"encoder.{2 * i}": f"encoder.conv{i + 1}" for i in range(4)}
    names |= {f"decoder.{2 * i}": f"decoder.deconv{i + 1}" for i in range(4)}
    flat = {"mean", "logvar"}

    def from_theirs(name: str, kind: str, array: torch.Tensor) -> torch.Tensor:
        if name in flat and kind == "weight":  # C, h, w -> h, w, C
            array = array.unflatten(1, (channels[-1], 2, 2)).permute(0, 2, 3, 1).flatten(1)
        return array

    with torch.no_grad():
        for name, theirs in names.items():
            for kind in ("weight", "bias"):
                value = from_theirs(name, kind, arrays[f"{theirs}.{kind}"])
                vae.get_submodule(name).get_parameter(kind).copy_(value * (2 if name == "logvar" else 1))
    image, noise = golden["ct/image"], golden["ct/eps"]
    posterior = vae.encode(image)
    assert_near(posterior.mean, golden["ct/mu"], 1e-5)
    assert_near(0.5 * posterior.logvar, golden["ct/logsigma"], 1e-5)
    latent = posterior.sample(noise)
    assert_near(latent, golden["ct/z"], 1e-5)
    reco = torch.sigmoid(vae.decoder(F.relu(vae.from_latent(latent))[..., None, None]))
    assert_near(reco, golden["ct/recon"], 1e-5)
    loss, _ = VAELoss(FixedVAE(posterior, reco.permute(0, 2, 3, 1)), free_nats=0.0).terms(image)
    total = loss["vae_reco"].sum() + loss["vae_kl"].sum()
    assert_near(total, golden["ct/loss"], 1e-5)
    total.backward()
    for name, theirs in names.items():
        for kind in ("weight", "bias"):
            grad = vae.get_submodule(name).get_parameter(kind).grad * (2 if name == "logvar" else 1)
            reference = from_theirs(name, kind, golden[f"ct/grad/{theirs}.{kind}"])
            assert_near(grad, reference, 3e-5, f"{name}.{kind}")


@pytest.mark.parametrize("case", ["ZH", "ZH_large", "Z_HIDDEN", "doom", "ct"])
def test_controller(case):
    golden = Golden("wm_controller")
    parameters, action = golden[f"{case}/params"], golden[f"{case}/action"]
    z, h, c = golden["z"], golden["h"], golden["c"]
    if case == "doom":
        z, h, c = golden["doom/z"], golden["doom/h"], golden["doom/c"]
    feature = {"Z_HIDDEN": z, "doom": torch.cat([z, c, h], -1)}.get(case, torch.cat([z, h], -1))
    controller = Controller(
        in_features=feature.shape[-1],
        action_size=action.shape[-1],
        hidden_size=40 if case == "Z_HIDDEN" else 0,
        bias=case != "doom",
    )
    assert controller.num_parameters == len(parameters) == golden.config["counts"].get(case.removesuffix("_large"), 867)
    if case == "ct":  # weight [out, in] first, and no tanh
        weight, bias = parameters[:-3].view(3, -1), parameters[-3:]
        assert torch.equal(weight, golden["ct/weight"]) and torch.equal(bias, golden["ct/bias"])
        parameters = torch.cat([bias, weight.T.flatten()])
    layers = controller.unflatten(parameters.unsqueeze(0))
    if case == "ZH":
        assert torch.equal(layers[0][0][0, 0], golden["ZH/bias"])
        assert torch.equal(layers[0][1][0], golden["ZH/weight"])
    if case == "ct":
        ours = controller.outputs(layers, feature.unsqueeze(0))
    else:
        ours = controller.act(layers, feature.unsqueeze(0))
        ours = ours if case == "doom" else to_car_racing(ours)
    assert_near(ours[0], action, 5e-6)
