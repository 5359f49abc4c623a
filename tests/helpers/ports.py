"""Find a free port for servers in tests."""

from __future__ import annotations

import random
import socket

# Below the ports that Linux gives to clients: a server may start many seconds after its port was chosen, and by then a
# connection of another test could have that port.
FIRST, LAST = 20000, 32767


def free_port():
    while True:
        port = random.SystemRandom().randint(FIRST, LAST)  # tests may have seeded the global generator
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:  # in use
                continue
            return port
