"""Large tensors of a run's saved states that stay as they are: written once, not at every save.

    last.pt        the state; the tensors below are digests in it
    last-1.pt      tensors that two saves after each other had alike, such as the adapters of
    last-2.pt      finished tasks

A growing method would otherwise write all of its tasks again every few batches. A pack is deleted
when the state no longer names it; one of which less than half of the bytes is named is written anew
without the rest, so that packs take at most twice the bytes of what they are for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from driftline.core.exact import content
from driftline.core.files import Damaged, read_checked, write_checked

SMALLEST = 2**16  # bytes of a tensor that is looked at
MARK = "packed tensor"  # the key of what stands for one


class Packs:
    """The packs beside one checkpoint.

    Args:
        path: of the checkpoint; packs lie beside it as `<stem>-<number>.pt`.
        kind, key: of its file, see `write_checked`; packs have the same.
    """

    def __init__(self, path: Path, kind: str, key: str) -> None:
        self.path, self.kind, self.key = path, kind, key
        self._files: dict[str, dict[str, int]] = {}  # pack -> its digests, with their bytes
        self._before: set[str] = set()  # digests of large tensors at the save before
        self._looks: dict[tuple[Any, ...], str] = {}  # what these looked like -> digest

    def write(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Write a pack of what stays and is in none yet.

        Returns:
            `state` with digests in place of what is in packs, and under `packs` what lies where.
        """
        large: dict[str, Tensor] = {}
        digests: dict[int, str] = {}
        looks: dict[tuple[Any, ...], str] = {}

        def note(tensor: Tensor) -> Tensor:
            if look := _look(tensor):
                digest = self._looks.get(look) or _digest(tensor)
                looks[look], large[digest], digests[id(tensor)] = digest, tensor, digest
            return tensor

        _each(state, note)
        self._looks = looks
        sizes = {digest: tensor.nbytes for digest, tensor in large.items()}
        files = {name: _named(held, sizes) for name, held in self._files.items()}
        files = {
            name: named
            for name, named in files.items()
            if 2 * sum(named.values()) > sum(self._files[name].values())
        }
        packed = {digest for named in files.values() for digest in named}
        stays = self._before | {digest for held in self._files.values() for digest in held}
        fresh = {d: t for d, t in large.items() if d in stays and d not in packed}
        if fresh:
            name = self._new_name()
            with write_checked(self.path.with_name(name), self.kind, self.key) as file:
                torch.save({d: t.detach().cpu().clone() for d, t in fresh.items()}, file)
            files[name] = {digest: sizes[digest] for digest in fresh}
            packed |= fresh.keys()
        whole = {name: self._files.get(name, named) for name, named in files.items()}
        self._files, self._before = whole, set(large)

        def short(tensor: Tensor) -> Any:
            digest = digests.get(id(tensor))
            return {MARK: digest} if digest in packed else tensor

        return {**_each(state, short), "packs": whole}

    def read(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Inverse of `write`.

        Raises:
            Damaged: if a pack is lost, or is not as it was written.
            BadFile: if it is of another run or version.
            OSError: if it cannot be read.
        """
        tensors: dict[str, Tensor] = {}
        for name in saved["packs"]:
            path = self.path.with_name(name)
            try:
                with read_checked(path, self.kind, self.key) as file:
                    tensors |= torch.load(file, weights_only=True, map_location="cpu")
            except FileNotFoundError as error:
                raise Damaged(f"{path} is lost") from error
        self._files = {name: dict(held) for name, held in saved["packs"].items()}

        def long(value: Mapping[str, Any]) -> Any:
            if value[MARK] not in tensors:
                raise Damaged(f"{self.path} is damaged: it names a tensor that no file holds")
            return tensors[value[MARK]]

        state = {key: value for key, value in saved.items() if key != "packs"}
        return _each(state, lambda tensor: tensor, long)

    def tidy(self) -> None:
        """Delete packs that the state written last does not name."""
        for path in _beside(self.path):
            if path.name not in self._files:
                path.unlink(missing_ok=True)

    def _new_name(self) -> str:
        numbers = [int(Path(name).stem.rpartition("-")[2]) for name in self._files]
        return f"{self.path.stem}-{max(numbers, default=0) + 1}{self.path.suffix}"


def remove(path: Path) -> None:
    """Delete a checkpoint and its packs."""
    for pack in _beside(path):
        pack.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _beside(path: Path) -> list[Path]:
    return list(path.parent.glob(f"{path.stem}-*{path.suffix}"))


def _named(held: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, int]:
    return {digest: size for digest, size in held.items() if digest in sizes}


def _look(tensor: Tensor) -> tuple[Any, ...] | None:
    """Place, version and a sum of the bits, which is quicker than a digest; None for small ones.

    Torch counts in the version what changes a tensor, but not changes through `.data` or NumPy, nor
    another tensor in the same place: the sum, in which each place has its own weight, is for those.
    """
    if tensor.layout != torch.strided or tensor.nbytes < SMALLEST:
        return None
    size = tensor.element_size()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(size)
    if bits is None or tensor.is_conj() or tensor.is_neg():
        return None
    values = tensor.detach().contiguous().flatten().view(bits)
    values = values.to(torch.int64) if tensor.nbytes % 8 else values.view(torch.int64)
    weights = torch.arange(1, 2 * len(values), 2, device=values.device)
    total = int((values.bitwise_xor(values >> 29) * weights).sum())
    return tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape, tensor.stride(), total


def _digest(tensor: Tensor) -> str:
    """Of type, shape and bytes."""
    name = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return hashlib.blake2b(content(tensor), digest_size=16, key=name[:64]).hexdigest()


def _each(value: Any, tensor: Callable[[Tensor], Any], mark: Callable[[Any], Any] = dict) -> Any:
    """A copy of nested dictionaries, lists and tuples with `tensor` and `mark` applied."""
    if isinstance(value, Tensor):
        return tensor(value)
    if isinstance(value, Mapping):
        if MARK in value:
            return mark(value)
        return {key: _each(one, tensor, mark) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_each(one, tensor, mark) for one in value]
        return items if isinstance(value, list) else type(value)(items)
    return value
