"""Packages import only packages of lower layers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the lowest layer up; packages of the same layer do not import each other.
LAYERS = [
    ["errors"],
    ["runtime"],
    ["config"],
    ["mup"],
    ["parallel", "optimizer", "progress", "devices"],
    ["models"],
    ["objectives"],
    ["data"],
    ["checkpoint", "pipeline", "memory", "monitor"],
    ["engine"],
    ["run_folder"],
    ["saving"],
    ["trainer"],
    ["sampling", "launch"],
    ["evaluation"],
    ["sweep"],
    ["verify", "coord_check", "transfer", "bench", "dry_run"],
    ["cli"],
    ["__main__"],
]
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}


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
def test_packages_import_only_lower_layers(path):
    here = path.relative_to(ROOT / "megatron_dit").parts[0].removesuffix(".py")
    if here == "__init__":
        return
    for module in imports(path):
        assert not module.startswith(("data_prep", "checkpoints_tools", "tests")), f"{path} imports {module}"
        package = package_of(module) if module.startswith("megatron_dit") else None
        if package is not None and package != here:
            assert LEVEL[package] < LEVEL[here], f"{path}: {here} imports {package}, which is not in a lower layer"


def test_only_engine_adamw_and_online_text_encoding_import_deepspeed():
    users = {
        str(path.relative_to(ROOT / "megatron_dit"))
        for path in (ROOT / "megatron_dit").rglob("*.py")
        if any(module.split(".")[0] == "deepspeed" for module in imports(path))
    }
    # DeepSpeed's AdamW is one of several implementations and independent of ZeRO. Text encoders that run in training
    # are sharded by DeepSpeed, separately from the training engine.
    assert users == {"engine.py", "optimizer/adamw.py", "data/online.py"}


def test_models_do_not_refer_to_ranks():
    for path in (ROOT / "megatron_dit" / "models").glob("*.py"):
        text = path.read_text()
        for word in ("rank", "torch.distributed", "world_size", "parallel_state"):
            assert word not in text, f"{path} refers to {word}"
