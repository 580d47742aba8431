"""From a composed configuration to a finished run folder."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from driftline.core import distributed, packs
from driftline.core.arrivals import Clock
from driftline.core.build import build, nodes
from driftline.core.checkpoint import LAST, Checkpointer, Signals, Stopped
from driftline.core.console import Console
from driftline.core.errors import UserError, shortage
from driftline.core.estimates import Estimates
from driftline.core.identity import VOLATILE, identity, method_folder, method_name
from driftline.core.paths import run_line, script_line
from driftline.core.provenance import Code, code_of, git_state
from driftline.core.record import NoRecords, RunLogger, environment
from driftline.core.runner import Context, reference, run_shifts, run_tasks
from driftline.core.seed import rng_state, seed_all, set_rng_state
from driftline.core.sinks import About, Mirror, check_sinks, make_sinks
from driftline.core.strategy import CLStrategy, Strategy, TTAStrategy
from driftline.core.stream import ShiftStream, TaskStream
from driftline.kernels import dispatch
from driftline.runs.compose import (
    Network,
    Stream,
    arithmetic,
    check_kind,
    complete,
    load_option,
    make_strategy,
    make_stream,
    replays_source,
)
from driftline.runs.folder import choose_folder, describe, framework_notes, hold
from driftline.runs.machine import set_up
from driftline.runs.prepare import prepare
from driftline.runs.saving import write_method
from driftline.runs.schema import check_settings, embedded
from driftline.runs.seeds import (
    SeedUse,
    may_take_over,
    seed_is_idle,
    seed_was_idle,
    twin_or_lock,
)
from driftline.runs.table import result_table
from driftline.streams.dataset import about
from driftline.streams.pipelines import Geometry

MODEL = "model.safetensors"  # in a run folder, with checkpoint.model=true


def run_experiment(
    cfg: DictConfig,
    overrides: list[str],
    *,
    quiet: bool = False,
    wait: bool = False,
    make_room: Callable[[], None] | None = None,
    network: Network | None = None,
) -> dict[str, Any]:
    """Run (or find, or resume) the experiment that `cfg` describes; returns its summary.

    Args:
        quiet: a run inside another one; shows its progress only.
        wait: another process that is at the same run may finish it. Otherwise that is an error.
        make_room: called before a method is made, never for a run that is done.
        network: of the run that this one is compared with; None: another is built.

    Raises:
        UserError: for anything the user can fix.
        Stopped: after a signal, with the state saved.
    """
    try:
        return _find_or_run(cfg, overrides, quiet, wait, make_room, network)
    except Exception as error:
        if text := shortage(error):
            raise UserError(text) from error
        raise


def _find_or_run(
    cfg: DictConfig,
    overrides: list[str],
    quiet: bool,
    wait: bool,
    make_room: Callable[[], None] | None,
    network: Network | None,
) -> dict[str, Any]:
    check_settings(cfg)
    cfg = complete(cfg)
    device = set_up(cfg)
    distributed.join(device)
    console = Console(cfg.scenario.label, quiet, mute=not distributed.rank0())
    if embedded(cfg):
        console.say(_how_to_real(cfg))
    geometry = Geometry()
    stream = make_stream(cfg, geometry, device)
    kind = check_kind(cfg, stream)
    if distributed.size() > 1 and issubclass(kind, TTAStrategy):
        raise UserError(_one_process(cfg.strategy.name))
    if cfg.stage == "prepare":
        return _prepare_only(cfg, stream, geometry, device, console)
    facts = [str(stream.facts["fingerprint"]), _checkpoint_hash(cfg)]
    facts += _source_facts(cfg, kind, stream)
    key = identity(cfg, *facts)
    method = method_folder(cfg.strategy.name, list(cfg.around))
    place = Path(cfg.root) / stream.name / method / cfg.backbone.name
    name = f"s{cfg.seed}-{key}"
    code = code_of(*(node._target_ for node in (*nodes(cfg.strategy), *cfg.around.values())))
    identities = distributed.from_rank0(lambda: (key, code["method"]))
    if identities != (key, code["method"]):
        raise UserError(
            f"the processes disagree on what is run ({identities[0]} and {key}): data, weights or "
            "code differ between the machines"
        )
    choose = partial(choose_folder, place, name, cfg.on_exists, code)
    folder, finished, _ = distributed.from_rank0(choose)
    built = None
    compared = issubclass(kind, TTAStrategy) and cfg.strategy.name != "source"
    if network is None and compared:
        network = own = Network()
    else:
        own = None
    if finished is None:
        # Before anything is written or run: a mistake in the settings leaves nothing behind.
        if make_room is not None:
            make_room()
        check_sinks(cfg.logger)
        dispatch.use(cfg.kernel.backend)
        built = make_strategy(cfg, stream, geometry, device, network)
    with ExitStack() as stack:
        if finished is None:
            folder, finished, notes = distributed.from_rank0(
                lambda: hold(choose, stack, console, wait=wait or cfg.runtime.wait)
            )
            for note in notes:
                console.say(note, always=True)
        else:
            console.say(f"already done: {folder} (on_exists=rerun runs it again)")
            for note in framework_notes(folder, code):
                console.say(note)
        if finished is not None:
            if cfg.checkpoint.model and not (folder / MODEL).is_file():
                console.say(f"it has no {MODEL}: on_exists=rerun checkpoint.model=true makes it")
            console.say(result_table(finished))
            here = {"folder": str(folder)}  # results may have been moved
            return {**finished, "run": {**finished["run"], **here}}
        source = frozen = None
        if compared:
            # Made anew only after a companion that needed the memory and drew numbers.
            waiting, built, random = [built], None, rng_state()
            source = _source_run(cfg, console, waiting.clear, network)
            frozen = _frozen_run(cfg, console, waiting.clear, network)
            set_rng_state(random)
            built = waiting.pop() if waiting else None
            built = built or make_strategy(cfg, stream, geometry, device, network)
        if own is not None:
            own.release()
        assert built is not None
        return _execute(
            cfg,
            stream,
            geometry,
            device,
            folder,
            key,
            identity(cfg, *facts, with_seed=False),
            code,
            overrides,
            console,
            built,
            source=source,
            frozen=frozen,
        )


def _one_process(strategy: str) -> str:
    """Why an adaptation stream does not run under torchrun, and what to do instead."""
    words = f"strategy={strategy} seed=0,1,2 'scenario.corruptions=[fog],[snow]'"
    return (
        f"strategy={strategy} adapts to a stream in which every batch depends on the one before: "
        "such a run takes one process. Several GPUs serve several runs, by seed or by domain: "
        f"{script_line('gpu_pool', words)} (a GPU each; on a cluster with --slurm, or "
        f"`{run_line('-m hydra/launcher=slurm ...')}`)"
    )


def _execute(
    cfg: DictConfig,
    stream: Stream,
    geometry: Geometry,
    device: torch.device,
    folder: Path,
    key: str,
    any_seed: str,
    code: Code,
    overrides: list[str],
    console: Console,
    built: tuple[Strategy, dict[str, str]],
    source: dict[str, Any] | None = None,
    frozen: dict[str, Any] | None = None,
) -> dict[str, Any]:
    dispatch.use(cfg.kernel.backend)  # forgets what other runs of this process used
    strategy, weights = built
    use = SeedUse(cfg.seed) if seed_is_idle(cfg, strategy) else None
    prepared = _prepare(cfg, strategy, weights, stream, geometry, device, console)
    if prepared is not None:
        seed_all(cfg.seed)  # whether the artefact was cached changes nothing
    replayed = _hand_source(cfg, strategy, stream)
    clock, source_model = _clock(cfg, stream, geometry, device)

    git, patch = git_state()
    about = {
        "scenario": stream.name,
        "strategy": cfg.strategy.name,
        "around": list(cfg.around),
        "backbone": cfg.backbone.name,
        "seed": cfg.seed,
        "key": key,
    }
    known = {**about, **environment(device), "git": git, "weights": weights}
    known |= {"data": stream.facts, "prepared": prepared, "code": code}
    twin = None
    if use is not None and may_take_over(cfg):
        root = Path(cfg.root)
        twin, use.lock = twin_or_lock(folder.parent, root, any_seed, known, console)
    try:
        if distributed.rank0():
            describe(cfg, folder, overrides, known, patch, stream)
            log = RunLogger(folder, stream.name, _sinks(cfg, folder, about, console.quiet))
        else:
            log = NoRecords(folder, stream.name)
        where = f"{n} x {device.type}" if (n := distributed.size()) > 1 else str(device)
        name = method_name(about["strategy"], about["around"])
        where = ", ".join([where, *arithmetic(cfg)])
        console.say(f"{name}, {about['backbone']}, seed {cfg.seed}, {where} -> {folder}")
        started = time.perf_counter()
        if twin is not None:
            origin = twin.same_as
            console.say(
                f"nothing in this run depends on the seed: the result is that of seed "
                f"{origin['seed']}, {origin['folder']} (runtime.share_seeds=false runs it again)"
            )
            twin.copy_rows(log)
            result = twin.result
        else:
            result = _run(
                cfg, strategy, stream, device, key, log, console, use, clock, source_model
            )
            if use is not None and seed_was_idle(strategy, use):
                result["any_seed"] = any_seed
        if cfg.checkpoint.model and distributed.rank0():
            _save_model(cfg, strategy, stream, folder)
        summary = {
            "run": {**about, "folder": str(folder), "git": git["commit"]},
            "data": {k: v for k, v in stream.facts.items() if k != "class_order"},
            "weights": weights,
            "definitions": {
                "forgetting": cfg.forgetting,
                **{k: cfg.strategy[k] for k in ("loss_scope", "head", "mode") if k in cfg.strategy},
            },
            "kernel": dispatch.chosen(),
            "skipped_images": len(stream.skipped.reasons),
            **result,
            "wall_seconds": time.perf_counter() - started,
        }
        if source is not None:
            summary["source"] = {
                "folder": source["run"]["folder"],
                "metrics": source["metrics"],
                "gain": reference(result["metrics"], source["metrics"]),
            }
        if prepared is not None:
            summary["prepared"] = prepared
        if replayed is not None:
            summary["replayed"] = replayed
        if frozen is not None:
            summary["frozen"] = {
                "folder": frozen["run"]["folder"],
                "metrics": frozen["metrics"],
                "gain": reference(result["metrics"], frozen["metrics"]),
            }
        if "tuned" in cfg:  # by scripts/tune.py: what was chosen on which other stream
            summary["tuned"] = OmegaConf.to_container(cfg.tuned, resolve=True)
        if cfg.reference is not None:
            summary["reference"] = _against_published(cfg, stream, overrides, summary)
        summary["rows"] = log.checksums()
        log.finish(summary)
        if distributed.rank0() and not cfg.checkpoint.keep:
            packs.remove(folder / LAST)
    finally:
        if use is not None:
            use.end()
    console.say(result_table(summary))
    console.say(f"results: {folder}")
    return summary


def _run(
    cfg: DictConfig,
    strategy: Strategy,
    stream: Stream,
    device: torch.device,
    key: str,
    log: RunLogger,
    console: Console,
    use: SeedUse | None,
    clock: Clock | None,
    source_model: TTAStrategy | None,
) -> dict[str, Any]:
    """The loop itself, from its last state on where there is one."""
    with Signals() as signals:
        checkpoint = Checkpointer(
            log, signals, key=key, every=cfg.checkpoint.every, say=partial(console.say, always=True)
        )
        run = Context(
            log,
            checkpoint,
            console,
            device,
            cfg.forgetting,
            cfg.runtime.feature_cache_mb,
            {"kernel": dispatch.Record(), **({"seed": use} if use else {})},
            cfg.guard,
            clock,
            source_model,
            _estimates(cfg, stream),
            use,
        )
        try:
            if isinstance(stream, TaskStream):
                assert isinstance(strategy, CLStrategy)
                result = run_tasks(strategy, stream, run)
            else:
                assert isinstance(strategy, TTAStrategy)
                result = run_shifts(strategy, stream, run)
        except (Stopped, KeyboardInterrupt) as stop:
            console.stop()
            log.close()
            console.say(f"stopped; the same command goes on from here: {log.folder}", always=True)
            raise stop
        except Exception as error:
            console.stop()
            log.fail(distributed.cause(error))
            raise
    return result


def _save_model(cfg: DictConfig, strategy: Strategy, stream: Stream, folder: Path) -> None:
    """The method as the stream has left it; `driftline.load` needs no network for that file."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    outputs = stream.outputs if isinstance(stream, ShiftStream) else None
    made_of = {
        **{key: plain[key] for key in ("strategy", "around", "seed", "backbone")},
        "num_classes": stream.num_classes,
        "mean": None,
        "std": None,
        "outputs": None if outputs is None else list(outputs.kept),
    }
    tasks = stream.tasks if isinstance(stream, TaskStream) else ()
    write_method(strategy, folder / MODEL, made_of, tasks)


def _clock(
    cfg: DictConfig, stream: Stream, geometry: Geometry, device: torch.device
) -> tuple[Clock | None, TTAStrategy | None]:
    """What `time=` simulates, and the frozen model where that answers or is timed."""
    if cfg.get("time") is None:
        return None, None
    clock: Clock = build(cfg.time, at="time")
    if clock.missed != "source" and clock.unit:
        return clock, None
    random = rng_state()
    source = make_strategy(_as_source(cfg), stream, geometry, device)[0]
    set_rng_state(random)
    assert isinstance(source, TTAStrategy)
    return clock, source


def _estimates(cfg: DictConfig, stream: Stream) -> Estimates | None:
    """What `estimate=` asks for."""
    if cfg.get("estimate") is None:
        return None
    return build(cfg.estimate, at="estimate", label_space=str(stream.facts["label_space"]))


def _as_source(cfg: DictConfig) -> DictConfig:
    """The same settings with the frozen model."""
    with open_dict(cfg := cfg.copy()):
        cfg.strategy, cfg.around = load_option("strategy", "source"), {}
    return cfg


def _prepare(
    cfg: DictConfig,
    strategy: Strategy,
    weights: dict[str, str],
    stream: Stream,
    geometry: Geometry,
    device: torch.device,
    console: Console,
) -> dict[str, Any] | None:
    """The source phase, if the strategy has one; says what was done."""
    if not isinstance(strategy, TTAStrategy) or not isinstance(stream, ShiftStream):
        return None

    def fresh() -> TTAStrategy:
        strategy = make_strategy(cfg, stream, geometry, device)[0]
        assert isinstance(strategy, TTAStrategy)
        return strategy.method

    try:
        return prepare(
            strategy.method,
            fresh,
            stream.source,
            weights=" ".join([weights["hash"], *arithmetic(cfg)]),
            folder=Path(cfg.root) / "prepared" / cfg.strategy.name,
            say=console.say,
            warn=partial(console.say, always=True),
        )
    except KeyboardInterrupt:
        console.say("stopped; the same command goes on with the preparation", always=True)
        raise


def _hand_source(cfg: DictConfig, strategy: Strategy, stream: Stream) -> dict[str, Any] | None:
    """Give the source images to a method that reads them during the stream; says which.

    Raises:
        UserError: where there are none.
    """
    if not replays_source(cfg):
        return None
    assert isinstance(strategy, TTAStrategy) and isinstance(stream, ShiftStream)
    if stream.source is None:
        raise UserError(
            f"strategy={cfg.strategy.name} with these settings reads labelled source images during "
            "the stream, and this scenario has none"
        )
    source = stream.source()
    strategy.use_source(source)
    return {"source_images": source.images, "source": source.description}


def _prepare_only(
    cfg: DictConfig, stream: Stream, geometry: Geometry, device: torch.device, console: Console
) -> dict[str, Any]:
    """`stage=prepare`: the source phase alone."""
    strategy, weights = make_strategy(cfg, stream, geometry, device)
    prepared = _prepare(cfg, strategy, weights, stream, geometry, device, console)
    if prepared is None:
        raise UserError(
            f"stage=prepare: strategy={cfg.strategy.name} with these settings needs no preparation"
        )
    return {"metrics": {}, "prepared": prepared}


# ------------------------------------------------------------------------------ settings


def _how_to_real(cfg: DictConfig) -> str:
    published = about(cfg.scenario.dataset).published
    return (
        "procedural stand-in images made by this project, not the data set of that name. "
        f"To run on the real one: add data.root=/path/to/data (published at {published})"
    )


def _checkpoint_hash(cfg: DictConfig) -> str:
    """Local files of weights and texts count by content, not by name."""
    digests = []
    for node in (cfg.backbone, *nodes(cfg.strategy)):
        for key in ("checkpoint", "text", "class_names", "templates"):
            path = node.get(key)
            if isinstance(path, str) and Path(path).is_file():
                with open(path, "rb") as file:
                    digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return " ".join(digests)


def _source_facts(cfg: DictConfig, kind: type[Strategy], stream: Stream) -> list[str]:
    """What identifies the source images, for methods that use them."""
    if not issubclass(kind, TTAStrategy):
        return []
    if not kind.uses_source(cfg.strategy) and not replays_source(cfg):
        return []
    assert isinstance(stream, ShiftStream)
    try:
        return [stream.source().fingerprint] if stream.source is not None else []
    except UserError:
        return []  # the preparation says so if it needs them


def _against_published(
    cfg: DictConfig, stream: Stream, overrides: list[str], summary: dict[str, Any]
) -> list[dict[str, Any]]:
    """The preset's figures for this strategy and for the source model, with ours beside them."""
    as_published = "[" not in stream.name and _only_volatile(overrides)
    measured = {cfg.strategy.name: summary["metrics"]}
    if "source" in summary:
        measured["source"] = summary["source"]["metrics"]
    rows: Any = OmegaConf.to_container(cfg.reference, resolve=True)
    return [
        {
            **row,
            "comparable": row["comparable"] and as_published,
            "ours": measured[row["strategy"]].get(row["metric"]),
        }
        for row in rows
        if row["strategy"] in measured
    ]


def _only_volatile(overrides: list[str]) -> bool:
    """Whether nothing was typed that makes a preset another experiment."""
    keys = {o.split("=")[0].lstrip("+~") for o in overrides}
    return all(
        k in ("experiment", "strategy", "seed") or k.split(".")[0] in {*VOLATILE, "data"}
        for k in keys
    )


def _sinks(
    cfg: DictConfig, folder: Path, about: dict[str, Any], companion: bool
) -> Sequence[Mirror]:
    """The mirrors that `logger` names, told what makes a sweep of such runs read well."""
    method = method_name(about["strategy"], about["around"])
    names = [
        about["scenario"],
        method_folder(about["strategy"], about["around"]),
        about["key"],
    ]
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    seedless = cfg.copy()
    seedless.seed = None
    about_run = About(
        folder,
        plain,
        run_id="-".join(names).replace("[", "-").replace("]", ""),
        group="/".join([about["scenario"], method, about["backbone"], identity(seedless)[:4]]),
        job_type="companion" if companion else "run",
        tags=(
            *(f"{k}:{about[k]}" for k in ("scenario", "strategy", "backbone", "seed")),
            *(f"around:{rule}" for rule in about["around"]),
        ),
    )
    return make_sinks(plain["logger"], about_run)


def _beside(
    cfg: DictConfig,
    strategy: DictConfig,
    override: str,
    console: Console,
    text: str,
    make_room: Callable[[], None],
    network: Network | None,
) -> dict[str, Any]:
    """A run on the same stream to compare with: one of its own, found or made first."""
    console.say(f"{text} (kept as a run of its own) ...")
    with open_dict(cfg := cfg.copy()):
        cfg.strategy, cfg.around, cfg.reference, cfg.on_exists = strategy, {}, None, "skip"
        cfg.checkpoint.model = False
        cfg.guard = "warn"
        for key in ("tuned", "time", "estimate"):  # what others are compared with, they all are
            cfg.pop(key, None)
        if "label_budget" in cfg.scenario and strategy.name == "source":
            cfg.scenario.label_budget = None  # of no matter to the frozen model
            cfg.scenario.label_delay = 0
        cfg.scenario.backbones = {"real": cfg.backbone.name, "embedded": cfg.backbone.name}
        cfg.scenario.label = cfg.scenario.label.split("[")[0]
    return run_experiment(
        cfg, [override], quiet=True, wait=True, make_room=make_room, network=network
    )


def _source_run(
    cfg: DictConfig, console: Console, make_room: Callable[[], None], network: Network | None
) -> dict[str, Any]:
    """The frozen model."""
    text = "source error on this stream first"
    source = load_option("strategy", "source")
    return _beside(cfg, source, "strategy=source", console, text, make_room, network)


def _frozen_run(
    cfg: DictConfig, console: Console, make_room: Callable[[], None], network: Network | None
) -> dict[str, Any] | None:
    """What preparation alone gives: the same method with `update=false`."""
    strategy = cfg.strategy.copy()
    if not strategy.get("update"):
        return None
    strategy["update"] = False
    text = "the prepared model without adaptation next"
    return _beside(cfg, strategy, "strategy.update=false", console, text, make_room, network)
