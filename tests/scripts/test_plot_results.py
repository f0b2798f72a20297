"""Statistics against numbers worked out by hand, the format of scores, and the program from end to end."""

import gzip
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT / "docs/data"


def module(name: str):
    """Import a script as its neighbours do."""

    @pytest.fixture
    def load(monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT / "scripts"))
        return importlib.import_module(name)

    return load


form = module("results_format")
stats = module("dreamer.score_statistics")
plot = module("plot_results")


def entry(task="dmc_walker_walk", method="dreamer_v3", seed=0, xs=(100, 200), ys=(1.0, 2.0)) -> dict:
    return {"task": task, "method": method, "seed": seed, "xs": list(xs), "ys": list(ys)}


# ---- statistics


def test_iqm_cuts_a_quarter_at_either_end(stats):
    assert stats.iqm(np.arange(8.0)) == 3.5  # mean of 2, 3, 4, 5
    assert stats.iqm(np.array([100.0, 1.0, 3.0, 2.0])) == 2.5  # mean of 2, 3
    assert stats.iqm(np.array([0.0, 1.0, 5.0, 6.0, 1000.0])) == 4.0  # one of five is cut off at either end
    assert stats.iqm(np.array([1.0, 2.0, 6.0])) == 3.0  # nothing to cut
    assert stats.iqm(np.array([[0.0, 1.0, 3.0, 9.0], [4.0, 4.0, 4.0, 8.0]])).tolist() == [2.0, 4.0]


def test_resampling_stays_within_the_task(stats):
    draws = stats.resample([[1.0, 2.0, 3.0], [10.0, 20.0]], 500, np.random.default_rng(0))
    assert draws.shape == (500, 5)
    assert set(draws[:, :3].ravel()) == {1.0, 2.0, 3.0} and set(draws[:, 3:].ravel()) == {10.0, 20.0}


def test_interval_when_tasks_differ_but_seeds_do_not(stats):
    """Bootstrap over everything would give a wide interval; within tasks there is nothing to vary."""
    assert stats.estimate_iqm({"a": [0.0, 0.0], "b": [900.0, 900.0]}) == (450.0, 450.0, 450.0)


def test_interval_of_two_seeds(stats):
    """The mean of two draws from {0, 1} is 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4."""
    samples = stats.iqm(stats.resample([[0.0, 1.0]], 20_000, np.random.default_rng(1)))
    values, counts = np.unique(samples, return_counts=True)
    assert values.tolist() == [0.0, 0.5, 1.0]
    assert np.allclose(counts / len(samples), [0.25, 0.5, 0.25], atol=0.02)
    assert stats.estimate_iqm({"a": [0.0, 1.0]}) == (0.5, 0.0, 1.0)
    assert stats.estimate_iqm({"a": [0.0, 1.0]}, level=0.4) == (0.5, 0.5, 0.5)  # between the 30 % and the 70 % quantile


def test_interval_agrees_with_scipy(stats):
    """`scipy.stats.bootstrap` resamples each of several samples by itself, which is the same."""
    from scipy.stats import bootstrap

    generator = np.random.default_rng(2)
    scores = {"a": generator.normal(100, 20, 8), "b": generator.normal(500, 50, 6), "c": generator.normal(800, 10, 10)}
    ours = stats.estimate_iqm(scores, resamples=20_000)
    theirs = bootstrap(
        tuple(scores.values()),
        lambda *strata, axis: stats.iqm(np.concatenate(strata, axis=axis)),
        n_resamples=20_000,
        method="percentile",
    ).confidence_interval
    width = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) < 0.05 * width and abs(ours.high - theirs.high) < 0.05 * width


def test_one_seed_has_no_interval(stats):
    value, low, high = stats.estimate_iqm({"a": [10.0], "b": [20.0]})
    assert value == 15.0 and math.isnan(low) and math.isnan(high)


def test_intervals_are_reproducible(stats):
    scores = {"a": [1.0, 5.0, 2.0, 8.0]}
    assert stats.estimate_iqm(scores, seed=3) == stats.estimate_iqm(scores, seed=3)


def test_score_is_the_mean_of_the_last_part(stats, form):
    run = form.Run("t", "m", 0, [50, 90, 91, 100, 101], [1.0, 2.0, 4.0, 6.0, 100.0])
    assert stats.score_at(run, 100, 0.1) == 5.0  # 91 and 100: the window is (90, 100]
    assert stats.score_at(run, 100, 1.0) == 3.25
    assert stats.score_at(run, 60, 0.1) == 1.25  # nothing in (54, 60]: a quarter of the way from 50 to 90
    assert stats.score_at(run, 200, 0.1) is None and stats.score_at(run, 49, 0.1) is None


def test_curves_are_averaged_where_there_are_runs(stats, form):
    runs = [form.Run("t", "m", 0, [1, 10, 11], [1.0, 3.0, 7.0]), form.Run("t", "m", 1, [5], [4.0])]
    frames, estimates = stats.estimate_curve(runs, 10)
    assert frames == [10, 20] and [estimate.value for estimate in estimates] == [3.0, 7.0]


# ---- the format


def test_bins_are_dated_at_their_end(form):
    binned = form.average_bins(form.Run("t", "m", 0, [0, 1, 10, 11, 35], [5.0, 1.0, 3.0, 4.0, 6.0]), 10)
    assert (binned.xs, binned.ys) == ([0, 10, 20, 40], [5.0, 2.0, 4.0, 6.0])


@pytest.mark.parametrize("name", ["runs.json", "runs.json.gz"])
def test_files_survive_a_round_trip(form, tmp_path, name):
    runs = [form.Run("dmc_cheetah_run", "dreamer_v3@random", 3, [10, 20], [0.5, 1.5])]
    form.write_runs(tmp_path / name, runs)
    first = (tmp_path / name).read_bytes()
    assert form.read_runs(tmp_path / name) == runs and [path.name for path in tmp_path.iterdir()] == [name]
    form.write_runs(tmp_path / name, runs)
    assert (tmp_path / name).read_bytes() == first


def test_points_without_a_return_are_left_out(form, tmp_path):
    (tmp_path / "runs.json").write_text(json.dumps([entry(xs=(1, 2, 3), ys=(1.0, None, 3.0))]))
    (run,) = form.read_runs(tmp_path / "runs.json")
    assert (run.xs, run.ys) == ([1, 3], [1.0, 3.0])


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}[",
        "[1]",
        '[{"task": "t"}]',
        json.dumps([entry(xs=(1, 1))]),
        json.dumps([entry(ys=(1.0,))]),
        json.dumps([entry(ys=(1.0, math.nan))]),
    ],
)
def test_broken_files_name_themselves(form, tmp_path, content):
    (tmp_path / "runs.json").write_text(content)
    with pytest.raises(ValueError, match=r"runs\.json: not a list of runs"):
        form.read_runs(tmp_path / "runs.json")


def test_a_truncated_gzip_file_names_itself(form, tmp_path):
    (tmp_path / "runs.json.gz").write_bytes(gzip.compress(json.dumps([entry()] * 20).encode())[:-12])
    with pytest.raises(ValueError, match=r"runs\.json\.gz: not a list of runs"):
        form.read_runs(tmp_path / "runs.json.gz")


def test_methods_carry_the_distraction(form):
    assert form.join_method("ppo", "none") == "ppo" and form.split_method("ppo") == ("ppo", "none")
    assert form.split_method(form.join_method("ppo", "natural_video")) == ("ppo", "natural_video")


def test_metrics_become_a_curve(form, tmp_path):
    lines = [
        '{"frames": 2, "a": 1.0}',
        '{"frames": 2, "b": 9.0}',
        '{"frames": 4, "a": null}',
        '{"frames": 6, "a": 2.5}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"frames": 8, "a"')
    assert form.read_curve(tmp_path / "metrics.jsonl", "a") == ([2, 6], [1.0, 2.5])


# ---- the published scores that come with the project


@pytest.mark.parametrize(
    ("task", "method", "mean"),
    [("cheetah_run", "dreamerv3", 832), ("walker_walk", "dreamerv3", 960), ("finger_turn_hard", "drqv2", 238)],
)
def test_published_scores(form, stats, task, method, mean):
    """They still give the means of the full files over the last tenth of a million frames."""
    runs = [run for run in form.read_runs(DATA / "dmc_vision.json.gz") if run[:2] == (f"dmc_{task}", method)]
    scores = [stats.score_at(run, 1_000_000, 0.1) for run in runs]
    assert len(scores) >= 8 and np.mean(scores) == pytest.approx(mean, abs=5)


def test_published_files_are_small_and_complete(form):
    vision, proprio = (form.read_runs(DATA / f"dmc_{name}.json.gz") for name in ("vision", "proprio"))
    assert len(vision) == 384 and len({run.task for run in vision}) == 20
    assert len(proprio) == 270 and len({run.task for run in proprio}) == 18
    assert sum(path.stat().st_size for path in DATA.glob("*.json.gz")) < 80_000


# ---- the program


def make_runs(count: int, tasks=("dmc_walker_walk", "dmc_cheetah_run")) -> list[dict]:
    xs = list(range(10_000, 110_000, 10_000))
    return [
        entry(task, method, seed, xs, [scale * (x / 1000 + seed) for x in xs])
        for task in tasks
        for method, scale in (("dreamer_v3", 1.0), ("dreamer_v3@random", 0.5), ("ppo", 0.1))
        for seed in range(count)
    ]


@pytest.fixture
def draw(plot, monkeypatch, capsys, tmp_path):
    def draw(*arguments: str) -> str:
        out = tmp_path / "plots"
        monkeypatch.setattr(sys, "argv", ["plot_results.py", "--out", str(out), "--resamples", "50", *arguments])
        plot.main()
        return capsys.readouterr().out

    return draw


@pytest.fixture
def tabulate(plot, draw, monkeypatch):
    """The table alone: pictures take time."""
    for name in ("plot_curves", "plot_iqm", "plot_robustness"):
        monkeypatch.setattr(plot, name, lambda *_, **__: True)
    return draw


def rows(table: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {name: rest for name, *rest in cells}


def test_pictures_and_table(draw, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(make_runs(3)))
    table = draw(str(tmp_path / "results.json"), "--published", str(DATA / "dmc_vision.json.gz"))
    for name in ("curves.png", "iqm.png", "robustness.png"):
        assert (tmp_path / "plots" / name).read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "plots/table.md").read_text().strip() == table.strip()
    found = rows(table)
    header = ["frames", "dreamer_v3", "dreamer_v3@random", "ppo", "dreamerv3 (published)", "drqv2 (published)"]
    assert found["task"] == header
    assert found["walker_walk"][:3] == ["100,000", "101 ± 1 (3)", "50 ± 0 (3)"]
    assert found["walker_walk"][4].endswith("(10)")
    assert found["interquartile mean, 2 tasks"][1].startswith("101 [")
    assert found["random"] == [found["random"][0], "50%"] and found["none"][1] == "100%"


def test_methods_are_compared_where_asked(tabulate, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(make_runs(1)))
    table = tabulate(str(tmp_path / "results.json"), "--frames", "50_000")
    assert rows(table)["walker_walk"][:2] == ["50,000", "50 (1)"]


def test_runs_that_stopped_early_are_named(tabulate, tmp_path):
    runs = make_runs(2)
    runs[1]["xs"], runs[1]["ys"] = runs[1]["xs"][:5], runs[1]["ys"][:5]
    (tmp_path / "results.json").write_text(json.dumps(runs))
    table = tabulate(str(tmp_path / "results.json"))
    assert "Left out: walker_walk, dreamer_v3, seed 1 has returns from 10,000 to 50,000 frames only." in table
    assert rows(table)["walker_walk"][1] == "100 (1)"


def test_methods_are_compared_on_common_tasks(tabulate, tmp_path):
    runs = make_runs(2)
    runs += [entry("dmc_humanoid_walk", "dreamer_v3", 0, (50_000, 100_000), (900.0, 900.0))]
    (tmp_path / "results.json").write_text(json.dumps(runs))
    found = rows(tabulate(str(tmp_path / "results.json")))
    assert found["humanoid_walk"][1:] == ["900 (1)", "", ""]
    assert found["interquartile mean, 2 tasks"][1].startswith("100 [")


def test_a_single_run_is_enough(draw, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps([entry()]))
    assert rows(draw(str(tmp_path / "results.json")))["walker_walk"] == ["200", "2 (1)"]
    assert not (tmp_path / "plots/robustness.png").exists()


def test_the_same_run_twice_is_refused(tabulate, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps([entry()]))
    with pytest.raises(SystemExit, match=r"dmc_walker_walk, dreamer_v3, seed 0 for the second time"):
        tabulate(str(tmp_path / "results.json"), str(tmp_path / "results.json"))


@pytest.mark.parametrize("content", ["[]", json.dumps([entry(xs=(), ys=())])])
def test_nothing_to_draw_is_an_error(tabulate, tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(SystemExit, match="no run with points"):
        tabulate(str(tmp_path / "results.json"))


def test_a_missing_file_is_named(tabulate, tmp_path):
    with pytest.raises(SystemExit, match=r"absent\.json"):
        tabulate(str(tmp_path / "absent.json"))


def test_shrinking_a_file(tmp_path):
    source, target = tmp_path / "in.json", tmp_path / "out.json.gz"
    source.write_text(json.dumps([entry(method="a", ys=(1.04, 2.0)), entry(method="b")]))
    command = [sys.executable, str(ROOT / "scripts/results_format.py"), str(source), "--methods", "a", "--bin", "150"]
    subprocess.run([*command, "--out", str(target)], check=True, capture_output=True)
    (run,) = json.loads(gzip.decompress(target.read_bytes()))
    assert run == entry(method="a", xs=(150, 300), ys=(1.0, 2.0))
