"""Zero-shot classifiers: the image tower of CLIP, its scores cosines with the texts of classes.

Source: Radford et al., ICML 2021, arxiv.org/abs/2103.00020; towers and texts by the package
open_clip (github.com/mlfoundations/open_clip). A class is the mean of the normalised embeddings of
its texts, normalised again, as in their `build_zero_shot_classifier`; the score is the learned
scale (100 in the published weights) times the cosine. No text is trained.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import driftline.core.vision  # isort: skip
import driftline.backbones.without_wandb  # noqa: F401  # isort: skip

import torch
import torch.nn.functional as F
from annotated_types import MinLen
from timm.data import ImageNetInfo
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.backbones.checkpoints import load_strict, load_tensors, reason_of
from driftline.backbones.load import (
    RANDOM,
    check_key,
    fixed_seed,
    hub_file,
    label,
    network_timeout,
    normalization,
    timm_backbone,
    unreachable,
)
from driftline.core import distributed
from driftline.core.errors import UserError, suggest
from driftline.core.ranges import PlainName, Positive, Size
from driftline.core.stream import Labels

WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # in OpenAI's files
CLOSE = 1e-3  # how far the embeddings of two towers may be apart that compute the same


class TextHead(nn.Linear):
    """Rows that are no parameters: nothing trains them, whatever a method switches on."""

    weight: Tensor  # type: ignore[assignment]

    def __init__(self, rows: Tensor) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = rows.shape
        self.register_buffer("weight", rows, persistent=False)
        self.register_parameter("bias", None)


class ZeroShot(Backbone):
    """An image tower with a fixed head of texts.

    Features are image embeddings of length 1, so that the head is linear, as methods that read it
    or its input (T3A, NEO, LAME) need it.

    Args:
        net: the tower with its projection, images [B, 3, H, W] to embeddings [B, D].
        texts: [C, D], one row a class, of any length; None: no head.
        scale: of the cosines.
        dim: length D.
        facts: as of `Backbone`.
    """

    def __init__(
        self, net: nn.Module, texts: Tensor | None, *, scale: float, dim: int, **facts: Any
    ) -> None:
        super().__init__(net, **facts)
        self._dim = dim
        rows = None if texts is None else scale * F.normalize(texts.float(), dim=1)
        self.text = None if rows is None else TextHead(rows)

    @property
    def head(self) -> nn.Linear | None:
        return self.text

    @property
    def num_classes(self) -> int:
        return 0 if self.text is None else self.text.out_features

    @property
    def dim(self) -> int:
        return self._dim

    def keep_outputs(self, kept: Sequence[int]) -> None:
        assert self.text is not None
        self.text = TextHead(self.text.weight[list(kept)].clone())

    def weights(self) -> dict[str, Tensor]:
        own = self.net.state_dict()
        return own if self.text is None else own | {"text": self.text.weight}

    def read_out(self, tokens: Tensor) -> Tensor:
        """What the head reads [..., D] of the token that the last norm gives, [..., width]."""
        return F.normalize(self.net.head(self.net.fc_norm(tokens)), dim=-1)

    def _embed(self, x: Tensor) -> Tensor:
        with self.passing(x) as normal:
            out = self.net(normal)
        out = out[0] if isinstance(out, tuple) else out  # CoCa gives its tokens, too
        return self.passes.count(len(x), F.normalize(self.raised(out), dim=1))

    @distributed.shared()
    def features(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, D], image embeddings of length 1."""
        return self._embed(x)

    @distributed.shared()
    def logits(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, C], scale times cosine.

        Raises:
            UserError: without texts.
        """
        if self.text is None:
            raise UserError(f"{self.tag} has no texts of classes, so it gives no scores")
        return self.text(self._embed(x))


# ---------------------------------------------------------------- classes and templates


def class_list(
    class_names: list[str] | str | None, labels: Labels | None
) -> tuple[list[str], str | None]:
    """Names of the classes in their order, and their label space; no names: no head.

    Args:
        class_names: the setting: names, a text file with one a line, or None: those of the stream.
        labels: of the stream.

    Raises:
        UserError: where there are none that can be read, or another number than classes.
    """
    if class_names is None:
        if labels is None:
            return [], None
        return _readable(labels), labels.space
    if isinstance(class_names, str):
        class_names = _lines(class_names, "backbone.class_names", "a class")
    if labels is not None and labels.names and len(class_names) != len(labels.names):
        raise UserError(
            f"backbone.class_names has {len(class_names)} names, and the scenario "
            f"{len(labels.names)} classes ({', '.join(labels.names[:3])} ...): give one a class, "
            "in their order"
        )
    return list(class_names), None if labels is None else labels.space


def _lines(path: str, setting: str, what: str) -> list[str]:
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{setting}={path}: no such file; give a text file with {what} a line")
    lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{setting}={path} is empty; it must hold {what} a line")
    return lines


def _readable(labels: Labels) -> list[str]:
    """Names of classes as one would write them: synsets by their names, `alarm_clock` as words."""
    if labels.space == "imagenet1k":
        return list(open_clip().IMAGENET_CLASSNAMES)
    names = labels.names
    if not names or any(re.fullmatch(r"[\W\d_]+", name) for name in names):
        raise UserError(
            f"the classes of this scenario have numbers for names ({', '.join(names[:3])} ...): "
            "set backbone.class_names to their names, a list or a text file with a class a line"
        )
    known = dict(zip(_synsets(), open_clip().IMAGENET_CLASSNAMES, strict=True))
    if unknown := [n for n in names if re.fullmatch(r"n\d{8}", n) and n not in known]:
        raise UserError(
            f"class {unknown[0]!r} is a synset id outside of ImageNet-1k: set backbone.class_names "
            "to the names of the classes"
        )
    return [known.get(n) or re.sub(r"^\d+[._]", "", n).replace("_", " ") for n in names]


def _synsets() -> list[str]:
    return [str(name) for name in ImageNetInfo().label_names()]


def template_list(templates: list[str] | str) -> list[Any]:
    """Texts with {} for the class; `openai` are the 80 of Radford et al., `simple` 7 of them.

    Raises:
        UserError: for a file that is not there, or a text without {}.
    """
    if templates == "openai":
        return list(open_clip().OPENAI_IMAGENET_TEMPLATES)
    if templates == "simple":
        return list(open_clip().SIMPLE_IMAGENET_TEMPLATES)
    if isinstance(templates, str):
        templates = _lines(templates, "backbone.templates", "a template")
    for text in templates:
        if text.replace("{}", "", 1).count("{") or text.count("{}") != 1:
            raise UserError(
                f"backbone.templates: {text!r} must hold {{}} once, in place of the class: "
                "'a photo of a {}.'"
            )
    return templates


# ---------------------------------------------------------------- open_clip


@cache
def open_clip() -> Any:
    """The package.

    Raises:
        UserError: if it is not installed.
    """
    try:
        return importlib.import_module("open_clip")
    except ModuleNotFoundError as error:
        raise UserError(
            f'backbone=clip needs the package {error.name}: pip install "driftline[clip]". '
            "Without it, backbone=clip_timm takes the texts from a file"
        ) from error


@contextmanager
def _quiet() -> Generator[None]:
    """Without the package's notes on every step of loading."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def clip_backbone(
    *,
    name: PlainName,
    arch: str,
    weights: str,
    checkpoint: str | None,
    checkpoint_key: str | None,
    normalize: Literal["checkpoint", "none", "imagenet"],
    class_names: Annotated[list[str], MinLen(1)] | str | None,
    templates: Annotated[list[str], MinLen(1)] | str,
    labels: Labels | None = None,
) -> ZeroShot:
    """A CLIP of open_clip as a zero-shot classifier.

    Args:
        name: short name for folders and tables.
        arch: open_clip's name, as in `open_clip.list_models()`, or a .json file with such settings.
        weights: open_clip's name of the weights, which also fixes the activation and the constants.
        checkpoint: None takes the published weights from the hub's cache or downloads them; else a
            file of both towers in open_clip's naming, or `random`.
        checkpoint_key: as in `timm_backbone`.
        normalize: as in `timm_backbone`.
        class_names: names in the order of the classes, a text file with one a line, or None: those
            of the stream.
        templates: texts with {}, a text file with one a line, `openai` (80) or `simple` (7).
        labels: of the stream; None: no head, for methods that learn their classes.

    Raises:
        UserError: for unknown names, files that do not fit, weights that cannot be downloaded, and
            without the package.
    """
    check_key(checkpoint_key, checkpoint)
    package = open_clip()
    texts = template_list(templates)
    names, space = class_list(class_names, labels)
    if arch.endswith(".json"):
        if not Path(arch).is_file():
            raise UserError(f"backbone.arch={arch}: no such file")
        package.add_model_config(Path(arch))
        arch = Path(arch).stem
    config = package.get_model_config(arch)
    if config is None:
        near = suggest(arch, package.list_models())
        raise UserError(f"backbone.arch={arch!r}: open_clip has no such network{near}")
    published = package.get_pretrained_cfg(arch, weights)
    if not published and checkpoint is None:
        tags = ", ".join(package.list_pretrained_tags_by_model(arch)) or "none"
        raise UserError(f"backbone.weights={weights!r}: open_clip's {arch} has the weights {tags}")
    quick = bool(published.get("quick_gelu") or config.get("quick_gelu"))
    tag = f"open_clip/{arch}.{weights}"
    with fixed_seed(), _quiet():
        try:
            model = package.create_model(arch, force_quick_gelu=quick, pretrained_text=False).eval()
            tokenize = package.get_tokenizer(arch) if names else None
        except (OSError, ImportError, RuntimeError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"backbone.arch={arch}: open_clip cannot make it ({reason_of(error)})"
            ) from error
    if checkpoint != RANDOM:
        file = checkpoint or _download(published, tag)
        _fill(model, load_tensors(file, checkpoint_key), file)
    with fixed_seed(), torch.no_grad():
        rows = _rows(package, model, tokenize, names, texts) if names else None
        net, dim = image_tower(model.visual, config, quick)
    images = model.visual.preprocess_cfg
    size = model.visual.image_size
    return ZeroShot(
        net,
        rows,
        scale=float(model.logit_scale.detach().exp()),
        dim=dim,
        name=name,
        tag=label(f"open_clip/{arch}" if checkpoint == RANDOM else tag, checkpoint),
        input_size=size[0] if isinstance(size, tuple | list) else size,
        interpolation=published.get("interpolation") or images["interpolation"],
        classes=space,
        **normalization(
            normalize,
            published.get("mean") or images["mean"],
            published.get("std") or images["std"],
        ),
    ).eval()


def _rows(package: Any, model: Any, tokenize: Any, names: list[str], texts: list[Any]) -> Tensor:
    """Normalised means of the texts' embeddings [C, D], computed on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    rows = package.build_zero_shot_classifier(
        model,
        tokenize,
        names,
        texts,
        num_classes_per_batch=max(1, 256 // len(texts)),
        device=device,
    )
    model.to("cpu")
    return rows.T.contiguous().cpu()


def _download(published: dict[str, Any], tag: str) -> str:
    """Path of the published weights, from the cache if they are there."""
    repo, _, file = str(published.get("hf_hub", "")).rpartition("/")
    if repo:
        return hub_file(repo, tag, (file,) if file else WEIGHT_FILES)
    try:
        with network_timeout():
            return open_clip().download_pretrained(published)
    except (OSError, RuntimeError) as error:
        raise unreachable(tag, str(published.get("url")), reason_of(error)) from error


def _fill(model: Any, tensors: dict[str, Tensor], file: str) -> None:
    """Load both towers strictly, in the layouts of file that open_clip knows."""
    convert = importlib.import_module("open_clip.convert").convert_state_dict
    with_text = importlib.import_module("open_clip.model").convert_to_custom_text_state_dict
    tensors = convert(model, tensors)
    tensors = {k: v for k, v in tensors.items() if k not in NOT_WEIGHTS}
    if "positional_embedding" in tensors and not hasattr(model, "positional_embedding"):
        tensors = with_text(tensors)
    own = model.state_dict()
    for name in ("logit_scale", "logit_bias"):
        if name in tensors and name in own:
            tensors[name] = tensors[name].reshape(own[name].shape)
    tensors.pop("text.transformer.embeddings.position_ids", None)
    load_strict(model, tensors, file)


def image_tower(visual: Any, config: dict[str, Any], quick: bool) -> tuple[nn.Module, int]:
    """An image tower of open_clip and the length of its embeddings.

    A vision transformer becomes one of timm with the same weights, so that adapters find its
    blocks, if both give the same embeddings of a random image; anything else stays as it is.
    """
    trunk = getattr(visual, "trunk", None)
    with torch.no_grad():
        image = torch.rand(1, 3, *_pair(visual.image_size))
        wanted = visual(image)
        wanted = wanted[0] if isinstance(wanted, tuple) else wanted
        made = _of_trunk(visual) if trunk is not None else _as_timm(visual, config, quick)
        if made is not None and torch.allclose(made(image), wanted, rtol=CLOSE, atol=CLOSE):
            return made.eval(), wanted.shape[1]
    return visual.eval(), wanted.shape[1]


def _pair(size: Any) -> tuple[int, int]:
    return tuple(size) if isinstance(size, tuple | list) else (size, size)


def _of_trunk(visual: Any) -> nn.Module | None:
    """A tower of timm, with open_clip's projection in the place of its head."""
    layers = [m for m in visual.head if not isinstance(m, nn.Dropout | nn.Identity)]
    if not layers:
        return visual.trunk
    if len(layers) == 1 and isinstance(getattr(visual.trunk, "head", None), nn.Identity):
        visual.trunk.head = layers[0]
        return visual.trunk
    return None


def _as_timm(visual: Any, config: dict[str, Any], quick: bool) -> nn.Module | None:
    """timm's vision transformer with the weights of open_clip's; None if it has no such part."""
    vision, width = config["vision_cfg"], getattr(visual, "class_embedding", torch.empty(0)).numel()
    if not width or getattr(visual, "proj", None) is None:
        return None
    net = VisionTransformer(
        img_size=visual.image_size,
        patch_size=visual.patch_size,
        embed_dim=width,
        depth=len(visual.transformer.resblocks),
        num_heads=width // vision.get("head_width", 64),
        mlp_ratio=vision.get("mlp_ratio", 4.0),
        num_classes=visual.proj.shape[1],
        pre_norm=isinstance(visual.ln_pre, nn.LayerNorm),
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
        act_layer="quick_gelu" if quick else "gelu",
        init_values=vision.get("ls_init_value"),
    )
    named = {f"visual.{k}": v for k, v in visual.state_dict().items()}
    try:
        net.load_state_dict(checkpoint_filter_fn(named, net))
    except RuntimeError:
        return None
    return net.eval()


# ---------------------------------------------------------------- timm's towers


def timm_clip_backbone(
    *,
    name: PlainName,
    tag: str,
    checkpoint: str | None,
    checkpoint_key: str | None,
    normalize: Literal["checkpoint", "none", "imagenet"],
    input_size: Size | None,
    text: str | None,
    scale: Positive,
    labels: Labels | None = None,
) -> ZeroShot:
    """An image tower of timm, with texts from a file.

    Args:
        tag: `architecture.tag`, such as `vit_base_patch16_clip_224.openai`; its head is the
            projection.
        text: a file that holds one matrix [C, D], the embeddings of the classes in their order.
            None: no head, for methods that learn their classes.
        scale: of the cosines; 100 in CLIP's weights.
        name, checkpoint, checkpoint_key, normalize, input_size: as in `timm_backbone`.
        labels: of the stream.

    Raises:
        UserError: as for `timm_backbone`; for a file of texts that does not fit.
    """
    tower = timm_backbone(
        name=name,
        tag=tag,
        checkpoint=checkpoint,
        checkpoint_key=checkpoint_key,
        normalize=normalize,
        classes=None,
        num_classes=None,
        input_size=input_size,
    )
    dim = tower.num_classes or tower.dim
    rows = None
    if labels is not None:
        if text is None:
            raise UserError(
                "backbone.text is missing: a file with the embeddings of the classes, [C, D] "
                "(docs/tutorials/own_data.md makes one), or backbone=clip, which makes them"
            )
        rows = _text_file(text, dim, len(labels.names), tower.tag)
    return ZeroShot(
        tower.net,
        rows,
        scale=scale,
        dim=dim,
        name=name,
        tag=f"{tower.tag}+text",
        input_size=tower.input_size,
        interpolation=tower.interpolation,
        classes=None if labels is None else labels.space,
        mean=None if tower.mean is None else tower.mean.flatten().tolist(),
        std=None if tower.std is None else tower.std.flatten().tolist(),
    ).eval()


def _text_file(path: str, dim: int, classes: int, tag: str) -> Tensor:
    """[C, D] of a file.

    Raises:
        UserError: for anything but one matrix of that shape.
    """
    tensors = load_tensors(path, setting="backbone.text")
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if len(tensors) != 1 or len(next(iter(shapes.values()))) != 2:
        raise UserError(f"backbone.text={path} must hold one matrix [classes, {dim}], not {shapes}")
    rows = next(iter(tensors.values()))
    if rows.shape[1] != dim:
        raise UserError(
            f"backbone.text={path} holds embeddings of length {rows.shape[1]}, and {tag} gives "
            f"{dim}: the texts are of another CLIP"
        )
    if classes and len(rows) != classes:
        raise UserError(
            f"backbone.text={path} holds {len(rows)} classes, and the scenario has {classes}: it "
            "must hold one row a class, in their order"
        )
    return rows
