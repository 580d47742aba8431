"""Named sets of adapters on one frozen transformer, chosen per call.

    bank = AdapterBank(backbone)
    bank.add("task0", {f"blocks.{i}.mlp:parallel": Bottleneck(768, 64) for i in range(12)})
    bank.features(x, "task0")                    # [B, D]
    bank.features(x, {"old": 1.0, "new": 1.0})   # sums of what both add
    bank.features_each(x, ["task0", "task1"])    # [2, B, D], one pass of the frozen weights
    bank.features_indexed(x, ["task0", "task1"], index)    # [B, D], a set for each image

A point is `<module>:<kind>`, see `adapter.py`; `bank.points()` lists what a network offers. The
network keeps its class, its modules and its weights: adapters act through hooks that do nothing
outside the call. Linear modules anywhere and the parts of timm's `Block` (norm1, attn,
norm2, mlp) are enough for every kind; a network that lacks what a point needs is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import driftline.core.vision  # noqa: F401
from driftline.backbones.backbone import Backbone
from driftline.core import distributed
from driftline.core.errors import UserError, suggest
from driftline.parts.adapters.adapter import Adapter, NotSummable
from driftline.parts.adapters.bottleneck import Bottleneck
from driftline.parts.adapters.prefix import Rows
from driftline.parts.adapters.prompt import Prompt

Use = str | Mapping[str, float] | None
KINDS = ("parallel", "out", "in", "keys", "tokens")
COPIES = 512  # images times sets that go through the network at once


class Reach:
    """Whether the first pass through a set of adapters reaches all its points.

    A network may compute something without calling the module that it has for it; adapters there
    would learn nothing.
    """

    def __init__(self, backbone: Backbone, setting: str) -> None:
        self.backbone, self.setting = backbone, setting
        self.points: set[str] = set()  # in this pass; hooks add to it
        self.verified: set[str] = set()  # names of sets

    def verify(self, sets: Mapping[str, Collection[str]]) -> None:
        """After a pass through `sets`, name -> points.

        Raises:
            UserError: naming the network and the first point that was not reached.
        """
        for name in sets.keys() - self.verified:
            if missed := [point for point in sets[name] if point not in self.points]:
                raise UserError(
                    f"{self.backbone.tag}: adapters at {missed[0]} are never reached, because the "
                    f"network does not call that module ({len(missed)} of {len(sets[name])} "
                    f"points). Choose other points ({self.setting}) or another backbone"
                )
            self.verified.add(name)
        self.points.clear()


class AdapterBank(nn.Module):
    """Adapter sets and their attachment to `backbone`.

    Args:
        backbone: its network gets hooks, nothing else. It is not a submodule of the bank.
        setting: that says where adapters are, for messages.
    """

    def __init__(self, backbone: Backbone, setting: str = "strategy.adapter") -> None:
        super().__init__()
        self.sets = nn.ModuleDict()
        self._constant: dict[str, set[str]] = {}  # names of parameters of a set that never train
        self._frozen: set[str] = set()  # names of sets, by `freeze`
        self._backbone = [backbone]  # in a list: not a submodule
        self._hooked: set[str] = set()
        self._active: list[tuple[str, float]] = []
        self._group: list[str] = []
        self._index: Tensor | None = None  # the set of each image
        self._expanded = False
        self._residual: Tensor | None = None
        self._reach = Reach(backbone, setting)

    @property
    def backbone(self) -> Backbone:
        return self._backbone[0]

    # -------------------------------------------------------------- sets

    def points(self) -> list[str]:
        """Points that this network offers (linear layers and blocks)."""
        names = []
        for name, module in self.backbone.net.named_modules():
            if isinstance(module, nn.Linear):
                names.append(f"{name}:out")
        if hasattr(self.backbone.net, "blocks"):
            names.append("blocks:tokens")
        for i, block in enumerate(getattr(self.backbone.net, "blocks", [])):
            names.append(f"blocks.{i}:tokens")
            if _is_block(block):
                names += [f"blocks.{i}.mlp:parallel", f"blocks.{i}.attn:out"]
                names += [f"blocks.{i}.attn:in"]
            if _has_plain_attention(block):
                names.append(f"blocks.{i}.attn:keys")
        return names

    def add(self, name: str, adapters: Mapping[str, Adapter]) -> list[nn.Parameter]:
        """Attach a set under `name`; returns its parameters.

        Raises:
            UserError: for a point that the network does not offer or the adapter cannot serve.
            ValueError: if the name is taken.
        """
        if name in self.sets:
            raise ValueError(f"there is a set {name!r} already")
        for point, adapter in adapters.items():
            self.check(point)
            if point.rpartition(":")[2] not in (places := _places(adapter)):
                raise UserError(
                    f"{type(adapter).__name__} cannot be at {point}, it serves points of "
                    f"{' and '.join(places)}: change {self._reach.setting}.at"
                )
        device = next(self.backbone.parameters()).device
        modules = nn.ModuleDict({p.replace(".", "/"): a for p, a in adapters.items()}).to(device)
        self.sets[name] = modules
        named = modules.named_parameters(remove_duplicate=False)
        self._constant[name] = {n for n, p in named if not p.requires_grad}
        for point in adapters:
            self._hook(point)
        return self.parameters_of(name)

    def copy(self, name: str, new: str) -> list[nn.Parameter]:
        """A second set with the same values; returns its parameters."""
        shared: dict[int, Any] = {id(m): m for m in self.backbone.modules()}  # of the network
        self.add(new, deepcopy(self.adapters(name), shared))  # at once: what they share, they keep
        self._constant[new] = set(self._constant[name])
        return self.parameters_of(new)

    @torch.no_grad()
    def merge(
        self, names: Sequence[str], into: str, weights: Sequence[float] | None = None
    ) -> None:
        """Set `into` (which exists) to the weighted mean of the sets `names`, bit by bit in place.

        Args:
            weights: one for each set; None: all equal. They are divided by their sum.

        Raises:
            ValueError: for sets that differ in names or shapes of their tensors, or in the values
                of those that do not learn, such as random projections.
        """
        states = [self.sets[n].state_dict() for n in names]
        goal = self.sets[into].state_dict()
        shapes = [{k: v.shape for k, v in s.items()} for s in (*states, goal)]
        if any(s != shapes[0] for s in shapes):
            raise ValueError(f"sets {[*names, into]} do not hold the same tensors")
        shares = [1.0] * len(names) if weights is None else list(weights)
        fixed = self.fixed(into).keys()
        for key in fixed:
            if any(not torch.equal(s[key], goal[key]) for s in states):
                raise ValueError(f"sets {[*names, into]} differ in {key}, which does not learn")
        rows = [[w / sum(shares) * s[k] for k in goal] for w, s in zip(shares, states, strict=True)]
        for (key, value), parts in zip(goal.items(), zip(*rows, strict=True), strict=True):
            if key not in fixed:
                value.copy_(torch.stack(parts).sum(0))

    def remove(self, name: str) -> None:
        """Drop a set."""
        del self.sets[name], self._constant[name]
        self._reach.verified.discard(name)
        self._frozen.discard(name)

    def freeze(self, name: str, frozen: bool = True) -> None:
        """Stop (or start) training a set; a frozen set is in evaluation mode for good."""
        for p in self.parameters_of(name):
            p.requires_grad_(not frozen)
        self.sets[name].train(not frozen)
        (self._frozen.add if frozen else self._frozen.discard)(name)

    def train(self, mode: bool = True) -> AdapterBank:
        """Sets that train follow `mode`; frozen ones stay in evaluation mode."""
        self.training = mode
        for name, modules in self.sets.items():
            if name in self._frozen:  # a step shall not take longer with every task
                continue
            learns = any(p.requires_grad for p in modules.parameters())
            modules.train(mode and learns)
        return self

    def adapters(self, name: str) -> dict[str, Adapter]:
        """Point -> adapter of a set."""
        modules: Any = self.sets[name]
        return {key.replace("/", "."): adapter for key, adapter in modules.items()}

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """What one set learns, in the order of its points."""
        constant = self._constant[name]
        return [p for n, p in self.sets[name].named_parameters() if n not in constant]

    def fixed(self, name: str) -> dict[str, Tensor]:
        """What one set holds and never learns (random factors, chosen entries), by name."""
        modules = self.sets[name]
        learned = {n for n, _ in modules.named_parameters(remove_duplicate=False)}
        learned -= self._constant[name]
        return {n: t for n, t in modules.state_dict().items() if n not in learned}

    def second_factors(self, name: str) -> list[nn.Parameter]:
        """Those of one set that are second factors of low-rank products."""
        named = self.sets[name].named_parameters()
        return [p for n, p in named if {"up", "b", "lora_B"} & set(n.split("."))]

    # -------------------------------------------------------------- calls

    def features(self, x: Tensor, use: Use = None, context: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] -> [B, D] with one set, a weighted sum of sets, or none.

        Args:
            context: [B, ...], what adapters that differ between images read, such as the query of
                a pool of prompts (`Adapter.context`).
        """
        with self.using(use, context):
            out = self.backbone.features(x)
            if not dict(self._active).keys() <= self._reach.verified:
                self._reach.verify({name: self.adapters(name) for name, _ in self._active})
        return out

    def logits(self, x: Tensor, use: Use = None, context: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] -> [B, C], scores of the pretrained head, as `features`."""
        with self.using(use, context):
            out = self.backbone(x)
            if not dict(self._active).keys() <= self._reach.verified:
                self._reach.verify({name: self.adapters(name) for name, _ in self._active})
        return out

    @distributed.shared(dim=1)
    def features_each(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """[B, 3, H, W] -> [T, B, D]: each set by itself, frozen weights once for all of them.

        Until the first adapter acts, the T copies share one computation.

        Raises:
            ValueError: for sets that differ in their points.
        """
        points = [list(self.adapters(n)) for n in names]
        if any(p != points[0] for p in points):
            raise ValueError(f"sets {list(names)} are attached at different points")
        if len(names) == 1:
            return self.features(x, names[0])[None]
        outside = any(not p.startswith("blocks") for p in points[0])
        images = x.repeat(len(names), 1, 1, 1) if outside else x
        self._group, self._expanded = list(names), outside
        try:
            out = self.backbone.features(images)
            self._reach.verify({name: self.adapters(name) for name in names})
        finally:
            self._group, self._residual = [], None
        if not outside:  # each copy counts as a pass, although block 0 is shared
            self.backbone.passes.forward += distributed.full_batch_size(len(x)) * (len(names) - 1)
        return out.view(len(names), len(x), -1)

    def features_in_parts(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """As `features_each`, at most `COPIES` images times sets at once, which bounds memory."""
        size = max(1, COPIES // len(x))
        parts = [names[i : i + size] for i in range(0, len(names), size)]
        return torch.cat([self.features_each(x, part) for part in parts])

    @distributed.shared()
    def features_indexed(self, x: Tensor, names: Sequence[str], index: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D]: image b through set `names[index[b]]`, in one pass.

        Without gradients.

        Args:
            index: int64 [B].

        Raises:
            ValueError: for sets that hold anything but `Bottleneck` at parallel points.
        """
        if not self.indexable(names[0]):
            raise ValueError(f"{names[0]}: a set for each image needs bottlenecks beside MLPs")
        self._group, self._index = list(names), index
        try:
            out = self.backbone.features(x)
            self._reach.verify({name: self.adapters(name) for name in names})
            return out
        finally:
            self._group, self._index, self._residual = [], None, None

    def indexable(self, name: str) -> bool:
        """Whether `features_indexed` can serve sets like this one."""
        return all(
            point.endswith(":parallel") and isinstance(adapter, Bottleneck)
            for point, adapter in self.adapters(name).items()
        )

    @contextmanager
    def using(self, use: Use, context: Tensor | None = None) -> Generator[None]:
        """Inside, every forward of the backbone goes through these sets."""
        chosen = {} if use is None else {use: 1.0} if isinstance(use, str) else dict(use)
        for name in chosen:
            if name not in self.sets:
                raise KeyError(f"there is no set {name!r}{suggest(name, self.sets)}")
        before, self._active = self._active, list(chosen.items())
        readers: list[Adapter] = []
        if context is not None:
            every = [a for name in chosen for a in self.adapters(name).values()]
            readers = [a for a in every if a.reads_context]
        for reader in readers:
            reader.context = context
        try:
            yield
        finally:
            self._active, self._residual = before, None
            for reader in readers:
                reader.context = None

    # -------------------------------------------------------------- hooks

    def check(self, point: str) -> None:
        """Whether the network offers a point.

        Raises:
            UserError: if not, with the reason.
        """
        path, _, kind = point.rpartition(":")
        net = self.backbone.net
        reason = None
        try:
            module = net.get_submodule(path)
        except AttributeError:
            module, reason = None, f"there is no module {path!r}{suggest(path, _names(net))}"
        if reason is None and kind not in KINDS:
            reason = f"{kind!r} is not one of {', '.join(KINDS)}"
        if reason is None and kind in ("parallel", "keys"):
            block = net.get_submodule(path.rpartition(".")[0])
            if kind == "parallel" and not (_is_block(block) and block.mlp is module):
                reason = "it needs timm's pre-norm Block (norm1, attn, norm2, mlp)"
            if kind == "keys" and not (_has_plain_attention(block) and block.attn is module):
                reason = "it needs timm's plain Attention with a fused qkv"
        if reason is None and kind == "tokens":
            first = module[0] if isinstance(module, nn.Sequential | nn.ModuleList) else module
            if not _is_block(cast(nn.Module, first)):
                reason = "it needs timm's Block, whose attention takes any number of tokens"
        if reason is not None:
            raise no_place(self.backbone, point, reason)

    def _hook(self, point: str) -> None:
        if point in self._hooked:
            return
        self._hooked.add(point)
        path, _, kind = point.rpartition(":")
        net = self.backbone.net
        module = net.get_submodule(path)
        if kind == "parallel":
            block = net.get_submodule(path.rpartition(".")[0])
            block.norm2.register_forward_pre_hook(lambda _, args: self._remember(point, args[0]))
            block.register_forward_hook(lambda _, args, out: self._act(self._parallel, point, out))
            return
        if path.startswith("blocks"):
            self._expand_before(net.get_submodule(".".join(path.split(".")[:2])))
        if kind == "out":
            call_qkv(net, path, lambda: bool(self._found(point) or self._grouped(point)))
            module.register_forward_hook(
                lambda _, args, out: self._act(self._out, point, args[0], out)
            )
        elif kind == "in":
            module.register_forward_pre_hook(
                lambda _, args, kwargs: (
                    (self._act(self._in, point, args[0]), *args[1:]),
                    kwargs,
                ),
                with_kwargs=True,
            )
        elif kind == "tokens":
            module.register_forward_pre_hook(
                lambda _, args, kwargs: ((self._append(point, args[0]), *args[1:]), kwargs),
                with_kwargs=True,
            )
            module.register_forward_hook(lambda _, args, out: self._drop(point, out))
        else:
            self._attention(module, point)

    def _act(self, act: Callable[..., Tensor], point: str, *tensors: Tensor) -> Tensor:
        """`act` at a point, with an error of the setting where widths do not fit."""
        try:
            return act(point, *tensors)
        except (RuntimeError, ValueError) as error:
            names = {name for name, _ in self._active} or set(self._group)
            if type(error) not in (RuntimeError, ValueError) or names <= self._reach.verified:
                raise  # no memory left, a sum that is none; or it went well before
            reason = str(error).strip().splitlines()[0][:160]
            raise UserError(
                f"the adapters at {point} do not fit what the network has there ({reason}): "
                f"change {self._reach.setting}.at"
            ) from error

    def _found(self, point: str) -> list[tuple[Adapter, float]]:
        """Active adapters at a point with their weights."""
        key = point.replace(".", "/")
        acting = []
        for name, weight in self._active:
            modules: Any = self.sets[name]
            if key in modules:
                acting.append((modules[key], weight))
        return acting

    def _grouped(self, point: str) -> list[Adapter]:
        key = point.replace(".", "/")
        members: list[Any] = [self.sets[n] for n in self._group]
        return [m[key] for m in members] if members and key in members[0] else []

    def _expand(self, x: Tensor) -> Tensor:
        """[B, ...] -> [T * B, ...], once per call."""
        if self._expanded:
            return x
        self._expanded = True
        return x.repeat(len(self._group), *[1] * (x.ndim - 1))

    def _expand_before(self, block: nn.Module) -> None:
        """Points inside a block need all copies from its input on."""
        name = f"expand:{id(block)}"
        if name in self._hooked:
            return
        self._hooked.add(name)

        def expand(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            several = self._group and self._index is None
            return ((self._expand(args[0]), *args[1:]), kwargs) if several else None

        block.register_forward_pre_hook(expand, with_kwargs=True, prepend=True)

    def _chunks(self, x: Tensor) -> Tensor:
        return x.view(len(self._group), -1, *x.shape[1:])

    def _remember(self, point: str, x: Tensor) -> None:
        if self._found(point) or self._grouped(point):
            self._residual = x

    def _parallel(self, point: str, out: Tensor) -> Tensor:
        self._reach.points.add(point)
        u = self._residual
        if adapters := self._grouped(point):
            assert u is not None
            if self._index is not None:
                members = cast(list[Bottleneck], adapters)
                return Bottleneck.add_indexed(members, self._index, u, out)
            shared = not self._expanded
            chunks = u.expand(len(adapters), *u.shape) if shared else self._chunks(u)
            base = self._chunks(self._expand(out))
            return type(adapters[0]).add_grouped(adapters, chunks, base).flatten(0, 1)
        for adapter, weight in self._found(point):
            assert u is not None
            out = adapter.add(u, out, weight)
        self._residual = None
        return out

    def _out(self, point: str, inp: Tensor, out: Tensor) -> Tensor:
        self._reach.points.add(point)
        if out.data_ptr() == inp.data_ptr():
            out = out.clone()  # adapters may write into a module's output, not into its input
        if adapters := self._grouped(point):
            chunks = self._chunks(inp), self._chunks(out)
            return type(adapters[0]).after_grouped(adapters, *chunks).flatten(0, 1)
        acting = self._found(point)
        if len(acting) == 1 and acting[0][1] == 1:
            return acting[0][0].after(inp, out)
        for adapter, weight in acting:  # sums are defined for adapters that only add
            out = adapter.add(inp, out, weight)
        return out

    def _in(self, point: str, inp: Tensor) -> Tensor:
        self._reach.points.add(point)
        if adapters := self._grouped(point):
            parts = zip(adapters, self._chunks(inp), strict=True)
            return torch.cat([a.before(i) for a, i in parts])
        return _only(self._found(point), point, lambda a: a.before(inp), inp)

    def _tokens(self, point: str) -> list[Tensor]:
        """[count, D] or [B, count, D] of every active prompt; one outside a group."""
        adapters = self._grouped(point) or _only(self._found(point), point, lambda a: [a], [])
        return [a.tokens() for a in adapters if isinstance(a, Prompt)]

    def _append(self, point: str, x: Tensor) -> Tensor:
        self._reach.points.add(point)
        tokens = self._tokens(point)
        return torch.cat([x, rows_of_images(tokens, len(x)).to(x)], 1) if tokens else x

    def _drop(self, point: str, out: Tensor) -> Tensor:
        tokens = self._tokens(point)
        return out[:, : -tokens[0].shape[-2]] if tokens else out

    def _attention(self, module: Any, point: str) -> None:
        plain: Callable[..., Tensor] = module.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self._reach.points.add(point)
            adapters = self._grouped(point) or _only(self._found(point), point, lambda a: [a], [])
            prefixes = [a for a in adapters if isinstance(a, Rows)]
            return attend(module, x, prefixes) if prefixes else plain(x, *args, **kwargs)

        module.forward = forward


def attend(attention: Any, x: Tensor, prefixes: Sequence[Rows]) -> Tensor:
    """timm's `Attention` on x [T * B, N, D] with learned keys and values after the class token."""
    batch, n, _ = x.shape
    heads, width = attention.num_heads, attention.head_dim
    q, k, v = attention.qkv(x).view(batch, n, 3, heads * width).unbind(2)
    keys, values = zip(*(p.rows() for p in prefixes), strict=True)
    rows = [rows_of_images(r, batch).to(x) for r in (keys, values)]
    k, v = (torch.cat([t[:, :1], r, t[:, 1:]], 1) for t, r in zip((k, v), rows, strict=True))
    q, k, v = (t.view(batch, -1, heads, width).transpose(1, 2) for t in (q, k, v))
    q, k = attention.q_norm(q), attention.k_norm(k)
    length = rows[0].shape[1]
    if not prefixes[0].compensate:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        weights = ((q * attention.scale) @ k.transpose(-2, -1)).softmax(-1)
        first, learned, rest = weights.split([1, length, n - 1], -1)
        learned = learned / learned.sum(-1, keepdim=True).clamp_min(1e-12)
        out = torch.cat([first, learned, rest], -1) @ v
    out = out.transpose(1, 2).reshape(batch, n, heads * width)
    return attention.proj_drop(attention.proj(out))


def rows_of_images(rows: Sequence[Tensor], batch: int) -> Tensor:
    """[batch, length, D]: what each image of a batch of T chunks reads.

    Args:
        rows: T tensors, [length, D] for all images of a chunk or [batch / T, length, D] for each.
    """
    each = batch // len(rows)
    own = [distributed.own_rows(r) if r.ndim == 3 else r for r in rows]
    return torch.cat([r.expand(each, *r.shape[-2:]) for r in own])


def no_place(backbone: Backbone, point: str, reason: str) -> UserError:
    """The error for a point that a network does not offer."""
    return UserError(
        f"{backbone.tag} has no place for adapters at {point}: {reason}. Choose a timm ViT (for "
        "example backbone=vit_b16_in1k), or, where the strategy takes adapter=..., another kind or "
        "other points"
    )


def call_qkv(net: nn.Module, path: str, acts: Callable[[], bool]) -> None:
    """Let the attention of BEiT and EVA call its layer `qkv` while an adapter at `path` acts.

    timm computes `F.linear(x, qkv.weight, bias)` there, with a bias of its own, and has a switch to
    call the layer and add the bias afterwards: the same up to rounding.
    """
    owner: Any = net.get_submodule(path.rpartition(".")[0])
    if not path.endswith(".qkv") or getattr(owner, "qkv_bias_separate", None) is not False:
        return

    def switch(*_: Any) -> None:
        owner.qkv_bias_separate = acts()

    owner.register_forward_pre_hook(switch)


def _only(acting: Any, point: str, act: Callable[[Any], Any], otherwise: Any) -> Any:
    if not acting:
        return otherwise
    if len(acting) > 1 or acting[0][1] != 1:
        raise NotSummable(f"{point}: adapters of this kind cannot be summed; use one set")
    return act(acting[0][0])


def _places(adapter: Adapter) -> list[str]:
    """The kinds of points whose method an adapter has, see the table in `adapter.py`."""
    if isinstance(adapter, Rows):
        return ["keys"]
    if isinstance(adapter, Prompt):
        return ["tokens"]
    kind = type(adapter)
    adds = kind.forward is not Adapter.forward
    serves = {
        "parallel": adds or kind.add is not Adapter.add,
        "out": adds or kind.add is not Adapter.add or kind.after is not Adapter.after,
        "in": adds or kind.before is not Adapter.before,
    }
    return [place for place, served in serves.items() if served]


def _names(net: nn.Module) -> list[str]:
    return [name for name, _ in net.named_modules()]


def _is_block(block: nn.Module) -> bool:
    from timm.models.vision_transformer import Block

    return isinstance(block, Block)


def _has_plain_attention(block: nn.Module) -> bool:
    from timm.models.vision_transformer import Attention

    attention = getattr(block, "attn", None)
    return type(attention) is Attention and getattr(attention, "gate", None) is None
