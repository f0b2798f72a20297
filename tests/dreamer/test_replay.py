"""SequenceReplay: what a window holds, which windows are drawn, persistence and prefetch."""

import gc
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from tests.dreamer.replay_records import assert_equal, fill, make_latents, make_record, make_records, make_replay


class TestWindow:
    @pytest.mark.parametrize("actions", [1, 4, 6, 18])
    def test_every_action_dimension_stays_with_its_record(self, actions):
        replay = make_replay(record=make_record(actions=actions))
        fill(replay, 0, 0, 90, actions=actions)
        batch = replay.sample()
        expected = batch["context", "position"][:, None] + torch.arange(8)  # [B, T]
        assert torch.equal(batch["action"], expected[..., None].expand(-1, -1, actions).float())

    def test_shapes_and_dtypes(self):
        replay = make_replay()
        fill(replay, 1, 0, 40)
        batch = replay.sample()
        assert batch.batch_size == (4,) and batch["context"].batch_size == (4,)
        assert batch["pixels"].shape == (4, 8, 4, 4, 3) and batch["pixels"].dtype == torch.uint8
        assert batch["is_init"].shape == (4, 8, 1) and batch["is_init"].dtype == torch.bool
        assert batch["context", "belief"].shape == (4, 3)
        assert batch["context", "belief"].dtype == torch.bfloat16
        assert batch["context", "state"].shape == (4, 2) and batch["context", "state"].dtype == torch.uint8
        assert batch["context", "stream"].dtype == batch["context", "position"].dtype == torch.int64
        assert not {"belief", "state"} & set(batch.keys())

    def test_episode_boundary(self):
        """The drawing in dreamer/replay.py: o3 ends one episode, o0' starts the next."""
        replay = make_replay(capacity=36, num_streams=1, batch_size=1)
        records = make_records(0, 0, 9)
        records["action"] = torch.tensor([0.0, 10, 11, 12, 0, 20, 21, 22, 23])[:, None].expand(9, 2).clone()
        records["reward"] = torch.tensor([0.0, 1, 2, 3, 0, 4, 5, 6, 7])[:, None]
        records["is_init"][[0, 4]] = True
        records["done"][3] = records["terminated"][3] = True
        records["belief"] += torch.arange(9)[:, None]
        replay.extend(records)
        batch = replay.sample()[0]  # the only window: context 0, training steps 1..8
        assert batch["context", "belief"].tolist() == [0, 0, 0] and batch["context", "position"] == 1
        assert batch["action"][:, 0].tolist() == [10, 11, 12, 0, 20, 21, 22, 23]
        assert batch["reward"][:, 0].tolist() == [1, 2, 3, 0, 4, 5, 6, 7]
        assert batch["is_init"][:, 0].nonzero().tolist() == [[3]]
        assert batch["done"][:, 0].nonzero().tolist() == [[2]]
        assert batch["terminated"][:, 0].nonzero().tolist() == [[2]]

    def test_context_is_the_latent_of_the_record_before(self):
        replay = make_replay()
        records = make_records(0, 0, 40)
        records["belief"] += torch.arange(40)[:, None]
        records["state"] += torch.arange(40, dtype=torch.uint8)[:, None]
        replay.extend(records)
        for _ in range(10):
            context = replay.sample()["context"]
            before = context["position"][:, None] - 1
            assert torch.equal(context["belief"].long(), before.expand(-1, 3))
            assert torch.equal(context["state"].long(), before.expand(-1, 2))

    def test_nested_keys_and_a_record_without_latents(self):
        record = TensorDict({"observation": torch.zeros(3), "task": {"state": torch.zeros(2, dtype=torch.uint8)}})
        replay = make_replay(record=record, context_keys=[("task", "state")])
        replay.extend(TensorDict({**record.expand(20).clone(), "stream": torch.zeros(20).long()}, [20]))
        batch = replay.sample()
        assert batch["context", "task", "state"].shape == (4, 2) and batch["observation"].shape == (4, 8, 3)
        replay.write_context(
            batch["context", "stream"],
            batch["context", "position"],
            TensorDict({"task": {"state": torch.ones(4, 8, 2, dtype=torch.uint8)}}, [4, 8]),
        )
        assert replay.read_new([("task", "state")])["task", "state"].sum() > 0
        bare = make_replay(record=record.select("observation"), context_keys=())
        bare.extend(TensorDict({"observation": torch.zeros(20, 3), "stream": torch.zeros(20).long()}, [20]))
        assert set(bare.sample()["context"].keys()) == {"stream", "position"}


class TestDrawing:
    def test_windows_stay_in_one_stream_and_never_cross_the_head(self):
        replay = make_replay(capacity=64, batch_size=16)
        for stream, count in ((0, 1000), (1, 777)):
            fill(replay, stream, 0, count, step=13)
        starts = set()
        for _ in range(100):
            batch = replay.sample()
            position = batch["context", "position"][:, None] + torch.arange(8)  # [B, T]
            assert torch.equal(batch["action"][..., 0].long(), position)
            assert torch.equal(batch["pixels"][..., 0, 0, 0].long(), position % 251)
            assert torch.equal(batch["reward"][..., 0].long(), batch["context", "stream"][:, None].expand(-1, 8))
            starts |= set(zip(batch["context", "stream"].tolist(), position[:, 0].tolist(), strict=True))
        # A ring holds 32 records; the context is one of them: 32 - 8 windows.
        assert starts == {(0, p) for p in range(969, 993)} | {(1, p) for p in range(746, 770)}

    def test_interleaved_streams_and_one_write_across_the_end_of_the_ring(self):
        replay = make_replay(capacity=64)
        for first in range(0, 60, 15):
            both = torch.stack([make_records(0, first, 15), make_records(1, first, 15)], dim=1)
            replay.extend(both.reshape(-1))
        assert replay.write_count == 120 and len(replay) == 64
        for _ in range(20):
            batch = replay.sample()
            position = batch["context", "position"][:, None] + torch.arange(8)
            assert torch.equal(batch["action"][..., 0].long(), position)

    def test_uniform_over_windows_of_all_streams(self):
        replay = make_replay(capacity=200, batch_size=500, seed=3)
        fill(replay, 0, 0, 18)
        fill(replay, 1, 0, 150)
        counts = torch.zeros(2, 200)
        for _ in range(40):
            context = replay.sample()["context"]
            counts.index_put_((context["stream"], context["position"]), torch.tensor(1.0), accumulate=True)
        seen = counts[counts > 0]
        assert len(seen) == (18 - 8) + (100 - 8)
        expected = 20_000 / len(seen)
        chi_square = ((seen - expected) ** 2 / expected).sum()
        assert chi_square < 101 + 4 * (2 * 101) ** 0.5  # mean 101 and deviation 14 for 101 degrees of freedom

    def test_same_seed_same_batches_and_no_global_generator(self):
        torch.manual_seed(0)
        before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
        replays = [make_replay(seed=5), make_replay(seed=5), make_replay(seed=6)]
        for replay in replays:
            fill(replay, 0, 0, 80)
        drawn = [torch.cat([replay.sample()["context", "position"] for _ in range(5)]) for replay in replays]
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
        assert torch.equal(torch.random.get_rng_state(), before)
        assert np.array_equal(np.random.get_state()[1], numpy_before)

    def test_batches_belong_to_the_caller(self):
        replay = make_replay()
        fill(replay, 0, 0, 80)
        batch = replay.sample()
        kept = batch.clone()
        for _ in range(5):
            replay.sample()
            fill(replay, 0, 80, 20)
        assert_equal(batch, kept)

    def test_nothing_to_sample(self):
        replay = make_replay()
        fill(replay, 0, 0, 8)
        fill(replay, 1, 0, 8)
        assert not replay.can_sample()
        with pytest.raises(RuntimeError, match="16 records in 2 streams hold no window of 9"):
            replay.sample()
        fill(replay, 1, 8, 1)
        assert replay.can_sample() and replay.sample()["context", "stream"].tolist() == [1] * 4


class TestOnlineQueue:
    def test_each_window_once_and_oldest_first(self):
        replay = make_replay(online=True, batch_size=2)
        fill(replay, 0, 0, 30)  # windows 0, 9, 18
        fill(replay, 1, 0, 20)  # windows 0, 9
        drawn = []
        for _ in range(2):
            context = replay.sample()["context"]
            drawn += zip(context["position"].tolist(), context["stream"].tolist(), strict=True)
        assert drawn == [(1, 0), (1, 1), (10, 0), (10, 1)]
        assert replay.sample()["context", "position"][0] == 19  # then uniform
        before = replay._next_online.copy()
        replay.sample()
        assert np.array_equal(replay._next_online, before)
        fill(replay, 1, 20, 7)
        assert replay.sample()["context", "position"][0] == 19

    def test_overwritten_windows_are_skipped(self):
        replay = make_replay(online=True, capacity=40, num_streams=1, batch_size=3)
        fill(replay, 0, 0, 100)  # 60..99 are left; the windows at 63, 72, 81 are whole, the one at 90 has 10 records
        assert replay.sample()["context", "position"].tolist() == [64, 73, 82]
        assert replay.sample()["context", "position"][0] == 91


class TestWriteContext:
    def test_lands_in_the_sampled_records_only(self):
        replay = make_replay(capacity=80, batch_size=4)
        fill(replay, 0, 0, 55)
        fill(replay, 1, 0, 55)
        context = replay.sample()["context"]
        replay.write_context(context["stream"], context["position"], make_latents(7))
        touched = set()
        for stream, position in zip(context["stream"].tolist(), context["position"].tolist(), strict=True):
            touched |= {(stream, position + step) for step in range(8)}
        records = replay.read_new(["action", "belief", "state"])
        for record in records:
            position, stream = int(record["action"][0]), int(record["stream"])
            expected = 7 if (stream, position) in touched else 0
            assert record["belief"].tolist() == [expected] * 3 and record["state"].tolist() == [expected] * 2

    def test_later_samples_see_it(self):
        replay = make_replay(capacity=18, num_streams=1, batch_size=1)
        fill(replay, 0, 0, 9, step=9)
        context = replay.sample()["context"]
        replay.write_context(context["stream"], context["position"], make_latents(7, batch_size=1))
        fill(replay, 0, 9, 9, step=9)
        contexts = {int(c["position"]): int(c["belief"][0]) for c in (replay.sample()["context"][0] for _ in range(60))}
        assert contexts == {1: 0, **dict.fromkeys(range(2, 10), 7), 10: 0}

    def test_overwritten_records_keep_their_own_latents(self):
        replay = make_replay(capacity=40, num_streams=1, batch_size=1)
        fill(replay, 0, 0, 40)
        stream, position = torch.tensor([0]), torch.tensor([1])
        fill(replay, 0, 40, 5, step=5)  # overwrites 0..4
        replay.write_context(stream, position, make_latents(7, batch_size=1))
        records = replay.read_new(["action", "belief"])
        written = records["action"][records["belief"][:, 0] == 7, 0]
        assert written.tolist() == [5, 6, 7, 8]

    def test_bad_latents(self):
        replay = make_replay()
        stream = position = torch.ones(4, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"'belief': expected .*bfloat16, got .*float32"):
            latents = make_latents(1)
            replay.write_context(stream, position, latents.set("belief", latents["belief"].float()))
        with pytest.raises(ValueError, match=r"batch size \[4, 5\] instead of \[4, 8\]"):
            replay.write_context(stream, position, make_latents(1, sequence_length=5))


def test_read_new_returns_what_is_left_of_it():
    replay = make_replay(capacity=80)
    assert replay.read_new(["reward"]).batch_size == (0,)
    fill(replay, 1, 0, 3)
    fill(replay, 0, 0, 2)
    new = replay.read_new(["action"])
    assert set(new.keys()) == {"action", "stream"}
    assert new["stream"].tolist() == [0, 0, 1, 1, 1] and new["action"][:, 0].tolist() == [0, 1, 0, 1, 2]
    fill(replay, 1, 3, 100)
    new = replay.read_new(["action"])
    assert new["stream"].unique().tolist() == [1] and new["action"][:, 0].tolist() == list(range(63, 103))


class TestPrefetch:
    def test_same_batches_as_without(self):
        with make_replay(prefetch=3) as ahead:
            plain = make_replay()
            for each in (ahead, plain):
                fill(each, 0, 0, 90)
            for _ in range(10):
                assert_equal(ahead.sample(), plain.sample())

    def test_close_ends_the_thread(self):
        before = threading.active_count()
        replay = make_replay(prefetch=2)
        fill(replay, 0, 0, 90)
        replay.sample()
        assert threading.active_count() == before + 1
        replay.close()
        assert threading.active_count() == before
        with pytest.raises(RuntimeError, match="after shutdown"):
            replay.sample()

    def test_a_forgotten_replay_ends_its_thread(self):
        before = threading.active_count()
        replay = make_replay(prefetch=2)
        fill(replay, 0, 0, 90)
        replay.sample()
        del replay
        deadline = time.monotonic() + 5
        while threading.active_count() > before and time.monotonic() < deadline:
            gc.collect()
            time.sleep(1e-2)
        assert threading.active_count() == before

    @pytest.mark.slow
    def test_does_not_keep_the_process_alive(self):
        code = """
from tests.dreamer.replay_records import fill, make_replay
replay = make_replay(prefetch=2)
fill(replay, 0, 0, 90)
replay.sample()
"""
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

    def test_errors_surface_in_sample(self, monkeypatch):
        with make_replay(prefetch=1) as replay:
            with pytest.raises(RuntimeError, match="no window"):
                replay.sample()
            fill(replay, 0, 0, 90)
            replay.sample()
            replay._ahead[0].result()
            monkeypatch.setattr(replay, "_read_windows", lambda *args: 1 / 0)
            replay.sample()
            with pytest.raises(ZeroDivisionError):
                replay.sample()

    def test_load_drops_what_was_prepared(self, tmp_path):
        with make_replay(prefetch=2) as replay:
            fill(replay, 0, 0, 90)
            replay.sample()
            replay.dump(tmp_path)
            after_dump = make_replay()
            for each in (replay, after_dump):
                each.load(tmp_path)
            assert_equal(replay.sample(), after_dump.sample())
