"""Speed of environments with images: plain, with a distraction, and with the ray caster, in one run.

    python scripts/bench_env.py
    python scripts/bench_env.py --tasks cheetah_run,walker_walk --steps 50 --rounds 7 --json env.json
    python scripts/bench_env.py --tasks "" --renderers cheetah_run,reacher_easy    # only the second table

First table: a step is one decision of the agent and one image. All environments of a task take turns, `--rounds` times
`--steps` random steps each. `steps/s` is by the clock, `CPU ms/step` the CPU time of all threads of this process (both
medians over the rounds), `x steps/s` the ratio to `plain`. `transform us` is the CPU time per image of the distraction
alone, `composite us` that of its work on pixels (ColorGrid), `table MB` what it keeps in memory, once per machine.

Second table: one image by MuJoCo and one by the ray caster, which gives the mask as well, of the same states. `x CPU`
is the ratio of their CPU times; `IoU` is intersection over union of the foreground with that of MuJoCo's segmentation,
`ids` the share of pixels that show the same object, `difference` the mean absolute difference of the images of 255.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from bench_common import describe_load, print_table, write_json
from tensordict import TensorDict, TensorDictBase

from envs import make_env
from envs.choices import check_choice
from envs.tasks import default_camera
from envs.transforms.color_grid import ColorGrid
from envs.transforms.color_grid_table import load_table
from envs.transforms.masks import paste_foreground_

# As in the benchmark with distractions that depend on action and time.
GRID = {"level": "action_cross_sequence", "num_colors_per_cell": 2500, "action_dims_to_split": [0], "action_power": 4}
COLOR_GRID = {"name": "color_grid", **GRID}
NATURAL_VIDEO = {"name": "natural_video"}
CELLS, TABLE_SEED = 16, 1  # defaults of ColorGrid

RENDERERS = "cheetah_run,walker_walk,reacher_easy,finger_turn_easy,ball_in_cup_catch,cartpole_swingup,humanoid_walk,"
RENDERERS += "quadruped_walk,manipulator_bring_ball,fish_swim"
STEP_COLUMNS = {"environment": "", "task": "", "steps/s": ",.0f", "CPU ms/step": ".2f", "x steps/s": ".2f"}
STEP_COLUMNS |= {"transform us": ".1f", "composite us": ".1f", "table MB": ".1f"}
RENDER_COLUMNS = {"task": "", "MuJoCo CPU ms": ".2f", "mjwarp CPU ms": ".2f", "x CPU": ".1f", "IoU": ".3f"}
RENDER_COLUMNS |= {"lowest IoU": ".3f", "ids": ".4f", "difference": ".1f"}


class Variant(NamedTuple):
    """How an environment is drawn."""

    render: Mapping[str, Any] = MappingProxyType({})
    distraction: dict[str, Any] | None = None
    frame_skip: int = 2


VARIANTS = {
    "plain": Variant({}),
    "plain, fast": Variant({"fast": True}),
    "ColorGrid, exact": Variant({}, COLOR_GRID),
    "ColorGrid, fast": Variant({"fast": True}, COLOR_GRID),
    "NaturalVideo, exact": Variant({}, NATURAL_VIDEO),
    "NaturalVideo, fast": Variant({"fast": True}, NATURAL_VIDEO),
    "mjwarp": Variant({"backend": "mjwarp"}),
    "mjwarp, fast": Variant({"backend": "mjwarp", "fast": True}),
    "ColorGrid, mjwarp": Variant({"backend": "mjwarp"}, COLOR_GRID),
    "ColorGrid, mjwarp, fast": Variant({"backend": "mjwarp", "fast": True}, COLOR_GRID),
}


def split_task(name: str) -> tuple[str, str]:
    """Domain and task of a name such as ball_in_cup_catch."""
    from dm_control import suite

    tasks = {f"{domain}_{task}": (domain, task) for domain, task in suite.ALL_TASKS}
    check_choice("task", name, tasks)
    return tasks[name]


class Walk:
    """An environment that takes random steps, without the overhead of a policy or a collector."""

    def __init__(self, task: str, variant: Variant, image_size: int):
        domain, task = split_task(task)
        self.env = make_env(
            name=domain,
            task=task,
            frame_skip=variant.frame_skip,
            image_size=image_size,
            render=variant.render,
            distraction=variant.distraction,
        )
        self._generator = torch.Generator().manual_seed(0)
        self._state = self.env.reset()
        self.advance(2)

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            action = torch.rand(self.env.action_spec.shape, generator=self._generator) * 2 - 1
            _, self._state = self.env.step_and_maybe_reset(self._state.set("action", action))


def timed(call: Callable[[], object], repeats: int = 1) -> tuple[float, float]:
    """Seconds on the clock and CPU seconds of one call."""
    clock, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - clock) / repeats, (time.process_time() - cpu) / repeats


def find_distraction(env: Any, distraction: dict[str, Any]) -> Any:
    """The transform of this name in an environment."""
    wanted = distraction["name"].replace("_", "")
    return next(transform for transform in env.transform if type(transform).__name__.lower() == wanted)


def measure_composite(env: Any, distraction: dict[str, Any], image_size: int, repeats: int) -> dict[str, Any]:
    """CPU microseconds per image of the transform and of its work on pixels, with a ninth of foreground."""
    transform, generator = find_distraction(env, distraction), torch.Generator().manual_seed(0)
    third = image_size // 3
    mask = torch.zeros(image_size, image_size, 1, dtype=torch.bool)
    mask[third : 2 * third, third : 2 * third] = True
    pixels = torch.randint(256, (image_size, image_size, 3), generator=generator, dtype=torch.uint8)
    arrival = TensorDict({"pixels": pixels, "mask": mask, "reward": torch.zeros(1)})
    start: TensorDictBase = TensorDict({"action": torch.zeros(env.action_spec.shape)})

    def microseconds(call: Callable[[], object]) -> float:
        return statistics.median(timed(call, 20)[1] for _ in range(max(repeats // 20, 1))) * 1e6

    figures = {"transform us": microseconds(lambda: transform._step(start, arrival)), "composite us": None}
    if isinstance(transform, ColorGrid):
        index, chosen = transform._attach(), np.array(7)
        figures["composite us"] = microseconds(
            lambda: paste_foreground_(transform._background(index, chosen, False, pixels), pixels, mask)
        )
    return figures


def describe_table(env: Any, distraction: dict[str, Any]) -> float:
    """Megabytes that a distraction keeps for all environments of a machine together."""
    if distraction["name"] == "color_grid":
        return load_table(TABLE_SEED, CELLS, distraction["num_colors_per_cell"]).nbytes / 1e6
    return find_distraction(env, distraction)._video.frames.nbytes / 1e6


def bench_steps(args: argparse.Namespace, task: str) -> list[dict[str, Any]]:
    """Let all environments of a task take turns."""
    walks = {}
    for name in args.variants:
        print(f"{task}: {name} ...", file=sys.stderr, flush=True)
        walks[name] = Walk(task, VARIANTS[name], args.image_size)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in walks}
    for _ in range(args.rounds):
        for name, walk in walks.items():
            times[name].append(timed(lambda walk=walk: walk.advance(args.steps)))
    rows = []
    for name, walk in walks.items():
        clock, cpu = (statistics.median(column) / args.steps for column in zip(*times[name], strict=True))
        row = {"environment": name, "task": task, "steps/s": 1 / clock, "CPU ms/step": cpu * 1e3}
        row |= dict.fromkeys(("x steps/s", "transform us", "composite us", "table MB"))
        if distraction := VARIANTS[name].distraction:
            row |= measure_composite(walk.env, distraction, args.image_size, args.composites)
            row["table MB"] = describe_table(walk.env, distraction)
        rows.append(row)
        walk.env.close()
    if plain := next((row for row in rows if row["environment"] == "plain"), None):
        for row in rows:
            row["x steps/s"] = row["steps/s"] / plain["steps/s"]
    return rows


def bench_renderers(args: argparse.Namespace, task: str) -> dict[str, Any]:
    """Draw the same states with both renderers."""
    print(f"{task}: renderers ...", file=sys.stderr, flush=True)
    walk, size = Walk(task, VARIANTS["plain"], args.image_size), (args.image_size, args.image_size)
    env: Any = walk.env.base_env
    env.ray_cast(*size)  # compiles
    times, figures = [], []
    for _ in range(args.images):
        walk.env.set_seed(len(times))
        walk._state = walk.env.reset()
        walk.advance(5)
        plain, (cast, ours), theirs = env.render(*size), env.ray_cast(*size), env.foreground_mask(*size)
        both, either = (ours & theirs).sum().item(), (ours | theirs).sum().item()
        objects = env._ray_caster.render(*size, default_camera(env.name))[1]
        same = (objects == env._camera(*size, None, False).render(segmentation=True)).all(-1).mean()
        difference = (cast.float() - plain.float()).abs().mean().item()
        figures.append((both / max(either, 1), same, difference))
        times.append((timed(lambda: env.render(*size), 2)[1], timed(lambda: env.ray_cast(*size), 8)[1]))
    walk.env.close()
    mujoco, mjwarp = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
    iou, same, difference = (np.array(column) for column in zip(*figures, strict=True))
    row = {"task": task, "MuJoCo CPU ms": mujoco, "mjwarp CPU ms": mjwarp, "x CPU": mujoco / mjwarp}
    row |= {"IoU": iou.mean(), "lowest IoU": iou.min(), "ids": same.mean(), "difference": difference.mean()}
    return {name: value if isinstance(value, str) else float(value) for name, value in row.items()}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="cheetah_run,walker_walk", help="of the first table; empty for none")
    parser.add_argument("--variants", help=f"; separated, of {'; '.join(VARIANTS)} (default: all that can run here)")
    parser.add_argument("--renderers", default=RENDERERS, help="tasks of the second table; empty for none")
    parser.add_argument("--image-size", type=int, default=64, help="pixels per side")
    parser.add_argument("--steps", type=int, default=25, help="agent steps per round")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each environment")
    parser.add_argument("--composites", type=int, default=2000, help="images to measure a distraction on")
    parser.add_argument("--images", type=int, default=6, help="states per task of the second table")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    ray_caster = importlib.util.find_spec("mujoco_warp") is not None
    able = [name for name, variant in VARIANTS.items() if ray_caster or variant.render.get("backend") != "mjwarp"]
    args.variants = [name.strip() for name in args.variants.split(";")] if args.variants else able
    if unknown := set(args.variants) - set(able):
        parser.error(f"--variants: {sorted(unknown)} unknown or not installed, choose from {'; '.join(able)}")
    args.tasks = [name for name in args.tasks.split(",") if name]
    args.renderers = [name for name in args.renderers.split(",") if name] if ray_caster else []
    if not ray_caster:
        print("mujoco_warp is not installed (extra warp): without the ray caster", file=sys.stderr)
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    steps = [row for task in args.tasks for row in bench_steps(args, task)]
    renderers = [bench_renderers(args, task) for task in args.renderers]
    print(f"\n{describe_load()}, {args.image_size}x{args.image_size} pixels\n")
    for rows, columns in ((steps, STEP_COLUMNS), (renderers, RENDER_COLUMNS)):
        if rows:
            print_table(rows, columns)
            print()
    write_json(args.json, vars(args), [*steps, *renderers])


if __name__ == "__main__":
    main()
