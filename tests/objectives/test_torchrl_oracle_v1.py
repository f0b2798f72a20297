"""TorchRL's own Dreamer (V1) classes, where they are the same algorithm, as a second opinion: values and gradients.

What differs there, and is set or left aside here: standard deviations are cut off at 0.1 and not raised by it, squared
errors have no half, the sum over the horizon is not divided by it, a value does not include the reward of its state,
the actor's gradient also passes through the features that it reads, and `DreamerActorLoss.lambda_target` takes the last
axis, of size one, for time: its returns end after one step.
"""

from collections.abc import Iterator

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs.model_based import DreamerEnv
from torchrl.modules import RSSMPosterior, RSSMPrior, RSSMRollout, TanhNormal, WorldModelWrapper
from torchrl.objectives import DreamerActorLoss, DreamerModelLoss, DreamerValueLoss
from torchrl.objectives.utils import ValueEstimators
from torchrl.objectives.value.functional import td_lambda_return_estimate

from dreamer.models.gaussian_rssm import GaussianRSSM
from dreamer.models.heads_v1 import Head, TanhNormalActor
from dreamer.models.world_model import WorldModel
from objectives import DreamerV1ModelLoss, DynamicsActorValueLoss
from objectives.functional import lambda_return

BATCH, STEPS, ACTION, EMBED, BELIEF, STATE, HORIZON = 3, 5, 2, 10, 8, 4, 6
IMAGE = (4, 4, 3)
FEATURE = BELIEF + STATE


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Compare in units of the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


class GivenNoise(nn.Module):
    """One of TorchRL's networks with the noise of each call."""

    def __init__(self, net: nn.Module, noise: Iterator[Tensor]):
        super().__init__()
        self.net, self.noise = net, noise

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.net(*inputs, noise=next(self.noise))


class OnFeature(nn.Module):
    """A network on the feature that reads state and belief."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, state: Tensor, belief: Tensor) -> Tensor:
        return self.net(torch.cat([belief, state], -1))


class Encoder(nn.Linear):
    """Images as bytes, or as numbers up to 1."""

    out_features = EMBED

    def forward(self, image: Tensor) -> Tensor:
        return super().forward((image.float() / 255 if image.dtype == torch.uint8 else image).flatten(-3) - 0.5)


class Decoder(nn.Linear):
    def forward(self, belief: Tensor, state: Tensor) -> Tensor:
        return super().forward(torch.cat([belief, state], -1)).unflatten(-1, IMAGE)


class Models:
    """Our RSSM and TorchRL's two networks with the same random weights."""

    def __init__(self):
        self.ours = GaussianRSSM(
            embed_size=EMBED,
            action_size=ACTION,
            belief_size=BELIEF,
            state_size=STATE,
            hidden_size=BELIEF,
            min_std=0.0,
        )
        latent = {"hidden_dim": BELIEF, "rnn_hidden_dim": BELIEF, "state_dim": STATE, "scale_lb": 1e-6}
        self.prior = RSSMPrior(Bounded(-1, 1, (ACTION,)), action_dim=ACTION, **latent)
        self.posterior = RSSMPosterior(obs_embed_dim=EMBED, **latent)
        with torch.no_grad():
            for parameter in self.ours.parameters():
                parameter.normal_(std=0.4)
            for mine, their in zip(self.ours.parameters(), self.theirs(), strict=True):
                their.copy_(reorder(mine, their))

    def theirs(self) -> list[nn.Parameter]:
        """In the order of our parameters."""
        prior, rnn = self.prior, self.prior.rnn
        return [
            *prior.action_state_projector.parameters(),
            *(rnn.weight_ih, rnn.bias_ih, rnn.weight_hh, rnn.bias_hh),
            *prior.rnn_to_prior_projector.parameters(),
            *self.posterior.obs_rnn_to_post_projector.parameters(),
        ]

    def rollout(self, noise: Tensor) -> RSSMRollout:
        """TorchRL's filter with ``noise`` [B, T, Z] for the posterior; the sample of the prior is not used."""
        no_noise = iter(torch.zeros(STEPS, BATCH, STATE))
        prior = TensorDictModule(
            GivenNoise(self.prior, no_noise),
            ["state", "belief", "action"],
            [("next", "prior_mean"), ("next", "prior_std"), "_", ("next", "belief")],
        )
        posterior = TensorDictModule(
            GivenNoise(self.posterior, iter(noise.unbind(1))),
            [("next", "belief"), ("next", "encoded_latents")],
            [("next", key) for key in ("posterior_mean", "posterior_std", "state")],
        )
        return RSSMRollout(prior, posterior)


def reorder(mine: Tensor, their: Tensor) -> Tensor:
    """Gates of a GRU: update, reset, candidate here; reset, update, candidate there."""
    assert mine.shape == their.shape
    if len(mine) != 3 * BELIEF:
        return mine
    update, reset, candidate = mine.chunk(3)
    return torch.cat([reset, update, candidate])


@pytest.fixture
def models() -> Models:
    return Models()


def assert_same_gradients(models: Models, ours: Tensor, theirs: Tensor, shared: list[nn.Parameter]) -> None:
    mine, their = list(models.ours.parameters()), models.theirs()
    used = [
        i
        for i, g in enumerate(torch.autograd.grad(theirs, their, retain_graph=True, allow_unused=True))
        if g is not None
    ]
    expected = torch.autograd.grad(theirs, [*(their[i] for i in used), *shared])
    actual = torch.autograd.grad(ours, [*(mine[i] for i in used), *shared])
    for a, e in zip(actual, expected, strict=True):
        assert_close(reorder(a, e), e, 5e-5)
    assert len(used) >= 7


def test_observe(models):
    embed, action = torch.randn(BATCH, STEPS, EMBED), torch.randn(BATCH, STEPS, ACTION)
    belief, state = torch.randn(BATCH, STEPS, BELIEF), torch.randn(BATCH, STEPS, STATE)  # step 0 is used
    noise = torch.randn(BATCH, STEPS, STATE)
    sequence = {"belief": belief, "state": state, "action": action, "next": {"encoded_latents": embed}}
    theirs = models.rollout(noise)(TensorDict(sequence, [BATCH, STEPS]))["next"]
    never = torch.zeros(BATCH, STEPS, 1, dtype=torch.bool)
    ours = models.ours.observe(embed, action, never, belief[:, 0], state[:, 0], noise)
    weighted = [], []
    for name, value in ours._asdict().items():
        assert_close(value, theirs[name])
        weight = torch.randn_like(value)
        for terms, of in zip(weighted, (value, theirs[name]), strict=True):
            terms.append((weight * of).sum())
    assert_same_gradients(models, sum(weighted[0]), sum(weighted[1]), [])


@pytest.mark.parametrize("free_nats", [0.0, 100.0])
def test_model_loss(models, free_nats):
    encoder, decoder = Encoder(48, EMBED), Decoder(FEATURE, 48)
    reward = Head(FEATURE, 1, units=7, layers=2)
    noise = torch.randn(BATCH, STEPS, STATE)
    world_model = TensorDictSequential(
        TensorDictSequential(
            TensorDictModule(encoder, [("next", "pixels")], [("next", "encoded_latents")]),
            models.rollout(noise),
            TensorDictModule(decoder, [("next", "belief"), ("next", "state")], [("next", "reco_pixels")]),
        ),
        TensorDictModule(OnFeature(reward), [("next", "state"), ("next", "belief")], [("next", "reward")]),
    )
    loss = DreamerModelLoss(world_model, lambda_reco=0.5, lambda_reward=0.5, free_nats=free_nats, delayed_clamp=True)
    pixels = torch.randint(256, (BATCH, STEPS, *IMAGE), dtype=torch.uint8)
    action, rewards = torch.randn(BATCH, STEPS, ACTION), torch.randn(BATCH, STEPS, 1)
    start = {"belief": torch.zeros(BATCH, STEPS, BELIEF), "state": torch.zeros(BATCH, STEPS, STATE)}
    following = {"pixels": pixels / 255, "reward": rewards}
    theirs, _ = loss(TensorDict(start | {"action": action, "next": following}, [BATCH, STEPS]))

    ours = DreamerV1ModelLoss(
        WorldModel(
            encoders={"pixels": encoder},
            rssm=models.ours,
            decoders={"pixels": decoder},
            reward_head=reward,
            continue_head=None,
        ),
        free_nats=free_nats,
    )
    observe = models.ours.observe
    models.ours.observe = lambda *inputs: observe(*inputs, noise=noise)
    never = {key: torch.zeros(BATCH, STEPS, 1, dtype=torch.bool) for key in ("is_init", "terminated")}
    batch = {"pixels": pixels, "action": action, "reward": rewards, **never}
    losses = ours(TensorDict(batch, [BATCH, STEPS]))
    for name in ("loss_model_kl", "loss_model_reco", "loss_model_reward"):
        assert_close(losses[name], theirs[name].squeeze())
    totals = [sum(of[name].sum() for name in theirs.keys()) for of in (losses, theirs)]  # noqa: SIM118
    shared = [parameter for net in (encoder, decoder, reward) for parameter in net.parameters()]
    assert_same_gradients(models, *totals, shared)


class Imagining:
    """Our actor and value loss, TorchRL's two, and the noise of one imagined trajectory."""

    def __init__(self, models: Models):
        self.noise, self.action_noise = torch.randn(HORIZON, BATCH, STATE), torch.randn(HORIZON, BATCH, ACTION)
        self.models, self.reward = models, Head(FEATURE, 1, units=7, layers=2)
        self.actor, self.critic = TanhNormalActor(FEATURE, ACTION, units=7), Head(FEATURE, 1, units=7, layers=3)
        world_model = WorldModel(
            encoders={}, rssm=models.ours, decoders={}, reward_head=self.reward, continue_head=None
        )
        self.ours = DynamicsActorValueLoss(world_model, self.actor, self.critic, imagination_horizon=HORIZON)
        keys = ["state", "belief"]
        self.value_model = TensorDictModule(OnFeature(self.critic), keys, ["state_value"])
        transition = TensorDictModule(GivenNoise(models.prior, iter(self.noise)), [*keys, "action"], ["_", "_", *keys])
        env = DreamerEnv(
            WorldModelWrapper(transition, TensorDictModule(OnFeature(self.reward), keys, ["reward"])),
            prior_shape=(STATE,),
            belief_shape=(BELIEF,),
            batch_size=torch.Size([BATCH]),
        )
        env.observation_spec = Composite(
            state=Unbounded((BATCH, STATE)), belief=Unbounded((BATCH, BELIEF)), shape=(BATCH,)
        )
        env.action_spec, env.reward_spec = Bounded(-1, 1, (BATCH, ACTION)), Unbounded((BATCH, 1))
        action_noise = iter(self.action_noise)
        policy = TensorDictModule(
            lambda state, belief: self.actor(torch.cat([belief, state], -1)).rsample(next(action_noise)),
            keys,
            ["action"],
        )
        self.actor_loss = DreamerActorLoss(policy, self.value_model, env, imagination_horizon=HORIZON)
        self.actor_loss.make_value_estimator(ValueEstimators.TDLambda, gamma=0.99, lmbda=0.95)
        never = torch.zeros(BATCH, HORIZON, 1, dtype=torch.bool)
        self.actor_loss.lambda_target = lambda reward, value: td_lambda_return_estimate(
            0.99, 0.95, value, reward, never, never
        )
        self.start = torch.randn(BATCH, BELIEF), torch.randn(BATCH, STATE)

    def act(self, feature: Tensor, step: int) -> Tensor:
        """As TorchRL: the features carry gradients into the actor."""
        return self.actor(feature).rsample(self.action_noise[step])


def test_imagined_trajectories_and_the_gradient_of_the_actor(models):
    """Returns of the rewards on arriving, as TorchRL counts them, from the states that we imagine."""
    both = Imagining(models)
    belief, state = both.start
    theirs, fake = both.actor_loss(TensorDict({"belief": belief, "state": state}, [BATCH]))
    feature = models.ours.imagine(both.act, belief, state, HORIZON, both.noise.transpose(0, 1)).feature
    reward, value = both.reward(feature).squeeze(-1), both.critic(feature).squeeze(-1)  # [B, H + 1]
    assert_close(feature[:, :-1], torch.cat([fake["belief"], fake["state"]], -1))
    assert_close(reward[:, 1:], fake["next", "reward"].squeeze(-1))
    returns = lambda_return(reward, torch.full_like(reward, 0.99), value, 0.95)  # [B, H]
    assert_close(returns, fake["lambda_target"].squeeze(-1))
    ours = -(returns * 0.99 ** torch.arange(HORIZON)).sum(1).mean()
    assert_close(ours, theirs["loss_actor"])
    parameters = list(both.actor.parameters())
    for a, e in zip(*(torch.autograd.grad(of, parameters) for of in (ours, theirs["loss_actor"])), strict=True):
        assert_close(a, e, 5e-5)


def test_value_loss(models):
    """Ours has the half and the mean over the returns, of which there are one less than states."""
    both, seen = Imagining(models), []
    imagine, value = models.ours.imagine, both.ours.value
    models.ours.imagine = lambda *inputs: seen.append(imagine(*inputs)) or seen[-1]
    terms, _ = both.ours.terms(*both.start)
    feature = seen[0].feature[:, 1:].detach()
    reward = both.reward(feature).squeeze(-1)
    returns = lambda_return(reward.roll(1, 1), torch.full_like(reward, 0.99), value(feature), 0.95).detach()
    states = feature[:, :-1]
    fake = {"belief": states[..., :BELIEF], "state": states[..., BELIEF:], "lambda_target": returns[..., None]}
    theirs, _ = DreamerValueLoss(both.value_model)(TensorDict(fake, [BATCH, HORIZON - 1]))
    ours = terms["value"].mean()
    assert_close(2 * (HORIZON - 1) * ours, theirs["loss_value"])
    parameters = list(both.critic.parameters())
    gradients = [torch.autograd.grad(of, parameters) for of in (2 * (HORIZON - 1) * ours, theirs["loss_value"])]
    for a, e in zip(*gradients, strict=True):
        assert_close(a, e, 5e-5)


def test_the_distribution_of_actions():
    mean, std = 8 * torch.randn(50, ACTION), torch.rand(50, ACTION) + 0.1
    actor = TanhNormalActor(FEATURE, ACTION, units=7)
    ours = actor.distribution(torch.cat([mean, torch.zeros_like(std)], -1))
    theirs = TanhNormal(mean, ours.std, tanh_loc=True, upscale=5.0)
    assert_close(ours.mean, theirs.loc)
    action = ours.sample().clamp(-0.99, 0.99)
    assert_close(ours.log_prob(action), theirs.log_prob(action), 1e-4)
