"""The recurrent model of World Models: an LSTM that predicts the next latent as a mixture of Gaussians.

Step t reads the latent z_t and the action a_t that is taken in it, and predicts z_{t+1}, the reward of arriving there
and whether the task ends there. A controller acts on (z_t, h_t): h_t has seen everything before t, h_0 = 0.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

MIN_LOG_STD = -7.0  # a latent that never changes would drive its std to zero and the likelihood to infinity


class LSTMState(NamedTuple):
    """State of the LSTM: ``hidden`` is what a controller sees."""

    hidden: Tensor  # [N, D]
    cell: Tensor  # [N, D]


class Mixture(NamedTuple):
    """K Gaussians for each of Z latents; ``logits`` need not be normalised."""

    logits: Tensor  # [..., Z, K]
    mean: Tensor  # [..., Z, K]
    log_std: Tensor  # [..., Z, K]

    def sample(self, temperature: float | Tensor, uniform: Tensor, normal: Tensor) -> Tensor:
        """Draw latents [..., Z] by inverting the cumulative weights.

            p = softmax(logits / temperature)        k = first with cumsum(p)_k >= uniform
            z = mean_k + exp(log_std_k) * sqrt(temperature) * normal

        Args:
            temperature: Above 0; 1 samples what was learned, more makes the dream less certain. A tensor must
                broadcast with [..., Z].
            uniform, normal: Noise, uniform in [0, 1) and standard normal, [..., Z].

        Source: hardmaru/WorldModelsExperiments@fd982b9 carracing/rnn/rnn.py, ``sample_sequence``.
        Differs: the softmax subtracts the maximum of each latent, not of all, which could leave 0 / 0.
        """
        index = self.component(temperature, uniform).unsqueeze(-1)  # [..., Z, 1]
        mean, log_std = self.mean.gather(-1, index).squeeze(-1), self.log_std.gather(-1, index).squeeze(-1)
        return mean + log_std.exp() * temperature**0.5 * normal

    def component(self, temperature: float | Tensor, uniform: Tensor) -> Tensor:
        """Index of the component that ``uniform`` [..., Z] falls on, int64 [..., Z]."""
        temperature = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
        edges = torch.softmax(self.logits / temperature, -1)[..., :-1].cumsum(-1)  # the last edge is 1
        return (edges < uniform.unsqueeze(-1)).sum(-1)


class Prediction(NamedTuple):
    """What the model expects of the next step."""

    mixture: Mixture
    reward: Tensor  # [...]
    terminated_logits: Tensor  # [...]


class MDNRNN(nn.Module):
    """LSTM with a mixture density head, a reward head and a terminated head, all linear in one layer.

        h_{t+1}, c_{t+1} = LSTM([z_t, a_t], h_t, c_t)        mixture, reward / scale, terminated = linear(h_{t+1})

    The LSTM is computed in float32 also under autocast, so that sequences and steps have one and the same state.

    Args:
        latent_size: Number Z of latents.
        action_size: Number A of action dimensions; discrete actions are one-hot vectors.
        hidden_size: Width D of the LSTM.
        components: Gaussians K per latent.
        min_log_std: Floor of the log standard deviations.

    Source: hardmaru/WorldModelsExperiments@fd982b9 carracing/rnn/rnn.py, ``MDNRNN``; doomrnn/doomrnn.py, ``Model``.
    Differs: adds the reward head, and the terminated head to the car racing model; floors log_std; the forget bias of 1
        is part of the trained bias.
    """

    def __init__(
        self,
        *,
        latent_size: int = 32,
        action_size: int,
        hidden_size: int = 256,
        components: int = 5,
        min_log_std: float = MIN_LOG_STD,
    ):
        super().__init__()
        self.latent_size, self.action_size = latent_size, action_size
        self.hidden_size, self.components, self.min_log_std = hidden_size, components, min_log_std
        self.lstm = nn.LSTM(latent_size + action_size, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, 3 * components * latent_size + 2)
        self.register_buffer("reward_scale", torch.ones(()))  # unit in which the head gives rewards
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot weights, zero biases but for 1 at the forget gate; the LSTM's second bias stays zero."""
        bound = math.sqrt(6 / (self.latent_size + self.action_size + 5 * self.hidden_size))
        nn.init.uniform_(self.lstm.weight_ih_l0, -bound, bound)
        nn.init.uniform_(self.lstm.weight_hh_l0, -bound, bound)
        nn.init.zeros_(self.lstm.bias_ih_l0)
        nn.init.ones_(self.lstm.bias_ih_l0.data[self.hidden_size : 2 * self.hidden_size])
        nn.init.zeros_(self.lstm.bias_hh_l0.requires_grad_(False))
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def initial(self, rows: int) -> LSTMState:
        """The state of all zeros that every episode starts with."""
        zeros = self.head.weight.new_zeros(rows, self.hidden_size)
        return LSTMState(zeros, zeros)

    def forward(
        self, latent: Tensor, action: Tensor, is_init: Tensor, state: LSTMState | None = None
    ) -> tuple[Prediction, LSTMState]:
        """Run over sequences; the state is set to zero before every step with ``is_init``.

        Args:
            latent: z_t, [B, T, Z].
            action: a_t taken in z_t, [B, T, A].
            is_init: Whether z_t starts an episode, bool [B, T, 1].
            state: Before the first step. Default: zeros.

        Returns:
            Predictions of z_{t+1} [B, T, ...] and the state after the last step.
        """
        inputs = torch.cat([latent, action], -1).float()  # [B, T, Z + A]
        state = self.initial(len(inputs)) if state is None else state
        resets = is_init.any(0).squeeze(-1).nonzero().flatten().tolist()  # steps at which some row starts anew
        outputs = []
        for begin, end in pairwise(sorted({0, *resets, inputs.shape[1]})):
            keep = (~is_init[:, begin]).to(inputs.dtype)  # [B, 1]
            start = tuple((part * keep).unsqueeze(0) for part in state)
            with torch.autocast(inputs.device.type, enabled=False):
                output, (hidden, cell) = self.lstm(inputs[:, begin:end], start)
            outputs.append(output)
            state = LSTMState(hidden[0], cell[0])
        return self.predict(torch.cat(outputs, 1)), state

    def step(self, latent: Tensor, action: Tensor, state: LSTMState) -> LSTMState:
        """Advance by one step: latent [N, Z], action [N, A]."""
        lstm = self.lstm
        weights = (lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0, lstm.bias_hh_l0)
        with torch.autocast(latent.device.type, enabled=False):
            return LSTMState(*torch.lstm_cell(torch.cat([latent, action], -1).float(), tuple(state), *weights))

    def predict(self, hidden: Tensor) -> Prediction:
        """The heads on the state after a step, [..., D]."""
        outputs = self.head(hidden).float()
        mixture, reward, terminated = outputs.split([outputs.shape[-1] - 2, 1, 1], -1)
        logits, mean, log_std = mixture.unflatten(-1, (self.latent_size, 3, self.components)).unbind(-2)
        mixture = Mixture(logits, mean, log_std.clamp(min=self.min_log_std))
        return Prediction(mixture, reward.squeeze(-1) * self.reward_scale, terminated.squeeze(-1))
