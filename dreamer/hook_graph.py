"""What runs when, read back from a trainer."""

import inspect
import re
from collections.abc import Callable
from typing import Any

from dreamer.trainer import Trainer

STAGES = (
    ("batch_process", "per batch", "_batch_process_ops"),
    ("pre_steps_log", "per batch", "_pre_steps_log_ops"),
    ("pre_optim_steps", "per batch", "_pre_optim_ops"),
    ("process_optim_batch", "  per update", "_process_optim_batch_ops"),
    ("stepper", "  per update", None),
    ("post_optim_log", "  per update", "_post_optim_log_ops"),
    ("post_steps", "per batch", "_post_steps_ops"),
    ("post_steps_log", "per batch", "_post_steps_log_ops"),
    ("shutdown", "at the end", "_shutdown_ops"),
)


def hook_graph(trainer: Trainer) -> str:
    """Describe what runs when, read back from what is registered with ``trainer``."""
    rows = []
    if trainer.free_running:
        rows += [("in the workers", "postproc", trainer.collector.postproc)]
        rows += [("in the workers", "replay_buffer", trainer.replay_buffer.extend)]
    for stage, when, registered in STAGES:
        hooks = [trainer.optimization_stepper] if registered is None else [op for op, _ in getattr(trainer, registered)]
        rows += [(when, stage, getattr(hook, "__wrapped__", hook)) for hook in hooks]
    return "\n".join(f"{when:<15}{stage:<24}{describe(hook)}".rstrip() for when, stage, hook in rows)


def describe(hook: Callable[..., Any]) -> str:
    """Name of a hook and the first sentence of its documentation."""
    owner = getattr(hook, "__self__", None)
    if inspect.isfunction(hook):
        name = hook.__name__
    elif owner is not None:
        name = f"{type(owner).__name__}.{hook.__name__}"
    else:
        name = type(hook).__name__
    return f"{name:<24}{re.split(r'[.,;:]', inspect.getdoc(hook) or '')[0]}"
