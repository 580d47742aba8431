"""Adapters of the peft library on a network, with the interface of `parts/adapters/bank.py`.

    bank = PeftBank(backbone)
    bank.add("a", {"r": 8, "lora_alpha": 8, "target_modules": ["qkv", "proj"]})
    bank.features(x, "a")       # [B, D] with the adapter
    bank.features(x)            # without

peft (huggingface/peft, `pip install -e ".[peft]"`) wraps the layers in place: the names of the
wrapped weights change (`qkv.weight` becomes `qkv.base_layer.weight`), and the parameters of the
adapters belong to the network, not to the bank. Outside a call of the bank the network gives what
it gave before. Any network with the layers that `target_modules` names will do.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError, suggest
from driftline.parts.adapters.bank import Reach, call_qkv


def _peft() -> Any:
    """The library.

    Raises:
        UserError: where it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError(
            'the peft library is not installed: pip install -e ".[peft]" (or choose adapters of '
            "this project, for example adapter=lora)"
        ) from error
    return peft


class PeftBank(nn.Module):
    """Named peft adapters and their attachment to `backbone`.

    Args:
        backbone: its target layers are wrapped in place. It is not a submodule of the bank.

    Raises:
        UserError: where peft is not installed.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        _peft()
        self._backbone = [backbone]  # in a list: not a submodule
        self._own: dict[str, list[nn.Parameter]] = {}  # of each adapter, in the network's order
        self._layers: list[tuple[str, Any]] = []  # wrapped layers by name
        self._reach = Reach(backbone)

    @property
    def backbone(self) -> Backbone:
        return self._backbone[0]

    # -------------------------------------------------------------- sets

    def add(
        self, name: str, config: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> list[nn.Parameter]:
        """Attach adapters under `name`; returns their parameters.

        Args:
            config: options of peft's configuration class; `peft_type` chooses it (lora by default;
                loha, lokr, ia3, ... whatever peft can inject).
            generator: of the initial values, which otherwise come from torch's global one.

        Raises:
            UserError: for options that peft refuses, layers that the network does not have, or a
                start that changes frozen weights.
            ValueError: if the name is taken.
        """
        peft = _peft()
        if name in self._own:
            raise ValueError(f"there are adapters {name!r} already")
        net = self.backbone.net
        learned = [(p, p.requires_grad) for p in net.parameters()]
        before = [(p, p.detach().clone()) for p in net.parameters()]
        options = dict(config)
        kind = str(options.pop("peft_type", "lora"))
        known = {k.value.lower(): c for k, c in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if kind.lower() not in known:
            raise UserError(f"peft has no peft_type {kind!r}{suggest(kind.lower(), known)}")
        device = next(net.parameters()).device
        devices = [device] if device.type == "cuda" else []
        forked = torch.random.fork_rng(devices, enabled=generator is not None)
        with forked, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are meant
            if generator is not None:
                torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            try:
                made = known[kind.lower()](**options)
                peft.inject_adapter_in_model(made, net, name)
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                reason = textwrap.shorten(str(error), 300)
                raise UserError(f"peft refuses {dict(config)}: {reason}") from error
        if not all(torch.equal(p, value) for p, value in before):
            with torch.no_grad():
                for p, value in before:
                    p.copy_(value)
            raise UserError(
                f"peft changes the frozen weights for {dict(config)}, which every set and the "
                "network without one share. Choose another start, for example "
                "init_lora_weights=gaussian"
            )
        for p, learns in learned:  # peft freezes the network; that is not the bank's business
            p.requires_grad_(learns)
        kind_of_layer = peft.tuners.tuners_utils.BaseTunerLayer
        wrapped = {path for path, _ in self._layers}
        self._layers = [(n, m) for n, m in net.named_modules() if isinstance(m, kind_of_layer)]
        for path, layer in self._layers:
            if path not in wrapped:
                call_qkv(net, path, lambda layer=layer: not layer.disable_adapters)
                layer.register_forward_hook(lambda *_, path=path: self._reach.points.add(path))
        wanted = self.tensor_names(name)
        self._own[name] = [p for n, p in net.named_parameters() if n in wanted]
        if not self._own[name]:
            raise UserError(f"peft attached nothing for {dict(config)}: check target_modules")
        self._switch([])
        return self.parameters_of(name)

    def _parts(self, name: str | None = None) -> list[tuple[str, nn.Module | Tensor]]:
        """What peft keeps of one adapter (None: of all) in each layer, by name in the network."""
        found: list[tuple[str, nn.Module | Tensor]] = []
        for path, layer in self._layers:
            for key, held in layer.named_children():
                if isinstance(held, nn.ModuleDict | nn.ParameterDict) and key != "base_layer":
                    parts = ((n, p) for n, p in held.items() if name in (None, n))
                    found += [(f"{path}.{key}.{n}", p) for n, p in parts]
        return found

    def tensor_names(self, name: str | None = None) -> set[str]:
        """Names, in the state of the network, of the tensors of one adapter (None: of all)."""
        found = set()
        for path, part in self._parts(name):
            if isinstance(part, nn.Module):
                found |= {f"{path}.{key}" for key in part.state_dict()}
            else:
                found.add(path)
        return found

    def _paths(self, name: str) -> list[str]:
        """The layers that hold something of one adapter."""
        names = self.tensor_names(name)
        paths = [path for path, _ in self._layers]
        return [path for path in paths if any(n.startswith(f"{path}.") for n in names)]

    def second_factors(self, name: str) -> list[nn.Parameter]:
        """Those of one set that are second factors of low-rank products."""
        return []

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """Parameters of one adapter, in the order of the network."""
        return list(self._own[name])

    def freeze(self, name: str, frozen: bool = True) -> None:
        """Stop (or start) training an adapter; a frozen one is in evaluation mode for good."""
        for p in self.parameters_of(name):
            p.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> PeftBank:
        """Adapters that train follow `mode` (their dropout), frozen ones do not.

        The modules lie in the network: call this after `backbone.eval()`.
        """
        self.training = mode
        for name, parameters in self._own.items():
            learns = any(p.requires_grad for p in parameters)
            for _, part in self._parts(name):
                if isinstance(part, nn.Module):
                    part.train(mode and learns)
        return self

    # -------------------------------------------------------------- calls

    def features(self, x: Tensor, use: str | None = None) -> Tensor:
        """[B, 3, H, W] -> [B, D] with one adapter, or none.

        Raises:
            UserError: for a layer that the network does not call.
        """
        with self.using(use):
            out = self.backbone.features(x)
        self._reach.verify({} if use is None else {use: self._paths(use)})
        return out

    @contextmanager
    def using(self, use: str | None) -> Generator[None]:
        """Inside, every forward of the backbone goes through this adapter."""
        if use is not None and use not in self._own:
            raise KeyError(f"there is no adapter {use!r}{suggest(use, self._own)}")
        self._switch([] if use is None else [use])
        try:
            yield
        finally:
            self._switch([])

    def _switch(self, names: list[str]) -> None:
        """Choose the adapters; peft would change what trains as well, which is undone."""
        learned = [(p, p.requires_grad) for own in self._own.values() for p in own]
        for _, layer in self._layers:
            if names:
                layer.set_adapter(names)
            layer.enable_adapters(bool(names))
        for p, learns in learned:
            p.requires_grad_(learns)


@dataclass(frozen=True, kw_only=True)
class PeftPlan:
    """Adapters of the peft library, as an option like `parts.adapters.plan.Plan`.

    Args:
        peft_type: of the library: lora, loha, lokr, ia3, ...
        options: of its configuration class, e.g. r, lora_alpha, target_modules.
    """

    peft_type: str
    options: dict[str, Any]

    def bank(self, backbone: Backbone) -> PeftBank:
        """An empty bank on `backbone`.

        Raises:
            UserError: where peft is not installed.
        """
        return PeftBank(backbone)

    def add(
        self, bank: PeftBank, name: str, generator: torch.Generator | None = None
    ) -> list[nn.Parameter]:
        """New adapters under `name`; returns their parameters.

        Raises:
            UserError: as for `PeftBank.add`.
        """
        return bank.add(name, {"peft_type": self.peft_type, **self.options}, generator)
