"""Monitors over TCP: ``-qmp tcp:127.0.0.1:4444,server=on,wait=off``.

The process behind such a connection is not known: no pid and no RSS, nor whether another client holds the
monitor. For a monitor that is held the kernel takes as many connections as QEMU's backlog of one allows,
which hear nothing; then it drops the next.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from qmpballoon.addresses import TcpAddress, tcp_address
from qmpballoon.errors import MonitorBusy, Unreachable
from qmpballoon.qmp.monitor import OpenMonitor

HELD_OR_HANGS: Final = (
    "another client holds this monitor, which serves one at a time, or its QEMU does not run: over TCP "
    "nothing tells which; give QEMU one more: -qmp unix:PATH,server=on,wait=off"
)
_LISTENS: Final = "0A"  # TCP_LISTEN in /proc/net/tcp: proc(5), include/net/tcp_states.h
_ESTABLISHED: Final = "01"  # TCP_ESTABLISHED there
_NO_INODE: Final = "0"  # of a connection that its server has not accepted yet
_LOCAL_HOSTS: Final = ("127.0.0.1", "::1")


async def open_tcp_monitor(path: str, *, timeout_s: float) -> OpenMonitor:
    """Connect to a monitor at ``tcp:HOST:PORT``, without waiting for its greeting.

    Raises:
        Unreachable: no such host, nobody listens, or not reached within ``timeout_s``.
        MonitorBusy: on this machine, not connected within ``timeout_s``: its backlog is full.
    """
    try:
        address = tcp_address(path)
    except ValueError as error:
        raise Unreachable(f"{path}: {error}") from None
    problem: Exception = Unreachable(f"{path}: no such host")
    try:
        async with asyncio.timeout(timeout_s):
            for family, place in await _places(path, address):
                try:
                    return OpenMonitor(path, await _connected(family, place), None)
                except OSError as error:
                    problem = Unreachable(f"{path}: {_reason(error)}")
                    problem.__cause__ = error
    except TimeoutError:
        if address.is_loopback:
            raise MonitorBusy(f"{path}: {HELD_OR_HANGS}") from None
        raise Unreachable(f"{path}: not reached within {timeout_s:g} s") from None
    raise problem


def is_tcp_listening(path: str) -> bool:
    """Tell whether a process of this machine listens on the port; for another machine's always true."""
    try:
        address = tcp_address(path)
    except ValueError:
        return False
    if not address.is_loopback:
        return True
    return any(row[3] == _LISTENS for row in _rows_of(address.port))


def is_tcp_held(path: str) -> bool:
    """Tell whether a process of this machine has accepted a client on the port; False if not known."""
    try:
        address = tcp_address(path)
    except ValueError:
        return False
    if not address.is_loopback:
        return False
    return any(row[3] == _ESTABLISHED and row[9] != _NO_INODE for row in _rows_of(address.port))


def _rows_of(port: int) -> Iterator[list[str]]:
    """Yield the rows of the kernel's tables for the sockets with this local port."""
    end = f":{port:04X}"
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:  # a kernel without IPv6
            continue
        yield from (row for row in map(str.split, lines) if row[1].endswith(end))


async def _places(path: str, address: TcpAddress) -> Sequence[tuple[int, tuple[object, ...]]]:
    """Return the family and socket address of each address that the host has."""
    hosts = _LOCAL_HOSTS if address.host.lower() == "localhost" else (address.host,)
    loop, found = asyncio.get_running_loop(), []
    for host in hosts:
        try:
            rows = await loop.getaddrinfo(host, address.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise Unreachable(f"{path}: no such host: {error.strerror or error}") from error
        found += [(int(family), place) for family, _, _, _, place in rows]
    return found


async def _connected(family: int, place: tuple[object, ...]) -> socket.socket:
    connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, place)
        if connection.getsockname() == connection.getpeername():  # where nobody listens, TCP may find itself
            raise ConnectionRefusedError
    except BaseException:
        connection.close()
        raise
    return connection


def _reason(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "nobody listens on this port; is the VM running, with -qmp tcp:HOST:PORT,server=on,wait=off?"
    return error.strerror or str(error)
