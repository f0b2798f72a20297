"""Whole runs of the agents that learn from masks: what they log, what they need to act, and that they resume."""

import json

import numpy as np
import pytest

from dreamer.policy import Policy
from tests.helpers import make_run

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


def test_the_masks_of_the_replay_are_those_of_the_frames(tmp_path):
    """The mock draws one grey level, which ColorGrid replaces but for the foreground: there only one level is left."""
    grid = ("env/distraction=color_grid_random", "env.name=counter", "collector.init_random_frames=48")
    trainer = make_run(tmp_path, "agent=world2filter", *IMAGES, *grid)
    trainer.train()
    records = trainer.replay_buffer.sample().exclude("context").flatten(0, 1)
    assert records["mask_valid"].all() and records["mask_version"].all()
    for pixels, mask in zip(records["pixels"], records["mask"].squeeze(-1), strict=True):
        assert len(pixels[mask].unique()) == 1 < len(pixels[~mask].unique())
