"""SequenceReplay: finding the newest records whose flag is not set, and writing into records that are held."""

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from tests.dreamer.replay_records import fill, make_replay


class TestWrite:
    def test_any_keys_of_any_records(self):
        replay = make_replay()
        fill(replay, 0, 0, 30)
        fill(replay, 1, 0, 30)
        stream, position = torch.tensor([1, 0, 1]), torch.tensor([29, 3, 0])
        values = TensorDict({"reward": torch.tensor([[7.0], [8.0], [9.0]]), "done": torch.ones(3, 1).bool()}, [3])
        assert replay.write(stream, position, values) == 3
        records = replay.read_new(["reward", "done", "action"])
        changed = records[records["done"][:, 0]]
        assert changed["stream"].tolist() == [0, 1, 1]
        assert changed["action"][:, 0].tolist() == [3, 0, 29] and changed["reward"][:, 0].tolist() == [8, 9, 7]

    def test_records_that_are_gone_or_not_there_yet(self):
        replay = make_replay(capacity=40, num_streams=1)
        fill(replay, 0, 0, 50)  # 10..49 are held
        position = torch.tensor([9, 10, 49, 50])
        assert replay.write(torch.zeros(4).long(), position, TensorDict({"reward": -torch.ones(4, 1)}, [4])) == 2
        records = replay.read_new(["reward", "action"])
        assert records["action"][records["reward"][:, 0] < 0, 0].tolist() == [10, 49]

    @pytest.mark.parametrize(("count", "first"), [(60, 28), (35, 3), (20, 0)])
    def test_beside_other_processes_the_next_ones_to_go_are_left_alone(self, count, first):
        """A ring of 40 and T = 8: what would be overwritten by the next 8 records is not written, nor offered."""
        replay = make_replay(record=make_flagged(), capacity=40, num_streams=1)
        write_flagged(replay, 0, [False] * count)
        replay.share()
        assert replay.newest(100, [], unset="flag")["position"].tolist() == list(range(count - 1, first - 1, -1))
        position = torch.arange(count)
        flags = TensorDict({"flag": torch.ones(count, 1, dtype=torch.bool)}, [count])
        assert replay.write(torch.zeros(count).long(), position, flags) == count - first

    @pytest.mark.parametrize("after", ["tag", "flag"])
    def test_overwritten_during_the_call(self, monkeypatch, after):
        """What comes in between is new, and its flag says so, whichever of the two was written last."""
        replay = make_replay(record=make_flagged(), capacity=40, num_streams=1)
        write_flagged(replay, 0, [False] * 60)
        replay.share()
        put = replay._put

        def overwrite_after(key, *arguments):
            put(key, *arguments)
            if key == after:
                monkeypatch.undo()
                write_flagged(replay, 0, [False] * 30)  # 50..89 are held now
                put(key, *arguments)  # it was slower than the writer
                monkeypatch.setattr(replay, "_put", put)

        monkeypatch.setattr(replay, "_put", overwrite_after)
        count = 12
        values = make_flagged().expand(count).clone().select("tag", "flag")
        values["flag"] = ~values["flag"]
        assert replay.write(torch.zeros(count).long(), torch.arange(42, 42 + count), values) == 4
        assert not replay.read_new(["flag"])["flag"][4:].any()

    def test_bad_values(self):
        replay, one = make_replay(), torch.ones(1).long()
        with pytest.raises(ValueError, match="'mask': expected nothing"):
            replay.write(one, one, TensorDict({"mask": torch.zeros(1, 1)}, [1]))
        with pytest.raises(ValueError, match=r"'reward': expected \[1\] torch.float32, got \[2\]"):
            replay.write(one, one, TensorDict({"reward": torch.zeros(1, 2)}, [1]))


def make_flagged() -> TensorDict:
    return TensorDict(
        {
            "tag": torch.zeros(1),
            "flag": torch.zeros(1, dtype=torch.bool),
            "belief": torch.zeros(1),
            "state": torch.ones(1),
        }
    )


def write_flagged(replay, stream: int, flags: list[bool]) -> None:
    """Append records whose tag is 1000 * stream + position, ten at a time."""
    first = replay.stream_counts[stream]
    for begin in range(0, len(flags), 10):
        part = torch.tensor(flags[begin : begin + 10])
        records = make_flagged().expand(len(part)).clone()
        records["tag"] = (1000.0 * stream + first + begin + torch.arange(len(part)))[:, None]
        records["flag"], records["stream"] = part[:, None], torch.full((len(part),), stream)
        replay.extend(records)


def set_flags(replay, records: TensorDict) -> None:
    flags = TensorDict({"flag": torch.ones(len(records), 1, dtype=torch.bool)}, [len(records)])
    replay.write(records["stream"], records["position"], flags)


class TestNewest:
    def test_newest_first_over_all_streams(self):
        replay = make_replay(record=make_flagged())
        write_flagged(replay, 0, [False, False, True, False])
        write_flagged(replay, 1, [False, True, False, False, True, False])
        found = replay.newest(4, ["tag"], unset="flag")
        assert found["stream"].tolist() == [0, 1, 0, 1] and found["position"].tolist() == [3, 5, 1, 3]
        assert found["tag"][:, 0].tolist() == [3, 1005, 1, 1003]
        everything = replay.newest(100, ["tag"], unset="flag")
        assert everything["position"].tolist() == [3, 5, 1, 3, 0, 2, 0]

    def test_nothing(self):
        replay = make_replay(record=make_flagged())
        assert replay.newest(5, ["tag"], unset="flag")["tag"].shape == (0, 1)
        write_flagged(replay, 1, [True] * 30)
        assert len(replay.newest(5, ["tag"], unset="flag")) == 0

    @pytest.mark.parametrize("capacity", [90, 4000])
    def test_against_a_plain_search(self, capacity, monkeypatch):
        """Rings that wrap, flags set in between, and spans so short that the search takes many."""
        monkeypatch.setattr("dreamer.replay.SEARCH_SPAN", 3)
        replay = make_replay(record=make_flagged(), capacity=capacity, num_streams=2)
        rng, flags = np.random.default_rng(0), [[], []]
        for _ in range(60):
            stream = int(rng.integers(2))
            new = (rng.random(rng.integers(1, 20)) < 0.5).tolist()
            write_flagged(replay, stream, new)
            flags[stream] += new
            unset = [
                (len(flags[s]) - p, s, p)
                for s in range(2)
                for p in range(max(len(flags[s]) - capacity // 2, 0), len(flags[s]))
                if not flags[s][p]
            ]
            limit = int(rng.choice([1, 8, 500]))
            found = replay.newest(limit, ["tag"], unset="flag")
            pairs = list(zip(found["stream"].tolist(), found["position"].tolist(), strict=True))
            assert pairs == [(s, p) for _, s, p in sorted(unset)[:limit]]
            assert found["tag"][:, 0].tolist() == [1000 * s + p for s, p in pairs]
            set_flags(replay, found[::2])
            for s, p in pairs[::2]:
                flags[s][p] = True

    def test_what_is_settled_is_not_searched_again(self, monkeypatch):
        replay = make_replay(record=make_flagged(), capacity=200, num_streams=1)
        write_flagged(replay, 0, [True] * 60 + [False] + [True] * 30)
        replay.newest(5, [], unset="flag")
        replay._storage["flag"][:60] = False  # nobody does this; it shows where the search ends
        assert replay.newest(5, [], unset="flag")["position"].tolist() == [60]
        write_flagged(replay, 0, [False] * 10)
        assert replay.newest(3, [], unset="flag")["position"].tolist() == [100, 99, 98]

    def test_a_dump_that_is_loaded_is_searched_anew(self, tmp_path):
        replay = make_replay(record=make_flagged(), num_streams=1)
        write_flagged(replay, 0, [False] * 20)
        replay.dump(tmp_path)
        set_flags(replay, replay.newest(100, [], unset="flag"))
        assert len(replay.newest(100, [], unset="flag")) == 0
        replay.load(tmp_path)
        assert len(replay.newest(100, [], unset="flag")) == 20

    def test_what_a_writer_reached_during_the_copy_is_left_out(self, monkeypatch):
        replay = make_replay(record=make_flagged(), capacity=40, num_streams=1)
        write_flagged(replay, 0, [False] * 40)
        copy = replay._get

        def copy_beside_a_writer(key, rows):
            copied = copy(key, rows)
            write_flagged(replay, 0, [True] * 5)
            return copied

        monkeypatch.setattr(replay, "_get", copy_beside_a_writer)
        found = replay.newest(100, ["tag"], unset="flag")
        assert found["position"].tolist() == found["tag"][:, 0].tolist() == list(range(39, 4, -1))
