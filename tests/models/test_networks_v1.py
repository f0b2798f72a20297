"""Networks of Dreamer V1: sizes, initial weights, distributions by hand, and TorchRL's opinion."""

import math

import pytest
import torch
from torchrl.modules import TanhNormal as TorchRLTanhNormal

from dreamer.models.conv_v1 import ConvEncoder, DeconvDecoder
from dreamer.models.heads_v1 import Head, OneHotActor, StraightThroughOneHot, TanhNormal, TanhNormalActor, add_noise
from dreamer.models.layers_v1 import glorot

IMAGE = (64, 64, 3)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_default_sizes_have_the_parameters_of_the_reference():
    feature = 200 + 30
    assert count(ConvEncoder(image_shape=IMAGE)) == 690_144
    assert count(DeconvDecoder(belief_size=200, state_size=30, image_shape=IMAGE)) == 3_795_555
    assert count(Head(feature, 1, units=400, layers=2)) == 253_201
    assert count(Head(feature, 1, units=400, layers=3)) == 413_601
    assert count(TanhNormalActor(feature, 6, units=400)) == 578_412


def test_glorot():
    """Uniform up to sqrt(6 / (fan_in + fan_out)), where a fan counts the taps of a kernel."""
    layers = {
        torch.nn.Linear(300, 200): 500,
        torch.nn.Conv2d(30, 20, 4): 16 * 50,
        torch.nn.ConvTranspose2d(30, 20, 5): 25 * 50,
    }
    torch.manual_seed(0)
    for layer, fans in layers.items():
        bound = math.sqrt(6 / fans)
        assert glorot(layer) is layer
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert not layer.bias.any()


class TestImages:
    def test_shapes(self):
        encoder = ConvEncoder(image_shape=IMAGE, depth=1)
        pixels = torch.randint(256, (2, 3, *IMAGE), dtype=torch.uint8)
        assert encoder(pixels).shape == (2, 3, encoder.out_features) == (2, 3, 32)
        torch.testing.assert_close(encoder(pixels)[1], encoder(pixels[1]))
        decoder = DeconvDecoder(belief_size=5, state_size=2, image_shape=IMAGE, depth=1)
        assert decoder(torch.zeros(2, 3, 5), torch.zeros(2, 3, 2)).shape == (2, 3, *IMAGE)

    def test_a_decoder_without_weights_says_grey_and_nothing_bounds_it(self):
        decoder = DeconvDecoder(belief_size=5, state_size=2, image_shape=IMAGE, depth=1)
        inputs = torch.zeros(1, 5), torch.zeros(1, 2)
        assert torch.equal(decoder(*inputs), torch.full((1, *IMAGE), 0.5))
        torch.nn.init.constant_(decoder.stages[-1].bias, -2.0)
        assert torch.equal(decoder(*inputs), torch.full((1, *IMAGE), -1.5))

    def test_the_first_layer_of_the_decoder_has_no_activation(self):
        """With an activation, the negative of an input could not give the negative of its inner map."""
        decoder = DeconvDecoder(belief_size=5, state_size=2, image_shape=IMAGE, depth=1)
        seen = []
        decoder.stages[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        belief, state = torch.randn(4, 5), torch.randn(4, 2)
        decoder(belief, state)
        decoder(-belief, -state)
        assert (seen[0] < 0).any()
        torch.testing.assert_close(seen[0], -seen[1])

    def test_other_sizes_are_refused(self):
        for make in (
            lambda shape: ConvEncoder(image_shape=shape),
            lambda shape: DeconvDecoder(belief_size=1, state_size=1, image_shape=shape),
        ):
            with pytest.raises(ValueError, match=r"image_shape=\(32, 64, 3\).*image_size=64"):
                make((32, 64, 3))


class TestTanhNormal:
    def test_by_hand(self):
        """raw (2.5, 0): mean 5 tanh(0.5), std 5 + 1e-4; noise 0.3 gives tanh(mean + 0.3 std)."""
        actor = TanhNormalActor(3, 1, units=4)
        policy = actor.distribution(torch.tensor([2.5, 0.0]))
        mean, std = 5 * math.tanh(0.5), 5 + 1e-4
        assert policy.mean.item() == pytest.approx(mean) and policy.std.item() == pytest.approx(std)
        action = policy.rsample(torch.tensor([-0.3])).item()
        assert action == pytest.approx(math.tanh(mean - 0.3 * std))
        x = math.atanh(0.5)
        normal = -0.5 * ((x - mean) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)
        assert policy.log_prob(torch.tensor([0.5])).item() == pytest.approx(normal - math.log(1 - 0.5**2))

    def test_log_prob_is_that_of_torchrl(self):
        torch.manual_seed(0)
        policy = TanhNormal(torch.randn(50, 3), torch.rand(50, 3) + 0.2)
        action = policy.rsample().clamp(-0.999, 0.999)
        theirs = TorchRLTanhNormal(policy.mean, policy.std, upscale=1.0, tanh_loc=False).log_prob(action)
        torch.testing.assert_close(policy.log_prob(action), theirs, rtol=1e-4, atol=1e-4)

    def test_log_prob_is_finite_at_the_ends(self):
        policy = TanhNormal(torch.zeros(2, 1), torch.ones(2, 1))
        ends = policy.log_prob(torch.tensor([[-1.0], [1.0]]))
        assert ends.isfinite().all() and ends[0].item() == pytest.approx(ends[1].item(), rel=1e-5)

    def test_entropy_is_that_of_a_narrow_normal(self):
        """Close to 0, tanh is nearly the identity."""
        torch.manual_seed(0)
        entropy = TanhNormal(torch.zeros(200, 1), torch.full((200, 1), 0.01)).entropy().mean().item()
        assert entropy == pytest.approx(math.log(0.01) + 0.5 * (1 + math.log(2 * math.pi)), abs=0.02)

    def test_entropy_is_minus_the_mean_log_density(self):
        """By quadrature; and where actions round to 1, from the slope of tanh."""
        torch.manual_seed(0)
        policy = TanhNormal(torch.tensor([0.5]), torch.tensor([0.8]))
        action = torch.linspace(-1, 1, 400_002)[1:-1, None]
        log_prob = policy.log_prob(action)
        expected = -(log_prob.exp() * log_prob).mean().item() * 2
        noise = torch.randn(100_000, 1)
        assert policy.entropy(noise).item() == pytest.approx(expected, abs=0.02)
        far = TanhNormal(torch.tensor([50.0]), torch.tensor([1e-3])).entropy(noise[:10]).item()
        normal = math.log(1e-3) + 0.5 * (1 + math.log(2 * math.pi))
        assert far == pytest.approx(normal + 2 * (math.log(2) - 50), abs=0.01)

    def test_mode_is_likely_and_each_rows_own(self):
        torch.manual_seed(0)
        policy = TanhNormal(torch.tensor([[-1.0], [1.0], [-1.0], [1.0]]), torch.full((4, 1), 0.3))
        mode = policy.mode
        grid = torch.linspace(-0.999, 0.999, 2001).expand(4, -1).T[..., None]
        best = grid[policy.log_prob(grid).argmax(0), 0, 0]
        torch.testing.assert_close(mode.squeeze(-1), best, atol=0.1, rtol=0)

    def test_samples_for_acting_carry_no_gradient(self):
        policy = TanhNormalActor(3, 2, units=4)(torch.randn(5, 3))
        assert policy.rsample().requires_grad
        assert not policy.sample().requires_grad and not policy.mode.requires_grad

    def test_leading_axes(self):
        policy = TanhNormalActor(3, 2, units=4)(torch.randn(5, 6, 3))
        assert policy.mode.shape == policy.sample().shape == (5, 6, 2)
        assert policy.entropy().shape == policy.log_prob(policy.sample()).shape == (5, 6)


def test_onehot_samples_have_the_gradient_of_the_probabilities():
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log().requires_grad_()
    policy = StraightThroughOneHot(logits.log_softmax(-1))
    sample = policy.rsample(torch.tensor([[0.0, 0.0, 1.0]]))
    torch.testing.assert_close(sample, torch.tensor([[0.0, 0, 1]]))
    sample[0, 0].backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.2 * 0.8, -0.2 * 0.5, -0.2 * 0.3]]))
    assert OneHotActor(3, 4, units=5)(torch.randn(6, 3)).rsample().sum(-1).tolist() == pytest.approx([1] * 6)


def test_onehot_frequencies():
    torch.manual_seed(0)
    policy = StraightThroughOneHot(torch.tensor([0.2, 0.5, 0.3]).log().expand(20_000, 3))
    torch.testing.assert_close(policy.rsample().mean(0), torch.tensor([0.2, 0.5, 0.3]), atol=0.015, rtol=0)


def test_exploration_is_clipped():
    assert add_noise(torch.tensor([0.9, -0.2]), 0.3, torch.tensor([2.0, -1.0])).tolist() == pytest.approx([1.0, -0.5])
    torch.manual_seed(0)
    noisy = add_noise(torch.zeros(5000), 0.3)
    assert noisy.std().item() == pytest.approx(0.3, rel=0.05) and noisy.abs().max() <= 1
