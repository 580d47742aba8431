"""Pretrained networks by full identity: the functions that `conf/backbone/*.yaml` point at.

Every function returns a `Backbone` in evaluation mode whose `tag` names the weights completely:
`architecture.tag` (timm), `torchvision/arch.WEIGHTS`, `robustbench/dataset/model`,
`embedded/arch`, followed by `@file` for a local file and by `@random` for random weights.
"""

from __future__ import annotations

import pickle
import socket
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlparse

import driftline.core.vision  # isort: skip
import driftline.backbones.without_wandb  # noqa: F401  # isort: skip

import huggingface_hub
import timm
import torch
import torchvision
from annotated_types import Ge, Le, Predicate
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.imagenet_info import infer_imagenet_subset
from timm.models import PretrainedCfg
from torch import Tensor, nn

from driftline.backbones import embedded
from driftline.backbones.backbone import Backbone
from driftline.backbones.checkpoints import head_name, load_strict, load_tensors, reason_of
from driftline.backbones.resnext_cifar import CifarResNeXt
from driftline.backbones.wide_resnet import WideResNet
from driftline.core.errors import UserError, suggest
from driftline.core.ranges import PlainName, Size

RANDOM = "random"  # value of `checkpoint` that asks for random weights
WEIGHTS = Path(__file__).parent / "weights"
TIMEOUT = 10.0  # seconds without an answer after which a download is given up
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # in the order timm looks for them

# Of torchvision: their published weights want images rescaled inside the network, which the
# constructor does only where it loads them itself.
RESCALING = ("googlenet", "inception_v3")

# What names without a tag meant elsewhere; shown when such a name is refused.
MEANINGS = {
    "vit_base_patch16_224": {
        "augreg_in21k_ft_in1k": "the bare name up to timm 0.6, used in most papers",
        "augreg2_in21k_ft_in1k": "the bare name in timm today",
    },
    "resnet50": {
        "tv_in1k": "torchvision's IMAGENET1K_V1, used in most papers",
        "a1_in1k": "the bare name in timm today",
    },
}

# Google Drive ids as listed in RobustBench (model_zoo/cifar10.py and cifar100.py).
ROBUSTBENCH_FILES = {
    ("cifar10", "Standard"): "1t98aEuzeTL8P7Kpd5DIrCoCL21BNZUhC",
    ("cifar10", "Hendrycks2020AugMix_WRN"): "1wy7gSRsUZzCzj8QhmTbcnwmES_2kkNph",
    ("cifar10", "Hendrycks2020AugMix_ResNeXt"): "1uGP3nZbL3LC160kOsxwkkt6tDd4qbZT1",
    ("cifar100", "Hendrycks2020AugMix_WRN"): "1XpFFdCdU9LcDtcyNfo6_BV1RZHKKkBVE",
    ("cifar100", "Hendrycks2020AugMix_ResNeXt"): "1ocnHbvDdOBLvgNr6K7vEYL08hUdkD1Rv",
}


# ---------------------------------------------------------------- common parts


@contextmanager
def fixed_seed() -> Iterator[None]:
    """Initial weights that are the same in every run and leave the global generator alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@contextmanager
def _other_size(arch: str, size: int) -> Iterator[None]:
    """What a network says to an input size that is not its own, as an error naming the option."""
    try:
        yield
    except (AssertionError, RuntimeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"backbone.input_size={size} does not fit {arch} ({reason_of(error)})"
        ) from error


@contextmanager
def network_timeout() -> Iterator[None]:
    """`urllib`, which torch.hub uses, waits for ever by default."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(before or TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def unreachable(tag: str, source: str, reason: str) -> UserError:
    return UserError(
        f"backbone weights with the tag {tag!r} are not in the local cache and cannot be "
        f"downloaded from {source} ({reason}). Fetch the file elsewhere and pass "
        "backbone.checkpoint=/path/to/file.safetensors"
    )


def normalization(
    normalize: str, mean: Sequence[float] | None, std: Sequence[float] | None
) -> dict[str, Sequence[float] | None]:
    """Arguments of `Backbone` for the option `normalize`; `mean`, `std` are the checkpoint's."""
    if normalize == "none":
        return {"mean": None, "std": None}
    if normalize == "imagenet":
        return {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return {"mean": mean, "std": std}


def check_key(key: str | None, checkpoint: str | None) -> None:
    """Refuse `backbone.checkpoint_key` where there is no file to take anything out of."""
    if key is not None and checkpoint in (None, RANDOM):
        raise UserError(
            f"backbone.checkpoint_key={key!r} says what to take out of a file, and "
            f"backbone.checkpoint={'null' if checkpoint is None else checkpoint} names none"
        )


def label(full: str, checkpoint: str | None) -> str:
    """`full`, `full@file` or `full@random`."""
    return full if checkpoint is None else f"{full}@{Path(checkpoint).name}"


# ---------------------------------------------------------------- timm


def resolve_tag(tag: str) -> str:
    """`architecture.tag` for a timm name; a bare architecture only if that is unambiguous.

    An architecture for which timm publishes no weights is returned without a tag.

    Raises:
        UserError: for an unknown architecture or tag, an old name, or a bare name with several
            sets of weights; the message lists what can be written instead.
    """
    renamed = timm.models.get_deprecated_models().get(tag)
    if renamed:
        raise UserError(
            f"backbone.tag={tag!r} is an old timm name; write backbone.tag={renamed} instead"
        )
    arch, _, wanted = tag.partition(".")
    if not timm.is_model(arch):
        near = suggest(arch, timm.list_models())
        raise UserError(f"backbone.tag={tag!r}: timm has no architecture {arch!r}{near}")
    tags = sorted(n.partition(".")[2] for n in timm.list_pretrained(f"{arch}.*"))
    if wanted:
        if wanted not in tags:
            near = suggest(wanted, tags)
            known = f"it has {', '.join(tags)}" if tags else "timm publishes none for it"
            raise UserError(
                f"backbone.tag={tag!r}: {arch} has no weights {wanted!r}{near}; {known}"
            )
        return tag
    if len(tags) > 1:
        default = getattr(timm.get_pretrained_cfg(arch), "tag", None)
        notes = MEANINGS.get(arch) or {default: "the bare name in timm today"}
        notable = [f"{arch}.{t} ({note})" for t, note in notes.items() if t in tags]
        rest = [t for t in tags if t not in notes]
        raise UserError(
            f"backbone.tag={tag!r} is ambiguous, {len(tags)} sets of weights have that name; "
            f"write one of them in full: {', '.join(notable)}; further tags: {', '.join(rest)}"
        )
    return f"{arch}.{tags[0]}" if tags else arch


def hub_file(hub_id: str, tag: str, files: Sequence[str] = HUB_FILES) -> str:
    """Path of a hub model's weight file in the local cache, downloaded if it is not there.

    A cached file is used without asking the hub. One request without retries comes before a
    download, because the hub client would otherwise retry for a minute when there is no network.

    Raises:
        UserError: if the file is neither cached nor can be downloaded.
    """
    repo, _, revision = hub_id.partition("@")
    for filename in files:
        path = huggingface_hub.try_to_load_from_cache(repo, filename, revision=revision or None)
        if isinstance(path, str):
            return path
    source = f"the Hugging Face hub, {repo}"
    for filename in files:
        url = huggingface_hub.hf_hub_url(repo, filename, revision=revision or None)
        try:
            try:
                huggingface_hub.get_hf_file_metadata(url)
            except EntryNotFoundError:
                continue
            return huggingface_hub.hf_hub_download(repo, filename, revision=revision or None)
        except Exception as error:  # the types depend on the HTTP client of the hub's version
            raise unreachable(tag, source, reason_of(error)) from error
    raise unreachable(tag, source, f"it has none of the files {files}")


def _published(tag: str, cfg: PretrainedCfg, options: dict[str, Any]) -> Any:
    """The network with its published weights, loaded by timm."""
    if not cfg.hf_hub_id:
        try:
            with network_timeout():
                return timm.create_model(tag, pretrained=True, **options)
        except OSError as error:
            raise unreachable(tag, str(cfg.url), reason_of(error)) from error
    file = hub_file(str(cfg.hf_hub_id), tag)
    try:
        return timm.create_model(
            tag, pretrained=True, pretrained_cfg_overlay={"file": file}, **options
        )
    except (SafetensorError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"the cached weights of {tag!r} cannot be read ({reason_of(error)}); delete {file}"
        ) from error


def _converted(net: nn.Module, tensors: dict[str, Tensor], resize: bool) -> dict[str, Tensor]:
    """Tensors in timm's naming, for files published in another one.

    timm's conversion also resamples patch and position embeddings to the network's grid, which
    would hide that a file belongs to another architecture. It is therefore only used if names or
    numbers of dimensions differ, or if another input size was asked for (`resize`).
    """
    own = net.state_dict()
    same = tensors.keys() == own.keys()
    if same and not resize and all(t.ndim == own[k].ndim for k, t in tensors.items()):
        return tensors
    convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    try:
        return dict(convert(dict(tensors), net)) if convert else tensors
    except (KeyError, RuntimeError, AttributeError, ValueError, TypeError, AssertionError):
        return tensors  # foreign content: `load_strict` names the first tensor that disagrees


def _from_file(
    arch: str,
    path: str,
    key: str | None,
    cfg: PretrainedCfg,
    num_classes: int | None,
    options: dict[str, Any],
) -> nn.Module:
    """A timm network with the weights of a local file."""
    tensors = load_tensors(path, key)
    net = timm.create_model(arch, num_classes=num_classes or cfg.num_classes, **options)
    tensors = _converted(net, tensors, resize="img_size" in options)
    if num_classes == 0:
        # Load with the head that the file has, so that strict loading checks everything else.
        names = (cfg.classifier,) if isinstance(cfg.classifier, str) else cfg.classifier or ()
        head = next((tensors[f"{n}.weight"] for n in names if f"{n}.weight" in tensors), None)
        outputs = 0 if head is None else len(head)
        if outputs != net.num_classes:
            net = timm.create_model(arch, num_classes=outputs, **options)
    load_strict(net, tensors, path)
    return net


def label_space(full: str, outputs: int) -> str | None:
    """What the head of `architecture.tag` predicts; None for a head of no size known to timm."""
    subset = infer_imagenet_subset({"num_classes": outputs})
    space = subset.replace("-", "", 1).replace("-", "_") if subset else None
    tag = full.partition(".")[2]
    if space == "imagenet1k" and tag and "in1k" not in tag:
        return tag  # of DINO: 1,000 outputs, but not of these classes
    return space


def without_hub(tag: str) -> bool:
    """architecture.tag as in timm.list_pretrained(), without hf_hub: or timm/ before it"""
    return tag != "" and not {*":/"} & {*tag}


def timm_backbone(
    *,
    name: PlainName,
    tag: Annotated[str, Predicate(without_hub)],
    checkpoint: str | None,
    checkpoint_key: str | None,
    normalize: Literal["checkpoint", "none", "imagenet"],
    classes: str | None,
    num_classes: Annotated[int, Ge(0), Le(10**6)] | None,
    input_size: Size | None,
) -> Backbone:
    """Any timm network, identified by `architecture.tag`.

    Args:
        name: short name for folders and tables.
        tag: `architecture.tag`; the architecture alone only if it has at most one tag.
        checkpoint: None takes the published weights from the local hub cache or the hub; else a
            path to a weight file of this architecture, or `random`.
        checkpoint_key: which of several sets of weights in that file, see `load_tensors`.
        normalize: `checkpoint` uses the mean and std stored with the tag, `imagenet` the ImageNet
            ones, `none` feeds images in [0, 1] as they are.
        classes: label space of the head; None derives it from the tag.
        num_classes: None keeps the head, 0 removes it. Another number is for `checkpoint` files
            that were fine-tuned, and for random weights.
        input_size: side in pixels; None takes that of the tag. For networks of a fixed input size
            the position embedding is resampled.

    Raises:
        UserError: see `resolve_tag`, `load_tensors`, `load_strict`; also for weights that are
            neither cached nor can be downloaded.
    """
    check_key(checkpoint_key, checkpoint)
    full = resolve_tag(tag)
    arch = full.partition(".")[0]
    cfg = timm.get_pretrained_cfg(full) or PretrainedCfg()
    options: dict[str, Any] = {}
    other = input_size if input_size != cfg.input_size[-1] else None
    if other is not None and cfg.fixed_input_size:
        options["img_size"] = (other, other)
    net: Any  # timm networks have more than nn.Module promises
    with fixed_seed(), nullcontext() if other is None else _other_size(arch, other):
        if checkpoint == RANDOM:
            # the tag would claim weights that are not there
            full = arch
            outputs = cfg.num_classes if num_classes is None else num_classes
            net = timm.create_model(arch, num_classes=outputs, **options)
        elif checkpoint is not None:
            net = _from_file(arch, checkpoint, checkpoint_key, cfg, num_classes, options)
        elif "." not in full:
            raise UserError(
                f"backbone.tag={tag!r}: no weights are published for {arch}; pass "
                "backbone.checkpoint=/path/to/file.safetensors, or backbone.checkpoint=random"
            )
        elif num_classes not in (None, 0, cfg.num_classes):
            raise UserError(
                f"backbone.num_classes={num_classes}: the head of {full} has {cfg.num_classes} "
                "outputs; use null to keep it or 0 to remove it"
            )
        else:
            net = _published(full, cfg, options)
        if num_classes == 0:
            net.reset_classifier(0)
        if other is not None:  # most networks refuse an image, not the size
            with torch.no_grad():
                net.eval()(torch.zeros(1, 3, other, other))
    if classes is None and checkpoint != RANDOM and net.num_classes == cfg.num_classes:
        classes = label_space(full, net.num_classes)
    return Backbone(
        net,
        name=name,
        tag=label(full, checkpoint),
        input_size=input_size or cfg.input_size[-1],
        interpolation=cfg.interpolation,
        classes=classes if net.num_classes else None,
        **normalization(normalize, cfg.mean, cfg.std),
    ).eval()


# ---------------------------------------------------------------- torchvision


def torchvision_backbone(
    *,
    name: PlainName,
    arch: str,
    weights: str,
    checkpoint: str | None,
    checkpoint_key: str | None,
    normalize: Literal["checkpoint", "none", "imagenet"],
) -> Backbone:
    """A torchvision classifier with its ImageNet-1k head, or that of a file of weights.

    Args:
        name: short name for folders and tables.
        arch: torchvision's name, such as `resnet50`, `vit_b_16`, `swin_b`.
        weights: torchvision's name of the weights, such as `IMAGENET1K_V1`; it also fixes input
            size, interpolation and normalisation.
        checkpoint: None takes the published weights from torch.hub's cache or downloads them; else
            a path to a weight file of this architecture, or `random`.
        checkpoint_key: as in `timm_backbone`.
        normalize: as in `timm_backbone`.

    Raises:
        UserError: for unknown names, files that do not fit, weights that cannot be downloaded.
    """
    check_key(checkpoint_key, checkpoint)
    models = torchvision.models.list_models(module=torchvision.models)
    if arch not in models:
        raise UserError(f"backbone.arch={arch!r} is not in torchvision{suggest(arch, models)}")
    kinds = {w.name: w for w in torchvision.models.get_model_weights(arch)}
    if weights not in kinds:
        raise UserError(
            f"backbone.weights={weights!r}: torchvision's {arch} has {', '.join(kinds)}"
        )
    chosen, outputs = kinds[weights], 1000
    with fixed_seed():
        if checkpoint is None:
            try:
                with network_timeout():
                    net = torchvision.models.get_model(arch, weights=chosen)
            except OSError as error:
                raise unreachable(f"{arch}.{weights}", chosen.url, reason_of(error)) from error
            except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
                file = Path(
                    torch.hub.get_dir(), "checkpoints", Path(urlparse(chosen.url).path).name
                )
                raise UserError(
                    f"the cached weights of {arch}.{weights} cannot be read "
                    f"({reason_of(error)}); delete {file}"
                ) from error
        else:
            options: dict[str, Any] = {}
            if arch in RESCALING:
                # As with `weights`; else the constructor waits for weights that are replaced.
                random = checkpoint == RANDOM
                options = {"transform_input": not random, "init_weights": random}
            net = torchvision.models.get_model(arch, weights=None, **options)
            if checkpoint != RANDOM:
                tensors = load_tensors(checkpoint, checkpoint_key)
                outputs = _outputs(net, tensors)
                if outputs != Backbone(net).num_classes:
                    net = torchvision.models.get_model(
                        arch, weights=None, num_classes=outputs, **options
                    )
                load_strict(net, tensors, checkpoint)
    preset = chosen.transforms()
    full = f"torchvision/{arch}" if checkpoint == RANDOM else f"torchvision/{arch}.{weights}"
    return Backbone(
        net,
        name=name,
        tag=label(full, checkpoint),
        input_size=preset.crop_size[0],
        interpolation=preset.interpolation.value,
        classes="imagenet1k" if checkpoint != RANDOM and outputs == 1000 else None,
        **normalization(normalize, preset.mean, preset.std),
    ).eval()


def _outputs(net: nn.Module, tensors: Mapping[str, Tensor]) -> int:
    """Outputs of a network of this architecture with these weights."""
    weight = tensors.get(f"{head_name(net)}.weight")
    return Backbone(net).num_classes if weight is None or weight.ndim != 2 else len(weight)


# ---------------------------------------------------------------- embedded and CIFAR networks


def embedded_backbone(
    *,
    name: PlainName,
    arch: Literal["embedded_resnet", "embedded_vit", "embedded_vit_head"],
    normalize: Literal["checkpoint", "none"],
) -> Backbone:
    """The small networks that ship with the project, for 32-pixel procedural images.

    The weights are stored in half precision and computed with in single precision.

    Raises:
        UserError: if the weight file is not there.
    """
    parts = ["embedded_vit", arch] if arch == "embedded_vit_head" else [arch]
    tensors: dict[str, Tensor] = {}
    for part in parts:
        file = WEIGHTS / f"{part}.safetensors"
        if not file.is_file():
            raise UserError(
                f"backbone.arch={arch!r}: {file} is missing; make it with "
                "tools/pretrain_embedded.py"
            )
        tensors |= load_tensors(file)
    with fixed_seed():
        net: nn.Module = getattr(embedded, arch)()
    load_strict(net, tensors, WEIGHTS / f"{arch}.safetensors")
    return Backbone(
        net,
        name=name,
        tag=f"embedded/{arch}",
        input_size=32,
        interpolation="bicubic",
        classes="embedded" if net.num_classes else None,
        **normalization(normalize, embedded.MEAN, embedded.STD),
    ).eval()


def robustbench_backbone(
    *,
    name: PlainName,
    model: Literal["Standard", "Hendrycks2020AugMix_WRN", "Hendrycks2020AugMix_ResNeXt"],
    dataset: Literal["cifar10", "cifar100"],
    checkpoint: str | None,
    checkpoint_key: str | None,
    normalize: Literal["checkpoint", "none"],
) -> Backbone:
    """A CIFAR network of RobustBench's corruption board, from its published file.

    `Standard` (WRN-28-10) takes images in [0, 1] as they are; the AugMix networks (WRN-40-2 and
    ResNeXt-29 32x4d) were trained with mean = std = 0.5.

    Args:
        name: short name for folders and tables.
        model: RobustBench's name, threat model "corruptions" (`Standard` is the same file in all).
        dataset: training set; decides the number of outputs and the file.
        checkpoint: path of the file, or `random`. The files are on Google Drive, which has no
            dependable direct download, so they are not fetched.
        checkpoint_key: as in `timm_backbone`.
        normalize: `checkpoint` as above, `none` never normalises.

    Raises:
        UserError: without a checkpoint (naming its source), or for one that does not fit.
    """
    if (dataset, model) not in ROBUSTBENCH_FILES:
        raise UserError(
            f"backbone.model={model!r} is not published for {dataset}, only for cifar10"
        )
    check_key(checkpoint_key, checkpoint)
    if checkpoint is None:
        raise UserError(
            f"backbone.checkpoint is missing: fetch RobustBench's {model} for {dataset} from "
            f"https://drive.google.com/uc?id={ROBUSTBENCH_FILES[dataset, model]} "
            "and pass backbone.checkpoint=/path/to/file.pt"
        )
    outputs = 10 if dataset == "cifar10" else 100
    with fixed_seed():
        net: nn.Module
        if model == "Standard":
            net = WideResNet(depth=28, widen=10, num_classes=outputs)
        elif model == "Hendrycks2020AugMix_WRN":
            net = WideResNet(depth=40, widen=2, num_classes=outputs)
        else:
            net = CifarResNeXt(depth=29, cardinality=4, base_width=32, num_classes=outputs)
    constants = None if model == "Standard" else (0.5, 0.5, 0.5)
    if checkpoint != RANDOM:
        tensors = load_tensors(checkpoint, checkpoint_key)
        # some files also hold the normalisation of RobustBench's wrapper
        for key in ("mu", "sigma"):
            stored = tensors.pop(key, None)
            if stored is not None and (constants is None or not torch.all(stored == constants[0])):
                raise UserError(
                    f"backbone.checkpoint={checkpoint!r} expects the normalisation "
                    f"{key}={stored.flatten().tolist()}, which is not that of {model}"
                )
        load_strict(net, tensors, checkpoint)
    return Backbone(
        net,
        name=name,
        tag=label(f"robustbench/{dataset}/{model}", checkpoint),
        input_size=32,
        interpolation="bilinear",
        classes=None if checkpoint == RANDOM else dataset,
        **normalization(normalize, constants, constants),
    ).eval()
