"""Actors as distributions, and heads: densities by hand, bounds, no squashing, float32."""

import math

import pytest
import torch
from torch.distributions import Normal

from dreamer.models.heads import BoundedNormal, ContinuousActor, DiscreteActor, Head, OneHotCategorical
from objectives.functional import symexp_bins, twohot_mean

SIGMOID = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731


class TestContinuousActor:
    def test_density_of_the_raw_sample(self):
        """A plain normal: no tanh, so no Jacobian, and the sample outside of [-1, 1] is scored where it lies."""
        policy = BoundedNormal(torch.tensor([[0.5, -0.9]]), torch.tensor([[0.3, 1.0]]))
        action = torch.tensor([[1.7, -2.5]])
        expected = Normal(policy.mean, policy.std).log_prob(action).sum(-1)
        torch.testing.assert_close(policy.log_prob(action), expected)
        by_hand = -0.5 * (4.0**2 + 1.6**2) - math.log(0.3) - math.log(2 * math.pi)
        assert policy.log_prob(action).item() == pytest.approx(by_hand, rel=1e-6)

    def test_entropy(self):
        """sum of log(std) + (1 + log(2 pi)) / 2: 0.5 log(2 pi e) = 1.4189 for std 1."""
        policy = BoundedNormal(torch.zeros(1, 2), torch.tensor([[1.0, 0.1]]))
        assert policy.entropy().item() == pytest.approx(2 * 1.4189385 + math.log(0.1), rel=1e-6)

    def test_samples_are_neither_squashed_nor_clipped(self):
        torch.manual_seed(0)
        policy = BoundedNormal(torch.full((20_000, 1), 0.9), torch.ones(20_000, 1))
        action = policy.sample()
        assert action.mean().item() == pytest.approx(0.9, abs=0.05) and action.max() > 3
        assert action.std().item() == pytest.approx(1.0, abs=0.03)
        assert torch.equal(policy.mode, policy.mean)

    @pytest.mark.parametrize(
        ("raw", "mean", "std"),
        [
            (0.0, 0.0, 0.9 * SIGMOID(2) + 0.1),
            (-2.0, math.tanh(-2), 0.9 * SIGMOID(0) + 0.1),
            (60.0, 1.0, 1.0),
            (-60.0, -1.0, 0.1),
        ],
    )
    def test_mean_is_a_tanh_and_the_spread_lies_between_its_bounds(self, raw, mean, std):
        """mean = tanh(m), std = 0.9 sigmoid(s + 2) + 0.1."""
        actor = ContinuousActor(3, 1, units=4)
        with torch.no_grad():
            for layer in (actor.mean, actor.std):
                layer.weight.zero_()
                layer.bias.fill_(raw)
        policy = actor(torch.randn(1, 3))
        assert policy.mean.item() == pytest.approx(mean, abs=1e-6)
        assert policy.std.item() == pytest.approx(std, abs=1e-6)

    def test_starts_near_the_middle_of_its_range(self):
        """Output weights of 1% of the usual size: the first policies explore evenly."""
        torch.manual_seed(0)
        policy = ContinuousActor(64, 4, units=64)(torch.randn(100, 64))
        assert policy.mean.abs().max() < 0.1
        torch.testing.assert_close(policy.std, torch.full((100, 4), 0.9 * SIGMOID(2) + 0.1), atol=0.02, rtol=0)


class TestDiscreteActor:
    def test_hand_computed(self):
        """p = (1/2, 1/4, 1/4): log p(0) = -log 2, entropy = 3/2 log 2."""
        policy = OneHotCategorical(torch.tensor([[0.5, 0.25, 0.25]]).log())
        assert policy.log_prob(torch.tensor([[1.0, 0, 0]])).item() == pytest.approx(-math.log(2))
        assert policy.entropy().item() == pytest.approx(1.5 * math.log(2))
        assert policy.mode.tolist() == [[1, 0, 0]]

    def test_samples(self):
        torch.manual_seed(0)
        probs, draws = torch.tensor([0.5, 0.3, 0.15, 0.05]), 20_000
        action = OneHotCategorical(probs.log().expand(draws, 4)).sample()
        assert torch.equal(action.sum(-1), torch.ones(draws)) and set(action.unique().tolist()) == {0, 1}
        assert ((action.mean(0) - probs).abs() <= 5 * (probs * (1 - probs) / draws).sqrt()).all()

    @pytest.mark.parametrize(("unimix", "least"), [(0.01, 0.0025), (0.0, 0.0)])
    def test_mixture_is_in_density_entropy_and_samples(self, unimix, least):
        """Certain logits over four actions: without the mixture an action that is never drawn is never learned."""
        actor = DiscreteActor(3, 4, units=4, unimix=unimix)
        with torch.no_grad():
            actor.logits.weight.zero_()
            actor.logits.bias.copy_(torch.tensor([300.0, 0, 0, 0]))
        policy = actor(torch.randn(1, 3))
        assert policy.logits.exp()[0, 1].item() == pytest.approx(least)
        assert policy.logits.exp().sum().item() == pytest.approx(1)
        probs = torch.tensor([1 - 3 * least, least, least, least], dtype=torch.float64)
        assert policy.entropy().item() == pytest.approx(-torch.xlogy(probs, probs).sum().item(), abs=1e-6)


class TestHead:
    def test_outscale_zero_starts_at_exactly_zero(self):
        """Reward and value start at 0, not at the -0.3 that a careless sum over +-5e8 bins gives."""
        torch.manual_seed(0)
        head = Head(8, 255, units=16, layers=2, outscale=0.0)
        logits = head(torch.randn(5, 8))
        assert not logits.any() and not twohot_mean(logits, symexp_bins()).any()

    @pytest.mark.parametrize("kind", ["head", "continuous", "discrete", "discrete with mixture"])
    def test_float32_under_autocast(self, kind):
        """Losses and distributions are computed in float32 from whatever the layers give."""
        make = {
            "head": lambda: Head(8, 255, units=16, layers=1),
            "continuous": lambda: ContinuousActor(8, 2, units=16),
            "discrete": lambda: DiscreteActor(8, 4, units=16),
            "discrete with mixture": lambda: DiscreteActor(8, 4, units=16, unimix=0.01),
        }
        with torch.autocast("cpu", torch.bfloat16):
            output = make[kind]()(torch.randn(5, 8).bfloat16())
            outputs = [output] if kind == "head" else [*output, output.sample(), output.entropy()]
        assert all(tensor.dtype == torch.float32 for tensor in outputs)
