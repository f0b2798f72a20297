"""The labellers: which frames they label, what they learn from, what they say when something is missing."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from dreamer.labellers import make_labeller
from envs.segmentation.ground_truth import GroundTruth
from envs.segmentation.student import Student

SIZE = 16
SETTINGS = {
    "prompt": "",
    "model": "facebook/sam3",
    "image_size": 56,
    "threshold": 0.5,
    "mode": "instance",
    "dtype": None,
    "device": "cpu",
    "labels": None,
    "labelled_frames": 5,
    "teacher": "ground_truth",
    "teacher_frames": 2,
    "student_steps": 2,
    "bar": 0.9,
}


def make(source: str, **settings):
    return make_labeller(source, **SETTINGS | settings)


def make_frames(count: int, seed: int = 0, true_mask: bool = True) -> TensorDict:
    """Yellow squares somewhere on grey noise."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(60, 120, (count, SIZE, SIZE, 1), generator=generator).repeat(1, 1, 1, 3).to(torch.uint8)
    mask = torch.zeros(count, SIZE, SIZE, 1, dtype=torch.bool)
    for n, (y, x) in enumerate(torch.randint(0, SIZE - 6, (count, 2), generator=generator).tolist()):
        mask[n, y : y + 6, x : x + 6] = True
    pixels = torch.where(mask, torch.tensor([230, 210, 20], dtype=torch.uint8), pixels)
    return TensorDict({"pixels": pixels} | ({"true_mask": mask} if true_mask else {}), [count])


def score(labels, frames) -> float:
    found, truth = labels.mask > 127, frames["true_mask"]
    return float((found & truth).sum() / (found | truth).sum())


def write_labels(folder) -> str:
    frames, path = make_frames(8), folder / "labels.npz"
    np.savez(path, pixels=frames["pixels"].numpy(), mask=frames["true_mask"].numpy())
    return str(path)


class TestChoice:
    @pytest.mark.parametrize(
        ("source", "settings", "message"),
        [
            ("sam2", {}, r"agent.mask_source='sam2': choose one of \['colour', 'sam3', 'student'\]"),
            ("student", {"teacher": "me"}, r"agent.segmentation.teacher='me': choose one of"),
            ("sam3", {"prompt": " "}, "agent.segmentation.prompt="),
            ("student", {"teacher": "sam3"}, "agent.segmentation.prompt="),
            ("student", {"teacher_frames": 0}, "teacher_frames=0"),
            ("colour", {"labelled_frames": 0}, "labelled_frames=0"),
        ],
    )
    def test_mistakes_are_named(self, source, settings, message):
        with pytest.raises(ValueError, match=message):
            make(source, **settings)

    def test_sam3(self, monkeypatch):
        """Its concepts are joined: one marks the left half, one the upper half."""
        made = {}

        class FakeSam3:
            version = 5

            def __init__(self, concepts, model, **options):
                made.update(concepts=concepts, model=model, **options)

            def load(self):
                made["loaded"] = True

            def __call__(self, frames):
                masks = torch.zeros(*frames.shape[:3], 2, dtype=torch.uint8)
                masks[:, :, : SIZE // 2, 0] = masks[:, : SIZE // 2, :, 1] = 200
                return masks

        monkeypatch.setattr("envs.segmentation.sam3.Sam3", FakeSam3)
        labeller = make("sam3", prompt="cart . pole", model="here", threshold=0.3)
        assert made["concepts"] == ("cart", "pole") and made["model"] == "here" and made["loaded"]
        assert (made["image_size"], made["threshold"], made["mode"]) == (56, 0.3, "instance")
        labels = labeller.label(make_frames(3, true_mask=False))
        assert labels.mask.shape == (3, SIZE, SIZE, 1) and (labels.mask > 0).sum() == 3 * SIZE * SIZE * 3 // 4
        assert labels.version.tolist() == [5] * 3 and labels.done.all()
        assert "cart . pole" in labeller.name


class TestColour:
    def test_is_fitted_to_examples_once(self):
        labeller, frames = make("colour"), make_frames(20, seed=1)
        assert labeller.examples == 5
        labeller.prepare(make_frames(5))
        assert labeller.examples == 0
        labels = labeller.label(frames)
        assert score(labels, frames) > 0.8 and labels.done.all() and len(set(labels.version.tolist())) == 1

    def test_goes_on(self):
        labeller, other = make("colour"), make("colour")
        other.load_state_dict(labeller.state_dict())
        assert other.examples == 5, "there was nothing to go on from"
        labeller.prepare(make_frames(5))
        other.load_state_dict(labeller.state_dict())
        frames = make_frames(4, seed=1)
        for ours, theirs in zip(labeller.label(frames), other.label(frames), strict=True):
            assert torch.equal(ours, theirs)

    def test_labels_from_a_file(self, tmp_path):
        frames = make_frames(20, seed=1)
        labeller = make("colour", labels=write_labels(tmp_path))
        assert labeller.examples == 0 and score(labeller.label(frames), frames) > 0.8

    def test_nothing_to_learn_from(self):
        with pytest.raises(ValueError, match=r"agent.segmentation.labels=.*env.emit_mask=true"):
            make("colour").prepare(make_frames(5, true_mask=False))


class TestStudent:
    def test_learns_from_labels_of_a_file_too(self, tmp_path):
        assert make("student").distillation.added == 0
        assert make("student", labels=write_labels(tmp_path)).distillation.added == 8

    def test_labels_of_many_files_are_spread_over_all(self, tmp_path):
        """More than the student keeps: the first file counts as much as the last."""
        for name, level in (("a", 10), ("b", 200)):
            pixels, mask = np.full((900, 4, 4, 3), level, dtype=np.uint8), np.ones((900, 4, 4), dtype=bool)
            np.savez(tmp_path / f"{name}.npz", pixels=pixels, mask=mask)
        distillation = make("student", labels=str(tmp_path)).distillation
        assert distillation.added == distillation.capacity == 1024
        assert (distillation.lesson[:, 0, 0, 0] == 10).float().mean().item() == pytest.approx(0.5, abs=0.01)

    def test_is_kept_if_it_is_good_enough(self, tmp_path):
        labeller = make("student")
        labeller.export(tmp_path)
        assert not list(tmp_path.iterdir())
        labeller.distillation.promoted = True
        labeller.export(tmp_path)
        kept = Student.load(tmp_path / "student.safetensors")
        assert kept.version == labeller.distillation.student.version

    def test_until_promoted_only_the_frames_of_the_teacher(self):
        labeller, frames = make("student", teacher_frames=3), make_frames(7)
        labels = labeller.label(frames)
        assert labels.done.nonzero().flatten().tolist() == [0, 3, 6]
        expected = frames["true_mask"][::3].to(torch.uint8) * 255
        assert torch.equal(labels.mask[::3], expected)
        assert labels.version[::3].tolist() == [GroundTruth.version] * 3

    def test_once_promoted_it_labels_the_others(self):
        """A bar of 0 promotes whoever was examined at all."""
        labeller = make("student", teacher_frames=8, student_steps=1, bar=0.0)
        labeller.distillation.largest_empty_rate = 1.0
        for call in range(20):
            labels = labeller.label(make_frames(8, seed=call))
        assert labeller.metrics()["student_promoted"] == 1 and labels.done.all()
        labels = labeller.label(frames := make_frames(20, seed=99))
        student = labeller.distillation.student
        assert labels.done.all() and torch.equal(labels.mask[1], student(frames["pixels"][1:2])[0])
        assert labels.version[1] == student.version != labels.version[0] == GroundTruth.version
        assert labels.mask[0].unique().tolist() == [0, 255]

    def test_says_how_far_it_is(self):
        labeller = make("student")
        labeller.label(make_frames(4))
        assert labeller.metrics().keys() == {"student_loss", "student_promoted"}

    def test_fewer_frames_than_the_teacher_would_label(self):
        labels = make("student", teacher_frames=4).label(make_frames(1))
        assert labels.done.tolist() == [True]

    def test_the_teacher_wants_examples(self):
        labeller = make("student", teacher="colour")
        assert labeller.examples == 5
        labeller.prepare(make_frames(5))
        assert labeller.examples == 0 and labeller.label(make_frames(4)).done.sum() == 2

    def test_without_the_simulators_mask(self):
        with pytest.raises(ValueError, match=r"no 'true_mask'; give env.emit_mask=true"):
            make("student").label(make_frames(4, true_mask=False))

    def test_goes_on_to_the_bit(self):
        labeller, other = make("student", teacher="colour"), make("student", teacher="colour", seed=9)
        labeller.prepare(make_frames(5))
        labeller.label(make_frames(8))
        other.load_state_dict(deepcopy(labeller.state_dict()))  # a checkpoint holds copies
        for call in range(2):
            frames = make_frames(8, seed=call)
            for ours, theirs in zip(labeller.label(frames), other.label(frames), strict=True):
                assert torch.equal(ours, theirs)
        assert labeller.distillation.student.version == other.distillation.student.version
