"""The program from end to end: small runs on the mock environment, from the command line as a user would."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.helpers import make_run
from tests.programs import ROOT, run_program

SMALL = [
    "env=mock",
    "agent/size=debug",
    "agent.imagination_horizon=3",
    "device=cpu",
    "threads=1",
    "replay_buffer.batch_size=4",
    "replay_buffer.sequence_length=8",
    "collector.init_random_frames=64",
    "collector.total_frames=256",
    "collector.frames_per_batch=32",
    "collector.num_collectors=2",
    "train_ratio=16",
    "logger.interval=64",
    "eval.episodes=2",
]


def train(*overrides: str) -> str:
    """Run the program in a process of its own and return what it printed; the folder is given by run_dir=."""
    command = [sys.executable, "dreamer/train.py", *SMALL, *overrides]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def read_metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_run_folder_is_complete(tmp_path):
    run_dir = tmp_path / "run"
    printed = run_program(
        "dreamer/train.py",
        *SMALL,
        "collector=sync",
        "env.from_pixels=true",
        "env.image_size=16",
        f"run_dir={run_dir}",
        "eval.random_episodes=2",
        "train_ratio=4",
    )
    assert OmegaConf.load(run_dir / "config.yaml").env.render.fast is False
    metrics = read_metrics(run_dir)
    names = {name for line in metrics for name in line}
    assert {"episode/return", "episode/length", "eval/return_mean", "eval/return_std", "eval/length_mean"} <= names
    assert {"wm/image_loss", "wm/kl_loss", "wm/reward_loss", "wm/wm_grad_norm", "ac/actor_loss", "ac/entropy"} <= names
    assert all(value is not None for line in metrics for value in line.values()), "NaN in the metrics"
    assert [line["frames"] for line in metrics] == sorted(line["frames"] for line in metrics)
    # 4 replayed steps per step and 32 steps per update: an eighth of an update per step after the random ones
    assert metrics[-2]["trainer/updates"] == pytest.approx((256 - 64) / 8, abs=5)
    assert list((run_dir / "videos").glob("*.mp4")) and list((run_dir / "tensorboard").glob("events*"))
    assert (run_dir / "checkpoints" / f"frames_{metrics[-1]['frames']}" / "manifest.json").exists()
    assert (run_dir / "checkpoints" / "best").is_dir() and (run_dir / "policy.json").exists()
    assert "dreamer_v3" in (run_dir / "report.html").read_text()
    assert len(json.loads((run_dir / "run.json").read_text())["starts"]) == 1
    assert "random actions" in printed and "left" in printed
    assert str(run_dir) in printed


def test_a_run_records_its_video(tmp_path):
    make_run(tmp_path, "env.from_pixels=true", "env/distraction=natural_video").collector.shutdown()
    facts = json.loads((tmp_path / "environment.json").read_text())
    assert facts["NaturalVideo"]["split"] == "train", facts


@pytest.fixture
def no_report(monkeypatch):
    """Runs without their report, which takes as long as many of their updates."""
    monkeypatch.setattr("dreamer.report.try_report", lambda *_, **__: None)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["multi_sync", "multi_async"])
@pytest.mark.usefixtures("no_report")
def test_workers(mode, tmp_path):
    settings = (f"collector={mode}", "collector.envs_per_collector=2", "train_ratio=8", "logger.backends=[]")
    run_program("dreamer/train.py", *SMALL, *settings, f"run_dir={tmp_path / 'run'}")
    metrics = read_metrics(tmp_path / "run")
    lines = [line for line in metrics if "trainer/updates" in line]
    assert lines[-1]["frames"] >= 256 and lines[-1]["trainer/updates"] > 25
    assert lines[0]["collector/workers_alive"] == 2


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_learns(tmp_path):
    """The tiny task is learned: better than random by a wide margin, in a minute or two."""
    run_program(
        "dreamer/train.py",
        *SMALL,
        "collector=sync",
        "env.task=discrete",
        "collector.total_frames=520",
        "train_ratio=64",
        "optimization.lr=4e-3",
        "optimization.warmup_steps=20",
        "eval.episodes=8",
        "eval.random_episodes=8",
        "logger.interval=500",
        f"run_dir={tmp_path / 'run'}",
    )
    last = read_metrics(tmp_path / "run")[-1]
    assert last["eval/return_mean"] > 1.2 * last["eval/random_return_mean"], last


@pytest.mark.slow
def test_memory_does_not_grow(tmp_path):
    """Over 6,000 steps after the replay is full, the learner's memory stays where it is."""
    overrides = ["collector=sync", "collector.total_frames=9_000", "replay_buffer.size=2_000", "train_ratio=0.5"]
    overrides += ["collector.envs_per_collector=8", "collector.frames_per_batch=256", "logger.video=false"]
    train(*overrides, "logger.interval=500", "eval.interval=0", f"run_dir={tmp_path / 'run'}")
    lines = [line for line in read_metrics(tmp_path / "run") if "trainer/memory_gb" in line]
    memory = [line["trainer/memory_gb"] for line in lines if line["frames"] > 3_000]
    assert len(memory) > 10
    first, last = sum(memory[:5]) / 5, sum(memory[-5:]) / 5
    assert last - first < 0.02, f"{first:.3f} GB to {last:.3f} GB"
