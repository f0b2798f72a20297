"""The hooks named in the table of :mod:`dreamer.trainer`. Each is called at one stage and does one thing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import RandomPolicy
from torchrl.trainers.algorithms import DreamerV3UpdateRatio

if TYPE_CHECKING:
    from dreamer.trainer import Trainer


class UpdateRatio:
    """Decide how many updates are owed.

    That is train_ratio replayed steps for each collected step, exactly over a run. Counting starts when training
    can, so there is no burst at the start. A reset counts as a step, as in the published curves.

    Args:
        trainer: Its ``optim_steps_per_batch`` is set.
        train_ratio: Replayed steps per collected step.
        start_steps: Steps that must have been collected before the first update.
    """

    def __init__(self, trainer: "Trainer", *, train_ratio: float, start_steps: int):
        self.trainer, self.replay, self.start_steps = trainer, trainer.replay_buffer, start_steps
        self.schedule = DreamerV3UpdateRatio(train_ratio / (self.replay.batch_size * self.replay.sequence_length))

    def __call__(self) -> None:
        ready = self.replay.can_sample() and self.replay.write_count >= self.start_steps
        owed = self.schedule(self.replay.write_count) if ready else 0
        self.trainer.optim_steps_per_batch = max(owed, 0)  # below 0 when a run goes on without its records

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.schedule.load_state_dict(state_dict)


class ExtendReplay:
    """Append records to the rings of their streams."""

    def __init__(self, replay: Any):
        self.replay = replay

    def __call__(self, records: TensorDictBase) -> TensorDictBase:
        self.replay.extend(records)
        return records


class SampleReplay:
    """Draw windows of records onto the device."""

    def __init__(self, replay: Any):
        self.replay = replay

    def __call__(self, batch: TensorDictBase | None) -> TensorDictBase:
        return self.replay.sample()


class WriteBackContext:
    """Put the latents of an update back into the replay. Later windows start from them."""

    def __init__(self, replay: Any):
        self.replay = replay

    def __call__(self, batch: TensorDictBase) -> None:
        origin = batch["context"]
        self.replay.write_context(origin["stream"], origin["position"], batch["replay_context"])


class EpisodeStats:
    """Log return and length of the episodes that end.

    Args:
        replay: Records are read from it, so that this works for free-running workers too.
        frame_skip: Frames per agent step; lengths are logged in frames.
    """

    def __init__(self, replay: Any, frame_skip: int):
        self.replay, self.frame_skip = replay, frame_skip
        self.returns = np.zeros(replay.num_streams)
        self.steps = np.zeros(replay.num_streams, dtype=np.int64)

    def __call__(self, batch: TensorDictBase | None = None) -> dict[str, float] | None:
        records = self.replay.read_new(["reward", "is_init", "done"])
        columns = (records[key].flatten().tolist() for key in ("stream", "reward", "is_init", "done"))
        returns, lengths = [], []
        for stream, reward, is_init, done in zip(*columns, strict=True):
            if is_init:
                self.returns[stream], self.steps[stream] = 0.0, 0
            else:
                self.returns[stream] += reward
                self.steps[stream] += 1
            if done:
                returns.append(self.returns[stream])
                lengths.append(self.steps[stream] * self.frame_skip)
        if returns:
            return {"episode/return": float(np.mean(returns)), "episode/length": float(np.mean(lengths))}
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"returns": self.returns.tolist(), "steps": self.steps.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.returns[:], self.steps[:] = state_dict["returns"], state_dict["steps"]


class SyncPolicy:
    """Give the workers the newest weights.

    Args:
        trainer: Its collector's :class:`ActingPolicy` gets the weights.
        policy: The learner's policy.
        interval: Updates between two hand-overs.
    """

    def __init__(self, trainer: "Trainer", policy: nn.Module, interval: int):
        self.trainer, self.policy, self.interval, self.synced = trainer, policy, interval, 0

    def __call__(self) -> None:
        if self.trainer.update_count - self.synced >= self.interval:
            self.synced = self.trainer.update_count
            self.trainer.collector.policy.update(self.policy)


class Every:
    """True once in every ``interval`` frames; never for an interval of 0."""

    def __init__(self, interval: int, first: int | None = None):
        self.interval, self.next = interval, interval if first is None else first

    def __call__(self, frames: int) -> bool:
        if not self.interval or frames < self.next:
            return False
        self.next = frames - frames % self.interval + self.interval
        return True


class Evaluate:
    """Run whole episodes in environments of their own.

    Nothing that training uses is touched: not its environments, its replay, its statistics or its random numbers.

    Args:
        trainer: Gives the frames and takes the results.
        make_env: Makes the batched evaluation environment, on first use.
        policy: What acts; actions are sampled, or the mode if ``deterministic``.
        episodes: Episodes per evaluation.
        interval: Frames between evaluations; 0 for only the last one.
        deterministic: Take the mode of the actor. Latents are sampled in any case.
        random_episodes: Episodes of uniformly random actions at the end of the run, for comparison.
        seed: Every evaluation starts from the same seed.
    """

    def __init__(
        self,
        trainer: "Trainer",
        make_env: Callable[[], EnvBase],
        policy: nn.Module,
        *,
        episodes: int,
        interval: int,
        deterministic: bool,
        random_episodes: int,
        seed: int,
    ):
        self.trainer, self.make_env, self.policy, self.seed = trainer, make_env, policy, seed
        self.episodes, self.random_episodes, self.deterministic = episodes, random_episodes, deterministic
        self.due = Every(interval)
        self.env: EnvBase | None = None

    def __call__(self, batch: TensorDictBase | None = None) -> dict[str, float] | None:
        return self.run() if self.due(self.trainer.collected_frames) else None

    def run(self) -> dict[str, float]:
        """Evaluate the policy now."""
        returns, lengths = self._run_episodes(self.policy, self.episodes)
        return {
            "eval/return_mean": float(np.mean(returns)),
            "eval/return_std": float(np.std(returns)),
            "eval/length_mean": float(np.mean(lengths)) * self.trainer.frame_skip,
        }

    def finish(self) -> None:
        """Evaluate a last time, and random actions for comparison."""
        metrics = self.run()
        line = f"evaluation: return {metrics['eval/return_mean']:.1f} over {self.episodes} episodes"
        if self.random_episodes:
            returns, _ = self._run_episodes(RandomPolicy(self.env.full_action_spec), self.random_episodes)
            metrics["eval/random_return_mean"] = float(np.mean(returns))
            line += f", random actions {metrics['eval/random_return_mean']:.1f} over {self.random_episodes}"
        self.trainer.log_now(metrics)
        print(line, flush=True)  # noqa: T201
        self.env.close()

    def _run_episodes(self, policy: Callable, episodes: int) -> tuple[list[float], list[int]]:
        if self.env is None:
            self.env = self.make_env()
        kind = ExplorationType.DETERMINISTIC if self.deterministic else ExplorationType.RANDOM
        with preserve_rng(self.seed), set_exploration_type(kind):
            self.env.set_seed(self.seed)
            return run_episodes(self.env, policy, episodes, next(self.policy.parameters()).device)


@torch.no_grad()
def run_episodes(env: EnvBase, policy: Callable, episodes: int, device: torch.device) -> tuple[list[float], list[int]]:
    """Run whole episodes; return their returns and lengths (steps).

    Args:
        env: Batch size [] or [n]; n episodes run side by side.
        policy: Reads and writes TensorDicts on ``device``.
        episodes: Number of episodes.
        device: Of the policy; the environment stays where it is.
    """
    returns: list[float] = []
    lengths: list[int] = []
    while len(returns) < episodes:
        current = env.reset()
        alive = torch.ones(*env.batch_size, 1, dtype=torch.bool)
        total, steps = torch.zeros(alive.shape), torch.zeros(alive.shape, dtype=torch.int64)
        while alive.any():
            current.update(policy(current.to(device)).to(current.device))
            arrived, current = env.step_and_maybe_reset(current)
            total += arrived["next", "reward"] * alive
            steps += alive
            alive &= ~arrived["next", "done"]
        returns += total.flatten().tolist()
        lengths += steps.flatten().tolist()
    return returns[:episodes], lengths[:episodes]


@contextmanager
def preserve_rng(seed: int) -> Iterator[None]:
    """Seed torch inside, and leave its generators outside as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class OpenLoopVideo:
    """Write a video that compares real and imagined images.

    It shows sequences of the last update's batch, so that nothing is drawn from the replay for it.
    """

    def __init__(self, trainer: "Trainer", make_frames: Callable[[TensorDictBase], torch.Tensor], interval: int):
        self.trainer, self.make_frames = trainer, make_frames
        self.due = Every(interval, first=0)

    def __call__(self, batch: TensorDictBase) -> None:
        if self.due(self.trainer.collected_frames):
            with preserve_rng(0):
                frames = self.make_frames(batch)
            self.trainer.logger.log_video("train/imagination/comparison", frames.cpu(), self.trainer.collected_frames)
