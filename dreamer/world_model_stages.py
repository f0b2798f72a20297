"""The stages of World Models between its data set and its controller: train V, encode the episodes, train M."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.objectives import LossModule

from dreamer.agents import Media
from dreamer.agents.world_model_pictures import mdn_rnn_media, vae_media
from dreamer.episode_data import EpisodeData, digest_of
from dreamer.models.standardizer import StandardizedVAE
from dreamer.models.vae import VAE
from dreamer.nonfinite import NonFiniteError, all_finite, describe_update, find_nonfinite
from dreamer.stages import Stage
from dreamer.steppers import AUTOCAST, gradient_norm, minimised
from objectives.world_models import MDNRNNLoss, VAELoss

ENCODED_AT_ONCE = 256  # observations
MIN_REWARD_SCALE = 0.01  # where there are hardly any rewards
FITTED_TO = 1024  # images, to standardise the features of an untrained V
SHOWN = 32  # images from which pictures are made
VAE_NAMES = {
    "loss_vae_reco": "vae/loss_reconstruction",
    "loss_vae_kl": "vae/loss_kl",
    "vae_squared_error": "vae/squared_error",
    "vae_kl_value": "vae/kl",
    "vae_kl_weight": "vae/kl_weight",
    "vae_active_latents": "vae/active_latents",
}
MDN_NAMES = {
    "loss_mdn_latent": "mdn_rnn/loss_latent",
    "loss_mdn_reward": "mdn_rnn/loss_reward",
    "loss_mdn_terminated": "mdn_rnn/loss_terminated",
    "mdn_counting_share": "mdn_rnn/counting_share",
}


class GradientStage(Stage):
    """A number of updates of one loss by Adam.

    Args:
        name: Of the stage.
        loss: Its ``loss_*`` entries are summed.
        names: Entries of the loss, also of those under ``wm``, and the names under which they are logged.
        updates: When the stage is done.
        lr: Of Adam.
        max_grad_value: Bound of every single gradient; None for none.
        autocast: "bfloat16", False, or "auto": bfloat16 on a GPU and float32 on a CPU.

    Raises:
        ValueError: for an unknown ``autocast``.
    """

    def __init__(
        self,
        name: str,
        loss: LossModule,
        names: Mapping[str, str],
        *,
        updates: int,
        lr: float,
        max_grad_value: float | None = None,
        autocast: str | bool = False,
    ):
        if autocast not in AUTOCAST:
            raise ValueError(f"optimization.autocast={autocast!r}: choose one of {AUTOCAST}")
        self.name, self.loss, self.names, self.updates, self.lr = name, loss, dict(names), updates, lr
        self.max_grad_value = max_grad_value
        self.parameters = [parameter for parameter in loss.parameters() if parameter.requires_grad]
        self.device = self.parameters[0].device
        self.autocast = autocast == "bfloat16" or (autocast == "auto" and self.device.type == "cuda")
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr)
        self.count = 0

    def begin(self) -> None:
        self.count = 0

    def done(self) -> bool:
        return self.count >= self.updates

    def step(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """Make one update.

        Raises:
            NonFiniteError: if a loss or the gradient is not finite; nothing has changed then.
        """
        before = [buffer.clone() for buffer in self.loss.buffers()]  # statistics that the networks themselves move
        losses = self._compute_gradients(batch)
        norm = gradient_norm(self.parameters)
        if not all_finite(minimised(losses) | {"norm": norm}):
            for buffer, value in zip(self.loss.buffers(), before, strict=True):
                buffer.copy_(value)
            norms = {f"{self.name}/grad_norm": norm}
            raise describe_update(f"an update of the stage {self.name}", losses, norms, batch)
        if self.max_grad_value is not None:
            nn.utils.clip_grad_value_(self.parameters, self.max_grad_value)
        self.optimizer.step()
        self.count += 1
        flat = losses.pop("wm").update(losses)
        return {name: flat[key] for key, name in self.names.items()} | {f"{self.name}/grad_norm": norm}

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over averages and counters; the learning rate stays that of this stage."""
        self.count = state["count"]
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr

    def _compute_gradients(self, batch: TensorDictBase) -> TensorDictBase:
        self.optimizer.zero_grad()
        self.loss.train()  # for batch normalisation; whatever else looks at the networks wants them as they will act
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            losses = self.loss(batch)
        self.loss.eval()
        sum(minimised(losses).values()).backward()
        return losses.detach()


class VAEStage(GradientStage):
    """Train V on observations drawn from all episodes.

    Args:
        loss: Of the autoencoder.
        data: What it sees.
        batch_size: Images per update.
        settings: Of :class:`GradientStage`.
    """

    def __init__(self, loss: VAELoss, data: EpisodeData, *, batch_size: int, **settings: Any):
        super().__init__("vae", loss, VAE_NAMES, **settings)
        self.data, self.batch_size = data, batch_size

    def draw(self) -> TensorDictBase:
        """Images, by torch's generator: ``pixels`` [B, h, w, C]."""
        return TensorDict({"pixels": self.data.episodes.draw_observations(self.batch_size).to(self.device)})

    def step(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """Make one update, and count it for the annealing of the KL term."""
        metrics = super().step(batch)
        self.loss.update_targets()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"annealed": self.loss.updates.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over averages and counters; the learning rate stays that of this stage."""
        super().load_state_dict(state)
        self.loss.updates.copy_(state["annealed"])

    @torch.no_grad()
    def media(self) -> Media | None:
        return vae_media(self.loss.vae, self.data.episodes.draw_observations(SHOWN).to(self.device))


class StandardizeStage(Stage):
    """Fit the stand-in for V to all observations of the first round: one update, or none if it is to stay as it is.

    Args:
        data: The observations, and the encoder to fit.
        updates: 0 to leave it as it is.
    """

    name = "vae"

    def __init__(self, data: EpisodeData, *, updates: int):
        self.data, self.updates, self.count = data, min(updates, 1), 0

    def done(self) -> bool:
        return self.count >= self.updates

    def draw(self) -> TensorDictBase:
        """All observations, [N, O]."""
        episodes = self.data.episodes
        return TensorDict(
            {"observation": torch.cat([episodes.read_observations(number) for number in range(len(episodes))])}
        )

    def step(self, batch: TensorDictBase) -> dict[str, int]:
        """Fit.

        Raises:
            NonFiniteError: if an observation is not finite; nothing has changed then.
        """
        if wrong := find_nonfinite(batch):
            raise NonFiniteError(f"observations of {self.data.episodes.folder} are not finite: {wrong}")
        self.data.vision.fit(batch["observation"])
        self.count += 1
        return {"vae/observations": len(batch["observation"])}

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]


class EncodeStage(Stage):
    """Encode the episodes that this encoder has not encoded yet, one per update.

    A V that stays untrained is standardised before the first round, on images drawn by torch's generator.

    Args:
        data: Episodes, encodings and encoder.
        device: Of the encoder.
    """

    name = "encode"

    def __init__(self, data: EpisodeData, device: torch.device):
        self.data, self.device = data, device
        self.digest, self.next = "", 0

    @torch.no_grad()
    def begin(self) -> None:
        if isinstance(self.data.vision, StandardizedVAE) and not self.digest:
            self.data.vision.fit(self.data.episodes.draw_observations(FITTED_TO).to(self.device))
        self.digest, self.next = digest_of(self.data.vision), 0
        self._skip()

    def done(self) -> bool:
        return self.next >= len(self.data.episodes)

    def draw(self) -> TensorDictBase:
        """The next episode: ``observations`` [N + 1, ...]."""
        return TensorDict({"observations": self.data.episodes.read_observations(self.next)})

    @torch.no_grad()
    def step(self, batch: TensorDictBase) -> dict[str, int]:
        """Encode the episode of ``batch``.

        Raises:
            NonFiniteError: if the encoding is not finite.
        """
        chunks = batch["observations"].split(ENCODED_AT_ONCE)
        parts = [self.data.vision.encode(chunk.to(self.device)) for chunk in chunks]
        mean, logvar = (torch.cat(part) for part in zip(*parts, strict=True))
        if not (mean.half().isfinite().all() and logvar.isfinite().all()):
            raise NonFiniteError(f"the encoding of episode {self.next} is not finite")
        self.data.encodings.write(self.next, mean, logvar, self.data.digest(self.next, self.digest))
        self.next += 1
        self._skip()
        return {"encode/episodes": self.next}

    def state_dict(self) -> dict[str, Any]:
        return {"digest": self.digest, "next": self.next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.digest, self.next = state["digest"], state["next"]

    def _skip(self) -> None:
        data = self.data
        while not self.done() and data.encodings.fresh(self.next, data.digest(self.next, self.digest)):
            self.next += 1


class MDNRNNStage(GradientStage):
    """Train M on sequences of encoded episodes.

    Every step of the data set has the same chance to be in the episode that a sequence is cut from; where, says
    :func:`draw_offsets`. A sequence begins with a state of zeros; an episode that is shorter is padded, not left out.
    The error of the reward counts in units of the root mean square of all rewards, or those of some games would drown
    everything else.

    Args:
        loss: Of the model.
        data: Encoded episodes; they are read into memory, 4 Z + 4 A + 6 bytes per record.
        batch_size: Sequences per update.
        sequence_length: Steps T of a sequence.
        settings: Of :class:`GradientStage`.

    Source: hardmaru/WorldModelsExperiments@fd982b9 carracing/rnn_train.py.
    Differs: episodes of any length, in the source all are 999 steps long; the unit of the reward's error.
    """

    def __init__(self, loss: MDNRNNLoss, data: EpisodeData, *, batch_size: int, sequence_length: int, **settings: Any):
        super().__init__("mdn_rnn", loss, MDN_NAMES, **settings)
        self.data, self.batch_size, self.sequence_length = data, batch_size, sequence_length
        self.table: TensorDict | None = None  # all records, episode after episode

    def begin(self) -> None:
        super().begin()
        self.table = None

    def draw(self) -> TensorDictBase:
        """Sequences [B, T + 1] as the loss reads them, ``valid`` false behind the end of an episode."""
        if self.table is None:
            self.table = self._read()
        lengths = np.array(self.data.episodes.lengths)
        steps, first = lengths - 1, np.cumsum(lengths) - lengths
        span = min(self.sequence_length, steps.max())
        drawn = torch.randint(int(steps.sum()), (self.batch_size,)).numpy()
        number = np.searchsorted(np.cumsum(steps), drawn, side="right")  # [B]
        offset = draw_offsets(torch.from_numpy(steps[number]), int(span))  # [B]
        within = offset[:, None] + torch.arange(span + 1)  # [B, T + 1]
        last = torch.from_numpy(steps[number])[:, None]
        rows = torch.from_numpy(first[number])[:, None] + torch.minimum(within, last)
        return self.table[rows].set("valid", (within <= last)[..., None]).to(self.device)

    @torch.no_grad()
    def media(self) -> Media | None:
        if not isinstance(self.data.vision, VAE):
            return None
        return mdn_rnn_media(self.data.vision, self.loss.model, self.draw())

    def _read(self) -> TensorDict:
        """All records [R] of the data set, with the encodings of the present encoder; sets the unit of the rewards."""
        encoder, parts = digest_of(self.data.vision), []
        for number in range(len(self.data.episodes)):
            mean, logvar = self.data.encodings.read(number, self.data.digest(number, encoder))
            parts.append(
                self.data.episodes.read_columns(number).update({"posterior_mean": mean, "posterior_logvar": logvar})
            )
        table = torch.cat(parts)
        scale = table["reward"][~table["is_init"]].square().mean().sqrt()
        self.loss.model.reward_scale.copy_(scale.clamp(min=MIN_REWARD_SCALE))
        return table


def draw_offsets(steps: Tensor, span: int) -> Tensor:
    """Where to cut ``span`` steps out of episodes of ``steps`` [B], so that first and last steps are not rare in it.

    The cut may hang over an end of the episode by all but one step, and is then moved inside: the steps at the ends are
    as likely as those in the middle, some in between up to twice as likely. Shape [B] int64.
    """
    offset = (torch.rand(steps.shape, dtype=torch.float64) * (steps + span - 1)).long() + 1 - span
    return torch.minimum(offset, steps - span).clamp(min=0)
