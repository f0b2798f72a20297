"""What SAM 3 sees of a frame, and what is made of its output, by hand."""

from types import SimpleNamespace

import pytest
import torch

from envs.segmentation.sam3_images import compute_mask, compute_pixel_values, compute_presence, resize_masks


def logit(*scores):
    return torch.tensor(scores).logit()


def make_output(presence=0.8, scores=(0.9, 0.5), masks=(0.7, 0.2)):
    """An output for one image of 1 x 2 pixels: the first query marks the left one, the second the right one."""
    first, second = masks
    return SimpleNamespace(
        presence_logits=logit(presence)[None],
        pred_logits=logit(*scores)[None],
        pred_masks=torch.stack([logit(first, 0.1), logit(0.1, second)])[None, :, None],  # [1, Q, 1, 2]
        semantic_seg=logit(0.6, 0.3)[None, None, None],  # [1, 1, 1, 2]
    )


def test_pixel_values_by_hand():
    """Halved: each output pixel is the weighted mean of four input pixels per axis, 1 : 3 : 3 : 1, rounded to grey."""
    row = torch.tensor([0, 80, 160, 255, 10, 20, 30, 40], dtype=torch.uint8)
    frames = row[None, None, :, None].expand(1, 8, 8, 3)
    values = compute_pixel_values(frames, 4)
    inner = round((1 * 80 + 3 * 160 + 3 * 255 + 1 * 10) / 8)
    edge = round((3 * 0 + 3 * 80 + 1 * 160) / 7)
    assert values.shape == (1, 3, 4, 4)
    assert values[0, 0, 1, 1] == pytest.approx(inner / 127.5 - 1, abs=1e-6)
    assert values[0, 2, 3, 0] == pytest.approx(edge / 127.5 - 1, abs=1e-6)


def test_pixel_values_keep_channels_and_stretch():
    frames = torch.zeros(1, 2, 3, 3, dtype=torch.uint8)
    frames[..., 1] = 255
    values = compute_pixel_values(frames, 6)
    assert torch.equal(values[0, :, 0, 0], torch.tensor([-1.0, 1.0, -1.0]))
    assert values.shape[2:] == (6, 6)


def test_instances_are_kept_by_score_times_presence():
    """Scores 0.72 and 0.4: above 0.5 only the first is kept, above 0.3 both, above 0.75 none."""
    output = make_output()
    assert compute_presence(output).tolist() == pytest.approx([0.8])
    assert compute_mask(output, "instance", 0.5).flatten().tolist() == pytest.approx([0.7, 0.1])
    assert compute_mask(output, "instance", 0.3).flatten().tolist() == pytest.approx([0.7, 0.2])
    assert compute_mask(output, "instance", 0.75).flatten().tolist() == [0, 0]


@pytest.mark.parametrize("mode", ["instance", "semantic"])
def test_absent_concept_is_empty(mode):
    assert compute_mask(make_output(presence=0.2), mode, 0.5).flatten().tolist() == [0, 0]


def test_dense_head():
    assert compute_mask(make_output(), "semantic", 0.5).flatten().tolist() == pytest.approx([0.6, 0.3])


def test_masks_at_the_size_of_the_frame():
    masks = torch.tensor([[[[1.0, 0.0]], [[0.5, 0.5]]]])  # [1, 2, 1, 2]
    resized = resize_masks(masks, 2, 4)
    assert resized.shape == (1, 2, 4, 2)
    assert resized[0, 0, :, 0].tolist() == [255, 191, 64, 0]
    assert (resized[..., 1] == 128).all()


def test_smaller_masks_are_means_of_all_their_pixels():
    """Halved: the weights per axis are 3 : 3 : 1 at the edge; twice, for rows and columns."""
    masks = torch.zeros(1, 1, 4, 4)
    masks[..., 0] = masks[..., 2] = 1
    resized = resize_masks(masks, 2, 2)
    assert resized[0, :, :, 0].tolist() == [[round(255 * 4 / 7), round(255 * 3 / 7)]] * 2
    masks[..., 1:, :] = 0
    assert resize_masks(masks, 2, 2)[0, :, 0, 0].tolist() == [round(255 * 4 / 7 * 3 / 7), 0]
