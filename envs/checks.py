"""A conformance suite for transforms that write observations: yours, ours and TorchRL's.

    from envs.checks import check_transform

    check_transform(MyTransform, stochastic=True)  # raises AssertionError that says what is wrong and how to mend it

Every check is a function of a `Case` and can be called alone. Transforms of actions are not covered.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.envs import Compose, EnvBase, ParallelEnv, SerialEnv, StepCounter, Transform, TransformedEnv
from torchrl.envs.utils import check_env_specs

from envs.backends.square import SquareEnv
from envs.scripted import (
    Trajectory,
    difference,
    global_rng,
    make_actions,
    make_resets,
    scripted_rollout,
)

ROWS = 2  # environments in a batch
MAX_PICKLE = 1_000_000  # bytes


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A transform, an environment to try it on, and what to expect.

    Args:
        make_transform: makes the transform anew at each call.
        make_base_env: makes a single environment, the same at each call.
        changes: entries that it is meant to change, besides the observations in its `out_keys`, e.g. "reward".
        stochastic: it draws random numbers: another seed, and another row of a batch, must show it.
        shared_noise: one generator serves all rows at every step: a reset of one changes the noise of the others.
        clean_reset: it leaves the first observation of an episode as it is.
        keeps_foreground: it leaves `pixels` as they are where `mask` is True.
        outside: it works around a batched environment, not only inside of each worker.
        steps: length of the rollouts, at least 8.
    """

    make_transform: Callable[[], Transform]
    make_base_env: Callable[[], EnvBase] = SquareEnv
    changes: Collection[str] = ()
    stochastic: bool = False
    shared_noise: bool = False
    clean_reset: bool = False
    keeps_foreground: bool = False
    outside: bool = True
    steps: int = 8

    def __post_init__(self) -> None:
        if self.steps < 8:
            raise ValueError(f"steps={self.steps}: give at least 8, so that episodes end and others begin")


def _seed(transform: Transform, seed: int) -> None:
    parts = [module for module in transform.modules() if callable(getattr(module, "set_seed", None))]
    for index, part in enumerate(parts):
        part.set_seed(seed + 1000 * index)  # type: ignore[reportCallIssue]


def _attach(transform: Transform, base: EnvBase) -> TransformedEnv:
    return base.append_transform(transform) if isinstance(base, TransformedEnv) else TransformedEnv(base, transform)


def _base(case: Case, seed: int = 0) -> EnvBase:
    env = case.make_base_env()
    env.set_seed(seed)
    return env


def _single(case: Case, seed: int = 0) -> TransformedEnv:
    """One environment with the transform, both seeded."""
    transform = case.make_transform()
    _seed(transform, seed)
    return _attach(transform, _base(case, seed))


def _outside(case: Case, seeds: Sequence[int] = (0, 1), **options: Any) -> TransformedEnv:
    """A batch of environments with one transform around it."""
    transform = case.make_transform()
    _seed(transform, seeds[0])
    return TransformedEnv(SerialEnv(len(seeds), [partial(_base, case, seed) for seed in seeds], **options), transform)


@lru_cache(maxsize=8)
def _actions(case: Case, seed: int = 0) -> list[TensorDictBase]:
    return make_actions(case.make_base_env, case.steps, seed)


def _play(env: EnvBase, case: Case, seed: int = 0) -> Trajectory:
    return scripted_rollout(env, _actions(case, seed), make_resets(case.steps, seed))


def _play_single(case: Case, seed: int = 0) -> Trajectory:
    return _play(_single(case, seed), case, seed)


_expected = lru_cache(maxsize=8)(_play_single)  # what several checks compare with


@lru_cache(maxsize=8)
def _without(case: Case) -> Trajectory:
    return _play(_base(case), case)


def _play_rows(env: EnvBase, case: Case, seeds: Sequence[int] = (0, 1), resets: Any = None) -> list[Trajectory]:
    """The actions and resets of the single environments with these seeds, side by side; a trajectory per row."""
    actions = [torch.stack(list(row)) for row in zip(*(_actions(case, seed) for seed in seeds), strict=True)]
    resets = resets or list(zip(*(make_resets(case.steps, seed) for seed in seeds), strict=True))
    data = scripted_rollout(env, actions, resets)
    return [{name: value[:, row] for name, value in data.items()} for row in range(len(seeds))]


def _written(transform: Transform) -> set[str]:
    """Names of the observations that a transform, or the parts of a `Compose`, declares to write."""
    parts = [module for module in transform.modules() if isinstance(module, Transform)]
    keys: list[Any] = [key for part in parts if not isinstance(part, Compose) for key in part.out_keys or []]
    return {key[-1] if isinstance(key, tuple) else key for key in keys} - {"reward", "done", "terminated", "truncated"}


def check_factory(case: Case) -> None:
    """The factory makes a new transform each time."""
    first, second = case.make_transform(), case.make_transform()
    assert isinstance(first, Transform), f"make_transform() returned {type(first).__name__}: return a TorchRL Transform"
    assert first is not second, "make_transform() returned the same object twice: make a new one at each call"


def check_specs(case: Case) -> None:
    """The specs describe what comes out, here and around a batch."""
    places = {"a single environment": _single, **({"a batched environment": _outside} if case.outside else {})}
    for where, make in places.items():
        env = make(case)
        try:
            check_env_specs(env, break_when_any_done="both")
        except (AssertionError, KeyError, RuntimeError, ValueError) as error:
            raise AssertionError(
                f"the specs do not describe the data of {where}: declare every key, shape, dtype and bound that the "
                f"transform writes in transform_observation_spec, and write all of them in _reset too ({error})"
            ) from error
        finally:
            env.close(raise_if_closed=False)


def check_global_rng(case: Case) -> None:
    """The global generators of Python, NumPy and torch are where they were."""

    def next_numbers(play: Callable[[], Any]) -> dict[str, float]:
        with global_rng(987_654_321):
            play()
            return {"random": random.random(), "numpy.random": np.random.random(), "torch": torch.rand(()).item()}

    before = next_numbers(lambda: None)
    if next_numbers(lambda: _play(_base(case), case)) != before:
        raise ValueError("make_base_env() itself moves a global generator: check on another environment")
    after = next_numbers(lambda: _play_single(case))
    moved = [name for name in before if before[name] != after[name]]
    assert not moved, (
        f"the global generator of {' and '.join(moved)} moved: draw from a np.random.Generator or torch.Generator of "
        "your own, which set_seed(seed) seeds, and call no manual_seed or np.random.seed"
    )


def check_seed(case: Case) -> None:
    """The seed decides the frames: the same one repeats them, another one changes what is stochastic."""
    trajectories = []
    for seed in (1, 2):
        with global_rng(seed):
            trajectories.append(_play_single(case))
    text = difference(*trajectories)
    assert not text, (
        f"two transforms with the same seed differ ({text}): draw only from a generator of your own, which "
        "set_seed(seed) seeds"
    )
    if not case.stochastic:
        return
    transform = case.make_transform()
    _seed(transform, 12345)
    other = _play(_attach(transform, _base(case)), case)
    assert difference(trajectories[0], other), (
        "another seed gives the same frames: define set_seed(self, seed), and let every random number come from it, "
        "or pass stochastic=False"
    )
    if case.outside:
        rows = _play_rows(_outside(case, (0, 0)), case, (0, 0))
        assert difference(rows[0], rows[1]), "all rows of a batched environment get the same noise: draw it per row"


def _play_pickled(payload: bytes) -> bytes:
    return pickle.dumps(_play_single(pickle.loads(payload)))


def check_processes(case: Case) -> None:
    """A new process gives the same frames."""
    import cloudpickle

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        other = pickle.loads(pool.submit(_play_pickled, cloudpickle.dumps(case)).result())
    text = difference(_play_single(case), other)
    assert not text, f"in a new process {text}: let nothing depend on hash(), the order of sets or the process"


def check_no_interference(case: Case) -> None:
    """Rewards, ends and the observations that the transform does not write are identical with and without it."""
    changes = {case.changes} if isinstance(case.changes, str) else {*case.changes}
    text = difference(_without(case), _expected(case), skip=_written(case.make_transform()) | changes)
    assert not text, (
        f"with the transform {text}: leave the simulation, rewards, ends and other observations alone, or pass "
        "changes=(...) with the names of those that it is meant to change"
    )


def check_reset_frame(case: Case) -> None:
    """An observation that is changed after a step is changed after a reset too, and the other way round."""
    without, changed = _without(case), _expected(case)
    ends = without["next done"].flatten() | torch.tensor(make_resets(case.steps))
    starts = torch.cat([torch.ones(1, dtype=torch.bool), ends[:-1]])  # [T]
    for key in _written(case.make_transform()) & set(without):
        at_reset = not torch.equal(without[key][starts], changed[key][starts])
        at_step = not torch.equal(without[f"next {key}"], changed[f"next {key}"])
        assert case.clean_reset or at_reset or not at_step, (
            f"{key!r} is changed after steps but not after resets: TorchRL calls _reset there and not _call, so define "
            "_reset, or pass clean_reset=True if first frames are meant to stay as they are"
        )
        assert at_step or not at_reset, f"{key!r} is changed after resets but not after steps: define _call or _step"


def check_memory(case: Case) -> None:
    """What was handed out does not change afterwards."""
    env: Any = _single(case)
    names = _written(env.transform)
    try:
        data, handed_out = env.reset(), []
        for action in _actions(case):
            handed_out += [(key, data[key], data[key].clone()) for key in names & set(data.keys())]
            data = env.step_mdp(env.step(data.update(action)))
    finally:
        env.close(raise_if_closed=False)
    for key, value, copy in handed_out:
        assert torch.equal(value, copy), f"an earlier {key!r} was overwritten: write a new tensor each time"


def check_foreground(case: Case) -> None:
    """Where `mask` is True, the pixels are those of the environment."""
    without, changed = _without(case), _expected(case)
    if "mask" not in without:
        raise ValueError("keeps_foreground=True: make_base_env() writes no `mask`")
    for where in ("", "next "):
        moved = without[f"{where}pixels"] != changed[f"{where}pixels"]
        wrong = int((moved & without[f"{where}mask"]).sum())
        assert not wrong, f"{wrong} foreground values of {where}pixels changed: replace pixels only where mask is False"


def check_compose(case: Case) -> None:
    """Inside of `Compose`, with others before and after, it does the same."""
    transform: Any = case.make_transform()
    _seed(transform, 0)
    nested = Compose(*[Compose(*[transform]), StepCounter(step_count_key="steps_taken")])
    text = difference(_expected(case), _play(_attach(nested, _base(case)), case))
    assert not text, (
        f"inside of Compose {text}: reach the environment through self.parent or self.container at each call, "
        "and make no assumption about the position"
    )


def _check_rows(case: Case, env: EnvBase, name: str) -> None:
    rows = _play_rows(env, case)
    for seed in range(ROWS):
        text = difference(_expected(case, seed), rows[seed])
        assert not text, (
            f"row {seed} of {name} does not show what a single environment with the same seed shows ({text}): "
            "keep all state in the transform, none in the class or module, and start episodes in _reset"
        )


def check_inside(case: Case) -> None:
    """In each environment of a `SerialEnv` it does the same as alone."""
    _check_rows(case, SerialEnv(ROWS, [partial(_single, case, seed) for seed in range(ROWS)]), "SerialEnv")


def check_parallel(case: Case) -> None:
    """In each environment of a `ParallelEnv` it does the same as alone."""
    makers = [partial(_single, case, seed) for seed in range(ROWS)]
    _check_rows(case, ParallelEnv(ROWS, makers, mp_start_method="spawn"), "ParallelEnv (spawned)")


def check_outside(case: Case) -> None:
    """Around a batched environment it treats each row as one inside would; resets by row leave the others alone."""
    if not case.stochastic:
        _check_rows(case, _outside(case), "a batched environment inside the transform")
    if case.shared_noise:
        return
    only_first = [(step == 0, False) for step in range(case.steps)]
    kept = _play_rows(_outside(case), case, resets=[(False, False)] * case.steps)[1]
    reset = _play_rows(_outside(case), case, resets=only_first)[1]
    end = int(torch.cat([kept["next done"].flatten(), torch.ones(1, dtype=torch.bool)]).nonzero()[0]) + 1
    text = difference({name: value[:end] for name, value in kept.items()}, {k: v[:end] for k, v in reset.items()})
    assert not text, (
        f"the reset of row 0 changed row 1 ({text}): in _reset, change the state only of rows where "
        "tensordict['_reset'] is True, and draw noise per row (shared_noise=True if one generator for all is meant)"
    )


def check_pickle(case: Case) -> None:
    """It can be pickled, new or used, and takes little space."""
    for name in ("new", "used"):
        transform = case.make_transform()
        if name == "used":
            _play(_attach(transform, _base(case, 7)), case, 7)
            transform.reset_parent()
        try:
            blob = pickle.dumps(transform)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise AssertionError(
                f"a {name} transform cannot be pickled: keep no open file, lambda, lock or simulator in it, or leave "
                f"them out in __getstate__ ({error})"
            ) from error
        assert len(blob) <= MAX_PICKLE, (
            f"a {name} transform takes {len(blob):,} bytes when pickled, at most {MAX_PICKLE:,} are good: memory-map "
            "large arrays, or make them on first use, so that the workers do not receive a copy each"
        )
        copy = pickle.loads(blob)
        _seed(copy, 0)
        text = difference(_expected(case), _play(_attach(copy, _base(case)), case))
        assert not text, (
            f"a {name} transform differs after pickling ({text}): carry over every setting, and let set_seed "
            "and _reset start everything anew"
        )


def check_devices(case: Case) -> None:
    """On every device of this machine it does the same; `to` moves all of it."""
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        moved = case.make_transform().to(device)
        assert isinstance(moved, Transform), "transform.to(device) returned no transform: return self"
        _seed(moved, 0)
        try:
            text = difference(_expected(case), _play(_attach(moved, _base(case).to(device)).to(device), case))
            if case.outside and not text:
                rows = zip(
                    _play_rows(_outside(case), case), _play_rows(_outside(case, device=device), case), strict=True
                )
                text = "".join(difference(*pair) for pair in rows)
        except RuntimeError as error:
            text = f"it fails ({error})"
        assert not text, f"on {device} {text}: register tensors as buffers, and use the device of the data"


CHECKS = [check_factory, check_specs, check_global_rng, check_seed, check_no_interference, check_reset_frame]
CHECKS += [check_memory, check_compose, check_inside, check_pickle, check_devices]


def check_transform(
    make_transform: Callable[[], Transform],
    make_base_env: Callable[[], EnvBase] = SquareEnv,
    *,
    processes: bool = False,
    **options: Any,
) -> list[str]:
    """Checks a transform; see the functions `check_*` for what each of them demands.

    Args:
        make_transform: makes the transform, or a `Compose` of some, anew at each call.
        make_base_env: makes a single environment to try it on, the same at each call; the default writes `pixels`
            `[16, 16, 3]`, `mask` `[16, 16, 1]` and `observation` `[2]`, see `envs.backends.square.SquareEnv`.
        processes: check in other processes as well, some ten seconds more; a script then needs its
            `if __name__ == "__main__"`.
        options: of `Case`: which properties to expect.

    Returns:
        The names of the checks that passed.

    Raises:
        AssertionError: a property does not hold; the message says what to do.
    """
    case = Case(make_transform=make_transform, make_base_env=make_base_env, **options)
    checks = [*CHECKS, check_outside] if case.outside else [*CHECKS]
    checks += [check_foreground] if case.keeps_foreground else []
    checks += [check_processes, check_parallel] if processes else []
    for check in checks:
        with global_rng(0):
            check(case)
    return [check.__name__ for check in checks]
