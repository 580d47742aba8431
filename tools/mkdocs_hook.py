"""Brings pages outside docs/ into the site and turns links between files into links of the site.

In the repository a page links to files, `../kernels/README.md`; on the site that file is a page of
its own. Links to files that are no page of the site (code, data) become plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]

OUTSIDE = {  # file of the repository -> page of the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "kernels/README.md": "kernels.md",
} | {
    path.relative_to(ROOT).as_posix(): f"reference/{path.name}"
    for path in (ROOT / "results" / "reference").glob("*.md")
}
LINK = re.compile(r"(?P<text>\[[^\]]*\])\((?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
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

    return LINK.sub(relink, markdown)
