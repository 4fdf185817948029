"""Unix sockets that we listen on: mode 0660, never in place of one that is in use."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

_MODE: Final = 0o660
_BACKLOG: Final = 64


def listen_at(path: str, occupied: str) -> socket.socket:
    """Return a listening socket at ``path`` with mode 0660, in place of one where nobody listens.

    ``occupied`` is the reason if somebody listens there.

    Raises:
        OSError: it cannot be made, or somebody listens there.
    """
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe,
        suppress(FileNotFoundError, ConnectionRefusedError),
    ):
        probe.setblocking(False)
        probe.connect(path)
        raise FileExistsError(None, occupied)
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(None, "a file that is no socket is there")
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setblocking(False)
        with _umask(0o777 & ~_MODE):  # from the first moment on
            listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def remove(path: str, inode: int) -> None:
    """Remove a socket that we made, unless another one has taken its place."""
    with suppress(OSError):
        if os.stat(path).st_ino == inode:
            os.unlink(path)


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
