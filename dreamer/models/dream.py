"""Rollouts inside an MDN-RNN: many controllers and many trials as one batch."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dreamer.models.controller import Controller
from dreamer.models.mdn_rnn import MDNRNN

CHECK_EVERY = 50  # steps between the looks at whether any row is alive, each of which waits for the device


class DreamStep(NamedTuple):
    """One step of P candidates in R trials."""

    latent: Tensor  # z_t [P, R, Z]
    action: Tensor  # taken in z_t, [P, R, A]
    reward: Tensor  # of arriving in z_{t+1}, 0 if the trial had ended before, [P, R]
    alive: Tensor  # whether the trial goes on in z_{t+1}, bool [P, R]


class DreamScore(NamedTuple):
    """What candidates earned in their trials."""

    returns: Tensor  # [P, R]
    lengths: Tensor  # steps, int64 [P, R]


def dream(
    model: MDNRNN, controller: Controller, parameters: Tensor, start: Tensor, **options: Any
) -> Iterator[DreamStep]:
    """Let every candidate act in the model, from every start, and yield the steps.

    Args:
        model: In evaluation mode or not, there is no difference.
        controller: Takes z, or [z, h], and gives the actions of the model.
        parameters: Of P candidates, [P, n].
        start: Encoded first frames of R real episodes, [R, Z].
        options: Further arguments of :func:`imagine`.
    """
    layers = controller.unflatten(parameters)

    def act(latent: Tensor, hidden: Tensor, step: int) -> Tensor:
        return controller.act(layers, controller.observe(latent, hidden))

    return imagine(model, act, start.expand(len(parameters), *start.shape), **options)


@torch.inference_mode()
def imagine(
    model: MDNRNN,
    act: Callable[[Tensor, Tensor, int], Tensor],
    start: Tensor,
    *,
    length: int,
    temperature: float | Tensor = 1.0,
    generator: torch.Generator,
) -> Iterator[DreamStep]:
    """Follow the model's predictions from P x R starts under the actions of ``act``, and yield the steps.

    All candidates meet the same noise in the same trial, so that luck does not rank them, and a candidate dreams alone
    what it dreams in a population. A trial ends where the logit of ``terminated`` is above 0, without sampling; a model
    whose loss weighs ends tenfold says so from a probability of 1/11 on.

    Args:
        model: In evaluation mode or not, there is no difference.
        act: z [P, R, Z], h [P, R, D] and the number of the step -> actions [P, R, A].
        start: Encoded first frames of R real episodes for each of P candidates, [P, R, Z].
        length: Steps after which a trial is cut off.
        temperature: Of the mixture, above 0; one number, or one per candidate or trial that broadcasts with [P, R].
        generator: On the device of the model; its state decides the dream.

    Raises:
        ValueError: for a temperature that is not above 0.
    Source: Ha & Schmidhuber 2018, section 4; hardmaru/WorldModelsExperiments@fd982b9 doomrnn/doomrnn.py.
    Differs: a batch of candidates and trials with common noise; the rewards are those of the reward head.
    """
    if not torch.as_tensor(temperature > 0).all():
        raise ValueError(f"temperature={temperature}: it must be above 0")
    rows, latent = start.shape[:2], start
    if isinstance(temperature, Tensor):
        temperature = temperature.expand(rows).unsqueeze(-1)  # [P, R, 1]
    state = model.initial(rows.numel())
    alive = torch.ones(rows, dtype=torch.bool, device=start.device)
    for step in range(length):
        if step and step % CHECK_EVERY == 0 and not alive.any():
            return
        action = act(latent, state.hidden.unflatten(0, rows), step)  # [P, R, A]
        state = model.step(latent.flatten(0, 1), action.flatten(0, 1), state)
        mixture, reward, terminated_logits = model.predict(state.hidden.unflatten(0, rows))
        uniform = torch.rand(start.shape[1:], generator=generator, device=start.device)  # [R, Z]
        normal = torch.randn(start.shape[1:], generator=generator, device=start.device)  # [R, Z]
        was, alive = alive, alive & (terminated_logits <= 0)
        yield DreamStep(latent, action, torch.where(was, reward, 0), alive)  # NaN behind the end is nothing
        latent = mixture.sample(temperature, uniform, normal)


def score(steps: Iterator[DreamStep]) -> DreamScore:
    """Sum the rewards and count the steps of each trial until it ends.

    Raises:
        ValueError: for a dream without a step.
    """
    returns, survived = None, None
    for step in steps:
        first = returns is None
        returns = step.reward.clone() if first else returns.add_(step.reward)
        survived = step.alive.long() if first else survived.add_(step.alive)
        last = step.alive
    if returns is None:
        raise ValueError("a dream of 0 steps has no score: raise its length")
    return DreamScore(returns, survived + (~last))
