"""PPO: transitions and advantages by hand, the clipped loss by hand, that it learns, and that it resumes exactly."""

import dataclasses
import json
import math
import types
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, Composite, OneHot, Unbounded
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives.value import GAE

import dreamer.train
from dreamer.agents import Agent, EnvSpec, load
from dreamer.models.ppo_networks import ConvFeatures, Moments, Observer
from dreamer.nonfinite import NonFiniteError
from dreamer.on_policy import ClippedStepper, Rewards, Rollouts, to_transitions
from dreamer.policy import Policy
from dreamer.settings import Start
from dreamer.trainer import Trainer
from tests import helpers
from tests.helpers import compose_config, differing, snapshot

SMALL = (
    "agent=ppo",
    "env=mock",
    "env.name=counter",
    "collector.envs_per_collector=2",
    "collector.frames_per_batch=16",
    "collector.total_frames=96",
    "agent.units=8",
    "agent.minibatch_size=4",
    "agent.epochs=2",
    "logger.backends=[]",
    "logger.video=false",
    "eval.interval=0",
    "eval.episodes=1",
    "checkpoint.interval=0",
    "device=cpu",
)
DISCRETE = EnvSpec(Composite(observation=Unbounded(3)), OneHot(4, dtype=torch.int64))
CONTINUOUS = EnvSpec(Composite(observation=Unbounded(3)), Bounded(-1.0, 1.0, (2,)))


def make_agent(env_spec: EnvSpec = DISCRETE, *overrides: str) -> Agent:
    config = compose_config("agent=ppo", *overrides)
    knobs = config["agent"]
    torch.manual_seed(0)
    return load(knobs.pop("name")).build(
        env_spec=env_spec, device=torch.device("cpu"), optimization=config["optimization"], **knobs
    )


def make_run(run_dir: Path, *overrides: str) -> Trainer:
    return helpers.make_run(run_dir, *overrides, base=SMALL)


def make_records(rows: list[tuple]) -> TensorDict:
    """Records of (stream, observation, reward, is_init, terminated, done); the action that led to o is o."""
    columns = [torch.tensor(column)[:, None] for column in zip(*rows, strict=True)]
    keys = ("stream", "observation", "reward", "is_init", "terminated", "done")
    records = TensorDict(dict(zip(keys, columns, strict=True)), len(rows))
    return records.update({"action": records["observation"].clone(), "log_prob": -records["observation"]})


RECORDS = make_records(
    [
        (0, 0.0, 0.0, True, False, False),
        (0, 1.0, 3.0, False, True, True),
        (0, 10.0, 0.0, True, False, False),
        (0, 11.0, 4.0, False, False, False),
        (1, 5.0, 0.0, True, False, False),
        (1, 6.0, 1.0, False, False, False),
        (1, 7.0, 2.0, False, False, False),
        (2, 2.0, 0.0, True, False, False),
        (2, 8.0, 5.0, False, False, True),
        (2, 3.0, 0.0, True, False, False),
    ]
)


class TestTransitions:
    def test_by_hand(self):
        transitions, newest = to_transitions(RECORDS, ("observation",))
        assert transitions["observation"].flatten().tolist() == [0, 10, 5, 6, 2]
        assert transitions["next", "observation"].flatten().tolist() == [1, 11, 6, 7, 8]
        assert transitions["action"].flatten().tolist() == [1, 11, 6, 7, 8]
        assert transitions["log_prob"].tolist() == [0, -10, -5, -6, -2]
        assert transitions["next", "reward"].flatten().tolist() == [3, 4, 1, 2, 5]
        assert transitions["next", "terminated"].flatten().tolist() == [True, False, False, False, False]
        assert transitions["next", "done"].flatten().tolist() == [True, True, False, True, True]
        assert newest["observation"].flatten().tolist() == [11, 7, 3]

    def test_advantages_by_hand(self):
        """gamma = lambda = 0.5 and V(o) = o. What ended has no value afterwards; what was cut or truncated has."""
        transitions, _ = to_transitions(RECORDS, ("observation",))
        value = TensorDictModule(nn.Identity(), in_keys=["observation"], out_keys=["state_value"])
        found = GAE(gamma=0.5, lmbda=0.5, value_network=value, vectorized=False)(transitions[None])
        deltas = [3.0, 4 + 0.5 * 11 - 10, 1 + 0.5 * 6 - 5, 2 + 0.5 * 7 - 6, 5 + 0.5 * 8 - 2]
        expected = [deltas[0], deltas[1], deltas[2] + 0.25 * deltas[3], *deltas[3:]]
        assert found["advantage"].flatten().tolist() == expected
        assert found["value_target"].flatten().tolist() == [
            a + v for a, v in zip(expected, [0, 10, 5, 6, 2], strict=True)
        ]

    def test_agree_with_the_environment(self, tmp_path, monkeypatch):
        """Every step once, in order, with the log-probability that the policy had for it."""
        trainer, seen = make_run(tmp_path, "collector.total_frames=64"), []
        compute = trainer.schedule.compute_advantage

        def advantage(transitions):
            seen.append(transitions[0].clone())
            return compute(transitions)

        monkeypatch.setattr(trainer.schedule, "compute_advantage", advantage)
        for _ in zip(range(3), trainer.turns, strict=False):
            pass
        trainer.collector.shutdown()
        found = torch.cat(seen)
        step, episode = found["observation"][:, 0], found["observation"][:, 1]
        assert torch.equal(found["next", "reward"].flatten(), step + 1)
        assert torch.equal(found["next", "observation"][:, 0], step + 1)
        assert torch.equal(found["next", "observation"][:, 1], episode)
        assert found["next", "done"][step == 9].all() and found["next", "done"][step != 9].sum() <= 3 * 2
        names = list(zip(episode.tolist(), step.tolist(), strict=True))
        assert {names.count(name) for name in names} == {2}, "one step of each of the two environments"
        assert len(names) == 3 * 16 - 2, "all but the newest step of each"
        log_prob = trainer.policy.actor.get_dist(found.select("observation")).log_prob(found["action"])
        torch.testing.assert_close(found["log_prob"], log_prob)


class TestRewards:
    def test_scaled_by_hand(self):
        """gamma = 0.5: the returns so far are 2, 1 + 0.5 * 2, 3 of a new episode and 4 of another stream."""
        records = make_records(
            [
                (0, 0.0, 0.0, True, False, False),
                (0, 0.0, 2.0, False, False, False),
                (0, 0.0, 1.0, False, False, True),
                (0, 0.0, 0.0, True, False, False),
                (0, 0.0, 3.0, False, False, False),
                (1, 0.0, 0.0, True, False, False),
                (1, 0.0, 4.0, False, False, False),
            ]
        )
        deviation = torch.tensor([2.0, 2.0, 3.0, 4.0]).std(correction=0)
        torch.testing.assert_close(Rewards("scaled", 0.5)(records), records["reward"] / deviation)
        halves = Rewards("scaled", 0.5)
        halves(records[:2])
        resumed = Rewards("scaled", 0.5)
        resumed.load_state_dict(halves.state_dict())
        torch.testing.assert_close(resumed(records[2:]), records["reward"][2:] / deviation)

    def test_signs_and_limits(self):
        records = make_records([(0, 0.0, reward, False, False, False) for reward in (-3.0, 0.0, 0.5)])
        assert Rewards("sign", 0.5)(records).flatten().tolist() == [-1, 0, 1]
        assert Rewards("raw", 0.5)(records) is records["reward"]
        one = Rewards("scaled", 0.5)(records[:1])
        assert one.item() == -10, "of a deviation of 0"
        with pytest.raises(ValueError, match="rewards='clip': choose one of"):
            Rewards("clip", 0.5)


class TestRollouts:
    def make(self, count: int, epochs: int = 3, minibatch_size: int = 4) -> Rollouts:
        rollouts = Rollouts((), None, epochs=epochs, minibatch_size=minibatch_size, device=torch.device("cpu"))
        rollouts.trainer = type("Trainer", (), {})()
        rollouts.transitions = TensorDict({"row": torch.arange(count)}, count)
        return rollouts

    @pytest.mark.parametrize(("count", "sizes"), [(12, [4, 4, 4]), (13, [5, 4, 4]), (15, [4, 4, 4, 3]), (2, [2])])
    def test_every_epoch_has_every_transition_once(self, count, sizes):
        rollouts = self.make(count)
        rollouts.shuffle()
        assert rollouts.trainer.optim_steps_per_batch == 3 * len(sizes)
        orders = set()
        for _ in range(3):
            rows = [rollouts.draw(None)["row"].tolist() for _ in sizes]
            assert [len(row) for row in rows] == sizes
            order = [row for minibatch in rows for row in minibatch]
            assert sorted(order) == list(range(count))
            orders.add(tuple(order))
        assert rollouts.minibatches == [] and (count < 12 or len(orders) == 3)

    @pytest.mark.parametrize("count", [0, 1])
    def test_too_few_give_no_update(self, count):
        """The deviation of one advantage is no number."""
        rollouts = self.make(count)
        rollouts.shuffle()
        assert rollouts.trainer.optim_steps_per_batch == 0

    def test_statistics_follow_the_last_update(self):
        """Also where the stepper made it the last one."""
        rollouts, seen = self.make(8, epochs=1), []
        rollouts.update_statistics = lambda transitions: seen.append(len(transitions))
        rollouts.shuffle()
        for pending in (2, 1):
            assert seen == []
            rollouts.draw(None)
            rollouts.trainer.pending_updates = pending
            rollouts.finish()
        assert seen == [8]
        rollouts.shuffle()
        rollouts.draw(None)
        rollouts.finish()
        assert seen == [8, 8] and rollouts.minibatches == []

    def test_counts_that_make_no_sense(self):
        with pytest.raises(ValueError, match="epochs=0"):
            self.make(4, epochs=0)


class TestLoss:
    @pytest.mark.parametrize(
        ("ratio", "advantage", "expected"),
        [(1.5, 1.0, -1.2), (1.5, -1.0, 1.5), (0.5, 1.0, -0.5), (0.5, -1.0, 0.8), (1.1, 2.0, -2.2)],
    )
    def test_by_hand(self, ratio, advantage, expected):
        """-min(r A, clip(r, 0.8, 1.2) A), half the squared error of the critic, -0.01 ln 4 for the entropy."""
        agent = make_agent(DISCRETE, "agent.normalize_advantage=false")
        for parameter in agent.loss.parameters():
            nn.init.zeros_(parameter)
        batch = TensorDict(
            {
                "observation": torch.randn(2, 3),
                "action": torch.eye(4)[:2],
                "log_prob": torch.full((2,), -math.log(4) - math.log(ratio)),
                "advantage": torch.full((2, 1), advantage),
                "value_target": torch.tensor([[1.0], [3.0]]),
                "state_value": torch.zeros(2, 1),
            },
            2,
        )
        losses = agent.loss(batch)
        assert losses["loss_objective"].item() == pytest.approx(expected, rel=1e-5)
        assert losses["loss_critic"].item() == pytest.approx(0.5 * (1 + 9) / 2)
        assert losses["loss_entropy"].item() == pytest.approx(-0.01 * math.log(4))

    def test_policy_and_loss_share_their_weights(self):
        agent = make_agent(CONTINUOUS)
        trained = {id(parameter) for parameter in agent.loss.parameters()}
        assert trained >= {id(parameter) for parameter in agent.policy.parameters()}
        assert not [name for name in agent.loss.state_dict() if "clip" in name or "coeff" in name]
        with pytest.raises(RuntimeError, match=r"Unexpected key.*moments"):
            agent.loss.load_state_dict(make_agent(CONTINUOUS, "agent.normalize_observations=true").loss.state_dict())


class TestStepper:
    def batch(self, size: int = 8) -> TensorDict:
        torch.manual_seed(1)
        values = {"observation": torch.randn(size, 3), "action": torch.eye(4)[torch.randint(4, (size,))]}
        values |= {"log_prob": torch.full((size,), -math.log(4)), "advantage": torch.randn(size, 1)}
        return TensorDict(values | {key: torch.randn(size, 1) for key in ("value_target", "state_value")}, size)

    def test_gradient_norm_is_bounded(self):
        agent = make_agent(DISCRETE, "optimization.max_grad_norm=1e-3")
        metrics = agent.stepper.step(None, self.batch())
        norm = nn.utils.get_total_norm([p.grad for p in agent.stepper.parameters])
        assert metrics["ac/grad_norm"] > 1e-2 and norm.item() == pytest.approx(1e-3, rel=1e-2)
        assert {"ac/actor_loss", "ac/critic_loss", "ac/entropy", "ac/kl", "ac/clip_fraction"} <= set(metrics.keys())

    def test_what_is_not_finite_changes_nothing(self):
        agent = make_agent()
        batch, before = self.batch(), snapshot(agent.loss)
        batch["advantage"][0] = math.nan
        with pytest.raises(NonFiniteError, match="advantage"):
            agent.stepper.step(None, batch)
        assert all(torch.equal(value, before[name]) for name, value in snapshot(agent.loss).items())

    @pytest.mark.parametrize(("collected", "share"), [(100, 1.0), (600, 0.5), (1100, 0.0)])
    def test_annealing(self, collected, share):
        """Counted when the batch, here of 100 frames, began."""
        agent = make_agent(DISCRETE, "optimization.anneal=[lr,clip]", "optimization.lr=1e-2")
        collector = type("Collector", (), {"requested_frames_per_batch": 50})()
        facts = {"collected_frames": collected, "total_frames": 1000, "frame_skip": 2, "collector": collector}
        metrics = agent.stepper.step(type("Trainer", (), facts)(), self.batch())
        assert metrics["ac/lr"].item() == pytest.approx(1e-2 * share)
        assert agent.loss.clip_epsilon.item() == pytest.approx(0.2 * share)

    @pytest.mark.parametrize(("target_kl", "pending"), [(0.05, 1), (0.15, 7)])
    def test_target_kl(self, target_kl, pending):
        """The policy is uniform, and the recorded log-probabilities are 0.1 larger."""
        agent = make_agent(DISCRETE, f"optimization.target_kl={target_kl}")
        for parameter in agent.loss.parameters():
            nn.init.zeros_(parameter)
        facts = {"collected_frames": 1, "total_frames": 9, "frame_skip": 1, "pending_updates": 7}
        trainer = type("Trainer", (), facts | {"collector": type("C", (), {"requested_frames_per_batch": 1})})()
        batch = self.batch()
        agent.stepper.step(trainer, batch.update({"log_prob": batch["log_prob"] + 0.1}))
        assert trainer.pending_updates == pending

    def test_unknown_settings(self):
        with pytest.raises(ValueError, match=r"anneal=\['epsilon'\]: give a list of"):
            make_agent(DISCRETE, "optimization.anneal=[epsilon]")

    def test_a_graph_is_refused(self):
        with pytest.raises(ValueError, match="cudagraph=false"):
            make_agent(DISCRETE, "optimization.cudagraph=true")


class TestNetworks:
    def test_images(self):
        """Divided by 255, one row at a time or many, and no smaller than the convolutions take."""
        torch.manual_seed(0)
        network = ConvFeatures((64, 64, 3))
        images = torch.randint(256, (2, 3, 64, 64, 3), dtype=torch.uint8)
        features = network(images)
        assert features.shape == (2, 3, 512)
        torch.testing.assert_close(features[1, 2], network(images[1, 2]), rtol=1e-4, atol=1e-5)
        planes = images[1, 2].permute(2, 0, 1)[None] / 255
        torch.testing.assert_close(features[1, 2], nn.Sequential.forward(network, planes)[0], rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match=r"32 x 32.*image_size=36"):
            ConvFeatures((32, 32, 3))

    def test_moments_by_hand(self):
        """Of rows given in parts, as of all at once; and what lies far off is cut."""
        rows = torch.tensor([[1.0, 10.0], [3.0, 10.0], [5.0, 40.0]])
        moments = Moments(2)
        assert torch.equal(moments(rows), rows.clamp(-10, 10))
        moments.update_(rows[:2])
        moments.update_(rows[2:])
        torch.testing.assert_close(moments.mean, torch.tensor([3.0, 20.0]))
        torch.testing.assert_close(moments.variance, torch.tensor([8 / 3, 200.0]))
        assert moments(torch.tensor([3.0, 20 + 200**0.5])).tolist() == pytest.approx([0, 1])
        assert moments(torch.tensor([3.0, 1e4])).tolist() == [0, 10]

    def test_images_and_vectors(self):
        observer = Observer({"pixels": (36, 36, 3), "observation": (5,)}, normalize=False)
        assert observer.keys == ["observation", "pixels"] and observer.out_features == 517
        vector = torch.randn(4, 5)
        features = observer(vector, torch.zeros(4, 36, 36, 3, dtype=torch.uint8))
        assert features.shape == (4, 517) and torch.equal(features[:, :5], vector)


@pytest.mark.parametrize("env_spec", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
def test_mode_and_samples(env_spec):
    agent = make_agent(env_spec)
    step = TensorDict({"observation": torch.randn(64, 3), "previous_action": env_spec.action.zero((64,))}, 64)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        modes = [agent.policy(step.clone())["action"] for _ in range(2)]
    with set_exploration_type(ExplorationType.RANDOM):
        samples = [agent.policy(step.clone())["action"] for _ in range(2)]
    assert torch.equal(*modes) and not torch.equal(*samples)
    assert modes[0].shape == samples[0].shape and samples[0].dtype == env_spec.action.dtype


@pytest.mark.slow
def test_learns_which_action_pays():
    """A bandit with a context: the action of the largest of four inputs pays 1. Uniform guessing has 0.25."""
    spec = EnvSpec(Composite(observation=Unbounded(4)), OneHot(4, dtype=torch.int64))
    agent = make_agent(spec, "optimization.lr=3e-3")
    for _ in range(100):
        observation = torch.randn(64, 4)
        batch = agent.policy(TensorDict({"observation": observation, "previous_action": torch.zeros(64, 4)}, 64))
        paid = (batch["action"].argmax(-1) == observation.argmax(-1)).float()[:, None]
        batch.update({"action": batch["action"].float(), "log_prob": batch["next", "log_prob"][:, 0]})
        batch.update({"advantage": paid - 0.5, "value_target": paid, "state_value": torch.zeros(64, 1)})
        agent.stepper.step(None, batch.exclude("next"))
    assert paid.mean() > 0.7


RUNS = {
    "discrete": ("env.task=discrete", "collector.total_frames=48"),
    "pixels": ("env.name=reach", "env.from_pixels=true", "env.image_size=36", "collector.total_frames=32"),
    "terminating": ("env.task=terminating", "agent.clip_value=0.2", "agent.rewards=sign"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "terminating" else ()) for name in RUNS]
)
def test_trains(name, tmp_path):
    trainer = make_run(tmp_path, *RUNS[name])
    before = snapshot(trainer.loss_module)
    trainer.train()
    batches = round(trainer.collected_frames / 16)
    assert 2 * 3 * batches <= trainer.update_count <= 2 * 4 * batches + 8
    assert any(not torch.equal(value, before[key]) for key, value in snapshot(trainer.loss_module).items())
    policy = Policy.load(tmp_path, deterministic=True)
    assert policy.keys == trainer.policy.observation_keys
    assert policy({key: policy.spec.observation[key].zero() for key in policy.keys}) is not None


def test_statistics_of_observations(tmp_path):
    """They are those of all transitions, move between batches only, and are in a policy that is loaded or exported.

    So all ratios of a batch begin at 1, but those of the newest step before it of each of the two environments.
    """
    trainer = make_run(
        tmp_path / "run", "agent.normalize_observations=true", "agent.rewards=scaled", "collector.total_frames=48"
    )
    update, step, seen, changed = trainer.schedule.update_statistics, trainer.optimization_stepper.step, [], []

    def note(transitions):
        seen.append(transitions["observation"])
        update(transitions)

    def compare(trainer, batch):
        if trainer.pending_updates == trainer.optim_steps_per_batch:
            rows = trainer.schedule.transitions
            now = trainer.policy.actor.get_dist(rows.select("observation")).log_prob(rows["action"])
            changed.append((now - rows["log_prob"]).abs().gt(1e-5).sum().item())
        return step(trainer, batch)

    trainer.schedule.update_statistics, trainer.optimization_stepper.step = note, compare
    trainer.train()
    assert changed[0] == 0 and max(changed) == 2 and len(changed) >= 3
    loaded = Policy.load(tmp_path / "run")
    for policy in (trainer.policy, loaded.acting.policy, Policy.load(loaded.export(tmp_path / "out")).acting.policy):
        moments = policy.actor[0].module.observer.moments["observation"]
        torch.testing.assert_close(moments.mean, torch.cat(seen).mean(0))
        torch.testing.assert_close(moments.variance, torch.cat(seen).var(0, correction=0))


def test_free_running_workers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"multi_async.*collector=sync"):
        make_run(tmp_path, "collector=multi_async")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_interrupted_run_ends_the_same(tmp_path):
    """Stopped between the updates of a batch, in the middle of an episode."""
    settings = ("agent.normalize_observations=true", "agent.rewards=scaled", "optimization.anneal=[lr,clip]")
    whole = make_run(tmp_path / "whole", *settings)
    whole.train()
    first = make_run(tmp_path / "parts", *settings)
    step = first.optimization_stepper.step

    def stop_at_11(*args):
        if first.update_count == 10:
            first.request_stop("SIGTERM")
        return step(*args)

    first.optimization_stepper.step = stop_at_11
    first.train()
    assert first.update_count == 11 and first.pending_updates > 0
    second = make_run(tmp_path / "parts", *settings, "resume=auto")
    assert len(second.schedule.minibatches) == second.pending_updates == first.pending_updates
    second.train()
    assert second.update_count == whole.update_count
    assert differing(snapshot(whole.loss_module), snapshot(second.loss_module)) == []


@pytest.mark.slow
def test_settings_of_a_resumed_run_are_its_own(tmp_path):
    make_run(tmp_path, "collector.total_frames=32").train()
    longer = make_run(tmp_path, "resume=auto", "collector.total_frames=48", "agent.clip=0.3", "optimization.lr=5e-3")
    assert longer.loss_module.clip_epsilon.item() == pytest.approx(0.3)
    longer.train()
    assert longer.optimization_stepper.optimizer.param_groups[0]["lr"] == 5e-3


class Stages:
    """A schedule of two stages: collect the whole budget, then make updates without new steps."""

    def __init__(self, updates_per_turn: int, turns: int):
        self.updates_per_turn, self.turns, self.drawn = updates_per_turn, turns, 0

    def register(self, trainer: Trainer) -> None:
        self.trainer = trainer
        trainer.register_op("pre_optim_steps", self.pace)
        trainer.register_op("process_optim_batch", self.draw)
        trainer.register_module("Stages", self)

    def pace(self) -> None:
        self.trainer.optim_steps_per_batch = self.updates_per_turn if self.busy() else 0

    def draw(self, batch: TensorDict | None) -> TensorDict:
        self.drawn += 1
        return TensorDict({"number": torch.tensor(float(self.drawn))})

    def busy(self) -> bool:
        full = self.trainer.collected_frames >= self.trainer.total_frames
        return full and self.drawn < self.turns * self.updates_per_turn

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.drawn = state_dict["drawn"]


class Counting(ClippedStepper):
    """Notes what it is given, and the frames at that time."""

    def step(self, trainer: Trainer, sub_batch: TensorDict) -> TensorDict:
        self.seen = [*getattr(self, "seen", []), (trainer.collected_frames, sub_batch["number"].item())]
        if len(self.seen) == getattr(self, "stop_at", None):
            trainer.request_stop("SIGTERM")
        return TensorDict({"number": sub_batch["number"]})


def make_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Trainer:
    """A run of a PPO agent whose schedule and stepper were replaced by those above."""
    build = load("ppo").build

    def replaced(**settings):
        agent = build(**settings)
        agent.stepper.__class__ = Counting
        return dataclasses.replace(agent, make_schedule=lambda: Stages(updates_per_turn=3, turns=4))

    monkeypatch.setattr(load("ppo"), "build", replaced)
    trainer = make_run(tmp_path, *overrides)
    monkeypatch.setattr(load("ppo"), "build", build)
    return trainer


def test_a_schedule_may_go_on_without_new_steps(tmp_path, monkeypatch):
    """All frames first, then four turns of three updates each, although the budget of frames is used."""
    trainer = make_stages(tmp_path, monkeypatch)
    trainer.train()
    frames = trainer.collected_frames
    assert 96 <= frames < 120
    assert trainer.optimization_stepper.seen == [(frames, float(n)) for n in range(1, 13)]


@pytest.mark.slow
def test_a_stage_is_resumed_where_it_was(tmp_path, monkeypatch):
    trainer = make_stages(tmp_path, monkeypatch)
    trainer.optimization_stepper.stop_at = 5
    trainer.train()
    frames = trainer.collected_frames
    resumed = make_stages(tmp_path, monkeypatch, "resume=auto")
    assert (resumed.schedule.drawn, resumed.pending_updates) == (5, 1)
    resumed.train()
    assert resumed.optimization_stepper.seen == [(frames, float(n)) for n in range(6, 13)]


def read_example(language: str) -> str:
    """The example of the guide."""
    guide = (Path(dreamer.train.__file__).parents[1] / "docs/adding_an_agent.md").read_text()
    return guide.partition("## An example")[2].partition(f"```{language}\n")[2].partition("```")[0]


def test_the_example_of_the_guide_learns(tmp_path, monkeypatch):
    """Its code is in no other place; a choice among four pays 0.25 to start with."""
    toy = types.ModuleType("toy")
    exec(read_example("python"), vars(toy))
    assert len([line for line in read_example("python").splitlines() if line.strip()]) <= 60
    monkeypatch.setattr(dreamer.train, "load", lambda name: {"toy": toy}[name])
    settings = OmegaConf.to_container(OmegaConf.create(read_example("yaml")))
    config = compose_config(*SMALL, "env.name=reach", "env.task=discrete", "logger.interval=128")
    config |= {"agent": settings["agent"]}
    for group in ("collector", "replay_buffer", "optimization"):
        config[group] |= settings[group]
    config["collector"] |= {"frames_per_batch": 64, "total_frames": 512}
    trainer = dreamer.train.build(Start(config, tmp_path))
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    returns = [line["episode/return"] for line in lines if "episode/return" in line]
    assert returns[0] < 4.5 and returns[-1] > 5.5, "of ten steps, each of which pays at most 1"
