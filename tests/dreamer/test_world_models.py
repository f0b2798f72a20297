"""World Models put together: what acts, the stages on real files, that runs resume exactly, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, Composite, OneHot, Unbounded

from dreamer.agents import Agent, EnvSpec, load
from dreamer.controller_policy import ControllerPolicy, ExplorePolicy
from dreamer.episode_data import EpisodeData, digest_of
from dreamer.episode_store import Encodings, EpisodeStore, Layout
from dreamer.models.mdn_rnn import MDNRNN
from dreamer.models.standardizer import Standardizer
from dreamer.models.vae import VAE
from dreamer.nonfinite import NonFiniteError
from dreamer.policy import Policy
from dreamer.trainer import Trainer
from dreamer.world_model_source import check_sizes, check_world
from dreamer.world_model_stages import EncodeStage, MDNRNNStage, VAEStage, draw_offsets
from objectives.world_models import MDNRNNLoss, VAELoss
from tests.helpers import SHORT_RUN, SMALL_WM, compose_config, differing, make_run, snapshot, stop_at_update

BASE = (*SHORT_RUN, *SMALL_WM)
CONTINUOUS, ONE_HOT, NUMBERED = Bounded(-1.0, 1.0, (2,)), OneHot(4, dtype=torch.int64), Categorical(4)
IMAGES = Layout("pixels", (64, 64, 3), torch.uint8)
VECTORS = Layout("observation", (3,), torch.float32)


def make_agent(*, action: Any = CONTINUOUS, image: tuple[int, ...] | None = None, **settings: Any) -> Agent:
    """A small agent; settings are those of ``agent``, with two underlines for a dot."""
    config = compose_config(*SMALL_WM)
    knobs = config["agent"]
    for name, value in settings.items():
        group, _, key = name.rpartition("__")
        (knobs[group] if group else knobs)[key] = value
    torch.manual_seed(0)
    seen = {"pixels": Unbounded(image, dtype=torch.uint8)} if image else {"observation": Unbounded(3)}
    return load(knobs.pop("name")).build(
        env_spec=EnvSpec(Composite(seen), action),
        device=torch.device("cpu"),
        optimization=config["optimization"],
        **knobs,
    )


def run_wm(folder: Path, *overrides: str) -> Trainer:
    return make_run(folder, *overrides, base=BASE)


def finish(trainer: Trainer) -> Trainer:
    trainer.train()
    trainer.logger.close()
    return trainer


def make_steps(policy: ControllerPolicy, rows: int, count: int, seed: int = 0) -> list[TensorDict]:
    """Observations and random previous actions of ``count`` steps; row 0 starts anew in the middle."""
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for step in range(count):
        is_init = torch.full((rows, 1), step == 0)
        is_init[0] |= step == count // 2
        action = torch.rand(rows, policy.codec.size, generator=generator) * 2 - 1
        if policy.codec.discrete:
            action = torch.nn.functional.one_hot(action.argmax(-1), policy.codec.size)
        observed = {"observation": torch.randn(rows, 3, generator=generator), "is_init": is_init}
        steps.append(TensorDict({**observed, "previous_action": action}, rows))
    return steps


def act(policy: ControllerPolicy, step: TensorDict, before: TensorDict | None) -> TensorDict:
    """One step of a policy that carries what it wrote into the step before."""
    rows = len(step)
    sizes = {"latent": policy.model.latent_size, "hidden": policy.model.hidden_size, "cell": policy.model.hidden_size}
    carried = {key: torch.zeros(rows, size) for key, size in sizes.items()} if before is None else before["next"]
    return policy(step.clone().update({key: carried[key] for key in sizes}))


class TestPolicy:
    @pytest.mark.parametrize("action", [CONTINUOUS, ONE_HOT], ids=["continuous", "discrete"])
    def test_acts_on_what_m_makes_of_everything_before(self, action):
        """h_t is the state of M after (z_<t, a_<t) of this episode, and a_t is the controller's of (z_t, h_t)."""
        policy = make_agent(action=action, sample_latent=False).policy
        policy.solution.normal_()
        steps, seen = make_steps(policy, rows=2, count=6), []
        for step in steps:
            seen.append(act(policy, step, seen[-1] if seen else None))
        latent = torch.stack([policy.vision.encode(step["observation"]).mean for step in steps], 1)  # [2, T, Z]
        taken = torch.stack([step["previous_action"] for step in steps[1:]], 1).float()
        is_init = torch.stack([step["is_init"] for step in steps], 1)
        for end in range(1, 6):
            _, state = policy.model(latent[:, :end], taken[:, :end], is_init[:, :end])
            hidden = state.hidden * ~is_init[:, end]
            torch.testing.assert_close(seen[end]["next", "hidden"], hidden)
            feature = torch.cat([latent[:, end], hidden], -1)[None]
            expected = policy.controller.act(policy.controller.unflatten(policy.solution[None]), feature)[0]
            torch.testing.assert_close(seen[end]["action"].float(), expected)

    @pytest.mark.parametrize("action", [CONTINUOUS, ONE_HOT, NUMBERED], ids=["continuous", "one-hot", "numbers"])
    def test_before_the_first_generation_neither_v_nor_m_is_asked(self, action, monkeypatch):
        """The shortcut is what they would have come to."""
        policy = make_agent(action=action).policy
        step = TensorDict({"observation": torch.randn(5, 3), "is_init": torch.ones(5, 1, dtype=torch.bool)}, 5)
        step["previous_action"] = action.zero((5,))
        asked = policy._act(act(policy, step, None), policy.solution.expand(5, -1))["action"].clone()
        monkeypatch.setattr(policy.vision, "encode", None)
        found = act(policy, step, None)
        assert torch.equal(found["action"], asked) and found["action"].shape == action.zero((5,)).shape
        assert not found["next", "evolved"].any() and not found["next", "hidden"].any()

    def test_a_candidate_acts_as_it_would_alone(self):
        policy = make_agent(sample_latent=False).policy
        population = torch.randn(3, len(policy.solution))
        step = make_steps(policy, rows=6, count=1)[0].update(
            {"latent": torch.randn(6, 3), "hidden": torch.randn(6, 6), "cell": torch.randn(6, 6)}
        )
        step["is_init"][:] = False
        step["candidate"] = torch.tensor([2, 0, 1, 1, 0, 2])[:, None]
        together = policy.for_population(population)(step.clone())
        for row, candidate in enumerate(step["candidate"].flatten().tolist()):
            policy.solution.copy_(population[candidate])
            alone = policy(step[row : row + 1].clone())
            torch.testing.assert_close(alone["action"], together["action"][row : row + 1])
            torch.testing.assert_close(alone["next", "hidden"], together["next", "hidden"][row : row + 1])

    def test_candidates_have_the_same_luck(self):
        """Also with sampled latents a candidate does what it would do alone, after the same seed."""
        policy = make_agent().policy
        population = torch.randn(3, len(policy.solution))
        step = make_steps(policy, rows=1, count=1)[0].expand(3).clone()
        step.update({"latent": torch.zeros(3, 3), "hidden": torch.zeros(3, 6), "cell": torch.zeros(3, 6)})
        step["candidate"] = torch.arange(3)[:, None]
        torch.manual_seed(0)
        together = policy.for_population(population)(step.clone())
        assert (together["next", "latent"] == together["next", "latent"][0]).all()
        torch.manual_seed(0)
        alone = policy.for_population(population)(step[2:].clone())
        torch.testing.assert_close(alone["action"], together["action"][2:])

    def test_latents_are_sampled_unless_the_mean_is_wished(self):
        for sampled in (True, False):
            policy = make_agent(sample_latent=sampled).policy
            policy.solution.fill_(0.1)
            step = make_steps(policy, rows=1, count=1)[0]
            first, second = act(policy, step, None), act(policy, step, None)
            assert torch.equal(first["next", "latent"], second["next", "latent"]) != sampled

    def test_a_controller_of_z_alone_has_fewer_parameters(self):
        assert make_agent(controller__inputs="z").policy.controller.num_parameters == 2 * 3 + 2
        assert make_agent(controller__inputs="zh").policy.controller.num_parameters == 2 * (3 + 6) + 2

    def test_networks_act_in_evaluation_mode(self):
        agent = make_agent(vae__batch_norm=True, image=IMAGES.shape)
        pixels = torch.randint(256, (3, *IMAGES.shape), dtype=torch.uint8)
        assert not any(module.training for module in agent.policy.vision.modules())
        together, alone = agent.policy.vision.encode(pixels), agent.policy.vision.encode(pixels[:1])
        torch.testing.assert_close(together.mean[:1], alone.mean)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": []}, "stages=.*choose some"),
        ({"stages": ["controller"]}, "add collect, or name the run"),
        ({"source": "runs/x"}, "leave out one of them"),
        ({"untrained": ["controller"]}, "untrained=.*choose some"),
        ({"stages": ["collect", "encode"]}, r"add vae, or agent.untrained=\[vae\]"),
        ({"stages": ["collect", "vae", "mdn_rnn"]}, "add encode"),
        ({"stages": ["vae", "controller"], "source": "runs/x"}, "add encode"),
        ({"stages": ["controller"], "source": "runs/x", "untrained": ["vae"]}, "add encode"),
        ({"untrained": ["vae"]}, "gives 3 numbers, which are only standardised.*leave vae out"),
        ({"rounds": 0}, "rounds=0"),
        ({"stages": ["controller"], "source": "runs/x", "rounds": 2}, "has one round"),
        ({"vae__batch_size": 0}, "agent.vae.batch_size=0"),
        ({"vae__lr": 1}, "agent.vae=.*give exactly"),
        ({"controller__inputs": "h"}, "inputs='h'"),
        ({"image": (32, 32, 3)}, "image_size=64"),
        ({"image": (64, 64, 4)}, "neither grey images nor stacks"),
    ],
)
def test_settings_that_make_no_sense_name_themselves(settings, message):
    with pytest.raises(ValueError, match=message):
        make_agent(**settings)


class FixedPolicy(torch.nn.Module):
    """Stands for random behaviours: always the same action."""

    in_keys, out_keys = (), ("action",)

    def __init__(self, action: torch.Tensor):
        super().__init__()
        self.action = action

    def forward(self, tensordict: TensorDict) -> TensorDict:
        return tensordict.set("action", self.action.expand(*tensordict.batch_size, *self.action.shape))


class TestExplore:
    def make_step(self, action: torch.Tensor, evolved: list[bool]) -> TensorDict:
        step = TensorDict({"action": action.expand(len(evolved), *action.shape).clone()}, len(evolved))
        step["next"] = TensorDict({"evolved": torch.tensor(evolved)[:, None]}, len(evolved))
        return step

    def test_random_until_the_controller_has_evolved(self):
        codec = make_agent().policy.codec
        explore = ExplorePolicy(FixedPolicy(torch.ones(2)), codec, noise=0.0)
        action = explore(self.make_step(torch.full((2,), -0.5), [True, False]))["action"]
        assert action.tolist() == [[-0.5, -0.5], [1, 1]]

    def test_continuous_noise_stays_within_bounds(self):
        torch.manual_seed(0)
        explore = ExplorePolicy(FixedPolicy(torch.ones(2)), make_agent().policy.codec, noise=0.1)
        action = explore(self.make_step(torch.tensor([0.0, 0.99]), [True] * 2000))["action"]
        assert action[:, 0].std().item() == pytest.approx(0.1, rel=0.1)
        assert action.max() == 1 and action[:, 1].min() < 0.95

    @pytest.mark.parametrize("spec", [ONE_HOT, NUMBERED], ids=["one-hot", "numbers"])
    def test_discrete_noise_is_the_chance_of_another_choice(self, spec):
        torch.manual_seed(0)
        codec = make_agent(action=spec).policy.codec
        chosen = codec.decode(torch.eye(4)[2])
        explore = ExplorePolicy(FixedPolicy(codec.decode(torch.eye(4)[0])), codec, noise=0.4)
        action = explore(self.make_step(chosen, [True] * 2000))["action"]
        shares = codec.encode(action).mean(0)
        torch.testing.assert_close(shares, torch.tensor([0.1, 0.1, 0.7, 0.1]), atol=0.04, rtol=0)


def make_data(folder: Path, *lengths: int, vision: torch.nn.Module | None = None) -> EpisodeData:
    """Episodes of the toy whose observation is the action that led there, and number and step besides; encoded."""
    vision = vision or Standardizer(3)
    store, encodings = EpisodeStore(folder / "episodes", VECTORS), Encodings(folder / "encodings")
    for number, records in enumerate(lengths):
        action = torch.randn(records, 1)
        action[0] = 0
        observations = torch.cat([action, torch.full((records, 1), float(number)), torch.arange(records)[:, None]], 1)
        flags = torch.zeros(records, 1, dtype=torch.bool)
        columns = {"action": action, "reward": action.clone(), "is_init": flags.clone(), "terminated": flags.clone()}
        columns["is_init"][0] = columns["terminated"][-1] = True
        store.append([VECTORS.pack(observation) for observation in observations], columns)
    data = EpisodeData(store, encodings, vision)
    run_stage(EncodeStage(data, torch.device("cpu")))
    return data


def run_stage(stage: Any) -> None:
    stage.begin()
    while not stage.done():
        stage.step(stage.draw())


def make_mdn_stage(data: EpisodeData, *, updates: int = 1, sequence_length: int = 6, **settings: Any) -> MDNRNNStage:
    torch.manual_seed(0)
    model = MDNRNN(latent_size=3, action_size=1, hidden_size=16, components=2)
    settings = {"batch_size": 8, "lr": 1e-2} | settings
    return MDNRNNStage(MDNRNNLoss(model), data, updates=updates, sequence_length=sequence_length, **settings)


class TestSequences:
    def test_short_episodes_are_padded_and_long_ones_are_cut(self, tmp_path):
        """Also the last step of an episode is learned from; nothing spans two episodes."""
        data = make_data(tmp_path, 3, 12, 2)
        stage = make_mdn_stage(data, batch_size=400)
        stage.begin()
        batch = stage.draw()
        assert batch.batch_size == (400, 7)
        number, step = batch["posterior_mean"][..., 1], batch["posterior_mean"][..., 2]
        valid, ends = batch["valid"][..., 0], torch.tensor([2, 11, 1])
        assert (number == number[:, :1]).all()
        starts = step[:, 0]
        for episode, expected in ((0, {0}), (1, set(range(6))), (2, {0})):
            assert set(starts[number[:, 0] == episode].tolist()) == expected
        span = torch.arange(7)
        last = ends[number[:, 0].long()]
        assert torch.equal(valid, starts[:, None] + span <= last[:, None])
        assert torch.equal(step, torch.minimum(starts[:, None] + span, last[:, None]).half())
        shares = torch.bincount(number[:, 0].long(), minlength=3) / 400
        torch.testing.assert_close(shares, torch.tensor([2, 11, 1]) / 14, atol=0.08, rtol=0)
        assert torch.equal(batch["is_init"][..., 0], step == 0)
        assert torch.equal(batch["terminated"][..., 0], step == last[:, None])

    @pytest.mark.parametrize("steps", [40, 12, 5])
    def test_the_ends_of_an_episode_are_seen_as_often(self, steps):
        """Cut out 10 of 40 or 12 steps, or all of 5."""
        torch.manual_seed(0)
        offset = draw_offsets(torch.full((20_000,), steps), 10)
        within = offset[:, None] + torch.arange(min(steps, 10))
        assert within.min() == 0 and within.max() == steps - 1
        share = torch.bincount(within.flatten(), minlength=steps) / 20_000
        if steps == 5:
            assert (share == 1).all()
        elif steps == 40:
            assert share.min() > 0.9 * 10 / 49 and share.max() < 1.1 * 19 / 49
            torch.testing.assert_close(share[[0, 20, 39]], torch.full((3,), 10 / 49), atol=0.02, rtol=0)
        else:
            assert share[0] > 0.4 and share[-1] > 0.4, "two of three cuts would miss an end if all began inside"

    def test_no_longer_than_the_longest_episode(self, tmp_path):
        stage = make_mdn_stage(make_data(tmp_path, 3, 5), sequence_length=999)
        stage.begin()
        assert stage.draw().batch_size == (8, 5)

    def test_the_action_of_a_record_led_to_it(self, tmp_path):
        """Where z' = a, M learns to foresee z' and the reward nearly exactly, which no other alignment allows."""
        data = make_data(tmp_path, *[20] * 10)
        stage = make_mdn_stage(data, updates=80, sequence_length=10, lr=3e-2)
        run_stage(stage)
        torch.manual_seed(1)
        batch = stage.draw()
        prediction, _ = stage.loss.model(
            batch["posterior_mean"].float()[:, :-1], batch["action"][:, 1:], batch["is_init"][:, :-1]
        )
        error = prediction.reward - batch["action"][:, 1:, 0]
        assert error.square().mean() < 0.1, "the variance of the actions is 1"

    @pytest.mark.parametrize("rewards", [(0.0, 10.0, 10.0, 20.0), (7.0, 7.0, 7.0, 7.0)])
    def test_rewards_are_in_units_of_their_size(self, tmp_path, rewards):
        """The error of a prediction of 0 counts 1, also where all rewards are the same; a reset has no reward."""
        data = make_data(tmp_path)
        observations, flags = torch.zeros(5, 3), torch.zeros(5, 1, dtype=torch.bool)
        reward = torch.tensor([99.0, *rewards])[:, None]
        columns = {"action": torch.zeros(5, 1), "reward": reward, "is_init": flags.clone(), "terminated": flags}
        columns["is_init"][0] = True
        data.episodes.append([VECTORS.pack(observation) for observation in observations], columns)
        run_stage(EncodeStage(data, torch.device("cpu")))
        stage = make_mdn_stage(data)
        stage.begin()
        stage.draw()
        stage.loss.model.head.weight.data.zero_()
        losses = stage.loss(stage.draw())
        torch.testing.assert_close(losses["loss_mdn_reward"], torch.tensor(1.0))
        stage.loss.model.head.bias.data[-2] = 1.0
        size = reward[1:].square().mean().sqrt().item()
        assert stage.loss.model.predict(torch.zeros(6 + 10)).reward.item() == pytest.approx(size)

    def test_a_stale_encoding_is_refused(self, tmp_path):
        data = make_data(tmp_path, 4)
        data.vision.shift += 1
        with pytest.raises(ValueError, match="another encoder"):
            make_mdn_stage(data).draw()

    def test_values_of_gradients_are_bounded(self, tmp_path):
        stage = make_mdn_stage(make_data(tmp_path, 8), max_grad_value=1e-4)
        stage.begin()
        stage.step(stage.draw())
        assert max(parameter.grad.abs().max() for parameter in stage.parameters) <= 1e-4


class TestEncode:
    def test_only_what_this_encoder_has_not_encoded(self, tmp_path):
        data = make_data(tmp_path, 3, 4, 5)
        stage = EncodeStage(data, torch.device("cpu"))
        stage.begin()
        assert stage.done()
        data.encodings.path(1).unlink()
        stage.begin()
        assert stage.next == 1 and not stage.done()
        stage.step(stage.draw())
        assert stage.done()
        data.episodes.truncate(2)
        observations = torch.ones(4, 3)
        data.episodes.append([VECTORS.pack(value) for value in observations], data.episodes.read_columns(1))
        stage.begin()
        assert stage.next == 2, "another episode in the place of one that was encoded"
        data.vision.scale *= 2
        stage.begin()
        assert stage.next == 0

    def test_dreams_start_from_first_observations(self, tmp_path):
        data = make_data(tmp_path, 3, 4, 5)
        starts = data.starts(200, torch.Generator().manual_seed(0))
        assert starts.shape == (200, 3) and starts[:, 2].abs().max() < 0.1, "the third number is the step"
        assert set(starts[:, 1].round().tolist()) == {0, 1, 2}
        assert starts[:, 0].std() > 0, "drawn, not the mean"
        assert torch.equal(starts, data.starts(200, torch.Generator().manual_seed(0)))


def make_vae_stage(folder: Path, **settings: Any) -> VAEStage:
    torch.manual_seed(0)
    vae = VAE(latent_size=3, channels=[4, 4, 4, 4], batch_norm=True).eval()
    store = EpisodeStore(folder, IMAGES)
    images = torch.randint(256, (6, *IMAGES.shape), dtype=torch.uint8)
    flags = torch.zeros(6, 1, dtype=torch.bool)
    columns = {"action": torch.zeros(6, 1), "reward": torch.zeros(6, 1), "is_init": flags, "terminated": flags}
    store.append([IMAGES.pack(image) for image in images], columns)
    data = EpisodeData(store, Encodings(folder), vae)
    return VAEStage(VAELoss(vae, anneal_updates=4), data, batch_size=4, updates=3, lr=1e-3, **settings)


class TestGradients:
    def test_batch_statistics_move_only_while_v_is_trained(self, tmp_path):
        stage = make_vae_stage(tmp_path)
        run_stage(stage)
        assert not any(module.training for module in stage.loss.vae.modules())
        assert int(stage.loss.updates) == 3
        before = digest_of(stage.loss.vae)
        stage.media()
        assert digest_of(stage.loss.vae) == before

    def test_annealing_is_part_of_the_state(self, tmp_path):
        first, second = make_vae_stage(tmp_path / "a"), make_vae_stage(tmp_path / "b")
        run_stage(first)
        second.load_state_dict(first.state_dict())
        assert second.done() and torch.equal(second.loss.kl_weight(), first.loss.kl_weight())

    def test_what_is_not_finite_changes_nothing(self, tmp_path):
        """Not even the running means of batch normalisation."""
        stage = make_vae_stage(tmp_path)
        stage.begin()
        stage.step(stage.draw())
        with torch.no_grad():
            stage.loss.vae.mean.weight[0, 0] = torch.nan
        before, state = snapshot(stage.loss), stage.state_dict()["count"]
        with pytest.raises(NonFiniteError, match=r"stage vae.*loss_vae_reco"):
            stage.step(stage.draw())
        after = snapshot(stage.loss)
        assert [name for name in before if not torch.equal(before[name].nan_to_num(), after[name].nan_to_num())] == []
        assert stage.state_dict()["count"] == state

    def test_unknown_autocast(self, tmp_path):
        with pytest.raises(ValueError, match=r"autocast='float8'.*bfloat16"):
            make_vae_stage(tmp_path, autocast="float8")


def stop_at_frames(trainer: Trainer, count: int) -> None:
    """Ask the trainer to stop when it has collected ``count`` frames."""
    receive = trainer.schedule.stages[0].receive

    def counting(records: TensorDict) -> TensorDict:
        if trainer.collected_frames >= count:
            trainer.request_stop("SIGTERM")
        return receive(records)

    trainer._batch_process_ops[-1] = (counting, {})


def fingerprint(trainer: Trainer, folder: Path) -> dict[str, Any]:
    files = sorted([*folder.glob("episodes/*"), *folder.glob("encodings/*")])
    networks = {name: value.numpy().tobytes() for name, value in snapshot(trainer.loss_module).items()}
    facts = {"frames": trainer.collected_frames, "updates": trainer.update_count}
    return networks | facts | {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}


def count_updates(trainer: Trainer) -> dict[str, int]:
    """Updates that each stage made, in order."""
    counts = {}
    step = trainer.schedule.step

    def counting(batch: TensorDict) -> TensorDict:
        name = trainer.schedule.stage.name
        counts[name] = counts.get(name, 0) + 1
        return step(batch)

    trainer.schedule.step = counting
    return counts


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path, dict[str, int]]:
    """A run through all stages, its folder and its updates in each stage."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = run_wm(folder)
    counts = count_updates(trainer)
    return finish(trainer), folder, counts


class TestRun:
    def test_interrupted_in_every_stage_ends_the_same(self, finished, tmp_path):
        """In the middle of an episode, of V (which is one update here), of the encoding, of M and of the search."""
        whole, folder, counts = finished
        episodes = len(whole.schedule.stages[0].episodes)
        assert counts == {"vae": 1, "encode": episodes, "mdn_rnn": 4, "controller": 3} and episodes > 8
        part = run_wm(tmp_path / "parts")
        stop_at_frames(part, 20)
        finish(part)
        assert part.update_count == 0 and part.schedule.stages[0].packed, "in the middle of an episode"
        for update in (4, 1 + episodes + 2, 1 + episodes + 4 + 2):
            part = run_wm(tmp_path / "parts", "resume=auto")
            stop_at_update(part, update)
            finish(part)
            assert part.update_count == update
        part = finish(run_wm(tmp_path / "parts", "resume=auto"))
        expected, actual = fingerprint(whole, folder), fingerprint(part, tmp_path / "parts")
        assert expected.keys() == actual.keys()
        assert [name for name in expected if expected[name] != actual[name]] == []
        assert whole.policy.solution.any()

    def test_every_stage_leaves_its_metrics(self, finished):
        _, folder, _ = finished
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        names = {name.split("/")[0] for line in lines for name in line}
        assert {"vae", "encode", "mdn_rnn", "controller", "eval"} <= names
        policy = Policy.load(folder)
        assert policy(torch.zeros(4)).shape == (2,)

    def test_the_controller_alone_from_a_finished_run(self, finished, tmp_path):
        """Its networks and encodings are used as they are, and the frames of its data set are counted."""
        first, folder, _ = finished
        second = run_wm(tmp_path / "second", "agent.stages=[controller]", f"agent.source={folder}")
        counts = count_updates(second)
        finish(second)
        assert counts == {"controller": 3} and second.collected_frames == 0
        assert second.further_frames == first.schedule.stages[0].episodes.records
        before, after = snapshot(first.loss_module), snapshot(second.loss_module)
        assert differing(before, after) == [] and before["solution"].any()
        assert not (tmp_path / "second/episodes").exists() and not (tmp_path / "second/encodings").exists()

    @pytest.mark.slow
    def test_networks_that_stay_untrained(self, finished, tmp_path):
        source = f"agent.source={finished[1]}"
        stages = "agent.stages=[encode,mdn_rnn,controller]"
        real = ("agent.controller.fitness=real", "agent.controller.num_envs=2")
        run = run_wm(tmp_path / "second", stages, source, "agent.untrained=[mdn_rnn]", *real)
        before, counts = snapshot(run.loss_module), count_updates(run)
        finish(run)
        assert differing(before, snapshot(run.loss_module)) == [], "actions make no difference to what this task pays"
        assert "mdn_rnn" not in counts and (tmp_path / "second/encodings").exists()
        scored = 3 * (4 + 1) * 2 * 5  # generations, candidates and their mean, trials, steps
        assert run.further_frames == finished[0].schedule.stages[0].episodes.records + scored

    def test_what_is_missing_is_told_before_anything_is_written(self, tmp_path):
        for overrides, message in (
            (["agent.stages=[vae,collect]"], r"stages=\['vae', 'collect'\].*in this order"),
            (["agent.stages=[controller]", "agent.source=runs/missing"], "no runs/missing/episodes"),
        ):
            with pytest.raises((ValueError, FileNotFoundError), match=message):
                run_wm(tmp_path / "run", *overrides)
            assert list((tmp_path / "run").iterdir()) == []

    def test_a_source_of_another_size_is_refused(self, finished, tmp_path):
        """Naming the settings; those of V say nothing about vectors."""
        sizes = ("agent.mdn_rnn.hidden_size=7", "agent.mdn_rnn.components=3", "agent.vae.latent_size=5")
        with pytest.raises(ValueError, match=r"hidden_size: 6 in the source, 7 here, .*components: 2") as error:
            run_wm(tmp_path / "second", "agent.stages=[controller]", f"agent.source={finished[1]}", *sizes)
        assert str(error.value).endswith("; give agent.mdn_rnn.hidden_size=6 agent.mdn_rnn.components=2")
        assert list((tmp_path / "second").iterdir()) == []

    def test_a_source_of_another_world_is_refused(self, finished, tmp_path):
        source = str(finished[1])
        with pytest.raises(ValueError, match="it saw 4 numbers, this run sees pixels"):
            run_wm(tmp_path / "second", "agent.stages=[controller]", f"agent.source={source}", "env.from_pixels=true")
        with pytest.raises(ValueError, match="its actions have 2 numbers or choices, those of this run 3"):
            check_world(source, [4], 3)
        check_world(source, [4], 2)

    def test_latents_of_another_size_do_not_fit_m(self, tmp_path):
        """Of V only their number matters where M alone is taken over, of V itself everything."""
        description = {"agent": {"vae": {"latent_size": 3, "channels": [4]}, "mdn_rnn": {"hidden_size": 6}}}
        (tmp_path / "policy.json").write_text(json.dumps(description))
        check_sizes(str(tmp_path), {"vae": {"latent_size": 3}, "mdn_rnn": {"hidden_size": 6}})
        with pytest.raises(ValueError, match=r"channels: \[4\] in the source, \[4, 8\] here; .*=\[4\]$"):
            check_sizes(str(tmp_path), {"vae": {"latent_size": 3, "channels": [4, 8]}})

    @pytest.mark.slow
    def test_rounds(self, tmp_path):
        """The second round collects with the controller, and encodes what is new."""
        run = run_wm(tmp_path, "agent.rounds=2", "env.task=discrete")
        explore, counts, evolved = run.collector.policy.explore, count_updates(run), []
        explore.register_forward_hook(
            lambda module, given, step: evolved.append((run.schedule.round, bool(step["next", "evolved"].all())))
        )
        finish(run)
        store = run.schedule.stages[0].episodes
        assert set(evolved) == {(0, False), (1, True)}
        assert counts["vae"] == 1 and counts["mdn_rnn"] == 8 and counts["controller"] == 6
        assert counts["encode"] == len(store), "vectors are standardised once"
        assert [store.read_columns(number)["is_init"][0].item() for number in range(len(store))].count(False) == 2

    @pytest.mark.slow
    def test_images(self, tmp_path):
        """Pictures and checkpoints after every update change nothing; an export has no decoder and acts the same."""
        overrides = ("env.from_pixels=true", "agent.vae.anneal_updates=5", "agent.controller.eval_interval=2")
        whole = finish(run_wm(tmp_path / "whole", *overrides))
        part = run_wm(tmp_path / "parts", *overrides, "agent.save_seconds=0")
        stop_at_update(part, 2)
        finish(part)
        assert part.schedule.stage.name == "vae"
        part = finish(run_wm(tmp_path / "parts", *overrides, "resume=auto"))
        expected, actual = fingerprint(whole, tmp_path / "whole"), fingerprint(part, tmp_path / "parts")
        assert [name for name in expected if expected[name] != actual.get(name)] == []
        names = {path.name[:-14] for path in (tmp_path / "whole/images").iterdir()}
        assert {"vae_reconstructions", "vae_traversals", "mdn_rnn_rollouts"} <= names
        policy, image = Policy.load(tmp_path / "whole"), torch.randint(256, IMAGES.shape, dtype=torch.uint8)
        exported = Policy.load(policy.export(tmp_path / "exported"))
        assert not any("decoder" in name for name in exported.acting.policy.state_dict())
        assert torch.equal(policy(image), exported(image)) and torch.equal(policy(image), exported(image))
        random = run_wm(
            tmp_path / "random",
            *overrides,
            f"agent.source={tmp_path / 'whole'}",
            "agent.stages=[encode,mdn_rnn,controller]",
            "agent.untrained=[vae]",
        )
        before = snapshot(random.policy.vision.vae)
        finish(random)
        assert differing(before, snapshot(random.policy.vision.vae)) == []
        assert random.policy.vision.standardizer.shift.any() and random.policy.vae is None
