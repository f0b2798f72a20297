"""The benchmark suite: 27 dm_control tasks and RLBench's `reach_target`, with their settings and groups.

Source: the benchmark of World2Filter (https://github.com/ChristianLin0420/World2Filter), which has the groups and 23 of
    the dm_control tasks. It announces ten control tasks and names six: `acrobot_swingup_sparse`,
    `cartpole_two_poles`, `cartpole_three_poles` and `point_mass_easy` make them ten, and the suite 27.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from envs.choices import check_choice
from envs.tasks import default_camera, task_prompt


class SuiteTask(NamedTuple):
    """One task of the suite.

    Args:
        id: name of the task, domain and task joined ("cheetah_run").
        domain: `name` for `envs.make_env`.
        task: `task` for `envs.make_env`.
        camera: index or name of the camera that draws the observations.
        prompt: what belongs to the foreground, in words; one concept or several with " . " between them.
        groups: names of the groups that the task is in.
        frame_skip: frames per agent step (the action repeat).
        reward_range: least and greatest reward of one frame; that of an agent step is `frame_skip` times as wide.
        backend: `backend` for `envs.make_env`.
        missing: what there must be before the task can run; empty if nothing is missing.
    """

    id: str
    domain: str
    task: str
    camera: int | str
    prompt: str
    groups: tuple[str, ...]
    frame_skip: int = 2
    reward_range: tuple[float, float] = (0.0, 1.0)
    backend: str = "dmc"
    missing: str = ""


# Domain -> family, tasks.
_DOMAINS: dict[str, tuple[str, tuple[str, ...]]] = {
    "walker": ("locomotion", ("stand", "walk", "run")),
    "cheetah": ("locomotion", ("run",)),
    "hopper": ("locomotion", ("stand", "hop")),
    "humanoid": ("locomotion", ("stand", "walk", "run")),
    "quadruped": ("locomotion", ("walk", "run")),
    "reacher": ("manipulation", ("easy", "hard")),
    "finger": ("manipulation", ("spin", "turn_easy", "turn_hard")),
    "ball_in_cup": ("manipulation", ("catch",)),
    "cartpole": ("control", ("balance", "balance_sparse", "swingup", "swingup_sparse", "two_poles", "three_poles")),
    "acrobot": ("control", ("swingup", "swingup_sparse")),
    "pendulum": ("control", ("swingup",)),
    "point_mass": ("control", ("easy",)),
}

# Three tasks of each difficulty; the other tasks have none.
_DIFFICULTY = {
    "cartpole_swingup": "easy",
    "reacher_easy": "easy",
    "finger_spin": "easy",
    "walker_walk": "medium",
    "cheetah_run": "medium",
    "hopper_stand": "medium",
    "walker_run": "hard",
    "humanoid_walk": "hard",
    "quadruped_run": "hard",
}

_REACH_TARGET = SuiteTask(
    id="reach_target",
    domain="rlbench",
    task="reach_target",
    camera="front",
    prompt="robot arm . ball",
    groups=("rlbench", "all"),
    reward_range=(0.0, 1.0),
    backend="rlbench",
    missing="the backend `rlbench`, with CoppeliaSim 4.1, PyRep and RLBench; no version of this package has it yet",
)


def _make_row(domain: str, task: str) -> SuiteTask:
    family, _ = _DOMAINS[domain]
    name = f"{domain}_{task}"
    difficulty = (_DIFFICULTY[name],) if name in _DIFFICULTY else ()
    groups = (*difficulty, family, "dmc27", "all")
    return SuiteTask(name, domain, task, default_camera(domain), task_prompt(domain), groups)


_ROWS = [_make_row(domain, task) for domain, (_, tasks) in _DOMAINS.items() for task in tasks]

TASKS: dict[str, SuiteTask] = {row.id: row for row in [*_ROWS, _REACH_TARGET]}

GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(row.id for row in TASKS.values() if group in row.groups)
    for group in ("easy", "medium", "hard", "locomotion", "manipulation", "control", "rlbench", "dmc27", "all")
}


def select_tasks(names: Iterable[str]) -> list[SuiteTask]:
    """The tasks that are named, directly or by their group, each once and in the order in which they are named.

    A task that cannot run yet is left out of a group; `TASKS[name].missing` says what it lacks.

    Args:
        names: ids of tasks ("cheetah_run") and names of groups ("easy").

    Raises:
        ValueError: a name is unknown, or names a task that cannot run; the message says which names there are or
            what is missing.
    """
    chosen: dict[str, SuiteTask] = {}
    for name in names:
        check_choice("task", name, [*TASKS, *GROUPS])
        if name in TASKS and TASKS[name].missing:
            raise ValueError(f"task={name!r} cannot run: it needs {TASKS[name].missing}")
        ids = GROUPS.get(name, (name,))
        chosen |= {task: TASKS[task] for task in ids if not TASKS[task].missing}
    return list(chosen.values())
