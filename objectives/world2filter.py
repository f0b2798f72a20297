"""The world-model loss of World2Filter: foreground and background are rebuilt apart, and only one is learned."""

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from objectives.functional import categorical_kl
from objectives.segmentation_dreamer import SegmentationDreamerModelLoss, masked_error
from objectives.terms import Terms


class World2FilterModelLoss(SegmentationDreamerModelLoss):
    """A world model whose latent learns the foreground, beside a second decoder for the background.

        reco       = sum_p v_p m_p |x_fg_p - x_p|^2            trains the task latent
        mask       = sum_p (m^_p - m_p)^2                      trains the task latent
        background = sum_p v_p (1 - m_p) |x_bg_p - x_p|^2      trains the background's own networks and nothing else

    Nothing of the background is asked of the task latent, and what is rebuilt of it from that latent shows how much of
    it is in there all the same. Where m = 1 everywhere, reco is the reconstruction loss of DreamerV3 (unless
    ``selective`` is "any"). With ``weighted=False`` both sides are compared everywhere, with targets that are black on
    the other side. With hard masks and ``weighted=True``, selective="false_negative" spares the background's networks
    alone: what a label has missed has no weight in the foreground anyway. "any" also drops what a label has too much.

    Args:
        world_model: As in :class:`SegmentationDreamerModelLoss`.
        background: Rebuilds the background: (task rollout, pixels, action, is_init) -> (image [B, T, h, w, 3], its own
            rollout or None). It must not pass gradients into the task rollout
            (:mod:`dreamer.models.background`).
        selective, weighted, weights, free_nats, horizon: As in :class:`SegmentationDreamerModelLoss`.

    Reads: what :class:`SegmentationDreamerModelLoss` reads.
    Writes: what :class:`SegmentationDreamerModelLoss` writes, loss_model_background and loss_model_background_kl []
        (the KL of the background's own latent, 0 if it has none).
    Source: the task list of https://github.com/ChristianLin0420/World2Filter.
    Differs: there one latent pays for both sides with equal weight, through masks that are nowhere below 0.1, so that
        it filters nothing. Here the background's gradient stops before the task latent, masks are used as they are, and
        errors are summed over pixels like DreamerV3's.
    """

    WEIGHTS: Mapping[str, float] = {
        **SegmentationDreamerModelLoss.WEIGHTS,
        "model_background": 1.0,
        "model_background_kl": 1.0,
    }

    def __init__(
        self,
        world_model: nn.Module,
        background: nn.Module,
        *,
        selective: str = "false_negative",
        weighted: bool = True,
        weights: Mapping[str, float] | None = None,
        free_nats: float = 1.0,
        horizon: float = 333.0,
    ):
        super().__init__(
            world_model, selective=selective, weighted=weighted, weights=weights, free_nats=free_nats, horizon=horizon
        )
        self.background = background

    def background_terms(
        self, rollout: Any, batch: TensorDictBase, image: Tensor, mask: Tensor, trust: Tensor
    ) -> Terms:
        rebuilt, own = self.rebuild_background(rollout, batch)
        error = masked_error(rebuilt, image, mask, trust, weighted=self.weighted)
        kl = torch.zeros_like(error) if own is None else categorical_kl(own.posterior_logits, own.prior_logits)
        return {"model_background": error, "model_background_kl": kl}

    def rebuild_background(self, rollout: Any, batch: TensorDictBase) -> tuple[Tensor, Any]:
        """The background [B, T, h, w, 3] in [0, 1] of a replay sample, and the rollout of its own latent or None."""
        keys = self.tensor_keys
        return self.background(rollout, batch[keys.pixels], batch[keys.action], batch[keys.is_init])

    def take_apart(self, rollout: Any, batch: TensorDictBase) -> dict[str, Tensor]:
        """As in :class:`SegmentationDreamerModelLoss`, and the background and both together."""
        layers = super().take_apart(rollout, batch)
        background, _ = self.rebuild_background(rollout, batch)
        composite = layers["foreground"] + (1 - layers["mask"]) * background
        return layers | {"background": background, "composite": composite}

    @torch.no_grad()
    def diagnostics(self, terms: Terms, rollout: Any) -> Terms:
        return super().diagnostics(terms, rollout) | {"bg_loss": terms["model_background"].mean()}
