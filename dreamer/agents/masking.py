"""What agents that learn from masks share: labelled records, the hook that labels them, and pictures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.trainers.trainers import TrainerHookBase

from dreamer.agents import Agent, EnvSpec, Media
from dreamer.agents.assembly import assemble, observed_shapes
from dreamer.agents.parts import ActionCodec, ToRecords, make_record
from dreamer.agents.pictures import (
    COLUMNS,
    CONTEXT_STEPS,
    IMAGINED_STEPS,
    choose_sequences,
    join_columns,
    make_media,
    overlay_mask,
    to_bytes,
)
from objectives import ImaginedActorCriticLoss, SegmentationDreamerModelLoss

GROUND_TRUTH = "ground_truth"
SOURCES = (GROUND_TRUTH, "sam3", "student", "colour")


def check_masks(env_spec: EnvSpec, mask_source: str) -> None:
    """Refuse what cannot give masks.

    Raises:
        ValueError: for an unknown source, no images, or no mask where the simulator is to give it.
    """
    if mask_source not in SOURCES:
        raise ValueError(f"agent.mask_source={mask_source!r}: choose one of {SOURCES}")
    if "pixels" not in env_spec.observation:
        raise ValueError("this agent takes images apart: give env.from_pixels=true")
    if mask_source == GROUND_TRUTH and "mask" not in env_spec.observation:
        raise ValueError(
            "agent.mask_source=ground_truth: the environment gives no mask; set env.emit_mask=true, or choose another "
            f"agent.mask_source of {SOURCES[1:]} where the simulator has none"
        )


def choose_selective(selective: str | None, mask_source: str) -> str:
    """The setting of a loss; by default masks are trusted if they are the simulator's."""
    return selective or ("none" if mask_source == GROUND_TRUTH else "false_negative")


def pixel_shapes(env_spec: EnvSpec) -> dict[str, tuple[int, ...]]:
    """Shape of what the decoder of the pixels gives: the colours and the mask."""
    *size, channels = env_spec.observation["pixels"].shape
    return {"pixels": (*size, channels + 1)}


def assemble_with_masks(
    model_loss: SegmentationDreamerModelLoss,
    *,
    env_spec: EnvSpec,
    codec: ActionCodec,
    optimization: Mapping[str, Any],
    mask_source: str,
    segmentation: Mapping[str, Any],
    **others: Any,
) -> Agent:
    """As :func:`dreamer.agents.assembly.assemble`: an agent that stores masks, has them labelled, and shows them.

    Args:
        model_loss: The world model and what trains it.
        env_spec, codec, optimization, others: As in :func:`dreamer.agents.assembly.assemble`.
        mask_source: Where the masks come from, one of :data:`SOURCES`.
        segmentation: How records are labelled, if the masks are not the simulator's.

    Raises:
        ValueError: for labels from a thread beside a CUDA graph.
    """
    labelled_later = mask_source != GROUND_TRUTH
    if labelled_later and segmentation["asynchronous"] and optimization["cudagraph"]:
        raise ValueError(
            "agent.segmentation.asynchronous=true: give optimization.cudagraph=false as well, because a graph cannot "
            "be captured while another thread uses the GPU"
        )
    agent = assemble(model_loss, env_spec=env_spec, codec=codec, optimization=optimization, **others)
    keys = [*observed_shapes(env_spec), *(["mask"] if "mask" in env_spec.observation else [])]
    device = next(agent.loss.parameters()).device
    return replace(
        agent,
        to_records=LabelledRecords(ToRecords(keys, codec), mask_source),
        record=add_labels(make_record(env_spec, keys, codec, agent.primers), mask_source),
        make_media=partial(make_mask_media, agent.loss.model, agent.loss.actor_critic),
        make_hooks=partial(make_hooks, mask_source, env_spec, device, segmentation) if labelled_later else None,
    )


def make_hooks(
    mask_source: str, env_spec: EnvSpec, device: torch.device, settings: Mapping[str, Any]
) -> Sequence[TrainerHookBase]:
    """The hook that labels the records; its segmenter is loaded here.

    Raises:
        ValueError: for a source that learns from the simulator's masks, where there are none.
    """
    from dreamer.annotation import AnnotateReplay
    from dreamer.labellers import make_labeller

    settings = dict(settings)
    origin = settings["teacher"] if mask_source == "student" else mask_source
    has_labels = "mask" in env_spec.observation or (origin == "colour" and settings["labels"])
    if origin != "sam3" and not has_labels:
        raise ValueError(
            f"agent.mask_source={mask_source} learns from masks, and there are none: set env.emit_mask=true where the "
            "simulator has them, or agent.segmentation.labels=<folder of labelled frames> for the colour model"
        )
    pace = {key: settings.pop(key) for key in ("frames_per_update", "asynchronous")}
    settings["prompt"] = settings["prompt"] or env_spec.prompt
    settings["device"] = settings["device"] or device
    return [AnnotateReplay(make_labeller(mask_source, **settings), **pace, device=settings["device"])]


class LabelledRecords:
    """Turn collected transitions into replay records with a mask, or with room for one.

    Args:
        to_records: Makes the records, with the simulator's ``mask`` where there is one.
        mask_source: See :func:`add_labels`.
    """

    def __init__(self, to_records: Callable[[TensorDictBase], TensorDictBase], mask_source: str):
        self.to_records, self.mask_source = to_records, mask_source

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        return add_labels(self.to_records(batch), self.mask_source)


def add_labels(records: TensorDictBase, mask_source: str) -> TensorDictBase:
    """Add ``mask`` [..., h, w, 1], ``mask_valid`` and ``mask_version`` [..., 1] to records.

    The simulator's masks are valid at once. Others are empty and wait to be labelled; the simulator's is then kept as
    ``true_mask``, to measure them with.
    """
    valid = torch.full_like(records["is_init"], mask_source == GROUND_TRUTH)
    truth = records.pop("mask", None)
    # A reader beside the labeller copies in this order, and a label's flag is written last: no flag without its mask.
    records["mask_valid"], records["mask_version"] = valid, valid.long()
    if mask_source == GROUND_TRUTH:
        records["mask"] = truth
        return records
    records["mask"] = torch.zeros_like(records["pixels"][..., :1])
    if truth is not None:
        records["true_mask"] = truth
    return records


@torch.no_grad()
def make_mask_media(
    model: SegmentationDreamerModelLoss, actor_critic: ImaginedActorCriticLoss, batch: TensorDictBase
) -> Media:
    """What :func:`dreamer.agents.pictures.make_media` shows, and the image taken apart.

    Returns:
        Besides, each with a row of time steps per sequence: ``segmentation/overlay``, the labels on the frames (frames
        without a label are all background); ``segmentation/foreground``, ``segmentation/mask``, and if the agent has
        them ``segmentation/background`` and ``segmentation/composite``, which the model makes of the frames. The video
        ``segmentation/comparison``: real | label | what the model makes, side by side, for two sequences. The number
        ``segmentation/model_iou`` compares the model's mask with the simulator's, or with the label if there is none.
    """
    from envs.segmentation.metrics import jaccard

    media = make_media(model, actor_critic, batch)
    length = CONTEXT_STEPS + IMAGINED_STEPS  # the same sequences as there, and a video as long
    batch = batch[choose_sequences(batch["is_init"][:, :length])]
    rollout = model.observe(batch)
    image, label, labelled = model.read_labels(batch)
    layers = model.take_apart(rollout, batch)
    truth = batch["true_mask"].float() if "true_mask" in batch else label
    known = torch.ones_like(labelled) if "true_mask" in batch else labelled  # [B, T, 1, 1, 1]
    iou = jaccard((layers["mask"] > 0.5).flatten(0, 1), (truth > 0.5).flatten(0, 1))[known.flatten() > 0]  # [n]
    shown = {"overlay": overlay_mask(image, label)} | {name: layer.expand_as(image) for name, layer in layers.items()}
    still = torch.linspace(0, image.shape[1] - 1, min(COLUMNS, image.shape[1])).long()
    stills = {f"segmentation/{name}": join_columns(layer[:, still].transpose(0, 1)) for name, layer in shown.items()}
    columns = [layer[:2, :length] for layer in (image, *shown.values())]
    comparison = torch.cat(columns, 3).transpose(0, 1).flatten(1, 2)  # [T, 2 * h, n * w, 3]
    return media._replace(
        images=media.images | {name: to_bytes(row.flatten(0, 1)) for name, row in stills.items()},
        videos=media.videos | {"segmentation/comparison": to_bytes(comparison)},
        scalars={"segmentation/model_iou": iou.mean()} if len(iou) else {},
    )
