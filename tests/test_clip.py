"""Zero-shot classifiers: towers of CLIP with a fixed head of texts, and methods on them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import TensorDataset

import driftline
from driftline.backbones import clip
from driftline.backbones.backbone import weights_hash
from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.core.stream import Labels

CONF = Path(__file__).parents[1] / "conf" / "backbone"
LABELS = Labels("embedded", ("red disc", "blue ring", "striped square"))
TOWER = "vit_base_patch16_clip_quickgelu_224.openai"


def config(name: str, labels: Labels | None = LABELS, **changes: Any) -> clip.ZeroShot:
    node = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), changes)
    return build(node, at="backbone", labels=labels)


def images(count: int, side: int = 32) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tower of timm of CLIP's kind that is small: 32 px, width 48, embeddings of length 24."""
    create = timm.create_model
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    monkeypatch.setattr(
        timm, "create_model", lambda arch, **o: create(arch, **o | small | {"num_classes": 24})
    )


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """A file of three embeddings of length 24."""
    rows = torch.randn(3, 24, generator=torch.Generator().manual_seed(2))
    safetensors.torch.save_file({"text": rows}, tmp_path / "texts.safetensors")
    return str(tmp_path / "texts.safetensors")


def timm_clip(texts: str | None, labels: Labels | None = LABELS, **changes: Any) -> clip.ZeroShot:
    return config("clip_timm", labels, checkpoint="random", text=texts, input_size=32, **changes)


# ---------------------------------------------------------------- towers of timm, texts of a file


def test_scores_are_scaled_cosines_with_the_texts(tower: None, texts: str) -> None:
    backbone, x = timm_clip(texts, scale=50.0), images(2)
    rows = safetensors.torch.load_file(texts)["text"]
    with torch.no_grad():
        embeddings = backbone.net(backbone.normalize(x))
        wanted = 50 * F.cosine_similarity(embeddings[:, None], rows[None], dim=2)
        torch.testing.assert_close(backbone.logits(x), wanted)
        features = backbone.features(x)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
        assert backbone.head is not None
        torch.testing.assert_close(backbone.head(features), wanted)
    assert (backbone.dim, backbone.width, backbone.num_classes) == (24, 48, 3)
    assert backbone.classes == "embedded" and backbone.provides == {"features", "head", "blocks"}
    assert backbone.mean is not None and backbone.mean[0, 0].item() == pytest.approx(0.48145466)


def test_texts_are_never_trained_and_always_counted(tower: None, texts: str) -> None:
    backbone = timm_clip(texts).requires_grad_(True)
    assert not any(name.startswith("text") for name, _ in backbone.named_parameters())
    before = weights_hash(backbone.weights())
    assert before == weights_hash(timm_clip(texts).weights())
    assert before != weights_hash(timm_clip(texts, scale=50.0).weights())
    backbone.keep_outputs([2, 0])
    rows = F.normalize(safetensors.torch.load_file(texts)["text"], dim=1)
    assert backbone.head is not None and backbone.num_classes == 2
    torch.testing.assert_close(backbone.head.weight, 100 * rows[[2, 0]])
    assert backbone.net.num_classes == 24  # the projection is as it was


def test_files_of_texts_that_do_not_fit_are_refused(
    tower: None, texts: str, tmp_path: Path
) -> None:
    other = str(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="backbone.text is missing.*backbone=clip"):
        timm_clip(None)
    safetensors.torch.save_file({"text": torch.ones(3, 7)}, other)
    with pytest.raises(UserError, match="of length 7, and .* gives 24: .* another CLIP"):
        timm_clip(other)
    with pytest.raises(UserError, match="holds 3 classes, and the scenario has 2"):
        timm_clip(texts, Labels("own", ("a", "b")))
    safetensors.torch.save_file({"a": torch.ones(3, 24), "b": torch.ones(1)}, other)
    with pytest.raises(UserError, match=r"must hold one matrix \[classes, 24\]"):
        timm_clip(other)
    with pytest.raises(UserError, match="backbone.text='absent': there is no such file"):
        timm_clip("absent")


NORM = {"layers": "norm"}  # LayerNorm: there is no BatchNorm
TTA: dict[str, dict[str, Any]] = {
    "tent": NORM, "sar": NORM, "eata": NORM, "deyo": NORM, "t3a": {}, "neo": {}, "lame": {},
    "zerosiam": {}, "cotta": {}, "memo": {"views": 2}, "spa": {},
}  # fmt: skip


@pytest.mark.parametrize("name", TTA)
def test_adaptation_works_on_zero_shot_classifiers(tower: None, texts: str, name: str) -> None:
    backbone = timm_clip(texts)
    assert backbone.text is not None
    rows = backbone.text.weight.clone()
    method: Any = driftline.make(name, backbone, **TTA[name])
    if method.preparation() is not None:
        driftline.prepare(method, TensorDataset(images(4), torch.arange(4) % 3))
    scores = [method.adapt(images(4)) for _ in range(2)]
    assert all(s.shape == (4, 3) and torch.isfinite(s).all() for s in scores)
    torch.testing.assert_close(backbone.text.weight, rows)
    learned = {id(p) for p in method.updated_parameters()}
    norms = [p for n, p in backbone.net.named_parameters() if "norm" in n]
    if name in ("tent", "sar", "eata"):
        assert learned and learned <= {id(p) for p in norms}


def test_forward_passes_alone_read_the_token_before_the_projection(tower: None, texts: str) -> None:
    pytest.importorskip("cma")
    method: Any = driftline.make("foa", timm_clip(texts), prompts=2, population=4)
    x = images(4)
    with torch.no_grad():
        tokens = method.class_tokens(x)
        torch.testing.assert_close(method.scores(tokens), method.backbone.logits(x))
    method.use_prepared({"mean": tokens.mean(0), "std": tokens.std(0)})
    method.begin_stream()
    assert torch.isfinite(method.adapt(x)).all()


def test_tasks_need_no_texts(tower: None) -> None:
    backbone = timm_clip(None, None)
    assert backbone.head is None and backbone.num_classes == 0 and backbone.classes is None
    assert backbone.features(images(2)).shape == (2, 24)
    with pytest.raises(UserError, match="no texts"):
        backbone.logits(images(1))


CL = ("simplecil", "ease", "l2p", "dualprompt", "coda", "sema")


@pytest.mark.parametrize("name", CL)
def test_tasks_are_learned_on_the_image_tower(
    tower: None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where embeddings and tokens differ in length: both are used in their place."""
    one_epoch = [] if name == "simplecil" else ["strategy.epochs=1"]
    small = {
        "coda": ["strategy.pool=4"],
        "dualprompt": ["strategy.general_blocks=[0]", "strategy.blocks=[1]"],
    }.get(name, [])
    summary = driftline.run([
        f"strategy={name}", "scenario=split_cifar10", "backbone=clip_timm",
        "backbone.checkpoint=random", "backbone.input_size=32", *one_epoch, *small,
        "scenario.embedded_images=[2,1]",
        "scenario.base=5", "scenario.increment=5", f"root={tmp_path}", "reference=[]",
    ])  # fmt: skip
    assert 0 <= summary["metrics"]["acc_last"] <= 100


# ---------------------------------------------------------------- open_clip


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    """Settings of a CLIP of 32 px: ViT of width 48, two blocks, embeddings of length 24."""
    pytest.importorskip("open_clip", reason="needs the extra clip")
    settings = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 16,
                       "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2,
                     "layers": 1},
    }  # fmt: skip
    (tmp_path / "tiny-clip.json").write_text(json.dumps(settings))
    return {"arch": str(tmp_path / "tiny-clip.json"), "checkpoint": "random"}


def test_a_tower_of_open_clip_becomes_one_of_timm(tiny: dict[str, Any]) -> None:
    import open_clip
    from timm.models.vision_transformer import VisionTransformer

    backbone, x = config("clip", **tiny), images(2)
    assert (
        isinstance(backbone.net, VisionTransformer) and backbone.tag == "open_clip/tiny-clip@random"
    )
    assert (backbone.dim, backbone.width, backbone.input_size) == (24, 48, 32)
    with clip.fixed_seed():
        model: Any = open_clip.create_model("tiny-clip").eval()
    with torch.no_grad():
        wanted = model.encode_image(backbone.normalize(x), normalize=True)
        torch.testing.assert_close(backbone.features(x), wanted, rtol=1e-4, atol=1e-5)
        texts = [f"a photo of a {name}." for name in LABELS.names]
        rows = model.encode_text(open_clip.get_tokenizer("tiny-clip")(texts), normalize=True)
        scores = model.logit_scale.exp() * wanted @ rows.T
        torch.testing.assert_close(backbone.logits(x), scores, rtol=1e-4, atol=1e-4)


def test_a_tower_that_timm_has_not_stays_and_adapters_say_so(tiny: dict[str, Any]) -> None:
    settings = json.loads(Path(tiny["arch"]).read_text())
    settings["vision_cfg"] |= {"attentional_pool": True, "attn_pooler_heads": 3}
    Path(tiny["arch"]).write_text(json.dumps(settings))
    backbone = config("clip", **tiny)
    assert type(backbone.net).__module__ == "open_clip.transformer"
    assert backbone.logits(images(2)).shape == (2, 3) and "blocks" not in backbone.provides
    tent: Any = driftline.make("tent", backbone, layers="norm")
    assert tent.adapt(images(2)).shape == (2, 3)
    with pytest.raises(UserError, match=r"no place for adapters at blocks\.\*"):
        driftline.make("ease", config("clip", **tiny), num_classes=4)


def test_a_file_of_both_towers_is_loaded_strictly(tiny: dict[str, Any], tmp_path: Path) -> None:
    import open_clip

    config("clip", **tiny)
    torch.manual_seed(3)
    model: Any = open_clip.create_model("tiny-clip").eval()
    saved = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": saved}, tmp_path / "mine.pt")
    backbone = config("clip", **tiny | {"checkpoint": str(tmp_path / "mine.pt")})
    with torch.no_grad():
        wanted = model.encode_image(backbone.normalize(images(2)), normalize=True)
        torch.testing.assert_close(backbone.features(images(2)), wanted, rtol=1e-4, atol=1e-5)
    assert backbone.tag.endswith("@mine.pt")
    torch.save({k: v for k, v in saved.items() if "ln_final" not in k}, tmp_path / "part.pt")
    with pytest.raises(UserError, match=r"'ln_final.\w+' of the network is missing"):
        config("clip", **tiny | {"checkpoint": str(tmp_path / "part.pt")})


def test_templates_are_averaged(tiny: dict[str, Any], tmp_path: Path) -> None:
    both = ["a photo of a {}.", "a drawing of a {}."]
    mean, first, second = (config("clip", **tiny, templates=t) for t in (both, both[:1], both[1:]))
    heads = [F.normalize(b.text.weight, dim=1) for b in (mean, first, second) if b.text is not None]
    torch.testing.assert_close(heads[0], F.normalize(heads[1] + heads[2], dim=1))
    (tmp_path / "t.txt").write_text("\n".join(both))
    read = config("clip", **tiny, templates=str(tmp_path / "t.txt"))
    assert weights_hash(read.weights()) == weights_hash(mean.weights())
    with pytest.raises(UserError, match="must hold {} once"):
        config("clip", **tiny, templates=["a photo"])


def test_names_come_from_the_stream_or_from_the_user(tiny: dict[str, Any], tmp_path: Path) -> None:
    import open_clip

    assert clip.class_list(None, LABELS) == (list(LABELS.names), "embedded")
    own = Labels("own", ("001.Black_Tern", "alarm_clock", "n01440764"))
    assert clip.class_list(None, own)[0] == ["Black Tern", "alarm clock", "tench"]
    names, space = clip.class_list(None, Labels("imagenet1k", ()))
    assert names == list(open_clip.IMAGENET_CLASSNAMES) and space == "imagenet1k"
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    assert clip.class_list(str(tmp_path / "names.txt"), LABELS)[0] == ["a", "b", "c"]
    with pytest.raises(UserError, match="has 2 names, and the scenario 3 classes"):
        clip.class_list(["a", "b"], LABELS)
    with pytest.raises(UserError, match="numbers for names.*backbone.class_names"):
        clip.class_list(None, Labels("own", ("0", "1")))
    with pytest.raises(UserError, match="n99999999.*outside of ImageNet-1k"):
        clip.class_list(None, Labels("own", ("n99999999",)))


def test_what_open_clip_lacks_is_named(tiny: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no such network; did you mean 'ViT-B-16'"):
        config("clip", arch="ViT-B16")
    with pytest.raises(UserError, match="ViT-B-16 has the weights openai, "):
        config("clip", weights="opnai")


def test_a_stream_names_the_classes(tiny: dict[str, Any], tmp_path: Path) -> None:
    summary = driftline.run([
        "strategy=tent", "strategy.layers=norm",
        "scenario=imagenet_c", "scenario.corruptions=[fog]", "scenario.images=20",
        "scenario.clean_images=0", "scenario.probe_images=0", "backbone=clip",
        f"backbone.arch={tiny['arch']}", "backbone.checkpoint=random", f"root={tmp_path}",
        "reference=[]",
    ])  # fmt: skip
    assert 0 <= summary["metrics"]["err_mean"] <= 100
    assert summary["weights"]["tag"] == "open_clip/tiny-clip@random"


def test_without_the_package_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clip.open_clip.cache_clear()
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r'pip install "driftline\[clip\]".*backbone=clip_timm'):
        config("clip")
    clip.open_clip.cache_clear()
