"""Chooses the OpenGL library that MuJoCo renders with, before anything imports MuJoCo.

MuJoCo reads the environment variable MUJOCO_GL once, while it is imported, and `torchrl.envs` imports it. This
file needs only the standard library: `envs/__init__.py` calls it first, and `python envs/gl.py` prints the choice.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

# In order of preference. Only EGL uses a graphics card; without one both draw equally fast.
BACKENDS = ("egl", "osmesa")
PACKAGES = "libegl1 libgl1 libgles2 libglvnd0 libegl-mesa0 libgl1-mesa-dri libosmesa6"
PROBE_SECONDS = 20

_failures: dict[str, str] = {}  # backend -> why it does not work here


def choose_gl_backend() -> str | None:
    """Sets MUJOCO_GL to a backend that can render without a display, unless the user has set it.

    Child processes inherit the variable, so they do not probe again. Where nothing works, the variable stays unset:
    environments without images must run all the same, and `require_gl_backend` tells the others why they cannot.

    Returns:
        The value of MUJOCO_GL, or None if it stays unset.
    """
    chosen = os.environ.get("MUJOCO_GL")
    if chosen or sys.platform != "linux":  # elsewhere MuJoCo's own default needs no help
        return chosen
    # Whoever imported PyOpenGL before has bound this process to one platform.
    bound = os.environ.get("PYOPENGL_PLATFORM")
    chosen = _find_working((bound,) if bound in BACKENDS else BACKENDS)
    if chosen:
        os.environ["MUJOCO_GL"] = chosen
    return chosen


def require_gl_backend() -> None:
    """Checks that MuJoCo has something to render with.

    Raises:
        RuntimeError: no backend works, the message says what was tried and what to install; or dm_control was
            imported first and took glfw where there is no display, with which MuJoCo would end the process.
    """
    if _failures and not os.environ.get("MUJOCO_GL"):
        tried = "\n".join(f"  {backend}: {reason}" for backend, reason in _failures.items())
        raise RuntimeError(
            f"MuJoCo cannot render here. Tried:\n{tried}\n"
            f"Install the software renderer with\n    sudo apt-get install -y {PACKAGES}\n"
            "or set MUJOCO_GL to a backend of your own (egl, osmesa or glfw)."
        )
    renderer = getattr(sys.modules.get("dm_control._render"), "BACKEND", None)
    display = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    if renderer == "glfw" and not display:
        raise RuntimeError(
            "MuJoCo renders with glfw, which needs a display: import envs before dm_control, "
            "or start Python with MUJOCO_GL=egl"
        )


def _find_working(backends: tuple[str, ...]) -> str | None:
    _failures.clear()
    for backend in backends:
        reason = _why_not(backend)
        if reason is None:
            return backend
        _failures[backend] = reason
    return None


def _why_not(backend: str) -> str | None:
    """Tries a backend in a process of its own, because a broken driver may crash; None means that it works."""
    command = [sys.executable, "-I", "-S", os.path.abspath(__file__), "--probe", backend]
    try:
        probe = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if probe.returncode == 0:
        return None
    return probe.stdout.strip() or f"the probe ended with code {probe.returncode}"


def _load(*names: str) -> ctypes.CDLL:
    """The first library of these names that loads."""
    reasons = []
    for name in names:
        try:
            return ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
        except OSError as error:
            reasons.append(str(error))
    raise OSError(reasons[0])


def _probe_osmesa() -> None:
    """Makes a context as `mujoco.osmesa` does: RGBA, 24 bits of depth, 8 of stencil."""
    library = _load("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so")
    library.OSMesaCreateContextExt.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.OSMesaCreateContextExt(0x1908, 24, 8, 0, None))
    if not context:
        raise OSError("OSMesaCreateContextExt made no context")
    side = 8
    pixels = (ctypes.c_float * (4 * side * side))()
    if not library.OSMesaMakeCurrent(context, pixels, 0x1406, side, side):  # GL_FLOAT
        raise OSError("OSMesaMakeCurrent failed")


def _probe_egl() -> None:
    """Makes a context as `mujoco.egl` does: on the first device that initialises, without a surface."""
    egl = _load("libEGL.so.1", "libEGL.so")
    _load("libOpenGL.so.0", "libGL.so.1", "libGLESv2.so.2")  # PyOpenGL needs one of them beside EGL
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    egl.eglCreateContext.restype = ctypes.c_void_p
    display = _egl_display(egl)
    # 8 bits of red, green, blue, alpha and stencil; 24 of depth; an RGB pbuffer for OpenGL; the end of the list.
    wanted = (0x3024, 8, 0x3023, 8, 0x3022, 8, 0x3021, 8, 0x3026, 8, 0x3025, 24)
    wanted += (0x303F, 0x308E, 0x3033, 0x0001, 0x3040, 0x0008, 0x3038)
    config, found = ctypes.c_void_p(), ctypes.c_int()
    attributes = (ctypes.c_int * len(wanted))(*wanted)
    egl.eglChooseConfig(display, attributes, ctypes.byref(config), 1, ctypes.byref(found))
    if found.value < 1:
        raise OSError("no EGL framebuffer configuration fits")
    egl.eglBindAPI(0x30A2)  # EGL_OPENGL_API
    context = ctypes.c_void_p(egl.eglCreateContext(display, config, None, None))
    if not context or not egl.eglMakeCurrent(display, None, None, context):
        raise OSError("cannot make an EGL context")


def _egl_display(egl: ctypes.CDLL) -> ctypes.c_void_p:
    """The display of the first device that initialises, or of device MUJOCO_EGL_DEVICE_ID."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int

    def extension(name: str, *types):
        address = egl.eglGetProcAddress(name.encode())
        if not address:
            raise OSError(f"libEGL has no {name}")
        return ctypes.CFUNCTYPE(*types)(address)

    query_devices = extension("eglQueryDevicesEXT", integer, integer, pointer, pointer)
    get_display = extension("eglGetPlatformDisplayEXT", pointer, integer, pointer, pointer)
    devices, count = (pointer * 64)(), integer()
    query_devices(len(devices), devices, ctypes.byref(count))
    candidates = devices[: count.value]
    if "MUJOCO_EGL_DEVICE_ID" in os.environ:
        first = int(os.environ["MUJOCO_EGL_DEVICE_ID"])
        candidates = candidates[first : first + 1]
    for device in candidates:
        display = pointer(get_display(0x313F, device, None))  # EGL_PLATFORM_DEVICE_EXT
        if display and egl.eglInitialize(display, None, None):
            return display
    raise OSError(f"none of {count.value} EGL devices initialises")


def _main(arguments: list[str]) -> int:
    if arguments[:1] == ["--probe"]:
        try:
            {"egl": _probe_egl, "osmesa": _probe_osmesa}[arguments[1]]()
        except (OSError, AttributeError, ValueError) as error:
            sys.stdout.write(f"{error}\n")
            return 1
        return 0
    asked = os.environ.get("MUJOCO_GL")
    if asked in BACKENDS and not _find_working((asked,)):
        del os.environ["MUJOCO_GL"]  # only here, to report on it: the user's own setting stands
    else:
        choose_gl_backend()
    try:
        require_gl_backend()
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{os.environ.get('MUJOCO_GL', 'default')}\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
