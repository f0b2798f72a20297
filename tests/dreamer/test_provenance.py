"""What `run.json` says of a start, and what it keeps to itself."""

import getpass
import json
import os
import platform
import subprocess
from pathlib import Path

import pytest

from dreamer import provenance


def record(folder: Path, **changes) -> dict:
    arguments = {"command": ["train.py", "seed=1"], "frames": 0, "resumed_from": None, "overrides": ["seed=1"]}
    provenance.record_start(folder, **arguments | changes)
    return json.loads((folder / "run.json").read_text())


def test_every_start_is_appended(tmp_path):
    record(tmp_path)
    starts = record(tmp_path, frames=500, resumed_from="checkpoints/frames_500")["starts"]
    assert [start["frames"] for start in starts] == [0, 500]
    assert [start["resumed_from"] for start in starts] == [None, "checkpoints/frames_500"]
    assert starts[0]["command"] == ["train.py", "seed=1"] and starts[0]["time"].endswith("+00:00")
    assert {"python", "torch", "torchrl", "tensordict", "numpy", "mujoco", "dm_control"} <= set(starts[0]["versions"])
    assert starts[0]["hardware"]["cores"] >= 1 and starts[0]["hardware"]["memory_gb"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_nothing_private_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/planted")
    monkeypatch.setenv("SOME_TOKEN", "planted-secret")
    command = ["/home/planted/lucid/dreamer/train.py", "run_dir=/home/planted/runs/a"]
    text = json.dumps(record(tmp_path, command=command, resumed_from="/home/planted/runs/a/checkpoints/frames_1"))
    assert "planted" not in text and "run_dir=~/runs/a" in text and '"~/runs/a/checkpoints/frames_1"' in text
    assert platform.node() not in text.split('"platform"')[0]
    assert getpass.getuser() == "root" or getpass.getuser() not in text


@pytest.mark.parametrize("content", ["{", "[]", '{"starts": 3}', ""])
def test_damaged_file_is_kept_aside(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    assert len(record(tmp_path)["starts"]) == 1
    assert (tmp_path / "run.json.damaged").read_text() == content


def git(folder: Path, *arguments: str) -> None:
    settings = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *settings, *arguments], check=True, capture_output=True)


def test_source_is_a_commit_and_whether_files_differ(tmp_path):
    assert provenance.describe_source(tmp_path) is None
    git(tmp_path, "init")
    (tmp_path / "a.py").write_text("a = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    clean = provenance.describe_source(tmp_path)
    assert clean is not None and len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "a.py").write_text("a = 2\n")
    assert provenance.describe_source(tmp_path) == clean | {"dirty": True}
    (tmp_path / "inner").mkdir()
    assert provenance.describe_source(tmp_path / "inner") is None  # somebody else's checkout


def test_source_when_git_hangs_or_is_absent(tmp_path, monkeypatch):
    def hang(*arguments, timeout, **options):
        raise subprocess.TimeoutExpired("git", timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert provenance.describe_source(tmp_path) is None
    monkeypatch.undo()
    monkeypatch.setenv("PATH", os.devnull)
    assert provenance.describe_source(provenance.SOURCE) is None
