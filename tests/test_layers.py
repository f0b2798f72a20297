"""Who may import whom, and what works without the optional packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from dreamer.agents import SHARED

ROOT = Path(__file__).parents[1]
OURS = {"dreamer", "envs", "objectives", "configs", "scripts", "tests"}
STDLIB = sys.stdlib_module_names

# files below -> (modules of ours they may import, packages they may import at the top of the file)
LAYERS = {
    "envs": ({"envs"}, {"torch", "tensordict", "torchrl", "numpy"}),
    "objectives": ({"objectives"}, {"torch", "tensordict", "torchrl"}),
    "dreamer/models": ({"dreamer.models"}, {"torch", "torchrl"}),
    "dreamer/agents": (
        {
            "dreamer.agents",
            "dreamer.annotation",
            "dreamer.controller_policy",
            "dreamer.controller_stage",
            "dreamer.episode_data",
            "dreamer.episode_store",
            "dreamer.evolution",
            "dreamer.fitness",
            "dreamer.labellers",
            "dreamer.models",
            "dreamer.on_policy",
            "dreamer.optimizers",
            "dreamer.random_policies",
            "dreamer.stages",
            "dreamer.steppers",
            "dreamer.world_model_source",
            "dreamer.world_model_stages",
            "envs.segmentation.metrics",
            "objectives",
        },
        {"torch", "tensordict", "torchrl"},
    ),
}
HYDRA_FILES = {"dreamer/train.py", "dreamer/eval.py", "dreamer/settings.py"}


def imports(path: Path, *, top_level_only: bool) -> list[str]:
    """Modules that a file imports; relative imports raise."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import absolutely, not from {'.' * node.level}{node.module}"
            names.append(node.module)
    return names


def python_files(folder: str) -> list[Path]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, folder
    return files


@pytest.mark.parametrize("layer", LAYERS)
def test_layer(layer):
    ours, packages = LAYERS[layer]
    for path in python_files(layer):
        for name in imports(path, top_level_only=False):
            if name.split(".")[0] in OURS:
                inside = any(name == allowed or name.startswith(f"{allowed}.") for allowed in ours)
                assert inside, f"{path} imports {name}"
        for name in imports(path, top_level_only=True):
            top = name.split(".")[0]
            assert top in OURS | packages | STDLIB, f"{path} imports {name} at the top"


def test_no_agent_imports_another():
    agents = {path.stem for path in python_files("dreamer/agents")} - {"__init__"} - SHARED
    for path in python_files("dreamer/agents"):
        others = {f"dreamer.agents.{name}" for name in agents - {path.stem}}
        assert not others & set(imports(path, top_level_only=False)), path


def test_hydra_stays_at_the_entry_points():
    for path in python_files("dreamer") + python_files("envs") + python_files("objectives"):
        if str(path.relative_to(ROOT)) not in HYDRA_FILES:
            tops = {name.split(".")[0] for name in imports(path, top_level_only=False)}
            assert not tops & {"hydra", "omegaconf"}, path


def test_nobody_imports_the_program():
    for folder in ("envs", "objectives", "dreamer/models", "dreamer/agents"):
        for path in python_files(folder):
            assert "dreamer.train" not in imports(path, top_level_only=False), path


@pytest.mark.parametrize("package", ["envs", "objectives"])
def test_imports_without_optional_packages(package):
    blocked = ["hydra", "omegaconf", "wandb", "dm_control", "gymnasium", "transformers", "av"]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import {package}; print({package}.__file__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.split()[-1]).parents[1] == ROOT, "another package of this name is installed"
