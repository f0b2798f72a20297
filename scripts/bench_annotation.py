"""Cost of masks for the replay: how fast frames are labelled, and how much slower training is for it.

    python scripts/bench_annotation.py                                # cheetah, 64 x 64, agent=world2filter, 1m
    python scripts/bench_annotation.py --sam3 facebook/sam3 --device cuda
    python scripts/bench_annotation.py --only throughput --batches 1,16,64

Throughput: frames that a labeller gets, per second of CPU time and on the clock. The student learns from a teacher that
costs nothing, the simulator; "student" learns and labels by its teacher, "student, promoted" also labels the rest.
Training: seconds of an update of the agent with the simulator's masks, and with the hook that labels the replay, in
turn. There is always something to label, so that each update pays for `--frames-per-update` frames; once labels have
caught up with the collector, it pays for new frames only. A block of updates is measured as a whole, with the end of
the labelling that goes on in a thread.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from bench_common import describe_load, load_config, print_table, write_json
from tensordict import TensorDictBase

import envs
from dreamer.agents import EnvSpec, load
from dreamer.allocator import keep_freed_memory
from dreamer.annotation import AnnotateReplay
from dreamer.hooks import SampleReplay, WriteBackContext
from dreamer.labellers import Labeller, make_labeller
from dreamer.replay import SequenceReplay
from envs.segmentation.ground_truth import GroundTruth

EXAMPLES = 5  # labelled frames for the colour model
PARTS = ("throughput", "training")


class Timing(NamedTuple):
    """Seconds."""

    cpu: float
    clock: float


def clocked(action: Callable[[], Any], device: str) -> Timing:
    """Do it, and say how long it took."""
    cpu, clock = time.process_time(), time.perf_counter()
    action()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return Timing(time.process_time() - cpu, time.perf_counter() - clock)


def collect(config: Mapping[str, Any], steps: int) -> tuple[EnvSpec, TensorDictBase]:
    """The spec of the environment, and [T] frames of random actions: ``pixels`` and the simulator's ``true_mask``."""
    env = envs.make_env(**config["env"], seed=0)
    spec, rollout = EnvSpec.of(env), env.rollout(steps, break_when_any_done=False, auto_cast_to_device=True)
    env.close()
    return spec, rollout.select("pixels", "mask").rename_key_("mask", "true_mask").contiguous()


def make_labellers(
    args: argparse.Namespace, settings: Mapping[str, Any], prompt: str, frames: TensorDictBase
) -> dict[str, Labeller]:
    """Those that are compared. The promoted student learns no more and passes every examination."""
    settings = {key: value for key, value in settings.items() if key not in ("frames_per_update", "asynchronous")}
    settings |= {"device": args.device, "teacher": "ground_truth", "labelled_frames": EXAMPLES}
    settings["prompt"] = args.prompt or settings["prompt"] or prompt
    labellers = {"colour": make_labeller("colour", **settings), "student": make_labeller("student", **settings)}
    promoted = make_labeller("student", **settings | {"student_steps": 0, "bar": 0.0})
    promoted.distillation.largest_empty_rate = 1.0
    promoted.distillation.add(frames["pixels"], GroundTruth()(frames["true_mask"]))
    promoted.distillation.examine()
    if not promoted.distillation.promoted:
        raise SystemExit(f"--frames {len(frames)}: too few to examine a student with, give 64 or more")
    labellers["student, promoted"] = promoted
    if args.sam3:
        labellers["sam3"] = make_labeller("sam3", **settings | {"model": args.sam3})
    return labellers


def bench_throughput(
    args: argparse.Namespace, labellers: Mapping[str, Labeller], frames: TensorDictBase
) -> list[dict[str, Any]]:
    """Frames per second of each labeller and batch size, the median of the repeats."""
    frames, rows = frames.to(args.device), []
    for name, labeller in labellers.items():
        if labeller.examples:
            labeller.prepare(frames[:: max(len(frames) // EXAMPLES, 1)][:EXAMPLES])
        for size in args.batches:
            batch = frames[:size]
            labeller.label(batch)
            timings = [clocked(lambda b=batch: labeller.label(b), args.device) for _ in range(args.repeats)]  # noqa: B023
            cpu, clock = (size / statistics.median(times) for times in zip(*timings, strict=True))
            rows.append({"labeller": name, "batch": size, "frames/CPU-s": cpu, "frames/s": clock})
    return rows


class Training:
    """Updates of an agent, with labelling if there is a labeller.

    Args:
        args, config: Of the command line, and of the run.
        spec, frames: What :func:`collect` gives.
        labeller: Labels the replay, which is all unlabelled; None for the simulator's masks.
        asynchronous: Label in a thread.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        config: Mapping[str, Any],
        spec: EnvSpec,
        frames: TensorDictBase,
        labeller: Labeller | None = None,
        asynchronous: bool = False,
    ):
        knobs = dict(config["agent"])
        knobs["mask_source"] = "ground_truth" if labeller is None else "colour"  # any other: a hook labels
        self.agent = load(knobs.pop("name")).build(
            env_spec=spec, device=torch.device(args.device), optimization=config["optimization"], **knobs
        )
        self.replay = self._make_replay(args, frames)
        self.sample, self.write_back, self.hook = SampleReplay(self.replay), WriteBackContext(self.replay), None
        if labeller is not None:
            self.hook = AnnotateReplay(labeller, frames_per_update=args.frames_per_update, asynchronous=asynchronous)
            self.hook.register(StandIn(self.replay))

    def run(self, updates: int) -> None:
        """Make updates, and end the labelling that is under way."""
        for _ in range(updates):
            batch = self.sample(None)
            self.agent.stepper.step(None, batch)
            self.write_back(batch)
            if self.hook is not None:
                self.hook(batch)
        if self.hook is not None and self.hook.job is not None:
            self.hook.job.result()

    def close(self) -> None:
        """End the thread, if there is one."""
        if self.hook is not None and self.hook.executor is not None:
            self.hook.executor.shutdown()

    def _make_replay(self, args: argparse.Namespace, frames: TensorDictBase) -> SequenceReplay:
        """A replay with the frames, again and again, until there is enough to label for all updates."""
        labelled = args.frames_per_update * args.updates * (args.repeats + 1)
        needed = max(labelled + len(frames), 4 * (args.length + 1))
        replay = SequenceReplay(
            self.agent.record,
            capacity=needed + 2 * len(frames),
            num_streams=1,
            batch_size=args.batch,
            sequence_length=args.length,
            device=args.device,
        )
        records = self.agent.record.expand(len(frames)).clone()
        truth = "true_mask" if "true_mask" in records else "mask"
        records["pixels"], records[truth] = frames["pixels"], frames["true_mask"]
        records["mask_valid"].fill_(truth == "mask")
        records["is_init"][0] = records["done"][-1] = True
        records["stream"] = torch.zeros(len(frames), dtype=torch.int64)
        while replay.write_count < needed:
            replay.extend(records)
        return replay


class StandIn:
    """What the hook needs of a trainer, and nothing is shown."""

    def __init__(self, replay: SequenceReplay):
        self.replay_buffer, self.collected_frames = replay, 0
        self.logger = SimpleNamespace(log_image=lambda *_: None)

    def register_op(self, stage: str, op: Callable) -> None: ...

    def register_module(self, name: str, module: Any) -> None: ...

    def incident(self, kind: str, message: str) -> None: ...


def bench_training(
    args: argparse.Namespace,
    config: Mapping[str, Any],
    spec: EnvSpec,
    frames: TensorDictBase,
    make: Callable[[], Mapping[str, Labeller]],
) -> list[dict[str, Any]]:
    """Seconds per update, the median of the blocks, which take turns."""
    contenders = {"simulator": Training(args, config, spec, frames)}
    for way, asynchronous in (("", False), (", thread", True)):
        for name, labeller in make().items():
            contenders[name + way] = Training(args, config, spec, frames, labeller, asynchronous)
    timings: dict[str, list[Timing]] = {name: [] for name in contenders}
    for _ in range(args.repeats + 1):
        for name, contender in contenders.items():
            timings[name].append(clocked(lambda c=contender: c.run(args.updates), args.device))
    rows = []
    for name, contender in contenders.items():
        contender.close()
        cpu, clock = (statistics.median(times) / args.updates for times in zip(*timings[name][1:], strict=True))
        base = rows[0] if rows else {"CPU s": cpu, "clock s": clock}
        ratios = {"CPU to simulator": cpu / base["CPU s"], "clock to simulator": clock / base["clock s"]}
        rows.append({"masks": name, "CPU s": cpu, "clock s": clock, **ratios})
    return rows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="env.name=cheetah,env.render.backend=mjwarp", help="overrides, with commas")
    parser.add_argument("--agent", default="agent=world2filter,agent/size=1m", help="overrides, with commas")
    parser.add_argument("--only", choices=PARTS, help="measure one of the two parts")
    parser.add_argument("--batches", default="1,16,64", help="frames per call of a labeller, with commas")
    parser.add_argument("--frames-per-update", type=int, default=16, help="frames labelled per update")
    parser.add_argument("--batch", type=int, default=8, help="windows per update, B")
    parser.add_argument("--length", type=int, default=32, help="steps per window, T")
    parser.add_argument("--updates", type=int, default=3, help="updates per block")
    parser.add_argument("--repeats", type=int, default=3, help="measured calls or blocks of each row")
    parser.add_argument("--frames", type=int, default=128, help="frames to label, from random actions")
    parser.add_argument("--sam3", help="also measure SAM 3: hub id, or folder of a checkpoint")
    parser.add_argument("--prompt", help="of SAM 3; the one of the task by default")
    parser.add_argument("--device", default="cpu", help="of the agent, the student and SAM 3")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    args.batches = [int(size) for size in args.batches.split(",")]
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.device == "cpu":
        keep_freed_memory()
    config = load_config(*args.env.split(","), *args.agent.split(","), "env.emit_mask=true", "env.from_pixels=true")
    spec, frames = collect(config, max(args.frames, *args.batches))
    height, width = frames["pixels"].shape[1:3]
    rows = []

    def make() -> dict[str, Labeller]:
        return make_labellers(args, config["agent"]["segmentation"], spec.prompt, frames)

    print(f"\n{height}x{width} frames, {args.device}, CPU threads: {args.threads}, {describe_load()}")
    if args.only != "training":
        rows += (part := bench_throughput(args, make(), frames))
        print(f"\nframes labelled per second, median of {args.repeats}\n")
        print_table(part, {"labeller": "", "batch": "d", "frames/CPU-s": ",.0f", "frames/s": ",.0f"})
    if args.only != "throughput":
        rows += (part := bench_training(args, config, spec, frames, make))
        print(
            f"\nseconds per update, {args.agent}, B={args.batch}, T={args.length}, {args.frames_per_update} frames "
            f"labelled per update, median of {args.repeats} blocks of {args.updates}\n"
        )
        seconds = {"masks": "", "CPU s": ".3f", "clock s": ".3f"}
        print_table(part, seconds | {"CPU to simulator": ".2f", "clock to simulator": ".2f"})
    write_json(args.json, vars(args), rows)


if __name__ == "__main__":
    main()
