"""The training loop of the source phase: what ViDA, EcoTTA and their like do before deployment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from driftline.core.errors import UserError
from driftline.core.ranges import Count, Without
from driftline.core.strategy import Progress
from driftline.core.stream import Batch, SourceImages
from driftline.parts.optim import Optim


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """Epochs over labelled source images with a scheduled learning rate.

    Args:
        epochs: Count
        batch_size: Count
        optim: of the one group `trained`; the rate may rise step by step in its first epochs.
        augment: pipeline of the images, `none` or `photometric` (colour jitter, blur, greyscale).
        every: batches between two saved states.
    """

    epochs: Count
    batch_size: Count
    optim: Annotated[Optim, Without(("later",), "a warm-up has no tasks")]
    augment: Literal["none", "photometric"]
    every: Count

    def settings(self) -> dict[str, Any]:
        """All options that change the result, for the artefact's key."""
        own = {k: v for k, v in vars(self).items() if k not in ("every", "optim")}
        return own | {"optim": self.optim.settings()}

    def run(
        self,
        module: nn.Module,
        loss: Callable[[Batch], Tensor],
        source: SourceImages,
        progress: Progress,
        after: Callable[[int, int, int], None] = lambda epoch, step, steps: None,
    ) -> None:
        """Train the parameters of `module` that require gradients; goes on where it was cut.

        Args:
            module: holds everything that the training changes (buffers too), in the mode to
                train in; its state is what `progress` keeps.
            loss: of one batch on the module's device, 0-dim.
            after: called after every update with the epoch (from 0), the updates in it so far, and
                how many it has; may change the module's state.

        Raises:
            UserError: when the loss is not finite.
        """
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = self.optim.optimizer({"trained": trained})
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
                self.optim.set_rates(optimizer, epoch, self.epochs, step, steps)
                with torch.enable_grad():
                    value = loss(batch.to(device))
                if not torch.isfinite(value):
                    raise UserError(
                        f"the warm-up loss is {value.item()} in epoch {epoch + 1}, batch {step}; "
                        f"lower strategy.warmup.optim.lr (now {self.optim.lr:g}) or raise "
                        "strategy.warmup.optim.rise"
                    )
                value.backward()
                self.optim.update(optimizer)
                total += value.detach()
                step += 1
                after(epoch, step, steps)
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
