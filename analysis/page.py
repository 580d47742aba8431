"""One self-contained HTML page: no script, no request to anywhere, images inside the file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

from driftline.analysis.tables import Table, anchor, as_html, definitions

CSS = """
:root { color-scheme: light dark; --text: #1d1d1b; --back: #fff; --line: #dcdcd8; --soft: #f5f5f2;
  --faint: #5a5a57; --link: #00548a; --warn: #fff4d8; --edge: #e69f00;
  --worse: #b3261e; --paper: #fff; --dim: 1; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e6; --back: #161616; --line: #3c3c3c;
  --soft: #212121; --faint: #a8a8a8; --link: #7cc4f5; --warn: #33290f;
  --worse: #ff8a80; --paper: #e0e0e0; --dim: .88; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1.2rem 1.2rem 4rem; max-width: 1240px; color: var(--text);
  background: var(--back); font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .4rem 0 .2rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 3rem 0 .6rem; padding-top: .8rem;
  border-top: 2px solid var(--line); }
h3 { font-size: 1rem; margin: 1.8rem 0 .4rem; }
a { color: var(--link); }
p { margin: .3rem 0; }
nav a { display: inline-block; margin: .2rem 1.2rem .2rem 0; }
.faint, .caption { color: var(--faint); font-size: .85rem; }
.notes { background: var(--warn); border-left: 4px solid var(--edge); border-radius: 4px;
  margin: 1rem 0; padding: .6rem 1rem .6rem 2rem; font-size: .93rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; overflow-wrap: normal; font-size: .84rem;
  font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: .35rem .65rem; text-align: right; white-space: nowrap; }
th { background: var(--soft); font-weight: 600; border-bottom: 1px solid var(--line); }
td { border-bottom: 1px solid var(--soft); }
tr > :first-child { position: sticky; left: 0; text-align: left; background: var(--back);
  min-width: 7.5rem; max-width: 22rem; white-space: normal; overflow-wrap: anywhere; }
tr > th:first-child { background: var(--soft); }
.words td, .words th { text-align: left; }
th a { color: inherit; text-underline-offset: 3px; text-decoration-style: dotted; }
u { text-underline-offset: 3px; }
.worse { color: var(--worse); font-weight: 700; }
dt { font-weight: 600; margin-top: .6rem; }
dd { margin: 0 0 0 1rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 500px), 1fr));
  gap: 1rem; align-items: start; margin-top: 1.6rem; }
figure { margin: 0; min-width: 0; }
figure.large { grid-column: 1 / -1; }
figure .scroll { background: var(--paper); padding: .5rem; text-align: center; }
img { display: inline-block; filter: brightness(var(--dim)); width: 100%;
  max-width: var(--wide); height: auto; }
figure.large img { min-width: 540px; }
summary { cursor: pointer; padding: .4rem 0; }
@media (max-width: 600px) { body { padding: .7rem .8rem 3rem; } h1 { font-size: 1.35rem; }
  th, td { padding: .3rem .55rem; } tr > :first-child { max-width: 8.5rem; } }
"""


@dataclass
class Picture:
    """A PNG file as bytes, its alternative text and its width in CSS pixels."""

    png: bytes
    text: str
    width: int


@dataclass
class Section:
    """Tables and figures of one scenario, backbone and stream."""

    title: str
    tables: list[Table]
    pictures: list[Picture]


def page(
    title: str, about: str, notes: Sequence[str], sections: Sequence[Section], states: Table
) -> str:
    """The whole document as text.

    Args:
        about: one line below the title.
        notes: what a reader must know before comparing.
        states: all runs, with those that are in no mean.
    """
    links = [f'<a href="#s{i}">{_text(s.title)}</a>' for i, s in enumerate(sections)]
    links += ['<a href="#meaning">What the numbers mean</a>', '<a href="#runs">All runs</a>']
    items = "".join(f"<li>{_text(n)}</li>" for n in notes)
    body = "\n".join(_section(i, s) for i, s in enumerate(sections))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<link rel="icon" href="data:,">
<style>{CSS}</style>
</head>
<body>
<h1>{_text(title)}</h1>
<p class="faint">{_text(about)}</p>
<nav>{"".join(links)}</nav>
{f'<ul class="notes">{items}</ul>' if items else ""}
<main>
{body}
{_meanings([table for section in sections for table in section.tables])}
<h2 id="runs">All runs</h2>
<details{" open" if len(states.rows) <= 12 else ""}><summary>{_text(about)}</summary>
<div class="words">{as_html(states)}</div></details>
</main>
</body>
</html>
"""


def _section(i: int, section: Section) -> str:
    parts = [f'<h2 id="s{i}">{_text(section.title)}</h2>']
    for table in section.tables:
        if table.title != section.title:
            name = table.title.removeprefix(f"{section.title}: ")
            parts.append(f"<h3>{_text(name[0].upper() + name[1:])}</h3>")
        parts.append(as_html(table, linked=True))
    pictures = "".join(_figure(picture) for picture in section.pictures)
    parts.append(f'<div class="figures">{pictures}</div>')
    return "\n".join(parts)


def _meanings(tables: Sequence[Table]) -> str:
    """The definition of every number on the page; heads of columns lead here."""
    items = []
    for name, text, source in definitions(tables):
        key = anchor(name.split(" ")[0])
        by = f' <span class="faint">{_text(source)}</span>' if source else ""
        items.append(f'<dt id="{key}">{_text(name)}</dt><dd>{_text(text)}{by}</dd>')
    return f'<h2 id="meaning">What the numbers mean</h2>\n<dl>{"".join(items)}</dl>'


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    large = ' class="large"' if picture.width > 560 else ""
    return (
        f'<figure{large}><div class="scroll" tabindex="0">'
        f'<img style="--wide:{picture.width}px" alt="{html.escape(picture.text)}" '
        f'src="data:image/png;base64,{data}"></div></figure>\n'
    )


def _text(text: str) -> str:
    return html.escape(text)
