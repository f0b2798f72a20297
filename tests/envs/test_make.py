"""make_env: keys, seeds, errors and life in other processes."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torchrl.envs import Compose, ParallelEnv, RewardScaling, SerialEnv, Transform, check_env_specs

from envs import SeededTransformedEnv, make_env

ROOT = Path(__file__).parents[2]
ALWAYS = {"is_init", "previous_action", "previous_reward", "done", "terminated", "truncated"}
FAST = {"fast": True}
mock = partial(make_env, backend="mock", name="counter", task="continuous", image_size=8)


class Noise(Transform):
    """A stochastic transform with a seed."""

    def set_seed(self, seed: int) -> None:
        self.seed = seed


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({}, {"pixels"}),
        ({"pixels_only": False}, {"pixels", "observation"}),
        ({"from_pixels": False}, {"observation"}),
        ({"from_pixels": False, "pixels_only": False, "stream": 2}, {"observation", "stream"}),
    ],
)
def test_keys(options, keys):
    env = mock(**options)
    check_env_specs(env, break_when_any_done="both")
    assert set(env.reset().keys()) == ALWAYS | keys


def test_dmc_is_the_default():
    env = make_env(name="cheetah", render=FAST)
    check_env_specs(env)
    data = env.rollout(3)
    assert data["next", "pixels"].shape == (3, 64, 64, 3)
    assert data["is_init"].flatten().tolist() == [True, False, False]
    assert env.base_env.frame_skip == 2
    env.close()


@pytest.mark.parametrize("options", [{"from_pixels": False}, {"render": FAST, "image_size": 16}])
def test_the_seed_decides_the_trajectory(options):
    make = partial(make_env, name="walker", task="walk", **options)
    key = "observation" if options.get("from_pixels") is False else "pixels"
    actions = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))

    def trajectory(env):
        data, seen = env.reset(), []
        for action in actions:
            data = env.step_mdp(env.step(data.set("action", action)))
            seen.append(data[key])
        return torch.stack(seen)

    first = make(seed=1)
    expected = trajectory(first)
    assert torch.equal(trajectory(make(seed=1)), expected)
    assert not torch.equal(trajectory(make(seed=2)), expected)
    first.set_seed(1)
    assert torch.equal(trajectory(first), expected)


def test_the_seed_reaches_the_transforms():
    def seeds(seed):
        env = mock(seed=seed, transforms=[Noise(), Compose(Noise())])
        return [module.seed for module in env.transform.modules() if isinstance(module, Noise)]

    assert seeds(0) == seeds(0)
    assert len({*seeds(0), *seeds(1)}) == 4
    env = mock(transforms=[Noise])
    assert isinstance(env, SeededTransformedEnv)
    before = env.transform[2].seed
    assert isinstance(env.set_seed(7), int)
    assert env.transform[2].seed != before
    assert env.set_seed(7, static_seed=True) == 7


def test_extra_transforms_come_after_the_image_and_before_the_previous_reward():
    env = mock(transforms=[lambda: RewardScaling(loc=0.0, scale=10.0)], frame_skip=1)
    data = env.rollout(3)
    assert data["next", "reward"].flatten().tolist() == [10, 20, 30]
    assert data["next", "previous_reward"].flatten().tolist() == [10, 20, 30]
    assert [type(part).__name__ for part in env.transform][:3] == ["Render", "ExcludeTransform", "RewardScaling"]


def test_streams_side_by_side():
    env = SerialEnv(2, [partial(mock, stream=0), partial(mock, stream=1)])
    check_env_specs(env)
    assert env.rollout(3)["stream"][..., 0].tolist() == [[0] * 3, [1] * 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "dm"}, r"backend='dm': choose one of dmc, gym, mock \(did you mean dmc"),
        ({"name": "count"}, r"name='count': choose one of counter, reach \(did you mean counter\?\)"),
        ({"task": None}, r"task=None: .* choose one of continuous, discrete, terminating"),
        ({"task": "discreet"}, r"task='discreet': .*did you mean discrete"),
        ({"render": {"quick": True}}, r"render option='quick': choose one of backend, camera, fast"),
        ({"frame_skip": 0}, r"frame_skip=0: .*at least 1"),
        ({"frame_skip": True}, r"frame_skip=True"),
        ({"frame_skip": 2.0}, r"frame_skip=2\.0"),
        ({"image_size": -1}, r"image_size=-1"),
        ({"image_size": 64.0}, r"image_size=64\.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        mock(**options)


def run_python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_imports_without_the_optional_packages():
    program = """
import sys
for name in ("hydra", "omegaconf", "wandb", "dm_control", "mujoco", "gymnasium", "transformers"):
    sys.modules[name] = None
import envs
print(envs.make_env(backend="mock", name="counter", task="discrete").rollout(3).shape)
"""
    assert run_python(program) == "torch.Size([3])"


@pytest.mark.slow
def test_draws_though_torchrl_was_imported_first():
    program = """
import torchrl.envs
from envs import make_env
print(make_env(name="cartpole", task="swingup", render={"fast": True}).rollout(2)["pixels"].shape)
"""
    assert run_python(program) == "torch.Size([2, 64, 64, 3])"


@pytest.mark.slow
def test_in_spawned_workers():
    make = partial(make_env, name="cheetah", render=FAST, image_size=16)
    env = ParallelEnv(2, [partial(make, seed=seed, stream=seed) for seed in (0, 1)], mp_start_method="spawn")
    try:
        data = env.rollout(3)
        assert data["pixels"].shape == (2, 3, 16, 16, 3)
        assert data["stream"][:, 0, 0].tolist() == [0, 1]
        assert torch.equal(data["next", "previous_action"], data["action"])
    finally:
        env.close()
