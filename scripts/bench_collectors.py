"""Speed of collection: our collectors, as training builds them, and TorchRL's own, in one run.

    python scripts/bench_collectors.py
    python scripts/bench_collectors.py --workers 1,2,4,8 --observations pixels --size 12m
    python scripts/bench_collectors.py --policy random env.name=walker env.task=walk
    python scripts/bench_collectors.py --rivals sync,multi_sync,multi_async --json collectors.json

Every row collects for `--seconds` after a warm-up, and what is collected goes into the replay. `steps/s` are agent
steps per second on the clock, `frames/s` the simulator frames in them, `CPU ms/frame` the CPU time of this process and
all workers. `x frames/s` and `x CPU` are ratios to TorchRL's `Collector` with the same observations; it has no fast
rendering, so `pixels_fast` is compared with its `pixels`. Settings are overridden as on the command line of
`dreamer/train.py`. TorchRL's side is measured on dm_control only.
"""

import argparse
import multiprocessing
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import psutil
import torch
from bench_common import describe_load, load_config, print_table, write_json
from tensordict import TensorDictBase
from torch import nn
from torchrl.collectors import BaseCollector
from torchrl.data import TensorSpec

from dreamer.collection import MODES, make_collector, to_steps
from dreamer.settings import Start
from dreamer.train import build
from envs import make_env

OBSERVATIONS = {
    "state": ("env.from_pixels=false",),
    "pixels": ("env.from_pixels=true", "env.render.fast=false"),
    "pixels_fast": ("env.from_pixels=true", "env.render.fast=true"),
}
RING = 512  # records per stream; the oldest are overwritten
WAIT = 2e-3  # seconds between two looks at free-running workers
PATIENCE = 60.0  # seconds without progress after which a row is given up
COLUMNS = {"collector": "", "workers": "d", "observation": "", "policy": "", "steps/s": ",.0f", "frames/s": ",.0f"}
COLUMNS |= {"CPU ms/frame": ".3f", "x frames/s": ".2f", "x CPU": ".2f"}


class Session(NamedTuple):
    """A running collector and what it needs to be measured."""

    collector: Any
    count: Callable[[], int]  # collects or waits until there is more; returns the agent steps collected so far


class RandomActions(nn.Module):
    """Uniformly random actions; the latents stay what they are.

    Training's own random phase runs the policy as well, to record its latents.
    """

    def __init__(self, action_spec: TensorSpec):
        super().__init__()
        self.action_spec = action_spec
        self.device = nn.Parameter(torch.zeros(()))  # collectors look for one

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        tensordict["action"] = self.action_spec.rand(tensordict.batch_size)
        tensordict["next"] = tensordict.select("belief", "state")
        return tensordict


def make_random_collector(**settings: Any) -> BaseCollector:
    """:func:`make_collector` with a policy that costs next to nothing."""
    env = make_env(**settings["env"])
    settings["policy"] = RandomActions(env.action_spec)
    env.close()
    return make_collector(**settings)


def make_ours(args: argparse.Namespace, config: dict[str, Any], mode: str, workers: int, folder: str) -> Session:
    """The collector and the replay of a training run."""
    frame_skip, collection = config["env"]["frame_skip"], config["collector"]
    collection["frames_per_batch"] = round_up(collection["frames_per_batch"], workers * frame_skip)
    collection["init_random_frames"] = 0
    config["replay_buffer"] |= {"size": RING * workers, "batch_size": 1, "sequence_length": RING // 4, "prefetch": 0}
    with patch("dreamer.train.make_collector", make_random_collector if args.policy == "random" else make_collector):
        trainer = build(Start(config, Path(folder)))
    if mode == "multi_async":
        return Session(trainer.collector, follow(trainer.collector, lambda: trainer.replay_buffer.write_count))
    return Session(trainer.collector, pull(trainer.collector, trainer._process_batch_hook))


def make_rival(args: argparse.Namespace, config: dict[str, Any], mode: str, workers: int, folder: str) -> Session:
    """TorchRL's environment, policy, replay and collector."""
    import torchrl_collectors  # not in the workers of ours: it takes a second

    env = config["env"]
    frames = round_up(config["collector"]["frames_per_batch"], workers * env["frame_skip"])
    collector, replay = torchrl_collectors.make_collector(
        mode,
        env=env,
        size=None if args.policy == "random" else config["agent"]["size"],
        workers=workers,
        steps_per_batch=to_steps(frames, env["frame_skip"]),
        capacity=RING * workers,
        folder=folder,
    )
    if mode == "multi_async":
        return Session(collector, follow(collector, lambda: replay.write_count))
    keep = torchrl_collectors.keep_stored
    return Session(collector, pull(collector, lambda batch: replay.extend(keep(batch).reshape(-1))))


def round_up(value: int, unit: int) -> int:
    """The next multiple of a unit."""
    return -(-value // unit) * unit


def pull(collector: Any, process: Callable[[Any], Any]) -> Callable[[], int]:
    """Count the steps of a collector that waits to be asked: each call takes a batch and stores it."""
    batches, steps = iter(collector), 0

    def count() -> int:
        nonlocal steps
        batch = next(batches)
        steps += batch.numel()
        process(batch)
        return steps

    return count


def follow(collector: Any, written: Callable[[], int]) -> Callable[[], int]:
    """Count the steps that free-running workers write: each call waits until there are more."""
    collector.start()

    def count() -> int:
        seen, deadline = written(), time.monotonic() + PATIENCE
        while (now := written()) == seen:
            if not all(process.is_alive() for process in collector.procs):
                raise RuntimeError("a worker died, its output says why")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the workers wrote nothing for {PATIENCE:g} s")
            time.sleep(WAIT)
        return now

    return count


def measure(session: Session, workers: int, seconds: float) -> tuple[float, float]:
    """Agent steps per second on the clock, and CPU milliseconds per agent step over all processes."""
    processes = [psutil.Process()] + [psutil.Process(p.pid) for p in getattr(session.collector, "procs", ())]

    def cpu_seconds() -> float:
        return sum(times.user + times.system for times in (process.cpu_times() for process in processes))

    start, counts = time.monotonic(), 0
    while counts < 2 * workers or time.monotonic() - start < seconds / 3:  # warm-up
        before, counts = session.count(), counts + 1
    start, cpu, after = time.monotonic(), cpu_seconds(), before
    while time.monotonic() - start < seconds:
        after = session.count()
    elapsed, cpu = time.monotonic() - start, cpu_seconds() - cpu
    return (after - before) / elapsed, cpu / (after - before) * 1e3


@contextmanager
def no_orphans() -> Iterator[None]:
    """End every worker that was started inside, whatever happens."""
    before = set(multiprocessing.active_children())
    try:
        yield
    finally:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
            process.join()


def measure_row(args: argparse.Namespace, side: str, mode: str, workers: int, observation: str) -> dict[str, Any]:
    """Build one collector, measure it, and end its workers."""
    config = load_config(
        f"agent/size={args.size}",
        f"collector={mode}",
        f"collector.num_collectors={workers}",
        "device=cpu",
        "logger.backends=[]",
        *OBSERVATIONS[observation],
        *args.overrides,
    )
    print(f"{side} {mode}, {workers} workers, {observation} ...", file=sys.stderr, flush=True)
    torch.manual_seed(config["seed"])
    threads = torch.get_num_threads()
    with no_orphans(), tempfile.TemporaryDirectory() as folder:
        make = make_ours if side == "ours" else make_rival
        session = make(args, config, mode, workers, folder)
        steps_per_second, cpu = measure(session, workers, args.seconds)
        session.collector.shutdown()  # not after an error: it would wait for workers that died
        torch.set_num_threads(threads)  # MultiCollector lowers it
    frame_skip = config["env"]["frame_skip"]
    rates = {"steps/s": steps_per_second, "frames/s": steps_per_second * frame_skip, "CPU ms/frame": cpu / frame_skip}
    policy = "random" if args.policy == "random" else args.size
    return {"collector": f"{side} {mode}", "workers": workers, "observation": observation, "policy": policy} | rates


def bench(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every combination."""
    dmc = load_config(*args.overrides)["env"]["backend"] == "dmc"
    combinations = [
        (side, mode, workers, observation)
        for observation in args.observations
        for side, modes in (("ours", args.modes), ("TorchRL", args.rivals))
        for mode in modes
        for workers in ([1] if mode == "sync" else args.workers)
        if side == "ours" or (dmc and observation != "pixels_fast")
    ]
    rows = [measure_row(args, *combination) for combination in combinations]
    rivals = {row["observation"]: row for row in rows if row["collector"] == "TorchRL sync"}
    for row in rows:
        rival = rivals.get(row["observation"].removesuffix("_fast"))
        for ratio, column in (("x frames/s", "frames/s"), ("x CPU", "CPU ms/frame")):
            row[ratio] = row[column] / rival[column] if rival else None
    return rows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default=",".join(MODES), help="collectors of ours")
    parser.add_argument("--rivals", default="sync", help="collectors of TorchRL, same names; empty for none")
    parser.add_argument("--workers", default="2", help="numbers of worker processes")
    parser.add_argument("--observations", default=",".join(OBSERVATIONS), help=f"of {', '.join(OBSERVATIONS)}")
    parser.add_argument("--size", default="12m", help="model size, configs/agent/size")
    parser.add_argument("--policy", choices=("model", "random"), default="model", help="what acts")
    parser.add_argument("--seconds", type=float, default=4.0, help="measured time of each row")
    parser.add_argument("--quick", action="store_true", help="other defaults: one second of few rows, debug model")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("overrides", nargs="*", help="for example env.name=walker env.task=walk")
    args = parser.parse_args()
    if args.quick:
        parser.set_defaults(observations="state", modes="sync,multi_async", workers="1", size="debug", seconds=1.0)
        args = parser.parse_args()
    for name, choices in (("modes", MODES), ("rivals", MODES), ("observations", OBSERVATIONS)):
        given = [item for item in getattr(args, name).split(",") if item]
        setattr(args, name, given)
        if unknown := set(given) - set(choices):
            parser.error(f"--{name}: {sorted(unknown)} unknown, choose from {', '.join(choices)}")
    args.workers = [int(count) for count in args.workers.split(",")]
    return args


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the workers end
    torch.set_num_threads(1)
    rows = bench(args)
    print(f"\n{describe_load()}, {args.seconds:g} s per row\n")
    print_table(rows, COLUMNS)
    write_json(args.json, vars(args), rows)


if __name__ == "__main__":
    main()
