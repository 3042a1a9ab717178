"""Ends a process of a multi-process run as soon as another one is lost.

The processes of JAX talk to a coordinator in process 0. By itself, JAX takes 100 seconds to notice that a process is
gone, and aborts with the stack of its C++ code. Here, a thread on each side relays these connections. The operating
system closes the connections of a process that ends, however it ends, and the relay on the other side sees that at
once. If a whole host disappears, keepalive probes find out within `LOST_SECONDS`.
"""

import atexit
import contextlib
import os
import socket
import sys
import threading
import time
from typing import NoReturn

import jax
from jax._src.clusters import ClusterEnv

PROBE_SECONDS, PROBES = 5, 4  # a connection is lost when this many probes, this many seconds apart, are not answered
LOST_SECONDS = PROBE_SECONDS * (PROBES + 1)
TCP_OPTIONS = {
    "TCP_NODELAY": 1,
    "TCP_KEEPIDLE": PROBE_SECONDS,
    "TCP_KEEPINTVL": PROBE_SECONDS,
    "TCP_KEEPCNT": PROBES,
    "TCP_USER_TIMEOUT": LOST_SECONDS * 1000,  # for what has been sent and is not acknowledged
}
JOIN_SECONDS = 300  # for which a process waits for the others at the start
GRACE_SECONDS = 5.0
GREETING_BYTES = 8  # each connection begins with the index of a process, padded to this length
EXIT_CODE = 75  # tells launchers that starting the run again continues it


class Relay:
    """Relays TCP connections to another address, and ends the process when one of them is lost."""

    def __init__(self, listen: tuple[str, int], target: tuple[str, int], process: int):
        """Starts to accept connections.

        Args:
            listen: Host and port to accept connections on; port 0 is any free one, and host "" all interfaces.
            target: Host and port to relay them to.
            process: The index of this process. Process 0 receives a greeting, the others send one.
        """
        family = socket.AF_INET6 if not listen[0] and socket.has_dualstack_ipv6() else socket.AF_INET
        self.server = socket.create_server(
            listen, family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=4096
        )
        self.target, self.process = target, process
        self.is_watching = False
        threading.Thread(target=self.accept, name="relay", daemon=True).start()

    @property
    def port(self) -> int:
        """The port on which connections are accepted."""
        return self.server.getsockname()[1]

    def watch(self) -> None:
        """Ends the process, from now until its orderly exit, when a connection is lost."""
        self.is_watching = True
        sys.excepthook = end_after_exception
        atexit.register(self.stop_watching)  # runs before JAX's own functions, which end the connections

    def stop_watching(self) -> None:
        """Relays connections until they end, however they end."""
        self.is_watching = False

    def accept(self) -> None:
        """Accepts connections, forever."""
        while True:
            near, _ = self.server.accept()
            threading.Thread(target=self.connect, args=(near,), name="relay", daemon=True).start()

    def connect(self, near: socket.socket) -> None:
        """Connects an accepted connection to the target, and relays both directions until one ends."""
        peer = 0
        try:
            if self.process == 0:
                near.settimeout(LOST_SECONDS)
                peer = int(near.recv(GREETING_BYTES, socket.MSG_WAITALL))
            far = socket.create_connection(self.target, timeout=LOST_SECONDS)
            if self.process != 0:
                far.sendall(str(self.process).encode().ljust(GREETING_BYTES))
        except (OSError, ValueError):  # not one of our processes, or the target does not listen yet: JAX tries again
            near.close()
            return
        for connection in (near, far):
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in TCP_OPTIONS.items():
                if hasattr(socket, name):  # some systems lack some of them
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        threading.Thread(target=self.forward, args=(near, far, peer), name="relay", daemon=True).start()
        self.forward(far, near, peer)

    def forward(self, source: socket.socket, sink: socket.socket, peer: int) -> None:
        """Forwards what one side of a connection sends to the other side, until it ends."""
        try:
            while data := source.recv(2**16):
                sink.sendall(data)
        except OSError:
            pass
        if self.is_watching:
            end_without(peer)
        for connection in (source, sink):
            with contextlib.suppress(OSError):  # the thread of the other direction has done it
                connection.shutdown(socket.SHUT_RDWR)


def end_without(peer: int) -> NoReturn:
    """Ends this process because process `peer` is lost, without waiting for anything that may wait for that process."""
    line = (
        f"error: All processes of a run must stay connected; the connection to process {peer} ended, because it was "
        "stopped or crashed, or its host did. This process stops too. Start all of them again to resume from the "
        "newest checkpoint."
    )
    print(line, file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)


def end_after_exception(*error) -> NoReturn:
    """Prints the traceback of an exception that nothing has caught, and ends this process, so that the others do too.

    A collective operation raises an exception if another process is lost. The relay, which says so in one line, gets
    the time to do that first.
    """
    time.sleep(GRACE_SECONDS)
    sys.__excepthook__(*error)
    sys.stderr.flush()
    os._exit(1)  # JAX would wait for the other processes, which may be waiting for this one


def free_port() -> int:
    """Returns a port of this host that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def connect_processes(address: str | None, count: int | None, index: int | None) -> None:
    """Joins the processes of a run with `jax.distributed.initialize`, and watches their connections from then on.

    Args:
        address: Host and port of the coordinator in process 0. JAX detects this from the cluster if it is None, and so
            for the others.
        count: Number of processes.
        index: Index of this process.

    Raises:
        OSError: The port of the coordinator is taken.
        ValueError: JAX could not detect what is None.
    """
    detected = ClusterEnv.auto_detect_unset_distributed_params(address, count, index, None, None, JOIN_SECONDS)
    address, count, index, _ = detected
    if None in (address, count, index):
        jax.distributed.initialize(address, count, index)  # raises the error that says what is missing
    host, _, port = address.rpartition(":")
    if index == 0:
        inner = f"127.0.0.1:{free_port()}"
        relay = Relay(("", int(port)), ("127.0.0.1", int(inner.rpartition(":")[2])), index)
    else:
        relay = Relay(("127.0.0.1", 0), (host.strip("[]"), int(port)), index)
        inner = f"127.0.0.1:{relay.port}"
    if any(name in os.environ for name in ("grpc_proxy", "https_proxy", "http_proxy")):
        exempt = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy") or ""
        os.environ["no_grpc_proxy"] = f"127.0.0.1,{exempt}"  # gRPC would ask the proxy for our own port
    jax.distributed.initialize(inner, count, index, coordinator_bind_address=inner, initialization_timeout=JOIN_SECONDS)
    relay.watch()
