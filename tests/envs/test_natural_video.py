"""NaturalVideo: its two sources, the order of frames, seeds, damaged folders."""

import hashlib
import json
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import (
    Compose,
    DTypeCastTransform,
    EnvBase,
    ParallelEnv,
    PermuteTransform,
    SerialEnv,
    TransformedEnv,
    check_env_specs,
)

from envs import Render, make_env
from envs.backends.mock import MockEnv
from envs.transforms import video_sources as sources
from envs.transforms.natural_video import NaturalVideo

SIZE = 8
BACKGROUND = torch.ones(SIZE, SIZE, dtype=torch.bool)
BACKGROUND[2:6, 2:6] = False  # the mock marks the middle as foreground


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache folder of our own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUCID_CACHE", str(folder))
        yield folder


def write_folder(folder: Path, *, size=(SIZE, SIZE), channels=3, counts=(4, 3, 5), splits=("train", "test", "train")):
    """A prepared folder; frame n is uniform with value 10 + n, in red only where there is colour."""
    folder.mkdir()
    frames = np.zeros((sum(counts), *size, channels), dtype=np.uint8)
    frames[..., 0] = 10 + np.arange(sum(counts))[:, None, None]
    np.save(folder / "frames.npy", frames)
    clips = [
        {"name": f"{n}.mp4", "sha256": str(n), "frames": count, "offset": sum(counts[:n]), "split": split}
        for n, (count, split) in enumerate(zip(counts, splits, strict=True))
    ]
    shape = dict(zip(("frames", "height", "width", "channels"), frames.shape, strict=True))
    digest = sources.file_sha256(folder / "frames.npy")
    rewrite(folder, {"format": 1, **shape, "array_sha256": digest, "clips": clips})
    return str(folder)


def rewrite(folder, manifest: dict) -> None:
    manifest["digest"] = sources.manifest_digest(manifest)
    (Path(folder) / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def prepared(tmp_path):
    return write_folder(tmp_path / "video")


def make(seed=0, episode_length=6, size=SIZE, **options) -> TransformedEnv:
    """Steps of one frame; by default with the position of the frame in the observation."""
    video = NaturalVideo(emit_index=True, seed=seed, **options)
    return TransformedEnv(MockEnv(episode_length=episode_length), Compose(Render(size, mask=True), video))


def single(name="natural_video", seed=0, **options):
    options = {"name": name, "emit_index": True, **options}
    return make_env(
        backend="mock", name="counter", task="continuous", frame_skip=2, image_size=SIZE, seed=seed, distraction=options
    )


class ManyImages(EnvBase):
    """1800 environments at once, all background."""

    batch_locked = True

    def __init__(self):
        super().__init__(batch_size=(1800,))
        self.observation_spec = Composite(
            pixels=Bounded(0, 255, (1800, SIZE, SIZE, 3), dtype=torch.uint8),
            mask=Binary(shape=(1800, SIZE, SIZE, 1), dtype=torch.bool),
            shape=(1800,),
        )
        self.action_spec, self.reward_spec = Unbounded((1800, 1)), Unbounded((1800, 1))

    def _reset(self, tensordict, **options):
        return self.observation_spec.zero()

    def _step(self, tensordict):
        ends = dict.fromkeys(("done", "terminated"), torch.zeros(1800, 1, dtype=torch.bool))
        return self.observation_spec.zero().update({"reward": torch.zeros(1800, 1), **ends})

    def _set_seed(self, seed):
        pass


def starts(env, episodes: int) -> list[int]:
    return [int(env.reset()["distractor_index"]) for _ in range(episodes)]


@pytest.mark.parametrize("grayscale", [False, True])
def test_frames_stand_behind_the_foreground(grayscale):
    env = single(grayscale=grayscale)
    check_env_specs(env, break_when_any_done="both")
    data = env.rollout(12, break_when_any_done=False)
    video = sources.make_procedural(seed=0, split="train", size=(SIZE, SIZE), num_frames=1000)
    shown = video[data["next", "distractor_index"][:, 0].numpy()]
    shown = torch.from_numpy(sources.to_grey(shown).repeat(3, -1) if grayscale else shown)
    pixels = data["next", "pixels"]
    assert torch.equal(pixels[:, BACKGROUND], shown[:, BACKGROUND])
    assert pixels[:, 4, 4, 0].tolist() == [2, 4, 6, 8, 10] * 2 + [2, 4]
    assert "mask" not in data


def test_each_step_shows_the_next_frame_and_each_episode_a_new_start():
    data = make(seed=3).rollout(60, break_when_any_done=False)
    shown = data["distractor_index"].view(10, 6)
    assert torch.equal(shown, (shown[:, :1] + torch.arange(6)) % 1000)
    assert torch.equal(data["next", "distractor_index"].view(10, 6), (shown + 1) % 1000)
    assert len(set(shown[:, 0].tolist())) > 5


@pytest.mark.parametrize(
    ("split", "loop", "after"),
    [
        ("train", "all", {0: 1, 1: 2, 2: 3, 3: 7, 7: 8, 8: 9, 9: 10, 10: 11, 11: 0}),
        ("train", "clip", {0: 1, 1: 2, 2: 3, 3: 0, 7: 8, 8: 9, 9: 10, 10: 11, 11: 7}),
        ("test", "all", {4: 5, 5: 6, 6: 4}),
    ],
)
def test_order_of_the_clips_of_a_split(prepared, split, loop, after):
    env = make(source=prepared, split=split, loop=loop)
    data = env.rollout(120, break_when_any_done=False)
    now, later = data["distractor_index"][:, 0].tolist(), data["next", "distractor_index"][:, 0].tolist()
    assert dict(zip(now, later, strict=True)) == after
    assert (data["pixels"][:, 0, 0] == torch.tensor([[10 + n, 0, 0] for n in now])).all()


def test_starts_are_uniform(prepared):
    def frames(**options):
        transform = NaturalVideo(source=prepared, **options)
        shown = TransformedEnv(ManyImages(), transform).reset()["pixels"][:, 0, 0, 0]
        return np.bincount(shown.numpy() - 10, minlength=12)

    everywhere, within = frames(), frames(loop="clip")
    assert (everywhere[4:7] == 0).all() and abs(everywhere[[0, 1, 2, 3, 7, 8, 9, 10, 11]] - 200).max() < 60
    assert abs(within[:4].sum() - 900) < 110 and abs(within[:4] - 225).max() < 65 and abs(within[7:] - 180).max() < 60


def test_seeds():
    first, again, other = single(seed=1), single(seed=1), single(seed=2)
    assert starts(first, 5) == starts(again, 5) != starts(other, 5)
    first.set_seed(7)
    once = starts(first, 3)
    first.set_seed(7)
    assert starts(first, 3) == once


def test_global_random_numbers_stay_untouched():
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    env = make(num_frames=30, source_seed=99)
    tensordict = env.reset()
    env.step(tensordict.set("action", torch.zeros(2)))
    assert (np.random.get_state()[1] == before[0]).all() and torch.equal(torch.get_rng_state(), before[1])


def test_nothing_else_changes():
    plain = make_env(backend="mock", name="reach", task="continuous", image_size=SIZE, seed=3, pixels_only=False)
    options = {"name": "natural_video"}
    other = make_env(
        backend="mock", name="reach", task="continuous", image_size=SIZE, seed=3, pixels_only=False, distraction=options
    )
    actions = torch.linspace(-1, 1, 8)
    for env_actions in (actions, actions.flip(0)):
        one, two = plain.reset(), other.reset()
        for action in env_actions:
            one, two = (env.step(td.set("action", action[None])) for env, td in ((plain, one), (other, two)))
            for key in ("observation", "reward", "done", "terminated"):
                assert torch.equal(one["next", key], two["next", key]), key
            assert torch.equal(one["next", "pixels"][~BACKGROUND], two["next", "pixels"][~BACKGROUND])
            assert not torch.equal(one["next", "pixels"], two["next", "pixels"])
            one, two = one["next"].exclude("reward"), two["next"].exclude("reward")


def masked_mock(episode_length: int) -> TransformedEnv:
    return TransformedEnv(MockEnv(episode_length=episode_length), Render(SIZE, mask=True))


def test_outside_of_a_batched_environment():
    base = SerialEnv(2, [partial(masked_mock, 3), partial(masked_mock, 4)])
    env = TransformedEnv(base, NaturalVideo(emit_index=True, seed=5))
    check_env_specs(env)
    data = env.rollout(24, break_when_any_done=False)  # [2, 24]
    for row, length in enumerate((3, 4)):
        shown = data["distractor_index"][row, :, 0].view(-1, length)
        assert torch.equal(shown, (shown[:, :1] + torch.arange(length)) % 1000)
        assert len(set(shown[:, 0].tolist())) > 3
    video = sources.make_procedural(seed=0, split="train", size=(SIZE, SIZE), num_frames=1000)
    shown = torch.from_numpy(video[data["distractor_index"][..., 0].numpy()])  # [2, 24, h, w, 3]
    assert torch.equal(data["pixels"][:, :, BACKGROUND], shown[:, :, BACKGROUND])
    assert data["pixels"][0, :, 4, 4, 0].tolist() == [0, 1, 2] * 8


def test_partial_reset_keeps_the_rows_that_go_on():
    env = TransformedEnv(SerialEnv(2, partial(masked_mock, 9)), NaturalVideo(emit_index=True, seed=6))
    data = env.step(env.reset().set("action", torch.zeros(2, 2)))
    arrived = env.step_mdp(data)
    before = arrived["distractor_index"].clone(), arrived["pixels"].clone()
    rest = env.reset(arrived.set("_reset", torch.tensor([[True], [False]])))
    assert rest["distractor_index"][1] == before[0][1] and torch.equal(rest["pixels"][1], before[1][1])
    assert rest["distractor_index"][0] != before[0][0]
    later = env.step(rest.set("action", torch.zeros(2, 2)))["next", "distractor_index"]
    assert torch.equal(later, (rest["distractor_index"] + 1) % 1000)


def test_batch_that_was_never_reset():
    env = TransformedEnv(SerialEnv(2, partial(masked_mock, 9)), NaturalVideo())
    with pytest.raises(RuntimeError, match=r"reset the \[2\] environments"):
        env.step(env.base_env.reset().set("action", torch.zeros(2, 2)))


@pytest.mark.slow
def test_processes_show_the_same_as_one(prepared):
    factories = [partial(single, source=prepared, seed=seed) for seed in (1, 2)]
    parallel = ParallelEnv(1, factories[1:], mp_start_method="spawn")
    serial = SerialEnv(2, factories)
    try:
        elsewhere, here = (env.rollout(12, break_when_any_done=False) for env in (parallel, serial))
        for key in ("distractor_index", "pixels"):
            assert torch.equal(elsewhere[key], here[key][1:])
    finally:
        parallel.close()
        serial.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("grayscale", [False, True])
def test_on_a_gpu(grayscale):
    envs = [
        TransformedEnv(SerialEnv(2, partial(masked_mock, 4), device=device), NaturalVideo(grayscale=grayscale))
        for device in ("cpu", "cuda")
    ]
    one, two = (env.rollout(9, break_when_any_done=False)["pixels"] for env in envs)
    assert two.device.type == "cuda" and torch.equal(one, two.cpu())


def test_state_and_pickle():
    env = make(seed=4)
    env.rollout(3)
    state = env.state_dict()
    copies = [make(seed=9), make(seed=9)]
    copies[0].load_state_dict(state)
    copies[1].transform.load_state_dict(pickle.loads(pickle.dumps(env.transform)).state_dict())
    assert len(pickle.dumps(env.transform[1].clone())) < 20_000
    frames = [one.step(one.base_env.reset().set("action", torch.zeros(2)))["next"] for one in (env, *copies)]
    assert len({int(frame["distractor_index"]) for frame in frames}) == 1
    resets = [one.reset()["pixels"] for one in (env, *copies)]
    assert torch.equal(resets[0], resets[1]) and torch.equal(resets[0], resets[2])


def test_clones_draw_on_their_own():
    transform = NaturalVideo(seed=1, num_frames=500, emit_index=True)
    one, two = (TransformedEnv(MockEnv(), Compose(Render(SIZE, mask=True), transform.clone())) for _ in range(2))
    assert starts(one, 4) == starts(two, 4)


def test_mask_by_colour():
    pixels = torch.zeros(1, SIZE, SIZE, 3, dtype=torch.uint8)
    pixels[..., 2] = 200  # blue is background
    pixels[:, :4] = 90
    env = single(mask="chroma", emit_mask=True)
    check_env_specs(env)
    env = make(mask="chroma")
    data = env.reset()
    shown = sources.make_procedural(seed=0, split="train", size=(SIZE, SIZE), num_frames=1000)
    video = env.transform[1]
    video._show(video._video, data, pixels[0], None)
    assert torch.equal(data["pixels"][:4], pixels[0, :4])
    assert torch.equal(data["pixels"][4:], torch.from_numpy(shown[int(data["distractor_index"])])[4:])


def test_number_of_frames(prepared):
    seen = set(starts(make(source=prepared, num_frames=6), 100))
    assert seen == {0, 1, 2, 3, 7, 8}
    with pytest.raises(ValueError, match="num_frames=10: the split has 9"):
        NaturalVideo(source=prepared, num_frames=10)


def test_description(prepared):
    video = NaturalVideo(source=prepared)
    digest = sources.file_sha256(Path(prepared) / "frames.npy")
    assert video.describe() == {"source": prepared, "split": "train", "clips": 2, "frames": 9, "sha256": digest}
    env = make()
    with pytest.raises(ValueError, match="reset the environment"):
        NaturalVideo().describe()
    env.reset()
    assert env.transform[1].describe()["source"] == "procedural 1, seed 0"


def test_procedural_frames():
    def digest(**options):
        settings = {"seed": 0, "split": "train", "size": (16, 20), "num_frames": 150, **options}
        return hashlib.sha256(sources.make_procedural(**settings).tobytes()).hexdigest()[:16]

    assert digest() == "e6acd0b6e852e5d4"
    assert len({digest(), digest(seed=1), digest(split="test"), digest(size=(20, 16))}) == 4
    long, short = (sources.make_procedural(seed=3, split="test", size=(9, 7), num_frames=n) for n in (130, 110))
    assert np.array_equal(long[:110], short)
    steps = np.abs(np.diff(long.astype(int), axis=0)).mean((1, 2, 3))
    assert steps[99] > 2 * np.delete(steps, 99).mean() > 0, "frames of a clip are more alike than two clips"


def test_splits_share_no_picture():
    train, test = (
        sources.make_procedural(seed=0, split=split, size=(8, 8), num_frames=300) for split in sources.SPLITS
    )
    assert not {frame.tobytes() for frame in train} & {frame.tobytes() for frame in test}


def test_procedural_frames_are_kept(cache, monkeypatch):
    options = {"seed": 12, "size": (8, 8), "num_frames": 20}
    frames = sources.open_procedural(**options).frames
    (path,) = (cache / "video").glob("procedural-*-12-*.npy")
    monkeypatch.setattr(sources, "make_procedural", None)
    assert np.array_equal(sources.open_procedural(**options).frames, frames)
    assert not frames.flags.writeable
    monkeypatch.undo()
    monkeypatch.setenv("LUCID_CACHE", str(cache))
    frames = frames.copy()
    path.write_bytes(path.read_bytes()[:500])  # a disk that was full
    assert np.array_equal(sources.open_procedural(**options).frames, frames)
    assert not list(cache.rglob("*.tmp"))


def test_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LUCID_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="set LUCID_CACHE"):
        video = sources.open_procedural(size=(8, 8), num_frames=5)
    assert video.frames.shape == (5, 8, 8, 3)


def change(folder, key, value, *, seal=True):
    manifest = json.loads((Path(folder) / "manifest.json").read_text())
    target = manifest["clips"][1] if key in sources.CLIP_KEYS and key != "frames" else manifest
    target[key] = value
    if seal:
        rewrite(folder, manifest)
    else:
        (Path(folder) / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), r"no manifest.json there; make one with"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "not a manifest"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe"), "not a manifest"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "not a manifest"),
        (lambda folder: change(folder, "split", "train", seal=False), "was changed after it was written"),
        (lambda folder: change(folder, "format", 2), "format 2 instead of 1"),
        (lambda folder: change(folder, "offset", 3), "clips do not follow each other"),
        (lambda folder: change(folder, "split", "dev"), "entries of a clip"),
        (lambda folder: change(folder, "frames", 11), "frames of the clips and of the whole differ"),
        (lambda folder: change(folder, "height", -8), "a size or count below 1"),
        (lambda folder: change(folder, "width", 9), r"uint8 \[12, 8, 8, 3\] instead of uint8 \[12, 8, 9, 3\]"),
        (lambda folder: (folder / "frames.npy").unlink(), r"frames.npy: not a whole array"),
        (lambda folder: (folder / "frames.npy").write_bytes(b""), r"frames.npy: not a whole array"),
        (lambda folder: (folder / "frames.npy").write_bytes(b"PK\x03\x04"), r"frames.npy: not a whole array"),
        (
            lambda folder: (folder / "frames.npy").write_bytes((folder / "frames.npy").read_bytes()[:-9]),
            r"frames.npy: not a whole array",
        ),
        (lambda folder: np.save(folder / "frames.npy", np.zeros((12, 8, 8, 3))), r"float64 .* instead of uint8"),
        (
            lambda folder: np.save(folder / "frames.npy", np.zeros((12, 8, 8, 3), dtype=np.uint8, order="F")),
            "Fortran order",
        ),
    ],
)
def test_damaged_folders(prepared, damage, message):
    damage(Path(prepared))
    with pytest.raises(ValueError, match=message):
        NaturalVideo(source=prepared)


def test_changed_bytes_are_found_on_request(prepared):
    sources.check_folder(prepared)
    path = Path(prepared) / "frames.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    NaturalVideo(source=prepared)
    with pytest.raises(ValueError, match="not the frames that the manifest describes"):
        sources.check_folder(prepared)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "valid"}, "split='valid': choose one of test, train"),
        ({"loop": "none"}, "loop='none': choose one of all, clip"),
        ({"mask": "sam"}, "mask='sam': choose one of"),
        ({"source": "/nowhere"}, "source='/nowhere': no manifest.json there"),
    ],
)
def test_options_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        NaturalVideo(**options)


@pytest.mark.parametrize(("options", "message"), [({"num_frames": 0}, "num_frames=0"), ({"source_seed": -1}, "=-1")])
def test_numbers_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options).reset()


def test_frames_that_do_not_fit(tmp_path):
    folder = write_folder(tmp_path / "video")
    with pytest.raises(ValueError, match=r"frames of 8x8 pixels for image_size 16x16; prepare .* --size 16 16"):
        make(source=folder, size=16).reset()
    grey = write_folder(tmp_path / "grey", channels=1, splits=("train",) * 3)
    with pytest.raises(ValueError, match=r"grayscale=False: .* holds grey frames"):
        NaturalVideo(source=grey)
    with pytest.raises(ValueError, match=r"split='test': .* has no clips in it"):
        NaturalVideo(source=grey, split="test", grayscale=True)
    pixels = make(source=grey, grayscale=True).reset()["pixels"]
    assert (pixels[0, 0] == pixels[0, 0, 0]).all() and pixels[0, 0, 0] >= 10


def test_environments_without_images_or_mask():
    with pytest.raises(KeyError, match=r"'mask', which is missing: put Render\(mask=True\)"):
        TransformedEnv(MockEnv(), Compose(Render(SIZE), NaturalVideo())).reset()
    with pytest.raises(KeyError, match="'pixels', which is missing"):
        TransformedEnv(MockEnv(), NaturalVideo()).reset()
    chain = Compose(Render(SIZE, mask=True), PermuteTransform([-1, -3, -2], in_keys=["pixels"]), NaturalVideo())
    with pytest.raises(ValueError, match=r"pixels of torch.uint8 \[3, 8, 8\]: NaturalVideo reads uint8 \[h, w, 3\]"):
        TransformedEnv(MockEnv(), chain).reset()
    chain = Compose(Render(SIZE, mask=True), DTypeCastTransform(torch.bool, torch.uint8, in_keys=["mask"]))
    chain.append(NaturalVideo())
    with pytest.raises(ValueError, match=r"mask of torch.uint8: NaturalVideo reads a bool mask"):
        TransformedEnv(MockEnv(), chain).reset()
