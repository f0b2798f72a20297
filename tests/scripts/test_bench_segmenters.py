"""The table of segmenters: it runs from end to end, and what it measures is what it says."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import envs  # noqa: F401  chooses MuJoCo's renderer before a script imports it
from scripts.make_tiny_sam3 import make_config, make_model, save_model

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = ("--image-size", "16", "--episodes", "1", "--steps", "3", "--labels", "2", "--rounds", "1")


@pytest.fixture
def script(monkeypatch):
    """Path of the script, which finds its neighbours; the number of threads is restored."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield str(SCRIPTS / "bench_segmenters.py")
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_table(script, monkeypatch, capsys, tmp_path):
    arguments = ("--tasks", "cheetah_run", "--scenes", "grid", "--renderer", "fast", "--student-steps", "1")
    monkeypatch.setattr(sys, "argv", [script, *SMALL, *arguments, "--json", str(tmp_path / "figures.json")])
    runpy.run_path(script, run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3 and len({line.count("|") for line in lines}) == 1
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [row["segmenter"] for row in rows] == ["simulator", "colour, 2 labels", "student, 1 steps"]
    truth = rows[0]
    assert truth["J"] == truth["F"] == truth["recall"] == 1
    assert truth["false positives"] == truth["empty"] == truth["flicker"] == 0
    assert 0 < rows[1]["J"] <= 1 and rows[1]["frames/CPU-s"] > 0


@pytest.mark.slow
def test_size_of_the_input_of_sam3(script, monkeypatch, tmp_path):
    folder = save_model(make_model(make_config()), tmp_path)
    options = ("--renderer", "fast", "--student-steps", "1", "--sam3", str(folder), "--sam3-image-size", "60")
    monkeypatch.setattr(sys, "argv", [script, *SMALL, "--tasks", "cheetah_run", *options])
    with pytest.raises(ValueError, match="image_size=60: give a multiple of the model's patch"):
        runpy.run_path(script, run_name="__main__")


def test_painted_over(script):
    """No pixel of the foreground or beside it stays, all others do; what moved away shows what was behind."""
    paint_over = runpy.run_path(script)["paint_over"]
    frames = torch.full((2, 8, 8, 3), 10, dtype=torch.uint8)
    frames[1] = 30
    masks = torch.zeros(2, 8, 8, 1, dtype=torch.bool)
    masks[0, 2:4, 2:4], masks[1, 3:5, 3:5] = True, True
    painted = paint_over(torch.where(masks, 255, frames).to(torch.uint8), masks)
    assert painted[0, 1, 1].tolist() == [30] * 3  # rim of the first frame, seen in the second
    assert painted[0, 3, 3].tolist() == [10] * 3  # hidden in both: the mean of what is seen of the first
    assert painted[1, 5, 5].tolist() == [10] * 3
    assert painted[0, 6:].unique().tolist() == [10] and painted[1, 6:].unique().tolist() == [30]
    assert painted.max() == 30
