"""Acting and records: what the policy carries, what becomes a record, and that both line up with the environment."""

import inspect

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Binary, Bounded, Categorical, Composite, MultiCategorical, MultiOneHot, OneHot, Unbounded
from torchrl.envs.utils import ExplorationType, set_exploration_type

from dreamer.agents import dreamer_v3, load
from dreamer.agents.assembly import partition
from dreamer.agents.parts import ActionCodec, ToRecords
from objectives import WorldModelLoss
from objectives.functional import lambda_return
from tests.helpers import (
    compose_config,
    fix_samples,
    make_batch,
    make_env_spec,
    make_mock_parts,
    make_small_agent,
    set_episode_length,
)

ACTIONS = {
    "continuous": Bounded(-1.0, 1.0, (2,)),
    "one-hot": OneHot(4, dtype=torch.int64),
    "categorical": Categorical(4),
}


class TestActionCodec:
    def test_continuous(self):
        codec, action = ActionCodec(ACTIONS["continuous"]), torch.tensor([[0.5, -3.0]])
        assert (codec.size, codec.discrete) == (2, False)
        assert torch.equal(codec.encode(action), action)  # the raw sample: the model itself limits it
        assert torch.equal(codec.decode(action), action)

    def test_one_hot(self):
        codec, action = ActionCodec(ACTIONS["one-hot"]), torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0]])
        assert (codec.size, codec.discrete) == (4, True)
        vector = codec.encode(action)
        assert vector.dtype == torch.float32 and vector.tolist() == action.tolist()
        assert codec.decode(vector).dtype == torch.int64 and torch.equal(codec.decode(vector), action)

    def test_class_numbers(self):
        codec, action = ActionCodec(ACTIONS["categorical"]), torch.tensor([2, 0])
        assert (codec.size, codec.discrete) == (4, True)
        assert codec.encode(action).tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
        assert torch.equal(codec.decode(codec.encode(action)), action)
        assert codec.decode(codec.encode(action)).dtype == ACTIONS["categorical"].dtype

    @pytest.mark.parametrize(
        "spec",
        [
            Unbounded((2,)),
            Bounded(0, 3, (2,), dtype=torch.int64),
            Bounded(-2.0, 2.0, (2,)),  # the actor would reach half of it
            Bounded(-1.0, 1.0, ()),
            Bounded(-1.0, 1.0, (2, 3)),
            MultiOneHot([2, 3]),  # several choices at once, taken for one
            MultiCategorical([2, 3]),
            Binary(4),
            Composite(left=Bounded(-1.0, 1.0, (2,))),
        ],
        ids=lambda spec: f"{type(spec).__name__}{list(spec.shape)}",
    )
    def test_other_actions_are_refused(self, spec):
        with pytest.raises(ValueError, match="wrap the environment"):
            ActionCodec(spec)


def make_inputs(agent, *shape: int, is_init: bool = False) -> TensorDict:
    """What the policy reads, with random content."""
    torch.manual_seed(0)
    record, rssm = agent.record, agent.loss.model.world_model.rssm
    action = agent.policy.codec.decode(torch.eye(agent.policy.codec.size)[0])
    return TensorDict(
        {
            "pixels": torch.randint(256, (*shape, *record["pixels"].shape), dtype=torch.uint8),
            "observation": torch.randn(*shape, *record["observation"].shape),
            "is_init": torch.full((*shape, 1), is_init),
            "previous_action": action.expand((*shape, *action.shape)).clone(),
            "belief": torch.randn(*shape, rssm.belief_size).bfloat16(),
            "state": torch.randint(rssm.classes, (*shape, rssm.categoricals), dtype=torch.uint8),
        },
        shape,
    )


@torch.no_grad()
def next_belief(agent, belief: torch.Tensor, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """What one step of the recurrent core makes of a stored model state [N, ...] and the action [N, A] taken there."""
    rssm = agent.loss.model.world_model.rssm
    return rssm.core(1, len(belief))(belief.float(), rssm.from_classes(state), rssm.action_branch(action))


def assert_bfloat16_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), rtol=2**-7, atol=2**-9)


class TestRecurrentPolicy:
    @pytest.mark.parametrize("kind", ACTIONS)
    @pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
    def test_shapes(self, kind, shape):
        agent = make_small_agent(env_spec=make_env_spec(action=ACTIONS[kind]))
        output = agent.policy(make_inputs(agent, *shape))
        assert output["action"].shape == (*shape, *ACTIONS[kind].shape)
        assert output["action"].dtype == ACTIONS[kind].dtype
        if kind != "continuous":
            assert all(ACTIONS[kind].is_in(action) for action in output["action"].reshape(-1, *ACTIONS[kind].shape))
        for key in ("belief", "state"):
            assert output["next", key].shape == (*shape, *agent.record[key].shape)
            assert output["next", key].dtype == agent.record[key].dtype

    def test_batched_rows_do_not_mix(self):
        agent = make_small_agent()
        fix_samples(agent)
        inputs = make_inputs(agent, 3)
        changed = inputs.clone()
        for key in ("pixels", "observation", "belief", "state", "previous_action"):
            changed[key][1] = changed[key][2]
        left, right = agent.policy(inputs)["next", "belief"], agent.policy(changed)["next", "belief"]
        assert (left != right).any(-1).tolist() == [False, True, False]

    def test_carries_the_model_state(self):
        """Belief and state of the step before and the action that led here make the new belief."""
        agent = make_small_agent()
        inputs = make_inputs(agent, 3)
        expected = next_belief(agent, inputs["belief"], inputs["state"], inputs["previous_action"])
        assert_bfloat16_near(agent.policy(inputs)["next", "belief"], expected)

    @pytest.mark.parametrize("kind", ACTIONS)
    def test_forgets_everything_at_a_reset(self, kind):
        """Zero belief, zero state, zero action: also where the action 0 has a number of its own."""
        agent = make_small_agent(env_spec=make_env_spec(action=ACTIONS[kind]))
        inputs = make_inputs(agent, 3, is_init=True)
        rssm = agent.loss.model.world_model.rssm
        belief, state = rssm.initial(3, torch.device("cpu"))
        with torch.no_grad():
            expected = rssm.core(1, 3)(belief, state, rssm.action_branch(torch.zeros(3, agent.policy.codec.size)))
        assert_bfloat16_near(agent.policy(inputs)["next", "belief"], expected)

    def test_samples_or_takes_the_mode(self):
        """Latents are sampled in both cases; they are held still here."""
        agent = make_small_agent()
        fix_samples(agent)
        inputs = make_inputs(agent, 3)

        def act(kind):
            with set_exploration_type(kind):
                return agent.policy(inputs.clone())["action"]

        assert torch.equal(act(ExplorationType.DETERMINISTIC), act(ExplorationType.DETERMINISTIC))
        assert not torch.equal(act(ExplorationType.RANDOM), act(ExplorationType.RANDOM))
        mean = torch.stack([act(ExplorationType.RANDOM) for _ in range(200)]).mean(0)
        torch.testing.assert_close(mean, act(ExplorationType.DETERMINISTIC), atol=0.35, rtol=0)  # 5 / sqrt(200)

    def test_latents_are_sampled_in_any_case(self):
        agent = make_small_agent()
        inputs = make_inputs(agent, 3)
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            states = [agent.policy(inputs.clone())["next", "state"] for _ in range(2)]
        assert not torch.equal(*states)

    def test_acting_and_training_encode_a_frame_alike(self):
        """The same uint8 frame and vector give the same tokens on both paths."""
        agent = make_small_agent()
        model, tokens = agent.loss.model.world_model, []
        encode = model.encode
        model.encode = lambda observations: tokens.append(encode(observations)) or tokens[-1]
        inputs = make_inputs(agent, 2)
        agent.policy(inputs)
        batch = make_batch(agent, batch_size=2, length=1)
        for key in ("pixels", "observation"):
            batch[key] = inputs[key].unsqueeze(1)
        agent.loss.model(batch)
        assert tokens[0].shape == tokens[1].shape == (2, 1, sum(e.out_features for e in model.encoders.values()))
        assert torch.equal(tokens[0], tokens[1])

    def test_shares_its_weights_with_the_learner(self):
        agent = make_small_agent()
        learner = {id(p) for p in agent.loss.parameters()}
        assert all(id(p) in learner for p in agent.policy.parameters())


def transitions(*streams: list[dict]) -> TensorDict:
    """Collected steps [streams, t] from rows of numbers; `end` is "terminated" or "truncated"."""
    rows = []
    for stream, steps in enumerate(streams):
        row = []
        for step in steps:
            end = step.get("end")
            flags = {
                "terminated": torch.tensor([end == "terminated"]),
                "truncated": torch.tensor([end == "truncated"]),
                "done": torch.tensor([end is not None]),
            }
            never = {key: torch.zeros(1, dtype=torch.bool) for key in flags}
            root = {
                "observation": torch.tensor([step["seen"]]),
                "stream": torch.tensor([stream]),
                "is_init": torch.tensor([step.get("start", False)]),
                "previous_action": torch.tensor([step["led_here"]]),
                "previous_reward": torch.tensor([step["paid"]]),
                "belief": torch.zeros(1),
                "state": torch.zeros(1),
                "action": torch.tensor([step["action"]]),
            }
            following = {
                "observation": torch.tensor([step["then"]]),
                "stream": torch.tensor([stream]),
                "reward": torch.tensor([step["reward"]]),
                "belief": torch.tensor([step["latent"]]),
                "state": torch.tensor([step["latent"]]),
            }
            row.append(TensorDict(root | never | {"next": TensorDict(following | flags)}))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def step(seen: float, led_here: float, paid: float, action: float, reward: float, latent: float, **flags) -> dict:
    """One collected step: seen with what led here, the action taken and the reward that it brought."""
    return {
        "seen": seen,
        "led_here": led_here,
        "paid": paid,
        "action": action,
        "then": seen + 1,
        "reward": reward,
        "latent": latent,
        **flags,
    }


FIRST = [  # two episodes: seen 10, 11, 12 and a time limit; 20, 21, 22 and an end of the task
    step(10.0, 0.0, 0.0, 0.1, 1.0, 1.0, start=True),
    step(11.0, 0.1, 1.0, 0.2, 2.0, 2.0, end="truncated"),
    step(20.0, 0.0, 0.0, 0.3, 3.0, 3.0, start=True),
    step(21.0, 0.3, 3.0, 0.4, 4.0, 4.0, end="terminated"),
]
SECOND = [step(30.0 + i, i / 10, -float(i), (i + 1) / 10, -i - 1.0, 5.0 + i) for i in range(4)]  # no ends
COLUMNS = ("observation", "action", "reward", "is_init", "terminated", "done", "belief")
RECORDS = [
    # seen, led here, paid, is_init, terminated, done, latent found here (0: the policy was not asked)
    (10.0, 0.0, 0.0, True, False, False, 1.0),
    (11.0, 0.1, 1.0, False, False, False, 2.0),
    (12.0, 0.2, 2.0, False, False, True, 0.0),
    (20.0, 0.0, 0.0, True, False, False, 3.0),
    (21.0, 0.3, 3.0, False, False, False, 4.0),
    (22.0, 0.4, 4.0, False, True, True, 0.0),
]


def table(records: TensorDict) -> list[tuple]:
    columns = (records[key].flatten().tolist() for key in COLUMNS)
    return [
        tuple(round(value, 6) if isinstance(value, float) else value for value in row)
        for row in zip(*columns, strict=True)
    ]


class TestToRecords:
    to_records = ToRecords(("observation",), ActionCodec(Bounded(-1.0, 1.0, (1,))))

    def test_two_episodes(self):
        """One record per observation, N + 1 for N steps; actions and rewards of a start are zero."""
        records = self.to_records(transitions(FIRST))
        assert table(records) == RECORDS
        assert torch.equal(records["state"], records["belief"])

    def test_streams_stay_apart(self):
        records = self.to_records(transitions(FIRST, SECOND))
        for stream, expected in enumerate(
            (RECORDS, [(30.0 + i, i / 10, -float(i), False, False, False, 5.0 + i) for i in range(4)])
        ):
            assert table(records[records["stream"].squeeze(-1) == stream]) == expected

    def test_where_batches_are_cut_does_not_matter(self):
        """Batches of 1, 2 or 3 steps make the same records, also where a batch ends with an episode."""
        whole = transitions(FIRST, SECOND)
        for cut in (1, 2, 3):
            parts = [self.to_records(whole[:, :cut]), self.to_records(whole[:, cut:])]
            joined = torch.cat(parts)
            joined = joined[joined["stream"].squeeze(-1).argsort(stable=True)]
            expected = self.to_records(whole)
            expected = expected[expected["stream"].squeeze(-1).argsort(stable=True)]
            assert table(joined) == table(expected)

    def test_layout_is_that_of_the_replay(self):
        agent = make_small_agent()
        records = agent.to_records(self.rollout(agent, ACTIONS["continuous"]))
        assert set(records.keys()) == {*agent.record.keys(), "stream"}
        for key, leaf in agent.record.items():
            assert records[key].shape[1:] == leaf.shape and records[key].dtype == leaf.dtype, key

    @pytest.mark.parametrize("kind", ACTIONS)
    def test_the_action_of_a_start_is_zero(self, kind):
        """Zero and not the vector of choice number 0, which nobody chose."""
        agent = make_small_agent(env_spec=make_env_spec(action=ACTIONS[kind]))
        records = agent.to_records(self.rollout(agent, ACTIONS[kind]))
        starts = records["is_init"].squeeze(-1)
        assert starts.any() and not records["action"][starts].any()
        if kind != "continuous":
            assert torch.equal(records["action"][~starts].sum(-1), torch.ones(int((~starts).sum())))

    def rollout(self, agent, spec) -> TensorDict:
        """Two steps of an episode in the layout of a collector."""
        steps = make_inputs(agent, 2)
        steps["is_init"][0] = True
        steps["previous_action"] = torch.stack([spec.zero(), spec.rand()])
        steps["previous_reward"], steps["stream"] = torch.tensor([[0.0], [1.0]]), torch.zeros(2, 1, dtype=torch.int64)
        steps = agent.policy(steps)
        for key in ("done", "terminated", "truncated"):
            steps[key] = torch.zeros(2, 1, dtype=torch.bool)
            steps["next", key] = torch.tensor([[False], [key != "terminated"]])
        for key in ("pixels", "observation", "stream"):
            steps["next", key] = steps[key]
        steps["next", "reward"] = torch.tensor([[1.0], [2.0]])
        return steps


def collect(task: str, random_steps: int = 0):
    """Records [R] of four batches of eight steps on two counters, collected for real; also the replay and the agent."""
    agent, replay, collector = make_mock_parts(task=task, random_steps=random_steps)
    parts = []
    for _, batch in zip(range(4), collector, strict=False):
        parts.append(agent.to_records(batch.clone()))
        replay.extend(parts[-1])
    collector.shutdown()
    return torch.cat(parts), replay, agent


@pytest.fixture(params=["continuous", "discrete"])
def collected(request, monkeypatch):
    set_episode_length(monkeypatch, 5)
    return collect(request.param)


@torch.no_grad()
def assert_latents_follow_each_other(records: TensorDict, agent) -> None:
    """The belief of a record comes from the latents of the record before and the action in between."""
    rssm = agent.loss.model.world_model.rssm
    no_action = rssm.action_branch(torch.zeros(1, records["action"].shape[-1]))
    fresh = rssm.core(1, 1)(*rssm.initial(1, torch.device("cpu")), no_action)
    for stream in range(2):
        own = records[records["stream"].squeeze(-1) == stream]
        before, after = own[:-1], own[1:]
        starts, ends = (after[key].squeeze(-1) for key in ("is_init", "done"))
        inside = ~starts & ~ends  # the policy is not asked at the last observation
        expected = next_belief(agent, before["belief"], before["state"], after["action"])
        assert_bfloat16_near(after["belief"][inside], expected[inside])
        assert_bfloat16_near(after["belief"][starts], fresh.expand(int(starts.sum()), -1))
        assert not after["belief"][ends].any()


class TestAlignment:
    """The counter shows [step, episode, last action] and pays the number of the step."""

    def test_each_stream_is_one_episode_after_another(self, collected):
        records = collected[0]
        for stream in range(2):
            own = records[records["stream"].squeeze(-1) == stream]
            expected = [(step, episode) for episode in range(7) for step in range(6)]  # N + 1 = 6 records each
            seen = [tuple(row) for row in own["observation"][:, :2].int().tolist()]
            assert seen == expected[: len(own)]
            assert len(own) == 8 * 4 + 6  # 32 steps, 6 episodes ended

    def test_ends_and_starts(self, collected):
        """The last observation of an episode has a record of its own, with its reward, and the next is a reset."""
        records, step = collected[0], collected[0]["observation"][:, :1]
        assert torch.equal(records["is_init"], step == 0)
        assert torch.equal(records["done"], step == 5)
        assert not records["terminated"].any()  # a time limit

    def test_rewards_are_those_on_arriving(self, collected):
        records = collected[0]
        assert torch.equal(records["reward"], records["observation"][:, :1])

    def test_actions_are_those_that_led_here(self, collected):
        """The observation shows the last action; a start shows and has zeros."""
        records = collected[0]
        assert torch.equal(records["action"], records["observation"][:, 2:])
        assert records["action"][~records["is_init"].squeeze(-1)].any(-1).all()

    def test_windows_keep_the_alignment(self, collected):
        _, replay, _ = collected
        for _ in range(5):
            batch = replay.sample()
            assert torch.equal(batch["action"], batch["observation"][..., 2:])
            assert torch.equal(batch["reward"], batch["observation"][..., :1])
            step = batch["observation"][..., 0]
            follows = ~batch["is_init"][:, 1:, 0]
            assert torch.equal(step.diff(dim=1)[follows], torch.ones(int(follows.sum())))

    def test_lambda_return_of_a_window(self, collected):
        """Steps pay 1, 2, 3, 4, 5: without discount the return of step k of an episode is 15 - (1 + ... + k)."""
        _, replay, _ = collected
        compared = 0
        for batch in (replay.sample() for _ in range(5)):
            reward, done, k = batch["reward"][..., 0], batch["done"][..., 0], batch["observation"][..., 0]
            returns = lambda_return(reward, (~done).float(), torch.zeros_like(reward), 1.0)
            ends_later = done.flip(1).cumsum(1).flip(1)[:, 1:] > 0  # [B, T - 1]
            inside = ends_later & ~done[:, :-1]
            assert torch.equal(returns[inside], (15 - k * (k + 1) / 2)[:, :-1][inside])
            compared += inside.sum()
        assert compared > 20

    def test_latents_belong_to_their_record(self, collected):
        records, _, agent = collected
        assert_latents_follow_each_other(records, agent)

    def test_latents_of_random_steps(self, monkeypatch):
        """The model state is wanted whoever chose the action: training starts windows from it."""
        set_episode_length(monkeypatch, 5)
        records, _, agent = collect("continuous", random_steps=16)
        assert_latents_follow_each_other(records, agent)

    def test_training_goes_on_where_the_policy_was(self, collected):
        """The first belief of a window is the stored one, as long as the weights are the same."""
        records, replay, agent = collected
        replay.read_new(["belief"])
        batch = replay.sample()
        rollout = agent.loss.model.observe(batch)
        for b, (stream, position) in enumerate(
            zip(*(batch["context", key].tolist() for key in ("stream", "position")), strict=True)
        ):
            record = records[records["stream"].squeeze(-1) == stream][position]
            assert torch.equal(record["observation"], batch["observation"][b, 0])
            if not record["done"]:
                assert_bfloat16_near(record["belief"], rollout.belief[b, 0])


class TestBuild:
    def test_weights_go_to_their_losses(self):
        weights = compose_config()["agent"]["loss_weights"]
        model, actor_critic, replay = partition(weights, WorldModelLoss)
        assert set(actor_critic) == {"actor", "value"} and replay == {"value_replay": 0.3}
        assert model["model_representation"] == 0.1 and len(model) == 5

    @pytest.mark.parametrize("change", [{"actr": 1.0}, {"actor": None}])
    def test_unknown_and_missing_weights(self, change):
        weights = compose_config()["agent"]["loss_weights"] | change
        weights = {name: value for name, value in weights.items() if value is not None}
        with pytest.raises(ValueError, match=r"agent\.loss_weights"):
            partition(weights, WorldModelLoss)

    def test_a_stale_key_names_itself(self):
        with pytest.raises(TypeError, match="no_such_knob"):
            make_small_agent("+agent.no_such_knob=1")

    def test_unknown_agents(self):
        with pytest.raises(ValueError, match=r"agent\.name='dreamer_v9': choose one of .*'dreamer_v3'"):
            load("dreamer_v9")
        assert load("dreamer_v3") is dreamer_v3

    def test_takes_exactly_the_keys_of_its_configuration(self):
        keys = set(compose_config()["agent"]) - {"name"} | {"env_spec", "device", "optimization"}
        assert keys == set(inspect.signature(dreamer_v3.build).parameters)
