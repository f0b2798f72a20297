"""Losses of Dreamer V1: every formula by hand, where gradients go and where not, and TorchRL's own pieces."""

import math
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.objectives import DreamerModelLoss
from torchrl.objectives.value.functional import td_lambda_return_estimate

from dreamer.models.gaussian_rssm import GaussianRSSM
from dreamer.models.heads_v1 import Head, OneHotActor, TanhNormalActor
from dreamer.models.world_model import WorldModel
from objectives.dreamer_v1 import (
    DreamerV1Loss,
    DreamerV1ModelLoss,
    DynamicsActorValueLoss,
    clamped_mean,
    gaussian_entropy,
    gaussian_kl,
    gaussian_nll,
    imagined_returns,
)

BATCH, STEPS, ACTIONS, OBSERVATION = 3, 4, 2, 5
BELIEF, STATE = 8, 4


class Decoder(nn.Linear):
    def forward(self, belief: Tensor, state: Tensor) -> Tensor:
        return super().forward(torch.cat([belief, state], -1))


def make_loss(*, predict_end: bool = False, discrete: bool = False, **settings) -> DreamerV1Loss:
    torch.manual_seed(0)
    feature = BELIEF + STATE
    world_model = WorldModel(
        encoders={"observation": nn.Linear(OBSERVATION, 6)},
        rssm=GaussianRSSM(embed_size=6, action_size=ACTIONS, belief_size=BELIEF, state_size=STATE, hidden_size=7),
        decoders={"observation": Decoder(feature, OBSERVATION)},
        reward_head=Head(feature, 1, units=7, layers=1),
        continue_head=Head(feature, 1, units=7, layers=1) if predict_end else None,
    )
    make_actor = OneHotActor if discrete else TanhNormalActor
    actor, critic = make_actor(feature, ACTIONS, units=7, layers=1), Head(feature, 1, units=7, layers=1)
    model_settings = {key: settings.pop(key) for key in ("weights", "free_nats") if key in settings}
    return DreamerV1Loss(
        DreamerV1ModelLoss(world_model, **model_settings),
        DynamicsActorValueLoss(world_model, actor, critic, **{"imagination_horizon": 5} | settings),
    )


def make_batch() -> TensorDict:
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH, STEPS)
    flags = {key: torch.zeros(*shape, 1, dtype=torch.bool) for key in ("is_init", "terminated")}
    flags["terminated"][0, 2] = True
    return TensorDict(
        {
            "observation": torch.randn(*shape, OBSERVATION, generator=generator),
            "action": torch.rand(*shape, ACTIONS, generator=generator) * 2 - 1,
            "reward": torch.randn(*shape, 1, generator=generator),
            **flags,
        },
        shape,
    )


class TestPieces:
    def test_kl_by_hand(self):
        """KL(N(1, 2^2) || N(0, 1)) = -log 2 + (4 + 1) / 2 - 1/2, and it is not symmetric."""
        mean, std, zero, one = torch.tensor([1.0]), torch.tensor([2.0]), torch.zeros(1), torch.ones(1)
        assert gaussian_kl(mean, std, zero, one).item() == pytest.approx(2 - math.log(2))
        assert gaussian_kl(zero, one, mean, std).item() == pytest.approx(math.log(2) + 2 / 8 - 0.5)

    def test_kl_and_entropy_are_summed_over_the_latents(self):
        torch.manual_seed(0)
        p, q = ((torch.randn(3, 4, 5), torch.rand(3, 4, 5) + 0.1) for _ in range(2))
        normal = torch.distributions.Normal
        kl = torch.distributions.kl_divergence(normal(*p), normal(*q)).sum(-1)
        torch.testing.assert_close(gaussian_kl(*p, *q), kl)
        torch.testing.assert_close(gaussian_entropy(p[1]), normal(*p).entropy().sum(-1))

    def test_the_floor_acts_on_the_mean(self):
        """mean(0, 8) = 4 is above 3 although 0 is below it; max(3, each) would give 5.5."""
        kl = torch.tensor([[0.0, 8.0]], requires_grad=True)
        assert clamped_mean(kl, 3.0).item() == 4
        clamped_mean(kl, 3.0).backward()
        assert kl.grad.tolist() == [[0.5, 0.5]]
        kl.grad = None
        clamped_mean(kl, 4.5).backward()
        assert clamped_mean(kl, 4.5).item() == 4.5 and not kl.grad.any()

    def test_nll_has_the_half(self):
        assert gaussian_nll(torch.tensor(1.0), torch.tensor(4.0)).item() == 4.5

    def test_returns_by_hand(self):
        """R_1 = 2 + 0.8 * 30; R_0 = 1 + 0.5 * (0.75 * 20 + 0.25 * R_1); weights 1 and c_0. r_2 and c_2 are not used."""
        reward, continuation = torch.tensor([[1.0, 2, 3]]), torch.tensor([[0.5, 0.8, 0.1]])
        returns, weight = imagined_returns(reward, continuation, torch.tensor([[10.0, 20, 30]]), 0.25)
        assert returns.tolist()[0] == pytest.approx([1 + 0.5 * (0.75 * 20 + 0.25 * 26), 26])
        assert weight.tolist()[0] == pytest.approx([1, 0.5])

    def test_returns_are_torchrls(self):
        torch.manual_seed(0)
        reward, value = torch.randn(2, 4, 15)
        returns, _ = imagined_returns(reward, torch.full((4, 15), 0.99), value, 0.95)
        done = torch.zeros(4, 14, 1, dtype=torch.bool)
        theirs = td_lambda_return_estimate(0.99, 0.95, value[:, 1:, None], reward[:, :-1, None], done, done)
        assert returns.shape == (4, 14)
        torch.testing.assert_close(returns, theirs.squeeze(-1))

    def test_kl_is_torchrls_with_the_clamp_after_averaging(self):
        torch.manual_seed(0)
        mean, other = torch.randn(2, 3, 4, 5)
        std, other_std = torch.rand(2, 3, 4, 5) + 0.1
        for free_nats in (0.0, 1000.0):
            settings = SimpleNamespace(free_nats=free_nats, delayed_clamp=True, global_average=False)
            theirs = DreamerModelLoss.kl_loss.__wrapped__(settings, other, other_std, mean, std)
            ours = clamped_mean(gaussian_kl(mean, std, other, other_std), free_nats)
            torch.testing.assert_close(ours, theirs)


class TestModel:
    def test_half_squared_errors(self):
        loss, batch = make_loss(), make_batch()
        terms, rollout = loss.model.terms(batch)
        reward = loss.model.world_model.reward_head(rollout.feature)
        torch.testing.assert_close(terms["model_reward"], 0.5 * (reward - batch["reward"]).squeeze(-1) ** 2)
        target = torch.sign(batch["observation"]) * torch.log1p(batch["observation"].abs())
        decoded = loss.model.world_model.decode(rollout.belief, rollout.state)["observation"]
        torch.testing.assert_close(terms["model_reco"], 0.5 * ((decoded - target) ** 2).sum(-1))

    def test_continue_learns_the_discount(self):
        loss, batch = make_loss(predict_end=True), make_batch()
        terms, rollout = loss.model.terms(batch)
        p = torch.sigmoid(loss.model.world_model.continue_head(rollout.feature)).squeeze(-1)
        torch.testing.assert_close(terms["model_continue"][0, 1], -(0.99 * p.log() + 0.01 * (1 - p).log())[0, 1])
        torch.testing.assert_close(terms["model_continue"][0, 2], -(1 - p).log()[0, 2])

    def test_weights(self):
        weights = {"model_reco": 2.0, "model_reward": 3.0, "model_kl": 5.0, "model_continue": 7.0}
        loss, plain = make_loss(predict_end=True, weights=weights), make_loss(predict_end=True)
        assert plain.model.weights["model_continue"] == 10
        torch.manual_seed(0)
        weighted = loss(make_batch())
        torch.manual_seed(0)
        terms, _ = loss.model.terms(make_batch())
        for name, weight in weights.items():
            torch.testing.assert_close(weighted[f"loss_{name}"], weight * terms[name].mean())
        assert "model_continue" not in make_loss(weights=weights).model.weights

    def test_windows_start_from_zeros_with_a_real_first_action(self):
        loss, batch = make_loss(), make_batch()
        torch.manual_seed(0)
        first = loss.model.observe(batch).belief[:, 0]
        rssm = loss.model.world_model.rssm
        zeros = rssm.initial(BATCH, torch.device("cpu"))
        expected = rssm.imagine(lambda *_: batch["action"][:, 0], *zeros, 1).feature[:, 1, :BELIEF]
        torch.testing.assert_close(first, expected)
        batch["is_init"][:, 0] = True
        assert not torch.allclose(loss.model.observe(batch).belief[:, 0], expected)

    @pytest.mark.parametrize("predict_end", [False, True])
    def test_keys(self, predict_end):
        loss = make_loss(predict_end=predict_end)
        out = loss(make_batch().select(*loss.in_keys))
        assert set(out.keys()) == set(loss.out_keys)
        assert ("loss_model_continue" in loss.out_keys) == predict_end
        loss.set_keys(reward="other")
        assert loss(make_batch().rename_key_("reward", "other"))["loss_model_reward"] > 0


def starts() -> TensorDict:
    generator = torch.Generator().manual_seed(2)
    return TensorDict(
        {
            "belief": torch.randn(BATCH, STEPS, BELIEF, generator=generator),
            "state": torch.randn(BATCH, STEPS, STATE, generator=generator),
        },
        (BATCH, STEPS),
    )


def has_gradient(module: nn.Module) -> list[bool]:
    return [p.grad is not None and bool(p.grad.any()) for p in module.parameters()]


class TestActorAndValue:
    @pytest.mark.parametrize("predict_end", [False, True])
    @pytest.mark.parametrize("discrete", [False, True])
    def test_each_loss_trains_its_own_part_only(self, predict_end, discrete):
        loss = make_loss(predict_end=predict_end, discrete=discrete)
        part = loss.actor_value
        for trained, others, key in (
            (part.actor, (part.critic, part.world_model), "loss_actor"),
            (part.critic, (part.actor, part.world_model), "loss_value"),
        ):
            loss.zero_grad()
            part(starts())[key].backward()
            assert all(has_gradient(trained)), key
            assert not any(flag for other in others for flag in has_gradient(other)), key
        assert all(p.requires_grad for p in loss.parameters())

    def test_the_model_is_trained_by_its_own_losses_only(self):
        loss = make_loss()
        losses = loss(make_batch())
        (losses["loss_actor"] + losses["loss_value"]).backward()
        assert not any(has_gradient(loss.model))

    def test_the_actor_does_not_train_what_it_reads(self):
        """A gradient through the features read would be that of a policy that also steers what it will see."""
        loss, seen = make_loss(), []
        actor = loss.actor_value.actor
        actor.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        loss.actor_value(starts())
        assert len(seen) == 5 and not any(feature.requires_grad for feature in seen)

    def test_gradients_come_through_the_dynamics(self):
        """Every action has a gradient, the last one through the value that the returns end with."""
        loss, actions = make_loss(lmbda=1.0), []
        part = loss.actor_value

        def act(feature, step):
            actions.append(torch.zeros(len(feature), ACTIONS, requires_grad=True))
            return actions[-1]

        part.act = act
        part(starts())["loss_actor"].backward()
        assert len(actions) == 5
        assert all(action.grad.any(1).all() for action in actions)

    def test_hand_computed_losses(self):
        """Constant heads: reward 1, value 2, discount 0.9, three states. R_1 = 2.8, R_0 = 1 + 0.9 * (1 + 1.4)."""
        loss = make_loss(imagination_horizon=3, lmbda=0.5, horizon=10.0)
        part = loss.actor_value
        for head, value in ((part.world_model.reward_head, 1.0), (part.critic, 2.0)):
            nn.init.zeros_(head[-1].weight)
            nn.init.constant_(head[-1].bias, value)
        out = part(starts())
        returns = [1 + 0.9 * (0.5 * 2 + 0.5 * 2.8), 2.8]
        assert out["loss_actor"].item() == pytest.approx(-(returns[0] + 0.9 * returns[1]) / 2)
        errors = [0.5 * (value - 2) ** 2 for value in returns]
        assert out["loss_value"].item() == pytest.approx((errors[0] + 0.9 * errors[1]) / 2)
        assert out["ac", "return_mean"].item() == pytest.approx(sum(returns) / 2)

    @pytest.mark.parametrize("predict_end", [False, True])
    def test_where_imagination_starts(self, predict_end):
        """From every posterior state, but for the last of a window where an end is predicted."""
        loss, rows = make_loss(predict_end=predict_end), []
        imagine = loss.model.world_model.rssm.imagine

        def count(policy, belief, state, horizon):
            rows.append((len(belief), belief.requires_grad or state.requires_grad, horizon))
            return imagine(policy, belief, state, horizon)

        loss.model.world_model.rssm.imagine = count
        loss(make_batch())
        assert rows == [(BATCH * (STEPS - 1 if predict_end else STEPS), False, 5)]

    def test_one_imagined_state_is_refused(self):
        with pytest.raises(ValueError, match="imagination_horizon=1"):
            make_loss(imagination_horizon=1)

    def test_training_raises_the_imagined_return(self):
        """A fixed model whose reward depends on its state: the actor alone moves."""
        loss = make_loss(imagination_horizon=4)
        part = loss.actor_value
        nn.init.zeros_(part.critic[-1].weight)
        optimizer = torch.optim.Adam(part.actor.parameters(), lr=0.03)
        returns = []
        for _ in range(60):
            out = part(starts())
            optimizer.zero_grad()
            out["loss_actor"].backward()
            optimizer.step()
            returns.append(out["ac", "return_mean"])
        assert torch.stack(returns[-10:]).mean() > torch.stack(returns[:10]).mean() + 0.05


def test_bfloat16():
    loss = make_loss(predict_end=True)
    with torch.autocast("cpu", torch.bfloat16):
        losses = loss(make_batch())
    total = sum(value for key, value in losses.items() if key.startswith("loss_"))
    assert total.dtype == torch.float32
    total.backward()
    assert all(p.grad.isfinite().all() for p in loss.parameters())
