"""The benchmark of annotation runs from end to end in its smallest settings. What it measures is not looked at."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = ("--env", "env=mock,env.image_size=16", "--agent", "agent=world2filter,agent/size=debug", "--frames", "64")
SMALL += ("--repeats", "1", "--updates", "1", "--batch", "2", "--length", "4", "--frames-per-update", "2")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the script with small settings; return its output and the rows that it wrote as JSON."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def run(*arguments: str) -> tuple[str, list[dict]]:
        path = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", ["bench_annotation.py", *SMALL, *arguments, "--json", str(path)])
        runpy.run_path(str(SCRIPTS / "bench_annotation.py"), run_name="__main__")
        return capsys.readouterr().out, json.loads(path.read_text())["rows"]

    yield run
    torch.set_num_threads(threads)


def test_throughput(run):
    output, rows = run("--only", "throughput", "--batches", "1,4")
    assert [(row["labeller"], row["batch"]) for row in rows] == [
        (name, size) for name in ("colour", "student", "student, promoted") for size in (1, 4)
    ]
    assert all(row["labeller"] in output and row["frames/s"] > 0 for row in rows)


def test_a_student_that_was_not_examined_is_not_shown_as_promoted(run):
    with pytest.raises(SystemExit, match="--frames 16: too few"):
        run("--only", "throughput", "--batches", "1", "--frames", "16")


@pytest.mark.slow
def test_training(run):
    output, rows = run("--only", "training")
    names = ["colour", "student", "student, promoted"]
    assert [row["masks"] for row in rows] == ["simulator", *names, *(f"{name}, thread" for name in names)]
    assert rows[0]["CPU to simulator"] == 1 and all(row["clock s"] > 0 for row in rows)
    assert "2 frames labelled per update" in output
