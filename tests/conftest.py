"""Fixtures: real data, tiny data sets in the released layouts, composed configurations."""

from __future__ import annotations

import gc
import io
import os
import shlex
import subprocess
import sys
import tempfile
import time
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import driftline.core.vision  # noqa: F401  # isort: skip

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from driftline.core import papers
from driftline.parts.optim import Optim

# Searches for cycles among what stays until the end took a quarter of the collection of tests.
gc.set_threshold(50_000, 50, 100)
papers.register()
yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is quicker
ROOT = Path(__file__).parents[1]
# Scripts that tests start import the packages of this checkout, whichever one is installed.
paths = [str(ROOT), os.environ.get("PYTHONPATH")]
os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
PACKAGES = ("analysis", "backbones", "cl", "core", "kernels", "parts", "runs", "streams", "tta")
TURNS = pytest.StashKey[dict[str, int]]()  # of tests marked `one_in`: cases so far
LEFT_OUT = pytest.StashKey[int]()  # tests marked `release` that were not asked for
HANG = 1800  # seconds after which a process counts as hung; nothing is measured by it


HEAVY = ("hydra.main", "safetensors.torch", "timm", "torch", "torchvision.transforms.v2")
servers: dict[
    tuple[str, ...], tuple[tempfile.TemporaryDirectory[str], subprocess.Popen[bytes]]
] = {}


def python(modules: tuple[str, ...] = HEAVY) -> str:
    """A program like `sys.executable`, with modules imported already: see forked.py."""
    if modules not in servers or servers[modules][1].poll() is not None:
        servers[modules] = _server(modules)
    return f"{servers[modules][0].name}/python"


def _server(
    modules: tuple[str, ...],
) -> tuple[tempfile.TemporaryDirectory[str], subprocess.Popen[bytes]]:
    folder = tempfile.TemporaryDirectory(prefix="driftline-tests-")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    script, path = str(ROOT / "tests" / "forked.py"), f"{folder.name}/socket"
    server = subprocess.Popen(
        [sys.executable, script, path, str(os.getpid()), *modules],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    words = shlex.join([sys.executable, "-IS", script, "--ask", path])
    program = Path(folder.name, "python")
    program.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    program.chmod(0o755)
    while not os.path.exists(path):
        assert server.poll() is None, "tests/forked.py has ended"
        time.sleep(0.02)
    return folder, server


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run tests marked `release`, too")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Of a test marked `one_in(n)` every n-th case is left unmarked; each test begins elsewhere."""
    mark = item.get_closest_marker("one_in")
    if mark is None:
        return
    name = f"{item.path.name}::{item.name.partition('[')[0]}"
    turn = item.config.stash.setdefault(TURNS, {})
    turn[name] = turn.get(name, crc32(name.encode())) + 1
    if turn[name] % mark.args[0]:
        item.add_marker(pytest.mark.release)


@pytest.hookimpl(trylast=True)  # after `-m`, so that the count is of what was asked for
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `release` are left out without `--all`, `-k`, `-m release` or their names."""
    asked = config.getoption("all") or config.getoption("keyword")
    if asked or "release" in config.getoption("markexpr"):
        return
    named = [Path(arg.split("::")[0]) for arg in config.args if "::" in arg]
    files = {(config.invocation_params.dir / path).resolve() for path in named}
    left_out = [
        item
        for item in items
        if item.get_closest_marker("release") and item.path.resolve() not in files
    ]
    if left_out:
        items[:] = [item for item in items if item not in set(left_out)]
        config.hook.pytest_deselected(items=left_out)
    config.stash[LEFT_OUT] = len(left_out)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Of pytest-xdist, whose workers collect, each all of the tests."""
    if count := getattr(node, "workeroutput", {}).get("left_out"):
        node.config.stash[LEFT_OUT] = count


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if count := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{count:,} tests marked `release` left out: --all runs them")


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["left_out"] = session.config.stash.get(LEFT_OUT, 0)
    for folder, server in servers.values():
        server.terminate()
        server.wait()
        folder.cleanup()


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder that REALDATA names."""
    folder = os.environ.get("REALDATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("REALDATA does not name a folder with the real images")
    return Path(folder)


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    """Two workers of the test runner share two cores; a test draws the same numbers each time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch) -> None:
    """Nothing waits for the disk: thousands of small runs would."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    """Digests of images are kept in a folder of the test, not of the user."""
    folder = tmp_path / "digest-cache"
    monkeypatch.setenv("DRIFTLINE_CACHE", str(folder))
    return folder


@pytest.fixture
def configure(tmp_path):
    """`configure("strategy=tent", ...)` composes a configuration with results in a fresh folder."""

    def make(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return compose("config", [f"root={tmp_path / 'results'}", *overrides])

    return make


@pytest.fixture
def gradients_stay(monkeypatch) -> None:
    """The gradients of a step are still there after it."""
    update = Optim.update

    def keep(self: Optim, optimizer: torch.optim.Optimizer, again: Any = None) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(optimizer, "zero_grad", lambda: None)
            update(self, optimizer, again)

    monkeypatch.setattr(Optim, "update", keep)


def write_images(folder: Path, names: list[str], size: int = 16, seed: int = 0) -> None:
    """Small random PNG or JPEG files."""
    rng = np.random.default_rng(seed)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def image_folder_root(tmp_path) -> Path:
    """train/ and test/ class folders: 4 classes, 6 and 4 images each, 16 px."""
    root = tmp_path / "folder"
    for split, count in (("train", 6), ("test", 4)):
        names = [f"{split}/class{c}/{i}.png" for c in range(4) for i in range(count)]
        write_images(root, names, seed=len(split))
    return root


@pytest.fixture
def cifar10_c_root(tmp_path) -> Path:
    """CIFAR-10-C in its released layout, 10 images a severity, two corruptions."""
    root = tmp_path / "data"
    folder = root / "CIFAR-10-C"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("gaussian_noise", "fog"):
        np.save(folder / f"{name}.npy", rng.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8))
    np.save(folder / "labels.npy", np.tile(np.arange(10), 5))
    return root


@pytest.fixture
def imagenet_c_root(tmp_path) -> Path:
    """ImageNet-C in its released layout: two corruptions, severity 5, three classes, 12 images."""
    root = tmp_path / "imagenet"
    wnids = ("n01440764", "n01443537", "n01484850")
    for corruption in ("gaussian_noise", "fog"):
        names = [
            f"ImageNet-C/{corruption}/5/{w}/ILSVRC2012_val_{i:08d}.JPEG"
            for w in wnids
            for i in range(4)
        ]
        write_images(root, names, size=32, seed=len(corruption))
    return root


@pytest.fixture
def imagenet_clean_root(tmp_path) -> Path:
    """Twelve clean images with `labels.csv`, 40 px."""
    root = tmp_path / "clean"
    names = [f"image{i:02d}.png" for i in range(12)]
    write_images(root, names, size=40)
    rows = "".join(f"{n},{i}\n" for i, n in enumerate(names))
    (root / "labels.csv").write_text("filename,class_index\n" + rows)
    return root


def strategy_node(name: str, **options: Any) -> dict[str, Any]:
    """conf/strategy/NAME.yaml as plain values, with what its defaults list names filled in.

    Args:
        options: of the strategy or of a node in it (`lr` of `optim`, `rank` of an adapter);
            `adapter` names a file of its group.
    """
    node = plain_yaml(ROOT / "conf" / "strategy" / f"{name}.yaml")
    for entry in node.pop("defaults", []):
        if isinstance(entry, dict):
            ((key, choice),) = entry.items()
            group, _, option = key.strip("/").partition("@")
            if not isinstance(options.get(option), dict):
                choice = options.pop(option, choice)
            plain = choice if choice is None else _option(group, choice)
            both = plain is not None and node.get(option) is not None
            node[option] = merged(plain, node[option]) if both else plain or node.get(option)
        elif entry != "_self_":
            chosen = {k: options.pop(k) for k in ("adapter",) if isinstance(options.get(k), str)}
            node = merged(strategy_node(entry, **chosen), node)
    return with_options(node, **options)


def with_options(node: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The node with options of its own or of a node in it; dictionaries are merged."""
    node = deepcopy(node)
    parts = [part for part in node.values() if isinstance(part, dict)]
    parts += [part for outer in parts for part in outer.values() if isinstance(part, dict)]
    for key, value in options.items():
        places = [part for part in (node, *parts) if key in part]
        assert places, f"{node['name']} has no option {key}"
        nested = isinstance(value, dict) and isinstance(places[0][key], dict) and key != "options"
        if nested and value.get("_target_") not in (None, places[0][key].get("_target_")):
            nested = False  # another method or part, with options of its own
        places[0][key] = merged(places[0][key], value) if nested else value
    return node


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested settings of `below` with those of `above` laid over them, as Hydra does it."""
    both = dict(below)
    for key, value in above.items():
        nested = isinstance(value, dict) and isinstance(both.get(key), dict)
        both[key] = merged(both[key], value) if nested else value
    return both


def rule_node(name: str, **options: Any) -> dict[str, Any]:
    """The node in conf/around/NAME.yaml as plain values, with some options changed."""
    return _option("around", name)[name] | options


def _option(group: str, choice: str) -> dict[str, Any]:
    if group == "strategy":  # has options by default itself
        return strategy_node(choice)
    return plain_yaml(ROOT / "conf" / group / f"{choice}.yaml")


def scenario_node(name: str, **options: Any) -> dict[str, Any]:
    """The options of conf/scenario/NAME.yaml, which has no defaults list, with some changed."""
    node = plain_yaml(ROOT / "conf" / "scenario" / f"{name}.yaml")
    for key in ("name", "real", "embedded", "backbones"):
        node.pop(key, None)
    return node | {"label": name.rpartition("/")[2]} | options


def plain_yaml(path: Path) -> dict[str, Any]:
    """A file of conf/ as plain values of the caller's own."""
    return deepcopy(_plain_yaml(path))


@cache
def _plain_yaml(path: Path) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(OmegaConf.load(path))
    return plain


def copied(value: Any) -> Any:
    """A copy through a file, as a checkpoint goes."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def equal(a: Any, b: Any) -> bool:
    """Bitwise equality of nested tensors and plain values."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)
