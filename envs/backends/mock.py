"""Tiny deterministic environments whose every number is known in advance, for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, OneHot

from envs.backends.base import BackendEnv
from envs.choices import choose_task

COUNTER = {"discrete": False, "reach": False, "terminates": False}
TASKS = {
    "counter": {
        "continuous": COUNTER,
        "discrete": {**COUNTER, "discrete": True},
        "terminating": {**COUNTER, "terminates": True},
    },
    "reach": {
        "continuous": {**COUNTER, "reach": True},
        "discrete": {**COUNTER, "reach": True, "discrete": True},
    },
}
CHOICES = 4  # values of the discrete action
CONTINUOUS_SIZE = {"counter": 2, "reach": 1}  # components of the continuous action


class MockEnv(BackendEnv):
    """A counter, or a target to reach.

    `name="counter"`: frame t (from 1) pays t; `observation` is [t, index of the episode, last action]; the image is
    uniform with value t. `name="reach"`: an episode draws a target in [-1, 1], or one of four choices; a frame pays
    1 - |clip(a, -1, 1) - target| / 2, or 1 for the right choice and 0 otherwise; `observation` is the target (one-hot
    for choices); the image is uniform and as bright as the target is high.

    Args:
        name: "counter" or "reach".
        task: "continuous" or "discrete"; "counter" has "terminating" besides, which is continuous too. Only the
            episodes of "terminating" end as `terminated`, the others as `truncated`.
        frame_skip: frames per step, at least 1.
        seed: seed of the targets.
        device: where the tensors go.
        episode_length: frames, at least 1.

    Writes:
        `observation` float32 `[O]`, `reward` float32 `[1]` (sum over the frames), `terminated`, `truncated`, `done`.

    Raises:
        ValueError: the name or the task does not exist, or `frame_skip` is below 1.
    """

    prompt = ""  # no words for what is drawn

    clips_action = True

    def __init__(
        self,
        *,
        name: str = "counter",
        task: str | None = "continuous",
        frame_skip: int = 1,
        seed: int | None = None,
        device: torch.device | str = "cpu",
        episode_length: int = 10,
    ):
        super().__init__(frame_skip=frame_skip, device=device)
        task = choose_task(name, task, TASKS)
        facts = TASKS[name][task]
        self.episode_length = episode_length
        self._discrete, self._reach, self._terminates = facts["discrete"], facts["reach"], facts["terminates"]
        self._random = np.random.default_rng(seed)
        self._t, self._episode = 0, -1
        size = CHOICES if self._discrete else CONTINUOUS_SIZE[name]
        self._last_action = self._target = torch.zeros(size)  # [A]
        if self._discrete:
            action_spec = OneHot(size, dtype=torch.int64)
        else:
            action_spec = Bounded(-1.0, 1.0, torch.Size((size,)), dtype=torch.float32)
        self._declare(action_spec, width=size if self._reach else 2 + size)

    def _observe(self) -> torch.Tensor:
        if self._reach:
            return self._target.clone()  # [A]
        return torch.cat([torch.tensor([self._t, self._episode], dtype=torch.float32), self._last_action])  # [2 + A]

    def _reward(self) -> float:
        if not self._reach:
            return float(self._t)
        if self._discrete:
            return float(self._last_action @ self._target)
        return 1.0 - float((self._last_action.clamp(-1.0, 1.0) - self._target).abs().mean()) / 2

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        self._t, self._episode = 0, self._episode + 1
        self._last_action = torch.zeros_like(self._last_action)
        if self._discrete:
            self._target = torch.eye(CHOICES)[self._random.integers(CHOICES)]
        else:
            self._target = torch.from_numpy(self._random.uniform(-1, 1, self._target.shape).astype(np.float32))
        return self._first(self._observe())

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self._last_action = tensordict.get("action").detach().cpu().float()
        reward = 0.0
        for _ in range(self.frame_skip):
            self._t += 1
            reward += self._reward()
            if self._t == self.episode_length:
                break
        done = self._t == self.episode_length
        return self._arrival(
            self._observe(), reward, terminated=done and self._terminates, truncated=done and not self._terminates
        )

    def _set_seed(self, seed: int | None) -> None:
        self._random = np.random.default_rng(seed)
        self._episode = -1

    def set_episode(self, episode: int) -> None:
        """Gives the next episode a number, which "counter" shows."""
        self._episode = episode - 1

    def render(
        self,
        height: int,
        width: int,
        camera: int | str | None = None,
        fast: bool = False,
        *,
        reflections: bool = True,
    ) -> torch.Tensor:
        """Draws the current state: a uniform image, whatever the camera.

        Args:
            height: pixels.
            width: pixels.
            camera: ignored.
            fast: ignored.
            reflections: ignored.

        Returns:
            uint8 image, `[height, width, 3]`.
        """
        if not self._reach:
            level = self._t % 256
        elif self._discrete:
            level = int(self._target.argmax()) * 255 // (CHOICES - 1)
        else:
            level = round((float(self._target[0]) + 1) / 2 * 255)
        return torch.full((height, width, 3), level, dtype=torch.uint8)  # [h, w, 3]

    def foreground_mask(
        self, height: int, width: int, camera: int | str | None = None, replace_floor: bool = True
    ) -> torch.Tensor:
        """Marks a rectangle in the middle, half as high and half as wide as the image, whatever the camera.

        Args:
            height: pixels.
            width: pixels.
            camera: ignored.
            replace_floor: False marks the lowest quarter of the image as well.

        Returns:
            bool mask, `[height, width]`, True on the foreground.
        """
        mask = torch.zeros(height, width, dtype=torch.bool)
        mask[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
        if not replace_floor:
            mask[height - height // 4 :] = True
        return mask  # [h, w]
