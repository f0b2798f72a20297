"""The objective of DreamerV3: world model, imagined actor-critic and replayed critic as one."""

from tensordict import NestedKey, TensorDict, TensorDictBase

from objectives.actor_critic import ImaginedActorCriticLoss, ReplayCriticLoss
from objectives.terms import ModuleLoss, weigh
from objectives.world_model import WorldModelLoss


class DreamerV3Loss(ModuleLoss):
    """The whole objective of DreamerV3: one forward, one backward, one optimiser.

    World model -> imagine from every posterior state -> actor and critic -> critic on the replayed states.

    Args:
        model, actor_critic, replay_critic: The three parts; they share their networks.

    Reads: what :class:`WorldModelLoss` reads, and done [B, T, 1].
    Writes: every ``loss_*`` of the parts [], diagnostics under ``wm`` and ``ac`` [], replay_context [B, T].
    """

    def __init__(self, model: WorldModelLoss, actor_critic: ImaginedActorCriticLoss, replay_critic: ReplayCriticLoss):
        super().__init__()
        self.model, self.actor_critic, self.replay_critic = model, actor_critic, replay_critic

    @property
    def in_keys(self) -> list[NestedKey]:
        return [*self.model.in_keys, self.replay_critic.tensor_keys.done]

    @property
    def out_keys(self) -> list[NestedKey]:
        return [*self.model.out_keys, *self.actor_critic.out_keys, *self.replay_critic.out_keys]

    def set_keys(self, **keys: NestedKey) -> None:
        """Rename keys in every part that has them.

        Raises:
            ValueError: for a key that no part has.
        """
        parts = (self.model, self.actor_critic, self.replay_critic)
        for name, key in keys.items():
            having = [part for part in parts if name in vars(part.tensor_keys)]
            if not having:
                raise ValueError(f"{name}={key!r}: no part of the loss has such a key")
            for part in having:
                part.set_keys(**{name: key})

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        model_terms, rollout = self.model.terms(tensordict)
        actor_critic_terms, imagined = self.actor_critic.terms(rollout.belief, rollout.state)
        batch_shape = rollout.belief.shape[:2]
        replay_terms = self.replay_critic.terms(
            rollout.feature,
            tensordict,
            bootstrap=imagined.returns[:, 0].unflatten(0, batch_shape),  # [B, T]
            slow_value=imagined.slow_value[:, 0].unflatten(0, batch_shape),  # [B, T]
        )
        losses = (
            weigh(model_terms, self.model.weights)
            | weigh(actor_critic_terms, self.actor_critic.weights)
            | weigh(replay_terms, self.replay_critic.weights)
        )
        diagnostics = {"wm": self.model.diagnostics(model_terms, rollout), "ac": imagined.diagnostics}
        return TensorDict(losses | diagnostics | self.model.replay_context(rollout))

    def update_targets(self) -> None:
        """Move the slow critic; to be called after each optimiser step."""
        self.actor_critic.update_slow_critic()
