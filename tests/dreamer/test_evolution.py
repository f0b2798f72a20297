"""The evolution strategy, on a fitness that is known."""

import sys

import numpy as np
import pytest
import torch

pytest.importorskip("cma")

from dreamer.evolution import CMAES

SIZE, POPULATION = 6, 12


def sphere(candidates: torch.Tensor) -> torch.Tensor:
    return -(candidates - 1).square().sum(-1)


def make(**changes) -> CMAES:
    return CMAES(SIZE, **({"population": POPULATION, "seed": 3} | changes))


def advance(es: CMAES, generations: int, fitness=sphere) -> CMAES:
    for _ in range(generations):
        es.tell(fitness(es.ask()))
    return es


@pytest.mark.parametrize("diagonal", [True, False])
def test_fitness_rises(diagonal):
    es = make(diagonal=diagonal)
    assert not es.mean.any()
    assert sphere(advance(es, 60).mean) > -0.05
    assert es.mean.dtype == es.ask().dtype == torch.float32


@pytest.mark.parametrize("fitness", [lambda x: sphere(x) + 1e3, lambda x: 7 * sphere(x)])
def test_only_ranks_matter(fitness):
    assert torch.equal(advance(make(), 5).mean, advance(make(), 5, fitness).mean)


def test_results_belong_to_candidates_in_any_order_of_completion():
    es, other = make(), make()
    candidates, fitness = other.ask(), torch.zeros(POPULATION)
    for index in torch.randperm(POPULATION).tolist():
        fitness[index] = sphere(candidates[index])
    other.tell(fitness)
    assert torch.equal(advance(es, 1).mean, other.mean)


def test_asking_twice_gives_the_same_candidates():
    es = make()
    assert torch.equal(es.ask(), es.ask())
    es.tell(sphere(es.ask()))
    assert torch.equal(es.mean, advance(make(), 1).mean)


def test_a_flat_fitness_neither_moves_nor_ends_anything():
    es = advance(make(), 3)
    mean = es.mean
    advance(es, 5, lambda x: torch.full((len(x),), -21.0))
    assert torch.equal(es.mean, mean) and es.generation == 8
    assert sphere(advance(es, 40).mean) > sphere(mean)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_fitness_that_is_not_finite_is_refused(bad):
    es = make()
    fitness = sphere(es.ask())
    fitness[4] = bad
    with pytest.raises(ValueError, match=r"\[4\]"):
        es.tell(fitness)
    es.tell(sphere(es.ask()))


def test_a_fitness_of_another_shape_is_refused():
    es = make()
    es.ask()
    with pytest.raises(ValueError, match=r"\(12, 2\)"):
        es.tell(torch.zeros(POPULATION, 2))


def test_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(ImportError, match=r"pip install lucid-rl\[gym\]"):
        make()


def test_tell_needs_ask():
    with pytest.raises(RuntimeError, match="ask"):
        make().tell(torch.zeros(POPULATION))


@pytest.mark.parametrize("diagonal", [True, False])
def test_a_resumed_search_goes_on_to_the_bit(diagonal, tmp_path):
    es = advance(make(diagonal=diagonal), 4)
    advance(es, 1, lambda x: torch.zeros(len(x)))
    advance(es, 3)
    pending = es.ask()
    torch.save(es.state_dict(), tmp_path / "state.pt")
    resumed = make(diagonal=diagonal)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.generation == 8
    assert torch.equal(resumed.ask(), pending), "the generation that was interrupted comes again"
    assert torch.equal(advance(resumed, 4).mean, advance(es, 4).mean)
    assert torch.equal(resumed.ask(), es.ask())


def test_a_search_starts_where_it_is_told_and_remembers_it():
    es = make(start=torch.arange(6.0))
    assert torch.equal(es.mean, torch.arange(6.0))
    advance(es, 2)
    resumed = make()
    resumed.load_state_dict(es.state_dict())
    assert torch.equal(resumed.ask(), es.ask()) and not torch.equal(advance(make(), 2).ask(), es.ask())


def test_a_new_search_has_a_state():
    es = make()
    es.load_state_dict(make().state_dict())
    assert es.generation == 0


def test_the_state_of_another_search_is_refused():
    with pytest.raises(ValueError, match="'seed': 3"):
        make(seed=4).load_state_dict(make().state_dict())


def test_a_state_that_leads_elsewhere_is_refused():
    state = advance(make(), 2).state_dict()
    state["mean"] += 1e-3
    with pytest.raises(RuntimeError, match="version of cma"):
        make().load_state_dict(state)


def test_random_streams_are_private():
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    es = advance(make(), 2)
    assert (np.random.get_state()[1] == before[0]).all() and torch.equal(torch.get_rng_state(), before[1])
    np.random.rand(5)
    assert torch.equal(es.ask(), advance(make(), 2).ask())
    assert not torch.equal(es.ask(), advance(make(seed=4), 2).ask())
