"""Where the weights of SAM 3 are, whether they can be used, and how they are loaded."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MODEL_TYPES = ("sam3", "sam3_video", "sam3_lite_text")  # the hub's `facebook/sam3` is "sam3_video"
FILES = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*.json",
    "vocab.json",
    "merges.txt",
)
OLDEST = "5.10"
# Checkpoints of several generations of transformers are about; some have no "text_model" in these names.
NAMES = {r"text_encoder\.(embeddings|encoder|final_layer_norm)\.": r"text_encoder.text_model.\1."}
LARGEST = 672  # pixels, unless more are asked for
SAMPLE = 4096  # bytes in the middle of a tensor; those of all tensors tell one checkpoint from another
INSTEAD = (
    "Without these weights: another segmenter, which is GroundTruth, ColourModel or Student in Python and "
    "agent.mask_source=ground_truth, colour or student in training; a checkpoint of SAM3-LiteText, such as "
    "vil-uob/sam3-litetext-s0; or a small stand-in from scripts/make_tiny_sam3.py"
)


AGAIN = "delete this file and download or save the checkpoint again"


def import_transformers() -> Any:
    """The package transformers, after a look whether SAM 3 can run in it.

    Raises:
        ImportError: it is missing or too old, or torchvision is broken.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f'Sam3 needs transformers>={OLDEST}: pip install "lucid-rl[sam3]"') from error
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < tuple(int(part) for part in OLDEST.split(".")):
        found = transformers.__version__
        raise ImportError(
            f'transformers {found} is too old for Sam3, >={OLDEST} is needed: pip install "lucid-rl[sam3]"'
        )
    if importlib.util.find_spec("torchvision") is not None:
        try:
            import torchvision  # noqa: F401  # pyright: ignore
        except Exception as error:  # a build for another torch fails in many ways
            raise ImportError(
                f"torchvision is installed but broken ({error}), and transformers then has no SAM 3: "
                "pip uninstall torchvision. Sam3 does not need it"
            ) from error
    return transformers


def find_model(model: str) -> Path:
    """The folder of a checkpoint; a model of the hub is downloaded unless the local cache has it.

    Args:
        model: folder, or id of a model on the Hugging Face hub ("facebook/sam3").

    Raises:
        OSError: there is no such model, it is not complete, or this account may not download it. The message says
            how to get it and what to use instead.
        ValueError: it is a model of another kind, or a file of it is damaged.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _find_on_hub(model)
    lacking = _list_lacking(folder)
    if lacking:
        raise FileNotFoundError(
            f"model={model!r}: {folder} has no {' and no '.join(lacking)}; give the folder that "
            "`hf download facebook/sam3` or `save_pretrained` of model and tokenizer wrote"
        )
    kind = _read_json(folder / "config.json").get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"model={model!r}: its config.json has model_type={kind!r}, Sam3 loads {MODEL_TYPES}")
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        ValueError: there is none.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{path}: not JSON ({error}); {AGAIN}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, not an object; {AGAIN}")
    return found


def _list_lacking(folder: Path) -> list[str]:
    """What a folder lacks of a checkpoint."""
    index = folder / "model.safetensors.index.json"
    shards = set(_read_json(index).get("weight_map", {}).values()) if index.is_file() else {"model.safetensors"}
    lacking = [name for name in ("config.json", *sorted(shards)) if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        lacking.append("tokenizer.json")
    return lacking


def _find_on_hub(model: str) -> Path:
    """The folder in the local cache, which is filled if need be."""
    import_transformers()  # brings huggingface_hub
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(model, allow_patterns=list(FILES), local_files_only=True))
        if not _list_lacking(cached):
            return cached
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as error:
        raise FileNotFoundError(f"model={model!r}: there is no such folder, and it is no id of a model") from error
    try:
        return Path(snapshot_download(model, allow_patterns=list(FILES)))
    except GatedRepoError as error:
        raise PermissionError(_explain(model, "its weights are gated and this account has no access")) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise PermissionError(_explain(model, f"the hub answers {status}, no access")) from error
        raise FileNotFoundError(_explain(model, f"there is no such folder, and the hub answers {status}")) from error
    except OSError as error:  # no network, or told not to use it
        reason = "there is no such folder, it is not in the local cache, and the hub cannot be reached"
        raise FileNotFoundError(_explain(model, reason)) from error


def _explain(model: str, reason: str) -> str:
    """What is wrong, how to get the weights, what to use instead."""
    return (
        f"model={model!r}: {reason}. To get the weights of SAM 3: log in to Hugging Face, fill in the form on "
        "https://huggingface.co/facebook/sam3 and wait (a request may be refused); then `hf auth login` or set "
        f"HF_TOKEN, or give the folder of a download as model=. {INSTEAD}"
    )


def digest_model(folder: Path) -> str:
    """A fingerprint of a checkpoint's content, quick for large files: of each tensor it reads a few KiB.

    Raises:
        ValueError: a file of weights is damaged or was cut short.
    """
    digest = hashlib.sha256()
    for path in sorted({path for pattern in FILES for path in folder.glob(pattern)}):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        if path.suffix == ".safetensors":
            _digest_tensors(path, digest)
        else:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _digest_tensors(path: Path, digest: Any) -> None:
    """Adds the header of a file in the format safetensors, and the middle of each tensor."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = file.read(min(length, size))
            places = [row["data_offsets"] for name, row in json.loads(header).items() if name != "__metadata__"]
            whole = 8 + length + max((end for _, end in places), default=0) == size
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise ValueError(f"{path}: not a whole file of weights in the format safetensors; {AGAIN}")
        digest.update(header)
        for start, end in sorted(places):
            file.seek(8 + length + max(start, (start + end - SAMPLE) // 2))
            digest.update(file.read(min(SAMPLE, end - start)))


def read_config(folder: Path, image_size: int | None) -> Any:
    """The configuration of the image model, set to a size of its input; None for its own, but at most `LARGEST`.

    Raises:
        ValueError: the size is not a multiple of the model's patch.
    """
    transformers = import_transformers()
    kind = _read_json(folder / "config.json")["model_type"]
    config_class = transformers.Sam3LiteTextConfig if kind == "sam3_lite_text" else transformers.Sam3Config
    config = config_class.from_pretrained(folder)  # takes the detector's part of a "sam3_video"
    patch = config.vision_config.backbone_config.patch_size
    size = min(LARGEST, config.image_size) if image_size is None else image_size
    if size < patch or size % patch:
        raise ValueError(f"image_size={size}: give a multiple of the model's patch, {patch} pixels, or null")
    config.image_size = size
    return config


def load_model(folder: Path, config: Any, dtype: torch.dtype) -> Any:
    """The image model with all its weights, on the CPU.

    Raises:
        RuntimeError: weights are missing or do not fit.
    """
    transformers = import_transformers()
    lite = config.model_type == "sam3_lite_text"
    model_class: Any = transformers.Sam3LiteTextModel if lite else transformers.Sam3Model
    load: Callable[..., Any] = model_class.from_pretrained
    options = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, found = load(folder, config=config, dtype=dtype, key_mapping=None if lite else NAMES, **options)
    wrong = sorted([*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])])
    if wrong:  # transformers only warns, and fills them with random numbers
        raise RuntimeError(
            f"{folder}: {len(wrong)} weights are missing or of another shape, the first is {wrong[0]}. Either this is "
            "no whole checkpoint of SAM 3, or its names are those of another transformers than "
            f"{transformers.__version__}: download it anew, then try another version"
        )
    return model.eval().requires_grad_(False)


def encode_prompts(model: Any, folder: Path, concepts: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The features of the tokens of P concepts and which of them count: `[P, L, D]` and int64 `[P, L]`.

    Raises:
        ValueError: a concept has more tokens than the model reads.
    """
    transformers = import_transformers()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    tokens = tokenizer(list(concepts), padding="max_length", max_length=32, truncation=True, return_tensors="pt")
    with torch.no_grad():
        features = model.get_text_features(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
    length = features.shape[1]  # SAM3-LiteText has features for fewer tokens than it takes
    counts = [len(ids) for ids in tokenizer(list(concepts)).input_ids]
    if max(counts) > length:
        worst = concepts[counts.index(max(counts))]
        raise ValueError(
            f"concept {worst!r} has {max(counts)} tokens, the model reads {length}: use a short noun phrase"
        )
    return features, tokens.attention_mask[:, :length]
