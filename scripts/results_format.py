"""The format of scores: JSON, a list of runs {task, method, seed, xs, ys}, as the DreamerV3 repository publishes them.

    python scripts/results_format.py dmc_vision.json.gz --methods dreamerv3,drqv2 --bin 10_000 --out small.json.gz

`xs` are environment frames, ascending, `ys` returns of episodes, and a name of a task starts with its benchmark:
`dmc_cheetah_run`. A method that was trained under a distraction is called `<agent>@<distraction>`. As a program this
makes a file smaller: it averages the points of every run that fall into one bin and dates them at its end.
"""

import argparse
import gzip
import json
import math
import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from dreamer.score_statistics import Run, average_bins

CLEAN = "none"  # name of the distraction that is none


def join_method(agent: str, distraction: str) -> str:
    """The name of a method: "dreamer_v3", "random" -> "dreamer_v3@random"."""
    return agent if distraction == CLEAN else f"{agent}@{distraction}"


def split_method(method: str) -> tuple[str, str]:
    """Agent and distraction of a method."""
    agent, _, distraction = method.partition("@")
    return agent, distraction or CLEAN


def read_runs(path: Path, methods: Sequence[str] = ()) -> list[Run]:
    """Read a file, packed with gzip if it is called `*.gz`. Points without a return are left out.

    Args:
        path: The file.
        methods: Those that are wanted; none for all.

    Raises:
        ValueError: naming the file and the entry that is wrong.
    """
    data = path.read_bytes()
    try:
        entries = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
        runs = [_parse(entry) for entry in entries if not methods or entry["method"] in methods]
    except (OSError, EOFError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a list of runs with task, method, seed, xs, ys ({error!r})") from error
    if absent := set(methods) - {run.method for run in runs}:
        raise ValueError(f"{path}: has no method {', '.join(sorted(absent))}")
    return runs


def _parse(entry: dict) -> Run:
    points = [(x, float(y)) for x, y in zip(entry["xs"], entry["ys"], strict=True) if y is not None]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    name = f"{entry['task']}, {entry['method']}, seed {entry['seed']}"
    if not all(math.isfinite(value) for value in (*xs, *ys)):
        raise ValueError(f"{name}: not a finite number")
    if any(after <= before for before, after in pairwise(xs)):
        raise ValueError(f"{name}: xs do not ascend")
    return Run(str(entry["task"]), str(entry["method"]), int(entry["seed"]), xs, ys)


def write_runs(path: Path, runs: Iterable[Run]) -> None:
    """Write a file, packed with gzip if it is called `*.gz`. The same runs give the same bytes."""
    text = ",\n".join(json.dumps(run._asdict(), separators=(",", ":")) for run in runs)
    data = f"[{text}]\n".encode()
    write_atomically(path, gzip.compress(data, 9, mtime=0) if path.suffix == ".gz" else data)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)


def read_curve(metrics: Path, name: str) -> tuple[list[int], list[float]]:
    """Frames and values of one metric in the `metrics.jsonl` of a run; a line cut short at the end is ignored."""
    points: dict[int, float] = {}
    for line in metrics.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry.get(name) is not None:
            points[entry["frames"]] = entry[name]
    return sorted(points), [points[x] for x in sorted(points)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="file to read")
    parser.add_argument("--methods", default="", help="which to keep; all by default")
    parser.add_argument("--bin", type=int, required=True, help="frames")
    parser.add_argument("--digits", type=int, default=1, help="decimal places of a return, 0 for whole numbers")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args()
    if args.bin < 1:
        parser.error(f"--bin={args.bin}: give at least 1")
    runs = read_runs(args.source, [name for name in args.methods.split(",") if name])
    small = [average_bins(run, args.bin) for run in runs]
    write_runs(args.out, [run._replace(ys=[round(y, args.digits or None) for y in run.ys]) for run in small])
    print(f"{args.out}: {len(small)} runs, {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
