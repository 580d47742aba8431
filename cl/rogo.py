"""ROGO: gradients outside of what earlier tasks used, a part of which is opened again by a scale.

Paper: Yang et al., "Restricted orthogonal gradient projection for continual learning", AI Open 4,
2023, arXiv 2301.12131. Official code: THUNLP-MT/ROGO 87ec345, `main_cifar_split.py`, `layers.py`;
there are no recorded cases, the formulas were checked against that code and by hand. Of the paper
the abstract was read.

The first task is fine-tuning. Of each linear layer are then kept directions F of its input, that
hold a share of the layer's gradient on some images of the task (rule: GPM, `parts/subspace.py`);
the share rises with the task. Later tasks move weights W by gradients without their part in F; all
else but the head stays. After some epochs such directions of F are opened that lie close to the
present gradient (cosine to the span of its leading directions at least `closeness`): B, for which

    W_eff = W + W B (S - I) B'        loss + weight * |S - I|^2

learns a matrix S that begins at I. At the end of the task W_eff becomes W. In code the input x of
the layer becomes x + B (S - I) B' x, which is the same.

Deviations that change no number: the greedy search for B is written as principal angles; S has the
size of B from the beginning. That do: a second search of a task begins from an orthonormal basis
(official: from a spanning set that the first one leaves, whose first direction is another one);
which epochs open directions, at most two times a task, is given (official: when the rate, lowered
by the validation loss, has become small; there are no validation images here); the gradient is that
of the first images of an epoch, as the training pipeline gives them; biases, which the official
layers lack, stay as normalisation does. Weight decay and Adam, which the official code does not
use, are projected step by step. Left out: convolutions, which stay after the first task.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.cl.finetune import Finetune
from driftline.core.distributed import average_gradients
from driftline.core.errors import UserError
from driftline.core.ranges import Count, NonNegative, Unit
from driftline.core.stream import BOUNDARIES, Batch, Task
from driftline.parts.modes import evaluation_mode
from driftline.parts.objectives import Scope, scoped_cross_entropy
from driftline.parts.optim import Optim
from driftline.parts.subspace import Subspace


class Directions(nn.Module):
    """Of one layer: input directions that earlier tasks used, and those of them that are open.

    Args:
        dim: length D of an input.
    """

    opened: Tensor  # B [D, k], orthonormal, within the used ones

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.used = Subspace(dim, dual=False)
        self.register_buffer("opened", torch.zeros(dim, 0))
        self.scale = nn.Parameter(torch.zeros(0, 0))  # S

    @property
    def change(self) -> Tensor:
        """S - I."""
        return self.scale - torch.eye(len(self.scale), device=self.scale.device)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs [..., D] of the layer."""
        return x + x @ self.opened @ self.change.T @ self.opened.T if len(self.scale) else x

    @torch.no_grad()
    def open(self, gradient: Tensor, share: float, closeness: float) -> None:
        """Open used directions close to those that hold `share` of `gradient` [D, D_out]."""
        vectors, values, _ = torch.linalg.svd(gradient.double(), full_matrices=False)
        if not values.any():  # nothing to come close to
            return
        held = values.square().cumsum(0) / values.square().sum()
        leading = vectors[:, : 1 + int((held < share).sum())]
        used, opened = self.used.basis.double(), self.opened.double()
        turn = torch.linalg.qr(used.T @ opened, mode="complete").Q
        closed = used @ turn[:, opened.shape[1] :]
        left, cosines, _ = torch.linalg.svd(closed.T @ leading, full_matrices=False)
        new = closed @ left[:, : int((cosines >= closeness).sum())]
        self.opened = torch.cat([opened, new], 1).to(self.opened.dtype)
        self.scale.data = torch.block_diag(self.scale.data, torch.eye(new.shape[1]).to(self.scale))

    @torch.no_grad()
    def close(self, weight: Tensor) -> None:
        """`weight` [D_out, D] becomes W_eff; nothing is open."""
        weight += weight @ self.opened @ self.change @ self.opened.T
        self.opened, self.scale.data = self.opened[:, :0].clone(), self.scale.data[:0, :0].clone()


class ROGO(Finetune):
    """Fine-tuning of linear layers within what is free and what is opened again.

    Args:
        num_classes, epochs, optim, loss_scope, freeze_bn: as in `Finetune`; a schedule of rates
            begins anew where directions are opened. Groups `backbone`, `scales` and `head`.
        share: of the squared gradient that the directions of the first task hold.
        share_step: by how much the share rises from task to task, up to 1.
        images: of a task, whose gradient is read.
        open_at: epochs of later tasks, counted from 0, before which directions are opened; one
            after the last epoch: never; where all are, a warning says so.
        open_share: of the squared gradient whose leading directions are compared with used ones.
        closeness: cosine from which a used direction is opened.
        weight: of the pull of the scale to the identity.

    Raises:
        UserError: for a network without linear layers.
    """

    needs = Finetune.needs | {BOUNDARIES}
    averageable = False
    unmergeable = "it confines each task to directions that the earlier ones left free"
    prefers = "vit"

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        num_classes: int,
        epochs: Count,
        optim: Optim,
        loss_scope: Scope,
        freeze_bn: bool,
        share: Unit,
        share_step: NonNegative,
        images: Count,
        open_at: list[Count],
        open_share: Unit,
        closeness: Unit,
        weight: NonNegative,
    ) -> None:
        super().__init__(
            backbone,
            seed=seed,
            num_classes=num_classes,
            epochs=epochs,
            optim=optim,
            loss_scope=loss_scope,
            freeze_bn=freeze_bn,
            trains="all",
            adapter=None,
            penalty=None,
        )
        layers = dict(backbone.net.named_modules())
        self.layers = {
            n: m for n, m in layers.items() if isinstance(m, nn.Linear) and m is not backbone.head
        }
        if not self.layers:
            raise UserError(
                f"strategy=rogo projects gradients of linear layers, and {backbone.tag} has none "
                "beside its classifier; use a transformer, such as backbone=vit_b16_in21k"
            )
        self.share, self.share_step, self.images = share, share_step, images
        self.open_at = sorted({0, epochs, *(e for e in open_at if e < epochs)})[1:-1]
        if open_at and not self.open_at:
            self.warn_once(
                "open",
                f"strategy.open_at={open_at} is after the last of strategy.epochs={epochs}: no "
                "directions are opened again, which is what the method is for; lower it too",
            )
        self.open_share, self.closeness, self.weight = open_share, closeness, weight
        self.directions = nn.ModuleDict()
        for name, layer in self.layers.items():
            self.directions[name.replace(".", "/")] = held = Directions(layer.in_features)
            layer.register_forward_pre_hook(lambda _, args, held=held: (held(args[0]), *args[1:]))
        self.later = False  # than the first task

    def parts(self) -> Iterator[tuple[str, nn.Linear, Directions]]:
        """Name, layer and its directions."""
        for (name, layer), held in zip(self.layers.items(), self.directions.values(), strict=True):
            assert isinstance(held, Directions)
            yield name, layer, held

    # ------------------------------------------------------------------ tasks

    def begin_task(self, task: Task) -> None:
        """As in `Finetune`.

        Raises:
            UserError: for a layer of which nothing is free.
        """
        full = [name for name, _, held in self.parts() if not held.used.free]
        if full:
            raise UserError(
                f"task {task.index} ({task.name}): earlier tasks use all input directions of "
                f"{full[0]} ({len(full)} such layers), so that it could not learn; lower "
                f"strategy.share={self.share:g} or strategy.share_step={self.share_step:g}"
            )
        super().begin_task(task)

    def make_optimizer(self, task: Task) -> None:
        self.later = task.index > 0
        self.task_optim = self.optim.of_task(task.index)
        learned = [p for p in self.backbone.parameters() if p.requires_grad]
        scales: list[nn.Parameter] = []
        if self.later:
            learned = [cast(nn.Parameter, layer.weight) for layer in self.layers.values()]
            scales = [held.scale for _, _, held in self.parts()]
        groups = {"backbone": learned, "scales": scales, "head": self.head.parameters()}
        self.optimizer = self.task_optim.optimizer(groups)
        for group in self.optimizer.param_groups:
            if group["name"] == "scales":
                group["weight_decay"] = 0

    def begin_epoch(self, task: Task, epoch: int) -> None:
        stages = [0, *(self.open_at if self.later else []), self.epochs]
        assert self.optimizer is not None
        start, stop = next((a, b) for a, b in pairwise(stages) if epoch < b)
        if epoch == start > 0:
            gradients = self._read_gradients(task, epoch)
            for name, _, held in self.parts():
                held.open(gradients[name], self.open_share, self.closeness)
                self.optimizer.state.pop(held.scale, None)  # momentum of the size before
        self.task_optim.set_rates(self.optimizer, epoch - start, stop - start)

    def end_task(self, task: Task) -> None:
        for _, layer, held in self.parts():
            held.close(layer.weight)
        share = min(1.0, self.share + task.index * self.share_step)
        gradients = self._read_gradients(task, self.epochs)
        for name, _, held in self.parts():
            held.used.add(gradients[name], share)

    # ------------------------------------------------------------------ gradients

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        """As in `Finetune`; what Adam or weight decay make of a gradient is projected, too."""
        bent = self.task_optim.kind != "sgd" or self.task_optim.weight_decay > 0
        parts = [*self.parts()] if self.later and bent else []
        before = [layer.weight.detach().clone() for _, layer, _ in parts]
        logged = super().observe(batch)
        with torch.no_grad():
            for old, (_, layer, held) in zip(before, parts, strict=True):
                layer.weight.copy_(old + held.used.free_part((layer.weight - old).T).T)
        return logged

    def _read_gradients(self, task: Task, epoch: int) -> dict[str, Tensor]:
        """Of the loss on the first images of an epoch, [D, D_out] by layer."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        left = self.images
        with evaluation_mode(self):
            for batch in task.train(epoch):
                if batch is not None and left:
                    x, y = batch.x[:left].to(self.device), batch.y[:left].to(self.device)
                    loss = scoped_cross_entropy(self.head(self.features(x)), y, self.columns)
                    (loss * len(y) / self.images).backward()
                    left -= len(y)
                if not left:
                    break
        average_gradients(self.optimizer)
        weights = {name: layer.weight for name, layer, _ in self.parts()}
        none = torch.zeros_like  # of a task whose images cannot be read
        read = {n: (none(w) if w.grad is None else w.grad).T.clone() for n, w in weights.items()}
        self.zero_grad()
        return read

    def _gradients(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        scores = self.head(self.features(batch.x))
        loss = scoped_cross_entropy(scores, batch.y, self.columns)
        for _, _, held in self.parts():
            loss = loss + self.weight * held.change.square().sum()
        self.task_optim.backward(self.optimizer, loss)
        if self.later:
            gradients = {name: layer.weight.grad for name, layer, _ in self.parts()}
            self.backbone.zero_grad()  # of what stays
            for name, layer, held in self.parts():
                gradient = gradients[name]
                if gradient is not None:
                    layer.weight.grad = held.used.free_part(gradient.T).T
        return scores.detach(), loss.detach(), {}

    def report(self) -> dict[str, float]:
        """Percent of the input directions that tasks so far use, the mean over layers."""
        used = [1 - held.used.free / len(held.opened) for _, _, held in self.parts()]
        return super().report() | {"directions_used": 100 * sum(used) / len(used)}
