"""EcoTTA: small meta networks beside a frozen network, which keeps adaptation cheap in memory.

Paper: "EcoTTA: Memory-Efficient Continual Test-time Adaptation via Self-distilled Regularization"
(CVPR 2023, arXiv 2303.01904). **The authors published no training or adaptation code.** What can be
checked is a community implementation, github.com/Lily-Le/EcoTTA @ 85c1122; the defaults of
`procedure`, `entropy_margin`, `reg_weight` and the optimiser are its values, and the recorded
vectors come from it. Its users report above 90 % error on ImageNet-C; the other defaults are those
that work on ImageNet images, from the study in results/reference/ecotta_study.md. The code's whole
setting is in papers/ecotta.yaml: its recipes (CIFAR) and the row imagenet_c_resnet50_community.

The frozen network is cut into K parts, groups of its residual blocks. Beside each part lies a meta
network, a normalisation and a small convolution:

    a_k = part_k(x_{k-1});  x_k = BN_k(a_k) + ReLU(BN'_k(Conv_k(x_{k-1})))

Only the meta networks learn. They are warmed up on labelled source images before deployment, then
adapted to the stream by the entropy of confident predictions and by R_k = mean |x_k - a_k|, which
keeps every part near what the frozen network makes of the same input.

The paper's own choices are options where the code differs or the text leaves them open (none of
them could be verified): `procedure=joint`, one objective as in its formula; `reg_weight=0.5`;
`parts=4`; `meta_kernel`; `frozen_bn`.

Deviations that change no number: the K regularisers are summed and back-propagated once; running
statistics that are never read are not kept; parts whose input and weights need no gradient build
no graph.
Deviations that do: the input normalisation of the network stays (the code drops it for WRN-40-2);
dropout and stochastic depth are off (the code's networks have none); a batch without a confident
image makes no entropy step by default (`on_empty=momentum` is the code); non-finite scores stop the
run; `init=identity` is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, Literal, cast

import driftline.core.vision  # noqa: F401  # isort: skip

import torch
import torch.nn.functional as F
from annotated_types import MinLen
from torch import Tensor, nn
from torchvision.models import mobilenetv2, mobilenetv3

from driftline.backbones.backbone import Backbone
from driftline.core.errors import Diverged, UserError
from driftline.core.ranges import Count, NonNegative, Positive
from driftline.core.seed import derive
from driftline.core.strategy import Progress, TTAStrategy
from driftline.core.stream import Batch, SourceImages
from driftline.parts.norms import batch_norms, use_batch_statistics
from driftline.parts.objectives import entropy
from driftline.parts.optim import StreamOptim
from driftline.parts.warmup import WarmUp

# Where networks keep their residual blocks, in execution order.
SIBLINGS = (
    ("layer1", "layer2", "layer3", "layer4"),  # ResNet and its kin, torchvision and timm
    ("block1.layer", "block2.layer", "block3.layer"),  # WideResNet of RobustBench
    ("stage_1", "stage_2", "stage_3"),  # ResNeXt for CIFAR
    ("s1", "s2", "s3", "s4"),  # RegNet, timm
    ("stage2", "stage3", "stage4"),  # ShuffleNet
)
NESTED = ("blocks", "stages", "trunk_output")  # EfficientNet, MobileNet, ByobNet; RegNet
FLAT = (mobilenetv2.InvertedResidual, mobilenetv3.InvertedResidual)  # torchvision's `features`
# (blocks, parts) -> blocks per part: the paper's table as the community code quotes it.
TABLE = {
    (12, 4): [2, 2, 4, 4],  # WRN-28-10
    (12, 5): [2, 2, 2, 2, 4],
    (18, 4): [3, 3, 6, 6],  # WRN-40-2
    (18, 5): [3, 3, 3, 3, 6],
    (16, 4): [3, 3, 5, 5],  # ResNet-50
    (16, 5): [2, 2, 4, 4, 4],
}
MATCH_BATCH = 64  # images per forward while `init=identity` measures
OFFSET = 0.1  # what the convolution branch puts out at first under `init=identity`


def residual_blocks(net: nn.Module) -> list[nn.Module]:
    """The residual blocks of a convolutional network, in order; empty if not recognised."""
    for names in SIBLINGS:
        try:
            return [b for name in names for b in net.get_submodule(name).children()]
        except AttributeError:
            continue
    for name in NESTED:
        stages = getattr(net, name, None)
        if isinstance(stages, nn.Sequential):
            return [b for s in stages for b in cast(nn.Module, getattr(s, "blocks", s)).children()]
    layers: list[nn.Module] = []
    for child in cast(nn.Module, getattr(net, "features", nn.Sequential())).children():
        if type(child) is nn.Sequential:  # stages; convolutions are of a subclass
            layers += child
        elif isinstance(child, FLAT):
            layers.append(child)
    return layers


def find_blocks(backbone: Backbone) -> list[nn.Module]:
    """The residual blocks in order.

    Raises:
        UserError: for a network that the method is not defined for, with the reason.
    """
    wanted = "It is defined for convolutional networks with batch normalisation"
    if not batch_norms(backbone.net):
        raise UserError(
            f"strategy=ecotta: the backbone {backbone.tag} has no batch normalisation. {wanted}; "
            "for a ViT use strategy=cotta or strategy=tent strategy.layers=norm."
        )
    blocks = residual_blocks(backbone.net)
    if not blocks:
        raise UserError(
            f"strategy=ecotta does not know where {backbone.tag} keeps its residual blocks. "
            f"{wanted}: ResNet, WideResNet, RegNet, EfficientNet, MobileNet."
        )
    return blocks


def trace(backbone: Backbone, blocks: Sequence[nn.Module]) -> list[tuple[torch.Size, torch.Size]]:
    """Input and output shape of every block for one blank image; changes no statistics.

    Raises:
        UserError: if the blocks are not a chain that each image passes once.
    """
    shapes: list[tuple[torch.Size, torch.Size]] = []
    order: list[int] = []

    def note(index: int, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        order.append(index)
        if all(isinstance(t, Tensor) and t.ndim == 4 for t in (inputs[0], output)):
            shapes.append((inputs[0].shape, output.shape))

    hooks = [b.register_forward_hook(partial(note, i)) for i, b in enumerate(blocks)]
    first = next(backbone.parameters())
    side = backbone.input_size
    try:
        with torch.no_grad():
            backbone.net(torch.zeros(1, 3, side, side, device=first.device, dtype=first.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    chained = all(a[1] == b[0] for a, b in pairwise(shapes))
    if order != list(range(len(blocks))) or len(shapes) != len(blocks) or not chained:
        raise UserError(
            f"strategy=ecotta cannot cut {backbone.tag} into parts: its residual blocks are not a "
            "plain chain. Use a ResNet, WideResNet, RegNet, EfficientNet or MobileNet."
        )
    return shapes


def blocks_per_part(
    parts: Sequence[int] | int | str, shapes: Sequence[tuple[torch.Size, torch.Size]]
) -> list[int]:
    """`parts` as one count of blocks per part, see `EcoTTA`.

    Raises:
        UserError: for counts that do not fit the network.
    """
    total = len(shapes)
    if parts == "stages":
        counts, side = [0], shapes[0][1][2]
        for _, out in shapes:
            if out[2] != side:
                counts.append(0)
                side = out[2]
            counts[-1] += 1
        return counts
    if isinstance(parts, int):
        parts = min(parts, total)
        short, longer = divmod(total, parts)
        even = [short] * (parts - longer) + [short + 1] * longer
        return TABLE.get((total, parts), even)
    counts = list(parts) if not isinstance(parts, str) else []
    if sum(counts) != total or min(counts) < 1:
        raise UserError(
            f"strategy.parts={parts}: the network has {total} residual blocks; give counts of at "
            f"least 1 that add up to {total}, a number of parts, or stages"
        )
    return counts


class ConvBlock(nn.Module):
    """ReLU(BN'(Conv(x))): `x` [B, I, h, w] to [B, O, h/stride, w/stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class MetaPart(nn.Module):
    """What lies beside one part; its parameters are named as in the community code."""

    def __init__(self, inputs: int, outputs: int, stride: int, kernel: int) -> None:
        super().__init__()
        self.meta_bn = nn.BatchNorm2d(outputs)
        self.conv_block = ConvBlock(inputs, outputs, stride, kernel)

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        """x_k [B, O, h/stride, w/stride] from the part's input `x` and frozen output `a`."""
        return self.meta_bn(a) + self.conv_block(x)


class Moments:
    """Mean and variance per channel over many batches, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.square: Tensor | float = 0.0  # sum of squared distances from the mean

    def add(self, x: Tensor) -> None:
        """Take in `x` [B, C, H, W]."""
        var, mean = (t.double() for t in torch.var_mean(x, dim=(0, 2, 3), correction=0))
        new = x.numel() // x.size(1)
        total = self.count + new
        shift = mean - self.mean
        self.square = self.square + var * new + shift.square() * (self.count * new / total)
        self.mean = self.mean + shift * (new / total)
        self.count = total

    def fill(self, layer: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
        """Set the running statistics of `layer`, if it keeps any; returns mean and variance."""
        mean, var = torch.as_tensor(self.mean), torch.as_tensor(self.square / self.count)
        if layer.running_mean is not None and layer.running_var is not None:
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(var)
        return mean, var


class EcoTTA(TTAStrategy):
    """A frozen network with K meta networks, the only thing that learns.

    Args:
        backbone: a convolutional network with batch normalisation and a chain of residual blocks.
        seed: of the initial convolutions.
        parts: `stages`: a part for every resolution; a number K (at most one part per block): the
            paper's table where it has the network's number of blocks, otherwise even, longer
            parts last; or a list of blocks per part.
        meta_kernel: of the convolutions, 1 or 3.
        init: `community`: as layers are initialised by default, useless before a warm-up;
            `identity`: the scale and shift of BN_k are set to the moments of a_k on source images
            and the convolution branch to a constant that cancels, so that the network computes
            what the frozen network does as long as the statistics are those of the source.
        warmup: training of the meta networks on labelled source images, or None.
        frozen_bn: statistics in the frozen network, while warming up and adapting: of the
            `batch`, or the pretrained `running` ones.
        meta_bn: statistics in the meta networks while adapting: of the `batch`, or the `running`
            ones from the source images.
        update: False keeps the prepared meta networks as they are.
        procedure: `community`: a step on the regulariser, within each part, then a second
            forward and a step on the entropy; `joint`: one forward, one step on the sum, whose
            regulariser also reaches earlier parts.
        entropy_margin: share of ln C below which an entropy counts as confident.
        reg_weight: lambda, of the regulariser.
        on_empty: without a confident image in the batch, `skip` the step that has the entropy in
            it (`skipped` counts such batches since the last reset), or make it with a zero
            gradient, so that SGD's `momentum` still moves the weights.
        optim: of the meta networks, the one group `meta`.

    One image and a short last batch adapt like any other batch; only a map of a single pixel for
    a single image raises a UserError.
    """

    needs = frozenset({"head", "batch_norm"})
    batch_dependent = True
    skipped: Tensor
    seen: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        parts: Count | Literal["stages"] | Annotated[Sequence[Count], MinLen(1)],
        meta_kernel: Literal[1, 3],
        init: Literal["community", "identity"],
        warmup: WarmUp | None,
        frozen_bn: Literal["batch", "running"],
        meta_bn: Literal["batch", "running"],
        update: bool,
        procedure: Literal["community", "joint"],
        entropy_margin: Positive,
        reg_weight: NonNegative,
        on_empty: Literal["skip", "momentum"],
        optim: StreamOptim,
    ) -> None:
        super().__init__(backbone, seed=seed)
        self.init, self.warmup, self.update = init, warmup, update
        self.frozen_bn, self.meta_bn = frozen_bn, meta_bn
        self.procedure, self.on_empty = procedure, on_empty
        self.entropy_margin, self.reg_weight, self.optim = entropy_margin, reg_weight, optim

        backbone.eval().requires_grad_(False)
        blocks = find_blocks(backbone)
        shapes = trace(backbone, blocks)
        self.parts = blocks_per_part(parts, shapes)
        self.meta = self._attach(blocks, shapes, meta_kernel).eval()
        if frozen_bn == "batch":
            use_batch_statistics(backbone.net)
        if meta_bn == "batch":
            use_batch_statistics(self.meta)
        if update:
            self.optimizer = optim.optimizer({"meta": self.meta.parameters()})
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))

    # ------------------------------------------------------------------ the network

    @property
    def networks(self) -> list[MetaPart]:
        """The meta networks, in order."""
        return [m for m in self.meta if isinstance(m, MetaPart)]

    def _attach(
        self, blocks: list[nn.Module], shapes: list[tuple[torch.Size, torch.Size]], kernel: int
    ) -> nn.ModuleList:
        """One meta network per part, fed by hooks on the part's first and last block."""
        metas, first = nn.ModuleList(), 0
        # What passes through the hooks of the current forward: inputs of the parts, the distances
        # R_k (for "local" and "joint"), and moments (for "measure").
        self._route: Literal["adapted", "local", "joint", "measure"] = "adapted"
        self._inputs: dict[int, Tensor] = {}
        self._distances: list[Tensor] = []
        self._moments: list[tuple[Moments, Moments]] = []
        parameter = next(self.backbone.parameters())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.seed, "strategy", "meta networks"))
            for k, count in enumerate(self.parts):
                last = first + count - 1
                (_, inputs, high, _), (_, outputs, low, _) = shapes[first][0], shapes[last][1]
                stride = max(1, round(high / low))
                if -(-high // stride) != low:
                    raise UserError(
                        f"strategy.parts: part {k + 1} maps {high} to {low} pixels, which no "
                        "stride does; choose other parts"
                    )
                metas.append(MetaPart(inputs, outputs, stride, kernel))
                blocks[first].register_forward_pre_hook(partial(self._enter, k))
                blocks[last].register_forward_hook(partial(self._leave, k))
                first = last + 1
        return metas.to(device=parameter.device, dtype=parameter.dtype)

    def _enter(self, k: int, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._inputs[k] = inputs[0]

    def _leave(self, k: int, block: nn.Module, inputs: Any, a: Tensor) -> Tensor:
        """What leaves part `k` in place of the frozen output `a`."""
        x, meta = self._inputs.pop(k), self.networks[k]
        if self._route == "measure":
            for moments, seen in zip(self._moments[k], (a, meta.conv_block.conv(x)), strict=True):
                moments.add(seen)
            return a
        out = meta(x, a)
        if self._route == "adapted":
            return out
        self._distances.append((out - a.detach()).abs().mean())
        return out.detach() if self._route == "local" else out

    def _forward(self, x: Tensor, route: Literal["adapted", "local", "joint", "measure"]) -> Tensor:
        """Scores [B, C]; `local` cuts the gradient between parts, `measure` leaves a_k alone."""
        self._route, self._distances = route, []
        try:
            return self.backbone(x)
        finally:
            self._route = "adapted"
            self._inputs.clear()

    # ------------------------------------------------------------------ before deployment

    @classmethod
    def uses_source(cls, options: Mapping[str, Any]) -> bool:
        return True

    def preparation(self) -> dict[str, Any] | None:
        if self.init == "community" and self.warmup is None:
            return None
        return {
            "parts": self.parts,
            "meta_kernel": self.networks[0].conv_block.conv.kernel_size[0],
            "init": self.init,
            "frozen_bn": self.frozen_bn,
            "meta_bn": self.meta_bn,
            "warmup": None if self.warmup is None else self.warmup.settings(),
            "seed": self.seed,
        }

    def prepare(self, source: SourceImages, progress: Progress) -> dict[str, Tensor]:
        """Initialise and warm up the meta networks; the artefact is their state."""
        if self.init == "identity" and progress.load() is None:
            self.match(source)
        if self.warmup is not None:
            self.meta.train().requires_grad_(True)
            self.warmup.run(self.meta, self._warmup_loss, source, progress)
            self.meta.eval()
        return self.meta.state_dict()

    def use_prepared(self, artefact: Mapping[str, Tensor]) -> None:
        self.meta.load_state_dict(artefact)

    def _warmup_loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.backbone(batch.x), batch.y)

    @torch.no_grad()
    def match(self, source: SourceImages) -> None:
        """`init=identity`: measure a_k on `source` (no labels) and make x_k equal to it.

        The convolution branch starts at the constant `OFFSET`, not at 0: at 0 the gradient of its
        ReLU is 0 and the branch would never learn. BN_k takes the constant off again.
        """
        self._moments = [(Moments(), Moments()) for _ in self.parts]
        for batch in source.batches(MATCH_BATCH, epoch=0):  # shuffled: batches of mixed classes
            self._forward(batch.x.to(self.device), "measure")
        for meta, (output, branch) in zip(self.networks, self._moments, strict=True):
            mean, var = output.fill(meta.meta_bn)
            meta.meta_bn.weight.copy_((var + meta.meta_bn.eps).sqrt())
            meta.meta_bn.bias.copy_(mean - OFFSET)
            branch.fill(meta.conv_block.bn)
            meta.conv_block.bn.weight.zero_()
            meta.conv_block.bn.bias.fill_(OFFSET)

    # ------------------------------------------------------------------ on the stream

    def report(self) -> dict[str, float]:
        """Batches since the last reset in which no image was confident."""
        return {"batches_without_confident_image": float(self.skipped)}

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Scores [B, C] of the present meta networks."""
        return self._forward(x, "adapted")

    @torch.enable_grad()
    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] from before the entropy step on this batch.

        Raises:
            Diverged: when scores are not finite.
        """
        self.seen += 1
        if not self.update:
            return self.predict(x)
        if self.procedure == "community":
            self._forward(x, "local")
            self._step(self.reg_weight * torch.stack(self._distances).sum())
            logits = self._forward(x, "adapted")
        else:
            logits = self._forward(x, "joint")
        if not torch.isfinite(logits).all():
            raise Diverged(
                f"strategy=ecotta: the scores of batch {int(self.seen)} are not finite; the meta "
                f"networks diverged. Lower strategy.optim.lr (now {self.optim.lr}), raise "
                "strategy.reg_weight "
                f"(now {self.reg_weight}), or reset between domains (around=reset_each_domain)."
            )
        loss = self.loss(logits)
        empty = bool(torch.isnan(loss))  # the scores are finite: a mean over no image
        self.skipped += empty
        if empty:
            loss = 0 * logits.sum()
        if self.procedure == "joint":
            loss = loss + self.reg_weight * torch.stack(self._distances).sum()
        if not (empty and self.on_empty == "skip"):
            self._step(loss)
        return logits.detach()

    def loss(self, logits: Tensor) -> Tensor:
        """Mean entropy, in nats, of the confident rows of `logits` [B, C]; NaN if there is none."""
        each = entropy(logits)
        return each[each < self.entropy_margin * math.log(logits.size(1))].mean()

    def _step(self, loss: Tensor) -> None:
        loss.backward()
        self.optim.update(self.optimizer)
