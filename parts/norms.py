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


def batch_norms(net: nn.Module) -> dict[str, _BatchNorm]:
    """Every batch normalisation layer (1d, 2d, 3d, synchronised) by name, in module order."""
    return {n: m for n, m in net.named_modules() if isinstance(m, _BatchNorm)}


def _enough_values(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    x = inputs[0]
    if x.numel() // x.size(1) < 2:
        raise UserError(
            "batch statistics need two values per channel, but a normalisation layer received one "
            f"image with a map of one pixel (input {tuple(x.shape)}). Use a batch size above 1 "
            "that leaves no last batch of one image, larger images, or strategy=source."
        )


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
        layer.register_forward_pre_hook(_enough_values)
    return list(layers)


def mix_statistics(net: nn.Module, alpha: float) -> list[str]:
    """Normalise with `(1 - alpha) * source + alpha * batch` statistics in evaluation mode.

    The batch variance is the unbiased one. The source statistics stay in the buffers: they are
    exchanged for the mixture during the layer's forward only, so no state changes.

    Returns:
        names of the layers, in module order.

    Raises:
        UserError: later, in a forward where a layer sees a single value per channel.
    """
    source: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def mix(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        _enough_values(layer, inputs)
        x, buffers = inputs[0], layer._buffers
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
            _enough_values(layer, (parts[0],))
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
