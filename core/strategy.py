"""The two protocols a method implements: `CLStrategy` for tasks, `TTAStrategy` for shifts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from core.errors import UserError
from core.seed import generator
from core.stream import Batch, SourceImages, Task


class Strategy(nn.Module):
    """A method: a module that owns a backbone, perhaps an optimiser, and its random generators.

    A subclass takes `backbone` (and `seed` if it draws random numbers) plus keyword-only
    hyper-parameters; it never sees a configuration object.
    """

    needs: ClassVar[frozenset[str]] = frozenset()  # of what stream and backbone provide
    batch_dependent: ClassVar[bool] = False  # True: `predict` depends on how images are batched
    static: ClassVar[bool] = False  # True: `predict` never changes once the stream has begun
    outputs: ClassVar[Literal["logits", "probabilities"]] = "logits"
    prefers: ClassVar[Literal["vit"] | None] = None  # which kind backbone=auto picks

    def __init__(self, backbone: nn.Module, *, seed: int = 0) -> None:
        super().__init__()
        self.backbone = backbone
        self.seed = seed
        self.optimizer: torch.optim.Optimizer | None = None
        self._generators: dict[str, torch.Generator] = {}

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def rng(self, purpose: str, device: str | torch.device = "cpu") -> torch.Generator:
        """This method's own generator for `purpose`; its state is part of the snapshot."""
        if purpose not in self._generators:
            self._generators[purpose] = generator(self.seed, "strategy", purpose, device=device)
        return self._generators[purpose]

    def predict(self, x: Tensor) -> Tensor:
        """Scores [B, C] for images `x` float [B, 3, H, W] in [0, 1]; changes nothing."""
        raise NotImplementedError

    def frozen(self) -> set[str]:
        """Names of backbone tensors that never change and are therefore left out of snapshots."""
        return {
            f"backbone.{name}"
            for name, p in self.backbone.named_parameters()
            if not p.requires_grad
        }

    def snapshot(self) -> dict[str, Any]:
        """Everything that `restore` needs: tensors and plain values, without frozen weights."""
        frozen = self.frozen()
        state: dict[str, Any] = {
            "tensors": {k: v for k, v in self.state_dict().items() if k not in frozen},
            "generators": {k: g.get_state() for k, g in self._generators.items()},
        }
        if self.optimizer is not None:
            state["optimizer"] = self.optimizer.state_dict()
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of `snapshot` on a strategy of the same structure."""
        missing, unexpected = self.load_state_dict(state["tensors"], strict=False)
        wrong = sorted({*missing, *unexpected} - self.frozen())
        if wrong:
            raise UserError(
                f"the checkpoint does not fit {type(self).__name__}: first mismatch {wrong[0]!r} "
                f"({len(wrong)} in all). Use on_exists=rerun to start again."
            )
        for name, rng_state in state["generators"].items():
            self.rng(name).set_state(rng_state)
        if self.optimizer is not None and "optimizer" in state:
            self.optimizer.load_state_dict(deepcopy(state["optimizer"]))

    def report(self) -> dict[str, float]:
        """Counts of this method that belong into the result, for example skipped updates."""
        return {}

    def updated_parameters(self) -> Iterable[Tensor]:
        """The parameters that the optimiser moves."""
        if self.optimizer is None:
            return []
        return [p for group in self.optimizer.param_groups for p in group["params"]]


class CLStrategy(Strategy):
    """A continual-learning method: `begin_task`, `observe` per batch, `end_task`, `predict`."""

    epochs: int = 0  # passes over the training images of a task

    def grow(self, task: Task) -> None:
        """Create the modules that `task` needs; also called, in order, when a run resumes."""

    def begin_task(self, task: Task) -> None:
        """Prepare `task`; the default only grows. Optimiser and schedule are made here."""
        self.grow(task)

    def begin_epoch(self, task: Task, epoch: int) -> None:
        """Called before each epoch."""

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        """One update; returns 0-dim tensors to log."""
        raise NotImplementedError

    def end_task(self, task: Task) -> None:
        """Prototypes, statistics, merging: anything after the last epoch."""

    def extractors(self) -> Mapping[str, str] | None:
        """Frozen feature extractors that `predict` reads: name -> hash of their weights.

        An image's features under an unchanged hash are computed once a run, see
        `core/features.py`. None (the default): nothing can be kept. A method that names some
        defines `embed` and `classify`, and `predict(x)` must equal `classify` of what `embed`
        returns for all of them.
        """
        return None

    def embed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """Features [T, B, D] of images `x` [B, 3, H, W] under the extractors `names`."""
        raise NotImplementedError

    def classify(self, features: Mapping[str, Tensor]) -> Tensor:
        """Scores [B, C] from the features [B, D] under every extractor."""
        raise NotImplementedError


class Progress(Protocol):
    """Where `prepare` keeps what it has done so far."""

    def load(self) -> dict[str, Any] | None:
        """The last saved state, or None at the beginning."""
        ...

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep a state of tensors and plain values; replaces the one before."""
        ...

    @property
    def say(self) -> Callable[[str], None]:
        """Prints one line for the user."""
        ...


class TTAStrategy(Strategy):
    """A test-time adaptation method: `adapt` returns the prediction that is scored.

    A method that needs the source defines `uses_source`, `preparation`, `prepare` and
    `use_prepared`. `prepare` runs on an instance of its own, which is then thrown away: what it
    returns is all that reaches the run, from memory or from the cache alike.
    """

    @classmethod
    def uses_source(cls, options: Mapping[str, Any]) -> bool:
        """Whether the method with these settings prepares on source images."""
        return False

    def preparation(self) -> dict[str, Any] | None:
        """Everything, as JSON values, that the artefact depends on beside weights and images.

        None: this instance needs no preparation.
        """
        return None

    def prepare(self, source: SourceImages, progress: Progress) -> dict[str, Tensor]:
        """Work on labelled source images before deployment; returns the artefact.

        Args:
            source: the images; shuffled by epoch on request.
            progress: where a long preparation keeps its state, so that it can be interrupted.
        """
        raise NotImplementedError

    def use_prepared(self, artefact: Mapping[str, Tensor]) -> None:
        """Start from `artefact` (on the CPU), the return value of an earlier `prepare`."""
        raise NotImplementedError

    def begin_stream(self) -> None:
        """Mark the start of the stream, to which `reset` goes back."""
        self._start = deepcopy(self.snapshot())

    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] for `x` float [B, 3, H, W] in [0, 1]; may update the method."""
        raise NotImplementedError

    def reset(self) -> None:
        """Back to the state after `begin_stream`; generators run on."""
        start = dict(self._start)
        start["generators"] = {}
        self.restore(start)
