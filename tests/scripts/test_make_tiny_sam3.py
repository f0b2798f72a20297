"""The small checkpoint of SAM 3."""

import sys
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from envs.segmentation.sam3 import Sam3
from scripts import make_tiny_sam3, preprocess_masks
from scripts.make_tiny_sam3 import COLOURS, compute_loss, draw_shapes, make_task_sampler
from tests.test_configs import config


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["make_tiny_sam3.py", *map(str, arguments)])
    make_tiny_sam3.main()


def test_a_seed_makes_one_checkpoint(tmp_path, monkeypatch):
    state = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(monkeypatch, "--out", tmp_path / name, "--seed", seed)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert not all(torch.equal(value, c[name]) for name, value in a.items())
    assert torch.equal(torch.get_rng_state(), state)


def test_training_changes_the_weights_and_the_checkpoint_loads(tmp_path, monkeypatch):
    run(monkeypatch, "--out", tmp_path / "tiny", "--shapes", "--steps", 2, "--layout", "video")
    run(monkeypatch, "--out", tmp_path / "random", "--shapes", "--steps", 0, "--layout", "video")
    trained, untrained = (load_file(tmp_path / name / "model.safetensors") for name in ("tiny", "random"))
    assert not all(torch.equal(value, untrained[name]) for name, value in trained.items())
    assert Sam3("red", str(tmp_path / "tiny"), image_size=None).image_size == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", 5], "--steps 5: nothing to learn"),
        (["--task", "cheetah_run", "--frames", 0], "--frames 0: at least 1"),
    ],
)
def test_what_is_refused(arguments, message, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--out", tmp_path / "tiny", *arguments)
    assert message in capsys.readouterr().err and not (tmp_path / "tiny").exists()


def test_the_options_that_are_printed_work(tmp_path, monkeypatch, capsys):
    """They are settings of train.py, arguments of preprocess_masks.py, and a line of Python."""
    run(monkeypatch, "--out", tmp_path / "tiny")
    printed = capsys.readouterr().out
    train, labels, python = (line.split(":", 1)[1].strip() for line in printed.splitlines()[-3:])
    overrides = dict(word.split("=") for word in train.split())
    found = config("agent=world2filter", *train.split())
    for name, value in overrides.items():
        assert str(OmegaConf.select(OmegaConf.create(found), name)) == value.replace("null", "None")
    options = preprocess_masks.parse(["--data_dir", "a", "--output_dir", "b", "--prompt", "robot", *labels.split()])
    assert preprocess_masks.make_segmenter(options).version == eval(python).version


def test_shapes_have_their_colour():
    images, masks = draw_shapes(torch.Generator().manual_seed(0), 32)
    assert images.shape == (32, 32, 32, 3) and masks.shape == (32, 4, 32, 32)
    assert masks.sum(1).max() == 1, "the one in front hides the others"
    for number, colour in enumerate(COLOURS.values()):
        inside = images[masks[:, number]].float()
        assert (inside.mean(0) - torch.tensor(colour, dtype=torch.float)).abs().max() < 25
    assert 0.4 < masks.flatten(2).any(2).float().mean() < 0.75


def test_sampler_of_a_task_keeps_the_foreground_and_changes_the_rest():
    frames = torch.zeros(3, 8, 8, 3, dtype=torch.uint8)
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    frames[:, 2:5, 2:5], masks[:, 2:5, 2:5] = torch.tensor([200, 0, 0], dtype=torch.uint8), True
    images, wanted = make_task_sampler(frames, masks, 2)(torch.Generator().manual_seed(0), 200)
    there = wanted[:, 0].flatten(1).any(1)
    assert torch.equal(wanted[:, 0], wanted[:, 1])
    assert 0.8 < there.float().mean() < 0.97, "15 % of the 70 % with another background are without agent"
    inside = images[wanted[:, 0]].float()
    assert (inside[:, 0] >= 159).all() and not inside[:, 1:].any()
    assert 0.5 < (images[:, 0, 0] > 0).any(-1).float().mean() < 0.85, "the share with another background"


def test_loss_is_small_where_all_is_right():
    wanted = torch.zeros(2, 8, 8, dtype=torch.bool)
    wanted[0, 2:6, 2:6] = True  # the second image has no such thing
    sure = 40 * (wanted.float() - 0.5)
    right = {
        "pred_masks": torch.stack([-sure, sure], 1),
        "semantic_seg": sure[:, None],
        "pred_logits": torch.tensor([[-20.0, 20.0], [-20.0, -20.0]]),
        "presence_logits": torch.tensor([[20.0], [-20.0]]),
    }

    def loss(**changes):
        return float(compute_loss(SimpleNamespace(**{**right, **changes}), wanted))

    assert loss() == pytest.approx(0, abs=1e-3)
    assert loss(presence_logits=-right["presence_logits"]) == pytest.approx(20, abs=0.01)
    assert loss(semantic_seg=-right["semantic_seg"]) > 10
    assert loss(pred_logits=-right["pred_logits"]) > 5
    assert loss(pred_masks=right["pred_masks"].flip(1), pred_logits=right["pred_logits"].flip(1)) == loss()


def test_frames_of_a_task():
    frames, masks = make_tiny_sam3.collect_frames("cartpole_balance", 3, 16, 0)
    assert frames.shape == (3, 16, 16, 3) and masks.shape == (3, 16, 16)
    assert masks.dtype == torch.bool and 0 < masks.float().mean() < 0.5
