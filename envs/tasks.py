"""Facts about the dm_control tasks that the library does not tell."""

from __future__ import annotations

# The camera that pixel benchmarks use, where it is not camera 0.
CAMERAS = {
    "fish": 3,  # fixed, from above: the whole tank with the target
    "quadruped": 2,  # follows the body without turning with it
}

# Rewards per simulator frame by which the published ColorGrid bins them: points and (low, high) intervals. Those of
# cheetah reach no higher than 1.
REWARD_RANGES: dict[tuple[str, str], tuple[float | tuple[float, float], ...]] = {
    ("cheetah", "run"): ((0.0, 10.0),),
    ("hopper", "stand"): (0.0, (0.8, 1.0)),
}
UNBOUNDED_REWARDS = ("lqr",)  # all other domains of the suite reward a frame with 0 to 1

PROMPTS = {  # what belongs to the foreground, in words; " . " between concepts
    "acrobot": "pole . ball",
    "ball_in_cup": "ball . cup",
    "cartpole": "cart . pole",
    "cheetah": "robot",
    "finger": "robot finger . spinner . ball",
    "hopper": "robot",
    "humanoid": "robot",
    "pendulum": "pole",
    "point_mass": "ball . target",
    "quadruped": "robot",
    "reacher": "robot arm . ball",
    "walker": "robot",
}


def default_camera(domain: str) -> int:
    """The index of the camera that shows a dm_control domain in pixel benchmarks."""
    return CAMERAS.get(domain, 0)


def task_prompt(domain: str) -> str:
    """What belongs to the foreground of a dm_control domain, in words, " . " between concepts; empty if unknown."""
    return PROMPTS.get(domain, "")


def reward_range(domain: str, task: str) -> tuple[float | tuple[float, float], ...] | None:
    """The rewards of a simulator frame of a dm_control task, as points and (low, high) intervals; None if unknown."""
    if domain in UNBOUNDED_REWARDS:
        return None
    return REWARD_RANGES.get((domain, task), ((0.0, 1.0),))
