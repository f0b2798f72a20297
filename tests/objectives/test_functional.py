"""The closed-form pieces of the losses against numbers worked out by hand."""

import math

import pytest
import torch
from torchrl.modules import PercentileValueNorm

from objectives.functional import (
    actor_critic_terms,
    categorical_entropy,
    categorical_kl,
    imagined_weight,
    kl_terms,
    lambda_return,
    replay_critic_terms,
    symexp_bins,
    twohot_mean,
    twohot_nll,
)

BINS = symexp_bins()
DISCOUNT = 1 - 1 / 333


def encode(target: float | torch.Tensor, bins: torch.Tensor = BINS) -> torch.Tensor:
    """Two-hot weights, read from the gradient of the loss at uniform logits: softmax - weights. float64."""
    target = torch.as_tensor(target, dtype=torch.float32)
    logits = torch.zeros(*target.shape, len(bins)).requires_grad_()
    twohot_nll(logits, target, bins).sum().backward()
    return 1 / len(bins) - logits.grad.double()


def nll(logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The plain cross entropy that `twohot_nll` must equal, in float64."""
    return -(weights.double() * torch.log_softmax(logits.double(), -1)).sum(-1)


class TestBins:
    def test_exactly_antisymmetric(self):
        """linspace(-20, 20, 255) misses 0 in the middle by 7e-8, and the two ends differ: values would be biased."""
        assert BINS.shape == (255,) and not (BINS + BINS.flip(0)).any() and BINS[127] == 0
        assert (BINS.diff() > 0).all()

    def test_range(self):
        """symexp(20) = e^20 - 1 = 4.85e8, beyond the 65504 of float16."""
        assert BINS.dtype == torch.float32
        assert BINS[-1].item() == pytest.approx(math.exp(20) - 1, rel=1e-6)
        assert BINS[128].item() == pytest.approx(math.exp(20 / 127) - 1, rel=1e-5)


class TestTwoHot:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("value", [0.0, 3.7])
    def test_uniform_logits_mean_exactly_zero(self, dtype, value):
        """A sum from left to right gives -0.3: every new critic would start wrong."""
        assert not twohot_mean(torch.full((4, 255), value, dtype=dtype), BINS).any()

    def test_mean_of_logits_in_general(self):
        torch.manual_seed(0)
        logits = torch.randn(100, 255)
        exact = (torch.softmax(logits.double(), -1) * BINS.double()).sum(-1)
        allowed = 1e-6 * (torch.softmax(logits.double(), -1) * BINS.abs()).sum(-1)
        assert ((twohot_mean(logits, BINS) - exact).abs() <= allowed).all()

    @pytest.mark.parametrize("target", [10.0, 0.5, -1234.5, 1e6])
    def test_interpolates_between_neighbours_in_raw_space(self, target):
        """The mean of the encoding of 10 is 10. Interpolated in symlog space it would be 10.025."""
        weights = encode(target)
        assert (weights > 1e-7).sum() <= 2
        assert weights.sum().item() == pytest.approx(1, abs=1e-6)
        lower = int(BINS.le(target).sum()) - 1
        low, high = BINS[lower].item(), BINS[lower + 1].item()
        assert weights[lower + 1].item() == pytest.approx((target - low) / (high - low), abs=1e-5)
        assert (weights[lower : lower + 2] * BINS[lower : lower + 2]).sum().item() == pytest.approx(target, rel=1e-5)

    def test_the_best_prediction_of_0_and_100_is_their_mean(self):
        """Cross entropy is least at the mean encoding, and its value is 50: the head is unbiased."""
        best = (encode(0.0) + encode(100.0)).div(2).clamp(min=0)
        assert (best * BINS).sum().item() == pytest.approx(50, rel=1e-4)
        logits = best.clamp(min=1e-30).log().float().requires_grad_()
        assert twohot_mean(logits, BINS).item() == pytest.approx(50, rel=1e-4)
        targets = torch.tensor([0.0, 100.0])
        gradient = torch.autograd.grad(twohot_nll(logits.expand(2, -1), targets, BINS).mean(), logits)[0]
        assert gradient.abs().max() < 1e-6

    def test_targets_on_a_bin_at_the_edges_and_beyond(self):
        """Weights stay finite and sum to one; a target on a bin puts all weight there, one outside on the last bin."""
        on_bins = encode(BINS.clone())
        assert torch.allclose(on_bins, torch.eye(255, dtype=torch.float64), atol=1e-6)
        beyond = encode(torch.tensor([-math.inf, -1e30, -5e8, 5e8, 1e30, math.inf]))
        assert beyond.isfinite().all()
        assert torch.allclose(beyond.sum(-1), torch.ones(6, dtype=torch.float64), atol=1e-6)
        assert beyond.argmax(-1).tolist() == [0, 0, 0, 254, 254, 254]
        assert torch.allclose(beyond.amax(-1), torch.ones(6, dtype=torch.float64), atol=1e-6)

    def test_loss_is_the_cross_entropy(self):
        torch.manual_seed(0)
        logits, targets = 3 * torch.randn(50, 255), 1000 * torch.randn(50)
        torch.testing.assert_close(
            twohot_nll(logits, targets, BINS).double(), nll(logits, encode(targets)), rtol=1e-5, atol=1e-5
        )
        assert twohot_nll(torch.zeros(255), torch.tensor(3.0), BINS).item() == pytest.approx(math.log(255), rel=1e-6)

    def test_no_gradient_for_the_target(self):
        target = torch.tensor([3.0], requires_grad=True)
        twohot_nll(torch.randn(1, 255).requires_grad_(), target, BINS).sum().backward()
        assert target.grad is None

    def test_bfloat16_logits_are_summed_in_float32(self):
        """Under autocast the layers give bfloat16; log-sum-exp over 255 bins in bfloat16 would be off by percents."""
        torch.manual_seed(0)
        logits, targets = 3 * torch.randn(50, 255).bfloat16(), 1000 * torch.randn(50)
        with torch.autocast("cpu", torch.bfloat16):
            loss, mean = twohot_nll(logits, targets, BINS), twohot_mean(logits, BINS)
        assert loss.dtype == mean.dtype == torch.float32
        torch.testing.assert_close(loss.double(), nll(logits, encode(targets)), rtol=1e-5, atol=1e-5)
        probs = torch.softmax(logits.double(), -1)
        assert ((mean - (probs * BINS).sum(-1)).abs() <= 1e-6 * (probs * BINS.abs()).sum(-1)).all()


def bernoulli(kl: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(1/2, 1/2) and (x, 1 - x) whose KL is -log(4 x (1 - x)) / 2 = ``kl``. Log probabilities [2]."""
    x = (1 - math.sqrt(1 - math.exp(-2 * kl))) / 2
    return torch.tensor([0.5, 0.5]).log(), torch.tensor([x, 1 - x]).log()


class TestKL:
    def test_of_two_coins(self):
        """KL((1/2, 1/2) || (1/4, 3/4)) = log(2 / sqrt 3) = 0.1438, and 0.1308 the other way round."""
        p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        assert categorical_kl(p, q).item() == pytest.approx(math.log(2 / math.sqrt(3)), rel=1e-5)
        other = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
        assert categorical_kl(q, p).item() == pytest.approx(other, rel=1e-5)
        assert categorical_entropy(p).item() == pytest.approx(math.log(2))
        assert categorical_entropy(p.expand(3, 2)).item() == pytest.approx(3 * math.log(2))  # summed over latents

    @pytest.mark.parametrize("unimix", [0.0, 0.01])
    def test_the_mixture_bounds_it(self, unimix):
        """Logits (16, 0, 0, 0) against (0, 16, 0, 0): nearly 16 nats, but (p0 - p1) log(p0 / p1) = 5.924 with 1%."""
        from dreamer.models.rssm import mix_uniform

        left, right = torch.tensor([[16.0, 0, 0, 0]]), torch.tensor([[0.0, 16, 0, 0]])
        total = math.exp(16) + 3
        p0, p1 = ((1 - unimix) * math.exp(x) / total + unimix / 4 for x in (16, 0))
        kl = categorical_kl(mix_uniform(left, unimix).log(), mix_uniform(right, unimix).log()).item()
        assert kl == pytest.approx((p0 - p1) * math.log(p0 / p1), rel=1e-5)
        assert kl == pytest.approx(5.924 if unimix else 16.0, abs=1e-3)

    @pytest.mark.parametrize("latents", [1, 32])
    def test_free_nats_are_for_the_sum_over_latents_of_each_step(self, latents):
        """Two steps with a KL of 0.2 and 5 nats: mean(1, 5) = 3.

        Clamped per latent, 32 latents of 5 / 32 nats would give 32; clamped after the mean, 2.6.
        """
        steps = [bernoulli(kl / latents) for kl in (0.2, 5.0)]
        posterior, prior = (torch.stack([step[i].expand(latents, 2) for step in steps]) for i in (0, 1))
        for term in kl_terms(posterior, prior, 1.0):
            torch.testing.assert_close(term, torch.tensor([1.0, 5.0]), rtol=1e-4, atol=0)
            assert term.mean().item() == pytest.approx(3, rel=1e-4)

    def test_who_is_trained(self):
        """`dynamic` moves the prior only, `representation` the posterior only, and neither below the free nats."""
        steps = [bernoulli(kl) for kl in (0.2, 5.0)]
        posterior, prior = (torch.stack([step[i][None] for step in steps]).requires_grad_() for i in (0, 1))
        dynamic, representation = kl_terms(posterior, prior, 1.0)
        for term, trained, fixed in ((dynamic, prior, posterior), (representation, posterior, prior)):
            gradient, none = torch.autograd.grad(term.sum(), (trained, fixed), allow_unused=True)
            assert none is None or not none.any()
            assert not gradient[0].any() and gradient[1].all()

    def test_direction(self):
        """d/dq of KL(p || q) in the log probabilities of q is -p: (-1/2, -1/2) here, not a function of q."""
        p, q = (x.view(1, 1, 2).requires_grad_() for x in bernoulli(5.0))
        dynamic, _ = kl_terms(p, q, 1.0)
        gradient = torch.autograd.grad(dynamic.sum(), q)[0]
        torch.testing.assert_close(gradient, torch.full((1, 1, 2), -0.5))

    def test_autocast_leaves_it_in_float32(self):
        """0.015 nats of rounding in bfloat16 are 18% of a KL of 0.084 nats."""
        torch.manual_seed(0)
        p = torch.log_softmax(torch.randn(8, 4, 16), -1)
        q = torch.log_softmax(p + 0.1 * torch.randn(8, 4, 16), -1)
        exact = (p.double().exp() * (p.double() - q.double())).sum((-2, -1))
        with torch.autocast("cpu", torch.bfloat16):
            kl, terms = categorical_kl(p, q), kl_terms(p, q, 0.0)
        assert kl.dtype == torch.float32
        for value in (kl, *terms):
            torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-6)


def rows(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


class TestLambdaReturn:
    """R_t = r_{t+1} + c_{t+1} ((1 - lambda) v_{t+1} + lambda R_{t+1}), the last R is v."""

    reward, continuation, value = rows(7, 1, 2, 3), rows(0.3, 0.9, 0.8, 0.5), rows(9, 10, 20, 30)

    def test_hand_computed(self):
        """lambda = 1/2: R2 = 3 + 0.5 * 30 = 18, R1 = 2 + 0.8 (10 + 9) = 17.2, R0 = 1 + 0.9 (5 + 8.6) = 13.24."""
        returns = lambda_return(self.reward, self.continuation, self.value, 0.5)
        torch.testing.assert_close(returns, rows(13.24, 17.2, 18))

    def test_lambda_zero_is_one_step(self):
        """1 + 0.9 * 10, 2 + 0.8 * 20, 3 + 0.5 * 30."""
        torch.testing.assert_close(lambda_return(self.reward, self.continuation, self.value, 0.0), rows(10, 18, 18))

    def test_lambda_one_is_the_discounted_sum(self):
        """R1 = 2 + 0.8 * 18 = 16.4, R0 = 1 + 0.9 * 16.4 = 15.76."""
        returns = lambda_return(self.reward, self.continuation, self.value, 1.0)
        torch.testing.assert_close(returns, rows(15.76, 16.4, 18))

    def test_nothing_at_the_start_counts(self):
        """Reward, continuation and value of the start belong to how one got there."""
        inputs = [x.clone() for x in (self.reward, self.continuation, self.value)]
        for x in inputs:
            x[:, 0] = 99
        expected = lambda_return(self.reward, self.continuation, self.value, 0.5)
        assert torch.equal(lambda_return(*inputs, 0.5), expected)

    @pytest.mark.parametrize("lmbda", [0.0, 0.5, 0.95, 1.0])
    def test_constant_reward(self, lmbda):
        """With v = 1 / (1 - 0.997) = 333.3 everywhere, 1 + 0.997 v = v: the discount is applied exactly once."""
        value = 1 / (1 - 0.997)
        returns = lambda_return(torch.ones(2, 16), torch.full((2, 16), 0.997), torch.full((2, 16), value), lmbda)
        assert returns.shape == (2, 15)
        torch.testing.assert_close(returns, torch.full((2, 15), value), rtol=1e-5, atol=0)

    def test_the_end_of_an_episode_cuts_the_longer_return(self):
        """`last` at step 2 makes lambda 0 there: R1 = 2 + 0.8 * 20 = 18, and R0 = 1 + 0.9 (5 + 9) = 13.6."""
        last = torch.tensor([[False, False, True, False]])
        returns = lambda_return(self.reward, self.continuation, self.value, 0.5, last)
        torch.testing.assert_close(returns, rows(13.6, 18, 18))


class TestWeight:
    def test_includes_the_start(self):
        """A constant 0.997 gives 0.997^(t + 1): w_0 = c_0."""
        weight = imagined_weight(torch.full((1, 16), 0.997))
        torch.testing.assert_close(weight[0], 0.997 ** torch.arange(1.0, 17))

    def test_product_of_what_came_before(self):
        """0.5, 0.5 * 0.8, 0.5 * 0.8 * 0, 0."""
        torch.testing.assert_close(imagined_weight(rows(0.5, 0.8, 0.0, 0.9)), rows(0.5, 0.4, 0, 0))

    def test_a_discount_that_the_predictions_lack(self):
        """One factor per step taken, none for the start: c_0, c_0 c_1 d, c_0 c_1 c_2 d^2."""
        torch.testing.assert_close(imagined_weight(rows(0.5, 0.8, 1.0), 0.9), rows(0.5, 0.36, 0.324))


def make_norm(low: float = 0.0, high: float = 1.0, rate: float = 0.0) -> PercentileValueNorm:
    norm = PercentileValueNorm(rate=rate)
    norm.low.fill_(low)
    norm.high.fill_(high)
    return norm


def logits_of(values: torch.Tensor) -> torch.Tensor:
    """Logits whose two-hot mean is ``values``."""
    return encode(values).clamp(min=1e-30).log().float()


def make_terms(**overrides):
    """One trajectory of three steps with simple numbers, and what `actor_critic_terms` makes of it."""
    inputs = {
        "log_prob": rows(-1.0, -2.0, -3.0),
        "entropy": rows(0.5, 0.6, 0.7),
        "reward": rows(0, 1, 2, 3),
        "continuation": rows(0.9, 0.9, 0.8, 0.5),
        "value_logits": logits_of(rows(4, 10, 20, 30)),
        "slow_value": rows(5, 6, 7, 8),
        "bins": BINS,
        "return_norm": make_norm(0.0, 2.0),
        "lmbda": 0.5,
        "entropy_scale": 0.1,
        "slow_regularizer": 0.0,
    }
    return actor_critic_terms(**inputs | overrides), inputs | overrides


class TestActorCritic:
    def test_hand_computed(self):
        """Returns 13.24, 17.2, 18 as above; minus values 4, 10, 20 and over a scale of 2: A = 4.62, 3.6, -1.

        Weights 0.9, 0.81, 0.648. actor = -w (log pi A + 0.1 H): -0.9 (-4.62 + 0.05), -0.81 (-7.2 + 0.06),
        -0.648 (3 + 0.07).
        """
        terms, inputs = make_terms()
        torch.testing.assert_close(terms.returns, rows(13.24, 17.2, 18), rtol=1e-4, atol=0)
        torch.testing.assert_close(terms.baseline, rows(4, 10, 20, 30), rtol=1e-4, atol=0)
        torch.testing.assert_close(terms.advantage, rows(4.62, 3.6, -1), rtol=1e-3, atol=0)
        torch.testing.assert_close(terms.weight, rows(0.9, 0.81, 0.648, 0.324))
        torch.testing.assert_close(terms.actor, rows(0.9 * 4.57, 0.81 * 7.14, -0.648 * 3.07), rtol=1e-3, atol=0)
        weights = encode(rows(13.24, 17.2, 18))
        value = rows(0.9, 0.81, 0.648).double() * nll(inputs["value_logits"][:, :-1], weights)
        torch.testing.assert_close(terms.value.double(), value, rtol=1e-3, atol=1e-3)

    def test_slow_critic_only_regularises(self):
        """It changes neither returns nor advantage; the value loss adds its two-hot loss."""
        plain, inputs = make_terms()
        pulled, _ = make_terms(slow_regularizer=0.5)
        assert torch.equal(pulled.returns, plain.returns) and torch.equal(pulled.advantage, plain.advantage)
        extra = rows(0.9, 0.81, 0.648) * 0.5 * twohot_nll(inputs["value_logits"][:, :-1], rows(5, 6, 7), BINS)
        torch.testing.assert_close(pulled.value - plain.value, extra, rtol=1e-4, atol=1e-3)
        other, _ = make_terms(slow_value=rows(50, 60, 70, 80))
        assert torch.equal(other.returns, plain.returns) and torch.equal(other.advantage, plain.advantage)

    def test_gradients_reach_log_prob_entropy_and_value_logits_only(self):
        names = ("log_prob", "entropy", "reward", "continuation", "value_logits", "slow_value")
        inputs = {key: value.clone().requires_grad_() for key, value in make_terms()[1].items() if key in names}
        terms, _ = make_terms(slow_regularizer=1.0, **inputs)
        reached = {}
        for name in ("actor", "value"):
            gradients = torch.autograd.grad(
                getattr(terms, name).sum(), inputs.values(), retain_graph=True, allow_unused=True
            )
            reached[name] = {key for key, g in zip(inputs, gradients, strict=True) if g is not None and g.any()}
        assert reached == {"actor": {"log_prob", "entropy"}, "value": {"value_logits"}}

    def test_reinforce_gradient(self):
        """d actor_t / d log pi_t = -w_t A_t, d / d H_t = -w_t entropy_scale."""
        log_prob, entropy = rows(-1.0, -2, -3).requires_grad_(), rows(0.5, 0.6, 0.7).requires_grad_()
        terms, _ = make_terms(log_prob=log_prob, entropy=entropy)
        d_log_prob, d_entropy = torch.autograd.grad(terms.actor.sum(), (log_prob, entropy))
        torch.testing.assert_close(d_log_prob, -rows(0.9, 0.81, 0.648) * rows(4.62, 3.6, -1), rtol=1e-3, atol=0)
        torch.testing.assert_close(d_entropy, -0.1 * rows(0.9, 0.81, 0.648))

    def test_a_terminal_start_trains_nothing(self):
        """c_0 = 0 is death at the start: neither actor nor critic may learn from what is imagined afterwards."""
        log_prob, logits = rows(-1.0, -2, -3).requires_grad_(), logits_of(rows(4, 10, 20, 30)).requires_grad_()
        terms, _ = make_terms(continuation=rows(0.0, 0.9, 0.8, 0.5), log_prob=log_prob, value_logits=logits)
        for gradient in torch.autograd.grad((terms.actor + terms.value).sum(), (log_prob, logits)):
            assert not gradient.any()

    def test_death_on_the_way_stops_what_comes_later(self):
        """c_2 = 0: steps 0 and 1 are trained, and the return of step 1 is its reward alone."""
        terms, _ = make_terms(continuation=rows(0.9, 0.9, 0.0, 0.5))
        assert terms.returns[0, 1].item() == pytest.approx(2)
        assert terms.actor[0, :2].all() and not terms.actor[0, 2] and not terms.value[0, 2]

    def test_the_discount_may_stand_outside(self):
        """Predictions without the discount and a factor of 0.9 are the same returns, with w_0 = c_0."""
        inside, _ = make_terms(continuation=rows(0.9, 0.9, 0.9, 0.9))
        outside, _ = make_terms(continuation=rows(1.0, 1.0, 1.0, 1.0), discount=0.9)
        torch.testing.assert_close(inside.returns, outside.returns)
        torch.testing.assert_close(outside.weight, inside.weight / 0.9)


class TestReturnScale:
    """S = max(1, EMA(P95) - EMA(P5)) at a rate of 0.01 from 0, without correction for the start."""

    returns = torch.arange(101.0)  # P5 = 5, P95 = 95

    def test_average_of_a_known_batch(self):
        """After n updates the percentiles are 5 (1 - 0.99^n) and 95 (1 - 0.99^n): 0.05 and 0.95 after one."""
        norm = PercentileValueNorm(rate=0.01)
        for n in range(1, 4):
            norm.update(self.returns[:, None])
            share = 1 - 0.99**n
            assert norm.low.item() == pytest.approx(5 * share, rel=1e-5)
            assert norm.high.item() == pytest.approx(95 * share, rel=1e-5)
            assert norm.scale().item() == pytest.approx(max(1, 90 * share), rel=1e-5)

    def test_is_updated_before_it_is_used(self):
        """With a rate of 1 the batch scales itself: returns 18 and 9 to 18 give P95 - P5 of the three."""
        norm = make_norm(rate=1.0)
        terms, _ = make_terms(return_norm=norm)
        low, high = torch.quantile(terms.returns, torch.tensor([0.05, 0.95]))
        assert norm.scale().item() == pytest.approx((high - low).item(), rel=1e-6)
        torch.testing.assert_close(terms.advantage, (terms.returns - terms.baseline[:, :-1]) / (high - low))

    def test_never_magnifies(self):
        terms, _ = make_terms(return_norm=make_norm(0.0, 0.5))
        assert torch.equal(terms.advantage, terms.returns - terms.baseline[:, :-1])

    def test_the_offset_is_not_subtracted(self):
        """It would cancel between return and value; subtracted once, it biases every advantage."""
        terms, _ = make_terms(return_norm=make_norm(100.0, 102.0))
        torch.testing.assert_close(terms.advantage, rows(4.62, 3.6, -1), rtol=1e-3, atol=0)

    def test_rewards_a_hundred_times_larger_give_the_same_advantages(self):
        advantages = []
        for factor in (1, 100):
            norm = make_norm(0.0, 0.0, rate=0.2)
            for _ in range(80):  # 0.8^80 = 2e-8
                terms, _ = make_terms(
                    reward=factor * rows(0, 1, 2, 3),
                    value_logits=logits_of(factor * rows(4, 10, 20, 30)),
                    return_norm=norm,
                )
            advantages.append(terms.advantage)
        torch.testing.assert_close(advantages[1], advantages[0], rtol=1e-3, atol=1e-3)

    def test_percentiles_in_float32_under_autocast(self):
        norm = PercentileValueNorm(rate=1.0)
        with torch.autocast("cpu", torch.bfloat16):
            terms, _ = make_terms(return_norm=norm)
        assert norm.low.dtype == terms.returns.dtype == terms.actor.dtype == terms.value.dtype == torch.float32
        exact, _ = make_terms(return_norm=PercentileValueNorm(rate=1.0))
        for ours, reference in zip(terms, exact, strict=True):
            torch.testing.assert_close(ours, reference)


def first(second_return: float) -> float:
    """R0 = 1 + d (20 / 2 + R1 / 2)."""
    return 1 + DISCOUNT * (10 + second_return / 2)


def second(third_return: float) -> float:
    """R1 = 2 + d (30 / 2 + R2 / 2)."""
    return 2 + DISCOUNT * (15 + third_return / 2)


class TestReplayCritic:
    """B = 1, T = 4, lambda = 1/2, discount d = 1 - 1/333, bootstraps 10, 20, 30, 40, rewards 0, 1, 2, 3."""

    def make(self, ends: dict[int, str], **overrides):
        terminated, last = torch.zeros(1, 4, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.bool)
        for step, kind in ends.items():
            last[0, step] = True
            terminated[0, step] = kind == "terminated"
        torch.manual_seed(0)
        inputs = {
            "reward": rows(0, 1, 2, 3),
            "terminated": terminated,
            "last": last,
            "bootstrap": rows(10, 20, 30, 40),
            "value_logits": torch.randn(1, 4, 255),
            "slow_value": rows(1, 2, 3, 4),
            "bins": BINS,
            "lmbda": 0.5,
            "slow_regularizer": 0.0,
            "discount": DISCOUNT,
        } | overrides
        return replay_critic_terms(**inputs), inputs

    @pytest.mark.parametrize(
        ("ends", "targets", "mask"),
        [
            ({}, (first(second(3 + DISCOUNT * 40)), second(3 + DISCOUNT * 40), 3 + DISCOUNT * 40), (1, 1, 1)),
            # a time limit at step 2 leaves the bootstrap alone; step 2 itself is not trained
            ({2: "truncated"}, (first(2 + DISCOUNT * 30), 2 + DISCOUNT * 30, 0), (1, 1, 0)),
            # an end of the task leaves the reward alone
            ({2: "terminated"}, (first(2), 2, 0), (1, 1, 0)),
            # an end in the last row, every row before it is trained
            (
                {3: "truncated"},
                (first(second(3 + DISCOUNT * 40)), second(3 + DISCOUNT * 40), 3 + DISCOUNT * 40),
                (1,) * 3,
            ),
            ({3: "terminated"}, (first(second(3)), second(3), 3), (1, 1, 1)),
        ],
    )
    def test_hand_computed(self, ends, targets, mask):
        term, inputs = self.make(ends)
        assert term.shape == (1, 3)  # the last step has nothing to be compared with
        expected = nll(inputs["value_logits"][:, :-1], encode(rows(*targets))) * rows(*mask)
        torch.testing.assert_close(term.double(), expected, rtol=1e-4, atol=1e-4)

    def test_slow_critic_regularises(self):
        plain, inputs = self.make({2: "truncated"})
        pulled, _ = self.make({2: "truncated"}, slow_regularizer=1.0)
        extra = twohot_nll(inputs["value_logits"][:, :-1], rows(1, 2, 3), BINS) * rows(1, 1, 0)
        torch.testing.assert_close(pulled - plain, extra, rtol=1e-4, atol=1e-4)

    def test_gradients_reach_the_critic_only(self):
        tensors = {
            key: value.clone().requires_grad_()
            for key, value in self.make({})[1].items()
            if key in ("reward", "bootstrap", "value_logits", "slow_value")
        }
        term, _ = self.make({}, slow_regularizer=1.0, **tensors)
        gradients = torch.autograd.grad(term.sum(), tensors.values(), allow_unused=True)
        reached = {key for key, g in zip(tensors, gradients, strict=True) if g is not None and g.any()}
        assert reached == {"value_logits"}
