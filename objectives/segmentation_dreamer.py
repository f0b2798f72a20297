"""The world-model loss of Segmentation Dreamer: only the foreground is rebuilt, so only that must be remembered."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from objectives.terms import Terms
from objectives.world_model import WorldModelLoss, squared_error

SELECTIVE = ("none", "false_negative", "any")


class SegmentationDreamerModelLoss(WorldModelLoss):
    """A world model that reconstructs the foreground and predicts where it is.

        reco = sum_p v_p |x^_p - m_p x_p|^2      masked target, black outside: where the foreground ends counts too
        mask = sum_p (m^_p - m_p)^2              the mask as a fourth channel of the image

    The image itself is encoded unmasked: no mask is needed to act. Frames without a label (``mask_valid`` is False)
    have neither term; all other terms are those of :class:`WorldModelLoss`. The weight v_p is 0 where the label cannot
    be trusted, because it disagrees with what the model itself believes (m^_p, without gradient):

        none            v_p = 1
        false_negative  v_p = 0 where m^_p > 1/2 and m_p <= 1/2: the label has probably missed something
        any             v_p = 0 where m^_p and m_p lie on different sides of 1/2

    Args:
        world_model: As in :class:`WorldModelLoss`; its decoder of the pixels has four channels, the mask last.
        selective: "none", "false_negative" or "any".
        weighted: Compare the image in the foreground only, sum_p v_p m_p |x^_p - x_p|^2, instead of all of it with a
            masked target.
        weights, free_nats, horizon: As in :class:`WorldModelLoss`.

    Reads: what :class:`WorldModelLoss` reads, mask [B, T, h, w, 1] (bool, or uint8 up to 255), mask_valid [B, T, 1].
    Writes: what :class:`WorldModelLoss` writes, and loss_model_mask [].
    Raises:
        ValueError: for an unknown ``selective``.
    Source: Kim et al. 2024, "Make the Pertinent Salient", arXiv 2410.09972, from its abstract and descriptions of it by
        others; its code is not public.
    Differs: the mask is learned with a squared error, on the scale of the image; how the paper does it is unknown.
    """

    WEIGHTS: Mapping[str, float] = {**WorldModelLoss.WEIGHTS, "model_mask": 1.0}

    @dataclass
    class _AcceptedKeys(WorldModelLoss._AcceptedKeys):
        pixels: NestedKey = "pixels"
        mask: NestedKey = "mask"
        mask_valid: NestedKey = "mask_valid"

    tensor_keys: _AcceptedKeys

    def __init__(
        self,
        world_model: nn.Module,
        *,
        selective: str = "false_negative",
        weighted: bool = False,
        weights: Mapping[str, float] | None = None,
        free_nats: float = 1.0,
        horizon: float = 333.0,
    ):
        super().__init__(world_model, weights=weights, free_nats=free_nats, horizon=horizon)
        if selective not in SELECTIVE:
            raise ValueError(f"selective={selective!r}: choose one of {SELECTIVE}")
        self.selective, self.weighted = selective, weighted

    @property
    def in_keys(self) -> list[NestedKey]:
        return [*super().in_keys, self.tensor_keys.mask, self.tensor_keys.mask_valid]

    def reconstruction_terms(self, rollout: Any, batch: TensorDictBase) -> Terms:
        """Errors of the foreground and of the mask; vectors count as in :class:`WorldModelLoss`."""
        decoded = self.world_model.decode(rollout.belief, rollout.state)
        foreground, believed = split_mask(decoded.pop(self.tensor_keys.pixels))  # [B, T, h, w, 3], [B, T, h, w, 1]
        image, mask, labelled = self.read_labels(batch)
        trust = selective_weight(believed, mask, self.selective) * labelled  # [B, T, h, w, 1]
        error = masked_error(foreground, image, mask, trust, weighted=self.weighted)
        errors = [error] + [squared_error(reco, batch[key]) for key, reco in decoded.items()]
        return {
            "model_reco": torch.stack(errors).sum(0),
            "model_mask": ((believed - mask).square() * labelled).flatten(2).sum(-1),
            **self.background_terms(rollout, batch, image, 1 - mask, trust),
        }

    def background_terms(
        self, rollout: Any, batch: TensorDictBase, image: Tensor, mask: Tensor, trust: Tensor
    ) -> Terms:
        """Terms [B, T] of an agent that rebuilds the background too; ``mask`` is the background's. None here."""
        return {}

    def take_apart(self, rollout: Any, batch: TensorDictBase) -> dict[str, Tensor]:
        """What the model makes of a replay sample, by name, each [B, T, h, w, C] in [0, 1]: foreground and mask."""
        foreground, mask = split_mask(super().decode_pixels(rollout.feature))
        return {"foreground": foreground * mask, "mask": mask}

    def read_labels(self, batch: TensorDictBase) -> tuple[Tensor, Tensor, Tensor]:
        """Image [B, T, h, w, 3] and mask [B, T, h, w, 1] in [0, 1]; which frames have a label [B, T, 1, 1, 1]."""
        keys = self.tensor_keys
        mask = batch[keys.mask]
        mask = mask.float() if mask.dtype == torch.bool else mask.float() / 255
        return batch[keys.pixels].float() / 255, mask, batch[keys.mask_valid].float()[..., None, None]

    @torch.no_grad()
    def diagnostics(self, terms: Terms, rollout: Any) -> Terms:
        """Also ``fg_loss``, which is the reconstruction loss by the name that says what it is of, and ``mask_loss``."""
        means = {"fg_loss": terms["model_reco"].mean(), "mask_loss": terms["model_mask"].mean()}
        return super().diagnostics(terms, rollout) | means

    def decode_pixels(self, feature: Tensor) -> Tensor:
        image, mask = split_mask(super().decode_pixels(feature))
        return image * mask if self.weighted else image  # outside the mask, a weighted loss leaves the image to chance


def split_mask(image: Tensor) -> tuple[Tensor, Tensor]:
    """The colours [..., h, w, C] and the mask [..., h, w, 1] of a decoded image, of which it is the last channel."""
    return image[..., :-1], image[..., -1:]


def masked_error(prediction: Tensor, image: Tensor, mask: Tensor, trust: Tensor, *, weighted: bool) -> Tensor:
    """Squared error of one side of an image, summed over pixels and channels.

        weighted:    sum_p v_p m_p |x^_p - x_p|^2
        unweighted:  sum_p v_p |x^_p - m_p x_p|^2

    Args:
        prediction, image: [B, T, h, w, C] in [0, 1].
        mask: The side's share m of each pixel, [B, T, h, w, 1] in [0, 1].
        trust: Weight v, [B, T, h, w, 1].

    Returns:
        [B, T].
    """
    weight, target = (trust * mask, image) if weighted else (trust, image * mask)
    return (weight * (prediction - target).square()).flatten(2).sum(-1)


def selective_weight(believed: Tensor, mask: Tensor, selective: str) -> Tensor:
    """0 where a label is not trusted and 1 elsewhere; see :class:`SegmentationDreamerModelLoss`. No gradient."""
    believed, labelled = believed > 0.5, mask > 0.5
    if selective == "none":
        distrusted = torch.zeros_like(labelled)
    else:
        distrusted = believed & ~labelled if selective == "false_negative" else believed ^ labelled
    return (~distrusted).float()
