"""Where metrics, pictures, videos and incidents go: files always, TensorBoard and Weights & Biases by choice.

A logger that fails, because there is no network or no key, is dropped with a warning; it never stops a run. Neither
does a full disk: lines wait in memory, pictures and videos are left out.
"""

import netrc
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor
from torchrl.record.loggers import Logger

from dreamer.files import write_whole
from dreamer.json_lines import JsonLines
from dreamer.redaction import redact

BACKENDS = ("tensorboard", "wandb")
HISTOGRAM_BINS = 64
WANDB_TIMEOUT = 30.0  # seconds that Weights & Biases may hold up the start and the end of a run


def check_backends(backends: Sequence[str]) -> None:
    """Raise ``ValueError`` unless every backend is known."""
    unknown = [name for name in backends if name not in BACKENDS]
    if unknown:
        raise ValueError(f"logger.backends={unknown}: choose from {list(BACKENDS)}")


class RunLogger:
    """Fan out to the loggers of one run.

    ``metrics.jsonl``, ``histograms.jsonl``, ``incidents.jsonl``, ``images`` and ``videos`` of the run folder are always
    written and are complete at every moment. The other backends start with the first line, so that a resumed run goes
    on with the curves that it had: TensorBoard drops what came after the checkpoint, Weights & Biases keeps the id of
    the run. Offline, it then has several folders of one id; ``wandb sync <run_dir>/wandb/offline-run-*`` puts them
    together in the order of their start (older releases need ``--append``).

    What is logged belongs to a number of frames. Where an agent learns while frames stand still, ``step`` tells its
    entries apart: it is then the place in TensorBoard and Weights & Biases and in the names of pictures and videos,
    and lines hold it beside the frames.

    Args:
        run_dir: Run folder; everything is written below it.
        backends: Which of "tensorboard", "wandb" to use beside the files.
        project, entity: Project and team of Weights & Biases; no team for the user's own account.
        offline: Keep Weights & Biases on disk. Otherwise a key must have been stored; nobody is asked for one.
        video_fps: Frames per second of written videos.
        config: What Weights & Biases shows as the configuration of the run, without secrets.
        say: Shows a person one line of text.

    Raises:
        ValueError: for an unknown backend.
        OSError: if the run folder cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        backends: Sequence[str],
        project: str = "lucid",
        entity: str | None = None,
        offline: bool = True,
        video_fps: int = 15,
        config: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = print,
    ):
        check_backends(backends)
        self.run_dir, self.video_fps, self.say = Path(run_dir), video_fps, say
        self.wandb_settings = {"project": project, "entity": entity, "offline": offline, "config": dict(config or {})}
        (self.run_dir / "metrics.jsonl").touch()
        self.metrics = JsonLines(self.run_dir / "metrics.jsonl", self._report_disk)
        self.histograms = JsonLines(self.run_dir / "histograms.jsonl", self._report_disk)
        self.incidents = JsonLines(self.run_dir / "incidents.jsonl", warnings.warn)
        self.start, self.frames = time.monotonic(), 0  # of the run, also before a resume; of the newest entry
        self.step = 0  # of the newest entry
        self.purge_step: int | None = None
        self.saved: dict[str, Any] = {}
        self.wandb_id = ""
        self.pending = list(backends)
        self.loggers: dict[str, Logger] = {}

    def log(self, metrics: Mapping[str, float], frames: int, step: int | None = None) -> None:
        """Write one line of scalars, measured at ``frames`` environment frames. NaN and infinity become null."""
        seconds = round(time.monotonic() - self.start, 3)
        self.metrics.write({**_place(frames, step), "seconds": seconds, **metrics})
        self._pass_on(frames, step, lambda _, logger, at: logger.log_metrics(dict(metrics), step=at))

    def log_image(self, name: str, image: Tensor, frames: int, step: int | None = None) -> None:
        """Write a uint8 ``image`` [h, w, 3], seen at ``frames``, as ``images/<name>_<step>.png``."""
        path = self._write_media("images", name, frames if step is None else step, "png", encode_image(image))
        if path is not None:
            self._pass_on(frames, step, lambda backend, logger, at: _show(backend, logger, name, path, image, at))

    def log_video(self, name: str, video: Tensor, frames: int, step: int | None = None) -> None:
        """Write a uint8 ``video`` [T, h, w, 3], seen at ``frames``, as ``videos/<name>_<step>.mp4``.

        TensorBoard gets the last image as a picture, because it shows no mp4.
        """
        content = encode_video(video, self.video_fps)
        path = self._write_media("videos", name, frames if step is None else step, "mp4", content)
        if path is not None:
            self._pass_on(frames, step, lambda backend, logger, at: _show(backend, logger, name, path, video[-1], at))

    def log_histogram(self, name: str, values: Tensor, frames: int, step: int | None = None) -> None:
        """Write how often ``values`` [N] fall into at most 64 bins of equal width. NaN and infinity are left out."""
        numbers = values.detach().flatten().double().cpu().numpy()
        numbers = numbers[np.isfinite(numbers)]
        if numbers.size:
            counts, edges = np.histogram(numbers, bins=min(HISTOGRAM_BINS, numbers.size))
            line = {"name": name, "edges": edges.tolist(), "counts": counts.tolist()}
            self.histograms.write({**_place(frames, step), **line})
            shown = (name, numbers, counts, edges)
            self._pass_on(frames, step, lambda backend, logger, at: _show_histogram(backend, logger, *shown, at))

    def incident(self, kind: str, message: str, *, frames: int, **facts: Any) -> None:
        """Write down, and say, what happened to the run at ``frames``: a restart of a worker, a lost update, a signal.

        Args:
            kind: One word to group by, such as "worker_restart".
            message: One sentence for a person.
            frames: Frames of the run so far.
            facts: Further entries; anything that JSON lacks is written as text.
        """
        self._record(kind, message, frames, facts)
        self.say(f"incident at {frames:,} frames: {message}")

    def close(self) -> None:
        """Flush and close everything."""
        for name, logger in list(self.loggers.items()):
            self._guard(name, logger.close)
        for lines in (self.metrics, self.histograms, self.incidents):
            lines.close()

    def state_dict(self) -> dict[str, Any]:
        """How far the files had come, for a run that goes on from here."""
        return {
            "metrics_bytes": self.metrics.size,
            "histograms_bytes": self.histograms.size,
            "frames": self.frames,
            "step": self.step,
            "seconds": time.monotonic() - self.start,
            "wandb_id": self.wandb_id,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Remember a state to go on from; nothing is written before :meth:`rewind`."""
        self.saved = dict(state_dict)

    def rewind(self) -> None:
        """Go on from the loaded state; to be called before anything is logged, when nothing can go wrong any more.

        Lines of metrics that were written after it move to ``metrics_lost.jsonl``, histograms are removed, incidents
        stay. In a new run folder there is nothing to take back, and Weights & Biases starts a run of its own.
        """
        state_dict = self.saved
        same_folder = self.metrics.size >= state_dict["metrics_bytes"] > 0
        lost = self.metrics.cut(state_dict["metrics_bytes"])
        if lost:
            with open(self.run_dir / "metrics_lost.jsonl", "ab") as file:
                file.write(lost)
        self.histograms.cut(state_dict["histograms_bytes"])
        self.start, self.frames = time.monotonic() - state_dict["seconds"], state_dict["frames"]
        self.step = state_dict.get("step", self.frames)
        self.purge_step = self.step + 1
        self.wandb_id = state_dict["wandb_id"] if same_folder else ""

    def start_over(self) -> None:
        """Take back what an earlier start wrote that left no checkpoint to go on from."""
        nothing = {"metrics_bytes": 0, "histograms_bytes": 0, "frames": 0, "seconds": 0.0, "wandb_id": ""}
        if self.metrics.size:
            self.load_state_dict(nothing)
            self.rewind()

    def _make(self, name: str) -> Logger:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            from torchrl.record.loggers.tensorboard import TensorboardLogger

            logger = TensorboardLogger(exp_name="tensorboard", log_dir=str(self.run_dir))
            if self.purge_step is not None:
                logger.experiment.close()
                logger.experiment = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=self.purge_step)
            return logger
        import wandb
        from torchrl.record.loggers.wandb import WandbLogger

        if not self.wandb_settings["offline"] and not has_wandb_key():
            raise RuntimeError("no key: run `wandb login` or set WANDB_API_KEY, or give logger.offline=true")
        logger = WandbLogger(
            exp_name=self.run_dir.resolve().name,
            id=self.wandb_id or None,
            save_dir=str(self.run_dir),
            log_env_packages=False,
            settings=wandb.Settings(
                init_timeout=WANDB_TIMEOUT,
                finish_timeout=WANDB_TIMEOUT,
                x_disable_meta=True,  # it would record the command line with its secrets; run.json has it without
            ),
            **self.wandb_settings,
        )
        self.wandb_id = logger.experiment.id
        return logger

    def _pass_on(self, frames: int, step: int | None, act: Callable[[str, Any, int], None]) -> None:
        """Let every backend ``act`` at its place; those that wait for their start are made first."""
        at = frames if step is None else step
        self.frames, self.step = max(self.frames, frames), max(self.step, at)
        while self.pending:
            self._guard(self.pending[0], lambda: self.loggers.update({self.pending[0]: self._make(self.pending[0])}))
            self.pending.pop(0)
        for name, logger in list(self.loggers.items()):
            self._guard(name, act, name, logger, at)

    def _guard(self, name: str, action: Callable[..., None], *args: Any) -> None:
        try:
            action(*args)
        except Exception as error:  # noqa: BLE001, third-party loggers may raise anything
            self.loggers.pop(name, None)
            message = f"logger {name} is switched off: {error!r}; metrics.jsonl goes on"
            self._record("logger", message, self.frames, {})
            warnings.warn(message, stacklevel=4)

    def _write_media(self, folder: str, name: str, step: int, suffix: str, content: bytes) -> Path | None:
        path = self.run_dir / folder / f"{name.replace('/', '_')}_{step:09d}.{suffix}"
        try:
            path.parent.mkdir(exist_ok=True)
            write_whole(path, content)
        except OSError as error:
            self._report_disk(f"{path.name} cannot be written ({error.strerror}); it is left out")
            return None
        return path

    def _report_disk(self, message: str) -> None:
        self._record("disk", message, self.frames, {})
        warnings.warn(message, stacklevel=2)

    def _record(self, kind: str, message: str, frames: int, facts: Mapping[str, Any]) -> None:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        self.incidents.write(redact({"time": now, "frames": frames, "kind": kind, "message": message, **facts}))


def has_wandb_key() -> bool:
    """Whether Weights & Biases would find a key, or needs none, without asking a person for it."""
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
        return True
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _place(frames: int, step: int | None) -> dict[str, int]:
    return {"frames": frames} if step in (None, frames) else {"frames": frames, "step": step}


def _show(backend: str, logger: Any, name: str, path: Path, image: Tensor, step: int) -> None:
    if backend == "tensorboard":
        logger.experiment.add_image(name, image.cpu().numpy(), global_step=step, dataformats="HWC")
    else:
        import wandb

        media = wandb.Image(str(path)) if path.suffix == ".png" else wandb.Video(str(path), format="mp4")
        logger.log_metrics({name: media}, step=step)


def _show_histogram(
    backend: str, logger: Any, name: str, values: np.ndarray, counts: np.ndarray, edges: np.ndarray, step: int
) -> None:
    if backend == "tensorboard":
        logger.experiment.add_histogram(name, values, global_step=step, bins=edges)
    else:
        import wandb

        logger.log_metrics({name: wandb.Histogram(np_histogram=(counts, edges))}, step=step)


def write_video(path: Path, frames: Tensor, fps: int) -> None:
    """Write uint8 ``frames`` [T, h, w, 3] as an mp4 file. See :func:`encode_video`."""
    write_whole(path, encode_video(frames, fps))


def encode_video(frames: Tensor, fps: int) -> bytes:
    """Encode uint8 ``frames`` [T, h, w, 3] as H.264 in mp4. Odd sizes are padded by one pixel."""
    import av

    array = _check_images(frames, "[T, h, w, 3]")
    _, height, width, _ = array.shape
    array = np.pad(array, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width, stream.pix_fmt = array.shape[1], array.shape[2], "yuv420p"
        stream.options = {"crf": "18"}
        for image in array:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def encode_image(image: Tensor) -> bytes:
    """Encode a uint8 ``image`` [h, w, 3] as PNG, without loss."""
    import av

    array = _check_images(image, "[h, w, 3]")
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width, codec.pix_fmt, codec.time_base = *array.shape[:2], "rgb24", Fraction(1)
    packets = codec.encode(av.VideoFrame.from_ndarray(array, format="rgb24")) + codec.encode(None)
    return b"".join(bytes(packet) for packet in packets)


def _check_images(images: Tensor, layout: str) -> np.ndarray:
    if images.dtype != torch.uint8 or images.ndim != layout.count(",") + 1 or images.shape[-1] != 3:
        raise ValueError(f"need uint8 {layout}, got {images.dtype} {tuple(images.shape)}")
    return np.ascontiguousarray(images.cpu().numpy())
