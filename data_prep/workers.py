"""``--procs N``: run the same command in N processes on this host. They share the job through its folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from megatron_dit.runtime.launcher import die_with_parent

WORKER = "DATA_PREP_WORKER"  # environment variable with the number of a worker that --procs started


def run_workers(argv: Sequence[str], workers: int) -> int:
    """Run ``python -m data_prep ARGV`` in ``workers`` processes, each with one of the GPUs.

    Return 0 if all succeed. If one fails, stop the others, print its error message and return its exit status, or
    128 + n if it was killed by signal n.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    processes: list[subprocess.Popen[str]] = []
    with ExitStack() as stack:
        stack.callback(_end, processes)
        messages = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(workers)]
        for number, message in enumerate(messages):
            own = {"CUDA_VISIBLE_DEVICES": devices[number % len(devices)]} if devices else {}
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "data_prep", *argv],
                    env={**os.environ, **own, WORKER: str(number)},
                    stdout=None if number == 0 else subprocess.DEVNULL,
                    stderr=message,
                    start_new_session=True,  # so that Ctrl-C reaches only this process
                    preexec_fn=die_with_parent,
                    text=True,
                )
            )
        while any(process.poll() is None for process in processes) and not any(each.returncode for each in processes):
            time.sleep(0.05)
        failed = next((number for number, process in enumerate(processes) if process.returncode), None)
        if failed is None:
            return 0
        messages[failed].seek(0)
        sys.stderr.write(messages[failed].read())
        status = processes[failed].returncode
        if status < 0:
            name = signal.Signals(-status).name
            print(
                f"error: worker {failed} of {workers} was killed by {name}; run the same command again to resume",
                file=sys.stderr,
            )
        return status if status > 0 else 128 - status


def _end(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()
        process.wait()
