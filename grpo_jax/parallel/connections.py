"""Ends a process of a multi-process run when another one is lost.

JAX alone takes 100 seconds to notice that a process is gone, and then aborts with the stack of its C++ code. Here, each
process also keeps a connection to process 0. The operating system closes the connections of a process however it ends,
and the other side notices that immediately. If a whole host disappears, keepalive probes detect it within
`LOST_SECONDS`.
"""

import atexit
import os
import socket
import sys
import threading
import time
from typing import NoReturn

from jax._src import distributed  # the public interface has no key-value store

PROBE_SECONDS, PROBES = 5, 4  # a connection is lost when this many probes, this many seconds apart, are not answered
LOST_SECONDS = PROBE_SECONDS * (PROBES + 1)
TCP_OPTIONS = {"TCP_KEEPIDLE": PROBE_SECONDS, "TCP_KEEPINTVL": PROBE_SECONDS, "TCP_KEEPCNT": PROBES}
GRACE_SECONDS = 5.0
GREETING_BYTES = 8  # each connection begins with the index of a process, padded to this length
PORT_KEY = "grpo_jax/port"
EXIT_CODE = 75  # tells launchers that the run can be resumed


class Watch:
    """Watches connections and ends this process when one of them is lost."""

    def __init__(self):
        """Starts watching, until this process exits normally."""
        self.is_on = True
        sys.excepthook = end_after_exception
        atexit.register(self.stop)  # runs before JAX's own functions, which wait for the other processes

    def stop(self) -> None:
        """Stops watching, so that connections may end."""
        self.is_on = False

    def accept(self, server: socket.socket) -> None:
        """Accepts connections of the other processes, forever."""
        while True:
            threading.Thread(target=self.greet, args=(server.accept()[0],), name="watch", daemon=True).start()

    def greet(self, connection: socket.socket) -> None:
        """Watches an accepted connection if it comes from a process of the run."""
        connection.settimeout(LOST_SECONDS)
        try:
            peer = int(connection.recv(GREETING_BYTES, socket.MSG_WAITALL))
        except (OSError, ValueError):
            connection.close()
            return
        self.watch(connection, peer)

    def watch(self, connection: socket.socket, peer: int) -> None:
        """Waits until a connection to process `peer` ends; nothing is ever sent on it."""
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in TCP_OPTIONS.items():
            if hasattr(socket, name):  # some systems lack some of them
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        try:
            connection.recv(1)
        except OSError:
            pass
        if self.is_on:
            end_without(peer)


def watch_processes() -> None:
    """Connects the processes of a run and watches the connections. Call it after `jax.distributed.initialize`.

    If process 0 cannot be reached on the port that it has chosen, a process prints a warning and continues unwatched.
    """
    state, watch = distributed.global_state, Watch()
    if state.process_id == 0:
        is_dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if is_dual else socket.AF_INET
        server = socket.create_server(("", 0), family=family, dualstack_ipv6=is_dual, backlog=4096)
        state.client.key_value_set(PORT_KEY, str(server.getsockname()[1]))
        threading.Thread(target=watch.accept, args=(server,), name="watch", daemon=True).start()
        return
    port = int(state.client.blocking_key_value_get(PORT_KEY, 1000 * LOST_SECONDS))
    host = state.coordinator_address.rpartition(":")[0].strip("[]")
    try:
        connection = socket.create_connection((host, port), timeout=LOST_SECONDS)
        connection.sendall(str(state.process_id).encode().ljust(GREETING_BYTES))
    except OSError as error:
        line = (
            f"warning: process {state.process_id} cannot connect to port {port} of {host} ({error}), so it will notice "
            "late if another process is lost. Open the ports between the hosts."
        )
        print(line, file=sys.stderr, flush=True)
        return
    threading.Thread(target=watch.watch, args=(connection, 0), name="watch", daemon=True).start()


def end_without(peer: int) -> NoReturn:
    """Ends this process because process `peer` is lost, without waiting for anything that depends on that process."""
    line = (
        f"error: All processes of a run must stay connected; the connection to process {peer} was lost, because the "
        "process or its host stopped or crashed. This process stops as well. Start all of them again to resume from "
        "the newest checkpoint."
    )
    print(line, file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)


def end_after_exception(*error) -> NoReturn:
    """Prints the traceback of an uncaught exception and ends this process, so that the others end as well.

    A collective operation raises an exception if another process is lost. The thread that watches the connection gets
    time to report that in one line first.
    """
    time.sleep(GRACE_SECONDS)
    sys.__excepthook__(*error)
    sys.stderr.flush()
    os._exit(1)  # JAX would wait for the other processes, which may be waiting for this one
