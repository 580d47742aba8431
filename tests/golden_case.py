"""A recorded run of a reference implementation, and how ours is compared with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from driftline.core.strategy import TTAStrategy
from driftline.parts.optim import Optim

FOLDER = Path(__file__).parent / "golden" / "tta"
LISTS = json.loads((FOLDER / "lists.json").read_text())


def names(pattern: str) -> list[str]:
    return sorted(p.stem for p in FOLDER.glob(f"{pattern}.json"))


def names_in(value: str | list[str]) -> list[str]:
    return LISTS[value[1:]] if isinstance(value, str) else value


class Case:
    """One recorded run: description, arrays, and the network it started from."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        self.name, self.dtype = name, dtype
        self.info: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
        self.data = dict(np.load(FOLDER / f"{name}.npz"))
        self.hyper: dict[str, Any] = self.info.get("hyperparameters", {})

    def net(self) -> nn.Module:
        extra = {"img_size": 64} if self.info["model"] == "test_vit" else {}
        net = timm.create_model(self.info["model"], num_classes=10, **extra)
        state = load_file(FOLDER / self.info["model_file"])
        net.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
        )
        return net.eval().to(self.dtype)

    def batches(self) -> list[Tensor]:
        x = np.load(FOLDER / "inputs.npz")["x"][: self.info["batches"], : self.info["batch_size"]]
        return list(torch.from_numpy(x.astype(np.float32) / np.float32(255)).to(self.dtype))

    def source(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """The 32 recorded source images and their labels, in batches of `size`."""
        data = np.load(FOLDER / "inputs.npz")
        x = torch.from_numpy(data["x_src"].astype(np.float32) / np.float32(255)).to(self.dtype)
        y = torch.from_numpy(data["y_src"]).long()
        return list(zip(x.split(size), y.split(size), strict=True))

    def view(self, x: Tensor, i: int) -> Tensor:
        """Entry `i` of the recorded table of views, applied to `x` [B, 3, H, W]."""
        shift = (int(self.data["view_dy"][i]), int(self.data["view_dx"][i]))
        scale = torch.tensor(self.data["view_scale"][i]).to(x)
        x = (x.roll(shift, (2, 3)) * scale).clamp(0, 1)
        return x.flip(3) if self.data["view_flip"][i] else x

    def check(self, key: str, mine: Any, slack: float = 1) -> float:
        """Compare in this case's precision; returns deviation / tolerance, at most 1.

        Args:
            slack: factor of the tolerance in float32, for what rounding on another processor moves.
        """
        golden = self.data[key].astype(np.float64)
        mine = np.asarray(mine, dtype=np.float64).reshape(golden.shape)
        if self.dtype == torch.float64:
            golden = golden + self.data[f"d64/{key}"].astype(np.float64)
            tolerance = np.full_like(golden, 1e-7 * max(1.0, np.abs(golden).max()))
        else:
            tolerance = self.data[f"tol/{key}"].astype(np.float64)
            tolerance = tolerance.reshape(tolerance.shape + (1,) * (golden.ndim - tolerance.ndim))
            tolerance = slack * tolerance
        assert np.array_equal(np.isnan(mine), np.isnan(golden)), key
        worst = float(np.nanmax(np.abs(mine - golden) / tolerance, initial=0))
        assert worst <= 1, f"{self.name} {self.dtype} {key}: {worst:.3g} times the tolerance"
        return worst

    def check_all(
        self, results: dict[str, Any], slack: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Check every recorded output of this precision; none may be missing."""
        prefix = "d64/" if self.dtype == torch.float64 else "tol/"
        keys = [k.removeprefix(prefix) for k in self.data if k.startswith(prefix)]
        assert keys
        return {key: self.check(key, results[key], (slack or {}).get(key, 1)) for key in keys}


def weights(prefix: str, net: nn.Module, start: nn.Module, case: Case) -> dict[str, Any]:
    """Recorded views of a network's parameters: norms, movements and full tensors."""
    return views(prefix, dict(net.named_parameters()), dict(start.named_parameters()), case)


def views(
    prefix: str, now: Mapping[str, Tensor], before: Mapping[str, Tensor], case: Case
) -> dict[str, Any]:
    """As `weights`, of parameters by their recorded names."""
    now = {k: p.detach().double() for k, p in now.items()}
    before = {k: p.detach().double() for k, p in before.items()}
    order = names_in(case.info["param_names"])
    assert order == list(now)
    out: dict[str, Any] = {
        f"{prefix}_l2": [now[k].norm().item() for k in order],
        f"{prefix}_moved": [(now[k] - before[k]).norm().item() for k in order],
    }
    return out | {f"{prefix}_full/{k}": v.numpy() for k, v in now.items()}


def record(method: TTAStrategy, case: Case) -> dict[str, list[Any]]:
    """Run the stream of `case`; scores and every value of the method's `loss`, per batch."""
    losses: list[float] = []
    inner = method.method
    if hasattr(inner, "loss"):
        original = inner.loss

        def loss(*args: Tensor) -> Tensor:
            value = original(*args)
            losses.append(value.item())
            return value

        inner.loss = loss
    method.begin_stream()
    logits = [method.adapt(x).numpy() for x in case.batches()]
    assert not any(np.shares_memory(a, b) for a in logits for b in logits if a is not b)
    return {"logits": logits, "loss": losses}


def part_of_log(text: str) -> float:
    """0.4 of "0.4*ln(10)"."""
    factor, _, rest = text.partition("*")
    assert rest == "ln(10)"
    return float(factor)


def optim(hyper: dict[str, Any], **rates: float) -> Optim:
    """The recorded settings of the optimiser; `rates` of groups that have their own."""
    return Optim(
        kind=hyper["optimizer"].lower(),
        lr=hyper["lr"],
        rates=rates,
        momentum=hyper.get("momentum", 0.0),
        nesterov=hyper.get("nesterov", False),
        betas=hyper.get("betas", (0.9, 0.999)),
        weight_decay=hyper["weight_decay"],
    )


both = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="f32", marks=pytest.mark.one_in(2)),
        pytest.param(torch.float64, id="f64"),
    ],
)
