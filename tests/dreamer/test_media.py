"""The hook that writes media: when, what, and that training does not notice."""

import json
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

from dreamer.agents import Media
from dreamer.loggers import RunLogger
from dreamer.media import LogMedia


def make_media(batch):
    """One of each kind, drawn at random."""
    image = torch.randint(256, (16, 16, 3), dtype=torch.uint8)
    return Media(
        {"train/original": image},
        {"train/observation_video": image[None]},
        {"histograms/kl": torch.rand(9)},
        {"segmentation/model_iou": torch.tensor(0.5)},
    )


@pytest.fixture
def trainer(tmp_path):
    return SimpleNamespace(collected_frames=0, log_step=0, logger=RunLogger(tmp_path, backends=[]))


def written(tmp_path):
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    return files - {"metrics.jsonl"}


def test_writes_each_kind_when_due(trainer, tmp_path):
    hook = LogMedia(trainer, make_media, 100, True)
    for frames in (0, 40, 100):
        trainer.collected_frames = trainer.log_step = frames
        hook(TensorDict())
    names = ("images/train_original_{:09}.png", "videos/train_observation_video_{:09}.mp4")
    expected = {name.format(frames) for name in names for frames in (0, 100)}
    assert written(tmp_path) == expected | {"histograms.jsonl"}
    assert (tmp_path / "histograms.jsonl").read_text().count("\n") == 2


def test_pictures_do_not_replace_each_other_while_frames_stand_still(trainer, tmp_path):
    hook, trainer.collected_frames = LogMedia(trainer, make_media, 100, histograms=True), 500
    for trainer.log_step in (510, 520):
        hook.show(make_media(None))
    assert {int(name[-13:-4]) for name in written(tmp_path) if name.endswith((".png", ".mp4"))} == {510, 520}
    lines = [json.loads(line) for line in (tmp_path / "histograms.jsonl").read_text().splitlines()]
    assert [(line["frames"], line["step"]) for line in lines] == [(500, 510), (500, 520)]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({}, {"images", "videos"}),
        ({"images": False}, {"videos"}),
        ({"videos": False, "histograms": True}, {"images", "histograms.jsonl"}),
    ],
)
def test_writes_what_is_wanted(wanted, found, trainer, tmp_path):
    LogMedia(trainer, make_media, 100, **wanted)(TensorDict())
    assert {name.split("/")[0] for name in written(tmp_path)} == found


def fail(batch):
    raise AssertionError("nothing is wanted")


@pytest.mark.parametrize("settings", [(0, True), (100, False, False, False)])
def test_costs_nothing_when_nothing_is_wanted(settings, trainer):
    LogMedia(trainer, fail, *settings)(TensorDict())


def test_leaves_the_random_numbers_as_they_were(trainer):
    state = torch.get_rng_state()
    LogMedia(trainer, make_media, 100)(TensorDict())
    assert torch.equal(torch.get_rng_state(), state)


def test_resume_keeps_the_rhythm(trainer, tmp_path):
    before, after = (LogMedia(trainer, make_media, 100) for _ in range(2))
    before(TensorDict())
    after.load_state_dict(before.state_dict())
    trainer.collected_frames = 60
    after(TensorDict())
    assert len(written(tmp_path)) == 2, "the next is due at 100"
