"""Standard output whose reader leaves, that is full or closed: three small commands and one that goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from megatron_dit.cli.program import run_program
from megatron_dit.runtime.output import keep_going

def command(arguments):
    if "keep" in arguments:
        keep_going()
    for number in range(20000):
        print("line", number)
    print("worked", file=sys.stderr)
    open(arguments[0], "w").close()
    return 0

sys.exit(run_program(command))
"""


def start(tmp_path, words, shell):
    """(exit status, standard error, whether the command came to its end)."""
    done = tmp_path / "done"
    done.unlink(missing_ok=True)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    line = f"{sys.executable} {program} {done} {words} {shell}"
    ended = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    return ended.returncode, ended.stderr, done.exists()


def test_a_reader_that_leaves(tmp_path):
    assert start(tmp_path, "", "| head -1 > /dev/null; exit ${PIPESTATUS[0]}") == (141, "", False)
    assert start(tmp_path, "keep", "| head -1 > /dev/null; exit ${PIPESTATUS[0]}") == (0, "worked\n", True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk(tmp_path):
    status, err, done = start(tmp_path, "", "> /dev/full")
    assert (status, done) == (2, False)
    assert err == "error: standard output cannot be written (No space left on device): send it elsewhere\n"
    assert start(tmp_path, "keep", "> /dev/full") == (0, "worked\n", True)


def test_closed_streams(tmp_path):
    assert start(tmp_path, "", ">&-") == (0, "worked\n", True)
    assert start(tmp_path, "", ">&- 2>&-") == (0, "", True)


def test_a_training_run_ignores_hangups(tmp_path):
    code = "import os, signal; from megatron_dit.runtime.output import keep_going; keep_going(); "
    code += "os.kill(os.getpid(), signal.SIGHUP); print('goes on')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"goes on\n"
