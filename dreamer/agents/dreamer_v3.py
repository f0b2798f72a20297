"""DreamerV3 (Hafner et al. 2025): world model, imagination, actor-critic with fixed hyper-parameters."""

from collections.abc import Mapping
from typing import Any

import torch

from dreamer.agents import Agent, EnvSpec
from dreamer.agents.assembly import assemble, observed_shapes, partition
from dreamer.agents.parts import ActionCodec, make_world_model
from objectives import WorldModelLoss


def build(
    *,
    env_spec: EnvSpec,
    device: torch.device,
    optimization: Mapping[str, Any],
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
    """Assemble the agent; the keys are those of ``configs/agent/dreamer_v3.yaml``, where each is explained."""
    codec = ActionCodec(env_spec.action)
    world_model = make_world_model(
        observations=observed_shapes(env_spec),
        action_size=codec.size,
        downsample=downsample,
        unimix=unimix,
        **size,
    )
    model_weights, *_ = partition(loss_weights, WorldModelLoss)
    model_loss = WorldModelLoss(world_model, weights=model_weights, free_nats=free_nats, horizon=horizon)
    return assemble(
        model_loss,
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
