"""The two loops. Everything that a run does to a method is on this page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from driftline.core import distributed
from driftline.core.arrivals import Clock, Deadline
from driftline.core.checkpoint import Checkpointer, Snapshots
from driftline.core.console import Console
from driftline.core.cost import Costs, durations, reset_peak_memory
from driftline.core.errors import Diverged, UserError
from driftline.core.estimates import Estimates, predict_as
from driftline.core.features import FeatureCache
from driftline.core.guard import Guard
from driftline.core.metrics import AccuracyMatrix, NearFuture, OnlineError, Predictions
from driftline.core.open_world import OpenWorld
from driftline.core.oracle import Oracle
from driftline.core.ranges import Reaction
from driftline.core.record import RunLogger, device_name
from driftline.core.reuse import Answered, leaves, predicting
from driftline.core.seed import Draws, rng_state, set_rng_state
from driftline.core.strategy import CLStrategy, ScoreKind, TTAStrategy, Wrapper
from driftline.core.stream import Batch, ShiftStream, Skipped, Task, TaskStream


@dataclass
class Context:
    """What both loops share."""

    log: RunLogger
    checkpoint: Checkpointer
    console: Console
    device: torch.device
    forgetting: str = "standard"  # which definition the summary reports
    feature_cache_mb: float = 2048  # of test features in memory, MiB; 0 = nothing is kept
    meters: Mapping[str, Snapshots] = field(default_factory=dict)  # more that checkpoints hold
    guard: Reaction = "warn"  # what is done about numbers that go bad
    clock: Clock | None = None  # None: the stream waits for the method
    source: TTAStrategy | None = None  # the frozen model, where a clock needs it
    estimates: Estimates | None = None  # of the accuracy, without labels
    draws: Draws | None = None  # looks at the global generators


TOLD = ("acc_last", "acc_inc", "plasticity", "forgetting")  # with the task known at test


class Answers:
    """Right answers on one task's test images, counted on the device and read once at the end.

    Args:
        classes: the task's own, from which a task-incremental learner (told the task) chooses.
        num_classes: of the stream.
    """

    def __init__(self, classes: range, num_classes: int, device: torch.device) -> None:
        self.classes = classes
        self._counts = torch.zeros(3, num_classes, dtype=torch.int64, device=device)
        # of each class, and rows that are not finite
        self._predicted = torch.zeros(num_classes + 1, dtype=torch.int64, device=device)

    def add(self, scores: Tensor, y: Tensor) -> None:
        """Scores [B, C] over all classes seen, labels int64 [B]."""
        first, stop = self.classes.start, self.classes.stop
        predicted = scores.argmax(1)
        right = predicted == y
        within = scores[:, first:stop].argmax(1) + first == y
        rows = torch.stack([torch.ones_like(y), right.long(), within.long()])
        self._counts.index_add_(1, y, rows)
        predicted = torch.where(scores.isfinite().all(1), predicted, len(self._predicted) - 1)
        self._predicted.index_add_(0, predicted, torch.ones_like(y))

    def predictions(self) -> tuple[list[int], int]:
        """Predictions of each class, and rows of scores that are not finite."""
        *classes, bad = self._predicted.tolist()
        return classes, bad

    def read(self) -> tuple[int, int, int, list[list[int]]]:
        """Images, right, right within the task; and these three per class of the task."""
        counts = self._counts.cpu()
        total, right, within = counts.sum(1).tolist()
        return total, right, within, counts[:, self.classes.start : self.classes.stop].T.tolist()


class PerClass:
    """Accuracy in percent on every class seen, of the last evaluation."""

    def __init__(self) -> None:
        self.accuracy: dict[int, float] = {}

    def snapshot(self) -> dict[str, Any]:
        return {"accuracy": self.accuracy}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.accuracy = dict(state["accuracy"])


@torch.no_grad()
def evaluate_task(
    strategy: CLStrategy, task: Task, run: Context, num_classes: int, cache: FeatureCache | None
) -> Answers:
    """Score the test images of `task`; features of frozen extractors come from the cache."""
    answers = Answers(task.tested, num_classes, run.device)
    if cache is not None and strategy.extractors():
        for scores, y in cache.scores(f"test{task.index}", task.test, strategy, run.device):
            answers.add(scores, y)
    else:
        for batch in task.test():
            batch = batch.to(run.device)
            answers.add(strategy.predict(batch.x), batch.y)
    return answers


def evaluate(
    answer: Callable[[Tensor], Tensor], batches: Iterable[Batch | None], device: torch.device
) -> tuple[int, int]:
    """Images that `answer` (images -> scores [B, C]) gets right, and images seen."""
    correct = torch.zeros((), dtype=torch.int64, device=device)
    total = 0
    for batch in batches:
        if batch is None:
            continue
        batch = batch.to(device)
        correct += (answer(batch.x).argmax(1) == batch.y).sum()
        total += len(batch.y)
    return int(correct), total


def run_tasks(strategy: CLStrategy, stream: TaskStream, run: Context) -> dict[str, Any]:
    """Continual learning: learn each task in turn, then score every task seen so far.

    Returns:
        `metrics` and `cost` of the summary.
    """
    names = [t.name for t in stream.tasks]
    matrix, til_matrix = AccuracyMatrix(names), AccuracyMatrix(names)  # class- and task-incremental
    costs = Costs(strategy.backbone, run.device)
    ahead = NearFuture(stream.order["label"], stream.batch_size) if stream.single_pass else None
    place = run.log.folder if distributed.rank0() else None
    features = FeatureCache(place, run.feature_cache_mb)
    guard = Guard(strategy, run.guard, run.console.say, stream.num_classes)
    predictions = Predictions()
    cache = features if run.feature_cache_mb else None
    per_class = PerClass()
    meters: dict[str, Snapshots] = {
        "matrix": matrix,
        "told": til_matrix,
        "costs": costs,
        "skipped": stream.skipped,
        "guard": guard,
        "predictions": predictions,
        "per_class": per_class,
        **run.meters,
        **({"ahead": ahead} if ahead else {}),
        "features": features,
    }
    at = {"task": 0, "begun": 0, "epoch": 0, "step": 0}
    if state := run.checkpoint.load():
        at = dict(state["cursor"])
        for task in stream.tasks[: at["task"] + at["begun"]]:
            strategy.grow(task)
        run.checkpoint.apply(state, strategy, meters)
        run.console.say(f"resuming in task {at['task']}, epoch {at['epoch']}, batch {at['step']}")
    reset_peak_memory(run.device)
    if stream.single_pass and strategy.epochs > 1:
        raise UserError(
            "scenario.single_pass=true needs strategy.epochs=1, and a method that goes through a "
            f"task once: {type(strategy).__name__} does {strategy.epochs} times with these settings"
        )
    steps = sum(t.steps * strategy.epochs for t in stream.tasks)
    now_at: dict[str, Any] = {"where": "", "logged": {}}
    learned = matrix.summary(forgetting=run.forgetting)

    def so_far() -> str:
        """Where the run stands: task, loss of the last batch, accuracy on the tasks seen."""
        words = [now_at["where"]]
        if (loss := now_at["logged"].get("loss")) is not None:
            words.append(f"loss {float(loss):.3g}")
        if "acc_last" in learned:
            words.append(f"accuracy {learned['acc_last']:.1f} %")
        return ", ".join([*words, *guard.warnings()])

    run.console.start(steps, costs.steps, type(strategy).__name__, so_far)
    done = sum(t.steps for t in stream.tasks[: at["task"]]) + at["step"]
    future = _later_batches(stream, done + ahead.shift) if ahead else iter(())

    def score(tasks: Iterable[Task], after: int, name: str) -> dict[int, float]:
        """Accuracy on the test images of `tasks` after task `after`; returns that per class."""
        accuracies = {}
        predicted, bad = [0] * stream.num_classes, 0
        for task in tasks:
            if not len(task.tested):  # no class comes for the first time
                matrix.record(after, task.index, 0, 0)
                til_matrix.record(after, task.index, 0, 0)
                continue
            with costs.evaluation():
                answers = evaluate_task(strategy, task, run, stream.num_classes, cache)
                total, correct, within, classes = answers.read()
            costs.evaluated += total
            matrix.record(after, task.index, correct, total)
            til_matrix.record(after, task.index, within, total)
            _log_cell(run.log, after, name, task.name, correct, total)
            for c, (n, right, _) in zip(task.tested, classes, strict=True):
                accuracies |= {c: 100 * right / n} if n else {}
            of_task, bad_of_task = answers.predictions()
            predicted = [a + b for a, b in zip(predicted, of_task, strict=True)]
            bad += bad_of_task
        if after >= 0:
            seen = [task.classes for task in stream.tasks[: after + 1]]
            if text := predictions.update(predicted, bad, seen):
                guard.evaluated(text, f"after task {after} ({name})")
        return accuracies

    # Forward transfer exists where the next task has no new classes, as between domains.
    known = [t.index for t in stream.tasks[1:] if t.tested.start < stream.tasks[0].classes.stop]
    for task in (_readable(task, stream.skipped) for task in stream.tasks[at["task"] :]):
        if not at["begun"]:
            strategy.begin_task(task)
            guard.begin()
            if task.index == 0 and known:
                score(stream.tasks, -1, "start")
        for epoch in range(at["epoch"], strategy.epochs):
            if at["step"] == 0:
                strategy.begin_epoch(task, epoch)
            for step, batch in enumerate(strategy.batches(task, epoch, at["step"]), at["step"]):
                now_at["where"] = f"task {task.index + 1}/{len(stream.tasks)}"
                run.console.advance(0 if batch is None else len(batch.y))
                later = next(future, None)
                if ahead and later is not None:
                    ahead.update(strategy.predict(later.x.to(run.device)), later.y.to(run.device))
                if batch is None:
                    continue
                batch = batch.to(run.device)
                where = {"task": task.index, "epoch": epoch, "step": step}
                with costs.step(len(batch.y)):
                    logged = guard.observe(batch, f"task {task.name}, epoch {epoch}, batch {step}")
                now_at["logged"] = logged
                measured = {"n": len(batch.y), "seconds": costs.seconds, **guard.row}
                run.log.log("batches", **where, **measured, **logged)
                where["step"] += 1
                run.checkpoint.tick(strategy, meters, **where, begun=1)
            at["step"] = 0
        with costs.end_of_task(), guard.end_of_task(f"the end of task {task.name}"):
            strategy.end_task(task)
        costs.task_ended(strategy)
        distributed.require_equal(
            strategy.parameters(), f"of {type(strategy).__name__} after task {task.index}"
        )
        per_class.accuracy = score(stream.tasks[: task.index + 1], task.index, task.name)
        if task.index + 1 in known:
            score([stream.tasks[task.index + 1]], task.index, task.name)
        learned = matrix.summary(forgetting=run.forgetting)
        row = {k: learned[k] for k in ("acc_last", "acc_inc", "forgetting") if k in learned}
        run.log.log("experiences", index=task.index, name=task.name, **row)
        text = "  ".join(f"{k} {v:.2f} %" for k, v in row.items())
        run.console.say(f"task {task.index + 1}/{len(stream.tasks)} ({task.name}): {text}")
        run.checkpoint.save(strategy, meters, task=task.index + 1, begun=0, epoch=0, step=0)
        at = {"task": task.index + 1, "begun": 0, "epoch": 0, "step": 0}
    run.console.stop()
    metrics = matrix.summary(forgetting=run.forgetting)
    if not metrics:
        raise UserError(f"no test image can be read{_reasons(stream.skipped)}")
    if all(task.new is None for task in stream.tasks):  # else an image belongs to several tasks
        task_incremental = til_matrix.summary(forgetting=run.forgetting)
        metrics |= {f"til/{k}": task_incremental[k] for k in TOLD if k in task_incremental}
    if ahead:
        metrics |= ahead.summary()
    metrics |= predictions.summary()
    cost = costs.summary(strategy)
    if cache is not None:
        cost |= {"features_computed": cache.computed, "features_reused": cache.reused}
        cache.close()
    return {
        "metrics": metrics,
        "cost": cost,
        "method": strategy.report(),
        "guard": guard.summary(),
        "per_class": per_class.accuracy,
    }


def _readable(task: Task, skipped: Skipped) -> Task:
    """The same task, which ends the run where a pass over its training images brings none."""

    def checked(images: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def passed(*args: Any, **options: Any) -> Iterator[Any]:
            some = False
            for batch in images(*args, **options):
                some = some or batch is not None
                yield batch
            from_start = not (args[1:] or options.get("start"))  # epoch, then the first batch
            if not some and (from_start or args[1] == 0):
                raise UserError(
                    f"task {task.index} ({task.name}) has no training image to learn from"
                    f"{_reasons(skipped)}"
                )

        return passed

    return replace(task, train=checked(task.train), fit=checked(task.fit))


def _reasons(skipped: Skipped) -> str:
    """What was left out, for the end of a message."""
    if not skipped.reasons:
        return ""
    first = next(iter(skipped.reasons))
    return f": {len(skipped.reasons)} were left out by data.on_error=skip, the first: {first}"


def _later_batches(stream: TaskStream, start: int) -> Iterator[Batch | None]:
    """Training batches of a single pass from number `start` on, across tasks."""
    for task in stream.tasks:
        if start < task.steps:
            yield from task.train(0, start)
        start = max(0, start - task.steps)


def run_shifts(strategy: TTAStrategy, stream: ShiftStream, run: Context) -> dict[str, Any]:
    """Test-time adaptation: adapt on each batch and score what it returned.

    Returns:
        `metrics` and `cost` of the summary.
    """
    recurring = any(s.round > 1 for s in stream.segments)
    rounds = {s.index: s.round for s in stream.segments} if recurring else {}
    online = OnlineError(stream.domains, stream.num_classes, rounds)
    columns = sorted(stream.probes)
    first = {d: s.index for s in reversed(stream.segments) for d in s.domains}
    matrix = AccuracyMatrix([stream.domains[d] for d in columns], [first[d] for d in columns])
    clean, clean_adapting = AccuracyMatrix(["clean"], [0]), AccuracyMatrix(["clean"], [0])
    costs = Costs(strategy.backbone, run.device)
    guard = Guard(strategy, run.guard, run.console.say, stream.num_classes)
    meters: dict[str, Snapshots] = {
        "online": online,
        "matrix": matrix,
        "clean": clean,
        "clean_adapting": clean_adapting,
        "costs": costs,
        "skipped": stream.skipped,
        "guard": guard,
        **run.meters,
        **({"clock": run.clock} if run.clock else {}),
        **({"estimates": run.estimates} if run.estimates else {}),
    }
    unknown = OpenWorld(len(stream.domains)) if stream.open_world else None
    if unknown is not None:
        meters["open_world"] = unknown
    images = sum(s.images for s in stream.segments)
    oracle = Oracle(stream.label_budget, images, stream.label_delay)
    if strategy.buys_labels:
        strategy.use_oracle(oracle)
        meters["oracle"] = oracle
    predict = torch.no_grad()(strategy.predict)
    scored = stream.scored()
    answered, answered_adapting = Answered(), Answered()
    meters |= {"answered": answered, "answered_adapting": answered_adapting}

    def score(after: int, name: str) -> None:
        """Accuracy on domains and on clean images, without adapting: one row of R.

        Cells that `scored` leaves out are recorded where they are known: a method that has not
        changed since an evaluation answers as it did.
        """
        answered.now(predicting(strategy))
        domains, with_clean = scored[after]
        places = [
            (matrix, c, stream.domains[d], stream.probes[d], d in domains)
            for c, d in enumerate(columns)
        ]
        if stream.holdout is not None:
            places.append((clean, 0, "clean", stream.holdout, with_clean))
        for target, column, domain, images, wanted in places:
            key = domain if target is matrix else ""  # a domain may be called clean
            if key not in answered.counts:
                if not wanted:
                    continue
                with costs.evaluation():
                    answered.counts[key] = evaluate(predict, images(), run.device)
            correct, total = answered.counts[key]
            costs.evaluated += total
            target.record(after, column, correct, total)
            _log_cell(run.log, after, name, domain, correct, total)

    def score_adapting(after: int) -> None:
        """Clean accuracy of a method that goes on adapting; afterwards it is as it was."""
        if stream.holdout is None or not stream.holdout_adapting or strategy.static:
            return
        before, random = deepcopy(strategy.snapshot()), rng_state()
        answered_adapting.now(leaves([before, random]))
        try:
            if "clean" not in answered_adapting.counts:
                with costs.evaluation():
                    answers = evaluate(strategy.adapt, stream.holdout(), run.device)
                answered_adapting.counts["clean"] = answers
            costs.evaluated += answered_adapting.counts["clean"][1]
            clean_adapting.record(after, 0, *answered_adapting.counts["clean"])
        except Diverged:
            run.console.say("the method diverged on the clean images; left out")
        finally:
            look()
            strategy.restore(before)
            set_rng_state(random)

    def look() -> None:
        """See whether the stream has drawn from a global generator so far."""
        if run.draws is not None:
            run.draws.look()

    def missed(x: Tensor, who: Literal["source", "last"]) -> tuple[Tensor, ScoreKind]:
        """Scores of somebody else for a batch that the method was too busy for, and their kind."""
        if who == "source":
            assert run.source is not None
            return run.source.adapt(x), run.source.outputs
        assert isinstance(run.clock, Deadline) and run.clock.before is not None
        return predict_as(strategy, run.clock.before, x), strategy.outputs

    def adapt(x: Tensor, where: str) -> Tensor:
        """The method's scores.

        Raises:
            Diverged: where they are not finite and neither a rule nor the guard takes them.
        """
        scores = guard.adapt(x, where)
        if strategy.records_nan or guard.goes_on or scores.isfinite().all():
            return scores
        raise Diverged(
            f"{type(strategy.method).__name__} returned NaN or infinite scores in {where}: it has "
            "diverged. Lower its learning rate; or set around=rollback (back to its start and on) "
            "or around=record_nan (count them)"
        )

    at = {"segment": 0, "batch": 0}
    state = run.checkpoint.load()
    strategy.begin_stream()
    guard.begin()
    if state:
        at = run.checkpoint.apply(state, strategy, meters)
        run.console.say(f"resuming in segment {at['segment']}, batch {at['batch']}")
    elif columns or stream.holdout is not None:
        score(-1, "start")
        score_adapting(-1)
    reset_peak_memory(run.device)
    total = sum(s.steps for s in stream.segments)

    def so_far() -> str:
        """Where the run stands: error so far, and what the guard has noticed."""
        error = online.error()
        return ", ".join(
            [*([] if math.isnan(error) else [f"error {error:.1f} %"]), *guard.warnings()]
        )

    run.console.start(total, costs.steps, type(strategy.method).__name__, so_far)
    clock, estimates, cold = run.clock, run.estimates, True

    for segment in stream.segments[at["segment"] :]:
        before = sum(s.steps for s in stream.segments[: segment.index])
        if at["batch"] == 0:
            strategy.begin_segment()
        for i, batch in enumerate(segment.batches(at["batch"]), at["batch"]):
            run.console.advance(0 if batch is None else len(batch.y))
            if batch is None:
                continue
            batch = batch.to(run.device)
            if cold and clock is not None and clock.measured:
                _warm_up(clock, strategy, run.source, batch.x, run.device)
            cold = False
            who = "method" if clock is None else clock.who(before + i + 1 == total)
            kind, noted = strategy.outputs, dict[str, Any]()
            if who == "method":
                if isinstance(clock, Deadline) and clock.missed == "last":
                    clock.before = deepcopy(strategy.snapshot())
                if estimates is not None:
                    with costs.estimate():
                        estimates.before(strategy, batch.x)
                with costs.step(len(batch.y)), oracle.batch(batch.y):
                    scores = adapt(batch.x, f"segment {segment.name}, batch {i}")
                look()
                noted = dict(guard.row)
                if estimates is not None:
                    noted |= estimates.after(scores, batch.y)
            elif who == "frozen":
                with costs.step(len(batch.y)):
                    scores = predict(batch.x)
            else:
                scores, kind = missed(batch.x, who)
            y, domain = batch.y, batch.domain
            if unknown is not None:
                unknown.update(scores, y, domain, kind)
                known = y >= 0
                scores, y, domain = scores[known], y[known], domain[known]
                noted = {"unknown": len(known) - len(y), **noted}
            wrong = online.update(scores, y, segment.index, domain, kind)
            seconds = costs.seconds if who in ("method", "frozen") else 0.0
            row = {"n": len(y), "wrong": wrong, "seconds": seconds, **noted}
            if clock is not None:
                clock.answered(who, seconds, wrong, len(y))
                row["answer"] = who
            if who == "method" and isinstance(strategy, Wrapper) and (events := strategy.events()):
                row["event"] = ", ".join(events)
            run.log.log("batches", segment=segment.index, batch=i, **row)
            run.checkpoint.tick(strategy, meters, segment=segment.index, batch=i + 1)
        last = segment.index == len(stream.segments) - 1
        if segment.index in scored:
            score(segment.index, segment.name)
        if last:
            score_adapting(segment.index)
        guard.tell()
        now = online.segment(segment.index)
        run.log.log("experiences", index=segment.index, name=segment.name, **now)
        place = f"{segment.index + 1}/{len(stream.segments)}"
        run.console.say(f"segment {place} {segment.name}: error {now['err']:.1f} %")
        run.checkpoint.save(strategy, meters, segment=segment.index + 1, batch=0)
        at["batch"] = 0
    run.console.stop()
    metrics = {**online.summary(), **matrix.summary(forgetting=run.forgetting)}
    if "err_mean" not in metrics:
        raise UserError(f"no image of the stream can be read{_reasons(stream.skipped)}")
    metrics |= guard.collapse() | metrics  # the guard's for batches of one or two alone
    metrics.update(_source_forgetting(clean, ""))
    metrics.update(_source_forgetting(clean_adapting, "_adapting"))
    cost = costs.summary(strategy)
    report = strategy.report() | (oracle.report() if strategy.buys_labels else {})
    result = {"metrics": metrics, "cost": cost, "method": report, "guard": guard.summary()}
    for meter in (unknown, estimates):
        if meter is not None:
            metrics |= meter.summary()
    if clock is not None:
        metrics |= clock.summary()
        result["time"] = clock.about() | {"device": device_name(run.device)}
    return result


def _warm_up(
    clock: Clock, strategy: TTAStrategy, source: TTAStrategy | None, x: Tensor, device: torch.device
) -> None:
    """Measure the source where the clock needs it, and let the method do what a first call does.

    The method and all random numbers are then as before.
    """
    if not clock.unit:
        assert source is not None
        clock.calibrate(durations(lambda: source.adapt(x), device))
    before, random = deepcopy(strategy.snapshot()), rng_state()
    try:
        with suppress(Diverged):
            strategy.adapt(x)
    finally:
        strategy.restore(before)
        set_rng_state(random)


def _source_forgetting(clean: AccuracyMatrix, variant: str) -> dict[str, float]:
    """Clean accuracy before the stream minus after it, percent.

    Two variants: frozen (no suffix; `predict` on a method that stands
    still) and `_adapting` (EATA, mariodoebler/test-time-adaptation: the method goes on learning on
    the clean images, which helps it recover; here on a copy, so that the stream does not notice).
    """
    before, after = clean.start(), clean.table()
    if math.isnan(before[0]) or not len(after):
        return {}
    return {
        f"clean_err_before{variant}": 100 - before[0],
        f"clean_err_after{variant}": 100 - after[-1, 0],
        f"source_forgetting{variant}": before[0] - after[-1, 0],
    }


def _log_cell(log: RunLogger, after: int, name: str, on: str, correct: int, total: int) -> None:
    acc = 100 * correct / total if total else None
    log.log("matrix", after=after, after_name=name, on=on, acc=acc, correct=correct, n=total)


def reference(metrics: Mapping[str, float], source: Mapping[str, float]) -> dict[str, float]:
    """Gain over the frozen source model on the same stream: the TTA form of plasticity, percent."""
    gain = {k: source[k] - v for k, v in metrics.items() if k.startswith("err/") and k in source}
    if "err_mean" in source:
        gain["err_mean"] = source["err_mean"] - metrics["err_mean"]
    return gain
