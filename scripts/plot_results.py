"""Pictures and a table of results, beside published ones.

    python scripts/plot_results.py runs/phase1/results.json --published docs/data/dmc_vision.json.gz --out plots
    python scripts/plot_results.py runs/phase2/results.json runs/phase3/results.json --frames 500_000 --out plots

Writes into `--out`:

    curves.png       return over frames of every task: interquartile mean over seeds, 95 % bootstrap interval
    iqm.png          interquartile mean over tasks and seeds, 95 % stratified bootstrap interval
    robustness.png   the same per distraction, where there is more than one
    table.md         every score, mean and standard deviation over seeds

The score of a run is its mean return in the last tenth (`--window`) of the frames at which methods are compared. These
are `--frames`, or for each task as many as the longest of our runs took, so that published runs are read where ours
end. Runs that have no return there are left out and named. Methods are compared on the tasks that all of them have.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter
from results_format import CLEAN, Run, read_runs, split_method

from dreamer.score_statistics import Estimate, Scores, estimate_curve, estimate_iqm, score_at

PUBLISHED = " (published)"
POINTS = 50  # of a learning curve
COLUMNS = 4  # of pictures
COLOURS = ("#0b5fa5", "#d1495b", "#2e8b57", "#8e5ea2", "#e08e0b", "#17a2b8", "#7f4f24", "#c2185b")
GREYS = ("#444444", "#8a8a8a", "#b5b5b5", "#cfcfcf", "#dddddd")


class Results(NamedTuple):
    """Everything that is drawn."""

    runs: list[Run]
    tasks: list[str]
    methods: list[str]  # ours first
    frames: dict[str, int]  # task -> where methods are compared
    scores: dict[str, dict[str, list[float]]]  # method -> task -> one score per seed
    unscored: list[Run]  # without a return where methods are compared

    def common_tasks(self, methods: Sequence[str]) -> list[str]:
        """The tasks for which all of these methods have a score."""
        return [task for task in self.tasks if all(task in self.scores[method] for method in methods)]

    def restrict(self, method: str, tasks: Sequence[str]) -> Scores:
        """The scores of a method on some tasks."""
        return {task: self.scores[method][task] for task in tasks}

    def colours(self) -> dict[str, str]:
        """Colours for our methods, greys for published ones."""
        ours = [method for method in self.methods if not method.endswith(PUBLISHED)]
        others = [method for method in self.methods if method.endswith(PUBLISHED)]
        return {method: COLOURS[i % len(COLOURS)] for i, method in enumerate(ours)} | {
            method: GREYS[i % len(GREYS)] for i, method in enumerate(others)
        }


def read_all(ours: Sequence[Path], published: Sequence[Path]) -> list[Run]:
    """Our runs, and the published ones of the same tasks with a mark on their method.

    Raises:
        ValueError: a file is wrong, the same run is in two files, or there is nothing to draw.
    """
    runs: dict[tuple[str, str, int], Run] = {}
    for path in ours:
        for run in filter(lambda run: run.xs, read_runs(path)):
            add(runs, run, path)
    if not runs:
        raise ValueError(f"{', '.join(map(str, ours))}: no run with points in it")
    tasks = {run.task for run in runs.values()}
    for path in published:
        for run in filter(lambda run: run.xs and run.task in tasks, read_runs(path)):
            add(runs, run._replace(method=run.method + PUBLISHED), path)
    return list(runs.values())


def add(runs: dict[tuple[str, str, int], Run], run: Run, path: Path) -> None:
    """Add a run that is not there yet."""
    key = (run.task, run.method, run.seed)
    if key in runs:
        raise ValueError(f"{path}: has {run.task}, {run.method}, seed {run.seed} for the second time")
    runs[key] = run


def load_results(ours: Sequence[Path], published: Sequence[Path], frames: int | None, window: float) -> Results:
    """Read the files and score the runs; `read_all` says what is an error."""
    runs = read_all(ours, published)
    own = [run for run in runs if not run.method.endswith(PUBLISHED)]
    tasks = list(dict.fromkeys(run.task for run in own))
    budgets = {task: frames or max(run.xs[-1] for run in own if run.task == task) for task in tasks}
    scores: dict[str, dict[str, list[float]]] = {run.method: {} for run in runs}
    unscored = []
    for run in runs:
        score = score_at(run, budgets[run.task], window)
        if score is None:
            unscored.append(run)
        else:
            scores[run.method].setdefault(run.task, []).append(score)
    return Results(runs, tasks, list(scores), budgets, scores, unscored)


def short_name(task: str) -> str:
    """The name of a task without its benchmark."""
    return task.removeprefix("dmc_")


def plot_curves(results: Results, path: Path, resamples: int) -> None:
    """Draw return over frames, one picture per task."""
    columns = min(COLUMNS, len(results.tasks))
    rows = math.ceil(len(results.tasks) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.4 * columns + 0.6, 2.6 * rows + 0.7), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(results.tasks) :]:
        axis.set_axis_off()
    for axis, task in zip(axes.flat, results.tasks, strict=False):
        for order, (method, colour) in enumerate(reversed(results.colours().items())):  # ours last, on top
            runs = [run for run in results.runs if (run.task, run.method) == (task, method)]
            if runs:
                plot_curve(axis, runs, results.frames[task], method, colour, order, resamples)
        axis.set_title(short_name(task), fontsize=10)
        axis.set_xlim(0, results.frames[task])
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("return")
    for axis in axes.flat[max(len(results.tasks) - columns, 0) : len(results.tasks)]:
        axis.set_xlabel("frames")  # the lowest picture of each column
    entries = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    labels = [method for method in results.methods if method in entries]
    figure.legend([entries[label] for label in labels], labels, loc="outside lower center", ncols=columns, fontsize=8)
    save(figure, path)


def plot_curve(
    axis: Axes, runs: Sequence[Run], frames: int, method: str, colour: str, order: int, resamples: int
) -> None:
    """Draw the runs of one method on one task."""
    xs, estimates = estimate_curve(runs, max(frames // POINTS, 1), resamples=resamples)
    count = sum(x <= frames * (1 + 1 / POINTS) for x in xs)
    xs, estimates = xs[:count], estimates[:count]
    published = method.endswith(PUBLISHED)
    values = [estimate.value for estimate in estimates]
    marker, line_width = "o" if len(xs) == 1 else None, 1.2 if published else 1.8
    axis.plot(xs, values, marker=marker, color=colour, lw=line_width, label=method, zorder=2 + order)
    lows, highs = [estimate.low for estimate in estimates], [estimate.high for estimate in estimates]
    axis.fill_between(xs, lows, highs, color=colour, alpha=0.18, lw=0, zorder=1)


def error_bars(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Distances of the bounds from the values; NaN, which is not drawn, where there is no interval."""
    spans = [(e.value - e.low, e.high - e.value) for e in estimates]
    return [[math.nan if math.isnan(span[side]) else max(span[side], 0.0) for span in spans] for side in (0, 1)]


def plot_iqm(results: Results, path: Path, resamples: int) -> bool:
    """Draw the interquartile means of all methods on their common tasks, if there are any."""
    methods = [method for method in results.methods if results.scores[method]]
    tasks = results.common_tasks(methods)
    if not methods or not tasks:
        return False
    estimates = [estimate_iqm(results.restrict(method, tasks), resamples=resamples) for method in methods]
    figure, axis = plt.subplots(figsize=(6.4, 0.9 + 0.36 * len(methods)), layout="constrained")
    colours = [results.colours()[method] for method in methods]
    values = [estimate.value for estimate in estimates]
    axis.barh(methods, values, xerr=error_bars(estimates), color=colours, height=0.65, ecolor="black", capsize=3)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_xlabel(f"interquartile mean of the return, {describe(tasks)}")
    axis.grid(axis="x", alpha=0.3)
    save(figure, path)
    return True


def describe(tasks: Sequence[str]) -> str:
    """ "walker_walk" or "4 tasks"."""
    return short_name(tasks[0]) if len(tasks) == 1 else f"{len(tasks)} tasks"


def by_agent(results: Results) -> dict[str, dict[str, str]]:
    """Agent -> distraction -> our method of that name, the undistracted one first."""
    agents: dict[str, dict[str, str]] = {}
    for method in results.methods:
        if not method.endswith(PUBLISHED) and results.scores[method]:
            agent, distraction = split_method(method)
            agents.setdefault(agent, {})[distraction] = method
    return {agent: dict(sorted(found.items(), key=lambda item: item[0] != CLEAN)) for agent, found in agents.items()}


def estimate_robustness(results: Results, resamples: int) -> dict[str, tuple[list[str], dict[str, Estimate]]]:
    """Agent -> tasks and, per distraction, the interquartile mean on them. Only agents with several distractions."""
    found = {}
    for agent, methods in by_agent(results).items():
        tasks = results.common_tasks(list(methods.values()))
        if len(methods) > 1 and tasks:
            estimates = {
                distraction: estimate_iqm(results.restrict(method, tasks), resamples=resamples)
                for distraction, method in methods.items()
            }
            found[agent] = (tasks, estimates)
    return found


def plot_robustness(results: Results, path: Path, resamples: int) -> bool:
    """Draw one bar per distraction and agent, if there is an agent with several distractions."""
    agents = estimate_robustness(results, resamples)
    names = dict.fromkeys(name for _, found in agents.values() for name in found)
    distractions = sorted(names, key=lambda name: name != CLEAN)
    if not agents:
        return False
    width = 0.8 / len(agents)
    figure, axis = plt.subplots(figsize=(1.6 + 0.95 * len(distractions), 3.6), layout="constrained")
    for i, (agent, (tasks, found)) in enumerate(agents.items()):
        places = [distractions.index(name) + (i - (len(agents) - 1) / 2) * width for name in found]
        values, errors = [e.value for e in found.values()], error_bars(list(found.values()))
        label = f"{agent}, {describe(tasks)}"
        axis.bar(places, values, width, yerr=errors, color=COLOURS[i % len(COLOURS)], capsize=3, label=label)
        if CLEAN in found:
            axis.axhline(found[CLEAN].value, color=COLOURS[i % len(COLOURS)], ls=":", lw=1)
    labels = [name.replace("color_grid_", "").replace("_", " ") for name in distractions]
    axis.set_xticks(range(len(distractions)), labels, rotation=30, ha="right", rotation_mode="anchor")
    axis.set_ylabel("interquartile mean of the return")
    axis.set_ylim(bottom=0)
    axis.set_xlim(-0.55, len(distractions) - 0.45)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    save(figure, path)
    return True


def save(figure: plt.Figure, path: Path) -> None:
    """Write a picture and free its memory."""
    figure.savefig(path, dpi=110)
    plt.close(figure)


def format_scores(scores: Sequence[float]) -> str:
    """ "832 ± 44 (10)": mean, standard deviation over seeds, number of seeds."""
    if not scores:
        return ""
    mean = sum(scores) / len(scores)
    if len(scores) == 1:
        return f"{mean:.0f} (1)"
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / (len(scores) - 1))
    return f"{mean:.0f} ± {deviation:.0f} ({len(scores)})"


def format_estimate(estimate: Estimate) -> str:
    """ "812 [790, 831]"."""
    bounds = "" if math.isnan(estimate.low) else f" [{estimate.low:.0f}, {estimate.high:.0f}]"
    return f"{estimate.value:.0f}{bounds}"


def make_table(results: Results, window: float, resamples: int) -> str:
    """The scores in Markdown."""
    methods = [method for method in results.methods if results.scores[method]]
    tasks = results.common_tasks(methods)
    rows = [
        [
            short_name(task),
            f"{results.frames[task]:,}",
            *(format_scores(results.scores[m].get(task, ())) for m in methods),
        ]
        for task in results.tasks
    ]
    if tasks:
        estimates = [estimate_iqm(results.restrict(method, tasks), resamples=resamples) for method in methods]
        rows.append([f"interquartile mean, {describe(tasks)}", "", *map(format_estimate, estimates)])
    text = markdown(["task", "frames", *methods], rows)
    text += f"\nReturn in the last {window:.0%} of the frames: mean ± standard deviation (seeds). "
    text += "Brackets: 95 % stratified bootstrap interval.\n"
    for agent, (shared, found) in estimate_robustness(results, resamples).items():
        clean = found.get(CLEAN)
        shares = [f"{e.value / clean.value:.0%}" if clean and clean.value else "" for e in found.values()]
        lines = [[name, format_estimate(e), share] for (name, e), share in zip(found.items(), shares, strict=True)]
        text += f"\n{agent}, {describe(shared)}:\n\n" + markdown(["distraction", "return", "of undistracted"], lines)
    for run in results.unscored:
        where = f"has returns from {run.xs[0]:,} to {run.xs[-1]:,} frames only"
        text += f"\nLeft out: {short_name(run.task)}, {run.method}, seed {run.seed} {where}.\n"
    return text


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results.json of scripts/run_suite.py")
    parser.add_argument(
        "--published", type=Path, nargs="*", default=[], help="for example docs/data/dmc_vision.json.gz"
    )
    parser.add_argument("--frames", type=int, help="where methods are compared")
    parser.add_argument("--window", type=float, default=0.1, help="share of the frames that a score averages over")
    parser.add_argument("--resamples", type=int, default=2000, help="bootstrap samples")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures and the table")
    args = parser.parse_args()
    if not 0 < args.window <= 1:
        parser.error(f"--window={args.window}: give a share above 0, at most 1")
    for name in ("frames", "resamples"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name}={value}: give at least 1")
    return args


def main() -> None:
    args = parse_args()
    try:
        results = load_results(args.results, args.published, args.frames, args.window)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    plot_curves(results, args.out / "curves.png", resamples=min(args.resamples, 500))
    if not plot_iqm(results, args.out / "iqm.png", args.resamples):
        print("no iqm.png: there is no task for which all methods have a score", file=sys.stderr)
    if not plot_robustness(results, args.out / "robustness.png", args.resamples):
        print("no robustness.png: no agent was run under several distractions on the same tasks", file=sys.stderr)
    table = make_table(results, args.window, args.resamples)
    (args.out / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
