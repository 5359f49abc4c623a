"""Run tasks of ``verify`` in processes of their own: all that need the same number of ranks in the same processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_dit.config import Config, save_config
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.launcher import run_ranks

CONFIG, ARGUMENTS, CHECKPOINTS = "config.yaml", "arguments.json", "checkpoints"  # in the folder of a task
RESULT = "result.json"
REACHED = "reached"  # file that exists if the code with the planted fault has run
ENDED = "ended"  # file that exists when rank 0 has ended


@dataclass(frozen=True)
class Task:
    """What the ranks of a layout do in a folder: ``kind`` names a function of ``worker.py``."""

    folder: Path  # does not exist yet
    ranks: int
    config: Config
    kind: str
    arguments: Mapping[str, Any]  # that JSON can represent
    fault: str | None = None  # planted while the task runs

    @property
    def checkpoints(self) -> str:
        return str(self.folder / CHECKPOINTS)


def run_tasks(tasks: Mapping[str, Task], finished: Callable[[str], None]) -> dict[str, Any]:
    """Run all tasks, those with fewer ranks first, and return the results of their ranks 0 by name.

    ``finished`` is called with the name of each task that has ended. Raises UserError for a task that fails, whose
    processes have then printed the reason; but the result of a task with a planted fault that fails is None.
    """
    results: dict[str, Any] = {}
    for group in _groups(tasks):
        for task in group.values():
            _write(task)

        def collect(group: Mapping[str, Task] = group) -> None:
            for name, task in group.items():
                if name not in results and (task.folder / ENDED).exists():
                    result = task.folder / RESULT
                    results[name] = json.loads(result.read_text()) if result.exists() else None
                    finished(name)

        arguments = [str(task.folder) for task in group.values()]
        ranks = next(iter(group.values())).ranks
        status = run_ranks(arguments, ranks, module="megatron_dit.verify.worker", quiet=True, meanwhile=collect)
        collect()
        for name in [name for name in group if name not in results]:
            if group[name].fault is None:
                raise UserError(f"layout {name} ended with exit status {status}; see its message above")
            results[name] = None
            finished(name)
    return results


def _groups(tasks: Mapping[str, Task]) -> list[dict[str, Task]]:
    """Return the tasks that run in the same processes.

    On a machine with GPUs each task has processes of its own: a copy of a process that has used CUDA cannot use it.
    """
    if torch.cuda.is_available():
        return [{name: task} for name, task in sorted(tasks.items(), key=lambda item: item[1].ranks)]
    sizes = sorted({task.ranks for task in tasks.values()})
    return [{name: task for name, task in tasks.items() if task.ranks == ranks} for ranks in sizes]


def _write(task: Task) -> None:
    task.folder.mkdir()
    save_config(task.config, task.folder / CONFIG)
    about = {"kind": task.kind, "fault": task.fault, "arguments": dict(task.arguments)}
    (task.folder / ARGUMENTS).write_text(json.dumps(about))


def read_task(folder: Path) -> dict[str, Any]:
    """Return the ``kind``, ``fault`` and ``arguments`` of the task in a folder."""
    return json.loads((folder / ARGUMENTS).read_text())
