"""The folder of the configuration, and the home folder in settings; needs no torch.

A shell replaces `~` at the beginning of a word only; in `'data.root="~/images"'` (Hydra wants the
quotes) it arrives as typed. `expand_paths` is the one place that replaces it, before a setting is
used, hashed or recorded; nothing behind it looks for `~`. A relative path is left as it is: it
counts from the folder where the command was typed.
"""

from __future__ import annotations

from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

CONF = Path(__file__).parents[1] / "conf"
CHECKOUT = (CONF.parent / "run.py").is_file()  # an installed package has `driftline` alone
PAPERS = CONF.parent / "papers"  # core/papers.py


def run_line(words: str = "") -> str:
    """A run as it is typed: by run.py in a checkout, by the command of an installed package."""
    return f"{'python run.py' if CHECKOUT else 'driftline'} {words}".rstrip()


def script_line(name: str, words: str = "") -> str:
    """A program of scripts/ as it is typed, and where it is, since a wheel does not hold it."""
    typed = f"`{' '.join(filter(None, [f'python scripts/{name}.py', words]))}`"
    return typed if CHECKOUT else f"{typed} in a checkout (the installed package has it not)"


def expand_paths(node: DictConfig | ListConfig) -> None:
    """Replace a leading `~` or `~user` in every text below `node`, in place.

    No setting that is not a path begins so; hence there is no list of paths to keep.
    """
    keys = list(node) if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        if OmegaConf.is_missing(node, key):
            continue
        value = node[key]
        if isinstance(value, DictConfig | ListConfig):
            expand_paths(value)
        elif isinstance(value, str) and value.startswith("~"):
            node[key] = expanduser(value)


def results_folder(words: Sequence[str], default: Path = Path("results")) -> Path:
    """Where the runs of a command with these words go: its last `root=...`."""
    roots = [word.removeprefix("root=") for word in words if word.startswith("root=")]
    return Path(roots[-1].strip("'\"")).expanduser() if roots else default


def nearest_existing(path: Path) -> Path:
    """A path, or the nearest folder above it that is there, absolute."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def add_resolver() -> None:
    """Let `${expanduser:${root}}` stand in conf/: Hydra makes a sweep's folder by itself."""
    OmegaConf.register_new_resolver("expanduser", expanduser, replace=True)
