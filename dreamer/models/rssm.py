"""The recurrent state-space model of DreamerV3: block GRU, categorical latents, `observe` and `imagine`.

A model state is the pair (belief, state): the deterministic ``belief`` ``[N, D]`` and the stochastic ``state``
``[N, Z]``, Z = S * K, which is S one-hot vectors over K classes laid end to end. Logits that leave this module are log
probabilities **with the uniform mixture already in them**, so that sampling, KL and entropy cannot disagree about it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamer.models.layers import MLP, BlockLinear, Linear, LoopLinear, NormAct, compute_dtype, from_blocks, to_blocks


class Rollout(NamedTuple):
    """A sequence of model states. ``prior_logits`` and ``posterior_logits`` are log probabilities."""

    belief: Tensor  # [B, T, D]
    state: Tensor  # [B, T, Z]
    posterior_logits: Tensor  # [B, T, S, K]
    prior_logits: Tensor  # [B, T, S, K]

    @property
    def feature(self) -> Tensor:
        """The input of every head, belief first. Shape [B, T, D + Z]."""
        return torch.cat([self.belief, self.state], -1)


class Imagination(NamedTuple):
    """Imagined model states and the actions taken in them; index 0 is the start."""

    feature: Tensor  # [N, H + 1, D + Z]
    action: Tensor  # [N, H, A]


def draw_noise(*shape: int, device: torch.device) -> Tensor:
    """Return noise for :func:`sample_onehot`: inverse standard exponentials, the race form of Gumbel noise."""
    return torch.empty(shape, device=device).exponential_().clamp_(min=1e-30).reciprocal_()


def mix_uniform(logits: Tensor, unimix: float) -> Tensor:
    """p = (1 - unimix) * softmax(logits) + unimix / K over the last axis, in float32."""
    return torch.softmax(logits.float(), -1) * (1 - unimix) + unimix / logits.shape[-1]


def sample_onehot(probs: Tensor, noise: Tensor) -> Tensor:
    """Sample one-hot vectors whose gradient is that of ``probs`` (straight-through).

    argmax(p * noise) with noise from :func:`draw_noise` is a draw from p; one-hot noise picks that class.

    Args:
        probs, noise: [..., S, K].

    Returns:
        [..., Z] flattened one-hots.
    """
    index = (probs.detach() * noise).argmax(-1, keepdim=True)
    onehot = torch.zeros_like(probs).scatter_(-1, index, 1.0)
    return (onehot + (probs - probs.detach())).flatten(-2)


class RSSM(nn.Module):
    """Recurrent state-space model with a block-diagonal GRU and categorical latents.

        h_t = gru(h_{t-1}, z_{t-1}, a_{t-1} / max(1, |a_{t-1}|))
        prior      p(z_t | h_t)        posterior  q(z_t | h_t, embed_t)

    Args:
        embed_size: Width E of the encoder output.
        action_size: Width A of the action vector (one-hot for discrete actions).
        belief_size: Width D of the recurrent state; a multiple of ``blocks``.
        hidden_size: Width H of the hidden layers.
        categoricals, classes: S latent variables with K classes each.
        blocks: Blocks of the recurrent weight.
        prior_layers, posterior_layers: Hidden layers before the logits.
        unimix: Share of the uniform distribution in every latent distribution, above 0 and below 1.

    Raises:
        ValueError: if ``unimix`` is 0 or 1, or ``blocks`` does not divide ``belief_size``.
    Source: Hafner et al. 2025; danijar/dreamerv3@e3f0224 dreamerv3/rssm.py, ``RSSM``.
    Differs: the products that do not depend on the recurrence are computed for all steps at once. Same algebra.
    """

    def __init__(
        self,
        *,
        embed_size: int,
        action_size: int,
        belief_size: int,
        hidden_size: int,
        classes: int,
        categoricals: int = 32,
        blocks: int = 8,
        prior_layers: int = 2,
        posterior_layers: int = 1,
        unimix: float = 0.01,
    ):
        super().__init__()
        if not 0 < unimix < 1:
            raise ValueError(
                f"unimix={unimix}: give a share above 0 and below 1; at 0 log probabilities become infinite"
            )
        self.belief_size, self.categoricals, self.classes = belief_size, categoricals, classes
        self.state_size = categoricals * classes
        self.blocks, self.unimix = blocks, unimix
        self.from_belief = nn.Sequential(Linear(belief_size, hidden_size), NormAct(hidden_size))
        self.from_state = nn.Sequential(Linear(self.state_size, hidden_size), NormAct(hidden_size))
        self.from_action = nn.Sequential(Linear(action_size, hidden_size), NormAct(hidden_size))
        self.hidden = BlockLinear(belief_size + blocks * 3 * hidden_size, belief_size, blocks)
        self.hidden_norm = NormAct(belief_size)
        self.gates = BlockLinear(belief_size, 3 * belief_size, blocks)
        self.prior_head = nn.Sequential(
            MLP(belief_size, hidden_size, prior_layers), Linear(hidden_size, self.state_size)
        )
        self.posterior_in = Linear(belief_size + embed_size, hidden_size)
        self.posterior_head = nn.Sequential(
            NormAct(hidden_size),
            MLP(hidden_size, hidden_size, posterior_layers - 1),
            Linear(hidden_size, self.state_size),
        )

    def initial(self, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the zero model state: belief [B, D] and state [B, Z]."""
        zeros = torch.zeros(batch_size, self.belief_size + self.state_size, device=device)
        belief, state = zeros.split([self.belief_size, self.state_size], -1)
        return belief, state

    def to_classes(self, state: Tensor) -> Tensor:
        """Return the class ids [..., S] uint8 (int16 above 256 classes) of the one-hots in state [..., Z]."""
        ids = state.unflatten(-1, (self.categoricals, self.classes)).argmax(-1)
        return ids.to(torch.uint8 if self.classes <= 256 else torch.int16)

    def from_classes(self, ids: Tensor) -> Tensor:
        """Invert :meth:`to_classes`: class ids [..., S] to one-hots [..., Z] float32."""
        return F.one_hot(ids.long(), self.classes).flatten(-2).float()

    def pack(self, belief: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """What environments carry and the replay keeps of a model state: belief bfloat16 and class ids."""
        return belief.bfloat16(), self.to_classes(state)

    def unpack(self, belief: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Invert :meth:`pack`, but for what bfloat16 cannot hold."""
        return belief.float(), self.from_classes(ids)

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
            noise: What :func:`sample_onehot` takes, [B, T, S, K]; drawn here by default.
        """
        batch, steps = embed.shape[:2]
        dtype = compute_dtype(embed.device)
        if noise is None:
            noise = draw_noise(batch, steps, self.categoricals, self.classes, device=embed.device)
        w_belief, w_embed = self.posterior_in.weight.split([self.belief_size, embed.shape[-1]], 1)
        from_embed = F.linear(embed, w_embed, self.posterior_in.bias)  # [B, T, H]
        from_action = self.action_branch(action.to(dtype).masked_fill(is_init, 0))  # [B, T, H]
        belief, state = belief.to(dtype), state.to(dtype)
        core = self.core(steps, batch)
        posterior_in = LoopLinear(w_belief.T, from_embed.transpose(0, 1))
        posterior_out = self.posterior_head[-1].in_loop(steps, batch)
        beliefs, states, probs = [], [], []
        for a, first, n in zip(from_action.unbind(1), is_init.unbind(1), noise.unbind(1), strict=True):
            belief = core(belief.masked_fill(first, 0), state.masked_fill(first, 0), a)  # [B, D]
            p = self.probs(posterior_out(self.posterior_head[:-1](posterior_in(belief))))  # [B, S, K]
            state = sample_onehot(p, n).to(dtype)  # [B, Z]
            beliefs.append(belief)
            states.append(state)
            probs.append(p)
        belief = torch.stack(beliefs, 1)  # [B, T, D]
        return Rollout(belief, torch.stack(states, 1), torch.stack(probs, 1).log(), self.prior_logits(belief))

    @torch.no_grad()
    def imagine(
        self,
        policy: Callable[[Tensor, int], Tensor],
        belief: Tensor,
        state: Tensor,
        horizon: int,
        noise: Tensor | None = None,
    ) -> Imagination:
        """Roll the prior forward under ``policy``, without gradients.

        Args:
            policy: Maps a feature [N, D + Z] and the step index to an action [N, A].
            belief, state: Where to start, [N, D] and [N, Z].
            horizon: Number H of imagined steps.
            noise: What :func:`sample_onehot` takes, [N, H, S, K]; drawn here by default.
        """
        if noise is None:
            noise = draw_noise(len(belief), horizon, self.categoricals, self.classes, device=belief.device)
        dtype = compute_dtype(belief.device)
        belief, state = belief.to(dtype), state.to(dtype)
        core = self.core(horizon, len(belief))
        features, actions = [torch.cat([belief, state], -1)], []
        for t, n in enumerate(noise.unbind(1)):
            actions.append(policy(features[-1], t))  # [N, A]
            belief = core(belief, state, self.action_branch(actions[-1].to(dtype)))  # [N, D]
            state = sample_onehot(self.probs(self.prior_head(belief)), n).to(dtype)
            features.append(torch.cat([belief, state], -1))  # [N, D + Z]
        return Imagination(torch.stack(features, 1), torch.stack(actions, 1))

    def action_branch(self, action: Tensor) -> Tensor:
        """Embed an action [..., A], scaled down to at most 1 in size, as [..., H]."""
        return self.from_action(action / action.detach().abs().clamp(min=1))

    def core(self, steps: int, rows: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Bind the block GRU to a loop of ``steps`` over ``rows`` model states.

        Returns:
            The step: belief [N, D], state [N, Z], embedded action [N, H] -> next belief [N, D].
        """
        own_size = self.belief_size // self.blocks
        own_weight, shared_weight = self.hidden.weight.split([own_size, self.hidden.weight.shape[1] - own_size], 1)
        own = LoopLinear(own_weight, self.hidden.block_bias.expand(steps, -1, rows, -1))
        shared = LoopLinear(shared_weight, shared_weight.new_zeros(()).expand(steps, self.blocks, rows, own_size))
        from_belief, from_state = (net[0].in_loop(steps, rows) for net in (self.from_belief, self.from_state))
        gates = self.gates.in_loop(steps, rows)

        def step(belief: Tensor, state: Tensor, from_action: Tensor) -> Tensor:
            inputs = [self.from_belief[1](from_belief(belief)), self.from_state[1](from_state(state)), from_action]
            inputs = torch.cat(inputs, -1).expand(self.blocks, -1, -1)  # [g, N, 3H], every block sees all of it
            belief = to_blocks(belief, self.blocks)  # [g, N, D/g]
            hidden = self.hidden_norm(from_blocks(own(belief) + shared(inputs)))  # [N, D]
            reset, candidate, update = gates(to_blocks(hidden, self.blocks)).chunk(3, -1)  # [g, N, D/g] each
            candidate = torch.tanh(torch.sigmoid(reset) * candidate)
            return from_blocks(torch.lerp(belief, candidate, torch.sigmoid(update - 1)))  # [N, D]

        return step

    def prior_logits(self, belief: Tensor) -> Tensor:
        """Log probabilities of the prior, [..., S, K], from belief [..., D]."""
        return self.probs(self.prior_head(belief)).log()

    def posterior_logits(self, belief: Tensor, embed: Tensor) -> Tensor:
        """Log probabilities of the posterior, [..., S, K], from belief [..., D] and embed [..., E]."""
        return self.probs(self.posterior_head(self.posterior_in(torch.cat([belief, embed], -1)))).log()

    def probs(self, logits: Tensor) -> Tensor:
        """Latent probabilities [..., S, K], uniform mixture included, from raw head outputs [..., Z]."""
        return mix_uniform(logits.unflatten(-1, (self.categoricals, self.classes)), self.unimix)
