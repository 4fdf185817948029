"""TCP_QUICKACK is set again after each read."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from qmpballoon.quick_ack import set_after_reads, set_quick_ack

pytestmark = pytest.mark.skipif(not hasattr(socket, "TCP_QUICKACK"), reason="Linux only")


@pytest.fixture
def connected() -> Iterator[socket.socket]:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
        server.accept()[0],
    ):
        yield client


def is_set(sock: socket.socket) -> bool:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK) != 0


def clear(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)


class Reader:
    """A client whose read clears the option, as the kernel does in time."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.reads: list[int] = []

    def loop_read(self, max_packets: int = 1) -> int:
        clear(self.sock)
        self.reads.append(max_packets)
        if max_packets > 2:
            raise OSError("broken")
        return 7


def test_the_option_is_set_after_each_read(connected: socket.socket) -> None:
    reader: Any = Reader(connected)
    set_after_reads(reader, lambda: connected)
    for _ in range(3):
        clear(connected)
        assert not is_set(connected)
        assert reader.loop_read() == 7
        assert is_set(connected)
    assert reader.reads == [1, 1, 1]


def test_a_read_that_fails_raises_its_own_error(connected: socket.socket) -> None:
    reader: Any = Reader(connected)
    set_after_reads(reader, lambda: connected)
    with pytest.raises(OSError, match="broken"):
        reader.loop_read(3)
    assert is_set(connected)


@pytest.mark.parametrize("sock", [None, object()])
def test_a_client_without_a_socket_of_ours_reads_as_before(connected: socket.socket, sock: object) -> None:
    reader: Any = Reader(connected)
    set_after_reads(reader, lambda: sock)
    assert reader.loop_read() == 7
    assert not is_set(connected)


def test_a_closed_socket_is_ignored(connected: socket.socket) -> None:
    connected.close()
    set_quick_ack(connected)
