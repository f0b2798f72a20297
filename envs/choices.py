"""Error messages for names that users choose: what was asked for, what there is, what was probably meant."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches


def nearest(value: str, choices: Collection[str]) -> str:
    """A hint at the names that are spelt like this one, or nothing."""
    near = get_close_matches(str(value), list(choices), n=3, cutoff=0.65)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def check_choice(label: str, value: str, choices: Collection[str]) -> None:
    """Checks that a name is one of the known ones.

    Args:
        label: what is chosen, e.g. "backend".
        value: the name that was asked for.
        choices: the names that exist.

    Raises:
        ValueError: the name is unknown; the message lists the choices and hints at the nearest.
    """
    if value not in choices:
        listing = ", ".join(sorted(choices))
        raise ValueError(f"{label}={value!r}: choose one of {listing}{nearest(value, choices)}")


def choose_task(name: str, task: str | None, tasks: Mapping[str, Collection[str]]) -> str:
    """The task to run: the one asked for, or the only one that there is.

    Args:
        name: name of an environment (in dm_control, a domain).
        task: name of a task, or None for an environment that has only one.
        tasks: the tasks of each environment.

    Raises:
        ValueError: the environment or the task is unknown, or no task was chosen among several.
    """
    check_choice("name", name, tasks)
    if task is None and len(tasks[name]) == 1:
        return next(iter(tasks[name]))
    if task is None:
        raise ValueError(f"task=None: name={name!r} has several, choose one of {', '.join(sorted(tasks[name]))}")
    check_choice("task", task, tasks[name])
    return task


def check_positive(label: str, value: int) -> None:
    """Checks that a count is a whole number of at least 1.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{label}={value!r}: give a whole number of at least 1")
