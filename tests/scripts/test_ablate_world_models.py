"""The ablation of World Models: which runs it makes, and a small one from end to end."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from tests.programs import run_program

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = (
    "env=mock",
    "env.name=reach",
    "env.task=discrete",
    "env.from_pixels=true",
    "collector.total_frames=160",
    "collector.envs_per_collector=2",
    "collector.frames_per_batch=80",
    "agent.vae.channels=[2,2,2,2]",
    "agent.vae.latent_size=3",
    "agent.vae.updates=2",
    "agent.vae.batch_size=4",
    "agent.mdn_rnn.hidden_size=4",
    "agent.mdn_rnn.updates=2",
    "agent.mdn_rnn.batch_size=2",
    "agent.mdn_rnn.sequence_length=6",
    "agent.controller.population=3",
    "agent.controller.generations=2",
    "agent.controller.trials=1",
    "agent.controller.max_steps=5",
    "agent.controller.num_envs=2",
    "agent.controller.eval_interval=0",
    "eval.episodes=1",
    "logger.backends=[]",
    "device=cpu",
)


@pytest.fixture
def ablation(monkeypatch):
    """The program as a module; what it runs is run in this process."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("ablate_world_models")
    runs = []

    def run(program, folder, arguments):
        runs.append((program, folder.name))
        folder.mkdir(parents=True, exist_ok=True)
        run_program(f"dreamer/{program}", *arguments)

    monkeypatch.setattr(module, "run", run)
    module.runs = runs
    return module


def call(ablation, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["ablate_world_models.py", *arguments])
    ablation.main()


def test_the_cells(ablation):
    assert len(ablation.CELLS) == len(set(ablation.CELLS)) == 8
    folders = {cell.folder: cell for cell in ablation.CELLS}
    assert len(folders) == 6, "without h it does not matter whether M is trained"
    stages = {name: cell.overrides()[-1].removeprefix("agent.stages=") for name, cell in folders.items()}
    assert stages == {
        "z__trained_v": "[controller]",
        "z__random_v": "[encode,controller]",
        "zh__trained_m__trained_v": "[controller]",
        "zh__trained_m__random_v": "[encode,mdn_rnn,controller]",
        "zh__untrained_m__trained_v": "[controller]",
        "zh__untrained_m__random_v": "[encode,controller]",
    }
    assert "agent.untrained=[]" in folders["zh__trained_m__trained_v"].overrides()
    assert "agent.untrained=[vae]" in folders["zh__trained_m__random_v"].overrides()
    assert "agent.untrained=[mdn_rnn]" in folders["zh__untrained_m__trained_v"].overrides()


def test_the_cells_of_a_run_on_vectors(ablation, tmp_path):
    """There is no V to leave untrained."""
    folders = {cell.folder: cell.overrides()[-2:] for cell in ablation.CELLS_OF_VECTORS}
    assert folders == {
        "z": ["agent.untrained=[mdn_rnn]", "agent.stages=[controller]"],
        "zh__trained_m": ["agent.untrained=[]", "agent.stages=[controller]"],
        "zh__untrained_m": ["agent.untrained=[mdn_rnn]", "agent.stages=[controller]"],
    }
    for key in ("pixels", "observation"):
        (tmp_path / "policy.json").write_text(json.dumps({"observation": {key: {}}}))
        assert ablation.sees_images(tmp_path) == (key == "pixels")


@pytest.mark.parametrize("override", ["agent.stages=[vae]", "run_dir=here", "++agent.controller.inputs=z", "agent=ppo"])
def test_what_the_cells_differ_in_is_no_override(ablation, monkeypatch, tmp_path, capsys, override):
    with pytest.raises(SystemExit):
        call(ablation, monkeypatch, "--out", str(tmp_path), override)
    assert "is what this program sets" in capsys.readouterr().err


def test_a_source_that_is_no_run(ablation, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call(ablation, monkeypatch, "--out", str(tmp_path), "--source", str(tmp_path))
    assert "no run there" in capsys.readouterr().err


@pytest.mark.slow
def test_from_the_first_run_to_the_table(ablation, monkeypatch, tmp_path, capsys):
    pytest.importorskip("cma")
    chosen = [ablation.CELLS[0], ablation.CELLS[2], ablation.Cell("zh", True, False)]
    monkeypatch.setattr(ablation, "CELLS", chosen)
    out = tmp_path / "out"
    call(ablation, monkeypatch, "--out", str(out), "--episodes", "2", *SMALL)
    trained = ["source", "z__trained_v", "zh__trained_m__random_v"]
    assert [name for program, name in ablation.runs if program == "train.py"] == trained
    rows = json.loads((out / "ablation.json").read_text())["rows"]
    assert [row["M"] for row in rows] == ["trained", "untrained", "trained"]
    assert rows[0]["mean"] == rows[1]["mean"] and rows[0]["run"] == rows[1]["run"] == "z__trained_v"
    frames = 16 * 11 + 2 * (3 + 1) * 5  # 16 episodes, of which a reset counts too; generations of 3 and their mean
    assert [row["frames"] for row in rows] == [frames] * 3
    config = (out / "zh__trained_m__random_v/config.yaml").read_text()
    assert "fitness: real" in config and "latent_size: 3" in config and "task: discrete" in config
    assert "zh__trained_m__random_v" in capsys.readouterr().out

    ablation.runs.clear()
    call(ablation, monkeypatch, "--out", str(out), "--episodes", "2", *SMALL)
    assert ablation.runs == [], "everything is finished"
    call(ablation, monkeypatch, "--out", str(out), "--episodes", "3", *SMALL)
    assert ablation.runs == [("eval.py", name) for name in ("z__trained_v", "zh__trained_m__random_v")]
