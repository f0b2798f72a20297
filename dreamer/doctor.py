"""Look at everything that a run depends on: ``python -m dreamer.doctor agent/size=25m collector=sync``.

Takes the overrides that training would get, prints one line per check with what was found and what to do, and exits
with 1 if a check failed. ``--json`` prints the same for programs. Nothing is written outside temporary files, and
nothing is asked of the network. What is heavy or may crash runs in processes of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dreamer import doctor_checks as checks
from dreamer.doctor_checks import Finding
from dreamer.doctor_probes import Facts

CHECKS: tuple[tuple[str, Callable[[Mapping[str, Any]], Finding]], ...] = (
    ("python", checks.check_python),
    ("packages", checks.check_packages),
    ("known breaks", checks.check_known_breaks),
    ("torchrl, compiled", checks.check_compiled_part),
    ("configuration", checks.check_configuration),
    ("environment", checks.check_environment),
    ("opengl", checks.check_gl),
    ("video codec", checks.check_codec),
    ("replay", checks.check_replay),
    ("memory", checks.check_memory),
    ("shared memory", checks.check_shared_memory),
    ("disk", checks.check_disk),
    ("gpu", checks.check_gpu),
    ("cpu", checks.check_cpu),
    ("processes", checks.check_workers),
    ("open files", checks.check_open_files),
    ("ctrl-c", checks.check_interrupt),
    ("clock", checks.check_clock),
    ("wandb", checks.check_wandb),
)
COLOURS = {"ok": "32", "note": "33", "FAILED": "1;31"}
LEVEL_WIDTH = max(map(len, COLOURS))
NAME_WIDTH = max(len(name) for name, _ in CHECKS)


def examine(facts: Mapping[str, Any]) -> Iterator[tuple[str, Finding]]:
    """Make all checks, each as soon as its facts are there; the first that meets an error has failed."""
    told: dict[Exception, str] = {}
    for name, check in CHECKS:
        try:
            yield name, check(facts)
        except Exception as error:  # noqa: BLE001, a doctor survives every patient
            if error in told:
                yield name, Finding("note", f"not checked, because of {told[error]}")
                continue
            told[error] = name
            kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
            yield name, Finding("FAILED", f"{kind}{error}")


def format_finding(name: str, finding: Finding, *, width: int, colour: bool) -> str:
    """Level, name and text in columns, wrapped at ``width`` characters; the advice stands on a line of its own."""
    indent = " " * (LEVEL_WIDTH + NAME_WIDTH + 4)
    lines = [finding.found, *([f"-> {finding.advice}"] if finding.advice else [])]
    wrapped = [part for line in lines for part in textwrap.wrap(line, max(width - len(indent), 40)) or [""]]
    level = finding.level.ljust(LEVEL_WIDTH)
    if colour:
        level = f"\x1b[{COLOURS[finding.level]}m{level}\x1b[0m"
    return f"{level}  {name.ljust(NAME_WIDTH)}  " + f"\n{indent}".join(wrapped)


def summarise(findings: Mapping[str, Finding], seconds: float) -> str:
    """How many of each level, and which failed."""
    names = {level: [name for name, finding in findings.items() if finding.level == level] for level in COLOURS}
    counts = f"{len(names['ok'])} ok, {len(names['note'])} to note, {len(names['FAILED'])} failed"
    verdict = f": {', '.join(names['FAILED'])}" if names["FAILED"] else ", ready to train"
    return f"{counts}{verdict} ({seconds:.0f} s)"


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m dreamer.doctor", description=__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for dreamer/train.py")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(arguments)
    start, facts = time.monotonic(), Facts(args.overrides)
    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    findings = {}
    try:
        for name, finding in examine(facts):
            findings[name] = finding
            if not args.json:
                sys.stdout.write(format_finding(name, finding, width=width, colour=colour) + "\n")
                sys.stdout.flush()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        facts.close()
    seconds = time.monotonic() - start
    if args.json:
        rows = [{"check": name} | finding._asdict() for name, finding in findings.items()]
        sys.stdout.write(json.dumps({"checks": rows, "seconds": round(seconds, 1)}, indent=1) + "\n")
    else:
        sys.stdout.write(f"\n{summarise(findings, seconds)}\n")
    return int(any(finding.level == "FAILED" for finding in findings.values()))


if __name__ == "__main__":
    sys.exit(main())
