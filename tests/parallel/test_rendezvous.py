"""Ranks connect to each other, or report missing ranks within seconds. Threads represent processes."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from megatron_dit.parallel import rendezvous as module
from megatron_dit.parallel.rendezvous import ranges, rendezvous
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.launch_environment import LaunchEnvironment
from tests.helpers.ports import free_port


@pytest.fixture
def port(monkeypatch):
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(module, "REPEAT_SECONDS", 0.5)
    monkeypatch.setattr(module, "NAME_SECONDS", 0.3)
    monkeypatch.setattr(module, "FAREWELL_SECONDS", 0.5)
    return port


def meet(*places, limit=20.0):
    """Return the result of the rendezvous for each of ``places``, (rank, world): a store or an error."""
    results = [None] * len(places)

    def join(number, place):
        try:
            results[number] = rendezvous(LaunchEnvironment(*place), limit)
        except UserError as error:
            results[number] = error

    threads = [threading.Thread(target=join, args=item) for item in enumerate(places)]
    for thread in threads:
        thread.start()
        time.sleep(0.2)  # in this order
    for thread in threads:
        thread.join()
    return results


def test_ranges_abbreviates_consecutive_numbers():
    assert ranges([1, 3, 4, 5, 6, 9]) == "1, 3-6, 9"
    assert ranges([2, 1]) == "1-2"


def test_ranks_may_start_in_any_order(port):
    first, second, third = meet((2, 3), (0, 3), (1, 3))
    first.set("greeting", "hello")
    assert second.get("greeting") == third.get("greeting") == b"hello"


def test_missing_ranks_are_named_and_the_wait_is_limited(port, capfd):
    started = time.monotonic()
    zero, two = meet((0, 5), (2, 5), limit=1.5)
    assert time.monotonic() - started < 10
    named = f"ranks 1, 3-4 of 5 did not connect to 127.0.0.1:{port}"
    assert named in str(zero)
    assert str(two) == str(zero)
    lines = capfd.readouterr().err.splitlines()
    assert len([line for line in lines if named in line]) >= 2  # repeatedly
    assert f"rank 0 on {socket.gethostname()}" in lines[0]


def test_missing_rank_0_is_reported(port, capfd):
    (error,) = meet((1, 2), limit=1.0)
    assert f"127.0.0.1:{port} does not answer: Connection refused" in str(error)
    assert "127.0.0.1" in capfd.readouterr().err


def test_two_processes_with_the_same_rank_are_rejected(port):
    zero, one, other = meet((0, 2), (1, 2), (1, 2), limit=1.0)
    assert not isinstance(zero, UserError)
    assert not isinstance(one, UserError)
    assert "RANK=1 is set for" in str(other)


def test_different_world_sizes_are_rejected(port):
    zero, one = meet((0, 2), (1, 3), limit=1.0)
    assert "was started with WORLD_SIZE=3, other ranks with 2" in str(one)
    assert "rank 1 of 2 did not connect" in str(zero)


def test_port_in_use_is_reported(port):
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        (error,) = meet((0, 2), limit=1.0)
    assert f"MASTER_PORT={port} cannot be served" in str(error)
    assert "choose a free port" in str(error)


def test_another_server_at_the_port_is_reported(port, monkeypatch, capfd):
    monkeypatch.setattr(module, "STORE_SECONDS", 0.5)

    def serve(server):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", port)) as server:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        (error,) = meet((1, 2), limit=1.0)
        server.shutdown(socket.SHUT_RDWR)
    assert f"the server at 127.0.0.1:{port} is not rank 0" in str(error)
    assert all(line.startswith("rank 1 on ") for line in capfd.readouterr().err.splitlines())


def test_invalid_addresses_and_ports_are_rejected(port, monkeypatch):
    for name, value, words in [
        ("MASTER_ADDR", "no-such-host.invalid", "MASTER_ADDR=no-such-host.invalid cannot be resolved"),
        ("MASTER_ADDR", " ", "MASTER_ADDR is not set"),
        ("MASTER_PORT", "http", "MASTER_PORT='http': expected a port"),
        ("MASTER_PORT", "99999", "MASTER_PORT='99999': expected a port"),
    ]:
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            (error,) = meet((1, 2), limit=1.0)
        assert words in str(error)


def test_ranks_use_the_store_of_torchruns_agent(port, monkeypatch):
    """The agent serves the store, and rank 0 connects to it like the others."""
    from torch.distributed import TCPStore

    agent = TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for attempt in ("0", "1"):  # torchrun restarts failed ranks
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        zero, one = meet((0, 2), (1, 2))
        zero.set("key", "value")
        assert one.get("key") == b"value"
    assert agent.port == port


@pytest.mark.parametrize("number", [15, 2])
def test_signal_ends_the_wait_immediately(port, number):
    code = """
from megatron_dit.parallel.topology import connect
print("waiting", flush=True)
connect()
"""
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "2"}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"waiting\n"
    time.sleep(0.3)
    process.send_signal(number)
    _, err = process.communicate(timeout=5)
    assert process.returncode == -number
    assert err == b""
