"""Where a run starts: anew, or from a checkpoint with the configuration that was saved there."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from dreamer.checkpoint_files import MANIFEST, Damaged, find_checkpoint, list_checkpoints, read_manifest, sweep, verify
from dreamer.redaction import REDACTED, expand_home, redact
from dreamer.run_folder import holds_run, latest_run_dir, new_run_dir

CONFIGS = Path(__file__).parents[1] / "configs"
FIXED = ("seed", "agent.name")  # cannot change once a run has weights and random numbers
OF_THIS_START = ("resume", "run_dir")  # say where to start, not what to run
MISSING = object()

Flat = dict[str, Any]


class Start(NamedTuple):
    """How to start.

    Args:
        config: The configuration to run.
        run_dir: Run folder.
        checkpoint: What to go on from; None for a new run.
        frames: Frames collected before.
        changes: What command-line overrides changed in the saved configuration, one line each.
        notes: What a person should know of the choice, one line each: damaged checkpoints, leftovers.
    """

    config: dict[str, Any]
    run_dir: Path
    checkpoint: Path | None = None
    frames: int = 0
    changes: Sequence[str] = ()
    notes: Sequence[str] = ()


def choose_run_dir(config: Mapping[str, Any]) -> Path:
    """The folder that ``resume`` and ``run_dir`` of a configuration mean.

    Raises:
        FileNotFoundError: if there is no such run or checkpoint.
        FileExistsError: if a new run is asked for in a folder that holds one, or a checkpoint to go on from is not the
            newest one of its run.
    """
    resume = config["resume"]
    if resume is None:
        return new_run_dir(config)
    if resume == "auto":
        if config["run_dir"]:
            return Path(config["run_dir"])
        latest = latest_run_dir(config)
        return new_run_dir(config) if latest is None or is_finished(latest, config) else latest
    path = Path(resume)
    if (path / MANIFEST).exists():
        run_dir = path.resolve().parents[1]
        if config["run_dir"]:
            return new_run_dir(config)
        others = list_checkpoints(run_dir / "checkpoints")
        if not others or others[-1].name != path.name:
            raise FileExistsError(f"resume={resume}: its run has a newer one; give run_dir=<new folder> to branch off")
        return run_dir
    if not holds_run(path):
        raise FileNotFoundError(f"resume={resume}: neither a run folder nor a checkpoint; or give resume=auto")
    if config["run_dir"] and Path(config["run_dir"]).resolve() != path.resolve():
        raise FileExistsError(f"run_dir={config['run_dir']}: a run goes on in its own folder; leave run_dir out")
    return path


def is_finished(run_dir: Path, config: Mapping[str, Any]) -> bool:
    """Whether the newest checkpoint says that the budget of frames is used and nothing is left to be learned."""
    for path in list_checkpoints(run_dir / "checkpoints")[-1:]:
        with suppress(Damaged):
            manifest = read_manifest(path)
            return manifest["frames"] >= config["collector"]["total_frames"] and not manifest["busy"]
    return False


def choose_start(
    config: dict[str, Any],
    run_dir: Path,
    overrides: Sequence[str],
    compose: Callable[[Sequence[str]], dict[str, Any]],
) -> Start:
    """Find the newest whole checkpoint and the configuration to go on with. The folder must be locked.

    Args:
        config: As composed from the command line.
        run_dir: From :func:`choose_run_dir`.
        overrides: Of the command line.
        compose: Overrides -> the configuration that a new run would have with them.

    Raises:
        FileNotFoundError: if ``resume`` names a run without checkpoints.
        Damaged: if none of its checkpoints is whole.
        ValueError: if an override cannot apply to a run that has begun.
    """
    resume = config["resume"]
    if resume is None:
        return Start(config, run_dir)
    checkpoint, notes = Path(resume), []
    if (checkpoint / MANIFEST).exists():
        verify(checkpoint)
    else:
        notes = sweep(run_dir / "checkpoints")
        try:
            checkpoint, damaged = find_checkpoint(run_dir / "checkpoints")
        except FileNotFoundError:
            if resume != "auto":
                raise
            return Start(config, run_dir, notes=notes)
        notes += damaged
    saved = expand_home(OmegaConf.to_container(OmegaConf.load(checkpoint / "config.yaml")))
    changed = apply_overrides(saved, config, overrides, compose)
    changes = list_changes(redact(saved), redact(changed))
    for line in changes:
        if line.split(":")[0] in FIXED:
            raise ValueError(f"resume={resume}: {line} cannot change in a run that has begun; start a new one")
    return Start(changed, run_dir, checkpoint, read_manifest(checkpoint)["frames"], changes, notes)


def apply_overrides(
    saved: Mapping[str, Any],
    composed: Mapping[str, Any],
    overrides: Sequence[str],
    compose: Callable[[Sequence[str]], dict[str, Any]],
) -> dict[str, Any]:
    """The saved configuration with what the command line says explicitly, groups as a whole, but not the same agent.

    Values that were left out of the file because they are secret are taken from ``composed``.
    """
    result = OmegaConf.create(dict(saved))
    given = OmegaConf.create(dict(composed))
    for key, value in flatten(saved).items():
        if REDACTED in str(value):
            OmegaConf.update(result, key, OmegaConf.select(given, key))
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        if key in OF_THIS_START or key.startswith("hydra"):
            continue
        if key == "agent" and override.value() == saved["agent"]["name"]:
            continue  # the group is only named to make its settings known
        if key == "experiment":
            rest = [text for text in overrides if not text.lstrip("+").startswith("experiment=")]
            for name, value in differing(compose(rest), composed).items():
                OmegaConf.update(result, name, value, force_add=True)
            continue
        path = override.package or key.replace("/", ".") if (CONFIGS / key).is_dir() else key
        value = OmegaConf.select(given, path)
        OmegaConf.update(result, path, value, merge=False, force_add=True)
    for key in OF_THIS_START:
        result[key] = composed[key]
    return OmegaConf.to_container(result)


def list_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs between two configurations, one line for each key."""
    old, new = flatten(before), flatten(after)
    names = [name for name in sorted(old | new) if name not in OF_THIS_START and REDACTED not in str(old.get(name))]
    return [
        f"{name}: {old.get(name, 'nothing')} -> {new.get(name, 'nothing')}"
        for name in names
        if old.get(name, MISSING) != new.get(name, MISSING)
    ]


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> Flat:
    """The entries of ``after`` that are not those of ``before``, by dotted name."""
    old = flatten(before)
    return {name: value for name, value in flatten(after).items() if old.get(name, MISSING) != value}


def flatten(config: Mapping[str, Any], prefix: str = "") -> Flat:
    """Entries by dotted name; lists count as one."""
    flat: Flat = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat
