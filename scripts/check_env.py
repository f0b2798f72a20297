"""Check an environment before training on it, one line per check; the arguments are those of `dreamer/train.py`.

    python scripts/check_env.py env=gym env.name=my_module:MyEnv-v0 env.from_pixels=true

"ok" is fine, "note" is worth knowing, "FAILED" says what is wrong and what to do. The exit code is 1 if one failed.
"""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import check_env_specs

from dreamer.agents import EnvSpec, load
from envs import SeededTransformedEnv, make_env
from envs.scripted import difference, global_rng, scripted_rollout

DEBUG_SIZE = Path(__file__).parents[1] / "configs" / "agent" / "size" / "debug.yaml"
MAX_STEPS = 2000  # of random actions
MAX_EPISODES = 3
SAME_STEPS = 60  # that are played twice
LARGE_VECTOR = 2000  # numbers; more than this is probably an image
SEED_ADVICE = "call super().reset(seed=seed) in reset and draw every random number from self.np_random"
IMAGE_ADVICE = "let render() return uint8 [h, w, 3] from 0 to 255, drawn anew at each call"


class CheckError(Exception):
    """What is wrong and what to do."""


class Note(str):
    """The answer of a check: worth knowing, but no mistake."""


class Examination:
    """The checks of one environment, in the order of `CHECKS`; each returns what it found.

    Args:
        config: the configuration of a run, plain.
    """

    def __init__(self, config: dict[str, Any]):
        self.config = config
        self.from_pixels = config["env"]["from_pixels"]

    def make(self, seed: int = 0) -> SeededTransformedEnv:
        return make_env(**self.config["env"], seed=self.config["seed"] + seed)

    def creation(self) -> str:
        """It can be made."""
        env = self.make()
        shapes = {key: list(spec.shape) for key, spec in env.base_env.observation_spec.items()}
        env.close()
        return f"{type(env.base_env).__name__} with {shapes}, action {list(env.action_spec.shape)}"

    def data(self) -> str:
        """What comes out has the keys, shapes and types of the specs."""
        env = self.make()
        for where, data in (("reset()", env.reset()), ("step()", env.rand_step(env.reset())["next"])):
            for key, spec in env.observation_spec.items():
                compare(where, key, data.get(key, None), spec)
        logging.getLogger("torchrl").setLevel(logging.WARNING)  # it reports success by itself
        check_env_specs(env, break_when_any_done="both")
        env.close()
        return f"{', '.join(sorted(env.observation_spec.keys()))} as declared"

    def images(self) -> str:
        """Images have the right type and size and show something; vectors are not images in disguise."""
        if not self.from_pixels:
            count = self.make().observation_spec["observation"].shape.numel()
            if count > LARGE_VECTOR:
                return Note(f"observation has {count} numbers: if it is an image, {IMAGE_ADVICE}; env.from_pixels=true")
            return f"none asked for (env.from_pixels=false); the vector has {count} numbers"
        size = self.config["env"]["image_size"]
        images = [step["next", "pixels"] for step in self.steps[:SAME_STEPS]]
        first = images[0]
        if first.dtype != torch.uint8 or tuple(first.shape) != (size, size, 3):
            raise CheckError(f"pixels are {first.dtype} {list(first.shape)}: {IMAGE_ADVICE}")
        if all(torch.equal(image, first) for image in images):
            return Note(f"all of {len(images)} images are equal: {IMAGE_ADVICE}")
        return f"uint8 [{size}, {size}, 3], values from {min(map(torch.min, images))} to {max(map(torch.max, images))}"

    def finite(self) -> str:
        """Rewards and observations are finite."""
        for index, step in enumerate(self.steps):
            for key, value in step["next"].items(True, True):
                if value.is_floating_point() and not value.isfinite().all():
                    wrong = value[~value.isfinite()][0].item()
                    raise CheckError(f"{key} is {wrong} at random step {index}: mend the formula that gives it")
        rewards = torch.cat([step["next", "reward"] for step in self.steps])
        return f"{len(rewards)} random steps, rewards from {rewards.min():.4g} to {rewards.max():.4g}"

    def actions(self) -> str:
        """Every action in range is accepted."""
        env, count = self.make(), 0
        for action in extreme_actions(env):
            try:
                env.step(env.reset().set("action", action))
            except Exception as error:
                raise CheckError(
                    f"action {action.tolist()} is refused ({describe(error)}): accept all of the space"
                ) from error
            count += 1
        env.close()
        return f"{count} extreme actions accepted, {env.action_spec.dtype} {list(env.action_spec.shape)}"

    def ends(self) -> str:
        """Episodes end, for a reason, and start again."""
        terminated = truncated = 0
        for step, following in zip(self.steps, [*self.steps[1:], None], strict=True):
            end = {key: bool(step["next", key]) for key in ("done", "terminated", "truncated")}
            if end["done"] != (end["terminated"] or end["truncated"]):
                raise CheckError(f"{end}: set terminated (the task is over) or truncated (out of time) where done")
            if (
                end["done"]
                and following is not None
                and not (following["is_init"].all() and not following["done"].any())
            ):
                raise CheckError("the observation after an end is no fresh one: let reset() start an episode")
            terminated, truncated = terminated + end["terminated"], truncated + end["truncated"]
        if not terminated + truncated:
            return Note(
                f"no episode ended in {len(self.steps)} steps: returns are logged at ends only, give "
                "gymnasium.register(..., max_episode_steps=...)"
            )
        return f"{terminated} terminated (nothing follows), {truncated} truncated (out of time), resets work"

    def seeds(self) -> str:
        """The seed decides the episode."""
        env = self.make()
        actions = [env.full_action_spec.rand() for _ in range(SAME_STEPS)]
        env.close()
        played = []
        for index, seed in enumerate((0, 0, 1)):
            with global_rng(index):  # so that numbers from the global generators show
                played.append(scripted_rollout(self.make(seed), actions, [False] * len(actions)))
        text = difference(*played[:2])
        if text:
            raise CheckError(f"two environments with the same seed differ: {text}; {SEED_ADVICE}")
        if not difference(played[0], played[2]):
            return Note(f"another seed gives the same episodes: right for a task without chance; else {SEED_ADVICE}")
        return f"the same for {SAME_STEPS} steps, another seed differs"

    def restore(self) -> str:
        """A resumed run goes on in the middle of an episode."""
        env, other = self.make(), self.make()
        current = env.reset()
        for _ in range(SAME_STEPS // 2):
            current = env.step_and_maybe_reset(env.rand_action(current))[1]
        try:
            restored = other.restore_episode(env.episode_state())
        except RuntimeError as error:
            return Note(f"a resumed run will begin new episodes: {describe(error)}")
        action = env.action_spec.rand()
        following = [who.step(data.set("action", action))["next"] for who, data in ((env, current), (other, restored))]
        different = [key for key, value in following[0].items() if not torch.equal(value, following[1][key])]
        if different:
            return Note(f"a resumed run is not exact, {different} differ after a restored episode: {SEED_ADVICE}")
        env.close()
        other.close()
        return "a resumed run goes on to the bit"

    def agent(self) -> str:
        """The configured agent takes the environment as it is, and acts."""
        env, settings = self.make(), dict(self.config["agent"])
        name = settings.pop("name")
        if "size" in settings:
            settings["size"] = OmegaConf.to_container(OmegaConf.load(DEBUG_SIZE))
        device, optimization = torch.device("cpu"), self.config["optimization"]
        agent = load(name).build(env_spec=EnvSpec.of(env), device=device, optimization=optimization, **settings)
        if agent.primers is not None:
            env.append_transform(agent.primers.clone())
        current = env.reset()
        with torch.no_grad():
            for _ in range(10):
                current = env.step_and_maybe_reset(agent.policy(current))[1]
        env.close()
        return f"{name} of size debug has acted 10 steps"

    def speed(self) -> str:
        """How fast it is, and what random actions earn."""
        returns, lengths, total, length = [], [], 0.0, 0
        for step in self.steps:
            total, length = total + step["next", "reward"].item(), length + 1
            if step["next", "done"].item():
                returns, lengths, total, length = [*returns, total], [*lengths, length], 0.0, 0
        rate = f"{len(self.steps) / self.seconds:.0f} steps per second in this process"
        if not returns:
            return f"{rate}; no whole episode"
        count = len(returns)
        return f"{rate}; {count} random episodes: {sum(lengths) / count:.0f} steps, return {sum(returns) / count:.4g}"

    @cached_property
    def steps(self) -> list[TensorDictBase]:
        """Random actions until some episodes have ended, or enough steps."""
        env, steps, ended = self.make(), [], 0
        current = env.reset()
        start = time.perf_counter()
        while len(steps) < MAX_STEPS and ended < MAX_EPISODES:
            arrived, current = env.step_and_maybe_reset(env.rand_action(current))
            steps.append(arrived)
            ended += int(arrived["next", "done"].item())
        self.seconds = time.perf_counter() - start
        env.close()
        return steps


CHECKS = ("creation", "data", "images", "finite", "actions", "ends", "seeds", "restore", "agent", "speed")


def compare(where: str, key: str, value: Tensor | None, spec: Any) -> None:
    """Raise `CheckError` if a value is not as declared."""
    if value is None:
        raise CheckError(f"{where} gives no {key!r}: give it at every reset and step")
    if value.dtype != spec.dtype or value.shape != spec.shape:
        declared = f"{spec.dtype} {list(spec.shape)}"
        raise CheckError(
            f"{where} gives {key!r} as {value.dtype} {list(value.shape)}, declared is {declared}: let them agree"
        )
    if not value.is_floating_point() and not spec.is_in(value):
        raise CheckError(f"{where} gives {key!r} out of the declared range: mend the value or the space")


def extreme_actions(env: SeededTransformedEnv) -> Iterator[Tensor]:
    """The lowest, the middle and the highest action, or every choice."""
    spec = env.action_spec
    if spec.dtype.is_floating_point:
        low, high = spec.space.low, spec.space.high
        yield from (low.clone(), (low + high) / 2, high.clone())
    else:
        yield from torch.eye(spec.shape[-1], dtype=spec.dtype)


def describe(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    name = "" if isinstance(error, CheckError) else f"{type(error).__name__}: "
    return f"{name}{text[:500]}"


def examine(config: dict[str, Any], checks: Sequence[str] = CHECKS) -> bool:
    """Run the checks and print a line for each; returns whether none failed."""
    examination, passed = Examination(config), True
    for name in checks:
        try:
            text = getattr(examination, name)()
            outcome = "note" if isinstance(text, Note) else "ok"
        except Exception as error:  # noqa: BLE001  # whatever the environment raises is the answer
            outcome, text, passed = "FAILED", describe(error), False
        print(f"{outcome:<7} {name}: {text}", flush=True)
        if outcome == "FAILED" and name == "creation":
            break
    return passed


@hydra.main(config_path="../configs", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Check the environment of a configuration."""
    config = OmegaConf.to_container(cfg, resolve=True)
    torch.manual_seed(config["seed"])
    if not examine(config):
        sys.exit(1)


if __name__ == "__main__":
    main()
