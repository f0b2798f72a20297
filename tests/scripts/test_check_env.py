"""scripts/check_env.py on good and on broken environments, and the page about them."""

import re
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import scripts.check_env
from scripts.check_env import CHECKS, examine
from tests.helpers import compose_config
from tests.programs import run_program

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "custom_env.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)


class Good(gymnasium.Env):
    """A number that wanders, shown as a vector and as an image; the parts that the broken ones replace are methods."""

    observation_space, action_space = spaces.Box(-9, 9, (2,)), spaces.Box(-2, 2, (1,))
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform()
        return self.observe(), {}

    def step(self, action):
        self.place = 0.9 * self.place + 0.1 * float(action[0])
        return self.observe(), self.reward(), False, False, {}

    def observe(self):
        return np.full(2, self.place, np.float32)

    def reward(self):
        return self.place

    def render(self):
        return np.full((16, 16, 3), int(100 + 50 * self.place), np.uint8)


class NotANumber(Good):
    def reward(self):
        return float("nan")


class FloatImage(Good):
    def render(self):
        return super().render() / 255


class Frozen(Good):
    def render(self):
        return np.zeros((16, 16, 3), np.uint8)


class WrongShape(Good):
    def observe(self):
        return np.zeros(3, np.float32)


class Unseeded(Good):
    def observe(self):
        return super().observe() + np.random.normal(0, 1e-3, 2).astype(np.float32)


class Unchanging(Good):
    def reset(self, *, seed=None, options=None):
        super().reset(seed=0)
        return super().reset()


class Picky(Good):
    def step(self, action):
        if abs(action[0]) > 1.9:
            raise RuntimeError("too far")
        return super().step(action)


class Huge(Good):
    observation_space = spaces.Box(0, 1, (32, 32, 3), np.float32)

    def observe(self):
        return np.zeros((32, 32, 3), np.float32)


ENVS = (Good, NotANumber, FloatImage, Frozen, WrongShape, Unseeded, Unchanging, Picky, Huge)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(scripts.check_env, "MAX_STEPS", 120)
    monkeypatch.setattr(scripts.check_env, "SAME_STEPS", 30)
    for kind in ENVS:
        gymnasium.register(f"{kind.__name__}-v0", entry_point=kind, max_episode_steps=20, disable_env_checker=True)
    gymnasium.register("Endless-v0", entry_point=Good, disable_env_checker=True)
    yield
    for kind in (*(kind.__name__ for kind in ENVS), "Endless"):
        del gymnasium.registry[f"{kind}-v0"]


def check(capsys, *overrides: str, checks=CHECKS) -> tuple[bool, dict[str, tuple[str, str]]]:
    """Whether all passed; and for each check the outcome and the text."""
    passed = examine(compose_config("env.image_size=16", *overrides), checks)
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    return passed, {text.partition(": ")[0]: (outcome, text.partition(": ")[2]) for outcome, text in lines}


@pytest.mark.parametrize(
    "overrides",
    [
        ("env=mock", "env.from_pixels=true", "env/distraction=color_grid_random", "env.frame_skip=2"),
        ("env=gym", "env.name=CartPole-v1"),
    ],
)
def test_good_environments_pass(capsys, overrides):
    passed, lines = check(capsys, *overrides)
    assert passed and list(lines) == list(CHECKS)
    assert {outcome for outcome, _ in lines.values()} == {"ok"}, lines


@pytest.mark.parametrize(
    ("kind", "name", "outcome", "message"),
    [
        ("NotANumber", "finite", "FAILED", "reward is nan at random step 0"),
        ("FloatImage", "data", "FAILED", r"render\(\) gives float64 \[16, 16, 3\]: return uint8"),
        ("Frozen", "images", "note", "all of 30 images are equal"),
        ("WrongShape", "data", "FAILED", r"an observation of 3 numbers, but Box.* has 2"),
        ("Unseeded", "seeds", "FAILED", r"the same seed differ: 'observation'.*self\.np_random"),
        (
            "Unseeded",
            "restore",
            "note",
            "will begin new episodes: RuntimeError: episode 0 of seed 0 comes out differently",
        ),
        ("Unchanging", "seeds", "note", "another seed gives the same episodes"),
        ("Picky", "actions", "FAILED", r"action \[-1\.0\] is refused \(RuntimeError: too far\)"),
        ("Huge", "images", "note", "observation has 3072 numbers"),
        ("Endless", "ends", "note", "no episode ended in 120 steps"),
        ("Missing", "creation", "FAILED", "name='Missing-v0'"),
    ],
)
def test_what_is_wrong_is_named(capsys, kind, name, outcome, message):
    pixels = "env.from_pixels=" + ("false" if kind in ("Huge", "Unseeded") else "true")
    passed, lines = check(capsys, "env=gym", f"env.name={kind}-v0", pixels, checks=[name])
    assert lines[name][0] == outcome, lines
    assert re.search(message, lines[name][1]), lines
    assert passed == (outcome != "FAILED")


def test_the_example_of_the_page_passes(capsys, monkeypatch, tmp_path):
    (tmp_path / "my_module.py").write_text(BLOCKS[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    for pixels in ("false", "true"):
        lines = check(capsys, "env=gym", "env.name=my_module:Track-v0", f"env.from_pixels={pixels}")[1]
        assert {outcome for outcome, _ in lines.values()} == {"ok"}, lines
    for block in BLOCKS[1:]:
        exec(block, {})
    assert len(BLOCKS[0].splitlines()) < 45


@pytest.mark.slow
def test_the_commands_of_the_page_run(monkeypatch, tmp_path):
    (tmp_path / "my_module.py").write_text(BLOCKS[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    commands = re.findall(r"^python (\S+) (.*)$", PAGE, flags=re.M)
    assert [program for program, _ in commands] == ["scripts/check_env.py"] * 2 + ["dreamer/train.py"]
    small = ["agent/size=debug", "collector.total_frames=256", "collector.frames_per_batch=32", "train_ratio=2"]
    small += ["collector.init_random_frames=32", "replay_buffer.batch_size=2", "replay_buffer.sequence_length=4"]
    small += ["eval.episodes=1", "logger.backends=[]"]
    for program, arguments in (commands[1], commands[2]):
        assert "FAILED" not in run_program(program, *arguments.split(), *(small if "train" in program else []))
