"""Rendezvous of the ranks of a job: it polls, prints which ranks are missing, and fails after a time limit.

``torch.distributed``'s own rendezvous waits inside C++, prints nothing, and can only be ended by SIGKILL.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist

from megatron_dit.runtime.errors import RankError, UserError
from megatron_dit.runtime.launch_environment import LaunchEnvironment
from megatron_dit.runtime.launcher import LISTEN_FD

SILENT_SECONDS = 10.0  # time before the first message about missing ranks
REPEAT_SECONDS = 30.0  # time between messages
POLL_SECONDS = 0.1
NAME_SECONDS = 30.0  # retry resolving a host name for this long: the name of a new pod takes a while to appear
STORE_SECONDS = 10.0  # timeout of one connection to the store
FAREWELL_SECONDS = 3.0  # time that rank 0 keeps the store open after an error, so that the other ranks can read it
GROUP_TIMEOUT = datetime.timedelta(minutes=30)  # timeout of collectives, after all ranks have connected
DEFAULT_PORT = "29500"


def rendezvous(place: LaunchEnvironment, limit: float) -> dist.Store:
    """Return the store shared by all ranks of the job, after all of them have connected to MASTER_ADDR:MASTER_PORT.

    Raises UserError naming the missing ranks after ``limit`` seconds, and if the ranks' settings contradict each other.
    """
    address, port = _master()
    return _Rendezvous(place, address, port, time.monotonic(), limit).run()


def ranges(numbers: Sequence[int]) -> str:
    """Format numbers with consecutive ones abbreviated: ``1, 3-6`` for 1, 3, 4, 5, 6."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _master() -> tuple[str, int]:
    address = os.environ.get("MASTER_ADDR", "").strip()
    if not address:
        raise UserError(
            "there are several ranks, but MASTER_ADDR is not set; start with --procs, torchrun or deepspeed, or export "
            "MASTER_ADDR and MASTER_PORT in the sbatch script"
        )
    text = os.environ.get("MASTER_PORT", "").strip() or DEFAULT_PORT
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 2**16):
        raise UserError(f"MASTER_PORT={text!r}: expected a port from 1 to 65535")
    return address, int(text)


class _Rendezvous:
    """One rank's part of the rendezvous. Rank 0 serves the store, unless torchrun's agent does."""

    def __init__(self, place: LaunchEnvironment, address: str, port: int, started: float, limit: float) -> None:
        self._place, self._address, self._port, self._limit = place, address, port, limit
        self._started, self._last_message = started, started + SILENT_SECONDS - REPEAT_SECONDS
        self._who = f"process {os.getpid()} on host {socket.gethostname()}"

    def run(self) -> dist.Store:
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        serving = self._place.rank == 0 and not by_agent
        store: dist.Store = self._serve() if serving else self._join()
        try:
            # The store of torchrun's agent outlives restarts of its ranks.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"megatron_dit/{attempt}", store)
            self._register(store)
            self._gather(store) if self._place.rank == 0 else self._wait(store)
        except dist.DistError as error:
            raise RankError(
                f"rank {self._place.rank} lost the connection to {self._address}:{self._port} while it waited for the "
                f"other ranks ({_first_line(error)}); see the message of rank 0"
            ) from None
        store.set_timeout(GROUP_TIMEOUT)
        return dist.PrefixStore("ranks", store)

    def _serve(self) -> dist.TCPStore:
        try:
            # Other ranks connect to MASTER_ADDR, which may be a service address that this host itself cannot reach.
            inherited = os.environ.pop(LISTEN_FD, None)  # of --procs; a later process group opens the port itself
            if inherited is not None:
                os.set_inheritable(int(inherited), False)  # this process's own children must not keep the port open
            return self._store("127.0.0.1", serve=True, listen_fd=None if inherited is None else int(inherited))
        except (dist.DistError, RuntimeError) as error:
            raise RankError(
                f"MASTER_PORT={self._port} cannot be served by rank 0 on host {socket.gethostname()} "
                f"({_first_line(error)}): another job or a process with RANK=0 may be using it; choose a free port"
            ) from None

    def _join(self) -> dist.TCPStore:
        """Connect to the store. Try a plain socket first, because Python can interrupt it."""
        while True:
            try:
                socket.create_connection((self._address, self._port), timeout=2.0).close()
                return self._store(self._address, serve=False)
            except socket.gaierror as error:
                reason = f"MASTER_ADDR={self._address} cannot be resolved: {error.strerror}"
                if time.monotonic() - self._started > min(NAME_SECONDS, self._limit):
                    raise self._failed(reason, "correct MASTER_ADDR") from None
            except OSError as error:
                reason = f"{self._address}:{self._port} does not answer: {error.strerror or error}"
            except (dist.DistError, RuntimeError) as error:
                reason = f"the server at {self._address}:{self._port} is not rank 0: {_first_line(error)}"
            self._pause(reason, "start rank 0, or correct MASTER_ADDR and MASTER_PORT")

    def _store(self, host: str, serve: bool, listen_fd: int | None = None) -> dist.TCPStore:
        seconds = datetime.timedelta(seconds=STORE_SECONDS)
        options: dict[str, Any] = {"timeout": seconds, "wait_for_workers": False, "master_listen_fd": listen_fd}
        with _without_stderr():  # a failed attempt prints a stack trace in addition to raising
            return dist.TCPStore(host, self._port, None, serve, **options)

    def _register(self, store: dist.Store) -> None:
        rank, world = self._place.rank, self._place.world
        expected = store.compare_set("world", "", str(world)).decode()
        if expected != str(world):
            raise RankError(
                f"rank {rank} ({self._who}) was started with WORLD_SIZE={world}, other ranks with {expected}; start "
                "all ranks with the same WORLD_SIZE, and each job with its own MASTER_PORT"
            )
        mine = f"{self._who}\n{secrets.token_hex(8)}"  # containers may have equal host names and process ids
        registered = store.compare_set(f"rank{rank}", "", mine).decode()
        if registered != mine:
            other = registered.partition("\n")[0]
            raise RankError(
                f"RANK={rank} is set for {other} and for {self._who}; give each process its own rank, and "
                f"each job its own MASTER_PORT (now {self._port})"
            )

    def _gather(self, store: dist.Store) -> None:
        """On rank 0, wait for the other ranks and publish whether all have connected."""
        others = range(1, self._place.world)
        while not store.check([f"rank{rank}" for rank in others]):
            if not self._due():
                time.sleep(POLL_SECONDS)
                continue
            missing = [rank for rank in others if not store.check([f"rank{rank}"])] or [others[-1]]
            listed = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {ranges(missing)}"
            text = f"{listed} of {self._place.world} did not connect to {self._address}:{self._port}"
            try:
                self._pause(text, "start the missing ranks, or check their logs for errors")
            except UserError as error:
                store.set("end", str(error))
                time.sleep(FAREWELL_SECONDS)
                raise
        store.set("end", "")

    def _wait(self, store: dist.Store) -> None:
        while not store.check(["end"]):
            # Rank 0 prints for all ranks, unless rank 0 itself is missing (torchrun's agent serves the store).
            if store.check(["rank0"]):
                time.sleep(POLL_SECONDS)
            else:
                self._pause(f"rank 0 did not connect to {self._address}:{self._port}", "check its log for errors")
        if message := store.get("end").decode():
            raise UserError(message)

    def _pause(self, reason: str, remedy: str) -> None:
        """Sleep briefly, and print the reason for waiting if it is due. Raises UserError after the limit."""
        if time.monotonic() - self._started > self._limit:
            raise self._failed(reason, remedy)
        if self._due():
            self._last_message = time.monotonic()
            waited = f"waited {self._last_message - self._started:.0f} of launch.rendezvous_seconds={self._limit:g} s"
            print(f"rank {self._place.rank} on {socket.gethostname()}: {reason}; {waited}", file=sys.stderr, flush=True)
        time.sleep(POLL_SECONDS)

    def _due(self) -> bool:
        """Return whether it is time to print a message or to give up."""
        now = time.monotonic()
        return now - self._last_message > REPEAT_SECONDS or now - self._started > self._limit

    def _failed(self, reason: str, remedy: str) -> UserError:
        waited = f"after {time.monotonic() - self._started:.0f} s"
        return RankError(f"rank {self._place.rank} on host {socket.gethostname()}: {reason}, {waited}: {remedy}")


_stderr = threading.Lock()


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Discard what C++ code prints to standard error."""
    with _stderr, open(os.devnull, "w") as null:  # noqa: PTH123
        sys.stderr.flush()
        before = os.dup(2)
        os.dup2(null.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
