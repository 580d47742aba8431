"""The configuration: YAML keys are constructor parameters, presets compose, errors are short."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import subprocess
import sys

import pytest
import timm
import torchvision
from conftest import HANG, ROOT, plain_yaml, python, strategy_node
from omegaconf import OmegaConf

from driftline.backbones.load import ROBUSTBENCH_FILES
from driftline.core import papers
from driftline.core.build import locate, options_of
from driftline.core.errors import UserError
from driftline.core.strategy import CLStrategy
from driftline.runs.execute import run_experiment
from driftline.streams import orders, task_orders

CONF = ROOT / "conf"
STRATEGIES = sorted(p.stem for p in (CONF / "strategy").glob("*.yaml"))
LIVE = {"backbone", "seed", "num_classes"}


def cli(*words: str, timeout: float = HANG) -> subprocess.CompletedProcess[str]:
    """`python run.py words...`."""
    command = [python(), str(ROOT / "run.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy_yaml_states_every_option_and_no_other(name):
    node = strategy_node(name)
    assert node["name"] == name
    parameters = inspect.signature(locate(node["_target_"])).parameters
    options = node.keys() - {"_target_", "name"}
    assert options == set(parameters) - LIVE
    own = [p for k, p in parameters.items() if k not in LIVE]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in own)


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONF / "around").glob("*.yaml")))
def test_the_yaml_of_a_rule_holds_one_node_of_its_name_with_every_option(name):
    ((key, node),) = OmegaConf.load(CONF / "around" / f"{name}.yaml").items()
    parameters = inspect.signature(locate(node._target_)).parameters
    options = set(parameters) - {"inner", "source"}
    assert key == name and {k for k in node if k != "_target_"} == options
    assert all(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters.values())


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONF / "backbone").glob("*.yaml")))
def test_backbone_yaml_fits_its_loader(name):
    node = plain_yaml(CONF / "backbone" / f"{name}.yaml")
    any_network = {"timm": "${.tag}", "torchvision": "${.arch}"}  # named by an option
    assert node["name"] == any_network.get(name, name)
    if name != "auto":
        parameters = inspect.signature(locate(node["_target_"])).parameters
        assert {k for k in node if k != "_target_"} <= set(parameters)


PRESETS = papers.options("experiment")
PUBLISHED = re.compile(r"arXiv \d{4}\.\d{5}|[\w-]+/[\w-]+")  # a paper, or owner/repository


@functools.cache
def pretrained() -> set[str]:
    return set(timm.list_models(pretrained=True))


@pytest.mark.slow
@pytest.mark.one_in(8)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_complete_and_its_figures_have_sources(configure, preset):
    """Settings fit; scenario, backbone and weights exist; every figure says where it is from."""
    cfg = configure(f"experiment={preset}")
    for row in cfg.reference:
        assert row.status in ("seen", "quoted", "unverified") and row.value
        assert PUBLISHED.search(row.source), row.source
        assert row.strategy in STRATEGIES and "comparable" in row
        assert row.metric in ("err_mean", "acc_inc", "acc_last")
    own = [row for row in cfg.reference if row.strategy == cfg.strategy.name]
    assert own or preset == "vida/imagenet_c_vit_b16_normalized"  # a row of the source model alone
    kind = locate(cfg.strategy._target_)
    if "order" in cfg.scenario:
        (task_orders if issubclass(kind, CLStrategy) else orders).parse(cfg.scenario.order)
    assert {k for k in cfg.strategy if k not in ("_target_", "name")} == set(
        inspect.signature(kind).parameters
    ) - LIVE
    scenario = set(options_of(locate(cfg.scenario._target_), cfg.scenario))
    assert set(cfg.scenario) - {"_target_", "name", "backbones", "real", "embedded"} <= scenario

    assert (CONF / "scenario" / f"{cfg.scenario.name}.yaml").is_file()
    backbone = cfg.backbone
    if backbone.name == "auto":
        vit = cfg.strategy.name in ("vida", "aper", "ease", "mos", "lae", "olora", "sdlora")
        real = cfg.scenario.backbones
        named = (real.get("real_vit") or real.real) if vit else real.real
        backbone = OmegaConf.load(CONF / "backbone" / f"{named}.yaml")
    parameters = inspect.signature(locate(backbone._target_)).parameters
    assert {k for k in backbone if k != "_target_"} <= set(parameters)
    if "tag" in backbone:
        assert backbone.tag in pretrained()
    elif "weights" in backbone:
        assert backbone.weights in torchvision.models.get_model_weights(backbone.arch).__members__
    else:
        assert (backbone.dataset, backbone.model) in ROBUSTBENCH_FILES
        assert backbone.dataset == cfg.scenario.dataset.removesuffix("_c")


def test_presets_differ():
    """No row twice under two names: the settings differ, figures aside."""
    seen = {}
    for preset in PRESETS:
        words = sorted(map(str, papers.words("experiment", preset).items()))
        seen.setdefault(tuple(words), []).append(preset)
    assert [same for same in seen.values() if len(same) > 1] == []


def test_recipes_hold_the_official_cifar_settings(configure):
    cfg = configure("strategy=cotta", "scenario=cifar100_c")
    assert (cfg.strategy.optim.kind, cfg.strategy.optim.lr, cfg.strategy.threshold) == (
        "adam",
        1e-3,
        0.72,
    )
    assert (
        configure("strategy=cotta", "scenario=cifar10_c", "strategy.optim.lr=1").strategy.optim.lr
        == 1
    )
    assert configure("strategy=tent", "scenario=cifar10_c").strategy.optim.kind == "adam"


@pytest.mark.one_in(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["strategy=tnet"],
            ["strategy=tnet", "did you mean 'tent'", "options of strategy: a"],
        ),
        (["scenario=imagenetc"], ["did you mean 'imagenet_c'", "split_cifar100"]),
        (["startegy=tent"], ["did you mean 'strategy'"]),
        (["scenario.severty=3"], ["scenario.severty", "did you mean 'scenario.severity'"]),
        (["strategy=tent", "strategy.lrr=3"], ["strategy.lrr", "did you mean 'strategy.optim.lr'"]),
        (["experiment=cotta/imagenet"], ["options of experiment", "cotta/imagenet_c_resnet50"]),
        (["strategy=tent,cotta"], ["--multirun"]),
    ],
)
def test_typos_get_a_short_answer(words, expected):
    done = cli(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 8
    for text in expected:
        assert text in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["++strategy.stepp=1", "strategy=tent"],
            "strategy has no option 'stepp'; did you mean 'steps'?",
        ),
        (
            ["strategy=tent", "strategy.optim.lr=abc"],
            "strategy.optim.lr must be a finite number, at least 0",
        ),
        (["strategy=tent", "scenario=split_cifar10"], "a stream of tasks. Strategies for it: a"),
        (["strategy=finetune"], "a stream of shifts. Strategies for it: a"),
        (["backbone=embedded_vit"], "embedded_vit"),
        (["data.root=/nowhere/at/all"], "no such folder"),
        (["on_exists=maybe"], "on_exists must be one of 'skip', 'rerun', 'error', got 'maybe'"),
    ],
)
def test_wrong_settings_are_named(configure, words, expected):
    more = [] if "scenario" in str(words) else ["scenario.images=20"]
    with pytest.raises(UserError) as caught:
        run_experiment(configure(*words, *more), [])
    assert expected in str(caught.value)


@pytest.mark.slow
def test_a_user_error_is_one_line_and_status_2(tmp_path):
    done = cli("data.root=/nowhere/at/all", f"root={tmp_path}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: data.root=/nowhere/at/all: there is no such folder")
    assert len(done.stderr.splitlines()) == 1


def test_configuration_is_shown_without_importing_torch():
    done = cli("strategy=cotta", "--cfg", "job")
    assert done.returncode == 0 and "restore_prob" in done.stdout
    code = (
        "import sys, run; sys.argv[1:] = ['--help']; run.main(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


ALLOWED = {  # package -> packages of ours that it may import
    "core": {"core"},
    "runs": {"runs", "core", "backbones", "streams", "kernels", "analysis", "parts", "cl", "tta"},
    "backbones": {"backbones", "core", "kernels"},
    "streams": {"streams", "core"},
    "parts": {"parts", "core", "backbones", "kernels"},
    "cl": {"cl", "core", "backbones", "parts", "kernels"},
    "tta": {"tta", "core", "backbones", "parts", "kernels"},
    "kernels": {"kernels", "core"},
    "analysis": {"analysis", "core"},
}


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_point_in_one_direction(package):
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            assert not {n.split(".")[0] for n in names} & {*ALLOWED, "run"}, f"{path}: {names}"
            ours = {n.split(".")[1] for n in names if n.startswith("driftline.")}
            assert ours <= ALLOWED[package], f"{path}: {ours}"


def test_settings_of_a_swept_group_reach_every_option_of_it():
    from driftline.runs.command import as_sweeps

    given = [
        "-m",
        "strategy=ease,mos",
        "strategy.epochs=3",
        "strategy.optim.lr=0.1,0.2",
        "seed=0,1",
    ]
    want = ["-m", "strategy=ease,mos", "strategy.epochs=choice(3)", *given[3:]]
    assert as_sweeps(given) == want
    lists = ["strategy=ease,mos", "strategy.optim.betas=[0.9,0.999]", "scenario.severity=[1,2]"]
    assert as_sweeps(lists)[1:] == ["strategy.optim.betas=choice([0.9,0.999])", lists[2]]
    assert as_sweeps(["-m", "strategy=ease", "strategy.epochs=3"])[2] == "strategy.epochs=3"
    rules = ["around=[],[window,episodic]", "around.window.length=3"]
    assert as_sweeps(rules)[1] == "around.window.length=choice(3)"


@pytest.mark.slow
def test_a_sweep_over_strategies_takes_a_setting_that_the_default_one_lacks(tmp_path):
    words = ["-m", "strategy=finetune,linear_probe", "strategy.epochs=1", "scenario=split_cifar10"]
    words += ["scenario.embedded_images=[2,2]", "scenario.increment=5", f"root={tmp_path}"]
    done = cli(*words)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.rglob("summary.json"))) == 2
