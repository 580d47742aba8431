"""SEMA: a block gets another adapter where the images of a task look unlike all that it learned.

Paper: Wang et al., "Self-Expansion of Pre-trained Models with Mixture of Adapters for Continual
Learning", CVPR 2025, arXiv 2403.18886. Official code: huiyiwang01/SEMA-CL 5a45512,
`models/sema.py` and `backbone/sema_block.py`.

Every block has an adapter beside its MLP. The last blocks can have more, mixed by a router, and
each of theirs has a descriptor: a linear autoencoder of the mean of all tokens, with its errors on
the last images of its training. The first task trains adapters and head by cross-entropy, then the
descriptors. A later task is swept in large batches. How new an image is to a descriptor is
|e - mean| / deviation, its error e among those remembered. Where the mean of this over the batch
exceeds `threshold` for every descriptor of a block, the first such block gets a new adapter, once a
task. It is trained at once on the whole task, function and descriptor, together with its column of
the router and the head; then the sweep goes on. After a sweep that added something comes another
one. If none did, the head alone learns. What was trained is frozen for good.

As in the official code: adapters have neither the factor 0.1 nor the dropout of its settings; the
deviation is absolute, so errors that are unusually small count too; errors are remembered from the
function phase on; rows of the head that belong to other tasks are decayed.

Deviations that change no number: the adapters of a block are one product with the router's shares
as factors of the hidden vectors. A sweep ends when every block has had its new adapter, since
nothing can be added any more. Descriptors are trained without gradients through the network, none
of which the official optimiser would use. Features are kept as long as no adapter is added
(`core/features.py`). A sweep that is interrupted goes on in another epoch of the stream, so that a
run can be stopped anywhere; epochs for which there is nothing left to do are empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone, weights_hash
from driftline.core import distributed
from driftline.core.ranges import Count, NonNegative, Size
from driftline.core.strategy import CLStrategy
from driftline.core.stream import BOUNDARIES, Batch, Task
from driftline.kernels import adapter
from driftline.parts.adapters.adapter import Product, kaiming
from driftline.parts.adapters.bottleneck import Bottleneck
from driftline.parts.adapters.plan import Plan
from driftline.parts.modes import evaluation_mode
from driftline.parts.objectives import scoped_cross_entropy
from driftline.parts.optim import Optim
from driftline.parts.routing import shares

NAME = "mixture"  # of the one set in the bank
Phase = Literal["sweep", "function", "descriptor", "done"]


class Expert(nn.Module):
    """An adapter, its column of the router, and its descriptor with the errors that it remembers.

    Args:
        dim: width D.
        rank, hidden: of the adapter and of the descriptor.
        generator: of the initial values.
    """

    errors: Tensor  # [n], the oldest first

    def __init__(self, dim: int, rank: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.function = Bottleneck(dim, rank, scale=1.0, generator=generator)
        self.column = linear(dim, 1, generator)
        with torch.no_grad():
            self.column.bias.uniform_(-(dim**-0.5), dim**-0.5, generator=generator)
        self.descriptor = nn.Sequential(
            linear(dim, hidden, generator), linear(hidden, dim, generator)
        )
        self.register_buffer("errors", torch.empty(0))

    def error(self, means: Tensor) -> Tensor:
        """Mean squared error [B] of the descriptor on means of tokens [B, D]."""
        return (self.descriptor(means) - means).square().mean(1)

    def remember(self, errors: Tensor, length: int) -> None:
        """Add errors [B] to those remembered, of which the last `length` stay.

        As in the official code, the batch that fills them up is cut.
        """
        room = length - len(self.errors) or len(errors)
        self.errors = torch.cat([self.errors, errors[:room]])[-length:]

    def deviation(self, means: Tensor) -> Tensor:
        """Standard deviations [B] between the errors now and those remembered; 0 for up to two."""
        if len(self.errors) < 3:
            return means.new_zeros(len(means))
        return ((self.error(means) - self.errors.mean()) / self.errors.std()).abs()


class Mixture(Product):
    """Experts of one block; their updates are weighted by a softmax over the router's columns."""

    def __init__(self, dim: int, rank: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.sizes = dim, rank, hidden
        self.experts = nn.ModuleList()
        self.means: Tensor | None = None  # of the tokens of the last pass, [B, D]; no state
        self.resize(1, generator)

    def resize(self, count: int, generator: torch.Generator) -> None:
        """Drop the last experts, or add new ones, so that there are `count`."""
        del self.experts[count:]
        for _ in range(count - len(self.experts)):
            self.experts.append(Expert(*self.sizes, generator))

    def each(self) -> list[Expert]:
        return [cast(Expert, one) for one in self.experts]

    def _call(self, x: Tensor, weight: float = 1.0, **residual: Any) -> Tensor:
        experts, rank = self.each(), self.sizes[1]
        means = x.mean(1)
        self.means = means.detach()
        weights = shares(torch.cat([one.column(means) for one in experts], 1))  # [B, K]
        functions = [one.function for one in experts]
        out = adapter(
            x,
            torch.cat([f.down.weight for f in functions]),
            torch.cat([f.up.weight for f in functions], 1),
            down_bias=torch.cat([f.down.bias for f in functions]),
            act="relu",
            rank_scale=weights.repeat_interleave(rank, 1),
            scale=weight,
            **residual,
        )
        return out + weight * (weights @ torch.stack([f.up.bias for f in functions]))[:, None]


def linear(dim: int, out: int, generator: torch.Generator) -> nn.Linear:
    """Kaiming-uniform weights with a = sqrt(5), biases 0."""
    layer = cast(nn.Linear, nn.utils.skip_init(nn.Linear, dim, out))
    kaiming(layer.weight, generator)
    nn.init.zeros_(layer.bias)
    return layer


def regrouped(batches: Iterable[Batch | None], size: int) -> Iterator[Batch]:
    """The same images in batches of `size`; the last one may be smaller."""
    held: Batch | None = None
    for batch in batches:
        if batch is None:
            continue
        held = batch if held is None else Batch(*map(torch.cat, zip(held, batch, strict=True)))
        while len(held.y) >= size:
            yield Batch(*(part[:size] for part in held))
            held = Batch(*(part[size:] for part in held))
    if held is not None and len(held.y):
        yield held


class SEMA(CLStrategy):
    """Adapters and mixtures of adapters in one set of a bank, one linear head for all classes.

    Args:
        num_classes: classes of the whole stream.
        epochs, epochs_descriptor: passes over a task in which adapters and head learn, and in which
            descriptors do; each time that something is added.
        rank: hidden width of an adapter.
        hidden: hidden width of a descriptor.
        expandable: last blocks that can get more adapters (fewer if the network has fewer).
        remembered: errors, of as many images, that a descriptor remembers; of a task with fewer
            images, from several epochs.
        threshold: standard deviations beyond which a batch is new to a descriptor.
        sweep_batch: images that are judged together.
        optim: of the groups `adapter` (with columns of the router), `head` and `descriptor`, made
            anew for each phase.

    Raises:
        UserError: for a network without transformer blocks.
    """

    needs = frozenset({"features", BOUNDARIES})
    unmergeable = "it mixes the adapters of several tasks for each image"
    phase: Phase

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        num_classes: int,
        epochs: Count,
        epochs_descriptor: Count,
        rank: Size,
        hidden: Size,
        expandable: Count,
        remembered: Count,
        threshold: NonNegative,
        sweep_batch: Size,
        optim: Optim,
    ) -> None:
        super().__init__(backbone, seed=seed)
        self.lengths = {"function": epochs, "descriptor": epochs_descriptor, "sweep": 1}
        self.epochs = epochs + epochs_descriptor
        self.remembered, self.threshold = remembered, threshold
        self.sweep_batch = sweep_batch
        self.optim = self.task_optim = optim
        backbone.eval().requires_grad_(False)
        draws = self.rng("init")
        kind = partial(Bottleneck, rank=rank, scale=1.0)
        plan = Plan(at=["blocks.*.mlp:parallel"], blocks=None, kind=kind)
        self.bank = plan.bank(backbone)
        adapters = plan.adapters(backbone, draws)
        for point in list(adapters)[-expandable:]:
            adapters[point] = Mixture(backbone.width, rank, hidden, draws)
        self.bank.add(NAME, adapters)
        every = self.bank.adapters(NAME).values()
        self.mixtures = [one for one in every if isinstance(one, Mixture)]
        self.plain = [one for one in every if not isinstance(one, Mixture)]
        self.head = linear(backbone.dim, num_classes, draws)
        self.seen = 0
        self.columns: Sequence[int] = range(0)
        self._hash = ""
        # Where a task stands; the state beside the tensors.
        self.phase = "done"
        self.passed = -1  # passes of the phase that are over; -1: its first is still to come
        self.learning: list[int] = []  # mixtures whose newest expert learns
        self.grown: list[int] = []  # mixtures that got one in this task
        self.sweep = -1  # epoch whose order the sweep has; -1: none has begun
        self.swept = 0  # its batches so far
        self.added = False  # in this sweep

    # ------------------------------------------------------------------ where a task stands

    def grow(self, task: Task) -> None:
        first, count = not self.seen, len(self.mixtures)
        self.seen = max(self.seen, task.classes.stop)
        self.columns = task.own
        self.task_optim = self.optim.of_task(task.index)
        self.epochs = self.lengths["function"] + self.lengths["descriptor"]
        if not first:  # at worst; what is not needed is empty
            self.epochs = count * self.epochs + 2 * count - 1
        self.grown, self.learning = [], list(range(count)) if first else []
        self._enter("function" if first else "sweep", -1)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if len(task.classes) == 1:
            self.warn_once(
                "one class",
                f"task {task.index} has one class: the loss over its own classes is 0 and no "
                "adapter learns from it (scenario.increment sets the classes of a task)",
            )

    def _enter(self, phase: Phase, passed: int = 0) -> None:
        """Begin a phase: what learns in it, and its optimiser."""
        self.phase, self.passed = phase, passed
        newest = [self.mixtures[i].each()[-1] for i in self.learning]
        learned: dict[str, list[nn.Parameter]] = {"adapter": [], "head": [], "descriptor": []}
        if phase == "function":
            own: list[nn.Module] = [m for one in newest for m in (one.function, one.column)]
            own += self.plain if newest and not self.grown else []  # in the first task
            learned["adapter"] = [p for m in own for p in m.parameters()]
            learned["head"] = [*self.head.parameters()]
        elif phase == "descriptor":
            learned["descriptor"] = [p for one in newest for p in one.descriptor.parameters()]
        moved = [p for group in learned.values() for p in group]
        for part in (self.bank, self.head):
            part.requires_grad_(False)
        for p in moved:
            p.requires_grad_(True)
        self.optimizer = self.task_optim.optimizer(learned) if moved else None

    def begin_epoch(self, task: Task, epoch: int) -> None:
        """The next pass of the phase, or the first of the one that follows."""
        self.passed += 1
        if self.passed == self.lengths.get(self.phase):
            self._enter(self._following())
        if self.phase == "sweep" and self.sweep < 0:
            self.sweep, self.swept, self.added = epoch, 0, False
        if self.optimizer is not None:
            self.task_optim.set_rates(self.optimizer, self.passed, self.lengths[self.phase])

    def _following(self) -> Phase:
        """What comes after a phase."""
        if self.phase == "function":
            return "descriptor" if self.learning else "done"
        if self.phase == "descriptor":
            return "sweep" if self.grown and len(self.grown) < len(self.mixtures) else "done"
        self.sweep = -1
        if self.added:
            return "sweep"
        return "done" if self.grown else "function"

    def batches(self, task: Task, epoch: int, start: int = 0) -> Iterator[Batch | None]:
        """Those of the pass; none once a sweep was interrupted, or where nothing is left to do."""
        if self.phase == "done" or self.passed < 0:
            return iter(())
        return self._sweep(task) if self.phase == "sweep" else task.train(epoch, start)

    def _sweep(self, task: Task) -> Iterator[Batch]:
        """Large batches from where the sweep stands, until a block asks for an adapter."""
        chunks = regrouped(task.train(self.sweep), self.sweep_batch)
        for chunk in islice(chunks, self.swept, None):
            yield chunk
            if self.phase != "sweep":
                return

    def end_task(self, task: Task) -> None:
        self.learning, self.sweep = [], -1
        self._enter("done")

    # ------------------------------------------------------------------ training

    @distributed.shared()
    def described(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D + M * D], features and the means of tokens at every mixture."""
        features = self.bank.features(x, NAME)
        return torch.cat([features, *(cast(Tensor, m.means) for m in self.mixtures)], 1)

    def passed_through(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features [B, D], and the means of tokens [B, width] at every mixture."""
        rows, dim = self.described(x), self.head.in_features
        return rows[:, :dim], list(rows[:, dim:].split(self.backbone.width, 1))

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        """One step, or one batch of a sweep; returns losses, or how new the batch is.

        Raises:
            Diverged: for a loss that is not finite, before anything is changed.
        """
        if self.phase == "done" or self.passed < 0:
            return {}
        if self.phase == "sweep":
            return self.judge(batch.x)
        return self.describe(batch.x) if self.phase == "descriptor" else self.adapt(batch)

    def adapt(self, batch: Batch) -> dict[str, Tensor]:
        """One step of adapters and head on the classes of the task."""
        features, means = self.passed_through(batch.x)
        with torch.no_grad():
            errors = self._errors(means)
        scores = self.head(features)
        loss = scoped_cross_entropy(scores, batch.y, self.columns)
        self.task_optim.step(self.optimizer, loss, lambda: self._again(batch))
        self._remember(errors)
        if self.learning:
            self._hash = ""
        seen = scores.detach()[:, : self.seen]
        return {"loss": loss.detach(), "acc": 100 * (seen.argmax(1) == batch.y).float().mean()}

    def _again(self, batch: Batch) -> Tensor:
        scores = self.head(self.bank.features(batch.x, NAME))
        return scoped_cross_entropy(scores, batch.y, self.columns)

    def describe(self, x: Tensor) -> dict[str, Tensor]:
        """One step of the newest descriptors."""
        with torch.no_grad():
            _, means = self.passed_through(x)
        errors = self._errors(means)
        loss = errors.mean(1).sum()
        self.task_optim.step(self.optimizer, loss, lambda: self._errors(means).mean(1).sum())
        self._remember(errors)
        return {"descriptor_loss": loss.detach()}

    def _errors(self, means: Sequence[Tensor]) -> Tensor:
        """Errors of the descriptors that are new, [L, B]."""
        newest = [(self.mixtures[i].each()[-1], means[i]) for i in self.learning]
        return torch.stack([one.error(m) for one, m in newest]) if newest else means[0][:0]

    def _remember(self, errors: Tensor) -> None:
        for i, own in zip(self.learning, errors.detach(), strict=True):
            self.mixtures[i].each()[-1].remember(own, self.remembered)

    def judge(self, x: Tensor) -> dict[str, Tensor]:
        """One batch of a sweep; the first block to which it is new gets an adapter."""
        self.swept += 1
        novelty = torch.stack([scores.min() for scores in self.novelty(x)])
        for i, score in enumerate(novelty.tolist()):
            if i not in self.grown and score > self.threshold:
                mixture = self.mixtures[i]
                mixture.resize(len(mixture.experts) + 1, self.rng("init"))
                mixture.to(self.device)
                self.grown, self.learning, self.added = [*self.grown, i], [i], True
                self._enter("function", -1)
                break
        return {"novelty": novelty.max()}

    @torch.no_grad()
    def novelty(self, x: Tensor) -> list[Tensor]:
        """Of every mixture, the mean deviation of the images from each of its descriptors, [K]."""
        _, means = self.passed_through(x)
        return [
            torch.stack([one.deviation(m).mean() for one in mixture.each()])
            for mixture, m in zip(self.mixtures, means, strict=True)
        ]

    def report(self) -> dict[str, float]:
        added = sum(len(m.experts) - 1 for m in self.mixtures)
        return super().report() | {"adapters_added": added}

    def updated_parameters(self) -> list[nn.Parameter]:
        """Each learns in some phase; between tasks, none has an optimiser."""
        return [*self.bank.parameters(), *self.head.parameters()]

    # ------------------------------------------------------------------ prediction

    def extractors(self) -> dict[str, str]:
        """The network with all adapters, which changes in a task that adds one."""
        if not self._hash:
            named = self.bank.state_dict().items()
            apart = ("descriptor", "errors")
            self._hash = weights_hash({k: v for k, v in named if not set(apart) & {*k.split(".")}})
        return {NAME: self._hash}

    @torch.no_grad()
    def embed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        with evaluation_mode(self):
            return self.bank.features(x, NAME)[None]

    @torch.no_grad()
    def classify(self, features: Mapping[str, Tensor]) -> Tensor:
        return self.head(features[NAME])[:, : self.seen]

    def predict(self, x: Tensor) -> Tensor:
        """Scores [B, C_seen] for x float [B, 3, H, W] in [0, 1]."""
        return self.classify({NAME: self.embed(x, [NAME])[0]})

    # ------------------------------------------------------------------ state

    def get_extra_state(self) -> dict[str, Any]:
        plain = ("phase", "passed", "learning", "grown", "sweep", "swept", "added")
        held = {name: getattr(self, name) for name in plain}
        return held | {"experts": [len(m.experts) for m in self.mixtures]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        vars(self).update({k: v for k, v in state.items() if k != "experts"})

    def restore(self, state: Mapping[str, Any]) -> None:
        """First the experts and the optimiser that the state belongs to, then its values."""
        held = state["tensors"]["_extra_state"]
        self.set_extra_state(held)
        for mixture, count in zip(self.mixtures, held["experts"], strict=True):
            mixture.resize(count, self.rng("init"))
            mixture.to(self.device)
        self._enter(held["phase"], held["passed"])
        super().restore(state)
        self._hash = ""
