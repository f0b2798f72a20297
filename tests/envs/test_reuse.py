"""ColorGrid and NaturalVideo in someone else's TorchRL program: nothing else of ours, none of our other packages."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
ABSENT = ["hydra", "omegaconf", "wandb", "transformers", "dm_control", "mujoco", "gymnasium", "av", "matplotlib"]
PROGRAM = '''
import sys

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Binary, Bounded, Composite, LazyTensorStorage, TensorDictReplayBuffer, Unbounded
from torchrl.envs import Compose, EnvBase, SerialEnv, StepCounter, TransformedEnv, check_env_specs
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss, SACLoss
from torchrl.objectives.value import GAE

from envs.transforms import ColorGrid, NaturalVideo


class Dot(EnvBase):
    """Push a bar to the middle; the user's own environment."""

    def __init__(self):
        super().__init__(batch_size=())
        pixels = Bounded(0, 255, (16, 16, 3), dtype=torch.uint8)
        self.observation_spec = Composite(pixels=pixels, mask=Binary(shape=(16, 16, 1), dtype=torch.bool))
        self.action_spec = Bounded(-1, 1, (1,), dtype=torch.float32)
        self.reward_spec = Unbounded((1,))
        self.random = np.random.default_rng(0)

    def _show(self):
        mask = torch.zeros(16, 16, 1, dtype=torch.bool)
        left = int(self.place * 6 + 7)
        mask[6:10, left : left + 3] = True
        return {"pixels": torch.where(mask, 200, 10).to(torch.uint8).expand(16, 16, 3).clone(), "mask": mask}

    def _reset(self, tensordict=None):
        self.place, self.time = self.random.uniform(-1, 1), 0
        return TensorDict(self._show())

    def _step(self, tensordict):
        self.place = float(np.clip(self.place + 0.3 * tensordict["action"].item(), -1, 1))
        self.time += 1
        done = torch.tensor([self.time == 10])
        return TensorDict({**self._show(), "reward": torch.tensor([1 - abs(self.place)]), "done": done})

    def _set_seed(self, seed):
        self.random = np.random.default_rng(seed)


class Network(nn.Sequential):
    def __init__(self, outputs):
        super().__init__(nn.LazyLinear(32), nn.ReLU(), nn.LazyLinear(outputs))

    def forward(self, pixels, *action):
        return super().forward(torch.cat([pixels.flatten(-3).float() / 255, *action], -1))


def make_actor(spec):
    head = TensorDictModule(nn.Sequential(Network(2), NormalParamExtractor()), ["pixels"], ["loc", "scale"])
    options = {"in_keys": ["loc", "scale"], "distribution_class": TanhNormal, "return_log_prob": True}
    return ProbabilisticActor(head, spec=spec, **options)


def ppo(env):
    actor, critic = make_actor(env.action_spec), ValueOperator(Network(1), ["pixels"])
    critic(actor(env.reset()))
    advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic)
    return actor, ClipPPOLoss(actor, critic), lambda data: advantage(data).reshape(-1)


def sac(env):
    actor, critic = make_actor(env.action_spec), ValueOperator(Network(1), ["pixels", "action"])
    critic(actor(env.reset()))
    loss = SACLoss(actor, critic, action_spec=env.action_spec)
    loss.make_value_estimator(gamma=0.99)
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(256), batch_size=32)
    return actor, loss, lambda data: replay.extend(data.reshape(-1)) is not None and replay.sample()


def train(make_algorithm, env):
    check_env_specs(env)
    actor, loss, make_batch = make_algorithm(env)
    optimizer = torch.optim.Adam(loss.parameters(), 1e-3)
    collector = Collector(env, actor, frames_per_batch=32, total_frames=96)
    for data in collector:
        mask = data["mask"].expand_as(data["pixels"])
        assert (data["pixels"][~mask] != 10).float().mean() > 0.9, "the background is still there"
        assert (data["pixels"][mask] == 200).all(), "the foreground has changed"
        terms = loss(make_batch(data))
        total = sum(value for key, value in terms.items() if key.startswith("loss_"))
        assert total.isfinite(), terms
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    collector.shutdown()


torch.manual_seed(0)
grid = lambda: ColorGrid("action_cross_sequence", num_cells_per_dim=8, action_power=4)
train(sac, SerialEnv(2, lambda: TransformedEnv(Dot(), Compose(grid(), StepCounter()))))
train(ppo, TransformedEnv(SerialEnv(2, Dot), Compose(NaturalVideo(num_frames=100), StepCounter())))
ours = [name for name in sys.modules if name.split(".")[0] in ("dreamer", "objectives", "configs", "scripts", "tests")]
assert not ours, ours
print("trained")
'''


@pytest.mark.slow
def test_in_a_program_of_someone_else(tmp_path):
    absent = f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n"  # what is None there cannot be imported
    (tmp_path / "train.py").write_text(absent + PROGRAM)
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "trained" in result.stdout


@pytest.mark.slow
def test_the_examples_of_the_page_run(monkeypatch, capsys):
    """One after the other in one module."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "reuse_a_transform.md").read_text(), flags=re.S)
    assert len(blocks) == 8
    module = ModuleType("page_of_examples")  # importable, because the checks pickle what is defined there
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec("\n".join(blocks), module.__dict__)
    printed = capsys.readouterr().out
    assert "'pixels' is changed after steps but not after resets" in printed
    assert "'check_foreground'" in printed


def test_the_page_names_every_check():
    page = (ROOT / "docs" / "reuse_a_transform.md").read_text()
    code = (ROOT / "envs" / "checks.py").read_text()
    assert set(re.findall(r"`(check_\w+)`", page)) == set(re.findall(r"^def (check_\w+)\(case", code, flags=re.M))
