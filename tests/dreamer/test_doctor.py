"""The doctor on made-up patients; the real machine is looked at in the slow test."""

import copy
import importlib.metadata
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from dreamer import doctor, doctor_checks, doctor_probes, memory_limits
from dreamer.doctor_checks import KNOWN_BREAKS, Finding
from tests.helpers import compose_config, make_small_agent

GPU = {"name": "H200", "free": 130e9, "total": 140e9, "bf16": True}
GIB = 2**30


@pytest.fixture(scope="module")
def installed():
    """The configuration and the versions, which take a while to read."""
    return {"config": compose_config("collector.num_collectors=1"), "versions": doctor_probes.read_versions()}


@pytest.fixture(scope="module")
def small_agent():
    return make_small_agent()


@pytest.fixture
def facts(installed):
    """Of a machine on which nothing is wrong."""
    return copy.deepcopy(installed) | {
        "torch": {"gpus": [GPU], "cuda": "13.0", "compiled": ""},
        "gl": {"mean": 100.0, "deviation": 50.0, "ms": 3.0, "backend": "egl", "renderer": "NVIDIA H200"},
        "codec": {"sent": 16, "back": 16, "error": 1.0, "bytes": 3000, "ffmpeg": "8.1.2"},
        "replay": {"right": True, "ms": 1.0, "records": 64},
        "spawn": {"code": 0, "seconds": 2.0},
        "plan": {
            "frames_per_second": 100.0,
            "shapes": {"pixels": [64, 64, 3]},
            "workers": 1,
            "parameters": 10**7,
            "weight_bytes": 4 * 10**7,
            "records": 10**5,
            "record_bytes": 10**4,
            "replay_bytes": 10**9,
        },
    }


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A large machine, whatever this one is."""
    monkeypatch.setattr(memory_limits, "available_memory", lambda: 64 * 10**9)
    monkeypatch.setattr(memory_limits, "available_cores", lambda: 8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    monkeypatch.setattr(doctor_checks, "SPEED_TEST_BYTES", 2**20)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", os.devnull)


def find(name: str, facts: dict) -> Finding:
    return dict(doctor.examine(facts))[name]


def test_a_healthy_machine(facts):
    findings = dict(doctor.examine(facts))
    assert list(findings) == [name for name, _ in doctor.CHECKS]
    assert {name: finding for name, finding in findings.items() if finding.level != "ok"} == {}
    assert all(finding.found and not finding.advice for finding in findings.values())
    assert doctor.summarise(findings, 3.2) == f"{len(findings)} ok, 0 to note, 0 failed, ready to train (3 s)"


# check, what is different, level, what the line says
PATIENTS = [
    ("torchrl, compiled", {"torch": {"compiled": "x.so: undefined symbol: y"}}, "note", "built for another"),
    ("opengl", {"gl": {"deviation": 0.0}}, "FAILED", "blank"),
    ("opengl", {"gl": {"renderer": "llvmpipe (LLVM)"}}, "note", "although there is a GPU"),
    ("opengl", {"gl": {"renderer": "llvmpipe (LLVM)"}, "torch": {"gpus": []}}, "ok", "software"),
    ("video codec", {"codec": {"back": 15}}, "FAILED", "15 of 16"),
    ("video codec", {"codec": {"error": 60.0}}, "FAILED", "error 60"),
    ("replay", {"replay": {"right": False}}, "FAILED", "wrong records"),
    ("memory", {"plan": {"replay_bytes": 70 * 10**9}}, "FAILED", "replay_buffer.size=6360000 at most"),
    ("memory", {"plan": {"replay_bytes": 60 * 10**9}}, "note", "docs/memory.md"),
    ("memory", {"plan": {"weight_bytes": 20 * 10**9}}, "ok", "workers 0.4 GB, replay 1.0 GB"),
    ("memory", {"plan": {"weight_bytes": 20 * 10**9}, "torch": {"gpus": []}}, "FAILED", "optimiser 80.0 GB"),
    ("shared memory", {"plan": {"replay_bytes": 2 * 10**12}}, "FAILED", "--shm-size=1864g"),
    ("disk", {"plan": {"replay_bytes": 4 * 10**11}}, "FAILED", "checkpoint.replay=false"),
    ("disk", {"plan": {"replay_bytes": 10**11}}, "ok", "up to 300.6 GB needed"),
    ("gpu", {"torch": {"gpus": []}}, "note", "on the CPU"),
    ("gpu", {"torch": {"gpus": []}, "config": {"device": "cuda"}}, "FAILED", "device=cuda"),
    ("gpu", {"torch": {"gpus": [GPU | {"bf16": False}]}}, "note", "no bfloat16"),
    ("cpu", {"config": {"threads": 9}}, "note", "threads=8"),
    ("cpu", {"plan": {"workers": 8}}, "note", "num_collectors=7"),
    ("processes", {"spawn": {"code": -11}}, "FAILED", "code -11"),
]


@pytest.mark.parametrize(("name", "changes", "level", "says"), PATIENTS)
def test_patients(facts, name, changes, level, says):
    for fact, values in changes.items():
        facts[fact] |= values
    finding = find(name, facts)
    assert finding.level == level and says in f"{finding.found} {finding.advice}"
    assert finding.advice if level != "ok" else not finding.advice


def test_where_the_replay_is_decides_which_room_it_needs(facts):
    facts["plan"]["replay_bytes"] = 2 * 10**12
    expected = {
        "collector=sync": {"memory": "FAILED", "shared memory": "ok"},
        "collector=multi_sync": {"memory": "FAILED", "shared memory": "FAILED"},
        "replay_buffer.memmap_dir=x": {"memory": "ok", "shared memory": "ok", "disk": "FAILED"},
    }
    for override, levels in expected.items():
        facts["config"] = compose_config(override, "checkpoint.replay=false")
        assert {name: find(name, facts).level for name in levels} == levels, override


@pytest.mark.parametrize("flags", ["avx2 fma", "avx2 avx512f avx512_bf16"])
def test_bfloat16_on_a_processor(facts, monkeypatch, flags):
    facts["config"]["optimization"]["autocast"] = "bfloat16"
    facts["torch"]["gpus"] = []
    monkeypatch.setattr(doctor_checks, "_read", lambda path: f"flags\t\t: fpu {flags}\n")
    assert find("cpu", facts).level == ("ok" if "bf16" in flags else "note")


@pytest.mark.parametrize(
    ("versions", "level", "says"),
    [
        ({"dm-control": "1.0.50", "mujoco": "4.0.0"}, "FAILED", "dm-control 1.0.50 with mujoco 4.0.0"),
        ({"hydra-core": "1.3.5"}, "FAILED", "hydra-core 1.3.5"),
        ({"torch": "2.9.1+cu128"}, "FAILED", "CVE-2026-24747"),
        ({"rliable": "1.2.0", "pandas": "3.0.1"}, "note", "rliable cannot be imported"),
        ({"rliable": "1.2.0", "pandas": "2.3.0"}, "ok", "none"),
        ({"ray": "2.53.0"}, "note", "2.54"),
        ({"ray": "2.53.0", "torch": "2.9"}, "FAILED", "'torch>=2.10', pip install 'ray>=2.54'"),
    ],
)
def test_versions_that_are_known_to_break(facts, versions, level, says):
    facts["versions"] |= versions
    finding = find("known breaks", facts)
    assert finding.level == level and says in f"{finding.found} {finding.advice}"


def test_known_breaks_are_levels_and_versions():
    assert all(level in doctor.COLOURS and name == name.lower() for pair, level, *_ in KNOWN_BREAKS for name in pair)


@pytest.mark.parametrize(
    ("versions", "says"),
    [
        ({"mujoco": "4.0.0"}, "mujoco 4.0.0, but lucid-rl wants <4,>=3.17"),
        ({"tensordict": "0.13.0"}, "torchrl wants"),
        ({"av": None}, "av is missing (lucid-rl wants it)"),
        ({"gymnasium": "0.29"}, "gymnasium 0.29"),
        (
            {"torch": "2.13.0+cpu", "torchvision": "0.28.0+cu130"},
            "torchvision 0.28.0+cu130 is not for torch 2.13.0+cpu",
        ),
    ],
)
def test_versions_that_do_not_fit(facts, monkeypatch, versions, says):
    asked = importlib.metadata.requires  # torchvision is not installed
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [] if name == "torchvision" else asked(name))
    facts["versions"] |= versions
    facts["versions"] = {name: version for name, version in facts["versions"].items() if version is not None}
    finding = find("packages", facts)
    assert finding.level == "FAILED" and says in finding.found and "constraints.txt" in finding.advice


def test_torchvision_of_another_torch(facts, monkeypatch):
    asked = importlib.metadata.requires
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: ["torch==2.12.0"] if name == "torchvision" else asked(name)
    )
    facts["versions"]["torchvision"] = "0.27.0"
    assert "torchvision wants ==2.12.0" in find("packages", facts).found


def test_wandb(facts, monkeypatch):
    facts["config"]["logger"] |= {"backends": ["wandb"], "offline": False}
    finding = find("wandb", facts)
    assert finding.level == "FAILED" and "wandb login" in finding.advice
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert find("wandb", facts).level == "ok"
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "planted-secret")
    finding = find("wandb", facts)
    assert finding.level == "ok" and "logged in, online" in finding.found and "planted-secret" not in str(finding)


def test_wandb_reads_the_key_file(facts, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password planted-secret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    finding = find("wandb", facts)
    assert "logged in" in finding.found and "not logged in" not in finding.found
    assert "planted-secret" not in str(finding)


def test_few_open_files(facts, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))
    assert find("open files", facts) == Finding("note", "at most 256 at once", "ulimit -n 4096")


def test_a_shell_that_ignores_ctrl_c(facts):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert find("ctrl-c", facts).level == "note"
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_check_that_raises_fails_and_the_others_go_on(facts):
    """An error that several checks meet is told once."""
    error = RuntimeError("no answer within 120 s")

    class Broken(dict):
        def __getitem__(self, name):
            if name == "plan":
                raise error
            return super().__getitem__(name)

    findings = dict(doctor.examine(Broken(facts)))
    assert findings["environment"] == Finding("FAILED", "no answer within 120 s")
    assert findings["memory"] == Finding("note", "not checked, because of environment")
    assert findings["wandb"].level == "ok"
    del facts["codec"]
    assert find("video codec", facts) == Finding("FAILED", "KeyError: 'codec'")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed with SIGSEGV"),
        ("raise ValueError('image_size=3: give a power of 2')", "ValueError: image_size=3: give a power of 2"),
        (
            "import warnings; warnings.warn('x'); raise RuntimeError('no EGL\\n  tried: a\\ninstall b')",
            "^no EGL tried: a install b$",
        ),
        ("import sys; sys.exit('no key\\n\\nSet HYDRA_FULL_ERROR=1')", "^no key$"),
        ("import sys; sys.exit(7)", "exit code 7"),
    ],
)
def test_probes_may_crash(code, says):
    with pytest.raises(RuntimeError, match=says):
        doctor_probes.run_apart([sys.executable, "-c", code])


def test_probes_may_hang(tmp_path):
    """What a probe started ends with it."""
    pid_file = tmp_path / "pid"
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); "
    code += f"open({str(pid_file)!r}, 'w').write(str(p.pid)); p.wait()"
    with pytest.raises(RuntimeError, match="no answer within 3 s"):
        doctor_probes.run_apart([sys.executable, "-c", code], seconds=3)
    pid = int(pid_file.read_text())
    for _ in range(200):  # a killed process is gone a moment later
        if has_ended(pid):
            break
        time.sleep(0.05)
    assert has_ended(pid)


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_probe_codec():
    codec = doctor_probes.probe_codec(None)
    assert codec["back"] == codec["sent"] == 16 and 0 < codec["error"] < 10 and codec["bytes"] > 0


def test_probe_replay():
    assert doctor_probes.probe_replay(None)["right"]


def test_lines_are_aligned_and_wrapped():
    finding = Finding("FAILED", "word " * 30, "pip install x")
    lines = doctor.format_finding("disk", finding, width=80, colour=False).splitlines()
    assert lines[0].startswith("FAILED  disk ") and max(map(len, lines)) <= 80
    column = lines[0].index("word")
    assert all(line[:column].strip() == "" for line in lines[1:]) and lines[-1][column:] == "-> pip install x"
    assert "\x1b[1;31mFAILED" in doctor.format_finding("disk", finding, width=80, colour=True)


@pytest.mark.parametrize("healthy", [True, False])
def test_the_program(facts, monkeypatch, capsys, healthy):
    class Known(dict):
        def close(self):
            pass

    facts["gl"]["deviation"] = 50.0 if healthy else 0.0
    monkeypatch.setattr(doctor, "Facts", lambda overrides: Known(facts))
    assert doctor.main([]) == (not healthy)
    *lines, summary = capsys.readouterr().out.splitlines()
    assert "0 failed, ready to train" in summary if healthy else "1 failed: opengl" in summary
    assert sum(line.startswith(("ok ", "note ", "FAILED ")) for line in lines) == len(doctor.CHECKS)
    assert doctor.main(["--json", "seed=1"]) == (not healthy)
    report = json.loads(capsys.readouterr().out)
    assert [row["check"] for row in report["checks"]] == [name for name, _ in doctor.CHECKS]
    assert all(set(row) == {"check", "level", "found", "advice"} for row in report["checks"])


@pytest.mark.slow
def test_this_machine(tmp_path):
    """Everything for real; nothing is written where it was called."""
    command = [sys.executable, "-m", "dreamer.doctor", "experiment=smoke", "--json"]
    path = os.pathsep.join([str(doctor_probes.ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}
    )
    report = json.loads(result.stdout)
    assert [row for row in report["checks"] if row["level"] == "FAILED"] == [], result.stderr
    assert result.returncode == 0 and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_misspelt_override():
    with pytest.raises(RuntimeError, match="train_ration"):
        doctor_probes.read_config(["train_ration=3"])
