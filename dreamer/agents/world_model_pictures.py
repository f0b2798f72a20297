"""Pictures of World Models: what V keeps of an image, what M expects to come, what a controller does in the dream."""

from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from torch import Tensor

from dreamer.agents import Media
from dreamer.agents.pictures import to_bytes
from dreamer.models.controller import Controller
from dreamer.models.dream import imagine
from dreamer.models.mdn_rnn import MDNRNN
from dreamer.models.vae import VAE
from objectives.world_models import unit_gaussian_kl

COLUMNS = 8  # images, or time steps, of a still picture
TRAVERSED = 8  # latents
TEMPERATURES = (0.5, 1.0, 1.3)  # of the dreams, from top to bottom and from left to right


@torch.no_grad()
def vae_media(vae: VAE, pixels: Tensor) -> Media:
    """Show what V makes of images, and what its latents mean.

    Args:
        vae: Left in the mode in which it is, which should be that of evaluation.
        pixels: uint8 [N, 64, 64, 3].

    Returns:
        ``vae/reconstructions``: the first images (top), and what is rebuilt from the means of their latents.
        ``vae/traversals``: the first image with one latent at a time set to -3 .. 3 (left to right), for the eight
        latents that tell most about the images, by mean KL (from the top).
    """
    posterior = vae.encode(pixels)
    real = pixels[:COLUMNS].float() / 255
    rows = torch.stack([real, vae.decode(posterior.mean[:COLUMNS])])  # [2, 8, h, w, 3]
    kl = unit_gaussian_kl(posterior.mean.unsqueeze(-1), posterior.logvar.unsqueeze(-1)).mean(0)  # [Z]
    informative = kl.argsort(descending=True)[:TRAVERSED]
    values = torch.linspace(-3, 3, COLUMNS - 1, device=pixels.device)
    latents = posterior.mean[0].expand(len(informative), len(values), -1).clone()  # [8, 7, Z]
    for row, index in enumerate(informative.tolist()):
        latents[row, :, index] = values
    images = {"vae/reconstructions": to_grid(rows), "vae/traversals": to_grid(vae.decode(latents))}
    return Media(images, {}, {}, {})


@torch.no_grad()
def mdn_rnn_media(vae: VAE, model: MDNRNN, batch: TensorDictBase) -> Media:
    """Show what M expects of recorded actions, beside what happened.

    Args:
        vae: Draws the latents.
        model: Imagines from the first latent on, without seeing another.
        batch: As :class:`objectives.world_models.MDNRNNLoss` reads it, [B, T]; the sequence that is longest before its
            padding or the next episode is shown.

    Returns:
        Picture ``mdn_rnn/rollouts``: time steps from left to right; what happened, as V draws it, then imagined at
        temperatures 0.5, 1 and 1.3. Video ``mdn_rnn/rollout_video``: the same from left to right.
    """
    breaks = batch["is_init"].squeeze(-1).clone()  # [B, T]
    breaks[:, 0] = False
    if "valid" in batch.keys():  # noqa: SIM118
        breaks |= ~batch["valid"].squeeze(-1)
    lengths = (breaks.cumsum(1) == 0).sum(1)  # [B]
    row, length = int(lengths.argmax()), int(lengths.max())
    latent, action = batch["posterior_mean"][row, :length].float(), batch["action"][row, 1:length].float()
    if length < 2:
        return Media({}, {}, {}, {})

    def replay(here: Tensor, hidden: Tensor, step: int) -> Tensor:
        return action[step].expand(*here.shape[:-1], -1)

    films = imagine_films(vae, model, replay, latent[0], length - 1)  # [P, T, h, w, 3]
    films = torch.cat([vae.decode(latent[: films.shape[1]])[None], films])
    return Media({"mdn_rnn/rollouts": to_strips(films)}, {"mdn_rnn/rollout_video": to_video(films)}, {}, {})


@torch.no_grad()
def dream_media(
    vae: VAE, model: MDNRNN, controller: Controller, parameters: Tensor, start: Tensor, length: int
) -> Media:
    """Show what a controller does in the dream.

    Args:
        vae: Draws the latents.
        model: Imagines.
        controller, parameters: What acts, [n].
        start: Latents of a first frame, [Z].
        length: Steps.

    Returns:
        Picture ``controller/dreams``: time steps from left to right, temperatures 0.5, 1 and 1.3 from the top; black
        where the dream has ended. Video ``controller/dream_video``: the same from left to right.
    """
    layers = controller.unflatten(parameters[None].to(start.device).expand(len(TEMPERATURES), -1))

    def act(latent: Tensor, hidden: Tensor, step: int) -> Tensor:
        return controller.act(layers, controller.observe(latent, hidden))

    films = imagine_films(vae, model, act, start, length)
    return Media({"controller/dreams": to_strips(films)}, {"controller/dream_video": to_video(films)}, {}, {})


def imagine_films(
    vae: VAE, model: MDNRNN, act: Callable[[Tensor, Tensor, int], Tensor], start: Tensor, length: int
) -> Tensor:
    """Images [P, T, h, w, 3] in [0, 1] of dreams at each of P temperatures from ``start`` [Z]; black after the end.

    Random numbers are the same in every call and for every temperature, and those of the program stay as they were.
    """
    temperature = torch.tensor(TEMPERATURES, device=start.device).unsqueeze(1)  # [P, 1]
    generator = torch.Generator(start.device).manual_seed(0)
    starts = start.expand(len(TEMPERATURES), 1, -1)
    steps = list(imagine(model, act, starts, length=length, temperature=temperature, generator=generator))
    latents = torch.cat([step.latent for step in steps], 1)  # [P, T, Z]
    alive = torch.cat([torch.ones_like(steps[0].alive), *(step.alive for step in steps[:-1])], 1)  # [P, T]
    return vae.decode(latents) * alive[..., None, None, None]


def to_strips(films: Tensor) -> Tensor:
    """A picture of films [P, T, h, w, 3]: a row for each, time steps from left to right."""
    still = torch.linspace(0, films.shape[1] - 1, min(COLUMNS, films.shape[1])).long()
    return to_grid(films[:, still])


def to_video(films: Tensor) -> Tensor:
    """Films [P, T, h, w, 3] side by side, uint8 [T, h, P * w, 3]."""
    return to_bytes(films.permute(1, 2, 0, 3, 4).flatten(2, 3))


def to_grid(images: Tensor) -> Tensor:
    """A picture of rows and columns of images [rows, columns, h, w, 3], uint8."""
    return to_bytes(images.transpose(1, 2).flatten(2, 3).flatten(0, 1))
