"""How much of the background is in the latent: equal training for every agent, then the background alone is swapped.

    python scripts/measure_separation.py --seeds 0 1 --out runs/separation
    python scripts/measure_separation.py --agents dreamer_v3 "world2filter agent.weighted=false" --frames 4_000

Every agent is trained by `dreamer/train.py` on a task behind a ColorGrid: as many frames and updates for each, on what
its own policy sees. Held-out sequences of random actions then show the same physics twice, to the bit: once with the
colours of training, once with a table of colours that nobody has seen. On these:

fg_mse, fg_mse_swap   squared error of the reconstruction on the simulator's foreground, per value in [0, 1]
bg_mse                the same on the background, by whatever rebuilds it; none if nothing does
mask_iou              IoU of the mask that the model believes in with the simulator's
swap_nats             KL between the posteriors before and after the swap
moved                 swap_nats over the KL between posteriors of unrelated states: 0 filters all, about 1 nothing
belief_moved          the same for the distance between recurrent states
r2, r2_swap           what a linear map of the latent, fitted before the swap, explains of positions and velocities,
                      on sequences that it was not fitted on
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_common import describe_load, print_table, write_json
from tensordict import TensorDict
from torch import Tensor

from dreamer.agents import Agent
from dreamer.checkpoint_files import find_checkpoint
from dreamer.checkpoints import load_weights
from dreamer.models.rssm import Rollout
from dreamer.policy import load_agent, read_description
from envs import make_env
from envs.segmentation.metrics import jaccard
from objectives.functional import categorical_kl

ROOT = Path(__file__).parents[1]
HELD_OUT_SEED, OTHER_TABLE = 1_000, 99
RIDGES = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
WARM_UP = 5  # steps of a sequence after which its velocities can be known
COLUMNS = {
    "agent": "<",
    "seed": ">d",
    "fg_mse": ">.4f",
    "fg_mse_swap": ">.4f",
    "bg_mse": ">.4f",
    "mask_iou": ">.3f",
    "swap_nats": ">.2f",
    "moved": ">.3f",
    "belief_moved": ">.3f",
    "r2": ">.3f",
    "r2_swap": ">.3f",
}


class Env(NamedTuple):
    """What is looked at."""

    name: str
    task: str
    distraction: str
    image_size: int

    def overrides(self) -> list[str]:
        """For the command line of training."""
        return [
            f"env.name={self.name}",
            f"env.task={self.task}",
            f"env/distraction={self.distraction}",
            f"env.image_size={self.image_size}",
            "env.render.backend=mjwarp",
        ]


def train(agent: str, seed: int, env: Env, args: argparse.Namespace) -> Path:
    """Train one agent, unless its folder holds just that run.

    Raises:
        ValueError: the folder holds another run.
    """
    run_dir = args.out / "".join(c if c.isalnum() else "_" for c in f"{agent}_{seed}")
    overrides = [
        *(f"agent={word}" if index == 0 else word for index, word in enumerate(agent.split())),
        *env.overrides(),
        f"agent/size={args.size}",
        "agent.downsample=strided",
        "collector=sync",
        f"collector.total_frames={args.frames}",
        "collector.init_random_frames=1000",
        f"train_ratio={args.train_ratio}",
        "replay_buffer.batch_size=8",
        "replay_buffer.sequence_length=32",
        "optimization.warmup_steps=100",
        f"optimization.lr={args.lr}",
        "eval.episodes=1",
        "eval.num_envs=1",
        "logger.backends=[]",
        "checkpoint.replay=false",
        "threads=1",
        f"seed={seed}",
        f"run_dir={run_dir}",
    ]
    if not run_dir.exists():
        command = [sys.executable, str(ROOT / "dreamer/train.py"), *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    start = json.loads((run_dir / "run.json").read_text())["starts"][-1]
    checkpoint, _ = find_checkpoint(run_dir / "checkpoints")
    if start["overrides"] != overrides or int(checkpoint.name.removeprefix("frames_")) < args.frames:
        raise ValueError(f"{run_dir} holds a run of other settings, or one that did not finish: give another --out")
    return run_dir


def collect(settings: dict[str, Any], table_seed: int, args: argparse.Namespace) -> TensorDict:
    """Held-out sequences [N, T] of random actions, as records of a replay, with `mask` and `observation`.

    Args:
        settings: Of the environment, as in training.
        table_seed: Of the colours.
        args: How many sequences, and how long.
    """
    distraction = settings["distraction"] | {"table_seed": table_seed}
    shown = {"pixels_only": False, "emit_mask": True, "distraction": distraction, "seed": HELD_OUT_SEED}
    made = make_env(**settings | shown)
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    keys, sequences = ("pixels", "mask", "observation"), []
    for _ in range(args.sequences):
        step = made.reset()
        action = torch.zeros(made.action_spec.shape)
        records = []
        for _ in range(args.length):
            records.append(
                TensorDict({key: step[key] for key in keys} | {"action": action, "is_init": step["is_init"]})
            )
            action = torch.rand(action.shape, generator=generator) * 2 - 1
            step = made.step(step.set("action", action))["next"]
        sequences.append(torch.stack(records))
    made.close()
    return torch.stack(sequences)


@torch.no_grad()
def observe(agent: Agent, data: TensorDict) -> Rollout:
    """Posterior model states, with the same noise every time."""
    world_model = agent.loss.model.world_model
    torch.manual_seed(0)
    start = world_model.rssm.initial(len(data), data["pixels"].device)
    return world_model.rssm.observe(world_model.encode(data), data["action"], data["is_init"], *start)


@torch.no_grad()
def reconstruct(agent: Agent, rollout: Rollout, data: TensorDict) -> dict[str, Tensor | None]:
    """The foreground, the background and the mask that an agent believes in, [N, T, h, w, C], or None."""
    model = agent.loss.model
    decoded = model.world_model.decoders["pixels"](rollout.belief, rollout.state)
    if decoded.shape[-1] == 3:
        return {"foreground": decoded, "background": decoded, "mask": None}
    background = model.take_apart(rollout, data).get("background")
    return {"foreground": decoded[..., :3], "background": background, "mask": decoded[..., 3:]}


class Probe:
    """A linear map from a latent to what is known, by ridge regression on standardised inputs.

    Args:
        feature: [N, T, F], sequences to fit on; the last third of them decides how strong the ridge is.
        target: [N, T, O].
    """

    def __init__(self, feature: Tensor, target: Tensor):
        split = len(feature) * 2 // 3
        inputs, outputs = feature[:split].flatten(0, 1), target[:split].flatten(0, 1)
        self.centre, self.scale, self.mean = inputs.mean(0), inputs.std(0) + 1e-6, outputs.mean(0)
        inputs, outputs = (inputs - self.centre) / self.scale, outputs - self.mean
        gram, moments = inputs.T @ inputs, inputs.T @ outputs
        maps = [torch.linalg.solve(gram + ridge * torch.eye(len(gram)), moments) for ridge in RIDGES]
        self.map = max(maps, key=lambda weights: self.explains(feature[split:], target[split:], weights))

    def explains(self, feature: Tensor, target: Tensor, weights: Tensor | None = None) -> float:
        """R2, mean over the O columns of the target."""
        inputs, target = (feature.flatten(0, 1) - self.centre) / self.scale, target.flatten(0, 1)
        residual = target - self.mean - inputs @ (self.map if weights is None else weights)
        return float((1 - residual.square().sum(0) / (target - target.mean(0)).square().sum(0)).mean())


def measure(agent: Agent, data: TensorDict, swapped: TensorDict) -> dict[str, float | None]:
    """What the columns of the table say; see the module's docstring."""
    rollout, other = observe(agent, data), observe(agent, swapped)
    made, made_other = reconstruct(agent, rollout, data), reconstruct(agent, other, swapped)
    mask = data["mask"]

    def mse(prediction: Tensor | None, image: Tensor, where: Tensor) -> float | None:
        if prediction is None:
            return None
        return float(((prediction - image / 255).square() * where).sum() / (3 * where.sum()))

    iou = None
    if made["mask"] is not None:
        iou = float(jaccard((made["mask"] > 0.5).flatten(0, 1), mask.flatten(0, 1)).mean())
    nats = categorical_kl(rollout.posterior_logits, other.posterior_logits).mean()
    unrelated = categorical_kl(rollout.posterior_logits, rollout.posterior_logits.roll(1, 0)).mean()
    distance = (rollout.belief - other.belief).norm(dim=-1).mean()
    far = (rollout.belief - rollout.belief.roll(1, 0)).norm(dim=-1).mean()
    fit, held = slice(None, len(data) * 2 // 3), slice(len(data) * 2 // 3, None)
    feature, feature_other = (r.feature[:, WARM_UP:].float() for r in (rollout, other))
    target = data["observation"][:, WARM_UP:]
    probe = Probe(feature[fit], target[fit])
    return {
        "fg_mse": mse(made["foreground"], data["pixels"], mask),
        "fg_mse_swap": mse(made_other["foreground"], swapped["pixels"], mask),
        "bg_mse": mse(made["background"], data["pixels"], ~mask),
        "mask_iou": iou,
        "swap_nats": float(nats),
        "moved": float(nats / unrelated),
        "belief_moved": float(distance / far),
        "r2": probe.explains(feature[held], target[held]),
        "r2_swap": probe.explains(feature_other[held], target[held]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--agents", nargs="+", default=["dreamer_v3", "world2filter"], help="choices of agent, with overrides if quoted"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--name", default="cheetah", help="domain of dm_control")
    parser.add_argument("--task", default="run")
    parser.add_argument("--distraction", default="color_grid_max", help="choice of env/distraction, a ColorGrid")
    parser.add_argument("--size", default="1m", help="choice of agent/size")
    parser.add_argument("--image-size", type=int, default=64, help="pixels")
    parser.add_argument("--frames", type=int, default=10_000, help="training frames")
    parser.add_argument("--train-ratio", type=float, default=30.0, help="replayed steps per collected step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--sequences", type=int, default=192, help="held-out sequences, one episode each")
    parser.add_argument("--length", type=int, default=32, help="steps of each")
    parser.add_argument("--out", type=Path, default=Path("runs/separation"), help="folder of the runs and the table")
    args = parser.parse_args()
    env = Env(args.name, args.task, args.distraction, args.image_size)
    rows, data = [], None
    for seed in args.seeds:
        for agent_name in args.agents:
            run_dir = train(agent_name, seed, env, args)
            description = read_description(run_dir)
            if data is None:
                tables = (description["env"]["distraction"]["table_seed"], OTHER_TABLE)
                data, swapped = (collect(description["env"], table, args) for table in tables)
                if not torch.equal(data["observation"], swapped["observation"]):
                    raise RuntimeError("the physics differs between the two backgrounds: nothing can be compared")
            agent = load_agent(description)
            load_weights(agent.loss, find_checkpoint(run_dir / "checkpoints")[0])
            rows.append({"agent": agent_name, "seed": seed, **measure(agent, data, swapped)})
            print_table(rows[-1:], COLUMNS)
    print(f"\n{env.name}_{env.task}, {args.distraction}, {args.frames:,} frames, {describe_load()}")
    print_table(rows, COLUMNS)
    write_json(args.out / "separation.json", vars(args), rows)


if __name__ == "__main__":
    main()
