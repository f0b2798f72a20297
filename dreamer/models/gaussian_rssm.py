"""The recurrent state-space model of Dreamer V1: GRU, Gaussian latents, `observe` and `imagine`.

A model state is the pair (belief, state): the deterministic ``belief`` ``[N, D]`` and the stochastic ``state``
``[N, Z]``, a vector of Z independent normals. Everything is differentiable, samples and imagination included.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamer.models.layers import Linear, LoopLinear, compute_dtype
from dreamer.models.layers_v1 import glorot
from dreamer.models.rssm import Imagination


class Rollout(NamedTuple):
    """A sequence of model states and the distributions that the stochastic parts come from."""

    belief: Tensor  # [B, T, D]
    state: Tensor  # [B, T, Z]
    posterior_mean: Tensor  # [B, T, Z]
    posterior_std: Tensor  # [B, T, Z]
    prior_mean: Tensor  # [B, T, Z]
    prior_std: Tensor  # [B, T, Z]

    @property
    def feature(self) -> Tensor:
        """The input of every head, belief first. Shape [B, T, D + Z]."""
        return torch.cat([self.belief, self.state], -1)


class GaussianRSSM(nn.Module):
    """Recurrent state-space model with a GRU and diagonal Gaussian latents.

        h_t = gru(elu(W [z_{t-1}, a_{t-1}]), h_{t-1})
        prior      p(z_t | h_t)        posterior  q(z_t | h_t, embed_t)        std = softplus(s) + min_std

    Args:
        embed_size: Width E of the encoder output.
        action_size: Width A of the action vector (one-hot for discrete actions).
        belief_size: Width D of the recurrent state.
        state_size: Number Z of Gaussian latents.
        hidden_size: Width H of the hidden layers.
        min_std: What is added to every standard deviation.

    Source: Hafner et al. 2020; danijar/dreamer@56d4d44 models.py, ``RSSM``.
    Differs: the noise of each row is its own, where the reference broadcasts one vector over the batch; belief comes
        first in the feature; the products that do not depend on the recurrence are computed for all steps at once.
    """

    def __init__(
        self,
        *,
        embed_size: int,
        action_size: int,
        belief_size: int = 200,
        state_size: int = 30,
        hidden_size: int = 200,
        min_std: float = 0.1,
    ):
        super().__init__()
        self.belief_size, self.state_size, self.min_std = belief_size, state_size, min_std
        self.hidden = glorot(Linear(state_size + action_size, hidden_size))
        self.gates_from_hidden = glorot(Linear(hidden_size, 3 * belief_size))
        self.gates_from_belief = glorot(Linear(belief_size, 3 * belief_size))
        nn.init.orthogonal_(self.gates_from_belief.weight)
        self.prior_head = nn.Sequential(
            glorot(Linear(belief_size, hidden_size)), nn.ELU(), glorot(Linear(hidden_size, 2 * state_size))
        )
        self.posterior_in = glorot(Linear(belief_size + embed_size, hidden_size))
        self.posterior_out = glorot(Linear(hidden_size, 2 * state_size))

    def initial(self, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the zero model state: belief [B, D] and state [B, Z]."""
        zeros = torch.zeros(batch_size, self.belief_size + self.state_size, device=device)
        belief, state = zeros.split([self.belief_size, self.state_size], -1)
        return belief, state

    def pack(self, belief: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """What environments carry of a model state: both in float32."""
        return belief.float(), state.float()

    def unpack(self, belief: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Invert :meth:`pack`."""
        return belief, state

    def observe(
        self,
        embed: Tensor,
        action: Tensor,
        is_init: Tensor,
        belief: Tensor,
        state: Tensor,
        noise: Tensor | None = None,
    ) -> Rollout:
        """Filter a sequence of observations into posterior model states.

        Where ``is_init`` is set, belief, state and action are zeroed before the step, so nothing passes it.

        Args:
            embed: Encoded observations [B, T, E].
            action: The action that led to each observation, [B, T, A].
            is_init: First step of an episode, bool [B, T, 1].
            belief, state: Model state before the first step, [B, D] and [B, Z].
            noise: Standard normal [B, T, Z]; drawn here by default.
        """
        batch, steps = embed.shape[:2]
        dtype = compute_dtype(embed.device)
        if noise is None:
            noise = torch.randn(batch, steps, self.state_size, device=embed.device)
        w_belief, w_embed = self.posterior_in.weight.split([self.belief_size, embed.shape[-1]], 1)
        from_embed = F.linear(embed, w_embed, self.posterior_in.bias)  # [B, T, H]
        from_action = self.action_branch(action.to(dtype).masked_fill(is_init, 0))  # [B, T, H]
        belief, state = belief.to(dtype), state.to(dtype)
        core = self.core(steps, batch)
        posterior_in = LoopLinear(w_belief.T, from_embed.transpose(0, 1))
        posterior_out = self.posterior_out.in_loop(steps, batch)
        beliefs, states, means, stds = [], [], [], []
        for a, first, n in zip(from_action.unbind(1), is_init.unbind(1), noise.unbind(1), strict=True):
            belief = core(belief.masked_fill(first, 0), state.masked_fill(first, 0), a)  # [B, D]
            mean, std = self.mean_std(posterior_out(F.elu(posterior_in(belief))))  # [B, Z] each
            state = (mean + std * n).to(dtype)  # [B, Z]
            for sequence, value in ((beliefs, belief), (states, state), (means, mean), (stds, std)):
                sequence.append(value)
        belief, state, mean, std = (torch.stack(sequence, 1) for sequence in (beliefs, states, means, stds))
        return Rollout(belief, state, mean, std, *self.prior(belief))

    def imagine(
        self,
        policy: Callable[[Tensor, int], Tensor],
        belief: Tensor,
        state: Tensor,
        horizon: int,
        noise: Tensor | None = None,
    ) -> Imagination:
        """Roll the prior forward under ``policy``; gradients flow through states and actions.

        Args:
            policy: Maps a feature [N, D + Z] and the step index to an action [N, A].
            belief, state: Where to start, [N, D] and [N, Z].
            horizon: Number H of imagined steps.
            noise: Standard normal [N, H, Z]; drawn here by default.
        """
        if noise is None:
            noise = torch.randn(len(belief), horizon, self.state_size, device=belief.device)
        dtype = compute_dtype(belief.device)
        belief, state = belief.to(dtype), state.to(dtype)
        core = self.core(horizon, len(belief))
        features, actions = [torch.cat([belief, state], -1)], []
        for t, n in enumerate(noise.unbind(1)):
            actions.append(policy(features[-1], t))  # [N, A]
            belief = core(belief, state, self.action_branch(actions[-1].to(dtype)))  # [N, D]
            mean, std = self.prior(belief)  # [N, Z] each
            state = (mean + std * n).to(dtype)
            features.append(torch.cat([belief, state], -1))  # [N, D + Z]
        return Imagination(torch.stack(features, 1), torch.stack(actions, 1))

    def action_branch(self, action: Tensor) -> Tensor:
        """What the action [..., A] and the bias add to the hidden layer, [..., H]."""
        return F.linear(action, self.hidden.weight[:, self.state_size :], self.hidden.bias)

    def core(self, steps: int, rows: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Bind the recurrent step to a loop of ``steps`` over ``rows`` model states.

        Returns:
            The step: belief [N, D], state [N, Z], what :meth:`action_branch` gives [N, H] -> next belief [N, D].
        """
        w_state = self.hidden.weight[:, : self.state_size]
        from_state = LoopLinear(w_state.T, w_state.new_zeros(()).expand(steps, rows, len(w_state)))
        from_hidden, from_belief = (
            gates.in_loop(steps, rows) for gates in (self.gates_from_hidden, self.gates_from_belief)
        )
        sizes = [2 * self.belief_size, self.belief_size]

        def step(belief: Tensor, state: Tensor, from_action: Tensor) -> Tensor:
            gates, candidate = from_hidden(F.elu(from_state(state) + from_action)).split(sizes, -1)
            more_gates, from_past = from_belief(belief).split(sizes, -1)
            update, reset = torch.sigmoid(gates + more_gates).chunk(2, -1)  # [N, D] each
            candidate = torch.tanh(candidate + reset * from_past)  # reset acts after the product
            return torch.lerp(candidate, belief, update)  # update = 1 keeps the past

        return step

    def prior(self, belief: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the prior, each [..., Z] float32, from belief [..., D]."""
        return self.mean_std(self.prior_head(belief))

    def mean_std(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [..., Z] from raw head outputs [..., 2Z]."""
        mean, std = raw.float().chunk(2, -1)
        return mean, F.softplus(std) + self.min_std
