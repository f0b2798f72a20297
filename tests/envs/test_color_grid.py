"""ColorGrid: its equations, what it shows and when, alone and in batches."""

import hashlib
import itertools
import math
import pickle
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import Compose, ParallelEnv, SerialEnv, TransformedEnv, check_env_specs

from envs import Render, make_env
from envs.backends.mock import MockEnv
from envs.transforms.color_grid import ColorGrid
from envs.transforms.color_grid_index import (
    LEVELS,
    GridIndex,
    RewardBins,
    action_index,
    choose_dims,
    choose_num_colors,
    choose_reward_bins,
    divide_colors,
)
from envs.transforms.color_grid_table import load_table, make_table
from tests.envs.scripted import ScriptedEnv

CONFIGS = Path(__file__).parents[2] / "configs/env/distraction"
CHOICES = sorted(path for path in CONFIGS.glob("*.yaml") if "name: color_grid" in path.read_text())
ONE = [[0, 1]]
HOPPER = [0, [0.8, 1]]
mock = partial(make_env, backend="mock", name="counter", task="continuous", image_size=32)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUCID_CACHE", str(tmp_path))
    return tmp_path / "color_grid"


def grid(level: str, **options) -> dict:
    return {"name": "color_grid", "level": level, "emit_index": True, "emit_mask": True, **options}


def decode(pixels: torch.Tensor, mask: torch.Tensor, table: np.ndarray) -> int:
    """The one index whose colours all background pixels have."""
    cells = np.arange(len(pixels)) // (len(pixels) // table.shape[1])
    background = ~mask[..., 0].numpy()
    right = (table[:, cells][:, :, cells] == pixels.numpy()).all(-1) | ~background  # [K, h, w]
    (found,) = right.all((1, 2)).nonzero()
    assert len(found) == 1
    return int(found[0])


# The table.


@pytest.mark.parametrize(
    ("seed", "colors", "last", "total", "digest"),
    [
        (1, 2500, (173, 6, 28), 243883688, "be47f290f9dd6f2b"),
        (1, 16, (40, 91, 161), 1570239, "35531ee2b59fa548"),
        (42, 2500, (243, 180, 82), 243803826, "8b321a02518cf823"),
    ],
)
def test_table_is_the_published_one(seed, colors, last, total, digest):
    table = make_table(seed, 16, colors)
    published = np.ascontiguousarray(table.transpose(1, 2, 0, 3))  # [N, N, K, 3]
    assert tuple(published[15, 15, -1]) == last
    assert published.sum() == total
    assert hashlib.sha256(published).hexdigest().startswith(digest)


def test_colors_are_uniform_without_255():
    counts = np.bincount(make_table(3, 16, 500).ravel(), minlength=256)
    assert counts[255] == 0
    expected = counts.sum() / 255
    chi_square = ((counts[:255] - expected) ** 2 / expected).sum()
    assert abs(chi_square - 254) < 5 * math.sqrt(2 * 254)


def test_table_is_made_once_and_mapped(cache):
    table = load_table(1, 4, 7)
    assert [path.name for path in cache.iterdir()] == ["1_4_7.npy"]
    stamp = (cache / "1_4_7.npy").stat().st_mtime_ns
    np.testing.assert_array_equal(load_table(1, 4, 7), make_table(1, 4, 7))
    assert (cache / "1_4_7.npy").stat().st_mtime_ns == stamp
    assert not table.flags.writeable and table[3].flags.c_contiguous


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"no array at all"])
def test_damaged_table_is_made_again(cache, content):
    cache.mkdir(parents=True)
    (cache / "1_4_7.npy").write_bytes(content)
    np.testing.assert_array_equal(load_table(1, 4, 7), make_table(1, 4, 7))


def test_table_of_another_seed_is_not_taken(cache):
    load_table(2, 4, 7)
    (cache / "2_4_7.npy").rename(cache / "1_4_7.npy")
    np.testing.assert_array_equal(load_table(1, 4, 7), make_table(1, 4, 7))


def test_table_without_a_cache_folder(monkeypatch):
    monkeypatch.setenv("LUCID_CACHE", "/proc/nowhere")
    np.testing.assert_array_equal(load_table(1, 4, 7), make_table(1, 4, 7))


# The index.


def test_bins_are_closed_on_the_right():
    edges = [(-1, 0), (-0.5, 0), (-0.4999, 1), (-0.25, 1), (0, 1), (1e-5, 2), (0.5, 2), (0.5001, 3), (1, 3)]
    actions = np.array([[value] for value, _ in edges])
    assert action_index(actions, [0], [4]).tolist() == [index for _, index in edges]


def test_first_dimension_counts_most():
    actions = np.stack([np.ones(6), -np.ones(6), np.eye(6)[0] * 2 - 1, np.eye(6)[5] * 2 - 1, np.zeros(6)])
    assert action_index(actions, range(6), [3] * 6).tolist() == [728, 0, 486, 2, 364]
    assert action_index(np.array([0.6, -0.9]), [0, 1], [4, 5]) == 15


def test_every_index_is_reached_once():
    middles = [[(2 * k + 1) / n - 1 for k in range(n)] for n in (2, 3, 4)]
    actions = np.array(list(itertools.product(*middles)))
    assert action_index(actions, [0, 1, 2], [2, 3, 4]).tolist() == list(range(24))
    index = GridIndex("action_cross_sequence", 72, (0, 1, 2), (2, 3, 4))
    seen = {index(actions, None, t)[0][row].item() for t in range(3, 6) for row in range(24)}
    assert seen == set(range(72))
    bins = choose_reward_bins("max", ONE, 5, 2.0)
    index = GridIndex("max", 120, (0, 1, 2), (2, 3, 4), bins)
    rewards = np.repeat(0.2 + 0.4 * np.arange(5), 24)
    assert index(np.tile(actions, (5, 1)), rewards, 0)[0].tolist() == list(range(120))


def test_uniform_actions_give_uniform_bins():
    actions = np.random.default_rng(0).uniform(-1, 1, (30_000, 2)).astype(np.float32)
    counts = np.bincount(action_index(actions, [0, 1], [3, 5]), minlength=15)
    chi_square = ((counts - 2000) ** 2 / 2000).sum()
    assert chi_square < 14 + 5 * math.sqrt(2 * 14)


@pytest.mark.parametrize(
    ("reward_range", "colors", "counts"),
    [
        ([(0, 10)], 16, [16]),
        (HOPPER, 16, [1, 15]),
        ([(0, 10)], 12500, [12500]),
        (HOPPER, 12500, [1, 12499]),
        ([0, 1, (0.2, 0.4), (0.5, 0.9)], 11, [1, 1, 5, 4]),
        ([0, 0.5, 1], 3, [1, 1, 1]),
    ],
)
def test_colors_of_reward_entries(reward_range, colors, counts):
    assert list(choose_reward_bins("reward", reward_range, colors, 1.0).counts) == counts
    assert divide_colors(2, 2, 11) == [5, 4]


def test_rewards_at_the_ends_and_outside():
    bins = RewardBins.divide([(0, 10)], 16)
    index, outside = bins(np.array([0, 0.6249, 0.6251, 5, 9.999, 10, 10.5, -3, 1e9]))
    assert index.tolist() == [0, 0, 1, 8, 15, 15, 15, 0, 15]
    assert outside.tolist() == [False] * 6 + [True] * 3
    index, outside = RewardBins.divide(HOPPER, 16)(np.array([0, 0.8, 0.9, 1, 0.1, 0.7]))
    assert index.tolist() == [0, 1, 8, 15, 0, 1]
    assert outside.tolist() == [False] * 4 + [True] * 2


def test_reward_range_is_per_frame():
    bins = choose_reward_bins("reward", HOPPER, 16, 2.0)
    assert (bins.lows, bins.highs) == ((0, 1.6), (0, 2))
    assert bins(np.float32([0, 1.6, 2]))[0].tolist() == [0, 1, 15]


def mutual_information(left: np.ndarray, right: np.ndarray) -> float:
    """Plug-in estimate in bits."""
    entropy = [
        -sum(n / len(left) * math.log2(n / len(left)) for n in np.unique(x, axis=-1, return_counts=True)[1])
        for x in (left, right, np.stack([left, right]))
    ]
    return entropy[0] + entropy[1] - entropy[2]


def test_information():
    generator = np.random.default_rng(0)
    actions, t = generator.uniform(-1, 1, (20_000, 1)), np.arange(20_000) % 1000
    drivers = {"action": action_index(actions, [0], [4]), "t": t}

    def informs(shown, about):
        value = mutual_information(shown, drivers[about])
        return value, mutual_information(generator.permutation(shown), drivers[about])

    action, _ = GridIndex("action", 4, (0,), (4,))(actions, None, t)
    assert informs(action, "action")[0] == pytest.approx(2.0, abs=0.1)
    assert informs(action, "t")[0] == pytest.approx(informs(action, "t")[1], abs=0.1)
    sequence, _ = GridIndex("sequence", 1000)(None, None, t)
    assert informs(sequence, "t")[0] == pytest.approx(8.97, abs=1.01)  # all of log2(1000) or of its estimate
    cross, _ = GridIndex("action_cross_sequence", 2500, (0,), (4,))(actions, None, t)
    assert informs(cross, "action")[0] == pytest.approx(2.0, abs=0.1)
    chance = generator.integers(2500, size=20_000)
    for about in drivers:
        value, null = informs(chance, about)
        assert value == pytest.approx(null, abs=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "maximum"}, r"level='maximum': choose one of .*did you mean minimum"),
        ({"mask": "sam"}, r"mask='sam': choose one of chroma, segmentation"),
        ({"reset_mode": "one"}, r"reset_mode='one': choose one of random, zero"),
        ({"num_cells_per_dim": 0}, r"num_cells_per_dim=0"),
        ({"num_cells_per_dim": 33}, r"\[32, 32, 3\].*num_cells_per_dim=33"),
        ({"num_colors_per_cell": 0}, r"num_colors_per_cell=0"),
        ({"level": "max", "num_colors_per_cell": 17}, r"num_colors_per_cell=17: .* a multiple of 9.* 9 boxes"),
        ({"level": "action", "num_colors_per_cell": 18}, r"num_colors_per_cell=18: .* exactly 9"),
        ({"level": "action_cross_sequence", "num_colors_per_cell": 9}, r"=9: .* a multiple of 9, at least 18"),
        ({"level": "action_cross_sequence", "num_colors_per_cell": 20}, r"=20: .* a multiple of 9, at least 18"),
        ({"level": "sequence", "num_colors_per_cell": 1}, r"num_colors_per_cell=1: .* at least 2"),
        ({"level": "random", "num_colors_per_cell": 1}, r"num_colors_per_cell=1: .* at least 2"),
        ({"level": "action", "action_power": 3, "action_splits": [3, 3]}, r"action_power=3, action_splits=\[3, 3\]"),
        ({"level": "max", "action_splits": [3, 3]}, r"action_splits=\[3, 3\]: level='max' takes action_power only"),
        ({"level": "action", "action_dims_to_split": [0, 0]}, r"action_dims_to_split=\[0, 0\]: .* from 0 to 1"),
        ({"level": "action", "action_dims_to_split": [2]}, r"action_dims_to_split=\[2\]: .* from 0 to 1"),
        ({"level": "action", "action_dims_to_split": []}, r"action_dims_to_split=\[\]"),
        ({"level": "action", "action_dims_to_split": [1, 0], "action_splits": [2, 3]}, r"\[1, 0\]: .*ascending"),
        ({"level": "action", "action_splits": [2, 3, 4]}, r"action_dims_to_split=\[0, 1, 2\]"),
        ({"level": "action", "action_dims_to_split": [0], "action_splits": [2, 3]}, r"\[2, 3\]: give 1, one for each"),
        ({"level": "action", "action_power": 0}, r"action_splits=\[0, 0\]: .*at least 1"),
        ({"level": "reward", "reward_range": None}, r"nothing is known of the rewards .*reward_range"),
        ({"level": "reward", "reward_range": []}, r"0 points and 0 intervals"),
        ({"level": "reward", "reward_range": [1]}, r"1 points and 0 intervals.*an interval or two points"),
        ({"level": "reward", "reward_range": HOPPER, "num_colors_per_cell": 2}, r"need at least 3 .* there are 2"),
        ({"level": "reward", "reward_range": [0, 1], "num_colors_per_cell": 3}, r"need exactly 2 .* there are 3"),
        ({"level": "max", "reward_range": HOPPER, "num_colors_per_cell": 9}, r"need at least 2 .* there are 1"),
        ({"level": "reward", "reward_range": [[1, 0]]}, r"not \[1, 0\]"),
        ({"level": "sequence", "num_colors_per_cell": 10**7}, r"num_colors_per_cell=10000000: .* MiB, the limit is"),
        ({"levle": "max"}, r"option of distraction='color_grid'='levle': .*did you mean level"),
        ({"name": "colour_grid"}, r"distraction='colour_grid': choose one of .*did you mean color_grid"),
        ({"name": "none", "level": "max"}, r"level='max': distraction='none' has no options"),
    ],
)
def test_constraints_name_the_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        mock(distraction={"name": "color_grid", "level": "max", "reward_range": ONE, **options}).reset()


def test_more_constraints():
    with pytest.raises(ValueError, match=r"needs images, from_pixels=True"):
        mock(from_pixels=False, distraction=grid("action"))
    with pytest.raises(ValueError, match=r"level='action': needs actions in \[-1, 1\]"):
        mock(task="discrete", distraction=grid("action"))
    with pytest.raises(KeyError, match=r"no 'mask' among .*Render\(mask=True\), or use mask='chroma'"):
        TransformedEnv(MockEnv(), Compose(Render(32), ColorGrid("action"))).reset()
    env = TransformedEnv(ScriptedEnv(), ColorGrid("action"))
    for value in (1.1, math.nan):
        with pytest.raises(ValueError, match=rf"action=\[0\.0, {value}.*clip_action=True"):
            env.step(env.reset().set("action", torch.tensor([0, value])))


def test_order_in_make_env():
    def kinds(**distraction):
        env = make_env(name="cheetah", distraction=distraction)
        return [type(part).__name__ for part in env.transform]

    rest = ["ExcludeTransform", "PreviousStep", "InitTracker"]
    assert kinds(name="none") == ["Render", *rest]
    assert kinds(name="color_grid") == ["Render", "ColorGrid", "ExcludeTransform", *rest]
    assert kinds(name="color_grid", emit_mask=True) == ["Render", "ColorGrid", *rest]
    assert kinds(name="color_grid", mask="chroma") == ["Render", "ColorGrid", *rest]
    assert kinds(name="distracting_cs")[:2] == ["DistractingCS", "Render"]


def test_clips_where_the_environment_does():
    env = mock(distraction=grid("action"))
    arrived = env.step(env.reset().set("action", torch.tensor([3.0, -2.0])))
    assert arrived["next", "distractor_index"].item() == 6
    assert arrived["action"].tolist() == [3, -2]
    env = TransformedEnv(ScriptedEnv(), ColorGrid("action", clip_action=True, emit_index=True))
    assert env.step(env.reset().set("action", torch.tensor([3.0, -2.0])))["next", "distractor_index"].item() == 6


def test_numbers_that_fit_the_level():
    assert choose_dims(None, None, None, 21) == ((0, 1, 2, 3, 4, 5), (3,) * 6)
    assert choose_dims([4, 1], 2, None, 6) == ((1, 4), (2, 2))
    assert choose_num_colors("max", None, 729) == 11664
    assert choose_num_colors("action_cross_sequence", None, 729) == 11664
    assert choose_num_colors("action", None, 9) == 9
    assert choose_num_colors("random", None, 1) == 11664


# What is shown, and when.


@pytest.mark.parametrize("reset_mode", ["zero", "random"])
@pytest.mark.parametrize("level", ["max", "reward", "action", "sequence", "action_cross_sequence"])
def test_pixels_follow_action_reward_and_time(level, reset_mode):
    options = {"reward_range": [[0, 10]]} if level in ("max", "reward") else {}
    colors = {"reward": 16, "sequence": 8, "action_cross_sequence": 36}.get(level)
    env = mock(frame_skip=2, distraction=grid(level, num_colors_per_cell=colors, reset_mode=reset_mode, **options))
    data = env.rollout(12, break_when_any_done=False)  # episodes of five steps
    bare = mock(frame_skip=2).rollout(12, break_when_any_done=False, policy=replay(data["action"]))
    time = torch.arange(12) % 5
    actions = torch.where(time[:, None] == 0, 0.0, data["action"].roll(1, 0)).numpy()
    rewards = torch.where(time == 0, 0.0, data["next", "reward"][:, 0].roll(1)).numpy()
    boxes = action_index(actions, [0, 1], [3, 3])
    bins = np.minimum((rewards * 16 / 20).astype(int), 15)
    expected = {
        "max": bins * 9 + boxes,
        "reward": bins,
        "action": boxes,
        "sequence": time.numpy() % 8,
        "action_cross_sequence": boxes * 4 + time.numpy() % 4,
    }[level]
    table = make_table(1, 16, env.observation_spec["distractor_index"].space.high.max().item() + 1)
    for k in range(12):
        if time[k] == 0 and reset_mode == "random":
            assert data["distractor_index"][k].item() == -1
        else:
            assert data["distractor_index"][k].item() == expected[k]
            assert decode(data["pixels"][k], data["mask"][k], table) == expected[k]
        kept = data["mask"][k].expand(-1, -1, 3)
        assert torch.equal(data["pixels"][k][kept], bare["pixels"][k][kept])
        assert 0 < kept.float().mean() < 1
    assert torch.equal(data["next", "pixels"][:4], data["pixels"][1:5])


def replay(actions: torch.Tensor):
    """A policy that takes given actions."""
    rows = iter(actions)
    return lambda tensordict: tensordict.set("action", next(rows))


def test_shows_the_last_action_and_no_other():
    env = mock(distraction=grid("action", action_dims_to_split=[0], action_power=8))
    data = env.rollout(9)
    boxes = torch.from_numpy(action_index(data["action"].numpy(), [0], [8]))
    shown = data["next", "distractor_index"][:, 0]
    assert torch.equal(shown, boxes)
    assert not torch.equal(shown[1:], boxes[:-1]) and not torch.equal(shown[:-1], boxes[1:])


def test_first_frame_of_the_published_preset():
    env = mock(
        distraction=grid("action_cross_sequence", num_colors_per_cell=2500, action_dims_to_split=[0], action_power=4)
    )
    assert env.reset()["distractor_index"].item() == 625


def test_rewards_out_of_range_are_counted():
    env = TransformedEnv(
        ScriptedEnv(rewards=torch.tensor([0.5, 1.0, 1.5, -1.0])), ColorGrid("reward", reward_range=ONE, emit_index=True)
    )
    assert env.rollout(4)["next", "distractor_index"].flatten().tolist() == [5832, 11663, 11663, 0]
    assert env.transform.rewards_out_of_range == 2


def test_none_changes_nothing_and_draws_nothing():
    env, bare = mock(distraction=grid("none", emit_mask=False)), mock()
    data = env.rollout(4)
    assert torch.equal(data["pixels"], bare.rollout(4, policy=replay(data["action"]))["pixels"])
    assert (data["distractor_index"] == -1).all() and "mask" not in set(data.keys())
    state = np.random.default_rng(0).bit_generator.state
    env = TransformedEnv(ScriptedEnv(), ColorGrid("none"))
    env.rollout(3)
    assert env.transform._generator.bit_generator.state == state


def test_minimum_draws_one_index_and_random_one_per_cell():
    env = mock(distraction=grid("minimum", num_colors_per_cell=50))
    data, table = env.rollout(9), make_table(1, 16, 50)
    for k in range(len(data)):
        assert decode(data["pixels"][k], data["mask"][k], table) == data["distractor_index"][k].item()
    assert len(data["distractor_index"].unique()) > 3
    pixels = mock(distraction=grid("random", num_colors_per_cell=3)).reset()["pixels"][::2, ::2].numpy()
    table = make_table(1, 16, 3)
    chosen = (table == pixels).all(-1)  # [K, N, N]
    outer = np.r_[0:4, 12:16]
    assert (chosen.sum(0)[outer] == 1).all() and chosen[:, outer].any((1, 2)).all()


@pytest.mark.parametrize("size", [(40, 50), 33])
def test_cells_where_the_size_does_not_divide(size):
    env = TransformedEnv(ScriptedEnv(size, foreground=0), ColorGrid("sequence", num_cells_per_dim=7))
    pixels = env.rollout(2)["next", "pixels"][0]
    height, width, _ = pixels.shape
    rows = np.minimum(np.arange(height) // (height // 7), 6)
    columns = np.minimum(np.arange(width) // (width // 7), 6)
    np.testing.assert_array_equal(pixels.numpy(), make_table(1, 7, 11664)[1][rows][:, columns])


def test_chroma_needs_no_mask():
    env = TransformedEnv(ScriptedEnv(), Compose(ColorGrid("sequence", mask="chroma", emit_mask=True)))
    bare = ScriptedEnv()
    first, expected = env.reset(), bare.reset()["pixels"]
    red, green, blue = expected.int().unbind(-1)
    replaced = (blue > green) & (blue > red)
    assert torch.equal(first["mask"][..., 0], ~replaced)
    assert torch.equal(first["pixels"][~replaced], expected[~replaced])
    tile = torch.from_numpy(make_table(1, 16, 11664)[0]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(first["pixels"][replaced], tile[replaced])


# Alone and in batches.


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("batch_size", [(), (3,)])
def test_specs(level, batch_size):
    transform = ColorGrid(level, reward_range=ONE, emit_index=True, emit_mask=True, mask="chroma")
    check_env_specs(TransformedEnv(ScriptedEnv(batch_size=batch_size, episode_length=4), transform))


def frames_of(length: int):
    return TransformedEnv(MockEnv(episode_length=length), Render(32, mask=True))


@pytest.mark.parametrize("level", ["max", "action_cross_sequence"])
def test_outside_and_inside_with_episodes_of_different_lengths(level):
    options = {"reward_range": [[0, 5]], "emit_index": True}
    outside = TransformedEnv(
        SerialEnv(2, [partial(frames_of, 3), partial(frames_of, 4)]), ColorGrid(level, reward_scale=1, **options)
    )
    inside = SerialEnv(
        2, [lambda n=n: TransformedEnv(frames_of(n), Compose(ColorGrid(level, **options))) for n in (3, 4)]
    )
    a = outside.rollout(9, break_when_any_done=False)
    b = inside.rollout(9, break_when_any_done=False, policy=replay_batch(a["action"]))
    for key in ("pixels", "distractor_index", ("next", "pixels"), ("next", "distractor_index")):
        assert torch.equal(a[key], b[key]), key
    if level == "action_cross_sequence":
        t = (a["distractor_index"] % 1296)[..., 0]
        assert t.tolist() == [[0, 1, 2] * 3, [0, 1, 2, 3] * 2 + [0]]


def replay_batch(actions: torch.Tensor):
    steps = iter(actions.unbind(1))
    return lambda tensordict: tensordict.set("action", next(steps))


def test_rows_that_do_not_step_keep_their_time():
    env = TransformedEnv(SerialEnv(2, [partial(frames_of, 9)] * 2), ColorGrid("sequence", emit_index=True))
    data = env.reset()
    for rows in ([True, True], [True, False], [True, False], [True, True]):
        data["action"], data["_step"] = env.action_spec.zero(), torch.tensor(rows)
        following = env.step(data)["next"]
        data = env.step_mdp(data).exclude("_step")
    assert following["distractor_index"].flatten().tolist() == [4, 2]


def test_partial_reset_keeps_the_rows_that_go_on():
    env = TransformedEnv(
        SerialEnv(2, [partial(frames_of, 9)] * 2), ColorGrid("sequence", reset_mode="random", emit_index=True)
    )
    data = env.step(env.reset().set("action", torch.ones(2, 2)))
    rest = env.reset(env.step_mdp(data).set("_reset", torch.tensor([[True], [False]])))
    assert rest["distractor_index"].tolist() == [[-1], [1]]
    assert torch.equal(rest["pixels"][1], data["next", "pixels"][1])
    data = env.step(rest.set("action", torch.ones(2, 2)))
    assert data["next", "distractor_index"].tolist() == [[1], [2]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("level", LEVELS)
def test_same_frames_on_a_gpu(level):
    def rollout(device):
        env = ScriptedEnv(
            batch_size=(3,), episode_length=4, rewards=torch.rand(5, 3, generator=seeded()), device=device
        )
        env = TransformedEnv(env, ColorGrid(level, reward_range=ONE, emit_index=True, reset_mode="random"))
        actions = torch.rand(3, 9, 2, generator=seeded()).to(device) * 2 - 1
        return env.rollout(9, break_when_any_done=False, policy=replay_batch(actions)).cpu()

    a, b = rollout("cpu"), rollout("cuda")
    assert torch.equal(a["next", "pixels"], b["next", "pixels"])
    assert torch.equal(a["next", "distractor_index"], b["next", "distractor_index"])


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_frames_own_their_memory():
    env = mock(distraction=grid("action"))
    data = env.reset()
    frames = [data["pixels"]]
    copies = [frames[0].clone()]
    for _ in range(5):
        data = env.step_mdp(env.step(data.set("action", env.action_spec.rand())))
        frames.append(data["pixels"])
        copies.append(data["pixels"].clone())
    assert all(torch.equal(a, b) for a, b in zip(frames, copies, strict=True))
    assert len({frame.data_ptr() for frame in frames}) == len(frames)


def test_input_images_stay_as_they_are():
    env = TransformedEnv(ScriptedEnv(), ColorGrid("sequence"))
    picture = ScriptedEnv().reset()
    before = picture["pixels"].clone()
    shown = env.transform._reset(TensorDict({}), picture.clone(recurse=False))
    assert torch.equal(picture["pixels"], before) and not torch.equal(shown["pixels"], before)


# Random numbers.


@pytest.mark.parametrize("level", ["minimum", "random"])
def test_seed_decides_the_frames(level):
    def frames(seed, **options):
        return mock(seed=seed, distraction=grid(level, **options)).rollout(4)["pixels"]

    assert torch.equal(frames(1), frames(1))
    assert not torch.equal(frames(1), frames(2))
    assert not torch.equal(frames(1), frames(1, table_seed=2))
    env = mock(seed=5, distraction=grid(level))
    env.rollout(3)
    env.set_seed(1)
    assert torch.equal(env.rollout(4)["pixels"], frames(1))


@pytest.mark.parametrize("level", LEVELS)
def test_global_random_numbers_are_left_alone(level):
    actions = torch.rand(5, 2, generator=seeded())
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    env = TransformedEnv(ScriptedEnv(), ColorGrid(level, reward_range=ONE, reset_mode="random"))
    env.rollout(5, policy=replay(actions))
    assert states[:2] == (random.getstate(), str(np.random.get_state()))
    assert torch.equal(states[2], torch.get_rng_state())


def test_pickles_small_and_goes_on():
    env = TransformedEnv(ScriptedEnv(), ColorGrid("random"))
    env.rollout(3)
    content = pickle.dumps(env.transform.clone())  # a transform of an environment takes it along
    assert len(content) < 5_000
    copies = [pickle.loads(content), pickle.loads(pickle.dumps(env.transform)), env.transform.clone()]
    for copy in copies:
        other = TransformedEnv(ScriptedEnv(), copy.clone())
        a, b = TransformedEnv(ScriptedEnv(), env.transform.clone()).reset(), other.reset()
        assert torch.equal(a["pixels"], b["pixels"])


def test_state_dict_brings_back_the_next_frame():
    def make():
        return TransformedEnv(ScriptedEnv(), ColorGrid("action_cross_sequence", emit_index=True))

    env, copy = make(), make()
    data = env.rollout(3)[-1]["next"].exclude("reward").set("action", torch.zeros(2))
    copy.reset()
    copy.transform.load_state_dict(env.transform.state_dict())
    assert copy.step(data.clone())["next", "distractor_index"] == env.step(data)["next", "distractor_index"]
    env, copy = (TransformedEnv(ScriptedEnv(), ColorGrid("minimum", emit_index=True)) for _ in range(2))
    env.rollout(3)
    copy.transform.load_state_dict(env.transform.state_dict())
    assert copy.reset()["distractor_index"] == env.reset()["distractor_index"]


# In real environments.


@pytest.mark.parametrize("frame_skip", [1, 2])
def test_simulation_is_left_alone(frame_skip):
    make = partial(
        make_env, name="walker", task="walk", frame_skip=frame_skip, image_size=16, pixels_only=False, seed=3
    )
    data = make(distraction=grid("random"), render={"fast": True}).rollout(5)
    bare = make(from_pixels=False).rollout(5, policy=replay(data["action"]))
    for key in ("observation", "reward", "done", "terminated"):
        assert torch.equal(data["next", key], bare["next", key]), key
    assert torch.equal(data["observation"], bare["observation"])


def test_collector_reaches_the_indices():
    """Under uniform actions, with the shapes that a collector gives to environments side by side."""
    distraction = grid("action_cross_sequence", num_colors_per_cell=27, emit_mask=False)
    env = SerialEnv(2, [partial(mock, seed=seed, distraction=distraction, image_size=16) for seed in (0, 1)])
    env.set_seed(0)
    collector = Collector(env, None, frames_per_batch=100, total_frames=600)
    try:
        shown = torch.cat([batch["next", "distractor_index"].flatten() for batch in collector])
    finally:
        collector.shutdown()
    assert len(shown.unique()) >= 0.95 * 27


@pytest.mark.slow
def test_cheetah_reaches_the_indices():
    distraction = grid("max", action_dims_to_split=range(5), action_power=2, reward_range=[[0, 0.1]])
    make = partial(make_env, name="cheetah", task="run", image_size=16, render={"fast": True}, distraction=distraction)
    env = SerialEnv(2, [partial(make, seed=seed) for seed in (0, 1)])
    torch.manual_seed(0)
    env.set_seed(0)
    data = env.rollout(320, break_when_any_done=False)
    shown = data["next", "distractor_index"]
    assert len((shown % 32).unique()) == 32
    bins = (data["next", "reward"] * 16 / 0.2).long().clamp(max=15)  # frame_skip doubles the range
    assert torch.equal(shown // 32, bins)
    env.close()


@pytest.mark.slow
def test_same_frames_in_other_processes():
    makers = [partial(mock, seed=seed, stream=seed, distraction=grid("random")) for seed in (0, 1)]
    actions = torch.rand(2, 5, 2, generator=seeded()) * 2 - 1
    serial = SerialEnv(2, makers).rollout(5, policy=replay_batch(actions))
    parallel = ParallelEnv(1, makers[1:], mp_start_method="spawn")
    try:
        data = parallel.rollout(5, policy=replay_batch(actions[1:]))
    finally:
        parallel.close()
    assert torch.equal(data["pixels"], serial["pixels"][1:])
    assert not torch.equal(serial["pixels"][0], serial["pixels"][1])
    table = make_table(1, 16, 11664).reshape(11664, -1, 3)
    for row in range(2):  # the colours are the same for all
        assert (table[:, 0] == serial["pixels"][row, 2, 0, 0].numpy()).all(-1).any()


# The configuration.


@pytest.mark.parametrize("path", CHOICES, ids=lambda path: path.stem)
def test_choices_fit(path):
    options = yaml.safe_load(path.read_text())
    assert options.pop("name") == "color_grid"
    base = ScriptedEnv(16, action_size=6)
    base.frame_rewards = ((0.0, 1.0),)
    colors = options["num_colors_per_cell"]
    env = TransformedEnv(base, ColorGrid(**options, emit_index=True))
    env.reset()
    high = env.observation_spec["distractor_index"].space.high.max().item() + 1
    assert colors in (None, high) and high * 16 * 16 * 3 < 10e6
