"""Every command and example of the README works."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from tests.helpers import SMALL_V1, SMALL_WM
from tests.programs import ROOT, run_program

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.S)
COMMANDS = [
    line.split(" #")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]


SMALL = {
    "dreamer_v1": SMALL_V1,
    "world_models": SMALL_WM,
    "ppo": ("agent.units=8", "agent.minibatch_size=16", "collector.init_random_frames=0"),
}


def shorten(command: str) -> list[str]:
    """Overrides for a run of 64 steps with a small network; long steps make the episodes of dm_control short."""
    frame_skip = 25 if "env.name=cheetah" in command or "env.name=walker" in command or "quickstart" in command else 1
    small = next((overrides for agent, overrides in SMALL.items() if agent in command), ("agent/size=debug",))
    return [
        "device=cpu",
        "collector=sync",
        f"env.frame_skip={frame_skip}",
        f"collector.total_frames={64 * frame_skip}",
        f"collector.init_random_frames={32 * frame_skip}",
        f"collector.frames_per_batch={32 * frame_skip}",
        "replay_buffer.batch_size=2",
        "replay_buffer.sequence_length=4",
        "train_ratio=1",
        "eval.episodes=1",
        "eval.random_episodes=0",
        "env.render.fast=true",
        *small,
    ]


def commands(start: str) -> list[str]:
    found = [command for command in COMMANDS if command.startswith(start)]
    assert found, f"README.md has no command {start}"
    return found


def test_all_commands_are_covered_here():
    covered = (
        "make ",
        "python dreamer/train.py",
        "python dreamer/eval.py",
        "python dreamer/report.py",
        "python scripts/",
        "pip install",
        "python envs/gl.py",
        "python3 -m venv",
    )
    assert not [command for command in COMMANDS if not command.startswith(covered)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [c for c in COMMANDS if c.startswith("python dreamer/train.py") and "--help" not in c and "my_run" not in c],
)
def test_training_commands_run(command, tmp_path, monkeypatch):
    """As written, but for a few steps with a small network in this process."""
    monkeypatch.setattr("dreamer.report.try_report", lambda *_, **__: None)  # its failures would end no run
    monkeypatch.chdir(tmp_path)
    if "model=tiny" in command:
        run_program("scripts/make_tiny_sam3.py", "--out", "tiny")
    _, script, *arguments = shlex.split(command)
    printed = run_program(script, *arguments, *shorten(command), f"run_dir={tmp_path / 'run'}")
    assert "evaluation: return" in printed


@pytest.mark.slow
def test_commands_on_a_run(tmp_path, monkeypatch):
    """Everything that is said about `runs/my_run`, in order, on a short run of that name."""
    monkeypatch.chdir(tmp_path)

    def run(command: str, *extra: str) -> str:
        return run_program(*shlex.split(command)[1:], *extra)

    train = "python dreamer/train.py env.name=cheetah run_dir=runs/my_run env.image_size=16"
    run(train, *shorten(train))
    run(train.replace("my_run", "other_run"), *shorten(train), "seed=1")
    on_a_run = [command for command in COMMANDS if "my_run" in command]
    episodes = ["episodes=1", "num_envs=1"]
    short = {"train": ["collector.total_frames=2400"], "eval": episodes, "report": [], "compare": episodes}
    said = {Path(c.split()[1]).stem: run(c, *short[Path(c.split()[1]).stem]) for c in on_a_run}
    assert "collector.total_frames: 1600 -> 2400" in said["train"] and "goes on from" in said["train"]
    assert Path("runs/my_run/eval.json").exists() and Path("both.html").exists()
    assert "IQM" in said["compare"]
    assert set(said) == set(short)


def test_help_lists_groups():
    printed = run_program("dreamer/train.py", "--help")
    for group in ("dmc, gym, mock", "agent/size", "collector: multi_async, multi_sync, sync", "quickstart"):
        assert group in printed


def overrides_in_tables() -> list[list[str]]:
    rows = re.findall(r"^\|.*\|(.*)\|$", README, flags=re.M)
    spans = [span for row in rows for span in re.findall(r"`([^`]+)`", row)]
    return [span.split() for span in spans if re.match(r"[\w./]+=", span)]


@pytest.mark.parametrize("overrides", overrides_in_tables(), ids=" ".join)
def test_overrides_compose(overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        compose("train", overrides=overrides)


@pytest.mark.parametrize("source", [block for language, block in BLOCKS if language == "python"])
def test_examples_run(source):
    exec(compile(source, "README.md", "exec"), {"__name__": "__main__"})


def test_make_installs_what_the_readme_says():
    makefile = (ROOT / "Makefile").read_text()
    for command in commands("pip install"):
        words = [word for word in shlex.split(command)[2:] if word != "-q"]
        assert all(word in makefile for word in words), command


@pytest.mark.parametrize("command", commands("python scripts/"))
def test_scripts_and_their_options_exist(command):
    """They are run by the tests of their own."""
    _, script, *arguments = shlex.split(command)
    source = (ROOT / script).read_text()
    assert all(f'"{argument}"' in source for argument in arguments if argument.startswith("--"))


def test_gl_command_prints_the_backend():
    result = subprocess.run([sys.executable, "envs/gl.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip()


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
