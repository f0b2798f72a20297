"""Checkpoints: a run that was saved and loaded goes on bit by bit as if nothing had happened."""

import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchrl.checkpoint import Checkpoint

from dreamer.checkpoint_files import Damaged, find_checkpoint, verify
from dreamer.checkpoints import SaveCheckpoint, TensorsAndJSON, load_checkpoint, load_weights
from dreamer.hooks import EpisodeStats, UpdateRatio
from dreamer.trainer import Trainer
from tests.dreamer.replay_records import assert_equal, make_replay
from tests.dreamer.replay_records import fill as fill_replay
from tests.helpers import differing, make_run, optimiser_state, snapshot

RUN = ("optimization.warmup_steps=15",)  # the learning rate is on its way up when the checkpoint is made


def make_save(trainer: Any, folder: Path, **overrides: Any) -> SaveCheckpoint:
    settings = {"interval": 0, "replay": True, "keep": 2}
    return SaveCheckpoint(trainer, folder / "checkpoints", **settings | overrides)


def fill(trainer: Trainer, batches: int = 8) -> None:
    """Collect without learning."""
    for _, batch in zip(range(batches), trainer.turns, strict=False):
        trainer._pre_steps_log_hook(batch)


def update(trainer: Trainer, count: int) -> None:
    """Make ``count`` updates on the records that are there, with all that belongs to an update."""
    for op, _ in list(trainer._pre_optim_ops):
        trainer._pre_optim_ops.remove((op, _))  # the ratio would owe none without new records
    trainer.optim_steps_per_batch = count
    trainer.optim_steps(None)


def everything(trainer: Trainer, folder: Path) -> dict[str, torch.Tensor]:
    """All state of a run as tensors by name: what must be equal for the future to be equal."""
    trainer.replay_buffer.dump(folder)
    replay = {
        f"replay/{path.name}": torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        for path in folder.iterdir()
    }
    counters = {"frames": trainer.collected_frames, "updates": trainer.update_count}
    generators = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.random.get_state()[1].astype(np.int64)),
        "python": torch.tensor(random.getstate()[1]),
    }
    return (
        {f"loss/{name}": value for name, value in snapshot(trainer.loss_module).items()}
        | {f"optimiser/{name}": value.clone() for name, value in optimiser_state(trainer).items()}
        | {name: torch.tensor(value) for name, value in counters.items()}
        | replay
        | generators
    )


@pytest.fixture
def run(tmp_path):
    """Makes runs in folders of their own, and ends them."""
    trainers = []

    def make(name: str, *overrides: str) -> Trainer:
        trainers.append(make_run(tmp_path / name, *RUN, *overrides))
        return trainers[-1]

    yield make
    for trainer in trainers:
        trainer.collector.shutdown()


class TestGoesOn:
    def test_ten_and_ten_updates_are_twenty(self, run, tmp_path):
        """Networks, slow critic, statistics of the returns, optimiser, counters, records, cursor and generators."""
        whole = run("whole")
        fill(whole)
        update(whole, 10)
        path = make_save(whole, tmp_path).save()
        halfway = everything(whole, tmp_path / "halfway")
        update(whole, 10)
        expected = everything(whole, tmp_path / "expected")

        other = run("other", "seed=1")  # other weights, records and random numbers before the checkpoint is loaded
        fill(other, 3)
        load_checkpoint(other, path)
        assert not differing(everything(other, tmp_path / "loaded"), halfway)
        update(other, 10)
        actual = everything(other, tmp_path / "actual")
        assert not differing(actual, expected)
        assert other.update_count == 20
        moved = set(differing(expected, halfway))
        assert {"loss/actor_critic.slow_critic.0.0.0.weight", "loss/actor_critic.return_norm.high"} <= moved
        assert {"optimiser/0/rms", "optimiser/0/momentum", "optimiser/step/0", "torch", "updates"} <= moved
        assert "replay/belief.bin" in moved and "replay/action.bin" not in moved

    def test_saving_changes_nothing(self, run, tmp_path):
        trainer = run("run")
        fill(trainer)
        update(trainer, 2)
        before = everything(trainer, tmp_path / "before")
        make_save(trainer, tmp_path).save()
        assert not differing(everything(trainer, tmp_path / "after"), before)

    def test_hooks_remember(self, run, tmp_path):
        """The fraction of an update that is owed, and the episodes that are under way."""
        trainer, other = run("run"), run("other", "seed=1")
        fill(trainer, 5)
        trainer._pre_optim_hook()
        load_checkpoint(other, make_save(trainer, tmp_path).save())
        for name in (EpisodeStats.__name__, UpdateRatio.__name__):
            assert other._modules[name].state_dict() == trainer._modules[name].state_dict()
        assert any(trainer._modules["EpisodeStats"].state_dict()["steps"])
        assert other.collected_frames == trainer.collected_frames == trainer.replay_buffer.write_count
        owed = []
        for each in (trainer, other):
            each._pre_optim_hook()
            owed.append(each.optim_steps_per_batch)
        assert owed == [0, 0]  # no burst

    def test_the_acting_policy_has_the_loaded_weights(self, run, tmp_path):
        """It shares them with the learner: loading must fill them in place."""
        trainer, other = run("run"), run("other", "seed=1")
        load_checkpoint(other, make_save(trainer, tmp_path, replay=False).save())
        assert not differing(snapshot(other.collector.policy.policy), snapshot(trainer.collector.policy.policy))
        learner = {p.data_ptr() for p in other.loss_module.parameters()}
        assert all(p.data_ptr() in learner for p in other.collector.policy.policy.parameters())

    def test_without_the_records(self, run, tmp_path):
        trainer, other = run("run"), run("other", "seed=1")
        fill(trainer)
        update(trainer, 2)
        load_checkpoint(other, make_save(trainer, tmp_path, replay=False).save())
        assert not differing(snapshot(other.loss_module), snapshot(trainer.loss_module))
        assert other.replay_buffer.write_count == 0 and other.update_count == 2

    def test_another_model_is_refused(self, run, tmp_path):
        trainer, other = run("run"), run("other", "agent.size.units=8")
        path = make_save(trainer, tmp_path, replay=False).save()
        for load in (lambda: load_checkpoint(other, path), lambda: load_weights(other.loss_module, path)):
            with pytest.raises(RuntimeError, match="size mismatch"):
                load()

    def test_weights_alone(self, run, tmp_path):
        trainer, other = run("run"), run("other", "seed=1")
        trainer.collected_frames = 12
        manifest = load_weights(other.loss_module, make_save(trainer, tmp_path, replay=False).save())
        assert not differing(snapshot(other.loss_module), snapshot(trainer.loss_module))
        assert manifest["frames"] == 12 and other.collected_frames == 0


class Part:
    """A hook whose state is any value."""

    def __init__(self, value: Any = None):
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.value = state_dict["value"]


class SmallTrainer:
    """What a checkpoint needs of a trainer."""

    def __init__(self, value: Any = None, *, records: int = 30):
        self.loss_module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        self.replay_buffer = make_replay()
        fill_replay(self.replay_buffer, 0, 0, records)
        self.collected_frames = self._optim_count = self.pending_updates = self.further_frames = 0
        self._modules = {"Part": Part(value), "without_state": object()}
        self.incidents: list[tuple[str, str]] = []

    @property
    def update_count(self) -> int:
        return self._optim_count

    def busy(self) -> bool:
        return self.pending_updates > 0

    def incident(self, kind: str, message: str) -> None:
        self.incidents.append((kind, message))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestState:
    @pytest.mark.parametrize(
        "value",
        [
            [None, True, 0, -3, 0.1, float("inf"), "text", {}, [], (), [[]], (1, (2,)), {"a": {0: {1.5: None}}}],
            torch.Size([2, 3]),
            2**80,
        ],
    )
    def test_plain_values(self, tmp_path, value):
        other = SmallTrainer()
        load_checkpoint(other, make_save(SmallTrainer(value), tmp_path, replay=False).save())
        assert other._modules["Part"].value == value and repr(other._modules["Part"].value) == repr(value)

    def test_tensors(self, tmp_path):
        generator = torch.Generator().manual_seed(0)
        tensors = {
            "uint8": torch.arange(250, dtype=torch.uint8).reshape(5, 50).T,  # not contiguous
            "bool": torch.arange(7) % 3 == 0,
            "bfloat16": torch.randn(3, 3, generator=generator).bfloat16(),
            "float64": torch.tensor([float("nan"), -0.0, 1e-310], dtype=torch.float64),
            "int64": torch.tensor(-(2**62)),
            "none": torch.zeros(0, 4, dtype=torch.float16),
            "parameter": nn.Parameter(torch.ones(2)),
            "complex": torch.randn(2, dtype=torch.complex64, generator=generator),
        }
        trainer, other = SmallTrainer({"nested": [{"tensors": tensors}, 1]}), SmallTrainer()
        load_checkpoint(other, make_save(trainer, tmp_path, replay=False).save())
        loaded, one = other._modules["Part"].value["nested"]
        assert one == 1 and loaded["tensors"].keys() == tensors.keys()
        for name, tensor in loaded["tensors"].items():
            expected = tensors[name].detach()
            assert tensor.dtype == expected.dtype and tensor.shape == expected.shape and not tensor.requires_grad
            assert torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (tensor, expected))), name

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ({"a": [1, np.int64(3)]}, r"Part.value.a.1 is a int64: use tensors, numbers"),
            ({"a": {(1, 2): 3}}, r"Part.value.a has the key \(1, 2\)"),
            ({1, 2}, r"Part.value is a set"),
            (make_replay().read_new(["reward"]), r"Part.value is a TensorDict"),
        ],
    )
    def test_other_values_are_refused(self, tmp_path, value, message):
        with pytest.raises(TypeError, match=message):
            make_save(SmallTrainer(value), tmp_path).save()
        assert names(tmp_path / "checkpoints") == []

    def test_versions_of_modules_are_kept(self, tmp_path):
        checkpoint = Checkpoint().register("loss", nn.BatchNorm1d(2), adapter=TensorsAndJSON()).save(tmp_path / "one")
        part = Part()
        part.load_state_dict = lambda state: setattr(part, "value", state)
        Checkpoint().register("loss", part, adapter=TensorsAndJSON()).load(checkpoint)
        assert part.value._metadata[""]["version"] == nn.BatchNorm1d._version

    def test_counters_and_manifest(self, tmp_path):
        trainer, other = SmallTrainer(), SmallTrainer(records=0)
        trainer.collected_frames, trainer._optim_count, trainer.pending_updates = 80, 30, 2
        trainer.further_frames = 7
        manifest = load_checkpoint(other, make_save(trainer, tmp_path).save())
        assert (other.collected_frames, other._optim_count, other.pending_updates) == (80, 30, 2)
        assert other.further_frames == 7
        assert (manifest["frames"], manifest["updates"], manifest["replay"], manifest["busy"]) == (80, 30, True, True)
        assert_equal(other.replay_buffer.sample(), trainer.replay_buffer.sample())

    def test_records_that_were_not_saved_or_are_not_wanted(self, tmp_path):
        path = make_save(SmallTrainer(), tmp_path, replay=False).save()
        other = SmallTrainer(records=0)
        assert load_checkpoint(other, path)["replay"] is False and len(other.replay_buffer) == 0
        path = make_save(SmallTrainer(), tmp_path).save()
        assert load_checkpoint(other, path, replay=False)["replay"] is True and len(other.replay_buffer) == 0

    def test_damaged(self, tmp_path):
        path = make_save(SmallTrainer(), tmp_path).save()
        file = next(path.rglob("pixels.bin"))
        file.write_bytes(file.read_bytes()[:-1])
        other = SmallTrainer()
        before = snapshot(other.loss_module)
        with pytest.raises(Damaged, match=r"pixels.bin has"):
            load_checkpoint(other, path)
        assert not differing(snapshot(other.loss_module), before)


class TestSave:
    def test_every_interval_and_rotation(self, tmp_path):
        trainer, folder = SmallTrainer(), tmp_path / "checkpoints"
        save, seen = make_save(trainer, tmp_path, interval=100, replay=False), []
        for trainer.collected_frames in (50, 99, 120, 150, 200, 310, 310):
            save()
            seen.append(names(folder) if folder.exists() else [])
        first, second, third = [["frames_120"], ["frames_120", "frames_200"], ["frames_200", "frames_310"]]
        assert seen == [[], [], first, first, second, third, third]

    def test_the_same_frames_again(self, tmp_path):
        trainer = SmallTrainer()
        save = make_save(trainer, tmp_path)
        save.save()
        trainer._optim_count = 1
        assert verify(save.save())["updates"] == 1
        assert names(tmp_path / "checkpoints") == ["frames_0"]

    def test_files(self, tmp_path):
        path = make_save(SmallTrainer(), tmp_path, files={"config.yaml": "seed: 1\n", "policy.json": "{}"}).save()
        assert (path / "config.yaml").read_text() == "seed: 1\n"
        assert {"config.yaml", "policy.json"} <= verify(path)["files"].keys()

    def test_best(self, tmp_path):
        trainer, folder, best = SmallTrainer(), tmp_path / "checkpoints", [None]
        save = make_save(trainer, tmp_path, best=lambda: best[0])
        updates = []
        for trainer._optim_count, best[0] in enumerate([None, (10, 1.5), (10, 1.5), (30, 2.5)]):
            save()
            updates.append(verify(folder / "best")["updates"] if (folder / "best").exists() else None)
        assert updates == [None, 1, 1, 3] and names(folder) == ["best"]
        manifest = verify(folder / "best")
        assert (manifest["evaluated_frames"], manifest["evaluated_return"]) == (30, 2.5)
        assert manifest["replay"] is False and not list(folder.rglob("pixels.bin"))
        best[0] = (40, 3.0)
        save.save()
        assert verify(folder / "best")["evaluated_return"] == 3.0 and names(folder) == ["best", "frames_0"]
        best[0], trainer._optim_count = (0, 3.0), 9

        other = make_save(SmallTrainer(), tmp_path, best=lambda: (40, 3.0))
        state = save.state_dict()
        other.load_state_dict(json.loads(json.dumps(state)))
        assert other.state_dict() == state
        other()  # it was saved already
        assert verify(folder / "best")["updates"] == 3

    def test_is_due_when_it_was(self, tmp_path):
        trainer, folder = SmallTrainer(), tmp_path / "checkpoints"
        save, same, changed = (make_save(trainer, tmp_path, interval=interval) for interval in (100, 100, 70))
        trainer.collected_frames = 130
        save()
        for other in (same, changed):
            other.load_state_dict(save.state_dict())
        trainer.collected_frames = 150
        same()
        assert names(folder) == ["frames_130"]
        changed()  # at once, because another interval was asked for
        assert names(folder) == ["frames_130", "frames_150"]

    def test_failures_do_not_end_the_run(self, tmp_path, monkeypatch):
        trainer, folder = SmallTrainer(), tmp_path / "checkpoints"
        best = [(10, 1.0)]
        save = make_save(trainer, tmp_path, interval=100, best=lambda: best[0])
        save.save()

        def fail(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(trainer.replay_buffer, "dump", fail)
            for trainer.collected_frames in (100, 150, 230):
                save()
            assert [kind for kind, _ in trainer.incidents] == ["checkpoint_failed"] * 2
            message = f"frames_100 cannot be saved in {folder}: No space left on device (at least {30 * 71:,} bytes"
            assert message in trainer.incidents[0][1]
            with pytest.raises(OSError, match="frames_230 cannot be saved"):
                save.save()
        with monkeypatch.context() as patch:
            patch.setattr(trainer._modules["Part"], "state_dict", lambda: fail(None))
            best[0] = (240, 2.0)
            for trainer.collected_frames in (240, 250):
                save()
        assert [message.split()[3] for _, message in trainer.incidents] == ["frames_100", "frames_230", "best"]
        assert names(folder) == ["best", "frames_0"] and not find_checkpoint(folder)[1]
        trainer.collected_frames = 300
        save()
        assert names(folder) == ["best", "frames_0", "frames_300"]
        assert verify(folder / "best")["evaluated_return"] == 2.0
