"""PETAL: CoTTA with a posterior of the source weights, and restoration of what matters least.

Paper: "A Probabilistic Framework for Lifelong Test-Time Adaptation" (CVPR 2023, arXiv 2212.09713).
Code: github.com/dhanajitb/petal @ ae61118, whose `cifar` and `imagenet` folders differ as CoTTA's
do. `restore=fisher` is PETAL (FIM), `restore=random` PETAL (SRes).

What the code does, and may surprise: the weights that return to the source are those of the
smallest squared gradient in this batch, the penalty included, compared over all layers without any
scale; where more than their share has a gradient of exactly zero, none is below the quantile and
none returns. The penalty is zero in the first batch, as the start is its centre. Variances are a
difference of averages and can be slightly negative (`clamp_variance`).

Deviations that change no number: those of CoTTA; the quantile is found by selection on a CPU, not
by sorting; tensors that are never optimised have no part in the penalty, which is zero for them;
the statistics of BatchNorm are not measured again for the averaged weights, as adaptation never
uses them; `quantile=1` is the largest value, where the code reads past the end.
Deviations that do: those of CoTTA; after the first epoch of the CIFAR recipe, one step of a cosine
takes 0.003 % of the rate, which is left out here.

The posterior: labelled source images fine-tune the network, in evaluation mode and with the
pretrained statistics, as in the code, and weights and their squares are averaged on the way (SWAG,
diagonal). The authors' script for ImageNet (`train-swag-diagonal-imagenet.py`) never advances its
counter of batches, so that it takes no step and no average: its mean is the network as it was, its
"variance" w - w^2 of each weight w. Here, what it sets out to do is done. Its two passes a step,
whose gradients are added, are one of twice the images, with twice the rate and half the decay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.backbones.checkpoints import load_tensors, require_fit
from driftline.core.errors import UserError
from driftline.core.ranges import Count, CountOrZero, NonNegative, Unit
from driftline.core.strategy import Progress
from driftline.core.stream import Batch, SourceImages
from driftline.parts.norms import batch_norms, collect_parameters
from driftline.parts.optim import StreamOptim
from driftline.parts.warmup import WarmUp
from driftline.tta.cotta import CoTTA

DAMP = 1e-6  # added to every variance
SUFFIXES = ("_swa", "_cov")  # of the authors' files with the mean and the variance


def quantile(values: Tensor, share: float) -> Tensor:
    """The `share` quantile of `values` [n], linear between two of them; 0-dim.

    Unlike `torch.quantile`, it takes any number of values.
    """
    place = share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    if values.device.type == "cpu":
        below, above = (values.kthvalue(k + 1).values for k in (low, high))
    else:  # there, sorting is quick, and selecting one of many values is not
        ordered = values.sort().values
        below, above = ordered[low], ordered[high]
    return below + (above - below) * (place - low)


def smallest_gradients(parameters: Sequence[Tensor], share: float) -> list[Tensor]:
    """Boolean, shaped like each: where the squared gradient is below the `share` quantile of all.

    A parameter without a gradient is False everywhere and does not count.
    """
    learned = [p for p in parameters if p.grad is not None]
    squares = torch.cat([p.grad.flatten() for p in learned if p.grad is not None]).square_()
    small = iter((squares < quantile(squares, share)).split([p.numel() for p in learned]))
    return [
        torch.zeros_like(p, dtype=torch.bool) if p.grad is None else next(small).view(p.shape)
        for p in parameters
    ]


class LeastImportant(CoTTA):
    """CoTTA that puts back the weights with the smallest squared gradients, not random ones."""

    backbone: Any  # a Backbone; the parent promises less
    quantile: float  # share of the weights that return
    by_fisher = True
    _small: Sequence[Tensor] = ()  # of the last gradients, like the optimised weights

    def backward(self, x: Tensor, target: Tensor) -> Tensor:
        """As CoTTA's; also notes which weights have the smallest gradients."""
        logits = super().backward(x, target)
        if self.by_fisher:
            self._small = self.smallest_gradients()
        return logits

    def smallest_gradients(self) -> list[Tensor]:
        """Boolean, shaped like each optimised weight: True where it returns to the source."""
        return smallest_gradients([p for p, _ in self.restorable], self.quantile)

    @torch.no_grad()
    def restore_weights(self) -> None:
        """Put weights back to the source; the optimiser's moments stay."""
        if not self.by_fisher:
            super().restore_weights()
            return
        for (parameter, source), small in zip(self.restorable, self._small, strict=True):
            torch.where(small, source, parameter, out=parameter)


class Averages(nn.Module):
    """A network in training, and running means of its weights and of their squares."""

    count: Tensor

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        zeros = [torch.zeros_like(p) for p in backbone.parameters()]
        self.mean = nn.ParameterList(nn.Parameter(z, requires_grad=False) for z in zeros)
        self.square = nn.ParameterList(nn.Parameter(z.clone(), requires_grad=False) for z in zeros)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def add(self) -> None:
        """Take in the weights as they are."""
        self.count += 1
        weights = self.backbone.parameters()
        for p, mean, square in zip(weights, self.mean, self.square, strict=True):
            mean += (p - mean) / self.count
            square += (p.square() - square) / self.count


class PETAL(LeastImportant):
    """CoTTA whose student is drawn to the mean of the source posterior and partly put back to it.

    Args:
        backbone, seed, optim, loss, threshold, gate, views, average, always_draw, restore_prob,
            ema, steps, mode, rng, view_chunk: as in CoTTA; the source is the posterior's mean, and
            `restore_prob` counts for `restore=random` alone.
        restore: after an update, weights return to the source where their squared gradient is
            among the smallest (`fisher`), or by chance (`random`).
        quantile: share of the weights that return under `fisher`.
        reg_weight: factor on half the squared distance from the mean, each weight's divided by its
            variance plus 1e-6.
        clamp_variance: take negative variances as 0; the code leaves them, and one below -1e-6
            pushes its weight away from the mean.
        warmup: fine-tuning on labelled source images that gives the posterior; null: there is none,
            which asks for `reg_weight=0`.
        averages: times an epoch that the weights are averaged, evenly and at its end.
        averages_from: epoch of the fine-tuning, from 0, in which that begins.
        checkpoint: file of the authors' scripts with the mean, `*_swa.pt`; the variance lies beside
            it as `*_cov.pt`. Replaces `warmup`.
        update: false only predicts with the posterior's mean: what the source phase alone is worth.

    One image and a short last batch adapt like any other batch; networks without batch
    normalisation too; only a map of a single pixel for a single image raises a UserError.

    Raises:
        UserError: for a penalty without a posterior, a fine-tuning that averages nothing, or a
            file that cannot be read or does not fit.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        optim: StreamOptim,
        loss: Literal["ce", "sce"],
        threshold: NonNegative | Literal["source"],
        gate: Literal["batch", "sample"],
        views: Count,
        average: Literal["logits", "probabilities"],
        always_draw: bool,
        restore: Literal["fisher", "random"],
        quantile: Unit,
        restore_prob: Unit,
        reg_weight: NonNegative,
        clamp_variance: bool,
        ema: Unit,
        steps: Count,
        mode: Literal["train", "eval"],
        rng: Literal["reference", "device"],
        view_chunk: Count,
        warmup: WarmUp | None,
        averages: Count,
        averages_from: CountOrZero,
        checkpoint: str | None,
        update: bool,
    ) -> None:
        if reg_weight and warmup is None and checkpoint is None:
            raise UserError(
                "strategy.reg_weight weighs the distance from the posterior of the source weights, "
                "and there is none: set strategy.warmup or strategy.checkpoint, or reg_weight=0"
            )
        if warmup is not None and averages_from >= warmup.epochs:
            raise UserError(
                f"strategy.averages_from={averages_from} leaves no epoch to average in: set it "
                f"below strategy.warmup.epochs={warmup.epochs}"
            )
        # Fine-tuning reads the pretrained statistics, which adaptation takes away.
        norms = batch_norms(backbone.net).values()
        pretrained = [(m, m.running_mean, m.running_var) for m in norms]
        super().__init__(
            backbone,
            seed=seed,
            optim=optim,
            loss=loss,
            threshold=threshold,
            gate=gate,
            views=views,
            average=average,
            always_draw=always_draw,
            restore_prob=restore_prob,
            ema=ema,
            steps=steps,
            mode=mode,
            rng=rng,
            view_chunk=view_chunk,
        )
        self._pretrained = pretrained
        self.by_fisher, self.quantile = restore == "fisher", quantile
        self.reg_weight, self.clamp_variance = reg_weight, clamp_variance
        self.warmup, self.averages, self.averages_from = warmup, averages, averages_from
        self.checkpoint, self.update = checkpoint, update
        ones = [torch.ones_like(source) for _, source in self.restorable] if reg_weight else []
        self.variances = nn.ParameterList(nn.Parameter(v, requires_grad=False) for v in ones)
        if checkpoint is not None:
            self._use_posterior(load_posterior(backbone.net, checkpoint))

    # ------------------------------------------------------------------ before the stream

    @classmethod
    def uses_source(cls, options: Mapping[str, Any]) -> bool:
        tunes = options["warmup"] is not None and options["checkpoint"] is None
        return tunes or super().uses_source(options)

    def preparation(self) -> dict[str, Any] | None:
        threshold = super().preparation()
        if self.warmup is None or self.checkpoint is not None:
            return threshold
        when = {"averages": self.averages, "averages_from": self.averages_from}
        return {"warmup": self.warmup.settings(), "threshold": threshold} | when

    def prepare(self, source: SourceImages, progress: Progress) -> dict[str, Tensor]:
        """Mean and variance of the weights, by name, and CoTTA's threshold where it is asked for.

        Every parameter of the network is fine-tuned.
        """
        artefact: dict[str, Tensor] = {}
        if self.warmup is not None and self.checkpoint is None:
            for layer, mean, var in self._pretrained:
                layer.running_mean, layer.running_var = mean, var
                layer.track_running_stats = mean is not None
            trained = Averages(self.backbone.eval().requires_grad_(True))

            def loss(batch: Batch) -> Tensor:
                return F.cross_entropy(self.backbone(batch.x), batch.y)

            def after(epoch: int, step: int, steps: int) -> None:
                due = step * self.averages // steps > (step - 1) * self.averages // steps
                if due and epoch >= self.averages_from:
                    trained.add()

            self.warmup.run(trained, loss, source, progress, after)
            names = [name for name, _ in self.backbone.net.named_parameters()]
            for name, mean, square in zip(names, trained.mean, trained.square, strict=True):
                artefact[f"mean.{name}"] = mean.detach()
                artefact[f"variance.{name}"] = (square - mean.square()).detach()
            self._use_posterior(artefact)
        return artefact | (super().prepare(source, progress) if self.by_source else {})

    def use_prepared(self, artefact: Mapping[str, Tensor]) -> None:
        self._use_posterior(artefact)
        if self.by_source:
            super().use_prepared(artefact)

    @torch.no_grad()
    def _use_posterior(self, posterior: Mapping[str, Tensor]) -> None:
        """Start from the mean, if there is one; all three networks are equal then."""
        for network in (self.backbone, self.teacher, self.anchor):
            for name, parameter in network.net.named_parameters():
                parameter.copy_(posterior.get(f"mean.{name}", parameter))
        learned = collect_parameters(self.backbone.net) if self.variances else {}
        for name, variance in zip(learned, self.variances, strict=True):
            value = posterior.get(f"variance.{name}", variance)
            variance.copy_(value.clamp_min(0) if self.clamp_variance else value)

    def frozen(self) -> set[str]:
        """The variances too come with the posterior."""
        return super().frozen() | {f"variances.{i}" for i in range(len(self.variances))}

    # ------------------------------------------------------------------ adaptation

    def updated_parameters(self) -> Iterable[Tensor]:
        return super().updated_parameters() if self.update else []

    def adapt(self, x: Tensor) -> Tensor:
        """As CoTTA's."""
        return super().adapt(x) if self.update else self.predict(x)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """CoTTA's loss and the weighted penalty."""
        loss = super().loss(logits, target)
        return loss + self.reg_weight * self.penalty() if self.reg_weight else loss

    def penalty(self) -> Tensor:
        """Half the squared distance from the mean, in units of the variance; 0-dim."""
        pairs = zip(self.restorable, self.variances, strict=True)
        each = [((p - mean).square() / (v + DAMP)).sum() for (p, mean), v in pairs]
        return 0.5 * torch.stack(each).sum()


def load_posterior(net: nn.Module, path: str) -> dict[str, Tensor]:
    """Mean and variance of the weights of `net` from the files of the authors' scripts.

    Raises:
        UserError: for a file that cannot be read or does not fit in names and shapes.
    """
    swa, cov = SUFFIXES
    head, suffix, tail = path.rpartition(swa)
    if not suffix:
        raise UserError(
            f"strategy.checkpoint={path!r}: the name of the file with the mean ends in {swa}.pt, "
            f"and the variance lies beside it in {cov}.pt"
        )
    own: dict[str, Tensor] = dict(net.named_parameters())
    posterior: dict[str, Tensor] = {}
    for key, file in (("mean", path), ("variance", f"{head}{cov}{tail}")):
        # The statistics of BatchNorm lie in it too.
        buffers = ("running_mean", "running_var", "num_batches_tracked")
        loaded = load_tensors(file, setting="strategy.checkpoint")
        loaded = {n: t for n, t in loaded.items() if not n.endswith(buffers)}
        require_fit(net, own, loaded, file, setting="strategy.checkpoint")
        posterior |= {f"{key}.{name}": value for name, value in loaded.items()}
    return posterior
