"""Fitness in real environments: who gets which return, whatever plays beside it."""

import pytest
import torch
from torch.nn import functional as F
from torchrl.data import Unbounded
from torchrl.envs import TensorDictPrimer

from dreamer.collection import EnvFactory
from dreamer.evaluation import Interrupted
from dreamer.fitness import RealFitness
from envs.backends.mock import MockEnv

REACH = {"backend": "mock", "name": "reach", "task": "continuous", "frame_skip": 1, "from_pixels": False}
LANDER = {"backend": "gym", "name": "LunarLander-v3", "frame_skip": 5, "from_pixels": False}
POPULATION = torch.linspace(-1, 1, 5)[:, None]
PRIMER = TensorDictPrimer(age=Unbounded(1), random=False, default_value=0.0, expand_specs=True)


def constant(population):
    """Every candidate [P, A] has one action."""

    def policy(tensordict):
        tensordict["action"] = population[tensordict["candidate"].squeeze(-1)]
        return tensordict.set(("next", "age"), tensordict["age"] + 1)

    return policy


def linear(population):
    """Candidates [P, 32] choose by a linear function of the observation, of the time since the reset and of chance."""

    def policy(tensordict):
        weight = population[tensordict["candidate"].squeeze(-1)].unflatten(-1, (8, 4))
        scores = (tensordict["observation"].unsqueeze(-2) @ weight).squeeze(-2)
        scores = scores + torch.cos(tensordict["age"] * torch.arange(1, 5) / 3) + torch.randn(4)  # the same in all rows
        tensordict["action"] = F.one_hot(scores.argmax(-1), 4)
        return tensordict.set(("next", "age"), tensordict["age"] + 1)

    return policy


def make_fitness(rows, *, env=REACH, for_population=constant, max_steps=100, **options):
    return RealFitness(
        lambda seed: EnvFactory(env, range(rows), seed, PRIMER)(),
        for_population,
        max_steps=max_steps,
        frame_skip=env["frame_skip"],
        **options,
    )


def test_returns_by_hand():
    fitness, frames = make_fitness(2)(POPULATION, [1, 2, 3])
    target = make_fitness(1)
    target(POPULATION[:1], [1, 2, 3])
    env, targets = target.env, []
    for episode in range(3):
        env.set_seed(env.episode_seed[0], episode=episode)
        targets.append(env.reset()["observation"].item())
    expected = [sum(10 * (1 - abs(a - t) / 2) for t in targets) / 3 for a in POPULATION.flatten().tolist()]
    assert fitness.tolist() == pytest.approx(expected, rel=1e-5) and frames == 5 * 3 * 10


def test_a_candidate_earns_alone_what_it_earns_in_a_population():
    population = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    options = {"env": LANDER, "for_population": linear, "max_steps": 20}
    alone = make_fitness(1, **options)
    scores = [alone(candidate[None], [1, 2]) for candidate in population]
    fitness, frames = make_fitness(2, **options)(population, [1, 2])
    assert fitness.tolist() == [score.item() for score, _ in scores]
    assert frames == sum(frames for _, frames in scores)
    assert len({frames for _, frames in scores}) > 1  # some crash early


def test_rows_at_rest_are_not_simulated(monkeypatch):
    steps, step = [], MockEnv._step
    monkeypatch.setattr(MockEnv, "_step", lambda env, data: (steps.append(1), step(env, data))[1])
    _, frames = make_fitness(3)(POPULATION, [1])  # three candidates, then two
    assert len(steps) == frames == 50


def test_trials_are_cut_off():
    (full, _), (cut, frames) = (make_fitness(2, max_steps=steps)(POPULATION[:2], [1, 2]) for steps in (None, 4))
    assert frames == 2 * 2 * 4
    assert cut.tolist() == pytest.approx((full * 0.4).tolist(), rel=1e-5)  # it pays the same in every step


def test_seeds_decide_and_the_generator_stays_as_it_was():
    fitness = make_fitness(2)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, other, again = (fitness(POPULATION[:2], seeds)[0] for seeds in ([1], [2], [1]))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_stops_when_it_is_asked_to():
    calls = iter([False] * 5 + [True])
    fitness = make_fitness(2, stop=lambda: next(calls))
    with pytest.raises(Interrupted):
        fitness(POPULATION, [1])


def test_bad_counts():
    with pytest.raises(ValueError, match="max_steps=0"):
        make_fitness(1, max_steps=0)
