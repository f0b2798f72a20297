"""Where files are kept that can be made again at any time."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder: `$LUCID_CACHE`, else `lucid` in `$XDG_CACHE_HOME`, else `~/.cache/lucid`."""
    if folder := os.environ.get("LUCID_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lucid"
