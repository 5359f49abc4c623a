"""Standard output that is closed, full, or a pipe whose reader exits, with and without ``survive_console_loss``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from megatron_dit.runtime.program import run_program
from megatron_dit.runtime.output import survive_console_loss

def command(arguments):
    if "keep" in arguments:
        survive_console_loss()
    for number in range(20000):
        print("line", number)
    print("worked", file=sys.stderr)
    open(arguments[0], "w").close()
    return 0

sys.exit(run_program(command))
"""


def start(tmp_path, words, shell):
    """Return (exit status, standard error, whether the command finished)."""
    done = tmp_path / "done"
    done.unlink(missing_ok=True)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    line = f"{sys.executable} {program} {done} {words} {shell}"
    ended = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    return ended.returncode, ended.stderr, done.exists()


def test_exiting_reader_ends_the_command_unless_it_keeps_going(tmp_path):
    assert start(tmp_path, "", "| head -1 > /dev/null; exit ${PIPESTATUS[0]}") == (141, "", False)
    assert start(tmp_path, "keep", "| head -1 > /dev/null; exit ${PIPESTATUS[0]}") == (0, "worked\n", True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_disk_is_an_error_unless_the_command_keeps_going(tmp_path):
    status, err, done = start(tmp_path, "", "> /dev/full")
    assert (status, done) == (2, False)
    assert err == "error: standard output cannot be written (No space left on device): redirect it to another file\n"
    assert start(tmp_path, "keep", "> /dev/full") == (0, "worked\n", True)


def test_closed_streams_do_not_stop_the_command(tmp_path):
    assert start(tmp_path, "", ">&-") == (0, "worked\n", True)
    assert start(tmp_path, "", ">&- 2>&-") == (0, "", True)


def test_survive_console_loss_ignores_sighup(tmp_path):
    code = "import os, signal; from megatron_dit.runtime.output import survive_console_loss; survive_console_loss(); "
    code += "os.kill(os.getpid(), signal.SIGHUP); print('continues')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"continues\n"
