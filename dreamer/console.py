"""What a person sees while a run goes on: one live line on a terminal, plain lines elsewhere."""

import os
import shutil
import sys
from collections.abc import Mapping
from typing import TextIO

SEPARATOR = "  "


class Console:
    """Show progress, and text above it.

    On a terminal there is one line that is rewritten and never wraps. Elsewhere every call writes a line. A stream
    that breaks, as when a session is hung up, is given up; the run goes on.

    Args:
        total_frames: Budget of the run; 0 for one that collects none.
        stream: Where to. Default: standard output.
    """

    def __init__(self, total_frames: int, stream: TextIO | None = None):
        self.total_frames, self.stream = total_frames, sys.stdout if stream is None else stream
        self.live = self.stream.isatty()
        self.line = ""  # what the live line shows
        self.latest: dict[str, float] = {}

    def show(self, metrics: Mapping[str, float], frames: int) -> None:
        """Show progress at ``frames``. What is rarely measured keeps its last value."""
        self.latest.update(metrics)
        if self.live:
            line = console_line(self.latest, frames, self.total_frames, self._width() - 1)
            self._write("\r" + line.ljust(len(self.line)) + "\r" + line)
            self.line = line
        else:
            self._write(console_line(self.latest, frames, self.total_frames) + "\n")

    def print(self, text: str) -> None:
        """Write ``text`` on lines of its own, above the live line."""
        blank = "\r" + " " * len(self.line) + "\r" if self.line else ""
        self._write(f"{blank}{text}\n{self.line}")

    def close(self) -> None:
        """End the live line; it stays to be read."""
        if self.line:
            self._write("\n")
            self.line = ""

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self.stream.fileno()).columns or 80
        except (OSError, ValueError):
            return shutil.get_terminal_size().columns

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):  # hung up, full disk, closed
            self.live, self.line = False, ""


def console_line(metrics: Mapping[str, float], frames: int, total_frames: int, width: int | None = None) -> str:
    """One line for a person, the most important first; what does not fit into ``width`` columns is left out.

    Frames, share of the budget, time left, return, evaluation, speed, and where the time goes. Without a budget of
    frames it begins with the updates.
    """
    if total_frames:
        share = min(100 * frames // total_frames, 100)
        left = duration(metrics.get("trainer/eta_seconds"))
        parts = [f"frames {frames:,}/{total_frames:,} ({share}%)", f"left {left}"]
    else:
        parts = [f"updates {metrics.get('trainer/updates', 0):,.0f}"]
    for label, name in (("return", "episode/return"), ("eval", "eval/return_mean")):
        if name in metrics:
            parts.append(f"{label} {metrics[name]:.1f}")
    if total_frames:
        parts.append(f"fps {metrics.get('collector/fps', 0.0):.1f}")
    parts.append(f"updates {metrics['trainer/updates_per_second']:.2f}/s")
    shares = {name.removeprefix("time/"): share for name, share in metrics.items() if name.startswith("time/")}
    if shares:
        parts.append(" ".join(f"{name} {100 * share:.0f}%" for name, share in shares.items()))
    line = parts[0]
    for part in parts[1:]:
        if width is not None and len(line) + len(SEPARATOR) + len(part) > width:
            break
        line += SEPARATOR + part
    return line if width is None else line[: max(width, 0)]


def duration(seconds: float | None) -> str:
    """Seconds as "2d 3h", "3h 20m", "4m 10s"; "?" when unknown."""
    if seconds is None:
        return "?"
    units = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    rest, counts = int(seconds), []
    for unit, size in units:
        count, rest = divmod(rest, size)
        counts.append((count, unit))
    first = next((i for i, (count, _) in enumerate(counts) if count), len(counts) - 1)
    return " ".join(f"{count}{unit}" for count, unit in counts[first : first + 2])
