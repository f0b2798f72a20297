"""Attacks on a run: files and names from somebody who means harm.

Every function makes a small run below the folder that it is given, tampers with what it left, and counts what came of
it. `scripts/bench_reliability.py` says what that should be. Hostile video files: `tests/scripts/test_prepare_video.py`.
"""

import copy
import hashlib
import io
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fault_inputs import Figures, train

from dreamer.checkpoint_files import DIGEST, MANIFEST, Damaged, list_checkpoints, verify
from dreamer.checkpoints import load_checkpoint
from dreamer.policy import Policy
from dreamer.report import write_report
from dreamer.run_folder import new_run_dir
from tests.helpers import compose_config, make_run

SCRIPT = "<script>alert(1)</script>"


class Attempts:
    """Counts attacks and those that came to nothing.

    Args:
        folder: Malicious code leaves a file there when it runs.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.marker, self.tried, self.passed = folder / "code_was_run", 0, []

    def payloads(self) -> dict[str, bytes]:
        """Files that run code when they are unpickled."""
        file = io.BytesIO()
        torch.save(Evil(self.marker), file)
        return {"pickle": pickle.dumps(Evil(self.marker)), "torch.save": file.getvalue()}

    def attempt(self, name: str, act: Callable[[], Any], *, must_raise: bool = True) -> None:
        """An attack is blocked if no code of it ran and, where it must, an error was raised."""
        self.tried += 1
        refused = not must_raise
        try:
            act()
        except Exception:  # noqa: BLE001, any refusal will do
            refused = True
        if self.marker.exists() or not refused:
            self.passed.append(name)
        self.marker.unlink(missing_ok=True)

    def figures(self) -> Figures:
        return {"tried": self.tried, "not blocked": ", ".join(self.passed) or "none"}


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def seal(path: Path, change: Callable[[dict], None] = lambda manifest: None) -> None:
    """Write digests that fit the files of a checkpoint, as somebody would who has tampered with it."""
    manifest = json.loads((path / MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        content = (path / name).read_bytes()
        entry.update(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    change(manifest)
    content = json.dumps(manifest).encode()
    (path / MANIFEST).write_bytes(content)
    (path / DIGEST).write_text(f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n")


@contextmanager
def tampered(path: Path, file: str, content: bytes) -> Iterator[None]:
    """One file of a checkpoint replaced, with digests that fit."""
    before = (path / file).read_bytes()
    (path / file).write_bytes(content)
    seal(path)
    yield
    (path / file).write_bytes(before)
    seal(path)


def attack_checkpoint(folder: Path) -> Figures:
    """Put code into every file of a checkpoint, and let its manifest lead elsewhere."""
    attempts, trainer = Attempts(folder), make_run(folder / "run", "collector.total_frames=24")
    train(trainer)
    path = list_checkpoints(folder / "run" / "checkpoints")[-1]
    assert verify(path)
    for file in sorted(json.loads((path / MANIFEST).read_text())["files"]):
        for kind, content in attempts.payloads().items():
            with tampered(path, file, content):
                attempts.attempt(f"{kind} in {file}", lambda: load_checkpoint(trainer, path), must_raise=False)
                if "-loss/" in file or file == "policy.json":
                    attempts.attempt(f"{kind} in {file}, policy", lambda: Policy.load(path))
                if file == "config.yaml":
                    attempts.attempt(f"{kind} in {file}, resume", lambda: make_run(folder / "run", "resume=auto"))
    for name in ("/etc/passwd", "../config.yaml", "a/../../b", "loss\\x"):
        changed = {name: {"size": 1, "sha256": 64 * "0"}}
        with tampered(path, "policy.json", (path / "policy.json").read_bytes()):
            seal(path, lambda manifest, changed=changed: manifest["files"].update(changed))
            attempts.attempt(f"manifest lists {name}", lambda: refuse(path))
            seal_again(path, name)
    (path / "link").symlink_to("/etc/passwd")
    attempts.attempt("link in a checkpoint", lambda: refuse(path))
    return attempts.figures()


def refuse(path: Path) -> None:
    """Raise `ValueError` if a checkpoint is called damaged; other errors are none of its own."""
    try:
        verify(path)
    except Damaged as error:
        raise ValueError from error


def seal_again(path: Path, name: str) -> None:
    """Take an entry out of a manifest."""
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["files"][name]
    (path / MANIFEST).write_text(json.dumps(manifest))


def attack_policy(folder: Path) -> Figures:
    """Put code and names of other modules into an exported policy."""
    attempts, trainer = Attempts(folder), make_run(folder / "run", "collector.total_frames=24")
    train(trainer)
    exported = Policy.load(folder / "run").export(folder / "exported")
    weights, text = (exported / "policy.safetensors").read_bytes(), (exported / "policy.json").read_text()
    for kind, content in attempts.payloads().items():
        description = json.loads(text)
        description["weights"]["sha256"] = hashlib.sha256(content).hexdigest()
        (exported / "policy.safetensors").write_bytes(content)
        (exported / "policy.json").write_text(json.dumps(description))
        attempts.attempt(f"{kind} as weights", lambda: Policy.load(exported))
        (exported / "policy.safetensors").write_bytes(weights)
        (exported / "policy.json").write_bytes(content)
        attempts.attempt(f"{kind} as description", lambda: Policy.load(exported))
    changes = {("agent", "name"): ["os", "parts", "../evil", "dreamer.train", ".", ""]}
    changes |= {("agent", "_target_"): ["os.system"], ("optimization", "_target_"): ["os.system"]}
    changes |= {
        ("action", "size"): [-1, 2**60, "2"],
        ("observation", "observation"): [{"shape": [2**60], "dtype": "float32"}],
    }
    for (group, key), values in changes.items():
        for value in values:
            description = copy.deepcopy(json.loads(text))
            description[group][key] = value
            (exported / "policy.json").write_text(json.dumps(description))
            attempts.attempt(f"{group}.{key}={value}", lambda: Policy.load(exported))
    return attempts.figures()


def attack_config(folder: Path) -> Figures:
    """Put code, classes and references to secrets into the configuration of a run, of a checkpoint and of an agent."""
    attempts, run_dir = Attempts(folder), folder / "run"
    for override in ("+agent._target_=os.system", "+env._target_=os.system", "agent.name=../evil", "agent.name=os"):
        attempts.attempt(override, lambda override=override: make_run(folder / "refused", override))
    train(make_run(run_dir, "collector.total_frames=24"))
    path = list_checkpoints(run_dir / "checkpoints")[-1]
    config = (path / "config.yaml").read_text()
    code = f"!!python/object/apply:builtins.open [{attempts.marker}, w]"
    for name, text in {
        "yaml tag": config + f"evil: {code}\n",
        "yaml tag as value": config.replace("nan_policy: stop", f"nan_policy: {code}"),
        "_target_ in agent": config.replace("agent:\n", "agent:\n  _target_: os.system\n"),
        "reference to a secret": config.replace("project: lucid", "project: ${oc.env:HOME}/secret"),
    }.items():
        assert text != config, name
        with tampered(path, "config.yaml", text.encode()):
            attempts.attempt(
                f"{name}, resume", lambda: attack_resume(run_dir), must_raise=name != "reference to a secret"
            )
    return attempts.figures()


def attack_resume(run_dir: Path) -> None:
    """Go on, and pass on whatever the run would tell others about this machine."""
    trainer = make_run(run_dir, "resume=auto")
    if os.environ["HOME"] in str(trainer.logger.wandb_settings):
        Path(run_dir.parent / "code_was_run").touch()


def attack_names(folder: Path) -> Figures:
    """Use names that lead to other folders, or that a browser would run."""
    attempts = Attempts(folder)

    def stay_inside(path: Path, root: Path) -> None:
        if not path.resolve().is_relative_to(root.resolve()):
            attempts.marker.touch()

    for name in ("../../outside", "/outside", f"..{SCRIPT}"):
        for key in ("name", "task"):
            config = compose_config("env=mock")
            config["env"][key] = name
            attempts.attempt(
                f"env.{key}={name}", lambda c=config: stay_inside(new_run_dir(c), Path("runs")), must_raise=False
            )
    run_dir = folder / SCRIPT.replace("/", "")
    trainer = make_run(run_dir)
    trainer.incident("signal", SCRIPT, fact=SCRIPT)
    trainer.log_now({SCRIPT: 1.0})
    before = set(folder.rglob("*"))
    for name in ("../../outside", "/outside", SCRIPT):
        trainer.logger.log_image(name, torch.zeros(8, 8, 3, dtype=torch.uint8), 0)
    outside = [path for path in set(folder.parent.rglob("outside*")) - before if run_dir not in path.parents]
    attempts.attempt("names of pictures", lambda: outside and attempts.marker.touch(), must_raise=False)
    train(trainer)
    page = write_report([run_dir]).read_text()
    tags = re.findall(r"<script|<iframe|\son\w+=|javascript:|https?://[^\s\"'<]*\.js", page)
    attempts.attempt("names in the report", lambda: tags and attempts.marker.touch(), must_raise=False)
    return attempts.figures()
