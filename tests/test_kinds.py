"""Kinds of adapters that are a formula: at first the identity, then what the paper says."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, plain_yaml, strategy_node
from test_bank import X, backbone, check_file_of_kind, wake
from torch import Tensor, nn

from driftline.cl.moram import RankExperts
from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.parts.adapters.adapter import Adapter
from driftline.parts.adapters.bank import AdapterBank
from driftline.parts.adapters.block_expansion import BlockExpansion
from driftline.parts.adapters.bottleneck import Bottleneck
from driftline.parts.adapters.dora import DoRA
from driftline.parts.adapters.ether import EtherPlus
from driftline.parts.adapters.hra import HRA
from driftline.parts.adapters.hydra import Hydra
from driftline.parts.adapters.ladder import ladder
from driftline.parts.adapters.lora import LoRA
from driftline.parts.adapters.lori import LoRI, keep_largest
from driftline.parts.adapters.mixture import Arrow, LoRAMixture
from driftline.parts.adapters.mosa import MoSA
from driftline.parts.adapters.moslora import MoSLoRA
from driftline.parts.adapters.nola import NOLA
from driftline.parts.adapters.oft import OFT
from driftline.parts.adapters.paca import PaCA
from driftline.parts.adapters.self_activated import SelfActivated
from driftline.parts.adapters.shared_lora import Shared, VeRA, tied_lora

DIM, OUT = 12, 15


def reflections(a: HRA) -> Tensor:
    """H_1 ... H_r as in the paper."""
    whole = torch.eye(DIM, dtype=torch.float64)
    for u in a.u:
        whole = whole @ (torch.eye(DIM, dtype=torch.float64) - 2 * torch.outer(u, u) / (u @ u))
    return whole


def product(a: LoRA) -> Tensor:
    return a.scale * a.b[0] @ a.a[0]


def columns(a: PaCA, weight: Tensor) -> Tensor:
    return torch.zeros_like(weight).index_copy(1, a.chosen, a.p)


def rotation(a: OFT) -> Tensor:
    """The truncated Cayley transform of every block, as in the paper."""
    blocks = []
    for numbers in a.q:
        q = torch.zeros(a.block, a.block, dtype=torch.float64)
        for value, i, j in zip(numbers, a.rows, a.columns, strict=True):
            q = q.index_put((i, j), value).index_put((j, i), -value)
        powers = [torch.matrix_power(q, k) for k in range(a.terms + 1)]
        blocks.append((powers[0] + q) @ torch.stack(powers).sum(0))
    return torch.block_diag(*blocks)


def relaxed(u: Tensor, v: Tensor) -> Tensor:
    """ETHER+'s H of one side."""
    eye = torch.eye(u.shape[1], dtype=torch.float64)
    pairs = [(a / a.norm(), b / b.norm()) for a, b in zip(u, v, strict=True)]
    return torch.block_diag(*(eye - torch.outer(a, a) + torch.outer(b, b) for a, b in pairs))


def between_vectors(a: Shared) -> Tensor:
    down, up = a.pair()
    return a.outer.diag() @ up @ a.inner.diag() @ down


def of_bases(a: NOLA) -> Tensor:
    first, of_a, of_b = a._drawn.like(a.alpha)
    down = first + sum(x * m for x, m in zip(a.alpha, of_a, strict=True))
    return a.scale * sum(x * m for x, m in zip(a.beta, of_b, strict=True)) @ down


# kind -> how it is made, and the weight and bias that it stands for
KINDS: dict[str, tuple[Any, Any]] = {
    "lora": (lambda g, m: LoRA(DIM, OUT, 4, scale=0.5, generator=g), None),
    "dora": (lambda g, m: DoRA(m, 4, scale=0.5, generator=g), None),
    "hra": (lambda g, m: HRA(DIM, 4, generator=g), lambda a, w, b: (w @ reflections(a), b)),
    "moslora": (
        lambda g, m: MoSLoRA(DIM, OUT, 4, scale=0.5, generator=g),
        lambda a, w, b: (w + 0.5 * a.b[0] @ a.mixer @ a.a[0], b),
    ),
    "hydra": (
        lambda g, m: Hydra(DIM, OUT, 4, scale=0.5, generator=g),
        lambda a, w, b: (w + product(a.beside) + product(a.behind) @ w, b + product(a.behind) @ b),
    ),
    "paca": (
        lambda g, m: PaCA(DIM, OUT, 4, generator=g),
        lambda a, w, b: (w + columns(a, w), b),
    ),
    "oft": (lambda g, m: OFT(DIM, 4), lambda a, w, b: (w @ rotation(a).T, b)),
    "ether_plus": (
        lambda g, m: EtherPlus(m, 3, generator=g),
        lambda a, w, b: (relaxed(a.u[1], a.v[1]) @ w @ relaxed(a.u[0], a.v[0]), b),
    ),
    "lori": (
        lambda g, m: LoRI(DIM, OUT, 4, scale=0.5, generator=g),
        lambda a, w, b: (w + product(a), b),
    ),
    "vera": (
        lambda g, m: VeRA(DIM, OUT, 6, seed=1),
        lambda a, w, b: (w + between_vectors(a), b),
    ),
    "tied_lora": (
        lambda g, m: tied_lora({"fc:out": m}, 4, generator=g)["fc:out"],
        lambda a, w, b: (w + between_vectors(a), b),
    ),
    "nola": (
        lambda g, m: NOLA(DIM, OUT, 4, 5, scale=0.5, seed=1),
        lambda a, w, b: (w + of_bases(a), b),
    ),
}
OWN = [name for name, (_, weight) in KINDS.items() if weight is not None]


def layer_with(name: str) -> tuple[nn.Linear, Adapter]:
    torch.manual_seed(2)
    layer = nn.Linear(DIM, OUT).double().requires_grad_(False)
    adapter = KINDS[name][0](torch.Generator().manual_seed(3), layer).double()
    return layer, adapter


def moved(name: str) -> tuple[nn.Linear, Adapter]:
    """As `layer_with`, away from the identity."""
    layer, adapter = layer_with(name)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return layer, adapter


def output(adapter: Adapter, layer: nn.Linear, x: Tensor) -> Tensor:
    if isinstance(adapter, HRA | OFT):
        return layer(adapter.before(x))
    return adapter.after(x, layer(x))


def tokens(seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, DIM, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_the_identity_at_first(name):
    layer, adapter = layer_with(name)
    x = tokens()
    before = x.clone()
    rounding = 1e-14 if name in ("hra", "dora", "ether_plus") else 0.0
    torch.testing.assert_close(output(adapter, layer, x), layer(x), rtol=rounding, atol=rounding)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", OWN)
def test_the_output_is_that_of_the_merged_weight(name):
    layer, adapter = moved(name)
    x = tokens()
    merged = F.linear(x, *KINDS[name][1](adapter, layer.weight, layer.bias))
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            ours = output(adapter, layer, x)
        torch.testing.assert_close(ours, merged, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(merged, layer(x))


@pytest.mark.parametrize("name", OWN)
def test_gradients_are_those_of_the_merged_weight(name):
    layer, adapter = moved(name)
    x, aim = tokens().requires_grad_(), tokens(7)[..., :1]
    learned = [p for p in adapter.parameters() if p.requires_grad]
    ours, want = (
        torch.autograd.grad((out * aim).square().sum(), [x, *learned])
        for out in (
            output(adapter, layer, x),
            F.linear(x, *KINDS[name][1](adapter, layer.weight, layer.bias)),
        )
    )
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


OTHERS = ("film", "block_expansion", "ladder", "lori_s", "mosa", "lora_mixture", "self_activated")


@pytest.mark.parametrize("name", [*OWN, *OTHERS])
@pytest.mark.filterwarnings("ignore:strategy.adapter.blocks=:UserWarning")
def test_the_file_of_a_kind_attaches_learns_and_groups(name):
    check_file_of_kind(name)


def test_reflections_are_those_of_the_peft_library():
    peft = pytest.importorskip("peft", reason='peft is missing: pip install -e ".[peft]"')
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(DIM, OUT)).double()
    theirs = peft.get_peft_model(net, peft.HRAConfig(r=4, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    u = layer.hra_u["default"]  # [dim, r]
    with torch.no_grad():
        u.add_(torch.randn_like(u) * 0.3)
    ours = HRA(DIM, 4).double()
    with torch.no_grad():
        ours.u.copy_(u.T)
    x = tokens()
    torch.testing.assert_close(layer.base_layer(ours.before(x)), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 7])
def test_an_odd_number_of_reflections_is_refused(rank):
    node = {"_target_": "driftline.parts.adapters.hra.HRA", "dim": DIM, "rank": rank}
    with pytest.raises(UserError, match=r"rank must be a whole number.*, an even number, got"):
        build(node, at="strategy.adapter.kind")


def test_more_columns_than_a_layer_has_are_refused():
    with pytest.raises(UserError, match=r"columns=13: the layer has 12 columns; name fewer"):
        PaCA(DIM, OUT, 13)


def test_rotations_are_those_of_the_peft_library():
    peft = pytest.importorskip("peft", reason='peft is missing: pip install -e ".[peft]"')
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(DIM, OUT)).double()
    config = peft.OFTConfig(
        oft_block_size=4,
        r=0,
        use_cayley_neumann=True,
        num_cayley_neumann_terms=5,
        target_modules=["0"],
    )
    theirs = peft.get_peft_model(net, config)
    layer = theirs.base_model.model[0]
    q = layer.oft_R["default"].weight  # [blocks, numbers above the diagonal]
    ours = OFT(DIM, 4, terms=3).double()
    with torch.no_grad():
        q.add_(torch.randn_like(q) * 0.3)
        ours.q.copy_(q)
    x = tokens()
    torch.testing.assert_close(layer.base_layer(ours.before(x)), theirs(x), rtol=1e-12, atol=1e-12)


def test_vera_is_that_of_the_peft_library_with_the_same_seed():
    peft = pytest.importorskip("peft", reason='peft is missing: pip install -e ".[peft]"')
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(DIM, OUT))
    config = peft.VeraConfig(r=6, projection_prng_key=7, target_modules=["0"])
    theirs = peft.get_peft_model(net, config)
    layer, ours = theirs.base_model.model[0], VeRA(DIM, OUT, 6, seed=7)
    pairs = (layer.vera_lambda_d, ours.inner), (layer.vera_lambda_b, ours.outer)
    for name, own in pairs:
        assert torch.equal(name["default"], own)
        with torch.no_grad():
            own.add_(torch.randn_like(own) * 0.3)
            name["default"].copy_(own)
    x = tokens().float()
    torch.testing.assert_close(ours.after(x, layer.base_layer(x)), theirs(x))


def test_lori_s_learns_the_largest_numbers_of_lori_d():
    torch.manual_seed(4)
    members = [LoRI(DIM, OUT, 4), LoRI(DIM, 9, 2)]
    with torch.no_grad():
        for a in members:
            a.b[0].normal_()
    sizes = torch.cat([a.b[0].detach().abs().flatten() for a in members])
    least = sizes.sort(descending=True).values[7]
    before = [a.b[0].detach().abs() >= least for a in members]
    keep_largest(members, 8 / len(sizes))
    for a, kept in zip(members, before, strict=True):
        assert torch.equal(a.mask, kept)
        assert not a.b[0].any()
        a.add(tokens().float(), torch.ones(2, 3, len(a.mask))).square().sum().backward()
        assert torch.equal(a.b[0].grad != 0, kept)
        assert a.a[0].grad is None
    assert sum(a.mask.sum() for a in members) == 8


def test_lori_s_can_begin_with_the_largest_gradients():
    layer = nn.Linear(DIM, OUT).double().requires_grad_(False)
    adapter, x = LoRI(DIM, OUT, 4, scale=0.5, share=0.1).double(), tokens()
    weight = layer.weight.clone().requires_grad_()
    slope, own = (
        torch.autograd.grad(out.square().sum(), [value])[0]
        for out, value in (
            (F.linear(x, weight, layer.bias), weight),
            (adapter.after(x, layer(x)), adapter.b[0]),
        )
    )
    adapter.choose(slope)
    assert adapter.mask.sum() == round(0.1 * OUT * 4)
    assert own.abs()[adapter.mask].min() >= own.abs()[~adapter.mask].max()


@pytest.mark.parametrize(
    "words", [["strategy.adapter.start=null"], ["strategy.adapter.kind.share=null"]], ids=str
)
def test_a_share_of_lori_and_its_start_go_together(words):
    node = strategy_node("finetune", adapter="lori_s")["adapter"]
    if "start" in words[0]:
        node["start"] = None
    else:
        node["kind"]["share"] = None
    plan = build({k: v for k, v in node.items() if k != "name"}, at="strategy.adapter")
    with pytest.raises(UserError, match=r"both strategy.adapter.start=lori and .*kind.share"):
        plan.adapters(backbone())


def test_a_part_of_a_mosa_learns_at_a_time_and_all_of_them_answer():
    adapter, x = MoSA(DIM, 6, experts=3).double(), tokens()
    start = adapter.down.weight.detach().clone()
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    for part, weight in ((adapter.part_down, adapter.down), (adapter.part_up, adapter.up)):
        assert part.unique(return_counts=True)[1].tolist() == [weight.weight.numel() // 3] * 3
    torch.manual_seed(1)
    learned = set()
    for _ in range(30):
        adapter.zero_grad()
        state = torch.random.get_rng_state()
        adapter(x).square().sum().backward()
        torch.random.set_rng_state(state)
        of_down, of_up = torch.randint(3, (2,)).tolist()
        learned.add((of_down, of_up))
        assert not adapter.down.weight.grad[adapter.part_down != of_down].any()
        assert not adapter.up.weight.grad[adapter.part_up != of_up].any()
        torch.random.set_rng_state(state)
        down = torch.where(adapter.part_down == of_down, adapter.down.weight, start)
        up = adapter.up.weight * (adapter.part_up == of_up)
        hidden = F.relu(F.linear(x, down, adapter.down.bias))
        want = 0.1 * F.linear(hidden, up, adapter.up.bias)
        torch.testing.assert_close(adapter(x), want, rtol=1e-12, atol=1e-12)
    assert len(learned) == 9
    whole = Bottleneck(DIM, 6).double()
    whole.load_state_dict(
        {k: v for k, v in adapter.state_dict().items() if k in whole.state_dict()}
    )
    assert torch.equal(adapter.eval()(x), whole(x))


@pytest.mark.parametrize("top", [None, 2])
def test_a_mixture_is_its_formula_token_by_token(top):
    draws = torch.Generator().manual_seed(3)
    mixture = LoRAMixture(DIM, OUT, 2, experts=3, top=top, scale=0.5, generator=draws).double()
    x = tokens()
    assert not mixture(x).any()
    nn.init.normal_(mixture.b)
    want = torch.zeros(2, 3, OUT, dtype=torch.float64)
    for i in range(2):
        for n in range(3):
            token = x[i, n]
            scores = (mixture.gate @ token).tolist()
            best = sorted(range(3), key=lambda k: -scores[k])[: top or 3]
            total = sum(math.exp(scores[k]) for k in best)
            for k in best:
                share = math.exp(scores[k]) / total
                want[i, n] += 0.5 * share * (mixture.b[k] @ (mixture.a[k] @ token)).detach()
    torch.testing.assert_close(mixture(x), want, rtol=1e-12, atol=1e-12)
    mixture(x).square().sum().backward()
    assert all(p.grad.any() for p in mixture.parameters())


# experts or ranks of which some, or the gate, would do nothing
NUMBERS = [
    (lambda: LoRAMixture(DIM, OUT, 2, experts=3, top=4), "kind.top=4 is more than .*experts=3"),
    (lambda: LoRAMixture(DIM, OUT, 2, experts=3, top=1), "kind.top=1 leaves one expert with a sh"),
    (lambda: LoRAMixture(DIM, OUT, 2, experts=1), "kind.experts=1 leaves one expert with a share"),
    (
        lambda: SelfActivated(DIM, OUT, 3, top=4, temperature=1.0),
        "kind.top=4 is more than .*rank=3",
    ),
    (lambda: MoSA(DIM, 2, experts=2 * DIM + 1), "kind.experts=25: a projection at .* has 24 numb"),
]


@pytest.mark.parametrize(("make", "message"), NUMBERS)
def test_numbers_of_experts_with_which_something_does_nothing_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_self_activated_ranks_are_those_of_moram_before_its_second_task():
    draws = torch.Generator().manual_seed(3)
    theirs = RankExperts(DIM, OUT, 5, top_k=2, temperature=0.1, threshold=None).double()
    ours = SelfActivated(DIM, OUT, 5, top=2, temperature=0.1).double()
    with torch.no_grad():
        for own, other in ((ours.a[0], theirs.a), (ours.b[0], theirs.b)):
            own.normal_(generator=draws)
            other.copy_(own[None])
    x = tokens()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_blocks_of_rows_choose_among_their_own_ranks():
    both = SelfActivated(DIM, OUT, 4, top=2, temperature=0.1, parts=["q", "v"]).double()
    for b in both.b:
        nn.init.normal_(b)
    x, rows = tokens(), both(tokens()).split(OUT // 3, -1)
    assert not rows[1].any()
    for i, got in ((0, rows[0]), (1, rows[2])):
        one = SelfActivated(DIM, OUT // 3, 4, top=2, temperature=0.1).double()
        with torch.no_grad():
            one.a[0].copy_(both.a[i])
            one.b[0].copy_(both.b[i])
        torch.testing.assert_close(got, one(x), rtol=1e-12, atol=1e-12)


def test_arrow_is_that_of_the_peft_library():
    arrow = pytest.importorskip(
        "peft.tuners.lora.arrow", reason='peft is missing: pip install -e ".[peft]"'
    )
    sets = []
    for i in range(4):
        draws = torch.Generator().manual_seed(i)
        sets.append(LoRA(DIM, OUT, 3, scale=0.5, generator=draws))
        with torch.no_grad():  # singular values that are far apart: theirs is a power iteration
            sets[-1].b[0].normal_(generator=draws).mul_(torch.tensor([1.0, 0.2, 0.04]))
    names = [f"task_{i}" for i in range(4)]
    settings = SimpleNamespace(
        top_k=3,
        router_temperature=1.0,
        rng_seed=0,
        task_adapter_names=names,
        gks_adapter_names=[],
        use_gks=False,
    )
    theirs = arrow.ArrowLoraLinearLayer(DIM, settings)
    down, up = (
        {n: SimpleNamespace(weight=pick(one)) for n, one in zip(names, sets, strict=True)}
        for pick in (lambda one: one.a[0], lambda one: one.b[0])
    )
    theirs.build_prototypes(down, up)
    x = tokens().float()
    want = theirs(x, down, up, nn.Identity(), dict.fromkeys(names, 0.5))
    torch.testing.assert_close(Arrow(sets)(x), want, rtol=1e-3, atol=1e-4)


def test_random_matrices_of_a_seed_exist_once_and_are_not_saved():
    for name in ("vera", "nola"):
        node = plain_yaml(ROOT / "conf" / "adapter" / f"{name}.yaml")
        net = backbone()
        plan = build({k: v for k, v in node.items() if k != "name"}, at="adapter")
        bank = plan.bank(net)
        for i in range(2):
            plan.add(bank, f"t{i}", torch.Generator().manual_seed(i))
        bank.copy("t0", "copy")
        drawn = [
            id(t)
            for n in ("t0", "t1", "copy")
            for a in bank.adapters(n).values()
            for t in a._drawn.like(next(a.parameters()))
        ]
        assert len(set(drawn)) == len(drawn) // (3 * len(bank.adapters("t0")))
        learned = sum(p.numel() for n in ("t0", "t1", "copy") for p in bank.parameters_of(n))
        assert sum(t.numel() for t in bank.state_dict().values()) == learned


def test_tied_factors_are_saved_once_and_shared_by_a_copy_within_itself():
    node = plain_yaml(ROOT / "conf" / "adapter" / "tied_lora.yaml")
    net = backbone()
    plan = build({k: v for k, v in node.items() if k != "name"}, at="adapter")
    bank = plan.bank(net)
    plan.add(bank, "old", torch.Generator().manual_seed(0))
    wake(bank, "old")
    bank.copy("old", "new")
    assert len({id(a.pair()[0]) for a in bank.adapters("new").values()}) == 1
    wake(bank, "new", seed=2)
    assert not torch.equal(bank.features(X, "old"), bank.features(X, "new"))
    saved = {k: v.clone() for k, v in bank.sets["old"].state_dict().items()}
    assert len(saved) == len({*bank.parameters_of("old")})
    bank.sets["new"].load_state_dict(saved)
    assert torch.equal(bank.features(X, "old"), bank.features(X, "new"))


def test_block_expansion_is_the_network_with_blocks_put_in():
    net, longer = backbone(depth=2), backbone(depth=2)
    net.requires_grad_(False)
    point = {"blocks.0:out": BlockExpansion(net.net.blocks[0])}
    bank = AdapterBank(net)
    bank.add("a", point)
    torch.testing.assert_close(bank.features(X, "a"), net.features(X), rtol=0, atol=0)
    wake(bank, "a")
    inside = point["blocks.0:out"].block
    longer.net.blocks.insert(1, inside)
    assert torch.equal(bank.features(X, "a"), longer.features(X))
    frozen = {id(p) for p in net.parameters()}
    assert not frozen & {id(p) for p in bank.parameters()}


def test_a_ladder_is_its_formula_and_sends_no_gradient_through_the_network():
    net = backbone(depth=3)
    net.requires_grad_(False)
    blocks = {f"blocks.{i}:out": net.net.blocks[i] for i in range(3)}
    rungs = ladder(blocks, 4, generator=torch.Generator().manual_seed(1))
    bank = AdapterBank(net)
    bank.add("a", rungs)
    assert torch.equal(bank.features(X, "a"), net.features(X))
    wake(bank, "a")
    given: list[Tensor] = []
    hooks = [
        b.register_forward_hook(lambda _, args, out: given.append(out)) for b in net.net.blocks
    ]
    with torch.no_grad():
        net.features(X)
    for hook in hooks:
        hook.remove()
    state, (first, *rest) = None, rungs.values()
    state = first.block(first.down(given[0]))
    for rung, tokens_ in zip(rest, given[1:], strict=True):
        share = torch.sigmoid(10 * rung.gate)
        state = rung.block(share * rung.down(tokens_) + (1 - share) * state)
    want = net.net.forward_head(net.net.norm(given[-1] + rest[-1].up(state)), pre_logits=True)
    reads: list[bool] = []
    for block in net.net.blocks:
        block.register_forward_pre_hook(lambda _, args: reads.append(args[0].requires_grad))
    got = bank.features(X, "a")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    got.square().sum().backward()
    assert reads == [False] * 3
    assert all(p.grad is not None for p in bank.parameters_of("a"))


WRONG = {
    "oft": (lambda: OFT(DIM, 5), "block=5: the layer reads 12 channels"),
    "ether_plus": (lambda: EtherPlus(nn.Linear(DIM, OUT), 4), "blocks=4: the layer has a width"),
    "tied_lora": (
        lambda: tied_lora({"a:out": nn.Linear(2, 3), "b:out": nn.Linear(3, 2)}, 2),
        "linear layers of the same widths",
    ),
    "ladder": (lambda: ladder({"a:out": nn.Linear(2, 2)}, 2), "reads Blocks of timm's"),
    "narrow ladder": (lambda: ladder({"a:out": backbone().net.blocks[0]}, 4096), "reduction=4096"),
    "block_expansion": (lambda: BlockExpansion(nn.Linear(2, 2)), "copies a Block of timm's"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_layer_that_a_kind_cannot_serve_is_refused(name):
    make, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        make()


PLACES = (
    "attn.qkv:out",
    "attn.qkv:in",
    "attn:in",
    "mlp:out",
    "mlp:parallel",
    "attn:keys",
    ":tokens",
)


@pytest.mark.parametrize("place", PLACES)
def test_a_kind_at_any_point_learns_or_is_refused(place):
    """What a point does not call would learn nothing, or end a run in a stack trace."""
    at = [f"blocks.1.{place}".replace(".:", ":")]
    net, outcomes = backbone(depth=2), set()
    net.requires_grad_(False)
    for path in sorted((ROOT / "conf" / "adapter").glob("*.yaml")):
        node = {k: v for k, v in plain_yaml(path).items() if k not in ("name", "defaults")}
        if "_target_" not in node:
            continue  # builds on another file
        plan = build(node | {"at": at, "blocks": None, "start": None}, at="adapter")
        bank = plan.bank(net)
        try:
            plan.add(bank, "t", torch.Generator().manual_seed(0))
            wake(bank, "t")
            bank.features(X, "t").square().sum().backward()
        except UserError as error:
            outcomes.add("refused")
            text = str(error)
            assert "strategy.adapter" in text or "block expansion copies" in text, (path.stem, text)
        else:
            outcomes.add("learns")
            learned = bank.parameters_of("t")
            assert any(p.grad is not None and p.grad.any() for p in learned), path.stem
    assert outcomes == {"learns", "refused"}
