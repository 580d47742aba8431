"""`import driftline` from anywhere, a strategy around any network, own packages, the wheel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import warnings
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from conftest import HANG, PACKAGES, ROOT, equal, python, strategy_node
from torch import nn

import driftline
from driftline.backbones.backbone import Backbone
from driftline.core.build import build, locate
from driftline.core.errors import UserError
from driftline.core.strategy import CLStrategy
from driftline.core.stream import Batch, Task

STRATEGIES = sorted(path.stem for path in (ROOT / "conf" / "strategy").glob("*.yaml"))
SMALL = ["scenario.corruptions=[fog]", "scenario.images=8", "scenario.batch_size=4"]
SMALL += ["scenario.probe_images=4", "scenario.clean_images=4"]


def network(name: str = "test_vit") -> torch.nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 32} if name == "test_vit" else {}
    return timm.create_model(name, num_classes=10, **size)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_is_made_around_a_plain_network_as_its_file_says(name):
    node = strategy_node(name)
    kind = locate(node["_target_"])
    wants_vit = issubclass(kind, CLStrategy) or kind.prefers == "vit"
    wants_vit = wants_vit and "batch_norm" not in kind.needs
    net = "test_vit" if wants_vit else "test_resnet"
    method = driftline.make(name, network(net), seed=3)
    bare = Backbone(network(net), input_size=method.backbone.input_size)
    want = build(node, at="strategy", backbone=bare, seed=3, num_classes=10)
    assert type(method) is type(want) and equal(method.snapshot(), want.snapshot())
    assert isinstance(method, CLStrategy) or method.preparation() or method.reset() is None


def bare_network() -> torch.nn.Module:
    """No transformer, no normalisation layer, nothing of timm's."""
    pixels = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*pixels, nn.Flatten(), nn.Linear(8, 10))


def places(node: dict, above: str = "") -> set[str]:
    """Dotted names of all settings in a node."""
    inner = [places(v, f"{above}{k}.") for k, v in node.items() if isinstance(v, dict)]
    return {f"{above}{k}" for k in node}.union(*inner)


def one_class(size: int) -> Task:
    """A first task of two images of one class."""
    y = torch.zeros(2, dtype=torch.int64)
    batch = Batch(torch.rand(2, 3, size, size), y, torch.arange(2), y)
    batches = lambda *_, **__: iter([batch])  # noqa: E731
    return Task(0, "one class", range(1), 1, batches, batches, batches)


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_a_method_says_of_an_odd_network_or_task_is_about_its_own_settings(name):
    node = strategy_node(name)
    learns_tasks = issubclass(locate(node["_target_"]), CLStrategy)
    said = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for net in (bare_network(), network())[: 1 + learns_tasks]:
            try:
                live = {"backbone": Backbone(net), "seed": 0, "num_classes": 10}
                method = build(node, at="strategy", **live)
                if learns_tasks:
                    method.begin_task(one_class(32))
                elif method.preparation() is None and not method.replays_source(node):
                    method.begin_stream()
                    assert method.adapt(torch.rand(2, 3, 32, 32)).shape == (2, 10)
            except UserError as error:
                said.append(str(error))
    said += [str(w.message) for w in caught if "strategy." in str(w.message)]
    for text in said:
        if text.startswith("strategy=") and "inner" not in node:
            assert re.match(rf"strategy={name}\b", text), text
        of_others = r"(?<=strategy=)\w+ strategy\.\S+"
        for key in re.findall(r"strategy\.([a-z_.]*[a-z_])", re.sub(of_others, "", text)):
            assert key in places(node), text


def test_settings_adapters_and_normalisation_are_options_of_make():
    x = torch.rand(2, 3, 32, 32)
    plain = driftline.make("source", network()).predict(x)
    normal = driftline.make("source", network(), mean=[0.5] * 3, std=[0.25] * 3).predict(x)
    assert not torch.equal(plain, normal)
    method = driftline.make("ease", network(), adapter="lora", rank=3)
    assert method.adapter.kind.keywords["rank"] == 3
    assert "lora" in method.adapter.kind.func.__module__
    method = driftline.make("finetune", network(), num_classes=4, lr=0.5)
    assert method.num_classes == 4 and method.optim.lr == 0.5
    dotted = {"warmup.optim.lr": 0.25, "optim.rates.adapters": 0.125}
    method = driftline.make("vida", network(), lr=0.5, **dotted)
    assert (method.optim.lr, method.optim.rate("adapters")) == (0.5, 0.125)
    assert method.warmup.optim.lr == 0.25


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tnt", {}, "did you mean 'tent'"),
        ("tent", {"lrr": 1.0}, "strategy=tent has no setting 'lrr'; did you mean 'lr'"),
        ("tent", {"lr": -1.0}, "strategy.optim.lr must be a finite number, at least 0"),
        ("cotta", {"adapter": "lora"}, "has no adapters; these have"),
        ("ease", {"adapter": "lorra"}, "lorra"),
        ("deyo", {"patches": 10**9}, "strategy.patches must be .* at most 16,384, got 1000000000"),
        ("recap", {"patches": 10**9}, "strategy.patches must be .* at most 16,384, got 1000000000"),
        ("moram", {"top_k": 1}, "strategy.top_k must be a whole number, at least 2 and at most"),
        ("codyra", {"levels": 1}, "strategy.levels must be a whole number, at least 2 and at most"),
    ],
)
def test_a_mistake_is_one_clear_error(name, options, message):
    with pytest.raises(UserError, match=message):
        driftline.make(name, network(), **options)


# One of each sort; the contract puts rules around the others.
SORTS = ("tent", "foa", "vida", "lsa", "rmt", "finetune", "ease", "er", "simplecil", "l2p")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.release] * (n not in SORTS)) for n in STRATEGIES],
)
def test_rules_go_around_methods_of_adaptation_alone(name):
    kind = locate(strategy_node(name)["_target_"])
    net = network("test_vit" if getattr(kind, "prefers", "vit") == "vit" else "test_resnet")
    if issubclass(kind, CLStrategy):
        with pytest.raises(UserError, match=f"strategy={name} learns tasks"):
            driftline.make(name, net, around="window")
    else:
        method = driftline.make(name, net, around=["reset_every", "record_nan"])
        assert type(method.method) is kind and type(method).__name__ == "RecordNan"


def test_settings_of_rules_are_dotted():
    method = driftline.make(
        "tent", network("test_resnet"), around="reset_every", **{"around.reset_every.every": 7}
    )
    assert method.made_of["around"]["reset_every"]["every"] == 7
    for rules, key, said in [
        ("reset_every", "around.reset_every.evry", "did you mean 'around.reset_every.every'"),
        ([], "around.reset_every.every", r"no such setting with around=\[\]"),
    ]:
        with pytest.raises(UserError, match=said):
            driftline.make("tent", network("test_resnet"), around=rules, **{key: 7})


def test_a_run_gives_its_summary_and_is_found_again(tmp_path):
    words = ["strategy=bn_adapt", "scenario=cifar10_c", *SMALL, f"root={tmp_path}"]
    summary = driftline.run(words)
    assert summary["metrics"]["err_mean"] >= 0 and summary["run"]["strategy"] == "bn_adapt"
    frame = driftline.load_runs(tmp_path)
    assert set(frame.strategy) == {"source", "bn_adapt"} and set(frame.state) == {"done"}
    with pytest.raises(UserError, match="did you mean"):
        driftline.run(["strategy=tnet"])
    with pytest.raises(UserError, match="no such setting"):
        driftline.run(["strategy=tent", "strategy.lrr=1"])
    with pytest.raises(UserError, match=r"sweep over adapter, scenario\.order_seed: add -m, or"):
        driftline.run(["experiment=grid/adapters", "strategy=ease"])


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(ROOT, id="checkout"),
        pytest.param(ROOT / "driftline", id="folder"),
    ],
)
@pytest.mark.release
def test_a_link_on_pythonpath_is_the_package(tmp_path, place):
    (tmp_path / "driftline").symlink_to(place)
    code = """
        import sys, driftline, driftline.core.paths
        assert 'torch' not in sys.modules and driftline.core.paths.CONF.is_dir()
        import driftline.runs.library as library
        assert driftline.make is library.make and driftline.run is library.run
    """
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=HANG)


# ------------------------------------------------------------------------------ own packages

METHOD = """
    from driftline.tta.tent import Tent

    class Mine(Tent):
        pass
"""
DATA = """
    import torch
    from driftline.core.stream import Batch, Skipped, Task, TaskStream

    def stream(*, label: str, per_class: int) -> TaskStream:
        def batches(task, epoch=0, start=0):
            y = torch.arange(2 * per_class) % 2 + 2 * task
            x = torch.rand(len(y), 3, 32, 32, generator=torch.Generator().manual_seed(task))
            yield Batch(x, y, torch.arange(len(y)), torch.zeros_like(y))

        def task(i):
            one = lambda: batches(i)
            return Task(i, f"task{i}", range(2 * i, 2 * i + 2), 1,
                        lambda epoch, start=0: batches(i, epoch, start), one, one)

        return TaskStream(label, 4, [task(0), task(1)], {"fingerprint": "1"}, Skipped())
"""
SCENARIO = """
    _target_: mypackage.data.stream
    name: my_images
    label: null
    per_class: 2
    backbones: {real: test_vit, embedded: null}
"""


@pytest.fixture
def own_package(tmp_path) -> Path:
    """A method and a scenario outside the project, with their options in conf/."""
    files = {
        "mypackage/__init__.py": "",
        "mypackage/mine.py": METHOD,
        "mypackage/data.py": DATA,
        "conf/scenario/mine.yaml": SCENARIO,
    }
    tent = (ROOT / "conf" / "strategy" / "tent.yaml").read_text()
    tent = tent.replace("driftline.tta.tent.Tent", "mypackage.mine.Mine")
    files["conf/strategy/mine.yaml"] = tent.replace("name: tent", "name: mine")
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return tmp_path


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    line = [python(), str(ROOT / "run.py"), *words, f"root={folder / 'results'}"]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=HANG)


@pytest.mark.slow
def test_a_method_and_a_data_set_of_another_package_run(own_package):
    done = command(
        own_package, "--config-dir", "conf", "strategy=mine", "scenario=cifar10_c", *SMALL
    )
    assert done.returncode == 0, done.stderr
    code = next((own_package / "results").rglob("mine/**/environment.json")).read_text()
    assert "mypackage/mine.py" in code
    words = ["--config-dir", "conf", "scenario=mine", "strategy=finetune", "strategy.epochs=1"]
    done = command(own_package, *words)
    assert done.returncode == 0 and "my_images | " in done.stdout, done.stderr
    assert "embedded" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config-dir", "cnf", "strategy=mine"], "--config-dir cnf: there is no such folder"),
        (["--config-dir", "conf", "strategy=min"], "did you mean 'mine'"),
        (
            ["--config-dir=conf", "strategy=mine", "strategy._target_=mypackage.mine.M"],
            "has no 'M'",
        ),
        (["-cd", "conf", "strategy=mine", "strategy._target_=os.system"], "makes no strategy"),
    ],
)
def test_mistakes_in_own_packages_are_named(own_package, words, message):
    done = command(own_package, *words)
    assert done.returncode == 2 and message in done.stderr
    assert not (own_package / "results").exists()


# ------------------------------------------------------------------------------ the wheel


PROLOGUE = f"""
import sys
from copy import deepcopy

sys.path.insert(0, sys.argv[1])
import timm, torch, torchvision
from torch.utils.data import DataLoader, TensorDataset

import driftline

torch.set_num_threads(1)
torch.manual_seed(0)
net = torchvision.models.resnet18(num_classes=10)
network = lambda: deepcopy(net)
images = torch.rand(4, 3, 32, 32)
source = TensorDataset(torch.rand(8, 3, 32, 32), torch.arange(8))
loader = DataLoader(source, 4)
train_a, test_a, train_b, test_b = (
    TensorDataset(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]) + first)
    for first in (0, 0, 2, 2)
)
SMALL = {SMALL}
words = ["strategy=tent", "scenario=cifar10_c", "checkpoint.model=true", *SMALL]
folder = driftline.run(words)["run"]["folder"]
"""
EPILOGUE = """
places = [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "driftline"]
outside = [place for place in places if place and not place.startswith(sys.argv[1])]
assert len(places) > 50 and not outside, outside
"""


def library_page() -> str:
    """Every Python block of docs/library.md, one after the other, on random images."""
    text = (ROOT / "docs" / "library.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) > 8
    code = "\n".join([PROLOGUE, *blocks, EPILOGUE])
    return code.replace('"seed=1"]', '"seed=1", *SMALL]')


@pytest.mark.release
@pytest.mark.slow
def test_a_wheel_holds_what_runs_and_the_page_about_the_library_need(tmp_path):
    pytest.importorskip("setuptools", minversion="77.0.3")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    copy = tmp_path / "checkout"  # setuptools leaves a build folder behind
    for name in names.split("\0"):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    build_wheel = (
        "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    )
    line = [sys.executable, "-c", build_wheel, str(tmp_path)]
    subprocess.run(line, cwd=copy, check=True, capture_output=True, timeout=HANG)
    (wheel,) = tmp_path.glob("driftline-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {n for n in archive.namelist() if n.startswith("driftline/")}
        archive.extractall(tmp_path / "installed")
    kinds = (".py", ".yaml", ".safetensors", ".json", ".txt")
    wanted = {
        f"driftline/{name}"
        for name in names.split("\0")
        if name.startswith(tuple(f"{folder}/" for folder in (*PACKAGES, "conf", "papers")))
        and name.endswith(kinds)
        and (ROOT / name).is_file()
    }
    assert wanted <= inside, sorted(wanted - inside)[:5]
    assert "driftline/docs/methods.yaml" in inside  # what --help says of strategies
    assert not {n for n in inside if n.split("/")[1] in ("tests", "scripts", "results", "run.py")}
    env = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    words = ["strategy=tent", "scenario=cifar10_c", "checkpoint.model=true", *SMALL]
    code = "import sys; from driftline.runs.command import main; sys.exit(main())"
    done = subprocess.run(
        [python(), "-c", code, *words],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=HANG,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "results").rglob("summary.json"))
    subprocess.run(  # isolated: neither PYTHONPATH nor the current folder is looked into
        [sys.executable, "-I", "-c", library_page(), str(tmp_path / "installed")],
        cwd=tmp_path, env={**env, "OMP_NUM_THREADS": "1"}, check=True, timeout=HANG,
    )  # fmt: skip
