"""What the benchmarks share: the configuration as training reads it, and tables on the console and in JSON."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

Row = Mapping[str, Any]


def load_config(*overrides: str) -> dict[str, Any]:
    """Compose the configuration of a run, with overrides as on the command line of `dreamer/train.py`."""
    with initialize_config_module("configs", version_base="1.3"):
        return OmegaConf.to_container(compose("train", overrides=list(overrides)), resolve=True)


def print_table(rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Print one line per row.

    Args:
        rows: Values by column; None is printed as a dash.
        columns: Column name -> format of its values, for example ">9.2f". The width is that of the widest entry.
    """
    cells = [list(columns)]
    cells += [["-" if row[name] is None else format(row[name], spec) for name, spec in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        padded = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *padded]))


def write_json(path: Path | None, settings: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write settings and rows to `path`, if there is one."""
    if path is not None:
        path.write_text(json.dumps({"settings": dict(settings), "rows": list(rows)}, indent=2, default=str))


def describe_load() -> str:
    """Load of the machine: other jobs raise every figure, CPU time too."""
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
