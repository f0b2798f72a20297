"""Checkpoints on disk: whole or not there, whatever is killed, damaged, full or forged."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dreamer import checkpoint_files
from dreamer.checkpoint_files import (
    DIGEST,
    MANIFEST,
    Damaged,
    find_checkpoint,
    list_checkpoints,
    publish,
    rotate,
    sweep,
    verify,
)
from tests.dreamer.faults import ROOT, corruptions, detect_corruptions, kill_while_saving

ID = "0" * 32


def save(folder: Path, name: str, content: bytes = b"content", **options) -> Path:
    def write(stage: Path) -> None:
        (stage / "part").mkdir()
        (stage / "part" / "data.bin").write_bytes(content)
        (stage / "empty.bin").touch()

    return publish(folder, name, write, {"frames": 7, "updates": 3}, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def forge(path: Path, change) -> None:
    """Rewrite a manifest as somebody would who can compute digests."""
    manifest = json.loads((path / MANIFEST).read_bytes())
    change(manifest)
    content = json.dumps(manifest).encode()
    (path / MANIFEST).write_bytes(content)
    (path / DIGEST).write_text(f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n")


class TestPublish:
    def test_manifest(self, tmp_path):
        path = save(tmp_path / "run" / "checkpoints", "frames_7", b"twelve bytes")
        manifest = verify(path)
        assert (manifest["frames"], manifest["updates"]) == (7, 3)
        expected = hashlib.sha256(b"twelve bytes").hexdigest()
        assert manifest["files"]["part/data.bin"] == {"size": 12, "sha256": expected}
        assert manifest["files"]["empty.bin"]["size"] == 0 and len(manifest["files"]) == 2
        assert set(manifest["versions"]) == {"python", "torch", "torchrl", "tensordict", "numpy", "lucid-rl"}
        assert names(path.parent) == ["frames_7"]

    def test_entries_of_another_manifest_are_kept(self, tmp_path):
        def write(stage: Path) -> None:
            (stage / MANIFEST).write_text(json.dumps({"format": "other", "versions": {"torch": "2.13.0+cpu"}}))

        manifest = verify(publish(tmp_path, "best", write, {}))
        assert manifest["format"] == "other" and manifest["files"] == {}
        assert manifest["versions"]["torch"] == "2.13.0+cpu" and "numpy" in manifest["versions"]

    def test_replaces_one_of_the_same_name(self, tmp_path):
        save(tmp_path, "best", b"old")
        path = save(tmp_path, "best", b"new")
        assert verify(path) and (path / "part" / "data.bin").read_bytes() == b"new"
        assert names(tmp_path) == ["best"]

    @pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
    def test_manifest_can_be_checked_by_hand(self, tmp_path):
        subprocess.run(["sha256sum", "-c", DIGEST], cwd=save(tmp_path, "best"), check=True, capture_output=True)

    def test_every_file_and_folder_reaches_the_disk_before_the_rename(self, tmp_path, monkeypatch):
        calls = []
        descriptors = "/proc/self/fd"
        monkeypatch.setattr(os, "fsync", lambda fd: calls.append(Path(os.readlink(f"{descriptors}/{fd}")).name))
        rename = os.replace
        monkeypatch.setattr(os, "replace", lambda *args: (calls.append("rename"), rename(*args)))
        save(tmp_path, "frames_7")
        assert set(calls[: calls.index("rename")]) == {"data.bin", "empty.bin", MANIFEST, DIGEST, "part", "frames_7"}
        assert calls[calls.index("rename") :] == ["rename", tmp_path.name]


class TestKills:
    def test_at_every_call_that_changes_the_disk(self, tmp_path, monkeypatch):
        """A copy of the folder, made before and after each such call, is what a kill there leaves."""
        folder, left = tmp_path / "checkpoints", tmp_path / "left"
        save(folder, "frames_1", b"old")
        save(folder, "best", b"old")

        def copy():
            shutil.copytree(folder, left / f"{len(names(left)):03d}")

        def watch(call):
            def watched(*args, **kwargs):
                copy()
                result = call(*args, **kwargs)
                copy()
                return result

            return watched

        left.mkdir()
        with monkeypatch.context() as patch:
            for name in ("replace", "fsync", "unlink", "rmdir"):
                patch.setattr(os, name, watch(getattr(os, name)))
            save(folder, "best", b"new")
            save(folder, "frames_2", b"new")
            rotate(folder, 1)
        done = []
        for state in sorted(left.iterdir()):
            done += sweep(state)
            path, damaged = find_checkpoint(state)
            assert not damaged and path.name in ("frames_1", "frames_2")
            assert verify(state / "best") and (state / "best" / "part" / "data.bin").read_bytes() in (b"old", b"new")
            assert set(names(state)) <= {"frames_1", "frames_2", "best"}
        assert len(names(left)) > 40
        for what in (".best.stage", ".best.backup", "put back as best", ".frames_2.stage", ".frames_1.delete"):
            assert any(what in line for line in done), what

    def test_of_a_process(self, tmp_path):
        figures = kill_while_saving(tmp_path, 4)
        assert (figures["kills"], figures["unreadable"], figures["lost"], figures["leftover_bytes"]) == (4, 0, 0, 0)

    @pytest.mark.slow
    def test_of_a_process_many_times(self, tmp_path):
        figures = kill_while_saving(tmp_path, 40, seed=1)
        assert (figures["kills"], figures["unreadable"], figures["lost"], figures["leftover_bytes"]) == (40, 0, 0, 0)
        assert figures["interrupted"] > 35


class TestSweep:
    def test_removes_and_puts_back(self, tmp_path):
        save(tmp_path, "frames_1", b"old")
        save(tmp_path, "frames_2")
        (tmp_path / "frames_1").rename(tmp_path / f".frames_1.backup-{ID}")
        shutil.copytree(tmp_path / "frames_2", tmp_path / f".frames_2.backup-{ID}")
        (tmp_path / f".frames_3.stage-{ID}" / "frames_3").mkdir(parents=True)
        (tmp_path / f".frames_3.stage-{ID}" / "frames_3" / "data.bin").write_bytes(bytes(1234))
        (tmp_path / f".frames_0.delete-{ID}").symlink_to(tmp_path / "frames_2")
        (tmp_path / ".mine").touch()
        done = "\n".join(sweep(tmp_path))
        assert "put back as frames_1" in done and "removed 1,234 bytes" in done and done.count("\n") == 3
        assert names(tmp_path) == [".mine", "frames_1", "frames_2"]
        assert all(verify(tmp_path / name) for name in ("frames_1", "frames_2"))
        assert sweep(tmp_path) == []

    def test_of_nothing(self, tmp_path):
        assert sweep(tmp_path / "nowhere") == []


class TestVerify:
    def test_every_damage_to_every_file(self, tmp_path):
        save(tmp_path, "frames_1")
        path = save(tmp_path, "frames_2", bytes(range(256)))
        figures = detect_corruptions(tmp_path)
        assert figures == {"tried": 13, "detected": 13, "fell_back": 13}
        assert verify(path)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            ("flip a byte: part/data.bin", r"frames_1: part/data.bin was changed"),
            ("cut in half: part/data.bin", r"part/data.bin has 3 bytes instead of 7"),
            ("delete: empty.bin", r"empty.bin is missing"),
            (f"delete: {DIGEST}", f"{DIGEST} is missing"),
            (f"flip a byte: {DIGEST}", f"{MANIFEST} and {DIGEST} do not belong together"),
            (f"zero the tail: {MANIFEST}", f"{MANIFEST} and {DIGEST} do not belong together"),
        ],
    )
    def test_says_what_is_wrong(self, tmp_path, damage, message):
        path = save(tmp_path, "frames_1")
        assert damage in list(corruptions(path))
        for current in corruptions(path):
            if current == damage:
                with pytest.raises(Damaged, match=message):
                    verify(path)

    def test_what_does_not_belong_there(self, tmp_path):
        path = save(tmp_path, "frames_1")
        (path / "part" / "more.bin").touch()
        with pytest.raises(Damaged, match=r"part/more.bin is not in the manifest"):
            verify(path)

    @pytest.mark.parametrize("name", ["../frames_2/data.bin", "/etc/passwd", "a/../b", "a//b", "a\\b", "", "."])
    def test_names_that_lead_elsewhere(self, tmp_path, name):
        path = save(tmp_path, "frames_1")
        forge(path, lambda manifest: manifest["files"].update({name: {"size": 1, "sha256": "0"}}))
        with pytest.raises(Damaged, match=r"no plain path|is missing"):
            verify(path)

    @pytest.mark.parametrize("target", ["part/data.bin", "part"])
    def test_links(self, tmp_path, target):
        path = save(tmp_path, "frames_1")
        (path / target).rename(tmp_path / "elsewhere")
        (path / target).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(Damaged, match=f"{target} is a link"):
            verify(path)

    @pytest.mark.parametrize(
        "change",
        [
            lambda manifest: manifest.pop("files"),
            lambda manifest: manifest.update(files=["empty.bin"]),
            lambda manifest: manifest["files"].update({"empty.bin": 0}),
            lambda manifest: manifest["files"]["empty.bin"].update(size="large"),
        ],
    )
    def test_forged_manifests(self, tmp_path, change):
        path = save(tmp_path, "frames_1")
        forge(path, change)
        with pytest.raises(Damaged, match="does not list files"):
            verify(path)

    def test_manifest_that_is_no_object(self, tmp_path):
        path = save(tmp_path, "frames_1")
        (path / MANIFEST).write_bytes(b"[1]")
        (path / DIGEST).write_text(f"{hashlib.sha256(b'[1]').hexdigest()}  {MANIFEST}\n")
        with pytest.raises(Damaged, match="does not list files"):
            verify(path)


class TestFind:
    def test_by_number(self, tmp_path):
        for name in ("frames_1000000", "frames_999999", "frames_20", "best", "frames_", "frames_007", "frames_7.old"):
            save(tmp_path, name)
        (tmp_path / "frames_9999999999").touch()
        assert [path.name for path in list_checkpoints(tmp_path)] == ["frames_20", "frames_999999", "frames_1000000"]
        assert find_checkpoint(tmp_path) == (tmp_path / "frames_1000000", [])

    def test_none(self, tmp_path):
        save(tmp_path, "best")
        for folder in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
                find_checkpoint(folder)

    def test_none_whole(self, tmp_path):
        for number in (1, 2):
            (save(tmp_path, f"frames_{number}") / "empty.bin").unlink()
        with pytest.raises(Damaged, match=r"frames_2: empty.bin is missing; .*frames_1: empty.bin is missing"):
            find_checkpoint(tmp_path)

    def test_what_the_disk_cannot_read(self, tmp_path, monkeypatch):
        save(tmp_path, "frames_1")
        save(tmp_path, "frames_2")
        digest = checkpoint_files._digest

        def fail(path, **options):
            if "frames_2" in str(path):
                raise OSError(5, "Input/output error", str(path))
            return digest(path, **options)

        monkeypatch.setattr(checkpoint_files, "_digest", fail)
        path, messages = find_checkpoint(tmp_path)
        assert path.name == "frames_1" and "Input/output error" in messages[0]


class TestRotate:
    def test_keeps_the_newest_and_the_best(self, tmp_path):
        for name in ("best", "frames_5", "frames_40", "frames_300", "frames_2000"):
            save(tmp_path, name)
        assert [path.name for path in rotate(tmp_path, 2)] == ["frames_5", "frames_40"]
        assert names(tmp_path) == ["best", "frames_2000", "frames_300"]

    def test_never_deletes_the_last_whole_one(self, tmp_path):
        for number in (1, 2, 3, 4):
            save(tmp_path, f"frames_{number}")
        for number in (3, 4):
            (tmp_path / f"frames_{number}" / "empty.bin").unlink()
        assert [path.name for path in rotate(tmp_path, 1)] == ["frames_1", "frames_3"]
        assert find_checkpoint(tmp_path)[0].name == "frames_2"
        (tmp_path / "frames_2" / "empty.bin").unlink()
        assert rotate(tmp_path, 1) == [] and names(tmp_path) == ["frames_2", "frames_4"]

    def test_one_that_was_saved_behind_a_damaged_one_stays(self, tmp_path):
        for number in (1, 2, 3):
            save(tmp_path, f"frames_{number}")
        rotate(tmp_path, 1, whole=tmp_path / "frames_2")
        assert names(tmp_path) == ["frames_2", "frames_3"]

    def test_keep_none(self, tmp_path):
        with pytest.raises(ValueError, match="keep=0"):
            rotate(tmp_path, 0)


LIMITED = """
import resource
from pathlib import Path
from tests.dreamer.test_checkpoint_files import save
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(Path({folder!r}), {name!r}, bytes(1_000_000))
except OSError as error:
    print(error)
"""


class TestNoRoom:
    def test_a_file_cannot_grow(self, tmp_path):
        """RLIMIT_FSIZE, with the signal ignored as Python does, fails like a full disk: in the middle of a write."""
        save(tmp_path, "frames_1", b"old")
        for name in ("frames_2", "frames_1"):
            code = LIMITED.format(folder=str(tmp_path), name=name)
            run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
            assert f"checkpoint {name} cannot be saved in {tmp_path}: File too large" in run.stdout
            assert names(tmp_path) == ["frames_1"] and verify(tmp_path / "frames_1")

    def test_refuses_before_writing(self, tmp_path, monkeypatch):
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=999))
        message = r"frames_1 cannot be saved in .*No space left.*at least 1,000 bytes are needed, 999 are free"
        with pytest.raises(OSError, match=message):
            publish(tmp_path, "frames_1", lambda stage: 1 / 0, {}, needed=1000)
        assert names(tmp_path) == []

    def test_a_rename_that_fails_puts_the_old_one_back(self, tmp_path, monkeypatch):
        save(tmp_path, "best", b"old")
        rename = os.replace

        def fail(source, destination):
            if Path(source).parent.name.startswith(".best.stage"):
                raise OSError(5, "Input/output error")
            rename(source, destination)

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="Input/output error"):
            save(tmp_path, "best", b"new")
        assert names(tmp_path) == ["best"] and (tmp_path / "best" / "part" / "data.bin").read_bytes() == b"old"
        assert verify(tmp_path / "best")

    def test_other_errors_leave_nothing_either(self, tmp_path):
        with pytest.raises(ZeroDivisionError):
            publish(tmp_path, "best", lambda stage: 1 / 0, {})
        assert names(tmp_path) == []

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="cannot be saved in"):
            save(tmp_path / "file", "best")
