"""The configuration: every choice composes, keys equal keyword names, and mistakes name themselves."""

import inspect
from itertools import zip_longest

import pytest
import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from dreamer.agents import EnvSpec, load
from dreamer.collection import count_windows, make_collector
from dreamer.replay import SequenceReplay
from dreamer.settings import Start, choose_run_dir
from dreamer.train import build, check, choose_device
from envs import make_env
from envs.transforms.distraction import make_distraction
from tests.helpers import CONFIGS
from tests.helpers import compose_config as config


def group(name: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / name).glob("*.yaml"))


GROUPS = ("env/distraction", "env", "collector", "replay_buffer", "optimization", "logger", "agent/size")
CHOICES = zip_longest(*([f"{name}={choice}" for choice in group(name)] for name in GROUPS))


@pytest.mark.parametrize("overrides", [" ".join(filter(None, row)) for row in CHOICES])
def test_every_choice_composes(overrides):
    """One of each group at a time. The keys of a distraction equal keyword names, and its values fit together."""
    settings = config(*overrides.split())
    assert settings["agent"]["name"] == "dreamer_v3"
    if "env/distraction=" in overrides:
        distraction = make_distraction(settings["env"]["distraction"])
        assert (distraction is None) == ("env/distraction=none" in overrides)


@pytest.mark.parametrize("name", group("experiment"))
def test_every_experiment_composes(name):
    """Experiments of other agents begin with the agent's name, or with smoke."""
    of = name.removeprefix("smoke_")
    expected = next((agent for agent in group("agent") if f"{of}_".startswith(f"{agent}_")), "dreamer_v3")
    assert config(f"experiment={name}")["agent"]["name"] == expected


def keywords(function) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters), f"{function} takes anything"
    return {p.name for p in parameters}


def test_keys_equal_keywords():
    settings = config()
    assert set(settings["env"]) <= keywords(make_env)
    collection = set(settings["collector"]) - {"total_frames", "sync_interval", "timeout", "restart"}
    assert collection <= keywords(make_collector)
    assert set(settings["replay_buffer"]) - {"size", "batch_unit"} <= keywords(SequenceReplay)


@pytest.mark.parametrize("agent", group("agent"))
def test_agent_keys_equal_keywords_of_build(agent):
    settings = config(f"agent={agent}")["agent"]
    assert set(settings) - {"name"} == keywords(load(agent).build) - {"env_spec", "device", "optimization"}


def test_sizes_are_one_dial():
    """Units = hidden = d, belief = 8 d, classes = depth = d / 16."""
    for size in set(group("agent/size")) - {"debug"}:
        c = config(f"agent/size={size}")["agent"]["size"]
        d = c["units"]
        assert c == {
            "belief_size": 8 * d,
            "hidden_size": d,
            "categoricals": 32,
            "classes": d // 16,
            "depth": d // 16,
            "units": d,
        }


def test_defaults_are_the_published_protocol():
    c = config()
    assert (c["train_ratio"], c["env"]["frame_skip"], c["collector"]["total_frames"]) == (512, 2, 1_000_000)
    assert (c["replay_buffer"]["batch_size"], c["replay_buffer"]["sequence_length"]) == (16, 64)
    assert c["optimization"]["lr"] == 4e-5 and c["optimization"]["eps"] == 1e-20
    assert c["agent"]["size"]["units"] == 256


@pytest.mark.parametrize("override", ["env.nmae=walker", "agent.lambda=0.9", "collector.workers=3"])
def test_unknown_key_is_refused(override):
    with pytest.raises((HydraException, OmegaConfBaseException), match=override.split("=")[0].split(".")[1]):
        config(override)


def test_unknown_choice_lists_the_choices():
    with pytest.raises(HydraException, match="multi_async"):
        config("collector=parallel")


def test_stale_agent_key_names_itself():
    settings = config("env=mock", "agent/size=debug")
    knobs = settings["agent"] | {"kl_balance": 0.8}
    spec = EnvSpec.of(make_env(**settings["env"]))
    name = knobs.pop("name")
    with pytest.raises(TypeError, match="kl_balance"):
        load(name).build(env_spec=spec, device=torch.device("cpu"), optimization=settings["optimization"], **knobs)


def test_unknown_agent_lists_the_agents():
    with pytest.raises(ValueError, match=r"'dreamer_v4'.*dreamer_v3"):
        load("dreamer_v4")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+agent.loss_weights.kl=1.0", "kl"),
        ("~agent.loss_weights.value", "value"),
        ("optimization.autocast=float16", "float16.*bfloat16"),
        ("optimization.cudagraph=true", "cudagraph=true.*prefetch=0"),
        ("collector.frames_per_batch=3", "frames_per_batch=3"),
        ("collector.mode=threads", "'threads'.*multi_sync"),
        ("logger.backends=[mlflow]", "mlflow.*tensorboard"),
        ("env.task=run", "run"),
        ("env.name=counters", "counter"),
        ("replay_buffer.batch_size=0", "batch_size=0"),
        ("replay_buffer.batch_unit=frames", "batch_unit='frames'"),
        ("replay_buffer.size=0", "replay_buffer.size=0"),
        ("train_ratio=fast", "train_ratio='fast'"),
        ("eval.num_envs=0", "eval.num_envs=0"),
        ("env.frame_skip=0", "frame_skip=0"),
        ("+env.render.shadows=false", "shadows"),
    ],
)
def test_bad_values_name_themselves(override, message, tmp_path):
    overrides = ["env=mock", "env.frame_skip=2", "collector=sync", "agent/size=debug", "device=cpu", override]
    settings = config(*overrides)
    with pytest.raises((ValueError, TypeError), match=message):
        check(settings)
        build(Start(settings, tmp_path / "run"))
    assert not (tmp_path / "run").exists(), "nothing is written before everything is known to be right"


def test_unknown_downsample_names_the_choices(tmp_path):
    overrides = ["env=mock", "env.from_pixels=true", "collector=sync", "agent/size=debug", "agent.downsample=max"]
    with pytest.raises(ValueError, match=r"downsample='max'.*pool"):
        build(Start(config(*overrides), tmp_path))


def test_run_dir_is_never_reused(tmp_path):
    settings = config(f"run_dir={tmp_path}")
    assert choose_run_dir(settings) == tmp_path
    (tmp_path / "config.yaml").touch()
    with pytest.raises(FileExistsError, match="name another"):
        choose_run_dir(settings)


def test_device():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_batches_counted_in_steps():
    replay = {"batch_unit": "steps", "batch_size": 1000, "sequence_length": 50}
    assert count_windows(replay) == 20 and count_windows(replay | {"batch_unit": "windows"}) == 1000
    with pytest.raises(ValueError, match=r"batch_size=1000.*sequence_length=64"):
        count_windows(replay | {"sequence_length": 64})
