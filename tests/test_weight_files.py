"""Files of weights as people have them: wrapped, nested, several in one, and no weights at all."""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from driftline.backbones.backbone import weights_hash
from driftline.backbones.checkpoints import load_strict, load_tensors
from driftline.backbones.load import timm_backbone
from driftline.core.errors import UserError

PLAIN = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.arange(4)}


def named(prefix: str, shift: float = 0) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value + shift for name, value in PLAIN.items()}


def saved(content: Any, tmp_path: Path) -> Path:
    torch.save(content, tmp_path / "file.pt")
    return tmp_path / "file.pt"


def refusal(file: Path, key: str | None = None) -> str:
    with pytest.raises(UserError) as error:
        load_tensors(file, key)
    text = str(error.value)
    assert "\n" not in text and "backbone.checkpoint" in text
    return text


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "model.", "_orig_mod.", "module.model.", "model.module.", "module.module.",
     "_orig_mod.module.net.", "net.backbone.", "encoder.module._orig_mod.", "network._orig_mod."],
)  # fmt: skip
def test_prefixes_of_wrappers_go_in_any_order(prefix: str, tmp_path: Path) -> None:
    tensors = load_tensors(saved(named(prefix), tmp_path))
    assert weights_hash(tensors) == weights_hash(PLAIN)


def test_what_compilers_put_inside_names_goes_and_real_layers_stay(tmp_path: Path) -> None:
    inside = {
        "model.blocks.0._orig_mod.weight": torch.ones(1),
        "model.blocks.1._checkpoint_wrapped_module.weight": torch.ones(1),
        "model.encoder.weight": torch.ones(1),
    }
    tensors = load_tensors(saved(inside, tmp_path))
    assert set(tensors) == {"blocks.0.weight", "blocks.1.weight", "encoder.weight"}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: {"epoch": 3, "state_dict": t, "optimizer": {"state": {}, "param_groups": [1]}},
        lambda t: {"model_state_dict": t, "args": argparse.Namespace(lr=0.1)},
        lambda t: {"net": t, "acc": np.float64(93.1), "scheduler": {"last_epoch": 9}},
        lambda t: {"model": {"state_dict": t}, "hyper_parameters": {"dim": 3}},
        lambda t: {"anything": t},
    ],
)
def test_the_only_set_of_weights_is_found_wherever_it_stands(wrap: Any, tmp_path: Path) -> None:
    tensors = load_tensors(saved(wrap(named("module.")), tmp_path))
    assert weights_hash(tensors) == weights_hash(PLAIN)


def test_the_content_decides_and_not_the_end_of_the_name(tmp_path: Path) -> None:
    safetensors.torch.save_file(PLAIN, tmp_path / "st.pth")
    torch.save(PLAIN, tmp_path / "torch.safetensors")
    torch.save(PLAIN, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    for name in ("st.pth", "torch.safetensors", "old.pth.tar"):
        assert weights_hash(load_tensors(tmp_path / name)) == weights_hash(PLAIN)


# ---------------------------------------------------------------- several in one file


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ({"state_dict": named(""), "state_dict_ema": named("module.", 1)},
         ("state_dict", "state_dict_ema")),
        ({"model": named(""), "model_ema": named("", 1), "epoch": 1}, ("model", "model_ema")),
        ({"model": named("module."), "ema_state_dict": named("", 1)}, ("model", "ema_state_dict")),
        ({"student": named("module."), "teacher": named("", 1)}, ("student", "teacher")),
        ({"state": {"model": named(""), "ema": named("", 1)}}, ("state.model", "state.ema")),
        (named("student.") | named("teacher.", 1), ("student", "teacher")),
        ({"state_dict": named("model.") | named("ema_model.", 1)},
         ("state_dict.model", "state_dict.ema_model")),
    ],
)  # fmt: skip
def test_of_several_sets_one_must_be_chosen(
    content: Any, keys: tuple[str, str], tmp_path: Path
) -> None:
    file = saved(content, tmp_path)
    text = refusal(file)
    assert all(f"{key} (2 tensors)" in text for key in keys)
    assert f"backbone.checkpoint_key={keys[1]}" in text  # averaged weights are proposed
    for shift, key in enumerate(keys):
        chosen = load_tensors(file, key)
        assert {k: v.tolist() for k, v in chosen.items()} == {
            k: v.tolist() for k, v in named("", shift).items()
        }
    assert "no such key" in refusal(file, "weights") and keys[0] in refusal(file, "weights")


def test_a_part_is_taken_out_by_what_its_names_begin_with(tmp_path: Path) -> None:
    file = saved({"state_dict": named("model.features.") | {"loss.scale": torch.ones(1)}}, tmp_path)
    assert weights_hash(load_tensors(file, "model.features")) == weights_hash(PLAIN)
    assert set(load_tensors(file, "model")) == {"features.a.weight", "features.b.bias"}


def test_the_key_of_another_method_s_file_is_no_setting(tmp_path: Path) -> None:
    file = saved({"model": named(""), "ema": named("", 1)}, tmp_path)
    with pytest.raises(UserError) as error:
        load_tensors(file, setting="strategy.checkpoint")
    assert str(error.value).startswith("strategy.checkpoint=")
    assert "checkpoint_key" not in str(error.value)


def test_a_key_without_a_file_is_refused() -> None:
    options: Any = {"name": "x", "tag": "test_vit.r160_in1k", "normalize": "none", "classes": None,
                    "num_classes": None, "input_size": None}  # fmt: skip
    with pytest.raises(UserError, match="checkpoint_key='ema'.*checkpoint=random names none"):
        timm_backbone(checkpoint="random", checkpoint_key="ema", **options)


# ---------------------------------------------------------------- what is no file of weights


class Evil:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def _zip(names: list[str]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return out.getvalue()


def _tar(mode: Any) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        info = tarfile.TarInfo("model/weights.bin")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    return out.getvalue()


def _npz() -> bytes:
    out = io.BytesIO()
    np.savez(out, a=np.zeros(2), b=np.zeros(3))
    return out.getvalue()


def _torch(content: Any) -> bytes:
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


FOREIGN = {
    "web page": b"\n<!DOCTYPE html><html><body>Sign in</body></html>",
    "is empty": b"",
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n",
    "tar archive.*weights.bin": _tar("w"),
    "gzip archive": _tar("w:gz"),
    "zip archive.*readme.txt": _zip(["readme.txt"]),
    "TorchScript": _zip(["m/data.pkl", "m/constants.pkl", "m/code/__torch__.py"]),
    r"\.npz, 2 arrays": _npz(),
    "its end is missing": _torch(PLAIN)[:700],
    "incomplete safetensors": safetensors.torch.save(PLAIN)[:60],
    "JSON text": json.dumps({"weight_map": {}}).encode(),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(600),
    r"\.npy": b"\x93NUMPY" + bytes(600),
    "a whole network.*Linear.*model.state_dict": _torch(nn.Linear(2, 2)),
    "no tensors by name": _torch(torch.ones(1)),
    "'epoch' is int": _torch({"a": torch.ones(1), "epoch": 3}),
    "keys epoch, best": _torch({"epoch": 3, "best": 0.1}),
}


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize("said", FOREIGN)
def test_a_file_is_said_to_be_what_it_is(said: str, ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"file{ending}"
    file.write_bytes(FOREIGN[said])
    with pytest.raises(UserError, match=said):
        load_tensors(file)
    refusal(file)


def test_folders_and_absent_files(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)
    assert "there is no such file" in refusal(tmp_path / "absent.pt")


def test_nothing_is_run(tmp_path: Path) -> None:
    file = saved({"w": Evil(tmp_path / "ran")}, tmp_path)
    assert "Python objects other than tensors" in refusal(file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("first", range(0, 256, 5))
def test_no_foreign_file_ends_in_a_stack_trace(first: int, tmp_path: Path) -> None:
    """torch.load takes the bytes of any file as pickle opcodes and fails in as many ways."""
    random = np.random.default_rng(first)
    for name in ("file.pt", "file.safetensors"):
        for length in (0, 1, 20, 300):
            (tmp_path / name).write_bytes(bytes([first]) + random.bytes(length))
            refusal(tmp_path / name)
    (tmp_path / "text.pt").write_text("root:x:0:0:root:/root:/bin/bash\n" * 5)
    refusal(tmp_path / "text.pt")


# ---------------------------------------------------------------- fit


def test_what_does_not_fit_names_classes_or_a_tensor() -> None:
    def net(classes: int) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, classes))

    load_strict(net(4), net(4).state_dict(), "x.pt")
    with pytest.raises(UserError, match="head for 7 classes, .* one for 4 .*num_classes=7"):
        load_strict(net(4), net(7).state_dict(), "x.pt")
    body = {k: v for k, v in net(4).state_dict().items() if k.startswith("0.")}
    with pytest.raises(UserError, match="has no head.*of 4 classes.*num_classes=0"):
        load_strict(net(4), body, "x.pt")
    extra = net(4).state_dict() | {"loss.scale": torch.ones(1)}
    with pytest.raises(UserError, match="'loss.scale' of the file is unknown.*checkpoint_key"):
        load_strict(net(4), extra, "x.pt")
