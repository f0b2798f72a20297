"""What happens to rewards and observations that are not finite."""

import pickle
from functools import partial
from multiprocessing import get_context

import pytest
import torch
from torchrl.data import Unbounded
from torchrl.data.utils import CloudpickleWrapper
from torchrl.envs import SerialEnv, TensorDictPrimer, TransformedEnv

import envs.make
from envs import FiniteGuard, make_env
from envs.backends.mock import MockEnv
from envs.checks import Case, check_compose, check_outside, check_pickle, check_specs


class Breaking(MockEnv):
    """A counter that goes wrong at a step of every second episode; step 0 is the reset."""

    key, value, step = "reward", float("nan"), 2

    def _broken(self, data):
        if self._episode % 2 and self._t == self.step:
            data[self.key] = torch.full_like(data[self.key], self.value)
        return data

    def _reset(self, tensordict=None, **kwargs):
        return self._broken(super()._reset(tensordict, **kwargs))

    def _step(self, tensordict):
        return self._broken(super()._step(tensordict))


@pytest.fixture
def breaking(monkeypatch):
    def make(key="reward", value=float("nan"), step=2, **guard):
        backend = type("Breaking", (Breaking,), {"key": key, "value": value, "step": step})
        monkeypatch.setitem(envs.make.BACKENDS, "mock", partial(backend, episode_length=4))
        env = make_env(backend="mock", name="counter", task="continuous", frame_skip=1, from_pixels=False, seed=6)
        return env.append_transform(FiniteGuard(**guard))

    return make


def play(env, steps=9):
    current, seen = env.reset(), []
    for _ in range(steps):
        arrived, current = env.step_and_maybe_reset(current.set("action", torch.zeros(2)))
        seen.append(arrived.clone())
    return torch.stack(seen)


@pytest.mark.parametrize(
    ("key", "value", "step"),
    [("reward", float("nan"), 2), ("observation", float("-inf"), 3), ("observation", float("nan"), 0)],
)
def test_stop_says_where(breaking, key, value, step):
    env = breaking(key, value, step)
    with pytest.raises(FloatingPointError, match=rf"'{key}' is {value} at step {step} of episode 1 \(seed 6\)"):
        play(env)


@pytest.mark.parametrize(("key", "value"), [("reward", float("nan")), ("observation", float("inf"))])
def test_skip_ends_the_episode_and_counts(breaking, key, value):
    env = breaking(key, value, policy="skip")
    data = play(env)["next"]
    assert data["done"].flatten().int().tolist() == [0, 0, 0, 1, 0, 1, 0, 0, 0]
    assert torch.equal(data["truncated"], data["done"])
    assert not data["terminated"].any()
    assert data["reward"].flatten().tolist() == [1, 2, 3, 4, 1, 2 if key == "observation" else 0, 1, 2, 3]
    assert torch.equal(data["previous_reward"], data["reward"])
    assert data["observation"][:, 0].tolist() == [1, 2, 3, 4, 1, 0 if key == "observation" else 2, 1, 2, 3]
    assert env.transform[-1].counter.tolist() == [1]


def test_skip_after_a_reset_ends_with_the_first_step(breaking):
    counter = torch.full((1,), 5)
    env = breaking("observation", step=0, policy="skip", counter=counter)
    data = play(env)
    assert data["next", "done"].flatten().int().tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 1]
    assert data["observation"].isfinite().all()
    assert counter.tolist() == [7]  # two of four resets


def test_rows_of_a_batch_go_on(breaking):
    make = [breaking(policy="skip").base_env.__class__, MockEnv]
    env = TransformedEnv(SerialEnv(2, [partial(cls, episode_length=5) for cls in make]), FiniteGuard("skip"))
    current, ends = env.reset(), []
    for _ in range(8):
        arrived, current = env.step_and_maybe_reset(current.set("action", torch.zeros(2, 2)))
        ends.append(arrived["next", "done"].flatten().int().tolist())
    assert [row[0] for row in ends] == [0, 0, 0, 0, 1, 0, 1, 0]
    assert [row[1] for row in ends] == [0, 0, 0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_large_finite_values_pass(breaking, policy):
    env = breaking("observation", 3e38, policy=policy)
    assert play(env)["next", "done"].sum() == 2
    assert env.transform[-1].counter.tolist() == [0]


def test_state_of_the_policy_is_left_alone(breaking):
    env = breaking(step=-1)
    env.insert_transform(0, TensorDictPrimer(belief=Unbounded(2), expand_specs=True, default_value=float("nan")))
    assert env.reset()["belief"].isnan().all()
    assert play(env).shape == (9,)


def test_it_is_a_good_transform():
    for check in (check_compose, check_outside, check_pickle, check_specs):
        check(Case(make_transform=FiniteGuard))
    with pytest.raises(ValueError, match=r"policy='ignore': choose one of skip, stop"):
        FiniteGuard("ignore")


def count_once(make_guard):
    make_guard().counter.add_(1)


@pytest.mark.slow
def test_clones_and_processes_count_together():
    guard = FiniteGuard("skip")
    process = get_context("spawn").Process(target=count_once, args=(CloudpickleWrapper(guard.clone),))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert guard.counter.tolist() == [1]
    assert pickle.loads(pickle.dumps(guard)).counter.tolist() == [1]
