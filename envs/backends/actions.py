"""From an agent's action to a simulator's."""

from __future__ import annotations

import numpy as np

UNLIMITED = 1e9  # a wider range than this means that the simulator sets no limit


class ActionScale:
    """Clips an action to [-1, 1] and stretches it to the bounds of a task.

    Equation: a' = centre + half * clip(a, -1, 1). Components without a limit are clipped only.

    Args:
        low: `[A]` lower bounds of the task.
        high: `[A]` upper bounds of the task.
    """

    def __init__(self, low: np.ndarray, high: np.ndarray):
        limited = np.abs(low) + np.abs(high) < UNLIMITED
        low, high = np.where(limited, low, -1.0), np.where(limited, high, 1.0)
        self.centre = (low + high) / 2  # [A]
        self.half = (high - low) / 2  # [A]

    @property
    def bounds(self) -> tuple[list[float], list[float]]:
        """What -1 and 1 become, `[A]` each."""
        return (self.centre - self.half).tolist(), (self.centre + self.half).tolist()

    def __call__(self, action: np.ndarray) -> np.ndarray:
        return self.centre + self.half * action.clip(-1.0, 1.0)  # [A]
