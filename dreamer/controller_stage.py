"""The last stage of World Models: a controller by evolution, scored in the dream or in real environments."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from dreamer.agents import Media
from dreamer.agents.world_model_pictures import dream_media
from dreamer.collection import derive_seed
from dreamer.episode_data import EpisodeData
from dreamer.evolution import CMAES
from dreamer.fitness import RealFitness
from dreamer.models.controller import Controller
from dreamer.models.dream import dream, score
from dreamer.models.mdn_rnn import MDNRNN
from dreamer.models.vae import VAE
from dreamer.nonfinite import NonFiniteError
from dreamer.stages import Stage

if TYPE_CHECKING:
    from dreamer.trainer import Trainer

FITNESS = ("dream", "real")
SHOWN_STEPS = 100  # of a dream, at most
TRIALS = 3  # tag in derived seeds: the trials of a generation have seeds of their own


@dataclass(frozen=True)
class ControllerSettings:
    """How a controller is evolved: keys of ``agent.controller`` in ``configs/agent/world_models.yaml``.

    Args:
        fitness: Where candidates are scored: "dream" or "real".
        population: Candidates per generation.
        generations: Generations per round.
        trials: Episodes per candidate and generation.
        max_steps: Steps after which a trial is cut off. None: a dream lasts as long as the longest episode of the data
            set, and a real episode until the environment ends it.
        temperature: Of the dream; above 1 it is less certain than the model, and harder to exploit.
        sigma, diagonal: See :class:`CMAES`.
        weight_decay: The released code of the paper has 0.01.
        eval_interval: Generations between two evaluations; 0 for none.
        num_envs: Real environments side by side.
        seed: Of candidates and trials.

    Raises:
        ValueError: for settings out of their range.
    """

    fitness: str
    population: int
    generations: int
    trials: int
    max_steps: int | None
    temperature: float
    sigma: float
    diagonal: bool
    weight_decay: float
    eval_interval: int
    num_envs: int
    seed: int

    def __post_init__(self):
        if self.fitness not in FITNESS:
            raise ValueError(f"agent.controller.fitness={self.fitness!r}: choose one of {FITNESS}")
        least = {"population": 2, "generations": 1, "trials": 1, "max_steps": 1, "num_envs": 1}
        least |= {"weight_decay": 0, "eval_interval": 0}
        for key, bound in least.items():
            if (value := getattr(self, key)) is not None and value < bound:
                raise ValueError(f"agent.controller.{key}={value}: give at least {bound}")
        for key in ("temperature", "sigma"):
            if getattr(self, key) <= 0:
                raise ValueError(f"agent.controller.{key}={getattr(self, key)}: give a number above 0")


class Fitness(Protocol):
    """What candidates are worth."""

    def __call__(self, population: Tensor, seeds: Sequence[int]) -> tuple[Tensor, int]:
        """Mean returns [P] of the candidates [P, n] over one trial per seed, and the simulator frames that it took."""


class DreamFitness:
    """The return of candidates in the dream, all of them and all trials as one batch with common random numbers.

    Args:
        model: Predicts latents, rewards and ends.
        controller: What the candidates are parameters of.
        starts: Number of trials R, generator on the device of the model -> encoded first frames of real episodes
            [R, Z].
        max_steps: -> steps after which a trial is cut off, asked before each call.
        temperature: See :class:`ControllerSettings`.
    """

    def __init__(
        self,
        model: MDNRNN,
        controller: Controller,
        starts: Callable[[int, torch.Generator], Tensor],
        *,
        max_steps: Callable[[], int],
        temperature: float,
    ):
        self.model, self.controller, self.starts = model, controller, starts
        self.max_steps, self.temperature = max_steps, temperature

    def __call__(self, population: Tensor, seeds: Sequence[int]) -> tuple[Tensor, int]:
        device = next(self.model.parameters()).device
        generator = torch.Generator(device).manual_seed(derive_seed(*seeds))
        steps = dream(
            self.model,
            self.controller,
            population.to(device),
            self.starts(len(seeds), generator),
            length=self.max_steps(),
            temperature=self.temperature,
            generator=generator,
        )
        return score(steps).returns.mean(1).cpu(), 0


class ControllerStage(Stage):
    """Evolve the controller; one update is one generation: ask, score, tell.

        fitness = mean return over the trials - weight_decay * mean(w^2)

    The trials of a generation are the same for all candidates and new in the next one. The mean of the distribution is
    what acts and what is evaluated, not the best of the samples, which is the luckiest; it is scored along with them,
    for the log.

    Args:
        trainer: Counts the frames of the fitness, and evaluates.
        policy: What acts; its ``solution`` [n] is where the search begins and where the mean goes.
        fitness: Scores candidates.
        settings: Of the search.
        make_media: Pictures of what the policy does, or None.

    Source: Ha & Schmidhuber 2018, appendix A.4; hardmaru/WorldModelsExperiments@fd982b9 carracing/train.py.
    Differs: all candidates of a generation have the same trials, in the source each half has its own.
    """

    name = "controller"
    one_line_each = True

    def __init__(
        self,
        trainer: "Trainer",
        policy: Any,
        fitness: Fitness,
        settings: ControllerSettings,
        make_media: Callable[[], Media] | None = None,
    ):
        self.trainer, self.policy, self.fitness = trainer, policy, fitness
        self.settings, self.make_media = settings, make_media
        self.round = 0
        self.search: CMAES | None = None
        self.owed = False  # an evaluation, which an interruption puts off

    def begin(self) -> None:
        """Start a search where the last one ended; it has random numbers of its own."""
        self.round += 1
        self.search = self._make_search()

    def done(self) -> bool:
        """Whether all generations of this round are over."""
        return self.search.generation >= self.settings.generations

    def draw(self) -> TensorDictBase:
        """The candidates of the next generation: ``population`` [P, n]."""
        self.follow()  # what an interruption put off
        return TensorDict({"population": self.search.ask()})

    def step(self, batch: TensorDictBase) -> dict[str, float]:
        """Score the candidates of ``batch`` and move the distribution.

        Raises:
            NonFiniteError: if a return is not finite; nothing has changed then.
            Interrupted: if the run is to stop meanwhile; nothing has changed then.
        """
        population, generation, settings = batch["population"], self.search.generation, self.settings
        seeds = [derive_seed(settings.seed, TRIALS, self.round, generation, trial) for trial in range(settings.trials)]
        returns, frames = self.fitness(torch.cat([population, self.search.mean[None]]), seeds)
        if not returns.isfinite().all():
            bad = (~returns.isfinite()).nonzero().flatten().tolist()
            raise NonFiniteError(
                f"generation {generation}: the returns of candidates {bad} are {returns[bad].tolist()}"
            )
        fitness = returns[:-1] - settings.weight_decay * population.square().mean(1)
        self.search.tell(fitness)
        self.policy.solution.copy_(self.search.mean)
        self.trainer.further_frames += frames
        self.owed = settings.eval_interval > 0 and self.search.generation % settings.eval_interval == 0
        return {
            "controller/best": fitness.max().item(),
            "controller/mean": fitness.mean().item(),
            "controller/worst": fitness.min().item(),
            "controller/fitness_of_mean": returns[-1].item(),
            "controller/sigma": self.search.sigma,
            "controller/generation": self.search.generation,
            "controller/frames": frames,
        }

    def follow(self) -> None:
        """Evaluate, if that is due."""
        if self.owed:
            self.owed = self.trainer.evaluate() is None

    def media(self) -> Media | None:
        return self.make_media and self.make_media()

    def state_dict(self) -> dict[str, Any]:
        return {"round": self.round, "owed": self.owed, "search": self.search and self.search.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the next generation."""
        self.round, self.owed = state_dict["round"], state_dict["owed"]
        if state_dict["search"] is not None:
            self.search = self._make_search()
            self.search.load_state_dict(state_dict["search"])

    def _make_search(self) -> CMAES:
        start, settings = self.policy.solution, self.settings
        return CMAES(
            len(start),
            population=settings.population,
            sigma=settings.sigma,
            diagonal=settings.diagonal,
            seed=derive_seed(settings.seed, self.round),
            start=start,
        )


def make_controller_stage(
    trainer: "Trainer", policy: Any, data: EpisodeData, settings: ControllerSettings
) -> ControllerStage:
    """Wire the stage: fitness in the dream or in real environments, and pictures where there are images.

    Args:
        trainer: Of the run; makes the real environments.
        policy: Has ``controller``, ``solution``, ``model``, and ``for_population`` for real environments.
        data: Encoded episodes, from whose first frames the dreams start.
        settings: Of the search.
    """

    def max_steps() -> int:
        """Of a dream; later rounds may have longer episodes."""
        return settings.max_steps or data.episodes.longest

    if settings.fitness == "dream":
        limits = {"max_steps": max_steps, "temperature": settings.temperature}
        fitness = DreamFitness(policy.model, policy.controller, data.starts, **limits)
    else:
        fitness = RealFitness(
            partial(trainer.make_envs, settings.num_envs),
            policy.for_population,
            max_steps=settings.max_steps,
            frame_skip=trainer.frame_skip,
            device=policy.solution.device,
            stop=trainer.should_stop,
        )

    def make_media() -> Media:
        first = data.episodes.read_observation(0, 0)[None].to(policy.solution.device)
        start, length = data.vision.encode(first).mean[0], min(max_steps(), SHOWN_STEPS)
        return dream_media(data.vision, policy.model, policy.controller, policy.solution, start, length)

    shows = isinstance(data.vision, VAE)
    return ControllerStage(trainer, policy, fitness, settings, make_media if shows else None)
