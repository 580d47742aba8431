"""Tensors and texts in one `.safetensors` file, whole or not there, that notices damage."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from driftline.core.errors import UserError
from driftline.core.exact import content
from driftline.core.files import BadFile, replacing


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write both, with a checksum of both."""
    # Clones: safetensors refuses tensors that share memory.
    plain = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
    with replacing(path) as part:
        save_file(plain, part, metadata={**facts, "checksum": _checksum(plain, facts)})


def read_tensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU and facts of a file of `write_tensors`.

    Args:
        what: the file holds, for the error.

    Raises:
        BadFile: if it is damaged.
        UserError: if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            facts = dict(file.metadata() or {})
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error}") from error
    except SafetensorError as error:
        raise BadFile(f"{path} is damaged ({error})") from error
    if facts.pop("checksum", None) != _checksum(tensors, facts):
        raise BadFile(f"{path} is damaged: its content does not fit its checksum")
    return tensors, facts


def _checksum(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    """CRC-32 over the facts and every tensor's name, type, shape and bytes."""
    checksum = zlib.crc32(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        about = f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        checksum = zlib.crc32(about.encode(), checksum)
        checksum = zlib.crc32(content(tensor), checksum)
    return f"{checksum:08x}"
