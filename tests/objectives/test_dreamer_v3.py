"""The losses as modules: who is trained by what, stop-gradients, imagination, precision, and their protocol."""

import math

import pytest
import torch
from tensordict import TensorDict
from torch.nn import functional as F

from objectives.terms import weigh
from tests.helpers import differing, fix_samples, gradient_size, make_batch, make_small_agent, snapshot

FREE = "agent.free_nats=0.0"
CORE = ("from_belief", "from_state", "from_action", "hidden", "hidden_norm", "gates")
POSTERIOR = ("posterior_in", "posterior_head")
HORIZON = 15


def groups(agent) -> dict[str, list[torch.nn.Parameter]]:
    """Parameters by the part that they belong to."""
    model, actor_critic = agent.loss.model.world_model, agent.loss.actor_critic
    modules = {
        "encoder": [model.encoders],
        "core": [getattr(model.rssm, name) for name in CORE],
        "posterior": [getattr(model.rssm, name) for name in POSTERIOR],
        "prior": [model.rssm.prior_head],
        "decoder": [model.decoders],
        "reward": [model.reward_head],
        "continue": [model.continue_head],
        "actor": [actor_critic.actor],
        "critic": [actor_critic.critic],
        "slow critic": [actor_critic.slow_critic],
    }
    found = {name: [p for module in parts for p in module.parameters()] for name, parts in modules.items()}
    assert sum(map(len, found.values())) == len(list(agent.loss.parameters()))
    return found


def trained_by(agent, batch: TensorDict, name: str) -> set[str]:
    """Parts that get a gradient from one loss."""
    agent.loss.zero_grad()
    torch.manual_seed(0)
    agent.loss(batch)[f"loss_{name}"].backward()
    return {part for part, parameters in groups(agent).items() if gradient_size(parameters)}


class TestWhoIsTrained:
    @pytest.mark.parametrize(
        ("name", "parts"),
        [
            ("model_reco", {"encoder", "core", "posterior", "decoder"}),
            ("model_reward", {"encoder", "core", "posterior", "reward"}),
            ("model_continue", {"encoder", "core", "posterior", "continue"}),
            ("model_dynamic", {"encoder", "core", "posterior", "prior"}),  # through the states of earlier steps
            ("model_representation", {"encoder", "core", "posterior"}),
            ("actor", {"actor"}),
            ("value", {"critic"}),
            ("value_replay", {"encoder", "core", "posterior", "critic"}),
        ],
    )
    def test_each_loss(self, name, parts):
        agent = make_small_agent(FREE, randomize=True)
        assert trained_by(agent, make_batch(agent), name) == parts

    @pytest.mark.parametrize(
        ("name", "parts"),
        [("model_dynamic", {"core", "prior"}), ("model_representation", {"encoder", "core", "posterior"})],
    )
    def test_kl_terms_of_a_single_step(self, name, parts):
        """Without earlier steps the dynamics loss leaves the posterior alone, and the other one the prior."""
        agent = make_small_agent(FREE, randomize=True)
        agent.loss.model(make_batch(agent, length=1))[f"loss_{name}"].backward()
        assert {part for part, parameters in groups(agent).items() if gradient_size(parameters)} == parts

    @pytest.mark.parametrize("name", ["model_dynamic", "model_representation"])
    def test_nothing_below_the_free_nats(self, name):
        agent = make_small_agent("agent.free_nats=1e6", randomize=True)
        assert trained_by(agent, make_batch(agent), name) == set()

    def test_every_parameter_counts(self):
        """All losses together reach every parameter but those of the slow critic: no branch is cut off."""
        agent = make_small_agent(FREE, randomize=True)
        losses = agent.loss(make_batch(agent))
        sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
        slow = set(agent.loss.actor_critic.slow_critic.parameters())
        for name, parameter in agent.loss.named_parameters():
            assert (parameter.grad is not None and parameter.grad.any()) == (parameter not in slow), name
            assert parameter.requires_grad == (parameter not in slow), name


class TestWorldModel:
    def terms(self, agent, batch):
        torch.manual_seed(0)
        return agent.loss.model.terms(batch)[0]

    def test_reconstruction_by_hand(self):
        """Image: sigmoid(0) = 0.5 against 51 / 255 = 0.2 in 768 values: 69.12. Vector: 0 against the symlog of
        (e - 1, 0, 0, 0, 1 - e), which is (1, 0, 0, 0, -1): 2. Sums over values and keys, one number per step.
        """
        agent = make_small_agent()
        decoders = agent.loss.model.world_model.decoders
        with torch.no_grad():
            for decoder in decoders.values():
                decoder.out.weight.zero_()
        batch = make_batch(agent)
        batch["pixels"].fill_(51)
        batch["observation"].copy_(torch.tensor([math.e - 1, 0, 0, 0, 1 - math.e]))
        torch.testing.assert_close(self.terms(agent, batch)["model_reco"], torch.full((2, 4), 71.12))

    def test_vectors_are_compared_as_symlog_on_both_sides(self):
        """The decoder predicts symlog(x): a prediction of 1 for x = e - 1 is perfect."""
        agent = make_small_agent()
        decoders = agent.loss.model.world_model.decoders
        with torch.no_grad():
            for decoder in decoders.values():
                decoder.out.weight.zero_()
            decoders["observation"].out.bias.fill_(1)
        batch = make_batch(agent)
        batch["observation"].fill_(math.e - 1)
        batch["pixels"].fill_(0)
        torch.testing.assert_close(self.terms(agent, batch)["model_reco"], torch.full((2, 4), 0.25 * 768))

    def test_target_of_the_continue_head(self):
        """(1 - terminated) (1 - 1/333): a time limit is no end. softplus(z) - z target for a constant logit z = 2."""
        agent = make_small_agent()
        head = agent.loss.model.world_model.continue_head[-1]
        with torch.no_grad():
            head.weight.zero_()
            head.bias.fill_(2)
        batch = make_batch(agent)
        batch["done"][:, 1] = True  # row 0 by a time limit, row 1 by an end of the task
        batch["terminated"][1, 1] = True
        target = (F.softplus(torch.tensor(2.0)) - self.terms(agent, batch)["model_continue"]) / 2
        expected = torch.full((2, 4), 1 - 1 / 333)
        expected[1, 1] = 0
        torch.testing.assert_close(target, expected, rtol=0, atol=1e-6)

    def test_reward_belongs_to_its_own_step(self):
        """The reward on arriving at a step is predicted from the state that has seen that step."""
        agent = make_small_agent(randomize=True)
        batch = make_batch(agent)
        before = self.terms(agent, batch)["model_reward"]
        batch["reward"][0, 2] += 1
        changed = self.terms(agent, batch)["model_reward"] != before
        assert changed.nonzero().tolist() == [[0, 2]]
        batch["observation"][1, 2] += 1
        changed = self.terms(agent, batch)["model_reward"][1] != before[1]
        assert changed.tolist() == [False, False, True, True]

    def test_context_fits_into_the_records_that_it_came_from(self):
        agent = make_small_agent()
        context = agent.loss(make_batch(agent))["replay_context"]
        for key in ("belief", "state"):
            assert context[key].shape == (2, 4, *agent.record[key].shape)
            assert context[key].dtype == agent.record[key].dtype
            assert not context[key].requires_grad

    def test_context_is_the_posterior(self):
        agent = make_small_agent()
        batch, rssm = make_batch(agent), agent.loss.model.world_model.rssm
        torch.manual_seed(0)
        rollout = agent.loss.model.observe(batch)
        torch.manual_seed(0)
        context = agent.loss(batch)["replay_context"]
        assert torch.equal(context["belief"], rollout.belief.bfloat16())
        assert torch.equal(rssm.from_classes(context["state"]), rollout.state)


def record_imagination(agent) -> list:
    """Keep what `rssm.imagine` gives."""
    rssm, kept = agent.loss.model.world_model.rssm, []
    imagine = rssm.imagine
    rssm.imagine = lambda *args: kept.append(imagine(*args)) or kept[-1]
    return kept


@torch.no_grad()
def set_continue_logit(agent, logit: float) -> None:
    head = agent.loss.model.world_model.continue_head[-1]
    head.weight.zero_()
    head.bias.fill_(logit)


class TestImagination:
    def test_fifteen_steps_from_every_posterior_state(self):
        """H = 15 gives 16 states, the first of them the posterior itself; all T steps of all windows start one."""
        agent = make_small_agent()
        kept, batch = record_imagination(agent), make_batch(agent)
        torch.manual_seed(0)
        rollout = agent.loss.model.observe(batch)
        torch.manual_seed(0)
        agent.loss(batch)
        imagined = kept[0]
        assert imagined.feature.shape == (2 * 4, HORIZON + 1, 64 + 8 * 4)
        assert imagined.action.shape == (2 * 4, HORIZON, 2)
        assert torch.equal(imagined.feature[:, 0], rollout.feature.flatten(0, 1))

    def test_leaves_no_graph(self):
        agent = make_small_agent()
        kept = record_imagination(agent)
        agent.loss(make_batch(agent))
        assert not kept[0].feature.requires_grad and not kept[0].action.requires_grad

    def test_actions_are_sampled(self):
        """TorchRL calls losses under deterministic exploration: a policy that obeys it would imagine its mode."""
        agent = make_small_agent()
        kept = record_imagination(agent)
        agent.loss(make_batch(agent))
        mode = agent.loss.actor_critic.actor(kept[0].feature[:, :-1]).mode
        assert (kept[0].action - mode).std() > 0.5

    def test_continue_is_a_probability(self):
        """0.6 stays 0.6 and is not rounded to 1: weights 0.6^(t + 1), and no discount on top."""
        agent = make_small_agent()
        set_continue_logit(agent, math.log(0.6 / 0.4))
        diagnostics = agent.loss(make_batch(agent))["ac"]
        assert diagnostics["continuation_mean"].item() == pytest.approx(0.6, rel=1e-6)
        weights = [0.6 ** (t + 1) for t in range(HORIZON + 1)]
        assert diagnostics["weight_mean"].item() == pytest.approx(sum(weights) / 16, rel=1e-5)

    def test_states_predicted_to_be_terminal_train_no_policy(self):
        agent = make_small_agent(randomize=True)
        set_continue_logit(agent, -200.0)
        assert trained_by(agent, make_batch(agent), "actor") == set()
        assert trained_by(agent, make_batch(agent), "value") == set()

    def test_return_statistics_are_updated_once_per_loss(self):
        """low and high move by 1% of the way to the percentiles of the batch's returns, starting from 0."""
        agent = make_small_agent(randomize=True)
        kept = []
        actor_critic = agent.loss.actor_critic
        terms = actor_critic.terms
        actor_critic.terms = lambda *args: kept.append(terms(*args)) or kept[-1]
        agent.loss(make_batch(agent))
        returns = kept[0][1].returns
        assert returns.shape == (8, HORIZON)
        norm = actor_critic.return_norm
        for value, quantile in ((norm.low, 0.05), (norm.high, 0.95)):
            assert value.item() == pytest.approx(0.01 * returns.quantile(quantile).item(), rel=1e-5)

    def test_replay_critic_bootstraps_from_the_first_imagined_return(self):
        agent = make_small_agent(randomize=True)
        given, imagined = [], []
        replay, actor_critic = agent.loss.replay_critic, agent.loss.actor_critic
        replay_terms, imagined_terms = replay.terms, actor_critic.terms
        replay.terms = lambda *args, **kwargs: given.append(kwargs) or replay_terms(*args, **kwargs)
        actor_critic.terms = lambda *args: imagined.append(imagined_terms(*args)) or imagined[-1]
        agent.loss(make_batch(agent))
        bootstrap, slow_value = given[0]["bootstrap"], given[0]["slow_value"]
        trajectories = imagined[0][1]
        for b in range(2):
            for t in range(4):
                assert bootstrap[b, t] == trajectories.returns[b * 4 + t, 0]
                assert slow_value[b, t] == trajectories.slow_value[b * 4 + t, 0]


class TestSlowCritic:
    def test_starts_as_a_copy(self):
        actor_critic = make_small_agent().loss.actor_critic
        assert not differing(snapshot(actor_critic.critic), snapshot(actor_critic.slow_critic))
        shared = {p.data_ptr() for p in actor_critic.critic.parameters()}
        assert all(p.data_ptr() not in shared for p in actor_critic.slow_critic.parameters())

    def test_is_a_moving_average_of_the_critics_history(self):
        """slow_n = 0.98 slow_(n-1) + 0.02 critic_n."""
        loss = make_small_agent().loss
        critic, slow = loss.actor_critic.critic, loss.actor_critic.slow_critic
        expected = snapshot(critic)
        for _ in range(3):
            with torch.no_grad():
                for parameter in critic.parameters():
                    parameter.add_(torch.randn_like(parameter))
            loss.update_targets()
            current = snapshot(critic)
            expected = {name: 0.98 * value + 0.02 * current[name] for name, value in expected.items()}
        for name, value in snapshot(slow).items():
            torch.testing.assert_close(value, expected[name])


class TestPrecision:
    def losses_and_gradients(self, autocast: bool):
        agent = make_small_agent(FREE, randomize=True)
        fix_samples(agent)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = agent.loss(make_batch(agent))
        sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
        gradients = {
            part: torch.cat([p.grad.flatten() for p in parameters])
            for part, parameters in groups(agent).items()
            if part != "slow critic"
        }
        return {key: value for key, value in losses.items() if key.startswith("loss_")}, gradients, agent

    def test_losses_under_autocast(self):
        """Layers in bfloat16 are off by about 2^-8; a softmax in bfloat16 alone would be off by 18% on a small KL."""
        exact, _, _ = self.losses_and_gradients(autocast=False)
        rounded, _, agent = self.losses_and_gradients(autocast=True)
        for name, value in rounded.items():
            assert value.dtype == torch.float32
            assert value.item() == pytest.approx(exact[name].item(), rel=0.01), name
        assert agent.loss.actor_critic.return_norm.low.dtype == torch.float32

    def test_gradients_under_autocast(self):
        """The actor runs without gradients first: weights cast there and kept for later would get none."""
        _, exact, _ = self.losses_and_gradients(autocast=False)
        _, rounded, agent = self.losses_and_gradients(autocast=True)
        assert all(p.grad.dtype == torch.float32 for p in agent.loss.parameters() if p.requires_grad)
        for part, gradient in rounded.items():
            assert F.cosine_similarity(gradient, exact[part], 0) > 0.995, part
            assert gradient.norm().item() == pytest.approx(exact[part].norm().item(), rel=0.02), part


class TestProtocol:
    def test_reads_only_its_in_keys(self):
        """Everything but the origin of the windows, which only the write-back needs."""
        agent = make_small_agent()
        batch = make_batch(agent)
        unread = {("context", "stream"), ("context", "position")}
        assert set(batch.keys(True, True)) - set(agent.loss.in_keys) == unread
        agent.loss(batch.select(*agent.loss.in_keys))

    def test_writes_its_out_keys(self):
        """They are part of a loss module's interface; without them its repr fails."""
        agent = make_small_agent()
        losses = agent.loss(make_batch(agent))
        assert set(losses.keys()) == set(agent.loss.out_keys)
        assert "loss_value_replay" in repr(agent.loss)

    def test_the_parts_alone_give_what_the_whole_gives(self):
        whole = make_small_agent(randomize=True)
        parts = make_small_agent(randomize=True)
        batch = make_batch(whole)
        for agent in (whole, parts):
            fix_samples(agent)
        losses = whole.loss(batch)
        alone = dict(parts.loss.model(batch).items())
        rollout = parts.loss.model.observe(batch)
        start = TensorDict({"belief": rollout.belief, "state": rollout.state}, (2, 4))
        _, imagined = whole.loss.actor_critic.terms(rollout.belief, rollout.state)
        alone |= dict(parts.loss.actor_critic(start).items())
        replayed = batch.select("reward", "terminated", "done").update(start)
        replayed["imagined_return"] = imagined.returns[:, 0].unflatten(0, (2, 4))
        alone |= dict(parts.loss.replay_critic(replayed).items())
        for key, value in losses.items():
            if key.startswith("loss_"):
                torch.testing.assert_close(alone[key], value, msg=key)

    @pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 1.0, "typo": 1.0}])
    def test_weights_and_terms_must_have_the_same_names(self, weights):
        """A term without a weight, or a weight without a term, would silently change the objective."""
        terms = {"a": torch.ones(2, 3), "b": torch.ones(2, 3)}
        with pytest.raises(ValueError, match="need exactly these weights"):
            weigh(terms, weights)

    def test_weighted_means(self):
        """2 * mean(1, 2, 3) and 0.5 * mean(4)."""
        losses = weigh({"a": torch.tensor([1.0, 2, 3]), "b": torch.tensor([[4.0]])}, {"a": 2.0, "b": 0.5})
        assert {name: value.item() for name, value in losses.items()} == {"loss_a": 4, "loss_b": 2}

    def test_weights_scale_their_losses(self):
        """Twice the weight, twice the loss, and the others as before."""

        def losses(*overrides):
            agent = make_small_agent(*overrides, randomize=True)
            torch.manual_seed(0)
            return agent.loss(make_batch(agent))

        plain, heavier = losses(), losses("agent.loss_weights.value_replay=0.6")
        for key, value in plain.items():
            if key.startswith("loss_"):
                factor = 2 if key == "loss_value_replay" else 1
                torch.testing.assert_close(heavier[key], factor * value)
