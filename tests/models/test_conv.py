"""Image encoder and decoder: padding and tap tables written out by hand, uint8 scaling, shapes and errors."""

import math

import pytest
import torch
from torch.nn import functional as F

from dreamer.models.conv import DownConv2d, ImageDecoder, ImageEncoder, UpConv2d

# JAX's "SAME" at stride 2, five taps, eight pixels: four outputs, (4 - 1) * 2 + 5 - 8 = 3 pixels of padding, one
# before and two after, so output o reads pixels 2 o - 1 ... 2 o + 3. Pixel -> {output: tap}.
STRIDED = {
    0: {0: 1},
    1: {0: 2, 1: 0},
    2: {0: 3, 1: 1},
    3: {0: 4, 1: 2, 2: 0},
    4: {1: 3, 2: 1},
    5: {1: 4, 2: 2, 3: 0},
    6: {2: 3, 3: 1},
    7: {2: 4, 3: 2},
}
# The fractionally strided convolution puts pixel i at 2 i + 1 of a grid of zeros twice as large and convolves that
# with two pixels of padding on either side, so output o reads tap u where o + u - 2 = 2 i + 1. Pixel -> {output: tap}.
FRACTIONAL = {
    0: {0: 3, 1: 2, 2: 1, 3: 0},
    1: {1: 4, 2: 3, 3: 2, 4: 1, 5: 0},
    2: {3: 4, 4: 3, 5: 2, 6: 1, 7: 0},
    3: {5: 4, 6: 3, 7: 2},
}


def numbered_kernel(layer) -> None:
    """Tap (u, v) is 10 u + v + 1 and the bias is zero, so that every tap can be recognised."""
    u, v = torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="ij")
    with torch.no_grad():
        layer.weight.copy_((10 * u + v + 1).expand_as(layer.weight))
        layer.bias.zero_()


def impulse(size: int, y: int, x: int) -> torch.Tensor:
    image = torch.zeros(1, size, size, 1)
    image[0, y, x] = 1
    return image


def response(rows: dict[int, int], columns: dict[int, int], size: int) -> torch.Tensor:
    """What the numbered kernel answers, given which tap each output row and column reads."""
    expected = torch.zeros(size, size)
    for row, u in rows.items():
        for column, v in columns.items():
            expected[row, column] = 10 * u + v + 1
    return expected


@torch.no_grad()
def test_strided_encoder_pads_one_before_and_two_after():
    """torch's padding=2 would pad two before and one after: every image would be seen one pixel off."""
    layer = DownConv2d(1, 1, "strided")
    numbered_kernel(layer)
    for y in range(8):
        for x in range(8):
            answer = layer(impulse(8, y, x))[0, ..., 0]
            assert torch.equal(answer, response(STRIDED[y], STRIDED[x], 4)), (y, x)


@torch.no_grad()
def test_strided_decoder_is_the_fractionally_strided_convolution():
    layer = UpConv2d(1, 1, "strided")
    numbered_kernel(layer)
    for y in range(4):
        for x in range(4):
            answer = layer(impulse(4, y, x))[0, ..., 0]
            torch.testing.assert_close(answer, response(FRACTIONAL[y], FRACTIONAL[x], 8), msg=f"impulse at {y}, {x}")


def naive_up(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, downsample: str) -> torch.Tensor:
    """Write out the large grid and convolve it."""
    if downsample == "pool":  # every pixel four times
        grid = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
    else:  # pixels at odd places, zeros elsewhere
        grid = x.new_zeros(x.shape[0], 2 * x.shape[1], 2 * x.shape[2], x.shape[3])
        grid[:, 1::2, 1::2] = x
    return F.conv2d(grid.permute(0, 3, 1, 2), weight, bias, padding=2).permute(0, 2, 3, 1)


@pytest.mark.parametrize("downsample", ["pool", "strided"])
def test_decoder_stage_equals_upsampling_and_then_convolving(downsample):
    """The 3x3 convolution with four phases is the 5x5 convolution on the large grid, edges included."""
    torch.manual_seed(0)
    layer = UpConv2d(3, 2, downsample)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 4, 6, 3, requires_grad=True)
    naive = naive_up(x, layer.weight, layer.bias, downsample)
    torch.testing.assert_close(layer(x), naive, rtol=1e-5, atol=1e-5)
    cotangent, inputs = torch.randn_like(naive), (x, layer.weight, layer.bias)
    expected = torch.autograd.grad(naive, inputs, cotangent)
    for ours, reference in zip(torch.autograd.grad(layer(x), inputs, cotangent), expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


def test_pooling_comes_after_the_convolution():
    """Convolve at full size with two pixels of padding, then keep the largest of every four."""
    torch.manual_seed(0)
    layer, x = DownConv2d(2, 3, "pool"), torch.randn(1, 4, 6, 2)
    full = F.conv2d(F.pad(x.permute(0, 3, 1, 2), (2, 2, 2, 2)), layer.weight, layer.bias)  # [1, 3, 4, 6]
    largest = full.unflatten(2, (2, 2)).unflatten(4, (3, 2)).amax((3, 5))  # [1, 3, 2, 3]
    torch.testing.assert_close(layer(x), largest.permute(0, 2, 3, 1))


@pytest.mark.parametrize("downsample", ["pool", "strided"])
class TestEncoder:
    def make(self, downsample) -> ImageEncoder:
        torch.manual_seed(0)
        return ImageEncoder(image_shape=(16, 32, 3), depth=2, downsample=downsample)

    def test_pixels_are_scaled_once(self, downsample):
        """The first convolution sees pixels / 255 - 0.5: 0 -> -0.5, 51 -> -0.3, 255 -> 0.5."""
        encoder, seen = self.make(downsample), []
        encoder.stages[0][0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 16, 32, 3)
        encoder(pixels)
        torch.testing.assert_close(seen[0], torch.tensor([-0.5, -0.3, 0.5]).expand(1, 16, 32, 3))

    def test_the_dtype_of_the_pixels_does_not_change_their_scale(self, downsample):
        encoder, pixels = self.make(downsample), torch.randint(256, (2, 16, 32, 3), dtype=torch.uint8)
        assert torch.equal(encoder(pixels), encoder(pixels.float()))

    def test_any_leading_axes(self, downsample):
        encoder, pixels = self.make(downsample), torch.randint(256, (2, 3, 16, 32, 3), dtype=torch.uint8)
        tokens = encoder(pixels)
        assert tokens.shape == (2, 3, encoder.out_features) and encoder.out_features == 1 * 2 * 4 * 2
        torch.testing.assert_close(tokens[:, 2], encoder(pixels[:, 2]))

    def test_flattened_in_height_width_channel_order(self, downsample):
        encoder, pixels = self.make(downsample), torch.randint(256, (1, 16, 32, 3), dtype=torch.uint8)
        maps = []
        encoder.stages.register_forward_hook(lambda module, args, output: maps.append(output))
        tokens = encoder(pixels)
        assert maps[0].shape == (1, 1, 2, 8)
        assert torch.equal(tokens[0], torch.cat([maps[0][0, 0, 0], maps[0][0, 0, 1]]))


def make_decoder(**overrides) -> ImageDecoder:
    torch.manual_seed(0)
    sizes = {"belief_size": 16, "state_size": 6, "image_shape": (16, 32, 3), "depth": 2, "units": 4}
    return ImageDecoder(**sizes | overrides)


class TestDecoder:
    @pytest.mark.parametrize("downsample", ["pool", "strided"])
    def test_images_in_zero_to_one(self, downsample):
        decoder = make_decoder(downsample=downsample)
        image = decoder(100 * torch.randn(2, 3, 16), torch.randn(2, 3, 6))
        assert image.shape == (2, 3, 16, 32, 3)
        assert image.min() >= 0 and image.max() <= 1

    def test_an_output_of_zero_is_middle_grey(self):
        """A sigmoid, not an addition of 0.5 to something unbounded."""
        decoder = make_decoder()
        with torch.no_grad():
            decoder.out.weight.zero_()
            decoder.out.bias.copy_(torch.tensor([0.0, math.log(3), -math.log(3)]))
        image = decoder(torch.randn(1, 16), torch.randn(1, 6))
        torch.testing.assert_close(image, torch.tensor([0.5, 0.75, 0.25]).expand(1, 16, 32, 3))

    def test_float32_under_autocast(self):
        """bfloat16 has 1/256 of resolution below 1, as coarse as the uint8 target itself."""
        with torch.autocast("cpu", torch.bfloat16):
            image = make_decoder()(torch.randn(1, 16), torch.randn(1, 6))
        assert image.dtype == torch.float32
        assert not torch.equal(image, image.bfloat16().float())

    def test_belief_blocks_reach_their_own_channels(self):
        """Block g of the belief writes channels g C/8 ... of the innermost map at every place, and no others."""
        decoder, maps = make_decoder(), []
        with torch.no_grad():
            decoder.from_state[-1].weight.zero_()
        decoder.norm.register_forward_pre_hook(lambda module, args: maps.append(args[0]))
        belief, state = torch.randn(1, 16), torch.zeros(1, 6)
        for block in range(8):
            changed = belief.clone()
            changed[:, 2 * block : 2 * block + 2] += 1
            decoder(belief, state)
            decoder(changed, state)
            moved = (maps[-1] != maps[-2]).flatten(0, 2).any(0)  # [C]
            assert moved.nonzero().flatten().tolist() == [block]  # 8 channels in 8 blocks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_shape": (24, 32, 3)}, "must be multiples of 16"),
        ({"image_shape": (32, 24, 3)}, "must be multiples of 16"),
        ({"downsample": "stride"}, "choose one of"),
    ],
)
def test_images_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        ImageEncoder(**{"image_shape": (16, 16, 3), "depth": 2} | options)
    with pytest.raises(ValueError, match=message):
        make_decoder(**options)
