"""The objective of Dreamer V1: Gaussian world model, actor through the dynamics, value; and its closed-form pieces."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.objectives.utils import hold_out_net

from objectives.actor_critic import ImaginationLoss
from objectives.functional import lambda_return
from objectives.terms import ModuleLoss, Terms, loss_keys, weigh
from objectives.world_model import WorldModelLoss


def gaussian_kl(mean: Tensor, std: Tensor, other_mean: Tensor, other_std: Tensor) -> Tensor:
    """KL(p || q) of diagonal Gaussians, summed over their dimensions.

        log(std_q / std_p) + (std_p^2 + (mean_p - mean_q)^2) / (2 std_q^2) - 1/2

    Args:
        mean, std: Of p, [..., Z].
        other_mean, other_std: Of q, [..., Z].

    Returns:
        [...] nats.
    """
    ratio, distance = std / other_std, (mean - other_mean) / other_std
    return (0.5 * (ratio.square() + distance.square() - 1) - ratio.log()).sum(-1)


def clamped_mean(kl: Tensor, free_nats: float) -> Tensor:
    """max(free_nats, mean(kl)): the floor acts on the mean, and below it nothing has a gradient. Shape []."""
    return kl.mean().clamp(min=free_nats)


def gaussian_entropy(std: Tensor) -> Tensor:
    """Entropy of a diagonal Gaussian with standard deviations [..., Z], summed over them. Shape [...], nats."""
    return (std.log() + 0.5 * (1 + math.log(2 * math.pi))).sum(-1)


def gaussian_nll(mean: Tensor, target: Tensor) -> Tensor:
    """(mean - target)^2 / 2, elementwise: the negative log likelihood of a unit Gaussian without its constant."""
    return 0.5 * (mean - target).square()


def imagined_returns(reward: Tensor, continuation: Tensor, value: Tensor, lmbda: float = 0.95) -> tuple[Tensor, Tensor]:
    """Lambda-returns of imagined states and the weights that they count with.

        R_t = r_t + c_t * ((1 - lmbda) * v_{t+1} + lmbda * R_{t+1}),   R_{H-1} = v_{H-1}
        w_t = c_0 * ... * c_{t-1},   w_0 = 1

    Reward, continuation and value of an index belong to the same state, so the value includes the reward of its own
    state. Of the last state only the value is used: H states give H - 1 returns. No gradient passes the weights.

    Args:
        reward, continuation, value: Of each imagined state, the start excluded, [N, H].
        lmbda: Weight of the longer return, 0 to 1.

    Returns:
        Returns and weights, each [N, H - 1].

    Source: danijar/dreamer@56d4d44 tools.py, ``lambda_return``; dreamer.py, ``_train``.
    Differs: nothing.
    """
    weight = torch.cumprod(F.pad(continuation.detach()[:, :-2], (1, 0), value=1.0), 1)
    return lambda_return(reward.roll(1, 1), continuation.roll(1, 1), value, lmbda), weight  # it has them on arriving


class DreamerV1ModelLoss(WorldModelLoss):
    """Reconstruction, reward, KL and, if the model predicts it, continue losses of a Gaussian world model.

        reco = sum |decode(s_t) - x_t|^2 / 2        reward = (r^_t - r_t)^2 / 2
        kl   = max(free_nats, mean_{b, t} KL(posterior || prior))
        continue = bce to (1 - terminated_t) * (1 - 1 / horizon)

    The floor acts on the mean over the batch: below it the KL has no gradient at all. Windows start from zeros.

    Args:
        world_model: As in :class:`WorldModelLoss`, with a :class:`dreamer.models.gaussian_rssm.GaussianRSSM`, a reward
            head of one output, and a ``continue_head`` or None.
        weights: Weight of each term. Default: :attr:`WEIGHTS`. That of ``model_continue`` needs a continue head.
        free_nats: Floor of the mean KL, nats.
        horizon: Effective horizon; the continue head learns the discount 1 - 1 / horizon as well.

    Reads: the observation keys [B, T, ...], action [B, T, A] (that led to the observation), reward, is_init and
        terminated [B, T, 1].
    Writes: loss_model_reco, loss_model_reward, loss_model_kl, loss_model_continue [], diagnostics under ``wm`` [].
    Source: Hafner et al. 2020; danijar/dreamer@56d4d44 dreamer.py, ``_train``.
    Differs: the constants of the Gaussian likelihoods are left out; a window may cross an episode boundary.
    """

    WEIGHTS: Mapping[str, float] = {
        "model_reco": 1.0,
        "model_reward": 1.0,
        "model_kl": 1.0,
        "model_continue": 10.0,
    }

    def __init__(
        self,
        world_model: nn.Module,
        *,
        weights: Mapping[str, float] | None = None,
        free_nats: float = 3.0,
        horizon: float = 100.0,
    ):
        super().__init__(world_model, weights=weights, free_nats=free_nats, horizon=horizon)
        if world_model.continue_head is None:
            self.weights.pop("model_continue", None)

    @property
    def in_keys(self) -> list[NestedKey]:
        keys = self.tensor_keys
        return [*self.world_model.encoders, keys.action, keys.reward, keys.is_init, keys.terminated]

    @property
    def out_keys(self) -> list[NestedKey]:
        return [*loss_keys(self.weights), "wm"]

    def observe(self, batch: TensorDictBase) -> Any:
        """Filter the observations into posterior model states, from zeros on."""
        keys, rssm = self.tensor_keys, self.world_model.rssm
        embed = self.world_model.encode(batch)  # [B, T, E]
        start = rssm.initial(len(embed), embed.device)
        return rssm.observe(embed, batch[keys.action], batch[keys.is_init], *start)

    def kl_terms(self, rollout: Any) -> Terms:
        return {"model_kl": clamped_mean(self.kl(rollout), self.free_nats)}

    def kl(self, rollout: Any) -> Tensor:
        """KL(posterior || prior) of each step, [B, T] nats."""
        return gaussian_kl(rollout.posterior_mean, rollout.posterior_std, rollout.prior_mean, rollout.prior_std)

    def reconstruction_terms(self, rollout: Any, batch: TensorDictBase) -> Terms:
        return {name: 0.5 * error for name, error in super().reconstruction_terms(rollout, batch).items()}

    def head_terms(self, rollout: Any, batch: TensorDictBase) -> Terms:
        keys, model, feature = self.tensor_keys, self.world_model, rollout.feature
        terms = {"model_reward": gaussian_nll(model.reward_head(feature), batch[keys.reward]).squeeze(-1)}
        if model.continue_head is not None:
            alive = (~batch[keys.terminated]).float() * (1 - 1 / self.horizon)  # [B, T, 1]
            bce = F.binary_cross_entropy_with_logits(model.continue_head(feature), alive, reduction="none")
            terms["model_continue"] = bce.squeeze(-1)
        return terms

    def latent_statistics(self, rollout: Any) -> Terms:
        return {
            "prior_entropy": gaussian_entropy(rollout.prior_std.unsqueeze(-1)),
            "posterior_entropy": gaussian_entropy(rollout.posterior_std.unsqueeze(-1)),
            "kl": self.kl(rollout),
        }

    @torch.no_grad()
    def diagnostics(self, terms: Terms, rollout: Any) -> Terms:
        """Scalars to log, by the names under ``wm/``."""
        means = {name: term.detach().mean() for name, term in terms.items()}
        logged = {
            "total_loss": torch.stack([self.weights[name] * mean for name, mean in means.items()]).sum(),
            "image_loss": means["model_reco"],
            "reward_loss": means["model_reward"],
            "kl_loss": self.weights["model_kl"] * means["model_kl"],
            "kl_value": self.kl(rollout).mean(),
            "prior_entropy": gaussian_entropy(rollout.prior_std).mean(),
            "posterior_entropy": gaussian_entropy(rollout.posterior_std).mean(),
        }
        return logged | ({"continue_loss": means["model_continue"]} if "model_continue" in means else {})

    def replay_context(self, rollout: Any) -> dict[NestedKey, TensorDict]:
        """Nothing: windows start from zeros."""
        return {}


class DynamicsActorValueLoss(ImaginationLoss):
    """Actor loss through the learned dynamics and value loss, on trajectories imagined from given model states.

        actor = -mean(w_t * R_t)        value = mean(w_t * (v_t - sg(R_t))^2 / 2)

    with R and w of :func:`imagined_returns`. The actor's gradient flows back through rewards, values, continuations,
    states and earlier actions, but not through the features that it reads; world model and value head are held fixed
    meanwhile. So every gradient of the sum of both losses belongs to one of them alone.

    Args:
        world_model: As in :class:`DreamerV1ModelLoss`; its parameters are not owned and get no gradient.
        actor: Feature [..., F] to a distribution with ``rsample``.
        critic: Feature to the value, [..., 1].
        weights: Weight of each term. Default: :attr:`WEIGHTS`.
        imagination_horizon: Imagined states H, the start not counted.
        lmbda: Of the lambda-return.
        horizon: Effective horizon; 1 - 1 / horizon is the discount where the model has no continue head.

    Reads: belief [..., D] and state [..., Z], the starts.
    Writes: loss_actor, loss_value [], diagnostics under ``ac`` [].
    Source: Hafner et al. 2020; danijar/dreamer@56d4d44 dreamer.py, ``_train``.
    Differs: the constant of the Gaussian likelihood is left out.
    """

    def __init__(
        self,
        world_model: nn.Module,
        actor: nn.Module,
        critic: nn.Module,
        *,
        weights: Mapping[str, float] | None = None,
        imagination_horizon: int = 15,
        lmbda: float = 0.95,
        horizon: float = 100.0,
    ):
        super().__init__(world_model, actor, critic, weights, imagination_horizon, lmbda)
        if imagination_horizon < 2:
            raise ValueError(
                f"imagination_horizon={imagination_horizon}: give at least 2, the last is for the bootstrap"
            )
        self.horizon = horizon

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        terms, diagnostics = self.terms(*self.starts(tensordict))
        return TensorDict(weigh(terms, self.weights) | {"ac": diagnostics})

    def terms(self, belief: Tensor, state: Tensor) -> tuple[Terms, Terms]:
        """Imagine from belief [..., D] and state [..., Z]; the un-reduced terms [N, H - 1] and what to log."""
        start = belief.detach().flatten(0, -2), state.detach().flatten(0, -2)
        with hold_out_net(self.world_model), hold_out_net(self.critic):
            imagination = self.world_model.rssm.imagine(self.act, *start, self.imagination_horizon)
            feature = imagination.feature[:, 1:]  # [N, H, F]
            reward, value = self.world_model.reward_head(feature).squeeze(-1), self.value(feature)
            continuation = self.continuation(feature)  # [N, H]
        returns, weight = imagined_returns(reward, continuation, value, self.lmbda)  # [N, H - 1] each
        prediction = self.value(feature[:, :-1].detach())  # [N, H - 1]
        terms = {"actor": -weight * returns, "value": weight * gaussian_nll(prediction, returns.detach())}
        logged = {
            "actor_loss": terms["actor"],
            "critic_loss": terms["value"],
            "return_mean": returns,
            "value_mean": value,
            "reward_mean": reward,
            "continuation_mean": continuation,
            "weight_mean": weight,
            "action_magnitude": imagination.action.abs(),
        }
        return terms, {name: part.detach().mean() for name, part in logged.items()}

    def act(self, feature: Tensor, step: int) -> Tensor:
        """Sample the action [N, A] of one imagined step; no gradient passes to the feature."""
        return self.actor(feature.detach()).rsample()

    def value(self, feature: Tensor) -> Tensor:
        """Value [...] of model states [..., F]."""
        return self.critic(feature).squeeze(-1)

    def continuation(self, feature: Tensor) -> Tensor:
        """Discount times the probability of going on, [N, H], of imagined states [N, H, F]."""
        if self.world_model.continue_head is None:
            return feature.new_full(feature.shape[:-1], 1 - 1 / self.horizon, dtype=torch.float32)
        return torch.sigmoid(self.world_model.continue_head(feature)).squeeze(-1)


class DreamerV1Loss(ModuleLoss):
    """The whole objective of Dreamer V1: world model -> imagine from the posterior states -> actor and value.

    One forward and one backward serve three optimisers: no gradient of one part reaches the parameters of another.
    With a continue head nothing is imagined from the last step of a window, which in the reference may be terminal.

    Args:
        model, actor_value: The two parts; they share the world model.

    Reads: what :class:`DreamerV1ModelLoss` reads.
    Writes: every ``loss_*`` of the parts [], diagnostics under ``wm`` and ``ac`` [].
    Source: danijar/dreamer@56d4d44 dreamer.py, ``_train``.
    Differs: nothing.
    """

    def __init__(self, model: DreamerV1ModelLoss, actor_value: DynamicsActorValueLoss):
        super().__init__()
        self.model, self.actor_value = model, actor_value

    @property
    def in_keys(self) -> list[NestedKey]:
        return self.model.in_keys

    @property
    def out_keys(self) -> list[NestedKey]:
        return [*self.model.out_keys, *self.actor_value.out_keys]

    def set_keys(self, **keys: NestedKey) -> None:
        """Rename keys of the batch."""
        self.model.set_keys(**keys)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        model_terms, rollout = self.model.terms(tensordict)
        stop = None if self.model.world_model.continue_head is None else -1
        terms, diagnostics = self.actor_value.terms(rollout.belief[:, :stop], rollout.state[:, :stop])
        losses = weigh(model_terms, self.model.weights) | weigh(terms, self.actor_value.weights)
        return TensorDict(losses | {"wm": self.model.diagnostics(model_terms, rollout), "ac": diagnostics})
