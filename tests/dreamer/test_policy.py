"""A policy outside of the program acts as the training policy does, and what is loaded is checked."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Categorical
from torchrl.envs.utils import ExplorationType, set_exploration_type

from dreamer.checkpoint_files import Damaged
from dreamer.evaluation import preserve_rng
from dreamer.policy import DESCRIPTION, WEIGHTS, Policy, load_agent, main, read_description
from envs import make_env
from tests.dreamer.saved_policies import OTHERS, PIXELS, SMALL, save_run
from tests.helpers import compose_config, differing, snapshot

ROOT = Path(__file__).parents[2]
KINDS = {
    "vector": (),
    "both": (*PIXELS, "env.pixels_only=false"),
    "one-hot pixels": ("env.task=discrete", *PIXELS),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a vector observation, only to be read."""
    folder = tmp_path_factory.mktemp("run")
    save_run(folder)
    return folder


def play(agent, *overrides: str, base=SMALL, steps: int = 24, seed: int = 3) -> list[TensorDict]:
    """What the training policy sees and does over several episodes, with its own random numbers."""
    env = make_env(**compose_config(*base, *overrides)["env"])
    env.append_transform(agent.primers.clone())
    seen = []
    with preserve_rng(seed):
        current = env.reset()
        for _ in range(steps):
            current = agent.policy(current)
            seen.append(current.clone())
            _, current = env.step_and_maybe_reset(current)
    return seen


def follow(policy: Policy, seen: list[TensorDict]) -> list:
    """What a policy does where another one was."""
    actions = []
    for step in seen:
        if step["is_init"]:
            policy.reset()
        actions.append(policy({key: step[key].numpy() for key in policy.keys}))
    return actions


def as_answers(seen: list[TensorDict]) -> list:
    """The actions of the training policy as a policy gives them."""
    if seen[0]["action"].dtype == torch.int64:
        return [int(step["action"].argmax()) for step in seen]
    return [step["action"].clamp(-1, 1).tolist() for step in seen]


class TestActs:
    @pytest.mark.parametrize("kind", KINDS)
    def test_as_in_training(self, kind, tmp_path):
        """Bit by bit and over resets, from a checkpoint and from a smaller export."""
        agent = save_run(tmp_path / "run", *KINDS[kind])
        seen = play(agent, *KINDS[kind])
        expected = as_answers(seen)
        assert sum(step["is_init"].item() for step in seen) == 3 and len({str(action) for action in expected}) > 2
        policy = Policy.load(tmp_path / "run", seed=3)
        actions = [np.asarray(action).tolist() for action in follow(policy, seen)]
        assert actions == expected
        policy.export(tmp_path / "exported")
        exported = Policy.load(tmp_path / "exported", seed=3)
        assert [np.asarray(action).tolist() for action in follow(exported, seen)] == expected
        whole = sum(path.stat().st_size for path in (tmp_path / "run/checkpoints/frames_100").rglob("*"))
        assert sum(path.stat().st_size for path in (tmp_path / "exported").iterdir()) < 0.8 * whole
        assert not differing(snapshot(exported.acting.policy), snapshot(policy.acting.policy))
        assert exported.acting.frames == 100

    @pytest.mark.parametrize("name", OTHERS)
    def test_other_agents(self, name, tmp_path):
        """With what each of them carries from step to step, or nothing."""
        base = ("env=mock", *OTHERS[name])
        agent = save_run(tmp_path / "run", base=base)
        seen = play(agent, base=base)
        expected = as_answers(seen)
        assert sum(step["is_init"].item() for step in seen) == 3 and len({str(action) for action in expected}) > 2
        policy = Policy.load(tmp_path / "run", seed=3)
        exported = Policy.load(policy.export(tmp_path / "exported"), seed=3)
        assert [action.tolist() for action in follow(policy, seen)] == expected
        assert [action.tolist() for action in follow(exported, seen)] == expected

    def test_class_numbers(self, tmp_path):
        """An action spec that counts the choices; class 0 is no zero vector, but none at a reset."""
        save_run(tmp_path, action=Categorical(4, dtype=torch.int64))
        policy = Policy.load(tmp_path)
        actions = {policy(np.ones(1, np.float32)) for _ in range(20)}
        assert all(type(action) is int and 0 <= action < 4 for action in actions) and len(actions) > 1

    def test_rows_are_reset_on_their_own(self, tmp_path):
        """A row that begins an episode forgets; the other one goes on. Against the training policy, row by row."""
        agent = save_run(tmp_path)
        policy = Policy.load(tmp_path, seed=5)
        observations = torch.rand(6, 2, 1)
        carried = TensorDict({key: spec.zero((2,)) for key, spec in agent.primers.primers.items()}, 2)
        carried["previous_action"] = torch.zeros(2, 1)
        with preserve_rng(5):
            for t, observation in enumerate(observations):
                first = torch.tensor([[t == 0], [t in (0, 3)]])
                step = agent.policy(carried.copy().update({"observation": observation, "is_init": first}))
                carried = step["next"].select("belief", "state").update({"previous_action": step["action"]})
                if t == 3:
                    with torch.random.fork_rng():
                        policy.reset(rows=[1])
                with torch.random.fork_rng():
                    assert torch.equal(policy(observation), step["action"].clamp(-1, 1))

    def test_rows_as_a_mask(self, run):
        policy = Policy.load(run)
        for _ in range(2):
            policy(np.zeros((3, 1), np.float32))
        policy.reset(rows=np.array([True, False, True]))
        assert policy._state["is_init"].flatten().tolist() == [True, False, True]
        assert not policy._state["belief"][[0, 2]].any() and policy._state["belief"][1].any()

    def test_random_numbers(self, run):
        """A policy has its own, and leaves the global ones alone, also while it is loaded."""
        torch.manual_seed(0)
        state, actions = torch.get_rng_state(), []
        for seed in (1, 1, 2):
            policy = Policy.load(run, seed=seed)
            actions.append([policy(np.zeros(1)).tolist() for _ in range(3)])
        assert torch.equal(torch.get_rng_state(), state)
        assert actions[0] == actions[1] != actions[2]
        assert len({str(action) for action in actions[0]}) == 3

    def test_deterministic(self, tmp_path):
        """The mode of the actor; latents are sampled all the same."""
        agent = save_run(tmp_path)
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            seen = play(agent)
        actions = follow(Policy.load(tmp_path, deterministic=True, seed=3), seen)
        assert [action.tolist() for action in actions] == as_answers(seen) != as_answers(play(agent))

    def test_tensors_for_tensors(self, run):
        policy = Policy.load(run)
        assert isinstance(policy({"observation": torch.zeros(1), "pixels": "not read"}), torch.Tensor)
        policy.reset()
        action = policy({"observation": np.zeros((2, 1), np.float64)[::-1]})
        assert action.shape == (2, 1) and action.dtype == np.float32 and (abs(action) <= 1).all()


def test_what_speeds_up_learning_does_not_matter(run):
    """A policy that was trained with a CUDA graph acts on a machine without a GPU."""
    description = read_description(run)
    description["optimization"] |= {"autocast": "bfloat16", "compile": {"enabled": True}, "cudagraph": True}
    stepper = load_agent(description).stepper
    assert not stepper.autocast and stepper.compute_gradients == stepper._compute_gradients


class TestRefuses:
    @pytest.mark.parametrize(
        ("observation", "message"),
        [
            ({"pixels": np.zeros((16, 16, 3), np.float32)}, "float32.*give torch.uint8"),
            ({"pixels": np.zeros((3, 16, 16), np.uint8)}, r"\(3, 16, 16\).*give torch.uint8 \(16, 16, 3\)"),
            ({"pixels": np.zeros((1, 1, 16, 16, 3), np.uint8)}, "or \\[N\\]"),
            ({"image": np.zeros((16, 16, 3), np.uint8)}, r"without \['pixels'\]"),
        ],
    )
    def test_observations(self, observation, message, tmp_path):
        save_run(tmp_path, *PIXELS)
        with pytest.raises(ValueError, match=message):
            Policy.load(tmp_path)(observation)

    def test_a_bare_array_where_there_are_two(self, tmp_path):
        save_run(tmp_path, *KINDS["both"])
        with pytest.raises(ValueError, match="needs"):
            Policy.load(tmp_path)(np.zeros((16, 16, 3), np.uint8))

    def test_another_number_of_rows(self, run):
        policy = Policy.load(run)
        policy(np.zeros((2, 1)))
        with pytest.raises(ValueError, match="call reset"):
            policy(np.zeros((3, 1)))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": 2}, "format=2"),
            ({"agent": {"name": "os"}}, "'os'.*dreamer_v3"),
            ({"agent": {"name": "../../tmp/evil"}}, "dreamer_v3"),
            ({"agent": {"name": "parts"}}, "dreamer_v3"),
            ({"agent": {"name": ["dreamer_v3"]}}, "dreamer_v3"),
            ({"agent": None}, "agent=None"),
            ({"observation": {}}, "observation"),
            ({"observation": {"observation": [1]}}, "shape None"),
            ({"observation": {"observation": {"shape": [-1], "dtype": "float32"}}}, r"shape \[-1\]"),
            ({"observation": {"observation": {"shape": [True], "dtype": "float32"}}}, r"shape \[True\]"),
            ({"observation": {"observation": {"shape": [10**6, 10**6], "dtype": "float32"}}}, "1000000"),
            ({"observation": {"observation": {"shape": [1], "dtype": "load"}}}, "'load'.*float32"),
            ({"action": {"kind": "continuous", "size": 1, "dtype": "int64"}}, "continuous"),
            ({"action": {"kind": "one_hot", "choices": "4", "dtype": "int64"}}, "no size"),
            ({"action": {"kind": "eval", "choices": 4, "dtype": "int64"}}, "'eval'"),
        ],
    )
    def test_descriptions(self, change, message, run):
        description = read_description(run)
        load_agent(description)
        with pytest.raises(ValueError, match=message):
            load_agent({**description, **change})

    @pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, "\ud800"])
    def test_no_json(self, text, tmp_path):
        (tmp_path / DESCRIPTION).write_bytes(text.encode(errors="surrogatepass"))
        with pytest.raises(ValueError, match="JSON"):
            read_description(tmp_path)

    def test_an_unknown_setting(self, run):
        description = read_description(run)
        description["agent"]["hook"] = "os.system"
        with pytest.raises(TypeError, match="hook"):
            load_agent(description)

    def test_changed_exports(self, run, tmp_path):
        folder = Policy.load(run).export(tmp_path / "exported")
        data, description = (folder / WEIGHTS).read_bytes(), (folder / DESCRIPTION).read_text()
        (folder / WEIGHTS).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(ValueError, match=WEIGHTS):
            Policy.load(folder)
        (folder / WEIGHTS).write_bytes(data)
        changed = json.loads(description)
        changed["observation"]["pixels"] = {"shape": [16, 16, 3], "dtype": "uint8"}
        (folder / DESCRIPTION).write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"missing.*pixels"):
            Policy.load(folder)
        with pytest.raises(FileExistsError, match="new folder"):
            Policy.load(run).export(folder)

    def test_nothing_is_unpickled(self, run, tmp_path, monkeypatch):

        def fail(*args, **kwargs):
            raise AssertionError("unpickled")

        for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
            monkeypatch.setattr(module, name, fail)
        Policy.load(Policy.load(run).export(tmp_path / "exported"))


class TestCheckpoints:
    def test_choice(self, tmp_path):
        """The newest by number, the best, a name, a path; a damaged one is passed over with a warning."""
        for frames, name in ((100, None), (1000, None), (20, "best")):
            save_run(tmp_path, frames=frames, name=name)
        folder = tmp_path / "checkpoints"
        assert Policy.load(tmp_path).acting.frames == 1000
        assert Policy.load(tmp_path, checkpoint="best").acting.frames == 20
        assert Policy.load(tmp_path, checkpoint="frames_100").acting.frames == 100
        assert Policy.load(folder / "frames_100").acting.frames == 100
        assert Policy.load(tmp_path, checkpoint=str(folder / "best")).acting.frames == 20
        with pytest.raises(FileNotFoundError, match="checkpoint='frames_5'"):
            Policy.load(tmp_path, checkpoint="frames_5")
        self.damage(folder / "frames_1000")
        with pytest.warns(UserWarning, match="frames_1000"):
            assert Policy.load(tmp_path).acting.frames == 100
        self.damage(folder / "best")
        with pytest.raises(Damaged, match="best"):
            Policy.load(tmp_path, checkpoint="best")

    @staticmethod
    def damage(checkpoint: Path) -> None:
        path = max(checkpoint.rglob("*.bin"), key=lambda path: path.stat().st_size)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no checkpoint"):
            Policy.load(tmp_path)


def test_command(run, tmp_path, capsys):
    main([f"run={run}", f"out={tmp_path / 'out'}"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [DESCRIPTION, WEIGHTS]
    assert "MB" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="usage"):
        main([f"run={run}", "to=here"])


@pytest.mark.slow
def test_needs_neither_simulator_nor_configuration(tmp_path):
    save_run(tmp_path / "run", *PIXELS)
    blocked = ["envs", "hydra", "omegaconf", "dm_control", "mujoco", "gymnasium", "wandb", "matplotlib"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({blocked}))
import numpy
from dreamer.policy import Policy
print(Policy.load({str(tmp_path / "run")!r})(numpy.zeros((16, 16, 3), numpy.uint8)).shape)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout == "(1,)\n", result.stderr
