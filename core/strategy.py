"""The two protocols a method implements: `CLStrategy` for tasks, `TTAStrategy` for shifts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from inspect import signature
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from driftline.core.errors import UserError
from driftline.core.oracle import Oracle
from driftline.core.seed import generator
from driftline.core.stream import Batch, SourceImages, Task

Preferred = Literal["vit", "cnn"] | None
ScoreKind = Literal["logits", "probabilities"]


class Strategy(nn.Module):
    """A method: a module that owns a backbone, perhaps an optimiser, and its random generators.

    A subclass takes `backbone` (and `seed` if it draws random numbers) plus keyword-only
    hyper-parameters; it never sees a configuration object.

    Its state is what a walk over its modules meets: parameters and registered buffers (those that
    grow too), the extra state of modules (`get_extra_state`, for plain values), and optimisers,
    learning-rate schedules and generators that are attributes of a module. Plain tensors, lists and
    dictionaries are no state. A strategy inside another one answers for its own part of the tree.
    """

    needs: ClassVar[frozenset[str]] = frozenset()  # of what stream and backbone provide
    batch_dependent: ClassVar[bool] = False  # True: `predict` depends on how images are batched
    static: ClassVar[bool] = False  # True: nothing is learned that a later batch could meet
    outputs: ClassVar[ScoreKind] = "logits"
    records_nan: ClassVar[bool] = False  # True: non-finite scores are counted and stop no run
    prefers: ClassVar[Preferred] = None  # which kind backbone=auto picks
    buys_labels: ClassVar[bool] = False  # True: gets an `Oracle`; no other method meets a label
    made_of: Mapping[str, Any] | None = None  # settings, for `driftline.save`; not of the state

    def __init__(self, backbone: nn.Module, *, seed: int = 0) -> None:
        super().__init__()
        self.backbone = backbone
        self.seed = seed
        self.optimizer: Optimizer | None = None
        self._generators: dict[str, torch.Generator] = {}
        self._restored: dict[str, Tensor] = {}  # states of generators that are not made yet

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @classmethod
    def preferred_backbone(cls, options: Mapping[str, Any]) -> Preferred:
        """Which kind backbone=auto picks for the method with these settings."""
        return cls.prefers

    @classmethod
    def takes_seed(cls, options: Mapping[str, Any]) -> bool:
        """Whether the seed can matter to the method with these settings.

        The default: whether the constructor has such a parameter. A class that knows better says so
        for itself alone, not for those derived from it. Where False, all seeds may share one run,
        if it also leaves the global generators alone: see `runs/seeds.py`.
        """
        parameters = signature(cls).parameters.values()
        return any(p.name == "seed" or p.kind is p.VAR_KEYWORD for p in parameters)

    def rng(self, purpose: str, device: str | torch.device = "cpu") -> torch.Generator:
        """This method's own generator for `purpose`; its state is part of the snapshot."""
        if purpose not in self._generators:
            rng = generator(self.seed, "strategy", purpose, device=device)
            if purpose in self._restored:
                rng.set_state(self._restored.pop(purpose))
            self._generators[purpose] = rng
        return self._generators[purpose]

    def predict(self, x: Tensor) -> Tensor:
        """Scores [B, C] for images `x` float [B, 3, H, W] in [0, 1]; changes nothing."""
        raise NotImplementedError

    def report(self) -> dict[str, float]:
        """Counts of this method that belong into the result, for example skipped updates."""
        return {}

    # ------------------------------------------------------------------ state

    def strategies(self) -> dict[str, Strategy]:
        """The strategies inside this one by name, without those inside of them."""
        inner: dict[str, Strategy] = {}
        for name, module in self.named_modules():
            if module is not self and isinstance(module, Strategy) and not _under(name, inner):
                inner[name] = module
        return inner

    def frozen(self) -> set[str]:
        """Names of tensors that never change and are therefore left out of snapshots.

        The default: parameters of the backbone without gradients, under every name they have. What
        lies in an inner strategy is as that one says.
        """
        named = _tensors(self)
        inner = self.strategies()
        frozen = {f"{path}.{name}" for path, one in inner.items() for name in one.frozen()}
        elsewhere = {id(t) for name, t in named.items() if _under(name, inner)}
        fixed = {id(p) for p in self.backbone.parameters() if not p.requires_grad} - elsewhere
        fixed |= {id(named[name]) for name in frozen}
        return {name for name, t in named.items() if id(t) in fixed}

    def snapshot(self) -> dict[str, Any]:
        """Everything that `restore` needs: tensors and plain values, without frozen weights."""
        return self._own_state() | {
            "inner": {name: one.snapshot() for name, one in self.strategies().items()}
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of `snapshot` on a strategy of the same structure.

        Buffers and parameters take the shape that they had, lists of parameters their length.

        Raises:
            UserError: where the structure is another one.
        """
        inner = self.strategies()
        if inner.keys() != state["inner"].keys():
            raise self._misfit(inner.keys() ^ state["inner"].keys())
        self._restore_own(state)
        self._restore_generators(state["generators"])
        for name, one in inner.items():
            one.restore(state["inner"][name])

    def updated_parameters(self) -> Iterable[Tensor]:
        """The parameters that optimisers move, each once."""
        own = _attributes(self._parts(), Optimizer).values()
        moved = [p for o in own for group in o.param_groups for p in group["params"]]
        moved += [p for one in self.strategies().values() for p in one.updated_parameters()]
        return list({id(p): p for p in moved}.values())

    def _parts(self) -> list[tuple[str, nn.Module]]:
        """Modules by name, this one first, without inner strategies and what lies in them."""
        elsewhere = {id(part) for one in self.strategies().values() for part in one.modules()}
        if not elsewhere:
            return list(self.named_modules())
        return [(name, part) for name, part in self.named_modules() if id(part) not in elsewhere]

    def _own_names(self, names: Iterable[str]) -> set[str]:
        """Those names of the state of this strategy that are not in that of an inner one."""
        inner = self.strategies()
        if not inner:
            return set(names)
        named = _tensors(self)
        elsewhere = {id(t) for name, t in named.items() if _under(name, inner)}
        return {
            name
            for name in names
            if not _under(name, inner) and id(named.get(name)) not in elsewhere
        }

    def _own_state(self) -> dict[str, Any]:
        """The snapshot without inner strategies."""
        parts, state = self._parts(), self.state_dict()
        names = self._own_names(state) - self.frozen()
        schedules = _attributes(parts, (Optimizer, LRScheduler))
        generators = {k: g.get_state() for k, g in _attributes(parts, torch.Generator).items()}
        generators |= self._restored | {k: g.get_state() for k, g in self._generators.items()}
        return {
            "tensors": {k: v for k, v in state.items() if k in names},
            "empty": [name for name, buffer in _buffers(parts) if buffer is None],
            "learning": [name for name, p in _listed(parts) if p.requires_grad and name in names],
            "generators": generators,
            "optimizers": {name: held.state_dict() for name, held in schedules.items()},
        }

    def _restore_own(self, state: Mapping[str, Any]) -> None:
        """`restore` without generators and inner strategies."""
        parts, frozen = self._parts(), self.frozen()
        optimizers = _attributes(parts, (Optimizer, LRScheduler))
        wrong = set(state["empty"]) - {name for name, _ in _buffers(parts)}
        # One that appears or goes within a stream or task could neither be resumed nor reset.
        wrong |= optimizers.keys() ^ state["optimizers"].keys()
        if wrong:
            raise self._misfit(wrong)
        # Loading copies tensors; other values would be handed on as they are.
        tensors = {
            k: v if isinstance(v, Tensor) else deepcopy(v) for k, v in state["tensors"].items()
        }
        _fit(parts, tensors, frozen, set(state["learning"]), self.device)
        for name in state["empty"]:
            path, _, key = name.rpartition(".")
            self.get_submodule(path)._buffers[key] = None
        missing, unexpected = self.load_state_dict(tensors, strict=False)
        wrong = (self._own_names(missing) - frozen) | set(unexpected)
        if wrong:
            raise self._misfit(wrong)
        for name, held in state["optimizers"].items():
            try:
                optimizers[name].load_state_dict(deepcopy(held))
            except ValueError as error:  # it holds other parameters than it did
                raise self._misfit({name}) from error

    def _restore_generators(self, states: Mapping[str, Tensor]) -> None:
        held = _attributes(self._parts(), torch.Generator)
        # One that was not made yet shall start anew when it is asked for.
        self._generators = {k: g for k, g in self._generators.items() if k in states}
        self._restored = {}
        for name, rng_state in states.items():
            if rng := held.get(name, self._generators.get(name)):
                rng.set_state(rng_state)
            else:
                self._restored[name] = rng_state

    def _misfit(self, names: set[str]) -> UserError:
        return UserError(
            f"the state does not fit {type(self).__name__}: first mismatch {min(names)!r} "
            f"({len(names)} in all). For a checkpoint, on_exists=rerun starts again; a method of "
            "your own makes modules and optimisers in its constructor or in grow."
        )


def _under(name: str, paths: Iterable[str]) -> bool:
    """Whether a dotted name is one of `paths` or lies below one."""
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under every name, the objects themselves."""
    state = module.state_dict(keep_vars=True)
    return {name: held for name, held in state.items() if isinstance(held, Tensor)}


def optimizers(strategy: nn.Module) -> list[Optimizer]:
    """Every optimiser in the tree of modules, those of inner strategies too."""
    return [*_attributes(strategy.named_modules(), Optimizer).values()]


def _attributes(parts: Iterable[tuple[str, nn.Module]], kind: Any) -> dict[str, Any]:
    """Objects of a class (or classes) that are attributes of modules, each once, by name."""
    held: dict[int, tuple[str, Any]] = {}
    for path, part in parts:
        for key, value in vars(part).items():
            if isinstance(value, kind):
                held.setdefault(id(value), (f"{path}.{key}".lstrip("."), value))
    return dict(held.values())


def _buffers(parts: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Tensor | None]]:
    """Buffers that are part of the state, with those that are None."""
    for path, part in parts:
        for key, buffer in part._buffers.items():
            if key not in part._non_persistent_buffers_set:
                yield f"{path}.{key}".lstrip("."), buffer


def _listed(parts: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters in lists and dictionaries of them, which may grow."""
    for path, part in parts:
        if isinstance(part, nn.ParameterList | nn.ParameterDict):
            for key, p in part._parameters.items():
                if p is not None:
                    yield f"{path}.{key}", p


def _fit(
    parts: Sequence[tuple[str, nn.Module]],
    tensors: Mapping[str, Any],
    frozen: set[str],
    learning: set[str],
    device: torch.device,
) -> None:
    """Give buffers and parameters the shapes of `tensors`, and lists of parameters their entries.

    Values are left to `load_state_dict`. A parameter stays the object that an optimiser holds.
    """
    for path, part in parts:
        prefix = f"{path}." if path else ""
        if isinstance(part, nn.ParameterList | nn.ParameterDict):
            saved = [k.removeprefix(prefix) for k in tensors if _under(k, [path])]
            for key in [k for k in part._parameters if k not in saved and prefix + k not in frozen]:
                if isinstance(part, nn.ParameterDict):
                    part.pop(key)
                else:  # torch's list has no way to remove an entry
                    delattr(part, key)
                    part._size -= 1
            for key in [k for k in saved if k not in part._parameters]:
                value = torch.empty_like(tensors[prefix + key], device=device)
                new = nn.Parameter(value, requires_grad=prefix + key in learning)
                part.update({key: new}) if isinstance(part, nn.ParameterDict) else part.append(new)
        for key, p in part._parameters.items():
            saved_p = tensors.get(prefix + key)
            if p is not None and isinstance(saved_p, Tensor) and _differ(p, saved_p):
                p.data = torch.empty_like(saved_p, device=p.device)
        for key, buffer in part._buffers.items():
            saved_b = tensors.get(prefix + key)
            if isinstance(saved_b, Tensor) and (buffer is None or _differ(buffer, saved_b)):
                place = device if buffer is None else buffer.device
                part._buffers[key] = torch.empty_like(saved_b, device=place)


def _differ(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or a.dtype != b.dtype


class CLStrategy(Strategy):
    """A continual-learning method: `begin_task`, `observe` per batch, `end_task`, `predict`."""

    averageable: bool = False  # True: what optimisers move is all of the answer that ever changes
    # Why the weights that tasks train cannot be merged (`around=merge`); empty: they can.
    unmergeable: str = "no weights of it go on from task to task"
    epochs: int = 0  # passes over the training images of a task

    def __init__(self, backbone: nn.Module, *, seed: int = 0) -> None:
        super().__init__(backbone, seed=seed)
        self._warned: set[str] = set()
        self.tasks_begun: list[Task] = []  # without their images, for `driftline.save`

    def warn_once(self, about: str, text: str) -> None:
        """Warn the user; of several warnings `about` one thing, the first alone is shown."""
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(text, stacklevel=3)

    def grow(self, task: Task) -> None:
        """Create modules and optimiser for `task`; also called, in order, when a run resumes."""

    def begin_task(self, task: Task) -> None:
        """Prepare `task`; the default only grows. Not called again when a run resumes."""
        self.grow(task)
        self.tasks_begun.append(task.without_images())

    def begin_epoch(self, task: Task, epoch: int) -> None:
        """Called before each epoch."""

    def batches(self, task: Task, epoch: int, start: int = 0) -> Iterator[Batch | None]:
        """Training batches of one epoch from number `start` on; more than `task` in a few methods.

        A pure function of the state: a resumed run asks again, within the epoch.
        """
        return task.train(epoch, start)

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
    returns is all that reaches the run, from memory or from the cache alike. One that goes on
    reading source images during the stream defines `replays_source` and `use_source`; one that
    pays for labels sets `buys_labels` and defines `use_oracle`.
    """

    counters: ClassVar[tuple[str, ...]] = ()  # attributes that count over the whole stream
    grows: ClassVar[str] = ""  # what it keeps the more of, the longer a stream is, and how much
    event = ""  # what a rule did at the last batch, for its record
    prepared: Mapping[str, Tensor] | None = None  # the artefact in use, for `driftline.save`
    make_another: Callable[[], TTAStrategy] | None = None  # to `prepare` with, `driftline.prepare`

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

    @classmethod
    def replays_source(cls, options: Mapping[str, Any]) -> bool:
        """Whether the method with these settings reads source images during the stream."""
        return False

    def use_source(self, source: SourceImages) -> None:
        """Labelled source images to read during the stream, see `parts/replay.py`.

        Called on every object of a method that replays the source, after `use_prepared` and before
        the first batch. The images are no state.
        """
        for one in self._inner_methods():
            one.use_source(source)

    def use_oracle(self, oracle: Oracle) -> None:
        """Where a method that `buys_labels` asks for those of the batch that it adapts to.

        Called on every object of such a method before the first batch. The oracle is no state, and
        what it sold counts over the whole stream.
        """
        for one in self._inner_methods():
            one.use_oracle(oracle)

    @property
    def method(self) -> TTAStrategy:
        """The method without rules around it, which is what a preparation belongs to."""
        return self

    def begin_stream(self) -> None:
        """Mark the start of the stream, to which `reset` goes back."""
        self._start = deepcopy(self._own_state())
        for one in self._inner_methods():
            one.begin_stream()

    def begin_segment(self) -> None:
        """A segment of the stream begins; methods do nothing, rules may.

        That it does is read off the labels of the stream.
        """
        for one in self._inner_methods():
            one.begin_segment()

    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] for `x` float [B, 3, H, W] in [0, 1]; may update the method."""
        raise NotImplementedError

    def reset(self) -> None:
        """Back to the state after `begin_stream`; generators and counters run on."""
        counted = {name: getattr(self, name) for name in self.counters}
        self._restore_own(self._start)
        vars(self).update(counted)
        for one in self._inner_methods():
            one.reset()

    def _inner_methods(self) -> list[TTAStrategy]:
        return [one for one in self.strategies().values() if isinstance(one, TTAStrategy)]


FACTS = (
    "needs",
    "batch_dependent",
    "static",
    "outputs",
    "records_nan",
    "prefers",
    "buys_labels",
)


class Around(Strategy):
    """What rules around methods of both kinds have in common: they hand everything on.

    What is known of the method (`needs`, `batch_dependent`, ...) is that of the inner one, and so
    are its parameters and its report.

    Args:
        inner: the method, or a rule around it; its backbone and seed are ours.
        facts: what is not as with the inner one, by name: `needs=inner.needs | {"holdout"}`.
    """

    inner: Any

    def __init__(self, inner: Strategy, **facts: Any) -> None:
        nn.Module.__init__(self)  # the backbone is the inner one's: it has no second name here
        self.inner, self.seed, self.optimizer = inner, inner.seed, None
        self._generators, self._restored = {}, {}
        for fact in FACTS:
            setattr(self, fact, facts.get(fact, getattr(inner, fact)))

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override]
        return self.inner.backbone

    def predict(self, x: Tensor) -> Tensor:
        return self.inner.predict(x)

    def report(self) -> dict[str, float]:
        return self.inner.report()


class Wrapper(Around, TTAStrategy):
    """A rule around a method of adaptation; a subclass changes what it is for.

    The source phase is that of the inner one, too.
    """

    inner: TTAStrategy

    @property
    def method(self) -> TTAStrategy:
        return self.inner.method

    def events(self) -> list[str]:
        """What this rule and those inside did at the last batch."""
        return [one.event for one in (self, *self.rules()) if one.event]

    def rules(self) -> Iterator[Wrapper]:
        """The rules inside this one, from the outside to the inside."""
        if isinstance(self.inner, Wrapper):
            yield self.inner
            yield from self.inner.rules()

    def preparation(self) -> dict[str, Any] | None:
        return self.inner.preparation()

    def prepare(self, source: SourceImages, progress: Progress) -> dict[str, Tensor]:
        return self.inner.prepare(source, progress)

    def use_prepared(self, artefact: Mapping[str, Tensor]) -> None:
        self.inner.use_prepared(artefact)

    def adapt(self, x: Tensor) -> Tensor:
        return self.inner.adapt(x)


class TaskWrapper(Around, CLStrategy):
    """A rule around a method that learns tasks; a subclass changes what it is for."""

    inner: CLStrategy
    unmergeable = "it is a rule itself, and this one goes around none"

    def __init__(self, inner: CLStrategy) -> None:
        super().__init__(inner)
        self.epochs, self._warned, self.tasks_begun = inner.epochs, set(), inner.tasks_begun

    def grow(self, task: Task) -> None:
        self.inner.grow(task)

    def begin_task(self, task: Task) -> None:
        self.inner.begin_task(task)

    def begin_epoch(self, task: Task, epoch: int) -> None:
        self.inner.begin_epoch(task, epoch)

    def batches(self, task: Task, epoch: int, start: int = 0) -> Iterator[Batch | None]:
        return self.inner.batches(task, epoch, start)

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        return self.inner.observe(batch)

    def end_task(self, task: Task) -> None:
        self.inner.end_task(task)

    def extractors(self) -> Mapping[str, str] | None:
        return self.inner.extractors()

    def embed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        return self.inner.embed(x, names)

    def classify(self, features: Mapping[str, Tensor]) -> Tensor:
        return self.inner.classify(features)
