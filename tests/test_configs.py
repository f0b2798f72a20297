"""The configuration: every choice composes, keys equal keyword names, and mistakes name themselves."""

import inspect
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dreamer.agents import EnvSpec, load
from dreamer.collection import make_collector
from dreamer.replay import SequenceReplay
from dreamer.settings import Start, choose_run_dir
from dreamer.train import build, check, choose_device
from envs import make_env
from envs.transforms.distraction import make_distraction

CONFIGS = Path(__file__).parents[1] / "configs"
SIZES = sorted(path.stem for path in (CONFIGS / "agent/size").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))


def config(*overrides: str) -> dict:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.to_container(compose("train", overrides=list(overrides)), resolve=True)


def group(name: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / name).glob("*.yaml"))


@pytest.mark.parametrize(
    "override",
    [
        f"{name}={choice}"
        for name in ("env", "env/distraction", "collector", "replay_buffer", "optimization", "logger")
        for choice in group(name)
    ]
    + [f"agent/size={size}" for size in SIZES]
    + [f"experiment={name}" for name in EXPERIMENTS],
)
def test_every_choice_composes(override):
    assert config(override)["agent"]["name"] == "dreamer_v3"


@pytest.mark.parametrize("choice", group("env/distraction"))
def test_distractions_can_be_made(choice):
    """Keys equal keyword names, and the values fit together."""
    options = config(f"env/distraction={choice}")["env"]["distraction"]
    assert (make_distraction(options) is None) == (choice == "none")


def keywords(function) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters), f"{function} takes anything"
    return {p.name for p in parameters}


def test_keys_equal_keywords():
    settings = config()
    assert set(settings["env"]) <= keywords(make_env)
    collection = set(settings["collector"]) - {"total_frames", "sync_interval", "timeout", "restart"}
    assert collection <= keywords(make_collector)
    assert set(settings["replay_buffer"]) - {"size"} <= keywords(SequenceReplay)


@pytest.mark.parametrize("agent", group("agent"))
def test_agent_keys_equal_keywords_of_build(agent):
    settings = config(f"agent={agent}")["agent"]
    assert set(settings) - {"name"} == keywords(load(agent).build) - {"env_spec", "device", "optimization"}


def test_sizes_are_one_dial():
    """Units = hidden = d, belief = 8 d, classes = depth = d / 16."""
    for size in set(SIZES) - {"debug"}:
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
