"""One file descriptor in reserve, for what a long-running process must do also when none is left.

Out of descriptors, a read of /proc fails like one of a process that is gone, and a service manager that
hears nothing kills the service. What opens one descriptor and closes it again goes through
`with_reserve`. Other threads may be faster and take the reserve: who uses it is prepared to fail.
Source: open(2), EMFILE and ENFILE.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from contextlib import suppress
from typing import Final, TypeVar

T = TypeVar("T")

EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE)
_reserve: Final[list[int]] = []  # one, once it was asked for


def keep_reserve() -> None:
    """Keep one descriptor in reserve from now on, if one is left; a second call changes nothing."""
    with suppress(OSError):
        if not _reserve:
            _reserve.append(_opened())


def give_up_reserve() -> None:
    """Keep none any more."""
    while _reserve:
        os.close(_reserve.pop())


def with_reserve(action: Callable[[], T]) -> T:
    """Do what opens a descriptor and closes it again; if none is left, with the one in reserve.

    Raises:
        OSError: as the action does.
    """
    try:
        return action()
    except OSError as error:
        if error.errno not in EXHAUSTED or not _reserve:
            raise
    give_up_reserve()
    try:
        return action()
    finally:
        keep_reserve()


def _opened() -> int:
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def are_left() -> bool:
    """Tell whether a descriptor can be opened; a reserve that was lost to another thread is made good."""
    keep_reserve()
    try:
        os.close(_opened())
    except OSError as error:
        return error.errno not in EXHAUSTED
    return True


def most() -> int:
    """Return how many this process may have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
