"""Discovery of monitor sockets by globs: periodic scans, and inotify where it works.

Only a scan decides what exists. inotify tells when to scan before the next scan is due. So a directory
that cannot be watched (network file system, limit of watches) only delays discovery by seconds.
"""

from __future__ import annotations

import asyncio
import glob
import os
import stat
import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import ExitStack, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from asyncinotify import Inotify, Mask, Watch

from qmpballoon.addresses import is_abstract, is_file, is_tcp
from qmpballoon.qmp.monitor import SocketTables

SCAN_EVERY_S: Final = 2.0
_SETTLE_S: Final = 0.02  # a directory that fills with sockets is scanned once, not once per socket
_SHARE: Final = 0.1  # of the time that scans after changes may take
_REGULAR_SHARE: Final = 0.002  # of the time that regular scans may take
_LONGEST_PAUSE_S: Final = 10.0
_INTERESTING: Final = (
    Mask.CREATE
    | Mask.DELETE
    | Mask.MOVED_TO
    | Mask.MOVED_FROM
    | Mask.ATTRIB
    | Mask.DELETE_SELF
    | Mask.ONLYDIR
)

SocketMark = tuple[int, int, int]
"""Device, inode and change time of a socket file. A different mark may be a different socket. The inode
alone is not enough: a new QEMU on the same path got the same number."""

_ALWAYS: Final[SocketMark] = (0, 0, 0)  # of an address of TCP, where nothing but a connection tells


def scan(globs: Iterable[str]) -> dict[str, SocketMark]:
    """Return the sockets that the globs match now, sorted by path, and every address of TCP."""
    globs = tuple(globs)
    found = {pattern: _ALWAYS for pattern in globs if is_tcp(pattern)} | _abstract(globs)
    for path in sorted({match for pattern in globs for match in _matches(pattern)}):
        mark = _mark_of(path)
        if mark is not None:
            found[path] = mark
    return dict(sorted(found.items()))


def unreadable(globs: Iterable[str]) -> list[str]:
    """Return the directories in which this user cannot see what the globs match; they seem to be empty."""
    found: dict[str, None] = {}
    for pattern in filter(is_file, globs):
        *parents, name = os.path.abspath(pattern).split(os.sep)[1:]
        directories = [os.sep]
        for part in parents:
            seen = _where_seen(directories, part, found)
            directories = [path for directory in seen for path in _in(directory, part)]
        _where_seen(directories, name, found)
    return list(found)


def _where_seen(directories: Iterable[str], part: str, hidden: dict[str, None]) -> list[str]:
    """Return the directories in which this user sees what a part of a glob matches; note the others."""
    needed = os.R_OK | os.X_OK if glob.has_magic(part) else os.X_OK
    seen = []
    for directory in directories:
        if os.access(directory, needed, effective_ids=True):
            seen.append(directory)
        elif os.path.isdir(directory):
            hidden[directory] = None
    return seen


def _in(directory: str, part: str) -> Iterable[str]:
    path = os.path.join(glob.escape(directory), part)
    return glob.iglob(path) if glob.has_magic(part) else (os.path.join(directory, part),)


def _abstract(globs: Iterable[str]) -> dict[str, SocketMark]:
    """Return the abstract sockets on which a process listens; the mark is the listening socket's inode."""
    tables, found = SocketTables(), {}
    for pattern in filter(is_abstract, globs):
        for inode in tables.lately(pattern).listening:
            found[pattern] = (0, int(inode), 0)
    return found


def _matches(pattern: str) -> Iterable[str]:
    return () if not is_file(pattern) else glob.iglob(os.path.abspath(pattern))


def _mark_of(path: str) -> SocketMark | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_ctime_ns) if stat.S_ISSOCK(status.st_mode) else None


class SocketWatch:
    """Watches the sockets that match some globs. The globs may be replaced at any time."""

    def __init__(self, globs: Iterable[str]) -> None:
        self.globs = _absolute(globs)
        self.unreadable: list[str] = []  # directories, as of the last scan
        self._wakeup = asyncio.Event()
        self._is_replaced = False  # the globs: what was found before may have been let go
        self._watches: dict[str, Watch] = {}

    def watch(self, globs: Iterable[str]) -> None:
        """Replace the globs."""
        self.globs = _absolute(globs)
        self._is_replaced = True
        self._wakeup.set()

    def covers(self, path: str) -> bool:
        """Tell whether a glob matches the path, whether or not it exists."""
        return path in self.globs or any(_fits(path, pattern) for pattern in self.globs)

    async def changes(self) -> AsyncGenerator[Mapping[str, SocketMark], None]:
        """Yield the sockets that exist: first at once, then after every change and new globs."""
        known: dict[str, SocketMark] | None = None
        with ExitStack() as stack:
            inotify = _opened(stack)
            if inotify is not None:
                loop = asyncio.get_running_loop()
                loop.add_reader(inotify.fd, self._drain, inotify)
                stack.callback(loop.remove_reader, inotify.fd)
            while True:
                self._wakeup.clear()
                if inotify is not None:
                    self._watch_directories(inotify)
                began_s = time.thread_time()
                found = self.scan(known or {})
                self.unreadable = unreadable(self.globs)
                cost_s = time.thread_time() - began_s
                if found != known or self._is_replaced:
                    known, self._is_replaced = found, False
                    yield found
                try:
                    async with asyncio.timeout(
                        min(_LONGEST_PAUSE_S, max(SCAN_EVERY_S, cost_s / _REGULAR_SHARE))
                    ):
                        await self._wakeup.wait()
                    await asyncio.sleep(max(_SETTLE_S, cost_s / _SHARE))
                except TimeoutError:
                    pass

    def scan(self, known: Mapping[str, SocketMark]) -> dict[str, SocketMark]:
        """Return the sockets that exist, also in a directory that cannot be listed at the moment.

        A directory looks empty when no descriptor is left or its file system hangs. A known socket can
        still be checked then, because stat needs no descriptor.
        """
        found = scan(self.globs)
        for path in known.keys() - found.keys():
            mark = _mark_of(path)
            if mark is not None and self.covers(path):
                found[path] = mark
        return dict(sorted(found.items()))

    def _drain(self, inotify: Inotify) -> None:
        try:
            os.read(inotify.fd, 65536)
        except BlockingIOError:
            return
        self._wakeup.set()

    def _watch_directories(self, inotify: Inotify) -> None:
        parents = {os.path.dirname(pattern) for pattern in self.globs if is_file(pattern)}
        wanted = {directory for parent in parents for directory in glob.iglob(parent)}
        for directory in self._watches.keys() - wanted:
            with suppress(OSError):  # the directory was removed, and the watch with it
                inotify.rm_watch(self._watches.pop(directory))
        for directory in wanted:
            try:  # repeated each time: a directory that was recreated has lost its watch
                self._watches[directory] = inotify.add_watch(Path(directory), _INTERESTING)
            except OSError:
                self._watches.pop(directory, None)


def _absolute(globs: Iterable[str]) -> frozenset[str]:
    return frozenset(os.path.abspath(pattern) if is_file(pattern) else pattern for pattern in globs)


def _opened(stack: ExitStack) -> Inotify | None:
    try:
        return stack.enter_context(Inotify())
    except OSError:
        return None  # no inotify here, or its limit is reached: scans are enough


def _fits(path: str, pattern: str) -> bool:
    names, patterns = path.split(os.sep), pattern.split(os.sep)
    return len(names) == len(patterns) and all(
        fnmatchcase(name, part) for name, part in zip(names, patterns, strict=True)
    )
