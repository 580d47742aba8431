"""The device of a run, and torch's own settings: threads, precision, determinism, memory."""

from __future__ import annotations

import ctypes
import sys

import torch
from omegaconf import DictConfig

from driftline.core import distributed
from driftline.core.errors import UserError
from driftline.runs.schema import embedded


def set_up(cfg: DictConfig) -> torch.device:
    """The device that `runtime` names, with threads and precision set."""
    name = cfg.runtime.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = distributed.own_device(name)
    except RuntimeError as error:
        raise UserError(f"runtime.device={name} is no device; use auto, cpu or cuda[:n]") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"runtime.device={name}, but torch sees no GPU here; use runtime.device=cpu"
        )
    if cfg.precision == "fp16" and device.type != "cuda":
        raise UserError("precision=fp16 needs a GPU; on a CPU use precision=bf16 or fp32")
    _runtime(cfg, device)
    return device


def _runtime(cfg: DictConfig, device: torch.device) -> None:
    threads = cfg.runtime.threads
    if threads is None and embedded(cfg):
        threads = 1  # the embedded networks are too small to gain from more
    if threads is not None:
        torch.set_num_threads(threads)
    if sys.platform == "linux" and device.type == "cpu":
        _keep_freed_memory()
    tf32 = cfg.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.use_deterministic_algorithms(cfg.deterministic)
    torch.backends.cudnn.benchmark = False


def _keep_freed_memory() -> None:
    """Let the C library reuse large freed blocks instead of returning them to the kernel.

    Activations are freed and allocated again at every layer; zeroing fresh pages is a quarter of
    a forward pass on a CPU. Changes no number.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass  # another C library
