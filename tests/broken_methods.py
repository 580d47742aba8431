"""Methods and rules that each break one promise, and some methods that keep them all; for
tests/test_contract.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.core.seed import generator
from driftline.core.strategy import CLStrategy, TTAStrategy, Wrapper
from driftline.core.stream import Batch, Task


class Sound(TTAStrategy):
    """Learns a bias by entropy minimisation, under noise; the ones below break it in one place."""

    def __init__(self, backbone: nn.Module, *, seed: int) -> None:
        super().__init__(backbone, seed=seed)
        self.backbone.eval().requires_grad_(False)
        self.bias = nn.Parameter(torch.zeros(10))
        self.optimizer = torch.optim.SGD([self.bias], lr=0.1, momentum=0.9)
        self.register_buffer("mean", torch.zeros(10))
        self.rng("noise")

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        return self.backbone(x) + self.bias + self.mean

    def noise(self) -> Tensor:
        return 0.1 * torch.rand(10, generator=self.rng("noise"))

    def adapt(self, x: Tensor) -> Tensor:
        scores = self.predict(x) - self.bias.detach() + self.bias + self.noise()
        self.optimizer.zero_grad()
        (-(scores.softmax(1) * scores.log_softmax(1)).sum(1).mean()).backward()
        self.optimizer.step()
        self.mean = 0.9 * self.mean + 0.1 * scores.detach().mean(0)
        return scores.detach()


class T3A(TTAStrategy):
    """Class means of the features that came in, as docs/tutorials/tta_method.md teaches: supports
    are buffers that grow, and need no further code. Iwasawa & Matsuo, NeurIPS 2021."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.backbone.eval().requires_grad_(False)
        weight = self.backbone.head.weight.detach().clone()
        self.register_buffer("supports", F.normalize(weight, dim=1))
        self.register_buffer("labels", torch.arange(len(weight)))
        self.register_buffer("last", None)

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        member = F.one_hot(self.labels).to(features)
        return features @ F.normalize(member.T @ self.supports, dim=1).T

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        return self.scores(F.normalize(self.backbone.features(x), dim=1))

    @torch.no_grad()
    def adapt(self, x: Tensor) -> Tensor:
        features = F.normalize(self.backbone.features(x), dim=1)
        self.labels = torch.cat([self.labels, self.scores(features).argmax(1)])
        self.supports = torch.cat([self.supports, features])
        self.last = features
        return self.scores(features)


class Counter(nn.Module):
    """A part with state of every kind: plain values, a generator, an optimiser, a schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10))
        self.grown = nn.Parameter(torch.zeros(0), requires_grad=False)
        self.optimizer = torch.optim.Adam([self.weight], lr=0.1)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)
        self.dice = generator(0, "a part")
        self.history: list[float] = []

    def get_extra_state(self) -> list[float]:
        return self.history

    def set_extra_state(self, state: list[float]) -> None:
        self.history = state

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        (self.weight - torch.rand(10, generator=self.dice)).square().sum().backward()
        self.optimizer.step()
        self.schedule.step()
        self.history.append(float(self.weight.detach().sum()))
        self.grown.data = torch.cat([self.grown.data, self.weight.data[:1]])
        return self.weight.detach() + sum(self.history) + self.grown.sum()


class WithParts(Sound):
    """State in a part, an alias of the backbone, and an optimiser that is made late."""

    def __init__(self, backbone: nn.Module, *, seed: int) -> None:
        super().__init__(backbone, seed=seed)
        self.part, self.alias = Counter(), nn.ModuleList([self.backbone])

    def adapt(self, x: Tensor) -> Tensor:
        return super().adapt(x) + self.part.step()


SOUND = [Sound, T3A, WithParts]


# ------------------------------------------------------------------------------ broken


class MutatingPredict(Sound):
    def predict(self, x: Tensor) -> Tensor:
        scores = super().predict(x)
        with torch.no_grad():
            self.bias += 0.01
        return scores


class HiddenCountInPredict(Sound):
    """What it changes is in no snapshot, but the stream goes on differently."""

    calls = 0

    def predict(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().predict(x) + 1e-3 * (self.calls // 3)


class CounterInPredict(Sound):
    """Answers by how many batches there were, which is not for `predict` to read."""

    counters = ("batches",)

    def __init__(self, backbone: nn.Module, *, seed: int) -> None:
        super().__init__(backbone, seed=seed)
        self.batches = 0

    def get_extra_state(self) -> int:
        return self.batches

    def set_extra_state(self, state: int) -> None:
        self.batches = state

    def predict(self, x: Tensor) -> Tensor:
        return super().predict(x) + 0.01 * self.batches

    def adapt(self, x: Tensor) -> Tensor:
        self.batches += 1
        return super().adapt(x)


class EmptyReset(Sound):
    def reset(self) -> None:
        pass


class ForgottenBuffer(Sound):
    """A tensor that is a plain attribute."""

    def __init__(self, backbone: nn.Module, *, seed: int) -> None:
        super().__init__(backbone, seed=seed)
        del self.mean
        self.mean = torch.zeros(10)


class OptimizerLeftOut(Sound):
    """In a list, where nobody finds it."""

    def __init__(self, backbone: nn.Module, *, seed: int) -> None:
        super().__init__(backbone, seed=seed)
        self.hidden = [self.optimizer]
        self.optimizer = None

    def adapt(self, x: Tensor) -> Tensor:
        self.optimizer = self.hidden[0]
        try:
            return super().adapt(x)
        finally:
            self.optimizer = None


class OwnGenerator(Sound):
    """Random numbers that do not come from `self.rng`."""

    def __init__(self, backbone: nn.Module, *, seed: int) -> None:
        super().__init__(backbone, seed=seed)
        self.dice = [torch.Generator().manual_seed(1)]

    def noise(self) -> Tensor:
        return 0.1 * torch.rand(10, generator=self.dice[0])


class FrozenWeightMoves(Sound):
    def adapt(self, x: Tensor) -> Tensor:
        next(self.backbone.parameters()).data += 1e-3
        return super().adapt(x)


class ModeLeftSwitched(Sound):
    def adapt(self, x: Tensor) -> Tensor:
        self.backbone.net.get_classifier().train()
        return super().adapt(x)


class BatchDependent(Sound):
    """Does not say that it is."""

    def predict(self, x: Tensor) -> Tensor:
        scores = super().predict(x)
        return scores - scores.mean(0)


class NothingConfident(Sound):
    """The mean over an empty set."""

    def adapt(self, x: Tensor) -> Tensor:
        scores = super().adapt(x)
        return scores - scores[scores.softmax(1).amax(1) > 0.2].mean(0)


class Ensemble(CLStrategy):
    """Kept features that give other scores than `predict`."""

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        return {}

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def extractors(self) -> Mapping[str, str]:
        return {"plain": "0"}

    @torch.no_grad()
    def embed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        return self.backbone(x)[None]

    def classify(self, features: Mapping[str, Tensor]) -> Tensor:
        return features["plain"] + 1


class LateOptimizer(CLStrategy):
    """Made in `begin_task`, which a resumed run does not call."""

    epochs = 2

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.backbone.eval().requires_grad_(False)
        self.bias = nn.Parameter(torch.zeros(10))

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.optimizer = torch.optim.SGD([self.bias], lr=0.1, momentum=0.9)

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        loss = F.cross_entropy(self.backbone(batch.x) + self.bias, batch.y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach()}

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        return self.backbone(x) + self.bias


class Peeks(Sound):
    """Reads the labels that lie about in the runner."""

    def adapt(self, x: Tensor) -> Tensor:
        import sys

        frame = sys._getframe()
        while frame is not None and "batch" not in frame.f_locals:
            frame = frame.f_back
        if frame is not None and isinstance(frame.f_locals["batch"], Batch):
            self.mean = F.one_hot(frame.f_locals["batch"].y, 10).float().mean(0)
        return super().adapt(x)


class ForgottenCount(Wrapper):
    """A rule whose count is a plain attribute."""

    def __init__(self, *, inner: TTAStrategy) -> None:
        super().__init__(inner)
        self.batches = 0

    def adapt(self, x: Tensor) -> Tensor:
        self.batches += 1
        if self.batches % 3 == 0:
            self.inner.reset()
        return self.inner.adapt(x)


class AdaptsToPredict(Wrapper):
    """A rule that lets the method learn from test images."""

    def __init__(self, *, inner: TTAStrategy) -> None:
        super().__init__(inner)

    def predict(self, x: Tensor) -> Tensor:
        return self.inner.adapt(x)


SNAPSHOT, KILLED = "a_snapshot_is_the_whole_state", "a_killed_run_goes_on"
RESET = "reset_and_the_same_stream_give_the_same"
BROKEN = {  # the properties that must notice
    MutatingPredict: ["predict_changes_nothing"],
    HiddenCountInPredict: ["predict_changes_nothing"],
    CounterInPredict: ["predict_changes_nothing"],
    EmptyReset: [RESET],
    ForgottenBuffer: [SNAPSHOT, RESET, KILLED],
    OptimizerLeftOut: [SNAPSHOT, RESET, KILLED],
    OwnGenerator: [SNAPSHOT, KILLED],
    FrozenWeightMoves: ["frozen_weights_stay", SNAPSHOT, RESET],
    ModeLeftSwitched: ["modes_are_put_back"],
    BatchDependent: ["batching_of_test_images_is_no_matter"],
    NothingConfident: ["odd_batches_are_taken"],
    Ensemble: ["kept_features_give_the_prediction"],
    LateOptimizer: [SNAPSHOT, KILLED],
    Peeks: ["labels_never_arrive"],
    ForgottenCount: [SNAPSHOT, RESET, KILLED],
    AdaptsToPredict: ["predict_changes_nothing"],
}
