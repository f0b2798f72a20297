"""Faults that come from outside of a training program: killed and stopped processes, signals, a full disk, spies.

Every function starts small runs below the folder that it is given, provokes one fault and returns figures by name.
`scripts/bench_reliability.py` says what they should be.
"""

import itertools
import random
import re
import resource
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from fault_program import ENDLESS, Program, compare, read_lines, run, saved_frames

from dreamer.provenance import read_starts

TWO_WORKERS = ("collector.num_collectors=2", "collector.envs_per_collector=1")
STUCK_AFTER = 5  # seconds, collector.timeout
LONG_EVALUATION = ("eval.interval=64", "eval.episodes=1_000_000")
ADDED_FRAMES = 64
SECRETS = {"WANDB_API_KEY": "planted" + 33 * "0", "HF_TOKEN": "hf_planted_in_the_environment"}
SECRET_ARGUMENTS = {"logger.api_key": "planted_as_a_key", "hub.token": "planted_as_a_token"}
LOCAL = ("127.", "::1")

Figures = dict[str, Any]


def break_worker(folder: Path, mode: str, sign: int, restarts: int) -> Figures:
    """Kill or stop one of two workers of a run that learns.

    Args:
        folder: Empty folder.
        mode: "multi_sync" or "multi_async".
        sign: SIGKILL or SIGSTOP.
        restarts: 0: the run ends with an error. Otherwise it replaces its workers and is run to its end.
    """
    budget = 800
    settings = (f"collector={mode}", *TWO_WORKERS, f"collector.timeout={STUCK_AFTER}", f"collector.restart={restarts}")
    frames = f"collector.total_frames={budget}" if restarts else ENDLESS
    with Program(folder / "run", *settings, frames) as program:
        program.wait_for_updates()
        start = time.monotonic()
        program.workers()[0].send_signal(sign)
        if restarts:
            incident = program.wait_for_incident("worker_restart")
            updates = max(line.get("trainer/updates", 0) for line in program.metrics())
            program.wait_for_updates(updates)
            figures = {
                "s to training again": time.monotonic() - start,
                "frames lost": int(re.search(r"at most (\d+) frames", incident["message"])[1]),
            }
            figures["exit code"] = program.end()
            figures["frames missing"] = max(budget - program.metrics()[-1]["frames"], 0)
        else:
            program.wait_for_incident("exception")
            figures = {"s to notice": time.monotonic() - start, "exit code": program.end()}
            figures["checkpoint"] = saved_frames(program.run_dir) is not None
        return figures | {"orphans": program.orphans()}


def end_parent(
    folder: Path, sign: int, *, mode: str = "multi_async", group: bool = False, ignored: bool = False
) -> Figures:
    """Send a signal to a run with two workers, or to all of its processes, and count what is left after 10 s.

    Args:
        folder: Empty folder.
        sign: The signal.
        mode: Of the collector.
        group: Send it to the workers as well, as a terminal does.
        ignored: Start the run with SIGINT ignored.
    """
    with Program(folder / "run", f"collector={mode}", *TWO_WORKERS, ENDLESS, ignore_sigint=ignored) as program:
        program.wait_for_updates()
        program.signal(sign, group=group)
        code = program.end()
        figures = {"exit code": code, "orphans": program.orphans()}
        if sign != signal.SIGKILL:
            recorded, saved = program.metrics()[-1]["frames"], saved_frames(program.run_dir)
            figures["frames lost"] = max(recorded - saved, 0)
        return figures


def interrupt(folder: Path, sign: int, *, evaluating: bool = False, ignored: bool = False) -> Figures:
    """Let a signal end a run, during updates or a long evaluation, and go on with ``resume=auto``."""
    run_dir, during = folder / "run", LONG_EVALUATION if evaluating else ()
    with Program(run_dir, ENDLESS, *during, ignore_sigint=ignored) as program:
        program.wait_for_updates()
        if evaluating:
            wait_for_silence(program)
        start = program.signal(sign)
        code = program.end()
        seconds = time.monotonic() - start
    return {"s to exit": seconds, "exit code": code} | resume(run_dir)


def resume(run_dir: Path) -> Figures:
    """Let an interrupted run go on for a few frames, and compare where it ended and where it began again."""
    before, saved = read_lines(run_dir / "metrics.jsonl")[-1]["frames"], saved_frames(run_dir)
    run(run_dir, "resume=auto", f"collector.total_frames={saved + ADDED_FRAMES}", "eval.episodes=1")
    after = read_lines(run_dir / "metrics.jsonl")[-1]["frames"]
    return {"frames lost": max(before - saved, 0), "frames missing": max(saved + ADDED_FRAMES - after, 0)}


def wait_for_silence(program: Program, seconds: float = 1) -> None:
    """Wait until no metrics were written for some time: the run is busy with its evaluation."""
    count, since = len(program.metrics()), time.monotonic()
    while time.monotonic() - since < seconds:
        time.sleep(0.1)
        if len(program.metrics()) != count:
            count, since = len(program.metrics()), time.monotonic()


def repeat(folder: Path, signals: Sequence[int], settings: Sequence[str]) -> Figures:
    """Compare an uninterrupted run with one that gets signals and goes on after each, file by file.

    Args:
        folder: Empty folder.
        signals: Each comes after a new checkpoint.
        settings: Overrides; {run_dir} stands for the run folder.
    """
    settings = ("collector.total_frames=320", "checkpoint.interval=64", *settings)
    whole, parts = folder / "whole", folder / "parts"
    run(whole, *fill_in(settings, whole))
    for sign in signals:
        with Program(parts, *fill_in(settings, parts), "resume=auto") as program:
            before = saved_frames(parts) or 0
            program.wait_until("new checkpoint", lambda before=before: (saved_frames(parts) or 0) > before)
            program.signal(sign)
            program.end()
    run(parts, *fill_in(settings, parts), "resume=auto")
    return {
        "starts": len(read_starts(parts / "run.json")),
        "frames": read_lines(parts / "metrics.jsonl")[-1]["frames"],
        **compare(whole, parts),
    }


def fill_in(settings: Sequence[str], run_dir: Path) -> list[str]:
    """Settings with the run folder in its place."""
    return [text.replace("{run_dir}", str(run_dir)) for text in settings]


def same_seed(folder: Path, settings: Sequence[str]) -> Figures:
    """Compare two runs of one seed."""
    for name in ("a", "b"):
        run(folder / name, "collector.total_frames=256", *settings)
    return compare(folder / "a", folder / "b")


def fill_disk(folder: Path) -> Figures:
    """Let no file of a run grow any more, for a while: neither checkpoints nor metrics can be written."""
    run_dir = folder / "run"
    with Program(run_dir, ENDLESS, "checkpoint.interval=64") as program:
        program.wait_until("checkpoint", lambda: saved_frames(run_dir))
        full = (run_dir / "metrics.jsonl").stat().st_size
        free = resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, (full, free[1]))
        incident = program.wait_for_incident("checkpoint_failed", 3)
        whole = saved_frames(run_dir)
        resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, free)
        program.wait_until("checkpoint", lambda: saved_frames(run_dir) > whole)
        program.signal(signal.SIGTERM)
        code = program.end()
    frames = [line["frames"] for line in program.metrics()]
    return {
        "frames learned meanwhile": incident["frames"] - whole,
        "exit code": code,
        "longest gap in the metrics": max(later - earlier for earlier, later in itertools.pairwise(frames)),
        **resume(run_dir),
    }


def soak(folder: Path, mode: str, kills: int, minutes: float) -> Figures:
    """Kill a run again and again at random moments, starts included; start it again each time, at last to its end.

    Args:
        folder: Empty folder.
        mode: Of the collector.
        kills: How many times.
        minutes: All killed runs together, roughly.
    """
    budget, moments, orphans, run_dir = 1_000, random.Random(0), 0, folder / "run"
    settings = (f"collector={mode}", *TWO_WORKERS, "checkpoint.interval=64", "eval.interval=0", "resume=auto")
    for _ in range(kills):
        with Program(run_dir, *settings, ENDLESS) as program:
            time.sleep(moments.uniform(0, 2 * 60 * minutes / kills))
            program.signal(signal.SIGKILL)
            program.end()
            orphans += program.orphans(30)  # workers that are killed out of their imports notice it after them
    reached = saved_frames(run_dir) or 0
    budget = max(budget, reached)
    run(run_dir, *settings, f"collector.total_frames={budget}", seconds=600)
    return {
        "kills": kills,
        "frames before the last start": reached,
        "went on": reached > 0,
        "frames missing": max(budget - read_lines(run_dir / "metrics.jsonl")[-1]["frames"], 0),
        "orphans": orphans,
    }


def spy(folder: Path) -> Figures:
    """Look for planted keys in every file of a run with all loggers, and for sockets that others can reach."""
    arguments = [f"+{name}={value}" for name, value in SECRET_ARGUMENTS.items()]
    settings = ("collector=multi_sync", *TWO_WORKERS, ENDLESS, "logger.backends=[tensorboard,wandb]", *arguments)
    with Program(folder / "run", *settings, environment=SECRETS | {"WANDB_SILENT": "true"}) as program:
        program.wait_for_updates()
        sockets = [address for process in program.family() for address in list_public_sockets(process)]
        program.signal(signal.SIGTERM)
        code = program.end()
    files = [path for path in program.run_dir.rglob("*") if path.is_file()]
    found = count_secrets([*files, program.log], [*SECRETS.values(), *SECRET_ARGUMENTS.values()])
    return {"files": len(files), "secrets found": found, "public sockets": len(sockets), "exit code": code}


def count_secrets(files: Sequence[Path], secrets: Sequence[str]) -> int:
    """How often one of the secrets is in a file or in its name."""
    contents = [path.name.encode() + path.read_bytes() for path in files]
    return sum(secret.encode() in content for secret in secrets for content in contents)


def list_public_sockets(process: psutil.Process) -> list[str]:
    """Addresses at which a process listens and that other machines can reach."""
    connections = process.net_connections(kind="inet")
    addresses = [c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN]
    return [address for address in addresses if not address.startswith(LOCAL)]


def grow(folder: Path, frames: int) -> Figures:
    """Measure the memory of a long run once its replay is full."""
    settings = ("collector=sync", "replay_buffer.size=2_000", "train_ratio=0.5", "logger.interval=500")
    run(folder / "run", *settings, f"collector.total_frames={frames + 5_000}", seconds=600)
    lines = [line for line in read_lines(folder / "run" / "metrics.jsonl") if "trainer/memory_gb" in line]
    memory = [line["trainer/memory_gb"] for line in lines if line["frames"] > 5_000]
    first, last = sum(memory[:5]) / 5, sum(memory[-5:]) / 5
    return {"steps": frames, "MB per 1,000 steps": 1e3 * (last - first) / (frames / 1e3)}
