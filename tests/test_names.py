"""Names that would break something, and habits that can be checked."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path for folder in ("dreamer", "envs", "objectives", "scripts") for path in (ROOT / folder).rglob("*.py")
)
OF_A_PROGRAM = {"main", "parse_args"}  # the docstring of its module says what they do


def test_no_module_of_dreamer_shadows_another():
    """`python dreamer/train.py` puts dreamer/ first on the path: a dreamer/logging.py would hide the real one."""
    installed = set(importlib.metadata.packages_distributions())
    names = {path.stem for path in (ROOT / "dreamer").iterdir() if path.stem != "__init__" and path.name[0] not in "._"}
    taken = names & (set(sys.stdlib_module_names) | installed | {"envs", "objectives", "configs"})
    assert not taken, f"rename dreamer/{taken}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short_and_documented(path):
    text = path.read_text()
    module = ast.parse(text)
    assert len(text.splitlines()) <= 400
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef):
            documentation = ast.get_docstring(node, clean=False)
            length = node.end_lineno - node.lineno + 1 - (documentation.count("\n") + 1 if documentation else 0)
            assert length <= 60, f"{node.name}: {length} lines"
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert node.name.startswith("_") or node.name in OF_A_PROGRAM or ast.get_docstring(node), node.name


def test_bare_steps_never_mean_frames():
    """In the configuration a knob that counts frames says so in its comment, and none is called just `steps`."""
    for path in (path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "experiment"):
        for line in path.read_text().splitlines():
            assert not re.match(r"\s*(total_)?steps:", line), f"{path}: {line}"
            if "frames" in line.split(":")[0] or "interval" in line.split(":")[0]:
                assert "#" in line, f"{path}: give the unit in a comment: {line}"


def test_every_knob_is_explained():
    for path in (ROOT / "configs").rglob("*.yaml"):
        explained_by_its_block = False  # the loss weights are all of one kind
        for line in path.read_text().splitlines():
            explained_by_its_block = line.strip() == "loss_weights:" or (explained_by_its_block and line[:4] == "    ")
            if re.match(r"\s*\w+:\s+-?\d", line) and not explained_by_its_block:
                assert "#" in line or "experiment" in path.parts, f"{path}: {line}"


def test_package_is_complete():
    """Everything that an installed copy needs is declared: packages and yaml files."""
    code = "import configs, pathlib; print(len(list(pathlib.Path(configs.__path__[0]).rglob('*.yaml'))))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert int(result.stdout) == len(list((ROOT / "configs").rglob("*.yaml")))
