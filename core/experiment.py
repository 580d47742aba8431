"""From a composed configuration to a finished run folder."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from backbones.backbone import Backbone, weights_hash
from core import distributed
from core.build import build, innermost, locate, nodes
from core.checkpoint import Checkpointer, Signals, Stopped
from core.console import Console, table
from core.errors import UserError
from core.files import replacing, write_json, write_text
from core.identity import VOLATILE, identity
from core.paths import CONF, expand_paths
from core.prepare import prepare
from core.provenance import Code, changed_files, code_of, git_state
from core.record import Lock, NoRecords, RunLogger, environment
from core.runner import Context, reference, run_shifts, run_tasks
from core.schema import check_settings
from core.seed import seed_all
from core.sinks import About, Mirror, make_sinks
from core.strategy import CLStrategy, Strategy, TTAStrategy
from core.stream import ShiftStream, TaskStream
from kernels import dispatch
from streams.datasets import ORIGIN
from streams.pipelines import Geometry
from streams.store import ImageStore

Stream = TaskStream | ShiftStream


def load_option(group: str, name: str) -> DictConfig:
    """One file of conf/<group>/ as a node."""
    node = OmegaConf.load(CONF / group / f"{name}.yaml")
    assert isinstance(node, DictConfig)
    return node


def complete(cfg: DictConfig) -> DictConfig:
    """Fill in what depends on whether real data is given: label and backbone.

    Without `data.root` everything is embedded and labelled so, with it nothing is. Corruptions
    made on the fly from real images are labelled as well: they are not the released files.
    """
    cfg = cfg.copy()
    expand_paths(cfg)
    real = cfg.data.root is not None
    with open_dict(cfg):
        choice = cfg.scenario.pop("backbones")
        if cfg.backbone.name == "auto":
            cfg.backbone = load_option("backbone", _automatic(cfg, choice, real))
        label = cfg.scenario.pop("label", None) or cfg.scenario.name
        defaults = {k: cfg.scenario.pop(k, {}) for k in ("real", "embedded")}
        for key, value in defaults["real" if real else "embedded"].items():
            if cfg.scenario[key] is None:
                cfg.scenario[key] = value
        if cfg.scenario.get("single_pass") and "epochs" in cfg.strategy:
            cfg.strategy.epochs = 1
        made = cfg.scenario.get("corrupt") == "on_the_fly"
        cfg.scenario.label = (
            label + ("[on_the_fly]" if made else "") if real else f"{label}[embedded]"
        )
    return cfg


def _automatic(cfg: DictConfig, choice: DictConfig, real: bool) -> str:
    """The backbone that `backbone=auto` stands for."""
    kind = "real" if real else "embedded"
    if (
        locate(cfg.strategy._target_).preferred_backbone(cfg.strategy) == "vit"
        and f"{kind}_vit" in choice
    ):
        kind += "_vit"
    if choice[kind] is None:
        what = "a vision transformer" if kind.endswith("_vit") else "a network"
        raise UserError(
            f"strategy={cfg.strategy.name} needs {what}, and none is agreed on for "
            f"scenario={cfg.scenario.name} (scenario.backbones.{kind} is null). Name one, for "
            "example backbone=timm backbone.tag=vit_base_patch16_384.augreg_in21k_ft_in1k"
        )
    return str(choice[kind])


def run_experiment(
    cfg: DictConfig, overrides: list[str], *, quiet: bool = False, wait: bool = False
) -> dict[str, Any]:
    """Run (or find, or resume) the experiment that `cfg` describes; returns its summary.

    Args:
        quiet: a run inside another one; shows its progress only.
        wait: another process that is at the same run may finish it. Otherwise that is an error.

    Raises:
        UserError: for anything the user can fix.
        Stopped: after a signal, with the state saved.
    """
    check_settings(cfg)
    cfg = complete(cfg)
    device = set_up(cfg)
    distributed.join(device)
    console = Console(cfg.scenario.label, quiet, mute=not distributed.first())
    if cfg.data.root is None:
        console.say(_how_to_real(cfg))
    geometry = Geometry()
    stream = make_stream(cfg, geometry, device)
    kind = check_kind(cfg, stream)
    if distributed.size() > 1 and issubclass(kind, TTAStrategy):
        raise UserError(_one_process(cfg.strategy.name))
    if cfg.stage == "prepare":
        return _prepare_only(cfg, stream, geometry, device, console)
    key = identity(
        cfg,
        str(stream.facts["fingerprint"]),
        _checkpoint_hash(cfg),
        *_source_facts(cfg, kind, stream),
    )
    place = Path(cfg.root) / stream.name / cfg.strategy.name / cfg.backbone.name
    name = f"s{cfg.seed}-{key}"
    code = code_of(*(node._target_ for node in nodes(cfg.strategy)))
    identities = distributed.from_first(lambda: (key, code["method"]))
    if identities != (key, code["method"]):
        raise UserError(
            f"the processes disagree on what is run ({identities[0]} and {key}): data, weights or "
            "code differ between the machines"
        )
    choose = partial(_folder, place, name, cfg.on_exists, code)
    folder, finished, _ = distributed.from_first(choose)
    made = None
    if finished is None:
        # Before anything is written or run: a mistake in the settings leaves nothing behind.
        dispatch.use(cfg.kernel.backend)
        made = make_strategy(cfg, stream, geometry, device)
    with ExitStack() as stack:
        if finished is None:
            folder, finished, notes = distributed.from_first(
                lambda: _hold(choose, stack, console, wait=wait)
            )
            for note in notes:
                console.say(note)
        else:
            console.say(f"already done: {folder} (on_exists=rerun runs it again)")
            for note in _framework_notes(folder, code):
                console.say(note)
        if finished is not None:
            console.say(_table(finished))
            return finished
        execute = partial(
            _execute, cfg, stream, geometry, device, folder, key, code, overrides, console
        )
        if not issubclass(kind, TTAStrategy) or cfg.strategy.name == "source":
            return execute(made)
        made = None  # made anew after these runs, which need the memory and draw numbers
        return execute(None, source=_source_run(cfg, console), frozen=_frozen_run(cfg, console))


def _one_process(strategy: str) -> str:
    """Why an adaptation stream does not run under torchrun, and what to do instead."""
    return (
        f"strategy={strategy} adapts to a stream in which every batch depends on the one before: "
        "such a run takes one process. Several GPUs serve several runs, by seed or by domain: "
        f"python scripts/gpu_pool.py strategy={strategy} seed=0,1,2 "
        "'scenario.corruptions=[fog],[snow]' (a GPU each; on a cluster with --slurm, or python "
        "run.py -m hydra/launcher=slurm ...)"
    )


def _execute(
    cfg: DictConfig,
    stream: Stream,
    geometry: Geometry,
    device: torch.device,
    folder: Path,
    key: str,
    code: Code,
    overrides: list[str],
    console: Console,
    made: tuple[Strategy, dict[str, str]] | None,
    source: dict[str, Any] | None = None,
    frozen: dict[str, Any] | None = None,
) -> dict[str, Any]:
    dispatch.use(cfg.kernel.backend)  # forgets what other runs of this process used
    strategy, weights = made or make_strategy(cfg, stream, geometry, device)
    prepared = _prepare(cfg, strategy, weights, stream, geometry, device, console)
    if prepared is not None:
        seed_all(cfg.seed)  # whether the artefact was cached changes nothing

    git, patch = git_state()
    about = {
        "scenario": stream.name,
        "strategy": cfg.strategy.name,
        "backbone": cfg.backbone.name,
        "seed": cfg.seed,
        "key": key,
    }
    if distributed.first():
        known = {**about, **environment(device), "git": git, "weights": weights}
        known |= {"data": stream.facts, "prepared": prepared, "code": code}
        _describe(cfg, folder, overrides, known, patch, stream)
        log = RunLogger(folder, stream.name, _sinks(cfg, folder, about, console.quiet))
    else:
        log = NoRecords(folder, stream.name)
    where = f"{n} x {device.type}" if (n := distributed.size()) > 1 else str(device)
    console.say(f"{about['strategy']}, {about['backbone']}, seed {cfg.seed}, {where} -> {folder}")
    started = time.perf_counter()
    with Signals() as signals:
        checkpoint = Checkpointer(log, signals, key=key, every=cfg.checkpoint.every)
        run = Context(
            log,
            checkpoint,
            console,
            device,
            cfg.forgetting,
            cfg.on_nan,
            cfg.runtime.feature_cache_mb,
            {"kernel": dispatch.Record()},
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
            console.say(f"stopped; the same command goes on from here: {folder}", always=True)
            raise stop
        except Exception as error:
            console.stop()
            log.fail(distributed.cause(error))
            raise
    method = innermost(cfg.strategy)
    summary = {
        "run": {**about, "folder": str(folder), "git": git["commit"]},
        "data": {k: v for k, v in stream.facts.items() if k != "class_order"},
        "weights": weights,
        "definitions": {
            "forgetting": cfg.forgetting,
            **{k: method[k] for k in ("loss_scope", "head", "mode") if k in method},
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
    log.finish(summary)
    if distributed.first() and not cfg.checkpoint.keep:
        checkpoint.remove()
    console.say(_table(summary))
    console.say(f"results: {folder}")
    return summary


def _describe(
    cfg: DictConfig,
    folder: Path,
    overrides: list[str],
    known: dict[str, Any],
    patch: str,
    stream: Stream,
) -> None:
    """The files of a run folder that say what is run: settings, environment, order of images."""
    with replacing(folder / "config.yaml") as part:
        OmegaConf.save(cfg, part, resolve=True)
    write_text(folder / "overrides.txt", "\n".join(overrides) + "\n")
    write_json(folder / "environment.json", known)
    if patch:
        write_text(folder / "patch.diff", patch)
    if stream.order:
        with replacing(folder / "order.npz") as part, open(part, "wb") as file:
            np.savez_compressed(file, **dict(stream.order))  # type: ignore[arg-type]


def make_stream(cfg: DictConfig, geometry: Geometry, device: torch.device) -> Stream:
    """The scenario's stream; `geometry` gets its size from the backbone later."""
    return build(
        cfg.scenario,
        at="scenario",
        data_root=cfg.data.root,
        on_error=cfg.data.on_error,
        cache=cfg.data.cache,
        workers=_workers(cfg),
        seed=cfg.seed,
        geometry=geometry,
        store=ImageStore(device, cfg.runtime.image_store_mb),
    )


def make_strategy(
    cfg: DictConfig, stream: Stream, geometry: Geometry, device: torch.device
) -> tuple[Strategy, dict[str, str]]:
    """A seeded strategy around a freshly loaded backbone, and the identity of the weights."""
    seed_all(cfg.seed)
    backbone: Backbone = build(cfg.backbone, at="backbone").to(device)
    if cfg.channels_last:
        backbone.to(memory_format=torch.channels_last)
    geometry.size, geometry.interpolation = backbone.input_size, backbone.interpolation
    _check_labels(cfg, stream, backbone)
    weights = {"tag": backbone.tag, "hash": weights_hash(backbone.net.state_dict())}
    strategy: Strategy = build(
        cfg.strategy,
        at="strategy",
        backbone=backbone,
        seed=cfg.seed,
        num_classes=stream.num_classes,
    ).to(device)
    _check_needs(cfg, strategy, stream, backbone)
    return strategy, weights


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
        made = make_strategy(cfg, stream, geometry, device)[0]
        assert isinstance(made, TTAStrategy)
        return made.method

    try:
        return prepare(
            strategy.method,
            fresh,
            stream.source,
            weights=weights["hash"],
            folder=Path(cfg.root) / "prepared" / innermost(cfg.strategy).name,
            say=console.say,
        )
    except KeyboardInterrupt:
        console.say("stopped; the same command goes on with the preparation", always=True)
        raise


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


def set_up(cfg: DictConfig) -> torch.device:
    """The device that `runtime` names, with threads and precision set."""
    name = cfg.runtime.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = distributed.own_device(name)
    except RuntimeError as error:
        raise UserError(f"runtime.device={name} is no device; use auto, cpu or cuda[:n]") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"runtime.device={name}, but torch sees no GPU here; use runtime.device=cpu"
        )
    _runtime(cfg, device)
    return device


def _runtime(cfg: DictConfig, device: torch.device) -> None:
    threads = cfg.runtime.threads
    if threads is None and cfg.data.root is None:
        threads = 1  # the embedded networks are too small to gain from more
    if threads is not None:
        torch.set_num_threads(threads)
    if sys.platform == "linux" and device.type == "cpu":
        _keep_freed_memory()
    exact = cfg.precision == "fp32"
    torch.backends.cuda.matmul.allow_tf32 = not exact
    torch.backends.cudnn.allow_tf32 = not exact
    torch.use_deterministic_algorithms(cfg.deterministic)
    torch.backends.cudnn.benchmark = False


def _keep_freed_memory() -> None:
    """Let the C library reuse large freed blocks instead of returning them to the kernel.

    Activations are freed and allocated again at every layer; zeroing fresh pages is a quarter of
    a forward pass on a CPU. Changes no number.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass  # another C library


def _workers(cfg: DictConfig) -> int:
    """Loader processes: none for in-memory embedded images, else up to four."""
    if cfg.runtime.workers is not None:
        return int(cfg.runtime.workers)
    return 0 if cfg.data.root is None else min(4, os.cpu_count() or 1)


def _how_to_real(cfg: DictConfig) -> str:
    dataset = cfg.scenario.dataset
    return (
        "procedural stand-in images made by this project, not the data set of that name. "
        f"To run on the real one: add data.root=/path/to/data (published at {ORIGIN[dataset]})"
    )


def _checkpoint_hash(cfg: DictConfig) -> str:
    """A local weights file counts by content, not by name."""
    found = []
    for node in (cfg.backbone, *nodes(cfg.strategy)):
        path = node.get("checkpoint")
        if path and Path(path).is_file():
            with open(path, "rb") as file:
                found.append(hashlib.file_digest(file, "sha256").hexdigest())
    return " ".join(found)


def _source_facts(cfg: DictConfig, kind: type[Strategy], stream: Stream) -> list[str]:
    """What identifies the source images, for methods that use them."""
    if not issubclass(kind, TTAStrategy) or not kind.uses_source(cfg.strategy):
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
    names = [str(about[k]) for k in ("scenario", "strategy", "key")]
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    seedless = cfg.copy()
    seedless.seed = None
    told = About(
        folder,
        plain,
        run_id="-".join(names).replace("[", "-").replace("]", ""),
        group="/".join(
            [str(about[k]) for k in ("scenario", "strategy", "backbone")] + [identity(seedless)[:4]]
        ),
        job_type="companion" if companion else "run",
        tags=tuple(f"{k}:{about[k]}" for k in ("scenario", "strategy", "backbone", "seed")),
    )
    return make_sinks(plain["logger"], told)


# ------------------------------------------------------------------------------ checks


def check_kind(cfg: DictConfig, stream: Stream) -> type[Strategy]:
    """The strategy's class, if it fits the kind of stream.

    Raises:
        UserError: if a task method meets a shift stream or the reverse.
    """
    kind = locate(cfg.strategy._target_)
    wanted = CLStrategy if isinstance(stream, TaskStream) else TTAStrategy
    if not issubclass(kind, wanted):
        fitting = []
        for path in sorted((CONF / "strategy").glob("*.yaml")):
            target = str(load_option("strategy", path.stem)._target_)
            if target.startswith("cl." if wanted is CLStrategy else "tta."):
                fitting.append(path.stem)
        what = "a stream of tasks" if wanted is CLStrategy else "a stream of shifts"
        raise UserError(
            f"strategy={cfg.strategy.name} does not fit scenario={cfg.scenario.name}, which is "
            f"{what}. Strategies for it: {', '.join(fitting)}"
        )
    return kind


def _check_labels(cfg: DictConfig, stream: Stream, backbone: Backbone) -> None:
    if isinstance(stream, TaskStream):
        return
    space = stream.facts["label_space"]
    if backbone.classes is not None and backbone.classes != space:
        fix = (
            "Set data.root=/path/to/data to run on the real set, or leave backbone unset"
            if space == "embedded"
            else "Choose a backbone trained for this label space"
        )
        raise UserError(
            f"backbone={cfg.backbone.name} predicts {backbone.classes} classes, but "
            f"scenario={stream.name} holds {space} classes. {fix}."
        )
    if backbone.num_classes != stream.num_classes:
        raise UserError(
            f"scenario={stream.name} has {stream.num_classes} classes, but "
            f"backbone={cfg.backbone.name} ({backbone.tag}) has {backbone.num_classes} outputs"
        )


def _check_needs(cfg: DictConfig, strategy: Strategy, stream: Stream, backbone: Backbone) -> None:
    lacking = strategy.needs - stream.provides - backbone.provides
    if lacking:
        raise UserError(
            f"strategy={cfg.strategy.name} needs {', '.join(sorted(lacking))}, which neither "
            f"scenario={stream.name} nor backbone={cfg.backbone.name} ({backbone.tag}) provides"
        )


# ------------------------------------------------------------------------------ folders


class Place(NamedTuple):
    """Where a run goes."""

    folder: Path
    finished: dict[str, Any] | None  # its summary, where the run is done and shall be kept
    notes: list[str]  # why it is not the folder that the reader expects


def _folder(place: Path, name: str, on_exists: str, code: Code) -> Place:
    """The first folder of this run that holds it, finished or not, as made by this code.

    Folders of the same settings are numbered: `name`, `name-2`, ... A folder whose method had other
    code belongs to another run, whether that is finished or not.
    """
    notes = []
    for number in count(1):
        folder = place / (name if number == 1 else f"{name}-{number}")
        finished = (folder / "summary.json").exists()
        if finished or (folder / "environment.json").exists():
            recorded = _recorded(folder).get("code")
            if recorded is None or (changed := changed_files("method", recorded, code)):
                what = (
                    "is not recorded" if recorded is None else f"was another: {', '.join(changed)}"
                )
                notes.append(f"not the run of {folder}, the method's code of which {what}")
                continue
        if not finished:
            return Place(folder, None, notes + _framework_notes(folder, code))
        if on_exists == "error":
            raise UserError(f"{folder} is finished already; use on_exists=skip or rerun")
        if on_exists == "skip":
            return Place(folder, json.loads((folder / "summary.json").read_text()), [])
    raise AssertionError


def _hold(choose: Callable[[], Place], stack: ExitStack, console: Console, *, wait: bool) -> Place:
    """Lock the folder that `choose` names, then look again: another process may have finished it.

    Args:
        stack: releases the lock where it ends.
        wait: wait for a process that is at the same run; otherwise that is an error.
    """
    waiting = False
    while True:
        place = choose()
        if place.finished is not None:
            return place
        lock = Lock(place.folder)
        if lock.acquire():
            if choose().folder == place.folder and not (place.folder / "summary.json").exists():
                stack.callback(lock.release)
                return place
            lock.release()
            continue
        if not wait:
            raise UserError(
                f"{place.folder} is being written by {lock.holder()}. Wait for it to end, or "
                "change a setting (for example the seed) to get another run folder"
            )
        if not waiting:
            console.say(f"waiting for {lock.holder()}, which is at the same run: {place.folder}")
            waiting = True
        lock.release()
        time.sleep(1)


def _recorded(folder: Path) -> dict[str, Any]:
    """environment.json of a run folder; empty where there is none."""
    path = folder / "environment.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _framework_notes(folder: Path, code: Code) -> list[str]:
    """One line if code outside the method has changed since a run that is used again."""
    changed = changed_files("framework", _recorded(folder).get("code", code), code)
    if not changed:
        return []
    files = ", ".join(changed[:3]) + (f" and {n} more" if (n := len(changed) - 3) > 0 else "")
    return [f"note: code outside the method has changed since the run of {folder.name}: {files}"]


def _beside(
    cfg: DictConfig, strategy: DictConfig, override: str, console: Console, text: str
) -> dict[str, Any]:
    """A run on the same stream to compare with: one of its own, found or made first."""
    console.say(f"{text} (kept as a run of its own) ...")
    with open_dict(cfg := cfg.copy()):
        cfg.strategy, cfg.reference, cfg.on_exists = strategy, None, "skip"
        cfg.pop("tuned", None)
        cfg.scenario.backbones = {"real": cfg.backbone.name, "embedded": cfg.backbone.name}
        cfg.scenario.label = cfg.scenario.label.split("[")[0]
    return run_experiment(cfg, [override], quiet=True, wait=True)


def _source_run(cfg: DictConfig, console: Console) -> dict[str, Any]:
    """The frozen model."""
    text = "source error on this stream first"
    return _beside(cfg, load_option("strategy", "source"), "strategy=source", console, text)


def _frozen_run(cfg: DictConfig, console: Console) -> dict[str, Any] | None:
    """What preparation alone gives: the same method with `update=false`."""
    strategy = innermost(cfg.strategy).copy()
    if not strategy.get("update"):
        return None
    strategy["update"] = False
    text = "the prepared model without adaptation next"
    return _beside(cfg, strategy, "strategy.update=false", console, text)


# ------------------------------------------------------------------------------ table


def _table(summary: dict[str, Any]) -> str:
    """The result as text: errors against the source model, or the metrics of a task stream."""
    metrics, about = summary["metrics"], summary["run"]
    title = f"{about['strategy']} on {about['scenario']}, backbone {about['backbone']}"
    cost = summary["cost"]
    foot = [
        f"{cost['seconds_per_batch']:.3f} s/batch, peak {cost['peak_memory_mb']:.0f} MiB, "
        f"{cost['forward_per_image']:.1f} forward and {cost['backward_per_image']:.1f} backward "
        f"passes an image, {cost['parameters_updated']:,} of {cost['parameters_total']:,} "
        "parameters updated"
    ]
    if "err_mean" not in metrics:
        rows = [(k, f"{v:.2f}") for k, v in metrics.items()]
        foot += _published(summary)
        return "\n".join([title, table(("metric", "%"), rows), *foot])
    against = {
        title: summary[key]["metrics"]
        for key, title in (("source", "source"), ("frozen", "prepared only"))
        if key in summary
    }
    columns = {**against, about["strategy"]: metrics}
    domains = [k for k in metrics if k.startswith("err/")]
    head = ("error %", *columns)
    rows = [(k.removeprefix("err/"), *(f"{m[k]:.1f}" for m in columns.values())) for k in domains]
    rows += [
        (k.removeprefix("err_").replace("/", " "), *(f"{m[k]:.1f}" for m in columns.values()))
        for k in metrics
        if k.startswith(("err_round/", "err_severity/", "mce"))
    ]
    rows.append(("mean", *(f"{m['err_mean']:.1f}" for m in columns.values())))
    names = ("plasticity", "stability", "forgetting", "source_forgetting")
    names += ("source_forgetting_adapting", "collapse", "nan", "rollbacks")
    kept = [f"{k} {metrics[k]:.2f}" for k in names if k in metrics]
    kept = [text for text in kept if text not in ("collapse 0.00", "nan 0.00")]
    if kept:
        foot.insert(0, ", ".join(kept))
    foot += _published(summary)
    return "\n".join([title, table(head, rows), *foot])


def _published(summary: dict[str, Any]) -> list[str]:
    """Published figures, ours beside them where data and settings are the published ones."""
    lines = []
    for row in summary.get("reference") or []:
        ours = f"ours {row['ours']:.1f}" if row["comparable"] else "not comparable"
        what = f"published {row['strategy']} {row['metric']} {row['value']}"
        lines.append(f"{what} ({row['source']}; {row['status']}): {ours}")
    return lines
