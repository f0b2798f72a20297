"""DreamerV3 (Hafner et al. 2025): world model, imagination, actor-critic with fixed hyper-parameters."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from dreamer.agents import Agent, EnvSpec
from dreamer.agents.parts import (
    ActionCodec,
    RecurrentPolicy,
    ToRecords,
    make_actor,
    make_critic,
    make_primers,
    make_record,
    make_world_model,
)
from dreamer.agents.pictures import make_media
from dreamer.steppers import JointStepper
from objectives import DreamerV3Loss, ImaginedActorCriticLoss, ReplayCriticLoss, WorldModelLoss

OBSERVATIONS = ("pixels", "observation")
GRADIENT_NORMS = (("wm/wm_grad_norm", "wm/grad_norm"), ("ac/actor_grad_norm",), ("ac/critic_grad_norm",))
LOSSES = (WorldModelLoss, ImaginedActorCriticLoss, ReplayCriticLoss)


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
    observations = {key: tuple(env_spec.observation[key].shape) for key in OBSERVATIONS if key in env_spec.observation}
    world_model = make_world_model(
        observations=observations, action_size=codec.size, downsample=downsample, unimix=unimix, **size
    )
    feature_size = world_model.rssm.belief_size + world_model.rssm.state_size
    actor = make_actor(feature_size, codec.size, units=size["units"], discrete=codec.discrete, unimix=actor_unimix)
    critic = make_critic(feature_size, units=size["units"])

    model_weights, actor_critic_weights, replay_weights = partition(loss_weights, *LOSSES)
    model_loss = WorldModelLoss(world_model, weights=model_weights, free_nats=free_nats, horizon=horizon)
    critic_targets = {"lmbda": lmbda, "slow_regularizer": slow_regularizer}
    actor_critic_loss = ImaginedActorCriticLoss(
        world_model,
        actor,
        critic,
        weights=actor_critic_weights,
        imagination_horizon=imagination_horizon,
        entropy_scale=entropy_scale,
        slow_critic_rate=slow_critic_rate,
        return_norm_rate=return_norm_rate,
        **critic_targets,
    )
    slow_critic = actor_critic_loss.slow_critic
    replay_loss = ReplayCriticLoss(critic, slow_critic, weights=replay_weights, horizon=horizon, **critic_targets)
    loss = DreamerV3Loss(model_loss, actor_critic_loss, replay_loss).to(device)

    norms = dict(zip(GRADIENT_NORMS, (world_model, actor, critic), strict=True))
    primers = make_primers(world_model.rssm)
    return Agent(
        policy=RecurrentPolicy(world_model, actor, codec),
        primers=primers,
        loss=loss,
        stepper=JointStepper(loss, loss.update_targets, norms, **optimization),
        to_records=ToRecords(observations, codec),
        record=make_record(env_spec, observations, codec, primers),
        make_media=partial(make_media, model_loss, actor_critic_loss),
    )


def partition(weights: Mapping[str, float], *losses: type) -> list[dict[str, float]]:
    """Give each loss its own entries of ``weights``.

    Raises:
        ValueError: if a name belongs to none of them, or one is missing.
    """
    known = {name for loss in losses for name in loss.WEIGHTS}
    if set(weights) != known:
        raise ValueError(f"agent.loss_weights={sorted(weights)}: give exactly {sorted(known)}")
    return [{name: weights[name] for name in loss.WEIGHTS} for loss in losses]
