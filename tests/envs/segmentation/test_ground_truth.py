"""The simulator's mask in the form of a segmenter's."""

import pickle

import pytest
import torch

from envs.segmentation.ground_truth import GroundTruth
from envs.segmentation.protocol import Segmenter


def test_bool_masks():
    mask = torch.tensor([[[[True], [False]]]])
    found = GroundTruth()(mask)
    assert found.dtype == torch.uint8 and found.tolist() == [[[[255], [0]]]]


def test_soft_masks():
    mask = torch.tensor([0, 1, 200, 255], dtype=torch.uint8).view(1, 2, 2, 1)
    assert torch.equal(GroundTruth()(mask), mask)


def test_is_a_segmenter():
    segmenter = GroundTruth()
    assert isinstance(segmenter, Segmenter) and len(segmenter.concepts) == 1 and segmenter.version > 0
    assert pickle.loads(pickle.dumps(segmenter)).version == segmenter.version
    assert segmenter(torch.zeros(0, 4, 4, 1, dtype=torch.bool)).shape == (0, 4, 4, 1)


@pytest.mark.parametrize(("shape", "dtype"), [((1, 4, 4, 3), torch.uint8), ((1, 4, 4, 1), torch.float32)])
def test_images_are_refused(shape, dtype):
    with pytest.raises(ValueError, match="use another segmenter"):
        GroundTruth()(torch.zeros(shape, dtype=dtype))
