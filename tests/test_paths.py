"""`~` in settings: one place replaces it, for every setting there is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PACKAGES, ROOT, write_images
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, ListConfig, OmegaConf
from safetensors.torch import save_file
from test_streams import make

from driftline.core.build import build
from driftline.core.paths import add_resolver, expand_paths, results_folder
from driftline.runs.execute import complete
from driftline.streams.corruption_ops.frost import FROST_FILES

CONF = ROOT / "conf"
GROUPS = ("scenario", "strategy", "backbone", "logger")


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything below `node`."""
    keys = node if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        value, place = node[key], f"{path}.{key}" if path else str(key)
        if isinstance(value, DictConfig | ListConfig):
            yield from leaves(value, place)
        else:
            yield place, value


def quoted(value: str) -> str:
    """As Hydra wants a value that begins with `~`."""
    return f'"{value}"' if value.startswith("~") else value


def options() -> list[tuple[str, str]]:
    return [(g, p.stem) for g in GROUPS for p in sorted((CONF / g).glob("*.yaml"))]


@pytest.mark.one_in(10)
@pytest.mark.slow
@pytest.mark.parametrize(("group", "name"), options())
def test_a_home_folder_is_replaced_in_every_setting_of_every_option(configure, group, name):
    cfg = configure(f"{group}={name}")
    keys = [key for key, value in leaves(cfg) if value is None or isinstance(value, str)]
    assert "root" in keys and "data.root" in keys
    for key in keys:
        OmegaConf.update(cfg, key, f"~/{key}")
    expand_paths(cfg)
    for key in keys:
        assert OmegaConf.select(cfg, key) == str(Path.home() / key)


def test_nothing_but_a_leading_tilde_is_touched():
    given = {
        "relative": "images/x", "up": "../x", "inside": "a~b", "number": 3, "none": None,
        "missing": "???", "list": ["~/a", {"deep": "~/b"}], "from": "${list.0}/c",
        "elsewhere": "~nobody_of_that_name/x",
    }  # fmt: skip
    cfg = OmegaConf.create(given)
    before = OmegaConf.to_container(cfg)
    expand_paths(cfg)
    home = str(Path.home())
    want = {**before, "list": [f"{home}/a", {"deep": f"{home}/b"}]}  # type: ignore[dict-item]
    assert OmegaConf.to_container(cfg) == want and cfg["from"] == f"{home}/a/c"


def test_scripts_find_the_results_where_the_runs_put_them():
    home = Path.home()
    assert results_folder(["seed=0"]) == Path("results")
    assert results_folder([], Path("x")) == Path("x")
    for word in ("root=~/a", 'root="~/a"', "root='~/a'"):
        assert results_folder(["root=b", word, "data.root=c"]) == home / "a"


def test_no_module_of_the_framework_replaces_it_by_itself():
    """A second place would hide that the first one was forgotten."""
    found = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if "expanduser" in path.read_text()
    }
    assert found == {"core/paths.py", "streams/content.py"}  # the latter: environment variables


def test_the_folder_of_a_sweep_lies_where_root_says():
    add_resolver()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", ['root="~/results"'], return_hydra_config=True)
    assert str(cfg.hydra.sweep.dir).startswith(f"{Path.home()}/results/.sweeps/")


# ------------------------------------------------------------------------ used and hashed alike


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder with something for every setting that is a path."""
    folder = tmp_path / "home"
    names = [f"images/val/{w}/{i}.png" for w in ("n01440764", "n01443537") for i in range(3)]
    write_images(folder, names, 64)
    write_images(folder / "frost", list(FROST_FILES), 400)
    write_images(folder / "train", [n.removeprefix("images/val/") for n in names], 64, seed=1)
    (folder / "list.txt").write_text("n01440764/1\nn01443537/0\n")
    np.save(folder / "index.npy", np.asarray([1, 0]))
    side = np.linspace(90, 10, 6)
    grid = {f"n1_{a}_n2_{b}": np.minimum.outer(side, side).tolist()
            for a, b in (("frost", "fog"), ("fog", "frost"))}  # fmt: skip
    (folder / "grid.json").write_text(json.dumps({"accuracy": grid}))
    monkeypatch.setenv("HOME", str(folder))
    return folder


PATHS = {  # every setting that may hold a path, and one that fits
    "root": "~/results",
    "data.root": "~/images",
    "data.cache": "~/cache",
    "scenario.source_from": "~/train",
    "scenario.image_list": "~/list.txt",
    "scenario.index_file": "~/index.npy",
    "scenario.frost_dir": "~/frost",
    "scenario.classes": "~/names.txt",
    "scenario.calibration": "~/grid.json",
    "backbone.checkpoint": "~/weights.safetensors",
    "backbone.arch": "~/clip.json",
    "backbone.text": "~/texts.safetensors",
    "backbone.class_names": "~/names.txt",
    "backbone.templates": "~/templates.txt",
    "strategy.checkpoint": "~/weights.safetensors",
}
# Comments that speak of files or folders although the value is no path.
OTHERS = {
    "_target_", "checkpoint_key", "domains", "feature_cache_mb", "unknown_share", "wandb",
}  # fmt: skip


def test_every_path_of_the_configuration_is_in_the_table():
    """By what the comments beside the keys say: a new one has to be sorted in."""
    speaks = re.compile(r"\b(folder|file|path|photographs)\b|\.npy|\.json")
    found = set()
    for path in [CONF / "config.yaml", *(p for g in GROUPS for p in (CONF / g).rglob("*.yaml"))]:
        above = ""
        for line in path.read_text().splitlines():
            if line.startswith("#"):
                above += line
            elif match := re.match(r"\s*(\w+):([^#]*)(#.*)?$", line):
                says = above + (match.group(3) or "")
                if speaks.search(says) and match.group(1) != "defaults":
                    found.add(match.group(1))
                above = ""
            else:
                above = ""
    paths = {key.split(".")[-1] for key in PATHS}
    assert paths - {"root"} <= found
    assert found - paths == OTHERS


@pytest.mark.parametrize("scenario", ["imagenet_c", "ccc"])
def test_streams_with_home_and_with_whole_paths_are_one(configure, home, scenario):
    words = {"scenario.corruptions": "[frost,fog]", "scenario.images": "2"}
    if scenario == "imagenet_c":
        words |= {"scenario.corrupt": "on_the_fly", "scenario.probe_images": "1"}
    else:
        words |= {"scenario.speed": "1"}
    known = configure(f"scenario={scenario}")
    words |= {k: v for k, v in PATHS.items() if OmegaConf.select(known, k, default=0) != 0}
    words.pop("backbone.checkpoint", None)
    prints = []
    for short in (True, False):
        values = {k: v if short else v.replace("~", str(home)) for k, v in words.items()}
        cfg = configure(f"scenario={scenario}", *(f"{k}={quoted(v)}" for k, v in values.items()))
        stream = make(cfg)
        assert stream.source().images == 6
        assert sum(len(b.y) for s in stream.segments for b in s.batches()) > 0
        prints.append((stream.facts["fingerprint"], stream.source().fingerprint))
    assert prints[0] == prints[1] and list((home / "cache").iterdir())
    assert not Path("~").exists()


def test_weights_in_the_home_folder_are_loaded(configure, home):
    torch.manual_seed(0)
    words = ["strategy=vida", f"strategy.checkpoint={quoted('~/vida.pt')}", "backbone=test_vit"]
    net = build(configure("backbone=test_vit").backbone, at="backbone").net
    save_file(net.state_dict(), home / "weights.safetensors")
    cfg = complete(configure(*words, f"backbone.checkpoint={quoted('~/weights.safetensors')}"))
    assert cfg.strategy.checkpoint == str(home / "vida.pt")
    loaded = build(cfg.backbone, at="backbone").net
    for name, tensor in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
