"""CarRacing as it draws itself, several times faster: when it is looked at, and only what is in sight."""

from __future__ import annotations

from typing import Any

import numpy as np

MARGIN = 3  # pixels around the canvas: coordinates are cut towards zero, and outlines are smoothed


class CarRacingView:
    """Draws the observation of CarRacing only when it is asked for, without the parts of the track that are not seen.

    The environment draws every frame that it simulates: 400 patches of grass and about 300 pieces of road, most of
    them outside of the picture. Once it has this view, the observations of its steps are blank, and `draw` gives the
    one of its current state, equal in every pixel to its own.

    Args:
        env: `gymnasium.envs.box2d.car_racing.CarRacing`, without wrappers.
    """

    def __init__(self, env: Any):
        from gymnasium.envs.box2d import car_racing

        self.env, self.module, self._render = env, car_racing, type(env)._render
        self._score = 0.0
        self._canvas = np.array([car_racing.WINDOW_W, car_racing.WINDOW_H], dtype=np.float64)
        size, cells = car_racing.GRASS_DIM, range(-20, 20, 2)
        corners = ((1, 0), (0, 0), (0, 1), (1, 1))
        self._grass = [[(size * (x + i), size * (y + j)) for i, j in corners] for x in cells for y in cells]
        self._track: list = []  # (polygon, colour)
        self._corners = np.zeros((4, 0, 2))  # of grass and road
        env._render, env._render_road = self._wait, self._draw_road

    def draw(self) -> np.ndarray:
        """The observation of the current state, uint8 `[96, 96, 3]`."""
        reward, self.env.reward = self.env.reward, self._score
        image = self._render(self.env, "state_pixels")
        self.env.reward = reward
        return image

    def _wait(self, mode: str) -> Any:
        if mode != "state_pixels":
            return self._render(self.env, mode)
        self._score = self.env.reward  # that it shows; the cost of time comes off after the image is drawn
        return np.zeros((self.module.STATE_H, self.module.STATE_W, 3), dtype=np.uint8)

    def _draw_road(self, zoom: float, translation: tuple[float, float], angle: float) -> None:
        """Takes the place of the method of that name; which polygons are left out is all that differs."""
        env, side = self.env, self.module.PLAYFIELD
        if env.road_poly is not self._track:  # a new episode
            self._track = env.road_poly
            polygons = self._grass + [polygon for polygon, _ in self._track]
            self._corners = np.ascontiguousarray(np.array(polygons).swapaxes(0, 1))  # [4, n, 2]
        field = [(side, side), (side, -side), (-side, -side), (-side, side)]
        env._draw_colored_polygon(env.surf, field, env.bg_color, zoom, translation, angle, clip=False)
        cos, sin = np.cos(angle), np.sin(angle)
        rotation = np.array([[cos, sin], [-sin, cos]])
        placed = self._corners @ (rotation * zoom) + np.array(translation)  # [4, n, 2], pixels
        seen = (placed.max(0) >= -MARGIN) & (placed.min(0) <= self._canvas + MARGIN)  # [n, 2]
        for index in seen.all(-1).nonzero()[0].tolist():
            road = index - len(self._grass)
            polygon, color = (self._grass[index], env.grass_color) if road < 0 else self._track[road]
            env._draw_colored_polygon(
                env.surf, polygon, [int(value) for value in color], zoom, translation, angle, clip=False
            )
