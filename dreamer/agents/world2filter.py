"""World2Filter: DreamerV3 with two decoders, one for the agent's own foreground and one for the background behind it.

The foreground, the mask, rewards and ends train the latent; the background does not. No segmenter is needed to act.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dreamer.agents import Agent, EnvSpec
from dreamer.agents.assembly import observed_shapes, partition
from dreamer.agents.masking import assemble_with_masks, check_masks, choose_selective, pixel_shapes
from dreamer.agents.parts import ActionCodec, make_world_model
from dreamer.models.background import LatentBackground, StopGradientBackground
from objectives import World2FilterModelLoss

BACKGROUNDS = ("stop_gradient", "latent")


def build(
    *,
    env_spec: EnvSpec,
    device: torch.device,
    optimization: Mapping[str, Any],
    mask_source: str,
    weighted: bool,
    selective: str | None,
    background: str,
    background_share: float,
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
    """Assemble the agent; the keys are those of ``configs/agent/world2filter.yaml``, where each is explained.

    Raises:
        ValueError: for an unknown choice, or an environment that cannot give what is asked for.
    """
    check_masks(env_spec, mask_source)
    codec = ActionCodec(env_spec.action)
    networks = {"action_size": codec.size, "downsample": downsample, "unimix": unimix}
    world_model = make_world_model(
        observations=observed_shapes(env_spec), decoded=pixel_shapes(env_spec), **networks, **size
    )
    model_weights, *_ = partition(loss_weights, World2FilterModelLoss)
    model_loss = World2FilterModelLoss(
        world_model,
        make_background(background, env_spec, background_share, networks, size),
        selective=choose_selective(selective, mask_source),
        weighted=weighted,
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


def make_background(
    kind: str, env_spec: EnvSpec, share: float, networks: Mapping[str, Any], size: Mapping[str, int]
) -> nn.Module:
    """What rebuilds the background, with ``share`` of the agent's widths.

    Raises:
        ValueError: for an unknown kind, or a share outside (0, 1].
    """
    if kind not in BACKGROUNDS:
        raise ValueError(f"agent.background={kind!r}: choose one of {BACKGROUNDS}")
    if not 0 < share <= 1:
        raise ValueError(f"agent.background_share={share}: give a share of the agent's widths, above 0 and at most 1")
    pixels = {"pixels": tuple(env_spec.observation["pixels"].shape)}
    small = {key: max(2, round(share * width)) for key, width in size.items()}
    if kind == "latent":
        small["belief_size"] = max(8, small["belief_size"] // 8 * 8)  # the recurrent weight has eight blocks
        model = make_world_model(observations=pixels, **networks, **small)
        return LatentBackground(model.encoders["pixels"], model.rssm, model.decoders["pixels"])
    of_the_task = {"belief_size": size["belief_size"], "categoricals": size["categoricals"], "classes": size["classes"]}
    model = make_world_model(observations=pixels, **networks, **small | of_the_task)
    return StopGradientBackground(model.decoders["pixels"])
