"""Encoders and decoders put together: scale of vectors, and the order in which parts are joined."""

import math

import torch
from torch import nn

from dreamer.agents.parts import make_world_model
from dreamer.models.world_model import VectorDecoder, VectorEncoder


def test_vectors_enter_as_symlog():
    """0, e - 1 and 1 - e^2 become 0, 1 and -2, so that a velocity of 1000 is no outlier."""
    encoder = VectorEncoder(3, units=4)
    encoder.mlp = nn.Identity()
    tokens = encoder(torch.tensor([[0, math.e - 1, 1 - math.e**2]]))
    torch.testing.assert_close(tokens, torch.tensor([[0.0, 1.0, -2.0]]))


def test_decoder_puts_the_state_first():
    decoder, seen = VectorDecoder(4, 2, 3, units=4), []
    decoder.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    decoder(torch.zeros(1, 4), torch.ones(1, 2))
    assert seen[0].tolist() == [[1, 1, 0, 0, 0, 0]]


def test_vectors_come_before_images_each_sorted_by_name():
    shapes = {"wrist": (16, 16, 3), "velocity": (2,), "front": (16, 16, 3), "position": (3,)}
    sizes = {"belief_size": 16, "hidden_size": 4, "classes": 4, "depth": 2, "units": 4}
    torch.manual_seed(0)
    model = make_world_model(observations=shapes, action_size=2, **sizes)
    assert list(model.encoders) == ["position", "velocity", "front", "wrist"]
    observations = {
        key: torch.randint(256, (2, 3, *shape), dtype=torch.uint8) if len(shape) == 3 else torch.randn(2, 3, *shape)
        for key, shape in shapes.items()
    }
    tokens = model.encode(observations)
    assert torch.equal(tokens, torch.cat([model.encoders[key](observations[key]) for key in model.encoders], -1))
    assert tokens.shape[-1] == model.rssm.posterior_in.in_features - 16
    decoded = model.decode(torch.randn(2, 3, 16), torch.randn(2, 3, 32 * 4))
    assert {key: tuple(value.shape) for key, value in decoded.items()} == {
        key: (2, 3, *shape) for key, shape in shapes.items()
    }
