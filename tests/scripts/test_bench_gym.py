"""The benchmark of Gymnasium environments runs from end to end. What it measures is not looked at."""

import json
import runpy
import sys
from pathlib import Path

import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = ("--environments", "CarRacing-v3:2", "--vectors", "LunarLander-v3:1", "--steps", "3", "--frames", "2")


def test_bench_gym(monkeypatch, tmp_path, capsys):
    path, threads = tmp_path / "figures.json", torch.get_num_threads()
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(sys, "argv", ["bench_gym.py", *SMALL, "--json", str(path)])
    try:
        runpy.run_path(str(SCRIPTS / "bench_gym.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    pixels, vector, continuous, discrete = json.loads(path.read_text())["rows"]
    assert (pixels["seen"], vector["seen"]) == ("pixels", "observation")
    assert continuous["different"] == discrete["different"] == 0 < discrete["x"]
    assert "view CPU ms" in capsys.readouterr().out
