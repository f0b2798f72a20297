"""Files that are never seen half-written."""

import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place, bring it to the disk and rename it; a kill leaves the old one or the new one.

    Raises:
        OSError: The file cannot be written; nothing is left of the attempt.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
