"""Labels a folder of episodes with masks of the foreground, once, before training.

    python scripts/preprocess_masks.py --data_dir data/episodes --output_dir data/masks --prompt "robot arm . ball"
    python scripts/preprocess_masks.py --data_dir data/episodes --output_dir data/masks --segmenter colour --model few/
    python dreamer/train.py agent=world2filter agent.mask_source=colour agent.segmentation.labels=data/masks

Episodes are .npz files with `pixels` (or `image`, or `observation`), uint8 `[T, h, w, 3]`, and videos. For each, a .npz
file of the same name holds `mask` uint8 0..255 `[T, h, w, 1]`, `mask_valid` bool `[T, 1]`, `mask_version` int64
`[T, 1]` (a number of the segmenter and its settings) and `episode` (where the frames are). Files are written whole or
not at all. What is finished is left alone by the next call; it is made again when it is damaged, when the episode
is newer, or when the segmenter is another one.
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

SEGMENTERS = ("sam3", "colour", "student")
KEYS = ("mask", "mask_valid", "mask_version", "episode")


def make_segmenter(name: str, *, prompt: str, model: str | None, image_size: int, device: str) -> Segmenter:
    """Makes what labels the frames.

    Args:
        name: "sam3", "colour" or "student".
        prompt: of SAM 3, " . " between concepts.
        model: of SAM 3, hub id or folder; labelled frames for the colour model; the file of a student.
        image_size: of SAM 3, in pixels.
        device: of the model.

    Raises:
        ValueError, OSError, ImportError: something is missing or does not fit; the message says how to mend it.
    """
    if name == "sam3":
        from envs.segmentation.sam3 import Sam3

        if not prompt:
            raise ValueError('--prompt: say what belongs to the foreground, for example "robot arm . ball"')
        return Sam3(split_prompt(prompt), model or "facebook/sam3", image_size=image_size, device=device)
    if model is None:
        meaning = "labelled frames to fit it on" if name == "colour" else "the file of a trained student"
        raise ValueError(f"--model: --segmenter {name} needs {meaning}")
    if name == "colour":
        from envs.segmentation.colour import ColourModel

        return ColourModel().fit(*load_labels(model))
    from envs.segmentation.student import Student

    return Student.load(model, device)


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


def is_finished(output: Path, episode: Path, version: int) -> bool:
    """Whether a file holds the whole masks of an episode as it is now, from the segmenter of this version."""
    try:
        found = read_arrays(output, KEYS)
    except ValueError:
        return False
    if found.keys() != set(KEYS) or output.stat().st_mtime < episode.stat().st_mtime:
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


def write_masks(output: Path, episode: Path, masks: Tensor, version: int) -> None:
    """Writes the masks of an episode, whole or not at all.

    Args:
        output: file to write; its folder is made.
        episode: where the frames are.
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
        episode=np.array(os.path.relpath(episode.resolve(), output.parent.resolve())),
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
        if is_finished(output, episode, version):
            continue
        start = time.perf_counter()
        try:
            masks = label(read_frames(episode), segmenter, batch_size=batch_size, device=device)
            write_masks(output, episode, masks, version)
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
    parser.add_argument("--prompt", default="", help='what SAM 3 looks for, such as "robot" or "robot arm . ball"')
    parser.add_argument(
        "--model",
        help="sam3: hub id or folder, facebook/sam3 by default; colour: labelled frames, .npz with pixels and mask; "
        "student: file of a trained one",
    )
    parser.add_argument(
        "--image_size", type=int, default=672, help="pixels to which SAM 3 scales frames: 336, 672, 1008"
    )
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
        segmenter = make_segmenter(
            options.segmenter,
            prompt=options.prompt,
            model=options.model,
            image_size=options.image_size,
            device=options.device,
        )
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(str(error)) from None
    failures = preprocess(episodes, segmenter, batch_size=options.batch_size, device=options.device)
    if failures:
        print("\n".join(failures))
        raise SystemExit(1)


if __name__ == "__main__":
    main()
