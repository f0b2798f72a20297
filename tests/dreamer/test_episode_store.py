"""Episodes on disk: what is read is what was written, or an error that says which file is not."""

import re
from pathlib import Path

import pytest
import torch

import dreamer.episode_store
from dreamer.episode_store import Encodings, EpisodeStore, Layout

IMAGES = Layout("pixels", (4, 6, 3), torch.uint8)
VECTORS = Layout("observation", (5,), torch.float32)


def make_episode(layout: Layout, records: int, seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    observations = (torch.rand(records, *layout.shape, generator=generator) * 255).to(layout.dtype)
    flags = torch.zeros(records, 1, dtype=torch.bool)
    columns = {"action": torch.rand(records, 2, generator=generator), "reward": torch.rand(records, 1)}
    columns |= {"is_init": flags.clone(), "terminated": flags.clone()}
    columns["is_init"][0] = columns["terminated"][-1] = True
    return observations, columns


def make_store(folder: Path, *lengths: int, layout: Layout = IMAGES) -> EpisodeStore:
    store = EpisodeStore(folder, layout)
    for seed, records in enumerate(lengths):
        observations, columns = make_episode(layout, records, seed)
        store.append([layout.pack(observation) for observation in observations], columns)
    return store


@pytest.mark.parametrize("layout", [IMAGES, VECTORS], ids=["images", "vectors"])
def test_round_trip(layout, tmp_path):
    make_store(tmp_path, 3, 5, layout=layout)
    store = EpisodeStore(tmp_path, layout)
    assert (len(store), store.records, store.steps, store.lengths) == (2, 8, 6, [3, 5])
    observations, columns = make_episode(layout, 5, seed=1)
    assert torch.equal(store.read_observations(1), observations)
    for step in range(5):
        assert torch.equal(store.read_observation(1, step), observations[step])
    found = store.read_columns(1)
    assert torch.equal(found["action"], columns["action"])
    assert found["is_init"].flatten().tolist() == [True, False, False, False, False]
    assert found["terminated"].flatten().tolist() == [False, False, False, False, True]


def test_a_file_holds_observations_compressed_one_by_one(tmp_path):
    image = torch.zeros(64, 64, 3, dtype=torch.uint8)
    layout = Layout("pixels", (64, 64, 3), torch.uint8)
    assert len(layout.pack(image)) < image.numel() / 100
    _, columns = make_episode(layout, 10)
    store = EpisodeStore(tmp_path, layout)
    store.append([layout.pack(image)] * 10, columns)
    assert store.path(0).stat().st_size < 3_000


def test_every_record_is_drawn_as_often_and_by_the_global_generator(tmp_path):
    layout = Layout("observation", (1,), torch.float32)
    store = EpisodeStore(tmp_path, layout)
    for values in ([0.0, 1.0], [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]):
        _, columns = make_episode(layout, len(values))
        store.append([layout.pack(torch.tensor([value])) for value in values], columns)
    torch.manual_seed(0)
    drawn = store.draw_observations(800).flatten()
    assert torch.bincount(drawn.long(), minlength=8).tolist() == pytest.approx([100] * 8, abs=35)
    torch.manual_seed(0)
    assert torch.equal(store.draw_observations(800).flatten(), drawn)


def test_an_episode_is_stored_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    store = make_store(tmp_path, 3)

    def fail(path, content):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(dreamer.episode_store, "write_whole", fail)
        with pytest.raises(OSError, match="no space"):
            make_episode_into(store)
    assert len(store) == 1 and [path.name for path in tmp_path.iterdir()] == ["000000.safetensors"]
    make_episode_into(store)
    assert EpisodeStore(tmp_path, IMAGES).lengths == [3, 2]


def make_episode_into(store: EpisodeStore) -> None:
    observations, columns = make_episode(store.layout, 2)
    store.append([store.layout.pack(observation) for observation in observations], columns)


def test_later_episodes_can_be_removed(tmp_path):
    store = make_store(tmp_path, 3, 4, 5)
    store.truncate(1)
    assert store.lengths == EpisodeStore(tmp_path, IMAGES).lengths == [3]
    with pytest.raises(ValueError, match="has 1 of 2 episodes"):
        store.truncate(2)


def test_a_missing_episode_is_named(tmp_path):
    make_store(tmp_path, 3, 4, 5).path(1).unlink()
    with pytest.raises(ValueError, match=r"000001\.safetensors is missing"):
        EpisodeStore(tmp_path, IMAGES)


def test_episodes_of_another_environment_are_refused(tmp_path):
    make_store(tmp_path, 3)
    with pytest.raises(ValueError, match=r"holds pixels \[4, 6, 3\] .* gives observation \[5\]"):
        EpisodeStore(tmp_path, VECTORS)


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_file_is_named(damage, tmp_path):
    store = make_store(tmp_path, 8)
    path, content = store.path(0), bytearray(store.path(0).read_bytes())
    if damage == "cut":
        content = content[:-5]
    else:
        packed = IMAGES.pack(store.read_observation(0, 3))
        content[content.index(packed) + len(packed) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match=re.escape(f"{path} is damaged")):
        store.read_observations(0)


class TestEncodings:
    def test_round_trip(self, tmp_path):
        encodings = Encodings(tmp_path / "encodings")
        mean, logvar = torch.randn(5, 3), torch.randn(5, 3)
        encodings.write(2, mean, logvar, "abc")
        found = encodings.read(2, "abc")
        assert torch.equal(found[0], mean.half()) and torch.equal(found[1], logvar.half())
        assert torch.equal(encodings.read(2, "abc", records=1)[0], mean[:1].half())

    def test_stale_ones_are_refused(self, tmp_path):
        encodings = Encodings(tmp_path)
        encodings.write(0, torch.zeros(2, 3), torch.zeros(2, 3), "old")
        assert encodings.fresh(0, "old") and not encodings.fresh(0, "new") and not encodings.fresh(1, "old")
        with pytest.raises(ValueError, match=r"another encoder.*stage encode"):
            encodings.read(0, "new")
        with pytest.raises(ValueError, match="episode 1 was not encoded"):
            encodings.read(1, "old")
