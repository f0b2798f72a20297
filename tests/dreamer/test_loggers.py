"""Metrics and videos: what is written, and that no logger ever stops a run."""

import json
import math

import av
import numpy as np
import pytest
import torch

from dreamer.loggers import Meter, RunLogger, console_line, duration, write_video


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_jsonl_is_complete_at_every_moment(tmp_path):
    logger = RunLogger(tmp_path, backends=[])
    logger.log({"wm/total_loss": 1.5, "ac/entropy": math.nan}, frames=100)
    (line,) = lines(tmp_path)  # before close: nothing is held back
    assert line["frames"] == 100 and line["wm/total_loss"] == 1.5 and line["seconds"] >= 0
    assert line["ac/entropy"] is None, "NaN is no JSON"
    logger.log({"wm/total_loss": 1.0}, frames=200)
    logger.close()
    assert [line["frames"] for line in lines(tmp_path)] == [100, 200]


def test_tensorboard_holds_the_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = RunLogger(tmp_path, backends=["tensorboard"])
    logger.log({"wm/total_loss": 1.5}, frames=100)
    logger.log_video("train/imagination/comparison", torch.zeros(3, 16, 16, 3, dtype=torch.uint8), 100)
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("wm/total_loss")] == [(100, 1.5)]
    assert "train/imagination/comparison" in events.Tags()["images"]


@pytest.mark.slow
def test_wandb_works_offline_without_a_key(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = RunLogger(tmp_path, backends=["wandb"], offline=True)
    assert "wandb" in logger.loggers
    logger.log({"wm/total_loss": 1.5}, frames=100)
    path = logger.log_video("train/imagination/comparison", torch.zeros(3, 16, 16, 3, dtype=torch.uint8), 100)
    logger.close()
    assert list(tmp_path.rglob("*.wandb")) and path.exists()
    assert "wandb" in logger.loggers, "it was not dropped"


def test_broken_logger_is_dropped_and_the_rest_goes_on(tmp_path, monkeypatch):
    logger = RunLogger(tmp_path, backends=["tensorboard"])

    def fail(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(logger.loggers["tensorboard"], "log_metrics", fail)
    with pytest.warns(UserWarning, match="tensorboard is switched off.*no network"):
        logger.log({"wm/total_loss": 1.0}, frames=1)
    logger.log({"wm/total_loss": 2.0}, frames=2)  # no second warning
    assert [line["wm/total_loss"] for line in lines(tmp_path)] == [1.0, 2.0]


def test_logger_that_cannot_start_is_dropped(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ImportError("not installed")

    monkeypatch.setattr(RunLogger, "_make", fail)
    with pytest.warns(UserWarning, match="wandb is switched off.*not installed"):
        logger = RunLogger(tmp_path, backends=["wandb"])
    logger.log({"wm/total_loss": 1.0}, frames=1)
    assert len(lines(tmp_path)) == 1


def test_unknown_backend_names_the_choices(tmp_path):
    with pytest.raises(ValueError, match=r"mlflow.*tensorboard"):
        RunLogger(tmp_path, backends=["mlflow"])


@pytest.mark.parametrize("size", [(64, 192), (33, 47)])
def test_video_shows_the_frames(size, tmp_path):
    frames = torch.zeros(5, *size, 3, dtype=torch.uint8)
    for t in range(5):
        frames[t] = 40 * t + 20
    write_video(tmp_path / "video.mp4", frames, fps=15)
    with av.open(str(tmp_path / "video.mp4")) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 15
    assert len(decoded) == 5 and decoded[0].shape[0] in (size[0], size[0] + 1)
    for t, image in enumerate(decoded):
        assert abs(image.astype(float).mean() - (40 * t + 20)) < 4


def test_video_refuses_floats(tmp_path):
    with pytest.raises(ValueError, match=r"uint8 \[T, h, w, 3\].*float32"):
        write_video(tmp_path / "video.mp4", torch.zeros(2, 8, 8, 3), fps=15)


def make_meter(**settings):
    return Meter(
        **{"interval": 100, "seconds": 1e9, "total_frames": 1000, "train_ratio": 8, "frames_per_update": 32} | settings
    )


def test_meter_averages_and_forgets():
    meter = make_meter()
    for value in (1.0, 2.0, 6.0):
        meter.add({"loss": torch.tensor(value), "plain": value})
    metrics = meter.read(frames=100, updates=3)
    assert metrics["loss"] == 3.0 and metrics["plain"] == 3.0 and metrics["trainer/updates"] == 3
    assert "loss" not in meter.read(frames=200, updates=3)
    assert not meter.sums, "nothing is kept"


def test_meter_is_due_by_frames_or_seconds():
    meter = make_meter()
    assert not meter.due(99) and meter.due(100)
    assert make_meter(seconds=0).due(0)


def test_time_left_follows_updates_when_they_lag(monkeypatch):
    """1000 frames, ratio 8, 32 replayed frames per update: 250 updates. Ten in ten seconds leave 240 seconds."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    meter = make_meter()
    now[0] = 10.0
    metrics = meter.read(frames=500, updates=10)
    assert metrics["trainer/eta_seconds"] == pytest.approx(240)
    assert metrics["trainer/updates_per_second"] == pytest.approx(1)
    assert metrics["collector/fps"] == pytest.approx(50)
    assert metrics["trainer/train_ratio"] == pytest.approx(10 * 32 / 500)


def test_time_left_is_unknown_before_learning():
    metrics = make_meter().read(frames=100, updates=0)
    assert "trainer/eta_seconds" not in metrics
    assert "left ?" in console_line(metrics, 100, 1000)


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "?"), (0, "0s"), (59, "59s"), (61, "1m 1s"), (7300, "2h 1m"), (200_000, "2d 7h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_console_line_shows_what_a_person_wants():
    metrics = make_meter().read(frames=100, updates=10) | {"episode/return": 123.4}
    line = console_line(metrics, 100, 1000)
    assert all(part in line for part in ("frames 100/1,000", "fps", "updates 10", "ratio", "return 123.4", "left"))
    assert np.isfinite(metrics["trainer/eta_seconds"])
