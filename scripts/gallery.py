"""A picture of every distraction on four tasks.

    python scripts/gallery.py
    python scripts/gallery.py --choices none color_grid_max natural_video --steps 0 1 2 3 --out /tmp/gallery.png

A row for each choice of `env/distraction`, for each task the image after the given agent steps; always the same random
actions. A choice that does not exist for a task leaves its place empty.
"""

import argparse
import io
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from envs import make_env

matplotlib.use("Agg")  # before pyplot: there may be no display

from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
TASKS = [("cheetah", "run"), ("walker", "walk"), ("cartpole", "swingup"), ("reacher", "easy")]
ORDER = ["none", "color_grid", "natural_video", "distracting_cs_easy", "distracting_cs_medium", "distracting_cs_hard"]
LABEL, TITLE = 150, 22  # pixels: width of the labels, height of the titles
GAP, SPACE = 6, 2  # pixels: between rows and tasks, between images of a task


def list_choices() -> list[str]:
    """The choices of `env/distraction`, related ones beside each other, without those that look like another."""
    names = sorted(path.stem for path in (CONFIGS / "env" / "distraction").glob("*.yaml"))
    names = [name for name in names if not name.startswith("psp_") and not name.endswith("_test")]
    return sorted(names, key=lambda name: ([name.startswith(start) for start in ORDER] + [True]).index(True))


def load_options(choice: str) -> dict[str, Any]:
    """The keyword arguments that a choice stands for."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        options = OmegaConf.to_container(compose("train", overrides=[f"env/distraction={choice}"]).env.distraction)
    assert isinstance(options, dict)
    return {str(key): value for key, value in options.items()}


def make_frames(name: str, task: str, options: dict[str, Any], steps: list[int], size: int, seed: int) -> np.ndarray:
    """Images of a task after some steps, uint8 `[len(steps), size, size, 3]`."""
    env = make_env(name=name, task=task, image_size=size, distraction=options, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    try:
        data, seen = env.reset(), []
        for step in range(max(steps) + 1):
            if step in steps:
                seen.append(data["pixels"].numpy().copy())
            action = torch.rand(env.action_spec.shape, generator=generator) * 2 - 1
            data = env.step_mdp(env.step(data.set("action", action)))
    finally:
        env.close()
    return np.stack(seen)


def make_cell(name: str, task: str, choice: str, args: argparse.Namespace) -> np.ndarray | str:
    """The images of one choice on one task side by side, or why there are none."""
    try:
        frames = make_frames(name, task, load_options(choice), args.steps, args.image_size, args.seed)
    except ValueError as error:
        return str(error)
    spaced = np.pad(frames, ((0, 0), (0, 0), (0, SPACE), (0, 0)), constant_values=255)
    return np.concatenate(list(spaced), axis=1)  # [size, len(steps) * (size + SPACE), 3]


def draw_gallery(args: argparse.Namespace) -> None:
    """Draws all cells, pixel by pixel, and writes the picture."""
    size = args.image_size
    width = (size + SPACE) * len(args.steps)
    shape = (TITLE + (size + GAP) * len(args.choices), LABEL + (width + GAP) * len(TASKS))
    figure = plt.figure(figsize=(shape[1] / 100, shape[0] / 100), dpi=100)
    for column, (name, task) in enumerate(TASKS):
        left = LABEL + (width + GAP) * column
        title = {"ha": "center", "va": "center", "fontsize": 9}
        figure.text((left + width / 2) / shape[1], 1 - TITLE / 2 / shape[0], f"{name} {task}", **title)
        for row, choice in enumerate(args.choices):
            bottom = shape[0] - TITLE - (size + GAP) * (row + 1) + GAP
            cell = make_cell(name, task, choice, args)
            if isinstance(cell, str):
                print(f"{choice}, {name} {task}: {cell}")
                place = (left + width / 2) / shape[1], (bottom + size / 2) / shape[0]
                figure.text(*place, "not defined", color="grey", **title)
            else:
                figure.figimage(cell, left, bottom)
    for row, choice in enumerate(args.choices):
        middle = shape[0] - TITLE - (size + GAP) * row - size / 2
        label = "\n".join(textwrap.wrap(choice.replace("_", " "), 20))
        figure.text(8 / shape[1], middle / shape[0], label, va="center", fontsize=9)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    plt.close(figure)
    colours = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)  # a quarter of the bytes
    colours.save(args.out, optimize=True)
    print(f"{args.out}: {shape[1]} x {shape[0]} pixels, {args.out.stat().st_size // 1000} kB")


def main() -> None:
    """Reads the command line and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choices", nargs="+", default=list_choices(), help="choices of env/distraction")
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 1, 8], help="agent steps to show")
    parser.add_argument("--image-size", type=int, default=64, help="pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "gallery.png")
    draw_gallery(parser.parse_args())


if __name__ == "__main__":
    main()
