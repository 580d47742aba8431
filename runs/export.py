"""The one network that answers as a method does: its state dict, and ONNX.

Which network that is, is said here method by method (`_network`): the backbone itself, a teacher,
a frozen transformer with its adapters added to the weights, a new linear head. Where the answer is
more than one network and a linear head, one line says what it is (`REASONS`). Whatever is exported
has been compared with the method on the caller's images before, so that a method of one's own is
exported rightly or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import singledispatch
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.cl.adab2n import BalancedNorm
from driftline.cl.cllora import CLLoRA
from driftline.cl.coil import COIL
from driftline.cl.ease import Ease
from driftline.cl.finetune import NAME as FINETUNED
from driftline.cl.finetune import Finetune
from driftline.cl.first_task import TUNED, FirstTask
from driftline.cl.fsa import FSA, LDA, FiLM
from driftline.cl.hpcr import HPCR
from driftline.cl.icarl import ICaRL
from driftline.cl.lae import LAE
from driftline.cl.moram import MoRAM
from driftline.cl.mos import Mos
from driftline.cl.olora import OLoRA
from driftline.cl.osf import OSF
from driftline.cl.prompted import Prompted
from driftline.cl.ranpac import RanPAC
from driftline.cl.sema import SEMA
from driftline.cl.simplecil import SimpleCIL
from driftline.cl.slca import SLCA
from driftline.cl.slda import SLDA
from driftline.cl.ssiat import SSIAT
from driftline.cl.stacked import NAME as STACKED
from driftline.cl.stacked import Stacked
from driftline.cl.tuna import Tuna
from driftline.core.errors import UserError
from driftline.core.files import replacing
from driftline.core.strategy import Strategy, TaskWrapper, Wrapper
from driftline.parts.adapters.bank import AdapterBank
from driftline.parts.modes import evaluating
from driftline.parts.norms import batch_norms
from driftline.parts.rules.weight_average import WeightAverage
from driftline.runs.saving import name_of
from driftline.tta.becotta import BECoTTA
from driftline.tta.cotta import CoTTA
from driftline.tta.ecotta import EcoTTA
from driftline.tta.foa import FOA
from driftline.tta.lame import LAME
from driftline.tta.lsa import LSA
from driftline.tta.memo import MEMO
from driftline.tta.neo import NEO
from driftline.tta.note import NOTE
from driftline.tta.psmt import PSMT
from driftline.tta.rmt import RMT
from driftline.tta.roid import ROID
from driftline.tta.rotta import RobustBatchNorm, RoTTA
from driftline.tta.t3a import T3A
from driftline.tta.tent import NAME as TENT
from driftline.tta.tent import Tent
from driftline.tta.unmix_tns import UnMixTNS
from driftline.tta.vdp import VDP
from driftline.tta.vida import NAME as VIDA
from driftline.tta.vida import ViDA

# Of scores between the method and its network, beside the largest score. Small, since a method of
# one's own that has hardly learned yet differs by little from a network that leaves it out.
ROUNDING = 1e-4
# What the answer is, where that is more than one network and a linear head.
REASONS: dict[type[Strategy], str] = {
    LAME: "a correction of the whole batch",
    PSMT: "the sum of two networks, teacher and student",
    RMT: "the sum of two networks, student and teacher",
    FOA: "that of a network with learned prompts and shifted features",
    VDP: "that of a network on images with learned prompts",
    NOTE: "that of a network that normalises each image with statistics of its own",
    UnMixTNS: "that of a network with several sets of statistics, chosen for each image",
    LSA: "corrected by an estimate of the classes' shares",
    BECoTTA: "that of a network with experts, chosen for each image",
    EcoTTA: "that of a network with meta networks beside it",
    Ease: "made in the subspaces of the adapters of all tasks",
    Mos: "made with the adapters of all tasks, chosen or mixed for each image",
    Tuna: "made with the adapters of all tasks, the surest for each image",
    CLLoRA: "made in a subspace of each task",
    LAE: "the surer of two sets of adapters",
    SEMA: "that of a network with routed, not linear adapters",
    Prompted: "that of a network with prompts, chosen for each image",
    MoRAM: "that of a network whose updates are chosen for each token",
    SimpleCIL: "cosines with class means",
    SSIAT: "cosines of a cosine classifier",
    COIL: "cosines of a cosine classifier",
    HPCR: "cosines with proxies",
    FirstTask: "read off class statistics, not off a linear layer",
    RanPAC: "that of a head on random, not linear projections",
}


def export(method: Strategy, images: Tensor) -> dict[str, Tensor]:
    """The state dict of the one network that answers as `method.predict` does.

    It loads strictly into the network that the method was made around, as that was before: in a
    fresh one, `net.load_state_dict(driftline.export(method, images))`. Adapters are added to the
    weights. A continual method has one row in the linear head for each class seen; where that is
    another number than the network has outputs, give the network a head of that size first
    (`net.reset_classifier(n)` of timm).
    Normalisation with `mean` and `std` stays outside.

    Args:
        method: of `driftline.make` or `driftline.load`.
        images: float [B, 3, H, W] in [0, 1], B at least 2, on the method's device. What is
            exported answers them as the method does, which is tested; and where a method
            normalises with the statistics of each batch, those of this one become the running
            statistics, so take images of the target domain.

    Returns:
        tensors by name, on the CPU.

    Raises:
        UserError: where no single network gives the answer, with the reason.
    """
    state = _plain(method, images).net.state_dict()
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def export_onnx(method: Strategy, images: Tensor, path: str | Path) -> None:
    """Write the network of `export` as ONNX: `images` [B, 3, H, W] in [0, 1] to `scores` [B, C].

    Normalisation with the method's `mean` and `std` is inside; B is free. Needs the packages of
    `driftline[onnx]`.

    Args:
        images: see `export`.

    Raises:
        UserError: as `export`, and where a package is missing.
    """
    try:
        import onnx  # noqa: F401  # pyrefly: ignore[missing-import]
        import onnxscript  # noqa: F401  # pyrefly: ignore[missing-import]
    except ModuleNotFoundError as error:
        raise UserError(
            f'export_onnx needs the package {error.name}: pip install "driftline[onnx]"'
        ) from error
    network = _Scores(_plain(method, images)).eval()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        torch.onnx.export(
            network,
            (images,),
            part,
            input_names=["images"],
            output_names=["scores"],
            dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1)}},
            external_data=False,
            dynamo=True,
            verbose=False,
        )


class _Scores(nn.Module):
    """A backbone without its counters."""

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.net = backbone.net
        self.register_buffer("mean", backbone.mean)
        self.register_buffer("std", backbone.std)

    def forward(self, x: Tensor) -> Tensor:
        if self.mean is not None and self.std is not None:
            x = (x - self.mean) / self.std
        return self.net(x)


def _plain(method: Strategy, images: Tensor) -> Backbone:
    """A copy of the network that answers as the method, without hooks, in evaluation mode.

    Raises:
        UserError: where there is none.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) < 2:
        tensor = isinstance(images, Tensor)
        what = f"a tensor of shape {list(images.shape)}" if tensor else repr(images)[:80]
        raise UserError(
            f"images must be a batch of at least two, [B, 3, H, W] in [0, 1], got {what}"
        )
    with torch.no_grad():
        want = method.predict(images)
        try:
            network = _network(method)
        except _Refused as error:
            raise UserError(
                f"{name_of(method)}: its answer is {error}, so there is no single network to "
                "export; keep the method itself with driftline.save"
            ) from None
        network.eval().requires_grad_(False)
        _fix_statistics(network, images)
        _remove_hooks(network)
        scores = network.logits(images)
    same = scores.shape == want.shape
    off = (scores - want).abs().max().item() if same and len(want.T) else 0.0
    if not same or not off <= ROUNDING * max(1.0, want.abs().max().item()):
        how = f"by up to {off:.2g}" if same else f"in shape, {list(want.shape)}"
        raise UserError(
            f"{name_of(method)}: its answers to these images differ from those of its network "
            f"{how}, so there is no single network to export; keep the method itself with "
            "driftline.save"
        )
    return network


class _Refused(Exception):
    """Says what the answer is, in place of that of one network."""


# ------------------------------------------------------------------------------ method by method


@singledispatch
def _network(method: Strategy) -> Backbone:
    """A copy of the network with the answers, perhaps still with batch statistics and hooks.

    Raises:
        _Refused: where there is none.
    """
    return _copy(method)


def _copy(method: Strategy) -> Backbone:
    return deepcopy(cast(Backbone, method.backbone))


def _refuse(method: Strategy) -> Backbone:
    raise _Refused(next(REASONS[kind] for kind in type(method).__mro__ if kind in REASONS))


for _kind in REASONS:
    _network.register(_kind, _refuse)


@_network.register
def _(method: Wrapper) -> Backbone:
    return _network(method.inner)


@_network.register
def _(method: TaskWrapper) -> Backbone:
    return _network(method.inner)


@_network.register
def _(method: WeightAverage) -> Backbone:
    with method._in_place():
        return _network(method.inner)


@_network.register
def _(method: Tent) -> Backbone:
    if method.bank is None:
        return _copy(method)
    return _merged(method.bank, [TENT])


@_network.register
def _(method: CoTTA) -> Backbone:
    return deepcopy(method.teacher)


@_network.register
def _(method: RoTTA) -> Backbone:
    return _with_batch_norms(deepcopy(method.teacher))


@_network.register
def _(method: ViDA) -> Backbone:
    return _merged(method.teacher_bank, [VIDA])


@_network.register
def _(method: ROID) -> Backbone:
    if method.prior_on is not None:
        raise _Refused("corrected by the shares of the classes in the batch")
    return _copy(method)


@_network.register
def _(method: MEMO) -> Backbone:
    if method.mixes and not method.together:
        raise _Refused("that of a network that normalises each image with statistics of its own")
    return _copy(method)


@_network.register
def _(method: NEO) -> Backbone:
    head = method.backbone.head
    bias = 0 if head.bias is None else head.bias
    return _with_head(deepcopy(method.backbone), head.weight, bias - head.weight @ method.center)


@_network.register
def _(method: T3A) -> Backbone:
    rows = method.class_vectors().T
    return _with_head(deepcopy(method.backbone), rows, rows.new_zeros(len(rows)))


@_network.register
def _(method: Finetune) -> Backbone:
    network = _copy(method) if method.bank is None else _merged(method.bank, [FINETUNED])
    head = method.head
    return _with_head(
        _with_batch_norms(network), head.weight[: method.seen], head.bias[: method.seen]
    )


@_network.register
def _(method: ICaRL) -> Backbone:
    if method.answer != "head":
        raise _Refused("distances to class means")
    return _network.dispatch(Finetune)(method)


@_network.register
def _(method: Stacked) -> Backbone:
    network = _merged(method.bank, [STACKED])
    return _with_head(network, method.head.weight, method.head.bias)


@_network.register
def _(method: OLoRA) -> Backbone:
    return _with_head(_merged(method.bank, method.sets), method.head.weight, method.head.bias)


@_network.register
def _(method: SLCA) -> Backbone:
    if method.made_of is None or method.made_of["strategy"]["final_norm"] == "new":
        raise _Refused("that of a network with another last norm than yours (final_norm=new)")
    heads, network = method.heads, _copy(method)
    classes = max((t.stop for t in heads.tasks), default=0)
    weight = next(network.parameters()).new_zeros(classes, heads.dim)
    bias = weight.new_zeros(classes)
    for own, layer in zip(heads.tasks, heads.layers, strict=True):
        weight[own.start : own.stop] = cast(nn.Linear, layer).weight
        bias[own.start : own.stop] = cast(nn.Linear, layer).bias
    return _with_head(network, weight, bias)


@_network.register
def _(method: OSF) -> Backbone:
    head = method.head
    rows = slice(method.seen)
    return _with_head(_copy(method), head.weight[rows], head.bias[rows])


@_network.register
def _(method: FSA) -> Backbone:
    if TUNED not in method.reads:
        network = _copy(method)
    elif method.bank is not None:
        network = _merged(method.bank, [TUNED])
    else:
        network = deepcopy(cast(Backbone, method.copy))
    return _with_head(network, method.head.weight, -method.head.bias / 2)


@_network.register
def _(method: SLDA) -> Backbone:
    head = cast(LDA, method.head)
    return _with_head(_copy(method), head.weight, -head.bias / 2)


# ------------------------------------------------------------------------------ what is changed


def _with_head(network: Backbone, weight: Tensor, bias: Tensor) -> Backbone:
    """The same network with other values [C, D] and [C] in its last linear layer.

    A timm network that was made without one gets it.
    """
    if network.num_classes == 0 and hasattr(network.net, "reset_classifier"):
        network.net.reset_classifier(len(weight))
    head = network.head
    if head is None:
        raise _Refused("read off features of a network without a single linear layer at its end")
    if head.bias is None and bias.any():
        raise _Refused("that of a linear layer with a bias, which this network lacks")
    head.weight = nn.Parameter(weight.detach().clone())
    if head.bias is not None:
        head.bias = nn.Parameter(bias.detach().clone())
    head.out_features = len(weight)
    if isinstance(getattr(network.net, "num_classes", None), int):
        network.net.num_classes = len(weight)
    return network


def _merged(bank: AdapterBank, sets: Sequence[str]) -> Backbone:
    """A copy of the bank's network whose weights hold what these sets of adapters add.

    A linear layer with adapters at its output is an affine map for most kinds; its matrix is what
    it makes of the unit vectors. Others answer drawn vectors in another way than that matrix.
    """
    network = deepcopy(bank.backbone)
    points = {point: one for name in sets for point, one in bank.adapters(name).items()}
    with evaluating(bank.backbone), evaluating(bank), bank.using(dict.fromkeys(sets, 1.0)):
        for point, adapter in points.items():
            path, _, kind = point.rpartition(":")
            layer, copied = (n.net.get_submodule(path) for n in (bank.backbone, network))
            if isinstance(adapter, FiLM) and isinstance(layer, nn.BatchNorm2d):
                copied.weight = nn.Parameter(adapter.gamma * layer.weight)
                copied.bias = nn.Parameter(adapter.gamma * layer.bias + adapter.beta)
            elif kind == "out" and isinstance(layer, nn.Linear):
                draws = torch.Generator().manual_seed(0)
                x = torch.randn(1, 32, layer.in_features, generator=draws).to(layer.weight)
                out = layer(x)  # `copied` still has the hooks
                change = (out - F.linear(x, layer.weight, layer.bias)).norm()
                _put_map(copied, layer, layer.weight)
                off = (out - F.linear(x, copied.weight, copied.bias)).norm()
                if off > 0.01 * change + 2e-6 * out.norm():
                    raise _Refused(
                        f"that of a network with adapters at {point} whose updates differ between "
                        "tokens"
                    )
            else:
                raise _Refused(
                    f"that of a network with adapters at {point}, which are no change of the "
                    "weights of a linear layer"
                )
    return network


def _put_map(copied: Any, layer: nn.Linear, like: Tensor) -> None:
    """Give the linear layer `copied` the affine map that `layer` is with its adapters."""
    units = torch.eye(layer.in_features, device=like.device, dtype=like.dtype)
    shift, *rows = layer(torch.cat([torch.zeros_like(units[:1]), units])[None])[0]
    copied.weight = nn.Parameter((torch.stack(rows) - shift).T.contiguous())
    if copied.bias is not None:
        copied.bias = nn.Parameter(shift.clone())
    elif shift.any():
        raise _Refused("that of a linear layer with a bias, which this network lacks")


def _with_batch_norms(network: Backbone) -> Backbone:
    """Layers that took the place of batch normalisation and, evaluated, compute the same."""
    for name, layer in list(network.net.named_modules()):
        if isinstance(layer, RobustBatchNorm):
            mean, var = layer.mean, layer.var
        elif isinstance(layer, BalancedNorm):
            mean, var = cast(Tensor, layer.running_mean), cast(Tensor, layer.running_var)
        else:
            continue
        new = nn.BatchNorm2d(len(mean), layer.eps, affine=layer.weight is not None)
        new.to(mean.device)
        new.weight, new.bias, new.running_mean, new.running_var = (
            layer.weight, layer.bias, mean, var
        )  # fmt: skip
        path, _, key = name.rpartition(".")
        parent = network.net.get_submodule(path)
        setattr(parent, key, new)
        # timm's layers with an activation of their own became norm, drop, activation
        if isinstance(parent, nn.Sequential) and len(parent) == 3 and key == "0":
            parent.register_state_dict_post_hook(_as_one_layer)
    return network


def _as_one_layer(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    for name in [n for n in state if n.startswith(f"{prefix}0.")]:
        state[prefix + name.removeprefix(f"{prefix}0.")] = state.pop(name)


def _fix_statistics(network: Backbone, images: Tensor) -> None:
    """Let layers with statistics of the batch run on with those of these images."""
    layers = batch_norms(network.net)
    used: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str, layer: Any, x: Tensor) -> None:
        if layer.running_mean is not None and layer.running_var is not None:
            used[name] = layer.running_mean.clone(), layer.running_var.clone()
        else:
            var, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
            used[name] = mean, var

    def noting(name: str) -> Any:
        return lambda layer, inputs: note(name, layer, inputs[0])

    hooks = [layer.register_forward_pre_hook(noting(n)) for n, layer in layers.items()]
    network.logits(images)
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        if name in used:
            layer.running_mean, layer.running_var = used[name]
        elif layer.running_mean is None:  # of an auxiliary head, which gives no answer
            layer.running_mean = images.new_zeros(layer.num_features)
            layer.running_var = images.new_ones(layer.num_features)
        layer.track_running_stats = True
        if layer.num_batches_tracked is None:
            layer.num_batches_tracked = torch.tensor(0, device=images.device)


def _remove_hooks(network: Backbone) -> None:
    """Hooks of the method, and forwards that it has put in place of a module's own."""
    for module in network.modules():
        for hooks in (
            module._forward_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_hooks_always_called,
            module._forward_pre_hooks,
            module._forward_pre_hooks_with_kwargs,
        ):
            hooks.clear()
        vars(module).pop("forward", None)
