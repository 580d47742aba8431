"""Brings pages outside docs/ and pages made from the code into the site; links become the site's.

In the repository a page links to files, `../kernels/README.md`; on the site that file is a page of
its own. Links to files that are no page of the site (code, data) become plain text. In the tables
of `TABLES` a name in the first column leads to its settings.
"""

from __future__ import annotations

import posixpath
import re
import sys
from functools import cache
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import reference  # noqa: E402

OUTSIDE = {  # file of the repository -> page of the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "kernels/README.md": "kernels.md",
    "results/example/README.md": "example.md",
} | {
    path.relative_to(ROOT).as_posix(): f"reference/{path.name}"
    for path in (ROOT / "results" / "reference").glob("*.md")
}
TABLES = {  # page -> groups whose options its tables list
    "index.md": ("strategy", "scenario"),
    "methods.md": ("strategy",),
    "scenarios.md": ("scenario", "backbone"),
    "adapters.md": ("adapter",),
    "rules.md": ("around",),
}
LINK = re.compile(r"(?P<text>\[[^\]]*\])\((?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")


@cache
def made() -> dict[str, str | bytes]:
    """Address on the site -> content, of all that is made from the code; once a process."""
    return {**reference.pages(), **reference.gallery()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for uri, content in made().items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    if here in made():
        return markdown
    sources = {uri: source for source, uri in OUTSIDE.items()}
    folder = posixpath.dirname(sources.get(here, f"docs/{here}"))

    def relink(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match["path"]))
        if not (ROOT / target).exists():
            return match[0]  # no link at all, or a broken one, which --strict reports
        uri = OUTSIDE.get(target) or target.removeprefix("docs/")
        if files.get_file_from_path(uri) is None:
            return match["text"][1:-1]
        path = posixpath.relpath(uri, posixpath.dirname(here) or ".")
        return f"{match['text']}({path}{match['anchor'] or ''})"

    text = LINK.sub(relink, markdown)
    return with_settings(text, TABLES[here]) if here in TABLES else text


def with_settings(text: str, groups: tuple[str, ...]) -> str:
    """A page whose tables name options in their first column, with links to the settings."""

    def linked(match: re.Match[str]) -> str:
        name = match[1].partition(" ")[0]
        for group in groups:
            if (ROOT / "conf" / group / f"{name}.yaml").is_file():
                single = f"settings/{group}/{name}.md"
                return (
                    f"[{match[0]}]({single if single in made() else f'settings/{group}.md#{name}'})"
                )
        return match[0]

    def row(match: re.Match[str]) -> str:
        return re.sub(r"(?<!\[)`([\w ./=]+)`", linked, match[0])

    return re.sub(r"^\| `[^|]*(?=\|)", row, text, flags=re.M)
