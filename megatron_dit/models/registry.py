"""Registry of architectures by name. To add one, create its folder and add the folder's name to ``ARCHITECTURES``.

The folder must contain ``spec.py`` and ``model.py``. ``diffusers.py`` is needed only if diffusers has a counterpart of
the architecture, and ``original.py`` only if checkpoints of its original project can be imported.

This module does not import torch, so that a config can be checked and ``--help`` printed without the delay.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING

from megatron_dit.models.spec import ArchitectureSpec, InitPreset

if TYPE_CHECKING:
    from megatron_dit.models.common.diffusers import DiffusersCounterpart
    from megatron_dit.models.common.original import OriginalFormat

ARCHITECTURES = ("dit", "mmdit", "pixart", "uvit")


def module_of(arch: str, part: str) -> ModuleType:
    """Import ``spec``, ``model``, ``diffusers`` or ``original`` of an architecture's folder."""
    return importlib.import_module(_name(arch, part))


def spec_of(arch: str) -> ArchitectureSpec:
    return module_of(arch, "spec").SPEC


@functools.cache
def init_presets() -> Mapping[str, InitPreset]:
    """Return every value of ``init.preset`` with its rules."""
    presets: dict[str, InitPreset] = {"default": {}}
    for arch in ARCHITECTURES:
        presets.update(spec_of(arch).init_presets)
    return presets


def counterpart_of(arch: str) -> DiffusersCounterpart | None:
    """Return the diffusers counterpart of an architecture; None if it has none."""
    return module_of(arch, "diffusers").COUNTERPART if _has(arch, "diffusers") else None


def counterparts() -> dict[str, DiffusersCounterpart]:
    """Return the diffusers counterparts by architecture."""
    found = {arch: counterpart_of(arch) for arch in ARCHITECTURES}
    return {arch: counterpart for arch, counterpart in found.items() if counterpart is not None}


def formats_of(arch: str) -> tuple[OriginalFormat, ...]:
    """Return the formats in which original projects save checkpoints of an architecture."""
    return module_of(arch, "original").FORMATS if _has(arch, "original") else ()


def formats() -> dict[str, OriginalFormat]:
    """Return the formats of all architectures by name."""
    return {form.name: form for arch in ARCHITECTURES for form in formats_of(arch)}


def _has(arch: str, part: str) -> bool:
    return importlib.util.find_spec(_name(arch, part)) is not None


def _name(arch: str, part: str) -> str:
    return f"megatron_dit.models.{arch}.{part}"
