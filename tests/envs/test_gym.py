"""Gymnasium environments behind the habits of the other backends."""

import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torchrl.envs import check_env_specs

from envs import make_env
from envs.backends.gym import GymnasiumEnv

QUADRANTS = np.array([[10, 20], [30, 40]], dtype=np.uint8)


class Echo(gymnasium.Env):
    """Shows the action that it receives; pays the number of the step; draws four squares of one colour each."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = spaces.Dict({"echo": spaces.Box(-9, 9, (2,), np.float64), "level": spaces.Discrete(3)})
    action_space = spaces.Box(np.array([0, -2], np.float32), np.array([10, 2], np.float32))

    def __init__(self, render_mode=None, ends_at=99):
        self.render_mode, self.ends_at, self.t = render_mode, ends_at, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return {"echo": np.zeros(2), "level": 1}, {}

    def step(self, action):
        self.t += 1
        return {"echo": action.astype(np.float64), "level": 2}, float(self.t), self.t == self.ends_at, False, {}

    def render(self):
        return QUADRANTS.repeat(3, 0).repeat(3, 1)[..., None].repeat(3, 2)


@pytest.fixture(autouse=True)
def echo():
    gymnasium.register("Echo-v0", entry_point=Echo, max_episode_steps=5)
    yield
    del gymnasium.registry["Echo-v0"]


@pytest.mark.parametrize("name", ["Pendulum-v1", "CartPole-v1", "FrozenLake-v1", "Echo-v0"])
def test_specs(name):
    env = GymnasiumEnv(name=name, frame_skip=2, seed=0)
    check_env_specs(env, break_when_any_done="both")
    assert env.observation_spec["observation"].dtype == torch.float32


def test_specs_through_make_env():
    check_env_specs(
        make_env(backend="gym", name="Echo-v0", image_size=4, pixels_only=False), break_when_any_done="both"
    )
    check_env_specs(make_env(backend="gym", name="CartPole-v1", from_pixels=False), break_when_any_done="both")


def test_observations_are_one_float32_vector():
    env = GymnasiumEnv(name="Echo-v0")
    assert env.reset()["observation"].tolist() == [0, 0, 0, 1, 0]


@pytest.mark.parametrize(("action", "received"), [((0.0, 0.5), (5, 1)), ((-1.0, 1.0), (0, 2)), ((-7.0, 7.0), (0, 2))])
def test_actions_are_clipped_and_rescaled(action, received):
    env = GymnasiumEnv(name="Echo-v0")
    data = env.step(env.reset().set("action", torch.tensor(action)))
    assert data["next", "observation"][:2].tolist() == list(received)
    assert data["action"].tolist() == list(action)
    assert (env.action_spec.space.low == -1).all() and (env.action_spec.space.high == 1).all()


def test_discrete_actions_are_one_hot():
    assert GymnasiumEnv(name="CartPole-v1").action_spec.shape == (2,)


def test_action_repeat_and_time_limit():
    data = GymnasiumEnv(name="Echo-v0", frame_skip=2).rollout(9, break_when_any_done=False)["next"]
    assert data["reward"].flatten().tolist() == [1 + 2, 3 + 4, 5] * 3
    assert data["truncated"].flatten().tolist() == data["done"].flatten().tolist() == [False, False, True] * 3
    assert not data["terminated"].any()


def test_termination():
    last = GymnasiumEnv(name="Echo-v0", frame_skip=3, ends_at=4).rollout(9)["next"][-1]
    assert last["reward"].item() == 4
    assert last["terminated"].item() and not last["truncated"].item()


def test_images_keep_their_size_or_are_averaged():
    env = GymnasiumEnv(name="Echo-v0")
    env.reset()
    assert torch.equal(env.render(6, 6)[..., 1], torch.from_numpy(QUADRANTS.repeat(3, 0).repeat(3, 1)))
    small = env.render(2, 2)
    assert (small.dtype, small.shape) == (torch.uint8, (2, 2, 3))
    assert torch.equal(small[..., 0], torch.from_numpy(QUADRANTS))
    assert env.render(1, 1).flatten().tolist() == [25, 25, 25]
    with pytest.raises(ValueError, match="camera=1"):
        env.render(2, 2, camera=1)


def test_seed_repeats_the_start():
    env = GymnasiumEnv(name="Pendulum-v1", seed=1)
    first = env.reset()["observation"]
    env.set_seed(1)
    assert torch.equal(first, env.reset()["observation"])
    assert not torch.equal(first, GymnasiumEnv(name="Pendulum-v1", seed=2).reset()["observation"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CartPol-v1", "name='CartPol-v1'.*CartPole-v1"),
        ("Pendulum-v0", "name='Pendulum-v0'.*deprecated.*Pendulum-v1"),
        ("Pendulum-v9", "name='Pendulum-v9'.*did you mean Pendulum-v1"),
        ("LunarLander-v2", "name='LunarLander-v2'.*deprecated.*LunarLander-v3"),
        ("CarRacing-v2", "name='CarRacing-v2'.*deprecated.*CarRacing-v3"),
        ("PongNoFrameskip-v4", "name='PongNoFrameskip-v4'.*ALE/Pong-v5"),
        ("Breakout-v4", "name='Breakout-v4'.*ALE/Breakout-v5"),
        ("ALE/Pon-v5", "name='ALE/Pon-v5'.*did you mean ALE/Pong-v5"),
    ],
)
def test_unknown_ids(name, message):
    with pytest.raises(ValueError, match=message):
        GymnasiumEnv(name=name)


def test_an_id_has_no_task():
    with pytest.raises(ValueError, match="task='swingup'"):
        GymnasiumEnv(name="Pendulum-v1", task="swingup")


def test_bad_frame_skip():
    with pytest.raises(ValueError, match="frame_skip=0"):
        GymnasiumEnv(name="Pendulum-v1", frame_skip=0)


def test_without_gymnasium(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"pip install lucid-rl\[gym\]"):
        make_env(backend="gym", name="Pendulum-v1")


def test_an_environment_without_images_says_so(monkeypatch):
    monkeypatch.setattr(Echo, "render", lambda self: None)
    env = GymnasiumEnv(name="Echo-v0")
    env.reset()
    with pytest.raises(RuntimeError, match="from_pixels=False"):
        env.render(2, 2)


def test_options_reach_the_environment():
    data = make_env(
        backend="gym", name="Echo-v0", frame_skip=1, from_pixels=False, options={"ends_at": 9, "max_episode_steps": 3}
    ).rollout(9)
    assert len(data) == 3 and data["next", "truncated"][-1]
    with pytest.raises(ValueError, match=r"options=\{'end_at': 4\}.*unexpected keyword"):
        GymnasiumEnv(name="Echo-v0", end_at=4)


class Camera(Echo):
    """Observes an image: row i has brightness 10 i, plus the number of the step; draws something else."""

    observation_space = spaces.Box(0, 255, (6, 4, 3), np.uint8)

    def look(self):
        return np.repeat(10 * np.arange(6, dtype=np.uint8), 12).reshape(6, 4, 3) + np.uint8(self.t)

    def reset(self, **options):
        super().reset(**options)
        return self.look(), {}

    def step(self, action):
        _, *rest = super().step(action)
        return self.look(), *rest


@pytest.fixture
def camera():
    gymnasium.register("Camera-v0", entry_point=Camera, max_episode_steps=5)
    yield {"backend": "gym", "name": "Camera-v0", "frame_skip": 2, "image_size": 2}
    del gymnasium.registry["Camera-v0"]


def test_images_that_are_observed_are_not_drawn_again(camera):
    env = make_env(**camera, pixels_only=False)
    check_env_specs(env)
    assert "observation" not in env.observation_spec
    pixels = env.rollout(2)["pixels"]  # means of three rows
    assert pixels[:, :, 0, 0].tolist() == [[10, 40], [12, 42]]
    assert (pixels == pixels[:, :, :1, :1]).all()


def test_rows_are_cut_off_before_the_image_is_made_smaller(camera):
    pixels = make_env(**camera, options={"crop_rows": [2, 6]}).reset()["pixels"]
    assert pixels[:, 0, 0].tolist() == [25, 45]
    with pytest.raises(ValueError, match=r"crop_rows=\[2, 7\]: the image has 6 rows"):
        make_env(**camera, options={"crop_rows": [2, 7]}).reset()
    with pytest.raises(ValueError, match=r"crop_rows=\[3, 3\]"):
        make_env(**camera, options={"crop_rows": [3, 3]})


def test_an_environment_of_images_has_nothing_else(camera):
    with pytest.raises(ValueError, match="Camera-v0 shows images only, give from_pixels=True"):
        make_env(**camera, from_pixels=False)


class TestAtari:
    """The games, which have no vector to observe."""

    def test_a_frame_is_one_of_the_emulator(self):
        env = make_env(backend="gym", name="ALE/Pong-v5", frame_skip=3)
        env.rollout(5)
        assert env.base_env._env.unwrapped.ale.getEpisodeFrameNumber() == 15

    def test_an_episode_can_be_played_again(self):
        env, other = (make_env(backend="gym", name="ALE/Breakout-v5", frame_skip=4, seed=seed) for seed in (1, 2))
        data = env.rollout(20)  # actions are sticky
        current = other.restore_episode(env.episode_state())
        assert torch.equal(current["pixels"], data["next", "pixels"][-1])
        assert env.action_spec.shape == (4,) and data["pixels"].shape == (20, 64, 64, 3)

    def test_without_the_games(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "ale_py", None)
        for name in [name for name in gymnasium.registry if name.startswith("ALE/")]:
            monkeypatch.delitem(gymnasium.registry, name)
        with pytest.raises(ImportError, match=r"pip install lucid-rl\[atari\]"):
            GymnasiumEnv(name="ALE/Pong-v5")
