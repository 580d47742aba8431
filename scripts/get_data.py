"""Loads published data sets: licence, disk and checksums first, then the run.py command to type.

    python scripts/get_data.py --list                                # sets, sizes, licences
    python scripts/get_data.py cifar100_c --to /data
    python scripts/get_data.py cifar10 cifar10_c --to /data --dry-run
    python scripts/get_data.py imagenet_c --to /data --parts noise blur
    python scripts/get_data.py imagenet_c --to /data --from https://mirror.example/imagenet-c
    python scripts/get_data.py office_home --to /data --from ~/Downloads    # loaded by hand

Whatever ends it, the same command goes on: a file goes on from the byte it had, one that is done is
not loaded again. A set of your own package is named by the dotted path of its class. Where only a
person can load a set, it says what to do. Exit status 2 if something is missing at the end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from driftline.core.console import program
from driftline.core.errors import UserError, scarce, shortage, suggest
from driftline.core.paths import CONF
from driftline.streams.dataset import About, about, named
from driftline.streams.downloads import STATE, Download, done, get, readable


def record(dataset: str) -> tuple[About, Download]:
    """What is known of a set, and how it is loaded.

    Raises:
        UserError: for a set that does not exist or cannot be loaded.
    """
    if "." not in dataset and dataset not in named():
        raise UserError(f"no data set {dataset!r}{suggest(dataset, named())} (--list names all)")
    known = about(dataset)
    if known.download is None:
        raise UserError(f"{dataset}: {known.title}: there is nothing to load. {known.layout}")
    return known, known.download


def listing() -> str:
    """One line a set: bytes to load, who can load it, licence."""
    rows = []
    for name in named():
        known = about(name)
        if known.download is not None:
            how = "by program" if known.download.by_program else "by hand"
            rows.append((name, known.download.size, how, known.licence))
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{n.ljust(width)}  {s:>12}  {h:<10}  {lic}" for n, s, h, lic in rows)


def plan(dataset: str, download: Download, root: Path, parts: Sequence[str]) -> str:
    """What a call would do."""
    lines = []
    for file in download.chosen(parts):
        if done(file, root, root / STATE / dataset):
            lines.append(f"{file.file}: there")
            continue
        checksum = file.checksum.partition(":")[0] or "no published checksum"
        origin = file.url or "to be loaded by hand"
        lines.append(f"{file.file}: {readable(file.size)}, {checksum}, into {root / file.into}")
        lines.append(f"    {origin}")
    if download.by_hand:
        lines.append(download.by_hand)
    return "\n".join(lines)


def use(dataset: str, download: Download, root: Path) -> str:
    """The command that uses the data."""
    settings = download.command
    if not settings and (CONF / "scenario" / f"{dataset}.yaml").exists():
        settings = f"scenario={dataset}"
    if not settings:
        return f"no scenario is named after {dataset} yet; see docs/tutorials/own_data.md"
    return f"python run.py {settings.format(root=root)} data.root={root}"


def load(args: argparse.Namespace) -> int:
    """Load the sets one after the other; one that fails does not keep the others back."""
    root, failures = Path(args.to), 0
    for dataset in args.sets:
        try:
            known, download = record(dataset)
            print(f"{known.title}: {known.published}\nlicence: {known.licence}", flush=True)
            if args.dry_run:
                print(plan(dataset, download, root, args.parts))
                continue
            get(dataset, download, root, parts=args.parts, origin=args.origin, keep=args.keep,
                say=lambda line: print(line, flush=True))  # fmt: skip
            print(use(dataset, download, root), flush=True)
        except UserError as error:
            failures += 1
            print(f"error: {error}", file=sys.stderr, flush=True)
    if args.dry_run:
        there = next(path for path in (root, *root.resolve().parents) if path.exists())
        print(f"{readable(shutil.disk_usage(there).free)} free at {there}")
    return 2 if failures else 0


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="*", metavar="SET")
    parser.add_argument("--to", type=os.path.expanduser, help="the folder, a later data.root")
    parser.add_argument("--parts", nargs="+", default=[], help="of a set, see --dry-run")
    parser.add_argument(
        "--from", dest="origin", type=os.path.expanduser, help="address of a mirror, or a folder"
    )
    parser.add_argument("--keep", action="store_true", help="the archives, too")
    parser.add_argument("--dry-run", action="store_true", help="say what would be loaded")
    parser.add_argument("--list", action="store_true", help="all sets")
    args = parser.parse_args(words)
    if args.list:
        print(listing())
        return 0
    if not args.sets or not args.to:
        parser.error("name a set (--list) and a folder: cifar100_c --to /data")
    try:
        return load(args)
    except OSError as error:
        lacking = shortage(error) if scarce(error) else f"--to {args.to}: cannot write: {error}"
        print(f"error: {lacking}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    try:
        sys.exit(program(main))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
