"""Read this process's rank and world size from the variables its launcher set. No other module reads them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_dit.runtime.errors import UserError

# Set by launchers for each rank. ``--procs`` removes them before it sets its own: with an outer launcher's variables a
# rank would look for a store that does not exist (TORCHELASTIC_USE_AGENT_STORE) or count another job's ranks.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_", "CROSS_")

# srun numbers steps from 0. Special steps, such as batch scripts and interactive shells, have the highest numbers.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class LaunchEnvironment:
    """This process's place in the job. Without a launcher a process is rank 0 of 1."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # rank among the processes on this host
    local_world: int = 1  # number of ranks on this host
    launcher: str = "none"  # none | srun | environment (RANK and WORLD_SIZE: torchrun, deepspeed, --procs)


def launch_environment(variables: Mapping[str, str] | None = None) -> LaunchEnvironment:
    """Interpret ``variables`` (default: the process's own environment). Blank variables count as not set.

    RANK and WORLD_SIZE take precedence over the variables of an srun step. Variables that Slurm sets for a batch script
    or an interactive shell are ignored, because these run once, regardless of SLURM_NTASKS and SLURM_PROCID.
    Raises UserError for values that are not numbers or contradict each other.
    """
    env = {name: text for name, text in (os.environ if variables is None else variables).items() if text.strip()}
    if "RANK" in env or "WORLD_SIZE" in env:
        if env.get("WORLD_SIZE", "1").strip() != "1" and "RANK" not in env:
            raise UserError(f"WORLD_SIZE={env['WORLD_SIZE']} but RANK is not set; set both, or neither for one rank")
        rank, world = _number(env, "RANK", 0), _number(env, "WORLD_SIZE", 1)
        if world < 1 or rank >= world:
            given = f"WORLD_SIZE={world}" if "WORLD_SIZE" in env else "WORLD_SIZE not set (1)"
            raise UserError(f"RANK={rank} and {given}: expected a rank from 0 to WORLD_SIZE - 1")
        # deepspeed sets LOCAL_SIZE, torchrun and --procs LOCAL_WORLD_SIZE.
        local_world = _number(env, "LOCAL_WORLD_SIZE", _number(env, "LOCAL_SIZE", 1))
        return LaunchEnvironment(
            rank=rank,
            world=world,
            local_rank=_number(env, "LOCAL_RANK", 0),
            local_world=max(1, local_world),
            launcher="environment",
        )
    if _is_srun_step(env):
        return LaunchEnvironment(
            rank=_number(env, "SLURM_PROCID", 0),
            world=_number(env, "SLURM_STEP_NUM_TASKS", 1),
            local_rank=_number(env, "SLURM_LOCALID", 0),
            local_world=_slurm_tasks_here(env),
            launcher="srun",
        )
    return LaunchEnvironment(local_rank=_number(env, "LOCAL_RANK", 0))


def is_rank0() -> bool:
    """Return whether this process prints for the job; True if the environment is invalid, so that it is reported."""
    try:
        return launch_environment().rank == 0
    except UserError:
        return True


def _is_srun_step(env: Mapping[str, str]) -> bool:
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID", "0")).strip()
    numbered = step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP
    return numbered and "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env


def _slurm_tasks_here(env: Mapping[str, str]) -> int:
    """Return the number of the step's tasks on this node.

    Parsed from SLURM_STEP_TASKS_PER_NODE (such as ``8(x2),4``) and SLURM_NODEID.
    """
    text = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_NTASKS_PER_NODE", "1"))
    counts: list[int] = []
    for item in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if match is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE={text}: expected task counts, such as 8(x2),4")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number(env, "SLURM_NODEID", 0)
    return max(1, counts[node] if node < len(counts) else counts[0])


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, str(default)).strip()
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"{name}={text!r}: expected a non-negative integer, as set by a launcher")
    return int(text)
