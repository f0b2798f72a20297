"""Runs on which faults are inflicted, as `scripts/bench_reliability.py` does, against the targets that it holds."""

import importlib
import pickle
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"
QUICK = (
    "NaN in the loss, stop",
    "NaN in the reward, stop",
    "NaN in the observation, skip",
    "replay larger than memory",
)
SLOW = (
    "NaN in the loss, skip",
    "corruption",
    "malicious checkpoint",
    "malicious policy",
    "malicious configuration",
    "malicious names",
    "wandb: no key",
    "dead worker, multi_sync, restart=1",
    "stuck worker, multi_async",
    "orphans, SIGKILL to the program",
    "orphans, SIGINT to all its processes",
    "preemption, SIGUSR1 during an evaluation",
    "resume equal to the bit, SIGKILL, memory-mapped replay",
    "secrets and open ports",
)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("bench_reliability")


@pytest.fixture
def attacks(bench):
    return importlib.import_module("fault_attacks")


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_fault(name, bench, tmp_path):
    fault = bench.make_faults()[name]
    targets = {figure: target for figure, target in fault.targets.items() if not figure.startswith("s to ")}
    assert bench.find_missed(fault.provoke(tmp_path), targets) == []


def test_an_attack_that_works_is_counted(attacks, tmp_path):
    """The payloads do run where somebody unpickles them, and an attack that should be refused must be."""
    attempts = attacks.Attempts(tmp_path)
    payloads = attempts.payloads()
    (tmp_path / "file").write_bytes(payloads["torch.save"])
    attempts.attempt("unpickled", lambda: pickle.loads(payloads["pickle"]))
    attempts.attempt("loaded", lambda: torch.load(tmp_path / "file", weights_only=False), must_raise=False)
    attempts.attempt("safe", lambda: torch.load(tmp_path / "file", weights_only=True))
    attempts.attempt("ignored", lambda: None)
    assert attempts.figures() == {"tried": 4, "not blocked": "unpickled, loaded, ignored"}
