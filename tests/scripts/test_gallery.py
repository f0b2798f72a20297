"""The picture of the distractions."""

import argparse

import numpy as np
import pytest
from matplotlib import pyplot as plt

from scripts import gallery


def test_choices_are_in_order_and_without_repeats():
    choices = gallery.list_choices()
    assert choices[0] == "none"
    assert {"natural_video", "distracting_cs_easy", "noisy_sensor", "camera_jitter"} < set(choices)
    assert not [name for name in choices if name.startswith("psp_") or name.endswith("_test")]
    levels = [name.startswith("color_grid_") for name in choices]
    assert sum(levels) >= 6 and all(levels[1 : 1 + sum(levels)])


def test_options_are_those_of_the_configuration():
    assert gallery.load_options("none") == {"name": "none"}
    assert gallery.load_options("color_grid_max")["level"] == "max"


@pytest.fixture
def arguments(tmp_path):
    return argparse.Namespace(
        choices=["none"], steps=[0, 2], image_size=8, seed=0, out=tmp_path / "new" / "picture.png"
    )


def test_a_choice_that_does_not_exist_for_a_task(arguments):
    assert "NoisySensor" in gallery.make_cell("cartpole", "swingup", "noisy_sensor", arguments)


@pytest.mark.slow
def test_the_picture_shows_the_frames_pixel_by_pixel(arguments):
    gallery.draw_gallery(arguments)
    picture = (plt.imread(arguments.out)[..., :3] * 255).round().astype(int)  # [h, w, 3]
    left = gallery.LABEL
    expected = gallery.make_cell("cheetah", "run", "none", arguments)
    assert expected.shape == (8, 20, 3) and (expected[:, 8:10] == 255).all()
    shown = picture[gallery.TITLE : gallery.TITLE + 8, left : left + 20]
    assert np.abs(shown - expected.astype(int)).mean() <= 2  # 256 colours for the whole picture
