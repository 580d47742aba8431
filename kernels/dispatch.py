"""Which implementation of the adapter operator runs: `kernel.backend` in the configuration.

| value     | on a GPU                                        | on a CPU                        |
|-----------|-------------------------------------------------|---------------------------------|
| auto      | Triton; where it cannot, reference with one     | reference                       |
|           | warning a reason; where it is slower, reference |                                 |
| triton    | Triton, or an error that names what is missing  | error, but for TRITON_INTERPRET |
| reference | the fused form in plain PyTorch                 | the same                        |
| compile   | `torch.compile` of the plain formula            | the same, slow at small batches |

The choice is one of the process. What was used and why goes into the results of a run.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from driftline.core.errors import UserError, suggest

BACKENDS = ("auto", "triton", "reference", "compile")
NO_GPU = (
    "kernel=triton needs a CUDA device (or TRITON_INTERPRET=1 for tests): set kernel.backend=auto"
)
# ViDA's rank of 129 in float32 took 1.30 times as long in Triton as in plain torch on an H200.
MAX_FLOAT32_RANK = 64
MAX_SEGMENTS = 65535  # of a launch grid's second and third dimension


class BackendError(UserError, RuntimeError):
    """The backend that was asked for cannot run."""


class _State:
    requested = "auto"
    used: dict[str, str] = {}  # backend -> why, in the order of first use


def use(backend: str) -> None:
    """Set the choice of this process; what was recorded so far is forgotten.

    Raises:
        BackendError: for an unknown name, or `triton` where no tensor could use it.
    """
    if backend not in BACKENDS:
        raise BackendError(
            f"kernel.backend={backend!r} is not one of {', '.join(BACKENDS)}"
            f"{suggest(backend, BACKENDS)}"
        )
    if backend == "triton":
        if not (torch.cuda.is_available() or interpreted()):
            raise BackendError(NO_GPU)
        if reason := no_triton():
            raise BackendError(
                f"kernel.backend=triton cannot run: {reason}; set kernel.backend=auto"
            )
    _State.requested, _State.used = backend, {}
    if backend == "compile" and not torch.cuda.is_available():
        warnings.warn(
            "kernel.backend=compile is slower than reference at small batches on a CPU",
            stacklevel=2,
        )


class Record:
    """What was used, as a checkpoint keeps it: a resumed run has also used what ran before."""

    def snapshot(self) -> dict[str, Any]:
        return {"used": dict(_State.used)}

    def restore(self, state: Mapping[str, Any]) -> None:
        _State.used = {**state["used"], **_State.used}


def chosen() -> dict[str, str]:
    """`requested`, `used` (several are joined by " and ") and `reason`, for a run's results."""
    return {
        "requested": _State.requested,
        "used": " and ".join(_State.used) or "none",
        "reason": "; ".join(_State.used.values()) or "no adapter has run",
    }


def interpreted() -> bool:
    """Whether Triton's interpreter is switched on (it then runs on CPU tensors)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def select(
    x: Tensor, base: Tensor | None, down: Tensor, up: Tensor, compute_dtype: torch.dtype
) -> str:
    """The backend for a call: "triton", "reference" or "compile"; recorded.

    Raises:
        BackendError: if Triton was asked for and cannot serve the call.
    """
    requested = _State.requested
    if requested in ("reference", "compile"):
        return _record(requested, "asked for")
    on_cpu = _on_cpu(x)
    if requested == "auto" and on_cpu:
        return _record("reference", "no CUDA device")
    if on_cpu and not interpreted():
        raise BackendError(NO_GPU)
    dtypes = (x.dtype, None if base is None else base.dtype, compute_dtype)
    reason = _unfit(x.device, dtypes, down.shape[-1], up.shape[-2], down.shape[-2])
    if reason is None and x.dim() > 2 and x.shape[0] > MAX_SEGMENTS:
        reason = f"more than {MAX_SEGMENTS} samples or groups in one call"
    if reason is None and requested == "auto" and compute_dtype == torch.float32:
        rank = down.shape[-2]
        if rank > MAX_FLOAT32_RANK and torch.get_float32_matmul_precision() == "highest":
            return _record("reference", f"rank {rank} in float32 is faster in plain torch")
    if reason is None:
        return _record("triton", "asked for" if requested == "triton" else "CUDA device")
    if requested == "triton":
        raise BackendError(
            f"kernel.backend=triton cannot run this adapter: {reason}; set kernel.backend=auto"
        )
    return _fall_back(reason)


def _on_cpu(x: Tensor) -> bool:
    return x.device.type != "cuda"


@cache
def no_triton() -> str | None:
    """Why the kernels cannot be imported, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if importlib.util.find_spec("triton.knobs") is None:
        from triton import __version__ as version

        return f"Triton {version} has no triton.knobs: 3.4 or newer is needed (as torch 2.8 has)"
    return None


Dtypes = tuple[torch.dtype, torch.dtype | None, torch.dtype]  # of x, base and the products


@torch.compiler.assume_constant_result
def _unfit(device: torch.device, dtypes: Dtypes, d_in: int, d_out: int, rank: int) -> str | None:
    """Why Triton cannot serve such a call, or None."""
    return _found_unfit(device, dtypes, d_in, d_out, rank)


@cache
def _found_unfit(
    device: torch.device, dtypes: Dtypes, d_in: int, d_out: int, rank: int
) -> str | None:
    if reason := no_triton():
        return reason
    from driftline.kernels import triton_adapter

    of_x, of_base, compute = dtypes
    x = torch.empty((1, 0, d_in), dtype=of_x, device=device)
    base = None if of_base is None else torch.empty((1, 0, d_out), dtype=of_base, device=device)
    down = torch.empty((1, rank, d_in), dtype=compute, device=device)
    up = torch.empty((1, d_out, rank), dtype=compute, device=device)
    return triton_adapter.supported(x, base, down, up, compute_dtype=compute)


def _record(backend: str, why: str) -> str:
    if backend not in _State.used:
        _State.used[backend] = why
    return backend


def _fall_back(reason: str) -> str:
    why = _State.used.get("reference", "")
    if reason not in why:
        _State.used["reference"] = f"{why}, {reason}" if why else f"reference for {reason}"
        warnings.warn(f"kernel.backend=auto uses the reference: {reason}", stacklevel=4)
    return "reference"
