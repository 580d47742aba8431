"""A finished run is the run that was asked for: settings, code of the method, and the folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from omegaconf import OmegaConf
from test_runs import CL, TTA, Kill, records, settings, stop_after

from driftline.core import identity, provenance
from driftline.core.build import nodes
from driftline.core.errors import UserError
from driftline.core.processes import Lock
from driftline.runs import execute
from driftline.runs.execute import complete, run_experiment

RECORDED = json.loads((Path(__file__).parent / "data" / "identities.json").read_text())


# ------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("words", list(RECORDED))
def test_identities_stay_what_they_were(configure, words):
    """Recorded. A new option belongs into `core.identity.SINCE` with the value that runs had
    before it, else every finished run of its method is lost; then this passes unchanged."""
    cfg = complete(configure(*words.split()))
    assert identity.identity(cfg, "data") == RECORDED[words]


def test_a_young_option_counts_only_with_another_value(configure, monkeypatch):
    cfg = configure("strategy=tent")
    before = identity.identity(cfg)
    OmegaConf.set_struct(cfg, False)
    cfg.strategy.window = None
    cfg.ema = 0.5
    assert identity.identity(cfg) != before
    young = identity.SINCE["driftline.tta.tent.Tent"] | {"window": None}
    monkeypatch.setitem(identity.SINCE, "driftline.tta.tent.Tent", young)
    monkeypatch.setitem(identity.SINCE, "", identity.SINCE[""] | {"ema": 0.5})
    assert identity.identity(cfg) == before
    cfg.strategy.window = 3
    assert identity.identity(cfg) != before
    other = configure("strategy=cotta")  # another method has no such option
    OmegaConf.set_struct(other, False)
    plain = identity.identity(other)
    other.strategy.window = None
    assert identity.identity(other) != plain


def test_an_option_that_is_gone_counts_with_the_value_that_is_left(configure, monkeypatch):
    """Where it was: at the top level, in the node of its target, nowhere else."""
    cfg = configure("strategy=tent")
    OmegaConf.set_struct(cfg, False)
    cfg.depth, cfg.strategy.width = 1, 2
    before = identity.identity(cfg)
    del cfg.depth, cfg.strategy.width
    assert identity.identity(cfg) != before
    for kind, options in {"": {"depth": 1}, "driftline.tta.tent.Tent": {"width": 2}}.items():
        monkeypatch.setitem(identity.UNTIL, kind, identity.UNTIL.get(kind, {}) | options)
    assert identity.identity(cfg) == before


def test_rules_and_their_order_make_another_run(configure):
    words = [[], ["window"], ["window", "reset_every"], ["reset_every", "window"]]
    cfgs = [configure("strategy=tent", f"around=[{','.join(w)}]") for w in words]
    assert len({identity.identity(cfg) for cfg in cfgs}) == 4
    names = [identity.method_name("tent", list(cfg.around)) for cfg in cfgs]
    assert names[:2] == ["tent", "tent (around=window)"]
    assert names[3] == "tent (around=[reset_every,window])"


# ------------------------------------------------------------------------------ code


def test_words_and_layout_are_not_code(tmp_path):
    texts = {
        "plain": 'def f(x):\n    """One."""\n    return x + 1\n',
        "same": 'def f(x):  # why\n\n    """Two."""\n    return (x +\n            1)\n',
        "other": "def f(x):\n    return x + 2\n",
    }
    prints = {}
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
        prints[name] = provenance.fingerprint(tmp_path / f"{name}.py")
    assert prints["plain"] == prints["same"] != prints["other"]


@pytest.mark.parametrize(
    "around",
    [
        "if x:\n {0}\nelse:\n {0}",
        "for x in y:\n {0}\nelse:\n {0}",
        "try:\n {0}\nexcept E:\n {0}\nelse:\n {0}\nfinally:\n {0}",
        "with x:\n while y:\n  {0}",
        "match x:\n case 1:\n  {0}",
        "class A:\n {0}\n async def f():\n  {0}",
    ],
)
def test_docstrings_are_not_code_wherever_they_stand(tmp_path, around):
    places = around.count("{0}")
    prints = set()
    for number in range(places + 1):
        words = ["two" if number == i else "one" for i in range(places)]
        texts = [f'def f(): "{word}"; return {{}}' for word in words]
        numbered = around.replace("{0}", "{}").format(*texts)
        (tmp_path / f"{number}.py").write_text(numbered)
        prints.add(provenance.fingerprint(tmp_path / f"{number}.py"))
    assert len(prints) == 1


def test_what_was_read_ahead_is_read_again_where_it_has_changed_and_is_not_imported(
    tmp_path, monkeypatch
):
    package = tmp_path / "core"
    package.mkdir()
    for name in ("imported", "other"):
        (package / f"{name}.py").write_text("x = 1\n")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setitem(sys.modules, "imported", SimpleNamespace(__file__=f"{package}/imported.py"))
    provenance.read_ahead()
    for path in package.glob("*.py"):
        path.write_text("x = 1000\n")
    code = provenance.code_of()["framework"]
    assert code["core/imported.py"] != code["core/other.py"]


@pytest.mark.parametrize(
    "line",
    [
        "from .helper import SCALE",
        "from . import helper",
        "from ..ownpkg.helper import SCALE",
        "from ownroot.ownpkg import helper",
        "import ownroot.ownpkg.helper",
    ],
)
def test_every_way_to_import_a_module_counts(tmp_path, monkeypatch, line):
    package = tmp_path / "ownroot" / "ownpkg"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "helper.py").write_text("SCALE = 1\n")
    (package / "method.py").write_text(f"def f():\n    {line}\n")
    monkeypatch.syspath_prepend(tmp_path)
    code = provenance.code_of("ownroot.ownpkg.method.Mine")["method"]
    assert {Path(name).name for name in code} >= {"method.py", "helper.py"}
    for name in [name for name in sys.modules if name.split(".")[0] == "ownroot"]:
        del sys.modules[name]  # find_spec imports the packages


@pytest.mark.one_in(4)
@pytest.mark.parametrize("strategy", [*TTA, *CL])
def test_the_code_of_a_method_is_its_file_and_what_it_imports(configure, strategy):
    targets = [str(node._target_) for node in nodes(configure(f"strategy={strategy}").strategy)]
    code = provenance.code_of(*targets)
    modules = [target.removeprefix("driftline.").rpartition(".")[0] for target in targets]
    files = [module.replace(".", "/") + ".py" for module in modules]
    own = files[0]
    assert {*files} <= code["method"].keys()  # with the method inside a rule
    imports = any("driftline.backbones" in (ROOT / name).read_text() for name in files)
    assert "backbones/backbone.py" in code["method"] or not imports
    assert "core/runner.py" in code["framework"] and not {*code["method"]} & {*code["framework"]}
    expected = {
        "cotta": "parts/views.py",
        "ease": "parts/adapters/bank.py",
        "ewc": "cl/finetune.py",
    }
    assert expected.get(strategy, own) in code["method"]


class Editor:
    """Makes a process see other code: fingerprints of chosen files are replaced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.edited: dict[str, str] = {}
        real = provenance.code_of

        def code_of(*targets: str) -> provenance.Code:
            code = real(*targets)
            for part in ("method", "framework"):
                code[part] |= {k: v for k, v in self.edited.items() if k in code[part]}
            return code

        monkeypatch.setattr(execute, "code_of", code_of)


@pytest.fixture
def editor(monkeypatch) -> Editor:
    return Editor(monkeypatch)


@pytest.mark.slow
def test_an_edited_method_runs_anew_and_says_why(configure, editor, capsys):
    cfg = configure(*settings("bn_adapt"))
    first = run_experiment(cfg, [])
    editor.edited["tta/bn_adapt.py"] = "changed"
    second = run_experiment(cfg, [])
    assert second["run"]["folder"] == first["run"]["folder"] + "-2"
    assert second["source"]["folder"] == first["source"]["folder"]  # that method has not changed
    assert "code of which was another: tta/bn_adapt.py" in capsys.readouterr().out
    editor.edited.clear()
    assert run_experiment(cfg, [])["run"]["folder"] == first["run"]["folder"]
    cfg.on_exists = "error"
    with pytest.raises(UserError, match="finished already"):
        run_experiment(cfg, [])


@pytest.mark.slow
def test_an_unfinished_run_does_not_go_on_with_other_code(configure, editor, monkeypatch, capsys):
    run_experiment(configure(*settings("source")), [])
    cfg = configure(*settings("tent"), "checkpoint.every=1")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Kill):
            run_experiment(cfg, [])
    editor.edited["parts/norms.py"] = "changed"
    assert run_experiment(cfg, [])["run"]["folder"].endswith("-2")
    text = capsys.readouterr().out
    assert "was another: parts/norms.py" in text and "resuming" not in text
    editor.edited.clear()
    assert not run_experiment(cfg, [])["run"]["folder"].endswith("-2")
    assert "resuming" in capsys.readouterr().out


def test_other_code_of_the_framework_is_one_warning(configure, editor, capsys):
    cfg = configure(*settings("source"))
    first = run_experiment(cfg, [])
    editor.edited["core/runner.py"] = "changed"
    assert run_experiment(cfg, [])["run"]["folder"] == first["run"]["folder"]
    said = capsys.readouterr().out
    assert said.count("code outside the method has changed since") == 1
    assert "core/runner.py" in said


def test_a_run_without_recorded_code_is_not_the_run_asked_for(configure, capsys):
    cfg = configure(*settings("source"))
    first = Path(run_experiment(cfg, [])["run"]["folder"])
    path = first / "environment.json"
    known = json.loads(path.read_text())
    del known["code"]
    path.write_text(json.dumps(known))
    assert run_experiment(cfg, [])["run"]["folder"] == f"{first}-2"
    assert "the method's code of which is not recorded" in capsys.readouterr().out


def test_another_version_of_python_is_no_other_code():
    now = provenance.code_of("driftline.tta.tent.Tent")
    before = {**now, "method": {"tta/tent.py": "changed"}}
    assert "tta/tent.py" in provenance.changed_files("method", before, now)
    assert provenance.changed_files("method", {**before, "python": "3.8"}, now) == []


def test_a_new_method_is_in_the_patch_though_git_does_not_track_it(tmp_path):
    copy = tmp_path / "checkout"
    (copy / "core").mkdir(parents=True)
    shutil.copytree(ROOT / "driftline", copy / "driftline")
    shutil.copy(ROOT / "run.py", copy)
    (copy / "tta").mkdir()
    for name in ("__init__", "provenance"):
        shutil.copy(ROOT / "core" / f"{name}.py", copy / "core")

    def git(*words: str) -> None:
        subprocess.run(["git", *words], cwd=copy, check=True, capture_output=True)

    code = "import json; from driftline.core.provenance import git_state as state; "
    code += "print(json.dumps(state()))"

    def state() -> list:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    git("init", "-q")
    git("add", "-A")
    git("-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "start")
    (about, patch) = state()
    assert about["commit"] and about["dirty"] is False and patch == ""
    (copy / "tta" / "mine.py").write_text("RATE = 0.125\n")
    (copy / "notes.txt").write_text("no code\n")
    (about, patch) = state()
    assert about["dirty"] and "+RATE = 0.125" in patch and "notes.txt" not in patch
    shutil.rmtree(copy / ".git")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)  # somebody else's repository
    assert state() == [{"commit": None, "dirty": None}, ""]


# ------------------------------------------------------------------------------ the folder


def test_a_run_that_another_process_finished_in_between_is_not_run_again(configure, monkeypatch):
    """It ends between the look at its folder and the lock."""
    cfg = configure(*settings("source"))
    done = run_experiment(cfg, [])
    folder = Path(done["run"]["folder"])
    hidden = (folder / "summary.json").rename(folder / "hidden.json")
    real = Lock.acquire

    def acquire(self: Lock) -> bool:
        if hidden.exists() and self.path.parent == folder:
            hidden.rename(folder / "summary.json")
        return real(self)

    monkeypatch.setattr(Lock, "acquire", acquire)
    monkeypatch.setattr(execute, "_execute", None)  # nothing is computed
    assert run_experiment(cfg, [])["metrics"] == done["metrics"]


# ------------------------------------------------------------------------------ resumed results

COUNTERS = (
    *("images", "batches", "forward_images", "backward_images", "evaluation_images"),
    *("evaluation_forward_images", "features_computed", "features_reused", "parameters_updated"),
)


# Killed within tasks too; that the state of every method allows it is part of the contract.
WITHIN_TASKS = ("finetune", "ease", "lae", "er", "icarl", "ranpac")


# By default the one whose state has most parts; the contract kills others too, without folders.
RESUMED = ("ease",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [pytest.param(n, marks=[pytest.mark.release] * (n not in RESUMED)) for n in CL],
)
def test_a_resumed_result_is_that_of_an_undisturbed_run(configure, monkeypatch, strategy):
    """Killed after every checkpoint in turn: metrics, per class, cost counters, kernel, records."""
    words = [*settings(strategy), "scenario.increment=5", "scenario.embedded_images=[4,2]"]
    whole = run_experiment(configure(*words), [])
    every = 3 if strategy in WITHIN_TASKS else 0
    cfg = configure(*words, "on_exists=rerun", f"checkpoint.every={every}")
    from driftline.core.checkpoint import Checkpointer

    real = Checkpointer.save

    def save(self, *args, **cursor):
        real(self, *args, **cursor)
        raise Kill

    kills = 0
    while True:
        with monkeypatch.context() as patch:
            patch.setattr(Checkpointer, "save", save)
            try:
                again = run_experiment(cfg, [])
                break
            except Kill:
                kills += 1
    assert kills >= 2
    assert again["metrics"] == whole["metrics"] and again["per_class"] == whole["per_class"]
    assert again["per_class"] and again["kernel"] == whole["kernel"]
    for name in COUNTERS:
        assert again["cost"].get(name) == whole["cost"].get(name), name
    assert records(again["run"]["folder"]) == records(whole["run"]["folder"])
