"""How World Models acts: encode what is seen, let a small controller choose from that and from the state of M."""

from collections.abc import Callable
from functools import partial

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import Composite, Unbounded
from torchrl.envs import TensorDictPrimer

from dreamer.agents.parts import ActionCodec
from dreamer.models.controller import Controller
from dreamer.models.mdn_rnn import MDNRNN, LSTMState
from dreamer.models.standardizer import StandardizedVAE, Standardizer
from dreamer.models.vae import VAE


class ControllerPolicy(TensorDictModuleBase):
    """The acting policy: z_t of the observation, h_t of everything before it, and a controller of both.

        z_t ~ q(z | o_t)        h_t, c_t = LSTM([z_{t-1}, a_{t-1}], h_{t-1}, c_{t-1})        a_t = C(z_t, h_t)

    At a start h and c are zero. The environment carries z, h and c to the next step, where h goes on with the action
    that was really taken. A solution of zeros, as before the first generation, gives one and the same action
    everywhere: then V and M are not asked, and what is carried stays zero.

    Args:
        vision: V, or what stands in for it.
        model: M.
        controller: Maps [z, h], or z alone, to actions.
        codec: For the actions.
        observation_key: What V encodes.
        sample_latent: Act on a sample of the encoding, as the paper's code does, or on its mean.

    Reads: the observation, is_init [1], previous_action [A], latent [Z], hidden [D], cell [D].
    Writes: action [A]; ("next", "latent"), ("next", "hidden"), ("next", "cell"), and ("next", "evolved") [1]: whether
        the solution is another one than zeros.
    Source: hardmaru/WorldModelsExperiments@fd982b9 carracing/model.py.
    Differs: h is advanced at the beginning of a step, not at its end, which gives the same.
    """

    solution: Tensor

    def __init__(
        self,
        vision: VAE | Standardizer | StandardizedVAE,
        model: MDNRNN,
        controller: Controller,
        codec: ActionCodec,
        *,
        observation_key: str,
        sample_latent: bool,
    ):
        super().__init__()
        self.vision, self.model, self.controller, self.codec = vision, model, controller, codec
        self.observation_key, self.sample_latent = observation_key, sample_latent
        self.register_buffer("solution", torch.zeros(controller.num_parameters))
        self.in_keys = [observation_key, "is_init", "previous_action", "latent", "hidden", "cell"]
        self.out_keys = ["action", *(("next", key) for key in ("latent", "hidden", "cell", "evolved"))]

    @property
    def vae(self) -> VAE | None:
        """V; None where something stands in for it."""
        return self.vision if isinstance(self.vision, VAE) else None

    def for_population(self, population: Tensor) -> Callable[[TensorDictBase], TensorDictBase]:
        """A policy in which every row acts for a candidate.

        Args:
            population: Parameters of the candidates [P, n], in place of the solution.

        Returns:
            As this policy, and it reads ``candidate`` [1] int64: the number of the candidate. In a step all rows have
            the same noise in their latents.
        """
        return partial(self._act_for, population.to(self.solution.device))

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        rows = tensordict.batch_size.numel()
        if self.solution.any():
            return self._act(tensordict, self.solution.expand(rows, -1))
        layers = self.controller.unflatten(self.solution[None])
        feature = self.solution.new_zeros(1, rows, self.controller.in_features)
        carried = {key: torch.zeros_like(tensordict[key]) for key in ("latent", "hidden", "cell")}
        return self._write(tensordict, self.controller.act(layers, feature)[0], carried, evolved=False)

    @torch.no_grad()
    def _act_for(self, population: Tensor, tensordict: TensorDictBase) -> TensorDictBase:
        noise = torch.randn(1, self.model.latent_size, device=population.device)  # the same luck for all
        return self._act(tensordict, population[tensordict["candidate"].flatten()], noise)

    def _act(self, tensordict: TensorDictBase, parameters: Tensor, noise: Tensor | None = None) -> TensorDictBase:
        """Act with the parameters [N, n] of each row; ``noise`` [1 or N, Z] of the sample of z can be given."""
        shape = tensordict.batch_size
        observation, is_init, previous, latent, hidden, cell = (
            tensordict[key].reshape(-1, *tensordict[key].shape[len(shape) :]) for key in self.in_keys
        )
        state = self.model.step(latent, self.codec.encode(previous), LSTMState(hidden, cell))
        hidden, cell = (part * ~is_init for part in state)  # [N, D]
        posterior = self.vision.encode(observation)
        latent = posterior.sample(noise) if self.sample_latent else posterior.mean  # [N, Z]
        feature = self.controller.observe(latent, hidden).unsqueeze(1)  # [N, 1, F]
        action = self.controller.act(self.controller.unflatten(parameters), feature).squeeze(1)  # [N, A]
        carried = {"latent": latent, "hidden": hidden, "cell": cell}
        carried = {key: value.reshape(*shape, -1) for key, value in carried.items()}
        return self._write(tensordict, action, carried, evolved=True)

    def _write(
        self, tensordict: TensorDictBase, action: Tensor, carried: dict[str, Tensor], *, evolved: bool
    ) -> TensorDictBase:
        tensordict["action"] = self.codec.decode(action).reshape(tensordict["previous_action"].shape)
        for key, value in carried.items():
            tensordict["next", key] = value
        tensordict["next", "evolved"] = torch.full_like(tensordict["is_init"], evolved)
        return tensordict


class ExplorePolicy(TensorDictModuleBase):
    """What acts while episodes are collected: random behaviours, and the controller with noise once it has evolved.

    Args:
        random: Draws random actions.
        codec: For the actions.
        noise: Of the evolved controller: standard deviation for continuous actions, and the chance of a uniformly
            random one for discrete ones.

    Reads: action, which the policy chose; ("next", "evolved"); what ``random`` reads.
    Writes: action; what ``random`` writes.
    """

    def __init__(self, random: TensorDictModuleBase, codec: ActionCodec, noise: float):
        super().__init__()
        self.random, self.codec, self.noise = random, codec, noise
        self.in_keys = [*random.in_keys, "action", ("next", "evolved")]
        self.out_keys = list(random.out_keys)

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        chosen, evolved = tensordict["action"], tensordict["next", "evolved"]
        tensordict = self.random(tensordict)
        if evolved.any():
            noisy, random = self._add_noise(chosen), tensordict["action"]
            evolved = evolved.reshape(*evolved.shape[:-1], *[1] * (random.ndim - evolved.ndim + 1))
            tensordict["action"] = torch.where(evolved, noisy, random)
        return tensordict

    def _add_noise(self, action: Tensor) -> Tensor:
        vector = self.codec.encode(action)  # [..., A]
        if not self.codec.discrete:
            return self.codec.decode((vector + self.noise * torch.randn_like(vector)).clamp(-1, 1))
        size = self.codec.size
        uniform = torch.nn.functional.one_hot(torch.randint(size, vector.shape[:-1], device=vector.device), size)
        replaced = torch.rand(*vector.shape[:-1], 1, device=vector.device) < self.noise
        return self.codec.decode(torch.where(replaced, uniform.float(), vector)).reshape(action.shape)


def make_primers(latent_size: int, hidden_size: int, further: TensorDictPrimer | None = None) -> TensorDictPrimer:
    """What an environment carries for :class:`ControllerPolicy`: zeros at every reset.

    Args:
        latent_size, hidden_size: Of V and M.
        further: Primers of what explores, to be carried besides.
    """
    specs = {"latent": Unbounded(latent_size), "hidden": Unbounded(hidden_size), "cell": Unbounded(hidden_size)}
    specs["evolved"] = Unbounded(1, dtype=torch.bool)
    specs |= {} if further is None else dict(further.primers.items())
    return TensorDictPrimer(Composite(specs), random=False, default_value=0, expand_specs=True)
