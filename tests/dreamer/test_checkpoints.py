"""Checkpoints: a run that was saved and loaded goes on bit by bit as if nothing had happened."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamer.checkpoints import SaveCheckpoint, load_checkpoint
from dreamer.hooks import EpisodeStats, UpdateRatio
from dreamer.trainer import Trainer
from tests.helpers import differing, make_run, optimiser_state, snapshot

RUN = ("optimization.warmup_steps=15",)  # the learning rate is on its way up when the checkpoint is made


def fill(trainer: Trainer, batches: int = 8) -> None:
    """Collect without learning."""
    for _, batch in zip(range(batches), trainer._batches(), strict=False):
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
        SaveCheckpoint(whole, tmp_path / "checkpoint", interval=0, replay=True).save()
        halfway = everything(whole, tmp_path / "halfway")
        update(whole, 10)
        expected = everything(whole, tmp_path / "expected")

        other = run("other", "seed=1")  # other weights, records and random numbers before the checkpoint is loaded
        fill(other, 3)
        load_checkpoint(other, tmp_path / "checkpoint")
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
        SaveCheckpoint(trainer, tmp_path / "checkpoint", interval=0, replay=True).save()
        assert not differing(everything(trainer, tmp_path / "after"), before)

    def test_hooks_remember(self, run, tmp_path):
        """The fraction of an update that is owed, and the episodes that are under way."""
        trainer, other = run("run"), run("other", "seed=1")
        fill(trainer, 5)
        trainer._pre_optim_hook()
        SaveCheckpoint(trainer, tmp_path / "checkpoint", interval=0, replay=True).save()
        load_checkpoint(other, tmp_path / "checkpoint")
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
        SaveCheckpoint(trainer, tmp_path / "checkpoint", interval=0, replay=False).save()
        load_checkpoint(other, tmp_path / "checkpoint", replay=False)
        assert not differing(snapshot(other.collector.policy.policy), snapshot(trainer.collector.policy.policy))
        learner = {p.data_ptr() for p in other.loss_module.parameters()}
        assert all(p.data_ptr() in learner for p in other.collector.policy.policy.parameters())

    def test_without_the_records(self, run, tmp_path):
        trainer, other = run("run"), run("other", "seed=1")
        fill(trainer)
        update(trainer, 2)
        SaveCheckpoint(trainer, tmp_path / "checkpoint", interval=0, replay=False).save()
        load_checkpoint(other, tmp_path / "checkpoint", replay=False)
        assert not differing(snapshot(other.loss_module), snapshot(trainer.loss_module))
        assert other.replay_buffer.write_count == 0 and other.update_count == 2


class TestFolder:
    def test_a_new_checkpoint_takes_the_place_of_the_old_one(self, run, tmp_path):
        trainer = run("run")
        fill(trainer)
        save = SaveCheckpoint(trainer, tmp_path / "folder" / "checkpoint", interval=0, replay=True)
        save.save()
        update(trainer, 1)
        save.save()
        assert [path.name for path in (tmp_path / "folder").iterdir()] == ["checkpoint"]
        other = run("other")
        load_checkpoint(other, tmp_path / "folder" / "checkpoint")
        assert other.update_count == 1

    def test_a_save_that_fails_leaves_the_old_one(self, run, tmp_path, monkeypatch):
        trainer = run("run")
        fill(trainer)
        save = SaveCheckpoint(trainer, tmp_path / "checkpoint", interval=0, replay=True)
        save.save()
        update(trainer, 1)

        def fail(path):
            raise OSError("no space left on device")

        monkeypatch.setattr(trainer.replay_buffer, "dump", fail)
        with pytest.raises(OSError, match="no space left"):
            save.save()
        other = run("other")
        load_checkpoint(other, tmp_path / "checkpoint")
        assert other.update_count == 0 and other.replay_buffer.write_count == trainer.replay_buffer.write_count

    def test_every_interval(self, run, tmp_path):
        trainer, path = run("run"), tmp_path / "checkpoint"
        save, saved = SaveCheckpoint(trainer, path, interval=100, replay=False), []
        for trainer.collected_frames in (50, 99, 120, 150, 200):
            save()
            if path.exists():
                saved.append(trainer.collected_frames)
                shutil.rmtree(path)
        assert saved == [120, 200]

    def test_another_model_is_refused(self, run, tmp_path):
        trainer, other = run("run"), run("other", "agent.size.units=8")
        SaveCheckpoint(trainer, tmp_path / "checkpoint", interval=0, replay=False).save()
        with pytest.raises(RuntimeError, match="size mismatch"):
            load_checkpoint(other, tmp_path / "checkpoint", replay=False)
