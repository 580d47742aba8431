"""Files of weights as people have them, read without running code, and their fit to a network.

A file is recognised by its content, not by the end of its name. `torch.load` is called with
`weights_only=True` alone.
"""

from __future__ import annotations

import argparse
import pickle
import re
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError, suggest

# Left around a network by DataParallel, trainers and wrappers; removed where all names share one.
PREFIXES = ("module.", "model.", "net.", "network.", "backbone.", "encoder.")
# Left inside names by torch.compile, activation checkpoints and FSDP; never a layer of a network.
INSERTED = re.compile(
    r"(^|(?<=\.))(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.", re.ASCII
)
# First part of names where one state dict holds several copies of a network.
COPIES = frozenset([
    "student", "teacher", "ema", "ema_model", "model_ema", "module_ema", "net_ema", "target",
    "online_network", "target_network", "encoder_q", "encoder_k", "base_encoder",
    "momentum_encoder",
])  # fmt: skip
DEPTH = 3  # containers around the tensors
# What training scripts save beside tensors and what does nothing but hold values.
HARMLESS: list[Any] = [
    argparse.Namespace,
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "u1", "?")),
]


def reason_of(error: BaseException) -> str:
    """First line of an error message, cut to a readable length."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


# ---------------------------------------------------------------- reading


SETTING = "backbone.checkpoint"  # what names a file, for messages


def load_tensors(
    path: str | Path, key: str | None = None, *, setting: str = SETTING
) -> dict[str, Tensor]:
    """The named tensors of a `.safetensors` file or of a `torch.save` file.

    Nothing but tensors and plain containers is unpickled. A state dict inside other containers is
    taken out, and prefixes of wrappers are removed from the names.

    Args:
        key: which of several state dicts: its keys with dots between them, or what their names
            begin with where the copies stand in one (`teacher`).
        setting: that names the file, for messages.

    Raises:
        UserError: for a missing or damaged file, one of another kind (which is said), pickled
            objects, anything but tensors, and several state dicts where `key` does not choose.
    """
    file = Path(path)
    what = f"{setting}={str(path)!r}"
    if not file.is_file():
        kind = "is a folder; name a file in it" if file.is_dir() else "there is no such file"
        raise UserError(f"{what}: {kind}")
    if foreign := _foreign(file):
        raise UserError(f"{what} {foreign}")
    try:
        content: Any = _read(file)
    except pickle.UnpicklingError as error:
        raise UserError(f"{what} {_objects(file)}") from error
    except Exception as error:  # of any type: torch.load reads foreign bytes as opcodes
        raise UserError(
            f"{what} cannot be read, it may be incomplete ({reason_of(error)}). Download or copy "
            "it again"
        ) from error
    return _without_prefixes(_chosen(content, key, what, keyed=setting == SETTING))


def _read(file: Path) -> Any:
    if _is_safetensors(file):
        return safetensors.torch.load_file(file)
    # a stream: newer versions of torch.load go by the end of a name
    with file.open("rb") as stream, safe_globals(HARMLESS):
        return torch.load(stream, map_location="cpu", weights_only=True)


def _is_safetensors(file: Path) -> bool:
    with file.open("rb") as stream:
        start = stream.read(9)
    return (file.suffix == ".safetensors" and start[:2] != b"PK") or start[8:] == b"{"


def _foreign(file: Path) -> str | None:
    """What a file is if it is known to hold no weights in a form that can be read."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(512)
    text = start.lstrip().lower()
    again = "Download or copy it again"
    if not size:
        return f"is empty. {again}"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return (
            "is a web page: what answered the download was a page (of a login, a confirmation or "
            "an error). Open the address in a browser and save the file itself"
        )
    if text.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself: run `git lfs pull` in its repository"
    if text.startswith(b"{"):
        return (
            "is JSON text, such as the index or the settings of a network; name the file that "
            "holds the weights"
        )
    packed = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7-Zip"}
    for magic, kind in (packed | {b"Rar!": "RAR", b"\x28\xb5\x2f\xfd": "Zstandard"}).items():
        if start.startswith(magic):
            return f"is a {kind} archive: unpack it and name the file of weights in it"
    if start.startswith(b"\x93NUMPY"):
        return "is a NumPy array (.npy): save the weights by name, as .safetensors"
    if start.startswith(b"\x89HDF"):
        return "is an HDF5 file (Keras, TensorFlow), whose weights are laid out in another way"
    if start.startswith(b"PK"):
        return _of_zip(file, again)
    if size > 8 and start[8:9] == b"{":
        return _of_safetensors(start, size, again)
    if tarfile.is_tarfile(file):
        with tarfile.open(file) as archive:
            first = archive.next()
        name = f" ({first.name!r} ...)" if first else ""
        return f"is a tar archive{name}: unpack it and name the file of weights in it"
    return None


def _of_zip(file: Path, again: str) -> str | None:
    if not zipfile.is_zipfile(file):
        return f"begins as a torch.save file and its end is missing, so it is incomplete. {again}"
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    ends = [name.rpartition("/")[2] for name in names]
    if "constants.pkl" in ends:
        return (
            "is a TorchScript archive, which holds code; save its weights alone: "
            "torch.save(torch.jit.load(FILE).state_dict(), ...)"
        )
    if "data.pkl" in ends:
        return None
    if names and all(name.endswith(".npy") for name in names):
        return (
            f"is a NumPy archive (.npz, {len(names)} arrays), whose layout is that of another "
            "library; convert it and save the weights as .safetensors"
        )
    return f"is a zip archive ({names[:1]} ...): unpack it and name the file of weights in it"


def _of_safetensors(start: bytes, size: int, again: str) -> str | None:
    header = int.from_bytes(start[:8], "little")
    return f"is an incomplete safetensors file. {again}" if header + 8 > size else None


def _objects(file: Path) -> str:
    """What is said of a file with Python objects in it."""
    advice = (
        "Objects are not unpickled because that can run code; save the weights alone with "
        "torch.save(model.state_dict(), ...) or as .safetensors"
    )
    try:
        names = sorted(get_unsafe_globals_in_checkpoint(file))
    except Exception:  # a pickle of another library, or no pickle at all
        return f"holds Python objects other than tensors, or is not a torch.save file. {advice}"
    if any(re.match(r"torch\.nn\.modules\.|torchvision\.models|timm\.models", n) for n in names):
        return f"holds a whole network as Python objects ({', '.join(names[:3])} ...). {advice}"
    more = " ..." if len(names) > 3 else ""
    return f"holds Python objects other than tensors ({', '.join(names[:3])}{more}). {advice}"


# ---------------------------------------------------------------- one of several state dicts


def _chosen(content: Any, key: str | None, what: str, keyed: bool) -> dict[str, Tensor]:
    """The state dict of a file; the one that `key` names where there are several."""
    if not isinstance(content, Mapping) or not content:
        raise UserError(
            f"{what} holds no tensors by name but {type(content).__name__}; save model.state_dict()"
        )
    named = {
        f"{name}.{copy}" if name and copy else name or copy: tensors
        for name, whole in _state_dicts(content, "", DEPTH)
        for copy, tensors in _copies(whole)
    }
    if key is not None:
        return _of_key(named, key, what)
    if len(named) > 1:
        sizes = ", ".join(f"{name} ({len(t)} tensors)" for name, t in named.items())
        choose = (
            f"Say which one is meant: backbone.checkpoint_key={_likely(named)}"
            if keyed
            else "Save the one that is meant in a file of its own"
        )
        raise UserError(f"{what} holds {len(named)} sets of weights: {sizes}. {choose}")
    if named:
        return next(iter(named.values()))
    other = next(((k, v) for k, v in content.items() if not isinstance(v, Tensor)), None)
    if other is None or not any(isinstance(v, Tensor) for v in content.values()):
        raise UserError(
            f"{what} holds no tensors by name, but the keys {', '.join(map(str, [*content][:5]))}; "
            "save model.state_dict()"
        )
    raise UserError(
        f"{what}: {other[0]!r} is {type(other[1]).__name__}, not a tensor. The weights must be at "
        "the top level or together under one key"
    )


def _state_dicts(content: Any, name: str, depth: int) -> Iterable[tuple[str, dict[str, Tensor]]]:
    """All mappings from names to tensors in a container, with their place in it."""
    if not isinstance(content, Mapping) or not content:
        return
    if all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        yield name, dict(content)
    elif depth:
        for key, value in content.items():
            yield from _state_dicts(value, f"{name}.{key}" if name else str(key), depth - 1)


def _copies(tensors: dict[str, Tensor]) -> list[tuple[str, dict[str, Tensor]]]:
    """Parts of one state dict that are copies of a network by their names (student, teacher)."""
    plain = _without_prefixes(tensors)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in plain.items():
        first, _, rest = name.partition(".")
        parts.setdefault(first if first in COPIES and rest else "", {})[rest or name] = value
    if len(parts) < 2 and "" in parts:
        return [("", tensors)]
    others = {n: t for n, t in plain.items() if n.partition(".")[0] not in COPIES}
    firsts = {n.partition(".")[0] for n in others}
    named = {k: v for k, v in parts.items() if k}
    if len(firsts) == 1 and len(others) > 1:  # "model.x" beside "ema_model.x"
        named[(first := firsts.pop())] = {n.removeprefix(f"{first}."): t for n, t in others.items()}
    elif others:
        named["others"] = others
    return list(named.items())


def _of_key(named: dict[str, dict[str, Tensor]], key: str, what: str) -> dict[str, Tensor]:
    if key in named:
        return named[key]
    for tensors in named.values():
        for names in (tensors, _without_prefixes(tensors)):
            part = {
                n.removeprefix(f"{key}."): t for n, t in names.items() if n.startswith(f"{key}.")
            }
            if part:
                return part
    there = [name for name in named if name]
    known = (
        f"it holds {', '.join(there)}" if there else "it holds one set of weights, without a key"
    )
    raise UserError(
        f"backbone.checkpoint_key={key!r}: {what} has no such key{suggest(key, there)}; {known}"
    )


def _likely(named: Mapping[str, Any]) -> str:
    """The averaged weights of a file, which most papers report; else the first."""
    averaged = [n for n in named if "ema" in n.lower() or "teacher" in n.lower()]
    return (averaged or list(named))[0]


def _without_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wrappers put before them, in any order and repeated."""
    short = {INSERTED.sub("", name): value for name, value in tensors.items()}
    while prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in short)), None):
        short = {name.removeprefix(prefix): value for name, value in short.items()}
    return short


# ---------------------------------------------------------------- fit


def load_strict(net: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Copy `tensors` into `net`, cast to its types; every name and shape must agree.

    Raises:
        UserError: as for `require_fit`.
    """
    require_fit(net, net.state_dict(), tensors, path)
    net.load_state_dict(dict(tensors), strict=False)


def require_fit(
    net: nn.Module,
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    path: str | Path,
    *,
    setting: str = SETTING,
) -> None:
    """Compare names and shapes of a file with those that a network has.

    Only BatchNorm's `num_batches_tracked`, which old files lack, may be missing.

    Raises:
        UserError: naming the classes of both where the heads alone differ, else the first tensor
            that disagrees and the number of further ones.
    """
    wrong: dict[str, str] = {}
    for name, tensor in own.items():
        if name in tensors:
            want, have = tuple(tensor.shape), tuple(tensors[name].shape)
            if want != have:
                wrong[name] = f"{name!r} has shape {have} in the file, {want} in the network"
        elif not name.endswith("num_batches_tracked"):
            wrong[name] = f"{name!r} of the network is missing in the file"
    for name in tensors.keys() - own:
        wrong[name] = f"{name!r} of the file is unknown to the network"
    if not wrong:
        return
    what = f"{setting}={str(path)!r}"
    if (head := head_name(net)) and wrong.keys() <= {f"{head}.weight", f"{head}.bias"}:
        raise UserError(f"{what} {_other_head(own, tensors, head, wrong)}")
    first = next(iter(wrong.values()))
    more = f" (and {len(wrong) - 1} more mismatches)" if len(wrong) > 1 else ""
    raise UserError(
        f"{what} does not fit {type(net).__name__}: {first}{more}. It was saved from another "
        "architecture, or with another head"
        + (
            "; where the network is a part of what was saved, backbone.checkpoint_key says what "
            "its names begin with"
            if setting == SETTING
            else ""
        )
    )


def head_name(net: nn.Module) -> str | None:
    """Name of the linear layer that gives a network's scores."""
    head = Backbone(net).head
    return None if head is None else next(n for n, m in net.named_modules() if m is head)


def _other_head(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], head: str, wrong: Mapping[str, str]
) -> str:
    """What is said of a file that fits but for the head."""
    weight = tensors.get(f"{head}.weight")
    if weight is None:
        return (
            f"has no head ({wrong[f'{head}.weight']}), and the network one of "
            f"{len(own[f'{head}.weight'])} classes: set backbone.num_classes=0 to work without"
        )
    if len(weight) != len(own[f"{head}.weight"]):
        return (
            f"has a head for {len(weight)} classes, and the network one for "
            f"{len(own[f'{head}.weight'])} ({wrong[f'{head}.weight']}): set "
            f"backbone.num_classes={len(weight)}, or backbone.num_classes=0 to work without a head"
        )
    return f"has another head: {next(iter(wrong.values()))}"
