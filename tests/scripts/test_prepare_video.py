"""The script that turns video files into frames: what it keeps, what it leaves out, what it survives."""

import json
import re
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

import envs  # noqa: F401  chooses MuJoCo's renderer before the script imports it
from envs.transforms import video_sources as sources
from envs.transforms.natural_video import NaturalVideo

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.append(str(SCRIPTS))

import prepare_video as script  # noqa: E402
import video_decoder as decoder  # noqa: E402

CODECS = {"mp4": "libx264", "mkv": "libvpx-vp9", "avi": "mjpeg", "mpg": "mpeg2video", "webm": "libvpx", "mov": "mpeg4"}


def write_clip(
    path: Path, *, frames: int = 6, codec: str | None = None, level: int | None = None, seed: int = 0
) -> Path:
    """A video of 48x32 pixels: coloured squares that move, or a uniform grey of one level."""
    codec = codec or CODECS[path.suffix[1:]]
    squares = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = squares.shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for index in range(frames):
            image = np.roll(squares, 3 * index, 1) if level is None else np.full_like(squares, level)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[Path]:
    """One clip of each kind of file."""
    folder = tmp_path_factory.mktemp("clips")
    return [write_clip(folder / f"clip.{kind}", seed=seed) for seed, kind in enumerate(CODECS)]


@pytest.fixture
def hostile(tmp_path) -> list[Path]:
    """Files that are no videos, or that ask for other files."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    secret = folder / "secret.mp4"
    write_clip(secret)
    contents = {
        "empty.mp4": b"",
        "text.mp4": b"not a video\n" * 100,
        "noise.mp4": np.random.default_rng(0).bytes(20_000),
        "picture.mp4": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n".encode(),
        "concat.mp4": b"ffconcat version 1.0\nfile secret.mp4\n",
        "sound.mp4": b"RIFF\x24\x00\x00\x00WAVEfmt ",
        "evil\nname.mp4": b"x",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    secret.rename(tmp_path / "secret.mp4")
    (folder / "secret.mp4").symlink_to("/dev/zero")
    return sorted(folder.iterdir())


def lines(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_folder_of_clips(clips, tmp_path, capsys):
    out = tmp_path / "data" / "video"
    script.main([*map(str, clips), str(clips[0]), "--out", str(out), "--size", "16", "24", "--test-share", "0.3"])
    said = lines(capsys)
    assert [line.endswith(": 6 frames") for line in said] == [True] * 6 + [False, False]
    assert "the same file as" in said[6] and said[7].endswith("6 clips, 4 to train and 2 to test")
    assert [path.name for path in out.parent.iterdir()] == ["video"], "nothing is left over"
    frames, manifest = np.load(out / "frames.npy"), json.loads((out / "manifest.json").read_text())
    assert (frames.shape, frames.dtype) == ((36, 16, 24, 3), np.uint8)
    assert [clip["name"] for clip in manifest["clips"]] == [path.name for path in clips]
    assert [clip["sha256"] for clip in manifest["clips"]] == [sources.file_sha256(path) for path in clips]
    split = {name: NaturalVideo(source=str(out), split=name).describe() for name in sources.SPLITS}
    assert (split["train"]["frames"], split["test"]["frames"]) == (24, 12)
    script.main(["--check", str(out)])
    assert lines(capsys) == [f"{out}: whole"]
    (out / "frames.npy").write_bytes(b"?")
    with pytest.raises(SystemExit, match="not the frames"):
        script.main(["--check", str(out)])


def test_frames_are_those_of_the_clip(clips, tmp_path):
    script.main([str(clips[0]), "--out", str(tmp_path / "a"), "--size", "8", "12"])
    script.main([str(clips[0]), "--out", str(tmp_path / "grey"), "--size", "8", "12", "--gray", "--max-frames", "4"])
    colour, grey = (np.load(tmp_path / name / "frames.npy") for name in ("a", "grey"))
    with av.open(str(clips[0])) as container:
        whole = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])  # [6, 32, 48, 3]
    means = whole.reshape(6, 8, 4, 12, 4, 3).mean((2, 4))
    assert np.abs(colour - means).mean() < 1 and np.abs(colour[1:] - means[:-1]).mean() > 10
    assert grey.shape == (4, 8, 12, 1) and np.array_equal(grey, sources.to_grey(colour[:4]))
    assert len(sources.open_folder(tmp_path / "a").clips) == 1, "a single clip is for training"


@pytest.mark.parametrize("level", [0, 255])
def test_levels_keep_their_range(tmp_path, level):
    clip = write_clip(tmp_path / "clip.mp4", level=level)
    script.prepare([clip], tmp_path / "out", size=(8, 8), test_share=0)
    assert np.abs(np.load(tmp_path / "out" / "frames.npy").astype(int) - level).max() <= 2


def test_split_does_not_depend_on_the_order():
    clips = [script.Clip(Path(f"{n}.mp4"), Path("raw"), 5, f"{n * 37 % 11}") for n in range(10)]
    assert script.choose_test(clips, 0.2) == script.choose_test(clips[::-1], 0.2)
    assert [len(script.choose_test(clips, share)) for share in (0, 0.01, 0.25, 0.99, 1)] == [0, 1, 2, 9, 10]
    assert [len(script.choose_test(clips[:1], share)) for share in (0, 0.5, 1)] == [0, 0, 1]


def test_bad_files_are_named_and_left_out(clips, hostile, tmp_path, capsys):
    out = tmp_path / "out"
    paths = [*hostile, Path("https://example.org/a.mp4"), Path("/no/such.mp4"), tmp_path, clips[0]]
    script.main([*map(str, paths), "--out", str(out), "--size", "8"])
    said = lines(capsys)
    assert len(said) == len(paths) + 1
    assert all(": left out: " in line for line in said[: len(paths) - 1])
    for part in ("an empty file", "Format not on whitelist", "an address", "no such file", "not an ordinary file"):
        assert any(part in line for line in said), part
    assert len(np.load(out / "frames.npy")) == 6


def test_strict_stops_and_leaves_nothing(clips, hostile, tmp_path):
    out = tmp_path / "strict" / "out"
    with pytest.raises(SystemExit, match=r"text.mp4: Invalid data"):
        script.main([str(clips[0]), str(hostile[0].parent / "text.mp4"), "--out", str(out), "--strict"])
    with pytest.raises(SystemExit, match="no video among the 1 files"):
        script.main([str(hostile[0]), "--out", str(out)])
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x"], "give video files and --out"),
        (["a.mp4"], "give video files and --out"),
        (["a.mp4", "--out", "x", "--size", "0"], "--size"),
        (["a.mp4", "--out", "x", "--size", "1", "2", "3"], "--size"),
        (["a.mp4", "--out", "x", "--test-share", "1.5"], "--test-share 1.5: between 0 and 1"),
        (["a.mp4", "--out", "x", "--max-frames", "0"], "--max-frames 0: at least 1"),
    ],
)
def test_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert message in capsys.readouterr().err


def test_existing_folders_stay(clips, tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit, match="there is something already"):
        script.main([str(clips[0]), "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_limits(clips, tmp_path):
    def decode(**limits) -> int:
        with decoder.Decoder((8, 8), decoder.Limits(**limits)) as process:
            return process.decode(clips[0], tmp_path / "raw")

    assert decode(frames=4) == 4
    with pytest.raises(decoder.DecodingError, match="48x32 pixels, at most 1000 in all"):
        decode(pixels=1000)
    with pytest.raises(decoder.DecodingError):  # an error of the library or the end of the process
        decode(memory=1 << 20)


FAKE = """
import json, os, sys, time
for line in sys.stdin:
    job = json.loads(line)
    name = os.path.basename(job["path"])
    if name == "crash.mp4": os.abort()
    if name == "hang.mp4": time.sleep(1000)
    if name == "exit.mp4": sys.exit(3)
    if name == "talk.mp4": print("hello", flush=True); continue
    if name == "list.mp4": print("[]", flush=True); continue
    open(job["raw"], "wb").write(bytes(8 * 8 * 3 - (name == "short.mp4")))
    print(json.dumps({"frames": 1}), flush=True)
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("crash", r"crashed \(exit status -6"),
        ("hang", r"took more than 2 s"),
        ("exit", r"crashed \(exit status 3"),
        ("talk", "the decoder"),
        ("list", "the decoder"),
        ("short", "an incomplete file"),
    ],
)
def test_decoder_that_dies(tmp_path, name, message):
    bad, good = (tmp_path / f"{stem}.mp4" for stem in (name, "good"))
    for path in (bad, good):
        path.write_bytes(b"x")
    limits = decoder.Limits(seconds=1)
    with decoder.Decoder((8, 8), limits, [sys.executable, "-I", "-S", "-c", FAKE]) as process:
        assert process.decode(good, tmp_path / "raw") == 1
        with pytest.raises(decoder.DecodingError, match=message):
            process.decode(bad, tmp_path / "raw")
        assert process.decode(good, tmp_path / "raw") == 1
        pid = process._process.pid
    assert not Path(f"/proc/{pid}").exists()


def test_command_line():
    command = [sys.executable, str(SCRIPTS / "prepare_video.py"), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--test-share" in text


def mutate(content: bytes, random: np.random.Generator) -> bytes:
    """Cuts, flips bytes, repeats or removes a stretch, or overwrites a length field with an extreme value."""
    data, kind = bytearray(content), random.integers(5)
    at = int(random.integers(len(data)))
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        for place in random.integers(len(data), size=int(random.integers(1, 60))):
            data[place] = random.integers(256)
    elif kind == 2:
        data[at:at] = data[at : at + int(random.integers(1, 400))] * int(random.integers(1, 4))
    elif kind == 3:
        del data[at : at + int(random.integers(1, 400))]
    else:
        at = min(at, 300)
        data[at : at + 4] = [b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff"][random.integers(3)]
    return bytes(data)


def test_two_hundred_damaged_clips(clips, tmp_path, capsys):
    random, folder = np.random.default_rng(0), tmp_path / "damaged"
    folder.mkdir()
    contents = [path.read_bytes() for path in clips]
    paths = []
    for number in range(200):
        kind = number % len(clips)
        paths.append(folder / f"{number}{clips[kind].suffix}")
        paths[-1].write_bytes(mutate(contents[kind], random))
    out = tmp_path / "out"
    script.prepare([*paths, clips[0]], out, size=(8, 8), limits=decoder.Limits(frames=20, seconds=5))
    said = lines(capsys)
    assert len(said) == 202
    kept = [line for line in said[:-1] if re.search(r": \d+ frames$", line)]
    assert len(kept) + sum(": left out: " in line for line in said) == 201
    assert 20 < len(kept) < 190, "the damage is neither harmless nor fatal throughout"
    for split in sources.SPLITS:
        NaturalVideo(source=str(out), split=split)
    sources.check_folder(out)
