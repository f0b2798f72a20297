"""Building blocks: initialisation, block structure, float32 norms, and the loop layer against plain autograd."""

import math

import pytest
import torch
from torch import nn

from dreamer.models.conv import DownConv2d
from dreamer.models.layers import BlockLinear, LoopLinear, NormAct, RMSNorm, from_blocks, to_blocks
from tests.helpers import make_rssm


class TestInitialisation:
    """N(0, 1 / fan_in) truncated at two sigma and widened by 1.1368, so that the spread is that of N(0, 1 / fan_in)."""

    def test_block_layers_of_the_rssm_count_every_input(self):
        """A fan-in of one block only would start the recurrent weights sqrt(blocks) times too large."""
        rssm = make_rssm(belief_size=256, hidden_size=64, blocks=8)
        for layer, fan_in in ((rssm.hidden, 256 + 8 * 3 * 64), (rssm.gates, 256)):
            assert layer.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.02)
            assert layer.weight.abs().max().item() <= 2 * 1.1368 * fan_in**-0.5
            assert not layer.bias.any()

    def test_convolutions_count_their_taps(self):
        torch.manual_seed(0)
        layer = DownConv2d(32, 64, "pool")
        assert layer.weight.std().item() == pytest.approx((32 * 5 * 5) ** -0.5, rel=0.02)
        assert not layer.bias.any()

    def test_every_bias_starts_at_zero_and_every_norm_at_one(self):
        rssm = make_rssm()
        for name, parameter in rssm.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any(), name
            if name.endswith("scale"):
                assert torch.equal(parameter, torch.ones_like(parameter)), name


class TestBlockLinear:
    def test_blocks_do_not_see_each_other(self):
        torch.manual_seed(0)
        layer, x = BlockLinear(6, 9, blocks=3), torch.randn(4, 6, requires_grad=True)
        jacobian = torch.autograd.functional.jacobian(lambda x: layer(x).sum(0), x)[:, 0].unflatten(0, (3, 3))
        for i in range(3):  # output block
            for j in range(3):  # input block
                seen = jacobian[i, :, 2 * j : 2 * j + 2]
                assert bool(seen.any()) == (i == j), (i, j)

    def test_equals_a_dense_layer_with_a_block_diagonal_weight(self):
        torch.manual_seed(0)
        layer, x = BlockLinear(6, 9, blocks=3), torch.randn(4, 6)
        nn.init.normal_(layer.bias)
        dense = torch.block_diag(*layer.weight)  # [6, 9]
        torch.testing.assert_close(layer(x), x @ dense + layer.bias)

    @pytest.mark.parametrize(("in_features", "out_features"), [(7, 8), (8, 7)])
    def test_widths_that_do_not_divide(self, in_features, out_features):
        with pytest.raises(ValueError, match="blocks=2 must divide"):
            BlockLinear(in_features, out_features, blocks=2)

    def test_cutting_into_blocks_and_back(self):
        x = torch.arange(12.0).view(2, 6)
        assert to_blocks(x, 3).tolist() == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]
        assert torch.equal(from_blocks(to_blocks(x, 3)), x)


class TestNorm:
    def test_hand_computed(self):
        """x / sqrt(mean(x^2) + 1e-4): (3, 4) has a mean square of 12.5, zero stays zero, and nothing is centred."""
        norm = RMSNorm(2)
        expected = [[3 / math.sqrt(12.5001), 4 / math.sqrt(12.5001)], [0, 0], [1 / math.sqrt(1.0001)] * 2]
        torch.testing.assert_close(norm(torch.tensor([[3.0, 4.0], [0, 0], [1, 1]])), torch.tensor(expected))

    def test_bfloat16_is_normalised_in_float32(self):
        """1e-4 beside a mean square near 1 is lost in bfloat16, and so is every partial sum over many features."""
        torch.manual_seed(0)
        x = torch.randn(4, 512).bfloat16()
        exact = (x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-4).sqrt()).bfloat16()
        assert torch.equal(RMSNorm(512)(x), exact)

    def test_silu_comes_after_the_norm(self):
        """SiLU(+-1 / sqrt(1.0001)) whatever the size of the input."""
        y = 1 / math.sqrt(1.0001)
        expected = torch.tensor([[y / (1 + math.exp(-y)), -y / (1 + math.exp(y))]])
        torch.testing.assert_close(NormAct(2)(torch.tensor([[1.0, -1.0]])), expected)


def run_loop(layer, inputs: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """y_t = layer(x_t + tanh(y_{t-1})): every product depends on the one before."""
    outputs, y = [], first
    for x in inputs.unbind(0):
        y = layer(x + torch.tanh(y))
        outputs.append(y)
    return torch.stack(outputs)


STEPS, ROWS, SIZE = 5, 3, 4


@pytest.fixture(params=["dense", "block"])
def loop(request):
    """A weight, its bias in the shape of the offsets, inputs, a first input and the plain product."""
    torch.manual_seed(0)
    lead = () if request.param == "dense" else (2,)
    weight = torch.randn(*lead, SIZE, SIZE).requires_grad_()
    bias = torch.randn(*lead, 1, SIZE).requires_grad_()
    inputs = torch.randn(STEPS, *lead, ROWS, SIZE).requires_grad_()
    first = torch.randn(*lead, ROWS, SIZE).requires_grad_()
    return weight, bias, inputs, first


class TestLoopLinear:
    """One weight gradient after the loop must be the sum of those that autograd forms at every step."""

    def test_equals_plain_autograd(self, loop):
        weight, bias, inputs, first = loop
        plain = run_loop(lambda x: bias + x @ weight, inputs, first)
        layer = LoopLinear(weight, bias.expand(STEPS, *first.shape))
        deferred = run_loop(layer, inputs, first)
        torch.testing.assert_close(deferred, plain)
        cotangent = torch.randn_like(plain)
        expected = torch.autograd.grad(plain, loop, cotangent)
        actual = torch.autograd.grad(deferred, loop, cotangent)
        for ours, autograd in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, autograd, rtol=1e-5, atol=1e-5)

    def test_steps_without_a_gradient_add_nothing(self, loop):
        """Only the second output is used: later steps must not leak into the weight gradient."""
        weight, bias, inputs, first = loop
        plain = run_loop(lambda x: bias + x @ weight, inputs, first)[1].square().sum()
        deferred = run_loop(LoopLinear(weight, bias.expand(STEPS, *first.shape)), inputs, first)[1].square().sum()
        for ours, autograd in zip(torch.autograd.grad(deferred, loop), torch.autograd.grad(plain, loop), strict=True):
            torch.testing.assert_close(ours, autograd, rtol=1e-5, atol=1e-5)

    def test_offsets_that_differ_get_their_own_gradient(self, loop):
        weight, _, inputs, first = loop
        offsets = torch.randn(STEPS, *first.shape).requires_grad_()
        layer = LoopLinear(weight, offsets)
        outputs = torch.stack([layer(x) for x in inputs.unbind(0)])
        cotangent = torch.randn_like(outputs)
        d_offsets, d_weight = torch.autograd.grad(outputs, (offsets, weight), cotangent)
        assert torch.equal(d_offsets, cotangent)
        torch.testing.assert_close(d_weight, (inputs.mT @ cotangent).sum(0), rtol=1e-5, atol=1e-5)

    def test_without_gradients_it_is_the_plain_product(self, loop):
        weight, bias, inputs, first = loop
        with torch.no_grad():
            layer = LoopLinear(weight, bias.expand(STEPS, *first.shape))
            output = layer(inputs[0])
        assert layer.inputs is None and not output.requires_grad
        torch.testing.assert_close(output, (bias + inputs[0] @ weight).detach())

    def test_autocast_computes_in_bfloat16_and_leaves_float32_gradients(self, loop):
        weight, bias, inputs, first = loop
        with torch.autocast("cpu", torch.bfloat16):
            layer = LoopLinear(weight, bias.expand(STEPS, *first.shape))
            output = torch.stack([layer(x) for x in inputs.bfloat16().unbind(0)])
        assert output.dtype == torch.bfloat16
        output.float().square().sum().backward()
        plain = bias + inputs @ weight
        expected = torch.autograd.grad(plain.square().sum(), (weight, bias))
        for ours, exact in zip((weight, bias), expected, strict=True):
            assert ours.grad.dtype == torch.float32
            assert (ours.grad - exact).norm() <= 0.02 * exact.norm()  # 2^-8 of rounding at each of three places

    def test_more_steps_than_offsets(self, loop):
        weight, bias, inputs, first = loop
        layer = LoopLinear(weight, bias.expand(1, *first.shape))
        layer(inputs[0])
        with pytest.raises(StopIteration):
            layer(inputs[1])
