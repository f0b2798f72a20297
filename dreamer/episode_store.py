"""Episodes on disk, one file each, and beside them what an encoder makes of their observations.

An episode of N steps has N + 1 records, as in :mod:`dreamer.replay`: the first one is what the reset gave, and the
action of a record is the one that led to it. Observations are compressed one by one, so that to read one at random is
to read its bytes alone. The files are in the format of safetensors: nothing in them can run code.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from tensordict import TensorDict
from torch import Tensor

from dreamer.files import write_whole

COLUMNS = ("action", "reward", "is_init", "terminated")
LEVEL = 1  # of zlib: 8 to 35 times smaller for the images of games, at some 30,000 images per second
CONTENT = "content"  # entry of the metadata
NAME = re.compile(r"(\d{6,})\.safetensors")


class Layout(NamedTuple):
    """What an observation is.

    Args:
        key: Its key in a record.
        shape: Of one observation.
        dtype: Of its numbers.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.key} {list(self.shape)} {self.dtype}"

    @property
    def has_images(self) -> bool:
        """Whether an observation is an image, not a vector."""
        return len(self.shape) == 3

    def pack(self, observation: Tensor) -> bytes:
        """Compress one observation."""
        return zlib.compress(observation.contiguous().numpy(force=True).tobytes(), LEVEL)

    def unpack(self, data: bytes | np.ndarray) -> Tensor:
        """Invert :meth:`pack`."""
        raw = bytearray(zlib.decompress(data))
        return torch.frombuffer(raw, dtype=self.dtype).reshape(self.shape)


class EpisodeStore:
    """Episodes in a folder, numbered from 0 in the order in which they were stored.

    Args:
        folder: Of the files; made with the first episode.
        layout: Of the observations.

    Raises:
        ValueError: for a folder with other observations, or one in which an episode is missing.
    """

    def __init__(self, folder: Path, layout: Layout):
        self.folder, self.layout = folder, layout
        numbers = sorted(int(match[1]) for path in folder.glob("*") if (match := NAME.fullmatch(path.name)))
        if numbers != list(range(len(numbers))):
            missing = min(set(range(numbers[-1])) - set(numbers))
            raise ValueError(f"{self.path(missing)} is missing: remove {folder} and collect again")
        self.lengths: list[int] = []  # records of each episode
        self.digests: list[str] = []  # of the observations of each episode, sha256
        for number in numbers:
            self._find(number)
        self._places: dict[int, np.ndarray] = {}  # where the observations of an episode begin and end in its file

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def records(self) -> int:
        """Records of all episodes."""
        return sum(self.lengths)

    @property
    def steps(self) -> int:
        """Steps of all episodes, one less than records in each."""
        return self.records - len(self)

    @property
    def longest(self) -> int:
        """Steps of the longest episode."""
        return max(self.lengths) - 1

    def path(self, number: int) -> Path:
        """File of an episode."""
        return self.folder / f"{number:06d}.safetensors"

    def append(self, packed: Sequence[bytes], columns: Mapping[str, Tensor]) -> None:
        """Store an episode, whole or not at all.

        Args:
            packed: N + 1 observations, packed by the layout.
            columns: ``action`` [N + 1, A], ``reward``, ``is_init`` and ``terminated`` [N + 1, 1].

        Raises:
            OSError: if it cannot be written.
        """
        offsets = torch.tensor([0, *(len(data) for data in packed)]).cumsum(0)
        data = torch.frombuffer(bytearray(b"".join(packed)), dtype=torch.uint8)
        tensors = {key: columns[key].clone(memory_format=torch.contiguous_format) for key in COLUMNS} | {
            "offsets": offsets,
            "observations": data,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(data.numpy()).hexdigest()
        facts = {CONTENT: f"{self.layout}; {digest}"}  # one entry: of several the format keeps no order
        write_whole(self.path(len(self)), safetensors.torch.save(tensors, facts))
        self.lengths.append(len(packed))
        self.digests.append(digest)

    def truncate(self, count: int) -> None:
        """Remove all episodes but the first ``count``.

        Raises:
            ValueError: if there are fewer.
        """
        if count > len(self):
            raise ValueError(f"{self.folder} has {len(self)} of {count} episodes: give it back what is missing")
        for number in reversed(range(count, len(self))):
            self.path(number).unlink()
            self._places.pop(number, None)
        del self.lengths[count:], self.digests[count:]

    def read_columns(self, number: int) -> TensorDict:
        """All of an episode but its observations, [N + 1]."""
        with _open(self.path(number)) as file:
            return TensorDict({key: file.get_tensor(key) for key in COLUMNS}, [self.lengths[number]])

    def read_observations(self, number: int) -> Tensor:
        """The observations of an episode, [N + 1, ...]."""
        with _open(self.path(number)) as file:
            data, ends = file.get_tensor("observations").numpy(), file.get_tensor("offsets").tolist()
            pieces = [data[a:b] for a, b in pairwise(ends)]
            return torch.stack([self.layout.unpack(piece) for piece in pieces])

    def draw_observations(self, count: int) -> Tensor:
        """Observations, drawn from all records by torch's generator, [count, ...]."""
        starts = np.cumsum([0, *self.lengths])
        rows = torch.randint(self.records, (count,)).numpy()
        numbers = np.searchsorted(starts, rows, side="right") - 1
        return torch.stack(
            [self.read_observation(number, step) for number, step in zip(numbers, rows - starts[numbers], strict=True)]
        )

    def read_observation(self, number: int, step: int) -> Tensor:
        """One observation of an episode; where those of its file are is kept in memory from the first one on."""
        path = self.path(number)
        if number not in self._places:
            self._places[number] = _find_observations(path)
        begin, end = self._places[number][step : step + 2].tolist()
        with _readable(path), open(path, "rb") as file:
            file.seek(begin)
            return self.layout.unpack(file.read(end - begin))

    def _find(self, number: int) -> None:
        with _open(self.path(number)) as file:
            layout, _, digest = (file.metadata() or {}).get(CONTENT, "").partition("; ")
            if layout != str(self.layout):
                raise ValueError(f"{self.path(number)} holds {layout or None}, but the environment gives {self.layout}")
            self.lengths.append(file.get_slice("reward").get_shape()[0])
            self.digests.append(digest)


class Encodings:
    """What an encoder makes of the episodes of a store: mean and log variance of every record, one file per episode.

    Args:
        folder: Of the files; made with the first one.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, number: int) -> Path:
        """File of an episode."""
        return self.folder / f"{number:06d}.safetensors"

    def write(self, number: int, mean: Tensor, logvar: Tensor, digest: str) -> None:
        """Store the encoding of an episode as float16, whole or not at all.

        Args:
            number: Of the episode.
            mean, logvar: [N + 1, Z].
            digest: Of encoder and episode.

        Raises:
            OSError: if it cannot be written.
        """
        tensors = {"mean": mean.half().cpu().contiguous(), "logvar": logvar.half().cpu().contiguous()}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.path(number), safetensors.torch.save(tensors, {"digest": digest}))

    def fresh(self, number: int, digest: str) -> bool:
        """Whether this very episode was encoded by this very encoder."""
        if not self.path(number).exists():
            return False
        with _open(self.path(number)) as file:
            return file.metadata() == {"digest": digest}

    def read(self, number: int, digest: str, records: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log variance, float16 [N + 1, Z].

        Args:
            number: Of the episode.
            digest: Of encoder and episode.
            records: The first so many records only.

        Raises:
            ValueError: if the episode was not encoded, or was another one then, or the encoder had other weights.
        """
        if not self.fresh(number, digest):
            state = "otherwise, or by another encoder," if self.path(number).exists() else "not"
            raise ValueError(f"episode {number} was {state} encoded in {self.folder}: run the stage encode as well")
        with _open(self.path(number)) as file:
            return file.get_slice("mean")[:records], file.get_slice("logvar")[:records]


def _find_observations(path: Path) -> np.ndarray:
    """Bytes of the file at which its observations begin, and at which the last one ends, int64 [N + 2]."""
    with _open(path) as file:
        offsets = file.get_tensor("offsets").numpy()
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return 8 + size + header["observations"]["data_offsets"][0] + offsets


@contextmanager
def _open(path: Path) -> Iterator[safetensors.safe_open]:
    """Open a file of safetensors."""
    with _readable(path), safetensors.safe_open(path, "pt") as file:
        yield file


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Name the file if what is read inside is not as it was written.

    Raises:
        RuntimeError: in place of the errors of the formats.
    """
    try:
        yield
    except (safetensors.SafetensorError, zlib.error) as error:
        raise RuntimeError(f"{path} is damaged ({error}): remove its folder and make it again") from error
