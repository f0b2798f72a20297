"""What a run of World Models takes from another one: its episodes, their encodings, its networks."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchrl.checkpoint import Checkpoint

from dreamer.checkpoint_files import find_checkpoint, verify
from dreamer.checkpoints import TensorsAndJSON
from dreamer.redaction import expand_home

STAGES = ("collect", "vae", "encode", "mdn_rnn", "controller")
TRAINABLE = ("vae", "mdn_rnn")
EPISODES, ENCODINGS = "episodes", "encodings"


def check_stages(stages: Sequence[str], untrained: Sequence[str], source: str | None, rounds: int) -> None:
    """Refuse stages that lack what they need.

    Raises:
        ValueError: naming the setting, and what to give instead.
    """
    if not stages or list(stages) != [name for name in STAGES if name in stages]:
        raise ValueError(f"agent.stages={list(stages)}: choose some of {list(STAGES)}, in this order")
    if not set(untrained) <= set(TRAINABLE):
        raise ValueError(f"agent.untrained={list(untrained)}: choose some of {list(TRAINABLE)}")
    if ("collect" in stages) == (source is not None):
        fix = "leave out one of them" if source else "add collect, or name the run that collected"
        raise ValueError(f"agent.stages={list(stages)}, agent.source={source}: {fix}")
    if rounds > 1 and source is not None:
        raise ValueError(f"agent.rounds={rounds}, agent.source={source}: a run that collects nothing has one round")
    for part, users in (("vae", {"encode", "controller"}), ("mdn_rnn", {"controller"})):
        if users & set(stages) and source is None and part not in (*stages, *untrained):
            raise ValueError(f"agent.stages={list(stages)}: add {part}, or agent.untrained=[{part}] for random weights")
    another = "vae" in (*stages, *untrained)
    if {"mdn_rnn", "controller"} & set(stages) and "encode" not in stages and (source is None or another):
        raise ValueError(f"agent.stages={list(stages)}: add encode, because nothing is encoded by this V yet")


def find_episodes(source: str) -> Path:
    """The folder of the episodes that a run learned from, its own or those of its source.

    Raises:
        FileNotFoundError: if there are none.
    """
    run = Path(source).expanduser()
    folder = run / EPISODES
    if folder.is_dir():
        return folder
    further = _describe(run).get("agent", {}).get("source")
    if further and Path(further) != run:
        return find_episodes(further)
    raise FileNotFoundError(f"agent.source={source}: there is no {folder}; name the folder of a run that collected")


def find_encodings(source: str) -> Path:
    """The folder of the encodings that a run made.

    Raises:
        FileNotFoundError: if there are none.
    """
    folder = Path(source).expanduser() / ENCODINGS
    if not folder.is_dir():
        raise FileNotFoundError(f"agent.source={source}: there is no {folder}; add encode to agent.stages")
    return folder


def check_world(source: str, shape: Sequence[int], action_size: int) -> None:
    """Refuse a run that saw or did something else.

    Args:
        source: Folder of the run.
        shape: Of what V sees in this run.
        action_size: Numbers of an action, or choices.

    Raises:
        ValueError: naming what differs.
    """
    there = _describe(Path(source).expanduser())
    if not there:
        return
    seen = there["observation"].get("pixels") or there["observation"].get("observation") or {"shape": []}
    if list(seen["shape"]) != list(shape):
        raise ValueError(
            f"agent.source={source}: it saw {_say(seen['shape'])}, this run sees {_say(shape)}; give the same env"
        )
    size = there["action"].get("choices", there["action"].get("size"))
    if size != action_size:
        raise ValueError(
            f"agent.source={source}: its actions have {size} numbers or choices, those of this run {action_size}; "
            "give the same env"
        )


def check_sizes(source: str, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a run whose networks have other sizes.

    Args:
        source: Folder of the run.
        settings: Those that the networks depend on which are taken from it, by group of ``agent``.

    Raises:
        ValueError: naming the settings that differ, and the overrides that mend it.
    """
    there = _describe(Path(source).expanduser()).get("agent", {})
    pairs = {
        f"agent.{group}.{key}": (there.get(group, {}).get(key, value), value)
        for group, entries in settings.items()
        for key, value in entries.items()
    }
    wrong = {name: (its, ours) for name, (its, ours) in pairs.items() if its != ours}
    if wrong:
        differences = ", ".join(f"{name}: {its} in the source, {ours} here" for name, (its, ours) in wrong.items())
        fix = " ".join(f"{name}={json.dumps(its, separators=(',', ':'))}" for name, (its, _) in wrong.items())
        raise ValueError(f"agent.source={source}: {differences}; give {fix}")


def load_networks(source: str, networks: Mapping[str, nn.Module]) -> None:
    """Load networks from the newest checkpoint of a run.

    Args:
        source: Folder of the run.
        networks: By the names under which its loss module has them.

    Raises:
        FileNotFoundError: if it has no checkpoint.
        ValueError: for networks of other sizes.
    """
    checkpoint, _ = find_checkpoint(Path(source).expanduser() / "checkpoints")
    verify(checkpoint)
    saved = _Saved()
    Checkpoint().register("loss", saved, adapter=TensorsAndJSON()).load(checkpoint)
    for name, network in networks.items():
        prefix = f"{name}."
        state = {key.removeprefix(prefix): value for key, value in saved.state.items() if key.startswith(prefix)}
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"agent.source={source}: its {name} does not fit the settings of this run: {error}"
            ) from error


def _describe(run: Path) -> dict[str, Any]:
    """What `policy.json` of a run says: the settings of its agent, what it saw and did. Empty without that file."""
    path = run / "policy.json"
    return expand_home(json.loads(path.read_text())) if path.exists() else {}


def _say(shape: Sequence[int]) -> str:
    return "pixels" if len(shape) == 3 else f"{math.prod(shape)} numbers"


class _Saved:
    """Takes the state of a component as it is."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.state = state
