"""The choice of MuJoCo's OpenGL backend."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from envs import gl

SCRIPT = Path(gl.__file__)


@pytest.fixture
def undecided(monkeypatch):
    """As in a fresh process whose user has not chosen."""
    monkeypatch.setenv("MUJOCO_GL", "")  # so that monkeypatch restores what the test sets
    monkeypatch.delenv("PYOPENGL_PLATFORM", raising=False)
    monkeypatch.setattr(gl, "_failures", {})


@pytest.fixture
def no_libraries(monkeypatch, tmp_path):
    """Every OpenGL library is an empty file, for child processes."""
    for name in ("EGL", "OSMesa", "GL", "OpenGL"):
        for suffix in (".so", *(f".so.{number}" for number in range(10))):
            (tmp_path / f"lib{name}{suffix}").touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))


def run_script() -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)


def test_finds_a_backend_and_tells_child_processes(undecided):
    assert gl.choose_gl_backend() in gl.BACKENDS
    assert os.environ["MUJOCO_GL"] in gl.BACKENDS
    gl.require_gl_backend()


@pytest.mark.parametrize("value", ["glfw", "osmesa", "nonsense"])
def test_leaves_the_choice_of_the_user_alone(monkeypatch, undecided, no_libraries, value):
    monkeypatch.setenv("MUJOCO_GL", value)
    assert gl.choose_gl_backend() == value
    assert os.environ["MUJOCO_GL"] == value


def test_falls_back_to_the_next_backend(monkeypatch, undecided):
    monkeypatch.setattr(gl, "_why_not", lambda backend: None if backend == "osmesa" else "broken")
    assert gl.choose_gl_backend() == "osmesa"
    gl.require_gl_backend()


def test_keeps_to_the_platform_that_pyopengl_is_bound_to(monkeypatch, undecided):
    monkeypatch.setattr(gl, "_why_not", lambda backend: None)
    monkeypatch.setenv("PYOPENGL_PLATFORM", "osmesa")
    assert gl.choose_gl_backend() == "osmesa"


def test_says_what_was_tried_when_nothing_works(undecided, no_libraries):
    assert gl.choose_gl_backend() is None
    assert not os.environ["MUJOCO_GL"]
    with pytest.raises(RuntimeError, match="MuJoCo cannot render") as caught:
        gl.require_gl_backend()
    for part in ("egl: ", "osmesa: ", "file too short", f"apt-get install -y {gl.PACKAGES}"):
        assert part in str(caught.value)


def test_glfw_without_a_display_is_refused(monkeypatch, undecided):
    monkeypatch.setitem(sys.modules, "dm_control._render", SimpleNamespace(BACKEND="glfw"))
    monkeypatch.setenv("DISPLAY", ":0")
    gl.require_gl_backend()
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(RuntimeError, match="import envs before dm_control"):
        gl.require_gl_backend()


def test_a_crash_or_a_hang_of_the_probe_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(gl, "__file__", str(tmp_path / "probe.py"))
    (tmp_path / "probe.py").write_text("import os; os.abort()")
    assert "-6" in gl._why_not("egl")
    (tmp_path / "probe.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(gl, "PROBE_SECONDS", 0.3)
    assert "timed out" in gl._why_not("egl")


def test_script_prints_the_backend(undecided):
    done = run_script()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() in gl.BACKENDS


@pytest.mark.parametrize("value", ["", "egl"])
def test_script_fails_with_the_reason(monkeypatch, undecided, no_libraries, value):
    monkeypatch.setenv("MUJOCO_GL", value)
    done = run_script()
    assert (done.returncode, done.stdout) == (1, "")
    assert "egl: " in done.stderr and gl.PACKAGES in done.stderr


@pytest.mark.slow
def test_without_opengl_states_work_and_images_explain_themselves(undecided, no_libraries):
    program = """
from envs import make_env
env = make_env(name="cartpole", task="swingup", from_pixels=False)
print(env.rollout(3)["next", "observation"].shape)
make_env(name="cartpole", task="swingup").reset()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=SCRIPT.parents[1])
    assert done.stdout.strip() == "torch.Size([3, 5])"
    assert "RuntimeError: MuJoCo cannot render here. Tried:" in done.stderr
