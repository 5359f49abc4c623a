"""Run work in threads while earlier results are consumed."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


def pipelined(pool: Executor, function: Callable[[In], Out], items: Iterable[In], depth: int) -> Iterator[Out]:
    """Yield ``function`` of each item in order, running at most ``depth`` calls ahead of the one waited for."""
    under_way: deque[Future[Out]] = deque()
    for item in items:
        under_way.append(pool.submit(function, item))
        if len(under_way) > depth:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def chunks(items: Iterable[In], size: int) -> Iterator[list[In]]:
    """Yield lists of ``size`` consecutive items; the last one may be shorter."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
