"""Collection with TorchRL's own environments, transforms, replay and DreamerV3 policy: bench_collectors' other side.

What is usual, not what could be built: `DMControlWrapper` draws the frames that are skipped as well, and transforms
pass each step on from one to the next.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torchrl_dreamer
from dm_control import suite
from tensordict import TensorDictBase
from torchrl.collectors import BaseCollector, Collector, MultiAsyncCollector, MultiSyncCollector
from torchrl.data import LazyMemmapStorage, ReplayBuffer
from torchrl.envs import (
    CatTensors,
    Compose,
    DMControlEnv,
    DMControlWrapper,
    DoubleToFloat,
    EnvBase,
    InitTracker,
    PermuteTransform,
    TensorDictPrimer,
    TransformedEnv,
)

CAMERA = 0
STORED = ("action", "is_init", "state", "belief", ("next", "pixels"), ("next", "observation"))
STORED += (("next", "reward"), ("next", "done"), ("next", "terminated"))


def make_env(env: Mapping[str, Any], primer: TensorDictPrimer | None) -> EnvBase:
    """A task of dm_control with the usual transforms.

    Args:
        env: The keys of `configs/env/dmc.yaml`.
        primer: Recurrent state of the policy.
    """
    if env["from_pixels"]:
        image = {"height": env["image_size"], "width": env["image_size"], "camera_id": CAMERA}
        task = suite.load(env["name"], env["task"])
        base = DMControlWrapper(
            task, from_pixels=True, pixels_only=True, frame_skip=env["frame_skip"], render_kwargs=image
        )
        transform = PermuteTransform((-1, -3, -2), in_keys=["pixels"])
    else:
        base = DMControlEnv(env["name"], env["task"], frame_skip=env["frame_skip"])
        observed = sorted(set(base.observation_spec.keys()) - set(base.full_done_spec.keys()))
        transform = CatTensors(observed, "observation")
    primers = [] if primer is None else [primer]
    return TransformedEnv(base, Compose(transform, DoubleToFloat(), InitTracker(), *primers))


def keep_stored(batch: TensorDictBase) -> TensorDictBase:
    """Drop what training does not store, such as intermediate results of the policy."""
    return batch.select(*STORED, strict=False)


def make_collector(
    mode: str,
    *,
    env: Mapping[str, Any],
    size: Mapping[str, int] | None,
    workers: int,
    steps_per_batch: int,
    capacity: int,
    folder: str,
) -> tuple[BaseCollector, ReplayBuffer]:
    """Build collector and replay; the workers of "multi_async" write by themselves once the collector is started.

    Args:
        mode: "sync", "multi_sync" or "multi_async", as for :func:`dreamer.collection.make_collector`.
        env: See :func:`make_env`.
        size: Size preset of the recurrent policy; None for random actions.
        workers: Worker processes.
        steps_per_batch: Agent steps per batch, over all workers.
        capacity: Records of the replay.
        folder: Where the replay keeps its files: of TorchRL's storages, the fastest that processes can share.
    """
    policy = primer = None
    if size is not None:
        probe = make_env(env, None)
        key = "pixels" if env["from_pixels"] else "observation"
        action_size = probe.action_spec.shape[-1]
        parts = torchrl_dreamer.make_acting_parts(size, tuple(probe.observation_spec[key].shape), action_size)
        policy = torchrl_dreamer.make_policy(parts, key).requires_grad_(False)
        primer = torchrl_dreamer.make_primer(size, action_size)
        probe.close()
    factories = [partial(make_env, env, primer)] * workers
    replay = ReplayBuffer(storage=LazyMemmapStorage(capacity, scratch_dir=folder), shared=mode == "multi_async")
    common = {"total_frames": -1, "auto_register_policy_transforms": False}
    if mode == "sync":
        return Collector(factories[0], policy, frames_per_batch=steps_per_batch, **common), replay
    if mode == "multi_sync":
        kind, writing = MultiSyncCollector, {"frames_per_batch": steps_per_batch, "cat_results": "stack"}
    else:
        kind, writing = MultiAsyncCollector, {"frames_per_batch": steps_per_batch // workers, "postproc": keep_stored}
        writing["replay_buffer"] = replay
    return kind(factories, policy, **writing, **common), replay
