"""Cost of one full DreamerV3 update: ours, and TorchRL's own DreamerV3 parts, measured in turn in one run.

    python scripts/bench_update.py                                    # 12m, B=8, T=32, float32, one thread
    python scripts/bench_update.py --size 1m
    python scripts/bench_update.py --autocast bfloat16
    python scripts/bench_update.py --device cuda --json update.json   # B=16, T=64, bfloat16, all modes

An update is: sample from the replay, losses, backward, optimiser, target network, new latents back into the replay. On
a CPU the figures are seconds of CPU time of this process, on a GPU seconds on the clock, with synchronisation. On a CPU
every side runs with `dreamer.allocator.keep_freed_memory()`. TorchRL's side is `scripts/torchrl_dreamer.py`; it has
strided convolutions only. Modes: eager, compiled, captured (forward and backward in a CUDA graph), compiled+captured.
TorchRL compiles the whole step, which takes minutes; ours compiles the networks outside the loops over time.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchrl_dreamer
from bench_common import describe_load, load_config, print_table, write_json
from tensordict import TensorDictBase
from torchrl.data import Bounded, Composite

from dreamer.agents import EnvSpec, load
from dreamer.allocator import keep_freed_memory
from dreamer.hooks import SampleReplay, WriteBackContext
from dreamer.replay import SequenceReplay
from dreamer.steppers import CAPTURE_AFTER

MODES = ("eager", "compiled", "captured", "compiled+captured")
IMAGE_SIZE = 64
ACTION_SIZE = 6
EPISODE = 500  # records
DEFAULTS = {
    "cpu": {"batch": 8, "length": 32, "repeats": 3, "autocast": "false", "modes": "eager"},
    "cuda": {"batch": 16, "length": 64, "repeats": 20, "autocast": "bfloat16", "modes": ",".join(MODES)},
}


class Contender(NamedTuple):
    """Something to measure."""

    name: str
    update: Callable[[], Any]
    parameters: int  # trained


def make_ours(args: argparse.Namespace, downsample: str, mode: str) -> Contender:
    """Our agent with its replay and stepper, exactly as training builds them."""
    config = load_config(
        f"agent/size={args.size}",
        f"agent.downsample={downsample}",
        f"optimization.autocast={args.autocast}",
        f"optimization.compile.enabled={'compiled' in mode}",
        f"optimization.cudagraph={'captured' in mode}",
        f"replay_buffer.prefetch={int(args.device == 'cuda')}",
    )
    pixels = Bounded(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8)
    knobs, device = dict(config["agent"]), torch.device(args.device)
    agent = load(knobs.pop("name")).build(
        env_spec=EnvSpec(Composite(pixels=pixels), Bounded(-1, 1, (ACTION_SIZE,))),
        device=device,
        optimization=config["optimization"],
        **knobs,
    )
    settings = config["replay_buffer"] | {"batch_size": args.batch, "sequence_length": args.length}
    del settings["size"], settings["batch_unit"]
    replay = SequenceReplay(agent.record, capacity=args.records, num_streams=1, device=device, **settings)
    records = agent.record.expand(EPISODE).clone()
    records["pixels"].random_(256)
    records["action"].uniform_(-1, 1)
    records["is_init"][0] = records["done"][-1] = True
    records["stream"] = torch.zeros(EPISODE, dtype=torch.int64)
    while replay.write_count < replay.capacity:
        replay.extend(records)
    sample, write_back = SampleReplay(replay), WriteBackContext(replay)

    def update() -> TensorDictBase:
        batch = sample(None)
        metrics = agent.stepper.step(None, batch)
        write_back(batch)
        return metrics

    return Contender(f"ours, {downsample}", update, count_parameters(agent.loss))


def make_rival(args: argparse.Namespace, mode: str) -> Contender:
    """TorchRL's parts, with the same optimiser settings."""
    config, device, cuda = load_config(f"agent/size={args.size}"), torch.device(args.device), args.device == "cuda"
    size, image = config["agent"]["size"], (3, IMAGE_SIZE, IMAGE_SIZE)
    optimizer = {key: config["optimization"][key] for key in ("lr", "agc", "beta1", "beta2", "eps", "warmup_steps")}
    stepper = torchrl_dreamer.make_stepper(
        size,
        image,
        ACTION_SIZE,
        device=device,
        bfloat16=args.autocast == "bfloat16",
        compile="compiled" in mode,
        cudagraph="captured" in mode,
        **optimizer,
    )
    replay = torchrl_dreamer.make_replay(args.records, args.batch, args.length, prefetch=int(cuda), pin=cuda)
    torchrl_dreamer.fill_replay(replay, size, image, ACTION_SIZE, EPISODE)
    update = torchrl_dreamer.Update(stepper, replay, args.length, device)
    if mode != "eager":
        stepper.warmup(update.sample()[0])
    return Contender("TorchRL, strided", update, count_parameters(stepper.loss_module))


def count_parameters(loss: torch.nn.Module) -> int:
    """Numbers that are trained."""
    return sum(p.numel() for p in loss.parameters() if p.requires_grad)


def measure(contenders: list[Contender], repeats: int, warmup: int, device: str) -> dict[str, list[float]]:
    """Seconds of each update, taken in turn: CPU time on a CPU, time on the clock on a GPU."""
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for _ in range(warmup + repeats):
        for contender in contenders:
            start = read_clock(device)
            contender.update()
            times[contender.name].append(read_clock(device) - start)
    return {name: values[warmup:] for name, values in times.items()}


def read_clock(device: str) -> float:
    """Seconds: of the processor, or on a GPU until its work is done."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def bench(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every mode; within a mode the contenders take turns."""
    rows = []
    for mode in args.modes:
        contenders = [make_ours(args, downsample, mode) for downsample in args.downsample]
        contenders += [] if args.skip_rival else [make_rival(args, mode)]
        warmup = 1 if mode == "eager" else CAPTURE_AFTER + 2  # the last of these records the graph
        times = measure(contenders, args.repeats, warmup, args.device)
        rival = None if args.skip_rival else statistics.median(times[contenders[-1].name])
        for name, _, parameters in contenders:
            median = statistics.median(times[name])
            row = {"update": name, "mode": mode, "median": median, "min": min(times[name])}
            rows.append(row | {"to TorchRL": median / rival if rival else None, "parameters": parameters})
        del contenders
        gc.collect()
        torch.compiler.reset()
    return rows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="12m", help="model size, configs/agent/size")
    parser.add_argument("--batch", type=int, help="windows per update, B; 8 on a CPU, 16 on a GPU")
    parser.add_argument("--length", type=int, help="steps per window, T; 32 on a CPU, 64 on a GPU")
    parser.add_argument("--repeats", type=int, help="measured updates of each row; 3 on a CPU, 20 on a GPU")
    parser.add_argument("--device", choices=DEFAULTS, default="cpu")
    parser.add_argument("--autocast", choices=("bfloat16", "false"), help="false on a CPU, bfloat16 on a GPU")
    parser.add_argument("--modes", help=f"comma-separated, of {', '.join(MODES)}; eager on a CPU, all on a GPU")
    parser.add_argument("--downsample", default="pool,strided", help="image networks of ours: pool, strided or both")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--records", type=int, default=2000, help="records in each replay")
    parser.add_argument("--skip-rival", action="store_true", help="measure ours only")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.modes, args.downsample = args.modes.split(","), args.downsample.split(",")
    if unknown := set(args.modes) - set(MODES):
        parser.error(f"--modes: {sorted(unknown)} unknown, choose from {', '.join(MODES)}")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.device == "cpu":
        keep_freed_memory()
    else:
        torch.set_float32_matmul_precision("high")
    rows = bench(args)
    precision = "float32" if args.autocast == "false" else args.autocast
    unit = "CPU seconds" if args.device == "cpu" else f"seconds on {torch.cuda.get_device_name()}"
    print(
        f"\n{unit} per update: size {args.size}, B={args.batch}, T={args.length}, {IMAGE_SIZE}x{IMAGE_SIZE}x3, "
        f"{precision}\nmedian of {args.repeats}, CPU threads: {args.threads}, {describe_load()}\n"
    )
    columns = {"update": "", "mode": "", "median": ".3f", "min": ".3f", "to TorchRL": ".2f", "parameters": ",d"}
    print_table(rows, columns)
    write_json(args.json, vars(args), rows)


if __name__ == "__main__":
    main()
