"""Optimizers of libraries that may not be installed or need compiling."""

from __future__ import annotations

import functools

import pytest
import torch

from megatron_dit.optimizer import adamw
from tests.helpers.optimizers import skip_if_absent


@functools.cache
def compile_once(kind):
    kind.build([{"params": [torch.nn.Parameter(torch.zeros(1))]}])


@pytest.fixture
def compiled(request):
    """Compile DeepSpeed's CPU Adam before ranks use it, and for slow tests also its FusedAdam.

    On a CPU the two are the same code, and compiling each takes more than a minute.
    """
    kinds = [adamw.OFFLOADED]
    if request.node.get_closest_marker("slow"):
        kinds.append(adamw.AVAILABLE["deepspeed"])
    for kind in kinds:
        skip_if_absent(kind)
        compile_once(kind)
