"""The judging and the table of the reliability bench. The faults themselves: `tests/test_faults.py`."""

import importlib
import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("bench_reliability")


@pytest.fixture
def run(bench, monkeypatch, capsys):
    """Run the script with three made-up faults; return the exit code and what it printed."""

    def fail(folder):
        raise TimeoutError("no update\nmore")

    def main(*arguments: str) -> tuple[int, str]:
        faults = {
            "good one": bench.Fault(lambda folder: {"s to notice": 1.5, "orphans": 0}, {"orphans": 0}, quick=True),
            "bad one": bench.Fault(lambda folder: {"s to notice": 2.5}, {"s to notice": bench.AtMost(2)}),
            "bad other": bench.Fault(fail, {"orphans": 0}),
        }
        monkeypatch.setattr(bench, "make_faults", lambda kills, minutes: faults)
        monkeypatch.setattr(bench.torch, "set_num_threads", lambda count: None)
        monkeypatch.setattr(sys, "argv", ["bench_reliability.py", *arguments])
        with pytest.raises(SystemExit) as end:
            bench.main()
        return end.value.code, capsys.readouterr().out

    return main


def test_met_and_missed(run, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\nold\n<!-- end of table -->\nafter\n")
    code, output = run("--json", str(tmp_path / "rows.json"), "--markdown", str(page))
    assert code == 1
    assert "good one: met" in output and "s to notice 1.5, orphans 0" in output
    assert "bad one: MISSED s to notice: 2.5, not at most 2" in output
    assert "bad other: MISSED TimeoutError: no update  [" in output
    assert output.endswith("3 faults, 2 missed a target: bad one, bad other\n")
    assert [row["missed"] == [] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]] == [
        True,
        False,
        False,
    ]
    text = page.read_text()
    assert "| good one | s to notice 1.5, orphans 0 | orphans 0 | met |" in text
    assert "| bad other |  | orphans 0 | missed |" in text
    assert "old" not in text and text.startswith("before\n<!-- table -->\n") and text.endswith("-->\nafter\n")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ((), ["good one", "bad one", "bad other"]),
        (("--only", "bad"), ["bad one", "bad other"]),
        (("--quick",), ["good one"]),
    ],
)
def test_choice(run, arguments, names):
    _, output = run(*arguments)
    assert [line.split(":")[0] for line in output.splitlines()[1:-1] if not line.startswith(" ")] == names


def test_a_name_that_does_not_exist(bench):
    with pytest.raises(ValueError, match="--only 'worker': no name begins so; choose from dead worker"):
        bench.choose(bench.make_faults(), ["worker"], quick=False)


def test_a_page_without_marks(bench):
    with pytest.raises(ValueError, match="the page lacks"):
        bench.replace_table("no marks", "table")


def test_every_kind_has_a_quick_one(bench):
    faults = bench.make_faults()
    kinds = {name.split(",")[0].split(" ")[0] for name in faults}
    quick = {name.split(",")[0].split(" ")[0] for name, fault in faults.items() if fault.quick}
    assert (
        {"dead", "stuck", "orphans", "preemption", "resume", "NaN", "corruption", "replay", "malicious"}
        <= quick
        < kinds
    )


def test_later_overrides_replace_earlier_ones(bench):
    merge = importlib.import_module("fault_program").merge_overrides
    assert merge(["a=1", "b=2"], ["a=3", "+c.d=4"]) == ["a=3", "b=2", "+c.d=4"]
