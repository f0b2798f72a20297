"""Render, PreviousStep and StreamIndex on environments with known answers."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import Compose, InitTracker, PendulumEnv, SerialEnv, TransformedEnv, check_env_specs

from envs import PreviousStep, Render, StreamIndex
from envs.backends.dmc import DMCEnv
from envs.backends.mock import MockEnv


def two_mocks() -> SerialEnv:
    """Episodes of three and of four frames, side by side."""
    return SerialEnv(2, [lambda: MockEnv(episode_length=3), lambda: MockEnv(episode_length=4)])


def test_render_draws_the_state_arrived_at():
    env = TransformedEnv(MockEnv(frame_skip=2, episode_length=5), Render(8))
    check_env_specs(env, break_when_any_done="both")
    data = env.rollout(6, break_when_any_done=False)
    assert (data["pixels"].shape, data["pixels"].dtype) == ((6, 8, 8, 3), torch.uint8)
    assert data["pixels"][:, 0, 0, 0].tolist() == [0, 2, 4] * 2
    assert data["next", "pixels"][:, 7, 7, 2].tolist() == [2, 4, 5] * 2


def test_render_draws_once_per_agent_step(monkeypatch):
    calls = []

    def render(self, *arguments):
        calls.append(arguments)
        return torch.zeros(4, 6, 3, dtype=torch.uint8)

    monkeypatch.setattr(MockEnv, "render", render)
    env = TransformedEnv(MockEnv(frame_skip=5, episode_length=20), Render((4, 6), camera="side", fast=True))
    env.rollout(4)
    assert calls == [(4, 6, "side", True)] * 5  # the reset and four steps


def test_render_on_dm_control():
    env = TransformedEnv(DMCEnv(name="cheetah", task="run", frame_skip=2, seed=0), Render(fast=True))
    pixels = env.rollout(2)["next", "pixels"]
    assert (pixels.shape, pixels.dtype) == ((2, 64, 64, 3), torch.uint8)
    assert torch.equal(pixels[-1], env.base_env.render(64, 64, 0, True))
    env.close()


def test_render_needs_an_environment_that_can_draw():
    with pytest.raises(TypeError, match="PendulumEnv has no render"):
        TransformedEnv(PendulumEnv(), Render(8)).reset()
    with pytest.raises(TypeError, match=r"SerialEnv has no render.*each worker"):
        TransformedEnv(two_mocks(), Render(8)).reset()


@pytest.mark.parametrize("task", ["continuous", "discrete", "terminating"])
def test_previous_step(task):
    env = TransformedEnv(MockEnv(task=task, frame_skip=2, episode_length=6), PreviousStep())
    check_env_specs(env, break_when_any_done="both")
    data = env.rollout(6, break_when_any_done=False)
    start = torch.tensor([True, False, False] * 2)
    assert (data["previous_action"][start] == 0).all() and (data["previous_reward"][start] == 0).all()
    going = torch.arange(6)[~start]
    assert torch.equal(data["previous_action"][going], data["action"][going - 1])
    assert data["previous_reward"].flatten().tolist() == [0, 3, 7] * 2
    assert torch.equal(data["next", "previous_action"], data["action"])
    assert torch.equal(data["next", "previous_reward"], data["next", "reward"])
    assert data["previous_action"].dtype == data["action"].dtype


def test_previous_step_keeps_the_action_unclipped():
    env = TransformedEnv(MockEnv(), PreviousStep())
    data = env.reset().set("action", torch.tensor([3.0, -2.0]))
    data = env.step(data)
    assert data["action"].tolist() == data["next", "previous_action"].tolist() == [3, -2]


@pytest.mark.parametrize("outside", [True, False])
def test_previous_step_with_episodes_of_different_lengths(outside):
    if outside:
        env = TransformedEnv(two_mocks(), Compose(PreviousStep(), InitTracker()))
    else:
        parts = [
            lambda n=n: TransformedEnv(MockEnv(episode_length=n), Compose(PreviousStep(), InitTracker()))
            for n in (3, 4)
        ]
        env = SerialEnv(2, parts)
    check_env_specs(env)
    data = env.rollout(9, break_when_any_done=False)  # [2, 9]
    assert data["is_init"][..., 0].int().tolist() == [[1, 0, 0] * 3, [1, 0, 0, 0] * 2 + [1]]
    assert data["previous_reward"][..., 0].tolist() == [[0, 1, 2] * 3, [0, 1, 2, 3] * 2 + [0]]
    # The mock shows the last action in its observation: what is recorded is what it received.
    assert torch.equal(data["previous_action"], data["observation"][..., 2:])
    assert torch.equal(data["next", "previous_action"], data["action"])


def test_partial_reset_keeps_the_rows_that_go_on():
    env = TransformedEnv(two_mocks(), PreviousStep())
    data = env.step(env.reset().set("action", torch.ones(2, 2)))
    rest = env.step_mdp(data).set("_reset", torch.tensor([[True], [False]]))
    rest = env.reset(rest)
    assert rest["previous_action"].tolist() == [[0, 0], [1, 1]]
    assert rest["previous_reward"].tolist() == [[0], [1]]


def test_stream_index():
    env = TransformedEnv(MockEnv(), StreamIndex(3))
    check_env_specs(env, break_when_any_done="both")
    data = env.rollout(4)
    assert data["stream"].dtype == torch.int64
    assert data["stream"].tolist() == data["next", "stream"].tolist() == [[3]] * 4


def test_values_do_not_share_memory_with_the_step():
    env = TransformedEnv(MockEnv(), PreviousStep())
    action = torch.ones(2)
    arrived = env.step(env.reset().update(TensorDict({"action": action})))["next"]
    action.zero_()
    arrived["reward"].zero_()
    assert arrived["previous_action"].tolist() == [1, 1]
    assert arrived["previous_reward"].item() == 1
