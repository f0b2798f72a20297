"""Ask of World Models what each part is good for: {z, [z, h]} x {trained, untrained M} x {trained, random V}.

    python scripts/ablate_world_models.py --source runs/world_models_... --out runs/ablation
    python scripts/ablate_world_models.py --out runs/ablation env=gym env.name=LunarLander-v3 env.from_pixels=true

Every cell evolves a controller in the real environment, on the data set of one finished run (--source; without it, that
run is made first, in `<out>/source`, from the overrides), and is then evaluated on the same held-out episodes. What is
untrained keeps its first, random weights; behind a random V, M is trained on what that V makes of the images. A
controller that sees z alone does not depend on M, so that the two cells are one run. Vectors in place of images are
only standardised: there is no V to leave untrained, and the cells are {z, [z, h]} x {trained, untrained M}. Overrides,
for example `agent.controller.generations=50`, are for all runs.

Called again with the same folder, it skips what is finished and goes on with the rest. The table is printed and written
to `<out>/ablation.json`.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from bench_common import load_config, print_table, write_json
from omegaconf import OmegaConf
from run_suite import quote

from dreamer.interruption import EXIT_INTERRUPTED
from dreamer.settings import differing

PROGRAMS = Path(__file__).parents[1] / "dreamer"
OWN = ("agent.stages", "agent.source", "agent.untrained", "agent.controller.inputs", "agent.controller.fitness")
OF_THE_RUN = (*OWN, "agent.name", "run_dir", "resume")


class Cell(NamedTuple):
    """One row of the table."""

    inputs: str  # of the controller: z, or zh for [z, h]
    model: bool  # whether M is trained
    vision: bool | None  # whether V is trained; None where observations are vectors

    @property
    def folder(self) -> str:
        """Name of the run; two cells that are the same have the same."""
        model = "" if self.inputs == "z" else f"__{'trained' if self.model else 'untrained'}_m"
        vision = {True: "__trained_v", False: "__random_v", None: ""}[self.vision]
        return f"{self.inputs}{model}{vision}"

    def overrides(self) -> list[str]:
        """Arguments of `dreamer/train.py` that make this cell what it is."""
        model = self.inputs == "zh" and self.model  # a controller of z alone needs none
        random = self.vision is False
        untrained = ["vae"] * random + ["mdn_rnn"] * (not model)
        stages = ["encode"] * random + ["mdn_rnn"] * (model and random)  # they depend on V
        return [
            f"agent.controller.inputs={self.inputs}",
            "agent.controller.fitness=real",
            f"agent.untrained=[{','.join(untrained)}]",
            f"agent.stages=[{','.join([*stages, 'controller'])}]",
        ]


CELLS = [Cell(*cell) for cell in product(("z", "zh"), (True, False), (True, False))]
CELLS_OF_VECTORS = [Cell(*cell) for cell in product(("z", "zh"), (True, False), (None,))]


def sees_images(source: Path) -> bool:
    """Whether a run learned from images, not from vectors."""
    return "pixels" in json.loads((source / "policy.json").read_text())["observation"]


def describe_source(source: Path) -> list[str]:
    """The settings of a run as overrides, but for those that the cells differ in."""
    saved = OmegaConf.to_container(OmegaConf.load(source / "config.yaml"))
    groups = ["agent=world_models", f"env={saved['env']['backend']}"]
    values = differing(load_config(*groups), saved)
    return groups + [f"++{name}={json.dumps(value)}" for name, value in values.items() if name not in OF_THE_RUN]


def run(program: str, folder: Path, arguments: Sequence[str]) -> None:
    """Run a program of `dreamer/`; what it prints goes into `console.log` of the folder.

    Raises:
        SystemExit: if it fails, or saved because it was interrupted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(PROGRAMS / program), *arguments]
    with open(folder / "console.log", "ab") as log:
        log.write(f"{shlex.join(command)}\n".encode())
        log.flush()
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code == EXIT_INTERRUPTED:
        print(f"{folder.name}: interrupted; call again with the same arguments to go on", file=sys.stderr)
        sys.exit(code)
    if code:
        sys.exit(f"{folder.name}: FAILED with exit code {code}, see {folder / 'console.log'}")


def train(folder: Path, overrides: Sequence[str]) -> None:
    """Train a run to its end, unless it is finished."""
    if (folder / "summary.json").exists():
        print(f"{folder.name}: finished before", flush=True)
        return
    print(f"{folder.name}: training", flush=True)
    run("train.py", folder, [*overrides, f"run_dir={quote(str(folder))}", "resume=auto"])
    (folder / "summary.json").write_text(json.dumps({"started_by": Path(__file__).name}))


def evaluate(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Mean, deviation and frames of a run; played unless there is a result of the same episodes."""
    path = folder / "eval.json"
    played = json.loads(path.read_text()) if path.exists() else {}
    results = played.get("results", {}).get("deterministic", {"returns": []})
    if played.get("seed") != args.eval_seed or len(results["returns"]) != args.episodes:
        options = [f"run={quote(str(folder))}", f"episodes={args.episodes}", f"seed={args.eval_seed}"]
        run("eval.py", folder, [*options, "deterministic=true"])
        results = json.loads(path.read_text())["results"]["deterministic"]
    return {"mean": results["mean"], "std": results["std"], "frames": read_frames(folder)}


def read_frames(folder: Path) -> int:
    """Simulator frames that a run consumed, those of its data set and of the fitness included."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return int(next(line["trainer/env_frames"] for line in reversed(lines) if "trainer/env_frames" in line))


def parse_args() -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="finished run of agent=world_models; trained first by default")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of the table")
    parser.add_argument("--episodes", type=int, default=100, help="held-out episodes per cell")
    parser.add_argument("--eval-seed", type=int, default=1_000_000, help="seed of the held-out episodes")
    parser.add_argument("overrides", nargs="*", help="for all runs, for example agent.controller.generations=50")
    args = parser.parse_args()
    for override in args.overrides:
        if (key := override.partition("=")[0].lstrip("+~")) in (*OWN, "agent", "run_dir", "resume"):
            parser.error(f"{override}: {key} is what this program sets")
    if args.source is not None and not all((args.source / name).exists() for name in ("config.yaml", "policy.json")):
        parser.error(f"--source={args.source}: no run there")
    args.out = args.out.resolve()
    return args


def main() -> None:
    args = parse_args()
    source = args.source and args.source.resolve()
    if source is None:
        source = args.out / "source"
        train(source, ["agent=world_models", "agent.stages=[collect,vae,encode,mdn_rnn]", *args.overrides])
    shared = [*describe_source(source), *args.overrides, f"agent.source={quote(str(source))}"]
    rows, images = [], sees_images(source)
    for cell in CELLS if images else CELLS_OF_VECTORS:
        folder = args.out / cell.folder
        if folder.name not in {row["run"] for row in rows}:
            train(folder, [*shared, *cell.overrides()])
        words = {"inputs": cell.inputs, "M": "trained" if cell.model else "untrained"}
        words |= {"V": {True: "trained", False: "random", None: "standardised numbers"}[cell.vision]}
        rows.append({"run": folder.name, **words, **evaluate(folder, args)})
    print(f"{args.episodes} held-out episodes each, seed {args.eval_seed}")
    if not images:
        print("observations are numbers, which are only standardised: there is no V to leave untrained")
    print_table(rows, {"run": "", "inputs": "", "M": "", "V": "", "mean": ".1f", "std": ".1f", "frames": ",.0f"})
    write_json(args.out / "ablation.json", {"source": source, "overrides": args.overrides}, rows)


if __name__ == "__main__":
    main()
