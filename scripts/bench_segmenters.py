"""How well and how fast segmenters find the foreground of dm_control, as a Markdown table.

    python scripts/bench_segmenters.py
    python scripts/bench_segmenters.py --tasks cheetah_run --scenes clean video --renderer mjwarp --json masks.json
    python scripts/bench_segmenters.py --sam3 facebook/sam3 --device cuda

Frames come from episodes of uniformly random actions; those that a segmenter is measured on are of other episodes than
those that it learns from. Truth is the mask of the simulator, with all that matters for the task: targets too.

* `simulator`: the truth itself, to check the measures.
* `colour`: fitted to `--labels` labelled frames of the same scene.
* `student`: learns from the simulator's masks of clean frames only, with swapped backgrounds; all scenes but the clean
  one are new to it.
* `SAM 3`: with the prompt of the task, if `--sam3` says where its weights are.

`J` is intersection over union, `F` the F score of outlines with a tolerance of one pixel, `recall` the share of the
foreground that is found: means over frames. `false positives` is the share of frames in which something is found after
the foreground was painted over with background, `empty` that in which nothing is found of a foreground that is there,
`flicker` the percentage of pixels that change from frame to frame although the truth does not. `frames/CPU-s` is the
median over `--rounds` calls with all frames, on one thread; it means nothing for SAM 3 on a GPU.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_common import describe_load, write_json
from bench_env import split_task
from torch import Tensor
from torch.nn.functional import max_pool2d

from envs import make_env
from envs.segmentation.colour import ColourModel
from envs.segmentation.ground_truth import GroundTruth
from envs.segmentation.metrics import Quality, false_positive_rate, measure
from envs.segmentation.protocol import HALF, Segmenter, join_concepts, split_prompt
from envs.segmentation.sam3 import Sam3
from envs.segmentation.student import Distillation, Student

TASKS = ("walker_walk", "cheetah_run", "cartpole_swingup", "reacher_easy", "finger_spin")
SCENES = {"clean": None, "video": {"name": "natural_video"}, "grid": {"name": "color_grid", "level": "max"}}
RENDERERS = {"mujoco": {}, "fast": {"fast": True}, "mjwarp": {"backend": "mjwarp"}}
FEWEST_KEPT = 40  # labels of which enough are held out
HELD_OUT_SEED = 1000  # far from the seeds of the episodes to learn from
COLUMNS = {"J": ".3f", "F": ".3f", "recall": ".3f", "false positives": ".2f", "empty": ".2f", "flicker": ".2f"}
COLUMNS |= {"frames/CPU-s": ",.0f"}


class Films(NamedTuple):
    """Episodes of one scene: frames uint8 `[E, T, h, w, 3]`, their true masks bool `[E, T, h, w, 1]`, a prompt."""

    frames: Tensor
    masks: Tensor
    prompt: str

    @property
    def labels(self) -> tuple[Tensor, Tensor]:
        """All frames and masks, `[E * T, h, w, ...]`."""
        return self.frames.flatten(0, 1), self.masks.flatten(0, 1)


def film(task: str, scene: str, first_seed: int, episodes: int, args: argparse.Namespace) -> Films:
    """Record episodes of random actions."""
    name, task = split_task(task)
    render, distraction = RENDERERS[args.renderer], SCENES[scene]
    options: dict[str, Any] = {"image_size": args.image_size, "render": render, "distraction": distraction}
    env = make_env(name=name, task=task, emit_mask=True, **options)
    records = []
    for seed in range(first_seed, first_seed + episodes):
        generator = torch.Generator().manual_seed(seed)
        env.set_seed(seed)
        state = env.reset()
        for _ in range(args.steps):
            records.append(state.select("pixels", "mask").clone())
            action = torch.rand(env.action_spec.shape, generator=generator) * 2 - 1
            _, state = env.step_and_maybe_reset(state.set("action", action))
    films = torch.stack(records).reshape(episodes, args.steps)
    prompt = env.base_env.prompt
    env.close()
    return Films(films["pixels"], films["mask"], prompt)


def paint_over(frames: Tensor, masks: Tensor) -> Tensor:
    """The frames without the foreground: its pixels show the background of other frames, else the mean colour.

    Args:
        frames: uint8 `[N, h, w, 3]`.
        masks: bool `[N, h, w, 1]`; a rim of one pixel is painted over as well.
    """
    rim = max_pool2d(masks.permute(0, 3, 1, 2).float(), 3, stride=1, padding=1)
    missing = rim.permute(0, 2, 3, 1) > 0  # [N, h, w, 1]
    covered, found = missing.clone(), frames.clone()
    for shift in range(1, len(frames)):
        usable = missing & ~covered.roll(shift, 0)
        found = torch.where(usable, frames.roll(shift, 0), found)
        missing = missing & ~usable
    total, count = (frames * ~covered).sum((1, 2), keepdim=True), (~covered).sum((1, 2), keepdim=True)
    return torch.where(missing, (total / count.clamp(min=1)).to(torch.uint8), found)


def teach(films: Films, args: argparse.Namespace) -> Student:
    """A student of the simulator."""
    frames, masks = films.labels
    lessons = Distillation(Student(), capacity=max(len(frames), FEWEST_KEPT))
    lessons.add(frames, GroundTruth()(masks))
    lessons.learn(args.student_steps)
    return lessons.student


def fit(films: Films, count: int) -> ColourModel:
    """A colour model of a few frames, spread over the films."""
    frames, masks = films.labels
    chosen = torch.linspace(0, len(frames) - 1, count).long()
    return ColourModel().fit(frames[chosen], masks[chosen])


def judge(
    segment: Callable[[Tensor], Tensor], films: Films, inputs: Tensor, absent: Tensor, rounds: int
) -> list[float]:
    """The figures of a row.

    Args:
        segment: the segmenter.
        films: what is to be found.
        inputs: what the segmenter sees of them, `[E * T, h, w, C]`.
        absent: the same without the foreground.
        rounds: calls to take the time of.
    """

    def find(frames: Tensor) -> Tensor:
        return join_concepts(segment(frames)).cpu() >= HALF

    found, times = find(inputs), []
    for _ in range(rounds):
        start = time.process_time()
        segment(inputs)
        times.append(time.process_time() - start)
    scores = [measure(m, truth) for m, truth in zip(found.view(films.masks.shape), films.masks, strict=True)]
    mean = Quality(*(statistics.fmean(column) for column in zip(*scores, strict=True)))
    wrong = false_positive_rate(find(absent), torch.zeros_like(found)).item()
    quality = mean._replace(false_positive_rate=wrong, flicker=100 * mean.flicker)
    return [*quality, len(inputs) / statistics.median(times)]


def bench(task: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of a task."""
    clean = film(task, "clean", 0, args.episodes, args)
    student = teach(clean, args)
    options = {"image_size": args.sam3_image_size, "device": args.device}
    sam3 = Sam3(split_prompt(clean.prompt), args.sam3, **options) if args.sam3 else None
    for scene in args.scenes:
        to_learn = clean if scene == "clean" else film(task, scene, 0, args.episodes, args)
        held_out = film(task, scene, HELD_OUT_SEED, args.episodes, args)
        frames, masks = held_out.labels
        images, truth = (frames, paint_over(frames, masks)), (masks, torch.zeros_like(masks))
        segmenters: dict[str, tuple[Segmenter, tuple[Tensor, Tensor]]] = {
            "simulator": (GroundTruth(), truth),
            f"colour, {args.labels} labels": (fit(to_learn, args.labels), images),
            f"student, {args.student_steps} steps": (student, images),
        }
        if sam3 is not None:
            segmenters["SAM 3"] = (sam3, images)
        for name, (segmenter, inputs) in segmenters.items():
            figures = judge(segmenter, held_out, *inputs, args.rounds)
            yield {"task": task, "scene": scene, "segmenter": name, **dict(zip(COLUMNS, figures, strict=True))}


def describe(row: dict[str, Any]) -> str:
    """One line of the table."""
    figures = ["–" if math.isnan(row[name]) else format(row[name], spec) for name, spec in COLUMNS.items()]
    return f"| {' | '.join([row['task'], row['scene'], row['segmenter'], *figures])} |"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="TASK", help=f"default: {' '.join(TASKS)}")
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=list(SCENES), help="default: all")
    parser.add_argument("--renderer", choices=RENDERERS, default="mujoco", help="other images, the last two faster")
    parser.add_argument("--image-size", type=int, default=64, help="pixels per side")
    parser.add_argument("--episodes", type=int, default=4, help="to learn from, and as many to be measured on")
    parser.add_argument("--steps", type=int, default=20, help="frames of each episode, one per agent step")
    parser.add_argument("--labels", type=int, default=5, help="labelled frames for the colour model")
    parser.add_argument("--student-steps", type=int, default=300, help="batches that the student learns from")
    parser.add_argument("--rounds", type=int, default=5, help="calls to take the time of")
    parser.add_argument("--sam3", help="hub id or folder of the weights; default: without SAM 3")
    parser.add_argument(
        "--sam3-image-size", type=int, help="to which SAM 3 scales frames; default: that of the weights, at most 672"
    )
    parser.add_argument("--device", default="cpu", help="of SAM 3")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    print(f"| task | scene | segmenter | {' | '.join(COLUMNS)} |\n|{'---|' * (3 + len(COLUMNS))}", flush=True)
    rows = []
    for task in args.tasks:
        for row in bench(task, args):
            rows.append(row)
            print(describe(row), flush=True)
    print(f"{describe_load()}, {args.image_size}x{args.image_size} pixels, {args.renderer}", file=sys.stderr)
    write_json(args.json, vars(args), rows)


if __name__ == "__main__":
    main()
