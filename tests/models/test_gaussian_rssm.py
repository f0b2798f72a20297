"""Gaussian RSSM: one step by hand, resets, sampling, gradients through imagination, and that acting is observing."""

import math

import pytest
import torch
from torch.nn import functional as F

from dreamer.models.gaussian_rssm import GaussianRSSM

BATCH, STEPS, ACTIONS, EMBED = 2, 5, 2, 6
CPU = torch.device("cpu")


def make_rssm(seed: int = 0, **sizes: int) -> GaussianRSSM:
    torch.manual_seed(seed)
    defaults = {"embed_size": EMBED, "action_size": ACTIONS, "belief_size": 8, "state_size": 4, "hidden_size": 7}
    return GaussianRSSM(**defaults | sizes)


def make_inputs(rssm: GaussianRSSM, batch: int = BATCH, steps: int = STEPS, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs of `observe`, without resets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "embed": normal(batch, steps, EMBED),
        "action": normal(batch, steps, ACTIONS),
        "is_init": torch.zeros(batch, steps, 1, dtype=torch.bool),
        "belief": normal(batch, rssm.belief_size),
        "state": normal(batch, rssm.state_size),
        "noise": normal(batch, steps, rssm.state_size),
    }


def test_one_step_by_hand():
    """Every width is one and every weight of a matrix its own number, so that no two can be exchanged."""
    rssm = make_rssm(embed_size=1, action_size=1, belief_size=1, state_size=1, hidden_size=1)
    numbers = {
        "hidden.weight": [[0.5, -0.3]],  # state, action
        "hidden.bias": [0.1],
        "gates_from_hidden.weight": [[0.2], [0.7], [-0.9]],  # update, reset, candidate
        "gates_from_hidden.bias": [0.3, -0.2, 0.4],
        "gates_from_belief.weight": [[-0.6], [0.8], [1.1]],
        "gates_from_belief.bias": [0.05, 0.15, -0.25],
        "prior_head.0.weight": [[-1.2]],
        "prior_head.0.bias": [0.2],
        "prior_head.2.weight": [[0.9], [-0.4]],  # mean, standard deviation
        "prior_head.2.bias": [0.1, 0.6],
        "posterior_in.weight": [[0.35, -0.45]],  # belief, embed
        "posterior_in.bias": [-0.05],
        "posterior_out.weight": [[1.3], [0.55]],
        "posterior_out.bias": [-0.15, -0.7],
    }
    rssm.load_state_dict({name: torch.tensor(value) for name, value in numbers.items()})
    state, action, belief, embed, noise = 2.0, 1.5, -0.5, 0.8, -1.3

    def elu(x):
        return x if x > 0 else math.exp(x) - 1

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    def softplus(x):
        return math.log(1 + math.exp(x))

    x = elu(0.5 * state - 0.3 * action + 0.1)
    update = sigmoid(0.2 * x + 0.3 - 0.6 * belief + 0.05)
    reset = sigmoid(0.7 * x - 0.2 + 0.8 * belief + 0.15)
    candidate = math.tanh(-0.9 * x + 0.4 + reset * (1.1 * belief - 0.25))
    new_belief = update * belief + (1 - update) * candidate
    y = elu(-1.2 * new_belief + 0.2)
    prior = 0.9 * y + 0.1, softplus(-0.4 * y + 0.6) + 0.1
    z = elu(0.35 * new_belief - 0.45 * embed - 0.05)
    posterior = 1.3 * z - 0.15, softplus(0.55 * z - 0.7) + 0.1

    one = lambda value: torch.tensor([[value]])  # noqa: E731
    rollout = rssm.observe(
        one([embed]), one([action]), torch.zeros(1, 1, 1, dtype=torch.bool), one(belief), one(state), one([noise])
    )
    expected = (new_belief, posterior[0] + posterior[1] * noise, *posterior, *prior)
    assert [part.item() for part in rollout] == pytest.approx(expected, rel=1e-5)


class TestReset:
    @pytest.mark.parametrize("autocast", [False, True])
    def test_different_pasts_give_bit_equal_states_from_the_reset_on(self, autocast):
        rssm, k = make_rssm(), 2
        inputs, other = make_inputs(rssm), make_inputs(rssm, seed=1)
        for window in (inputs, other):
            window["is_init"][:, k] = True
        for key in ("embed", "noise"):
            other[key][:, k:] = inputs[key][:, k:]
        other["action"][:, k + 1 :] = inputs["action"][:, k + 1 :]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            left, right = rssm.observe(**inputs), rssm.observe(**other)
        for ours, theirs in zip(left, right, strict=True):
            assert torch.equal(ours[:, k:], theirs[:, k:])
            assert not torch.equal(ours[:, :k], theirs[:, :k])

    def test_no_gradient_passes_it(self):
        rssm, k = make_rssm(), 2
        inputs = make_inputs(rssm)
        inputs["is_init"][:, k] = True
        for key in ("embed", "action", "belief", "state"):
            inputs[key].requires_grad_()
        sum(part[:, k:].sum() for part in rssm.observe(**inputs)).backward()
        assert not inputs["belief"].grad.any() and not inputs["state"].grad.any()
        assert not inputs["embed"].grad[:, :k].any() and inputs["embed"].grad[:, k:].any((0, 2)).all()
        assert not inputs["action"].grad[:, : k + 1].any() and inputs["action"].grad[:, k + 1 :].any((0, 2)).all()

    def test_one_row_only(self):
        rssm = make_rssm()
        inputs = make_inputs(rssm)
        kept = rssm.observe(**inputs).feature
        inputs["is_init"][0, 2] = True
        reset = rssm.observe(**inputs).feature
        assert torch.equal(reset[1], kept[1]) and torch.equal(reset[0, :2], kept[0, :2])
        assert not torch.equal(reset[0, 2], kept[0, 2])

    def test_without_one_the_first_action_and_the_start_count(self):
        """A window that begins inside an episode starts from what it is given, and its first action is real."""
        rssm = make_rssm()
        inputs = make_inputs(rssm)
        first = rssm.observe(**inputs).belief[:, 0]
        for key in ("action", "belief", "state"):
            assert not torch.equal(rssm.observe(**inputs | {key: inputs[key] + 1}).belief[:, 0], first), key


class TestSampling:
    def test_the_least_std_is_added(self):
        """softplus(0) + 0.1, and 0.1 from below: not max(softplus, 0.1)."""
        raw = torch.tensor([0.0, 0, 0, 0, 0, -100, -2, 3])
        _, std = make_rssm().mean_std(raw)
        expected = [math.log(2) + 0.1, 0.1, math.log(1 + math.exp(-2)) + 0.1, math.log(1 + math.exp(3)) + 0.1]
        torch.testing.assert_close(std, torch.tensor(expected))

    @pytest.mark.parametrize("imagine", [False, True])
    def test_each_row_and_step_has_noise_of_its_own(self, imagine):
        rssm, rows, steps = make_rssm(), 500, 3
        inputs = make_inputs(rssm, batch=1, steps=steps) | {"noise": None}
        inputs = {key: None if value is None else value.expand(rows, *value.shape[1:]) for key, value in inputs.items()}
        torch.manual_seed(0)
        with torch.no_grad():
            if imagine:
                start = inputs["belief"], inputs["state"]
                feature = rssm.imagine(lambda _, t: inputs["action"][:, t], *start, steps).feature[:, 1:]
                belief, state = feature.split([rssm.belief_size, rssm.state_size], -1)
                mean, std = rssm.prior(belief)
            else:
                rollout = rssm.observe(**inputs)
                state, mean, std = rollout.state, rollout.posterior_mean, rollout.posterior_std
        noise = ((state - mean) / std).transpose(0, 1).flatten(0, 1).transpose(0, 1)  # [Z, T * rows]
        torch.testing.assert_close(noise.mean(-1), torch.zeros(4), atol=0.1, rtol=0)
        torch.testing.assert_close(noise.std(-1), torch.ones(4), atol=0.1, rtol=0)
        assert len(noise[0].unique()) == rows * steps

    def test_samples_carry_gradients_to_the_standard_deviation(self):
        rssm = make_rssm()
        inputs = make_inputs(rssm, steps=1)
        rssm.observe(**inputs).state.sum().backward()
        from_noise = rssm.posterior_out.bias.grad[rssm.state_size :]
        rollout = rssm.observe(**inputs)
        raw = torch.log(torch.expm1(rollout.posterior_std - rssm.min_std))
        torch.testing.assert_close(from_noise, (inputs["noise"] * torch.sigmoid(raw)).sum((0, 1)))


class TestImagination:
    def test_is_observing_with_the_prior(self):
        """The belief after an action does not depend on who looks; and the start comes first."""
        rssm = make_rssm()
        inputs = make_inputs(rssm, steps=1)
        start = inputs["belief"], inputs["state"]
        imagined = rssm.imagine(lambda feature, t: inputs["action"][:, t], *start, 1, inputs["noise"])
        rollout = rssm.observe(**inputs)
        mean, std = rollout.prior_mean[:, 0], rollout.prior_std[:, 0]
        assert torch.equal(imagined.feature[:, 0], torch.cat(start, -1))
        expected = torch.cat([rollout.belief[:, 0], mean + std * inputs["noise"][:, 0]], -1)
        torch.testing.assert_close(imagined.feature[:, 1], expected)

    def test_gradients_reach_every_action_and_pass_frozen_weights(self):
        rssm, steps = make_rssm().requires_grad_(False), 4
        inputs = make_inputs(rssm, steps=steps)
        action = inputs["action"].requires_grad_()
        start = inputs["belief"], inputs["state"]
        imagined = rssm.imagine(lambda feature, t: action[:, t], *start, steps, inputs["noise"])
        rssm.requires_grad_(True)
        imagined.feature[:, -1].sum().backward()
        assert action.grad.any((0, 2)).all()
        assert all(p.grad is None for p in rssm.parameters())

    def test_the_policy_sees_the_state_that_it_acts_in(self):
        rssm, seen = make_rssm(), []

        def policy(feature, step):
            seen.append((step, feature))
            return torch.zeros(BATCH, ACTIONS)

        imagined = rssm.imagine(policy, *rssm.initial(BATCH, CPU), 3)
        assert [step for step, _ in seen] == [0, 1, 2]
        assert torch.equal(torch.stack([feature for _, feature in seen], 1), imagined.feature[:, :-1])
        assert imagined.action.shape == (BATCH, 3, ACTIONS)


def test_acting_step_by_step_is_observing_a_sequence():
    rssm = make_rssm()
    inputs = make_inputs(rssm)
    inputs["is_init"][0, 3] = True
    whole = rssm.observe(**inputs)
    belief, state = inputs["belief"], inputs["state"]
    for t in range(STEPS):
        now = {key: inputs[key][:, t : t + 1] for key in ("embed", "action", "is_init", "noise")}
        one = rssm.observe(**now, belief=belief, state=state)
        belief, state = one.belief[:, 0], one.state[:, 0]
        torch.testing.assert_close(one.feature[:, 0], whole.feature[:, t])


def test_weight_gradients_are_those_of_plain_layers():
    """The loop forms each weight gradient once; written out with plain layers it is the same."""
    rssm = make_rssm()
    inputs = make_inputs(rssm)
    sum(part.square().sum() for part in rssm.observe(**inputs)).backward()
    grads = {name: p.grad.clone() for name, p in rssm.named_parameters()}
    rssm.zero_grad()
    belief, state, total = inputs["belief"], inputs["state"], 0
    for t in range(STEPS):
        x = F.elu(rssm.hidden(torch.cat([state, inputs["action"][:, t]], -1)))
        z, r, c = (rssm.gates_from_hidden(x)).chunk(3, -1)
        hz, hr, hc = rssm.gates_from_belief(belief).chunk(3, -1)
        z, candidate = torch.sigmoid(z + hz), torch.tanh(c + torch.sigmoid(r + hr) * hc)
        belief = z * belief + (1 - z) * candidate
        posterior = rssm.posterior_out(F.elu(rssm.posterior_in(torch.cat([belief, inputs["embed"][:, t]], -1))))
        mean, std = rssm.mean_std(posterior)
        state = mean + std * inputs["noise"][:, t]
        total = total + sum(part.square().sum() for part in (belief, state, mean, std, *rssm.prior(belief)))
    total.backward()
    for name, p in rssm.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_distributions_stay_float32_under_autocast():
    rssm = make_rssm()
    with torch.autocast("cpu", torch.bfloat16):
        rollout = rssm.observe(**make_inputs(rssm))
        imagined = rssm.imagine(lambda *_: torch.zeros(BATCH, ACTIONS), rollout.belief[:, 0], rollout.state[:, 0], 2)
    assert {part.dtype for part in rollout[2:]} == {torch.float32}
    assert rollout.belief.dtype == rollout.state.dtype == imagined.feature.dtype == torch.bfloat16


def test_packed_states_come_back_exactly():
    rssm, belief, state = make_rssm(), torch.randn(3, 8), torch.randn(3, 4)
    packed = rssm.pack(belief, state)
    assert {part.dtype for part in packed} == {torch.float32}
    assert torch.equal(packed[0], belief) and torch.equal(rssm.unpack(*packed)[1], state)
    assert rssm.pack(belief.bfloat16(), state.bfloat16())[0].dtype == torch.float32


def test_default_size_has_the_parameters_of_the_reference():
    rssm = GaussianRSSM(embed_size=1024, action_size=6)
    assert sum(p.numel() for p in rssm.parameters()) == 557_920
    weight = rssm.gates_from_belief.weight.detach()  # [3D, D], orthogonal
    torch.testing.assert_close(weight.T @ weight, torch.eye(200), atol=1e-5, rtol=0)
    bound = math.sqrt(6 / (200 + 600))
    assert 0.99 * bound < rssm.gates_from_hidden.weight.abs().max() <= bound
    assert not any(p.any() for name, p in rssm.named_parameters() if name.endswith("bias"))
