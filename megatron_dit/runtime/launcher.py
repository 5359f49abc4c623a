"""Start N ranks of a command on this host, as ``--procs`` does. For several hosts see ``launch/``."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from megatron_dit.runtime.launch_environment import LAUNCHER_PREFIXES, RANK_VARIABLES

GRACE_SECONDS = 2.0  # time that the other ranks have to end after the first rank's failure, before they are killed
REMINDER_SECONDS = 10.0  # time between a signal and the message about ranks that have not ended
DELAY_SECONDS = 0.3  # delay before a rank's error output is printed, because another rank's failure may have caused it
LAST_LINES = 40  # number of lines of a failed rank's standard error printed at the end
LAUNCHED = "MEGATRON_DIT_LAUNCHED"  # environment variable set for the ranks of --procs
LISTEN_FD = "MEGATRON_DIT_LISTEN_FD"  # environment variable of rank 0 with the number of its inherited socket


def run_ranks(
    arguments: Sequence[str],
    ranks: int,
    *,
    module: str = "megatron_dit",
    quiet: bool = False,
    stop_seconds: float = 120.0,
    meanwhile: Callable[[], None] = lambda: None,
) -> int:
    """Run ``python -m MODULE ARGUMENTS`` in ``ranks`` processes and return the exit status.

    If a rank fails, the others are killed, its last lines of standard error are printed, and its status is returned
    (128 + n if signal n killed it). SIGTERM and SIGINT are forwarded to every rank once. Ranks that have not ended
    after ``stop_seconds`` are killed; a second signal kills them at once. The ranks end if this process ends.
    ``quiet`` discards their standard output. ``meanwhile`` is called about 20 times a second while they run.
    """
    # Rank 0 inherits the bound socket. If it opened the port itself, another job could take the port before. The socket
    # does not listen yet: until rank 0 serves, connections are refused, and the other ranks try again.
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        shared = {
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": server.getsockname()[1],
        }
        job = _Job([sys.executable, "-m", module, *arguments], ranks, shared, quiet, server.fileno())
    return job.run(stop_seconds, meanwhile)


class _Rank:
    """Process of one rank. Its standard error is piped, so that a failed rank's last lines can be printed last."""

    def __init__(
        self, number: int, command: Sequence[str], shared: dict[str, object], quiet: bool, server: int
    ) -> None:
        self.number = number
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in (*RANK_VARIABLES, LISTEN_FD) and not name.startswith(LAUNCHER_PREFIXES)
        }
        own = {**shared, "RANK": number, "LOCAL_RANK": number, LAUNCHED: "1", **({} if number else {LISTEN_FD: server})}
        self.process = subprocess.Popen(
            command,
            env={**inherited, **{name: str(value) for name, value in own.items()}},
            start_new_session=True,  # the terminal's Ctrl-C reaches only this process, which forwards it once
            preexec_fn=die_with_parent,
            pass_fds=() if number else (server,),
            stdout=subprocess.DEVNULL if quiet else None,
            stderr=subprocess.PIPE,
            text=True,
            errors="backslashreplace",
        )
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self.waiting: deque[tuple[float, str]] = deque()  # lines not printed yet, with their arrival times
        self.wrote = 0.0  # arrival time of the last line
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.wrote = time.monotonic()
            self.last.append(line)
            self.waiting.append((self.wrote, line))

    def finish_reading(self) -> None:
        """Read the remaining output of an ended process, without waiting for children that keep the pipe open."""
        self._reader.join(timeout=1.0)
        if self.process.stderr is not None and not self._reader.is_alive():
            self.process.stderr.close()

    @property
    def status(self) -> int:
        """Exit status as a shell reports it: 128 + n for signal n; 0 while the rank runs."""
        code = self.process.poll() or 0
        return 128 - code if code < 0 else code

    @property
    def failure(self) -> tuple[bool, bool, float]:
        """Sort key for ranks that failed at the same time; the rank that caused the failure sorts first."""
        code = self.process.poll() or 0
        return code >= 0, code != 2, self.wrote


class _Job:
    """All ranks of one run, from start to end."""

    def __init__(self, command: Sequence[str], ranks: int, shared: dict[str, object], quiet: bool, server: int) -> None:
        """``server`` is the file descriptor of the socket that rank 0 will listen on."""
        self._ranks = [_Rank(number, command, shared, quiet, server) for number in range(ranks)]
        self._host = socket.gethostname()
        self._errors: set[str] = set()  # already printed, because every rank may report the same error
        self._signal, self._signalled, self._reminded = 0, 0.0, 0

    def run(self, stop_seconds: float, meanwhile: Callable[[], None]) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        first: _Rank | None = None
        while self._running():
            time.sleep(0.05)
            meanwhile()
            first = first or min(
                (rank for rank in self._ranks if rank.status), key=lambda rank: rank.failure, default=None
            )
            if first:
                # Ranks with the same error end by themselves; the others would wait for the failed rank forever.
                self._wait(GRACE_SECONDS)
                self._send(signal.SIGKILL)
                continue
            for rank in self._ranks:
                self._show(rank, time.monotonic() - DELAY_SECONDS)
            if self._signal:
                self._remind(stop_seconds)
        if sys.stdout is not None and sys.stdout.isatty():
            print("\x1b[?25h", end="", flush=True)  # show the cursor, which a killed rank's progress bar left hidden
        for rank in self._ranks:
            rank.finish_reading()
        first = first or min((rank for rank in self._ranks if rank.status), key=lambda rank: rank.failure, default=None)
        for rank in self._ranks if first is None else [first]:
            self._show(rank, time.monotonic())
        return 0 if first is None else self._explain(first)

    def _explain(self, first: _Rank) -> int:
        """Print why the job failed, unless a rank has done so, and return the exit status."""
        code = first.process.returncode
        if self._signal and -code in (self._signal, signal.SIGKILL):
            _print(
                "the ranks were killed before they had saved a checkpoint"
                if code == -signal.SIGKILL
                else "stopped before the first step"
            )
            return 128 + self._signal
        if code == 2:
            return 2
        if code < 0:
            hint = " (possibly by the kernel because memory ran out; see dmesg)" if code == -signal.SIGKILL else ""
            how = f"was killed by {_signal_name(-code)}{hint}"
        else:
            how = f"failed with exit status {code}"
        last = "; its last lines:" if first.last else " and printed no message"
        _print(f"error: rank {first.number} of {len(self._ranks)} on host {self._host} {how}{last}")
        for line in first.last:
            sys.stderr.write(line)
        return first.status

    def _show(self, rank: _Rank, until: float) -> None:
        """Print what the rank wrote to standard error before ``until``; identical error messages only once."""
        while rank.waiting and rank.waiting[0][0] <= until:
            line = rank.waiting.popleft()[1]
            if line.startswith("error: "):
                if line in self._errors:
                    continue
                self._errors.add(line)
            sys.stderr.write(line)
        sys.stderr.flush()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._send(signal.SIGKILL if self._signal else number)
        if not self._signal:
            self._signal, self._signalled = number, time.monotonic()

    def _remind(self, stop_seconds: float) -> None:
        """After a signal, print which ranks have not ended, and kill them after ``stop_seconds``."""
        name, waited = signal.Signals(self._signal).name, time.monotonic() - self._signalled
        left = ", ".join(str(rank.number) for rank in self._running())
        if self._reminded == 0:
            _print(f"received {name}: the ranks save and stop; send a second signal to kill them at once")
        elif self._reminded == 1 and waited > min(REMINDER_SECONDS, stop_seconds):
            after = f"after launch.stop_seconds={stop_seconds:g}, or at once by a second signal"
            _print(f"ranks {left} have not ended {waited:.0f} s after {name}: they will be killed {after}")
        elif self._reminded == 2 and waited > stop_seconds:
            _print(f"ranks {left} have not ended {waited:.0f} s after {name}: killing them")
            self._send(signal.SIGKILL)
        else:
            return
        self._reminded += 1

    def _running(self) -> list[_Rank]:
        return [rank for rank in self._ranks if rank.process.poll() is None]

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._running() and time.monotonic() < until:
            time.sleep(0.05)

    def _send(self, number: int) -> None:
        for rank in self._running():
            rank.process.send_signal(number)


def _signal_name(number: int) -> str:
    """Return the signal's name, or its number, since Python has no names for most real-time signals."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def die_with_parent() -> None:
    """Let Linux kill this rank when the launcher dies, so that no orphaned rank continues to train."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def leave(status: int) -> NoReturn:
    """End this process without interpreter teardown.

    After an error, teardown would wait for collectives that never complete. In addition, a gloo thread that holds the
    last reference to a tensor aborts a process whose interpreter is being finalized, which loses the exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)
