"""Run folders with the checkpoints of small agents, without any training."""

import json
from pathlib import Path
from typing import Any

import torch
from torchrl.checkpoint import Checkpoint

from dreamer.agents import Agent, EnvSpec
from dreamer.checkpoint_files import publish
from dreamer.checkpoints import TensorsAndJSON
from dreamer.policy import describe_policy
from envs import make_env
from tests.helpers import compose_config, make_small_agent

SMALL = ("env=mock", "agent/size=debug")
PIXELS = ("env.from_pixels=true", "env.image_size=16")


def save_run(run_dir: Path, *overrides: str, frames: int = 100, name: str | None = None, **spec: Any) -> Agent:
    """Write a checkpoint and the description of an agent on the mock environment, whose actor is far from uniform.

    Args:
        run_dir: Run folder; further checkpoints may be there.
        overrides: Of the configuration.
        frames: Number of the checkpoint; other numbers have other weights.
        name: Of the checkpoint, other than frames_<N>.
        spec: Replaces parts of what the environment offers: observation, action.
    """
    config = compose_config(*SMALL, *overrides)
    env_spec = EnvSpec.of(make_env(**config["env"]))._replace(**spec)
    agent = make_small_agent(*overrides, env_spec=env_spec)
    torch.manual_seed(frames)
    with torch.no_grad():
        for parameter in agent.policy.actor.parameters():
            parameter.add_(torch.randn_like(parameter))
    description = json.dumps(describe_policy(config, env_spec))

    def write(stage: Path) -> None:
        Checkpoint().register("loss", agent.loss, adapter=TensorsAndJSON()).save(stage)
        (stage / "policy.json").write_text(description)

    publish(run_dir / "checkpoints", name or f"frames_{frames}", write, {"frames": frames})
    (run_dir / "policy.json").write_text(description)
    return agent
