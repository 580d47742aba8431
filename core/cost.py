"""What a run costs: passes counted in images, seconds without loading, memory, parameters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from driftline.core.seed import derive
from driftline.core.strategy import Strategy, optimizers

KEPT = (
    "forward", "backward", "images", "steps", "evaluated", "evaluated_forward",
    "evaluated_backward", "evaluated_seconds", "end_seconds", "step_seconds", "durations",
    "estimated_forward", "estimated_seconds", "bytes_after_task", "recalled",
)  # fmt: skip
DURATIONS = 4096  # for the median; a long run shall not make every checkpoint longer


class Costs:
    """Passes and seconds of the learning steps, without data loading and without evaluation."""

    def __init__(self, backbone: Any, device: torch.device) -> None:
        self.passes = backbone.passes  # counts the images of every forward and backward
        self.device = device
        self.forward = self.backward = self.images = self.steps = 0
        # Test images answered, and the passes that took.
        self.evaluated = self.evaluated_forward = self.evaluated_backward = 0
        self.evaluated_seconds = self.end_seconds = 0.0
        self.estimated_forward, self.estimated_seconds = 0, 0.0  # beside the method
        self.recalled = 0  # images whose answer came from a feature store
        self._recalled = self.passes.recalled  # counted before, in this process
        self.seconds = 0.0  # of the last step
        self.step_seconds = 0.0  # of all steps
        self.durations: list[float] = []  # of steps, of all or of as many drawn at random
        self.bytes_after_task: list[int] = []  # kept for good, without moments of an optimiser

    @contextmanager
    def step(self, images: int) -> Iterator[None]:
        """Measure one step on `images` images; `seconds` then holds its duration."""
        forward, backward = self.passes.forward, self.passes.backward
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        self.seconds = time.perf_counter() - start
        self.step_seconds += self.seconds
        if len(self.durations) < DURATIONS:
            self.durations.append(self.seconds)
        elif (place := derive(0, "durations", self.steps) % (self.steps + 1)) < DURATIONS:
            self.durations[place] = self.seconds
        self.forward += self.passes.forward - forward
        self.backward += self.passes.backward - backward
        self.images += images
        self.steps += 1

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Measure scoring on test images, loading included; the caller adds to `evaluated`."""
        forward, backward = self.passes.forward, self.passes.backward
        start = time.perf_counter()
        yield
        self._synchronize()
        self.evaluated_seconds += time.perf_counter() - start
        self.evaluated_forward += self.passes.forward - forward
        self.evaluated_backward += self.passes.backward - backward

    @contextmanager
    def estimate(self) -> Iterator[None]:
        """Measure what estimates without labels take, which is no part of the method's cost."""
        forward = self.passes.forward
        start = time.perf_counter()
        yield
        self._synchronize()
        self.estimated_seconds += time.perf_counter() - start
        self.estimated_forward += self.passes.forward - forward

    @contextmanager
    def end_of_task(self) -> Iterator[None]:
        """Measure what a method does after the last epoch of a task."""
        start = time.perf_counter()
        yield
        self._synchronize()
        self.end_seconds += time.perf_counter() - start

    def note_recalled(self) -> None:
        """Add the images that were recalled since the last call."""
        self.recalled += self.passes.recalled - self._recalled
        self._recalled = self.passes.recalled

    def task_ended(self, strategy: Strategy) -> None:
        """Note what a method keeps for good after a task."""
        size = state_bytes(strategy, moments=False)
        self.bytes_after_task = [*self.bytes_after_task, size]

    def _synchronize(self) -> None:
        synchronize(self.device)

    def snapshot(self) -> dict[str, Any]:
        self.note_recalled()
        return {k: getattr(self, k) for k in KEPT}

    def restore(self, state: Mapping[str, Any]) -> None:
        state = dict(state)
        if (history := state.pop("history", None)) is not None:  # of earlier versions: every step
            state |= {"step_seconds": sum(history), "durations": history[:DURATIONS]}
        for key, value in state.items():
            setattr(self, key, value)
        self.durations = [*self.durations]

    def summary(self, strategy: Strategy) -> dict[str, float]:
        """The cost block of a summary; the median of the steps leaves out warm-up effects."""
        self.note_recalled()
        ordered = sorted(self.durations)
        images = max(1, self.images)
        return {
            "seconds_per_batch": ordered[len(ordered) // 2] if ordered else 0.0,
            "seconds_total": self.step_seconds,
            **(
                {
                    "end_of_task_seconds": self.end_seconds,
                    "evaluation_seconds": self.evaluated_seconds,
                    "evaluation_images": self.evaluated,
                    "evaluation_forward_images": self.evaluated_forward,
                }
                if self.evaluated
                else {}
            ),
            # of a method that adapts to clean images, on a copy
            **(
                {"evaluation_backward_images": self.evaluated_backward}
                if self.evaluated_backward
                else {}
            ),
            **(
                {
                    "estimate_seconds": self.estimated_seconds,
                    "estimate_forward_images": self.estimated_forward,
                }
                if self.estimated_forward
                else {}
            ),
            **({"recalled_images": self.recalled} if self.recalled else {}),
            "images": self.images,
            "batches": self.steps,
            "forward_images": self.forward,
            "backward_images": self.backward,
            "forward_per_image": self.forward / images,
            "backward_per_image": self.backward / images,
            "peak_memory_mb": peak_memory_mb(self.device),
            "parameters_updated": sum(p.numel() for p in strategy.updated_parameters()),
            "parameters_total": sum(p.numel() for p in strategy.parameters()),
            "state_bytes": state_bytes(strategy),
            **self._growth(),
        }

    def _growth(self) -> dict[str, float]:
        """Bytes that a task adds to what is kept for good, mean over all tasks but the first."""
        sizes = self.bytes_after_task
        if len(sizes) < 2:
            return {}
        return {"state_bytes_per_task": (sizes[-1] - sizes[0]) / (len(sizes) - 1)}


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def durations(call: Callable[[], object], device: torch.device, times: int = 20) -> list[float]:
    """Seconds of each of some calls, after three that are not counted."""
    seconds = []
    for _ in range(3 + times):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[3:]


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak, on the device or (Linux) for this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass  # the peak then counts from the start of the process


def peak_memory_mb(device: torch.device) -> float:
    """Peak since `reset_peak_memory` in MiB: GPU allocations, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        with open("/proc/self/status") as file:
            peak = next(line for line in file if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 1024
    except (OSError, StopIteration):
        return float("nan")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from _tensors(v)
    elif isinstance(value, list | tuple):
        for v in value:
            yield from _tensors(v)


def state_bytes(strategy: Strategy, *, moments: bool = True) -> int:
    """Bytes a method, with all strategies inside it, keeps beside the backbone.

    Copies, moments, prototypes, statistics.

    Storage shared between tensors counts once.

    Args:
        moments: those of the optimisers, which last as long as a task, among them.
    """
    storages: dict[int, int] = {}
    held: list[Any] = [strategy.state_dict()]
    held += [dict(o.state) for o in optimizers(strategy)] if moments else []
    for tensor in _tensors(held):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    for tensor in _tensors(strategy.backbone.state_dict()):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())
