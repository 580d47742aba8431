"""Every strategy in a file and back, as one network or with the reason why not; own data sets."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from typing import Any

import pytest
import timm
import torch
import torchvision
from conftest import equal
from PIL import Image
from test_contract import CLASSES, OF_FILES, PLAIN, SIDES, AnyLabel, Case, images, network
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import driftline
from driftline.core import papers
from driftline.core.checkpoint import Checkpointer, Signals
from driftline.core.console import Console
from driftline.core.errors import UserError
from driftline.core.files import BadFile
from driftline.core.record import RunLogger
from driftline.core.runner import Context, run_tasks
from driftline.core.strategy import TTAStrategy
from driftline.core.stream import Skipped, TaskStream
from driftline.runs.export import REASONS, ROUNDING, _network
from driftline.runs.saving import construct
from driftline.streams.own import labels_of, source_images

SMALL = ["scenario.corruptions=[fog]", "scenario.images=8", "scenario.batch_size=4"]
SMALL += ["scenario.probe_images=4", "scenario.clean_images=4"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of tiny tasks
CASES = [c for c in OF_FILES if c.name != "slca"]
CASES += [c for c in PLAIN if c.name in ("slca-resnet", "fsa-film", "bn_adapt-mixed", "rotta-norm")]


def made(case: Case) -> Any:
    """The method as `driftline.make` gives it, with the quick settings of the contract."""
    made_of = {"strategy": case.node, "around": {}, "seed": 0, "num_classes": CLASSES}
    made_of |= {"mean": None, "std": None}
    method: Any = construct(made_of, network(case.network))
    if method.buys_labels:
        method.use_oracle(AnyLabel())
    if case.adapts:
        method.make_another = lambda: construct(made_of, network(case.network))
        if method.preparation() is not None or method.replays_source(case.node):
            driftline.prepare(method, source(case))
        if method.preparation() is None:
            method.begin_stream()
    return method


def source(case: Case) -> Dataset[Any]:
    return TensorDataset(images(case, 8, seed=9)[0], torch.arange(8))


def pairs(case: Case) -> list[tuple[Dataset[Any], Dataset[Any]]]:
    """Two tasks of two classes, three images of each."""
    made = []
    for index in range(2):
        y = torch.arange(2 * index, 2 * index + 2).repeat_interleave(3)
        data = TensorDataset(images(case, len(y), seed=index)[0], y)
        made.append((data, data))
    return made


def go_on(method: Any, case: Case, part: int) -> None:
    """Two batches of a stream, or a task."""
    if case.adapts:
        for seed in (part, part + 10):
            method.adapt(images(case, 4, seed=seed)[0])
    else:
        driftline.learn(method, driftline.tasks(pairs(case), batch_size=4)[part])


@pytest.mark.slow
@pytest.mark.one_in(8)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_file_holds_a_method_and_a_state_dict_its_network(case, tmp_path):
    method = made(case)
    go_on(method, case, 0)
    path = tmp_path / "method.safetensors"
    driftline.save(method, path)
    earlier = [] if case.adapts else driftline.tasks(pairs(case), batch_size=4)
    loaded: Any = driftline.load(path, network(case.network), tasks=earlier)
    if case.adapts and loaded.replays_source(case.node):
        driftline.prepare(loaded, source(case))
    if loaded.buys_labels:
        loaded.use_oracle(AnyLabel())
    (x,) = images(case, 6, seed=30)
    want = method.predict(x)
    assert equal(loaded.predict(x), want) and equal(loaded.snapshot(), method.snapshot())

    kinds = [kind for kind in REASONS if isinstance(method, kind)]
    try:
        state = driftline.export(method, x)
    except UserError as error:
        name = case.node["name"]
        said = "is" if name in papers.published() else "(is|s to these images differ)"  # or own
        assert re.match(rf"strategy={name}: its answer ?{said} .*driftline.save", str(error))
    else:
        assert not kinds or type(method).__name__ in ("FSA", "SLDA"), "a reason that is not so"
        net = plain(case.network, want.shape[1])
        net.load_state_dict(state)
        with torch.no_grad():
            assert (net(x) - want).abs().max() <= ROUNDING * max(1, want.abs().max())
    assert equal(method.predict(x), want), "the export changed the method"

    for one in (method, loaded):
        torch.manual_seed(1)
        go_on(one, case, 1)
    assert equal(loaded.predict(x), method.predict(x))
    assert equal(loaded.snapshot(), method.snapshot())
    if case.adapts:
        for one in (method, loaded):
            one.reset()
        assert equal(loaded.predict(x), method.predict(x)), "the start of the stream is another"


def plain(kind: str, classes: int = CLASSES) -> nn.Module:
    """The network of the contract as its user has it, freshly made."""
    size = {"img_size": SIDES["vit"]} if kind == "vit" else {}
    return timm.create_model(f"test_{kind}", num_classes=classes, **size).eval()


def test_what_is_no_single_network_has_a_reason_of_its_own():
    assert all(_network.dispatch(kind) is not _network.dispatch(object) for kind in REASONS)
    assert len(set(REASONS.values())) > len(REASONS) - 3


class Sharpened(TTAStrategy):
    """A method of somebody else, the answers of which are not those of its network."""

    by = 2.0

    def predict(self, x: Tensor) -> Tensor:
        return self.by * self.backbone(x)


@pytest.mark.parametrize("by", [2.0, 1.0005], ids=["clearly", "a little"])
def test_a_method_of_ones_own_is_exported_rightly_or_not_at_all(by):
    case = next(c for c in PLAIN if c.name == "source")
    (x,) = images(case, 4)
    own = Sharpened(network("resnet"))
    own.by = by
    with torch.no_grad(), pytest.raises(UserError, match="Sharpened: its answers .* differ"):
        driftline.export(own, x)
    method = driftline.make("source", network("resnet"))
    with pytest.raises(UserError, match="at least two"):
        driftline.export(method, x[:1])
    with pytest.raises(UserError, match=r"images must be a batch of at least two.*, got 'net.pt'"):
        driftline.export(method, "net.pt")
    with pytest.raises(UserError, match="was not made by driftline.make"):
        driftline.save(Sharpened(network("resnet")), "nowhere.safetensors")


# ------------------------------------------------------------------------------ around, normalised


def torchvision_net() -> nn.Module:
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=5)
    net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    return net


def test_rules_normalisation_and_batch_statistics_of_a_torchvision_network(tmp_path):
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
    net = torchvision_net()
    before = deepcopy(net)
    method: Any = driftline.make("tent", net, lr=1e-2, around=["reset_every"], mean=mean, std=std)
    x = torch.rand(8, 3, 32, 32)
    for _ in range(2):
        method.adapt(x)
    driftline.save(method, tmp_path / "tent.safetensors")
    loaded = driftline.load(tmp_path / "tent.safetensors", deepcopy(before))
    assert type(loaded).__name__ == "ResetEvery" and equal(loaded.predict(x), method.predict(x))
    assert (tmp_path / "tent.safetensors").stat().st_size < 200_000  # of 45 MB
    fresh = torchvision_net().eval()
    fresh.load_state_dict(driftline.export(method, x))
    with torch.no_grad():
        shape = (1, 3, 1, 1)
        normal = (x - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
        assert torch.allclose(fresh(normal), method.predict(x), atol=1e-4)
    with pytest.raises(UserError, match="weights that the method never changes are others"):
        other = torchvision_net()
        other.conv1.weight.data += 1
        driftline.load(tmp_path / "tent.safetensors", other)
    with pytest.raises(UserError, match="does not fit the network"):
        driftline.load(tmp_path / "tent.safetensors", torchvision.models.resnet34(num_classes=5))


def test_a_network_without_a_head_gets_one():
    vit = timm.create_model("test_vit", num_classes=0, img_size=32)
    method = driftline.make("finetune", vit, num_classes=4, epochs=1)
    case = next(c for c in OF_FILES if c.name == "finetune")
    driftline.learn(method, driftline.tasks(pairs(case), batch_size=6)[0])
    x = torch.rand(2, 3, 32, 32)
    fresh = timm.create_model("test_vit", num_classes=2, img_size=32).eval()
    fresh.load_state_dict(driftline.export(method, x))
    assert torch.allclose(fresh(x), method.predict(x), atol=1e-4) and vit.num_classes == 0


@pytest.mark.parametrize("kind", ["lora", "growing_ranks", "lora_mixture", "self_activated"])
def test_adapters_are_in_the_weights_unless_they_differ_between_tokens(kind):
    vit = timm.create_model("test_vit", num_classes=4, img_size=32)
    method, x = driftline.make("tent", deepcopy(vit), adapter=kind), torch.rand(4, 3, 32, 32)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in method.bank.second_factors(next(iter(method.bank.sets))):
            p.normal_(0, 1e-4, generator=draws)  # so small that the scores hardly move
    if kind in ("lora_mixture", "self_activated"):
        with pytest.raises(UserError, match="at blocks.0.attn.qkv:out whose updates differ betwee"):
            driftline.export(method, x)
        return
    vit.eval().load_state_dict(driftline.export(method, x))
    assert torch.allclose(vit(x), method.predict(x), atol=1e-4)


class WithAuxiliary(nn.Module):
    """As GoogLeNet: a head that is asked in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.aux = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        return self.fc((self.aux(out) if self.training else out).mean((2, 3)))


def test_layers_that_give_no_answer_are_in_the_state_dict():
    method: Any = driftline.make("tent", WithAuxiliary())
    x = torch.rand(4, 3, 8, 8)
    method.adapt(x)
    fresh = WithAuxiliary().eval()
    fresh.load_state_dict(driftline.export(method, x))
    assert torch.allclose(fresh(x), method.predict(x), atol=1e-4)


@pytest.fixture
def file(tmp_path) -> Any:
    path = tmp_path / "source.safetensors"
    driftline.save(driftline.make("source", network("resnet")), path)
    return path


def test_a_file_that_is_none_is_one_line(file, tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        driftline.load(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="does not hold the network"):
        driftline.load(file)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(content)
    (tmp_path / "text.safetensors").write_text("no tensors here")
    for name in ("bad", "text"):
        with pytest.raises(BadFile, match="is damaged"):
            driftline.load(tmp_path / f"{name}.safetensors", network("resnet"))
    with pytest.raises(UserError, match="nowhere|cannot write"):
        driftline.save(driftline.make("source", network("resnet")), file / "below")


def test_a_file_gets_no_code_to_run_that_is_not_there_already(file, monkeypatch):
    from driftline.runs import saving

    tensors, facts = saving.read_tensors(file, "method")
    about = json.loads(facts["driftline"])
    about["made_of"]["strategy"]["_target_"] = "antigravity.Method"
    saving.write_tensors(file, tensors, {"driftline": json.dumps(about)})
    with pytest.raises(UserError, match="antigravity.Method, which is not of this project"):
        driftline.load(file, network("resnet"))
    about["made_of"]["strategy"]["_target_"] = "subprocess.Popen"
    saving.write_tensors(file, tensors, {"driftline": json.dumps(about)})
    with pytest.raises(UserError, match="makes no strategy|not of this project"):
        driftline.load(file, network("resnet"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_onnx_answers_as_every_method_that_is_one_network(case, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason='needs pip install "driftline[onnx]"')
    pytest.importorskip("onnxscript", reason='needs pip install "driftline[onnx]"')
    method = made(case)
    go_on(method, case, 0)
    (x,) = images(case, 6, seed=30)
    want = method.predict(x)
    path = tmp_path / "a folder" / "nétwork.onnx"
    try:
        driftline.export_onnx(method, x, path)
    except UserError as error:
        assert re.match(rf"strategy={case.node['name']}: its answer is ", str(error))
        assert not path.exists()
        return
    assert list(path.parent.iterdir()) == [path]
    session = runtime.InferenceSession(path)
    for part in (x, x[:1], x[:3]):
        (scores,) = session.run(["scores"], {"images": part.numpy()})
        assert torch.allclose(torch.from_numpy(scores), want[: len(part)], atol=1e-4, rtol=1e-4)
    assert equal(method.predict(x), want), "the export changed the method"


def test_onnx_without_its_package_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    method = driftline.make("source", network("resnet"))
    with pytest.raises(UserError, match=r"pip install \"driftline\[onnx\]\""):
        driftline.export_onnx(method, torch.rand(2, 3, 64, 64), "net.onnx")


# ------------------------------------------------------------------------------ own data sets


class Named(Dataset[Any]):
    """Images and labels, with nothing that says the labels beforehand."""

    def __init__(self, x: Any, y: list[int]) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x[i], self.y[i]


def test_tasks_of_own_data_sets():
    x = torch.rand(8, 3, 4, 4)
    first, second = Named(x[:5], [1, 0, 1, 0, 2]), Named(x[5:], [4, 3, 3])
    tasks = driftline.tasks([(first, first), (second, first, second)], batch_size=2)
    assert [t.classes for t in tasks] == [range(3), range(3, 5)] and tasks[0].steps == 3
    seen = [torch.cat([b.index for b in tasks[1].train(epoch)]).tolist() for epoch in (0, 0, 1)]
    assert seen[0] == seen[1] and sorted(seen[0]) == [5, 6, 7]
    batch = next(tasks[1].train(0, 1))
    assert torch.equal(batch.x, x[batch.index]) and torch.equal(
        batch.x, tasks[1].again(batch.index, 0)
    )
    more = torch.tensor([0, 3]), torch.tensor([1, 0])
    rows = torch.cat([b.index for b in tasks[1].train(0, more=more)])
    labels = torch.cat([b.y for b in tasks[1].train(0, more=more)])
    assert dict(zip(rows.tolist(), labels.tolist(), strict=True)) == {5: 4, 6: 3, 7: 3, 0: 1, 3: 0}
    assert labels_of(Subset(TensorDataset(x, torch.arange(8)), [3, 1])).tolist() == [3, 1]
    for wrong, message in (
        ([(second, second)], "has the labels 3, 4, and 0 classes come before it: .* 0 ... 1"),
        ([(Named(x[:0], []), first)], "task 0 has 0 training images"),
        ([(first, first, second)], "has 5 training images and 3 without augmentation"),
    ):
        with pytest.raises(UserError, match=message):
            driftline.tasks(wrong)
    bytes_ = Named((255 * x).byte(), [0] * 8)
    with pytest.raises(UserError, match="torch.uint8 .*ToTensor"):
        next(driftline.tasks([(bytes_, bytes_)])[0].train(0))


def test_what_is_no_data_set_of_images_and_labels_is_one_line():
    data = TensorDataset(torch.rand(4, 3, 32, 32), torch.arange(4))
    eata: Any = driftline.make("eata", network("resnet"))
    with pytest.raises(UserError, match=r"strategy=eata works on .* driftline.prepare\(method, so"):
        eata.adapt(torch.rand(4, 3, 32, 32))
    for wrong, message in (
        (data, "task 0 takes a data set .* got Tensor"),
        ([data], "task 0 must be a pair .* of data sets, .* got TensorDataset"),
        ([(data,)], "task 0 must be a pair .* got 1 of them"),
        ([(DataLoader(data), data)], "task 0 takes data sets .*: give loader.dataset"),
        ([(data, iter(data))], "task 0 takes a data set with len"),
    ):
        with pytest.raises(UserError, match=message):
            driftline.tasks(wrong)
        with pytest.raises(UserError, match="driftline.prepare takes"):
            driftline.prepare(eata, DataLoader(data))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        driftline.tasks([(data, data)], batch_size=0)
    for bad, message in (
        (TensorDataset(data.tensors[0]), "must be .image, label., got 1 values"),
        (Named([Image.new("RGB", (4, 4))] * 4, [0] * 4), "became Image: end .* ToTensor"),
    ):
        with pytest.raises(UserError, match=message):
            next(source_images(bad).batches(2))
    driftline.prepare(eata, data)
    assert eata.adapt(torch.rand(4, 3, 32, 32)).shape == (4, network("resnet").num_classes)


def test_tasks_are_learned_in_order():
    case = next(c for c in OF_FILES if c.name == "simplecil")
    first, second = driftline.tasks(pairs(case), batch_size=4)
    method = made(case)
    with pytest.raises(UserError, match="this is task 1 and the method has learned 0"):
        driftline.learn(method, second)
    driftline.learn(method, first)
    with pytest.raises(UserError, match="this is task 0 and the method has learned 1"):
        driftline.learn(method, first)
    bare = timm.create_model("test_vit", num_classes=0, img_size=32)
    with pytest.raises(UserError, match="num_classes is missing: strategy=simplecil"):
        driftline.make("simplecil", bare)


def test_source_images_are_a_function_of_their_arguments():
    source = source_images(Named(torch.rand(7, 3, 32, 32), list(range(7))))
    asked = {"epoch": 2, "start": 1, "augment": "photometric"}
    once, again = (list(source.batches(3, **asked)) for _ in range(2))
    assert equal(once, again) and [len(b.y) for b in once] == [3, 1]


@pytest.mark.parametrize("name", ["ease", "icarl"])
def test_the_own_loop_is_that_of_the_runner(name, tmp_path):
    case = next(c for c in OF_FILES if c.name == name)
    tasks = driftline.tasks(pairs(case), batch_size=4)
    method, other = made(case), made(case)
    torch.manual_seed(1)
    for task in tasks:
        driftline.learn(method, task)
    torch.manual_seed(1)
    log = RunLogger(tmp_path, "tiny")
    context = Context(
        log,
        Checkpointer(log, Signals(), key="tiny", every=0),
        Console("tiny", mute=True),
        torch.device("cpu"),
    )
    run_tasks(other, TaskStream("tiny", CLASSES, tasks, {}, Skipped()), context)
    assert equal(method.snapshot(), other.snapshot())


def test_what_fits_no_task_or_no_source_is_one_line():
    method = driftline.make("source", network("resnet"))
    with pytest.raises(UserError, match="strategy=source adapts at test time"):
        driftline.learn(method, driftline.tasks([(Named(torch.rand(2, 3, 8, 8), [0, 1]),) * 2])[0])
    with pytest.raises(UserError, match="strategy=source needs no source images"):
        driftline.prepare(method, Named(torch.rand(2, 3, 8, 8), [0, 1]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["strategy=rotta", "scenario=cifar10_c", *SMALL],
        ["strategy=simplecil", "scenario=split_cifar10"],
    ],
    ids=["rotta", "simplecil"],
)
def test_a_run_leaves_its_adapted_method(words, tmp_path):
    words = [*words, f"root={tmp_path}", "checkpoint.model=true"]
    folder = driftline.run(words)["run"]["folder"]
    first, second = (driftline.load(f"{folder}/model.safetensors") for _ in range(2))
    x = torch.rand(3, 3, 32, 32)
    assert first.predict(x).isfinite().all() and equal(first.predict(x), second.predict(x))
    assert len(list(tmp_path.rglob("model.safetensors"))) == 1  # none of the source model beside it
