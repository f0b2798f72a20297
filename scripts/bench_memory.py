"""Peak memory of training by model size: what the weights need, and what one update needs on top.

    python scripts/bench_memory.py                                             # every size, B=16, T=64
    python scripts/bench_memory.py --sizes 1m,12m replay_buffer.batch_size=8 agent.imagination_horizon=10
    python scripts/bench_memory.py --device cuda optimization.autocast=bfloat16 --json memory.json

Every size runs in a process of its own, which builds the agent as training does and makes a few updates. Further
arguments are overrides of the training configuration; batch, window, image size and precision are taken from it. On a
CPU the peak is that of the resident memory, without what Python and the libraries need; on a GPU it is what PyTorch
allocated. On a CPU an update that needs more than `--limit` fails and its row says so, instead of the machine.
"""

import argparse
import multiprocessing
import platform
import re
import resource
import shlex
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from bench_common import describe_load, load_config, write_json
from tensordict import TensorDict
from torchrl.data import Bounded, Composite, Unbounded

from dreamer.agents import Agent, EnvSpec, load
from dreamer.allocator import keep_freed_memory
from dreamer.memory_limits import available_memory

SIZES = ("debug", "1m", "12m", "25m", "50m", "100m", "200m")
ACTION_SIZE = 6
VECTOR_SIZE = 17
MIB = 2**20
COLUMNS = {
    "size": "",
    "parameters": ",d",
    "weights MiB": ",.0f",
    "gradients MiB": ",.0f",
    "optimiser MiB": ",.0f",
    "update MiB": ",.0f",
    "peak MiB": ",.0f",
    "record bytes": ",d",
}


def build_agent(config: dict[str, Any], device: torch.device) -> Agent:
    """The agent of a run on a task with six continuous actions."""
    knobs, side = dict(config["agent"]), config["env"]["image_size"]
    observation = (
        Composite(pixels=Bounded(0, 255, (side, side, 3), dtype=torch.uint8))
        if config["env"]["from_pixels"]
        else Composite(observation=Unbounded((VECTOR_SIZE,)))
    )
    return load(knobs.pop("name")).build(
        env_spec=EnvSpec(observation, Bounded(-1, 1, (ACTION_SIZE,))),
        device=device,
        optimization=config["optimization"],
        **knobs,
    )


def make_batch(record: TensorDict, batch: int, length: int, device: torch.device) -> TensorDict:
    """A replay sample [B, T] of noise."""
    latents = ("belief", "state")
    steps = record.exclude(*latents).expand(batch, length).clone().to(device)
    if "pixels" in steps:
        steps["pixels"].random_(256)
    steps["action"].uniform_(-1, 1)
    sample = TensorDict(dict(steps.items()), [batch], device=device)
    sample["context"] = record.select(*latents).expand(batch).clone().to(device)
    return sample


def measure(config: dict[str, Any], updates: int, limit: int) -> dict[str, Any]:
    """Build an agent and make some updates; runs in a process of its own.

    Args:
        config: Of a run, with `device` "cpu" or "cuda".
        updates: At least two, because the optimiser allocates in the first.
        limit: Bytes of data that this process may have, on a CPU.
    """
    device = torch.device(config["device"])
    torch.set_num_threads(config["threads"] or 1)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    before = read_peak(device)
    agent = build_agent(config, device)
    replay = config["replay_buffer"]
    batch = make_batch(agent.record, replay["batch_size"], replay["sequence_length"], device)
    for _ in range(updates):
        agent.stepper.step(None, batch.clone(recurse=False))
    peak = read_peak(device) - before
    trained = [p for p in agent.loss.parameters() if p.requires_grad]
    states = (x for state in agent.stepper.optimizer.state.values() for x in state.values() if torch.is_tensor(x))
    sizes = {
        "weights MiB": count_bytes([*agent.loss.parameters(), *agent.loss.buffers()]),
        "gradients MiB": count_bytes(p.grad for p in trained if p.grad is not None),
        "optimiser MiB": count_bytes(states),
    }
    sizes |= {"update MiB": peak - sum(sizes.values()), "peak MiB": peak}
    facts = {
        "parameters": sum(p.numel() for p in trained),
        "record bytes": count_bytes(agent.record.values(True, True)),
    }
    return facts | {name: size / MIB for name, size in sizes.items()}


def read_peak(device: torch.device) -> int:
    """Most bytes that this process ever had: resident on a CPU, allocated by PyTorch on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors together."""
    return sum(x.numel() * x.element_size() for x in tensors)


def measure_apart(config: dict[str, Any], updates: int, limit: int) -> dict[str, Any]:
    """The figures of one size from a fresh process, or Nones where it did not fit."""
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit the memory of this process
    try:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            return pool.submit(measure, config, updates, limit).result()
    except (BrokenProcessPool, MemoryError):
        pass
    except RuntimeError as error:  # torch has no class of its own for a full CPU
        if "memory" not in str(error):
            raise
    return dict.fromkeys(COLUMNS)


def print_markdown(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table for a document."""
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for row in rows:
        cells = ("did not fit" if row[name] is None else format(row[name], spec) for name, spec in COLUMNS.items())
        print("| " + " | ".join(cells) + " |")


def describe_hardware(device: str) -> str:
    """The processor or the GPU, with its memory, in one line."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {torch.cuda.mem_get_info()[1] / 2**30:.0f} GiB"
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{model[1] if model else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {describe_load()}"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SIZES), help="choices of agent/size")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--updates", type=int, default=2, help="updates of each size, at least 2")
    parser.add_argument("--limit", type=float, help="GiB that a process may take on a CPU; default what is free")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("overrides", nargs="*", help="of the training configuration")
    args = parser.parse_args()
    if args.updates < 2:
        parser.error(f"--updates={args.updates}: give at least 2, the optimiser allocates in the first")
    args.sizes = args.sizes.split(",")
    return args


def main() -> None:
    args = parse_args()
    limit = int(args.limit * 2**30) if args.limit else available_memory()
    rows = []
    for size in args.sizes:
        config = load_config(f"agent/size={size}", f"device={args.device}", *args.overrides)
        rows.append(measure_apart(config, args.updates, limit) | {"size": size})
        print(f"{size}: measured", file=sys.stderr, flush=True)
    replay, precision = config["replay_buffer"], config["optimization"]["autocast"]
    print(f"{describe_hardware(args.device)}, torch {torch.__version__}\n{shlex.join(['python', *sys.argv])}")
    print(f"B={replay['batch_size']}, T={replay['sequence_length']}, autocast {precision}, {args.updates} updates\n")
    print_markdown(rows)
    write_json(args.json, vars(args), rows)


if __name__ == "__main__":
    main()
