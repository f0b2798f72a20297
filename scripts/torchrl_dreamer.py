"""DreamerV3 out of the parts that TorchRL 0.14 ships, set as the reference is: the other side of the benchmarks.

The keys are those with which `RSSMRolloutV3` works on plain tensors, the faster of its two paths. What differs from
the reference is TorchRL's: convolutions of stride two, no sigmoid after the decoder, windows that end with an episode.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import Tensor, nn
from torchrl.data import (
    Bounded,
    Composite,
    LazyTensorStorage,
    SliceSampler,
    TensorDictReplayBuffer,
    TensorDictRoundRobinWriter,
    Unbounded,
)
from torchrl.envs import TensorDictPrimer
from torchrl.envs.model_based import DreamerEnv
from torchrl.modules import (
    DreamerV3ImageDecoder,
    DreamerV3ImageEncoder,
    DreamerV3MLP,
    IndependentNormal,
    RSSMPosteriorV3,
    RSSMPriorV3,
    RSSMRolloutV3,
    RSSMStateEstimatorV3,
    SymExpTwoHot,
    WorldModelWrapper,
)
from torchrl.modules.functional import symlog
from torchrl.objectives import DreamerV3ActorLoss, DreamerV3Loss, DreamerV3ModelLoss, DreamerV3ValueLoss, SoftUpdate
from torchrl.objectives.utils import ValueEstimators
from torchrl.trainers.algorithms import DreamerV3OptimizationStepper, DreamerV3Optimizer

NUM_BINS = 255
DISCOUNT = 1 - 1 / 333
LMBDA = 0.95
UNIMIX = 0.01
FEATURE = ["belief", "state"]
NEXT_FEATURE = [("next", "belief"), ("next", "state")]
PARAMETERS = ["loc", "scale"]


class Float32(nn.Module):
    """A network whose output is float32 under autocast as well."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs).float()


class Symlog(nn.Module):
    """x -> sign(x) ln(1 + |x|)."""

    def forward(self, x: Tensor) -> Tensor:
        return symlog(x)


class Actor(nn.Module):
    """Feature to mean and spread of a bounded normal. TorchRL has no continuous actor of DreamerV3."""

    def __init__(self, feature_size: int, action_size: int, units: int):
        super().__init__()
        self.mlp = DreamerV3MLP(feature_size, None, depth=3, num_cells=units)
        self.mean = DreamerV3MLP(units, action_size, depth=0, outscale=0.01)
        self.std = DreamerV3MLP(units, action_size, depth=0, outscale=0.01)

    def forward(self, belief: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        x = self.mlp(belief, state)
        return self.mean(x).float().tanh(), 0.9 * torch.sigmoid(self.std(x).float() + 2) + 0.1


class ActingParts(NamedTuple):
    """The networks that act; the world model shares all of them."""

    encoder: nn.Module
    prior: RSSMPriorV3
    posterior: RSSMPosteriorV3
    actor: ProbabilisticTensorDictSequential


def latent_sizes(size: Mapping[str, int]) -> dict[str, int]:
    """Widths of the model state by key."""
    return {"belief": size["belief_size"], "state": size["categoricals"] * size["classes"]}


def make_acting_parts(size: Mapping[str, int], observation: tuple[int, ...], action_size: int) -> ActingParts:
    """Build the networks that act.

    Args:
        size: Size preset, `configs/agent/size/*.yaml`.
        observation: Shape of an observation: an image (C, h, w) or a vector (O,).
        action_size: Number of action dimensions.
    """
    units = size["units"]
    if len(observation) == 3:
        encoder = DreamerV3ImageEncoder(observation[0], depth=size["depth"])
        embed_size = encoder.output_features(observation)
    else:
        encoder, embed_size = nn.Sequential(Symlog(), DreamerV3MLP(*observation, None, num_cells=units)), units
    latent = {
        "hidden_dim": size["hidden_size"],
        "rnn_hidden_dim": size["belief_size"],
        "num_categoricals": size["categoricals"],
        "num_classes": size["classes"],
        "unimix": UNIMIX,
    }
    prior = RSSMPriorV3(action_shape=(action_size,), action_dim=action_size, recurrent_model="block_gru", **latent)
    posterior = RSSMPosteriorV3(obs_embed_dim=embed_size, use_rms_norm=True, **latent)
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(Actor(sum(latent_sizes(size).values()), action_size, units), FEATURE, PARAMETERS),
        ProbabilisticTensorDictModule(
            PARAMETERS,
            ["action"],
            default_interaction_type="random",
            distribution_class=IndependentNormal,
            distribution_kwargs={"validate_args": False},
        ),
    )
    return ActingParts(encoder, prior, posterior, actor)


def make_policy(parts: ActingParts, observation_key: str) -> TensorDictSequential:
    """The recurrent acting policy; its state travels through the environment, see :func:`make_primer`."""
    carried = ["state", "belief", "action"]
    return TensorDictSequential(
        TensorDictModule(parts.encoder, [observation_key], ["encoded_latents"]),
        RSSMStateEstimatorV3(parts.prior, parts.posterior),
        parts.actor,
        TensorDictModule(
            lambda *values: values, carried, [("next", "state"), ("next", "belief"), ("next", "previous_action")]
        ),
    )


def make_primer(size: Mapping[str, int], action_size: int) -> TensorDictPrimer:
    """The recurrent state of :func:`make_policy`: zeros at every reset."""
    widths = latent_sizes(size) | {"previous_action": action_size}
    specs = {key: Unbounded(width) for key, width in widths.items()}
    return TensorDictPrimer(random=False, default_value=0, expand_specs=True, **specs)


def make_loss(parts: ActingParts, size: Mapping[str, int], image: tuple[int, int, int]) -> DreamerV3Loss:
    """Build the whole objective on images (C, h, w)."""
    feature_size, units = sum(latent_sizes(size).values()), size["units"]
    decoder = DreamerV3ImageDecoder(feature_size, image, depth=size["depth"])
    reward = Float32(DreamerV3MLP(feature_size, NUM_BINS, depth=1, num_cells=units, outscale=0.0))
    continuation = Float32(DreamerV3MLP(feature_size, 1, depth=1, num_cells=units))
    value = TensorDictSequential(
        TensorDictModule(
            Float32(DreamerV3MLP(feature_size, NUM_BINS, depth=3, num_cells=units, outscale=0.0)),
            FEATURE,
            ["state_value_logits"],
        ),
        TensorDictModule(SymExpTwoHot(NUM_BINS), ["state_value_logits"], ["state_value"]),
    )
    world_model = TensorDictSequential(
        TensorDictModule(parts.encoder, [("next", "pixels")], [("next", "encoded_latents")]),
        RSSMRolloutV3(
            TensorDictModule(
                parts.prior,
                ["state", "belief", "action"],
                [("next", "prior_logits"), ("next", "state"), ("next", "belief")],
            ),
            TensorDictModule(
                parts.posterior,
                [("next", "belief"), ("next", "encoded_latents")],
                [("next", "posterior_logits"), ("next", "state")],
            ),
        ),
        TensorDictModule(Float32(decoder), NEXT_FEATURE, [("next", "reco_pixels")]),
        TensorDictModule(reward, NEXT_FEATURE, [("next", "reward_logits")]),
        TensorDictModule(continuation, NEXT_FEATURE, [("next", "continue_pred")]),
    )
    model_loss = DreamerV3ModelLoss(
        world_model,
        lambda_continue=1.0,
        continue_target_scale=DISCOUNT,
        kl_mode="separate",
        unimix=UNIMIX,
        reco_symlog=False,
        detach_output=False,
    )
    actor_loss = DreamerV3ActorLoss(
        parts.actor,
        value,
        make_imagination_env(parts, reward, size),
        continuation_model=TensorDictSequential(
            TensorDictModule(continuation, FEATURE, ["continue_logits"]),
            TensorDictModule(nn.Sigmoid(), ["continue_logits"], ["continuation"]),
        ),
        use_reinforce=True,
    )
    actor_loss.make_value_estimator(ValueEstimators.TDLambda, gamma=1.0, lmbda=LMBDA)  # the discount is learned
    value_loss = DreamerV3ValueLoss(value, "two_hot", actor_loss=actor_loss, slow_critic_regularization=1.0)
    return DreamerV3Loss(model_loss, actor_loss, value_loss, lmbda=LMBDA)


def make_imagination_env(parts: ActingParts, reward: nn.Module, size: Mapping[str, int]) -> DreamerEnv:
    """The prior and the reward head as an environment; the actor loss rolls it out."""
    model = WorldModelWrapper(
        TensorDictModule(parts.prior, ["state", "belief", "action"], ["_", "state", "belief"]),
        TensorDictSequential(
            TensorDictModule(reward, FEATURE, ["reward_logits"]),
            TensorDictModule(SymExpTwoHot(NUM_BINS), ["reward_logits"], ["reward"]),
        ),
    )
    widths = latent_sizes(size)
    device = next(parts.prior.parameters()).device
    env = DreamerEnv(model, (widths["state"],), (widths["belief"],), device=device)
    env.observation_spec = Composite({key: Unbounded(width, device=device) for key, width in widths.items()})
    env.state_spec = env.observation_spec.clone()
    env.action_spec = Bounded(-1, 1, (*parts.prior.action_shape,), device=device)
    env.reward_spec = Unbounded((1,), device=device)
    return env


def fill_replay(
    replay: TensorDictReplayBuffer, size: Mapping[str, int], image: tuple[int, int, int], action_size: int, episode: int
) -> None:
    """Fill the replay with episodes of random images and actions; images are stored once, latents as float32."""
    flag = torch.zeros(1, dtype=torch.bool)
    after = {"pixels": torch.zeros(image, dtype=torch.uint8), "reward": torch.zeros(1), "done": flag}
    latents = {key: torch.zeros(width) for key, width in latent_sizes(size).items()}
    action = torch.zeros(action_size)
    record = TensorDict(latents | {"action": action, "is_init": flag, "next": after | {"terminated": flag}})
    records = record.expand(episode).clone()
    records["next", "pixels"].random_(256)
    records["action"].uniform_(-1, 1)
    records["is_init"][0] = records["next", "done"][-1] = True
    while replay.write_count < replay.storage.max_size:
        replay.extend(records)


def make_replay(
    capacity: int, batch_size: int, sequence_length: int, *, prefetch: int = 0, pin: bool = False
) -> TensorDictReplayBuffer:
    """A replay whose windows come out as they were stored.

    Left at their defaults, `truncated_key` and `init_key` mark the ends of every window as ends of an episode. A window
    has one record more than is trained on: it takes the last of the new latents.
    """
    sampler = SliceSampler(
        slice_len=sequence_length + 1, end_key=("next", "done"), cache_values=True, truncated_key=None, init_key=None
    )
    return TensorDictReplayBuffer(
        storage=LazyTensorStorage(capacity),
        sampler=sampler,
        writer=TensorDictRoundRobinWriter(track_generations=True),
        batch_size=batch_size * (sequence_length + 1),
        prefetch=prefetch or None,
        pin_memory=pin,
    )


def make_stepper(
    size: Mapping[str, int],
    image: tuple[int, int, int],
    action_size: int,
    *,
    device: torch.device,
    bfloat16: bool,
    compile: bool = False,
    cudagraph: bool = False,
    **optimizer: float,
) -> DreamerV3OptimizationStepper:
    """Build networks, loss, optimiser and stepper. `optimizer` is passed on to :class:`DreamerV3Optimizer`."""
    with device:
        parts = make_acting_parts(size, image, action_size)
        loss = make_loss(parts, size, image).to(device)
    for module in loss.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):  # a few percent faster, a fifth in bfloat16
            module.to(memory_format=torch.channels_last)
    if bfloat16 and device.type == "cpu":  # the stepper's own switch is for GPUs only
        loss.forward = torch.autocast("cpu", torch.bfloat16)(loss.forward)
    return DreamerV3OptimizationStepper(
        loss,
        DreamerV3Optimizer(loss.parameters(), **optimizer),
        SoftUpdate(loss.value_loss, tau=0.02),
        compile_train_step=compile,
        cudagraph=cudagraph,
        mixed_precision=bfloat16,
    )


class Update:
    """One full update: sample, optimise, write the new latents back.

    Args:
        stepper: From :func:`make_stepper`.
        replay: From :func:`make_replay`.
        sequence_length: T.
        device: Of the learner.
    """

    def __init__(
        self,
        stepper: DreamerV3OptimizationStepper,
        replay: TensorDictReplayBuffer,
        sequence_length: int,
        device: torch.device,
    ):
        self.stepper, self.replay, self.sequence_length, self.device = stepper, replay, sequence_length, device
        self.write_back = replay.submit_update_if_present if device.type == "cuda" else replay.update_if_present

    def sample(self) -> tuple[TensorDictBase, dict[str, Tensor]]:
        """A batch [B, T] on the device, and the records that take its latents [B * T]."""
        windows = self.replay.sample().view(-1, self.sequence_length + 1)  # [B, T + 1]
        keys = {"index": "index", "generation": "index_generation"}
        handles = {name: windows[key][:, 1:].flatten() for name, key in keys.items()}
        return windows[:, :-1].exclude(*keys.values()).to(self.device, non_blocking=True), handles

    def __call__(self) -> None:
        batch, handles = self.sample()
        self.stepper.step(None, batch)
        self.write_back(patch=batch["replay_context"].flatten(0, 1).float(), **handles)
