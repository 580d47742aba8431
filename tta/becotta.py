"""BECoTTA-style: low-rank experts in the blocks of a ViT, mixed by the router of a guessed domain.

Paper: "BECoTTA: Input-dependent Online Blending of Experts for Continual Test-time Adaptation"
(ICML 2024, arXiv 2402.08712). Code: github.com/daeunni/BECoTTA @ 388f318, for segmentation alone,
without the warm-up. No code for classification exists; this variant is ours and no recorded run
stands behind it. It was checked by hand against the formulas below.

From the code: experts (down, GELU, up; truncated normal 0.02) are added after a block; a router per
domain gives each token E scores and E scales of a noise, softplus + 0.01, and sums the scores over
tokens; the best K are mixed by their softmax; a discriminator names the domain of an image; while
adapting, an image whose confidence is above 0.69 and not below the frozen network's keeps its own
pseudo-label; Adam moves experts and routers, and 1 % of their weights return to the start. The
warm-up adds 0.1 times the discriminator's loss and takes off 5e-4 times the mutual information of
domains and experts, as its settings say.

`router=legacy` is the released mixing: experts 0 .. K - 1 whatever was selected, with the gates of
the first image for the whole batch, scaled to [0, 1] if it has more than one, and without a
gradient for the routers. `router=selected`, the default, uses the experts that were selected, for
each image by itself.

Chosen here: the discriminator is a linear layer on mean and deviation of the embedded patches;
domains of the warm-up are source images as they are, darkened, bleached and blurred; a pseudo-label
is the mean of the image's and its mirror image's probabilities (where the code has several scales),
or the frozen network's where that image is not confident; the noise is drawn while learning alone,
so that `predict` is a function of the image; the mutual information has a gradient (the code cuts
it). The optimiser's state lasts (the code makes a new one for each of its weathers).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError
from driftline.core.ranges import Count, NonNegative, Size, Unit
from driftline.core.seed import generator
from driftline.core.strategy import Progress, TTAStrategy
from driftline.core.stream import Batch, SourceImages
from driftline.parts import teacher
from driftline.parts.modes import evaluating
from driftline.parts.optim import StreamOptim
from driftline.parts.routing import shares
from driftline.parts.warmup import WarmUp

DOMAINS = ("plain", "dark", "bleached", "blurred")
STD = 0.02  # of initial weights
LEAST_NOISE = 0.01


def as_domain(x: Tensor, domain: int) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] as one of the synthetic domains has them."""
    name = DOMAINS[domain]
    if name == "blurred":
        return F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    return x if name == "plain" else 0.5 * x + (0.5 if name == "bleached" else 0)


class Mixture(nn.Module):
    """E experts of one block, and a router per domain.

    Args:
        dim: of a token.
        selected: K, experts of an image.
        legacy: the released mixing, see above.
        numbers: of the initial weights.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        selected: int,
        rank: int,
        *,
        legacy: bool,
        numbers: torch.Generator,
    ) -> None:
        super().__init__()
        self.selected, self.legacy = selected, legacy

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(
                nn.init.trunc_normal_(torch.empty(shape), 0, STD, generator=numbers)
            )

        self.down, self.up = drawn(experts, rank, dim), drawn(experts, dim, rank)
        self.down_bias = nn.Parameter(torch.zeros(experts, 1, rank))
        self.up_bias = nn.Parameter(torch.zeros(experts, 1, dim))
        self.routers = drawn(len(DOMAINS), 2 * experts, dim)

    def gates(self, x: Tensor, domain: Tensor, numbers: torch.Generator | None) -> Tensor:
        """Share [B, E] of each expert, for tokens `x` [B, N, d] of images from `domain` [B].

        Args:
            numbers: of the noise; None for none.
        """
        scores, scales = (x @ self.routers[domain].mT).chunk(2, 2)
        if numbers is not None:
            noise = torch.randn(scores.shape, generator=numbers).to(scores)
            scores = scores + noise * (F.softplus(scales) + LEAST_NOISE)
        if not self.legacy:
            return shares(scores.sum(1), self.selected)
        best = scores.sum(1).topk(self.selected, 1).values.detach()  # [B, K]
        if len(best) > 1:
            best = (best - best.min()) / (best.max() - best.min()).clamp_min(1e-12)
        first = torch.zeros_like(scores[:, 0])
        first[:, : self.selected] = best[0].softmax(0)
        return first

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """Tokens [B, N, d] plus the mixed experts' outputs."""
        inner = F.gelu(x[:, None] @ self.down.mT + self.down_bias)  # [B, E, N, r]
        outputs = inner @ self.up.mT + self.up_bias
        return x + (gates[:, :, None, None] * outputs).sum(1)


def information(gates: Tensor, domain: Tensor) -> Tensor:
    """Mutual information, in nats, of domain and expert under gates [B, E]; 0-dim."""
    known = domain.unique()
    each = torch.stack([gates[domain == d].mean(0) for d in known])  # [D, E]
    share = torch.stack([(domain == d).to(gates).mean() for d in known])
    ratio = each.clamp_min(1e-12).log() - (share @ each).clamp_min(1e-12).log()
    return (share[:, None] * each * ratio).sum()


class BECoTTA(TTAStrategy):
    """A frozen ViT with mixtures of low-rank experts, which learn from pseudo-labels.

    Args:
        backbone: a ViT with `blocks` and a patch embedding.
        seed: of the experts' start, the noise and the restoration.
        blocks: how many blocks, from the last one down, have experts.
        experts, selected: E of a block, and K of them for an image.
        rank: of each expert.
        router: `selected`: each image its own experts; `legacy`: as released, see above.
        noise: whether the routers are noisy while learning.
        confidence: above which an image may keep its own pseudo-label.
        restore_prob: chance per weight and update of returning to its start.
        warmup: training of experts, routers and discriminator on labelled source images.
        domain_weight, information_weight: of the discriminator's loss and of the mutual
            information in it.
        optim: of the one group `experts`: routers too, but not the discriminator.
        update: false only predicts: what the source phase alone is worth.

    One image and a short last batch adapt like any other batch; with nothing confident, the frozen
    network teaches.

    Raises:
        UserError: for more experts selected than there are, or a network without such blocks.
    """

    needs = frozenset({"head", "blocks"})
    prefers = "vit"

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        blocks: Count,
        experts: Size,
        selected: Size,
        rank: Size,
        router: Literal["selected", "legacy"],
        noise: bool,
        confidence: Unit,
        restore_prob: Unit,
        warmup: WarmUp,
        domain_weight: NonNegative,
        information_weight: NonNegative,
        optim: StreamOptim,
        update: bool,
    ) -> None:
        super().__init__(backbone, seed=seed)
        if selected > experts:
            raise UserError(
                f"strategy.selected={selected} is more than strategy.experts={experts}: set it to "
                f"at most {experts}"
            )
        if not self.needs <= backbone.provides:
            raise UserError(
                "strategy=becotta adds experts to the blocks of a vision transformer, and "
                f"{backbone.tag} has none that it knows. Use a timm ViT with a head, for example "
                "backbone=vit_b16_in1k, or strategy=cotta"
            )
        backbone.eval().requires_grad_(False)
        self.batch_dependent = router == "legacy"  # type: ignore[misc]
        self.noise, self.confidence, self.restore_prob = noise, confidence, restore_prob
        self.warmup, self.optim, self.update = warmup, optim, update
        self.domain_weight, self.information_weight = domain_weight, information_weight
        self.settings = {"experts": experts, "selected": selected, "rank": rank, "router": router}
        dim, places = backbone.width, list(backbone.net.blocks)[-blocks:]
        like = next(backbone.parameters())
        numbers = generator(seed, "strategy", "experts")
        legacy = router == "legacy"
        mixtures = [
            Mixture(dim, experts, selected, rank, legacy=legacy, numbers=numbers) for _ in places
        ]
        self.mixtures = nn.ModuleList(mixtures).to(like)
        self.discriminator = nn.Linear(2 * dim, len(DOMAINS)).to(like).requires_grad_(False)
        nn.init.zeros_(self.discriminator.weight)
        nn.init.zeros_(self.discriminator.bias)
        start = [nn.Parameter(p.clone(), requires_grad=False) for p in self.mixtures.parameters()]
        self.start = nn.ParameterList(start)
        # Of the pass at hand: whether experts work, with noise, in which domain.
        self._on, self._noisy, self._domain = True, False, torch.zeros(0)
        self._given: Tensor | None = None
        self._guess = torch.zeros(0)  # scores of the domains [B, D]
        self._gates: list[Tensor] = []
        backbone.net.blocks[0].register_forward_pre_hook(self._enter)
        for k, block in enumerate(places):
            block.register_forward_hook(lambda m, x, out, k=k: self._leave(k, out))
        self.mixtures.requires_grad_(update)
        if update:
            self.optimizer = optim.optimizer({"experts": self.mixtures.parameters()})
        self.rng("noise"), self.rng("restore")

    # ------------------------------------------------------------------ the network

    def _enter(self, block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        deviation, mean = torch.std_mean(inputs[0], 1, correction=0)
        self._guess = self.discriminator(torch.cat([mean, deviation], 1))
        self._domain = self._guess.argmax(1) if self._given is None else self._given

    def _leave(self, k: int, out: Tensor) -> Tensor:
        if not self._on:
            return out
        mixture: Any = self.mixtures[k]
        gates = mixture.gates(out, self._domain, self.rng("noise") if self._noisy else None)
        self._gates.append(gates)
        return mixture(out, gates)

    def scores(
        self, x: Tensor, *, on: bool = True, noisy: bool = False, domain: Tensor | None = None
    ) -> Tensor:
        """Scores [B, C].

        Args:
            on: false for the frozen network.
            noisy: whether the routers are.
            domain: of each image; None asks the discriminator.
        """
        self._on, self._noisy, self._given, self._gates = on, noisy, domain, []
        return self.backbone(x)

    # ------------------------------------------------------------------ before the stream

    @classmethod
    def uses_source(cls, options: Mapping[str, Any]) -> bool:
        return True

    def preparation(self) -> dict[str, Any] | None:
        weights = {"domain": self.domain_weight, "information": self.information_weight}
        return self.settings | {
            "blocks": len(self.mixtures),
            "noise": self.noise,
            "seed": self.seed,
            "weights": weights,
            "warmup": self.warmup.settings(),
        }

    def _prepared(self) -> nn.ModuleDict:
        return nn.ModuleDict({"mixtures": self.mixtures, "discriminator": self.discriminator})

    def prepare(self, source: SourceImages, progress: Progress) -> dict[str, Tensor]:
        """Experts, routers and discriminator; neighbouring images take turns in the domains."""
        trained = self._prepared().requires_grad_(True)

        def loss(batch: Batch) -> Tensor:
            domain = torch.arange(len(batch.y), device=batch.x.device) % len(DOMAINS)
            x = batch.x.clone()
            for d in range(1, len(DOMAINS)):
                x[domain == d] = as_domain(x[domain == d], d)
            logits = self.scores(x, noisy=self.noise, domain=domain)
            known = torch.stack([information(g, domain) for g in self._gates]).mean()
            value = F.cross_entropy(logits, batch.y)
            value = value + self.domain_weight * F.cross_entropy(self._guess, domain)
            return value - self.information_weight * known

        self.warmup.run(trained, loss, source, progress)
        return {k: v.detach() for k, v in trained.state_dict().items()}

    @torch.no_grad()
    def use_prepared(self, artefact: Mapping[str, Tensor]) -> None:
        self._prepared().load_state_dict(artefact)
        for start, parameter in zip(self.start, self.mixtures.parameters(), strict=True):
            start.copy_(parameter)

    def frozen(self) -> set[str]:
        """Discriminator and start never change on the stream."""
        names = self.state_dict()
        return super().frozen() | {n for n in names if n.startswith(("discriminator.", "start."))}

    # ------------------------------------------------------------------ adaptation

    def predict(self, x: Tensor) -> Tensor:
        """Scores [B, C] without noise."""
        with evaluating(self):
            return self.scores(x)

    @torch.enable_grad()
    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] from before the update on this batch.

        Raises:
            Diverged: when the loss is not finite; nothing is updated then.
        """
        if not self.update:
            return self.predict(x)
        target = self.target(x)
        logits = self.scores(x, noisy=self.noise)

        def again() -> Tensor:
            return self.loss(self.scores(x, noisy=self.noise), target)

        self.optim.step(self.optimizer, self.loss(logits, target), again)
        self.restore_weights()
        return logits.detach()

    @torch.no_grad()
    def target(self, x: Tensor) -> Tensor:
        """Pseudo-labels, as probabilities [B, C]."""
        frozen = self.scores(x, on=False).softmax(1)
        own, mirrored = (self.scores(image).softmax(1) for image in (x, x.flip(3)))
        sure = own.amax(1)
        keeps = (sure > self.confidence) & (sure >= frozen.amax(1))
        return torch.where(keeps[:, None], (own + mirrored) / 2, frozen)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy against probabilities `target` [B, C]."""
        return -(target * logits.log_softmax(1)).sum(1).mean()

    @torch.no_grad()
    def restore_weights(self) -> None:
        """Put a random subset of the weights of experts and routers back to the start."""
        numbers = self.rng("restore")
        for parameter, start in zip(self.mixtures.parameters(), self.start, strict=True):
            mask = teacher.restore_mask(parameter, self.restore_prob, numbers)
            torch.where(mask, start, parameter, out=parameter)
