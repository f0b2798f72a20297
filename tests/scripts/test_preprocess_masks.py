"""The script that labels episodes before training: what it writes, makes again, leaves alone and refuses."""

import os
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from envs.segmentation.labels import load_labels
from envs.segmentation.protocol import check_frames, fingerprint
from scripts.make_tiny_sam3 import make_config, make_model, save_model

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.append(str(SCRIPTS))

import preprocess_masks as script  # noqa: E402


class Bright:
    """Marks two halves of what is bright; counts its calls."""

    concepts = ("left", "right")

    def __init__(self, level: int = 100):
        self.level, self.version, self.calls = level, fingerprint("bright", level), []

    def __call__(self, frames):
        check_frames(frames)
        self.calls.append(len(frames))
        bright = (frames[..., :1] > self.level).to(torch.uint8) * 255
        left = torch.arange(frames.shape[2])[:, None] < frames.shape[2] // 2
        return torch.cat([bright * left, bright * ~left], -1)


def make_frames(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two episodes and a video."""
    (tmp_path / "episodes/deep").mkdir(parents=True)
    np.savez(tmp_path / "episodes/a.npz", pixels=make_frames(5, 0), reward=np.zeros(5))
    np.savez(tmp_path / "episodes/deep/b.npz", image=make_frames(3, 1))
    (tmp_path / "episodes/notes.txt").write_text("no episode")
    with av.open(str(tmp_path / "episodes/film.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "yuv420p"
        for image in make_frames(4, 2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return tmp_path


def run(monkeypatch, folder, segmenter, *arguments) -> list[int]:
    """Labels the folder; the numbers of frames in the calls of the segmenter."""
    monkeypatch.setattr(script, "make_segmenter", lambda *_, **__: segmenter)
    command = ["--data_dir", str(folder / "episodes"), "--output_dir", str(folder / "masks"), *arguments]
    script.main([*command, "--batch_size", "4", "--device", "cpu"])
    return segmenter.calls


def test_labels_every_episode(monkeypatch, folder, capsys):
    segmenter = Bright()
    assert run(monkeypatch, folder, segmenter) == [4, 1, 3, 4]
    assert "3 episodes labelled (12 frames" in capsys.readouterr().out
    with np.load(folder / "masks/a.npz", allow_pickle=False) as file:
        assert (file["mask"].shape, file["mask"].dtype) == ((5, 16, 16, 1), np.uint8)
        assert (file["mask_valid"].shape, file["mask_valid"].dtype) == ((5, 1), bool) and file["mask_valid"].all()
        assert (file["mask_version"].shape, file["mask_version"].dtype) == ((5, 1), np.int64)
        assert (file["mask_version"] == segmenter.version).all()
    frames, masks = load_labels(folder / "masks")
    assert len(frames) == 12 and torch.equal(frames[:5], torch.from_numpy(make_frames(5, 0)))
    assert torch.equal(masks > 0, frames[..., :1] > 100)
    assert sorted(path.name for path in (folder / "masks").rglob("*.*")) == ["a.npz", "b.npz", "film.npz"]


def test_goes_on_where_it_stopped(monkeypatch, folder, capsys):
    run(monkeypatch, folder, Bright())
    before = (folder / "masks/a.npz").read_bytes()
    assert run(monkeypatch, folder, Bright()) == []
    assert "0 episodes labelled (0 frames), 3 were finished, 0 failed" in capsys.readouterr().out
    (folder / "masks/film.npz").unlink()
    whole = (folder / "masks/deep/b.npz").read_bytes()
    (folder / "masks/deep/b.npz").write_bytes(whole[: len(whole) // 2])
    assert run(monkeypatch, folder, Bright()) == [3, 4], "what is missing or damaged is made again"
    episode = folder / "episodes/a.npz"
    time = episode.stat().st_mtime_ns
    np.savez(episode, pixels=make_frames(2, 0))
    os.utime(episode, ns=(time, time))
    assert run(monkeypatch, folder, Bright()) == [2], "an episode of another size"
    os.utime(episode, ns=(time, time - 1))
    assert run(monkeypatch, folder, Bright()) == [2], "an episode of another time, though older than its masks"
    assert (folder / "masks/a.npz").read_bytes() != before
    assert run(monkeypatch, folder, Bright(50)) == [2, 3, 4], "another version"


def test_an_episode_that_lies_elsewhere(monkeypatch, folder):
    """The masks of a file of the same size and time, but with other frames."""
    run(monkeypatch, folder, Bright())
    (folder / "episodes").rename(folder / "elsewhere")
    assert len(run(monkeypatch, folder, Bright(), "--data_dir", str(folder / "elsewhere"))) == 4


def test_both_folders_may_move_together(monkeypatch, folder):
    run(monkeypatch, folder, Bright())
    (folder / "moved").mkdir()
    for name in ("episodes", "masks"):
        (folder / name).rename(folder / "moved" / name)
    assert len(load_labels(folder / "moved/masks")[0]) == 12
    assert run(monkeypatch, folder / "moved", Bright()) == []


def test_a_full_disk_leaves_nothing_half_written(monkeypatch, folder, capsys):
    def fail(number):
        raise OSError("no space left")

    monkeypatch.setattr("dreamer.files.os.fsync", fail)
    with pytest.raises(SystemExit):
        run(monkeypatch, folder, Bright())
    assert capsys.readouterr().out.count("no space left") == 3
    assert not [path for path in folder.glob("masks/**/*") if path.is_file()]


def test_masks_may_lie_below_the_episodes(monkeypatch, folder):
    arguments = ["--output_dir", str(folder / "episodes/masks")]
    assert len(run(monkeypatch, folder, Bright(), *arguments)) == 4
    assert run(monkeypatch, folder, Bright(), *arguments) == [], "they are no episodes"


def test_failures_are_named_at_the_end(monkeypatch, folder, capsys):
    (folder / "episodes/0.npz").write_bytes(b"damaged")
    np.savez(folder / "episodes/objects.npz", pixels=np.array([{}]))
    np.savez(folder / "episodes/vector.npz", observation=np.zeros((3, 5), dtype=np.float32))
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, folder, Bright())
    printed = capsys.readouterr().out
    assert stop.value.code == 1 and "3 episodes labelled" in printed and "3 failed" in printed
    for name in ("0.npz: not a .npz file", "objects.npz: not a .npz", "vector.npz: give pixels or image"):
        assert name in printed
    assert not (folder / "masks/0.npz").exists()


def test_an_interruption_leaves_nothing_half_written(monkeypatch, folder):
    def interrupt(frames):
        raise KeyboardInterrupt

    segmenter = Bright()
    monkeypatch.setattr(Bright, "__call__", lambda self, frames: interrupt(frames))
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, folder, segmenter)
    assert not list(folder.glob("masks/**/*.*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output_dir", "{}/episodes"], "is --data_dir too; give another folder"),
        (["--data_dir", "{}/nothing"], "no .npz files and no videos"),
        ([], '--prompt: say what belongs to the foreground, for example "robot arm . ball"'),
        (["--segmenter", "colour", "--prompt", "robot"], "--prompt: of --segmenter sam3 only, colour does not look"),
        (["--segmenter", "student", "--mode", "semantic"], "--mode: of --segmenter sam3 only, student"),
        (["--segmenter", "colour"], "--segmenter colour needs labelled frames to fit it on"),
        (["--segmenter", "student"], "--segmenter student needs the file of a trained student"),
        (["--segmenter", "colour", "--model", "{}/episodes"], "no labelled frames"),
    ],
)
def test_what_is_refused(folder, arguments, message):
    command = ["--data_dir", "{}/episodes", "--output_dir", "{}/masks", *arguments]
    with pytest.raises(SystemExit, match=message):
        script.main([word.format(folder) for word in command])


def test_two_episodes_of_one_name(folder):
    (folder / "episodes/film.npz").write_bytes((folder / "episodes/a.npz").read_bytes())
    with pytest.raises(ValueError, match=r"film\.mkv and .*film\.npz: their masks would both be"):
        script.find_episodes(folder / "episodes", folder / "masks")


def test_with_a_colour_model(folder):
    """The whole command with a real segmenter, fitted on labelled frames from a file."""
    frames = np.full((5, 16, 16, 3), 30, dtype=np.uint8)
    frames[:, 4:12, 4:12] = 220
    np.savez(folder / "few.npz", pixels=frames, mask=frames[..., 0] > 100)
    np.savez(folder / "episodes/a.npz", pixels=frames)
    command = ["--segmenter", "colour", "--model", str(folder / "few.npz"), "--device", "cpu"]
    script.main(["--data_dir", str(folder / "episodes"), "--output_dir", str(folder / "masks"), *command])
    masks = load_labels(folder / "masks/a.npz")[1]
    assert ((masks[..., 0] > 127) == torch.from_numpy(frames[..., 0] > 100)).float().mean() > 0.9


def test_a_colour_model_does_not_load_all_labels(folder, monkeypatch):
    seen = []
    monkeypatch.setattr("envs.segmentation.colour.ColourModel.fit", lambda self, *labels: seen.append(len(labels[0])))
    np.savez(folder / "many.npz", pixels=make_frames(150, 0), mask=np.ones((150, 16, 16), dtype=bool))
    command = ["--segmenter", "colour", "--model", str(folder / "many.npz"), "--data_dir", "a", "--output_dir", "b"]
    script.make_segmenter(script.parse(command))
    assert seen == [script.MOST_LABELS]


def test_with_sam3(folder):
    """What is given reaches it, what is not given is its own default; weights that do not fit are told in one line."""
    tiny = save_model(make_model(make_config(28)), folder / "tiny")
    command = ["--prompt", "cart . pole", "--model", str(tiny), "--data_dir", str(folder / "episodes")]
    command += ["--output_dir", str(folder / "masks"), "--device", "cpu"]
    options = ["--image_size", "56", "--threshold", "0.2", "--mode", "semantic", "--batch_size", "3"]
    made = script.make_segmenter(script.parse([*command, *options]))
    assert made.concepts == ("cart", "pole") and made._loaded is not None
    assert (made.image_size, made.threshold, made.mode, made.max_batch) == (56, 0.2, "semantic", 3)
    default = script.make_segmenter(script.parse(command))
    assert (default.image_size, default.threshold, default.mode, default.max_batch) == (28, 0.5, "instance", 16)
    weights = load_file(tiny / "model.safetensors")
    weights.popitem()
    save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="1 weights are missing"):
        script.main(command)
    assert not (folder / "masks").exists()


def test_with_a_student(folder):
    from envs.segmentation.student import Student

    student = Student()
    student.save(folder / "student.safetensors")
    command = ["--segmenter", "student", "--model", str(folder / "student.safetensors"), "--device", "cpu"]
    script.main(["--data_dir", str(folder / "episodes"), "--output_dir", str(folder / "masks"), *command])
    frames, masks = load_labels(folder / "masks/a.npz")
    assert torch.equal(masks, student(frames))
