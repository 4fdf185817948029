"""One monitor socket file: connecting to it, the process behind it, and whether another client holds it.

A non-blocking unix connect returns at once, with success or an error. QEMU's listen backlog is 1, so a
busy monitor accepts two more connections without a greeting and refuses the next with EAGAIN (QEMU 7.2,
Linux 6.1). Closed connections stay in that backlog, so connect once and wait.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qmpballoon.descriptors import with_reserve
from qmpballoon.errors import MonitorBusy, Unreachable

_UCRED: Final = struct.Struct("3i")  # pid, uid, gid: unix(7), SO_PEERCRED
_LONGEST_PATH: Final = 107  # sun_path is 108 bytes with its NUL: unix(7)
_LISTENS: Final = b"00010000"  # the flag __SO_ACCEPTCON in /proc/net/unix
_ACCEPTED: Final = b"03"  # the state SS_CONNECTED there; 02 is still in the backlog
_BOUND: Final = b"01"  # to no other socket yet


@dataclass(frozen=True, slots=True)
class OpenMonitor:
    """A connected socket that nobody has greeted yet, and the pid of the process that listens."""

    path: str
    connection: socket.socket
    pid: int | None  # None: the process is in a pid namespace that is not visible here


def open_monitor(path: str | os.PathLike[str]) -> OpenMonitor:
    """Connect to the monitor's socket, without waiting for its greeting.

    Raises:
        Unreachable: no such socket, nobody listens on it, or no right to open it.
        MonitorBusy: another client holds it and the listen backlog is full.
    """
    name = os.fspath(path)
    if len(os.fsencode(name)) > _LONGEST_PATH:
        raise Unreachable(f"{name}: a unix socket's path is at most {_LONGEST_PATH} bytes")
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    except OSError as error:  # no descriptor left: raise the limit (LimitNOFILE= in a systemd unit)
        raise Unreachable(f"{name}: {_reason(error)}") from error
    try:
        connection.setblocking(False)
        connection.connect(name)
        pid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0]
    except BlockingIOError:
        connection.close()
        raise MonitorBusy(f"{name}: {HELD_HINT}") from None
    except OSError as error:
        connection.close()
        raise Unreachable(f"{name}: {_reason(error)}") from error
    return OpenMonitor(name, connection, pid or None)


HELD_HINT: Final = (
    "another client holds this monitor, which serves one at a time; "
    "give QEMU one more: -qmp unix:PATH,server=on,wait=off"
)


@dataclass(frozen=True, slots=True)
class SocketTable:
    """The inodes (of sockfs) of the sockets that are open on a socket's path.

    All are empty where /proc/net/unix does not list them: another network namespace, or a socket that
    was bound under another name (a relative path, a link).
    """

    listening: frozenset[bytes]
    bound: frozenset[bytes]  # those that listen, and those that are about to
    accepted: frozenset[bytes]  # accepted by the server; those in the backlog are not included


def socket_table(path: str) -> SocketTable:
    """Return the entries of /proc/net/unix for the socket ``path``. Source: proc(5), Linux net/unix."""
    try:
        table = with_reserve(Path("/proc/net/unix").read_bytes)
    except OSError:
        table = b""
    wanted = os.fsencode(path)
    rows = [row for row in (line.split(None, 7) for line in table.splitlines()[1:]) if row[7:] == [wanted]]
    return SocketTable(
        listening=frozenset(row[6] for row in rows if row[3] == _LISTENS),
        bound=frozenset(row[6] for row in rows if row[5] == _BOUND),
        accepted=frozenset(row[6] for row in rows if row[5] == _ACCEPTED),
    )


def _reason(error: OSError) -> str:
    match error:
        case FileNotFoundError():
            return "no such socket; is the VM running, with -qmp unix:PATH,server=on,wait=off?"
        case ConnectionRefusedError():
            return "nobody listens on this socket; QEMU was killed, or has not started yet"
        case PermissionError():
            return "no permission to open this socket; it belongs to the user that runs QEMU"
        case _:
            return error.strerror or str(error)
