"""Optimizers of libraries that may not be installed or need compiling."""

from __future__ import annotations

import pytest
import torch

from megatron_dit.optimizer import adamw
from tests.helpers.optimizers import skip_if_absent


@pytest.fixture(scope="session")
def compiled():
    """Compile DeepSpeed's optimizers once, before ranks use them."""
    for kind in (adamw.AVAILABLE["deepspeed"], adamw.OFFLOADED):
        skip_if_absent(kind)
        kind.build([{"params": [torch.nn.Parameter(torch.zeros(1))]}])
