"""The known answers of the mock environments, and action repeat on them."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import check_env_specs

from envs.backends.mock import TASKS, MockEnv

ALL = [(name, task) for name in TASKS for task in TASKS[name]]


def act(env: MockEnv, value: float) -> TensorDict:
    action = torch.full(env.action_spec.shape, value, dtype=env.action_spec.dtype)
    return env.step(TensorDict({"action": action}))["next"]


@pytest.mark.parametrize(("name", "task"), ALL)
@pytest.mark.parametrize("frame_skip", [1, 3])
def test_specs(name, task, frame_skip):
    env = MockEnv(name=name, task=task, frame_skip=frame_skip, episode_length=2)
    check_env_specs(env, break_when_any_done="both")


def test_counter_counts_steps_and_episodes_and_shows_the_action():
    env = MockEnv()
    assert env.reset()["observation"].tolist() == [0, 0, 0, 0]
    assert act(env, 0.5)["observation"].tolist() == [1, 0, 0.5, 0.5]
    arrived = act(env, -3.0)
    assert arrived["observation"].tolist() == [2, 0, -3, -3]
    assert arrived["reward"].item() == 2
    assert env.render(4, 6).shape == (4, 6, 3)
    assert (env.render(4, 6) == 2).all()
    assert env.reset()["observation"].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(("task", "key"), [("continuous", "truncated"), ("terminating", "terminated")])
def test_counter_ends(task, key):
    env = MockEnv(task=task, episode_length=3)
    ends = env.rollout(10)["next"]
    assert ends["done"].flatten().tolist() == [False, False, True]
    assert ends[key].flatten().tolist() == [False, False, True]
    assert ends["terminated"].any() == (task == "terminating")


def test_action_repeat_over_three_episodes():
    env = MockEnv(frame_skip=4, episode_length=10)
    data = env.rollout(9, break_when_any_done=False)
    assert data["next", "reward"].flatten().tolist() == [1 + 2 + 3 + 4, 5 + 6 + 7 + 8, 9 + 10] * 3
    assert data["next", "observation"][:, 0].tolist() == [4, 8, 10] * 3
    assert data["observation"][:, 0].tolist() == [0, 4, 8] * 3  # the reset step is not repeated
    assert data["observation"][:, 1].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data["next", "done"].flatten().tolist() == [False, False, True] * 3


def test_reach_pays_for_coming_close():
    env = MockEnv(name="reach", task="continuous", seed=3)
    target = env.reset()["observation"].item()
    assert act(env, target)["reward"].item() == pytest.approx(1)
    assert act(env, 7.0)["reward"].item() == pytest.approx(1 - (1 - target) / 2)
    assert env.render(2, 2)[0, 0, 0].item() == round((target + 1) / 2 * 255)


def test_reach_with_choices():
    env = MockEnv(name="reach", task="discrete", seed=3)
    target = env.reset()["observation"]
    right, wrong = target.long(), target.long().roll(1)
    assert env.step(TensorDict({"action": right}))["next", "reward"].item() == 1
    assert env.step(TensorDict({"action": wrong}))["next", "reward"].item() == 0
    assert env.render(2, 2)[0, 0, 0].item() == int(target.argmax()) * 85


def test_seed_repeats_the_targets():
    def targets(seed):
        env = MockEnv(name="reach", task="continuous")
        env.set_seed(seed)
        return [env.reset()["observation"].item() for _ in range(5)]

    assert targets(1) == targets(1)
    assert targets(1) != targets(2)
