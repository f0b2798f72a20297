"""The closed-form pieces of the losses: pure functions of tensors, reductions left to the caller."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchrl.modules import PercentileValueNorm
from torchrl.modules.functional import symexp

NUM_BINS = 255


def symexp_bins(num_bins: int = NUM_BINS, device: torch.device | None = None) -> Tensor:
    """Return the exactly antisymmetric support symexp(linspace(-20, 20, num_bins)), shape [num_bins].

    Half of the grid is computed and mirrored, because ``linspace`` itself misses 0 by 7e-8 in the middle.

    Source: danijar/dreamerv3@e3f0224 embodied/jax/heads.py, ``symexp_twohot``.
    Differs: nothing.
    """
    half = symexp(torch.linspace(-20, 0, (num_bins + 1) // 2, device=device))
    return torch.cat([half, -half.flip(0)[num_bins % 2 :]])


def twohot_mean(logits: Tensor, bins: Tensor) -> Tensor:
    """Mean of the distribution over ``bins``, summed in mirrored pairs so that uniform logits give exactly 0.

    Args:
        logits: [..., K].
        bins: Antisymmetric support [K].

    Returns:
        [...] float32.
    """
    probs = torch.softmax(logits.float(), -1)
    half = len(bins) // 2
    upper = probs[..., -half:] - probs[..., :half].flip(-1)  # the middle bin, if there is one, is 0
    return (upper * bins[-half:]).sum(-1)


def twohot_nll(logits: Tensor, target: Tensor, bins: Tensor) -> Tensor:
    """Cross entropy of the two-hot encoding of ``target`` in raw value space.

        -w_lo * log p(lo) - w_up * log p(up),  w linear between the two bins around the target

    Targets outside the support saturate at its ends. No gradient reaches ``target``.

    Args:
        logits: [..., K].
        target: [...].
        bins: Ascending support [K].

    Returns:
        [...] float32, nats.

    Source: danijar/dreamerv3@e3f0224 embodied/jax/outs.py, ``TwoHot``.
    Differs: gathers two logits instead of building a K-wide target.
    """
    logits = logits.float()
    target = target.detach().float().clamp(bins[0], bins[-1])
    upper = torch.bucketize(target, bins, right=True).clamp(max=len(bins) - 1)  # first bin above the target
    lower = (upper - 1).clamp(min=0)
    low, high = bins[lower], bins[upper]
    w_upper = torch.where(high > low, (target - low) / (high - low), 0.0)
    picked = logits.gather(-1, torch.stack([lower, upper], -1))  # [..., 2]
    return logits.logsumexp(-1) - torch.lerp(picked[..., 0], picked[..., 1], w_upper)


def categorical_entropy(logits: Tensor) -> Tensor:
    """Entropy of S categoricals, summed over them. ``logits`` are log probabilities [..., S, K]. Shape [...]."""
    return -(logits.exp() * logits).sum((-2, -1))


def categorical_kl(logits: Tensor, other_logits: Tensor) -> Tensor:
    """KL(p || q) of S categoricals, summed over them. Both are log probabilities [..., S, K]. Shape [...], nats."""
    return (logits.exp() * (logits - other_logits)).sum((-2, -1))


def kl_terms(posterior_logits: Tensor, prior_logits: Tensor, free_nats: float = 1.0) -> tuple[Tensor, Tensor]:
    """The two KL terms of the RSSM with free nats.

        dynamic        = max(free_nats, KL(sg(posterior) || prior))      trains the prior
        representation = max(free_nats, KL(posterior || sg(prior)))      trains the posterior

    The KL is summed over the S latents first; the floor applies to that sum at each (b, t).

    Args:
        posterior_logits, prior_logits: Log probabilities [..., S, K], uniform mixture included.
        free_nats: Floor, nats.

    Returns:
        dynamic and representation, each [...] nats.

    Source: danijar/dreamerv3@e3f0224 dreamerv3/rssm.py, ``RSSM.loss``.
    Differs: nothing.
    """

    dynamic = categorical_kl(posterior_logits.detach(), prior_logits)
    representation = categorical_kl(posterior_logits, prior_logits.detach())
    return dynamic.clamp(min=free_nats), representation.clamp(min=free_nats)


def lambda_return(
    reward: Tensor, continuation: Tensor, bootstrap: Tensor, lmbda: float = 0.95, last: Tensor | None = None
) -> Tensor:
    """Lambda-return of a trajectory.

        R_t = r_{t+1} + c_{t+1} * ((1 - l_{t+1}) * b_{t+1} + l_{t+1} * R_{t+1}),   R_{T-1} = b_{T-1}

    with l = lmbda, and l = 0 where ``last`` ends the trajectory. Index 0 of every input belongs to the start and is
    not used.

    Args:
        reward: Reward on arriving, [N, T].
        continuation: Discount times the probability of going on, [N, T], 0 to 1.
        bootstrap: Value of each step, [N, T].
        lmbda: Weight of the longer return, 0 to 1.
        last: Whether the trajectory ends at this step, bool [N, T].

    Returns:
        [N, T - 1].

    Source: danijar/dreamerv3@e3f0224 dreamerv3/agent.py, ``lambda_return``.
    Differs: nothing.
    """
    weight = lmbda if last is None else lmbda * (~last).to(reward.dtype)
    direct = reward + continuation * (1 - weight) * bootstrap  # what does not depend on the next return
    factor = continuation * weight
    returns = [bootstrap[:, -1]]
    for t in range(reward.shape[1] - 1, 0, -1):
        returns.append(torch.addcmul(direct[:, t], factor[:, t], returns[-1]))
    return torch.stack(returns[:0:-1], 1)


class ActorCriticTerms(NamedTuple):
    """Un-reduced losses of imagined trajectories and what they were made of."""

    actor: Tensor  # [N, H]
    value: Tensor  # [N, H]
    returns: Tensor  # [N, H]
    advantage: Tensor  # [N, H], normalised
    baseline: Tensor  # [N, H + 1], mean of the critic
    weight: Tensor  # [N, H + 1]


def imagined_weight(continuation: Tensor, discount: float = 1.0) -> Tensor:
    """weight_t = prod_{k <= t} c_k: the chance that the trajectory is still alive at t, start included. [N, T]."""
    return torch.cumprod(continuation * discount, 1) / discount


def actor_critic_terms(
    *,
    log_prob: Tensor,
    entropy: Tensor,
    reward: Tensor,
    continuation: Tensor,
    value_logits: Tensor,
    slow_value: Tensor,
    bins: Tensor,
    return_norm: PercentileValueNorm,
    lmbda: float = 0.95,
    entropy_scale: float = 3e-4,
    slow_regularizer: float = 1.0,
    slow_target: bool = False,
    discount: float = 1.0,
) -> ActorCriticTerms:
    """REINFORCE actor and two-hot critic losses of imagined trajectories.

        A_t     = (R_t - v_t) / max(1, P95 - P5)
        actor_t = -w_t * (log pi(a_t) * sg(A_t) + entropy_scale * H_t)
        value_t =  w_t * (nll(v_t; sg(R_t)) + slow_regularizer * nll(v_t; sg(slow_t)))

    Gradients reach ``log_prob``, ``entropy`` and ``value_logits`` only. ``return_norm`` is updated before it is used.

    Args:
        log_prob, entropy: Of the actions taken, [N, H].
        reward, continuation: Predicted for each of the H + 1 states, [N, H + 1].
        value_logits: Of the critic, [N, H + 1, K].
        slow_value: Mean of the slow critic, [N, H + 1].
        bins: Support of the two-hot distributions, [K].
        return_norm: Moving percentiles of the returns.
        lmbda: Of the lambda-return.
        entropy_scale, slow_regularizer: Weights of the two regularisers.
        slow_target: Bootstrap from, and compare with, the slow critic.
        discount: Factor per step that ``continuation`` does not contain yet.

    Source: danijar/dreamerv3@e3f0224 dreamerv3/agent.py, ``imag_loss``.
    Differs: nothing.
    """
    reward, continuation, slow_value = reward.detach(), continuation.detach(), slow_value.detach()
    value = slow_value if slow_target else twohot_mean(value_logits.detach(), bins)  # [N, H + 1]
    returns = lambda_return(reward, continuation * discount, value, lmbda)  # [N, H]
    return_norm.update(returns.unsqueeze(-1))
    advantage = return_norm.normalize(returns - value[:, :-1])
    weight = imagined_weight(continuation, discount)
    actor = -weight[:, :-1] * (log_prob * advantage + entropy_scale * entropy)
    nll = critic_nll(value_logits[:, :-1], returns, slow_value[:, :-1], bins, slow_regularizer)
    return ActorCriticTerms(actor, weight[:, :-1] * nll, returns, advantage, value, weight)


def replay_critic_terms(
    *,
    reward: Tensor,
    terminated: Tensor,
    last: Tensor,
    bootstrap: Tensor,
    value_logits: Tensor,
    slow_value: Tensor,
    bins: Tensor,
    lmbda: float = 0.95,
    slow_regularizer: float = 1.0,
    discount: float = 1 - 1 / 333,
) -> Tensor:
    """Two-hot critic loss on replayed trajectories, zero on the last step of an episode.

    Args:
        reward: Reward on arriving, [B, T].
        terminated, last: End of the task, end of the episode for any reason, bool [B, T].
        bootstrap: Imagined lambda-return from each state, [B, T].
        value_logits: Of the critic, [B, T, K]; gradients reach these only.
        slow_value: Mean of the slow critic, [B, T].
        bins, lmbda, slow_regularizer: As in :func:`actor_critic_terms`.
        discount: Factor per step.

    Returns:
        [B, T - 1].

    Source: danijar/dreamerv3@e3f0224 dreamerv3/agent.py, ``repl_loss``.
    Differs: nothing.
    """
    continuation = (~terminated).to(reward.dtype) * discount
    target = lambda_return(reward, continuation, bootstrap.detach(), lmbda, last)  # [B, T - 1]
    nll = critic_nll(value_logits[:, :-1], target, slow_value[:, :-1], bins, slow_regularizer)
    return nll * (~last[:, :-1])


def critic_nll(logits: Tensor, target: Tensor, slow_value: Tensor, bins: Tensor, slow_regularizer: float) -> Tensor:
    """Negative log likelihood of the target plus that of the slow critic's mean, [...]."""
    return twohot_nll(logits, target, bins) + slow_regularizer * twohot_nll(logits, slow_value, bins)
