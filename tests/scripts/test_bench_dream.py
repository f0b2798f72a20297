"""The benchmark runs from end to end in its smallest settings. What it measures is not looked at."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALLEST = ("--candidates", "3", "--trials", "2", "--length", "4", "--hidden", "8", "--latent", "4", "--repeats", "1")


def run(monkeypatch, path: Path, *arguments: str) -> dict:
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(sys, "argv", ["bench_dream.py", *SMALLEST, *arguments, "--json", str(path)])
    try:
        runpy.run_path(str(SCRIPTS / "bench_dream.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    return json.loads(path.read_text())


def test_bench_dream(monkeypatch, tmp_path, capsys):
    batched, alone = run(monkeypatch, tmp_path / "figures.json")["rows"]
    assert (batched["dream"], alone["dream"]) == ("one batch", "one by one")
    assert alone["to one by one"] == 1 and batched["steps/s"] > 0
    assert "3 candidates x 2 trials x 4 steps" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bench_dream_on_a_gpu(monkeypatch, tmp_path):
    assert len(run(monkeypatch, tmp_path / "figures.json", "--device", "cuda")["rows"]) == 2
