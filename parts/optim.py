"""How parameters learn: optimiser, schedule, rates of groups, clipping, sharpness-aware steps.

    self.optimizer = optim.optimizer({"adapter": adapters, "head": head.parameters()})
    optim.set_rates(self.optimizer, epoch, epochs)             # at the start of an epoch
    optim.step(self.optimizer, loss)                           # backward and update

The optimiser belongs to the method, whose state it is part of; an `Optim` holds settings alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from driftline.core.build import check_call
from driftline.core.distributed import average_gradients
from driftline.core.errors import Diverged, UserError, suggest
from driftline.core.ranges import Below1, CountOrZero, NonNegative, Positive, Unit, Without


@dataclass(frozen=True, kw_only=True)
class Optim:
    """Settings of the learning.

    Args:
        kind: `sgd` (reads `momentum`, `nesterov`; no dampening), `adam` or `adamw` (read `betas`;
            eps 1e-8).
        lr: initial learning rate.
        rates, factors: of groups that have their own initial rate, by the method's name of the
            group: the rate itself, or as a multiple of `lr`.
        weight_decay: of everything that learns.
        rise: epochs in which the rate grows from 0 to its initial value: step by step in a source
            phase, else epoch by epoch, so that nothing moves in the first.
        schedule: after that, by epoch. `constant`; `cosine`: (1 + cos(pi e / E)) / 2 of the initial
            rate; `steps`: times `decay` at each of `milestones` (epochs); `linear`: in equal steps
            to `decay` times the initial rate, from the first of `milestones` to the last;
            `quarter_cosine`: cos(0.495 pi e' / (E - 1)) of it, where e' is 0 in the first two
            epochs and e - 1 after them (as in the codes of CODA-Prompt and InfLoRA).
        clip: largest norm of the whole gradient; None does not clip.
        sam: radius rho of sharpness-aware minimisation (Foret et al., ICLR 2021, arXiv 2010.01412):
            the gradient is taken where the loss is highest within rho, which costs a second pass;
            None: the plain gradient.
        lora_plus: rate of the second factors of low-rank products over that of the first (LoRA+,
            Hayou et al., ICML 2024, arXiv 2402.12354); None: one rate for both.
        later: those of these settings that differ from the second task on.

    Raises:
        UserError: for a setting of `later` that is none, or is out of its range.
    """

    kind: Literal["sgd", "adam", "adamw"]
    lr: NonNegative
    rates: dict[str, NonNegative] = field(default_factory=dict)
    factors: dict[str, NonNegative] = field(default_factory=dict)
    momentum: Unit = 0.0
    nesterov: bool = False
    betas: tuple[Below1, Below1] = (0.9, 0.999)
    weight_decay: NonNegative = 0.0
    rise: CountOrZero = 0
    schedule: Literal["constant", "cosine", "steps", "linear", "quarter_cosine"] = "constant"
    milestones: Sequence[CountOrZero] = ()
    decay: NonNegative = 0.1
    clip: Positive | None = None
    sam: Positive | None = None
    lora_plus: Positive | None = None
    later: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind == "sgd" and self.nesterov and self.momentum <= 0:
            raise UserError("strategy.optim.nesterov=true needs strategy.optim.momentum above 0")
        if self.schedule == "linear" and len(self.milestones) < 2:
            raise UserError(
                "strategy.optim.schedule=linear needs two epochs in strategy.optim.milestones: "
                "those in which the change begins and ends"
            )
        for key in self.later:
            if key not in vars(self) or key == "later":
                near = suggest(key, vars(self))
                raise UserError(f"strategy.optim.later has no option {key!r}{near}")
        check_call(Optim, self.settings() | self.later, at="strategy.optim.later")

    def of_task(self, index: int) -> Optim:
        """The settings for one task, counted from 0."""
        return replace(self, **self.later, later={}) if index else self

    def settings(self) -> dict[str, Any]:
        """All settings as JSON values, for the key of an artefact."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    def rate(self, group: str) -> float:
        """The initial rate of a group."""
        return self.rates.get(group, self.lr * self.factors.get(group, 1))

    def optimizer(
        self, groups: Mapping[str, Iterable[nn.Parameter]], second: Iterable[nn.Parameter] = ()
    ) -> Optimizer:
        """A fresh optimiser.

        Args:
            groups: parameters by the name of their group; one without parameters is left out.
            second: those among them that are second factors of low-rank products, for `lora_plus`.

        Raises:
            UserError: for a name in `rates` or `factors` that is no group, or `lora_plus` without
                second factors.
        """
        for name in (*self.rates, *self.factors):
            if name not in groups:
                raise UserError(
                    f"strategy.optim has a rate or factor of {name!r}{suggest(name, groups)}; "
                    f"groups of this method: {', '.join(groups)}"
                )
        raised = {id(p) for p in second} if self.lora_plus is not None else set()
        if self.lora_plus is not None and not raised:
            raise UserError("strategy.optim.lora_plus needs adapters that are low-rank products")
        rows: list[dict[str, Any]] = []
        for name, parameters in groups.items():
            parameters = list(parameters)
            rate = self.rate(name)
            plain = [p for p in parameters if id(p) not in raised]
            fast = [p for p in parameters if id(p) in raised]
            rows.append({"params": plain, "lr": rate, "name": name})
            rows.append({"params": fast, "lr": rate * (self.lora_plus or 1), "name": f"{name}+"})
        rows = [row | {"initial_lr": row["lr"]} for row in rows if row["params"]]
        decay = self.weight_decay
        if self.kind == "sgd":
            return torch.optim.SGD(
                rows, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, weight_decay=decay
            )
        adam = torch.optim.Adam if self.kind == "adam" else torch.optim.AdamW
        return adam(rows, lr=self.lr, betas=self.betas, weight_decay=decay)

    def factor(self, epoch: int, epochs: int, step: int = 0, steps: int = 1) -> float:
        """Rate of `step` (of `steps`) in `epoch` (of `epochs`), relative to the initial one."""
        if epoch < self.rise:
            return (epoch * steps + step) / (self.rise * steps)
        if self.schedule == "cosine":
            past = math.pi * (epoch - self.rise) / max(1, epochs - self.rise)
            return (1 + math.cos(past)) / 2
        if self.schedule == "quarter_cosine":
            past = max(0, epoch - self.rise - 1) / max(1, epochs - self.rise - 1)
            return math.cos(0.495 * math.pi * past)
        if self.schedule == "steps":
            return self.decay ** sum(epoch >= m for m in self.milestones)
        if self.schedule == "linear":
            begin, end = min(self.milestones), max(self.milestones)
            share = min(1.0, max(0.0, (epoch - begin) / max(1, end - begin)))
            return 1 + share * (self.decay - 1)
        return 1.0

    def set_rates(
        self, optimizer: Optimizer | None, epoch: int, epochs: int, step: int = 0, steps: int = 1
    ) -> None:
        """Give every group the rate that `factor` names; a warning where that never has risen."""
        assert optimizer is not None
        if epoch == step == 0 and 0 < epochs <= self.rise:
            warnings.warn(
                f"optim.rise={self.rise} takes all of the {epochs} epochs: the rate does not reach "
                f"optim.lr={self.lr:g}{' and stays 0' if epochs == steps == 1 else ''}. Lower rise",
                stacklevel=3,
            )
        factor = self.factor(epoch, epochs, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def step(
        self,
        optimizer: Optimizer | None,
        loss: Tensor,
        again: Callable[[], Tensor] | None = None,
    ) -> None:
        """One update: `backward`, then `update`.

        Args:
            loss: 0-dim.
            again: computes the loss once more, for `sam`.

        Raises:
            Diverged: for a loss that is not finite, before anything is changed.
            UserError: for `sam` in a method that does not compute its loss again.
        """
        self.backward(optimizer, loss)
        self.update(optimizer, None if again is None else lambda: self.backward(optimizer, again()))

    def backward(self, optimizer: Optimizer | None, loss: Tensor) -> None:
        """Gradients of `loss`, after a look whether it is finite.

        Raises:
            Diverged: if it is not, naming the rate and the images as the causes.
        """
        assert optimizer is not None
        if not loss.detach().isfinite():
            raise Diverged(
                f"the training loss is {loss.item()}: lower strategy.optim.lr (now {self.lr:g}), "
                "or look for images that are not finite numbers"
            )
        optimizer.zero_grad()  # a loss that diverged leaves gradients behind
        loss.backward()

    def update(
        self, optimizer: Optimizer | None, again: Callable[[], object] | None = None
    ) -> None:
        """Clip, move the parameters, free the gradients.

        Args:
            again: leaves the gradients of the loss at the present parameters, for `sam`.

        Raises:
            UserError: as `step`.
        """
        assert optimizer is not None
        if self.sam is not None:
            if again is None:
                raise UserError("strategy.optim.sam: this method has no second pass; leave it null")
            before = ascend(optimizer, self.sam)
            optimizer.zero_grad()  # the first gradient is no part of the second
            again()
            descend(before)
        if self.clip is not None:
            average_gradients(optimizer)
            nn.utils.clip_grad_norm_([p for p, _ in _gradients(optimizer)], self.clip)
        optimizer.step()
        optimizer.zero_grad()


# What methods read of it that have no epochs, or the same settings for every task they learn.
StreamOptim = Annotated[
    Optim,
    Without(
        ("rise", "schedule", "milestones", "decay", "later"),
        "this method learns from a stream, which has no epochs and no tasks",
    ),
]
SameOptim = Annotated[Optim, Without(("later",), "this method learns every task alike")]
FirstOptim = Annotated[Optim, Without(("later",), "this method learns in the first task alone")]


def _gradients(optimizer: Optimizer) -> list[tuple[nn.Parameter, Tensor]]:
    """Parameters that have a gradient, with it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [(p, p.grad) for p in parameters if p.grad is not None]


@torch.no_grad()
def ascend(optimizer: Optimizer, rho: float) -> list[tuple[Tensor, Tensor]]:
    """Move the parameters by `rho` along their gradient, all together as one vector.

    Returns:
        parameters and their values before, for `descend`.
    """
    average_gradients(optimizer)
    pairs = _gradients(optimizer)
    norm = torch.stack([g.norm() for _, g in pairs]).norm()
    before: list[tuple[Tensor, Tensor]] = [(p, p.detach().clone()) for p, _ in pairs]
    for p, g in pairs:
        p.add_(g * (rho / (norm + 1e-12)))
    return before


@torch.no_grad()
def descend(before: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Give parameters the values that `ascend` found."""
    for p, value in before:
        p.copy_(value)
