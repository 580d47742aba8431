"""Adapters of the peft library (huggingface/peft, `pip install -e ".[peft]"`) as a kind.

    Plan(at=["blocks.*.attn.qkv:out"], blocks=None,
         kind=partial(peft_adapters, peft_type="lora", options={"r": 8, "lora_alpha": 8}))

The library replaces layers of a network in place. Here it gets copies of the layers that a set is
attached to, under their names, and its layers go into the set as adapters at `out` points; where
one calls the frozen layer inside, it is handed the output that the network has computed already
(unless it changes the input, as IA3 does before a layer; then the frozen layer runs a second time).
So the network keeps its modules, names and weights, sets share nothing, not even what a kind shares
between layers (the projections of VeRA), and they are saved, copied and grouped like all others.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from driftline.core.errors import UserError, suggest
from driftline.parts.adapters.adapter import Adapter, AdapterSet, NotSummable, bare_copy

NAME = "default"  # the library's own name for adapters, one a set here
ROUTED = "it mixes adapters by inputs that a language model has and a network of images has not"
# Types that attach to layers and yet cannot serve, with the reason. Those that write into the
# input of a language model are known by the library itself.
REFUSED = {
    "adalora": "its ranks are pruned by a call in the training loop, which no method here makes; "
    "adapter=peft/lora has fixed ranks",
    "adaption_prompt": "it is written for the attention of language models; use adapter=prefix",
    "osf": "it projects gradients by hooks on its tensors, which copies of a set would lose",
    "poly": ROUTED,
    "shadow": "it runs a second network beside the layers of a language model",
    "trainable_tokens": "it trains rows of an embedding of words",
    "xlora": ROUTED,
}
CALIBRATED = ("eva", "corda", "lora_ga")  # starts that are computed from images
# Options with another place in this project, or that would break what sets promise.
OPTIONS = {
    "target_modules": "say where with strategy.adapter.at",
    "layers_to_transform": "say where with strategy.adapter.blocks",
    "exclude_modules": "say where with strategy.adapter.at",
    "modules_to_save": "it trains whole layers of the frozen network",
    "inference_mode": "a method says when adapters learn",
    "generator_seed": "the generator's state would be in no checkpoint",
    "sample_at_inference": "the prediction for an image would change from call to call",
}


class Answered:
    """Stands for the frozen layer inside a layer of the library, with all its attributes.

    Args:
        module: the layer of the network; copies of a set go on sharing it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.inp: Tensor | None = None
        self.out: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Answered:
        return Answered(self.module)

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_hooks"):  # those of the layer are the bank's; some types warn of any
            return {}
        return getattr(self.__dict__["module"], name)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x is self.inp and self.out is not None:
            return self.out
        return self.module.forward(x, *args, **kwargs)  # not the call, which has the bank's hooks


class PeftAdapter(Adapter):
    """One layer of the library at one point.

    Args:
        layer: of the library, around a copy of `module`.
        module: the frozen layer of the network.
        additive: what it adds depends on the input alone, so that sets can be summed.
    """

    def __init__(self, layer: Any, module: nn.Module, *, additive: bool) -> None:
        super().__init__()
        self._frozen = Answered(module)
        del layer._modules["base_layer"]
        layer.__dict__["base_layer"] = self._frozen  # no submodule: it is not part of the set
        self.layer = layer
        self.additive = additive

    def after(self, inp: Tensor, out: Tensor) -> Tensor:
        if torch.is_grad_enabled() and out._is_view():
            out = out.clone()  # one of several in a group, which some types would write into
        self._frozen.inp, self._frozen.out = inp, out
        try:
            return self.layer(inp)
        finally:
            self._frozen.inp = self._frozen.out = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.additive:
            raise NotSummable("adapters of this kind cannot be summed; use one set")
        return self.after(x, x.new_zeros(*x.shape[:-1], self._frozen.out_features))

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        if not self.additive:
            return []
        return [(self.layer.lora_A[NAME].weight, self.layer.lora_B[NAME].weight)]


def peft_adapters(
    modules: Mapping[str, nn.Module],
    *,
    peft_type: str,
    options: dict[str, Any],
    generator: torch.Generator | None = None,
) -> AdapterSet:
    """New adapters of the library, a set.

    Args:
        modules: point -> frozen layer; points are `out` points.
        peft_type: of the library: lora, loha, ia3, oft, vera, ...
        options: of the configuration class of that type, e.g. r and lora_alpha.
        generator: of the initial values, which otherwise come from torch's global one.

    Raises:
        UserError: where the library is not installed or refuses the options, for types and options
            that cannot serve here, and for starts that change frozen weights or need images.
    """
    config = _config(modules, peft_type, options)
    network = _copies(modules)
    device = next(network.parameters()).device
    devices = [device] if device.type == "cuda" else []
    import peft

    with torch.random.fork_rng(devices, enabled=generator is not None), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type .*Norm", UserWarning)  # timm's
        if generator is not None:
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        try:
            tuner = peft.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
            tuner(network, config, adapter_name=NAME)
        except Exception as error:  # of whatever kind: the types are many hands' work
            raise _refusal(peft_type, options, error) from error
    adapters = AdapterSet()
    for point, module in modules.items():
        layer: Any = network.get_submodule(point.rpartition(":")[0])
        if not isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            raise UserError(f"peft attaches no {peft_type} at {point}: check strategy.adapter.at")
        copies = dict(layer.get_base_layer().named_parameters())
        if not all(torch.equal(copies[n], p) for n, p in module.named_parameters()):
            raise UserError(
                f"peft changes the frozen weights for {peft_type} with {options}, which every set "
                "and the network without one share. Choose another start, for example "
                "init_lora_weights=gaussian"
            )
        if any(p.requires_grad for p in copies.values()):
            raise UserError(
                f"{peft_type} with {options} trains weights of the frozen network beside its own; "
                "leave out the option bias"
            )
        adapters[point] = PeftAdapter(layer, module, additive=_is_product(layer, module))
    return adapters


def _is_product(layer: Any, module: nn.Module) -> bool:
    """Whether a layer of the library adds a low-rank product to a linear layer, and no more."""
    tensors = {name for name in layer.state_dict() if not name.startswith("base_layer.")}
    plain = tensors == {f"lora_{x}.{NAME}.weight" for x in "AB"} and not layer.lora_variant
    return plain and isinstance(module, nn.Linear)


def _config(modules: Mapping[str, nn.Module], peft_type: str, options: dict[str, Any]) -> Any:
    """The library's configuration for layers with these points."""
    try:
        import peft
    except ImportError as error:
        raise UserError(
            'the peft library is not installed: pip install -e ".[peft]" (or choose adapters of '
            "this project, for example adapter=lora)"
        ) from error
    kind = peft_type.lower()
    known: dict[str, Any] = {
        k.value.lower(): c for k, c in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }
    if kind not in known:
        raise UserError(f"peft has no peft_type {peft_type!r}{suggest(kind, known)}")
    if kind in REFUSED:
        raise UserError(f"peft_type={peft_type} cannot serve here: {REFUSED[kind]}")
    if issubclass(known[kind], peft.PromptLearningConfig):
        raise UserError(
            f"peft_type={peft_type} cannot serve here: it writes into the input of a language "
            "model; use adapter=prompt or adapter=prefix"
        )
    for name in options.keys() & OPTIONS.keys():
        raise UserError(f"strategy.adapter.kind.options.{name}: {OPTIONS[name]}")
    start = options.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CALIBRATED):
        raise UserError(
            f"init_lora_weights={start} computes the start from images in a calibration pass: use "
            "adapter=lora with strategy.adapter.start, or for example gaussian or orthogonal"
        )
    for point, module in modules.items():
        single = point.endswith(":out") and not isinstance(module, nn.MultiheadAttention)
        if not single or not [*module.parameters()]:
            raise UserError(
                f"peft has no adapters at {point}: it changes layers with weights, of one input "
                "and one output, such as strategy.adapter.at=['blocks.*.attn.qkv:out']"
            )
    try:
        paths = [point.rpartition(":")[0] for point in modules]
        return known[kind](target_modules=paths, **options)
    except Exception as error:
        raise _refusal(peft_type, options, error) from error


def _refusal(peft_type: str, options: dict[str, Any], error: Exception) -> UserError:
    reason = textwrap.shorten(str(error), 300)
    return UserError(
        f"peft refuses {peft_type} with strategy.adapter.kind.options={options}: {reason}"
    )


def _copies(modules: Mapping[str, nn.Module]) -> nn.Module:
    """A network of nothing but copies of these layers, at their places."""
    root = nn.Module()
    for point, module in modules.items():
        *above, name = point.rpartition(":")[0].split(".")
        parent = root
        for part in above:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(name, bare_copy(module))
    return root
