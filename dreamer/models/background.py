"""Two ways to rebuild the background of an image without asking anything of the task's latent."""

from torch import Tensor, nn

from dreamer.models.rssm import RSSM, Rollout


class StopGradientBackground(nn.Module):
    """Rebuild the background from the task's model state, which stays as it is.

    How well that works says how much of the background is in the task's latent all the same.

    Args:
        decoder: (belief, state) -> image [..., h, w, 3] in [0, 1].
    """

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder

    def forward(self, task: Rollout, pixels: Tensor, action: Tensor, is_init: Tensor) -> tuple[Tensor, None]:
        return self.decoder(task.belief.detach(), task.state.detach()), None  # [B, T, h, w, 3]


class LatentBackground(nn.Module):
    """Rebuild the background from a latent of its own, which sees the image and the actions.

    It starts from nothing at each window of the replay and is never imagined: nobody acts on it.

    Args:
        encoder: Pixels [..., h, w, 3] -> [..., E].
        rssm: The model of how the background goes on.
        decoder: (belief, state) -> image [..., h, w, 3] in [0, 1].
    """

    def __init__(self, encoder: nn.Module, rssm: RSSM, decoder: nn.Module):
        super().__init__()
        self.encoder, self.rssm, self.decoder = encoder, rssm, decoder

    def forward(self, task: Rollout, pixels: Tensor, action: Tensor, is_init: Tensor) -> tuple[Tensor, Rollout]:
        start = self.rssm.initial(len(pixels), pixels.device)
        rollout = self.rssm.observe(self.encoder(pixels), action, is_init, *start)
        return self.decoder(rollout.belief, rollout.state), rollout  # [B, T, h, w, 3]
