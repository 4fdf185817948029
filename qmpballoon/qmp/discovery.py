"""Which monitor sockets are there: globs, watched by inotify where it serves, and scanned anyway.

A scan is the truth; inotify only tells when to scan before the next one is due, so a directory that
cannot be watched (network file systems, the limit of watches) costs seconds, nothing more.
"""

from __future__ import annotations

import asyncio
import glob
import os
import stat
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import ExitStack, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from asyncinotify import Inotify, Mask, Watch

SCAN_EVERY_S: Final = 2.0
_SETTLE_S: Final = 0.02  # a directory that fills with sockets is scanned once, not once per socket
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
"""Device, inode and change time of a socket file: another mark may be another socket. The inode alone
proves nothing: a new QEMU on the same path got the same number."""


def scan(globs: Iterable[str]) -> dict[str, SocketMark]:
    """Return the sockets that the globs match now, sorted by path."""
    found = {}
    for path in sorted({match for pattern in globs for match in glob.iglob(os.path.abspath(pattern))}):
        mark = _mark_of(path)
        if mark is not None:
            found[path] = mark
    return found


def _mark_of(path: str) -> SocketMark | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_ctime_ns) if stat.S_ISSOCK(status.st_mode) else None


class SocketWatch:
    """The sockets of some globs as they come and go; the globs may be exchanged at any time."""

    def __init__(self, globs: Iterable[str]) -> None:
        self.globs = tuple(globs)
        self._stirred = asyncio.Event()
        self._watches: dict[str, Watch] = {}

    def watch(self, globs: Iterable[str]) -> None:
        """Exchange the globs."""
        self.globs = tuple(globs)
        self._stirred.set()

    def covers(self, path: str) -> bool:
        """Tell whether the path would be found if it were there."""
        return any(_fits(path, os.path.abspath(pattern)) for pattern in self.globs)

    async def changes(self) -> AsyncGenerator[Mapping[str, SocketMark], None]:
        """Yield the sockets that are there, at once and again whenever something changed."""
        known: dict[str, SocketMark] | None = None
        with ExitStack() as stack:
            inotify = _opened(stack)
            if inotify is not None:
                loop = asyncio.get_running_loop()
                loop.add_reader(inotify.fd, self._drain, inotify)
                stack.callback(loop.remove_reader, inotify.fd)
            while True:
                self._stirred.clear()
                if inotify is not None:
                    self._watch_directories(inotify)
                found = self.scan(known or {})
                if found != known:
                    known = found
                    yield found
                try:
                    async with asyncio.timeout(SCAN_EVERY_S):
                        await self._stirred.wait()
                    await asyncio.sleep(_SETTLE_S)
                except TimeoutError:
                    pass

    def scan(self, known: Mapping[str, SocketMark]) -> dict[str, SocketMark]:
        """Return the sockets that are there, also those of a directory that cannot be listed just now.

        Out of descriptors, or while a file system hangs, a directory looks as if it were empty. A socket
        that was there and still is needs none to be seen.
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
        self._stirred.set()

    def _watch_directories(self, inotify: Inotify) -> None:
        parents = {os.path.dirname(os.path.abspath(pattern)) for pattern in self.globs}
        wanted = {directory for parent in parents for directory in glob.iglob(parent)}
        for directory in self._watches.keys() - wanted:
            with suppress(OSError):  # the directory went, and the watch with it
                inotify.rm_watch(self._watches.pop(directory))
        for directory in wanted:
            try:  # again each time: a directory that was made anew has lost its watch
                self._watches[directory] = inotify.add_watch(Path(directory), _INTERESTING)
            except OSError:
                self._watches.pop(directory, None)


def _opened(stack: ExitStack) -> Inotify | None:
    try:
        return stack.enter_context(Inotify())
    except OSError:
        return None  # no inotify here, or its limit is reached: the scan serves


def _fits(path: str, pattern: str) -> bool:
    names, patterns = path.split(os.sep), pattern.split(os.sep)
    return len(names) == len(patterns) and all(
        fnmatchcase(name, part) for name, part in zip(names, patterns, strict=True)
    )
