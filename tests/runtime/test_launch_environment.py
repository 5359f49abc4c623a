"""Rank and world size from the recorded environment variables of launchers."""

from __future__ import annotations

import pytest

from megatron_dit.cli import run
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.launch_environment import LaunchEnvironment, launch_environment

# Slurm 22.05 with --nodes=2 --ntasks-per-node=1, as printed by env in the batch script and in a task of its srun.
BATCH = {
    "SLURM_GTIDS": "0",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NPROCS": "2",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "1(x2)",
}
STEP = {
    "SLURM_STEPID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[0-1]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
ALONE = LaunchEnvironment()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ALONE),
        ({"RANK": "", "WORLD_SIZE": "", "MASTER_ADDR": "", "LOCAL_RANK": "", "SLURM_PROCID": ""}, ALONE),
        ({"RANK": " ", "WORLD_SIZE": "1"}, LaunchEnvironment(launcher="environment")),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
         LaunchEnvironment(3, 4, 1, 2, "environment")),  # torchrun
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1"},
         LaunchEnvironment(3, 4, 1, 2, "environment")),  # deepspeed
        (BATCH, ALONE),
        ({**BATCH, "SLURM_STEP_ID": "4294967291", "SLURM_STEP_NUM_TASKS": "2"}, ALONE),  # a batch step's number
        ({**BATCH, "SLURM_STEP_ID": "batch", "SLURM_STEP_NUM_TASKS": "2"}, ALONE),
        ({**BATCH, **STEP, "SLURM_PROCID": "1", "SLURM_NODEID": "1"}, LaunchEnvironment(1, 2, 0, 1, "srun")),
        ({**STEP, "SLURM_PROCID": "21", "SLURM_LOCALID": "3", "SLURM_NODEID": "2", "SLURM_STEP_NUM_TASKS": "24",
          "SLURM_STEP_TASKS_PER_NODE": "8(x2),6,2"}, LaunchEnvironment(21, 24, 3, 6, "srun")),
        ({**STEP, "SLURM_PROCID": "", "RANK": ""}, ALONE),
        ({**BATCH, **STEP, "RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "1"},
         LaunchEnvironment(1, 8, 1, 1, "environment")),  # torchrun within an srun with one task per node
    ],
)  # fmt: skip
def test_environments_of_launchers_are_interpreted(variables, expected):
    assert launch_environment(variables) == expected


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "two", "WORLD_SIZE": "4"}, "RANK='two': expected a non-negative integer"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "RANK='-1'"),
        ({"RANK": "0", "WORLD_SIZE": "4.0"}, "WORLD_SIZE='4.0'"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4 and WORLD_SIZE=4: expected a rank from 0"),
        ({"RANK": "1"}, "WORLD_SIZE not set"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 but RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
        ({**STEP, "SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": "many"}, "SLURM_STEP_TASKS_PER_NODE=many"),
    ],
)
def test_invalid_and_contradictory_variables_are_rejected(variables, words):
    with pytest.raises(UserError) as caught:
        launch_environment(variables)
    assert words in str(caught.value)


def test_command_reports_an_invalid_environment_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(["train", "configs/quickstart.yaml", f"run_dir={tmp_path}/run"]) == 2
    assert capsys.readouterr().err == "error: RANK=5 and WORLD_SIZE=2: expected a rank from 0 to WORLD_SIZE - 1\n"


@pytest.mark.parametrize(("variables", "refused"), [(BATCH, False), ({"RANK": "0", "WORLD_SIZE": "2"}, True)])
def test_procs_is_allowed_in_a_batch_job_but_not_under_a_launcher(monkeypatch, capsys, variables, refused):
    started = []
    monkeypatch.setattr("megatron_dit.runtime.launcher.run_ranks", lambda words, ranks, **_: started.append(ranks) or 0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run(["train", "configs/quickstart.yaml", "train.micro_batch=64", "--procs", "2"]) == (2 if refused else 0)
    assert started == ([] if refused else [2])
    assert ("was given to rank 0 of 2 started by a launcher" in capsys.readouterr().err) == refused


def test_number_of_ranks_on_the_host_is_known_after_connecting(monkeypatch):
    """Connecting exports the rank variables, which take precedence over srun's. The number gives the CPU threads."""
    from megatron_dit.parallel import topology

    monkeypatch.setattr(topology, "rendezvous", lambda *_: None)
    monkeypatch.setattr(topology, "use_store", lambda _: None)
    monkeypatch.setattr(topology.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(topology.dist, "init_process_group", lambda *_, **__: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**BATCH, **STEP, "SLURM_STEP_TASKS_PER_NODE": "2"}.items():
        monkeypatch.setenv(name, value)
    before = launch_environment()
    topology.connect()
    after = launch_environment()
    assert (before.local_world, after.local_world) == (2, 2)
    assert (after.rank, after.world) == (before.rank, before.world)
