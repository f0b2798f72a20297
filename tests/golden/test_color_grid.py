"""ColorGrid against the published backgrounds: every setting and size, byte for byte."""

import json

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import TransformedEnv

from envs.tasks import reward_range
from envs.transforms.color_grid import ColorGrid
from tests.envs.scripted import ScriptedEnv
from tests.golden.reference import Golden

LEVELS = {
    "MAXIMUM_EVIL": "max",
    "EVIL_REWARD": "reward",
    "EVIL_ACTION": "action",
    "EVIL_SEQUENCE": "sequence",
    "EVIL_ACTION_CROSS_SEQUENCE": "action_cross_sequence",
}
GOLDEN = Golden("color_grid")
SETTINGS = sorted({name.split("/")[0] for name in GOLDEN.arrays})


def make_grid(setting: str) -> tuple[ColorGrid, tuple[int, int]]:
    c = json.loads(str(GOLDEN.arrays[f"{setting}/config"]))
    level, splits = LEVELS[c["evil_level"]], c.get("action_splits")
    grid = ColorGrid(
        level,
        num_cells_per_dim=c["num_cells_per_dim"],
        num_colors_per_cell=c["num_colors_per_cell"],
        action_dims_to_split=c["action_dims_to_split"] or None,
        action_power=None if splits else c["action_power"],
        action_splits=splits,
        reward_range=reward_range(c["domain_name"], c["task_name"]),
        reward_scale=1,
        table_seed=c["random_seed"],
        emit_index=True,
    )
    return grid, (c["height"], c["width"])


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_backgrounds(setting, batched):
    """The frames have arbitrary times, so the clock is set before each."""
    action, reward, t, background = (GOLDEN[f"{setting}/{key}"] for key in ("action", "reward", "t", "background"))
    grid, size = make_grid(setting)
    env_size = {"size": size, "action_size": action.shape[-1], "foreground": 0.2}
    rewards, rows = (reward[None], (len(t),)) if batched else (reward, ())
    env = TransformedEnv(ScriptedEnv(rewards=rewards, batch_size=rows, **env_size), grid)
    env.base_env.reward_spec = env.base_env.reward_spec.to(torch.float64)
    env.reset()
    for k in range(1 if batched else len(t)):
        grid._t = t.numpy() - 1 if batched else int(t[k]) - 1
        now = slice(None) if batched else k
        shown = env.step(TensorDict({"action": action[now]}, rows))["next"]
        expected = torch.where(shown["mask"], shown["pixels"], background[now])
        assert torch.equal(shown["pixels"], expected)
        assert not shown["mask"].all()
    assert grid.rewards_out_of_range == 0


def test_every_level_that_is_not_random_is_covered():
    assert len(SETTINGS) == 12
    assert {make_grid(setting)[0].level for setting in SETTINGS} == set(LEVELS.values())
