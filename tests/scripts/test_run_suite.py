"""The runner of the suite, mostly with a stand-in for the training program that takes no time."""

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
CONFIGS = SCRIPTS.parent / "configs"

# Writes what a run leaves, from the checkpoint at 100 frames on if there is one. MODE=fail:<word> fails the runs whose
# folder has the word; hang waits with a worker; hang:<seconds> saves on SIGTERM and takes so long for it; quit:<word>
# has saved because somebody else interrupted it.
STAND_IN = """
import json, os, pathlib, signal, subprocess, sys, time
options = dict(argument.split("=", 1) for argument in sys.argv[1:])
run = pathlib.Path(options["run_dir"].strip("'"))
mode, _, word = os.environ.get("MODE", "").partition(":")
checkpoint = run / "checkpoints/frames_100"
print("running", run.name, os.environ.get("CUDA_VISIBLE_DEVICES", "-"), flush=True)
assert options["resume"] == "auto" and checkpoint.exists() == (run / "config.yaml").exists()
run.mkdir(exist_ok=True)
if mode == "fail" and word in run.name:
    sys.exit("out of luck")

def save(*_):
    time.sleep(float(word))
    assert worker.poll() is None, "the workers are needed until all is saved"
    begin()
    sys.exit(75)

def begin():
    checkpoint.mkdir(parents=True)
    (run / "config.yaml").write_text("collector:\\n  total_frames: 200\\n")
    (run / "metrics.jsonl").write_text(json.dumps({"frames": 100, "episode/return": 7.5}) + "\\n")

if mode == "hang":
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    if word:
        signal.signal(signal.SIGTERM, save)
    (run / "pids").write_text(f"{os.getpid()} {worker.pid}")
    time.sleep(600)
lines = [{"frames": 150, "wm/total_loss": 0.1}, {"frames": 200, "episode/return": 2.5}]
lines += [{"frames": 200, "eval/return_mean": 3.0}]
if not checkpoint.exists():
    begin()
    lines.insert(0, {"frames": 100, "episode/return": 1.5})
    (run / "metrics.jsonl").unlink()
if mode == "quit" and word in run.name:
    sys.exit(75)
with open(run / "metrics.jsonl", "a") as file:
    file.writelines(json.dumps(line) + "\\n" for line in lines)
"""


@pytest.fixture
def run_suite(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("run_suite")
    train = tmp_path / "train.py"
    train.write_text(STAND_IN)
    monkeypatch.setattr(module, "TRAIN", train)
    monkeypatch.setattr(module, "POLL", 0.01)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield module
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run(run_suite, monkeypatch, capsys, tmp_path):
    """Run the script as a command would; return its exit status and what it printed."""
    monkeypatch.setattr(run_suite, "check_overrides", lambda *_: None)

    def run(*arguments: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["run_suite.py", "--out", str(tmp_path / "suite"), *arguments])
        code: object = 0
        try:
            run_suite.main()
        except SystemExit as error:
            code = error.code
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


SMALL = ("--tasks", "cheetah_run,ball_in_cup_catch", "--distractions", "none,color_grid_max", "--seeds", "3")


def test_runs_every_cell_and_gathers(run, tmp_path):
    code, output = run(*SMALL, "--jobs", "3")
    out = tmp_path / "suite"
    assert code == 0 and output.count("finished after") == 4
    results = json.loads((out / "results.json").read_text())
    assert {(entry["task"], entry["method"], entry["seed"]) for entry in results} == {
        (task, method, 3)
        for task in ("dmc_cheetah_run", "dmc_ball_in_cup_catch")
        for method in ("dreamer_v3", "dreamer_v3@color_grid_max")
    }
    assert all(list(entry) == ["task", "method", "seed", "xs", "ys"] for entry in results)
    assert all((entry["xs"], entry["ys"]) == ([100, 200], [1.5, 2.5]) for entry in results)
    evaluation = json.loads((out / "results_eval.json").read_text())
    assert [(entry["xs"], entry["ys"]) for entry in evaluation] == [([200], [3.0])] * 4


def test_command_describes_the_cell(run, tmp_path):
    run("--tasks", "ball_in_cup_catch", "--agents", "ppo", "--distractions", "natural_video", "agent/size=1m")
    (folder,) = (path for path in (tmp_path / "suite").iterdir() if path.is_dir())
    assert folder.name == "ball_in_cup_catch__natural_video__ppo__0"
    command, *output = (folder / "console.log").read_text().splitlines()
    assert shlex.split(command)[2:] == [
        "env.frame_skip=2",
        "agent/size=1m",
        "agent=ppo",
        "env=dmc",
        "env.name=ball_in_cup",
        "env.task=catch",
        "env/distraction=natural_video",
        "seed=0",
        f"run_dir={folder}",
        "resume=auto",
    ]
    assert output == [f"running {folder.name} -"]


def test_failed_cells_do_not_stop_the_others_and_run_again(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MODE", "fail:ball_in_cup")
    code, output = run(*SMALL)
    failed = [f"ball_in_cup_catch__{level}__dreamer_v3__3" for level in ("none", "color_grid_max")]
    assert code == f"failed: {', '.join(failed)}"  # a message makes the exit status 1
    assert "out of luck" in (tmp_path / "suite" / failed[0] / "console.log").read_text()
    assert len(json.loads((tmp_path / "suite/results.json").read_text())) == 2
    monkeypatch.delenv("MODE")
    code, output = run(*SMALL)
    assert code == 0 and "4 cells, 2 finished" in output
    assert output.count("moved to") == 2, "the logs of the failed runs are kept"
    assert "out of luck" in (tmp_path / "suite" / f"{failed[0]}.unfinished1" / "console.log").read_text()
    assert len(json.loads((tmp_path / "suite/results.json").read_text())) == 4


def test_finished_cells_are_skipped_and_more_can_be_added(run):
    run(*SMALL)
    code, output = run(*SMALL, "--seeds", "2-3")
    assert code == 0 and "8 cells, 4 finished" in output and "4 of 8" not in output


def test_runs_started_by_hand_count(run, tmp_path):
    _, output = run(*SMALL, "--dry-run")
    commands = output.splitlines()
    assert len(commands) == 4 and not (tmp_path / "suite").exists()
    (tmp_path / "suite").mkdir()
    subprocess.run(["sh", "-c", commands[0]], check=True)
    _, output = run(*SMALL, "--dry-run")
    assert output.splitlines() == commands[1:]
    assert "4 cells, 1 finished" in run(*SMALL)[1]


def test_a_run_that_stopped_early_is_not_finished(run_suite, tmp_path):
    (tmp_path / "config.yaml").write_text("collector:\n  total_frames: 200\n")
    (tmp_path / "metrics.jsonl").write_text('{"frames": 199, "eval/return_mean": 1.0}\n{"frames": 200, "eval/ret')
    assert not run_suite.is_finished(tmp_path) and not (tmp_path / "summary.json").exists()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('\n{"frames": 200, "eval/return_mean": 1.0}\n')
    assert run_suite.is_finished(tmp_path) and (tmp_path / "summary.json").exists()


def test_other_overrides_need_another_folder(run):
    run(*SMALL, "train_ratio=1")
    code, _ = run(*SMALL, "train_ratio=2")
    assert "train_ratio=1" in str(code) and "name another folder" in str(code)


def test_one_runner_for_each_folder(run, run_suite, tmp_path):
    with run_suite.owned(tmp_path / "suite", []):
        assert "name another folder" in str(run(*SMALL)[0])


def test_gpus_are_shared(run, tmp_path):
    run("--tasks", "easy", "--jobs", "3", "--gpus", "4,7")
    logs = [path.read_text().split()[-1] for path in (tmp_path / "suite").glob("*/console.log")]
    assert sorted(logs) == ["4", "4", "7"]


def test_jobs_share_the_cores(run):
    threads = max((os.cpu_count() or 1) // 2, 1)
    assert f" threads={threads} " in run(*SMALL, "--jobs", "2", "--dry-run")[1]
    assert f" threads={threads} " not in run(*SMALL, "--jobs", "2", "--dry-run", "threads=7")[1]
    assert "threads" not in run(*SMALL, "--dry-run")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "reach_target"), "CoppeliaSim"),
        (("--tasks", "chetah_run"), "did you mean cheetah_run"),
        ((), "--tasks: nothing to run"),
        (("--tasks", "easy", "--seeds", "x"), "like 0,1,5 or 0-4"),
        (("--tasks", "easy", "--jobs", "0"), "--jobs=0"),
        (("--tasks", "easy", "env.name=walker"), "use --tasks"),
        (("--tasks", "easy", "experiment=smoke"), "use --phase"),
        (("--tasks", "easy", "resume=auto"), "use --out"),
    ],
)
def test_mistakes_name_themselves(run, arguments, message):
    code, output = run(*arguments)
    assert code == 2 and message in output


def test_misspelt_overrides_are_found_before_the_first_run(run_suite, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["", "--tasks", "easy", "--out", str(tmp_path / "suite"), "train_ration=3"])
    with pytest.raises(SystemExit, match="train_ration"):
        run_suite.main()
    assert not (tmp_path / "suite").exists()


def test_seeds(run_suite):
    assert run_suite.parse_seeds("0-2,7,1") == [0, 1, 2, 7]


@pytest.mark.parametrize("value", ["plain/path-1.0", "with space", "it's=1,2", "back\\slash"])
def test_values_reach_hydra(run_suite, value):
    assert run_suite.load_config(f"run_dir={run_suite.quote(value)}")["run_dir"] == value


@pytest.fixture
def interrupt(tmp_path):
    """Send signals to this process, one after the other, when two runs and their workers are there."""
    over, processes, threads = threading.Event(), [], []

    def interrupt(*numbers: signal.Signals) -> list[int]:
        def wait_and_send() -> None:
            while not over.wait(0.02):
                pids = [pid for path in tmp_path.glob("suite/*/pids") for pid in path.read_text().split()]
                if len(pids) == 4:
                    processes.extend(map(int, pids))
                    for number in numbers:
                        os.kill(os.getpid(), number)
                        over.wait(0.3)
                    return

        threads.append(threading.Thread(target=wait_and_send))
        threads[0].start()
        return processes

    yield interrupt
    over.set()
    for thread in threads:
        thread.join()


def all_gone(processes: list[int]) -> bool:
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(alive(pid) for pid in processes)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_runs_save_and_go_on(run, interrupt, monkeypatch, tmp_path, number):
    """The runner waits until its runs have saved; the next call goes on in the same folders."""
    monkeypatch.setenv("MODE", "hang:0.5")
    processes = interrupt(number)
    code, output = run("--tasks", "easy", "--jobs", "2")
    assert code == 75 and "the same arguments" in output and output.count("interrupted, saved") == 2
    assert len(processes) == 4 and all_gone(processes)
    monkeypatch.delenv("MODE")
    code, output = run("--tasks", "easy", "--jobs", "2")
    assert code == 0 and output.count("goes on from") == 2 and "moved to" not in output
    curves = sorted(entry["ys"] for entry in json.loads((tmp_path / "suite/results.json").read_text()))
    assert curves == [[1.5, 2.5], [7.5, 2.5], [7.5, 2.5]], "the metrics before the interruption are kept"
    logs = [path.read_text() for path in tmp_path.glob("suite/*/console.log")]
    assert sorted(log.count("running") for log in logs) == [1, 2, 2], "so is the output"


def test_runs_that_cannot_save_start_afresh(run, interrupt, monkeypatch):
    monkeypatch.setenv("MODE", "hang")
    processes = interrupt(signal.SIGTERM)
    code, output = run("--tasks", "easy", "--jobs", "2")
    assert code == 75 and output.count("before it could save") == 2
    assert len(processes) == 4 and all_gone(processes)
    monkeypatch.delenv("MODE")
    code, output = run("--tasks", "easy", "--jobs", "2")
    assert code == 0 and output.count("moved to") == 2


def test_a_second_signal_ends_all_runs_at_once(run, interrupt, monkeypatch):
    monkeypatch.setenv("MODE", "hang:600")
    processes = interrupt(signal.SIGTERM, signal.SIGINT)
    code, output = run("--tasks", "easy", "--jobs", "2")
    assert code == 75 and "interrupted, saved" not in output
    assert len(processes) == 4 and all_gone(processes)


def test_a_run_that_was_interrupted_stops_the_others(run, monkeypatch):
    """Somebody ends all of them, a scheduler at its time limit: no other cell starts."""
    monkeypatch.setenv("MODE", "quit:cartpole")
    code, output = run("--tasks", "easy,cheetah_run", "--seeds", "0-1")
    assert code == 75 and "interrupted, saved" in output and "FAILED" not in output
    assert output.count("started,") < 8
    monkeypatch.delenv("MODE")
    assert run("--tasks", "easy,cheetah_run", "--seeds", "0-1")[0] == 0


def test_lines_of_a_dry_run_go_on_too(run, tmp_path):
    """The same line starts a run or lets it go on; only a folder without a checkpoint is in the way."""
    folder = tmp_path / "suite/cheetah_run__none__dreamer_v3__0"
    (folder / "checkpoints/frames_100").mkdir(parents=True)
    (folder / "config.yaml").write_text("collector:\n  total_frames: 200\n")
    _, output = run("--tasks", "cheetah_run", "--dry-run")
    assert "resume=auto" in output and "move this folder" not in output
    (folder / "checkpoints/frames_100").rmdir()
    assert "first move this folder away" in run("--tasks", "cheetah_run", "--dry-run")[1]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_living_run_keeps_the_folder(run_suite, tmp_path, monkeypatch):
    """A runner that was killed leaves its runs behind; nobody moves their folders while they live."""
    monkeypatch.setenv("MODE", "hang")
    (task,) = run_suite.select_tasks(["cheetah_run"])
    cell = run_suite.Cell(task, "none", "dreamer_v3", 0, tmp_path / "suite/cell")
    with run_suite.owned(tmp_path / "suite", []) as lock:
        job = run_suite.start(cell, run_suite.Setup([], 1, [], lock), 0)
    try:
        with pytest.raises(SystemExit, match="alive there"), run_suite.owned(tmp_path / "suite", []):
            pass
    finally:
        run_suite.stop([job])
    with run_suite.owned(tmp_path / "suite", []):
        pass


@pytest.mark.slow
def test_a_real_run(run, run_suite, monkeypatch, tmp_path):
    """A short run of the training program; a second call has nothing to do."""
    monkeypatch.undo()  # no stand-in
    overrides = ["collector=sync", "agent/size=debug", "device=cpu", "train_ratio=1", "logger.backends=[]", "threads=1"]
    overrides += ["env.from_pixels=false", "env.frame_skip=50", "collector.total_frames=3200", "logger.video=false"]
    overrides += ["collector.frames_per_batch=1600", "collector.init_random_frames=1600", "eval.episodes=1"]
    overrides += ["replay_buffer.batch_size=2", "replay_buffer.sequence_length=4", "eval.interval=0"]
    for finished in (0, 1):
        code, output = run("--tasks", "pendulum_swingup", *overrides)
        assert code == 0 and f"1 cells, {finished} finished" in output, output
    for name in ("results.json", "results_eval.json"):
        (result,) = json.loads((tmp_path / "suite" / name).read_text())
        assert result["task"] == "dmc_pendulum_swingup" and result["xs"][-1] >= 3200
        assert all(0 <= y <= 1000 for y in result["ys"])


@pytest.mark.parametrize("phase", ["phase1_validation", "phase2_ablation", "phase3_full", "phase4_sweep"])
def test_phases(run_suite, monkeypatch, tmp_path, phase):
    """Their tasks and distractions exist, and a run has the settings of its phase and of its cell."""
    monkeypatch.setattr(sys, "argv", ["", "--phase", phase, "--out", str(tmp_path)])
    args = run_suite.parse_args()
    cells = run_suite.make_cells(args)
    assert len({cell.name for cell in cells}) == len(cells)
    for distraction in args.distractions:
        assert (CONFIGS / f"env/distraction/{distraction}.yaml").exists(), distraction
    cell = cells[-1]._replace(distraction="none")
    config = run_suite.load_config(*run_suite.make_command(cell, [f"experiment={phase}"])[2:])
    assert config["collector"]["total_frames"] == (100_000 if phase == "phase1_validation" else 1_000_000)
    assert (config["env"]["name"], config["env"]["task"]) == (cell.task.domain, cell.task.task)
    assert config["env"]["distraction"] == {"name": "none"}, "the cell wins over the phase"
    assert config["seed"] == cell.seed and config["env"]["frame_skip"] == 2


def test_every_phase_has_a_configuration(run_suite):
    assert set(run_suite.PHASES) == {path.stem for path in (CONFIGS / "experiment").glob("phase*.yaml")}
    assert set(run_suite.PHASES["phase2_ablation"]["distractions"].split(",")) == {
        "none",
        "natural_video",
        *(f"color_grid_{level}" for level in ("action", "reward", "sequence", "action_cross_sequence")),
        *(f"color_grid_{level}" for level in ("minimum", "max")),
    }


def test_documented_commands_are_understood(run_suite, monkeypatch):
    text = (SCRIPTS.parent / "docs/benchmark.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("python scripts/run_suite.py")]
    assert len(commands) == 5
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
        assert run_suite.make_cells(run_suite.parse_args())
