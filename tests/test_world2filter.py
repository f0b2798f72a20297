"""Whole runs of the agents that learn from masks: what they log and need to act, and whose mask a frame has."""

import json

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from dreamer.policy import Policy
from envs.backends.mock import MockEnv
from tests.helpers import make_run, set_episode_length

IMAGES = ("env.name=reach", "env.from_pixels=true", "env.image_size=16", "collector.total_frames=48", "train_ratio=1")
PICTURES = {f"segmentation_{name}" for name in ("overlay", "foreground", "mask")}
LAYERS = {f"segmentation_{name}" for name in ("background", "composite")}


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def names(folder):
    return {path.stem.rpartition("_")[0] for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("agent", "scalars", "pictures"),
    [
        ("world2filter", {"wm/fg_loss", "wm/bg_loss", "wm/mask_loss"}, PICTURES | LAYERS),
        ("segmentation_dreamer", {"wm/fg_loss", "wm/mask_loss"}, PICTURES),
    ],
)
def test_a_run_with_the_masks_of_the_simulator(agent, scalars, pictures, tmp_path):
    """It logs what is new besides what every agent logs, and the policy needs neither masks nor a segmenter."""
    media = ("logger.images=true", "logger.video=true", "logger.interval=16", "logger.video_interval=16")
    make_run(tmp_path, f"agent={agent}", *IMAGES, *media).train()
    found = set().union(*metrics(tmp_path))
    assert scalars | {"wm/image_loss", "ac/actor_loss", "segmentation/model_iou"} <= found
    assert pictures | {"train_original", "train_reconstructed"} == names(tmp_path / "images")
    assert "segmentation_comparison" in names(tmp_path / "videos")
    policy = Policy.load(tmp_path)
    assert policy({"pixels": np.zeros((16, 16, 3), np.uint8)}).shape == (1,)


def test_the_masks_of_the_replay_are_those_of_the_frames(tmp_path, monkeypatch):
    """The mock draws one grey level, which ColorGrid replaces but for a row that moves: there one level is left."""

    def moving_row(env, height, width, camera=None, replace_floor=True):
        return (torch.arange(height) == env._t % height)[:, None].expand(height, width)

    monkeypatch.setattr(MockEnv, "foreground_mask", moving_row)
    set_episode_length(monkeypatch, 5)
    grid = ("env/distraction=color_grid_random", "env.name=counter", "collector.init_random_frames=48")
    trainer = make_run(tmp_path, "agent=world2filter", *IMAGES, *grid, "replay_buffer.sequence_length=8")
    trainer.train()
    records = trainer.replay_buffer.sample().exclude("context").flatten(0, 1)
    assert records["done"].any() and records["mask_valid"].all() and records["mask_version"].all()
    for pixels, mask in zip(records["pixels"], records["mask"].squeeze(-1), strict=True):
        assert len(pixels[mask].unique()) == 1 < len(pixels[~mask].unique())


def test_a_label_is_never_read_without_its_mask(tmp_path):
    """Written while a batch is copied, it counts with its mask or not at all."""
    trainer = make_run(tmp_path, "agent=world2filter", *IMAGES, "agent.mask_source=colour", "train_ratio=0.01")
    trainer.train()
    replay = trainer.replay_buffer
    copy, left = replay._get, ["mask"]

    def copy_beside_the_labeller(key, rows, **options):
        copied = copy(key, rows, **options)
        if key in ("mask", "mask_valid") and left:
            left.clear()
            count = int(replay.stream_counts[0])
            values = {"mask": torch.full((count, 16, 16, 1), 255, dtype=torch.uint8)}
            values |= {"mask_valid": torch.ones(count, 1, dtype=torch.bool)}
            for stream in range(replay.num_streams):
                replay.write(torch.full((count,), stream), torch.arange(count), TensorDict(values, [count]))
        return copied

    replay._get = copy_beside_the_labeller
    batch = replay.sample()
    assert not left
    assert not (batch["mask_valid"].squeeze(-1) & (batch["mask"].flatten(2).amax(-1) == 0)).any()
