"""Failures of one rank that end all ranks.

A rank that fails writes a report to the store of the rendezvous before it ends. Its connections close, and each rank
whose collective fails for this reason reads the report.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch.distributed as dist

from megatron_dit.runtime.errors import RemoteError, UserError
from megatron_dit.runtime.launch_environment import launch_environment

KEY = "failure"
REPORT_SECONDS = 3.0  # time that a rank waits for a report after it has lost a connection
POLL_SECONDS = 0.1
# Substrings of the error messages of gloo and NCCL if the process at the other end of a connection has ended.
LOST_CONNECTION = ("connection closed by peer", "connection reset by peer", "broken pipe", "remote process exited")

_store: dist.Store | None = None


@dataclass(frozen=True)
class Report:
    """Description of an exception for the other ranks."""

    rank: int
    host: str
    message: str
    traceback: str
    user_error: bool

    @classmethod
    def of(cls, error: Exception) -> Report:
        """Describe an exception of this rank."""
        user_error = isinstance(error, UserError)
        return cls(
            rank=launch_environment().rank,
            host=socket.gethostname(),
            message=str(error) if user_error else traceback.format_exception_only(error)[0].splitlines()[0],
            traceback="".join(traceback.format_exception(error)),
            user_error=user_error,
        )

    def error(self) -> Exception:
        """Return the exception to raise on the other ranks."""
        if self.user_error:
            return UserError(self.message)
        return RemoteError(
            f"rank {self.rank} on host {self.host} failed ({self.message}); see its traceback",
            self.rank,
            self.host,
            self.traceback,
        )


def use_store(store: dist.Store | None) -> None:
    """Exchange reports through ``store`` from now on. None: there are no other ranks."""
    global _store
    _store = store


def job_store() -> dist.Store | None:
    """Return the store of the rendezvous; None for a job of one rank."""
    return _store


@contextlib.contextmanager
def failure_ends_all_ranks() -> Iterator[None]:
    """Report an exception in this context to the other ranks, or replace it if another rank's failure caused it.

    Raises RemoteError, or UserError if that is what the other rank raised.
    """
    try:
        yield
    except RemoteError:
        raise
    except Exception as error:
        cause = None if _store is None else _cause_on_another_rank(error, _store)
        if cause is None:
            raise
        raise cause from None


def _cause_on_another_rank(error: Exception, store: dist.Store) -> Exception | None:
    """Return the exception to raise instead of ``error``, or None if this rank is the first one that failed."""
    if not any(text in str(error).lower() for text in LOST_CONNECTION):
        mine = Report.of(error)
        with contextlib.suppress(RuntimeError):  # rank 0, which serves the store, has ended
            first = _read(store.compare_set(KEY, "", json.dumps(asdict(mine))))
            return None if first == mine else first.error()
        return None
    until = time.monotonic() + REPORT_SECONDS
    with contextlib.suppress(RuntimeError):
        while time.monotonic() < until:
            if store.check([KEY]):
                return _read(store.get(KEY)).error()
            time.sleep(POLL_SECONDS)
    rank, host, reason = launch_environment().rank, socket.gethostname(), str(error).splitlines()[0]
    return RemoteError(
        f"rank {rank} on host {host} lost the connection to a rank that ended ({reason}); see its output"
    )


def _read(text: bytes) -> Report:
    return Report(**json.loads(text))
