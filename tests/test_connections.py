"""The connections between processes: what happens when one of them ends."""

import contextlib
import socket
import threading
from types import SimpleNamespace

import pytest

from grpo_jax.parallel import connections
from grpo_jax.parallel.connections import PORT_KEY, watch_processes


class Store(dict):
    """The part of JAX's client that the processes use to tell each other the port."""

    def key_value_set(self, key, value):
        self[key] = value

    def blocking_key_value_get(self, key, timeout_ms):
        return self[key]


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
def start(monkeypatch):
    """Returns a function that calls `watch_processes` as a process of a given index, and returns its `Watch`."""
    store, watches, make = Store(), [], connections.Watch

    def make_watch():
        watches.append(make())
        return watches[-1]

    def start(index):
        state = SimpleNamespace(process_id=index, client=store, coordinator_address="127.0.0.1:1")
        monkeypatch.setattr(connections.distributed, "global_state", state)
        monkeypatch.setattr(connections, "Watch", make_watch)
        watch_processes()
        return watches[-1]

    start.store = store
    yield start
    for watch in watches:
        watch.stop()


def connect(start, greeting: bytes) -> socket.socket:
    """Connects to process 0."""
    client = socket.create_connection(("127.0.0.1", int(start.store[PORT_KEY])))
    client.sendall(greeting)
    return client


def test_process_0_ends_when_another_process_is_lost(start, ended):
    start(0)
    connect(start, b"3       ").close()  # as the system does when a process ends
    assert ended(10) == [3]


def test_the_others_end_when_process_0_is_lost(start, ended):
    with socket.create_server(("127.0.0.1", 0)) as server:
        start.store[PORT_KEY] = str(server.getsockname()[1])
        start(2)
        first = server.accept()[0]
        assert first.recv(8, socket.MSG_WAITALL) == b"2       "
        assert not ended(0.1)
        first.close()
        assert ended(10) == [0]


def test_a_connection_that_ends_in_an_orderly_exit_is_not_lost(start, ended):
    watch = start(0)
    client = connect(start, b"3       ")
    watch.stop()
    client.close()
    assert not ended(0.1)


def test_a_connection_may_be_silent_for_as_long_as_it_lasts(start, ended, monkeypatch):
    """The operating system probes it meanwhile."""
    probed = threading.Event()

    def probe(connection, level, option, value, set_option=socket.socket.setsockopt):
        set_option(connection, level, option, value)
        if (level, option) == (socket.IPPROTO_TCP, socket.TCP_KEEPCNT):
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) and connection.gettimeout() is None
            probed.set()

    monkeypatch.setattr(connections, "LOST_SECONDS", 1)
    monkeypatch.setattr(socket.socket, "setsockopt", probe, raising=False)
    start(0)
    with connect(start, b"3       "):
        assert probed.wait(10) and not ended(0)


def test_the_end_after_a_lost_process_is_one_line_and_a_code_that_asks_for_a_new_start(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(connections.os, "_exit", codes.append)
    connections.end_without(3)
    (line,) = capsys.readouterr().err.splitlines()
    assert codes == [75] and "the connection to process 3 " in line


def test_strangers_are_turned_away(start, ended):
    start(0)
    with connect(start, b"GET / HTTP/1.1\r\n\r\n") as stranger, contextlib.suppress(ConnectionResetError):
        assert stranger.recv(1) == b""
    assert not ended(0.1)


def test_a_process_that_cannot_connect_says_so_and_goes_on(start, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        start.store[PORT_KEY] = str(server.getsockname()[1])
    start(1)
    assert "cannot connect to port" in capsys.readouterr().err
