"""The losses of World Models: the autoencoder's, and the mixture density network's on encoded sequences."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.nn import functional as F

from objectives.terms import ModuleLoss, Terms, loss_keys, weigh

MIN_PIXEL_LOG_STD = -6.0


def unit_gaussian_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) of [..., Z], summed over Z. Shape [...], nats."""
    return -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(-1)


def normal_log_prob(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log density of a normal distribution, element by element."""
    return -0.5 * ((x - mean) * torch.exp(-log_std)).square() - log_std - 0.5 * math.log(2 * math.pi)


def mixture_log_prob(logits: Tensor, log_prob: Tensor) -> Tensor:
    """Log density of a mixture of K components.

        log sum_k softmax(logits)_k exp(log_prob_k)

    Args:
        logits: Weights, need not be normalised, [..., K].
        log_prob: Log density under each component, [..., K]: of one dimension for a mixture per dimension, summed over
            dimensions for one mixture over all of them. These are different models.

    Returns:
        [...] nats.
    """
    return torch.logsumexp(torch.log_softmax(logits, -1) + log_prob, -1)


def calibrated_nll(squared_error: Tensor, size: int) -> Tensor:
    """Negative log likelihood of images under one normal noise, of the variance that suits the batch best.

        s^2 = mean squared error of the batch        nll = sse / (2 s^2) + size * (log s + log(2 pi) / 2)

    No gradient reaches s, at its optimum there is none.

    Args:
        squared_error: Summed over each image, [...].
        size: Values per image.

    Source: Rybkin et al. 2021 (sigma-VAE), equation 5.
    Differs: log s is floored at -6.
    """
    log_std = (0.5 * torch.log(squared_error.detach().mean() / size)).clamp(min=MIN_PIXEL_LOG_STD)
    return 0.5 * squared_error * torch.exp(-2 * log_std) + size * (log_std + 0.5 * math.log(2 * math.pi))


def terminated_bce(logits: Tensor, terminated: Tensor, weight: float) -> Tensor:
    """Binary cross entropy in which the rare true labels count ``weight`` times. All [...]."""
    bce = F.binary_cross_entropy_with_logits(logits, terminated, reduction="none")
    return (1 + (weight - 1) * terminated) * bce


class VAELoss(ModuleLoss):
    """Reconstruction and KL losses of a variational autoencoder of images.

        reco = sum (decode(z) - x)^2        kl = max(free_nats, KL(q(z | x) || N(0, 1)))        z ~ q

    Both are sums over one image, x = pixels / 255; the floor applies to each image.

    Args:
        vae: Has ``encode`` and ``decode`` (:class:`dreamer.models.vae.VAE`).
        free_nats: Floor of the KL of each image, nats. The paper's is 0.5 per latent.
        beta: Weight of the KL term.
        anneal_updates: Updates over which that weight rises from 0; it is part of the saved state.
        calibrated: Use :func:`calibrated_nll` in place of the squared error.

    Reads: pixels [..., 64, 64, 3] uint8.
    Writes: loss_vae_reco, loss_vae_kl [], diagnostics under ``wm`` [].
    Source: hardmaru/WorldModelsExperiments@fd982b9 carracing/vae/vae.py.
    Differs: ``beta``, its annealing and ``calibrated`` are added; at their defaults they change nothing.
    """

    @dataclass
    class _AcceptedKeys:
        pixels: NestedKey = "pixels"

    tensor_keys: _AcceptedKeys
    vae: Any
    updates: Tensor

    def __init__(
        self,
        vae: nn.Module,
        *,
        free_nats: float = 16.0,
        beta: float = 1.0,
        anneal_updates: int = 0,
        calibrated: bool = False,
    ):
        super().__init__()
        self.vae = vae
        self.free_nats, self.beta, self.anneal_updates, self.calibrated = free_nats, beta, anneal_updates, calibrated
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @property
    def in_keys(self) -> list[NestedKey]:
        return [self.tensor_keys.pixels]

    @property
    def out_keys(self) -> list[NestedKey]:
        return ["loss_vae_reco", "loss_vae_kl", "wm"]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        terms, diagnostics = self.terms(tensordict[self.tensor_keys.pixels])
        weight = self.kl_weight()
        losses = {"loss_vae_reco": terms["vae_reco"].mean(), "loss_vae_kl": weight * terms["vae_kl"].mean()}
        return TensorDict(losses | {"wm": diagnostics | {"vae_kl_weight": weight}})

    def terms(self, pixels: Tensor, noise: Tensor | None = None) -> tuple[Terms, Terms]:
        """Un-reduced terms [...] of images, and scalars to log; standard normal ``noise`` [..., Z] can be given."""
        posterior = self.vae.encode(pixels)
        reco = self.vae.decode(posterior.sample(noise))  # [..., h, w, C]
        squared_error = (reco - pixels.float() / 255).square().flatten(-3).sum(-1)
        kl = unit_gaussian_kl(posterior.mean, posterior.logvar)
        size = math.prod(reco.shape[-3:])
        image = calibrated_nll(squared_error, size) if self.calibrated else squared_error
        diagnostics = {
            "vae_squared_error": squared_error.detach().mean(),
            "vae_kl_value": kl.detach().mean(),
            "vae_active_latents": (posterior.mean.detach().flatten(0, -2).var(0, correction=0) > 0.01).float().sum(),
        }
        return {"vae_reco": image, "vae_kl": kl.clamp(min=self.free_nats)}, diagnostics

    def kl_weight(self) -> Tensor:
        """The weight of the KL term at this update, []."""
        if not self.anneal_updates:
            return torch.full_like(self.updates, self.beta, dtype=torch.float32)
        return self.beta * (self.updates / self.anneal_updates).clamp(max=1.0)

    def update_targets(self) -> None:
        """Count an update; to be called after each optimiser step."""
        self.updates += 1


class MDNRNNLoss(ModuleLoss):
    """Likelihood of the next latent, error of its reward and cross entropy of its end, on encoded sequences.

        latent     = mean over Z of -log p(z_{t+1} | z_{<=t}, a_{<=t}),   z ~ N(mean, exp(logvar)) drawn anew each time
        reward     = ((r_{t+1} - reward_t) / scale)^2,   scale: the unit in which the model predicts rewards
        terminated = w * bce(terminated_{t+1}),   w = terminated_weight where it is true, else 1

    A record holds the action that led to it, so step t reads the action of record t + 1. Pairs of records that span the
    start of an episode, or of which one is not ``valid``, count for nothing.

    Args:
        model: :class:`dreamer.models.mdn_rnn.MDNRNN`.
        weights: Weight of each term. Default: :attr:`WEIGHTS`.
        terminated_weight: Weight of the steps that end the task.

    Reads: posterior_mean, posterior_logvar [B, T, Z], action [B, T, A] (that led here), reward, is_init, terminated
        [B, T, 1]; valid [B, T, 1] if it is there: false where a sequence is padded.
    Writes: loss_mdn_latent, loss_mdn_reward, loss_mdn_terminated [], diagnostics under ``wm`` [].
    Source: hardmaru/WorldModelsExperiments@fd982b9 carracing/rnn/rnn.py and doomrnn/doomrnn.py.
    Differs: adds the reward, the end of the task for car racing, several episodes in a sequence, and padding.
    """

    WEIGHTS: Mapping[str, float] = {"mdn_latent": 1.0, "mdn_reward": 1.0, "mdn_terminated": 1.0}

    @dataclass
    class _AcceptedKeys:
        mean: NestedKey = "posterior_mean"
        logvar: NestedKey = "posterior_logvar"
        action: NestedKey = "action"
        reward: NestedKey = "reward"
        is_init: NestedKey = "is_init"
        terminated: NestedKey = "terminated"
        valid: NestedKey = "valid"

    tensor_keys: _AcceptedKeys
    model: Any

    def __init__(
        self, model: nn.Module, *, weights: Mapping[str, float] | None = None, terminated_weight: float = 10.0
    ):
        super().__init__()
        self.model = model
        self.weights = dict(weights or self.WEIGHTS)
        self.terminated_weight = terminated_weight

    @property
    def in_keys(self) -> list[NestedKey]:
        keys = self.tensor_keys
        return [keys.mean, keys.logvar, keys.action, keys.reward, keys.is_init, keys.terminated]

    @property
    def out_keys(self) -> list[NestedKey]:
        return [*loss_keys(self.weights), "wm"]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        terms, diagnostics = self.terms(tensordict)
        return TensorDict(weigh(terms, self.weights) | {"wm": diagnostics})

    def terms(self, batch: TensorDictBase, noise: Tensor | None = None) -> tuple[Terms, Terms]:
        """Terms [B, T - 1] whose mean is that over the pairs that count, and scalars to log.

        Standard normal ``noise`` [B, T, Z] can be given.
        """
        keys = self.tensor_keys
        mean, is_init = batch[keys.mean].float(), batch[keys.is_init]
        std = torch.exp(batch[keys.logvar].float() / 2)
        noise = torch.randn_like(mean) if noise is None else noise
        latent = mean + std * noise  # [B, T, Z]
        prediction, _ = self.model(latent[:, :-1], batch[keys.action][:, 1:], is_init[:, :-1])
        counts = self.counting_pairs(batch).float()  # [B, T - 1]
        share = counts.mean()
        weight = counts / share.clamp(min=1e-8)

        terminated = batch[keys.terminated][:, 1:].squeeze(-1).float()
        error = (prediction.reward - batch[keys.reward][:, 1:].squeeze(-1)) / self.model.reward_scale
        terms = {
            "mdn_latent": self.latent_nll(prediction.mixture, latent[:, 1:]).mean(-1) * weight,
            "mdn_reward": error.square() * weight,
            "mdn_terminated": terminated_bce(prediction.terminated_logits, terminated, self.terminated_weight) * weight,
        }
        diagnostics = {f"{name}_loss": term.detach().mean() for name, term in terms.items()}
        return terms, diagnostics | {"mdn_counting_share": share}

    def latent_nll(self, mixture: Any, target: Tensor) -> Tensor:
        """Negative log likelihood of ``target`` [B, T, Z], with a mixture of its own for each latent. [B, T, Z]."""
        log_prob = normal_log_prob(target.unsqueeze(-1), mixture.mean, mixture.log_std)  # [B, T, Z, K]
        return -mixture_log_prob(mixture.logits, log_prob)

    def counting_pairs(self, batch: TensorDictBase) -> Tensor:
        """Whether record t + 1 follows record t in one episode and both are valid, bool [B, T - 1]."""
        counts = ~batch[self.tensor_keys.is_init][:, 1:].squeeze(-1)
        valid = batch.get(self.tensor_keys.valid, None)
        if valid is None:
            return counts
        valid = valid.squeeze(-1)
        return counts & valid[:, 1:] & valid[:, :-1]
