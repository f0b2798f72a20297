"""The benchmark of environments runs from end to end. What it measures is not looked at."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import envs  # noqa: F401  chooses MuJoCo's renderer before a script imports it

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = ("--image-size", "16", "--steps", "1", "--rounds", "1", "--composites", "20", "--images", "1")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the script as `python scripts/bench_env.py ...` would; return its output and what it wrote as JSON."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def run(*arguments: str) -> tuple[str, list[dict]]:
        path = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", ["bench_env.py", *SMALL, *arguments, "--json", str(path)])
        runpy.run_path(str(SCRIPTS / "bench_env.py"), run_name="__main__")
        return capsys.readouterr().out, json.loads(path.read_text())["rows"]

    yield run
    torch.set_num_threads(threads)


def test_distractions(run):
    variants = "plain; ColorGrid, exact; NaturalVideo, fast"
    output, (plain, grid, video) = run("--tasks", "cheetah_run", "--renderers", "", "--variants", variants)
    assert plain["x steps/s"] == 1 and plain["transform us"] is None
    assert grid["table MB"] == 2500 * 16 * 16 * 3 / 1e6
    assert video["table MB"] > 0 < video["transform us"]
    assert grid["composite us"] > 0
    assert "NaturalVideo, fast" in output


@pytest.mark.slow
def test_renderers(run):
    pytest.importorskip("mujoco_warp")
    _, (row,) = run("--tasks", "", "--renderers", "cheetah_run", "--image-size", "48")
    assert row["ids"] > 0.98 and row["lowest IoU"] > 0.9
    assert row["x CPU"] > 0


@pytest.mark.parametrize(("arguments", "error"), [(("--variants", "fast"), SystemExit), (("--tasks", "x"), ValueError)])
def test_unknown_names(run, arguments, error):
    with pytest.raises(error):
        run(*arguments, "--renderers", "")


def test_without_the_ray_caster(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    output, rows = run("--tasks", "cheetah_run", "--variants", "plain, fast")
    assert [row["environment"] for row in rows] == ["plain, fast"] and "mjwarp" not in output
