"""How well each way of masking finds the background, on every task of dm_control: writes docs/masks.md.

    python scripts/measure_masks.py
    python scripts/measure_masks.py --tasks cheetah_run reacher_easy --frames 10 --out masks.md

The truth is the simulator's segmentation: sky is where there is no object; floor are the geoms of material "grid" and
terrain, scenery those of material "background"; all else is foreground: geoms of moving bodies, sites, skins, goals and
fixed parts of the task. Frames are spread over an episode of uniformly random actions.
"""

import argparse
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from envs.backends.dmc import DMCEnv
from envs.transforms.masks import chroma_mask

GEOM, HEIGHT_FIELD = 5, 1  # mujoco.mjtObj, mujoco.mjtGeom
MODES = ("chroma", "segmentation")
PARTS = ("foreground", "sky", "floor")
TEXT = """# Masks: which pixels a distraction replaces

A distraction with `mask: segmentation` (the default) replaces what the simulator itself calls sky or floor. With
`mask: chroma` it replaces every pixel that is bluer than it is red or green, the rule of the published benchmarks.
This table says what each of them does to the images of dm_control {version}: the share of the pixels of each kind
that is replaced, in percent. It should be 0 for the foreground and 100 for the sky and, with `replace_floor: true`,
for the floor. A dash means that there are no such pixels.

* Foreground: everything but sky, floor and the plane behind the arm of manipulator and stacker: the agent, sites,
  goals, walls and rails.
* `chroma` loses bluish parts of the foreground, such as rails, walls and links made of the material `decoration`. It
  replaces the floor although the published PSP benchmark keeps it for cheetah, hopper and walker: that one ships models
  with another floor. `mask: segmentation, replace_floor: false` is the nearest to it that stock dm_control allows.
* Images have smooth edges, masks have not: a rim of one pixel around the foreground keeps a trace of what was behind
  it.

`{command}`: camera of the benchmarks, {size}x{size} pixels, {frames} frames of uniformly random actions per task.

| task | foreground, % of image | chroma: foreground | chroma: sky | chroma: floor | segmentation: foreground | \
segmentation: sky | segmentation: floor |
|---|---|---|---|---|---|---|---|
{rows}
"""


def find_parts(env: DMCEnv, size: int) -> dict[str, np.ndarray]:
    """The pixels of each kind, from the segmentation of the simulator: bool `[h, w]` each."""
    model = env.physics.model
    ids, kinds = np.moveaxis(env._camera(size, size, None, False).render(segmentation=True), -1, 0)  # [h, w]
    materials = np.array([*(model.id2name(m, "material") if m >= 0 else "" for m in model.geom_matid), ""])
    shown = np.where((ids >= 0) & (kinds == GEOM), ids, model.ngeom)
    terrain = np.append(model.geom_type == HEIGHT_FIELD, False)[shown]
    floor, scenery = (materials[shown] == "grid") | terrain, materials[shown] == "background"
    return {"sky": ids < 0, "floor": floor, "foreground": (ids >= 0) & ~floor & ~scenery}


def measure(domain: str, task: str, args: argparse.Namespace) -> dict[str, Any]:
    """The share of the foreground in the images of one task, and of each kind of pixels the share that is replaced."""
    env = DMCEnv(name=domain, task=task, frame_skip=2, seed=args.seed)
    sizes = dict.fromkeys(PARTS, 0)
    replaced = {(mode, part): 0 for mode in MODES for part in PARTS}
    generator = torch.Generator().manual_seed(args.seed)
    env.reset()
    for _ in range(args.frames):
        for _ in range(args.interval):
            action = torch.rand(env.action_spec.shape, generator=generator) * 2 - 1
            env.step(TensorDict({"action": action}))
        image = env.render(args.image_size, args.image_size)  # [h, w, 3]
        kept = {
            "segmentation": env.foreground_mask(args.image_size, args.image_size).numpy(),
            "chroma": chroma_mask(image)[..., 0].numpy(),
        }
        for part, where in find_parts(env, args.image_size).items():
            sizes[part] += int(where.sum())
            for mode in MODES:
                replaced[mode, part] += int((where & ~kept[mode]).sum())
    env.close()
    area = sizes["foreground"] / (args.frames * args.image_size**2)
    shares = {key: count / sizes[key[1]] if sizes[key[1]] else None for key, count in replaced.items()}
    return {"task": f"{domain}_{task}", "area": area, **shares}


def percent(share: float | None) -> str:
    """A share for the table."""
    return "–" if share is None else f"{100 * share:.1f}"


def describe(row: dict[str, Any]) -> str:
    """One line of the table."""
    cells = [row["task"], percent(row["area"]), *(percent(row[mode, part]) for mode in MODES for part in PARTS)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    from dm_control import suite

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {f"{domain}_{task}": (domain, task) for domain, task in suite.ALL_TASKS}
    parser.add_argument("--tasks", nargs="+", choices=names, default=list(names), metavar="TASK", help="default: all")
    parser.add_argument("--frames", type=int, default=6, help="images per task")
    parser.add_argument("--interval", type=int, default=15, help="agent steps between two images")
    parser.add_argument("--image-size", type=int, default=64, help="pixels, height and width")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/masks.md"))
    args = parser.parse_args()
    lines = []
    for name in args.tasks:
        lines.append(describe(measure(*names[name], args)))
        print(lines[-1], flush=True)
    text = TEXT.format(
        version=version("dm_control"),
        command=shlex.join(["python", "scripts/measure_masks.py", *sys.argv[1:]]),
        size=args.image_size,
        frames=args.frames,
        rows="\n".join(lines),
    )
    args.out.write_text(text)


if __name__ == "__main__":
    main()
