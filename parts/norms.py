"""Normalisation layers: which ones, with which statistics; selection of parameters by layer.

Which class counts as which kind is an instance test, so timm's `BatchNormAct2d`, `LayerNorm2d`,
`GroupNorm1`, `GroupNormAct` and the like count as what they derive from. Decided explicitly:

* `SyncBatchNorm` counts as `bn2d`: in one process it computes what `BatchNorm2d` computes.
* `FrozenBatchNorm2d` (torchvision) and `FrozenBatchNormAct2d` (timm) are constants: they have
  neither parameters nor batch statistics, are no kind, and are left as they are.
* `RMSNorm`/`RmsNorm` and `InstanceNorm` are no kind: no published method adapts them. They are
  reached by name (`by_name("norm")`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError

Kind = Literal["bn2d", "bn1d", "ln", "gn"]
Select = Callable[[str, nn.Module], bool]

KINDS: dict[Kind, tuple[type[nn.Module], ...]] = {
    "bn2d": (nn.BatchNorm2d, nn.SyncBatchNorm),
    "bn1d": (nn.BatchNorm1d,),
    "ln": (nn.LayerNorm,),
    "gn": (nn.GroupNorm,),
}


def by_kind(*kinds: Kind) -> Select:
    """Selects modules by class."""
    classes = tuple(c for kind in kinds for c in KINDS[kind])
    return lambda name, module: isinstance(module, classes)


def by_name(*parts: str) -> Select:
    """Selects modules whose qualified name contains one of `parts`, whatever their class."""
    return lambda name, module: any(part in name for part in parts)


def collect_parameters(net: nn.Module, select: Select | None = None) -> dict[str, nn.Parameter]:
    """Parameters called exactly `weight` or `bias` inside their own module, in module order.

    Class tokens, position tables and fused attention projections (`in_proj_weight`) have other
    names and are left out, as in the reference codes. A shared parameter is listed once.

    Args:
        net: network to walk; names are relative to it.
        select: which modules to look into; None takes every one.
    """
    parameters: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in net.named_modules():
        if select is not None and not select(name, module):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if key in ("weight", "bias") and id(parameter) not in seen:
                seen.add(id(parameter))
                parameters[f"{name}.{key}" if name else key] = parameter
    return parameters


def train_only(net: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Freeze `net` except for `parameters`."""
    net.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)


Layers = Literal["bn", "norm", "name"]
LAYERS: dict[Layers, Select] = {
    "bn": by_kind("bn2d"),
    "norm": by_kind("bn2d", "bn1d", "ln", "gn"),
    "name": by_name("norm", "bn"),
}
HINTS: dict[Layers, str] = {
    "bn": "has no BatchNorm2d; set strategy.layers=norm to train LayerNorm and GroupNorm as well",
    "norm": "has no affine BatchNorm, LayerNorm or GroupNorm; set strategy.layers=name to train "
    "every module with 'norm' or 'bn' in its name, or use strategy=source",
    "name": "has no module with 'norm' or 'bn' in its name; set strategy.layers=norm",
}


def train_norms(
    backbone: Backbone,
    layers: Layers,
    *,
    strategy: str,
    top: Top = "all",
    batch_statistics: bool = True,
) -> dict[str, nn.Parameter]:
    """Scales and shifts of normalisation layers learn, with batch statistics; the rest is frozen.

    Args:
        layers: `bn`: BatchNorm2d (official in Tent); `norm`: also BatchNorm1d, LayerNorm and
            GroupNorm; `name`: every module with "norm" or "bn" in its name, which misses layers
            inside unnamed stems and shortcuts.
        strategy: name of the method, for the error.
        top: whether the uppermost layers learn, see `below_top`.
        batch_statistics: false leaves the running statistics of batch normalisation.

    Returns:
        the parameters by name, in module order.

    Raises:
        UserError: for a network without such layers.
    """
    chosen, lower = LAYERS[layers], below_top(backbone.net, top)
    trained = collect_parameters(backbone.net, lambda n, m: chosen(n, m) and lower(n, m))
    if not trained:
        raise UserError(
            f"strategy={strategy} with layers={layers} has nothing to train: {backbone.tag} "
            f"{HINTS[layers]}"
        )
    if batch_statistics:
        use_batch_statistics(backbone.net)
    train_only(backbone, trained.values())
    return trained


Top = Literal["all", "names", "position"]
# Parts of names in SAR's code.
TOP_NAMES = ("layer4", "blocks.9", "blocks.10", "blocks.11", "norm.")
STACK = 8  # from so many blocks on, they are one stack of equal blocks and not stages


def below_top(net: nn.Module, top: Top) -> Select:
    """Selects modules below the uppermost layers, which SAR and its successors leave as they are.

    Args:
        top: `all`: every module learns. `names`: those of the official code (mr-eggplant/SAR @
            20f6e24) do not, names with layer4, blocks.9, blocks.10, blocks.11 or "norm." in them
            and `norm` itself, which fits ResNet-50 and timm's ViT-B. `position`: what these names
            stand for does not, whatever it is called: the last stage of a network of stages, the
            last quarter of a stack of eight or more blocks, and all that comes after.
    """
    if top == "all":
        return lambda name, module: True
    if top == "names":
        return lambda name, module: name != "norm" and not any(part in name for part in TOP_NAMES)
    stages = _stages(net)
    first = len(stages) * 3 // 4 if len(stages) >= STACK else len(stages) - 1
    below, above = set(), False
    for name, _ in net.named_modules():
        above = above or name == stages[first]
        if not above:
            below.add(name)
    return lambda name, module: name in below


def _stages(net: nn.Module) -> list[str]:
    """Names of the blocks or stages that make up most of a network, from its input to its output.

    Raises:
        UserError: where there are none.
    """
    lists: list[list[str]] = []
    for path, module in net.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, nn.Sequential | nn.ModuleList):
            lists.append([prefix + name for name, _ in module.named_children()])
        numbered: dict[tuple[str, type], list[str]] = {}  # layer1, layer2, ... of one class
        for name, child in module.named_children():
            if stem := name.rstrip("0123456789"):
                numbered.setdefault((stem, type(child)), []).append(prefix + name)
        lists += [names for names in numbered.values() if len(names) > 1]
    sizes = [sum(_size(net.get_submodule(name)) for name in names) for names in lists]
    largest = max(zip(sizes, lists, strict=True), key=lambda pair: pair[0], default=(0, []))[1]
    if len(largest) < 2:
        raise UserError(
            "strategy.top=position looks for stages or blocks, and this network has none; "
            "set strategy.top=all"
        )
    return largest


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def batch_norms(net: nn.Module) -> dict[str, _BatchNorm]:
    """Every batch normalisation layer (1d, 2d, 3d, synchronised) by name, in module order."""
    return {n: m for n, m in net.named_modules() if isinstance(m, _BatchNorm)}


def enough_values(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Before a forward with batch statistics.

    Raises:
        UserError: for a single value per channel.
    """
    x = inputs[0]
    if x.numel() // x.size(1) < 2:
        raise UserError(
            "batch statistics need two values per channel, but a normalisation layer received one "
            f"image with a map of one pixel (input {tuple(x.shape)}). Use a batch size above 1 "
            "that leaves no last batch of one image, larger images, or strategy=source."
        )


def enough_in_training(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """As `enough_values`, for layers that use batch statistics in training mode alone."""
    if layer.training:
        enough_values(layer, inputs)


def use_batch_statistics(net: nn.Module) -> list[str]:
    """Remove the running statistics of every batch normalisation layer.

    From then on each forward normalises with the (biased) statistics of its own batch, in
    training and evaluation mode alike. One image is enough as long as its map has two pixels.

    Returns:
        names of the layers, in module order; empty for a network without batch normalisation.

    Raises:
        UserError: later, in a forward where a layer sees a single value per channel.
    """
    layers = batch_norms(net)
    for layer in layers.values():
        layer.track_running_stats = False
        layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        layer.register_forward_pre_hook(enough_values)
    return list(layers)


def mix_statistics(net: nn.Module, alpha: float) -> list[str]:
    """Normalise with `(1 - alpha) * source + alpha * batch` statistics in evaluation mode.

    The batch variance is the unbiased one. The source statistics stay in the buffers: they are
    exchanged for the mixture during the layer's forward only, so no state changes. No gradient
    flows through the batch's statistics.

    Returns:
        names of the layers, in module order.

    Raises:
        UserError: later, in a forward where a layer sees a single value per channel.
    """
    source: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def mix(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        enough_values(layer, inputs)
        x, buffers = inputs[0].detach(), layer._buffers
        var, mean = torch.var_mean(x, dim=[d for d in range(x.ndim) if d != 1])
        old_mean, old_var = buffers["running_mean"], buffers["running_var"]
        if old_mean is None or old_var is None:  # trained without running statistics
            return
        source[layer] = old_mean, old_var
        buffers["running_mean"] = (1 - alpha) * old_mean + alpha * mean
        buffers["running_var"] = (1 - alpha) * old_var + alpha * var

    def put_back(layer: nn.Module, inputs: Any, output: Any) -> None:
        if layer in source:
            layer._buffers["running_mean"], layer._buffers["running_var"] = source.pop(layer)

    layers = batch_norms(net)
    for layer in layers.values():
        layer.register_forward_pre_hook(mix)
        layer.register_forward_hook(put_back, always_call=True)
    return list(layers)


def replace_batch_norms(
    net: nn.Module,
    make: Callable[[str, nn.BatchNorm2d], nn.Module],
    kinds: tuple[Kind, ...] = ("bn2d",),
) -> dict[str, nn.Module]:
    """Put another layer in the place of every batch normalisation of some kinds.

    A layer of timm with an activation of its own (`BatchNormAct2d`) keeps it: the new layer comes
    before it.

    Args:
        make: from the name and the layer to the one in its place.
        kinds: which layers; two-dimensional ones by default.

    Returns:
        the new layers by name, in module order; empty for a network without such layers.
    """
    select = by_kind(*kinds)
    places = [(name, m) for name, m in net.named_modules() if select(name, m)]
    new: dict[str, nn.Module] = {}
    for name, layer in places:
        assert isinstance(layer, _BatchNorm)
        new[name] = make(name, layer)  # type: ignore[arg-type]
        after = [getattr(layer, key) for key in ("drop", "act") if hasattr(layer, key)]
        path, _, key = name.rpartition(".")
        whole = nn.Sequential(new[name], *after) if after else new[name]
        setattr(net.get_submodule(path), key, whole)
    return new


@contextmanager
def view_statistics(net: nn.Module, views: int) -> Iterator[None]:
    """Inside, a batch of `net` is `views` batches of equal size, one after the other, in dim 0.

    Batch normalisation layers that use batch statistics then normalise each view with its own, as
    in one forward per view; everything else sees the whole batch. Other layers are left alone, so
    that nothing changes for a network without batch statistics. Dropout draws other masks.
    """

    def apart(layer: _BatchNorm, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def each(x: Tensor) -> Tensor:
            parts = x.chunk(views)
            enough_values(layer, (parts[0],))
            return torch.cat([forward(part) for part in parts])

        return each

    def batchwise(layer: _BatchNorm) -> bool:
        return layer.training or (layer.running_mean is None and layer.running_var is None)

    if views == 1:
        yield
        return
    layers = [layer for layer in batch_norms(net).values() if batchwise(layer)]
    try:
        for layer in layers:
            vars(layer)["forward"] = apart(layer, layer.forward)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
