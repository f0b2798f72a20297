"""Segmentation Dreamer (Kim et al. 2024): DreamerV3 that rebuilds the foreground alone, on black.

The image itself is what it sees: no segmenter is needed to act.
"""

from collections.abc import Mapping
from typing import Any

import torch

from dreamer.agents import Agent, EnvSpec
from dreamer.agents.assembly import observed_shapes, partition
from dreamer.agents.masking import assemble_with_masks, check_masks, choose_selective, pixel_shapes
from dreamer.agents.parts import ActionCodec, make_world_model
from objectives import SegmentationDreamerModelLoss


def build(
    *,
    env_spec: EnvSpec,
    device: torch.device,
    optimization: Mapping[str, Any],
    mask_source: str,
    selective: str | None,
    segmentation: Mapping[str, Any],
    size: Mapping[str, int],
    downsample: str,
    unimix: float,
    actor_unimix: float,
    free_nats: float,
    horizon: float,
    imagination_horizon: int,
    lmbda: float,
    entropy_scale: float,
    slow_regularizer: float,
    slow_critic_rate: float,
    return_norm_rate: float,
    loss_weights: Mapping[str, float],
) -> Agent:
    """Assemble the agent; the keys are those of ``configs/agent/segmentation_dreamer.yaml``, where each is explained.

    Raises:
        ValueError: for an unknown choice, or an environment that cannot give what is asked for.
    """
    check_masks(env_spec, mask_source)
    codec = ActionCodec(env_spec.action)
    world_model = make_world_model(
        observations=observed_shapes(env_spec),
        decoded=pixel_shapes(env_spec),
        action_size=codec.size,
        downsample=downsample,
        unimix=unimix,
        **size,
    )
    model_weights, *_ = partition(loss_weights, SegmentationDreamerModelLoss)
    model_loss = SegmentationDreamerModelLoss(
        world_model,
        selective=choose_selective(selective, mask_source),
        weights=model_weights,
        free_nats=free_nats,
        horizon=horizon,
    )
    return assemble_with_masks(
        model_loss,
        mask_source=mask_source,
        segmentation=segmentation,
        env_spec=env_spec,
        codec=codec,
        device=device,
        optimization=optimization,
        loss_weights=loss_weights,
        units=size["units"],
        actor_unimix=actor_unimix,
        horizon=horizon,
        imagination_horizon=imagination_horizon,
        lmbda=lmbda,
        entropy_scale=entropy_scale,
        slow_regularizer=slow_regularizer,
        slow_critic_rate=slow_critic_rate,
        return_norm_rate=return_norm_rate,
    )
