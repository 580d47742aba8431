"""The source phase of a method: done once, cached by what it depends on, reported with every run.

An artefact is a `.safetensors` file under `<root>/prepared/<strategy>/`. Its key is a hash of the
pretrained tensors, the source images, the settings and the method's code, never of a name alone:
another backbone, other images, other settings or an edited method make another artefact. It holds
a checksum; what is damaged, or was put there for another key, is made again, and the console says
so.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from driftline.core.errors import UserError
from driftline.core.files import BadFile, read_checked, write_checked
from driftline.core.processes import Lock, return_freed_memory
from driftline.core.provenance import code_of
from driftline.core.strategy import TTAStrategy
from driftline.core.stream import SourceImages
from driftline.runs.tensor_file import read_tensors, write_tensors

FORMAT = 2  # of artefacts; 2: with a checksum
KIND = "preparation-2"  # unfinished; 2: with the artefact's key and a checksum


class PartialFile:
    """`Progress` in a file beside the artefact; replaced atomically, deleted at the end.

    Args:
        key: of the artefact.
        say: prints a line.
    """

    def __init__(self, path: Path, key: str, say: Callable[[str], None]) -> None:
        self.path, self.key, self.say = path, key, say

    def load(self) -> dict[str, Any] | None:
        """The last state; None where there is none that can be used.

        Raises:
            UserError: for a file that cannot be read.
        """
        if not self.path.exists():
            return None
        try:
            with read_checked(self.path, KIND, self.key) as file:
                return torch.load(file, weights_only=True, map_location="cpu")
        except BadFile as error:
            self.say(f"the unfinished preparation {error}; it starts again")
            return None
        except OSError as error:
            raise UserError(
                f"cannot read the unfinished preparation {self.path}: {error}"
            ) from error

    def save(self, state: Mapping[str, Any]) -> None:
        with write_checked(self.path, KIND, self.key) as file:
            torch.save(dict(state), file)


def artefact_key(
    strategy: TTAStrategy, settings: Mapping[str, Any], weights: str, images: str
) -> tuple[str, str]:
    """16 hex digits, and the text that they are the hash of."""
    name = f"{type(strategy).__module__}.{type(strategy).__name__}"
    depends = {
        "format": FORMAT,
        "method": name,
        "code": code_of(name)["method"],
        "weights": weights,
        "images": images,
        "settings": settings,
    }
    text = json.dumps(depends, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16], text


def prepare(
    strategy: TTAStrategy,
    fresh: Callable[[], TTAStrategy],
    find_source: Callable[[], SourceImages] | None,
    *,
    weights: str,
    folder: Path,
    say: Callable[[str], None],
    warn: Callable[[str], None] | None = None,
) -> dict[str, Any] | None:
    """Find or make what `strategy` needs from the source, and hand it over.

    Args:
        strategy: the instance of the run.
        fresh: makes another instance to prepare with, so that nothing but the artefact is left.
        find_source: the labelled source images of the scenario.
        weights: hash of the pretrained tensors.
        folder: where the artefacts of this strategy lie.
        say: prints a line.
        warn: prints one on a damaged file, also in a run inside another one; None: as `say`.

    Returns:
        what the result says about it, or None if the strategy needs nothing.

    Raises:
        UserError: without source images, or where a file cannot be read.
    """
    settings, warn = strategy.preparation(), warn or say
    if settings is None:
        return None
    if find_source is None:
        raise UserError(
            f"{type(strategy).__name__} prepares on labelled source images, and this scenario "
            "has none"
        )
    source = find_source()
    key, text = artefact_key(strategy, settings, weights, source.fingerprint)
    path = folder / f"{key}.safetensors"
    lock = Lock(folder / f".{key}")
    if not lock.acquire():
        say(f"waiting for {lock.holder()}, which prepares the same artefact")
        while not lock.acquire():
            time.sleep(1)
    try:
        stored = None
        try:
            stored = _load(path, text) if path.exists() else None
        except BadFile as error:
            warn(f"the prepared artefact {error}; it is made again")
        cached = stored is not None
        if not cached:
            say(f"preparing on {source.images:,} source images ({source.description}) -> {path}")
            partial = PartialFile(folder / f"{key}.partial", key, warn)
            started = time.perf_counter()
            artefact = fresh().prepare(source, partial)
            facts = {
                "depends": text,
                "images": str(source.images),
                "source": source.description,
                "seconds": f"{time.perf_counter() - started:.1f}",
            }
            write_tensors(path, artefact, facts)
            return_freed_memory()  # batches are larger here than those of the stream
            partial.path.unlink(missing_ok=True)
    finally:
        lock.release()
    artefact, facts = stored or _load(path, text)
    strategy.use_prepared(artefact)
    strategy.prepared = artefact
    say(f"prepared on {facts['images']} source images{' (cached)' if cached else ''}: {path}")
    return {
        "artefact": str(path),
        "key": key,
        "cached": cached,
        "source_images": int(facts["images"]),
        "source": facts["source"],
        "seconds": float(facts["seconds"]),
        "bytes": path.stat().st_size,
        "settings": settings,
    }


def _load(path: Path, depends: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and facts of the artefact that was made for `depends`.

    Raises:
        BadFile: if it is damaged or made for something else.
        UserError: if it cannot be read.
    """
    artefact, facts = read_tensors(path, "prepared artefact")
    if facts["depends"] != depends:
        raise BadFile(f"{path} was made for other settings, weights or images")
    return artefact, facts
