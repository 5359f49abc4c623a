"""The launcher of ``--procs``: failing, hanging and stopped ranks. A script replaces the ``megatron_dit`` package."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

import pytest

from megatron_dit.runtime import launcher as launch
from megatron_dit.runtime.launcher import run_ranks

HOST = socket.gethostname()


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Function that runs a script, with its ``rank`` defined, on two ranks and returns (status, seconds)."""
    package = tmp_path / "megatron_dit"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "REMINDER_SECONDS", 0.5)
    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]

    def run(script, signals=(), **kwargs):
        prelude = 'import os, signal, sys, time\nrank = int(os.environ["RANK"])\n'
        (package / "__main__.py").write_text(prelude + script)
        ready = tmp_path / "ready"
        ready.unlink(missing_ok=True)

        ended = threading.Event()

        def send():
            while not ready.exists():
                if ended.wait(0.02):
                    return  # the ranks have failed, so there is nothing to signal
            for number in signals:
                if ended.is_set():
                    return  # the launcher's handlers would not receive it
                os.kill(os.getpid(), number)
                ended.wait(0.3)

        sender = threading.Thread(target=send)
        if signals:
            sender.start()
        started = time.monotonic()
        try:
            return run_ranks([], 2, **kwargs), time.monotonic() - started
        finally:
            ended.set()
            if signals:
                sender.join()

    yield run
    for number, handler in before:
        signal.signal(number, handler)


SERVER = """
import socket
if "MEGATRON_DIT_LISTEN_FD" in os.environ:
    server = socket.socket(fileno=int(os.environ["MEGATRON_DIT_LISTEN_FD"]))
    print(rank, server.getsockname()[1] == int(os.environ["MASTER_PORT"]))
"""


def test_rank_0_inherits_the_socket_of_master_port(ranks, capfd):
    """Otherwise another job could take MASTER_PORT while the ranks start."""
    assert ranks(SERVER)[0] == 0
    assert capfd.readouterr().out == "0 True\n"


def test_output_of_successful_ranks_is_printed(ranks, capfd):
    status, _ = ranks('print("hello", rank); print("warning", file=sys.stderr)')
    captured = capfd.readouterr()
    assert status == 0
    assert sorted(captured.out.splitlines()) == ["hello 0", "hello 1"]
    assert captured.err.splitlines() == ["warning", "warning"]


def test_killed_rank_is_named_and_its_output_is_printed_last(ranks, capfd):
    status, seconds = ranks(
        """
if rank == 1:
    print("at step 7", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""
    )
    assert status == 128 + signal.SIGKILL
    assert seconds < 20
    lines = capfd.readouterr().err.splitlines()
    assert f"error: rank 1 of 2 on host {HOST} was killed by SIGKILL" in lines[-2]
    assert lines[-1] == "at step 7"


def test_only_the_first_failing_ranks_traceback_is_printed_last(ranks, capfd):
    status, _ = ranks(
        """
if rank == 1:
    open("gone", "w").close()
    raise ValueError("the cause")
while not os.path.exists("gone"):
    time.sleep(0.01)
time.sleep(0.2)
raise ConnectionError("connection closed by peer")
"""
    )
    err = capfd.readouterr().err
    assert status == 1
    assert f"error: rank 1 of 2 on host {HOST} failed with exit status 1; its last lines:\nTraceback" in err
    assert err.endswith("ValueError: the cause\n")


def test_same_error_of_all_ranks_is_printed_once(ranks, capfd):
    status, _ = ranks('print("error: no such key", file=sys.stderr); sys.exit(2)')
    assert status == 2
    assert capfd.readouterr().err == "error: no such key\n"


def test_error_of_one_rank_is_printed_and_ends_all_ranks(ranks, capfd):
    status, seconds = ranks('if rank == 1: print("error: mine", file=sys.stderr); sys.exit(2)\ntime.sleep(60)')
    assert (status, seconds < 20) == (2, True)
    assert capfd.readouterr().err == "error: mine\n"


SAVES = """
def stop(*_):
    time.sleep(0.3)
    sys.stdout.write(f"saved {rank}\\n")  # in one write, because the ranks share the pipe
    sys.stdout.flush()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
"""
HANGS = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
READY = 'time.sleep(0.5)\nopen("ready", "w").close()\ntime.sleep(60)\n'


def test_ranks_save_after_a_signal(ranks, capfd):
    status, _ = ranks(SAVES + READY, [signal.SIGTERM])
    captured = capfd.readouterr()
    assert status == 0
    assert sorted(captured.out.splitlines()) == ["saved 0", "saved 1"]
    assert "received SIGTERM: the ranks save and stop; send a second signal to kill them at once" in captured.err


def test_hanging_rank_is_named_and_killed_after_stop_seconds(ranks, capfd):
    script = SAVES + f"if rank == 1:\n    {HANGS}" + READY
    status, seconds = ranks(script, [signal.SIGTERM], stop_seconds=1.5)
    assert status == 128 + signal.SIGTERM
    assert seconds < 20
    err = capfd.readouterr().err
    assert "ranks 1 have not ended" in err
    assert "they will be killed after launch.stop_seconds=1.5, or at once by a second signal" in err
    assert "killing them" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_kills_the_ranks(ranks, capfd, number):
    status, seconds = ranks(HANGS + HANGS.replace("TERM", "INT") + READY, [number, number])
    assert status == 128 + number
    assert seconds < 20
    assert "the ranks were killed before they had saved" in capfd.readouterr().err


def test_signal_before_the_first_step_exits_with_128_plus_its_number(ranks, capfd):
    status, _ = ranks(READY, [signal.SIGTERM])
    assert status == 128 + signal.SIGTERM
    assert "stopped before the first step" in capfd.readouterr().err


def test_variables_of_other_launchers_are_not_passed_to_ranks(ranks, capfd, monkeypatch):
    foreign = ("TORCHELASTIC_USE_AGENT_STORE", "GROUP_RANK", "LOCAL_SIZE")
    for name in foreign:
        monkeypatch.setenv(name, "3")
    assert ranks(f'print([name for name in os.environ if name in {foreign} or "WORLD" in name])')[0] == 0
    for line in capfd.readouterr().out.splitlines():
        assert sorted(eval(line)) == ["LOCAL_WORLD_SIZE", "WORLD_SIZE"]


def test_output_that_is_not_utf8_is_escaped(ranks, capfd):
    assert ranks(r'sys.stderr.buffer.write(b"\xff\xfe\n")')[0] == 0
    assert "\\xff\\xfe" in capfd.readouterr().err
