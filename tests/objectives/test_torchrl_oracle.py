"""TorchRL's own DreamerV3 pieces, where they are the same algorithm, as a second opinion: values and gradients."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules import IndependentNormal, RSSMPosteriorV3, RSSMPriorV3, RSSMRolloutV3, SymExpTwoHot
from torchrl.objectives import (
    DreamerV3ValueLoss,
    SoftUpdate,
    categorical_kl_terms,
    two_hot_cross_entropy,
    two_hot_decode,
    two_hot_encode,
)
from torchrl.objectives.value.functional import td_lambda_return_estimate

from dreamer.models.heads import BoundedNormal
from dreamer.models.rssm import RSSM, mix_uniform
from objectives.functional import (
    NUM_BINS,
    kl_terms,
    lambda_return,
    replay_critic_terms,
    symexp_bins,
    twohot_mean,
    twohot_nll,
)

UNIMIX = 0.01
BATCH, STEPS, ACTION, EMBED = 3, 6, 2, 10
SIZES = {"belief_size": 32, "hidden_size": 8, "categoricals": 4, "classes": 5}
STATE = SIZES["categoricals"] * SIZES["classes"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Compare in units of the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_kl_terms(scale):
    raw = scale * torch.randn(2, 4, 7, 8, 5)
    posterior, prior = raw.clone().requires_grad_()
    theirs = categorical_kl_terms(posterior, prior, free_nats=1.0, unimix=UNIMIX)
    expected = torch.autograd.grad(theirs[0] + 0.1 * theirs[1], (posterior, prior))
    ours = [term.mean() for term in kl_terms(*(mix_uniform(x, UNIMIX).log() for x in (posterior, prior)))]
    actual = torch.autograd.grad(ours[0] + 0.1 * ours[1], (posterior, prior))
    for mine, their in zip((*ours, *actual), (*theirs, *expected), strict=True):
        assert_close(mine, their)


def test_bins():
    bins = SymExpTwoHot(NUM_BINS).bins
    assert torch.equal(symexp_bins(), bins)


def test_twohot_weights_and_cross_entropy():
    bins = symexp_bins()
    scales = torch.logspace(-6, 11, 400)  # beyond the last bin as well
    target = torch.cat([scales, -scales, bins, torch.zeros(1)])
    logits = torch.randn(len(target), NUM_BINS, requires_grad=True)
    theirs, ours = two_hot_cross_entropy(logits, target, bins), twohot_nll(logits, target, bins)
    assert_close(ours, theirs)
    expected, actual = (torch.autograd.grad(loss.sum(), logits)[0] for loss in (theirs, ours))
    assert_close(actual, expected, 2e-6)
    assert_close(torch.softmax(logits, -1) - actual, two_hot_encode(target, bins), 2e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0])
def test_twohot_mean(scale):
    bins, logits = symexp_bins(), scale * torch.randn(200, NUM_BINS)
    magnitude = (torch.softmax(logits, -1) * bins.abs()).sum(-1)
    error = (twohot_mean(logits, bins) - two_hot_decode(logits, bins)).abs()
    assert (error <= 1e-6 * magnitude).all()
    assert scale or not error.any()


def test_bounded_normal():
    mean, std = torch.randn(50, ACTION).tanh(), torch.rand(50, ACTION) * 0.9 + 0.1
    theirs, ours = IndependentNormal(mean, std), BoundedNormal(mean, std)
    action = theirs.sample()
    assert_close(ours.log_prob(action), theirs.log_prob(action))
    assert_close(ours.entropy(), theirs.entropy())


class Linear(nn.Linear):
    """A critic of one layer whose logits are not all alike."""

    def __init__(self):
        super().__init__(EMBED, NUM_BINS)
        nn.init.normal_(self.weight, std=2.0)


def test_replay_critic():
    """Two-hot critic loss on replayed steps, with episodes that end and that are cut off inside the window."""
    critic = TensorDictSequential(
        TensorDictModule(Linear(), ["feature"], ["state_value_logits"]),
        TensorDictModule(SymExpTwoHot(NUM_BINS), ["state_value_logits"], ["state_value"]),
    )
    theirs = DreamerV3ValueLoss(critic, "two_hot", slow_critic_regularization=1.0)
    SoftUpdate(theirs, tau=0.02)  # it warns without
    slow = Linear()
    for name, parameter in (("weight", slow.weight), ("bias", slow.bias)):
        theirs.target_value_model_params["module", "0", "module", name].data.copy_(parameter)
    feature = torch.randn(BATCH, STEPS, EMBED, requires_grad=True)
    reward, bootstrap = torch.randn(BATCH, STEPS, 1), torch.randn(BATCH, STEPS)
    terminated, done = torch.zeros(2, BATCH, STEPS, 1, dtype=torch.bool)
    terminated[0, 2] = done[0, 2] = done[1, 3] = done[2, 0] = terminated[2, STEPS - 1] = done[2, STEPS - 1] = True
    following = {"reward": reward, "done": done, "terminated": terminated}
    sample = TensorDict({"feature": feature, "bootstrap": bootstrap, "next": following}, [BATCH, STEPS])
    expected = theirs.replay_value_loss(sample, horizon=333.0, lmbda=0.95)["loss_replay_value"]

    parameters = theirs.value_model_params["module", "0", "module"]
    logits = nn.functional.linear(feature, parameters["weight"], parameters["bias"])
    terms = replay_critic_terms(
        reward=reward.squeeze(-1),
        terminated=terminated.squeeze(-1),
        last=done.squeeze(-1),
        bootstrap=bootstrap,
        value_logits=logits,
        slow_value=twohot_mean(slow(feature), symexp_bins()).detach(),
        bins=symexp_bins(),
    )
    assert_close(terms.mean(), expected)
    gradients = (torch.autograd.grad(loss, feature)[0] for loss in (terms.mean(), expected))
    assert_close(*gradients)


def test_lambda_return():
    """Imagined returns; TorchRL takes the continuation of each step as its discount."""
    reward, continuation, value = torch.rand(3, BATCH, STEPS).unbind()
    following = [x[:, 1:, None] for x in (continuation, value, reward)]
    never = torch.zeros(BATCH, STEPS - 1, 1, dtype=torch.bool)
    gamma, next_value, next_reward = following
    expected = td_lambda_return_estimate(gamma, 0.95, next_value, next_reward, never, never, rolling_gamma=True)
    assert_close(lambda_return(reward, continuation, value, 0.95), expected.squeeze(-1))


@pytest.fixture
def models() -> tuple[RSSM, RSSMPriorV3, RSSMPosteriorV3]:
    """Our RSSM and TorchRL's two networks with the same random weights."""
    ours = RSSM(embed_size=EMBED, action_size=ACTION, unimix=UNIMIX, blocks=8, **SIZES)
    latent = {
        "hidden_dim": SIZES["hidden_size"],
        "rnn_hidden_dim": SIZES["belief_size"],
        "num_categoricals": SIZES["categoricals"],
        "num_classes": SIZES["classes"],
        "unimix": UNIMIX,
    }
    prior = RSSMPriorV3(action_shape=(ACTION,), action_dim=ACTION, recurrent_model="block_gru", **latent)
    posterior = RSSMPosteriorV3(obs_embed_dim=EMBED, use_rms_norm=True, **latent)
    pairs = list(zip(theirs_in_our_order(prior, posterior), ours.parameters(), strict=True))
    with torch.no_grad():
        for their, mine in pairs:
            assert their.shape == mine.shape
            mine.copy_(their.copy_(their + 0.1 * torch.randn_like(their)))  # also what starts at 0 or 1
    return ours, prior, posterior


def theirs_in_our_order(prior: RSSMPriorV3, posterior: RSSMPosteriorV3) -> list[nn.Parameter]:
    core = prior.rnn
    modules = [core.belief_projection, core.state_projection, core.action_projection, core.hidden_layers, core.gates]
    modules += [prior.rnn_to_prior_projector, posterior.obs_rnn_to_post_projector]
    return [parameter for module in modules for parameter in module.parameters()]


def with_unimix(logits: Tensor) -> Tensor:
    return mix_uniform(logits, UNIMIX).log()


def to_noise(state: Tensor) -> Tensor:
    """The noise with which we draw the same one-hots."""
    return state.detach().unflatten(-1, (SIZES["categoricals"], SIZES["classes"]))


def test_core(models):
    """One step of the block GRU with actions outside [-1, 1]."""
    ours, prior, _ = models
    belief, state = torch.randn(BATCH, SIZES["belief_size"]), torch.rand(BATCH, STATE)
    action = 2 * torch.randn(BATCH, ACTION)
    inputs = [x.requires_grad_() for x in (belief, state, action)]
    theirs = prior.rnn(state, belief, action)
    mine = ours.core(1, BATCH)(belief, state, ours.action_branch(action))
    assert_close(mine, theirs)
    weight = torch.randn_like(theirs)
    gradients = [torch.autograd.grad((x * weight).sum(), inputs) for x in (mine, theirs)]
    for actual, expected in zip(*gradients, strict=True):
        assert_close(actual, expected)


def test_observe(models):
    """A rollout over a reset: model states, both logits, and the gradients of every weight and input."""
    ours, prior, posterior = models
    rollout = RSSMRolloutV3(
        TensorDictModule(
            prior, ["state", "belief", "action"], [("next", key) for key in ("prior_logits", "state", "belief")]
        ),
        TensorDictModule(
            posterior,
            [("next", "belief"), ("next", "encoded_latents")],
            [("next", "posterior_logits"), ("next", "state")],
        ),
    )
    embed, action = torch.randn(BATCH, STEPS, EMBED), torch.randn(BATCH, STEPS, ACTION)
    belief, state = torch.randn(BATCH, STEPS, SIZES["belief_size"]), torch.rand(BATCH, STEPS, STATE)  # step 0 is used
    is_init = torch.zeros(BATCH, STEPS, 1, dtype=torch.bool)
    is_init[0, 3] = is_init[1, 0] = True
    inputs = [x.requires_grad_() for x in (embed, action, belief, state)]
    sequence = {"belief": belief, "state": state, "action": action, "is_init": is_init}
    theirs = rollout(TensorDict(sequence | {"next": {"encoded_latents": embed}}, [BATCH, STEPS]))["next"]
    expected = [theirs["belief"], theirs["state"]]
    expected += [with_unimix(theirs[key]) for key in ("posterior_logits", "prior_logits")]
    actual = ours.observe(embed, action, is_init, belief[:, 0], state[:, 0], to_noise(theirs["state"]))
    for mine, their in zip(actual, expected, strict=True):
        assert_close(mine, their)

    weights = [torch.randn_like(x) for x in expected]
    parameters = list(ours.parameters()), theirs_in_our_order(prior, posterior)
    gradients = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(outputs, weights, strict=True)), [*inputs, *of])
        for outputs, of in zip((actual, expected), parameters, strict=True)
    ]
    for mine, their in zip(*gradients, strict=True):
        assert_close(mine, their, 3e-5)


def test_imagine(models):
    """Steps of the prior under given actions."""
    ours, prior, _ = models
    belief, state = torch.randn(BATCH, SIZES["belief_size"]), torch.rand(BATCH, STATE)
    actions = torch.randn(BATCH, STEPS, ACTION)
    features = [torch.cat([belief, state], -1)]
    with torch.no_grad():
        for action in actions.unbind(1):
            _, state, belief = prior(state, belief, action)
            features.append(torch.cat([belief, state], -1))
    expected = torch.stack(features, 1)
    start, drawn = expected.split([SIZES["belief_size"], STATE], -1)
    imagined = ours.imagine(lambda _, t: actions[:, t], start[:, 0], drawn[:, 0], STEPS, to_noise(drawn[:, 1:]))
    assert_close(imagined.feature, expected)
