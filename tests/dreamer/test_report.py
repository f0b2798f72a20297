"""Reports of runs that are whole, broken, many, or meant to do harm."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from dreamer import report_data
from dreamer.report import parse, try_report, write_report
from dreamer.report_data import Curve, flatten, read_run
from dreamer.report_figures import robust_limits, running_mean, short_number, thin

EVIL = "<script>alert(1)</script>"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)
MP4 = b"\0\0\0\x18ftypisom" + bytes(20)
CONFIG = {
    "seed": 1,
    "agent": {"name": "dreamer_v3", "horizon": 333},
    "env": {"name": "walker", "task": "walk", "distraction": {"name": "none"}},
    "collector": {"total_frames": 1000},
}


class Page(HTMLParser):
    """Everything in a page that could reach out, run, or collide."""

    VOID = ("meta", "img", "br")

    def __init__(self, path: Path):
        super().__init__()
        self.raw = path.read_text()
        self.tags, self.attributes, self.open, self.text = [], [], [], ""
        self.feed(self.raw)
        assert not self.open, "tags are left open"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def values(self, *names: str) -> list[str]:
        return [value for _, name, value in self.attributes if name in names]

    def check(self) -> "Page":
        """Nothing is loaded, nothing runs, every id is unique and every link has its target."""
        assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(self.tags)
        assert not [name for _, name, _ in self.attributes if name.startswith("on")]
        links = self.values("href", "xlink:href", "src", "srcset", "poster", "action")
        assert all(link.startswith(("#", "data:image/png;base64,", "data:video/mp4;base64,")) for link in links)
        assert "url(" not in self.raw and "@import" not in self.raw
        ids = self.values("id")
        assert len(ids) == len(set(ids))
        assert {link[1:] for link in links if link[0] == "#"} <= set(ids)
        policy = next(value for _, name, value in self.attributes if name == "content" and "default-src" in value)
        assert "default-src 'none'" in policy and "http" not in policy and "script" not in policy
        for svg in self.raw.split("<svg")[1:]:
            text = f'<svg xmlns:xlink="x"{svg[: svg.index("</svg>")]}</svg>'
            ElementTree.fromstring(text)
        return self


def make_run(folder: Path, *, lines=None, config=None, **files: str) -> Path:
    """A run folder; further arguments are files, `__` for the dot in their name."""
    folder.mkdir(parents=True)
    lines = [metrics(frames) for frames in range(100, 1001, 100)] if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(json.dumps(CONFIG if config is None else config))  # JSON is YAML
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def metrics(frames: int, **others) -> dict:
    names = {"episode/return": frames / 10, "wm/total_loss": 100 / frames, "ac/entropy": 1.0, "collector/fps": 50.0}
    evaluation = {"eval/return_mean": frames / 5, "eval/return_std": 3.0} if frames % 500 == 0 else {}
    return {"frames": frames, "seconds": frames / 50, **names, **evaluation, **others}


def lines_of(*entries: dict) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def test_one_run(tmp_path):
    start = {"time": "2026-01-31T14:00:00+00:00", "command": ["train.py", "seed=1"], "frames": 0, "git": None}
    start |= {
        "versions": {"torch": "2.13"},
        "hardware": {"cpu": "a processor", "cores": 2, "memory_gb": 8.0, "gpus": []},
    }
    incident = {
        "time": "2026-01-31T14:01:00+00:00",
        "frames": 300,
        "kind": "worker_restart",
        "message": "again",
        "worker": 2,
    }
    result = {"mean": 321.5, "std": 1.0, "min": 0.0, "max": 400.0, "iqm": 330.0, "returns": [1.0] * 7}
    evaluation = {
        "checkpoint": "frames_1000",
        "env": {"distraction": {"name": "noise"}},
        "results": {"sampled": result},
    }
    histogram = {"frames": 500, "name": "histograms/kl", "edges": [0, 1, 2], "counts": [3, 1]}
    run = make_run(
        tmp_path / "run",
        run__json=json.dumps({"starts": [start, start | {"frames": 500, "resumed_from": "frames_500"}]}),
        incidents__jsonl=lines_of(incident),
        histograms__jsonl=lines_of(histogram, histogram | {"frames": 1000}),
        eval__json=json.dumps(evaluation),
    )
    (run / "eval_sampled.mp4").write_bytes(MP4)
    for name, content in {"videos/eval_000000500.mp4": MP4, "images/train_original_000000500.png": PNG}.items():
        (run / name).parent.mkdir()
        (run / name).write_bytes(content)
    (run / "checkpoints/frames_1000").mkdir(parents=True)
    (run / "checkpoints/frames_500").mkdir()
    (run / "checkpoints/frames_1000/manifest.json").write_text("{}")
    defaults = CONFIG | {"agent": {"name": "dreamer_v3", "horizon": 100}}
    path = write_report([run], defaults=defaults)
    page = Page(path).check()
    assert path == run / "report.html" and sorted(path.parent.glob(".*")) == []
    for text in (
        "dreamer_v3 on walker_walk",
        "Finished",
        "200",
        "1,000",
        "worker_restart",
        "worker: 2",
        "train.py seed=1",
    ):
        assert text in page.text
    assert "From frames_1000, distraction noise." in page.text and "322" in page.text
    assert page.tags.count("video") == 2
    for text in ("frames_500", "no manifest", "a processor", "mean ± standard deviation over episodes", "torch 2.13"):
        assert text in page.text
    assert {"video", "img", "svg", "image"} <= set(page.tags)
    difference = page.text[page.text.index("Default") : page.text.index("All 7 settings")]
    assert "agent.horizon" in difference and "333" in difference and "100" in difference
    assert "seed" not in difference


def test_everything_is_escaped(tmp_path):
    config = {
        "seed": EVIL,
        "agent": {"name": EVIL, EVIL: "\"quotes\" 'of both kinds' & $x^2$"},
        "env": {"name": EVIL, "task": 3, "distraction": {"name": '"><img src=x onerror=alert(1)>'}},
    }
    bad = {EVIL: EVIL, "command": [EVIL, '" onload="'], "git": {"commit": EVIL, "dirty": EVIL}, "time": EVIL}
    bad |= {"versions": {EVIL: EVIL}, "hardware": {"cpu": EVIL, "gpus": [EVIL], "cores": EVIL}, "resumed_from": EVIL}
    name = EVIL.replace("/", "_")
    runs = [
        make_run(
            tmp_path / f"{name}{index}",
            lines=[
                metrics(
                    frames, **{f"wm/{EVIL}": 1.0, "ac/$\\frac{": 2.0, "time/" + EVIL: 0.5, "ac/huge": frames * 1e99}
                )
                for frames in (1, 2, 3)
            ],
            config=config,
            run__json=json.dumps({"starts": [bad]}),
            incidents__jsonl=lines_of(
                {"kind": EVIL, "message": f"{EVIL}\0\x1b", "time": EVIL, "frames": EVIL, EVIL: EVIL}
            ),
            eval__json=json.dumps(
                {
                    "checkpoint": EVIL,
                    "env": {"distraction": {"name": EVIL}},
                    "results": {EVIL: dict.fromkeys(("mean", "std", "min", "max", "iqm"), 1), "sampled": EVIL},
                }
            ),
            histograms__jsonl=lines_of({"frames": 1, "name": EVIL, "edges": [0, 1], "counts": [1]}),
        )
        for index in (1, 2)
    ]
    for run in runs:
        (run / "videos").mkdir()
        (run / "videos" / f"{name}_000000001.mp4").write_bytes(MP4)
    page = Page(write_report(runs, tmp_path / "many.html", defaults={"seed": EVIL})).check()
    assert EVIL in page.text and "<script" not in page.raw and "\x1b" not in page.raw


def test_what_is_not_there_or_not_finite_is_left_out(tmp_path):
    wrong = {"wm/image_loss": None, "ac/value": math.nan, "ac/huge": 1e308, "ac/larger": 10**400}
    lines = [metrics(frames, **wrong) for frames in (100, 200)]
    run = make_run(tmp_path / "run", lines=[*lines, {"frames": 300, "seconds": 6, "wm/image_loss": 5.0}])
    with open(run / "metrics.jsonl", "a") as file:
        file.write(
            '[1]\n"text"\n{"frames": true, "wm/x": 1}\n{"frames": "4", "wm/x": 1}\n\n{"frames": 400, "wm/total_lo'
        )
    page = Page(write_report([run])).check()
    assert read_run(run).metrics["ac/value"].lost == 2
    assert "wm/image_loss (2)" in page.text and "ac/value (2)" in page.text and "ac/larger (2)" in page.text
    assert read_run(run).frames == 300 and "wm/x" not in read_run(run).metrics


BROKEN = [
    "",
    "{",
    "[]",
    "[[[[",
    "\0",
    '{"starts": [3, null, {}, {"git": 3, "hardware": [], "command": 5}]}',
    "a: [&a b, *a]",
]


@pytest.mark.parametrize("content", BROKEN)
def test_broken_files(tmp_path, content):
    names = ("config.yaml", "run.json", "metrics.jsonl", "incidents.jsonl", "histograms.jsonl", "eval.json")
    for name in names:
        (tmp_path / name).write_text(content)
    Page(write_report([tmp_path])).check()


def test_empty_folder_and_no_folder(tmp_path):
    (tmp_path / "run").mkdir()
    assert "run" in Page(write_report([tmp_path / "run"])).check().text
    with pytest.raises(NotADirectoryError, match="give a run folder"):
        write_report([tmp_path / "absent"])
    with pytest.raises(ValueError, match="at least one"):
        write_report([])
    with pytest.warns(UserWarning, match="no report of"):
        assert try_report([tmp_path / "absent"]) is None


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    secret = tmp_path / "secret"
    for folder in ("videos", "images", "checkpoints/frames_1"):
        (secret / folder).mkdir(parents=True)
    (secret / "images/planted_000000001.png").write_bytes(PNG)
    (secret / "planted.jsonl").write_text(lines_of({"frames": 1, "seconds": 1, "wm/planted": 1, "kind": "planted"}))
    (secret / "planted.yaml").write_text("agent: {name: planted}")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("metrics.jsonl", "incidents.jsonl", "histograms.jsonl", "run.json"):
        (run / name).symlink_to(secret / "planted.jsonl")
    (run / "config.yaml").symlink_to(secret / "planted.yaml")
    (run / "images").symlink_to(secret / "images")
    (run / "checkpoints").symlink_to(secret / "checkpoints")
    assert "planted" not in Page(write_report([run])).check().raw
    assert not read_run(run).checkpoints and not read_run(run).images


def test_media_within_the_budget(tmp_path, monkeypatch):
    monkeypatch.setattr("dreamer.report_run.MEDIA_BYTES", 100)
    run = make_run(tmp_path / "run")
    (run / "videos").mkdir()
    contents = {"a_000000001": MP4, "a_000000002": MP4, "b_000000001": bytes(50), "c_000000001": MP4 + bytes(100)}
    for name, content in contents.items():
        (run / f"videos/{name}.mp4").write_bytes(content)
    page = Page(write_report([run])).check()
    assert page.tags.count("video") == 1 and "At 2 frames." in page.text
    assert "videos/b_000000001.mp4" in page.text and "videos/c_000000001.mp4" in page.text


@pytest.mark.parametrize(
    ("frames", "kinds", "status"),
    [
        (1000, ["signal"], "finished"),
        (500, ["worker_restart", "signal"], "interrupted"),
        (500, ["exception"], "failed"),
        (500, ["signal", "resume"], "running"),
        (500, [], "running"),
    ],
)
def test_status(tmp_path, frames, kinds, status):
    incidents = lines_of(*({"kind": kind, "frames": 1} for kind in kinds))
    run = make_run(tmp_path / "run", lines=[metrics(frames)], incidents__jsonl=incidents)
    assert read_run(run).status == status


def test_a_run_that_is_silent_for_long_is_not_running(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", lines=[metrics(500)])
    monkeypatch.setattr(report_data, "ALIVE", -1)
    assert read_run(run).status == "unfinished"


def test_many_runs(tmp_path):
    runs = []
    for task, level in (("walk", 1), ("run", 2)):
        for seed in range(2):
            config = CONFIG | {"seed": seed, "env": {"name": "walker", "task": task, "distraction": {"name": "none"}}}
            lines = [
                {"frames": n, "seconds": n, "episode/return": 100.0 * level + 10 * seed} for n in range(100, 1001, 100)
            ]
            runs.append(make_run(tmp_path / f"{task}_{seed}", lines=lines, config=config))
    page = Page(write_report(runs, tmp_path / "all.html")).check()
    assert page.values("href")[:4] == ["#run-1", "#run-2", "#run-3", "#run-4"]
    for text in ("4 runs", "155 [150, 160]", "105 [100, 110]", "205 [200, 210]", "95 % stratified bootstrap interval"):
        assert text in page.text


def test_runs_with_other_settings_are_other_methods(tmp_path):
    other = CONFIG | {"agent": {"name": "dreamer_v3", "horizon": 100}, "seed": 2}
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", config=other), make_run(tmp_path / "c")]
    page = Page(write_report(runs, tmp_path / "all.html")).check()
    assert "dreamer_v3 agent.horizon=333" in page.text and "dreamer_v3 agent.horizon=100" in page.text
    assert "seed=" not in page.text


class TestLearningWhileFramesStandStill:
    def lines(self, frames):
        """Frames if there are some, then 20 updates with an evaluation every five."""
        collected = [{"frames": n, "seconds": n / 10, "episode/return": 1.0} for n in range(100, frames + 1, 100)]
        learned = [
            {"frames": frames, "step": frames + n, "seconds": frames / 10 + n, "vae/loss": 1.0 / n, "time/update": 1.0}
            | ({"eval/return_mean": float(n)} if n % 5 == 0 else {})
            for n in range(1, 21)
        ]
        return collected + learned

    def test_curves_go_on(self, tmp_path):
        histogram = {"frames": 1000, "name": "histograms/z", "edges": [0, 1, 2], "counts": [3, 1]}
        histograms = lines_of(*(histogram | {"step": 1000 + n} for n in (1, 9)))
        folder = make_run(tmp_path / "run", lines=self.lines(1000), histograms__jsonl=histograms)
        (folder / "images").mkdir()
        (folder / "images/vae_frames_000001020.png").write_bytes(PNG)
        page, run = Page(write_report([folder])).check(), read_run(folder)
        assert run.frames == 1000 and set(run.curve("vae/loss").frames) == {1000} and "step" not in run.metrics
        assert run.curve("vae/loss").x.tolist() == list(range(1001, 1021))
        assert [item.x for item in run.histograms["histograms/z"]] == [1001, 1009]
        assert run.status == "finished" and "20at 1,020 frames + updates" in page.text
        assert "Return over environment frames + updates." in page.text and "At 1,020 frames + updates." in page.text
        small = page.raw[page.raw.index("<span>loss</span>") :]
        ends = [float(x) for x in re.findall(r"[ML] ([\d.]+) ", re.search(r'd="(M [^"]*)" style="[^"]*--c0', small)[1])]
        assert ends[0] == pytest.approx(46, abs=1) and ends[-1] == pytest.approx(290, abs=1), "the whole width"

    def test_frames_of_another_run(self, tmp_path):
        config = CONFIG | {"agent": {"name": "world_models", "source": "runs/other"}}
        run = make_run(tmp_path / "run", lines=self.lines(0), config=config)
        page = Page(write_report([run])).check()
        assert "no frameslearns from runs/other" in page.text and "frames per second" not in page.text
        assert "of 1,000" not in page.text and read_run(run).status == "finished"

    def test_interrupted_after_the_last_frame(self, tmp_path):
        run = make_run(tmp_path / "run", lines=self.lines(1000), incidents__jsonl=lines_of({"kind": "signal"}))
        assert read_run(run).status == "interrupted"

    def test_other_runs_are_as_ever(self, tmp_path):
        page = Page(write_report([make_run(tmp_path / "run")])).check()
        assert "updates" not in page.text and "Return over environment frames." in page.text


@pytest.mark.slow
def test_long_run_stays_small(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"wm/metric_{index}" for index in range(40)]
    with open((make_run(tmp_path / "run")) / "metrics.jsonl", "w") as file:
        for frames in range(20_000):
            noise = dict(zip(names, rng.normal(size=40).tolist(), strict=True))
            file.write(json.dumps({"frames": frames, "seconds": frames, "episode/return": 1.0, **noise}) + "\n")
    path = write_report([tmp_path / "run"])
    assert path.stat().st_size < 2_000_000
    Page(path).check()


def test_time_goes_on_after_a_resume(tmp_path):
    seconds = (10.0, 20.0, 1.0, 5.0)
    lines = [{"frames": frames, "seconds": time} for frames, time in enumerate(seconds)]
    assert read_run(make_run(tmp_path / "run", lines=lines)).seconds == 25.0


def test_flatten_shortens_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/planted")
    flat = flatten({"a": {"b": "/home/planted/runs"}, "c": [1, "/home/planted/x"], "d": None, "e": {}})
    assert flat == {"a.b": "~/runs", "c": '[1, "~/x"]', "d": "null", "e": "{}"}


def test_thin_running_mean_and_limits():
    curve = Curve(np.arange(1000.0), np.arange(1000.0))
    frames, values = thin(curve, 10)
    assert len(frames) == 10 and values[0] == pytest.approx(49.5, abs=1) and np.array_equal(frames, values)
    assert np.array_equal(thin(Curve(np.array([3.0, 1.0]), np.array([30.0, 10.0])))[1], [10.0, 30.0])
    assert running_mean(np.array([1.0, 3.0, 5.0]), 2).tolist() == [1.0, 2.0, 4.0]
    low, high = robust_limits(np.concatenate([np.linspace(0, 1, 100), [1000.0]]))
    assert low < 0 and 1 < high < 3
    assert robust_limits(np.array([5.0])) == (4.5, 5.5)


def test_short_number():
    values = {0.0: "0", 1234567.0: "1.235M", -2500: "-2.5k", 0.02: "0.02", 1e-20: "0", 5.5394: "5.54", math.inf: "?"}
    assert {value: short_number(value) for value in values} == values
    assert short_number(5.5394, 6) == "5.5394"  # ticks that are close together stay different


def test_command_line(tmp_path):
    run = make_run(tmp_path / "run")
    assert parse(["run=a", "b", "out=c.html"]) == ([Path("a"), Path("b")], Path("c.html"))
    with pytest.raises(ValueError, match="usage"):
        parse([])
    with pytest.raises(ValueError, match="give run="):
        parse(["runs=a"])
    code = "import sys, dreamer.report as r; print(r.write_report([sys.argv[1]])); assert 'hydra' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code, run], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(run / "report.html")
