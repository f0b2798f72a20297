"""Files of JSON objects, one a line, in which every line is whole whatever happened to the writer."""

import errno
import json
import math
from collections import deque
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

WAITING_LINES = 4096  # kept in memory while the disk is full


class JsonLines:
    """Append JSON objects to a file.

    Nothing is held back: what :meth:`write` took is in the file. Only while the file cannot be written, as on a full
    disk, lines wait in memory; of more than ``WAITING_LINES`` the oldest are dropped. The end of a line that a killed
    process left behind is removed at the start.

    Args:
        path: The file; made by the first line.
        report: Told in a sentence when lines begin to wait and when they were written.
    """

    def __init__(self, path: Path, report: Callable[[str], None]):
        self.path, self.report = Path(path), report
        self.file: FileIO | None = None
        self.waiting: deque[bytes] = deque(maxlen=WAITING_LINES)
        self.blocked, self.dropped = False, 0
        self.size = 0  # bytes of whole lines in the file
        if self.path.exists():
            self.cut(self.path.stat().st_size)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append ``record``. NaN and infinity become null, unknown objects their text."""
        self.dropped += len(self.waiting) == self.waiting.maxlen
        self.waiting.append((json.dumps(make_plain(record)) + "\n").encode())
        try:
            self._drain()
        except OSError as error:
            if not self.blocked:
                self.blocked = True
                keep = f"the newest {self.waiting.maxlen:,} lines wait in memory, older ones are dropped"
                self.report(f"{self.path.name} cannot be written ({error.strerror}); {keep}")
        else:
            if self.blocked:
                self.blocked, dropped, self.dropped = False, self.dropped, 0
                self.report(f"{self.path.name} goes on; {dropped:,} lines were dropped")

    def cut(self, size: int) -> bytes:
        """Keep the whole lines among the first ``size`` bytes and return the whole lines after them."""
        self.close()
        content = self.path.read_bytes() if self.path.exists() else b""
        self.size = content.rfind(b"\n", 0, size) + 1
        if self.size < len(content):
            with open(self.path, "r+b") as file:
                file.truncate(self.size)
        return content[self.size : content.rfind(b"\n") + 1]

    def close(self) -> None:
        """Close the file; a later line opens it again."""
        if self.file is not None:
            self.file.close()
            self.file = None

    def _drain(self) -> None:
        if self.file is None:
            self.file = FileIO(self.path, "a")
        while self.waiting:
            line = self.waiting[0]
            if self.file.write(line) != len(line):
                self.file.truncate(self.size)  # no half line stays
                raise OSError(errno.ENOSPC, "no room for a whole line")
            self.size += len(line)
            self.waiting.popleft()


def make_plain(value: Any) -> Any:
    """``value`` as JSON has it: text keys, no NaN or infinity, the text of objects that it does not know."""
    if isinstance(value, Mapping):
        return {str(key): make_plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [make_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
