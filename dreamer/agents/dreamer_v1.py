"""Dreamer (Hafner et al. 2020): a Gaussian world model, and an actor that is trained through its dynamics."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from dreamer.agents import Agent, EnvSpec
from dreamer.agents.assembly import GRADIENT_NORMS, observed_shapes, partition
from dreamer.agents.parts import ActionCodec, RecurrentPolicy, ToRecords, make_primers, make_record
from dreamer.agents.pictures import make_media
from dreamer.models.conv_v1 import ConvEncoder, DeconvDecoder
from dreamer.models.gaussian_rssm import GaussianRSSM
from dreamer.models.heads_v1 import (
    Head,
    OneHotActor,
    TanhNormalActor,
    VectorDecoder,
    VectorEncoder,
    add_noise,
    replace_some,
)
from dreamer.models.world_model import WorldModel
from dreamer.steppers import GroupedStepper
from objectives import DreamerV1Loss, DreamerV1ModelLoss, DynamicsActorValueLoss


def build(
    *,
    env_spec: EnvSpec,
    device: torch.device,
    optimization: Mapping[str, Any],
    belief_size: int,
    state_size: int,
    hidden_size: int,
    depth: int,
    units: int,
    predict_end: bool,
    exploration_noise: float,
    exploration_epsilon: float,
    free_nats: float,
    horizon: float,
    imagination_horizon: int,
    lmbda: float,
    loss_weights: Mapping[str, float],
) -> Agent:
    """Assemble the agent; the keys are those of ``configs/agent/dreamer_v1.yaml``, where each is explained."""
    codec, observations = ActionCodec(env_spec.action), observed_shapes(env_spec)
    world_model = make_world_model(
        observations=observations,
        action_size=codec.size,
        belief_size=belief_size,
        state_size=state_size,
        hidden_size=hidden_size,
        depth=depth,
        units=units,
        predict_end=predict_end,
    )
    feature_size = belief_size + state_size
    actor = (OneHotActor if codec.discrete else TanhNormalActor)(feature_size, codec.size, units=units)
    critic = Head(feature_size, 1, units=units, layers=3)
    model_weights, actor_value_weights = partition(loss_weights, DreamerV1ModelLoss, [DynamicsActorValueLoss])
    model_loss = DreamerV1ModelLoss(world_model, weights=model_weights, free_nats=free_nats, horizon=horizon)
    actor_value_loss = DynamicsActorValueLoss(
        world_model,
        actor,
        critic,
        weights=actor_value_weights,
        imagination_horizon=imagination_horizon,
        lmbda=lmbda,
        horizon=horizon,
    )
    loss = DreamerV1Loss(model_loss, actor_value_loss).to(device)
    explore = (
        partial(replace_some, share=exploration_epsilon)
        if codec.discrete
        else partial(add_noise, amount=exploration_noise)
    )
    return Agent(
        policy=RecurrentPolicy(world_model, actor, codec, explore),
        primers=make_primers(world_model.rssm),
        loss=loss,
        stepper=make_stepper(loss, **optimization),
        to_records=ToRecords(observations, codec, carried=()),
        record=make_record(env_spec, observations, codec),
        context_keys=(),
        make_media=partial(make_media, model_loss, actor_value_loss),
    )


def make_world_model(
    *,
    observations: Mapping[str, tuple[int, ...]],
    action_size: int,
    belief_size: int,
    state_size: int,
    hidden_size: int,
    depth: int,
    units: int,
    predict_end: bool,
) -> WorldModel:
    """Build the world model for observations of the given shapes: images are (64, 64, C), vectors (O,).

    Args:
        observations: Shape of each observation key.
        action_size: Width A of the action vector.
        belief_size, state_size, hidden_size: See :class:`GaussianRSSM`.
        depth: See :class:`ConvEncoder`.
        units: Width of every layer outside the RSSM.
        predict_end: Whether there is a head for the end of episodes.
    """
    latent = {"belief_size": belief_size, "state_size": state_size}
    encoders: dict[str, nn.Module] = {}
    decoders: dict[str, nn.Module] = {}
    for key, shape in observations.items():
        if len(shape) == 3:
            encoders[key] = ConvEncoder(image_shape=shape, depth=depth)
            decoders[key] = DeconvDecoder(**latent, image_shape=shape, depth=depth)
        else:
            encoders[key] = VectorEncoder(shape[0], units=units)
            decoders[key] = VectorDecoder(**latent, out_features=shape[0], units=units)
    embed_size, feature_size = sum(e.out_features for e in encoders.values()), belief_size + state_size
    return WorldModel(
        encoders=encoders,
        rssm=GaussianRSSM(embed_size=embed_size, action_size=action_size, hidden_size=hidden_size, **latent),
        decoders=decoders,
        reward_head=Head(feature_size, 1, units=units, layers=2),
        continue_head=Head(feature_size, 1, units=units, layers=3) if predict_end else None,
    )


def make_stepper(
    loss: DreamerV1Loss, *, world_model_lr: float, actor_lr: float, value_lr: float, **settings: Any
) -> GroupedStepper:
    """Give each part its learning rate; ``settings`` are those of :class:`GroupedStepper`."""
    parts = (loss.model.world_model, loss.actor_value.actor, loss.actor_value.critic)
    rated = zip(parts, (world_model_lr, actor_lr, value_lr), strict=True)
    return GroupedStepper(loss, dict(zip(GRADIENT_NORMS, rated, strict=True)), **settings)
