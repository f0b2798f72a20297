"""Random behaviour that goes further than uniformly random actions, which mostly cancel each other out."""

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torch.nn import functional as F
from torchrl.data import TensorSpec, Unbounded
from torchrl.envs import TensorDictPrimer

from dreamer.agents.parts import ActionCodec

UNIFORM, STICKY, BIASED, BROWNIAN = range(4)
SLOWEST, FASTEST = 0.05, 0.5  # of the paces of behaviours
SPREAD = 0.3  # standard deviation of biased continuous actions around their centre
PREFERENCE = 2.0  # standard deviation of the logits of biased discrete actions


class MixedRandomPolicy(TensorDictModuleBase):
    """Random actions, in every episode by another behaviour, drawn at its start.

        uniform: a new action in every step, each as likely as any other
        sticky: the same, but only with the chance ``pace`` in each step, else the last action goes on
        biased: as sticky, around a centre (continuous) or with preferences (discrete) that the episode keeps
        Brownian, continuous only: the last action plus ``pace`` times a normal number, clipped

    The pace of an episode is between 1/20 and 1/2, uniform in its logarithm. In CarRacing all but the first reach about
    twice the speed of uniformly random actions, and leave the road more often.

    Args:
        action_spec: Of one environment.

    Reads: is_init [1], previous_action [A], behaviour [2 + A].
    Writes: action [A]; ("next", "behaviour"): kind, pace, and centre or logits.
    Source: hardmaru/WorldModelsExperiments@fd982b9 doomrnn (actions held), ctallec/world-models (Brownian).
    Differs: a mixture of them; durations are geometric.
    """

    def __init__(self, action_spec: TensorSpec):
        super().__init__()
        self.codec = ActionCodec(action_spec)
        self.in_keys = ["is_init", "previous_action", "behaviour"]
        self.out_keys = ["action", ("next", "behaviour")]

    @property
    def primers(self) -> TensorDictPrimer:
        """What environments carry for it."""
        behaviour = Unbounded(2 + self.codec.size)
        return TensorDictPrimer(behaviour=behaviour, random=False, default_value=0.0, expand_specs=True)

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        shape = tensordict.batch_size
        is_init, previous, carried = (
            tensordict[key].reshape(-1, *tensordict[key].shape[len(shape) :]) for key in self.in_keys
        )
        behaviour = torch.where(is_init, self._draw_behaviour(carried), carried)  # [N, 2 + A]
        action = self._draw_action(behaviour, self.codec.encode(previous).reshape(len(is_init), -1), is_init)
        tensordict["action"] = self.codec.decode(action).reshape(tensordict["previous_action"].shape)
        tensordict["next", "behaviour"] = behaviour.reshape(*shape, -1)
        return tensordict

    def _draw_behaviour(self, like: Tensor) -> Tensor:
        kinds = BIASED + 1 if self.codec.discrete else BROWNIAN + 1
        kind = torch.randint(kinds, (len(like), 1), device=like.device)
        pace = SLOWEST * (FASTEST / SLOWEST) ** torch.rand_like(like[:, :1])
        if self.codec.discrete:
            bias = PREFERENCE * torch.randn_like(like[:, 2:])
        else:
            bias = 2 * torch.rand_like(like[:, 2:]) - 1
        return torch.cat([kind, pace, bias], -1)

    def _draw_action(self, behaviour: Tensor, previous: Tensor, is_init: Tensor) -> Tensor:
        kind, pace, bias = behaviour.split([1, 1, self.codec.size], -1)
        held = ((kind == STICKY) | (kind == BIASED)) & (torch.rand_like(pace) >= pace) & ~is_init
        if self.codec.discrete:
            chances = torch.softmax(bias * (kind == BIASED), -1)
            chosen = F.one_hot(chances.multinomial(1).squeeze(-1), self.codec.size).float()
            return torch.where(held, previous, chosen)
        normal, uniform = torch.randn_like(bias), 2 * torch.rand_like(bias) - 1
        chosen = torch.where(kind == BIASED, (bias + SPREAD * normal).clamp(-1, 1), uniform)
        walks = (kind == BROWNIAN) & ~is_init
        moved = (previous + pace * normal).clamp(-1, 1)
        return torch.where(walks, moved, torch.where(held, previous, chosen))
