"""SequenceReplay: saved and loaded, and episodes that a restart cuts."""

import hashlib

import pytest
import torch
from torchrl.checkpoint import Checkpoint

from dreamer.replay_storage import RecordRings
from objectives.functional import lambda_return
from tests.dreamer.replay_records import assert_equal, fill, make_latents, make_record, make_records, make_replay


class TestPersistence:
    @pytest.mark.parametrize("count", [30, 250])
    def test_goes_on_bit_exactly(self, tmp_path, count):
        replay, other = make_replay(online=True), make_replay(online=True, seed=99)
        fill(replay, 0, 0, count)
        fill(replay, 1, 0, 20)
        context = replay.sample()["context"]
        replay.write_context(context["stream"], context["position"], make_latents(7))
        replay.read_new(["reward"])
        replay.dump(tmp_path / "replay")
        held = min(count, 100) + 20
        assert (tmp_path / "replay" / "pixels.bin").stat().st_size == held * 48
        other.load(tmp_path / "replay")
        for _ in range(3):
            for each in (replay, other):
                fill(each, 1, int(each._written[1]), 9)
            assert_equal(replay.sample(), other.sample())
            assert_equal(replay.read_new(["action"]), other.read_new(["action"]))
        assert other.write_count == count + 20 + 27

    def test_torchrl_checkpoint_takes_it(self, tmp_path):
        replay, other = make_replay(), make_replay()
        fill(replay, 0, 0, 30)
        Checkpoint(replay=replay).save(tmp_path / "checkpoint")
        Checkpoint(replay=other).load(tmp_path / "checkpoint")
        assert_equal(replay.sample(), other.sample())

    def test_refuses_another_layout_or_a_short_file(self, tmp_path):
        replay = make_replay()
        fill(replay, 0, 0, 30)
        replay.dump(tmp_path)
        with pytest.raises(ValueError, match=r"num_streams: 2 there, 4 here"):
            make_replay(num_streams=4).load(tmp_path)
        with pytest.raises(ValueError, match=r"action: \[2\] torch.float32 there, \[6\] torch.float32 here"):
            make_replay(record=make_record(actions=6)).load(tmp_path)
        file = tmp_path / "reward.bin"
        file.write_bytes(file.read_bytes()[:-1])
        other = make_replay()
        with pytest.raises(ValueError, match=r"reward.bin has 119 bytes instead of 120"):
            other.load(tmp_path)
        assert len(other) == 0

    def test_goes_on_in_longer_rings(self, tmp_path):
        """As when a run is made longer. Nothing was overwritten yet, or it would be missed."""
        replay, longer = make_replay(capacity=80), make_replay(capacity=200, seed=9)
        fill(replay, 0, 0, 40)
        fill(replay, 1, 0, 12)
        replay.dump(tmp_path / "whole")
        longer.load(tmp_path / "whole")
        assert_equal(longer.sample(), replay.sample())
        fill(replay, 0, 40, 1)
        replay.dump(tmp_path / "gone_round")
        with pytest.raises(ValueError, match="ring_length: 40 there, 100 here"):
            make_replay(capacity=200).load(tmp_path / "gone_round")

    def test_records_overwritten_during_the_copy_stay_out(self, tmp_path, monkeypatch):
        replay = make_replay(num_streams=1, capacity=60)
        fill(replay, 0, 0, 100)
        copy = RecordRings._write_files

        def copy_beside_a_writer(self, *args):
            fill(replay, 0, 100, 15)
            copy(self, *args)

        monkeypatch.setattr(RecordRings, "_write_files", copy_beside_a_writer)
        replay.dump(tmp_path)
        other = make_replay(num_streams=1, capacity=60, batch_size=300)
        other.load(tmp_path)
        batch = other.sample()
        assert batch["context", "position"].min() == 115 - 60 + 1
        position = batch["context", "position"][:, None] + torch.arange(8)
        assert torch.equal(batch["action"][..., 0].long(), position)
        fill(other, 0, 100, 10)
        assert other.write_count == 110


class TestTruncate:
    def test_marks_the_newest_record_of_each_stream(self):
        replay = make_replay(num_streams=3, capacity=300)
        fill(replay, 0, 0, 130)  # the ring has gone round
        fill(replay, 1, 0, 5)
        latents = make_latents(7, batch_size=1, sequence_length=8)
        replay.write_context(torch.zeros(1).long(), torch.tensor([122]), latents)
        assert replay.truncate() == [0, 1]
        records = replay.read_new(["action", "done", "terminated", "belief"])
        assert records["action"][records["done"].squeeze(-1), 0].tolist() == [129, 4]
        assert not records["terminated"].any()
        assert records["belief"][records["action"][:, 0] == 129].eq(7).all()  # its latents stay
        assert replay.truncate() == []

    def test_given_streams_and_ends(self):
        replay = make_replay()
        for stream in (0, 1):
            fill(replay, stream, 0, 5)
        last = make_records(0, 5, 1)
        last["done"][:] = last["terminated"][:] = True
        replay.extend(last)
        assert replay.truncate([0]) == [] and replay.truncate([1]) == [1]
        records = replay.read_new(["done", "terminated"])
        assert records["done"].flatten().nonzero().flatten().tolist() == [5, 10]
        assert records["terminated"].sum() == 1

    def test_the_return_of_the_cut_episode_stops_there(self):
        """The critic's target bootstraps from the cut record and sees nothing of the next episode."""
        replay = make_replay(num_streams=1, capacity=36, batch_size=1)
        fill(replay, 0, 0, 5)
        replay.truncate()
        begin = make_records(0, 5, 4)
        begin["is_init"][0] = True
        replay.extend(begin)
        batch = replay.sample()  # training steps are the records 1 to 8, the cut one is 4
        assert batch["done"].flatten().nonzero().flatten().tolist() == [3]

        def targets(reward):
            discount = (~batch["terminated"]).float().squeeze(-1) * 0.9
            return lambda_return(reward, discount, torch.full((1, 8), 10.0), 0.95, batch["done"].squeeze(-1))

        reward = torch.arange(1.0, 9)[None]
        first = targets(reward)
        assert first[0, 2] == pytest.approx(4 + 0.9 * 10)
        changed = targets(torch.where(torch.arange(8) > 3, 1000.0, reward))
        assert torch.equal(first[0, :3], changed[0, :3]) and first[0, 3] != changed[0, 3]


def test_twenty_thousand_memory_mapped_records(tmp_path):
    """Storage and episode borders come back to the byte; the mapped files stay where they are."""
    settings = {"capacity": 20_000, "num_streams": 4, "record": make_record(size=2)}
    replay = make_replay(memmap_dir=tmp_path / "mapped", **settings)
    for first in range(0, 6000, 1000):
        for stream in range(4):
            records = make_records(stream, first, 1000, size=2)
            position = torch.arange(first, first + 1000)[:, None]
            records["is_init"], records["done"] = position % (70 + stream) == 0, position % (70 + stream) == 69 + stream
            replay.extend(records)
    replay.dump(tmp_path / "dump")
    other = make_replay(memmap_dir=tmp_path / "other", **settings)
    other.load(tmp_path / "dump")

    def digests(folder):
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}

    assert digests(tmp_path / "mapped") == digests(tmp_path / "other") and len(digests(tmp_path / "other")) >= 8
    assert len(other) == 20_000 and other.write_count == 24_000
    size = sum(path.stat().st_size for path in (tmp_path / "dump").glob("*.bin"))
    assert size == len(other) * other.record_bytes
    for _ in range(5):
        batch = other.sample()
        position = batch["context", "position"][:, None] + torch.arange(8)
        length = 70 + batch["context", "stream"][:, None]
        assert torch.equal(batch["is_init"][..., 0], position % length == 0)
        assert torch.equal(batch["done"][..., 0], position % length == length - 1)
