"""What candidates of an evolution earn in real environments."""

import math
from collections.abc import Callable, Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase, step_mdp
from torchrl.envs.utils import ExplorationType, set_exploration_type

from dreamer.collection import derive_seed
from dreamer.evaluation import Interrupted, preserve_rng


class RealFitness:
    """The mean return of every candidate over the same episodes.

    Each row of the environment plays all trials of one candidate after the other, and rests when they are over, while
    the networks are called once for all rows that act. Then the next candidates take the rows.

        fitness = RealFitness(make_envs, for_population, max_steps=1000, frame_skip=1)
        returns, frames = fitness(population, seeds)

    Random numbers outside stay as they are. A candidate earns alone what it earns in any population if the policy draws
    no random numbers, or the same ones in every step however many rows there are.

    Args:
        make_envs: Seed -> environments of batch size [n] or [], made at the first call; what they play follows from
            the seeds of a call.
        for_population: Candidates [P, n] -> policy that reads ``candidate`` int64 [1] in each row, the number of the
            candidate that acts there; actions are chosen by the mode of its distribution, if it has one.
        max_steps: Steps after which a trial is cut off, at least 1; None for none but the end of the episode.
        frame_skip: Frames per step.
        device: Of the policy.
        stop: Asked before every step.

    Raises:
        ValueError: for counts below 1.
    """

    def __init__(
        self,
        make_envs: Callable[[int], EnvBase],
        for_population: Callable[[Tensor], Callable[[TensorDictBase], TensorDictBase]],
        *,
        max_steps: int | None,
        frame_skip: int,
        device: torch.device | str = "cpu",
        stop: Callable[[], bool] | None = None,
    ):
        for name, value in (("max_steps", max_steps), ("frame_skip", frame_skip)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: give at least 1")
        self.make_envs, self.for_population = make_envs, for_population
        self.max_steps = math.inf if max_steps is None else max_steps
        self.frame_skip, self.device, self.stop = frame_skip, device, stop
        self.env: EnvBase | None = None

    @torch.no_grad()
    def __call__(self, population: Tensor, seeds: Sequence[int]) -> tuple[Tensor, int]:
        """Play one trial per seed with each candidate.

        Args:
            population: Parameters of the candidates [P, n].
            seeds: All together they decide the episodes; there are as many episodes as seeds.

        Returns:
            Mean returns [P] in the order of the candidates, and the frames that were simulated.

        Raises:
            Interrupted: as soon as ``stop()`` is true.
        """
        seed, policy = derive_seed(*seeds), self.for_population(population)
        if self.env is None:
            self.env = self.make_envs(seed)
        returns, frames = [], 0
        for candidates in torch.arange(len(population)).split(self.env.batch_size.numel()):
            with preserve_rng(seed), set_exploration_type(ExplorationType.DETERMINISTIC):
                total, steps = self._play(policy, candidates, seed, len(seeds))
            returns.append(total)
            frames += steps * self.frame_skip
        return torch.cat(returns) / len(seeds), frames

    def _play(
        self, policy: Callable[[TensorDictBase], TensorDictBase], candidates: Tensor, seed: int, trials: int
    ) -> tuple[Tensor, int]:
        """Sums of the rewards of the candidates [c], one in each of the first rows, and the steps of all."""
        env, shape = self.env, (*self.env.batch_size, 1)
        number = torch.zeros(shape, dtype=torch.int64)
        left, total = torch.zeros_like(number), torch.zeros(shape)  # trials to play, sums of rewards
        number.view(-1)[: len(candidates)], left.view(-1)[: len(candidates)] = candidates, trials
        age, steps = torch.zeros_like(number), 0  # steps of the present trial, steps of all
        env.set_seed(seed, static_seed=True)  # every row has the same episodes
        current = env.reset()
        while (acts := left > 0).any():
            if self.stop is not None and self.stop():
                raise Interrupted
            current = current.update(policy(current.set("candidate", number).to(self.device)).to(current.device))
            arrived = env.step(current.set("_step", acts.squeeze(-1)))["next"]
            total += torch.where(acts, arrived["reward"], 0)
            age, steps = age + 1, steps + int(acts.sum())
            over = acts & (arrived["done"] | (age >= self.max_steps))
            left, age = left - over.long(), age * ~over
            current = step_mdp(current.set("next", arrived))
            again = over & (left > 0)
            if again.any():
                current = env.reset(current.set("_reset", again)).exclude("_reset")
        return total.flatten()[: len(candidates)], steps
