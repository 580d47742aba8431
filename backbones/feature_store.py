"""Answers of a network that never learns, kept in a folder for all runs that name it.

What such a network makes of a batch follows from its layers and weights, from the images and from
the arithmetic. An entry is named by a digest of all three and holds its own checksum: another
number than the one that a pass would give is never taken, on any machine, and a damaged entry
counts as none. A network that moves after all, that draws random numbers, or that a hook acts on
has its passes as without a store. Many processes may share a folder.
"""

from __future__ import annotations

import hashlib
import os
import platform
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from driftline.core.errors import UserError
from driftline.core.exact import content
from driftline.core.files import read_checked, sweep_away, write_checked
from driftline.core.record import cpu_fact

KIND = "features-1"

# Attributes of layers that are no options: torch's own, and what a Backbone notes of its passes.
NO_OPTIONS = {*vars(nn.Module())} - {"training"} | {"passes", "store", "checks_images", "_one_pass"}

# How variables begin by which libraries choose how they compute.
SWITCHES = ("TIMM_", "ONEDNN_", "DNNL_", "MKL_", "ATEN_", "TORCH_", "PYTORCH_", "CUBLAS_", "CUDNN_")
SWITCHES += ("NVIDIA_TF32", "OMP_NUM")

# Hooks that change no answer: checks of what comes in, and adapters, which the methods that ask for
# the plain network have switched off.
HARMLESS = ("driftline.parts.adapters.bank", "enough_in_training", "enough_values")


class Condition:
    """A network as it stands, by which a later change is noticed: tensors, layers and options."""

    def __init__(self, net: nn.Module) -> None:
        self.tensors = [*net.parameters(), *net.buffers()]  # held, so that no other takes its id
        self.versions = [tensor._version for tensor in self.tensors]
        self.layers = [(module, _options(module)) for module in net.modules()]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Condition)
            and [*map(id, self.tensors)] == [*map(id, other.tensors)]
            and (self.versions, self.layers) == (other.versions, other.layers)
        )


def _digest(net: nn.Module) -> str:
    """SHA-256 over the kinds and options of all layers and over all tensors."""
    digest = hashlib.sha256()
    for name, module in net.named_modules():
        digest.update(repr((name, type(module), module.extra_repr(), _options(module))).encode())
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {_form(tensor)}".encode())
        digest.update(content(tensor))
    return digest.hexdigest()


def _options(module: nn.Module) -> dict[str, Any]:
    """The mode and all other attributes of a layer that are plain values; of others the kind."""
    return {k: _plain(v) for k, v in vars(module).items() if k not in NO_OPTIONS}


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    return getattr(value, "__qualname__", type(value))


def _form(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(tensor.shape), tensor.stride()


def _hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _acts(hook: Any) -> bool:
    """Whether a hook may change what the network answers."""
    names = getattr(hook, "__module__", None), getattr(hook, "__name__", None)
    return not any(name in HARMLESS for name in names)


class FeatureStore:
    """Tensors by the network and the batch of images that they belong to.

    Args:
        folder: of all entries; made with the first one.
        limit_gb: of the folder, GiB; beyond it the entries longest not asked for go.
        arithmetic: in words, see `arithmetic_of`.

    A store serves one network, see `another`.
    """

    def __init__(self, folder: Path, limit_gb: float, arithmetic: str) -> None:
        self.folder, self.limit, self.arithmetic = folder, limit_gb * 2**30, arithmetic
        self.writes = True
        self._size: int | None = None  # bytes in the folder, as far as this process knows
        self._condition: Condition | None = None  # in which the network has its digest
        self._network: str | None = None  # that digest
        self._moved = False

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a network may learn: it has no store."""
        return None

    def another(self) -> FeatureStore:
        """The same folder for another network."""
        return FeatureStore(self.folder, self.limit / 2**30, self.arithmetic)

    def digest(self, net: nn.Module) -> str | None:
        """What names the network as it is now.

        None while a hook acts on it, and for good once it is another one than at the first call.
        """
        if self._moved or any(_acts(hook) for part in net.modules() for hook in _hooks(part)):
            return None
        now = Condition(net)
        if now != self._condition:  # or the same numbers were written once more
            first, self._network = self._network, _digest(net)
            self._condition, self._moved = now, first not in (None, self._network)
        return None if self._moved else self._network

    def key(self, network: str, x: Tensor) -> str:
        """24 hex digits that name the images x [B, 3, H, W] under a network, see `digest`."""
        about = (self.arithmetic, network, x.dtype, _form(x))
        digest = hashlib.sha256(repr(about).encode())
        digest.update(content(x))
        return digest.hexdigest()[:24]

    def find(self, key: str, names: Collection[str]) -> dict[str, Tensor] | None:
        """The tensors `names` of an entry; None where one is missing or the entry is damaged."""
        path = self._path(key)
        try:
            with read_checked(path, KIND, key) as file, np.load(file, allow_pickle=False) as entry:
                tensors = {name: torch.from_numpy(entry[name]) for name in names}
            os.utime(path)  # the last to go
        except (UserError, OSError, ValueError, KeyError, EOFError):
            return None
        return tensors

    def add(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write an entry; where that is impossible, say so once and write none any more."""
        if not self.writes:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with write_checked(path, KIND, key, shared=True) as file:
                arrays: dict[str, Any] = {n: t.cpu().numpy() for n, t in tensors.items()}
                np.savez(file, **arrays)
            if self._size is None:
                self._size = sum(size for _, size, _ in self._entries())
            else:
                self._size += path.stat().st_size
            if self._size > self.limit:
                self._shrink()
        except OSError as error:
            self.writes = False
            warnings.warn(f"no more features go to runtime.feature_store: {error}", stacklevel=2)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.npz"

    def _entries(self) -> list[tuple[float, int, str]]:
        """When each was last asked for, bytes, and path."""
        entries = []
        for part in sorted(self.folder.iterdir()):
            if part.is_dir():
                sweep_away(part)
                with os.scandir(part) as names:
                    for entry in names:
                        with suppress(OSError):  # another process drops some as well
                            about = entry.stat()
                            entries.append((about.st_mtime, about.st_size, entry.path))
        return entries

    def _shrink(self) -> None:
        """Down to nine tenths of the limit, which leaves room for some."""
        entries = sorted(self._entries())
        self._size = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if self._size <= 0.9 * self.limit:
                break
            with suppress(OSError):
                os.unlink(path)
            self._size -= size


def arithmetic_of(device: torch.device) -> str:
    """What the last bits of a pass depend on beside the weights and the images."""
    words = [torch.__version__, *map(version, ("timm", "torchvision")), device.type]
    words += [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(SWITCHES)]
    words += [torch.get_float32_matmul_precision(), str(torch.get_default_dtype())]
    words += [str(torch.are_deterministic_algorithms_enabled())]
    if device.type == "cuda":
        words += [torch.cuda.get_device_name(device), str(torch.version.cuda)]
        words += [str(torch.backends.cuda.matmul.allow_tf32), str(torch.backends.cudnn.benchmark)]
        words += [str(torch.backends.cudnn.allow_tf32)]
    else:
        instructions = cpu_fact("flags", "Features") or platform.processor()
        words += [platform.machine(), hashlib.sha256(instructions.encode()).hexdigest()[:16]]
        words += [str(torch.get_num_threads())]
        words += [torch.backends.cpu.get_cpu_capability(), str(torch.backends.mkldnn.enabled)]
    return " ".join(words)
