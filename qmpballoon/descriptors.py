"""The standard descriptors, and one in reserve for what a long-running process must do when none is left.

Without a free descriptor, a read of /proc fails as if the process had ended, and the service manager kills
a service that cannot notify it. An action that opens one descriptor and closes it again is run by
`with_reserve`. Another thread may take the released reserve first, so the action can still fail.
Source: open(2), EMFILE and ENFILE.
"""

from __future__ import annotations

import errno
import os
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Final, TypeVar

T = TypeVar("T")

EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE)
_reserve: Final[list[int]] = []  # empty, or one descriptor


def open_standard() -> None:
    """Open /dev/null in place of each standard descriptor that is closed, and make it the standard stream.

    A socket would get its number otherwise. libuv aborts when it closes its own descriptor below 3 (seen with
    uvloop 0.23).
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
            os.set_inheritable(number, True)  # as every standard descriptor
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def keep_reserve() -> None:
    """Keep one descriptor in reserve from now on, if one is left; a second call changes nothing."""
    with suppress(OSError):
        if not _reserve:
            _reserve.append(_open_null())


def release_reserve() -> None:
    """Close the reserve."""
    while _reserve:
        os.close(_reserve.pop())


def with_reserve(action: Callable[[], T]) -> T:
    """Run an action that opens one descriptor and closes it; if none is left, use the reserve.

    Raises:
        OSError: as the action does.
    """
    try:
        return action()
    except OSError as error:
        if error.errno not in EXHAUSTED or not _reserve:
            raise
    release_reserve()
    try:
        return action()
    finally:
        keep_reserve()


def _open_null() -> int:
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def are_left() -> bool:
    """Tell whether a descriptor can be opened; restores a reserve that another thread took."""
    keep_reserve()
    try:
        os.close(_open_null())
    except OSError as error:
        return error.errno not in EXHAUSTED
    return True


def limit() -> int:
    """Return how many descriptors this process may have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
