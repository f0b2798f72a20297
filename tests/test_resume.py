"""Bit-exact resume: a run that was interrupted ends as one that was not."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamer.trainer import Trainer
from tests.helpers import make_run, optimiser_state, snapshot, stop_at_update

PIXELS = ("env.from_pixels=true", "env.image_size=16", "logger.images=false", "logger.histograms=false")
RUNS = {"continuous": ()}
SLOW = {
    "background": (*PIXELS, "env/distraction=color_grid_random"),
    "discrete": ("env.task=discrete",),
    "terminating": ("env.task=terminating", "collector.envs_per_collector=3", "collector.frames_per_batch=12"),
    "cheetah": (
        "env=dmc",
        "env.name=cheetah",
        "env.from_pixels=false",
        "collector.total_frames=192",
        "collector.frames_per_batch=16",
    ),
    "student": (*PIXELS, "agent=world2filter", "agent.mask_source=student", "agent.segmentation.teacher=ground_truth"),
    "video": (*PIXELS, "env/distraction=natural_video"),
    "gym": ("env=gym", "env.name=CartPole-v1", "env.from_pixels=false"),
}


def fingerprint(trainer: Trainer, folder: Path) -> dict[str, str]:
    """sha256 of all weights, targets, statistics, the optimiser and the records."""
    trainer.replay_buffer.dump(folder)
    tensors = snapshot(trainer.loss_module) | optimiser_state(trainer)
    digests = {name: hashlib.sha256(bytes_of(value)).hexdigest() for name, value in tensors.items()}
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    return digests | files | {"frames": str(trainer.collected_frames), "updates": str(trainer.update_count)}


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def finish(trainer: Trainer) -> Trainer:
    trainer.train()
    trainer.logger.close()
    return trainer


@pytest.mark.parametrize("name", [*RUNS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_interrupted_twice_ends_the_same(name, tmp_path):
    """Stopped in the middle of an episode and of the updates of a batch, and again before the first update."""
    overrides = (RUNS | SLOW)[name]
    whole = make_run(tmp_path / "whole", *overrides)
    whole.train()
    assert whole.update_count > 12

    first = make_run(tmp_path / "parts", *overrides)
    stop_at_update(first, 6)
    first.train()
    assert first.update_count == 6 and first.pending_updates > 0
    second = make_run(tmp_path / "parts", *overrides, "resume=auto")
    assert (second.update_count, second.pending_updates) == (6, first.pending_updates)
    assert second._modules["CollectorState"].restored
    stop_at_update(second, 11)
    second.train()
    assert second.update_count == 11
    third = make_run(tmp_path / "parts", *overrides, "resume=auto")
    third.train()
    expected, actual = fingerprint(whole, tmp_path / "a"), fingerprint(third, tmp_path / "b")
    assert [key for key in expected if expected[key] != actual.get(key)] == []
    assert expected.keys() == actual.keys()


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_made_longer_with_another_setting(tmp_path):
    """A finished run goes on; its learning rate is the new one, its curve has no gap and nothing twice."""
    finish(make_run(tmp_path, "logger.interval=8"))
    overrides = ("logger.interval=8", "resume=auto", "collector.total_frames=160", "optimization.lr=5e-3")
    longer = make_run(tmp_path, *overrides)
    assert longer.optimization_stepper.optimizer.param_groups[0]["lr"] == 5e-3
    finish(longer)
    assert longer.collected_frames >= 160
    frames = [line["frames"] for line in read_lines(tmp_path / "metrics.jsonl") if "trainer/updates" in line]
    assert frames == sorted(frames) and frames[-1] >= 160
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "best",
        f"frames_{frames[-1]}",
        "frames_96",
    ]
    assert [line["kind"] for line in read_lines(tmp_path / "incidents.jsonl")] == ["resume"]


@pytest.mark.slow
def test_without_the_records(tmp_path):
    """Frames go on, the replay is filled anew, and no updates are owed for what is gone."""
    whole = finish(make_run(tmp_path, "checkpoint.replay=false"))
    resumed = make_run(tmp_path, "checkpoint.replay=false", "resume=auto", "collector.total_frames=160")
    assert (resumed.collected_frames, resumed.replay_buffer.write_count) == (96, 0)
    assert resumed._modules["CollectorState"].restored
    finish(resumed)
    assert resumed.collected_frames == 96 + resumed.replay_buffer.write_count >= 160
    assert 5 < resumed.update_count - whole.update_count < 20


@pytest.mark.slow
def test_a_branch_has_the_curve_so_far(tmp_path):
    finish(make_run(tmp_path / "run", "logger.interval=8"))
    checkpoint = tmp_path / "run" / "checkpoints" / "frames_96"
    branch = make_run(tmp_path / "branch", f"resume={checkpoint}", "collector.total_frames=112", "logger.interval=8")
    finish(branch)
    before, after = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("run", "branch"))
    common = [line for line in before if line in after]
    assert len(common) >= 8 and after[-1]["frames"] >= 112
    assert before[-1]["frames"] == 96, "the run itself is not touched"


def test_a_start_that_left_no_checkpoint_is_taken_back(tmp_path):
    first = make_run(tmp_path, "logger.interval=8")
    first.log_now({"lost": 1.0})
    first.collector.shutdown()
    first.logger.close()
    finish(make_run(tmp_path, "resume=auto", "logger.interval=8"))
    assert not [line for line in read_lines(tmp_path / "metrics.jsonl") if "lost" in line]
    assert [line["lost"] for line in read_lines(tmp_path / "metrics_lost.jsonl")] == [1.0]


@pytest.mark.slow
def test_other_environments_begin_new_episodes(tmp_path):
    """What the records hold of the old ones ends there, so that no return runs over the seam."""
    first = make_run(tmp_path, "collector.total_frames=96")
    stop_at_update(first, 6)
    finish(first)
    changed = make_run(tmp_path, "resume=auto", "env.name=counter", "env.image_size=32")
    assert not changed._modules["CollectorState"].restored
    replay = changed.replay_buffer
    rows = replay._rows(np.arange(2), replay.stream_counts - 1)
    assert replay._get("done", rows).all() and not replay._get("terminated", rows).any()
    finish(changed)
    assert changed.collected_frames == 96


def test_an_override_that_does_not_fit_the_weights(tmp_path):
    finish(make_run(tmp_path))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"frames": 97, "seconds": 9.0}\n')  # as a killed run leaves it, after its checkpoint
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"agent\.size\.units: 16 -> 8: does not fit"):
        make_run(tmp_path, "resume=auto", "agent.size.units=8")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
