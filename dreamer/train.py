"""Train an agent: ``python dreamer/train.py env.name=walker env.task=walk agent/size=12m``.

What runs when, as printed at the start of a run:

in the workers postproc                ToRecords               Turn collected transitions into replay records
in the workers replay_buffer           SequenceReplay.extend   Append records to the rings of their streams
per batch      pre_steps_log           EpisodeStats            Log return and length of the episodes that end
per batch      pre_optim_steps         UpdateRatio             Decide how many updates are owed
  per update   process_optim_batch     SampleReplay            Draw windows of records onto the device
  per update   stepper                 JointStepper            One backward and one optimiser step for the whole loss
  per update   post_optim_log          WriteBackContext        Put the latents of an update back into the replay
  per update   post_optim_log          LogMedia                Show what the model sees and imagines
per batch      post_steps              SyncPolicy              Give the workers the newest weights
per batch      post_steps_log          Evaluate                Run whole episodes in environments of their own
per batch      post_steps_log          SaveCheckpoint          Save all state
at the end     shutdown                Evaluate.finish         Evaluate a last time
at the end     shutdown                SaveCheckpoint.save     Save all state now

Other collectors hand their batches to the learner, which then makes the records itself.
"""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torchrl.collectors import BaseCollector

import envs
from dreamer.agents import Agent, EnvSpec, load
from dreamer.allocator import keep_freed_memory
from dreamer.collection import (
    EnvFactory,
    count_records,
    count_streams,
    count_windows,
    derive_seed,
    make_collector,
    seed_everything,
)
from dreamer.evaluation import EVALUATION
from dreamer.hook_graph import hook_graph
from dreamer.interruption import EXIT_INTERRUPTED, stop_on_signals
from dreamer.loggers import RunLogger, check_backends
from dreamer.nonfinite import check_policy
from dreamer.policy import describe_policy
from dreamer.provenance import record_start
from dreamer.redaction import redact, redact_command
from dreamer.replay import SequenceReplay
from dreamer.report import try_report
from dreamer.run_folder import locked
from dreamer.settings import Start, choose_run_dir, choose_start
from dreamer.trainer import Trainer, make_trainer
from envs.transforms import FiniteGuard

MEDIA = {"interval": "video_interval", "videos": "video", "images": "images", "histograms": "histograms"}
LOGGER = ("backends", "project", "entity", "offline", "video_fps")
POSITIVE = (
    "collector.total_frames",
    "collector.num_collectors",
    "collector.envs_per_collector",
    "collector.timeout",
    "replay_buffer.size",
    "train_ratio",
    "checkpoint.keep",
    "eval.episodes",
    "eval.num_envs",
    "logger.interval",
    "logger.seconds",
)


@hydra.main(config_path="../configs", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Build the parts from the configuration and run them."""
    config, overrides = OmegaConf.to_container(cfg, resolve=True), list(HydraConfig.get().overrides.task)
    run_dir = choose_run_dir(config)
    with locked(run_dir):
        start = choose_start(config, run_dir, overrides, compose)
        check(start.config)
        trainer = build(start)
        record_start(
            run_dir,
            command=redact_command(sys.argv),
            frames=start.frames,
            resumed_from=start.checkpoint and start.checkpoint.name,
            overrides=redact_command(overrides),
        )
        announce(start, trainer)
        with stop_on_signals(trainer):
            try:
                trainer.train()
            finally:
                trainer.logger.close()
                try_report([run_dir], defaults=compose([]))
    if trainer.should_stop():
        sys.exit(EXIT_INTERRUPTED)


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration of a new run with these overrides."""
    return OmegaConf.to_container(hydra.compose("train", overrides=list(overrides)), resolve=True)


def build(start: Start) -> Trainer:
    """Build the trainer of a run, with the state of the checkpoint if there is one.

    The run folder is written to when all else succeeded.
    """
    config, run_dir = start.config, start.run_dir
    env, collection, log, seed = config["env"], config["collector"], config["logger"], config["seed"]
    device = choose_device(config["device"])
    seed_everything(seed)

    env_spec, files = describe(config)
    agent = load(config["agent"]["name"]).build(
        env_spec=env_spec,
        device=device,
        optimization=config["optimization"],
        **without(config["agent"], "name"),
    )
    check_schedule(config, agent)
    further_hooks = agent.make_hooks() if agent.make_hooks else ()
    replay = make_replay(config, agent, device)
    guard = FiniteGuard(config["nan_policy"])
    make = collector_factory(config, agent, env_spec, replay, guard)
    collector = make(start.frames)
    run_dir.mkdir(parents=True, exist_ok=True)
    copy_history(start)
    evaluation = config["eval"]
    eval_env = env if evaluation["distraction"] is None else env | {"distraction": evaluation["distraction"]}
    num_envs = min(evaluation["num_envs"], evaluation["episodes"])
    trainer = make_trainer(
        agent=agent,
        further_hooks=further_hooks,
        collector=collector,
        make_collector=make,
        env=env,
        replay=replay,
        logger=RunLogger(run_dir, config=redact(config), **{key: log[key] for key in LOGGER}),
        run_dir=run_dir,
        make_eval_env=EnvFactory(
            eval_env,
            range(num_envs),
            derive_seed(seed, EVALUATION),
            agent.primers,
            guard=FiniteGuard(config["nan_policy"]),
        ),
        total_frames=collection["total_frames"],
        frame_skip=env["frame_skip"],
        init_random_frames=collection["init_random_frames"],
        train_ratio=config["train_ratio"],
        sync_interval=collection["sync_interval"],
        worker_timeout=collection["timeout"],
        worker_restarts=collection["restart"],
        nan_policy=config["nan_policy"],
        nonfinite_steps=guard.counter,
        log_interval=log["interval"],
        log_seconds=log["seconds"],
        media={name: log[key] for name, key in MEDIA.items()},
        evaluation=without(evaluation, "num_envs", "distraction"),
        checkpoint=config["checkpoint"] | {"files": without(files, "environment.json")},
        seed=derive_seed(seed, EVALUATION),
    )
    go_on(start, trainer)
    for name, text in files.items():
        (run_dir / name).write_text(text)
    return trainer


def describe(config: dict[str, Any]) -> tuple[EnvSpec, dict[str, str]]:
    """Look at an environment of the run: what the agent may know of it, and files that say what was run."""
    env = envs.make_env(**config["env"])
    env_spec, facts = EnvSpec.of(env), env.describe()
    public = redact(config)
    policy = describe_policy(public, env_spec, getattr(env.base_env, "action_bounds", None))
    env.close()
    files = {
        "config.yaml": OmegaConf.to_yaml(OmegaConf.create(public)),
        "policy.json": json.dumps(policy, indent=2),
    }
    return env_spec, files | ({"environment.json": json.dumps(facts, indent=2)} if facts else {})


def collector_factory(
    config: dict[str, Any], agent: Agent, env_spec: EnvSpec, replay: SequenceReplay, guard: FiniteGuard
) -> Callable[[int], BaseCollector]:
    """What makes the collector at the start, and another one when workers failed."""
    env, collection, seed = config["env"], config["collector"], config["seed"]
    threads = config["threads"] or torch.get_num_threads()

    def make(frames: int) -> BaseCollector:
        """Environments that begin after ``frames`` frames have other episodes than those that began before."""
        collector = make_collector(
            env=env,
            policy=agent.policy,
            action_spec=env_spec.action,
            primers=agent.primers,
            to_records=agent.to_records,
            explore=agent.explore,
            replay=replay,
            frame_skip=env["frame_skip"],
            init_random_frames=max(collection["init_random_frames"] - frames, 0),
            seed=derive_seed(seed, frames) if frames else seed,
            guard=guard,
            **without(collection, "total_frames", "sync_interval", "timeout", "restart", "init_random_frames"),
        )
        torch.set_num_threads(threads)  # collectors with workers change it
        return collector

    return make


def go_on(start: Start, trainer: Trainer) -> None:
    """Load the checkpoint of a start, if there is one.

    Raises:
        ValueError: if the changed configuration does not fit what was saved.
    """
    if start.checkpoint is None:
        trainer.logger.start_over()
        return
    try:
        trainer.resume(start.checkpoint)
    except (RuntimeError, ValueError) as error:
        if start.changes:
            changes = ", ".join(start.changes)
            raise ValueError(f"{changes}: does not fit what {start.checkpoint} holds: {error}") from error
        raise
    trainer.incident("resume", f"goes on from {start.checkpoint.name}", changes=list(start.changes))
    for note in start.notes:
        trainer.incident("damaged_checkpoint", note)


def copy_history(start: Start) -> None:
    """Give a run that branches off from a checkpoint of another one the curves up to there."""
    source = start.checkpoint and start.checkpoint.resolve().parents[1] / "metrics.jsonl"
    target = start.run_dir / "metrics.jsonl"
    if source and source.exists() and not target.exists():
        shutil.copy(source, target)


def announce(start: Start, trainer: Trainer) -> None:
    """Say what runs, where, and what is different from before."""
    if start.checkpoint is not None:
        print(f"goes on from {start.checkpoint} ({start.frames:,} frames)")
        print("\n".join(f"  changed: {line}" for line in start.changes) or "  with the saved configuration")
    print(f"{trainer.replay_buffer.describe()}\nrun folder: {start.run_dir}\n{hook_graph(trainer)}", flush=True)


def make_replay(config: dict[str, Any], agent: Agent, device: torch.device) -> SequenceReplay:
    """Make the replay, no larger than the run can fill."""
    collection = config["collector"]
    return SequenceReplay(
        agent.record,
        capacity=count_records(config),
        num_streams=count_streams(*(collection[key] for key in ("mode", "num_collectors", "envs_per_collector"))),
        context_keys=agent.context_keys,
        device=device,
        seed=derive_seed(config["seed"]),
        batch_size=count_windows(config["replay_buffer"]),
        **without(config["replay_buffer"], "size", "batch_size", "batch_unit"),
    )


def without(settings: dict[str, Any], *keys: str) -> dict[str, Any]:
    """A copy of ``settings`` that lacks ``keys``."""
    return {key: value for key, value in settings.items() if key not in keys}


def check(config: dict[str, Any]) -> None:
    """Refuse what the parts themselves would notice late or not at all.

    Raises:
        ValueError: naming the key, the value and what to give instead.
    """
    for name in POSITIVE:
        group, _, key = name.rpartition(".")
        value = (config[group] if group else config)[key]
        if name == "replay_buffer.size" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{name}={value!r}: give a number above 0")
    if config["replay_buffer"]["sequence_length"] < 2:
        raise ValueError(f"replay_buffer.sequence_length={config['replay_buffer']['sequence_length']}: give at least 2")
    check_backends(config["logger"]["backends"])
    check_policy(config["nan_policy"])
    if config["optimization"]["cudagraph"] and config["replay_buffer"]["prefetch"]:
        raise ValueError(
            "optimization.cudagraph=true: give replay_buffer.prefetch=0 as well, because a graph cannot be captured "
            "while another thread copies to the GPU"
        )


def check_schedule(config: dict[str, Any], agent: Agent) -> None:
    """Refuse settings that do not go together with when the agent learns, and from what.

    Raises:
        ValueError: naming the key, the value and what to give instead.
    """
    if agent.make_schedule is None and config["replay_buffer"]["size"] is None:
        raise ValueError("replay_buffer.size=null: this agent learns from what is replayed; give the records to keep")
    collection = config["collector"]
    random_frames = collection["init_random_frames"]
    if agent.make_schedule is not None and agent.explore is None and random_frames > 0:
        raise ValueError(
            f"collector.init_random_frames={random_frames}: this agent learns from actions of its own; give 0"
        )
    if agent.make_schedule is not None and agent.explore is not None and random_frames < collection["total_frames"]:
        raise ValueError(
            f"collector.init_random_frames={random_frames}: this agent knows when to act at random; leave it out"
        )
    if agent.make_schedule is not None and collection["mode"] == "multi_async":
        raise ValueError(
            "collector.mode=multi_async: this agent learns from each batch as it comes; give collector=sync or "
            "collector=multi_sync"
        )


def choose_device(name: str) -> torch.device:
    """The device of the learner; on a CPU, freed memory is kept for the next update."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        keep_freed_memory()
    else:
        torch.set_float32_matmul_precision("high")
    return device


if __name__ == "__main__":
    main()
