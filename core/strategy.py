"""The two protocols a method implements: `CLStrategy` for tasks, `TTAStrategy` for shifts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from core.build import locate
from core.errors import UserError
from core.seed import generator
from core.stream import Batch, SourceImages, Task


class Strategy(nn.Module):
    """A method: a module that owns a backbone, perhaps an optimiser, and its random generators.

    A subclass takes `backbone` (and `seed` if it draws random numbers) plus keyword-only
    hyper-parameters; it never sees a configuration object.

    Its state needs no code: parameters and buffers of the whole module tree, also those that change
    their size or are None at first, the optimisers and generators that any of its modules has as
    an attribute, the methods inside it, and plain values for which a module defines
    `get_extra_state` and `set_extra_state`, as in torch. Other attributes are not part of it.
    """

    needs: frozenset[str] = frozenset()  # of what stream and backbone provide
    batch_dependent: bool = False  # True: `predict` depends on how images are batched
    static: bool = False  # True: `predict` never changes once the stream has begun
    outputs: Literal["logits", "probabilities"] = "logits"
    prefers: Literal["vit"] | None = None  # which kind backbone=auto picks

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
        """Names of backbone tensors that never change and are therefore left out of snapshots.

        A weight that has several names is frozen under all of them.
        """
        fixed = {id(p) for p in self.backbone.parameters() if not p.requires_grad}
        named = self.named_parameters(remove_duplicate=False)
        own = {name for name, p in named if id(p) in fixed}
        for name, method in self.methods_inside().items():
            own = {n for n in own if not n.startswith(f"{name}.")}
            own |= {f"{name}.{n}" for n in method.frozen()}
        return own

    def methods_inside(self) -> dict[str, Strategy]:
        """The methods that this one is around, by their name in the module tree."""
        inside: dict[str, Strategy] = {}
        for name, module in self.named_modules():
            nested = any(name.startswith(f"{outer}.") for outer in inside)
            if name and isinstance(module, Strategy) and not nested:
                inside[name] = module
        return inside

    def _parts(self) -> Iterator[tuple[str, nn.Module]]:
        """This module ("") and every other one in it that belongs to no method inside."""
        inside = self.methods_inside()
        for name, module in self.named_modules():
            if not any(f"{name}.".startswith(f"{outer}.") for outer in inside):
                yield name, module

    def snapshot(self) -> dict[str, Any]:
        """Everything that `restore` needs: tensors and plain values, without frozen weights."""
        inside = {name: method.snapshot() for name, method in self.methods_inside().items()}
        return self._own_snapshot() | ({"inside": inside} if inside else {})

    def _own_snapshot(self) -> dict[str, Any]:
        """`snapshot` without the methods inside."""
        frozen = self.frozen()
        own = self._split_off_inside(self.state_dict())[0]
        buffers = [row for part in self._parts() for row in _buffers(*part)]
        return {
            "tensors": {name: value for name, value in own.items() if name not in frozen},
            "empty": [n for n, _, _, held in buffers if held is None and n not in frozen],
            "generators": {k: g.get_state() for k, g in self._generators.items()},
            "attributes": {n: _state_of(held) for n, _, _, held in self._attributes()},
        }

    def _split_off_inside(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Entries of a `state_dict`: our own, and those of methods inside."""
        prefixes = tuple(f"{name}." for name in self.methods_inside())
        own = {name: value for name, value in state.items() if not name.startswith(prefixes)}
        return own, {name: value for name, value in state.items() if name not in own}

    def _attributes(self) -> Iterator[tuple[str, nn.Module, str, Any]]:
        """Optimisers, schedules and generators: full name, module, attribute and value."""
        for part, module in self._parts():
            for attribute, value in [*vars(module).items()]:
                if isinstance(value, torch.Generator) or _keeps_state(value):
                    yield f"{part}.{attribute}".lstrip("."), module, attribute, value

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of `snapshot` on a strategy of the same structure.

        Buffers and parameters take the sizes that the snapshot has.

        Raises:
            UserError: for the snapshot of another structure.
        """
        tensors, frozen = state["tensors"], self.frozen()
        for name, part in self._parts():
            _fit(name, part, tensors, state["empty"], self.device)
        # Plain values are copied: the method may go on changing what it is given.
        loaded = {k: v if isinstance(v, Tensor) else deepcopy(v) for k, v in tensors.items()}
        inside = self._split_off_inside(self.state_dict())[1]  # as it is; restored by itself below
        missing, unexpected = self.load_state_dict(loaded | inside, strict=False)
        wrong = {*missing, *unexpected} - frozen

        for name, rng_state in state["generators"].items():
            self.rng(name).set_state(rng_state)
        stored = dict(state["attributes"])
        for name, module, attribute, held in self._attributes():
            if name in stored:
                _set_state(held, deepcopy(stored.pop(name)))
            elif not isinstance(held, torch.Generator):  # not made yet when the snapshot was taken
                setattr(module, attribute, None)
        wrong |= stored.keys()
        methods, snapshots = self.methods_inside(), state.get("inside", {})
        if wrong := sorted(wrong | (snapshots.keys() - methods.keys())):
            raise UserError(
                f"the checkpoint does not fit {type(self).__name__}: first mismatch {wrong[0]!r} "
                f"({len(wrong)} in all). Use on_exists=rerun to start again."
            )
        for name, snapshot in snapshots.items():
            methods[name].restore(snapshot)

    def report(self) -> dict[str, float]:
        """Counts of this method that belong into the result, for example skipped updates."""
        return {}

    def updated_parameters(self) -> Iterable[Tensor]:
        """The parameters that the optimisers move."""
        moved = [
            parameter
            for _, _, _, held in self._attributes()
            if isinstance(held, torch.optim.Optimizer)
            for group in held.param_groups
            for parameter in group["params"]
        ]
        for method in self.methods_inside().values():
            moved += method.updated_parameters()
        return list({id(parameter): parameter for parameter in moved}.values())


def _keeps_state(value: Any) -> bool:
    """Whether `value` is an optimiser, a schedule or the like: no module, but with a state."""
    return hasattr(type(value), "load_state_dict") and not isinstance(value, nn.Module)


def _state_of(held: Any) -> Any:
    return held.get_state() if isinstance(held, torch.Generator) else held.state_dict()


def _set_state(held: Any, state: Any) -> None:
    if isinstance(held, torch.Generator):
        held.set_state(state)
    else:
        held.load_state_dict(state)


def _buffers(part: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor | None]]:
    """Buffers in a module's state: full name, module, attribute and value."""
    for attribute, held in [*module._buffers.items()]:
        if attribute not in module._non_persistent_buffers_set:
            yield f"{part}.{attribute}".lstrip("."), module, attribute, held


@torch.no_grad()
def _fit(
    part: str,
    module: nn.Module,
    tensors: Mapping[str, Any],
    empty: Iterable[str],
    device: torch.device,
) -> None:
    """Give the tensors of one module the sizes of those in `tensors`, so that they can be loaded.

    Args:
        empty: names of buffers that are None.
        device: of buffers that were None until now.
    """
    none = set(empty)
    for name, _, attribute, held in _buffers(part, module):
        stored = tensors.get(name)
        if name in none:
            setattr(module, attribute, None)
        elif stored is not None and (
            held is None or (held.shape, held.dtype) != (stored.shape, stored.dtype)
        ):
            place = device if held is None else held.device
            setattr(module, attribute, stored.to(place, copy=True))
    for attribute, held in module._parameters.items():
        stored = tensors.get(f"{part}.{attribute}".lstrip("."))
        if held is not None and stored is not None and held.shape != stored.shape:
            held.data, held.grad = stored.to(held.device, held.dtype, copy=True), None


class CLStrategy(Strategy):
    """A continual-learning method: `begin_task`, `observe` per batch, `end_task`, `predict`."""

    epochs: int = 0  # passes over the training images of a task

    def grow(self, task: Task) -> None:
        """Create modules and optimiser for `task`; also called, in order, when a run resumes."""

    def begin_task(self, task: Task) -> None:
        """Prepare `task`; the default only grows. Not called again when a run resumes."""
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
        for method in self.methods_inside().values():
            if isinstance(method, TTAStrategy):
                method.begin_stream()
        self._start = deepcopy(self._own_snapshot())

    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] for `x` float [B, 3, H, W] in [0, 1]; may update the method."""
        raise NotImplementedError

    def reset(self) -> None:
        """Back to the state after `begin_stream`; generators run on."""
        for method in self.methods_inside().values():
            if isinstance(method, TTAStrategy):
                method.reset()
        kept = self._start["attributes"]
        moving = {name: state for name, state in kept.items() if not isinstance(state, Tensor)}
        self.restore({**self._start, "generators": {}, "attributes": moving})


class Wrapper(TTAStrategy):
    """A rule around another method: hands everything on; a subclass changes `adapt`.

    What is known of the method (`needs`, `batch_dependent`, ...) is that of the inner one, and so
    are its parameters, its report and its source phase.

    Args:
        inner: the method; its backbone and seed are ours.
    """

    inner: TTAStrategy

    def __init__(self, inner: TTAStrategy) -> None:
        nn.Module.__init__(self)  # the backbone is the inner one's: it has no second name here
        self.inner, self.seed = inner, inner.seed
        self.optimizer, self._generators = None, {}
        self.needs, self.prefers = inner.needs, inner.prefers
        self.batch_dependent, self.static = inner.batch_dependent, inner.static
        self.outputs = inner.outputs

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override]
        return self.inner.backbone

    @classmethod
    def uses_source(cls, options: Mapping[str, Any]) -> bool:
        return locate(options["inner"]["_target_"]).uses_source(options["inner"])

    def preparation(self) -> dict[str, Any] | None:
        return self.inner.preparation()

    def prepare(self, source: SourceImages, progress: Progress) -> dict[str, Tensor]:
        return self.inner.prepare(source, progress)

    def use_prepared(self, artefact: Mapping[str, Tensor]) -> None:
        self.inner.use_prepared(artefact)

    def predict(self, x: Tensor) -> Tensor:
        return self.inner.predict(x)

    def report(self) -> dict[str, float]:
        return self.inner.report()


def unwrapped(strategy: Strategy) -> Strategy:
    """The method itself, without the rules around it."""
    while isinstance(strategy, Wrapper):
        strategy = strategy.inner
    return strategy
