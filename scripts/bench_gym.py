"""Speed of Gymnasium environments, and of CarRacing's images beside its own way to draw them, in one run.

    python scripts/bench_gym.py
    python scripts/bench_gym.py --environments ALE/Breakout-v5:4 --steps 200 --frames 500 --json gym.json

First table: agent steps with random actions through `make_env`, with what an agent sees: images of 64x64 pixels,
or the vector for names in `--vectors`. `CPU ms/step` is the time of all threads of this process, resets left out.

Second table: CarRacing on the same track with the same actions. `stock` is the environment as Gymnasium has it, `view`
what `env=car_racing` does; `x` is the ratio of their CPU times, `different` the frames that differ in any pixel.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from bench_common import describe_load, print_table, write_json

from envs import make_env
from envs.backends.car_racing import CarRacingView

ENVIRONMENTS = "ALE/Pong-v5:4,ALE/Breakout-v5:4,CarRacing-v3:1,CarRacing-v3:4,LunarLander-v3:1"
STEP_COLUMNS = {"environment": "", "frame_skip": "", "seen": "", "steps/CPU s": ",.0f", "CPU ms/step": ".2f"}
VIEW_COLUMNS = {"actions": "", "frames": "", "stock CPU ms": ".2f", "view CPU ms": ".2f", "x": ".2f", "different": ""}


def bench_steps(name: str, frame_skip: int, steps: int, from_pixels: bool) -> dict[str, Any]:
    """CPU time of random steps."""
    env = make_env(backend="gym", name=name, frame_skip=frame_skip, from_pixels=from_pixels)
    generator, current, spent = torch.Generator().manual_seed(0), env.reset(), 0.0
    choices = env.action_spec.shape[-1]
    for _ in range(steps):
        action = torch.rand(choices, generator=generator)
        action = 2 * action - 1 if env.action_spec.dtype.is_floating_point else (action == action.max()).long()
        start = time.process_time()
        arrived = env.step(current.set("action", action))["next"]
        spent += time.process_time() - start
        current = env.reset() if arrived["done"] else env.step_mdp(current)
    row = {"environment": name, "frame_skip": frame_skip, "seen": "pixels" if from_pixels else "observation"}
    return row | {"steps/CPU s": steps / spent, "CPU ms/step": spent / steps * 1e3}


def bench_view(continuous: bool, frames: int) -> dict[str, Any]:
    """CPU time of a step with its image, stock and with the view."""
    stock, own = (gymnasium.make("CarRacing-v3", continuous=continuous) for _ in range(2))
    view, spent, different = CarRacingView(own.unwrapped), np.zeros(2), 0
    random, ended = np.random.default_rng(0), True
    for frame in range(frames):
        if ended:
            stock.reset(seed=frame), own.reset(seed=frame)
        steering = float(np.sin(frame / 15))
        action = np.array([steering, 0.5, 0], np.float32) if continuous else random.choice([0, 1, 2, 3, 3, 3])
        start = time.process_time()
        image, _, *ends, _ = stock.step(action)
        middle = time.process_time()
        own.step(action)
        drawn = view.draw()
        spent += middle - start, time.process_time() - middle
        different, ended = different + (not np.array_equal(image, drawn)), any(ends)
    theirs, ours = spent / frames * 1e3
    row = {"actions": "continuous" if continuous else "discrete", "frames": frames}
    return row | {"stock CPU ms": theirs, "view CPU ms": ours, "x": theirs / ours, "different": different}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", default=ENVIRONMENTS, help="id:frame_skip, images; empty for none")
    parser.add_argument("--vectors", default="LunarLander-v3:1", help="id:frame_skip, vectors; empty for none")
    parser.add_argument("--steps", type=int, default=300, help="agent steps of the first table")
    parser.add_argument("--frames", type=int, default=500, help="of the second table; 0 for none")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, views = [], []
    for names, from_pixels in ((args.environments, True), (args.vectors, False)):
        for name in filter(None, names.split(",")):
            print(f"{name} ...", file=sys.stderr, flush=True)
            identity, _, frame_skip = name.rpartition(":")
            rows.append(bench_steps(identity, int(frame_skip), args.steps, from_pixels))
    if args.frames:
        views = [bench_view(continuous, args.frames) for continuous in (True, False)]
    print(f"\n{describe_load()}\n")
    for table, columns in ((rows, STEP_COLUMNS), (views, VIEW_COLUMNS)):
        if table:
            print_table(table, columns)
            print()
    write_json(args.json, vars(args), [*rows, *views])


if __name__ == "__main__":
    main()
