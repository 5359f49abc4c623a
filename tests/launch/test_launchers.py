"""The same command works with --procs, torchrun and the deepspeed launcher (for srun see the slurm mark)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from megatron_dit.checkpoint.load import open_checkpoint
from tests.helpers.configs import small_dict
from tests.helpers.ports import free_port

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]


def launched(words, folder):
    env = {**os.environ, "MASTER_PORT": str(free_port()), "PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(folder)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr


def weights(run):
    reader = open_checkpoint(run)
    assert reader.manifest["layout"]["world"] == 2
    return {name: reader.full("master", name) for name in reader.manifest["params"]}


def test_launchers_give_the_same_weights(dataset, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(small_dict("mmdit", **{"data.path": str(dataset), "parallel.zero_stage": 2})))

    def words(name):
        return ["train", str(config), f"run_dir={tmp_path / name}", "train.steps=4"]

    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    starts = {
        "procs": [sys.executable, "-m", "megatron_dit", *words("procs"), "--procs", "2"],
        "torchrun": [str(BIN / "torchrun"), "--nproc-per-node=2", f"--master-port={free_port()}", "--module",
                     "megatron_dit", *words("torchrun")],
        "deepspeed": [str(ROOT / "launch/train.sh"), str(hosts), *words("deepspeed")[1:]],
    }  # fmt: skip
    for command in starts.values():
        launched(command, tmp_path)
    expected = weights(tmp_path / "procs")
    for name in ("torchrun", "deepspeed"):
        found = weights(tmp_path / name)
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("scontrol", "given", "expected"),
    [
        ("seq -f node-%g 100000", "", "node-1"),  # more output than a pipe's buffer
        ("exit 1", "", "batch-host"),
        (None, "", "batch-host"),
        ("echo node-1", "mine", "mine"),
    ],
)
def test_train_sbatch_finds_the_first_host(tmp_path, scontrol, given, expected):
    """srun and scontrol are replaced by scripts; scontrol may fail or be missing."""
    commands = {"srun": 'echo "$MASTER_ADDR $MASTER_PORT"', "scontrol": scontrol, "hostname": "echo batch-host"}
    for name, script in commands.items():
        if script is not None:
            (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
            (tmp_path / name).chmod(0o755)
    for name in ("bash", "env", "seq"):
        (tmp_path / name).symlink_to(shutil.which(name))
    env = {"PATH": str(tmp_path), "SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "node-[1-8]", "MASTER_ADDR": given}
    done = subprocess.run(["bash", ROOT / "launch/train.sbatch"], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"{expected} 20123\n"


def test_module_and_console_script_print_the_same_help():
    scripts = [[str(BIN / "megatron-dit")], [sys.executable, "-m", "megatron_dit"]]
    helps = [subprocess.run([*s, "--help"], capture_output=True, text=True, check=True).stdout for s in scripts]
    if not (BIN / "megatron-dit").exists():
        pytest.fail("the console script is not installed; run pip install -e .")
    assert helps[0] == helps[1]
    assert "verify" in helps[0]


def test_command_exits_in_spite_of_a_thread_that_never_ends():
    """The thread of a collective whose other ranks have died never ends."""
    code = """
import sys, threading
from megatron_dit.cli import main
threading.Thread(target=threading.Event().wait).start()
sys.argv = ["megatron-dit", "train", "/nowhere.yaml"]
main()
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert out.returncode == 2
    assert out.stderr.startswith("error: config /nowhere.yaml does not exist")
