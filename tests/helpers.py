"""Small agents, batches and runs for the tests of the networks, the losses and the program."""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.collectors import Collector
from torchrl.data import Bounded, Composite, TensorSpec, Unbounded

import envs.make
from dreamer.agents import Agent, EnvSpec, load
from dreamer.collection import make_collector
from dreamer.models.rssm import RSSM
from dreamer.replay import SequenceReplay
from dreamer.settings import choose_start
from dreamer.train import build
from dreamer.trainer import Trainer
from envs.backends.mock import MockEnv

CONFIGS = Path(__file__).parents[1] / "configs"
IMAGE = (16, 16, 3)  # the smallest that four stages can halve
VECTOR = (5,)
ACTION = Bounded(-1.0, 1.0, (2,))


def compose_config(*overrides: str) -> dict[str, Any]:
    """The configuration of a run as plain containers."""
    return deepcopy(compose_once(*overrides))


@lru_cache
def compose_once(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.to_container(compose("train", overrides=list(overrides)), resolve=True)


def make_env_spec(
    *, pixels: bool = True, vector: bool = True, action: TensorSpec = ACTION, vector_size: int = VECTOR[0]
) -> EnvSpec:
    specs = {"pixels": Bounded(0, 255, IMAGE, dtype=torch.uint8)} if pixels else {}
    if vector:
        specs["observation"] = Unbounded((vector_size,))
    return EnvSpec(Composite(specs), action)


def make_small_agent(
    *overrides: str, env_spec: EnvSpec | None = None, device: torch.device | str = "cpu", randomize: bool = False
) -> Agent:
    """A DreamerV3 agent of the debug size, always with the same weights. The global generator is seeded.

    Args:
        overrides: For the configuration, such as ``agent.unimix=0.5``.
        env_spec: Default: an image, a vector and two continuous actions.
        device: Where the learner lives.
        randomize: Also fill the output layers that start at zero, so that gradients flow through them.
    """
    config = compose_config("agent/size=debug", *overrides)
    torch.manual_seed(0)
    knobs = config["agent"]
    agent = load(knobs.pop("name")).build(
        env_spec=env_spec or make_env_spec(),
        device=torch.device(device),
        optimization=config["optimization"],
        **knobs,
    )
    if randomize:
        randomize_outputs(agent)
    return agent


@torch.no_grad()
def randomize_outputs(agent: Agent) -> None:
    """Give the heads that start at zero, and the slow critic, distributions of moderate values around zero."""
    actor_critic, model = agent.loss.actor_critic, agent.loss.model.world_model
    for head in (model.reward_head, actor_critic.critic, actor_critic.slow_critic):
        output = head[-1]
        output.weight.normal_(std=output.in_features**-0.5)
        middle = (output.out_features - 1) / 2
        output.bias.copy_(-0.01 * (torch.arange(output.out_features) - middle).square())


def make_batch(agent: Agent, batch_size: int = 2, length: int = 4, seed: int = 0) -> TensorDict:
    """A replay sample with random content: no resets and no ends."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, length)
    model = agent.loss.model.world_model

    def fill(leaf: Tensor) -> Tensor:
        size = (*shape, *leaf.shape)
        if leaf.dtype == torch.bool:
            return torch.zeros(size, dtype=torch.bool)
        if leaf.dtype == torch.uint8:
            return torch.randint(256, size, dtype=torch.uint8, generator=generator)
        return torch.randn(size, generator=generator)

    batch = TensorDict({key: fill(leaf) for key, leaf in agent.record.exclude("belief", "state").items()}, batch_size)
    if not agent.context_keys:
        return batch.to(next(agent.loss.parameters()).device)
    size = (batch_size, model.rssm.categoricals)
    classes = torch.randint(model.rssm.classes, size, dtype=torch.uint8, generator=generator)
    belief = torch.rand(batch_size, model.rssm.belief_size, generator=generator) * 2 - 1
    batch["context"] = TensorDict(
        {
            "belief": belief.bfloat16(),
            "state": classes,
            "stream": torch.zeros(batch_size, dtype=torch.int64),
            "position": torch.arange(1, batch_size + 1),
        },
        batch_size,
    )
    return batch.to(next(agent.loss.parameters()).device)


def make_rssm(seed: int = 0, **overrides: Any) -> RSSM:
    """An RSSM with two blocks of four, three latents with four classes."""
    torch.manual_seed(seed)
    sizes = {"embed_size": 6, "action_size": 2, "belief_size": 8, "hidden_size": 5, "classes": 4, "categoricals": 3}
    return RSSM(**sizes | {"blocks": 2} | overrides)


def pick_classes(index: Tensor, classes: int) -> Tensor:
    """Noise with which `sample_onehot` picks class ``index`` [...]: [..., K]."""
    return F.one_hot(index, classes).float()


def fix_samples(agent: Agent, seed: int = 0) -> None:
    """Let latents and imagined actions be the same whatever the logits, so that precision cannot change them."""
    rssm = agent.loss.model.world_model.rssm
    observe, imagine = rssm.observe, rssm.imagine

    def noise(rows: int, steps: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(rssm.classes, (rows, steps, rssm.categoricals), generator=generator)
        return pick_classes(index, rssm.classes)

    def act(feature: Tensor, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed + step)
        return torch.rand(len(feature), agent.policy.codec.size, generator=generator) * 2 - 1

    rssm.observe = lambda embed, *rest: observe(embed, *rest, noise(*embed.shape[:2]))
    rssm.imagine = lambda policy, belief, state, horizon: imagine(
        lambda feature, step: (policy(feature, step), act(feature, step))[1],  # the actor runs all the same
        belief,
        state,
        horizon,
        noise(len(belief), horizon),
    )


def set_episode_length(monkeypatch: Any, frames: int) -> None:
    """Make the episodes of all mock environments of this process ``frames`` long."""
    monkeypatch.setitem(envs.make.BACKENDS, "mock", partial(MockEnv, episode_length=frames))


MOCK = {"backend": "mock", "name": "counter", "task": "continuous", "frame_skip": 1, "from_pixels": False}


def make_mock_parts(
    *overrides: str, streams: int = 2, steps_per_batch: int = 8, random_steps: int = 0, **env: Any
) -> tuple[Agent, SequenceReplay, Collector]:
    """An agent, its replay and its collector on ``streams`` mock environments in this process."""
    env = MOCK | env
    probe = envs.make.make_env(**env)
    env_spec = EnvSpec.of(probe)
    agent = make_small_agent(*overrides, env_spec=env_spec)
    replay = SequenceReplay(agent.record, capacity=400, num_streams=streams, batch_size=4, sequence_length=6)
    collector = make_collector(
        mode="sync",
        env=env,
        policy=agent.policy,
        action_spec=env_spec.action,
        primers=agent.primers,
        to_records=agent.to_records,
        replay=replay,
        frame_skip=env["frame_skip"],
        num_collectors=1,
        envs_per_collector=streams,
        frames_per_batch=steps_per_batch * streams * env["frame_skip"],
        init_random_frames=random_steps * streams * env["frame_skip"],
        seed=0,
    )
    return agent, replay, collector


SMALL_V1 = (
    "agent=dreamer_v1",
    "agent.belief_size=8",
    "agent.state_size=4",
    "agent.hidden_size=8",
    "agent.depth=2",
    "agent.units=8",
    "agent.imagination_horizon=5",
    "replay_buffer.batch_unit=windows",
)
SHORT_RUN = (
    "env=mock",
    "env.name=counter",
    "collector=sync",
    "replay_buffer.batch_size=2",
    "replay_buffer.sequence_length=4",
    "replay_buffer.prefetch=0",
    "collector.envs_per_collector=2",
    "collector.frames_per_batch=8",
    "collector.init_random_frames=16",
    "collector.total_frames=96",
    "train_ratio=2",
    "logger.backends=[]",
    "logger.video=false",
    "eval.interval=0",
    "eval.episodes=1",
    "checkpoint.interval=0",
    "device=cpu",
)
SMALL_WM = (
    "agent=world_models",
    "agent.vae.latent_size=3",
    "agent.vae.channels=[4,4,4,4]",
    "agent.vae.updates=3",
    "agent.vae.batch_size=4",
    "agent.mdn_rnn.hidden_size=6",
    "agent.mdn_rnn.components=2",
    "agent.mdn_rnn.updates=4",
    "agent.mdn_rnn.batch_size=3",
    "agent.mdn_rnn.sequence_length=6",
    "agent.controller.population=4",
    "agent.controller.generations=3",
    "agent.controller.trials=2",
    "agent.controller.max_steps=5",
    "agent.controller.eval_interval=0",
    "collector.init_random_frames=1000",
)
SMALL_PPO = ("agent=ppo", "agent.units=8", "agent.minibatch_size=4", "collector.init_random_frames=0")
SMALL_V3 = ("agent/size=debug", "agent.imagination_horizon=3", "optimization.warmup_steps=0", "optimization.lr=1e-3")
SMALL_RUN = (*SHORT_RUN, *SMALL_V3)


def make_run(run_dir: Path, *overrides: str, base: Sequence[str] = SMALL_RUN) -> Trainer:
    """The trainer of a small run on two mock environments, everything a function of the seed.

    With ``resume=...`` among the overrides it goes on from the newest checkpoint in ``run_dir``.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    overrides = (*base, *overrides)
    config = compose_config(*overrides)
    return build(choose_start(config, run_dir, overrides, lambda extra: compose_config(*extra)))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def optimiser_state(trainer: Trainer) -> dict[str, Tensor]:
    """Averages and counters of the optimiser, flat."""
    state = trainer.optimization_stepper.state_dict()["optimizer"]
    flat = {f"{i}/{key}": value for i, entry in state["state"].items() for key, value in entry.items()}
    return flat | {f"step/{i}": torch.tensor(group.get("step", 0)) for i, group in enumerate(state["param_groups"])}


def differing(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> list[str]:
    """Names whose tensors are not bit-equal."""
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def gradient_size(parameters: Iterable[nn.Parameter]) -> float:
    """Largest absolute gradient; parameters without one count as 0."""
    return max((p.grad.abs().max().item() for p in parameters if p.grad is not None), default=0.0)


def stop_at_update(trainer: Trainer, count: int) -> None:
    """Ask the trainer to stop during update ``count``, as a signal would."""
    step = trainer.optimization_stepper.step

    def counting(*args):
        if trainer.update_count + 1 == count:
            trainer.request_stop("SIGTERM")
        return step(*args)

    trainer.optimization_stepper.step = counting
