"""Tile sizes of the Triton kernels: a static table, looked up by shape.

No run-time autotuning: it would tune again for every last batch, cannot run while a CUDA graph is
captured, and makes runs differ in the last bits. `benchmarks/bench_kernels.py --device cuda --tune`
measures a device and writes `tuning.json`; the file in the repository says in `source` of each
entry whether it was measured or predicted from register counts and bytes.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLE = Path(__file__).with_name("tuning.json")
BUCKETS = {"2k": 2048, "16k": 16384, "more": math.inf}  # largest number of rows S * L
KERNELS = ("forward", "backward_rows", "backward_weights")


MOST_ROWS = 32  # of the result of a product: a row tile, in backward_weights a chunk of columns


class Config(NamedTuple):
    """Tile sizes of one launch.

    The first dimension of every product stays below 64 (`MOST_ROWS`): from there on Triton takes
    Hopper's warp-group instructions, which read beyond shared memory and gave wrong sums for rank
    tiles of 16 and 32 (Triton 3.6 on an H200). The kernels wait for memory and lose nothing.

    rows: row tile, a power of two.
    columns: chunk of the widths d_in and d_out.
    resident: the forward kernel keeps its row tile of x in registers.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    resident: bool = False


def dtype_name(x: torch.dtype, compute: torch.dtype, precision: str) -> str:
    """Name of a combination of types in the table, e.g. `bf16`, `mixed` (autocast) or `tf32`."""
    if compute == torch.float32:
        return precision
    if x != compute:
        return "mixed"
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}[compute]


def bucket(rows: int) -> str:
    """Name of the row bucket."""
    return next(name for name, limit in BUCKETS.items() if rows <= limit)


def default(kernel: str, width: int, rank: int, dtype: str) -> Config:
    """What runs where the table has nothing near: small enough for every device."""
    columns = 32 if dtype in ("tf32", "tf32x3", "ieee") else 64
    columns = max(16, min(columns, 1 << (width - 1).bit_length()))
    if kernel == "backward_weights":  # three products a step of tf32x3 do not fit 64 rows
        return Config(16 if dtype == "tf32x3" else 64, min(columns, MOST_ROWS), 4, 2)
    return Config(MOST_ROWS, columns, 8 if rank > 64 else 4, 2)


@lru_cache
def entries() -> tuple[dict[str, Any], ...]:
    """The table as it was when this process first looked."""
    return tuple(json.loads(TABLE.read_text())["entries"])


@lru_cache
def lookup(kernel: str, width: int, rank: int, dtype: str, rows: int, form: str) -> Config:
    """Tile sizes of a launch.

    The table is searched for the same kernel, rank and dtype; among those the nearest width wins,
    then the nearest row bucket, then the same form. A width more than twice off, or no entry, takes
    `default`. A resident entry counts for its own width and for smaller ones alone, since a wider
    row tile would not fit the registers.

    Args:
        kernel: one of `KERNELS`.
        width: the larger of d_in and d_out.
        rank: padded, the sum of both rank tiles.
        dtype: of `dtype_name`.
        rows: S * L.
        form: `S` (x added), `P` (x and base added), `N` (x not added).
    """
    names = list(BUCKETS)

    def distance(entry: dict[str, Any]) -> tuple[float, int, bool]:
        return (
            abs(math.log2(entry["width"] / width)),
            abs(names.index(entry["bucket"]) - names.index(bucket(rows))),
            entry["form"] != form,
        )

    near = [
        e
        for e in entries()
        if (e["kernel"], e["rank"], e["dtype"]) == (kernel, rank, dtype)
        and not (e["resident"] and (width > e["width"] or form == "N"))
    ]
    found = min(near, key=distance, default=None)
    if found is None or distance(found)[0] > 1:
        return default(kernel, width, rank, dtype)
    return Config(*(found[name] for name in Config._fields))
