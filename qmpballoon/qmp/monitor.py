"""One monitor socket file: connecting to it, the process behind it, and whether another client holds it.

A non-blocking unix connect returns at once, with success or an error. QEMU's listen backlog is 1, so a
busy monitor accepts two more connections without a greeting and refuses the next with EAGAIN (QEMU 7.2,
Linux 6.1). Closed connections stay in that backlog, so connect once and wait.
"""

from __future__ import annotations

import grp
import os
import pwd
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from qmpballoon.addresses import is_abstract, unix_address
from qmpballoon.descriptors import with_reserve
from qmpballoon.errors import MonitorBusy, Unreachable
from qmpballoon.readers import LONGEST_SOCKET_PATH

_UCRED: Final = struct.Struct("3i")  # pid, uid, gid: unix(7), SO_PEERCRED
_OVERFLOW_UID: Final = 65534  # of all users that this user namespace does not know: user_namespaces(7)
_LISTENS: Final = b"00010000"  # the flag __SO_ACCEPTCON in /proc/net/unix
_ACCEPTED: Final = b"03"  # the state SS_CONNECTED there; 02 is still in the backlog
_SOCK_DIAG: Final = 4  # the netlink protocol; these are of linux/sock_diag.h, unix_diag.h and netlink.h
_DIAG_REQUEST: Final = struct.Struct("=IHHII BxxxIIIII")  # struct nlmsghdr, struct unix_diag_req
_MESSAGE: Final = struct.Struct("=IHHII")  # struct nlmsghdr
_BY_FAMILY: Final = 20  # SOCK_DIAG_BY_FAMILY
_REQUEST: Final = 1  # NLM_F_REQUEST
_ALL_STATES: Final = 0xFFFFFFFF
_ANY: Final = 0xFFFFFFFF  # cookie
_SHOW_PEER: Final = 4  # UDIAG_SHOW_PEER
_SHOW_NAMES: Final = 3  # UDIAG_SHOW_NAME and UDIAG_SHOW_VFS
_DUMP: Final = 0x300  # NLM_F_DUMP
_NAME: Final = 0  # UNIX_DIAG_NAME
_FILE: Final = 1  # UNIX_DIAG_VFS
_PEER: Final = 2  # UNIX_DIAG_PEER
_KERNEL_DEVICE_MINOR_BITS: Final = 20
_LARGEST_PART: Final = 65536
_DIAG_ATTRIBUTES: Final = 32  # they follow struct nlmsghdr and struct unix_diag_msg
_BOUND: Final = b"01"  # to no other socket yet
_SHORTEST_AGE_S: Final = 0.005
_SHARE: Final = 0.05


@dataclass(frozen=True, slots=True)
class OpenMonitor:
    """A connected socket that nobody has greeted yet, and the process that listens."""

    path: str
    connection: socket.socket
    pid: int | None  # None: the process is in a pid namespace that is not visible here
    owner: int | None = None  # uid of this process; None: not known


def open_monitor(path: str | os.PathLike[str]) -> OpenMonitor:
    """Connect to the monitor's socket, without waiting for its greeting.

    Raises:
        Unreachable: no such socket, nobody listens on it, or no right to open it.
        MonitorBusy: another client holds it and the listen backlog is full.
    """
    name = os.fspath(path)
    if len(os.fsencode(name)) > LONGEST_SOCKET_PATH:
        raise Unreachable(f"{name}: a unix socket's path is at most {LONGEST_SOCKET_PATH} bytes")
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    except OSError as error:  # no descriptor left: raise the limit (LimitNOFILE= in a systemd unit)
        raise Unreachable(f"{name}: {_reason(error)}") from error
    try:
        connection.setblocking(False)
        connection.connect(unix_address(name))
        pid, uid = peer_of(connection)
        owner = _owner_of(name, uid)
    except BlockingIOError:
        connection.close()
        raise MonitorBusy(f"{name}: {HELD_HINT}") from None
    except OSError as error:
        connection.close()
        raise Unreachable(f"{name}: {_reason(error, name)}{_rights(name, error)}") from error
    return OpenMonitor(name, connection, pid or None, owner)


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Return pid and uid of the process that listens at the other end; pid 0: in another pid namespace."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(credentials)
    return pid, uid


def listening_paths(name: str) -> list[str]:
    """Return the paths of the unix sockets with this file name on which a process listens."""
    end = b"/" + os.fsencode(name)
    return [
        os.fsdecode(path)
        for path, rows in _read_rows().items()
        if path.endswith(end) and any(flags == _LISTENS for _, flags, _ in rows)
    ]


def _owner_of(path: str, uid: int) -> int | None:
    """Return whose process listens; of one in another user namespace, whose the socket file is, if any."""
    if uid != _OVERFLOW_UID:
        return uid
    if is_abstract(path):
        return None
    owner = os.stat(path).st_uid
    return None if owner == _OVERFLOW_UID else owner


def was_accepted(connection: socket.socket) -> bool | None:
    """Tell whether the server has accepted this connection, or leaves it in the backlog; None if not known.

    The kernel names the peer of a connection by its inode, which it has from ``accept`` on, under whatever
    name the server has bound. Source: sock_diag(7), UNIX_DIAG_PEER.
    """
    header = (_DIAG_REQUEST.size, _BY_FAMILY, _REQUEST, 0, 0)
    try:
        inode = os.fstat(connection.fileno()).st_ino
        request = _DIAG_REQUEST.pack(*header, socket.AF_UNIX, _ALL_STATES, inode, _SHOW_PEER, _ANY, _ANY)
        with _socket_diagnosis() as kernel:
            kernel.send(request)
            answer = kernel.recv(4096)
    except OSError:  # it is closed; no descriptor is left; or a kernel without it
        return None
    peer = _attributes(answer[_DIAG_ATTRIBUTES:]).get(_PEER, b"")
    return bool(_inode(peer)) if len(peer) == 4 else None


def holders_of(path: str) -> frozenset[int]:
    """Return the inodes (of sockfs) of the connected clients of a socket that its server has accepted.

    The kernel names a socket by the file that it is bound to, under whatever name. It is empty where the
    kernel does not tell, as of a server in another network namespace. Source: sock_diag(7).
    """
    header = (_DIAG_REQUEST.size, _BY_FAMILY, _REQUEST | _DUMP, 0, 0)
    flags, name = _SHOW_NAMES | _SHOW_PEER, os.fsencode(unix_address(path))
    found: set[int] = set()
    try:
        file = None if is_abstract(path) else _file_of(path)
        with _socket_diagnosis() as kernel:
            kernel.send(_DIAG_REQUEST.pack(*header, socket.AF_UNIX, _ALL_STATES, 0, flags, _ANY, _ANY))
            while rows := list(_messages(kernel.recv(_LARGEST_PART))):
                for kind, row in rows:
                    if kind != _BY_FAMILY:  # the end, or an error
                        return frozenset(found)
                    known = _attributes(row[_DIAG_ATTRIBUTES - _MESSAGE.size :])
                    bound = known.get(_NAME, b"").rstrip(b"\0")
                    is_it = bound == name or (file is not None and known.get(_FILE) == file)
                    if is_it and (peer := _inode(known.get(_PEER, b""))):
                        found.add(peer)
    except OSError:
        pass
    return frozenset(found)


def _file_of(path: str) -> bytes:
    """Return how the kernel names the file of a socket in UNIX_DIAG_VFS."""
    place = os.stat(path)
    device = os.major(place.st_dev) << _KERNEL_DEVICE_MINOR_BITS | os.minor(place.st_dev)
    return struct.pack("=II", place.st_ino & _ANY, device & _ANY)


def _socket_diagnosis() -> socket.socket:
    """Return a netlink socket on which the kernel's answer is there when ``send`` returns."""
    kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _SOCK_DIAG)
    kernel.setblocking(False)
    return kernel


def _messages(part: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield kind and content of the netlink messages in what was received at once."""
    at = 0
    while at + _MESSAGE.size <= len(part):
        size, kind = _MESSAGE.unpack_from(part, at)[:2]
        yield kind, part[at + _MESSAGE.size : at + size]
        at += max(_MESSAGE.size, _aligned(size))


def _attributes(packed: bytes) -> dict[int, bytes]:
    """Return the netlink attributes by their kind."""
    found: dict[int, bytes] = {}
    at = 0
    while at + 4 <= len(packed):
        size, kind = struct.unpack_from("=HH", packed, at)
        found[kind] = packed[at + 4 : at + size]
        at += max(4, _aligned(size))
    return found


def _aligned(size: int) -> int:
    return (size + 3) & ~3


def _inode(packed: bytes) -> int:
    return int.from_bytes(packed, sys.byteorder)


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


_Rows: TypeAlias = dict[bytes, list[tuple[bytes, bytes, bytes]]]
"""Inode, flags and state of the sockets that have a path, by path."""


class SocketTables:
    """The tables of all sockets, from one reading of /proc/net/unix; that takes 2 ms with a thousand sockets.

    Source: proc(5), Linux net/unix.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._read_at_s = float("-inf")
        self._took_s = 0.0
        self._rows: _Rows = {}

    def lately(self, path: str) -> SocketTable:
        """Return the entries as they were a moment ago; readings for that take 5 % of the time at most."""
        return self.of(path, max_age_s=max(_SHORTEST_AGE_S, self._took_s / _SHARE))

    def of(self, path: str, *, max_age_s: float = 0.0) -> SocketTable:
        """Return the entries for the socket ``path`` as they were ``max_age_s`` ago at most."""
        now_s = self._clock()
        if now_s - self._read_at_s > max_age_s or not max_age_s:
            self._rows, self._read_at_s = _read_rows(), now_s
            self._took_s = self._clock() - now_s
        rows = self._rows.get(os.fsencode(path), [])
        return SocketTable(
            listening=frozenset(inode for inode, flags, _ in rows if flags == _LISTENS),
            bound=frozenset(inode for inode, _, state in rows if state == _BOUND),
            accepted=frozenset(inode for inode, _, state in rows if state == _ACCEPTED),
        )


def socket_table(path: str) -> SocketTable:
    """Return the entries of /proc/net/unix for the socket ``path``, read now."""
    return SocketTables().of(path)


def _read_rows() -> _Rows:
    try:
        table = with_reserve(Path("/proc/net/unix").read_bytes)
    except OSError:
        table = b""
    rows: _Rows = {}
    same: dict[bytes, bytes] = {}  # flags and states, of which there are few
    for line in table.splitlines()[1:]:
        row = line.split(None, 7)
        if len(row) > 7:
            rows.setdefault(row[7], []).append(
                (row[6], same.setdefault(row[3], row[3]), same.setdefault(row[5], row[5]))
            )
    return rows


def _reason(error: OSError, path: str | None = None) -> str:
    match error:
        case ConnectionRefusedError() if path is not None and _is_no_socket(path):
            return "this is no socket"
        case FileNotFoundError():
            return "no such socket; is the VM running, with -qmp unix:PATH,server=on,wait=off?"
        case ConnectionRefusedError():
            return "nobody listens on this socket; QEMU was killed, or has not started yet"
        case PermissionError():
            return "no permission to open this socket; it belongs to the user that runs QEMU"
        case _:
            return error.strerror or str(error)


def _is_no_socket(path: str) -> bool:
    try:
        return not is_abstract(path) and not stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:  # removed meanwhile
        return False


def _rights(path: str, error: OSError) -> str:
    """Return whose the socket is, where it may not be opened."""
    if not isinstance(error, PermissionError):
        return ""
    try:
        status = os.stat(path)
    except OSError:
        return " (nor may its directory be entered)"
    return (
        f" (user {_named(pwd.getpwuid, status.st_uid)}, group {group_named(status.st_gid)}, "
        f"mode {stat.S_IMODE(status.st_mode):04o}): run as this user, or as a member of the group and with "
        "mode 0660"
    )


def group_named(gid: int) -> str:
    """Return the name of a group, its number if it has none."""
    return _named(grp.getgrgid, gid)


def _named(look_up: Callable[[int], Sequence[object]], number: int) -> str:
    try:
        return str(look_up(number)[0])
    except KeyError:
        return str(number)
