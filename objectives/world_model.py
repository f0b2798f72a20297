"""The loss of a world model on replayed sequences. An agent that changes one piece overrides one method."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.modules.functional import symlog

from objectives.functional import categorical_entropy, categorical_kl, kl_terms, symexp_bins, twohot_nll
from objectives.terms import ModuleLoss, Terms, loss_keys, weigh


class WorldModelLoss(ModuleLoss):
    """Reconstruction, reward, continue and KL losses of a world model on replayed sequences.

        reco   = sum |decode(s_t) - x_t|^2       (pixels / 255; vectors in symlog space)
        reward = two-hot nll of r_t              continue = bce to (1 - terminated_t) * (1 - 1 / horizon)
        dynamic, representation = KL terms with free nats

    Args:
        world_model: Has ``encode``, ``rssm``, ``decode``, ``reward_head`` and ``continue_head``
            (:class:`dreamer.models.world_model.WorldModel`).
        weights: Weight of each term. Default: :attr:`WEIGHTS`.
        free_nats: Floor of each KL term, nats.
        horizon: Effective horizon; the continue head learns the discount 1 - 1 / horizon as well.

    Reads: the observation keys [B, T, ...], action [B, T, A] (that led to the observation), reward, is_init and
        terminated [B, T, 1], ("context", "belief") [B, D] and ("context", "state") [B, S]: the model state before
        the first step, as class ids.
    Writes: loss_model_reco, loss_model_reward, loss_model_continue, loss_model_dynamic, loss_model_representation
        [], diagnostics under ``wm`` [], replay_context: belief [B, T, D] and state [B, T, S].
    Source: Hafner et al. 2025; danijar/dreamerv3@e3f0224 dreamerv3/agent.py, ``loss``.
    Differs: nothing.
    """

    WEIGHTS: Mapping[str, float] = {
        "model_reco": 1.0,
        "model_reward": 1.0,
        "model_continue": 1.0,
        "model_dynamic": 1.0,
        "model_representation": 0.1,
    }

    @dataclass
    class _AcceptedKeys:
        action: NestedKey = "action"
        reward: NestedKey = "reward"
        is_init: NestedKey = "is_init"
        terminated: NestedKey = "terminated"
        context: NestedKey = "context"
        replay_context: NestedKey = "replay_context"

    tensor_keys: _AcceptedKeys
    world_model: Any
    bins: Tensor

    def __init__(
        self,
        world_model: nn.Module,
        *,
        weights: Mapping[str, float] | None = None,
        free_nats: float = 1.0,
        horizon: float = 333.0,
    ):
        super().__init__()
        self.world_model = world_model
        self.weights = dict(weights or self.WEIGHTS)
        self.free_nats, self.horizon = free_nats, horizon
        self.register_buffer("bins", symexp_bins(), persistent=False)

    @property
    def in_keys(self) -> list[NestedKey]:
        keys = self.tensor_keys
        context = [(keys.context, "belief"), (keys.context, "state")]
        return [*self.world_model.encoders, keys.action, keys.reward, keys.is_init, keys.terminated, *context]

    @property
    def out_keys(self) -> list[NestedKey]:
        return [*loss_keys(self.weights), "wm", self.tensor_keys.replay_context]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        terms, rollout = self.terms(tensordict)
        losses = weigh(terms, self.weights)
        return TensorDict(losses | {"wm": self.diagnostics(terms, rollout)} | self.replay_context(rollout))

    def terms(self, batch: TensorDictBase) -> tuple[Terms, Any]:
        """Compute every un-reduced term [B, T] and the posterior rollout that they came from."""
        rollout = self.observe(batch)
        terms = {
            **self.kl_terms(rollout),
            **self.reconstruction_terms(rollout, batch),
            **self.head_terms(rollout, batch),
            **self.auxiliary_terms(rollout, batch),
        }
        return terms, rollout

    def observe(self, batch: TensorDictBase) -> Any:
        """Filter the observations into posterior model states, from the replay context on."""
        keys, rssm = self.tensor_keys, self.world_model.rssm
        return rssm.observe(
            self.world_model.encode(batch),  # [B, T, E]
            batch[keys.action],
            batch[keys.is_init],
            *rssm.unpack(batch[keys.context, "belief"], batch[keys.context, "state"]),  # [B, D] and [B, Z]
        )

    def kl_terms(self, rollout: Any) -> Terms:
        dynamic, representation = kl_terms(rollout.posterior_logits, rollout.prior_logits, self.free_nats)
        return {"model_dynamic": dynamic, "model_representation": representation}

    def reconstruction_terms(self, rollout: Any, batch: TensorDictBase) -> Terms:
        """Squared error summed over each observation, and over observations if there are several."""
        reconstructions = self.world_model.decode(rollout.belief, rollout.state)
        errors = [squared_error(reco, batch[key]) for key, reco in reconstructions.items()]
        return {"model_reco": torch.stack(errors).sum(0)}

    def head_terms(self, rollout: Any, batch: TensorDictBase) -> Terms:
        keys, feature = self.tensor_keys, rollout.feature
        reward = twohot_nll(self.world_model.reward_head(feature), batch[keys.reward].squeeze(-1), self.bins)
        alive = (~batch[keys.terminated]).float() * (1 - 1 / self.horizon)  # [B, T, 1]
        continuation = F.binary_cross_entropy_with_logits(
            self.world_model.continue_head(feature), alive, reduction="none"
        )
        return {"model_reward": reward, "model_continue": continuation.squeeze(-1)}

    def auxiliary_terms(self, rollout: Any, batch: TensorDictBase) -> Terms:
        """Further terms [B, T] of an agent, each with an entry in ``weights``. None here."""
        return {}

    def latent_statistics(self, rollout: Any) -> Terms:
        """Entropies of each latent, [B, T, S], and the KL of each step, [B, T]; nats."""
        prior, posterior = rollout.prior_logits, rollout.posterior_logits  # [B, T, S, K]
        return {
            "prior_entropy": categorical_entropy(prior.unsqueeze(-2)),
            "posterior_entropy": categorical_entropy(posterior.unsqueeze(-2)),
            "kl": categorical_kl(posterior, prior),
        }

    @torch.no_grad()
    def diagnostics(self, terms: Terms, rollout: Any) -> Terms:
        """Scalars to log, by the names under ``wm/``."""
        posterior, prior = rollout.posterior_logits, rollout.prior_logits
        means = {name: term.detach().mean() for name, term in terms.items()}
        weighted = {name: self.weights[name] * mean for name, mean in means.items()}
        return {
            "total_loss": torch.stack(list(weighted.values())).sum(),
            "image_loss": means["model_reco"],
            "reward_loss": means["model_reward"],
            "continue_loss": means["model_continue"],
            "kl_loss": weighted["model_dynamic"] + weighted["model_representation"],
            "kl_value": categorical_kl(posterior, prior).mean(),
            "prior_entropy": categorical_entropy(prior).mean(),
            "posterior_entropy": categorical_entropy(posterior).mean(),
        }

    def decode_pixels(self, feature: Tensor) -> Tensor:
        """Images [..., h, w, 3] of model states [..., F], to look at; other observations are not decoded."""
        rssm = self.world_model.rssm
        return self.world_model.decoders["pixels"](*feature.split([rssm.belief_size, rssm.state_size], -1))

    def replay_context(self, rollout: Any) -> dict[NestedKey, TensorDict]:
        """The latents that replace those in the replay, in the form in which it keeps them."""
        belief, state = self.world_model.rssm.pack(rollout.belief.detach(), rollout.state.detach())
        return {self.tensor_keys.replay_context: TensorDict({"belief": belief, "state": state}, belief.shape[:2])}


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Sum of squared errors over everything after [B, T]; uint8 targets are images, others are compared as symlog."""
    target = target.float() / 255 if target.dtype == torch.uint8 else symlog(target.float())
    return (prediction - target).square().flatten(2).sum(-1)
