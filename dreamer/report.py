"""A report of a run, or of many, in one HTML file that needs nothing else: no network, no server, no JavaScript.

    python dreamer/report.py run=runs/dreamer_v3_cartpole_swingup_0_20260131-140509
    python dreamer/report.py runs/phase1/* out=phase1.html

One run gives `report.html` in its folder, many give an overview, learning curves per task and interquartile means
before the runs themselves. Training writes the report of a run whenever it ends. What the files of a run contain is
shown as text, never obeyed.
"""

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from dreamer.files import write_whole

FILE = "report.html"
USAGE = "usage: python dreamer/report.py run=<folder> [more folders] [out=page.html]"


def write_report(
    run_dirs: Sequence[Path], path: Path | None = None, *, defaults: Mapping[str, Any] | None = None
) -> Path:
    """Write the report of one run or of many; it appears whole or not at all.

    Args:
        run_dirs: Run folders; what they lack is left out.
        path: The file; `report.html` in the folder of a single run, in the working folder for many.
        defaults: The default configuration, whose differences are shown. None for no comparison.

    Returns:
        The file.

    Raises:
        ValueError: if there is no run.
        OSError: if a folder does not exist or the file cannot be written.
    """
    from dreamer.report_data import flatten, read_run  # here, because matplotlib is slow to import
    from dreamer.report_page import escape, page
    from dreamer.report_run import describe_run, name_run

    if not run_dirs:
        raise ValueError(f"run_dirs={list(run_dirs)}: give at least one run folder")
    runs = [read_run(Path(folder)) for folder in run_dirs]
    plain = None if defaults is None else flatten(json.loads(json.dumps(defaults, default=str)))
    parts = [describe_run(run, f"run-{index}", plain) for index, run in enumerate(runs, 1)]
    title = name_run(runs[0])
    if len(runs) > 1:
        from dreamer.report_many import compare_runs

        title = f"{len(runs)} runs"
        parts = [compare_runs(runs), *parts]
    path = Path(path) if path is not None else (runs[0].folder if len(runs) == 1 else Path()) / FILE
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    footer = f"<footer>Written by Lucid {escape(_version())} on {now}. All times in UTC.</footer>"
    write_whole(path, page(title, "".join(parts) + footer).encode())
    return path


def try_report(
    run_dirs: Sequence[Path], path: Path | None = None, *, defaults: Mapping[str, Any] | None = None
) -> Path | None:
    """Like `write_report`, but what goes wrong is a warning, so that a run does not end by its report."""
    try:
        return write_report(run_dirs, path, defaults=defaults)
    except Exception as error:  # noqa: BLE001, whatever it is, the run matters more
        warnings.warn(f"no report of {', '.join(map(str, run_dirs))}: {error!r}", stacklevel=2)
        return None


def _version() -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version("lucid-rl")
    return ""


def parse(arguments: Sequence[str]) -> tuple[list[Path], Path | None]:
    """Run folders and output file of a command line.

    Raises:
        ValueError: for an unknown key or without a folder.
    """
    folders, out = [], None
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key == "out":
            out = Path(value)
        elif equals and key == "run":
            folders.append(Path(value))
        elif equals and key.isidentifier() and not Path(argument).exists():
            raise ValueError(f"{argument}: give run=, out= or a folder")
        else:
            folders.append(Path(argument))
    if not folders:
        raise ValueError(USAGE)
    return folders, out


def load_defaults() -> dict[str, Any] | None:
    """The default configuration, None if it cannot be composed."""
    from dreamer.doctor_probes import read_config

    with suppress(Exception):
        return read_config([])
    return None


def main() -> None:
    """Write a report and print its path."""
    try:
        folders, out = parse(sys.argv[1:])
        print(write_report(folders, out, defaults=load_defaults()))  # noqa: T201
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
