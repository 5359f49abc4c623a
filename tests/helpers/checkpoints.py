"""Create checkpoints without training, and other entries of a folder that look like checkpoints but are not."""

from __future__ import annotations

import json
import os
import shutil
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch

from checkpoints_tools.write import write_checkpoint
from megatron_dit.checkpoint.listing import step_folder
from megatron_dit.checkpoint.manifest import manifest_of
from megatron_dit.models.param_specs import param_specs
from tests.helpers.configs import small

STATES = ["master", "ema"]


@cache
def params():
    return param_specs(small("mmdit"))


def checkpoint(folder, step, **changes):
    """Write ``folder/step_N`` with random weights, with ``changes`` in its manifest, and return its path."""
    manifest = {**manifest_of(small("mmdit"), params(), STATES, step=step, num_updates=step), **changes}
    generator = torch.Generator().manual_seed(step)
    tensors = (
        (state, name, torch.randn(param.shape, generator=generator))
        for state in STATES
        for name, param in params().items()
    )
    write_checkpoint(step_folder(folder, step), manifest, tensors)
    return step_folder(folder, step)


def edit(path, change):
    """Change a checkpoint's manifest by ``change(manifest)``, which may return a new one, and update its hash."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest.pop("sha256", None)
    changed = change(manifest)
    manifest = manifest if changed is None else changed
    seal = sha256(json.dumps(manifest).encode()).hexdigest()  # as docs/checkpoints.md describes it
    file.write_text(json.dumps({**manifest, "sha256": seal} if isinstance(manifest, dict) else manifest))


def flip(path):
    """Flip a bit near the end of a checkpoint's first file, i.e. in its EMA weights."""
    file = path / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-6] ^= 16
    file.write_bytes(data)


def contents(path):
    """Return every entry below ``path`` with its bytes, link target or mode."""
    entries = [path, *(sorted(path.rglob("*")) if path.is_dir() and not path.is_symlink() else [])]
    return {str(entry): _content(entry) for entry in entries}


def _content(entry):
    if entry.is_symlink():
        return str(entry.readlink())
    return entry.read_bytes() if entry.is_file() else oct(entry.stat().st_mode)


def _copy(name):
    def make(folder):
        shutil.copytree(step_folder(folder, 3), folder / name)
        return folder / name

    return make


def _with(name, **files):
    def make(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
        for file, text in files.items():
            (folder / name / f"{file}.json").write_text(text)
        return folder / name

    return make


def _link(name, target):
    def make(folder):
        (folder / name).symlink_to(target)
        return folder / name

    return make


def _file(name):
    def make(folder):
        (folder / name).write_text("notes")
        return folder / name

    return make


def _fifo(name):
    def make(folder):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        return path if path.parent == folder else path.parent

    return make


# Entries that are not checkpoints, created in a folder with the checkpoints of steps 3 and 6.
STRAYS = {
    "best": _copy("step_best"),
    "short": _copy("step_3"),
    "backup": _copy("step_00000003_backup"),
    "copy": _copy("step_00000003 (copy)"),
    "another step": _copy("step_00000009"),
    "an earlier step": _copy("step_00000001"),
    "upper case": _copy("STEP_00000009"),
    "nine digits": _copy("step_000000009"),
    "other digits": _copy("step_\uff10\uff10\uff10\uff10\uff10\uff10\uff10\uff19"),
    "newline": _copy("step_00000009\n"),
    "unfinished by name": _copy("step_best.part"),
    "markup and escapes": _copy("[red]\x1b[2J"),
    "file": _file("step_00000009"),
    "file like an unfinished save": _file("notes.part"),
    "empty": _with("step_00000009"),
    "empty manifest": _with("step_00000009", manifest=""),
    "foreign manifest": _with("step_00000009", manifest='{"name": "app", "icons": []}'),
    "link to an older one": _link("step_00000009", "step_00000003"),
    "link to nowhere": _link("step_00000009", "nowhere"),
    "link of another name": _link("best", "step_00000003"),
    "fifo": _fifo("step_00000009"),
    "fifo for a manifest": _fifo("step_00000009/manifest.json"),
    "fifo called latest": _fifo("latest"),
    "folder called latest": _with("latest", notes="{}"),
}


def run_of(folder: Path) -> Path:
    """Write the checkpoints of steps 3 and 6 to a run's folder and return it."""
    for step in (3, 6):
        checkpoint(folder / "checkpoints", step)
    return folder
