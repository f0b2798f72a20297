"""The dm_control environment against dm_control itself and against TorchRL's wrapper."""

import pickle

import numpy as np
import pytest
import torch
from dm_control import suite
from tensordict import TensorDict
from torchrl.envs import CatTensors, Compose, DMControlEnv, DoubleToFloat, TransformedEnv, check_env_specs

from envs.backends.actions import ActionScale
from envs.backends.dmc import DMCEnv

FLAGS_OFF = {"shadow": False, "reflection": False}


def act(env: DMCEnv, action: torch.Tensor) -> TensorDict:
    return env.step(TensorDict({"action": action}))["next"]


def check_task(name: str, task: str) -> None:
    env = DMCEnv(name=name, task=task, frame_skip=2, seed=0)
    check_env_specs(env)
    assert env.observation_spec["observation"].dtype == torch.float32
    env.close()


@pytest.mark.parametrize(
    ("name", "task"), [("cheetah", "run"), ("walker", "walk"), ("manipulator", "bring_ball"), ("lqr", "lqr_2_1")]
)
def test_specs(name, task):
    check_task(name, task)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), suite.ALL_TASKS)
def test_specs_of_all_tasks(name, task):
    check_task(name, task)


@pytest.mark.parametrize(("name", "task"), [("walker", "walk"), ("quadruped", "run"), ("fish", "swim")])
def test_equals_dm_control(name, task):
    env = DMCEnv(name=name, task=task, frame_skip=2, seed=5)
    raw = suite.load(name, task, task_kwargs={"random": 5})
    low, high = raw.action_spec().minimum, raw.action_spec().maximum
    generator = torch.Generator().manual_seed(0)
    step, observation = raw.reset(), env.reset()["observation"]
    for _ in range(20):
        expected = np.concatenate([np.ravel(step.observation[key]) for key in sorted(step.observation)])
        np.testing.assert_array_equal(observation.numpy(), expected.astype(np.float32))
        action = torch.rand(env.action_spec.shape, generator=generator) * 2 - 1
        arrived = act(env, action)
        rewards = []
        for _ in range(2):
            step = raw.step((low + high) / 2 + (high - low) / 2 * action.double().numpy())
            rewards.append(step.reward)
        assert arrived["reward"].item() == np.float32(sum(rewards))
        observation = arrived["observation"]


def test_equals_the_wrapper_of_torchrl():
    ours = DMCEnv(name="cheetah", task="run", frame_skip=2, seed=0)
    names = sorted(suite.load("cheetah", "run").observation_spec())
    theirs = TransformedEnv(
        DMControlEnv("cheetah", "run", frame_skip=2), Compose(DoubleToFloat(), CatTensors(names, "observation"))
    )
    theirs.set_seed(7)
    ours.set_seed(7)
    ours.reset()  # theirs resets while it is seeded
    a, b = ours.reset(), theirs.reset()
    for _ in range(10):
        torch.testing.assert_close(a["observation"], b["observation"])
        action = ours.action_spec.rand()
        a = act(ours, action)
        b = theirs.step(TensorDict({"action": action}))["next"]
        torch.testing.assert_close(a["reward"], b["reward"])


def test_action_repeat_over_three_episodes():
    env = DMCEnv(name="cartpole", task="balance", frame_skip=3, seed=1)
    raw = suite.load("cartpole", "balance", task_kwargs={"random": 1})
    data = env.rollout(3 * 334, break_when_any_done=False)  # 1000 frames: 333 steps of three and one of one
    assert data["next", "done"].flatten().nonzero().flatten().tolist() == [333, 667, 1001]
    actions = iter(data["action"].double().numpy())
    rewards = []
    for _ in range(3):
        step = raw.reset()
        while not step.last():
            action, total = next(actions), 0.0
            for _ in range(3):
                step = raw.step(action)
                total += step.reward
                if step.last():
                    break
            rewards.append(total)
    np.testing.assert_array_equal(data["next", "reward"].flatten().numpy(), np.float32(rewards))


def test_time_limit_truncates():
    env = DMCEnv(name="cartpole", task="balance", frame_skip=100, seed=0)
    last = env.rollout(20)["next"][-1]
    assert len(env.rollout(20)) == 10
    assert last["done"].item() and last["truncated"].item() and not last["terminated"].item()


def test_discount_zero_terminates():
    env = DMCEnv(name="cartpole", task="balance", frame_skip=4, seed=0)
    env._env.task.get_termination = lambda physics: 0.0 if physics.time() > 0.05 else None
    last = env.rollout(20)["next"][-1]
    assert last["done"].item() and last["terminated"].item() and not last["truncated"].item()
    assert last["reward"].item() < 4  # 6 frames: the second step stopped early


def test_clips_the_action_and_leaves_the_record():
    def first_step(value):
        env = DMCEnv(name="walker", task="walk", seed=0)
        data = env.reset().set("action", torch.full((6,), value))
        return env.step(data)

    wide, edge = first_step(3.0), first_step(1.0)
    assert (wide["action"] == 3).all()
    assert torch.equal(wide["next", "observation"], edge["next", "observation"])
    assert not torch.equal(edge["next", "observation"], first_step(0.9)["next", "observation"])


def test_action_scale():
    scale = ActionScale(np.array([-1.0, -0.8, 0.0, -1e10]), np.array([1.0, 0.8, 10.0, 1e10]))
    np.testing.assert_allclose(scale(np.array([0.3, 0.5, 0.5, 0.5])), [0.3, 0.4, 7.5, 0.5])
    np.testing.assert_allclose(scale(np.array([9.0, -9.0, -9.0, 9.0])), [1.0, -0.8, 0.0, 1.0])


def test_seed_makes_the_next_reset_reproducible():
    env = DMCEnv(name="reacher", task="easy", seed=0)
    starts = []
    for seed in (1, 1, 2):
        env.set_seed(seed)
        starts.append(torch.cat([env.reset()["observation"], env.reset()["observation"]]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_default_image_is_that_of_dm_control():
    env = DMCEnv(name="cheetah", task="run", seed=0)
    env.reset()
    image = env.render(16, 24)
    assert (image.shape, image.dtype) == ((16, 24, 3), torch.uint8)
    np.testing.assert_array_equal(image.numpy(), env.physics.render(16, 24, camera_id=0))
    assert env.physics.model.vis.quality.offsamples > 0
    with pytest.raises(ValueError, match="fast=True"):
        env.render(16, 24, fast=True)
    env.close()


@pytest.mark.parametrize(
    ("name", "task", "camera"), [("quadruped", "walk", 2), ("fish", "swim", 3), ("walker", "run", 0)]
)
def test_fast_image_from_the_usual_camera(name, task, camera):
    env = DMCEnv(name=name, task=task, seed=0)
    env.rollout(2)
    image = env.render(32, 32, fast=True).numpy()
    quality = env.physics.model.vis.quality
    assert (quality.offsamples, quality.shadowsize) == (0, 0)
    expected = env.physics.render(32, 32, camera_id=camera, render_flag_overrides=dict(FLAGS_OFF))
    np.testing.assert_array_equal(image, expected)
    assert (image != env.render(32, 32, camera=1, fast=True).numpy()).any()
    env.close()


def test_cameras_by_name_and_unknown_ones():
    env = DMCEnv(name="cheetah", task="run", seed=0)
    env.reset()
    assert torch.equal(env.render(8, 8, "back", fast=True), env.render(8, 8, 1, fast=True))
    for camera in (2, -2, "front"):
        with pytest.raises(ValueError, match=r"camera=.*'side', 'back'.* from -1 to 1"):
            env.render(8, 8, camera, fast=True)
    env.close()


def test_pickles_after_drawing():
    env = DMCEnv(name="cheetah", task="run", frame_skip=2, seed=0)
    env.reset()
    env.render(8, 8, fast=True)
    copy = pickle.loads(pickle.dumps(env))
    assert copy.frame_skip == 2
    copy.reset()
    assert copy.render(8, 8, fast=True).shape == (8, 8, 3)


def test_closing_twice_is_harmless():
    env = DMCEnv(name="cheetah", task="run")
    env.reset()
    env.render(8, 8, fast=True)
    env.close()
    env.close()
    assert env.is_closed


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("cheeta", "run", r"name='cheeta': choose one of acrobot, .*did you mean cheetah"),
        ("cheetah", "walk", r"task='walk': choose one of run"),
        ("walker", "rum", r"task='rum': choose one of run, stand, walk \(did you mean run\?\)"),
        ("walker", None, r"task=None: name='walker' has several, choose one of run, stand, walk"),
    ],
)
def test_unknown_tasks(name, task, message):
    with pytest.raises(ValueError, match=message):
        DMCEnv(name=name, task=task)


def test_the_only_task_needs_no_name():
    assert DMCEnv(name="cheetah").task == "run"
