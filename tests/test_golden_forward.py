"""Methods for single images or without backward passes, against recorded runs or by formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import strategy_node
from golden_case import FOLDER, Case, both, names, names_in, optim, record, views
from PIL import Image
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.tta.memo import MEMO, operate, pixels
from driftline.tta.neo import NEO
from driftline.tta.t3a import T3A


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def backbone(name: str = "test_resnet") -> Backbone:
    torch.manual_seed(3)
    extra = {"img_size": 64} if name == "test_vit" else {}
    net = timm.create_model(name, num_classes=10, **extra).eval()
    torch.nn.init.normal_(net.get_classifier().weight, std=0.3)
    return Backbone(net, tag=name)


# ------------------------------------------------------------------------------ T3A


@both
@pytest.mark.parametrize("name", names("t3a_*"))
def test_t3a(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    limit = case.hyper["filter_K"]
    method = T3A(Backbone(case.net()), supports="all_but_last" if limit < 0 else limit)
    counts: list[Any] = []
    select = method.select

    def note() -> None:
        select()
        counts.append(method.classes.bincount(minlength=10).numpy())

    method.select = note  # type: ignore[method-assign]
    results: dict[str, Any] = record(method, case)
    assert np.array_equal(counts, case.data["n_supports"])
    norms = method.features.norm(dim=1).sort().values
    case.check_all(results | {"support_l2": norms, "support_entropy": method.entropies})


def test_t3a_keeps_all_or_loses_a_lonely_support() -> None:
    x = images(6)
    every = T3A(backbone(), supports="all")
    every.adapt(x)
    assert len(every.features) == 10 + len(x)
    losing = T3A(backbone(), supports="all_but_last")
    losing.adapt(x)
    lonely = every.classes.bincount(minlength=10) == 1
    assert lonely.any() and (losing.class_vectors()[:, lonely] == 0).all()
    assert losing.predict(x).isfinite().all()


# ------------------------------------------------------------------------------ NEO


@pytest.mark.parametrize("mean", ["stream", "moving"])
def test_neo_is_the_official_formula(mean: Any) -> None:
    """Written from the official code, which has no recorded run."""
    net = backbone("test_vit").double()
    method, x = NEO(net, mean=mean, momentum=0.1), images(9).double()
    with torch.no_grad():
        z = net.features(x)
    center, weight, bias = torch.zeros_like(z[0]), net.head.weight, net.head.bias
    for seen, part in ((4, slice(0, 4)), (7, slice(4, 7)), (9, slice(7, 9))):
        moving = 0.9 * center + 0.1 * z[part].mean(0)
        center = z[:seen].mean(0) if mean == "stream" else moving
        want = (z[part] - center) @ weight.T + bias
        torch.testing.assert_close(method.adapt(x[part]), want.detach())
    torch.testing.assert_close(method.predict(x), ((z - center) @ weight.T + bias).detach())


@pytest.mark.parametrize(
    "make", [lambda b: T3A(b, supports=1), lambda b: NEO(b, mean="stream", momentum=0.1)]
)
def test_a_network_without_a_linear_head_is_refused(make: Any) -> None:
    net = timm.create_model("test_resnet", num_classes=0)
    with pytest.raises(UserError, match="no single linear layer"):
        make(Backbone(net, tag="headless"))


# ------------------------------------------------------------------------------ MEMO


class RecordedMEMO(MEMO):
    """MEMO with the recorded views; `moved` are the parameters before they went back."""

    case: Case
    call = -1
    moved: dict[str, Tensor]

    def _adapt(self, x: Tensor) -> Tensor:
        self.call += 1
        return super()._adapt(x)

    def augment(self, x: Tensor, view: int) -> Tensor:
        data = self.case.data
        if "views" in data:
            image = data["views"][self.call, view].astype(np.float32) / np.float32(255)
            return torch.from_numpy(image)[None].to(x)
        return self.case.view(x, (self.call * self.views + view) % len(data["view_scale"]))

    def reset(self) -> None:
        self.note()
        super().reset()

    def note(self) -> None:
        self.moved = {k: p.detach().clone() for k, p in self.backbone.net.named_parameters()}


@both
@pytest.mark.parametrize("name", names("memo_*"))
def test_memo(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    net = case.net()
    method = RecordedMEMO(
        Backbone(net),
        seed=0,
        optim=optim(case.hyper),
        views=case.hyper["n_views"],
        steps=case.hyper["steps"],
        alpha=case.hyper["bn_alpha"],
        trained="weights",
        crop="resized",
        border="black",
        episodic=case.hyper["episodic"],
        marginal="image",
    )
    method.case = case
    learned = [n for n, p in net.named_parameters() if p.requires_grad]
    assert learned == names_in(case.info["adapted_parameters"])
    losses: list[float] = []
    loss = method.loss
    method.loss = lambda z: losses.append((v := loss(z)).item()) or v  # type: ignore[method-assign]
    x = torch.from_numpy(np.load(FOLDER / "inputs.npz")["x"].astype(np.float32) / np.float32(255))
    chosen = torch.stack([x[b, i] for b, i in case.info["images"]]).to(dtype)
    results: dict[str, Any] = {"logits": method.adapt(chosen), "loss": losses}
    if not case.hyper["episodic"]:
        method.note()
    start = dict(case.net().named_parameters())
    case.check_all(results | views("p", method.moved, start, case))
    assert method.backbone.passes.backward == len(chosen) * method.steps * method.views
    assert method.backbone.passes.forward == method.backbone.passes.backward + len(chosen)


def memo(net: Backbone, **options: Any) -> MEMO:
    """The official recipe with two views."""
    return build(strategy_node("memo", views=2, **options), at="strategy", backbone=net, seed=0)


def test_memo_forgets_each_image() -> None:
    x, method = images(3), memo(backbone(), optim={"lr": 0.1})
    before = method.predict(x)
    scores = method.adapt(x)
    assert torch.equal(method.predict(x), before) and not method.optimizer.state
    alone = memo(backbone(), optim={"lr": 0.1})
    assert torch.equal(torch.cat([alone.adapt(one) for one in x.split(1)]), scores)
    kept = memo(backbone(), optim={"lr": 0.1}, episodic=False)
    assert torch.equal(kept.adapt(x)[:1], scores[:1])
    assert not torch.equal(kept.predict(x), before)
    kept.reset()
    assert torch.equal(kept.predict(x), before)


def test_memo_over_a_batch_is_one_step_on_all_views() -> None:
    net, x = backbone("test_vit").double(), images(2).double()
    method = memo(net, optim={"lr": 0.1}, marginal="batch")
    method.augment = lambda x, view: x.roll(view, 3)  # type: ignore[method-assign]
    mean = net(torch.cat([x, x.roll(1, 3)])).softmax(1).mean(0)
    gradient = torch.autograd.grad(-(mean * mean.log()).sum(), net.head.bias)[0]
    want = net.head.bias.detach() - 0.1 * gradient
    method.episodic = False
    method.adapt(x)
    torch.testing.assert_close(net.head.bias.detach(), want)


@pytest.mark.parametrize("crop", ["resized", "padded"])
def test_memo_views_are_reproducible_mixtures(crop: str) -> None:
    x = images(2)
    first, again = (memo(backbone(), crop=crop).augment(x, 0) for _ in range(2))
    assert first.shape == x.shape and torch.equal(first, again)
    assert first.min() >= 0 and first.max() <= 1 + 1e-6 and not torch.equal(first[0], first[1])


def test_augmix_operations_have_the_official_sizes() -> None:
    """Levels below 1 of 10: a bit depth of 4, at most 3 degrees, 2 %, a tenth of a third."""
    image = Image.fromarray(images(1)[0].mul(255).byte().permute(1, 2, 0).numpy())
    red = (128, 0, 0)
    moved = pixels(operate(image, "translate_x", 0.99, 1, red))
    assert torch.equal(moved[:, :, :-2], pixels(image)[:, :, 2:])  # int(0.99 * 64 / 3 / 10)
    assert torch.equal(moved[:, :, -1], torch.tensor([128, 0, 0])[:, None].expand(3, 64) / 255)
    assert len(torch.unique(pixels(operate(image, "posterize", 0.5, 1, red)))) == 16
    solarized = pixels(operate(image, "solarize", 0.5, 1, red)) * 255
    assert (solarized < 256 - 12 + 0.5).all()  # int(0.5 * 256 / 10)
    assert torch.equal(pixels(operate(image, "rotate", 0.1, 1, red)), pixels(image))
