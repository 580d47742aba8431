"""What the tasks of a continual method have learned is merged into one set at the end of each task.

Instead of growing, or of going on from the last task: after the last step of task t the rule takes
the task vector `v_t = theta_t - theta_0` of everything that optimisers move except the head (the
adapters, or the whole network where none is chosen), merges it with those of the tasks before, and
sets `theta = theta_0 + merged`. Only then does the method end its task, so class means, Fisher
information, teachers and alignment of heads are those of the merged network that answers. theta_0
is what was there when the first task began. Rules and sources: `parts/merging.py`.

Kept beside the method: theta_0, and of the tasks so far one set with `mean`, `task_arithmetic`,
`magmax` and `opcm`, one set a task with the others; `start=last` keeps one more. `report` counts
them.

Ours: low-rank adapters are merged factor by factor, as in the peft library, not as products; heads
are the method's own; buffers (BatchNorm statistics) are the present ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from driftline.core.errors import UserError
from driftline.core.ranges import Below1, Share, Unit
from driftline.core.strategy import CLStrategy, TaskWrapper, optimizers
from driftline.core.stream import Task
from driftline.parts import merging
from driftline.parts.merging import STEPS, Running
from driftline.parts.store import Store

Rule = Literal[
    "mean",
    "task_arithmetic",
    "ties",
    "dare",
    "dare_mean",
    "dare_ties",
    "breadcrumbs",
    "magmax",
    "opcm",
]
assert set(get_args(Rule)) == set(merging.RULES)


class Merge(TaskWrapper):
    """Answers, between tasks, with the merged weights; trains what is inside.

    Args:
        inner: the method inside.
        rule: of `parts/merging.py`.
        start: where the next task begins to train: `first`: at theta_0, as models that were trained
            apart; `merged`: at what answers; `last`: where the task before ended.
        density, scale, alpha, outliers: of the rule; None: its own value.

    Raises:
        UserError: for a method whose tasks share no weights, or a setting that the rule has not.
    """

    def __init__(
        self,
        *,
        inner: CLStrategy,
        rule: Rule,
        start: Literal["first", "merged", "last"],
        density: Share | None,
        scale: float | None,
        alpha: Unit | None,
        outliers: Below1 | None,
    ) -> None:
        super().__init__(inner)
        if inner.unmergeable:
            raise UserError(
                f"around=merge: {type(inner).__name__} has nothing to merge between tasks: "
                f"{inner.unmergeable}; leave around out, or take strategy=finetune adapter=lora"
            )
        self.rule, self.start = rule, start
        given = {"density": density, "scale": scale, "alpha": alpha, "outliers": outliers}
        self.options = merging.defaults(rule)
        for name, value in given.items():
            if value is not None and name not in self.options:
                has = ", ".join(n for n in given if n in self.options) or "none of these settings"
                raise UserError(
                    f"around.merge.{name}={value} would do nothing: rule={rule} has {has}"
                )
            if value is not None:
                self.options[name] = value
        self.base, self.kept, self.last = Store(), Store(), Store()
        self.count, self.norms, self.factor = 0, 0.0, 1.0

    @classmethod
    def takes_seed(cls, options: Mapping[str, Any]) -> bool:
        return str(options["rule"]).startswith("dare")

    def get_extra_state(self) -> dict[str, float]:
        return {"count": self.count, "norms": self.norms, "factor": self.factor}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.count, self.norms, self.factor = state["count"], state["norms"], state["factor"]

    def report(self) -> dict[str, float]:
        """Sets that are kept beside the method's own, and their bytes."""
        stores = (self.base, self.kept, self.last)
        held = [t for s in stores for t in s.buffers() if t.numel()]
        one = max(1, sum(t.numel() > 0 for t in self.base.buffers()))
        size = sum(t.numel() * t.element_size() for t in held)
        return super().report() | {"merge_sets": len(held) // one, "merge_bytes": size}

    # ------------------------------------------------------------------ tasks

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if not self._tensors():
            for name, p in self._learned().items():
                self.base.put(name, p.detach().clone())
        elif self.start != "merged":
            source = self.base if self.start == "first" else self.last
            self._set({name: source[name] for name in self._tensors()})

    def end_task(self, task: Task) -> None:
        self._merge()
        super().end_task(task)

    def _learned(self) -> dict[str, nn.Parameter]:
        """What optimisers move now, by name, without heads."""
        groups = [g for o in optimizers(self.inner) for g in o.param_groups]
        body = [g for g in groups if str(g.get("name", "")).rstrip("+") != "head"]
        moved = {id(p) for g in body for p in g["params"]}
        return {name: p for name, p in self.inner.named_parameters() if id(p) in moved}

    def _tensors(self) -> dict[str, Tensor]:
        """What is merged, by name."""
        named = self.inner.named_parameters()
        return {name: p.detach() for name, p in named if name in self.base}

    def _set(self, values: Mapping[str, Tensor]) -> None:
        """Copied, so that what is kept of weights (`kernels/dora.py`) is made again."""
        for name, p in self._tensors().items():
            p.copy_(values[name])

    @torch.no_grad()
    def _merge(self) -> None:
        now = {name: p.clone() for name, p in self._tensors().items()}
        base = {name: self.base[name] for name in now}
        (vector,) = merging.differences([now], base)
        if self.rule in STEPS:
            before = None
            if self.count:
                kept = {name: self.kept[name] for name in now}
                before = Running(kept, self.count, self.norms, self.factor)
            state = merging.step(self.rule, before, vector, **self.options)
            self.norms, self.factor = state.norms, state.factor
            merged = merging.finish(self.rule, state, **self.options)
            for name, value in state.merged.items():
                self.kept.put(name, value.clone())
        else:
            for name, value in vector.items():
                self.kept.put(f"{self.count}.{name}", value)
            sets = [{n: self.kept[f"{i}.{n}"] for n in now} for i in range(self.count + 1)]
            seed = {}
            if self.takes_seed({"rule": self.rule}):
                seed = {"seed": int(torch.randint(2**31, (), generator=self.rng("masks")))}
            merged = merging.RULES[self.rule](sets, **self.options, **seed)
        self.count += 1
        if self.start == "last":
            for name, value in now.items():
                self.last.put(name, value)
        self._set(merging.added(base, merged))
