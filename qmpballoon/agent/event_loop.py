"""The agent's event loop: uvloop's where it is installed, otherwise asyncio's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from qmpballoon.log import log_event

_UNUSABLE: Final = (
    ImportError,  # no wheel for this machine (armv7l, riscv64), or a library that does not load
    AttributeError,  # a Python version that it does not support
    DeprecationWarning,  # the same, where warnings are errors
    OSError,
    SystemError,  # an extension module that cannot be initialised
)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """Return the factory of the agent's event loop; log it if uvloop cannot be used."""
    try:
        import uvloop
    except _UNUSABLE as error:
        log_event(
            "asyncio-loop",
            "uvloop cannot be used: asyncio's own loop serves, at some more processor time",
            reason=error,
        )
        return asyncio.new_event_loop
    return uvloop.new_event_loop
