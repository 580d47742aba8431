"""What a strategy keeps, found by walking its modules: parts that grow, parts inside, misfits."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.build import build
from driftline.core.cost import state_bytes
from driftline.core.errors import UserError
from driftline.core.strategy import TTAStrategy, optimizers

STEPS = 3


class Method(TTAStrategy):
    """Scores plus what `offset` makes of the state; a subclass changes its state in `learn`."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        backbone.eval().requires_grad_(False)

    def learn(self, x: Tensor) -> None:
        raise NotImplementedError

    def offset(self) -> Tensor | float:
        return 0.0

    def adapt(self, x: Tensor) -> Tensor:
        self.learn(x)
        return (self.backbone(x) + self.offset()).detach()


class GrowingBuffer(Method):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.register_buffer("supports", torch.zeros(0, 3))

    def learn(self, x: Tensor) -> None:
        self.supports = torch.cat([self.supports, x.mean((2, 3))])

    def offset(self) -> Tensor:
        return self.supports.sum()


class EmptyAtFirst(Method):
    """None, then a tensor of another type and shape each time."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.register_buffer("mean", None)

    def learn(self, x: Tensor) -> None:
        now = x.double().mean((0, 2, 3))
        self.mean = now if self.mean is None else torch.cat([self.mean, now])

    def offset(self) -> Tensor:
        return self.mean.sum()


class GrowingList(Method):
    """Entries that do not learn: they stay so in another object."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.memory = nn.ParameterList()

    def learn(self, x: Tensor) -> None:
        self.memory.append(nn.Parameter(x.mean((0, 2, 3)), requires_grad=False))

    def offset(self) -> Tensor:
        assert not any(p.requires_grad for p in self.memory)
        return torch.stack([*self.memory]).sum()


class GrowingDict(GrowingList):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.memory = nn.ParameterDict()

    def learn(self, x: Tensor) -> None:
        self.memory[f"batch{len(self.memory)}"] = nn.Parameter(x.mean((0, 2, 3)), False)

    def offset(self) -> Tensor:
        return torch.stack([*self.memory.values()]).sum()


class Part(nn.Module):
    """A part with an optimiser, a schedule, a generator and a plain value of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))
        self.sgd = torch.optim.SGD([self.bias], lr=0.1, momentum=0.9)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.sgd, 1, gamma=0.7)
        self.dice = torch.Generator().manual_seed(3)
        self.notes: list[float] = []

    def get_extra_state(self) -> dict[str, Any]:
        return {"notes": self.notes}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.notes = state["notes"]

    def step(self, x: Tensor) -> None:
        noise = torch.rand((), generator=self.dice)
        (self.bias * x.mean() + self.bias * noise).backward()
        self.sgd.step()
        self.sgd.zero_grad()
        self.schedule.step()
        self.notes.append(float(noise))


class WithPart(Method):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.part = Part()

    def learn(self, x: Tensor) -> None:
        self.part.step(x)

    def offset(self) -> Tensor:
        return self.part.bias + sum(self.part.notes)

    def reset(self) -> None:
        """Generators run on; here the stream shall be the same one."""
        super().reset()
        self.part.dice.manual_seed(3)


class LateGenerator(Method):
    """Made when it is first needed."""

    noise: Tensor

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.register_buffer("noise", torch.zeros(()))

    def learn(self, x: Tensor) -> None:
        self.noise = torch.rand((), generator=self.rng("late"))

    def offset(self) -> Tensor:
        return self.noise

    def reset(self) -> None:
        super().reset()
        self._generators.clear()


class Around(Method):
    """A method in a method, and the same backbone under two names."""

    def __init__(self, backbone: nn.Module, inner: TTAStrategy) -> None:
        super().__init__(backbone)
        self.inner = inner
        self.register_buffer("batches", torch.zeros(()))

    def learn(self, x: Tensor) -> None:
        self.batches += 1

    def adapt(self, x: Tensor) -> Tensor:
        self.learn(x)
        return self.inner.adapt(x) + self.batches


SOUND = [GrowingBuffer, EmptyAtFirst, GrowingList, GrowingDict, WithPart, LateGenerator]


def network() -> Backbone:
    torch.manual_seed(0)
    return Backbone(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), input_size=2)


def make(kind: type[Any], around: bool) -> TTAStrategy:
    net = network()
    method = kind(net)
    method = Around(net, method) if around else method
    method.begin_stream()
    return method


def images() -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.rand(2, 3, 2, 2, generator=g) for _ in range(STEPS)]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("around", [False, True], ids=["alone", "inside"])
@pytest.mark.parametrize("kind", SOUND)
def test_what_grows_and_what_parts_hold_is_resumed_and_reset(kind, around):
    whole = make(kind, around)
    want = [whole.adapt(x) for x in images()]
    for cut in range(STEPS):
        half = make(kind, around)
        for x in images()[:cut]:
            half.adapt(x)
        fresh = make(kind, around)
        for x in images():  # as far as it ever gets, and back
            fresh.adapt(x)
        for other in (fresh, make(kind, around)):
            other.restore(through_a_file(half.snapshot()))
            assert same([other.adapt(x) for x in images()[cut:]], want[cut:]), cut
            other.reset()
            assert same([other.adapt(x) for x in images()], want), cut


def test_a_part_s_optimiser_counts():
    for around in (False, True):
        method = make(WithPart, around)
        part = next(m for m in method.modules() if isinstance(m, Part))
        assert [*method.updated_parameters()] == [part.bias] and len(optimizers(method)) == 1
        bare = state_bytes(method)
        method.adapt(images()[0])
        assert state_bytes(method) == bare + 4  # the momentum of one number


def test_what_two_methods_share_is_saved_once_and_frozen_under_every_name():
    method = make(GrowingBuffer, around=True)
    state = method.snapshot()
    assert set(state["tensors"]) == {"batches"}
    assert set(state["inner"]["inner"]["tensors"]) == {"supports"}
    names = {f"backbone.net.1.{key}" for key in ("weight", "bias")}
    assert method.frozen() == names | {f"inner.{name}" for name in names}


class LateOptimiser(Method):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.bias = nn.Parameter(torch.zeros(()))

    def learn(self, x: Tensor) -> None:
        self.optimizer = self.optimizer or torch.optim.SGD([self.bias], lr=0.1, momentum=0.9)


class GrowingOptimiser(LateOptimiser):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.optimizer = torch.optim.SGD([self.bias], lr=0.1)

    def learn(self, x: Tensor) -> None:
        assert self.optimizer is not None
        self.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(()))]})


class LateBuffer(Method):
    def learn(self, x: Tensor) -> None:
        self.register_buffer("late", x.mean())


class LateEmptyBuffer(Method):
    def learn(self, x: Tensor) -> None:
        self.register_buffer("late", None)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (LateOptimiser, "optimizer"),
        (GrowingOptimiser, "optimizer"),
        (LateBuffer, "late"),
        (LateEmptyBuffer, "late"),
    ],
)
def test_state_that_another_object_lacks_is_named(kind, name):
    method = make(kind, around=False)
    method.adapt(images()[0])
    with pytest.raises(UserError, match=f"does not fit {kind.__name__}: first mismatch '{name}'"):
        make(kind, around=False).restore(through_a_file(method.snapshot()))


@pytest.mark.parametrize("kind", [LateOptimiser, GrowingOptimiser, LateBuffer])
def test_state_that_the_start_lacks_is_no_silent_reset(kind):
    method = make(kind, around=False)
    method.adapt(images()[0])
    with pytest.raises(UserError, match="does not fit"):
        method.reset()


def test_another_structure_is_named():
    inside, alone = make(GrowingBuffer, around=True), make(GrowingBuffer, around=False)
    with pytest.raises(UserError, match="first mismatch 'inner'"):
        inside.restore(alone.snapshot() | {"tensors": inside.snapshot()["tensors"]})


class Holder:
    """Stands for a rule: one node with another one inside."""

    def __init__(self, backbone: nn.Module, *, inner: TTAStrategy) -> None:
        self.backbone, self.inner = backbone, inner


def test_nested_nodes_get_the_live_objects():
    net = network()
    node = {"_target_": "test_state.Holder", "inner": {"_target_": "driftline.tta.source.Source"}}
    holder = build(node, at="strategy", backbone=net, seed=0, num_classes=4)
    assert holder.backbone is holder.inner.backbone is net
