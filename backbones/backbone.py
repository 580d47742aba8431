"""A pretrained network behind one interface; normalisation is its first layer."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from driftline.backbones.feature_store import FeatureStore
from driftline.core import distributed
from driftline.core.errors import UserError
from driftline.core.exact import content
from driftline.core.seed import standing


class Passes:
    """Images that went forward and backward; copies of a backbone count into the same one."""

    def __init__(self) -> None:
        self.forward = 0
        self.backward = 0
        self.recalled = 0  # images whose answer came from a feature store

    def __deepcopy__(self, memo: dict[int, Any]) -> Passes:
        return self

    def count(self, images: int, out: Tensor) -> Tensor:
        images = distributed.full_batch_size(images)
        self.forward += images
        if out.requires_grad:
            out.register_hook(lambda grad: self._backward(images))
        return out

    def _backward(self, images: int) -> None:
        self.backward += images


class Backbone(nn.Module):
    """Images in [0, 1] to features or to the scores of the pretrained head.

    Args:
        net: a classifier; timm models (`forward_features`/`forward_head`) give features directly,
            for any other network the input of its last linear layer is taken.
        name: short name used in folders and tables.
        tag: full identity of the weights, `architecture.tag`.
        mean, std: per channel, in units of the [0, 1] image; None means no normalisation.
        input_size: side in pixels that the weights were trained for.
        classes: labels of the head in order, or None if the head has no agreed label space.

    `low` is the type that passes without gradients compute in, `torch.bfloat16` or `torch.float16`;
    None leaves them in the type of the weights. Copies have it too. It is set by `precision=bf16`
    and `precision=fp16`; features and scores are float32 either way. With `checks_images` the first
    batch must be in [0, 1]; it is set for networks of the library, whose images no stream made.
    """

    net: Any  # a network of whatever library
    mean: Tensor | None
    std: Tensor | None
    low: torch.dtype | None = None
    checks_images: bool = False

    def __init__(
        self,
        net: nn.Module,
        *,
        name: str = "custom",
        tag: str = "custom",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_size: int = 224,
        interpolation: str = "bicubic",
        classes: str | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.name, self.tag = name, tag
        self.input_size, self.interpolation, self.classes = input_size, interpolation, classes
        self.passes = Passes()
        self.store: FeatureStore | None = None  # of runs, for answers that cannot change
        self._one_pass: bool | None = None  # gives features and logits; None: not tried yet
        _check_normalization(mean, std)
        for key, value in (("mean", mean), ("std", std)):
            stored = None if value is None else torch.tensor(value).view(1, -1, 1, 1)
            self.register_buffer(key, stored, persistent=False)

    @property
    def head(self) -> nn.Linear | None:
        """The linear layer that gives the scores, or None without one."""
        if hasattr(self.net, "get_classifier"):  # timm; the last linear layer need not be it
            layer = self.net.get_classifier()
            return layer if isinstance(layer, nn.Linear) else None
        linear = [m for m in self.net.modules() if isinstance(m, nn.Linear)]
        last = linear[-1] if linear else None
        return last if last is not None and self.num_classes == last.out_features else None

    @property
    def num_classes(self) -> int:
        """Outputs of the pretrained head; 0 without one."""
        known = getattr(self.net, "num_classes", None)
        if isinstance(known, int):
            return known
        linear = [m for m in self.net.modules() if isinstance(m, nn.Linear)]
        return linear[-1].out_features if linear else 0

    def keep_outputs(self, kept: Sequence[int]) -> None:
        """Leave those outputs of the head alone, in this order: its scores are [B, len(kept)].

        Raises:
            UserError: without a linear head.
        """
        head = self.head
        if head is None:
            raise UserError(
                f"{self.tag}: the scores of {len(kept)} of {self.num_classes} classes are wanted, "
                "and there is no linear layer at its end to take them from"
            )
        rows = torch.tensor(kept, device=head.weight.device)
        for name in ("weight", "bias"):
            old = getattr(head, name)
            if old is not None:
                new = nn.Parameter(old.detach()[rows].clone(), requires_grad=old.requires_grad)
                setattr(head, name, new)
        head.out_features = len(kept)
        if isinstance(getattr(self.net, "num_classes", None), int):
            self.net.num_classes = len(kept)

    @property
    def dim(self) -> int:
        """Length of the feature vector."""
        known = getattr(self.net, "num_features", None)
        if isinstance(known, int):
            return int(getattr(self.net, "head_hidden_size", None) or known)
        head = self.head
        if head is None:
            raise ValueError(f"{self.tag}: cannot tell the feature size without a linear head")
        return head.in_features

    @property
    def width(self) -> int:
        """Length of a token between the blocks of a transformer; `dim` where nothing else is known.

        A projection behind the last block makes the two differ.
        """
        known = getattr(self.net, "embed_dim", None)
        return known if isinstance(known, int) and hasattr(self.net, "blocks") else self.dim

    def read_out(self, tokens: Tensor) -> Tensor:
        """What the head reads [..., D] of the token that the last norm gives, [..., width]."""
        return tokens

    def weights(self) -> dict[str, Tensor]:
        """All that the scores follow from, by name, for `weights_hash`."""
        return self.net.state_dict()

    @property
    def provides(self) -> frozenset[str]:
        """Facts that a strategy's `needs` are compared with."""
        facts = {"features"}
        if self.num_classes:
            facts.add("head")
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.net.modules()):
            facts.add("batch_norm")
        if hasattr(self.net, "blocks") and hasattr(self.net, "patch_embed"):
            facts.add("blocks")
        return frozenset(facts)

    def normalize(self, x: Tensor) -> Tensor:
        """`(x - mean) / std` for x float [B, 3, H, W] in [0, 1]."""
        if self.mean is None or self.std is None:
            return x
        return (x - self.mean) / self.std

    @distributed.shared()
    def features(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, D], what the pretrained head reads."""
        if hasattr(self.net, "forward_head"):
            with self.passing(x) as normal:
                tokens = self.net.forward_features(normal)
                out = self.net.forward_head(tokens, pre_logits=True)
            return self.passes.count(len(x), self.raised(out))
        head = self.head
        if head is None:
            raise ValueError(f"{self.tag}: no linear head whose input could serve as feature")
        with _read_by(head) as seen, self.passing(x) as normal:
            self.net(normal)
        return self.passes.count(len(x), self.raised(seen[0]))

    @distributed.shared()
    def logits(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, C], scores of the pretrained head."""
        with self.passing(x) as normal:
            out = self.net(normal)
        return self.passes.count(len(x), self.raised(scores_of(out, self.tag)))

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the head reads [B, D] and what it says [B, C], from one pass.

        Raises:
            UserError: without a head that is applied to one vector an image.
        """
        head, seen = self.head, []
        if head is not None:
            with _read_by(head) as seen:
                scores = self.logits(x)
            if len(seen) == 1 and seen[0].shape[:-1] == x.shape[:1]:
                return self.raised(seen[0]), scores
        shapes = [tuple(one.shape) for one in seen]
        raise UserError(
            f"one feature vector per image is needed at the head of {self.tag}; for {len(x)} "
            f"images it read {shapes or 'none'}. Use another backbone"
        )

    def frozen_copy(self) -> Backbone:
        """A copy that stays as this network is now, with a store if this one has one."""
        copy = deepcopy(self).requires_grad_(False)
        copy.store = None if self.store is None else self.store.another()
        return copy

    @torch.no_grad()
    def frozen_features(self, x: Tensor) -> Tensor:
        """`features` of a network that nothing moves; see `store`."""
        return self._frozen(x, "features")[0]

    @torch.no_grad()
    def frozen_logits(self, x: Tensor) -> Tensor:
        """`logits` of a network that nothing moves; see `store`."""
        return self._frozen(x, "logits")[0]

    @torch.no_grad()
    def frozen_features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`features_and_logits` of a network that nothing moves; see `store`."""
        features, scores = self._frozen(x, "features", "logits")
        return features, scores

    def _frozen(self, x: Tensor, *wanted: str) -> tuple[Tensor, ...]:
        """From the store where it has them; else from one pass, which is stored."""
        if self.store is None or (network := self.store.digest(self)) is None:
            return self._passed(x, wanted)
        key = self.store.key(network, x)
        if (stored := self.store.find(key, wanted)) is not None:
            self.passes.recalled += len(x)
            return tuple(stored[name].to(x.device) for name in wanted)
        names = ("features", "logits") if self._one_pass else wanted
        drawn = standing()
        tensors = dict(zip(names, self._passed(x, names), strict=True))
        if standing() == drawn and self.store.digest(self) == network:
            if self._one_pass is None:
                tensors |= self._both(x)
            self.store.add(key, tensors)
        return tuple(tensors[name] for name in wanted)

    def _passed(self, x: Tensor, wanted: tuple[str, ...]) -> tuple[Tensor, ...]:
        """One pass of the network for features, logits or both."""
        if wanted == ("features",):
            return (self.features(x),)
        return (self.logits(x),) if wanted == ("logits",) else self.features_and_logits(x)

    def _both(self, x: Tensor) -> dict[str, Tensor]:
        """Features and logits where the head reads what `features` gives, bit by bit; else none."""
        before, both = self.passes.forward, {}
        with suppress(UserError):
            both = dict(zip(("features", "logits"), self.features_and_logits(x), strict=True))
        self._one_pass = bool(both) and torch.equal(both["features"], self.features(x))
        self.passes.forward = before
        return both if self._one_pass else {}

    @contextmanager
    def passing(self, x: Tensor) -> Generator[Tensor]:
        """Around a pass of the network: the images `x`, normalised, in its precision (`lowered`).

        Raises:
            UserError: as `sized`.
        """
        with self.sized(x):
            normal = self.normalize(x)
            with self.lowered(normal):
                yield normal

    def lowered(self, x: Tensor) -> AbstractContextManager[Any]:
        """Around a pass of images `x`: autocast to `low`, if this pass records no gradients."""
        if self.low is None or torch.is_grad_enabled():
            return nullcontext()
        return torch.autocast(x.device.type, self.low)

    def raised(self, out: Tensor) -> Tensor:
        """What a pass inside `lowered` returned, in float32 if it is of the type `low`."""
        return out.float() if out.dtype == self.low else out

    @contextmanager
    def sized(self, x: Tensor) -> Generator[None]:
        """What a network says to images that it cannot take, as an error that says what to do.

        Raises:
            UserError: for no batch of images; where the pass inside fails on images that are not
                `input_size` square; in inference mode, where gradients are asked for.
        """
        if torch.is_inference_mode_enabled() and torch.is_grad_enabled():
            raise UserError(
                "this method learns from the images, and torch.inference_mode() lets nothing "
                "learn: call adapt outside of it (torch.no_grad() does no harm)"
            )
        if self.checks_images and not self.passes.forward:
            _check_images(x)
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            if fault := _fault(x, self.net):
                raise UserError(f"{fault} ({reason})") from error
            own, height, width = self.input_size, *x.shape[-2:]
            if isinstance(error, TypeError) or height == width == own:
                raise
            raise UserError(
                f"{self.tag} fails on images of {height} x {width} pixels ({reason}). Its "
                f"input_size is {own}: give it images of that size, in a run by "
                f"scenario.resize={own}, or set backbone.input_size={height} where the backbone "
                "has that option"
            ) from error

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x)


@contextmanager
def _read_by(layer: nn.Module) -> Generator[list[Tensor]]:
    """What a layer reads inside, call by call."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def _check_normalization(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Refuse constants that no images in [0, 1] have.

    Raises:
        UserError: naming the one that is wrong.
    """
    if (mean is None) != (std is None):
        given, absent = ("std", "mean") if mean is None else ("mean", "std")
        raise UserError(f"{given} is given and {absent} is not: normalisation needs both")
    for key, values in (("mean", mean), ("std", std)):
        if values is None:
            continue
        if len(values) not in (1, 3) or not all(0 <= v <= 1 for v in values):
            raise UserError(
                f"{key} must be three numbers for images in [0, 1], got {list(values)}; those for "
                "0 ... 255 are divided by 255"
            )
        if key == "std" and not all(values):
            raise UserError(f"std divides the images: it must be above 0, got {list(values)}")


_FORM = "images must be a float tensor [B, 3, H, W] in [0, 1], got"


def _check_images(x: Any) -> None:
    """Refuse what is no batch, and images in another unit; resampling leaves [0, 1] by less.

    Raises:
        UserError: naming type and shape, or the range.
    """
    _check_form(x)
    low, high = x.min().item(), x.max().item()
    if low < -0.8 or high > 2:
        raise UserError(
            f"images must be in [0, 1], and these are in [{low:.3g}, {high:.3g}]. Divide those in "
            "0 ... 255 by 255; leave Normalize out of the transforms and give its mean= and std= "
            "to driftline.make, for methods work on the images themselves"
        )


def _check_form(x: Any) -> None:
    """Refuse what is no batch of images.

    Raises:
        UserError: naming type and shape.
    """
    if not isinstance(x, Tensor):
        raise UserError(f"{_FORM} {type(x).__name__}")
    if not x.is_floating_point() or x.ndim != 4 or not len(x):
        raise UserError(f"{_FORM} {x.dtype} {list(x.shape)}")


def _fault(x: Any, net: nn.Module) -> str | None:
    """What is wrong with a batch of images for any network, or None."""
    try:
        _check_form(x)
    except UserError as error:
        return str(error)
    if x.shape[1] != 3:
        return f"{_FORM} {x.dtype} {list(x.shape)}"
    weight = next(net.parameters(), x)
    cast = torch.is_autocast_enabled(x.device.type)
    if x.device != weight.device or (x.dtype != weight.dtype and not cast):
        return (
            f"the images are {x.dtype} on {x.device} and the weights {weight.dtype} on "
            f"{weight.device}: call images.to(...) or net.to(...) first"
        )
    return None


def scores_of(out: Any, tag: str) -> Tensor:
    """The scores [B, C] among what a network returns.

    Networks with auxiliary heads return tuples while they train (Inception, GoogLeNet), those of
    transformers an object with `logits`, or a mapping.

    Raises:
        UserError: where there are none.
    """
    scores = out
    if isinstance(out, Mapping):
        scores = out.get("logits")
    elif not isinstance(out, Tensor):
        scores = getattr(out, "logits", None)
        if scores is None and isinstance(out, tuple | list) and len(out):
            scores = out[0]
    if isinstance(scores, Tensor) and scores.ndim == 2:
        return scores
    if isinstance(out, Tensor):
        what = f"a tensor of shape {list(out.shape)}"
    elif isinstance(out, Mapping):
        what = f"a mapping with the keys {', '.join(map(str, out))}"
    else:
        what = type(out).__name__
    raise UserError(
        f"{tag} returns {what}, not scores [B, C] of an image classifier. Wrap it in a module "
        "whose forward returns these alone"
    )


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """First 16 hex digits of SHA-256 over names, shapes and bytes, independent of order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(content(tensor))
    return digest.hexdigest()[:16]
