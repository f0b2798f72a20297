"""Damage to checkpoints, and kills while they are saved. Used by the tests and by `scripts/`; standard library only.

python -m tests.dreamer.faults FOLDER      saves small checkpoints until it is killed
"""

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dreamer.checkpoint_files import (
    Damaged,
    count_bytes,
    find_checkpoint,
    list_checkpoints,
    publish,
    rotate,
    sweep,
    verify,
)

ROOT = Path(__file__).parents[2]
KEEP = 2
FILES, FILE_BYTES = 2, 20_000
MOST_SECONDS = 0.15  # until a kill: the time of a save or two


def flip_byte(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] if content else content


def cut_in_half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def zero_tail(content: bytes) -> bytes:
    tail = -(-len(content) // 4)
    return content[: len(content) - tail] + bytes(tail)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flip a byte": flip_byte,
    "cut in half": cut_in_half,
    "zero the tail": zero_tail,
}


def corruptions(path: Path) -> Iterator[str]:
    """Damage every file of a checkpoint in every way, one after the other.

    Args:
        path: Folder of the checkpoint. It is whole again when the next one is asked for, and at the end.

    Yields:
        What is damaged now. Damage that would change nothing, as in an empty file, is left out.
    """
    for file in sorted(path.rglob("*")):
        if not file.is_file():
            continue
        content = file.read_bytes()
        name = file.relative_to(path).as_posix()
        try:
            for kind, damage in DAMAGES.items():
                if (damaged := damage(content)) != content:
                    file.write_bytes(damaged)
                    yield f"{kind}: {name}"
            file.unlink()
            yield f"delete: {name}"
        finally:
            file.write_bytes(content)


def detect_corruptions(folder: Path) -> dict[str, int]:
    """Damage the newest of two or more checkpoints in every way and count what is noticed.

    Returns:
        `tried`, `detected` by `verify`, and `fell_back`: how often the previous checkpoint was found instead.
    """
    previous, newest = list_checkpoints(folder)[-2:]
    figures = {"tried": 0, "detected": 0, "fell_back": 0}
    for _ in corruptions(newest):
        figures["tried"] += 1
        try:
            verify(newest)
        except Damaged:
            figures["detected"] += 1
        figures["fell_back"] += find_checkpoint(folder)[0] == previous
    return figures


def kill_while_saving(folder: Path, kills: int, seed: int = 0) -> dict[str, int]:
    """Start a process that saves in a loop, kill it at a random moment, look at what is left, and start again.

    Args:
        folder: Empty folder for the checkpoints.
        kills: How many times.
        seed: Of the moments.

    Returns:
        `kills`; `interrupted`: kills that hit a save and left something hidden; `put_back`: of these, kills between
        two renames; `unreadable`: visible checkpoints that are damaged; `lost`: kills after which a checkpoint whose
        save had returned was missing, or the newest was none; `leftover_bytes` after the sweep, all kills together.
    """
    moments = random.Random(seed)
    figures = dict.fromkeys(("kills", "interrupted", "put_back", "unreadable", "lost", "leftover_bytes"), 0)
    for _ in range(kills):
        saved = _kill_one(folder, moments.uniform(0, MOST_SECONDS))
        visible = [*list_checkpoints(folder), *folder.glob("best")]
        done = sweep(folder)
        figures["kills"] += 1
        figures["interrupted"] += bool(done)
        figures["put_back"] += any("put back" in line for line in done)
        figures["unreadable"] += sum(map(_is_damaged, visible))
        figures["lost"] += not _holds(folder, saved)
        figures["leftover_bytes"] += sum(count_bytes(path) for path in folder.glob(".*"))
    return figures


def _kill_one(folder: Path, after: float) -> int:
    """Let a process save, kill it after so many seconds, and return the last number that it reported as saved."""
    # -S: without site-packages Python starts in half the time.
    command = [sys.executable, "-S", "-m", "tests.dreamer.faults", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        saved = int(child.stdout.readline())
        time.sleep(after)
        child.kill()
        return max([saved, *(int(line) for line in child.stdout if line.endswith("\n"))])


def _holds(folder: Path, saved: int) -> bool:
    """Whether checkpoint `saved` or a newer one is found, with `best` beside it, and all is whole."""
    if saved == 0:
        return True
    try:
        newest, damaged = find_checkpoint(folder)
        return verify(newest)["frames"] >= saved and verify(folder / "best")["frames"] >= saved and not damaged
    except (Damaged, FileNotFoundError):
        return False


def _is_damaged(path: Path) -> bool:
    try:
        verify(path)
    except Damaged:
        return True
    return False


def save_forever(folder: Path) -> None:
    """Save, replace `best` and rotate, as a run does, and report every number that is saved."""
    number = verify(found[-1])["frames"] if (found := list_checkpoints(folder)) else 0
    while True:
        print(number, flush=True)  # noqa: T201
        number += 1
        content = number.to_bytes(4) * (FILE_BYTES // 4)

        def write(stage: Path, content: bytes = content) -> None:
            (stage / "part").mkdir()
            for i in range(FILES):
                (stage / "part" / f"{i}.bin").write_bytes(content)

        publish(folder, "best", write, {"frames": number})
        path = publish(folder, f"frames_{number}", write, {"frames": number})
        rotate(folder, KEEP, whole=path)


if __name__ == "__main__":
    save_forever(Path(sys.argv[1]))
