"""The table of benchmark tasks: complete, consistent with dm_control, and its groups are those of the protocol."""

from pathlib import Path

import pytest

from envs import make_env
from envs.suite import GROUPS, TASKS, select_tasks


def ids(*names: str) -> list[str]:
    return [task.id for task in select_tasks(names)]


def test_counts():
    assert {group: len(tasks) for group, tasks in GROUPS.items()} == {
        "easy": 3,
        "medium": 3,
        "hard": 3,
        "locomotion": 11,
        "manipulation": 6,
        "control": 10,
        "rlbench": 1,
        "dmc27": 27,
        "all": 28,
    }


def test_groups_are_those_of_the_protocol():
    assert set(GROUPS["easy"]) == {"cartpole_swingup", "reacher_easy", "finger_spin"}
    assert set(GROUPS["medium"]) == {"walker_walk", "cheetah_run", "hopper_stand"}
    assert set(GROUPS["hard"]) == {"walker_run", "humanoid_walk", "quadruped_run"}
    assert set(GROUPS["manipulation"]) == {
        "reacher_easy",
        "reacher_hard",
        "finger_spin",
        "finger_turn_easy",
        "finger_turn_hard",
        "ball_in_cup_catch",
    }


def test_families_partition_the_dm_control_tasks():
    families = [GROUPS[name] for name in ("locomotion", "manipulation", "control")]
    joined = [task for family in families for task in family]
    assert len(joined) == len(set(joined)) and set(joined) == set(GROUPS["dmc27"])


def test_rows_are_consistent():
    assert not set(TASKS) & set(GROUPS)
    for name, row in TASKS.items():
        assert row.id == name and row.prompt and row.reward_range == (0.0, 1.0) and row.frame_skip == 2
        assert all(concept and concept == concept.strip() for concept in row.prompt.split(" . "))
        assert set(row.groups) <= set(GROUPS)
    assert TASKS["ball_in_cup_catch"].domain == "ball_in_cup", "an id is not split at its first underscore"
    assert TASKS["quadruped_run"].camera == 2 and TASKS["cheetah_run"].camera == 0


def test_every_dm_control_task_exists():
    from dm_control import suite

    assert {(TASKS[name].domain, TASKS[name].task) for name in GROUPS["dmc27"]} <= set(suite.ALL_TASKS)


def test_select_keeps_the_order_and_drops_repeats():
    assert ids("walker_run", "medium", "walker_walk") == ["walker_run", "walker_walk", "cheetah_run", "hopper_stand"]


def test_select_names_what_is_missing():
    with pytest.raises(ValueError, match=r"reach_target.*CoppeliaSim"):
        select_tasks(["reach_target"])
    assert ids("all") == ids("dmc27"), "a group holds what can run"


@pytest.mark.parametrize("name", ["cheeta_run", "meduim"])
def test_select_hints_at_the_nearest_name(name):
    with pytest.raises(ValueError, match=r"did you mean (cheetah_run|medium)"):
        select_tasks([name])


@pytest.mark.parametrize("name", GROUPS["dmc27"])
def test_rewards_are_in_their_range(name):
    row = TASKS[name]
    env = make_env(name=row.domain, task=row.task, frame_skip=row.frame_skip, from_pixels=False, seed=1)
    reward = env.rollout(20)["next", "reward"]
    env.close()
    low, high = (bound * row.frame_skip for bound in row.reward_range)
    assert low <= reward.min() and reward.max() <= high


def test_documentation_has_the_table():
    text = (Path(__file__).parents[1] / "docs/benchmark.md").read_text()
    for row in (TASKS[name] for name in GROUPS["dmc27"]):
        groups = ", ".join(group for group in row.groups if group not in ("dmc27", "all"))
        assert f"| `{row.id}` | {groups} | {row.camera} | {row.prompt} |\n" in text
    assert TASKS["reach_target"].missing.split(";")[0] in text
