"""What a run promises when things go wrong, measured: every fault is provoked in small runs.

    python scripts/bench_reliability.py                                        # all, about 30 minutes on two cores
    python scripts/bench_reliability.py --only "dead worker" --only corruption # those whose names begin so
    python scripts/bench_reliability.py --quick                                # one or two of each kind
    python scripts/bench_reliability.py --kills 20 --minutes 30                # a longer soak
    python scripts/bench_reliability.py --markdown docs/reliability.md         # renew the table of that page

The exit code is 1 if a target was missed.
"""

import argparse
import contextlib
import io
import platform
import re
import shlex
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import fault_attacks
import fault_injection as outside
import fault_inputs as inside
import torch
from bench_common import describe_load, write_json

from tests.dreamer.faults import kill_while_saving

START, END = "<!-- table -->", "<!-- end of table -->"
STUCK = 2 * outside.STUCK_AFTER
GRACE = 30  # seconds that schedulers leave between a warning and the end


class AtMost(NamedTuple):
    """A target that a figure must not exceed."""

    limit: float

    def __str__(self) -> str:
        return f"at most {self.limit:g}"


class Fault(NamedTuple):
    """A fault and what must come of it.

    Args:
        provoke: Empty folder -> figures by name.
        targets: What figures must be; those without a target are only shown.
        quick: Whether it is among those of `--quick`.
    """

    provoke: Callable[[Path], dict[str, Any]]
    targets: Mapping[str, Any] = {}
    quick: bool = False


def make_faults(kills: int = 10, minutes: float = 5) -> dict[str, Fault]:
    """Every fault by name; the names of one kind begin with the same words.

    Args:
        kills, minutes: Of the soak.
    """
    parts = (
        worker_faults(),
        signal_faults(),
        repeats(),
        soaks(kills, minutes),
        data_faults(),
        logger_faults(),
        attacks(),
    )
    return {name: fault for part in parts for name, fault in part.items()}


def worker_faults() -> dict[str, Fault]:
    """A worker dies or hangs."""
    faults = {}
    for name, sign, limit in (("dead worker", signal.SIGKILL, 2), ("stuck worker", signal.SIGSTOP, STUCK)):
        for mode in ("multi_sync", "multi_async"):
            ends = partial(outside.break_worker, mode=mode, sign=sign, restarts=0)
            targets = {"s to notice": AtMost(limit), "exit code": 1, "checkpoint": True, "orphans": 0}
            faults[f"{name}, {mode}"] = Fault(ends, targets, quick=sign == signal.SIGKILL)
            goes_on = partial(outside.break_worker, mode=mode, sign=sign, restarts=1)
            targets = {"exit code": 0, "frames missing": 0, "orphans": 0}
            faults[f"{name}, {mode}, restart=1"] = Fault(goes_on, targets, quick=sign == signal.SIGSTOP)
    return faults


def signal_faults() -> dict[str, Fault]:
    """Somebody ends the run, or the disk is full."""
    faults = {}
    saved = {"exit code": 75, "orphans": 0, "frames lost": 0}
    for sign in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        targets = {"exit code": -sign, "orphans": 0} if sign == signal.SIGKILL else saved
        for group, whom in ((False, "the program"), (True, "all its processes")):
            provoke = partial(outside.end_parent, sign=sign, group=group)
            faults[f"orphans, {sign.name} to {whom}"] = Fault(provoke, targets, quick=group)
    faults["orphans, SIGINT to a background job"] = Fault(
        partial(outside.end_parent, sign=signal.SIGINT, ignored=True), saved
    )
    targets = {
        "s to exit": AtMost(GRACE),
        "exit code": 75,
        "frames lost": 0,
        "frames missing": 0,
    }
    for sign in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        for evaluating, during in ((False, "updates"), (True, "an evaluation")):
            provoke = partial(outside.interrupt, sign=sign, evaluating=evaluating)
            faults[f"preemption, {sign.name} during {during}"] = Fault(provoke, targets, quick=sign == signal.SIGUSR1)
    faults["preemption, SIGINT to a background job"] = Fault(
        partial(outside.interrupt, sign=signal.SIGINT, ignored=True), targets
    )
    targets = {name: value for name, value in targets.items() if name != "s to exit"}
    faults["full disk"] = Fault(outside.fill_disk, targets | {"longest gap in the metrics": AtMost(40)})
    return faults


def repeats() -> dict[str, Fault]:
    """Runs that should be equal to the bit, and runs that need not be."""
    exact = ("collector=sync", "replay_buffer.prefetch=0")
    memmap = (*exact, "replay_buffer.memmap_dir={run_dir}/replay")
    targets = {"files that differ": 0}
    faults = {}
    for name, signals, settings, quick in (
        ("SIGTERM twice", [signal.SIGTERM, signal.SIGTERM], exact, False),
        ("SIGKILL, then SIGUSR1", [signal.SIGKILL, signal.SIGUSR1], exact, False),
        ("SIGKILL, memory-mapped replay", [signal.SIGKILL], memmap, True),
    ):
        provoke = partial(outside.repeat, signals=signals, settings=settings)
        faults[f"resume equal to the bit, {name}"] = Fault(provoke, targets, quick)
    faults["same seed, sync"] = Fault(partial(outside.same_seed, settings=exact), targets)
    faults["same seed, sync, prefetch=1"] = Fault(
        partial(outside.same_seed, settings=("collector=sync", "replay_buffer.prefetch=1"))
    )
    for mode in ("multi_sync", "multi_async"):
        settings = (f"collector={mode}", *outside.TWO_WORKERS, "replay_buffer.prefetch=0")
        faults[f"same seed, {mode}"] = Fault(partial(outside.same_seed, settings=settings))
    return faults


def soaks(kills: int, minutes: float) -> dict[str, Fault]:
    """What only time shows."""
    targets = {"went on": True, "frames missing": 0, "orphans": 0}
    faults = {
        f"soak, {mode}": Fault(partial(outside.soak, mode=mode, kills=kills, minutes=minutes), targets)
        for mode in ("sync", "multi_async")
    }
    faults["memory of a long run"] = Fault(partial(outside.grow, frames=20_000), {"MB per 1,000 steps": AtMost(1)})
    faults["memory of environments"] = Fault(inside.remake_envs)
    faults["100 kills while saving"] = Fault(
        partial(kill_while_saving, kills=100), {"unreadable": 0, "lost": 0, "leftover_bytes": 0}
    )
    return faults


def data_faults() -> dict[str, Fault]:
    """Numbers that are not finite, damaged files, too large a replay."""
    faults = {}
    for policy in ("stop", "skip"):
        stopped, counted = policy == "stop", 0 if policy == "stop" else len(inside.STREAMS)
        faults[f"NaN in the loss, {policy}"] = Fault(
            partial(inside.spoil_update, policy=policy),
            {
                "updates until noticed": 0,
                "weights changed": False,
                "incidents": 1,
                "batches kept": 1,
                "run stopped": stopped,
            },
            quick=True,
        )
        for key in ("reward", "observation"):
            faults[f"NaN in the {key}, {policy}"] = Fault(
                partial(inside.spoil_env, key=key, policy=policy),
                {"place named": stopped, "steps counted": counted, "non-finite records": 0, "run stopped": stopped},
                quick=True,
            )
    faults["corruption"] = Fault(inside.corrupt, {"missed": 0, "no fall-back": 0}, quick=True)
    faults["replay larger than memory"] = Fault(
        inside.refuse_replay, {"refused": True, "named": True, "MB taken": AtMost(50)}, quick=True
    )
    return faults


def logger_faults() -> dict[str, Fault]:
    """Weights & Biases is lost, or tells too much."""
    targets = {"warnings": 1, "lines missing": 0, "weights changed": False}
    faults = {
        f"wandb: {how}": Fault(partial(inside.lose_logger, how=how), targets, quick=how == "it raises")
        for how in inside.LOST
    }
    targets = {"secrets found": 0, "public sockets": 0, "exit code": 75}
    return faults | {"secrets and open ports": Fault(outside.spy, targets)}


def attacks() -> dict[str, Fault]:
    """Files and names from somebody who means harm."""
    acts = {
        "checkpoint": fault_attacks.attack_checkpoint,
        "policy": fault_attacks.attack_policy,
        "configuration": fault_attacks.attack_config,
        "names": fault_attacks.attack_names,
    }
    return {f"malicious {what}": Fault(attack, {"not blocked": "none"}, quick=True) for what, attack in acts.items()}


def find_missed(figures: Mapping[str, Any], targets: Mapping[str, Any]) -> list[str]:
    """The figures that are not what they must be, one line each."""
    return [
        f"{name}: {figures[name]}, not {target}" for name, target in targets.items() if not meets(figures[name], target)
    ]


def meets(figure: Any, target: Any) -> bool:
    """Whether a figure is the target, or within its limit."""
    return figure <= target.limit if isinstance(target, AtMost) else figure == target


def measure(name: str, fault: Fault, folder: Path) -> dict[str, Any]:
    """Provoke a fault, silently, and judge what came of it."""
    start = time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            figures = fault.provoke(folder)
        missed = find_missed(figures, fault.targets)
    except Exception as error:  # noqa: BLE001, the others are still to be measured
        traceback.print_exc()
        figures, missed = {}, [f"{type(error).__name__}: {error}".splitlines()[0]]
    seconds, targets = time.monotonic() - start, {key: spell(target) for key, target in fault.targets.items()}
    return {"fault": name, "figures": figures, "targets": targets, "missed": missed, "seconds": seconds}


def print_row(row: Mapping[str, Any]) -> None:
    """Say how a fault ended."""
    verdict = f"MISSED {'; '.join(row['missed'])}" if row["missed"] else "met" if row["targets"] else "measured"
    print(f"{row['fault']}: {verdict}  [{row['seconds']:.0f} s]")
    print(f"    {', '.join(f'{name} {spell(value)}' for name, value in row['figures'].items())}", flush=True)


def spell(value: Any) -> str:
    """A figure in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def to_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table for a document."""
    lines = ["| fault | measured | target | |", "|---|---|---|---|"]
    for row in rows:
        measured, target = (
            ", ".join(f"{name} {spell(value)}" for name, value in row[part].items()) for part in ("figures", "targets")
        )
        verdict = "missed" if row["missed"] else "met" if row["targets"] else ""
        lines.append(f"| {row['fault']} | {measured} | {target} | {verdict} |")
    return "\n".join(lines)


def describe_measurement() -> str:
    """Where and how this was measured, in one line."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return (
        f"{model[1] if model else platform.machine()}, {describe_load()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}; `{shlex.join(['python', *sys.argv])}`"
    )


def replace_table(page: str, table: str) -> str:
    """A page with another table between its two marks.

    Raises:
        ValueError: if the marks are missing.
    """
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"the page lacks {START} and {END}: put them where the table belongs")
    return f"{before}{start}\n{table}\n{end}{after}"


def choose(faults: Mapping[str, Fault], only: Sequence[str], quick: bool) -> dict[str, Fault]:
    """The faults whose names begin with one of ``only``, all if there are none; the quick ones alone if wished.

    Raises:
        ValueError: if a beginning fits none.
    """
    if wrong := [text for text in only if not any(name.startswith(text) for name in faults)]:
        raise ValueError(f"--only {wrong[0]!r}: no name begins so; choose from {', '.join(faults)}")
    named = {name: fault for name, fault in faults.items() if not only or name.startswith(tuple(only))}
    return {name: fault for name, fault in named.items() if fault.quick or not quick}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="faults whose names begin so")
    parser.add_argument("--quick", action="store_true", help="one fault of each kind")
    parser.add_argument("--kills", type=int, default=10, help="of the soak")
    parser.add_argument("--minutes", type=float, default=5, help="of the soak, for each mode, roughly")
    parser.add_argument("--markdown", type=Path, help="page whose table is replaced")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    faults = choose(make_faults(args.kills, args.minutes), args.only, args.quick)
    torch.set_num_threads(1)
    where, rows = describe_measurement(), []
    print(where)
    with tempfile.TemporaryDirectory() as folder:
        for index, (name, fault) in enumerate(faults.items()):
            (place := Path(folder) / str(index)).mkdir()
            rows.append(measure(name, fault, place))
            print_row(rows[-1])
    write_json(args.json, vars(args) | {"where": where}, rows)
    if args.markdown:
        args.markdown.write_text(replace_table(args.markdown.read_text(), f"{where}\n\n{to_markdown(rows)}"))
    missed = [row["fault"] for row in rows if row["missed"]]
    print(f"{len(rows)} faults, {len(missed)} missed a target{': ' * bool(missed)}{', '.join(missed)}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
