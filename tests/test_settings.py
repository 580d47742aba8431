"""Settings: what is wrong is answered before anything is computed, in one line that names it.

Three layers. `bad_inputs.csv` holds command lines that once ended in a stack trace, were accepted,
or did not name the setting; those that can be seen without a run are composed and checked in this
process, those of which only a run can tell (`needs` = run) run here for real, on embedded images.
Then every option of every YAML and every global key gets values of the wrong kind, made from its
type, so that a new method is covered by existing. Last, what is typed on the command line.
"""

from __future__ import annotations

import csv
import os
import re
import shlex
import subprocess
import sys
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Interval
from conftest import ROOT, python
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from driftline.core import papers
from driftline.core.build import _hints, _kinds, check, locate
from driftline.core.errors import UserError
from driftline.core.ranges import NonNegative, Positive, Seed, Unit, describe, fits
from driftline.runs import command, schema
from driftline.runs.execute import run_experiment
from driftline.runs.sweep import expand

CONF = ROOT / "conf"


def answer(*words: str, really: bool = False) -> str:
    """What `python run.py words...` says, without starting a process; empty if it would run.

    The steps of `command.main`: the words, Hydra's composition, the check of all settings, and with
    `really` the run itself.
    """
    words = tuple(command.flags_first(list(words)))
    if trouble := command.check_words(list(words)):
        return trouble
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", [w for w in words if not w.startswith("-")])
        schema.check_settings(cfg)
        if really:
            run_experiment(cfg, list(words))
    except UserError as error:
        return str(error)
    except (HydraException, OmegaConfBaseException) as error:
        return command.explain(error)
    return ""


with open(ROOT / "tests" / "data" / "bad_inputs.csv", newline="") as file:
    LISTED = list(csv.DictReader(file))


PARTS = [("run", [r for r in LISTED if r["needs"] == "run"])]
CHECKS = [(f"check{i}", [r for r in LISTED if r["needs"] == "check"][i::8]) for i in range(8)]
PARTS += CHECKS[:1] + [pytest.param(*part, marks=pytest.mark.release) for part in CHECKS[1:]]


@pytest.mark.slow
@pytest.mark.parametrize(("part", "rows"), PARTS, ids=["run", *(name for name, _ in CHECKS)])
def test_every_listed_input_is_answered_by_one_line_that_names_the_setting(part, rows, tmp_path):
    wrong = []
    for row in rows:
        words = shlex.split(row["words"])
        if row["setting"] != "root":
            words.append(f"root={tmp_path / 'results'}")
        text = answer(*words, really=part == "run")
        line, *options = text.splitlines() or [""]
        named = (row["setting"].split(".")[-1] or row["setting"]) in line
        if not named or (options and not options[0].startswith(("options of", "all settings"))):
            wrong.append((row["words"], row["setting"], text))
    assert wrong == []
    assert not list(tmp_path.rglob("summary.json"))


# ------------------------------------------------------------------------ by enumeration


def unsuitable(kind: Any) -> list[Any]:
    """Values that no option may have unless its type says so, without those that `kind` takes."""
    values = ["banana", "", " ", [1, 2, 3, "x"], [], {"a": 1}, None, True, float("nan")]
    values += [float("inf"), -float("inf"), 1e30, -1, 0, 0.5, 10**15, -0.5]
    return [v for v in values if not fits(v, kind)]


def refused(call: Any, option: str, value: Any) -> str | None:
    """None if `call()` refuses the value and names option and value; else what happened."""
    try:
        call()
    except UserError as error:
        text = str(error)
        if option in text and "got" in text and "\n" not in text:
            return None
        return f"{option}={value!r}: {text}"
    return f"{option}={value!r} is accepted"


FILES = sorted(
    p
    for group in ("strategy", "scenario", "backbone", "around", "time", "estimate")
    for p in (CONF / group).glob("*.yaml")
)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_option_refuses_what_its_type_does_not_allow(path):
    """All options of all files; nothing is built, so that this takes milliseconds a file."""
    place = path.parent.name
    must = {"timm": ["backbone.tag=resnet50.a1_in1k"], "torchvision": ["backbone.arch=resnet18"]}
    words = [f"{place}={path.stem}", *must.get(path.stem, [])]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = OmegaConf.to_container(compose("config", words), resolve=True)
    live, at = schema.LIVE[place], place
    node: dict[str, Any] = cfg[place]
    if place == "around":
        node, at = node[path.stem], f"around.{path.stem}"
    if path.stem == "auto":
        pytest.skip("stands for another backbone")
    if place == "scenario":
        for key, value in node["embedded"].items():
            node[key] = node[key] if node[key] is not None else value
        node = {k: v for k, v in node.items() if k not in ("backbones", "real", "embedded")}
        node["label"] = "label"
    check(node, at=at, live=live)
    options = {k: v for k, v in node.items() if k != "_target_"}
    kinds = _kinds(locate(node["_target_"]), options, at, live)[0]
    wrong, tried = [], 0
    for option in node:
        if option == "_target_" or (option == "name" and place != "backbone"):
            continue
        if option == "dataset":  # chooses what the others are; tests/test_datasets.py
            continue
        for value in unsuitable(kinds[option]):
            tried += 1
            bad = {**node, option: value}
            wrong.append(
                refused(lambda bad=bad: check(bad, at=at, live=live), f"{at}.{option}", value)
            )
    assert [text for text in wrong if text] == []
    assert tried >= 5 * (len(node) - 2) - 5  # something was tried of nearly every option


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parent.name in ("strategy", "around")], ids=lambda p: p.stem
)
def test_every_number_of_a_method_or_a_rule_has_a_range(path):
    """A plain `float` or `int` of a new one takes negative numbers: say whether it may."""
    node: Any = OmegaConf.load(path)
    kinds = _hints(locate((node if "_target_" in node else node[path.stem])._target_))
    live = {*schema.LIVE["strategy"], *schema.LIVE["around"], "return"}
    assert [k for k, kind in kinds.items() if k not in live and kind in (int, float)] == []


def defaults() -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        plain: Any = OmegaConf.to_container(compose("config"), resolve=True)
    return plain


def test_every_global_option_refuses_what_its_type_does_not_allow():
    wrong, plain = [], defaults()
    for key, kind in schema.global_options().items():
        for value in unsuitable(kind):
            cfg = OmegaConf.create(plain)
            OmegaConf.update(cfg, key, value, merge=False, force_add=True)
            wrong.append(refused(lambda cfg=cfg: schema.check_settings(cfg), key, value))
    assert [text for text in wrong if text] == []


def test_global_options_are_these():
    """A new one is a decision: it changes every run's identity, or it must be named in VOLATILE."""
    assert sorted(schema.global_options()) == [
        "channels_last",
        "checkpoint.every",
        "checkpoint.keep",
        "checkpoint.model",
        "data.cache",
        "data.on_error",
        "data.root",
        "deterministic",
        "forgetting",
        "guard",
        "kernel.backend",
        "on_exists",
        "precision",
        "reference",
        "root",
        "runtime.device",
        "runtime.feature_cache_mb",
        "runtime.feature_store",
        "runtime.feature_store_gb",
        "runtime.image_store_mb",
        "runtime.share_seeds",
        "runtime.threads",
        "runtime.wait",
        "runtime.workers",
        "seed",
        "stage",
        "tuned",
    ]
    stated = set(OmegaConf.load(CONF / "config.yaml")) - {"defaults", "hydra", "around"}
    assert {k.split(".")[0] for k in schema.global_options()} == stated | {"tuned"}


PRESETS = papers.options("experiment")


@pytest.mark.slow
@pytest.mark.one_in(24)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_within_the_ranges(preset):
    """The run of any other would say so in its first second."""
    if preset:
        text = answer(f"experiment={preset}", "data.root=somewhere")
        assert text == "" or "backbone" in text, text


def test_a_typo_among_the_settings_of_a_chosen_kind_is_answered_by_that_kind(monkeypatch, capsys):
    """As typed: `main` puts `adapter=` where Hydra wants it, and `explain` has the words after."""
    for words, expected in (
        (["adapter=ladder", "strategy.adapter.kind.reductoin=4"], "mean '.*kind.reduction'"),
        (
            ["adapter=film", "strategy.adapter.kind.reduction=4"],
            "adapter=film has none, ladder has",
        ),
    ):
        monkeypatch.setattr(sys, "argv", ["run.py", "strategy=ease", *words])
        assert command.main() == 2
        assert re.search(expected, capsys.readouterr().err)


# ------------------------------------------------------------------------ types and words


@pytest.mark.parametrize(
    ("kind", "good", "bad", "words"),
    [
        (Positive, [1, 1e-9], [0, -1, True, "1"], "a finite number, above 0"),
        (NonNegative, [0, 1e12], [-1e-9, 1e13], "a finite number, at least 0"),
        (Unit, [0, 1, 0.5], [1.1, -0.1], "a number, at least 0 and at most 1"),
        (Seed, [0, 2**32 - 1], [-1, 2**32, 1.0], "a whole number, at least 0 and below"),
        (tuple[Unit, Unit], [[0, 1]], [[0], [0, 1, 1], [0, 2], 1], "a list of 2: a number"),
        (Annotated[int, Interval(ge=1, le=3)], [1, 3], [0, 4], "at least 1 and at most 3"),
        (Literal["a", 1], ["a", 1], ["b", True, 1.0], "one of 'a', 1"),
        (Unit | None, [None, 0], ["", 2], "or null"),
    ],
)
def test_types_say_what_they_take(kind, good, bad, words):
    assert all(fits(v, kind) for v in good) and not any(fits(v, kind) for v in bad)
    assert words in describe(kind)


@pytest.mark.parametrize(
    "value", ["epoch=3-step=100.ckpt", "a b#c", "w[1].pth", "a,b", "w(1).pth", "it's=1", 'a"b=c']
)
def test_the_quoted_form_that_is_shown_can_be_typed(value):
    text = answer(f"backbone.checkpoint={value}", "backbone=test_vit", "strategy=source")
    if text:
        assert text.startswith("backbone.checkpoint"), text
        shown = re.search(r"two pairs of quotes: (.*)$|a text ('.*')$", text)
        assert shown is not None, text
        words = shlex.split(shown.group(1) or shown.group(2))
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", ["backbone=test_vit", words[-1]])
        assert cfg.backbone.checkpoint == value


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["strategy={lr: 1}"], "write strategy.lr=... to set one"),
        (["recipe=aper/vpt_dep"], "did you mean 'aper/vpt_deep'?"),
        (["experiment=cotta/imagenet"], "experiment=cotta/imagenet: no such option"),
        (["local=nothing"], "local=nothing: no such option"),
        (["-m", "seed=range(0)"], "seed=range(0) holds no value"),
        (["-m", "strategy=tent,tnet"], "strategy=tnet: no such option; did you mean 'tent'?"),
        (["-m", "recipe=choice(aper/x,aper/finetune)"], "recipe=aper/x: no such option"),
        (["-m", "logger=files,fles"], "logger=fles: no such option; did you mean 'files'?"),
        (["strategy=null"], "strategy=null: no such option"),
        (["~logger"], "logger cannot be left out"),
        (["seed"], "'seed' is no setting"),
        (["precision=half"], "precision must be one of 'fp32', 'tf32', 'bf16', 'fp16', got 'half'"),
        (["data=/data"], "set one of data.root"),
        (["backbone.name=test_vit"], "write backbone=test_vit"),
        (["root=5"], "'root=\"5\"'"),
        (["strategy=tent", "strategy.optim.lr=nan"], "strategy.optim.lr must be a finite number"),
        (["strategy=tent", "strategy.optim.lr=${nothing}"], "strategy.optim.lr cannot be resolved"),
        (
            ["strategy=tent", "strategy.optim.betas=[0.9]"],
            "strategy.optim.betas must be a list of 2",
        ),
        (["strategy=vida", "strategy.warmup.optim.lr=-1"], "strategy.warmup.optim.lr must be"),
        (["=5"], "'=5' is no setting"),
        (["strategy={lr:", "1}"], "write strategy.lr=... to set one"),
        (
            ["strategy=tent", "strategy.optim.betas=[0.9,", "0.99]"],
            "'strategy.optim.betas=[0.9, 0.99]'",
        ),
        (["scenario.corruptions=[fog"], "scenario.corruptions: '[fog' lacks its closing bracket"),
        (["data.root=/my", "own", "data"], """'data.root="/my own"'"""),
        (["strategy=[tent,cotta]"], "-m strategy=tent,cotta"),
        (["strategy=tent", "strategy.optim.lr.rate=1"], "strategy.optim.lr.rate: no such setting"),
        (["precision=FP32"], "did you mean 'fp32'?"),
        (["scenario.backbones.embedded=embeded_resnet"], "did you mean 'embedded_resnet'?"),
        (["scenario.label=.sweeps"], "scenario.label must be a name"),
        (["scenario.label='a[b]'"], "without '[' and ']'"),
        (["hydra.output_subdir=x"], "root=... says where results go"),
        (["-m", "seed=interval(0,3)"], "seed=range(0,3)"),
        (["-m", "seed=range(a)"], "seed: 'range(a)' cannot be read: "),
        (["-m", "seed=range(1000000000000)"], "stands for more than 10,000 runs"),
        (["-m", "strategy=glob(x*)"], "strategy=glob(x*) holds no value"),
    ],
)
def test_words_that_would_mislead(words, said):
    assert said in answer(*words)


def test_suggestions_are_never_part_of_what_was_typed():
    """`strategy={lr: 1}` and `logger.wandb.foo=1` were once answered with their own beginning."""
    for words in (
        ["strategy=tent", "strategy.optim.lr.rate=1"],
        ["logger=wandb", "logger.wandb.foo=1"],
    ):
        near = re.search(r"did you mean '(.*?)'", answer(*words))
        assert near is None or not words[-1].startswith(near.group(1))


def test_a_glob_stands_for_the_names_in_conf():
    assert command.check_words(["-m", "strategy=glob(l*)"]) is None
    names = sorted(p.stem for p in (CONF / "strategy").glob("l*.yaml"))
    assert sorted(expand(["strategy=glob(l*)"])) == [[f"strategy={name}"] for name in names]


def test_an_interval_is_left_to_a_sweeper_that_draws():
    assert (
        command.check_words(["-m", "hydra/sweeper=optuna", "strategy.optim.lr=interval(0,1)"])
        is None
    )


def test_a_sweep_without_a_place_for_its_folder(tmp_path):
    """In a process: Hydra makes the folder. The place is a file, which no user may write below."""
    (tmp_path / "file").write_text("")
    words = ["-m", "seed=0,1", f"root={tmp_path / 'file' / 'results'}"]
    done = subprocess.run(
        [python(), str(ROOT / "run.py"), *words], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and "root" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "sweep of" not in done.stdout + done.stderr


@pytest.mark.parametrize("flag", ["--config-name", "--config-dir", "--config-path"])
def test_flags_of_hydra_that_name_nothing(flag, tmp_path):
    """In a process: Hydra reads its flags itself. A setting behind the flag is no obstacle."""
    words = [flag, "/nonexistent", f"root={tmp_path}"]
    done = subprocess.run(
        [python(), str(ROOT / "run.py"), *words], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and "nonexistent" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_flags_may_stand_between_settings():
    words = ["seed=1", "--cfg", "job", "strategy=tent", "-m"]
    assert command.flags_first(words) == ["--cfg", "job", "-m", "seed=1", "strategy=tent"]


def test_the_callers_environment_does_not_change_the_answer():
    """One real process: Hydra reads HYDRA_FULL_ERROR itself."""
    for value in ("0", ""):
        done = subprocess.run(
            [sys.executable, str(ROOT / "run.py"), "strategy=tent", "strategy.lrr=1"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "HYDRA_FULL_ERROR": value},
        )
        assert done.returncode == 2 and "did you mean 'strategy.optim.lr'?" in done.stderr


def test_words_and_schema_need_no_torch():
    code = "import sys, driftline.runs.schema; from driftline.runs import command; "
    code += "command.check_words(['strategy=tent']); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
