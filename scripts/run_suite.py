"""Run tasks x distractions x agents x seeds, a few at a time, and gather their learning curves.

    python scripts/run_suite.py --phase phase1_validation --jobs 2 --out runs/phase1
    python scripts/run_suite.py --tasks medium,pendulum_swingup --distractions none,color_grid_max --seeds 0-4 \
        --jobs 4 --gpus 0,1 --out runs/mine agent/size=25m
    python scripts/run_suite.py --phase phase4_sweep --out runs/phase4 --dry-run | xargs -P 8 -d '\\n' -n 1 sh -c

Every cell is one `python dreamer/train.py ...` with the run folder `<out>/<task>__<distraction>__<agent>__<seed>`;
further arguments are overrides for all of them. Called again with the same folder, it skips the cells that are
finished, also those that were started by hand from the lines of `--dry-run`, and runs what is left: a run that has a
checkpoint goes on from it, the folder of any other is moved aside. A cell that fails does not stop the others: its
output is in `console.log` of its folder, the failed cells are listed at the end and the exit code is 1. Ctrl-C and
SIGTERM let all runs save and end, a second one ends them at once; the exit code is then 75, like that of a run.

At the end, `<out>/results.json` holds `episode/return` and `<out>/results_eval.json` `eval/return_mean` over frames, in
the format that `scripts/plot_results.py` reads.
"""

import argparse
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from bench_common import load_config
from results_format import Run, join_method, read_curve, write_atomically, write_runs

from dreamer.checkpoint_files import list_checkpoints
from dreamer.interruption import EXIT_INTERRUPTED
from envs.suite import GROUPS, SuiteTask, select_tasks

TRAIN = Path(__file__).parents[1] / "dreamer/train.py"
CURVES = {"results.json": "episode/return", "results_eval.json": "eval/return_mean"}
CELL_KEYS = {"agent": "--agents", "seed": "--seeds", "run_dir": "--out", "env/distraction": "--distractions"}
CELL_KEYS |= {"env": "--tasks", "env.name": "--tasks", "env.task": "--tasks", "experiment": "--phase"}
CELL_KEYS |= {"resume": "--out"}
POLL = 0.2  # seconds between two looks at the children
LEVELS = "none,color_grid_action,color_grid_reward,color_grid_sequence,color_grid_action_cross_sequence"

# What each phase of the evaluation protocol covers; configs/experiment/<phase>.yaml has the settings of its runs.
PHASES = {
    "phase1_validation": {"tasks": "easy", "distractions": "none", "seeds": "0"},
    "phase2_ablation": {
        "tasks": "walker_walk",
        "distractions": f"{LEVELS},color_grid_minimum,color_grid_max,natural_video",
        "seeds": "0-4",
    },
    "phase3_full": {"tasks": "medium,walker_run", "distractions": "color_grid_max", "seeds": "0-4"},
    "phase4_sweep": {
        "tasks": "walker_walk,cheetah_run,hopper_stand,cartpole_swingup",
        "distractions": "none,color_grid_action,color_grid_max",
        "seeds": "0-4",
    },
}


class Cell(NamedTuple):
    """One run of the suite."""

    task: SuiteTask
    distraction: str
    agent: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def overrides(self) -> list[str]:
        """Arguments of `dreamer/train.py` that make this cell what it is."""
        return [
            f"agent={self.agent}",
            f"env={self.task.backend}",
            f"env.name={self.task.domain}",
            f"env.task={self.task.task}",
            f"env/distraction={self.distraction}",
            f"seed={self.seed}",
            f"run_dir={quote(str(self.folder))}",
            "resume=auto",
        ]


class Setup(NamedTuple):
    """What all cells share."""

    overrides: Sequence[str]
    jobs: int  # at a time
    gpus: Sequence[str]  # shared among the jobs; none for no choice
    lock: int = -1  # file descriptor that the children hold open, so that the folder is taken while one of them lives


class Job(NamedTuple):
    """A cell that is running."""

    cell: Cell
    process: subprocess.Popen
    slot: int
    start: float


def quote(value: str) -> str:
    """A value as Hydra reads it on the command line."""
    if re.fullmatch(r"[\w./+-]+", value):
        return value
    doubled = re.sub(r"(\\+)(?='|$)", r"\1\1", value)  # a backslash means itself except before a quote
    return "'" + doubled.replace("'", "\\'") + "'"


def make_cells(args: argparse.Namespace) -> list[Cell]:
    """All combinations: seeds vary slowest, so that every task and distraction has a result early."""
    return [
        Cell(task, distraction, agent, seed, args.out / f"{task.id}__{distraction}__{agent}__{seed}")
        for seed, agent, distraction, task in product(args.seeds, args.agents, args.distractions, args.tasks)
    ]


def make_command(cell: Cell, shared: Sequence[str]) -> list[str]:
    """The command line of a cell; a shared override may change the action repeat."""
    return [sys.executable, str(TRAIN), f"env.frame_skip={cell.task.frame_skip}", *shared, *cell.overrides()]


def is_finished(folder: Path) -> bool:
    """Whether a run ended as it should: there is a summary of it, or its last evaluation.

    A run that was not started by this program leaves no summary; one is written here.
    """
    if (folder / "summary.json").exists():
        return True
    if not (folder / "config.yaml").exists() or not (folder / "metrics.jsonl").exists():
        return False
    frames, _ = read_curve(folder / "metrics.jsonl", CURVES["results_eval.json"])
    if not frames or frames[-1] < read_total_frames(folder / "config.yaml"):
        return False
    write_summary(folder, {"started_by": "hand"})
    return True


def read_total_frames(config: Path) -> int:
    """The budget of a run."""
    from omegaconf import OmegaConf

    return OmegaConf.load(config).collector.total_frames


def write_summary(folder: Path, content: dict[str, Any]) -> None:
    """Mark a run as finished."""
    write_atomically(folder / "summary.json", json.dumps(content, indent=1).encode())


def can_go_on(folder: Path) -> bool:
    """Whether an unfinished run has a checkpoint."""
    return (folder / "config.yaml").exists() and bool(list_checkpoints(folder / "checkpoints"))


def move_aside(folder: Path) -> None:
    """Rename the folder of a run that cannot go on, so that it can start afresh."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.unfinished{number}")).exists():
        number += 1
    folder.rename(aside)
    print(f"{folder.name}: unfinished without a checkpoint, moved to {aside.name}", flush=True)


def start(cell: Cell, setup: Setup, slot: int) -> Job:
    """Start the process of a cell or let it go on, in a process group of its own."""
    if can_go_on(cell.folder):
        print(f"{cell.name}: goes on from its newest checkpoint", flush=True)
    elif cell.folder.exists():
        move_aside(cell.folder)
    cell.folder.mkdir(parents=True, exist_ok=True)
    command = make_command(cell, setup.overrides)
    environment = dict(os.environ)
    if setup.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = setup.gpus[slot % len(setup.gpus)]
    with open(cell.folder / "console.log", "ab") as log:
        log.write(f"{shlex.join(command)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            pass_fds=[setup.lock],
        )
    return Job(cell, process, slot, time.monotonic())


def kill_group(process: subprocess.Popen) -> None:
    """End a child and its workers at once."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def stop(jobs: Sequence[Job]) -> None:
    """Let all jobs save and end; whoever interrupts this ends them at once."""
    for job in jobs:
        job.process.terminate()  # not its workers: it needs them until it has saved
        print(f"{job.cell.name}: waiting until it has saved", flush=True)
    try:
        for job in jobs:
            finish(job, job.process.wait())
    finally:
        for job in jobs:
            kill_group(job.process)


def finish(job: Job, code: int) -> None:
    """Clear up after a child that has ended, and say how it did."""
    kill_group(job.process)  # workers that it left behind
    seconds = round(time.monotonic() - job.start, 1)
    if code == 0:
        write_summary(job.cell.folder, {"started_by": "run_suite.py", "seconds": seconds})
    failure = f"FAILED with exit code {code}, see {job.cell.folder / 'console.log'}"
    verdicts = {0: "finished", EXIT_INTERRUPTED: "interrupted, saved", -signal.SIGTERM: "ended before it could save"}
    print(f"{job.cell.name}: {verdicts.get(code, failure)} after {seconds:g} s", flush=True)


def run_cells(cells: Sequence[Cell], setup: Setup) -> list[Cell]:
    """Run cells, a few at a time; return those that failed. KeyboardInterrupt: one was interrupted, all have ended."""
    waiting, running, failed = list(cells), [], []
    try:
        while waiting or running:
            while waiting and len(running) < setup.jobs:
                slot = min(set(range(setup.jobs)) - {job.slot for job in running})
                cell = waiting.pop(0)
                print(f"{cell.name}: started, {len(waiting)} waiting", flush=True)
                running.append(start(cell, setup, slot))
            time.sleep(POLL)
            for job in list(running):
                if (code := job.process.poll()) is not None:
                    running.remove(job)
                    finish(job, code)
                    if code == EXIT_INTERRUPTED:  # whoever ends one run, a scheduler say, wants all to end
                        raise KeyboardInterrupt
                    if code:
                        failed.append(job.cell)
    finally:
        stop(running)
    return failed


def gather(cells: Sequence[Cell], out: Path) -> None:
    """Write the curves of the finished cells."""
    for file, metric in CURVES.items():
        runs = []
        for cell in cells:
            if (cell.folder / "summary.json").exists() and (cell.folder / "metrics.jsonl").exists():
                xs, ys = read_curve(cell.folder / "metrics.jsonl", metric)
                name = "dmc_" + cell.task.id if cell.task.backend == "dmc" else cell.task.id
                runs.append(Run(name, join_method(cell.agent, cell.distraction), cell.seed, xs, ys))
        write_runs(out / file, runs)
        print(f"{out / file}: {len(runs)} of {len(cells)} runs, {metric} over frames")


def print_commands(cells: Sequence[Cell], shared: Sequence[str]) -> None:
    """Print the command lines of the cells that are not finished."""
    for cell in cells:
        if not is_finished(cell.folder):
            if (cell.folder / "config.yaml").exists() and not can_go_on(cell.folder):
                print(f"{cell.name}: first move this folder away, it has no checkpoint", file=sys.stderr)
            print(shlex.join(make_command(cell, shared)))


@contextmanager
def owned(out: Path, shared: Sequence[str]) -> Iterator[int]:
    """Own the folder of a suite, alone and always with the same overrides; yields the descriptor of the lock.

    Raises:
        SystemExit: another program or a run of it is alive there, or its runs had other overrides.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"--out={out}: another run_suite.py or one of its runs is alive there, name another folder")
        settings = out / "suite.json"
        if settings.exists():
            before = json.loads(settings.read_text())["overrides"]
            if before != list(shared):
                sys.exit(f"--out={out}: has runs with the overrides {before}, not {list(shared)}; name another folder")
        else:
            write_atomically(settings, json.dumps({"overrides": list(shared)}).encode())
        yield lock.fileno()


def check_overrides(cells: Sequence[Cell], shared: Sequence[str]) -> None:
    """Compose the configuration of every choice once, so that a misspelt one is found before hours of runs.

    Raises:
        SystemExit: with what Hydra says.
    """
    for cell in {(cell.distraction, cell.agent): cell for cell in cells}.values():
        try:
            load_config(*make_command(cell, shared)[2:])
        except Exception as error:  # noqa: BLE001, Hydra raises errors of many kinds
            sys.exit(f"{cell.name}: {error}")


def parse_seeds(text: str) -> list[int]:
    """Seeds from "0,1,5" or "0-4" or both."""
    seeds: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise ValueError(f"seeds={text!r}: give numbers and ranges, like 0,1,5 or 0-4")
        seeds += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(seeds))


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    phases = ", ".join(PHASES)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", choices=PHASES, metavar="PHASE", help=f"other defaults and settings: {phases}")
    parser.add_argument("--tasks", help=f"tasks like cheetah_run, groups: {', '.join(GROUPS)}")
    parser.add_argument("--distractions", help="choices of env/distraction; default none")
    parser.add_argument("--agents", default="dreamer_v3", help="choices of agent")
    parser.add_argument("--seeds", help="like 0,1,5 or 0-4; default 0")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--gpus", default="", help="indices of GPUs to share among the jobs; all see all by default")
    parser.add_argument("--out", type=Path, required=True, help="folder of the suite")
    parser.add_argument("--dry-run", action="store_true", help="print the commands of the unfinished cells")
    parser.add_argument("overrides", nargs="*", help="for all runs, for example agent/size=25m")
    return parser


def parse_args() -> argparse.Namespace:
    """The options, checked; names of tasks are looked up."""
    parser = make_parser()
    args = parser.parse_args()
    plan = {"tasks": "", "distractions": "none", "seeds": "0"} | PHASES.get(args.phase, {})
    for name, value in plan.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.jobs < 1:
        parser.error(f"--jobs={args.jobs}: give at least 1")
    for name in ("tasks", "distractions", "agents", "gpus"):
        setattr(args, name, list(dict.fromkeys(filter(None, getattr(args, name).split(",")))))
    try:
        args.tasks, args.seeds = select_tasks(args.tasks), parse_seeds(args.seeds)
    except ValueError as error:
        parser.error(str(error))
    for name in ("tasks", "distractions", "agents", "seeds"):
        if not getattr(args, name):
            parser.error(f"--{name}: nothing to run, give some or a --phase")
    for override in args.overrides:
        if (option := CELL_KEYS.get(override.partition("=")[0].lstrip("+~"))) is not None:
            parser.error(f"{override}: this differs between the runs, use {option}")
    args.out = args.out.resolve()
    return args


def main() -> None:
    args = parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell starts background jobs without it
        signal.signal(number, signal.default_int_handler)
    shared = [f"experiment={args.phase}"] if args.phase else []
    shared += args.overrides
    cells = make_cells(args)
    check_overrides(cells, shared)
    threads = [f"threads={max((os.cpu_count() or 1) // args.jobs, 1)}"]
    if args.jobs == 1 or any(override.startswith("threads=") for override in args.overrides):
        threads = []
    setup = Setup([*threads, *shared], args.jobs, args.gpus)
    if args.dry_run:
        print_commands(cells, setup.overrides)
        return
    with owned(args.out, shared) as lock:
        todo = [cell for cell in cells if not is_finished(cell.folder)]
        done = len(cells) - len(todo)
        print(f"{len(cells)} cells, {done} finished, {args.jobs} at a time, in {args.out}", flush=True)
        try:
            failed = run_cells(todo, setup._replace(lock=lock))
        except KeyboardInterrupt:
            print("interrupted; call again with the same arguments to go on", file=sys.stderr)
            sys.exit(EXIT_INTERRUPTED)
        gather(cells, args.out)
    if failed:
        sys.exit("failed: " + ", ".join(cell.name for cell in failed))


if __name__ == "__main__":
    main()
