"""Which event loop the agent runs on: uvloop's where it is installed, else asyncio's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from qmpballoon.log import say

_UNUSABLE: Final = (
    ImportError,  # no wheel for this machine (armv7l, riscv64), or a library that does not load
    AttributeError,  # of a Python that it does not know
    DeprecationWarning,  # of such a Python, where warnings are errors
    OSError,
    SystemError,  # an extension module that cannot be initialised
)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """Return what makes the agent's event loop; a machine without uvloop is logged."""
    try:
        import uvloop
    except _UNUSABLE as error:
        say(
            "asyncio-loop",
            "uvloop cannot be used: asyncio's own loop serves, at some more processor time",
            reason=error,
        )
        return asyncio.new_event_loop
    return uvloop.new_event_loop
