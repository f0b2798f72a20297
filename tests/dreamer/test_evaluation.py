"""Whole episodes: what counts, what identifies them, and that they can be filmed, stopped and repeated."""

from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import SerialEnv, TransformedEnv

from dreamer.collection import EnvFactory, derive_seed
from dreamer.evaluation import (
    EVALUATION,
    Interrupted,
    episode_seeds,
    preserve_rng,
    run_episodes,
    run_seeded_episodes,
)
from envs import make_env
from envs.backends.mock import MockEnv
from envs.transforms import Render

CPU = torch.device("cpu")
REACH = {"backend": "mock", "name": "reach", "task": "continuous", "frame_skip": 1, "from_pixels": False}


def counters(*lengths: int) -> SerialEnv:
    return SerialEnv(len(lengths), [partial(MockEnv, episode_length=length) for length in lengths])


def idle(tensordict: TensorDict) -> TensorDict:
    return tensordict.set("action", torch.zeros(*tensordict.batch_size, 2))


def chance(tensordict: TensorDict) -> TensorDict:
    return tensordict.set("action", torch.rand(*tensordict.batch_size, 1))


class TestCounting:
    def test_side_by_side(self):
        """1 + 2 + 3 in three steps, and 1 + ... + 5 in five: what follows the first end does not count."""
        episodes = run_episodes(counters(3, 5), idle, 2, CPU)
        assert (episodes.returns, episodes.lengths) == ([6.0, 15.0], [3, 5])
        assert (episodes.seeds, episodes.frames) == ([None, None], None)

    def test_short_episodes_are_not_preferred(self):
        """As many as asked for, one per row and round, although the first row could have played three meanwhile."""
        episodes = run_episodes(counters(2, 7), idle, 5, CPU)
        assert (episodes.returns, episodes.lengths) == ([3.0, 28.0, 3.0, 28.0, 3.0], [2, 7, 2, 7, 2])

    def test_a_single_environment(self):
        episodes = run_episodes(MockEnv(episode_length=4), idle, 2, CPU)
        assert (episodes.returns, episodes.lengths) == ([10.0, 10.0], [4, 4])


class TestSeeds:
    @pytest.mark.parametrize("rows", [None, 2])
    def test_an_episode_can_be_played_again(self, rows):
        """By its seed and number, in an environment of its own; the target is in the observation."""
        make = partial(make_env, **REACH)
        env, targets = make() if rows is None else SerialEnv(rows, make), []

        def watch(tensordict):
            targets.append(tensordict["observation"].flatten().tolist())
            return chance(tensordict)

        env.set_seed(4)
        episodes = run_episodes(env, watch, 4, CPU)
        assert len(set(episodes.seeds)) == 4
        first_steps = targets[:: episodes.lengths[0]]
        for index, (seed, number) in enumerate(episodes.seeds):
            again = make()
            again.set_seed(seed, episode=number)
            count = rows or 1
            assert again.reset()["observation"].item() == first_steps[index // count][index % count]

    def test_the_same_seed_gives_the_same_episodes(self):
        """Whatever was played before; random numbers outside stay as they are."""
        env = SerialEnv(2, partial(make_env, **REACH))
        torch.manual_seed(0)
        state = torch.get_rng_state()
        results = [run_seeded_episodes(env, chance, 3, CPU, seed=seed, deterministic=False) for seed in (1, 1, 2)]
        assert results[0] == results[1]
        assert results[0].returns != results[2].returns
        assert torch.equal(torch.get_rng_state(), state)

    def test_an_evaluation_plays_no_episode_of_the_training(self):
        """Through the factory that makes the environments of both, one episode each of 8 streams and of 3 rows."""
        env = {"backend": "mock", "name": "counter", "task": "continuous"}

        def episodes(seed: int, rows: int) -> set[tuple[int, int]]:
            made = EnvFactory(env, range(rows), seed, None)()
            made.reset()
            return set(episode_seeds(made, rows))

        training = episodes(5, 8)
        evaluation = EnvFactory(env, range(3), derive_seed(5, EVALUATION), None)()
        result = run_seeded_episodes(evaluation, idle, 3, CPU, seed=derive_seed(5, EVALUATION), deterministic=True)
        assert len(training) == 8 and len(set(result.seeds)) == 3 and not training & set(result.seeds)


class TestStop:
    def test_between_steps(self):
        asked = []

        def stop() -> bool:
            asked.append(len(asked))
            return len(asked) == 4

        with pytest.raises(Interrupted):
            run_episodes(counters(10, 10), idle, 2, CPU, stop=stop)
        assert len(asked) == 4

    def test_never(self):
        assert run_episodes(counters(3), idle, 1, CPU, stop=lambda: False).returns == [6.0]


def filmed_counter(length: int) -> TransformedEnv:
    return TransformedEnv(MockEnv(episode_length=length), Render(8))


class TestFilm:
    @pytest.mark.parametrize("lengths", [(4,), (4, 6), (6, 4)])
    def test_the_first_episode_from_reset_to_end(self, lengths):
        """The counter's images are as bright as the time; other rows and later episodes are not in the film."""
        env = SerialEnv(len(lengths), [partial(filmed_counter, length) for length in lengths])
        frames = run_episodes(env, idle, 5, CPU, record="pixels").frames
        assert frames.shape[1:] == (8, 8, 3) and frames.dtype == torch.uint8
        assert frames.flatten(1).float().mean(1).tolist() == list(range(lengths[0] + 1))

    def test_a_single_environment(self):
        assert len(run_episodes(filmed_counter(3), idle, 2, CPU, record="pixels").frames) == 4


def test_random_numbers_are_left_as_they_were():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with preserve_rng(7):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    with preserve_rng(7):
        assert torch.equal(torch.rand(3), first)
