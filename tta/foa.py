"""FOA: input prompts found by an evolution strategy, features shifted towards the source's mean.

Paper: "Test-Time Model Adaptation with Only Forward Passes" (ICML 2024, arXiv 2404.01650).
Code: github.com/mr-eggplant/FOA @ 004b02d (`tta_library/foa.py`, `models/vpt.py`).

What the code does, and the paper does not say: the best prompts of the batch before compete again,
so that `population` + 1 candidates are forwarded and told to a strategy that believes in
`population`; scores, and the features that the history averages, are those of candidates chosen on
the same batch, bad ones among them; discrepancies are sums over all layers and dimensions, so that
their weight fits one width and depth.

Deviations that change no number: statistics of the source are summed up in float64 instead of kept
features; the first norm of a block is read where the block computes it.
Deviations that do: `cma` changed its step-size rule for 300 dimensions and more after the paper;
here the rule is cumulative path length, as then, whatever the version. Mirrored samples, which
`cma` adds below a population of 6, and its repair of covariances with a condition above 1e8 are
off. After `reset` the strategy goes on with other random numbers and the first initial prompts,
where the code starts again with its fixed seed and draws new prompts. One image has no spread: that
term is left out, where the code's loss becomes NaN and its result None. Losses that are not finite
stop the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

import driftline.core.vision  # noqa: F401
from driftline.backbones.backbone import Backbone
from driftline.core import distributed
from driftline.core.errors import Diverged, UserError
from driftline.core.ranges import Count, NonNegative, Positive, Size, Unit
from driftline.core.strategy import Progress, TTAStrategy
from driftline.core.stream import SourceImages
from driftline.parts.fisher import first_images
from driftline.parts.heads import linear_head
from driftline.parts.objectives import entropy

SOURCE_BATCH = 64  # images
FULL_BATCH = 64  # images for which `discrepancy` is stated

Draw = Callable[[int, int], np.ndarray]


def evolution(size: int, population: int, step: float, draw: Draw) -> Any:
    """A new evolution strategy of the package `cma` around zero.

    Args:
        draw: (rows, columns) -> standard normal numbers, float64.

    Raises:
        UserError: where the package is not installed.
    """
    try:
        import cma
        from cma.sigma_adaptation import CMAAdaptSigmaCSA
    except ImportError as error:
        raise UserError(
            'strategy=foa needs the package cma: pip install -e ".[foa]", or pip install "cma>=4.5"'
        ) from error
    options = {
        "popsize": population,
        "randn": draw,
        "seed": np.nan,  # leaves NumPy's global generator alone
        "AdaptSigma": CMAAdaptSigmaCSA,
        "CMA_mirrors": 0,
        "conditioncov_alleviate": False,
        "verbose": -9,
    }
    return cma.CMAEvolutionStrategy([0.0] * size, step, options)


def state_of(es: Any) -> dict[str, Any]:
    """All that decides what an evolution strategy does next, beside its settings.

    `axes` and `lengths` are the decomposition of an earlier covariance: it is renewed every few
    batches alone.
    """
    arrays = {
        "mean": es.mean,
        "path": es.pc,
        "step_path": es.adapt_sigma.ps,
        "covariance": es.sm.C,
        "axes": es.sm.B,
        "lengths": es.sm.D,
    }
    # Contiguous: products round by the layout in memory, which files need not keep.
    state: dict[str, Any] = {
        k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()
    }
    return state | {"step": float(es.sigma), "told": es.countiter, "decomposed": es.sm.last_update}


def go_on(es: Any, state: Mapping[str, Any]) -> Any:
    """Give a new strategy, which is returned, what `state_of` found in an earlier one."""
    from cma.utilities.utils import ElapsedWCTime

    arrays = {k: v.cpu().numpy() for k, v in state.items() if isinstance(v, Tensor)}
    es.mean = es.mean_old = arrays["mean"]
    es.pc, es.adapt_sigma.ps = arrays["path"].copy(), arrays["step_path"].copy()  # changed in place
    es.sm.C, es.sm.B, es.sm.D = arrays["covariance"].copy(), arrays["axes"], arrays["lengths"]
    es.sigma, es.countiter = state["step"], state["told"]
    es.sm.count_tell, es.sm.last_update = state["told"], state["decomposed"]
    es.timer = ElapsedWCTime()  # made by the first `ask` of a run
    return es


class FOA(TTAStrategy):
    """Each batch: forward it under every candidate of prompts, keep the one of smallest loss.

    Args:
        backbone: a vision transformer of timm whose head reads the class token; it never changes.
        seed: of the first prompts and of the evolution strategy.
        prompts: tokens between the class token and those of the image.
        population: candidates of the evolution strategy for each batch; one more is the best of
            the batch before, so a batch costs `population` + 1 forward passes.
        step: initial standard deviation of the candidates, in units of the tokens.
        discrepancy: weight of the squared distances of mean and standard deviation of the class
            token from those of the source, for a batch of 64; other batches in proportion, as their
            entropies are summed.
        history: weight of the old mean of the last feature in its moving average.
        shift: share of the way from that average to the mean of the source by which the last
            feature is moved; 0: not at all.
        source_images: clean images, without labels, that the statistics are measured on, at most.

    One image is compared by mean and entropy; a short last batch counts like any other. `predict`
    uses the best prompts of the last batch and the present shift: one pass, whatever the batch.
    """

    needs = frozenset({"head", "blocks"})
    prefers = "vit"
    backbone: Any  # a Backbone; the parent promises less
    prompts: Tensor
    history_mean: Tensor | None
    source_mean: Tensor
    source_std: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        prompts: Size,
        population: Annotated[int, Ge(4), Le(10**4)],
        step: Positive,
        discrepancy: NonNegative,
        history: Unit,
        shift: NonNegative,
        source_images: Count,
    ) -> None:
        super().__init__(backbone, seed=seed)
        require_class_token(backbone)
        linear_head(backbone, "foa")
        self.backbone.eval().requires_grad_(False)
        self.population, self.step, self.discrepancy = population, step, discrepancy
        self.history, self.shift, self.source_images = history, shift, source_images
        net, width = backbone.net, backbone.width
        self.shape = (prompts, width)
        self.rng("search")  # made now, so that it is there to be put back
        self.search = state_of(self._evolution())
        bound = (
            6 / (3 * net.patch_embed.patch_size[0] * net.patch_embed.patch_size[1] + width)
        ) ** 0.5
        first = torch.empty(self.shape).uniform_(-bound, bound, generator=self.rng("prompts"))
        self.register_buffer("prompts", first.to(self.device))
        self.register_buffer("history_mean", None)
        for name in ("source_mean", "source_std"):  # of every run, so no part of its state
            size = width * len(net.blocks)
            self.register_buffer(name, torch.zeros(size, device=self.device), persistent=False)

    def get_extra_state(self) -> dict[str, Any]:
        return self.search

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.search = dict(state)

    # -------------------------------------------------------------- source

    @classmethod
    def uses_source(cls, options: Mapping[str, Any]) -> bool:
        return True

    def preparation(self) -> dict[str, Any]:
        return {"images": self.source_images, "batch_size": SOURCE_BATCH}

    @torch.no_grad()
    def prepare(self, source: SourceImages, progress: Progress) -> dict[str, Tensor]:
        """Mean and unbiased standard deviation of the class token, without prompts.

        Raises:
            UserError: for fewer than two images.
        """
        images, sums = 0, torch.zeros(2, self.source_mean.numel(), dtype=torch.float64)
        for x in first_images(source, SOURCE_BATCH, self.source_images, self.device):
            tokens = self.class_tokens(x).double()
            sums += torch.stack([tokens.sum(0), tokens.square().sum(0)]).cpu()
            images += len(x)
        if images < 2:
            raise UserError(
                f"strategy=foa measures a spread on source images and got {images}: raise "
                "strategy.source_images and scenario.source_images to at least 2"
            )
        mean = sums[0] / images
        variance = (sums[1] - images * mean.square()) / (images - 1)
        dtype = next(self.backbone.parameters()).dtype
        return {"mean": mean.to(dtype), "std": variance.clamp_min(0).sqrt().to(dtype)}

    def use_prepared(self, artefact: Mapping[str, Tensor]) -> None:
        self.source_mean = artefact["mean"].to(self.device)
        self.source_std = artefact["std"].to(self.device)

    # -------------------------------------------------------------- stream

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Scores [B, C] with the best prompts of the last batch."""
        return self.scores(self.class_tokens(x, prompts=self.prompts))

    @torch.no_grad()
    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] under the best candidate for this batch.

        Raises:
            Diverged: when a loss is not finite; nothing is updated then.
        """
        es = go_on(self._evolution(), self.search)
        asked = [*es.ask(), self.prompts.flatten().double().cpu().numpy()]
        candidates = self.candidates(asked)
        losses, scores, means = [], [], []
        for prompts in candidates:
            tokens = self.class_tokens(x, prompts=prompts)
            losses.append(self.loss(tokens))
            scores.append(self.scores(tokens))
            means.append(self.last(tokens).mean(0))
        values = torch.stack(losses).tolist()
        if not np.isfinite(values).all():
            raise Diverged(
                f"strategy=foa: the loss of a candidate is {min(values)}: look for images that are "
                "not finite numbers, or lower strategy.step"
            )
        best = values.index(min(values))  # the first of equal ones
        es.tell(asked, values)
        self.search = state_of(es)
        self.prompts.copy_(candidates[best])
        mean = torch.stack(means).mean(0)
        old = mean if self.history_mean is None else self.history_mean
        self.history_mean = self.history * old + (1 - self.history) * mean
        return scores[best]

    def candidates(self, asked: list[np.ndarray]) -> Tensor:
        """Prompts [N, prompts, D] in float32, from the strategy's numbers."""
        numbers = torch.from_numpy(np.stack(asked)).float()
        return numbers.view(-1, *self.shape).to(self.device)

    def loss(self, tokens: Tensor) -> Tensor:
        """Distance from the source, and entropy of the scores without the shift; 0-dim."""
        images = len(tokens)
        distance = (tokens.mean(0) - self.source_mean).square().sum()
        if images > 1:
            distance = distance + (tokens.std(0) - self.source_std).square().sum()
        unsure = entropy(self.read(self.last(tokens))).sum()
        return self.discrepancy * distance * images / FULL_BATCH + unsure

    def scores(self, tokens: Tensor) -> Tensor:
        """Scores [B, C], the last feature moved towards the source."""
        features = self.last(tokens)
        if self.history_mean is not None:
            features = features + self.shift * (self.last(self.source_mean) - self.history_mean)
        return self.read(features)

    def read(self, token: Tensor) -> Tensor:
        """Scores [B, C] of the last class token."""
        return self.backbone.head(self.backbone.read_out(token))

    def last(self, tokens: Tensor) -> Tensor:
        """Of all layers' class tokens the one that the head reads."""
        return tokens[..., -self.shape[1] :]

    @distributed.shared()
    def class_tokens(self, x: Tensor, *, prompts: Tensor | None = None) -> Tensor:
        """The class token [B, L * D] behind every block, normalised as what comes next reads it."""
        net, seen = self.backbone.net, []

        def note(layer: nn.Module, inputs: Any, out: Tensor) -> None:
            seen.append(out[:, 0])

        def insert(layer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
            assert prompts is not None
            rows = inputs[0]
            between = prompts.to(rows).expand(len(rows), -1, -1)
            return torch.cat([rows[:, :1], between, rows[:, 1:]], 1)

        layers = [*(block.norm1 for block in net.blocks[1:]), net.norm]
        hooks = [layer.register_forward_hook(note) for layer in layers]
        if prompts is not None:
            hooks.append(net.norm_pre.register_forward_pre_hook(insert))
        try:
            self.backbone.features(x)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(seen, 1)

    def draw(self, rows: int, columns: int) -> np.ndarray:
        """Standard normal numbers [rows, columns] of the evolution strategy."""
        rng = self.rng("search")
        return torch.randn(rows, columns, generator=rng, dtype=torch.float64).numpy()

    def _evolution(self) -> Any:
        return evolution(self.shape[0] * self.shape[1], self.population, self.step, self.draw)


def require_class_token(backbone: Backbone) -> None:
    """Check that a network is a transformer of timm's plain kind with a class token.

    Raises:
        UserError: if not.
    """
    from timm.models.vision_transformer import Block, VisionTransformer

    net = backbone.net
    fits = isinstance(net, VisionTransformer) and all(isinstance(b, Block) for b in net.blocks)
    if not fits or net.cls_token is None or net.global_pool != "token":
        raise UserError(
            "strategy=foa puts prompts among the tokens of an image and reads the class token "
            f"of every layer, which {backbone.tag} has not in the form needed. Use a timm ViT "
            "whose head reads the class token (for example backbone=vit_b16_in1k), or strategy=neo"
        )
