"""Run a function in a process of its own: for what patches libraries, holds a GPU or wants another environment."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from unittest import mock


def in_child(function, *args, **environment):
    """The result of a module's own function; ``environment`` is set before the process starts."""
    context = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, environment), ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()
