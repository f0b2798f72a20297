"""A trained agent as a function: ``action = Policy.load("runs/my_run")(observation)``.

Neither the simulator nor the configuration library is needed. ``policy.json``, in the run folder and in every
checkpoint, says what to build; the weights come from a checkpoint that was verified or from an exported folder:

    python -m dreamer.policy run=runs/my_run out=my_policy

What is loaded may come from strangers: descriptions are plain JSON that is checked, weights are plain tensors, and
nothing is unpickled.
"""

import hashlib
import json
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.data import Bounded, Categorical, Composite, OneHot, TensorSpec, Unbounded
from torchrl.envs import TensorDictPrimer
from torchrl.envs.utils import set_exploration_type

from dreamer.agents import Agent, EnvSpec, load
from dreamer.checkpoint_files import MANIFEST, find_checkpoint
from dreamer.checkpoints import load_weights
from dreamer.evaluation import EXPLORATION, preserve_rng
from dreamer.redaction import expand_home

FORMAT = 1
DESCRIPTION, WEIGHTS = "policy.json", "policy.safetensors"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.uint8, torch.int64, torch.float32, torch.bool)}
LARGEST = 2**28  # elements of an observation or choices of an action
EAGER = {"autocast": False, "compile": {"enabled": False}, "cudagraph": False}  # settings of a learner that never runs
NOT_FOR_ACTING = ("decoder", "decoders", "reward_head", "continue_head")  # parts of a world model
BOOKKEEPING = ("is_init", "previous_action", "previous_reward", "stream")  # of an environment; no observations


def describe_policy(
    config: Mapping[str, Any], env_spec: EnvSpec, action_bounds: Sequence[Sequence[float]] | None = None
) -> dict[str, Any]:
    """Describe what must be built to act, as JSON.

    Args:
        config: Of the run; `agent`, `optimization`, `env` and `seed` are kept.
        env_spec: What the agent was built for.
        action_bounds: Lowest and highest action of the simulator itself, each [A], to which -1 and 1 correspond.

    Raises:
        ValueError: for an observation or action that cannot be described.
    """
    action = describe_action(env_spec.action)
    if action_bounds is not None:
        action["bounds"] = [[float(value) for value in bound] for bound in action_bounds]
    observation = {
        key: {"shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}
        for key, spec in env_spec.observation.items()
    }
    kept = {key: config[key] for key in ("agent", "optimization", "env", "seed")}
    description = {"format": FORMAT, **kept, "observation": observation, "action": action}
    rebuild_spec(description)
    return description


def describe_action(spec: TensorSpec) -> dict[str, Any]:
    """Describe one vector of continuous actions in [-1, 1], or one choice."""
    dtype = str(spec.dtype).removeprefix("torch.")
    if type(spec) is OneHot and spec.ndim == 1:
        return {"kind": "one_hot", "choices": spec.space.n, "dtype": dtype}
    if type(spec) is Categorical and spec.ndim == 0:
        return {"kind": "number", "choices": spec.space.n, "dtype": dtype}
    if isinstance(spec, Bounded) and spec.ndim == 1:
        return {"kind": "continuous", "size": spec.shape[0], "dtype": dtype}
    raise ValueError(f"action spec {spec}: give one vector of continuous actions, or one one-hot or categorical action")


def rebuild_spec(description: Mapping[str, Any]) -> EnvSpec:
    """What :func:`describe_policy` was told of the environment.

    Raises:
        ValueError: for anything that it would not have written.
    """
    observation, action = description.get("observation"), description.get("action")
    if not isinstance(observation, dict) or not observation or not isinstance(action, dict):
        raise ValueError(f"{DESCRIPTION}: observation={observation!r} and action={action!r} must describe something")
    specs = {}
    for key, entry in observation.items():
        shape, dtype = (entry.get("shape"), entry.get("dtype")) if isinstance(entry, dict) else (None, None)
        if not isinstance(shape, list) or len(shape) > 4 or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"{DESCRIPTION}: observation {key!r} has shape {shape!r}, no list of at most 4 sizes")
        if dtype not in DTYPES or math.prod(shape) > LARGEST:
            raise ValueError(f"{DESCRIPTION}: observation {key!r} is {dtype!r} {shape}: choose one of {list(DTYPES)}")
        specs[key] = Unbounded(torch.Size(shape), dtype=DTYPES[dtype])
    return EnvSpec(Composite(specs), rebuild_action(action))


def rebuild_action(action: Mapping[str, Any]) -> TensorSpec:
    """Invert :func:`describe_action`."""
    kind, dtype = action.get("kind"), DTYPES.get(str(action.get("dtype")))
    count = action.get("size" if kind == "continuous" else "choices")
    if type(count) is not int or not 0 < count <= LARGEST or dtype is None:
        raise ValueError(f"{DESCRIPTION}: action={dict(action)!r} has no size, or a type other than {list(DTYPES)}")
    if kind == "continuous" and dtype.is_floating_point:
        return Bounded(-1.0, 1.0, torch.Size([count]), dtype=dtype)
    if kind == "one_hot":
        return OneHot(count, dtype=dtype)
    if kind == "number":
        return Categorical(count, dtype=dtype)
    raise ValueError(f"{DESCRIPTION}: action.kind={kind!r} of type {dtype}: choose continuous, one_hot or number")


def load_agent(description: Mapping[str, Any], device: torch.device | str = "cpu") -> Agent:
    """Build the agent of a description, with new weights. Global random numbers stay as they are.

    Raises:
        ValueError: for a description of another format, an unknown agent, or shapes that make no sense.
        TypeError: for settings that the agent does not have.
    """
    if description.get("format") != FORMAT:
        raise ValueError(f"{DESCRIPTION}: format={description.get('format')!r}, but this version reads {FORMAT}")
    settings, optimization = description.get("agent"), description.get("optimization")
    if not isinstance(settings, dict) or not isinstance(optimization, dict):
        raise ValueError(
            f"{DESCRIPTION}: agent={settings!r}, optimization={optimization!r}: give the settings of a run"
        )
    knobs = {key: value for key, value in settings.items() if key != "name"}
    eager = {key: EAGER.get(key, value) for key, value in optimization.items()}
    module, env_spec = load(str(settings.get("name"))), rebuild_spec(description)
    with preserve_rng(0):
        return module.build(env_spec=env_spec, device=torch.device(device), optimization=eager, **knobs)


class Acting(NamedTuple):
    """What acts, with trained weights.

    Args:
        policy: Reads observations and recurrent state, writes actions and recurrent state.
        primers: The recurrent state, or None.
        description: See :func:`describe_policy`.
        source: Folder of the weights.
        frames: Frames that the weights were trained on, if known.
    """

    policy: TensorDictModuleBase
    primers: TensorDictPrimer | None
    description: dict[str, Any]
    source: Path
    frames: int | None

    @property
    def env_spec(self) -> EnvSpec:
        """What the agent was built for."""
        return rebuild_spec(self.description)

    @property
    def keys(self) -> list[str]:
        """Keys of the observations that the policy reads."""
        observations = self.description["observation"]
        return [key for key in self.policy.in_keys if key in observations and key not in BOOKKEEPING]


def load_acting(path: Path | str, *, checkpoint: str = "newest", device: torch.device | str = "cpu") -> Acting:
    """Load what acts from a run folder, a checkpoint or an exported folder.

    Args:
        path: The folder.
        checkpoint: Of a run folder: "newest" whole one, "best", or the path or name of another.
        device: Where to act.

    Raises:
        FileNotFoundError: if there is nothing to load.
        Damaged: if a file is not as it was written.
        ValueError: if description and weights do not fit, or are nothing that this program writes.
    """
    path = Path(path)
    if (path / WEIGHTS).exists():
        return load_exported(path, device)
    source = choose_checkpoint(path, checkpoint)
    description = read_description(source)
    agent = load_agent(description, device)
    manifest = load_weights(agent.loss, source)
    return Acting(drop_unused(agent.policy), agent.primers, description, source, manifest.get("frames"))


def load_exported(path: Path, device: torch.device | str) -> Acting:
    """Load what :meth:`Policy.export` wrote."""
    description = read_description(path)
    weights = description.get("weights")
    data = (path / WEIGHTS).read_bytes()
    if not isinstance(weights, dict) or weights.get("sha256") != hashlib.sha256(data).hexdigest():
        raise ValueError(f"{path / WEIGHTS} is not what {DESCRIPTION} says: export the policy again")
    agent = load_agent(description, device)
    policy, state = drop_unused(agent.policy), safetensors.torch.load(data)
    expected = policy.state_dict()
    wrong = sorted(expected.keys() ^ state.keys())
    wrong += [name for name in expected if name in state and expected[name].dtype != state[name].dtype]
    if wrong:
        raise ValueError(f"{path / WEIGHTS}: missing, unknown or of another type: {wrong[:5]}")
    policy.load_state_dict(state)
    return Acting(policy, agent.primers, description, path, weights.get("frames"))


def choose_checkpoint(path: Path, checkpoint: str) -> Path:
    """The checkpoint that is meant by a folder and a word, a name or a path."""
    folder = path / "checkpoints"
    if checkpoint == "newest" and not (path / MANIFEST).exists():
        source, damaged = find_checkpoint(folder)
        for reason in damaged:
            warnings.warn(f"an older checkpoint is used: {reason}", stacklevel=4)
        return source
    for source in (path, folder / checkpoint, Path(checkpoint)):
        if (source / MANIFEST).exists():
            return source
    raise FileNotFoundError(f"checkpoint={checkpoint!r}: none in {folder}, give newest, best, a name in it or a path")


def read_description(folder: Path) -> dict[str, Any]:
    """Read ``policy.json``.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no JSON object.
    """
    if not (folder / DESCRIPTION).exists():
        raise FileNotFoundError(f"{folder / DESCRIPTION} is missing: name a run folder, a checkpoint or an export")
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{folder / DESCRIPTION} is no JSON: {error}") from error
    if not isinstance(description, dict):
        raise ValueError(f"{folder / DESCRIPTION} is no JSON object")
    return expand_home(description)


def drop_unused(policy: TensorDictModuleBase) -> TensorDictModuleBase:
    """Empty the parts that acting does not need, so that they take neither memory nor space in an export."""
    for module in list(policy.modules()):
        for name in NOT_FOR_ACTING:
            if isinstance(getattr(module, name, None), nn.Module):
                setattr(module, name, nn.ModuleDict())
    return policy


class Policy:
    """Acts in one environment, or in N side by side, and remembers what it has seen since the reset.

    Args:
        acting: What acts.
        deterministic: Take the mode of the actor instead of a sample. Latents are sampled in any case.
        seed: Of the samples, which leave the global random numbers as they are.
    """

    def __init__(self, acting: Acting, *, deterministic: bool = False, seed: int = 0):
        self.acting, self.deterministic, self.seed = acting, deterministic, seed
        self.device = next(acting.policy.parameters()).device
        self.spec, self.keys = acting.env_spec, acting.keys
        self._state: TensorDict | None = None
        self._random: list[Tensor] = []

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        checkpoint: str = "newest",
        deterministic: bool = False,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> "Policy":
        """Load a policy; see :func:`load_acting` and :class:`Policy`."""
        return cls(load_acting(path, checkpoint=checkpoint, device=device), deterministic=deterministic, seed=seed)

    def reset(self, rows: Sequence[int] | np.ndarray | Tensor | None = None) -> None:
        """Begin new episodes.

        Args:
            rows: Of a batch, the rows that begin one, as numbers or as a bool vector [N]; None for all.
        """
        if rows is None:
            self._state = None
        elif self._state is not None:
            index = torch.as_tensor(rows, device=self.device)
            self._state[index] = self._first_state(self._state.batch_size)[index]

    @torch.no_grad()
    def __call__(self, observation: Any) -> Any:
        """Choose an action.

        Args:
            observation: Arrays or tensors by key, each of one observation or of N, or the bare one if there is one
                key only. Images are uint8 [h, w, 3], vectors float [O].

        Returns:
            Continuous: [A] or [N, A] float32 in [-1, 1]. Discrete: the number of the choice, an int or [N] int64. As
            tensors if a tensor was given, else as numpy arrays.

        Raises:
            ValueError: for missing keys, another shape or type, or a number of rows that changes without a reset.
        """
        given = observation if isinstance(observation, Mapping) else dict.fromkeys(self.keys[:1], observation)
        if missing := [key for key in self.keys if key not in given]:
            raise ValueError(f"observation without {missing}: this policy needs {self.keys}")
        tensors = {key: read_array(key, given[key], self.spec.observation[key]) for key in self.keys}
        shape = {value.shape[: value.ndim - self.spec.observation[key].ndim] for key, value in tensors.items()}
        state = self._state if self._state is not None else self._first_state(*sorted(shape)[:1])
        if shape != {state.batch_size}:
            raise ValueError(f"observations of batch size {sorted(shape)} after {state.batch_size}: call reset() first")
        with self._own_random_numbers(), set_exploration_type(EXPLORATION[self.deterministic]):
            step = self.acting.policy(state.copy().update(tensors))
        self._state = state.select("is_init", "previous_action").update(step["next"].select(*self._carried()))
        self._state.update({"is_init": torch.zeros_like(step["is_init"]), "previous_action": step["action"]})
        return self._answer(step["action"], [given[key] for key in self.keys])

    def export(self, folder: Path | str) -> Path:
        """Write what acting needs into a new folder: ``policy.json`` and ``policy.safetensors``.

        Raises:
            FileExistsError: if there is something in the folder.
        """
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty: name a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.contiguous().cpu() for name, tensor in self.acting.policy.state_dict().items()}
        data = safetensors.torch.save(state)
        weights = {"sha256": hashlib.sha256(data).hexdigest(), "frames": self.acting.frames}
        (folder / WEIGHTS).write_bytes(data)
        (folder / DESCRIPTION).write_text(json.dumps({**self.acting.description, "weights": weights}, indent=2))
        return folder

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """Go on with the random numbers of this policy inside; networks draw from the global generators."""
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(cuda) if self._random else preserve_rng(self.seed):
            for index, state in enumerate(self._random):
                torch.cuda.set_rng_state(state, self.device) if index else torch.set_rng_state(state)
            yield
            self._random = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in cuda)]

    def _carried(self) -> dict[str, TensorSpec]:
        """What the policy writes for its next step; what explores in its place may carry more."""
        primers = {} if self.acting.primers is None else self.acting.primers.primers
        return {key: spec for key, spec in primers.items() if ("next", key) in self.acting.policy.out_keys}

    def _first_state(self, shape: torch.Size) -> TensorDict:
        state = {key: spec.zero(shape) for key, spec in self._carried().items()}
        state |= {"previous_action": self.spec.action.zero(shape), "is_init": torch.ones(*shape, 1, dtype=torch.bool)}
        return TensorDict(state, shape, device=self.device)

    def _answer(self, action: Tensor, given: list[Any]) -> Any:
        kind = self.acting.description["action"]["kind"]
        if kind == "continuous":
            action = action.clamp(-1, 1)  # as environments do with what they are given
        elif kind == "one_hot":
            action = action.argmax(-1)
        devices = [value.device for value in given if isinstance(value, Tensor)]
        if devices:
            return action.to(devices[0])
        return action.numpy(force=True) if action.ndim else action.item()


def read_array(key: str, value: Any, spec: TensorSpec) -> Tensor:
    """An observation as a tensor of its own, checked.

    Raises:
        ValueError: for another shape or type; floats of any width are taken where floats are expected.
    """
    tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value, order="C"))
    if tensor.is_floating_point() and spec.dtype.is_floating_point:
        tensor = tensor.to(spec.dtype)
    shape = tuple(spec.shape)
    if tensor.dtype != spec.dtype or tensor.ndim - len(shape) not in (0, 1) or tensor.shape[-len(shape) :] != shape:
        raise ValueError(
            f"observation {key!r} is {tensor.dtype} {tuple(tensor.shape)}: give {spec.dtype} {shape}, or [N] of them"
        )
    return tensor


def main(arguments: Sequence[str]) -> None:
    """Export the policy of a run: ``run=<folder> out=<folder> [checkpoint=newest|best|<path>]``."""
    options = dict(argument.partition("=")[::2] for argument in arguments)
    if not {"run", "out"} <= options.keys() <= {"run", "out", "checkpoint"}:
        raise SystemExit(f"usage: python -m dreamer.policy run=<folder> out=<folder> [checkpoint=best], not {options}")
    policy = Policy.load(options["run"], checkpoint=options.get("checkpoint", "newest"))
    folder = policy.export(options["out"])
    size = (folder / WEIGHTS).stat().st_size / 1e6
    print(f"{policy.acting.source} -> {folder}: {size:.1f} MB")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
