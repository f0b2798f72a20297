"""The part of a report that shows one run."""

import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np

from dreamer.console import duration
from dreamer.report_data import EMPTY, Curve, Media, RunData, is_inside
from dreamer.report_figures import SERIES, draw_histograms, draw_metric, draw_returns, short_number
from dreamer.report_page import escape, facts, figure, grid, legend, medium, section, table

MEDIA_BYTES = 900_000  # of all videos and images of a run, before they become a third larger as text
FILM_BYTES = 300_000  # of an evaluation
STATISTICS = ("mean", "std", "min", "max", "iqm")
METRICS = 120  # pictures of metrics
INCIDENTS = 200  # lines, the newest
IMPORTANT = ("comparison", "eval")  # videos that come first, and larger
ABOVE = ("episode/", "eval/", "time/")  # metrics that are shown in another way
PACE = ("collector/", "trainer/")
NOT_DRAWN = ("trainer/updates", "trainer/eta_seconds")
GROUPS = {"wm/": "World model", "ac/": "Actor and critic"}
CAPTIONS = {
    "train_imagination_comparison": "Real, reconstructed, imagined and error: a row for each sequence. The model sees "
    "the first steps; after them it is told nothing but the actions.",
    "train_imagination_imagined": "What the agent imagines when it chooses the actions itself.",
    "train_observation_video": "What the agent saw.",
    "train_reconstruction_video": "The same, reconstructed from the latent state.",
    "segmentation_comparison": "Real, with its label, and what the model makes of it: foreground, mask and, if the "
    "agent rebuilds it, background and both together.",
    "segmentation_contact_sheet": "The first labels: frames and their foreground. Wrong here is wrong everywhere.",
    "segmentation_overlay": "Labels of replayed frames; all background where there is none yet.",
    "train_original": "Real images.",
    "train_reconstructed": "The same, reconstructed from the latent state.",
}
STATUS = {
    "finished": "Finished",
    "interrupted": "Interrupted; what was saved can be resumed",
    "failed": "Ended by an error",
    "running": "Running when this was written",
    "unfinished": "Ended before its last frame, without a word",
}


def name_run(run: RunData) -> str:
    """ "dreamer_v3 on cartpole_swingup", or the name of the folder if the configuration is missing."""
    agent = run.config.get("agent.name")
    return f"{agent} on {run.task}" if agent and run.task else run.folder.resolve().name


def describe_run(run: RunData, identifier: str, defaults: Mapping[str, str] | None) -> str:
    """Everything about one run as HTML.

    Args:
        run: The run.
        identifier: Of the part of the page, a prefix of all identifiers in it.
        defaults: The default configuration, dotted key -> value as text.
    """
    parts = {
        "Return": show_returns(run),
        "Evaluation": show_evaluation(run),
        "Videos and images": show_media(run),
        "Losses": show_losses(run),
        "Pace": show_pace(run),
        "Distributions": show_histograms(run),
        "Incidents": show_incidents(run),
        "Configuration": show_config(run, defaults),
        "Checkpoints": show_checkpoints(run),
        "Provenance": show_provenance(run),
    }
    sections = {title: f"{identifier}-{title.split()[0].lower()}" for title, content in parts.items() if content}
    links = "".join(f'<a href="#{target}">{escape(title)}</a>' for title, target in sections.items())
    body = "".join(section(target, title, parts[title]) for title, target in sections.items())
    return f'<article id="{identifier}">{show_head(run)}<nav>{links}</nav>{body}</article>\n'


def show_head(run: RunData) -> str:
    """Title, status and the figures that matter."""
    seed, distraction = run.config.get("seed"), run.distraction
    about = ["no distraction" if distraction == "none" else f"distraction {distraction}"] if run.config else []
    about += [f"seed {seed}"] * (seed is not None) + [run.folder.resolve().name]
    status = f'<span class="status {run.status}">{escape(STATUS[run.status])}</span>'
    evaluation, episodes = run.curve("eval/return_mean"), run.curve("episode/return")
    entries = [
        (label, *evaluated(evaluation, pick))
        for label, pick in (("Best evaluation", "best"), ("Last evaluation", "last"))
    ]
    if not len(evaluation.values):
        entries = [("Last return", number(episodes.last()), "of episodes")]
    random = run.curve("eval/random_return_mean").last()
    entries += [("Random actions", number(random), "return")] * (random is not None)
    share = f"of {run.total_frames:,}" if run.total_frames else ""
    frames = ("no frames", f"learns from {run.source}") if run.source else (f"{run.frames:,}", share)
    entries += [("Frames", *frames), ("Time", duration(run.seconds), "")]
    updates, speed = run.curve("trainer/updates").last(), run.frames / run.seconds if run.seconds else math.nan
    entries += [("Updates", f"{updates or 0:,.0f}", "")] * (updates is not None)
    entries += [("Speed", short_number(speed), "frames per second")] * (math.isfinite(speed) and not run.source)
    entries += [("Incidents", str(len(run.incidents)), "")] * bool(run.incidents)
    return (
        f"<h1>{escape(name_run(run))}</h1>"
        f'<p>{status} <span class="muted">&ensp;{escape(" · ".join(about))}</span></p>{facts(entries)}'
    )


def evaluated(curve: Curve, pick: str) -> tuple[str, str]:
    """Value and small print of the best or the last evaluation."""
    if not len(curve.values):
        return "-", ""
    index = int(curve.values.argmax()) if pick == "best" else -1
    return number(float(curve.values[index])), f"at {int(curve.x[index]):,} {curve.unit}"


def show_returns(run: RunData) -> str:
    """Learning curves."""
    episodes, evaluation = run.curve("episode/return"), run.curve("eval/return_mean")
    random = run.curve("eval/random_return_mean").last()
    if not len(episodes.frames) and not len(evaluation.frames):
        return ""
    entries = []
    if len(episodes.frames):
        entries.append(("c0", "return of training episodes, faint, and its running mean"))
    if len(evaluation.frames):
        entries.append(("c1", "evaluation, mean ± standard deviation over episodes"))
    if random is not None:
        entries.append(("muted", f"random actions, mean {number(random)}"))
    pairs = [(episodes, evaluation)]
    if run.stands_still:  # episodes are collected before the rest is learned
        pairs = [(episodes, EMPTY), (EMPTY, evaluation)]
    total, deviation = 0 if run.stands_still else run.total_frames, run.curve("eval/return_std")
    pictures = [
        figure(draw_returns(*pair, deviation, random, total), wide=True)
        for pair in pairs
        if any(len(curve.x) for curve in pair)
    ]
    return legend(entries) + "".join(pictures) + paragraph(f"Return over environment {run.unit}.")


def show_evaluation(run: RunData) -> str:
    """What `dreamer/eval.py` found, with its films."""
    results, env = run.evaluation.get("results"), run.evaluation.get("env")
    rows, films = [], []
    for kind, result in results.items() if isinstance(results, dict) else ():
        values = [result.get(name) for name in STATISTICS] if isinstance(result, dict) else []
        if not values or not all(isinstance(value, int | float) for value in values):
            continue
        returns = result.get("returns")
        episodes = len(returns) if isinstance(returns, list) else 0
        rows.append([escape(kind), *map(number, values), str(episodes)])
        film = run.folder / f"eval_{kind}.mp4"
        if kind in ("sampled", "deterministic") and is_inside(run.folder, film) and film.stat().st_size < FILM_BYTES:
            films.append(medium(film, film.stem, f"The first episode, actions {kind}."))
    if not rows:
        return ""
    distraction = env.get("distraction") if isinstance(env, dict) else None
    name = distraction.get("name", "none") if isinstance(distraction, dict) else "none"
    note = f"From {run.evaluation.get('checkpoint')}, distraction {name}. Every return and seed is in eval.json."
    header = ["Actions", "Mean", "Std", "Min", "Max", "IQM", "Episodes"]
    shown = f'<div class="media">{"".join(films)}</div>' if films else ""
    return table(header, rows, numbers=range(1, len(header))) + paragraph(note) + shown


def show_media(run: RunData) -> str:
    """The newest video and image of each name, as far as they fit."""
    newest = [found[-1] for kind in (run.videos, run.images) for found in kind.values()]
    newest.sort(key=lambda media: (not is_important(media), media.path.suffix != ".mp4"))
    shown, left_out, room = [], [], MEDIA_BYTES
    for media in newest:
        size, content = media.path.stat().st_size, ""
        if size <= room:
            content = medium(
                media.path, media.name.replace("_", " "), caption(media, run.unit), large=is_important(media)
            )
        room -= size if content else 0
        (shown if content else left_out).append(
            content or f"{media.path.parent.name}/{media.path.name} ({bytes_text(size)})"
        )
    note = f"Not shown, too large or damaged: {', '.join(left_out)}." if left_out else ""
    return (f'<div class="media">{"".join(shown)}</div>' if shown else "") + paragraph(note)


def is_important(media: Media) -> bool:
    """Whether this is a video that everybody wants to see."""
    return any(part in media.name for part in IMPORTANT)


def caption(media: Media, unit: str) -> str:
    """What is to be seen, and when it was made."""
    return f"{CAPTIONS.get(media.name, '')} At {media.x:,} {unit}.".strip()


def show_config(run: RunData, defaults: Mapping[str, str] | None) -> str:
    """What differs from the default first, then everything."""
    if not run.config:
        return ""
    whole = table(["Setting", "Value"], [[escape(key), escape(value)] for key, value in run.config.items()])
    if defaults is None:
        return whole
    keys = [key for key, value in run.config.items() if defaults.get(key) != value and key != "run_dir"]
    rows = [[escape(key), escape(run.config[key]), escape(defaults.get(key, "-"))] for key in keys]
    difference = table(["Setting", "Value", "Default"], rows) if rows else paragraph("All settings have their default.")
    return f"{difference}<details><summary>All {len(run.config)} settings</summary>{whole}</details>"


def show_losses(run: RunData) -> str:
    """Small pictures of all metrics that have no other place."""
    names = [name for name in run.metrics if "/" in name and not name.startswith((*ABOVE, *PACE))]
    if not names:  # agents that log nothing but the terms of their loss
        names = [name for name in run.metrics if name.startswith("loss_")]
    groups: dict[str, list[str]] = {prefix: [] for prefix in GROUPS}
    for name in names[:METRICS]:
        groups.setdefault(name[: name.find("/") + 1], []).append(name)
    parts = [
        f"<h3>{escape(GROUPS.get(prefix, prefix.rstrip('/') or 'Terms'))}</h3>{pictures}"
        for prefix, members in groups.items()
        if (pictures := show_metrics(run, members, prefix))
    ]
    lost = [f"{name} ({run.metrics[name].lost})" for name in names if run.metrics[name].lost]
    note = f"Values that were not finite, left out: {', '.join(lost)}." if lost else ""
    more = f"{len(names) - METRICS} more metrics are in metrics.jsonl." if len(names) > METRICS else ""
    over = f"To the right: {run.unit}, of each metric from its first to its last." if run.stands_still and parts else ""
    return "".join(parts) + paragraph(" ".join(filter(None, (over, note, more))))


def show_metrics(run: RunData, names: Iterable[str], prefix: str = "", *, mean: bool = False) -> str:
    """One small picture for each of these metrics that has values, with the newest value or the mean."""
    curves = {name: run.metrics[name] for name in names if len(run.metrics[name].frames)}
    return grid(
        figure(
            draw_metric(curve),
            name.removeprefix(prefix),
            f"mean {short_number(curve.values.mean())}" if mean else short_number(curve.values[-1]),
        )
        for name, curve in curves.items()
    )


def show_pace(run: RunData) -> str:
    """Speed, train ratio, memory, and where the time went."""
    names = [name for name in run.metrics if name.startswith(PACE) and name not in NOT_DRAWN]
    return show_time(run) + show_metrics(run, names[:METRICS], mean=True)


def show_time(run: RunData) -> str:
    """Shares of the time over the whole run; each line of metrics counts as long as it took."""
    clock, totals = run.curve("seconds"), {}
    for name in [name for name in run.metrics if name.startswith("time/")]:
        curve = run.metrics[name]
        if len(curve.x) and len(clock.x):
            spans = np.diff(np.interp(curve.x, clock.x, clock.values), prepend=0)
            totals[name.removeprefix("time/")] = float((curve.values.clip(0) * spans.clip(0)).sum())
    whole = sum(totals.values())
    if not 0 < whole < math.inf:
        return ""
    order = sorted(totals, key=lambda name: (name == "other", -totals[name]))
    colours = {name: f"c{index % SERIES}" if name != "other" else "line" for index, name in enumerate(order)}
    shares = {name: totals[name] / whole for name in order}
    bars = [
        f'<div style="background:var(--{colours[name]});width:{share:.2%}"></div>' for name, share in shares.items()
    ]
    entries = [(colours[name], f"{name} {share:.0%}") for name, share in shares.items()]
    return f'<h3>Where the time goes</h3><div class="bar">{"".join(bars)}</div>{legend(entries)}'


def show_histograms(run: RunData) -> str:
    """Heat maps."""
    names = list(run.histograms)[:METRICS]
    maps = [figure(draw_histograms(run.histograms[name]), name.removeprefix("histograms/")) for name in names]
    note = f"Values upwards, {run.unit} to the right; the stronger the colour, the larger the share."
    return grid(maps) + paragraph(note if maps else "")


def show_incidents(run: RunData) -> str:
    """What happened to the run, the newest first."""
    rows = []
    for entry in run.incidents[: -INCIDENTS - 1 : -1]:
        extra = {key: value for key, value in entry.items() if key not in ("time", "frames", "kind", "message")}
        details = "; ".join(f"{key}: {str(value)[:500]}" for key, value in extra.items())
        cells = [clock_time(entry.get("time")), frames_text(entry.get("frames")), entry.get("kind", "")]
        message = escape(str(entry.get("message", ""))[:1000])
        rows.append([*map(escape, cells), message + (f'<div class="note">{escape(details)}</div>' if details else "")])
    if not rows:
        return ""
    earlier = len(run.incidents) - len(rows)
    return table(["Time", "Frames", "Kind", "What happened"], rows, numbers=[1]) + paragraph(
        f"{earlier} earlier ones are in incidents.jsonl." if earlier else ""
    )


def show_checkpoints(run: RunData) -> str:
    """Names, sizes, and whether the manifest is there."""
    rows = [
        [escape(item.name), bytes_text(item.size), "yes" if item.whole else '<span class="failed">no manifest</span>']
        for item in reversed(run.checkpoints)
    ]
    return table(["Checkpoint", "Size", "Whole"], rows, numbers=[1]) if rows else ""


def show_provenance(run: RunData) -> str:
    """Every start: command, source, versions, machine."""
    return "".join(show_start(start) for start in run.starts[-50:])


def show_start(start: Mapping[str, Any]) -> str:
    """One start."""
    command, git = start.get("command"), start.get("git")
    versions, hardware = (
        value if isinstance(value, dict) else {} for value in map(start.get, ("versions", "hardware"))
    )
    source = "no commit known"
    if isinstance(git, dict):
        source = f"commit {str(git.get('commit'))[:12]}{', with changes' if git.get('dirty') else ''}"
    gpus = hardware.get("gpus")
    machine = [hardware.get("cpu"), *(gpus if isinstance(gpus, list) else []), hardware.get("platform")]
    machine += [f"{hardware[key]} {unit}" for key, unit in (("cores", "cores"), ("memory_gb", "GB")) if key in hardware]
    lines = {
        "From": str(start.get("resumed_from") or ""),
        "Source": source,
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "Machine": ", ".join(str(part) for part in machine if part),
    }
    head = f"{clock_time(start.get('time'))}, at {frames_text(start.get('frames'))} frames"
    words = " ".join(map(str, command)) if isinstance(command, list) else ""
    rows = [f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in lines.items() if text]
    return f'<h3>{escape(head)}</h3><p class="command">{escape(words)}</p><dl class="plain">{"".join(rows)}</dl>'


def paragraph(text: str) -> str:
    """A note, nothing if there is nothing to say."""
    return f'<p class="note">{escape(text)}</p>' if text else ""


def number(value: float | None) -> str:
    """A return for a person: "812", "6.1", "-"."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def frames_text(value: Any) -> str:
    """ "12,000", or "?" for what is no number."""
    return f"{value:,}" if isinstance(value, int) else "?"


def bytes_text(size: int) -> str:
    """ "812 kB"."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB")):
        if size >= limit:
            return f"{size / limit:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"


def clock_time(value: Any) -> str:
    """A time in UTC, "2026-01-31 14:05:09"; what is none comes back as text."""
    try:
        return datetime.fromisoformat(value).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (TypeError, ValueError, OverflowError):
        return str(value if value is not None else "?")[:40]
