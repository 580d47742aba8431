"""EWC: fine-tuning in which parameters that mattered for earlier tasks move less.

Papers: Kirkpatrick et al., PNAS 2017, arXiv 1612.00796; online form: Schwarz et al., ICML 2018,
arXiv 1805.06370. Official code of the default: aimagelab/mammoth e75a491, `models/ewc_on.py`
(online EWC). In class-incremental learning it stays near the lower bound, which is expected
(mammoth, issue 9).

After a task the diagonal Fisher information F is estimated from its training images, one image at
a time, with g the gradient of log p(y|x) under the softmax of the loss: the mean of p(y|x) g^2
(`weighted`, mammoth), of g^2 for the given labels (`empirical`), or of g^2 for labels drawn from
the model (`sampled`, the textbook definition). The running sum is `F <- gamma F + F_new`. While
learning, `2 weight F (theta - theta*)` is added to the gradient, as mammoth does: the penalty is
`weight F (theta - theta*)^2`, without the half of the papers.

Deviations from mammoth: its network has rows for all classes from the start; ours do under
`loss_scope=all`, otherwise they come with their classes and start with F = 0. Images are taken as
the training pipeline delivers them in a further epoch, as there, but in evaluation mode: a single
image has no batch statistics, and dropout adds noise. `theta_star=each` is ours: the exact sum of
one quadratic penalty a task, kept as the sum of the F and the mean of the theta* weighted by F.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from driftline.cl.finetune import Finetune
from driftline.cl.l2 import Anchored, learned
from driftline.core.errors import Diverged
from driftline.core.ranges import Count, NonNegative, Unit
from driftline.core.stream import Task
from driftline.parts.modes import evaluation_mode
from driftline.parts.store import Store


class EWC(Anchored):
    """Pull by Fisher information.

    Args:
        weight: lambda (`e_lambda` in mammoth). The step is unstable where lr * 2 * weight * F
            exceeds about 1.
        gamma: what the Fisher information of earlier tasks keeps, per task.
        fisher: see above.
        fisher_batch: images whose gradients are computed at once; the memory is so many times that
            of the gradients. 1 needs nothing of the network; more needs operations that
            `torch.func.vmap` knows. The numbers agree up to rounding.
        theta_star: `last`: one theta*, the end of the task before (online EWC). `each`: every task
            pulls to its own end (the original EWC, with gamma = 1).
    """

    def __init__(
        self,
        *,
        weight: NonNegative,
        gamma: Unit,
        fisher: Literal["weighted", "empirical", "sampled"],
        fisher_batch: Count,
        theta_star: Literal["last", "each"],
    ) -> None:
        super().__init__(weight=weight)
        self.gamma, self.theta_star = gamma, theta_star
        self.fisher_kind, self.fisher_batch = fisher, fisher_batch
        self.fisher = Store()  # F, by the name of the parameter

    def strength(self, name: str) -> Tensor:
        return 2 * self.weight * self.fisher[name]

    @torch.no_grad()
    def end_task(self, method: Finetune, task: Task) -> None:
        """Estimate F on `task`, add it to the running sum and take the present values as theta*.

        Raises:
            Diverged: for an F that is not finite.
        """
        new = self.fisher_of(method, task)
        if not all(f.isfinite().all() for f in new.values()):
            raise Diverged(
                f"the Fisher information after task {task.index} is not finite: lower "
                f"strategy.optim.lr (now {method.optim.lr:g}) or strategy.penalty.weight (now "
                f"{self.weight:g})"
            )
        for name, p in learned(method, method.head.classes):
            total, target = new[name], p.clone()
            if name in self.fisher:
                old = self.gamma * _fit(self.fisher[name], p)
                total = old + total
                if self.theta_star == "each":
                    mean = (old * _fit(self.anchor[name], p) + new[name] * p) / total
                    target = torch.where(total > 0, mean, target)
            self.fisher.put(name, total)
            self.anchor.put(name, target)

    def fisher_of(self, method: Finetune, task: Task) -> dict[str, Tensor]:
        """Diagonal Fisher information on the training images of `task`, by parameter name."""
        model = _LogLikelihood(method)
        total = {n: torch.zeros_like(p) for n, p in learned(method, method.head.classes)}
        names = list(total)
        batches = largest = 0
        with evaluation_mode(method):
            for batch in task.train(method.train_epochs):  # an epoch beyond those of the training
                if batch is None:
                    continue
                batch = batch.to(method.device)
                batches, largest = batches + 1, max(largest, len(batch.y))
                labels = batch.y
                if self.fisher_kind == "sampled":
                    chances = model.scores(batch.x).softmax(1).cpu()
                    drawn = torch.multinomial(chances, 1, generator=method.rng("fisher"))[:, 0]
                    labels = drawn.to(method.device) + model.start
                for x, y in zip(
                    batch.x.split(self.fisher_batch), labels.split(self.fisher_batch), strict=True
                ):
                    for name, squares in zip(names, self._squares(model, names, x, y), strict=True):
                        total[name] += squares
        return {n: f / max(1, batches * largest) for n, f in total.items()}  # mammoth's divisor

    def _squares(
        self, model: _LogLikelihood, names: list[str], x: Tensor, y: Tensor
    ) -> Iterator[Tensor]:
        """Sum over the images of weight * gradient^2, for every parameter in `names`."""
        held = dict(model.named_parameters())
        if self.fisher_batch == 1:
            with torch.enable_grad():
                value = model(x, y)
                grads = torch.autograd.grad(value, [held[n] for n in names], materialize_grads=True)
            yield from (self._share(value.detach()) * g**2 for g in grads)
            return
        chosen = {n: held[n].detach() for n in names}

        def one(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            return functional_call(model, parameters, (image[None], label[None]))

        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels know no vmap
            grads, values = vmap(grad_and_value(one), in_dims=(None, 0, 0))(chosen, x, y)
        shares = self._share(values)
        yield from (torch.tensordot(shares, grads[n] ** 2, 1) for n in names)

    def _share(self, value: Tensor) -> Tensor:
        return value.exp() if self.fisher_kind == "weighted" else torch.ones_like(value)


class _LogLikelihood(nn.Module):
    """log p(y|x) as a module, with the names that the strategy's parameters have."""

    def __init__(self, method: Finetune) -> None:
        super().__init__()
        self.backbone, self.bank, self.head = method.backbone, method.bank, method.head
        self.features, self.columns = method.features, method.columns
        self.start = self.columns.start if isinstance(self.columns, range) else 0

    def scores(self, x: Tensor) -> Tensor:
        scores = self.head(self.features(x))
        if isinstance(self.columns, range):
            return scores[:, self.columns.start : self.columns.stop]
        outside = torch.ones(scores.shape[1], dtype=torch.bool, device=scores.device)
        outside[list(self.columns)] = False
        return scores.masked_fill(outside, -torch.inf)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Images [1, 3, H, W] and label [1] -> 0-dim."""
        return -F.cross_entropy(self.scores(x), y - self.start)


def _fit(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` with zero rows appended up to the shape of `like`."""
    if tensor.shape == like.shape:
        return tensor
    fitted = torch.zeros_like(like)
    fitted[: len(tensor)] = tensor
    return fitted
