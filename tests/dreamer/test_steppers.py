"""JointStepper: which losses are summed, order of the optimiser's steps against numpy, precision, CUDA graphs."""

import copy
import math
from functools import partialmethod

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.objectives import LossModule

from dreamer.nonfinite import NonFiniteError
from dreamer.steppers import CAPTURE_AFTER, JointStepper
from tests.helpers import compose_config, differing, make_batch, make_env_spec, make_small_agent, snapshot

OPTIMIZATION = compose_config()["optimization"]


class ToyLoss(LossModule):
    """loss_a = mean(x * weight) and loss_b = mean(y * weight): gradients are means of the inputs."""

    functional = False

    def __init__(self, *weight: float):
        super().__init__()
        self.layer = nn.ParameterList([nn.Parameter(torch.tensor(weight))])

    @property
    def in_keys(self) -> list[str]:
        return ["x", "y"]

    def forward(self, batch: TensorDict) -> TensorDict:
        weight = self.layer[0]
        losses = {"loss_a": (batch["x"] * weight).sum(-1).mean(), "loss_b": (batch["y"] * weight).sum(-1).mean()}
        diagnostics = {"size": weight.square().sum(), "dtype": (torch.ones(2, 2) @ torch.ones(2, 2)).sum()}
        context = TensorDict({"state": batch["x"]}, batch.batch_size)
        return TensorDict(losses | {"wm": diagnostics, "replay_context": context})


def make_stepper(loss: LossModule, **overrides) -> JointStepper:
    updates = []
    overrides.setdefault("update_targets", lambda: updates.append(1))
    targets = overrides.pop("update_targets")
    return JointStepper(loss, targets, {("wm/wm_grad_norm", "wm/grad_norm"): loss.layer}, **OPTIMIZATION | overrides)


def toy_batch(x, y=None) -> TensorDict:
    x = torch.tensor([x], dtype=torch.float32)  # [1, D]
    y = torch.zeros_like(x) if y is None else torch.tensor([y], dtype=torch.float32)
    return TensorDict({"x": x, "y": y, "unread": x}, 1)


def optimise(weight: float, gradients: list[float], *, lr, agc, beta1, beta2, eps, warmup_steps) -> list[float]:
    """The update of one scalar as the reference describes it: clip, divide by the RMS, average, warm up."""
    weights, rms, momentum = [], 0.0, 0.0
    for step, gradient in enumerate(gradients, 1):
        gradient *= min(1.0, agc * max(abs(weight), 1e-3) / abs(gradient))
        rms = beta2 * rms + (1 - beta2) * gradient**2
        normalised = gradient / (math.sqrt(rms / (1 - beta2**step)) + eps)
        momentum = beta1 * momentum + (1 - beta1) * normalised
        rate = lr * min(1.0, (step - 1) / warmup_steps) if warmup_steps else lr
        weight -= rate * momentum / (1 - beta1**step)
        weights.append(weight)
    return weights


class TestOptimiser:
    """How TorchRL's optimiser is used here; the optimiser itself is compared with the reference in tests/golden."""

    @pytest.mark.parametrize("warmup_steps", [0, 2])
    def test_trace_of_a_scalar(self, warmup_steps):
        """Clip at 0.3 |w|, then divide by the RMS, then average: Adam averages first and divides afterwards.

        Gradients 2 (clipped to 0.3), -0.1, 5 (clipped) and 0.01 on a weight that starts at 1.
        """
        settings = {"lr": 0.1, "warmup_steps": warmup_steps}
        gradients = [2.0, -0.1, 5.0, 0.01]
        expected = optimise(
            1.0, gradients, **{key: OPTIMIZATION[key] for key in ("agc", "beta1", "beta2", "eps")}, **settings
        )
        loss = ToyLoss(1.0)
        stepper, weights = make_stepper(loss, **settings), []
        for gradient in gradients:
            stepper.step(None, toy_batch([gradient]))
            weights.append(loss.layer[0].item())
        np.testing.assert_allclose(weights, expected, rtol=1e-5)
        assert (weights[0] == 1.0) == (warmup_steps > 0)

    def test_settings_are_those_of_the_paper(self):
        group = make_stepper(ToyLoss(1.0)).optimizer.param_groups[0]
        expected = {
            "lr": 4e-5,
            "agc": 0.3,
            "beta1": 0.9,
            "beta2": 0.999,
            "eps": 1e-20,
            "warmup_steps": 1000,
            "parameter_norm_min": 1e-3,
        }
        assert {key: group[key] for key in expected} == expected

    def test_the_first_update_has_learning_rate_zero(self):
        agent = make_small_agent()
        before = snapshot(agent.loss)
        agent.stepper.step(None, make_batch(agent))
        assert set(differing(before, snapshot(agent.loss))) <= {
            "actor_critic.return_norm.low",
            "actor_critic.return_norm.high",
        }
        agent.stepper.step(None, make_batch(agent))
        assert "model.world_model.rssm.gates.weight" in differing(before, snapshot(agent.loss))

    def test_tensors_of_zeros_are_clipped_to_a_small_norm_and_still_move(self):
        """A norm of 0 counts as 1e-3: the gradient (3, 4) shrinks to a norm of 0.3e-3, and the update is
        lr * g / |g| per component after dividing by the RMS, 0.1 here."""
        loss = ToyLoss(0.0, 0.0)
        stepper = make_stepper(loss, lr=0.1, warmup_steps=0)
        stepper.step(None, toy_batch([3.0, 4.0]))
        state = stepper.optimizer.state[loss.layer[0]]
        clipped = (state["rms"] / (1 - 0.999)).sqrt()
        torch.testing.assert_close(clipped, 3e-4 * torch.tensor([0.6, 0.8]), rtol=1e-4, atol=0)
        torch.testing.assert_close(loss.layer[0].detach(), torch.tensor([-0.1, -0.1]), rtol=1e-4, atol=0)

    def test_heads_that_start_at_zero_leave_it(self):
        agent = make_small_agent("optimization.warmup_steps=0")
        heads = agent.loss.model.world_model.reward_head[-1], agent.loss.actor_critic.critic[-1]
        assert not any(head.weight.any() for head in heads)
        agent.stepper.step(None, make_batch(agent))
        assert all(head.weight.any() for head in heads)


class TestStep:
    def test_sums_the_losses_and_nothing_else(self):
        """Gradients 2 and 3 of loss_a and loss_b; the diagnostics beside them have gradients too, which do not count.

        Norms are taken before clipping.
        """
        loss = ToyLoss(1.0)
        metrics = make_stepper(loss).step(None, toy_batch([2.0], [3.0]))
        assert loss.layer[0].grad.item() == 5
        assert metrics["wm/wm_grad_norm"].item() == 5

    def test_gradients_are_not_carried_over(self):
        loss = ToyLoss(1.0)
        stepper = make_stepper(loss)
        for gradient in (2.0, 3.0):
            stepper.step(None, toy_batch([gradient]))
            assert loss.layer[0].grad.item() == gradient

    def test_returns_detached_scalars_by_flat_name(self):
        metrics = make_stepper(ToyLoss(1.0)).step(None, toy_batch([2.0]))
        assert set(metrics.keys()) == {"loss_a", "loss_b", "wm/size", "wm/dtype", "wm/wm_grad_norm", "wm/grad_norm"}
        assert all(value.shape == () and not value.requires_grad for value in metrics.values())

    def test_hands_the_latents_to_the_batch(self):
        batch = toy_batch([2.0])
        make_stepper(ToyLoss(1.0)).step(None, batch)
        assert torch.equal(batch["replay_context", "state"], batch["x"])

    def test_targets_move_after_the_optimiser(self):
        """The slow critic averages over weights after the update; before it, it would lag one more."""
        loss, seen = ToyLoss(1.0), []
        stepper = make_stepper(loss, lr=0.1, warmup_steps=0, update_targets=lambda: seen.append(loss.layer[0].item()))
        stepper.step(None, toy_batch([2.0]))
        assert seen == [pytest.approx(0.9)]

    def test_slow_critic_follows_the_critic_of_the_same_update(self):
        """slow_n = 0.98 slow_(n-1) + 0.02 critic_n over three updates of the whole agent."""
        agent = make_small_agent("optimization.warmup_steps=0", "optimization.lr=1e-2")
        actor_critic, expected = agent.loss.actor_critic, snapshot(agent.loss.actor_critic.critic)
        for n in range(3):
            agent.stepper.step(None, make_batch(agent, seed=n))
            current = snapshot(actor_critic.critic)
            expected = {name: 0.98 * value + 0.02 * current[name] for name, value in expected.items()}
        slow = snapshot(actor_critic.slow_critic)
        assert differing(slow, snapshot(actor_critic.critic))
        for name, value in slow.items():
            torch.testing.assert_close(value, expected[name], msg=name)

    def test_same_seed_same_updates(self):
        def train():
            agent = make_small_agent("optimization.warmup_steps=0")
            metrics = [agent.stepper.step(None, make_batch(agent, seed=n)) for n in range(3)]
            return snapshot(agent.loss), metrics

        (weights, metrics), (other_weights, other_metrics) = train(), train()
        assert not differing(weights, other_weights)
        for ours, theirs in zip(metrics, other_metrics, strict=True):
            assert (ours == theirs).all()


class TestNotFinite:
    def test_nothing_changes(self):
        """Weights, optimiser, targets, and the statistics that the loss itself moves; then training goes on as ever."""
        agent, twin = make_small_agent("optimization.warmup_steps=0"), make_small_agent("optimization.warmup_steps=0")
        for each in (agent, twin):
            torch.manual_seed(1)
            each.stepper.step(None, make_batch(each))
        before, averages = snapshot(agent.loss), copy.deepcopy(agent.stepper.state_dict())
        bad = make_batch(agent)
        bad["reward"][0, 1] = torch.nan
        with pytest.raises(NonFiniteError, match=r"loss_model_reward.*reward at \[0, 1, 0\]"):
            agent.stepper.step(None, bad)
        assert not differing(snapshot(agent.loss), before)
        assert str(agent.stepper.state_dict()) == str(averages)
        assert "replay_context" not in bad.keys()  # noqa: SIM118
        for each in (agent, twin):
            torch.manual_seed(2)
            each.stepper.step(None, make_batch(each, seed=1))
        assert not differing(snapshot(agent.loss), snapshot(twin.loss))

    def test_a_gradient_alone(self):
        loss = ToyLoss(1.0)
        stepper = make_stepper(loss, lr=0.1, warmup_steps=0)
        loss.layer[0].register_hook(lambda gradient: gradient * torch.inf)
        with pytest.raises(NonFiniteError, match="wm/wm_grad_norm"):
            stepper.step(None, toy_batch([2.0]))
        assert loss.layer[0].item() == 1


def test_settings_survive_a_resume():
    """Averages and counters are taken over, the learning rate is the one that was asked for."""
    before, after = make_stepper(ToyLoss(1.0), lr=0.1), make_stepper(ToyLoss(1.0), lr=0.2)
    before.step(None, toy_batch([2.0]))
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    group = after.optimizer.param_groups[0]
    assert (group["lr"], group["step"]) == (0.2, 1)
    assert after.settings >= set(group) & set(OPTIMIZATION), "a setting that a resume would take over"


class TestPrecision:
    @pytest.mark.parametrize(("autocast", "half"), [("auto", False), (False, False), ("bfloat16", True)])
    def test_products_in_bfloat16_only_where_asked(self, autocast, half, monkeypatch):
        """ "auto" means bfloat16 on a GPU and float32 on a CPU. Weights and gradients are float32 in any case."""
        loss, seen = ToyLoss(1.0), []
        forward = loss.forward
        monkeypatch.setattr(
            loss, "forward", lambda batch: seen.append(torch.is_autocast_enabled("cpu")) or forward(batch)
        )
        make_stepper(loss, autocast=autocast).step(None, toy_batch([2.0]))
        assert seen == [half]
        assert loss.layer[0].dtype == loss.layer[0].grad.dtype == torch.float32

    def test_trains_in_bfloat16(self):
        agent = make_small_agent("optimization.autocast=bfloat16", "optimization.warmup_steps=0", randomize=True)
        before = snapshot(agent.loss)
        for n in range(2):
            metrics = agent.stepper.step(None, make_batch(agent, seed=n))
        assert all(value.isfinite() for value in metrics.values())
        assert all(p.dtype == torch.float32 for p in agent.loss.parameters())
        trained = {name for name, p in agent.loss.named_parameters() if p.requires_grad}
        assert trained <= set(differing(before, snapshot(agent.loss)))

    def test_unknown_autocast(self):
        with pytest.raises(ValueError, match=r"optimization\.autocast='float16'"):
            make_stepper(ToyLoss(1.0), autocast="float16")

    def test_cuda_graph_without_a_gpu(self):
        with pytest.raises(ValueError, match=r"optimization\.cudagraph=true needs a GPU"):
            make_stepper(ToyLoss(1.0), cudagraph=True)


@pytest.mark.slow
def test_compiled_networks_give_the_same_updates(monkeypatch):
    """With the backend that traces but makes no machine code, which would take minutes."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))

    def train(compiled: bool):
        overrides = f"optimization.compile.enabled={str(compiled).lower()}", "optimization.warmup_steps=0"
        agent = make_small_agent(*overrides, env_spec=make_env_spec(vector=False))
        torch.manual_seed(1)
        return [agent.stepper.step(None, make_batch(agent, seed=n)) for n in range(2)]

    for eager, compiled in zip(train(False), train(True), strict=True):
        for name, value in eager.items():
            torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestCudaGraph:
    """A graph repeats what was recorded: it must not have baked in the learning rate, the step, the random numbers,
    the statistics of the returns or the place of the parameters, nor hand out memory that the next update overwrites.
    """

    UPDATES = 5
    SETTINGS = ("optimization.warmup_steps=8", "optimization.autocast=false", "optimization.lr=1e-3")

    def make(self, captured: bool):
        agent = make_small_agent(*self.SETTINGS, f"optimization.cudagraph={str(captured).lower()}", device="cuda")
        return agent

    def update(self, agent, count: int, first: int = 0) -> list[TensorDict]:
        """Updates whose random numbers start from a known place each."""
        results = []
        for n in range(first, first + count):
            batch = make_batch(agent, seed=n)
            torch.cuda.manual_seed(n)
            metrics = agent.stepper.step(None, batch)
            metrics["context"] = batch["replay_context"].clone()
            results.append(metrics)
        return results

    def assert_same(self, captured, eager, results, expected) -> None:
        for ours, theirs in zip(results, expected, strict=True):
            for key, value in theirs.items(True, True):
                torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5, msg=str(key))
        left, right = snapshot(captured.loss), snapshot(eager.loss)
        for name, value in right.items():
            torch.testing.assert_close(left[name], value, rtol=1e-4, atol=1e-5, msg=name)
        ours, theirs = (agent.stepper.optimizer.state_dict() for agent in (captured, eager))
        assert ours["param_groups"][0]["step"] == theirs["param_groups"][0]["step"]
        for index, state in theirs["state"].items():
            for name, value in state.items():
                torch.testing.assert_close(ours["state"][index][name], value, rtol=1e-3, atol=1e-5)

    def test_captured_updates_equal_eager_ones(self):
        captured, eager = self.make(True), self.make(False)
        self.update(captured, CAPTURE_AFTER), self.update(eager, CAPTURE_AFTER)
        results = self.update(captured, self.UPDATES, CAPTURE_AFTER)  # all of them replayed
        self.assert_same(captured, eager, results, self.update(eager, self.UPDATES, CAPTURE_AFTER))

    def test_also_after_loading_other_weights(self):
        """load_state_dict must fill the tensors that the graph reads, not put others in their place."""
        captured, eager = self.make(True), self.make(False)
        self.update(captured, CAPTURE_AFTER + 2)
        self.update(eager, 3)
        captured.loss.load_state_dict(copy.deepcopy(eager.loss.state_dict()))
        captured.stepper.load_state_dict(copy.deepcopy(eager.stepper.state_dict()))
        results = self.update(captured, self.UPDATES, 100)
        self.assert_same(captured, eager, results, self.update(eager, self.UPDATES, 100))

    def test_results_of_an_update_outlive_the_next_one(self):
        agent = self.make(True)
        self.update(agent, CAPTURE_AFTER)
        results = self.update(agent, 2, CAPTURE_AFTER)
        assert results[0]["loss_model_reco"] != results[1]["loss_model_reco"]
