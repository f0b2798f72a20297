"""What the doctor thinks of the facts: one function for each line of its output."""

from __future__ import annotations

import importlib.metadata
import netrc
import os
import platform
import re
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Facts = Mapping[str, Any]
PACKAGE = "lucid-rl"
INSTALL = 'pip install -c constraints.txt -e ".[gym,test]"'
WORKER_BYTES = 400e6  # of one collector worker, as measured with one dm_control environment
SPEED_TEST_BYTES = 64 * 2**20
OPEN_FILES = 1024

# Pairs that pip installs without complaint and that do not work, or not safely: (versions, level, why, what to do).
KNOWN_BREAKS = (
    ({"dm-control": "<=1.0.50", "mujoco": ">=4"}, "FAILED", "every reset raises AttributeError", "'mujoco<4'"),
    ({"hydra-core": "<1.3.6"}, "FAILED", "runs any function that a configuration names", "'hydra-core>=1.3.6,<1.4'"),
    ({"torch": "<2.10"}, "FAILED", "a weights_only file can run code (CVE-2026-24747)", "'torch>=2.10'"),
    ({"rliable": "<=1.2.0", "pandas": ">=3"}, "note", "rliable cannot be imported; not used here", "'pandas<3'"),
    ({"ray": "<2.54"}, "note", "its dashboard deletes without a login (CVE-2026-27482)", "'ray>=2.54'"),
)
# Packages that are no dependency and still must fit those that are.
COMPANIONS = ("torchvision", "torchaudio", "mujoco-warp")


class Finding(NamedTuple):
    """One line of the doctor.

    Args:
        level: ok, note or FAILED.
        found: What is the case.
        advice: What to do about it; empty where nothing needs to be done.
    """

    level: str
    found: str
    advice: str = ""


def check_python(facts: Facts) -> Finding:
    """The interpreter is one that the project supports."""
    from packaging.specifiers import SpecifierSet

    wanted = importlib.metadata.metadata(PACKAGE)["Requires-Python"]
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if platform.python_version() not in SpecifierSet(wanted):
        return Finding("FAILED", f"{found}; wanted: {wanted}", "make a virtual environment with another Python")
    return Finding("ok", found)


def check_packages(facts: Facts) -> Finding:
    """Every version is one that this project and its dependencies ask for."""
    versions, wrong, met = facts["versions"], [], set()
    for owner, requirement in _requirements(versions):
        name = _canonical(requirement.name)
        version = versions.get(name)
        if version is None:
            wrong.append(f"{name} is missing ({owner} wants it)")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{name} {version}, but {owner} wants {requirement.specifier}")
        else:
            met.add(name)
    wrong += _mixed_builds(versions)
    if wrong:
        return Finding("FAILED", "; ".join(wrong), INSTALL)
    main = ("torch", "torchrl", "tensordict", "mujoco", "dm-control")
    return Finding("ok", f"{', '.join(f'{name} {versions[name]}' for name in main)}; {len(met)} fit")


def check_known_breaks(facts: Facts) -> Finding:
    """No versions that are known to break."""
    from packaging.specifiers import SpecifierSet

    versions, bad = facts["versions"], []
    for pair, level, why, cure in KNOWN_BREAKS:
        fits = (SpecifierSet(spec).contains(versions.get(name, "0"), prereleases=True) for name, spec in pair.items())
        if pair.keys() <= versions.keys() and all(fits):
            names = " with ".join(f"{name} {versions[name]}" for name in pair)
            bad.append((level, f"{names}: {why}", f"pip install {cure}"))
    if not bad:
        return Finding("ok", "none installed")
    levels, found, advice = zip(*bad, strict=True)
    return Finding("FAILED" if "FAILED" in levels else "note", "; ".join(found), ", ".join(advice))


def check_compiled_part(facts: Facts) -> Finding:
    """TorchRL's compiled part fits this PyTorch."""
    if reason := facts["torch"]["compiled"]:
        reason = "was built for another one" if "undefined symbol" in reason else reason
        found = f"does not load with torch {facts['versions'].get('torch')}: {reason}"
        return Finding(
            "note", found, "nothing: only TorchRL's prioritised samplers need it, and they are not used here"
        )
    return Finding("ok", "loads")


def check_configuration(facts: Facts) -> Finding:
    """The overrides make a configuration."""
    config = facts["config"]
    env, collection = config["env"], config["collector"]
    task = " ".join(str(part) for part in (env["backend"], env["name"], env["task"]) if part is not None)
    found = f"{config['agent']['name']} on {task}, {collection['mode']}, {collection['total_frames']:,} frames"
    return Finding("ok", found)


def check_environment(facts: Facts) -> Finding:
    """Environment and agent of the configuration can be made, and the environment runs."""
    plan = facts["plan"]
    shapes = ", ".join(f"{key} {shape}" for key, shape in plan["shapes"].items() if key in ("pixels", "observation"))
    return Finding("ok", f"{shapes}; {plan['frames_per_second']:.0f} frames/s; {plan['parameters']:,} parameters")


def check_gl(facts: Facts) -> Finding:
    """MuJoCo draws without a display."""
    gl, by = facts["gl"], "MUJOCO_GL" if os.environ.get("MUJOCO_GL") else "the probe"
    software = any(name in gl["renderer"].lower() for name in ("llvmpipe", "softpipe", "swrast"))
    kind = "software" if software else "GPU"
    device = os.environ.get("MUJOCO_EGL_DEVICE_ID")
    found = f"{gl['backend']} (chosen by {by}{f', EGL device {device}' if device else ''}), {kind}: {gl['renderer']}"
    found += f", mean {gl['mean']:.0f} of 255, {gl['ms']:.1f} ms for 64x64"
    if gl["deviation"] < 1:
        return Finding("FAILED", f"{found}: the frame is blank", "try MUJOCO_GL=egl or MUJOCO_GL=osmesa")
    if software and facts["torch"]["gpus"]:
        advice = "let the container see the driver's libraries: NVIDIA_DRIVER_CAPABILITIES=all, and install libegl1"
        return Finding("note", f"{found}, although there is a GPU", advice)
    return Finding("ok", found)


def check_codec(facts: Facts) -> Finding:
    """Videos can be written and read."""
    codec = facts["codec"]
    found = (
        f"H.264, {codec['back']} of {codec['sent']} frames back, error {codec['error']:.1f}, FFmpeg {codec['ffmpeg']}"
    )
    if codec["back"] != codec["sent"] or codec["error"] > 10:
        return Finding("FAILED", found, "pip install --force-reinstall av")
    return Finding("ok", found)


def check_replay(facts: Facts) -> Finding:
    """The replay gives back what was written into it."""
    replay = facts["replay"]
    found = f"{replay['records']} records in shared memory, a batch in {replay['ms']:.1f} ms"
    if not replay["right"]:
        return Finding("FAILED", f"{found}: wrong records", INSTALL)
    return Finding("ok", found)


def check_memory(facts: Facts) -> Finding:
    """Replay, model and workers fit into memory."""
    from dreamer.memory_limits import available_memory

    plan, free, config = facts["plan"], available_memory(), facts["config"]
    parts = {"workers": plan["workers"] * WORKER_BYTES}
    if _replay_place(config) in ("memory", "shared memory"):
        parts["replay"] = plan["replay_bytes"]
    if not _uses_gpu(facts):
        parts["weights, gradients, optimiser"] = 4 * plan["weight_bytes"]
    planned = sum(parts.values())
    shares = ", ".join(f"{name} {_spell(size)}" for name, size in parts.items() if size)
    found = f"{_spell(free)} free, {_spell(planned)} planned: {shares}"
    if planned > free:
        return Finding("FAILED", found, _smaller_replay(plan, free - planned + parts.get("replay", 0)))
    if planned > 0.8 * free:
        return Finding("note", found, "updates need more on top, see docs/memory.md")
    return Finding("ok", found)


def check_shared_memory(facts: Facts) -> Finding:
    """The replay fits where workers can write into it."""
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
    free, config, plan = shutil.disk_usage(folder).free, facts["config"], facts["plan"]
    found = f"{folder}: {_spell(free)} free"
    if _replay_place(config) != "shared memory":
        return Finding("ok", f"{found}, the replay is not there")
    found += f", the replay takes up to {_spell(plan['replay_bytes'])}"
    if plan["replay_bytes"] > free:
        advice = f"docker run --shm-size={plan['replay_bytes'] // 2**30 + 2}g; or {_smaller_replay(plan, free)}"
        return Finding("FAILED", found, advice)
    return Finding("ok", found)


def check_disk(facts: Facts) -> Finding:
    """The run folder takes the checkpoints, at a bearable speed."""
    config, plan = facts["config"], facts["plan"]
    folder = _existing(Path(config["run_dir"] or "runs"))
    free, speed = shutil.disk_usage(folder).free, _write_speed(folder)
    checkpoint = config["checkpoint"]
    small = 3 * plan["weight_bytes"]  # weights and two moments
    each = small + (plan["replay_bytes"] if checkpoint["replay"] else 0)
    needed = each * (checkpoint["keep"] + 1) + 2 * small  # and the best; of both kinds one is being written
    if _replay_place(config) == "files" and _same_disk(folder, Path(config["replay_buffer"]["memmap_dir"])):
        needed += plan["replay_bytes"]
    found = f"{folder}: {_spell(free)} free, up to {_spell(needed)} needed, a full checkpoint of {_spell(each)}"
    found += f" takes {each / speed:.0f} s at {speed / 1e6:.0f} MB/s"
    if needed > free:
        return Finding("FAILED", found, "run_dir=<folder on a larger disk>, checkpoint.replay=false or fewer records")
    return Finding("ok", found)


def check_gpu(facts: Facts) -> Finding:
    """A GPU that PyTorch can use, if there is one."""
    device, found = facts["config"]["device"], facts["torch"]
    if not found["gpus"]:
        if device.startswith("cuda"):
            return Finding("FAILED", f"none, but device={device}", "device=auto, or install torch for your driver")
        if shutil.which("nvidia-smi"):
            reason = "is built without CUDA" if found["cuda"] is None else f"for CUDA {found['cuda']} finds none"
            return Finding("note", f"nvidia-smi is here, but torch {reason}", "install torch for your driver")
        return Finding("note", "none, training runs on the CPU", "start with experiment=quickstart or agent/size=1m")
    names = ", ".join(
        f"{gpu['name']} {_spell(gpu['free'])} of {_spell(gpu['total'])} free{'' if gpu['bf16'] else ', no bfloat16'}"
        for gpu in found["gpus"]
    )
    facts_line = f"{names}; CUDA {found['cuda']}, driver {_driver()}"
    if not all(gpu["bf16"] for gpu in found["gpus"]):
        return Finding("note", facts_line, "optimization.autocast=false")
    return Finding("ok", facts_line)


def check_cpu(facts: Facts) -> Finding:
    """Cores that may be used, and what they can compute with."""
    from dreamer.memory_limits import available_cores

    config, cores, workers = facts["config"], available_cores(), facts["plan"]["workers"]
    flags = set(re.findall(r"\bavx2\b|\bavx512f\b|\bavx512_bf16\b|\bamx_bf16\b", _read("/proc/cpuinfo")))
    fast_bf16 = flags & {"avx512_bf16", "amx_bf16"}
    found = f"{cores:g} of {os.cpu_count()} cores usable, {' '.join(sorted(flags)) or platform.machine()}"
    if config["optimization"]["autocast"] == "bfloat16" and not _uses_gpu(facts) and not fast_bf16:
        return Finding(
            "note", f"{found}: no bfloat16 instructions", "optimization.autocast=false, bfloat16 is emulated"
        )
    if config["threads"] and config["threads"] > cores:
        return Finding("note", f"{found}, but threads={config['threads']}", f"threads={max(int(cores), 1)}")
    if workers >= max(cores, 2):
        advice = f"collector.num_collectors={max(int(cores) - 1, 1)} leaves a core to the learner, or collector=sync"
        return Finding("note", f"{found}, for {workers} workers and the learner", advice)
    return Finding("ok", found)


def check_wandb(facts: Facts) -> Finding:
    """Weights & Biases can do what the configuration asks of it. The network is not asked."""
    log, version = facts["config"]["logger"], facts["versions"].get("wandb")
    found = f"{version or 'not installed'}, {'logged in' if _wandb_key_exists() else 'not logged in'}"
    if "wandb" not in log["backends"]:
        return Finding("ok", f"{found}, not used by this configuration")
    mode = os.environ.get("WANDB_MODE", "offline" if log["offline"] else "online")
    if version is None:
        return Finding("FAILED", found, "pip install wandb, or leave wandb out of logger.backends")
    if mode == "online" and not _wandb_key_exists():
        return Finding("FAILED", f"{found}, but logger.offline=false", "wandb login, or logger.offline=true")
    return Finding("ok", f"{found}, {mode}")


def check_clock(facts: Facts) -> Finding:
    """The clock is not behind the files that it dated."""
    newest, now = max(path.stat().st_mtime for path in Path(__file__).parent.glob("*.py")), time.time()
    found = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now))
    if newest > now + 60:
        return Finding("note", f"{found}, but files here are newer", "set the clock: run folders are named after it")
    return Finding("ok", found)


def check_open_files(facts: Facts) -> Finding:
    """Workers and their pipes may open enough files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < OPEN_FILES:
        return Finding("note", f"at most {soft} at once", f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}")
    return Finding("ok", f"at most {soft} at once" if soft >= 0 else "no limit")


def check_workers(facts: Facts) -> Finding:
    """A new process starts and can import PyTorch."""
    spawn = facts["spawn"]
    if spawn["code"] != 0:
        return Finding("FAILED", f"a new process ended with code {spawn['code']}", "look for limits: ulimit -u, memory")
    return Finding("ok", f"a new process has imported torch after {spawn['seconds']:.1f} s")


def check_interrupt(facts: Facts) -> Finding:
    """Ctrl-C reaches programs that are started like this one."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        found = "ignored, as in background jobs of a shell"
        return Finding("note", found, "training listens all the same; end other programs with kill -TERM")
    return Finding("ok", "works")


def _requirements(versions: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """What the project, its dependencies and their companions ask for, each with who asks."""
    from packaging.requirements import Requirement

    ours = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or []]
    needed = [line for line in ours if line.marker is None or line.marker.evaluate({"extra": ""})]
    wished = [line for line in ours if line not in needed and _canonical(line.name) in versions]
    yield from ((PACKAGE, line) for line in (*needed, *wished))
    for owner in {_canonical(line.name) for line in needed} | set(COMPANIONS):
        if owner in versions:
            for text in importlib.metadata.requires(owner) or []:
                line = Requirement(text)
                if line.marker is None or line.marker.evaluate({"extra": ""}):
                    yield owner, line


def _mixed_builds(versions: Mapping[str, str]) -> Iterator[str]:
    """Companions of PyTorch that were built for another one: the part behind the + differs."""
    torch = versions.get("torch", "").partition("+")[2]
    for name in ("torchvision", "torchaudio"):
        build = versions.get(name, "").partition("+")[2]
        if build and torch and build != torch:
            yield f"{name} {versions[name]} is not for torch {versions['torch']}"


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _replay_place(config: dict[str, Any]) -> str:
    replay = config["replay_buffer"]
    if replay["memmap_dir"] is not None:
        return "files"
    if replay["storage_device"] != "cpu":
        return "GPU"
    return "memory" if config["collector"]["mode"] == "sync" else "shared memory"


def _uses_gpu(facts: Facts) -> bool:
    device = facts["config"]["device"]
    return device.startswith("cuda") or (device == "auto" and bool(facts["torch"]["gpus"]))


def _smaller_replay(plan: Mapping[str, Any], room: float) -> str:
    records = int(max(room, 0) // plan["record_bytes"])
    return f"replay_buffer.size={records} at most, or replay_buffer.memmap_dir=<folder on a disk>"


def _existing(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _same_disk(one: Path, other: Path) -> bool:
    return one.stat().st_dev == _existing(other).stat().st_dev


def _write_speed(folder: Path) -> float:
    """Bytes per second to this disk, synchronised."""
    block = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(SPEED_TEST_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return SPEED_TEST_BYTES / (time.perf_counter() - start)


def _wandb_key_exists() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return host in netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def _driver() -> str:
    match = re.search(r"Kernel Module\s+(?:for \w+\s+)?([\d.]+)", _read("/proc/driver/nvidia/version"))
    return match[1] if match else "unknown"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _spell(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
