"""An environment that shows given pictures and pays given rewards, alone or as a batch."""

import torch
from tensordict import TensorDict
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase


class ScriptedEnv(EnvBase):
    """Shows random pictures with a random mask; pays what `rewards` say, in a circle.

    Args:
        size: height and width.
        action_size: dimensions of the action, in [-1, 1].
        batch_size: of the environment.
        rewards: `[T]` or `[T, *batch_size]`.
        episode_length: steps, the same for all rows.
        foreground: share of the pixels.
    """

    def __init__(
        self,
        size: int | tuple[int, int] = 32,
        action_size: int = 2,
        batch_size: tuple[int, ...] = (),
        rewards: torch.Tensor | None = None,
        episode_length: int = 1000,
        foreground: float = 0.1,
        device: torch.device | str = "cpu",
    ):
        super().__init__(device=device, batch_size=batch_size)
        self.size = size if isinstance(size, tuple) else (size, size)
        self.rewards = torch.zeros(1) if rewards is None else rewards
        self.episode_length, self.foreground = episode_length, foreground
        self.generator = torch.Generator().manual_seed(0)
        self.t = torch.zeros(*batch_size, 1, dtype=torch.int64)
        self.steps = 0
        self.observation_spec = Composite(
            pixels=Bounded(0, 255, (*batch_size, *self.size, 3), dtype=torch.uint8),
            mask=Binary(shape=(*batch_size, *self.size, 1), dtype=torch.bool),
            shape=batch_size,
        )
        self.action_spec = Bounded(-1.0, 1.0, (*batch_size, action_size))
        self.reward_spec = Unbounded((*batch_size, 1))

    def picture(self) -> TensorDict:
        shape = (*self.batch_size, *self.size)
        pixels = torch.randint(256, (*shape, 3), generator=self.generator, dtype=torch.uint8)
        mask = torch.rand(*shape, 1, generator=self.generator) < self.foreground
        return TensorDict({"pixels": pixels, "mask": mask}, self.batch_size, device=self.device)

    def _reset(self, tensordict=None, **kwargs):
        reset = tensordict.get("_reset", None) if tensordict is not None else None
        self.t = torch.zeros_like(self.t) if reset is None else torch.where(reset.cpu(), 0, self.t)
        return self.picture()

    def _step(self, tensordict):
        self.t = self.t + 1
        reward = self.rewards[self.steps % len(self.rewards)]
        self.steps += 1
        done = (self.t >= self.episode_length).to(self.device)
        reward = reward.float().expand(self.batch_size).unsqueeze(-1).to(self.device)
        return self.picture().update({"reward": reward, "done": done, "terminated": torch.zeros_like(done)})

    def _set_seed(self, seed):
        self.generator.manual_seed(seed or 0)
