"""ViDA: low- and high-rank adapters in the attention layers, weighted by the teacher's uncertainty.

Paper: "ViDA: Homeostatic Visual Domain Adapter for Continual Test Time Adaptation" (ICLR 2024,
arXiv 2306.04344). Code: github.com/Yangsenqiao/vida @ c26b0db, whose `cifar` and `imagenet` folders
differ (loss, restoration).

What the code does, and the paper does not say: every weight trains, not the adapters alone; the
setter of the scales never reaches the high-rank branch, whose scale stays 1 (`scale_rule`); the
uncertainty is the variance of the logits over views, one number per batch, times 0.1; the views are
forwarded with the scales of the previous batch; CIFAR restores with probability 0.1, the default of
a constructor, although the configuration files say 0.01.

Deviations that change no number: no anchor is kept (the code never reads its own) and the copy to
restore from only where something is restored; scales stay on the device.
Deviations that change rounding: both branches are one product of the sum of their ranks.
Deviations that do: a non-finite loss stops the run; `reset` also sets the scales back to 1
(`reset_scales=false` keeps them, as the code does); stream and random numbers are separate; layers
of attention classes with a longer name than `Attention` are adapted too (`attention`).

Before the stream the adapters are trained on labelled source images. The authors released the
result for ViT-B/16 (`checkpoint`) but not the training: `prepare` is a recipe of this project,
cross-entropy on adapters alone, and is not verified against theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le, MinLen
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.backbones.checkpoints import load_tensors, require_fit
from driftline.core.errors import Diverged, UserError
from driftline.core.ranges import Count, NonNegative, Size, Unit
from driftline.core.seed import generator
from driftline.core.strategy import Progress, TTAStrategy
from driftline.core.stream import Batch, SourceImages
from driftline.parts import teacher, views
from driftline.parts.adapters.bank import AdapterBank
from driftline.parts.adapters.dual_rank import DualRank
from driftline.parts.modes import evaluating
from driftline.parts.objectives import consistency
from driftline.parts.optim import StreamOptim
from driftline.parts.warmup import WarmUp

MARK = "vida_"  # in the name of every adapter parameter, and of no other


NAME = "vida"  # of the one set of adapters


def attach(
    backbone: Backbone, attention: Sequence[str], low: int, high: int, rng: torch.Generator
) -> AdapterBank:
    """Adapters at every linear layer directly under a module whose class name matches `attention`.

    Raises:
        UserError: for a network without such layers.
    """
    places = {
        f"{path}.{name}".lstrip("."): child
        for path, module in backbone.net.named_modules()
        if any(fnmatchcase(type(module).__name__, pattern) for pattern in attention)
        for name, child in module.named_children()
        if isinstance(child, nn.Linear)
    }
    if not places:
        raise UserError(
            f"strategy=vida adapts the linear layers of attention modules, and {backbone.tag} "
            f"has none (strategy.attention={list(attention)}); the authors released no "
            "adapters for convolutions. Use a vision transformer (backbone=vit_b16_in1k), or "
            "strategy=cotta"
        )
    adapters_by_point = {}
    for path, layer in places.items():
        new = DualRank(layer.in_features, layer.out_features, low, high, generator=rng)
        adapters_by_point[f"{path}:out"] = new.to(layer.weight)  # its type and place
    bank = AdapterBank(backbone, setting="strategy.attention")
    bank.add(NAME, adapters_by_point)
    return bank


def twin(bank: AdapterBank, backbone: Backbone) -> AdapterBank:
    """The same adapters on a copy of the network that has none yet; nothing of it learns."""
    new = AdapterBank(backbone.requires_grad_(False).eval(), setting="strategy.attention")
    new.add(NAME, deepcopy(bank.adapters(NAME)))
    return new.requires_grad_(False)


def adapters(bank: AdapterBank) -> list[DualRank]:
    """Adapters in the order of their layers."""
    return [cast(DualRank, one) for one in bank.adapters(NAME).values()]


def tensors(bank: AdapterBank) -> dict[str, Tensor]:
    """Weights of the network and its adapters, and the network's buffers, in the order of modules.

    The names are those of released checkpoints: there, a module in the place of an adapted layer
    holds the layer (`linear_vida`) and the two pairs (`vida_down`, `vida_up`, `vida_down2`,
    `vida_up2`).
    """
    layers = {point.removesuffix(":out"): one for point, one in bank.adapters(NAME).items()}
    named: dict[str, Tensor] = {}
    for path, module in bank.backbone.net.named_modules():
        passing = module._non_persistent_buffers_set
        own = {k: b for k, b in module.named_buffers(recurse=False) if k not in passing}
        own = dict(module.named_parameters(recurse=False)) | own
        prefix = f"{path}." if path else ""
        place = f"{prefix}linear_vida." if path in layers else prefix
        named |= {place + key: tensor for key, tensor in own.items()}
        pairs = layers[path].pairs() if path in layers else []
        for number, (down, up) in zip(("", "2"), pairs, strict=False):
            named |= {f"{prefix}vida_down{number}.weight": down}
            named |= {f"{prefix}vida_up{number}.weight": up}
    return named


def parameters(bank: AdapterBank) -> dict[str, nn.Parameter]:
    """Those of `tensors` that are parameters."""
    return {n: p for n, p in tensors(bank).items() if isinstance(p, nn.Parameter)}


class ViDA(TTAStrategy):
    """Student and teacher (moving average) of one network with adapters.

    Args:
        backbone: a classifier with attention layers; becomes the student.
        seed: of the adapters' start, the views and the restoration.
        optim: of two groups, `base` (the weights that the backbone came with) and `adapters`.
        loss: `ce`: H(teacher, student); `sce`: mean of both directions.
        attention: classes whose linear layers are adapted; shell patterns of class names.
        rank_low, rank_high: of the two branches.
        train_base: false trains the adapters alone.
        views: transformed copies of the batch whose spread is the uncertainty, at least 2.
        view_chunk: views per forward; more than 1 costs memory, serves accelerators and changes
            rounding at most.
        uncertainty: `logit_variance`: variance over views, mean of images and classes (official);
            `prob_distance`: root mean square distance of an image's probabilities from their mean
            over views, mean of images (as we read the paper, unverified).
        uncertainty_weight: factor on it.
        max_uncertainty: larger values are cut; null leaves them. Above 1 a scale is negative.
        threshold: uncertainty U from which the high rank gets 1 + U and the low rank 1 - U; below,
            the reverse.
        scale_rule: `official`: the high rank keeps scale 1; `paper`: both are set.
        reset_scales: whether `reset` sets the scales back to 1.
        ema, ema_adapters: weight of the old teacher in the moving average.
        restore_prob: chance per weight and update of returning to its start; 0 for none.
        checkpoint: file with base weights and trained adapters ("source ViDA"); replaces `warmup`.
        warmup: how adapters are trained on source images; null leaves them without effect.
        update: false only predicts: what the source phase alone is worth.
        rng: `reference` draws everything from one CPU generator in the code's order; `device`
            draws noise and masks where the weights are (other numbers, same distribution).

    One image and a short last batch adapt like any other batch. The student runs in training mode,
    the teacher in evaluation mode, as in the code.
    """

    needs = frozenset({"head"})
    prefers = "vit"
    backbone: Any  # a Backbone; the parent promises less
    seen: Tensor
    scales: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        optim: StreamOptim,
        loss: Literal["ce", "sce"],
        attention: Annotated[Sequence[str], MinLen(1)],
        rank_low: Size,
        rank_high: Size,
        train_base: bool,
        views: Annotated[int, Ge(2), Le(10**9)],
        view_chunk: Count,
        uncertainty: Literal["logit_variance", "prob_distance"],
        uncertainty_weight: NonNegative,
        max_uncertainty: NonNegative | None,
        threshold: NonNegative,
        scale_rule: Literal["official", "paper"],
        reset_scales: bool,
        ema: Unit,
        ema_adapters: Unit,
        restore_prob: Unit,
        checkpoint: str | None,
        warmup: WarmUp | None,
        update: bool,
        rng: Literal["reference", "device"],
    ) -> None:
        super().__init__(backbone, seed=seed)
        self.symmetric, self.attention, self.ranks = loss == "sce", attention, (rank_low, rank_high)
        self.views, self.view_chunk, self.threshold = views, view_chunk, threshold
        self.by_logits, self.uncertainty_weight = (
            uncertainty == "logit_variance",
            uncertainty_weight,
        )
        self.max_uncertainty, self.both_scales = max_uncertainty, scale_rule == "paper"
        self.reset_scales, self.ema, self.ema_adapters = reset_scales, ema, ema_adapters
        self.restore_prob = restore_prob if update else 0.0
        self.checkpoint, self.warmup, self.update = checkpoint, warmup, update
        self.optim = optim

        copies = [deepcopy(backbone) for _ in range(2 if self.restore_prob else 1)]  # no hooks yet
        # Not from `self.rng`: no draw follows, and a checkpoint need not carry its state.
        draws = generator(seed, "strategy", "adapters")
        self.bank = attach(backbone, attention, *self.ranks, draws)
        if checkpoint is not None:
            load_source_vida(self.bank, checkpoint)
        named = parameters(self.bank)
        base = [p for n, p in named.items() if MARK not in n]
        added = [p for n, p in named.items() if MARK in n]
        backbone.net.requires_grad_(update and train_base)
        self.bank.requires_grad_(update)
        # The teacher and the copy to restore from follow the student's start.
        self.teacher, *rest = copies
        self.teacher_bank = twin(self.bank, self.teacher)
        self.source = rest[0] if rest else None
        self.source_bank = twin(self.bank, rest[0]) if rest else None
        if checkpoint is not None:
            self._load(tensors(self.bank))
        self.backbone.train(update)
        if update:
            groups = {"base": base if train_base else [], "adapters": added}
            self.optimizer = optim.optimizer(groups)
            self._unused = deepcopy(self.optimizer.state_dict())
        self.on_device = rng == "device"
        # Both are made now: `restore` can only set a generator that is on the right device.
        self.rng("method")
        self._bulk()
        self._start: dict[str, Tensor] = {}
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        # Student and teacher have equal scales; this copy is the one in checkpoints.
        self.register_buffer("scales", torch.ones_like(adapters(self.bank)[0].scales))

    # ------------------------------------------------------------------ before the stream

    @classmethod
    def uses_source(cls, options: Mapping[str, Any]) -> bool:
        return True

    def preparation(self) -> dict[str, Any] | None:
        """Adapters and their warm-up; None where a checkpoint has it done or it is turned off."""
        if self.checkpoint is not None or self.warmup is None:
            return None
        return {
            "trains": "adapters",
            "attention": list(self.attention),
            "ranks": list(self.ranks),
            "seed": self.seed,
            "warmup": self.warmup.settings(),
        }

    def prepare(self, source: SourceImages, progress: Progress) -> dict[str, Tensor]:
        """Train the adapters by cross-entropy, base weights fixed, in evaluation mode.

        Returns:
            adapter parameters by their name in the network.
        """
        assert self.warmup is not None
        self.backbone.eval().requires_grad_(False)
        self.bank.requires_grad_(True)
        trained = {n: p for n, p in parameters(self.bank).items() if MARK in n}

        def loss(batch: Batch) -> Tensor:
            return F.cross_entropy(self.bank.logits(batch.x, NAME), batch.y)

        # Adapters alone are the module: what is kept of an unfinished warm-up is then small.
        self.warmup.run(nn.ParameterList(trained.values()), loss, source, progress)
        return {n: p.detach() for n, p in trained.items()}

    def use_prepared(self, artefact: Mapping[str, Tensor]) -> None:
        """Student and teacher start from these adapters."""
        self._load(artefact)

    def _load(self, values: Mapping[str, Tensor]) -> None:
        """Copy tensors, by the names of `tensors`, into student and teacher."""
        for bank in (self.bank, self.teacher_bank):
            _copy(values, bank)

    def begin_stream(self) -> None:
        """Keep the student's state, to which `reset` goes back.

        It is the copy to restore from where there is one, else a copy in main memory.
        """
        state = tensors(self.bank)
        if self.source_bank is not None:
            _copy(state, self.source_bank)
        else:
            fixed = {n for n, p in parameters(self.bank).items() if not p.requires_grad}
            moving = [n for n in state if n not in fixed or MARK in n]
            self._start = {n: state[n].detach().to("cpu", copy=True) for n in moving}

    def _beginning(self) -> Mapping[str, Tensor]:
        return self._start if self.source_bank is None else tensors(self.source_bank)

    # ------------------------------------------------------------------ state

    def frozen(self) -> set[str]:
        """Weights that do not train, and the copy to restore from, but no adapters."""
        fixed = {n for n, p in self.backbone.named_parameters() if not p.requires_grad}
        fixed = {f"{which}.{n}" for which in ("backbone", "teacher") for n in fixed}
        return fixed | {n for n in self.state_dict() if n.startswith(("source.", "source_bank."))}

    def snapshot(self) -> dict[str, Any]:
        """Also the adapters of the start, which need not be what a new instance has."""
        start = {k: v for k, v in self._beginning().items() if MARK in k}
        return super().snapshot() | {"start": start}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        if self.source_bank is None:
            self._start.update(state["start"])
        else:
            _copy(state["start"], self.source_bank)
        self._set_scales(self.scales)

    @torch.no_grad()
    def reset(self) -> None:
        """Student and teacher as at the start, the optimiser unused; generators run on.

        Scales that are not finite go back to 1 in any case.
        """
        self._load(self._beginning())
        if self.optimizer is not None:
            self.optimizer.load_state_dict(deepcopy(self._unused))
        if self.reset_scales or not self.scales.isfinite().all():
            self._set_scales(torch.ones_like(self.scales))

    # ------------------------------------------------------------------ adaptation

    def predict(self, x: Tensor) -> Tensor:
        """Scores [B, C] of the teacher on the images as they are, with the present scales."""
        with evaluating(self.teacher):
            return self.teacher_bank.logits(x, NAME)

    def adapt(self, x: Tensor) -> Tensor:
        """The teacher's scores [B, C], with this batch's scales, from before the update.

        Raises:
            Diverged: when the loss is not finite; no weight is updated then.
        """
        if not self.update:
            return self.predict(x)
        self.seen += 1
        with torch.no_grad():
            self._set_scales(self.scale_rule(self.uncertainty(x)))
            target = self.teacher_bank.logits(x, NAME)
        with torch.enable_grad():
            loss = self.loss(self.bank.logits(x, NAME), target)
        if not torch.isfinite(loss):
            raise Diverged(
                f"strategy=vida: the loss of batch {int(self.seen)} is {loss.item()}; the weights "
                "diverged. Lower strategy.optim.lr and strategy.optim.rates.adapters, set "
                "strategy.max_uncertainty=1 if the scales grew, or reset between domains; "
                "around=rollback does so by itself."
            )
        loss.backward()
        self.optim.update(self.optimizer, lambda: self.loss(self.backbone(x), target).backward())
        self.average_teacher()
        if self.source_bank is not None:
            self.restore_weights()
        return target

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy of the student's `logits` [B, C] against the teacher's `target`."""
        return consistency(logits, target, symmetric=self.symmetric)

    # ------------------------------------------------------------------ uncertainty and scales

    @torch.no_grad()
    def uncertainty(self, x: Tensor) -> Tensor:
        """Spread of the teacher's scores over random views of the batch, 0-dim."""
        scores: list[Tensor] = []
        for first in range(0, self.views, self.view_chunk):
            count = min(self.view_chunk, self.views - first)
            images = torch.cat([self.augment(x) for _ in range(count)])
            scores += self.teacher_bank.logits(images, NAME).split(len(x))
        spread = torch.stack(scores)  # [V, B, C]
        if self.by_logits:
            return self.uncertainty_weight * spread.var(0).mean()
        p = spread.softmax(2)
        distance = (p - p.mean(0)).square().sum(2).mean(0).sqrt()  # [B]
        return self.uncertainty_weight * distance.mean()

    def scale_rule(self, uncertainty: Tensor) -> Tensor:
        """Scales [2] of the low- and the high-rank branch for a 0-dim `uncertainty`."""
        if self.max_uncertainty is not None:
            uncertainty = uncertainty.clamp(max=self.max_uncertainty)
        more, less = 1 + uncertainty, 1 - uncertainty
        high_wins = uncertainty >= self.threshold
        low = torch.where(high_wins, less, more)
        high = torch.where(high_wins, more, less)
        return torch.stack([low, high if self.both_scales else torch.ones_like(high)])

    @torch.no_grad()
    def _set_scales(self, scales: Tensor) -> None:
        layers = [one.scales for b in (self.bank, self.teacher_bank) for one in adapters(b)]
        everywhere = [self.scales, *layers]
        torch._foreach_copy_(everywhere, [scales] * len(everywhere))

    def _bulk(self) -> torch.Generator:
        return self.rng("device", self.device) if self.on_device else self.rng("method")

    def augment(self, x: Tensor) -> Tensor:
        """One random view of the batch `x`."""
        draws = views.draw(self.rng("method"), x.shape, noise=self._bulk())
        return views.apply(x, draws)

    # ------------------------------------------------------------------ after the step

    @torch.no_grad()
    def average_teacher(self) -> None:
        """`teacher = ema * teacher + (1 - ema) * student`, with one weight for each group."""
        averaged = parameters(self.teacher_bank)
        moved = {n: p for n, p in parameters(self.bank).items() if p.requires_grad}
        for of_adapter, ema in ((False, self.ema), (True, self.ema_adapters)):
            names = [n for n in moved if (MARK in n) == of_adapter]
            teacher.move_average([averaged[n] for n in names], [moved[n] for n in names], ema)

    def restore_mask(self, parameter: Tensor) -> Tensor:
        """Boolean, shaped like `parameter`: True where it returns to its start."""
        return teacher.restore_mask(parameter, self.restore_prob, self._bulk())

    @torch.no_grad()
    def restore_weights(self) -> None:
        """Put a random subset of everything trained, tokens and adapters too, back to the start."""
        assert self.source_bank is not None
        starts = parameters(self.source_bank)
        for name, parameter in parameters(self.bank).items():
            if parameter.requires_grad:
                start = starts[name]
                torch.where(self.restore_mask(parameter), start, parameter, out=parameter)


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], bank: AdapterBank) -> None:
    """Set `tensors` of a network and its adapters, by name."""
    own = tensors(bank)
    for name, value in values.items():
        own[name].copy_(value)


def load_source_vida(bank: AdapterBank, path: str) -> None:
    """Load base weights and adapters from a file of the authors or of this project.

    Raises:
        UserError: for a file that cannot be read or does not fit in names and shapes.
    """
    try:
        loaded = load_tensors(path, setting="strategy.checkpoint")
        require_fit(bank.backbone.net, tensors(bank), loaded, path, setting="strategy.checkpoint")
    except UserError as error:
        raise UserError(
            f"{error}. strategy.checkpoint is a network with ViDA adapters; the weights of a plain "
            "network belong to backbone.checkpoint"
        ) from error
    _copy(loaded, bank)
