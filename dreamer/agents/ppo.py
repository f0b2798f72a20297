"""PPO (Schulman et al. 2017): a clipped policy gradient from fresh transitions, without a model."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torchrl.modules import IndependentNormal, OneHotCategorical
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from dreamer.agents import Agent, EnvSpec
from dreamer.agents.assembly import observed_shapes
from dreamer.agents.parts import ActionCodec, ToRecords, make_record
from dreamer.models.ppo_networks import CategoricalActor, GaussianActor, Observer, Value
from dreamer.on_policy import ClippedStepper, ReactivePolicy, Rewards, Rollouts, make_primers

NAMES = {
    "loss_objective": "ac/actor_loss",
    "loss_critic": "ac/critic_loss",
    "loss_entropy": "ac/entropy_loss",
    "entropy": "ac/entropy",
    "kl_approx": "ac/kl",
    "clip_fraction": "ac/clip_fraction",
    "ESS": "ac/effective_samples",
    "max_ratio": "ac/max_ratio",
    "mean_ratio": "ac/mean_ratio",
    "value_clip_fraction": "ac/value_clip_fraction",
    "explained_variance": "ac/explained_variance",
}


def build(
    *,
    env_spec: EnvSpec,
    device: torch.device,
    optimization: Mapping[str, Any],
    units: int,
    layers: int,
    epochs: int,
    minibatch_size: int,
    gamma: float,
    lmbda: float,
    clip: float,
    clip_value: float | None,
    entropy_scale: float,
    critic_scale: float,
    normalize_advantage: bool,
    normalize_observations: bool,
    rewards: str,
) -> Agent:
    """Assemble the agent; the keys are those of ``configs/agent/ppo.yaml``, where each is explained.

    Source: Schulman et al. 2017, equations 7 and 9, by TorchRL's :class:`ClipPPOLoss` and :class:`GAE`.
    Differs: the newest step of every environment is learned from with the next batch, see :class:`Rollouts`.
    """
    codec, shapes = ActionCodec(env_spec.action), observed_shapes(env_spec)
    observer = Observer(shapes, normalize=normalize_observations).to(device)
    keys, width = tuple(observer.keys), {"units": units, "layers": layers}
    actor = make_actor(observer, codec, width).to(device)
    critic = TensorDictModule(Value(observer, **width), in_keys=list(keys), out_keys=["state_value"]).to(device)
    loss = ClipPPOLoss(
        actor,
        critic,
        clip_epsilon=clip,
        clip_value=clip_value,
        entropy_coeff=entropy_scale,
        critic_coeff=critic_scale,
        loss_critic_type="l2",
        functional=False,  # strict about what it loads
        normalize_advantage=normalize_advantage,
    )
    loss.set_keys(sample_log_prob="log_prob")
    for name, setting in list(loss.named_buffers(recurse=False)):
        loss.register_buffer(name, setting, persistent=False)  # a resumed run goes on with its own settings
    advantage = GAE(gamma=gamma, lmbda=lmbda, value_network=critic, vectorized=False)
    primers = make_primers()
    return Agent(
        policy=ReactivePolicy(actor, codec),
        primers=primers,
        loss=loss,
        stepper=ClippedStepper(loss, NAMES, **optimization),
        to_records=ToRecords(keys, codec, carried=("log_prob",)),
        record=make_record(env_spec, keys, codec, primers),
        make_schedule=partial(
            Rollouts,
            keys,
            advantage,
            epochs=epochs,
            minibatch_size=minibatch_size,
            device=device,
            rewards=Rewards(rewards, gamma),
            update_statistics=observer.update_moments_ if normalize_observations else None,
        ),
        context_keys=(),
    )


def make_actor(observer: Observer, codec: ActionCodec, width: Mapping[str, int]) -> ProbabilisticTensorDictSequential:
    """Observations to a distribution of ``action``, the vector [A] of the codec."""
    if codec.discrete:
        network, keys, distribution = CategoricalActor(observer, codec.size, **width), ["logits"], OneHotCategorical
    else:
        network, keys, distribution = GaussianActor(observer, codec.size, **width), ["loc", "scale"], IndependentNormal
    return ProbabilisticTensorDictSequential(
        TensorDictModule(network, in_keys=list(observer.keys), out_keys=keys),
        ProbabilisticTensorDictModule(
            in_keys=keys, out_keys=["action"], distribution_class=distribution, return_log_prob=False
        ),
    )
