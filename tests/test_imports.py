"""The order of the packages, and who may use what."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from megatron_dit.models.registry import ARCHITECTURES

ROOT = Path(__file__).parents[1]

# Lowest first: a package may import only packages before it in this list.
PACKAGES = [
    "runtime", "config", "mup", "kernels", "parallel", "models", "objectives", "optimizer", "data", "checkpoint",
    "training", "sampling", "evaluation", "tuning", "planning", "verify", "bench", "cli", "__main__",
]  # fmt: skip
PROGRAMS = ("megatron_dit", "data_prep", "checkpoints_tools")
LEVEL = {package: level for level, package in enumerate(PACKAGES)}
# The config describes architectures by their torch-free specs.
EXCEPTIONS = {("config", "megatron_dit.models.registry"), ("config", "megatron_dit.models.spec")}


def package_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def imports(path):
    """Yield the modules that a file imports, including those in functions but not those for type checking only."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("path", sorted((ROOT / "megatron_dit").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_packages_import_only_packages_below_them(path):
    here = path.relative_to(ROOT / "megatron_dit").parts[0].removesuffix(".py")
    if here == "__init__":
        return
    for module in imports(path):
        assert not module.startswith(("data_prep", "checkpoints_tools", "tests")), f"{path} imports {module}"
        package = package_of(module) if module.startswith("megatron_dit") else None
        if package not in (None, here) and (here, module) not in EXCEPTIONS:
            assert LEVEL[package] < LEVEL[here], f"{path}: {here} imports {package}, which is not below it"


def test_only_zero_adamw_and_online_text_encoding_import_deepspeed():
    users = {
        str(path.relative_to(ROOT / "megatron_dit"))
        for path in (ROOT / "megatron_dit").rglob("*.py")
        if any(module.split(".")[0] == "deepspeed" for module in imports(path))
    }
    # DeepSpeed's AdamW is one of several implementations and independent of ZeRO. Text encoders that run in training
    # are sharded by DeepSpeed, separately from the training engine.
    assert users == {"training/zero.py", "optimizer/adamw.py", "data/online_text.py", "runtime/compat.py"}


RANK_NAMES = {"rank", "world", "world_size", "get_rank", "get_world_size", "tensor_rank", "data_rank", "pipeline_rank"}


@pytest.mark.parametrize("path", sorted((ROOT / "megatron_dit" / "models").rglob("*.py")), ids=lambda p: p.parent.name)
def test_models_use_no_ranks_and_no_process_groups(path):
    for module in imports(path):
        assert not module.startswith(("torch.distributed", "megatron.core", "deepspeed")), f"{path} imports {module}"
    for node in ast.walk(ast.parse(path.read_text())):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        assert name not in RANK_NAMES, f"{path} uses {name}"


def test_no_module_stands_beside_the_packages():
    modules = {path.stem for path in (ROOT / "megatron_dit").glob("*.py")}
    packages = {path.parent.name for path in (ROOT / "megatron_dit").glob("*/__init__.py")}
    assert modules == {"__init__", "__main__"}
    assert packages == set(PACKAGES) - {"__main__"}


@pytest.mark.parametrize("path", sorted((ROOT / "megatron_dit").rglob("__init__.py")), ids=lambda p: p.parent.name)
def test_package_files_have_no_side_effects(path):
    for node in ast.parse(path.read_text()).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert docstring or isinstance(
            node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.Assign | ast.AnnAssign | ast.If
        ), f"{path}, line {node.lineno}: a statement that runs on import"


def string_literals(path):
    """Yield (line, value) of the strings in a file, and of the names of keyword arguments, which are strings too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.keyword) and node.arg is not None:
            yield node.value.lineno, node.arg


def test_names_of_architectures_appear_only_in_their_folders_and_in_the_registry():
    models = ROOT / "megatron_dit" / "models"
    folders = {path.parent.name for path in models.glob("*/spec.py")}
    assert folders == set(ARCHITECTURES)
    registry = []
    for path in sorted(path for root in PROGRAMS for path in (ROOT / root).rglob("*.py")):
        for line, value in string_literals(path):
            if value in folders and path == models / "registry.py":
                registry.append((line, value))
            elif value in folders:
                assert path.is_relative_to(models / value), f"{path}, line {line}: {value!r}"
    assert sorted(value for _, value in registry) == sorted(folders)
    assert len({line for line, _ in registry}) == 1


@pytest.mark.parametrize(
    "source", ["f('dit')", "{'dit': 1}", "x == 'dit'", "dict(dit=1)", "match x:\n    case 'dit': pass", "f'{x}dit'"]
)
def test_names_of_architectures_are_found_in_any_expression(source, tmp_path):
    (tmp_path / "x.py").write_text(source)
    assert "dit" in [value for _, value in string_literals(tmp_path / "x.py")]
