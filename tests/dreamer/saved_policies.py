"""Run folders with the checkpoints of small agents, without any training."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchrl.checkpoint import Checkpoint

from dreamer.agents import Agent, EnvSpec, load
from dreamer.checkpoint_files import publish
from dreamer.checkpoints import TensorsAndJSON
from dreamer.policy import describe_policy
from envs import make_env
from tests.helpers import SMALL_PPO, SMALL_V1, SMALL_WM, compose_config

SMALL = ("env=mock", "agent/size=debug")
OTHERS = {"dreamer_v1": SMALL_V1, "ppo": SMALL_PPO, "world_models": SMALL_WM}  # agents without sizes
PIXELS = ("env.from_pixels=true", "env.image_size=16")


def save_run(
    run_dir: Path,
    *overrides: str,
    frames: int = 100,
    name: str | None = None,
    base: Sequence[str] = SMALL,
    **spec: Any,
) -> Agent:
    """Write a checkpoint and the description of an agent on the mock environment, whose actor is far from uniform.

    Args:
        run_dir: Run folder; further checkpoints may be there.
        overrides: Of the configuration.
        frames: Number of the checkpoint; other numbers have other weights.
        name: Of the checkpoint, other than frames_<N>.
        base: Further overrides: the environment and a small agent.
        spec: Replaces parts of what the environment offers: observation, action.
    """
    config = compose_config(*base, *overrides)
    env_spec = EnvSpec.of(make_env(**config["env"]))._replace(**spec)
    torch.manual_seed(0)
    knobs = dict(config["agent"])
    build, device = load(knobs.pop("name")).build, torch.device("cpu")
    agent = build(env_spec=env_spec, device=device, optimization=config["optimization"], **knobs)
    torch.manual_seed(frames)
    for key, value in agent.policy.state_dict().items():
        if key.startswith(("actor.", "solution")):
            value.add_(torch.randn_like(value))
    description = json.dumps(describe_policy(config, env_spec))

    def write(stage: Path) -> None:
        Checkpoint().register("loss", agent.loss, adapter=TensorsAndJSON()).save(stage)
        (stage / "policy.json").write_text(description)

    publish(run_dir / "checkpoints", name or f"frames_{frames}", write, {"frames": frames})
    (run_dir / "policy.json").write_text(description)
    return agent
