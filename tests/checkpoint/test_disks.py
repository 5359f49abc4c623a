"""If a disk is full, read-only or unmounted, a run reports it and no complete checkpoint is lost."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys

import pytest

from megatron_dit.checkpoint.listing import checkpoints
from megatron_dit.checkpoint.load import open_checkpoint
from megatron_dit.cli import run
from megatron_dit.models.param_specs import param_specs
from tests.helpers.configs import small, write_config

MOUNT = "mount -t tmpfs -o size={size}k tmpfs {folder}"


def run_in_namespace(script):
    """Run a shell script in its own mount namespace, which needs no privileges."""
    return subprocess.run(["unshare", "-rm", "bash", "-euc", script], capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module", autouse=True)
def _mounts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    if not shutil.which("unshare") or run_in_namespace(MOUNT.format(size=64, folder=folder)).returncode:
        pytest.skip("unprivileged processes cannot mount a file system on this machine")


@pytest.fixture
def disk(dataset, tmp_path):
    """(config, mount point, folder outside of it) of a run of 40 steps that is saved every 4 steps."""
    disk, outside = tmp_path / "disk", tmp_path / "outside"
    disk.mkdir()
    outside.mkdir()
    values = {
        "data.path": str(dataset),
        "run_dir": str(disk / "run"),
        "train.steps": 40,
        "checkpoint.every": 4,
        "checkpoint.keep": 100,
    }
    return write_config(tmp_path, "mmdit", **values), disk, outside


def train(config, *overrides):
    return " ".join([sys.executable, "-m", "megatron_dit", "train", str(config), *overrides])


def size_of_one():
    """Return the KiB of one checkpoint with four fp32 states."""
    params = param_specs(small("mmdit")).values()
    return 4 * 4 * sum(math.prod(param.shape) for param in params) // 1024


def test_full_disk_is_reported_and_earlier_checkpoints_are_kept(disk):
    config, folder, outside = disk
    size = int(3.5 * size_of_one())  # space for three checkpoints and the logs
    out = run_in_namespace(f"""
        {MOUNT.format(size=size, folder=folder)}
        {train(config)} && exit 1 || test $? = 2
        cp -r {folder}/run {outside}/full
        rm -r {folder}/run/checkpoints/step_00000004
        {train(config, "train.steps=14")}
        cp -r {folder}/run {outside}/run
    """)
    assert out.returncode == 0, out.stdout + out.stderr
    assert "step_00000016 could not be written ([Errno 28] No space left on device)" in out.stdout
    assert "continuing to train" in out.stdout
    assert "step_00000040 could not be written" in out.stderr
    assert "Traceback" not in out.stderr
    kept = checkpoints(outside / "full" / "checkpoints")
    assert [path.name[-2:] for path in kept] == ["04", "08", "12"]
    assert (outside / "full" / "checkpoints" / "latest").read_text() == "step_00000012\n"
    for path in kept:
        open_checkpoint(path).verify()
    assert not list(outside.rglob("*.part"))
    # Once there is space again, the same command resumes.
    assert "at step 12" in out.stdout
    assert open_checkpoint(outside / "run").step == 14


def test_read_only_folder_is_reported_on_one_line(disk):
    config, folder, _ = disk
    assert run(["train", str(config), "train.steps=4"]) == 0
    out = run_in_namespace(f"""
        mount --bind {folder} {folder}
        mount -o remount,bind,ro {folder}
        {train(config)} && exit 1 || test $? = 2
        {train(config, "--procs 2")} && exit 1 || test $? = 2
    """)
    assert out.returncode == 0, out.stdout + out.stderr
    lines = [line for line in out.stderr.splitlines() if "Read-only file system" in line]
    assert len(lines) == 2
    assert all(line.startswith(f"error: {folder / 'run'} cannot be written") for line in lines)
    assert "Traceback" not in out.stderr
    open_checkpoint(folder / "run").verify()


def test_unmounted_folder_is_reported_and_nothing_is_written_to_the_mount_point(disk):
    """If a network file system is unmounted, the directory below the mount point is on another disk."""
    config, folder, outside = disk
    out = run_in_namespace(f"""
        {MOUNT.format(size=65536, folder=folder)}
        {train(config, "train.steps=100000", "checkpoint.every=20", "checkpoint.keep=2")} > {outside}/out 2>&1 &
        until test -e {folder}/run/checkpoints/step_00000040; do sleep 0.05; done
        umount -l {folder}
        until grep -q "could not be written" {outside}/out; do sleep 0.05; done
        kill -TERM %1
        wait %1 && exit 1 || test $? = 2
        test -z "$(ls -A {folder})"
    """)
    text = (outside / "out").read_text()
    assert out.returncode == 0, out.stdout + out.stderr + text
    assert "continuing to train" in text
    assert text.splitlines()[-1].startswith("error: checkpoint")
    assert not list(folder.iterdir())
