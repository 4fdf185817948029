"""What other programs see of a QEMU process: its listening sockets, its pid, and its guest's memory.

A client sees the pid of the process that called ``listen`` (SO_PEERCRED, unix(7)). So one process can serve
many QEMUs that have a pid each: a child process for each calls ``listen``, maps the guest's memory, and
sleeps. The child uses no processor time, and shares its pages with its parent.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

BACKLOG: Final = 1  # as in QEMU: two clients may wait without a greeting, the next cannot connect

_MAP_NORESERVE: Final = 0x4000  # Linux; mmap has it from Python 3.13 on
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


def bind(path: Path) -> socket.socket:
    """Return a new socket at this path; it does not listen yet."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    listener.bind(os.fspath(path))
    return listener


def map_memory(size: int) -> mmap.mmap:
    """Map a guest's memory as QEMU does; no page of it is used."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)


def listen_in_children(monitors: Sequence[Sequence[Path]], size: int) -> list[list[socket.socket]]:
    """Return the listening sockets of each QEMU; a child process per QEMU listens and holds its memory.

    The children end with this process.
    """
    gc.freeze()  # the garbage collector does not write to shared pages, which would copy them
    return [listen_in_child(paths, size)[1] for paths in monitors]


def listen_in_child(paths: Sequence[Path], size: int) -> tuple[int, list[socket.socket]]:
    """Return the pid and the listening sockets of one QEMU, whose child process ends with this one.

    The child must be reaped if it is killed before.

    Raises:
        OSError: a path cannot be bound, or the child has ended.
    """
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()
    listeners = [bind(path) for path in paths]
    ready_reader, ready_writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            _hold(listeners, size, parent, ready_writer)
        finally:
            os._exit(1)
    os.close(ready_writer)
    ready = os.read(ready_reader, 1)
    os.close(ready_reader)
    if not ready:
        raise OSError(f"the process that listens on {paths[0]} has ended")
    return child, listeners


def _hold(listeners: Sequence[socket.socket], size: int, parent: int, ready_writer: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    for listener in listeners:
        listener.listen(BACKLOG)
    memory = map_memory(size)
    os.write(ready_writer, b".")
    os.closerange(sys.stderr.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    while os.getppid() == parent:
        signal.pause()
    memory.close()
