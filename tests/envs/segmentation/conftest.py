"""Small checkpoints of SAM 3 that tests share."""

import pytest
import torch

from scripts.make_tiny_sam3 import COLOURS, draw_shapes, make_config, make_model, save_model, train_model


@pytest.fixture(scope="session")
def random_model():
    """A small detector with random weights: good for shapes, sizes and files, not for meaning."""
    return make_model(make_config())


@pytest.fixture(scope="session")
def random_folder(random_model, tmp_path_factory):
    return save_model(random_model, tmp_path_factory.mktemp("sam3") / "image")


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory):
    """A small checkpoint that knows four colours; takes a dozen seconds to train."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = make_model(make_config(32, 4, 16, 2))
    train_model(model, tuple(COLOURS), draw_shapes, steps=240, rate=6e-3)
    torch.set_num_threads(threads)
    return save_model(model, tmp_path_factory.mktemp("sam3") / "trained", "video")
