"""Metrics, media and incidents: what is written, what a resume keeps, and that no logger ever stops a run."""

import json
import math
import os
import resource
import warnings
from contextlib import contextmanager

import av
import numpy as np
import psutil
import pytest
import torch

from dreamer.json_lines import WAITING_LINES, JsonLines
from dreamer.loggers import RunLogger, encode_image, has_wandb_key, write_video

BLACK = torch.zeros(3, 16, 16, 3, dtype=torch.uint8)


def lines(run_dir, name="metrics"):
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]


def read_events(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return events


@pytest.fixture
def event_files(monkeypatch):
    """Count the files of TensorBoard from nought: it reads them by name, 10 before 9 within one second."""
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


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
    logger = RunLogger(tmp_path, backends=["tensorboard"])
    logger.log({"wm/total_loss": 1.5}, frames=100)
    logger.log_video("train/imagination/comparison", BLACK, 100)
    logger.log_image("train/original", BLACK[0], 100)
    logger.log_histogram("histograms/reward", torch.tensor([0.0, 1.0, 1.0]), 100)
    logger.close()
    events = read_events(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("wm/total_loss")] == [(100, 1.5)]
    assert {"train/imagination/comparison", "train/original"} <= set(events.Tags()["images"])
    (histogram,) = events.Histograms("histograms/reward")
    assert histogram.step == 100 and histogram.histogram_value.num == 3


def test_steps_go_on_while_frames_stand_still(tmp_path, event_files):
    logger = RunLogger(tmp_path, backends=["tensorboard"])
    for step in (100, 101, 102, 103):
        logger.log({"vae/loss": float(step)}, 100, step)
        logger.log_image("vae/frames", BLACK[0], 100, step)
        if step == 102:
            state = json.loads(json.dumps(logger.state_dict()))
    logger.close()
    assert [("step" in line, line["frames"]) for line in lines(tmp_path)] == [(False, 100), *[(True, 100)] * 3]
    assert len(list((tmp_path / "images").iterdir())) == 4
    logger = RunLogger(tmp_path, backends=["tensorboard"])
    logger.load_state_dict(state)
    logger.rewind()
    logger.log({"vae/loss": 0.0}, 100, 104)
    logger.close()
    events = read_events(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("vae/loss")] == [(100, 100), (101, 101), (102, 102), (104, 0)]
    assert [e.step for e in events.Images("vae/frames")] == [100, 101, 102]
    assert [line.get("step") for line in lines(tmp_path)] == [None, 101, 102, 104]


def test_broken_logger_is_dropped_and_the_rest_goes_on(tmp_path, monkeypatch):
    logger = RunLogger(tmp_path, backends=["tensorboard"])
    logger.log({"wm/total_loss": 0.0}, frames=0)

    def fail(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(logger.loggers["tensorboard"], "log_metrics", fail)
    with pytest.warns(UserWarning, match="tensorboard is switched off.*no network"):
        logger.log({"wm/total_loss": 1.0}, frames=1)
    logger.log({"wm/total_loss": 2.0}, frames=2)  # no second warning
    assert [line["wm/total_loss"] for line in lines(tmp_path)] == [0.0, 1.0, 2.0]
    (incident,) = lines(tmp_path, "incidents")
    assert incident["kind"] == "logger" and incident["frames"] == 1 and "no network" in incident["message"]


def test_logger_that_cannot_start_is_dropped(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ImportError("not installed")

    monkeypatch.setattr(RunLogger, "_make", fail)
    logger = RunLogger(tmp_path, backends=["tensorboard", "wandb"])
    with pytest.warns(UserWarning, match="is switched off.*not installed") as caught:
        logger.log({"wm/total_loss": 1.0}, frames=1)
    assert len(caught) == 2, "one for each"
    logger.log({"wm/total_loss": 1.0}, frames=2)
    assert len(lines(tmp_path)) == 2 and len(lines(tmp_path, "incidents")) == 2


def test_nobody_is_asked_for_a_key(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_wandb_key()
    with pytest.warns(UserWarning, match="wandb is switched off.*no key.*wandb login"):
        RunLogger(tmp_path, backends=["wandb"], offline=False).log({}, frames=0)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "x" * 40)
    assert has_wandb_key()
    monkeypatch.setenv("NETRC", str(tmp_path / "nothing"))
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert has_wandb_key()


@pytest.mark.slow
def test_wandb_offline_goes_on_under_one_id_and_opens_no_port(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids, state = [], None
    for part in range(2):
        logger = RunLogger(tmp_path, backends=["wandb", "tensorboard"], offline=True)
        if state is not None:
            logger.load_state_dict(state)
            logger.rewind()
        logger.log({"wm/total_loss": 1.5}, frames=100 * part)
        logger.log_video("train/imagination/comparison", BLACK, 100 * part)
        logger.log_image("train/original", BLACK[0], 100 * part)
        logger.log_histogram("histograms/reward", torch.arange(5.0), 100 * part)
        assert set(logger.loggers) == {"wandb", "tensorboard"}, "none was dropped"
        assert not public_ports()
        state = logger.state_dict()
        ids.append(state["wandb_id"])
        logger.close()
        assert set(logger.loggers) == {"wandb", "tensorboard"}, "none was dropped at the end"
    assert ids[0] and ids[0] == ids[1]
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert folders and all(folder.name.endswith(ids[0]) for folder in folders)
    assert not (tmp_path / "incidents.jsonl").exists()


def public_ports() -> list:
    """Sockets of this process and its children at which others can knock."""
    own = psutil.Process()
    connections = [c for process in (own, *own.children(recursive=True)) for c in process.net_connections("inet")]
    return [c for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.ip not in ("127.0.0.1", "::1")]


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


def test_failed_encoding_leaves_no_file(tmp_path):
    (tmp_path / "folder").write_text("in the way")
    with pytest.raises(NotADirectoryError):
        write_video(tmp_path / "folder" / "video.mp4", BLACK, fps=15)
    write_video(tmp_path / "video.mp4", BLACK, fps=15)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "video.mp4"]


@pytest.mark.parametrize("size", [(64, 192), (33, 47)])
def test_picture_is_exact(size, tmp_path):
    image = torch.randint(256, (*size, 3), dtype=torch.uint8)
    RunLogger(tmp_path, backends=[]).log_image("train/original", image, 1200)
    with av.open(str(tmp_path / "images" / "train_original_000001200.png")) as container:
        (decoded,) = (frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
    assert np.array_equal(decoded, image.numpy())


def test_picture_refuses_videos():
    with pytest.raises(ValueError, match=r"uint8 \[h, w, 3\].*\(3, 16, 16, 3\)"):
        encode_image(BLACK)


class TestHistograms:
    def test_counts(self, tmp_path):
        logger = RunLogger(tmp_path, backends=[])
        values = torch.cat([torch.zeros(900), torch.ones(100), torch.tensor([math.nan, math.inf])])
        logger.log_histogram("histograms/reward", values, 100)
        (line,) = lines(tmp_path, "histograms")
        assert (line["frames"], line["name"]) == (100, "histograms/reward")
        assert len(line["counts"]) == 64 and len(line["edges"]) == 65
        assert line["counts"][0] == 900 and line["counts"][-1] == 100 and sum(line["counts"]) == 1000
        assert line["edges"][0] == 0 and line["edges"][-1] == 1

    @pytest.mark.parametrize("values", [[2.0], [3e38, -3e38], [1.0] * 100])
    def test_few_equal_and_huge_values(self, values, tmp_path):
        RunLogger(tmp_path, backends=[]).log_histogram("a", torch.tensor(values), 1)
        (line,) = lines(tmp_path, "histograms")
        assert sum(line["counts"]) == len(values) and np.isfinite(line["edges"]).all()

    def test_nothing_to_count(self, tmp_path):
        RunLogger(tmp_path, backends=[]).log_histogram("a", torch.tensor([math.nan]), 1)
        assert not (tmp_path / "histograms.jsonl").exists()


def test_incident_is_written_and_said(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "abcdef123456")
    said = []
    logger = RunLogger(tmp_path, backends=[], say=said.append)
    logger.incident("nonfinite_update", "lost abcdef123456", frames=1200, loss=math.nan, where=[torch.tensor(1)])
    (line,) = lines(tmp_path, "incidents")
    assert line["time"] and line["frames"] == 1200 and line["kind"] == "nonfinite_update"
    assert line["loss"] is None and "tensor" in line["where"][0] and "abcdef" not in json.dumps(line)
    assert said == ["incident at 1,200 frames: lost abcdef123456"]


class TestResume:
    def interrupted(self, run_dir, backends=()):
        """The state at frame 200 of a run that was killed after frame 300, in the middle of a line."""
        logger = RunLogger(run_dir, backends=backends)
        for frames in (100, 200, 300):
            logger.log({"a": float(frames)}, frames)
            logger.log_histogram("b", torch.arange(3.0), frames)
            if frames == 200:
                state = json.loads(json.dumps(logger.state_dict()))
        logger.incident("signal", "killed", frames=300)
        logger.close()
        with open(run_dir / "metrics.jsonl", "a") as file:
            file.write('{"frames": 400, "a"')
        return state

    def test_lines_after_the_checkpoint_are_taken_back(self, tmp_path):
        state = self.interrupted(tmp_path)
        logger = RunLogger(tmp_path, backends=[])
        logger.load_state_dict(state)
        logger.rewind()
        logger.log({"a": 301.0}, 300)
        assert [line["a"] for line in lines(tmp_path)] == [100.0, 200.0, 301.0]
        assert [line["a"] for line in lines(tmp_path, "metrics_lost")] == [300.0]
        assert [line["frames"] for line in lines(tmp_path, "histograms")] == [100, 200]
        assert len(lines(tmp_path, "incidents")) == 1, "they happened"

    def test_twice(self, tmp_path):
        """A second interruption before the next checkpoint takes the new lines back as well."""
        state = self.interrupted(tmp_path)
        for _ in range(2):
            logger = RunLogger(tmp_path, backends=[])
            logger.load_state_dict(state)
            logger.rewind()
            logger.log({"a": 301.0}, 300)
        assert [line["a"] for line in lines(tmp_path)] == [100.0, 200.0, 301.0]
        assert [line["a"] for line in lines(tmp_path, "metrics_lost")] == [300.0, 301.0]

    def test_a_torn_line_is_removed_without_a_resume_too(self, tmp_path):
        self.interrupted(tmp_path)
        RunLogger(tmp_path, backends=[]).log({"a": 0.0}, 400)
        assert [line["frames"] for line in lines(tmp_path)] == [100, 200, 300, 400]

    def test_a_file_that_lost_its_end(self, tmp_path):
        """After a power cut the file may be shorter than it was when the checkpoint was written."""
        state = self.interrupted(tmp_path)
        os.truncate(tmp_path / "metrics.jsonl", state["metrics_bytes"] - 5)
        logger = RunLogger(tmp_path, backends=[])
        logger.load_state_dict(state)
        logger.rewind()
        logger.log({"a": 1.0}, 300)
        assert [line["frames"] for line in lines(tmp_path)] == [100, 300]
        assert not (tmp_path / "metrics_lost.jsonl").exists()

    def test_in_a_new_folder(self, tmp_path):
        (tmp_path / "old").mkdir()
        (tmp_path / "new").mkdir()
        state = self.interrupted(tmp_path / "old") | {"wandb_id": "abc"}
        logger = RunLogger(tmp_path / "new", backends=[])
        logger.load_state_dict(state)
        logger.rewind()
        assert not logger.wandb_id, "it is another run"
        logger.log({"a": 1.0}, 300)
        assert len(lines(tmp_path / "new")) == 1
        same = RunLogger(tmp_path / "old", backends=[])
        same.load_state_dict(state)
        same.rewind()
        assert same.wandb_id == "abc"

    def test_seconds_go_on(self, tmp_path, monkeypatch):
        now = [1000.0]
        monkeypatch.setattr("time.monotonic", lambda: now[0])
        logger = RunLogger(tmp_path, backends=[])
        now[0] = 1060.0
        logger.log({}, 100)
        state = logger.state_dict()
        now[0] = 5.0  # another machine
        logger = RunLogger(tmp_path, backends=[])
        logger.load_state_dict(state)
        logger.rewind()
        now[0] = 15.0
        logger.log({}, 200)
        assert [line["seconds"] for line in lines(tmp_path)] == [60.0, 70.0]

    def test_tensorboard_has_one_curve(self, tmp_path, event_files):
        state = self.interrupted(tmp_path, ["tensorboard"])
        logger = RunLogger(tmp_path, backends=["tensorboard"])
        logger.load_state_dict(state)
        logger.rewind()
        for frames in (250, 300, 350):
            logger.log({"a": frames + 1.0}, frames)
        logger.close()
        curve = [(event.step, event.value) for event in read_events(tmp_path).Scalars("a")]
        assert curve == [(100, 100.0), (200, 200.0), (250, 251.0), (300, 301.0), (350, 351.0)]


@contextmanager
def full_disk(size):
    """No file can grow beyond ``size`` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class TestFullDisk:
    def test_lines_wait_until_there_is_room(self, tmp_path):
        logger = RunLogger(tmp_path, backends=[])
        with warnings.catch_warnings(record=True) as caught, full_disk(150):
            warnings.simplefilter("always")
            for frames in range(20):
                logger.log({"a": 1.0}, frames)
            logger.log_image("b", torch.randint(256, (64, 64, 3), dtype=torch.uint8), 20)
        messages = [str(warning.message) for warning in caught]
        assert sum("metrics.jsonl cannot be written" in message for message in messages) == 1
        assert sum("b_000000020.png cannot be written" in message for message in messages) == 1
        assert not list((tmp_path / "images").iterdir()), "no half picture"
        written = lines(tmp_path)  # whole lines
        assert 0 < len(written) < 20
        with pytest.warns(UserWarning, match="metrics.jsonl goes on; 0 lines were dropped"):
            logger.log({"a": 1.0}, 20)
        assert [line["frames"] for line in lines(tmp_path)] == list(range(21))
        kinds = [line["kind"] for line in lines(tmp_path, "incidents")]
        assert kinds == ["disk"] * 3

    def test_memory_is_bounded(self, tmp_path):
        said = []
        file = JsonLines(tmp_path / "a.jsonl", said.append)
        with full_disk(0):
            for i in range(WAITING_LINES + 10):
                file.write({"i": i})
        file.write({"i": -1})
        found = [line["i"] for line in lines(tmp_path, "a")]
        assert found == [*range(11, WAITING_LINES + 10), -1]
        assert len(said) == 2 and "goes on; 11 lines were dropped" in said[1]
