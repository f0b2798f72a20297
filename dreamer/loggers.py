"""Where metrics and videos go: `metrics.jsonl` always, TensorBoard and Weights & Biases by choice.

A logger that fails, because there is no network or no key, is dropped with a warning; it never stops a run.
"""

import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchrl.record.loggers import Logger

BACKENDS = ("tensorboard", "wandb")


def check_backends(backends: Sequence[str]) -> None:
    """Raise ``ValueError`` unless every backend is known."""
    unknown = [name for name in backends if name not in BACKENDS]
    if unknown:
        raise ValueError(f"logger.backends={unknown}: choose from {list(BACKENDS)}")


class RunLogger:
    """Fan out to the loggers of one run.

    Args:
        run_dir: Run folder; everything is written below it.
        backends: Which of "tensorboard", "wandb" to use beside ``metrics.jsonl``.
        project: Project name for Weights & Biases.
        offline: Keep Weights & Biases on disk.
        video_fps: Frames per second of written videos.

    Raises:
        ValueError: for an unknown backend.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        backends: Sequence[str],
        project: str = "lucid",
        offline: bool = True,
        video_fps: int = 15,
    ):
        check_backends(backends)
        self.run_dir, self.video_fps, self.start = Path(run_dir), video_fps, time.monotonic()
        self.file = open(self.run_dir / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115, closed by close()
        self.loggers: dict[str, Logger] = {}
        for name in backends:
            self._guard(name, lambda name=name: self.loggers.update({name: self._make(name, project, offline)}))

    def log(self, metrics: Mapping[str, float], frames: int) -> None:
        """Write one line of scalars, measured at ``frames`` environment frames. NaN and infinity become null."""
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        elapsed = round(time.monotonic() - self.start, 3)
        self.file.write(json.dumps({"frames": frames, "seconds": elapsed, **values}) + "\n")
        for name, logger in list(self.loggers.items()):
            self._guard(name, lambda logger=logger: logger.log_metrics(dict(metrics), step=frames))

    def log_video(self, name: str, frames: Tensor, step: int) -> Path:
        """Write uint8 ``frames`` [T, h, w, 3] as ``videos/<name>_<step>.mp4`` and pass the file on.

        TensorBoard gets the last frame as a picture, because it shows no mp4.
        """
        path = self.run_dir / "videos" / f"{name.replace('/', '_')}_{step:09d}.mp4"
        path.parent.mkdir(exist_ok=True)
        write_video(path, frames, self.video_fps)
        for backend, logger in list(self.loggers.items()):
            self._guard(
                backend, lambda backend=backend, logger=logger: self._show(backend, logger, name, path, frames, step)
            )
        return path

    def close(self) -> None:
        """Flush and close everything."""
        for name, logger in list(self.loggers.items()):
            self._guard(name, logger.close)
        self.file.close()

    def _make(self, name: str, project: str, offline: bool) -> Logger:
        if name == "tensorboard":
            from torchrl.record.loggers.tensorboard import TensorboardLogger

            return TensorboardLogger(exp_name="tensorboard", log_dir=str(self.run_dir))
        from torchrl.record.loggers.wandb import WandbLogger

        return WandbLogger(
            exp_name=self.run_dir.name,
            project=project,
            offline=offline,
            save_dir=str(self.run_dir),
            log_env_packages=False,
        )

    @staticmethod
    def _show(backend: str, logger: Any, name: str, path: Path, frames: Tensor, step: int) -> None:
        if backend == "tensorboard":
            logger.experiment.add_image(name, frames[-1].numpy(), global_step=step, dataformats="HWC")
        else:
            import wandb

            logger.experiment.log({name: wandb.Video(str(path), format="mp4"), "trainer/frames": step})

    def _guard(self, name: str, action) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001, third-party loggers may raise anything
            self.loggers.pop(name, None)
            warnings.warn(f"logger {name} is switched off: {error!r}; metrics.jsonl goes on", stacklevel=3)


class Meter:
    """Averages of metrics between two lines of the log, and the rates of what is counted.

    Values on a device are added up there and read in one transfer.

    Args:
        interval: Frames between two lines.
        seconds: Seconds between two lines; whichever comes first.
        total_frames, train_ratio: Budget of the run and intended train ratio, for the time left.
        frames_per_update: Replayed frames of one update.
    """

    def __init__(self, interval: int, seconds: float, *, total_frames: int, train_ratio: float, frames_per_update: int):
        self.interval, self.seconds, self.frames_per_update = interval, seconds, frames_per_update
        self.total_frames, self.updates_per_frame = total_frames, train_ratio / frames_per_update
        self.sums: dict[str, list] = {}  # name -> [sum, count]
        self.last = Progress(0, 0, time.monotonic())
        self.learning_since: Progress | None = None

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Add one observation of each metric."""
        for name, value in metrics.items():
            entry = self.sums.setdefault(name, [0.0, 0])
            entry[0] = entry[0] + (value.detach() if isinstance(value, Tensor) else value)
            entry[1] += 1

    def due(self, frames: int) -> bool:
        """Whether it is time for a line."""
        return frames - self.last.frames >= self.interval or time.monotonic() - self.last.time >= self.seconds

    def read(self, *, frames: int, updates: int) -> dict[str, float]:
        """Return means and rates since the previous line and the time left, and start again.

        Args:
            frames, updates: Counts since the start of the run.
        """
        now, last = Progress(frames, updates, time.monotonic()), self.last
        if self.learning_since is None and updates:
            self.learning_since = last
        elapsed = max(now.time - last.time, 1e-9)
        metrics = {
            "trainer/updates": float(updates),
            "trainer/updates_per_second": (updates - last.updates) / elapsed,
            "collector/fps": (frames - last.frames) / elapsed,
        }
        metrics["trainer/train_ratio"] = 0.0
        if self.learning_since is not None:
            since = self.learning_since
            replayed = (updates - since.updates) * self.frames_per_update
            metrics["trainer/train_ratio"] = replayed / max(frames - since.frames, 1)
            metrics["trainer/eta_seconds"] = self._time_left(now, since)
        values = [torch.as_tensor(total / count, dtype=torch.float32) for total, count in self.sums.values()]
        if values:
            device = max((value.device for value in values), key=lambda device: device.type != "cpu")
            metrics |= zip(self.sums, torch.stack([v.to(device) for v in values]).tolist(), strict=True)
        self.sums, self.last = {}, now
        return metrics

    def _time_left(self, now: "Progress", since: "Progress") -> float:
        """Seconds, from the pace since learning began, of frames or of updates, whichever lags behind."""
        total_updates = since.updates + (self.total_frames - since.frames) * self.updates_per_frame
        paces = ((self.total_frames, now.frames, since.frames), (total_updates, now.updates, since.updates))
        remaining = [(total - count) / (count - start) for total, count, start in paces if count > start]
        return (now.time - since.time) * max(remaining, default=0.0)


class Progress(NamedTuple):
    """Counts since the start of the run, and when they were taken."""

    frames: int
    updates: int
    time: float


def console_line(metrics: Mapping[str, float], frames: int, total_frames: int) -> str:
    """One line for a person: frames, speed, train ratio, return, losses and time left."""
    parts = [
        f"frames {frames:,}/{total_frames:,}",
        f"fps {metrics['collector/fps']:.1f}",
        f"updates {metrics['trainer/updates']:,.0f} ({metrics['trainer/updates_per_second']:.2f}/s)",
        f"ratio {metrics['trainer/train_ratio']:.0f}",
    ]
    for label, name in (("return", "episode/return"), ("eval", "eval/return_mean"), ("model", "wm/total_loss")):
        if name in metrics:
            parts.append(f"{label} {metrics[name]:.1f}")
    parts.append(f"left {duration(metrics.get('trainer/eta_seconds'))}")
    return "  ".join(parts)


def duration(seconds: float | None) -> str:
    """Seconds as "2d 3h", "3h 20m", "4m 10s"; "?" when unknown."""
    if seconds is None:
        return "?"
    units = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    rest, counts = int(seconds), []
    for unit, size in units:
        count, rest = divmod(rest, size)
        counts.append((count, unit))
    first = next((i for i, (count, _) in enumerate(counts) if count), len(counts) - 1)
    return " ".join(f"{count}{unit}" for count, unit in counts[first : first + 2])


def write_video(path: Path, frames: Tensor, fps: int) -> None:
    """Encode uint8 ``frames`` [T, h, w, 3] as H.264 in an mp4 file. Odd sizes are padded by one pixel."""
    import av

    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames: need uint8 [T, h, w, 3], got {frames.dtype} {tuple(frames.shape)}")
    array = frames.cpu().numpy()
    _, height, width, _ = array.shape
    array = np.pad(array, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width, stream.pix_fmt = array.shape[1], array.shape[2], "yuv420p"
        stream.options = {"crf": "18"}
        for image in array:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
