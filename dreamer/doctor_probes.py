"""What the doctor looks at: facts about this machine, without a judgement.

Whatever loads a heavy library runs in a process of its own, ``python -m dreamer.doctor_probes <name>``, which reads the
configuration as JSON from its input and prints its facts as the last line. A crash or a hang there is a fact too.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 120  # that a probe may take; they need a few
RING = 32  # records of each stream of the tiny replay
SCENE = """<mujoco><worldbody><light pos="0 0 3"/><geom type="plane" size="2 2 .1" rgba=".3 .5 .7 1"/>
<geom type="box" size=".2 .2 .2" pos="0 0 .2" rgba=".9 .3 .2 1"/></worldbody></mujoco>"""


class Facts(Mapping):
    """The facts of all probes by name. The probes start at once and run beside each other; access waits for one.

    Args:
        overrides: Of the training configuration, as on the command line of `dreamer/train.py`.
    """

    def __init__(self, overrides: list[str]):
        self._pool = ThreadPoolExecutor(2)  # in order, so that a probe may wait for one above it
        self._futures: dict[str, Future] = {"config": self._pool.submit(read_config, overrides)}
        for name in CHILDREN:
            needs_config = name == "plan"
            self._futures[name] = self._pool.submit(self._run, name, needs_config)
        self._futures["versions"] = self._pool.submit(read_versions)

    def _run(self, name: str, needs_config: bool) -> dict[str, Any]:
        return run_child(name, self["config"] if needs_config else None)

    def __getitem__(self, name: str) -> Any:
        return self._futures[name].result()

    def close(self) -> None:
        """Start no further probe."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._futures)

    def __len__(self) -> int:
        return len(self._futures)


def run_child(name: str, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """The facts of a probe that runs in a process of its own."""
    output = run_apart([sys.executable, "-m", "dreamer.doctor_probes", name], stdin=json.dumps(config))
    return json.loads(output.splitlines()[-1])


def run_apart(command: list[str], stdin: str = "", seconds: float = SECONDS) -> str:
    """Output of a command.

    Raises:
        RuntimeError: It failed, crashed or took too long; the message is the last thing that it said.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    try:
        output, errors = process.communicate(stdin, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no answer within {seconds:g} s") from None
    finally:
        _kill_tree(process)
    if process.returncode:
        raise RuntimeError(explain_failure(process.returncode, errors or output))
    return output


def _kill_tree(process: subprocess.Popen) -> None:
    """End a process that is still there, with all that it started."""
    if process.poll() is None:
        import psutil

        for member in [*psutil.Process(process.pid).children(recursive=True), process]:
            member.kill()
        process.wait()


def explain_failure(code: int, text: str) -> str:
    """One line about a process that failed: its signal, the error that its traceback ends with, or all that it said."""
    if code < 0:
        return f"crashed with {signal.Signals(-code).name}"
    _, traceback, rest = text.rpartition("Traceback (most recent call last)")
    lines = rest.splitlines()
    if traceback:
        lines = list(itertools.dropwhile(lambda line: line.startswith((" ", ":")), lines))
    said = [line.strip() for line in lines if line.strip() and "HYDRA_FULL_ERROR" not in line]
    return " ".join(said).removeprefix("RuntimeError: ")[:1000] or f"exit code {code}"


def read_config(overrides: list[str]) -> dict[str, Any]:
    """The configuration that training would run with, as the program itself composes it."""
    import yaml

    command = [sys.executable, str(ROOT / "dreamer/train.py"), "--cfg", "job", "--resolve", *overrides]
    return yaml.safe_load(run_apart(command))


def read_versions() -> dict[str, str]:
    """Version of every installed package, by its normalised name."""
    from packaging.utils import canonicalize_name

    found = importlib.metadata.distributions()
    return {canonicalize_name(package.metadata["Name"]): package.version for package in found}


def probe_gl(config: None) -> dict[str, Any]:
    """Draw a small scene with the backend that environments would use."""
    chosen = run_apart([sys.executable, str(ROOT / "envs/gl.py")]).split()[-1]
    os.environ["MUJOCO_GL"] = chosen
    import mujoco

    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    renderer = mujoco.Renderer(model, 64, 64)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        renderer.update_scene(data)
        frame = renderer.render()
        times.append(time.perf_counter() - start)
    from OpenGL import GL

    name = GL.glGetString(GL.GL_RENDERER).decode()
    renderer.close()
    facts = {"mean": float(frame.mean()), "deviation": float(frame.std()), "ms": 1000 * sorted(times)[len(times) // 2]}
    return facts | {"backend": chosen, "renderer": name}


def probe_codec(config: None) -> dict[str, Any]:
    """Encode a clip as videos of a run are, and decode it."""
    from fractions import Fraction

    import av
    import numpy as np

    shade = np.linspace(0, 255, 64, dtype=np.uint8)
    clip = [np.broadcast_to(np.roll(shade, 4 * t)[:, None], (64, 64, 3)) for t in range(16)]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/clip.mp4"
        with av.open(path, "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(15))
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            for image in clip:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        with av.open(path) as container:
            back = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        size = os.path.getsize(path)
    error = float(np.abs(np.array(back[: len(clip)], float) - np.array(clip[: len(back)], float)).mean())
    return {"sent": len(clip), "back": len(back), "error": error, "bytes": size, "ffmpeg": av.ffmpeg_version_info}


def probe_torch(config: None) -> dict[str, Any]:
    """Devices of PyTorch, and whether TorchRL's compiled part fits it."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            free, total = torch.cuda.mem_get_info()
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        name = torch.cuda.get_device_name(index)
        gpus.append({"name": name, "free": free, "total": total, "bf16": bf16})
    try:
        import torchrl._torchrl  # noqa: F401

        compiled = ""
    except ImportError as error:
        compiled = str(error).splitlines()[0]
    return {"gpus": gpus, "cuda": torch.version.cuda, "compiled": compiled}


def probe_replay(config: None) -> dict[str, Any]:
    """Write numbered records into a replay in shared memory and sample them."""
    import torch
    from tensordict import TensorDict

    from dreamer.replay import SequenceReplay

    record = TensorDict({"number": torch.zeros(1, dtype=torch.int64), "belief": torch.zeros(4)}, [])
    with SequenceReplay(
        record, capacity=2 * RING, num_streams=2, batch_size=4, sequence_length=6, context_keys=("belief",)
    ) as replay:
        replay.share()
        for number in range(3 * RING):
            rows = record.expand(2).clone()
            rows["number"] += number
            rows["stream"] = torch.arange(2)
            replay.extend(rows)
        start = time.perf_counter()
        batch = replay.sample()
        ms = 1000 * (time.perf_counter() - start)
        expected = batch["context", "position"][:, None] + torch.arange(6)
        return {"right": bool((batch["number"].squeeze(-1) == expected).all()), "ms": ms, "records": len(replay)}


def probe_spawn(config: None) -> dict[str, Any]:
    """Start a worker as collectors do and let it import PyTorch."""
    import multiprocessing

    start = time.perf_counter()
    process = multiprocessing.get_context("spawn").Process(target=_import_torch)
    process.start()
    process.join()
    return {"code": process.exitcode, "seconds": time.perf_counter() - start}


def _import_torch() -> None:
    import torch

    torch.zeros(1)


def probe_plan(config: dict[str, Any]) -> dict[str, Any]:
    """Make the environment and the agent of a run, and count what the run would take."""
    import torch

    import envs
    from dreamer.agents import EnvSpec, load
    from dreamer.collection import count_records, count_workers

    env = envs.make_env(**config["env"], seed=0)
    env.rollout(2)
    start = time.perf_counter()
    steps = env.rollout(10).numel()
    seconds = time.perf_counter() - start
    env_spec = EnvSpec.of(env)
    env.close()
    knobs = dict(config["agent"])
    agent = load(knobs.pop("name")).build(
        env_spec=env_spec,
        device=torch.device("cpu"),
        optimization=config["optimization"] | {"cudagraph": False, "compile": {"enabled": False}},
        **knobs,
    )
    records, collection = count_records(config), config["collector"]
    record_bytes = sum(x.numel() * x.element_size() for x in agent.record.values(True, True))
    parameters = list(agent.loss.parameters())
    return {
        "frames_per_second": steps * config["env"]["frame_skip"] / seconds,
        "shapes": {key: list(spec.shape) for key, spec in env_spec.observation.items()},
        "workers": 0
        if collection["mode"] == "sync"
        else count_workers(collection["mode"], collection["num_collectors"]),
        "parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "weight_bytes": sum(p.numel() * p.element_size() for p in parameters),
        "records": records,
        "record_bytes": record_bytes,
        "replay_bytes": records * record_bytes,
    }


CHILDREN: dict[str, Callable[[Any], dict[str, Any]]] = {
    "torch": probe_torch,
    "plan": probe_plan,
    "replay": probe_replay,
    "gl": probe_gl,
    "codec": probe_codec,
    "spawn": probe_spawn,
}


if __name__ == "__main__":
    answer = CHILDREN[sys.argv[1]](json.load(sys.stdin))
    sys.stdout.write(f"\n{json.dumps(answer)}\n")
