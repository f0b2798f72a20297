"""The measurement of what the latent holds of the background: its figures by hand, and from end to end."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.programs import run_program

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = ("--size", "debug", "--image-size", "16", "--frames", "600", "--train-ratio", "16", "--seeds", "0")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("measure_separation")


class TestProbe:
    """600 inputs, 90 correlated rows: a map that is not held back would do worse than a constant."""

    @pytest.fixture
    def rows(self):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(45, 10, 600, generator=generator), torch.randn(45, 1, 3, generator=generator)

    def test_nothing_to_know(self, script, rows):
        feature, target = rows[0], rows[1].expand(-1, 10, -1) + 5
        probe = script.Probe(feature[:30], target[:30])
        assert -0.3 < probe.explains(feature[30:], target[30:]) < 0.1

    def test_what_is_there_is_found(self, script, rows):
        """Also when the numbers have another scale and lie elsewhere."""
        feature = rows[0]
        target = feature[..., :3] * 100 + 7
        feature = torch.cat([feature[..., :20], feature[..., :3] * 1e-3], -1)
        probe = script.Probe(feature[:30], target[:30])
        assert probe.explains(feature[30:], target[30:]) > 0.95


@pytest.mark.slow
def test_command(script, tmp_path, monkeypatch, capsys):
    """Two agents, one of them with an override; what is there is not trained again, and other settings are refused."""
    trained = []

    def run(command, **_):
        trained.append(command)
        run_program("dreamer/train.py", *command[2:])

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=run, DEVNULL=None))

    def main(*arguments):
        few = ("--sequences", "6", "--length", "12", "--out", str(tmp_path))
        monkeypatch.setattr(sys, "argv", ["measure_separation.py", *SMALL, *few, *arguments])
        script.main()
        return json.loads((tmp_path / "separation.json").read_text())["rows"]

    agents = ("--agents", "dreamer_v3", "world2filter agent.weighted=false")
    plain, apart = main(*agents)
    assert plain["mask_iou"] is None and 0 <= apart["mask_iou"] <= 1
    assert all(row["swap_nats"] > 0 and row["fg_mse"] > 0 and row["bg_mse"] > 0 for row in (plain, apart))
    assert len(trained) == 2 and main(*agents) == [plain, apart] and len(trained) == 2
    with pytest.raises(ValueError, match="give another --out"):
        main("--agents", "dreamer_v3", "--frames", "900")
