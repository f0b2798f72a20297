"""CMA-ES on flat parameter vectors, with a state that is made of tensors and resumes to the bit."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

NEVER_STOP = {"tolfun": 0, "tolfunhist": 0, "tolflatfitness": float("inf"), "tolstagnation": float("inf")}


class CMAES:
    """Maximise a noisy fitness by the covariance matrix adaptation evolution strategy.

        population = es.ask()              # [P, n]
        es.tell(fitness(population))       # [P], higher is better
        solution = es.mean                 # [n], not the best of the samples, which is the luckiest

    It has its own stream of random numbers, and never stops by itself: a fitness that is the same for all moves nothing
    and ends nothing. A run is a function of its arguments and of every fitness it was told, so these are its state, and
    to load it is to go through them again (some milliseconds per generation of 64 candidates with 867 parameters).

    Args:
        size: Parameters n of a candidate.
        population: Candidates P per generation.
        sigma: Initial standard deviation. The paper's is 0.1; at 0.5 half of the tanh actions of a linear controller
            are saturated, which does not matter where actions are discrete.
        diagonal: Learn the variance of each parameter alone. The full covariance of some hundred parameters learns next
            to nothing in a hundred generations, and takes sixteen times as long.
        seed: Of its random stream.
        start: First mean, [n]; all zeros by default.

    Raises:
        ImportError: if the package ``cma`` is not installed.
    Source: Hansen, pycma 4; Ha & Schmidhuber 2018, appendix A.4.
    Differs: diagonal by default.
    """

    def __init__(
        self,
        size: int,
        *,
        population: int = 64,
        sigma: float = 0.1,
        diagonal: bool = True,
        seed: int = 0,
        start: Tensor | None = None,
    ):
        self.arguments = {"size": size, "population": population, "sigma": sigma, "diagonal": diagonal, "seed": seed}
        self.start = torch.zeros(size) if start is None else start.detach().cpu().clone()
        self._restart()

    def _restart(self) -> None:
        try:
            import cma
        except ImportError as error:
            raise ImportError("CMAES needs the package cma: pip install lucid-rl[gym]") from error

        arguments = self.arguments
        options = {
            "popsize": arguments["population"],
            "CMA_diagonal": arguments["diagonal"],
            "randn": np.random.RandomState(arguments["seed"]).randn,
            "seed": float("nan"),  # leaves the global stream of numpy alone
            "verbose": -9,
        }
        self._es = cma.CMAEvolutionStrategy(self.start.double().numpy(), arguments["sigma"], options | NEVER_STOP)
        self._pending: list[np.ndarray] | None = None
        self._told: list[Tensor] = []

    @property
    def generation(self) -> int:
        """Number of generations that have been told."""
        return len(self._told)

    @property
    def mean(self) -> Tensor:
        """Mean of the distribution, float32 [n]."""
        return torch.from_numpy(np.array(self._es.mean)).float()

    @property
    def sigma(self) -> float:
        """Standard deviation of a parameter under the distribution, the mean over all parameters."""
        return float(np.mean(self._es.stds))

    def ask(self) -> Tensor:
        """Candidates of this generation, float32 [P, n]; the same ones until :meth:`tell`."""
        if self._pending is None:
            self._pending = self._es.ask()
        return torch.from_numpy(np.stack(self._pending)).float()

    def tell(self, fitness: Tensor) -> None:
        """End the generation.

        Args:
            fitness: Of each candidate, in the order of :meth:`ask`, [P]; higher is better.

        Raises:
            RuntimeError: if this generation was not asked for.
            ValueError: for a fitness of another shape, or one that is not finite.
        """
        if self._pending is None:
            raise RuntimeError("tell() ends a generation that was not asked for: call ask() first")
        if fitness.shape != (self.arguments["population"],):
            raise ValueError(f"fitness.shape={tuple(fitness.shape)}: pass one number for each of the candidates")
        fitness = fitness.detach().to("cpu", torch.float64)
        if not fitness.isfinite().all():
            bad = (~fitness.isfinite()).nonzero().flatten().tolist()
            raise ValueError(f"the fitness of candidates {bad} is {fitness[bad].tolist()}: it must be finite")
        if (fitness != fitness[0]).any():  # equal ranks mean nothing, yet pycma would move
            self._es.tell(self._pending, (-fitness).tolist())
        self._told.append(fitness.clone())
        self._pending = None

    def state_dict(self) -> dict[str, Any]:
        """Arguments, start, every fitness so far float64 [G, P], and the mean to check a reload with, float64 [n]."""
        told = torch.stack(self._told) if self._told else torch.zeros(0, self.arguments["population"]).double()
        mean = torch.from_numpy(np.array(self._es.mean))
        return {"arguments": dict(self.arguments), "start": self.start.clone(), "told": told, "mean": mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go from its start through the generations of ``state``.

        Candidates that were asked for but not told come again from :meth:`ask`.

        Raises:
            ValueError: for the state of a search with other arguments.
            RuntimeError: if the generations lead elsewhere, as with another version of ``cma``.
        """
        if state["arguments"] != self.arguments:
            raise ValueError(f"the state belongs to {state['arguments']}, this search is {self.arguments}")
        self.start = state["start"].cpu().clone()
        self._restart()
        for fitness in state["told"]:
            self.ask()
            self.tell(fitness)
        mean = torch.from_numpy(np.array(self._es.mean))
        if not torch.allclose(mean, state["mean"].cpu(), rtol=1e-9, atol=1e-12):
            error = (mean - state["mean"].cpu()).abs().max().item()
            raise RuntimeError(
                f"{self.generation} generations were gone through again and their mean is off by {error:.3g}: "
                "use the version of cma that began the run"
            )
