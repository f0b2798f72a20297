"""The hook graph: what the documentation shows is what the real trainer does."""

from pathlib import Path

import pytest
from torchrl.collectors import MultiAsyncCollector

import dreamer.train
from dreamer.hook_graph import STAGES, hook_graph
from dreamer.settings import Start
from tests.test_configs import config

ROOT = Path(__file__).parents[1]


@pytest.fixture
def default_trainer(tmp_path, monkeypatch):
    """The trainer of the default configuration, with a collector whose workers are not started."""

    def collector(*, to_records, policy, replay, **_):
        idle = object.__new__(MultiAsyncCollector)
        vars(idle).update(procs=[], postproc=to_records, policy=policy, replay_buffer=replay, closed=True)
        return idle

    monkeypatch.setattr(dreamer.train, "make_collector", collector)
    settings = config("agent/size=debug", "replay_buffer.size=10_000", "logger.backends=[]", "device=cpu")
    return dreamer.train.build(Start(settings, tmp_path))


def test_documented_graph_is_the_real_one(default_trainer):
    graph = hook_graph(default_trainer)
    assert graph in dreamer.train.__doc__, f"put this into the docstring of dreamer/train.py:\n{graph}"
    assert graph in (ROOT / "README.md").read_text(), "README.md shows another graph"


def test_graph_is_read_back_from_the_trainer(default_trainer):
    before = hook_graph(default_trainer)

    def my_hook():
        """Does something new. And more."""

    default_trainer.register_op("post_steps", my_hook)
    added = set(hook_graph(default_trainer).splitlines()) - set(before.splitlines())
    assert [line.split() for line in added] == [["per", "batch", "post_steps", "my_hook", "Does", "something", "new"]]


def test_every_registered_hook_is_in_the_graph(default_trainer):
    lists = {name for name in vars(default_trainer) if name.endswith("_ops") and getattr(default_trainer, name)}
    assert lists <= {attribute for _, _, attribute in STAGES}


def test_few_hooks(default_trainer):
    """At most three per stage and fourteen in all, or nobody holds them in their head."""
    counts = [len(getattr(default_trainer, attribute)) for _, _, attribute in STAGES if attribute]
    assert max(counts) <= 3 and sum(counts) <= 14
