"""Relays between processes: what they carry, and what they do when a connection ends."""

import contextlib
import os
import socket
import threading

import pytest

from grpo_jax.parallel import connections
from grpo_jax.parallel.connections import Relay, free_port


@pytest.fixture
def ended(monkeypatch):
    """Records the processes whose loss would have ended this process, instead of ending it."""
    ended, event = [], threading.Event()

    def end_without(peer):
        ended.append(peer)
        event.set()

    monkeypatch.setattr(connections, "end_without", end_without)
    monkeypatch.setattr(connections.sys, "excepthook", connections.sys.excepthook)
    return lambda seconds: event.wait(seconds) and ended


@pytest.fixture
def relays():
    """Yields a server, the relay before it as in process 0, and the relay of process 3, which is connected to that."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        first = Relay(("127.0.0.1", free_port()), server.getsockname(), process=0)
        third = Relay(("127.0.0.1", 0), ("127.0.0.1", first.port), process=3)
        yield server, first, third
        for relay in (first, third):
            relay.stop_watching()


@pytest.fixture
def connection(relays):
    """Yields the two ends of a connection: that of JAX in process 3, and that of the coordinator in process 0."""
    server, _, third = relays
    with socket.create_connection(("127.0.0.1", third.port)) as client, server.accept()[0] as coordinator:
        yield client, coordinator


def test_a_relayed_connection_carries_what_is_sent(connection):
    for sender, receiver in (connection, connection[::-1]):
        sent = os.urandom(2**20)
        threading.Thread(target=sender.sendall, args=(sent,)).start()
        received = b""
        while len(received) < len(sent):
            received += receiver.recv(2**16)
        assert received == sent


@pytest.mark.parametrize("side, lost", [(0, 3), (1, 0)], ids=["process 3", "process 0"])
def test_a_lost_connection_ends_the_process_on_the_other_side(relays, connection, ended, side, lost):
    _, first, third = relays
    (first, third)[side].watch()
    connection[side].close()  # as the system does when a process ends
    assert ended(10) == [lost] * len(ended(10))


def test_a_connection_that_ends_in_an_orderly_exit_is_not_lost(relays, connection, ended):
    _, first, third = relays
    for relay in (first, third):
        relay.watch()
        relay.stop_watching()
    client, coordinator = connection
    client.close()
    assert coordinator.recv(1) == b"" and not ended(0.1)


def test_strangers_are_turned_away(relays, ended):
    _, first, _ = relays
    first.watch()
    with socket.create_connection(("127.0.0.1", first.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
        assert not ended(0.1)
