"""The benchmarks run from end to end in their smallest settings. What they measure is not looked at."""

import json
import multiprocessing
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch

import envs  # noqa: F401  chooses MuJoCo's renderer before a script imports it

SCRIPTS = Path(__file__).parents[2] / "scripts"
UPDATE = ("--size", "debug", "--batch", "2", "--length", "4", "--repeats", "1")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a script as `python scripts/<name> ...` would; return its output and what it wrote as JSON."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def run(name: str, *arguments: str) -> tuple[str, dict]:
        path = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--json", str(path)])
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        return capsys.readouterr().out, json.loads(path.read_text())

    yield run
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)
    assert not multiprocessing.active_children()


def test_bench_replay(run):
    sizes = ("--batch-size", "2", "--sequence-length", "8", "--image-size", "8", "--belief", "16", "--state", "4")
    output, figures = run("bench_replay.py", *sizes, "--records", "600", "--streams", "2", "--repeats", "2")
    assert "sample: SequenceReplay" in output
    assert figures["cpu_ms"]["sample: TorchRL slices"]["median"] > 0


def test_bench_update(run):
    output, figures = run("bench_update.py", *UPDATE)
    assert [row["update"] for row in figures["rows"]] == ["ours, pool", "ours, strided", "TorchRL, strided"]
    assert all(row["update"] in output and row["median"] >= row["min"] > 0 for row in figures["rows"])
    assert figures["rows"][-1]["to TorchRL"] == 1
    assert figures["settings"]["size"] == "debug"


def test_bench_update_bfloat16(run):
    _, figures = run("bench_update.py", *UPDATE, "--autocast", "bfloat16", "--downsample", "strided")
    assert len(figures["rows"]) == 2


def test_bench_update_skips_the_rival(run):
    _, figures = run("bench_update.py", *UPDATE, "--skip-rival", "--downsample", "strided")
    (row,) = figures["rows"]
    assert row["to TorchRL"] is None


def test_bench_update_refuses_an_unknown_mode(run):
    with pytest.raises(SystemExit):
        run("bench_update.py", *UPDATE, "--modes", "fast")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bench_update_on_a_gpu(run):
    _, figures = run("bench_update.py", *UPDATE, "--device", "cuda", "--modes", "eager,captured", "--skip-rival")
    assert len(figures["rows"]) == 4


def test_torchrl_dreamer_is_the_reference(monkeypatch):
    """The 12m model has the parameters of its architecture and takes TorchRL's faster path."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import torchrl_dreamer
    from bench_common import load_config

    size, image = load_config("agent/size=12m")["agent"]["size"], (3, 64, 64)
    loss = torchrl_dreamer.make_loss(torchrl_dreamer.make_acting_parts(size, image, 6), size, image)
    assert sum(p.numel() for p in loss.parameters() if p.requires_grad) == 9_771_214
    assert loss.model_loss.world_model[1]._fast_path


def test_bench_collectors(run):
    output, figures = run(
        "bench_collectors.py",
        "--quick",
        "--seconds",
        "0.2",
        "--modes",
        "sync",
        "env=mock",
        "collector.frames_per_batch=8",
    )
    (row,) = figures["rows"]
    assert row["collector"] in output and row["steps/s"] > 0 and row["x CPU"] is None
    assert row["frames/s"] == row["steps/s"]  # the mock environment skips no frames


def test_bench_collectors_beside_torchrl(run):
    arguments = ("--modes", "sync", "--observations", "state", "--policy", "random", "env.frame_skip=4")
    _, figures = run("bench_collectors.py", "--quick", "--seconds", "0.2", *arguments)
    ours, theirs = figures["rows"]
    assert theirs["collector"] == "TorchRL sync" and theirs["x frames/s"] == 1
    assert ours["frames/s"] == 4 * ours["steps/s"]


@pytest.mark.slow
def test_bench_collectors_with_workers(run):
    _, figures = run("bench_collectors.py", "--quick", "--seconds", "0.2", "--rivals", "sync,multi_sync,multi_async")
    assert [row["collector"] for row in figures["rows"]] == [
        "ours sync",
        "ours multi_async",
        "TorchRL sync",
        "TorchRL multi_sync",
        "TorchRL multi_async",
    ]


@pytest.mark.slow
def test_bench_collectors_ends_its_workers_after_an_error(run):
    with pytest.raises(RuntimeError, match="a worker died"):
        run("bench_collectors.py", "--quick", "--modes", "multi_async", "collector.frames_per_batch=1600", "env=mock")
