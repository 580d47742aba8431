"""What this machine has, and what a command will need: each problem with its fix.

    python scripts/doctor.py                                    # versions, device, weights, disk
    python scripts/doctor.py data.root=/data                    # and the data sets under it
    python scripts/doctor.py strategy=cotta scenario=imagenet_c data.root=/data

With settings, as for `python run.py`, a few batches are run to estimate time and memory; nothing is
written. What takes long comes last, and all problems are listed once more at the end. Exit status 1
if there is one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import statistics
import sys
import time
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
from omegaconf import DictConfig, OmegaConf

from driftline.core.console import duration, program
from driftline.core.errors import UserError
from driftline.core.installation import FIX_TORCHVISION, torchvision_problem
from driftline.core.paths import expand_paths, nearest_existing

ROOT = Path(__file__).parents[1]

EXTRAS = {
    "sweep": ("hydra-joblib-launcher", "hydra-submitit-launcher", "submitit"),
    "tensorboard": ("tensorboard",),
    "tune": ("optuna",),
    "peft": ("peft",),
    "foa": ("cma",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "clip": ("open_clip_torch",),
    "analysis": ("pandas", "matplotlib", "jupytext", "ipykernel"),
    "docs": ("mkdocs",),
}
LOW_DISK = 5.0  # GiB
PROBE = 3  # batches


class Report:
    """Prints findings as they come and counts the problems."""

    def __init__(self) -> None:
        self.listed: list[str] = []  # problems with their fixes

    @property
    def problems(self) -> int:
        return len(self.listed)

    def section(self, title: str) -> None:
        print(f"\n{title}")

    def ok(self, text: str) -> None:
        print(f"  ok       {text}", flush=True)

    def note(self, text: str) -> None:
        print(f"  note     {text}", flush=True)

    def problem(self, text: str, fix: str) -> None:
        self.listed.append(f"{text}; fix: {fix}")
        print(f"  PROBLEM  {text}\n           fix: {fix}", flush=True)


# ------------------------------------------------------------------------------ machine


def versions(report: Report) -> None:
    """Python and packages against the bounds in pyproject.toml."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    report.section("Versions")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = ".".join(map(str, sys.version_info[:3]))
    if SpecifierSet(project["requires-python"]).contains(python, prereleases=True):
        report.ok(f"python {python}")
    else:
        report.problem(f"python {python} is not tested", "use Python 3.11, 3.12 or 3.13")
    for text in project["dependencies"]:
        need = Requirement(text)
        try:
            have = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            report.problem(f"{need.name} is missing", 'pip install -e "."')
            continue
        if need.specifier.contains(have, prereleases=True):
            report.ok(f"{need.name} {have}")
        else:
            report.problem(f"{need.name} {have} is outside {need.specifier}", 'pip install -e "."')
    for extra, names in EXTRAS.items():
        missing = [n for n in names if not _installed(n)]
        if missing:
            report.note(f'extra {extra}: without {", ".join(missing)}: pip install -e ".[{extra}]"')


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def device(report: Report) -> None:
    """GPUs, threads and memory."""
    import torch

    report.section("Device")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = (x / 2**30 for x in torch.cuda.mem_get_info(i))
            name = torch.cuda.get_device_name(i)
            report.ok(f"cuda:{i} {name}, {free:.1f} of {total:.1f} GiB free")
    elif shutil.which("nvidia-smi"):
        report.problem(
            f"there is an NVIDIA driver, but this torch ({torch.__version__}, CUDA "
            f"{torch.version.cuda}) sees no GPU",
            "install a torch build for your driver (pytorch.org, Get Started), and check "
            "CUDA_VISIBLE_DEVICES",
        )
    else:
        report.note("no GPU: runs use the processor")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    report.ok(f"{cores} cores, torch uses {torch.get_num_threads()} threads")
    available = memory_available()
    if available is not None:
        report.ok(f"{available / 1024:.1f} GiB of memory available")


def memory_available() -> float | None:
    """MiB, on Linux."""
    try:
        with open("/proc/meminfo") as file:
            available = next(line for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return int(available.split()[1]) / 1024


def disk(report: Report, cfg: DictConfig) -> None:
    """Free space where results, the cache of corrupted images and weights go."""
    import torch

    report.section("Disk")
    places = {"results (root)": cfg.root, "weights (torch.hub)": torch.hub.get_dir()}
    if cfg.data.cache:
        places["corrupted images (data.cache)"] = cfg.data.cache
    for what, place in places.items():
        there = nearest_existing(Path(place))
        free = shutil.disk_usage(there).free / 2**30
        text = f"{what}: {free:.1f} GiB free at {there}"
        if not os.access(there, os.W_OK):
            report.problem(f"{what}: {there} is not writable", "choose another folder, root=...")
        elif free < LOW_DISK:
            report.problem(text, "free some space, or choose another folder with root=...")
        else:
            report.ok(text)


# ------------------------------------------------------------------------------ data


def data(report: Report, root: str | None) -> None:
    """Every known data set under `root`: counts and spot checks."""
    report.section("Data")
    if root is None:
        report.note("data.root is not set: runs use the embedded stand-in images")
        return
    path = Path(root)
    if not path.is_dir():
        report.problem(
            f"data.root={root}: there is no such folder",
            f"data.root=/path/to/data, or load a set: {_load('SET', path)}",
        )
        return
    checks = (_cifar, _cifar_c, _imagenet_c, _imagenet, _folders, _loaded)
    if not sum([check(report, path) for check in checks]):
        report.problem(
            f"no known data set under {path}",
            f"docs/data.md says what is expected where; {_load('SET', path)} loads a set, "
            "python scripts/get_data.py --list names all",
        )


def _load(dataset: str, root: Path) -> str:
    """The command that loads a set."""
    return f"python scripts/get_data.py {dataset} --to {root}"


def _again(dataset: str, base: Path, root: Path) -> str:
    """What to do about a set with missing or damaged files."""
    return f"move {base} away, then: {_load(dataset, root)}"


def _loaded(report: Report, root: Path) -> int:
    """What scripts/get_data.py brought here, and what it did not finish."""
    from driftline.core.files import BadFile, read_record
    from driftline.streams.downloads import STATE

    count = 0
    for note in sorted((root / STATE).glob("*/*.done.json")):
        dataset, file = note.parent.name, note.name.removesuffix(".done.json")
        try:
            noted = read_record(note, "sha256", "places", "files")
        except (OSError, BadFile):
            continue  # loaded again when asked for
        gone = [place for place in noted["places"] if not (root / place).exists()]
        if gone:
            report.note(
                f"{dataset}: {', '.join(gone[:3])} of {file} is gone; {_load(dataset, root)}"
            )
            continue
        count += 1
        sha256 = noted["sha256"][:12]
        report.ok(f"{dataset}: {noted['files']:,} files of {file}, sha256 {sha256} when loaded")
    for part in sorted((root / STATE).glob("*/*.part")):
        report.note(
            f"{part.name.removesuffix('.part')}: {part.stat().st_size:,} bytes of it have arrived; "
            f"{_load(part.parent.name, root)} goes on"
        )
    return count


def _cifar(report: Report, root: Path) -> int:
    """CIFAR: the MD5 sums that torchvision holds."""
    import driftline.core.vision  # noqa: F401  # isort: skip
    from torchvision import datasets

    count = 0
    for name, kind in (("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)):
        base = root / kind.base_folder
        if not base.is_dir():
            continue
        count += 1
        files = [*kind.train_list, *kind.test_list]
        bad = [n for n, md5 in files if _digest(base / n, "md5") != md5]
        if bad:
            report.problem(
                f"{base}: missing or damaged: {', '.join(bad)}",
                _again(name, base, root),
            )
        else:
            report.ok(f"{base}: {len(files)} files, MD5 sums as published")
    return count


def _cifar_c(report: Report, root: Path) -> int:
    """CIFAR-C: shapes and label counts, and two files against their published MD5 sums."""
    from driftline.streams.corrupted import MANIFEST
    from driftline.streams.dataset import about
    from driftline.streams.images import corruption_arrays

    count = 0
    for name, classes in (("CIFAR-10-C", 10), ("CIFAR-100-C", 100)):
        base = root / name
        if not base.is_dir():
            continue
        count += 1
        files = sorted(p for p in base.glob("*.npy") if p.name != "labels.npy")
        fix = _again(f"cifar{classes}_c", base, root)
        if not (base / "labels.npy").exists() or not files:
            report.problem(f"{base} lacks labels.npy or the corruptions", fix)
            continue
        try:
            with _noted(report):
                sets = corruption_arrays(base, [p.stem for p in files], [1], classes)
        except UserError as error:
            report.problem(str(error), fix)
            continue
        counts = np.bincount(sets[files[0].stem, 1].labels, minlength=classes)
        if counts.min() != counts.max():
            report.note(f"{base}: from {counts.min()} to {counts.max()} images a class")
        images = len(np.load(files[0], mmap_mode="r"))
        spots = ("labels.npy", files[0].name)
        text = f"{base}: {len(files)} corruptions, {images:,} images each; "
        if images != 50000 or (base / MANIFEST).exists():  # a part of it, or made here
            spot = _digest(files[0], "sha256", 2**20)
            report.note(f"{text}first MiB of {files[0].name} sha256 {spot[:12]}")
            continue
        published = about(f"cifar{classes}_c").hashes
        other = [n for n in spots if f"md5:{_digest(base / n, 'md5')}" != published.get(n)]
        if other:
            report.problem(f"{base}: {', '.join(other)}: MD5 sum is not the published one", fix)
        else:
            report.ok(f"{text}MD5 sums of {' and '.join(spots)} as published")
    return count


def _imagenet_c(report: Report, root: Path) -> int:
    """ImageNet-C: folders, the images of one of them, and a few that must decode."""
    from driftline.streams.data.imagenet_c import FOLDERS, GROUPS
    from driftline.streams.images import open_rgb

    bases = [b for b in (root / n for n in FOLDERS) if b.is_dir()]
    if not bases:
        return 0
    base = bases[0]
    groups = [base, *(base / g for g in GROUPS)]
    folders = sorted(
        s
        for g in groups
        if g.is_dir()
        for c in g.iterdir()
        if c.is_dir()
        for s in c.iterdir()
        if s.is_dir() and s.name in "12345"
    )
    if not folders:
        report.problem(f"{base} holds no <corruption>/<severity> folder", _load("imagenet_c", root))
        return 1
    files = sorted(folders[0].rglob("*.JPEG"))
    whole = len(files) == 50000
    try:
        for file in files[:: max(1, len(files) // 3)][:3]:
            open_rgb(file)
    except UserError as error:
        report.problem(str(error), _again("imagenet_c", folders[0].parent, root))
    text = f"{base}: {len(folders)} corruption/severity folders, {len(files):,} images in "
    text += "/".join(folders[0].parts[-2:])
    if files:
        text += f"; {files[0].name} sha256 {_digest(files[0], 'sha256')[:12]}"
    (report.ok if whole else report.note)(text + ("" if whole else " (the release has 50,000)"))
    return 1


def _imagenet(report: Report, root: Path) -> int:
    """Clean ImageNet images, as the scenarios look for them."""
    from driftline.streams.data.imagenet import imagenet_clean
    from driftline.streams.images import open_rgb

    try:
        with _noted(report):
            files = imagenet_clean(root)
    except UserError as error:
        if not (root / "labels.csv").is_file():
            return 0
        report.problem(str(error), "the message says it")
        return 1
    try:
        for row in range(0, len(files.names), max(1, len(files.names) // 3)):
            open_rgb(Path(files.root) / files.names[row])
    except UserError as error:
        report.problem(str(error), "fetch the file again, or data.on_error=skip")
    first = Path(files.root) / files.names[0]
    report.ok(
        f"{files.root}: {len(files.names):,} clean ImageNet images of "
        f"{len(np.unique(files.labels)):,} classes; {first.name} sha256 "
        f"{_digest(first, 'sha256')[:12]}"
    )
    return 1


def _folders(report: Report, root: Path) -> int:
    """Class folders for folders and split_imagefolder, and those of domains."""
    from driftline.streams.data.imagefolder import has_class_folders
    from driftline.streams.images import image_folder, subfolders

    count = 0
    domains = [root / name for name in subfolders(root)]
    places = [d / part for d in (root, *domains) for part in ("train", "test", "val", "")]
    for folder in dict.fromkeys(places):
        if not has_class_folders(folder):
            continue
        count += 1
        try:
            with _noted(report):
                files = image_folder(folder, "")
        except UserError as error:
            report.problem(str(error), "the message says it")
            continue
        text = f"{files.root}: {files.num_classes:,} class folders, {len(files.names):,} images"
        report.ok(text)
    return count


@contextmanager
def _noted(report: Report) -> Iterator[None]:
    """Warnings become notes of the report."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        report.note(str(warning.message))


def _digest(path: Path, kind: str, limit: int | None = None) -> str:
    """Hex digest of a file or of its first `limit` bytes; empty if there is none."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        if limit is not None:
            return hashlib.new(kind, file.read(limit)).hexdigest()
        return hashlib.file_digest(file, kind).hexdigest()


# ------------------------------------------------------------------------------ weights


def checkpoints(report: Report, cfg: DictConfig) -> None:
    """The weights that conf/backbone names: in a cache or not, and whether their hash is right.

    torch.hub's file names hold the start of the SHA-256 sum, the hub's cache stores each file under
    it.
    """
    report.section("Weights")
    for name, path, wanted in _known_weights():
        if path is None:
            report.note(f"{name}: not here, fetched when first used")
            continue
        have = _digest(path, "sha256")
        if wanted and not have.startswith(wanted):
            report.problem(f"{name}: {path} has another hash than published", f"delete {path}")
        elif wanted:
            report.ok(f"{name}: sha256 {have[:12]} as published")
        else:
            report.ok(f"{name}: sha256 {have[:12]} (shipped)")
    checkpoint = cfg.backbone.get("checkpoint")
    if checkpoint and checkpoint != "random":
        have = _digest(Path(checkpoint), "sha256")
        if have:
            report.ok(f"backbone.checkpoint={checkpoint}: sha256 {have[:12]}")
        else:
            report.problem(f"backbone.checkpoint={checkpoint}: no such file", "correct the path")


def _known_weights() -> Iterator[tuple[str, Path | None, str]]:
    """Name, local file and published start of the SHA-256 sum of each backbone option."""
    import driftline.core.vision  # noqa: F401  # isort: skip
    import huggingface_hub
    import timm
    import torch
    import torchvision

    from driftline.backbones.load import HUB_FILES, WEIGHTS

    for file in sorted(WEIGHTS.glob("*.safetensors")):
        yield file.stem, file, ""
    for path in sorted((ROOT / "conf" / "backbone").glob("*.yaml")):
        node: Any = OmegaConf.load(path)
        torchvision_node = node.get("_target_") == "driftline.backbones.load.torchvision_backbone"
        if torchvision_node and node.get("weights") and node.get("arch"):
            chosen = torchvision.models.get_model_weights(node.arch)[node.weights]
            file = Path(urlparse(chosen.url).path).name
            local = Path(torch.hub.get_dir(), "checkpoints", file)
            published = Path(file).stem.rpartition("-")[2]
            yield path.stem, local if local.exists() else None, published
        elif node.get("checkpoint") == "random":
            continue  # nothing to fetch
        elif "tag" in node and not OmegaConf.is_missing(node, "tag") and node.tag:
            known = timm.get_pretrained_cfg(node.tag, allow_unregistered=False)
            if known is None or not known.hf_hub_id:
                continue
            repo, _, revision = str(known.hf_hub_id).partition("@")
            cached = [
                huggingface_hub.try_to_load_from_cache(repo, f, revision=revision or None)
                for f in HUB_FILES
            ]
            local = next((Path(c) for c in cached if isinstance(c, str)), None)
            blob = os.path.realpath(local) if local else ""
            yield path.stem, local, Path(blob).name if len(Path(blob).name) == 64 else ""


# ------------------------------------------------------------------------------ a command


def command(report: Report, cfg: DictConfig) -> None:
    """Passes, time and memory of a run, from a few batches of it."""
    import torch

    from driftline.core.cost import Costs, peak_memory_mb, reset_peak_memory
    from driftline.core.identity import method_name
    from driftline.core.strategy import CLStrategy, TTAStrategy
    from driftline.core.stream import TaskStream
    from driftline.kernels import dispatch
    from driftline.runs.compose import replays_source
    from driftline.runs.execute import check_kind, complete, make_strategy, make_stream, set_up
    from driftline.streams.pipelines import Geometry

    report.section("This command")
    try:
        cfg = complete(cfg)
        where, geometry = set_up(cfg), Geometry()
        dispatch.use(cfg.kernel.backend)
        stream = make_stream(cfg, geometry, where)
        check_kind(cfg, stream)
        strategy, weights = make_strategy(cfg, stream, geometry, where)
    except UserError as error:
        report.problem(str(error), "the message says it")
        return
    report.ok(
        f"{method_name(cfg.strategy.name, list(cfg.around))} on {stream.name}, "
        f"{weights['tag']} (hash {weights['hash']}), {where}"
    )
    costs = Costs(strategy.backbone, where)
    reset_peak_memory(where)
    steps, waits = [], []
    if isinstance(stream, TaskStream):
        assert isinstance(strategy, CLStrategy)
        task = stream.tasks[0]
        strategy.begin_task(task)
        strategy.begin_epoch(task, 0)
        batches, act = task.train(0), lambda b: strategy.observe(b)
        total = sum(t.steps for t in stream.tasks) * strategy.epochs
        images = len(stream.order["label"])  # of training
        trained = strategy.epochs > 0
    else:
        assert isinstance(strategy, TTAStrategy)
        if strategy.preparation() is not None:
            report.note(
                "prepares on labelled source images first, which the estimate leaves out; alone: "
                "the same command with stage=prepare"
            )
        if replays_source(cfg) and stream.source is not None:
            strategy.use_source(stream.source())
        strategy.begin_stream()
        batches, act = stream.segments[0].batches(), lambda b: strategy.adapt(b.x)
        total = sum(s.steps for s in stream.segments)
        images = sum(s.images for s in stream.segments)
        trained = True
    last = None
    started = time.perf_counter()
    for batch in batches:
        if batch is None:
            continue
        last = batch.to(where)
        waits.append(time.perf_counter() - started)
        if trained:
            try:
                with costs.step(len(last.y)):
                    act(last)
            except UserError as error:  # it cannot do without its preparation
                report.note(f"no estimate: {error}")
                return
            steps.append(costs.seconds)
        started = time.perf_counter()
        if len(waits) == PROBE:
            break
    if last is None:
        report.problem("no image of the first batches can be read", "see the section Data")
        return
    with torch.no_grad():
        started = time.perf_counter()
        strategy.backbone(last.x)
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        forward = (time.perf_counter() - started) / len(last.y)  # seconds an image
    # The first batch pays for warm-up and for starting the loader.
    step = statistics.median(steps[1:] or steps or [0.0])
    wait = statistics.median(waits[1:] or waits)
    if trained:
        passes = costs.forward / costs.images, costs.backward / costs.images
        report.ok(
            f"{total:,} batches, {passes[0]:.1f} forward and {passes[1]:.1f} backward passes an "
            f"image"
        )
    seen = len(last.y)
    main_seconds = total * (step + wait) if trained else images * (forward + wait / seen)
    if isinstance(stream, TaskStream):
        rounds = (len(stream.tasks) + 1) / 2  # each task is tested from its own on
        tested = round(int(str(stream.facts.get("test_images", 0))) * rounds)
        extra, what = tested * forward, f"{tested:,} test images" if tested else "no tests"
    else:
        other = images if cfg.strategy.name != "source" else 0
        rows = stream.scored().values()
        probes = int(cfg.scenario.get("probe_images") or 0) * sum(len(d) for d, _ in rows)
        clean = int(cfg.scenario.get("clean_images") or 0) if stream.holdout else 0
        clean *= sum(with_clean for _, with_clean in rows) + 2 * stream.holdout_adapting
        extra = other * (forward + wait / seen) + (probes + clean) * forward
        what = f"{other:,} images of the source run"
        what += f", at most {probes + clean:,} probe and clean images"
    report.ok(f"time, estimated from {PROBE} batches: {duration(main_seconds + extra)}")
    report.note(
        f"a batch {step:.3f} s and {wait:.3f} s of loading, an image forward {forward * 1e3:.2f} "
        f"ms; {duration(main_seconds)} for the stream, {duration(extra)} for {what}"
    )
    if isinstance(stream, TaskStream):
        report.note("from the first task; methods that grow get slower")
    if wait > 2 * step and trained:
        report.note("loading takes longer than computing: more runtime.workers, or a faster disk")
    peak = peak_memory_mb(where)
    room = (
        torch.cuda.mem_get_info(where)[0] / 2**20 + peak
        if where.type == "cuda"
        else (memory_available() or float("inf"))
    )
    text = f"memory {peak / 1024:.2f} GiB so far, {room / 1024:.1f} GiB available"
    if peak > 0.9 * room:
        report.problem(text, "a smaller scenario.batch_size, which changes results")
    else:
        report.ok(text)


def main() -> int:
    from driftline.runs.command import composed
    from driftline.runs.schema import check_settings

    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    try:
        cfg = composed(words)
        expand_paths(cfg)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = Report()
    versions(report)
    if problem := torchvision_problem():
        report.problem(problem, FIX_TORCHVISION)
        return _end(report)
    try:
        check_settings(cfg)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device(report)
    disk(report, cfg)
    checkpoints(report, cfg)
    data(report, cfg.data.root)
    if any(not w.startswith(("data.", "root=")) for w in words):
        command(report, cfg)
    return _end(report)


def _end(report: Report) -> int:
    print(f"\n{report.problems or 'no'} problem{'s' if report.problems != 1 else ''}")
    for line in report.listed:
        print(f"  {line}")
    return 1 if report.listed else 0


if __name__ == "__main__":
    sys.exit(program(main))
