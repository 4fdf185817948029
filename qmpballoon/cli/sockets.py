"""Which monitors a typed path or glob names, and whether a process listens there."""

from __future__ import annotations

import errno
import glob
import os
import socket
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from qmpballoon.addresses import is_file, is_tcp, unix_address
from qmpballoon.api import Vm, connect
from qmpballoon.config import COMMAND_LINE, refused_path, surroundings_here
from qmpballoon.errors import ConfigurationError, Problem, Unreachable
from qmpballoon.qmp.discovery import unreadable
from qmpballoon.qmp.monitor import socket_table
from qmpballoon.qmp.tcp import is_tcp_listening

ARGUMENT_HELP: Final = (
    "QMP socket or quoted glob; default: /run/qmpballoon/*.qmp and $XDG_RUNTIME_DIR/qmpballoon/*.qmp"
)


@dataclass(frozen=True, slots=True)
class Found:
    """A socket, and whether its path was typed or matched a glob."""

    path: str
    is_named: bool


def find_sockets(typed: Sequence[str], *, allow_remote: bool = False) -> list[Found]:
    """Return the sockets of typed paths and globs, sorted; without any, those of the default globs.

    An existing path is never a glob. A glob matches sockets only. An address of TCP is returned as it is;
    only with ``allow_remote`` it may be of another machine.

    Raises:
        Unreachable: there is none.
        ConfigurationError: a typed text is a directory or no path.
    """
    patterns = typed or surroundings_here().sockets
    refused = [refused_path(each, allow_remote=allow_remote) for each in typed]
    problems = [Problem(None, "SOCKET", why) for why in refused if why is not None]
    if problems:
        raise ConfigurationError(COMMAND_LINE, problems)
    found: dict[str, bool] = {}
    for pattern in patterns:
        if typed and (not is_file(pattern) or os.path.lexists(pattern) or not glob.has_magic(pattern)):
            found[pattern] = True
        else:
            for path in glob.glob(pattern):
                if _is_socket(path):
                    found.setdefault(path, False)
    if not found and (hidden := unreadable(patterns)):
        raise Unreachable(
            f"{hidden[0]}: this user may not read the directory, so no socket in it is seen; run this as a "
            "user who may, for example with sudo"
        )
    if not found:
        raise Unreachable(
            f"no QMP socket at {' or '.join(patterns)}; name one, or start QEMU with "
            "-qmp unix:/run/qmpballoon/NAME.qmp,server=on,wait=off"
        )
    return [Found(path, found[path]) for path in sorted(found)]


def is_listening(path: str) -> bool:
    """Tell whether a process listens on the socket, without connecting to it; another machine's is said to.

    A datagram connect fails with EPROTOTYPE if a stream socket is bound there, and with ECONNREFUSED if
    none is (unix(7)).
    """
    if is_tcp(path):
        return is_tcp_listening(path)
    if not is_file(path):
        return bool(socket_table(path).listening)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            return probe.connect_ex(unix_address(path)) == errno.EPROTOTYPE
        except OSError:  # too long for a unix socket
            return False


@asynccontextmanager
async def connected(path: str, *, timeout_s: float) -> AsyncIterator[Vm]:
    """Open a monitor as :func:`qmpballoon.connect` does, but do not wait if no process listens.

    Whether an address may be of another machine was checked where it was typed, in `find_sockets`.
    """
    async with connect(path, timeout_s=timeout_s if is_listening(path) else 0.0, allow_remote=True) as vm:
        yield vm


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:  # removed meanwhile
        return False
