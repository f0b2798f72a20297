"""Decodes video files in another process, with limits on memory, time, frames and resolution.

`Decoder` is the side that asks; `python scripts/video_decoder.py` is the process that decodes.
"""

import contextlib
import json
import os
import re
import resource
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg,m4v"  # none opens other files
DECODERS = (
    "h264,hevc,vp8,vp9,libvpx,libvpx-vp9,libdav1d,av1,mpeg4,mpeg1video,mpeg2video,mjpeg,"
    "h263,flv,msmpeg4,msmpeg4v2,wmv1,wmv2,wmv3,vc1,theora"
)
MIB = 1 << 20


class Limits(NamedTuple):
    """What the decoding of one file may take."""

    frames: int = 1000
    pixels: int = 4096 * 2304  # of a frame in the file
    seconds: int = 120  # of CPU time, and twice that by the clock
    memory: int = 2048 * MIB  # address space in bytes


class DecodingError(Exception):
    """A file that is no usable video; the message says why in one line."""


class Decoder:
    """Decodes files in a process of its own, which may crash, hang or eat memory without harm to this one.

    Args:
        size: height and width of the frames in pixels.
        limits: for each file.
        command: starts the process; for tests.
    """

    def __init__(self, size: tuple[int, int], limits: Limits, command: Sequence[str] | None = None):
        self.size, self.limits = size, limits
        self._command = list(command or [sys.executable, str(Path(__file__).resolve())])
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def decode(self, path: Path, raw: Path) -> int:
        """Writes the frames of a video.

        Args:
            path: local file.
            raw: file to write, uint8 `[frames, h, w, 3]` without a header.

        Returns:
            Number of frames, at least 1.

        Raises:
            DecodingError: the file is not a video that can be decoded within the limits.
        """
        check_local_file(path)
        process = self._running()
        job = {"path": str(path.resolve()), "raw": str(raw), "size": self.size, "limits": self.limits}
        try:
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
            answer = self._answer(process)
        except (BrokenPipeError, json.JSONDecodeError):
            answer = None
        if answer is None:
            status = self._stop()
            raise DecodingError(f"the decoder {status}")
        if "error" in answer:
            raise DecodingError(one_line(str(answer["error"])))
        expected = int(answer["frames"]) * self.size[0] * self.size[1] * 3
        if expected < 1 or raw.stat().st_size != expected:
            raise DecodingError("the decoder wrote an incomplete file")
        return int(answer["frames"])

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._stop()
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        return self._process

    def _answer(self, process: subprocess.Popen[bytes]) -> dict[str, Any] | None:
        """One line of JSON; None if the process ends, takes too long or talks nonsense."""
        end, line = time.monotonic() + 2 * self.limits.seconds, b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
            part = os.read(process.stdout.fileno(), 65536) if ready else b""
            if not part or len(line) > MIB:
                return None
            line += part
        answer = json.loads(line)
        return answer if isinstance(answer, dict) else None

    def _stop(self) -> str:
        """Ends the process and says how it came to an end."""
        process, self._process = self._process, None
        if process is None:
            return "was not running"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
        status = process.poll()
        if status is None:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        if status is None:
            return f"took more than {2 * self.limits.seconds} s and was stopped"
        return f"crashed (exit status {status}, a negative one is a signal)"


def check_local_file(path: Path) -> None:
    """Checks that a path is that of an ordinary local file.

    Raises:
        DecodingError: it is an address, a pipe, a device, a folder, or there is no such file.
    """
    if not path.exists():
        address = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", str(path))
        raise DecodingError("an address; download it and give the local file" if address else "no such file")
    if not path.is_file():
        raise DecodingError("not an ordinary file")
    if not path.stat().st_size:
        raise DecodingError("an empty file")


def one_line(text: str, length: int = 200) -> str:
    """A text without line breaks and control characters, cut to a length."""
    return "".join(character if character.isprintable() else " " for character in text)[:length].strip()


def work() -> None:
    """The decoding process: a job as a line of JSON on stdin, an answer as a line of JSON on stdout."""
    import av

    av.logging.set_level(av.logging.PANIC)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints is no answer
    for line in sys.stdin.buffer:
        job = json.loads(line)
        limits = Limits(*job["limits"])
        set_limits(limits, job["size"])
        try:
            answer: dict[str, Any] = {"frames": decode_here(Path(job["path"]), Path(job["raw"]), job["size"], limits)}
        except av.error.FFmpegError as error:
            log = f" ({error.log[2].strip()})" if error.log else ""
            answer = {"error": f"{error.strerror}{log}"}
        except Exception as error:  # noqa: BLE001  whatever is wrong with a file, the next one gets its turn
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer).encode() + b"\n")


def set_limits(limits: Limits, size: Sequence[int]) -> None:
    """Limits this process for the file that comes next."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + limits.seconds
    written = (limits.frames + 1) * size[0] * size[1] * 3
    for kind, value in (
        (resource.RLIMIT_AS, limits.memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, written),
        (resource.RLIMIT_NOFILE, 32),
    ):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def decode_here(path: Path, raw: Path, size: Sequence[int], limits: Limits) -> int:
    """Decodes a file in this process and writes its frames, scaled by averaging over areas.

    Args:
        path: local file.
        raw: file to write, uint8 `[frames, h, w, 3]`.
        size: height and width in pixels.
        limits: of frames and resolution.

    Returns:
        Number of frames.

    Raises:
        ValueError: there is no video in it, or its frames are too large.
        av.error.FFmpegError: it cannot be decoded.
    """
    import av

    container_options = {
        "protocol_whitelist": "none",  # a file that refers to others does not get them
        "format_whitelist": DEMUXERS,
        "codec_whitelist": DECODERS,
        "max_streams": "32",
        "probesize": str(5 * MIB),
    }
    count = 0
    with (
        path.open("rb") as file,
        raw.open("wb") as output,
        av.open(file, mode="r", container_options=container_options, metadata_errors="replace") as container,
    ):
        if not container.streams.video:
            raise ValueError("no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise ValueError("no decoder for its video stream")
        check_resolution(stream.codec_context.width, stream.codec_context.height, limits)
        stream.codec_context.thread_count = 1  # threads reserve address space, which is limited
        stream.codec_context.options = {"max_pixels": str(limits.pixels), "codec_whitelist": DECODERS}
        for frame in container.decode(stream):
            check_resolution(frame.width, frame.height, limits)
            whole = frame.reformat(format="rgb24")  # first, since averages of subsampled colours are shifted
            image = whole.to_ndarray(height=size[0], width=size[1], interpolation="AREA")  # [h, w, 3]
            output.write(np.ascontiguousarray(image).tobytes())
            count += 1
            if count == limits.frames:
                break
    if not count:
        raise ValueError("no video frames")
    return count


def check_resolution(width: int, height: int, limits: Limits) -> None:
    """Raises `ValueError` for frames that are too large."""
    if width * height > limits.pixels:
        raise ValueError(f"frames of {width}x{height} pixels, at most {limits.pixels} in all: scale it down first")


if __name__ == "__main__":
    work()
