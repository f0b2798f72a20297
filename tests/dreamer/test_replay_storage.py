"""RecordRings: memory, checks of what is written, and writers in other threads and processes."""

import threading
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.multiprocessing as mp
from tensordict import TensorDict
from torchrl.collectors import MultiAsyncCollector
from torchrl.data import Composite, Unbounded
from torchrl.envs import EnvBase
from torchrl.envs.utils import RandomPolicy

from dreamer.replay import SequenceReplay
from dreamer.replay_storage import RecordRings
from tests.dreamer.replay_records import assert_equal, fill, make_latents, make_record, make_records, make_replay


@pytest.fixture
def one_thread():
    """Two Python threads that each start OpenMP threads on the same cores wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TestMemory:
    def test_planned_bytes_are_those_of_the_storage(self):
        replay = make_replay(capacity=201)
        assert replay.capacity == 200
        assert replay.planned_bytes == sum(leaf.nbytes for leaf in replay._storage.values()) == 200 * 71
        assert "200 records in 2 rings of 100, 71 bytes each" in replay.describe()

    def test_record_of_the_12m_model(self):
        record = make_record(size=64, actions=6, belief=2048)
        record["state"] = torch.zeros(32, dtype=torch.uint8)
        assert make_replay(record=record).record_bytes <= 12_288 + 5_000

    def test_refuses_before_allocating(self, monkeypatch):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
        monkeypatch.setattr(torch, "empty", None)
        with pytest.raises(MemoryError, match=r"needs 14,200 bytes, 1,000 are free. Lower capacity to 14"):
            make_replay()

    def test_refuses_on_a_full_disk_and_in_full_shared_memory(self, monkeypatch, tmp_path):
        replay = make_replay()
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=14_199))
        with pytest.raises(MemoryError, match="14,199 are free"):
            make_replay(memmap_dir=tmp_path)
        with pytest.raises(MemoryError, match="14,199 are free"):
            replay.share()
        assert not replay.shared

    def test_memory_mapped_files(self, tmp_path):
        replay, plain = make_replay(memmap_dir=tmp_path), make_replay()
        for each in (replay, plain):
            fill(each, 0, 0, 150)
        assert_equal(replay.sample(), plain.sample())
        assert (tmp_path / "pixels.memmap").stat().st_size == 200 * 48

    def test_memory_mapped_files_are_used_again(self, tmp_path):
        fill(make_replay(memmap_dir=tmp_path), 0, 0, 20)
        assert len(make_replay(memmap_dir=tmp_path)) == 0

    def test_leaves_of_any_shape_and_width(self):
        record = TensorDict(
            {
                "flags": torch.zeros(8, dtype=torch.bool),  # eight bytes
                "code": torch.zeros(3, dtype=torch.uint8),  # three bytes
                "count": torch.zeros((), dtype=torch.int64),
                "scalar": torch.zeros(()),
            }
        )
        replay = make_replay(record=record, context_keys=())
        records = TensorDict(
            {
                "flags": torch.arange(160).reshape(20, 8) % 3 == 0,
                "code": torch.arange(80, dtype=torch.uint8).reshape(20, 4)[:, 1:],
                "count": torch.arange(20),
                "scalar": torch.arange(21.0)[1:],
                "stream": torch.zeros(20, dtype=torch.int64),
            },
            batch_size=[20],
        )
        replay.extend(records)
        assert_equal(replay.read_new(list(record.keys())), records)


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda r: r.exclude("reward"), r"'reward': expected \[1\] torch.float32, got nothing"),
            (lambda r: r.set("extra", torch.zeros(5)), "'extra': expected nothing, got"),
            (lambda r: r.set("action", torch.zeros(5, 3)), r"'action': expected \[2\] .*got \[3\]"),
            (lambda r: r.set("pixels", r["pixels"].float()), r"'pixels': expected .*uint8, got .*float32"),
            (lambda r: r.exclude("stream"), "no 'stream' key"),
            (lambda r: r.set("stream", torch.tensor([0, 1, 2, -1, 0])), r"streams \[-1, 2\] are not in 0..1"),
            (lambda r: r.set("stream", torch.zeros(5)), "one integer per record"),
            (lambda r: r.unsqueeze(0), "flatten them to one axis"),
        ],
    )
    def test_extend(self, change, message):
        replay = make_replay()
        with pytest.raises(ValueError, match=message):
            replay.extend(change(make_records(0, 0, 5)))
        assert replay.write_count == 0

    def test_nothing_is_no_error(self):
        replay = make_replay()
        replay.extend(make_records(0, 0, 5)[:0])
        assert replay.write_count == 0

    def test_more_than_half_a_ring_at_once(self):
        with pytest.raises(ValueError, match="51 records at once for stream 1, whose ring of 100"):
            make_replay().extend(make_records(1, 0, 51))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"capacity": 35}, "need 36; raise capacity"),
            ({"context_keys": ("belief", "stoch")}, r"\['stoch'\] are not in the record"),
            ({"record": TensorDict({"stream": torch.zeros(1)}), "context_keys": ()}, "reserved keys"),
            ({"record": make_record().expand(1)}, r"batch size \[1\]: give one record"),
            ({"num_streams": 0}, "num_streams=0"),
            ({"sequence_length": 0}, "sequence_length=0"),
            ({"storage_device": "cuda", "prefetch": 1}, "prefetch=1"),
            ({"storage_device": "cuda", "memmap_dir": "/nowhere"}, "leave one of them out"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            make_replay(**settings)


class TestWriters:
    def test_no_torn_window_beside_a_running_writer(self, one_thread):
        replay = make_replay(capacity=2000, num_streams=1, batch_size=16, record=make_record(size=16))
        records = make_records(0, 0, 30, size=16)
        stop = threading.Event()

        def write():
            position = 0
            while not stop.is_set():
                tag = torch.arange(position, position + 30)
                records["action"].copy_(tag[:, None])
                records["pixels"].copy_((tag % 251)[:, None, None, None])
                replay.extend(records)
                position += 30

        writer = threading.Thread(target=write)
        writer.start()
        try:
            while not replay.can_sample():
                time.sleep(1e-3)
            for _ in range(500):
                batch = replay.sample()
                position = batch["context", "position"][:, None] + torch.arange(8)  # [B, T]
                assert torch.equal(batch["action"], position[..., None].expand(-1, -1, 2).float())
                expected = (position % 251)[..., None, None, None]
                assert (batch["pixels"].long() == expected).all()
        finally:
            stop.set()
            writer.join()
        assert replay.write_count > 1000

    def test_redraws_windows_reached_during_the_copy(self, monkeypatch):
        replay = make_replay(capacity=60, num_streams=1, batch_size=32)
        fill(replay, 0, 0, 60)
        copy, copied = replay._read_windows, []

        def copy_beside_a_writer(stream, start):
            if not copied:
                fill(replay, 0, 60, 25)
            copied.append(len(start))
            return copy(stream, start)

        monkeypatch.setattr(replay, "_read_windows", copy_beside_a_writer)
        batch = replay.sample()
        assert copied[0] == 32 and 0 < copied[1] < 32
        position = batch["context", "position"][:, None] + torch.arange(8)
        assert position.min() >= 26 and torch.equal(batch["action"][..., 0].long(), position)

    def test_sharing_keeps_records_and_position(self):
        replay, plain = make_replay(), make_replay()
        for each in (replay, plain):
            fill(each, 0, 0, 90)
            fill(each, 1, 0, 170)
        replay.share()
        assert replay.shared and not plain.shared
        for _ in range(3):
            assert_equal(replay.sample(), plain.sample())
            for each in (replay, plain):
                fill(each, 0, int(each._written[0]), 15)

    def test_shared_write_back_leaves_the_records_next_to_be_overwritten(self):
        replay = make_replay(capacity=40, num_streams=1)
        fill(replay, 0, 0, 60)  # 20..59 are held
        replay.share()
        stream, position = torch.zeros(4, dtype=torch.int64), torch.tensor([20, 24, 28, 40])
        replay.write_context(stream, position, make_latents(7))
        records = replay.read_new(["action", "belief"])
        written = records["action"][records["belief"][:, 0] == 7, 0]
        assert written.tolist() == [*range(28, 36), *range(40, 48)]

    def test_write_limit_blocks_until_released(self):
        replay = make_replay()
        replay.write_limit = 10
        fill(replay, 0, 0, 10)
        writer = threading.Thread(target=fill, args=(replay, 0, 10, 40), daemon=True)
        writer.start()
        time.sleep(0.1)
        fill(replay, 1, 0, 5)  # a stream waits for itself only
        assert replay.stream_counts.tolist()[:2] == [10, 5]
        replay.write_limit = 11
        time.sleep(0.1)
        assert replay.stream_counts[0] == 30  # one call beyond the limit
        replay.release()
        writer.join(timeout=5)
        assert not writer.is_alive() and replay.stream_counts[0] == 50

    def test_unshared_replay_is_not_copied(self):
        with pytest.raises(RuntimeError, match=r"call share\(\)"):
            ForkingPickler.dumps(make_replay())


def write_from_process(rings: Sequence[RecordRings], stream: int, first: int, count: int) -> None:
    """Fill one replay after the other."""
    torch.set_num_threads(1)
    for each in rings:
        assert type(each) is RecordRings and each.shared
        fill(each, stream, first, count)


@pytest.mark.slow
def test_processes_write_while_the_learner_samples(tmp_path):
    """Into a replay in shared memory, then into one on disk."""
    replays = [make_replay(capacity=400, prefetch=1, memmap_dir=folder) for folder in (None, tmp_path)]
    for replay in replays:
        fill(replay, 0, 0, 20)
        replay.share()
        replay.write_limit = 1000
    context = mp.get_context("spawn")
    writers = [
        context.Process(target=write_from_process, args=(replays, stream, first, 3000 - first))
        for stream, first in ((0, 20), (1, 0))
    ]
    for writer in writers:
        writer.start()
    for replay in replays:
        watch_writers(replay)
    for writer in writers:
        writer.join(timeout=60)
        assert writer.exitcode == 0


def watch_writers(replay: SequenceReplay) -> None:
    """Use a replay as the learner does until all is written, and look at every record."""
    seen = [[], []]
    while replay.write_count < 6000:
        batch = replay.sample()
        position = batch["context", "position"][:, None] + torch.arange(8)
        assert torch.equal(batch["action"][..., 0].long(), position)
        assert (batch["reward"] == batch["context", "stream"][:, None, None]).all()
        replay.write_context(batch["context", "stream"], batch["context", "position"], make_latents(7))
        for record in replay.read_new(["action"]):
            seen[record["stream"]].append(int(record["action"][0]))
        if replay.write_count >= 1000:
            replay.release()
    replay.close()
    assert seen[0] and seen[1]
    for positions in seen:
        assert positions == sorted(set(positions))


def start_waiting_writer(rings: RecordRings, pid) -> None:
    writer = mp.get_context("spawn").Process(target=write_from_process, args=([rings], 0, 0, 40))
    writer.start()
    pid.value = writer.pid
    while rings.write_count < 20:
        time.sleep(1e-2)
    psutil.Process().kill()


@pytest.mark.slow
def test_a_waiting_writer_ends_with_its_parent():
    replay = make_replay()
    replay.share()
    replay.write_limit = 20
    context = mp.get_context("spawn")
    pid = context.Value("i", 0)
    parent = context.Process(target=start_waiting_writer, args=(replay, pid))
    parent.start()
    parent.join(timeout=60)
    assert parent.exitcode == -9
    deadline = time.monotonic() + 20
    while replay.write_count < 40 and time.monotonic() < deadline:
        time.sleep(1e-2)
    assert replay.write_count == 40


class CountingEnv(EnvBase):
    """Counts its steps; the observation is the count."""

    def __init__(self, stream: int) -> None:
        super().__init__(batch_size=[])
        self.stream, self.steps = stream, 0
        self.observation_spec = Composite(observation=Unbounded(1), stream=Unbounded(1, dtype=torch.int64))
        self.action_spec, self.reward_spec = Unbounded(2), Unbounded(1)

    def _observe(self, **entries: torch.Tensor) -> TensorDict:
        done = {"done": torch.zeros(1, dtype=torch.bool), "stream": torch.tensor([self.stream])}
        return TensorDict({"observation": torch.full((1,), float(self.steps)), **done, **entries})

    def _reset(self, tensordict=None) -> TensorDict:
        return self._observe()

    def _step(self, tensordict) -> TensorDict:
        self.steps += 1
        return self._observe(reward=torch.ones(1))

    def _set_seed(self, seed) -> None:
        pass


def select_records(rollout: TensorDict) -> TensorDict:
    return rollout["next"].select("observation", "reward", "stream")


@pytest.mark.slow
def test_torchrl_workers_write_into_it():
    record = TensorDict({"observation": torch.zeros(1), "reward": torch.zeros(1)})
    replay = make_replay(record=record, context_keys=(), capacity=1000)
    replay.write_limit = 150
    collector = MultiAsyncCollector(
        [partial(CountingEnv, stream) for stream in range(2)],
        RandomPolicy(Unbounded(2)),
        frames_per_batch=20,
        total_frames=-1,
        replay_buffer=replay,
        postproc=select_records,
    )
    try:
        collector.start()
        deadline = time.monotonic() + 60
        while replay.write_count < 300 and time.monotonic() < deadline:
            time.sleep(1e-2)
        time.sleep(0.2)
        assert 300 <= replay.write_count <= 340
        counts = replay.sample()["observation"][..., 0]  # [B, T]
        assert (counts.diff(dim=1) == 1).all()
    finally:
        replay.release()
        collector.async_shutdown()
