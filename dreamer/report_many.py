"""The part of a report that compares runs: an overview, learning curves per task, interquartile means."""

import math
import re
from collections.abc import Sequence

from dreamer.console import duration
from dreamer.report_data import RunData
from dreamer.report_figures import COLOURS, SMALL, WIDE, Band, draw_bands
from dreamer.report_page import escape, figure, grid, legend, section, table
from dreamer.report_run import evaluated, number, paragraph
from dreamer.score_statistics import Estimate, Run, Scores, estimate_curve, estimate_iqm, score_at

POINTS = 40  # of a learning curve
WINDOW = 0.1  # share of the frames that a score averages over
RESAMPLES = 1000
METRICS = ("episode/return", "eval/return_mean")  # the first that a run has makes its curve
# Settings in which runs of one method may differ.
OF_A_RUN = re.compile(
    r"(seed|run_dir|resume|device|threads)$|(logger|checkpoint|eval)\.|env\.(backend|name|task|distraction\.)"
    r"|collector\.total_frames$"
)


def compare_runs(runs: Sequence[RunData]) -> str:
    """Overview, learning curves and interquartile means as HTML; the n-th run is the part `run-<n>` of the page."""
    methods = name_methods(runs)
    curves = [curve for run, method in zip(runs, methods, strict=True) if (curve := make_curve(run, method)).xs]
    names = list(dict.fromkeys(methods))
    return (
        f"<h1>{len(runs)} runs</h1>"
        + section("overview", "Overview", show_overview(runs, methods))
        + section("curves", "Return", show_curves(curves, names))
        + section("scores", "Scores", show_scores(curves, names))
    )


def name_methods(runs: Sequence[RunData]) -> list[str]:
    """A name for each run: agent, distraction, and the settings in which it differs from others of that name."""
    names = [run.config.get("agent.name", run.folder.resolve().name) for run in runs]
    names = [
        f"{name}@{run.distraction}" if run.distraction != "none" else name
        for name, run in zip(names, runs, strict=True)
    ]
    varying: dict[str, list[str]] = {}
    for name, task in dict.fromkeys((name, run.task) for name, run in zip(names, runs, strict=True)):
        group = [run.config for other, run in zip(names, runs, strict=True) if (other, run.task) == (name, task)]
        keys = dict.fromkeys(key for config in group for key in config if not OF_A_RUN.match(key))
        found = [key for key in keys if len({config.get(key) for config in group}) > 1]
        varying[name] = list(dict.fromkeys([*varying.get(name, []), *found]))
    return [
        " ".join([name, *(f"{key}={run.config.get(key, '-')}" for key in varying[name][:4])])
        for name, run in zip(names, runs, strict=True)
    ]


def make_curve(run: RunData, method: str) -> Run:
    """The learning curve of a run: returns of episodes, or of evaluations if there are none."""
    points: dict[int, float] = {}
    for name in METRICS:
        if not points:
            curve = run.curve(name)
            points = dict(zip(curve.frames.astype(int).tolist(), curve.values.tolist(), strict=True))
    seed = run.config.get("seed", "")
    xs = sorted(points)
    return Run(run.task, method, int(seed) if re.fullmatch(r"\d{1,9}", seed) else 0, xs, [points[x] for x in xs])


def show_overview(runs: Sequence[RunData], methods: Sequence[str]) -> str:
    """One line per run, with a link to its part of the page."""
    rows = []
    for index, (run, method) in enumerate(zip(runs, methods, strict=True), 1):
        evaluation = run.curve("eval/return_mean")
        cells = [
            f'<a href="#run-{index}">{escape(run.folder.resolve().name)}</a>',
            *map(escape, (method, run.task, run.config.get("seed", ""))),
            f'<span class="status {run.status}">{run.status}</span>',
            *map(escape, (f"{run.frames:,}", duration(run.seconds))),
            *(escape(evaluated(evaluation, pick)[0]) for pick in ("best", "last")),
            escape(number(run.curve("episode/return").last())),
            str(len(run.incidents)),
        ]
        rows.append(cells)
    header = [
        "Run",
        "Method",
        "Task",
        "Seed",
        "Status",
        "Frames",
        "Time",
        "Best eval.",
        "Last eval.",
        "Last return",
        "Incidents",
    ]
    return table(header, rows, numbers=[3, 5, 6, 7, 8, 9, 10])


def show_curves(curves: Sequence[Run], methods: Sequence[str]) -> str:
    """One picture per task."""
    tasks = list(dict.fromkeys(curve.task for curve in curves))
    colours = {method: index % len(COLOURS) for index, method in enumerate(methods)}
    pictures = []
    for task in tasks:
        bands = []
        for method in methods:
            chosen = [curve for curve in curves if (curve.task, curve.method) == (task, method)]
            if chosen:
                width = max(max(curve.xs[-1] for curve in chosen) // POINTS, 1)
                frames, points = estimate_curve(chosen, width, resamples=300)
                parts = ([getattr(point, name) for point in points] for name in ("value", "low", "high"))
                bands.append(Band(frames, *parts, COLOURS[colours[method]]))
        pictures.append(figure(draw_bands(bands, WIDE if len(tasks) == 1 else SMALL), task, wide=len(tasks) == 1))
    if not pictures:
        return ""
    note = (
        "Return over environment frames: interquartile mean over seeds (the mean of fewer than four). "
        "Shaded: 95 % bootstrap interval over seeds, where there are two or more."
    )
    entries = [(f"c{index}", method) for method, index in colours.items()]
    return legend(entries) + ("".join(pictures) if len(tasks) == 1 else grid(pictures, large=True)) + paragraph(note)


def show_scores(curves: Sequence[Run], methods: Sequence[str]) -> str:
    """Interquartile means over the tasks that all methods have, with their intervals, and of each task."""
    tasks = list(dict.fromkeys(curve.task for curve in curves))
    budgets = {task: max(curve.xs[-1] for curve in curves if curve.task == task) for task in tasks}
    scores: dict[str, dict[str, list[float]]] = {method: {} for method in methods}
    for curve in curves:
        if (score := score_at(curve, budgets[curve.task], WINDOW)) is not None:
            scores[curve.method].setdefault(curve.task, []).append(score)
    scored = {method: found for method, found in scores.items() if found}
    common = [task for task in tasks if all(task in found for found in scored.values())]
    if not scored:
        return ""
    rows = []
    for method, found in scored.items():
        overall = estimate({task: found[task] for task in common}) if common else "-"
        seeds = sum(len(found[task]) for task in common)
        each = [estimate({task: found[task]}) if task in found else "-" for task in tasks]
        rows.append([escape(method), str(seeds), overall, *(each if len(tasks) > 1 else [])])
    header = ["Method", "Runs", f"All {len(common)} common tasks" if len(tasks) > 1 else tasks[0]]
    header += tasks if len(tasks) > 1 else []
    missing = sum(1 for curve in curves if score_at(curve, budgets[curve.task], WINDOW) is None)
    note = (
        f"Interquartile mean of the return in the last {WINDOW:.0%} of the frames of the longest run of a task. "
        "Brackets: 95 % stratified bootstrap interval, seeds resampled within their task."
        + (f" Left out, because they ended before: {missing} runs." if missing else "")
    )
    return table(header, rows, numbers=range(1, len(header))) + paragraph(note)


def estimate(scores: Scores) -> str:
    """ "812 [790, 831]"."""
    found: Estimate = estimate_iqm(scores, resamples=RESAMPLES)
    return number(found.value) + ("" if math.isnan(found.low) else f" [{number(found.low)}, {number(found.high)}]")
