"""Dreamer V1 as an agent: what it carries, explores and records, its three optimisers, that it learns and resumes."""

import copy
import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, Categorical, OneHot
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import LossModule

from dreamer.agents import Agent, EnvSpec, load
from dreamer.collection import count_windows
from dreamer.models.heads_v1 import replace_some
from dreamer.nonfinite import NonFiniteError
from dreamer.policy import Policy
from dreamer.steppers import GroupedStepper
from tests.helpers import (
    SHORT_RUN,
    SMALL_V1,
    compose_config,
    differing,
    make_batch,
    make_env_spec,
    make_run,
    optimiser_state,
    snapshot,
    stop_at_update,
)
from tests.test_resume import fingerprint

RUN = (*SHORT_RUN, *SMALL_V1, "collector.total_frames=56")
PIXELS = ("env.name=reach", "env.from_pixels=true", "logger.images=false")
DISCRETE = OneHot(4, dtype=torch.int64)
IMAGE = Bounded(0, 255, (64, 64, 3), dtype=torch.uint8)


def make_agent(*overrides: str, small: bool = True, env_spec: EnvSpec | None = None) -> Agent:
    """The agent with the same weights every time; one vector and two continuous actions by default."""
    config = compose_config(*(SMALL_V1 if small else ["agent=dreamer_v1"]), *overrides)
    torch.manual_seed(0)
    knobs = config["agent"]
    return load(knobs.pop("name")).build(
        env_spec=env_spec or make_env_spec(pixels=False),
        device=torch.device("cpu"),
        optimization=config["optimization"],
        **knobs,
    )


def with_pixels(**others) -> EnvSpec:
    env_spec = make_env_spec(vector=False, **others)
    env_spec.observation["pixels"] = IMAGE
    return env_spec


class TestDefaults:
    """The numbers of the reference."""

    def test_settings(self):
        c = compose_config("agent=dreamer_v1")
        knobs, replay, collection = c["agent"], c["replay_buffer"], c["collector"]
        updates = c["train_ratio"] * 500 / (50 * 50)
        assert (c["env"]["frame_skip"], updates) == (2, 100), "100 updates per 1000 frames"
        windows = count_windows(replay), replay["sequence_length"]
        assert (windows, collection["init_random_frames"]) == ((50, 50), 5000)
        assert [c["optimization"][f"{name}_lr"] for name in ("world_model", "actor", "value")] == [6e-4, 8e-5, 8e-5]
        assert (c["optimization"]["grad_clip"], knobs["free_nats"], knobs["imagination_horizon"]) == (100, 3, 15)
        assert (1 - 1 / knobs["horizon"], knobs["lmbda"]) == (0.99, 0.95)
        assert (knobs["exploration_noise"], knobs["predict_end"], c["eval"]["deterministic"]) == (0.3, False, True)

    def test_networks(self):
        agent = make_agent("agent.predict_end=true", small=False, env_spec=with_pixels())
        model, part = agent.loss.model.world_model, agent.loss.actor_value
        heads = {"reward": model.reward_head, "end": model.continue_head, "value": part.critic, "actor": part.actor}
        widths = {
            name: [layer.in_features for layer in head.modules() if isinstance(layer, nn.Linear)]
            for name, head in heads.items()
        }
        assert widths == {
            "reward": [230, 400, 400],
            "end": [230, 400, 400, 400],
            "value": [230, 400, 400, 400],
            "actor": [230, 400, 400, 400, 400],
        }
        rssm = model.rssm
        assert (rssm.belief_size, rssm.state_size, rssm.hidden.out_features, rssm.min_std) == (200, 30, 200, 0.1)
        assert model.encoders["pixels"].out_features == 1024
        assert (part.actor.mean_scale, part.actor.min_std) == (5, 1e-4)

    def test_settings_reach_their_parts(self):
        weights = {"model_reco": 2.0, "model_reward": 3.0, "model_kl": 4.0, "actor": 5.0, "value": 6.0}
        agent = make_agent(
            *("agent.lmbda=0.5", "agent.horizon=10", "agent.free_nats=1.5", "agent.imagination_horizon=7"),
            *(f"agent.loss_weights.{name}={weight}" for name, weight in weights.items()),
            *("optimization.world_model_lr=1e-1", "optimization.actor_lr=1e-2", "optimization.value_lr=1e-3"),
        )
        model, part, groups = agent.loss.model, agent.loss.actor_value, agent.stepper.optimizer.param_groups
        assert (part.lmbda, part.horizon, part.imagination_horizon, model.free_nats) == (0.5, 10, 7, 1.5)
        assert model.weights | part.weights == weights
        for group, module, lr in zip(
            groups, (model.world_model, part.actor, part.critic), (0.1, 0.01, 0.001), strict=True
        ):
            assert group["lr"] == lr and {id(p) for p in group["params"]} == {id(p) for p in module.parameters()}

    def test_the_recipe_of_torchrl(self):
        """What its users type."""
        recipe = "env.name=walker env.task=walk replay_buffer.batch_size=1000 logger.video=True"
        recipe += " collector.num_collectors=7 optimization.world_model_lr=1e-3 optimization.grad_clip=10"
        c = compose_config("agent=dreamer_v1", *recipe.split(), "optimization.autocast=false")
        for autocast in ("bfloat16", "float16", c["optimization"]["autocast"]):
            assert make_toy_stepper(ToyLoss(), autocast=autocast).autocast == bool(autocast)
        assert (c["env"]["name"], c["env"]["task"], c["collector"]["num_collectors"]) == ("walker", "walk", 7)
        assert (count_windows(c["replay_buffer"]), c["logger"]["video"]) == (20, True), "it counts steps"

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("+agent.loss_weights.kl=1.0", "kl"),
            ("+optimization.lr=1e-3", "lr"),
            ("optimization.autocast=float8", "float8.*float16"),
            ("optimization.cudagraph=true", "cudagraph=true needs a GPU"),
        ],
    )
    def test_bad_values_name_themselves(self, override, message):
        with pytest.raises((ValueError, TypeError), match=message):
            make_agent(override)

    def test_other_images_are_refused(self):
        with pytest.raises(ValueError, match="image_size=64"):
            make_agent(env_spec=make_env_spec(vector=False))


def make_inputs(agent: Agent, rows: int, is_init: bool = False) -> TensorDict:
    rssm, codec = agent.loss.model.world_model.rssm, agent.policy.codec
    return TensorDict(
        {
            "observation": torch.randn(rows, 5),
            "is_init": torch.full((rows, 1), is_init),
            "previous_action": codec.decode(torch.eye(codec.size)[torch.arange(rows) % codec.size]),
            "belief": torch.randn(rows, rssm.belief_size),
            "state": torch.randn(rows, rssm.state_size),
        },
        rows,
    )


class TestPolicy:
    @pytest.mark.parametrize("is_init", [False, True])
    @torch.no_grad()
    def test_carries_the_model_state(self, is_init):
        """In full precision; a reset forgets belief, state and action."""
        agent = make_agent()
        rssm, inputs = agent.loss.model.world_model.rssm, make_inputs(agent, 3, is_init)
        start = inputs["belief"], inputs["state"], inputs["previous_action"]
        belief, state, action = (0 * value if is_init else value for value in start)
        expected = rssm.core(1, 3)(belief, state, rssm.action_branch(action))
        output = agent.policy(inputs)["next"]
        torch.testing.assert_close(output["belief"], expected)
        assert output["belief"].dtype == output["state"].dtype == torch.float32
        assert {key: spec.shape for key, spec in agent.primers.primers.items()} == {"belief": (8,), "state": (4,)}

    def test_noise_on_continuous_actions(self):
        """The same sample with and without; nothing is added to a mode."""
        agent, plain = make_agent(), make_agent("agent.exploration_noise=0.0")
        for of in (agent, plain):
            of.policy.actor.head[-1].weight.data.zero_()  # the same distribution everywhere
        inputs = make_inputs(agent, 4000)

        def act(of, kind):
            torch.manual_seed(1)
            with set_exploration_type(kind):
                return of.policy(inputs.clone())["action"]

        noisy, sample = act(agent, ExplorationType.RANDOM), act(plain, ExplorationType.RANDOM)
        inner = (sample.abs() < 0.1).flatten()  # where hardly any noise is clipped
        added = (noisy - sample).flatten()[inner]
        assert len(added) > 40 and 0.2 < added.std() < 0.4 and noisy.abs().max() <= 1
        modes = [act(of, ExplorationType.DETERMINISTIC) for of in (agent, plain)]
        assert torch.equal(*modes) and not torch.equal(modes[0], sample)

    def test_random_choices_among_discrete_actions(self):
        torch.manual_seed(0)
        action = torch.eye(4)[torch.zeros(20_000, dtype=torch.int64)]
        chosen = replace_some(action, 0.4)
        assert torch.equal(chosen.sum(-1), torch.ones(20_000))
        torch.testing.assert_close(chosen.mean(0), torch.tensor([0.7, 0.1, 0.1, 0.1]), atol=0.02, rtol=0)
        assert torch.equal(replace_some(action, 0.0), action)

    @pytest.mark.parametrize("spec", [DISCRETE, Categorical(4)])
    def test_discrete_actions_are_replaced_too(self, spec):
        agent = make_agent("agent.exploration_epsilon=1.0", env_spec=make_env_spec(pixels=False, action=spec))
        agent.policy.actor.head[-1].bias.data[2] = 100.0  # the actor itself always takes number 2
        inputs = make_inputs(agent, 400)
        for kind, share in ((ExplorationType.RANDOM, 0.25), (ExplorationType.DETERMINISTIC, 1.0)):
            with set_exploration_type(kind):
                action = agent.policy.codec.encode(agent.policy(inputs.clone())["action"])
            assert action[:, 2].mean().item() == pytest.approx(share, abs=0.1)

    def test_what_is_executed_is_what_is_stored(self, tmp_path):
        """The noise included; and no latents."""
        trainer = make_run(tmp_path, "collector.init_random_frames=0", base=RUN)
        executed, add = [], trainer.policy.explore
        trainer.policy.explore = lambda action: executed.append(add(action)) or executed[-1]
        batch = next(iter(trainer.collector))  # [2, 4] streams and steps
        trainer.collector.shutdown()
        assert torch.equal(batch["action"], torch.stack(executed, 1))
        records = make_agent().to_records(batch)
        own = records[records["stream"].squeeze(-1) == 0]
        torch.testing.assert_close(own["action"][1:4], batch["action"][0, :3])
        assert not own["action"][0].any()
        assert set(records.keys()) == {"observation", "action", "reward", "is_init", "terminated", "done", "stream"}


def make_toy_stepper(loss: LossModule, **overrides) -> GroupedStepper:
    settings = compose_config("agent=dreamer_v1")["optimization"]
    for name in ("world_model_lr", "actor_lr", "value_lr"):
        settings.pop(name)
    groups = {("wm/grad_norm",): (loss.first, 0.1), ("ac/grad_norm",): (loss.second, 0.01)}
    return GroupedStepper(loss, groups, **settings | overrides)


class ToyLoss(LossModule):
    """The gradients of the two parts are x and y, whatever their weights."""

    functional = False

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.ParameterList([nn.Parameter(torch.zeros(2))]) for _ in range(2))

    @property
    def in_keys(self) -> list[str]:
        return ["x", "y"]

    def forward(self, batch: TensorDict) -> TensorDict:
        first, second = ((batch[key] * part[0]).sum() for key, part in (("x", self.first), ("y", self.second)))
        return TensorDict({"loss_a": first, "loss_b": second, "wm": {"x": batch["x"].sum()}})


def toy_batch(x, y) -> TensorDict:
    return TensorDict({"x": torch.tensor(x), "y": torch.tensor(y)})


def adam(gradients: list[list[float]], lr: float, clip: float) -> np.ndarray:
    """Clip the norm, then TensorFlow's Adam, from zero."""
    weight = first = second = np.zeros(2)
    for t, gradient in enumerate(np.array(gradients), 1):
        gradient = gradient * min(1, clip / (np.linalg.norm(gradient) + 1e-6))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        rate = lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        weight = weight - rate * first / (np.sqrt(second) + 1e-7)
    return weight


class TestStepper:
    XS, YS = [[300.0, 400.0], [1.0, -2.0]], [[3.0, 4.0], [-200.0, 10.0]]

    def train(self, stepper: GroupedStepper) -> list[TensorDict]:
        return [stepper.step(None, toy_batch(x, y)) for x, y in zip(self.XS, self.YS, strict=True)]

    @pytest.mark.parametrize("autocast", [False, "float16"])
    def test_each_part_by_hand(self, autocast):
        """Learning rate and norm of its own. The norms that are reported are those before, without the scale."""
        loss = ToyLoss()
        metrics = self.train(make_toy_stepper(loss, autocast=autocast))
        np.testing.assert_allclose(loss.first[0].detach(), adam(self.XS, 0.1, 100), rtol=1e-4)
        np.testing.assert_allclose(loss.second[0].detach(), adam(self.YS, 0.01, 100), rtol=1e-4)
        assert [m["wm/grad_norm"].item() for m in metrics] == pytest.approx([500, math.sqrt(5)])
        assert [m["ac/grad_norm"].item() for m in metrics] == pytest.approx([5, math.hypot(200, 10)])
        assert metrics[0]["wm/x"] == 700

    def test_a_scale_that_is_too_large_shrinks_until_the_update_fits(self):
        loss, plain = ToyLoss(), ToyLoss()
        stepper = make_toy_stepper(loss, autocast="float16")
        stepper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
        metrics, expected = self.train(stepper), self.train(make_toy_stepper(plain, autocast=False))
        assert not differing(snapshot(loss), snapshot(plain)), "powers of two change nothing"
        assert all((a == b).all() for a, b in zip(metrics, expected, strict=True))
        assert 1 < stepper.scaler.get_scale() < 2.0**126

    @pytest.mark.parametrize("autocast", [False, "float16"])
    def test_nothing_changes_where_a_number_is_not_finite(self, autocast):
        loss, twin = ToyLoss(), ToyLoss()
        stepper, other = (make_toy_stepper(of, autocast=autocast) for of in (loss, twin))
        stepper.step(None, toy_batch(self.XS[0], self.YS[0]))
        before, averages = snapshot(loss), copy.deepcopy(stepper.optimizer.state_dict())
        with pytest.raises(NonFiniteError, match=r"loss_b.*y at \[1\]"):
            stepper.step(None, toy_batch([1.0, 1.0], [1.0, torch.inf]))
        assert not differing(snapshot(loss), before) and str(stepper.optimizer.state_dict()) == str(averages)
        stepper.step(None, toy_batch(self.XS[1], self.YS[1]))
        self.train(other)
        assert not differing(snapshot(loss), snapshot(twin))

    def test_goes_on_with_its_own_settings(self):
        loss, resumed = ToyLoss(), ToyLoss()
        stepper, after = make_toy_stepper(loss, autocast="float16"), make_toy_stepper(resumed, autocast="float16")
        stepper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
        stepper.step(None, toy_batch(self.XS[0], self.YS[0]))
        after.optimizer.param_groups[1]["lr"] = 0.5
        resumed.load_state_dict(loss.state_dict())
        after.load_state_dict(copy.deepcopy(stepper.state_dict()))
        assert [group["lr"] for group in after.optimizer.param_groups] == [0.1, 0.5]
        assert after.scaler.get_scale() == stepper.scaler.get_scale()
        for each in (stepper, after):
            each.step(None, toy_batch(self.XS[1], self.YS[1]))
        assert torch.equal(loss.first[0], resumed.first[0]) and not torch.equal(loss.second[0], resumed.second[0])

    def test_every_parameter_is_in_one_group_and_moves(self):
        agent = make_agent("agent.predict_end=true", "agent.free_nats=0.0", env_spec=with_pixels())
        groups = [{id(p) for p in group["params"]} for group in agent.stepper.optimizer.param_groups]
        assert set.union(*groups) == {id(p) for p in agent.loss.parameters()}
        assert sum(map(len, groups)) == len(list(agent.loss.parameters()))
        before = snapshot(agent.loss)
        agent.stepper.step(None, make_batch(agent))
        assert set(differing(before, snapshot(agent.loss))) == {name for name, _ in agent.loss.named_parameters()}


def train_on_one_batch(agent: Agent, updates: int) -> tuple[TensorDict, TensorDict]:
    """Metrics of the first and of the last update."""
    batch = make_batch(agent, batch_size=4, length=6)
    batch["reward"] = batch["action"][..., :1]  # something that can be known
    batch["is_init"][:, 3] = batch["terminated"][:, 2] = True
    if "pixels" in batch:
        batch["pixels"] //= 8  # dark
    metrics = [agent.stepper.step(None, batch) for _ in range(updates)]
    return metrics[0], metrics[-1]


LEARNS = ("optimization.world_model_lr=1e-2", "optimization.actor_lr=3e-3", "optimization.value_lr=3e-3")


@pytest.mark.parametrize("autocast", [False, pytest.param("float16", marks=pytest.mark.slow)])
def test_losses_fall(autocast):
    overrides = (*LEARNS, f"optimization.autocast={autocast}", "agent.predict_end=true")
    first, last = train_on_one_batch(make_agent(*overrides), 20)
    for name in ("loss_model_reco", "loss_model_reward", "loss_model_continue"):
        assert last[name] < 0.85 * first[name], name
    assert all(value.isfinite() for value in last.values())
    assert last["ac/critic_grad_norm"] > 0 and last["ac/actor_grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("action", "autocast"), [(Bounded(-1.0, 1.0, (2,)), "float16"), (DISCRETE, "bfloat16")])
def test_losses_fall_from_pixels(action, autocast):
    agent = make_agent(*LEARNS, f"optimization.autocast={autocast}", env_spec=with_pixels(action=action))
    first, last = train_on_one_batch(agent, 12)
    assert last["loss_model_reco"] < 0.8 * first["loss_model_reco"]
    assert last["loss_model_reward"] < first["loss_model_reward"]


RUNS = {"continuous": ()}
SLOW = {
    "pixels": (*PIXELS, "env.task=discrete"),
    "float16": ("optimization.autocast=float16", "env.task=terminating", "agent.predict_end=true"),
}


@pytest.mark.parametrize("name", [*RUNS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_interrupted_run_ends_the_same(name, tmp_path):
    """Stopped in the middle of the updates of a batch."""
    overrides = (RUNS | SLOW)[name]
    whole = make_run(tmp_path / "whole", *overrides, base=RUN)
    before = snapshot(whole.loss_module)
    whole.train()
    assert whole.update_count > 5 and differing(before, snapshot(whole.loss_module))
    first = make_run(tmp_path / "parts", *overrides, base=RUN)
    stop_at_update(first, 4)
    first.train()
    assert first.update_count == 4
    second = make_run(tmp_path / "parts", *overrides, "resume=auto", base=RUN)
    second.train()
    assert not differing(optimiser_state(whole), optimiser_state(second))
    expected, actual = fingerprint(whole, tmp_path / "a"), fingerprint(second, tmp_path / "b")
    assert [key for key in expected if expected[key] != actual.get(key)] == []
    policy = Policy.load(tmp_path / "parts", deterministic=True)
    assert policy({key: policy.spec.observation[key].zero() for key in policy.keys}) is not None


def test_pictures():
    """Reconstructed and imagined images, with Gaussian latents; what comes after the context is not seen."""
    agent = make_agent(env_spec=with_pixels())
    batch = make_batch(agent, batch_size=2, length=8)
    other = batch.clone()
    other["pixels"][:, 4:] = 0

    def show(of):
        torch.manual_seed(0)
        return agent.make_media(of)

    media, changed = show(batch), show(other)
    assert media.images["train/reconstructed"].shape == (2 * 64, 8 * 64, 3)
    comparison = media.videos["train/imagination/comparison"]
    assert comparison.shape == (8, 2 * 64, 4 * 64, 3) and comparison.dtype == torch.uint8
    imagined = [of.videos["train/imagination/imagined"] for of in (media, changed)]
    assert imagined[0].shape == (4, 64, 2 * 64, 3) and torch.equal(*imagined)
    counted = media.histograms
    assert [len(counted[f"histograms/{name}"]) for name in ("kl", "value", "prior_entropy")] == [16, 16, 16 * 4]
    torch.manual_seed(0)
    rollout = agent.loss.model.observe(batch)
    torch.testing.assert_close(counted["histograms/kl"], agent.loss.model.kl(rollout).flatten())
    entropy = torch.distributions.Normal(rollout.prior_mean, rollout.prior_std).entropy()
    torch.testing.assert_close(counted["histograms/prior_entropy"], entropy.flatten())
