"""AnnotateReplay: which records get which masks, the thread, the metrics, and a resume."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from tensordict import TensorDict

from dreamer.annotation import AnnotateReplay
from dreamer.checkpoints import TensorsAndJSON
from dreamer.labellers import Labeller, Labels
from dreamer.replay import SequenceReplay
from dreamer.replay_storage import RecordRings

SIZE = 16


class Bright(Labeller):
    """Marks what is not black, and remembers what it saw. Its version counts its calls."""

    def __init__(self):
        super().__init__("bright")
        self.calls, self.generator = [], torch.Generator().manual_seed(0)

    def label(self, frames):
        self.calls.append(frames)
        mask = (frames["pixels"][..., :1] > 0).to(torch.uint8) * 255
        version = torch.full((len(frames),), len(self.calls))
        return Labels(mask, torch.ones(len(frames), dtype=torch.bool), version)

    def metrics(self):
        return {"calls": float(len(self.calls))}


class Gated(Bright):
    """Waits in the thread until it may go on."""

    def __init__(self):
        super().__init__()
        self.entered, self.may_go = threading.Semaphore(0), threading.Semaphore(0)

    def label(self, frames):
        self.entered.release()
        assert self.may_go.acquire(timeout=30)
        return super().label(frames)


class Broken(Bright):
    def label(self, frames):
        raise ArithmeticError("no mask today")


def make_replay(streams: int = 1, capacity: int = 400, true_mask: bool = False, **overrides) -> SequenceReplay:
    record = {
        "pixels": torch.zeros(SIZE, SIZE, 3, dtype=torch.uint8),
        "mask": torch.zeros(SIZE, SIZE, 1, dtype=torch.uint8),
        "mask_valid": torch.zeros(1, dtype=torch.bool),
        "mask_version": torch.zeros(1, dtype=torch.int64),
        "done": torch.zeros(1, dtype=torch.bool),
    }
    if true_mask:
        record["true_mask"] = torch.zeros(SIZE, SIZE, 1, dtype=torch.bool)
    settings = {"capacity": capacity, "num_streams": streams, "batch_size": 2, "sequence_length": 4, "context_keys": ()}
    return SequenceReplay(TensorDict(record), **settings | overrides)


def write(replay: RecordRings, count: int, stream: int = 0, rows: int = 8, true_rows: int | None = None) -> None:
    """Append frames whose first ``rows`` rows are bright, as bright as their position modulo 255 plus one."""
    first, shape = int(replay.stream_counts[stream]), (SIZE, SIZE, 1)
    records = TensorDict(
        {
            "pixels": torch.zeros(count, SIZE, SIZE, 3, dtype=torch.uint8),
            "mask": torch.zeros(count, *shape, dtype=torch.uint8),
            "mask_valid": torch.zeros(count, 1, dtype=torch.bool),
            "mask_version": torch.zeros(count, 1, dtype=torch.int64),
            "done": torch.ones(count, 1, dtype=torch.bool),
            "stream": torch.full((count,), stream),
        },
        [count],
    )
    records["pixels"][:, :rows] = ((first + torch.arange(count)) % 255 + 1).to(torch.uint8)[:, None, None, None]
    if true_rows is not None:
        records["true_mask"] = (torch.arange(SIZE) < true_rows)[None, :, None, None].repeat(count, 1, SIZE, 1)
    for part in records.split(10):
        replay.extend(part)


def make(replay: SequenceReplay, labeller: Labeller, frames_per_update: int = 4, asynchronous: bool = False):
    """A trainer that only takes what it gets, and the hook in it."""
    trainer = SimpleNamespace(replay_buffer=replay, ops=[], modules={}, images=[], incidents=[], collected_frames=30)
    trainer.run_dir = Path("runs/one")
    trainer.register_op = lambda stage, op: trainer.ops.append((stage, op))
    trainer.register_module = trainer.modules.__setitem__
    trainer.logger = SimpleNamespace(log_image=lambda *image: trainer.images.append(image))
    trainer.incident = lambda *incident: trainer.incidents.append(incident)
    hook = AnnotateReplay(labeller, frames_per_update=frames_per_update, asynchronous=asynchronous)
    hook.register(trainer)
    return trainer, hook


def read(replay: SequenceReplay) -> TensorDict:
    """All records of a replay that nobody read before."""
    return replay.read_new(["pixels", "mask", "mask_valid", "mask_version"])


def labelled_positions(replay: SequenceReplay) -> list[int]:
    unset = replay.newest(10_000, [], unset="mask_valid")["position"].tolist()
    return sorted(set(range(replay.write_count)) - set(unset))


class TestRecords:
    def test_newest_first_and_no_more_than_allowed(self):
        replay, labeller = make_replay(streams=2), Bright()
        write(replay, 5), write(replay, 3, stream=1)
        _, hook = make(replay, labeller, frames_per_update=3)
        batch = replay.sample()
        for _ in range(4):
            hook(batch)
        tags = [call["pixels"][:, 0, 0, 0].tolist() for call in labeller.calls]  # position + 1
        streams = [call["stream"].tolist() for call in labeller.calls]
        assert tags == [[5, 3, 4], [2, 3, 1], [2, 1]]
        assert streams == [[0, 1, 0], [1, 0, 1], [0, 0]]
        assert hook(batch).keys() == {"segmentation/labelled"}

    def test_what_is_written(self):
        replay = make_replay()
        write(replay, 8)
        _, hook = make(replay, Bright(), frames_per_update=2)
        for _ in range(2):
            hook(replay.sample())
        records = read(replay)
        assert records["mask_valid"][:, 0].tolist() == [False] * 4 + [True] * 4
        assert records["mask_version"][:, 0].tolist() == [0] * 4 + [2, 2, 1, 1]
        assert (records["mask"][4:, :8] == 255).all() and not records["mask"][4:, 8:].any()
        assert not records["mask"][:4].any()

    def test_frames_that_are_put_off_come_again(self):
        class Choosy(Bright):
            def label(self, frames):
                labels = super().label(frames)
                return labels._replace(done=frames["pixels"][:, 0, 0, 0] % 2 == 0)  # odd positions

        replay, labeller = make_replay(), Choosy()
        write(replay, 8)
        _, hook = make(replay, labeller, frames_per_update=4)
        for _ in range(2):
            hook(replay.sample())
        assert labelled_positions(replay) == [3, 5, 7]
        assert labeller.calls[1]["position"].tolist() == [6, 4, 3, 2]

    def test_examples_are_spread_over_what_there_is(self):
        class Curious(Bright):
            seen = None

            @property
            def examples(self):
                return 0 if self.seen else 5

            def prepare(self, frames):
                self.seen = frames["position"].tolist()

        replay, labeller = make_replay(), Curious()
        write(replay, 41)
        _, hook = make(replay, labeller)
        hook(replay.sample())
        assert labeller.seen == [40, 30, 20, 10, 0] and len(labeller.calls[0]) == 4
        labeller.seen = [0]
        hook(replay.sample())
        assert labeller.seen == [0]

    def test_bad_settings(self):
        with pytest.raises(ValueError, match="frames_per_update=0"):
            AnnotateReplay(Bright(), frames_per_update=0)


class TestThread:
    def test_an_update_never_waits(self):
        replay, labeller = make_replay(), Gated()
        write(replay, 20)
        trainer, hook = make(replay, labeller, asynchronous=True)
        assert [stage for stage, _ in trainer.ops] == ["post_optim_log", "shutdown"]
        for _ in range(5):
            assert hook(replay.sample()).keys() == {"segmentation/labelled"}
        assert labeller.entered.acquire(timeout=30) and not labeller.entered.acquire(blocking=False), "one at a time"
        assert labelled_positions(replay) == []
        labeller.may_go.release()
        hook.job.exception(timeout=30)
        assert hook(replay.sample())["segmentation/late"] == 0
        assert labelled_positions(replay) == [16, 17, 18, 19]
        labeller.may_go.release()
        hook.finish()
        assert labelled_positions(replay) == list(range(12, 20)), "the last batch is not lost"

    def test_records_that_were_overwritten_meanwhile_are_left_alone(self):
        replay, labeller = make_replay(capacity=40), Gated()
        write(replay, 40)
        _, hook = make(replay, labeller, asynchronous=True)
        hook(replay.sample())
        write(replay, 38, rows=2)  # the batch was 36..39
        labeller.may_go.release()
        hook.job.exception(timeout=30)
        assert hook(replay.sample())["segmentation/late"] == 2
        records = read(replay)
        assert records["mask_valid"][:, 0].nonzero().flatten().tolist() == [0, 1]  # positions 38 and 39
        labeller.may_go.release()
        hook.finish()

    def test_an_error_surfaces_in_the_next_call(self):
        replay = make_replay()
        write(replay, 20)
        _, hook = make(replay, Broken(), asynchronous=True)
        hook(replay.sample())
        hook.job.exception(timeout=30)
        with pytest.raises(ArithmeticError, match="no mask today"):
            hook(replay.sample())
        hook(replay.sample())
        with pytest.raises(ArithmeticError):
            hook.finish()

    def test_an_error_without_a_thread(self):
        replay = make_replay()
        write(replay, 20)
        trainer, hook = make(replay, Broken())
        assert [stage for stage, _ in trainer.ops] == ["post_optim_log", "shutdown"]
        with pytest.raises(ArithmeticError, match="no mask today"):
            hook(replay.sample())

    def test_the_state_is_that_of_after_the_batch_under_way(self):
        class Learning(Gated):
            def state_dict(self):
                return {"calls": len(self.calls)}

        replay, labeller = make_replay(), Learning()
        write(replay, 20)
        _, hook = make(replay, labeller, asynchronous=True)
        hook(replay.sample())
        assert labeller.entered.acquire(timeout=30)
        labeller.may_go.release()
        assert hook.state_dict()["labeller"] == {"calls": 1}
        hook.finish()


class TestEnd:
    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_what_was_learned_stays_in_the_run_folder(self, asynchronous):
        class Learned(Bright):
            def export(self, folder):
                self.exported = folder, len(self.calls)

        replay, labeller = make_replay(), Learned()
        write(replay, 20)
        trainer, hook = make(replay, labeller, asynchronous=asynchronous)
        hook(replay.sample())
        (end,) = (op for stage, op in trainer.ops if stage == "shutdown")
        end()
        assert labeller.exported == (trainer.run_dir, 1), "after the batch under way"
        assert labelled_positions(replay) == [16, 17, 18, 19]


class TestMetrics:
    def test_share_of_the_sample_and_of_nonempty_masks(self):
        replay = make_replay()
        write(replay, 3), write(replay, 1, rows=0)
        _, hook = make(replay, Bright())
        valid = torch.tensor([True, False, False, False])[:, None]
        metrics = hook(TensorDict({"pixels": torch.zeros(4, 1), "mask_valid": valid}, [4]))
        assert metrics["segmentation/labelled"] == 0.25 and metrics["segmentation/presence"] == 0.75
        assert metrics["segmentation/calls"] == 1 and metrics["segmentation/frames_per_second"] > 0
        assert metrics.keys() >= {"segmentation/late"} and "segmentation/iou" not in metrics

    def test_against_the_simulator(self):
        """Rows 0..7 are marked, rows 0..9 are true: 8 of 10."""
        replay = make_replay(true_mask=True)
        write(replay, 6, true_rows=10)
        _, hook = make(replay, Bright())
        metrics = hook(replay.sample())
        assert metrics["segmentation/iou"].item() == pytest.approx(0.8)
        assert metrics["segmentation/recall"].item() == pytest.approx(0.8)

    def test_random_numbers_of_training_stay(self):
        class Drawing(Bright):
            def label(self, frames):
                torch.rand(3)
                return super().label(frames)

        replay = make_replay()
        write(replay, 6)
        _, hook = make(replay, Drawing())
        before = torch.random.get_rng_state()
        hook(replay.sample())
        assert torch.equal(torch.random.get_rng_state(), before)


class TestFirstLook:
    def test_one_contact_sheet(self):
        replay = make_replay()
        write(replay, 60)
        trainer, hook = make(replay, Bright(), frames_per_update=6)
        for _ in range(8):
            hook(replay.sample())
        ((name, sheet, frames),) = trainer.images
        assert (name, frames) == ("segmentation/contact_sheet", 30)
        assert sheet.shape == (4 * SIZE, 4 * 2 * SIZE, 3) and sheet.dtype == torch.uint8
        tiles = sheet.unflatten(0, (4, SIZE)).unflatten(2, (4, 2 * SIZE)).transpose(1, 2).flatten(0, 1)
        assert tiles[:, 0, 0, 0].tolist() == list(range(60, 44, -1)), "the first 16, newest first"
        assert torch.equal(tiles[:, :8, SIZE:], tiles[:, :8, :SIZE]), "the foreground stays"
        assert (tiles[:, 8:, SIZE:, 2] > tiles[:, 8:, :SIZE, 2]).all(), "the background turns blue"
        assert not trainer.incidents

    @pytest.mark.parametrize(("empty", "told"), [(50, 0), (52, 1), (98, 1)])
    def test_low_presence_is_told_once(self, empty, told):
        replay = make_replay()
        write(replay, 300), write(replay, 100 - empty), write(replay, empty, rows=0)
        trainer, hook = make(replay, Bright(), frames_per_update=20)
        for _ in range(10):
            hook(replay.sample())
        assert len(trainer.incidents) == told
        for kind, message in trainer.incidents:
            assert kind == "low_presence" and f"only {100 - empty} of 100 frames" in message
            assert "images/segmentation_contact_sheet" in message and "agent.segmentation.prompt" in message


class TestResume:
    def test_goes_on_to_the_bit(self, tmp_path):
        class Random(Bright):
            """Its masks depend on all that it did before."""

            def label(self, frames):
                labels = super().label(frames)
                noise = torch.randint(256, labels.mask.shape, dtype=torch.uint8, generator=self.generator)
                return labels._replace(mask=noise)

            def state_dict(self):
                return {"generator": self.generator.get_state()}

            def load_state_dict(self, state_dict):
                self.generator.set_state(state_dict["generator"])

        def go_on(replay, hook):
            for _ in range(5):
                write(replay, 3)
                hook(replay.sample())
            return replay.sample()

        replay = make_replay()
        write(replay, 60)
        trainer, hook = make(replay, Random(), frames_per_update=5)
        go_on(replay, hook)
        replay.dump(tmp_path / "replay")
        TensorsAndJSON().save(hook, tmp_path / "hook", args=(), kwargs={})
        expected = go_on(replay, hook)

        resumed = make_replay()
        resumed.load(tmp_path / "replay")
        other, again = make(resumed, Random(), frames_per_update=5)
        options = {"map_location": None, "tensor_load_kwargs": {}, "args": (), "kwargs": {}}
        TensorsAndJSON().load(again, tmp_path / "hook", **options)
        found = go_on(resumed, again)
        for key in ("pixels", "mask", "mask_valid"):
            assert torch.equal(found[key], expected[key]), key
        assert len(trainer.images) == 1 and not other.images, "one contact sheet in all"

    def test_in_the_middle_of_the_contact_sheet(self):
        replay = make_replay()
        write(replay, 60)
        trainer, hook = make(replay, Bright(), frames_per_update=10)
        hook(replay.sample())
        other, again = make(replay, Bright(), frames_per_update=10)
        again.load_state_dict(hook.state_dict())
        hook(replay.sample())
        again(replay.sample())
        ((_, sheet, _),) = trainer.images
        ((_, resumed, _),) = other.images
        assert torch.equal(sheet[:SIZE], resumed[:SIZE]) and resumed.shape == sheet.shape


def write_from_process(rings: RecordRings, count: int) -> None:
    torch.set_num_threads(1)
    for start in range(0, count, 5):
        write(rings, 5, rows=start % 13)


@pytest.mark.slow
def test_beside_a_writer_in_another_process():
    """A ring that is overwritten many times: every mask is that of its own frame."""
    replay = make_replay(capacity=60)
    write(replay, 20)
    replay.share()
    writer = mp.get_context("spawn").Process(target=write_from_process, args=(replay, 1000))
    writer.start()
    _, hook = make(replay, Bright(), frames_per_update=8, asynchronous=True)
    labelled = 0
    while writer.is_alive():
        batch = replay.sample()
        hook(batch)
        valid = batch["mask_valid"][..., 0]
        assert torch.equal(batch["mask"][valid] > 0, batch["pixels"][valid][..., :1] > 0)
        labelled += int(valid.sum())
        writer.join(timeout=1e-2)
    hook.finish()
    assert writer.exitcode == 0 and replay.write_count == 1020 and labelled > 100
