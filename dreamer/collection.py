"""Collection: environments and policy into a TorchRL collector. Frames become agent steps here and nowhere else."""

import copy
import json
import multiprocessing
import os
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.collectors import BaseCollector, Collector, MultiAsyncCollector, MultiSyncCollector
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase, SerialEnv, TensorDictPrimer, TransformedEnv

from dreamer.replay import SequenceReplay
from envs import make_env
from envs.make import SeededTransformedEnv
from envs.transforms import FiniteGuard

if TYPE_CHECKING:
    from dreamer.trainer import Trainer

MODES = ("sync", "multi_sync", "multi_async")
HANDLED_BY_THE_LEARNER = (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # a terminal sends them to the workers as well


def to_steps(frames: int, frame_skip: int) -> int:
    """Agent steps in ``frames`` simulator frames, rounded up."""
    return -(-frames // frame_skip)


def count_streams(mode: str, num_collectors: int, envs_per_collector: int) -> int:
    """Environments of a run, each a stream of records."""
    return count_workers(mode, num_collectors) * envs_per_collector


def count_records(config: Mapping[str, Any]) -> int:
    """Records that the replay of a run reserves: no more than the run can fill, but what it cannot do without.

    That is two windows in every ring, and twice what a batch can hold, which is two records for each step of episodes
    of one step. A ``replay_buffer.size`` of None asks for no more than that.
    """
    replay, collection = config["replay_buffer"], config["collector"]
    streams = count_streams(*(collection[key] for key in ("mode", "num_collectors", "envs_per_collector")))
    frame_skip, batch = config["env"]["frame_skip"], collection["frames_per_batch"]
    most = to_steps(collection["total_frames"] + batch, frame_skip)
    least = max(2 * streams * (replay["sequence_length"] + 1), 4 * to_steps(batch, frame_skip))
    size = least if replay["size"] is None else min(replay["size"], max(most, least))
    return size // streams * streams


def count_windows(replay: Mapping[str, Any]) -> int:
    """Windows per update, from ``replay_buffer.batch_size`` in the unit that the settings name.

    Raises:
        ValueError: for an unknown unit, or steps that are no whole number of windows.
    """
    unit, size, length = (replay[key] for key in ("batch_unit", "batch_size", "sequence_length"))
    if unit not in ("windows", "steps"):
        raise ValueError(f"replay_buffer.batch_unit={unit!r}: choose one of ('windows', 'steps')")
    if unit == "windows":
        return size
    if size < length or size % length:
        raise ValueError(
            f"replay_buffer.batch_size={size}: counts steps (replay_buffer.batch_unit=steps), give a multiple of "
            f"replay_buffer.sequence_length={length}"
        )
    return size // length


def count_workers(mode: str, num_collectors: int) -> int:
    """Processes that collect; one with ``sync``."""
    return 1 if mode == "sync" else num_collectors


def end_with_parent() -> None:
    """Wait until the parent process is gone, and end this one."""
    multiprocessing.parent_process().join()
    os._exit(1)


def seed_everything(seed: int) -> None:
    """Seed the global generators of this process.

    Nothing of ours draws from those of Python and NumPy, but environments of users may.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def derive_seed(*parts: int) -> int:
    """A seed of its own for every combination of ``parts``, the same in every process."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@dataclass
class EnvFactory:
    """Makes the environments of one collector worker. A picklable function without arguments.

    Args:
        env: Keyword arguments of :func:`envs.make_env`, without seed and stream.
        streams: Numbers of the streams that this worker writes.
        seed: Seed of the run; every stream derives its own.
        primers: Recurrent state that the environments carry.
        worker: This is for a process of its own: seed its global generator too, for the policy's samples, and leave
            the signals that end a run to the learner.
        guard: What to do about rewards and observations that are not finite; None for nothing.
    """

    env: Mapping[str, Any]
    streams: range
    seed: int
    primers: TensorDictPrimer | None
    worker: bool = False
    guard: FiniteGuard | None = None

    def __call__(self) -> EnvBase:
        if self.worker:
            seed_everything(derive_seed(self.seed, self.streams.start, 1))
            for number in HANDLED_BY_THE_LEARNER:
                signal.signal(number, signal.SIG_IGN)
            threading.Thread(target=end_with_parent, daemon=True).start()
        makers = [partial(self._make, stream) for stream in self.streams]
        base = makers[0]() if len(makers) == 1 else TransformedEnv(SerialEnv(len(makers), makers))
        if self.primers is not None:
            base.append_transform(self.primers.clone())
        return base

    def _make(self, stream: int) -> EnvBase:
        env = make_env(**self.env, seed=derive_seed(self.seed, stream), stream=stream)
        if self.guard is not None:
            env.append_transform(self.guard.clone())
        return env


class ActingPolicy:
    """The policy as a collector calls it: with random actions at first, and for workers with shared weights.

    The policy also runs while actions are random, so that its latents are recorded. The weights of workers lie in
    shared memory and the learner writes new ones in place: nothing is sent and nobody waits. A step that runs
    meanwhile may see some old and some new weights, which does no harm. This is not an ``nn.Module``, because
    collectors would then empty it, send the weights themselves and wait for every worker to confirm.

    Args:
        policy: The learner's policy.
        action_spec: Of one environment, for the random actions.
        random_steps: Steps with random actions, per process.
        explore: What draws them; None for uniform ones.
        shared: Work on a copy in shared memory on the CPU, for worker processes.
    """

    def __init__(
        self,
        policy: nn.Module,
        action_spec: TensorSpec,
        *,
        random_steps: int,
        shared: bool,
        explore: nn.Module | None = None,
    ):
        self.policy = copy.deepcopy(policy).cpu().requires_grad_(False).share_memory() if shared else policy
        self.action_spec, self.random_steps = action_spec, random_steps
        self.explore = copy.deepcopy(explore).cpu() if shared and explore is not None else explore
        self.clock = torch.zeros(2, dtype=torch.float64).share_memory_()  # [2] seconds and steps, over all workers

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        start = time.perf_counter()
        tensordict = self.policy(tensordict)
        if self.random_steps > 0:
            self.random_steps -= tensordict.numel()
            if self.explore is not None:
                tensordict = self.explore(tensordict)
            else:
                tensordict["action"] = self.action_spec.rand(tensordict.batch_size)
        self.clock += torch.tensor([time.perf_counter() - start, tensordict.numel()], dtype=torch.float64)
        return tensordict

    @torch.no_grad()
    def update(self, policy: nn.Module) -> None:
        """Take over the weights of ``policy``; nothing to do where they are the same."""
        if self.policy is not policy:
            state = policy.state_dict()
            for name, tensor in self.policy.state_dict().items():
                tensor.copy_(state[name])


def divide_batch(frames_per_batch: int, streams: int, frame_skip: int) -> int:
    """Agent steps per batch; every stream must give the same whole number of them."""
    unit = streams * frame_skip
    if frames_per_batch < unit or frames_per_batch % unit:
        raise ValueError(
            f"collector.frames_per_batch={frames_per_batch}: give a multiple of {unit} ({streams} environments, "
            f"{frame_skip} frames per step)"
        )
    return frames_per_batch // frame_skip


def make_collector(
    *,
    mode: str,
    env: Mapping[str, Any],
    policy: nn.Module,
    action_spec: TensorSpec,
    primers: TensorDictPrimer | None,
    to_records: Callable[[TensorDictBase], TensorDictBase],
    replay: SequenceReplay,
    frame_skip: int,
    num_collectors: int,
    envs_per_collector: int,
    frames_per_batch: int,
    init_random_frames: int,
    seed: int,
    guard: FiniteGuard | None = None,
    explore: nn.Module | None = None,
) -> BaseCollector:
    """Build the collector of a run.

    Args:
        mode: "sync": in this process. "multi_sync": workers, one batch from each in turn with the learner.
            "multi_async": workers that write into ``replay`` by themselves while the learner learns.
        env: Keyword arguments of :func:`envs.make_env`.
        policy: What acts.
        action_spec: Action spec of one environment.
        primers: Recurrent state of the policy.
        to_records: From collected transitions to records; applied by the workers of "multi_async".
        replay: Where the workers of "multi_async" write.
        frame_skip: Frames per agent step.
        num_collectors: Worker processes; not used by "sync".
        envs_per_collector: Environments of each worker, stepped one after the other with one call of the policy.
        frames_per_batch: Frames per batch, over all workers.
        init_random_frames: Frames collected with random actions at the start.
        seed: Seed of the run.
        guard: See :class:`EnvFactory`.
        explore: See :class:`ActingPolicy`.

    Raises:
        ValueError: for an unknown mode, or counts that do not fit together.
    """
    if mode not in MODES:
        raise ValueError(f"collector.mode={mode!r}: choose one of {MODES}")
    workers = count_workers(mode, num_collectors)
    steps_per_batch = divide_batch(frames_per_batch, workers * envs_per_collector, frame_skip)
    firsts = range(0, workers * envs_per_collector, envs_per_collector)  # first stream of each worker
    factories = [
        EnvFactory(env, range(first, first + envs_per_collector), seed, primers, mode != "sync", guard)
        for first in firsts
    ]
    random_steps = to_steps(init_random_frames, frame_skip) // workers
    acting = ActingPolicy(policy, action_spec, random_steps=random_steps, shared=mode != "sync", explore=explore)
    common = {
        "total_frames": -1,  # the trainer knows when to stop
        "trust_policy": True,
        "auto_register_policy_transforms": False,
    }
    if mode == "sync":
        return Collector(
            factories[0],
            acting,
            frames_per_batch=steps_per_batch,
            policy_device=next(policy.parameters()).device,
            env_device="cpu",
            storing_device="cpu",
            **common,
        )
    if mode == "multi_sync":
        return MultiSyncCollector(factories, acting, frames_per_batch=steps_per_batch, cat_results="stack", **common)
    replay.share()
    return MultiAsyncCollector(
        factories,
        acting,
        frames_per_batch=steps_per_batch // workers,
        replay_buffer=replay,
        postproc=to_records,
        **common,
    )


class CollectorState:
    """Where the environments of a collector in this process are, as checkpoint state.

    Workers in processes of their own are not asked: after a resume they begin new episodes.

    Args:
        trainer: Its collector is meant.
        setting: What the environments were made from; a state of other ones is not taken over.
    """

    def __init__(self, trainer: "Trainer", setting: Mapping[str, Any]):
        self.trainer, self.setting = trainer, json.dumps(setting, sort_keys=True, default=str)
        self.restored = False

    def state_dict(self) -> dict[str, Any]:
        collector = self.trainer.collector
        if not isinstance(collector, Collector) or self.trainer.turns.collecting:
            return {"setting": self.setting, "envs": []}
        return {
            "setting": self.setting,
            "envs": [env.episode_state() for env in environments(collector.env)],
            "carrier": collector._carrier.exclude("collector", "next").to_dict(),
            "random_steps": collector.policy.random_steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put every environment where it was, if that is possible; ``restored`` tells whether it was."""
        collector, states = self.trainer.collector, state_dict["envs"]
        if not isinstance(collector, Collector) or state_dict["setting"] != self.setting or not states:
            return
        try:
            for env, state in zip(environments(collector.env), states, strict=True):
                env.restore_episode(state)
        except (RuntimeError, FloatingPointError) as error:
            warnings.warn(f"episodes begin anew: {error}", stacklevel=2)
            collector.reset()
            return
        collector._carrier.update(TensorDict(state_dict["carrier"], collector.env.batch_size))
        collector.policy.random_steps = state_dict["random_steps"]
        self.restored = True


def environments(env: EnvBase) -> list[SeededTransformedEnv]:
    """The single environments of what :class:`EnvFactory` made."""
    return [env] if isinstance(env, SeededTransformedEnv) else env.base_env._envs
