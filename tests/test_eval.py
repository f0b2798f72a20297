"""The evaluation program: the returns of the training's own evaluation, other environments, and hostile run folders."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import av
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dreamer.eval import evaluate, offer_environment, prepare
from dreamer.policy import main as export_policy
from tests.dreamer.saved_policies import OTHERS, PIXELS, save_run
from tests.helpers import CONFIGS, make_run

ROOT = Path(__file__).parents[1]


def run_eval(run_dir: Path, *overrides: str) -> dict:
    """Evaluate in this process as the command line does, four episodes."""
    overrides = (f"run={run_dir}", "episodes=4", "device=cpu", *overrides)
    offer_environment(overrides)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = OmegaConf.to_container(compose("eval", overrides=list(overrides)), resolve=True)
    report = evaluate(config, prepare(config))
    written = json.loads((Path(config["out"] or run_dir) / "eval.json").read_text())
    assert written == json.loads(json.dumps(report))
    return written


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder of an agent that sees a vector; evaluations of it go elsewhere."""
    folder = tmp_path_factory.mktemp("saved")
    save_run(folder)
    return folder


def read_last(run_dir: Path, name: str) -> float:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line][-1]


def count_frames(path: Path) -> tuple[int, int, int]:
    """Frames, height and width of a video."""
    with av.open(str(path)) as container:
        shapes = [(frame.height, frame.width) for frame in container.decode(video=0)]
    return len(shapes), *shapes[0]


class TestReturns:
    def test_are_those_of_the_training(self, tmp_path):
        """The last evaluation of a run, from its last checkpoint, its seed and its environment."""
        trainer = make_run(tmp_path, "env.name=reach", "eval.episodes=4", "eval.num_envs=2", "seed=5")
        trainer.train()
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        report = run_eval(tmp_path)
        sampled = report["results"]["sampled"]
        assert sampled["mean"] == pytest.approx(read_last(tmp_path, "eval/return_mean"), abs=1e-6)
        assert sampled["std"] == pytest.approx(read_last(tmp_path, "eval/return_std"), abs=1e-6)
        assert sampled["std"] > 0
        assert (report["frames"], report["seed"], report["as_trained"]) == (96, 5, True)
        assert {path: path.stat().st_mtime_ns for path in before} == before, "the run is not touched"

    def test_every_episode_is_written(self, saved, tmp_path):
        report = run_eval(saved, f"out={tmp_path}", "env.frame_skip=2")
        assert list(report["results"]) == ["sampled", "deterministic"]
        result = report["results"]["sampled"]
        assert len(set(result["returns"])) == len(result["returns"]) == 4
        assert result["lengths"] == [10] * 4, "frames, not steps"
        assert len({tuple(seed) for seed in result["seeds"]}) == 4
        assert result["min"] == min(result["returns"]) <= result["iqm"] <= result["max"]
        assert not report["as_trained"] and report["env"]["frame_skip"] == 2
        assert not (saved / "eval.json").exists()

    @pytest.mark.parametrize("name", OTHERS)
    def test_other_agents(self, name, tmp_path):
        save_run(tmp_path, base=("env=mock", *OTHERS[name]))
        report = run_eval(tmp_path)
        assert report["agent"] == name and set(report["results"]) == {"sampled", "deterministic"}
        assert len(set(report["results"]["sampled"]["returns"])) == 4

    def test_seed(self, saved, tmp_path):
        """Another seed is another set of episodes; the same one is the same, alone or beside the other kind."""
        both, seeded, again = (
            run_eval(saved, f"out={tmp_path}", *overrides)["results"]
            for overrides in ((), ("seed=1", "deterministic=true"), ("seed=0", "deterministic=true"))
        )
        assert list(seeded) == ["deterministic"]
        assert (
            both["deterministic"]["returns"] == again["deterministic"]["returns"] != seeded["deterministic"]["returns"]
        )
        assert both["sampled"]["returns"] != both["deterministic"]["returns"]


class TestOtherEnvironments:
    def test_distraction(self, tmp_path):
        """Of another group, then a single key of the one that the run had; the rest stays as trained."""
        save_run(tmp_path, *PIXELS, "env/distraction=color_grid_action")
        options = run_eval(tmp_path, "episodes=1", "env.distraction.table_seed=2")["env"]["distraction"]
        assert (options["table_seed"], options["level"]) == (2, "action")
        env = run_eval(tmp_path, "episodes=1", "env/distraction=natural_video")["env"]
        assert env["distraction"]["name"] == "natural_video" and "table_seed" not in env["distraction"]
        assert env["image_size"] == 16 and env["backend"] == "mock"

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("env.image_size=32", r"observation 'pixels'.*\[32, 32, 3\].*need torch.uint8 \[16, 16, 3\]"),
            ("env.from_pixels=false", "observation 'pixels'.*gives nothing"),
            ("env.task=discrete", "actions.*one_hot.*continuous"),
            ("deterministic=maybe", "'maybe'.*both"),
            ("episodes=0", "episodes=0"),
        ],
    )
    def test_that_do_not_fit_are_refused(self, override, message, tmp_path):
        save_run(tmp_path, *PIXELS)
        with pytest.raises(ValueError, match=message):
            run_eval(tmp_path, override)
        assert not (tmp_path / "eval.json").exists()

    def test_an_unknown_key_is_refused(self, saved, tmp_path):
        with pytest.raises(Exception, match="nmae"):
            run_eval(saved, f"out={tmp_path}", "env.nmae=counter")


class TestFilm:
    def test_of_what_the_agent_sees(self, tmp_path):
        save_run(tmp_path, *PIXELS)
        results = run_eval(tmp_path, "video=true", "episodes=1")["results"]
        for kind in ("sampled", "deterministic"):
            assert count_frames(tmp_path / results[kind]["video"]) == (11, 240, 240)

    def test_of_an_agent_that_sees_no_images(self, saved, tmp_path):
        """It plays the first episodes again in front of a camera; its returns are the same."""
        filmed, plain = (
            run_eval(saved, f"out={tmp_path / video}", f"video={video}", "deterministic=false")
            for video in ("true", "false")
        )
        assert filmed["results"]["sampled"]["returns"] == plain["results"]["sampled"]["returns"]
        assert count_frames(tmp_path / "true/eval_sampled.mp4") == (11, 240, 240)
        assert sorted(path.name for path in (tmp_path / "false").iterdir()) == ["eval.json"]


class TestHostileRunFolders:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"_target_": "os.system"}, "_target_"),
            ({"defaults": [{"/hydra/launcher": "evil"}]}, "defaults"),
            ({"name": "${oc.env:HOME}"}, "no interpolations"),
            ({"distraction": {"name": "color_grid", "level": "${oc.env:HOME}"}}, "no interpolations"),
            ({"distraction": {"name": "none", "defaults": []}}, "'defaults'"),
            ({"render": {"a.b": 1}}, "'a.b'"),
            ({"transforms": ["os.system"]}, "transforms"),
        ],
    )
    def test_environments(self, change, message, tmp_path):
        save_run(tmp_path)
        path = tmp_path / "policy.json"
        description = json.loads(path.read_text())
        path.write_text(json.dumps({**description, "env": description["env"] | change}))
        with pytest.raises(ValueError, match=message):
            run_eval(tmp_path)

    def test_a_module_is_imported_only_if_trusted(self, tmp_path, monkeypatch):
        """An id of Gymnasium may name a module; one that the command line names is trusted."""
        code = "import pathlib; pathlib.Path(__file__).with_suffix('.ran').touch(); raise RuntimeError('it ran')"
        (tmp_path / "evil_module.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        save_run(tmp_path / "run")
        offer = {"backend": "gym", "name": "evil_module:CartPole-v1", "task": None, "from_pixels": False}
        description = json.loads((tmp_path / "run/policy.json").read_text()) | {"env": offer | {"frame_skip": 1}}
        (tmp_path / "run/policy.json").write_text(json.dumps(description))
        with pytest.raises(ValueError, match="trust=true"):
            run_eval(tmp_path / "run")
        assert not (tmp_path / "evil_module.ran").exists()
        with pytest.raises(RuntimeError, match="it ran"):
            run_eval(tmp_path / "run", "trust=true")
        assert (tmp_path / "evil_module.ran").exists()


@pytest.mark.slow
def test_command_line(tmp_path):
    """From anywhere, with nothing but the run folder."""
    save_run(tmp_path / "run", *PIXELS, "env/distraction=color_grid_action")
    command = [sys.executable, str(ROOT / "dreamer/eval.py"), "run=run", "episodes=2", "env/distraction=none"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "deterministic" in result.stdout and "eval.json" in result.stdout
    assert json.loads((tmp_path / "run/eval.json").read_text())["env"]["distraction"] == {"name": "none"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.slow
def test_documentation(tmp_path, monkeypatch):
    """Every block of docs/use_a_policy.md, in order, with short evaluations in this process."""
    text = (ROOT / "docs/use_a_policy.md").read_text()
    blocks = re.findall(r"```(\w*)\n(.*?)```", text, flags=re.S)
    monkeypatch.chdir(tmp_path)
    for name in (None, "best"):
        save_run(Path("runs/my_run"), "env.from_pixels=true", name=name)
    evaluations = 0
    for language, block in blocks:
        if language == "python":
            if "eval.json" in block:
                run_eval(Path("runs/my_run"))
            exec(compile(block, "docs/use_a_policy.md", "exec"), {})
            continue
        for line in block.splitlines():
            _, program, *arguments = shlex.split(line)
            if program == "-m":
                assert arguments.pop(0) == "dreamer.policy"
                export_policy(arguments)
            else:
                assert program == "dreamer/eval.py"
                run_eval(Path(arguments[0].removeprefix("run=")), *arguments[1:], "episodes=2", "num_envs=1")
                evaluations += 1
    assert evaluations == 4 and (tmp_path / "my_policy/policy.safetensors").exists()
