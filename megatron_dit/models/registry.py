"""Architectures by name. A further one is a folder with the same files and a line in ``ARCHITECTURES``.

Imports no torch: the config is checked, and ``--help`` printed, without it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from types import ModuleType

from megatron_dit.models.spec import ArchitectureSpec, InitPreset

ARCHITECTURES = ("dit", "mmdit", "pixart", "uvit")


def module_of(arch: str, part: str) -> ModuleType:
    """Import ``spec``, ``model``, ``diffusers`` or ``original`` of an architecture's folder."""
    return importlib.import_module(f"megatron_dit.models.{arch}.{part}")


def spec_of(arch: str) -> ArchitectureSpec:
    return module_of(arch, "spec").SPEC


@functools.cache
def init_presets() -> Mapping[str, InitPreset]:
    """Return every value of ``init.preset`` with its rules."""
    presets: dict[str, InitPreset] = {"default": {}}
    for arch in ARCHITECTURES:
        presets.update(spec_of(arch).init_presets)
    return presets
