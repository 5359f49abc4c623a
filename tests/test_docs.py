"""README and docs: links lead somewhere, commands parse, quick commands run, and named functions exist."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

import checkpoints_tools.__main__
import data_prep.__main__
from megatron_dit import cli
from megatron_dit.config import check_overrides, load, load_config
from megatron_dit.tuning.space import SweepConfig

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
HEADS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
PARSERS = {
    "megatron-dit": cli.command_parser,
    "data_prep": data_prep.__main__.command_parser,
    "checkpoints_tools": checkpoints_tools.__main__.command_parser,
}
# Placeholders that stand for a file of the reader, and the file that takes their place here.
PLACEHOLDERS = {"CONFIG": "configs/mmdit/proxy.yaml"}
WRITTEN_BY_COMMANDS = ("runs/",)  # configs that an earlier command of the page writes


def fences(page, language):
    """Return the contents of a page's fenced blocks in ``language``."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def lines(script):
    """Return the words of each command of a shell script. Only comments, continuations and && are understood."""
    found = []
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            found.append(words[: words.index("&&")])
            words = words[words.index("&&") + 1 :]
        found.append(words)
    return [words for words in found if words]


def head_lines(config):
    """Return the words of each command of our programs in the comments at the top of a config file."""
    head = "".join(line for line in (ROOT / config).read_text().splitlines(True) if line.startswith("#"))
    text = re.sub(r"\\\n# *", "", head)
    commands = re.findall(
        r"^# +(?:[A-Z]\w+: +)?\(?((?:megatron-dit|python|torchrun|sbatch) [^\n]*)", text, re.MULTILINE
    )
    return [words for command in commands for words in lines(re.split(r" {3,}\S|\)$", command)[0])]


COMMANDS = [
    pytest.param(words, id=f"{page}: {' '.join(words)[:60]}")
    for page in (*PAGES, *HEADS)
    for words in (
        head_lines(page) if page in HEADS else [words for script in fences(page, "bash") for words in lines(script)]
    )
]


def program_and_arguments(words):
    """Return (program, arguments) of a command, also if a launcher starts it; None if it is not one of ours."""
    words = [PLACEHOLDERS.get(word, word) for word in words]
    if words[0] in ("launch/train.sh", "sbatch"):
        script = words.index(next(word for word in words if word.startswith("launch/")))
        assert (ROOT / words[script]).is_file()
        if words[script].endswith("sweep.sbatch"):
            return "megatron-dit", ["sweep", *words[script + 1 :]]
        skipped = 2 if words[0] == "launch/train.sh" else 1  # the host file
        return "megatron-dit", ["train", *words[script + skipped :]]
    if words[0] == "torchrun":
        return "megatron-dit", words[words.index("megatron_dit") + 1 :]
    if words[:2] == ["python", "-m"] and words[2] in PARSERS:
        return words[2], words[3:]
    return ("megatron-dit", words[1:]) if words[0] == "megatron-dit" else None


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_and_images_exist(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert not missing
    named = re.findall(r"`((?:configs|launch|benchmarks|megatron_dit|tests)/[\w./-]+\.\w+)`", text)
    assert not [path for path in named if "plain" not in path and not (ROOT / path).exists()]


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_parse_and_their_configs_and_overrides_are_valid(words, tmp_path, monkeypatch):
    found = program_and_arguments(words)
    if found is None:
        if words[0] == "make":
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
        elif words[0] == "python" and words[1] != "-m":
            assert (ROOT / words[1]).is_file()
        else:
            assert words[0] in ("pip", "python"), f"unknown program {words[0]}"
        return
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)  # parsing checks that output files can be written
    program, arguments = found
    parsed, rest = PARSERS[program]().parse_known_args(arguments)
    assert not [word for word in rest if "=" not in word or word.startswith("-")]
    overrides = [*getattr(parsed, "overrides", []), *rest]
    check_overrides(overrides)
    for name in ("config", "target"):
        path = getattr(parsed, name, None)
        if path is not None and not path.startswith(WRITTEN_BY_COMMANDS):
            if name == "config" and arguments[0] == "sweep":
                load(SweepConfig, path, overrides)
            else:
                load_config(path, overrides if name == "config" else ())


def quick(command):
    """Return the words of the README's first ``command`` of megatron-dit on the quickstart's config."""
    every = [words for script in fences("README.md", "bash") for words in lines(script)]
    return next(words for words in every if words[:3] == ["megatron-dit", command, "configs/quickstart.yaml"])


# Replaces values of the README's commands, so that they take seconds.
TINY = {
    "config": {},
    "mup": {},
    "coord-check": {"--heads": "2,4", "train.global_batch": 2, "train.micro_batch": 2, "mup.base_heads": 2},
    "train": {"train.steps": 2, "train.global_batch": 4, "train.micro_batch": 4, "model.depth": 1},
}


@pytest.mark.parametrize("command", TINY)
def test_quick_commands_of_the_readme_run(command, dataset, tmp_path, monkeypatch, capsys):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "scenes").symlink_to(dataset)
    monkeypatch.chdir(tmp_path)
    words = quick(command)[1:]
    for key, value in TINY[command].items():
        if key.startswith("--"):
            words[words.index(key) + 1] = str(value)
        else:
            words = [*(word for word in words if not word.startswith(f"{key}=")), f"{key}={value}"]
    status = cli.run(words)
    printed = capsys.readouterr()
    # At these sizes the verdict of the coordinate check, which is its exit status, means nothing.
    assert status in ((0, 1) if command == "coord-check" else (0,)), printed.err
    expected = {"config": "data_parallel", "mup": "head.linear.weight", "coord-check": "plot: coord-check.png"}
    assert expected.get(command, "") in printed.out
    if command == "train":
        assert (tmp_path / "runs/first/checkpoints/step_00000002/manifest.json").is_file()


def definitions(path):
    """Return the names that a Python file defines: ``function``, ``Class``, ``Class.method`` and constants."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        for target in [*getattr(node, "targets", []), getattr(node, "target", None)]:
            found |= {target.id} if isinstance(target, ast.Name) else set()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return found


def test_the_architecture_page_names_existing_functions_of_its_files():
    rows = re.findall(r"^\|.*\|(.*\.py\).*)\|(.*)\|$", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    assert len(rows) > 20
    for links, names in rows:
        paths = [ROOT / "docs" / link for link in re.findall(r"\]\((.*?)\)", links)]
        missing = set(re.findall(r"`([\w.]+)`", names)) - set().union(*map(definitions, paths))
        assert not missing, f"{links.strip()} does not define {missing}"


def test_the_list_of_packages_is_that_of_the_import_rules():
    from tests.test_imports import PACKAGES

    table = (ROOT / "docs/architecture.md").read_text().split("\n## ")[1]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [name for name in PACKAGES if name != "__main__"]
