"""Run a function in a separate process, if it patches libraries, uses a GPU or needs another environment."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from unittest import mock


def in_child(function, *args, **environment):
    """Return the result of a module-level function; ``environment`` is set before the process starts."""
    context = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, environment), ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()
