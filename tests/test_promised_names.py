"""Every metric, picture, video and histogram that is promised is in the files of a real run, under its name."""

import json

import pytest

from tests.helpers import make_run, set_episode_length

SCALARS = {
    *(f"wm/{name}" for name in ("total_loss", "image_loss", "kl_loss", "kl_value", "reward_loss", "continue_loss")),
    *(f"wm/{name}" for name in ("prior_entropy", "posterior_entropy", "wm_grad_norm", "grad_norm")),
    *(f"ac/{name}" for name in ("actor_loss", "pg_loss", "critic_loss", "entropy", "log_prob")),
    *(f"ac/{name}" for name in ("advantage_mean", "advantage_std", "value_mean", "return_mean")),
    *(f"ac/{name}" for name in ("actor_grad_norm", "critic_grad_norm")),
    *(f"episode/{name}" for name in ("return", "length")),
    *(f"eval/{name}" for name in ("return_mean", "return_std", "length_mean")),
    *(f"time/{name}" for name in ("env", "policy", "sample", "update", "log", "other")),
}
IMAGES = {"train_original", "train_reconstructed"}
VIDEOS = {
    *("train_observation_video", "train_reconstruction_video"),
    *("train_imagination_imagined", "train_imagination_comparison"),
}
HISTOGRAMS = {
    f"histograms/{name}" for name in ("prior_entropy", "posterior_entropy", "kl", "action", "reward", "value")
}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run on images in which episodes end, with evaluations and two rounds of media."""
    run_dir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_episode_length(monkeypatch, 20)
        run(run_dir)
    return run_dir


def run(run_dir):
    make_run(
        run_dir,
        "env.name=reach",
        "env.from_pixels=true",
        "env.image_size=16",
        "collector.frames_per_batch=16",
        "collector.total_frames=128",
        "train_ratio=0.5",
        "eval.interval=64",
        "logger.interval=32",
        "logger.images=true",
        "logger.video=true",
        "logger.histograms=true",
        "logger.video_interval=64",
    ).train()


def test_scalars(run_dir):
    lines = read(run_dir / "metrics.jsonl")
    names = set().union(*lines)
    assert not SCALARS - names
    assert all(line.get("wm/grad_norm") == line.get("wm/wm_grad_norm") for line in lines), "two names of one value"
    shares = [sum(value for name, value in line.items() if name.startswith("time/")) for line in lines]
    assert all(share == pytest.approx(1, abs=0.05) for share in shares if share), "the shares are those of all the time"


@pytest.mark.parametrize(("folder", "suffix", "names"), [("images", "png", IMAGES), ("videos", "mp4", VIDEOS)])
def test_media(folder, suffix, names, run_dir):
    files = {path.name for path in (run_dir / folder).iterdir()}
    assert {name.rpartition("_")[0] for name in files} == names
    assert all(name.rpartition("_")[2].removesuffix(f".{suffix}").isdigit() for name in files)
    assert len(files) >= 2 * len(names), "at the start of learning and once more"


def test_histograms(run_dir):
    lines = read(run_dir / "histograms.jsonl")
    assert {line["name"] for line in lines} == HISTOGRAMS
    assert all(len(line["edges"]) == len(line["counts"]) + 1 <= 65 for line in lines)
