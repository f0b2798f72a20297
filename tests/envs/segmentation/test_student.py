"""The student: what it learns from few or noisy labels, when it is promoted, and that it goes on after a resume."""

import pickle
from copy import deepcopy

import pytest
import safetensors.torch
import torch

from envs.segmentation import Segmenter, background_swap
from envs.segmentation.background_swap import augment, make_backgrounds, swap_backgrounds
from envs.segmentation.metrics import jaccard
from envs.segmentation.protocol import HALF
from envs.segmentation.student import Distillation, Student, StudentNet, compute_loss

SIZE = 32


def make_discs(number: int, seed: int, *, background: str = "plain", colour=(200, 60, 40), size: int = SIZE):
    """Frames with a disc of one colour at random places, and masks."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randint(6, size - 6, (number, 2, 1, 1), generator=generator)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    mask = (((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2) < 20)[..., None]  # [N, h, w, 1]
    if background == "plain":
        behind = torch.full((number, size, size, 3), 90, dtype=torch.uint8)
    else:
        cells = torch.randint(0, 256, (number, 3, 8, 8), generator=generator).float()
        behind = torch.nn.functional.interpolate(cells, (size, size)).byte().permute(0, 2, 3, 1)
    frames = torch.where(mask, torch.tensor(colour, dtype=torch.uint8), behind)
    return frames, mask.byte() * 255


def score(student: Student, frames: torch.Tensor, masks: torch.Tensor) -> float:
    return float(jaccard(student(frames) >= HALF, masks >= HALF).mean())


def teach(labels: int, steps: int, **options) -> Distillation:
    distillation = Distillation(Student(), **{"batch_size": 8, **options})
    distillation.add(*make_discs(labels, seed=0))
    distillation.learn(steps)
    return distillation


@pytest.fixture(scope="module")
def taught() -> Distillation:
    """Taught on one plain background."""
    return teach(60, 80, capacity=60, bar=0.8)


def test_student_finds_the_object_before_backgrounds_that_it_never_saw(taught):
    assert score(taught.student, *make_discs(40, seed=1)) > 0.85
    assert score(taught.student, *make_discs(40, seed=1, background="blocks")) > 0.7


@pytest.mark.slow
def test_student_averages_the_noise_of_its_teacher_out():
    frames, masks = make_discs(80, seed=0, background="blocks")
    true = masks.permute(0, 3, 1, 2).float()
    fat, thin = (sign * torch.nn.functional.max_pool2d(sign * true, 3, 1, 1) for sign in (1, -1))
    kind = torch.rand(80, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    noisy = torch.where(kind < 0.3, fat, torch.where(kind < 0.6, thin, torch.where(kind < 0.7, 0 * true, true)))
    noisy = noisy.byte().permute(0, 2, 3, 1)
    distillation = Distillation(Student(), batch_size=8)
    distillation.add(frames, noisy)
    distillation.learn(150)
    teacher = float(jaccard(noisy >= HALF, masks >= HALF).mean())
    test_frames, test_masks = make_discs(40, seed=1, background="blocks")
    assert teacher < 0.65
    assert score(distillation.student, test_frames, test_masks) > teacher + 0.1
    assert (distillation.student(test_frames) >= HALF).flatten(1).any(1).all()  # and no empty mask


def test_empty_labels_in_the_majority_do_not_teach_to_find_nothing():
    frames, masks = make_discs(80, seed=0)
    masks[torch.arange(80) % 4 > 0] = 0  # the teacher misses three of four
    distillation = Distillation(Student(), batch_size=8)
    distillation.add(frames, masks)
    distillation.learn(60)
    assert score(distillation.student, *make_discs(40, seed=1)) > 0.6
    assert distillation.examine()["examined"] < 8  # of 8 held-out labels


def test_student_learns_from_labels_that_are_all_empty():
    distillation = Distillation(Student())
    distillation.add(make_discs(20, seed=0)[0], torch.zeros(20, SIZE, SIZE, 1, dtype=torch.uint8))
    assert distillation.learn(2)["loss"] > 0
    assert distillation.examine() == {"examined": 0.0} and not distillation.promoted


def test_five_labels_are_enough():
    distillation = teach(5, 60)
    assert score(distillation.student, *make_discs(40, seed=1)) > 0.6
    distillation.examine()
    assert not distillation.promoted  # nobody is promoted on fewer held-out labels than four


def test_loss_by_hand_and_least_at_soft_labels():
    masks = torch.tensor([0.0, 1.0, 0.5, 0.5]).reshape(1, 1, 2, 2)
    loss = compute_loss(torch.zeros(1, 1, 2, 2), masks)
    # cross-entropy log 2 everywhere; p = 1/2: sum pm = 1, sum p^2 = 1, sum m^2 = 1.5
    assert loss.item() == pytest.approx(0.693147 + 1 - (2 * 1 + 1) / (1 + 1.5 + 1), abs=1e-5)
    logits = torch.logit(torch.tensor([0.2, 0.7, 0.5, 0.9])).reshape(1, 1, 2, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(compute_loss(logits, logits.detach().sigmoid()), logits)
    assert gradient.abs().max() < 1e-6


def test_a_swap_keeps_the_foreground_and_changes_the_rest():
    frames, masks = (t.permute(0, 3, 1, 2).float() / 255 for t in make_discs(32, seed=0))
    swapped = swap_backgrounds(frames, masks, frames.roll(1, 0), masks.roll(1, 0), torch.Generator().manual_seed(0))
    inside = masks.expand_as(frames) == 1
    assert torch.equal(swapped[inside], frames[inside])
    assert (swapped - frames)[~inside].abs().mean() > 0.1
    red = torch.tensor([200.0, 60, 40]).div(255).reshape(1, 3, 1, 1)
    elsewhere = ((swapped - red).abs().amax(1, keepdim=True) < 0.02) & (masks == 0)  # [N, 1, h, w]
    assert elsewhere.sum() < 20  # no disc is pasted in with a donor


def test_donors_lend_their_backgrounds_without_their_foregrounds(monkeypatch):
    """Two frames of 8 x 8 pixels, each with one pixel of foreground, before the other one's background, mirrored."""
    monkeypatch.setattr(
        background_swap, "_uniform", lambda like, channels, generator: like.new_zeros(len(like), 1, 1, 1)
    )
    frames, masks = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(2, 1, 8, 8)
    masks[0, 0, 1, 1] = masks[1, 0, 5, 5] = 1
    swapped = swap_backgrounds(frames, masks, frames.roll(1, 0), masks.roll(1, 0), torch.Generator().manual_seed(0))
    assert torch.equal(swapped[0, :, 1, 1], frames[0, :, 1, 1])
    same = (swapped[0] == frames[1].flip(-1)).all(0)  # [h, w]
    hole = torch.zeros(8, 8, dtype=torch.bool)
    hole[4:7, 1:4] = True  # column 5 mirrored is column 2; one pixel around it
    hole[1, 1] = True  # its own foreground
    assert torch.equal(same, ~hole)


def test_augmented_masks_stay_with_their_frames():
    frames, masks = (t.permute(0, 3, 1, 2).float() / 255 for t in make_discs(16, seed=0))
    pictures, moved = augment(masks.expand(-1, 3, -1, -1), masks, frames, masks, torch.Generator().manual_seed(0))
    assert not torch.equal(moved, masks) and torch.equal(moved.sum((1, 2, 3)), masks.sum((1, 2, 3)))
    inside = [picture.mean(0)[mask[0] == 1] for picture, mask in zip(pictures, moved, strict=True)]
    assert all(values.std() < 1e-3 for values in inside)  # one colour, that of the object, where the mask is
    backgrounds = make_backgrounds(frames, torch.Generator().manual_seed(0))
    assert backgrounds.shape == frames.shape and backgrounds.min() >= 0 and backgrounds.max() <= 1


def test_held_out_labels_are_never_learned_from():
    distillation = Distillation(Student(), capacity=40, held_out=0.25)
    frames, masks = make_discs(64, seed=0)
    frames[:, 0, 0, 0] = torch.arange(64)
    for start in range(0, 64, 3):
        distillation.add(frames[start : start + 3], masks[start : start + 3])
    lesson, exam = distillation.lesson[:, 0, 0, 0].tolist(), distillation.exam[:, 0, 0, 0].tolist()
    assert exam == list(range(27, 64, 4)) and lesson == [i for i in range(24, 64) if i % 4 != 3]
    before = deepcopy(distillation)
    distillation.exam = 255 - distillation.exam
    for one in (before, distillation):
        one.learn(2)
    assert before.student.version == distillation.student.version


def test_promotion_is_won_and_lost_again(taught):
    distillation = deepcopy(taught)
    facts = distillation.examine()
    assert distillation.promoted and facts["examined"] == 6
    assert facts["jaccard"] > 0.8 and 0.5 < facts["swapped_jaccard"] <= 1 and facts["empty_rate"] == 0
    assert distillation.examine() == facts  # the same exam every time
    distillation.add(*make_discs(60, seed=2, background="blocks", colour=(30, 90, 200)))
    assert distillation.examine()["jaccard"] < 0.8 and not distillation.promoted


def test_who_finds_nothing_in_some_frames_is_not_promoted(taught):
    distillation = deepcopy(taught)
    distillation.bar = 0.0
    distillation.add(*make_discs(30, seed=2, colour=(90, 90, 90)))  # invisible
    assert distillation.examine()["empty_rate"] > 0 and not distillation.promoted


def test_resumed_run_goes_on_bit_by_bit():
    whole = teach(30, 3, seed=5)
    whole.examine()
    resumed = Distillation(Student(seed=9), batch_size=8, seed=9)
    resumed.load_state_dict(deepcopy(whole.state_dict()))
    for one in (whole, resumed):
        one.add(*make_discs(7, seed=3))
        one.learn(3)
    assert resumed.student.version == whole.student.version
    mine, other = resumed.state_dict(), whole.state_dict()
    assert all(torch.equal(mine[name], other[name]) for name in ("generator", "lesson", "exam"))
    assert (mine["added"], mine["steps"], mine["promoted"]) == (37, 6, other["promoted"])


def test_global_random_numbers_are_left_alone():
    before = torch.get_rng_state()
    distillation = teach(20, 1)
    distillation.examine()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert Student(seed=3).version == Student(seed=3).version != Student(seed=4).version
    assert distillation.student.version == teach(20, 1).student.version != teach(20, 1, seed=1).student.version


def test_running_mean_by_hand():
    distillation = Distillation(Student())
    for net, value in ((distillation.student.net, 0.0), (distillation.net, 1.0)):
        for weights in net.state_dict().values():
            weights.fill_(value)

    def marking() -> float:
        (value,) = torch.cat([w.flatten() for w in distillation.student.net.parameters()]).unique().tolist()
        return value

    distillation.steps = 10  # the decay is 10 / 20
    distillation._average()
    assert marking() == 0.5
    distillation.steps = 10_000  # the decay is 0.98
    distillation._average()
    assert marking() == pytest.approx(0.51)


def test_masks_are_ordinary_tensors():
    masks = Student()(make_discs(2, seed=0)[0])
    masks[0] = 7
    assert not masks.is_inference() and not masks.requires_grad


def test_learning_works_within_no_grad():
    distillation = Distillation(Student())
    assert distillation.learn(3) == {}  # nothing to learn from yet
    with torch.inference_mode():
        distillation.add(*make_discs(5, seed=0))
    version = distillation.student.version
    with torch.no_grad():
        assert distillation.learn(0) == {}
        assert distillation.learn(1)["loss"] > 0
    assert distillation.student.version != version


def test_student_is_a_segmenter(tmp_path):
    student, frames = Student(seed=1), make_discs(20, seed=0)[0]
    assert isinstance(student, Segmenter) and student.concepts == ("foreground",) and 0 < student.version < 2**63
    masks = student(frames)
    assert masks.shape == (20, SIZE, SIZE, 1) and masks.dtype == torch.uint8
    one_by_one = torch.cat([student(frame[None]) for frame in frames])
    assert (masks.int() - one_by_one.int()).abs().max() <= 1
    assert student(frames[:0]).shape == (0, SIZE, SIZE, 1)
    student.save(tmp_path / "student.safetensors")
    for other in (Student.load(tmp_path / "student.safetensors"), pickle.loads(pickle.dumps(student))):
        assert other.version == student.version and torch.equal(other(frames), masks)
    assert 20_000 < sum(p.numel() for p in StudentNet().parameters()) < 40_000
    assert student(frames[:, :, :20]).shape == (20, SIZE, 20, 1)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "student.safetensors"
    for content in (b"no weights", safetensors.torch.save({"weight": torch.zeros(3)})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"student\.safetensors holds no weights of a student"):
            Student.load(path)


def test_wrong_shapes_and_options_say_what_to_give():
    frames, masks = make_discs(3, seed=0)
    student = Student()
    with pytest.raises(ValueError, match="uint8"):
        student(frames.float())
    with pytest.raises(ValueError, match="divisible by 4"):
        student(frames[:, :30])
    distillation = Distillation(student)
    distillation.add(frames[:0], masks[:0])
    with pytest.raises(ValueError, match=r"masks are torch\.bool"):
        distillation.add(frames, masks > 0)
    with pytest.raises(ValueError, match="masks are"):
        distillation.add(frames, masks[:2])
    distillation.add(frames, masks)
    with pytest.raises(ValueError, match="one size"):
        distillation.add(frames[:, :16], masks[:, :16])
    assert Distillation(student, capacity=35).largest_exam == 4
    bad = [{"held_out": 0}, {"held_out": 1}, {"bar": 2}, {"batch_size": 0}]
    bad += [{"capacity": 1}, {"capacity": 34}, {"capacity": 4, "held_out": 0.99}]
    for options in bad:
        with pytest.raises(ValueError, match=next(iter(options))):
            Distillation(student, **options)
