"""The pieces of HTML that a report is made of. Every text that comes from a file goes through `escape`."""

import base64
import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dreamer.report_style import STYLE

# Nothing is loaded from anywhere and nothing runs; styles and media are inside the page.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:; base-uri 'none'; form-action 'none'"
)


def escape(value: object) -> str:
    """Text that is safe between tags and in quoted attributes."""
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "\ufffd", str(value)), quote=True)


def page(title: str, body: str) -> str:
    """A whole page.

    Args:
        title: Plain text.
        body: HTML.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>{body}</main></body></html>\n"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table.

    Args:
        header: Plain text.
        rows: HTML, already escaped.
        numbers: Columns that are set to the right.
    """

    def line(tag: str, cells: Sequence[str]) -> str:
        classes = [' class="number"' if index in numbers else "" for index in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{c}>{cell}</{tag}>" for c, cell in zip(classes, cells, strict=True)) + "</tr>"

    body = "\n".join(line("td", row) for row in rows)
    head = line("th", [escape(name) for name in header])
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def section(identifier: str, title: str, *content: str) -> str:
    """A part of the page with a heading, nothing if it has no content."""
    body = "\n".join(part for part in content if part)
    return f'<section id="{escape(identifier)}"><h2>{escape(title)}</h2>\n{body}</section>\n' if body else ""


def facts(entries: Iterable[tuple[str, str, str]]) -> str:
    """The figures at the top: (label, value, small print), plain text."""
    items = [
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}<small>{escape(small)}</small></dd></div>"
        for label, value, small in entries
    ]
    return f"<dl>{''.join(items)}</dl>"


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Colours and what they mean: (name of a colour of the page, plain text)."""
    items = [f'<li><i style="background:var(--{colour})"></i>{escape(text)}</li>' for colour, text in entries]
    return f'<ul class="legend">{"".join(items)}</ul>'


def figure(svg: str, name: str = "", value: str = "", *, wide: bool = False) -> str:
    """A picture under its name, with its newest value to the right, plain text."""
    caption = f"<figcaption><span>{escape(name)}</span><b>{escape(value)}</b></figcaption>" if name else ""
    kind = ' class="wide"' if wide else ""
    return f"<figure{kind}>{caption}{svg}</figure>"


def grid(figures: Iterable[str], *, large: bool = False) -> str:
    """Pictures beside each other, nothing without any."""
    content = "".join(figures)
    return f'<div class="grid{" large" * large}">{content}</div>' if content else ""


def medium(path: Path, title: str, caption: str, *, large: bool = False) -> str:
    """A video or a picture as part of the page; empty if the file is not what its name says."""
    data = path.read_bytes()
    text = base64.b64encode(data).decode("ascii")
    if path.suffix == ".mp4" and data[4:8] == b"ftyp":
        content = f'<video src="data:video/mp4;base64,{text}" controls loop muted autoplay playsinline></video>'
    elif path.suffix == ".png" and data[:8] == b"\x89PNG\r\n\x1a\n":
        content = f'<img src="data:image/png;base64,{text}" alt="{escape(title)}">'
    else:
        return ""
    kind = ' class="main"' if large else ""
    return f"<figure{kind}>{content}<figcaption><b>{escape(title)}</b>{escape(caption)}</figcaption></figure>"
