"""The table of data sets in docs/data.md, from their records in streams/data.

python tools/data_table.py            # rewrites the block between the markers
python tools/data_table.py --check    # exit status 1 if the block is out of date
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

import blocks

from driftline.streams.dataset import About, about, named
from driftline.streams.downloads import Download

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "data.md"
BEGIN = "<!-- data sets: made by tools/data_table.py -->"
END = "<!-- end of data sets -->"


def checksums(download: Download) -> str:
    """What files are compared with."""
    kinds = {file.checksum.partition(":")[0] or "none published" for file in download.files}
    return ", ".join(sorted(kinds)).replace("md5", "MD5").replace("sha256", "SHA-256")


def row(name: str, record: About, download: Download) -> str:
    how = "program" if download.by_program else "by hand"
    parts = dict.fromkeys(file.part for file in download.files if file.part)
    optional = {file.part for file in download.files if file.optional}
    listed = ", ".join(f"({part})" if part in optional else part for part in parts)
    cells = (
        f"`{name}`",
        f"{record.title}: {record.paper}" if record.paper else record.title,
        how,
        download.size.replace("size unknown", "-"),
        checksums(download),
        listed,
        record.licence,
        f"`{record.layout.replace('<data.root>/', '')}`",
    )
    return f"| {' | '.join(cells)} |"


def markdown() -> str:
    """The table, and what has to be done by hand."""
    records = {name: about(name) for name in named()}
    loaded = {name: r.download for name, r in records.items() if r.download is not None}
    lines = [
        "| name | data set | loaded by | size | checksums | parts | licence | layout |",
        "|---|---|---|---|---|---|---|---|",
        *(row(name, records[name], download) for name, download in loaded.items()),
        "",
        "By hand, or beside what the program loads:",
        "",
        *(
            f"* `{name}`: {escape(d.by_hand, quote=False)}."
            for name, d in loaded.items()
            if d.by_hand
        ),
        "",
        "Where sizes and checksums come from:",
        "",
        *(f"* `{name}`: {d.sources}." for name, d in loaded.items() if d.sources),
    ]
    return "\n".join(lines)


def filled(text: str) -> str:
    """The page with a fresh table, as of `blocks.filled`."""
    return blocks.filled(text, BEGIN, END, markdown())


if __name__ == "__main__":
    sys.exit(blocks.main(__doc__, ROOT, {PAGE: filled}))
