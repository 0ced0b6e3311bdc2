"""What all pages have in common: one self-contained HTML file, readable by people and by screen readers."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from detrkit.documents import opened

JPEG_QUALITY = 80
_MADE_BY = '<meta name="generator" content="detrkit">'
_ALIGN, _WORDS = ' style="text-align:left"', ' class="words"'

STYLE = """
:root { color-scheme: light dark; --ink: #1f2428; --soft: #5b6570; --line: #dfe3e8; --paper: #fff; --card: #f6f8fa;
  --bar: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa5b1; --line: #363d45; --paper: #15191d;
  --card: #1e242a; --bar: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.3rem; margin: 2.8rem 0 .5rem; }
p { max-width: 48rem; margin: .4rem 0 1rem; }
.soft, figcaption, dt { color: var(--soft); }
dl.headline { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .8rem; margin: 1.4rem 0; }
dl.headline div { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem; }
dl.headline dd { margin: 0; font-size: 1.8rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .5rem; }
th, td { padding: .4rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td.words { text-align: left; white-space: normal; }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 600; }
td.ap { background: linear-gradient(to right, color-mix(in srgb, var(--bar) 24%, transparent) var(--share),
  transparent var(--share)); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1rem; align-items: start; }
.plots img { width: 100%; background: #fff; border: 1px solid var(--line); border-radius: .6rem; padding: .5rem; }
figure { margin: 0 0 1.4rem; }
figure img { width: 100%; height: auto; display: block; border: 1px solid var(--line); border-radius: .4rem; }
figcaption { padding: .35rem .1rem; overflow-wrap: anywhere; }
figcaption strong { color: var(--ink); }
.note { background: var(--card); border-left: 4px solid var(--bar); padding: .6rem 1rem; border-radius: .3rem; }
@media print { body { max-width: none; } figure, tr { break-inside: avoid; } }
"""


def document(title: str, sections: Sequence[str]) -> str:
    """The whole page as HTML; empty sections are left out."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'{_MADE_BY}\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def is_page(file: Path) -> bool:
    """Whether a file is a page that `document` made."""
    try:
        with opened(file) as stream:
            return _MADE_BY.encode() in stream.read(1000)
    except OSError:
        return False


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, words: Sequence[int] = ()) -> str:
    """A table of plain text; the first column names the rows, and those of the numbers in `words` hold sentences."""
    top = "".join(
        f'<th scope="col"{_ALIGN if place in words else ""}>{escape(head)}</th>' for place, head in enumerate(heads)
    )
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td{_WORDS if place in words else ''}>{escape(cell)}</td>" for place, cell in enumerate(row[1:], 1))
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def embed(data: bytes, kind: str) -> str:
    """An image file of a kind, such as `png`, as the source of an `<img>`."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def jpeg(picture: Image.Image, quality: int = JPEG_QUALITY) -> bytes:
    """A picture as a JPEG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()
