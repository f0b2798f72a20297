"""Every agent on every kind of task, with and without a distraction: a few updates, and a few more after a resume."""

import json
from pathlib import Path

import pytest

from dreamer.policy import Policy
from dreamer.trainer import Trainer
from envs import make_env
from tests.helpers import (
    SHORT_RUN,
    SMALL_PPO,
    SMALL_V1,
    SMALL_V3,
    SMALL_WM,
    differing,
    make_run,
    snapshot,
    stop_at_update,
)

AGENTS = {
    "dreamer_v3": (*SMALL_V3, "env.image_size=16"),
    "dreamer_v1": (*SMALL_V1, "env.image_size=64"),
    "world_models": (*SMALL_WM, "env.image_size=64"),
    "ppo": (*SMALL_PPO, "env.image_size=36"),
    "world2filter": ("agent=world2filter", *SMALL_V3, "env.image_size=16"),
    "segmentation_dreamer": ("agent=segmentation_dreamer", *SMALL_V3, "env.image_size=16"),
}
DMC = ("env=dmc", "env.name=cartpole", "env.task=balance", "env.frame_skip=1", "env.render.fast=true")
TASKS = {
    "pixels": DMC,
    "pixels with color_grid": (*DMC, "env/distraction=color_grid_action"),
    "state": (*DMC, "env.from_pixels=false"),
    "discrete": ("env=gym", "env.name=CartPole-v1"),
}
LAST = {"world_models": 9}  # update at which the resumed run ends, if not 3: some only encode what was collected
QUICK = {("dreamer_v3", "discrete"), ("dreamer_v1", "discrete"), ("world_models", "discrete"), ("ppo", "state")}
CELLS = [
    pytest.param(agent, task, marks=() if (agent, task) in QUICK else pytest.mark.slow)
    for agent in AGENTS
    for task in TASKS
    if agent not in ("world2filter", "segmentation_dreamer") or "pixels" in task
]


def train_until(trainer: Trainer, updates: int) -> Trainer:
    stop_at_update(trainer, updates)
    trainer.train()
    trainer.logger.close()
    return trainer


@pytest.mark.parametrize(("agent", "task"), CELLS)
def test_learns_and_goes_on(agent, task, tmp_path):
    """Two updates, then more from the checkpoint; and the policy acts alone in the environment of the run."""
    overrides = (*TASKS[task], *AGENTS[agent])
    first = train_until(make_run(tmp_path, *overrides, base=SHORT_RUN), 2)
    assert first.update_count == 2 and first.collected_frames > 0
    weights = snapshot(first.loss_module)
    second = make_run(tmp_path, *overrides, "resume=auto", base=SHORT_RUN)
    assert (second.update_count, second.collected_frames) == (2, first.collected_frames)
    assert not differing(snapshot(second.loss_module), weights)
    last = LAST.get(agent, 3)
    train_until(second, last)
    assert second.update_count == last and differing(snapshot(second.loss_module), weights)
    act(tmp_path)


def act(run_dir: Path) -> None:
    """Three steps of the saved policy, deterministic, and the same again from an export."""
    env = make_env(**json.loads((run_dir / "policy.json").read_text())["env"])
    policies = [Policy.load(run_dir, deterministic=True)]
    policies.append(Policy.load(policies[0].export(run_dir / "exported"), deterministic=True))
    step = env.reset()
    for _ in range(3):
        actions = [policy({key: step[key] for key in policy.keys}) for policy in policies]
        assert actions[0].equal(actions[1])
        step = env.step(env.rand_action(step))["next"]
    env.close()
