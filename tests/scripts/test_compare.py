"""The comparison of agents: its table by hand, what counts as one agent, what is refused, and from end to end."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dreamer.score_statistics import iqm
from tests.dreamer.saved_policies import OTHERS, save_run

SCRIPTS = Path(__file__).parents[2] / "scripts"
PPO = ("env=mock", *OTHERS["ppo"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of one agent, and another agent, with the metrics of their training."""
    folder = tmp_path_factory.mktemp("runs")
    save_run(folder / "v3")
    save_run(folder / "ppo_1", "seed=1", base=PPO)
    save_run(folder / "ppo_2", "seed=2", frames=200, base=PPO)
    write_metrics(folder / "v3", {"frames": 50, "trainer/env_frames": 50}, {"frames": 100, "trainer/env_frames": 700})
    write_metrics(folder / "ppo_1", {"frames": 90, "trainer/env_frames": 90}, {"frames": 100, "eval/return_mean": 1.0})
    return folder


def write_metrics(run_dir, *lines):
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("compare")


@pytest.fixture
def run(script, monkeypatch, tmp_path):
    """Runs the program; what it wrote."""

    def run(*arguments) -> dict:
        given = ["compare.py", *map(str, arguments), "episodes=4", "device=cpu", f"out={tmp_path / 'out'}"]
        monkeypatch.setattr(sys, "argv", given)
        script.main()
        return json.loads((tmp_path / "out/comparison.json").read_text())

    return run


class TestComparison:
    def test_from_end_to_end(self, runs, run, tmp_path, capsys):
        """The same episodes for all; scores of seeds, or of episodes where there is one run only; frames consumed."""
        found = run(runs / "v3", runs / "ppo_1", runs / "ppo_2")
        reports = {Path(entry["run"]).name: entry for entry in found["runs"]}
        seeds = [result["seeds"] for entry in found["runs"] for result in entry["results"].values()]
        assert seeds == [seeds[0]] * 6 and found["seed"] == 1_000_000
        assert [entry["consumed_frames"] for entry in found["runs"]] == [700, 100, 200]
        single, _, several, _ = found["agents"]
        assert [(row["agent"], row["actions"], row["runs"]) for row in found["agents"]] == [
            (name, kind, count)
            for name, count in (("dreamer_v3", 1), ("ppo", 2))
            for kind in ("sampled", "deterministic")
        ]
        returns = reports["v3"]["results"]["sampled"]["returns"]
        assert single["mean"] == pytest.approx(np.mean(returns)) and single["iqm"] == pytest.approx(iqm(returns))
        assert single["std"] == pytest.approx(np.std(returns, ddof=1)) and single["frames"] == [700]
        means = [reports[name]["results"]["sampled"]["mean"] for name in ("ppo_1", "ppo_2")]
        assert several["mean"] == pytest.approx(sum(means) / 2) and several["frames"] == [100, 200]
        assert several["interval"] == [min(means), max(means)], "two seeds, drawn with replacement"
        table = (tmp_path / "out/comparison.md").read_text()
        assert (
            "100 to 200" in table and "| dreamer_v3 | sampled | 1 | 700 |" in table and table in capsys.readouterr().out
        )
        assert not any((runs / name / "eval.json").exists() for name in reports), "the runs are not touched"
        assert (tmp_path / "out/3_ppo_2/eval.json").exists()

    @pytest.mark.slow
    def test_settings_make_another_agent(self, runs, run, tmp_path):
        """Named by what is different; with the given seed and kind of actions."""
        save_run(tmp_path / "wide", "agent.units=9", "seed=3", base=PPO)
        found = run(runs / "ppo_1", tmp_path / "wide", "deterministic=true", "seed=7")
        rows = found["agents"]
        assert [row["agent"] for row in rows] == ["ppo agent.units=8", "ppo agent.units=9"]
        assert {row["actions"] for row in rows} == {"deterministic"} and found["seed"] == 7


def test_a_seed_of_its_own_makes_no_other_agent(script, tmp_path):
    """Nor does the run whose data an agent learns from."""
    base, entries = ("env=mock", *OTHERS["world_models"]), []
    for seed in (1, 2):
        save_run(
            tmp_path / str(seed), f"seed={seed}", "agent.stages=[controller]", f"agent.source=runs/{seed}", base=base
        )
        config = script.configure(tmp_path / str(seed), [])
        entries.append(script.Entry(tmp_path / str(seed), config, script.prepare(config)))
    assert script.name_agents(entries) == ["world_models"] * 2


def test_frames_that_were_consumed(script, tmp_path):
    """Up to the checkpoint: a line of an evaluation has no count of its own, and an older checkpoint had fewer."""
    save_run(tmp_path / "run", frames=100)
    save_run(tmp_path / "run", name="best", frames=50)
    lines = ({"frames": 50, "trainer/env_frames": 60}, {"frames": 100, "trainer/env_frames": 900}, {"frames": 100})
    write_metrics(tmp_path / "run", *lines)

    def count(*arguments):
        (folder,), overrides = script.parse([str(argument) for argument in arguments])
        config = script.configure(folder, overrides)
        return script.count_frames(script.Entry(folder, config, script.prepare(config)))

    assert count(tmp_path / "run") == 900
    assert count(tmp_path / "run", "checkpoint=best") == 60
    assert count(tmp_path / "run/checkpoints/frames_100") == 900
    (tmp_path / "run/metrics.jsonl").unlink()
    assert count(tmp_path / "run") == 100


class TestRefuses:
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (("env.task=discrete",), r"env\.task': 'continuous'.*env\.task': 'discrete'"),
            (("env.frame_skip=2",), r"env\.frame_skip': 1.*2"),
            (("env.from_pixels=true", "env.image_size=64", "env/distraction=color_grid_action"), "distraction.*to all"),
            (("seed=1",), "same agent with the same seed 1"),
            (("seed=1000000",), "not held out"),
        ],
    )
    def test_before_anything_is_written(self, overrides, message, runs, run, tmp_path):
        save_run(tmp_path / "other", *overrides, base=PPO)
        with pytest.raises(SystemExit, match=message):
            run(runs / "ppo_1", tmp_path / "other")
        assert not (tmp_path / "out").exists()

    @pytest.mark.slow
    def test_unless_all_are_given_the_same(self, runs, run, tmp_path):
        save_run(tmp_path / "other", "env.frame_skip=2", base=PPO)
        assert run(runs / "ppo_1", tmp_path / "other", "env.frame_skip=5")["env"]["frame_skip"] == 5

    def test_what_is_seen_may_differ(self, script):
        """And settings that say nothing; but not what happens, even where it is named beside what is seen."""
        env = {"name": "CarRacing-v3", "task": None, "image_size": 64, "render": {"fast": True}, "distraction": None}
        seen = {"image_size": 96, "render": {"fast": False}, "grey": True, "distraction": {"name": "none"}}
        described = script.describe_task(env | {"options": {"continuous": True, "crop_rows": [0, 84]}})
        assert described == {"name": "CarRacing-v3", "options.continuous": True, "distraction.name": "none"}
        assert script.describe_task(env | seen) == script.describe_task(env | {"options": {}})

    @pytest.mark.parametrize("arguments", [(), ("episodes=2",), ("run=a",)])
    def test_no_runs(self, script, arguments):
        with pytest.raises(ValueError, match="usage"):
            script.parse(arguments)

    def test_a_folder_twice(self, script, runs):
        with pytest.raises(ValueError, match="once"):
            script.parse([str(runs / "v3"), f"{runs}/ppo_1/../v3"])

    def test_an_unknown_key(self, runs, run):
        with pytest.raises(SystemExit, match="episode"):
            run(runs / "v3", "episode=2")
