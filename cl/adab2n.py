"""AdaB2N: replay with batch normalisation that balances the tasks in a batch by learned weights.

Paper: Lyu et al., "Overcoming Recency Bias of Normalization Statistics in Continual Learning:
Balance and Adaptation", NeurIPS 2023, arXiv 2310.08855. Official code: lvyilin/AdaB2N 9aaba7e,
`models/utils/adab2n.py`, `models/derpp_ada.py`, `models/er_ace_ada.py`.

New images and those of the memory go through the network in one pass. From the second task on, a
layer with weights w gives task k, of which n_k images are in the batch, the share of a posterior
mean, and normalises with

    a_k = (exp w_k + n_k) / sum_j (exp w_j + n_j),   mean = sum_b a_task(b) / n_task(b) mean_hw x_b

and the variance around that mean, weighted likewise. The network learns w too. Running statistics,
all that is used at test, follow at a rate that falls: m^kappa, then r <- r / (r + (1 - m)^kappa),
with m the momentum of the layer. `regularizer` times the squared distances between the statistics
of a batch and the running ones after their update (not differentiated) is added to the loss.

As in the official code: a task so far that is not in the batch keeps its share, so that the
weights of the images sum to less than 1 and the mean is drawn to 0 (logged as `missing`); running
variances are of the biased kind; the rate goes on over the tasks, the first one included.

Deviations that change no number: the task of an image is the one that it came with, not its label
over the classes of a task, so that tasks may be of any size; w of a task is made when the task
begins. The rate is part of the state. Those that do: other random draws as in `cl/er.py`. The
paper's networks start from random weights. The loss `er`, which the authors did not use, is that of
the recorded run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.cl.derpp import DERpp
from driftline.core.errors import UserError
from driftline.core.ranges import Count, CountOrZero, NonNegative, Size, Unit
from driftline.core.stream import OWN_CLASSES, Batch, Task
from driftline.parts.buffer import Rule
from driftline.parts.norms import replace_batch_norms
from driftline.parts.optim import Optim


class BalancedNorm(nn.BatchNorm2d):
    """Takes the place of a batch normalisation, with its parameters and running statistics.

    Args:
        layer: that was there.
        kappa: exponent of the rate of the running statistics.

    Raises:
        UserError: for a layer without running statistics or momentum.
    """

    def __init__(self, layer: nn.BatchNorm2d, kappa: float) -> None:
        super().__init__(layer.num_features, layer.eps, layer.momentum, layer.affine)
        if layer.running_mean is None or layer.momentum is None:
            raise UserError(
                "strategy=adab2n needs batch normalisation with running statistics and a momentum; "
                "choose another backbone"
            )
        self.weight, self.bias = layer.weight, layer.bias
        self.running_mean, self.running_var = layer.running_mean, layer.running_var
        self.num_batches_tracked = layer.num_batches_tracked
        self.task_weight = nn.Parameter(layer.running_mean.new_zeros(0))
        self.kappa = kappa
        self.rate: float | None = None  # of the last update
        # Of one pass: the task of each image and images of each task; distances and missing share.
        self.tasks: tuple[Tensor, Tensor] | None = None
        self.distance = self.missing = layer.running_mean.new_zeros(())

    def grow(self) -> None:
        """One more task."""
        self.task_weight = nn.Parameter(F.pad(self.task_weight.detach(), (0, 1)))

    def next_rate(self) -> float:
        """The rate of this update of the running statistics."""
        momentum = cast(float, self.momentum)
        if self.kappa == 0:
            return 1 / int(cast(Tensor, self.num_batches_tracked))
        if self.kappa == 1:
            return momentum
        last = self.rate
        self.rate = (
            momentum**self.kappa if last is None else last / (last + (1 - momentum) ** self.kappa)
        )
        return self.rate

    def image_weights(self) -> Tensor:
        """Weights [B] of the images of a batch in its statistics."""
        assert self.tasks is not None
        tasks, counts = self.tasks
        share = self.task_weight.exp() + counts
        return (share / share.sum())[tasks] / counts[tasks]

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input
        means, variances = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        cast(Tensor, self.num_batches_tracked).add_(1)
        rate = self.next_rate()
        if self.tasks is None or len(self.task_weight) < 2:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            centred = x - mean[:, None, None]
        else:
            weights = self.image_weights()
            mean = weights @ x.mean((2, 3))
            centred = x - mean[:, None, None]
            var = weights @ centred.square().mean((2, 3))
            self.missing = 1 - weights.detach().sum()
        out = centred / (var + self.eps).sqrt()[:, None, None]
        if self.affine:
            out = out * self.weight[:, None, None] + self.bias[:, None, None]
        means.add_(mean.detach() - means, alpha=rate)
        variances.mul_(1 - rate).add_(var.detach(), alpha=rate)
        self.distance = F.mse_loss(mean, means) + F.mse_loss(var, variances)
        return out

    def get_extra_state(self) -> dict[str, Any]:
        return {"rate": self.rate}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        self.rate = state["rate"]


class AdaB2N(DERpp):
    """Replay through a network whose batch normalisation is balanced.

    Args:
        num_classes, epochs, optim, loss_scope, capacity, insertion, replay_batch: as in `ER`.
        loss: `derpp`: that of DER++; `er_ace`: that of ER-ACE, new images among the classes of
            their batch and those to come, images of the memory among all, none in the first task;
            `er`: one cross-entropy over all images.
        alpha, beta: as in `DERpp`, of `derpp`.
        kappa: from 1, a constant rate of the running statistics, to 0, their mean over all steps.
        regularizer: weight of the squared distances, summed over layers.
        regularized_from: first task, counted from 0, in which they are part of the loss.

    Raises:
        UserError: for a network without two-dimensional batch normalisation.
    """

    needs = frozenset({"features", "batch_norm", OWN_CLASSES})
    unmergeable = "its norms have one more weight with each task"
    prefers = "cnn"

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        num_classes: int,
        epochs: Count,
        optim: Optim,
        loss_scope: Literal["seen", "all"],
        capacity: Count,
        insertion: Rule,
        replay_batch: Size,
        loss: Literal["derpp", "er_ace", "er"],
        alpha: NonNegative,
        beta: NonNegative,
        kappa: Unit,
        regularizer: NonNegative,
        regularized_from: CountOrZero,
    ) -> None:
        layers = replace_batch_norms(backbone.net, lambda _, layer: BalancedNorm(layer, kappa))
        if not layers:
            raise UserError(
                f"strategy=adab2n replaces BatchNorm2d, of which {backbone.tag} has none: use "
                "strategy=derpp, or a network such as backbone=resnet50_in1k"
            )
        super().__init__(
            backbone,
            seed=seed,
            num_classes=num_classes,
            epochs=epochs,
            optim=optim,
            loss_scope=loss_scope,
            freeze_bn=False,
            adapter=None,
            capacity=capacity,
            insertion=insertion,
            replay_batch=replay_batch,
            alpha=alpha,
            beta=beta,
        )
        self.norms = [cast(BalancedNorm, layer) for layer in layers.values()]
        self.loss = loss
        self.regularizer, self.regularized_from = regularizer, regularized_from
        self.all_draws = self.draws if loss == "derpp" else 1

    def grow(self, task: Task) -> None:
        for layer in self.norms:
            layer.grow()
        self.draws = 0 if self.loss == "er_ace" and not task.index else self.all_draws
        super().grow(task)

    def _gradients(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        images, labels = [x for _, x, _ in self.drawn], [y for _, _, y in self.drawn]
        tasks = [self._task] * len(batch.y)
        tasks += [self.buffer.tasks[p] for positions, _, _ in self.drawn for p in positions]
        scores, logged = self.balanced_pass(torch.cat([batch.x, *images]), torch.tensor(tasks))
        mine, *drawn = scores.split([len(y) for y in (batch.y, *labels)])
        if self.loss == "er":
            loss = self.cross_entropy(scores, torch.cat([batch.y, *labels]))
        elif self.loss == "er_ace":
            loss = F.cross_entropy(self.of_batch(mine, batch.y), batch.y)
            if drawn:
                loss = loss + self.cross_entropy(drawn[0], labels[0])
        else:
            if self.answers is None:  # not those of a second pass
                self.answers = mine.detach()
            loss = self.cross_entropy(mine, batch.y)
            if drawn:
                loss = loss + self.alpha * self.distance(drawn[0], self.drawn[0][0])
            if drawn[1:]:
                loss = loss + self.beta * self.cross_entropy(drawn[1], labels[1])
        if drawn and self._task >= self.regularized_from:
            loss = loss + self.regularizer * logged["distance"]
        self.task_optim.backward(self.optimizer, loss)
        return mine.detach(), loss.detach(), {k: v.detach() for k, v in logged.items()}

    def balanced_pass(self, x: Tensor, tasks: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores [B, C] of images of `tasks` int64 [B]; distances summed, missing shares averaged.

        Without images of the memory, nothing is weighted.
        """
        tasks = tasks.to(x.device)
        counts = torch.bincount(tasks, minlength=len(self.norms[0].task_weight))
        try:
            for layer in self.norms:
                layer.tasks = (tasks, counts) if self.drawn else None
            scores = self.head(self.features(x))
            distance = torch.stack([layer.distance for layer in self.norms]).sum()
            missing = torch.stack([layer.missing for layer in self.norms]).mean()
        finally:
            for layer in self.norms:
                layer.tasks = None
                layer.distance = layer.missing = x.new_zeros(())
        return scores, {"distance": distance, "missing": missing}

    def of_batch(self, scores: Tensor, y: Tensor) -> Tensor:
        """Scores [B, C] of new images; lowest for classes that are neither in their batch nor to
        come (ER-ACE). The newest one seen counts as to come, unless it is the last of all."""
        newest = max([int(y.max()), *self.buffer.offered])
        kept = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
        kept[y] = True
        if newest < self.num_classes - 1:
            kept[newest:] = True
        return scores.masked_fill(~kept, torch.finfo(scores.dtype).min)
