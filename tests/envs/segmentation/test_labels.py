"""Labelled frames from files: what counts, how they are spread, what is refused."""

import numpy as np
import pytest
import torch

from envs.segmentation.labels import load_labels, read_frames


def frames(count: int, first: int = 0, size: int = 4) -> np.ndarray:
    """Uniform images with the numbers from `first`."""
    numbers = np.arange(first, first + count, dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(numbers, (count, size, size, 3)).copy()


def numbers(tensor: torch.Tensor) -> list[int]:
    return tensor[:, 0, 0, 0].tolist()


def test_a_file_with_bool_masks(tmp_path):
    mask = np.zeros((3, 4, 4), dtype=bool)
    mask[1, 2] = True
    np.savez(tmp_path / "few.npz", image=frames(3), mask=mask)
    images, masks = load_labels(tmp_path / "few.npz")
    assert numbers(images) == [0, 1, 2] and images.dtype == masks.dtype == torch.uint8
    assert masks.shape == (3, 4, 4, 1) and masks[1, 2].unique().tolist() == [255] and masks.sum() == 4 * 255


def test_soft_masks_stay_as_they_are_and_invalid_ones_are_left_out(tmp_path):
    mask = frames(4, first=100)[..., :1]
    np.savez(tmp_path / "a.npz", pixels=frames(4), mask=mask, mask_valid=np.array([[1], [0], [1], [0]], dtype=bool))
    images, masks = load_labels(str(tmp_path))
    assert numbers(images) == [0, 2] and numbers(masks) == [100, 102]


def test_frames_beside_the_masks(tmp_path):
    """As preprocess_masks.py writes them; episodes without masks are left out."""
    for folder in ("episodes/b", "masks/b"):
        (tmp_path / folder).mkdir(parents=True)
    np.savez(tmp_path / "episodes/b/one.npz", pixels=frames(5))
    np.savez(tmp_path / "episodes/two.npz", pixels=frames(5))
    mask, episode = frames(5, first=50)[..., :1], np.array("../../episodes/b/one.npz")
    np.savez(tmp_path / "masks/b/one.npz", mask=mask, episode=episode)
    for folder in ("masks", "."):
        images, masks = load_labels(tmp_path / folder)
        assert numbers(images) == [0, 1, 2, 3, 4] and numbers(masks) == [50, 51, 52, 53, 54]
    (tmp_path / "episodes/b/one.npz").unlink()
    with pytest.raises(ValueError, match=r"one\.npz: not a \.npz file of plain arrays that can be read"):
        load_labels(tmp_path / "masks")


@pytest.mark.parametrize(("limit", "expected"), [(1, [5]), (2, [2, 7]), (5, [1, 3, 5, 7, 9]), (99, list(range(10)))])
def test_a_limit_spreads_over_all_files(tmp_path, limit, expected):
    for first, count in ((0, 4), (4, 6)):
        np.savez(tmp_path / f"{first}.npz", pixels=frames(count, first), mask=np.ones((count, 4, 4), dtype=bool))
    images, masks = load_labels(tmp_path, limit)
    assert numbers(images) == expected and len(masks) == len(expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"pixels": frames(2)}, "no labelled frames; give"),
        (
            {"pixels": frames(2), "mask": np.zeros((3, 4, 4), dtype=bool)},
            r"its frames need bool or uint8 \[2, 4, 4, 1\]",
        ),
        ({"pixels": frames(2), "mask": np.zeros((2, 4, 4))}, r"mask float64 \[2, 4, 4, 1\]"),
        ({"pixels": frames(2), "mask": np.ones((2, 4, 4), dtype=np.uint8)}, "mask is 1 at most: give bool, or uint8"),
        ({"mask": np.ones((2, 4, 4), dtype=bool)}, "give pixels or image or observation.*found none of them"),
        (
            {"observation": np.zeros((2, 7), dtype=np.float32), "mask": np.ones((2, 4, 4), dtype=bool)},
            r"found observation float32 \[2, 7\]",
        ),
        (
            {"pixels": frames(2), "mask": np.ones((2, 4, 4), dtype=bool), "mask_valid": np.ones(3, dtype=bool)},
            "mask_valid",
        ),
        ({"pixels": np.array([{}]), "mask": np.ones((1, 4, 4), dtype=bool)}, "not a .npz file of plain arrays"),
    ],
)
def test_what_is_refused(tmp_path, content, message):
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(ValueError, match=message):
        load_labels(tmp_path)


def test_damage_and_mixed_sizes(tmp_path):
    with pytest.raises(ValueError, match="no labelled frames"):
        load_labels(tmp_path)
    with pytest.raises(ValueError, match="limit=0"):
        load_labels(tmp_path, 0)
    for size in (4, 6):
        np.savez(tmp_path / f"{size}.npz", pixels=frames(2, size=size), mask=np.ones((2, size, size), dtype=bool))
    with pytest.raises(ValueError, match=r"different sizes: .*4\.npz \[4, 4\] and .*6\.npz \[6, 6\]"):
        load_labels(tmp_path)
    whole = (tmp_path / "4.npz").read_bytes()
    (tmp_path / "6.npz").write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=r"6\.npz: not a \.npz file"):
        load_labels(tmp_path)


def test_a_segmenter_may_be_unsure_of_all(tmp_path):
    """A mask of 1 at most is refused only where nobody says that a segmenter made it."""
    np.savez(
        tmp_path / "a.npz",
        pixels=frames(2),
        mask=np.ones((2, 4, 4), dtype=np.uint8),
        mask_version=np.full((2, 1), 5),
    )
    assert load_labels(tmp_path)[1].unique().tolist() == [1]


@pytest.mark.parametrize(("offset", "value"), [(8, 1), (10, 99)], ids=["encrypted", "packed in an unknown way"])
def test_what_python_cannot_unpack(tmp_path, offset, value):
    """Flags and the way of packing are bytes 8 and 10 of an entry in the directory of a zip file."""
    path = tmp_path / "a.npz"
    np.savez(path, pixels=frames(2))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + offset] = value
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz: not a \.npz file of plain arrays that can be read"):
        read_frames(path)


def test_what_is_no_video(tmp_path):
    (tmp_path / "film.mp4").write_bytes(b"no film")
    for name in ("film.mp4", "none.mp4"):
        with pytest.raises(ValueError, match=f"{name}: not a video"):
            read_frames(tmp_path / name)
