"""The command line: `python run.py strategy=cotta ...` or `driftline strategy=cotta ...`.

torch is imported only once a run starts, so that --help, --cfg job and typos answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import driftline
from driftline.core import papers
from driftline.core.comments import settings
from driftline.core.console import program
from driftline.core.errors import UserError, shortage, suggest
from driftline.core.paths import CONF, add_resolver, run_line, script_line
from driftline.core.torchrun import requested, speaks
from driftline.runs import help

ADAPTER = "adapter@strategy.adapter"  # what adapter=... stands for
OPEN = re.compile(r"strategy\.(\w+\.)*optim\.(rates|factors|later)(\.\w+)?=")
LISTS = ("around",)  # groups that take several names
# Flags of Hydra that take a value of their own.
FLAGS = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"}
FLAGS |= {"--config-dir", "-cd", "--experimental-rerun"}
HYDRAS_OWN = ("hydra.run.", "hydra.job.chdir", "hydra.output_subdir")
FUNCTION = re.compile(r"(choice|range|interval|glob|sort|shuffle|tag)\(")  # of Hydra's grammar
PROGRAMS = (  # of scripts/, which a wheel does not hold
    "calibrate_ccc", "doctor", "export_images", "generate_corruptions", "get_data", "gpu_pool",
    "make_tables", "merge", "paper", "report", "sync_wandb", "tune",
)  # fmt: skip
MOST_RUNS = 10_000  # of one word of a sweep
PLUGINS = {  # launcher -> the package that it needs, all in the extra `sweep`
    "joblib": "hydra_joblib_launcher",
    "slurm": "hydra_submitit_launcher",
    "submitit_local": "hydra_submitit_launcher",
}


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def run(cfg: DictConfig) -> float | None:
    """One run; returns the headline number, which Hydra sweepers may optimise."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        from driftline.runs.sweep import run_job

        return run_job(cfg)
    from driftline.core.processes import lasting_imports

    with lasting_imports():
        from driftline.core import distributed
        from driftline.core.checkpoint import Stopped
        from driftline.runs.execute import run_experiment
        from driftline.runs.sweep import typed

    words = typed(HydraConfig.get().overrides.task)
    try:
        check_single(HydraConfig.get().sweeper, words)
        metrics = run_experiment(cfg, words)["metrics"]
    except Stopped as stop:
        raise SystemExit(128 + stop.number) from None
    except UserError as error:
        if distributed.is_news(error):
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:
        if distributed.is_news(error):
            raise
        raise SystemExit(1) from None
    distributed.leave()
    return metrics.get("err_mean", metrics.get("acc_inc"))


def check_single(sweeper: Any, words: list[str]) -> None:
    """Whether a command without -m stands for one run.

    Args:
        sweeper: Hydra's node, where a file such as conf/experiment/grid/adapters.yaml puts a sweep.
        words: settings as Hydra takes them.

    Raises:
        UserError: for a sweep of a file of which the words do not choose one run.
    """
    given = {word.partition("=")[0].lstrip("+") for word in words}
    if left := [key for key in sweeper.get("params") or {} if key not in given]:
        names = ", ".join(key.partition("@")[0] for key in left)
        raise UserError(f"this is a sweep over {names}: add -m, or give one value of each")


def config_folders() -> list[Path]:
    """conf/, and the folder of the user's own options that --config-dir names."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config-dir", "-cd")
    with suppress(argparse.ArgumentError):
        own = parser.parse_known_args(sys.argv[1:])[0].config_dir
        return [CONF, *([Path(own)] if own else [])]
    return [CONF]


def check_words(words: list[str]) -> str | None:
    """What is wrong with the command line, seen before Hydra composes it, if anything.

    Hydra passes over an explicit recipe that does not exist, because the group is optional, and
    fails with a stack trace where a group is given anything but a name.
    """
    from driftline.runs.sweep import reader

    for folder in config_folders():
        if not folder.is_dir():
            return f"--config-dir {folder}: there is no such folder"
    draws = any(word.lstrip("+").startswith("hydra/sweeper=") for word in words)
    flag = False  # whether the word before takes this one
    for index, word in enumerate(words):
        if word.startswith("-"):
            flag = word in FLAGS
            continue
        if flag:
            flag = False
            continue
        key, sign, _ = word.partition("=")
        if not word.startswith("~") and not (sign and key.lstrip("+")):
            return _no_setting(word, words[index - 1] if index else "")
        try:
            override = reader([word]).parse_overrides([word])[0]
        except HydraException as error:
            return _unreadable(word, words[index + 1 :], error)
        if trouble := _check_override(word, override, draws):
            return trouble
    return None


def _check_override(word: str, override: Override, draws: bool) -> str | None:
    """What is wrong with one setting that Hydra can read.

    Args:
        draws: a sweeper that draws values out of intervals was asked for.
    """
    groups = {*_groups(), "local"} - {"hydra"}
    key, value = override.key_or_group, override.value()
    if key.startswith(HYDRAS_OWN):
        return f"{key}: folders of Hydra's own are not used here; root=... says where results go"
    values = [value]
    if override.is_interval_sweep():
        if draws:
            return None
        return f"{word}: an interval names no values; list them: {key}=0,1,2 or {key}=range(0,3)"
    if override.is_sweep_override():
        values = list(islice(override.sweep_iterator(), MOST_RUNS + 1))
        if not values:
            return f"{word} holds no value: the sweep has no run"
        if len(values) > MOST_RUNS:
            return f"{word} stands for more than {MOST_RUNS:,} runs"
    if key not in groups:
        return None
    if override.is_delete():
        return f"{word}: {key} cannot be left out; choose one with {key}=..."
    if isinstance(value, dict):
        inner = next(iter(value), "key")
        return f"{word}: {key} takes the name of an option; write {key}.{inner}=... to set one"
    if key in LISTS:
        return _check_list(word, key, values)
    if isinstance(value, list):
        return (
            f"{word}: {key} takes one name; a run with each: -m {key}={','.join(map(str, value))}"
        )
    for one in values:
        name = str(one)
        if one is None and key == "experiment":
            return "experiment=null is what an experiment left out means: leave it out"
        if not _exists(key, name):
            return _unknown(key, "null" if one is None else name)
    return None


def _check_list(word: str, key: str, values: list[Any]) -> str | None:
    """What is wrong with the values of a group that takes a list of names, each once."""
    for value in values:
        names = [str(one) for one in value] if isinstance(value, list) else [str(value)]
        if value is None:
            return f"{word}: for none leave {key} out or write {key}=[]"
        for name in names:
            if not _exists(key, name):
                return _unknown(key, name)
        if len(set(names)) < len(names):
            return f"{word}: each name once"
    return None


def _rule(word: str) -> str:
    """A hint if a word, or the last part of a dotted key, begins or ends as the name of a rule."""
    last = word.rpartition(".")[2]
    names = sorted(path.stem for path in (CONF / "around").glob("*.yaml"))
    near = [name for name in names if name == last or name.startswith(f"{last}_")]
    near += [name for name in names if "_" in last and name.endswith(last[last.rindex("_") :])]
    return f"; rules are chosen with around=..., such as around={near[0]}" if near else ""


def _option_of_rule(key: str) -> str | None:
    """What is wrong with around.RULE.OPTION that cannot be set; None where no rule is named so."""
    rule = key.split(".")[1]
    file = CONF / "around" / f"{rule}.yaml"
    if not file.is_file():
        return None
    node: Any = OmegaConf.load(file)
    options = [f"around.{rule}.{name}" for name in node[rule] if name != "_target_"]
    if key in (f"around.{rule}", *options):
        return f"{key}: the rule is not chosen; add around={rule}"
    return f"{key}: no such setting{suggest(key, options)}"


def _groups() -> list[str]:
    """Every option group: the folders of conf/, and those that the tables of papers/ fill."""
    return [*(p.name for p in CONF.iterdir() if p.is_dir()), *papers.GROUPS]


def _options(group: str) -> list[str]:
    """Every option of a group, as typed."""
    options = papers.options(group) if group in papers.GROUPS else []
    for folder in config_folders():
        files = (folder / group).rglob("*.yaml")
        names = (p.relative_to(folder / group).with_suffix("").as_posix() for p in files)
        options += sorted(name for name in names if not name.startswith("base/"))
    return [*options, *(["basic"] if group == "hydra/launcher" else [])]


def _exists(group: str, name: str) -> bool:
    """Whether a group has such an option."""
    if group in papers.GROUPS and papers.exists(group, name):
        return True
    return any((folder / group / f"{name}.yaml").is_file() for folder in config_folders())


def _unknown(group: str, name: str) -> str:
    """A group has no such option: the nearest one and all of them."""
    options = _options(group)
    text = f"{group}={name}: no such option{_rule(name) or suggest(name, options)}"
    return f"{text}\noptions of {group}: {', '.join(options) or '(none)'}"


def _no_setting(word: str, before: str) -> str:
    """A word without `key=`, which may be the rest of a value with a blank."""
    text = f"{word!r} is no setting: a setting is typed key=value"
    if word in PROGRAMS:
        return f"{text}; {word} is a program: {script_line(word, '...')}"
    key, sign, value = before.partition("=")
    if not sign or before.startswith("-"):
        return text
    return f"{text}; a value with a blank is typed in two pairs of quotes: " + _in_quotes(
        key, f"{value} {word}"
    )


def _unreadable(word: str, following: list[str], error: HydraException) -> str:
    """What is wrong with a word that Hydra cannot read, and how to type what was meant."""
    from driftline.runs.sweep import reader

    key, _, value = word.partition("=")
    name = key.lstrip("+~")
    if FUNCTION.match(value):
        return f"{name}: {value!r} cannot be read: {str(error).splitlines()[-1].strip()}"
    if value.startswith(("[", "{")):
        for end in range(1, len(following) + 1):  # the shell has cut it at its blanks
            whole = " ".join([word, *following[:end]])
            with suppress(HydraException):
                reader([whole]).parse_overrides([whole])
                quoted = shlex.quote(whole)
                return check_words([whole]) or (
                    f"{name}: {value!r} ends at a blank; type the word in quotes: {quoted}"
                )
        if any(value.count(a) > value.count(b) for a, b in ("[]", "{}")):
            return f"{name}: {value!r} lacks its closing bracket"
    value = value.strip("\"'")
    return (
        f"{name}: {value!r} cannot be read as it stands; a value with =, #, $, ~, blanks, "
        f"brackets, commas or colons is typed in two pairs of quotes: {_in_quotes(key, value)}"
    )


def _in_quotes(key: str, value: str) -> str:
    """A setting as text for the shell and for Hydra's grammar."""
    value = value.strip("\"'")
    quote = "'" if '"' in value else '"'
    return shlex.quote(f"{key}={quote}{value}{quote}")


def flags_first(words: list[str]) -> list[str]:
    """Flags before settings: Python's parser takes settings on one side of a flag only."""
    flags, settings, value_next = [], [], False
    for word in words:
        (flags if value_next or word.startswith("-") else settings).append(word)
        value_next = word in FLAGS
    return flags + settings


def explain(error: BaseException, words: list[str] | None = None) -> str:
    """A Hydra or OmegaConf error in one short message, with the nearest valid name.

    Args:
        words: settings that were composed; None: those of the command line.
    """
    words = sys.argv[1:] if words is None else words
    text = str(error)
    if key := getattr(error, "full_key", None):
        return f"{key}: {text.splitlines()[0]}"
    if f"Could not override '{ADAPTER}'" in text:
        return "adapter=...: the strategy chosen has no adapters; these have: " + ", ".join(
            sorted(p.stem for p in _with_adapters())
        )
    found = re.search(r"Could not find '((?:hydra/)?[^/']+)/([^']+)'", text)
    if found and (found.group(1) in papers.GROUPS or (CONF / found.group(1)).is_dir()):
        return _unknown(*found.groups())
    if found := re.search(r"Ambiguous value for argument '([^'=]+)=([^']*)'", text):
        key, value = found.groups()
        return (
            f"{key}={value}: commas separate the runs of a sweep, which needs -m (--multirun); a "
            f"list is typed '{key}=[{value}]', a text '{key}=\"{value}\"'"
        )
    if found := re.search(r"Could not override '([^']+)'", text):
        key = found.group(1).split("@")[0].lstrip("+~")
        if key.startswith("around.") and (trouble := _option_of_rule(key)):
            return trouble
        if (group := key.partition(".")[0]) in ("time", "estimate"):
            chosen = " or ".join(f"{group}={name}" for name in _options(group))
            return f"{key}: choose {chosen} first"
        if key.startswith("backbone.") and not any(w.startswith("backbone=") for w in words):
            return f"{key}: backbone=auto has no settings; name one first, such as backbone=timm"
        keys = _keys(words)
        above = [k for k in keys if key.startswith(f"{k}.")]  # of these, none was meant
        others = [k for k in keys if k not in above]
        near = _rule(key) or _elsewhere(key, others, words) or _nearest(key, others)
        return f"{key}: no such setting{near}\nall settings: the same command with --cfg job"
    if text.startswith("Cannot find primary config"):
        return text.splitlines()[0]
    return "\n".join(line for line in text.splitlines() if line.strip())


def _nearest(key: str, keys: list[str]) -> str:
    """The key that was meant: by its last word in the same group, else by the whole."""
    group, last = key.partition(".")[0], key.rpartition(".")[2]
    inside = {k.rpartition(".")[2]: k for k in reversed(keys) if k.startswith(f"{group}.")}
    near = difflib.get_close_matches(last, inside, n=1, cutoff=0.75)
    return f"; did you mean {inside[near[0]]!r}?" if near else suggest(key, keys)


def _with_adapters() -> list[Path]:
    """The strategies whose adapters are a choice, theirs or that of the one they build on."""
    files = [p for folder in config_folders() for p in (folder / "strategy").glob("*.yaml")]
    own = [p for p in files if "/adapter@adapter:" in p.read_text()]
    built_on = tuple(f"  - {p.stem}\n" for p in own)
    return [p for p in files if p in own or any(line in p.read_text() for line in built_on)]


def _elsewhere(key: str, keys: list[str], words: list[str]) -> str:
    """Which other options of the group have this setting, if the chosen one has none like it."""
    group, _, rest = key.partition(".")
    node = group
    if key.startswith("strategy.adapter."):
        group, node, rest = "adapter", "strategy.adapter", key.removeprefix("strategy.adapter.")
    last = rest.rpartition(".")[2]
    if group not in ("scenario", "strategy", "backbone", "adapter"):
        return ""
    if any(k.startswith(f"{node}.") and k.endswith(f".{last}") for k in keys):
        return ""
    folders = config_folders()
    have = [
        name
        for name, _ in help.options(group, folders)
        if any(rest in settings(path) for path in help.chain(group, name, folders))
    ]
    if not have:
        return ""
    typed = (f"{group}=", f"{group}@")
    chosen = [w.partition("=")[2] for w in words if w.startswith(typed)]
    mine = f"{group}={chosen[-1]}" if chosen else f"the {group} of this run"
    more = f" and {len(have) - 5} more" if len(have) > 6 else ""
    verb = "has" if len(have) == 1 else "have"
    return f"; {mine} has none, {', '.join(have[: 5 if more else 6])}{more} {verb} it"


def _keys(words: list[str]) -> list[str]:
    """Every dotted key of the configuration as typed, without the overrides that failed."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    groups = _groups()
    chosen = [a for a in words if a.split("=")[0].split("@")[0] in groups and "," not in a]
    keys: list[str] = [*groups, "hydra/launcher"]
    for path in (CONF / "hydra" / "launcher").glob("*.yaml"):
        keys += [f"hydra.launcher.{k}" for k in OmegaConf.load(path)]

    def walk(node: Any, path: str) -> None:
        for name in node or {}:
            dotted = f"{path}.{name}" if path else str(name)
            keys.append(dotted)
            if isinstance(node, DictConfig) and isinstance(node._get_node(name), DictConfig):
                walk(node._get_node(name), dotted)

    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            walk(compose("config", chosen), "")
    except (HydraException, OmegaConfBaseException):
        pass  # several mistakes at once: the group names still serve as suggestions
    return keys


def composed(words: list[str], *, choices: bool = False) -> DictConfig:
    """The configuration that settings stand for, without anything that is computed.

    Args:
        choices: with Hydra's own node, whose `runtime.choices` say which option each group has.

    Raises:
        UserError: for settings that do not exist or cannot be read.
    """
    from hydra import compose, initialize_config_dir

    add_resolver()
    papers.register()
    if trouble := check_words(words):
        raise UserError(trouble)
    own = [f"file://{folder.resolve()}" for folder in config_folders()[1:]]
    more = [f"hydra.searchpath=[papers://,{','.join(own)}]"] if own else []
    try:
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            return compose("config", [*spelled_out(words), *more], return_hydra_config=choices)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, words)) from error


def spelled_out(words: list[str]) -> list[str]:
    """Words as Hydra takes them.

    `adapter=...` is an option group inside the strategy. Rates of groups have names that no file
    lists, and Hydra wants `++` for a new name.
    """
    words = [re.sub(r"^adapter=", f"{ADAPTER}=", word) for word in words]
    return [f"++{word}" if OPEN.match(word) else word for word in words]


def as_sweeps(words: list[str]) -> list[str]:
    """Settings inside a swept group become sweeps of one value.

    Hydra composes a sweep once without its swept groups; `-m strategy=ease,mos strategy.epochs=3`
    would then set the epochs of the default strategy, which has none.
    """
    swept = {w.split("=")[0] for w in words if re.match(r"\w+=(\[[^]]*\]|[^,=\[{(]+),", w)}
    spelled = []
    for word in words:
        key, _, value = word.partition("=")
        single = value and "," not in re.sub(r"\[.*?\]|\{.*?\}|\(.*?\)", "", value)
        inside = "." in key and key.lstrip("+").split(".")[0] in swept
        inside = inside or (key == ADAPTER and "strategy" in swept)
        wrap = inside and single and not value.startswith(("choice(", "range(", "interval("))
        spelled.append(f"{key}=choice({value})" if wrap else word)
    return spelled


def _installed(plugin: str) -> bool:
    try:
        return importlib.util.find_spec(f"hydra_plugins.{plugin}") is not None
    except ModuleNotFoundError:  # no plugin at all
        return False


def check_launcher(words: list[str]) -> str | None:
    """What is wrong with the launcher asked for, if anything."""
    if {"-m", "--multirun"} & set(words) and requested() > 1:
        return (
            "torchrun takes one run, not a sweep (-m): leave -m out, or sweep without torchrun, "
            f"a process a run: `{run_line('-m ...')}`, or, with a GPU each, "
            f"{script_line('gpu_pool', '...')}"
        )
    asked = [w.split("=")[1] for w in words if w.lstrip("+").startswith("hydra/launcher=")]
    if not asked:
        return None
    if not {"-m", "--multirun"} & set(words):
        return f"hydra/launcher={asked[-1]} runs sweeps: add -m"
    plugin = PLUGINS.get(asked[-1])
    if plugin and not _installed(plugin):
        return (
            f"hydra/launcher={asked[-1]} needs the package {plugin.replace('_', '-')}: "
            'pip install -e ".[sweep]"'
        )
    return None


def main() -> int:
    """A command with all its words, as an exit status; what a script or an entry point calls."""
    return program(_main)


def _main() -> int:
    """Run and turn every expected failure into one message and an exit status."""
    try:
        return _command()
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # outside the run itself, which says what it lacks
        if isinstance(error, BrokenPipeError) or not (text := shortage(error)):
            raise
        print(f"error: {text}", file=sys.stderr)
        return 2


def _command() -> int:
    add_resolver()
    papers.register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach this function as they are
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for a _target_ of the user's own, as `python -m` does it
    words = sys.argv[1:]
    if {"--help", "-h"} & set(words):
        print(help.text(config_folders()))
        return 0
    if words == ["--version"]:
        print(f"driftline {driftline.__version__}")
        return 0
    if words[:1] == ["explain"]:
        from driftline.runs.explain import explained

        return _answered(lambda: explained(words[1:]))
    sys.argv[1:] = flags_first(words)
    try:
        trouble = check_words(sys.argv[1:]) or check_launcher(sys.argv[1:])
    except UserError as error:  # a table of papers/ that cannot be read
        trouble = str(error)
    if trouble:
        if speaks():
            print(f"error: {trouble}", file=sys.stderr)
        return 2
    sys.argv[1:] = spelled_out(sys.argv[1:])
    if {"-m", "--multirun"} & set(sys.argv):
        return sweep()
    try:
        run()
    except (HydraException, OmegaConfBaseException) as error:
        if speaks():
            print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    return 0


def _answered(answer: Callable[[], Iterable[str]]) -> int:
    """Print line by line; an error that the user can mend is the last one."""
    try:
        for line in answer():
            print(line)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def sweep() -> int:
    """A multirun; whatever ends it, the last lines tell what became of each run."""
    from driftline.runs.sweep import Planned, report

    sys.argv[1:] = as_sweeps(sys.argv[1:])
    paths = [str(CONF.parent), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)  # for submitit's processes
    status = 0
    try:
        run()
    except (HydraException, OmegaConfBaseException) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except SystemExit as end:
        status = int(end.code or 0)
    except Exception as error:  # of the launcher: those of the runs are in the report
        text, status = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}", 1
        if isinstance(error, OSError) and Planned.folder is None:
            text, status = f"the folder of the sweep, hydra.sweep.dir (in root), fails: {error}", 2
        print(f"error: {text}", file=sys.stderr)
    if Planned.folder is not None:
        text, ending = report(Planned.folder)
        print(text, file=sys.stderr if ending else sys.stdout)
        status = status or ending
    return status
