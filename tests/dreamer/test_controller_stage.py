"""Generations of controllers, on a fitness that is known and in a dream."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("cma")

from dreamer.agents import EnvSpec
from dreamer.agents.parts import ActionCodec
from dreamer.collection import EnvFactory
from dreamer.controller_policy import ControllerPolicy, make_primers
from dreamer.controller_stage import ControllerSettings, ControllerStage, DreamFitness, make_controller_stage
from dreamer.episode_store import COLUMNS, EpisodeStore, Layout
from dreamer.evaluation import Interrupted
from dreamer.models.controller import Controller
from dreamer.models.mdn_rnn import MDNRNN
from dreamer.models.standardizer import Standardizer
from dreamer.nonfinite import NonFiniteError
from envs import make_env
from tests.helpers import MOCK

Z, A, H = 3, 2, 8
SETTINGS = ControllerSettings(
    fitness="dream",
    population=8,
    generations=12,
    trials=2,
    max_steps=10,
    temperature=1.0,
    sigma=0.5,
    diagonal=True,
    weight_decay=0.0,
    eval_interval=0,
    num_envs=2,
    seed=5,
)


class Sphere:
    """Highest at one; remembers what it was asked, costs 10 frames per trial."""

    def __init__(self):
        self.asked = []

    def __call__(self, population, seeds):
        self.asked.append((population.clone(), list(seeds)))
        return -(population - 1).square().sum(1), 10 * len(population) * len(seeds)


class Run:
    """A stage with what surrounds it."""

    def __init__(self, fitness=None, **settings):
        self.fitness, self.evaluations, self.interrupted = fitness or Sphere(), [], False
        self.trainer = SimpleNamespace(further_frames=0, evaluate=self.evaluate)
        controller = Controller(in_features=Z + H, action_size=A)
        self.policy = SimpleNamespace(solution=torch.zeros(controller.num_parameters))
        self.stage = ControllerStage(self.trainer, self.policy, self.fitness, replace(SETTINGS, **settings))
        self.stage.begin()

    def evaluate(self) -> dict | None:
        self.evaluations.append(self.generation)
        return None if self.interrupted else {}

    @property
    def generation(self) -> int:
        return self.stage.search.generation

    def advance(self, generations: int) -> dict[str, float]:
        for _ in range(generations):
            metrics = self.stage.step(self.stage.draw())
            self.stage.follow()
        return metrics


def test_the_mean_is_what_acts_and_it_gets_better():
    run = Run()
    first = run.advance(1)
    assert not run.stage.done()
    last = run.advance(SETTINGS.generations - 1)
    assert run.stage.done()
    assert torch.equal(run.policy.solution, run.stage.search.mean)
    assert last["controller/mean"] > first["controller/mean"]
    assert last["controller/fitness_of_mean"] > first["controller/fitness_of_mean"] == -24.0  # all zeros at first
    assert last["controller/best"] >= last["controller/mean"] >= last["controller/worst"]
    assert last["controller/generation"] == 12 and 0 < last["controller/sigma"] < 0.6


def test_the_mean_is_scored_along_with_the_candidates_and_frames_are_counted():
    run = Run()
    population = run.stage.draw()["population"]
    before = run.stage.search.mean
    metrics = run.advance(1)
    candidates, seeds = run.fitness.asked[0]
    assert torch.equal(candidates, torch.cat([population, before[None]])) and len(seeds) == 2
    assert run.trainer.further_frames == metrics["controller/frames"] == 10 * 9 * 2
    run.advance(1)
    assert run.trainer.further_frames == 2 * 10 * 9 * 2


def test_trials_are_new_in_every_generation_and_the_same_in_every_run():
    first, second, other = Run(), Run(), Run(seed=6)
    for run in (first, second, other):
        run.advance(5)
    seeds = [seeds for _, seeds in first.fitness.asked]
    assert len({seed for generation in seeds for seed in generation}) == 10
    assert seeds == [seeds for _, seeds in second.fitness.asked]
    assert not {s for g in seeds for s in g} & {s for _, g in other.fitness.asked for s in g}


def test_weight_decay():
    def flat(population, seeds):
        return torch.zeros(len(population)), 0

    run = Run(flat, weight_decay=0.5)
    population = run.stage.draw()["population"]
    metrics = run.advance(1)
    expected = -0.5 * (population**2).sum(1) / population.shape[1]
    assert metrics["controller/worst"] == pytest.approx(expected.min().item())
    assert metrics["controller/fitness_of_mean"] == 0
    assert run.advance(5)["controller/generation"] == 6


def test_a_flat_fitness_does_not_stop():
    run = Run(lambda population, seeds: (torch.full((len(population),), -21.0), 0))
    assert run.advance(6)["controller/mean"] == -21
    assert not run.stage.search.mean.any() and not run.stage.done()


@pytest.mark.parametrize("index", [3, 8], ids=["a candidate", "the mean"])
def test_a_return_that_is_not_finite_changes_nothing(index):
    run = Run()
    run.advance(2)
    mean, frames = run.stage.search.mean, run.trainer.further_frames

    def bad(population, seeds):
        returns, frames = Sphere()(population, seeds)
        returns[index] = float("nan")
        return returns, frames

    run.stage.fitness = bad
    with pytest.raises(NonFiniteError, match=rf"generation 2.*\[{index}\]"):
        run.advance(1)
    assert torch.equal(run.stage.search.mean, mean) and run.generation == 2 and run.trainer.further_frames == frames


def test_every_round_starts_where_the_last_one_ended():
    run = Run(generations=2)
    run.advance(2)
    solution = run.policy.solution.clone()
    assert run.stage.done()
    run.stage.begin()
    assert not run.stage.done() and torch.equal(run.stage.search.mean, solution)
    run.advance(1)
    offsets = [candidates[:-1] - candidates[-1] for candidates, _ in run.fitness.asked]
    assert not torch.allclose(offsets[2], offsets[0]), "random numbers of its own"
    assert not set(run.fitness.asked[2][1]) & set(run.fitness.asked[0][1]), "trials of its own"


def test_a_resume_in_the_second_round_and_before_the_first():
    run, other = Run(), Run()
    for _ in range(2):
        run.advance(3)
        run.stage.begin()
    run.advance(2)
    other.stage.load_state_dict(run.stage.state_dict())
    assert torch.equal(other.stage.draw()["population"], run.stage.draw()["population"])
    fresh = ControllerStage(run.trainer, run.policy, run.fitness, SETTINGS)
    fresh.load_state_dict(fresh.state_dict())
    fresh.begin()
    assert fresh.round == 1


def test_the_policy_is_evaluated_every_few_generations():
    run = Run(eval_interval=3)
    run.advance(7)
    assert run.evaluations == [3, 6]


def test_an_interrupted_evaluation_is_made_after_the_resume():
    run, resumed = Run(eval_interval=3), Run(eval_interval=3)
    run.interrupted = True
    run.advance(3)
    resumed.policy.solution.copy_(run.policy.solution)
    resumed.stage.load_state_dict(run.stage.state_dict())
    resumed.advance(2)
    assert run.evaluations == resumed.evaluations == [3], "of the same controller, and once"


def test_an_interrupted_generation_comes_again_after_a_resume(tmp_path):
    whole, stopped, resumed = Run(), Run(), Run()
    whole.advance(7)
    stopped.advance(4)

    def interrupt(population, seeds):
        raise Interrupted

    stopped.stage.fitness = interrupt
    with pytest.raises(Interrupted):
        stopped.advance(1)
    torch.save(stopped.stage.state_dict(), tmp_path / "state.pt")
    resumed.stage.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    resumed.advance(3)
    assert torch.equal(resumed.stage.search.mean, whole.stage.search.mean)
    for again, before in zip(resumed.fitness.asked, whole.fitness.asked[4:], strict=True):
        assert torch.equal(again[0], before[0]) and again[1] == before[1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fitness", "dreams"),
        ("population", 1),
        ("generations", 0),
        ("trials", 0),
        ("max_steps", 0),
        ("temperature", 0.0),
        ("sigma", -1.0),
        ("weight_decay", -0.1),
        ("num_envs", 0),
    ],
)
def test_settings_that_make_no_sense(key, value):
    with pytest.raises(ValueError, match=rf"agent.controller.{key}={value!r}"):
        replace(SETTINGS, **{key: value})


class Aim(MDNRNN):
    """Pays for actions near 0.5, and for nothing else."""

    def step(self, latent, action, state):
        self.action = action
        return super().step(latent, action, state)

    def predict(self, hidden):
        reward = 1 - (self.action - 0.5).abs().mean(-1).view(hidden.shape[:-1])
        prediction = super().predict(hidden)
        return prediction._replace(reward=reward, terminated_logits=torch.full_like(reward, -1.0))


def make_dream(model=MDNRNN, inputs: int = Z + H, **changes) -> DreamFitness:
    torch.manual_seed(0)
    model = model(latent_size=Z, action_size=A, hidden_size=H, components=2)
    first_frames = torch.randn(20, Z)

    def starts(trials, generator):
        return first_frames[torch.randint(20, (trials,), generator=generator)]

    controller = Controller(in_features=inputs, action_size=A)
    return DreamFitness(model, controller, starts, **{"max_steps": lambda: 10, "temperature": 1.0} | changes)


@pytest.mark.parametrize("inputs", [Z, Z + H])
def test_the_dream_scores_a_population_as_each_alone(inputs):
    fitness = make_dream(inputs=inputs)
    population = torch.randn(5, fitness.controller.num_parameters)
    before = torch.get_rng_state()
    together, frames = fitness(population, [1, 2, 3])
    alone = torch.cat([fitness(candidate[None], [1, 2, 3])[0] for candidate in population])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert frames == 0 and together.shape == (5,) and len(together.unique()) == 5
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.allclose(fitness(population, [4, 5, 6])[0], together)
    assert not torch.allclose(make_dream(inputs=inputs, temperature=2.0)(population, [1, 2, 3])[0], together)


@pytest.mark.parametrize(("max_steps", "expected"), [(None, 10), (4, 4), (50, 50)])
def test_a_dream_lasts_as_long_as_the_longest_episode_unless_told_otherwise(tmp_path, max_steps, expected):
    """That of 10 steps, whose file is of a later round."""
    dreams, store = make_dream(Aim), EpisodeStore(tmp_path, Layout("observation", (Z,), torch.float32))
    data = SimpleNamespace(vision=None, starts=dreams.starts, episodes=store)
    policy = SimpleNamespace(model=dreams.model, controller=dreams.controller)
    settings = replace(SETTINGS, max_steps=max_steps)
    fitness = make_controller_stage(SimpleNamespace(), policy, data, settings).fitness
    for records in (3, 11, 5):
        store.append([store.layout.pack(torch.zeros(Z))] * records, dict.fromkeys(COLUMNS, torch.zeros(records, 1)))
    returns, _ = fitness(torch.zeros(1, dreams.controller.num_parameters), [1])
    assert returns.item() == pytest.approx(0.5 * expected)


def test_a_controller_is_learned_in_the_dream():
    fitness = make_dream(Aim)
    run = Run(fitness, population=16, generations=30, sigma=0.3)
    first, last = run.advance(1), run.advance(29)
    assert first["controller/fitness_of_mean"] == pytest.approx(5.0)  # ten steps with actions of 0
    assert last["controller/fitness_of_mean"] > 7.5


def test_real_environments():
    """A generation that is interrupted in the middle leaves no trace, and its frames count when it is through."""
    env_spec = EnvSpec.of(make_env(**MOCK | {"name": "reach"}))
    codec = ActionCodec(env_spec.action)
    vision = Standardizer(1)
    model = MDNRNN(latent_size=1, action_size=1, hidden_size=2, components=1)
    controller = Controller(in_features=3, action_size=1)
    acting = {"observation_key": "observation", "sample_latent": False}
    policy = ControllerPolicy(vision, model, controller, codec, **acting)
    asked = []

    def stop() -> bool:
        asked.append(0)
        return len(asked) == 12

    trainer = SimpleNamespace(
        further_frames=0,
        frame_skip=1,
        should_stop=stop,
        make_envs=lambda rows, seed: EnvFactory(MOCK | {"name": "reach"}, range(rows), seed, make_primers(1, 2))(),
    )
    settings = replace(SETTINGS, fitness="real", population=3, max_steps=6, sigma=1.0)
    data = SimpleNamespace(vision=vision, starts=None)
    stage = make_controller_stage(trainer, policy, data, settings)
    stage.begin()
    before = torch.get_rng_state()
    with pytest.raises(Interrupted):
        stage.step(stage.draw())
    assert trainer.further_frames == 0 and not policy.solution.any() and stage.search.generation == 0
    metrics = stage.step(stage.draw())
    assert torch.equal(torch.get_rng_state(), before)
    assert trainer.further_frames == metrics["controller/frames"] == 4 * 2 * 6  # candidates and mean, trials, steps
    assert 0 <= metrics["controller/worst"] < metrics["controller/best"] <= 6 and policy.solution.any()
    assert stage.media() is None, "vectors have no pictures"
    whole = make_controller_stage(trainer, ControllerPolicy(vision, model, controller, codec, **acting), data, settings)
    whole.begin()
    assert whole.step(whole.draw()) == metrics
