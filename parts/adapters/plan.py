"""Which adapters sit where: the option `adapter` of every method that has adapters (conf/adapter/).

    plan = Plan(at=["blocks.*.attn.qkv:out"], blocks=None, kind=partial(LoRA, rank=8))
    bank = plan.bank(backbone)
    plan.add(bank, "task0", generator)    # the parameters of a new set

A kind is a class of its own file. Of its arguments, `POINT` are known at each point; the others are
the settings of its YAML. One with the argument `modules` (point -> module) makes the whole set.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from typing import Annotated, Any, cast

import torch
from annotated_types import MinLen
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError
from driftline.core.ranges import Count, CountOrZero, Later
from driftline.core.stream import Batch, Task
from driftline.parts.adapters import starts
from driftline.parts.adapters.adapter import Adapter, AdapterSet
from driftline.parts.adapters.bank import AdapterBank, no_place
from driftline.parts.adapters.lora import LoRA
from driftline.parts.adapters.starts import CALIBRATED, Start

# Known at a point: input and output width, the module itself; of a set: its modules by point, and
# what initial values are drawn from.
POINT = ("dim", "out", "module", "modules", "generator")
Kind = Annotated[Callable[..., Adapter | AdapterSet], Later(POINT)]


def matches(name: str, pattern: str) -> bool:
    """Whether every part of a dotted `name` fits that of `pattern`; `*` does not cross a dot."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One kind of adapter at every point that matches.

    Args:
        at: points as patterns, `blocks.*.mlp:parallel`; see `parts/adapters/adapter.py`.
        blocks: that carry one: so many from the first on (fewer if the network has fewer), or
            their numbers; None: all.
        kind: makes one adapter (or a set) from those arguments of `POINT` that it has.
        start: where LoRA begins, see `parts/adapters/starts.py`; None: at a random A and B = 0.
            `saft`, `lori`: which numbers the kinds of `adapter=neuroada` and `lori` change.
        start_batches: training batches that a start reads which is computed from images.
    """

    at: Annotated[list[str], MinLen(1)]
    blocks: Count | Annotated[list[CountOrZero], MinLen(1)] | None
    kind: Kind
    start: Start | None = None
    start_batches: Count = 8

    def bank(self, backbone: Backbone, *, calibrates: bool = False) -> AdapterBank:
        """An empty bank on `backbone`; of named `blocks`, those of a deeper network are left out
        with a warning.

        Args:
            calibrates: the method calls `calibrate`.

        Raises:
            UserError: for a network that lacks one of the points, or all of the named blocks, a
                start that is computed from images in a method that does not calibrate, or
                `start_batches` without such a start.
        """
        if self.start not in CALIBRATED and self.start_batches != Plan.start_batches:
            raise UserError(
                f"strategy.adapter.start_batches={self.start_batches} would do nothing: "
                f"strategy.adapter.start={'null' if self.start is None else self.start} reads no "
                "images; leave it out"
            )
        if self.start in CALIBRATED and not calibrates:
            others = {"saft": "adapter=neuroada", "lori": "adapter=lori"}
            other = others.get(self.start, "start=pissa or orthonormal")
            raise UserError(
                f"strategy.adapter.start={self.start} is computed from images before the training, "
                f"which this method does not do: use {other}, or one of "
                "strategy=finetune, ease, lae, aper"
            )
        bank = AdapterBank(backbone)
        points = self.points(backbone)
        for point, _ in points:
            bank.check(point)
        depth = len(getattr(backbone.net, "blocks", ()))
        if isinstance(self.blocks, list) and max(self.blocks) >= depth > 0:
            text = f"blocks={self.blocks}: {backbone.tag} has the blocks 0 to {depth - 1}"
            if not points:
                raise UserError(f"strategy.adapter.{text}; name some of them")
            warnings.warn(f"strategy.adapter.{text}; the others get no adapter", stacklevel=2)
        return bank

    def add(
        self, bank: AdapterBank, name: str, generator: torch.Generator | None = None
    ) -> list[nn.Parameter]:
        """A set of new adapters under `name`; returns its parameters."""
        return bank.add(name, self.adapters(bank.backbone, generator))

    def adapters(
        self, backbone: Backbone, generator: torch.Generator | None = None
    ) -> dict[str, Adapter]:
        """New adapters by point, in the order of `points`.

        Raises:
            UserError: for a kind that changes a linear layer, at another module, or `parts` of a
                qkv layer at any other.
        """
        wanted = inspect.signature(self.kind, eval_str=True).parameters
        new: dict[str, Any] = {}
        if "modules" in wanted:
            facts = {"modules": dict(self.points(backbone)), "generator": generator}
            new |= cast(AdapterSet, self.kind(**{k: v for k, v in facts.items() if k in wanted}))
            self._prepare(new, facts["modules"])
            return new
        for point, module in self.points(backbone):
            dim = out = backbone.width
            if isinstance(module, nn.Linear):
                dim = module.in_features
                # What is added before a layer is as wide as what the layer reads.
                out = dim if point.endswith(":in") else module.out_features
            elif "module" in wanted and wanted["module"].annotation is nn.Linear:
                raise UserError(
                    f"strategy.adapter.kind changes the weight of a linear layer, and {point} has "
                    "none: change strategy.adapter.at, for example ['blocks.*.attn.qkv:out']"
                )
            facts = {
                "dim": dim,
                "out": out,
                "module": module,
                "generator": generator,
            }
            new[point] = self.kind(**{k: v for k, v in facts.items() if k in wanted})
        self._prepare(new, dict(self.points(backbone)))
        return new

    def _prepare(self, adapters: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> None:
        """New adapters by point, before a set is made of them."""
        for point, adapter in adapters.items():
            if isinstance(adapter, LoRA) and adapter.rows != ((0, adapter.out),):
                _check_fused(point, modules[point])
            starts.prepare(self.start, point, adapter, modules[point])

    def calibrate(
        self, bank: AdapterBank, name: str, task: Task, loss: Callable[[Batch], Tensor]
    ) -> None:
        """Compute the start of a new set from the first training batches of `task`, where it is
        one that needs them; to be called once, before the set is trained.

        Args:
            loss: of a batch through this set, 0-dim.

        Raises:
            UserError: as `starts.calibrate`.
        """
        if self.start in CALIBRATED:
            batches = (batch for batch in task.train(0) if batch is not None)
            starts.calibrate(bank, name, self.start, islice(batches, self.start_batches), loss)

    def points(self, backbone: Backbone) -> list[tuple[str, nn.Module]]:
        """Points with their modules: those outside the blocks, then block by block.

        Raises:
            UserError: for a pattern without a match or that names no kind of point.
        """
        rows = []
        for order, pattern in enumerate(self.at):
            path, colon, where = pattern.rpartition(":")
            if not colon:
                raise UserError(
                    f"strategy.adapter.at={pattern}: a point is <module>:<kind>, for example "
                    f"'{pattern}:out'"
                )
            named = [(n, m) for n, m in backbone.net.named_modules() if matches(n, path)]
            if not named:
                raise no_place(backbone, pattern, "no module has such a name")
            rows += [(_block(name), order, f"{name}:{where}", m) for name, m in named]
        rows.sort(key=lambda row: row[:2])
        return [(point, module) for block, _, point, module in rows if self._carries(block)]

    def _carries(self, block: int) -> bool:
        if self.blocks is None or block < 0:
            return True
        return block in self.blocks if isinstance(self.blocks, list) else block < self.blocks


def _check_fused(point: str, module: nn.Module) -> None:
    """Whether a module has the rows of queries, keys and values, by its name or its widths.

    Raises:
        UserError: if not.
    """
    fused = isinstance(module, nn.Linear) and module.out_features == 3 * module.in_features
    if not (fused or point.endswith(".qkv:out")):
        raise UserError(
            f"strategy.adapter.kind.parts names parts of a qkv layer, and {point} has none: set it "
            "to null, or change strategy.adapter.at"
        )


def _block(name: str) -> int:
    """The number of the block that a module lies in; -1 outside of all."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" and len(parts) > 1 else -1
