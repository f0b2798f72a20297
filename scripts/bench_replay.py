"""Cost of replay on one CPU thread: ours, TorchRL's slice sampler, and a plain copy of the same bytes.

    python scripts/bench_replay.py
    python scripts/bench_replay.py --image-size 84 --records 100000 --json replay.json

Prints median and minimum of the CPU time of this process, measured in turn in one run, and ratios to the plain
copy. TorchRL's buffer holds the records without latents: it would copy those of every step of a window.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer

from dreamer.replay import SequenceReplay

LATENTS = ("belief", "state")


def make_record(args: argparse.Namespace) -> TensorDict:
    """One record of a pixel task, as the 12m model stores it by default."""
    flag = torch.zeros(1, dtype=torch.bool)
    return TensorDict(
        {
            "pixels": torch.zeros(args.image_size, args.image_size, 3, dtype=torch.uint8),
            "action": torch.zeros(args.actions),
            "reward": torch.zeros(1),
            "is_init": flag,
            "terminated": flag,
            "done": flag,
            "belief": torch.zeros(args.belief, dtype=torch.bfloat16),
            "state": torch.zeros(args.state, dtype=torch.uint8),
        }
    )


def make_records(record: TensorDict, args: argparse.Namespace, count: int) -> TensorDict:
    """`count` records, alternating between the streams."""
    records = record.expand(count).clone()
    records["pixels"].random_(256)
    records["stream"] = torch.arange(count) % args.streams
    return records


def make_ours(record: TensorDict, args: argparse.Namespace) -> SequenceReplay:
    """SequenceReplay, filled so that its memory is in use."""
    replay = SequenceReplay(
        record,
        capacity=args.records,
        num_streams=args.streams,
        batch_size=args.batch_size,
        sequence_length=args.sequence_length,
        online=False,
    )
    chunk = make_records(record, args, 16 * args.streams)
    while replay.write_count < replay.capacity:
        replay.extend(chunk)
    return replay


def make_torchrl(record: TensorDict, args: argparse.Namespace) -> TensorDictReplayBuffer:
    """TorchRL's buffer with slices that are left as they were stored, filled with episodes one after another."""
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(args.records),
        sampler=SliceSampler(
            slice_len=args.sequence_length, end_key="done", cache_values=True, init_key=None, truncated_key=None
        ),
        batch_size=args.batch_size * args.sequence_length,
    )
    episode = make_records(record.exclude(*LATENTS), args, min(args.episode_length, args.records))
    episode["done"][-1] = True
    while buffer.write_count < args.records:
        buffer.extend(episode)
    return buffer


def measure(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """CPU milliseconds of each call, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            result = call()
            times[name].append((time.process_time() - start) * 1e3)
            del result
    return {name: {"median": statistics.median(t[1:]), "min": min(t[1:])} for name, t in times.items()}


def bench(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measure sampling, writing and write-back."""
    record = make_record(args)
    ours, theirs = make_ours(record, args), make_torchrl(record, args)
    batch = ours.sample()
    batch_bytes = sum(leaf.nbytes for leaf in batch.values(True, True))
    source = torch.zeros(2 * batch_bytes, dtype=torch.uint8)
    step, chunk = (make_records(record, args, count) for count in (args.streams, 16 * args.streams))
    latents = record.select(*LATENTS).expand(args.batch_size, args.sequence_length).clone()
    origin = batch["context", "stream"], batch["context", "position"]
    print(f"{ours.describe()}\n{batch_bytes / 1e6:.1f} MB per batch, {len(step)} and {len(chunk)} records per write\n")
    calls = {
        "sample: plain copy": lambda: source[batch_bytes // 2 :][:batch_bytes].clone(),
        "sample: SequenceReplay": ours.sample,
        "sample: TorchRL slices": theirs.sample,
        "write_context: SequenceReplay": lambda: ours.write_context(*origin, latents),
        "extend, one step: SequenceReplay": lambda: ours.extend(step),
        "extend, one step: TorchRL": lambda: theirs.extend(step),
        "extend, 16 steps: SequenceReplay": lambda: ours.extend(chunk),
        "extend, 16 steps: TorchRL": lambda: theirs.extend(chunk),
    }
    return measure(calls, args.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16, help="windows per batch")
    parser.add_argument("--sequence-length", type=int, default=64, help="training steps per window")
    parser.add_argument("--image-size", type=int, default=64, help="pixels per side")
    parser.add_argument("--actions", type=int, default=6, help="action dimensions")
    parser.add_argument("--belief", type=int, default=2048, help="deterministic latent dimensions, bfloat16")
    parser.add_argument("--state", type=int, default=32, help="categorical latents, one byte each")
    parser.add_argument("--records", type=int, default=40_000, help="records held by each replay")
    parser.add_argument("--streams", type=int, default=16, help="environment streams")
    parser.add_argument("--episode-length", type=int, default=500, help="records per episode for TorchRL")
    parser.add_argument("--repeats", type=int, default=50, help="measurements per line")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = bench(args)
    copy = figures["sample: plain copy"]["median"]
    print(f"{'CPU ms':36}{'median':>9}{'min':>9}{'to copy':>9}{'us/record':>11}")
    for name, times in figures.items():
        count = {"extend, one step": args.streams, "extend, 16 steps": 16 * args.streams}.get(name.split(":")[0])
        times["ratio"] = times["median"] / copy
        per_record = f"{times['median'] / count * 1e3:11.1f}" if count else ""
        print(f"{name:36}{times['median']:9.2f}{times['min']:9.2f}{times['ratio']:9.2f}{per_record}")
    if args.json:
        args.json.write_text(json.dumps({"settings": vars(args) | {"json": None}, "cpu_ms": figures}, indent=2))


if __name__ == "__main__":
    main()
