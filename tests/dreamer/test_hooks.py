"""The hooks: how many updates are owed, what is counted, and that looking at a run does not change it."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Unbounded

from dreamer.collection import ActingPolicy
from dreamer.evaluation import Episodes
from dreamer.hooks import EpisodeStats, Evaluate, Every, SyncPolicy, UpdateRatio, WriteBackContext
from dreamer.replay import SequenceReplay
from tests.helpers import differing, make_mock_parts, make_run, optimiser_state, set_episode_length, snapshot


def make_ratio(train_ratio: float = 512, start_steps: int = 0, ready: bool = True):
    """A trainer and a replay that only count, batches of 16 windows of 64 steps, and the hook."""
    replay = SimpleNamespace(batch_size=16, sequence_length=64, write_count=0, can_sample=lambda: ready)
    trainer = SimpleNamespace(replay_buffer=replay, optim_steps_per_batch=None)
    return trainer, UpdateRatio(trainer, train_ratio=train_ratio, start_steps=start_steps)


def owed(trainer, ratio, steps: int) -> int:
    """Updates owed after ``steps`` more steps."""
    trainer.replay_buffer.write_count += steps
    ratio()
    return trainer.optim_steps_per_batch


class TestUpdateRatio:
    @pytest.mark.parametrize("batch", [1, 3, 8, 64, None])
    def test_half_a_million_steps(self, batch):
        """500,000 steps, 512 replayed steps for each, 1024 steps per update: 250,000 updates, however they arrive."""
        trainer, ratio = make_ratio()
        generator, total, steps = random.Random(0), owed(*make_ratio(), 0), 0
        owed(trainer, ratio, 0)
        while steps < 500_000:
            arrived = min(batch or generator.randint(1, 200), 500_000 - steps)
            updates = owed(trainer, ratio, arrived)
            assert updates in (arrived // 2, arrived // 2 + 1)  # never more than half a step behind
            steps, total = steps + arrived, total + updates
        assert abs(total - 250_000) <= 1

    @pytest.mark.parametrize("train_ratio", [1, 32, 256, 1024, 4096])
    def test_other_ratios(self, train_ratio):
        trainer, ratio = make_ratio(train_ratio)
        total = sum(owed(trainer, ratio, 7) for _ in range(10_000))
        assert abs(total - 70_000 * train_ratio / 1024) <= 1 + 7 * train_ratio / 1024

    def test_no_burst_when_training_starts(self):
        """The 4000 steps collected before are not made up for: that would be 2000 updates at once."""
        trainer, ratio = make_ratio(start_steps=4000)
        assert [owed(trainer, ratio, 1000) for _ in range(3)] == [0, 0, 0]
        assert owed(trainer, ratio, 1000) == 1
        assert owed(trainer, ratio, 8) == 4

    def test_waits_for_a_window(self):
        trainer, ratio = make_ratio(ready=False)
        assert owed(trainer, ratio, 10_000) == 0

    def test_resumes_without_a_burst(self):
        trainer, ratio = make_ratio()
        for _ in range(101):
            owed(trainer, ratio, 3)
        other_trainer, other = make_ratio()
        other_trainer.replay_buffer.write_count = trainer.replay_buffer.write_count
        other.load_state_dict(json.loads(json.dumps(ratio.state_dict())))
        for steps in (3, 4, 5, 6):
            assert owed(other_trainer, other, steps) == owed(trainer, ratio, steps)

    def test_resumes_with_another_ratio(self):
        """The new setting counts; what was owed before is not made up for with it."""
        trainer, ratio = make_ratio(1024)
        for _ in range(5):
            owed(trainer, ratio, 3)
        other_trainer, other = make_ratio(2048)
        other_trainer.replay_buffer.write_count = trainer.replay_buffer.write_count
        other.load_state_dict(ratio.state_dict())
        assert owed(other_trainer, other, 10) == 20

    def test_resumes_with_an_empty_replay(self):
        """A checkpoint without records: counting starts anew; nothing is owed for the past, forwards or backwards."""
        trainer, ratio = make_ratio()
        owed(trainer, ratio, 0)
        owed(trainer, ratio, 100_000)
        other_trainer, other = make_ratio(start_steps=1000)
        other.load_state_dict(ratio.state_dict())
        other.restart()
        assert owed(other_trainer, other, 500) == 0
        assert owed(other_trainer, other, 500) in (0, 1)
        assert sum(owed(other_trainer, other, 8) for _ in range(100)) == pytest.approx(400, abs=1)


def make_stat_replay(streams: int = 2) -> SequenceReplay:
    record = {"reward": torch.zeros(1), "is_init": torch.zeros(1, dtype=torch.bool)}
    record["done"] = record["is_init"]
    return SequenceReplay(
        TensorDict(record), capacity=100, num_streams=streams, batch_size=1, sequence_length=4, context_keys=()
    )


def write(replay: SequenceReplay, *rows: tuple[int, float, str]) -> None:
    """Append records (stream, reward, "start", "end" or "")."""
    stream, reward, kind = zip(*rows, strict=True)
    column = {
        "stream": torch.tensor(stream),
        "reward": torch.tensor(reward),
        "is_init": torch.tensor([k == "start" for k in kind]),
        "done": torch.tensor([k == "end" for k in kind]),
    }
    replay.extend(TensorDict({key: value[:, None] for key, value in column.items()}, len(rows)))


class TestEpisodeStats:
    def test_two_streams(self):
        """Stream 0: 1 + 2 + 3 in three steps; stream 1: 10 in one. Two frames per step: lengths 6 and 2."""
        replay = make_stat_replay()
        stats = EpisodeStats(replay, frame_skip=2)
        assert stats() is None
        write(replay, (0, 0.0, "start"), (0, 1.0, ""), (1, 0.0, "start"), (0, 2.0, ""))
        assert stats() is None
        write(replay, (0, 3.0, "end"), (1, 10.0, "end"), (0, 0.0, "start"), (0, 5.0, ""))
        assert stats() == {"episode/return": 8.0, "episode/length": 4.0}
        write(replay, (0, 7.0, "end"), (1, 0.0, "start"))
        assert stats() == {"episode/return": 12.0, "episode/length": 4.0}
        assert stats() is None

    def test_what_was_cut_off_does_not_count(self):
        """A worker that was restarted begins a new episode: the rewards of the old one are dropped."""
        replay = make_stat_replay(1)
        stats = EpisodeStats(replay, frame_skip=1)
        write(replay, (0, 0.0, "start"), (0, 100.0, ""), (0, 0.0, "start"), (0, 1.0, "end"))
        assert stats() == {"episode/return": 1.0, "episode/length": 1.0}

    def test_goes_on_in_the_middle_of_an_episode(self):
        replay = make_stat_replay(1)
        stats = EpisodeStats(replay, frame_skip=1)
        write(replay, (0, 0.0, "start"), (0, 4.0, ""))
        stats()
        resumed = EpisodeStats(replay, frame_skip=1)
        resumed.load_state_dict(json.loads(json.dumps(stats.state_dict())))
        write(replay, (0, 5.0, "end"))
        assert resumed() == {"episode/return": 9.0, "episode/length": 2.0}


class TestEvery:
    def test_once_per_interval(self):
        due = Every(100)
        assert [frames for frames in range(0, 400, 30) if due(frames)] == [120, 210, 300]

    def test_does_not_catch_up(self):
        due = Every(100)
        assert due(1000) and not due(1050) and due(1100)

    def test_first(self):
        due = Every(100, first=0)
        assert due(0) and not due(50) and due(100)

    def test_never(self):
        assert not Every(0)(10**9)

    def test_goes_on_after_a_resume(self):
        due, other, changed = Every(100), Every(100), Every(50)
        due(130)
        for hook in (other, changed):
            hook.load_state_dict(due.state_dict())
        assert not other(199) and other(200)
        assert changed(130), "another interval counts anew"


class TestFrames:
    """A frame is a frame of the simulator; a step is a record, and a reset makes one as well."""

    @pytest.mark.slow
    def test_first_episodes_of_eight_environments(self, tmp_path, monkeypatch):
        """200 frames at 2 frames per step are 100 steps and 101 records: 8 environments end their first episode
        between frames 1602 and 1616, in the manner of published curves. The counter pays 1 + ... + 200 = 20,100.
        """
        set_episode_length(monkeypatch, 200)
        trainer = make_run(
            tmp_path,
            "env.frame_skip=2",
            "collector.envs_per_collector=8",
            "collector.frames_per_batch=400",  # a quarter of an episode of each
            "collector.total_frames=1616",
            "collector.init_random_frames=1_000_000",
            "logger.interval=1",
        )
        counts = []
        trainer.register_op("post_steps_log", lambda batch: counts.append(trainer.collected_frames))
        trainer.train()
        assert counts == [400, 800, 1200, 1616]
        assert trainer.replay_buffer.stream_counts.tolist() == [101] * 8
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        ends = [line for line in lines if "episode/return" in line]
        assert [(line["frames"], line["episode/return"], line["episode/length"]) for line in ends] == [
            (1616, 20_100.0, 200.0)
        ]

    def test_records_are_counted_and_updates_follow(self, tmp_path, monkeypatch):
        """Episodes of 5 steps make 6 records. After n batches of 4 steps in 2 environments there are
        2 (4 n + floor(4 n / 5)) records: 18 >= 16 when training starts (n = 2), 96 = the budget at the end (n = 10).
        A quarter of an update is owed for each record since: 1 + floor(78 / 4) = 20.
        """
        set_episode_length(monkeypatch, 5)
        trainer = make_run(tmp_path)
        trainer.train()
        assert trainer.collected_frames == trainer.replay_buffer.write_count == 96
        assert trainer.update_count == 20


class TestSyncPolicy:
    def make(self, interval: int):
        policy = nn.Linear(2, 2)
        shared = ActingPolicy(policy, Unbounded(2), random_steps=0, shared=True)
        trainer = SimpleNamespace(collector=SimpleNamespace(policy=shared), update_count=0)
        return trainer, policy, shared.policy, SyncPolicy(trainer, policy, interval)

    def test_every_interval(self):
        trainer, policy, copy, sync = self.make(interval=4)
        handed_over = []
        for trainer.update_count in range(1, 13):
            with torch.no_grad():
                policy.weight.fill_(trainer.update_count)
            sync()
            handed_over.append(copy.weight[0, 0].item())
        assert handed_over[3:] == [4, 4, 4, 4, 8, 8, 8, 8, 12]
        assert handed_over[0] == handed_over[2] != 4

    def test_the_copy_is_not_trained_and_not_the_original(self):
        _, policy, copy, _ = self.make(interval=1)
        assert not any(p.requires_grad for p in copy.parameters()) and all(p.requires_grad for p in policy.parameters())
        assert copy.weight.data_ptr() != policy.weight.data_ptr()

    def test_buffers_follow_too(self):
        policy = nn.BatchNorm1d(2)
        shared = ActingPolicy(policy, Unbounded(2), random_steps=0, shared=True)
        policy.running_mean.fill_(3.0)
        shared.update(policy)
        assert shared.policy.running_mean.tolist() == [3.0, 3.0]

    def test_a_policy_in_this_process_is_the_same(self):
        policy = nn.Linear(2, 2)
        acting = ActingPolicy(policy, Unbounded(2), random_steps=0, shared=False)
        assert acting.policy is policy
        trainer = SimpleNamespace(collector=SimpleNamespace(policy=acting), update_count=10)
        SyncPolicy(trainer, policy, 1)()


def test_latents_go_back_to_the_records_that_they_belong_to():
    """The next window that starts inside of this one gets the new latents as its context."""
    agent, replay, collector = make_mock_parts(streams=1, steps_per_batch=20)
    replay.extend(agent.to_records(next(iter(collector))))
    collector.shutdown()
    batch = replay.sample()
    agent.stepper.step(None, batch)
    WriteBackContext(replay)(batch)
    newest = {}
    for b, first in enumerate(batch["context", "position"].tolist()):  # where windows overlap, any of them may win
        for t in range(6):
            newest.setdefault(first + t, []).append(batch["replay_context"][b, t])
    compared = 0
    for _ in range(20):
        context = replay.sample()["context"]
        for row in context:
            candidates = newest.get(row["position"].item() - 1, [])
            matches = [all(torch.equal(row[key], latent[key]) for key in ("belief", "state")) for latent in candidates]
            assert any(matches) or not candidates
            compared += len(candidates) > 0
    assert compared > 10


def random_states() -> list:
    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class TestEvaluate:
    def make(self, tmp_path, *overrides: str):
        trainer = make_run(tmp_path, "env.name=reach", "eval.episodes=4", "eval.num_envs=2", *overrides)
        hook = next(op for op, _ in trainer._post_steps_log_ops if isinstance(getattr(op, "__wrapped__", op), Evaluate))
        return trainer, getattr(hook, "__wrapped__", hook)

    @pytest.mark.parametrize(
        ("overrides", "name"), [((), "color_grid"), (("env/distraction@eval.distraction=none",), "none")]
    )
    def test_distraction(self, tmp_path, overrides, name):
        """As in training, unless the evaluation has one of its own."""
        trainer, hook = self.make(tmp_path, "env.from_pixels=true", "env/distraction=color_grid_action", *overrides)
        assert hook.make_env.env["distraction"]["name"] == name
        trainer.collector.shutdown()

    def test_leaves_everything_as_it_was(self, tmp_path):
        """Networks, statistics of the returns, replay and random numbers; also the first time, which makes the envs."""
        trainer, evaluate = self.make(tmp_path)
        replay = trainer.replay_buffer
        for _ in range(2):
            before = snapshot(trainer.loss_module), random_states(), replay.write_count, replay._rng.bit_generator.state
            modes = {name: module.training for name, module in trainer.loss_module.named_modules()}
            evaluate.run()
            assert not differing(before[0], snapshot(trainer.loss_module))
            assert random_states() == before[1]
            assert (replay.write_count, replay._rng.bit_generator.state) == before[2:]
            assert modes == {name: module.training for name, module in trainer.loss_module.named_modules()}
        trainer.collector.shutdown()

    def test_what_is_not_finite_is_never_the_best(self, tmp_path, monkeypatch):
        trainer, evaluate = self.make(tmp_path)
        for value, best in ((math.nan, None), (2.0, 2.0), (math.nan, 2.0), (3.0, 3.0)):
            episodes = Episodes([value], [1], [None])
            monkeypatch.setattr(evaluate, "_run_episodes", lambda *_, episodes=episodes: episodes)
            evaluate.run()
            assert (evaluate.best and evaluate.best[1]) == best
        trainer.collector.shutdown()

    def test_the_last_one_is_not_made_twice(self, tmp_path, monkeypatch):
        """Unless there were updates since."""
        trainer, evaluate = self.make(tmp_path)
        evaluate.run()
        monkeypatch.setattr(evaluate, "run", lambda: pytest.fail("it has run before"))
        lines = []
        monkeypatch.setattr(trainer, "log_now", lines.append)
        evaluate.finish()
        assert lines == [evaluate.latest[1]]
        trainer._optim_count += 1
        with pytest.raises(pytest.fail.Exception):
            evaluate.finish()
        trainer.collector.shutdown()

    def test_the_same_policy_gets_the_same_result(self, tmp_path):
        """Every evaluation starts from the same seed, so that two of them differ by the policy alone."""
        trainer, evaluate = self.make(tmp_path)
        first = evaluate.run()
        torch.rand(5)
        assert evaluate.run() == first
        with torch.no_grad():
            for parameter in trainer.loss_module.actor_critic.actor.parameters():
                parameter.add_(torch.randn_like(parameter))
        assert evaluate.run() != first
        trainer.collector.shutdown()

    def test_actions_are_sampled_unless_told_otherwise(self, tmp_path):
        results = {}
        for deterministic in ("false", "true"):
            override = f"eval.deterministic={deterministic}"
            trainer, evaluate = self.make(tmp_path / deterministic, override)
            results[deterministic] = evaluate.run()["eval/return_mean"]
            trainer.collector.shutdown()
        # A new actor's mode is near 0, with a mean payment of 1 - E|target| / 2 = 0.75; its samples spread by 0.9.
        assert results["true"] > results["false"]

    def test_lengths_are_frames(self, tmp_path):
        """Ten frames at two per step are five steps, and are logged as ten."""
        trainer, evaluate = self.make(tmp_path, "env.frame_skip=2", "collector.frames_per_batch=16")
        assert evaluate.run()["eval/length_mean"] == 10
        trainer.collector.shutdown()

    def test_training_is_the_same_with_and_without(self, tmp_path):
        """Same weights, same optimiser, same records, bit by bit, and the same random numbers afterwards."""
        results, evaluations = [], []
        for interval in (0, 16):
            folder = tmp_path / str(interval)
            trainer = make_run(folder, "env.name=reach", f"eval.interval={interval}")
            trainer.train()
            trainer.replay_buffer.dump(folder / "replay")
            results.append((trainer.update_count, random_states(), read_files(folder / "replay")))
            results[-1] += (snapshot(trainer.loss_module), optimiser_state(trainer))
            evaluations.append((folder / "metrics.jsonl").read_text().count("eval/return_mean"))
        for ours, theirs in zip(*(result[:3] for result in results), strict=True):
            assert ours == theirs
        for ours, theirs in zip(*(result[3:] for result in results), strict=True):
            assert not differing(ours, theirs)
        assert results[0][0] > 10
        assert evaluations[0] == 1 < evaluations[1]
