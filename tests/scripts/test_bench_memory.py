"""The memory benchmark from end to end in its smallest settings."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = ("replay_buffer.batch_size=2", "replay_buffer.sequence_length=4", "env.image_size=16")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("bench_memory")


@pytest.fixture
def run(bench, monkeypatch, capsys, tmp_path):
    """Run the script as a command would; return its output and its figures."""

    def run(*arguments: str) -> tuple[str, list[dict]]:
        path = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", ["bench_memory.py", "--json", str(path), *arguments])
        bench.main()
        return capsys.readouterr().out, json.loads(path.read_text())["rows"]

    return run


@pytest.mark.slow
def test_figures(run):
    output, (row,) = run("--sizes", "debug", *SMALL)
    assert "B=2, T=4" in output and output.splitlines()[-1].startswith("| debug | ")
    assert row["gradients MiB"] == row["parameters"] * 4 / 2**20
    assert row["weights MiB"] > row["gradients MiB"], "the slow critic is not trained"
    assert row["optimiser MiB"] >= 2 * row["gradients MiB"], "two moments"
    assert row["peak MiB"] >= row["update MiB"] > 0
    image, belief, classes, action = 16 * 16 * 3, 2 * 64, 8, 4 * 6
    assert row["record bytes"] == image + belief + classes + action + 4 + 3, "as docs/memory.md says"


@pytest.mark.slow
def test_a_size_that_does_not_fit(run):
    """The process of that size ends, the others are measured."""
    output, rows = run("--sizes", "debug", "--limit", "0.01", *SMALL)
    assert rows[0]["peak MiB"] is None and "did not fit" in output


def test_one_update_is_not_enough(run, capsys):
    with pytest.raises(SystemExit):
        run("--updates", "1")
    assert "--updates=1: give at least 2" in capsys.readouterr().err


def test_other_errors_are_not_taken_for_a_full_memory(bench, monkeypatch):
    class Pool:
        def __init__(self, *_, **__): ...
        def __enter__(self):
            raise RuntimeError("shapes cannot be multiplied")

        def __exit__(self, *_): ...

    monkeypatch.setattr(bench, "ProcessPoolExecutor", Pool)
    with pytest.raises(RuntimeError, match="shapes"):
        bench.measure_apart({}, 2, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(run):
    _, (row,) = run("--sizes", "debug", "--device", "cuda", *SMALL)
    assert row["peak MiB"] > row["weights MiB"] > 0


def test_documented_commands_are_understood(bench, monkeypatch):
    text = (SCRIPTS.parent / "docs/memory.md").read_text().replace("\n", " ")
    commands = re.findall(r"`(python scripts/bench_memory.py[^`]*?)(?: \.\.\.)?`", text)
    assert len(commands) == 4
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
        args = bench.parse_args()
        bench.load_config(*args.overrides)
        assert set(args.sizes) <= set(bench.SIZES)
