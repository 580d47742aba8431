"""L2P, DualPrompt and CODA-Prompt against numbers recorded from LAMDA-CL/LAMDA-PILOT 5240714."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import strategy_node
from golden_cl_case import ClCase, images
from golden_cl_case import backbone as recorded_backbone
from test_ease import learn, task, tiny
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.cl.coda import CodaPrompt, orthogonal
from driftline.cl.l2p import L2P, voted
from driftline.core.build import build
from driftline.core.errors import Diverged, UserError

SMALL: dict[str, dict[str, Any]] = {
    "l2p": {"epochs": 2, "pool": 4, "length": 2, "top_k": 2},
    "dualprompt": {"epochs": 2, "pool": 3, "general_blocks": [0], "blocks": [1]},
    "coda": {"epochs": 2, "pool": 12, "blocks": [0, 1], "drop_last": False},
}
X = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def make(name: str, net: Backbone | None = None, **options: Any) -> Any:
    node = strategy_node(name, **SMALL[name] | options)
    return build(node, at="strategy", backbone=net or tiny(), seed=3, num_classes=10)


def matched(name: str, case: ClCase) -> dict[str, Any]:
    """Settings that L2P and DualPrompt take from a recorded case."""
    h = case.hyper
    assert h["batchwise_prompt"] and h["pull_constraint"] and h["scheduler"] == "constant"
    options: dict[str, Any] = {
        "pool": h["size"],
        "length": h["length"],
        "top_k": h["top_k"],
        "vote": "batch",
        "pull": h["pull_constraint_coeff"],
        "epochs": h["tuned_epoch"],
        "lr": h["init_lr"],
    }
    if name == "dualprompt":
        options |= {
            "general_length": h["g_prompt_length"],
            "general_blocks": h["g_prompt_layer_idx"],
            "blocks": h["e_prompt_layer_idx"],
            "layout": "reshaped",
        }
    return options


def tensors(strategy: Any, prefix: str = "backbone.") -> dict[str, Tensor]:
    """What learns, under its official name and in its shape."""
    if isinstance(strategy, CodaPrompt):
        found = {"fc.weight": strategy.head.weight, "fc.bias": strategy.head.bias}
        for i, block in enumerate(strategy.components):
            found[f"prompt.e_p_{i}"] = block.prompt
            found[f"prompt.e_k_{i}"] = block.key
            found[f"prompt.e_a_{i}"] = block.attention
        return found
    found = {"head.weight": strategy.head.weight, "head.bias": strategy.head.bias}
    if isinstance(strategy, L2P):
        adapters = strategy.bank.adapters("prompts")
        found["prompt.prompt"] = adapters["blocks.0:in"].prompt
        found["prompt.prompt_key"] = strategy.keys
    else:
        shared, own = strategy.bank.adapters("prompts").values()
        found["g_prompt"], found["e_prompt.prompt"] = shared.prompt, own.prompt
        found["e_prompt.prompt_key"] = strategy.keys
    return {prefix + key: value for key, value in found.items()}


def official(value: Tensor, like: Tensor) -> Tensor:
    """In the official shape: heads apart, zeros for components that do not exist yet."""
    if value.ndim < like.ndim:
        return value.view(like.shape)
    return F.pad(value, (0, 0) * (value.ndim - 1) + (0, len(like) - len(value)))


def close_all(case: ClCase, strategy: Any, head: str, *, grad: bool = False) -> None:
    for key, p in tensors(strategy).items():
        value = p.grad if grad else p.detach()
        case.close(f"{head}/{key}", official(value, case[f"{head}/{key}"]))


@torch.no_grad()
def start(case: ClCase, strategy: Any, head: str, prefix: str = "backbone.") -> None:
    for key, p in tensors(strategy, prefix).items():
        want = case[f"{head}/{key}"]
        p.copy_(want[: len(p)] if isinstance(strategy, CodaPrompt) else want.view_as(p))


def run(case: ClCase, strategy: Any, between: Any = None, observed: Any = None) -> None:
    """Walk the recorded batches and compare step by step, with the scores after every task."""
    sizes = case.hyper["task_sizes"]
    events = iter([e for e in case.info["events"] if e[0] in ("pass", "accuracy")])
    for t in range(len(sizes)):
        now = case.task(t, sizes)
        strategy.begin_task(now)
        if between is not None:
            between(t)
        if t == 0:
            start(case, strategy, "task0/before_training")
        close_all(case, strategy, f"task{t}/before_training")
        losses, rates, step = [], [], 0
        for epoch in range(strategy.epochs):
            strategy.begin_epoch(now, epoch)
            for rows in next(events)[2]:
                rates.append([strategy.optimizer.param_groups[0]["lr"]])
                losses.append(strategy.observe(images("train", rows))["loss"])
                if step < 2:
                    close_all(case, strategy, f"task{t}/train/step{step}/grad", grad=True)
                    close_all(case, strategy, f"task{t}/train/step{step}/param")
                step += 1
        case.close(f"task{t}/train/loss_per_step", torch.stack(losses))
        case.close(f"task{t}/train/lr_per_step", torch.tensor(rates, dtype=torch.float64))
        close_all(case, strategy, f"task{t}/after_training")
        strategy.end_task(now)
        if observed is not None:
            observed(t, "train")

        batches = [images("test", rows) for rows in next(events)[2]]
        scores = torch.cat([strategy.predict(b.x) for b in batches])
        y = torch.cat([b.y for b in batches])
        case.close(f"task{t}/test_logits", scores)
        assert torch.equal(torch.cat([b.index for b in batches]), case[f"task{t}/test_indices"])
        assert torch.equal(scores.argmax(1), case[f"task{t}/test_logits"].argmax(1))
        right = 100 * (scores.argmax(1) == y).float().mean().item()
        assert right == pytest.approx(next(events)[2], abs=0.01)
        if observed is not None:
            observed(t, "test")


# ------------------------------------------------------------------------ recorded runs


@pytest.mark.usefixtures("gradients_stay")
@pytest.mark.parametrize(
    "name", ["l2p/l2p_run", "dualprompt/dualprompt_run", "dualprompt/dualprompt_run_small_pool"]
)
def test_recorded_run(name, monkeypatch, record_property):
    case, kind = ClCase(name), name.partition("/")[0]
    strategy = make(kind, recorded_backbone(), **matched(kind, case))
    assert strategy.batch_dependent
    chosen: list[Tensor] = []
    cosines: list[Tensor] = []
    features: list[Tensor] = []
    inside = strategy.bank.features

    def passed(x: Tensor, name: str, context: Tensor) -> Tensor:
        chosen.append(context)
        cosines.append(strategy.similarity(strategy.query(x)).detach())
        features.append(inside(x, name, context))
        return features[-1]

    monkeypatch.setattr(strategy.bank, "features", passed)

    def observed(t: int, part: str) -> None:
        pull = [c.gather(1, i).sum() / len(c) for c, i in zip(cosines, chosen, strict=True)]
        if part == "train":
            first = torch.stack([i[0] for i in chosen])
            assert torch.equal(first, case[f"task{t}/train/prompt_idx_first_image"])
            case.close(f"task{t}/train/pull_per_step", torch.stack(pull))
        else:
            assert torch.equal(torch.cat(chosen), case[f"task{t}/test_prompt_idx"])
            case.close(f"task{t}/test_similarity", torch.cat(cosines))
            case.close(f"task{t}/test_features", torch.cat(features))
        for rows in (chosen, cosines, features):
            rows.clear()

    run(case, strategy, observed=observed)
    record_property("worst", case.worst)


@pytest.mark.usefixtures("gradients_stay")
@pytest.mark.parametrize("name", ["coda_run", "coda_run_ortho"])
def test_recorded_coda_run(name, record_property):
    case = ClCase(f"coda/{name}")
    h = case.hyper
    pool, length, ortho = h["prompt_param"]
    strategy = make(
        "coda",
        recorded_backbone(),
        pool=pool,
        length=int(length) // 2,
        ortho=ortho,
        blocks=h["blocks"],
        epochs=h["tuned_epoch"],
        optim={"kind": h["optimizer"], "lr": h["init_lr"], "momentum": h.get("momentum", 0.0)},
        drop_last=True,
    )
    before: dict[str, Tensor] = {}

    @torch.no_grad()
    def between(t: int) -> None:
        """The new components are what Gram-Schmidt makes of the recorded draws."""
        assert [len(block.key) for block in strategy.components] == [3 * (t + 1)] * 2
        for i, block in enumerate(strategy.components):
            for key, p in (("p", block.prompt), ("k", block.key), ("a", block.attention)):
                old = before.get(f"{key}{i}", p[:0])
                assert torch.equal(p[: len(old)], old)
                drawn = case[f"task{t}/draws/e_{key}_{i}"]
                p[len(old) :] = orthogonal(old.flatten(1), drawn).view_as(p[len(old) :])

    def observed(t: int, part: str) -> None:
        for i, block in enumerate(strategy.components):
            for key, p in (("p", block.prompt), ("k", block.key), ("a", block.attention)):
                before[f"{key}{i}"] = p.detach().clone()

    run(case, strategy, between, observed)
    record_property("worst", case.worst)


def test_recorded_coda_starts_come_from_its_draws():
    case = ClCase("coda/coda_run")
    for i in range(2):
        for key in "pka":
            drawn = case[f"task0/draws/e_{key}_{i}"]
            made = orthogonal(drawn[:0], drawn)
            want = case[f"task0/before_training/prompt.e_{key}_{i}"]
            case.close(f"task0/before_training/prompt.e_{key}_{i}",
                       official(made.view(3, *want.shape[1:]), want))  # fmt: skip


@torch.no_grad()
def test_recorded_l2p_forward(monkeypatch, record_property):
    case = ClCase("l2p/l2p_forward")
    strategy = make("l2p", recorded_backbone(), **matched("l2p", case))
    start(case, strategy, "param", "")
    case.close("pos_embed", torch.cat([
        strategy.backbone.net.pos_embed[:, :1].expand(-1, 7, -1),
        strategy.backbone.net.pos_embed[:, 1:]], 1))  # fmt: skip
    tokens, mean = strategy.bank.adapters("prompts").values()
    seen: dict[str, Tensor] = {}
    before, after = tokens.before, mean.after

    def at_input(inp: Tensor) -> Tensor:
        seen["input"] = before(inp)
        return seen["input"]

    def at_norm(inp: Tensor, out: Tensor) -> Tensor:
        seen["norm"] = out
        return after(inp, out)

    monkeypatch.setattr(tokens, "before", at_input)
    monkeypatch.setattr(mean, "after", at_norm)
    for tag, rows in (("batch", range(9)), ("single0", [0]), ("single5", [5])):
        x = images("test", rows).x
        query = strategy.query(x)
        cosines, chosen = strategy.similarity(query), strategy.context(query)
        case.close(f"{tag}/query", query)
        case.close(f"{tag}/similarity", cosines)
        assert torch.equal(cosines.topk(2).indices, case[f"{tag}/per_image_topk"])
        assert torch.equal(chosen, case[f"{tag}/prompt_idx"])
        case.close(f"{tag}/reduce_sim", strategy.penalty(query, chosen) / -strategy.pull)
        features = strategy.bank.features(x, "prompts", chosen)
        case.close(f"{tag}/feature", features)
        case.close(f"{tag}/logits", strategy.head(features))
        placed = seen["input"] - case["pos_embed"]
        case.close(f"{tag}/prompted_embedding", placed[:, 1:])
        case.close(f"{tag}/tokens_after_norm", seen["norm"])
    record_property("worst", case.worst)


@torch.no_grad()
def test_recorded_dualprompt_forward(record_property):
    case = ClCase("dualprompt/dualprompt_forward")
    strategy = make("dualprompt", recorded_backbone(), **matched("dualprompt", case))
    start(case, strategy, "param", "")
    blocks: list[Tensor] = []
    for block in strategy.backbone.net.blocks:
        block.register_forward_hook(lambda _, args, out: blocks.append(out))
    (expert,) = strategy.experts
    rows = [0, 3, 11, 2, 7, 9]
    for tag, at in (
        ("test_batch", range(9)),
        ("test_single4", [4]),
        ("train_task1_batch6", rows),
        ("train_task1_batch5", rows[:5]),
    ):
        x = images("test", at).x
        strategy.grow(case.task(1, [4, 3, 3]))
        query = strategy.query(x)
        training = tag.startswith("train")
        chosen = strategy.training_context(query) if training else strategy.context(query)
        case.close(f"{tag}/query", query)
        case.close(f"{tag}/similarity", strategy.similarity(query))
        assert torch.equal(chosen, case[f"{tag}/prompt_idx"])
        case.close(f"{tag}/reduce_sim", strategy.penalty(query, chosen) / -strategy.pull)
        expert.context = chosen
        given = torch.stack(expert.rows(), 1).unflatten(-1, (4, 8))[None]
        case.close(f"{tag}/batched_prompt", given)
        blocks.clear()
        features = strategy.bank.features(x, "prompts", chosen)
        case.close(f"{tag}/feature", features)
        case.close(f"{tag}/logits", strategy.head(features))
        for i, out in enumerate(blocks):
            case.close(f"{tag}/block{i}_output", out)
    record_property("worst", case.worst)


# ------------------------------------------------------------------------ votes and layouts


def test_a_vote_counts_the_batch_and_each_image_chooses_without_one():
    choices = torch.tensor([[4, 1], [4, 2], [2, 4], [1, 4]])
    assert voted(choices, 6).tolist()[0] == 4 and sorted(voted(choices[:1], 6)) == [1, 4]
    assert voted(torch.tensor([[3, 3]]), 6).tolist() == [3, 3]  # filled up
    query = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    for name in ("l2p", "dualprompt"):
        own, batch = make(name, vote=None), make(name)
        assert batch.batch_dependent and not own.batch_dependent
        cosines = torch.cosine_similarity(query[:, None], own.keys[None], dim=2)
        assert torch.equal(own.context(query), cosines.topk(own.top_k).indices)
        assert len(own.context(query).unique(dim=0)) > 1
        assert len(batch.context(query).unique(dim=0)) == 1


def test_the_reshaped_layout_is_that_of_the_pytorch_versions():
    for layout in ("permuted", "reshaped"):
        strategy = make("dualprompt", layout=layout, vote=None)
        assert strategy.batch_dependent == (layout == "reshaped")
        (expert,) = strategy.experts
        key, value = expert.prompt[:, 1]
        expert.context = torch.full((5, 1), 1)
        keys, values = expert.rows()
        if layout == "permuted":
            assert torch.equal(keys, key.expand_as(keys))
            assert torch.equal(values, value.expand_as(values))
        else:  # of five images: two with the key twice, one right, two with the value twice
            assert torch.equal(keys, torch.stack([key, key, key, value, value]))
            assert torch.equal(values, torch.stack([key, key, value, value, value]))


def test_a_new_expert_starts_where_the_last_one_ended_and_its_key_does_not():
    strategy = make("dualprompt")
    for now in (task(0, range(0, 3)), task(1, range(3, 5))):
        learn(strategy, now)
    (expert,) = strategy.experts
    learned, keys = expert.prompt.detach().clone(), strategy.keys.detach().clone()
    strategy.begin_task(task(2, range(5, 7)))
    assert torch.equal(expert.prompt[:, 2], learned[:, 1])
    assert torch.equal(expert.prompt[:, :2], learned[:, :2])
    assert torch.equal(strategy.keys, keys)
    learn(strategy, task(2, range(5, 7)), begin=False)
    assert torch.equal(expert.prompt[:, :2], learned[:, :2])  # older experts do not learn
    learned = expert.prompt.detach().clone()
    strategy.begin_task(task(3, range(7, 9)))  # beyond the pool: images choose, nothing is copied
    assert torch.equal(expert.prompt, learned) and not strategy.expert
    learn(strategy, task(3, range(7, 9)), begin=False)
    assert not torch.equal(expert.prompt, learned)


# ------------------------------------------------------------------------ components


def test_new_components_are_orthogonal_and_old_ones_stay():
    strategy = make("coda", lr=0.05)
    strategy.begin_task(task(0, range(0, 4)))
    for part in (part.flatten(1) for block in strategy.components for part in block.parts()):
        assert torch.allclose(part @ part.T, torch.eye(4), atol=1e-5)
    learn(strategy, task(0, range(0, 4)), begin=False)
    old = [[p.detach().clone() for p in block.parts()] for block in strategy.components]
    later = task(1, range(4, 7))
    strategy.begin_task(later)
    for block, held in zip(strategy.components, old, strict=True):
        for part, before in zip(block.parts(), held, strict=True):
            assert len(part) == 8 and torch.equal(part[:4], before)
            assert torch.allclose(part[4:].flatten(1).norm(dim=1), torch.ones(4))
    learn(strategy, later, begin=False)
    for block, held in zip(strategy.components, old, strict=True):
        for part, before in zip(block.parts(), held, strict=True):
            assert torch.equal(part[:4], before)
    query = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    block = strategy.components[0]
    block.context = query
    keys, values = block.rows()
    attended = query[:, None] * block.attention[None]
    weights = torch.cosine_similarity(attended, block.key[None], dim=2)
    want = torch.einsum("bm,mld->bld", weights, block.prompt)
    assert torch.allclose(torch.cat([keys, values], 1), want, atol=1e-5)


def test_more_tasks_than_planned_add_components_with_one_warning():
    strategy = make("coda", pool=6, tasks=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(4):
            strategy.begin_task(task(i, range(2 * i, 2 * i + 2)))
    assert [len(block.key) for block in strategy.components] == [12, 12]
    (said,) = [str(w.message) for w in caught if "strategy.tasks" in str(w.message)]
    assert said.startswith("task 2")
    with pytest.raises(UserError, match=r"task 5: 18 components.*16 values.*strategy\.tasks"):
        for i in (4, 5):
            strategy.begin_task(task(i, range(8, 10)))


# ------------------------------------------------------------------------ odd input


@pytest.mark.parametrize("name", list(SMALL))
def test_only_prompts_and_head_learn_and_every_image_is_passed_twice(name):
    strategy = make(name)
    before = {k: v.clone() for k, v in strategy.backbone.state_dict().items()}
    learn(strategy, task(0, range(0, 3)))
    assert all(torch.equal(v, before[k]) for k, v in strategy.backbone.state_dict().items())
    learned = {id(p) for p in strategy.updated_parameters()}
    keys = [] if name == "coda" else [strategy.keys]
    assert learned == {id(p) for p in (*strategy.bank.parameters(), *strategy.head.parameters(),
                                       *keys)}  # fmt: skip
    passes = strategy.backbone.passes
    start = passes.forward
    assert strategy.predict(X).shape == (5, 3)
    assert passes.forward - start == 2 * len(X)


def test_bad_input_is_named():
    for name, options, text in (
        ("l2p", {"top_k": 5}, r"strategy\.top_k=5.*strategy\.pool=4"),
        ("dualprompt", {"top_k": 4}, r"strategy\.top_k=4.*strategy\.pool=3"),
        ("dualprompt", {"blocks": [2]}, r"strategy\.blocks=\[2\].*blocks 0 to 1"),
        ("dualprompt", {"blocks": [0]}, r"strategy\.general_blocks.*each block once"),
        ("coda", {"blocks": [6, 7]}, r"strategy\.blocks=\[6, 7\]"),
        ("coda", {"pool": 3, "tasks": 4}, r"strategy\.pool=3.*4 tasks"),
        ("coda", {"pool": 20}, r"task 0: 20 components.*16 values.*strategy\.pool"),
        ("l2p", {"vote": "task"}, r"strategy\.vote"),
    ):
        with pytest.raises(UserError, match=text):
            make(name, **options).grow(task(0, range(0, 2)))
    with pytest.warns(UserWarning, match=r"strategy\.blocks=\[1, 7\].*no prompts"):
        assert len(make("coda", blocks=[1, 7]).components) == 1
    for name in SMALL:
        strategy = make(name)
        with pytest.warns(UserWarning, match="one class"):
            learn(strategy, task(0, range(0, 1)))
        strategy.begin_task(task(1, range(1, 3)))
        batch = next(task(1, range(1, 3)).train(0))
        with pytest.raises(Diverged, match=r"strategy\.optim\.lr"):
            strategy.observe(batch._replace(x=batch.x * torch.nan))
