"""Turns video files into a folder of frames that environments play behind the agent.

    python scripts/prepare_video.py clips/*.mp4 --out data/video --size 64
    python scripts/prepare_video.py clips/*.mp4 --out data/grey --size 84 --gray --test-share 0.2 --max-frames 300
    python scripts/prepare_video.py --check data/video

The folder holds `frames.npy`, uint8 `[F, h, w, 3]` or `[F, h, w, 1]`, and `manifest.json`: name, sha256, number of
frames, offset and split of each clip. It is written whole or not at all. Files are decoded by another process with
limits on memory, time, frames and resolution, which opens nothing but the file in question. A file that cannot be
decoded is named in one line and left out, as is a second copy of the same file.
"""

import argparse
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from video_decoder import MIB, Decoder, DecodingError, Limits, one_line


class Clip(NamedTuple):
    """A decoded file."""

    path: Path
    raw: Path  # uint8 [frames, h, w, 3] without a header
    frames: int
    sha256: str


def decode_all(
    paths: Sequence[Path], folder: Path, *, size: tuple[int, int], limits: Limits, strict: bool = False
) -> list[Clip]:
    """Decodes files one after the other and says in a line what became of each.

    Args:
        paths: local files.
        folder: where the raw frames go.
        size: height and width in pixels.
        limits: for each file.
        strict: stop at the first file that cannot be used.

    Raises:
        SystemExit: `strict`, and a file cannot be used.
    """
    from envs.transforms.video_sources import file_sha256

    clips: dict[str, Clip] = {}
    with Decoder(size, limits) as decoder:
        for number, path in enumerate(paths):
            shown, raw = one_line(str(path)), folder / f"{number}.raw"
            try:
                frames = decoder.decode(path, raw)
                digest = file_sha256(path)
            except (DecodingError, OSError) as error:
                if strict:
                    raise SystemExit(f"{shown}: {one_line(str(error))}") from None
                print(f"{shown}: left out: {one_line(str(error))}")
                raw.unlink(missing_ok=True)
                continue
            if digest in clips:
                print(f"{shown}: left out: the same file as {one_line(str(clips[digest].path))}")
                raw.unlink()
                continue
            clips[digest] = Clip(path, raw, frames, digest)
            print(f"{shown}: {frames} frames")
    return list(clips.values())


def choose_test(clips: Sequence[Clip], share: float) -> set[str]:
    """The sha256 of the clips for testing: a share of the files, chosen by their content, whatever their order.

    Args:
        clips: the clips.
        share: in [0, 1]; strictly between, each split gets at least one of two or more clips.
    """
    count = round(share * len(clips))
    if 0 < share < 1:
        count = min(max(count, 1), len(clips) - 1)
    return set(sorted(clip.sha256 for clip in clips)[:count])


def write_folder(clips: Sequence[Clip], folder: Path, *, size: tuple[int, int], grey: bool, test_share: float) -> None:
    """Writes the array and the manifest.

    Args:
        clips: decoded clips, at least one.
        folder: exists and is empty.
        size: height and width in pixels.
        grey: keep the brightness only.
        test_share: share of the files for testing, in [0, 1].
    """
    from envs.transforms import video_sources as sources

    test = choose_test(clips, test_share)
    shape = (sum(clip.frames for clip in clips), *size, 1 if grey else 3)
    frames = np.lib.format.open_memmap(folder / sources.FRAMES_FILE, mode="w+", dtype=np.uint8, shape=shape)
    entries, offset = [], 0
    for clip in clips:
        decoded = np.memmap(clip.raw, dtype=np.uint8, mode="r", shape=(clip.frames, *size, 3))
        for index, image in enumerate(decoded, offset):
            frames[index] = sources.to_grey(image) if grey else image
        split = "test" if clip.sha256 in test else "train"
        entry = {"name": one_line(clip.path.name), "sha256": clip.sha256, "frames": clip.frames}
        entries.append({**entry, "offset": offset, "split": split})
        offset += clip.frames
    frames.flush()
    manifest = {
        "format": sources.MANIFEST_FORMAT,
        "frames": offset,
        "height": size[0],
        "width": size[1],
        "channels": shape[3],
        "array_sha256": sources.file_sha256(folder / sources.FRAMES_FILE),
        "clips": entries,
    }
    manifest["digest"] = sources.manifest_digest(manifest)
    (folder / sources.MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n")


def prepare(
    paths: Sequence[Path],
    out: Path,
    *,
    size: tuple[int, int],
    grey: bool = False,
    test_share: float = 0.2,
    strict: bool = False,
    limits: Limits | None = None,
) -> None:
    """Makes a folder of frames.

    Args:
        paths: video files.
        out: the folder to make; must not exist or be empty.
        size: height and width of the frames in pixels.
        grey: keep the brightness only.
        test_share: share of the files for testing, in [0, 1].
        strict: stop at the first file that cannot be used, instead of leaving it out.
        limits: for each file.

    Raises:
        SystemExit: there is something in `out`, no file can be used, or PyAV is missing; the message says so.
    """
    if importlib.util.find_spec("av") is None:
        raise SystemExit("PyAV is missing: pip install av")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SystemExit(f"--out {out}: there is something already; choose another folder or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        raw, whole = Path(temporary) / "raw", Path(temporary) / "whole"
        raw.mkdir()
        whole.mkdir()
        clips = decode_all(paths, raw, size=size, limits=limits or Limits(), strict=strict)
        if not clips:
            raise SystemExit(f"no video among the {len(paths)} files could be used, {out} was not made")
        write_folder(clips, whole, size=size, grey=grey, test_share=test_share)
        shutil.rmtree(raw)
        os.replace(whole, out)
    tested = len(choose_test(clips, test_share))
    print(f"{out}: {len(clips)} clips, {len(clips) - tested} to train and {tested} to test")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="video files on this machine")
    parser.add_argument("--out", type=Path, help="the folder to make")
    parser.add_argument("--size", type=int, nargs="+", default=[64], help="height and width in pixels, or one for both")
    parser.add_argument("--gray", action="store_true", help="keep the brightness only: a third of the memory")
    parser.add_argument("--test-share", type=float, default=0.2, help="share of the files that become split=test")
    parser.add_argument("--max-frames", type=int, default=Limits().frames, help="of a file; the rest is left out")
    parser.add_argument("--max-pixels", type=int, default=Limits().pixels, help="of a frame in a file")
    parser.add_argument("--max-seconds", type=int, default=Limits().seconds, help="of CPU time for a file")
    parser.add_argument("--max-memory", type=int, default=Limits().memory // MIB, help="of the decoder, in MiB")
    parser.add_argument("--strict", action="store_true", help="stop at the first file that cannot be used")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="compare a folder with its checksums and stop")
    options = parser.parse_args(arguments)
    if options.check is None and (options.out is None or not options.files):
        parser.error("give video files and --out FOLDER")
    if len(options.size) > 2 or min(options.size) < 1:
        parser.error(f"--size {options.size}: one or two whole numbers of at least 1")
    if not 0 <= options.test_share <= 1:
        parser.error(f"--test-share {options.test_share}: between 0 and 1")
    for name in ("max_frames", "max_pixels", "max_seconds", "max_memory"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; see the top of this file."""
    options = parse(arguments)
    if options.check is not None:
        from envs.transforms.video_sources import check_folder

        try:
            check_folder(options.check)
        except ValueError as error:
            raise SystemExit(str(error)) from None
        print(f"{options.check}: whole")
        return
    prepare(
        options.files,
        options.out,
        size=(options.size[0], options.size[-1]),
        grey=options.gray,
        test_share=options.test_share,
        strict=options.strict,
        limits=Limits(options.max_frames, options.max_pixels, options.max_seconds, options.max_memory * MIB),
    )


if __name__ == "__main__":
    main()
