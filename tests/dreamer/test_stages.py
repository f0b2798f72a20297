"""Stages one after the other, round by round, and the episodes that are collected for them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from dreamer.agents import Media
from dreamer.episode_data import CollectStage
from dreamer.episode_store import EpisodeStore, Layout
from dreamer.stages import Stage, StagedStepper, StageSchedule


class Count(Stage):
    """Ends after a number of updates, and writes down what happens to it."""

    def __init__(self, name: str, updates: int, diary: list[str]):
        self.name, self.updates, self.diary, self.count = name, updates, diary, 0

    def begin(self) -> None:
        self.count = 0
        self.diary.append(f"begin {self.name}")

    def done(self) -> bool:
        return self.count >= self.updates

    def draw(self) -> TensorDict:
        return TensorDict({"count": torch.tensor(self.count)})

    def step(self, batch: TensorDict) -> dict[str, float]:
        assert int(batch["count"]) == self.count
        self.count += 1
        self.diary.append(f"{self.name} {self.count}")
        return {f"{self.name}/count": float(self.count)}

    def end(self) -> None:
        self.diary.append(f"end {self.name}")

    def media(self) -> Media | None:
        torch.rand(1)
        return Media({self.name: torch.zeros(1, 1, 3)}, {}, {}, {})

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Collect(Count):
    def __init__(self, trainer: Any, rounds: int, diary: list[str]):
        super().__init__("collect", 0, diary)
        self.trainer, self.rounds, self.round = trainer, rounds, 0

    def begin(self) -> None:
        super().begin()
        self.round += 1

    def done(self) -> bool:
        return self.trainer.collected_frames >= self.round * self.trainer.total_frames / self.rounds

    def receive(self, records: Any) -> Any:
        return records


class FakeTrainer:
    """Collects ten frames per batch, and makes the updates that it is told to make."""

    def __init__(self, make_schedule: Any, total_frames: int = 40):
        self.free_running, self.collected_frames, self.total_frames = False, 0, total_frames
        self.hooks, self.diary = {}, []
        self.told, self.meter = [], SimpleNamespace()
        self.console = SimpleNamespace(print=self.told.append)
        self.lines: list[str] = []  # stages whose metrics were flushed
        self.schedule = make_schedule(self)
        self.schedule.register(self)

    def register_op(self, stage: str, hook: Any) -> None:
        self.hooks[stage] = hook

    def register_module(self, name: str, module: Any) -> None:
        assert (name, module) == ("StageSchedule", self.schedule)

    def save_checkpoint(self) -> None:
        self.diary.append("save")

    def log_media(self, media: Media) -> None:
        self.diary.append(f"show {next(iter(media.images))}")

    def log_now(self, metrics: dict[str, float]) -> None:
        self.diary.append(f"log {metrics}")

    def flush_log(self) -> None:
        self.lines.append(self.schedule.stage.name)

    def evaluate(self) -> None:
        self.diary.append("evaluate")

    def ended(self) -> bool:
        return self.collected_frames >= self.total_frames and not self.schedule.busy()

    def turn(self) -> None:
        """What :class:`dreamer.trainer.Trainer` does in a turn."""
        if not self.schedule.busy():
            self.collected_frames += 10
            self.diary.append(f"frames {self.collected_frames}")
        self.hooks["pre_optim_steps"]()
        for _ in range(self.optim_steps_per_batch):
            batch = self.hooks["process_optim_batch"](None)
            StagedStepper().step(self, batch)
            self.hooks["post_optim_log"](batch)
        self.hooks["post_steps_log"](None)

    def run(self) -> list[str]:
        while not self.ended():
            self.turn()
        return self.diary


def make_trainer(
    *updates: int, rounds: int = 1, collect: bool = True, save_seconds: float = 1e9, total_frames: int = 40
) -> FakeTrainer:
    def make_schedule(trainer: FakeTrainer) -> StageSchedule:
        stages = [Collect(trainer, rounds, trainer.diary)] if collect else []
        stages += [Count(name, count, trainer.diary) for name, count in zip("abc", updates, strict=False)]
        return StageSchedule(lambda _: stages, rounds=rounds, save_seconds=save_seconds)

    return FakeTrainer(make_schedule, total_frames)


def test_stages_in_order():
    """One without updates begins and ends, and is not shown."""
    assert make_trainer(2, 0, 1, total_frames=20).run() == [
        *("frames 10", "begin collect", "frames 20", "end collect", "begin a", "a 1", "a 2"),
        *("end a", "log {'a/count': 2.0}", "show a", "begin b", "end b", "begin c", "c 1"),
        *("end c", "log {'c/count': 1.0}", "show c"),
    ]


def test_rounds_share_the_frames_and_are_evaluated_between():
    diary = make_trainer(1, rounds=2).run()
    words = [word for word in diary if word.startswith(("frames", "a ", "evaluate", "begin collect"))]
    assert words == [
        *("frames 10", "begin collect", "frames 20", "a 1", "evaluate"),
        *("begin collect", "frames 30", "frames 40", "a 1"),
    ]


def test_without_collection_no_frames_are_collected():
    trainer = make_trainer(2, collect=False)
    assert trainer.total_frames == 0
    assert trainer.run() == ["begin a", "a 1", "a 2", "end a", "log {'a/count': 2.0}", "show a"]


def test_collection_alone():
    assert make_trainer(total_frames=20).run() == ["frames 10", "begin collect", "frames 20", "end collect"]


def test_saved_and_shown_while_frames_stand_still():
    diary = make_trainer(2, save_seconds=0, total_frames=10).run()
    assert [word for word in diary if word in ("save", "a 1", "a 2", "frames 10")] == [
        *("frames 10", "a 1", "save", "a 2", "save")
    ]


def test_pictures_leave_the_random_numbers_alone():
    trainer = make_trainer(1, total_frames=10)
    state = torch.get_rng_state()
    trainer.run()
    assert "show a" in trainer.diary and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("turns", range(1, 9))
def test_goes_on_where_it_was(turns):
    whole = make_trainer(2, 1, rounds=2)
    whole.run()
    first, second = make_trainer(2, 1, rounds=2), make_trainer(2, 1, rounds=2)
    for _ in range(turns):
        first.turn()
    second.schedule.load_state_dict(first.schedule.state_dict())
    second.collected_frames, second.schedule.stages[0].round = first.collected_frames, first.schedule.stages[0].round
    second.run()
    assert [*first.diary, *second.diary] == whole.diary


def test_says_which_stage_begins_and_writes_lines_of_what_is_slow():
    trainer = make_trainer(2, 1, rounds=2)
    trainer.schedule.stages[2].one_line_each = True
    trainer.run()
    assert trainer.told[1:3] == ["round 1 of 2, stage 2 of 3: a", "round 1 of 2, stage 3 of 3: b"]
    assert trainer.lines == ["a", "b"] * 2, "at the end of a, and after each update of b"


def test_a_finished_run_goes_on_where_its_last_stage_is_longer():
    first = make_trainer(2, 1)
    first.run()
    longer = make_trainer(2, 3)
    longer.collected_frames = first.collected_frames
    longer.schedule.load_state_dict(first.schedule.state_dict())
    assert longer.run() == ["b 2", "b 3", "end b", "log {'b/count': 3.0}", "show b"]


@pytest.mark.parametrize("turns", [5, 99])
def test_more_frames_than_were_collected_are_refused_when_none_are_learned_from(turns):
    first = make_trainer(2, 1)
    while turns and not first.ended():
        first.turn()
        turns -= 1
    with pytest.raises(ValueError, match=r"total_frames=50: the 40 frames.*agent\.rounds"):
        make_trainer(2, 1, total_frames=50).schedule.load_state_dict(first.schedule.state_dict())
    make_trainer(2, 1, rounds=2, total_frames=80).schedule.load_state_dict(first.schedule.state_dict())


def test_the_state_of_other_stages_is_refused():
    with pytest.raises(ValueError, match=r"\['collect', 'a'\].*\['collect', 'a', 'b'\]"):
        make_trainer(1).schedule.load_state_dict(make_trainer(1, 1).schedule.state_dict())


def test_no_round_is_refused():
    with pytest.raises(ValueError, match="rounds=0"):
        make_trainer(1, rounds=0)


def make_records(*rows: tuple[int, int, bool, bool]) -> TensorDict:
    """Records of (stream, number, is_init, done); observation, action and reward are the number."""
    stream, number, is_init, done = (torch.tensor(column)[:, None] for column in zip(*rows, strict=True))
    value = number.float()
    records = {"stream": stream, "observation": value, "action": value, "reward": value, "is_init": is_init}
    return TensorDict(records | {"terminated": done & (number < 100), "done": done}, len(rows))


FIRST = make_records(
    *((0, 0, True, False), (0, 1, False, False)),
    *((1, 10, True, False), (1, 11, False, True), (1, 12, True, False), (1, 13, False, False)),
)
SECOND = make_records(
    *((0, 2, False, False), (0, 3, False, True), (0, 100, True, False), (0, 101, False, True)),
    *((1, 14, False, False), (1, 15, True, False)),
)


class TestCollect:
    def make(self, folder: Any, **facts: Any) -> CollectStage:
        trainer = SimpleNamespace(**{"collected_frames": 0, "total_frames": 30} | facts)
        stage = CollectStage(trainer, EpisodeStore(folder, Layout("observation", (1,), torch.float32)), rounds=2)
        stage.begin()
        return stage

    def read(self, stage: CollectStage) -> list[list[float]]:
        store = stage.episodes
        return [store.read_observations(number).flatten().tolist() for number in range(len(store))]

    def test_episodes_of_all_streams(self, tmp_path):
        """Those under way are stored as far as they went; one that was cut by a new start as well."""
        stage = self.make(tmp_path)
        assert stage.receive(FIRST) is FIRST
        assert self.read(stage) == [[10, 11]]
        stage.receive(SECOND)
        assert self.read(stage) == [[10, 11], [0, 1, 2, 3], [100, 101], [12, 13, 14]]
        stage.end()
        assert len(stage.episodes) == 4, "a single record is no episode"
        columns = stage.episodes.read_columns(1)
        assert columns["action"].flatten().tolist() == columns["reward"].flatten().tolist() == [0, 1, 2, 3]
        assert columns["is_init"].flatten().tolist() == [True, False, False, False]
        ends = [stage.episodes.read_columns(number)["terminated"].flatten().tolist() for number in range(4)]
        assert ends == [[False, True], [False] * 3 + [True], [False, False], [False] * 3]

    def test_an_episode_goes_on_in_the_next_round(self, tmp_path):
        """Its last record is the first one of what follows, so no step is lost, and it does not count as a start."""
        stage = self.make(tmp_path)
        stage.receive(FIRST)
        stage.end()
        assert self.read(stage) == [[10, 11], [0, 1], [12, 13]]
        stage.begin()
        stage.receive(SECOND)
        assert self.read(stage)[3:] == [[1, 2, 3], [100, 101], [13, 14]]
        assert not stage.episodes.read_columns(3)["is_init"].any()

    def test_a_round_has_its_share_of_the_frames(self, tmp_path):
        stage = self.make(tmp_path, collected_frames=14)
        assert not stage.done()
        stage.trainer.collected_frames = 15
        assert stage.done()
        stage.begin()
        assert not stage.done()
        stage.trainer.collected_frames = 30
        assert stage.done()

    def test_goes_on_in_the_middle_of_an_episode(self, tmp_path):
        whole, first = self.make(tmp_path / "whole"), self.make(tmp_path / "parts")
        whole.receive(FIRST)
        whole.receive(SECOND)
        first.receive(FIRST)
        state = first.state_dict()
        first.receive(SECOND)  # lost, because the run ended without another checkpoint
        second = self.make(tmp_path / "parts")
        second.load_state_dict(state)
        assert self.read(second) == [[10, 11]]
        second.receive(SECOND)
        assert self.read(second) == self.read(whole)

    def test_what_was_left_by_a_run_without_a_checkpoint_is_removed(self, tmp_path):
        self.make(tmp_path).receive(SECOND)
        stage = self.make(tmp_path)
        assert len(stage.episodes) == 2
        stage.receive(FIRST)
        assert self.read(stage) == [[10, 11]]
