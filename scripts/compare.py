"""Compare trained agents on the same held-out episodes.

    python scripts/compare.py runs/dreamer_v3_* runs/ppo_* episodes=20
    python scripts/compare.py runs/a runs/b env/distraction=color_grid_max deterministic=true out=comparisons/max

The folders are runs, checkpoints or exported policies; `key=value` are those of `dreamer/eval.py`, for all of them. All
play the episodes of one seed (`seed=1_000_000` unless it is given), which no training and no evaluation during it may
have had. Task, frame skip and distraction must be the same; what the agents see of it may differ. Runs whose agents
differ in nothing but the seed count as one agent. Writes into `out=` (`runs/comparison`):

    comparison.md      one line per agent and kind of actions, sampled ones and the mode of the actor
    comparison.json    the same with every run: settings, returns, frames
    <number>_<run>/    eval.json of each

The score of a run is its mean return. Mean, standard deviation and interquartile mean are over the scores of an agent's
runs, or over the episodes if there is only one run, and the interval holds 95 % of the interquartile means of bootstrap
samples of the same: of one run it says nothing about another training. The frames are those that training consumed:
`trainer/env_frames` of `metrics.jsonl`, which are collected frames and those of searches in the environment.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import OmegaConf

from dreamer.checkpoint_files import MANIFEST
from dreamer.eval import evaluate, offer_environment, prepare
from dreamer.files import write_whole
from dreamer.policy import Acting
from dreamer.score_statistics import estimate_iqm
from dreamer.settings import flatten

USAGE = "usage: python scripts/compare.py <folder> <folder> ... [key=value of dreamer/eval.py] [out=<folder>]"
HELD_OUT, OUT = 1_000_000, Path("runs/comparison")
SIGHT = ("from_pixels", "pixels_only", "image_size", "render", "emit_mask", "grey", "frame_stack", "options.crop_rows")
OF_A_RUN = ("seed", "source")  # settings of an agent that are not what it is
COLUMNS = ("agent", "actions", "runs", "frames", "mean", "std", "IQM", "95 % interval")


class Entry(NamedTuple):
    """One of the runs.

    Args:
        run: Its folder.
        config: Of its evaluation; see ``configs/eval.yaml``.
        acting: What acts.
    """

    run: Path
    config: dict[str, Any]
    acting: Acting

    @property
    def settings(self) -> dict[str, Any]:
        """What makes this agent another one than those of other runs, by dotted name."""
        description = self.acting.description
        sight = {key: value for key, value in flatten(description["env"]).items() if is_sight(key)}
        whole = flatten({"agent": description["agent"], "optimization": description["optimization"], "env": sight})
        return {key: value for key, value in whole.items() if key.rpartition(".")[2] not in OF_A_RUN}


def parse(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Folders and overrides of a command line.

    Raises:
        ValueError: for no folder, one that is there twice, or one in the form of an override.
    """
    folders, overrides = [], []
    for argument in arguments:
        is_folder = "=" not in argument or Path(argument).is_dir()
        folders.append(Path(argument)) if is_folder else overrides.append(argument)
    if not folders or any(override.startswith("run=") for override in overrides):
        raise ValueError(USAGE)
    places = [folder.resolve() for folder in folders]
    if twice := sorted({str(folder) for folder, place in zip(folders, places, strict=True) if places.count(place) > 1}):
        raise ValueError(f"{', '.join(twice)}: name every folder once")
    return folders, overrides


def configure(run: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration with which `dreamer/eval.py` would evaluate a run, on the held-out seed."""
    named = f"run={json.dumps(str(run))}"
    offer_environment([named])
    with initialize_config_module("configs", version_base="1.3"):
        config = OmegaConf.to_container(compose("eval", overrides=[*overrides, named]), resolve=True)
    return config | {"seed": HELD_OUT if config["seed"] is None else config["seed"]}


def check_comparable(entries: Sequence[Entry]) -> None:
    """Refuse what would not be a comparison.

    Raises:
        ValueError: for another task, frame skip or distraction, a seed that a run has used, or the same run twice.
    """
    first, *others = entries
    expected = describe_task(first.config["env"])
    for entry in others:
        given = describe_task(entry.config["env"])
        if wrong := [key for key in sorted(expected | given) if expected.get(key) != given.get(key)]:
            left, right = ({f"env.{key}": task.get(key) for key in wrong} for task in (expected, given))
            raise ValueError(
                f"{first.run} has {left}, {entry.run} has {right}: compare runs of the same environment, or give it "
                "to all, such as env/distraction=none"
            )
    known: dict[str, Path] = {}
    for entry in entries:
        seed = entry.acting.description["seed"]
        if seed == entry.config["seed"]:
            raise ValueError(f"seed={seed}: {entry.run} was trained with it, so its episodes are not held out")
        other = known.setdefault(json.dumps([seed, entry.settings], sort_keys=True), entry.run)
        if other != entry.run:
            raise ValueError(f"{other} and {entry.run}: the same agent with the same seed {seed}; name one of them")


def describe_task(env: Mapping[str, Any]) -> dict[str, Any]:
    """What an environment is, whatever an agent sees of it, by dotted name."""
    whole = flatten({**env, "distraction": env.get("distraction") or {"name": "none"}})
    return {key: value for key, value in whole.items() if not is_sight(key) and value not in (None, {})}


def is_sight(key: str) -> bool:
    """Whether an entry of an environment, by dotted name, says how it is seen and not what it is."""
    return any(key == name or key.startswith(f"{name}.") for name in SIGHT)


def name_agents(entries: Sequence[Entry]) -> list[str]:
    """A name for the agent of each run: that of its module, and the settings in which those of one name differ."""
    flats = [entry.settings for entry in entries]
    names = [flat["agent.name"] for flat in flats]
    same = {name: [flat for flat in flats if flat["agent.name"] == name] for name in names}

    def label(flat: Mapping[str, Any]) -> str:
        name = flat["agent.name"]
        keys = [key for key in flat if len({str(other.get(key)) for other in same[name]}) > 1]
        return " ".join([name, *(f"{key}={flat[key]}" for key in keys)])

    return [label(flat) for flat in flats]


def count_frames(entry: Entry) -> int | None:
    """Frames that the training of a run consumed until its weights were saved; None if nobody knows."""
    saved, run = entry.acting.frames, entry.run.resolve()
    path = (run.parents[1] if (run / MANIFEST).exists() else run) / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    consumed = [
        int(line.get("trainer/env_frames", line["frames"]))
        for line in lines
        if saved is None or line["frames"] <= saved
    ]
    return max(consumed, default=saved)


def summarize(name: str, kind: str, results: Sequence[Mapping[str, Any]], frames: Sequence[int | None]) -> dict:
    """A line of the table: what an agent reached with one kind of actions.

    Args:
        name, kind: Of the agent and of the actions.
        results: What `dreamer.eval` says of each of its runs.
        frames: Consumed by each.
    """
    scores = [result["mean"] for result in results] if len(results) > 1 else results[0]["returns"]
    estimate = estimate_iqm({"": scores})
    known = [count for count in frames if count is not None]
    return {
        "agent": name,
        "actions": kind,
        "runs": len(results),
        "frames": known,
        "mean": float(np.mean(scores)),
        "std": float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
        "iqm": estimate.value,
        "interval": None if math.isnan(estimate.low) else [estimate.low, estimate.high],
    }


def make_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows in Markdown, numbers to the right."""
    lines = [COLUMNS, ["---", "---", *["---:"] * (len(COLUMNS) - 2)]]
    for row in rows:
        counts = sorted(set(row["frames"]))
        frames = " to ".join(f"{count:,}" for count in (counts[:1] + counts[1:][-1:]))
        std = "" if row["std"] is None else f"{row['std']:.1f}"
        interval = "" if row["interval"] is None else "{:.1f} to {:.1f}".format(*row["interval"])
        figures = [f"{row['mean']:.1f}", std, f"{row['iqm']:.1f}", interval]
        lines.append([row["agent"], row["actions"], str(row["runs"]), frames, *figures])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def compare(entries: Sequence[Entry], out: Path) -> str:
    """Run the episodes of all, write the results into a folder and return the table."""
    reports = []
    for number, entry in enumerate(entries, 1):
        place = out / f"{number}_{entry.run.resolve().name}"
        reports.append(evaluate(entry.config | {"out": str(place)}, entry.acting))
    names, frames = name_agents(entries), [count_frames(entry) for entry in entries]
    rows = []
    for name in dict.fromkeys(names):
        own = [index for index, other in enumerate(names) if other == name]
        for kind in reports[0]["results"]:
            results = [reports[index]["results"][kind] for index in own]
            rows.append(summarize(name, kind, results, [frames[index] for index in own]))
    table, env, seed = make_table(rows), describe_task(reports[0]["env"]), reports[0]["seed"]
    runs = [
        {"run": str(entry.run), "name": name, "consumed_frames": count, "settings": entry.settings} | report
        for entry, name, count, report in zip(entries, names, frames, reports, strict=True)
    ]
    task = " ".join(str(env[key]) for key in ("name", "task") if key in env)
    text = (
        f"{task}, distraction {env['distraction.name']}, frame skip {env['frame_skip']}: "
        f"{entries[0].config['episodes']} episodes of seed {seed}\n\n{table}"
    )
    whole = {"env": env, "seed": seed, "agents": rows, "runs": runs}
    write_whole(out / "comparison.json", json.dumps(whole, indent=2).encode())
    write_whole(out / "comparison.md", text.encode())
    return text


def main() -> None:
    """Compare the runs of the command line."""
    try:
        folders, overrides = parse(sys.argv[1:])
        configs = [configure(folder, overrides) for folder in folders]
        entries = [Entry(run, config, prepare(config)) for run, config in zip(folders, configs, strict=True)]
        check_comparable(entries)
    except (OSError, ValueError, HydraException) as error:
        sys.exit(str(error))
    out = Path(configs[0]["out"] or OUT)
    print(f"\n{compare(entries, out)}\nwritten: {out / 'comparison.md'}")


if __name__ == "__main__":
    main()
