"""Collection: environments and policy into a TorchRL collector. Frames become agent steps here and nowhere else."""

import copy
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.collectors import BaseCollector, Collector, MultiAsyncCollector, MultiSyncCollector
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase, SerialEnv, TensorDictPrimer, TransformedEnv

from dreamer.replay import SequenceReplay
from envs import make_env

MODES = ("sync", "multi_sync", "multi_async")


def to_steps(frames: int, frame_skip: int) -> int:
    """Agent steps in ``frames`` simulator frames, rounded up."""
    return -(-frames // frame_skip)


def count_streams(mode: str, num_collectors: int, envs_per_collector: int) -> int:
    """Environments of a run, each a stream of records."""
    return count_workers(mode, num_collectors) * envs_per_collector


def count_workers(mode: str, num_collectors: int) -> int:
    return 1 if mode == "sync" else num_collectors


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
        seeds_process: Seed the global generator of the worker process as well, for the policy's samples.
    """

    env: Mapping[str, Any]
    streams: range
    seed: int
    primers: TensorDictPrimer | None
    seeds_process: bool = False

    def __call__(self) -> EnvBase:
        if self.seeds_process:
            torch.manual_seed(derive_seed(self.seed, self.streams.start, 1))
        makers = [
            partial(make_env, **self.env, seed=derive_seed(self.seed, stream), stream=stream) for stream in self.streams
        ]
        base = makers[0]() if len(makers) == 1 else TransformedEnv(SerialEnv(len(makers), makers))
        if self.primers is not None:
            base.append_transform(self.primers.clone())
        return base


class ActingPolicy:
    """The policy as a collector calls it: with random actions at first, and for workers with shared weights.

    The policy also runs while actions are random, so that its latents are recorded. The weights of workers lie in
    shared memory and the learner writes new ones in place: nothing is sent and nobody waits. A step that runs
    meanwhile may see some old and some new weights, which does no harm. This is not an ``nn.Module``, because
    collectors would then empty it, send the weights themselves and wait for every worker to confirm.

    Args:
        policy: The learner's policy.
        action_spec: Of one environment, for the random actions.
        random_steps: Steps with uniformly random actions, per process.
        shared: Work on a copy in shared memory on the CPU, for worker processes.
    """

    def __init__(self, policy: nn.Module, action_spec: TensorSpec, *, random_steps: int, shared: bool):
        self.policy = copy.deepcopy(policy).cpu().requires_grad_(False).share_memory() if shared else policy
        self.action_spec, self.random_steps = action_spec, random_steps

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        tensordict = self.policy(tensordict)
        if self.random_steps > 0:
            self.random_steps -= tensordict.numel()
            tensordict["action"] = self.action_spec.rand(tensordict.batch_size)
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
        init_random_frames: Frames collected with uniformly random actions at the start.
        seed: Seed of the run.

    Raises:
        ValueError: for an unknown mode, or counts that do not fit together.
    """
    if mode not in MODES:
        raise ValueError(f"collector.mode={mode!r}: choose one of {MODES}")
    workers = count_workers(mode, num_collectors)
    steps_per_batch = divide_batch(frames_per_batch, workers * envs_per_collector, frame_skip)
    factories = [
        EnvFactory(env, range(i * envs_per_collector, (i + 1) * envs_per_collector), seed, primers, mode != "sync")
        for i in range(workers)
    ]
    acting = ActingPolicy(
        policy,
        action_spec,
        random_steps=to_steps(init_random_frames, frame_skip) // workers,
        shared=mode != "sync",
    )
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


class Watchdog:
    """Notices collector workers that died or stopped, so that a run ends with an error instead of hanging.

    Args:
        collector: Its workers are watched, if it has any.
        replay: Where they write, to see whether they get on.
        timeout: Seconds without progress after which a worker counts as stuck.
    """

    def __init__(self, collector: BaseCollector, replay: SequenceReplay, timeout: float):
        self.workers = list(getattr(collector, "procs", ()))
        self.replay, self.timeout = replay, timeout
        self.counts = replay.stream_counts
        self.last_progress = np.full(len(self.counts), time.monotonic())

    def check(self) -> None:
        """Look at free-running workers; to be called often.

        Raises:
            RuntimeError: if a worker is dead, or has written nothing for ``timeout`` seconds although it may.
        """
        self._raise_if_dead()
        now, counts = time.monotonic(), self.replay.stream_counts
        waiting = counts >= self.replay.write_limit  # for the learner
        self.last_progress[(counts != self.counts) | waiting] = now
        self.counts = counts
        stuck = np.flatnonzero(now - self.last_progress > self.timeout)
        if len(stuck):
            worker = int(stuck[0]) * len(self.workers) // len(counts)
            description = self._describe(worker)
            self.kill()
            raise RuntimeError(f"collector {description} wrote nothing for {self.timeout:g} s: {self._advice()}")

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Guard a call that waits for the workers: after ``timeout`` seconds they are killed and the call ends.

        Raises:
            RuntimeError: if that was necessary, or a worker is dead.
        """
        expired: list[str] = []

        def expire() -> None:
            expired.extend(self._describe(i) for i in range(len(self.workers)))
            self.kill()

        timer = threading.Timer(self.timeout, expire) if self.workers else None
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            yield
        except RuntimeError as error:
            if expired:
                states = ", ".join(expired)
                raise RuntimeError(
                    f"no batch for {self.timeout:g} s from collector {states}: {self._advice()}"
                ) from error
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def kill(self) -> None:
        """End every worker at once, also one that is stopped and would not answer a request."""
        for process in self.workers:
            if process.is_alive():
                process.kill()

    def _raise_if_dead(self) -> None:
        for index, process in enumerate(self.workers):
            if not process.is_alive():
                raise RuntimeError(
                    f"collector worker {index} (pid {process.pid}) died with exit code {process.exitcode}"
                    f"{signal_name(process.exitcode)}; its own output says why"
                )

    def _describe(self, index: int) -> str:
        process = self.workers[index]
        try:
            state = psutil.Process(process.pid).status()
        except psutil.Error:
            state = "gone"
        return f"worker {index} (pid {process.pid}, {state})"

    @staticmethod
    def _advice() -> str:
        return "the run ends. If the environment is just slow, raise collector.timeout"


def signal_name(exitcode: int | None) -> str:
    """ " (SIGKILL)" for an exit code of -9, empty for an ordinary one."""
    return f" ({signal.Signals(-exitcode).name})" if exitcode is not None and exitcode < 0 else ""
