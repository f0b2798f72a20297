"""Labels a folder of episodes with masks of the foreground, once, before training.

    python scripts/preprocess_masks.py --data_dir data/episodes --output_dir data/masks --prompt "robot arm . ball"
    python scripts/preprocess_masks.py --data_dir data/episodes --output_dir data/masks --segmenter colour --model few/
    python scripts/preprocess_masks.py --data_dir data/episodes --output_dir data/masks --segmenter student \\
        --model runs/<run>/student.safetensors
    python dreamer/train.py agent=world2filter agent.mask_source=colour agent.segmentation.labels=data/masks

Episodes are .npz files with `pixels` (or `image`, or `observation`), uint8 `[T, h, w, 3]`, and videos. For each, a .npz
file of the same name holds `mask` uint8 0..255 `[T, h, w, 1]`, `mask_valid` bool `[T, 1]`, `mask_version` int64
`[T, 1]` (a number of the segmenter and its settings), `episode` (where the frames are) and `episode_stat` (their file's
size in bytes and time of change in ns). Files are written whole or not at all. What is finished is left alone by the
next call; it is made again when it is damaged, when the episode changed or lies elsewhere, or when the segmenter is
another one.

Training with `agent.mask_source=student` writes `student.safetensors` into its run folder when it ends, if the student
passed its last examination.
"""

import argparse
import io
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dreamer.files import write_whole
from envs.segmentation.labels import VIDEO_SUFFIXES, load_labels, read_arrays, read_frames
from envs.segmentation.protocol import Segmenter, join_concepts, split_prompt
from envs.segmentation.sam3_images import MODES

SEGMENTERS = ("sam3", "colour", "student")
SAM3_OPTIONS = ("prompt", "image_size", "threshold", "mode")
MOST_LABELS = 100  # labelled frames that the colour model is fitted on, spread over all that there are
SOURCE_KEYS = ("episode", "episode_stat")
KEYS = ("mask", "mask_valid", "mask_version", *SOURCE_KEYS)


def make_segmenter(options: argparse.Namespace) -> Segmenter:
    """Makes what labels the frames, and loads its weights.

    Args:
        options: the command line, see `parse`.

    Raises:
        ValueError, OSError, ImportError, RuntimeError: something is missing or does not fit; the message says how to
            mend it.
    """
    name, model = options.segmenter, options.model
    given = {key: getattr(options, key) for key in SAM3_OPTIONS if getattr(options, key) is not None}
    if name == "sam3":
        from envs.segmentation.sam3 import Sam3

        if not given.get("prompt"):
            raise ValueError('--prompt: say what belongs to the foreground, for example "robot arm . ball"')
        concepts, size = split_prompt(given.pop("prompt")), {"max_batch": options.batch_size, "device": options.device}
        segmenter = Sam3(concepts, model or "facebook/sam3", **given, **size)
        segmenter.load()
        return segmenter
    if given:
        raise ValueError(f"--{next(iter(given))}: of --segmenter sam3 only, {name} does not look at it; leave it out")
    if model is None:
        meaning = "labelled frames to fit it on" if name == "colour" else "the file of a trained student"
        raise ValueError(f"--model: --segmenter {name} needs {meaning}")
    if name == "colour":
        from envs.segmentation.colour import ColourModel

        return ColourModel().fit(*load_labels(model, MOST_LABELS))
    from envs.segmentation.student import Student

    return Student.load(model, options.device)


def find_episodes(data_dir: Path, output_dir: Path) -> dict[Path, Path]:
    """The episodes below a folder, by the file where their masks belong.

    Raises:
        ValueError: there are none, two have the same name, or masks would lie where the episodes are.
    """
    if data_dir.resolve() == output_dir.resolve():
        raise ValueError(f"--output_dir {output_dir}: is --data_dir too; give another folder")
    suffixes, found = {".npz", *VIDEO_SUFFIXES}, {}
    for path in sorted(data_dir.rglob("*")):
        if path.suffix.lower() in suffixes and output_dir.resolve() not in path.resolve().parents:
            output = output_dir / path.relative_to(data_dir).with_suffix(".npz")
            if output in found:
                raise ValueError(f"{found[output]} and {path}: their masks would both be {output}; rename one")
            found[output] = path
    if not found:
        raise ValueError(f"--data_dir {data_dir}: no .npz files and no videos ({' '.join(VIDEO_SUFFIXES)}) there")
    return found


def describe_source(output: Path, episode: Path) -> dict[str, np.ndarray]:
    """What tells whether masks are those of an episode: its path as seen from them, size in bytes and time in ns."""
    path, stat = os.path.relpath(episode.resolve(), output.parent.resolve()), episode.stat()
    stamp = np.array([stat.st_size, stat.st_mtime_ns], dtype=np.int64)
    return dict(zip(SOURCE_KEYS, (np.array(path), stamp), strict=True))


def is_finished(output: Path, source: dict[str, np.ndarray], version: int) -> bool:
    """Whether a file holds the whole masks of an episode as it is now, from the segmenter of this version."""
    try:
        found = read_arrays(output, KEYS)
    except ValueError:
        return False
    if found.keys() != set(KEYS) or not all(np.array_equal(found[key], source[key]) for key in SOURCE_KEYS):
        return False
    versions = found["mask_version"]
    return versions.shape == found["mask_valid"].shape == (len(found["mask"]), 1) and bool((versions == version).all())


def label(frames: Tensor, segmenter: Segmenter, *, batch_size: int, device: str) -> Tensor:
    """The foreground of an episode, uint8 `[T, h, w, 1]`.

    Args:
        frames: uint8 `[T, h, w, 3]`.
        segmenter: what labels them.
        batch_size: frames per call.
        device: where the frames go for it.
    """
    return torch.cat([join_concepts(segmenter(part.to(device))).cpu() for part in frames.split(batch_size)])


def write_masks(output: Path, source: dict[str, np.ndarray], masks: Tensor, version: int) -> None:
    """Writes the masks of an episode, whole or not at all.

    Args:
        output: file to write; its folder is made.
        source: see `describe_source`.
        masks: uint8 `[T, h, w, 1]`.
        version: of the segmenter.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    content, count = io.BytesIO(), len(masks)
    np.savez_compressed(
        content,
        mask=masks.numpy(),
        mask_valid=np.ones((count, 1), dtype=bool),
        mask_version=np.full((count, 1), version, dtype=np.int64),
        **source,
    )
    write_whole(output, content.getvalue())


def preprocess(episodes: dict[Path, Path], segmenter: Segmenter, *, batch_size: int, device: str) -> list[str]:
    """Labels what is not finished and says how much that was.

    Args:
        episodes: see `find_episodes`.
        segmenter: what labels them.
        batch_size: frames per call.
        device: where the frames go for it.

    Returns:
        What went wrong, a line per episode.
    """
    failures, frames, labelled, seconds, version = [], 0, 0, 0.0, segmenter.version
    for output, episode in tqdm(episodes.items(), unit="episode"):
        start = time.perf_counter()
        try:
            source = describe_source(output, episode)  # before the frames: what changes meanwhile is made again
            if is_finished(output, source, version):
                continue
            masks = label(read_frames(episode), segmenter, batch_size=batch_size, device=device)
            write_masks(output, source, masks, version)
        except (ValueError, OSError, ImportError) as error:
            failures.append(f"{episode}: {error}")
            continue
        labelled, frames, seconds = labelled + 1, frames + len(masks), seconds + time.perf_counter() - start
    finished = len(episodes) - labelled - len(failures)
    rate = f", {frames / seconds:.1f} frames per second" if frames else ""
    print(f"{labelled} episodes labelled ({frames} frames{rate}), {finished} were finished, {len(failures)} failed")
    return failures


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of episodes, searched to the bottom")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the masks")
    parser.add_argument("--segmenter", choices=SEGMENTERS, default="sam3")
    parser.add_argument("--prompt", help='what SAM 3 looks for, such as "robot" or "robot arm . ball"')
    parser.add_argument(
        "--model",
        help="sam3: hub id or folder, facebook/sam3 by default; colour: labelled frames, .npz with pixels and mask; "
        "student: file of a trained one, student.safetensors in the folder of a run with agent.mask_source=student",
    )
    parser.add_argument(
        "--image_size",
        type=int,
        help="pixels to which SAM 3 scales frames: 336, 672, 1008; default: the size of its checkpoint, at most 672",
    )
    parser.add_argument("--threshold", type=float, help="least score of what SAM 3 keeps, 0.5 by default")
    parser.add_argument("--mode", choices=MODES, help="instance (default): union of what SAM 3 finds; semantic: dense")
    parser.add_argument("--batch_size", type=int, default=16, help="frames per call of the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        parser.error(f"--batch_size {options.batch_size}: at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; see the top of this file."""
    options = parse(arguments)
    try:
        episodes = find_episodes(options.data_dir, options.output_dir)
        segmenter = make_segmenter(options)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise SystemExit(str(error)) from None
    failures = preprocess(episodes, segmenter, batch_size=options.batch_size, device=options.device)
    if failures:
        print("\n".join(failures))
        raise SystemExit(1)


if __name__ == "__main__":
    main()
