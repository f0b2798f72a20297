"""The live line of a terminal, and plain lines elsewhere."""

import io

import pytest

from dreamer.console import Console, console_line, duration

METRICS = {
    "collector/fps": 41.26,
    "trainer/updates": 120.0,
    "trainer/updates_per_second": 2.5,
    "trainer/eta_seconds": 7300.0,
    "episode/return": 123.4,
    "eval/return_mean": 130.0,
    "time/env": 0.41,
    "time/update": 0.44,
    "time/other": 0.15,
}


class Terminal(io.StringIO):
    """A terminal of some width that knows what can be seen on it."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines that can be seen; nothing may depend on more than return and newline."""
        lines = [""]
        column = 0
        for character in self.getvalue():
            if character == "\n":
                lines.append("")
                column = 0
            elif character == "\r":
                column = 0
            else:
                lines[-1] = lines[-1][:column] + character + lines[-1][column + 1 :]
                column += 1
        return [line.rstrip() for line in lines]


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    return Terminal()


def test_a_person_sees_everything():
    line = console_line(METRICS, 25_000, 100_000)
    parts = ["25,000/100,000 (25%)", "fps 41.3", "updates 2.50/s", "return 123.4", "eval 130.0", "left 2h 1m"]
    assert all(part in line for part in [*parts, "env 41% update 44% other 15%"]), line


@pytest.mark.parametrize("width", [0, 1, 20, 45, 60, 79, 119, 200])
def test_the_line_fits_and_keeps_the_most_important(width):
    line = console_line(METRICS, 25_000, 100_000, width)
    assert len(line) <= width
    assert console_line(METRICS, 25_000, 100_000).startswith(line)


def test_what_is_unknown():
    known = ("collector/fps", "trainer/updates", "trainer/updates_per_second")
    line = console_line({name: METRICS[name] for name in known}, 0, 100)
    assert "left ?" in line and "return" not in line and "(0%)" in line


def test_a_run_without_frames_shows_its_updates():
    line = console_line(METRICS, 0, 0)
    assert line.startswith("updates 120") and "frames" not in line and "fps" not in line and "left" not in line


def test_terminal_rewrites_one_line(terminal):
    console = Console(100_000, terminal)
    console.show(METRICS, 25_000)
    first = terminal.screen()
    assert len(first) == 1 and first[0].startswith("frames 25,000/") and len(first[0]) < 60
    console.show(METRICS | {"trainer/eta_seconds": 5.0}, 90_000)
    (line,) = terminal.screen()
    assert line.startswith("frames 90,000/") and line.count("frames") == 1
    console.close()
    assert terminal.screen() == [line, ""]


def test_a_shorter_line_leaves_no_rest(terminal):
    console = Console(10, terminal)
    console.show(METRICS, 1)
    console.show({"trainer/eta_seconds": 1.0, "episode/return": 1.0}, 1)
    (line,) = terminal.screen()
    assert line == console_line(console.latest, 1, 10, 59)


def test_text_goes_above_the_live_line(terminal):
    console = Console(100_000, terminal)
    console.print("start")
    console.show(METRICS, 25_000)
    line = terminal.screen()[-1]
    console.print("saved")
    assert terminal.screen() == ["start", "saved", line]
    console.close()
    console.print("end")
    assert terminal.screen() == ["start", "saved", line, "end", ""]


def test_plain_stream_gets_plain_lines():
    stream = io.StringIO()
    console = Console(100_000, stream)
    console.show(METRICS, 25_000)
    console.print("saved")
    console.show({"collector/fps": 1.0}, 50_000)
    console.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3 and lines[1] == "saved" and "\r" not in stream.getvalue()
    assert "eval 130.0" in lines[2], "what is rarely measured keeps its last value"
    assert "env 41%" in lines[2] and "fps 1.0" in lines[2]


def test_a_broken_stream_does_not_end_the_run(terminal):
    console = Console(100_000, terminal)
    console.show(METRICS, 25_000)
    terminal.close()
    console.print("nobody sees this")
    console.show(METRICS, 26_000)
    console.close()


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "?"), (0, "0s"), (59, "59s"), (61, "1m 1s"), (7300, "2h 1m"), (200_000, "2d 7h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
