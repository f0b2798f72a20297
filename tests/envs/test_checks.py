"""The conformance suite: it lets good transforms pass, and every check catches the mistake that it is for."""

import os
import random
from functools import partial

import numpy as np
import pytest
import torch
from torchrl.data import Binary, Bounded
from torchrl.envs import Compose, SerialEnv, Transform

from envs import PreviousStep, Render, StreamIndex, checks
from envs.backends.dmc import DMCEnv
from envs.backends.mock import MockEnv
from envs.backends.square import SquareEnv
from envs.checks import Case, check_transform
from envs.transforms.color_grid import LEVELS, ColorGrid
from envs.transforms.denoised_mdp import CameraJitter, NoisySensor
from envs.transforms.distracting_cs import DistractingCS
from envs.transforms.natural_video import NaturalVideo


class Invert(Transform):
    """A correct transform: the negative of the background."""

    def __init__(self):
        super().__init__(in_keys=["pixels", "mask"], out_keys=["pixels"])

    def _picture(self, pixels):
        return 255 - pixels

    def _call(self, next_tensordict):
        pixels = next_tensordict["pixels"]
        return next_tensordict.set("pixels", torch.where(next_tensordict["mask"], pixels, self._picture(pixels)))

    def _reset(self, tensordict, tensordict_reset):
        return self._call(tensordict_reset)


class Noise(Invert):
    """A correct stochastic transform: a random grey value, drawn per row and frame."""

    def __init__(self):
        super().__init__()
        self.set_seed(0)

    def set_seed(self, seed):
        self.generator = np.random.default_rng(seed)

    def _picture(self, pixels):
        shape = (*pixels.shape[:-3], 1, 1, 1)
        return torch.from_numpy(self.generator.integers(256, size=shape, dtype=np.uint8)).expand_as(pixels)


class Brightness(Invert):
    """A correct transform with a state: the background is brighter at each step of the episode, by row."""

    def __init__(self):
        super().__init__()
        self.time = torch.zeros(())

    def _picture(self, pixels):
        return (self.time * 5).to(torch.uint8)[..., None, None, None].expand_as(pixels)

    def _call(self, next_tensordict):
        self.time = self.time + 1
        return super()._call(next_tensordict)

    def _reset(self, tensordict, tensordict_reset):
        again = tensordict.get("_reset", None)
        again = tensordict_reset["done"] | True if again is None else again
        time = self.time.expand(again.shape[:-1])
        self.time = torch.where(again[..., 0], torch.zeros_like(time), time)
        return super()._call(tensordict_reset)


class Undeclared(Invert):
    def _call(self, next_tensordict):
        return super()._call(next_tensordict).set("extra", next_tensordict["mask"])


class WrongType(Invert):
    def _picture(self, pixels):
        return (255 - pixels).float()


class OutOfBounds(Invert):
    def __init__(self):
        super().__init__()
        self.out_keys = ["extra"]

    def _call(self, next_tensordict):
        return next_tensordict.set("extra", torch.full((*next_tensordict.batch_size, 1), 7, dtype=torch.uint8))

    def transform_observation_spec(self, observation_spec):
        shape = (*observation_spec.shape, 1)
        observation_spec["extra"] = Bounded(0, 1, shape=shape, dtype=torch.uint8)
        return observation_spec


class ForgetsBatch(OutOfBounds):
    def _call(self, next_tensordict):
        return next_tensordict.set("extra", torch.ones(1, dtype=torch.bool).expand(*next_tensordict.batch_size, 1))

    def transform_observation_spec(self, observation_spec):
        observation_spec["extra"] = Binary(n=1, shape=(1,), dtype=torch.bool)
        return observation_spec


class SeedsNumpy(Noise):
    def set_seed(self, seed):
        np.random.seed(seed)
        super().set_seed(seed)


class DrawsFromTorch(Noise):
    def _picture(self, pixels):
        return torch.randint_like(pixels, 256)


class DrawsFromPython(Noise):
    def _picture(self, pixels):
        return torch.full_like(pixels, random.randrange(256))


class SeedlessNoise(Noise):
    def set_seed(self, seed):
        self.generator = np.random.default_rng()


class DeafNoise(Noise):
    def set_seed(self, seed):
        self.generator = np.random.default_rng(0)


class SameForAllRows(Noise):
    def _picture(self, pixels):
        return torch.full_like(pixels, int(self.generator.integers(256)))


class SharedStart(Noise):
    """One generator, which a reset of one row moves for the others."""

    def _reset(self, tensordict, tensordict_reset):
        self.generator.integers(256)
        return super()._reset(tensordict, tensordict_reset)


class ReadsProcess(Invert):
    def _picture(self, pixels):
        return torch.full_like(pixels, os.getpid() % 251)


class ChangesReward(Invert):
    def _call(self, next_tensordict):
        if "reward" in next_tensordict:
            next_tensordict["reward"] = next_tensordict["reward"] * 2
        return super()._call(next_tensordict)


class ChangesObservation(Invert):
    def _call(self, next_tensordict):
        next_tensordict["observation"] = next_tensordict["observation"] * 2
        return super()._call(next_tensordict)


class EndsEpisodes(Invert):
    def _step(self, tensordict, next_tensordict):
        next_tensordict["terminated"] = next_tensordict["done"] = torch.ones_like(next_tensordict["done"])
        return super()._step(tensordict, next_tensordict)


class MovesSimulation(Invert):
    def _call(self, next_tensordict):
        self.parent.base_env._place += 0.01
        return super()._call(next_tensordict)


class ForgetsReset(Invert):
    def _reset(self, tensordict, tensordict_reset):
        return tensordict_reset


class OnlyReset(Invert):
    def _reset(self, tensordict, tensordict_reset):
        return super()._call(tensordict_reset)

    def _call(self, next_tensordict):
        return next_tensordict


class ReusesBuffer(Invert):
    def _call(self, next_tensordict):
        super()._call(next_tensordict)
        if not hasattr(self, "buffer"):
            self.buffer = next_tensordict["pixels"].clone()
        return next_tensordict.set("pixels", self.buffer.copy_(next_tensordict["pixels"]))


class NeedsFirstPlace(Invert):
    """Does nothing where it is not the only transform."""

    def _picture(self, pixels):
        return pixels if isinstance(self.container.transform, Compose) else 255 - pixels


class SharedClock(Brightness):
    """Keeps its state in the class."""

    time_of_all = torch.zeros(())

    @property
    def time(self):
        return SharedClock.time_of_all

    @time.setter
    def time(self, value):
        SharedClock.time_of_all = value


class ResetsAllRows(Brightness):
    def _reset(self, tensordict, tensordict_reset):
        return super()._reset(tensordict.exclude("_reset"), tensordict_reset)


class HoldsLambda(Invert):
    def __init__(self):
        super().__init__()
        self.rule = lambda value: value


class HoldsTable(Invert):
    def __init__(self):
        super().__init__()
        self.table = torch.zeros(2_000_000, dtype=torch.uint8)


class LosesState(Noise):
    def __getstate__(self):
        return {**super().__getstate__(), "darker": True}

    def _picture(self, pixels):
        return super()._picture(pixels) // (2 if hasattr(self, "darker") else 1)


class KeepsOldState(Brightness):
    """Does not start anew with an episode."""

    def _reset(self, tensordict, tensordict_reset):
        return self._call(tensordict_reset)


class WrongTo(Invert):
    def to(self, *arguments, **options):
        super().to(*arguments, **options)


class StaysBehind(Invert):
    """Keeps a tensor that does not follow the data to another device."""

    def __init__(self):
        super().__init__()
        self.white = torch.full((1, 1, 3), 255, dtype=torch.uint8)

    def _picture(self, pixels):
        return self.white - pixels


class Everything(Invert):
    def _call(self, next_tensordict):
        return next_tensordict.set("pixels", 255 - next_tensordict["pixels"])


SHARED = Invert()
PLANTED = [  # check, broken transform, options of the case, what the message says
    ("check_factory", lambda: SHARED, {}, "same object twice"),
    ("check_factory", lambda: len, {}, "return a TorchRL Transform"),
    ("check_specs", Undeclared, {}, "(?s)declare every key.*extra"),
    ("check_specs", WrongType, {}, "specs do not describe the data of a single"),
    ("check_specs", OutOfBounds, {}, "specs do not describe the data of a single"),
    ("check_specs", ForgetsBatch, {}, "specs do not describe the data of a batched"),
    ("check_global_rng", SeedsNumpy, {}, r"generator of numpy.random moved"),
    ("check_global_rng", DrawsFromTorch, {}, "generator of torch moved"),
    ("check_global_rng", DrawsFromPython, {}, "generator of random moved"),
    ("check_seed", DrawsFromTorch, {}, "same seed differ.*pixels"),
    ("check_seed", SeedlessNoise, {}, "same seed differ.*pixels"),
    ("check_seed", DeafNoise, {"stochastic": True}, "another seed gives the same"),
    ("check_seed", SameForAllRows, {"stochastic": True}, "all rows"),
    ("check_no_interference", ChangesReward, {}, "'next reward' differs"),
    ("check_no_interference", ChangesObservation, {}, "'observation' differs"),
    ("check_no_interference", EndsEpisodes, {}, "'next done' differs, first at step 0"),
    ("check_no_interference", MovesSimulation, {}, "'next observation' differs"),
    ("check_reset_frame", ForgetsReset, {}, "define _reset"),
    ("check_reset_frame", OnlyReset, {}, "define _call"),
    ("check_memory", ReusesBuffer, {}, "'pixels' was overwritten"),
    ("check_compose", NeedsFirstPlace, {}, "inside of Compose 'pixels' differs"),
    ("check_inside", SharedClock, {}, "row . of SerialEnv"),
    ("check_outside", ResetsAllRows, {}, "row . of a batched environment"),
    ("check_outside", ResetsAllRows, {"stochastic": True}, "reset of row 0 changed row 1"),
    ("check_outside", SharedStart, {"stochastic": True}, "reset of row 0 changed row 1"),
    ("check_pickle", HoldsLambda, {}, "a new transform cannot be pickled"),
    ("check_pickle", HoldsTable, {}, "takes 2,0.* bytes"),
    ("check_pickle", LosesState, {}, "differs after pickling"),
    ("check_pickle", KeepsOldState, {}, "a used transform differs after pickling"),
    ("check_devices", WrongTo, {}, "return self"),
    ("check_foreground", Everything, {}, "foreground values of pixels changed"),
]


@pytest.mark.parametrize(
    ("check", "make", "options", "message"), PLANTED, ids=[f"{check}-{make.__name__}" for check, make, *_ in PLANTED]
)
def test_planted_mistakes_are_found(check, make, options, message):
    with pytest.raises(AssertionError, match=message):
        getattr(checks, check)(Case(make_transform=make, **options))


def test_every_check_has_a_planted_mistake():
    names = {
        name for name in dir(checks) if name.startswith("check_") and getattr(checks, name).__module__ == "envs.checks"
    }
    elsewhere = {"check_transform", "check_parallel", "check_processes"}  # slow, below
    assert names - elsewhere == {check for check, *_ in PLANTED}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_tensor_that_stays_behind_is_found():
    with pytest.raises(AssertionError, match=r"on cuda it fails.*buffers"):
        checks.check_devices(Case(make_transform=StaysBehind))


def test_a_planted_mistake_in_the_workers_is_found(monkeypatch):
    """As in `test_planted_mistakes_are_found`, without the time that two processes take to start."""
    monkeypatch.setattr(checks, "ParallelEnv", lambda rows, makers, mp_start_method: SerialEnv(rows, makers))
    with pytest.raises(AssertionError, match=r"row . of ParallelEnv"):
        checks.check_parallel(Case(make_transform=SharedClock))


@pytest.mark.slow
def test_a_planted_mistake_in_a_new_process_is_found():
    with pytest.raises(AssertionError, match=r"in a new process 'pixels' differs"):
        checks.check_processes(Case(make_transform=ReadsProcess))


def test_no_mask_no_foreground():
    with pytest.raises(ValueError, match="writes no `mask`"):
        checks.check_foreground(Case(make_transform=partial(StreamIndex, 0), make_base_env=MockEnv))


def test_a_base_environment_that_moves_global_generators_is_refused():
    class Restless(SquareEnv):
        def _step(self, tensordict):
            random.random()
            return super()._step(tensordict)

    with pytest.raises(ValueError, match="itself moves a global generator"):
        checks.check_global_rng(Case(make_transform=Invert, make_base_env=Restless))


def test_short_rollouts_are_refused():
    with pytest.raises(ValueError, match="steps=7: give at least 8"):
        check_transform(Invert, steps=7)


def test_meant_changes_are_allowed():
    case = Case(make_transform=ChangesReward, changes=("reward",))
    checks.check_no_interference(case)


RANDOM = {"stochastic": True, "keeps_foreground": True}
STEPWISE = {**RANDOM, "shared_noise": True}
SAME = {"keeps_foreground": True}


def grid(level, **options):
    """A grid for the default environment, which pays between -2 and 1."""
    if level in ("reward", "max"):
        options |= {"reward_range": [(-2.0, 1.0)], "reward_scale": 1.0}
    if level == "max":
        options |= {"action_power": 2, "num_colors_per_cell": 64}
    return ColorGrid(level, num_cells_per_dim=8, emit_index=True, **options)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Brightness, SAME),
        (Noise, STEPWISE),
        (partial(grid, "action_cross_sequence"), SAME),
        (NaturalVideo, RANDOM),
        pytest.param(partial(NaturalVideo, loop="clip", grayscale=True), RANDOM, marks=pytest.mark.slow),
        pytest.param(
            CameraJitter, {"stochastic": True, "shared_noise": True, "changes": "mask"}, marks=pytest.mark.slow
        ),
        pytest.param(partial(Render, 8, mask=True), {"outside": False}, marks=pytest.mark.slow),
        pytest.param(PreviousStep, {}, marks=pytest.mark.slow),
    ],
)
def test_transforms_pass(make, options):
    before = torch.get_rng_state()
    passed = check_transform(make, **options)
    assert torch.equal(before, torch.get_rng_state()), "the suite itself moves a global generator"
    assert len(passed) == 12 + ("keeps_foreground" in options) - ("outside" in options)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["max", "random"])
def test_levels_of_the_grid_pass(level):
    check_transform(partial(grid, level), **(STEPWISE if level in ("minimum", "random") else SAME))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (lambda: Compose(DistractingCS("easy", dynamic=True), Render(16, fast=True)), ()),
        (lambda: Compose(Render(16, fast=True, mask=True), NoisySensor()), ("reward",)),
    ],
    ids=["distracting_cs", "noisy_sensor"],
)
def test_transforms_of_a_simulation_pass(make, changes):
    walker = partial(DMCEnv, name="walker", task="walk", frame_skip=2, seed=0)
    case = Case(make_transform=make, make_base_env=walker, changes=changes, stochastic=True, outside=False)
    checks.check_seed(case)
    checks.check_no_interference(case)
    if not changes:
        checks.check_inside(case)
    else:
        with pytest.raises(AssertionError, match="'next reward' differs"):
            checks.check_no_interference(Case(make_transform=make, make_base_env=walker))


def small_chain():
    return Compose(grid("action"), NaturalVideo(), StreamIndex(2), PreviousStep())


@pytest.mark.slow
def test_transforms_pass_in_other_processes():
    checks.check_parallel(Case(make_transform=small_chain, stochastic=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "make",
    [*(partial(grid, level) for level in LEVELS), NaturalVideo, CameraJitter, PreviousStep, partial(StreamIndex, 1)],
)
def test_transforms_pass_on_a_gpu(make):
    checks.check_devices(Case(make_transform=make))
