"""World Models (Ha & Schmidhuber 2018): an autoencoder V, a recurrent model M, and a small controller, evolved."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import TrainerHookBase

from dreamer.agents import Agent, EnvSpec
from dreamer.agents.assembly import observed_shapes
from dreamer.agents.parts import ActionCodec, ToRecords, make_record
from dreamer.controller_policy import ControllerPolicy, ExplorePolicy, make_primers
from dreamer.controller_stage import ControllerSettings, make_controller_stage
from dreamer.episode_data import CollectStage, EpisodeData
from dreamer.episode_store import Encodings, EpisodeStore, Layout
from dreamer.models.controller import Controller
from dreamer.models.mdn_rnn import MDNRNN
from dreamer.models.standardizer import StandardizedVAE, Standardizer
from dreamer.models.vae import IMAGE_SHAPE, VAE
from dreamer.random_policies import MixedRandomPolicy
from dreamer.stages import Stage, StagedStepper, StageSchedule
from dreamer.world_model_source import (
    ENCODINGS,
    EPISODES,
    TRAINABLE,
    check_sizes,
    check_stages,
    check_world,
    find_encodings,
    find_episodes,
    load_networks,
)
from dreamer.world_model_stages import EncodeStage, MDNRNNStage, StandardizeStage, VAEStage
from objectives.terms import ModuleLoss
from objectives.world_models import MDNRNNLoss, VAELoss

SETTINGS = {
    "vae": {
        "network": ("latent_size", "channels", "batch_norm"),
        "loss": ("free_nats", "beta", "anneal_updates", "calibrated"),
        "stage": ("updates", "batch_size"),
    },
    "mdn_rnn": {
        "network": ("hidden_size", "components"),
        "loss": ("terminated_weight",),
        "stage": ("updates", "batch_size", "sequence_length"),
    },
    "controller": {
        "network": ("inputs", "hidden"),
        "stage": tuple(field.name for field in fields(ControllerSettings)),
    },
}
INPUTS = ("z", "zh")


class WorldModelsLoss(ModuleLoss):
    """What a checkpoint keeps: V, M and the controller; each is trained in a stage of its own, never all at once.

    Args:
        vae: V, or what stands in for it.
        mdn_rnn: M.
        solution: Parameters of the controller, [n].
    """

    in_keys, out_keys = (), ()

    def __init__(self, vae: nn.Module, mdn_rnn: nn.Module, solution: torch.Tensor):
        super().__init__()
        self.vae, self.mdn_rnn = vae, mdn_rnn
        self.register_buffer("solution", solution)


def build(
    *,
    env_spec: EnvSpec,
    device: torch.device,
    optimization: Mapping[str, Any],
    stages: Sequence[str],
    source: str | None,
    untrained: Sequence[str],
    rounds: int,
    save_seconds: float,
    sample_latent: bool,
    action_noise: float,
    vae: Mapping[str, Any],
    mdn_rnn: Mapping[str, Any],
    controller: Mapping[str, Any],
) -> Agent:
    """Assemble the agent; the keys are those of ``configs/agent/world_models.yaml``, where each is explained.

    Source: Ha & Schmidhuber 2018; hardmaru/WorldModelsExperiments@fd982b9.
    Differs: see :class:`VAE`, :class:`MDNRNN`, :class:`MDNRNNStage` and `docs/fidelity.md`.
    """
    check_stages(stages, untrained, source, rounds)
    v, m, c = (divide(name, given) for name, given in (("vae", vae), ("mdn_rnn", mdn_rnn), ("controller", controller)))
    codec, layout = ActionCodec(env_spec.action), make_layout(env_spec)
    vision = make_vision(layout, v["network"], trained="vae" not in untrained).to(device).eval()
    model = MDNRNN(latent_size=vision.latent_size, action_size=codec.size, **m["network"]).to(device)
    small = make_controller(vision.latent_size, model.hidden_size, codec, **c["network"])
    acting = {"observation_key": layout.key, "sample_latent": sample_latent}
    policy = ControllerPolicy(vision, model, small, codec, **acting).to(device)
    random = MixedRandomPolicy(env_spec.action)
    recipe = Recipe(
        policy=policy,
        loss=WorldModelsLoss(vision, model, policy.solution),
        layout=layout,
        sizes={"vae": v["network"] if layout.has_images else {}, "mdn_rnn": m["network"]},
        stages=stages,
        source=source,
        untrained=untrained,
        rounds=rounds,
        vae=v,
        mdn_rnn=m,
        controller=ControllerSettings(**c["stage"]),
        optimization=check_optimization(optimization),
    )
    schedule = StageSchedule(recipe.make_stages, rounds=rounds, save_seconds=save_seconds)
    return Agent(
        policy=policy,
        primers=make_primers(vision.latent_size, model.hidden_size, random.primers),
        loss=recipe.loss,
        stepper=StagedStepper(),
        to_records=ToRecords((layout.key,), codec, carried=()),
        record=make_record(env_spec, (layout.key,), codec),
        make_hooks=recipe.take_over,
        make_schedule=lambda: schedule,
        explore=ExplorePolicy(random, codec, action_noise),
        context_keys=(),
    )


@dataclass(frozen=True)
class Recipe:
    """How the stages of a run are made from its parts and settings; see :func:`build`."""

    policy: ControllerPolicy
    loss: WorldModelsLoss
    layout: Layout
    sizes: Mapping[str, Mapping[str, Any]]
    stages: Sequence[str]
    source: str | None
    untrained: Sequence[str]
    rounds: int
    vae: Mapping[str, Mapping[str, Any]]
    mdn_rnn: Mapping[str, Mapping[str, Any]]
    controller: ControllerSettings
    optimization: Mapping[str, Any]

    def take_over(self) -> Sequence[TrainerHookBase]:
        """Before anything is written: look whether the source has what is needed, and load its networks.

        Raises:
            FileNotFoundError: if something is missing.
            ValueError: for another environment, or networks of other sizes.
        """
        if self.source is not None:
            find_episodes(self.source)
            check_world(self.source, self.layout.shape, self.policy.codec.size)
            self._find_encodings()
            taken = [part for part in TRAINABLE if part not in (*self.stages, *self.untrained)]
            check_sizes(self.source, self._depended_on(taken))
            load_networks(self.source, {part: getattr(self.loss, part) for part in taken})
        return ()

    def _depended_on(self, taken: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        """The sizes of the networks ``taken``, by group; those of M include that of its latents."""
        sizes = {part: self.sizes[part] for part in taken}
        if taken and "vae" not in taken:
            sizes["vae"] = {key: value for key, value in self.sizes["vae"].items() if key == "latent_size"}
        return sizes

    def make_stages(self, trainer: Trainer) -> list[Stage]:
        """The stages of this run, in order."""
        folder = trainer.run_dir / EPISODES if self.source is None else find_episodes(self.source)
        encodings = Encodings(self._find_encodings() or trainer.run_dir / ENCODINGS)
        vision, sample_latent = self.policy.vision, self.policy.sample_latent
        data = EpisodeData(EpisodeStore(folder, self.layout), encodings, vision, sample_latent=sample_latent)
        if self.source is not None:  # a reset counts as a step, as for the trainer
            trainer.further_frames += data.episodes.records * trainer.frame_skip
        makers: dict[str, Callable[[], Stage]] = {
            "collect": lambda: CollectStage(trainer, data.episodes, self.rounds),
            "vae": lambda: self._make_vae_stage(data),
            "encode": lambda: EncodeStage(data, self.policy.solution.device),
            "mdn_rnn": lambda: self._make_mdn_rnn_stage(data),
            "controller": lambda: make_controller_stage(trainer, self.policy, data, self.controller),
        }
        return [makers[name]() for name in self.stages]

    def _find_encodings(self) -> Path | None:
        """Those of the source, if this run needs some and makes none."""
        needed = {"mdn_rnn", "controller"} & set(self.stages) and "encode" not in self.stages
        return find_encodings(self.source) if needed else None

    def _make_vae_stage(self, data: EpisodeData) -> Stage:
        settings = dict(self.vae["stage"])
        settings["updates"] *= "vae" not in self.untrained
        if self.policy.vae is None:  # fitted here or, if it is an untrained V, where episodes are encoded
            return StandardizeStage(data, updates=settings["updates"])
        loss = VAELoss(self.policy.vae, **self.vae["loss"]).to(self.policy.solution.device)
        return VAEStage(loss, data, **settings, lr=self.optimization["vae_lr"], autocast=self.optimization["autocast"])

    def _make_mdn_rnn_stage(self, data: EpisodeData) -> Stage:
        settings, optimization = dict(self.mdn_rnn["stage"]), self.optimization
        settings["updates"] *= "mdn_rnn" not in self.untrained
        settings |= {"lr": optimization["mdn_rnn_lr"], "max_grad_value": optimization["max_grad_value"]}
        loss = MDNRNNLoss(self.policy.model, **self.mdn_rnn["loss"])
        return MDNRNNStage(loss, data, **settings, autocast=optimization["autocast"])


def make_layout(env_spec: EnvSpec) -> Layout:
    """What V sees: images where there are some, else one vector.

    Raises:
        ValueError: for images of another size than V takes.
    """
    shapes = observed_shapes(env_spec)
    key = "pixels" if "pixels" in shapes else "observation"
    if key == "pixels" and shapes[key] != IMAGE_SHAPE:
        raise ValueError(
            f"env gives images of {shapes[key]}: agent=world_models takes {IMAGE_SHAPE}, give env.image_size=64 and "
            "neither grey images nor stacks of them"
        )
    return Layout(key, shapes[key], env_spec.observation[key].dtype)


def make_vision(layout: Layout, settings: Mapping[str, Any], *, trained: bool) -> nn.Module:
    """V, or what stands in for it: where observations are vectors, or where it is not to be trained.

    Raises:
        ValueError: for vectors with a V that is not to be trained.
    """
    if not layout.has_images:
        if not trained:
            raise ValueError(
                f"agent.untrained=[vae]: the environment gives {layout.shape[0]} numbers, which are only standardised, "
                "without weights; leave vae out, or give env.from_pixels=true"
            )
        return Standardizer(*layout.shape)
    vae = VAE(**settings)
    return vae if trained else StandardizedVAE(vae)


def make_controller(latent_size: int, hidden_size: int, codec: ActionCodec, *, inputs: str, hidden: int) -> Controller:
    """The controller of z, or of z and h.

    Raises:
        ValueError: for other inputs.
    """
    if inputs not in INPUTS:
        raise ValueError(f"agent.controller.inputs={inputs!r}: choose one of {INPUTS}")
    features = latent_size + hidden_size * (inputs == "zh")
    return Controller(in_features=features, action_size=codec.size, discrete=codec.discrete, hidden_size=hidden)


def divide(group: str, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Give network, loss and stage their own entries of ``settings``.

    Raises:
        ValueError: for keys that are unknown or missing, and for counts below 0.
    """
    known = {key for keys in SETTINGS[group].values() for key in keys}
    if set(settings) != known:
        raise ValueError(f"agent.{group}={sorted(settings)}: give exactly {sorted(known)}")
    for key in ("updates", "batch_size", "sequence_length"):
        if key in settings and settings[key] < (key != "updates"):
            raise ValueError(f"agent.{group}.{key}={settings[key]}: give at least {int(key != 'updates')}")
    return {part: {key: settings[key] for key in keys} for part, keys in SETTINGS[group].items()}


def check_optimization(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Refuse what the stages do not do, and give the settings back.

    Raises:
        ValueError: for a wish to compile or to capture.
    """
    for key, wish in (("cudagraph", settings["cudagraph"]), ("compile.enabled", settings["compile"]["enabled"])):
        if wish:
            raise ValueError(f"optimization.{key}={wish}: agent=world_models runs eagerly, give false")
    return settings
