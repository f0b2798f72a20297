"""Shared assembly: from specs and sizes to world model, actor, critic, acting policy and replay records."""

from collections.abc import Callable, Mapping, Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.data import Bounded, Categorical, OneHot, TensorSpec, Unbounded
from torchrl.envs import TensorDictPrimer
from torchrl.envs.utils import ExplorationType, exploration_type

from dreamer.agents import EnvSpec
from dreamer.models.conv import MULTIPLIERS, ImageDecoder, ImageEncoder
from dreamer.models.gaussian_rssm import GaussianRSSM
from dreamer.models.heads import ContinuousActor, DiscreteActor, Head
from dreamer.models.rssm import RSSM
from dreamer.models.world_model import VectorDecoder, VectorEncoder, WorldModel
from objectives.functional import NUM_BINS


def make_world_model(
    *,
    observations: Mapping[str, tuple[int, ...]],
    action_size: int,
    belief_size: int,
    hidden_size: int,
    classes: int,
    depth: int,
    units: int,
    categoricals: int = 32,
    blocks: int = 8,
    layers: int = 3,
    multipliers: tuple[int, ...] = MULTIPLIERS,
    downsample: str = "pool",
    unimix: float = 0.01,
    decoded: Mapping[str, tuple[int, ...]] | None = None,
) -> WorldModel:
    """Build the world model for observations of the given shapes: images are (h, w, C), vectors (O,).

    Vectors come before images in the encoder output, each kind sorted by key. Every key has networks of its own; the
    reference joins all vectors first, which is the same for environments that give one ``observation``.

    Args:
        observations: Shape of each observation key.
        action_size: Width A of the action vector.
        belief_size, hidden_size, categoricals, classes, blocks, unimix: See :class:`RSSM`.
        depth, multipliers, downsample: See :class:`ImageEncoder`.
        units: Width of every MLP outside the RSSM.
        layers: Layers of the vector encoder and decoder.
        decoded: Shapes of what the decoders give, where they differ from those of the observations.
    """
    state_size = categoricals * classes
    latent = {"belief_size": belief_size, "state_size": state_size}
    image = {"depth": depth, "multipliers": multipliers, "downsample": downsample}
    encoders, decoders = {}, {}
    for key, shape in sorted(observations.items(), key=lambda item: (len(item[1]), item[0])):
        target = (decoded or {}).get(key, shape)
        if len(shape) == 3:
            encoders[key] = ImageEncoder(image_shape=shape, **image)
            decoders[key] = ImageDecoder(**latent, image_shape=target, units=units, blocks=blocks, **image)
        else:
            encoders[key] = VectorEncoder(shape[0], units=units, layers=layers)
            decoders[key] = VectorDecoder(**latent, out_features=target[0], units=units, layers=layers)
    rssm = RSSM(
        embed_size=sum(encoder.out_features for encoder in encoders.values()),
        action_size=action_size,
        belief_size=belief_size,
        hidden_size=hidden_size,
        categoricals=categoricals,
        classes=classes,
        blocks=blocks,
        unimix=unimix,
    )
    feature_size = belief_size + state_size
    return WorldModel(
        encoders=encoders,
        rssm=rssm,
        decoders=decoders,
        reward_head=Head(feature_size, NUM_BINS, units=units, layers=1, outscale=0.0),
        continue_head=Head(feature_size, 1, units=units, layers=1),
    )


def make_actor(feature_size: int, action_size: int, *, units: int, discrete: bool, unimix: float = 0.0) -> nn.Module:
    """Build the actor for one-hot (``discrete``) or bounded continuous actions of width A."""
    if discrete:
        return DiscreteActor(feature_size, action_size, units=units, unimix=unimix)
    return ContinuousActor(feature_size, action_size, units=units)


def make_critic(feature_size: int, *, units: int) -> Head:
    """Build the critic: feature [..., F] to two-hot logits [..., K], 0 everywhere at the start."""
    return Head(feature_size, NUM_BINS, units=units, layers=3, outscale=0.0)


class ActionCodec:
    """Between an environment's action and the vector that the networks see.

    Continuous actions in [-1, 1] and one-hot actions are vectors already; class numbers become one-hot vectors.

    Args:
        spec: Action spec of one environment.

    Raises:
        ValueError: for a spec that is none of these.
    """

    def __init__(self, spec: TensorSpec):
        self.numbered = type(spec) is Categorical and spec.ndim == 0  # not its subclasses, which hold several choices
        self.discrete = self.numbered or (type(spec) is OneHot and spec.ndim == 1)
        continuous = isinstance(spec, Bounded) and spec.dtype.is_floating_point and spec.ndim == 1
        if not self.discrete and not (continuous and (spec.space.low == -1).all() and (spec.space.high == 1).all()):
            kinds = "one vector of continuous actions in [-1, 1], or one one-hot or categorical action"
            raise ValueError(f"action spec {spec}: the agent takes {kinds}; wrap the environment to offer that")
        self.dtype = spec.dtype
        self.size = spec.space.n if self.discrete else spec.shape[-1]

    def encode(self, action: Tensor) -> Tensor:
        """Environment action [..., A] (class numbers: [...]) to float32 vector [..., A]."""
        return F.one_hot(action.long(), self.size).float() if self.numbered else action.float()

    def decode(self, vector: Tensor) -> Tensor:
        """Invert :meth:`encode`."""
        return (vector.argmax(-1) if self.numbered else vector).to(self.dtype)


class RecurrentPolicy(TensorDictModuleBase):
    """The acting policy: filter the observation into the model state, then sample the actor.

    The environment's TensorDict carries the model state, as the RSSM packs it. Where ``is_init`` is set, it and the
    previous action count as zero.

    Args:
        world_model, actor: The networks that act.
        codec: For the actions.
        explore: What becomes of a sampled action [N, A]; nothing by default, nor where the mode is taken.

    Reads: observation keys, is_init [1], previous_action [A], belief, state.
    Writes: action [A]; ("next", "belief") and ("next", "state"), the posterior model state.
    """

    def __init__(
        self,
        world_model: WorldModel,
        actor: nn.Module,
        codec: ActionCodec,
        explore: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.world_model, self.actor, self.codec, self.explore = world_model, actor, codec, explore
        self.observation_keys = list(world_model.encoders)
        self.in_keys = [*self.observation_keys, "is_init", "previous_action", "belief", "state"]
        self.out_keys = ["action", ("next", "belief"), ("next", "state")]

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        shape = tensordict.batch_size
        is_init, previous, belief, state, *observations = (
            tensordict[key].reshape(-1, 1, *tensordict[key].shape[len(shape) :])  # [N, 1, ...], one time step
            for key in ("is_init", "previous_action", "belief", "state", *self.observation_keys)
        )
        rssm = self.world_model.rssm
        embed = self.world_model.encode(dict(zip(self.observation_keys, observations, strict=True)))  # [N, 1, E]
        action = self.codec.encode(previous)  # [N, 1, A]
        rollout = rssm.observe(embed, action, is_init, *rssm.unpack(belief[:, 0], state[:, 0]))
        distribution = self.actor(rollout.feature[:, 0])
        sampled = exploration_type() in (ExplorationType.RANDOM, None)
        action = distribution.sample() if sampled else distribution.mode  # [N, A]
        if sampled and self.explore is not None:
            action = self.explore(action)
        tensordict["action"] = self.codec.decode(action).reshape(tensordict["previous_action"].shape)
        for key, value in zip(("belief", "state"), rssm.pack(rollout.belief, rollout.state), strict=True):
            tensordict["next", key] = value.reshape(*shape, -1)
        return tensordict


def make_primers(rssm: RSSM | GaussianRSSM) -> TensorDictPrimer:
    """The recurrent state of :class:`RecurrentPolicy` for an environment to carry: zeros at every reset."""
    belief, state = rssm.pack(*rssm.initial(1, torch.device("cpu")))
    return TensorDictPrimer(
        belief=Unbounded(belief.shape[1:], dtype=belief.dtype),
        state=Unbounded(state.shape[1:], dtype=state.dtype),
        random=False,
        default_value=0,
        expand_specs=True,
    )


def make_record(
    env_spec: EnvSpec, observation_keys: Sequence[str], codec: ActionCodec, primers: TensorDictPrimer | None = None
) -> TensorDict:
    """One record of zeros, as :class:`ToRecords` makes them: the layout of the replay.

    Args:
        env_spec, observation_keys, codec: Of what a record consists.
        primers: What environments carry and records keep; None for nothing.
    """
    record = {key: env_spec.observation[key].zero() for key in observation_keys}
    record |= {"action": torch.zeros(codec.size), "reward": torch.zeros(1)}
    record |= {key: torch.zeros(1, dtype=torch.bool) for key in ("is_init", "terminated", "done")}
    carried = {} if primers is None else primers.primers
    return TensorDict(record | {key: spec.zero() for key, spec in carried.items()})


class ToRecords:
    """Turn collected transitions into replay records; see :mod:`dreamer.replay` for what belongs to a record.

    Every row gives the record of its root observation, with the action and reward that led to it, and what the policy
    found there. A row that ends an episode gives a second record, of the last observation.

    Args:
        observation_keys: What to keep of an observation, and what environments carry from the action that led to it.
        codec: For the actions.
        carried: What the policy found at an observation and environments carry on; zero in a last record, where it
            was not asked.
    """

    def __init__(
        self, observation_keys: Sequence[str], codec: ActionCodec, carried: Sequence[str] = ("belief", "state")
    ):
        self.observation_keys, self.codec, self.carried = tuple(observation_keys), codec, tuple(carried)

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        rows = batch.reshape(-1)  # [n]
        following = rows["next"]
        roots = self._record(rows, rows["previous_action"], rows["previous_reward"])
        roots["action"] = roots["action"] * ~rows["is_init"]  # class number 0 is no zero vector
        roots.update({"is_init": rows["is_init"]} | {key: following[key] for key in self.carried})
        ends = following["done"].squeeze(-1).nonzero().squeeze(-1)  # [m]
        final = following[ends]
        lasts = self._record(final, rows["action"][ends], final["reward"])
        lasts.update({key: torch.zeros_like(roots[key][ends]) for key in ("is_init", *self.carried)})
        lasts.update(final.select("terminated", "done"))
        order = torch.cat([torch.arange(len(rows)) * 2, ends * 2 + 1])  # a last record follows its row
        order = order + rows.shape[0] * 2 * torch.cat([rows["stream"], rows["stream"][ends]]).squeeze(-1)
        return torch.cat([roots, lasts])[order.argsort()]  # [R], in time order within each stream

    def _record(self, observed: TensorDictBase, action: Tensor, reward: Tensor) -> TensorDict:
        never = torch.zeros_like(observed["done"])
        record = {key: observed[key] for key in (*self.observation_keys, "stream")}
        record |= {"action": self.codec.encode(action), "reward": reward, "terminated": never, "done": never}
        return TensorDict(record, observed.batch_size)
