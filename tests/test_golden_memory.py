"""Methods with a memory of images: the memory itself, RoTTA, SoTTA."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import strategy_node
from golden_case import Case, both, names, optim, record, weights
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.core.strategy import TTAStrategy
from driftline.parts.memory import Memory, choose
from driftline.parts.norms import use_batch_statistics
from driftline.tta.rotta import RoTTA


def image(value: float) -> Tensor:
    return torch.full((3, 4, 4), float(value))


def filled() -> Memory:
    """Four images whose pixels are their number; of the classes 2, 0, 2, 1."""
    memory = Memory()
    for number, label in enumerate((2, 0, 2, 1)):
        memory.insert(image(number), label, number / 10)
        memory.grow_older()
    return memory


def numbers(images: Tensor) -> list[float]:
    return images.mean((1, 2, 3)).tolist()


def test_memory_is_a_list_of_images() -> None:
    memory = filled()
    assert memory.ages == [4, 3, 2, 1]
    assert memory.by_class() == [1, 3, 0, 2]
    assert memory.of_class(2, 1) == [0, 2, 3]
    assert (memory.counts()[2], memory.counts()[7], memory.largest()) == (2, 0, [2])
    memory.remove(0)
    assert memory.largest() == [0, 1, 2]
    memory.insert(image(9), 3)
    memory.replace(1, image(8), 5, 0.5)
    assert numbers(memory.images()) == [1, 8, 3, 9]
    assert numbers(memory.images([3, 0])) == [9, 1]
    assert (memory.labels, memory.scores) == ([0, 5, 1, 3], [0.1, 0.5, 0.3, 0.0])
    assert memory.ages == [3, 0, 1, 0]
    assert memory.pool is not None and len(memory.pool) == 4  # the free place was used again


def test_memory_keeps_copies() -> None:
    memory, one = Memory(), image(1)
    memory.insert(one, 0)
    one.zero_()
    memory.images().zero_()
    assert numbers(memory.images()) == [1]


class Keeper(TTAStrategy):
    """Nothing but a memory."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1))
        self.memory = Memory()


def test_memory_is_saved_restored_and_reset() -> None:
    keeper = Keeper()
    keeper.begin_stream()
    keeper.memory.insert(image(1), 4, 0.25)
    one = keeper.snapshot()
    other = Keeper()
    other.memory = filled()
    other.restore(one)
    assert numbers(other.memory.images()) == [1]
    assert (other.memory.labels, other.memory.scores, len(other.memory)) == ([4], [0.25], 1)
    other.memory.insert(image(2), 0)  # what is restored is no alias of the snapshot
    assert len(keeper.memory) == 1 and one["tensors"]["memory._extra_state"]["labels"] == [4]
    keeper.reset()
    assert len(keeper.memory) == 0 and keeper.memory.pool is None
    assert keeper.memory.largest() == []


def test_choices_are_the_callers() -> None:
    one, other = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    drawn = [choose([5, 6, 7], one) for _ in range(300)]
    assert drawn == [choose([5, 6, 7], other) for _ in range(300)]
    assert all(80 <= drawn.count(item) <= 120 for item in (5, 6, 7))


# ------------------------------------------------------------------------------ RoTTA


class RecordedRoTTA(RoTTA):
    """RoTTA with the recorded views; keeps what its memory holds at each update."""

    case: Case
    held: list[list[int]]
    ages: list[list[float]]

    def augment(self, x: Tensor) -> Tensor:
        turn, order = len(self.held), self.memory.by_class()
        counts, capacity = self.memory.counts(), self.capacity
        self.held.append([counts[label] for label in range(10)])
        ages = [self.memory.ages[i] / capacity for i in order]
        self.ages.append(ages + [np.nan] * (capacity - len(ages)))
        return self.case.view(x, turn % 6)


@both
@pytest.mark.parametrize("name", names("rotta_*"))
def test_rotta(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    method = RecordedRoTTA(
        Backbone(case.net()),
        seed=0,
        layers="bn",
        optim=optim(case.hyper),
        capacity=case.hyper["memory_size"],
        every=case.hyper["update_frequency"],
        ema=1 - case.hyper["nu"],
        alpha=case.hyper["alpha"],
        age_weight=case.hyper["lambda_t"],
        entropy_weight=case.hyper["lambda_u"],
    )
    method.case, method.held, method.ages = case, [], []
    results: dict[str, Any] = record(method, case)
    results["memory_age_over_capacity_at_update"] = method.ages
    for role, network in (("student", method.backbone.net), ("teacher", method.teacher.net)):
        results |= weights(role, network, case.net(), case)
        buffers = {f"buffer/{role}.{k}": b.numpy() for k, b in network.named_buffers()}
        results |= buffers
    case.check_all(results)
    assert np.array_equal(method.held, case.data["memory_per_class_at_update"])


def network(kind: str = "test_resnet", **options: Any) -> Backbone:
    """A tiny network of random weights, the statistics of its source included."""
    torch.manual_seed(3)
    net = timm.create_model(kind, num_classes=10, **options)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    nn.init.normal_(net.get_classifier().weight, std=0.3)
    return Backbone(net, tag=kind)


def build_method(name: str, backbone: Backbone, **options: Any) -> Any:
    method = build(strategy_node(name, **options), at="strategy", backbone=backbone, seed=0)
    method.begin_stream()
    return method


def random_images(n: int) -> Tensor:
    return torch.rand(n, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def test_rotta_counts_images_and_not_batches() -> None:
    """The same images in other batches: the memory and the updates fall on the same ones."""
    ends = []
    for sizes in ((7,), (3, 1, 3)):
        method = build_method("rotta", network(), capacity=4, every=8)
        for x in random_images(7).split(sizes):
            method.adapt(x)
        ends.append((method.memory.labels, method.memory.ages, method.seen))
        assert not method.optimizer.state
        method.adapt(random_images(1))  # the eighth
        assert method.optimizer.state
        method.reset()
        assert (len(method.memory), method.seen) == (0, 0)
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("offered", "left"),
    [
        ([(0, 1.0), (0, 0.5)], [(0, 0.5)]),  # one place a class: the less certain image leaves
        ([(0, 0.5), (0, 1.0)], [(0, 0.5)]),  # or does not come
        ([(0, 0.5), (1, 0.5), (2, 0.5)], [(1, 0.5), (2, 0.5)]),  # full, equals: the oldest leaves
        ([(0, 0.5), (1, 9.0), (2, 0.9)], [(0, 0.5), (2, 0.9)]),
    ],
)
def test_rotta_lets_images_in(
    offered: list[tuple[int, float]], left: list[tuple[int, float]]
) -> None:
    method = build_method("rotta", network(), capacity=2, every=99)
    for label, entropy in offered:
        method.offer(image(0), label, entropy)
    assert list(zip(method.memory.labels, method.memory.scores, strict=True)) == left


def test_rotta_memory_without_weights_of_age_takes_the_surest() -> None:
    method = build_method("rotta", network(), capacity=1, every=99, age_weight=0.0)
    for entropy in (0.5, 0.4, 0.4, 0.6):
        method.offer(image(0), 0, entropy)
    assert (method.memory.scores, method.memory.ages) == ([0.4], [3])


def test_rotta_needs_layers_to_train() -> None:
    vit = network("test_vit", img_size=32)
    with pytest.raises(UserError, match=r"has nothing to train.*use strategy\.layers=norm"):
        build_method("rotta", vit, layers="bn")
    bare = network()
    use_batch_statistics(bare.net)
    with pytest.raises(UserError, match="starts from the source's statistics, and conv1.1 keeps"):
        build_method("rotta", bare)


# ------------------------------------------------------------------------------ SoTTA


def sotta_by_hand(net: nn.Module, images: Tensor, every: int) -> tuple[Tensor, nn.Module]:
    """Scores and network after a stream of which every image enters the memory."""
    norms = {n: m for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for module in norms.values():
        module.momentum = 0.3
    learned = [p for n, m in norms.items() if "layer4" not in n for p in m.parameters()]
    adam = torch.optim.Adam(learned, lr=0.01, weight_decay=0.02)
    scores = []
    for end in range(every, len(images) + 1, every):
        net.eval()
        scores.append(net(images[end - every : end]).detach())
        net.train()
        gradients, start = [], [p.detach().clone() for p in learned]
        for _ in range(2):
            p = net(images[:end]).softmax(1)
            loss = -(p * torch.log(p + 1e-6)).sum() / p.numel()
            gradients = torch.autograd.grad(loss, learned)
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            with torch.no_grad():
                for q, g in zip(learned, gradients, strict=True):
                    q += 0.05 * g / norm
        for q, value, g in zip(learned, start, gradients, strict=True):
            q.data, q.grad = value, g
        adam.step()
    return torch.cat(scores), net.eval()


@pytest.mark.parametrize("sizes", [(3, 3, 3), (9,), (1, 4, 2, 2)])
def test_sotta_is_what_its_code_does(sizes: tuple[int, ...]) -> None:
    images = random_images(9).double()
    want, net = sotta_by_hand(network().double().net, images, 3)
    method = build_method(
        "sotta",
        network().double(),
        every=3,
        threshold=0.0,
        momentum=0.3,
        optim={"lr": 0.01, "weight_decay": 0.02},
    )
    got = torch.cat([method.adapt(x) for x in images.split(sizes)])
    assert (got - want).abs().max() < 1e-9
    for key, value in net.state_dict().items():
        assert (method.backbone.net.state_dict()[key] - value).abs().max() < 1e-9, key


def test_sotta_without_confident_images_changes_nothing() -> None:
    method = build_method("sotta", network(), every=2, threshold=1.0)
    before = {k: v.clone() for k, v in method.backbone.state_dict().items()}
    method.adapt(random_images(4))
    assert len(method.memory) == 0 and not method.optimizer.state
    assert all(torch.equal(v, before[k]) for k, v in method.backbone.state_dict().items())


def test_sotta_keeps_classes_equal() -> None:
    """A full memory loses one of a largest class, which is the newcomer's own if that is one."""
    method = build_method("sotta", network(), capacity=4, threshold=0.5)
    for label in (0, 0, 0, 1):
        method.offer(image(0), label, 0.9)
    method.offer(image(0), 2, 0.4)
    assert sorted(method.memory.labels) == [0, 0, 0, 1]
    for label, left in ((2, [0, 0, 1, 2]), (2, [0, 1, 2, 2]), (2, [0, 1, 2, 2])):
        method.offer(image(0), label, 0.5)
        assert sorted(method.memory.labels) == left
    assert method.memory.scores[-1] == 0.5


def test_sotta_needs_values_to_average() -> None:
    method = build_method("sotta", network(), every=1, threshold=0.0)
    with pytest.raises(UserError, match="two values per channel"):
        method.adapt(random_images(1)[..., :32, :32])  # whose last maps have one pixel
    bare = network()
    use_batch_statistics(bare.net)
    with pytest.raises(UserError, match="predicts with running statistics, and conv1.1 keeps"):
        build_method("sotta", bare)
