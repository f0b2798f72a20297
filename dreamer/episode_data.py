"""The data set of World Models: episodes as they are collected, and what an encoder makes of them."""

import hashlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.trainers import Trainer

from dreamer.episode_store import COLUMNS, Encodings, EpisodeStore
from dreamer.models.vae import Posterior
from dreamer.stages import COLLECT, Stage


class EpisodeData:
    """The data set of a run: episodes, their encodings, and the encoder that they must be made by.

    Args:
        episodes, encodings: On disk.
        vision: Encodes observations: :class:`VAE`, or what stands in for it.
        sample_latent: Whether what acts sees a sample of the encoding, or its mean.
    """

    def __init__(self, episodes: EpisodeStore, encodings: Encodings, vision: nn.Module, *, sample_latent: bool = True):
        self.episodes, self.encodings, self.vision, self.sample_latent = episodes, encodings, vision, sample_latent
        self._first: tuple[tuple[str, int], Posterior] | None = None

    def digest(self, number: int, encoder: str) -> str:
        """What an encoding is known by: the digest of the encoder, and that of the episode."""
        return f"{encoder} {self.episodes.digests[number]}"

    def starts(self, count: int, generator: torch.Generator) -> Tensor:
        """Latents [count, Z] of the first observations of episodes, drawn by ``generator``, on its device."""
        key = (digest_of(self.vision), len(self.episodes))
        if self._first is None or self._first[0] != key:
            self._first = key, self._read_first(key[0])
        first = Posterior(*(part.to(generator.device) for part in self._first[1]))  # [E, Z]
        device = generator.device
        rows = torch.randint(len(first.mean), (count,), generator=generator, device=device)
        chosen = Posterior(first.mean[rows], first.logvar[rows])
        if not self.sample_latent:
            return chosen.mean
        return chosen.sample(torch.randn(chosen.mean.shape, generator=generator, device=device))

    def _read_first(self, encoder: str) -> Posterior:
        numbers = range(len(self.episodes))
        whole = [number for number in numbers if self.episodes.read_columns(number)["is_init"][0]]
        parts = [self.encodings.read(number, self.digest(number, encoder), records=1) for number in whole]
        if not parts:
            raise ValueError(f"{self.episodes.folder}: no episode has its first observation; collect more")
        return Posterior(*(torch.cat(part).float() for part in zip(*parts, strict=True)))


def digest_of(module: nn.Module) -> str:
    """sha256 of the names and values of a module's state."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class CollectStage(Stage):
    """Put the episodes of all streams into the store until the frames of this round were collected.

    An episode that is still under way then is stored as far as it went, like one that a time limit ended; what follows
    becomes an episode of its own, which does not begin with a reset. So does one whose environment was made anew.

    Args:
        trainer: Counts the frames.
        episodes: Gets the episodes.
        rounds: Parts of the trainer's budget.
    """

    name = COLLECT

    def __init__(self, trainer: Trainer, episodes: EpisodeStore, rounds: int):
        self.trainer, self.episodes, self.rounds = trainer, episodes, rounds
        self.round, self.fresh = 0, True
        self.packed: dict[int, list[bytes]] = {}  # stream -> observations of its episode
        self.columns: dict[int, TensorDict] = {}  # stream -> the rest of it

    def begin(self) -> None:
        self.round += 1

    def done(self) -> bool:
        """Whether this round has its share of the frames."""
        return self.trainer.collected_frames * self.rounds >= self.trainer.total_frames * self.round

    def receive(self, records: TensorDictBase) -> TensorDictBase:
        """Take records [R], in time order within each stream."""
        if self.fresh:  # what is there is left from a run that ended before its first checkpoint
            self.episodes.truncate(0)
            self.fresh = False
        for stream in records["stream"].unique().tolist():
            rows = records[(records["stream"] == stream).flatten()]
            begins, ends = rows["is_init"].flatten(), rows["done"].flatten()
            after_ends = ends.nonzero().flatten() + 1
            cuts = {0, len(rows), *begins.nonzero().flatten().tolist(), *after_ends.tolist()}
            for start, stop in pairwise(sorted(cuts)):
                if begins[start]:
                    self._store(stream)
                self._extend(stream, rows[start:stop])
                if ends[stop - 1]:
                    self._store(stream)
        return records

    def end(self) -> None:
        """Store what is under way; its last record begins what follows."""
        for stream in sorted(self.packed):
            packed, columns = self.packed[stream][-1:], self.columns[stream][-1:]
            self._store(stream)
            self.packed[stream], self.columns[stream] = packed, columns

    def state_dict(self) -> dict[str, Any]:
        under_way = {
            stream: {
                "sizes": torch.tensor([len(data) for data in packed]),
                "bytes": torch.frombuffer(bytearray(b"".join(packed)), dtype=torch.uint8),
                **self.columns[stream].to_dict(),
            }
            for stream, packed in self.packed.items()
        }
        return {"round": self.round, "episodes": len(self.episodes), "under_way": under_way}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; episodes that were stored later are removed."""
        self.round, self.fresh = state["round"], False
        self.episodes.truncate(state["episodes"])
        self.packed, self.columns = {}, {}
        for stream, part in state["under_way"].items():
            pieces = part["bytes"].split(part["sizes"].tolist())
            self.packed[stream] = [piece.numpy().tobytes() for piece in pieces]
            self.columns[stream] = TensorDict({key: part[key] for key in COLUMNS}, [len(pieces)])

    def _extend(self, stream: int, rows: TensorDictBase) -> None:
        layout, columns = self.episodes.layout, rows.select(*COLUMNS)
        self.packed.setdefault(stream, []).extend(layout.pack(row) for row in rows[layout.key])
        before = self.columns.get(stream)
        self.columns[stream] = columns.clone() if before is None else torch.cat([before, columns])

    def _store(self, stream: int) -> None:
        packed, columns = self.packed.pop(stream, []), self.columns.pop(stream, None)
        if len(packed) > 1:
            self.episodes.append(packed, columns)
