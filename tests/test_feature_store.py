"""runtime.feature_store: answers of networks that never learn, across runs and processes."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import test_contract as contract
import timm
import torch
from conftest import equal
from omegaconf import OmegaConf
from test_runs import SMALL, records, settings

from driftline.analysis.runs import load_runs, select
from driftline.backbones.backbone import Backbone
from driftline.backbones.feature_store import FeatureStore, arithmetic_of
from driftline.core.build import locate, nodes
from driftline.core.errors import UserError
from driftline.runs.execute import run_experiment

CPU = torch.device("cpu")
X = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network(folder: Path, kind: str = "test_resnet", limit: float = 1) -> Backbone:
    torch.manual_seed(0)
    net = Backbone(timm.create_model(kind, num_classes=10), input_size=32).eval()
    net.store = FeatureStore(folder, limit, arithmetic_of(CPU))
    return net


@pytest.mark.parametrize("kind", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_one_pass_gives_features_and_scores_and_no_other_comes(tmp_path, kind):
    net = network(tmp_path, kind)
    with torch.no_grad():
        want = net.features(X), net.logits(X)
    net.passes.forward = 0
    assert torch.equal(net.frozen_logits(X), want[1])
    assert equal(list(net.frozen_features_and_logits(X)), list(want))
    assert torch.equal(network(tmp_path, kind).frozen_features(X), want[0])
    assert (net.passes.forward, net.passes.recalled) == (4, 4)


class Scaled(torch.nn.Module):
    """A network whose head does not read what its last linear layer was given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, 10)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))

    def forward_head(self, z: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return z if pre_logits else self.fc(2 * z)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def test_features_that_the_head_does_not_read_take_a_pass_of_their_own(tmp_path):
    net = Backbone(Scaled()).eval()
    net.store = FeatureStore(tmp_path, 1, "scaled")
    assert torch.equal(net.frozen_logits(X), net.net(X))
    assert torch.equal(net.frozen_features(X), X.mean((2, 3)))
    assert (net.passes.forward, net.passes.recalled) == (8, 0)
    assert torch.equal(net.frozen_features(X), X.mean((2, 3))) and net.passes.recalled == 4


def test_a_bit_of_the_images_another_network_and_a_copy_find_nothing(tmp_path):
    net = network(tmp_path)
    net.frozen_features(X)
    other = X.clone()
    other[0, 0, 0, 0] = torch.nextafter(other[0, 0, 0, 0], torch.tensor(2.0))
    net.frozen_features(other)
    net.frozen_features(X[:3])
    assert net.passes.recalled == 0
    elsewhere = network(tmp_path)
    with torch.no_grad():
        next(elsewhere.parameters()).mul_(1 + 2**-20)
    elsewhere.frozen_features(X)
    assert elsewhere.passes.recalled == 0
    assert deepcopy(net).store is None


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "folder"])
def test_a_damaged_entry_is_made_again(tmp_path, damage):
    net = network(tmp_path)
    want = net.frozen_features(X)
    (path,) = tmp_path.rglob("*.npz")
    content = bytearray(path.read_bytes())
    if damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "bit":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: 50 if damage == "cut" else 0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(net.frozen_features(X), want)
    assert net.passes.recalled == 0 and net.passes.forward == 8
    assert [str(w.message)[:28] for w in caught] == ["no more features go to runtim"[:28]] * (
        damage == "folder"
    )
    assert torch.equal(net.frozen_features(X), want)
    assert net.passes.recalled == 4 * (damage != "folder")


def test_the_folder_keeps_to_its_limit_and_drops_what_is_longest_unused(tmp_path):
    net = network(tmp_path)
    batches = [X + i for i in range(8)]
    net.frozen_features(batches[0])
    size = sum(p.stat().st_size for p in tmp_path.rglob("*.npz"))
    net.store = FeatureStore(tmp_path, 4.5 * size / 2**30, "limited")
    for age, x in enumerate(batches):
        net.frozen_features(x)
        os.utime(net.store._path(net.store.key(net.store.digest(net), x)), (age, age))
        net.frozen_features(batches[0])  # asked for all the time
        assert len(list(tmp_path.rglob("*.npz"))) <= 4
    before = net.passes.recalled
    net.frozen_features(batches[0])
    net.frozen_features(batches[7])
    assert net.passes.recalled == before + 8
    net.frozen_features(batches[1])
    assert net.passes.recalled == before + 8


def fill(folder: Path) -> None:
    torch.set_num_threads(1)
    net = network(folder, limit=2e-5)
    for i in range(20):
        y = X + i % 5
        with torch.no_grad():
            assert torch.equal(net.frozen_features(y), net.features(y))


@pytest.mark.slow
def test_processes_that_write_and_drop_the_same_entries_disturb_nobody(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0, 0, 0]
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [("source", "lame", "t3a", "neo"), ("simplecil", "slda", "ranpac")]
)
def test_no_metric_changes_and_the_second_run_has_no_pass(configure, tmp_path, names):
    store = f"runtime.feature_store={tmp_path / 'store'}"
    more = [*SMALL, "backbone=embedded_resnet"] if "source" in names else []
    recalled = []
    for name in names:
        words = [*settings(name), *more, *(["strategy.epochs=0"] if name == "ranpac" else [])]
        plain = run_experiment(configure(*words), [])
        stored = run_experiment(configure(*words, store, "on_exists=rerun"), [])
        again = run_experiment(configure(*words, store, "on_exists=rerun"), [])
        for other in (stored, again):
            assert (
                other["metrics"] == plain["metrics"] and other["run"]["key"] == plain["run"]["key"]
            )
            assert records(other["run"]["folder"]) == records(plain["run"]["folder"])
        assert "recalled_images" not in plain["cost"]
        assert again["cost"]["forward_images"] == 0 < again["cost"]["recalled_images"]
        recalled.append(stored["cost"].get("recalled_images", 0))
    assert all(recalled[1:])  # the first run made what the others read
    runs = select(load_runs(configure().root))
    assert runs["cost.seconds_total"].isna().all() and runs["cost.peak_memory_mb"].notna().all()


def test_a_file_in_its_place_and_several_processes_are_refused(configure, tmp_path, monkeypatch):
    path = tmp_path / "store"
    path.write_text("")
    words = [*settings("source"), f"runtime.feature_store={path}"]
    with pytest.raises(UserError, match="runtime.feature_store=.*is a file; name a folder"):
        run_experiment(configure(*words), [])
    path.unlink()
    monkeypatch.setattr("driftline.runs.compose.distributed.size", lambda: 2)
    words = [*settings("simplecil"), f"runtime.feature_store={path}"]
    with pytest.raises(UserError, match="runtime.feature_store: a run of several processes"):
        run_experiment(configure(*words), [])


def test_without_room_the_run_goes_on_without_it(configure, tmp_path, monkeypatch):
    words = [*settings("source"), *SMALL]
    plain = run_experiment(configure(*words), [])

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("driftline.backbones.feature_store.write_checked", full)
    store = f"runtime.feature_store={tmp_path / 'store'}"
    with pytest.warns(UserWarning, match="no more features go to .*: .*No space"):
        other = run_experiment(configure(*words, store, "on_exists=rerun"), [])
    assert other["metrics"] == plain["metrics"]


# ------------------------------------------------------------------------ no other number


def asks(case: contract.Case) -> bool:
    """Whether a method, or what it is made of, asks for answers of a frozen network."""
    kinds = [locate(node["_target_"]) for node in nodes(OmegaConf.create(case.node))]
    bases = {base for kind in kinds for base in getattr(kind, "__mro__", ())}
    modules = {inspect.getmodule(base) for base in bases if base.__module__[:9] == "driftline"}
    return any("frozen_" in inspect.getsource(module) for module in modules)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.mark.one_in(4)
@pytest.mark.parametrize("case", [*filter(asks, contract.CASES)], ids=lambda case: case.name)
def test_no_method_gives_another_number_with_it(case, shared, monkeypatch):
    """Networks draw dropout, methods move statistics or weights, rules go back; one folder."""

    def answers() -> list[Any]:
        method = contract.make(case)
        return [result for _, result in contract.drive(method, case)] + [
            method.predict(x) for x in contract.images(case, 2, 3)
        ]

    want, plain = answers(), contract.network

    def stored(kind, **options):
        made = plain(kind, **options)
        made.store = FeatureStore(shared, 1, "shared")
        return made

    monkeypatch.setattr(contract, "network", stored)
    assert equal(answers(), want)
    assert equal(answers(), want)


def moves(net: Backbone) -> None:
    net.train()(X)


def learns(net: Backbone) -> None:
    with torch.no_grad():
        net.net.conv1[0].weight.add_(1)


def an_option(net: Backbone) -> None:
    net.net.bn1.eps = 0.1


def of_its_own(net: Backbone) -> None:
    net.net.layer2[0].act2 = Powered(net.net.layer2[0].act2)
    net.frozen_logits(X)
    net.net.layer2[0].act2.power = 2.0


class Powered(torch.nn.Module):
    """A layer with a plain attribute that neither its state nor its description has."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.power = inner, 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) ** self.power


def another_layer(net: Backbone) -> None:
    net.net.conv1[0] = deepcopy(net.net.conv1[0])
    net.net.conv1[0].stride = (1, 1)


def a_hook(net: Backbone) -> None:
    net.net.layer2.register_forward_hook(lambda module, args, out: -out)


@pytest.mark.parametrize("change", [moves, learns, an_option, of_its_own, another_layer, a_hook])
def test_a_network_that_has_changed_finds_and_leaves_nothing(tmp_path, change):
    net = network(tmp_path)
    net.frozen_logits(X)
    change(net)
    with torch.no_grad():
        want = deepcopy(net)(X)
    before = net.passes.recalled, len([*tmp_path.rglob("*.npz")])
    assert torch.equal(net.frozen_logits(X), want)
    net.frozen_logits(X + 1)
    assert (net.passes.recalled, len([*tmp_path.rglob("*.npz")])) == before


@pytest.mark.parametrize(
    "change", [{"power": 2.0}, {"exponents": (1, 2)}, {"operator": torch.sin}, {"training": False}]
)
def test_networks_that_differ_in_a_plain_attribute_have_nothing_in_common(tmp_path, change):
    """Of one state and one description: the temperature of UnMix-TNS is such an attribute."""

    def other(**change: Any) -> str | None:
        net = network(tmp_path)
        net.net.layer2[0].act2 = Powered(net.net.layer2[0].act2)
        vars(net.net.layer2[0].act2).update({"operator": torch.cos, "exponents": (1, 1)} | change)
        return net.store.digest(net)

    assert other() == other() != other(**change)


@pytest.mark.parametrize("name", ["TIMM_FUSED_ATTN", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR"])
def test_variables_that_choose_how_to_compute_are_part_of_the_arithmetic(monkeypatch, name):
    monkeypatch.delenv(name, raising=False)
    before = arithmetic_of(CPU)
    monkeypatch.setenv(name, "0")
    assert arithmetic_of(CPU) != before


def test_the_layout_of_images_names_an_entry(tmp_path):
    net = network(tmp_path)
    net.frozen_logits(X)
    net.frozen_logits(X.contiguous(memory_format=torch.channels_last))
    assert net.passes.recalled == 0 and len(list(tmp_path.rglob("*.npz"))) == 2


def test_a_network_with_a_strided_vector_has_a_digest(tmp_path):
    net = network(tmp_path)
    net.net.register_buffer("every_other", torch.arange(8.0)[::2])
    assert net.store.digest(net) is not None


def test_the_same_numbers_written_once_more_change_nothing(tmp_path):
    net = network(tmp_path)
    net.frozen_logits(X)
    net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()})
    net.frozen_logits(X)
    assert net.passes.recalled == 4


def test_a_pass_that_draws_is_never_stored(tmp_path):
    net = network(tmp_path)
    net.net.drop_rate = 0.5
    net.train()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    assert not torch.equal(net.frozen_logits(X), net.frozen_logits(X))
    assert net.passes.recalled == 0 and not list(tmp_path.rglob("*.npz"))


def test_dropout_that_an_estimate_puts_into_a_frozen_network_is_drawn(configure, tmp_path):
    words = [*settings("source"), *SMALL, "backbone=embedded_resnet", "estimate=accuracy"]
    plain = run_experiment(configure(*words), [])
    store = [f"runtime.feature_store={tmp_path / 'store'}", "on_exists=rerun"]
    for _ in range(2):
        assert run_experiment(configure(*words, *store), [])["metrics"] == plain["metrics"]


def test_another_seed_of_cotta_finds_what_its_anchor_answers(configure, tmp_path):
    words = [*settings("cotta"), *SMALL, "backbone=embedded_resnet"]
    store = [f"runtime.feature_store={tmp_path / 'store'}", "on_exists=rerun"]
    run_experiment(configure(*words, *store), [])
    plain = run_experiment(configure(*words, "seed=1"), [])
    stored = run_experiment(configure(*words, *store, "seed=1"), [])
    assert stored["metrics"] == plain["metrics"]
    passes = [
        run["cost"]["forward_images"] + run["cost"]["evaluation_forward_images"]
        for run in (plain, stored)
    ]
    assert stored["cost"]["recalled_images"] == passes[0] - passes[1] > 0
