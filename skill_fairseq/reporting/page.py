"""A self-contained HTML page: no network, no scripts, no other files."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Optional

from skill_fairseq.messages import shell_quote

STYLE = """
*{box-sizing:border-box}
body{margin:0 auto;max-width:1200px;padding:16px;font:16px/1.5 system-ui,sans-serif;color:#1c1c1c;background:#fff;
  overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.25;margin:.4rem 0}
h2{font-size:1.25rem;margin:2rem 0 .5rem;padding-top:.5rem;border-top:1px solid #ddd}
h3{font-size:1.05rem;margin:1.2rem 0 .4rem}
p{margin:.5rem 0}
a{color:#0b5ea8}
nav{font-size:.95rem}
nav a{display:inline-block;margin-right:1rem;padding:.2rem 0}
.scroll,pre{overflow-x:auto;max-width:100%;margin:.5rem 0;--paper:#fff;
  background:linear-gradient(to left,var(--paper) 40%,transparent) right/36px 100% no-repeat local,
  linear-gradient(to left,#0004,transparent) right/12px 100% no-repeat scroll,var(--paper)}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;border-bottom:1px solid #e4e4e4;text-align:right;white-space:nowrap}
th{border-bottom:2px solid #999;font-weight:600}
th:first-child,td:first-child{text-align:left;padding-left:0}
.short th:first-child,.short td:first-child{position:sticky;left:0;background:#fff}
.words th:last-child,.words td:last-child{text-align:left}
ul{padding-left:1.2rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:16px}
figure{margin:.5rem 0;min-width:0}
figure img{display:block;max-width:min(100%,520px);height:auto}
figure.wide img{max-width:none;width:max(100%,860px)}
figcaption{font-size:.9rem;color:#555}
pre{--paper:#f5f5f3;padding:.7rem;font-size:.85rem;line-height:1.45}
pre.command{white-space:pre-wrap}
pre.command span{display:inline-block;max-width:100%}
details{margin:.5rem 0}
summary{cursor:pointer;padding:.3rem 0}
"""

LONGEST_STAYING = 19  # characters of a first column that stays in view: less than half of a phone screen


def page(title: str, about: str, sections: Sequence[tuple[str, str]]) -> str:
    """The whole page.

    Args:
        title: heading.
        about: HTML below it.
        sections: heading and HTML of each.
    """
    names = [f"s{number}" for number in range(len(sections))]
    links = "".join(f'<a href="#{name}">{escape(head)}</a>' for name, (head, _) in zip(names, sections))
    body = "".join(
        f'<section id="{name}"><h2>{escape(head)}</h2>{html}</section>' for name, (head, html) in zip(names, sections)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{about}<nav>{links}</nav>{body}</body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words_last: bool = False) -> str:
    """A table in a box that scrolls on narrow screens; its first column is left-aligned, and sticky if it is short.

    Args:
        head: column names, plain text.
        rows: plain text.
        words_last: left-align the last column too.
    """
    short = all(len(line[0]) <= LONGEST_STAYING for line in [head, *rows] if line)
    kinds = " ".join(kind for kind, holds in (("short", short), ("words", words_last)) if holds)
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f'<div class="scroll" tabindex="0"><table class="{kinds}">{"".join(lines)}</table></div>'


def paragraph(text: str) -> str:
    """Plain text."""
    return f"<p>{escape(text)}</p>"


def bullets(lines: Sequence[str]) -> str:
    """A list of plain text, with ** ** for bold."""
    bold = (re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(line)) for line in lines)
    return "<ul>" + "".join(f"<li>{line}</li>" for line in bold) + "</ul>"


def code(text: str) -> str:
    """Preformatted lines; long ones scroll."""
    return f"<pre>{escape(text)}</pre>"


def command(words: Sequence[str], into: Optional[str] = None) -> str:
    """A shell command, its words quoted; long ones wrap, between words if possible.

    Args:
        words: words of the command.
        into: file for its standard output.
    """
    shown = [escape(shell_quote(word)) for word in words]
    shown += [] if into is None else [escape(f"> {shell_quote(into)}")]
    return f'<pre class="command">{" ".join(f"<span>{word}</span>" for word in shown)}</pre>'


def folded(summary: str, html: str) -> str:
    """Collapsed HTML that the reader can open."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def figure(picture: Path, alt: str, caption: Optional[str] = None, wide: bool = False) -> str:
    """A PNG file inside the page.

    Args:
        picture: the file.
        alt: what it shows, in words.
        caption: below it.
        wide: keep it 860 px wide and scroll on narrower screens, for pictures with small text.
    """
    data = base64.b64encode(picture.read_bytes()).decode()
    image = f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
    below = "" if caption is None else f"<figcaption>{escape(caption)}</figcaption>"
    if wide:
        return f'<figure class="wide"><div class="scroll" tabindex="0">{image}</div>{below}</figure>'
    return f"<figure>{image}{below}</figure>"


def figures(items: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="figures">{"".join(items)}</div>'
