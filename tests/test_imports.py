"""Imports only go down the rooms."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up; rooms on one line do not import each other.
FLOORS = [
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
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def imports(path):
    """(module, only for types) of every import of our own in a file, those inside functions included."""
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
def test_imports_go_down(path):
    here = path.relative_to(ROOT / "megatron_dit").parts[0].removesuffix(".py")
    if here == "__init__":
        return
    for module in imports(path):
        assert not module.startswith(("data_prep", "checkpoints_tools", "tests")), f"{path} imports {module}"
        room = room_of(module) if module.startswith("megatron_dit") else None
        if room is not None and room != here:
            assert HEIGHT[room] < HEIGHT[here], f"{path}: {here} imports {room}, which is not below it"


def test_only_the_engine_touches_deepspeed_adamw_its_kernels_and_online_text_its_sharding():
    users = {
        str(path.relative_to(ROOT / "megatron_dit"))
        for path in (ROOT / "megatron_dit").rglob("*.py")
        if any(module.split(".")[0] == "deepspeed" for module in imports(path))
    }
    # DeepSpeed's AdamW is one of several libraries' and is built beside the others, knowing no ZeRO. A text encoder
    # that runs while training is sharded by DeepSpeed, and has no part in the training engine.
    assert users == {"engine.py", "optimizer/adamw.py", "data/online.py"}


def test_models_know_no_rank():
    for path in (ROOT / "megatron_dit" / "models").glob("*.py"):
        text = path.read_text()
        for word in ("rank", "torch.distributed", "world_size", "parallel_state"):
            assert word not in text, f"{path} speaks of {word}"
