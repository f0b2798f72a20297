"""From the loss of a world model to an agent that learns to act in its imagination, as in DreamerV3."""

from collections.abc import Mapping, Sequence
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
)
from dreamer.agents.pictures import make_media
from dreamer.steppers import JointStepper
from objectives import DreamerV3Loss, ImaginedActorCriticLoss, ReplayCriticLoss, WorldModelLoss

OBSERVATIONS = ("pixels", "observation")
GRADIENT_NORMS = (("wm/wm_grad_norm", "wm/grad_norm"), ("ac/actor_grad_norm",), ("ac/critic_grad_norm",))


def observed_shapes(env_spec: EnvSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of the observations that an agent sees."""
    return {key: tuple(env_spec.observation[key].shape) for key in OBSERVATIONS if key in env_spec.observation}


def assemble(
    model_loss: WorldModelLoss,
    *,
    env_spec: EnvSpec,
    codec: ActionCodec,
    device: torch.device,
    optimization: Mapping[str, Any],
    loss_weights: Mapping[str, float],
    units: int,
    actor_unimix: float,
    horizon: float,
    imagination_horizon: int,
    lmbda: float,
    entropy_scale: float,
    slow_regularizer: float,
    slow_critic_rate: float,
    return_norm_rate: float,
) -> Agent:
    """Add actor and critic to a world model; the other arguments are those of ``configs/agent/dreamer_v3.yaml``.

    Args:
        model_loss: The world model and what trains it.
        env_spec, codec: What the agent may know of its environment.
        device: Where the learner lives.
        optimization: Settings of :class:`JointStepper`.
        loss_weights: Weights of all losses.
        units: Width of actor and critic.
    """
    world_model, observations = model_loss.world_model, observed_shapes(env_spec)
    feature_size = world_model.rssm.belief_size + world_model.rssm.state_size
    actor = make_actor(feature_size, codec.size, units=units, discrete=codec.discrete, unimix=actor_unimix)
    critic = make_critic(feature_size, units=units)
    _, actor_critic_weights, replay_weights = partition(loss_weights, type(model_loss))
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


def partition(
    weights: Mapping[str, float],
    model_loss: type[WorldModelLoss],
    others: Sequence[Any] = (ImaginedActorCriticLoss, ReplayCriticLoss),
) -> list[dict[str, float]]:
    """Give the loss of the world model, and each of the others, its own entries of ``weights``.

    Raises:
        ValueError: if a name belongs to none of them, or one is missing.
    """
    losses = (model_loss, *others)
    known = {name for loss in losses for name in loss.WEIGHTS}
    if set(weights) != known:
        raise ValueError(f"agent.loss_weights={sorted(weights)}: give exactly {sorted(known)}")
    return [{name: weights[name] for name in loss.WEIGHTS} for loss in losses]
