"""Fixtures of the tests of the layer backends."""

from __future__ import annotations

import importlib.util

import pytest

from tests.helpers.child import in_child


def reason_against_te():
    """Return why the installed Transformer Engine cannot be imported, or None if it can."""
    try:
        import transformer_engine.pytorch
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        return str(error)
    assert transformer_engine.pytorch
    return None


@pytest.fixture(scope="session")
def te_importable():
    """Skip the tests that use this fixture if Transformer Engine is not installed or cannot be imported."""
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed")
    reason = in_child(reason_against_te)
    if reason is not None:
        pytest.skip(f"Transformer Engine cannot be imported: {reason}")
