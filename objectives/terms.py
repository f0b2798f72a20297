"""From un-reduced loss terms to losses. Terms keep their [B, T] (or [N, H]) shape until here."""

from collections.abc import Mapping

from tensordict import NestedKey
from torch import Tensor
from torchrl.objectives import LossModule

Terms = dict[str, Tensor]


class ModuleLoss(LossModule):
    """A loss whose networks stay ordinary modules: it makes no functional copies of their parameters."""

    @property
    def functional(self) -> bool:
        return False


def loss_keys(weights: Mapping[str, float]) -> list[NestedKey]:
    """Names of the losses that :func:`weigh` makes."""
    return [f"loss_{name}" for name in weights]


def weigh(terms: Terms, weights: Mapping[str, float]) -> Terms:
    """Return ``loss_<name>`` = weight * mean(term) for every term.

    Raises:
        ValueError: if terms and weights do not have the same names.
    """
    if terms.keys() != weights.keys():
        raise ValueError(f"loss terms {sorted(terms)} need exactly these weights, got {sorted(weights)}")
    return {f"loss_{name}": weights[name] * term.mean() for name, term in terms.items()}
