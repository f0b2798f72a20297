"""The hooks named in the table of :mod:`dreamer.trainer`. Each is called at one stage and does one thing."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from tensordict import TensorDictBase
from torch import nn
from torchrl.envs import EnvBase
from torchrl.modules import RandomPolicy
from torchrl.trainers.algorithms import DreamerV3UpdateRatio

from dreamer.evaluation import Episodes, Interrupted, run_seeded_episodes

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
        self.trainer.optim_steps_per_batch = self.schedule(self.replay.write_count) if ready else 0

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting; the ratio stays the one of this run's settings."""
        self.schedule.load_state_dict(state_dict | {"ratio": self.schedule.ratio})

    def restart(self) -> None:
        """Count anew, without a burst, when the records were lost."""
        self.schedule = DreamerV3UpdateRatio(self.schedule.ratio)


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

    def state_dict(self) -> dict[str, int]:
        return {"interval": self.interval, "next": self.next}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Take over when it is due next, unless the interval was changed."""
        if state_dict["interval"] == self.interval:
            self.next = state_dict["next"]


class Evaluate:
    """Run whole episodes in environments of their own.

    Nothing that training uses is touched: not its environments, its replay, its statistics or its random numbers.
    When the run is asked to stop meanwhile, the evaluation is given up and made again after the run was resumed.

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
        self.best: tuple[int, float] | None = None  # frames, mean return
        self.latest: tuple[int, dict[str, float]] | None = None  # updates, what they came to
        self.env: EnvBase | None = None

    def __call__(self, batch: TensorDictBase | None = None) -> dict[str, float] | None:
        due_at = self.due.next
        if not self.due(self.trainer.collected_frames):
            return None
        try:
            return self.run()
        except Interrupted:
            self.due.next = due_at
            return None

    def run(self) -> dict[str, float]:
        """Evaluate the policy now."""
        episodes = self._run_episodes(self.policy, self.episodes)
        mean = float(np.mean(episodes.returns))
        if math.isfinite(mean) and (self.best is None or mean > self.best[1]):
            self.best = (self.trainer.collected_frames, mean)
        metrics = {
            "eval/return_mean": mean,
            "eval/return_std": float(np.std(episodes.returns)),
            "eval/length_mean": float(np.mean(episodes.lengths)) * self.trainer.frame_skip,
        }
        self.latest = self.trainer.update_count, metrics
        return dict(metrics)

    def now(self) -> dict[str, float] | None:
        """Evaluate now and write a line of metrics; None if the run is to stop meanwhile."""
        try:
            metrics = self.run()
        except Interrupted:
            return None
        self.trainer.log_now(metrics)
        return metrics

    def finish(self) -> None:
        """Evaluate a last time, unless nothing was learned since, and random actions for comparison."""
        known = self.latest is not None and self.latest[0] == self.trainer.update_count
        metrics = dict(self.latest[1]) if known else self.run()
        line = f"evaluation: return {metrics['eval/return_mean']:.1f} over {self.episodes} episodes"
        if self.random_episodes:
            returns = self._run_episodes(RandomPolicy(self.env.full_action_spec), self.random_episodes).returns
            metrics["eval/random_return_mean"] = float(np.mean(returns))
            line += f", random actions {metrics['eval/random_return_mean']:.1f} over {self.random_episodes}"
        self.trainer.log_now(metrics)
        self.trainer.console.print(line)
        self.env.close()

    def state_dict(self) -> dict[str, Any]:
        return {"due": self.due.state_dict(), "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.due.load_state_dict(state_dict["due"])
        self.best = state_dict["best"] and tuple(state_dict["best"])

    def _run_episodes(self, policy: Callable, episodes: int) -> Episodes:
        if self.env is None:
            self.env = self.make_env()
        return run_seeded_episodes(
            self.env,
            policy,
            episodes,
            next(self.policy.parameters()).device,
            seed=self.seed,
            deterministic=self.deterministic,
            stop=self.trainer.should_stop,
        )
