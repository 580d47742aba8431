"""One run in several processes (torchrun): the images of a pass are shared, the rest is repeated.

Every process holds the whole method, reads the same batches and draws the same random numbers.
What is divided is a pass through the backbone: each process computes a contiguous share of the
images, and the features of all are put together in the order of the batch. Whatever a method does
with them (loss, class means, choice of an adapter) happens everywhere on the whole batch, so a
loss that couples its images, an uneven last batch and a penalty need no special care.

Gradients follow from that. The backward of putting together hands each process the gradient of
its own rows, times the number of processes, and before every optimiser step gradients are averaged
over the processes. Below the features this is the sum over the shares. Above them, where all
processes have the same gradient, it changes nothing.

Without torchrun every function here does nothing, and the methods are not aware of it.
"""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import register_optimizer_step_pre_hook

from driftline.core.errors import UserError
from driftline.core.torchrun import requested, speaks

P = ParamSpec("P")
T = TypeVar("T")
PATIENCE = timedelta(minutes=10)  # how long a process waits for the others
RANDOM = {  # layer -> its rate
    "Dropout": "p",
    "Dropout2d": "p",
    "DropPath": "drop_prob",
    "PatchDropout": "prob",
    "StochasticDepth": "p",
}


@dataclass(frozen=True)
class World:
    """The processes of this run."""

    rank: int
    size: int
    store: Any  # seen by all of them, also by those that are about to end


@dataclass(frozen=True)
class Part:
    """The images of a pass that this process computes."""

    start: int
    counts: tuple[int, ...]  # images of each process
    own: int
    whole: int

    def of(self, x: Tensor, dim: int = 0) -> Tensor:
        """The own rows of `x`, which has one or several consecutive rows an image."""
        rows = x.shape[dim] // self.whole
        return x.narrow(dim, rows * self.start, rows * self.own)


_world: World | None = None
_part: Part | None = None  # inside a divided pass


class Lost(UserError):
    """Another process of the run is gone."""


# ------------------------------------------------------------------------------ processes


def own_device(name: str) -> torch.device:
    """The device of this process when `runtime.device=name` stands for one GPU each.

    Raises:
        UserError: if the processes would share a GPU.
    """
    device = torch.device(name)
    if requested() == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise UserError(
            f"runtime.device={name} would put all processes on one GPU: set runtime.device=cuda"
        )
    wanted, there = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if wanted > there:
        raise UserError(
            f"torchrun starts {wanted} processes on this machine, which has {there} GPUs: lower "
            "--nproc-per-node, or set runtime.device=cpu"
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def join(device: torch.device) -> None:
    """Meet the other processes of this run, once; nothing without torchrun.

    Raises:
        UserError: if the environment is not that of torchrun, or the others do not come.
    """
    global _world
    if requested() == 1 or _world is not None:
        return
    import torch.distributed as dist

    missing = [k for k in ("MASTER_ADDR", "MASTER_PORT") if k not in os.environ]
    if missing:
        raise UserError(
            f"RANK and WORLD_SIZE are set, but not {' and '.join(missing)}: start the run with "
            "torchrun, or unset them for a run in one process"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except RuntimeError as error:
        raise UserError(
            f"the {requested()} processes of this run did not meet at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {error}"
        ) from error
    rank = dist.get_rank()
    _world = World(rank, dist.get_world_size(), dist.distributed_c10d._get_default_store())
    register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: average_gradients(optimizer))
    if rank:
        warnings.simplefilter("ignore")  # the first process says it


def leave() -> None:
    """The run has ended well: wait for the others and part."""
    global _world
    if _world is not None:
        import torch.distributed as dist

        all_reduce_max(0)
        dist.destroy_process_group()
        _world = None


def size() -> int:
    """Processes of this run."""
    return 1 if _world is None else _world.size


def rank0() -> bool:
    """Whether this process owns records, checkpoint, console and lock."""
    return _world is None or _world.rank == 0


def is_news(error: BaseException) -> bool:
    """Whether this process is the first of the run to fail, and so the one to say why."""
    if _world is None:
        return speaks()
    try:
        if _world.store.add("failed", 1) > 1:
            return False
        _world.store.set("failure", "".join(traceback.format_exception(error)))
    except RuntimeError:  # the store went with the process that kept it
        return False
    return True


def cause(error: BaseException) -> BaseException:
    """`error`, or what another process failed of before."""
    if _world is None or not isinstance(error, Lost):
        return error
    try:
        known = _world.store.check(["failure"])
        text = _world.store.get("failure").decode() if known else ""
    except RuntimeError:
        return error
    return RuntimeError(f"another process failed:\n{text}") if text else error


# ------------------------------------------------------------------------------ agreement


@contextmanager
def _together() -> Iterator[None]:
    """Around an exchange with the other processes.

    Raises:
        Lost: if one of them is gone.
    """
    try:
        yield
    except RuntimeError as error:
        raise Lost(
            "another process of this run has ended, or did not answer for "
            f"{PATIENCE.seconds // 60} minutes. The same command goes on from the last checkpoint"
        ) from error


def from_rank0(call: Callable[[], T]) -> T:
    """What `call` returns in the first process; the others do not call it."""
    if _world is None:
        return call()
    import torch.distributed as dist

    box = [call() if _world.rank == 0 else None]
    with _together():
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]  # type: ignore[return-value]


def all_reduce_max(*values: int) -> list[int]:
    """The largest of each value over the processes."""
    if _world is None:
        return list(values)
    import torch.distributed as dist

    maxima = torch.tensor(values, dtype=torch.int64)
    with _together():
        dist.all_reduce(maxima, dist.ReduceOp.MAX)
    return maxima.tolist()


def require_equal(parameters: Iterable[Tensor], what: str) -> None:
    """Check that all processes hold the same bits.

    Args:
        what: names the method and the moment, for the message.

    Raises:
        UserError: if not, which a method causes that reads gradients before they are averaged.
    """
    if _world is None:
        return
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [int(p.detach().reshape(-1).view(integers[p.element_size()]).sum()) for p in parameters]
    bounds = all_reduce_max(*sums, *(-s for s in sums))
    if bounds[: len(sums)] != [-b for b in bounds[len(sums) :]]:
        raise UserError(
            f"the processes hold different parameters {what}: the method uses gradients between "
            "`backward` and `step`. Call core.distributed.average_gradients(optimizer) before "
            "that, or run it in one process"
        )


# ------------------------------------------------------------------------------ passes


def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Average what `optimizer` is about to use over the processes, in place.

    Called before every step by itself; a method calls it where it needs the gradients earlier,
    as for clipping. Averages are equal everywhere, so a second call changes nothing.
    """
    if _world is not None:
        groups = optimizer.param_groups
        average([p.grad for g in groups for p in g["params"] if p.grad is not None])


def average(gradients: list[Tensor]) -> None:
    """As `average_gradients`, of gradients that belong to no optimiser."""
    if _world is None or not gradients:
        return
    import torch.distributed as dist

    with _together():
        for work in [dist.all_reduce(g, async_op=True) for g in gradients]:
            work.wait()
    torch._foreach_div_(gradients, _world.size)


def shared(dim: int = 0) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Decorator of a backbone's or bank's pass: divide its images among the processes.

    All tensors among the positional arguments have one row an image and are divided. Each process
    gets the whole result. Fewer images than processes are computed by each.

    Args:
        dim: of the images in the result.
    """

    def decorate(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            if _world is None or _part is not None:
                return function(*args, **kwargs)
            return _divided(_world, function, dim, args, kwargs)

        return call

    return decorate


def _divided(
    world: World,
    function: Callable[..., Tensor],
    dim: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    global _part
    images = next(len(a) for a in args if isinstance(a, Tensor))
    if images < world.size:
        return function(*args, **kwargs)
    if torch.is_grad_enabled():
        _require_separable(getattr(args[0], "backbone", args[0]))
    counts = [images // world.size + (r < images % world.size) for r in range(world.size)]
    start = sum(counts[: world.rank])
    part = Part(start, tuple(counts), counts[world.rank], images)
    try:
        _part = part
        own = function(*(part.of(a) if isinstance(a, Tensor) else a for a in args), **kwargs)
    finally:
        _part = None
    return _Whole.apply(own, part, world.size, dim)  # type: ignore[return-value]


class _Whole(torch.autograd.Function):
    """Own rows -> rows of all processes; see the top of the file for the gradient."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, part: Part, size: int, dim: int) -> Tensor:
        import torch.distributed as dist

        ctx.part, ctx.size, ctx.dim = part, size, dim
        rows = own.movedim(dim, 0)
        padded = rows.new_zeros(max(part.counts), *rows.shape[1:])
        padded[: part.own] = rows
        gathered = [torch.empty_like(padded) for _ in part.counts]
        with _together():
            dist.all_gather(gathered, padded)
        whole = torch.cat([f[:n] for f, n in zip(gathered, part.counts, strict=True)])
        return whole.movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.part.of(grads[0], ctx.dim) * ctx.size, None, None, None


def _require_separable(net: nn.Module) -> None:
    """Refuse layers that would compute something else on a share of the batch.

    Raises:
        UserError: naming the layer.
    """
    for name, module in net.named_modules():
        if not module.training:
            continue
        if isinstance(module, _BatchNorm):
            raise UserError(
                f"under torchrun the layer {name} would use the statistics of a share of the "
                "batch. Keep the running ones (strategy.freeze_bn=true where there is such an "
                "option), choose a backbone without BatchNorm, or run in one process"
            )
        rate = RANDOM.get(type(module).__name__)
        if rate and getattr(module, rate):
            raise UserError(
                f"under torchrun the layer {name} ({type(module).__name__}) would draw other "
                "random numbers than in one process. Choose a backbone without it, or run in one "
                "process"
            )


def dropout(x: Tensor, rate: float, dim: int = 0) -> Tensor:
    """`F.dropout(x, rate)` with the draws that the images would get in a single process.

    Args:
        dim: of the images in `x`, which has one or several consecutive rows each.
    """
    if _part is None:
        return F.dropout(x, rate)
    shape = list(x.shape)
    shape[dim] = shape[dim] // _part.own * _part.whole
    return x * _part.of(F.dropout(x.new_ones(shape), rate), dim)


def own_rows(x: Tensor) -> Tensor:
    """Of `x` [B, ...], which belongs to all images of a pass, the rows of those computed here."""
    return x if _part is None else _part.of(x)


def full_batch_size(images: int) -> int:
    """Images that all processes compute while this one computes `images`."""
    return images if _part is None else images // _part.own * _part.whole


def sum_of_shares(x: Tensor) -> Tensor:
    """Sum of what the processes computed from their own images of a pass, without gradients."""
    if _part is None:
        return x
    import torch.distributed as dist

    total = x.contiguous().clone()
    with _together():
        dist.all_reduce(total)
    return total
