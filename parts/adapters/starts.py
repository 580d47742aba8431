"""Where low-rank updates begin: the option `start` of a plan, at outputs of linear layers.

    plan = Plan(at=["blocks.*.attn.qkv:out"], blocks=None, kind=partial(LoRA, rank=8), start="eva")
    bank = plan.bank(backbone, calibrates=True)
    plan.add(bank, "task0", generator)
    plan.calibrate(bank, "task0", task, loss)  # before its training, for starts that read images

LoRA begins with a random A and B = 0. A start sets both from the layer's weight W, from what the
layer reads, or from the gradient G of the loss with respect to W. Where B A is then not 0, the
papers subtract s B A from W. Here W stays bitwise what it was and the update is s (B A - B0 A0)
instead, which is exactly 0 at the start (`LoRA.begin`). With several row blocks (`parts`) each is
a weight of its own. One exception: LoRA-One is meant to add its B A, the first step of training.

| start         | reads                  | A                         | B                     |
|---------------|------------------------|---------------------------|-----------------------|
| `pissa`       | W / s = U S V^T        | first r of S^1/2 V^T      | first r of U S^1/2    |
| `orthonormal` | W = Q R                | first r rows of R         | first r columns of Q  |
| `eva`         | covariance of inputs   | first r eigenvectors      | 0                     |
| `corda`       | W C = U S V^T          | first r of S'^1/2 V^T C^-1| first r of U S'^1/2   |
| `lora_ga`     | G = U S V^T            | c V[:, :r]^T              | c U[:, r:2r]          |
| `lora_one`    | -G = U S V^T           | first r of S'^1/2 V^T     | first r of U S'^1/2   |

C is the second moment of the inputs; S' is S / s in `corda` and S / (128 S_1) in `lora_one`.

`saft` and `lori` set no factors: of a kind that changes some entries of a weight (`sparse.py`), or
some numbers of B (`lori.py`), they say which, from G.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from driftline.core import distributed
from driftline.core.errors import UserError
from driftline.core.stream import Batch
from driftline.parts.adapters.bank import AdapterBank
from driftline.parts.adapters.lora import LoRA
from driftline.parts.adapters.lori import LoRI
from driftline.parts.adapters.sparse import SparseWeight
from driftline.parts.modes import evaluation_mode

Start = Literal["pissa", "orthonormal", "eva", "corda", "lora_ga", "lora_one", "saft", "lori"]
CHOOSING = {"saft": SparseWeight, "lori": LoRI}  # and the kind that each is for
GRADIENT = ("lora_ga", "lora_one", *CHOOSING)
CALIBRATED = ("eva", "corda", *GRADIENT)  # read images
KEPT = ("pissa", "orthonormal", "corda", "lora_ga")  # B0 A0 is kept and taken off
Pair = tuple[Tensor, Tensor]  # A [r, d_in], B [d_out, r]


def pissa(weight: Tensor, rank: int, scale: float) -> Pair:
    """The largest singular triplets of the weight.

    Source: Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
    Language Models", NeurIPS 2024, arXiv 2404.02948, section 3. The exact decomposition, not the
    paper's fast one. Checked against the peft library.
    """
    u, s, vh = torch.linalg.svd(weight / scale, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def orthonormal(weight: Tensor, rank: int) -> Pair:
    """The first columns and rows of the QR decomposition of the weight.

    Source: Bueyuekakyuez, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024,
    arXiv 2406.01775 (not the method `olora` of this project, O-LoRA). Checked against the peft
    library.
    """
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


def eva(covariance: Tensor, out: int, rank: int) -> Pair:
    """The directions in which the inputs vary most; B is 0.

    Source: Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation",
    2024, arXiv 2410.07170, with the same rank in every layer (its rho = 1). The exact decomposition
    of the calibration inputs where the paper's is incremental. Checked against the peft library.

    Args:
        covariance: [d_in, d_in], of the inputs about their mean.
        out: d_out.
    """
    vectors = torch.linalg.eigh(covariance).eigenvectors  # ascending
    return vectors[:, -rank:].flip(1).T, covariance.new_zeros(out, rank)


def corda(weight: Tensor, moment: Tensor, rank: int, scale: float) -> Pair:
    """The largest singular triplets of the weight times the second moment C of its inputs.

    Source: Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models
    for Task-Aware Parameter-Efficient Fine-tuning", NeurIPS 2024, arXiv 2406.05223, in its mode for
    the new task (instruction-previewed). As in the peft library, against which it is checked: a
    hundredth of C's mean diagonal is added to its diagonal, twice that where the inverse is bad.

    Args:
        moment: C [d_in, d_in], a mean over images that are divided by their largest value.
    """
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    for doubled in range(32):
        whole = moment + 0.01 * 2**doubled * moment.diagonal().mean() * eye
        inverse = torch.linalg.inv(whole)
        if torch.dist(whole @ inverse, eye) < 0.05:
            break
    u, s, vh = torch.linalg.svd(weight @ whole, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * (vh[:rank] @ inverse), u[:, :rank] * root


def lora_ga(gradient: Tensor, rank: int) -> Pair:
    """Singular vectors of the gradient, so that the first step is near that of the full weight.

    Source: Wang et al., "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", NeurIPS 2024,
    arXiv 2407.05000, section 3; Outsider565/LoRA-GA, `scale=stable` with its gamma of 16, so that
    c = d_out^1/4 / 4, in A and B alike. Checked by the formula; the peft library has the same
    vectors, but multiplies B alone, and by singular values too.
    """
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    factor = len(gradient) ** 0.25 / 16**0.5
    return factor * vh[:rank], factor * u[:, rank : 2 * rank]


def lora_one(gradient: Tensor, rank: int) -> Pair:
    """The best low-rank step of full training, which is taken: this start is not the identity.

    Source: Zhang et al., "LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large
    Language Models, Provably and Efficiently", ICML 2025, arXiv 2502.01235; YuanheZ/LoRA-One
    01bba05, `run_exp.py`, with its g = 128 and without preconditioners. Checked by the formula.
    """
    u, s, vh = torch.linalg.svd(-gradient, full_matrices=False)
    root = (s[:rank] / s[0] / 128).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


# ------------------------------------------------------------------------------ in a plan


def prepare(start: Start | None, point: str, adapter: Any, module: nn.Module) -> None:
    """A new adapter of a plan with this start, as far as that needs no images.

    Raises:
        UserError: for another kind than the start is for, another place than the output of a linear
            layer, a rank that the layer does not have, or a share of LoRI without its start.
    """
    setting = f"strategy.adapter.start={start}"
    kind = type(adapter).__name__
    if isinstance(adapter, LoRI) and (start == "lori") != (adapter.share is not None):
        raise UserError(
            "LoRI with a mask needs both strategy.adapter.start=lori and "
            "strategy.adapter.kind.share (adapter=lori_s has them); without one, leave out both"
        )
    if start is None:
        return
    if start in CHOOSING and not isinstance(adapter, CHOOSING[start]):
        text = (
            f"{setting} chooses what {CHOOSING[start].__name__} changes, and this is {kind}: use "
        )
        raise UserError(text + f"adapter={'saft' if start == 'saft' else 'lori_s'}")
    if start not in CHOOSING and type(adapter) is not LoRA:
        raise UserError(f"{setting} sets the factors of LoRA, not of {kind}: use adapter=lora")
    if not (point.endswith(":out") and isinstance(module, nn.Linear)):
        raise UserError(
            f"{setting} reads the weight of a linear layer, and {point} is no output of one: use "
            "strategy.adapter.at=['blocks.*.attn.qkv:out']"
        )
    if start in CHOOSING:
        return
    rank = len(adapter.a[0]) * (2 if start == "lora_ga" else 1)
    limit = min(min(len(b), module.in_features) for b in adapter.b)
    if rank > limit:
        raise UserError(
            f"{setting} needs {rank} singular vectors and the layer at {point} has {limit}: lower "
            "strategy.adapter.kind.rank"
        )
    if adapter.scale == 0:
        raise UserError(f"{setting} needs strategy.adapter.kind.scale above 0")
    if start in CALIBRATED:
        if start in KEPT:  # the structure of the state, with values that add 0
            adapter.begin(list(zip(adapter.a, adapter.b, strict=True)), kept=True)
        return
    _begin(start, adapter, module, {})


@torch.no_grad()
def _begin(start: Start, adapter: LoRA, module: nn.Linear, facts: Mapping[str, Tensor]) -> None:
    """Set the factors of all row blocks.

    Args:
        facts: of the calibration: `covariance`, `moment` or `gradient`.
    """
    rank, scale = len(adapter.a[0]), 1.0 if adapter.scale is None else adapter.scale
    pairs = []
    for first, last in adapter.rows:
        weight = module.weight[first:last].to(adapter.a[0].dtype)
        if start == "pissa":
            pairs.append(pissa(weight, rank, scale))
        elif start == "orthonormal":
            pairs.append(orthonormal(weight, rank))
        elif start == "eva":
            pairs.append(eva(facts["covariance"], last - first, rank))
        elif start == "corda":
            pairs.append(corda(weight.to(facts["moment"]), facts["moment"], rank, scale))
        elif start == "lora_ga":
            pairs.append(lora_ga(facts["gradient"][first:last], rank))
        else:
            pairs.append(lora_one(facts["gradient"][first:last], rank))
    adapter.begin(pairs, kept=start in KEPT)


def calibrate(
    bank: AdapterBank,
    name: str,
    start: Start,
    batches: Iterable[Batch],
    loss: Callable[[Batch], Tensor],
) -> None:
    """Set the factors (or entries) of a set that is the identity from images; weights and gradients
    of the network stay what they were.

    Args:
        batches: of training images.
        loss: of a batch on the network's device through this set, 0-dim; of gradient starts alone.

    Raises:
        UserError: without images, or where the gradient of a layer is 0 or not finite.
    """
    adapters: dict[str, Any] = bank.adapters(name)
    modules: dict[str, Any] = {
        p: bank.backbone.net.get_submodule(p.rpartition(":")[0]) for p in adapters
    }
    with evaluation_mode(bank.backbone):
        if start in GRADIENT:
            facts = _gradients(modules, start, batches, loss)
        else:
            facts = _inputs(bank, name, modules, start, batches)
    for point, adapter in adapters.items():
        if start in CHOOSING:
            adapter.choose(facts[point]["gradient"])
        else:
            _begin(start, adapter, modules[point], facts[point])


@torch.no_grad()
def _inputs(
    bank: AdapterBank,
    name: str,
    modules: Mapping[str, nn.Linear],
    start: Start,
    batches: Iterable[Batch],
) -> dict[str, dict[str, Tensor]]:
    """By point the covariance of the rows that a layer reads (`eva`), or the second moment of an
    image (`corda`), float64."""
    sums: dict[str, list[Tensor]] = {}

    def add(point: str, x: Tensor) -> None:
        x, images = x.detach().float() if x.dtype != torch.float64 else x.detach(), len(x)
        if start == "corda":
            x = x / x.flatten(1).amax(1).abs().clamp_min(1e-12).view(-1, *[1] * (x.ndim - 1))
        rows = x.flatten(0, -2)
        count = images if start == "corda" else len(rows)
        new = [(rows.T @ rows).double(), rows.double().sum(0), rows.new_tensor(float(count))]
        new = [distributed.sum_of_shares(t) for t in new]
        old = sums.get(point)
        sums[point] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]

    hooks = [
        module.register_forward_pre_hook(lambda _, args, point=point: add(point, args[0]))
        for point, module in modules.items()
    ]
    try:
        device = next(bank.backbone.parameters()).device
        for batch in batches:
            bank.features(batch.to(device).x, name)
    finally:
        for hook in hooks:
            hook.remove()
    if not sums:
        raise _no_images(start)
    facts = {}
    for point, (products, total, count) in sums.items():
        mean = total / count
        covariance = products / count - torch.outer(mean, mean)
        facts[point] = {"covariance": covariance, "moment": products / count}
    return facts


def _gradients(
    modules: Mapping[str, nn.Linear],
    start: Start,
    batches: Iterable[Batch],
    loss: Callable[[Batch], Tensor],
) -> dict[str, dict[str, Tensor]]:
    """By point the gradient of the weight, a mean over batches; no `.grad` is touched."""
    weights = [module.weight for module in modules.values()]
    learned = [w.requires_grad for w in weights]
    total, count = [torch.zeros_like(w) for w in weights], 0
    try:
        for w in weights:
            w.requires_grad_(True)
        for batch in batches:
            with torch.enable_grad():
                value = loss(batch.to(weights[0].device))
                torch._foreach_add_(total, list(torch.autograd.grad(value, weights)))
            count += 1
    finally:
        for w, learns in zip(weights, learned, strict=True):
            w.requires_grad_(learns)
    if not count:
        raise _no_images(start)
    distributed.average(total)
    for point, gradient in zip(modules, total, strict=True):
        if not gradient.isfinite().all() or not gradient.any():
            raise UserError(
                f"strategy.adapter.start={start}: the gradient of the loss at {point} is 0 or not "
                "finite; take tasks of several classes (scenario.increment), or another start"
            )
    return {p: {"gradient": g / count} for p, g in zip(modules, total, strict=True)}


def _no_images(start: Start) -> UserError:
    return UserError(f"strategy.adapter.start={start} reads training images, and there are none")
