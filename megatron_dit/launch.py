"""Start N ranks of a command on this machine: what ``--procs`` does. For more machines see ``launch/``."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

GRACE_SECONDS = 2.0  # from the first rank's failure to the end of the others


def run_ranks(arguments: Sequence[str], ranks: int, *, quiet: bool = False) -> int:
    """Run ``python -m megatron_dit ARGUMENTS`` on ``ranks`` processes; the first failure's exit status, or 0.

    Signals are passed on to every rank once; a rank that fails takes the others down, so that none waits
    for it. The ranks die with this process. ``quiet`` drops their standard output.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "megatron_dit", *arguments],
            env={**os.environ, **{key: str(value) for key, value in {**shared, "RANK": i, "LOCAL_RANK": i}.items()}},
            start_new_session=True,  # the terminal's Ctrl-C reaches us alone, and we pass it on once
            preexec_fn=die_with_parent,
            stdout=subprocess.DEVNULL if quiet else None,
        )
        for i in range(ranks)
    ]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: _signal(processes, number))
    first_failure = 0
    while any(process.poll() is None for process in processes):
        time.sleep(0.05)
        first_failure = first_failure or next((p.returncode for p in processes if p.returncode), 0)
        if first_failure:
            # Ranks that met the same mistake end by themselves; the others wait for a rank that is gone.
            time.sleep(GRACE_SECONDS)
            _signal(processes, signal.SIGKILL)
    return first_failure or next((p.returncode for p in processes if p.returncode), 0)


def _signal(processes: list[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def die_with_parent() -> None:
    """Have Linux kill this rank when the launcher dies, so that no orphan goes on training."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def leave(status: int) -> NoReturn:
    """End this process without tearing it down.

    After an error teardown would wait for collectives that will never come, and a thread of gloo that holds the last
    reference to a tensor aborts a process whose interpreter is being finalized: the exit status would be lost.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
