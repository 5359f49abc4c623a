"""Skip tests of optimizers whose library is not installed."""

from __future__ import annotations

import pytest


def skip_if_absent(kind):
    reason = kind.absent()
    if reason:
        pytest.skip(f"{kind.title} is not available: {reason}")
