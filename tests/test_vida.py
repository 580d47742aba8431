"""ViDA: recorded numbers, adapters, scales, source phase, and what a resumed run needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import copied, equal, strategy_node, with_options
from golden_case import FOLDER, Case, both, names, names_in, optim, record, views
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.build import build
from driftline.core.errors import Diverged, UserError
from driftline.core.stream import Batch, SourceImages
from driftline.parts.warmup import WarmUp
from driftline.tta.vida import MARK, ViDA, adapters, parameters, tensors

SMALL = {"rank_high": 4, "views": 3, "warmup": {"batch_size": 6, "every": 2, "optim": {"lr": 0.01}}}
LOUD = {
    "optim": {"lr": 0.01, "rates": {"adapters": 0.01}},
    "threshold": 0.001,
    "uncertainty_weight": 1.0,
}
METHODS: dict[str, dict[str, Any]] = {
    "imagenet": LOUD,
    "cifar": {
        **LOUD,
        "optim": {"kind": "adam", "lr": 1e-3, "rates": {"adapters": 0.01}},
        "loss": "ce",
        "restore_prob": 0.1,
    },
    "adapters": {**LOUD, "train_base": False, "scale_rule": "paper", "rng": "device"},
    "adapters-restored": {**LOUD, "train_base": False, "restore_prob": 0.3, "view_chunk": 2},
    "distance": {**LOUD, "uncertainty": "prob_distance", "threshold": 0.2, "reset_scales": False},
    "still": {"update": False},
}
every = pytest.mark.parametrize("name", METHODS)
learners = pytest.mark.parametrize("name", [k for k in METHODS if k != "still"])


def backbone(seed: int = 3, kind: str = "vit", **options: Any) -> Backbone:
    """Random weights with a confident head; 32 px."""
    torch.manual_seed(seed)
    extra = {"img_size": 32} if kind == "vit" else {}
    net = timm.create_model(f"test_{kind}", num_classes=10, **extra, **options)
    nn.init.normal_(net.get_classifier().weight, std=0.3)
    return Backbone(net, name=kind, tag=f"test_{kind}")


def make(
    name: str = "imagenet",
    seed: int = 0,
    net: Backbone | None = None,
    trained: bool = True,
    **changes: Any,
) -> ViDA:
    """A method at the start of its stream, with adapters that do something unless `trained` is off.

    `changes` go over the options of METHODS.
    """
    node = strategy_node("vida")
    for options in (SMALL, METHODS[name], changes):
        node = with_options(node, **options)
    method = build(node, at="strategy", backbone=net or backbone(), seed=seed)
    if trained:
        rng = torch.Generator().manual_seed(seed)
        method.use_prepared(
            {
                n: 0.1 * torch.randn(p.shape, generator=rng)
                for n, p in parameters(method.bank).items()
                if MARK in n
            }
        )
    method.begin_stream()
    return method


def images(*sizes: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.rand(n, 3, 32, 32, generator=g) for n in sizes]


def source_images(count: int = 20) -> SourceImages:
    """Labelled noise; a pure function of its arguments like the real one."""

    def batches(
        size: int, *, epoch: int | None = None, start: int = 0, augment: str = "none"
    ) -> Iterator[Batch]:
        rng = torch.Generator().manual_seed(7)
        x = torch.rand(count, 3, 32, 32, generator=rng)
        y = torch.randint(10, (count,), generator=rng)
        order = torch.arange(count)
        if epoch is not None:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
        for rows in list(order.split(size))[start:]:
            yield Batch(x[rows], y[rows], rows, torch.zeros_like(rows))

    return SourceImages(count, "noise", "noise", batches)


class Progress:
    """Keeps the last state in memory; fails at one save if asked to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.state: Any = None
        self.saves, self.fail_at = 0, fail_at

    def load(self) -> Any:
        return self.state

    def save(self, state: Any) -> None:
        self.saves += 1
        self.state = copied(dict(state))
        if self.saves == self.fail_at:
            raise KeyboardInterrupt

    def say(self, text: str) -> None:
        pass


# ------------------------------------------------------------------------ recorded numbers


class Recorded(ViDA):
    """ViDA with the recorded views and masks in place of random ones; remembers what it saw."""

    case: Case
    turn = -1  # batch
    view = 0  # of the batch
    first = 0  # position in the batch's masks

    def adapt(self, x: Tensor) -> Tensor:
        self.turn, self.view, self.first = self.turn + 1, 0, 0
        return super().adapt(x)

    def augment(self, x: Tensor) -> Tensor:
        data, i = self.case.data, self.view
        self.view += 1
        shift = (int(data["view_dy"][i]), int(data["view_dx"][i]))
        scale = torch.tensor(data["view_scale"][i]).to(x)
        x = (x.roll(shift, (2, 3)) * scale).clamp(0, 1)
        return x.flip(3) if data["view_flip"][i] else x

    def restore_mask(self, parameter: Tensor) -> Tensor:
        bits = np.unpackbits(self.case.data["mask_bits"][self.turn])
        mine = bits[self.first : self.first + parameter.numel()]
        self.first += parameter.numel()
        return torch.from_numpy(mine.astype(bool)).view_as(parameter)


@both
@pytest.mark.parametrize("name", names("vida_*"))
def test_recorded_numbers(name: str, dtype: torch.dtype) -> None:
    chunk = {"vida_imagenet_loud": 10, "vida_imagenet_lowthr": 4}.get(name, 1)
    case = Case(name, dtype)
    hyper = case.hyper
    method = Recorded(
        Backbone(case.net()),
        seed=0,
        loss="sce" if hyper["loss"].startswith("symmetric") else "ce",
        attention=["Attention", "CrossAttention"],
        rank_low=hyper["rank1"],
        rank_high=hyper["rank2"],
        train_base=True,
        views=hyper["n_unc"],
        view_chunk=chunk,
        uncertainty="logit_variance",
        uncertainty_weight=0.1,
        max_uncertainty=None,
        threshold=hyper["unc_thr"],
        scale_rule="official",
        reset_scales=False,
        ema=hyper["mt"],
        ema_adapters=hyper["mt_vida"],
        restore_prob=0.0 if isinstance(hyper["rst"], str) else hyper["rst"],
        checkpoint=None,
        warmup=None,
        update=True,
        rng="reference",
        optim=optim(hyper, adapters=hyper["vida_lr"]),
    )
    method.case = case
    order = names_in(case.info["param_names"])
    assert order == list(parameters(method.bank))
    assert names_in(case.info["adapter_parameters"]) == [n for n in order if MARK in n]

    initial = load_file(FOLDER / case.info["random_draws"]["adapter_init"].split()[0])
    start = {n: initial.get(n, torch.zeros(p.shape)) for n, p in parameters(method.bank).items()}
    method.use_prepared({n: t.to(dtype) for n, t in start.items() if MARK in n})
    before = copied(parameters(method.bank))
    if "TEACHER is multiplied by 2.0" in case.info.get("teacher_init", ""):
        for one in adapters(method.teacher_bank):
            for up in one.up:
                up.data.mul_(2.0)

    seen: dict[str, list[Any]] = {k: [] for k in ("student", "views", "u", "scales")}
    method.backbone.register_forward_hook(lambda *a: seen["student"].append(a[2].detach().numpy()))
    method.teacher.register_forward_hook(lambda *a: seen["views"].append(a[2].numpy()))
    rule = method.scale_rule

    def scale_rule(uncertainty: Tensor) -> Tensor:
        seen["u"].append(uncertainty.item())
        seen["scales"].append(rule(uncertainty).tolist())
        return rule(uncertainty)

    method.scale_rule = scale_rule
    results: dict[str, Any] = record(method, case)
    forwards = -(-hyper["n_unc"] // chunk) + 1  # of the teacher, per batch
    passes = [np.concatenate(seen["views"][i * forwards : (i + 1) * forwards - 1]) for i in (0, 1)]
    low = np.array(seen["scales"])[:, 0]
    results |= {
        "student_logits": seen["student"],
        "uncertainty": seen["u"],
        "uncertainty_pass_logits": passes,
        "lambda_high_low": np.stack([2 - low, low], 1),
        "effective_scale1_scale2": seen["scales"],
    }
    results |= views("student", parameters(method.bank), before, case)
    results |= views("teacher", parameters(method.teacher_bank), before, case)
    case.check_all(results)
    for bank in (method.bank, method.teacher_bank):
        assert all(one.scales.tolist() == seen["scales"][-1] for one in adapters(bank))


# ------------------------------------------------------------------------ adapters


def test_adapters_at_the_start_change_nothing():
    (x,) = images(5)
    plain, net = backbone(), backbone()
    with torch.no_grad():
        want = plain.eval()(x)
    method = make(net=net, trained=False)
    assert torch.equal(method.predict(x), want)
    layers = adapters(method.bank)
    assert len(layers) == 2 * len(net.net.blocks)
    for one in layers:
        assert not one.up[0].any() and not one.up[1].any()
        assert one.down[0].std() > 0.5  # 1 / rank², rank 1
        assert one.down[1].std().item() == pytest.approx(1 / 16, rel=0.3)
    state = tensors(method.bank)
    assert equal(state, tensors(make(net=backbone(), trained=False).teacher_bank))
    assert not equal(state, tensors(make(seed=1, trained=False).bank))


def test_convolutional_networks_are_refused():
    with pytest.raises(UserError, match=r"test_resnet has none.*backbone=vit_b16_in1k"):
        make(net=backbone(kind="resnet"), trained=False)
    with pytest.raises(UserError, match=r"strategy.attention=\['CrossAttention'\]"):
        make(attention=["CrossAttention"], trained=False)


def test_attention_that_reads_weights_directly_is_refused():
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.MultiheadAttention(12, 2, batch_first=True)
            self.head = nn.Linear(12, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = x.reshape(len(x), -1, 12)
            return self.head(self.mix(x, x, x)[0].mean(1))

    with pytest.raises(UserError, match=r"never reached.*\(strategy\.attention\)"):
        make(net=Backbone(Bypass()), trained=False).adapt(torch.rand(2, 3, 32, 32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": 1}, "strategy.views must be a whole number, at least 2"),
        ({"view_chunk": 0}, "strategy.view_chunk must be a whole number, at least 1"),
        ({"rank_low": 0}, "strategy.rank_low must be a whole number, at least 1"),
        ({"scale_rule": "both"}, "strategy.scale_rule must be one of 'official', 'paper'"),
    ],
)
def test_wrong_settings_are_explained(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)


# ------------------------------------------------------------------------ adaptation


@every
def test_what_moves(name):
    method = make(name)
    before = copied(parameters(method.bank))
    for x in images(6, 6):
        method.adapt(x)
    moved = {n for n, p in parameters(method.bank).items() if not torch.equal(p, before[n])}
    added = {n for n in before if MARK in n}
    trained = sum(p.numel() for p in method.updated_parameters())
    if name == "still":
        assert not moved and not trained
    else:
        wanted = added if name.startswith("adapters") else set(before)
        assert moved == wanted and trained == sum(before[n].numel() for n in wanted)
    teacher = parameters(method.teacher_bank)
    assert {n for n, p in teacher.items() if not torch.equal(p, before[n])} == moved


def test_reset_keeps_scales_where_the_code_does():
    (x,) = images(6)
    method = make(reset_scales=True)
    method.adapt(x)
    method.reset()
    assert method.scales.tolist() == [1, 1]
    method = make(reset_scales=False)
    method.adapt(x)
    used = method.scales.tolist()
    assert used[0] != 1
    method.reset()
    assert method.scales.tolist() == used
    for bank in (method.bank, method.teacher_bank):
        assert all(one.scales.tolist() == used for one in adapters(bank))


@learners
def test_snapshot_leaves_out_what_is_known(name):
    method, (x,) = make(name), images(6)
    method.adapt(x)
    state = method.snapshot()
    saved = state["tensors"]
    assert not [k for k in saved if k.startswith("source")]
    base = "backbone.net.blocks.0.mlp.fc1.weight"
    assert (
        (base in saved) == (not name.startswith("adapters")) == ("net.head.bias" in "".join(saved))
    )
    assert set(state["start"]) == {n for n in parameters(method.bank) if MARK in n}
    assert (method.source is not None) == (name in ("cifar", "adapters-restored"))


@every
def test_passes_are_counted(name):
    method, (x,) = make(name), images(6)
    passes = method.backbone.passes
    passes.forward = passes.backward = 0
    method.adapt(x)
    still = name == "still"
    assert passes.forward == (1 if still else method.views + 2) * 6
    assert passes.backward == (0 if still else 6)


def test_no_update_is_the_warmed_network():
    (x,) = images(6)
    still = make("still")
    with torch.no_grad():
        want = still.bank.logits(x, "vida")
    assert torch.equal(still.adapt(x), want) and torch.equal(still.predict(x), want)
    assert torch.equal(make().predict(x), want)  # before the first batch of a learner
    assert still.optimizer is None and still.source is None
    for one in adapters(still.teacher_bank):
        assert one.scales.tolist() == [1, 1]


def test_views_in_one_forward_give_the_same_uncertainty():
    (x,) = images(5)
    values = [make(view_chunk=c).uncertainty(x).item() for c in (1, 2, 3, 10)]
    assert values == pytest.approx([values[0]] * 4, rel=1e-5)
    a, b = make(view_chunk=1), make(view_chunk=3)
    a.uncertainty(x), b.uncertainty(x)
    assert torch.equal(a.rng("method").get_state(), b.rng("method").get_state())


@pytest.mark.parametrize("kind", ["logit_variance", "prob_distance"])
def test_uncertainty_by_hand(kind):
    (x,) = images(4)
    method = make(uncertainty=kind, uncertainty_weight=0.5)
    scores: list[Tensor] = []
    method.teacher.register_forward_hook(lambda *a: scores.append(a[2]))
    got = method.uncertainty(x)
    z = torch.stack(scores)
    if kind == "logit_variance":
        want = (z - z.mean(0)).square().sum(0) / 2  # three views
        want = want.mean()
    else:
        p = z.softmax(2)
        want = torch.stack([(p[:, i] - p[:, i].mean(0)).norm(dim=1) for i in range(4)], 1)
        want = want.square().mean(0).sqrt().mean()
    assert torch.allclose(got, 0.5 * want)


@pytest.mark.parametrize(
    ("rule", "limit", "value", "expected"),
    [
        ("official", None, 0.1, [1.1, 1.0]),
        ("official", None, 0.2, [0.8, 1.0]),  # at the threshold the high rank gains
        ("paper", None, 0.1, [1.1, 0.9]),
        ("paper", None, 0.5, [0.5, 1.5]),
        ("paper", None, 3.0, [-2.0, 4.0]),
        ("paper", 1.0, 3.0, [0.0, 2.0]),
    ],
)
def test_scale_rule(rule, limit, value, expected):
    method = make(scale_rule=rule, max_uncertainty=limit, threshold=0.2)
    scales = method.scale_rule(torch.tensor(value))
    assert scales.tolist() == pytest.approx(expected)


def test_scales_reach_the_next_batch():
    """The views see the scales of the batch before; student and teacher share the new ones."""
    method, (x,) = make(scale_rule="paper"), images(6)
    seen: list[list[float]] = []
    first_of = adapters(method.teacher_bank)[0]
    method.teacher.register_forward_hook(lambda *_: seen.append(first_of.scales.tolist()))
    method.adapt(x)
    first = method.scales.tolist()
    method.adapt(x)
    assert seen[:3] == [[1, 1]] * 3 and seen[3] == first
    assert seen[4:7] == [first] * 3 and seen[7] == method.scales.tolist() != first


def test_restoration_probability_and_teacher_average():
    (x,) = images(6)
    method = make("cifar", restore_prob=1.0, ema=0.7, ema_adapters=0.2)
    student: dict[str, Tensor] = {}
    average = method.average_teacher

    def remember() -> None:
        student.update(copied(parameters(method.bank)))
        average()

    method.average_teacher = remember
    start = copied(parameters(method.bank))
    method.adapt(x)
    for name, p in parameters(method.bank).items():
        assert torch.equal(p, start[name])
    for name, p in parameters(method.teacher_bank).items():
        ema = 0.2 if MARK in name else 0.7
        assert torch.equal(p, ema * start[name] + (1 - ema) * student[name])
    assert not torch.equal(student["cls_token"], start["cls_token"])


def test_random_numbers_follow_the_reference():
    """Views first, then one mask for every parameter in order."""
    (x,) = images(3)
    method, expected = make("cifar"), make("cifar")
    method.adapt(x)
    for _ in range(expected.views):
        expected.augment(x)
    for p in parameters(expected.bank).values():
        torch.rand(p.shape, generator=expected.rng("method"))
    assert torch.equal(method.rng("method").get_state(), expected.rng("method").get_state())


def test_diverged_weights_stop_the_run():
    method, (x,) = make(reset_scales=False), images(6)
    method.adapt(x)
    with torch.no_grad():
        method.backbone.net.norm.weight.fill_(float("nan"))
    before = copied(dict(method.teacher.state_dict()))
    with pytest.raises(Diverged, match=r"batch 2 is nan.*Lower strategy.optim.lr"):
        method.adapt(x)
    assert equal(dict(method.teacher.state_dict()), before)
    method.reset()
    assert method.adapt(x).isfinite().all()
    with torch.no_grad():
        method.teacher.net.norm.weight.fill_(float("nan"))
    with pytest.raises(Diverged, match="batch 4 is nan"):
        method.adapt(x)
    assert method.scales.isnan().any()  # of no use, so not kept
    method.reset()
    assert method.scales.tolist() == [1, 1] and method.adapt(x).isfinite().all()


# ------------------------------------------------------------------------ source phase


def test_warm_up_trains_the_adapters_alone():
    worker = make(trained=False)
    before = copied(tensors(worker.bank))
    artefact = worker.prepare(source_images(), Progress())
    assert set(artefact) == {n for n in before if MARK in n}
    after = tensors(worker.bank)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == (MARK not in name), name

    run, (x,) = make(trained=False), images(6)
    cold = run.predict(x)
    run.use_prepared(copied(artefact))
    run.begin_stream()
    with torch.no_grad():
        warm = worker.bank.logits(x, "vida")
    assert torch.equal(run.predict(x), warm) and not torch.equal(cold, warm)
    first = run.adapt(x)
    run.reset()
    assert torch.equal(run.predict(x), warm)
    other = make("cifar", trained=False)
    other.use_prepared(artefact)
    other.begin_stream()
    assert other.source_bank is not None
    name = "blocks.0.attn.qkv.vida_up.weight"
    assert torch.equal(tensors(other.source_bank)[name], artefact[name])
    assert first.isfinite().all()


def test_warm_up_lowers_the_loss():
    worker, source = make(trained=False, warmup={"epochs": 8}), source_images()
    batch = next(source.batches(20))

    def loss() -> float:
        return nn.functional.cross_entropy(worker.predict(batch.x), batch.y).item()

    before = loss()
    worker.use_prepared(worker.prepare(source, Progress()))
    assert loss() < 0.8 * before


def test_interrupted_warm_up_ends_the_same():
    whole = make(trained=False, warmup={"epochs": 2}).prepare(source_images(), Progress())
    progress = Progress(fail_at=2)
    with pytest.raises(KeyboardInterrupt):
        make(trained=False, warmup={"epochs": 2}).prepare(source_images(), progress)
    names = progress.state["module"]
    sizes = sum(t.numel() for t in names.values())
    assert sizes == sum(t.numel() for t in whole.values())
    again = make(trained=False, warmup={"epochs": 2}).prepare(source_images(), progress)
    assert equal(whole, again)


def test_what_the_artefact_depends_on():
    def settings(**changes: Any) -> Any:
        return make(trained=False, **changes).preparation()

    base = settings()
    assert isinstance(make(trained=False).warmup, WarmUp) and ViDA.uses_source
    for changes in (
        {"optim": {"lr": 1.0}},
        {"views": 5},
        {"update": False},
        {"warmup": {"every": 7}},
    ):
        assert settings(**changes) == base
    for changes in (
        {"rank_high": 8},
        {"seed": 1},
        {"warmup": {"optim": {"lr": 1e-3}}},
        {"attention": ["A*"]},
    ):
        assert settings(**changes) != base
    assert settings(warmup=None) is None


def test_released_checkpoint_round_trip(tmp_path):
    trained, (x,) = make("still"), images(6)
    state = copied(tensors(trained.bank))
    assert "blocks.0.attn.qkv.linear_vida.weight" in state and not any("scales" in k for k in state)
    path = tmp_path / "source_vida.pth"
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, path)
    method = make(trained=False, checkpoint=str(path), net=backbone(seed=9))
    assert method.preparation() is None
    assert torch.equal(method.predict(x), trained.predict(x))
    method.adapt(x)
    method.reset()
    assert torch.equal(method.predict(x), trained.predict(x))

    plain = tmp_path / "plain.safetensors"
    save_file(backbone().net.state_dict(), plain)
    with pytest.raises(UserError, match=r"^strategy.checkpoint=.*linear_vida.*is missing.*plain"):
        make(trained=False, checkpoint=str(plain))
    with pytest.raises(UserError, match=r"^strategy.checkpoint=.*no such file"):
        make(trained=False, checkpoint=str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match=r"shape"):
        make(trained=False, checkpoint=str(path), rank_high=5)


def test_recipes_hold_the_official_cifar_settings(configure):
    cfg = configure("strategy=vida", "scenario=cifar10_c").strategy
    assert (cfg.optim.kind, cfg.optim.lr, cfg.optim.rates.adapters, cfg.threshold) == (
        "adam",
        1e-4,
        1e-5,
        0.05,
    )
    assert (cfg.restore_prob, cfg.ema_adapters, cfg.loss) == (0.1, 0.999, "ce")
    cfg = configure("strategy=vida", "scenario=cifar100_c").strategy
    assert (cfg.optim.lr, cfg.optim.rates.adapters) == (3e-4, 1e-6)
    assert configure("strategy=vida").strategy.optim.kind == "sgd"
