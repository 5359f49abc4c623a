"""The command line: ``megatron-dit COMMAND``, equivalent to ``python -m megatron_dit COMMAND``.

Exit status: 0 on success; 1 if a check failed; 2 for invalid input or config, with the reason printed on one line;
128 + n if terminated by signal n.
"""

from __future__ import annotations

import os
import re
from typing import NoReturn

from megatron_dit.cli import evaluation, planning, sampling, training, tuning
from megatron_dit.cli.command import Parser, program_parser, run_command
from megatron_dit.runtime.errors import RankError, UserError
from megatron_dit.runtime.launch_environment import is_rank0
from megatron_dit.runtime.launcher import LAUNCHED, leave
from megatron_dit.runtime.program import run_program


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    leave(run_program(run))


def run(argv: list[str]) -> int:
    """Run one command and return its exit status."""
    # The deepspeed launcher adds --local_rank=N; it also sets LOCAL_RANK.
    argv = [word for word in argv if not re.fullmatch(r"--local[_-]rank=\d+", word)]
    return run_command(command_parser(), argv, _is_shown)


def command_parser() -> Parser:
    """Return the parser of all commands. Imports no torch: each command imports what it needs when it runs."""
    return program_parser(
        "megatron-dit",
        "Pretrain diffusion Transformers at scale, tuned by μTransfer.",
        "megatron-dit train configs/quickstart.yaml",
        [
            training.add_commands,
            planning.add_commands,
            tuning.add_commands,
            sampling.add_commands,
            evaluation.add_commands,
        ],
    )


def _is_shown(error: UserError) -> bool:
    """Return whether this rank prints the error. Under --procs the launcher prints equal messages of ranks once."""
    return is_rank0() or isinstance(error, RankError) or LAUNCHED in os.environ
