"""What to do about numbers that are not finite: find them, keep the evidence, go on or stop."""

from collections.abc import Mapping
from pathlib import Path

import torch
from tensordict import TensorDictBase
from torch import Tensor

POLICIES = ("stop", "skip")
MOST_DUMPS = 5  # batches kept on disk
MOST_IN_A_ROW = 100  # skipped updates after which going on makes no sense


class NonFiniteError(FloatingPointError):
    """An update gave a loss or a gradient that is not finite; parameters and statistics are as before it."""


def check_policy(policy: str) -> None:
    """Raise ``ValueError`` unless the policy is known."""
    if policy not in POLICIES:
        raise ValueError(f"nan_policy={policy!r}: choose one of {POLICIES}")


def all_finite(scalars: Mapping[str, Tensor]) -> bool:
    """Whether every scalar is finite; reads the device once."""
    return bool(torch.stack([value.float() for value in scalars.values()]).isfinite().all())


def find_nonfinite(tensors: TensorDictBase) -> list[str]:
    """Keys of the floating-point entries that are not finite throughout, with the first place of each."""
    found = []
    for key, value in tensors.items(include_nested=True, leaves_only=True):
        if value.is_floating_point():
            places = (~value.isfinite()).nonzero()
            if len(places):
                name = key if isinstance(key, str) else "/".join(key)
                found.append(f"{name} at {places[0].tolist()}" if places.shape[-1] else name)
    return found


def describe_update(
    what: str, losses: TensorDictBase, norms: Mapping[str, Tensor], batch: TensorDictBase
) -> NonFiniteError:
    """The error that says which losses and gradient norms of an update are not finite, and what in its batch."""
    wrong = find_nonfinite(losses) + [name for name, norm in norms.items() if not norm.isfinite()]
    return NonFiniteError(f"{what} is not finite: {wrong}; in its batch: {find_nonfinite(batch) or 'nothing'}")


def dump_batch(batch: TensorDictBase, folder: Path, update: int) -> Path | None:
    """Write the batch of a bad update for later inspection, the first few times.

    Load it with ``torch.load(path, weights_only=True)``: a dict of tensors, keys of nested entries joined by "/".

    Returns:
        The file, or None if there are enough already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if len(list(folder.glob("*.pt"))) >= MOST_DUMPS:
        return None
    path = folder / f"update_{update:09d}.pt"
    torch.save({key: value.cpu() for key, value in batch.flatten_keys("/").items()}, path)
    return path
