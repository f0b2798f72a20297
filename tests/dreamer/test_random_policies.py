"""Random behaviour: each episode its own, and what each of them is like."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, OneHot

from dreamer.collection import EnvFactory
from dreamer.random_policies import BIASED, BROWNIAN, FASTEST, SLOWEST, STICKY, UNIFORM, MixedRandomPolicy

CONTINUOUS, ONE_HOT, NUMBER = Bounded(-1.0, 1.0, (2,)), OneHot(4), Categorical(4)
ROWS, STEPS = 600, 40


def play(action_spec, rows=ROWS, steps=STEPS):
    """Actions as vectors [steps, rows, A] and behaviours [rows, 2 + A] of one episode in every row."""
    torch.manual_seed(0)
    policy = MixedRandomPolicy(action_spec)
    behaviour = torch.zeros(rows, 2 + policy.codec.size)
    previous, is_init, actions = action_spec.zero((rows,)), torch.ones(rows, 1, dtype=torch.bool), []
    for _ in range(steps):
        data = TensorDict({"previous_action": previous, "behaviour": behaviour, "is_init": is_init}, rows)
        data = policy(data)
        previous, behaviour, is_init = data["action"], data["next", "behaviour"], torch.zeros_like(is_init)
        assert action_spec.expand(rows, *action_spec.shape).is_in(previous)
        actions.append(policy.codec.encode(previous))
    return torch.stack(actions), behaviour


def share_held(actions):
    """Share of steps [rows] that repeat the action before them."""
    return (actions[1:] == actions[:-1]).all(-1).float().mean(0)


@pytest.mark.parametrize("spec", [CONTINUOUS, ONE_HOT, NUMBER])
def test_behaviours_are_drawn_alike_and_paces_are_in_their_range(spec):
    _, behaviour = play(spec, steps=2)
    kinds = 4 if spec is CONTINUOUS else 3
    counts = torch.bincount(behaviour[:, 0].long(), minlength=4)
    assert ((counts[:kinds] - ROWS / kinds).abs() < 5 * (ROWS / kinds) ** 0.5).all() and not counts[kinds:].any()
    logs = behaviour[:, 1].log()
    assert behaviour[:, 1].min() >= SLOWEST - 1e-6 and behaviour[:, 1].max() <= FASTEST + 1e-6
    assert logs.mean().item() == pytest.approx((torch.tensor(SLOWEST * FASTEST).log() / 2).item(), abs=0.15)


def test_continuous_behaviours():
    actions, behaviour = play(CONTINUOUS)
    kind, pace, centre = behaviour[:, 0], behaviour[:, 1], behaviour[:, 2:]
    uniform = actions[:, kind == UNIFORM]
    assert uniform.std().item() == pytest.approx(3**-0.5, abs=0.02) and not share_held(uniform).any()
    for held in (STICKY, BIASED):
        rows = kind == held
        assert torch.corrcoef(torch.stack([share_held(actions[:, rows]), 1 - pace[rows]]))[0, 1] > 0.8
        assert share_held(actions[:, rows]).mean().item() == pytest.approx(1 - pace[rows].mean().item(), abs=0.03)
    biased = kind == BIASED
    assert torch.corrcoef(torch.stack([actions[:, biased].mean(0).flatten(), centre[biased].flatten()]))[0, 1] > 0.9
    walks = actions[:, kind == BROWNIAN]
    moves = (walks[1:] - walks[:-1])[(walks[1:].abs() < 1) & (walks[:-1].abs() < 0.2)]  # not clipped
    assert 0 < moves.std() < 0.35 and walks[:, :, 0].std(0).mean() > 0.1


def test_discrete_behaviours():
    actions, behaviour = play(ONE_HOT)
    kind, logits = behaviour[:, 0], behaviour[:, 2:]
    assert share_held(actions[:, kind == UNIFORM]).mean().item() == pytest.approx(0.25, abs=0.02)
    sticky, pace = actions[:, kind == STICKY], behaviour[kind == STICKY, 1]
    assert share_held(sticky).mean().item() == pytest.approx((1 - 0.75 * pace).mean().item(), abs=0.02)
    biased = kind == BIASED
    chances = torch.softmax(logits[biased], -1)
    assert torch.corrcoef(torch.stack([actions[:, biased].mean(0).flatten(), chances.flatten()]))[0, 1] > 0.8


def test_an_episode_keeps_its_behaviour_and_the_next_has_another():
    policy = MixedRandomPolicy(CONTINUOUS)
    env = {"backend": "mock", "name": "counter", "task": "continuous", "frame_skip": 1, "from_pixels": False}
    torch.manual_seed(0)
    data = EnvFactory(env, range(2), 0, policy.primers)().rollout(25, policy, break_when_any_done=False)
    behaviour = data["next", "behaviour"]  # [2, 25, 4], episodes of 10 steps
    for start, end in ((0, 10), (10, 20), (20, 25)):
        assert (behaviour[:, start:end] == behaviour[:, start : start + 1]).all()
    firsts = behaviour[:, ::10].flatten(0, 1)
    assert len(firsts.unique(dim=0)) == len(firsts)


def test_it_is_a_function_of_the_global_generator():
    assert torch.equal(play(CONTINUOUS, steps=3)[0], play(CONTINUOUS, steps=3)[0])
