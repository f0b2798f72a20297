"""Encoders, RSSM, decoders and heads put together as one world model."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchrl.modules.functional import symlog

from dreamer.models.heads import Head
from dreamer.models.layers import MLP, Linear
from dreamer.models.rssm import RSSM


class VectorEncoder(nn.Module):
    """Encode observations ``[..., O]`` of any scale as ``[..., units]``: symlog, then an MLP."""

    def __init__(self, in_features: int, *, units: int, layers: int = 3):
        super().__init__()
        self.mlp = MLP(in_features, units, layers)
        self.out_features = units

    def forward(self, observation: Tensor) -> Tensor:
        return self.mlp(symlog(observation))


class VectorDecoder(nn.Module):
    """Decode (belief, state) to the symlog of an observation, ``[..., O]`` float32."""

    def __init__(self, belief_size: int, state_size: int, out_features: int, *, units: int, layers: int = 3):
        super().__init__()
        self.mlp = MLP(state_size + belief_size, units, layers)
        self.out = Linear(units, out_features)

    def forward(self, belief: Tensor, state: Tensor) -> Tensor:
        return self.out(self.mlp(torch.cat([state, belief], -1))).float()  # the reference puts state first here


class WorldModel(nn.Module):
    """What the losses and the acting policy need of a world model.

    Args:
        encoders: One encoder per observation key, each ``[..., *shape] -> [..., E_k]``; joined in this order.
        rssm: The recurrent state-space model.
        decoders: One decoder per reconstructed key, each ``(belief, state) -> [..., *shape]``.
        reward_head: Feature to symexp two-hot logits of the reward on arriving.
        continue_head: Feature to the logit of the discounted probability that the episode goes on.
    """

    def __init__(
        self,
        *,
        encoders: Mapping[str, nn.Module],
        rssm: RSSM,
        decoders: Mapping[str, nn.Module],
        reward_head: Head,
        continue_head: Head,
    ):
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.rssm = rssm
        self.decoders = nn.ModuleDict(decoders)
        self.reward_head = reward_head
        self.continue_head = continue_head

    def encode(self, observations: Mapping[str, Tensor]) -> Tensor:
        """Encode the observation keys of ``observations``, each [..., *shape], as [..., E]."""
        return torch.cat([encoder(observations[key]) for key, encoder in self.encoders.items()], -1)

    def decode(self, belief: Tensor, state: Tensor) -> dict[str, Tensor]:
        """Reconstruct every decoded key from belief [..., D] and state [..., Z]."""
        return {key: decoder(belief, state) for key, decoder in self.decoders.items()}
