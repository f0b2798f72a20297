"""Where a run starts, and with which configuration."""

import json
from functools import partial
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dreamer.checkpoint_files import Damaged, publish
from dreamer.redaction import REDACTED
from dreamer.run_folder import RUNS, locked, name_run
from dreamer.settings import apply_overrides, choose_run_dir, choose_start, list_changes
from tests.helpers import compose_config

SAVED = ("env=mock", "train_ratio=64", "agent/size=1m", "seed=3")


def compose(overrides):
    return compose_config(*overrides)


def save(run_dir: Path, frames: int, config: dict, busy: bool = False) -> Path:
    """A checkpoint that holds nothing but a configuration."""
    text = OmegaConf.to_yaml(OmegaConf.create(config))
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(text)
    write = partial(lambda text, stage: (stage / "config.yaml").write_text(text), text)
    return publish(run_dir / "checkpoints", f"frames_{frames}", write, {"frames": frames, "busy": busy})


def start(run_dir: Path, *overrides: str):
    overrides = ("resume=auto", f"run_dir={run_dir}", *overrides)
    config = compose(overrides)
    return choose_start(config, choose_run_dir(config), overrides, compose)


class TestConfiguration:
    def test_the_saved_one_rules(self, tmp_path):
        save(tmp_path, 100, compose(SAVED))
        chosen = start(tmp_path)
        assert chosen.config["train_ratio"] == 64 and chosen.config["env"]["backend"] == "mock"
        assert (chosen.frames, list(chosen.changes)) == (100, [])

    @pytest.mark.parametrize(
        ("override", "changes"),
        [
            ("train_ratio=512", ["train_ratio: 64 -> 512"]),  # the default, but said explicitly
            ("collector.total_frames=7", ["collector.total_frames: 1000000 -> 7"]),
            ("train_ratio=64", []),
            ("env.task=discrete", ["env.task: continuous -> discrete"]),
            ("+env.transforms=[]", ["env.transforms: nothing -> []"]),
        ],
    )
    def test_explicit_overrides_apply(self, override, changes, tmp_path):
        save(tmp_path, 100, compose(SAVED))
        overrides = ("env=mock", override) if override.startswith("env.") else (override,)
        assert list(start(tmp_path, *overrides).changes) == changes

    def test_a_group_applies_as_a_whole(self, tmp_path):
        save(tmp_path, 100, compose((*SAVED, "env.task=discrete")))
        chosen = start(tmp_path, "env/distraction=color_grid_action", "agent/size=12m")
        assert chosen.config["env"]["distraction"]["name"] == "color_grid"
        assert chosen.config["agent"]["size"]["units"] == compose(())["agent"]["size"]["units"]
        assert chosen.config["env"]["task"] == "discrete", "the rest of env stays"

    def test_the_same_command_line_changes_nothing(self, tmp_path):
        """As a cluster does that runs a job again; an experiment is a bundle of overrides."""
        overrides = ("experiment=smoke", "seed=3", "env.image_size=32")
        save(tmp_path, 100, compose(overrides))
        assert list(start(tmp_path, *overrides).changes) == []

    def test_an_experiment_applies(self, tmp_path):
        save(tmp_path, 100, compose(("env=mock", "collector=sync", "agent/size=debug")))
        changes = start(tmp_path, "experiment=smoke").changes
        assert "collector.total_frames: 1000000 -> 512" in changes
        assert not [line for line in changes if line.startswith(("checkpoint", "optimization"))]

    @pytest.mark.parametrize("override", ["seed=4", "agent.name=other"])
    def test_what_cannot_change(self, override, tmp_path):
        save(tmp_path, 100, compose(SAVED))
        with pytest.raises(ValueError, match=f"{override.split('=')[0]}.*cannot change"):
            start(tmp_path, override)

    def test_the_agent_of_the_run_keeps_its_settings_where_it_is_named(self):
        saved = compose(("agent=ppo", "agent.units=7", "agent.epochs=2"))
        overrides = ("agent=ppo", "agent.epochs=3")
        agent = apply_overrides(saved, compose(overrides), overrides, compose)["agent"]
        assert (agent["units"], agent["epochs"]) == (7, 3)

    def test_secrets_come_from_the_command_line(self):
        given = compose(("+logger.api_key=hush",))
        saved = given | {"logger": given["logger"] | {"api_key": REDACTED}}
        assert apply_overrides(saved, given, (), compose)["logger"]["api_key"] == "hush"
        assert list_changes(saved, given) == []


class TestChoice:
    def test_auto_starts_anew(self, tmp_path):
        assert start(tmp_path / "run").checkpoint is None

    def test_auto_finds_the_newest_run_of_the_same_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        config = compose(("resume=auto", *SAVED))
        assert choose_run_dir(config).parent == RUNS
        for name in ("20260101-000000", "20260102-000000", "other"):
            save(RUNS / f"{name_run(config)}_{name}", 100, config)
        latest = RUNS / f"{name_run(config)}_20260102-000000"
        assert choose_run_dir(config) == latest
        save(latest, config["collector"]["total_frames"], config, busy=True)
        assert choose_run_dir(config) == latest, "there is still something to learn"
        save(latest, config["collector"]["total_frames"], config)
        assert not choose_run_dir(config).exists(), "a finished run is left alone"

    def test_falls_back_and_says_so(self, tmp_path):
        save(tmp_path, 100, compose(SAVED))
        newest = save(tmp_path, 200, compose(SAVED))
        (newest / "config.yaml").write_text("seed: 5")
        chosen = start(tmp_path)
        assert chosen.frames == 100 and "frames_200" in chosen.notes[0] and "config.yaml" in chosen.notes[0]

    def test_nothing_is_whole(self, tmp_path):
        (save(tmp_path, 100, compose(SAVED)) / "config.yaml").unlink()
        with pytest.raises(Damaged, match=r"config\.yaml is missing"):
            start(tmp_path)

    def test_a_checkpoint_that_is_not_the_newest(self, tmp_path):
        old = save(tmp_path / "run", 100, compose(SAVED))
        config = compose((f"resume={old}",))
        assert choose_run_dir(config) == tmp_path / "run"
        save(tmp_path / "run", 200, compose(SAVED))
        with pytest.raises(FileExistsError, match="branch off"):
            choose_run_dir(config)
        overrides = (f"resume={old}", f"run_dir={tmp_path / 'branch'}")
        config = compose(overrides)
        chosen = choose_start(config, choose_run_dir(config), overrides, compose)
        assert (chosen.run_dir, chosen.frames) == (tmp_path / "branch", 100)

    def test_no_such_run(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="neither a run folder nor a checkpoint"):
            choose_run_dir(compose((f"resume={tmp_path}",)))

    def test_a_run_goes_on_in_its_own_folder(self, tmp_path):
        save(tmp_path / "run", 100, compose(SAVED))
        with pytest.raises(FileExistsError, match="its own folder"):
            choose_run_dir(compose((f"resume={tmp_path / 'run'}", f"run_dir={tmp_path / 'other'}")))


def test_one_process_per_folder(tmp_path):
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").touch()
        with pytest.raises(BlockingIOError, match="another process"), locked(tmp_path / "run"):
            pass
    with locked(tmp_path / "empty"):
        pass
    assert not (tmp_path / "empty").exists(), "an empty folder is removed again"
    assert json.dumps(sorted(path.name for path in tmp_path.iterdir())) == '["run"]'
