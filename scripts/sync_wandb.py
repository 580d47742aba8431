"""Offline wandb runs that are not uploaded yet, and the command that uploads them.

python scripts/sync_wandb.py [results]            # lists them and prints the command
python scripts/sync_wandb.py results --upload     # uploads (needs WANDB_API_KEY)
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from driftline.core.console import program


def unsynced(root: Path) -> list[Path]:
    """Folders of offline runs without the mark that an upload leaves beside the data."""
    folders = sorted(root.rglob("wandb/offline-run-*"))
    return [f for f in folders if any(f.glob("*.wandb")) and not any(f.glob("*.wandb.synced"))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, nargs="?", default=Path("results"))
    parser.add_argument("--upload", action="store_true")
    args = parser.parse_args()
    folders = unsynced(args.root)
    if not folders:
        print(f"nothing to upload under {args.root}")
        return 0
    command = [sys.executable, "-m", "wandb", "sync", *map(str, folders)]
    if not args.upload:
        print(f"{len(folders)} offline runs; upload them with --upload, or with\n")
        print(shlex.join(["wandb", *command[3:]]))
        return 0
    if not os.environ.get("WANDB_API_KEY"):
        print("error: set WANDB_API_KEY first (wandb.ai/authorize shows it)", file=sys.stderr)
        return 2
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(program(main))
