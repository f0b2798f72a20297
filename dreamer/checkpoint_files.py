"""Checkpoints as folders on disk: whole or not there, verified, rotated. Knows nothing of what is in them.

    checkpoints/
      frames_<N>/           whole at any time: it comes into being by a rename
        manifest.json       size and sha256 of every other file, versions, facts
        manifest.sha256     digest of the manifest, for `sha256sum -c` too
      best/                 the same
      .<name>.stage-<id>    being written           what a kill may leave; `sweep` tidies it up
      .<name>.backup-<id>   the previous <name>, while the new one takes its place
      .<name>.delete-<id>   being deleted

A checkpoint is read once when it is saved and once when it is verified, for the digests: one to three seconds per
gigabyte each, beside the time of the disk.
"""

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

MANIFEST, DIGEST = "manifest.json", "manifest.sha256"
PACKAGES = ("torch", "torchrl", "tensordict", "numpy", "lucid-rl")
CHECKPOINT = re.compile(r"frames_(0|[1-9][0-9]*)")
LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>stage|backup|delete)-[0-9a-f]{32}")


class Damaged(RuntimeError):  # noqa: N818  "except Damaged" says it
    """A checkpoint is not what was saved; the message names the file and what is wrong with it."""


def publish(
    folder: Path, name: str, write: Callable[[Path], None], facts: Mapping[str, Any], *, needed: int = 0
) -> Path:
    """Save a checkpoint as a whole; a kill or an error at any moment leaves the previous one of that name.

    Args:
        folder: Where checkpoints are; made if missing. It should not be written by two processes at a time.
        name: Of the checkpoint, "frames_<N>" or "best".
        write: Writes the files into the empty folder that it is given. If they include a manifest.json, its entries
            are kept.
        facts: Entries for the manifest, JSON values.
        needed: Bytes that are needed at least.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: The disk is full, or something else failed; nothing is left of the attempt.
    """
    hidden = _hidden(folder, name, "stage")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if needed > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        stage = hidden / name  # what `write` leaves beside it goes with the hidden folder
        stage.mkdir(parents=True)
        write(stage)
        _write_manifest(stage, facts)
        for directory, _, _ in os.walk(stage):
            _sync(Path(directory))
        _replace(stage, folder / name)
    except OSError as error:
        _delete(hidden)
        raise OSError(error.errno or errno.EIO, _explain(error, folder, name, needed)) from error
    finally:
        _delete(hidden)
    return folder / name


def verify(path: Path) -> dict[str, Any]:
    """Read every byte of a checkpoint and compare it with the manifest.

    Args:
        path: Folder of the checkpoint. Its manifest is not trusted: links, and names that lead elsewhere, are refused.

    Returns:
        The manifest.

    Raises:
        Damaged: Naming the first file that is missing, changed, cut or does not belong there.
    """
    manifest = read_manifest(path)
    listed = manifest["files"]
    for name in listed:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or str(pure) != name:
            raise Damaged(f"{path}: the manifest lists {name!r}, which is no plain path inside the folder")
    present = _list_files(path)
    if missing := sorted(listed.keys() - present):
        raise Damaged(f"{path}: {missing[0]} is missing")
    if unlisted := sorted(present - listed.keys()):
        raise Damaged(f"{path}: {unlisted[0]} is not in the manifest")
    for name, expected in listed.items():
        size = (path / name).stat().st_size
        if size != expected["size"]:
            raise Damaged(f"{path}: {name} has {size:,} bytes instead of {expected['size']:,}")
    for name, expected in listed.items():
        if _digest(path / name) != expected["sha256"]:
            raise Damaged(f"{path}: {name} was changed, its sha256 is another one")
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest and compare it with its own digest; the other files are not looked at.

    Raises:
        Damaged: It is missing, changed, or lists no files.
    """
    for name in (MANIFEST, DIGEST):
        if not _is_file(path / name):
            raise Damaged(f"{path}: {name} is missing")
    content = (path / MANIFEST).read_bytes()
    if (path / DIGEST).read_bytes() != _digest_line(content):
        raise Damaged(f"{path}: {MANIFEST} and {DIGEST} do not belong together")
    try:
        manifest = json.loads(content)
        files = {
            name: {"size": int(file["size"]), "sha256": str(file["sha256"])} for name, file in manifest["files"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path}: {MANIFEST} does not list files ({type(error).__name__}: {error})") from error
    return manifest | {"files": files}


def list_checkpoints(folder: Path) -> list[Path]:
    """The folders `frames_<N>`, by number, whole or not."""
    numbers = {path: match for path in folder.glob("frames_*") if (match := CHECKPOINT.fullmatch(path.name))}
    return sorted((path for path in numbers if path.is_dir()), key=lambda path: int(numbers[path][1]))


def find_checkpoint(folder: Path) -> tuple[Path, list[str]]:
    """Find the newest whole checkpoint.

    Returns:
        Its folder, and what is wrong with each newer one.

    Raises:
        FileNotFoundError: There is none.
        Damaged: There are some, and none is whole.
    """
    messages = []
    for path in reversed(list_checkpoints(folder)):
        try:
            verify(path)
        except (Damaged, OSError) as error:  # OSError: the disk cannot read it
            messages.append(str(error))
        else:
            return path, messages
    if messages:
        raise Damaged(f"no checkpoint in {folder} is whole: " + "; ".join(messages))
    raise FileNotFoundError(f"{folder} holds no checkpoint frames_<N>: name a folder that does, or start a new run")


def rotate(folder: Path, keep: int, *, whole: Path | None = None) -> list[Path]:
    """Delete all but the newest checkpoints. `best` is never touched, nor is the newest whole one.

    Args:
        folder: Where checkpoints are.
        keep: How many `frames_<N>` stay.
        whole: One that is known to be whole, such as the one just saved; otherwise the newest whole one is looked for.

    Returns:
        What was deleted; nothing while none is whole.

    Raises:
        ValueError: ``keep`` is below 1.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: keep at least 1 checkpoint")
    old = list_checkpoints(folder)[:-keep]
    if old and whole is None:
        try:
            whole, _ = find_checkpoint(folder)
        except Damaged:
            return []
    old = [path for path in old if path != whole]
    for path in old:
        hidden = _hidden(folder, path.name, "delete")
        os.replace(path, hidden)  # at once, so that a kill leaves no half of a checkpoint
        _delete(hidden)
    return old


def sweep(folder: Path) -> list[str]:
    """Tidy up after saves that were killed; to be called while nobody saves there.

    A previous checkpoint whose successor did not arrive is put back; everything else that is hidden is removed.

    Returns:
        What was done, one line each.
    """
    done = []
    leftovers = {path: match for path in folder.glob(".*") if (match := LEFTOVER.fullmatch(path.name))}
    for path, match in sorted(leftovers.items()):
        previous = folder / match["name"]
        if match["kind"] == "backup" and not previous.exists():
            os.replace(path, previous)
            done.append(f"{path}: put back as {previous.name}, because the save that was to replace it was killed")
        else:
            done.append(f"{path}: removed {count_bytes(path):,} bytes that a killed save left")
            _delete(path)
    if done:
        _sync(folder)
    return done


def count_bytes(path: Path) -> int:
    """Bytes of the files of a folder, or of a file; links count as nothing."""
    files = [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]
    return sum(file.stat().st_size for file in files if _is_file(file))


def _write_manifest(stage: Path, facts: Mapping[str, Any]) -> None:
    """List the files, bring each to the disk on the way, and seal the list."""
    manifest = {}
    if (stage / MANIFEST).exists():
        manifest = json.loads((stage / MANIFEST).read_bytes())
        (stage / MANIFEST).unlink()
    files = {
        name: {"size": (stage / name).stat().st_size, "sha256": _digest(stage / name, sync=True)}
        for name in sorted(_list_files(stage))
    }
    versions = _versions() | manifest.get("versions", {})
    content = json.dumps(manifest | dict(facts) | {"versions": versions, "files": files}, indent=1).encode()
    for name, text in ((MANIFEST, content), (DIGEST, _digest_line(content))):
        (stage / name).write_bytes(text)
        _sync(stage / name)


def _explain(error: OSError, folder: Path, name: str, needed: int) -> str:
    room = f"at least {needed:,} bytes are needed" if needed else "bytes needed: unknown"
    if folder.is_dir():
        room += f", {shutil.disk_usage(folder).free:,} are free"
    return f"checkpoint {name} cannot be saved in {folder}: {error.strerror or error} ({room})"


def _replace(source: Path, destination: Path) -> None:
    """Put a folder in place of another one, or of none. Linux has no portable call that swaps two folders."""
    backup = _hidden(destination.parent, destination.name, "backup")
    try:
        if destination.exists():
            os.replace(destination, backup)
        os.replace(source, destination)
    except BaseException:
        if backup.exists() and not destination.exists():
            os.replace(backup, destination)
        raise
    _sync(destination.parent)  # before the previous one goes
    _delete(backup)


def _hidden(folder: Path, name: str, kind: str) -> Path:
    return folder / f".{name}.{kind}-{uuid.uuid4().hex}"


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif path.is_symlink() or path.exists():
        path.unlink()


def _list_files(folder: Path) -> set[str]:
    """Names of all files but the manifest's own two.

    Raises:
        Damaged: A link, or something else that is neither a file nor a folder.
    """
    names = set()
    for directory, folders, files in os.walk(folder):
        for entry in (Path(directory) / name for name in (*folders, *files)):
            name = entry.relative_to(folder).as_posix()
            if _is_file(entry):
                names.add(name)
            elif not stat.S_ISDIR(entry.lstat().st_mode):
                raise Damaged(f"{folder}: {name} is a link or a device; a checkpoint holds plain files only")
    return names - {MANIFEST, DIGEST}


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _digest(path: Path, *, sync: bool = False) -> str:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
    return digest


def _digest_line(manifest: bytes) -> bytes:
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def _sync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@cache
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions
