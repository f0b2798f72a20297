#!/usr/bin/env bash
# Makes sure that MuJoCo can render without a display: finds an EGL or OSMesa library that works, or installs one.
# Usage: scripts/ensure_gl.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
packages="libegl1 libgl1 libgles2 libglvnd0 libegl-mesa0 libgl1-mesa-dri libosmesa6"
works() { "$python" envs/gl.py; }
works >/dev/null 2>&1 && exit 0
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "No OpenGL backend found: installing $packages"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
    works && exit 0
fi
works || true
echo "MuJoCo cannot render here. Run this once, then make again:" >&2
echo "    sudo apt-get install -y $packages" >&2
exit 1
