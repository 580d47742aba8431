"""The documentation is true: tutorials run, links lead somewhere, commands name what exists.

A block whose first line is a comment with a path is written into a copy of the project; a bash or
Python block after `<!-- run -->` is executed there, with `<!-- run if MODULE -->` where MODULE can
be imported, and `<!-- run: fails with TEXT -->` must end with status 2 and TEXT. Any other block
says `<!-- not run: WHY -->` or `<!-- run by tests/FILE -->`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import HANG, ROOT, python
from omegaconf import OmegaConf

from driftline.core import papers
from driftline.core.identity import method_name
from driftline.runs.command import as_sweeps, spelled_out
from driftline.runs.sweep import expand

sys.path.insert(0, str(ROOT / "tools"))
import methods_table
import readme_figure
import reference

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "README.md"]
PAGES += [*(ROOT / "docs").rglob("*.md"), *(ROOT / "results").glob("reference/*.md")]
MEASURED = ROOT / "results" / "reference"  # pages of what was typed once, on another day
TOLD = [page for page in PAGES if MEASURED not in page.parents and page.stem != "reliability"]
TUTORIALS = [page for page in TOLD if re.search(r"^<!-- run( -->|:| if)", page.read_text(), re.M)]
FENCE = re.compile(r"(?P<before>[^\n]*\n|\A)^ *```(?P<kind>\w*)\n(?P<text>.*?)^ *```$", re.S | re.M)
FILE = re.compile(r"```\w+\n# (?P<path>[\w/]+\.\w+)\n.*?```", re.S)
BLOCK = re.compile(
    r"```(?:python|yaml)\n(?P<text># (?P<path>[\w/]+\.\w+)\n.*?)```"
    r"|<!-- run(?P<how>(?: if|:)?[^>]*) -->\n```(?P<kind>bash|python)\n(?P<commands>.*?)```",
    re.S,
)


@pytest.fixture
def copy(tmp_path) -> Path:
    """The project as a newcomer has it, without its results and tests."""
    found = tmp_path / "driftline"
    found.mkdir()
    packages = [init.parent.name for init in ROOT.glob("*/__init__.py")]
    for name in ("conf", "papers", "scripts", "benchmarks", "results/example", *packages):
        shutil.copytree(ROOT / name, found / name)
    shutil.copy(ROOT / "run.py", found)
    return found


def shell(commands: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`commands` in bash with this Python first on the path and one torch thread."""
    path = [Path(python()).parent, Path(sys.executable).parent, os.environ["PATH"]]
    env = os.environ | {"PATH": ":".join(map(str, path)), "OMP_NUM_THREADS": "1"}
    command = ["bash", "-euo", "pipefail", "-c", commands]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=HANG, check=False
    )


Runs = dict[tuple[str, str], list[dict[str, Any]]]


def measured(folder: Path) -> Runs:
    """Summaries of the finished runs by method and scenario."""
    found: Runs = {}
    committed = folder / "results" / "example"
    for path in sorted(set(folder.glob("results/**/summary.json")) - set(committed.rglob("*"))):
        summary = json.loads(path.read_text())
        about = summary["run"]
        about = method_name(about["strategy"], about["around"]), about["scenario"]
        found.setdefault(about, []).append(summary)
    return found


def adapted(runs: Runs) -> None:
    (run,) = runs["class_bias", "imagenet_c[embedded]"]
    assert run["metrics"]["err_mean"] < run["source"]["metrics"]["err_mean"] - 1


def learned(runs: Runs) -> None:
    assert runs["ridge", "split_cifar10[embedded]"][0]["metrics"]["acc_last"] > 50


def tuned(runs: Runs) -> None:
    (run,) = runs["aper", "split_cifar10[embedded]"]
    assert run["cost"]["parameters_updated"] > 0


def ruled(runs: Runs) -> None:
    (run,) = runs["tent (around=[adapt_every,rollback])", "imagenet_c[embedded]"]
    assert run["cost"]["backward_images"] == 20 and run["method"] == {"rollbacks": 0}


def six_runs(runs: Runs) -> None:
    assert len(runs["tent", "cifar10_c[embedded]"]) == 3


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even its package
        return False


def read_images(runs: Runs) -> None:
    assert {("simplecil", "split_mine"), ("simplecil", "domains_imagefolder")} <= set(runs)
    assert ("bn_adapt", "photos[on_the_fly]") in runs


def swept(runs: Runs) -> None:
    if installed("hydra_plugins.hydra_joblib_launcher"):
        assert len(runs["bn_adapt", "imagenet_c[embedded]"]) == 2


def own_network(runs: Runs) -> None:
    tent, cotta, lame = (runs[name, "folders"][0] for name in ("tent", "cotta", "lame"))
    assert tent["data"]["classes"] == 7
    folders = {run["source"]["folder"] for run in (tent, cotta, lame)}
    assert len(folders) == 1  # the same run beside all of them
    source = tent["source"]["metrics"]["err_mean"]
    assert tent["metrics"]["err_mean"] < source < 70


def own_data(runs: Runs) -> None:
    own_network(runs)
    read_images(runs)


# Pages of minutes, whose commands other tests have at work, too.
LONG = (
    "adapters",
    "cl_method",
    "safe",
    "cluster",
    "merging",
    "own_data",
    "rules",
    "sweeps",
    "tta_method",
)
CHECKS = {  # what a tutorial must leave behind
    "adapters": tuned,
    "rules": ruled,
    "tta_method": adapted,
    "cl_method": learned,
    "own_data": own_data,
    "sweeps": six_runs,
    "cluster": swept,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            p,
            id=p.stem,
            marks=[pytest.mark.release] * (p.stem in LONG),
        )
        for p in TUTORIALS
    ],
)
def test_a_tutorial_runs(page, copy):
    executed = 0
    for block in BLOCK.finditer(page.read_text()):
        if block["path"]:
            path = copy / block["path"]
            assert not path.exists(), f"{page.name} overwrites {block['path']}"
            path.write_text(block["text"])
            continue
        how = block["how"].strip()
        if how.startswith("if ") and not installed(how.removeprefix("if ")):
            continue
        commands = block["commands"]
        if block["kind"] == "python":
            (copy / "page.py").write_text(commands)
            commands = "python page.py"
        done = shell(commands, copy)
        executed += 1
        if how.startswith(": fails with "):
            assert done.returncode == 2
            assert how.removeprefix(": fails with ") in done.stderr, done.stderr
        else:
            assert done.returncode == 0, f"{block['commands']}\n{done.stdout}\n{done.stderr}"
    assert executed
    if page.stem in CHECKS:
        CHECKS[page.stem](measured(copy))


@pytest.mark.parametrize("page", TOLD, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_is_executed_or_says_why_not(page):
    text = page.read_text()
    executed = [block.start() for block in BLOCK.finditer(text)] if page in TUTORIALS else []
    for fence in FENCE.finditer(text):
        start = fence["text"].strip().partition("\n")[0]
        assert fence["kind"], f"{page.name}: the block with {start!r} has no language"
        mark = re.fullmatch(r"\s*<!-- (not run|run by|run)\b:? ?(.*?) ?-->\s*", fence["before"])
        if fence["kind"] == "text" or any(fence.start() <= at < fence.end() for at in executed):
            continue
        assert mark, f"{page.name}: the block with {start!r} is not executed and says not why"
        assert mark[2], f"{page.name}: why is the block with {start!r} not executed?"
        if mark[1] == "run by":
            assert page.name in (ROOT / mark[2]).read_text(), f"{mark[2]} does not read {page.name}"
    bare = re.sub(r"```.*?```", "", text, flags=re.S)
    typed = re.findall(r"^ {4,}((?:python|pip|make|git|torchrun|driftline) .*)", bare, re.M)
    assert not typed, f"{page.name}: commands stand in blocks that say whether they are executed"


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text()))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= listed, f"{pages - listed} are in no navigation (mkdocs.yml)"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text)
    broken = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not broken


def test_files_that_are_named_exist():
    folders = "analysis|backbones|benchmarks|cl|conf|core|docs|kernels|papers|parts|results"
    folders += "|scripts|streams|tests|tools|tta"
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text()
        made = {block["path"] for block in FILE.finditer(text)}
        named = set(re.findall(rf"`((?:{folders})/[\w/]+\.(?:py|yaml|md|json))`", text))
        missing = [name for name in named - made if not (ROOT / name).exists()]
        assert not missing, f"{page.name}: {missing}"


def commands() -> list[str]:
    """Every command of README and docs that runs a file of ours, one line each."""
    found = []
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(
            r"^\s*((?:torchrun\b.*)?(?:python )?(?:run|(?:scripts|tools|benchmarks)/\w+)\.py .*)$",
            text,
            re.M,
        ):
            found.append(line.partition(" #")[0].strip())
    return found


def test_commands_run_as_pasted_into_a_shell():
    """No bracket, parenthesis, $ or * stands outside quotes: bash or zsh would read it.

    Variables by name and folders of results are meant so.
    """
    for line in commands():
        bare = re.sub(
            r"'[^']*'|\"[^\"]*\"|\$[A-Za-z]+|\bresults/[\w*/+.-]+", "", line.partition(" | ")[0]
        )
        assert not re.search(r"[][(){}$*?!<&;|]", bare.replace("> sweep.sh", "")), line


def test_commands_name_scripts_and_settings_that_exist(configure):
    own = (
        "class_bias",
        "prior_shift",
        "ridge",
        "gate",
        "adapt_every",
    )  # made by the pages themselves
    checked = 0
    for line in commands():
        program, *words = shlex.split(line.removeprefix("python "), comments=True)
        if "/" in program:
            assert (ROOT / program).is_file(), line
        words = [w for w in words if "=" in w and not w.startswith(("hydra", "-"))]
        own_folder = "--config-dir" in line or any(name in line for name in own)
        if "run.py" not in line or own_folder or "..." in line:
            continue
        for overrides in expand(as_sweeps(spelled_out(words)))[:1]:
            configure(*overrides)
            checked += 1
    assert checked > 15


def test_the_picture_is_small_and_says_what_it_shows(tmp_path):
    picture = (ROOT / "docs" / "result.svg").read_text()
    assert len(picture) < 150_000
    assert "imagenet_c[embedded]" in picture and "embedded stand-in data" in picture
    for strategy in readme_figure.ORDER:
        folder = tmp_path / strategy
        folder.mkdir()
        run = {"strategy": strategy, "scenario": "imagenet_c", "backbone": "net"}
        (folder / "summary.json").write_text(json.dumps({"run": run}))
        rows = [{"name": "fog:5", "err": 40.0}, {"name": "snow:5", "err": 60.0}]
        (folder / "experiences.jsonl").write_text("\n".join(map(json.dumps, rows)))
    drawn = readme_figure.svg(*readme_figure.read(tmp_path))
    ElementTree.fromstring(drawn)
    assert drawn.count("mean 50.0") == 4 and "stand-in" not in drawn
    shutil.rmtree(tmp_path / "tent")
    with pytest.raises(SystemExit, match="tent"):
        readme_figure.read(tmp_path)


def test_method_tables_are_current():
    for page, docs in methods_table.PAGES.items():
        text = page.read_text()
        assert methods_table.filled(text, docs) == text, "run python tools/methods_table.py"


def test_every_strategy_says_what_is_behind_it():
    told = set(OmegaConf.load(papers.FACTS))
    there = {path.stem for path in (ROOT / "conf" / "strategy").glob("*.yaml")}
    assert told == there, "complete docs/methods.yaml"


def test_every_scenario_and_backbone_is_described():
    page = (ROOT / "docs" / "scenarios.md").read_text()
    for group in ("scenario", "backbone"):
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            assert f"`{path.stem}" in page, path.stem


def test_every_rule_is_described():
    page = (ROOT / "docs" / "rules.md").read_text()
    described = re.findall(r"^\| `(\w+)` \|", page, re.M)
    assert sorted(described) == sorted(p.stem for p in (ROOT / "conf" / "around").glob("*.yaml"))


def test_every_golden_case_of_a_method_counts_in_the_table():
    counted = [fact["golden"] for fact in papers.facts().values() if "golden" in fact]
    matched = {p for patterns in counted for g in patterns for p in methods_table.GOLDEN.glob(g)}
    of_rules = {*(methods_table.GOLDEN / "merging").glob("*.json")}  # docs/merging.md counts them
    files = {*methods_table.GOLDEN.rglob("*.json")} - of_rules
    rest = {p.stem for p in files} - {p.stem for p in matched}
    assert rest == {
        "cl_metrics",
        "lists",
        *(f"00_model_check_{n}" for n in ("effnet", "resnet", "vit")),
    }


def test_the_reference_has_every_option_setting_and_function():
    pages = reference.pages()
    for path in sorted((ROOT / "conf").glob("*/**/*.yaml")):
        group, name = path.parent.relative_to(ROOT / "conf").parts[0], path.stem
        if group == "strategy":
            page = pages[f"settings/strategy/{name}.md"]
            target = OmegaConf.load(path)._target_.rpartition(".")[2]
            assert f"## `{target}`" in page and f"strategy={name}" in page
            keys = [key for key in OmegaConf.load(path) if key not in ("_target_", "defaults")]
            assert all(f"`strategy.{key}" in page for key in keys if key != "name"), name
        elif group in reference.GROUPS:
            full = path.relative_to(ROOT / "conf" / group).with_suffix("").as_posix()
            assert f"{{ #{full} }}" in pages[f"settings/{group}.md"], full
    cotta = pages["settings/strategy/cotta.md"]
    row = "| `strategy.steps` | `1` | a whole number, at least 1 | Updates per batch; imagenet"
    assert row in cotta and "[Wang et al., CVPR 2022](https://arxiv.org/abs/2203.13591)" in cotta
    assert "| `checkpoint.every` | `100` | a whole number, at least 0 |" in pages["settings/run.md"]
    assert all(f"## {name}\n" in pages["python/driftline.md"] for name in ("make", "run"))
    assert "- `logits`" not in pages["python/parts_objectives.md"].partition("## consistency")[0]


def test_a_docstring_becomes_markdown():
    text = """Does it.

    Args:
        x: images [B, 3, H, W]; and
            more of them.
        mean, std: of them.

    Raises:
        UserError: if not.
    """
    page = reference.markdown(reference.inspect.cleandoc(text))
    assert page.startswith("Does it.") and "- `x`: images [B, 3, H, W]; and\n" in page
    assert "- `mean, std`: of them." in page and "**Raises:**\n\n- `UserError`: if not." in page


@pytest.mark.release
@pytest.mark.slow
def test_the_site_builds(tmp_path):
    pytest.importorskip("material", reason='mkdocs-material is missing: pip install -e ".[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    front = (tmp_path / "index.html").read_text()
    assert 'href="presets.html"' in front and 'src="result.svg"' in front
    assert 'href="settings/strategy/cotta.html"' in front
    assert "[embedded]" in (tmp_path / "gallery.html").read_text()
    assert (tmp_path / "gallery" / "report.html").is_file()
    assert (tmp_path / "search" / "search_index.js").is_file()  # found without a server
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r'(?:<script[^>]* src|<link[^>]* rel="stylesheet" href)="(\w+:[^"]*)', page.read_text()
        )
        assert not loaded, f"{page.name} loads {loaded[0]}"
