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
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le, MinLen
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.backbones.load import load_strict, load_tensors
from driftline.core.errors import Diverged, UserError
from driftline.core.ranges import Count, NonNegative, Size, Unit
from driftline.core.seed import generator
from driftline.core.strategy import Progress, TTAStrategy
from driftline.core.stream import Batch, SourceImages
from driftline.parts import teacher, views
from driftline.parts.adapters.dual_rank import dual_rank
from driftline.parts.modes import evaluating
from driftline.parts.objectives import consistency
from driftline.parts.optim import Optim
from driftline.parts.warmup import WarmUp

MARK = "vida_"  # in the name of every adapter parameter, and of no other


class AdaptedLinear(nn.Module):
    """A linear layer with two bottlenecks beside it; the names are those of released checkpoints.

    `y = W x + b + s1 up down x + s2 up2 down2 x`, computed as one product of rank r1 + r2.

    Args:
        linear: the layer to wrap; it keeps its weights.
        low, high: ranks r1 and r2.
        rng: draws `down` and `down2` with standard deviation 1/rank²; `up` and `up2` start at 0.
    """

    scales: Tensor  # [2], s1 and s2

    def __init__(self, linear: nn.Linear, low: int, high: int, rng: torch.Generator) -> None:
        super().__init__()
        weight = linear.weight
        place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.linear_vida = linear
        self.vida_down = nn.Linear(linear.in_features, low, bias=False, **place)
        self.vida_up = nn.Linear(low, linear.out_features, bias=False, **place)
        self.vida_down2 = nn.Linear(linear.in_features, high, bias=False, **place)
        self.vida_up2 = nn.Linear(high, linear.out_features, bias=False, **place)
        for down, up in ((self.vida_down, self.vida_up), (self.vida_down2, self.vida_up2)):
            drawn = torch.randn(down.weight.shape, generator=rng, dtype=torch.float32)
            down.weight.data.copy_(drawn / down.out_features**2)
            up.weight.data.zero_()
        self.register_buffer("scales", torch.ones(2, **place), persistent=False)

    @property
    def weight(self) -> Tensor:
        """Only asked for by attention layers that bypass `forward`.

        Raises:
            UserError: always.
        """
        raise UserError(
            "strategy=vida: this backbone's attention reads the weights of its linear layers "
            "without calling them, so that adapters would have no effect. Leave its class out of "
            "strategy.attention, or use a timm vision transformer (backbone=vit_b16_in1k)"
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        down = [self.vida_down.weight, self.vida_down2.weight]
        up = [self.vida_up.weight, self.vida_up2.weight]
        base = self.linear_vida(x)
        return dual_rank(x, down, up, self.scales, base=base, in_place=True)


def add_adapters(
    net: nn.Module, attention: Sequence[str], low: int, high: int, rng: torch.Generator
) -> list[AdaptedLinear]:
    """Wrap every linear layer directly under a module whose class name matches `attention`."""
    places = [
        (module, name, child)
        for module in net.modules()
        if any(fnmatchcase(type(module).__name__, pattern) for pattern in attention)
        for name, child in module.named_children()
        if isinstance(child, nn.Linear)
    ]
    made = []
    for module, name, child in places:
        made.append(AdaptedLinear(child, low, high, rng))
        setattr(module, name, made[-1])
    return made


def adapters(net: nn.Module) -> list[AdaptedLinear]:
    """The adapted layers of `net`, in module order."""
    return [m for m in net.modules() if isinstance(m, AdaptedLinear)]


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
        optim: Optim,
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

        net = backbone.net
        # Not from `self.rng`: no draw follows, and a checkpoint need not carry its state.
        if not add_adapters(net, attention, *self.ranks, generator(seed, "strategy", "adapters")):
            raise UserError(
                f"strategy=vida adapts the linear layers of attention modules, and {backbone.tag} "
                f"has none (strategy.attention={list(attention)}); the authors released no "
                "adapters for convolutions. Use a vision transformer (backbone=vit_b16_in1k), or "
                "strategy=cotta"
            )
        if checkpoint is not None:
            load_source_vida(net, checkpoint)
        base = [p for n, p in net.named_parameters() if MARK not in n]
        added = [p for n, p in net.named_parameters() if MARK in n]
        net.requires_grad_(update)
        if not train_base:
            for parameter in base:
                parameter.requires_grad_(False)
        # The teacher and the copy to restore from are made of the student and follow its start.
        self.teacher = deepcopy(backbone).requires_grad_(False).eval()
        self.source = deepcopy(self.teacher) if self.restore_prob else None
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
        self.register_buffer("scales", torch.ones_like(adapters(net)[0].scales))

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
        trained = {n: p for n, p in self.backbone.net.named_parameters() if MARK in n}
        for parameter in trained.values():
            parameter.requires_grad_(True)

        def loss(batch: Batch) -> Tensor:
            return F.cross_entropy(self.backbone(batch.x), batch.y)

        # Adapters alone are the module: what is kept of an unfinished warm-up is then small.
        branches = [m for n, m in self.backbone.net.named_modules() if _is_branch(n)]
        self.warmup.run(nn.ModuleList(branches), loss, source, progress)
        return {n: p.detach() for n, p in trained.items()}

    def use_prepared(self, artefact: Mapping[str, Tensor]) -> None:
        """Student and teacher start from these adapters."""
        self._load({f"net.{name}": tensor for name, tensor in artefact.items()})

    @torch.no_grad()
    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors, by their name in the backbone, into student and teacher."""
        for network in (self.backbone, self.teacher):
            wrong = network.load_state_dict(tensors, strict=False).unexpected_keys
            assert not wrong, wrong

    def begin_stream(self) -> None:
        """Keep the student's state, to which `reset` goes back.

        It is the copy to restore from where there is one, else a copy in main memory.
        """
        state = self.backbone.state_dict()
        if self.source is not None:
            self.source.load_state_dict(state)
        else:
            moving = state.keys() - self._fixed()
            self._start = {k: state[k].to("cpu", copy=True) for k in state if k in moving}

    def _beginning(self) -> Mapping[str, Tensor]:
        return self._start if self.source is None else self.source.state_dict()

    def _fixed(self) -> set[str]:
        """Names of backbone parameters that neither train nor belong to an adapter."""
        named = self.backbone.named_parameters()
        return {n for n, p in named if not p.requires_grad and MARK not in n}

    # ------------------------------------------------------------------ state

    def frozen(self) -> set[str]:
        """Weights that do not train, and the copy to restore from, but no adapters."""
        fixed = {f"{which}.{n}" for which in ("backbone", "teacher") for n in self._fixed()}
        held = () if self.source is None else self.source.state_dict()
        return fixed | {f"source.{name}" for name in held}

    def snapshot(self) -> dict[str, Any]:
        """Also the adapters of the start, which need not be what a new instance has."""
        start = {k: v for k, v in self._beginning().items() if MARK in k}
        return super().snapshot() | {"start": start}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        if self.source is None:
            self._start.update(state["start"])
        else:
            self.source.load_state_dict(state["start"], strict=False)
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
            return self.teacher(x)

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
            target = self.teacher(x)
        with torch.enable_grad():
            loss = self.loss(self.backbone(x), target)
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
        if self.source is not None:
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
            scores += self.teacher(images).split(len(x))
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
        layers = [layer.scales for n in (self.backbone, self.teacher) for layer in adapters(n)]
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
        averaged = dict(self.teacher.named_parameters())
        moved = {n: p for n, p in self.backbone.named_parameters() if p.requires_grad}
        for of_adapter, ema in ((False, self.ema), (True, self.ema_adapters)):
            names = [n for n in moved if (MARK in n) == of_adapter]
            teacher.move_average([averaged[n] for n in names], [moved[n] for n in names], ema)

    def restore_mask(self, parameter: Tensor) -> Tensor:
        """Boolean, shaped like `parameter`: True where it returns to its start."""
        return teacher.restore_mask(parameter, self.restore_prob, self._bulk())

    @torch.no_grad()
    def restore_weights(self) -> None:
        """Put a random subset of everything trained, tokens and adapters too, back to the start."""
        assert self.source is not None
        pairs = zip(self.backbone.parameters(), self.source.parameters(), strict=True)
        for parameter, start in pairs:
            if parameter.requires_grad:
                torch.where(self.restore_mask(parameter), start, parameter, out=parameter)


def _is_branch(name: str) -> bool:
    """Whether a module's name is that of a bottleneck's linear layer."""
    return name.rpartition(".")[2].startswith(MARK)


def load_source_vida(net: nn.Module, path: str) -> None:
    """Load base weights and adapters from a file of the authors or of this project.

    Raises:
        UserError: for a file that cannot be read or does not fit in names and shapes.
    """
    try:
        load_strict(net, load_tensors(path), path)
    except UserError as error:
        raise UserError(
            str(error).replace("backbone.checkpoint", "strategy.checkpoint")
            + ". strategy.checkpoint is a network with ViDA adapters; the weights of a plain "
            "network belong to backbone.checkpoint"
        ) from error
