"""From un-reduced loss terms to losses. Terms keep their [B, T] (or [N, H]) shape until here."""

from collections.abc import Mapping

from torch import Tensor

Terms = dict[str, Tensor]


def loss_keys(weights: Mapping[str, float]) -> list[str]:
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
