"""Evaluate a trained agent: ``python dreamer/eval.py run=runs/my_run episodes=20 video=true``.

Only the run folder is needed. The environment is the one of the training; ``env/distraction=color_grid_max`` and
``env.distraction.table_seed=2`` change it as in `dreamer/train.py`. With the number of episodes, of environments and
the seed of the training, the returns are those of its own evaluation.

A run folder may come from strangers: what is saved in it is read as plain JSON and tensors, and an environment that
would import a module (``env.name=module:name``) is refused unless ``trust=true``.
"""

import inspect
import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dreamer.agents import EnvSpec
from dreamer.collection import EnvFactory, derive_seed
from dreamer.evaluation import EVALUATION, Episodes, run_seeded_episodes
from dreamer.loggers import write_video
from dreamer.policy import Acting, describe_action, load_acting, read_description
from dreamer.provenance import describe_versions
from dreamer.score_statistics import iqm
from dreamer.train import choose_device
from envs import make_env

KINDS = {False: ("sampled",), True: ("deterministic",), "both": ("sampled", "deterministic")}
OF_THE_PROGRAM = {"seed", "stream", "device", "transforms"}  # arguments of make_env that no configuration gives
FILM = {"from_pixels": True, "pixels_only": False, "image_size": 240}  # to see an agent that sees no images
SMALLEST_FILM = 240  # pixels; smaller images are enlarged


def main() -> None:
    """Offer the environment of the run to the configuration, then evaluate."""
    if not any(argument.startswith(("run=", "-")) for argument in sys.argv[1:]):
        sys.exit("give run=<folder>, a run folder or an exported policy; --help lists the rest")
    offer_environment(sys.argv[1:])
    run_program()


@hydra.main(config_path="../configs", config_name="eval", version_base="1.3")
def run_program(cfg: DictConfig) -> None:
    """Evaluate, print a table and write ``eval.json``."""
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    evaluate(config, prepare(config))


def offer_environment(arguments: Sequence[str]) -> None:
    """Make the saved environment of ``run=`` the choices `env=as_trained` and `env/distraction=as_trained`."""
    env: dict[str, Any] = {}
    for argument in arguments:
        if argument.startswith("run="):
            run = OverridesParser.create().parse_override(argument).value()
            env = saved_environment(read_description(Path(str(run))))
    distraction = env.pop("distraction", None) or {"name": "none"}
    ConfigStore.instance().store(group="env", name="as_trained", node=env)
    ConfigStore.instance().store(group="env/distraction", name="as_trained", node=distraction)


def saved_environment(description: Mapping[str, Any]) -> dict[str, Any]:
    """The environment of a run, as keyword arguments of `make_env`.

    Raises:
        ValueError: if it is anything else, or says something to the configuration library.
    """
    env = description.get("env")
    known = inspect.signature(make_env).parameters.keys() - OF_THE_PROGRAM
    if not isinstance(env, dict) or not env.keys() <= known or type(env.get("name")) is not str:
        raise ValueError(f"saved env={env!r}: not the keys of an environment, {sorted(known)}")
    check_plain("env", env)
    return dict(env)


def check_plain(name: str, value: Any) -> None:
    """Refuse interpolations, which could read what is none of their business, and lists of defaults."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not key.isidentifier() or key == "defaults":
                raise ValueError(f"saved {name} has the key {key!r}: not that of an environment")
            check_plain(f"{name}.{key}", item)
    elif isinstance(value, list):
        for item in value:
            check_plain(name, item)
    elif isinstance(value, str) and ("${" in value or value == "???"):
        raise ValueError(f"saved {name}={value!r}: a saved configuration has no interpolations")


def prepare(config: Mapping[str, Any]) -> Acting:
    """Load what acts; nothing is written.

    Args:
        config: Plain; see ``configs/eval.yaml``.

    Raises:
        ValueError: for settings that make no sense, or an environment that the weights cannot act in.
    """
    check(config)
    run, env = Path(config["run"]), config["env"]
    acting = load_acting(run, checkpoint=str(config["checkpoint"]), device=choose_device(config["device"]))
    check_trust(env["name"], saved_environment(read_description(run))["name"], config["trust"])
    check_fits(env, acting)
    return acting


def evaluate(config: Mapping[str, Any], acting: Acting) -> dict[str, Any]:
    """Run the episodes of a configuration.

    Args:
        config: Plain; see ``configs/eval.yaml``.
        acting: From :func:`prepare`.

    Returns:
        What was written to ``eval.json``.
    """
    run, env = Path(config["run"]), config["env"]
    out = Path(config["out"] or run)
    out.mkdir(parents=True, exist_ok=True)
    seed = acting.description["seed"] if config["seed"] is None else config["seed"]
    report = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": acting.source.name,
        "frames": acting.frames,
        "agent": acting.description["agent"]["name"],
        "env": env,
        "as_trained": env == saved_environment(read_description(run)),
        "seed": seed,
        "num_envs": min(config["num_envs"], config["episodes"]),
        "device": str(choose_device(config["device"])),
        "versions": describe_versions(),
        "results": {},
    }
    for kind in KINDS[config["deterministic"]]:
        start = time.monotonic()
        episodes = play(env, acting, report, config["episodes"], kind, film=config["video"])
        result = summarize(episodes, env["frame_skip"]) | {"seconds": round(time.monotonic() - start, 1)}
        if episodes.frames is not None:
            result["video"] = f"eval_{kind}.mp4"
            write_video(out / result["video"], enlarge(episodes.frames), config["video_fps"])
        report["results"][kind] = result
        (out / "eval.json").write_text(json.dumps(report, indent=2))
    print(f"{format_table(report)}\nwritten: {out / 'eval.json'}")  # noqa: T201
    return report


def play(
    env: Mapping[str, Any], acting: Acting, report: Mapping[str, Any], episodes: int, kind: str, *, film: bool
) -> Episodes:
    """Run the episodes of one kind. An agent without images is filmed when it plays the first ones a second time."""

    def run(env: Mapping[str, Any], episodes: int, record: str | None) -> Episodes:
        seed = derive_seed(report["seed"], EVALUATION)
        made = EnvFactory(env, range(report["num_envs"]), seed, acting.primers)()
        try:
            device = torch.device(report["device"])
            return run_seeded_episodes(
                made, acting.policy, episodes, device, seed=seed, deterministic=kind == "deterministic", record=record
            )
        finally:
            made.close()

    played = run(env, episodes, "pixels" if film and env["from_pixels"] else None)
    if film and not env["from_pixels"]:
        return played._replace(frames=run({**env, **FILM}, 1, "pixels").frames)
    return played


def summarize(episodes: Episodes, frame_skip: int) -> dict[str, Any]:
    """Statistics of the returns, and every episode."""
    returns = np.array(episodes.returns)
    return {
        "mean": float(returns.mean()),
        "std": float(returns.std()),
        "min": float(returns.min()),
        "max": float(returns.max()),
        "iqm": float(iqm(returns)),
        "returns": episodes.returns,
        "lengths": [steps * frame_skip for steps in episodes.lengths],  # frames
        "seeds": episodes.seeds,
    }


def enlarge(frames: Tensor) -> Tensor:
    """Repeat the pixels of small images [T, h, w, 3], so that a person can see them."""
    times = max(1, -(-SMALLEST_FILM // frames.shape[1]))
    return frames.repeat_interleave(times, 1).repeat_interleave(times, 2)


def format_table(report: Mapping[str, Any]) -> str:
    """What was evaluated, and a line per kind of actions."""
    task = " ".join(str(report["env"][key]) for key in ("name", "task") if report["env"][key])
    lines = [f"{report['agent']} from {report['checkpoint']} in {task}, seed {report['seed']}"]
    lines.append(f"{'actions':<15}{'mean':>10}{'std':>10}{'min':>10}{'max':>10}{'iqm':>10}{'episodes':>10}")
    for kind, result in report["results"].items():
        columns = "".join(f"{result[name]:>10.1f}" for name in ("mean", "std", "min", "max", "iqm"))
        lines.append(f"{kind:<15}{columns}{len(result['returns']):>10}")
    return "\n".join(lines)


def check(config: Mapping[str, Any]) -> None:
    """Refuse settings that make no sense."""
    if config["deterministic"] not in KINDS:
        raise ValueError(f"deterministic={config['deterministic']!r}: choose one of {list(KINDS)}")
    for name in ("episodes", "num_envs", "video_fps"):
        if type(config[name]) is not int or config[name] < 1:
            raise ValueError(f"{name}={config[name]!r}: give a whole number above 0")
    if config["seed"] is not None and (type(config["seed"]) is not int or config["seed"] < 0):
        raise ValueError(f"seed={config['seed']!r}: give a whole number from 0, or null for that of the run")


def check_trust(name: str, saved_name: str, trust: bool) -> None:
    """Refuse to import what a saved environment names, unless it is trusted or named on the command line."""
    if ":" in name and not trust and name == saved_name:
        raise ValueError(
            f"the run's env.name={name!r} imports the module {name.split(':')[0]!r}: if you trust it, give trust=true"
        )


def check_fits(env: Mapping[str, Any], acting: Acting) -> None:
    """Refuse an environment whose observations or actions are not those of the weights."""
    probe = make_env(**env)
    given = EnvSpec.of(probe)
    probe.close()
    wanted = acting.env_spec
    for key in acting.keys:
        here = given.observation[key] if key in given.observation.keys() else None  # noqa: SIM118
        if here is None or (here.shape, here.dtype) != (wanted.observation[key].shape, wanted.observation[key].dtype):
            found = "nothing" if here is None else f"{here.dtype} {list(here.shape)}"
            needed = f"{wanted.observation[key].dtype} {list(wanted.observation[key].shape)}"
            raise ValueError(
                f"observation {key!r}: the environment gives {found}, the weights need {needed}; "
                "leave out what changes it: env=, env.image_size=, env.from_pixels=, env.pixels_only="
            )
    if describe_action(given.action) != describe_action(wanted.action):
        actions = [describe_action(spec) for spec in (given.action, wanted.action)]
        raise ValueError(
            f"actions: the environment takes {actions[0]}, the weights give {actions[1]}; name its own task"
        )


if __name__ == "__main__":
    main()
