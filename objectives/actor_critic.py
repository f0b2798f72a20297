"""The losses of actor and critic, on imagined and on replayed trajectories."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.modules import PercentileValueNorm

from objectives.functional import (
    ActorCriticTerms,
    actor_critic_terms,
    replay_critic_terms,
    symexp_bins,
    twohot_mean,
)
from objectives.terms import ModuleLoss, Terms, loss_keys, weigh


class Imagined(NamedTuple):
    """What the replay critic and the logs need from the imagined trajectories."""

    returns: Tensor  # [N, H]
    slow_value: Tensor  # [N, H + 1]
    diagnostics: Terms  # [] each


class ImaginationLoss(ModuleLoss):
    """Actor and critic losses on trajectories that a world model imagines from given model states.

    Args:
        world_model: As in :class:`WorldModelLoss`; its parameters are not owned and get no gradient.
        actor, critic: Of features [..., F].
        weights: Weight of each term. Default: :attr:`WEIGHTS`.
        imagination_horizon: Imagined steps H.
        lmbda: Weight of the longer return.

    Reads: belief [..., D] and state [..., S], the starts.
    Writes: loss_actor, loss_value [], diagnostics under ``ac`` [].
    """

    WEIGHTS: Mapping[str, float] = {"actor": 1.0, "value": 1.0}

    @dataclass
    class _AcceptedKeys:
        belief: NestedKey = "belief"
        state: NestedKey = "state"

    tensor_keys: _AcceptedKeys
    world_model: Any

    def __init__(
        self,
        world_model: nn.Module,
        actor: nn.Module,
        critic: nn.Module,
        weights: Mapping[str, float] | None,
        imagination_horizon: int,
        lmbda: float,
    ):
        super().__init__()
        object.__setattr__(self, "world_model", world_model)  # not registered: the world model's loss owns it
        self.actor, self.critic = actor, critic
        self.weights = dict(weights or self.WEIGHTS)
        self.imagination_horizon, self.lmbda = imagination_horizon, lmbda

    @property
    def in_keys(self) -> list[NestedKey]:
        return [self.tensor_keys.belief, self.tensor_keys.state]

    @property
    def out_keys(self) -> list[NestedKey]:
        return [*loss_keys(self.weights), "ac"]

    def starts(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Belief and state to start from."""
        return tensordict[self.tensor_keys.belief], tensordict[self.tensor_keys.state]


class ImaginedActorCriticLoss(ImaginationLoss):
    """Actor and critic losses on trajectories imagined from given model states.

    Imagination is without gradients; the actor learns by REINFORCE, for continuous and discrete actions alike.

    Args:
        world_model: As in :class:`WorldModelLoss`; its parameters are not owned and get no gradient.
        actor: Feature [..., F] to a distribution with ``sample``, ``log_prob`` and ``entropy``.
        critic: Feature to two-hot logits [..., K]. The slow critic starts as a copy.
        weights: Weight of each term. Default: :attr:`WEIGHTS`.
        imagination_horizon: Imagined steps H.
        lmbda, entropy_scale, slow_regularizer: See :func:`objectives.functional.actor_critic_terms`.
        slow_critic_rate: Share of the critic that moves into the slow critic at each update.
        return_norm_rate: Rate of the moving percentiles of the returns.

    Reads: belief [..., D] and state [..., Z], the starts.
    Writes: loss_actor, loss_value [], diagnostics under ``ac`` [].
    Source: Hafner et al. 2025; danijar/dreamerv3@e3f0224 dreamerv3/agent.py, ``imag_loss``.
    Differs: the action in the last imagined state is not sampled, because nothing uses it.
    """

    bins: Tensor

    def __init__(
        self,
        world_model: nn.Module,
        actor: nn.Module,
        critic: nn.Module,
        *,
        weights: Mapping[str, float] | None = None,
        imagination_horizon: int = 15,
        lmbda: float = 0.95,
        entropy_scale: float = 3e-4,
        slow_regularizer: float = 1.0,
        slow_critic_rate: float = 0.02,
        return_norm_rate: float = 0.01,
    ):
        super().__init__(world_model, actor, critic, weights, imagination_horizon, lmbda)
        self.slow_critic = deepcopy(critic).requires_grad_(False)
        self.return_norm = PercentileValueNorm(rate=return_norm_rate)
        self.entropy_scale = entropy_scale
        self.slow_regularizer, self.slow_critic_rate = slow_regularizer, slow_critic_rate
        self.register_buffer("bins", symexp_bins(), persistent=False)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        terms, imagined = self.terms(*self.starts(tensordict))
        return TensorDict(weigh(terms, self.weights) | {"ac": imagined.diagnostics})

    def terms(self, belief: Tensor, state: Tensor) -> tuple[Terms, Imagined]:
        """Imagine from belief [..., D] and state [..., Z] and compute the un-reduced terms [N, H]."""
        imagination = self.world_model.rssm.imagine(
            self.act, belief.flatten(0, -2), state.flatten(0, -2), self.imagination_horizon
        )
        feature = imagination.feature  # [N, H + 1, F]
        with torch.no_grad():
            reward = twohot_mean(self.world_model.reward_head(feature), self.bins)  # [N, H + 1]
            continuation = torch.sigmoid(self.world_model.continue_head(feature)).squeeze(-1)  # [N, H + 1]
            slow_value = twohot_mean(self.slow_critic(feature), self.bins)  # [N, H + 1]
        policy = self.actor(feature[:, :-1])
        log_prob, entropy = policy.log_prob(imagination.action), policy.entropy()  # [N, H]
        terms = actor_critic_terms(
            log_prob=log_prob,
            entropy=entropy,
            reward=reward,
            continuation=continuation,
            value_logits=self.critic(feature),
            slow_value=slow_value,
            bins=self.bins,
            return_norm=self.return_norm,
            lmbda=self.lmbda,
            entropy_scale=self.entropy_scale,
            slow_regularizer=self.slow_regularizer,
        )
        diagnostics = self.diagnostics(terms, log_prob, entropy, reward, continuation, slow_value)
        return {"actor": terms.actor, "value": terms.value}, Imagined(terms.returns, slow_value, diagnostics)

    def act(self, feature: Tensor, step: int) -> Tensor:
        """Sample the action [N, A] of one imagined step."""
        return self.actor(feature).sample()

    def value(self, feature: Tensor) -> Tensor:
        """Value [...] of model states [..., F]."""
        return twohot_mean(self.critic(feature), self.bins)

    @torch.no_grad()
    def diagnostics(
        self,
        terms: ActorCriticTerms,
        log_prob: Tensor,
        entropy: Tensor,
        reward: Tensor,
        continuation: Tensor,
        slow_value: Tensor,
    ) -> Terms:
        """Scalars to log, by the names under ``ac/``."""
        weight, advantage = terms.weight[:, :-1], terms.advantage
        return {
            "actor_loss": terms.actor.mean(),
            "pg_loss": -(weight * log_prob * advantage).mean(),
            "critic_loss": terms.value.mean(),
            "entropy": entropy.mean(),
            "log_prob": log_prob.mean(),
            "advantage_mean": advantage.mean(),
            "advantage_std": advantage.std(correction=0),
            "advantage_magnitude": advantage.abs().mean(),
            "return_mean": terms.returns.mean(),
            "return_scale": self.return_norm.scale().squeeze(),
            "value_mean": terms.baseline.mean(),
            "slow_value_mean": slow_value.mean(),
            "reward_mean": reward.mean(),
            "continuation_mean": continuation.mean(),
            "weight_mean": terms.weight.mean(),
        }

    @torch.no_grad()
    def update_slow_critic(self) -> None:
        """slow <- slow + rate * (critic - slow), to be called after each optimiser step."""
        for slow, fast in zip(self.slow_critic.parameters(), self.critic.parameters(), strict=True):
            slow.lerp_(fast, self.slow_critic_rate)


class ReplayCriticLoss(ModuleLoss):
    """Critic loss on replayed trajectories; its gradient flows on into the world model.

    The target is the lambda-return of the replayed rewards, bootstrapped from the imagined return of each state.

    Args:
        critic, slow_critic: As in :class:`ImaginedActorCriticLoss`, which owns them.
        weights: Weight of the term. Default: :attr:`WEIGHTS`.
        horizon: Effective horizon; the discount is 1 - 1 / horizon.
        lmbda, slow_regularizer: See :func:`objectives.functional.replay_critic_terms`.

    Reads: belief [B, T, D], state [B, T, Z], reward, terminated, done [B, T, 1], imagined_return [B, T].
    Writes: loss_value_replay [].
    Source: Hafner et al. 2025; danijar/dreamerv3@e3f0224 dreamerv3/agent.py, ``repl_loss``.
    Differs: nothing.
    """

    WEIGHTS: Mapping[str, float] = {"value_replay": 0.3}

    @dataclass
    class _AcceptedKeys:
        belief: NestedKey = "belief"
        state: NestedKey = "state"
        reward: NestedKey = "reward"
        terminated: NestedKey = "terminated"
        done: NestedKey = "done"
        imagined_return: NestedKey = "imagined_return"

    tensor_keys: _AcceptedKeys
    critic: nn.Module
    slow_critic: nn.Module
    bins: Tensor

    def __init__(
        self,
        critic: nn.Module,
        slow_critic: nn.Module,
        *,
        weights: Mapping[str, float] | None = None,
        horizon: float = 333.0,
        lmbda: float = 0.95,
        slow_regularizer: float = 1.0,
    ):
        super().__init__()
        object.__setattr__(self, "critic", critic)  # not registered: the imagined loss owns both
        object.__setattr__(self, "slow_critic", slow_critic)
        self.weights = dict(weights or self.WEIGHTS)
        self.horizon, self.lmbda, self.slow_regularizer = horizon, lmbda, slow_regularizer
        self.register_buffer("bins", symexp_bins(), persistent=False)

    @property
    def in_keys(self) -> list[NestedKey]:
        keys = self.tensor_keys
        return [keys.belief, keys.state, keys.reward, keys.terminated, keys.done, keys.imagined_return]

    @property
    def out_keys(self) -> list[NestedKey]:
        return loss_keys(self.weights)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        keys = self.tensor_keys
        feature = torch.cat([tensordict[keys.belief], tensordict[keys.state]], -1)  # [B, T, F]
        with torch.no_grad():
            slow_value = twohot_mean(self.slow_critic(feature), self.bins)  # [B, T]
        terms = self.terms(feature, tensordict, tensordict[keys.imagined_return], slow_value)
        return TensorDict(weigh(terms, self.weights))

    def terms(self, feature: Tensor, batch: TensorDictBase, bootstrap: Tensor, slow_value: Tensor) -> Terms:
        """Compute the un-reduced term [B, T - 1] from feature [B, T, F], bootstrap and slow_value [B, T]."""
        keys = self.tensor_keys
        term = replay_critic_terms(
            reward=batch[keys.reward].squeeze(-1),
            terminated=batch[keys.terminated].squeeze(-1),
            last=batch[keys.done].squeeze(-1),
            bootstrap=bootstrap,
            value_logits=self.critic(feature),
            slow_value=slow_value,
            bins=self.bins,
            lmbda=self.lmbda,
            slow_regularizer=self.slow_regularizer,
            discount=1 - 1 / self.horizon,
        )
        return {"value_replay": term}
