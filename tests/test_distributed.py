"""Runs in several processes (gloo on the CPU) give what a single process gives."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import HANG, ROOT
from test_runs import pausing, wait_for
from torch import Tensor, nn
from torch.distributed import TCPStore

from driftline.backbones.backbone import Backbone
from driftline.core import distributed
from driftline.core.checkpoint import Checkpointer, Stopped
from driftline.core.errors import UserError
from driftline.parts.adapters.bottleneck import Bottleneck
from driftline.runs.execute import run_experiment

TINY = [
    "scenario=split_cifar10",
    "scenario.increment=5",
    "scenario.embedded_images=[5,2]",
    "scenario.batch_size=9",  # uneven shares, and a last batch of 7
    "scenario.test_batch_size=7",
    "backbone=embedded_vit",
]
MORE = {
    "lae": ["strategy.freeze_epochs=1", "strategy.drop_last=false"],
    "mos": ["strategy.align_epochs=2", "strategy.reg=0.5"],  # a loss that couples the images
    "olora": ["strategy.optim.lr=0.01"],
    "coda": ["strategy.pool=30", "strategy.ortho=0.1", "strategy.drop_last=false"],
}


def settings(strategy: str) -> list[str]:
    epochs = [] if strategy == "simplecil" else ["strategy.epochs=2"]
    return [f"strategy={strategy}", *TINY, *epochs, *MORE.get(strategy, [])]


def together(folder: Path, work: Callable[[int], None], size: int = 2) -> list[tuple[int, str]]:
    """Call `work(rank)` in `size` processes; returns exit status and output of each."""
    context = multiprocessing.get_context("fork")
    bound, port = context.Event(), context.Value("i", 0)

    stores: list[TCPStore] = []  # alive as long as the process that binds one

    def meet(rank: int) -> None:
        """A store that binds a free port itself; not in the parent, whose threads a fork loses."""
        if rank == 0:
            stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
            port.value = stores[0].port
            bound.set()
        bound.wait(HANG)

    def child(rank: int) -> None:
        out = os.open(folder / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        status = 1
        try:
            meet(rank)
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.value)}
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
            work(rank)
            distributed.leave()
            status = 0
        except UserError as error:
            if distributed.is_news(error):
                print(f"error: {error}", file=sys.stderr)
            status = 2
        except Exception as error:
            if distributed.is_news(error):
                print(f"error: {error!r}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside torch's idle threads
        children = [context.Process(target=child, args=(r,)) for r in range(size)]
        for process in children:
            process.start()
    for process in children:
        process.join(HANG)
    status = [-1 if p.exitcode is None else p.exitcode for p in children]
    for process in children:
        process.kill()
    texts = [(folder / f"rank{rank}.txt").read_text() for rank in range(size)]
    # torch 2.8 prints a line of its own for every process group.
    ours = ["".join(x for x in t.splitlines(True) if not x.startswith("[Gloo]")) for t in texts]
    return list(zip(status, ours, strict=True))


def rows(folder: str | Path) -> list[dict]:
    path = Path(folder) / "batches.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [{k: v for k, v in json.loads(x).items() if isinstance(v, int | float)} for x in lines]


def close(ours: str | Path, theirs: str | Path) -> None:
    """Batch records that agree up to rounding."""
    for a, b in zip(rows(ours), rows(theirs), strict=True):
        assert a | {"seconds": 0} == pytest.approx(b | {"seconds": 0}, rel=1e-5, abs=1e-5)


def tensors(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of the last checkpoint."""
    state = torch.load(Path(folder) / "last.pt", weights_only=True)
    return state["strategy"]["tensors"] | {"draws": state["rng"]["torch"]}


RELEASE = [
    pytest.param(name, marks=pytest.mark.release)
    for name in ("finetune", "olora", "mos", "coda", "inflora")
]


@pytest.mark.one_in(3)
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["lae", "ease", "dualprompt", *RELEASE])
def test_two_processes_give_the_run_of_one(configure, tmp_path, strategy):
    words = [*settings(strategy), "checkpoint.keep=true"]
    one = run_experiment(configure(*words), [])
    cfg = configure(*words, f"root={tmp_path / 'two'}")
    (status, said), (other, nothing) = together(tmp_path, lambda _: run_experiment(cfg, []))
    assert status == other == 0, said + nothing
    assert nothing == ""  # the second process is silent
    folder = next((tmp_path / "two").rglob("summary.json")).parent
    two = json.loads((folder / "summary.json").read_text())
    assert folder.name == Path(one["run"]["folder"]).name
    assert two["metrics"] == one["metrics"]
    assert two["per_class"] == json.loads(json.dumps(one["per_class"]))
    close(folder, one["run"]["folder"])
    torch.testing.assert_close(tensors(folder), tensors(one["run"]["folder"]), rtol=1e-3, atol=1e-4)
    # Nothing is written or counted twice.
    assert {p.name for p in folder.iterdir()} == {
        p.name for p in Path(one["run"]["folder"]).iterdir()
    }
    for name in ("experiences.jsonl", "matrix.jsonl"):
        text = (Path(one["run"]["folder"]) / name).read_text()
        assert (folder / name).read_text() == text
    for count in ("images", "forward_images", "backward_images", "evaluation_forward_images"):
        assert two["cost"][count] == one["cost"][count]
    assert json.loads((folder / "environment.json").read_text())["processes"] == 2


def at_tick(monkeypatch, number: int, rank: int, act: Callable[[], None]) -> None:
    """Call `act` in process `rank` before the run looks for signals for the n-th time."""
    real, count = Checkpointer.tick, iter(range(number - 1))

    def tick(self, *args, **cursor):
        if next(count, None) is None and rank == int(os.environ.get("RANK", "0")):
            act()
        real(self, *args, **cursor)

    monkeypatch.setattr(Checkpointer, "tick", tick)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.release
@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes(configure, tmp_path, monkeypatch):
    """One process, then two of which the second gets a signal, then three."""
    words = [*settings("ease"), "checkpoint.every=2"]
    whole = run_experiment(configure(*words), [])
    cfg = configure(*words, f"root={tmp_path / 'parts'}")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        at_tick(patch, 3, 0, interrupt)
        run_experiment(cfg, [])

    def second(rank: int) -> None:
        at_tick(monkeypatch, 5, 1, interrupt)
        with pytest.raises(Stopped):
            run_experiment(cfg, [])

    assert [status for status, _ in together(tmp_path, second)] == [0, 0]
    assert not list((tmp_path / "parts").rglob("summary.json"))
    (status, said), *others = together(tmp_path, lambda _: run_experiment(cfg, []), size=3)
    assert status == 0 and others == [(0, "")] * 2, said
    assert "resuming in task 1, epoch 0, batch 2" in said  # 6 batches a task: 3 + 5 were seen
    folder = next((tmp_path / "parts").rglob("summary.json")).parent
    assert json.loads((folder / "summary.json").read_text())["metrics"] == whole["metrics"]
    close(folder, whole["run"]["folder"])


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_with_one_message(configure, tmp_path, monkeypatch):
    cfg = configure(*settings("lae"))

    def fail() -> None:
        raise ValueError("the disk of this machine is full")

    def work(rank: int) -> None:
        at_tick(monkeypatch, 2, 1, fail)
        run_experiment(cfg, [])

    (status, said), (other, message) = together(tmp_path, work)
    assert status == 2 and "error:" not in said
    assert other == 1 and message.count("the disk of this machine is full") == 1
    text = next(Path(cfg.root).rglob("failure.txt")).read_text()
    assert "another process failed" in text and "the disk of this machine is full" in text


@pytest.mark.slow
def test_a_killed_process_ends_the_others(configure, tmp_path, monkeypatch):
    cfg = configure(*settings("lae"))

    def work(rank: int) -> None:
        at_tick(monkeypatch, 2, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))
        run_experiment(cfg, [])

    (status, said), (killed, nothing) = together(tmp_path, work)
    assert (status, killed, nothing) == (2, -signal.SIGKILL, "")
    assert said.count("error: another process of this run has ended") == 1
    assert "Lost" in next(Path(cfg.root).rglob("failure.txt")).read_text()


# ------------------------------------------------------------------------ what is refused


def test_adaptation_streams_and_sweeps_are_refused(configure, tmp_path):
    cfg = configure("strategy=tent", "scenario=imagenet_c", "scenario.images=20")
    (status, said), (other, more) = together(tmp_path, lambda _: run_experiment(cfg, []))
    assert status == other == 2 and (said + more).count("error: ") == 1
    assert "such a run takes one process" in said + more and "gpu_pool.py" in said + more
    words = [sys.executable, "run.py", "-m", "strategy=lae,ease", "scenario=split_cifar10"]
    for rank in ("0", "1"):
        env = {**os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 2
        assert ("torchrun takes one run, not a sweep" in done.stderr) == (rank == "0")


def test_without_the_rest_of_torchruns_environment(configure, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="not MASTER_ADDR.*start the run with torchrun"):
        run_experiment(configure(*settings("lae")), [])
    with pytest.raises(UserError, match="runtime.device=cuda:1 would put all processes on one GPU"):
        distributed.own_device("cuda:1")


def test_layers_that_depend_on_the_whole_batch_are_refused():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0), nn.BatchNorm1d(2), nn.Dropout(0.5))
    with pytest.raises(UserError, match="layer 2 would use the statistics of a share"):
        distributed._require_separable(net)
    net[2].eval()
    with pytest.raises(UserError, match="layer 3 .Dropout. would draw other random numbers"):
        distributed._require_separable(net)
    distributed._require_separable(net.eval())


# ------------------------------------------------------------------------ the parts


class Net(nn.Module):
    """Features of [B, 3, 1, 1]: a linear layer and an adapter with dropout."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.first, self.adapter = nn.Linear(3, 4), Bottleneck(4, 3, dropout=0.5, generator=draws)
        nn.init.normal_(self.first.weight, generator=draws)
        nn.init.normal_(self.adapter.up.weight, generator=draws)
        nn.init.zeros_(self.first.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.adapter(self.first(x.flatten(1)))

    def forward_head(self, x: Tensor, pre_logits: bool) -> Tensor:
        return x


def step(images: int) -> list[Tensor]:
    """One step with a loss that couples the images; features, gradients, draws afterwards."""
    torch.manual_seed(1)
    backbone, head = Backbone(Net()), nn.Linear(4, 3)
    x = torch.rand(images, 3, 1, 1, generator=torch.Generator().manual_seed(2))
    features = backbone.features(x)
    similar = F.cross_entropy(features @ features.T, torch.arange(images))
    loss = F.cross_entropy(head(features), torch.arange(images) % 3) + similar
    learned = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(learned, lr=0.1)
    loss.backward()
    optimizer.step()
    distributed.require_equal(learned, "here")
    assert backbone.passes.forward == backbone.passes.backward == images
    return [features.detach(), *(p.grad for p in learned if p.grad is not None), torch.rand(2)]


@pytest.mark.parametrize("images", [1, 2, 3, 8])
def test_a_divided_pass_gives_features_gradients_and_draws_of_a_whole_one(tmp_path, images):
    want = step(images)

    def work(rank: int) -> None:
        distributed.join(torch.device("cpu"))
        for ours, theirs in zip(step(images), want, strict=True):
            torch.testing.assert_close(ours, theirs)

    results = together(tmp_path, work, size=3)
    assert [s for s, _ in results] == [0, 0, 0], results


def test_a_method_that_uses_gradients_too_early_is_named(tmp_path):
    def work(rank: int) -> None:
        distributed.join(torch.device("cpu"))
        backbone = Backbone(Net())
        optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
        backbone.features(torch.arange(12.0).view(4, 3, 1, 1)).sum().backward()
        nn.utils.clip_grad_norm_(backbone.parameters(), 1.0)
        for p in backbone.parameters():  # as by an optimiser of one's own
            p.data -= 0.1 * p.grad
        optimizer.zero_grad()
        distributed.require_equal(backbone.parameters(), "of Mine after task 0")

    results = together(tmp_path, work)
    assert [s for s, _ in results] == [2, 2]
    said = "".join(text for _, text in results)
    assert said.count("different parameters of Mine after task 0") == 1, said


# ------------------------------------------------------------------------ torchrun itself


def torchrun(root: Path, *words: str, script: tuple[str, ...]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--standalone", *script, *words, f"root={root}", "runtime.threads=1"]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.release
@pytest.mark.slow
def test_ctrl_c_under_torchrun_saves_and_a_run_without_it_goes_on(configure, tmp_path):
    words = [*settings("lae"), "checkpoint.every=1"]
    root = tmp_path / "two"
    process = torchrun(root, *words, script=pausing(tmp_path / "paused", "lae", 3))
    wait_for(tmp_path / "paused", process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=HANG)
    assert process.returncode != 0
    assert out.count("stopped; the same command goes on from here") == 1, out
    assert not list(root.rglob("summary.json"))
    again = run_experiment(configure(*words, f"root={root}"), [])
    whole = run_experiment(configure(*words), [])
    assert again["metrics"] == whole["metrics"]
    close(again["run"]["folder"], whole["run"]["folder"])
