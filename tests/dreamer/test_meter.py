"""Means, rates and shares of the time, within a run and over a resume."""

import json
import math

import pytest
import torch

from dreamer.meter import Meter


def make_meter(**settings):
    return Meter(
        **{"interval": 100, "seconds": 1e9, "total_frames": 1000, "train_ratio": 8, "frames_per_update": 32} | settings
    )


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves: [seconds]."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_averages_and_forgets():
    meter = make_meter()
    for value in (1.0, 2.0, 6.0):
        meter.add({"loss": torch.tensor(value), "plain": value})
    metrics = meter.read(frames=100, updates=3)
    assert metrics["loss"] == 3.0 and metrics["plain"] == 3.0 and metrics["trainer/updates"] == 3
    assert "loss" not in meter.read(frames=200, updates=3)
    assert not meter.sums, "nothing is kept"


def test_of_whole_numbers_the_last_one_stands():
    meter = make_meter()
    for count in (1, 2, 7):
        meter.add({"plain": count, "tensor": torch.tensor(count)})
    metrics = meter.read(frames=100, updates=1)
    assert metrics["plain"] == metrics["tensor"] == 7.0


def test_nan_is_passed_on():
    meter = make_meter()
    meter.add({"loss": torch.tensor(math.nan), "other": 1.0})
    metrics = meter.read(frames=100, updates=1)
    assert math.isnan(metrics["loss"]) and metrics["other"] == 1.0


def test_is_due_by_frames_or_seconds():
    meter = make_meter()
    assert not meter.due(99) and meter.due(100)
    assert make_meter(seconds=0).due(0)


def test_time_left_follows_updates_when_they_lag(clock):
    """1000 frames, ratio 8, 32 replayed frames per update: 250 updates. Ten in ten seconds leave 240 seconds."""
    meter = make_meter()
    clock[0] = 10.0
    metrics = meter.read(frames=500, updates=10)
    assert metrics["trainer/eta_seconds"] == pytest.approx(240)
    assert metrics["trainer/updates_per_second"] == pytest.approx(1)
    assert metrics["collector/fps"] == pytest.approx(50)
    assert metrics["trainer/train_ratio"] == pytest.approx(10 * 32 / 500)


def test_time_left_is_unknown_before_learning():
    assert "trainer/eta_seconds" not in make_meter().read(frames=100, updates=0)


def test_time_left_is_never_negative(clock):
    meter = make_meter()
    clock[0] = 10.0
    assert meter.read(frames=1010, updates=260)["trainer/eta_seconds"] == 0


def test_without_a_train_ratio_time_left_follows_frames(clock):
    """Half of the frames in ten seconds leave ten; nothing is said when all were collected."""
    meter = make_meter(train_ratio=None)
    assert "trainer/train_ratio" not in meter.read(frames=0, updates=0)
    clock[0] = 10.0
    metrics = meter.read(frames=500, updates=1)
    assert metrics["trainer/eta_seconds"] == pytest.approx(10) and "trainer/train_ratio" not in metrics
    clock[0] = 20.0
    assert "trainer/eta_seconds" not in meter.read(frames=1000, updates=2)


class TestTimers:
    def test_shares(self, clock):
        meter = make_meter()
        with meter.time("env"):
            clock[0] += 2
        with meter.time("update"):
            clock[0] += 5
        with meter.time("env"):
            clock[0] += 2
        clock[0] += 1
        metrics = meter.read(frames=100, updates=1)
        shares = {name: share for name, share in metrics.items() if name.startswith("time/")}
        assert shares == pytest.approx({"time/env": 0.4, "time/update": 0.5, "time/other": 0.1})
        clock[0] += 1
        metrics = meter.read(frames=200, updates=1)
        assert metrics["time/env"] == 0 and metrics["time/other"] == 1, "the names stay, the seconds do not"

    def test_inner_time_is_taken_from_the_outer(self, clock):
        meter = make_meter()
        with meter.time("log"):
            clock[0] += 1
            with meter.time("env"):
                clock[0] += 3
                with meter.time("log"):
                    clock[0] += 2
            clock[0] += 4
        metrics = meter.read(frames=100, updates=1)
        assert metrics["time/log"] == pytest.approx(0.7) and metrics["time/env"] == pytest.approx(0.3)
        assert metrics["time/other"] == pytest.approx(0)

    def test_running_timers_are_divided_between_lines(self, clock):
        meter = make_meter()
        lines = []
        with meter.time("log"):
            clock[0] += 1
            with meter.time("env"):
                clock[0] += 1
                lines.append(meter.read(frames=100, updates=1))
                clock[0] += 3
            clock[0] += 1
        lines.append(meter.read(frames=200, updates=1))
        assert [line["time/env"] for line in lines] == pytest.approx([0.5, 0.75])
        assert [line["time/log"] for line in lines] == pytest.approx([0.5, 0.25])

    def test_an_error_ends_the_timer(self, clock):
        meter = make_meter()
        with pytest.raises(KeyError), meter.time("env"):
            clock[0] += 1
            raise KeyError
        clock[0] += 1
        assert meter.read(frames=100, updates=1)["time/env"] == pytest.approx(0.5)
        assert not meter.running

    def test_move(self, clock):
        meter = make_meter()
        with meter.time("env"):
            clock[0] += 4
        meter.move("env", "policy", 1.0)
        metrics = meter.read(frames=100, updates=1)
        assert (metrics["time/env"], metrics["time/policy"]) == pytest.approx((0.75, 0.25))

    def test_without_timers_there_are_no_shares(self):
        assert not [name for name in make_meter().read(frames=100, updates=1) if name.startswith("time/")]


def test_resume_goes_on_as_if_no_time_had_passed(clock):
    """The same line with and without an interruption of a day in its middle."""

    def first_half(meter):
        clock[0] += 10
        meter.read(frames=100, updates=2)
        meter.add({"loss": torch.tensor(1.0)})
        with meter.time("env"):
            clock[0] += 3

    def second_half(meter):
        meter.add({"loss": torch.tensor(4.0)})
        with meter.time("env"):
            clock[0] += 3
        clock[0] += 4
        return meter.read(frames=200, updates=12)

    whole = make_meter()
    first_half(whole)
    expected = second_half(whole)
    before = make_meter()
    first_half(before)
    state = json.loads(json.dumps(before.state_dict()))
    clock[0] += 86_400
    after = make_meter()
    after.load_state_dict(state)
    assert second_half(after) == pytest.approx(expected)
    assert expected["loss"] == 2.5 and expected["time/env"] == pytest.approx(0.6)


def test_resume_before_learning():
    meter = make_meter()
    meter.load_state_dict(make_meter().state_dict())
    assert meter.learning_since is None and meter.read(frames=100, updates=0)["trainer/train_ratio"] == 0
