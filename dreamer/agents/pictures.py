"""Pictures, videos and histograms of a world-model agent: what it sees, reconstructs, imagines and believes."""

from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from torch import Tensor

from dreamer.agents import Media
from dreamer.models import gaussian_rssm, rssm
from objectives import DynamicsActorValueLoss, ImaginedActorCriticLoss, WorldModelLoss

Rollout = rssm.Rollout | gaussian_rssm.Rollout
ActorCriticLoss = ImaginedActorCriticLoss | DynamicsActorValueLoss

ROWS = 4  # sequences shown
COLUMNS = 8  # time steps of a still picture
CONTEXT_STEPS = 5  # steps that the model sees before it imagines
IMAGINED_STEPS = 15


@torch.no_grad()
def make_media(model: WorldModelLoss, actor_critic: ActorCriticLoss, batch: TensorDictBase) -> Media:
    """Show a replay sample, what the model makes of it, and what it imagines from the fifth step on.

    Args:
        model: The world model's loss, for its model and its reading of a batch.
        actor_critic: For the actor, whose actions are imagined, and the critic.
        batch: Replay sample [B, T] of at least two steps. With less than 20, less is imagined.

    Returns:
        Pictures and videos if there are ``pixels``: ``train/original`` and ``train/reconstructed`` (a row of time steps
        per sequence), ``train/observation_video`` and ``train/reconstruction_video`` (sequences side by side),
        ``train/imagination/imagined`` (the actor chooses), ``train/imagination/comparison`` (recorded actions; a row
        per sequence: real | reconstructed | imagined | error). Histograms of latents, actions, rewards and values.
    """
    rollout = model.observe(batch)
    histograms = make_histograms(model, actor_critic, batch, rollout)
    if "pixels" not in model.world_model.decoders:
        return Media({}, {}, histograms, {})
    steps = batch["action"].shape[1]
    length = min(steps, CONTEXT_STEPS + IMAGINED_STEPS)
    context = min(CONTEXT_STEPS, length // 2)
    rows = choose_sequences(batch["is_init"][:, :length])
    batch, rollout = batch[rows], type(rollout)(*(part[rows] for part in rollout))
    real = batch["pixels"].float() / 255  # [B, T, h, w, 3]
    reconstructed = model.decode_pixels(rollout.feature)
    recorded = batch["action"][:, context:length]
    seen = reconstructed[:, :context]
    predicted = torch.cat([seen, imagine_pixels(model, rollout, context, length, lambda _, step: recorded[:, step])], 1)
    comparison = [real[:, :length], reconstructed[:, :length], predicted, (real[:, :length] - predicted).abs()]
    still = torch.linspace(0, steps - 1, min(COLUMNS, steps)).long()
    images = {"train/original": real[:, still], "train/reconstructed": reconstructed[:, still]}
    videos = {
        "train/observation_video": join_columns(real),
        "train/reconstruction_video": join_columns(reconstructed),
        "train/imagination/imagined": join_columns(imagine_pixels(model, rollout, context, length, actor_critic.act)),
        "train/imagination/comparison": torch.cat(comparison, 3).transpose(0, 1).flatten(1, 2),  # [T, B * h, 4w, 3]
    }
    return Media(
        {name: to_bytes(join_columns(image.transpose(0, 1)).flatten(0, 1)) for name, image in images.items()},
        {name: to_bytes(video) for name, video in videos.items()},
        histograms,
        {},
    )


def make_histograms(
    model: WorldModelLoss, actor_critic: ActorCriticLoss, batch: TensorDictBase, rollout: Rollout
) -> dict[str, Tensor]:
    """Values to count, flat: entropies of each latent, KL of each step, nats; replayed actions and rewards; values."""
    keys = model.tensor_keys
    values = model.latent_statistics(rollout) | {
        "action": batch[keys.action],
        "reward": batch[keys.reward],
        "value": actor_critic.value(rollout.feature),
    }
    return {f"histograms/{name}": value.flatten().float() for name, value in values.items()}


def choose_sequences(is_init: Tensor) -> Tensor:
    """Rows to show, of ``is_init`` [B, T, 1]: first those without a reset inside, which nobody could imagine."""
    return is_init[:, 1:].flatten(1).any(1).int().argsort(stable=True)[:ROWS]


def imagine_pixels(
    model: WorldModelLoss, rollout: Rollout, context: int, length: int, policy: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Images [B, length - context, h, w, 3] that the model imagines after ``context`` steps, under ``policy``."""
    start = (rollout.belief[:, context - 1], rollout.state[:, context - 1])
    return model.decode_pixels(model.world_model.rssm.imagine(policy, *start, length - context).feature[:, 1:])


def join_columns(images: Tensor) -> Tensor:
    """Put sequences [B, T, h, w, 3] side by side: [T, h, B * w, 3]."""
    return images.permute(1, 2, 0, 3, 4).flatten(2, 3)


def overlay_mask(images: Tensor, masks: Tensor) -> Tensor:
    """Dim the background of images [..., h, w, 3] in [0, 1] and tint it blue; masks [..., h, w, 1] in [0, 1]."""
    background = images * 0.4 + images.new_tensor([0.0, 0.0, 0.35])
    return torch.where(masks > 0.5, images, background)


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)
