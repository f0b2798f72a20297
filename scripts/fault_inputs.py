"""Faults that come with the data: numbers that are not finite, damaged files, too large a replay, a lost logger.

Every function uses small runs in this process, below the folder that it is given, and returns figures by name.
`scripts/bench_reliability.py` says what they should be.
"""

import hashlib
import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import torch
from fault_program import read_lines
from tensordict import TensorDictBase
from torch import nn

import envs.make
from dreamer.checkpoint_files import list_checkpoints
from dreamer.nonfinite import NonFiniteError
from dreamer.trainer import Trainer
from envs.backends.mock import MockEnv
from tests.dreamer.faults import detect_corruptions
from tests.helpers import make_run, snapshot

BAD_UPDATE, BAD_STEP, BAD_EPISODE = 5, 4, 2
NOT_FINITE = (NonFiniteError, FloatingPointError)
STREAMS = range(2)  # environments of a small run
LOST = ("it raises", "no key", "no network")
NO_NETWORK = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": 40 * "0"}

Figures = dict[str, Any]


def digest(module: nn.Module) -> str:
    """sha256 of all parameters and statistics."""
    tensors = snapshot(module).values()
    return hashlib.sha256(b"".join(x.contiguous().view(-1).view(torch.uint8).numpy() for x in tensors)).hexdigest()


def train(trainer: Trainer) -> bool:
    """Run a trainer to its end; whether a number that is not finite ended it early."""
    try:
        trainer.train()
    except NOT_FINITE:
        return True
    finally:
        trainer.logger.close()
    return False


def spoil_update(folder: Path, policy: str) -> Figures:
    """Let every loss of one update be NaN."""
    trainer = make_run(folder, f"nan_policy={policy}")
    digests = []

    def look(module: nn.Module, *_: Any) -> None:
        digests.append(digest(module))

    def spoil(module: nn.Module, _: Any, losses: TensorDictBase) -> None:
        if len(digests) == BAD_UPDATE + 1:
            losses.update({key: value * torch.nan for key, value in losses.items() if key.startswith("loss_")})

    trainer.loss_module.register_forward_pre_hook(look)
    trainer.loss_module.register_forward_hook(spoil)
    stopped = train(trainer)
    digests.append(digest(trainer.loss_module))
    incidents = [line for line in read_lines(folder / "incidents.jsonl") if line["kind"] == "nonfinite_update"]
    return {
        "updates until noticed": incidents[0]["update"] - BAD_UPDATE if incidents else None,
        "weights changed": digests[BAD_UPDATE] != digests[BAD_UPDATE + 1],
        "incidents": len(incidents),
        "batches kept": len(list((folder / "nonfinite").glob("*.pt"))),
        "run stopped": stopped,
    }


class BrokenEnv(MockEnv):
    """A mock environment in which one number of one step is NaN.

    Args:
        key: "reward" or "observation".
        options: Of :class:`MockEnv`.
    """

    def __init__(self, key: str, **options: Any):
        super().__init__(**options)
        self.key = key

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        arrival = super()._step(tensordict)
        if self._episode == BAD_EPISODE and self._t == BAD_STEP:
            arrival[self.key] = torch.full_like(arrival[self.key], torch.nan)
        return arrival


def spoil_env(folder: Path, key: str, policy: str) -> Figures:
    """Let the reward or the observation of one step of every environment be NaN."""
    with patch.dict(envs.make.BACKENDS, mock=partial(BrokenEnv, key)):
        trainer = make_run(folder, f"nan_policy={policy}")
        stopped = train(trainer)
    incidents = [line["message"] for line in read_lines(folder / "incidents.jsonl") if line["kind"] == "exception"]
    place = f"{key}' is nan at step {BAD_STEP} of episode {BAD_EPISODE}"
    return {
        "place named": any(place in message for message in incidents),
        "steps counted": int(trainer.nonfinite_steps),
        "non-finite records": count_nonfinite(list_checkpoints(folder / "checkpoints")[-1]),
        "run stopped": stopped,
    }


def count_nonfinite(checkpoint: Path) -> int:
    """Rewards and observations of the records in a checkpoint that are not finite."""
    files = (next(checkpoint.rglob(f"*-replay/{key}.bin")) for key in ("reward", "observation"))
    return sum(int((~np.isfinite(np.fromfile(file, np.float32))).sum()) for file in files)


def refuse_replay(folder: Path) -> Figures:
    """Ask for a replay that no machine can hold."""
    before, message = psutil.Process().memory_info().rss, ""
    try:
        make_run(folder, "replay_buffer.size=1_000_000_000_000", "collector.total_frames=1_000_000_000_000")
    except MemoryError as error:
        message = str(error)
    return {
        "refused": bool(message),
        "named": bool(re.search(r"needs [\d,]+ bytes, [\d,]+ are free", message)),
        "MB taken": (psutil.Process().memory_info().rss - before) / 1e6,
    }


def remake_envs(folder: Path, times: int = 10) -> Figures:
    """Make and close an environment with images again and again; programs should not."""
    process, used = psutil.Process(), []
    for _ in range(times):
        env = envs.make.make_env(name="cheetah", task="run", image_size=64)
        env.reset()
        env.close()
        used.append(process.memory_info().rss / 1e6)
    return {"times": times, "MB each": (used[-1] - used[0]) / (times - 1)}


def lose_logger(folder: Path, how: str) -> Figures:
    """Compare a run whose Weights & Biases fails with one that does not use it.

    Args:
        folder: Empty folder.
        how: One of `LOST`.
    """
    quiet = make_run(folder / "quiet")
    train(quiet)
    start = time.monotonic()
    with without_wandb(folder, how), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loud = make_run(
            folder / "loud", "logger.backends=[wandb]", f"logger.offline={'true' if how == 'it raises' else 'false'}"
        )
        train(loud)
    said = [str(warning.message) for warning in caught if "wandb" in str(warning.message)]
    expected, written = (read_lines(folder / name / "metrics.jsonl") for name in ("quiet", "loud"))
    return {
        "warnings": len(said),
        "lines missing": len(expected) - len(written),
        "weights changed": digest(quiet.loss_module) != digest(loud.loss_module),
        "s in all": time.monotonic() - start,
    }


@contextmanager
def without_wandb(folder: Path, how: str) -> Iterator[None]:
    """An environment in which Weights & Biases does not work."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "NETRC"))}
    extra = NO_NETWORK if how == "no network" else {}
    with patch.dict(os.environ, kept | extra | {"NETRC": str(folder / "netrc"), "WANDB_SILENT": "true"}, clear=True):
        if how == "it raises":
            with patch("wandb.init", side_effect=ConnectionError("planted")):
                yield
        else:
            yield


def corrupt(folder: Path) -> Figures:
    """Damage every file of a checkpoint in every way."""
    train(make_run(folder, "checkpoint.interval=48"))
    figures = detect_corruptions(folder / "checkpoints")
    tried = figures["tried"]
    return {"tried": tried, "missed": tried - figures["detected"], "no fall-back": tried - figures["fell_back"]}
