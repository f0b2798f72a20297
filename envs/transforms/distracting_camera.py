"""A camera that wanders in a box around its usual place and keeps looking at the agent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Triple = tuple[float, float, float]

FIXED_MODE = 0  # MuJoCo's mjCAMLIGHT_FIXED
ROOT_BODY = 1  # the first body below the world: what a camera follows
OVERHEAD = 0.3  # radians from the vertical, below which a camera counts as looking down from above


@dataclass(frozen=True)
class CameraRanges:
    """How far and how fast a camera may move; lengths in metres, angles in radians, velocities per frame.

    Args:
        vertical_delta: largest change of the angle to the vertical.
        horizontal_delta: largest change of the angle around the vertical.
        roll_delta: largest roll.
        zoom_in: largest part by which the distance may shrink.
        zoom_out: largest part by which the distance may grow.
        vel_std: standard deviation of the change of velocity, for a camera at distance 4.
        max_vel: largest speed, for a camera at distance 4.
        roll_vel_std: standard deviation of the change of the roll velocity.
        max_roll_vel: largest roll velocity.
    """

    vertical_delta: float
    horizontal_delta: float
    roll_delta: float
    zoom_in: float
    zoom_out: float
    vel_std: float
    max_vel: float
    roll_vel_std: float
    max_roll_vel: float


def camera_ranges(scale: float, dynamic: bool) -> CameraRanges:
    """The ranges of the Distracting Control Suite at a scale in [0, 1]; a camera that is not dynamic has no velocity.

    Source: Stone et al. 2021, "The Distracting Control Suite", and google-research/distracting_control.
    """
    moving = scale if dynamic else 0.0
    return CameraRanges(
        vertical_delta=math.pi / 2 * scale,
        horizontal_delta=math.pi / 2 * scale,
        roll_delta=math.pi / 2 * scale,
        zoom_in=0.5 * scale,
        zoom_out=1.5 * scale,
        vel_std=0.1 * moving,
        max_vel=0.4 * moving,
        roll_vel_std=math.pi / 300 * moving,
        max_roll_vel=math.pi / 50 * moving,
    )


def to_sphere(point: Sequence[float]) -> Triple:
    """Distance, angle around the vertical and angle to the vertical of a point."""
    x, y, z = (float(value) for value in point)
    return math.sqrt(x * x + y * y + z * z), math.atan2(y, x), math.atan2(math.hypot(x, y), z)


def to_point(sphere: Sequence[float]) -> Triple:
    """The inverse of `to_sphere`; the angle to the vertical may be negative, which is the other side."""
    radius, around, vertical = sphere
    across = radius * math.sin(vertical)
    return across * math.cos(around), across * math.sin(around), radius * math.cos(vertical)


def nearest_sphere(sphere: Sequence[float], last: Sequence[float]) -> Triple:
    """Of the coordinates of one point, those nearest to the ones before: angles do not jump at the vertical."""
    radius, around, vertical = sphere
    turn = 2 * math.pi

    def unwrapped(angle: float, side: float) -> Triple:
        return radius, angle - turn * round((angle - last[1]) / turn), side

    here, there = unwrapped(around, vertical), unwrapped(around + math.pi, -vertical)
    far = [abs(choice[1] - last[1]) + abs(choice[2] - last[2]) for choice in (here, there)]
    return here if far[0] <= far[1] else there


def clip(value: float, low: float, high: float) -> float:
    """The nearest number in [low, high]; NumPy's takes longer than the whole step of a walk."""
    return min(max(value, low), high)


def look_along(direction: np.ndarray, overhead: bool) -> np.ndarray:
    """The axes of a camera that looks along a unit vector, as columns `[3, 3]`: right, up, backwards.

    Args:
        direction: `[3]`, unit length.
        overhead: turn a camera that looks down as little as needed, rather than keep the horizon level. A level
            horizon makes no sense around the vertical.
    """
    x, y, z = (float(value) for value in direction)
    across = math.hypot(x, y)
    if overhead:  # Rodrigues: turn (0, 0, -1) around the level axis (y, -x, 0)
        share = 1.0 / max(1.0 - z, 1e-9)
        return np.array([[1 - x * x * share, -x * y * share, -x], [-x * y * share, 1 - y * y * share, -y], [x, y, -z]])
    a, b = (y / across, -x / across) if across > 1e-9 else (1.0, 0.0)
    return np.array([[a, b * z, -x], [b, -a * z, -y], [0.0, a * y - b * x, -z]])


def roll(angle: float) -> np.ndarray:
    """The rotation `[3, 3]` of a camera around its own viewing axis."""
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])


class CameraWalk:
    """One camera of a simulator on a random walk.

    It lives on a sphere around the world's origin (a fixed camera) or around the agent's centre of mass (one that
    follows the agent), and looks at the point that the camera in its usual place looks at. Only poses that MuJoCo
    derives from the state and that nothing but drawing reads are written: `data.cam_xpos` and `data.cam_xmat`.

    Args:
        ranges: how far and how fast it moves.
    """

    def __init__(self, ranges: CameraRanges):
        self.ranges = ranges
        self.low = self.high = self.sphere = (0.0, 0.0, 0.0)  # distance, angle around the vertical, angle to it
        self.velocity = (0.0, 0.0, 0.0)  # metres per frame
        self.roll = self.roll_velocity = 0.0
        self.overhead = False

    def start(self, physics: Any, camera: int, generator: np.random.Generator) -> None:
        """Draws where the camera is in this episode.

        Args:
            physics: simulator at the start of an episode, with the camera in its usual place.
            camera: index of the camera.
            generator: random numbers.
        """
        model, data, ranges = physics.model, physics.data, self.ranges
        self._camera = camera
        self._follows = model.cam_mode[camera] != FIXED_MODE or model.cam_bodyid[camera] != 0
        self._fixed_target = self._usual_target(physics)
        centre = data.subtree_com[ROOT_BODY] if self._follows else np.zeros(3)
        usual = to_sphere(data.cam_xpos[camera] - centre)
        self._set_box(usual)
        self._speed = usual[0] / 4
        self.sphere = tuple(generator.uniform(self.low, self.high).tolist())
        self.roll = generator.uniform(-ranges.roll_delta, ranges.roll_delta)
        direction = generator.standard_normal(3)
        direction *= generator.uniform(0.0, ranges.max_vel * self._speed) / np.linalg.norm(direction)
        self.velocity = tuple(direction.tolist())
        self.roll_velocity = generator.uniform(-ranges.max_roll_vel, ranges.max_roll_vel)

    def _set_box(self, usual: Triple) -> None:
        ranges = self.ranges
        radius, around, vertical = usual
        self.overhead = vertical < OVERHEAD
        low = [radius * (1 - ranges.zoom_in), around - ranges.horizontal_delta, vertical - ranges.vertical_delta]
        high = [radius * (1 + ranges.zoom_out), around + ranges.horizontal_delta, vertical + ranges.vertical_delta]
        if not self.overhead:  # in front of the scene and above the ground
            low[2], high[2] = max(low[2], 0.0), max(min(high[2], math.pi / 2), low[2])
            if around <= 0.0:
                low[1], high[1] = max(low[1], -math.pi), min(high[1], 0.0)
        self.low, self.high = tuple(low), tuple(high)

    def advance(self, generator: np.random.Generator) -> None:
        """Moves on by one frame; draws nothing where nothing moves."""
        ranges = self.ranges
        if ranges.max_vel == 0.0:
            return
        *push, twist = generator.standard_normal(4).tolist()
        reach = ranges.vel_std * self._speed
        velocity = [old + reach * new for old, new in zip(self.velocity, push, strict=True)]
        speed, limit = math.hypot(*velocity), ranges.max_vel * self._speed
        slower = limit / speed if speed > limit else 1.0
        here = to_point(self.sphere)
        aim = to_sphere([place + slower * move for place, move in zip(here, velocity, strict=True)])
        aim = nearest_sphere(aim, self.sphere)
        self.sphere = tuple(clip(*values) for values in zip(aim, self.low, self.high, strict=True))
        self.velocity = tuple(new - old for new, old in zip(to_point(self.sphere), here, strict=True))
        turn = clip(self.roll_velocity + twist * ranges.roll_vel_std, -ranges.max_roll_vel, ranges.max_roll_vel)
        rolled = clip(self.roll + turn, -ranges.roll_delta, ranges.roll_delta)
        self.roll, self.roll_velocity = rolled, rolled - self.roll

    def apply(self, physics: Any) -> None:
        """Puts the camera of a simulator where the walk is, once after each step of the simulator."""
        data = physics.data
        position, target = np.array(to_point(self.sphere)), self._fixed_target
        if self._follows:
            position = position + data.subtree_com[ROOT_BODY]
            target = self._usual_target(physics)
        direction = target - position
        axes = look_along(direction / max(float(np.linalg.norm(direction)), 1e-9), self.overhead)
        data.cam_xpos[self._camera] = position
        data.cam_xmat[self._camera] = (axes @ roll(self.roll)).ravel()

    def _usual_target(self, physics: Any) -> np.ndarray:
        """What the camera looks at in its usual place: the point on its axis that is as far away as the agent."""
        place = physics.data.cam_xpos[self._camera]
        backwards = physics.data.cam_xmat[self._camera].reshape(3, 3)[:, 2]
        distance = np.linalg.norm(place - physics.data.subtree_com[ROOT_BODY])
        return place - distance * backwards  # [3]
