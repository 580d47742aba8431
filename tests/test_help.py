"""What a user can ask: --help, explain, and commands whose reader leaves early."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import HANG, ROOT

import driftline
from driftline.core import console, papers, paths
from driftline.core.comments import comments, head, summary
from driftline.core.errors import UserError, suggest
from driftline.core.paths import CONF
from driftline.runs import command, help
from driftline.runs.explain import explained
from driftline.streams.orders import parse

FILES = sorted(CONF.rglob("*.yaml"))


@pytest.fixture
def wide(monkeypatch):
    """A terminal of 100 columns, wherever the tests run; and no words of the test runner."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["run.py"])


def test_help_has_a_line_for_every_option_and_none_for_the_rows_of_papers(wide):
    text = help.text()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    for group in help.GROUPS:
        for path in (CONF / group).rglob("*.yaml"):
            name = path.relative_to(CONF / group).with_suffix("").as_posix()
            if not name.startswith("base/"):
                own = [li for li in lines if re.fullmatch(rf"  {re.escape(name)}  +\S.+", li)]
                assert own, f"{group}={name} has no line, or nothing is said of it"
    assert "scripts/paper.py" in text and str(len(papers.options("experiment"))) in text
    assert not any(row in text for row in papers.options("experiment"))


def test_help_of_a_wheel_names_its_command(wide, monkeypatch):
    monkeypatch.setattr(help, "CHECKOUT", False)
    text = help.text()
    assert "python run.py" not in text and "  driftline explain strategy" in text
    assert "python scripts/" not in text.partition("not in the installed package")[0]
    assert text.count("python scripts/") == 2


def test_programs_typed_as_words_of_the_command_are_pointed_to(monkeypatch):
    assert set(command.PROGRAMS) == {path.stem for path in (ROOT / "scripts").glob("*.py")}
    for name in command.PROGRAMS:
        assert f"python scripts/{name}.py" in str(command.check_words([name, "results"]))
    monkeypatch.setattr(paths, "CHECKOUT", False)
    assert "in a checkout (the installed package has it not)" in str(
        command.check_words(["report"])
    )


def test_errors_name_programs_by_the_function_that_knows_where_they_are(monkeypatch):
    assert paths.script_line("report", "results") == "`python scripts/report.py results`"
    assert paths.run_line("-m") == "python run.py -m"
    monkeypatch.setattr(paths, "CHECKOUT", False)
    assert paths.script_line("report").startswith("`python scripts/report.py` in a checkout")
    assert paths.run_line("-m") == "driftline -m"
    by_hand = []
    for package in ("analysis", "backbones", "cl", "core", "parts", "runs", "streams", "tta"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Raise):
                    text = ast.unparse(node)
                    if "scripts/" in text or "run.py" in text:
                        by_hand.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not by_hand, "errors in a wheel would name what it has not"


def test_the_version_is_that_of_this_project(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["driftline", "--version"])
    assert command.main() == 0
    assert capsys.readouterr().out == f"driftline {driftline.__version__}\n"


def test_help_puts_strategies_and_scenarios_that_adapt_before_those_that_learn_tasks(wide):
    names = [line.split()[0] for line in help.listing("strategy")]
    kinds = [papers.facts()[name]["kind"] for name in names]
    assert kinds == sorted(kinds, reverse=True)
    scenarios = [line.split()[0] for line in help.listing("scenario")]
    assert scenarios.index("vlcs") < scenarios.index("domains_core50")


def test_help_lists_options_of_a_folder_of_ones_own(wide, tmp_path):
    (tmp_path / "strategy").mkdir()
    (tmp_path / "strategy" / "mine.yaml").write_text("# My own. More.\n_target_: a.tta.b.Mine\n")
    assert "  mine          My own" in help.listing("strategy", (CONF, tmp_path))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(CONF).as_posix())
def test_every_file_says_what_it_is_and_every_comment_of_it_is_found_once(path):
    if "hydra/callbacks" not in path.as_posix():
        assert head(path), "the first line says what it is"
    text = re.sub(r"^defaults:\n(  .*\n)+", "", path.read_text(), flags=re.M).splitlines()
    lines = [re.sub(r"(^|.*?\s)#", "", li).strip() for li in text if re.search(r"(^|\s)#", li)]
    known = " ".join([*head(path), *comments(path).values()])
    lost = [li for li in lines if li not in known]
    assert lost == [], "a comment stands above its key or behind its value"


def test_comments_are_those_above_and_behind(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "# Of the file (Liu et al., 2024). More of it.\n"
        "a: 1  # behind a\n# above b\n# in two lines\nb:\n"
        "  c: '# no'  # behind c\n  d: {e: 1}  # d\n"
        "\n# of nothing\n\nf: 2\n"
    )
    assert summary(path) == "Of the file (Liu et al., 2024)"
    assert comments(path) == {"a": "behind a", "b": "above b in two lines", "b.c": "behind c"} | {
        "b.d": "d"
    }


# ------------------------------------------------------------------------ explain


def test_a_setting_is_explained_with_value_meaning_source_and_range(wide):
    text = "\n".join(
        explained(["strategy=cotta", "scenario=cifar10_c", "strategy.optim.lr=1", "seed=3"])
    )
    assert "\nstrategy=cotta\n  CoTTA (CVPR 2022)" in text and "\nscenario=cifar10_c\n" in text
    assert "strategy.optim.lr=1    <- typed, else 0.01\n    allowed: a finite number" in text
    assert "strategy.threshold=0.92    <- recipe=cotta/cifar10_c, else 0.1\n    Anchor" in text
    assert "strategy.gate=batch\n    batch: mean confidence" in text  # as in its file: unmarked
    assert "strategy.optim.sam=null\n    rho of sharpness-aware" in text  # conf/optim/default.yaml
    assert "strategy.optim.schedule" not in text  # not read by a method without epochs
    assert "scenario.batch_size=null    here 50, for embedded images" in text
    assert "scenario.order=continual\n    Domains: continual |" in text  # conf/scenario/base
    assert "seed=3    <- typed, else 0" in text and "_target_" not in text


@pytest.mark.parametrize(
    ("words", "expected", "absent"),
    [
        (["strategy"], ["  cotta ", "  ranpac "], ["scenario"]),
        (["recipe"], ["  cotta/cifar10_c"], []),
        (["adapter=lora"], ["adapter=lora", "strategy.adapter.kind.rank=8"], ["finetune"]),
        (["strategy=ease", "strategy.optim"], ["strategy.optim.lr=0.025"], ["strategy.alpha"]),
        (["strategy=tent", "around=window"], ["around.window.length"], ["scenario."]),
        (["backbone=vit_b16_in1k"], ["backbone.normalize=checkpoint"], ["strategy."]),
        (["time=deadline"], ["time.queue=0", "allowed: one of 0, 1"], []),
        (["logger=wandb"], ["logger.wandb.mode=offline"], []),
        (["experiment=cotta/cifar10_c"], ["strategy.views=32", "scenario.severity=5"], []),
        ([], ["data.root=null\n    folder of the real data"], ["strategy.", "scenario."]),
    ],
)
def test_what_is_asked_for_is_explained_and_nothing_else(words, expected, absent, wide):
    text = "\n".join(explained(words))
    shown = "\n".join(re.findall(r"^[\w.]+=.*", text, re.M)) or text
    assert all(one in text for one in expected), text
    assert not any(one in shown for one in absent), text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["strategee"], "no such group or setting; did you mean 'strategy'?"),
        (["strategy=tnet"], "did you mean 'tent'?"),
        (["strategy=tent", "strategy.optim.lrr=1"], "did you mean 'strategy.optim.lr'?"),
        (["strategy=cotta", "strategy.ema_=1"], "did you mean 'strategy.ema'?"),
        # a setting of another option is no typo
        (["scenario=split_cifar", "scenario.unknown_share=0.1"], "scenario=split_cifar has none, "),
        (
            ["strategy=tent", "strategy.restore_prob=0.1"],
            "strategy=tent has none, becotta, cotta, petal",
        ),
        (["backbone=torchvision", "backbone.tag=x"], "backbone=torchvision has none, "),
        (
            ["strategy=finetune", "adapter=vera", "strategy.adapter.start=pissa"],
            "adapter=vera has none, lae_lora, lora, lori_s, saft have it",
        ),
        (["strategy=tent", "strategy.optim.lr=-1"], "must be a finite number, at least 0, got -1"),
    ],
)
def test_explain_answers_what_a_run_would_not_take(words, said, wide, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    with pytest.raises(UserError) as error:
        list(explained(words))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["backbone=timm"], "not yet a run: backbone.tag must be architecture.tag"),
        (["around=weight_average"], "not yet a run: around=[weight_average]: goes around methods"),
    ],
)
def test_an_option_is_explained_though_something_else_must_be_given(words, said, wide):
    lines = list(explained(words))
    assert len(lines) > 5 and lines[-1].strip().startswith(said)
    with pytest.raises(UserError, match="seed must be"):
        list(explained([*words, "seed=-1"]))


def test_what_is_known_is_never_what_was_meant():
    assert suggest("bursts", ["bursts", "burst_share"]) == ""
    with pytest.raises(UserError, match="'bursts' and 'prior_drift' are of one kind. Join"):
        parse("prior_drift+bursts")


# ------------------------------------------------------------------------ pipes


@pytest.mark.one_in(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    "words", ["run.py --help", "run.py strategy=cotta --cfg job", "scripts/paper.py"]
)
def test_a_command_whose_reader_leaves_ends_without_a_word(words):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, *words.split()]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, timeout=HANG)
    os.close(write)
    assert done.stderr == b"" and done.returncode == 141


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda p: p.stem)
def test_every_script_minds_its_reader(path):
    last = path.read_text().partition('if __name__ == "__main__":')[2]
    assert "sys.exit(program(main))" in last


def test_a_broken_pipe_of_anything_else_is_an_error(monkeypatch):
    def main() -> int:
        raise BrokenPipeError

    monkeypatch.setattr(console, "reader_left", lambda: False)
    with pytest.raises(BrokenPipeError):
        console.program(main)
