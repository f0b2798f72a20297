"""Train an agent: ``python dreamer/train.py env.name=walker env.task=walk agent/size=12m``.

What runs when, as printed at the start of a run:

in the workers postproc                ToRecords               Turn collected transitions into replay records
in the workers replay_buffer           SequenceReplay.extend   Append records to the rings of their streams
per batch      pre_steps_log           EpisodeStats            Log return and length of the episodes that end
per batch      pre_optim_steps         UpdateRatio             Decide how many updates are owed
  per update   process_optim_batch     SampleReplay            Draw windows of records onto the device
  per update   stepper                 JointStepper            One backward and one optimiser step for the whole loss
  per update   post_optim_log          WriteBackContext        Put the latents of an update back into the replay
  per update   post_optim_log          OpenLoopVideo           Write a video that compares real and imagined images
per batch      post_steps              SyncPolicy              Give the workers the newest weights
per batch      post_steps_log          Evaluate                Run whole episodes in environments of their own
per batch      post_steps_log          SaveCheckpoint          Save all state
at the end     shutdown                Evaluate.finish         Evaluate a last time
at the end     shutdown                SaveCheckpoint.save     Save a last time

Other collectors hand their batches to the learner, which then makes the records itself.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

import envs
from dreamer.agents import Agent, EnvSpec, load
from dreamer.allocator import keep_freed_memory
from dreamer.collection import EnvFactory, count_streams, derive_seed, make_collector, to_steps
from dreamer.loggers import RunLogger, check_backends
from dreamer.replay import SequenceReplay
from dreamer.trainer import Trainer, hook_graph, make_trainer

EVALUATION = 2  # tag in derived seeds
POSITIVE = (
    "collector.total_frames",
    "collector.num_collectors",
    "collector.envs_per_collector",
    "collector.timeout",
    "replay_buffer.size",
    "train_ratio",
    "eval.episodes",
    "eval.num_envs",
    "logger.interval",
    "logger.seconds",
)


@hydra.main(config_path="../configs", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Build the parts from the configuration and run them."""
    config = OmegaConf.to_container(cfg, resolve=True)
    check(config)
    run_dir = choose_run_dir(config)
    trainer = build(config, run_dir)
    print(f"{trainer.replay_buffer.describe()}\nrun folder: {run_dir}\n{hook_graph(trainer)}", flush=True)
    trainer.train()


def build(config: dict[str, Any], run_dir: Path) -> Trainer:
    """Build the trainer of a run from its plain configuration. The run folder is made when all else succeeded."""
    env, collection, log, seed = config["env"], config["collector"], config["logger"], config["seed"]
    frame_skip, total_frames = env["frame_skip"], collection["total_frames"]
    device = choose_device(config["device"])
    threads = config["threads"] or torch.get_num_threads()
    torch.manual_seed(seed)

    probe = envs.make_env(**env)
    env_spec, env_facts = EnvSpec.of(probe), probe.describe()
    probe.close()
    agent = load(config["agent"]["name"]).build(
        env_spec=env_spec,
        device=device,
        optimization=config["optimization"],
        **without(config["agent"], "name"),
    )
    replay = make_replay(config, agent, device)
    collector = make_collector(
        env=env,
        policy=agent.policy,
        action_spec=env_spec.action,
        primers=agent.primers,
        to_records=agent.to_records,
        replay=replay,
        frame_skip=frame_skip,
        seed=seed,
        **without(collection, "total_frames", "sync_interval", "timeout"),
    )
    torch.set_num_threads(threads)  # after the collector, because collectors with workers change it
    run_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(config), run_dir / "config.yaml")
    if env_facts:
        (run_dir / "environment.json").write_text(json.dumps(env_facts, indent=2))
    evaluation = config["eval"]
    eval_env = env if evaluation["distraction"] is None else env | {"distraction": evaluation["distraction"]}
    num_envs = min(evaluation["num_envs"], evaluation["episodes"])
    return make_trainer(
        agent=agent,
        collector=collector,
        replay=replay,
        logger=RunLogger(run_dir, **{key: log[key] for key in ("backends", "project", "offline", "video_fps")}),
        run_dir=run_dir,
        make_eval_env=EnvFactory(eval_env, range(num_envs), derive_seed(seed, EVALUATION), agent.primers),
        total_frames=total_frames,
        frame_skip=frame_skip,
        init_random_frames=collection["init_random_frames"],
        train_ratio=config["train_ratio"],
        sync_interval=collection["sync_interval"],
        worker_timeout=collection["timeout"],
        log_interval=log["interval"],
        log_seconds=log["seconds"],
        video_interval=log["video_interval"] if log["video"] else 0,
        evaluation=without(evaluation, "num_envs", "distraction"),
        checkpoint=config["checkpoint"],
        seed=derive_seed(seed, EVALUATION),
    )


def make_replay(config: dict[str, Any], agent: Agent, device: torch.device) -> SequenceReplay:
    """Make the replay, no larger than the run can fill."""
    settings, collection = config["replay_buffer"], config["collector"]
    streams = count_streams(*(collection[key] for key in ("mode", "num_collectors", "envs_per_collector")))
    most = to_steps(collection["total_frames"] + collection["frames_per_batch"], config["env"]["frame_skip"])
    least = 2 * streams * (settings["sequence_length"] + 1)  # two windows in every ring
    return SequenceReplay(
        agent.record,
        capacity=min(settings["size"], max(most, least)),
        num_streams=streams,
        device=device,
        seed=derive_seed(config["seed"]),
        **without(settings, "size"),
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
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{name}={value!r}: give a number above 0")
    if config["replay_buffer"]["sequence_length"] < 2:
        raise ValueError(f"replay_buffer.sequence_length={config['replay_buffer']['sequence_length']}: give at least 2")
    check_backends(config["logger"]["backends"])
    if config["optimization"]["cudagraph"] and config["replay_buffer"]["prefetch"]:
        raise ValueError(
            "optimization.cudagraph=true: give replay_buffer.prefetch=0 as well, because a graph cannot be captured "
            "while another thread copies to the GPU"
        )


def choose_run_dir(config: dict[str, Any]) -> Path:
    """The run folder; it is not made yet.

    Raises:
        FileExistsError: if the folder that the user names holds a run already.
    """
    env = config["env"]
    parts = (
        config["agent"]["name"],
        env["name"],
        env["task"],
        config["seed"],
        datetime.now().strftime("%Y%m%d-%H%M%S"),
    )
    name = "_".join(str(part).replace("/", "-") for part in parts if part is not None)
    run_dir = Path(config["run_dir"] or Path("runs") / name)
    if (run_dir / "config.yaml").exists():
        raise FileExistsError(f"run_dir={run_dir}: holds a run already, name another folder")
    return run_dir


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
