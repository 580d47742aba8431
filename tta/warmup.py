"""The training loop of the source phase: what ViDA, EcoTTA and their like do before deployment."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from driftline.backbones.surgery import make_optimizer
from driftline.core.errors import UserError
from driftline.core.ranges import Below1, Count, CountOrZero, NonNegative, Unit
from driftline.core.strategy import Progress
from driftline.core.stream import Batch, SourceImages


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """Epochs over labelled source images with a scheduled learning rate.

    Args:
        epochs: Count
        batch_size: Count
        optimizer: `sgd` (reads `momentum`, `nesterov`) or `adam` (reads `betas`).
        lr: NonNegative
        rise: CountOrZero
        schedule: after that. `constant`; `steps`: times `gamma` at each of `milestones` (epochs);
            `cosine`: to 0 at the end, per epoch.
        augment: pipeline of the images, `none` or `photometric` (colour jitter, blur, greyscale).
        every: Count
    """

    epochs: Count
    batch_size: Count
    optimizer: Literal["sgd", "adam"]
    lr: NonNegative
    momentum: Unit
    nesterov: bool
    betas: tuple[Below1, Below1]
    weight_decay: NonNegative
    rise: CountOrZero
    schedule: Literal["constant", "steps", "cosine"]
    milestones: Sequence[CountOrZero]
    gamma: NonNegative
    augment: Literal["none", "photometric"]
    every: Count

    def settings(self) -> dict[str, Any]:
        """All options that change the result, for the artefact's key."""
        return {
            k: list(v) if isinstance(v, Sequence) and not isinstance(v, str) else v
            for k, v in vars(self).items()
            if k != "every"
        }

    def rate(self, epoch: int, step: int, steps: int) -> float:
        """Learning rate of `step` (of `steps`) in `epoch`, all from 0."""
        if epoch < self.rise:
            return self.lr * (epoch * steps + step) / (self.rise * steps)
        if self.schedule == "steps":
            return self.lr * self.gamma ** sum(epoch >= m for m in self.milestones)
        if self.schedule == "cosine":
            share = (epoch - self.rise) / max(1, self.epochs - self.rise)
            return self.lr * 0.5 * (1 + math.cos(math.pi * share))
        return self.lr

    def run(
        self,
        module: nn.Module,
        loss: Callable[[Batch], Tensor],
        source: SourceImages,
        progress: Progress,
    ) -> None:
        """Train the parameters of `module` that require gradients; goes on where it was cut.

        Args:
            module: holds everything that the training changes (buffers too), in the mode to
                train in; its state is what `progress` keeps.
            loss: of one batch on the module's device, 0-dim.

        Raises:
            UserError: when the loss is not finite.
        """
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = make_optimizer(
            trained,
            self.optimizer,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            betas=self.betas,
            weight_decay=self.weight_decay,
        )
        device = trained[0].device
        steps = -(-source.images // self.batch_size)
        epoch = step = 0
        if state := progress.load():
            module.load_state_dict(state["module"])
            optimizer.load_state_dict(state["optimizer"])
            epoch, step = state["epoch"], state["step"]
            progress.say(f"warm-up goes on in epoch {epoch + 1}, batch {step}")
        while epoch < self.epochs:
            batches = source.batches(self.batch_size, epoch=epoch, start=step, augment=self.augment)
            total = torch.zeros((), device=device)
            first = step
            for batch in batches:
                for group in optimizer.param_groups:
                    group["lr"] = self.rate(epoch, step, steps)
                with torch.enable_grad():
                    value = loss(batch.to(device))
                if not torch.isfinite(value):
                    raise UserError(
                        f"the warm-up loss is {value.item()} in epoch {epoch + 1}, batch {step}; "
                        f"lower strategy.warmup.lr (now {self.lr}) or raise strategy.warmup.rise"
                    )
                value.backward()
                optimizer.step()
                optimizer.zero_grad()
                total += value.detach()
                step += 1
                if step % self.every == 0:
                    progress.save(self._state(module, optimizer, epoch, step))
            progress.say(
                f"warm-up epoch {epoch + 1}/{self.epochs}: loss {total / max(1, step - first):.4f}"
            )
            epoch, step = epoch + 1, 0
            progress.save(self._state(module, optimizer, epoch, step))

    @staticmethod
    def _state(
        module: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, step: int
    ) -> dict[str, Any]:
        return {
            "module": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": epoch,
            "step": step,
        }
