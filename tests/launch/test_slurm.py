"""srun and sbatch start the same command, on two Slurm nodes simulated on one host by this test's own daemons."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_dit.checkpoint.load import open_checkpoint
from megatron_dit.runtime.launch_environment import RANK_VARIABLES
from megatron_dit.tuning.transfer import read_sweep
from tests.helpers.configs import small_dict
from tests.helpers.ports import free_port
from tests.helpers.sweeps import write_sweep

NEEDED = ("srun", "slurmctld", "slurmd", "munged", "mungekey")
missing = [name for name in NEEDED if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing), reason=f"needs slurm-wlm and munge: {', '.join(missing)} not found"),
    pytest.mark.skipif(os.geteuid() != 0, reason="starts Slurm's daemons, which needs root"),
]


@pytest.fixture
def slurm(tmp_path):
    """Environment for srun with a controller and two node daemons on the loopback interface."""
    folder, host = tmp_path / "slurm", socket.gethostname().split(".")[0]
    folder.mkdir()
    munge = {name: folder / f"munge.{name}" for name in ("key", "socket", "log", "pid", "seed")}
    subprocess.run(["mungekey", "-c", "-k", str(munge["key"])], check=True)
    flags = [f"--{name}-file={munge[name]}" for name in ("key", "log", "pid", "seed")]
    daemons = [subprocess.Popen(["munged", "--foreground", "--force", f"--socket={munge['socket']}", *flags])]
    lines = [
        "ClusterName=test",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={free_port()}",
        "AuthType=auth/munge",
        f"AuthInfo=socket={munge['socket']}",
        "SlurmUser=root",
        f"StateSaveLocation={folder}",
        f"SlurmdSpoolDir={folder}/spool.%n",
        f"SlurmctldPidFile={folder}/ctld.pid",
        f"SlurmdPidFile={folder}/d.%n.pid",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "MpiDefault=none",
        "ReturnToService=2",
        *(f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=1" for i in (0, 1)),
        "PartitionName=all Nodes=n0,n1 Default=YES State=UP",
    ]
    config = folder / "slurm.conf"
    config.write_text("\n".join(lines) + "\n")
    # Training in this process, as fixtures of other modules do, exports the rank variables; srun would pass them on.
    outer = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    env = {**outer, "SLURM_CONF": str(config)}
    quiet = {"env": env, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    daemons.append(subprocess.Popen(["slurmctld", "-D", "-f", str(config)], **quiet))
    for node in ("n0", "n1"):
        daemons.append(subprocess.Popen(["slurmd", "-D", "-N", node, "-f", str(config)], **quiet))
    try:
        deadline = time.monotonic() + 60
        while "0/2/0/2" not in (state := nodes(env)):
            assert time.monotonic() < deadline, f"the nodes did not start: {state}"
            time.sleep(0.5)
        yield env
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=20)


def nodes(env):
    """Return the counts of allocated, idle, other and all nodes, such as 0/2/0/2."""
    done = subprocess.run(["sinfo", "-h", "-o", "%F"], capture_output=True, text=True, check=False, env=env)
    return done.stdout.strip()


def run_batch_job(env, *arguments):
    """Submit a batch job, wait until its tasks have ended, and return their states. sbatch --wait polls too rarely."""
    done = subprocess.run(["sbatch", "--parsable", *arguments], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    show = ["scontrol", "--oneliner", "show", "job", done.stdout.strip()]
    deadline = time.monotonic() + 200
    while True:
        shown = subprocess.run(show, capture_output=True, text=True, check=True, env=env).stdout
        states = re.findall(r"\bJobState=(\w+)", shown)
        if not {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING"} & set(states):
            return states
        assert time.monotonic() < deadline, shown
        time.sleep(0.2)


def test_srun_trains_and_reports_an_invalid_config_once(slurm, dataset, tmp_path):
    config = tmp_path / "config.yaml"
    values = small_dict("mmdit", **{"data.path": str(dataset), "run_dir": str(tmp_path / "run"), "train.steps": 3})
    config.write_text(yaml.safe_dump(values))
    env = {**slurm, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = ["srun", "-N2", "-n2", sys.executable, "-m", "megatron_dit", "train", str(config)]

    def srun(*overrides):
        return subprocess.run([*command, *overrides], capture_output=True, text=True, timeout=180, check=False, env=env)

    done = srun("parallel.zero_stage=1")
    assert done.returncode == 0, done.stdout + done.stderr
    reader = open_checkpoint(tmp_path / "run")
    assert (reader.step, reader.manifest["layout"]["world"]) == (3, 2)
    refused = srun("model.dept=3")
    assert refused.returncode == 2
    assert refused.stderr.count("unknown key 'model.dept'") == 1
    assert "Traceback" not in refused.stderr


def test_sweep_sbatch_runs_trials_as_a_job_array(slurm, dataset, tmp_path):
    """Runs launch/sweep.sbatch without changes."""
    path = write_sweep(tmp_path, dataset, {"optimizer.lr": {"log2": [-9, -8]}})
    script = Path(__file__).parents[2] / "launch" / "sweep.sbatch"
    env = {**slurm, "PYTHON": sys.executable}
    states = run_batch_job(env, "--array=0-1", f"--output={tmp_path}/%a.log", str(script), str(path))
    assert states == ["COMPLETED"] * 2, [log.read_text() for log in tmp_path.glob("*.log")]
    assert [result.state for result in read_sweep(tmp_path / "sweep")[1]] == ["complete", "complete"]


def test_train_sbatch_trains_on_two_nodes(slurm, dataset, tmp_path):
    """Runs launch/train.sbatch without changes, with one task per node and no GPUs, as two pipeline stages."""
    config = tmp_path / "config.yaml"
    values = small_dict("mmdit", **{"data.path": str(dataset), "run_dir": str(tmp_path / "run"), "train.steps": 3})
    config.write_text(yaml.safe_dump(values))
    script = Path(__file__).parents[2] / "launch" / "train.sbatch"
    flags = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", f"--output={tmp_path}/log"]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}  # n0 and n1 are not host names
    env = {**slurm, "PYTHON": sys.executable, **address}
    states = run_batch_job(env, *flags, str(script), str(config), "parallel.pipeline=2", "train.micro_batch=2")
    assert states == ["COMPLETED"], (tmp_path / "log").read_text()
    reader = open_checkpoint(tmp_path / "run")
    assert (reader.step, reader.manifest["layout"]["pipeline"]) == (3, 2)


def test_procs_starts_the_ranks_in_a_batch_script(slurm, dataset, tmp_path):
    """Without srun the script runs only once, whatever Slurm's variables say about tasks."""
    config = tmp_path / "config.yaml"
    values = small_dict("mmdit", **{"data.path": str(dataset), "run_dir": str(tmp_path / "run"), "train.steps": 3})
    config.write_text(yaml.safe_dump(values))
    command = f"{sys.executable} -m megatron_dit train {config} --procs 2"
    states = run_batch_job(slurm, "--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/log", f"--wrap={command}")
    assert states == ["COMPLETED"], (tmp_path / "log").read_text()
    assert open_checkpoint(tmp_path / "run").manifest["layout"]["world"] == 2
