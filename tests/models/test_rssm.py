"""RSSM: resets, sampling, the block GRU by hand, and that imagining and acting are the same maths as observing."""

import math

import pytest
import torch

from dreamer.models.rssm import draw_noise, mix_uniform, sample_onehot
from tests.helpers import make_rssm, pick_classes

BATCH, STEPS = 2, 5
SIGMOID = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731


def make_inputs(rssm, batch: int = BATCH, steps: int = STEPS, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs of `observe`, without resets; the noise leaves the choice of classes to the probabilities."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    index = torch.randint(rssm.classes, (batch, rssm.categoricals), generator=generator)
    uniform = torch.rand(batch, steps, rssm.categoricals, rssm.classes, generator=generator)
    return {
        "embed": normal(batch, steps, 6),
        "action": normal(batch, steps, 2),
        "is_init": torch.zeros(batch, steps, 1, dtype=torch.bool),
        "belief": normal(batch, rssm.belief_size),
        "state": rssm.from_classes(index),
        "noise": 1 / -uniform.log(),
    }


class TestReset:
    @pytest.mark.parametrize("autocast", [False, True])
    def test_different_pasts_give_bit_equal_states_from_the_reset_on(self, autocast):
        rssm, k = make_rssm(), 2
        inputs, other = make_inputs(rssm), make_inputs(rssm, seed=1)
        for window in (inputs, other):
            window["is_init"][:, k] = True
        for key in ("embed", "noise"):  # the same observations from the reset on, and the same actions after it
            other[key][:, k:] = inputs[key][:, k:]
        other["action"][:, k + 1 :] = inputs["action"][:, k + 1 :]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            left, right = rssm.observe(**inputs), rssm.observe(**other)
        for ours, theirs in zip(left, right, strict=True):
            assert torch.equal(ours[:, k:], theirs[:, k:])
            assert not torch.equal(ours[:, :k], theirs[:, :k])

    def test_no_gradient_passes_it(self):
        """Nothing after the reset at step 2 may train what came before: context, observations, or the action at it."""
        rssm, k = make_rssm(), 2
        inputs = make_inputs(rssm)
        inputs["is_init"][:, k] = True
        for key in ("embed", "action", "belief", "state"):
            inputs[key].requires_grad_()
        rollout = rssm.observe(**inputs)
        weights = torch.randn(rollout.feature[:, k:].shape)  # a plain sum of one-hots has no gradient
        ((rollout.feature[:, k:] * weights).sum() + rollout.prior_logits[:, k:].square().sum()).backward()
        assert not inputs["belief"].grad.any() and not inputs["state"].grad.any()
        assert not inputs["embed"].grad[:, :k].any() and inputs["embed"].grad[:, k:].any((0, 2)).all()
        assert not inputs["action"].grad[:, : k + 1].any() and inputs["action"].grad[:, k + 1 :].any((0, 2)).all()

    def test_starts_from_zeros(self):
        """A reset step is the step from zero belief, zero state and zero action, not from a learned start."""
        rssm = make_rssm()
        inputs = make_inputs(rssm)
        inputs["is_init"][:, 0] = True
        blank = {key: torch.zeros_like(inputs[key]) for key in ("belief", "state")}
        blank["is_init"] = torch.zeros_like(inputs["is_init"])
        blank["action"] = inputs["action"].clone()
        blank["action"][:, 0] = 0
        assert torch.equal(rssm.observe(**inputs).feature, rssm.observe(**inputs | blank).feature)
        for start, key in zip(rssm.initial(BATCH, torch.device("cpu")), ("belief", "state"), strict=True):
            assert torch.equal(start, blank[key])

    def test_one_row_only(self):
        rssm, inputs = make_rssm(), make_inputs(make_rssm())
        kept = rssm.observe(**inputs).feature
        inputs["is_init"][0, 2] = True
        reset = rssm.observe(**inputs).feature
        assert torch.equal(reset[1], kept[1]) and torch.equal(reset[0, :2], kept[0, :2])
        assert not torch.equal(reset[0, 2], kept[0, 2])

    @pytest.mark.parametrize("is_init", [False, True])
    def test_the_context_counts_unless_the_window_starts_with_a_reset(self, is_init):
        """Forcing the first step to be a reset would erase the stored latent that the window was given."""
        rssm, inputs = make_rssm(), make_inputs(make_rssm())
        inputs["is_init"][:, 0] = is_init
        first = rssm.observe(**inputs).belief[:, 0]
        for key, value in (("belief", inputs["belief"] + 1), ("state", inputs["state"].roll(1, -1))):
            changed = rssm.observe(**inputs | {key: value}).belief[:, 0]
            assert torch.equal(changed, first) == is_init, key


class TestLatents:
    def test_mixture_of_one_percent(self):
        """Certain logits over four classes: 0.99 + 0.01 / 4 and 0.01 / 4."""
        probs = mix_uniform(torch.tensor([100.0, 0, 0, 0]), 0.01)
        torch.testing.assert_close(probs, torch.tensor([0.9925, 0.0025, 0.0025, 0.0025]))

    def test_every_distribution_of_the_model_has_the_mixture(self):
        """Sampling, KL and entropy disagree where one of them leaves it out."""
        rssm = make_rssm(unimix=0.2)
        with torch.no_grad():
            for head in (rssm.prior_head, rssm.posterior_head):
                head[-1].weight.mul_(1000)
        rollout = rssm.observe(**make_inputs(rssm))
        outside = rssm.prior_logits(rollout.belief), rssm.posterior_logits(rollout.belief, torch.randn(BATCH, STEPS, 6))
        for logits in (rollout.prior_logits, rollout.posterior_logits, *outside):
            probs = logits.exp()
            torch.testing.assert_close(probs.sum(-1), torch.ones(BATCH, STEPS, 3))
            assert probs.min().item() == pytest.approx(0.2 / 4, rel=1e-5)
            assert probs.max().item() == pytest.approx(0.8 + 0.2 / 4, rel=1e-5)

    @pytest.mark.parametrize("imagine", [False, True])
    def test_samples_have_the_mixture(self, imagine):
        """Certain logits and a mixture of 0.4 over four classes: class 0 is drawn with probability 0.7, not 1."""
        rssm, draws = make_rssm(unimix=0.4), 4000
        with torch.no_grad():
            for head in (rssm.prior_head, rssm.posterior_head):
                head[-1].weight.zero_()
                head[-1].bias.copy_(torch.tensor([50.0, 0, 0, 0]).repeat(3))
        inputs = make_inputs(rssm, batch=draws, steps=1) | {"noise": None}
        torch.manual_seed(0)
        if imagine:
            start = inputs["belief"], inputs["state"]
            feature = rssm.imagine(lambda feature, step: torch.zeros(draws, 2), *start, 1).feature[:, 1]
        else:
            feature = rssm.observe(**inputs).feature[:, 0]
        share = feature[:, rssm.belief_size :].unflatten(-1, (3, 4)).mean((0, 1))
        expected = torch.tensor([0.7, 0.1, 0.1, 0.1])
        assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / (3 * draws)).sqrt()).all()

    def test_sample_is_a_draw_from_the_probabilities(self):
        probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
        torch.manual_seed(0)
        draws = 20_000
        samples = sample_onehot(probs.expand(draws, 1, 4), draw_noise(draws, 1, 4, device=torch.device("cpu")))
        assert torch.equal(samples.sum(-1), torch.ones(draws)) and set(samples.unique().tolist()) == {0, 1}
        assert ((samples.mean(0) - probs).abs() <= 5 * (probs * (1 - probs) / draws).sqrt()).all()

    def test_gradient_is_that_of_the_mixed_probabilities_whatever_the_noise(self):
        """sum_k c_k p_k with p = 0.99 softmax + 0.0025 has the gradient 0.99 s_k (c_k - sum_j c_j s_j).

        A Gumbel-softmax would give another gradient for every draw, and a temperature besides.
        """
        logits = torch.tensor([[0.5, -1.0, 2.0, 0.0]], requires_grad=True)
        cotangent = torch.tensor([1.0, 2.0, -3.0, 0.5])
        s = torch.softmax(logits.detach(), -1)
        expected = 0.99 * s * (cotangent - (cotangent * s).sum())
        for index in range(4):
            sample = sample_onehot(mix_uniform(logits, 0.01), pick_classes(torch.tensor([index]), 4))
            assert sample.tolist() == torch.eye(4)[index].tolist()  # exactly one-hot in the forward pass
            gradient = torch.autograd.grad((sample * cotangent).sum(), logits)[0]
            torch.testing.assert_close(gradient, expected)

    def test_softmax_in_float32_whatever_the_dtype_of_the_logits(self):
        """In bfloat16 the probabilities have an error of 1/256, more than the share of the mixture."""
        rssm, logits = make_rssm(), torch.randn(2, 3, 12).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            probs = rssm.probs(logits)
        exact = 0.99 * torch.softmax(logits.double().unflatten(-1, (3, 4)), -1) + 0.0025
        torch.testing.assert_close(probs, exact.float(), rtol=1e-6, atol=0)

    def test_class_ids_and_back(self):
        rssm = make_rssm()
        ids = torch.tensor([[0, 3, 1], [2, 2, 0]], dtype=torch.uint8)
        state = rssm.from_classes(ids)
        assert state[0].tolist() == [1, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0]
        assert torch.equal(rssm.to_classes(state), ids) and rssm.to_classes(state).dtype == torch.uint8

    def test_packed_states_come_back_but_for_the_precision_of_the_belief(self):
        rssm, belief = make_rssm(), torch.tensor([[0.5, -1.0, 1 + 2**-10]])
        state = rssm.from_classes(torch.tensor([[0, 3, 1]]))
        packed = rssm.pack(belief, state)
        assert [part.dtype for part in packed] == [torch.bfloat16, torch.uint8] and packed[1].tolist() == [[0, 3, 1]]
        unpacked = rssm.unpack(*packed)
        assert unpacked[0].tolist() == [[0.5, -1.0, 1.0]] and torch.equal(unpacked[1], state)

    def test_more_than_256_classes_do_not_wrap_around(self):
        rssm = make_rssm(classes=300)
        ids = torch.tensor([[0, 299, 256]], dtype=torch.int16)
        assert torch.equal(rssm.to_classes(rssm.from_classes(ids)), ids)


class TestCore:
    def test_zero_weights_keep_a_share_of_the_belief(self):
        """cand = tanh(sigmoid(0) * 0) = 0 and update = sigmoid(0 - 1), so h' = (1 - sigmoid(-1)) h = 0.731 h."""
        rssm = make_rssm()
        with torch.no_grad():
            for parameter in rssm.parameters():
                parameter.zero_()
        belief = torch.randn(3, 8)
        new = rssm.core(1, 3)(belief, torch.zeros(3, 12), torch.zeros(3, 5))
        torch.testing.assert_close(new, (1 - SIGMOID(-1)) * belief)

    def test_gates_are_cut_inside_each_block(self):
        """The outputs of a block are [reset, candidate, update]; cutting the whole vector in three mixes blocks.

        Block 0: reset 2, candidate 1, update 50: h' = tanh(sigmoid(2) * 1). Block 1, all 0: h' = 0.731 h.
        """
        rssm = make_rssm()
        with torch.no_grad():
            for parameter in rssm.parameters():
                parameter.zero_()
            gates = rssm.gates.bias.view(2, 3, 4)  # blocks, gates, D / blocks
            gates[0] = torch.tensor([2.0, 1.0, 50.0])[:, None]
        belief = torch.randn(3, 8)
        new = rssm.core(1, 3)(belief, torch.zeros(3, 12), torch.zeros(3, 5))
        torch.testing.assert_close(new[:, :4], torch.full((3, 4), math.tanh(SIGMOID(2))))
        torch.testing.assert_close(new[:, 4:], (1 - SIGMOID(-1)) * belief[:, 4:])

    def test_every_block_sees_state_and_action_and_only_its_own_belief_directly(self):
        """The block layer's input is its slice of the belief and all three embeddings."""
        rssm = make_rssm()
        assert rssm.hidden.weight.shape == (2, 8 // 2 + 3 * 5, 8 // 2)
        with torch.no_grad():
            rssm.from_belief[0].weight.zero_()  # the way through the dense embedding
            rssm.gates.weight.zero_()
            rssm.gates.bias.zero_()
            rssm.gates.weight[:, :, 4:8] = torch.eye(4)  # candidate = normalised hidden
        rssm.hidden_norm = torch.nn.Identity()  # the norm mixes blocks, as it should

        def new(belief, state, action):
            return rssm.core(1, 1)(belief, state, rssm.action_branch(action))[0].view(2, 4)

        inputs = [torch.randn(1, 8), torch.randn(1, 12), torch.randn(1, 2)]
        jacobians = torch.autograd.functional.jacobian(new, tuple(inputs))
        own = jacobians[0][:, :, 0].view(2, 4, 2, 4).abs().sum((1, 3)) > 0  # [block out, block in]
        assert own.tolist() == [[True, False], [False, True]]
        for seen in jacobians[1:]:
            assert seen.abs().sum((1, 2)).gt(0).all()

    def test_actions_beyond_one_count_as_one(self):
        """Samples of a wide actor lie outside of [-1, 1]; the environment clips them, and so does the model."""
        rssm = make_rssm()
        belief, state = torch.randn(2, 8), torch.zeros(2, 12)

        def new(action):
            return rssm.core(1, 2)(belief, state, rssm.action_branch(torch.tensor(action).expand(2, 2)))

        assert torch.equal(new([3.0, -0.4]), new([1.0, -0.4]))
        assert torch.equal(new([-7.0, 0.0]), new([-1.0, 0.0]))
        assert not torch.equal(new([0.9, -0.4]), new([1.0, -0.4]))

    def test_the_divisor_of_the_action_has_no_gradient(self):
        """a / sg(max(1, |a|)) passes 1 / 3 of the gradient at a = 3; clipping would pass none."""
        rssm, action = make_rssm(), torch.tensor([[3.0, 0.5]], requires_grad=True)
        rssm.from_action = torch.nn.Identity()
        gradient = torch.autograd.grad(rssm.action_branch(action).sum(), action)[0]
        torch.testing.assert_close(gradient, torch.tensor([[1 / 3, 1.0]]))


class TestSequence:
    def test_one_step_at_a_time_is_the_whole_sequence(self):
        """Acting calls `observe` once per step with the carried state; training calls it once per window."""
        rssm = make_rssm()
        inputs = make_inputs(rssm)
        inputs["is_init"][0, 3] = True
        whole = rssm.observe(**inputs)
        belief, state = inputs["belief"], inputs["state"]
        for t in range(STEPS):
            step = {key: inputs[key][:, t : t + 1] for key in ("embed", "action", "is_init", "noise")}
            rollout = rssm.observe(**step, belief=belief, state=state)
            for ours, theirs in zip(rollout, whole, strict=True):
                torch.testing.assert_close(ours[:, 0], theirs[:, t])
            belief, state = rollout.belief[:, 0], rollout.state[:, 0]

    def test_prior_and_posterior_of_a_step(self):
        """The prior knows the belief of its own step, the posterior the observation of its own step besides."""
        rssm = make_rssm()
        inputs = make_inputs(rssm)
        rollout = rssm.observe(**inputs)
        torch.testing.assert_close(rollout.prior_logits, rssm.prior_logits(rollout.belief))
        torch.testing.assert_close(
            rollout.posterior_logits, rssm.posterior_logits(rollout.belief, inputs["embed"]), rtol=1e-4, atol=1e-5
        )
        inputs["embed"] = inputs["embed"].clone()
        inputs["embed"][:, -1] += 1
        seen = rssm.observe(**inputs)
        assert torch.equal(seen.prior_logits, rollout.prior_logits)
        assert not torch.equal(seen.posterior_logits[:, -1], rollout.posterior_logits[:, -1])

    @pytest.mark.parametrize("autocast", [False, True])
    @pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
    def test_takes_either_precision(self, given, autocast):
        """What comes from elsewhere need not have the dtype of autocast: stored latents, encoders of one's own."""
        rssm = make_rssm()
        inputs = make_inputs(rssm)
        for key in ("action", "belief", "state"):
            inputs[key] = inputs[key].to(given)
        if autocast:
            inputs["embed"] = inputs["embed"].to(given)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            rollout = rssm.observe(**inputs)
            imagined = rssm.imagine(
                lambda feature, step: torch.zeros(BATCH, 2), inputs["belief"], inputs["state"], horizon=2
            )
        carried = torch.bfloat16 if autocast else torch.float32
        assert rollout.belief.dtype == rollout.state.dtype == imagined.feature.dtype == carried
        assert rollout.prior_logits.dtype == rollout.posterior_logits.dtype == torch.float32

    def test_feature_is_belief_and_then_state(self):
        rollout = make_rssm().observe(**make_inputs(make_rssm()))
        assert torch.equal(rollout.feature[..., :8], rollout.belief)
        assert torch.equal(rollout.feature[..., 8:], rollout.state)


class TestImagine:
    def make(self, horizon: int = 3, rows: int = 4):
        rssm = make_rssm()
        belief, state = torch.randn(rows, 8), rssm.from_classes(torch.randint(4, (rows, 3)))
        seen = []

        def policy(feature, step):
            assert step == len(seen)
            seen.append(feature)
            return torch.full((rows, 2), 0.1 * (step + 1))

        return rssm, rssm.imagine(policy, belief, state, horizon), (belief, state), seen

    def test_one_state_more_than_actions_and_the_start_is_the_first(self):
        _, imagined, start, _ = self.make()
        assert imagined.feature.shape == (4, 4, 8 + 12) and imagined.action.shape == (4, 3, 2)
        assert torch.equal(imagined.feature[:, 0], torch.cat(start, -1))

    def test_action_t_is_chosen_in_state_t_and_leads_to_state_t_plus_1(self):
        rssm, imagined, _, seen = self.make()
        for t in range(3):
            assert torch.equal(seen[t], imagined.feature[:, t])
            belief, state = imagined.feature[:, t].split([8, 12], -1)
            new = rssm.core(1, 4)(belief, state, rssm.action_branch(imagined.action[:, t]))
            torch.testing.assert_close(imagined.feature[:, t + 1, :8], new)
            ones = imagined.feature[:, t + 1, 8:].unflatten(-1, (3, 4))
            assert torch.equal(ones.sum(-1), torch.ones(4, 3)) and set(ones.unique().tolist()) == {0, 1}

    def test_leaves_no_graph(self):
        """REINFORCE needs no gradient through 15 steps; keeping the graph would cost most of the memory."""
        rssm = make_rssm()
        start = torch.randn(4, 8, requires_grad=True), torch.zeros(4, 12, requires_grad=True)
        weight = torch.ones(2, requires_grad=True)
        imagined = rssm.imagine(lambda feature, step: weight.expand(4, 2), *start, 3)
        assert not imagined.feature.requires_grad and not imagined.action.requires_grad
        assert torch.is_grad_enabled()
