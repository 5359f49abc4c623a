"""One rank of one layout: ``python -m megatron_dit.verify.worker FOLDER``, started by ``layouts.run_layout``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from megatron_dit.runtime.launcher import leave
from megatron_dit.runtime.program import run_program


def run(argv: list[str]) -> int:
    """Run the task in a folder; rank 0 writes its result there."""
    # Imported only now, when ``run_program`` has silenced the warnings of these libraries.
    from megatron_dit.config import load_config
    from megatron_dit.parallel.topology import disconnect
    from megatron_dit.verify.layout_parity import first_steps
    from megatron_dit.verify.layouts import RESULT, TASK
    from megatron_dit.verify.resume_parity import resumed

    folder = Path(argv[0])
    config, task = load_config(folder / "config.yaml"), json.loads((folder / TASK).read_text())
    result = resumed(config, folder, **task) if task else first_steps(config, folder / "checkpoints")
    if result is not None:
        (folder / RESULT).write_text(json.dumps(asdict(result)))
    disconnect()
    return 0


if __name__ == "__main__":
    leave(run_program(run))
