"""SAM 3: what goes in, what comes out, which weights, which messages."""

import json
import pickle
import shutil
import sys

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from envs.segmentation import sam3 as sam3_module
from envs.segmentation import sam3_weights
from envs.segmentation.protocol import Segmenter
from envs.segmentation.sam3 import Sam3
from envs.segmentation.sam3_images import compute_pixel_values
from scripts.make_tiny_sam3 import COLOURS, draw_shapes, make_config, make_model, save_model

PROMPTS = ("walker robot", "red ball")


@pytest.fixture(scope="module")
def frames():
    return torch.randint(0, 256, (5, 24, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def segmenter(random_folder):
    return Sam3(PROMPTS, str(random_folder), image_size=None, threshold=0.0)


def test_protocol_and_shapes(segmenter, frames):
    assert isinstance(segmenter, Segmenter) and segmenter.concepts == PROMPTS
    masks, presence = segmenter.masks_and_presence(frames)
    assert masks.shape == (5, 24, 20, 2) and masks.dtype == torch.uint8 and masks.float().mean() > 0
    assert presence.shape == (5, 2) and ((presence > 0) & (presence < 1)).all()
    masks[0] = 0  # an ordinary tensor, which may be written to


def test_no_frames_need_no_weights(random_folder):
    segmenter = Sam3("robot", str(random_folder), image_size=None)
    masks, presence = segmenter.masks_and_presence(torch.zeros(0, 8, 9, 3, dtype=torch.uint8))
    assert masks.shape == (0, 8, 9, 1) and presence.shape == (0, 1) and presence.dtype == torch.float32
    assert segmenter._loaded is None


def test_each_frame_on_its_own(segmenter, random_folder, frames):
    masks, presence = segmenter.masks_and_presence(frames)
    ones = [segmenter.masks_and_presence(frame[None]) for frame in frames]
    assert (torch.cat([mask for mask, _ in ones]).int() - masks.int()).abs().max() <= 1
    torch.testing.assert_close(torch.cat([share for _, share in ones]), presence, atol=1e-5, rtol=0)
    chunks = Sam3(PROMPTS, str(random_folder), image_size=None, threshold=0.0, max_batch=2)
    assert (chunks(frames).int() - masks.int()).abs().max() <= 1


def test_both_layouts_have_the_same_weights_and_masks(segmenter, random_model, frames, tmp_path):
    save_model(random_model, tmp_path, "video")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "sam3_video"
    names = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("detector_model.") for name in names), "not the layout of the hub"
    video = Sam3(PROMPTS, str(tmp_path), image_size=None, threshold=0.0)
    assert torch.equal(video(frames), segmenter(frames))
    assert video._loaded is not None
    state = video._loaded.model.state_dict()
    assert state and all(torch.equal(value, random_model.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize("layout", ["image", "video"])
def test_names_of_older_checkpoints(layout, segmenter, random_model, frames, tmp_path):
    path = save_model(random_model, tmp_path, layout) / "model.safetensors"
    names = {
        name.replace("text_encoder.text_model.", "text_encoder."): value for name, value in load_file(path).items()
    }
    save_file(names, path, metadata={"format": "pt"})
    older = Sam3(PROMPTS, str(tmp_path), image_size=None, threshold=0.0)
    assert torch.equal(older(frames), segmenter(frames))


def test_lite_text(tmp_path, frames):
    save_model(make_model(make_config(lite=True)), tmp_path)
    masks = Sam3(PROMPTS, str(tmp_path), image_size=28, threshold=0.0)(frames)
    assert masks.shape == (5, 24, 20, 2) and masks.float().mean() > 0


@pytest.mark.parametrize("mode", ["instance", "semantic"])
@pytest.mark.parametrize("size", [28, 84])
def test_other_sizes_and_modes(size, mode, random_folder, frames):
    segmenter = Sam3("robot", str(random_folder), image_size=size, mode=mode, threshold=0.0)
    assert segmenter.image_size == size and segmenter(frames[:2]).shape == (2, 24, 20, 1)


def test_bfloat16(segmenter, random_folder, frames):
    half = Sam3(PROMPTS, str(random_folder), image_size=None, threshold=0.0, dtype="bfloat16")
    masks = half(frames)
    assert half._loaded is not None and half._loaded.model.dtype == torch.bfloat16
    assert (masks.int() - segmenter(frames).int()).abs().float().mean() < 4
    assert half.version == segmenter.version


def test_text_encoder_is_gone(segmenter):
    segmenter.load()
    assert not [name for name, _ in segmenter._loaded.model.named_parameters() if name.startswith("text_encoder")]


def test_loading_and_marking_leave_the_random_numbers_alone(random_folder, frames):
    before = torch.get_rng_state()
    Sam3("robot", str(random_folder), image_size=None)(frames)
    assert torch.equal(torch.get_rng_state(), before)


def test_pickle_is_small_and_works(segmenter, frames):
    masks = segmenter(frames)
    data = pickle.dumps(segmenter)
    copy = pickle.loads(data)
    assert len(data) < 2000
    assert copy.version == segmenter.version and torch.equal(copy(frames), masks)


def test_version_changes_with_all_that_changes_masks(segmenter, random_folder, random_model, tmp_path):
    folder = str(random_folder)
    changes = [
        {"concepts": ("walker robot", "ball")},
        {"concepts": PROMPTS[::-1]},
        {"image_size": 84},
        {"mode": "semantic"},
        {"threshold": 0.1},
    ]
    base = {"concepts": PROMPTS, "model": folder, "image_size": None, "threshold": 0.0}
    versions = {Sam3(**{**base, **change}).version for change in changes}
    changed = make_model(make_config(), seed=1)
    versions.add(Sam3(**{**base, "model": str(save_model(changed, tmp_path / "other"))}).version)
    assert len(versions | {segmenter.version}) == len(changes) + 2
    moved = shutil.copytree(random_folder, tmp_path / "moved")
    assert (
        Sam3(**{**base, "model": str(moved), "image_size": 56, "max_batch": 3, "threshold": 0}).version
        == segmenter.version
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"concepts": []}, "at least one"),
        ({"concepts": ["robot", " "]}, "none of them empty"),
        ({"mode": "panoptic"}, "instance, semantic"),
        ({"threshold": 1.0}, r"\[0, 1\)"),
        ({"dtype": "int8"}, "bfloat16"),
        ({"max_batch": 0}, "at least 1"),
        ({"image_size": 60}, "multiple of the model's patch, 14"),
        ({"image_size": 0}, "multiple of the model's patch, 14"),
    ],
)
def test_arguments(arguments, message, random_folder):
    with pytest.raises(ValueError, match=message):
        Sam3(**{"concepts": "robot", "model": str(random_folder), "image_size": None, **arguments})


def test_frames_of_another_kind(segmenter):
    with pytest.raises(ValueError, match="uint8"):
        segmenter(torch.zeros(1, 8, 8, 3))


def test_a_long_concept_is_not_cut(random_folder, frames):
    with pytest.raises(ValueError, match="reads 32"):
        Sam3("a robot that has far too many words in its name", str(random_folder), image_size=None)(frames)


@pytest.mark.parametrize("damage", ["missing", "mismatched"])
def test_weights_that_are_not_there_are_an_error(damage, random_folder, tmp_path, frames):
    folder = shutil.copytree(random_folder, tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.startswith("mask_decoder") and weights[name].ndim == 2)
    if damage == "missing":
        del weights[name]
    else:
        weights[name] = weights[name][1:].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=rf"1 weights are missing or of another shape, the first is {name}"):
        Sam3("robot", str(folder), image_size=None)(frames)


def test_a_folder_that_is_no_checkpoint(random_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config.json and no model.safetensors and no tokenizer.json"):
        Sam3("robot", str(tmp_path))
    folder = shutil.copytree(random_folder, tmp_path / "other")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="model_type='bert'"):
        Sam3("robot", str(folder))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"no model-1.safetensors"):
        Sam3("robot", str(folder))


def test_without_transformers(monkeypatch, random_folder):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "lucid-rl\[sam3\]"'):
        Sam3("robot", str(random_folder))
    with pytest.raises(ImportError, match=r'pip install "lucid-rl\[sam3\]"'):
        Sam3("robot", "facebook/sam3")


def test_old_transformers(monkeypatch, random_folder):
    monkeypatch.setattr("transformers.__version__", "5.9.1")
    with pytest.raises(ImportError, match=r"5\.9\.1 is too old"):
        Sam3("robot", str(random_folder))


def test_broken_torchvision(monkeypatch, random_folder, tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"nms is missing.*pip uninstall torchvision"):
        Sam3("robot", str(random_folder))


def refuse(status, kind):
    """What the hub's client raises for an answer."""
    from huggingface_hub import errors

    response = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co"))
    return getattr(errors, kind)("no", response=response)


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (lambda: refuse(403, "GatedRepoError"), PermissionError, "gated and this account has no access"),
        (lambda: refuse(401, "HfHubHTTPError"), PermissionError, "the hub answers 401"),
        (lambda: refuse(404, "RepositoryNotFoundError"), FileNotFoundError, "no such folder, and the hub answers 404"),
        (lambda: ConnectionError("no route"), FileNotFoundError, "the hub cannot be reached"),
    ],
)
def test_no_access(error, raised, message, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(model, *, allow_patterns, local_files_only=False):
        raise LocalEntryNotFoundError("not cached") if local_files_only else error()

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(raised, match=message) as caught:
        Sam3("robot", "facebook/sam3")
    for part in (
        "https://huggingface.co/facebook/sam3",
        "hf auth login",
        "HF_TOKEN",
        "refused",
        "agent.mask_source=",
        "ColourModel",
    ):
        assert part in str(caught.value)


def test_a_model_in_the_local_cache_needs_no_network(monkeypatch, random_folder):
    def download(model, *, allow_patterns, local_files_only=False):
        assert model == "facebook/sam3" and local_files_only, "asked the network"
        return str(random_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert Sam3("robot", image_size=56).folder == random_folder


def test_a_name_that_is_neither_folder_nor_id():
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Sam3("robot", "a/b/c")


def test_large_model_on_a_cpu_warns(monkeypatch, random_folder):
    monkeypatch.setattr(sam3_module, "LARGE", 1000)
    with pytest.warns(UserWarning, match="on a CPU"):
        Sam3("robot", str(random_folder), image_size=None, device="cpu").load()


def test_digest_sees_a_change_in_any_tensor(tmp_path):
    """One value of the one tensor in the middle of many, of the same size as before."""
    weights = {f"layer{number:03}": torch.full((500,), float(number)) for number in range(300)}
    weights["large"], weights["empty"] = torch.zeros(50_000), torch.zeros(0)
    digests = set()
    for change in (0, 1):
        weights["layer150"][250] += change
        save_file(weights, tmp_path / "model.safetensors")
        digests.add(sam3_weights.digest_model(tmp_path))
    weights["large"] += 1
    save_file(weights, tmp_path / "model.safetensors")
    digests.add(sam3_weights.digest_model(tmp_path))
    (tmp_path / "vocab.json").write_text("{}")
    digests.add(sam3_weights.digest_model(tmp_path))
    assert len(digests) == 4
    (tmp_path / "README.md").write_text("changes nothing")
    assert sam3_weights.digest_model(tmp_path) in digests


@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda whole: whole[:100], lambda whole: whole + b"1"])
def test_damaged_weights_are_named(damage, random_folder, tmp_path):
    folder = shutil.copytree(random_folder, tmp_path / "damaged")
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"damaged/model\.safetensors: not a whole file .* download or save"):
        Sam3("robot", str(folder))


@pytest.mark.parametrize(
    ("name", "text"), [("config.json", "{"), ("config.json", "[]"), ("model.safetensors.index.json", "{")]
)
def test_damaged_json_is_named(name, text, random_folder, tmp_path):
    folder = shutil.copytree(random_folder, tmp_path / "damaged")
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=rf"damaged/{name}: .*delete this file and download or save"):
        Sam3("robot", str(folder))


def test_size_of_the_checkpoint_but_not_more_than_needed(monkeypatch, random_folder):
    assert Sam3("robot", str(random_folder)).image_size == 56
    monkeypatch.setattr(sam3_weights, "LARGEST", 28)
    assert Sam3("robot", str(random_folder)).image_size == 28
    assert Sam3("robot", str(random_folder), image_size=84).image_size == 84


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(segmenter, random_folder, frames):
    grey = [(compute_pixel_values(some, 56).cpu() + 1) * 127.5 for some in (frames, frames.cuda())]
    torch.testing.assert_close(*grey, atol=1.01, rtol=0)
    masks = Sam3(PROMPTS, str(random_folder), threshold=0.0, dtype="float32", device="cuda")(frames.cuda())
    assert masks.is_cuda and (masks.cpu().int() - segmenter(frames).int()).abs().float().mean() < 4


@pytest.mark.slow
def test_prompt_in_right_pixels_out(trained_folder):
    images, truth = draw_shapes(torch.Generator().manual_seed(99), 96)  # [N, P, h, w]
    segmenter = Sam3([*COLOURS, "banana"], str(trained_folder), image_size=None)
    marked, presence = segmenter.masks_and_presence(images)
    marked = (marked > 127).permute(0, 3, 1, 2)  # [N, P + 1, h, w]
    there = truth.flatten(2).any(2)
    found = marked[:, : len(COLOURS)]
    union = (found | truth).flatten(2).sum(2).clamp(min=1)
    jaccard = (found & truth).flatten(2).sum(2) / union
    empty = ~marked.flatten(2).any(2)
    assert jaccard[there].mean() > 0.4
    assert empty[:, : len(COLOURS)][~there].float().mean() > 0.7
    assert empty[:, -1].float().mean() > 0.9
    assert presence[:, :-1][there].mean() > 0.3 + presence[:, :-1][~there].mean()
