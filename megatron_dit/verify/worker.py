"""One rank of several tasks: ``python -m megatron_dit.verify.worker FOLDER...``, started by ``jobs.run_tasks``.

If there are several, each runs in a copy of this process, which has imported the libraries: that takes longer than the
steps of a small model, and the state that these libraries keep cannot affect the next task.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

from megatron_dit.runtime.launch_environment import is_rank0
from megatron_dit.runtime.launcher import die_with_parent, leave
from megatron_dit.runtime.program import run_program

LIBRARIES = ("megatron_dit.verify.layout_parity", "megatron_dit.verify.resume_parity", "deepspeed", "torch._dynamo")
POLL_SECONDS = 0.02


def run(argv: list[str]) -> int:
    """Run the tasks one after another; rank 0 writes the result of each to its folder."""
    # Imported only now, when ``run_program`` has silenced the warnings of these libraries.
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()
    from megatron_dit.verify.jobs import ENDED, read_task

    for folder in map(Path, argv):
        status = _run(folder) if len(argv) == 1 else _run_in_copy(folder)
        if status and read_task(folder)["fault"] is None:
            return status
        # All copies of rank 0 use the same port: the next ones must not connect to one that has not ended.
        if is_rank0():
            (folder / ENDED).touch()
        while not (folder / ENDED).exists():
            time.sleep(POLL_SECONDS)
    return 0


def _run_in_copy(folder: Path) -> int:
    copy = os.fork()
    if copy == 0:
        die_with_parent()
        leave(run_program(lambda _: _run(folder)))
    status = os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])
    return status if status >= 0 else 128 - status


def _run(folder: Path) -> int:
    from megatron_dit.config import load_config
    from megatron_dit.parallel.startup import multi_rank_command
    from megatron_dit.runtime.io import replacing
    from megatron_dit.verify.faults import planted
    from megatron_dit.verify.jobs import CHECKPOINTS, CONFIG, REACHED, RESULT, read_task
    from megatron_dit.verify.layout_parity import first_steps
    from megatron_dit.verify.resume_parity import resumed

    kinds = {"first_steps": first_steps, "resumed": resumed}
    config, task = load_config(folder / CONFIG), read_task(folder)
    with multi_rank_command():
        with planted(task["fault"]) as reached:
            result = kinds[task["kind"]](config, folder / CHECKPOINTS, **task["arguments"])
        if reached.reached:
            (folder / REACHED).touch()
        if result is not None:
            with replacing(folder / RESULT) as path:
                path.write_text(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    leave(run_program(run))
